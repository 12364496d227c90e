//! Folders: where they are, the index of their files, and what was kept of them.
//!
//! Everything here is bytes and columns; the engine gives them meaning.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, Row, params};
use sync_types::{Cursor, FolderId, GroupId, Timestamp};

use super::convert::{signed, unsigned};
use super::{Reader, Txn};
use crate::error::StoreError;

/// A folder in this database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FolderRowId(pub(super) i64);

/// A path of a folder in this database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileRowId(pub(super) i64);

/// A kept version in this database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeptRowId(pub(super) i64);

impl KeptRowId {
    /// The number by which people name it.
    #[must_use]
    pub fn number(self) -> u64 {
        unsigned(self.0)
    }
}

/// A folder of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderRow {
    /// Names it here.
    pub fid: FolderRowId,
    /// Its group.
    pub group: GroupId,
    /// Its id in the group.
    pub id: FolderId,
    /// What it is called here.
    pub name: String,
    /// Where it lies on this device; none where it is not placed.
    pub root: Option<String>,
    /// The engine's settings.
    pub settings: String,
    /// The group's log up to here was taken into its files.
    pub cursor: Cursor,
}

/// What lay at a path when it was last looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskState {
    /// What it is.
    pub kind: u8,
    /// Bytes.
    pub size: u64,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
    /// Its inode.
    pub ino: u64,
    /// Its permission bits.
    pub mode: u32,
    /// BLAKE3 of its content.
    pub hash: Option<[u8; 32]>,
    /// What the version that it is has seen.
    pub vector: Vec<u8>,
}

/// What is known of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRow {
    /// Names it here.
    pub file: FileRowId,
    /// The path, as it is sorted.
    pub key: Vec<u8>,
    /// Its maximal versions.
    pub versions: Vec<u8>,
    /// What lay on disk.
    pub disk: Option<DiskState>,
    /// What the group says and what is on disk differ.
    pub pending: bool,
    /// The winner is not a deletion.
    pub live: bool,
    /// The winner's bytes.
    pub size: u64,
}

/// Where a chunk lies on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Where its folder lies; none where it is not placed.
    pub root: Option<String>,
    /// Its folder.
    pub fid: FolderRowId,
    /// Its file.
    pub key: Vec<u8>,
    /// Where in the file it begins.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Sums over a folder's files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FolderTotals {
    /// Paths where something is.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Paths where what the group says and what is on disk differ, deletions among them.
    pub pending_files: u64,
    /// Bytes of what is to be there.
    pub pending_bytes: u64,
    /// Those of `files` that this device does not take.
    pub left_out_files: u64,
    /// Bytes of them.
    pub left_out_bytes: u64,
}

/// A version about to be kept: what was replaced or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewKept {
    /// The path it was at.
    pub key: Vec<u8>,
    /// When it was replaced or removed.
    pub at: Timestamp,
    /// The file that holds it now.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of its content.
    pub hash: Option<[u8; 32]>,
    /// Its permission bits.
    pub mode: u32,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
    /// Why it is here.
    pub reason: u8,
    /// Its chunks, by hash, offset and length; none of a file that is one chunk.
    pub chunks: Vec<([u8; 32], u64, u64)>,
}

/// A version that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptRow {
    /// Names it here.
    pub kid: KeptRowId,
    /// The path it was at.
    pub key: Vec<u8>,
    /// When it was replaced or removed.
    pub at: Timestamp,
    /// The file that holds it now.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of its content.
    pub hash: Option<[u8; 32]>,
    /// Its permission bits.
    pub mode: u32,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
    /// Why it is here.
    pub reason: u8,
}

