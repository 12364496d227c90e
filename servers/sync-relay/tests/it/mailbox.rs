//! What devices get through a relay that never meet, and what the relay has of it.

use sync_client::Event;

use crate::site::{RelayProcess, Site, bodies, never_met, until, until_handed_over, until_has};

const SECRET: &str = "the milk is in the blue jug";

#[tokio::test(flavor = "multi_thread")]
async fn what_one_device_pushed_another_gets_that_was_never_there_with_it() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let apart = site.strangers(&[&relay.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    anna.push(SECRET).await.unwrap();
    until_handed_over(&anna).await;
    device.close().await;

    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    until_has(&ben, SECRET).await;
    ben.push("thanks").await.unwrap();
    until_handed_over(&ben).await;
    never_met(&ben).await;
    device.close().await;

    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    until_has(&anna, "thanks").await;
    assert_eq!(bodies(&anna).await, [SECRET, "thanks"]);
    device.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_reaches_others_that_are_connected_at_once() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let apart = site.strangers(&[&relay.url]).await;
    let (a, b) = (site.open("anna").await, site.open("ben").await);
    let (anna, ben) = (a.only_client().unwrap(), b.only_client().unwrap());
    for client in [&anna, &ben] {
        until(client, "connected", |status| status.relays.iter().all(|relay| relay.state == "connected")).await;
    }
    let mut events = ben.subscribe();
    anna.push(SECRET).await.unwrap();
    let arrived = tokio::time::timeout(crate::site::PATIENCE, async {
        while !matches!(events.next().await, Some(Event::BlobAvailable { .. })) {}
    });
    arrived.await.unwrap();
    assert_eq!(bodies(&ben).await, [SECRET]);
    never_met(&ben).await;
    a.close().await;
    b.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relays_directory_holds_no_content_name_address_or_key_of_a_device() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "");
    let apart = site.strangers(&[&relay.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    let shared = site.path("holiday-pictures");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("sunset-at-sea.txt"), "a very red sunset").unwrap();
    device.share_folder(&shared, Some(anna.group()), Default::default()).await.unwrap();
    anna.push(SECRET).await.unwrap();
    until_handed_over(&anna).await;
    let (author, group) = (anna.author(), anna.group());
    let ids = [device.device_id().0.to_vec()];
    let peers = anna.status().await.unwrap().peers;
    device.close().await;

    for _ in 0..2 {
        let stored = relay.stored();
        let has = |bytes: &[u8]| stored.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(&author.0) && has(&group.0), "what it must see is there, so the search finds what is");
        for text in [SECRET, "holiday-pictures", "sunset-at-sea", "red sunset", "of-the-household", "127.0.0.1"] {
            assert!(!has(text.as_bytes()), "{text}");
        }
        for id in &ids {
            assert!(!has(id));
        }
        for peer in &peers {
            let id = data_encoding::HEXLOWER.decode(peer.device.as_bytes()).unwrap();
            assert!(!has(&id) && !has(peer.device.as_bytes()));
        }
        for name in ["anna", "ben"] {
            for entry in std::fs::read_dir(site.path(name)).unwrap() {
                let path = entry.unwrap().path();
                let is_key = path.is_file() && path.metadata().unwrap().len() < 4096;
                for line in std::fs::read(&path).unwrap_or_default().split(|byte| *byte == b'\n') {
                    assert!(!is_key || line.len() < 16 || !has(line), "{}", path.display());
                }
            }
        }
        // the same once all of it is in the main file
        relay.stop();
        relay.restart();
    }
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_killed_keeps_every_push_that_it_acknowledged() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "[limits]\nmessages_per_minute = 100000\n");
    let apart = site.strangers(&[&relay.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    until_handed_over(&anna).await;
    let mut acknowledged = 0;
    for round in 0..4 {
        let cursor = anna.push(format!("before {round}")).await.unwrap().cursor;
        until(&anna, "acknowledged", |status| status.relays[0].acknowledged >= cursor.0).await;
        acknowledged += 1;
        // while more is on its way
        for n in 0..50 {
            anna.push(format!("meanwhile {round} {n}")).await.unwrap();
        }
        relay.kill();
        if round < 3 {
            relay.restart();
        }
    }
    let held = anna.status().await.unwrap().relays[0].acknowledged;
    let sure: Vec<String> = {
        let pulled = anna.pull(sync_client::Cursor(0), 10_000).await.unwrap();
        let sure = pulled.blobs.into_iter().filter(|blob| blob.cursor.0 <= held);
        sure.map(|blob| String::from_utf8_lossy(&blob.bytes).into_owned()).collect()
    };
    assert!(sure.iter().filter(|body| body.starts_with("before")).count() >= acknowledged);
    // the device goes before the relay comes back: what ben gets was in its database when it was killed
    device.close().await;
    relay.restart();
    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    for body in &sure {
        until_has(&ben, body).await;
    }
    device.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_lost_its_database_is_given_back_what_it_lost() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "");
    let apart = site.strangers(&[&relay.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    anna.push(SECRET).await.unwrap();
    until_handed_over(&anna).await;
    relay.stop();
    relay.lose_database();
    relay.restart();
    assert_eq!(relay.metric("syncrelay_groups"), 0);
    let stored = || relay.metric("syncrelay_blobs_stored_total");
    let give_up = std::time::Instant::now() + crate::site::PATIENCE;
    let all = anna.last_cursor().0;
    while stored() < all {
        assert!(std::time::Instant::now() < give_up, "{} of {all}", stored());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    device.close().await;
    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    until_has(&ben, SECRET).await;
    device.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_relays_one_that_is_away_delays_nothing() {
    let site = Site::new();
    let mut gone = RelayProcess::start(&site, "gone", "");
    let relay = RelayProcess::start(&site, "relay", "");
    let apart = site.strangers(&[&gone.url, &relay.url]).await;
    gone.kill();
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    anna.push(SECRET).await.unwrap();
    until_handed_over(&anna).await;
    let status = anna.status().await.unwrap();
    assert_eq!(status.relays.len(), 2);
    device.close().await;
    let device = site.open("ben").await;
    let ben = device.only_client().unwrap();
    assert_eq!(device.relays().await.unwrap().len(), 2, "who was let in was told of both");
    until_has(&ben, SECRET).await;
    // back again, it is given everything too
    gone.lose_database();
    gone.restart();
    until(&ben, "at both", |status| status.relays.iter().all(|each| each.state == "connected")).await;
    let give_up = std::time::Instant::now() + crate::site::PATIENCE;
    while gone.metric("syncrelay_blobs_stored_total") < ben.last_cursor().0 {
        assert!(std::time::Instant::now() < give_up);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    device.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_removed_is_used_no_longer() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let apart = site.strangers(&[&relay.url]).await;
    let device = site.open("anna").await;
    let anna = device.only_client().unwrap();
    anna.push("only the relay has this").await.unwrap();
    until_handed_over(&anna).await;
    device.remove_relay(&relay.url, None).await.unwrap();
    assert_eq!(device.remove_relay(&relay.url, None).await.unwrap_err().code(), "unknown-relay");
    assert!(anna.status().await.unwrap().relays.is_empty());
    let give_up = std::time::Instant::now() + crate::site::PATIENCE;
    while relay.metric("syncrelay_connections_active") > 1 {
        assert!(std::time::Instant::now() < give_up);
    }
    anna.push(SECRET).await.unwrap();
    // also what only the relay had: nobody can be sure of it any more
    until(&anna, "waiting", |status| status.pending >= 2).await;
    device.close().await;
    drop(apart);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_tell_numbers() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let (status, body) = relay.http("/health");
    assert!(status.contains("200"), "{status}");
    let health: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&health["status"], &health["groups"]), (&"ok".into(), &0.into()));
    assert_eq!(relay.metric("syncrelay_blobs_stored_total"), 0);
    assert!(relay.http("/nothing").0.contains("404"));
}
