//! The way to a relay: a WebSocket, sealed by TLS or not, and in it the channel of [`noise`](crate::noise).
//!
//! The address of a relay ends in its key and its certificate's; who answers with another one is not that relay.
//! On the loopback network both may be left out: whoever answers there is of this machine.

pub mod meeting;
mod tls;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::BASE64URL_NOPAD;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use self::tls::{Io, dial};
use crate::noise::{Handshake, MAX_MESSAGE, NoiseError, Opener, Sealer};

/// Where a relay takes its channels.
pub const CHANNEL_PATH: &str = "/v1/channel";
/// The port of a relay unless its address names one.
pub const DEFAULT_PORT: u16 = 7841;
/// Time for a relay to answer: connecting and both round trips, also over a slow link.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which a ping is sent: below the shortest time that home routers keep a quiet connection.
pub const PING_AFTER: Duration = Duration::from_secs(25);
/// Silence after which the other end is taken for gone: some pings have been lost by then.
pub const GONE_AFTER: Duration = Duration::from_secs(80);
/// Bytes read from the socket at once.
const READ_BUFFER: usize = 64 << 10;
/// Characters of an address: host, both keys and an operator's token, each as long as it may be, fit with room.
const MAX_URL: usize = 512;
/// Bytes of what a relay says in words that are read.
const MAX_TEXT: usize = 256;
/// The port of the web, which an address with TLS means unless it names one.
const TLS_PORT: u16 = 443;

/// Address of a relay, as `https://HOST:PORT/#KEY`, or `ws://HOST:PORT/#KEY` without TLS.
///
/// KEY is base64url of the relay's Noise key, and of the fingerprint of its certificate's key where that is pinned.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayUrl {
    tls: bool,
    host: String,
    port: u16,
    key: Option<[u8; 32]>,
    /// Of the certificate's key; none where it must be valid as a web site's.
    pin: Option<[u8; 32]>,
    /// The operator's token.
    token: String,
}

/// Why a text is no address of a relay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RelayUrlError {
    /// It does not look like one.
    #[error("no address of a relay; one looks like https://HOST:{DEFAULT_PORT}/#KEY, as `sync-relay` prints it")]
    Malformed,
    /// It is one of a later version or of another service.
    #[error("addresses of relays start with https:// or ws://, this one with {0}")]
    Scheme(String),
    /// The part behind `#` is no key.
    #[error("the part behind # is no relay's key; copy the whole address that `sync-relay` prints")]
    Key,
    /// It has no key and is not on this machine.
    #[error("this address has no key; copy the whole one that `sync-relay` prints, with what follows the #")]
    NoKey,
    /// Codes were to be left or looked for without TLS and not on this machine.
    #[error(
        "codes go to relays with TLS only, or whoever is on the way could take them over; name its https:// address"
    )]
    Plain,
    /// A device was to be woken at something else than a push service's address.
    #[error(
        "a device is woken at an address that starts with https:// and has no name of a user, as push services give them"
    )]
    Wake,
}

impl RelayUrl {
    /// The address of the relay with this key at this place, without TLS.
    #[must_use]
    pub fn new(host: &str, port: u16, key: &[u8; 32]) -> Self {
        Self { tls: false, host: host.to_owned(), port, key: Some(*key), pin: None, token: String::new() }
    }

    /// The same with TLS, and a certificate of the key with this fingerprint.
    #[must_use]
    pub fn with_pin(&self, pin: &[u8; 32]) -> Self {
        Self { tls: true, pin: Some(*pin), ..self.clone() }
    }

    /// Its host and port, to show and to dial.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The key it must prove; none where whoever answers is taken for it.
    #[must_use]
    pub fn key(&self) -> Option<[u8; 32]> {
        self.key
    }

    /// Whether it means the same relay everywhere.
    #[must_use]
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// Its host, as a name or an address without brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Whether it is reached by TLS.
    #[must_use]
    pub fn has_tls(&self) -> bool {
        self.tls
    }

    /// The fingerprint of its certificate's key, where that is pinned.
    pub(crate) fn pin(&self) -> Option<[u8; 32]> {
        self.pin
    }

    /// Whether codes may be left and looked for there: what shows whose they are must not be heard on the way.
    #[must_use]
    pub fn takes_codes(&self) -> bool {
        self.tls || is_loopback(&self.host)
    }

