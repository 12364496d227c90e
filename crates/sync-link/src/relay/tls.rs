//! TLS towards a relay.
//!
//! An address may pin the key of the relay's certificate; then any other is refused, whoever signed it.
//! Without a pin the certificate must be valid as a web site's: that is for relays behind a proxy that has one.
//! Either way a channel inside proves the relay's own key.
//! Requests about codes open no channel: of who answers them the certificate alone is known.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{RelayError, RelayUrl};

/// A stream to a relay, sealed by TLS or not.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug> Io for T {}

/// Fingerprint of a certificate's key: SHA-256 of its SubjectPublicKeyInfo; none if the bytes are no certificate.
#[must_use]
pub fn pin_of(certificate: &[u8]) -> Option<[u8; 32]> {
    let certificate = CertificateDer::from_slice(certificate);
    let certificate = webpki::EndEntityCert::try_from(&certificate).ok()?;
    Some(Sha256::digest(certificate.subject_public_key_info()).into())
}

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
    let connector = TlsConnector::from(Arc::new(config(url.pin)));
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

fn config(pin: Option<[u8; 32]>) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("BUG: the provider has suites of TLS 1.3");
    let mut config = match pin {
        Some(pin) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { pin, provider }))
            .with_no_client_auth(),
        None => {
            let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
            builder.with_root_certificates(roots).with_no_client_auth()
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// Takes the certificate with one key, and no other.
#[derive(Debug)]
struct Pinned {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if pin_of(end_entity) == Some(self.pin) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
