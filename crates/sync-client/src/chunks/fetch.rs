//! Fetching chunks from every peer that is connected.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sync_link::frame::{Bytes, FrameError, FrameReceiver, FrameSender};
use sync_link::iroh_link::Connection;
use sync_types::bounds::{MAX_CHUNK_FRAME, MAX_CHUNKS_ASKED};
use sync_types::folder::ChunkFrame;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Want;
use super::schedule::Schedule;
use super::wire::Packed;
use crate::group::Group;

/// Wants that no source was given yet; more wait to be pushed.
const QUEUE: usize = 1024;
/// Chunks that wait to be taken.
const DELIVERED: usize = 1024;
/// Bytes of chunks that wait to be taken, or that the taker still holds.
const DELIVERED_BYTES: u32 = 16 << 20;
/// How often it is looked whether a peer that was asked sends anything.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that find nothing, after which a peer is left alone for a while and others are asked: longer than a disk
/// takes to start.
const LOOKS: usize = 15;
/// The same where another peer may have what it was asked for, and answers.
const LOOKS_ELSEWHERE: usize = 2;
/// How long a peer is left alone whose stream has ended.
const REST: Duration = Duration::from_secs(10);
/// How long wants wait while nobody is connected: a lost connection is back sooner.
const ALONE: Duration = Duration::from_secs(5);

/// What has become of a want.
#[derive(Debug)]
pub struct Fetched {
    /// The chunk's hash.
    pub hash: [u8; 32],
    /// Its bytes; none if no peer that is connected has it. It may be pushed again when others are.
    pub bytes: Option<Bytes>,
    /// Gives room for further ones when this is dropped.
    _room: Option<OwnedSemaphorePermit>,
}

/// Takes wants. Clones feed the same fetcher; once all are dropped it ends with what is under way.
#[derive(Debug, Clone)]
pub struct FetchQueue {
    shared: Arc<Shared>,
    out: mpsc::WeakSender<Fetched>,
    _open: Arc<DropGuard>,
}

impl FetchQueue {
    /// Adds a want, and waits while too many are queued. Each is answered once, however often it is pushed.
    ///
    /// False if nobody takes what is fetched any more. Cancel safe: dropped before it is ready, nothing was added.
    pub async fn push(&self, want: Want) -> bool {
        let Ok(place) = self.shared.places.acquire().await else { return false };
        if self.out.upgrade().is_none_or(|out| out.is_closed()) {
            return false;
        }
        place.forget();
        self.shared.change(|schedule| schedule.push(want));
        true
    }
}

#[derive(Debug)]
struct Shared {
    group: Arc<Group>,
    schedule: Mutex<Schedule>,
    /// Room for wants that no source was given yet.
    places: Semaphore,
    /// Room for chunks that were not taken yet.
    room: Arc<Semaphore>,
    /// Something was given up, or has nobody to go to.
    attention: Notify,
}

impl Shared {
    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the schedule, and sends on its way what can go.
    fn change(&self, change: impl FnOnce(&mut Schedule)) {
        let mut schedule = self.schedule();
        change(&mut schedule);
        self.places.add_permits(schedule.dispatch(Instant::now()));
        if schedule.needs_attention() {
            self.attention.notify_one();
        }
    }
}

pub(super) fn start(group: Arc<Group>) -> (FetchQueue, mpsc::Receiver<Fetched>) {
    let (out, fetched) = mpsc::channel(DELIVERED);
    let shared = Arc::new(Shared {
        group,
        schedule: Mutex::default(),
        places: Semaphore::new(QUEUE),
        room: Arc::new(Semaphore::new(DELIVERED_BYTES as usize)),
        attention: Notify::new(),
    });
    let open = CancellationToken::new();
    let queue = FetchQueue { shared: shared.clone(), out: out.downgrade(), _open: Arc::new(open.clone().drop_guard()) };
    tokio::spawn(run(shared, out, open));
    (queue, fetched)
}

/// Keeps a task for each source, and tells of wants that nobody has.
async fn run(shared: Arc<Shared>, out: mpsc::Sender<Fetched>, closing: CancellationToken) {
    tokio::select! {
        () = follow(&shared, &out, &closing) => {}
        () = out.closed() => {}
    }
    shared.places.close();
}

