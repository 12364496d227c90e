//! Drives a sync session over a channel: frames in and out, storing and reading beside them.
//!
//! Storing is one lane and reading another, each in order; sending is a third, so that two peers that both send much
//! never wait for each other. What is read for a peer that does not take it stays in the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sync_core::session::{
    Close, Config, Effect, Ends, Reply, Report, Session, Side, WINDOW, hello_statement, shown_to_blind,
};
use sync_link::frame::{Bytes, FrameError, FrameReceiver, FrameSender, FrameStream};
use sync_link::iroh_link::Connection;
use sync_link::relay::{PING_AFTER, RelayConnection, RelayError, RelayReceiver, RelaySender};
use sync_types::{ErrorCode, Frame};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::exec::Arrival;
use crate::group::Group;
use crate::keys::draw;

/// Name of the sync protocol in the connection handshake.
pub(crate) const SYNC_ALPN: &[u8] = b"syncshell/sync/1";
/// Label under which a session's channel binding is exported.
const EXPORT_LABEL: &[u8] = b"syncshell sync v1";
/// Frames waiting to be sent: a session has at most its window of them under way, each acknowledged by one.
const OUTBOX: usize = 16_384;
/// Bytes waiting to be sent before more is read: as much as may be under way, so that only who asks and does not read
/// ever waits for it.
const OUTBOX_BYTES: usize = WINDOW;
/// Effects waiting in a lane; a session starts no more than this before it hears back.
const LANE: usize = 64;
/// Error code with which a channel is closed once a session has said why, whatever it was.
pub(crate) const CLOSE_DONE: u32 = 0;

/// How the shell is told what becomes of a session.
pub(crate) type Progress = mpsc::Sender<Report>;

/// The direction of a channel towards the peer.
pub(crate) trait SendFrames: Send + 'static {
    /// Queues a frame; an error ends the channel.
    fn send(&mut self, frame: Vec<u8>) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Sends what is queued.
    fn flush(&mut self) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Says something where the channel would otherwise be silent for long.
    fn keep_alive(&mut self) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Ends the direction, once all of it has arrived.
    fn finish(self) -> impl Future<Output = ()> + Send;
}

/// The direction of a channel from the peer.
pub(crate) trait ReceiveFrames: Send {
    /// The next frame; none at the end. Cancel safe.
    fn recv(&mut self) -> impl Future<Output = Result<Option<Bytes>, Broken>> + Send;
}

/// Nothing more can be sent.
#[derive(Debug)]
pub(crate) struct Gone;

/// Nothing more can be received.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The peer sent what it must not.
    Malformed(String),
    /// The channel was lost.
    Lost(String),
}

impl SendFrames for FrameSender {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), Gone> {
        Self::send(self, frame).await.map_err(|_| Gone)
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        Self::flush(self).await.map_err(|_| Gone)
    }

    /// The connection does that by itself.
    async fn keep_alive(&mut self) -> Result<(), Gone> {
        Ok(())
    }

    async fn finish(mut self) {
        if Self::finish(&mut self).await.is_ok() {
            let _ = self.delivered().await;
        }
    }
}

impl ReceiveFrames for FrameReceiver {
    async fn recv(&mut self) -> Result<Option<Bytes>, Broken> {
        Self::recv(self).await.map_err(|error| match error {
            FrameError::TooLong { .. } | FrameError::Truncated => Broken::Malformed(error.to_string()),
            error => Broken::Lost(error.to_string()),
        })
    }
}

impl SendFrames for RelaySender {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), Gone> {
        Self::send(self, &frame).await.map_err(|_| Gone)
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        Self::flush(self).await.map_err(|_| Gone)
    }

    async fn keep_alive(&mut self) -> Result<(), Gone> {
        self.ping().await.map_err(|_| Gone)
    }

    async fn finish(mut self) {
        // it may be gone already
        let _ = self.close().await;
    }
}

impl ReceiveFrames for RelayReceiver {
    async fn recv(&mut self) -> Result<Option<Bytes>, Broken> {
        Self::recv(self).await.map_err(|error| match error {
            RelayError::Noise(error) => Broken::Malformed(error.to_string()),
            error => Broken::Lost(error.to_string()),
        })
    }
}

