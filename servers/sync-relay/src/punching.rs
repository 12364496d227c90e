//! Where connections between devices begin: iroh's relay on the same port, and what tells devices their public address.
//!
//! A device is let in that shows a pass, which a member has named on its channel while that lasts.
//! So the relay's memory links a device with one author, and nothing that it stores or logs does.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Extension, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::{Sink, Stream};
use iroh_base::EndpointId;
use iroh_relay::http::{CLIENT_AUTH_HEADER, ProtocolVersion, RELAY_PATH, RELAY_PROBE_PATH};
use iroh_relay::protos::handshake;
use iroh_relay::protos::relay::MAX_PACKET_SIZE;
use iroh_relay::protos::streams::StreamError;
use iroh_relay::server::client::Config as ClientConfig;
use iroh_relay::server::clients::Clients;
use iroh_relay::server::streams::RelayedStream;
use iroh_relay::server::{
    Access, AccessControl, ClientRequest, ConnectionId, DynAccessControl, Metrics, QuicConfig, Server, ServerConfig,
};
use iroh_relay::{ExportKeyingMaterial, KeyCache};
use sync_types::ErrorCode;
use tokio::time::Sleep;

use crate::limiter::{Place, subscriber};
use crate::server::{Inner, READ_BUFFER, REQUEST_WAIT, Seat, StartError};

/// Bytes of the largest message: a packet with its header.
const MAX_MESSAGE: usize = MAX_PACKET_SIZE + 1024;
/// Bytes that may wait to be sent to one device: some packets.
const WRITE_BUFFER: usize = 1 << 20;
/// Keys of devices that are kept parsed: more than are connected at once.
const KEYS: usize = 4096;
/// Time for which a pass stays good after the channel on which it was named: a network that comes back renews it.
const GRACE: Duration = Duration::from_secs(120);
/// Seconds of its rate that a device may send at once.
const BURST: f64 = 2.0;

/// What a member named on its channel, and a device shows here.
pub(crate) type Pass = [u8; 16];

/// The devices that are connected here, and who may be.
#[derive(Debug)]
pub(crate) struct Punching {
    clients: Clients,
    passes: Arc<Passes>,
    keys: KeyCache,
    metrics: Arc<Metrics>,
    /// Bytes that one device may send in a second.
    rate: f64,
}

impl Punching {
    pub(crate) fn new(bytes_per_second: u32) -> Self {
        Self {
            clients: Clients::default(),
            passes: Arc::default(),
            keys: KeyCache::new(KEYS),
            metrics: Arc::default(),
            rate: f64::from(bytes_per_second),
        }
    }

    /// Lets in who shows a pass, as long as what is returned lives and a little longer.
    pub(crate) fn admit(self: &Arc<Self>, pass: Pass) -> Admission {
        self.passes.lock().entry(pass).or_default().channels += 1;
        Admission { punching: self.clone(), pass, refused: false }
    }

    /// Ends all connections.
    pub(crate) async fn stop(&self) {
        self.clients.shutdown().await;
    }

    /// Connections that were taken, and bytes that went through them.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.metrics.accepts.get(), self.metrics.bytes_sent.get())
    }

    fn forget(&self, pass: &Pass) {
        let forgotten = self.passes.lock().remove(pass);
        if let Some((device, _)) = forgotten.and_then(|known| known.device) {
            self.clients.disconnect(device, None);
        }
    }
}

/// A member's channel on which a pass was named.
#[derive(Debug)]
pub(crate) struct Admission {
    punching: Arc<Punching>,
    pass: Pass,
    refused: bool,
}

impl Admission {
    /// Its member does not belong any more: the device is sent away at once.
    pub(crate) fn refuse(&mut self) {
        self.refused = true;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let (punching, pass) = (self.punching.clone(), self.pass);
        let is_last = punching.passes.lock().get_mut(&pass).is_some_and(|known| {
            known.channels = known.channels.saturating_sub(1);
            known.channels == 0
        });
        if self.refused {
            punching.forget(&pass);
        } else if let (true, Ok(runtime)) = (is_last, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                tokio::time::sleep(GRACE).await;
                let unused = punching.passes.lock().get(&pass).is_some_and(|known| known.channels == 0);
                if unused {
                    punching.forget(&pass);
                }
            });
        }
    }
}

/// Passes that are good now.
#[derive(Debug, Default)]
struct Passes(Mutex<HashMap<Pass, Known>>);

/// One of them.
#[derive(Debug, Default)]
struct Known {
    /// Channels on which it was named.
    channels: usize,
    /// The device that showed it, and its connections.
    device: Option<(EndpointId, usize)>,
}

