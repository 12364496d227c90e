//! The certificate: the operator's, or one that is made and kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sync_link::certificates::pin_of;
use tokio_rustls::TlsAcceptor;

use crate::data::{DataError, kept};

/// Certificate and key that were made here; in one file, so that both are there or none is.
const MADE: &str = "certificate.pem";

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The system refused something.
    #[error(transparent)]
    Data(#[from] DataError),
    /// What is in a file is no certificate, no key, or they do not belong together.
    #[error("cannot use the certificate in {path} with its key: {reason}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// None can be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// What a relay shows to who connects.
pub(crate) struct Identity {
    pub(crate) acceptor: TlsAcceptor,
    config: Arc<ServerConfig>,
    /// Fingerprint of the certificate's key.
    pub(crate) pin: [u8; 32],
}

impl Identity {
    /// Takes the operator's certificate and key.
    pub(crate) fn read(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let read = |path: &Path| std::fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source });
        Self::new(certificate, &read(certificate)?, &read(key)?)
    }

    /// Takes the certificate that was made here; makes one if there is none.
    pub(crate) fn made(data: &Path, host: &str) -> Result<Self, TlsError> {
        let path = data.join(MADE);
        let made = rcgen::generate_simple_self_signed([host.to_owned()])?;
        let text = kept(&path, || made.cert.pem() + &made.signing_key.serialize_pem())
            .map_err(|source| DataError::Io { path: path.clone(), source })?;
        Self::new(&path, text.as_bytes(), text.as_bytes())
    }

    fn new(path: &Path, certificate: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let wrong = |reason: String| TlsError::Certificate { path: path.to_owned(), reason };
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<_, _>>()
            .map_err(|error| wrong(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| wrong(error.to_string()))?;
        let pin = chain.first().and_then(|first| pin_of(first)).ok_or_else(|| wrong("it holds none".to_owned()))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("BUG: the provider has suites of TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| wrong(error.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let config = Arc::new(config);
        Ok(Self { acceptor: TlsAcceptor::from(config.clone()), config, pin })
    }

    /// The same for what is no HTTP.
    pub(crate) fn config(&self) -> ServerConfig {
        ServerConfig::clone(&self.config)
    }
}
