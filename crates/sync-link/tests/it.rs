//! Two devices on one machine: links, frames and both kinds of rendezvous, over real sockets and files.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use futures_util::future::{BoxFuture, FutureExt as _};
use sync_link::{
    frame::{FrameError, FrameStream},
    iroh_link::{Bind, CloseReason, ConnectError, Connection, DIAL_TIMEOUT, DeviceId, Endpoint, EndpointConfig},
    lan::{ANSWERS_PER_SOURCE, Lan, LanConfig, LanCounters, MAX_LAN_RECORD, QUERY_LEN, multicast_interfaces},
    rendezvous::{Found, Lookup, LookupId, MAX_CANDIDATES, Publication, Record, Rendezvous, RendezvousError, race},
    same_machine::{DirectoryError, SameMachine},
};
use tokio::time::timeout;

const ALPN: &[u8] = b"test/1";
const MAX_FRAME: usize = 1024 * 1024;
const PATIENCE: Duration = Duration::from_secs(20);

// --- links ---

#[tokio::test]
async fn frames_cross_in_both_directions_and_keep_their_bounds() {
    let (a, b) = Pair::new().await.connect().await;
    let (mut ours, mut theirs) = streams(&a.connection, &b.connection).await;

    let sizes = [0, 1, 1000, 16 * 1024 - 1, 16 * 1024, 70_000, MAX_FRAME];
    for (number, size) in (0_u8..).zip(sizes) {
        let (sent, received) = tokio::join!(
            async {
                ours.sender.send(vec![number; size]).await?;
                ours.sender.flush().await
            },
            theirs.receiver.recv(),
        );
        sent.expect("sent");
        let received = received.expect("received").expect("stream goes on");
        assert_eq!(received, vec![number; size], "frame of {size} bytes");
    }

    theirs.sender.send(&b"back"[..]).await.expect("sent");
    theirs.sender.finish().await.expect("finished");
    assert_eq!(ours.receiver.recv().await, Ok(Some(b"back"[..].into())));
    assert_eq!(ours.receiver.recv().await, Ok(None));
    theirs.sender.delivered().await.expect("acknowledged");
    assert_eq!(theirs.sender.send(&b"late"[..]).await.and(theirs.sender.flush().await), Err(FrameError::Closed));
}

#[tokio::test]
async fn a_frame_may_be_sent_in_parts_and_bounds_may_change() {
    let (a, b) = Pair::new().await.connect().await;
    let (mut ours, mut theirs) = streams(&a.connection, &b.connection).await;
    ours.sender.set_priority(-1);
    assert_eq!(ours.sender.begin(MAX_FRAME + 1), Err(FrameError::TooLong { got: MAX_FRAME + 1, max: MAX_FRAME }));
    ours.sender.begin(50_003).expect("begun");
    ours.sender.part(vec![1; 50_000]).await.expect("queued");
    assert_eq!(ours.sender.send(&b"inside"[..]).await, Err(FrameError::Truncated));
    assert_eq!(ours.sender.part(vec![2; 4]).await, Err(FrameError::TooLong { got: 4, max: 3 }));
    ours.sender.flush().await.expect("flushed");
    let early = timeout(Duration::from_millis(200), theirs.receiver.recv()).await;
    assert!(early.is_err() && theirs.receiver.progress() == 50_004, "{early:?}");
    ours.sender.part(vec![2; 3]).await.expect("queued");
    ours.sender.send(&b"four"[..]).await.expect("queued");
    ours.sender.flush().await.expect("flushed");
    let whole = [vec![1; 50_000], vec![2; 3]].concat();
    assert_eq!(theirs.receiver.recv().await, Ok(Some(whole.into())));
    theirs.receiver.set_max_frame(3);
    assert_eq!(theirs.receiver.recv().await, Err(FrameError::TooLong { got: 4, max: 3 }));
}

#[tokio::test]
async fn small_frames_wait_for_the_flush() {
    let (a, b) = Pair::new().await.connect().await;
    let (mut ours, mut theirs) = streams(&a.connection, &b.connection).await;
    for number in 0..100_u8 {
        ours.sender.send(vec![number]).await.expect("queued");
    }
    let early = timeout(Duration::from_millis(200), theirs.receiver.recv()).await;
    assert!(early.is_err(), "{early:?}");
    ours.sender.flush().await.expect("flushed");
    for number in 0..100_u8 {
        assert_eq!(
            theirs.receiver.recv().await,
            Ok(Some(vec![number].into())),
            "in order, and none lost to the cancelled recv"
        );
    }
}