impl Txn<'_> {
    /// The folder of a group, known from now on; one already known stays as it is.
    pub fn add_folder(&mut self, group: &GroupId, id: &FolderId, name: &str) -> Result<FolderRowId, StoreError> {
        let conn = self.live()?;
        let gid = self.reader().gid(group)?;
        conn.prepare_cached("INSERT INTO folders (gid, id, name) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")?
            .execute((gid, id.0, name))?;
        let mut statement = conn.prepare_cached("SELECT fid FROM folders WHERE gid = ?1 AND id = ?2")?;
        Ok(FolderRowId(statement.query_row((gid, id.0), |row| row.get(0))?))
    }

    /// Says what a folder is called here.
    pub fn set_folder_name(&mut self, fid: FolderRowId, name: &str) -> Result<(), StoreError> {
        change_one(self.live()?, "UPDATE folders SET name = ?2 WHERE fid = ?1", params![fid.0, name])
    }

    /// Says where a folder lies on this device; none: nowhere.
    pub fn set_folder_root(&mut self, fid: FolderRowId, root: Option<&str>) -> Result<(), StoreError> {
        change_one(self.live()?, "UPDATE folders SET root = ?2 WHERE fid = ?1", params![fid.0, root])
    }

    /// Keeps the engine's settings of a folder.
    pub fn set_folder_settings(&mut self, fid: FolderRowId, settings: &str) -> Result<(), StoreError> {
        change_one(self.live()?, "UPDATE folders SET settings = ?2 WHERE fid = ?1", params![fid.0, settings])
    }

    /// Says up to where the group's log was taken into the folder's files.
    pub fn set_folder_cursor(&mut self, fid: FolderRowId, cursor: Cursor) -> Result<(), StoreError> {
        let values = params![fid.0, signed(cursor.0)];
        change_one(self.live()?, "UPDATE folders SET cursor = ?2 WHERE fid = ?1", values)
    }

    /// Forgets a folder with all its files, chunks and kept versions; the group's log stays.
    ///
    /// What a transaction removes weighs on memory: of a large folder [`remove_files`](Self::remove_files) comes first.
    pub fn remove_folder(&mut self, fid: FolderRowId) -> Result<(), StoreError> {
        self.live()?.prepare_cached("DELETE FROM folders WHERE fid = ?1")?.execute([fid.0])?;
        Ok(())
    }

    /// Forgets some of a folder's files; returns how many, none once all are gone.
    pub fn remove_files(&mut self, fid: FolderRowId, limit: usize) -> Result<usize, StoreError> {
        let conn = self.live()?;
        let mut gone = Sums::default();
        let sql = "SELECT live, size, pending, left_out FROM files WHERE fid = ?1 ORDER BY key LIMIT ?2";
        for before in conn.prepare_cached(sql)?.query_map((fid.0, rows(limit)), |row| counted(row, 0))? {
            gone.change(fid, before?, Counted::default());
        }
        let sql = "DELETE FROM files WHERE file IN (SELECT file FROM files WHERE fid = ?1 ORDER BY key LIMIT ?2)";
        let removed = conn.prepare_cached(sql)?.execute((fid.0, rows(limit)))?;
        self.sums.add(gone);
        Ok(removed)
    }

    /// Keeps all that is known of a path.
    #[expect(clippy::too_many_arguments, reason = "the columns of a row, each of them once")]
    pub fn put_file(
        &mut self,
        fid: FolderRowId,
        key: &[u8],
        versions: &[u8],
        live: bool,
        size: u64,
        disk: Option<&DiskState>,
        pending: bool,
    ) -> Result<FileRowId, StoreError> {
        let known = self.known(fid, key)?;
        let now =
            Counted { live, size: signed(size), pending, left_out: known.is_some_and(|(_, before)| before.left_out) };
        let file = match known {
            Some((file, before)) => {
                self.sums.change(fid, before, now);
                let sql = "UPDATE files SET versions = ?2, live = ?3, size = ?4, pending = ?5, disk_kind = ?6, \
                   disk_size = ?7, disk_mtime = ?8, disk_ino = ?9, disk_mode = ?10, disk_hash = ?11, disk_vector = ?12, \
                   whole = whole AND disk_hash IS ?11 WHERE file = ?1";
                let row = params![file.0, versions, live, now.size, pending];
                change_row(self.live()?, sql, row, disk)?;
                file
            }
            None => {
                self.sums.change(fid, Counted::default(), now);
                let sql = "INSERT INTO files (fid, key, versions, live, size, pending, disk_kind, disk_size, \
                   disk_mtime, disk_ino, disk_mode, disk_hash, disk_vector) \
                   VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)";
                let conn = self.live()?;
                change_row(conn, sql, params![fid.0, key, versions, live, now.size, pending], disk)?;
                FileRowId(conn.last_insert_rowid())
            }
        };
        Ok(file)
    }

    /// The row of a path, and what of it counts in the folder's sums.
    fn known(&self, fid: FolderRowId, key: &[u8]) -> Result<Option<(FileRowId, Counted)>, StoreError> {
        let sql = "SELECT file, live, size, pending, left_out FROM files WHERE fid = ?1 AND key = ?2";
        let mut statement = self.live()?.prepare_cached(sql)?;
        let found = statement.query_row((fid.0, key), |row| Ok((FileRowId(row.get(0)?), counted(row, 1)?)));
        Ok(found.optional()?)
    }

    /// The folder of a row, and what of it counts in the folder's sums.
    fn known_row(&self, file: FileRowId) -> Result<Option<(FolderRowId, Counted)>, StoreError> {
        let sql = "SELECT fid, live, size, pending, left_out FROM files WHERE file = ?1";
        let mut statement = self.live()?.prepare_cached(sql)?;
        let found = statement.query_row([file.0], |row| Ok((FolderRowId(row.get(0)?), counted(row, 1)?)));
        Ok(found.optional()?)
    }

    /// Brings the sums over folders' files up to date.
    pub(super) fn settle_sums(&mut self) -> Result<(), StoreError> {
        for (fid, sums) in std::mem::take(&mut self.sums).0 {
            let sql = "UPDATE folder_totals SET files = files + ?2, bytes_high = bytes_high + ?3, \
               bytes_low = bytes_low + ?4, pending_files = pending_files + ?5, pending_high = pending_high + ?6, \
               pending_low = pending_low + ?7, left_out_files = left_out_files + ?8, \
               left_out_high = left_out_high + ?9, left_out_low = left_out_low + ?10 WHERE fid = ?1";
            let [files, high, low, pending_files, pending_high, pending_low, left_out, out_high, out_low] = sums;
            let pending = params![pending_files, pending_high, pending_low];
            let values = [params![fid, files, high, low], pending, params![left_out, out_high, out_low]].concat();
            self.live()?.prepare_cached(sql)?.execute(&values[..])?;
        }
        Ok(())
    }

    /// Keeps what the group says of a path, and leaves what is known of the disk.
    pub fn put_versions(
        &mut self,
        fid: FolderRowId,
        key: &[u8],
        versions: &[u8],
        live: bool,
        size: u64,
        pending: bool,
    ) -> Result<FileRowId, StoreError> {
        let known = self.known(fid, key)?;
        let now =
            Counted { live, size: signed(size), pending, left_out: known.is_some_and(|(_, before)| before.left_out) };
        let (file, before) = known.unzip();
        self.sums.change(fid, before.unwrap_or_default(), now);
        let conn = self.live()?;
        if let Some(file) = file {
            let sql = "UPDATE files SET versions = ?2, live = ?3, size = ?4, pending = ?5 WHERE file = ?1";
            conn.prepare_cached(sql)?.execute(params![file.0, versions, live, now.size, pending])?;
            return Ok(file);
        }
        let sql = "INSERT INTO files (fid, key, versions, live, size, pending) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        conn.prepare_cached(sql)?.execute(params![fid.0, key, versions, live, now.size, pending])?;
        Ok(FileRowId(conn.last_insert_rowid()))
    }

    /// Keeps what lies on disk at a path, and leaves what the group says of it.
    pub fn set_disk(&mut self, file: FileRowId, disk: Option<&DiskState>, pending: bool) -> Result<(), StoreError> {
        if let Some((fid, before)) = self.known_row(file)? {
            self.sums.change(fid, before, Counted { pending, ..before });
        }
        let sql = "UPDATE files SET pending = ?2, disk_kind = ?3, disk_size = ?4, disk_mtime = ?5, disk_ino = ?6, \
             disk_mode = ?7, disk_hash = ?8, disk_vector = ?9, whole = whole AND disk_hash IS ?8 WHERE file = ?1";
        change_row(self.live()?, sql, params![file.0, pending], disk)
    }

    /// Says whether this device leaves a path out.
    pub fn set_left_out(&mut self, file: FileRowId, left_out: bool) -> Result<(), StoreError> {
        if let Some((fid, before)) = self.known_row(file)? {
            self.sums.change(fid, before, Counted { left_out, ..before });
        }
        change_one(self.live()?, "UPDATE files SET left_out = ?2 WHERE file = ?1", params![file.0, left_out])
    }

    /// Forgets a path and its chunks.
    pub fn remove_file(&mut self, file: FileRowId) -> Result<(), StoreError> {
        if let Some((fid, before)) = self.known_row(file)? {
            self.sums.change(fid, before, Counted::default());
        }
        self.live()?.prepare_cached("DELETE FROM files WHERE file = ?1")?.execute([file.0])?;
        Ok(())
    }

    /// Keeps which chunks lie in a file, by hash, offset and length, in place of those known before.
    ///
    /// Where the only chunk is all that lies on disk, the file's own hash finds it, and it takes no row.
    pub fn put_chunks(&mut self, file: FileRowId, chunks: &[([u8; 32], u64, u64)]) -> Result<(), StoreError> {
        let conn = self.live()?;
        conn.prepare_cached("DELETE FROM chunks WHERE file = ?1")?.execute([file.0])?;
        if let [(hash, 0, len)] = chunks {
            let sql = "UPDATE files SET whole = 1 WHERE file = ?1 AND disk_hash = ?2 AND disk_size = ?3";
            if conn.prepare_cached(sql)?.execute((file.0, hash, signed(*len)))? > 0 {
                return Ok(());
            }
        }
        conn.prepare_cached("UPDATE files SET whole = 0 WHERE file = ?1 AND whole")?.execute([file.0])?;
        if chunks.is_empty() {
            return Ok(());
        }
        let mut statement = conn.prepare_cached(
            "INSERT INTO chunks (hash, fid, file, offset, len) \
             VALUES (?1, (SELECT fid FROM files WHERE file = ?2), ?2, ?3, ?4)",
        )?;
        for (hash, offset, len) in chunks {
            statement.execute((hash, file.0, signed(*offset), signed(*len)))?;
        }
        Ok(())
    }

    /// Remembers a version that was replaced or removed.
    pub fn add_kept(&mut self, fid: FolderRowId, kept: &NewKept) -> Result<KeptRowId, StoreError> {
        let mut statement = self.live()?.prepare_cached(
            "INSERT INTO kept (fid, key, at, name, size, hash, mode, mtime, reason) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) RETURNING kid",
        )?;
        let NewKept { key, at, name, size, hash, mode, mtime, reason, chunks } = kept;
        let values = params![fid.0, key, signed(at.0), name, signed(*size), hash, mode, mtime, reason];
        let kid: i64 = statement.query_row(values, |row| row.get(0))?;
        let sql = "INSERT OR IGNORE INTO kept_chunks (hash, kid, offset, len) VALUES (?1, ?2, ?3, ?4)";
        let mut statement = self.live()?.prepare_cached(sql)?;
        for (hash, offset, len) in chunks {
            statement.execute(params![hash, kid, signed(*offset), signed(*len)])?;
        }
        Ok(KeptRowId(kid))
    }

    /// Forgets a kept version.
    pub fn remove_kept(&mut self, kid: KeptRowId) -> Result<(), StoreError> {
        self.live()?.prepare_cached("DELETE FROM kept WHERE kid = ?1")?.execute([kid.0])?;
        Ok(())
    }
}

