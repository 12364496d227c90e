//! Snapshots of folders: newcomers, devices that were away, logs that shrink, and snapshots that lie.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use sync_client::folders::{FolderLog, FolderOptions, FolderState, FolderStatus};
use sync_client::{Device, FolderId, GroupId};

use crate::site::*;

/// Entries after which a snapshot is written here.
const AFTER: u64 = 30;

/// Devices with one folder; each has it under its name with `-tree` behind.
struct Folders {
    site: Site,
    devices: BTreeMap<&'static str, Device>,
    group: GroupId,
    folder: FolderId,
}

impl Folders {
    async fn new() -> Self {
        let site = Site::new();
        let a = site.device("a").await;
        a.set_snapshot_after(AFTER);
        std::fs::create_dir_all(site.path("a-tree")).expect("a directory");
        let status = a.share_folder(&site.path("a-tree"), None, FolderOptions::default()).await.expect("shares");
        let (group, folder) = (status.group.parse().expect("an id"), status.id.parse().expect("an id"));
        Self { site, devices: [("a", a)].into_iter().collect(), group, folder }
    }

    fn tree(&self, name: &str) -> PathBuf {
        self.site.path(&format!("{name}-tree"))
    }

    async fn join(&mut self, inviter: &str, name: &'static str) {
        let device = self.site.device(name).await;
        device.set_snapshot_after(AFTER);
        let inviter = self.devices[inviter].client(self.group).expect("a client");
        pair(&inviter, &device).await;
        device.offered_folders(self.group, PATIENCE).await.expect("folders");
        device.place_folder(self.group, self.folder, &self.tree(name), FolderOptions::default()).await.expect("places");
        self.devices.insert(name, device);
    }

    async fn close(&mut self, name: &str) {
        self.devices.remove(name).expect("a device").close().await;
    }

    async fn open(&mut self, name: &'static str) {
        let device = self.site.open(name).await;
        self.devices.insert(name, device);
    }

    /// Writes, or removes, a file, and tells of it in an entry of its own.
    async fn edit(&self, name: &str, path: &str, content: Option<&str>) {
        let path = self.tree(name).join(path);
        match content {
            Some(content) => write(&path, content),
            None => std::fs::remove_file(&path).expect("removes"),
        }
        self.devices[name].rescan_folder(self.folder).await.expect("scans");
    }

    async fn log(&self, name: &str) -> FolderLog {
        self.devices[name].folder_log(self.folder).await.expect("a log")
    }

    async fn status(&self, name: &str) -> FolderStatus {
        self.devices[name].folders().await.expect("folders").into_iter().next().expect("one")
    }

    /// Checks that a device found nothing wrong with a snapshot.
    async fn believes(&self, name: &str) {
        let problems = self.status(name).await.problems;
        assert!(!problems.iter().any(|problem| problem.problem.contains("snapshot")), "{name}: {problems:?}");
    }

