//! Chunks between devices: several sources, some of which go away, lie, or are asked by those who may not.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sync_client::chunks::{ChunkSource, FetchQueue, Fetched, Pace, Want};
use sync_client::{GroupId, Status, SyncClient};
use sync_link::frame::FrameStream;
use sync_types::bounds::{MAX_CHUNK, MAX_CHUNK_FRAME};
use sync_types::folder::ChunkFrame;
use sync_types::{ErrorCode, Writer};
use tokio::sync::{mpsc, watch};

use crate::site::*;

/// Chunks in memory, of one group.
struct Shelf {
    group: GroupId,
    chunks: HashMap<[u8; 32], Vec<u8>>,
    /// What was read here.
    read: Mutex<HashSet<[u8; 32]>>,
    /// Time each read takes.
    pause: Duration,
}

impl Shelf {
    fn new(group: GroupId, chunks: &[Vec<u8>]) -> Self {
        let chunks = chunks.iter().map(|chunk| (hash(chunk), chunk.clone())).collect();
        Self { group, chunks, read: Mutex::default(), pause: Duration::ZERO }
    }

    /// Says of every chunk that it is this.
    fn lying(self, bytes: &[u8]) -> Self {
        let chunks = self.chunks.into_keys().map(|hash| (hash, bytes.to_vec())).collect();
        Self { chunks, ..self }
    }

    fn count(&self) -> usize {
        self.read.lock().expect("no panic").len()
    }

    fn serve(self, client: &SyncClient) -> Arc<Self> {
        let shelf = Arc::new(self);
        client.device().serve_chunks(client.group(), shelf.clone()).expect("a group");
        shelf
    }
}

