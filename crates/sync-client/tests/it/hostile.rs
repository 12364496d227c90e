//! Strangers and members who send what is no protocol, over real sockets.

use std::time::{Duration, Instant};

use iroh::endpoint::{PortmapperConfig, presets};
use iroh::{EndpointAddr, EndpointId, RelayMode, TransportAddr};
use sync_core::session::{Side, WINDOW};
use sync_crypto::AuthorSecret;
use sync_link::iroh_link::CloseReason;
use sync_types::bounds::{FRAME_BYTES_TARGET, MAX_FRAME, MAX_FRAME_ENVELOPES};
use sync_types::{AuthorId, Check, Cursor, Envelope, ErrorCode, Frame, GroupId, Range, ReplicaId, Scope, Want, Writer};

use crate::site::*;

/// Nothing is to come any more: long enough for a loopback, short enough for a test.
const SILENCE: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread")]
async fn r3_bytes_that_are_no_first_frame_are_refused_and_counted() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let stranger = Raw::new().await;
    let hello = Frame::Hello {
        group: target.group,
        author: AuthorId([1; 32]),
        replica: ReplicaId([1; 16]),
        token: Vec::new(),
        proof: [1; 64],
    };
    let other_version = [&[0x97, 2], &hello.encode()[2..]].concat();
    let mut bomb_in_token = hello.encode();
    bomb_in_token.truncate(bomb_in_token.len() - 66 - 1);
    bomb_in_token.extend_from_slice(&[0xdd, 0xff, 0xff, 0xff, 0xff]);
    let cases: [(&str, Vec<u8>); 10] = [
        ("an empty frame", Vec::new()),
        ("garbage", random::<300>().to_vec()),
        ("text", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("half a HELLO", hello.encode()[..60].to_vec()),
        ("a HELLO of another version", other_version),
        ("an array of 2^32 elements", vec![0xdd, 0xff, 0xff, 0xff, 0xff]),
        ("a token of 2^32 envelopes", bomb_in_token),
        ("arrays in arrays", vec![0x91; 1 << 20]),
        ("a PUSH", Frame::Push { entries: Vec::new(), max_cursor: Cursor(1), check: Check([1; 8]) }.encode()),
        ("a frame of a later version", unknown_frame()),
    ];
    for (what, bytes) in cases {
        let before = refused(&friends.alice).await;
        let mut talk = stranger.dial(&target).await;
        talk.send_bytes(bytes).await;
        let (code, text) = talk.error().await;
        assert_eq!(code, ErrorCode::Protocol, "{what}: {text}");
        talk.ended().await;
        assert_eq!(refused(&friends.alice).await, before + 1, "{what}");
    }
    let before = refused(&friends.alice).await;
    let mut talk = stranger.dial(&target).await;
    talk.send_bytes(vec![0; MAX_FRAME + 1]).await;
    talk.ended().await;
    assert_eq!(refused(&friends.alice).await, before + 1, "a frame above the bound");
    friends.still_sync().await;
}

fn unknown_frame() -> Vec<u8> {
    let mut writer = Writer::array_of(3);
    writer.uint(1).uint(0x77).uint(9);
    writer.finish()
}

#[tokio::test(flavor = "multi_thread")]
async fn r3_a_member_who_sends_no_frames_is_refused_and_counted_too() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let cases: [(&str, Vec<u8>); 4] = [
        ("garbage", random::<300>().to_vec()),
        ("entries without end", vec![0x95, 1, 0x10, 0xdd, 0xff, 0xff, 0xff, 0xff]),
        ("an entry of 4 GiB", vec![0x95, 1, 0x10, 0x91, 0x92, 1, 0xc6, 0xff, 0xff, 0xff, 0xff]),
        ("a frame above the bound", vec![0; MAX_FRAME + 1]),
    ];
    for (what, bytes) in cases {
        let mut talk = raw.dial(&target).await;
        talk.go_live(&mallory, Offer::default()).await;
        let before = refused(&friends.alice).await;
        talk.send_bytes(bytes).await;
        assert_eq!(talk.error().await.0, ErrorCode::Protocol, "{what}");
        talk.ended().await;
        until(&friends.alice, what, |status| status.refused == before + 1).await;
    }
    friends.still_sync().await;
}