async fn follow(shared: &Arc<Shared>, out: &mpsc::Sender<Fetched>, closing: &CancellationToken) {
    let mut channels = shared.group.chunks.channels.subscribe();
    let mut tasks = JoinSet::new();
    let mut sources: HashMap<u64, DropGuard> = HashMap::new();
    let mut alone_since = None;
    loop {
        let now = channels.borrow_and_update().clone();
        sources.retain(|session, _| now.contains_key(session));
        for (session, connection) in now {
            sources.entry(session).or_insert_with(|| {
                let gone = CancellationToken::new();
                let source =
                    Source { shared: shared.clone(), session, connection, out: out.clone(), gone: gone.clone() };
                tasks.spawn(source.run());
                gone.drop_guard()
            });
        }
        let stranded = shared.schedule().is_stranded();
        let deadline = stranded.then(|| *alone_since.get_or_insert_with(Instant::now) + ALONE);
        if !stranded {
            alone_since = None;
        } else if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            shared.places.add_permits(shared.schedule().give_up());
        }
        loop {
            let Some(hash) = shared.schedule().pop_nowhere() else { break };
            if out.send(Fetched { hash, bytes: None, _room: None }).await.is_err() {
                return;
            }
        }
        if closing.is_cancelled() && shared.schedule().is_idle() {
            return;
        }
        let timeout = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = channels.changed() => if changed.is_err() { return },
            Some(_) = tasks.join_next() => {}
            () = shared.attention.notified() => {}
            () = closing.cancelled(), if !closing.is_cancelled() => {}
            () = timeout => {}
        }
    }
}

/// One peer that is asked.
struct Source {
    shared: Arc<Shared>,
    session: u64,
    connection: Connection,
    out: mpsc::Sender<Fetched>,
    /// The session is over, or this device does not believe the peer any more.
    gone: CancellationToken,
}

/// Why a stream ended.
enum Ended {
    /// There is nobody to tell or to ask.
    Gone,
    /// The peer sent what it cannot have been asked for.
    Lied(String),
    /// It may go on later.
    Paused(String),
    /// It was asked, and said nothing.
    Silent,
}

/// What an answer says.
enum Answer {
    Chunk(Bytes),
    Missing,
    /// A chunk of that hash has another length: whoever named the want was wrong, not who answers.
    Unlike,
    Lie(String),
}

impl Source {
    async fn run(self) {
        let mut was_silent = false;
        loop {
            let wake = Arc::new(Notify::new());
            self.shared.change(|schedule| schedule.up(self.session, wake.clone(), was_silent));
            let ended = self.converse(&wake).await;
            self.shared.change(|schedule| schedule.down(self.session));
            was_silent = matches!(ended, Ended::Silent);
            match ended {
                Ended::Gone => return,
                Ended::Lied(reason) => {
                    tracing::debug!(%reason, "peer is asked for no more chunks");
                    self.shared.group.count_refused(1);
                    return self.shared.group.chunks.drop_channel(self.session);
                }
                Ended::Paused(reason) => tracing::debug!(%reason, "peer is asked for chunks later"),
                Ended::Silent => tracing::debug!("peer does not answer, and is asked for chunks later"),
            }
            tokio::select! {
                () = tokio::time::sleep(REST) => {}
                () = self.gone.cancelled() => return,
            }
        }
    }

    /// Asks and takes answers on one stream.
    async fn converse(&self, wake: &Notify) -> Ended {
        // the peer hears of the stream with the first frame, so that who is asked for nothing answers nowhere
        let opened = tokio::select! {
            opened = self.connection.open_stream(MAX_CHUNK_FRAME) => opened,
            () = self.gone.cancelled() => return Ended::Gone,
        };
        let (sender, receiver) = match opened {
            Ok(stream) => stream.split(),
            Err(reason) => return Ended::Paused(reason.to_string()),
        };
        tokio::select! {
            Err(error) = self.ask(sender, wake) => Ended::Paused(error.to_string()),
            ended = self.take_answers(receiver) => ended,
        }
    }

    /// Asks whenever there is something to ask for, until that fails.
    async fn ask(&self, mut sender: FrameSender, wake: &Notify) -> Result<Infallible, FrameError> {
        loop {
            let hashes = self.shared.schedule().take_asks(self.session, MAX_CHUNKS_ASKED);
            if hashes.is_empty() {
                sender.flush().await?;
                wake.notified().await;
            } else {
                sender.send(ChunkFrame::Ask { hashes }.encode()).await?;
            }
        }
    }

    async fn take_answers(&self, mut receiver: FrameReceiver) -> Ended {
        let pace = self.shared.group.chunks.paces().fetching;
        loop {
            let frame = tokio::select! {
                frame = self.next_frame(&mut receiver) => frame,
                () = self.gone.cancelled() => return Ended::Gone,
            };
            let frame = match frame {
                Ok(frame) => frame,
                Err(ended) => return ended,
            };
            let Some(want) = self.shared.schedule().awaited(self.session) else {
                return Ended::Lied("an answer to nothing".to_owned());
            };
            let len = frame.len();
            let bytes = match open(frame, &want) {
                Answer::Chunk(bytes) => Some(bytes),
                Answer::Unlike => None,
                Answer::Missing => {
                    self.shared.change(|schedule| schedule.missing(self.session));
                    continue;
                }
                Answer::Lie(reason) => return Ended::Lied(reason),
            };
            // before it is handed on, or the first chunk of every stream would come at once
            tokio::select! {
                () = pace.take(len) => {}
                () = self.gone.cancelled() => return Ended::Gone,
            }
            if !self.deliver(&want, bytes).await {
                return Ended::Gone;
            }
            // only now, so that whatever ends this before leaves the want to others
            self.shared.change(|schedule| schedule.answered(self.session, Instant::now()));
        }
    }

