//! Two hosts behind the routers of two homes, and a relay in the internet between them.

use std::time::Duration;

use serde_json::Value;
use sync_lab::{Lab, program};

/// Longer than anything here takes on a busy machine, the search for a direct way apart.
const PATIENCE: Duration = Duration::from_secs(60);
/// iroh looks for a better way once a minute at least.
const DIRECT_WITHIN: Duration = Duration::from_secs(80);
/// Well over the silence after which a way is given up.
const RELAYED_WITHIN: Duration = Duration::from_secs(20);

/// The internet is the lab's own namespace, in which 10.9.0.1 is the relay's; hosts h1 and h2 are behind routers r1 and
/// r2, which translate addresses and let in what answers, as those of homes do.
const NETWORK: &str = r#"
ip addr add 10.9.0.1/32 dev lo
echo 1 >/proc/sys/net/ipv4/ip_forward
for n in 1 2; do
    ip netns add r$n
    ip netns add h$n
    ip link add to_r$n type veth peer name wan netns r$n
    ip addr add 10.$n.0.1/24 dev to_r$n
    ip link set to_r$n up
    ip -n r$n link set lo up
    ip -n r$n addr add 10.$n.0.2/24 dev wan
    ip -n r$n link set wan up
    ip -n r$n route add default via 10.$n.0.1
    ip -n r$n link add lan type veth peer name e netns h$n
    ip -n r$n addr add 192.168.$n.1/24 dev lan
    ip -n r$n link set lan up
    ip -n h$n link set lo up
    ip -n h$n addr add 192.168.$n.2/24 dev e
    ip -n h$n link set e up
    ip -n h$n route add default via 192.168.$n.1
    ip netns exec r$n sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
    ip netns exec r$n nft -f - <<END
table ip home {
    chain out { type nat hook postrouting priority 100; oifname "wan" masquerade; }
    chain to_router { type filter hook input priority 0; iifname "wan" ct state new drop; }
    chain to_home { type filter hook forward priority 0; iifname "wan" ct state new drop; }
}
END
done
"#;

/// Both hosts reach the relay and not each other, as where neither router lets anything through.
const CUT: &str = "nft 'table ip cut { chain between { type filter hook forward priority 0; policy drop; }; }'";
const RESTORE: &str = "nft delete table ip cut";

struct Site {
    lab: Lab,
}

impl Site {
    /// Two hosts that share a folder by way of a relay with these settings, and cannot reach each other.
    fn new(settings: &str) -> Option<Self> {
        let mut lab = Lab::new()?;
        let (relay, command) = (program("sync-relay", "sync-relay"), program("sync-cli", "syncshell"));
        lab.ran(NETWORK);
        lab.define(&format!(
            r#"
            host() {{
                n=$1
                shift
                SYNCSHELL_HOME="$DIR/home$n" SYNCSHELL_RUNTIME_DIR="$DIR/run$n" SYNCSHELL_SAME_MACHINE=off \
                    ip netns exec h$n {command:?} "$@"
            }}
            "#
        ));
        lab.ran(CUT);
        lab.ran(&format!(
            r#"
            printf 'open = true\n{settings}' >"$DIR/relay.toml"
            {relay:?} --bind 10.9.0.1:7841 --data "$DIR/relay" --config "$DIR/relay.toml" >"$DIR/url" 2>"$DIR/relay.log" &
            "#
        ));
        lab.until(PATIENCE, r#"test -s "$DIR/url""#);
        lab.ran(
            r#"
            for n in 1 2; do host $n init --key-store file --name host$n; mkdir "$DIR/folder$n"; done
            host 1 relay add "$(cat "$DIR/url")"
            host 1 share --json "$DIR/folder1" >"$DIR/shared.log" 2>"$DIR/share.log" &
            "#,
        );
        lab.until(PATIENCE, r#"grep -q '"code"' "$DIR/shared.log""#);
        lab.ran(
            r#"
            code=$(sed -n 's/.*"code":"\([^"]*\)".*/\1/p' "$DIR/shared.log" | head -n 1)
            host 2 join --json "$code" "$DIR/folder2" --relay "$(cat "$DIR/url")" >"$DIR/joined.log" 2>"$DIR/join.log" &
            "#,
        );
        Some(Self { lab })
    }

    /// What a host of the lab is asked about the connection to the other.
    fn peer(&mut self, host: u8) -> Option<Value> {
        let status = self.lab.ran(&format!("host {host} status --json"));
        let line = status.lines().find(|line| line.starts_with('{'))?;
        let status: Value = serde_json::from_str(line).ok()?;
        status["groups"][0]["peers"].as_array()?.iter().find(|peer| peer["state"] == "connected").cloned()
    }

    /// Waits until both hosts say that they are connected through the relay, or directly.
    fn until_way(&mut self, patience: Duration, is_relayed: bool) -> Duration {
        let start = std::time::Instant::now();
        loop {
            let peers = [1, 2].map(|host| self.peer(host));
            let is_so = |peer: &Option<Value>| {
                let is = |field: &str| peer.as_ref().is_some_and(|peer| peer[field].is_string());
                (is("relayed_by"), is("address")) == (is_relayed, !is_relayed)
            };
            if peers.iter().all(is_so) {
                return start.elapsed();
            }
            assert!(
                start.elapsed() < patience,
                "relayed: {is_relayed}: {peers:?}: {}",
                self.lab.run("tail -n 60 $DIR/*.log; for n in 1 2; do host $n status; done").1
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What one host writes the other gets, both ways.
    fn syncs(&mut self, name: &str) {
        for (from, to) in [(1, 2), (2, 1)] {
            let file = format!("{name}-{from}");
            self.lab.ran(&format!("echo {file} of $DIR >$DIR/folder{from}/{file}"));
            self.lab.until(PATIENCE, &format!("cmp $DIR/folder{from}/{file} $DIR/folder{to}/{file}"));
        }
    }
}

#[test]
fn behind_home_routers_a_connection_begins_at_the_relay_becomes_direct_and_falls_back() {
    let Some(mut site) = Site::new("") else { return };
    let took = site.until_way(PATIENCE, true);
    eprintln!("connected through the relay after {took:?}");
    site.syncs("relayed");

    for round in 1..=2 {
        site.lab.ran(RESTORE);
        let took = site.until_way(DIRECT_WITHIN, false);
        eprintln!("direct after {took:?}");
        site.syncs(&format!("direct-{round}"));
        if round == 2 {
            break;
        }
        site.lab.ran(CUT);
        let took = site.until_way(RELAYED_WITHIN, true);
        eprintln!("back at the relay after {took:?}");
        site.syncs("again");
    }
    let rtt = site.peer(1).and_then(|peer| peer["rtt_us"].as_u64());
    assert!(rtt.is_some_and(|rtt| rtt > 0), "{rtt:?}");
}

#[test]
fn a_relay_that_tells_no_addresses_carries_what_cannot_go_directly() {
    let Some(mut site) = Site::new("address_discovery = false\\n") else { return };
    site.until_way(PATIENCE, true);
    site.syncs("relayed");
}
