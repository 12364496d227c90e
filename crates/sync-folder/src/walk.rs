//! Walks a folder: what is at every path, in the order of the index, without following anything.

use std::ffi::OsStr;
use std::io;
use std::ops::ControlFlow;

use cap_std::fs::Dir;
use sync_types::folder::{OWN_DIR, PathError, TreePath};

use crate::ignored::Ignored;
use crate::root::{Root, RootError, is_absent};

/// Permission bits of a file and of a directory where the system knows none.
#[cfg(not(unix))]
const NO_BITS: (u32, u32) = (0o644, 0o755);

/// What is at a path; there is no other kind, for everything else is a [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, which is never followed.
    Symlink,
}

/// What the file system says about a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stat {
    /// What it is.
    pub kind: Kind,
    /// Bytes of a file, bytes of the text of a link, 0 for a directory.
    pub size: u64,
    /// When its content was changed, Unix nanoseconds.
    pub mtime: i64,
    /// The number of its inode.
    pub ino: u64,
    /// Unix permission bits, at most 0o777; 0 for a link. Without such bits 0o644 for a file and 0o755 for a directory.
    pub mode: u32,
}

impl Stat {
    /// Whether nothing shows that the content is another: kind, size, time and inode are equal.
    #[must_use]
    pub fn is_unchanged(&self, other: &Self) -> bool {
        Self { mode: 0, ..*self } == Self { mode: 0, ..*other }
    }
}

/// One thing a walk came by.
#[derive(Debug)]
#[non_exhaustive]
pub enum Found {
    /// Something that can be synced.
    Entry {
        /// Where.
        path: TreePath,
        /// What.
        stat: Stat,
        /// The text of a symbolic link.
        target: Option<String>,
    },
    /// Something that cannot be synced, or whose content cannot be seen.
    Problem {
        /// Where, for people: what is no UTF-8 is replaced.
        path: String,
        /// Where, if a record could name it. What is there and below it is unknown, which is not the same as deleted.
        at: Option<TreePath>,
        /// What is wrong.
        problem: Problem,
    },
}

/// Why something cannot be synced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Its name is no text.
    #[error("its name is not UTF-8; rename it to sync it")]
    NotUtf8,
    /// No record can name it.
    #[error("{0}; rename it to sync it")]
    Name(PathError),
    /// The text of a symbolic link is no text.
    #[error("the link's target is not UTF-8; replace the link to sync it")]
    TargetNotUtf8,
    /// A socket, a pipe or a device, which is never opened.
    #[error("it is neither a file, a directory nor a symbolic link, and is not synced")]
    Special,
    /// We may not read it.
    #[error("permission denied; allow reading it to sync it")]
    Unreadable,
    /// The system failed.
    #[error("cannot read it: {0}")]
    Io(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied => Self::Unreadable,
            _ => Self::Io(error),
        }
    }
}

/// Reports everything in a folder, or one path and everything below it, until told to stop.
///
/// It goes depth first and takes each directory's names in byte order, so that the keys of the paths ascend
/// ([`TreePath::key`]) and a directory comes before what is in it. What is ignored is neither reported nor looked into.
/// A path that is not reported is gone only if this returns `Ok`, nothing was ignored at it, and no problem was reported
/// at it or above: an error says that the root, or all of it, could not be seen.
pub fn walk(
    root: &Root,
    below: Option<&TreePath>,
    ignored: &Ignored,
    found: &mut dyn FnMut(Found) -> ControlFlow<()>,
) -> Result<(), RootError> {
    root.check()?;
    let mut walk = Walk { ignored, found };
    let flow = match below {
        None => {
            let dir = root.open_dir(None)?;
            let names = sys::names(&dir)?;
            walk.names(&dir, None, &names)
        }
        Some(path) => match root.open_parent(path) {
            Ok(_) if path.parent().is_some_and(|parent| ignored.matches(&parent, true)) => ControlFlow::Continue(()),
            Ok(parent) => walk.entry(&parent, path.name().as_ref(), path.clone()),
            Err(error) => walk.failed(path.clone(), error),
        },
    };
    if flow.is_continue() {
        // a disk that was unmounted meanwhile took the rest of the tree with it
        root.check()?;
    }
    Ok(())
}

