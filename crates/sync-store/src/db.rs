//! One SQLite connection and everything synchronous: deterministic, single-threaded, over any SQLite VFS.
//!
//! All writes go through a [`Txn`], so that several commands can share one commit.
//! What is kept in memory of a group is a cache: after a failed command or a failed commit it is loaded again,
//! never trusted.

mod append;
mod cache;
mod convert;
mod ends;
mod expire;
mod folders;
mod ingest;
mod manage;
mod peers;
mod read;
mod renew;
mod requests;
mod schema;
mod snapshots;
mod texts;
mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use rand_core::CryptoRng;
use rusqlite::Connection;
use sync_core::Membership;
use sync_types::{Cursor, GroupId};

pub use append::Appended;
use cache::Group;
pub use cache::make_check;
pub use folders::{
    ChunkPlace, DiskState, FileRow, FileRowId, FolderRow, FolderRowId, FolderTotals, KeptRow, KeptRowId, NewKept,
};
pub use ingest::{Ingested, StoredEntry};
pub use manage::{GroupRow, SealedSecret};
pub use peers::{Peer, PeerId, PeerNote};
pub(crate) use read::snapshot;
pub use read::{Batch, Limits, Reader, Sealed, StoredBytes};
pub use renew::{Renewal, Renewed, Reopen};
pub use requests::WaitingRequest;
pub(crate) use schema::open_read_only;
pub use snapshots::{
    Compaction, Dropped, RangeHere, Since, SnapshotChunk, SnapshotRow, SnapshotRowId, SnapshotState, Untaken,
};
pub use texts::Text;
pub use window::{Window, WindowRow};

use crate::error::StoreError;

/// How to open a database.
#[derive(Debug, Clone, Default)]
pub struct DbOptions {
    /// The SQLite VFS to open it over; the system's own by default.
    pub vfs: Option<String>,
    /// One connection and no other: then the VFS needs no shared memory.
    pub exclusive: bool,
}

/// The database of a home.
pub struct Db {
    conn: Connection,
    rng: Box<dyn CryptoRng + Send>,
    groups: BTreeMap<GroupId, Group>,
}

impl Db {
    /// Opens a database, makes it if there is none, and brings an older one up to date.
    pub fn open(path: &Path, options: &DbOptions, rng: impl CryptoRng + Send + 'static) -> Result<Self, StoreError> {
        let mut rng: Box<dyn CryptoRng + Send> = Box::new(rng);
        let conn = schema::open(path, options, &mut rng)?;
        Ok(Self { conn, rng, groups: BTreeMap::new() })
    }

    /// Starts a transaction; dropping it takes everything back.
    pub fn begin(&mut self) -> Result<Txn<'_>, StoreError> {
        self.conn.execute_batch("BEGIN IMMEDIATE")?;
        Ok(Txn { db: self, touched: BTreeSet::new(), sums: folders::Sums::default(), broken: None })
    }

    /// Does some work in one transaction, durable when this returns.
    pub fn write<T>(&mut self, work: impl FnOnce(&mut Txn<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut txn = self.begin()?;
        let done = work(&mut txn)?;
        txn.commit()?;
        Ok(done)
    }

    /// Reads from one state of the database.
    pub fn read<T>(&self, work: impl FnOnce(&Reader<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        read::snapshot(&self.conn, work)
    }

    /// Who belongs to a group.
    pub fn membership(&mut self, group: &GroupId) -> Result<Arc<Membership>, StoreError> {
        Ok(cache::load(&self.conn, &mut self.groups, group)?.published())
    }

    /// Writes everything into the main file and closes.
    pub fn close(self) -> Result<(), StoreError> {
        schema::close(self.conn)
    }
}

#[cfg(test)]
impl Db {
    /// The connection, for tests to look under the hood.
    pub(crate) fn raw(&self) -> &Connection {
        &self.conn
    }
}

#[cfg(test)]
impl Txn<'_> {
    /// The connection, for tests to make it fail.
    pub(crate) fn raw(&self) -> &Connection {
        &self.db.conn
    }
}

/// A transaction: every change to the database is a method here.
pub struct Txn<'db> {
    db: &'db mut Db,
    /// Groups whose cache is ahead of what is committed.
    touched: BTreeSet<GroupId>,
    /// What is to be added to the sums over folders' files.
    sums: folders::Sums,
    /// Why nothing of this transaction can be committed any more.
    broken: Option<StoreError>,
}

/// What a transaction changed.
#[derive(Debug, Default)]
pub struct Changes {
    /// The groups whose log it changed.
    pub groups: Vec<GroupChange>,
}

