//! Several relays on one database in PostgreSQL.

use sync_types::Frame;

use crate::postgresql::Postgresql;
use crate::raw::{Member, Talk};
use crate::site::{RelayProcess, Site, bodies, until, until_handed_over, until_has};

fn settings(database: &str) -> String {
    format!("database = '{database}'\n[limits]\nmessages_per_minute = 100000\n")
}

/// Waits until an entry comes as a push.
async fn pushed(talk: &mut Talk, entry: &[u8]) {
    loop {
        if let Frame::Push { entries, .. } = talk.recv().await.expect("the channel stays open")
            && entries.iter().any(|carried| carried.envelope == entry)
        {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_relays_on_one_database_tell_each_other_and_of_one_that_is_killed_nothing_acknowledged_is_lost() {
    let Some(server) = Postgresql::start() else { return };
    let settings = settings(&server.database("two"));
    let site = Site::new();
    let mut one = RelayProcess::start(&site, "one", &settings);
    let two = RelayProcess::start(&site, "two", &settings);
    let mut anna = Member::founder();
    let ben = anna.admit();
    let mut bens = ben.live(&two.url).await;
    assert_eq!(bens.pulled().await, ben.token, "what ben showed");
    let mut annas = anna.live(&one.url).await;
    // each is told at once of what the other relay was given
    let mut given = ben.token.clone();
    for cursor in 1..=3 {
        let entry = anna.entry(100);
        annas.push(cursor, entry.clone()).await;
        pushed(&mut bens, &entry).await;
        given.push(entry);
    }
    annas.acknowledged(3).await;

    let entries: Vec<Vec<u8>> = (0..200).map(|_| anna.entry(1000)).collect();
    for (at, entry) in (4..).zip(&entries) {
        annas.push(at, entry.clone()).await;
    }
    let mut acknowledged = 0;
    while acknowledged < 50 {
        if let Some(Frame::PushAck { cursor }) = annas.recv().await {
            acknowledged = cursor.0;
        }
    }
    one.kill();
    // what was still on its way back counts too
    while let Some(frame) = annas.recv().await {
        if let Frame::PushAck { cursor } = frame {
            acknowledged = cursor.0;
        }
    }
    given.extend(entries.iter().take(usize::try_from(acknowledged).unwrap() - 3).cloned());
    let mut again = ben.live(&two.url).await;
    let pulled = again.pulled().await;
    for entry in &given {
        assert!(pulled.contains(entry), "{} of {}", pulled.len(), given.len());
    }
    // the rest comes by way of the other, and by the one that is back
    let mut annas = anna.live(&two.url).await;
    for (at, entry) in (4..).zip(&entries) {
        annas.push(at, entry.clone()).await;
    }
    annas.acknowledged(203).await;
    one.restart();
    let mut annas = anna.live(&one.url).await;
    let pulled = annas.pulled().await;
    assert_eq!(pulled.len(), 1 + 203, "each once");
    assert_eq!(one.metric("syncrelay_groups"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_away_amid_pushes_keeps_what_was_acknowledged_and_devices_keep_the_rest() {
    let Some(mut server) = Postgresql::start() else { return };
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", &settings(&server.database("away")));
    let apart = site.strangers(&[&relay.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    until_handed_over(&anna).await;
    for round in 0..3 {
        let cursor = anna.push(format!("before {round}")).await.unwrap().cursor;
        until(&anna, "acknowledged", |status| status.relays[0].acknowledged >= cursor.0).await;
        for n in 0..50 {
            anna.push(format!("meanwhile {round} {n}")).await.unwrap();
        }
        if round == 1 {
            server.restart();
        } else {
            server.crash();
        }
    }
    let held = anna.status().await.unwrap().relays[0].acknowledged;
    let pulled = anna.pull(sync_client::Cursor(0), 10_000).await.unwrap();
    let sure = pulled.blobs.into_iter().filter(|blob| blob.cursor.0 <= held);
    let sure: Vec<String> = sure.map(|blob| String::from_utf8_lossy(&blob.bytes).into_owned()).collect();
    assert!(sure.iter().filter(|body| body.starts_with("before")).count() >= 3);
    // the device goes: what ben gets was in the database
    device.close().await;
    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    for body in &sure {
        until_has(&ben, body).await;
    }
    device.close().await;
    let device = site.open("anna").await;
    until_handed_over(&device.only_client().unwrap()).await;
    device.close().await;
    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    until_has(&ben, "meanwhile 2 49").await;
    assert_eq!(bodies(&ben).await.len(), 3 * 51, "each once");
    device.close().await;
    drop(apart);
}

#[test]
fn a_database_that_cannot_be_reached_or_means_nothing_is_said_at_the_start() {
    let site = Site::new();
    std::fs::create_dir(site.path("nothing")).unwrap();
    let nowhere = format!("postgres://relay@/relay?host={}", site.path("nothing").display());
    for (database, said) in [(&*nowhere, "check that it runs"), ("sqlite:here", "postgres://USER:PASSWORD@HOST/NAME")] {
        let config = site.path("relay.toml");
        std::fs::write(&config, settings(database)).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sync-relay"));
        command.args(["--bind", "127.0.0.1:0", "--data"]).arg(site.path("data")).arg("--config").arg(&config);
        let output = command.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(said), "{error}");
    }
}

#[test]
fn over_tls_only_a_certificate_that_the_operator_trusts_is_believed() {
    let Some(mut server) = Postgresql::start() else { return };
    let site = Site::new();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    // the server's own process may write where it alone may read
    for (file, text) in [("server.crt", &certificate), ("server.key", &key)] {
        let put = format!(
            "COPY (SELECT unnest(string_to_array(trim('{text}'), chr(10)))) TO PROGRAM 'umask 077; cat > {file}'"
        );
        server.ask("postgres", &put);
    }
    server.database("sealed");
    for setting in ["ssl = on", "listen_addresses = 'localhost'"] {
        server.ask("postgres", &format!("ALTER SYSTEM SET {setting}"));
    }
    server.restart();
    std::fs::write(site.path("trusted.pem"), &certificate).unwrap();
    let address = format!("postgres://relay@localhost:{}/sealed?sslmode=require", server.port);
    let trusted = format!("database_ca = '{}'\n{}", site.path("trusted.pem").display(), settings(&address));
    let relay = RelayProcess::start(&site, "relay", &trusted);
    assert_eq!(relay.metric("syncrelay_groups"), 0);
    let sealed = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
        WHERE application_name = 'sync-relay'";
    assert_eq!(server.ask("postgres", sealed), "t");

    let config = site.path("untrusted.toml");
    std::fs::write(&config, settings(&address)).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sync-relay"));
    command.args(["--bind", "127.0.0.1:0", "--data"]).arg(site.path("other")).arg("--config").arg(&config);
    let output = command.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("certificate"), "{error}");
}