/// What is at a path, and the text of it if it is a symbolic link; nothing if it lies behind a link or a file.
pub fn stat(root: &Root, path: &TreePath) -> Result<Option<(Stat, Option<String>)>, Problem> {
    Looks::new(root).stat(path)
}

/// Looks at many paths, one after the other; those of one directory next to each other cost the least.
#[derive(Debug)]
pub struct Looks<'a> {
    root: &'a Root,
    /// The directory looked into last. For a look it does not matter where it is by now.
    last: Option<(Option<TreePath>, Dir)>,
}

impl<'a> Looks<'a> {
    /// Looks into a folder.
    #[must_use]
    pub fn new(root: &'a Root) -> Self {
        Self { root, last: None }
    }

    /// What is at a path, as [`stat`] says it.
    pub fn stat(&mut self, path: &TreePath) -> Result<Option<(Stat, Option<String>)>, Problem> {
        let above = path.parent();
        if self.last.as_ref().is_none_or(|(last, _)| *last != above) {
            self.last = None;
            match self.root.open_dir(above.as_ref()) {
                Ok(dir) => self.last = Some((above, dir)),
                Err(error) if is_absent(&error) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        let Some((_, dir)) = &self.last else { return Ok(None) };
        match look(dir, path.name().as_ref()) {
            Err(Problem::Io(error)) if is_absent(&error) => Ok(None),
            other => other.map(Some),
        }
    }
}

/// What an open file is; none if it is special.
pub(crate) fn stat_of(file: &std::fs::File) -> io::Result<Option<Stat>> {
    sys::stat_of(file)
}

struct Walk<'a> {
    ignored: &'a Ignored,
    found: &'a mut dyn FnMut(Found) -> ControlFlow<()>,
}

impl Walk<'_> {
    fn names(&mut self, dir: &Dir, at: Option<&TreePath>, names: &sys::Names) -> ControlFlow<()> {
        for name in names.iter() {
            let Some(text) = name.to_str() else {
                self.unnamed(at, name, Problem::NotUtf8)?;
                continue;
            };
            if at.is_none() && text == OWN_DIR {
                continue;
            }
            match at.map_or_else(|| TreePath::new(text), |at| at.join(text)) {
                Ok(path) => self.entry(dir, name, path)?,
                Err(error) => self.unnamed(at, name, Problem::Name(error))?,
            }
        }
        ControlFlow::Continue(())
    }

    fn entry(&mut self, dir: &Dir, name: &OsStr, path: TreePath) -> ControlFlow<()> {
        let (stat, target) = match look(dir, name) {
            Ok(looked) => looked,
            Err(Problem::Io(error)) => return self.failed(path, error),
            Err(_) if self.ignored.matches_itself(&path, false) => return ControlFlow::Continue(()),
            Err(problem) => return self.problem(path, problem),
        };
        if self.ignored.matches_itself(&path, stat.kind == Kind::Directory) {
            return ControlFlow::Continue(());
        }
        if stat.kind != Kind::Directory {
            return (self.found)(Found::Entry { path, stat, target });
        }
        (self.found)(Found::Entry { path: path.clone(), stat, target })?;
        let inside = sys::open_dir(dir, name).and_then(|inside| Ok((sys::names(&inside)?, inside)));
        match inside {
            Ok((names, inside)) => self.names(&inside, Some(&path), &names),
            Err(error) => self.failed(path, error),
        }
    }

    fn failed(&mut self, path: TreePath, error: io::Error) -> ControlFlow<()> {
        // what was removed while we looked is simply not there
        if is_absent(&error) { ControlFlow::Continue(()) } else { self.problem(path, error.into()) }
    }

    fn problem(&mut self, path: TreePath, problem: Problem) -> ControlFlow<()> {
        (self.found)(Found::Problem { path: path.as_str().to_owned(), at: Some(path), problem })
    }