    /// Whether it is an address with TLS of the very relay that the other names without.
    #[must_use]
    pub fn is_sealed_form_of(&self, other: &Self) -> bool {
        self.is_same_relay(other) && self.tls && !other.tls && self.key.is_some() && self.key == other.key
    }

    /// The operator's token that goes with it; empty for none.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The same with the operator's token.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: token.to_owned(), ..self.clone() }
    }

    /// The address to give away: without the operator's token.
    #[must_use]
    pub fn without_token(&self) -> Self {
        Self { token: String::new(), ..self.clone() }
    }

    /// Whether both name the same relay.
    #[must_use]
    pub fn is_same_relay(&self, other: &Self) -> bool {
        (&self.host, self.port) == (&other.host, other.port)
    }
}

impl FromStr for RelayUrl {
    type Err = RelayUrlError;

    fn from_str(text: &str) -> Result<Self, RelayUrlError> {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").ok_or(RelayUrlError::Malformed)?;
        if text.len() > MAX_URL || !text.chars().all(|c| c.is_ascii_graphic()) {
            return Err(RelayUrlError::Malformed);
        }
        let tls = match scheme {
            "https" => true,
            "ws" => false,
            _ => return Err(RelayUrlError::Scheme(format!("{scheme}://"))),
        };
        let (place, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let authority = place.strip_suffix('/').unwrap_or(place);
        let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or(RelayUrlError::Malformed)?)),
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let port = match port.map(str::parse) {
            None if tls => TLS_PORT,
            None => DEFAULT_PORT,
            Some(Ok(port)) if port > 0 => port,
            Some(_) => return Err(RelayUrlError::Malformed),
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if host.is_empty() || !(host.chars().all(is_name) || host.parse::<std::net::Ipv6Addr>().is_ok()) {
            return Err(RelayUrlError::Malformed);
        }
        let (key, token) = fragment.split_once('.').unwrap_or((fragment, ""));
        let bytes = BASE64URL_NOPAD.decode(key.as_bytes()).map_err(|_| RelayUrlError::Key)?;
        let (key, pin) = match bytes.as_chunks::<32>() {
            ([], []) => (None, None),
            ([key], []) => (Some(*key), None),
            ([key, pin], []) if tls => (Some(*key), Some(*pin)),
            _ => return Err(RelayUrlError::Key),
        };
        if key.is_none() && (tls || !is_loopback(host)) {
            return Err(RelayUrlError::NoKey);
        }
        Ok(Self { tls, host: host.to_ascii_lowercase(), port, key, pin, token: token.to_owned() })
    }
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/", if self.tls { "https" } else { "ws" }, self.authority())?;
        if let Some(key) = &self.key {
            let pin = self.pin.as_ref().map_or(&[][..], |pin| &pin[..]);
            write!(f, "#{}", BASE64URL_NOPAD.encode(&[key, pin].concat()))?;
        } else if !self.token.is_empty() {
            f.write_str("#")?;
        }
        if self.token.is_empty() { Ok(()) } else { write!(f, ".{}", self.token) }
    }
}

impl fmt::Debug for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RelayUrl({})", self.authority())
    }
}

/// Why there is no channel to a relay, or none any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// Nobody can be reached there.
    #[error("the relay cannot be reached: {0}")]
    Unreachable(String),
    /// Someone answered who is no relay, or takes nobody at the moment.
    #[error("the relay answered {status}: {text}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        text: String,
    },
    /// It has another key than its address says.
    #[error(
        "another relay answers at this address: its key is not the one that was given; \
         if its operator made it anew, add the address it prints now"
    )]
    OtherKey,
    /// It has another certificate than its address says.
    #[error(
        "another certificate is shown at this address than the one that was given; \
         if its operator made it anew, add the address it prints now"
    )]
    OtherCertificate,
    /// Its certificate is not valid, and its address pins none.
    #[error("the relay's certificate is not valid: {0}; copy the whole address that `sync-relay` prints")]
    Certificate(String),
    /// What came is not what the channel's other end sent.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// The channel ended.
    #[error("the connection to the relay was lost: {0}")]
    Lost(String),
}

