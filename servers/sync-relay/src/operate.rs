//! What an operator asks of a relay that runs: its numbers, and whether devices reach it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use sync_link::punching::ADDRESS_DISCOVERY_PORT;
use sync_link::relay::meeting::get;
use sync_link::relay::{RelayError, RelayUrl, RelayUrlError, connect};

use tokio::net::UdpSocket;

use crate::data::{self, DataError};

/// Bytes of a frame, none of which is expected.
const NO_FRAME: usize = 1024;
/// Time for the last words on a channel.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// First byte of a QUIC packet that names its version.
const LONG_HEADER: u8 = 0xc0;
/// A version that is kept free so that servers say which ones they have.
const NO_VERSION: u32 = 0x1a2a_3a4a;
/// Bytes of the shortest datagram that a QUIC server answers.
const QUIC_DATAGRAM: usize = 1200;
/// Questions that may be lost but for one.
const QUIC_TRIES: usize = 3;
/// Time for an answer, also over a slow link.
const QUIC_WAIT: Duration = Duration::from_secs(1);

/// Why an operator gets no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperateError {
    /// Its directory says nothing.
    #[error(transparent)]
    Data(#[from] DataError),
    /// What its directory says, or the operator, is no address.
    #[error(transparent)]
    Url(#[from] RelayUrlError),
    /// Nobody answers as a relay.
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// The numbers of the relay that runs on a directory, one a line, each with what it counts.
pub async fn stats(data: &Path) -> Result<String, OperateError> {
    let text = get(&running(data)?, "/metrics").await?;
    Ok(table(&String::from_utf8_lossy(&text)))
}

/// Whether a relay answers at an address, as devices use it; unless named, at the one that it printed.
///
/// Tells each step in words, and goes as far as the first one that fails.
pub async fn check(data: &Path, address: Option<&str>, mut tell: impl FnMut(&str)) -> Result<(), OperateError> {
    let url = match address {
        Some(address) => address.parse()?,
        None => running(data)?,
    };
    tell(&format!("checking {}", url.without_token()));
    get(&url, "/health").await?;
    tell("ok: it answers, and its database works");
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).expect("BUG: the system has no random numbers");
    let mut connection = connect(&url, &secret, NO_FRAME).await?;
    tell(if url.has_key() {
        "ok: it has proven its key on a channel"
    } else {
        "ok: it opens channels; no key was checked"
    });
    // it may be faster
    let _ = tokio::time::timeout(CLOSE_WAIT, connection.sender.close()).await;
    tell(&match url.has_tls() {
        false => "without TLS it tells no device its public address".to_owned(),
        true => told_addresses(SocketAddr::new(connection.address.ip(), ADDRESS_DISCOVERY_PORT)).await,
    });
    Ok(())
}

/// Whether devices can ask there for their public address, in words.
async fn told_addresses(address: SocketAddr) -> String {
    match speaks_quic(address).await {
        Ok(true) => {
            format!("ok: UDP port {} reaches it from here, where devices ask for their public address", address.port())
        }
        Ok(false) => format!(
            "UDP port {} does not reach it from here: open it in the firewall, or devices behind routers find no direct way",
            address.port()
        ),
        Err(error) => format!("UDP port {} cannot be tried from here: {error}", address.port()),
    }
}

/// Whether something answers that speaks QUIC: asked for a version that nobody has, it names those it has.
async fn speaks_quic(address: SocketAddr) -> std::io::Result<bool> {
    let any: SocketAddr = if address.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    let mut ids = [0; 16];
    getrandom::fill(&mut ids).expect("BUG: the system has no random numbers");
    let mut question = vec![LONG_HEADER];
    question.extend(NO_VERSION.to_be_bytes());
    for id in ids.chunks(8) {
        question.push(8);
        question.extend(id);
    }
    question.resize(QUIC_DATAGRAM, 0);
    let mut answer = [0; QUIC_DATAGRAM];
    for _ in 0..QUIC_TRIES {
        // nobody may listen, which systems tell a moment later
        let asked = socket.send(&question).await;
        let heard = tokio::time::timeout(QUIC_WAIT, socket.recv(&mut answer)).await;
        if let (Ok(_), Ok(Ok(len))) = (asked, heard) {
            // version 0, and our own id back
            let answer = &answer[..len];
            if answer.first().is_some_and(|first| first & 0x80 != 0)
                && answer.get(1..5) == Some(&[0; 4])
                && answer.get(6..14) == Some(&ids[8..])
            {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The address of the relay that runs on a directory.
fn running(data: &Path) -> Result<RelayUrl, OperateError> {
    Ok(data::read_address(data)?.parse()?)
}

/// What Prometheus reads, for people.
fn table(metrics: &str) -> String {
    let mut rows: Vec<(String, &str, &str)> = Vec::new();
    let mut help = "";
    for line in metrics.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = text.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((name, value)) = line.rsplit_once(' ').filter(|_| !line.starts_with('#')) {
            let name = name.strip_prefix("syncrelay_").unwrap_or(name).replace("{", " ").replace(['}', '"'], "");
            rows.push((name, value, help));
        }
    }
    let widest = |of: fn(&(String, &str, &str)) -> usize| rows.iter().map(of).max().unwrap_or(0);
    let (names, values) = (widest(|row| row.0.len()), widest(|row| row.1.len()));
    let mut text = String::new();
    for (name, value, help) in &rows {
        // writing to a string cannot fail
        let _ = writeln!(text, "{name:names$}  {value:>values$}  {help}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_where_quic_is_spoken_is_told_from_one_where_nothing_or_something_else_answers() {
        let data = tempfile::tempdir().unwrap();
        let identity = crate::tls::Identity::made(data.path(), "127.0.0.1").unwrap();
        let bind = "127.0.0.1:0".parse().unwrap();
        let discovery = crate::punching::discover_addresses(bind, identity.config()).await.unwrap();
        let address = discovery.quic_addr().unwrap();
        assert!(speaks_quic(address).await.unwrap());
        assert!(told_addresses(address).await.starts_with("ok: UDP port"));
        discovery.shutdown().await.unwrap();

        let echo = UdpSocket::bind(bind).await.unwrap();
        let echoed_at = echo.local_addr().unwrap();
        let answering = tokio::spawn(async move {
            let mut bytes = [0; QUIC_DATAGRAM];
            while let Ok((len, from)) = echo.recv_from(&mut bytes).await {
                echo.send_to(&bytes[..len], from).await.unwrap();
            }
        });
        assert!(!speaks_quic(echoed_at).await.unwrap());
        answering.abort();
        assert!(told_addresses(echoed_at).await.contains("does not reach it"));
    }

    #[test]
    fn numbers_stand_below_each_other_with_what_they_count() {
        let metrics = "# HELP syncrelay_groups Groups.\n# TYPE syncrelay_groups gauge\nsyncrelay_groups 12\n\
            # HELP syncrelay_bytes_total Bytes.\nsyncrelay_bytes_total{direction=\"sent\"} 3\n";
        let expected = "groups                      12  Groups.\nbytes_total direction=sent   3  Bytes.\n";
        assert_eq!(table(metrics), expected);
    }
}
