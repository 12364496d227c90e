//! Devices that restart, move to other ports, vanish and come back find each other again within seconds.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use sync_client::{Device, GroupId, Status, SyncClient};

use crate::site::*;

/// A peer that comes back is reached within this: the longest wait between two attempts, a dial, and a busy machine.
const SECONDS: Duration = Duration::from_secs(20);

/// The port a device says it listens on.
async fn port_of(client: &SyncClient, friend: &SyncClient) -> u16 {
    Target::of(client, friend).await.addresses.first().expect("an address").port()
}

/// Keeps a port from being taken again, on IPv4 and, where there is one, IPv6.
struct Squatter {
    _sockets: Vec<UdpSocket>,
}

impl Squatter {
    async fn on(port: u16) -> Self {
        let start = Instant::now();
        // the device that had it lets go within a moment; whoever else has taken it by then keeps it as well as we do
        let v4 = loop {
            match UdpSocket::bind(("127.0.0.1", port)) {
                Ok(socket) => break Some(socket),
                Err(_) if start.elapsed() > Duration::from_secs(2) => break None,
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        };
        Self { _sockets: [v4, UdpSocket::bind(("::1", port)).ok()].into_iter().flatten().collect() }
    }
}

async fn close(client: SyncClient) {
    let device = client.device();
    drop(client);
    device.close().await;
}

async fn reopen(site: &Site, name: &str, group: GroupId) -> SyncClient {
    site.open(name).await.client(group).expect("a client")
}

fn entry<'a>(status: &'a Status, of: &SyncClient) -> Option<&'a sync_client::PeerStatus> {
    let device = of.endpoint_id().to_string();
    status.peers.iter().find(|peer| peer.device == device)
}

/// Pushes on both sides and waits for each on the other.
async fn exchange(alice: &SyncClient, bob: &SyncClient, round: &str) {
    let start = Instant::now();
    alice.push(format!("alice {round}")).await.expect("pushes");
    bob.push(format!("bob {round}")).await.expect("pushes");
    eventually_has(alice, &format!("bob {round}")).await;
    eventually_has(bob, &format!("alice {round}")).await;
    assert!(start.elapsed() < SECONDS, "{round} took {:?}", start.elapsed());
}

