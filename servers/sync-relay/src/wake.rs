//! Wakes devices that are away: an empty POST to the address that each left here, when something arrives for it.
//!
//! The address is one of a push service, as UnifiedPush gives them to apps.
//! A member may name any, so only `https` is asked, only at addresses of the public internet, which are dialled as they
//! were resolved; nobody is followed elsewhere, and nobody is asked often.
//!
//! Nothing of it is written to disk: a backup shows nobody's push service.
//! A device says its address again whenever it connects.

mod public;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, Uri, header};
use futures_util::future::{Either, select};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use sync_types::bounds::MAX_WAKE_URL;
use sync_types::{AuthorId, Cursor, GroupId};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use self::public::is_public;
use crate::limiter::Limiter;
use crate::metrics::Counter;

/// Devices that left an address: ten for each connection that a relay takes unless told otherwise.
const MAX_WAKES: usize = 10_000;
/// Of one group: more than sleep in any.
const MAX_OF_GROUP: usize = 64;
/// Requests under way at once.
const MAX_UNDER_WAY: usize = 16;
/// Time for one, from the name to the answer.
const WAIT: Duration = Duration::from_secs(10);
/// Time in which a device that was woken and did not come is not woken again.
const AGAIN_AFTER: Duration = Duration::from_secs(600);
/// Requests for one device in a minute, which may come and go meanwhile.
const OF_DEVICE_PER_MINUTE: u32 = 6;
/// Requests to one host in a minute, whoever named it.
const OF_HOST_PER_MINUTE: u32 = 120;
/// Seconds for which a push service keeps what it cannot deliver: as long as entries are kept here.
const KEEP_SECONDS: u32 = 7 * 24 * 3600;
/// Bytes of the head of an answer.
const MAX_ANSWER: usize = 16 << 10;
/// The port of `https`.
const PORT: u16 = 443;

/// A device in one group.
type Key = (GroupId, AuthorId);

/// Who is to be woken, and how.
pub(crate) struct Wakes {
    state: Mutex<State>,
    devices: Limiter<Key>,
    hosts: Limiter<String>,
    room: Semaphore,
    /// Which addresses may be dialled.
    allowed: fn(IpAddr) -> bool,
    tls: TlsConnector,
    wait: Duration,
    stop: CancellationToken,
    pub(crate) woken: Counter,
    pub(crate) not_woken: Counter,
    pub(crate) refused: Counter,
}

#[derive(Default)]
struct State {
    wakes: HashMap<Key, Wake>,
    /// Connections of each device.
    online: HashMap<Key, usize>,
}

struct Wake {
    url: WakeUrl,
    /// Something was sent to it that it never acknowledged.
    missed: Arc<Notify>,
    /// When it was woken, unless it came since.
    told: Option<Instant>,
    cancel: CancellationToken,
}

/// Why an address is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum WakeRefused {
    /// It is no address of a push service.
    #[error("no https address")]
    Malformed,
    /// There is no room for another one.
    #[error("too many devices are to be woken")]
    TooMany,
}

/// Why a device could not be woken.
#[derive(Debug, thiserror::Error)]
enum AskError {
    /// Its host has no address that may be dialled.
    #[error("the host has no public address")]
    NotPublic,
    /// Its host has no name that a certificate can have.
    #[error(transparent)]
    Name(#[from] InvalidDnsNameError),
    /// Nobody answers.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// What answers is no web server.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// It takes too long.
    #[error("no answer in time")]
    Late,
}

/// Where a device is woken.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WakeUrl {
    host: String,
    port: u16,
    uri: Uri,
}

impl WakeUrl {
    fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok().filter(|_| text.len() <= MAX_WAKE_URL)?;
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None if authority.as_str() == authority.host() => PORT,
            None => return None,
        };
        (uri.scheme_str() == Some("https") && !host.is_empty()).then_some(Self { host, port, uri })
    }
}

