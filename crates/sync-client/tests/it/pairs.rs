//! Two and more devices in one process.

use std::time::Duration;

use sync_client::{ClientError, Cursor, Device, Event};

use crate::site::*;

#[tokio::test(flavor = "multi_thread")]
async fn two_devices_pair_by_code_and_exchange_blobs() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    alice.push("before").await.expect("pushes");
    let bob = pair(&alice, &b).await;
    eventually(&bob, &["before"]).await;
    let mut events = alice.subscribe();
    let pushed = bob.push("after").await.expect("pushes");
    eventually(&alice, &["before", "after"]).await;
    assert_eq!(bob.handed_to(pushed.cursor, PATIENCE).await, vec!["a".to_owned()]);
    let blob = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(Event::BlobAvailable { blob_id, .. }) = events.next().await {
                return blob_id;
            }
        }
    });
    assert_eq!(blob.await.expect("an event"), pushed.blob_id);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_joins_too_and_an_invite_admits_one() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    b.join(&invite.link, |_| {}).await.expect("joins");
    for text in [&invite.link, &invite.code] {
        let error = c.join(text, |_| {}).await.expect_err("used");
        assert_eq!(error.code(), "invite-used", "{error}");
    }
    let revoked = a.invite(alice.group(), LIFETIME).await.expect("invites");
    a.revoke(&revoked.code).await.expect("revokes");
    assert_eq!(c.join(&revoked.code, |_| {}).await.expect_err("revoked").code(), "invite-revoked");
    assert_eq!(c.join(&revoked.link, |_| {}).await.expect_err("revoked").code(), "invite-revoked");
    let short = a.invite(alice.group(), Duration::from_millis(10)).await.expect("invites");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(c.join(&short.link, |_| {}).await.expect_err("expired").code(), "invite-expired");
    assert_eq!(c.join(&short.code, |_| {}).await.expect_err("expired").code(), "invite-expired");
    assert_eq!(c.join("no code", |_| {}).await.expect_err("malformed").code(), "invite-malformed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_pushed_while_the_other_was_away_arrives_in_order_once() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    let group = alice.group();
    alice.handed_to(alice.last_cursor(), PATIENCE).await;
    drop(bob);
    b.close().await;
    let texts: Vec<String> = (0..100).map(|n| format!("blob {n}")).collect();
    for text in &texts {
        alice.push(text.as_str()).await.expect("pushes");
    }
    assert_eq!(alice.status().await.expect("status").pending, 100);
    let b = site.open("b").await;
    let bob = b.client(group).expect("a client");
    let expected: Vec<&str> = texts.iter().map(String::as_str).collect();
    eventually(&bob, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_travel_through_a_third_device() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    alice.push("from alice").await.expect("pushes");
    eventually(&bob, &["from alice"]).await;
    a.close().await;
    let c = site.device("c").await;
    let carol = pair(&bob, &c).await;
    eventually(&carol, &["from alice"]).await;
    carol.push("from carol").await.expect("pushes");
    eventually(&bob, &["from alice", "from carol"]).await;
    let group = carol.group();
    c.close().await;
    let a = site.open("a").await;
    eventually(&a.client(group).expect("a client"), &["from alice", "from carol"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_at_most_a_mebibyte_and_a_retry_is_stored_once() {
    let site = Site::new();
    let a = site.device("a").await;
    let alice = founder(&a).await;
    let full = vec![7; sync_client::MAX_APP_BYTES];
    alice.push(full.clone()).await.expect("fits");
    let error = alice.push(vec![7; sync_client::MAX_APP_BYTES + 1]).await.expect_err("too large");
    assert!(matches!(error, ClientError::TooLarge { .. }), "{error}");
    let id = sync_client::BlobId([1; 16]);
    let first = alice.push_as(id, "once").await.expect("pushes");
    assert_eq!(alice.push_as(id, "once").await.expect("again"), first);
    assert_eq!(alice.push_as(id, "twice").await.expect_err("other bytes").code(), "blob-id-reused");
    assert_eq!(alice.pull(Cursor(0), 10).await.expect("pulls").blobs.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_home_goes_on_as_another_author_and_device() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    alice.push("original").await.expect("pushes");
    let group = alice.group();
    let (author, device) = (alice.author(), a.device_id());
    drop(alice);
    a.close().await;
    copy_dir(&site.path("a"), &site.path("copy"));
    let copy = site.open("copy").await;
    let copied = copy.client(group).expect("a client");
    assert_ne!(copied.author(), author);
    assert_ne!(copy.device_id(), device);
    copied.push("by the copy").await.expect("pushes");
    let a = site.open("a").await;
    let alice = a.client(group).expect("a client");
    assert_eq!(alice.author(), author, "the original stays who it is");
    alice.push("by the original").await.expect("pushes");
    eventually_all(&bob, &["by the copy", "by the original", "original"]).await;
    assert!(bob.status().await.expect("status").forks.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_is_noticed_at_first_contact_and_nothing_is_lost() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    let group = alice.group();
    alice.push("kept").await.expect("pushes");
    eventually(&bob, &["kept"]).await;
    // what is not known to be held elsewhere would be issued again with what was written meanwhile
    assert!(!alice.handed_to(alice.last_cursor(), PATIENCE).await.is_empty());
    drop(alice);
    a.close().await;
    let database = site.path("a").join("sync.db");
    let old = std::fs::read(&database).expect("reads");

    let a = site.open("a").await;
    let alice = a.client(group).expect("a client");
    let author = alice.author();
    alice.push("forgotten").await.expect("pushes");
    eventually(&bob, &["kept", "forgotten"]).await;
    drop((alice, bob));
    a.close().await;
    b.close().await;

    // written in place: inode, path and birth time stay, so that nothing local shows it
    overwrite(&database, &old);
    let a = site.open("a").await;
    let alice = a.client(group).expect("a client");
    assert_eq!(alice.author(), author, "nothing local shows the rollback");
    alice.push("meanwhile").await.expect("pushes");
    let b = site.open("b").await;
    let bob = b.client(group).expect("a client");
    for client in [&alice, &bob] {
        eventually_all(client, &["forgotten", "kept", "meanwhile"]).await;
        assert!(client.status().await.expect("status").forks.is_empty(), "no number was used twice");
    }
    assert_ne!(alice.author(), author);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_is_open_once() {
    let site = Site::new();
    let _a = site.device("a").await;
    let error = Device::open(site.config("a")).await.expect_err("held");
    assert_eq!(error.code(), "busy", "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passphrase_and_a_name_are_a_group_whose_devices_find_each_other() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let words = "orbit velvet canyon mimic thunder apology";
    let group = a.open_passphrase_group("Family ", words).await.expect("opens");
    assert_eq!(b.open_passphrase_group("family", words).await.expect("opens"), group);
    let (alice, bob) = (a.client(group).expect("a client"), b.client(group).expect("a client"));
    assert_ne!(alice.author(), bob.author());
    alice.push("hello").await.expect("pushes");
    eventually(&bob, &["hello"]).await;
    let weak = a.open_passphrase_group("friends", "password1").await.expect_err("weak");
    assert_eq!(weak.code(), "weak-passphrase");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_never_paired_with_each_other_meet() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    let carol = pair(&alice, &c).await;
    drop(alice);
    a.close().await;
    bob.push("to carol").await.expect("pushes");
    eventually(&carol, &["to carol"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_code_says_so_after_its_maker_is_gone_and_an_open_one_outlives_a_restart() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let group = alice.group();
    let used = a.invite(group, LIFETIME).await.expect("invites");
    b.join(&used.code, |_| {}).await.expect("joins");
    let open = a.invite(group, LIFETIME).await.expect("invites");
    drop(alice);
    a.close().await;
    assert_eq!(c.join(&used.code, |_| {}).await.expect_err("used").code(), "invite-used");
    assert_eq!(c.join(&open.code, |_| {}).await.expect_err("nobody there").code(), "invite-not-found");
    let _a = site.open("a").await;
    c.join(&open.code, |_| {}).await.expect("joins");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_device_lets_go_of_its_home() {
    let site = Site::new();
    let a = site.device("a").await;
    let alice = founder(&a).await;
    drop(a);
    alice.push("still open").await.expect("pushes");
    drop(alice);
    let a = site.open("a").await;
    eventually(&a.only_client().expect("one group"), &["still open"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_that_is_moved_more_often_than_a_token_is_long_still_syncs_and_invites() {
    let site = Site::new();
    let a = site.device("a").await;
    let group = founder(&a).await.group();
    a.close().await;
    let (first, second) = (site.path("a"), site.path("moved"));
    for _ in 0..=sync_client::MAX_TOKEN / 2 {
        for (from, to, name) in [(&first, &second, "moved"), (&second, &first, "a")] {
            std::fs::rename(from, to).expect("moves");
            let network = sync_client::Network { online: false, ..sync_client::Network::default() };
            let moved = Device::open(sync_client::Config { network, ..site.config(name) }).await.expect("opens");
            moved.client(group).expect("a client").push("moved").await.expect("pushes");
            moved.close().await;
        }
    }
    let (a, b) = (site.open("a").await, site.device("b").await);
    let bob = pair(&a.client(group).expect("a client"), &b).await;
    eventually(&bob, &vec!["moved"; sync_client::MAX_TOKEN / 2 * 2 + 2]).await;
}