#[tokio::test]
async fn recv_and_send_lose_nothing_when_cancelled_half_way() {
    let (a, b) = Pair::new().await.connect().await;
    let (mut ours, mut theirs) = streams(&a.connection, &b.connection).await;
    let sending = tokio::spawn(async move {
        for number in 0..60_u8 {
            let frame = vec![number; 300_000];
            // cancelled while the peer does not keep up, and the frame stays queued
            if timeout(Duration::from_millis(1), ours.sender.send(frame)).await.is_err() {
                ours.sender.flush().await.expect("flushed");
            }
        }
        ours.sender.finish().await.expect("finished");
        ours.sender.delivered().await.expect("acknowledged");
    });
    let mut cancelled = 0;
    let mut next = 0;
    loop {
        match timeout(Duration::from_micros(300), theirs.receiver.recv()).await {
            Err(_) => cancelled += 1,
            Ok(Ok(Some(frame))) => {
                assert_eq!(frame, vec![next; 300_000]);
                next += 1;
            }
            Ok(Ok(None)) => break,
            Ok(Err(error)) => panic!("{error}"),
        }
    }
    assert_eq!(next, 60);
    assert!(cancelled > 0);
    sending.await.expect("sender");
}

#[tokio::test]
async fn a_frame_above_the_bound_is_refused_by_either_side_before_its_bytes_arrive() {
    let (a, b) = Pair::new().await.connect().await;
    let (mut ours, mut theirs) = streams(&a.connection, &b.connection).await;
    let too_long = FrameError::TooLong { got: MAX_FRAME + 1, max: MAX_FRAME };
    assert_eq!(ours.sender.send(vec![0; MAX_FRAME + 1]).await, Err(too_long));
    ours.sender.send(&b"still usable"[..]).await.expect("sent");
    ours.sender.flush().await.expect("flushed");
    assert_eq!(theirs.receiver.recv().await, Ok(Some(b"still usable"[..].into())));

    // a peer that allows itself more
    let mut raw = a.connection.open_stream(usize::MAX).await.expect("stream");
    raw.sender.send(vec![0; 32 * 1024]).await.expect("sent");
    raw.sender.flush().await.expect("flushed");
    let mut bounded = b.connection.accept_stream(1000).await.expect("stream");
    let refused = FrameError::TooLong { got: 32 * 1024, max: 1000 };
    assert_eq!(bounded.receiver.recv().await, Err(refused.clone()));
    assert_eq!(bounded.receiver.recv().await, Err(refused), "and again");
    bounded.receiver.stop(9);
    let stopped = timeout(PATIENCE, raw.sender.delivered()).await.expect("told");
    assert_eq!(stopped, Err(FrameError::Refused { code: 9 }));
}

#[tokio::test]
async fn a_stream_that_ends_inside_a_frame_is_truncated() {
    let pair = Pair::new().await;
    let peer = raw_endpoint([9; 32]).await;
    let device = pair.a.device_id();
    let address = iroh::EndpointAddr::from_parts(
        iroh::EndpointId::from_bytes(&device.0).expect("key"),
        pair.a.local_addresses().into_iter().map(iroh::TransportAddr::Ip),
    );
    let (connected, accepted) = tokio::join!(peer.connect(address, ALPN), pair.a.accept());
    let (raw, ours) = (connected.expect("connected"), accepted.expect("accepted"));

    let (mut send, _receive) = raw.open_bi().await.expect("stream");
    send.write_all(b"\x00\x00\x00\x0aonly").await.expect("written");
    send.finish().expect("finished");
    let mut stream = ours.accept_stream(MAX_FRAME).await.expect("stream");
    assert_eq!(stream.receiver.recv().await, Err(FrameError::Truncated));

    let (mut send, _receive) = raw.open_bi().await.expect("stream");
    send.write_all(b"\xff\xff\xff\xffbomb").await.expect("written");
    let mut stream = ours.accept_stream(MAX_FRAME).await.expect("stream");
    assert_eq!(stream.receiver.recv().await, Err(FrameError::TooLong { got: 0xffff_ffff, max: MAX_FRAME }));

    let (mut send, _receive) = raw.open_bi().await.expect("stream");
    send.write_all(b"\x00").await.expect("written");
    let mut stream = ours.accept_stream(MAX_FRAME).await.expect("stream");
    send.reset(5_u32.into()).expect("reset");
    assert_eq!(stream.receiver.recv().await, Err(FrameError::Reset { code: 5 }));
}

