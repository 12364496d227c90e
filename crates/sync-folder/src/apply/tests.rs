//! Every operation of apply on real trees: races, links, full and foreign disks, and states that a crash leaves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use sync_types::FolderId;

use super::*;
use crate::walk;

/// A folder, and a directory beside it that nothing may touch.
struct Folder {
    _home: tempfile::TempDir,
    path: PathBuf,
    outside: PathBuf,
    applier: Applier,
}

impl Folder {
    fn new() -> Self {
        Self::in_home(tempfile::tempdir().expect("a directory"))
    }

    fn in_home(home: tempfile::TempDir) -> Self {
        let (path, outside) = (home.path().join("folder"), home.path().join("outside"));
        fs::create_dir(&outside).expect("a directory");
        fs::write(outside.join("f"), "outside").expect("a file");
        let root = Root::create(&path, &FolderId([7; 16])).expect("a root");
        Self { _home: home, path, outside, applier: Applier::new(Arc::new(root)) }
    }

    /// One whose file system can do everything in one step, and one that cannot.
    fn both() -> [Self; 2] {
        let mut simple = Self::new();
        simple.applier.in_one_step = false;
        [Self::new(), simple]
    }

    fn at(&self, path: &str) -> PathBuf {
        self.path.join(path)
    }

    fn write(&self, path: &str, content: &str) -> Stat {
        fs::create_dir_all(self.at(path).parent().expect("a parent")).expect("a directory");
        fs::write(self.at(path), content).expect("a file");
        self.stat(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).expect("a file")
    }

    fn stat(&self, path: &str) -> Stat {
        walk::stat(self.applier.root(), &tree(path)).expect("readable").expect("something").0
    }

    fn is_there(&self, path: &str) -> bool {
        self.at(path).symlink_metadata().is_ok()
    }

    fn ready(&self, content: &str) -> Ready {
        let ready = self.received(content);
        self.applier.sync(std::slice::from_ref(&ready)).expect("synced");
        ready
    }

    fn received(&self, content: &str) -> Ready {
        let incoming = self.applier.receive(content.len() as u64).expect("a file");
        incoming.write_at(0, content.as_bytes()).expect("written");
        incoming.finish(Check::Blake3(hash(content)), 0o640, MTIME).expect("whole")
    }

    fn kept(&self) -> Vec<String> {
        let versions = self.applier.versions();
        let read = |kept: &Kept| std::io::read_to_string(versions.open(&kept.name).expect("kept")).expect("text");
        versions.list().expect("a list").iter().map(read).collect()
    }

    /// What every operation says to a path with a link in it.
    fn try_everything(&self, path: &str) {
        let (applier, path, own) = (&self.applier, tree(path), tree("own"));
        let stat = self.write("own", "own");
        let seen = Stat {
            kind: Kind::File,
            ..walk::stat_of(&fs::File::open(self.outside.join("f")).expect("a file"))
                .expect("readable")
                .expect("a file")
        };
        let ready = self.ready("new");
        let kept = applier.remove(&tree("own"), &stat).expect("removed").expect("kept").name;
        let stat = self.write("own", "own");
        let incoming = applier.receive(1).expect("a file");
        let refused: Vec<(&str, Result<(), ApplyError>)> = vec![
            ("place", applier.place(&ready, &path, Expected::Nothing).map(drop)),
            ("replace", applier.place(&ready, &path, Expected::This(seen)).map(drop)),
            ("link", applier.make_link(&path, "t", Expected::Nothing).map(drop)),
            ("remove", applier.remove(&path, &seen).map(drop)),
            ("remove_dir", applier.remove_dir(&path)),
            ("make_dir", applier.make_dir(&path, 0o700).map(drop)),
            (
                "make_dir below",
                applier.make_dir(&path.join("a").expect("a path").join("b").expect("a path"), 0o700).map(drop),
            ),
            ("set_meta", applier.set_meta(&path, &seen, 0o600, Some(1)).map(drop)),
            ("rename from", applier.rename(&path, &seen, &tree("to")).map(drop)),
            ("rename to", applier.rename(&own, &stat, &path).map(drop)),
            ("copy_from", incoming.copy_from(&path, 0, 1, 0)),
            ("restore", applier.restore(&kept, &path, Expected::Nothing).map(drop)),
        ];
        for (what, result) in refused {
            assert!(matches!(result, Err(ApplyError::Escape)), "{what}: {result:?}");
        }
        assert_eq!((self.read("own"), self.is_there("to")), ("own".to_owned(), false));
        applier.place(&ready, &tree("still"), Expected::Nothing).expect("the file still waits");
    }
}

const MTIME: i64 = 1_234_567_890_123_456_000;

fn tree(path: &str) -> TreePath {
    TreePath::new(path).expect("a path")
}

