//! The link between devices: QUIC connections by iroh, direct wherever that works.
//!
//! Without relays it uses no service of anyone; with [`EndpointConfig::punches`] connections may begin at
//! [relays](crate::punching) and become direct once both ends know where the other is.

use std::{
    collections::BTreeSet,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use iroh::{
    EndpointAddr, EndpointId, RelayMap, RelayMode, SecretKey, TransportAddr, Watcher as _,
    address_lookup::AddrFilter,
    endpoint::{
        BindOpts, ConnectError as IrohConnectError, ConnectWithOptsError, ConnectingError, ConnectionError,
        IdleTimeout, Incoming, PortmapperConfig, QuicTransportConfig, RelayStatus, VarInt, presets,
    },
};
use iroh_mdns_address_lookup::{DiscoveryEvent, MdnsAddressLookup};
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use zeroize::Zeroizing;

use crate::certificates::Pins;
use crate::frame::FrameStream;
use crate::punching;
use crate::relay::RelayUrl;

/// One dial waits this long unless the caller says otherwise: a LAN answers in milliseconds, a bad mobile link in one or two seconds, and an address that is silent for longer is stale.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer that is silent for this long is gone: five keep-alives lost in a row, and still within the patience of somebody watching.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A silent connection is kept alive this often, so that [`IDLE_TIMEOUT`] tells a dead peer from a quiet one.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// The public key that names a device and that its connections prove.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub [u8; 32]);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({self})")
    }
}

/// The id of the device with this secret.
pub fn device_id_of(secret: &[u8; 32]) -> DeviceId {
    DeviceId(*iroh::SecretKey::from_bytes(secret).public().as_bytes())
}

/// The interfaces an endpoint listens on.
///
/// Exhaustive, because there is no third kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Every interface.
    Any,
    /// Only this machine can connect.
    Loopback,
}

/// How to bind an [`Endpoint`].
#[derive(Clone)]
pub struct EndpointConfig {
    secret: Zeroizing<[u8; 32]>,
    /// The protocols accepted.
    pub alpns: Vec<Vec<u8>>,
    /// The interfaces to listen on.
    pub bind: Bind,
    /// The UDP port to try first, for IPv4 and IPv6 alike; another is taken where it is not free.
    pub port: Option<u16>,
    /// Whether connections may begin at relays; which ones is said [later](Endpoint::use_relay).
    pub punches: bool,
    /// The mDNS service to announce this device under and to find others by; no mDNS without it.
    pub mdns: Option<String>,
    /// See [`IDLE_TIMEOUT`]; the shorter one of both sides counts.
    pub idle_timeout: Duration,
    /// See [`KEEP_ALIVE`].
    pub keep_alive: Duration,
}

impl EndpointConfig {
    /// An endpoint of the device with this secret, on every interface and a random port, without mDNS.
    pub fn new(secret: &[u8; 32], alpns: Vec<Vec<u8>>) -> Self {
        Self {
            secret: Zeroizing::new(*secret),
            alpns,
            bind: Bind::Any,
            port: None,
            punches: false,
            mdns: None,
            idle_timeout: IDLE_TIMEOUT,
            keep_alive: KEEP_ALIVE,
        }
    }
}

impl fmt::Debug for EndpointConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointConfig")
            .field("secret", &"redacted")
            .field("alpns", &self.alpns)
            .field("bind", &self.bind)
            .field("port", &self.port)
            .field("punches", &self.punches)
            .field("mdns", &self.mdns)
            .field("idle_timeout", &self.idle_timeout)
            .field("keep_alive", &self.keep_alive)
            .finish()
    }
}

