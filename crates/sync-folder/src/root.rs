//! The root of a folder: an open directory, and the marker that says which folder it is.
//!
//! A disk that is not mounted leaves an empty directory behind. Only a root that carries the folder's marker is the
//! folder; anything else is an error, and never "everything was deleted".

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, DirBuilder, OpenOptions};
use sync_types::FolderId;
use sync_types::folder::{OWN_DIR, TreePath};

/// The file in [`OWN_DIR`] that holds the folder's id, in hex.
pub const MARKER: &str = "folder";
/// The directory in [`OWN_DIR`] for what is being received.
pub const TMP_DIR: &str = "tmp";
/// The directory in [`OWN_DIR`] for what was replaced or removed.
pub const VERSIONS_DIR: &str = "versions";

/// Bytes of a marker that are read: an id in hex and what an editor may add to it.
const MAX_MARKER: u64 = 64;

/// Why a folder's root cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// Nothing is there.
    #[error("the folder's directory is missing; mount its disk or move it back")]
    Missing,
    /// Something else is there.
    #[error("the folder's directory is a file; move the file away and the directory back")]
    NotADirectory,
    /// No marker is there.
    #[error("the directory does not say that it is this folder; mount its disk, or join the folder again")]
    NotMarked,
    /// The marker names another folder.
    #[error("the directory belongs to folder {found}; choose another directory")]
    OtherFolder {
        /// The folder it belongs to.
        found: FolderId,
    },
    /// Another directory has taken the place of the one that is open.
    #[error("the folder's directory was replaced by another; it is opened again")]
    Replaced,
    /// The system refused.
    #[error("cannot read the folder's directory: {0}")]
    Io(#[from] io::Error),
}

/// The root of a folder, open.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    folder: FolderId,
    dir: Dir,
    own: Dir,
}

impl Root {
    /// Makes a directory a folder's root, the directory too where it is missing; nothing happens to what it holds.
    pub fn create(path: &Path, folder: &FolderId) -> Result<Self, RootError> {
        match std::fs::create_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(RootError::NotADirectory),
            other => other.map_err(of_root)?,
        }
        let dir = open_root(path)?;
        make_private(&dir, OWN_DIR)?;
        let own = open_single_dir(&dir, OWN_DIR).map_err(of_marker)?;
        make_private(&own, TMP_DIR)?;
        make_private(&own, VERSIONS_DIR)?;
        match marker(&own) {
            Ok(found) if found == *folder => {}
            Ok(found) => return Err(RootError::OtherFolder { found }),
            Err(RootError::NotMarked) => write_marker(&dir, &own, folder)?,
            Err(error) => return Err(error),
        }
        Self::open(path, folder)
    }

    /// Opens a folder's root.
    pub fn open(path: &Path, folder: &FolderId) -> Result<Self, RootError> {
        let path = std::path::absolute(path)?;
        let dir = open_root(&path)?;
        let own = open_single_dir(&dir, OWN_DIR).map_err(of_marker)?;
        let root = Self { path, folder: *folder, dir, own };
        root.check_marker(&root.own)?;
        Ok(root)
    }

    /// Whether the path still leads to this directory, and the directory still is this folder.
    pub fn check(&self) -> Result<(), RootError> {
        let there = open_root(&self.path)?;
        if identity(&there)? != identity(&self.dir)? {
            return Err(RootError::Replaced);
        }
        self.check_marker(&open_single_dir(&self.dir, OWN_DIR).map_err(of_marker)?)
    }

    /// The open directory.
    #[must_use]
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// The open directory that the program keeps for itself, [`OWN_DIR`].
    #[must_use]
    pub fn own_dir(&self) -> &Dir {
        &self.own
    }

    /// Where it is, for messages and the watcher.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder it is the root of.
    #[must_use]
    pub fn folder(&self) -> &FolderId {
        &self.folder
    }

    /// Bytes free for us and bytes in all of its file system, where the system tells.
    #[must_use]
    pub fn free_space(&self) -> Option<(u64, u64)> {
        sys::free_space(&self.dir)
    }

    /// Opens a directory below the root, or the root once more, through no symbolic link.
    ///
    /// What is no directory, or lies behind something that is none, is reported as not found.
    pub fn open_dir(&self, path: Option<&TreePath>) -> io::Result<Dir> {
        match path {
            Some(path) => sys::open_dir(&self.dir, path),
            None => sys::reopen(&self.dir),
        }
    }

    /// Opens the directory that a path lies in, through no symbolic link; its last component is left to the caller.
    pub fn open_parent(&self, path: &TreePath) -> io::Result<Dir> {
        self.open_dir(path.parent().as_ref())
    }

    /// Opens a file for reading, through no symbolic link and without waiting for whoever is at a pipe's other end.
    ///
    /// The caller checks what was opened: it may be anything.
    pub(crate) fn open_file(&self, path: &TreePath) -> io::Result<File> {
        sys::open_file(&self.dir, path)
    }

    fn check_marker(&self, own: &Dir) -> Result<(), RootError> {
        match marker(own)? {
            found if found == self.folder => Ok(()),
            found => Err(RootError::OtherFolder { found }),
        }
    }
}