#[tokio::test]
async fn the_exporter_is_equal_on_both_sides_and_differs_by_label_context_and_connection() {
    let pair = Pair::new().await;
    let (a, b) = pair.connect().await;
    let (c, _d) = pair.connect().await;
    let export = |connection: &Connection, label: &str, context: &str| {
        connection.export(label.as_bytes(), context.as_bytes()).expect("keying material")
    };
    assert_eq!(export(&a.connection, "label", "context"), export(&b.connection, "label", "context"));
    let different = BTreeSet::from([
        export(&a.connection, "label", "context"),
        export(&a.connection, "label", ""),
        export(&a.connection, "label", "other"),
        export(&a.connection, "other", "context"),
        export(&c.connection, "label", "context"),
    ]);
    assert_eq!(different.len(), 5);
}

#[tokio::test]
async fn a_connection_knows_its_ends_and_why_it_closed() {
    let pair = Pair::new().await;
    let (a, b) = pair.connect().await;
    assert_eq!(a.connection.remote_device(), pair.b.device_id());
    assert_eq!(b.connection.remote_device(), pair.a.device_id());
    assert_eq!(b.connection.alpn(), ALPN);
    let address = a.connection.remote_address().expect("path");
    assert!(pair.b.local_addresses().contains(&address), "{address}");
    assert!(a.connection.rtt().expect("path") < Duration::from_secs(1));

    a.connection.close(7, "done \u{1b}[31m");
    assert_eq!(a.connection.closed().await, CloseReason::Local);
    let reason = timeout(PATIENCE, b.connection.closed()).await.expect("closed");
    let expected = CloseReason::Peer { code: 7, reason: "done \u{1b}[31m".into() };
    assert_eq!(reason, expected);
    assert!(!reason.to_string().contains('\u{1b}'), "harmless on a terminal");
    pair.b.close().await;
    assert!(pair.b.accept().await.is_none());
}

#[tokio::test]
async fn dials_that_cannot_succeed_say_why() {
    let pair = Pair::new().await;
    let soon = Duration::from_secs(1);
    let to = |device| pair.a.connect(device, &[], ALPN, soon);
    assert_eq!(to(pair.a.device_id()).await.err(), Some(ConnectError::Myself));
    assert_eq!(to(pair.b.device_id()).await.err(), Some(ConnectError::NoAddress));
    let no_key = (0..=255)
        .map(|byte| DeviceId([byte; 32]))
        .find(|device| iroh::EndpointId::from_bytes(&device.0).is_err())
        .expect("half of all numbers are no key");
    assert_eq!(to(no_key).await.err(), Some(ConnectError::BadDevice));

    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("socket");
    let address = silent.local_addr().expect("address");
    let started = Instant::now();
    let result = pair.a.connect(pair.b.device_id(), &[address], ALPN, soon).await;
    assert_eq!(result.err(), Some(ConnectError::Timeout(soon)));
    assert!(started.elapsed() < soon * 2, "{:?}", started.elapsed());

    let b = pair.b.local_addresses();
    let result = pair.a.connect(pair.b.device_id(), &b, b"other/1", DIAL_TIMEOUT).await;
    assert!(matches!(result, Err(ConnectError::Refused(_))), "{result:?}");

    // somebody else at the address is not the device we asked for
    let (stranger, fresh) = (endpoint(3).await, endpoint(4).await);
    let result = fresh.connect(pair.b.device_id(), &stranger.local_addresses(), ALPN, soon).await;
    assert!(matches!(result, Err(ConnectError::Refused(_))), "{result:?}");
    pair.a.close().await;
    let result = pair.a.connect(pair.b.device_id(), &b, ALPN, soon).await;
    assert_eq!(result.err(), Some(ConnectError::Closed));
}