/// A device's end of all its connections. Clones share it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    endpoint: iroh::Endpoint,
    mdns: Option<MdnsAddressLookup>,
    warnings: Vec<LinkWarning>,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    addresses: watch::Receiver<Vec<SocketAddr>>,
    /// None where connections are direct only.
    pins: Option<Arc<Pins>>,
    /// The relays that let this device in: iroh never asks one for it twice.
    relays: std::sync::Mutex<BTreeSet<iroh::RelayUrl>>,
    /// The relay at which others find this endpoint, while it is connected there.
    home_relay: watch::Receiver<Option<String>>,
    refused: Arc<AtomicU64>,
    /// The accept loop and the address watch, which end with the endpoint.
    tasks: Mutex<JoinSet<()>>,
}

impl Endpoint {
    /// Binds the sockets and begins to accept.
    ///
    /// mDNS that cannot start is a [warning](Self::warnings), not an error.
    pub async fn bind(config: EndpointConfig) -> Result<Self, BindError> {
        let pins = config.punches.then(Arc::<Pins>::default);
        let endpoint = bind_socket(&config, pins.as_ref()).await?;
        let mut warnings = Vec::new();
        let mdns = config.mdns.and_then(|service| {
            start_mdns(&endpoint, service)
                .inspect_err(|warning| {
                    tracing::info!(%warning, "local discovery is off");
                    warnings.push(warning.clone());
                })
                .ok()
        });

        let mut tasks = JoinSet::new();
        let (ready, accepted) = mpsc::channel(MAX_WAITING);
        let refused = Arc::new(AtomicU64::new(0));
        tasks.spawn(accept_loop(endpoint.clone(), ready, refused.clone()));

        let bound = endpoint.bound_sockets();
        let mut watcher = endpoint.watch_addr();
        let (publish, addresses) = watch::channel(dialable(&watcher.get(), &bound));
        tasks.spawn(async move {
            while let Ok(address) = watcher.updated().await {
                let now = dialable(&address, &bound);
                publish.send_if_modified(|before| {
                    let changed = *before != now;
                    *before = now;
                    changed
                });
            }
        });

        let mut watcher = endpoint.home_relay_status();
        let (publish, home_relay) = watch::channel(connected_relay(&watcher.get()));
        tasks.spawn(async move {
            while let Ok(status) = watcher.updated().await {
                let now = connected_relay(&status);
                publish.send_if_modified(|before| {
                    let changed = *before != now;
                    *before = now;
                    changed
                });
            }
        });

        Ok(Self {
            inner: Arc::new(Inner {
                endpoint,
                mdns,
                warnings,
                accepted: Mutex::new(accepted),
                addresses,
                pins,
                relays: std::sync::Mutex::default(),
                home_relay,
                refused,
                tasks: Mutex::new(tasks),
            }),
        })
    }

    /// The id other devices dial.
    pub fn device_id(&self) -> DeviceId {
        DeviceId(*self.inner.endpoint.id().as_bytes())
    }