fn hash(content: &str) -> [u8; 32] {
    *blake3::hash(content.as_bytes()).as_bytes()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A file system of its own, for as long as this lives.
struct Mount(PathBuf);

impl Mount {
    /// Nothing where this user may not mount.
    fn new(at: &Path, options: &str) -> Option<Self> {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(at).output();
        if is_root() && mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("skipped: needs the right to mount");
        None
    }

    fn make_read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0).status().expect("mount");
        assert!(status.success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_received_file_takes_its_place_with_bits_and_time() {
    for folder in Folder::both() {
        let ready = folder.ready("content");
        let placed = folder.applier.place(&ready, &tree("f"), Expected::Nothing).expect("placed");
        assert_eq!((folder.read("f").as_str(), placed.kept), ("content", None));
        assert_eq!(placed.stat, folder.stat("f"), "what the next scan sees");
        assert_eq!((placed.stat.mode, placed.stat.mtime, placed.stat.size), (0o640, MTIME, 7));
        assert!(folder.applier.incoming_names().expect("names").is_empty());
        folder.applier.sync_dirs().expect("synced");
        assert!(folder.applier.touched().is_empty());
    }
}

#[test]
fn what_is_replaced_is_kept() {
    for folder in Folder::both() {
        let old = folder.write("d/f", "old");
        let ready = folder.ready("new");
        let placed = folder.applier.place(&ready, &tree("d/f"), Expected::This(old)).expect("placed");
        let kept = placed.kept.expect("kept");
        assert_eq!((folder.read("d/f").as_str(), folder.kept()), ("new", vec!["old".to_owned()]));
        assert_eq!((kept.size, kept.mode, kept.mtime, kept.kind), (3, old.mode, old.mtime, Kind::File));
        assert_eq!(folder.applier.versions().get(&kept.name).expect("kept"), kept);
        assert_eq!(folder.stat("d/f"), placed.stat);
    }
}

#[test]
fn a_file_that_appeared_meanwhile_is_not_overwritten() {
    for folder in Folder::both() {
        let ready = folder.ready("new");
        folder.write("f", "mine");
        for path in ["f", ".syncshellignore"] {
            folder.write(path, "mine");
            let refused = folder.applier.place(&ready, &tree(path), Expected::Nothing);
            assert!(matches!(refused, Err(ApplyError::Changed)), "{refused:?}");
            assert_eq!(folder.read(path), "mine");
        }
        assert!(matches!(folder.applier.make_link(&tree("f"), "t", Expected::Nothing), Err(ApplyError::Changed)));
        let own = folder.write("own", "own");
        assert!(matches!(folder.applier.rename(&tree("own"), &own, &tree("f")), Err(ApplyError::Changed)));
        assert_eq!((folder.read("f").as_str(), folder.read("own").as_str()), ("mine", "own"));
        assert_eq!(folder.applier.incoming_names().expect("names"), [ready.name()], "only the file still waits");
        assert!(folder.kept().is_empty());
    }
}

#[test]
fn a_changed_file_is_neither_replaced_nor_removed_nor_moved() {
    for folder in Folder::both() {
        let ready = folder.ready("new");
        let check = |what: &str, seen: &Stat| {
            let (applier, path) = (&folder.applier, tree("f"));
            let before = folder.is_there("f").then(|| (folder.read("f"), folder.stat("f")));
            let mut refused = vec![
                applier.place(&ready, &path, Expected::This(*seen)).map(drop),
                applier.make_link(&path, "t", Expected::This(*seen)).map(drop),
                applier.set_meta(&path, seen, 0o600, Some(1)).map(drop),
                applier.rename(&path, seen, &tree("to")).map(drop),
            ];
            if before.is_some() {
                refused.push(applier.remove(&path, seen).map(drop));
            }
            assert!(refused.iter().all(|result| matches!(result, Err(ApplyError::Changed))), "{what}: {refused:?}");
            assert_eq!(folder.is_there("f").then(|| (folder.read("f"), folder.stat("f"))), before, "{what}");
            assert!(folder.kept().is_empty() && !folder.is_there("to"), "{what}");
        };
        let seen = folder.write("f", "seen");
        folder.write("f", "longer");
        check("another size", &seen);
        let seen = folder.stat("f");
        let file = fs::File::options().write(true).open(folder.at("f")).expect("a file");
        sys::set_mtime(&file, seen.mtime + 1_000_000).expect("a time");
        check("another time", &seen);
        let seen = folder.stat("f");
        folder.write("g", "longer");
        sys::set_mtime(&fs::File::options().write(true).open(folder.at("g")).expect("a file"), seen.mtime)
            .expect("a time");
        fs::rename(folder.at("g"), folder.at("f")).expect("renamed");
        check("another inode", &seen);
        let seen = folder.stat("f");
        fs::remove_file(folder.at("f")).expect("removed");
        check("gone", &seen);
        assert_eq!(folder.applier.remove(&tree("f"), &seen).expect("gone already"), None);
        assert_eq!(folder.applier.remove(&tree("no/f"), &seen).expect("gone already"), None);
    }
}

#[test]
fn a_writer_that_wins_the_race_against_a_replacement_keeps_its_file() {
    let folder = Folder::new();
    let (applier, root) = (&folder.applier, folder.applier.root());
    let (tmp, parent) = (own_dir(root, TMP_DIR).expect("tmp"), open_parent(root, &tree("f")).expect("root"));
    let old = folder.write("f", "seen");
    let ready = folder.ready("new");
    let slot = applier.slot().expect("a slot");
    tmp.rename(ready.name(), &slot.dir, &slot.name).expect("step 1");
    assert_eq!(
        (folder.read("f").as_str(), folder.kept()),
        ("seen", vec!["new".to_owned()]),
        "a crash here loses nothing"
    );

    folder.write("f", "written in the last moment");
    applier.exchange(&slot, &parent, "f").expect("step 2");
    assert_eq!(folder.kept(), ["written in the last moment"], "nor does one here");
    let settled = applier.settle_exchange(&slot, &ready.stat, &parent, "f", &old).expect("step 3");
    assert!(matches!(settled, Settled::SwappedBack));
    assert_eq!((folder.read("f").as_str(), folder.kept()), ("written in the last moment", vec!["new".to_owned()]));

    applier.exchange(&slot, &parent, "f").expect("step 2 again");
    folder.write("g", "written even later");
    fs::rename(folder.at("g"), folder.at("f")).expect("renamed");
    let settled = applier.settle_exchange(&slot, &ready.stat, &parent, "f", &old).expect("step 3");
    assert!(matches!(settled, Settled::Overtaken));
    assert_eq!(
        (folder.read("f").as_str(), folder.kept()),
        ("written even later", vec!["written in the last moment".to_owned()])
    );
}

#[test]
fn a_writer_that_wins_the_race_against_a_removal_keeps_its_file() {
    for folder in Folder::both() {
        let (applier, parent) = (&folder.applier, open_parent(folder.applier.root(), &tree("f")).expect("root"));
        let seen = folder.write("f", "seen");
        folder.write("f", "written later");
        let slot = applier.slot().expect("a slot");
        parent.rename("f", &slot.dir, &slot.name).expect("step 1");
        let settled = applier.settle_removal(&parent, "f", &seen, &slot);
        assert!(matches!(settled, Err(ApplyError::Changed)));
        assert_eq!((folder.read("f").as_str(), folder.kept()), ("written later", vec![]));

        parent.rename("f", &slot.dir, &slot.name).expect("step 1 again");
        folder.write("f", "written last");
        let kept = applier.settle_removal(&parent, "f", &seen, &slot).expect("settled").expect("kept");
        assert_eq!(kept.size, "written later".len() as u64);
        assert_eq!((folder.read("f").as_str(), folder.kept()), ("written last", vec!["written later".to_owned()]));
    }
}

#[test]
fn a_writer_that_wins_the_race_against_a_move_keeps_its_file() {
    for folder in Folder::both() {
        let (applier, parent) = (&folder.applier, open_parent(folder.applier.root(), &tree("f")).expect("root"));
        let seen = folder.write("f", "seen");
        folder.write("f", "written later");
        applier.rename_new(&parent, "f", &parent, "to").expect("step 1");
        assert!(matches!(applier.settle_move(&parent, "f", &seen, &parent, "to"), Err(ApplyError::Changed)));
        assert_eq!((folder.read("f").as_str(), folder.is_there("to")), ("written later", false));

        applier.rename_new(&parent, "f", &parent, "to").expect("step 1 again");
        folder.write("f", "written last");
        assert!(matches!(applier.settle_move(&parent, "f", &seen, &parent, "to"), Err(ApplyError::Changed)));
        assert_eq!((folder.read("f").as_str(), folder.read("to").as_str()), ("written last", "written later"));
    }
}

#[test]
fn without_moves_in_one_step_a_crash_keeps_the_old_content() {
    let folder = Folder::new();
    let parent = open_parent(folder.applier.root(), &tree("f")).expect("root");
    folder.write("f", "old");
    let ready = folder.ready("new");
    let slot = folder.applier.slot().expect("a slot");
    parent.rename("f", &slot.dir, &slot.name).expect("step 1");
    assert_eq!((folder.is_there("f"), folder.kept()), (false, vec!["old".to_owned()]));
    assert_eq!(folder.applier.incoming_names().expect("names"), [ready.name()]);
}

#[test]
fn no_link_in_a_path_is_followed_wherever_it_leads() {
    for folder in Folder::both() {
        symlink(&folder.outside, folder.at("out")).expect("a link");
        fs::create_dir(folder.at("in")).expect("a directory");
        fs::write(folder.at("in/f"), "inside").expect("a file");
        symlink("in", folder.at("alias")).expect("a link");
        for path in ["out/f", "out/d", "alias/f", "in/../f"] {
            match TreePath::new(path) {
                Ok(_) => {
                    folder.try_everything(path);
                    fs::remove_file(folder.at("still")).expect("placed");
                }
                Err(error) => assert_eq!(error, sync_types::folder::PathError::Escape, "{path}"),
            }
        }
        let names: Vec<_> = fs::read_dir(&folder.outside)
            .expect("a directory")
            .map(|entry| entry.expect("a name").file_name())
            .collect();
        assert_eq!(names, ["f"]);
        assert_eq!(fs::read_to_string(folder.outside.join("f")).expect("a file"), "outside");
        assert_eq!(folder.read("in/f"), "inside");
    }
}

#[test]
fn a_parent_replaced_by_a_link_between_two_operations_is_not_followed() {
    let folder = Folder::new();
    let (one, two) = (folder.ready("1"), folder.ready("2"));
    folder.applier.make_dir(&tree("a/b"), 0o755).expect("made");
    folder.applier.place(&one, &tree("a/b/1"), Expected::Nothing).expect("placed");
    fs::rename(folder.at("a/b"), folder.outside.join("b")).expect("moved out");
    symlink(folder.outside.join("b"), folder.at("a/b")).expect("a link");
    let refused = folder.applier.place(&two, &tree("a/b/2"), Expected::Nothing);
    assert!(matches!(refused, Err(ApplyError::Escape)), "{refused:?}");
    assert!(!folder.outside.join("b/2").exists());
    folder.applier.sync_dirs().expect("what was moved out is no error");
}

#[test]
fn step_by_step_a_path_leads_to_the_same_as_in_one_call() {
    let folder = Folder::new();
    fs::create_dir_all(folder.at("a/b")).expect("directories");
    symlink(&folder.outside, folder.at("out")).expect("a link");
    symlink("a", folder.at("alias")).expect("a link");
    folder.write("file", "");
    let dir = folder.applier.root().dir();
    for (path, expect) in [
        ("", Ok(())),
        ("a/b", Ok(())),
        ("a/c", Err("Missing")),
        ("c/a", Err("Missing")),
        ("out", Err("Escape")),
        ("alias/b", Err("Escape")),
        ("file", Err("Changed")),
        ("file/b", Err("Changed")),
    ] {
        for open in [sys::open_dir, sys::open_dir_by_steps] {
            let opened = open(dir, path).map(drop).map_err(|error| format!("{error:?}"));
            assert_eq!(opened, expect.map_err(str::to_owned), "{path:?}");
        }
    }
}

#[test]
fn links_in_the_place_of_our_own_directories_are_not_followed() {
    let folder = Folder::new();
    let old = folder.write("f", "old");
    for own in [TMP_DIR, VERSIONS_DIR] {
        let own = folder.at(OWN_DIR).join(own);
        fs::remove_dir(&own).expect("empty");
        symlink(&folder.outside, &own).expect("a link");
    }
    assert!(matches!(folder.applier.receive(1), Err(ApplyError::Escape)));
    assert!(matches!(folder.applier.remove(&tree("f"), &old), Err(ApplyError::Escape)));
    assert!(matches!(folder.applier.versions().list(), Err(ApplyError::Escape)));
    assert_eq!(fs::read_dir(&folder.outside).expect("a directory").count(), 1);
    assert_eq!(folder.read("f"), "old");
}

#[test]
fn our_own_directories_are_made_again() {
    let folder = Folder::new();
    let old = folder.write("f", "old");
    for own in [TMP_DIR, VERSIONS_DIR] {
        fs::remove_dir(folder.at(OWN_DIR).join(own)).expect("empty");
    }
    let ready = folder.ready("new");
    folder.applier.place(&ready, &tree("f"), Expected::This(old)).expect("placed");
    assert_eq!(folder.kept(), ["old"]);
}

#[test]
fn a_link_is_made_replaced_and_removed_but_never_followed() {
    for folder in Folder::both() {
        let (applier, path) = (&folder.applier, tree("d/l"));
        fs::create_dir(folder.at("d")).expect("a directory");
        let target = folder.outside.join("f");
        let target = target.to_str().expect("text");
        let made = applier.make_link(&path, target, Expected::Nothing).expect("made");
        assert_eq!(made.stat, folder.stat("d/l"));
        let before = fs::metadata(target).expect("a file");
        let stat = applier.set_meta(&path, &made.stat, 0o600, Some(MTIME)).expect("the link's own time");
        assert_eq!((stat.mtime, stat), (MTIME, folder.stat("d/l")));
        let after = fs::metadata(target).expect("a file");
        assert_eq!((before.mode(), before.mtime_nsec()), (after.mode(), after.mtime_nsec()));

        let ready = folder.ready("a file now");
        let placed = applier.place(&ready, &path, Expected::This(stat)).expect("placed");
        assert_eq!(placed.kept.expect("kept").target.as_deref(), Some(target));
        let again = applier.make_link(&path, "../x", Expected::This(placed.stat)).expect("made");
        let kept = applier.remove(&path, &again.stat).expect("removed").expect("kept");
        assert_eq!((kept.kind, kept.target.as_deref()), (Kind::Symlink, Some("../x")));
        assert!(matches!(applier.versions().open(&kept.name), Err(ApplyError::Changed)), "a kept link is not followed");
        applier.restore(&kept.name, &path, Expected::Nothing).expect("restored");
        assert_eq!(fs::read_link(folder.at("d/l")).expect("a link"), Path::new("../x"));
        assert_eq!(fs::read_to_string(target).expect("a file"), "outside");
    }
}

#[test]
fn directories_are_made_with_those_above_and_removed_when_empty() {
    let folder = Folder::new();
    let applier = &folder.applier;
    let made = applier.make_dir(&tree("a/b/c"), 0o711).expect("made");
    assert_eq!((made.mode, made), (0o711, folder.stat("a/b/c")));
    assert_eq!(applier.make_dir(&tree("a/b/c"), 0o700).expect("there already").mode, 0o711);
    assert_eq!(applier.make_dir(&tree("g"), 0o070).expect("made").mode, 0o070);
    folder.write("f", "a file");
    assert!(matches!(applier.make_dir(&tree("f"), 0o755), Err(ApplyError::Changed)));
    assert!(matches!(applier.make_dir(&tree("f/g"), 0o755), Err(ApplyError::Changed)));
    assert!(matches!(applier.remove_dir(&tree("f")), Err(ApplyError::Changed)));
    assert!(matches!(applier.remove_dir(&tree("a/b")), Err(ApplyError::NotEmpty)));
    assert!(matches!(applier.remove(&tree("a/b"), &folder.stat("a/b")), Err(ApplyError::NotEmpty)));
    let ready = folder.ready("x");
    let refused = applier.place(&ready, &tree("a/b"), Expected::This(folder.stat("a/b")));
    assert!(matches!(refused, Err(ApplyError::NotEmpty)), "{refused:?}");
    applier.remove_dir(&tree("a/b/c")).expect("removed");
    applier.remove_dir(&tree("a/b/c")).expect("gone already");
    assert!(!folder.is_there("a/b/c"));
    applier.sync_dirs().expect("synced");
}

#[test]
fn the_longest_path_there_is_can_be_filled() {
    let folder = Folder::new();
    let deep = tree(&[["x"; 255].join("/").as_str(), "y"].join("/"));
    folder.applier.make_dir(&deep.parent().expect("a parent"), 0o755).expect("made");
    folder.applier.place(&folder.ready("deep"), &deep, Expected::Nothing).expect("placed");
    let long = tree(&vec!["z".repeat(255); 16].join("/"));
    folder.applier.make_dir(&long.parent().expect("a parent"), 0o755).expect("made");
    folder.applier.place(&folder.ready("long"), &long, Expected::Nothing).expect("placed");
    let found = walk::stat(folder.applier.root(), &deep).expect("readable").expect("something");
    assert_eq!(found.0.size, 4);
}

#[test]
fn a_directory_moves_with_all_it_holds() {
    for folder in Folder::both() {
        let applier = &folder.applier;
        folder.write("a/b/f", "content");
        let seen = folder.stat("a");
        applier.place(&folder.ready("more"), &tree("a/b/g"), Expected::Nothing).expect("placed");
        assert!(matches!(applier.rename(&tree("a"), &seen, &tree("a/b/a")), Err(ApplyError::Unsupported(_))));
        applier.make_dir(&tree("there"), 0o755).expect("made");
        assert!(matches!(applier.rename(&tree("a"), &seen, &tree("there")), Err(ApplyError::Changed)));
        applier.rename(&tree("a"), &seen, &tree("there/c")).expect("the same directory, whatever came into it");
        assert_eq!((folder.read("there/c/b/f").as_str(), folder.is_there("a")), ("content", false));
        assert!(applier.touched().contains("there/c/b") && !applier.touched().contains("a/b"));
        applier.sync_dirs().expect("synced");
        assert!(folder.kept().is_empty());
    }
}

#[test]
fn a_file_moves_and_stays_the_same() {
    for folder in Folder::both() {
        let seen = folder.write("f", "content");
        assert_eq!(folder.applier.rename(&tree("f"), &seen, &tree("g")).expect("moved"), seen);
        assert_eq!((folder.read("g").as_str(), folder.is_there("f")), ("content", false));
        assert!(folder.kept().is_empty());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_second_name_of_a_file_is_another_entry() {
    let folder = Folder::new();
    folder.write("f", "content");
    fs::hard_link(folder.at("f"), folder.at("F")).expect("a second name");
    folder.write("g", "content");
    let dir = folder.applier.root().dir();
    assert!(!sys::is_one_entry(dir, "f", dir, "F").expect("both there"));
    assert!(!sys::is_one_entry(dir, "f", dir, "g").expect("both there"));
    assert!(sys::is_one_entry(dir, "g", dir, "g").expect("there"));
    let refused = folder.applier.rename(&tree("f"), &folder.stat("f"), &tree("F"));
    assert!(matches!(refused, Err(ApplyError::Changed)), "{refused:?}");
}

#[test]
fn bits_and_time_are_set_on_what_was_expected() {
    let folder = Folder::new();
    let seen = folder.write("f", "content");
    let set = folder.applier.set_meta(&tree("f"), &seen, 0o4755, Some(-5_000_000_000)).expect("set");
    assert_eq!(set, folder.stat("f"));
    assert_eq!((set.mode, set.mtime, set.ino), (0o755, -5_000_000_000, seen.ino));
    assert_eq!(fs::metadata(folder.at("f")).expect("a file").permissions().mode() & 0o7777, 0o755, "no set-user-id");
    fs::create_dir(folder.at("d")).expect("a directory");
    let dir = folder.stat("d");
    assert_eq!(folder.applier.set_meta(&tree("d"), &dir, 0o555, None).expect("set").mtime, dir.mtime);
    assert_eq!(folder.stat("d").mode, 0o555);
}

#[test]
fn bits_and_time_are_set_on_what_cannot_be_opened() {
    let folder = Folder::new();
    let before = folder.write("f", "content");
    fs::set_permissions(folder.at("f"), fs::Permissions::from_mode(0o000)).expect("set");
    let set = |seen| folder.applier.set_meta(&tree("f"), seen, 0o200, Some(MTIME));
    assert!(matches!(set(&before), Err(ApplyError::Changed)), "other bits were set meanwhile");
    set(&folder.stat("f")).expect("set");
    let dir = folder.applier.root().dir();
    let now = folder.stat("f");
    assert_eq!((now.mode, now.mtime), (0o200, MTIME));
    sys::set_meta_closed(dir, "f", &now, 0o640, Some(MTIME + 1_000)).expect("as if it could not be opened");
    assert_eq!((folder.stat("f").mode, folder.stat("f").mtime), (0o640, MTIME + 1_000));
    let stale = sys::set_meta_closed(dir, "f", &now, 0o600, None);
    assert!(matches!(stale, Err(ApplyError::Changed)), "{stale:?}");
}

#[test]
fn a_file_that_its_owner_may_not_read_is_received() {
    let folder = Folder::new();
    let incoming = folder.applier.receive(1).expect("a file");
    incoming.write_at(0, b"x").expect("written");
    let ready = incoming.finish(Check::Done, 0, MTIME).expect("whole");
    folder.applier.sync(std::slice::from_ref(&ready)).expect("synced");
    assert_eq!(folder.applier.place(&ready, &tree("f"), Expected::Nothing).expect("placed").stat.mode, 0);
}

#[cfg(target_os = "linux")]
#[test]
fn special_files_are_left_alone() {
    let folder = Folder::new();
    let ready = folder.ready("new");
    let seen = folder.write("f", "content");
    fs::remove_file(folder.at("f")).expect("removed");
    rustix::fs::mknodat(
        folder.applier.root().dir(),
        "f",
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a pipe");
    for expected in [Expected::Nothing, Expected::This(seen)] {
        assert!(matches!(folder.applier.place(&ready, &tree("f"), expected), Err(ApplyError::Changed)));
    }
    assert!(matches!(folder.applier.remove(&tree("f"), &seen), Err(ApplyError::Changed)));
    assert!(matches!(folder.applier.set_meta(&tree("f"), &seen, 0o600, None), Err(ApplyError::Changed)));
    let incoming = folder.applier.receive(1).expect("a file");
    assert!(matches!(incoming.copy_from(&tree("f"), 0, 1, 0), Err(ApplyError::Changed)));
}

#[test]
fn what_was_received_before_a_crash_is_taken_up_again() {
    let folder = Folder::new();
    let applier = &folder.applier;
    let incoming = applier.receive(8).expect("a file");
    incoming.write_at(4, b"half").expect("written");
    let name = incoming.name().to_owned();
    drop(incoming);
    let other = applier.receive(3).expect("a file").name().to_owned();
    fs::write(folder.at(OWN_DIR).join(TMP_DIR).join("foreign"), "").expect("a file");

    let keep = BTreeSet::from([name.clone()]);
    assert_eq!(applier.clear_stale(&keep).expect("cleared"), 1);
    assert_eq!(applier.incoming_names().expect("names"), [name.as_str()]);
    assert!(matches!(applier.reopen(&other), Err(ApplyError::Missing)));
    let incoming = applier.reopen(&name).expect("there");
    assert_eq!(incoming.size(), 8);
    assert!(incoming.holds(4, 4, &hash("half")).expect("read"));
    assert!(!incoming.holds(0, 4, &hash("half")).expect("read"));
    incoming.write_at(0, b"half").expect("written");
    let ready = incoming.finish(Check::Blake3(hash("halfhalf")), 0o644, MTIME).expect("whole");
    applier.place(&ready, &tree("f"), Expected::Nothing).expect("placed");
    assert_eq!(folder.read("f"), "halfhalf");
    for name in ["", "..", "../folder", "/etc/passwd", "foreign"] {
        assert!(matches!(applier.reopen(name), Err(ApplyError::Missing)), "{name}");
    }
}

#[test]
fn a_file_received_under_a_given_name_is_taken_up_again_even_when_it_was_finished() {
    let folder = Folder::new();
    let (applier, name) = (&folder.applier, "0123456789abcdef0123456789abcdef");
    let incoming = applier.receive_as(name, 4).expect("a file");
    incoming.write_at(0, b"half").expect("written");
    incoming.finish(Check::Done, 0o444, MTIME).expect("whole");
    assert!(applier.receive_as(name, 4).expect("there").holds(0, 4, &hash("half")).expect("read"));
    let other = applier.receive_as(name, 5).expect("begun anew");
    assert!(!other.holds(0, 4, &hash("half")).expect("read"));
    for name in ["", "..", "f", "../folder/0123456789abcdef01234567"] {
        assert!(matches!(applier.receive_as(name, 1), Err(ApplyError::Missing)), "{name}");
    }
}

#[test]
fn what_is_not_what_was_announced_is_refused() {
    let folder = Folder::new();
    let incoming = folder.applier.receive(4).expect("a file");
    for (offset, bytes) in [(0, &b"12345"[..]), (4, b"1"), (u64::MAX, b"1")] {
        assert!(matches!(incoming.write_at(offset, bytes), Err(ApplyError::Mismatch)));
    }
    folder.write("f", "123");
    assert!(matches!(incoming.copy_from(&tree("f"), 0, 4, 0), Err(ApplyError::Changed)), "too short by now");
    assert!(matches!(incoming.copy_from(&tree("f"), 0, 4, 1), Err(ApplyError::Mismatch)));
    incoming.write_at(0, b"1234").expect("written");
    let refused = incoming.finish(Check::Blake3(hash("1235")), 0o644, MTIME);
    assert!(matches!(refused, Err(ApplyError::Mismatch)));
    assert!(folder.applier.incoming_names().expect("names").is_empty(), "it is gone");
}

#[test]
fn pieces_are_copied_from_files_of_the_folder() {
    let folder = Folder::new();
    let content: String = (0..60_000u32).map(|n| format!("{n:05}")).collect();
    folder.write("d/f", &content);
    let incoming = folder.applier.receive(200_000).expect("a file");
    incoming.copy_from(&tree("d/f"), 100_000, 200_000, 0).expect("copied");
    assert!(incoming.holds(0, 200_000, &hash(&content[100_000..300_000])).expect("read"));
}

#[test]
fn holes_stay_holes() {
    let folder = Folder::new();
    let size = 100 << 30;
    let incoming = folder.applier.receive(size).expect("a file");
    incoming.write_at(size / 2, b"data").expect("written");
    let ready = incoming.finish(Check::Done, 0o644, MTIME).expect("whole");
    folder.applier.place(&ready, &tree("f"), Expected::Nothing).expect("placed");
    let metadata = fs::metadata(folder.at("f")).expect("a file");
    assert_eq!(metadata.len(), size);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
}

#[cfg(target_os = "linux")]
#[test]
fn many_files_are_made_durable_and_placed_with_no_handle_left_open() {
    let folder = Folder::new();
    let open = || {
        let paths = fs::read_dir("/proc/self/fd").expect("proc").filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        paths.filter(|path| path.starts_with(&folder.path)).count()
    };
    let before = open();
    for dir in 0..20 {
        folder.applier.make_dir(&tree(&format!("d/{dir}")), 0o755).expect("made");
        let ready: Vec<_> = (0..50).map(|n| folder.received(&n.to_string())).collect();
        folder.applier.sync(&ready).expect("synced");
        for (n, ready) in ready.iter().enumerate() {
            folder.applier.place(ready, &tree(&format!("d/{dir}/{n}")), Expected::Nothing).expect("placed");
        }
        assert_eq!(open(), before);
    }
    folder.applier.sync_dirs().expect("synced");
    assert_eq!(folder.read("d/19/49"), "49");
}

#[test]
fn a_kept_version_is_restored_and_copied_out() {
    let folder = Folder::new();
    let old = folder.write("f", "old");
    let kept = folder.applier.remove(&tree("f"), &old).expect("removed").expect("kept");
    let restored = folder.applier.restore(&kept.name, &tree("g"), Expected::Nothing).expect("restored");
    assert_eq!((folder.read("g").as_str(), restored.stat.mtime, restored.stat.mode), ("old", old.mtime, old.mode));
    let refused = folder.applier.restore(&kept.name, &tree("g"), Expected::Nothing);
    assert!(matches!(refused, Err(ApplyError::Changed)));
    assert!(folder.applier.incoming_names().expect("names").is_empty());

    let to = folder.outside.join("copy");
    folder.applier.versions().copy_out(&kept.name, &to).expect("copied");
    assert_eq!(fs::read_to_string(&to).expect("a file"), "old");
    let refused = folder.applier.versions().copy_out(&kept.name, &folder.outside.join("f"));
    assert!(matches!(refused, Err(ApplyError::Changed)));
    assert_eq!(fs::read_to_string(folder.outside.join("f")).expect("a file"), "outside");
    assert_eq!(folder.kept(), ["old"], "it stays kept");
}

#[test]
fn a_full_disk_leaves_no_half_file_and_says_so() {
    let home = tempfile::tempdir().expect("a directory");
    let Some(_mount) = Mount::new(home.path(), "size=4m") else { return };
    let folder = Folder::in_home(home);
    let applier = &folder.applier;
    let old = folder.write("f", "old");
    applier.room(1 << 20).expect("room");
    assert!(matches!(applier.room(4 << 20), Err(ApplyError::DiskFull)));
    assert!(matches!(applier.room(u64::MAX), Err(ApplyError::DiskFull)));
    let waiting = folder.ready("new");
    let incoming = applier.receive(8 << 20).expect("a hole takes no room");
    let mib = vec![1; 1 << 20];
    let written = (0..8u64).try_for_each(|n| incoming.write_at(n << 20, &mib));
    assert!(matches!(written, Err(ApplyError::DiskFull)), "{written:?}");
    assert!(matches!(applier.room(0), Err(ApplyError::DiskFull)), "one part in a hundred stays free");
    incoming.discard().expect("removed");
    applier.room(0).expect("room again");
    folder.write("big", &"x".repeat(3 << 20));
    let incoming = applier.receive(3 << 20).expect("a hole");
    let copied = incoming.copy_from(&tree("big"), 0, 3 << 20, 0);
    assert!(matches!(copied, Err(ApplyError::DiskFull)), "{copied:?}");
    incoming.discard().expect("removed");
    applier.place(&waiting, &tree("f"), Expected::This(old)).expect("placed: a move takes no room");
    assert_eq!((folder.read("f").as_str(), folder.kept()), ("new", vec!["old".to_owned()]));
}

#[test]
fn another_file_system_inside_the_folder_is_named() {
    for folder in Folder::both() {
        fs::create_dir(folder.at("disk")).expect("a directory");
        let Some(_mount) = Mount::new(&folder.at("disk"), "size=1m") else { return };
        let old = folder.write("disk/f", "old");
        let ready = folder.ready("new");
        for result in [
            folder.applier.place(&ready, &tree("disk/g"), Expected::Nothing).map(drop),
            folder.applier.place(&ready, &tree("disk/f"), Expected::This(old)).map(drop),
            folder.applier.remove(&tree("disk/f"), &old).map(drop),
            folder.applier.rename(&tree("disk/f"), &old, &tree("f")).map(drop),
        ] {
            assert!(matches!(result, Err(ApplyError::Unsupported(_))), "{result:?}");
        }
        assert_eq!((folder.read("disk/f").as_str(), folder.is_there("disk/g")), ("old", false));
        folder.applier.place(&ready, &tree("here"), Expected::Nothing).expect("the file still waits");
    }
}

#[test]
fn a_read_only_disk_and_a_read_only_directory_are_told_apart() {
    let home = tempfile::tempdir().expect("a directory");
    if let Some(mount) = Mount::new(home.path(), "size=1m") {
        let folder = Folder::in_home(home);
        let old = folder.write("f", "old");
        let ready = folder.ready("new");
        mount.make_read_only();
        assert!(matches!(folder.applier.receive(1), Err(ApplyError::ReadOnly)));
        for expected in [Expected::Nothing, Expected::This(old)] {
            let path = if expected == Expected::Nothing { tree("g") } else { tree("f") };
            assert!(matches!(folder.applier.place(&ready, &path, expected), Err(ApplyError::ReadOnly)));
        }
        assert!(matches!(folder.applier.make_dir(&tree("d"), 0o755), Err(ApplyError::ReadOnly)));
    }
    if is_root() {
        eprintln!("skipped in part: root may write everywhere");
        return;
    }
    let folder = Folder::new();
    folder.applier.make_dir(&tree("d"), 0o555).expect("made");
    let ready = folder.ready("new");
    let refused = folder.applier.place(&ready, &tree("d/f"), Expected::Nothing);
    assert!(matches!(refused, Err(ApplyError::Denied)), "{refused:?}");
    folder.applier.set_meta(&tree("d"), &folder.stat("d"), 0o755, None).expect("set");
    folder.applier.place(&ready, &tree("d/f"), Expected::Nothing).expect("placed");
}