impl Wakes {
    /// Asks hosts of the public internet, which prove their names by the certificates that browsers accept.
    pub(crate) fn new(stop: CancellationToken) -> Arc<Self> {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        Self::with(is_public, roots, WAIT, stop)
    }

    fn with(allowed: fn(IpAddr) -> bool, roots: RootCertStore, wait: Duration, stop: CancellationToken) -> Arc<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("BUG: the provider has suites of TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(Self {
            state: Mutex::default(),
            devices: Limiter::new(OF_DEVICE_PER_MINUTE),
            hosts: Limiter::new(OF_HOST_PER_MINUTE),
            room: Semaphore::new(MAX_UNDER_WAY),
            allowed,
            tls: TlsConnector::from(Arc::new(tls)),
            wait,
            stop,
            woken: Counter::default(),
            not_woken: Counter::default(),
            refused: Counter::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a device has a connection, until what is returned is dropped.
    pub(crate) fn enter(self: &Arc<Self>, group: GroupId, author: AuthorId) -> Online {
        let key = (group, author);
        let mut state = self.lock();
        *state.online.entry(key).or_default() += 1;
        if let Some(wake) = state.wakes.get_mut(&key) {
            wake.told = None;
        }
        Online { wakes: self.clone(), key, sent: Cursor(0), acknowledged: Cursor(0) }
    }

    /// Wakes a device from now on at the address that it names; an empty one ends that.
    fn set(self: &Arc<Self>, key: Key, url: &str, mut newest: watch::Receiver<Cursor>) -> Result<(), WakeRefused> {
        newest.mark_unchanged();
        let mut state = self.lock();
        let url = match url {
            "" => None,
            url => Some(WakeUrl::parse(url).ok_or(WakeRefused::Malformed)?),
        };
        if state.wakes.get(&key).map(|wake| &wake.url) == url.as_ref() {
            return Ok(());
        }
        if let Some(before) = state.wakes.remove(&key) {
            before.cancel.cancel();
        }
        let Some(url) = url else { return Ok(()) };
        let of_group = state.wakes.keys().filter(|(group, _)| *group == key.0).count();
        if state.wakes.len() >= MAX_WAKES || of_group >= MAX_OF_GROUP {
            return Err(WakeRefused::TooMany);
        }
        let (missed, cancel) = (Arc::new(Notify::new()), self.stop.child_token());
        let wake = Wake { url: url.clone(), missed: missed.clone(), told: None, cancel: cancel.clone() };
        state.wakes.insert(key, wake);
        tokio::spawn(self.clone().follow(key, url, newest, missed, cancel));
        Ok(())
    }

    /// Wakes one device whenever something arrives while it is away.
    async fn follow(
        self: Arc<Self>,
        key: Key,
        url: WakeUrl,
        mut newest: watch::Receiver<Cursor>,
        missed: Arc<Notify>,
        cancel: CancellationToken,
    ) {
        loop {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() {
                    return;
                },
                () = missed.notified() => {}
                () = cancel.cancelled() => return,
            }
            if !self.is_due(&key, &url) {
                continue;
            }
            let asked = tokio::select! {
                asked = self.ask(&url) => asked,
                () = cancel.cancelled() => return,
            };
            match asked {
                Ok(status) if status.is_success() => {
                    self.woken.add(1);
                    continue;
                }
                // the push service knows nobody there any more
                Ok(StatusCode::NOT_FOUND | StatusCode::GONE) => {
                    self.not_woken.add(1);
                    self.lock().wakes.remove(&key);
                    return;
                }
                Ok(status) => tracing::debug!(%status, "device could not be woken"),
                Err(error) => tracing::debug!(%error, "device could not be woken"),
            }
            self.not_woken.add(1);
            if let Some(wake) = self.lock().wakes.get_mut(&key) {
                // what arrives next is another occasion
                wake.told = None;
            }
        }
    }

