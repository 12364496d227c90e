//! Devices that want to be woken, as members ask for it and as a relay that runs does it.

use std::time::{Duration, Instant};

use sync_client::SyncClient;
use sync_types::Frame;
use tokio::net::TcpListener;

use crate::postgresql::Postgresql;
use crate::raw::Member;
use crate::site::{self, PATIENCE, RelayProcess, Site};

const FAILED: &str = "syncrelay_wakes_total{result=\"failed\"}";
const REFUSED: &str = "syncrelay_wakes_total{result=\"refused\"}";

/// Waits until a number has come to be so large.
async fn until(relay: &RelayProcess, metric: &str, value: u64) {
    let give_up = Instant::now() + PATIENCE;
    while relay.metric(metric) < value {
        assert!(Instant::now() < give_up, "{metric} is {}", relay.metric(metric));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_runs_asks_for_devices_that_are_away_and_never_at_an_address_of_its_own_network() {
    wakes_who_is_away("").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_on_postgresql_does_the_same() {
    let Some(server) = Postgresql::start() else { return };
    wakes_who_is_away(&format!("database = '{}'\n", server.database("wake"))).await;
}

async fn wakes_who_is_away(settings: &str) {
    let site = Site::new();
    let settings = format!("{settings}[limits]\nconnections_per_address = 100\n");
    let relay = RelayProcess::start(&site, "relay", &settings);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut anna = Member::founder();
    let mut ben = anna.admit();
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.feed[0].clone()).await;
    talk.acknowledged(1).await;
    let url = format!("https://{}/", listener.local_addr().unwrap());
    talk.send(&Frame::Wake { url }).await;
    // what it asks for next is answered: the address was taken in
    assert_eq!(talk.pulled().await.len(), 1);
    let mut other = ben.live(&relay.url).await;
    other.push(1, ben.entry(50)).await;
    other.acknowledged(1).await;
    assert_eq!(relay.metric(FAILED), 0, "she is here");
    drop(talk);
    let give_up = Instant::now() + PATIENCE;
    while relay.metric("syncrelay_connections_active") > 2 {
        assert!(Instant::now() < give_up);
    }
    other.push(2, ben.entry(50)).await;
    other.acknowledged(2).await;
    until(&relay, FAILED, 1).await;
    let dialled = tokio::time::timeout(Duration::from_millis(300), listener.accept()).await;
    assert!(dialled.is_err(), "the loopback network is nobody's push service");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_address_of_a_push_service_is_counted_and_the_session_goes_on() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nconnections_per_address = 100\n");
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    for url in ["http://push.example/", "https://user@push.example/", "nonsense"] {
        talk.send(&Frame::Wake { url: url.to_owned() }).await;
    }
    until(&relay, REFUSED, 3).await;
    let entry = anna.entry(50);
    talk.push(1, entry.clone()).await;
    talk.acknowledged(1).await;
    assert_eq!(talk.pulled().await, [entry]);
}

async fn connected(client: &SyncClient) {
    site::until(client, "connected", |status| status.relays.iter().any(|relay| relay.state == "connected")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_tells_its_relays_where_it_is_woken_and_when_it_is_no_longer() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nconnections_per_address = 100\n");
    let apart = site.strangers(&[&relay.url]).await;
    let anna = site.open("anna").await;
    assert!(anna.set_wake(Some("http://push.example/")).await.is_err());
    assert!(anna.set_wake(Some("https://user@push.example/")).await.is_err());
    assert_eq!(anna.wake(), None);
    let client = anna.only_client().unwrap();
    connected(&client).await;
    anna.set_wake(Some("https://127.0.0.1:1/")).await.unwrap();
    client.push("bread").await.unwrap();
    site::until_handed_over(&client).await;
    anna.close().await;
    let ben = site.open("ben").await;
    let other = ben.only_client().unwrap();
    site::until_has(&other, "bread").await;
    other.push("milk").await.unwrap();
    until(&relay, FAILED, 1).await;

    // it is kept, and told again
    let anna = site.open("anna").await;
    assert_eq!(anna.wake().as_deref(), Some("https://127.0.0.1:1/"));
    let client = anna.only_client().unwrap();
    connected(&client).await;
    site::until_has(&client, "milk").await;
    anna.close().await;
    let before = relay.metric(FAILED);
    other.push("honey").await.unwrap();
    until(&relay, FAILED, before + 1).await;

    let anna = site.open("anna").await;
    let client = anna.only_client().unwrap();
    connected(&client).await;
    site::until_has(&client, "honey").await;
    anna.set_wake(None).await.unwrap();
    client.push("flour").await.unwrap();
    site::until_handed_over(&client).await;
    anna.close().await;
    let before = relay.metric(FAILED);
    site::until_has(&other, "flour").await;
    other.push("salt").await.unwrap();
    site::until_handed_over(&other).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(relay.metric(FAILED), before, "it is woken no longer");
    ben.close().await;
    drop(apart);
}
