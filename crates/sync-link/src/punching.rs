//! Relays at which connections begin, so that two devices behind routers find a direct way to each other.
//!
//! Such a relay is iroh's, inside ours or n0's; it forwards sealed packets and tells each device its public address.
//! It is asked by HTTPS, in which ours shows the certificate that its address pins.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use iroh::tls::CaTlsConfig;
use iroh::{RelayConfig, RelayMap};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::relay::{RelayUrl, pin_of};

/// Where a relay tells devices their public address, over UDP.
pub const ADDRESS_DISCOVERY_PORT: u16 = iroh::defaults::DEFAULT_RELAY_QUIC_PORT;

/// n0's relays, which take everyone.
pub(crate) fn public() -> RelayMap {
    iroh::defaults::prod::default_relay_map()
}

/// A relay of ours as iroh knows it, with what lets this device in; none where it could be impersonated.
pub(crate) fn entry(url: &RelayUrl, pass: &str) -> Option<RelayConfig> {
    let config = RelayConfig::new(place(url)?, url.has_tls().then(Default::default));
    Some(config.with_auth_token(pass))
}

/// The name under which iroh knows a relay.
pub(crate) fn place(url: &RelayUrl) -> Option<iroh::RelayUrl> {
    // what lets a device in goes where nobody listens: the same as with codes
    if !url.takes_codes() {
        return None;
    }
    let scheme = if url.has_tls() { "https" } else { "http" };
    format!("{scheme}://{}/", url.authority()).parse().ok()
}

/// Which certificates relays are to show, by host: those that their addresses pin.
#[derive(Debug, Default)]
pub(crate) struct Pins(RwLock<BTreeMap<String, BTreeSet<[u8; 32]>>>);

impl Pins {
    /// Takes this certificate, too, for its host's.
    pub(crate) fn add(&self, url: &RelayUrl) {
        if let Some(pin) = url.pin() {
            let mut hosts = self.0.write().unwrap_or_else(PoisonError::into_inner);
            hosts.entry(url.host().to_owned()).or_default().insert(pin);
        }
    }

    /// What iroh is to ask of every relay.
    pub(crate) fn tls(self: &Arc<Self>) -> CaTlsConfig {
        let pins = self.clone();
        CaTlsConfig::custom_server_cert_verifier(Arc::new(move |provider| {
            Ok(Arc::new(Verifier::new(pins.clone(), provider)?) as Arc<dyn ServerCertVerifier>)
        }))
    }

    /// The fingerprints that a host's certificates may have; none where nothing is pinned.
    fn of(&self, host: &str) -> Option<BTreeSet<[u8; 32]>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(host).cloned()
    }
}

/// Asks of hosts with a pin the pinned key, and of others a certificate that is valid as a web site's.
#[derive(Debug)]
struct Verifier {
    pins: Arc<Pins>,
    web: Arc<WebPkiServerVerifier>,
}

impl Verifier {
    fn new(pins: Arc<Pins>, provider: Arc<CryptoProvider>) -> io::Result<Self> {
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
        match self.pins.of(&server_name.to_str().to_ascii_lowercase()) {
            Some(pins) if pin_of(end_entity).is_some_and(|pin| pins.contains(&pin)) => {
                Ok(ServerCertVerified::assertion())
            }
            Some(_) => Err(CertificateError::ApplicationVerificationFailure.into()),
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

    fn url(text: &str) -> RelayUrl {
        text.parse().expect("address")
    }

    #[test]
    fn connections_begin_at_relays_with_tls_and_of_this_machine_only() {
        let key = data_encoding::BASE64URL_NOPAD.encode(&[7; 32]);
        for (text, known_as) in [
            (format!("https://relay.example/#{key}"), Some("https://relay.example/")),
            (format!("https://[2001:db8::1]:7841/#{key}"), Some("https://[2001:db8::1]:7841/")),
            ("ws://127.0.0.1:9".to_owned(), Some("http://127.0.0.1:9/")),
            (format!("ws://relay.example/#{key}"), None),
        ] {
            let found = entry(&url(&text), "pass");
            assert_eq!(found.as_ref().map(|found| found.url.to_string()).as_deref(), known_as, "{text}");
            let Some(found) = found else { continue };
            assert_eq!(found.auth_token.as_deref(), Some("pass"));
            assert_eq!(found.quic.is_some(), text.starts_with("https"), "addresses are told where there is TLS");
        }
    }

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
        let relay = |pin: &[u8; 32]| RelayUrl::new("relay.example", 7841, &[1; 32]).with_pin(pin);

        let pins = Arc::new(Pins::default());
        assert!(asked(&pins, "relay.example").is_err(), "no web site shows this one");
        pins.add(&relay(&[9; 32]));
        let refused = asked(&pins, "relay.example");
        assert_eq!(refused, Err(CertificateError::ApplicationVerificationFailure.into()));
        pins.add(&relay(&pin));
        assert_eq!(asked(&pins, "relay.example"), Ok(()), "two relays may share a host");
        assert!(asked(&pins, "other.example").is_err());
    }
}