    /// Whether a device is to be woken now, which then counts as done.
    fn is_due(&self, key: &Key, url: &WakeUrl) -> bool {
        let mut state = self.lock();
        let online = state.online.contains_key(key);
        let Some(wake) = state.wakes.get_mut(key) else { return false };
        let now = Instant::now();
        let told = wake.told.is_some_and(|told| now.saturating_duration_since(told) < AGAIN_AFTER);
        if online || told || !self.devices.take(*key, now) || !self.hosts.take(url.host.clone(), now) {
            return false;
        }
        wake.told = Some(now);
        true
    }

    async fn ask(&self, url: &WakeUrl) -> Result<StatusCode, AskError> {
        let _room = self.room.acquire().await;
        tokio::time::timeout(self.wait, self.post(url)).await.map_err(|_| AskError::Late)?
    }

    async fn post(&self, url: &WakeUrl) -> Result<StatusCode, AskError> {
        let mut found = lookup_host((url.host.as_str(), url.port)).await?;
        let address = found.find(|address| (self.allowed)(address.ip())).ok_or(AskError::NotPublic)?;
        let name = ServerName::try_from(url.host.clone())?;
        let stream = self.tls.connect(name, TcpStream::connect(address).await?).await?;
        let mut http = http1::Builder::new();
        let (mut sender, connection) = http.max_buf_size(MAX_ANSWER).handshake(TokioIo::new(stream)).await?;
        let mut request = Request::new(Body::empty());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = url.uri.path_and_query().map_or_else(Uri::default, |path| path.clone().into());
        if let Some(Ok(host)) = url.uri.authority().map(|authority| authority.as_str().parse()) {
            request.headers_mut().insert(header::HOST, host);
        }
        request.headers_mut().insert(header::CONTENT_LENGTH, 0.into());
        request.headers_mut().insert("ttl", KEEP_SECONDS.into());
        let asked = std::pin::pin!(sender.send_request(request));
        let answer = match select(asked, std::pin::pin!(connection)).await {
            Either::Left((answer, _)) => answer,
            // it may have ended right behind its answer
            Either::Right((_, asked)) => asked.await,
        };
        Ok(answer?.status())
    }
}

/// A connection of a device.
pub(crate) struct Online {
    wakes: Arc<Wakes>,
    key: Key,
    sent: Cursor,
    acknowledged: Cursor,
}

impl Online {
    /// Wakes this device from now on at the address that it names; an empty one ends that.
    pub(crate) fn set(&self, url: &str, newest: watch::Receiver<Cursor>) {
        if let Err(reason) = self.wakes.set(self.key, url, newest) {
            tracing::debug!(%reason, "device will not be woken");
            self.wakes.refused.add(1);
        }
    }

    /// Notes that it was sent what arrived up to a cursor.
    pub(crate) fn sent(&mut self, cursor: Cursor) {
        self.sent = self.sent.max(cursor);
    }

