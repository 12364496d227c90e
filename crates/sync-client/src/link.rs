//! Drives a sync session over a channel: frames in and out, storing and reading beside them.
//!
//! Storing is one lane and reading another, each in order; sending is a third, so that two peers that both send much
//! never wait for each other.

use std::sync::Arc;

use sync_core::session::{Close, Config, Effect, Reply, Report, Session, Side, hello_statement};
use sync_link::frame::{FrameReceiver, FrameSender, FrameStream};
use sync_link::iroh_link::Connection;
use sync_types::{ErrorCode, Frame};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::group::Group;

/// Name of the sync protocol in the connection handshake.
pub(crate) const SYNC_ALPN: &[u8] = b"syncshell/sync/1";
/// Label under which a session's channel binding is exported.
const EXPORT_LABEL: &[u8] = b"syncshell sync v1";
/// Frames waiting to be sent: a session has at most its window of them under way, each acknowledged by one.
const OUTBOX: usize = 16_384;
/// Effects waiting in a lane; a session starts no more than this before it hears back.
const LANE: usize = 64;
/// Error code with which a channel is closed once a session has said why.
const CLOSE_DONE: u32 = 0;

/// How the shell is told what becomes of a session.
pub(crate) type Progress = mpsc::Sender<Report>;

/// Runs a session until it ends; `first` is a frame that was read already.
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
    let (sender, receiver) = stream.split();
    let mut tasks = JoinSet::new();
    let (out, frames) = mpsc::channel(OUTBOX);
    tasks.spawn(send_frames(sender, frames));
    let (replies_in, replies) = mpsc::channel(LANE);
    let (store, jobs) = mpsc::channel(LANE);
    tasks.spawn(lane(group.clone(), jobs, replies_in.clone()));
    let (read, jobs) = mpsc::channel(LANE);
    tasks.spawn(lane(group.clone(), jobs, replies_in));
    let driver = Driver { group, session: Session::new(config), out, store, read, progress };
    let close = driver.drive(receiver, replies, first, cancel).await;
    // lanes end with the driver; what is still to be sent, an ERROR for instance, gets a moment
    let _ = tokio::time::timeout(FAREWELL, async { while tasks.join_next().await.is_some() {} }).await;
    connection.close(CLOSE_DONE, &close.text);
    close
}

/// Time for the last frames to leave: more is not worth waiting for a peer that is gone.
const FAREWELL: std::time::Duration = std::time::Duration::from_millis(500);

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
        group: group.id,
        author: secret.id(),
        replica,
        token,
        binding,
        proof: secret.sign(sync_crypto::SignPurpose::Hello, &[&statement]),
        name: group.device_name(),
        addresses: group.own_addresses(),
    })
}

fn ended(code: ErrorCode, text: impl Into<String>) -> Close {
    Close { code, text: text.into(), by_peer: false }
}

/// Sends frames as they come, and flushes when none waits.
async fn send_frames(mut sender: FrameSender, mut frames: mpsc::Receiver<Frame>) {
    while let Some(frame) = frames.recv().await {
        let mut next = Some(frame);
        while let Some(frame) = next {
            if sender.send(frame.encode()).await.is_err() {
                return;
            }
            next = frames.try_recv().ok();
        }
        if sender.flush().await.is_err() {
            return;
        }
    }
    if sender.finish().await.is_ok() {
        let _ = sender.delivered().await;
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

struct Driver<'a> {
    group: &'a Arc<Group>,
    session: Session,
    out: mpsc::Sender<Frame>,
    store: mpsc::Sender<Effect>,
    read: mpsc::Sender<Effect>,
    progress: Progress,
}

impl Driver<'_> {
    async fn drive(
        mut self,
        mut receiver: FrameReceiver,
        mut replies: mpsc::Receiver<Reply>,
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
                        Err(error) => return self.malformed(error.to_string()).await,
                    },
                    Ok(None) => return ended(ErrorCode::Unavailable, "the other device ended the session"),
                    Err(error) => return ended(ErrorCode::Unavailable, error.to_string()),
                },
                Some(reply) = replies.recv() => self.session.handle_reply(reply),
                changed = newest.changed() => match changed {
                    Ok(()) => {
                        let newest = *newest.borrow_and_update();
                        self.session.handle_newest(newest);
                    }
                    Err(_) => return ended(ErrorCode::Unavailable, "the database was closed"),
                },
                () = cancel.cancelled() => return ended(ErrorCode::Unavailable, "this device ended the session"),
            }
        }
    }

    /// Carries out what the session asks for; the reason once it ends.
    async fn carry_out(&mut self) -> Option<Close> {
        while let Some(effect) = self.session.poll_effect() {
            let taken = match effect {
                Effect::Send(frame) => self.out.try_send(frame).is_ok(),
                Effect::Store { .. } | Effect::Acknowledged { .. } => self.store.try_send(effect).is_ok(),
                Effect::Report(report) => self.progress.send(report).await.is_ok(),
                Effect::Close(close) => return Some(close),
                effect => self.read.try_send(effect).is_ok(),
            };
            if !taken {
                return Some(ended(ErrorCode::Unavailable, "the other device does not read what it is sent"));
            }
        }
        None
    }

    async fn malformed(&self, text: String) -> Close {
        self.group.count_refused(1);
        tracing::debug!(%text, "peer sent a frame that cannot be read");
        let frame = Frame::error(ErrorCode::Protocol, &text);
        let _ = self.out.send(frame).await;
        ended(ErrorCode::Protocol, text)
    }
}
