//! What can go wrong, by who erred.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rusqlite::ErrorCode;
use sync_core::{MembershipError, Refusal};
use sync_types::{AuthorId, BlobId, Cursor, FormatError, GroupId};

use crate::append::SealError;

/// Why the database did not do what it was asked.
///
/// Cloneable, because commands that shared a commit share its failure.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    // the caller
    /// This home has no such group.
    #[error("no group {0:?} in this home; join it first")]
    UnknownGroup(GroupId),
    /// This home has the group already.
    #[error("group {0:?} is in this home already")]
    GroupExists(GroupId),
    /// No such peer in this group.
    #[error("no such peer in this group")]
    UnknownPeer,
    /// A snapshot was replaced or forgotten meanwhile.
    #[error("the snapshot was replaced meanwhile; nothing was changed, and it is tried again")]
    UnknownSnapshot,
    /// No such invite in this group.
    #[error("no such invite in this group")]
    UnknownInvite,
    /// The blob id names another entry.
    #[error("blob id {blob_id} already names another entry, at cursor {cursor}; draw a new one")]
    BlobIdReused {
        /// The blob id.
        blob_id: BlobId,
        /// Where the other entry is.
        cursor: Cursor,
    },
    /// The sealer is not the author that writes to this group now.
    #[error("author {got:?} no longer writes to this group, {current:?} does; seal as that one")]
    AuthorChanged {
        /// Who writes now.
        current: AuthorId,
        /// Who the sealer is.
        got: AuthorId,
    },
    /// Others hold entries of our author that this database does not remember writing.
    #[error("others hold entries of author {0:?} that this database never wrote; start a new author before writing")]
    AuthorBehind(AuthorId),
    /// The sealer failed.
    #[error("cannot seal the entry: {0}")]
    Seal(#[from] SealError),
    /// The sealer made another envelope than it was asked for.
    #[error("the sealed entry has another {field} than it was asked for")]
    SealedOtherwise {
        /// The field that differs.
        field: &'static str,
    },
    /// The bytes are no charter.
    #[error("not a charter: {0}")]
    Charter(#[source] FormatError),
    /// An own membership operation that does not count.
    #[error("membership operation refused: {0}")]
    Membership(#[from] MembershipError),
    /// The new author's first entry does not count.
    #[error("succession refused: {0}")]
    Succession(#[source] Refusal),
    /// The store was closed.
    #[error("the database was closed")]
    Closed,

    // the environment
    /// A newer program wrote the file.
    #[error("the database is of version {found}, this program knows {known}; update it")]
    Newer {
        /// Version of the file.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// The file is damaged.
    #[error("the database is damaged: {0}; nothing was changed, restore the home from a backup or join anew")]
    Corrupt(Arc<str>),
    /// The file is something else.
    #[error(
        "the file is not a Syncshell database, or its beginning is damaged; choose another home, or restore this one"
    )]
    NotADatabase,
    /// No room.
    #[error("the disk is full; nothing of this was stored, make room and try again")]
    DiskFull,
    /// No permission to write.
    #[error("the database cannot be written; check the permissions of the home and that its disk is not read-only")]
    ReadOnly,
    /// Another process holds the file.
    #[error("another process holds the database; wait for it or stop it")]
    Busy,
    /// The file was deleted or replaced while it was open.
    #[error(
        "the database was deleted or replaced while it was open; nothing is stored any more: stop, put it back, and start again"
    )]
    Gone,
    /// The disk failed.
    #[error("the disk failed: {0}; check it, then try again")]
    Io(#[source] Arc<dyn std::error::Error + Send + Sync>),

    // us
    /// An earlier failure took the whole transaction back.
    #[error("an earlier failure took back the whole transaction; try again")]
    RolledBack,
    /// No cursor or number is left.
    #[error("the group has no {0} left")]
    Exhausted(&'static str),
    /// SQLite refused a statement.
    #[error("the database refused a statement: {0}")]
    Sql(#[source] Arc<rusqlite::Error>),
}

impl StoreError {
    /// A row that cannot be what this program wrote.
    pub(crate) fn corrupt(what: &str) -> Self {
        Self::Corrupt(what.into())
    }

    /// Why a file could not be opened; SQLite only says that it could not.
    pub(crate) fn opening(error: rusqlite::Error, path: &Path) -> Self {
        if error.sqlite_error_code() != Some(ErrorCode::CannotOpen) {
            return error.into();
        }
        match std::fs::OpenOptions::new().read(true).append(true).create(true).open(path) {
            Err(reason) => reason.into(),
            // the file can be written, so it is a file beside it that cannot
            Ok(_) => Self::ReadOnly,
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        if matches!(
            error,
            rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::InvalidColumnType(..)
        ) {
            return Self::corrupt(&error.to_string());
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt) => Self::corrupt(&error.to_string()),
            Some(ErrorCode::NotADatabase) => Self::NotADatabase,
            Some(ErrorCode::DiskFull) => Self::DiskFull,
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Self::ReadOnly,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => {
                Self::Busy
            }
            Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => Self::Io(Arc::new(error)),
            _ => Self::Sql(Arc::new(error)),
        }
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::Io(Arc::new(error)),
        }
    }
}