    /// Notes that it has what it was sent up to a cursor.
    pub(crate) fn acknowledged(&mut self, cursor: Cursor) {
        self.acknowledged = self.acknowledged.max(cursor);
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        let mut state = self.wakes.lock();
        if let Some(count) = state.online.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                state.online.remove(&self.key);
            }
        }
        // it may have been asleep for as long as its connection was held
        if self.sent > self.acknowledged
            && let Some(wake) = state.wakes.get(&self.key)
        {
            wake.missed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rustls::ServerConfig;
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const KEY: Key = (GroupId([1; 32]), AuthorId([2; 32]));
    /// Longer than anything here takes on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// In which nothing more comes.
    const MOMENT: Duration = Duration::from_millis(300);

    /// A push service on this machine, and a relay that may ask it.
    struct Service {
        address: SocketAddr,
        wakes: Arc<Wakes>,
        asked: mpsc::Receiver<String>,
    }

    impl Service {
        /// One that answers everything like this; nothing for none.
        async fn new(answer: &'static str) -> Self {
            let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            let mut roots = RootCertStore::empty();
            roots.add(made.cert.der().clone()).unwrap();
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
            let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![made.cert.der().clone()], key)
                .unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (told, asked) = mpsc::channel(16);
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let mut stream = acceptor.accept(stream).await.unwrap();
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(stream.read_u8().await.unwrap());
                    }
                    told.send(String::from_utf8(head).unwrap()).await.unwrap();
                    if answer.is_empty() {
                        std::future::pending::<()>().await;
                    }
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    stream.shutdown().await.unwrap();
                }
            });
            let wait = if answer.is_empty() { MOMENT } else { PATIENCE };
            Self { address, wakes: Wakes::with(|_| true, roots, wait, CancellationToken::new()), asked }
        }

        fn url(&self) -> String {
            format!("https://localhost:{}/push?device=1", self.address.port())
        }

        async fn asked(&mut self) -> String {
            tokio::time::timeout(PATIENCE, self.asked.recv()).await.unwrap().unwrap()
        }

        async fn is_left_alone(&mut self) -> bool {
            tokio::time::timeout(MOMENT, self.asked.recv()).await.is_err()
        }
    }

    async fn until(what: impl Fn() -> bool) {
        let give_up = Instant::now() + PATIENCE;
        while !what() {
            assert!(Instant::now() < give_up);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_device_that_is_away_is_woken_once_by_an_empty_post_until_it_comes() {
        let mut service = Service::new("HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n").await;
        let (arrive, newest) = watch::channel(Cursor(1));
        let online = service.wakes.enter(KEY.0, KEY.1);
        online.set(&service.url(), newest.clone());
        arrive.send_replace(Cursor(2));
        assert!(service.is_left_alone().await, "it is here");
        drop(online);
        assert!(service.is_left_alone().await, "nothing arrived since");
        arrive.send_replace(Cursor(3));
        let asked = service.asked().await.to_ascii_lowercase();
        assert!(asked.starts_with("post /push?device=1 http/1.1\r\n"), "{asked}");
        let host = format!("host: localhost:{}\r\n", service.address.port());
        assert!(asked.contains(&host) && asked.contains("content-length: 0") && asked.contains("ttl: "), "{asked}");
        arrive.send_replace(Cursor(4));
        assert!(service.is_left_alone().await, "it knows that it is to come");
        // it comes, says the same again, and goes
        let online = service.wakes.enter(KEY.0, KEY.1);
        online.set(&service.url(), newest.clone());
        drop(online);
        arrive.send_replace(Cursor(5));
        service.asked().await;
        until(|| service.wakes.woken.get() == 2).await;
        service.wakes.enter(KEY.0, KEY.1).set("", newest);
        arrive.send_replace(Cursor(6));
        assert!(service.is_left_alone().await, "it took that back");
    }

    #[tokio::test]
    async fn a_device_that_never_acknowledged_what_it_was_sent_is_woken_when_its_connection_ends() {
        let mut service = Service::new("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let (_arrive, newest) = watch::channel(Cursor(1));
        let mut online = service.wakes.enter(KEY.0, KEY.1);
        online.set(&service.url(), newest.clone());
        online.sent(Cursor(1));
        online.acknowledged(Cursor(1));
        drop(online);
        assert!(service.is_left_alone().await);
        let mut online = service.wakes.enter(KEY.0, KEY.1);
        online.sent(Cursor(1));
        drop(online);
        service.asked().await;
    }

    #[tokio::test]
    async fn nobody_is_followed_elsewhere() {
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let location = elsewhere.local_addr().unwrap();
        let answer = format!("HTTP/1.1 307 Moved\r\nlocation: https://{location}/\r\ncontent-length: 0\r\n\r\n");
        let mut service = Service::new(answer.leak()).await;
        let (arrive, newest) = watch::channel(Cursor(1));
        service.wakes.set(KEY, &service.url(), newest).unwrap();
        arrive.send_replace(Cursor(2));
        service.asked().await;
        until(|| service.wakes.not_woken.get() == 1).await;
        assert!(tokio::time::timeout(MOMENT, elsewhere.accept()).await.is_err());
        // and the next arrival is another occasion
        arrive.send_replace(Cursor(3));
        service.asked().await;
    }

    #[tokio::test]
    async fn whom_the_push_service_does_not_know_any_more_is_forgotten() {
        let mut service = Service::new("HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n").await;
        let (arrive, newest) = watch::channel(Cursor(1));
        service.wakes.set(KEY, &service.url(), newest).unwrap();
        arrive.send_replace(Cursor(2));
        service.asked().await;
        until(|| service.wakes.lock().wakes.is_empty()).await;
        arrive.send_replace(Cursor(3));
        assert!(service.is_left_alone().await);
    }

    #[tokio::test]
    async fn a_service_that_does_not_answer_is_waited_for_no_longer_than_that() {
        let mut service = Service::new("").await;
        let (arrive, newest) = watch::channel(Cursor(1));
        service.wakes.set(KEY, &service.url(), newest).unwrap();
        arrive.send_replace(Cursor(2));
        service.asked().await;
        until(|| service.wakes.not_woken.get() == 1).await;
        assert_eq!(service.wakes.room.available_permits(), MAX_UNDER_WAY);
    }

    #[tokio::test]
    async fn whoever_comes_and_goes_is_woken_no_more_often_than_the_limit() {
        let mut service = Service::new("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let (arrive, newest) = watch::channel(Cursor(0));
        service.wakes.set(KEY, &service.url(), newest).unwrap();
        let mut woken = 0;
        for cursor in 1..=3 * u64::from(OF_DEVICE_PER_MINUTE) {
            drop(service.wakes.enter(KEY.0, KEY.1));
            arrive.send_replace(Cursor(cursor));
            // one comes back in ten seconds, which all of this may take on a busy machine
            woken += u32::from(!service.is_left_alone().await);
        }
        assert!((1..=OF_DEVICE_PER_MINUTE + 6).contains(&woken), "{woken}");
    }

    #[tokio::test]
    async fn what_is_not_of_the_public_internet_is_not_dialled() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wakes = Wakes::new(CancellationToken::new());
        let (arrive, newest) = watch::channel(Cursor(0));
        for (at, host) in ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"].iter().enumerate() {
            let key = (GroupId([u8::try_from(at).unwrap(); 32]), KEY.1);
            wakes.set(key, &format!("https://{host}:{port}/"), newest.clone()).unwrap();
        }
        arrive.send_replace(Cursor(1));
        until(|| wakes.not_woken.get() == 5).await;
        assert!(tokio::time::timeout(MOMENT, listener.accept()).await.is_err());
    }

    #[tokio::test]
    async fn addresses_are_few_and_of_push_services() {
        let wakes = Wakes::new(CancellationToken::new());
        let (_arrive, newest) = watch::channel(Cursor(0));
        let long = format!("https://push.example/{}", "a".repeat(MAX_WAKE_URL));
        for url in [
            "http://push.example/",
            "push.example",
            "https://",
            "https://user@push.example/",
            "https://push.example:/",
            "https://push.example:0x50/",
            "https://push.example/a b",
            "file:///etc/passwd",
            &long,
        ] {
            assert_eq!(wakes.set(KEY, url, newest.clone()), Err(WakeRefused::Malformed), "{url}");
        }
        for at in 0..=MAX_OF_GROUP {
            let mut author = [0; 32];
            author[..8].copy_from_slice(&at.to_be_bytes());
            let set = wakes.set((KEY.0, AuthorId(author)), "https://push.example/UP?id=1", newest.clone());
            assert_eq!(set, if at < MAX_OF_GROUP { Ok(()) } else { Err(WakeRefused::TooMany) });
        }
        let other = (GroupId([9; 32]), KEY.1);
        assert_eq!(wakes.set(other, "https://push.example:8443", newest), Ok(()));
    }
}
