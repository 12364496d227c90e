//! Backups: a device's place in its groups survives the device.

use std::path::Path;

use sync_client::{ClientError, Device, SyncClient};
use sync_types::Role;

use crate::site::*;

const PASSPHRASE: &str = "seven lamps under a quiet bridge";

/// A device that was made and recovered from a file.
async fn recovered(site: &Site, name: &str, file: &Path) -> Device {
    let device = site.device(name).await;
    device.recover(file, PASSPHRASE).await.expect("recovers");
    device
}

fn only(device: &Device) -> SyncClient {
    device.only_client().expect("one group")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_is_taken_again_from_a_backup_beside_the_device_it_is_of() {
    let Friends { site, alice, bob } = Friends::new().await;
    bob.push("bob before").await.expect("pushes");
    eventually_has(&alice, "bob before").await;
    let file = site.path("bob.backup");
    let backed_up = bob.device().back_up(&file, PASSPHRASE).await.expect("backs up");
    assert_eq!(backed_up.groups, [bob.group()]);
    assert_eq!(backed_up.bytes, std::fs::metadata(&file).expect("the file").len());
    bob.push("bob after").await.expect("pushes");
    eventually_has(&alice, "bob after").await;
    let (lost, old_author, old_device) = (bob.device(), bob.author(), bob.endpoint_id());
    drop(bob);
    lost.close().await;

    let again = recovered(&site, "b2", &file).await;
    let bob = only(&again);
    assert!(bob.author() != old_author && bob.endpoint_id() != old_device, "it writes and is dialled as another");
    for text in ["bob before", "bob after"] {
        eventually_has(&bob, text).await;
    }
    bob.push("bob is back").await.expect("pushes");
    eventually_has(&alice, "bob is back").await;
    let repeated = again.recover(&file, PASSPHRASE).await.expect("may be repeated");
    assert_eq!((repeated.groups.len(), repeated.here.len(), repeated.name.as_str()), (0, 1, "b"));

    let found = only(&site.open("b").await);
    found.push("found in a drawer").await.expect("pushes");
    for client in [&alice, &bob] {
        eventually_has(client, "found in a drawer").await;
    }
    eventually_has(&found, "bob is back").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_founder_that_recovers_may_let_others_in() {
    let site = Site::new();
    let (file, alone) = (site.path("file"), site.device("a").await);
    founder(&alone).await;
    alone.back_up(&file, PASSPHRASE).await.expect("backs up");
    alone.close().await;

    let alice = only(&recovered(&site, "a2", &file).await);
    let bob = pair(&alice, &site.device("b").await).await;
    bob.push("let in").await.expect("pushes");
    eventually_has(&alice, "let in").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passphrase_groups_place_is_in_a_backup_too() {
    let site = Site::new();
    let (file, alice) = (site.path("file"), site.device("a").await);
    let words = "orbit walnut cactus velvet lantern pigeon";
    alice.open_passphrase_group("friends", words).await.expect("opens");
    alice.back_up(&file, PASSPHRASE).await.expect("backs up");
    let before = only(&alice);
    before.push("known").await.expect("pushes");

    let after = only(&recovered(&site, "a2", &file).await);
    eventually_has(&after, "known").await;
    after.push("and back").await.expect("pushes");
    eventually_has(&before, "and back").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_replaces_an_older_one_and_nothing_else() {
    let site = Site::new();
    let alice = site.device("a").await;
    founder(&alice).await;
    let (thesis, file) = (site.path("thesis"), site.path("file"));
    std::fs::write(&thesis, "years of work").expect("written");
    let refused = alice.back_up(&thesis, PASSPHRASE).await;
    assert!(matches!(refused, Err(ClientError::BackupExists(_))), "{refused:?}");
    assert_eq!(std::fs::read(&thesis).expect("read"), b"years of work");
    let weak = alice.back_up(&file, "password").await;
    assert!(matches!(weak, Err(ClientError::WeakPassphrase(_))), "{weak:?}");
    let nowhere = alice.back_up(&site.path("no/such/file"), PASSPHRASE).await;
    assert!(matches!(nowhere, Err(ClientError::BackupFile { .. })), "{nowhere:?}");
    assert!(!file.exists());

    alice.back_up(&file, PASSPHRASE).await.expect("backs up");
    let first = std::fs::read(&file).expect("read");
    let second_group = alice.create_group().await.expect("a group");
    let both = alice.back_up(&file, PASSPHRASE).await.expect("backs up again");
    assert!(both.groups.len() == 2 && both.groups.contains(&second_group));
    assert_ne!(std::fs::read(&file).expect("read"), first);
    assert!(!site.path("file.new").exists(), "nothing is left beside it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_backup_or_another_passphrases_changes_nothing() {
    let site = Site::new();
    let (file, alice) = (site.path("file"), site.device("a").await);
    founder(&alice).await;
    alice.back_up(&file, PASSPHRASE).await.expect("backs up");
    let other = site.device("b").await;
    let code = |result: Result<_, ClientError>| result.map_err(|error| error.code()).expect_err("is refused");
    assert_eq!(code(other.recover(&file, "another passphrase").await), "wrong-passphrase");
    assert_eq!(code(other.recover(&site.path("none"), PASSPHRASE).await), "io");
    let mut bytes = std::fs::read(&file).expect("read");
    bytes.truncate(bytes.len() - 1);
    std::fs::write(&file, &bytes).expect("written");
    assert_eq!(code(other.recover(&file, PASSPHRASE).await), "backup");
    assert!(other.groups().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn k6_a_stolen_backup_of_a_removed_member_opens_nothing_new() {
    let site = Site::new();
    let (file, a, b) = (site.path("file"), site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let invite = a.invite_person(alice.group(), Role::Member, LIFETIME, &[]).await.expect("invites");
    let bob = b.join(&invite.code, |_| {}).await.expect("joins");
    alice.push("before").await.expect("pushes");
    eventually_has(&bob, "before").await;
    b.back_up(&file, PASSPHRASE).await.expect("backs up");
    let removed = alice.remove_member("b").await.expect("removes");
    assert!(removed.done, "{removed:?}");
    alice.push("after").await.expect("pushes");
    until(&bob, "alone", |status| status.peers.iter().all(|peer| peer.state != "connected")).await;
    drop(bob);
    b.close().await;

    let before = refused(&alice).await;
    let thief = only(&recovered(&site, "thief", &file).await);
    until_refused(&alice, before).await;
    thief.push("let me in").await.expect("is written down at home");
    until_refused(&alice, before + 1).await;
    assert!(!bodies(&thief).await.contains(&"after".to_owned()));
    let status = alice.status().await.expect("status");
    assert!(status.peers.iter().all(|peer| peer.state != "connected"), "{status:?}");
    assert!(!bodies(&alice).await.contains(&"let me in".to_owned()));
}