/// Runs a session with another device until it ends; `first` is a frame that was read already.
pub(crate) async fn run(
    group: &Arc<Group>,
    connection: &Connection,
    stream: FrameStream,
    side: Side,
    first: Option<Frame>,
    progress: Progress,
    cancel: &CancellationToken,
) -> Close {
    let config = match configure(group, connection, side) {
        Ok(config) => config,
        Err(text) => return ended(ErrorCode::Unavailable, text),
    };
    let close =
        converse(group, config, stream.split(), Frames { said: None, heard: first, wake: None }, progress, cancel)
            .await;
    connection.close(CLOSE_DONE, &close.text);
    close
}

/// Runs a session with a relay until it ends.
pub(crate) async fn run_with_relay(
    group: &Arc<Group>,
    connection: RelayConnection,
    shown: Shown<'_>,
    progress: Progress,
    cancel: &CancellationToken,
) -> Close {
    let (charter, config) = match configure_for_relay(group, &connection).await {
        Ok(configured) => configured,
        Err(text) => return ended(ErrorCode::Unavailable, text),
    };
    let registration = shown.registration.as_bytes().to_vec();
    let said = Some(Frame::Charter { charter, registration, pass: shown.pass });
    let channel = (connection.sender, connection.receiver);
    let wake = Some(group.shared().wake.subscribe());
    converse(group, config, channel, Frames { said, heard: None, wake }, progress, cancel).await
}

/// What a relay is shown beside the group.
pub(crate) struct Shown<'a> {
    /// The operator's token; empty for none.
    pub(crate) registration: &'a str,
    /// What this device will show where connections begin.
    pub(crate) pass: Option<[u8; 16]>,
}

/// What goes before a session's own frames.
struct Frames {
    /// Sent first.
    said: Option<Frame>,
    /// Read already.
    heard: Option<Frame>,
    /// Said to a relay once the session is established, and again when it changes.
    wake: Option<watch::Receiver<String>>,
}

async fn converse<S: SendFrames, R: ReceiveFrames>(
    group: &Arc<Group>,
    config: Config,
    (sender, receiver): (S, R),
    Frames { said, heard, wake }: Frames,
    progress: Progress,
    cancel: &CancellationToken,
) -> Close {
    let mut tasks = JoinSet::new();
    let (frames, waiting) = mpsc::channel(OUTBOX);
    let queued = Arc::new(Queued::default());
    tasks.spawn(send_frames(sender, waiting, queued.clone()));
    let (stored, replies) = mpsc::channel(LANE);
    let (store, jobs) = mpsc::channel(LANE);
    tasks.spawn(store_lane(group.clone(), jobs, stored));
    // one answer at a time: each may be a megabyte
    let (answers, answered) = mpsc::channel(1);
    let (read, jobs) = mpsc::channel(LANE);
    tasks.spawn(lane(group.clone(), jobs, answers));
    let (acknowledged, newest) = watch::channel(None);
    tasks.spawn(note_acknowledged(group.clone(), newest));
    let out = Outbox { frames, queued };
    // there is room for one
    let _ = said.is_none_or(|frame| out.put(&frame));
    let session = Session::new(config);
    let driver = Driver { group, session, established: false, wake, out, store, read, acknowledged, progress };
    let close = driver.drive(receiver, Replies { stored: replies, answered }, heard, cancel).await;
    if !close.by_peer && close.code != ErrorCode::Unavailable {
        group.count_refused(1);
        tracing::debug!(reason = %close.text, "peer refused");
    }
    // lanes end with the driver; what is still to be sent, an ERROR for instance, gets a moment
    let _ = tokio::time::timeout(FAREWELL, async { while tasks.join_next().await.is_some() {} }).await;
    close
}

/// Time between two notes of what a peer holds: each costs a commit, which what is arriving needs more.
const ACKNOWLEDGED_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);
/// Time for the last frames to leave: more is not worth waiting for a peer that is gone.
pub(crate) const FAREWELL: std::time::Duration = std::time::Duration::from_millis(500);

fn configure(group: &Group, connection: &Connection, side: Side) -> Result<Config, String> {
    let binding = connection.export(EXPORT_LABEL, &group.id.0).map_err(|error| error.to_string())?;
    let author = group.author();
    let replica = group.replica();
    let statement = hello_statement(&binding, side, &group.id, &replica);
    let secret = author.secret();
    let token =
        group.membership().token(&secret.id()).ok_or("this device is not a member, or its chain is too long")?;
    Ok(Config {
        side,
        ends: Ends::Members,
        group: group.id,
        author: secret.id(),
        replica,
        token,
        binding,
        proof: secret.sign(sync_crypto::SignPurpose::Hello, &[&statement]),
        name: group.device_name(),
        addresses: group.own_addresses(),
        incarnation: group.shared().incarnation,
    })
}

