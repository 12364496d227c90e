//! Snapshots of folders: newcomers, devices that were away, logs that shrink, and snapshots that lie.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use sync_client::chunks::ChunkSource;
use sync_client::folders::{FolderLog, FolderOptions, FolderState, FolderStatus};
use sync_client::{Config, Device, FolderId, GroupId};
use sync_core::folder::{Version, Versions};
use sync_store::{Db, DbOptions, FolderRowId, SnapshotChunk, SnapshotRowId, SnapshotState, Txn};
use sync_types::folder::{
    ChunkRef, Chunks, Dot, FileContent, KIND_RECORDS, KIND_SNAPSHOT, Node, Record, RecordBatch, TreePath, Vector,
    folder_stream,
};
use sync_types::snapshot::{Item, Snapshot};
use sync_types::{AuthorId, EnvelopeHash, Number, Range};

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
        site.init("a");
        let a = open(&site, "a").await;
        std::fs::create_dir_all(site.path("a-tree")).expect("a directory");
        let status = a.share_folder(&site.path("a-tree"), None, FolderOptions::default()).await.expect("shares");
        let (group, folder) = (status.group.parse().expect("an id"), status.id.parse().expect("an id"));
        Self { site, devices: [("a", a)].into_iter().collect(), group, folder }
    }

    fn tree(&self, name: &str) -> PathBuf {
        self.site.path(&format!("{name}-tree"))
    }

    async fn join(&mut self, inviter: &str, name: &'static str) {
        self.site.init(name);
        let device = open(&self.site, name).await;
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
        let device = open(&self.site, name).await;
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

async fn open(site: &Site, name: &str) -> Device {
    Device::open(Config { snapshot_after: Some(AFTER), ..site.config(name) }).await.expect("opens")
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
    // one wrote a snapshot, and the other has compared it with what it read itself
    let a = folders.until("a", "short", |log| log.dropped >= AFTER - 2).await;
    let b = folders.until("b", "short", |log| log.dropped >= AFTER - 2).await;
    assert!(a.snapshot_fetched + b.snapshot_fetched > 0, "{a:?} {b:?}");
    assert!(a.entries < 50 && b.entries < 50 && a.snapshot_bytes > 0, "{a:?} {b:?}");

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
async fn a_device_with_a_part_of_the_folder_takes_snapshots_in_and_leaves_the_rest_alone() {
    let mut folders = Folders::new().await;
    for n in 0..5 {
        write(&folders.tree("a").join(format!("old-{n}")), &format!("old {n}"));
    }
    write(&folders.tree("a").join("in/first"), "first");
    folders.join("a", "b").await;
    folders.equal().await;
    let tree = folders.tree("b");
    let status = folders.devices["b"].select_paths(folders.folder, &["in".to_owned()]).await.expect("selects");
    assert_eq!((status.left_out_files, status.files), (5, 7));
    folders.close("b").await;
    folders.edit("a", "old-0", None).await;
    folders.edit("a", "old-1", Some("edited by a")).await;
    folders.edit("a", "old-4", Some("also edited by a")).await;
    history(&folders, "a", 0..60).await;
    folders.until("a", "covered", |log| log.snapshot_bytes > 0).await;
    std::fs::remove_file(tree.join("old-2")).expect("removes");
    write(&tree.join("old-3"), "edited by b");
    write(&tree.join("old-4"), "also edited by b");
    write(&tree.join("in/mine"), "by b");

    folders.open("b").await;
    let is_in = |name: &&String| name.starts_with("in/");
    let start = Instant::now();
    while names(&folders.tree("a")).iter().filter(is_in).ne(names(&tree).iter().filter(is_in)) {
        assert!(start.elapsed() < PATIENCE, "not equal: {:#?}", folders.status("b").await);
        tokio::time::sleep(LOOK).await;
    }
    let log = folders.until("b", "short", |log| log.dropped > 0).await;
    assert!(log.snapshot_fetched > 0, "{log:?}");
    folders.believes("b").await;
    folders.believes("a").await;
    let old: Vec<_> = files(&tree).into_iter().filter(|(path, _)| path.to_string_lossy().starts_with("old")).collect();
    let old: Vec<_> = old.iter().map(|(_, content)| content.as_str()).collect();
    assert_eq!(old, ["old 0", "old 1", "edited by b", "also edited by b"], "what is left out is left alone");
    assert!(!tree.join("a-passing").exists());
    assert_eq!(folders.status("b").await.left_out_files, 4, "as many as others have");

    folders.devices["b"].select_paths(folders.folder, &[]).await.expect("selects");
    folders.equal().await;
    let found = files(&folders.tree("a"));
    let content = |path: &str| found.get(Path::new(path)).map(String::as_str);
    assert_eq!(content("old-0"), None, "removed by a, and not touched here since");
    assert_eq!(content("old-1"), Some("edited by a"));
    assert_eq!(content("old-2"), Some("old 2"), "its absence told nothing");
    assert_eq!(content("old-3"), Some("edited by b"), "an edit, of what was known here");
    assert_eq!(content("in/mine"), Some("by b"));
    let old_4: Vec<&str> =
        found.iter().filter(|(path, _)| path.starts_with("old-4")).map(|(_, text)| &text[..]).collect();
    let copies: Vec<&str> = found
        .iter()
        .filter(|(path, _)| path.to_string_lossy().contains("conflict"))
        .map(|(_, text)| &text[..])
        .collect();
    assert_eq!((old_4.len(), copies.len()), (1, 1), "only what both edited is a conflict: {:?}", found.keys());
    let both: BTreeSet<&str> = old_4.into_iter().chain(copies).collect();
    assert_eq!(both, BTreeSet::from(["also edited by a", "also edited by b"]));
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

#[tokio::test(flavor = "multi_thread")]
async fn two_that_each_write_a_snapshot_while_they_are_apart_come_together_again() {
    let mut folders = Folders::new().await;
    folders.join("a", "b").await;
    history(&folders, "a", 0..8).await;
    history(&folders, "b", 0..5).await;
    folders.equal().await;
    folders.close("b").await;
    history(&folders, "a", 8..48).await;
    folders.until("a", "short", |log| log.snapshot_bytes > 0 && log.dropped > 0).await;
    folders.close("a").await;
    folders.open("b").await;
    history(&folders, "b", 8..48).await;
    folders.until("b", "short", |log| log.snapshot_bytes > 0 && log.dropped > 0).await;
    let alone = files(&folders.tree("b"));
    folders.open("a").await;
    folders.equal().await;
    let found = files(&folders.tree("a"));
    let expected = format!("a {}", 47);
    assert_eq!(found.get(Path::new("in/a-7")), Some(&expected));
    for (path, content) in alone.iter().filter(|(path, _)| path.to_string_lossy().starts_with("in/b-")) {
        assert_eq!(found.get(path), Some(content), "{path:?}");
    }
    assert!(!found.contains_key(Path::new("a-passing")) && !found.contains_key(Path::new("b-passing")));
    // and a newcomer gets it from either
    folders.close("b").await;
    folders.join("a", "c").await;
    folders.equal().await;
    assert_eq!(files(&folders.tree("c")), found);
}

/// Alice with a folder, a member who means it ill, and one who gives out whatever that one calls a snapshot's content.
struct Hostile {
    site: Site,
    a: Device,
    folder: FolderId,
    mallory: Member,
    target: Target,
    raw: Raw,
    sent: Vec<Vec<u8>>,
    shelf: std::sync::Arc<Shelf>,
    _helper: Device,
}

#[derive(Default)]
struct Shelf(std::sync::Mutex<std::collections::HashMap<[u8; 32], Vec<u8>>>);

impl ChunkSource for Shelf {
    fn read(&self, _: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>> {
        self.0.lock().expect("no panic").get(hash).cloned()
    }
}

impl Hostile {
    async fn new() -> Self {
        Self::at(Site::new()).await
    }

    async fn at(site: Site) -> Self {
        let a = site.device("a").await;
        let helper = site.device("helper").await;
        write(&site.path("a-tree/mine"), "mine");
        write(&site.path("outside"), "outside");
        let status = a.share_folder(&site.path("a-tree"), None, FolderOptions::default()).await.expect("shares");
        let alice = a.only_client().expect("a client");
        let shelf = std::sync::Arc::new(Shelf::default());
        let helping = pair(&alice, &helper).await;
        helper.serve_chunks(helping.group(), shelf.clone()).expect("serves");
        let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
        let target = Target::of_link(&invite.link, alice.group());
        let raw = Raw::new().await;
        let mallory = raw.join(&alice).await;
        let folder = status.id.parse().expect("an id");
        let mut hostile = Self { site, a, folder, mallory, target, raw, sent: Vec::new(), shelf, _helper: helper };
        let path = |n| TreePath::new(format!("theirs-{n}")).expect("a path");
        for n in 1..=2u8 {
            let batch = RecordBatch { records: vec![Record { path: path(n), ..hostile.record(n) }] };
            hostile.send(KIND_RECORDS, &batch.encode()).await;
        }
        hostile
    }

    fn author(&self) -> AuthorId {
        self.mallory.author.id()
    }

    fn record(&self, n: u8) -> Record {
        let path = TreePath::new(format!("theirs-{n}")).expect("a path");
        Record { path, node: file(n), mode: 0o644, mtime: 1, basis: Vector::default() }
    }

    /// The row of what mallory said of a path.
    fn row(&self, n: u8) -> Item {
        let version = Version::new(&self.record(n), Dot::new(self.author(), Number(u64::from(n)), 0));
        self.row_of(&format!("theirs-{n}"), version)
    }

    fn row_of(&self, path: &str, version: Version) -> Item {
        let mut versions = Versions::default();
        versions.insert(version);
        Item::Row { path: TreePath::new(path).expect("a path"), versions: versions.encode() }
    }

    /// What is covered: mallory's two entries.
    fn covered(&self) -> Item {
        let range = Range { first: Number(1), last: Number(2) };
        Item::Covered { author: self.author(), ranges: vec![(range, hash_of(&self.sent[1]))] }
    }

    /// Sends an entry in a session of its own: whoever is connected and gives out no chunks only costs time.
    async fn send(&mut self, kind: u16, body: &[u8]) {
        self.send_for(self.folder, kind, body).await;
    }

    async fn send_for(&mut self, folder: FolderId, kind: u16, body: &[u8]) {
        let (entry, number) = self.entry(folder, kind, body);
        let mut talk = self.raw.dial(&self.target).await;
        talk.go_live(&self.mallory, Offer::default()).await;
        talk.push(vec![entry], number).await;
    }

    /// The next entry of mallory's feed, which nobody has yet.
    fn entry(&mut self, folder: FolderId, kind: u16, body: &[u8]) -> (Vec<u8>, u64) {
        let plain = sync_crypto::content::encode(&folder_stream(&folder), kind, body).expect("fits");
        let previous = self.sent.last().map_or(EnvelopeHash::NONE, |bytes| hash_of(bytes));
        let number = self.sent.len() as u64 + 1;
        let entry = self.mallory.seal(self.mallory.header(number, previous), &plain);
        self.sent.push(entry.clone());
        (entry, number)
    }

    /// Alice lacks the third entry, and has the fourth.
    async fn without_third(&mut self) {
        let batch = |record| RecordBatch { records: vec![record] }.encode();
        let (third, fourth) = (batch(self.record(3)), batch(self.record(4)));
        let _ = self.entry(self.folder, KIND_RECORDS, &third);
        self.send(KIND_RECORDS, &fourth).await;
    }

    /// What is covered of mallory's feed, up to an entry.
    fn covered_until(&self, last: u64) -> Item {
        let range = Range { first: Number(1), last: Number(last) };
        let head = hash_of(&self.sent[usize::try_from(last).expect("few") - 1]);
        Item::Covered { author: self.author(), ranges: vec![(range, head)] }
    }

    /// A snapshot that covers mallory's feed up to an entry.
    fn snapshot_until(&self, last: u64, rows: Vec<Item>) -> Snapshot {
        let end = Item::End { rows: rows.len() as u64 };
        let items: Vec<Item> = [self.covered_until(last)].into_iter().chain(rows).chain([end]).collect();
        Snapshot { covered: vec![(self.author(), Number(last))], ..self.snapshot(&items) }
    }

    /// Has something done to alice's database while she is off.
    async fn meanwhile(&mut self, work: impl FnOnce(&mut Db, FolderRowId)) {
        self.a.clone().close().await;
        let mut db = Db::open(&self.site.path("a/sync.db"), &DbOptions::default(), rng()).expect("opens");
        let folders = db.read(|reader| reader.folders()).expect("reads");
        work(&mut db, folders.first().expect("one").fid);
        db.close().expect("closes");
        self.a = self.site.open("a").await;
        let alice = self.a.only_client().expect("a client");
        let invite = self.a.invite(alice.group(), LIFETIME).await.expect("invites");
        self.target = Target::of_link(&invite.link, alice.group());
    }

    async fn status(&self) -> FolderStatus {
        self.a.folders().await.expect("folders").into_iter().next().expect("one")
    }

    async fn until_problem(&self, what: &str) {
        let start = Instant::now();
        while !self.status().await.problems.iter().any(|problem| problem.problem.contains(what)) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:#?}", self.status().await);
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn until_log(&self, what: &str, is: impl Fn(&FolderLog) -> bool) {
        let start = Instant::now();
        while !is(&self.log().await) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:?} {:#?}", self.log().await, self.status().await);
            tokio::time::sleep(LOOK).await;
        }
    }

    fn content(&self, bytes: Vec<u8>) -> FileContent {
        let hash = *blake3::hash(&bytes).as_bytes();
        let size = bytes.len() as u64;
        self.shelf.0.lock().expect("no panic").insert(hash, bytes);
        FileContent { size, hash, chunks: Chunks::Whole }
    }

    fn snapshot(&self, items: &[Item]) -> Snapshot {
        let mut bytes = Vec::new();
        items.iter().for_each(|item| item.append(&mut bytes));
        Snapshot { covered: vec![(self.author(), Number(2))], content: self.content(bytes) }
    }

    async fn log(&self) -> FolderLog {
        self.a.folder_log(self.folder).await.expect("a log")
    }

    async fn tell(&mut self, snapshot: &Snapshot) {
        self.send(KIND_SNAPSHOT, &snapshot.encode()).await;
    }

    /// Tells of a snapshot that is refused, and counted, and changes nothing.
    async fn refused(&mut self, what: &str, snapshot: &Snapshot) {
        let alice = self.a.only_client().expect("a client");
        let before = refused(&alice).await;
        self.tell(snapshot).await;
        until(&alice, what, |status| status.refused > before).await;
        self.unharmed(what).await;
        let status = self.a.folders().await.expect("folders").into_iter().next().expect("one");
        assert!(status.problems.iter().any(|problem| problem.problem.contains("snapshot")), "{what}: {status:?}");
    }

    /// Tells of a snapshot that is believed: so many entries go.
    async fn believed(&mut self, snapshot: &Snapshot, dropped: u64) {
        self.tell(snapshot).await;
        let start = Instant::now();
        while self.log().await.dropped != dropped {
            assert!(start.elapsed() < PATIENCE, "{:?}", self.a.folders().await);
            tokio::time::sleep(LOOK).await;
        }
        let status = self.a.folders().await.expect("folders").into_iter().next().expect("one");
        assert!(!status.problems.iter().any(|problem| problem.problem.contains("snapshot")), "{status:?}");
    }

    async fn unharmed(&self, what: &str) {
        assert_eq!(self.log().await.dropped, 0, "{what}");
        let tree = self.site.path("a-tree");
        assert_eq!(std::fs::read_to_string(tree.join("mine")).expect("reads"), "mine", "{what}");
        assert_eq!(std::fs::read_to_string(self.site.path("outside")).expect("reads"), "outside", "{what}");
    }
}

fn file(n: u8) -> Node {
    Node::File(FileContent { size: 7, hash: [n; 32], chunks: Chunks::Whole })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_lies_is_refused_and_nothing_is_dropped_for_it() {
    let mut hostile = Hostile::new().await;
    let end = |rows| Item::End { rows };
    let (covered, one, two) = (hostile.covered(), hostile.row(1), hostile.row(2));
    let items = vec![covered.clone(), one.clone(), two.clone(), end(2)];

    let unsorted = hostile.snapshot(&[covered.clone(), two.clone(), one.clone(), end(2)]);
    hostile.refused("unsorted rows", &unsorted).await;
    let twice = hostile.snapshot(&[covered.clone(), one.clone(), one.clone(), two.clone(), end(3)]);
    hostile.refused("a path twice", &twice).await;
    let cut_off = hostile.snapshot(&[covered.clone(), one.clone(), two.clone()]);
    hostile.refused("a content that is cut off", &cut_off).await;

    let mut bytes = Vec::new();
    items.iter().for_each(|item| item.append(&mut bytes));
    let at = bytes.windows(8).position(|window| window == b"theirs-1").expect("the path");
    bytes[at..at + 8].copy_from_slice(b"../evil1");
    let escape = Snapshot { content: hostile.content(bytes), ..twice.clone() };
    hostile.refused("a path that leaves the folder", &escape).await;

    let mut wrong = hostile.snapshot(&items);
    let piece = ChunkRef { hash: Some(wrong.content.hash), len: wrong.content.size };
    wrong.content.chunks = Chunks::Inline(vec![piece]);
    wrong.content.hash = [9; 32];
    hostile.refused("another hash", &wrong).await;

    let other = Item::Covered {
        author: hostile.author(),
        ranges: vec![(Range { first: Number(1), last: Number(2) }, EnvelopeHash([9; 32]))],
    };
    let other = hostile.snapshot(&[other, one.clone(), two.clone(), end(2)]);
    hostile.refused("other entries than are here", &other).await;
    let less = hostile.snapshot(&[one.clone(), two.clone(), end(2)]);
    hostile.refused("nothing is said of what is covered", &less).await;

    let left_out = hostile.snapshot(&[covered.clone(), one.clone(), end(1)]);
    hostile.refused("a file is left out", &left_out).await;
    let dot = Dot::new(hostile.author(), Number(2), 0);
    let made_up = Version::new(&Record { node: file(77), ..hostile.record(2) }, dot);
    let made_up = hostile.snapshot(&[covered.clone(), one.clone(), hostile.row_of("theirs-2", made_up), end(2)]);
    hostile.refused("a file is made up", &made_up).await;

    let number = hostile.sent.len() as u64 + 1;
    let itself = Snapshot { covered: vec![(hostile.author(), Number(number))], ..twice.clone() };
    hostile.refused("it covers its own entry", &itself).await;

    // a row for each of many paths that nobody wrote
    let many: Vec<Item> = (0..50_000)
        .map(|n| {
            hostile
                .row_of(&format!("a{n:06}"), Version::new(&hostile.record(1), Dot::new(hostile.author(), Number(1), 1)))
        })
        .collect();
    let many: Vec<Item> = [covered.clone()].into_iter().chain(many).chain([end(50_000)]).collect();
    let mut bytes = Vec::new();
    many.iter().for_each(|item| item.append(&mut bytes));
    let refs = |bytes: &[u8]| -> Vec<ChunkRef> {
        let piece =
            |piece: &[u8]| ChunkRef { hash: Some(hostile.content(piece.to_vec()).hash), len: piece.len() as u64 };
        bytes.chunks(1 << 20).map(piece).collect()
    };
    let (size, hash) = (bytes.len() as u64, *blake3::hash(&bytes).as_bytes());
    let content = FileContent { size, hash, chunks: Chunks::Inline(refs(&bytes)) };
    hostile.refused("many paths are made up", &Snapshot { content, ..twice.clone() }).await;

    // what does not exist is waited for, and what is said to come is not believed
    let mut beyond = hostile.snapshot(&items);
    beyond.covered = vec![(hostile.author(), Number(2)), (AuthorId([0xee; 32]), Number(1 << 40))];
    beyond.covered.sort();
    hostile.tell(&beyond).await;
    let basis = [Dot::new(AuthorId([0xee; 32]), Number(1 << 40), 0)].into_iter().collect();
    let foresees = Version::new(&Record { basis, ..hostile.record(2) }, dot);
    let foresees = hostile.snapshot(&[covered.clone(), one.clone(), hostile.row_of("theirs-2", foresees), end(2)]);
    hostile.refused("the future is foreseen", &foresees).await;

    // that none of it was refused for another reason: the same without a lie is believed
    let honest = hostile.snapshot(&items);
    hostile.believed(&honest, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_names_what_is_not_the_folders_is_refused_and_does_not_pass_for_what_lacks() {
    let mut hostile = Hostile::new().await;
    let batch = |n| RecordBatch { records: vec![hostile.record(n)] }.encode();
    let (other, third) = (batch(9), batch(4));
    hostile.send_for(FolderId([9; 16]), KIND_RECORDS, &other).await;
    hostile.send(KIND_RECORDS, &third).await;
    let range = |hostile: &Hostile, first, last| {
        (
            Range { first: Number(first), last: Number(last) },
            hash_of(&hostile.sent[usize::try_from(last).expect("few") - 1]),
        )
    };
    let covering = |hostile: &Hostile, ranges| Item::Covered { author: hostile.author(), ranges };
    let rows: Vec<Item> = [1, 2, 4].map(|n| hostile.row(n)).into();
    let said = |hostile: &Hostile, covered: Item, rows: &[Item]| {
        let end = Item::End { rows: rows.len() as u64 };
        let items: Vec<Item> = [covered].into_iter().chain(rows.iter().cloned()).chain([end]).collect();
        Snapshot { covered: vec![(hostile.author(), Number(4))], ..hostile.snapshot(&items) }
    };
    // with it a file is left out, or everything is said as it is
    let all = covering(&hostile, vec![range(&hostile, 1, 4)]);
    for rows in [&rows[1..], &rows[..]] {
        let lie = said(&hostile, all.clone(), rows);
        hostile.refused("another folder's entry is covered", &lie).await;
    }
    let own = covering(&hostile, vec![range(&hostile, 1, 2), range(&hostile, 4, 4)]);
    let left_out = said(&hostile, own.clone(), &rows[1..]);
    hostile.refused("a file is left out", &left_out).await;
    let honest = said(&hostile, own, &rows);
    hostile.believed(&honest, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lacks_something_takes_no_snapshot_in_with_versions_of_an_author_nobody_admitted() {
    let mut hostile = Hostile::new().await;
    hostile.without_third().await;
    let rows = || [1, 2, 3, 4].map(|n| hostile.row(n)).to_vec();
    let stranger = Version::new(&hostile.record(5), Dot::new(AuthorId([0xee; 32]), Number(1), 0));
    let lie = [rows(), vec![hostile.row_of("theirs-5", stranger)]].concat();
    let (lie, honest) = (hostile.snapshot_until(4, lie), hostile.snapshot_until(4, rows()));
    hostile.tell(&lie).await;
    hostile.until_log("it is looked at", |log| log.snapshot_fetched >= lie.content.size).await;
    hostile.tell(&honest).await;
    hostile.until_log("the honest one is taken in", |log| log.dropped == 1).await;
    assert_eq!(hostile.status().await.pending_files, 4, "of four files nobody has the content, and there is no fifth");
}

/// Tells of a snapshot in two pieces, of which nobody has the second one; that one, and the snapshot.
async fn half_of_a_snapshot(hostile: &mut Hostile) -> (Vec<u8>, Snapshot) {
    hostile.without_third().await;
    let mut snapshot = hostile.snapshot_until(4, [1, 2, 3, 4].map(|n| hostile.row(n)).into());
    let bytes = hostile.shelf.read(&GroupId([0; 32]), &snapshot.content.hash).expect("it lies there");
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let piece = |bytes: &[u8]| ChunkRef { hash: Some(*blake3::hash(bytes).as_bytes()), len: bytes.len() as u64 };
    snapshot.content.chunks = Chunks::Inline(vec![piece(first), piece(second)]);
    hostile.content(first.to_vec());
    hostile.tell(&snapshot).await;
    hostile.until_log("a part is fetched", |log| log.snapshot_fetched >= first.len() as u64).await;
    (second.to_vec(), snapshot)
}

fn told(db: &mut Db, fid: FolderRowId) -> SnapshotRowId {
    let rows = db.read(|reader| reader.snapshots(fid)).expect("reads");
    rows.iter().find(|row| row.state == SnapshotState::Told).expect("it is told").sid
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_half_taken_in_and_damaged_where_it_lies_is_fetched_again() {
    let mut hostile = Hostile::new().await;
    let (second, snapshot) = half_of_a_snapshot(&mut hostile).await;
    let Chunks::Inline(pieces) = &snapshot.content.chunks else { panic!("two pieces") };
    let (first, group) = (pieces[0].hash.expect("a hash"), hostile.a.only_client().expect("a client").group());
    let damage = |db: &mut Db, fid| {
        let sid = told(db, fid);
        let bad = SnapshotChunk { codec: 0, len: 3, bytes: b"bad".to_vec() };
        let work = |txn: &mut Txn<'_>| {
            txn.begin_adoption(fid, sid, &group, &snapshot.covered)?;
            txn.remove_snapshot_chunk(fid, &first)?;
            txn.put_snapshot_chunk(fid, sid, &first, &bad)
        };
        db.write(work).expect("writes");
    };
    hostile.meanwhile(damage).await;
    hostile.content(second);
    hostile.until_problem("1 pieces are fetched again").await;
    hostile.until_log("it is taken in", |log| log.dropped == 1).await;
    let status = hostile.status().await;
    assert!(!status.problems.iter().any(|problem| problem.problem.contains("snapshot")), "{status:#?}");
    assert_eq!(status.pending_files, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_half_taken_in_and_never_comes_gives_way_to_the_next() {
    let mut hostile = Hostile::new().await;
    let (_, snapshot) = half_of_a_snapshot(&mut hostile).await;
    let group = hostile.a.only_client().expect("a client").group();
    let begin = |db: &mut Db, fid| {
        let sid = told(db, fid);
        db.write(|txn| txn.begin_adoption(fid, sid, &group, &snapshot.covered)).expect("writes");
    };
    hostile.meanwhile(begin).await;
    let sixth = RecordBatch { records: vec![hostile.record(6)] }.encode();
    hostile.send(KIND_RECORDS, &sixth).await;
    let next = hostile.snapshot_until(6, [1, 2, 3, 4, 6].map(|n| hostile.row(n)).into());
    hostile.tell(&next).await;
    hostile.until_log("the next one is taken in", |log| log.dropped == 1).await;
    let only_the_next = |db: &mut Db, fid| {
        let rows = db.read(|reader| reader.snapshots(fid)).expect("reads");
        let rows: Vec<_> = rows.iter().map(|row| (row.state, row.entry.map(|(_, number)| number))).collect();
        assert_eq!(rows, [(SnapshotState::Complete, Some(Number(7)))]);
    };
    hostile.meanwhile(only_the_next).await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_for_which_the_home_has_no_room_is_named_and_nothing_of_it_is_fetched() {
    let site = Site::new();
    let Some(_mount) = crate::files::Mount::new(&site.path("a"), "64m") else {
        println!("skipped: no file system can be mounted here");
        return;
    };
    let mut hostile = Hostile::at(site).await;
    let piece = vec![7; 4 << 20];
    let hash = hostile.content(piece.clone()).hash;
    let mut chunks = vec![ChunkRef { hash: Some(hash), len: 4 << 20 }];
    chunks.extend((1..=30).map(|n| ChunkRef { hash: Some([n; 32]), len: 4 << 20 }));
    let content = FileContent { size: 31 * (4 << 20), hash: [9; 32], chunks: Chunks::Inline(chunks) };
    let large = Snapshot { covered: vec![(hostile.author(), Number(2))], content };
    hostile.tell(&large).await;
    hostile.until_problem("a snapshot of 124 MiB has no room").await;
    assert_eq!(hostile.log().await.snapshot_fetched, 0);
    // and it is in nobody's way
    let honest = hostile.snapshot(&[hostile.covered(), hostile.row(1), hostile.row(2), Item::End { rows: 2 }]);
    hostile.believed(&honest, 1).await;
}