    /// The addresses at which this endpoint can be dialled, never empty while its sockets live.
    ///
    /// Loopback ones are among them only where nothing else exists; [`loopback_addresses`](Self::loopback_addresses) serve the same machine in any case.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        dialable(&self.inner.endpoint.addr(), &self.inner.endpoint.bound_sockets())
    }

    /// The addresses at which a process of this machine can dial this endpoint whatever the network does.
    pub fn loopback_addresses(&self) -> Vec<SocketAddr> {
        loopback(&self.inner.endpoint.bound_sockets())
    }

    /// The UDP port of the first socket, IPv4's.
    pub fn bound_port(&self) -> Option<u16> {
        self.inner.endpoint.bound_sockets().first().map(SocketAddr::port)
    }

    /// Tells [`local_addresses`](Self::local_addresses) whenever they change.
    pub fn watch_addresses(&self) -> watch::Receiver<Vec<SocketAddr>> {
        self.inner.addresses.clone()
    }

    /// Tells at which relay others find this endpoint, while it is connected there.
    pub fn watch_home_relay(&self) -> watch::Receiver<Option<String>> {
        self.inner.home_relay.clone()
    }

    /// Whether connections may begin at relays.
    pub fn punches(&self) -> bool {
        self.inner.pins.is_some()
    }

    /// Has connections begin at this relay too, where `pass` lets this device in; true if that is news.
    pub async fn use_relay(&self, url: &RelayUrl, pass: &str) -> bool {
        let (Some(pins), Some(entry)) = (&self.inner.pins, punching::entry(url, pass)) else { return false };
        pins.add(url);
        self.insert(Arc::new(entry)).await
    }

    /// Has no further connection begin at relays but these and n0's.
    ///
    /// What was the only one stays connected until another is used or the endpoint is closed: iroh gives up no last one.
    pub async fn keep_relays(&self, urls: &[RelayUrl]) {
        let kept: BTreeSet<_> = urls.iter().filter_map(punching::place).collect();
        let used = self.relays().clone();
        for url in used.difference(&kept).filter(|url| !punching::public().contains(url)) {
            self.remove(url).await;
        }
    }

    /// Whether connections may also begin at n0's relays, which take everyone.
    pub async fn use_public_relays(&self, used: bool) {
        for config in punching::public().relays::<Vec<_>>() {
            if used && self.punches() {
                self.insert(config).await;
            } else {
                self.remove(&config.url).await;
            }
        }
    }

    /// The public relay at which others find this endpoint, while it is connected there.
    pub fn public_relay(&self) -> Option<String> {
        let home = self.inner.home_relay.borrow().clone();
        home.filter(|url| url.parse().is_ok_and(|url| punching::public().contains(&url)))
    }

    fn relays(&self) -> std::sync::MutexGuard<'_, BTreeSet<iroh::RelayUrl>> {
        self.inner.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn insert(&self, config: Arc<iroh::RelayConfig>) -> bool {
        if self.relays().contains(&config.url) {
            return false;
        }
        self.inner.endpoint.insert_relay(config.url.clone(), config.clone()).await;
        self.relays().insert(config.url.clone())
    }

    async fn remove(&self, url: &iroh::RelayUrl) {
        if self.relays().remove(url) {
            self.inner.endpoint.remove_relay(url).await;
        }
    }

    /// What does not work and can be done without.
    pub fn warnings(&self) -> &[LinkWarning] {
        &self.inner.warnings
    }

    /// Incoming handshakes that failed or were turned away.
    pub fn refused(&self) -> u64 {
        self.inner.refused.load(Ordering::Relaxed)
    }

    /// Tells iroh that the network may have changed, where it cannot notice: after sleep, and on Android.
    pub async fn network_changed(&self) {
        self.inner.endpoint.network_change().await;
    }

    /// Connects to a device at any of these addresses, of which the first 32 count, and at those mDNS finds.
    ///
    /// Cancel safe: a connection dropped half-way closes.
    pub async fn connect(
        &self,
        device: DeviceId,
        addresses: &[SocketAddr],
        alpn: &[u8],
        wait: Duration,
    ) -> Result<Connection, ConnectError> {
        self.connect_through(device, addresses, &Relays::default(), alpn, wait).await
    }

    /// Connects to a device as [`connect`](Self::connect) does, and through these relays meanwhile.
    ///
    /// Of relays that others told only n0's count, so that nobody has this endpoint turn to one of their choice.
    pub async fn connect_through(
        &self,
        device: DeviceId,
        addresses: &[SocketAddr],
        relays: &Relays,
        alpn: &[u8],
        wait: Duration,
    ) -> Result<Connection, ConnectError> {
        let id = EndpointId::from_bytes(&device.0).map_err(|_| ConnectError::BadDevice)?;
        let dialled = addresses.iter().copied().take(MAX_DIALLED);
        let mut address = EndpointAddr::from_parts(id, dialled.map(TransportAddr::Ip));
        if self.punches() {
            let (public, used) = (punching::public(), self.relays().clone());
            let told = relays.told.iter().filter_map(|text| text.parse().ok()).filter(|url| public.contains(url));
            let ours = relays.ours.iter().filter_map(punching::place);
            // one that does not let this device in yet would not do so later either
            let dialled = ours.chain(told).filter(|url| used.contains(url)).take(MAX_RELAYS_DIALLED);
            address.addrs.extend(dialled.map(TransportAddr::Relay));
        }
        match timeout(wait, self.inner.endpoint.connect(address, alpn)).await {
            Ok(Ok(connection)) => Ok(Connection { inner: connection }),
            Ok(Err(error)) => Err(ConnectError::new(error, wait)),
            Err(_) => Err(ConnectError::Timeout(wait)),
        }
    }

    /// Returns the next connection a peer has made, or `None` once the endpoint is closed. Cancel safe.
    pub async fn accept(&self) -> Option<Connection> {
        self.inner.accepted.lock().await.recv().await
    }

    /// Devices that mDNS finds from now on; `None` without mDNS.
    pub async fn discovered(&self) -> Option<Discoveries> {
        let mut events = self.inner.mdns.as_ref()?.subscribe().await;
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        let mut task = JoinSet::new();
        task.spawn(async move {
            while let Some(event) = events.next().await {
                let Some(discovery) = Discovery::new(event) else {
                    continue;
                };
                if sender.send(discovery).await.is_err() {
                    return;
                }
            }
        });
        Some(Discoveries { receiver, _task: task })
    }

    /// Closes every connection and waits a little for the peers to hear of it.
    ///
    /// The port is free again once the last clone is dropped.
    pub async fn close(&self) {
        self.inner.endpoint.close().await;
        // they hold the sockets too
        self.inner.tasks.lock().await.shutdown().await;
    }
}

