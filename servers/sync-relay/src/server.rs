//! The sockets: HTTP with a few routes, one of which becomes a channel.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sync_link::noise::{MAX_MESSAGE, public_key};
use sync_link::relay::{CHANNEL_PATH, RelayUrl};
use sync_types::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_io_timeout::TimeoutWriter;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use crate::config::{Config, ConfigError};
use crate::data::{Data, DataError, note_address};
use crate::limiter::{Place, TooMany, subscriber};
use crate::punching::{Punching, discover_addresses};
use crate::relay::Relay;
use crate::storage::StorageError;
use crate::tls::{Identity, TlsError};
use crate::{mailbox, meetings, punching, storage};

/// Time for a request to come whole; a socket that says nothing is closed.
pub(crate) const REQUEST_WAIT: Duration = Duration::from_secs(10);
/// Time in which someone takes nothing of what it is sent; who asks and does not read is let go.
const WRITE_WAIT: Duration = Duration::from_secs(30);
/// Time for connections to end once the relay is to.
const DRAIN: Duration = Duration::from_secs(3);
/// Bytes read from a socket at once: connections are many and mostly silent.
pub(crate) const READ_BUFFER: usize = 4 << 10;
/// Bytes that may wait to be sent on a channel: one frame.
const WRITE_BUFFER: usize = 8 << 20;
/// Connections at once that are only told that there is no room for them.
const MAX_REFUSING: usize = 64;
/// Wait after the system could not give a socket, out of files for instance.
const ACCEPT_WAIT: Duration = Duration::from_millis(100);

/// Why a relay does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A value makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The directory cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// There is no certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The database cannot be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; name another with --bind, or stop what listens there")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Devices cannot be told their addresses.
    #[error(
        "cannot tell devices their public addresses on UDP {address}: {reason}; \
         set address_discovery_bind to another one, or address_discovery = false"
    )]
    AddressDiscovery {
        /// The address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
}

/// A relay that runs until it is stopped.
#[derive(Debug)]
pub struct Server {
    inner: Arc<Inner>,
    address: SocketAddr,
    url: RelayUrl,
    accepting: JoinHandle<()>,
    tasks: TaskTracker,
    /// What tells devices their public addresses.
    discovery: Option<iroh_relay::server::Server>,
    _data: Data,
}

/// What every request is answered with.
pub(crate) struct Inner {
    pub(crate) relay: Arc<Relay>,
    /// None without TLS.
    acceptor: Option<TlsAcceptor>,
    /// Room for handshakes with who is then only told that there is no room.
    refusing: Semaphore,
    behind_proxy: bool,
    public_metrics: bool,
    /// Where it listens: who comes from there is of this machine.
    here: IpAddr,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

impl Server {
    /// Starts a relay; it takes connections once this returns.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        config.check()?;
        let path = config.data.clone();
        let opening = tokio::task::spawn_blocking(move || Data::open(&path)).await;
        let data = opening.expect("BUG: opening does not panic and is not cancelled")?;
        let storage = storage::open(&config).await?;
        let bind = |source| StartError::Bind { address: config.bind, source };
        let listener = TcpListener::bind(config.bind).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let token = config.registration_token.clone().unwrap_or_else(|| data.token.clone());
        let registration = (!config.is_open()).then_some(token);
        let host = config.host.clone().unwrap_or_else(|| address.ip().to_string());
        if config.host.is_none() && address.ip().is_unspecified() {
            tracing::warn!("the address below names no machine: set host to the name by which devices reach this one");
        }
        let mut url = RelayUrl::new(&host, address.port(), &public_key(&data.secret));
        let identity = match (&config.cert, &config.key) {
            _ if config.is_plain() => None,
            (Some(certificate), Some(key)) => Some(Identity::read(certificate, key)?),
            _ => Some(Identity::made(&config.data, &host)?),
        };
        if let Some(identity) = &identity {
            url = url.with_pin(&identity.pin);
        }
        note_address(&config.data, &url.to_string())?;
        if let Some(token) = &registration {
            url = url.with_token(token);
        }
        let discovery = match (&identity, config.address_discovery()) {
            (Some(identity), Some(bind)) => Some(discover_addresses(bind, identity.config()).await?),
            _ => None,
        };
        let punching = config.punching.then(|| Arc::new(Punching::new(config.limits.relayed_bytes_per_second)));
        let relay = Relay::new(config.limits.clone(), data.secret.clone(), storage, registration, punching);
        relay.meetings.load(&*relay.storage).await?;
        let keep = (config.keep_seconds > 0).then(|| Duration::from_secs(config.keep_seconds));
        let every = Duration::from_secs(config.sweep_seconds);
        let Config { behind_proxy, public_metrics, .. } = config;
        let inner = Arc::new(Inner {
            relay: Arc::new(relay),
            acceptor: identity.map(|identity| identity.acceptor),
            refusing: Semaphore::new(MAX_REFUSING),
            behind_proxy,
            public_metrics,
            here: address.ip(),
        });
        let tasks = TaskTracker::new();
        if let Some(keep) = keep {
            tasks.spawn(sweep(inner.relay.clone(), keep, every));
        }
        let accepting = tokio::spawn(accept(inner.clone(), listener, tasks.clone()));
        Ok(Self { inner, address, url, accepting, tasks, discovery, _data: data })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address to give to devices: with its key, and with the operator's token where new groups need it.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.to_string()
    }

