//! Each limit answers with a code of its own, and harms nobody else.

use sync_link::relay::RelayError;
use sync_types::{ErrorCode, Frame};

use crate::raw::{Member, Talk, random};
use crate::site::{RelayProcess, Site, until, until_handed_over, until_has};

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_full_is_read_on_and_memberships_still_come_in() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\ngroup_bytes = 60000\n");
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    let (first, second) = (anna.entry(30_000), anna.entry(30_000));
    talk.push(1, first.clone()).await;
    talk.acknowledged(1).await;
    talk.push(2, second).await;
    assert_eq!(talk.error().await.0, ErrorCode::GroupFull);
    // nothing after it is acknowledged, though it would fit: what was left out would be passed over
    let small = anna.entry(10);
    talk.push(3, small).await;
    assert!(talk.is_silent().await, "it is said once");
    assert_eq!(talk.pulled().await, vec![first.clone()]);

    let ben = anna.admit();
    let mut talk = ben.live(&relay.url).await;
    let pulled = talk.pulled().await;
    assert!(pulled.contains(&first) && pulled.contains(&ben.token[0]), "{}", pulled.len());
    // another group has its own room
    let mut other = Member::founder();
    let mut talk = other.live(&relay.url).await;
    talk.push(1, other.entry(30_000)).await;
    talk.acknowledged(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_full_takes_no_more_and_gives_what_it_has() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\ndatabase_bytes = 1000000\n");
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    let mut kept = 0;
    talk.push(1, anna.entry(200_000)).await;
    loop {
        match talk.recv().await {
            Some(Frame::PushAck { cursor }) if cursor.0 > kept => {
                kept = cursor.0;
                talk.push(kept + 1, anna.entry(200_000)).await;
            }
            Some(Frame::Error { code, .. }) => {
                assert_eq!(code, ErrorCode::StorageFull);
                break;
            }
            _ => {}
        }
    }
    assert!((1..5).contains(&kept), "{kept}");
    assert_eq!(talk.pulled().await.len() as u64, kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_too_much_in_a_minute_is_told_and_what_was_taken_stays() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nmessages_per_minute = 3\n");
    let mut anna = Member::founder();
    let ben = anna.admit();
    let mut talk = anna.live(&relay.url).await;
    for cursor in 1..=4 {
        let entry = anna.entry(10);
        talk.push(cursor, entry).await;
    }
    assert_eq!(talk.error().await.0, ErrorCode::TooFast);
    talk.ended().await;
    // coming back does not help at once
    let mut talk = Talk::open(&relay.url).await;
    talk.greet(&anna, "").await;
    assert_eq!(talk.error().await.0, ErrorCode::TooFast);
    // others are not meant
    let mut talk = ben.live(&relay.url).await;
    assert_eq!(talk.pulled().await.len(), 4, "an admission, and three that were taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_who_is_refused_again_and_again_is_not_listened_to_for_a_while() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nmessages_per_minute = 3\n");
    let mut anna = Member::founder();
    let ben = anna.admit();
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.feed[0].clone()).await;
    talk.acknowledged(1).await;
    for said in [Frame::Joined.encode(), random::<100>().to_vec()] {
        let mut talk = anna.live(&relay.url).await;
        talk.send_bytes(&said).await;
        assert_eq!(talk.error().await.0, ErrorCode::Protocol);
        talk.ended().await;
    }
    let mut talk = Talk::open(&relay.url).await;
    talk.greet(&anna, "").await;
    assert_eq!(talk.error().await.0, ErrorCode::TooFast);
    assert_eq!(ben.live(&relay.url).await.pulled().await, anna.feed, "others are not meant");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_push_at_once_into_what_room_is_left_none_gets_more_than_there_is() {
    const ROOM: usize = 60_000;
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", &format!("[limits]\ngroup_bytes = {ROOM}\n"));
    let mut anna = Member::founder();
    let ben = anna.admit();
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.feed[0].clone()).await;
    talk.acknowledged(1).await;
    let mut pushing = Vec::new();
    for mut member in [anna, ben] {
        let mut talk = member.live(&relay.url).await;
        pushing.push(tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            loop {
                let (cursor, entry) = (acknowledged.len() as u64 + 2, member.entry(2000));
                talk.push(cursor, entry.clone()).await;
                loop {
                    match talk.recv().await.unwrap() {
                        Frame::PushAck { cursor: acked } if acked.0 == cursor => break acknowledged.push(entry),
                        Frame::Error { code, .. } => {
                            assert_eq!(code, ErrorCode::GroupFull);
                            return (talk, acknowledged);
                        }
                        _ => {}
                    }
                }
            }
        }));
    }
    let (mut talks, mut acknowledged) = (Vec::new(), Vec::new());
    for pushing in pushing {
        let (talk, entries) = pushing.await.unwrap();
        talks.push(talk);
        acknowledged.extend(entries);
    }
    for mut talk in talks {
        let pulled = talk.pulled().await;
        assert_eq!(pulled.len(), acknowledged.len() + 1, "what was acknowledged, and the admission");
        assert!(acknowledged.iter().all(|entry| pulled.contains(entry)));
        let bytes: usize = pulled.iter().map(Vec::len).sum();
        assert!((ROOM - 4000..=ROOM).contains(&bytes), "{bytes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_too_large_is_refused_by_its_own_code() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nblob_bytes = 20000\n");
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.entry(20_000)).await;
    talk.acknowledged(1).await;
    talk.push(2, anna.entry(26_000)).await;
    assert_eq!(talk.error().await.0, ErrorCode::TooLarge);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_groups_need_room_and_where_it_is_not_open_the_operators_token() {
    let site = Site::new();
    let relay =
        RelayProcess::start(&site, "relay", "open = false\nregistration_token = 'secret'\n[limits]\ngroups = 1\n");
    assert!(relay.url.ends_with(".secret"), "{}", relay.url);
    let (anna, other) = (Member::founder(), Member::founder());
    for registration in ["", "secre", "secrets"] {
        let mut talk = Talk::open(&relay.url).await;
        talk.greet(&anna, registration).await;
        assert_eq!(talk.error().await.0, ErrorCode::RegistrationNeeded, "{registration:?}");
    }
    let mut talk = Talk::open(&relay.url).await;
    talk.greet(&anna, "secret").await;
    assert!(matches!(talk.recv().await, Some(Frame::Pull { .. })));
    // a group that is known needs none
    anna.live(&relay.url).await;
    let mut talk = Talk::open(&relay.url).await;
    talk.greet(&other, "secret").await;
    assert_eq!(talk.error().await.0, ErrorCode::TooManyGroups);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_limited_for_each_address_and_in_all() {
    let site = Site::new();
    for (settings, status) in [("connections_per_address = 2", 429), ("connections = 2", 503)] {
        let relay = RelayProcess::start(&site, &format!("relay{status}"), &format!("[limits]\n{settings}\n"));
        let held = [Talk::open(&relay.url).await, Talk::open(&relay.url).await];
        match Talk::try_open(&relay.url).await.err() {
            Some(RelayError::Refused { status: got, text }) => {
                assert_eq!((got, text.contains("too many connections")), (status, true), "{text}");
            }
            other => panic!("{other:?}"),
        }
        assert!(relay.http("/health").0.contains(&status.to_string()));
        drop(held);
        let give_up = std::time::Instant::now() + crate::site::PATIENCE;
        while Talk::try_open(&relay.url).await.is_err() {
            assert!(std::time::Instant::now() < give_up, "places are given back");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_refused_again_and_again_is_not_listened_to_for_a_while() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nmessages_per_minute = 3\n");
    let anna = Member::founder();
    for _ in 0..3 {
        let mut talk = Talk::open(&relay.url).await;
        talk.greet(&Member::new(crate::raw::author(), anna.charter.clone()), "").await;
        assert_eq!(talk.error().await.0, ErrorCode::Refused);
    }
    assert!(matches!(Talk::try_open(&relay.url).await.err(), Some(RelayError::Refused { status: 429, .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_says_that_a_relay_is_full_keeps_what_is_left_and_uses_another() {
    let site = Site::new();
    let full = RelayProcess::start(&site, "full", "[limits]\ngroup_bytes = 20000\n");
    let apart = site.strangers(&[&full.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    until_handed_over(&anna).await;
    // nothing that gets shorter by being packed
    let large = data_encoding::HEXLOWER.encode(&random::<30_000>());
    anna.push(large.clone()).await.unwrap();
    let status = until(&anna, "told", |status| status.relays.iter().any(|relay| relay.problem.is_some())).await;
    assert!(status.relays[0].problem.as_ref().unwrap().contains("all the room"), "{status:?}");
    assert_eq!(status.pending, 1, "it waits here");

    let other = RelayProcess::start(&site, "other", "");
    device.add_relay(&other.url, None).await.unwrap();
    until(&anna, "handed over", |status| status.pending == 0).await;
    device.close().await;
    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    device.add_relay(&other.url, None).await.unwrap();
    until_has(&ben, &large).await;
    device.close().await;
    drop(apart);
}
