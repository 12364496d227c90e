//! Peers: dials those known, takes those who come, and keeps one session with each.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sync_core::connection::{Action, Event as Step, HANDSHAKE_TIMEOUT, State, step};
use sync_core::session::{REFUSED_TEXT, Report, Side};
use sync_link::frame::FrameStream;
use sync_link::iroh_link::{Connection, DIAL_TIMEOUT, DeviceId as LinkDevice};
use sync_types::bounds::MAX_FRAME;
use sync_types::{AuthorId, DeviceId, ErrorCode, Frame, GroupId, ReplicaId};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use crate::chunks::{self, Open};
use crate::device::Inner;
use crate::event::Event;
use crate::group::{Group, PeerFacts};
use crate::link::{self, SYNC_ALPN};
use crate::{pairing, punching};

/// Events waiting for a peer's task; what does not fit is told again by the next one.
const EVENTS: usize = 64;
/// Peers dialled per group at most; the others are reached when they dial.
pub(crate) const MAX_PEERS: usize = 64;

/// A dial waits this long where it may go through a relay, to which there may be no connection yet.
const PUNCHING_DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a peer to prove itself and to exchange membership; a slow link with a large group takes some of it.
const ESTABLISH_WAIT: Duration = Duration::from_secs(30);
/// Channels of peers that have not proven themselves yet; strangers cannot open more.
pub(crate) const MAX_UNPROVEN: usize = 64;

static NEXT_SESSION: AtomicU64 = AtomicU64::new(1);

/// Everything about a group's peers while the device runs.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    tasks: Mutex<HashMap<DeviceId, mpsc::Sender<Step>>>,
    states: Mutex<HashMap<DeviceId, State>>,
    live: Mutex<HashMap<DeviceId, Live>>,
    /// Where a rendezvous says that devices can be dialled.
    found: Mutex<HashMap<DeviceId, Vec<SocketAddr>>>,
}

/// An established session.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) session: u64,
    pub(crate) replica: ReplicaId,
    pub(crate) author: AuthorId,
    pub(crate) name: String,
    pub(crate) connection: Connection,
    dialled_by: DeviceId,
    incarnation: [u8; 8],
    cancel: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peers {
    /// Established sessions by device.
    pub(crate) fn live(&self) -> HashMap<DeviceId, Live> {
        lock(&self.live).clone()
    }

    /// Where the connection to a device stands.
    pub(crate) fn state(&self, device: &DeviceId) -> State {
        if lock(&self.live).contains_key(device) {
            return State::Connected;
        }
        lock(&self.states).get(device).copied().unwrap_or(State::Disconnected)
    }

    /// Where a rendezvous says that a device can be dialled.
    pub(crate) fn found_at(&self, device: &DeviceId) -> Vec<SocketAddr> {
        lock(&self.found).get(device).cloned().unwrap_or_default()
    }

    /// Remembers where a rendezvous says that a device can be dialled; true if that is news.
    pub(crate) fn find(&self, device: DeviceId, addresses: Vec<SocketAddr>) -> bool {
        let mut found = lock(&self.found);
        if !found.contains_key(&device) && found.len() >= MAX_PEERS {
            return false;
        }
        found.insert(device, addresses.clone()) != Some(addresses)
    }

    /// Tells a peer's task something, if there is one.
    pub(crate) fn tell(&self, device: &DeviceId, event: Step) {
        if let Some(task) = lock(&self.tasks).get(device) {
            let _ = task.try_send(event);
        }
    }

    /// Notes an established session; false if another one with this device is to be kept.
    fn establish(&self, device: DeviceId, live: Live) -> bool {
        let mut all = lock(&self.live);
        if let Some(known) = all.get(&device) {
            // both dialled at once: both keep the session that the lower device id dialled;
            // a peer that was started again has only the new one
            if known.incarnation == live.incarnation && known.dialled_by < live.dialled_by {
                return false;
            }
            known.cancel.cancel();
        }
        all.insert(device, live);
        true
    }

    /// Forgets a session; true if the device has none left.
    fn end(&self, device: &DeviceId, session: u64) -> bool {
        let mut all = lock(&self.live);
        if all.get(device).is_some_and(|live| live.session == session) {
            all.remove(device);
        }
        !all.contains_key(device)
    }
}

/// Starts dialling a peer unless that is under way already.
pub(crate) fn want(device: &Arc<Inner>, group: &Arc<Group>, peer: DeviceId) {
    if device.device_id() == peer || device.endpoint().is_none() {
        return;
    }
    let mut tasks = lock(&group.peers.tasks);
    if tasks.contains_key(&peer) || tasks.len() >= MAX_PEERS {
        return;
    }
    let (sender, events) = mpsc::channel(EVENTS);
    tasks.insert(peer, sender.clone());
    drop(tasks);
    let task = PeerTask {
        device: device.clone(),
        group: group.clone(),
        peer,
        state: State::Disconnected,
        timer: None,
        sender,
        attempt: None,
    };
    device.spawn(task.run(events));
}

