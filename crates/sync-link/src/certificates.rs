//! Which certificate a relay must show.
//!
//! An address may pin the key of the relay's certificate; then any other is refused, whoever signed it.
//! Without a pin the certificate must be valid as a web site's: that is for relays behind a proxy that has one.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest as _, Sha256};

use crate::relay::RelayUrl;

/// Fingerprint of a certificate's key: SHA-256 of its SubjectPublicKeyInfo; none if the bytes are no certificate.
#[must_use]
pub fn pin_of(certificate: &[u8]) -> Option<[u8; 32]> {
    let certificate = CertificateDer::from_slice(certificate);
    let certificate = webpki::EndEntityCert::try_from(&certificate).ok()?;
    Some(Sha256::digest(certificate.subject_public_key_info()).into())
}

/// Fingerprints that the certificates of hosts must have; of a host without one the web decides.
#[derive(Debug, Default)]
pub(crate) struct Pins(RwLock<HashMap<ServerName<'static>, HashSet<[u8; 32]>>>);

impl Pins {
    /// Those of one address.
    pub(crate) fn of(url: &RelayUrl) -> Self {
        let pins = Self::default();
        pins.add(url);
        pins
    }

    /// Takes the certificate that an address pins, too, for its host's.
    pub(crate) fn add(&self, url: &RelayUrl) {
        let Some(pin) = url.pin() else { return };
        // a host that is no name cannot be dialled with TLS
        let Ok(host) = ServerName::try_from(url.host().to_owned()) else { return };
        self.0.write().unwrap_or_else(PoisonError::into_inner).entry(host).or_default().insert(pin);
    }

    /// Whether a host's certificate is pinned; none where the web decides.
    fn is_pinned(&self, host: &ServerName<'_>, certificate: &[u8]) -> Option<bool> {
        let hosts = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let pins = hosts.get(&host.to_owned())?;
        Some(pin_of(certificate).is_some_and(|pin| pins.contains(&pin)))
    }
}

/// Asks of hosts with a pin the pinned key, and of others a certificate that is valid as a web site's.
#[derive(Debug)]
pub(crate) struct Verifier {
    pins: Arc<Pins>,
    web: Arc<WebPkiServerVerifier>,
}

impl Verifier {
    pub(crate) fn new(pins: Arc<Pins>, provider: Arc<CryptoProvider>) -> io::Result<Self> {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        let web = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
        Ok(Self { pins, web: web.map_err(io::Error::other)? })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.pins.is_pinned(server_name, end_entity) {
            Some(true) => Ok(ServerCertVerified::assertion()),
            Some(false) => Err(CertificateError::ApplicationVerificationFailure.into()),
            None => self.web.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.web.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.web.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.web.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_a_pin_shows_that_key_and_no_other() {
        let verifier = |pins: &Arc<Pins>| {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            Verifier::new(pins.clone(), provider).expect("roots are there")
        };
        let made = rcgen::generate_simple_self_signed(["relay.example".to_owned()]).expect("certificate");
        let certificate = made.cert.der();
        let pin = pin_of(certificate).expect("a certificate has a key");
        let asked = |pins: &Arc<Pins>, host: &str| {
            let name = ServerName::try_from(host.to_owned()).expect("name");
            verifier(pins).verify_server_cert(certificate, &[], &name, &[], UnixTime::now()).map(|_| ())
        };
        let relay = |host: &str, pin: &[u8; 32]| RelayUrl::new(host, 7841, &[1; 32]).with_pin(pin);

        let pins = Arc::new(Pins::default());
        assert!(asked(&pins, "relay.example").is_err(), "no web site shows this one");
        for (host, same) in [("relay.example", "Relay.Example"), ("2001:DB8::0:1", "2001:db8::1")] {
            pins.add(&relay(host, &[9; 32]));
            let refused = asked(&pins, same);
            assert_eq!(refused, Err(CertificateError::ApplicationVerificationFailure.into()));
            pins.add(&relay(host, &pin));
            assert_eq!(asked(&pins, same), Ok(()), "two relays may share a host");
        }
        assert!(asked(&pins, "other.example").is_err());
    }
}
