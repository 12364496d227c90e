//! Peers that begin and do not end, and a database that cannot be written to: each is let go, told or waited for.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use sync_types::{ErrorCode, Frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::raw::{Member, Talk, random};
use crate::site::{PATIENCE, RelayProcess, Site};

const UPGRADE: &str = "GET /v1/channel HTTP/1.1\r\nhost: relay\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
/// Kinds of WebSocket frames, and the mark of a message's last one.
const CONTINUED: u8 = 0;
const BINARY: u8 = 2;
const PING: u8 = 9;
const LAST: u8 = 0x80;

/// A frame of a client, whose mask changes nothing.
fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    assert!(length < 126, "longer ones look different");
    [&[head, 0x80 | length, 0, 0, 0, 0][..], payload].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_in_the_channel_that_never_finish_are_let_go() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\nconnections_per_address = 100\n");
    let first = || frame(LAST | BINARY, &random::<32>());
    let unfinished = [
        first(),
        frame(BINARY, &random::<10>()),
        frame(LAST | BINARY, &random::<31>()),
        [first(), frame(LAST | BINARY, &random::<64>())].concat(),
        [first(), first()].concat(),
    ];
    let count = unfinished.len() as u64;
    let unfinished = relay.say(unfinished.map(|said| [UPGRADE.as_bytes(), &said].concat()));
    let mut talk = Member::founder().live(&relay.url).await;
    assert!(unfinished.are_let_go().await);
    assert_eq!(relay.metric("syncrelay_refusals_total{reason=\"broken_handshake\"}"), count);
    assert!(talk.pulled().await.is_empty(), "others are served");
}

#[test]
fn a_message_in_fragments_with_a_ping_between_them_is_one_message() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let mut socket = TcpStream::connect(relay.address()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(UPGRADE.as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 101"));
    let message = random::<32>();
    for part in [
        frame(BINARY, &message[..10]),
        frame(LAST | PING, b"x"),
        frame(CONTINUED, &message[10..11]),
        frame(LAST | CONTINUED, &message[11..]),
    ] {
        socket.write_all(&part).unwrap();
    }
    // the answer to the ping, and the second message of the handshake
    let mut answers = [0; 3 + 2 + 96];
    socket.read_exact(&mut answers).unwrap();
    assert_eq!(answers[..5], [LAST | 10, 1, b'x', LAST | BINARY, 96]);
}

/// Stands between a device and a relay, and lets bytes through as it is told.
struct Between {
    address: SocketAddr,
    pace: Arc<AtomicU8>,
}

/// How bytes go towards the relay.
const FREELY: u8 = 0;
const BY_DRIPS: u8 = 1;
const NOT_AT_ALL: u8 = 2;
/// Time between two drips, and between two looks.
const DRIP: Duration = Duration::from_millis(50);

impl Between {
    async fn new(relay: &RelayProcess) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, pace) = (listener.local_addr().unwrap(), Arc::new(AtomicU8::new(FREELY)));
        let (far, told) = (relay.address(), pace.clone());
        tokio::spawn(async move {
            let (near, _) = listener.accept().await.unwrap();
            let far = tokio::net::TcpStream::connect(far).await.unwrap();
            let (from_near, to_near) = near.into_split();
            let (from_far, to_far) = far.into_split();
            tokio::spawn(carry(from_far, to_near, told.clone(), false));
            carry(from_near, to_far, told, true).await;
        });
        Self { address, pace }
    }

    fn url(&self, relay: &RelayProcess) -> String {
        relay.url.replace(&relay.address().to_string(), &self.address.to_string())
    }

    fn set(&self, pace: u8) {
        self.pace.store(pace, Ordering::Relaxed);
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    pace: Arc<AtomicU8>,
    drips: bool,
) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let Ok(count @ 1..) = from.read(&mut bytes).await else { return };
        let mut rest = &bytes[..count];
        while !rest.is_empty() {
            let now = match pace.load(Ordering::Relaxed) {
                NOT_AT_ALL => 0,
                BY_DRIPS if drips => 1,
                _ => rest.len(),
            };
            if to.write_all(&rest[..now]).await.is_err() {
                return;
            }
            rest = &rest[now..];
            if !rest.is_empty() {
                tokio::time::sleep(DRIP).await;
            }
        }
    }
}

