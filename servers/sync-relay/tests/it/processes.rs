//! The relay and the `syncshell` command, as a person has them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::site::{PATIENCE, RelayProcess, Site};

/// The command beside the relay; built if it is not there, as where this crate alone is tested.
fn syncshell() -> PathBuf {
    let relay = Path::new(env!("CARGO_BIN_EXE_sync-relay"));
    let command = relay.with_file_name(format!("syncshell{}", std::env::consts::EXE_SUFFIX));
    if !command.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "--quiet", "-p", "sync-cli"]).status().unwrap();
        assert!(built.success());
    }
    command
}

/// A home, used by one process after the other.
pub(crate) struct Home<'a> {
    pub(crate) site: &'a Site,
    pub(crate) name: &'a str,
    /// The directory in which processes of one machine find each other.
    pub(crate) machine: &'a str,
}

impl Home<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(syncshell());
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.site.path(""))
            .env("SYNCSHELL_HOME", self.site.path(self.name))
            .env("SYNCSHELL_RUNTIME_DIR", self.site.path(self.machine))
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
            .env("SYNCSHELL_BIND", "loopback")
            .env("SYNCSHELL_MDNS", "off")
            .env("SYNCSHELL_LAN", "off")
            .env("SYNCSHELL_PUBLIC_RELAYS", "off");
        command
    }

    pub(crate) fn ran(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it said where it failed.
    pub(crate) fn failed(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{arguments:?}: {said}");
        said
    }

    /// What it wrote, also where it failed.
    pub(crate) fn tried(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.command(arguments).output().unwrap().stdout).unwrap()
    }

    pub(crate) fn spawn(&self, arguments: &[&str]) -> Spawned {
        Spawned(self.command(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.ran(&["status", "--json"])).unwrap()
    }
}

/// A command that runs until it is dropped, and is killed then.
pub(crate) struct Spawned(pub(crate) Child);

impl Spawned {
    /// The first line of its output.
    pub(crate) fn line(&mut self) -> Value {
        use std::io::{BufRead as _, BufReader};

        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pushes_and_exits_and_b_starts_later_and_gets_everything_from_the_relay() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let home = |name| Home { site: &site, name, machine: "run" };
    let (anna, ben) = (home("anna"), home("ben"));
    for home in [&anna, &ben] {
        home.ran(&["init", "--key-store", "file", "--name", home.name]);
    }
    assert!(anna.ran(&["relay", "list"]).starts_with("no relay"));
    anna.ran(&["relay", "add", &relay.url]);
    assert!(anna.ran(&["relay", "list"]).contains(&relay.url));
    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let code = create.line()["code"].as_str().unwrap().to_owned();
    ben.ran(&["pair", "--join", &code]);
    assert!(create.0.wait().unwrap().success());
    assert!(ben.ran(&["relay", "list"]).contains(&relay.url), "who joins is told of it");

    // each process ends before the next one starts: they meet nowhere but at the relay
    let pushed = anna.ran(&["push", "bread and milk", "--wait", "60"]);
    assert!(pushed.contains("relay 127.0.0.1"), "{pushed}");
    let mut serving = ben.spawn(&["run", "--json"]);
    assert_eq!(serving.line()["event"], "serving");
    let give_up = Instant::now() + PATIENCE;
    while ben.ran(&["pull"]) != "bread and milk\n" {
        assert!(Instant::now() < give_up, "{}", ben.status());
    }
    let status = ben.status();
    let relays = status["groups"][0]["relays"].as_array().unwrap();
    assert_eq!((relays.len(), &relays[0]["state"]), (1, &"connected".into()), "{status}");
    let peers = status["groups"][0]["peers"].as_array().unwrap();
    assert!(peers.iter().all(|peer| peer["state"] != "connected"), "{status}");
    assert!(ben.ran(&["status"]).contains("files' contents come from devices alone"));
    drop(serving);

    let woken = anna.ran(&["relay", "wake", "https://push.example/up?id=1"]);
    assert_eq!(woken, "relays wake this device at https://push.example/up?id=1\n");
    assert!(anna.ran(&["relay", "list"]).ends_with("they wake this device at https://push.example/up?id=1\n"));
    assert_eq!(anna.ran(&["relay", "wake", "off"]), "relays wake this device no longer\n");
    let removed = anna.ran(&["relay", "remove", &relay.url]);
    assert!(removed.starts_with("removed ws://127.0.0.1"), "{removed}");
}

/// What two hosts do that have no route to each other, in namespaces of their own; the relay stands between them.
const TWO_HOSTS: &str = r#"
set -e
mount -t tmpfs none /run
mkdir /run/netns
ip link set lo up
ip addr add 10.9.0.1/32 dev lo
for n in 1 2; do
    ip netns add h$n
    ip link add v$n type veth peer name e netns h$n
    ip addr add 10.$n.0.1/24 dev v$n
    ip link set v$n up
    ip netns exec h$n ip link set lo up
    ip netns exec h$n ip addr add 10.$n.0.2/24 dev e
    ip netns exec h$n ip link set e up
    ip netns exec h$n ip route add default via 10.$n.0.1
done
host() {
    n=$1
    shift
    SYNCSHELL_HOME="$DIR/home$n" SYNCSHELL_RUNTIME_DIR="$DIR/run$n" ip netns exec h$n "$SYNCSHELL" "$@"
}
# fails where it should not
await() {
    i=0
    until "$@"; do
        i=$((i + 1))
        test $i -lt 300
        sleep 0.1
    done
}
echo 'open = true' >"$DIR/relay.toml"
"$RELAY" --bind 10.9.0.1:7841 --data "$DIR/relay" --config "$DIR/relay.toml" >"$DIR/url" &
await test -s "$DIR/url"
url=$(cat "$DIR/url")
host 1 init --key-store file --name anna >&2
host 2 init --key-store file --name ben >&2
host 1 relay add "$url" >&2
host 1 pair --create --json >"$DIR/created" &
creating=$!
await test -s "$DIR/created"
code=$(head -n 1 "$DIR/created" | sed 's/.*"code":"\([^"]*\)".*/\1/')
host 2 pair --join "$code" --relay "$url" >&2
wait $creating
host 1 push "bread and milk" --wait 60 >&2
host 2 run >&2 &
pulled() { host 2 pull 2>/dev/null | grep -q "bread and milk"; }
await pulled
# what still runs ends with this shell, the first process of its namespace
host 2 status --json
"#;

#[test]
fn two_hosts_that_share_nothing_but_the_relay_pair_by_code() {
    let allowed = Command::new("unshare").args(["-Urnm", "ip", "link"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!(
            "skipped: hosts are made of namespaces, which are not allowed here, or `unshare` and `ip` are missing"
        );
        return;
    }
    let site = Site::new();
    let output = Command::new("unshare")
        .args(["-Urnm", "--kill-child", "--pid", "--fork", "sh", "-c", TWO_HOSTS])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", site.path(""))
        .env("DIR", site.path(""))
        .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
        // without a direct way
        .env("SYNCSHELL_PUNCHING", "off")
        .env("RELAY", env!("CARGO_BIN_EXE_sync-relay"))
        .env("SYNCSHELL", syncshell())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let group = &status["groups"][0];
    assert_eq!((&group["relays"][0]["state"], &group["authors"]), (&"connected".into(), &2.into()), "{status}");
    let peers = group["peers"].as_array().unwrap();
    assert!(peers.iter().all(|peer| peer["state"] != "connected"), "{status}");
}