/// The relays at which a device may be found.
#[derive(Clone, Debug, Default)]
pub struct Relays {
    /// Those of a group that the device belongs to, which let this one in.
    pub ours: Vec<RelayUrl>,
    /// Where it says that it is, among other addresses.
    pub told: Vec<String>,
}

/// The way that a connection takes at present.
///
/// Exhaustive, because there is no third.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// From one device to the other, whose address this is.
    Direct(SocketAddr),
    /// Through this relay.
    Relayed(String),
}

/// An authenticated connection to a device. Clones share it; it closes when the last is dropped.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: iroh::endpoint::Connection,
}

impl Connection {
    /// The device on the other side, as its handshake proved.
    pub fn remote_device(&self) -> DeviceId {
        DeviceId(*self.inner.remote_id().as_bytes())
    }

    /// The protocol both sides agreed on.
    pub fn alpn(&self) -> &[u8] {
        self.inner.alpn()
    }

    /// Derives 32 bytes that only the two ends of this connection know (TLS exporter).
    ///
    /// # Errors
    /// Only where the TLS library refuses, which it has no reason to.
    pub fn export(&self, label: &[u8], context: &[u8]) -> Result<[u8; 32], ExportError> {
        let mut output = [0; 32];
        self.inner.export_keying_material(&mut output, label, context).map_err(|_| ExportError)?;
        Ok(output)
    }

    /// Opens a stream whose frames are at most `max_frame` bytes; the peer hears of it with the first frame.
    ///
    /// Waits while the peer has as many streams open as it allows. Cancel safe.
    pub async fn open_stream(&self, max_frame: usize) -> Result<FrameStream, CloseReason> {
        let (send, receive) = self.inner.open_bi().await?;
        Ok(FrameStream::new(send, receive, max_frame))
    }

    /// Waits for a stream the peer opens. Cancel safe.
    pub async fn accept_stream(&self, max_frame: usize) -> Result<FrameStream, CloseReason> {
        let (send, receive) = self.inner.accept_bi().await?;
        Ok(FrameStream::new(send, receive, max_frame))
    }

    /// Closes the connection at once; what is not delivered yet may be lost.
    pub fn close(&self, code: u32, reason: &str) {
        self.inner.close(VarInt::from_u32(code), reason.as_bytes());
    }