/// Has another member push on until the relay holds no more than so many connections.
async fn until_let_go(relay: &RelayProcess, talk: &mut Talk, member: &mut Member, held: u64) {
    let give_up = Instant::now() + PATIENCE;
    let mut cursor = 1;
    // the question itself comes on one
    while relay.metric("syncrelay_connections_active") > held + 1 {
        assert!(Instant::now() < give_up, "a peer that is not there is held");
        cursor += 1;
        talk.push(cursor, member.entry(50)).await;
        talk.acknowledged(cursor).await;
        tokio::time::sleep(DRIP).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_drips_bytes_or_is_silent_is_let_go_while_others_push_to_it() {
    let site = Site::new();
    let settings = "[limits]\nsilence_seconds = 3\nmessages_per_minute = 100000\nconnections_per_address = 100\n";
    let relay = RelayProcess::start(&site, "relay", settings);
    let mut anna = Member::founder();
    let mut ben = anna.admit();
    for pace in [BY_DRIPS, NOT_AT_ALL] {
        let between = Between::new(&relay).await;
        let mut slow = anna.live(&between.url(&relay)).await;
        assert!(!slow.pulled().await.is_empty() || pace == BY_DRIPS);
        between.set(pace);
        slow.push(1, anna.entry(50_000)).await;
        let mut other = ben.live(&relay.url).await;
        until_let_go(&relay, &mut other, &mut ben, 1).await;
        drop(other);
    }
}

#[test]
fn who_asks_by_http_and_reads_no_answer_is_let_go() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let mut socket = TcpStream::connect(relay.address()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nhost: relay\r\n\r\n".repeat(100);
    // until neither side takes any more
    let mut stuck = 0;
    while stuck < 20 {
        match socket.write(&request) {
            Ok(_) => stuck = 0,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                stuck += 1;
                std::thread::sleep(DRIP);
            }
            Err(error) => panic!("{error}"),
        }
    }
    let give_up = Instant::now() + PATIENCE;
    while relay.metric("syncrelay_connections_active") > 1 {
        assert!(Instant::now() < give_up);
        std::thread::sleep(DRIP);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_someone_else_holds_is_waited_for_and_then_members_are_told() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    let other = rusqlite::Connection::open(relay.database()).unwrap();
    let (first, second) = (anna.entry(50), anna.entry(60));
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    talk.push(1, first.clone()).await;
    assert!(talk.is_unacknowledged(1).await, "nothing is acknowledged that is not stored");
    other.execute_batch("COMMIT").unwrap();
    talk.acknowledged(1).await;
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    talk.push(2, second.clone()).await;
    assert_eq!(talk.error().await.0, ErrorCode::Unavailable);
    talk.ended().await;
    other.execute_batch("COMMIT").unwrap();
    let mut talk = anna.live(&relay.url).await;
    talk.push(2, second.clone()).await;
    talk.acknowledged(2).await;
    assert_eq!(talk.pulled().await, [first, second]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_whose_disk_is_full_says_so_gives_what_it_has_and_takes_more_once_there_is_room() {
    let site = Site::new();
    let Some(relay) = RelayProcess::start_on_small_disk(&site, "relay", 8) else {
        eprintln!("skipped: a small disk is mounted in a namespace, which is not allowed here");
        return;
    };
    let others = relay.as_it_sees("others");
    std::fs::write(&others, vec![1; 4 << 20]).unwrap();
    let mut anna = Member::founder();
    let mut talk = anna.live(&relay.url).await;
    let mut kept = Vec::new();
    let told = 'full: loop {
        let entry = anna.entry(300_000);
        let cursor = kept.len() as u64 + 1;
        talk.push(cursor, entry.clone()).await;
        loop {
            match talk.recv().await {
                Some(Frame::PushAck { cursor: acknowledged }) if acknowledged.0 == cursor => break,
                Some(Frame::Error { code, text }) => break 'full (code, text),
                Some(_) => {}
                None => panic!("the channel ended without a word"),
            }
        }
        kept.push(entry);
        assert!(kept.len() < 20, "what is left of 8 MiB holds no 6");
    };
    assert_eq!(told, (ErrorCode::StorageFull, "the disk of this relay is full".to_owned()));
    assert!(!kept.is_empty());
    assert_eq!(talk.pulled().await, kept, "it is told, and read on");
    assert_eq!(anna.live(&relay.url).await.pulled().await, kept, "also by who comes later");
    std::fs::remove_file(others).unwrap();
    let mut talk = anna.live(&relay.url).await;
    for number in kept.len()..kept.len() + 3 {
        if number == anna.feed.len() {
            anna.entry(300_000);
        }
        talk.push(number as u64 + 1, anna.feed[number].clone()).await;
        talk.acknowledged(number as u64 + 1).await;
    }
    assert!(anna.feed.len() == kept.len() + 3 && talk.pulled().await == anna.feed);
}