impl From<tungstenite::Error> for RelayError {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::Http(response) => {
                let body = response.body().as_deref().unwrap_or_default();
                let text = String::from_utf8_lossy(&body[..body.len().min(MAX_TEXT)]);
                let text = text.chars().filter(|c| !c.is_control()).collect();
                Self::Refused { status: response.status().as_u16(), text }
            }
            error => Self::Lost(error.to_string()),
        }
    }
}

impl RelayError {
    /// Whether only its operator or a person here changes anything about it.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::OtherKey | Self::OtherCertificate | Self::Certificate(_) | Self::Refused { .. })
    }
}

type Socket = WebSocketStream<Box<dyn Io>>;

/// A channel to a relay.
#[derive(Debug)]
pub struct RelayConnection {
    /// The relay's key, which it has proven.
    pub key: [u8; 32],
    /// The same on both ends and on no other channel.
    pub binding: [u8; 32],
    /// Where it is.
    pub address: SocketAddr,
    /// Towards the relay.
    pub sender: RelaySender,
    /// From it.
    pub receiver: RelayReceiver,
}

/// Opens a channel to a relay, in which `secret` is ours. Cancel safe: a dropped future leaves nothing behind.
pub async fn connect(url: &RelayUrl, secret: &[u8; 32], max_frame: usize) -> Result<RelayConnection, RelayError> {
    let connecting = try_connect(url, secret, max_frame);
    let late = |_| RelayError::Unreachable("it does not answer".to_owned());
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(late)?
}

async fn try_connect(url: &RelayUrl, secret: &[u8; 32], max_frame: usize) -> Result<RelayConnection, RelayError> {
    let (stream, address) = dial(url).await?;
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    // what it is carried in makes no difference to the WebSocket
    let request = format!("ws://{}{CHANNEL_PATH}", url.authority());
    let (mut socket, _) = client_async_with_config(request, stream, Some(config)).await?;
    let mut handshake = Handshake::initiator(secret);
    while !handshake.is_finished() {
        if handshake.is_our_turn() {
            socket.send(Message::binary(handshake.write()?)).await?;
        } else {
            handshake.read(&next_message(&mut socket).await?.ok_or_else(ended)?)?;
        }
    }
    let channel = handshake.finish(max_frame)?;
    if url.key.is_some_and(|key| key != channel.key) {
        return Err(RelayError::OtherKey);
    }
    let (sink, stream) = socket.split();
    let sender = RelaySender { sink, sealer: channel.sealer };
    let receiver = RelayReceiver { stream, opener: channel.opener };
    Ok(RelayConnection { key: channel.key, binding: channel.binding, address, sender, receiver })
}

fn ended() -> RelayError {
    RelayError::Lost("it ended the connection".to_owned())
}

/// The next message of the channel; pings are answered below this.
async fn next_message(
    stream: &mut (impl futures_util::Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
) -> Result<Option<Bytes>, RelayError> {
    loop {
        let next = tokio::time::timeout(GONE_AFTER, stream.next()).await;
        match next.map_err(|_| RelayError::Lost("nothing was heard for too long".to_owned()))? {
            Some(Ok(Message::Binary(bytes))) => return Ok(Some(bytes)),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_))) | None => return Ok(None),
            Some(Ok(_)) => return Err(NoiseError::Message.into()),
            Some(Err(error)) => return Err(error.into()),
        }
    }
}

/// The direction towards a relay.
#[derive(Debug)]
pub struct RelaySender {
    sink: SplitSink<Socket, Message>,
    sealer: Sealer,
}

impl RelaySender {
    /// Queues a frame. Not cancel safe: a frame that was sent in part ends the channel.
    pub async fn send(&mut self, frame: &[u8]) -> Result<(), RelayError> {
        for message in self.sealer.seal(frame) {
            self.sink.feed(Message::binary(message)).await?;
        }
        Ok(())
    }

    /// Hands everything queued to the system.
    pub async fn flush(&mut self) -> Result<(), RelayError> {
        Ok(self.sink.flush().await?)
    }

    /// Asks for a sign of life.
    pub async fn ping(&mut self) -> Result<(), RelayError> {
        Ok(self.sink.send(Message::Ping(Bytes::new())).await?)
    }

    /// Ends the channel.
    pub async fn close(&mut self) -> Result<(), RelayError> {
        Ok(self.sink.close().await?)
    }
}

