//! What a relay lets expire, and how it comes back.

use std::time::Duration;

use crate::raw::Member;
use crate::site::{PATIENCE, RelayProcess, Site, bodies, never_met, until_handed_over, until_has};

const SHORT: &str = "keep_seconds = 1\nsweep_seconds = 1\n[limits]\nmessages_per_minute = 10000\n";

async fn until_expired(relay: &RelayProcess, count: u64) {
    let start = std::time::Instant::now();
    while relay.metric("syncrelay_blobs_expired_total") < count {
        assert!(start.elapsed() < PATIENCE, "nothing expires");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expired_before_the_other_device_came_is_asked_for_and_pushed_again_when_someone_returns_with_it() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", SHORT);
    let apart = site.strangers(&[&relay.url]).await;
    let a = site.open("anna").await;
    let anna = a.only_client().unwrap();
    for text in ["one", "two", "three"] {
        anna.push(text).await.unwrap();
    }
    until_handed_over(&anna).await;
    drop(anna);
    a.close().await;
    until_expired(&relay, 2).await;

    let b = site.open("ben").await;
    let ben = b.only_client().unwrap();
    until_has(&ben, "three").await;
    assert_eq!(bodies(&ben).await, ["three"], "the last one of each author stays");
    // whether it is there at once or comes only now makes no difference
    let a = site.open("anna").await;
    for text in ["one", "two"] {
        until_has(&ben, text).await;
    }
    never_met(&ben).await;
    drop(ben);
    b.close().await;
    a.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn memberships_do_not_expire_and_who_was_let_in_long_ago_still_is() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", SHORT);
    let mut founder = Member::founder();
    let other = founder.admit();
    let mut talk = founder.live(&relay.url).await;
    talk.push(1, founder.feed[0].clone()).await;
    let entries = [founder.entry(100), founder.entry(100)];
    talk.push(2, entries[0].clone()).await;
    talk.push(3, entries[1].clone()).await;
    talk.acknowledged(3).await;
    until_expired(&relay, 1).await;
    let mut talk = other.live(&relay.url).await;
    let pulled = talk.pulled().await;
    assert_eq!(pulled, [founder.feed[0].clone(), entries[1].clone()]);
}
