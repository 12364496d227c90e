//! Where connections between devices begin: who may not use it; `testing/lab` shows that members meet there.

use std::time::Instant;

use sync_link::iroh_link::{Bind, Endpoint, EndpointConfig, Relays};
use sync_link::relay::RelayUrl;
use sync_link::relay::meeting::{Meeting, MeetingError};
use sync_link::rendezvous::LookupId;

use crate::raw::random;
use crate::site::{PATIENCE, RelayProcess, Site};

const ALPN: &[u8] = b"test";

async fn device() -> Endpoint {
    let mut config = EndpointConfig::new(&random(), vec![ALPN.to_vec()]);
    (config.punches, config.bind) = (true, Bind::Loopback);
    Endpoint::bind(config).await.unwrap()
}

async fn show(device: &Endpoint, url: &str, pass: [u8; 16]) {
    let url: RelayUrl = url.parse().unwrap();
    assert!(device.use_relay(&url, &data_encoding::HEXLOWER.encode(&pass)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_pass_that_a_member_named_is_not_let_in() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let (stranger, other) = (device().await, device().await);
    show(&stranger, &relay.url, random()).await;
    let at = Relays { ours: vec![relay.url.parse().unwrap()], told: Vec::new() };
    let dialling = {
        let (stranger, other) = (stranger.clone(), other.device_id());
        tokio::spawn(async move { stranger.connect_through(other, &[], &at, ALPN, PATIENCE).await.is_ok() })
    };
    let start = Instant::now();
    while relay.metric("syncrelay_refusals_total{reason=\"stranger\"}") == 0 {
        assert!(start.elapsed() < PATIENCE, "it does not ask");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    dialling.abort();
    assert_eq!(relay.metric("syncrelay_relayed_connections_total"), 0);
    stranger.close().await;
    other.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_the_record_of_a_code_is_let_in_for_a_while_and_others_are_not() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let url: RelayUrl = relay.url.parse().unwrap();
    let (maker, guest, late) = (device().await, device().await, device().await);
    let [of_maker, of_guest, of_late] = [random(), random(), random()];
    for pass in [&of_maker, &of_guest] {
        let meeting = Meeting::new(&url, LookupId(random()));
        meeting.publish(&random(), b"sealed").await.unwrap();
        meeting.fetch(Some(pass)).await.unwrap();
        assert_eq!(meeting.fetch(Some(&of_late)).await, Err(MeetingError::Fetched));
    }
    for (device, pass) in [(&maker, of_maker), (&guest, of_guest), (&late, of_late)] {
        show(device, &relay.url, pass).await;
    }
    let at = Relays { ours: vec![url], told: Vec::new() };
    let accepting = {
        let maker = maker.clone();
        tokio::spawn(async move { maker.accept().await.is_some() })
    };
    let dialled = guest.connect_through(maker.device_id(), &[], &at, ALPN, PATIENCE).await;
    assert!(dialled.is_ok(), "{dialled:?}");
    assert!(accepting.await.unwrap());
    let refused = late.connect_through(maker.device_id(), &[], &at, ALPN, std::time::Duration::from_secs(3)).await;
    assert!(refused.is_err(), "a record is given once, and so is what it lets in by");
    assert_eq!(relay.metric("syncrelay_relayed_connections_total"), 2);
    for device in [maker, guest, late] {
        device.close().await;
    }
}

#[test]
fn a_relay_where_nothing_is_to_begin_says_so() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "punching = false\n");
    assert!(relay.http("/relay").0.contains("404"));
}