/// A stream whose bytes are written by hand.
struct Wire {
    connection: iroh::endpoint::Connection,
    send: iroh::endpoint::SendStream,
    _endpoint: iroh::Endpoint,
}

impl Wire {
    async fn open(target: &Target) -> Self {
        let endpoint = iroh::Endpoint::builder(presets::Minimal)
            .relay_mode(RelayMode::Disabled)
            .portmapper_config(PortmapperConfig::Disabled)
            .clear_ip_transports()
            .bind_addr("127.0.0.1:0")
            .expect("an address")
            .bind()
            .await
            .expect("binds");
        let id = EndpointId::from_bytes(&target.device.0).expect("a key");
        let address = EndpointAddr::from_parts(id, target.addresses.iter().copied().map(TransportAddr::Ip));
        let connection = endpoint.connect(address, SYNC_ALPN).await.expect("connects");
        let (send, _) = connection.open_bi().await.expect("opens");
        Self { connection, send, _endpoint: endpoint }
    }

    async fn ended(&self, within: Duration) -> Duration {
        let start = Instant::now();
        tokio::time::timeout(within, self.connection.closed()).await.expect("the device ends the connection");
        start.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r3_a_length_without_a_frame_ends_the_connection_at_once() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    // announced and never sent; or the stream ends within the length, or within the frame
    let cases: [(&[u8], bool); 4] = [
        (&[0xff; 4], false),
        (&[0x00, 0x40, 0x00, 0x01], false),
        (&[0x00, 0x00], true),
        (&[0x00, 0x00, 0x00, 0x64, 0x97, 0x01], true),
    ];
    for (bytes, finish) in cases {
        let before = refused(&friends.alice).await;
        let mut wire = Wire::open(&target).await;
        wire.send.write_all(bytes).await.expect("writes");
        if finish {
            wire.send.finish().expect("finishes");
        }
        wire.ended(Duration::from_secs(5)).await;
        assert_eq!(refused(&friends.alice).await, before + 1, "{bytes:02x?}");
    }
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r1_who_says_nothing_is_let_go() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let before = refused(&friends.alice).await;
    let silent = Wire::open(&target).await;
    let mut half = Wire::open(&target).await;
    half.send.write_all(&[0x00, 0x00, 0x01, 0x00, 0x97]).await.expect("writes");
    let mut slow = Wire::open(&target).await;
    let drip = async {
        // a byte now and then buys no more time than silence does
        while slow.send.write_all(&[0x00]).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let waits = tokio::join!(silent.ended(PATIENCE), half.ended(PATIENCE), drip);
    assert!(waits.0 < Duration::from_secs(15) && waits.1 < Duration::from_secs(15), "{waits:?}");
    until(&friends.alice, "counted", |status| status.refused == before + 3).await;
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r4_strangers_who_hold_connections_open_are_few_and_stop_nobody_who_is_connected() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let before = refused(&friends.alice).await;
    let stranger = Raw::new().await;
    let mut held = Vec::new();
    for number in 0..100 {
        let alpn = if number % 2 == 0 { SYNC_ALPN } else { PAIR_ALPN };
        held.push(stranger.connect(&target, alpn).await);
    }
    let status = until(&friends.alice, "turned away", |status| status.refused >= before + 36).await;
    assert!(status.refused < before + 100, "{status:?}");
    friends.still_sync().await;
    // with the strangers gone, others get in again
    for connection in held {
        connection.close(0, "gone");
    }
    let raw = Raw::new().await;
    let start = Instant::now();
    loop {
        let mut talk = raw.dial(&target).await;
        talk.send_bytes(Vec::new()).await;
        if matches!(talk.recv().await, Some(Frame::Error { .. })) {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "nobody gets in any more");
        tokio::time::sleep(LOOK).await;
    }
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_a_stranger_an_unknown_group_and_every_false_proof_are_answered_alike() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let stranger = Member { author: AuthorSecret::make(&mut rng()), ..mallory.clone() };
    let elsewhere = {
        // a group of the stranger's own, of which it has a valid token
        let device = friends.site.device("elsewhere").await;
        raw.join(&founder(&device).await).await
    };
    let mut talk = raw.dial(&target).await;
    let earlier = mallory.hello(&talk.binding);
    talk.go_live(&mallory, Offer::default()).await;
    let alices = replica_of(&raw, &target, &mallory).await;

    let mut answers: Vec<(&str, ErrorCode, String, CloseReason)> = Vec::new();
    let cases = [
        "unknown group",
        "no token",
        "token of another author",
        "token of another group",
        "proof of another channel",
        "proof of the other side",
        "proof of another replica",
        "replica of the device itself",
        "proof of zeros",
    ];
    for what in cases {
        let before = refused(&friends.alice).await;
        let thief = Raw::new().await;
        let target = match what {
            "unknown group" => Target { group: elsewhere.group, ..target.clone() },
            _ => target.clone(),
        };
        let mut talk = thief.dial(&target).await;
        let binding = talk.binding;
        let mut hello = match what {
            "unknown group" => elsewhere.hello(&binding),
            "no token" => Member { token: Vec::new(), ..stranger.clone() }.hello(&binding),
            "token of another author" => stranger.hello(&binding),
            "token of another group" => Member { token: elsewhere.token.clone(), ..stranger.clone() }.hello(&binding),
            "proof of another channel" => earlier.clone(),
            "proof of the other side" => mallory.hello_as(&binding, Side::Acceptor, &mallory.replica),
            "proof of another replica" => mallory.hello_as(&binding, Side::Dialler, &ReplicaId([3; 16])),
            "replica of the device itself" => Member { replica: alices, ..mallory.clone() }.hello(&binding),
            _ => mallory.hello(&binding),
        };
        if what == "proof of zeros"
            && let Frame::Hello { proof, .. } = &mut hello
        {
            *proof = [0; 64];
        }
        talk.send(&hello).await;
        let (code, text) = talk.error().await;
        answers.push((what, code, text, talk.ended().await));
        until_refused(&friends.alice, before).await;
    }
    for (what, code, text, end) in &answers {
        assert_eq!((*code, text, end), (ErrorCode::Refused, &answers[0].2, &answers[0].3), "{what}");
    }
    let status = friends.alice.status().await.expect("status");
    assert_eq!(status.authors, 3, "{status:?}");
    assert_eq!(status.peers.len(), 2, "nothing is remembered of strangers: {status:?}");
    friends.still_sync().await;
}

/// The replica id that a device names in its HELLO.
async fn replica_of(raw: &Raw, target: &Target, member: &Member) -> ReplicaId {
    let mut talk = raw.dial(target).await;
    let hello = member.hello(&talk.binding);
    talk.send(&hello).await;
    talk.recv_until(|frame| match frame {
        Frame::Hello { replica, .. } => Some(replica),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_a_devices_own_hello_comes_back_to_it_and_is_refused() {
    let friends = Friends::new().await;
    let raw = Raw::accepting(&[SYNC_ALPN]).await;
    let addresses = raw.endpoint.local_addresses().iter().map(ToString::to_string).collect();
    let before = refused(&friends.alice).await;
    raw.join_from(&friends.alice, addresses).await;
    let dialled = tokio::time::timeout(PATIENCE, raw.endpoint.accept()).await.expect("alice dials whom she admitted");
    let connection = dialled.expect("a connection");
    let stream = connection.accept_stream(MAX_FRAME).await.expect("a stream");
    let mut talk = Talk { binding: [0; 32], connection, stream };
    let hello = talk.recv().await.expect("a frame");
    assert!(matches!(hello, Frame::Hello { .. }), "{hello:?}");
    talk.send(&hello).await;
    assert_eq!(talk.error().await.0, ErrorCode::Refused);
    until_refused(&friends.alice, before).await;
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g16_frames_out_of_turn_end_the_session_and_are_counted() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let push = || Frame::Push { entries: Vec::new(), max_cursor: Cursor(1), check: Check([1; 8]) };
    let pull = |scope| Frame::Pull {
        request: 5,
        scope,
        after: Cursor(0),
        check: Check::NONE,
        limit: 10,
        have: Vec::new(),
        covered: Vec::new(),
    };
    let want = || Frame::Want { request: 9, wants: Vec::new() };
    // what comes after HELLO, before membership is equal
    let early = |binding: &[u8; 32]| {
        vec![
            ("HELLO", mallory.hello(binding)),
            ("PUSH", push()),
            ("WANT", want()),
            ("PUSH_ACK", Frame::PushAck { cursor: Cursor(1) }),
            ("an answer nobody asked for", answer(77, Vec::new(), (Cursor(1), Check([1; 8])))),
            ("JOINED", Frame::Joined),
        ]
    };
    for index in 0..early(&[0; 32]).len() {
        let before = refused(&friends.alice).await;
        let mut talk = raw.dial(&target).await;
        let hello = mallory.hello(&talk.binding);
        talk.send(&hello).await;
        let (what, frame) = early(&talk.binding).swap_remove(index);
        talk.send(&frame).await;
        assert_eq!(talk.error().await.0, ErrorCode::Protocol, "{what}");
        until(&friends.alice, what, |status| status.refused == before + 1).await;
    }
    // and once entries flow
    let late = |binding: &[u8; 32]| {
        vec![
            ("HELLO", vec![mallory.hello(binding)]),
            ("a membership PULL", vec![pull(Scope::Membership)]),
            ("JOINED", vec![Frame::Joined]),
        ]
    };
    for index in 0..late(&[0; 32]).len() {
        let before = refused(&friends.alice).await;
        let mut talk = raw.dial(&target).await;
        talk.go_live(&mallory, Offer::default()).await;
        let (what, frames) = late(&talk.binding).swap_remove(index);
        for frame in &frames {
            talk.send(frame).await;
        }
        assert_eq!(talk.error().await.0, ErrorCode::Protocol, "{what}");
        until(&friends.alice, what, |status| status.refused == before + 1).await;
    }
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_a_later_version_hints_and_repeated_pulls_do_no_harm() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    friends.alice.push("one").await.expect("pushes");
    let mut talk = raw.dial(&target).await;
    talk.go_live(&mallory, Offer::default()).await;
    for _ in 0..200 {
        talk.send_bytes(unknown_frame()).await;
        talk.send(&Frame::Notify { max_cursor: Cursor(u64::MAX) }).await;
        talk.send(&Frame::Presence { slots: vec![vec![7; 100]; 10] }).await;
    }
    for request in 3..20 {
        let pull = Frame::Pull {
            request,
            scope: Scope::All,
            after: Cursor(u64::MAX),
            check: Check([9; 8]),
            limit: 0,
            have: Vec::new(),
            covered: Vec::new(),
        };
        talk.send(&pull).await;
        // one entry at a time, since a limit of 0 counts as 1
        talk.recv_until(|frame| match frame {
            Frame::PullResponse { request: got, reset, entries, .. } if got == request => {
                assert!(reset && entries.len() <= 1, "{entries:?}");
                Some(())
            }
            _ => None,
        })
        .await;
        talk.recv_until(|frame| matches!(frame, Frame::PullResponse { has_more: false, .. }).then_some(())).await;
    }
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r5_a_pull_with_the_largest_limit_is_answered_in_bounded_pieces() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let count = MAX_FRAME_ENVELOPES + 200;
    friends.alice.push_many((0..count).map(|n| n.to_string().into_bytes()).collect()).await.expect("pushes");
    let mut talk = raw.dial(&target).await;
    let got = talk.go_live(&mallory, Offer { limit: u32::MAX, ..Offer::default() }).await;
    assert!(got.len() >= count, "{}", got.len());
    let mut pieces = Vec::new();
    let pull = Frame::Pull {
        request: 4,
        scope: Scope::All,
        after: Cursor(0),
        check: Check::NONE,
        limit: u32::MAX,
        have: Vec::new(),
        covered: Vec::new(),
    };
    talk.send(&pull).await;
    loop {
        let (entries, max_cursor, more) = talk
            .recv_until(|frame| match frame {
                Frame::PullResponse { request: 4, entries, max_cursor, has_more, .. } => {
                    Some((entries, max_cursor, has_more))
                }
                _ => None,
            })
            .await;
        pieces.push((entries.len(), entries.iter().map(|carried| carried.envelope.len()).sum::<usize>()));
        talk.send(&Frame::PushAck { cursor: max_cursor }).await;
        if !more {
            break;
        }
    }
    assert!(pieces.len() > 1, "{pieces:?}");
    let bounded = |&(count, bytes): &(usize, usize)| count <= MAX_FRAME_ENVELOPES && bytes <= 2 * FRAME_BYTES_TARGET;
    assert!(pieces.iter().all(bounded), "{pieces:?}");
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r4_a_flood_of_wants_that_nobody_reads_ends_the_session_and_takes_bounded_memory() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    friends.alice.push(noise(1 << 20)).await.expect("pushes");
    let mut talk = raw.dial(&target).await;
    let got = talk.go_live(&mallory, Offer::default()).await;
    let largest = got.iter().max_by_key(|carried| carried.envelope.len()).expect("a blob");
    let header = Envelope::parse(&largest.envelope).expect("an envelope").header;
    let memory = Memory::now();
    let everything = Want { author: header.sender, range: Range { first: header.number, last: header.number } };
    let connection = talk.connection.clone();
    let flood = async {
        for request in 10..1000 {
            talk.send(&Frame::Want { request, wants: vec![everything] }).await;
            // slowly enough for each to be answered
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        std::future::pending().await
    };
    let ended = tokio::time::timeout(PATIENCE, async {
        tokio::select! {
            () = flood => {}
            _ = connection.closed() => {}
        }
    });
    ended.await.expect("the device ends the session");
    memory.until_grown_by_at_most(96 << 20).await;
    friends.still_sync().await;
}

/// Memory of this process.
struct Memory(usize);

impl Memory {
    fn now() -> Self {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: usize = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
        Self(pages * 4096)
    }

    /// Other tests of this process come and go, so a moment above the bound says nothing.
    async fn until_grown_by_at_most(&self, bound: usize) {
        let start = Instant::now();
        while Self::now().0 > self.0 + bound {
            assert!(start.elapsed() < PATIENCE, "grew by {} MiB", (Self::now().0 - self.0) >> 20);
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_acknowledges_gets_a_window_and_no_more() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let mut talk = raw.dial(&target).await;
    talk.go_live(&mallory, Offer::default()).await;
    let blobs: Vec<Vec<u8>> = (0..6).map(|_| noise(1 << 20)).collect();
    friends.alice.push_many(blobs).await.expect("pushes");
    let mut got = 0;
    let mut newest = Cursor(0);
    while got < WINDOW {
        let (bytes, cursor) = talk.recv_until(pushed).await;
        got += bytes;
        newest = cursor;
    }
    let more = tokio::time::timeout(SILENCE, talk.recv_until(pushed)).await;
    assert!(more.is_err(), "nothing beyond the window: {more:?}");
    assert!(got <= WINDOW + (3 << 19), "{got}");
    talk.send(&Frame::PushAck { cursor: newest }).await;
    while got < 6 << 20 {
        let (bytes, cursor) = talk.recv_until(pushed).await;
        got += bytes;
        talk.send(&Frame::PushAck { cursor }).await;
    }
    friends.still_sync().await;
}

fn pushed(frame: Frame) -> Option<(usize, Cursor)> {
    match frame {
        Frame::Push { entries, max_cursor, .. } => {
            Some((entries.iter().map(|carried| carried.envelope.len()).sum(), max_cursor))
        }
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_reads_holds_up_nobody_and_takes_bounded_memory() {
    let friends = Friends::new().await;
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let mut talk = raw.dial(&target).await;
    talk.go_live(&mallory, Offer::default()).await;
    let memory = Memory::now();
    for n in 0..16_u8 {
        let mut blob = noise(1 << 20);
        blob[0] = n;
        let pushed = friends.alice.push(blob).await.expect("pushes");
        // asks for all of it from the start, again and again
        let pull = Frame::Pull {
            request: 100 + u32::from(n),
            scope: Scope::All,
            after: Cursor(0),
            check: Check::NONE,
            limit: 1000,
            have: Vec::new(),
            covered: Vec::new(),
        };
        talk.send(&pull).await;
        if n % 8 == 7 {
            assert_eq!(friends.alice.handed_to(pushed.cursor, PATIENCE).await.len(), 1, "bob has it");
        }
    }
    memory.until_grown_by_at_most(96 << 20).await;
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_count_for_what_was_sent_and_only_for_that() {
    let site = Site::new();
    let a = site.device("a").await;
    let alice = founder(&a).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&alice).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let target = Target::of_link(&invite.link, alice.group());
    let texts: Vec<Vec<u8>> = (0..300).map(|n: u32| n.to_string().into_bytes()).collect();
    alice.push_many(texts).await.expect("pushes");
    let pending = alice.status().await.expect("status").pending;
    assert!(pending >= 300, "{pending}");

    let mut talk = raw.dial(&target).await;
    let hello = mallory.hello(&talk.binding);
    talk.send(&hello).await;
    // membership, and then no PULL of the rest: nothing is sent, whatever is acknowledged
    let welcomed = async {
        loop {
            match talk.recv().await.expect("the session goes on") {
                Frame::Hello { .. } => talk.send(&membership_pull()).await,
                Frame::Pull { request, scope: Scope::Membership, .. } => {
                    talk.send(&answer(request, Vec::new(), (Cursor(0), Check::NONE))).await;
                }
                Frame::Pull { .. } => return,
                _ => {}
            }
        }
    };
    welcomed.await;
    for cursor in [0, 1, 200, u64::MAX] {
        talk.send(&Frame::PushAck { cursor: Cursor(cursor) }).await;
    }
    talk.send(&Frame::Want { request: 50, wants: Vec::new() }).await;
    talk.recv_until(|frame| matches!(frame, Frame::PullResponse { request: 50, .. }).then_some(())).await;
    assert_eq!(alice.status().await.expect("status").pending, pending);
    drop(talk);

    // one by one, faster than any disk can note them
    let mut talk = raw.dial(&target).await;
    let got = talk.go_live(&mallory, Offer { acknowledge: false, ..Offer::default() }).await;
    assert_eq!(alice.status().await.expect("status").pending, pending);
    let half = got[got.len() / 2].cursor;
    for carried in got.iter().filter(|carried| carried.cursor <= half) {
        talk.send(&Frame::PushAck { cursor: carried.cursor }).await;
    }
    let status = until(&alice, "half acknowledged", |status| status.pending < pending).await;
    assert!(status.pending > 0, "{status:?}");
    talk.send(&Frame::PushAck { cursor: Cursor(u64::MAX) }).await;
    until(&alice, "all acknowledged", |status| status.pending == 0).await;
    alice.push("the session goes on").await.expect("pushes");
    talk.recv_until(pushed).await;
}

fn membership_pull() -> Frame {
    Frame::Pull {
        request: 1,
        scope: Scope::Membership,
        after: Cursor(0),
        check: Check::NONE,
        limit: 1000,
        have: Vec::new(),
        covered: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_nobody_here_has_is_never_answered_with_more_than_a_refusal() {
    let site = Site::new();
    let a = site.device("a").await;
    let alice = founder(&a).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&alice).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let target = Target { group: GroupId(random()), ..Target::of_link(&invite.link, alice.group()) };
    let mut talk = raw.dial(&target).await;
    let mut hello = mallory.hello(&talk.binding);
    if let Frame::Hello { group, .. } = &mut hello {
        *group = target.group;
    }
    talk.send(&hello).await;
    assert!(matches!(talk.recv().await, Some(Frame::Error { code: ErrorCode::Refused, .. })));
    assert!(talk.recv().await.is_none());
}