    fn unnamed(&mut self, dir: Option<&TreePath>, name: &OsStr, problem: Problem) -> ControlFlow<()> {
        let name = name.to_string_lossy();
        let path = dir.map_or_else(|| name.to_string(), |dir| format!("{dir}/{name}"));
        (self.found)(Found::Problem { path, at: None, problem })
    }
}

fn look(dir: &Dir, name: &OsStr) -> Result<(Stat, Option<String>), Problem> {
    let stat = sys::stat(dir, name)?.ok_or(Problem::Special)?;
    let target = match stat.kind {
        Kind::Symlink => Some(sys::target(dir, name)?.ok_or(Problem::TargetNotUtf8)?),
        Kind::File | Kind::Directory => None,
    };
    Ok((stat, target))
}

#[cfg(unix)]
mod sys {
    use std::ffi::OsStr;
    use std::fs::File;
    use std::io;
    use std::ops::Range;
    use std::os::unix::ffi::OsStrExt;

    use cap_std::fs::Dir;
    use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, openat, readlinkat, statat};

    use super::{Kind, Stat};

    /// The names in a directory, sorted; in one buffer, for there may be a million.
    pub(super) struct Names {
        bytes: Vec<u8>,
        ranges: Vec<Range<usize>>,
    }

    impl Names {
        pub(super) fn iter(&self) -> impl Iterator<Item = &OsStr> {
            self.ranges.iter().map(|range| OsStr::from_bytes(&self.bytes[range.clone()]))
        }
    }

    pub(super) fn names(dir: &Dir) -> io::Result<Names> {
        let mut names = Names { bytes: Vec::new(), ranges: Vec::new() };
        for entry in rustix::fs::Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                let start = names.bytes.len();
                names.bytes.extend_from_slice(name);
                names.ranges.push(start..names.bytes.len());
            }
        }
        let bytes = &names.bytes;
        names.ranges.sort_unstable_by(|a, b| bytes[a.clone()].cmp(&bytes[b.clone()]));
        Ok(names)
    }

    pub(super) fn stat(dir: &Dir, name: &OsStr) -> io::Result<Option<Stat>> {
        Ok(convert(&statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?))
    }

    pub(super) fn stat_of(file: &File) -> io::Result<Option<Stat>> {
        Ok(convert(&fstat(file)?))
    }

    pub(super) fn target(dir: &Dir, name: &OsStr) -> io::Result<Option<String>> {
        Ok(readlinkat(dir, name, Vec::new())?.into_string().ok())
    }

    pub(super) fn open_dir(dir: &Dir, name: &OsStr) -> io::Result<Dir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(dir, name, flags, Mode::empty())?.into())
    }

    fn convert(stat: &rustix::fs::Stat) -> Option<Stat> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            _ => return None,
        };
        // wide enough for what any system keeps in these fields
        let bits = u64::from(Mode::from_raw_mode(stat.st_mode).bits()) & 0o777;
        let mtime = i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec);
        Some(Stat {
            kind,
            size: if kind == Kind::Directory { 0 } else { stat.st_size.try_into().unwrap_or(0) },
            mtime: mtime.try_into().unwrap_or(if mtime < 0 { i64::MIN } else { i64::MAX }),
            ino: stat.st_ino,
            mode: if kind == Kind::Symlink { 0 } else { bits.try_into().unwrap_or(0) },
        })
    }
}

#[cfg(not(unix))]
mod sys {
    use std::ffi::{OsStr, OsString};
    use std::fs::File;
    use std::io;
    use std::time::{SystemTime, UNIX_EPOCH};

    use cap_fs_ext::{DirExt, MetadataExt};
    use cap_std::fs::{Dir, Metadata};

    use super::{Kind, NO_BITS, Stat};

    /// The names in a directory, sorted as their UTF-8 is.
    pub(super) struct Names(Vec<OsString>);

    impl Names {
        pub(super) fn iter(&self) -> impl Iterator<Item = &OsStr> {
            self.0.iter().map(OsString::as_os_str)
        }
    }

    pub(super) fn names(dir: &Dir) -> io::Result<Names> {
        let mut names = dir.entries()?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable_by(|a, b| a.as_encoded_bytes().cmp(b.as_encoded_bytes()));
        Ok(Names(names))
    }

