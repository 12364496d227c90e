//! One channel of a member: who it is, and then a session of the blind replica with it.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use axum::extract::ws::WebSocket;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use futures_util::{FutureExt as _, StreamExt as _};
use sync_core::session::{Config, Effect, Ends, NO_AUTHOR, REFUSED_TEXT, Reply, Report, Session, Side};
use sync_store::Limits;
use sync_store::exec::{Arrival, Pull};
use sync_types::bounds::MAX_FRAME;
use sync_types::{AuthorId, Cursor, ErrorCode, Frame, GroupId};

use crate::access::{Shown, examine};
use crate::channel::{Channel, ChannelError};
use crate::limiter::{Place, subscriber};
use crate::punching::{Admission, Pass};
use crate::relay::{HostError, Relay, failed};
use crate::storage::{Live, Reading};
use crate::wake::Online;

/// Time for the handshake and for what a device shows first.
const GREETING_WAIT: Duration = Duration::from_secs(10);
/// Time for a member to exchange membership.
const ESTABLISH_WAIT: Duration = Duration::from_secs(60);
/// Answers being read for one channel: each may be a megabyte, and whoever asks on without end waits for them.
const MAX_READING: usize = 4;
/// Bytes of what a device shows first: a token of the greatest length.
const MAX_GREETING: usize = 256 << 10;

/// Serves a channel until it ends.
pub(crate) async fn serve(relay: Arc<Relay>, socket: WebSocket, address: IpAddr, place: Place) {
    relay.metrics.connections.add(1);
    // what letting in needs is more than what a session does, which may be silent for days
    if let Some(talk) = Box::pin(let_in(relay, socket, address)).await {
        talk.run().await;
    }
    drop(place);
}

/// Hears who it is, and begins the session if that one may come in.
async fn let_in(relay: Arc<Relay>, socket: WebSocket, address: IpAddr) -> Option<Box<Talk>> {
    // who is let go finds that it was counted
    let mut greeting = pin!(greet(&relay, socket));
    let greeted = tokio::select! {
        greeted = tokio::time::timeout(GREETING_WAIT, &mut greeting) => greeted,
        () = relay.stop.cancelled() => return None,
    };
    let Ok(Some((mut channel, shown))) = greeted else {
        relay.metrics.broken_handshakes.add(1);
        relay.strangers.take(subscriber(address), Instant::now());
        return None;
    };
    let (code, text) = match shown {
        None => {
            relay.strangers.take(subscriber(address), Instant::now());
            (ErrorCode::Refused, REFUSED_TEXT.to_owned())
        }
        Some(shown) if relay.messages.is_empty(&shown.author, Instant::now()) => {
            (ErrorCode::TooFast, TOO_FAST_TEXT.to_owned())
        }
        Some(shown) => match relay.host(&shown).await {
            Ok(live) => return Some(Box::new(Talk::new(relay.clone(), channel, live, shown))),
            Err(HostError::Refused(code, text)) => {
                relay.messages.take(shown.author, Instant::now());
                (code, text.to_owned())
            }
            Err(HostError::Storage(error)) => {
                let Reply::Failed { text } = failed(&error) else { return None };
                (ErrorCode::Unavailable, text)
            }
        },
    };
    refuse(&relay, &mut channel, code, &text).await;
    None
}

const TOO_FAST_TEXT: &str = "more was sent than this relay takes in a minute";

/// The handshake, and what the device shows; none of that if it is no member of what it names.
async fn greet(relay: &Relay, socket: WebSocket) -> Option<(Channel, Option<Shown>)> {
    let silence = Duration::from_secs(relay.limits.silence_seconds);
    let mut channel = Channel::accept(socket, &relay.secret, MAX_GREETING, silence).await.ok()?;
    let mut frames = Vec::new();
    while frames.len() < 2 {
        match channel.recv().await {
            Ok(Some((frame, bytes))) => {
                relay.metrics.received_bytes.add(bytes as u64);
                frames.push(frame);
            }
            Ok(None) => return None,
            Err(error) if error.code().is_some() => return Some((channel, None)),
            Err(_) => return None,
        }
    }
    let (hello, charter) = (frames.pop()?, frames.pop()?);
    let shown = examine(charter, hello, &channel.binding);
    channel.set_max_frame(MAX_FRAME);
    Some((channel, shown))
}

async fn refuse(relay: &Relay, channel: &mut Channel, code: ErrorCode, text: &str) {
    relay.metrics.refuse(code);
    // it may have gone already
    if channel.send(&Frame::error(code, text)).await.is_ok() {
        channel.close().await;
    }
}

