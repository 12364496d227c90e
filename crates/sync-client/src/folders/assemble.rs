//! Puts files together from chunks: what is at hand is copied, the rest fetched; whole files take their place in batches.
//!
//! Three things run at once: one asks for chunks and hands them on as they come, another, a thread, writes them, and a third
//! syncs, places and commits the files that are whole while the next ones are written.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as threads};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use sync_folder::apply::{Applier, ApplyError, Check, Incoming, Ready};
use sync_folder::cut::read_chunk;
use sync_link::frame::Bytes;
use sync_store::{ChunkPlace, StoreError};
use sync_types::bounds::MAX_CHUNK;
use sync_types::folder::{ChunkRef, Chunks, FileContent, Node, TreePath, decode_chunks, total};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::apply::FolderDesk;
use super::carry::{self, Job, Whole};
use super::engine::Folder;
use super::rows::{self, LIST_OFFSET};
use crate::chunks::{FetchQueue, Fetched, Want};

/// Files under way: each holds a descriptor.
const FILES: usize = 512;
/// Pieces on their way to the thread that writes.
const PIECES: usize = 256;
/// Pieces copied from other files that wait to be written: each may be a whole chunk.
const COPIED: usize = 8;
/// Chunks looked up in the index at once.
const LOOKED_UP: usize = 512;
/// Places tried for one chunk.
const PLACES: usize = 3;
/// Files that take their place with one sync.
const BATCH: usize = 512;
/// Bytes of files that take their place with one sync.
const BATCH_BYTES: u64 = 64 << 20;
/// Bytes from which a file that was being received is taken up again after an interruption.
const RESUMED: u64 = 4 << 20;
/// How long a file that is whole waits for others to be synced with, while others are still to come.
const GATHER: Duration = Duration::from_millis(10);

/// The name under which a file is received, by which it is taken up again; none for what is received in a moment.
fn resumed_name(job: &Job) -> Option<String> {
    match &job.take.node {
        Node::File(file) => resumed_as(&job.path, file),
        _ => None,
    }
}

/// The name under which a file is received at a path, if it is one that is taken up again.
pub(crate) fn resumed_as(path: &TreePath, file: &FileContent) -> Option<String> {
    let mut hasher = blake3::Hasher::new_derive_key("syncshell v1 incoming");
    hasher.update(&file.hash).update(path.as_str().as_bytes());
    (file.size >= RESUMED).then(|| hasher.finalize().to_hex()[..32].to_owned())
}

/// What the writing half is told.
enum Message {
    /// Expect so many pieces of a file.
    Begin {
        job: usize,
        pieces: usize,
        chunks: Vec<rows::ChunkRow>,
        _file: OwnedSemaphorePermit,
    },
    Piece {
        job: usize,
        offset: u64,
        bytes: Piece,
    },
    /// A piece of a file cannot be had.
    Failed {
        job: usize,
    },
}

enum Piece {
    Fetched(Arc<Fetched>),
    Copied(Vec<u8>, #[expect(dead_code, reason = "gives room when it is dropped")] OwnedSemaphorePermit),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Fetched(fetched) => fetched.bytes.as_deref().unwrap_or_default(),
            Self::Copied(bytes, _) => bytes,
        }
    }
}

/// Who waits for a chunk: files, with the place in each.
type Waiting = HashMap<[u8; 32], Vec<(usize, u64)>>;

