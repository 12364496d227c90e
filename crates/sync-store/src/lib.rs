//! The local database of a home: log, index, sealed secrets and what is known of peers.
//!
//! [`Db`] is everything synchronous: one SQLite connection, one transaction at a time, deterministic.
//! [`Store`] is its shell for async programs: one writer thread that commits in groups, and pooled readers.
//! Both keep bytes and know no keys: secrets come in sealed, and a [`SealEntries`] lends its keys for the time of a call.
//!
//! What always holds:
//! - Nothing is answered before its commit is durable.
//! - Cursors are given per group, from 1, without gaps, in the transaction that stores the entry; reading after a cursor
//!   never misses an entry stored with a cursor up to the answer's `max_cursor`.
//! - An envelope is kept and given out byte for byte.
//! - A damaged file is reported, never repaired, emptied or made anew.

#![cfg_attr(test, expect(clippy::unwrap_used, reason = "tests"))]

mod append;
mod db;
mod error;
pub mod exec;
mod store;
#[cfg(test)]
mod tests;

pub use append::{Content, NewEntry, SealEntries, SealError};
pub use db::{
    Appended, Batch, Changes, ChunkPlace, Compaction, Db, DbOptions, DiskState, Dropped, FileRow, FileRowId, FolderRow,
    FolderRowId, FolderTotals, GroupChange, GroupRow, Ingested, KeptRow, KeptRowId, Limits, NewKept, Peer, PeerId,
    PeerNote, RangeHere, Reader, Renewal, Renewed, Reopen, Sealed, SealedSecret, Since, SnapshotChunk, SnapshotRow,
    SnapshotRowId, SnapshotState, StoredBytes, StoredEntry, Text, Txn, Untaken, WaitingRequest, Window, WindowRow,
    make_check,
};
pub use error::StoreError;
pub use store::{Stats, Store};
