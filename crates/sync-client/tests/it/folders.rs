//! Folders of two devices in one process: real trees, real sockets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sync_client::folders::{Direction, FolderOptions, FolderState, FolderStatus, RestoreTo};
use sync_client::{Device, FolderId};
use sync_types::Number;
use sync_types::folder::{
    ChunkRef, Chunks, Dot, FileContent, KIND_RECORDS, Node, Record, RecordBatch, TreePath, Vector, folder_stream,
};

use crate::site::*;

/// Two devices with one folder.
struct Shared {
    site: Site,
    a: Device,
    b: Device,
    folder: FolderId,
}

impl Shared {
    fn left(&self) -> PathBuf {
        self.site.path("left")
    }

    fn right(&self) -> PathBuf {
        self.site.path("right")
    }

    /// Shares `left` as it is, and places it at `right`.
    async fn of(site: Site) -> Self {
        let (a, b) = (site.device("a").await, site.device("b").await);
        std::fs::create_dir_all(site.path("left")).expect("a directory");
        let status = a.share_folder(&site.path("left"), None, FolderOptions::default()).await.expect("shares");
        let (group, folder) = (status.group.parse().expect("an id"), status.id.parse().expect("an id"));
        let alice = a.client(group).expect("a client");
        pair(&alice, &b).await;
        let offered = b.offered_folders(group, PATIENCE).await.expect("folders");
        assert_eq!(offered.iter().map(|folder| &folder.name).collect::<Vec<_>>(), ["left"]);
        b.place_folder(group, folder, &site.path("right"), FolderOptions::default()).await.expect("places");
        Self { site, a, b, folder }
    }

    async fn equal(&self) {
        equal(&self.left(), &self.right(), &[&self.a, &self.b]).await;
    }

    /// Waits until a directory is the same on both.
    async fn equal_below(&self, directory: &str) {
        equal(&self.left().join(directory), &self.right().join(directory), &[&self.a, &self.b]).await;
    }
}

/// Everything in a tree, with content or link target; what the program keeps for itself is left out.
fn tree(root: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let (path, kind) = (entry.path(), entry.file_type().expect("a kind"));
            let below = path.strip_prefix(root).expect("below").to_owned();
            if below == Path::new(".syncshell") {
                continue;
            }
            let content = if kind.is_dir() {
                directories.push(path);
                None
            } else if kind.is_symlink() {
                Some(std::fs::read_link(&path).expect("a link").into_os_string().into_encoded_bytes())
            } else {
                std::fs::read(&path).ok()
            };
            found.insert(below, content);
        }
    }
    found
}

async fn only(device: &Device) -> FolderStatus {
    device.folders().await.expect("folders").into_iter().next().expect("one")
}