/// A session under way.
struct Talk {
    relay: Arc<Relay>,
    channel: Channel,
    group: GroupId,
    live: Live,
    author: AuthorId,
    session: Session,
    /// The newest cursor that the session knows of.
    newest: Cursor,
    /// What was shown, for the session.
    hello: Option<Frame>,
    storing: FuturesOrdered<BoxFuture<'static, Reply>>,
    reading: FuturesOrdered<BoxFuture<'static, Option<Reply>>>,
    told_full: Arc<AtomicBool>,
    /// What its device shows where connections begin.
    pass: Option<Pass>,
    /// Lets the device in there, once the session is established.
    admission: Option<Admission>,
    established: bool,
    /// As long as the device need not be woken.
    online: Online,
}

impl Talk {
    fn new(relay: Arc<Relay>, channel: Channel, live: Live, shown: Shown) -> Self {
        let config = Config {
            side: Side::Acceptor,
            ends: Ends::Blind,
            group: shown.group,
            author: NO_AUTHOR,
            replica: relay.replica,
            token: Vec::new(),
            binding: channel.binding,
            proof: [0; 64],
            name: String::new(),
            addresses: Vec::new(),
            incarnation: [0; 8],
        };
        let online = relay.wakes.enter(shown.group, shown.author);
        Self {
            relay,
            channel,
            group: shown.group,
            live,
            author: shown.author,
            session: Session::new(config),
            newest: Cursor(0),
            hello: Some(shown.hello),
            storing: FuturesOrdered::new(),
            reading: FuturesOrdered::new(),
            told_full: Arc::default(),
            pass: shown.pass,
            admission: None,
            established: false,
            online,
        }
    }

    async fn run(mut self: Box<Self>) {
        match self.talk().await {
            Ok(()) => self.channel.close().await,
            Err(error) => {
                tracing::debug!(%error, "channel ended");
                if let Some(code) = error.code() {
                    self.relay.messages.take(self.author, Instant::now());
                    refuse(&self.relay, &mut self.channel, code, &error.to_string()).await;
                }
            }
        }
    }