impl Passes {
    fn lock(&self) -> MutexGuard<'_, HashMap<Pass, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a device may come in with this pass: nobody else has done so.
    fn let_in(&self, pass: Option<Pass>, device: EndpointId) -> bool {
        let mut passes = self.lock();
        let Some(known) = pass.and_then(|pass| passes.get_mut(&pass)) else { return false };
        match &mut known.device {
            Some((other, _)) if *other != device => return false,
            Some((_, connections)) => *connections += 1,
            None => known.device = Some((device, 1)),
        }
        true
    }

    /// Notes that a connection of a device has ended.
    fn gone(&self, device: EndpointId) {
        for known in self.lock().values_mut() {
            if let Some((_, connections)) = known.device.as_mut().filter(|(each, _)| *each == device) {
                *connections -= 1;
                if *connections == 0 {
                    known.device = None;
                }
                return;
            }
        }
    }
}

impl AccessControl for Passes {
    async fn on_connect(&self, request: &ClientRequest) -> Access {
        let pass = request.auth_token().and_then(|text| pass_of(&text));
        if self.let_in(pass, request.endpoint_id()) {
            Access::Allow
        } else {
            Access::Deny { reason: Some("only devices of groups that this relay keeps come in".to_owned()) }
        }
    }

    fn on_disconnect(&self, device: EndpointId, _: ConnectionId) {
        self.gone(device);
    }
}

/// The pass that a text says.
pub(crate) fn pass_of(text: &str) -> Option<Pass> {
    data_encoding::HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok()
}

/// Tells devices their public address, by QUIC; ends when dropped.
pub(crate) async fn discover_addresses(bind: SocketAddr, tls: rustls::ServerConfig) -> Result<Server, StartError> {
    let mut quic = QuicConfig::new(bind);
    quic.server_config = Some(tls);
    let mut config = ServerConfig::default();
    config.quic = Some(quic);
    let failed = |error| StartError::AddressDiscovery { address: bind, reason: format!("{error:#}") };
    Server::spawn(config).await.map_err(failed)
}

pub(crate) fn routes() -> Router<Arc<Inner>> {
    Router::new().route(RELAY_PATH, get(connect)).route(RELAY_PROBE_PATH, get(probe))
}

/// Says that it is there: devices measure how far away that is.
async fn probe() -> impl IntoResponse {
    (StatusCode::OK, [(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")])
}

async fn connect(
    State(inner): State<Arc<Inner>>,
    Extension(seat): Extension<Seat>,
    Extension(socket): Extension<IpAddr>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let Some(punching) = inner.relay.punching.clone() else { return StatusCode::NOT_FOUND.into_response() };
    let (upgrade, address, place) = match inner.take_socket(&seat, &headers, socket, upgrade) {
        Ok(taken) => taken,
        Err(refusal) => return *refusal,
    };
    let (mut parts, ()) = axum::http::Request::new(()).into_parts();
    (parts.uri, parts.headers) = (uri, headers);
    upgrade
        .protocols([ProtocolVersion::V2.to_str()])
        .read_buffer_size(READ_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER)
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .on_upgrade(move |socket| async move {
            let socket = Socket::new(socket, punching.rate, place);
            let taking = tokio::time::timeout(REQUEST_WAIT, take(&punching, socket, parts));
            if !matches!(taking.await, Ok(Ok(()))) {
                inner.relay.strangers.take(subscriber(address), Instant::now());
                inner.relay.metrics.refuse(ErrorCode::Refused);
            }
        })
}

/// Has a device prove its key, and takes it in if it has a pass.
async fn take(punching: &Arc<Punching>, mut socket: Socket, request: Parts) -> Result<(), handshake::Error> {
    let proof = request.headers.get(CLIENT_AUTH_HEADER).cloned();
    let proven = handshake::serverside(&mut socket, proof).await?;
    let request = ClientRequest::new(proven.client_key, ProtocolVersion::V2, request);
    let access: Arc<dyn DynAccessControl> = punching.passes.clone();
    let guard = proven.authorize_with(&request, &access, &mut socket).await?;
    let device = guard.endpoint_id();
    let stream = RelayedStream::new(socket, punching.keys.clone());
    punching.clients.register(ClientConfig::new(guard, stream, ProtocolVersion::V2), punching.metrics.clone());
    // the pass may have been forgotten since it was looked at
    let pass = request.auth_token().and_then(|text| pass_of(&text));
    let is_good = pass.is_some_and(|pass| punching.passes.lock().contains_key(&pass));
    if !is_good {
        punching.clients.disconnect(device, None);
    }
    Ok(())
}

/// A device's WebSocket as iroh's relay takes it, which is read no faster than a device may send.
struct Socket {
    socket: WebSocket,
    allowance: Allowance,
    pause: Option<Pin<Box<Sleep>>>,
    /// Given back with the socket.
    _place: Place,
}

impl Socket {
    fn new(socket: WebSocket, rate: f64, place: Place) -> Self {
        Self { socket, allowance: Allowance::new(rate, Instant::now()), pause: None, _place: place }
    }

    fn as_pin(&mut self) -> Pin<&mut WebSocket> {
        Pin::new(&mut self.socket)
    }
}

impl Stream for Socket {
    type Item = Result<Bytes, StreamError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            return Poll::Ready(match ready!(self.as_pin().poll_next(context)) {
                Some(Ok(Message::Binary(bytes))) => {
                    let wait = self.allowance.take(bytes.len(), Instant::now());
                    self.pause = (!wait.is_zero()).then(|| Box::pin(tokio::time::sleep(wait)));
                    Some(Ok(bytes))
                }
                Some(Ok(Message::Close(_))) | None => None,
                Some(Ok(_)) => continue,
                Some(Err(error)) => Some(Err(StreamError::from_std(error))),
            });
        }
    }
}

impl Sink<Bytes> for Socket {
    type Error = StreamError;

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.as_pin().poll_ready(context).map_err(StreamError::from_std)
    }

    fn start_send(mut self: Pin<&mut Self>, bytes: Bytes) -> Result<(), StreamError> {
        self.as_pin().start_send(Message::Binary(bytes)).map_err(StreamError::from_std)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.as_pin().poll_flush(context).map_err(StreamError::from_std)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.as_pin().poll_close(context).map_err(StreamError::from_std)
    }
}

