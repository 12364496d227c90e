//! The file: new, damaged, foreign, from a newer program, not writable, no room.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use sync_types::{BlobId, Cursor, Number};
use tempfile::TempDir;

use super::support::*;
use crate::{Db, DbOptions, StoreError};

fn try_open(path: &Path) -> Result<Db, StoreError> {
    Db::open(path, &DbOptions::default(), rng(1))
}

/// A database of some pages, closed; returns its bytes.
fn filled(dir: &Path) -> Vec<u8> {
    let alice = author(1);
    let (mut db, group) = founded(dir, &alice);
    let writer = Writer { group, author: alice };
    let entries: Vec<_> = (0..100).map(|n| entry(blob(n), vec![7; 1000])).collect();
    db.write(|txn| txn.append(&group, &entries, &writer)).unwrap();
    db.close().unwrap();
    fs::read(dir.join("db")).unwrap()
}

#[test]
fn a_new_file_has_the_settings_everything_relies_on() {
    let dir = TempDir::new().unwrap();
    let db = open(dir.path());
    let pragma = |name| db.raw().pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0)).unwrap();
    assert_eq!(pragma("journal_mode"), "wal".to_owned().into());
    for (name, value) in
        [("synchronous", 2), ("foreign_keys", 1), ("auto_vacuum", 2), ("page_size", 8192), ("user_version", 1)]
    {
        assert_eq!(pragma(name), i64::from(value).into(), "{name}");
    }
    let exclusive = DbOptions { exclusive: true, ..DbOptions::default() };
    let mut alone = Db::open(&dir.path().join("alone"), &exclusive, rng(1)).unwrap();
    alone.write(|txn| txn.put_meta("key", b"value")).unwrap();
    assert!(!dir.path().join("alone-shm").exists(), "one connection needs no shared memory");
    db.read(|reader| reader.integrity()).unwrap();
}

#[test]
fn every_lookup_is_an_index_hit() {
    let dir = TempDir::new().unwrap();
    let db = open(dir.path());
    for (sql, index) in [
        ("SELECT hash, previous FROM entries WHERE feed = ?1 AND number = ?2", "entries_by_number"),
        ("SELECT id FROM entries WHERE feed = ?1 AND number BETWEEN ?2 AND ?3", "entries_by_number"),
        ("SELECT id FROM entries WHERE feed = ?1 AND blob_id = ?2 AND own > 0", "entries_by_blob"),
        ("SELECT id FROM entries WHERE state = 1 AND epoch_number = ?1 AND epoch_hash = ?2", "entries_waiting"),
        (
            "SELECT e.bytes FROM entries e JOIN feeds f ON f.feed = e.feed WHERE f.gid = ?1 AND e.class = 1",
            "entries_membership",
        ),
        ("SELECT max(id) FROM entries WHERE id > ?1 AND id <= ?2", "INTEGER PRIMARY KEY"),
    ] {
        let mut plan = db.raw().prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let bound = plan.parameter_count();
        let nulls = rusqlite::params_from_iter(std::iter::repeat_n(rusqlite::types::Null, bound));
        let steps: Vec<String> =
            plan.query_map(nulls, |row| row.get("detail")).unwrap().collect::<Result<_, _>>().unwrap();
        assert!(steps.iter().any(|step| step.contains(index)), "{sql}: {steps:?}");
        assert!(!steps.iter().any(|step| step.starts_with("SCAN e")), "{sql}: {steps:?}");
    }
}

#[test]
fn a_file_of_something_else_is_refused_and_left_alone() {
    let dir = TempDir::new().unwrap();
    let text = dir.path().join("text");
    fs::write(&text, "my diary ".repeat(1000)).unwrap();
    let other = dir.path().join("other");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE theirs (x); PRAGMA user_version = 1").unwrap();
    for path in [text, other] {
        let before = fs::read(&path).unwrap();
        let refused = try_open(&path).err();
        assert!(matches!(refused, Some(StoreError::NotADatabase)), "{refused:?}");
        assert_eq!(fs::read(&path).unwrap(), before);
    }
}