    /// Waits for the end of the connection. Cancel safe.
    pub async fn closed(&self) -> CloseReason {
        self.inner.closed().await.into()
    }

    /// The way in use, where one is known.
    pub fn way(&self) -> Option<Way> {
        self.best_path(|path| match path.remote_addr() {
            TransportAddr::Ip(address) => Some(Way::Direct(*address)),
            TransportAddr::Relay(url) => Some(Way::Relayed(url.to_string())),
            _ => None,
        })
    }

    /// The peer's address, where the way in use is direct.
    pub fn remote_address(&self) -> Option<SocketAddr> {
        match self.way()? {
            Way::Direct(address) => Some(address),
            Way::Relayed(_) => None,
        }
    }

    /// The round-trip time on the path in use, where one is known.
    pub fn rtt(&self) -> Option<Duration> {
        self.best_path(|path| Some(path.rtt()))
    }

    /// Asks the selected path, or the first that answers while none is selected.
    fn best_path<T>(&self, ask: impl Fn(&iroh::endpoint::Path<'_>) -> Option<T>) -> Option<T> {
        let paths = self.inner.paths();
        match paths.iter().find(|path| path.is_selected()) {
            Some(selected) => ask(&selected),
            None => paths.iter().find_map(|path| ask(&path)),
        }
    }
}

/// Devices found on the local network.
#[derive(Debug)]
pub struct Discoveries {
    receiver: mpsc::Receiver<Discovery>,
    _task: JoinSet<()>,
}

impl Discoveries {
    /// Returns the next event, or `None` once discovery has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Discovery> {
        self.receiver.recv().await
    }
}

/// What mDNS noticed. Nothing of it is authenticated before a connection is.
///
/// Exhaustive, because mDNS has no third event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// A device announces these addresses.
    Found {
        /// Who it says it is.
        device: DeviceId,
        /// Where it says it can be dialled.
        addresses: Vec<SocketAddr>,
    },
    /// A device has fallen silent.
    Gone {
        /// Who it was.
        device: DeviceId,
    },
}

impl Discovery {
    fn new(event: DiscoveryEvent) -> Option<Self> {
        match event {
            DiscoveryEvent::Discovered { endpoint_info, .. } => Some(Self::Found {
                device: DeviceId(*endpoint_info.endpoint_id.as_bytes()),
                addresses: endpoint_info.ip_addrs().copied().collect(),
            }),
            DiscoveryEvent::Expired { endpoint_id } => Some(Self::Gone { device: DeviceId(*endpoint_id.as_bytes()) }),
            _ => None,
        }
    }
}

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// This side closed it.
    #[error("closed here")]
    Local,
    /// The peer closed it.
    #[error("closed by the peer with code {code} {reason:?}")]
    Peer {
        /// The peer's code.
        code: u64,
        /// The peer's words, which may hold anything; at most a packet.
        reason: String,
    },
    /// The peer was silent for too long.
    #[error("peer has fallen silent")]
    TimedOut,
    /// The peer no longer knows the connection.
    #[error("peer has restarted")]
    Reset,
    /// The handshake or the transport failed.
    #[error("transport failed: {0}")]
    Transport(String),
}

impl From<ConnectionError> for CloseReason {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::LocallyClosed => Self::Local,
            ConnectionError::ApplicationClosed(close) => Self::Peer {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::Reset => Self::Reset,
            ConnectionError::VersionMismatch
            | ConnectionError::TransportError(_)
            | ConnectionError::ConnectionClosed(_)
            | ConnectionError::CidsExhausted => Self::Transport(error.to_string()),
        }
    }
}