#[test]
fn a_peer_that_dies_without_a_word_is_noticed_and_replaced_by_its_next_life() {
    let runtime = runtime();
    let a = runtime.block_on(endpoint(1));
    let first_life = self::runtime();
    let b = first_life.block_on(endpoint(2));
    let device = b.device_id();
    let (dialled, _accepted) = runtime.block_on(async {
        let addresses = b.local_addresses();
        let (dialled, accepted) = tokio::join!(a.connect(device, &addresses, ALPN, DIAL_TIMEOUT), b.accept());
        (dialled.expect("connected"), accepted.expect("accepted"))
    });

    let died = Instant::now();
    first_life.shutdown_background();
    let second_life = runtime.block_on(async {
        // on another port, while the old connection still looks alive
        let second_life = endpoint(2).await;
        let addresses = a.local_addresses();
        let (dialled_back, accepted) =
            tokio::join!(second_life.connect(a.device_id(), &addresses, ALPN, DIAL_TIMEOUT), a.accept(),);
        dialled_back.expect("the restarted peer gets through at once");
        assert_eq!(accepted.expect("accepted").remote_device(), device);
        second_life
    });
    runtime.block_on(async {
        let reason = timeout(PATIENCE, dialled.closed()).await.expect("noticed");
        assert_eq!(reason, CloseReason::TimedOut);
        assert!(died.elapsed() < Duration::from_secs(8), "{:?}", died.elapsed());
        let again = a.connect(device, &second_life.local_addresses(), ALPN, DIAL_TIMEOUT).await;
        again.expect("and is reached at its new address");
    });
}

#[tokio::test]
async fn an_endpoint_keeps_its_port_and_takes_another_where_it_is_taken() {
    let quiet = quiet_port();
    let first = bind(config(1, Some(quiet))).await;
    let port = first.bound_port().expect("bound");
    assert_eq!(port, quiet);
    assert!(first.local_addresses().iter().all(|address| address.port() == port));
    first.close().await;
    drop(first);

    let again = bind(config(1, Some(port))).await;
    assert_eq!(again.bound_port(), Some(port));
    let other = bind(config(2, Some(port))).await;
    let elsewhere = other.bound_port().expect("bound");
    assert_ne!(elsewhere, port);
    assert!(other.local_addresses().iter().all(|address| address.port() == elsewhere));

    // taken for IPv6 alone is taken too, or peers would find somebody else there
    if let Ok(v6) = UdpSocket::bind(("::1", 0)) {
        let port = v6.local_addr().expect("address").port();
        let third = bind(config(3, Some(port))).await;
        assert_ne!(third.bound_port(), Some(port));
    }
}

#[tokio::test]
async fn endpoints_on_every_interface_find_each_other_by_their_own_addresses() {
    let any = |seed| {
        let mut config = config(seed, None);
        config.bind = Bind::Any;
        config
    };
    let (a, b) = (bind(any(1)).await, bind(any(2)).await);
    assert_eq!(*b.watch_addresses().borrow(), b.local_addresses());
    for addresses in [b.local_addresses(), b.loopback_addresses()] {
        assert!(!addresses.is_empty());
        let (dialled, accepted) = tokio::join!(a.connect(b.device_id(), &addresses, ALPN, DIAL_TIMEOUT), b.accept());
        dialled.expect("connected").close(0, "");
        accepted.expect("accepted");
    }
}

#[tokio::test]
async fn mdns_finds_a_device_by_its_id() {
    if no_multicast("mdns_finds_a_device_by_its_id") {
        return;
    }
    let mdns = |seed| {
        let mut config = config(seed, None);
        config.bind = Bind::Any;
        config.mdns = Some(format!("sst{}", std::process::id()));
        config
    };
    let (a, b) = (bind(mdns(1)).await, bind(mdns(2)).await);
    assert_eq!(a.warnings(), []);
    let mut discovered = a.discovered().await.expect("mdns is on");
    let found = timeout(PATIENCE, discovered.next()).await.expect("found in time");
    let text = format!("{found:?}");
    assert!(text.contains(&b.device_id().to_string()), "{text}");
    let (dialled, accepted) = tokio::join!(a.connect(b.device_id(), &[], ALPN, PATIENCE), b.accept());
    assert_eq!(dialled.expect("connected").remote_device(), b.device_id());
    accepted.expect("accepted");
}

#[tokio::test]
async fn mdns_that_cannot_start_is_only_a_warning() {
    let mut config = config(1, None);
    config.mdns = Some("a service name that is far too long for any label of a domain name".into());
    let endpoint = bind(config).await;
    assert_eq!(endpoint.warnings().len(), 1);
    assert!(endpoint.discovered().await.is_none());
}

// --- same machine ---

#[tokio::test]
async fn a_record_is_found_replaced_and_withdrawn_on_the_same_machine() {
    let home = tempfile::tempdir().expect("directory");
    let path = home.path().join("run");
    let server = SameMachine::open(Some(&path)).expect("opened");
    let asker = SameMachine::open(Some(&path)).expect("opened");
    let mut lookup = asker.lookup(id(1));

    let mut publication = server.publish(id(1), record(b"open")).await.expect("published");
    assert_eq!(next_candidate(&mut lookup).await, b"open");
    publication.replace(record(b"used")).await.expect("replaced");
    assert_eq!(next_candidate(&mut lookup).await, b"used");
    assert_eq!(fs::read_dir(path.join("invites")).expect("listed").count(), 1);
    publication.withdraw();
    assert_eq!(fs::read_dir(path.join("invites")).expect("listed").count(), 0);
    nothing_more(&mut asker.lookup(id(1))).await;
}