/// Columns of sums over a folder's files.
const SUMS: usize = 9;

/// What of a row counts in the sums over a folder's files.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    live: bool,
    size: i64,
    pending: bool,
    left_out: bool,
}

impl Counted {
    /// Files, and the halves of their bytes, so that no sum overflows; the same of those that are pending, and of those
    /// that are left out.
    fn sums(self) -> [i64; SUMS] {
        let [live, pending, out] = [self.live, self.pending, self.left_out].map(i64::from);
        let (high, low) = (live * (self.size >> 32), live * (self.size & 0xffff_ffff));
        [live, high, low, pending, pending * high, pending * low, out * live, out * high, out * low]
    }
}

fn counted(row: &Row<'_>, from: usize) -> rusqlite::Result<Counted> {
    let [live, pending, left_out] = [row.get(from)?, row.get(from + 2)?, row.get(from + 3)?];
    Ok(Counted { live, size: row.get(from + 1)?, pending, left_out })
}

/// What a transaction adds to the sums over folders' files.
///
/// Triggers would do it too, but with one of them SQLite copies every page a statement writes to, to take it back alone.
#[derive(Debug, Default)]
pub(super) struct Sums(BTreeMap<i64, [i64; SUMS]>);

impl Sums {
    fn change(&mut self, fid: FolderRowId, before: Counted, now: Counted) {
        let (before, now) = (before.sums(), now.sums());
        let sums = self.0.entry(fid.0).or_default();
        for ((sum, before), now) in sums.iter_mut().zip(before).zip(now) {
            *sum += now - before;
        }
    }

