//! What differs between systems: opening without following links, moving without replacing, syncing.
//!
//! Every name given here is a single component, every path one that no component leads out of.

use std::fs::File;
use std::io;
use std::time::{Duration, SystemTime};

use cap_std::fs::{Dir, Metadata, OpenOptions};

use super::ApplyError;
use crate::walk::{Kind, Stat, stat_of};

/// Bytes moved at once where the system does not copy by itself.
const COPY_BUFFER: usize = 256 * 1024;

/// What lies at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    /// Nothing.
    Nothing,
    /// A socket, a device or the like: never ours.
    Special,
    /// A file, a directory or a link.
    Entry(Stat),
}

/// Looks at a name without following it.
pub(crate) fn look(dir: &Dir, name: &str) -> Result<There, ApplyError> {
    match dir.symlink_metadata(name) {
        Ok(metadata) => Ok(describe(&metadata).map_or(There::Special, There::Entry)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(There::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn describe(metadata: &Metadata) -> Option<Stat> {
    let kind = match metadata.file_type() {
        link if link.is_symlink() => Kind::Symlink,
        dir if dir.is_dir() => Kind::Directory,
        file if file.is_file() => Kind::File,
        _ => return None,
    };
    let size = if kind == Kind::Directory { 0 } else { metadata.len() };
    let (mtime, ino, mode) = fields(metadata, kind);
    Some(Stat { kind, size, mtime, ino, mode: if kind == Kind::Symlink { 0 } else { mode } })
}

#[cfg(unix)]
fn fields(metadata: &Metadata, _kind: Kind) -> (i64, u64, u32) {
    use cap_std::fs::MetadataExt;
    let mtime = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    (mtime, metadata.ino(), metadata.mode() & 0o777)
}

#[cfg(not(unix))]
fn fields(metadata: &Metadata, kind: Kind) -> (i64, u64, u32) {
    let nanos = |time: SystemTime| match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    };
    let mtime = metadata.modified().map_or(0, |time| nanos(time.into_std()));
    (mtime, cap_fs_ext::MetadataExt::ino(metadata), if kind == Kind::Directory { 0o755 } else { 0o644 })
}

/// Opens a directory below another one, following no link on the way; the empty path is that one itself.
pub(crate) fn open_dir(root: &Dir, path: &str) -> Result<Dir, ApplyError> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
        use rustix::io::Errno;
        let path = if path.is_empty() { "." } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(root, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS) {
            Ok(fd) => return Ok(Dir::from_std_file(File::from(fd))),
            // Older kernels do not have it, and some sandboxes refuse it.
            Err(Errno::NOSYS | Errno::PERM) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    open_dir_by_steps(root, path)
}

/// The same, one component after the other.
pub(crate) fn open_dir_by_steps(root: &Dir, path: &str) -> Result<Dir, ApplyError> {
    let mut dir = root.try_clone()?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        dir = step(&dir, name)?;
    }
    Ok(dir)
}

#[cfg(unix)]
fn step(dir: &Dir, name: &str) -> Result<Dir, ApplyError> {
    use rustix::fs::{Mode, OFlags, openat};
    // To pass through a directory takes no right to list it.
    #[cfg(target_os = "linux")]
    let access = OFlags::PATH;
    #[cfg(not(target_os = "linux"))]
    let access = OFlags::RDONLY;
    match openat(dir, name, access | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok(Dir::from_std_file(File::from(fd))),
        Err(error) => Err(match look(dir, name)? {
            There::Entry(Stat { kind: Kind::Symlink, .. }) => ApplyError::Escape,
            _ => io::Error::from(error).into(),
        }),
    }
}

#[cfg(not(unix))]
fn step(dir: &Dir, name: &str) -> Result<Dir, ApplyError> {
    match cap_fs_ext::DirExt::open_dir_nofollow(dir, name) {
        Ok(dir) => Ok(dir),
        Err(error) => Err(match look(dir, name)? {
            There::Entry(Stat { kind: Kind::Symlink, .. }) => ApplyError::Escape,
            _ => error.into(),
        }),
    }
}

/// Makes a file that is not there yet, for reading and writing, for this user alone.
pub(crate) fn create_file(dir: &Dir, name: &str) -> Result<File, ApplyError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    cap_std::fs::OpenOptionsExt::mode(&mut options, 0o600);
    Ok(dir.open_with(name, &options)?.into_std())
}

/// Opens a regular file, or a directory if that is asked for, never a link or a device.
pub(crate) fn open_entry(dir: &Dir, name: &str, kind: Kind, write: bool) -> Result<File, ApplyError> {
    match look(dir, name)? {
        There::Entry(stat) if stat.kind == kind => {}
        There::Nothing => return Err(ApplyError::Missing),
        _ => return Err(ApplyError::Changed),
    }
    let file = open_unfollowed(dir, name, write)?;
    match stat_of(&file)? {
        Some(stat) if stat.kind == kind => Ok(file),
        _ => Err(ApplyError::Changed),
    }
}

#[cfg(unix)]
fn open_unfollowed(dir: &Dir, name: &str, write: bool) -> Result<File, ApplyError> {
    use rustix::fs::{Mode, OFlags, openat};
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    // Without blocking: a pipe that came in between would wait for a writer.
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(File::from(openat(dir, name, flags, Mode::empty()).map_err(io::Error::from)?))
}

#[cfg(not(unix))]
fn open_unfollowed(dir: &Dir, name: &str, write: bool) -> Result<File, ApplyError> {
    use cap_fs_ext::{FollowSymlinks, OpenOptionsFollowExt};
    let mut options = OpenOptions::new();
    options.read(true).write(write).follow(FollowSymlinks::No);
    Ok(dir.open_with(name, &options)?.into_std())
}

/// Makes a directory that this user can open; its mode is set afterwards.
pub(crate) fn make_dir(dir: &Dir, name: &str, mode: u32) -> io::Result<()> {
    #[cfg(unix)]
    return Ok(rustix::fs::mkdirat(dir, name, bits(mode | 0o700))?);
    #[cfg(not(unix))]
    {
        let _ = mode;
        dir.create_dir(name)
    }
}

/// Makes a symbolic link that holds a text.
pub(crate) fn make_link(dir: &Dir, name: &str, target: &str) -> Result<(), ApplyError> {
    const REFUSED: ApplyError = ApplyError::Unsupported("symbolic links cannot be made here");
    #[cfg(unix)]
    return match rustix::fs::symlinkat(target, dir, name) {
        Ok(()) => Ok(()),
        // File systems without links say so in this way.
        Err(rustix::io::Errno::PERM) => Err(REFUSED),
        Err(error) => Err(io::Error::from(error).into()),
    };
    #[cfg(not(unix))]
    dir.symlink_file(target, name).map_err(|error| match ApplyError::from(error) {
        ApplyError::Denied | ApplyError::Io(_) => REFUSED,
        error => error,
    })
}

/// Renames, and fails where something has the new name already.
///
/// # Errors
/// `Unsupported` or `InvalidInput` where the system cannot do it in one step.
pub(crate) fn rename_new(from: &Dir, old: &str, to: &Dir, new: &str) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    return Ok(rustix::fs::renameat_with(from, old, to, new, rustix::fs::RenameFlags::NOREPLACE)?);
    #[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
    {
        let _ = (from, old, to, new);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Lets two names change places.
///
/// # Errors
/// `Unsupported` or `InvalidInput` where the system cannot do it in one step.
pub(crate) fn exchange(from: &Dir, old: &str, to: &Dir, new: &str) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    return Ok(rustix::fs::renameat_with(from, old, to, new, rustix::fs::RenameFlags::EXCHANGE)?);
    #[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
    {
        let _ = (from, old, to, new);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Whether two names are one entry, as on a file system that ignores case.
pub(crate) fn is_one_entry(from: &Dir, old: &str, to: &Dir, new: &str) -> io::Result<bool> {
    let (one, other) = (from.symlink_metadata(old)?, to.symlink_metadata(new)?);
    #[cfg(unix)]
    {
        use cap_std::fs::MetadataExt;
        // Of a file with two names both would be found, and renaming one to the other does nothing.
        let single = one.is_dir() || one.nlink() == 1;
        Ok(single && (one.dev(), one.ino()) == (other.dev(), other.ino()))
    }
    #[cfg(not(unix))]
    Ok(one.file_type() == other.file_type() && old.to_lowercase() == new.to_lowercase())
}

/// Sets the permission bits of an open file or directory; systems without them do nothing.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    #[cfg(unix)]
    return Ok(rustix::fs::fchmod(file, bits(mode))?);
    #[cfg(not(unix))]
    {
        let _ = (file, mode);
        Ok(())
    }
}

/// Sets when an open file was changed, in Unix nanoseconds.
pub(crate) fn set_mtime(file: &File, mtime: i64) -> io::Result<()> {
    let epoch = SystemTime::UNIX_EPOCH;
    let distance = Duration::from_nanos(mtime.unsigned_abs());
    let time = if mtime < 0 { epoch.checked_sub(distance) } else { epoch.checked_add(distance) };
    file.set_modified(time.unwrap_or(epoch))
}

/// Sets permission bits and time of something this user may not open, or of a link.
#[cfg(unix)]
pub(crate) fn set_meta_closed(
    dir: &Dir,
    name: &str,
    stat: &Stat,
    mode: u32,
    mtime: Option<i64>,
) -> Result<(), ApplyError> {
    use rustix::fs::{AtFlags, Timespec, Timestamps, UTIME_OMIT};
    if stat.kind != Kind::Symlink {
        chmod_closed(dir, name, stat, mode)?;
    }
    let Some(mtime) = mtime else { return Ok(()) };
    let nanos = mtime.rem_euclid(1_000_000_000);
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.div_euclid(1_000_000_000), tv_nsec: nanos },
    };
    Ok(rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?)
}