/// The direction from a relay.
#[derive(Debug)]
pub struct RelayReceiver {
    stream: SplitStream<Socket>,
    opener: Opener,
}

impl RelayReceiver {
    /// The next frame; none once the relay has ended the channel. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, RelayError> {
        while let Some(message) = next_message(&mut self.stream).await? {
            if let Some(frame) = self.opener.open(&message)? {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_back_as_it_is_shown() {
        let key = BASE64URL_NOPAD.encode(&[7; 32]);
        let both = BASE64URL_NOPAD.encode(&[7; 64]);
        for (text, shown) in [
            (format!("https://relay.example/#{both}.secret"), format!("https://relay.example:443/#{both}.secret")),
            (format!("https://10.0.0.1:7841/#{key}"), format!("https://10.0.0.1:7841/#{key}")),
            (format!("ws://relay.example:80/#{key}"), format!("ws://relay.example:80/#{key}")),
            (format!(" ws://Relay.example#{key}.secret\n"), format!("ws://relay.example:7841/#{key}.secret")),
            (format!("ws://[2001:db8::1]:9/#{key}"), format!("ws://[2001:db8::1]:9/#{key}")),
            ("ws://127.0.0.1:9".to_owned(), "ws://127.0.0.1:9/".to_owned()),
            ("ws://[::1]/#.secret".to_owned(), "ws://[::1]:7841/#.secret".to_owned()),
            ("ws://localhost/".to_owned(), "ws://localhost:7841/".to_owned()),
        ] {
            let url: RelayUrl = text.parse().expect(&text);
            assert_eq!(url.to_string(), shown);
            assert_eq!(shown.parse(), Ok(url.clone()));
            assert_eq!(url.without_token().token(), "");
            assert!(!format!("{url:?}").contains("secret"));
        }
    }

    #[test]
    fn codes_go_to_addresses_with_tls_and_of_this_machine_only() {
        let key = BASE64URL_NOPAD.encode(&[7; 32]);
        for (text, takes) in [
            (format!("https://relay.example/#{key}"), true),
            ("ws://127.0.0.1:9".to_owned(), true),
            (format!("ws://[::1]/#{key}"), true),
            (format!("ws://relay.example/#{key}"), false),
            (format!("ws://192.168.1.2/#{key}"), false),
        ] {
            let url: RelayUrl = text.parse().expect(&text);
            assert_eq!(url.takes_codes(), takes, "{text}");
        }
    }

    #[tokio::test]
    async fn nothing_about_a_code_is_sent_in_the_clear() {
        let url = RelayUrl::new("192.0.2.1", 9, &[7; 32]);
        let place = meeting::Meeting::new(&url, crate::rendezvous::LookupId([1; 16]));
        assert_eq!(place.publish(&[1; 16], b"sealed").await, Err(meeting::MeetingError::Plain));
        assert_eq!(place.fetch(None).await, Err(meeting::MeetingError::Plain));
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        let key = BASE64URL_NOPAD.encode(&[7; 32]);
        for (text, error) in [
            ("", RelayUrlError::Malformed),
            ("relay.example", RelayUrlError::Malformed),
            ("http://relay.example", RelayUrlError::Scheme("http://".to_owned())),
            ("ws://relay.example", RelayUrlError::NoKey),
            ("https://127.0.0.1", RelayUrlError::NoKey),
            (&format!("ws://relay.example/#{key}{key}"), RelayUrlError::Key),
            (&format!("https://relay.example/#{}", BASE64URL_NOPAD.encode(&[7; 65])), RelayUrlError::Key),
            ("ws://relay.example/#abc", RelayUrlError::Key),
            ("ws://relay.example/path#abc", RelayUrlError::Malformed),
            ("ws://a b/", RelayUrlError::Malformed),
            ("ws://127.0.0.1:0/", RelayUrlError::Malformed),
            ("ws://user@127.0.0.1/", RelayUrlError::Malformed),
        ] {
            assert_eq!(text.parse::<RelayUrl>(), Err(error), "{text}");
        }
        let long = format!("ws://{}/#{key}", "a".repeat(MAX_URL));
        assert_eq!(long.parse::<RelayUrl>(), Err(RelayUrlError::Malformed));
    }
}
