//! The certificate of a relay, and what its address pins of it.

use sync_link::relay::RelayError;

use crate::raw::Talk;
use crate::site::{RelayProcess, Site, bodies, until, until_handed_over, until_has};

#[tokio::test(flavor = "multi_thread")]
async fn through_tls_what_one_device_pushed_another_gets() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "plain = false\n");
    assert!(relay.url.starts_with("https://127.0.0.1:"), "{}", relay.url);
    let apart = site.strangers(&[&relay.url]).await;
    let a = site.open("anna").await;
    let anna = a.only_client().unwrap();
    anna.push("bread and milk").await.unwrap();
    until_handed_over(&anna).await;
    drop(anna);
    a.close().await;

    let b = site.open("ben").await;
    let ben = b.only_client().unwrap();
    until_has(&ben, "bread and milk").await;
    assert_eq!(bodies(&ben).await, ["bread and milk"]);
    drop(ben);
    b.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_certificate_or_another_key_at_the_same_address_is_refused_and_status_says_so() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "plain = false\n");
    let device = site.open("anna").await;
    let group = device.create_group().await.unwrap();
    device.add_relay(&relay.url, None).await.unwrap();
    let anna = device.client(group).unwrap();
    until(&anna, "connected", |status| status.relays[0].state == "connected").await;
    let (says, lost): ([&str; 2], [&str; 2]) =
        (["another certificate is shown", "another relay answers"], ["certificate.pem", "relay.key"]);
    for (says, lost) in says.into_iter().zip(lost) {
        relay.stop();
        relay.lose(lost);
        let before = relay.restart_as_another();
        until(&anna, says, |status| status.relays[0].problem.as_ref().is_some_and(|text| text.contains(says))).await;
        let status = anna.status().await.unwrap();
        assert_ne!(status.relays[0].state, "connected");
        // the address it prints now is taken
        device.remove_relay(&before, None).await.unwrap();
        device.add_relay(&relay.url, None).await.unwrap();
        until(&anna, "connected again", |status| status.relays[0].state == "connected").await;
    }
    drop(anna);
    device.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_pinned_must_be_valid_as_a_web_sites() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "plain = false\n");
    let (place, key) = relay.url.split_once('#').unwrap();
    // 32 of the 64 bytes are the relay's own key
    let bytes = data_encoding::BASE64URL_NOPAD.decode(key.as_bytes()).unwrap();
    let unpinned = format!("{place}#{}", data_encoding::BASE64URL_NOPAD.encode(&bytes[..32]));
    let error = Talk::try_open(&unpinned).await.err().unwrap();
    assert!(matches!(error, RelayError::Certificate(_)), "{error}");
    assert!(Talk::try_open(&relay.url).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_certificate_is_shown_and_may_be_renewed_with_its_key() {
    let site = Site::new();
    let (cert, key) = (site.path("cert.pem"), site.path("key.pem"));
    let pair = rcgen::KeyPair::generate().unwrap();
    let renew = |name: &str| {
        let params = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
        std::fs::write(&cert, params.self_signed(&pair).unwrap().pem()).unwrap();
    };
    std::fs::write(&key, pair.serialize_pem()).unwrap();
    renew("relay.example");
    let settings = format!("cert = {cert:?}\nkey = {key:?}\n");
    let mut relay = RelayProcess::start(&site, "relay", &settings);
    assert!(Talk::try_open(&relay.url).await.is_ok());
    relay.stop();
    renew("renewed.example");
    relay.restart();
    assert!(Talk::try_open(&relay.url).await.is_ok());
}

#[test]
fn a_certificate_that_cannot_be_used_ends_the_start_with_the_reason() {
    let site = Site::new();
    let (cert, config) = (site.path("cert.pem"), site.path("relay.toml"));
    std::fs::write(&cert, "nothing of the kind").unwrap();
    std::fs::write(&config, format!("cert = {cert:?}\nkey = {cert:?}\n")).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_sync-relay"))
        .args(["--bind", "127.0.0.1:0", "--data"])
        .arg(site.path("relay"))
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("cannot use the certificate in"), "{said}");
}
