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

/// Bytes free for us and bytes in all of the file system that a directory lies in, where the system tells.
#[must_use]
pub fn free_space(directory: &Path) -> Option<(u64, u64)> {
    sys::free_space(&Dir::open_ambient_dir(directory, ambient_authority()).ok()?)
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

#[cfg(test)]
mod tests {
    use super::*;

    const FOLDER: FolderId = FolderId([7; 16]);

    fn tree_path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    #[test]
    fn a_root_is_opened_only_with_its_marker() {
        let temp = tempfile::tempdir().expect("a directory");
        let path = temp.path().join("new/folder");
        assert!(matches!(Root::open(&path, &FOLDER), Err(RootError::Missing)));
        drop(Root::create(&path, &FOLDER).expect("a root"));
        drop(Root::open(&path, &FOLDER).expect("the root"));
        assert_eq!(std::fs::read_to_string(path.join(".syncshell/folder")).expect("marker"), format!("{FOLDER}\n"));

        let other = FolderId([8; 16]);
        assert!(matches!(Root::open(&path, &other), Err(RootError::OtherFolder { found: FOLDER })));
        assert!(matches!(Root::create(&path, &other), Err(RootError::OtherFolder { found: FOLDER })));
        drop(Root::create(&path, &FOLDER).expect("made again, it is the same"));

        std::fs::write(path.join(".syncshell/folder"), "what").expect("written");
        assert!(matches!(Root::open(&path, &FOLDER), Err(RootError::NotMarked)));
        std::fs::remove_dir_all(path.join(".syncshell")).expect("removed");
        assert!(matches!(Root::open(&path, &FOLDER), Err(RootError::NotMarked)));
        std::fs::write(path.join(".syncshell"), "").expect("written");
        assert!(matches!(Root::open(&path, &FOLDER), Err(RootError::NotMarked)));

        let file = temp.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert!(matches!(Root::open(&file, &FOLDER), Err(RootError::NotADirectory)));
        assert!(matches!(Root::create(&file, &FOLDER), Err(RootError::NotADirectory)));
        assert!(matches!(Root::create(&file.join("below"), &FOLDER), Err(RootError::NotADirectory)));
    }

    #[cfg(unix)]
    #[test]
    fn a_marker_behind_a_symbolic_link_does_not_count() {
        let temp = tempfile::tempdir().expect("a directory");
        drop(Root::create(&temp.path().join("one"), &FOLDER).expect("a root"));
        let two = temp.path().join("two");
        std::fs::create_dir(&two).expect("made");
        std::os::unix::fs::symlink("../one/.syncshell", two.join(".syncshell")).expect("linked");
        assert!(matches!(Root::open(&two, &FOLDER), Err(RootError::NotMarked)));
        assert!(Root::create(&two, &FOLDER).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn nobody_else_looks_into_our_directory() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().expect("a directory");
        std::fs::write(temp.path().join("kept"), "content").expect("written");
        drop(Root::create(temp.path(), &FOLDER).expect("a root"));
        for name in ["", "tmp", "versions"] {
            let metadata = temp.path().join(".syncshell").join(name).metadata().expect("made");
            assert_eq!(metadata.permissions().mode() & 0o777, 0o700, "{name}");
        }
        assert_eq!(std::fs::read(temp.path().join("kept")).expect("kept"), b"content");
    }

    #[test]
    fn a_root_that_was_replaced_is_noticed() {
        let temp = tempfile::tempdir().expect("a directory");
        let (path, away) = (temp.path().join("folder"), temp.path().join("away"));
        let root = Root::create(&path, &FOLDER).expect("a root");
        root.check().expect("it is there");
        std::fs::rename(&path, &away).expect("moved");
        assert!(matches!(root.check(), Err(RootError::Missing)));
        std::fs::write(&path, "").expect("written");
        assert!(matches!(root.check(), Err(RootError::NotADirectory)));
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("made");
        assert!(matches!(root.check(), Err(RootError::Replaced)));
        drop(Root::create(&path, &FOLDER).expect("another with the same marker"));
        assert!(matches!(root.check(), Err(RootError::Replaced)));
        std::fs::remove_dir_all(&path).expect("removed");
        std::fs::rename(&away, &path).expect("moved back");
        root.check().expect("it is back");
        std::fs::remove_file(path.join(".syncshell/folder")).expect("removed");
        assert!(matches!(root.check(), Err(RootError::NotMarked)));
    }

    #[test]
    fn folders_inside_each_other_overlap() {
        let temp = tempfile::tempdir().expect("a directory");
        let at = |below: &str| temp.path().join(below);
        std::fs::create_dir_all(at("a/b")).expect("made");
        assert!(overlaps(&at("a"), &at("a/b")) && overlaps(&at("a/b"), &at("a")) && overlaps(&at("a"), &at("a")));
        assert!(overlaps(&at("a"), &at("a/new/below")));
        assert!(!overlaps(&at("a"), &at("ab")) && !overlaps(&at("a/b"), &at("a/c")));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("a", at("link")).expect("linked");
            assert!(overlaps(&at("link/new"), &at("a")) && overlaps(&at("a/b"), &at("link")));
        }
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_opened_through_a_symbolic_link() {
        use rustix::fs::OFlags;
        let temp = tempfile::tempdir().expect("a directory");
        let outside = temp.path().join("outside");
        std::fs::create_dir_all(outside.join("in")).expect("made");
        std::fs::write(outside.join("in/file"), "secret").expect("written");
        let root = Root::create(&temp.path().join("root"), &FOLDER).expect("a root");
        std::fs::create_dir_all(root.path().join("real/in")).expect("made");
        std::fs::write(root.path().join("real/in/file"), "mine").expect("written");
        for (link, target) in [("out", "../outside"), ("inside", "real"), ("file", "real/in/file")] {
            std::os::unix::fs::symlink(target, root.path().join(link)).expect("linked");
        }
        for bad in ["out/in/file", "inside/in/file", "file", "real/in/file/below", "real/none"] {
            let path = tree_path(bad);
            let by_call = root.open_file(&path).expect_err(bad);
            let by_steps = sys::open_by_steps(root.dir(), &path, OFlags::RDONLY).expect_err(bad);
            assert!(is_absent(&by_call) && is_absent(&by_steps), "{bad}: {by_call} {by_steps}");
        }
        for bad in ["out", "out/in", "inside", "file", "real/in/file"] {
            assert!(is_absent(&root.open_dir(Some(&tree_path(bad))).expect_err(bad)), "{bad}");
        }
        assert!(is_absent(&root.open_parent(&tree_path("out/in")).expect_err("a link")));
        root.open_parent(&tree_path("out")).expect("the root");
        for good in ["real/in/file", "real/in", "real"] {
            root.open_file(&tree_path(good)).expect(good);
            sys::open_by_steps(root.dir(), &tree_path(good), OFlags::RDONLY).expect(good);
        }
    }

    #[cfg(unix)]
    #[test]
    fn free_space_is_known() {
        let temp = tempfile::tempdir().expect("a directory");
        let root = Root::create(temp.path(), &FOLDER).expect("a root");
        let (free, total) = root.free_space().expect("known");
        assert!(0 < total && free <= total);
    }
}