/// Whether one of two directories lies in the other or is the same; what does not exist yet is compared by its nearest
/// ancestor that does.
#[must_use]
pub fn overlaps(a: &Path, b: &Path) -> bool {
    let (a, b) = (canonical(a), canonical(b));
    a.starts_with(&b) || b.starts_with(&a)
}

/// Whether an error says that there is nothing at a path for us, be it that a symbolic link is in the way.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | InvalidFilename) || sys::is_symlink(error)
}

fn canonical(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut missing = Vec::new();
    for ancestor in path.ancestors() {
        if let Ok(mut found) = ancestor.canonicalize() {
            found.extend(missing.iter().rev());
            return found;
        }
        missing.extend(ancestor.file_name());
    }
    path
}

fn open_root(path: &Path) -> Result<Dir, RootError> {
    Dir::open_ambient_dir(path, ambient_authority()).map_err(of_root)
}

fn of_root(error: io::Error) -> RootError {
    match error.kind() {
        io::ErrorKind::NotFound => RootError::Missing,
        io::ErrorKind::NotADirectory => RootError::NotADirectory,
        _ => RootError::Io(error),
    }
}

fn of_marker(error: io::Error) -> RootError {
    if is_absent(&error) { RootError::NotMarked } else { RootError::Io(error) }
}

fn marker(own: &Dir) -> Result<FolderId, RootError> {
    let file = sys::open_single_file(own, MARKER).map_err(of_marker)?;
    if !file.metadata()?.is_file() {
        return Err(RootError::NotMarked);
    }
    let mut text = Vec::new();
    file.take(MAX_MARKER).read_to_end(&mut text)?;
    let id = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    id.ok_or(RootError::NotMarked)
}

/// Writes the marker beside and moves it into place, so that it is whole or missing.
fn write_marker(dir: &Dir, own: &Dir, folder: &FolderId) -> io::Result<()> {
    let new = format!("{TMP_DIR}/{MARKER}");
    let mut file = own.open_with(&new, OpenOptions::new().write(true).create(true).truncate(true))?;
    writeln!(file, "{folder}")?;
    file.sync_all()?;
    own.rename(&new, own, MARKER)?;
    sys::sync_dir(own)?;
    sys::sync_dir(dir)
}

