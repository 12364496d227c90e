//! Why something on disk was not changed.

use std::io::{self, ErrorKind};

/// Why an operation did not happen; nothing is lost, and what lies at the path is what lay there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// What lies there is not what the caller expects: it has to look again.
    #[error("something else lies there than was seen last: it is looked at again")]
    Changed,
    /// A directory still holds something.
    #[error("the directory is not empty")]
    NotEmpty,
    /// The directory that something should go to, or what should be moved, is not there.
    #[error("nothing is there")]
    Missing,
    /// A component of the path is a symbolic link, which is never followed.
    #[error("a symbolic link is in the way: a path is never followed through one")]
    Escape,
    /// What was received is not what was announced.
    #[error("the content is not what was announced")]
    Mismatch,
    /// No room, or so little that syncing stops.
    #[error("the disk is full: free some space, or move the folder to a larger disk")]
    DiskFull,
    /// The user that runs this may not.
    #[error("permission denied: give the user that runs syncshell the right to write there")]
    Denied,
    /// The file system takes no changes.
    #[error("the file system is read-only: mount it writable")]
    ReadOnly,
    /// The file system holds no name that long.
    #[error("the name is too long for this file system: give it a shorter one")]
    NameTooLong,
    /// This system cannot hold it.
    #[error("this system cannot do that: {0}")]
    Unsupported(&'static str),
    /// Anything else.
    #[error("input or output failed: {0}")]
    Io(#[source] io::Error),
}

impl From<io::Error> for ApplyError {
    fn from(error: io::Error) -> Self {
        #[cfg(unix)]
        if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
            return Self::Escape;
        }
        match error.kind() {
            ErrorKind::NotFound => Self::Missing,
            ErrorKind::AlreadyExists | ErrorKind::NotADirectory | ErrorKind::IsADirectory => Self::Changed,
            ErrorKind::DirectoryNotEmpty => Self::NotEmpty,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull,
            ErrorKind::PermissionDenied => Self::Denied,
            ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            ErrorKind::InvalidFilename => Self::NameTooLong,
            ErrorKind::FileTooLarge => Self::Unsupported("the file system holds no file that large"),
            ErrorKind::CrossesDevices => Self::Unsupported("another file system is mounted inside the folder"),
            ErrorKind::Unsupported => Self::Unsupported("the file system does not know the operation"),
            _ => Self::Io(error),
        }
    }
}