/// Two devices that know of each other only what they said in a session.
async fn apart() -> (Site, SyncClient, SyncClient) {
    let site = Site::without_directory();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let bob = b.join(&invite.link, |_| {}).await.expect("joins");
    exchange(&alice, &bob, "at first").await;
    (site, alice, bob)
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_restarts_on_its_port_and_is_back_within_seconds() {
    let (site, alice, bob) = apart().await;
    let group = alice.group();
    let port = port_of(&bob, &alice).await;
    close(bob).await;
    until(&alice, "alone", |status| status.peers.iter().all(|peer| peer.state != "connected")).await;
    alice.push("while bob is away").await.expect("pushes");
    let bob = reopen(&site, "b", group).await;
    eventually_has(&bob, "while bob is away").await;
    exchange(&alice, &bob, "after bob's restart").await;
    assert_eq!(port_of(&bob, &alice).await, port, "the port it had before");
    close(alice).await;
    bob.push("while alice is away").await.expect("pushes");
    let alice = reopen(&site, "a", group).await;
    eventually_has(&alice, "while alice is away").await;
    exchange(&alice, &bob, "after alice's restart").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_comes_back_on_another_port_replaces_what_was_known_of_it() {
    let (site, alice, bob) = apart().await;
    let group = alice.group();
    let before = port_of(&bob, &alice).await;
    close(bob).await;
    let squatter = Squatter::on(before).await;
    // what is known of it grows old meanwhile, and is kept
    let status = until(&alice, "older", |status| {
        status.peers.iter().any(|peer| peer.state != "connected" && peer.addresses_age_ms.is_some_and(|age| age > 200))
    });
    let aged = status.await.peers.remove(0);
    assert!(aged.addresses.iter().any(|address| address.ends_with(&format!(":{before}"))), "{aged:?}");
    let bob = reopen(&site, "b", group).await;
    exchange(&alice, &bob, "on another port").await;
    let status = until(&alice, "replaced", |status| {
        entry(status, &bob).is_some_and(|peer| {
            !peer.addresses.is_empty() && !peer.addresses.iter().any(|text| text.ends_with(&format!(":{before}")))
        })
    });
    let status = status.await;
    let known = entry(&status, &bob).expect("known");
    assert!(known.addresses_age_ms < aged.addresses_age_ms.map(|age| age + 60_000), "{known:?}");
    // and the new address is good for dialling: now the other side is the one to come back
    let alices = port_of(&alice, &bob).await;
    close(alice).await;
    let other = Squatter::on(alices).await;
    let alice = reopen(&site, "a", group).await;
    exchange(&alice, &bob, "both moved").await;
    drop((squatter, other));
}

#[tokio::test(flavor = "multi_thread")]
async fn both_come_back_on_other_ports_at_once_and_meet_through_the_directory() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    exchange(&alice, &bob, "at first").await;
    let group = alice.group();
    let ports = [port_of(&alice, &bob).await, port_of(&bob, &alice).await];
    drop((a, b));
    tokio::join!(close(alice), close(bob));
    let squatters = tokio::join!(Squatter::on(ports[0]), Squatter::on(ports[1]));
    let (alice, bob) = tokio::join!(reopen(&site, "a", group), reopen(&site, "b", group));
    exchange(&alice, &bob, "both moved at once").await;
    let now = [port_of(&alice, &bob).await, port_of(&bob, &alice).await];
    assert!(now.iter().all(|port| !ports.contains(port)), "{now:?} after {ports:?}");
    drop(squatters);
}

/// A device in a runtime of its own, which can be torn down without a word.
struct Doomed {
    runtime: tokio::runtime::Runtime,
    client: SyncClient,
}

impl Doomed {
    fn open(site: &Site, name: &str, group: GroupId) -> Self {
        let config = site.config(name);
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
            let device = runtime.block_on(Device::open(config)).expect("opens");
            Self { client: device.client(group).expect("a client"), runtime }
        })
        .join()
        .expect("opens")
    }

    /// Ends it as a kill does: no task runs again and no peer is told.
    async fn kill(self) {
        let Self { runtime, client } = self;
        tokio::task::spawn_blocking(move || {
            runtime.shutdown_timeout(Duration::ZERO);
            drop(client);
        })
        .await
        .expect("ends");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_that_is_killed_is_noticed_and_back_within_seconds() {
    let (site, alice, bob) = apart().await;
    let group = alice.group();
    close(bob).await;
    let doomed = Doomed::open(&site, "b", group);
    let pushed = doomed.client.push("acknowledged before the kill").await.expect("pushes");
    eventually_has(&alice, "acknowledged before the kill").await;
    until(&alice, "connected", |status| status.peers.iter().any(|peer| peer.state == "connected")).await;
    doomed.kill().await;
    // it is back before its absence could be noticed by silence
    alice.push("while bob is dead").await.expect("pushes");
    let bob = reopen(&site, "b", group).await;
    eventually_has(&bob, "while bob is dead").await;
    exchange(&alice, &bob, "after the kill").await;
    assert!(bob.last_cursor() >= pushed.cursor);
    close(bob).await;
    // and once more, staying away until that is noticed
    let doomed = Doomed::open(&site, "b", group);
    exchange(&alice, &doomed.client, "second life").await;
    doomed.kill().await;
    until(&alice, "alone", |status| status.peers.iter().all(|peer| peer.state != "connected")).await;
    let bob = reopen(&site, "b", group).await;
    exchange(&alice, &bob, "third life").await;
    let status = alice.status().await.expect("status");
    assert!(status.forks.is_empty() && status.gaps.is_empty(), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_reach_a_device_that_was_never_up_together_with_their_author() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let group = alice.group();
    let bob = pair(&alice, &b).await;
    let carol = pair(&bob, &c).await;
    drop(c);
    close(carol).await;
    for round in 0..3 {
        let text = format!("round {round}");
        alice.push(text.clone()).await.expect("pushes");
        eventually_has(&bob, &text).await;
    }
    drop(a);
    close(alice).await;
    let carol = reopen(&site, "c", group).await;
    eventually(&carol, &["round 0", "round 1", "round 2"]).await;
    carol.push("answer").await.expect("pushes");
    eventually_has(&bob, "answer").await;
    close(carol).await;
    let alice = reopen(&site, "a", group).await;
    eventually(&alice, &["round 0", "round 1", "round 2", "answer"]).await;
    drop(b);
}
