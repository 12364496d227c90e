//! Where a relay keeps what it keeps: one trait, and behind it SQLite or PostgreSQL.

#[cfg(test)]
mod conformance;
mod postgres;
mod sqlite;
mod tail;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::BoxFuture;
use sync_core::session::Reply;
use sync_core::{Membership, Selection};
use sync_store::exec::{Arrival, Pull};
use sync_store::{Limits, StoreError, WaitingRequest, Window};
use sync_types::{Class, Cursor, Envelope, ErrorCode, GroupId, ReplicaId, Scope, Timestamp, Want};
use tokio::sync::watch;

use crate::config::Config;
use postgres::Postgres;
use sqlite::Sqlite;
pub(crate) use tail::Tail;

/// Part of a group's room that memberships and rotations have beyond it, without which nobody could be judged.
const OPEN_ROOM: u64 = 4;

/// Work on a database: durable before it ends, if it changes anything.
pub(crate) type Work<'a, T> = BoxFuture<'a, Result<T, StorageError>>;

/// The database of a relay.
///
/// What holds for each is what `sync-store` says of its own: cursors are given per group without gaps, in the commit that
/// stores the entry; one that was read up to is never given later; nothing is answered before its commit is durable.
pub(crate) trait Storage: Send + Sync {
    /// The id of the database.
    fn replica(&self) -> ReplicaId;

    /// What is new in a group, from now on; none where the group is not kept here.
    fn live(&self, group: GroupId) -> Work<'_, Option<Live>>;

    /// Takes in a group, unless so many are here or so many bytes are used: returns what lacks then.
    fn host(&self, charter: Vec<u8>, groups: usize, database_bytes: u64) -> Work<'_, Option<ErrorCode>>;

    /// Stores what counts of a batch and has room, and the position reached with it.
    fn store(&self, group: GroupId, arrival: Arrival, room: Room) -> Work<'_, Stored>;

    /// Tells what is held: [`Reply::Survey`].
    fn survey(&self, group: GroupId, replica: ReplicaId) -> Work<'_, Reply>;

    /// Compares what a peer holds with what is held: [`Reply::Selected`].
    fn select(&self, group: GroupId, pull: Pull) -> Work<'_, Reply>;

    /// Reads entries to send: [`Reply::Read`].
    fn read(&self, group: GroupId, reading: Reading) -> Work<'_, Reply>;

    /// Reads everything behind a cursor, up to the limits, for all who read along.
    fn window(&self, group: GroupId, after: Cursor, limits: Limits) -> Work<'_, Window>;

    /// Reads entries by number: [`Reply::Wanted`].
    fn read_wanted(&self, group: GroupId, request: u32, wants: Vec<Want>) -> Work<'_, Reply>;

    /// The numbers lacking.
    fn wants(&self, group: GroupId) -> Work<'_, Vec<Want>>;

    /// Has what a member asks for be asked of others, where it expired here.
    fn want_again(&self, group: GroupId, wants: Vec<Want>) -> Work<'_, ()>;

    /// Every group that is kept.
    fn groups(&self) -> Work<'_, Vec<GroupId>>;

    /// Notes up to where a group's log goes now.
    fn mark_time(&self, group: GroupId, now: Timestamp) -> Work<'_, ()>;

    /// Drops what is sealed and was here at `before`, at most `limit` entries: returns how many.
    fn expire(&self, group: GroupId, before: Timestamp, limit: usize) -> Work<'_, usize>;

    /// Keeps a request to join, and forgets those that were left before `oldest`.
    fn keep_request(&self, request: WaitingRequest, oldest: Timestamp) -> Work<'_, ()>;

    /// Keeps the answer to a request that is kept.
    fn keep_answer(&self, place: [u8; 16], number: u32, answer: Vec<u8>) -> Work<'_, ()>;

    /// Forgets a request to join, or all of a code where none is named.
    fn forget_requests(&self, place: [u8; 16], number: Option<u32>) -> Work<'_, ()>;

    /// Every request to join that is kept.
    fn requests(&self) -> Work<'_, Vec<WaitingRequest>>;

    /// How much there is.
    fn usage(&self) -> Work<'_, Usage>;

    /// Ends what was begun, and closes.
    fn close(&self) -> Work<'_, ()>;
}

/// Opens the database that a configuration names, and makes it if there is none.
pub(crate) async fn open(config: &Config) -> Result<Arc<dyn Storage>, StorageError> {
    match &config.database {
        None => Ok(Arc::new(Sqlite::open(config.data.clone()).await?)),
        Some(url) => Ok(Arc::new(Postgres::open(url, config.database_ca.as_deref()).await?)),
    }
}