    async fn talk(&mut self) -> Result<(), ChannelError> {
        self.newest = *self.live.newest.borrow_and_update();
        self.session.handle_newest(self.newest);
        if let Some(hello) = self.hello.take() {
            self.session.handle_frame(hello);
        }
        let mut removals = self.relay.removals.subscribe();
        let stop = self.relay.stop.clone();
        let (stopped, deadline) = (stop.cancelled(), tokio::time::sleep(ESTABLISH_WAIT));
        tokio::pin!(stopped, deadline);
        loop {
            if self.carry_out().await? {
                return Ok(());
            }
            tokio::select! {
                frame = self.channel.recv(), if self.session.accepts_frames() && self.reading.len() < MAX_READING => {
                    match frame? {
                        Some((frame, bytes)) => self.take(frame, bytes).await?,
                        None => return Ok(()),
                    }
                }
                Some(reply) = self.storing.next() => self.session.handle_reply(reply),
                Some(reply) = self.reading.next() => {
                    if let Some(reply) = reply {
                        self.session.handle_reply(reply);
                    }
                }
                changed = self.live.newest.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.newest = *self.live.newest.borrow_and_update();
                    self.session.handle_newest(self.newest);
                }
                Ok(()) = removals.changed() => {
                    let membership = removals.borrow_and_update().get(&self.group).cloned();
                    if let Some(membership) = membership {
                        self.session.handle_membership(&membership);
                    }
                }
                Ok(()) = self.live.wanted.changed() => match self.relay.storage.wants(self.group).await {
                    Ok(wants) => self.session.handle_wants(wants),
                    Err(error) => tracing::warn!(%error, "database does not work"),
                },
                () = &mut deadline, if !self.established => return Err(ChannelError::Lost),
                () = &mut stopped => return Ok(()),
            }
        }
    }

    /// Takes in a frame, unless it is one too many or holds what is too large.
    async fn take(&mut self, frame: Frame, bytes: usize) -> Result<(), ChannelError> {
        self.relay.metrics.received_bytes.add(bytes as u64);
        match &frame {
            Frame::Wake { url } => self.online.set(url, self.live.newest.clone()),
            Frame::PushAck { cursor } => self.online.acknowledged(*cursor),
            _ => {}
        }
        let entries = match &frame {
            Frame::Push { entries, .. } | Frame::PullResponse { entries, .. } => &entries[..],
            _ => &[],
        };
        if !entries.is_empty() && !self.relay.messages.take(self.author, Instant::now()) {
            return Box::pin(self.end(ErrorCode::TooFast, TOO_FAST_TEXT)).await;
        }
        let most = self.relay.limits.envelope_bytes();
        if entries.iter().any(|carried| carried.envelope.len() > most) {
            return Box::pin(self.end(ErrorCode::TooLarge, "the blob is larger than this relay takes")).await;
        }
        self.session.handle_frame(frame);
        Ok(())
    }

    /// Says why, and ends the channel. What was taken before is stored first, and acknowledged.
    async fn end(&mut self, code: ErrorCode, text: &str) -> Result<(), ChannelError> {
        self.relay.metrics.refuse(code);
        while let Some(reply) = self.storing.next().await {
            self.session.handle_reply(reply);
        }
        self.carry_out().await?;
        self.channel.send(&Frame::error(code, text)).await?;
        Err(ChannelError::Lost)
    }

    /// Carries out what the session asks for; true once it has ended.
    async fn carry_out(&mut self) -> Result<bool, ChannelError> {
        while let Some(effect) = self.session.poll_effect() {
            match effect {
                Effect::Send(frame) => self.send(&frame).await?,
                Effect::Store { id, replica, batch, position } => {
                    let arrival = Arrival { replica, batch, position };
                    let store = self.relay.clone().store(self.group, self.told_full.clone(), id, arrival);
                    self.storing.push_back(store.boxed());
                }
                Effect::Report(Report::Established { .. }) => {
                    self.established = true;
                    let punching = self.relay.punching.as_ref();
                    self.admission = punching.zip(self.pass).map(|(punching, pass)| punching.admit(pass));
                    self.relay.metrics.sessions.add(1);
                }
                Effect::Close(close) => {
                    if !close.by_peer {
                        self.relay.metrics.refuse(close.code);
                        if close.code != ErrorCode::Unavailable {
                            self.relay.messages.take(self.author, Instant::now());
                        }
                        let belongs = !matches!(close.code, ErrorCode::Refused | ErrorCode::Removed);
                        if let Some(admission) = self.admission.as_mut().filter(|_| !belongs) {
                            admission.refuse();
                        }
                    }
                    return Ok(true);
                }
                Effect::Read { scope, not_from, after, limit, bytes, selection } => {
                    let limits = Limits { entries: limit, bytes };
                    self.read(Reading { scope, not_from, after, limits, selection });
                }
                // what a device holds is its own matter, and what a session reports is for people
                Effect::Acknowledged { .. } | Effect::Report(_) => {}
                effect => self.reading.push_back(read(self.relay.clone(), self.group, effect).boxed()),
            }
        }
        Ok(false)
    }

    /// Reads entries to send: one reads the database for all that read along.
    fn read(&mut self, reading: Reading) {
        if let Some(reply) = self.live.tail.answer(self.newest, &reading) {
            return self.session.handle_reply(reply);
        }
        let (relay, group, newest, tail) = (self.relay.clone(), self.group, self.newest, self.live.tail.clone());
        let reading = async move {
            let storage = &*relay.storage;
            let reply = match reading.not_from {
                Some(_) => tail.read(storage, group, newest, reading).await,
                None => storage.read(group, reading).await,
            };
            Some(reply.unwrap_or_else(|error| failed(&error)))
        };
        self.reading.push_back(reading.boxed());
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), ChannelError> {
        if let Frame::Push { entries, max_cursor, .. } | Frame::PullResponse { entries, max_cursor, .. } = frame {
            self.relay.metrics.delivered.add(entries.len() as u64);
            if !entries.is_empty() {
                self.online.sent(*max_cursor);
            }
        }
        let bytes = self.channel.send(frame).await?;
        self.relay.metrics.sent_bytes.add(bytes as u64);
        Ok(())
    }
}

/// Carries out an effect that only reads.
async fn read(relay: Arc<Relay>, group: GroupId, effect: Effect) -> Option<Reply> {
    let storage = &relay.storage;
    let reply = match effect {
        Effect::Survey { replica } => storage.survey(group, replica).await,
        Effect::Select { scope, after, check, have, covered, .. } => {
            storage.select(group, Pull { scope, after, check, have, covered }).await
        }
        Effect::ReadWanted { request, wants } => match storage.want_again(group, wants.clone()).await {
            Ok(()) => storage.read_wanted(group, request, wants).await,
            Err(error) => Err(error),
        },
        _ => return None,
    };
    Some(reply.unwrap_or_else(|error| failed(&error)))
}