    fn add(&mut self, other: Self) {
        for (fid, more) in other.0 {
            let sums = self.0.entry(fid).or_default();
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
    }
}

/// A statement about rows of the table `files`, read by [`file_row`].
macro_rules! select_files {
    ($rest:literal) => {
        concat!(
            "SELECT file, key, versions, pending, live, size, disk_kind, disk_size, disk_mtime, disk_ino, disk_mode, ",
            "disk_hash, disk_vector FROM files ",
            $rest
        )
    };
}

/// A statement about rows of the table `folders`, read by [`folder_row`].
macro_rules! select_folders {
    ($rest:literal) => {
        concat!(
            "SELECT f.fid, g.id, f.id, f.name, f.root, f.settings, f.cursor ",
            "FROM folders f JOIN groups g ON g.gid = f.gid ",
            $rest
        )
    };
}

/// A statement about rows of the table `kept`, read by [`kept_row`].
macro_rules! select_kept {
    ($rest:literal) => {
        concat!("SELECT kid, key, at, name, size, hash, mode, mtime, reason FROM kept ", $rest)
    };
}

impl Reader<'_> {
    /// Every folder of this home, in the order they came.
    pub fn folders(&self) -> Result<Vec<FolderRow>, StoreError> {
        let mut statement = self.conn.prepare_cached(select_folders!("ORDER BY f.fid"))?;
        Ok(statement.query_map([], folder_row)?.collect::<Result<_, _>>()?)
    }

