//! TLS towards a relay.
//!
//! The relay must show the certificate that [`Pins`] asks for; a channel inside proves the relay's own key.
//! Requests about codes open no channel: of who answers them the certificate alone is known.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{RelayError, RelayUrl};
use crate::certificates::{Pins, Verifier};

/// A stream to a relay, sealed by TLS or not.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug> Io for T {}

/// Connects to the place of a relay.
pub(super) async fn dial(url: &RelayUrl) -> Result<(Box<dyn Io>, SocketAddr), RelayError> {
    let unreachable = |error: std::io::Error| RelayError::Unreachable(error.to_string());
    let stream = TcpStream::connect((url.host.as_str(), url.port)).await.map_err(unreachable)?;
    // frames are gathered before they are sent
    stream.set_nodelay(true).map_err(unreachable)?;
    let address = stream.peer_addr().map_err(unreachable)?;
    if !url.tls {
        return Ok((Box::new(stream), address));
    }
    let name = ServerName::try_from(url.host.clone()).map_err(|error| RelayError::Unreachable(error.to_string()))?;
    let connector = TlsConnector::from(Arc::new(config(url)));
    let stream = connector.connect(name, stream).await.map_err(refused)?;
    Ok((Box::new(stream), address))
}

fn refused(error: std::io::Error) -> RelayError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
            RelayError::OtherCertificate
        }
        Some(rustls::Error::InvalidCertificate(error)) => RelayError::Certificate(error.to_string()),
        _ => RelayError::Unreachable(error.to_string()),
    }
}

fn config(url: &RelayUrl) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let verifier = Verifier::new(Arc::new(Pins::of(url)), provider.clone());
    let verifier = verifier.expect("BUG: there are roots of the web");
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("BUG: the provider has suites of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}