/// The charter to show a relay, and a session that tells it nothing that links this group with another or with a device.
async fn configure_for_relay(group: &Group, connection: &RelayConnection) -> Result<(Vec<u8>, Config), String> {
    let id = group.id;
    let row = group.store().read(move |reader| reader.group(&id)).await.map_err(|error| error.to_string())?;
    let author = group.author();
    let secret = author.secret();
    let replica = shown_to_blind(&group.replica(), &group.id, &connection.key);
    let statement = hello_statement(&connection.binding, Side::Dialler, &group.id, &replica);
    let token =
        group.membership().token(&secret.id()).ok_or("this device is not a member, or its chain is too long")?;
    let config = Config {
        side: Side::Dialler,
        ends: Ends::ToBlind(connection.key),
        group: group.id,
        author: secret.id(),
        replica,
        token,
        binding: connection.binding,
        proof: secret.sign(sync_crypto::SignPurpose::Hello, &[&statement]),
        name: String::new(),
        addresses: Vec::new(),
        incarnation: draw(&group.shared().rng),
    };
    Ok((row.charter, config))
}

fn ended(code: ErrorCode, text: impl Into<String>) -> Close {
    Close { code, text: text.into(), by_peer: false }
}

/// Frames on their way to the peer.
struct Outbox {
    frames: mpsc::Sender<Vec<u8>>,
    queued: Arc<Queued>,
}

/// Bytes that wait to be sent.
#[derive(Default)]
struct Queued {
    bytes: AtomicUsize,
    less: Notify,
}

impl Outbox {
    /// Queues a frame; false if the peer leaves too many unread.
    fn put(&self, frame: &Frame) -> bool {
        let bytes = frame.encode();
        self.queued.bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        self.frames.try_send(bytes).is_ok()
    }

    fn has_room(&self) -> bool {
        self.queued.bytes.load(Ordering::Relaxed) < OUTBOX_BYTES
    }
}

/// Sends frames as they come, and flushes when none waits.
async fn send_frames(mut sender: impl SendFrames, mut frames: mpsc::Receiver<Vec<u8>>, queued: Arc<Queued>) {
    loop {
        let Ok(frame) = tokio::time::timeout(PING_AFTER, frames.recv()).await else {
            match sender.keep_alive().await {
                Ok(()) => continue,
                Err(Gone) => return,
            }
        };
        let Some(frame) = frame else { break };
        let mut next = Some(frame);
        while let Some(frame) = next {
            let len = frame.len();
            if sender.send(frame).await.is_err() {
                return;
            }
            queued.bytes.fetch_sub(len, Ordering::Relaxed);
            queued.less.notify_one();
            next = frames.try_recv().ok();
        }
        if sender.flush().await.is_err() {
            return;
        }
    }
    sender.finish().await;
}

/// Notes what a peer holds; of several acknowledgements that wait the last says it all.
async fn note_acknowledged(group: Arc<Group>, mut newest: watch::Receiver<Option<Effect>>) {
    while newest.changed().await.is_ok() {
        let effect = newest.borrow_and_update().clone();
        if let Some(effect) = effect {
            group.execute(effect).await;
            tokio::time::sleep(ACKNOWLEDGED_PAUSE).await;
        }
    }
}

/// Stores arrivals in order, as many in one commit as came while the last one was made durable.
///
/// Nothing is stored after one that could not be: its position in the peer's log would claim what lacks.
async fn store_lane(group: Arc<Group>, mut jobs: mpsc::Receiver<(u64, Arrival)>, replies: mpsc::Sender<Reply>) {
    let mut arrivals = Vec::new();
    while jobs.recv_many(&mut arrivals, LANE).await > 0 {
        for reply in group.arrive(std::mem::take(&mut arrivals)).await {
            let failed = matches!(reply, Reply::Failed { .. });
            if replies.send(reply).await.is_err() {
                return;
            }
            if failed {
                // the session ends once it hears of it
                while jobs.recv().await.is_some() {}
            }
        }
    }
}