    /// A folder of a group.
    pub fn folder(&self, group: &GroupId, id: &FolderId) -> Result<Option<FolderRow>, StoreError> {
        let mut statement = self.conn.prepare_cached(select_folders!("WHERE f.gid = ?1 AND f.id = ?2"))?;
        Ok(statement.query_row((self.gid(group)?, id.0), folder_row).optional()?)
    }

    /// What is known of a path.
    pub fn file(&self, fid: FolderRowId, key: &[u8]) -> Result<Option<FileRow>, StoreError> {
        let mut statement = self.conn.prepare_cached(select_files!("WHERE fid = ?1 AND key = ?2"))?;
        Ok(statement.query_row((fid.0, key), file_row).optional()?)
    }

    /// A folder's paths in the order of their keys, from the one after `after`; fewer than `limit` are the last ones.
    pub fn files_after(
        &self,
        fid: FolderRowId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<FileRow>, StoreError> {
        let sql = select_files!("WHERE fid = ?1 AND key >= ?2 ORDER BY key LIMIT ?3");
        self.files(sql, params![fid.0, following(after), rows(limit)])
    }

    /// The same, but no more once the versions of the rows have so many bytes together; and whether these are the last ones.
    pub fn files_within(
        &self,
        fid: FolderRowId,
        after: Option<&[u8]>,
        limit: usize,
        bytes: usize,
    ) -> Result<(Vec<FileRow>, bool), StoreError> {
        let sql = select_files!("WHERE fid = ?1 AND key >= ?2 ORDER BY key LIMIT ?3");
        let mut statement = self.conn.prepare_cached(sql)?;
        let (mut found, mut held) = (Vec::new(), 0);
        for row in statement.query_map(params![fid.0, following(after), rows(limit)], file_row)? {
            let row = row?;
            held += row.versions.len();
            found.push(row);
            if held >= bytes {
                return Ok((found, false));
            }
        }
        let ended = found.len() < limit;
        Ok((found, ended))
    }

    /// The paths below a directory, whose key is `prefix`; otherwise like [`files_after`](Self::files_after).
    pub fn files_below(
        &self,
        fid: FolderRowId,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<FileRow>, StoreError> {
        let (first, end) = ([prefix, &[0]].concat(), [prefix, &[1]].concat());
        let sql = select_files!("WHERE fid = ?1 AND key >= ?2 AND key < ?3 ORDER BY key LIMIT ?4");
        self.files(sql, params![fid.0, following(after).max(first), end, rows(limit)])
    }

    /// The paths where what the group says and what is on disk differ; otherwise like
    /// [`files_after`](Self::files_after).
    pub fn pending_after(
        &self,
        fid: FolderRowId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<FileRow>, StoreError> {
        let sql = select_files!(
            "INDEXED BY files_pending WHERE fid = ?1 AND pending > 0 AND key >= ?2 ORDER BY key LIMIT ?3"
        );
        self.files(sql, params![fid.0, following(after), rows(limit)])
    }

    /// The paths of a folder at which content of this hash lies on disk.
    pub fn files_by_hash(&self, fid: FolderRowId, hash: &[u8; 32], limit: usize) -> Result<Vec<FileRow>, StoreError> {
        let sql = select_files!(
            "INDEXED BY files_by_hash \
             WHERE fid = ?1 AND substr(disk_hash, 1, 8) = substr(?2, 1, 8) AND disk_hash = ?2 LIMIT ?3"
        );
        self.files(sql, params![fid.0, hash, rows(limit)])
    }

    fn files(&self, sql: &str, values: &[&dyn rusqlite::ToSql]) -> Result<Vec<FileRow>, StoreError> {
        let mut statement = self.conn.prepare_cached(sql)?;
        Ok(statement.query_map(values, file_row)?.collect::<Result<_, _>>()?)
    }

    /// Where a chunk lies on disk, in folders of this group alone; those that are placed come first.
    pub fn chunk_places(&self, group: &GroupId, hash: &[u8; 32], limit: usize) -> Result<Vec<ChunkPlace>, StoreError> {
        let mut folders =
            self.conn.prepare_cached("SELECT fid, root FROM folders WHERE gid = ?1 ORDER BY root IS NULL, fid")?;
        let mut cut = self.conn.prepare_cached(
            "SELECT f.key, c.offset, c.len FROM chunks c CROSS JOIN files f ON f.file = c.file \
             WHERE c.hash = ?2 AND c.fid = ?1 LIMIT ?3",
        )?;
        let mut whole = self.conn.prepare_cached(
            "SELECT key, 0, disk_size FROM files INDEXED BY files_by_hash \
             WHERE fid = ?1 AND substr(disk_hash, 1, 8) = substr(?2, 1, 8) AND disk_hash = ?2 AND whole LIMIT ?3",
        )?;
        let mut places = Vec::new();
        let mut rows_of = folders.query([self.gid(group)?])?;
        while let Some(row) = rows_of.next()? {
            let (fid, root): (i64, Option<String>) = (row.get(0)?, row.get(1)?);
            let place = |row: &Row<'_>| {
                let (offset, len) = (unsigned(row.get(1)?), unsigned(row.get(2)?));
                Ok(ChunkPlace { root: root.clone(), fid: FolderRowId(fid), key: row.get(0)?, offset, len })
            };
            for found in cut.query_map(params![fid, hash, rows(limit - places.len())], place)? {
                places.push(found?);
            }
            for found in whole.query_map(params![fid, hash, rows(limit - places.len())], place)? {
                places.push(found?);
            }
            if places.len() >= limit {
                break;
            }
        }
        Ok(places)
    }

    /// The chunks that lie in a file, by offset and length, in order.
    pub fn chunks_of(&self, file: FileRowId) -> Result<Vec<(u64, u64)>, StoreError> {
        Ok(self.chunk_list(file)?.into_iter().map(|(_, offset, len)| (offset, len)).collect())
    }

    /// The chunks that lie in a file, as [`Txn::put_chunks`] was given them, in order.
    pub fn chunk_list(&self, file: FileRowId) -> Result<Vec<([u8; 32], u64, u64)>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT disk_hash, 0 AS offset, disk_size FROM files WHERE file = ?1 AND whole \
             UNION ALL SELECT hash, offset, len FROM chunks WHERE file = ?1 ORDER BY offset",
        )?;
        let found = statement
            .query_map([file.0], |row| Ok((row.get(0)?, unsigned(row.get(1)?), unsigned(row.get(2)?))))?
            .collect::<Result<_, _>>()?;
        Ok(found)
    }