    /// Ends connections, stores what was taken, and writes everything into the database's main file.
    pub async fn stop(self) -> Result<(), StorageError> {
        self.inner.relay.stop.cancel();
        // it ends by itself
        let _ = self.accepting.await;
        self.tasks.close();
        let ending = async {
            if let Some(punching) = &self.inner.relay.punching {
                punching.stop().await;
            }
            if let Some(discovery) = self.discovery {
                // how it ended is nobody's matter now
                let _ = discovery.shutdown().await;
            }
            self.tasks.wait().await;
        };
        let _ = tokio::time::timeout(DRAIN, ending).await;
        self.inner.relay.storage.close().await
    }
}

async fn accept(inner: Arc<Inner>, listener: TcpListener, tasks: TaskTracker) {
    let stop = inner.relay.stop.clone();
    let router = router(inner.clone());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, address)) => {
                tasks.spawn(serve(inner.clone(), router.clone(), stream, address.ip()));
            }
            Err(error) => {
                tracing::warn!(%error, "connection could not be taken");
                tokio::time::sleep(ACCEPT_WAIT).await;
            }
        }
    }
}

/// Drops now and then what is older than it is to be kept.
async fn sweep(relay: Arc<Relay>, keep: Duration, every: Duration) {
    loop {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        if let Err(error) = relay.expire(now, keep).await {
            tracing::warn!(%error, "what is old could not be dropped");
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = relay.stop.cancelled() => return,
        }
    }
}

/// A connection's place, which its channel takes over.
pub(crate) type Seat = Arc<std::sync::Mutex<Option<Place>>>;

async fn serve(inner: Arc<Inner>, router: Router, stream: TcpStream, address: IpAddr) {
    // a proxy's connections are those of many: each is counted once it says whose it is
    let place = if inner.behind_proxy { Ok(None) } else { inner.relay.connections.enter(address).map(Some) };
    let place = place.map_err(|too_many| inner.count_too_many(too_many));
    let _one = match &place {
        Ok(_) => None,
        Err(_) => match inner.refusing.try_acquire() {
            Ok(one) => Some(one),
            // a flood is not worth a handshake each
            Err(_) => return,
        },
    };
    // frames are gathered before they are sent
    let _ = stream.set_nodelay(true);
    match &inner.acceptor {
        None => answer(router, stream, address, place).await,
        Some(acceptor) => {
            let accepted = tokio::time::timeout(REQUEST_WAIT, acceptor.accept(stream)).await;
            if let Ok(Ok(stream)) = accepted {
                answer(router, stream, address, place).await;
            } else {
                inner.relay.metrics.broken_handshakes.add(1);
            }
        }
    }
}

async fn answer(
    router: Router,
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    address: IpAddr,
    place: Result<Option<Place>, (StatusCode, &'static str)>,
) {
    let place = match place {
        Ok(place) => place,
        Err((status, text)) => {
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                text.len()
            );
            // it may not listen
            let _ = tokio::time::timeout(REQUEST_WAIT, async {
                stream.write_all(answer.as_bytes()).await?;
                stream.shutdown().await
            })
            .await;
            return;
        }
    };
    let seat: Seat = Arc::new(std::sync::Mutex::new(place));
    let service = TowerToHyperService::new(router.layer(Extension(seat)).layer(Extension(address)));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(REQUEST_WAIT).max_buf_size(16 << 10);
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(WRITE_WAIT));
    let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service).with_upgrades();
    // its end is the peer's matter
    let _ = connection.await;
}