    pub(super) fn stat(dir: &Dir, name: &OsStr) -> io::Result<Option<Stat>> {
        Ok(convert(&dir.symlink_metadata(name)?))
    }

    pub(super) fn stat_of(file: &File) -> io::Result<Option<Stat>> {
        Ok(convert(&Metadata::from_file(file)?))
    }

    pub(super) fn target(dir: &Dir, name: &OsStr) -> io::Result<Option<String>> {
        Ok(dir.read_link_contents(name)?.into_os_string().into_string().ok())
    }

    pub(super) fn open_dir(dir: &Dir, name: &OsStr) -> io::Result<Dir> {
        dir.open_dir_nofollow(name)
    }

    fn convert(metadata: &Metadata) -> Option<Stat> {
        let kind = match metadata.file_type() {
            link if link.is_symlink() => Kind::Symlink,
            dir if dir.is_dir() => Kind::Directory,
            file if file.is_file() => Kind::File,
            _ => return None,
        };
        Some(Stat {
            kind,
            size: if kind == Kind::Directory { 0 } else { metadata.len() },
            mtime: metadata.modified().map_or(0, |time| nanoseconds(time.into_std())),
            ino: metadata.ino(),
            mode: match kind {
                Kind::File => NO_BITS.0,
                Kind::Directory => NO_BITS.1,
                Kind::Symlink => 0,
            },
        })
    }