    /// The next frame, unless the peer was to send one and sends nothing.
    async fn next_frame(&self, receiver: &mut FrameReceiver) -> Result<Bytes, Ended> {
        let mut silent = 0;
        loop {
            let (awaited, before) = (self.shared.schedule().awaited(self.session), receiver.progress());
            match tokio::time::timeout(LOOK, receiver.recv()).await {
                Ok(Ok(Some(frame))) => return Ok(frame),
                Ok(Err(error @ FrameError::TooLong { .. })) => return Err(Ended::Lied(error.to_string())),
                Ok(Err(error)) => return Err(Ended::Paused(error.to_string())),
                Ok(Ok(None)) => return Err(Ended::Paused("peer answers no more".to_owned())),
                Err(_) if awaited.is_some() && receiver.progress() == before => silent += 1,
                Err(_) => silent = 0,
            }
            let is_elsewhere = self.shared.schedule().is_elsewhere(self.session, Instant::now());
            let most = if is_elsewhere { LOOKS_ELSEWHERE } else { LOOKS };
            if silent >= most {
                return Err(Ended::Silent);
            }
        }
    }

    /// Hands over what was fetched once there is room for it; false if nobody takes it.
    async fn deliver(&self, want: &Want, bytes: Option<Bytes>) -> bool {
        let len = bytes.as_ref().map_or(0, |_| want.len);
        let Ok(room) = self.shared.room.clone().acquire_many_owned(len).await else { return false };
        self.out.send(Fetched { hash: want.hash, bytes, _room: Some(room) }).await.is_ok()
    }
}

/// Opens an answer and compares it with what was asked for.
fn open(frame: Bytes, want: &Want) -> Answer {
    let packed = match Packed::in_frame(&frame) {
        Some(packed) => packed,
        None => match ChunkFrame::decode(&frame) {
            Ok(ChunkFrame::Missing) => return Answer::Missing,
            Ok(ChunkFrame::Chunk { codec, len, bytes }) => Packed { codec, len, bytes: bytes.into() },
            Ok(_) => return Answer::Lie("a question for an answer".to_owned()),
            Err(error) => return Answer::Lie(error.to_string()),
        },
    };
    let len = packed.len as usize;
    let bytes = match packed.codec {
        0 => packed.bytes,
        _ => match lz4_flex::block::decompress(&packed.bytes, len) {
            Ok(bytes) => bytes.into(),
            Err(error) => return Answer::Lie(error.to_string()),
        },
    };
    if bytes.len() != len {
        return Answer::Lie("a chunk of another length than was said".to_owned());
    }
    if *blake3::hash(&bytes).as_bytes() != want.hash {
        return Answer::Lie("other bytes than were asked for".to_owned());
    }
    if packed.len == want.len { Answer::Chunk(bytes) } else { Answer::Unlike }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(codec: u8, len: u32, bytes: &[u8]) -> Bytes {
        ChunkFrame::Chunk { codec, len, bytes: bytes.to_vec() }.encode().into()
    }

    #[test]
    fn an_answer_is_the_chunk_or_is_told_from_it() {
        let plain = b"again and again and again and again and again and again and again".to_vec();
        let packed = lz4_flex::block::compress(&plain);
        let len = u32::try_from(plain.len()).expect("short");
        let want = Want { hash: *blake3::hash(&plain).as_bytes(), len };
        for frame in [chunk(0, len, &plain), chunk(1, len, &packed)] {
            assert!(matches!(open(frame.clone(), &want), Answer::Chunk(bytes) if bytes == plain));
            assert!(matches!(open(frame.clone(), &Want { len: len + 1, ..want }), Answer::Unlike));
            assert!(matches!(open(frame.clone(), &Want { hash: [1; 32], ..want }), Answer::Lie(_)));
        }
        assert!(matches!(open(ChunkFrame::Missing.encode().into(), &want), Answer::Missing));
        let lies = [
            chunk(0, len - 1, &plain),
            chunk(0, len + 1, &plain),
            chunk(1, len - 1, &packed),
            chunk(1, len + 1, &packed),
            chunk(1, len, &plain),
            chunk(1, len, &[]),
            chunk(1, 4 << 20, &[0xff; 100]),
            chunk(0, 0, &[]),
            ChunkFrame::Ask { hashes: vec![want.hash] }.encode().into(),
            Bytes::new(),
        ];
        for lie in lies {
            assert!(matches!(open(lie.clone(), &want), Answer::Lie(_)), "{lie:02x?}");
        }
    }
}