/// Why a dial failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The device id is no public key.
    #[error("device id is not a valid key")]
    BadDevice,
    /// The device id is this endpoint's own.
    #[error("cannot connect a device to itself")]
    Myself,
    /// No address was given and none was found.
    #[error("no address of the device is known")]
    NoAddress,
    /// Nothing answered in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The peer, or the handshake with it, ended the attempt.
    #[error("connection refused: {0}")]
    Refused(#[source] CloseReason),
    /// This endpoint is closed.
    #[error("endpoint is closed")]
    Closed,
    /// iroh could not begin.
    #[error("dial failed: {0}")]
    Failed(String),
}

impl ConnectError {
    fn new(error: IrohConnectError, wait: Duration) -> Self {
        let reason = match error {
            IrohConnectError::Connect { source, .. } => {
                return match source {
                    ConnectWithOptsError::SelfConnect { .. } => Self::Myself,
                    ConnectWithOptsError::NoAddress { .. } => Self::NoAddress,
                    ConnectWithOptsError::EndpointClosed { .. } => Self::Closed,
                    other => Self::Failed(other.to_string()),
                };
            }
            IrohConnectError::Connecting { source, .. } => match source {
                ConnectingError::ConnectionError { source, .. } => source,
                other => return Self::Failed(other.to_string()),
            },
            IrohConnectError::Connection { source, .. } => source,
            other => return Self::Failed(other.to_string()),
        };
        match reason.into() {
            CloseReason::TimedOut => Self::Timeout(wait),
            CloseReason::Local => Self::Closed,
            reason => Self::Refused(reason),
        }
    }
}

/// The endpoint could not be bound.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The idle timeout is out of QUIC's range.
    #[error("idle timeout of {0:?} is out of range")]
    IdleTimeout(Duration),
    /// No socket could be opened.
    #[error("cannot open a UDP socket, check that this machine has a network interface: {0}")]
    Socket(String),
}

/// The TLS library derived nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("connection gives no keying material")]
pub struct ExportError;

/// Something that an endpoint does without.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkWarning {
    /// Devices on the local network will not find each other by mDNS.
    #[error("local discovery is off: {0}")]
    Mdns(String),
}

async fn bind_socket(config: &EndpointConfig, pins: Option<&Arc<Pins>>) -> Result<iroh::Endpoint, BindError> {
    let preferred = match config.port {
        Some(port) if becomes_free(config.bind, port).await => Some(port),
        _ => None,
    };
    let ports = preferred.into_iter().chain(std::iter::repeat_with(|| random_port(config.bind)).take(BIND_TRIES));
    let mut last_error = String::new();
    for port in ports {
        match builder(config, port, pins)?.bind().await {
            Ok(endpoint) => return Ok(endpoint),
            // somebody may have taken the port since it was free
            Err(error) => last_error = format!("{error:#}"),
        }
        tracing::debug!(port, last_error, "bind failed");
    }
    Err(BindError::Socket(last_error))
}

fn builder(config: &EndpointConfig, port: u16, pins: Option<&Arc<Pins>>) -> Result<iroh::endpoint::Builder, BindError> {
    let [v4, v6] = bind_ips(config.bind);
    let invalid = |error: iroh::endpoint::InvalidSocketAddr| BindError::Socket(error.to_string());
    let builder = iroh::Endpoint::builder(presets::Minimal);
    let builder = match pins {
        // relays come and go while the endpoint lives
        Some(pins) => builder.relay_mode(RelayMode::Custom(RelayMap::empty())).ca_tls_config(punching::tls(pins)),
        None => builder.relay_mode(RelayMode::Disabled),
    };
    builder
        .portmapper_config(PortmapperConfig::Disabled)
        .secret_key(SecretKey::from_bytes(&config.secret))
        .alpns(config.alpns.clone())
        .transport_config(transport(config)?)
        .clear_ip_transports()
        .bind_addr(SocketAddr::new(v4, port))
        .map_err(invalid)?
        .bind_addr_with_opts(
            SocketAddr::new(v6, port),
            // many containers have no IPv6
            BindOpts::default().set_is_required(false),
        )
        .map_err(invalid)
}