/// What a transaction changed in a group.
#[derive(Debug)]
pub struct GroupChange {
    /// The group.
    pub group: GroupId,
    /// Its newest cursor, durable.
    pub max_cursor: Cursor,
    /// Who belongs to it.
    pub membership: Arc<Membership>,
}

impl Txn<'_> {
    /// Does some work that is taken back alone if it fails; the rest of the transaction stands.
    pub fn attempt<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, StoreError>) -> Result<T, StoreError> {
        run(self.live()?, "SAVEPOINT command")?;
        let (before, sums) = (std::mem::take(&mut self.touched), std::mem::take(&mut self.sums));
        let done = work(self).and_then(|done| self.settle_sums().map(|()| done));
        let settled = match &done {
            Ok(_) => self.live().and_then(|conn| run(conn, "RELEASE command")),
            Err(_) => self.take_back(),
        };
        self.touched.extend(before);
        self.sums = sums;
        match (done, settled) {
            (Ok(done), Ok(())) => Ok(done),
            (Err(error), Ok(())) => Err(error),
            // SQLite took the whole transaction back: what failed first is what to tell
            (Err(error), Err(_)) | (Ok(_), Err(error)) => {
                self.broken = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Takes back to the innermost savepoint.
    fn take_back(&mut self) -> Result<(), StoreError> {
        for group in std::mem::take(&mut self.touched) {
            self.db.groups.remove(&group);
        }
        run(self.live()?, "ROLLBACK TO command")?;
        run(self.live()?, "RELEASE command")
    }

    /// Makes everything durable.
    pub fn commit(mut self) -> Result<Changes, StoreError> {
        self.live()?;
        self.settle_sums()?;
        let mut changes = Changes::default();
        for id in &self.touched {
            let group = cache::load(&self.db.conn, &mut self.db.groups, id)?;
            let (max_cursor, membership) = (group.max_cursor, group.published());
            changes.groups.push(GroupChange { group: *id, max_cursor, membership });
        }
        if let Err(error) = self.db.conn.execute_batch("COMMIT") {
            self.unwrite();
            return Err(error.into());
        }
        self.touched.clear();
        Ok(changes)
    }

    /// Takes a failed commit out of the write-ahead log.
    ///
    /// It may stand there whole, for want of a sync alone. Whoever copies the home now would find it, and issue it beside
    /// what is written here next under the same numbers; so an empty commit goes over it.
    fn unwrite(&self) {
        // one that is still open was not written
        if self.db.conn.is_autocommit()
            && let Err(error) = schema::write_nothing(&self.db.conn)
        {
            tracing::warn!(%error, "failed commit may still stand in the log, until the next write");
        }
    }

    /// Reads what the database is like with this transaction's changes.
    #[must_use]
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(&self.db.conn)
    }

    /// Who belongs to a group, with this transaction's changes.
    pub fn membership(&mut self, group: &GroupId) -> Result<Arc<Membership>, StoreError> {
        self.live()?;
        Ok(cache::load(&self.db.conn, &mut self.db.groups, group)?.published())
    }

    /// The connection, unless SQLite has taken the transaction back: a statement would then commit by itself.
    fn live(&self) -> Result<&Connection, StoreError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.db.conn.is_autocommit() {
            return Err(StoreError::RolledBack);
        }
        Ok(&self.db.conn)
    }

    /// A group about to be changed, with what changing it needs.
    fn change(&mut self, id: &GroupId) -> Result<Change<'_>, StoreError> {
        self.live()?;
        let Db { conn, rng, groups } = &mut *self.db;
        let group = cache::load(conn, groups, id)?;
        self.touched.insert(*id);
        Ok(Change { conn, rng: &mut **rng, group })
    }

    /// Has a group loaded again before it is next used.
    fn forget(&mut self, id: &GroupId) {
        self.db.groups.remove(id);
    }
}

impl Drop for Txn<'_> {
    fn drop(&mut self) {
        if !self.db.conn.is_autocommit()
            && let Err(error) = self.db.conn.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "transaction could not be taken back");
        }
        for group in &self.touched {
            self.db.groups.remove(group);
        }
    }
}

/// Runs a statement that is prepared once.
fn run(conn: &Connection, sql: &str) -> Result<(), StoreError> {
    conn.prepare_cached(sql)?.execute([])?;
    Ok(())
}

/// A group under change.
struct Change<'a> {
    conn: &'a Connection,
    rng: &'a mut dyn CryptoRng,
    group: &'a mut Group,
}