/// TLS ends before this, or at a proxy: a device signs a challenge instead.
impl ExportKeyingMaterial for Socket {
    fn export_keying_material<T: AsMut<[u8]>>(&self, _: T, _: &[u8], _: Option<&[u8]>) -> Option<T> {
        None
    }
}

/// Bytes that may be sent at present.
#[derive(Debug)]
struct Allowance {
    rate: f64,
    left: f64,
    at: Instant,
}

impl Allowance {
    fn new(rate: f64, now: Instant) -> Self {
        Self { rate, left: rate * BURST, at: now }
    }

    /// Takes what was sent, and says how long nothing more is to be.
    fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.left = (self.left + self.rate * since).min(self.rate * BURST) - f64::from(bytes);
        self.at = now;
        if self.left >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.left / self.rate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u8) -> EndpointId {
        iroh_base::SecretKey::from_bytes(&[number; 32]).public()
    }

    #[tokio::test]
    async fn a_pass_is_good_for_one_device_while_a_member_names_it() {
        let punching = Arc::new(Punching::new(1));
        let passes = &punching.passes;
        assert!(!passes.let_in(None, device(1)));
        assert!(!passes.let_in(Some([1; 16]), device(1)), "nobody has named it");
        let channel = punching.admit([1; 16]);
        assert!(passes.let_in(Some([1; 16]), device(1)));
        assert!(
            passes.let_in(Some([1; 16]), device(1)),
            "it may connect again before the old connection is seen to end"
        );
        assert!(!passes.let_in(Some([1; 16]), device(2)), "it was given away");
        passes.gone(device(1));
        passes.gone(device(1));
        assert!(passes.let_in(Some([1; 16]), device(2)));
        drop(channel);
        assert!(passes.let_in(Some([1; 16]), device(2)), "a channel that is lost comes back");
    }

    #[tokio::test]
    async fn with_a_member_that_does_not_belong_its_pass_goes_at_once() {
        let punching = Arc::new(Punching::new(1));
        let mut channel = punching.admit([1; 16]);
        let _other = punching.admit([2; 16]);
        channel.refuse();
        drop(channel);
        assert!(!punching.passes.let_in(Some([1; 16]), device(1)));
        assert!(punching.passes.let_in(Some([2; 16]), device(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pass_that_no_channel_names_is_forgotten_after_a_while() {
        let punching = Arc::new(Punching::new(1));
        drop(punching.admit([1; 16]));
        drop(punching.admit([2; 16]));
        let _again = punching.admit([2; 16]);
        tokio::time::sleep(GRACE + Duration::from_secs(1)).await;
        assert!(!punching.passes.lock().contains_key(&[1; 16]));
        assert!(punching.passes.lock().contains_key(&[2; 16]));
    }

    #[test]
    fn what_a_device_sends_is_read_at_its_rate() {
        let start = Instant::now();
        let mut allowance = Allowance::new(1000.0, start);
        assert_eq!(allowance.take(2000, start), Duration::ZERO);
        assert_eq!(allowance.take(500, start), Duration::from_millis(500));
        assert_eq!(allowance.take(0, start + Duration::from_millis(500)), Duration::ZERO);
        assert_eq!(
            allowance.take(3000, start + Duration::from_secs(3600)),
            Duration::from_secs(1),
            "rest is not saved up"
        );
    }

    #[test]
    fn what_is_no_pass_is_none() {
        assert_eq!(pass_of(&"07".repeat(16)), Some([7; 16]));
        for text in ["", "07", "zz", &"07".repeat(17), &"AB".repeat(16)] {
            assert_eq!(pass_of(text), None, "{text}");
        }
    }
}