#[test]
fn a_file_of_a_newer_program_is_refused_and_left_alone() {
    let dir = TempDir::new().unwrap();
    open(dir.path()).close().unwrap();
    let path = dir.path().join("db");
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 7).unwrap();
    let before = fs::read(&path).unwrap();
    let refused = try_open(&path).err().unwrap();
    assert!(matches!(refused, StoreError::Newer { found: 7, known: 1 }), "{refused:?}");
    assert_eq!(refused.to_string(), "the database is of version 7, this program knows 1; update it");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn a_damaged_file_is_reported_and_never_made_anew() {
    let dir = TempDir::new().unwrap();
    let whole = filled(dir.path());
    let path = dir.path().join("db");
    let damage = |from: usize, bytes: &[u8]| {
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(&whole).unwrap();
        file.seek(SeekFrom::Start(from as u64)).unwrap();
        file.write_all(bytes).unwrap();
        drop(file);
        let found = try_open(&path).and_then(|db| db.read(|reader| reader.integrity())).err().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), whole.len() as u64, "nothing was cut or made anew");
        found
    };
    let header = damage(0, &[0; 100]);
    assert!(matches!(header, StoreError::NotADatabase), "{header:?}");
    let schema = damage(100, &[0xff; 400]);
    assert!(matches!(schema, StoreError::Corrupt(_)), "{schema:?}");
    let middle = damage(whole.len() / 2, &[0x55; 20_000]);
    assert!(matches!(middle, StoreError::Corrupt(_)), "{middle:?}");
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let cut = try_open(&path).and_then(|db| db.read(|reader| reader.integrity())).err().unwrap();
    assert!(matches!(cut, StoreError::Corrupt(_)), "{cut:?}");
    fs::write(&path, &whole).unwrap();
    try_open(&path).unwrap().read(|reader| reader.integrity()).unwrap();
}

#[test]
fn a_row_no_program_of_ours_wrote_is_reported() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice.clone() };
    db.write(|txn| txn.append(&group, &[entry(blob(1), "x")], &writer)).unwrap();
    db.raw().execute_batch("UPDATE entries SET hash = x'00'").unwrap();
    let found = db.read(|reader| reader.select(&group, sync_types::Scope::All, &reader.have(&group)?, &[]));
    assert!(matches!(found, Err(StoreError::Corrupt(_))), "{:?}", found.err());
    db.raw().execute_batch("UPDATE entries SET class = 9").unwrap();
    let found = db.read(|reader| {
        reader.read_after(&group, Cursor(0), ALL, &sync_core::Selection::everything(sync_types::Scope::All), None)
    });
    assert!(matches!(found, Err(StoreError::Corrupt(_))), "{:?}", found.err());
}

#[test]
fn a_home_that_is_not_there_or_cannot_be_written_says_so() {
    let dir = TempDir::new().unwrap();
    let missing = try_open(&dir.path().join("no/such/place")).err();
    assert!(matches!(missing, Some(StoreError::Io(_))), "{missing:?}");
    let mut db = open(dir.path());
    db.raw().pragma_update(None, "query_only", true).unwrap();
    let refused = db.write(|txn| txn.put_meta("key", b"value"));
    assert!(matches!(refused, Err(StoreError::ReadOnly)), "{refused:?}");
    let denied = StoreError::from(std::io::Error::from(std::io::ErrorKind::PermissionDenied));
    assert!(matches!(denied, StoreError::ReadOnly));
}

#[test]
fn a_file_another_process_writes_to_is_waited_for_then_reported() {
    let dir = TempDir::new().unwrap();
    let (mut one, mut other) = (open(dir.path()), open(dir.path()));
    other.raw().busy_timeout(Duration::from_millis(50)).unwrap();
    let txn = one.begin().unwrap();
    assert!(matches!(other.begin().err(), Some(StoreError::Busy)));
    txn.commit().unwrap();
    assert!(other.begin().is_ok());
}

#[test]
fn a_full_disk_stores_nothing_by_half_and_goes_on_once_there_is_room() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice.clone() };
    db.write(|txn| txn.append(&group, &[entry(blob(0), "before")], &writer)).unwrap();
    let limit = |db: &Db, pages: i64| {
        db.raw().pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
    };
    let used: i64 = db.raw().pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
    limit(&db, used + 8);
    let many: Vec<_> = (1..60).map(|n| entry(blob(n), vec![3; 3000])).collect();
    let full = db.write(|txn| txn.append(&group, &many, &writer));
    assert!(matches!(full, Err(StoreError::DiskFull)), "{full:?}");

    // beside others in one transaction it fails alone, or takes all with it: never a part
    let mut txn = db.begin().unwrap();
    let small = txn.attempt(|txn| txn.append(&group, &[entry(blob(100), "small")], &writer));
    let large = txn.attempt(|txn| txn.append(&group, &many, &writer));
    assert!(matches!(large, Err(StoreError::DiskFull)), "{large:?}");
    let committed = txn.commit();
    let stored = small.is_ok() && committed.is_ok();
    let read = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
    assert_eq!(read.entries.len(), 1 + usize::from(stored));
    db.read(|reader| reader.integrity()).unwrap();

    limit(&db, 100_000);
    let appended = db.write(|txn| txn.append(&group, &many, &writer)).unwrap();
    assert_eq!(appended[0].cursor, Cursor(read.max_cursor.0 + 1));
    assert_eq!(appended[58].number, Number(59 + read.max_cursor.0));
    drop(db);
    let mut db = open(dir.path());
    let retry = db.write(|txn| txn.append(&group, &[entry(BlobId(blob(1).0), vec![3; 3000])], &writer)).unwrap();
    assert!(retry[0].repeated);
}