/// Waits until both trees are the same and both devices say so.
async fn equal(left: &Path, right: &Path, devices: &[&Device]) {
    let start = Instant::now();
    let mut same_since = None;
    loop {
        let mut statuses = Vec::new();
        for device in devices {
            statuses.push(only(device).await);
        }
        let calm = statuses.iter().all(|status| status.state == FolderState::UpToDate);
        if calm && tree(left) == tree(right) {
            // what is under way between the devices shows in a moment
            if same_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(400) {
                return;
            }
        } else {
            same_since = None;
        }
        let names = |root| tree(root).into_keys().collect::<Vec<_>>();
        assert!(start.elapsed() < PATIENCE, "not equal: {:?}\n{:?}\n{statuses:#?}", names(left), names(right));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn write(path: &Path, content: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    std::fs::write(path, content).expect("writes");
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rand_core::Rng::fill_bytes(&mut rng(), &mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_a_folder_is_in_the_other_and_edits_go_both_ways() {
    let site = Site::new();
    let left = site.path("left");
    write(&left.join("a.txt"), "a");
    write(&left.join("empty"), "");
    write(&left.join("deep/er/large"), noise(3 << 20));
    std::fs::create_dir_all(left.join("nothing here")).expect("a directory");
    let shared = Shared::of(site).await;
    shared.equal().await;
    assert_eq!(tree(&shared.right()).len(), 6);
    write(&shared.right().join("b.txt"), "b");
    write(&shared.left().join("a.txt"), "changed");
    shared.equal().await;
    assert_eq!(std::fs::read(shared.right().join("a.txt")).expect("reads"), b"changed");
    std::fs::remove_file(shared.right().join("a.txt")).expect("removes");
    std::fs::remove_dir_all(shared.left().join("deep")).expect("removes");
    shared.equal().await;
    assert_eq!(tree(&shared.left()).len(), 3);
    let kept = shared.a.versions(shared.folder, "a.txt").await.expect("versions");
    let kept = kept.first().expect("what the other device removed");
    let back = shared.a.restore(shared.folder, "a.txt", &kept.version, RestoreTo::Place).await.expect("restores");
    assert_eq!(std::fs::read(back).expect("reads"), b"changed");
    shared.equal().await;
    assert_eq!(std::fs::read(shared.right().join("a.txt")).expect("reads"), b"changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rename_moves_no_bytes() {
    let site = Site::new();
    for number in 0..50 {
        write(&site.path("left").join(format!("old/{number}")), noise(2000));
    }
    let shared = Shared::of(site).await;
    shared.equal().await;
    let before = only(&shared.b).await.fetched_bytes;
    std::fs::rename(shared.left().join("old"), shared.left().join("new")).expect("renames");
    shared.equal().await;
    assert!(shared.right().join("new/49").exists() && !shared.right().join("old").exists());
    assert_eq!(only(&shared.b).await.fetched_bytes, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn joining_with_equal_files_moves_nothing_and_with_others_makes_conflict_copies() {
    let site = Site::new();
    write(&site.path("left/same"), "equal");
    write(&site.path("right/same"), "equal");
    write(&site.path("left/other"), "left's");
    write(&site.path("right/other"), "right's");
    write(&site.path("right/only here"), "mine");
    let shared = Shared::of(site).await;
    shared.equal().await;
    let tree = tree(&shared.left());
    let contents: Vec<&[u8]> = tree.values().flatten().map(Vec::as_slice).collect();
    assert_eq!(tree.len(), 4, "{tree:?}");
    for content in ["equal", "left's", "right's", "mine"] {
        assert!(contents.contains(&content.as_bytes()), "{content} in {tree:?}");
    }
    assert!(tree.keys().any(|path| path.to_string_lossy().starts_with("other (conflict ")), "{tree:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn edits_made_apart_are_both_kept() {
    let site = Site::new();
    write(&site.path("left/note"), "first");
    let shared = Shared::of(site).await;
    shared.equal().await;
    shared.a.pause_folder(shared.folder, true).await.expect("pauses");
    write(&shared.left().join("note"), "left's edit");
    write(&shared.right().join("note"), "right's edit");
    shared.a.pause_folder(shared.folder, false).await.expect("resumes");
    shared.equal().await;
    let tree = tree(&shared.left());
    let contents: Vec<&[u8]> = tree.values().flatten().map(Vec::as_slice).collect();
    assert!(contents.contains(&&b"left's edit"[..]) && contents.contains(&&b"right's edit"[..]), "{tree:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_restored_from_the_device_that_keeps_it() {
    let site = Site::new();
    let (first, mut second) = (noise(3 << 20), noise(1000));
    second.extend(&first);
    write(&site.path("left/film"), &first);
    let shared = Shared::of(site).await;
    shared.equal().await;
    write(&shared.left().join("film"), &second);
    shared.equal().await;
    assert!(tree(&shared.left()).values().flatten().any(|content| *content == second));
    let kept = shared.a.versions(shared.folder, "film").await.expect("versions");
    let [kept] = &kept[..] else { panic!("one version, on the other device: {kept:?}") };
    assert!(!kept.here && kept.devices.len() == 1 && kept.size == 3 << 20, "{kept:?}");
    let aside = RestoreTo::Path(shared.site.path("aside"));
    let back = shared.a.restore(shared.folder, "film", &kept.version, aside).await.expect("restores");
    assert!(std::fs::read(back).expect("reads") == first);
    let now = shared.a.versions(shared.folder, "film").await.expect("versions");
    assert!(now.len() == 1 && now[0].here, "what was fetched is kept here too: {now:?}");
    shared.a.restore(shared.folder, "film", &kept.version, RestoreTo::Place).await.expect("restores");
    shared.equal().await;
    assert!(std::fs::read(shared.right().join("film")).expect("reads") == first);
    let nowhere = shared.b.restore(shared.folder, "film", "0000000000000000", RestoreTo::Place).await;
    assert_eq!(nowhere.expect_err("nobody keeps it").code(), "no-version");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_right_before_a_crash_is_listed_after_the_next_start() {
    let site = Site::new();
    write(&site.path("left/note"), "old");
    let Shared { site, a, b, folder } = {
        let shared = Shared::of(site).await;
        shared.equal().await;
        shared
    };
    a.close().await;
    // as a crash leaves it between the exchange of the two files and the index
    let month = site.path("left/.syncshell/versions/2026-11");
    std::fs::create_dir_all(&month).expect("a directory");
    std::fs::rename(site.path("left/note"), month.join(format!("1795305600-{:032x}", 7))).expect("renames");
    write(&site.path("left/note"), "new and longer");
    let a = site.open("a").await;
    equal(&site.path("left"), &site.path("right"), &[&a, &b]).await;
    let kept = a.versions(folder, "note").await.expect("versions");
    let here: Vec<_> = kept.iter().filter(|kept| kept.here).collect();
    assert!(matches!(here[..], [kept] if kept.size == 3 && kept.hash.is_some()), "{kept:?}");
    let back = a.restore(folder, "note", &here[0].version, RestoreTo::Path(site.path("back"))).await.expect("restores");
    assert_eq!(std::fs::read(back).expect("reads"), b"old");
}

#[tokio::test(flavor = "multi_thread")]
async fn edits_of_different_lines_of_a_text_are_merged() {
    let site = Site::new();
    let lines = |first: &str, last: &str| format!("{first}\n{}{last}\n", "between\n".repeat(20));
    write(&site.path("left/note.txt"), lines("first", "last"));
    let shared = Shared::of(site).await;
    shared.equal().await;
    // a text is kept once it is calm, so the first rounds may end with a copy, in which nothing is lost either
    let start = Instant::now();
    for round in 0.. {
        assert!(start.elapsed() < PATIENCE, "nothing is merged: {:?}", tree(&shared.left()));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let copies = tree(&shared.left()).len();
        let text = std::fs::read_to_string(shared.left().join("note.txt")).expect("reads");
        let (first, last) = (format!("first {round}"), format!("last {round}"));
        let mut edited: Vec<&str> = text.lines().collect();
        let end = edited.len() - 1;
        shared.a.pause_folder(shared.folder, true).await.expect("pauses");
        let before = std::mem::replace(&mut edited[0], &first);
        write(&shared.left().join("note.txt"), edited.join("\n") + "\n");
        edited[0] = before;
        edited[end] = &last;
        write(&shared.right().join("note.txt"), edited.join("\n") + "\n");
        shared.a.pause_folder(shared.folder, false).await.expect("resumes");
        shared.equal().await;
        let found = tree(&shared.left());
        let has = |line: &str| found.values().flatten().any(|text| String::from_utf8_lossy(text).contains(line));
        assert!(has(&first) && has(&last), "{found:?}");
        if found.len() == copies {
            let text = std::fs::read_to_string(shared.right().join("note.txt")).expect("reads");
            assert!(text.starts_with(&first) && text.ends_with(&(last + "\n")), "{text}");
            break;
        }
    }
    // what was merged is kept too, by whoever merged it or took the merged one
    let mut kept = 0;
    for device in [&shared.a, &shared.b] {
        kept += device.versions(shared.folder, "note.txt").await.expect("versions").len();
    }
    assert!(kept >= 2, "{kept} versions");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn links_modes_and_odd_names_are_kept() {
    use std::os::unix::fs::PermissionsExt as _;

    let site = Site::new();
    let left = site.path("left");
    write(&left.join("run me"), "#!/bin/sh");
    std::fs::set_permissions(left.join("run me"), std::fs::Permissions::from_mode(0o750)).expect("a mode");
    std::os::unix::fs::symlink("../outside", left.join("link")).expect("a link");
    write(&left.join("caf\u{e9}"), "composed");
    write(&left.join("cafe\u{301}"), "decomposed");
    write(&left.join("Case"), "upper");
    write(&left.join("case"), "lower");
    write(&left.join(" leading and \"quotes\" \\ back: colon?*"), "odd");
    let shared = Shared::of(site).await;
    shared.equal().await;
    let mode = |path: PathBuf| path.metadata().expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(shared.right().join("run me")), 0o750);
    std::fs::set_permissions(shared.right().join("run me"), std::fs::Permissions::from_mode(0o700)).expect("a mode");
    let start = Instant::now();
    while mode(shared.left().join("run me")) != 0o700 {
        assert!(start.elapsed() < PATIENCE, "the mode does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shared.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_vanishes_deletes_nothing_elsewhere() {
    let site = Site::new();
    write(&site.path("left/kept"), "kept");
    let shared = Shared::of(site).await;
    shared.equal().await;
    std::fs::rename(shared.left(), shared.site.path("unmounted")).expect("renames");
    let start = Instant::now();
    while only(&shared.a).await.state != FolderState::Stopped {
        assert!(start.elapsed() < PATIENCE, "it is not noticed: {:?}", only(&shared.a).await);
        let _ = shared.a.rescan_folder(shared.folder).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::create_dir(shared.left()).expect("an empty directory in its place");
    let _ = shared.a.rescan_folder(shared.folder).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(std::fs::read(shared.right().join("kept")).expect("reads"), b"kept");
    std::fs::remove_dir(shared.left()).expect("removes");
    std::fs::rename(shared.site.path("unmounted"), shared.left()).expect("renames");
    let _ = shared.a.rescan_folder(shared.folder).await;
    shared.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_that_overlap_are_refused() {
    let site = Site::new();
    let shared = Shared::of(site).await;
    let inside = shared.left().join("inside");
    std::fs::create_dir_all(&inside).expect("a directory");
    for path in [inside, shared.site.path("")] {
        let error = shared.a.share_folder(&path, None, FolderOptions::default()).await.expect_err("overlaps");
        assert_eq!(error.code(), "folder-overlaps", "{error}");
    }
    let again = shared.a.share_folder(&shared.left(), None, FolderOptions::default()).await.expect("the same");
    assert_eq!(again.id, shared.folder.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_only_device_takes_nothing_and_a_receive_only_one_tells_nothing() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    write(&site.path("left/from left"), "left");
    let options = FolderOptions { direction: Direction::SendOnly, ..FolderOptions::default() };
    let status = a.share_folder(&site.path("left"), None, options).await.expect("shares");
    let (group, folder) = (status.group.parse().expect("an id"), status.id.parse().expect("an id"));
    pair(&a.client(group).expect("a client"), &b).await;
    b.offered_folders(group, PATIENCE).await.expect("folders");
    let options = FolderOptions { direction: Direction::ReceiveOnly, ..FolderOptions::default() };
    b.place_folder(group, folder, &site.path("right"), options).await.expect("places");
    equal(&site.path("left"), &site.path("right"), &[&a, &b]).await;
    write(&site.path("right/from right"), "right");
    b.rescan_folder(folder).await.expect("rescans");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!site.path("left/from right").exists());
    write(&site.path("left/from left"), "changed");
    until_at(&b, &site.path("right/from left"), "changed").await;
    // a mode that is set here keeps nothing from coming
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let bits = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(site.path("right/from left"), bits).expect("sets bits");
        b.rescan_folder(folder).await.expect("rescans");
        write(&site.path("left/from left"), "changed again");
        until_at(&b, &site.path("right/from left"), "changed again").await;
    }
}

async fn until_held(device: &Device) -> String {
    let start = Instant::now();
    loop {
        let status = only(device).await;
        if let Some(held) = status.problem {
            return held;
        }
        assert!(start.elapsed() < PATIENCE, "nothing is held back: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mass_deletion_is_held_back_until_it_is_confirmed_or_undone() {
    let site = Site::new();
    let fill = |root: PathBuf| (0..40).for_each(|n| write(&root.join(format!("{n}")), format!("file {n}")));
    fill(site.path("left"));
    let shared = Shared::of(site).await;
    shared.equal().await;
    let clear = || (0..30).for_each(|n| std::fs::remove_file(shared.left().join(format!("{n}"))).expect("removes"));
    // all at once for the other device, however it is noticed here
    let clear_while_away = async || {
        shared.b.pause_folder(shared.folder, true).await.expect("pauses");
        clear();
        shared.a.rescan_folder(shared.folder).await.expect("rescans");
        let alice = shared.a.only_client().expect("a client");
        assert!(!alice.handed_to(alice.last_cursor(), PATIENCE).await.is_empty());
        shared.b.pause_folder(shared.folder, false).await.expect("resumes");
    };
    clear_while_away().await;
    let held = until_held(&shared.b).await;
    assert!(held.contains("deleted 30") && held.contains("syncshell confirm"), "{held}");
    assert_eq!(tree(&shared.right()).len(), 40);
    assert_eq!(shared.b.undo_folder(shared.folder).await.expect("undoes"), 30);
    shared.equal().await;
    assert_eq!(tree(&shared.left()).len(), 40);
    clear_while_away().await;
    until_held(&shared.b).await;
    shared.b.confirm_folder(shared.folder).await.expect("confirms");
    shared.equal().await;
    assert_eq!(tree(&shared.right()).len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_files_written_again_and_again_are_no_mass_change() {
    let site = Site::new();
    let fill = |root: PathBuf, files, round: u64| {
        (0..files).for_each(|n| write(&root.join(format!("{n}")), format!("{n} in round {round}")));
    };
    fill(site.path("left"), 60, 0);
    let shared = Shared::of(site).await;
    shared.equal().await;
    for round in 1..4 {
        // told all at once: as many as are more than half together with those of the round before
        shared.a.pause_folder(shared.folder, true).await.expect("pauses");
        fill(shared.left(), 24, round);
        shared.a.pause_folder(shared.folder, false).await.expect("resumes");
        until_at(&shared.b, &shared.right().join("23"), &format!("23 in round {round}")).await;
        shared.equal().await;
    }
}

/// Waits until a device says that it is up to date and a file has this content.
async fn until_at(device: &Device, path: &Path, content: &str) {
    let start = Instant::now();
    loop {
        let status = only(device).await;
        let is_there = std::fs::read(path).is_ok_and(|bytes| bytes == content.as_bytes());
        if is_there && status.state == FolderState::UpToDate {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{} is not {content}: {status:#?}", path.display());
        tokio::time::sleep(LOOK).await;
    }
}

/// Files whose names begin so, with their contents.
fn called(root: &Path, beginning: &str) -> Vec<String> {
    let found = tree(root).into_iter().filter(|(path, _)| path.to_string_lossy().starts_with(beginning));
    let mut contents: Vec<_> =
        found.map(|(_, bytes)| String::from_utf8(bytes.unwrap_or_default()).expect("text")).collect();
    contents.sort();
    contents
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_selected_stays_and_is_compared_when_it_is_selected_again() {
    let site = Site::new();
    let left = site.path("left");
    let names = ["docs/a", "docs/b", "photos/1", "photos/deep/2", "photos/gone", "photos/absent", "top.txt"];
    names.iter().for_each(|name| write(&left.join(name), format!("{name} at first")));
    let large = noise(3 << 20);
    write(&left.join("photos/large"), &large);
    let mut shared = Shared::of(site).await;
    shared.equal().await;
    let (left, right) = (shared.left(), shared.right());
    let (a, b, folder) = (&shared.a, &shared.b, shared.folder);
    let before = tree(&right);
    let status = b.select_paths(folder, &["./docs/".to_owned()]).await.expect("selects");
    assert_eq!(status.selected, ["docs"]);
    assert_eq!(status.left_out_files, 8, "five files of photos, its two directories, and the text beside it");
    assert_eq!(status.left_out_bytes, (3 << 20) + 97);
    assert_eq!(tree(&right), before, "nothing is removed");

    // what others do to the rest (as no text, of which edits could be merged) is not taken, and what is done to it here is not told
    write(&left.join("photos/1"), "a's 1\0");
    write(&left.join("photos/new"), "new");
    std::fs::remove_file(left.join("photos/gone")).expect("removes");
    write(&right.join("top.txt"), "b's top\0");
    write(&right.join("photos/mine"), "mine");
    std::fs::remove_file(right.join("photos/absent")).expect("removes");
    b.rescan_folder(folder).await.expect("scans");
    write(&left.join("docs/a"), "a's a");
    until_at(b, &right.join("docs/a"), "a's a").await;
    write(&right.join("docs/b"), "b's b");
    until_at(a, &left.join("docs/b"), "b's b").await;
    for (path, content) in [("photos/1", "photos/1 at first"), ("photos/gone", "photos/gone at first")] {
        assert_eq!(std::fs::read_to_string(right.join(path)).expect("reads"), content);
    }
    assert!(!right.join("photos/new").exists() && !left.join("photos/mine").exists());
    assert!(left.join("photos/absent").exists());
    assert_eq!(std::fs::read_to_string(left.join("top.txt")).expect("reads"), "top.txt at first");

    // it is kept across a restart
    shared.b.close().await;
    shared.b = shared.site.open("b").await;
    let (b, status) = (&shared.b, only(&shared.b).await);
    assert_eq!((status.selected, status.left_out_files), (vec!["docs".to_owned()], 8));

    let status = b.select_paths(folder, &[]).await.expect("selects");
    assert_eq!((status.selected.len(), status.left_out_files, status.left_out_bytes), (0, 0, 0));
    shared.equal().await;
    let status = only(b).await;
    assert!(status.fetched_bytes < 1000, "equal content moves nothing: {}", status.fetched_bytes);
    assert_eq!(std::fs::read(right.join("photos/large")).expect("reads"), large);
    assert_eq!(called(&left, "photos/1"), ["a's 1\0"], "only a edited it");
    assert_eq!(called(&left, "top"), ["b's top\0"], "only b edited it");
    assert_eq!(called(&left, "photos/absent"), ["photos/absent at first"]);
    assert!(called(&left, "photos/gone").is_empty(), "a removed it, and b did not touch it");
    assert_eq!([called(&left, "photos/mine"), called(&right, "photos/new")].concat(), ["mine", "new"]);
    assert_eq!(called(&left, "docs/a"), ["a's a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_selection_is_brought_to_its_end_after_a_crash() {
    let site = Site::new();
    for name in ["one/a", "one/b", "two/a", "three/a"] {
        write(&site.path("left").join(name), name);
    }
    let mut shared = Shared::of(site).await;
    shared.equal().await;
    let (left, right) = (shared.left(), shared.right());
    let paths = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    shared.b.select_paths(shared.folder, &paths(&["one/a", "two"])).await.expect("selects");
    std::fs::remove_file(right.join("one/b")).expect("removes");
    // one after the other, none of which comes to its end
    for some in [&["three"][..], &["one"], &["one", "three"]] {
        shared.b.select_paths(shared.folder, &paths(some)).await.expect("selects");
        shared.b.close().await;
        shared.b = shared.site.open("b").await;
    }
    until_at(&shared.b, &right.join("one/b"), "one/b").await;
    write(&left.join("two/a"), "changed\0");
    write(&left.join("three/a"), "changed");
    until_at(&shared.b, &right.join("three/a"), "changed").await;
    assert_eq!(std::fs::read_to_string(right.join("two/a")).expect("reads"), "two/a");
    for refused in ["", "/one", "one//a", "../one", ".syncshell"] {
        let refusal = shared.b.select_paths(shared.folder, &paths(&[refused])).await.expect_err("no path");
        assert!(refusal.to_string().contains("no path of this folder"), "{refused}: {refusal}");
    }
    assert!(shared.b.select_paths(shared.folder, &vec!["a".to_owned(); 1025]).await.is_err());
    shared.b.select_paths(shared.folder, &[]).await.expect("selects");
    until_at(&shared.b, &right.join("one/a"), "one/a").await;
    shared.equal().await;
    assert_eq!(called(&left, "two/a"), ["changed\0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_out_is_served_and_does_not_weigh_in_a_mass_change() {
    let site = Site::new();
    for number in 0..30 {
        write(&site.path("left").join(format!("docs/{number}")), format!("text {number}"));
    }
    for number in 0..120 {
        write(&site.path("left").join(format!("photos/{number}")), format!("picture {number}"));
    }
    let shared = Shared::of(site).await;
    shared.equal().await;
    shared.b.select_paths(shared.folder, &["docs".to_owned()]).await.expect("selects");
    until_at(&shared.b, &shared.right().join("docs/7"), "text 7").await;
    let docs = shared.left().join("docs");
    // all at once for the other device, however it is noticed here
    shared.b.pause_folder(shared.folder, true).await.expect("pauses");
    (0..30).for_each(|number| std::fs::remove_file(docs.join(number.to_string())).expect("removes"));
    shared.a.rescan_folder(shared.folder).await.expect("rescans");
    let alice = shared.a.only_client().expect("a client");
    assert!(!alice.handed_to(alice.last_cursor(), PATIENCE).await.is_empty());
    shared.b.pause_folder(shared.folder, false).await.expect("resumes");
    let held = until_held(&shared.b).await;
    assert!(held.contains("deleted 30") && held.contains("of 31 files"), "{held}");
    assert_eq!(shared.b.undo_folder(shared.folder).await.expect("undoes"), 30);
    until_at(&shared.a, &docs.join("7"), "text 7").await;
    // what was only told by a device that left it out since is to be had from there
    write(&shared.right().join("docs/large"), noise(600 << 10));
    until_at(&shared.a, &docs.join("8"), "text 8").await;
    shared.equal_below("docs").await;
    shared.b.select_paths(shared.folder, &["photos".to_owned()]).await.expect("selects");
    let c = shared.site.device("c").await;
    let group = only(&shared.b).await.group.parse().expect("an id");
    pair(&shared.b.client(group).expect("a client"), &c).await;
    shared.a.pause_folder(shared.folder, true).await.expect("pauses");
    c.offered_folders(group, PATIENCE).await.expect("folders");
    let third = shared.site.path("third");
    c.place_folder(group, shared.folder, &third, FolderOptions::default()).await.expect("places");
    until_at(&c, &third.join("docs/7"), "text 7").await;
    assert_eq!(tree(&third).get(Path::new("docs/large")), tree(&shared.right()).get(Path::new("docs/large")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_with_a_changed_middle_moves_only_the_change() {
    let site = Site::new();
    let mut bytes = noise(80 << 20);
    write(&site.path("left/large"), &bytes);
    let shared = Shared::of(site).await;
    shared.equal().await;
    let before = only(&shared.b).await.fetched_bytes;
    assert!(before >= 80 << 20);
    let middle = bytes.len() / 2;
    bytes.splice(middle..middle, noise(1024));
    write(&shared.left().join("large"), &bytes);
    shared.equal().await;
    let moved = only(&shared.b).await.fetched_bytes - before;
    assert!(moved <= 6 << 20, "{moved} bytes were fetched");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_right_after_an_arrival_follows_it() {
    let site = Site::new();
    write(&site.path("left/note"), "0");
    let shared = Shared::of(site).await;
    shared.equal().await;
    for round in 1..6 {
        let (from, to) = if round % 2 == 0 { (shared.left(), shared.right()) } else { (shared.right(), shared.left()) };
        let text = format!("edit number {round}");
        write(&from.join("note"), &text);
        let start = Instant::now();
        while std::fs::read(to.join("note")).ok().as_deref() != Some(text.as_bytes()) {
            assert!(start.elapsed() < PATIENCE, "edit {round} does not arrive");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    shared.equal().await;
    assert_eq!(tree(&shared.left()).keys().collect::<Vec<_>>(), [Path::new("note")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_holds_several_folders() {
    let site = Site::new();
    for number in 0..4 {
        write(&site.path(&format!("left {number}/file")), format!("of folder {number}"));
    }
    let shared = Shared::of(site).await;
    let group = only(&shared.a).await.group.parse().expect("an id");
    for number in 0..4 {
        let left = shared.site.path(&format!("left {number}"));
        let status = shared.a.share_folder(&left, Some(group), FolderOptions::default()).await.expect("shares");
        let folder: FolderId = status.id.parse().expect("an id");
        let right = shared.site.path(&format!("right {number}"));
        let start = Instant::now();
        while let Err(error) = shared.b.place_folder(group, folder, &right, FolderOptions::default()).await {
            assert!(error.code() == "unknown-folder" && start.elapsed() < PATIENCE, "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    for number in 0..4 {
        let start = Instant::now();
        while tree(&shared.site.path(&format!("left {number}"))) != tree(&shared.site.path(&format!("right {number}")))
        {
            assert!(start.elapsed() < PATIENCE, "folder {number}: {:?}", shared.b.folders().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_the_rate_is_kept_until_it_is_lifted() {
    let shared = Shared::of(Site::new()).await;
    shared.equal().await;
    shared.b.limit_rate(Some(256 << 10)).await.expect("limits");
    let bytes = noise(24 << 20);
    write(&shared.left().join("large"), &bytes);
    let start = Instant::now();
    while only(&shared.b).await.fetched_bytes == 0 {
        assert!(start.elapsed() < PATIENCE, "nothing arrives");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!shared.right().join("large").exists(), "24 MiB at a quarter of one a second");
    shared.b.limit_rate(None).await.expect("lifts");
    shared.equal().await;
}

/// A folder at alice's, with a member in its group who means it ill.
struct Hostile {
    site: Site,
    a: Device,
    mallory: Member,
    talk: Talk,
    folder: FolderId,
    sent: Vec<Vec<u8>>,
    _raw: Raw,
}

impl Hostile {
    async fn new() -> Self {
        let site = Site::new();
        let a = site.device("a").await;
        write(&site.path("left/mine"), "mine");
        write(&site.path("outside/secret"), "secret");
        let status = a.share_folder(&site.path("left"), None, FolderOptions::default()).await.expect("shares");
        let alice = a.only_client().expect("a client");
        let target = {
            let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
            Target::of_link(&invite.link, alice.group())
        };
        let raw = Raw::new().await;
        let mallory = raw.join(&alice).await;
        let mut talk = raw.dial(&target).await;
        talk.go_live(&mallory, Offer::default()).await;
        let folder = status.id.parse().expect("an id");
        Self { site, a, mallory, talk, folder, sent: Vec::new(), _raw: raw }
    }

    /// Sends the body of an entry with records, whatever it is.
    async fn send(&mut self, body: &[u8]) {
        let plain = sync_crypto::content::encode(&folder_stream(&self.folder), KIND_RECORDS, body).expect("fits");
        let previous = self.sent.last().map_or(sync_types::EnvelopeHash::NONE, |bytes| hash_of(bytes));
        let number = self.sent.len() as u64 + 1;
        let entry = self.mallory.seal(self.mallory.header(number, previous), &plain);
        self.sent.push(entry.clone());
        self.talk.push(vec![entry], number).await;
    }

    async fn records(&mut self, records: Vec<Record>) {
        self.send(&RecordBatch { records }.encode()).await;
    }

    /// That nothing happened outside, and that the folder goes on.
    async fn unharmed(&self) {
        write(&self.site.path("left/later"), "later");
        self.a.rescan_folder(self.folder).await.expect("rescans");
        assert_eq!(std::fs::read(self.site.path("left/mine")).expect("reads"), b"mine");
        let outside = tree(&self.site.path("outside"));
        assert_eq!(outside.keys().collect::<Vec<_>>(), [Path::new("secret")], "{outside:?}");
        assert_eq!(std::fs::read(self.site.path("outside/secret")).expect("reads"), b"secret");
        let beside: Vec<_> =
            std::fs::read_dir(self.site.path("")).expect("reads").flatten().map(|e| e.file_name()).collect();
        assert!(beside.iter().all(|name| !name.to_string_lossy().contains("evil")), "{beside:?}");
    }
}

fn record(path: &str, node: Node) -> Record {
    let path = TreePath::new(path).expect("a path");
    Record { path, node, mode: 0o644, mtime: 1, basis: Vector::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn m10_a_path_that_leads_out_of_the_folder_is_refused() {
    let mut hostile = Hostile::new().await;
    let alice = hostile.a.only_client().expect("a client");
    let crafted: [(&str, &str, &[u8]); 7] = [
        ("a parent", "xx/evil", b"../evil"),
        ("a parent further down", "a/xx/xx/evil", b"a/../../evil"),
        ("an absolute path", "x/evil", b"//evil"),
        ("a NUL", "evilx", b"evil\0"),
        ("an empty component", "evilxx/a", b"evil//xa"),
        ("our own directory", "xsyncshell/evil", b".syncshell/evil"),
        ("a dot", "x/evil", b"./evil"),
    ];
    for (what, sound, evil) in crafted {
        let body = RecordBatch { records: vec![record(sound, Node::Directory)] }.encode();
        let at = body.windows(sound.len()).position(|bytes| bytes == sound.as_bytes()).expect("the path");
        let mut bad = body.clone();
        bad[at..at + evil.len()].copy_from_slice(evil);
        let before = refused(&alice).await;
        hostile.send(&bad).await;
        until(&alice, what, |status| status.refused > before).await;
    }
    let long = format!("{}/{}", "x".repeat(149), "y".repeat(150));
    let mut bad = RecordBatch { records: vec![record(&long, Node::Directory)] }.encode();
    let at = bad.iter().position(|byte| *byte == b'/').expect("a slash");
    bad[at] = b'z';
    let million = [&[0x92, 0x90, 0xdd][..], &1_000_000u32.to_be_bytes()].concat();
    let mut device = RecordBatch { records: vec![record("device", Node::Directory)] }.encode();
    let kind = device.windows(2).rposition(|bytes| bytes == [0x91, 1]).expect("the kind of a directory");
    device[kind + 1] = 4;
    for (what, bad) in [
        ("a name of 300 bytes", bad),
        ("a million records", million),
        ("a kind that is no file, directory or link", device),
        ("garbage", noise(500)),
    ] {
        let before = refused(&alice).await;
        hostile.send(&bad).await;
        until(&alice, what, |status| status.refused > before).await;
    }
    hostile.unharmed().await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn m10_nothing_is_written_through_a_link_that_leads_outside() {
    let mut hostile = Hostile::new().await;
    let outside = hostile.site.path("outside").to_string_lossy().into_owned();
    let nothing = *blake3::hash(b"").as_bytes();
    let empty = || Node::File(FileContent { size: 0, hash: nothing, chunks: Chunks::Whole });
    hostile.records(vec![record("link", Node::Symlink(outside.clone()))]).await;
    let start = Instant::now();
    while std::fs::read_link(hostile.site.path("left/link")).is_err() {
        assert!(start.elapsed() < PATIENCE, "the link is content like any other");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    hostile.records(vec![record("link/evil", empty()), record("well", empty())]).await;
    hostile.records(vec![record("second", Node::Symlink(outside)), record("second/deep/evil", empty())]).await;
    let start = Instant::now();
    while !hostile.site.path("left/well").exists() || !hostile.site.path("left/second/deep/evil").exists() {
        assert!(
            start.elapsed() < PATIENCE,
            "{:?}\n{:?}",
            tree(&hostile.site.path("left")).keys(),
            only(&hostile.a).await
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_nobody_has_waits_and_the_rest_goes_on() {
    let mut hostile = Hostile::new().await;
    let never = |size| Node::File(FileContent { size, hash: [7; 32], chunks: Chunks::Whole });
    let list = Chunks::Listed(vec![ChunkRef { hash: Some([8; 32]), len: 4000 }]);
    let listed = Node::File(FileContent { size: u64::MAX / 2, hash: [9; 32], chunks: list });
    hostile.records(vec![record("mine", never(4)), record("never", never(100)), record("huge", listed)]).await;
    let start = Instant::now();
    while only(&hostile.a).await.pending_files < 2 {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    hostile.records(vec![record("here", Node::Directory)]).await;
    let start = Instant::now();
    while !hostile.site.path("left/here").is_dir() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!hostile.site.path("left/never").exists() && !hostile.site.path("left/huge").exists());
    // also where the version that nobody has won: what lies there stays in its place until that is at hand
    hostile.unharmed().await;
    // what nobody waits for any more is no problem any more
    let said = |status: FolderStatus| status.problems.iter().any(|problem| problem.path == "never");
    assert!(said(only(&hostile.a).await));
    let basis: Vector = [Dot::new(hostile.mallory.author.id(), Number(1), 1)].into_iter().collect();
    hostile.records(vec![Record { basis, mode: 0, mtime: 0, ..record("never", Node::Deleted) }]).await;
    let start = Instant::now();
    while said(only(&hostile.a).await) {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_others_removed_goes_once_what_kept_it_is_gone() {
    let mut hostile = Hostile::new().await;
    let directory = record("gone", Node::Directory);
    let empty = Node::File(FileContent { size: 0, hash: *blake3::hash(b"").as_bytes(), chunks: Chunks::Whole });
    hostile.records(vec![directory, record("gone/child", empty)]).await;
    let there = |hostile: &Hostile| hostile.site.path("left/gone/child").exists();
    let start = Instant::now();
    while !there(&hostile) {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // the directory first, and what is in it in an entry of its own
    let seen = |number| [Dot::new(hostile.mallory.author.id(), Number(number), 0)].into_iter().collect::<Vector>();
    let gone = |path, basis| Record { basis, mode: 0, mtime: 0, ..record(path, Node::Deleted) };
    let (first, second) = (gone("gone", seen(1)), gone("gone/child", Vector::default()));
    let child: Vector = [Dot::new(hostile.mallory.author.id(), Number(1), 1)].into_iter().collect();
    hostile.records(vec![first]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    hostile.records(vec![Record { basis: child, ..second }]).await;
    let start = Instant::now();
    while hostile.site.path("left/gone").exists() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_stays_for_what_is_ignored_goes_with_it() {
    let site = Site::new();
    write(&site.path("left/.syncshellignore"), "*.log\n");
    write(&site.path("left/d/text"), "text");
    write(&site.path("left/d/own.log"), "ignored");
    let shared = Shared::of(site).await;
    let start = Instant::now();
    while !shared.right().join("d/text").exists() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&shared.b).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    std::fs::remove_dir_all(shared.right().join("d")).expect("removes");
    let start = Instant::now();
    while shared.left().join("d/text").exists() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&shared.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shared.a.rescan_folder(shared.folder).await.expect("looks");
    assert_eq!(std::fs::read(shared.left().join("d/own.log")).expect("reads"), b"ignored");
    std::fs::remove_file(shared.left().join("d/own.log")).expect("removes");
    shared.a.rescan_folder(shared.folder).await.expect("looks");
    let start = Instant::now();
    while shared.left().join("d").exists() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&shared.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shared.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_others_replaced_by_a_file_gives_way_once_what_kept_it_is_gone() {
    let mut hostile = Hostile::new().await;
    let empty = Node::File(FileContent { size: 0, hash: *blake3::hash(b"").as_bytes(), chunks: Chunks::Whole });
    hostile.records(vec![record("there", Node::Directory), record("there/child", empty.clone())]).await;
    let start = Instant::now();
    while !hostile.site.path("left/there/child").exists() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // what replaces it first, and what was in it in an entry of its own
    let seen = |index| [Dot::new(hostile.mallory.author.id(), Number(1), index)].into_iter().collect::<Vector>();
    let (there, child) = (seen(0), seen(1));
    hostile.records(vec![Record { basis: there, ..record("there", empty) }]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    hostile.records(vec![Record { basis: child, mode: 0, mtime: 0, ..record("there/child", Node::Deleted) }]).await;
    let start = Instant::now();
    while !hostile.site.path("left/there").is_file() {
        assert!(start.elapsed() < PATIENCE, "{:?}", only(&hostile.a).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