/// What is told of a group as long as it is kept.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    /// Its newest cursor, durable.
    pub(crate) newest: watch::Receiver<Cursor>,
    /// Told when a member lacks what expired here: whoever has it is asked.
    pub(crate) wanted: watch::Receiver<()>,
    /// What was read of it lately.
    pub(crate) tail: Arc<Tail>,
}

/// How much room there is for what a session stores.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    /// Whether the session was told that there is none.
    pub(crate) told_full: Arc<AtomicBool>,
    /// Bytes of a group.
    pub(crate) group_bytes: u64,
    /// Bytes of the database.
    pub(crate) database_bytes: u64,
}

impl Room {
    /// Takes out of a batch what there is no room for, beside what the group and the database hold: returns which room
    /// lacks.
    ///
    /// Of a session that was told so, only what everyone must have stays, and no position: it would claim what was left
    /// out.
    fn fit(&self, arrival: &mut Arrival, of_group: u64, of_database: u64) -> Option<ErrorCode> {
        let bytes = bytes_of(arrival);
        let lacking = if of_group.saturating_add(bytes) > self.group_bytes {
            ErrorCode::GroupFull
        } else if of_database.saturating_add(bytes) > self.database_bytes {
            ErrorCode::StorageFull
        } else if self.told_full.load(Ordering::Relaxed) {
            ErrorCode::GroupFull
        } else {
            return None;
        };
        self.told_full.store(true, Ordering::Relaxed);
        arrival.batch.retain(|bytes| is_open(bytes));
        arrival.position = None;
        let most = self.group_bytes.saturating_add(self.group_bytes / OPEN_ROOM);
        if of_group.saturating_add(bytes_of(arrival)) > most {
            arrival.batch.clear();
        }
        Some(lacking)
    }
}

fn bytes_of(arrival: &Arrival) -> u64 {
    arrival.batch.iter().map(|bytes| bytes.len() as u64).sum()
}

/// Whether everyone must have it, whatever the room.
fn is_open(bytes: &[u8]) -> bool {
    Envelope::parse(bytes).is_ok_and(|envelope| envelope.header.class != Class::Sealed)
}

/// What became of a batch.
#[derive(Debug)]
pub(crate) struct Stored {
    /// The room that lacks; then only what everyone must have was stored.
    pub(crate) lacking: Option<ErrorCode>,
    /// Entries that were stored.
    pub(crate) new: usize,
    /// Entries that do not count.
    pub(crate) refused: usize,
    /// Who belongs to the group now.
    pub(crate) membership: Arc<Membership>,
    /// What lacks now.
    pub(crate) wants: Vec<Want>,
}

/// Which entries to read.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    /// For which answer.
    pub(crate) scope: Scope,
    /// Not those that came from this database; none while catching up.
    pub(crate) not_from: Option<ReplicaId>,
    /// Behind this cursor.
    pub(crate) after: Cursor,
    /// So many.
    pub(crate) limits: Limits,
    /// What the peer lacks.
    pub(crate) selection: Arc<Selection>,
}

/// How much there is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// Groups.
    pub(crate) groups: usize,
    /// Bytes that count towards the limit.
    pub(crate) bytes: u64,
    /// Commits of this process.
    pub(crate) commits: u64,
}

/// Why the database does not do what it is asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// It is not kept here.
    #[error("no group {0:?} is kept here")]
    UnknownGroup(GroupId),
    /// The file cannot be used.
    #[error("cannot use the database in {path}: {source}")]
    Open {
        /// Its directory.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] StoreError),
    /// The setting is no address of a database.
    #[error("database is no address of PostgreSQL: {0}; write it as postgres://USER:PASSWORD@HOST/NAME")]
    Url(String),
    /// The file of certificates cannot be used.
    #[error("cannot use the certificates in {path}: {reason}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// PostgreSQL cannot be reached, or refuses.
    #[error("PostgreSQL does not do what it is asked: {0}; check that it runs and that database names it")]
    Postgres(String),
    /// There is no room on PostgreSQL's disk.
    #[error("the disk of PostgreSQL is full; nothing of this was stored, make room and try again")]
    Full,
    /// A newer program made what is in the database.
    #[error("the database is of version {found}, this program knows {known}; update it")]
    Newer {
        /// Its version.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// What is in the database is not what a relay wrote.
    #[error("the database is damaged: {0}; nothing was changed, restore it from a backup")]
    Damaged(&'static str),
}

impl StorageError {
    /// Whether there is no room on its disk.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Full | Self::Sqlite(StoreError::DiskFull))
    }
}
