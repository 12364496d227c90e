//! Files that are there whole or not at all, and that only their owner may read.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// A file written beside its place, durable, and not yet in it.
#[derive(Debug)]
#[must_use = "a staged file has no effect until it is published"]
pub(crate) struct Staged {
    beside: PathBuf,
    target: PathBuf,
}

/// Name of the file beside `target` that holds what will replace it.
pub(super) fn staging_path(target: &Path) -> PathBuf {
    target.with_added_extension("new")
}

/// Writes `bytes` beside `target`, readable by the owner only, and waits until they are durable.
pub(crate) fn stage(target: &Path, bytes: &[u8]) -> io::Result<Staged> {
    let beside = staging_path(target);
    remove_if_there(&beside)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    sync_dir_of(&beside)?;
    Ok(Staged { beside, target: target.to_owned() })
}

impl Staged {
    /// Where the file lies now.
    pub(crate) fn path(&self) -> &Path {
        &self.beside
    }

    /// Removes the file; what stays behind where that fails is replaced by the next one.
    pub(crate) fn discard(self) {
        let _ = fs::remove_file(&self.beside);
    }

    /// Puts the file in its place and waits until that is durable.
    pub(crate) fn publish(self) -> io::Result<()> {
        fs::rename(&self.beside, &self.target)?;
        sync_dir_of(&self.target)
    }
}

/// Writes a whole file, readable by the owner only, or leaves what was there.
pub(super) fn write_private(target: &Path, bytes: &[u8]) -> io::Result<()> {
    stage(target, bytes)?.publish()
}

/// Reads a file of at most `max` bytes; a longer one is [`io::ErrorKind::FileTooLarge`].
pub(crate) fn read_bounded(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Makes `dir` and what is missing above it, and shuts it to everyone but its owner.
pub(super) fn make_private_dir(dir: &Path) -> io::Result<()> {
    make_missing(dir)?;
    #[cfg(unix)]
    fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    Ok(())
}

fn make_missing(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make_missing(parent)?;
    }
    #[cfg_attr(not(unix), expect(unused_mut, reason = "only Unix has modes to set"))]
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match builder.create(dir) {
        // another process made it in between
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_dir_of(dir),
    }
}

/// Removes a file; one that is not there is removed already.
pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes the name of `path` durable; Windows does that with the rename itself.
fn sync_dir_of(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_staged_file_changes_nothing_until_it_is_published() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = dir.path().join("home.toml");
        write_private(&target, b"old").expect("written");

        let staged = stage(&target, b"new").expect("staged");
        assert_eq!(fs::read(&target).expect("read"), b"old");
        assert_eq!(fs::read(staging_path(&target)).expect("read"), b"new");

        staged.publish().expect("published");
        assert_eq!(fs::read(&target).expect("read"), b"new");
        assert!(!staging_path(&target).exists());
    }

    #[test]
    fn a_file_is_read_up_to_its_bound_and_not_beyond() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        fs::write(&path, b"12345").expect("written");

        assert_eq!(read_bounded(&path, 5).expect("read"), b"12345");
        assert_eq!(read_bounded(&path, 4).expect_err("too long").kind(), io::ErrorKind::FileTooLarge);
    }

    #[cfg(unix)]
    #[test]
    fn files_and_directories_are_shut_to_others() {
        use std::os::unix::fs::PermissionsExt as _;

        let dir = tempfile::tempdir().expect("a directory");
        let home = dir.path().join("a/b/home");
        make_private_dir(&home).expect("made");
        let file = home.join("key");
        write_private(&file, b"secret").expect("written");

        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&home), 0o700);
        assert_eq!(mode(&dir.path().join("a")), 0o700);
        assert_eq!(mode(&file), 0o600);

        fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).expect("set");
        make_private_dir(&home).expect("made again");
        assert_eq!(mode(&home), 0o700);
    }
}