fn make_private(dir: &Dir, name: &str) -> io::Result<()> {
    #[cfg_attr(not(unix), expect(unused_mut, reason = "only Unix has bits to set"))]
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    cap_std::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match dir.create_dir_with(name, &builder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn open_single_dir(dir: &Dir, name: &str) -> io::Result<Dir> {
    sys::open_single_dir(dir, name)
}

fn identity(dir: &Dir) -> io::Result<(i128, u64)> {
    sys::identity(dir)
}

#[cfg(unix)]
mod sys {
    use std::fs::File;
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};

    use cap_std::fs::Dir;
    use rustix::fs::{Mode, OFlags, fstat, fstatvfs, fsync, openat};
    use sync_types::folder::TreePath;

    const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
    // a pipe in the place of a file is opened at once, and no terminal becomes ours
    const FILE: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);
    const ALWAYS: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC);

    pub(super) fn open_dir(root: &Dir, path: &TreePath) -> io::Result<Dir> {
        open(root, path, DIRECTORY).map(Dir::from)
    }

    pub(super) fn open_file(root: &Dir, path: &TreePath) -> io::Result<File> {
        open(root, path, FILE).map(File::from)
    }

    pub(super) fn reopen(dir: &Dir) -> io::Result<Dir> {
        Ok(openat(dir, c".", DIRECTORY | ALWAYS, Mode::empty())?.into())
    }

    pub(super) fn open_single_dir(dir: &Dir, name: &str) -> io::Result<Dir> {
        Ok(openat(dir, name, DIRECTORY | ALWAYS, Mode::empty())?.into())
    }

    pub(super) fn open_single_file(dir: &Dir, name: &str) -> io::Result<File> {
        Ok(openat(dir, name, FILE | ALWAYS, Mode::empty())?.into())
    }

    /// Opens in one call where the kernel can be told to follow nothing, and step by step where it cannot.
    fn open(root: &Dir, path: &TreePath, flags: OFlags) -> io::Result<OwnedFd> {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            use rustix::fs::{ResolveFlags, openat2};
            use rustix::io::Errno;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            match openat2(root, path.as_str(), flags | ALWAYS, Mode::empty(), resolve) {
                // kernels before 5.6, sandboxes that know no such call, and a rename that passed by
                Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
        open_by_steps(root, path, flags)
    }

    pub(super) fn open_by_steps(root: &Dir, path: &TreePath, flags: OFlags) -> io::Result<OwnedFd> {
        let mut dir: Option<OwnedFd> = None;
        for parent in path.parent().iter().flat_map(|parent| parent.components()) {
            dir = Some(openat(
                dir.as_ref().map_or(root.as_fd(), AsFd::as_fd),
                parent,
                DIRECTORY | ALWAYS,
                Mode::empty(),
            )?);
        }
        Ok(openat(dir.as_ref().map_or(root.as_fd(), AsFd::as_fd), path.name(), flags | ALWAYS, Mode::empty())?)
    }

    pub(super) fn identity(dir: &Dir) -> io::Result<(i128, u64)> {
        let stat = fstat(dir)?;
        Ok((i128::from(stat.st_dev), stat.st_ino))
    }

    pub(super) fn free_space(dir: &Dir) -> Option<(u64, u64)> {
        let stat = fstatvfs(dir).ok()?;
        Some((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
    }

    pub(super) fn sync_dir(dir: &Dir) -> io::Result<()> {
        // a directory opened as a mere path cannot be synced, one opened for reading can
        Ok(fsync(reopen(dir)?)?)
    }

    pub(super) fn is_symlink(error: &io::Error) -> bool {
        error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
    }
}

#[cfg(not(unix))]
mod sys {
    use std::fs::File;
    use std::io;

    use cap_fs_ext::{DirExt, FollowSymlinks, MetadataExt, OpenOptionsFollowExt};
    use cap_std::fs::{Dir, OpenOptions};
    use sync_types::folder::TreePath;

    pub(super) fn open_dir(root: &Dir, path: &TreePath) -> io::Result<Dir> {
        path.components().try_fold(root.try_clone()?, |dir, component| dir.open_dir_nofollow(component))
    }

    pub(super) fn open_file(root: &Dir, path: &TreePath) -> io::Result<File> {
        match path.parent() {
            Some(parent) => open_single_file(&open_dir(root, &parent)?, path.name()),
            None => open_single_file(root, path.name()),
        }
    }

    pub(super) fn reopen(dir: &Dir) -> io::Result<Dir> {
        dir.try_clone()
    }

    pub(super) fn open_single_dir(dir: &Dir, name: &str) -> io::Result<Dir> {
        dir.open_dir_nofollow(name)
    }

    pub(super) fn open_single_file(dir: &Dir, name: &str) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).follow(FollowSymlinks::No);
        Ok(dir.open_with(name, &options)?.into_std())
    }

    pub(super) fn identity(dir: &Dir) -> io::Result<(i128, u64)> {
        let metadata = dir.dir_metadata()?;
        Ok((i128::from(metadata.dev()), metadata.ino()))
    }

    pub(super) fn free_space(_dir: &Dir) -> Option<(u64, u64)> {
        None
    }

    pub(super) fn sync_dir(_dir: &Dir) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn is_symlink(error: &io::Error) -> bool {
        // ERROR_STOPPED_ON_SYMLINK
        error.raw_os_error() == Some(681)
    }
}