#[tokio::test]
async fn a_publication_takes_only_its_own_record_back() {
    let home = tempfile::tempdir().expect("directory");
    let server = SameMachine::open(Some(&home.path().join("run"))).expect("opened");
    let older = server.publish(id(1), record(b"older")).await.expect("published");
    let newer = server.publish(id(1), record(b"newer")).await.expect("published");
    older.withdraw();
    assert_eq!(next_candidate(&mut server.lookup(id(1))).await, b"newer");
    newer.withdraw();
    nothing_more(&mut server.lookup(id(1))).await;
}

#[tokio::test]
async fn what_a_crash_leaves_is_harmless_and_swept() {
    let home = tempfile::tempdir().expect("directory");
    let path = home.path().join("run");
    let machine = SameMachine::open(Some(&path)).expect("opened");
    let place = |number| path.join("invites").join(id(number).to_hex());
    let old = std::time::SystemTime::now() - Duration::from_secs(2 * 60 * 60);

    fs::write(place(1), b"left behind").expect("written");
    fs::File::options().write(true).open(place(1)).and_then(|file| file.set_modified(old)).expect("dated back");
    fs::write(place(2), vec![0; 5000]).expect("written");
    fs::write(place(3), b"").expect("written");
    fs::create_dir(place(4)).expect("made");
    for number in 1..=4 {
        nothing_more(&mut machine.lookup(id(number))).await;
    }
    SameMachine::open(Some(&path)).expect("opened again");
    assert!(!place(1).exists());
    assert!(place(2).exists());
}

