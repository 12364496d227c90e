//! Homes and databases that are damaged, foreign, read-only, full or gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use sync_client::{Cursor, Device, SyncClient};

use crate::site::*;

/// Opens a home that must not open, within reason, and tells the code.
async fn fails(site: &Site, name: &str) -> String {
    let start = Instant::now();
    let error = Device::open(site.config(name)).await.expect_err("does not open");
    assert!(start.elapsed() < PATIENCE, "{error}");
    error.code().to_owned()
}

/// A closed home with some blobs in it.
async fn filled(site: &Site, name: &str) -> PathBuf {
    let device = site.device(name).await;
    let client = founder(&device).await;
    client.push_many((0..64).map(|_| noise(4000)).collect()).await.expect("pushes");
    drop(client);
    device.close().await;
    site.path(name).join("sync.db")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_newer_database_is_told_apart_and_left_as_it_is() {
    let site = Site::new();
    let database = filled(&site, "a").await;
    let good = fs::read(&database).expect("reads");
    // the version is a big-endian number at offset 60 of the header
    let newer = [&good[..60], &99_u32.to_be_bytes(), &good[64..]].concat();
    let foreign = [&good[..68], &[0x0b, 0xad, 0xf0, 0x0d], &good[72..]].concat();
    let cases: [(&str, Vec<u8>, &[&str]); 6] = [
        ("cut to half", good[..good.len() / 2].to_vec(), &["corrupt"]),
        ("cut within its header", good[..50].to_vec(), &["not-a-database", "corrupt"]),
        ("garbage in the header", [&noise(100)[..], &good[100..]].concat(), &["not-a-database"]),
        ("garbage all over", [&good[..100], &noise(good.len() - 100)].concat(), &["corrupt", "not-a-database"]),
        ("of a newer version", newer, &["newer-database"]),
        ("of another program", foreign, &["not-a-database"]),
    ];
    for (what, bytes, codes) in cases {
        overwrite(&database, &bytes);
        let code = fails(&site, "a").await;
        assert!(codes.contains(&&*code), "{what}: {code}");
        assert!(fs::read(&database).expect("reads") == bytes, "{what}: changed");
    }
    overwrite(&database, &good);
    let client = SyncClient::new(site.config("a")).await.expect("opens again");
    assert_eq!(client.pull(Cursor(0), 100).await.expect("pulls").blobs.len(), 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_destroyed_in_the_middle_are_an_error_and_no_panic() {
    let site = Site::new();
    let database = filled(&site, "a").await;
    let good = fs::read(&database).expect("reads");
    let page = 8192;
    for at in (1..good.len() / page).step_by(3) {
        let mut bytes = good.clone();
        bytes[at * page..(at + 1) * page].fill(0xa5);
        overwrite(&database, &bytes);
        // the page may be one that opening needs, that reading needs, or that nothing needs
        match Device::open(site.config("a")).await {
            Err(error) => assert!(["corrupt", "not-a-database", "secret"].contains(&error.code()), "{at}: {error}"),
            Ok(device) => {
                if let Ok(client) = device.only_client() {
                    match client.pull(Cursor(0), 100).await {
                        Ok(pulled) => assert!(pulled.blobs.len() <= 64),
                        Err(error) => assert_eq!(error.code(), "corrupt", "{at}: {error}"),
                    }
                }
                device.close().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r9_a_database_deleted_under_a_running_device_harms_no_one_else() {
    let friends = Friends::new().await;
    friends.alice.push("before").await.expect("pushes");
    eventually(&friends.bob, &["before"]).await;
    for side in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(friends.site.path("a").join(format!("sync.db{side}")));
    }
    let start = Instant::now();
    let error = friends.alice.push("into nowhere").await.expect_err("nothing is acknowledged that nobody will find");
    assert_eq!(error.code(), "store", "{error}");
    assert!(start.elapsed() < PATIENCE);
    let _ = friends.alice.status().await;
    let _ = friends.alice.pull(Cursor(0), 10).await;
    friends.bob.push("bob goes on").await.expect("pushes");
    let Friends { site, alice, bob } = friends;
    let a = alice.device();
    drop(alice);
    tokio::time::timeout(PATIENCE, a.close()).await.expect("closes");
    assert!(bodies(&bob).await.contains(&"before".to_owned()));
    // it is not begun anew unasked; then it has no group any more, and its key is still its own
    assert_eq!(fails(&site, "a").await, "database-gone");
    fs::write(site.path("a").join("sync.db"), b"").expect("writes");
    assert_eq!(fails(&site, "a").await, "database-gone");
    sync_client::home::Home::begin_anew(site.path("a")).expect("begins anew");
    let a = site.open("a").await;
    assert!(a.groups().is_empty());
    let alice = pair(&bob, &a).await;
    eventually_has(&alice, "before").await;
    eventually_has(&alice, "bob goes on").await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn l1_a_key_file_that_is_gone_foreign_or_open_to_others_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;

    let site = Site::new();
    let _ = filled(&site, "a").await;
    site.init("other");
    let key = site.path("a").join("key");
    let good = fs::read(&key).expect("reads");

    fs::remove_file(&key).expect("removes");
    assert_eq!(fails(&site, "a").await, "key-store");
    fs::copy(site.path("other").join("key"), &key).expect("copies");
    assert_eq!(fails(&site, "a").await, "secret", "the key of another home");
    for bytes in [&b""[..], b"no key", &good[..good.len() / 2], &noise(5000)] {
        fs::write(&key, bytes).expect("writes");
        assert_eq!(fails(&site, "a").await, "key-store");
    }
    fs::write(&key, &good).expect("writes");
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).expect("permissions");
        assert_eq!(fails(&site, "a").await, "key-store", "mode {mode:o}");
    }
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("permissions");
    let client = SyncClient::new(site.config("a")).await.expect("opens again");
    assert_eq!(client.pull(Cursor(0), 100).await.expect("pulls").blobs.len(), 64);
}

/// A small file system of its own, where this process may mount one.
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// None where that is not allowed.
    pub(crate) fn new(at: &Path, size: &str) -> Option<Self> {
        fs::create_dir(at).expect("a directory");
        Self::run(&["-t", "tmpfs", "-o", &format!("mode=700,size={size}"), "tmpfs"], at).then(|| Self(at.to_owned()))
    }

    fn read_only(&self) -> bool {
        Self::run(&["-o", "remount,ro"], &self.0)
    }

    fn read_write(&self) -> bool {
        Self::run(&["-o", "remount,rw"], &self.0)
    }

    fn run(arguments: &[&str], at: &Path) -> bool {
        let done = Command::new("mount").args(arguments).arg(at).output();
        done.is_ok_and(|output| output.status.success())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r9_a_full_disk_is_told_and_loses_nothing_that_was_acknowledged() {
    let site = Site::new();
    let Some(_mount) = Mount::new(&site.path("a"), "2m") else {
        println!("skipped: no file system can be mounted here");
        return;
    };
    let a = site.device("a").await;
    let b = site.device("b").await;
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    let ballast = site.path("a").join("ballast");
    fs::write(&ballast, noise(600 << 10)).expect("fits");
    let mut kept = Vec::new();
    let error = loop {
        assert!(kept.len() < 100, "the disk never fills");
        let body = format!("{} {}", kept.len(), data_encoding::HEXLOWER.encode(&noise(20_000)));
        match alice.push(body.clone()).await {
            Ok(_) => kept.push(body),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), "disk-full", "{error}");
    // what is refused stays refused, several at once too, and reading goes on
    let many = alice.push_many((0..8).map(|_| noise(40_000)).collect()).await.expect_err("still full");
    assert_eq!(many.code(), "disk-full", "{many}");
    assert_eq!(bodies(&alice).await, kept);
    eventually_all(&bob, &sorted(&kept)).await;

    // what a friend sends waits until there is room
    bob.push(noise(100_000)).await.expect("pushes");
    fs::remove_file(&ballast).expect("removes");
    let after = "after room was made".to_owned();
    alice.push(after.clone()).await.expect("works again");
    kept.push(after);
    until(&alice, "all there", |status| status.max_cursor >= bob.last_cursor().0 && status.pending == 0).await;
    assert_eq!(bodies(&alice).await.len(), kept.len() + 1);
    let group = alice.group();
    drop(alice);
    a.close().await;
    let a = site.open("a").await;
    let alice = a.client(group).expect("a client");
    let got = bodies(&alice).await;
    assert!(kept.iter().all(|body| got.contains(body)), "{} of {}", got.len(), kept.len());
    assert_eq!(alice.status().await.expect("status").forks, []);
    drop(alice);
    a.close().await;
}

fn sorted(bodies: &[String]) -> Vec<&str> {
    let mut sorted: Vec<&str> = bodies.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    sorted
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_that_cannot_be_written_is_told_and_works_once_it_can() {
    let site = Site::new();
    let Some(mount) = Mount::new(&site.path("a"), "8m") else {
        println!("skipped: no file system can be mounted here");
        return;
    };
    let _ = filled(&site, "a").await;
    assert!(mount.read_only(), "remounts");
    let code = fails(&site, "a").await;
    assert_eq!(code, "no-permission");
    assert!(mount.read_write(), "remounts");
    let device = site.open("a").await;
    let client = device.only_client().expect("a client");
    assert_eq!(client.pull(Cursor(0), 100).await.expect("pulls").blobs.len(), 64);
    drop(client);
    device.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_is_no_home_is_told() {
    let site = Site::new();
    assert_eq!(fails(&site, "nothing").await, "not-a-home");
    fs::create_dir(site.path("empty")).expect("a directory");
    assert_eq!(fails(&site, "empty").await, "not-a-home");
    fs::write(site.path("file"), b"text").expect("writes");
    assert!(["not-a-home", "home"].contains(&&*fails(&site, "file").await));
    let _ = filled(&site, "a").await;
    let settings = site.path("a").join("home.toml");
    let good = fs::read_to_string(&settings).expect("reads");
    for (text, code) in [
        (good.replace("version = 1", "version = 2"), "newer-home"),
        ("version = 1".to_owned(), "home"),
        ("[[[".to_owned(), "home"),
        ("x".repeat(1 << 20), "home"),
    ] {
        fs::write(&settings, text).expect("writes");
        assert_eq!(fails(&site, "a").await, code);
    }
    fs::write(&settings, good).expect("writes");
    SyncClient::new(site.config("a")).await.expect("opens again");
}
