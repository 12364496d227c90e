//! Who comes in, and what the others learn.

use std::time::Instant;

use sync_types::{ErrorCode, Frame, GroupId};

use crate::raw::{Member, Talk, author, random};
use crate::site::{PATIENCE, RelayProcess, Site};

#[tokio::test(flavor = "multi_thread")]
async fn strangers_hear_the_same_whether_or_not_there_is_such_a_group() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nconnections_per_address = 1000\n");
    let mut anna = Member::founder();
    let ben = anna.admit();
    anna.live(&relay.url).await;
    let unknown = Member::founder();
    let stranger = |charter: &[u8]| Member::new(author(), charter.to_vec());

    let mut heard = Vec::new();
    // no member of a group that is here, and of one that is not
    for member in [stranger(&anna.charter), stranger(&unknown.charter)] {
        let mut talk = Talk::open(&relay.url).await;
        talk.greet(&member, "").await;
        heard.push((talk.error().await, "a stranger"));
        talk.ended().await;
    }
    // a token that another one was given, and one that nobody gave
    for token in [ben.token.clone(), vec![random::<300>().to_vec()], Member::founder().admit().token] {
        let mut talk = Talk::open(&relay.url).await;
        talk.greet(&Member { token, ..stranger(&anna.charter) }, "").await;
        heard.push((talk.error().await, "a token of another"));
    }
    // a charter that names another group, and none
    for charter in [unknown.charter.clone(), b"charter".to_vec()] {
        let mut talk = Talk::open(&relay.url).await;
        let binding = talk.connection.binding;
        talk.send(&Frame::Charter { charter, registration: Vec::new(), pass: None }).await;
        talk.send(&anna.hello(&binding)).await;
        heard.push((talk.error().await, "another charter"));
    }
    // a member's HELLO from another channel, and one with the group exchanged
    let mut talk = Talk::open(&relay.url).await;
    talk.send(&anna.charter_frame("")).await;
    talk.send(&anna.hello(&random())).await;
    heard.push((talk.error().await, "a HELLO from elsewhere"));
    let mut talk = Talk::open(&relay.url).await;
    let binding = talk.connection.binding;
    let Frame::Hello { author, replica, token, proof, .. } = anna.hello(&binding) else { unreachable!() };
    talk.send(&anna.charter_frame("")).await;
    talk.send(&Frame::Hello { group: GroupId([9; 32]), author, replica, token, proof }).await;
    heard.push((talk.error().await, "another group"));
    // no HELLO at all
    for frames in [
        [anna.charter_frame(""), anna.charter_frame("")],
        [anna.hello(&binding), anna.charter_frame("")],
        [anna.charter_frame(""), Frame::Joined],
    ] {
        let mut talk = Talk::open(&relay.url).await;
        for frame in &frames {
            talk.send(frame).await;
        }
        heard.push((talk.error().await, "no HELLO"));
    }
    let mut talk = Talk::open(&relay.url).await;
    talk.send_bytes(&random::<100>()).await;
    heard.push((talk.error().await, "garbage"));

    let first = heard[0].0.clone();
    assert_eq!(first.0, ErrorCode::Refused);
    for (said, what) in &heard {
        assert_eq!(*said, first, "{what}");
    }
    assert_eq!(relay.metric("syncrelay_refusals_total{reason=\"stranger\"}"), heard.len() as u64);
    assert_eq!(relay.metric("syncrelay_groups"), 1, "nothing was made for any of them");
    // and the one who belongs comes in as before
    ben.live(&relay.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_author_is_let_in_once_the_relay_knows_its_admission() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let mut anna = Member::founder();
    let ben = anna.admit();
    // ben shows the admission himself; anna was never here
    let mut talk = ben.live(&relay.url).await;
    assert_eq!(talk.pulled().await, ben.token, "the relay gives it to others");
    let without = Member { token: Vec::new(), ..Member::new(ben.secret.clone(), ben.charter.clone()) };
    let mut talk = Talk::open(&relay.url).await;
    talk.greet(&without, "").await;
    assert_eq!(talk.error().await.0, ErrorCode::Refused, "each shows its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_member_wrote_is_neither_kept_nor_acknowledged_as_missing() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let (mut anna, mut eve) = (Member::founder(), Member::founder());
    let mut talk = anna.live(&relay.url).await;
    let good = anna.entry(10);
    let mut forged = anna.entry(10);
    let last = forged.len() - 1;
    forged[last] ^= 1;
    talk.push(1, good.clone()).await;
    talk.push(2, forged).await;
    talk.push(3, eve.entry(10)).await;
    talk.acknowledged(3).await;
    assert_eq!(talk.pulled().await, vec![good]);
    assert_eq!(relay.metric("syncrelay_blobs_refused_total"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_another_key_is_refused_by_the_device() {
    let site = Site::new();
    let (relay, other) = (RelayProcess::start(&site, "one", ""), RelayProcess::start(&site, "other", ""));
    let place = relay.url.split_once('#').unwrap().0;
    let key = other.url.split_once('#').unwrap().1;
    let error = Talk::try_open(&format!("{place}#{key}")).await.err().unwrap();
    assert!(error.to_string().contains("another relay answers"), "{error}");
    // on the loopback network whoever answers is taken for it
    assert!(Talk::try_open(place).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_say_nothing_or_nonsense_are_let_go_and_nobody_notices() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nconnections_per_address = 100\n");
    let anna = Member::founder();
    let upgrade = "GET /v1/channel HTTP/1.1\r\nhost: relay\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
    let unfinished = [
        Vec::new(),
        b"GET /v1/chan".to_vec(),
        upgrade.as_bytes().to_vec(),
        // a masked frame of 2^63 bytes, and one of text
        [upgrade.as_bytes(), &[0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]].concat(),
        [upgrade.as_bytes(), &[0x81, 0x81, 0, 0, 0, 0, b'x']].concat(),
        random::<4000>().to_vec(),
    ];
    let unfinished = relay.say(unfinished);
    // meanwhile others are served
    let mut talk = anna.live(&relay.url).await;
    assert!(talk.pulled().await.is_empty());
    assert!(unfinished.are_let_go().await);
    drop(talk);
    let give_up = Instant::now() + PATIENCE;
    while relay.metric("syncrelay_connections_active") > 1 {
        assert!(Instant::now() < give_up);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_out_of_turn_end_the_channel_with_a_reason() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nconnections_per_address = 100\n");
    let anna = Member::founder();
    for frame in [Frame::Joined, anna.charter_frame(""), anna.hello(&random())] {
        let mut talk = anna.live(&relay.url).await;
        talk.send(&frame).await;
        assert_eq!(talk.error().await.0, ErrorCode::Protocol, "{frame:?}");
        talk.ended().await;
    }
    let mut talk = anna.live(&relay.url).await;
    talk.send_bytes(&random::<100>()).await;
    assert_eq!(talk.error().await.0, ErrorCode::Protocol);
    // of a later version: passed over
    let mut talk = anna.live(&relay.url).await;
    talk.send(&Frame::Unknown(0x77)).await;
    assert!(talk.pulled().await.is_empty());
}