#[cfg(unix)]
#[test]
fn a_directory_that_others_may_have_prepared_is_refused() {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    let home = tempfile::tempdir().expect("directory");
    let private = |name: &str| {
        let path = home.path().join(name);
        fs::create_dir(&path).expect("made");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("closed");
        path
    };
    let open = |path: &Path| SameMachine::open(Some(path));

    let target = private("target");
    let link = home.path().join("link");
    symlink(&target, &link).expect("linked");
    let error = open(&link).expect_err("a link");
    assert!(matches!(error, DirectoryError::NotADirectory { .. }), "{error}");
    assert_eq!(fs::read_dir(&target).expect("listed").count(), 0, "nothing was written through it");

    let file = home.path().join("file");
    fs::write(&file, b"").expect("written");
    let error = open(&file).expect_err("a file");
    assert!(matches!(error, DirectoryError::NotADirectory { .. }), "{error}");

    for mode in [0o770, 0o707, 0o701] {
        let path = private(&format!("mode-{mode:o}"));
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("opened up");
        let error = open(&path).expect_err("open to others");
        assert!(matches!(error, DirectoryError::OpenToOthers { .. }), "{error}");
    }

    // root can give a directory away; anybody else has the root directory to try
    let foreign = private("foreign");
    let foreign = match chown(&foreign, Some(12345), None) {
        Ok(()) => foreign,
        Err(_) => "/".into(),
    };
    let error = open(&foreign).expect_err("foreign");
    assert!(matches!(error, DirectoryError::ForeignOwner { .. }), "{error}");

    let made = home.path().join("made");
    open(&made).expect("made where it is missing");
    let mode = fs::metadata(&made).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[cfg(unix)]
#[tokio::test]
async fn a_directory_taken_over_later_is_a_warning_and_the_other_providers_go_on() {
    use std::os::unix::fs::PermissionsExt as _;

    let home = tempfile::tempdir().expect("directory");
    let open = |name| SameMachine::open(Some(&home.path().join(name))).expect("opened");
    let (broken, good) = (open("broken"), open("good"));
    let _publication = good.publish(id(1), record(b"here")).await.expect("published");
    fs::set_permissions(broken.path(), fs::Permissions::from_mode(0o777)).expect("opened up");
    let refused = broken.publish(id(1), record(b"not here")).await;
    assert!(matches!(refused, Err(RendezvousError::Directory(_))), "{refused:?}");

    let mut lookups = race([Failing.lookup(id(1)), broken.lookup(id(1)), good.lookup(id(1))]);
    let mut warnings = Vec::new();
    let mut candidate = None;
    while warnings.len() < 2 || candidate.is_none() {
        match timeout(PATIENCE, lookups.next()).await.expect("in time").expect("goes on") {
            Found::Candidate { record, .. } => candidate = Some(record),
            Found::Warning { provider, .. } => warnings.push(provider),
        }
    }
    warnings.sort_unstable();
    assert_eq!(warnings, ["failing", "same machine"]);
    assert_eq!(candidate, Some(record(b"here")));
    nothing_more(&mut lookups).await;
}

#[tokio::test]
async fn a_running_device_is_found_at_its_current_addresses() {
    let home = tempfile::tempdir().expect("directory");
    let path = home.path().join("run");
    let machine = SameMachine::open(Some(&path)).expect("opened");
    let device = [7; 32];
    let address = |text: &str| -> SocketAddr { text.parse().expect("address") };
    let first = [address("127.0.0.1:4000"), address("[fe80::1%3]:4001")];
    assert_eq!(machine.resolve_device(&device).expect("read"), []);

    let publication = machine.publish_device(&device, &first).expect("published");
    assert_eq!(machine.resolve_device(&device).expect("read"), first);
    let second = [address("127.0.0.1:5000")];
    publication.update(&second).expect("updated");
    assert_eq!(machine.resolve_device(&device).expect("read"), second);
    assert_eq!(machine.resolve_device(&[8; 32]).expect("read"), []);

    let name = blake3::hash(&device).to_hex();
    let file = path.join("devices").join(name.as_str());
    assert_eq!(fs::read_to_string(&file).expect("read"), "127.0.0.1:5000\n");
    publication.update(&[]).expect("updated");
    assert!(!file.exists(), "no address, no file");
    publication.update(&second).expect("updated");
    drop(publication);
    assert!(!file.exists());

    fs::write(&file, b"nonsense\n127.0.0.1:1\n\xff\xfe\n127.0.0.1\n[::1]:2").expect("written");
    let readable = [address("127.0.0.1:1"), address("[::1]:2")];
    assert_eq!(machine.resolve_device(&device).expect("read"), readable);
    fs::write(&file, "127.0.0.1:1\n".repeat(1000)).expect("written");
    assert_eq!(machine.resolve_device(&device).expect("read"), [], "longer than any of ours");
}

// --- local network ---

#[tokio::test]
async fn a_record_is_found_replaced_and_withdrawn_on_the_local_network() {
    if no_multicast("a_record_is_found_replaced_and_withdrawn_on_the_local_network") {
        return;
    }
    let config = lan_config();
    let (server, other_server, asker) = (Lan::new(config), Lan::new(config), Lan::new(config));
    let _other = other_server.publish(id(2), record(b"other")).await.expect("shares the port");
    let mut publication = server.publish(id(1), record(b"open")).await.expect("published");

    let mut lookup = asker.lookup(id(1));
    assert_eq!(next_candidate(&mut lookup).await, b"open");
    assert_eq!(next_candidate(&mut asker.lookup(id(2))).await, b"other");
    publication.replace(record(b"used")).await.expect("replaced");
    assert_eq!(next_candidate(&mut lookup).await, b"used");
    publication.withdraw();
    let mut later = asker.lookup(id(1));
    nothing_more(&mut later).await;
    let _again = server.publish(id(1), record(b"again")).await.expect("published");
    assert_eq!(next_candidate(&mut later).await, b"again", "the asker repeats itself");
}

#[tokio::test]
async fn a_forged_answer_that_comes_first_does_not_hide_the_real_one() {
    if no_multicast("a_forged_answer_that_comes_first_does_not_hide_the_real_one") {
        return;
    }
    let config = lan_config();
    let (forger, server, asker) = (Lan::new(config), Lan::new(config), Lan::new(config));
    let _forged = forger.publish(id(1), record(b"forged")).await.expect("published");
    let mut lookup = race([asker.lookup(id(1))]);
    assert_eq!(next_candidate(&mut lookup).await, b"forged");
    let _real = server.publish(id(1), record(b"real")).await.expect("published");
    assert_eq!(next_candidate(&mut lookup).await, b"real");
    nothing_more(&mut lookup).await;
}

#[tokio::test]
async fn a_lookup_takes_a_bounded_number_of_answers() {
    let mut lookup = Lookup::spawn("flood", |mut sink| async move {
        for number in 0..1000_u32 {
            sink.candidate(&number.to_be_bytes()).await;
            sink.candidate(&number.to_be_bytes()).await;
        }
        sink.candidate(&[0; 2000]).await;
        sink.candidate(b"").await;
    });
    let mut candidates = 0;
    while lookup.next().await.is_some() {
        candidates += 1;
    }
    assert_eq!(candidates, MAX_CANDIDATES);
}

#[tokio::test]
async fn an_answer_is_never_longer_than_its_query() {
    let config = lan_config();
    let lan = Lan::new(config);
    let too_long = lan.publish(id(1), record(&[1; MAX_LAN_RECORD + 1])).await;
    assert!(matches!(too_long, Err(RendezvousError::RecordTooLong { .. })), "{too_long:?}");
    let _publication = lan.publish(id(1), record(&[1; MAX_LAN_RECORD])).await.expect("fits");

    let asker = Asker::new(config).await;
    let answer = asker.ask(&query(id(1))).await.expect("answered");
    assert_eq!(answer.len(), QUERY_LEN);
    // shorter and longer queries would change the balance and get nothing
    for length in [0, 1, 21, 100, QUERY_LEN - 1, QUERY_LEN + 1, 1400] {
        let mut packet = query(id(1));
        packet.resize(length, 0);
        assert_eq!(asker.ask(&packet).await, None, "query of {length} bytes");
    }
    assert_eq!(asker.ask(&query(id(9))).await, None, "not published");
    let counters = LanCounters { malformed: 7, unknown: 1, answered: 1, limited: 0 };
    assert_eq!(lan.counters(), counters);
}

#[tokio::test]
async fn a_storm_of_malformed_packets_is_counted_and_survived() {
    let config = lan_config();
    let lan = Lan::new(config);
    let _publication = lan.publish(id(1), record(b"here")).await.expect("published");
    let asker = Asker::new(config).await;
    let good = query(id(1));
    let mut storm = 0;
    for round in 0..200_u32 {
        let noise = blake3::hash(&round.to_be_bytes());
        let mut packet = good.clone();
        match round % 4 {
            0 => packet = noise.as_bytes().repeat(20),
            1 => packet[usize::from(noise.as_bytes()[0]) % 5] ^= 0x80,
            2 => packet[21 + usize::from(noise.as_bytes()[1])] = 1,
            _ => packet.truncate(usize::from(noise.as_bytes()[2])),
        }
        asker.socket.send_to(&packet, asker.server).await.expect("sent");
        storm += 1;
        if round % 20 == 0 {
            // so that no packet overflows the socket's buffer
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert!(asker.ask(&good).await.is_some(), "still answers");
    assert_eq!(lan.counters().malformed, storm);
}

#[tokio::test]
async fn one_source_gets_a_bounded_number_of_answers_in_a_second() {
    let config = lan_config();
    let lan = Lan::new(config);
    let _publication = lan.publish(id(1), record(b"here")).await.expect("published");
    let asker = Asker::new(config).await;
    let started = Instant::now();
    for _ in 0..50 {
        asker.socket.send_to(&query(id(1)), asker.server).await.expect("sent");
    }
    let mut answers = 0;
    while asker.receive().await.is_some() {
        answers += 1;
    }
    let seconds = u32::try_from(started.elapsed().as_secs()).expect("short") + 1;
    assert!(answers >= ANSWERS_PER_SOURCE, "{answers}");
    assert!(answers <= ANSWERS_PER_SOURCE * seconds, "{answers}");
    assert_eq!(lan.counters().limited, 50 - u64::from(answers));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(asker.ask(&query(id(1))).await.is_some(), "answers again a second later");
}

// --- helpers ---

struct Pair {
    a: Endpoint,
    b: Endpoint,
}

/// One side of a connection, with the endpoint that carries it.
struct Side {
    connection: Connection,
    _endpoint: Endpoint,
}

impl Pair {
    async fn new() -> Self {
        Self { a: endpoint(1).await, b: endpoint(2).await }
    }

    async fn connect(&self) -> (Side, Side) {
        let addresses = self.b.local_addresses();
        let (dialled, accepted) =
            tokio::join!(self.a.connect(self.b.device_id(), &addresses, ALPN, DIAL_TIMEOUT), self.b.accept());
        let side = |connection, endpoint: &Endpoint| Side { connection, _endpoint: endpoint.clone() };
        (side(dialled.expect("connected"), &self.a), side(accepted.expect("accepted"), &self.b))
    }
}

/// A provider that only warns, twice.
#[derive(Debug)]
struct Failing;

impl Rendezvous for Failing {
    fn name(&self) -> &'static str {
        "failing"
    }

    fn publish(&self, _: LookupId, _: Record) -> BoxFuture<'_, Result<Publication, RendezvousError>> {
        async { Err(RendezvousError::NoInterface) }.boxed()
    }

    fn lookup(&self, _: LookupId) -> Lookup {
        Lookup::spawn(self.name(), |mut sink| async move {
            sink.warn(RendezvousError::EmptyRecord).await;
            sink.warn(RendezvousError::EmptyRecord).await;
        })
    }
}

/// A bare socket that asks one server of this machine.
struct Asker {
    socket: tokio::net::UdpSocket,
    server: SocketAddr,
}

impl Asker {
    async fn new(config: LanConfig) -> Self {
        let socket = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
        Self { socket: socket.expect("socket"), server: (Ipv4Addr::LOCALHOST, config.port).into() }
    }

    async fn ask(&self, packet: &[u8]) -> Option<Vec<u8>> {
        self.socket.send_to(packet, self.server).await.expect("sent");
        self.receive().await
    }

    async fn receive(&self) -> Option<Vec<u8>> {
        let mut answer = [0; 2000];
        let length = timeout(Duration::from_millis(300), self.socket.recv(&mut answer)).await;
        Some(answer[..length.ok()?.expect("received")].to_vec())
    }
}

fn config(seed: u8, port: Option<u16>) -> EndpointConfig {
    let mut config = EndpointConfig::new(&[seed; 32], vec![ALPN.to_vec()]);
    config.bind = Bind::Loopback;
    config.port = port;
    config.idle_timeout = Duration::from_secs(3);
    config.keep_alive = Duration::from_millis(700);
    config
}

async fn endpoint(seed: u8) -> Endpoint {
    bind(config(seed, None)).await
}

async fn bind(config: EndpointConfig) -> Endpoint {
    Endpoint::bind(config).await.expect("bound")
}

/// A free port below those the system hands out, so that no test beside this one takes it.
fn quiet_port() -> u16 {
    let start = 20_000 + u16::try_from(std::process::id() % 10_000).expect("small");
    (start..start + 1000)
        .find(|port| UdpSocket::bind((Ipv4Addr::LOCALHOST, *port)).is_ok() && UdpSocket::bind(("::", *port)).is_ok())
        .expect("free port")
}

/// A peer without our framing.
async fn raw_endpoint(secret: [u8; 32]) -> iroh::Endpoint {
    iroh::Endpoint::builder(iroh::endpoint::presets::Minimal)
        .secret_key(iroh::SecretKey::from_bytes(&secret))
        .bind()
        .await
        .expect("bound")
}

async fn streams(a: &Connection, b: &Connection) -> (FrameStream, FrameStream) {
    let mut ours = a.open_stream(MAX_FRAME).await.expect("stream");
    ours.sender.send(&b"hello"[..]).await.expect("sent");
    ours.sender.flush().await.expect("flushed");
    let mut theirs = b.accept_stream(MAX_FRAME).await.expect("stream");
    assert_eq!(theirs.receiver.recv().await, Ok(Some(b"hello"[..].into())));
    (ours, theirs)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime")
}

fn id(number: u8) -> LookupId {
    LookupId([number; 16])
}

fn record(bytes: &[u8]) -> Record {
    Record::new(bytes.to_vec()).expect("length is allowed")
}

/// The default groups on a port of this test alone.
fn lan_config() -> LanConfig {
    let port =
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| socket.local_addr()).expect("free port").port();
    LanConfig { port, ..LanConfig::default() }
}

fn query(id: LookupId) -> Vec<u8> {
    let mut packet = [b"SSLQ\x01".as_slice(), &id.0].concat();
    packet.resize(QUERY_LEN, 0);
    packet
}

fn no_multicast(test: &str) -> bool {
    let none = multicast_interfaces().expect("interfaces").is_empty();
    if none {
        println!("{test}: skipped, this machine has no interface for multicast");
    }
    none
}

async fn next_candidate(lookup: &mut Lookup) -> Vec<u8> {
    match timeout(PATIENCE, lookup.next()).await.expect("in time").expect("goes on") {
        Found::Candidate { record, .. } => record.as_bytes().to_vec(),
        Found::Warning { provider, error } => panic!("{provider}: {error}"),
    }
}

async fn nothing_more(lookup: &mut Lookup) {
    let more = timeout(Duration::from_millis(700), lookup.next()).await;
    assert!(more.is_err(), "{more:?}");
}