    /// The sums over a folder's files; zeros for a folder that is gone.
    pub fn folder_totals(&self, fid: FolderRowId) -> Result<FolderTotals, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT files, bytes_high, bytes_low, pending_files, pending_high, pending_low, left_out_files, \
             left_out_high, left_out_low FROM folder_totals WHERE fid = ?1",
        )?;
        let totals = statement.query_row([fid.0], |row| {
            Ok(FolderTotals {
                files: unsigned(row.get(0)?),
                bytes: joined(row.get(1)?, row.get(2)?),
                pending_files: unsigned(row.get(3)?),
                pending_bytes: joined(row.get(4)?, row.get(5)?),
                left_out_files: unsigned(row.get(6)?),
                left_out_bytes: joined(row.get(7)?, row.get(8)?),
            })
        });
        Ok(totals.optional()?.unwrap_or_default())
    }

    /// The kept versions of a path, newest first.
    pub fn kept(&self, fid: FolderRowId, key: &[u8]) -> Result<Vec<KeptRow>, StoreError> {
        let sql = select_kept!("WHERE fid = ?1 AND key = ?2 ORDER BY at DESC, kid DESC");
        let mut statement = self.conn.prepare_cached(sql)?;
        Ok(statement.query_map((fid.0, key), kept_row)?.collect::<Result<_, _>>()?)
    }

    /// The chunks of a kept version, as [`NewKept::chunks`] had them, in order.
    pub fn kept_chunks(&self, kid: KeptRowId) -> Result<Vec<([u8; 32], u64, u64)>, StoreError> {
        let sql = "SELECT hash, offset, len FROM kept_chunks WHERE kid = ?1 ORDER BY offset";
        let chunk = |row: &Row<'_>| Ok((row.get(0)?, unsigned(row.get(1)?), unsigned(row.get(2)?)));
        Ok(self.conn.prepare_cached(sql)?.query_map([kid.0], chunk)?.collect::<Result<_, _>>()?)
    }

    /// Where a chunk lies among the kept versions of a group's folders, at most `limit` places: the version, where in it
    /// the chunk begins, and its length.
    pub fn kept_places(
        &self,
        group: &GroupId,
        hash: &[u8; 32],
        limit: usize,
    ) -> Result<Vec<(FolderRowId, KeptRow, u64, u64)>, StoreError> {
        let mut folders = self.conn.prepare_cached("SELECT fid FROM folders WHERE gid = ?1 ORDER BY fid")?;
        let mut cut = self.conn.prepare_cached(
            "SELECT k.kid, k.key, k.at, k.name, k.size, k.hash, k.mode, k.mtime, k.reason, c.offset, c.len \
             FROM kept_chunks c CROSS JOIN kept k ON k.kid = c.kid WHERE c.hash = ?2 AND k.fid = ?1 LIMIT ?3",
        )?;
        let mut whole = self.conn.prepare_cached(
            "SELECT kid, key, at, name, size, hash, mode, mtime, reason, 0, size FROM kept INDEXED BY kept_by_hash \
             WHERE fid = ?1 AND hash IS NOT NULL AND substr(hash, 1, 8) = substr(?2, 1, 8) AND hash = ?2 LIMIT ?3",
        )?;
        let mut places = Vec::new();
        for fid in folders.query_map([self.gid(group)?], |row| row.get::<_, i64>(0))? {
            let fid = fid?;
            let place =
                |row: &Row<'_>| Ok((FolderRowId(fid), kept_row(row)?, unsigned(row.get(9)?), unsigned(row.get(10)?)));
            for found in cut.query_map(params![fid, hash, rows(limit - places.len())], place)? {
                places.push(found?);
            }
            for found in whole.query_map(params![fid, hash, rows(limit - places.len())], place)? {
                places.push(found?);
            }
            if places.len() >= limit {
                break;
            }
        }
        Ok(places)
    }

    /// A folder's kept versions, oldest first, from the one after `after`; fewer than `limit` are the last ones.
    pub fn kept_oldest(
        &self,
        fid: FolderRowId,
        after: Option<(Timestamp, KeptRowId)>,
        limit: usize,
    ) -> Result<Vec<KeptRow>, StoreError> {
        let sql = select_kept!("WHERE fid = ?1 AND (at, kid) > (?2, ?3) ORDER BY at, kid LIMIT ?4");
        let (at, kid) = after.map_or((i64::MIN, i64::MIN), |(at, kid)| (signed(at.0), kid.0));
        let mut statement = self.conn.prepare_cached(sql)?;
        Ok(statement.query_map((fid.0, at, kid, rows(limit)), kept_row)?.collect::<Result<_, _>>()?)
    }

    /// When the newest kept version of a folder was kept; none if there are none.
    pub fn kept_newest(&self, fid: FolderRowId) -> Result<Option<Timestamp>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT max(at) FROM kept WHERE fid = ?1")?;
        let newest: Option<i64> = statement.query_row([fid.0], |row| row.get(0))?;
        Ok(newest.map(|at| Timestamp(unsigned(at))))
    }

    /// Bytes of all kept versions of a folder.
    pub fn kept_bytes(&self, fid: FolderRowId) -> Result<u64, StoreError> {
        let sql = "SELECT coalesce(sum(size >> 32), 0), coalesce(sum(size & 0xffffffff), 0) FROM kept WHERE fid = ?1";
        let mut statement = self.conn.prepare_cached(sql)?;
        Ok(statement.query_row([fid.0], |row| Ok(joined(row.get(0)?, row.get(1)?)))?)
    }
}