/// Carries out effects one after the other.
async fn lane(group: Arc<Group>, mut jobs: mpsc::Receiver<Effect>, replies: mpsc::Sender<Reply>) {
    while let Some(effect) = jobs.recv().await {
        if let Some(reply) = group.execute(effect).await
            && replies.send(reply).await.is_err()
        {
            return;
        }
    }
}

/// Returns once there is something else to say. Cancel safe.
async fn changed(wake: &mut Option<watch::Receiver<String>>) {
    let changed = match wake {
        Some(wake) => wake.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending().await
    }
}

struct Driver<'a> {
    group: &'a Arc<Group>,
    session: Session,
    established: bool,
    wake: Option<watch::Receiver<String>>,
    out: Outbox,
    store: mpsc::Sender<(u64, Arrival)>,
    read: mpsc::Sender<Effect>,
    acknowledged: watch::Sender<Option<Effect>>,
    progress: Progress,
}

/// What the lanes answer.
struct Replies {
    stored: mpsc::Receiver<Reply>,
    answered: mpsc::Receiver<Reply>,
}

impl Driver<'_> {
    async fn drive(
        mut self,
        mut receiver: impl ReceiveFrames,
        mut replies: Replies,
        first: Option<Frame>,
        cancel: &CancellationToken,
    ) -> Close {
        let mut newest = self.group.watch_newest();
        self.session.handle_newest(*newest.borrow_and_update());
        if let Some(frame) = first {
            self.session.handle_frame(frame);
        }
        loop {
            if let Some(close) = self.carry_out().await {
                return close;
            }
            tokio::select! {
                frame = receiver.recv(), if self.session.accepts_frames() => match frame {
                    Ok(Some(bytes)) => match Frame::decode(&bytes) {
                        Ok(frame) => self.session.handle_frame(frame),
                        Err(error) => return self.malformed(error.to_string()),
                    },
                    Err(Broken::Malformed(text)) => return self.malformed(text),
                    Ok(None) => return ended(ErrorCode::Unavailable, "the other end closed the channel"),
                    Err(Broken::Lost(text)) => return ended(ErrorCode::Unavailable, text),
                },
                Some(reply) = replies.stored.recv() => self.session.handle_reply(reply),
                Some(reply) = replies.answered.recv(), if self.out.has_room() => {
                    // what was read may be younger than a removal that this session has not heard of
                    self.session.handle_membership(&self.group.membership());
                    self.session.handle_reply(reply);
                }
                () = self.out.queued.less.notified(), if !self.out.has_room() => {}
                changed = newest.changed() => match changed {
                    Ok(()) => {
                        let newest = *newest.borrow_and_update();
                        self.session.handle_membership(&self.group.membership());
                        self.session.handle_newest(newest);
                    }
                    Err(_) => return ended(ErrorCode::Unavailable, "the database was closed"),
                },
                () = changed(&mut self.wake), if self.established => self.say_wake(),
                () = cancel.cancelled() => return ended(ErrorCode::Unavailable, "this device ended the session"),
            }
        }
    }

    /// Carries out what the session asks for; the reason once it ends.
    async fn carry_out(&mut self) -> Option<Close> {
        while let Some(effect) = self.session.poll_effect() {
            let taken = match effect {
                Effect::Send(frame) => self.out.put(&frame),
                Effect::Store { id, replica, batch, position } => {
                    self.store.try_send((id, Arrival { replica, batch, position })).is_ok()
                }
                Effect::Acknowledged { .. } => {
                    self.acknowledged.send_replace(Some(effect));
                    true
                }
                Effect::Report(report) => {
                    if matches!(report, Report::Established { .. }) {
                        self.established = true;
                        self.say_wake();
                    }
                    self.progress.send(report).await.is_ok()
                }
                Effect::Close(close) => return Some(close),
                effect => self.read.try_send(effect).is_ok(),
            };
            if !taken {
                return Some(ended(ErrorCode::Protocol, "the other device does not read what it is sent"));
            }
        }
        None
    }

    /// Tells a relay where this device is woken, and takes back what was told before where it is nowhere.
    fn say_wake(&mut self) {
        if let Some(wake) = &mut self.wake {
            let url = wake.borrow_and_update().clone();
            // where there is no room for it, the session ends for that soon
            let _ = self.out.put(&Frame::Wake { url });
        }
    }

    fn malformed(&self, text: String) -> Close {
        // where there is no room for it, the channel's end must do
        let _ = self.out.put(&Frame::error(ErrorCode::Protocol, &text));
        ended(ErrorCode::Protocol, text)
    }
}