    fn nanoseconds(time: SystemTime) -> i64 {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_nanos().try_into().unwrap_or(i64::MAX),
            Err(before) => before.duration().as_nanos().try_into().map_or(i64::MIN, |before: i64| -before),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sync_types::FolderId;
    use tempfile::TempDir;

    use super::*;

    fn root() -> (TempDir, Root) {
        let temp = tempfile::tempdir().expect("a directory");
        let root = Root::create(&temp.path().join("root"), &FolderId([7; 16])).expect("a root");
        (temp, root)
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    fn write(root: &Root, path: &str) {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, "content").expect("written");
    }

    /// The paths, with a slash behind directories and an arrow behind links; problems as they are told.
    fn all(root: &Root, below: Option<&str>, patterns: &str) -> Vec<String> {
        let ignored = Ignored::parse(patterns.as_bytes()).expect("patterns");
        let mut all = Vec::new();
        walk(root, below.map(path).as_ref(), &ignored, &mut |found| {
            all.push(match found {
                Found::Entry { path, stat, target: Some(target) } if stat.kind == Kind::Symlink => {
                    format!("{path} -> {target}")
                }
                Found::Entry { path, stat, target: None } if stat.kind == Kind::Directory => format!("{path}/"),
                Found::Entry { path, .. } => path.to_string(),
                Found::Problem { path, at: Some(at), problem } => {
                    assert_eq!(path, at.as_str());
                    format!("{path}: {problem}")
                }
                Found::Problem { path, at: None, problem } => format!("({path}): {problem}"),
            });
            ControlFlow::Continue(())
        })
        .expect("walked");
        all
    }

    #[test]
    fn a_walk_goes_in_the_order_of_the_keys() {
        let (_temp, root) = root();
        for file in ["a/b", "a.txt", "a b", "a/b.d/c", "a/b d", "b/.syncshell/x", "Z", "ä"] {
            write(&root, file);
        }
        fs::create_dir(root.path().join("empty")).expect("made");
        let found = all(&root, None, "");
        let expected = [
            "Z",
            "a/",
            "a/b",
            "a/b d",
            "a/b.d/",
            "a/b.d/c",
            "a b",
            "a.txt",
            "b/",
            "b/.syncshell/",
            "b/.syncshell/x",
            "empty/",
            "ä",
        ];
        assert_eq!(found, expected);
        assert!(found.iter().map(|found| path(found.trim_end_matches('/')).key()).is_sorted());
    }

    #[test]
    fn a_walk_below_a_path_begins_with_it() {
        let (_temp, root) = root();
        for file in ["a/b/c", "a/b.txt", "ab"] {
            write(&root, file);
        }
        assert_eq!(all(&root, Some("a"), ""), ["a/", "a/b/", "a/b/c", "a/b.txt"]);
        assert_eq!(all(&root, Some("a/b/c"), ""), ["a/b/c"]);
        assert_eq!(all(&root, Some("a/none"), ""), [""; 0]);
        assert_eq!(all(&root, Some("ab/none"), ""), [""; 0]);
        assert_eq!(all(&root, Some("a/b"), "/a/"), [""; 0]);
        assert_eq!(all(&root, Some("a"), "/a/"), [""; 0]);
    }

    #[test]
    fn what_is_ignored_is_not_looked_into() {
        let (_temp, root) = root();
        for file in ["target/debug/x", "src/target", "src/x.o", "keep.o", ".syncshellignore"] {
            write(&root, file);
        }
        let found = all(&root, None, "target/\n*.o\n!keep.o\n");
        assert_eq!(found, [".syncshellignore", "keep.o", "src/", "src/target"]);
    }

    #[test]
    fn a_walk_stops_when_it_is_told() {
        let (_temp, root) = root();
        (0..10).for_each(|n| write(&root, &format!("d/{n}")));
        let mut found = 0;
        let mut three = |_| {
            found += 1;
            if found == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        walk(&root, None, &Ignored::default(), &mut three).expect("walked");
        assert_eq!(found, 3);
    }

    #[test]
    fn a_root_that_vanishes_is_no_empty_folder() {
        let (temp, root) = root();
        write(&root, "file");
        let away = temp.path().join("away");
        let mut entries = 0;
        let walked = walk(&root, None, &Ignored::default(), &mut |_| {
            entries += 1;
            fs::rename(root.path(), &away).expect("moved");
            ControlFlow::Continue(())
        });
        assert!(matches!(walked, Err(RootError::Missing)) && entries == 1);
        fs::create_dir(root.path()).expect("made");
        let walked = walk(&root, None, &Ignored::default(), &mut |_| panic!("nothing is there"));
        assert!(matches!(walked, Err(RootError::Replaced)));
        fs::remove_dir(root.path()).expect("removed");
        fs::rename(&away, root.path()).expect("moved back");
        fs::remove_dir_all(root.path().join(".syncshell")).expect("removed");
        let walked = walk(&root, None, &Ignored::default(), &mut |_| panic!("it is not the folder"));
        assert!(matches!(walked, Err(RootError::NotMarked)));
    }

    #[cfg(unix)]
    mod unix {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::fs::{PermissionsExt, symlink};
        use std::os::unix::net::UnixListener;

        use rustix::fs::{CWD, FileType, Mode, mknodat};

        use super::*;

        #[test]
        fn a_symbolic_link_is_reported_and_not_followed() {
            let (temp, root) = root();
            fs::create_dir(temp.path().join("outside")).expect("made");
            fs::write(temp.path().join("outside/secret"), "").expect("written");
            write(&root, "dir/file");
            for (link, target) in [("dir/loop", "."), ("in", "dir"), ("nowhere", "none"), ("out", "../outside")] {
                symlink(target, root.path().join(link)).expect("linked");
            }
            let expected = ["dir/", "dir/file", "dir/loop -> .", "in -> dir", "nowhere -> none", "out -> ../outside"];
            assert_eq!(all(&root, None, ""), expected);
            assert_eq!(all(&root, Some("out"), ""), ["out -> ../outside"]);
            assert_eq!(all(&root, Some("out/secret"), ""), [""; 0]);

            for behind in ["out/secret", "in/file", "dir/file/x", "none"] {
                assert!(stat(&root, &path(behind)).expect("looked").is_none(), "{behind}");
            }
            let (link, target) = stat(&root, &path("out")).expect("looked").expect("a link");
            assert_eq!((link.kind, link.mode, link.size), (Kind::Symlink, 0, 10));
            assert_eq!(target.as_deref(), Some("../outside"));
        }

        #[test]
        fn a_stat_says_what_the_system_says() {
            let (_temp, root) = root();
            write(&root, "dir/file");
            let file = fs::File::open(root.path().join("dir/file")).expect("opened");
            file.set_permissions(fs::Permissions::from_mode(0o4750)).expect("set");
            let before_1970 = std::time::UNIX_EPOCH - std::time::Duration::from_nanos(1_500_000_007);
            file.set_modified(before_1970).expect("set");
            let (stat, target) = stat(&root, &path("dir/file")).expect("looked").expect("a file");
            assert_eq!((stat.kind, stat.size, stat.mtime, stat.mode), (Kind::File, 7, -1_500_000_007, 0o750));
            assert_eq!(target, None);
            assert_eq!(stat_of(&file).expect("looked"), Some(stat));
            let (dir, _) = super::stat(&root, &path("dir")).expect("looked").expect("a directory");
            assert_eq!((dir.kind, dir.size), (Kind::Directory, 0));
        }

        #[test]
        fn pipes_and_sockets_are_reported_and_not_opened() {
            let (_temp, root) = root();
            mknodat(CWD, root.path().join("pipe"), FileType::Fifo, Mode::RUSR, 0).expect("made");
            let _socket = UnixListener::bind(root.path().join("socket")).expect("bound");
            let special = Problem::Special;
            assert_eq!(all(&root, None, ""), [format!("pipe: {special}"), format!("socket: {special}")]);
            assert_eq!(all(&root, None, "pipe\nsock*"), [""; 0]);
            assert!(matches!(stat(&root, &path("pipe")), Err(Problem::Special)));
        }

        #[test]
        fn names_that_no_record_holds_are_reported() {
            let (_temp, root) = root();
            write(&root, "dir/x");
            let odd = root.path().join("dir").join(OsStr::from_bytes(b"caf\xe9"));
            fs::create_dir(&odd).expect("made");
            fs::write(odd.join("below"), "").expect("written");
            symlink(OsStr::from_bytes(b"\xff"), root.path().join("dir/y")).expect("linked");
            let expected = [
                "dir/".to_owned(),
                format!("(dir/caf\u{fffd}): {}", Problem::NotUtf8),
                "dir/x".to_owned(),
                format!("dir/y: {}", Problem::TargetNotUtf8),
            ];
            assert_eq!(all(&root, None, ""), expected);
        }

        #[test]
        fn paths_that_are_too_long_are_reported() {
            let (_temp, root) = root();
            let descend = |name: &str, times: usize| {
                (0..times).fold(root.dir().try_clone().expect("cloned"), |dir, _| {
                    dir.create_dir(name).expect("made");
                    dir.open_dir(name).expect("opened")
                })
            };
            descend(&"x".repeat(250), 20).write("file", "").expect("written");
            descend("deep", 300).write("file", "").expect("written");
            let found = all(&root, None, "");
            let [deep @ .., last_deep] = &found[..257] else { panic!("{}", found.len()) };
            assert!(deep.iter().all(|path| path.starts_with("deep/") && path.ends_with('/')));
            assert!(last_deep.starts_with("(deep/") && last_deep.contains("too long"), "{last_deep}");
            let [long @ .., last_long] = &found[257..] else { panic!("{}", found.len()) };
            assert_eq!(long.len(), 16);
            assert!(last_long.starts_with("(xxx") && last_long.contains("too long"), "{last_long}");
        }

        #[test]
        fn an_unreadable_directory_is_not_empty() {
            if rustix::process::geteuid().is_root() {
                // who may read everything cannot be refused
                return;
            }
            let (_temp, root) = root();
            for file in ["a/x", "b/x", "c"] {
                write(&root, file);
            }
            let set = |name: &str, mode| {
                fs::set_permissions(root.path().join(name), fs::Permissions::from_mode(mode)).expect("set");
            };
            let refused = Problem::Unreadable;
            set("a", 0o000);
            set("b", 0o400);
            let found = all(&root, None, "");
            let below = all(&root, Some("a/x"), "");
            let looked = stat(&root, &path("a/x"));
            set("a", 0o700);
            set("b", 0o700);
            assert_eq!(found, ["a/", &format!("a: {refused}"), "b/", &format!("b: {refused}"), "c"]);
            assert_eq!(below, [format!("a/x: {refused}")]);
            assert!(matches!(looked, Err(Problem::Unreadable)));
        }
    }
}