/// Changes exactly one row; a caller that names another has kept what was removed.
fn change_one(conn: &Connection, sql: &str, values: &[&dyn rusqlite::ToSql]) -> Result<(), StoreError> {
    match conn.prepare_cached(sql)?.execute(values)? {
        1 => Ok(()),
        other => Err(rusqlite::Error::StatementChangedRows(other).into()),
    }
}

/// Runs a statement that changes a row, whose last parameters are what lies on disk.
fn change_row(
    conn: &Connection,
    sql: &str,
    row: &[&dyn rusqlite::ToSql],
    disk: Option<&DiskState>,
) -> Result<(), StoreError> {
    let disk = params![
        disk.map(|disk| disk.kind),
        disk.map(|disk| signed(disk.size)),
        disk.map(|disk| disk.mtime),
        disk.map(|disk| disk.ino.cast_signed()),
        disk.map(|disk| disk.mode),
        disk.and_then(|disk| disk.hash),
        disk.map(|disk| &disk.vector),
    ];
    change_one(conn, sql, &[row, disk].concat())
}

/// The first key that follows another, or the first of all.
fn following(key: Option<&[u8]>) -> Vec<u8> {
    key.map(|key| [key, &[0]].concat()).unwrap_or_default()
}

/// A number of rows as SQL has it.
fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// A sum from those of its upper and lower halves.
fn joined(high: i64, low: i64) -> u64 {
    let sum = (u128::from(unsigned(high)) << 32) + u128::from(unsigned(low));
    u64::try_from(sum).unwrap_or(u64::MAX)
}