impl Inner {
    /// The address that asks.
    pub(crate) fn asking(&self, headers: &HeaderMap, socket: IpAddr) -> IpAddr {
        if self.behind_proxy { forwarded(headers).unwrap_or(socket) } else { socket }
    }

    /// What comes of something, or nothing once the relay stops.
    pub(crate) async fn unless_stopped<T, E>(
        &self,
        work: impl Future<Output = Result<Option<T>, E>>,
    ) -> Result<Option<T>, E> {
        tokio::select! {
            done = work => done,
            () = self.relay.stop.cancelled() => Ok(None),
        }
    }

    /// What a request for a socket needs to become one, with the address that asks; what is answered where it may not.
    pub(crate) fn take_socket(
        &self,
        seat: &Seat,
        headers: &HeaderMap,
        socket: IpAddr,
        upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    ) -> Result<(WebSocketUpgrade, IpAddr, Place), Box<Response>> {
        let relay = &self.relay;
        let address = self.asking(headers, socket);
        if relay.strangers.is_empty(&subscriber(address), Instant::now()) {
            let text = "too many refused requests from your address";
            return Err(Box::new((StatusCode::TOO_MANY_REQUESTS, text).into_response()));
        }
        let upgrade = upgrade.map_err(|rejection| Box::new(rejection.into_response()))?;
        let taken = seat.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let place = taken.map_or_else(|| relay.connections.enter(address), Ok);
        let place = place.map_err(|too_many| Box::new(self.count_too_many(too_many).into_response()))?;
        Ok((upgrade, address, place))
    }

    fn count_too_many(&self, too_many: TooMany) -> (StatusCode, &'static str) {
        let metrics = &self.relay.metrics;
        match too_many {
            TooMany::All => {
                metrics.too_many_connections.add(1);
                (StatusCode::SERVICE_UNAVAILABLE, "too many connections")
            }
            TooMany::FromAddress => {
                metrics.too_many_from_address.add(1);
                (StatusCode::TOO_MANY_REQUESTS, "too many connections from your address")
            }
        }
    }
}

fn router(inner: Arc<Inner>) -> Router {
    Router::new()
        .route(CHANNEL_PATH, get(channel))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .merge(meetings::routes())
        .merge(punching::routes())
        .with_state(inner)
}

async fn channel(
    State(inner): State<Arc<Inner>>,
    Extension(seat): Extension<Seat>,
    Extension(socket): Extension<IpAddr>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let (upgrade, address, place) = match inner.take_socket(&seat, &headers, socket, upgrade) {
        Ok(taken) => taken,
        Err(refusal) => return *refusal,
    };
    let relay = inner.relay.clone();
    upgrade
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_BUFFER)
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .on_upgrade(move |socket| mailbox::serve(relay, socket, address, place))
}

/// The address that the nearest proxy saw.
fn forwarded(headers: &HeaderMap) -> Option<IpAddr> {
    let last = headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?;
    last.rsplit(',').next()?.trim().parse().ok()
}

async fn health(State(inner): State<Arc<Inner>>) -> Response {
    let relay = &inner.relay;
    match relay.now().await {
        Ok(now) => Json(Health {
            status: "ok",
            version: env!("CARGO_PKG_VERSION"),
            connections: now.connections,
            groups: now.groups,
            codes: relay.meetings.count(),
            blobs_stored: relay.metrics.stored.get(),
            uptime_seconds: now.uptime_seconds,
        })
        .into_response(),
        Err(error) => {
            tracing::warn!(%error, "database does not work");
            (StatusCode::SERVICE_UNAVAILABLE, "the database does not work").into_response()
        }
    }
}

#[derive(serde::Serialize)]
struct Health {
    status: &'static str,
    version: &'static str,
    connections: usize,
    groups: usize,
    codes: usize,
    blobs_stored: u64,
    uptime_seconds: u64,
}

async fn metrics(
    State(inner): State<Arc<Inner>>,
    Extension(socket): Extension<IpAddr>,
    headers: HeaderMap,
) -> Response {
    let address = inner.asking(&headers, socket);
    let is_here = address.to_canonical().is_loopback() || address == inner.here;
    if !inner.public_metrics && !is_here {
        return StatusCode::NOT_FOUND.into_response();
    }
    match inner.relay.now().await {
        Ok(now) => {
            let text = inner.relay.metrics.render(now);
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
        }
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}