fn transport(config: &EndpointConfig) -> Result<QuicTransportConfig, BindError> {
    let idle = IdleTimeout::try_from(config.idle_timeout).map_err(|_| BindError::IdleTimeout(config.idle_timeout))?;
    Ok(QuicTransportConfig::builder()
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(config.keep_alive)
        .default_path_max_idle_timeout(path_idle(config))
        .default_path_keep_alive_interval(config.keep_alive.min(MAX_PATH_KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .build())
}

/// Silence after which a path is given up; where a relay's is beside it, before the connection is.
fn path_idle(config: &EndpointConfig) -> Duration {
    let idle = if config.punches { config.idle_timeout / 2 } else { config.idle_timeout };
    idle.min(MAX_PATH_IDLE)
}

fn connected_relay(status: &[RelayStatus]) -> Option<String> {
    status.iter().find(|relay| relay.is_connected()).map(|relay| relay.url().to_string())
}

/// Waits a moment for a port: the endpoint that had it before may be going down just now.
async fn becomes_free(bind: Bind, port: u16) -> bool {
    let mut look = tokio::time::interval(PORT_LOOK_EVERY);
    let free = async {
        loop {
            look.tick().await;
            if free_port(bind, port).is_some() {
                return;
            }
        }
    };
    timeout(PORT_PATIENCE, free).await.is_ok()
}

/// Picks a port that is free for IPv4 and IPv6, or leaves the choice to the system.
fn random_port(bind: Bind) -> u16 {
    (0..BIND_TRIES).find_map(|_| free_port(bind, 0)).unwrap_or(0)
}

/// Returns the port, or one of the system's choice for 0, if it is free for IPv4 and IPv6.
fn free_port(bind: Bind, wanted: u16) -> Option<u16> {
    let [v4, v6] = bind_ips(bind);
    let port = probe(v4, wanted).ok()?;
    match probe(v6, port).map_err(|error| error.kind()) {
        Err(io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => None,
        // free, or this machine has no IPv6
        Ok(_) | Err(_) => Some(port),
    }
}

/// Binds a UDP socket for a moment and returns its port.
fn probe(ip: IpAddr, port: u16) -> io::Result<u16> {
    let address = SocketAddr::new(ip, port);
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    if ip.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    let bound = socket.local_addr()?.as_socket();
    bound.map(|address| address.port()).ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))
}

fn bind_ips(bind: Bind) -> [IpAddr; 2] {
    match bind {
        Bind::Any => [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        Bind::Loopback => [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
    }
}

fn start_mdns(endpoint: &iroh::Endpoint, service: String) -> Result<MdnsAddressLookup, LinkWarning> {
    let mdns = MdnsAddressLookup::builder()
        .service_name(service)
        .addr_filter(AddrFilter::ip_only())
        .build(endpoint.id())
        .map_err(|error| LinkWarning::Mdns(format!("{error:#}")))?;
    endpoint.address_lookup().map_err(|error| LinkWarning::Mdns(format!("{error:#}")))?.add(mdns.clone());
    Ok(mdns)
}

/// Finishes handshakes beside each other, so that a slow peer holds up no one.
async fn accept_loop(endpoint: iroh::Endpoint, ready: mpsc::Sender<Connection>, refused: Arc<AtomicU64>) {
    let mut handshakes = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            Some(_) = handshakes.join_next(), if !handshakes.is_empty() => continue,
        };
        let Some(incoming) = incoming else {
            return;
        };
        if handshakes.len() >= MAX_HANDSHAKES {
            refused.fetch_add(1, Ordering::Relaxed);
            incoming.refuse();
        } else if handshakes.len() >= MAX_HANDSHAKES / 2 && !incoming.remote_addr_validated() {
            // makes the peer prove its address; fails only for one that has
            let _ = incoming.retry();
        } else {
            handshakes.spawn(handshake(incoming, ready.clone(), refused.clone()));
        }
    }
}

async fn handshake(incoming: Incoming, ready: mpsc::Sender<Connection>, refused: Arc<AtomicU64>) {
    match timeout(DIAL_TIMEOUT, incoming).await {
        Ok(Ok(connection)) => {
            // fails only when the endpoint is gone
            let _ = ready.send(Connection { inner: connection }).await;
        }
        Ok(Err(error)) => {
            refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%error, "incoming handshake failed");
        }
        Err(_) => {
            refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!("incoming handshake took too long");
        }
    }
}