fn folder_row(row: &Row<'_>) -> rusqlite::Result<FolderRow> {
    Ok(FolderRow {
        fid: FolderRowId(row.get(0)?),
        group: GroupId(row.get(1)?),
        id: FolderId(row.get(2)?),
        name: row.get(3)?,
        root: row.get(4)?,
        settings: row.get(5)?,
        cursor: Cursor(unsigned(row.get(6)?)),
    })
}

fn file_row(row: &Row<'_>) -> rusqlite::Result<FileRow> {
    let disk = match row.get(6)? {
        None => None,
        Some(kind) => Some(DiskState {
            kind,
            size: unsigned(row.get(7)?),
            mtime: row.get(8)?,
            ino: row.get::<_, i64>(9)?.cast_unsigned(),
            mode: row.get(10)?,
            hash: row.get(11)?,
            vector: row.get(12)?,
        }),
    };
    Ok(FileRow {
        file: FileRowId(row.get(0)?),
        key: row.get(1)?,
        versions: row.get(2)?,
        disk,
        pending: row.get(3)?,
        live: row.get(4)?,
        size: unsigned(row.get(5)?),
    })
}

fn kept_row(row: &Row<'_>) -> rusqlite::Result<KeptRow> {
    Ok(KeptRow {
        kid: KeptRowId(row.get(0)?),
        key: row.get(1)?,
        at: Timestamp(unsigned(row.get(2)?)),
        name: row.get(3)?,
        size: unsigned(row.get(4)?),
        hash: row.get(5)?,
        mode: row.get(6)?,
        mtime: row.get(7)?,
        reason: row.get(8)?,
    })
}
