//! Relays at which connections begin, so that two devices behind routers find a direct way to each other.
//!
//! Such a relay is iroh's, inside ours or n0's; it forwards sealed packets and tells each device its public address.
//! It is asked by HTTPS, in which ours shows the certificate that its address pins.

use std::sync::Arc;

use iroh::tls::CaTlsConfig;
use iroh::{RelayConfig, RelayMap};
use rustls::client::danger::ServerCertVerifier;

use crate::certificates::{Pins, Verifier};
use crate::relay::RelayUrl;

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

/// What iroh is to ask of the certificate of every relay.
pub(crate) fn tls(pins: &Arc<Pins>) -> CaTlsConfig {
    let pins = pins.clone();
    CaTlsConfig::custom_server_cert_verifier(Arc::new(move |provider| {
        Ok(Arc::new(Verifier::new(pins.clone(), provider)?) as Arc<dyn ServerCertVerifier>)
    }))
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
}