    /// Waits until a log is as it should be.
    async fn until(&self, name: &str, what: &str, is: impl Fn(&FolderLog) -> bool) -> FolderLog {
        let start = Instant::now();
        loop {
            let log = self.log(name).await;
            if is(&log) {
                return log;
            }
            assert!(start.elapsed() < PATIENCE, "{name}'s log is not {what}: {log:?}, {:#?}", self.status(name).await);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until all trees are the same and all devices say so.
    async fn equal(&self) {
        let start = Instant::now();
        let mut same_since = None;
        loop {
            let mut statuses = Vec::new();
            for name in self.devices.keys() {
                statuses.push(self.status(name).await);
            }
            let calm = statuses.iter().all(|status| status.state == FolderState::UpToDate);
            let trees: Vec<_> = self.devices.keys().map(|name| files(&self.tree(name))).collect();
            if calm && trees.windows(2).all(|pair| pair[0] == pair[1]) {
                if same_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(400) {
                    return;
                }
            } else {
                same_since = None;
            }
            assert!(start.elapsed() < PATIENCE, "not equal: {trees:#?}\n{statuses:#?}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Every file of a tree with its content.
fn files(root: &Path) -> BTreeMap<PathBuf, String> {
    let (mut found, mut directories) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let below = path.strip_prefix(root).expect("below").to_owned();
            match entry.file_type().expect("a kind").is_dir() {
                true if below != Path::new(".syncshell") => directories.push(path),
                true => {}
                false => {
                    found.insert(below, std::fs::read_to_string(&path).unwrap_or_default());
                }
            }
        }
    }
    found
}

fn names(root: &Path) -> Vec<String> {
    files(root).into_keys().map(|path| path.to_string_lossy().into_owned()).collect()
}

fn write(path: &Path, content: &str) {
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    std::fs::write(path, content).expect("writes");
}

/// Edits of one device: ten files that change and others that come and go.
async fn history(folders: &Folders, name: &str, edits: std::ops::Range<usize>) {
    for n in edits {
        let content = format!("{name} {n}");
        match n % 4 {
            0 => folders.edit(name, &format!("{name}-passing"), Some(&content)).await,
            2 => folders.edit(name, &format!("{name}-passing"), None).await,
            _ => folders.edit(name, &format!("in/{name}-{}", n % 10), Some(&content)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_shrinks_and_a_newcomer_comes_by_snapshot_and_tail() {
    let mut folders = Folders::new().await;
    folders.join("a", "b").await;
    history(&folders, "a", 0..60).await;
    folders.equal().await;
    // both have compared the snapshot with what they read themselves
    let a = folders.until("a", "short", |log| log.dropped >= AFTER - 2).await;
    let b = folders.until("b", "short", |log| log.dropped >= AFTER - 2).await;
    assert!(a.entries < 50 && b.entries < 50 && a.snapshot_bytes > 0 && b.snapshot_fetched > 0, "{a:?} {b:?}");

    folders.join("b", "c").await;
    folders.equal().await;
    let c = folders.until("c", "short", |log| log.dropped > 0).await;
    assert!(c.dropped >= AFTER - 2 && c.entries < 60 && c.snapshot_fetched > 0, "{c:?}");
    folders.believes("c").await;

    // and it goes on from there, from every side
    folders.edit("c", "from c", Some("c")).await;
    folders.edit("a", "in/a-1", None).await;
    folders.equal().await;
    assert!(!names(&folders.tree("c")).contains(&"in/a-1".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_neither_brings_back_nor_loses() {
    let mut folders = Folders::new().await;
    for n in 0..10 {
        write(&folders.tree("a").join(format!("old-{n}")), &format!("old {n}"));
    }
    folders.join("a", "b").await;
    folders.equal().await;
    folders.close("b").await;

    // meanwhile: deleted, edited, deleted and made again; and more than a snapshot's worth beside that
    folders.edit("a", "old-0", None).await;
    folders.edit("a", "old-1", None).await;
    folders.edit("a", "old-2", None).await;
    folders.edit("a", "old-3", Some("edited by a")).await;
    folders.edit("a", "old-4", None).await;
    folders.edit("a", "old-4", Some("made again by a")).await;
    history(&folders, "a", 0..60).await;
    let log = folders.until("a", "covered", |log| log.snapshot_bytes > 0).await;
    folders.edit("a", "tail", Some("tail")).await;
    folders.edit("a", "old-5", None).await;

    // and on the device that is off, whose clock is a year ahead
    let tree = folders.tree("b");
    let year = SystemTime::now() + Duration::from_secs(365 * 24 * 3600);
    for (path, content) in [("old-1", "edited by b"), ("old-6", "also edited by b"), ("new", "by b")] {
        write(&tree.join(path), content);
        std::fs::File::options()
            .write(true)
            .open(tree.join(path))
            .and_then(|file| file.set_modified(year))
            .expect("a time");
    }
    std::fs::remove_file(tree.join("old-7")).expect("removes");
    folders.open("b").await;
    folders.equal().await;

    let found = files(&folders.tree("a"));
    let content = |path: &str| found.get(Path::new(path)).map(String::as_str);
    for gone in ["old-0", "old-2", "old-5", "old-7"] {
        assert_eq!(content(gone), None, "{gone} came back");
    }
    assert_eq!(content("old-1"), Some("edited by b"), "an edit beats a deletion");
    assert_eq!(content("old-3"), Some("edited by a"));
    assert_eq!(content("old-4"), Some("made again by a"));
    assert_eq!(content("old-6"), Some("also edited by b"));
    assert_eq!(content("old-8"), Some("old 8"));
    assert_eq!((content("new"), content("tail")), (Some("by b"), Some("tail")));
    assert!(!found.keys().any(|path| path.to_string_lossy().contains("conflict")), "{:?}", found.keys());

    let back = folders.log("b").await;
    assert!(back.snapshot_fetched > 0 && back.dropped >= AFTER - 2, "{back:?}");
    assert!(back.entries < log.entries, "{back:?} {log:?}");
    // what nobody had acknowledged goes once the other device has it
    folders.until("a", "short", |log| log.entries < 50).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_with_all_entries_one_with_some_and_one_with_none_come_to_the_same() {
    let mut folders = Folders::new().await;
    folders.join("a", "b").await;
    folders.join("a", "c").await;
    history(&folders, "a", 0..8).await;
    folders.equal().await;
    // c has the beginning and edits of its own; b gets all there is; d comes last
    folders.close("c").await;
    history(&folders, "a", 8..40).await;
    history(&folders, "b", 0..40).await;
    folders.equal().await;
    folders.until("a", "short", |log| log.dropped > AFTER).await;
    write(&folders.tree("c").join("in/a-1"), "edited by c");
    write(&folders.tree("c").join("c alone"), "c");
    folders.open("c").await;
    folders.join("b", "d").await;
    folders.equal().await;
    assert_eq!(files(&folders.tree("d")).get(Path::new("c alone")).map(String::as_str), Some("c"));
    history(&folders, "d", 0..40).await;
    folders.equal().await;
    for name in ["a", "b", "c", "d"] {
        folders.believes(name).await;
    }
}