impl ChunkSource for Shelf {
    fn read(&self, group: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>> {
        std::thread::sleep(self.pause);
        let chunk = self.chunks.get(hash).filter(|_| *group == self.group)?;
        self.read.lock().expect("no panic").insert(*hash);
        Some(chunk.clone())
    }
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

fn want(chunk: &[u8]) -> Want {
    Want { hash: hash(chunk), len: u32::try_from(chunk.len()).expect("a chunk") }
}

/// Chunks of all sizes, some that compress and some that do not.
fn mixed(count: usize) -> Vec<Vec<u8>> {
    let sizes = [1, 100, 4_000, 0, 30_000, 64 << 10, 65_537, 200_000];
    let chunk = |number: usize| match sizes[number % sizes.len()] {
        0 => b"the same again, and ".repeat(number + 1),
        1 => number.to_le_bytes().to_vec(),
        size => noise(size),
    };
    let mut chunks: Vec<_> = (0..count).map(chunk).collect();
    if count > 100 {
        let most = usize::try_from(MAX_CHUNK).expect("memory");
        chunks.extend([Vec::new(), noise(most), vec![7; most], noise(1 << 20)]);
    }
    chunks
}

/// Asks for chunks and gives what came, by hash.
async fn fetch(client: &SyncClient, wants: Vec<Want>) -> HashMap<[u8; 32], Option<Vec<u8>>> {
    let (queue, fetched) = client.device().fetch_chunks(client.group()).expect("a group");
    collect(queue, fetched, wants).await
}

async fn collect(
    queue: FetchQueue,
    mut fetched: mpsc::Receiver<Fetched>,
    wants: Vec<Want>,
) -> HashMap<[u8; 32], Option<Vec<u8>>> {
    let count = wants.len();
    tokio::spawn(async move {
        for want in wants {
            assert!(queue.push(want).await, "nobody takes it");
        }
    });
    let mut got = HashMap::new();
    let mut answers = 0;
    // the queue is dropped once all are in, so that the end of what is fetched shows that nothing is lost or repeated
    while let Some(Fetched { hash, bytes, .. }) =
        tokio::time::timeout(PATIENCE, fetched.recv()).await.expect("an answer in time")
    {
        answers += 1;
        got.insert(hash, bytes.map(Vec::from));
    }
    assert_eq!(answers, count, "each want is answered once");
    got
}

/// Checks that every chunk came whole.
fn assert_all(got: &HashMap<[u8; 32], Option<Vec<u8>>>, chunks: &[Vec<u8>]) {
    for chunk in chunks {
        let bytes = got.get(&hash(chunk)).expect("an answer").as_ref();
        assert!(bytes == Some(chunk), "a chunk of {} bytes: {:?}", chunk.len(), bytes.map(Vec::len));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_all_sizes_go_both_ways_at_once() {
    let friends = Friends::new().await;
    let (left, right) = (mixed(500), mixed(500));
    Shelf::new(friends.alice.group(), &left).serve(&friends.alice);
    Shelf::new(friends.bob.group(), &right).serve(&friends.bob);
    let (at_bob, at_alice) = tokio::join!(
        fetch(&friends.bob, left.iter().map(|chunk| want(chunk)).collect()),
        fetch(&friends.alice, right.iter().map(|chunk| want(chunk)).collect()),
    );
    assert_all(&at_bob, &left);
    assert_all(&at_alice, &right);
    assert_eq!((refused(&friends.alice).await, refused(&friends.bob).await), (0, 0));
    friends.still_sync().await;
}

/// Waits until a client has sessions with so many peers.
async fn connected(client: &SyncClient, count: usize) {
    let sessions = |status: &Status| status.peers.iter().filter(|peer| peer.state == "connected").count();
    until(client, "connected", |status| sessions(status) == count).await;
}

/// Three devices that are all connected; the third has nothing.
async fn three() -> (Friends, SyncClient) {
    let friends = Friends::new().await;
    let carol = pair(&friends.alice, &friends.site.device("c").await).await;
    connected(&carol, 2).await;
    (friends, carol)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_peer_lacks_comes_from_another_and_what_all_lack_from_none() {
    let (friends, carol) = three().await;
    let chunks = mixed(64);
    let group = carol.group();
    Shelf::new(group, &chunks[..20]).serve(&friends.alice);
    Shelf::new(group, &chunks[20..60]).serve(&friends.bob);
    let wants: Vec<_> = chunks.iter().map(|chunk| want(chunk)).collect();
    let got = fetch(&carol, wants.clone()).await;
    assert_all(&got, &chunks[..60]);
    assert!(chunks[60..].iter().all(|chunk| got[&hash(chunk)].is_none()));
    // who has it now is asked again
    Shelf::new(group, &chunks[60..]).serve(&friends.alice);
    assert_all(&fetch(&carol, wants[60..].to_vec()).await, &chunks[60..]);
    assert_eq!(refused(&carol).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn wants_wait_a_while_for_a_first_peer_and_are_given_back_if_none_comes() {
    let site = Site::new();
    let alice = founder(&site.device("a").await).await;
    let (queue, mut fetched) = alice.device().fetch_chunks(alice.group()).expect("a group");
    let chunk = noise(1000);
    assert!(queue.push(want(&chunk)).await);
    let answer = tokio::time::timeout(PATIENCE, fetched.recv()).await.expect("in time").expect("goes on");
    assert_eq!((answer.hash, answer.bytes), (hash(&chunk), None));
    assert!(queue.push(want(&chunk)).await);
    let b = site.device("b").await;
    let bob = async {
        let bob = pair(&alice, &b).await;
        Shelf::new(bob.group(), std::slice::from_ref(&chunk)).serve(&bob);
        bob
    };
    let (bob, early) = tokio::join!(bob, fetched.recv());
    // whether it was given back before the peer came depends on how long pairing takes
    if early.is_none_or(|early| early.bytes.is_none()) {
        assert_all(&fetch(&alice, vec![want(&chunk)]).await, std::slice::from_ref(&chunk));
    }
    drop(fetched);
    assert!(!queue.push(want(&chunk)).await, "nobody takes it any more");
    bob.device().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_liar_is_asked_no_more_and_others_serve() {
    let (friends, carol) = three().await;
    let chunks = mixed(200);
    let group = carol.group();
    let liar = Shelf::new(group, &chunks).lying(b"something else").serve(&friends.alice);
    let honest = Shelf::new(group, &chunks).serve(&friends.bob);
    let wants: Vec<_> = chunks.iter().map(|chunk| want(chunk)).collect();
    let before = refused(&carol).await;
    assert_all(&fetch(&carol, wants.clone()).await, &chunks);
    assert_eq!(refused(&carol).await, before + 1);
    let (lies, truths) = (liar.count(), honest.count());
    assert!(lies > 0 && truths > 0);
    // as long as the session lasts, whoever asks
    assert_all(&fetch(&carol, wants).await, &chunks);
    assert_eq!((liar.count(), refused(&carol).await), (lies, before + 1));
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_want_of_a_wrong_length_is_nobodys_and_no_peers_fault() {
    let friends = Friends::new().await;
    let chunk = noise(5000);
    Shelf::new(friends.alice.group(), std::slice::from_ref(&chunk)).serve(&friends.alice);
    for len in [4999, 5001, 0, u32::MAX] {
        let wrong = Want { len, ..want(&chunk) };
        assert_eq!(fetch(&friends.bob, vec![wrong]).await[&wrong.hash], None);
    }
    assert_all(&fetch(&friends.bob, vec![want(&chunk)]).await, &[chunk]);
    assert_eq!(refused(&friends.bob).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_dies_half_way_is_taken_over_by_another() {
    let (friends, carol) = three().await;
    let chunks: Vec<_> = (0..400).map(|_| noise(50_000)).collect();
    let group = carol.group();
    let slow = |pause| Shelf { pause: Duration::from_millis(pause), ..Shelf::new(group, &chunks) };
    let dying = slow(5).serve(&friends.alice);
    let living = slow(1).serve(&friends.bob);
    let wants = chunks.iter().map(|chunk| want(chunk)).collect();
    let death = async {
        while dying.count() < 20 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        friends.alice.device().close().await;
    };
    let (got, ()) = tokio::join!(fetch(&carol, wants), death);
    assert_all(&got, &chunks);
    assert!(dying.count() < chunks.len() && living.count() > 200, "{} and {}", dying.count(), living.count());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_of_another_group_is_not_served() {
    let friends = Friends::new().await;
    let other = founder(&friends.alice.device()).await;
    let bobs = pair(&other, &friends.bob.device()).await;
    let chunk = noise(1000);
    let shelf: Arc<dyn ChunkSource> = Arc::new(Shelf::new(other.group(), std::slice::from_ref(&chunk)));
    for client in [&friends.alice, &other] {
        client.device().serve_chunks(client.group(), shelf.clone()).expect("a group");
    }
    assert_eq!(fetch(&friends.bob, vec![want(&chunk)]).await[&hash(&chunk)], None);
    assert_all(&fetch(&bobs, vec![want(&chunk)]).await, &[chunk]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_kept_and_a_change_counts_at_once() {
    let friends = Friends::new().await;
    let chunks: Vec<_> = (0..8).map(|_| noise(64 << 10)).collect();
    let (alice, bob) = (&friends.alice, &friends.bob);
    Shelf::new(alice.group(), &chunks).serve(alice);
    let (set, limit) = watch::channel(Some(256 << 10));
    let limited = || Arc::new(Pace::new(limit.clone()));
    let wants: Vec<_> = chunks.iter().map(|chunk| want(chunk)).collect();
    alice.device().pace_chunks(alice.group(), limited(), Arc::default()).expect("a group");
    let start = std::time::Instant::now();
    assert_all(&fetch(bob, wants.clone()).await, &chunks);
    assert!(start.elapsed() > Duration::from_millis(1800), "{:?}", start.elapsed());
    alice.device().pace_chunks(alice.group(), Arc::default(), Arc::default()).expect("a group");
    bob.device().pace_chunks(bob.group(), Arc::default(), limited()).expect("a group");
    let start = std::time::Instant::now();
    assert_all(&fetch(bob, wants.clone()).await, &chunks);
    assert!(start.elapsed() > Duration::from_millis(1500), "{:?}", start.elapsed());
    set.send_replace(Some(1));
    let faster = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        set.send_replace(None);
    };
    let (got, ()) = tokio::join!(fetch(bob, wants), faster);
    assert_all(&got, &chunks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_no_chunk_and_is_counted() {
    let friends = Friends::new().await;
    let chunk = noise(1000);
    let shelf = Shelf::new(friends.alice.group(), std::slice::from_ref(&chunk)).serve(&friends.alice);
    let target = Target::of(&friends.alice, &friends.bob).await;
    let ask = ChunkFrame::Ask { hashes: vec![hash(&chunk)] }.encode();
    let stranger = Raw::new().await;
    // instead of a session
    let before = refused(&friends.alice).await;
    let mut talk = stranger.dial(&target).await;
    talk.send_bytes(ask.clone()).await;
    assert_eq!(talk.error().await.0, ErrorCode::Protocol);
    talk.ended().await;
    assert_eq!(refused(&friends.alice).await, before + 1);
    // beside one that does not come about
    let member = stranger.join(&friends.alice).await;
    let liar = Member { author: sync_crypto::AuthorSecret::make(&mut rng()), ..member.clone() };
    let mut talk = stranger.dial(&target).await;
    let mut beside = talk.connection.open_stream(MAX_CHUNK_FRAME).await.expect("opens");
    beside.sender.send(ask.clone()).await.expect("sends");
    beside.sender.flush().await.expect("sends");
    let hello = liar.hello(&talk.binding);
    talk.send(&hello).await;
    assert_eq!(talk.error().await.0, ErrorCode::Refused);
    assert!(!matches!(beside.receiver.recv().await, Ok(Some(_))), "no answer");
    until(&friends.alice, "counted", |status| status.refused == before + 2).await;
    assert_eq!(shelf.count(), 0);
    // a member who asks before the session stands is answered once it does
    let mut talk = stranger.dial(&target).await;
    // the session's stream is the first that arrives
    let hello = member.hello(&talk.binding);
    talk.send(&hello).await;
    let mut beside = talk.connection.open_stream(MAX_CHUNK_FRAME).await.expect("opens");
    beside.sender.send(ask).await.expect("sends");
    beside.sender.flush().await.expect("sends");
    let early = tokio::time::timeout(Duration::from_millis(300), beside.receiver.recv()).await;
    assert!(early.is_err(), "an answer before membership is equal: {early:?}");
    talk.go_on(Offer::default()).await;
    assert_eq!(answer_of(&mut beside).await, Some(ChunkFrame::Chunk { codec: 0, len: 1000, bytes: chunk }));
}

/// The next answer; none if the device has ended the stream.
async fn answer_of(stream: &mut FrameStream) -> Option<ChunkFrame> {
    let received = tokio::time::timeout(PATIENCE, stream.receiver.recv()).await.expect("the device hangs");
    Some(ChunkFrame::decode(&received.ok().flatten()?).expect("a device sends what can be read"))
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_question_end_the_stream_only_and_are_counted() {
    let friends = Friends::new().await;
    let chunk = noise(1000);
    Shelf::new(friends.alice.group(), std::slice::from_ref(&chunk)).serve(&friends.alice);
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let mut talk = raw.dial(&target).await;
    talk.go_live(&mallory, Offer::default()).await;
    let hashes = vec![hash(&chunk); 1 << 20];
    let mut many = Writer::array_of(2);
    many.uint(0x60).array(1 << 20);
    let cases = [
        ("2^20 hashes", ChunkFrame::Ask { hashes: hashes.clone() }.encode()),
        ("2^20 hashes announced", many.finish()),
        ("1025 hashes", ChunkFrame::Ask { hashes: hashes[..1025].to_vec() }.encode()),
        ("an answer", ChunkFrame::Missing.encode()),
        ("a chunk above the bound", vec![0; MAX_CHUNK_FRAME + 1]),
        ("an empty frame", Vec::new()),
        ("garbage", noise(300)),
        ("arrays in arrays", vec![0x91; 1000]),
    ];
    for (what, bytes) in cases {
        let before = refused(&friends.alice).await;
        let mut stream = talk.connection.open_stream(64 << 20).await.expect("opens");
        // that the device has stopped reading meanwhile shows in what it does not answer
        let _ = stream.sender.send(bytes).await;
        let _ = stream.sender.flush().await;
        assert_eq!(answer_of(&mut stream).await, None, "{what}");
        until(&friends.alice, what, |status| status.refused == before + 1).await;
    }
    // the session goes on, and so do chunks
    talk.push(mallory.chain(&["well"]), 1).await;
    let mut stream = talk.connection.open_stream(MAX_CHUNK_FRAME).await.expect("opens");
    let ask = ChunkFrame::Ask { hashes: vec![hash(&chunk), [1; 32], hash(&chunk)] };
    stream.sender.send(ask.encode()).await.expect("sends");
    stream.sender.finish().await.expect("sends");
    let whole = ChunkFrame::Chunk { codec: 0, len: 1000, bytes: chunk };
    for expected in [Some(&whole), Some(&ChunkFrame::Missing), Some(&whole), None] {
        assert_eq!(answer_of(&mut stream).await.as_ref(), expected);
    }
    friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_of_a_peer_are_answered_beside_each_other_and_one_more_waits() {
    let friends = Friends::new().await;
    let chunk = noise(1000);
    Shelf::new(friends.alice.group(), std::slice::from_ref(&chunk)).serve(&friends.alice);
    let target = Target::of(&friends.alice, &friends.bob).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    let mut talk = raw.dial(&target).await;
    talk.go_live(&mallory, Offer::default()).await;
    let ask = ChunkFrame::Ask { hashes: vec![hash(&chunk)] }.encode();
    let mut streams = Vec::new();
    for _ in 0..65 {
        let mut stream = talk.connection.open_stream(MAX_CHUNK_FRAME).await.expect("opens");
        stream.sender.send(ask.clone()).await.expect("sends");
        stream.sender.flush().await.expect("sends");
        streams.push(stream);
    }
    let mut last = streams.pop().expect("many");
    for stream in &mut streams {
        assert!(answer_of(stream).await.is_some());
    }
    let early = tokio::time::timeout(Duration::from_millis(300), last.receiver.recv()).await;
    assert!(early.is_err(), "{early:?}");
    streams.pop();
    assert!(answer_of(&mut last).await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_answer_is_given_up_for_others() {
    let friends = Friends::new().await;
    let chunks: Vec<_> = (0..20).map(|_| noise(1000)).collect();
    // slow enough that bob has asked both by the time alice has answered
    let pause = Duration::from_millis(200);
    Shelf { pause, ..Shelf::new(friends.alice.group(), &chunks) }.serve(&friends.alice);
    let target = Target::of(&friends.bob, &friends.alice).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&friends.alice).await;
    until(&friends.bob, "aware of mallory", |status| status.authors == 3).await;
    let mut talk = raw.dial(&target).await;
    talk.go_live(&mallory, Offer::default()).await;
    connected(&friends.bob, 2).await;
    let silent = async {
        let mut stream = talk.connection.accept_stream(MAX_CHUNK_FRAME).await.expect("bob asks");
        let question = answer_of(&mut stream).await;
        assert!(matches!(question, Some(ChunkFrame::Ask { .. })), "{question:?}");
        while answer_of(&mut stream).await.is_some() {}
    };
    let wants = chunks.iter().map(|chunk| want(chunk)).collect();
    let (got, ()) = tokio::join!(fetch(&friends.bob, wants), silent);
    assert_all(&got, &chunks);
    assert_eq!(refused(&friends.bob).await, 0, "silence is no lie");
}
