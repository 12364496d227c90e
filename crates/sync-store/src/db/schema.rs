//! Opening and closing: pragmas, migrations, and telling apart what is in the file.

use std::path::Path;
use std::time::Duration;

use rand_core::CryptoRng;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use sync_types::ReplicaId;

use super::DbOptions;
use super::manage::REPLICA;
use crate::error::StoreError;

/// Marks the file as ours: "Sync".
const APPLICATION_ID: i32 = 0x5379_6e63;
/// Every step from an empty file to the present schema; a step is never edited once released.
const MIGRATIONS: &[&str] = &[include_str!("../../migrations/0001_log.sql")];
/// How long a statement waits for another process: longer than any commit takes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Prepared statements kept: more than this crate has.
const STATEMENTS: usize = 128;
/// Bytes of a page: several envelopes of 1 KiB fill one well, and a single push still writes few bytes.
const PAGE_BYTES: i32 = 8 << 10;
/// Page cache of the writer in KiB: inner pages of the indexes of some million entries.
const WRITER_CACHE_KIB: i32 = 16 << 10;
/// Pages of write-ahead log that start a checkpoint: rare enough that bulk arrivals write most pages once.
const CHECKPOINT_PAGES: i32 = 2000;
/// Bytes the write-ahead log is cut to after a checkpoint, so that one large transaction does not stay on disk.
const WAL_BYTES: i32 = 64 << 20;

/// Opens a database for writing.
pub(super) fn open(path: &Path, options: &DbOptions, rng: &mut dyn CryptoRng) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = match &options.vfs {
        Some(vfs) => Connection::open_with_flags_and_vfs(path, flags, vfs.as_str()),
        None => Connection::open_with_flags(path, flags),
    };
    let mut conn = opened.map_err(|error| explain(error, path, options))?;
    prepare(&mut conn, options, rng).map_err(|error| match error {
        Failure::Sqlite(error) => explain(error, path, options),
        Failure::Store(error) => error,
    })?;
    Ok(conn)
}

fn explain(error: rusqlite::Error, path: &Path, options: &DbOptions) -> StoreError {
    if options.vfs.is_some() { error.into() } else { StoreError::opening(error, path) }
}

enum Failure {
    Sqlite(rusqlite::Error),
    Store(StoreError),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn prepare(conn: &mut Connection, options: &DbOptions, rng: &mut dyn CryptoRng) -> Result<(), Failure> {
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS);
    keep_plans(conn)?;
    if options.exclusive {
        conn.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    }
    // before the first write, so that a file that is not ours is left as it is
    let found = version(conn)?;
    if conn.is_readonly("main")? {
        return Err(Failure::Store(StoreError::ReadOnly));
    }
    if found == 0 {
        // first: the next pragma makes the file
        conn.pragma_update(None, "page_size", PAGE_BYTES)?;
        conn.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    }
    conn.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    conn.pragma_update(None, "synchronous", "FULL")?;
    // macOS: only this reaches the disk itself
    conn.pragma_update(None, "fullfsync", "ON")?;
    conn.pragma_update(None, "checkpoint_fullfsync", "ON")?;
    conn.pragma_update(None, "foreign_keys", "ON")?;
    // what a command would take back fits in memory, since a commit is bounded
    conn.pragma_update(None, "temp_store", "MEMORY")?;
    conn.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
    conn.pragma_update_and_check(None, "wal_autocheckpoint", CHECKPOINT_PAGES, |_| Ok(()))?;
    conn.pragma_update_and_check(None, "journal_size_limit", WAL_BYTES, |_| Ok(()))?;
    if found < MIGRATIONS.len() {
        migrate(conn, rng)?;
    }
    Ok(make_durable(conn)?)
}

/// Makes durable what a killed process left in the write-ahead log before anyone reads it: its commit was never answered,
/// but what is read is acted on, and a power cut must not take it back.
fn make_durable(conn: &Connection) -> rusqlite::Result<()> {
    match conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())) {
        // the log itself was synced first; only the main file cannot grow
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::DiskFull) => Ok(()),
        done => done,
    }
}

/// A commit that changes nothing, of one page: the version is the one statement that writes a page as it is.
pub(super) fn write_nothing(conn: &Connection) -> rusqlite::Result<()> {
    let version: i32 = conn.pragma_query_value(None, "user_version", |row| row.get(0))?;
    conn.pragma_update(None, "user_version", version)
}

/// The version of the schema in the file; 0 for an empty file.
fn version(conn: &Connection) -> Result<usize, Failure> {
    let pragma = |name| conn.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let (application, version) = (pragma("application_id")?, pragma("user_version")?);
    let tables: i64 = conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    match (application, version) {
        (0, 0) if tables == 0 => Ok(0),
        (APPLICATION_ID, 1..) => {
            let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
            let found = version.unsigned_abs();
            if found > known {
                return Err(Failure::Store(StoreError::Newer { found, known }));
            }
            Ok(usize::try_from(found).unwrap_or(usize::MAX))
        }
        _ => Err(Failure::Store(StoreError::NotADatabase)),
    }
}

fn migrate(conn: &mut Connection, rng: &mut dyn CryptoRng) -> Result<(), Failure> {
    let txn = conn.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    // another process may have been faster
    let found = version(&txn)?;
    for step in &MIGRATIONS[found..] {
        txn.execute_batch(step)?;
    }
    if found == 0 {
        let mut replica = [0; ReplicaId::LEN];
        rng.fill_bytes(&mut replica);
        txn.execute("INSERT INTO meta (key, value) VALUES (?1, ?2)", (REPLICA, replica))?;
        txn.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    txn.pragma_update(None, "user_version", i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX))?;
    Ok(txn.commit()?)
}

/// Opens one more connection, for reading, to a database that is open for writing.
pub(crate) fn open_read_only(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS);
    keep_plans(&conn)?;
    Ok(conn)
}

/// Plans a statement once, whatever values are bound to it: looking at them means planning again at each use.
fn keep_plans(conn: &Connection) -> Result<(), rusqlite::Error> {
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map(|_| ())
}

/// Gives unused pages back, writes everything into the main file and closes.
pub(super) fn close(conn: Connection) -> Result<(), StoreError> {
    conn.execute_batch("PRAGMA incremental_vacuum")?;
    // fails to finish while someone reads, which loses nothing: the log is read at the next opening
    conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    conn.close().map_err(|(_, error)| error.into())
}
