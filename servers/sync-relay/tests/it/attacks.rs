//! What a member may try that is let in: each is bounded, answered or ended, and others are served meanwhile.

use std::net::TcpStream;

use sync_types::bounds::{MAX_FRAME, MAX_WANTS};
use sync_types::{BlobId, Check, Cursor, ErrorCode, Frame, Number, Range, Scope, Want};

use crate::raw::{Member, Talk, random};
use crate::site::{PATIENCE, RelayProcess, Site};

const MANY: &str = "[limits]\nconnections_per_address = 300\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_with_an_absurd_limit_or_a_cursor_ahead_is_answered_from_the_start() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    for number in 1..=3 {
        talk.push(number, anna.entry(50)).await;
    }
    talk.acknowledged(3).await;
    for (limit, after, check) in [(u32::MAX, u64::MAX, [9; 8]), (0, 1 << 40, [0; 8]), (1, 2, [7; 8])] {
        let mut talk = anna.live(&relay.url).await;
        let (after, check) = (Cursor(after), Check(check));
        let (have, covered) = (Vec::new(), Vec::new());
        talk.send(&Frame::Pull { request: 5, scope: Scope::All, after, check, limit, have, covered }).await;
        let (mut got, mut first, mut more) = (Vec::new(), true, true);
        while more {
            match talk.recv().await.unwrap() {
                Frame::PullResponse { request: 5, entries, has_more, reset, max_cursor, check, .. } => {
                    assert_eq!(reset, std::mem::take(&mut first), "the pair is not known here");
                    assert!(max_cursor <= Cursor(3) && check != Check::NONE);
                    got.extend(entries.into_iter().map(|carried| carried.envelope));
                    more = has_more;
                    talk.send(&Frame::PushAck { cursor: max_cursor }).await;
                }
                Frame::Error { code, text } => panic!("{code:?}: {text}"),
                _ => {}
            }
        }
        assert_eq!(got, anna.feed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_without_end_is_answered_as_it_reads_and_others_are_served_meanwhile() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let ben = anna.admit();
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.feed[0].clone()).await;
    for number in 2..=5 {
        talk.push(number, anna.entry(100_000)).await;
    }
    talk.acknowledged(5).await;
    let mut asking = ben.live(&relay.url).await;
    let (first, last) = (Number(1), Number(u64::MAX));
    let want = Want { author: anna.secret.id(), range: Range { first, last } };
    for request in 100..140 {
        asking.send(&Frame::Want { request, wants: vec![want; MAX_WANTS] }).await;
    }
    // it has read nothing yet, and nobody waits for it
    assert_eq!(anna.live(&relay.url).await.pulled().await, anna.feed);
    let entry = anna.entry(50);
    talk.push(6, entry).await;
    talk.acknowledged(6).await;
    let mut expected = 100;
    while expected < 140 {
        if let Frame::PullResponse { request, entries, .. } = asking.recv().await.unwrap()
            && request >= 100
        {
            assert_eq!(request, expected, "in the order in which it asked");
            let bytes: usize = entries.iter().map(|carried| carried.envelope.len()).sum();
            assert!((500_000..MAX_FRAME).contains(&bytes), "{bytes}");
            expected += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_replayed_on_any_channel_is_acknowledged_and_stored_once() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let ben = anna.admit();
    let entry = anna.entry(50);
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.feed[0].clone()).await;
    talk.push(2, entry.clone()).await;
    talk.acknowledged(2).await;
    for (cursor, replayed) in [(3, entry.clone()), (4, entry.clone())] {
        talk.push(cursor, replayed).await;
        talk.acknowledged(cursor).await;
    }
    // by another member, who may forward anyone's
    let mut other = ben.live(&relay.url).await;
    other.push(1, entry.clone()).await;
    other.acknowledged(1).await;
    assert_eq!(other.pulled().await, anna.feed);
    assert_eq!(relay.metric("syncrelay_blobs_stored_total"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_was_changed_on_the_way_does_not_count() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    let entry = anna.entry(50);
    for at in [0, entry.len() / 2, entry.len() - 1] {
        let mut forged = entry.clone();
        forged[at] ^= 1;
        talk.push(1, forged).await;
    }
    talk.push(2, entry.clone()).await;
    talk.acknowledged(2).await;
    assert_eq!(talk.pulled().await, [entry]);
    assert_eq!(relay.metric("syncrelay_blobs_stored_total"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_too_long_or_garbage_ends_the_channel_and_a_long_one_in_pieces_does_not() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    // more than one message carries
    let entry = anna.entry(300_000);
    talk.push(1, entry.clone()).await;
    talk.acknowledged(1).await;
    talk.send_bytes(&vec![0; 5 << 20]).await;
    assert_eq!(talk.error().await.0, ErrorCode::Protocol);
    talk.ended().await;
    let mut talk = anna.live(&relay.url).await;
    talk.send_bytes(&random::<3000>()).await;
    assert_eq!(talk.error().await.0, ErrorCode::Protocol);
    assert_eq!(anna.live(&relay.url).await.pulled().await, [entry]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_idle_connections_keep_nobody_out_who_has_a_place() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let anna = Member::founder();
    let idle: Vec<TcpStream> = (0..250).map(|_| TcpStream::connect(relay.address()).unwrap()).collect();
    let mut talk = anna.live(&relay.url).await;
    assert!(talk.pulled().await.is_empty());
    assert!(relay.metric("syncrelay_connections_active") > 200);
    // those that say nothing are let go
    let give_up = std::time::Instant::now() + PATIENCE;
    while relay.metric("syncrelay_connections_active") > 2 {
        assert!(std::time::Instant::now() < give_up);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(talk.pulled().await.is_empty());
    drop(idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_id_that_another_sender_used_hides_nothing() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let mut ben = anna.admit();
    let taken = BlobId(random());
    let (hers, his) = (anna.entry_as(taken, 50), ben.entry_as(taken, 60));
    let mut talk = anna.live(&relay.url).await;
    talk.push(1, anna.feed[0].clone()).await;
    talk.acknowledged(1).await;
    // the other is faster
    let mut other = ben.live(&relay.url).await;
    other.push(1, his.clone()).await;
    other.acknowledged(1).await;
    talk.push(2, hers.clone()).await;
    talk.acknowledged(2).await;
    assert_eq!(other.pulled().await, [anna.feed[0].clone(), his, hers]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_handshakes_that_never_finish_are_let_go_and_nobody_notices() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "plain = false\n[limits]\nconnections_per_address = 300\n");
    let anna = Member::founder();
    let unfinished = [
        Vec::new(),
        vec![0x16, 3, 1],
        vec![0x16, 3, 1, 0x40, 0, 1],
        b"GET /health HTTP/1.1\r\n\r\n".to_vec(),
        random::<4000>().to_vec(),
    ];
    let unfinished = relay.say(unfinished);
    let mut talk = anna.live(&relay.url).await;
    assert!(talk.pulled().await.is_empty());
    assert!(unfinished.are_let_go().await);
    assert!(talk.pulled().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn g1_who_is_removed_is_let_go_and_let_in_no_more() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", MANY);
    let mut anna = Member::founder();
    let (ben, carol) = (anna.admit(), anna.admit());
    let mut talk = anna.live(&relay.url).await;
    for (at, admission) in anna.feed.iter().enumerate() {
        talk.push(at as u64 + 1, admission.clone()).await;
    }
    talk.acknowledged(2).await;
    let (mut of_ben, mut of_carol) = (ben.live(&relay.url).await, carol.live(&relay.url).await);
    talk.push(3, anna.remove(&carol)).await;
    talk.acknowledged(3).await;
    assert_eq!(of_carol.error().await.0, ErrorCode::Removed);
    of_carol.ended().await;
    let after = anna.entry(50);
    talk.push(4, after.clone()).await;
    talk.acknowledged(4).await;
    while !of_ben.pulled().await.contains(&after) {}
    for _ in 0..2 {
        let mut again = Talk::open(&relay.url).await;
        again.greet(&carol, "").await;
        assert_eq!(again.error().await.0, ErrorCode::Removed);
        relay.kill();
        relay.restart();
    }
}