/// Receives files; how many are left for another time.
pub(crate) async fn run(
    folder: &Arc<Folder>,
    applier: &Arc<Applier>,
    queue: &FetchQueue,
    fetched: &mut mpsc::Receiver<Fetched>,
    jobs: Vec<Job>,
) -> Result<usize, StoreError> {
    let jobs = Arc::new(jobs);
    let (send, messages) = mpsc::channel(PIECES);
    let writing = {
        let (folder, applier, jobs, handle) = (folder.clone(), applier.clone(), jobs.clone(), Handle::current());
        tokio::task::spawn_blocking(move || {
            std::thread::scope(|threads| Writer::new(&folder, &applier, &jobs, &handle, threads).run(messages))
        })
    };
    let waiting: Mutex<Waiting> = Mutex::default();
    let outstanding = AtomicUsize::new(0);
    let asked_all = tokio::sync::Notify::new();
    let over = CancellationToken::new();
    let asker = Asker {
        folder,
        applier,
        queue,
        jobs: &jobs,
        send: &send,
        waiting: &waiting,
        outstanding: &outstanding,
        over: &over,
    };
    let asking = async {
        let done = asker.run().await;
        asked_all.notify_one();
        done
    };
    let handing = async {
        let _over = over.clone().drop_guard();
        let mut all = false;
        let mut answers = Vec::new();
        while !(all && outstanding.load(Ordering::Acquire) == 0) {
            tokio::select! {
                // what was answered together is handed on together, which wakes the writing half once
                received = fetched.recv_many(&mut answers, PIECES) => if received == 0 { return },
                () = asked_all.notified(), if !all => all = true,
                () = folder.cancel.cancelled() => return,
            }
            for chunk in answers.drain(..) {
                let who = lock(&waiting).remove(&chunk.hash).unwrap_or_default();
                if who.is_empty() {
                    continue;
                }
                outstanding.fetch_sub(1, Ordering::AcqRel);
                let len = chunk.bytes.as_ref().map_or(0, Bytes::len) as u64;
                folder.counters.fetched.fetch_add(len, Ordering::Relaxed);
                let chunk = Arc::new(chunk);
                for (job, offset) in who {
                    let message = match chunk.bytes {
                        Some(_) => Message::Piece { job, offset, bytes: Piece::Fetched(chunk.clone()) },
                        None => Message::Failed { job },
                    };
                    if send.send(message).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let (asked, ()) = tokio::join!(asking, handing);
    drop(send);
    let left = writing.await.map_err(|_| StoreError::Closed)??;
    Ok(left + asked?)
}

/// What comes within some time, on a thread that may block; no timer of the runtime's is set for it.
fn recv_within(messages: &mut mpsc::Receiver<Message>, most: Duration) -> Option<Option<Message>> {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let until = Instant::now() + most;
    loop {
        if let Poll::Ready(message) = messages.poll_recv(&mut Context::from_waker(&waker)) {
            return Some(message);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        std::thread::park_timeout(left);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The half that asks.
struct Asker<'a> {
    folder: &'a Arc<Folder>,
    applier: &'a Arc<Applier>,
    queue: &'a FetchQueue,
    jobs: &'a Arc<Vec<Job>>,
    send: &'a mpsc::Sender<Message>,
    waiting: &'a Mutex<Waiting>,
    outstanding: &'a AtomicUsize,
    /// Nothing is handed on any more.
    over: &'a CancellationToken,
}

/// A chunk of a file, and where it is known to lie.
struct Needed {
    job: usize,
    hash: [u8; 32],
    offset: u64,
    len: u64,
    places: Vec<ChunkPlace>,
}

impl Asker<'_> {
    /// Asks for everything; how many files could not be begun.
    async fn run(&self) -> Result<usize, StoreError> {
        let files = Arc::new(Semaphore::new(FILES));
        let copied = Arc::new(Semaphore::new(COPIED));
        let mut left = 0;
        let mut needed: Vec<Needed> = Vec::new();
        for (at, job) in self.jobs.iter().enumerate() {
            let Node::File(content) = &job.take.node else { continue };
            if self.folder.cancel.is_cancelled() {
                return Ok(left + 1);
            }
            let list = match &content.chunks {
                Chunks::Listed(pieces) => match list(self.folder, pieces, content.size).await? {
                    Some(list) => Some(list),
                    None => {
                        left += 1;
                        self.folder.set_unapplied(&job.path, Some(NOT_FOUND.to_owned()));
                        continue;
                    }
                },
                _ => None,
            };
            let file = match files.clone().try_acquire_owned() {
                Ok(file) => file,
                Err(_) => {
                    // what those under way still need is asked for before waiting for them
                    self.ask(std::mem::take(&mut needed), &copied).await?;
                    let file = tokio::select! {
                        file = files.clone().acquire_owned() => file,
                        // nothing arrives any more that could make room
                        () = self.over.cancelled() => return Ok(left + 1),
                    };
                    file.map_err(|_| StoreError::Closed)?
                }
            };
            let chunks = rows::chunk_rows(content, list.as_deref());
            let mut pieces: Vec<_> = chunks.iter().filter(|(_, offset, _)| *offset < LIST_OFFSET).copied().collect();
            if let Some(name) = resumed_name(job) {
                pieces = self.lacking(name, job.size(), pieces).await;
            }
            let begin = Message::Begin { job: at, pieces: pieces.len(), chunks, _file: file };
            if self.send.send(begin).await.is_err() {
                return Ok(left + 1);
            }
            for (hash, offset, len) in pieces {
                needed.push(Needed { job: at, hash, offset, len, places: Vec::new() });
                if needed.len() >= LOOKED_UP {
                    self.ask(std::mem::take(&mut needed), &copied).await?;
                }
            }
        }
        self.ask(needed, &copied).await?;
        Ok(left)
    }

    /// The pieces that a file does not hold yet which was being received before.
    async fn lacking(&self, name: String, size: u64, pieces: Vec<rows::ChunkRow>) -> Vec<rows::ChunkRow> {
        let (applier, folder) = (self.applier.clone(), self.folder.clone());
        let all = pieces.clone();
        let looking = tokio::task::spawn_blocking(move || {
            let Ok(incoming) = applier.reopen(&name) else { return pieces };
            if incoming.size() != size {
                return pieces;
            }
            let lacks = |(hash, offset, len): &rows::ChunkRow| {
                let holds = incoming.holds(*offset, *len, hash).unwrap_or(false);
                if holds {
                    folder.counters.reused.fetch_add(*len, Ordering::Relaxed);
                }
                !holds
            };
            pieces.into_iter().filter(lacks).collect()
        });
        looking.await.unwrap_or(all)
    }

    /// Copies what is at hand, and has the rest fetched.
    async fn ask(&self, needed: Vec<Needed>, copied: &Arc<Semaphore>) -> Result<(), StoreError> {
        let group = self.folder.group.id;
        let look = self.folder.store().read(move |reader| {
            let mut needed = needed;
            for chunk in &mut needed {
                chunk.places = reader.chunk_places(&group, &chunk.hash, PLACES)?;
                chunk.places.retain(|place| place.offset < LIST_OFFSET && place.len == chunk.len);
            }
            Ok(needed)
        });
        for chunk in look.await? {
            if !chunk.places.is_empty() && self.copy(&chunk, copied).await {
                continue;
            }
            if !self.fetch(chunk).await {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Copies a chunk from a file of this device; false if it does not lie there any more.
    async fn copy(&self, chunk: &Needed, copied: &Arc<Semaphore>) -> bool {
        let Ok(room) = copied.clone().acquire_owned().await else { return false };
        let (places, hash, fid) = (chunk.places.clone(), chunk.hash, self.folder.fid);
        let applier = self.applier.clone();
        let reading = tokio::task::spawn_blocking(move || {
            // only this folder's root is at hand here; the others are served to us as by a peer
            places.iter().filter(|place| place.fid == fid).find_map(|place| {
                let path = TreePath::from_key(&place.key)?;
                read_chunk(applier.root(), &path, place.offset, place.len, &hash).ok().flatten()
            })
        });
        let Ok(Some(bytes)) = reading.await else { return false };
        self.folder.counters.reused.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let bytes = Piece::Copied(bytes, room);
        self.send.send(Message::Piece { job: chunk.job, offset: chunk.offset, bytes }).await.is_ok()
    }

    /// Has a chunk fetched; false if nobody takes what is fetched.
    async fn fetch(&self, chunk: Needed) -> bool {
        let new = {
            let mut waiting = lock(self.waiting);
            let who = waiting.entry(chunk.hash).or_default();
            who.push((chunk.job, chunk.offset));
            who.len() == 1
        };
        if !new {
            return true;
        }
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        let Ok(len) = u32::try_from(chunk.len) else { return false };
        tokio::select! {
            pushed = self.queue.push(Want { hash: chunk.hash, len }) => pushed,
            () = self.folder.cancel.cancelled() => false,
        }
    }
}

/// The list of a file's chunks: made again from a device's files.
async fn list(folder: &Folder, pieces: &[ChunkRef], size: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let (queue, mut fetched) = crate::chunks::ChunkFetcher::new(folder.group.clone());
    let mut list = Vec::new();
    for piece in pieces {
        let (Some(hash), Ok(len)) = (piece.hash, u32::try_from(piece.len)) else { return Ok(None) };
        if list.len() as u64 + piece.len > MAX_LIST || !queue.push(Want { hash, len }).await {
            return Ok(None);
        }
        let answer = tokio::select! {
            answer = fetched.recv() => answer,
            () = folder.cancel.cancelled() => None,
        };
        let Some(bytes) = answer.and_then(|answer| answer.bytes.clone()) else { return Ok(None) };
        list.extend_from_slice(&bytes);
    }
    let sound = decode_chunks(&list).is_ok_and(|chunks| total(&chunks) == Some(size));
    Ok(sound.then_some(list))
}

/// Receives one file for itself, to be kept or put somewhere; none if no device that is connected has all of it.
pub(crate) async fn receive(
    folder: &Folder,
    applier: &Arc<Applier>,
    content: &FileContent,
    mode: u32,
    mtime: i64,
) -> Result<Option<(Ready, Vec<rows::ChunkRow>)>, ReceiveError> {
    let listed = match &content.chunks {
        Chunks::Listed(pieces) => match list(folder, pieces, content.size).await? {
            None => return Ok(None),
            listed => listed,
        },
        _ => None,
    };
    let chunks = rows::chunk_rows(content, listed.as_deref());
    let mut places: HashMap<[u8; 32], Vec<u64>> = HashMap::new();
    let mut wants = Vec::new();
    for (hash, offset, len) in chunks.iter().filter(|(_, offset, _)| *offset < LIST_OFFSET) {
        let at = places.entry(*hash).or_default();
        if at.is_empty() {
            wants.push(Want { hash: *hash, len: u32::try_from(*len).map_err(|_| ApplyError::Mismatch)? });
        }
        at.push(*offset);
    }
    applier.room(content.size)?;
    let incoming = Arc::new(applier.receive(content.size)?);
    let (queue, mut fetched) = crate::chunks::ChunkFetcher::new(folder.group.clone());
    let (mut asked, mut arrived) = (0, 0);
    while arrived < wants.len() {
        while asked < wants.len() && asked - arrived < ASKED_AHEAD {
            if !queue.push(wants[asked]).await {
                break;
            }
            asked += 1;
        }
        let answer = tokio::select! {
            answer = fetched.recv() => answer,
            () = folder.cancel.cancelled() => None,
        };
        let found = answer.and_then(|answer| Some((places.get(&answer.hash)?.clone(), answer)));
        let Some((offsets, answer)) = found.filter(|(_, answer)| answer.bytes.is_some()) else {
            return Ok(None);
        };
        arrived += 1;
        let incoming = incoming.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let bytes = answer.bytes.as_deref().unwrap_or_default();
            offsets.iter().try_for_each(|offset| incoming.write_at(*offset, bytes))
        });
        writing.await.map_err(|_| StoreError::Closed)??;
    }
    let (applier, hash) = (applier.clone(), content.hash);
    let finishing = tokio::task::spawn_blocking(move || {
        let incoming = Arc::into_inner(incoming).ok_or(ApplyError::Changed)?;
        let ready = incoming.finish(Check::Blake3(hash), mode, mtime)?;
        applier.sync(std::slice::from_ref(&ready)).map(|()| ready)
    });
    let ready = finishing.await.map_err(|_| StoreError::Closed)??;
    Ok(Some((ready, chunks)))
}

/// Why a file could not be received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Chunks of one file that are asked for before the first of them has come.
const ASKED_AHEAD: usize = 32;
/// Bytes of the longest list of chunks that is taken: a file of some terabytes.
const MAX_LIST: u64 = 64 * MAX_CHUNK;
/// What is said of a file that nobody connected holds.
const NOT_FOUND: &str = "no device that is connected has its content; it comes when one is";

/// A file under way.
struct Receiving {
    incoming: Incoming,
    missing: usize,
    chunks: Vec<rows::ChunkRow>,
    seen: Seen,
    /// Room for its descriptor.
    _file: OwnedSemaphorePermit,
}

/// What is known of a file's hash while it comes.
enum Seen {
    /// It is its only chunk's, with which that was compared when it came.
    Whole,
    /// Of what has come, up to a place.
    InOrder(Box<blake3::Hasher>, u64),
    /// Something came out of order: all of it is read again.
    OutOfOrder,
}

/// The half that writes.
struct Writer<'scope, 'a> {
    folder: &'a Arc<Folder>,
    applier: &'a Applier,
    jobs: &'a [Job],
    handle: &'a Handle,
    threads: &'scope Scope<'scope, 'a>,
    under_way: HashMap<usize, Receiving>,
    failed: BTreeSet<usize>,
    whole: Vec<Whole<'a, Ready>>,
    whole_bytes: u64,
    /// Files that are whole, or will not be.
    settled: usize,
    left: usize,
    placing: Option<Placing<'scope, 'a>>,
}

/// The thread that gives whole files their places while further ones are written.
struct Placing<'scope, 'a> {
    batches: threads::SyncSender<Vec<Whole<'a, Ready>>>,
    left: ScopedJoinHandle<'scope, Result<usize, StoreError>>,
}

impl Placing<'_, '_> {
    /// Waits for what was handed over.
    fn end(self) -> Result<usize, StoreError> {
        drop(self.batches);
        self.left.join().unwrap_or(Err(StoreError::Closed))
    }
}

impl<'scope, 'a> Writer<'scope, 'a> {
    fn new(
        folder: &'a Arc<Folder>,
        applier: &'a Applier,
        jobs: &'a [Job],
        handle: &'a Handle,
        threads: &'scope Scope<'scope, 'a>,
    ) -> Self {
        Self {
            folder,
            applier,
            jobs,
            handle,
            threads,
            under_way: HashMap::new(),
            failed: BTreeSet::new(),
            whole: Vec::new(),
            whole_bytes: 0,
            settled: 0,
            left: 0,
            placing: None,
        }
    }

    fn run(mut self, mut messages: mpsc::Receiver<Message>) -> Result<usize, StoreError> {
        loop {
            let next = match messages.try_recv() {
                Ok(message) => Some(message),
                Err(mpsc::error::TryRecvError::Disconnected) => None,
                Err(mpsc::error::TryRecvError::Empty) if self.whole.is_empty() => messages.blocking_recv(),
                // with nothing else to come there is nothing to wait for
                Err(mpsc::error::TryRecvError::Empty) if self.settled >= self.jobs.len() => {
                    self.flush()?;
                    continue;
                }
                Err(mpsc::error::TryRecvError::Empty) => match recv_within(&mut messages, GATHER) {
                    Some(message) => message,
                    None => {
                        self.flush()?;
                        continue;
                    }
                },
            };
            let Some(message) = next else { break };
            self.take(message);
            if self.whole.len() >= BATCH || self.whole_bytes >= BATCH_BYTES {
                self.flush()?;
            }
        }
        self.flush()?;
        if let Some(placing) = self.placing.take() {
            self.left += placing.end()?;
        }
        self.left += self.under_way.len();
        for (job, receiving) in std::mem::take(&mut self.under_way) {
            self.discard(job, receiving.incoming);
        }
        Ok(self.left)
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Begin { job, pieces, chunks, _file: file } => self.begin(job, pieces, chunks, file),
            Message::Piece { job, offset, bytes } => self.piece(job, offset, bytes.bytes()),
            Message::Failed { job } => self.fail(job, NOT_FOUND.to_owned()),
        }
    }

    fn begin(&mut self, job: usize, missing: usize, chunks: Vec<rows::ChunkRow>, file: OwnedSemaphorePermit) {
        let Node::File(FileContent { size, hash, .. }) = &self.jobs[job].take.node else { return };
        let data = chunks.iter().filter(|(_, offset, _)| *offset < LIST_OFFSET).map(|(_, _, len)| len).sum();
        let receive = || match resumed_name(&self.jobs[job]) {
            Some(name) => self.applier.receive_as(&name, *size),
            None => self.applier.receive(*size),
        };
        match self.applier.room(data).and_then(|()| receive()) {
            Ok(incoming) => {
                let seen = match &chunks[..] {
                    [(chunk, 0, len)] if chunk == hash && len == size => Seen::Whole,
                    _ => Seen::InOrder(Box::default(), 0),
                };
                self.under_way.insert(job, Receiving { incoming, missing, chunks, seen, _file: file });
                if missing == 0 {
                    self.finish(job);
                }
            }
            Err(error) => self.fail(job, error.to_string()),
        }
    }

    fn piece(&mut self, job: usize, offset: u64, bytes: &[u8]) {
        let Some(receiving) = self.under_way.get_mut(&job) else { return };
        if let Err(error) = receiving.incoming.write_at(offset, bytes) {
            return self.fail(job, error.to_string());
        }
        match &mut receiving.seen {
            Seen::InOrder(hasher, at) if *at == offset => {
                hasher.update(bytes);
                *at += bytes.len() as u64;
            }
            Seen::InOrder(..) => receiving.seen = Seen::OutOfOrder,
            Seen::Whole | Seen::OutOfOrder => {}
        }
        receiving.missing -= 1;
        if receiving.missing == 0 {
            self.finish(job);
        }
    }

    fn finish(&mut self, at: usize) {
        let Some(Receiving { incoming, chunks, seen, .. }) = self.under_way.remove(&at) else { return };
        let job = &self.jobs[at];
        let Node::File(FileContent { size, hash, .. }) = &job.take.node else { return };
        let check = match seen {
            Seen::Whole => Check::Done,
            Seen::InOrder(hasher, end) if end == *size && hasher.finalize().as_bytes() == hash => Check::Done,
            _ => Check::Blake3(*hash),
        };
        match incoming.finish(check, job.take.mode, job.take.mtime) {
            Ok(ready) => {
                self.settled += 1;
                self.whole_bytes += size;
                self.whole.push(Whole { job, ready, chunks });
            }
            Err(error) => self.fail(at, error.to_string()),
        }
    }

    fn fail(&mut self, job: usize, problem: String) {
        if self.failed.insert(job) {
            self.settled += 1;
            self.left += 1;
            self.folder.set_unapplied(&self.jobs[job].path, Some(problem));
        }
        if let Some(receiving) = self.under_way.remove(&job) {
            self.discard(job, receiving.incoming);
        }
    }

    /// Removes what was received in part, unless it is taken up again.
    fn discard(&self, job: usize, incoming: Incoming) {
        if resumed_name(&self.jobs[job]).is_some() {
            return;
        }
        if let Err(error) = incoming.discard() {
            tracing::debug!(%error, "what was received in part stays until the next start");
        }
    }

    /// Has files made durable, given their place, and committed; the last ones at once, all others beside what follows.
    fn flush(&mut self) -> Result<(), StoreError> {
        if self.whole.is_empty() {
            return Ok(());
        }
        self.whole_bytes = 0;
        let whole = std::mem::take(&mut self.whole);
        let (folder, applier, handle) = (self.folder, self.applier, self.handle);
        let place = move |whole| carry::place_all(applier, &mut FolderDesk { folder, handle }, whole);
        if self.placing.is_none() && self.settled >= self.jobs.len() {
            self.left += place(whole)?;
            return Ok(());
        }
        let placing = self.placing.get_or_insert_with(|| {
            // with one batch under way and one that is gathered there are enough for both threads
            let (batches, ready) = threads::sync_channel(0);
            let left =
                self.threads.spawn(move || ready.into_iter().try_fold(0, |left, whole| Ok(left + place(whole)?)));
            Placing { batches, left }
        });
        if placing.batches.send(whole).is_err() {
            // it ended early, and says why
            let ended = self.placing.take().map_or(Ok(0), Placing::end);
            return ended.and(Err(StoreError::Closed));
        }
        Ok(())
    }
}