#[cfg(not(unix))]
pub(crate) fn set_meta_closed(
    _dir: &Dir,
    _name: &str,
    _stat: &Stat,
    _mode: u32,
    _mtime: Option<i64>,
) -> Result<(), ApplyError> {
    Ok(())
}

#[cfg(target_os = "linux")]
fn chmod_closed(dir: &Dir, name: &str, stat: &Stat, mode: u32) -> Result<(), ApplyError> {
    use std::os::fd::AsRawFd;

    use rustix::fs::{AtFlags, CWD, Mode, OFlags, chmodat, openat};
    // Kernels before 6.6 change the mode of a name only by following it; a handle's name in /proc leads to what is open.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat(dir, name, flags, Mode::empty()).map_err(io::Error::from)?);
    if !stat_of(&file)?.is_some_and(|found| super::is_same(stat, &found)) {
        return Err(ApplyError::Changed);
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(chmodat(CWD, path, bits(mode), AtFlags::empty()).map_err(io::Error::from)?)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn chmod_closed(dir: &Dir, name: &str, _stat: &Stat, mode: u32) -> Result<(), ApplyError> {
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::chmodat(dir, name, bits(mode), flags).map_err(io::Error::from)?)
}

#[cfg(unix)]
fn bits(mode: u32) -> rustix::fs::Mode {
    let mode = mode & 0o777;
    #[cfg(target_vendor = "apple")]
    let mode = u16::try_from(mode).expect("BUG: nine bits");
    rustix::fs::Mode::from_raw_mode(mode)
}

/// Reads from a place in a file, as much as is there.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, buffer, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, buffer, offset);
}

