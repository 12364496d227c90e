//! Why a folder is not shared, placed or served.

use std::path::PathBuf;

use sync_folder::root::RootError;
use sync_folder::selection::MAX_SELECTED;

/// Why something about a folder did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// One directory is inside the other, or they are the same.
    #[error("{} overlaps with {}, which is synced already; share a directory outside of it", path.display(), other.display())]
    Overlap {
        /// The directory given.
        path: PathBuf,
        /// The one that is there.
        other: PathBuf,
    },
    /// The directory holds the home.
    #[error("{} overlaps with this device's own data; choose another directory", .0.display())]
    Home(PathBuf),
    /// Nothing of that name is synced here.
    #[error("no folder {0} is synced on this device; `syncshell folders` lists them")]
    Unknown(String),
    /// The group has no such folder.
    #[error("no folder {0} is announced in this group; wait until a device that shares it has been connected")]
    NotOffered(String),
    /// The folder has a place already.
    #[error("this folder is synced in {} already; leave it there first", .0.display())]
    AlreadyPlaced(PathBuf),
    /// The directory cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The group cuts files in a way of a later version.
    #[error(transparent)]
    Chunker(#[from] sync_folder::cut::ChunkerError),
    /// More paths are named than are kept.
    #[error("at most {MAX_SELECTED} paths can be selected; name the directories they are in")]
    Selected,
    /// The path is none of the folder's.
    #[error("{0} is no path of this folder")]
    Path(String),
    /// Nothing is kept under that name.
    #[error(
        "no version {version} of {path} is kept here or on a device that is connected; `syncshell versions {path}` lists them"
    )]
    NoVersion {
        /// The path.
        path: String,
        /// The version asked for.
        version: String,
    },
    /// There is something already.
    #[error("{} is there already; name a path where nothing is", .0.display())]
    Exists(PathBuf),
    /// The folder is not served at the moment.
    #[error("this folder is stopped: {0}")]
    Stopped(String),
    /// The file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl FolderError {
    /// A word for the kind of error that programs can rely on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Overlap { .. } | Self::Home(_) => "folder-overlaps",
            Self::Unknown(_) | Self::NotOffered(_) => "unknown-folder",
            Self::AlreadyPlaced(_) => "folder-placed",
            Self::Root(_) => "folder-missing",
            Self::Chunker(_) => "newer-group",
            Self::Path(_) | Self::Selected => "bad-path",
            Self::NoVersion { .. } => "no-version",
            Self::Exists(_) => "exists",
            Self::Stopped(_) => "folder-stopped",
            Self::Io { .. } => "io",
        }
    }
}