fn dialable(address: &EndpointAddr, bound: &[SocketAddr]) -> Vec<SocketAddr> {
    let found: BTreeSet<SocketAddr> = address.ip_addrs().copied().collect();
    if found.is_empty() {
        return loopback(bound);
    }
    found.into_iter().collect()
}

/// The addresses of sockets as this machine reaches them.
fn loopback(bound: &[SocketAddr]) -> Vec<SocketAddr> {
    bound
        .iter()
        .map(|address| match address.ip() {
            ip if !ip.is_unspecified() => *address,
            IpAddr::V4(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port()),
            IpAddr::V6(_) => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), address.port()),
        })
        .collect()
}

/// Bytes a peer may send ahead on one stream: 12.5 MB/s at a round trip of 100 ms, and more over several streams.
///
/// More is slower on a fast link and dangerous on any: twice as much overflows the receiver's socket buffer, which halves the speed over loopback, and noq gives a connection up once lost packets leave more than 1024 gaps in a stream.
const STREAM_WINDOW: u32 = 1_250_000;

/// Bytes a peer may send ahead on all streams together, which bounds the memory it can claim.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Bytes under way to a peer that it has not acknowledged, kept in memory until it has.
const SEND_WINDOW: u64 = 8 * 1024 * 1024;

/// Streams a peer may have open at once: a session or two per shared group, and some for bulk content.
const MAX_STREAMS: u32 = 128;

/// iroh takes no longer idle time for one path.
const MAX_PATH_IDLE: Duration = Duration::from_secs(15);

/// iroh takes no longer keep-alive for one path.
const MAX_PATH_KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Addresses one dial sends to at once; peers say where they are, and could name victims.
const MAX_DIALLED: usize = 32;

/// Relays that one dial turns to: as many as a group may have.
const MAX_RELAYS_DIALLED: usize = 8;

/// Handshakes under way at once; each costs a signature and some kilobytes, and may be a stranger's.
const MAX_HANDSHAKES: usize = 64;

/// Connections and discoveries that wait for the caller: more than a home has peers, few enough to forget.
const MAX_WAITING: usize = 32;

/// A preferred port is waited for this long; an endpoint lets go of it within milliseconds.
const PORT_PATIENCE: Duration = Duration::from_millis(200);

/// How often a preferred port is looked at meanwhile.
const PORT_LOOK_EVERY: Duration = Duration::from_millis(10);

/// Attempts to find a port free for IPv4 and IPv6; one is enough unless something else takes ports at this moment.
const BIND_TRIES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_on_every_interface_are_dialled_over_loopback_when_nothing_else_is_known() {
        let address = EndpointAddr::new(SecretKey::from_bytes(&[7; 32]).public());
        let bound: Vec<SocketAddr> =
            vec!["0.0.0.0:4000".parse().expect("address"), "[::]:4001".parse().expect("address")];
        let expected: Vec<SocketAddr> =
            vec!["127.0.0.1:4000".parse().expect("address"), "[::1]:4001".parse().expect("address")];
        assert_eq!(dialable(&address, &bound), expected);
    }

    #[test]
    fn the_secret_is_not_in_the_debug_output() {
        let config = EndpointConfig::new(&[0xAB; 32], Vec::new());
        let text = format!("{config:?}");
        assert!(text.contains("redacted"), "{text}");
        assert!(!text.contains("171"), "{text}");
    }
}