/// Writes all of it to a place in a file.
pub(crate) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, bytes, offset);
    #[cfg(windows)]
    {
        let (mut bytes, mut offset) = (bytes, offset);
        while !bytes.is_empty() {
            let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = &bytes[written..];
            offset += written as u64;
        }
        Ok(())
    }
}

/// Copies a range between files, sharing blocks where the file system can; says how much there was.
pub(crate) fn copy_range(from: &File, offset: u64, to: &File, at: u64, len: u64) -> io::Result<u64> {
    let mut done = 0;
    #[cfg(target_os = "linux")]
    while done < len {
        let (mut source, mut target) = (offset + done, at + done);
        let rest = usize::try_from(len - done).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), rest) {
            Ok(0) => break,
            Ok(copied) => done += copied as u64,
            Err(error) if error == rustix::io::Errno::NOSPC || error == rustix::io::Errno::DQUOT => {
                return Err(error.into());
            }
            // Between file systems, and on some, only reading and writing works.
            Err(_) => break,
        }
    }
    let mut buffer = vec![0; COPY_BUFFER.min(usize::try_from(len - done).unwrap_or(COPY_BUFFER))];
    while done < len {
        let most = buffer.len().min(usize::try_from(len - done).unwrap_or(usize::MAX));
        let read = read_at(from, &mut buffer[..most], offset + done)?;
        if read == 0 {
            break;
        }
        write_at(to, &buffer[..read], at + done)?;
        done += read as u64;
    }
    Ok(done)
}

/// Has the system begin to write a part of a file to the disk, where it can be told to, and does not wait for it.
pub(crate) fn begin_write_back(file: &File, from: u64, to: u64) {
    // Of what is not on the disk yet, the advice begins to put it there and keeps it at hand.
    #[cfg(target_os = "linux")]
    if let Some(len) = std::num::NonZeroU64::new(to.saturating_sub(from)) {
        let _ = rustix::fs::fadvise(file, from, Some(len), rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, from, to);
}

/// Makes a file's content and size survive a power cut; of several, the last call of a batch says so.
pub(crate) fn sync_file(file: &File, last: bool) -> io::Result<()> {
    // There, only the last of a batch has to empty the disk's own cache, which takes long.
    #[cfg(target_vendor = "apple")]
    if !last {
        return Ok(rustix::fs::fsync(file)?);
    }
    let _ = last;
    file.sync_all()
}

/// Makes the names in a directory survive a power cut; systems whose journal does that by itself do nothing.
pub(crate) fn sync_dir(dir: &Dir, last: bool) -> io::Result<()> {
    #[cfg(unix)]
    return sync_file(&readable(dir)?, last);
    #[cfg(not(unix))]
    {
        let _ = (dir, last);
        Ok(())
    }
}

/// Makes all of the file system that a directory is on survive a power cut; says whether the system can.
pub(crate) fn sync_all(dir: &Dir) -> io::Result<bool> {
    #[cfg(target_os = "linux")]
    return Ok(rustix::fs::syncfs(readable(dir)?).map(|()| true)?);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = dir;
        Ok(false)
    }
}

/// A directory's handle of the kind that can be synced, which one for paths cannot.
#[cfg(unix)]
fn readable(dir: &Dir) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, openat};
    Ok(File::from(openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
}