/// One task for each peer that is dialled.
struct PeerTask {
    device: Arc<Inner>,
    group: Arc<Group>,
    peer: DeviceId,
    state: State,
    timer: Option<tokio::time::Instant>,
    sender: mpsc::Sender<Step>,
    attempt: Option<CancellationToken>,
}

impl PeerTask {
    async fn run(mut self, mut events: mpsc::Receiver<Step>) {
        let closed = self.device.closed();
        self.handle(Step::Wanted);
        loop {
            let timer = self.timer;
            let timeout = async {
                match timer {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = closed.cancelled() => return,
                () = timeout => {
                    self.timer = None;
                    self.handle(Step::Timeout);
                }
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
            }
        }
    }

    fn handle(&mut self, event: Step) {
        // another session with this peer goes on: losing one is no loss, and nothing needs to be dialled
        let live = lock(&self.group.peers.live).contains_key(&self.peer);
        if live && matches!(event, Step::Lost | Step::Refused | Step::AddressChanged) {
            return;
        }
        let (state, actions) = step(self.state, event, self.device.jitter());
        if state != self.state {
            tracing::debug!(peer = %self.peer.short(), from = ?self.state, to = ?state, ?event, "connection");
        }
        self.state = state;
        lock(&self.group.peers.states).insert(self.peer, state);
        for action in actions {
            match action {
                Action::Dial => self.dial(),
                Action::SetTimer(wait) => self.timer = Some(tokio::time::Instant::now() + wait),
                Action::ClearTimer => self.timer = None,
                Action::HangUp => {
                    if let Some(attempt) = self.attempt.take() {
                        attempt.cancel();
                    }
                }
                _ => {}
            }
        }
    }

    fn dial(&mut self) {
        let cancel = self.device.closed().child_token();
        if let Some(before) = self.attempt.replace(cancel.clone()) {
            before.cancel();
        }
        let (device, group, peer, sender) = (self.device.clone(), self.group.clone(), self.peer, self.sender.clone());
        self.device.spawn(async move {
            let end = dial_and_run(&device, &group, peer, &sender, &cancel).await;
            let _ = sender.send(end).await;
        });
    }
}

async fn dial_and_run(
    device: &Arc<Inner>,
    group: &Arc<Group>,
    peer: DeviceId,
    events: &mpsc::Sender<Step>,
    cancel: &CancellationToken,
) -> Step {
    let Some(endpoint) = device.endpoint() else { return Step::Refused };
    let addresses = group.addresses_of(device, &peer).await;
    let relays = punching::relays_of(group, &peer).await;
    let wait = if endpoint.punches() { PUNCHING_DIAL_TIMEOUT } else { DIAL_TIMEOUT };
    let dialled = tokio::select! {
        dialled = endpoint.connect_through(LinkDevice(peer.0), &addresses, &relays, SYNC_ALPN, wait) => dialled,
        () = cancel.cancelled() => return Step::Lost,
    };
    let connection = match dialled {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(peer = %peer.short(), %error, "dial failed");
            return Step::Lost;
        }
    };
    let _ = events.send(Step::Opened).await;
    let stream = match connection.open_stream(MAX_FRAME).await {
        Ok(stream) => stream,
        Err(reason) => {
            tracing::debug!(peer = %peer.short(), %reason, "peer closed the channel");
            return Step::Lost;
        }
    };
    converse(device, group, &connection, stream, Side::Dialler, None, cancel).await
}

/// Takes a channel that a peer opened.
pub(crate) async fn accept(device: &Arc<Inner>, connection: Connection) {
    let peer = DeviceId(connection.remote_device().0);
    // strangers share what room there is; devices known to a group come in beside them
    let known = device.groups().values().any(|group| lock(&group.peers.tasks).contains_key(&peer));
    let unproven = if known { None } else { device.unproven().try_acquire_owned().ok() };
    if !known && unproven.is_none() {
        device.count_refused();
        return connection.close(1, "too many at once");
    }
    let opened = tokio::time::timeout(HANDSHAKE_TIMEOUT, async {
        let mut stream = connection.accept_stream(MAX_FRAME).await.ok()?;
        let bytes = stream.receiver.recv().await.ok()??;
        Some((stream, Frame::decode(&bytes)))
    });
    let (stream, group, hello) = match opened.await {
        Ok(Some((stream, Ok(hello @ Frame::Hello { group, .. })))) => (stream, group, hello),
        Ok(Some((stream, _))) => {
            device.count_refused();
            return refuse(stream, &connection, ErrorCode::Protocol, "a session starts with HELLO").await;
        }
        _ => {
            device.count_refused();
            return connection.close(1, "nothing said");
        }
    };
    let Some(group) = device.group(&group) else {
        device.count_refused();
        return refuse(stream, &connection, ErrorCode::Refused, REFUSED_TEXT).await;
    };
    let cancel = device.closed().child_token();
    group.peers.tell(&peer, Step::Accepted);
    let end = converse(device, &group, &connection, stream, Side::Acceptor, Some((hello, unproven)), &cancel).await;
    group.peers.tell(&peer, end);
}

