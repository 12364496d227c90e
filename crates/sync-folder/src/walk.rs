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
    let looked = root.open_parent(path).map_err(Problem::from).and_then(|parent| look(&parent, path.name().as_ref()));
    match looked {
        Err(Problem::Io(error)) if is_absent(&error) => Ok(None),
        other => other.map(Some),
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