/// Refuses in the same way as a session does, so that an unknown group cannot be told from one that has no such member.
async fn refuse(stream: FrameStream, connection: &Connection, code: ErrorCode, text: &str) {
    let (mut sender, receiver) = stream.split();
    drop(receiver);
    let frame = Frame::error(code, text);
    let _ = tokio::time::timeout(link::FAREWELL, async {
        if sender.send(frame.encode()).await.is_ok() && sender.finish().await.is_ok() {
            let _ = sender.delivered().await;
        }
    })
    .await;
    connection.close(link::CLOSE_DONE, text);
}

/// Runs a session and keeps its place among the peers; what its end means to the connection.
async fn converse(
    device: &Arc<Inner>,
    group: &Arc<Group>,
    connection: &Connection,
    stream: FrameStream,
    side: Side,
    accepted: Option<(Frame, Option<OwnedSemaphorePermit>)>,
    cancel: &CancellationToken,
) -> Step {
    let (first, unproven) = accepted.unzip();
    let mut unproven = unproven.flatten();
    let session = NEXT_SESSION.fetch_add(1, Ordering::Relaxed);
    let peer = DeviceId(connection.remote_device().0);
    let cancel = cancel.child_token();
    let (progress, mut reports) = mpsc::channel(EVENTS);
    let watch = async {
        let mut known = None;
        let mut moving: Option<Open> = None;
        let deadline = tokio::time::Instant::now() + ESTABLISH_WAIT;
        loop {
            let report = tokio::select! {
                report = reports.recv() => report,
                () = tokio::time::sleep_until(deadline), if known.is_none() && !cancel.is_cancelled() => {
                    cancel.cancel();
                    continue;
                }
            };
            let Some(report) = report else { break };
            match report {
                Report::Established { author, replica, max_cursor, name, addresses, incarnation } => {
                    let name = pairing::clean(&name);
                    let live = Live {
                        session,
                        replica,
                        author,
                        name: name.clone(),
                        connection: connection.clone(),
                        dialled_by: if side == Side::Dialler { device.device_id() } else { peer },
                        incarnation,
                        cancel: cancel.clone(),
                    };
                    if !group.peers.establish(peer, live) {
                        cancel.cancel();
                        continue;
                    }
                    moving = Some(chunks::open(device, group, session, connection));
                    known = Some((replica, name.clone()));
                    unproven.take();
                    let facts = PeerFacts { replica, author, device: peer, name: name.clone(), addresses };
                    group.note_peer(facts, connection.remote_address()).await;
                    group.peers.tell(&peer, Step::Accepted);
                    group.peers.tell(&peer, Step::Established);
                    want(device, group, peer);
                    pairing::has_joined(device, group, author, &name).await;
                    let pending = group.pending().await;
                    group.emit(Event::Connected { replica, name, max_cursor, pending });
                    group.progress();
                }
                Report::CaughtUp | Report::HandedOver { .. } => group.progress(),
                _ => {}
            }
        }
        drop(moving);
        known
    };
    let (close, known) = tokio::join!(link::run(group, connection, stream, side, first, progress, &cancel), watch);
    tracing::debug!(peer = %peer.short(), reason = %close.text, by_peer = close.by_peer, "session ended");
    let gone = group.peers.end(&peer, session);
    if let Some((replica, name)) = known
        && gone
    {
        group.emit(Event::Disconnected { replica, name, reason: close.text.clone() });
        group.progress();
    }
    match close.code {
        ErrorCode::Refused | ErrorCode::Removed if close.by_peer => {
            group.emit(Event::Error { code: "refused".to_owned(), message: close.text });
            Step::Lost
        }
        _ => Step::Lost,
    }
}

/// Starts dialling everyone a group knows.
pub(crate) async fn want_all(device: &Arc<Inner>, group: &Arc<Group>) {
    for peer in group.known_devices().await {
        want(device, group, peer);
    }
}

/// Tells every peer's task that the network may have changed.
pub(crate) fn network_changed(groups: &HashMap<GroupId, Arc<Group>>) {
    groups.values().for_each(|group| dial_again(group));
}

/// Tells the tasks of a group's peers that they may be reached now.
pub(crate) fn dial_again(group: &Group) {
    for task in lock(&group.peers.tasks).values() {
        let _ = task.try_send(Step::AddressChanged);
    }
}
