//! Snapshots of folders: which entries were taken in, what snapshots cover of them, and dropping that.
//!
//! A dropped number still counts as held: `have` claims it, and nobody asks for it. What proves it is the hash at the end
//! of each range of dropped numbers, and the envelope at the end of what is covered of a feed, which is never dropped.

use rusqlite::{Connection, OptionalExtension, params};
use sync_core::{DroppedRange, RangeSet};
use sync_types::{AuthorId, Class, Cursor, EnvelopeHash, GroupId, Number, Range};

use super::cache::{self, Feed, held_at, write_head, write_ranges};
use super::convert::{MAX_NUMBER, cursor_of, row_id, signed, unsigned};
use super::folders::FolderRowId;
use super::{Change, Reader, Txn};
use crate::error::StoreError;

/// A snapshot in this database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotRowId(i64);

/// How far a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotState {
    /// It is being written here.
    Written,
    /// It was told, and is not complete here.
    Told,
    /// All of it is here, and the index agrees with it.
    Complete,
    /// It does not say what the log says.
    Refused,
}

impl SnapshotState {
    const fn column(self) -> i64 {
        match self {
            Self::Written => 0,
            Self::Told => 1,
            Self::Complete => 2,
            Self::Refused => 3,
        }
    }

    fn of(column: i64) -> Result<Self, StoreError> {
        let all = [Self::Written, Self::Told, Self::Complete, Self::Refused];
        let state = all.into_iter().find(|state| state.column() == column);
        state.ok_or_else(|| StoreError::corrupt("a snapshot in an unknown state"))
    }
}

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRow {
    /// Names it here.
    pub sid: SnapshotRowId,
    /// Author and number of its entry; none until it is told.
    pub entry: Option<(AuthorId, Number)>,
    /// How far it is.
    pub state: SnapshotState,
    /// The key of the last path that was taken in from it.
    pub taken: Option<Vec<u8>>,
    /// What its entry says.
    pub body: Vec<u8>,
}

/// A piece of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotChunk {
    /// How its bytes are packed.
    pub codec: u8,
    /// Bytes of the piece itself.
    pub len: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What was taken into a folder since its last snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Since {
    /// Entries.
    pub entries: u64,
    /// Records in them.
    pub records: u64,
}

/// What of a folder's stream is in the log, and what is not any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compaction {
    /// Entries of all feeds of the group that are here.
    pub entries: u64,
    /// Bytes of their envelopes.
    pub bytes: u64,
    /// Entries that were dropped, or never were here because a snapshot covers them.
    pub dropped: u64,
}

/// What was dropped at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Entries.
    pub entries: usize,
    /// Bytes of their envelopes.
    pub bytes: u64,
}

/// What is here of a range of entries that somebody says are a folder's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RangeHere {
    /// Some of it is not here, or was dropped from here and never taken into this folder.
    pub lacks: bool,
    /// Some of it was dropped from here as another folder's.
    pub elsewhere: bool,
}

/// An entry that is here, in a range that somebody says is a folder's, and was not taken into that folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untaken {
    /// Its number.
    pub number: Number,
    /// Whether its epoch is known.
    pub readable: bool,
    /// The envelope.
    pub bytes: Vec<u8>,
}

impl Txn<'_> {
    /// Notes that an entry of a folder's stream was taken into its files; false if that was noted before.
    pub fn note_taken(
        &mut self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        number: Number,
        records: usize,
    ) -> Result<bool, StoreError> {
        let feed =
            self.reader().feed_id(group, author)?.ok_or_else(|| StoreError::corrupt("an entry without a feed"))?;
        let conn = self.live()?;
        if !add_run(conn, fid, feed, Range { first: number, last: number })? {
            return Ok(false);
        }
        conn.prepare_cached(
            "UPDATE folders SET since_entries = min(since_entries, 0x3fffffffffffffff) + 1, since_records = since_records + ?2 WHERE fid = ?1",
        )?
        .execute((fid.0, signed(records as u64)))?;
        Ok(true)
    }

    /// Remembers a snapshot: one whose entry was told, or one that is about to be written.
    pub fn add_snapshot(
        &mut self,
        fid: FolderRowId,
        group: &GroupId,
        entry: Option<(AuthorId, Number)>,
        body: &[u8],
    ) -> Result<SnapshotRowId, StoreError> {
        let feed = match entry {
            Some((author, _)) => self.reader().feed_id(group, &author)?,
            None => None,
        };
        let state = if entry.is_some() { SnapshotState::Told } else { SnapshotState::Written };
        let mut statement = self.live()?.prepare_cached(
            "INSERT INTO snapshots (fid, feed, number, state, body) VALUES (?1, ?2, ?3, ?4, ?5) RETURNING sid",
        )?;
        let number = entry.map(|(_, number)| signed(number.0));
        let values = params![fid.0, feed, number, state.column(), body];
        Ok(SnapshotRowId(statement.query_row(values, |row| row.get(0))?))
    }

    /// Says under which entry a snapshot that was written here was told, and what the entry says.
    pub fn set_snapshot_entry(
        &mut self,
        sid: SnapshotRowId,
        group: &GroupId,
        (author, number): (AuthorId, Number),
        body: &[u8],
    ) -> Result<(), StoreError> {
        let feed = self.reader().feed_id(group, &author)?;
        let sql = "UPDATE snapshots SET feed = ?2, number = ?3, state = ?4, body = ?5 WHERE sid = ?1 AND state = ?6";
        let (written, told) = (SnapshotState::Written.column(), SnapshotState::Told.column());
        let values = params![sid.0, feed, signed(number.0), told, body, written];
        one(self.live()?.prepare_cached(sql)?.execute(values)?)
    }

    /// Says that a snapshot does not say what the log says: it needs no pieces any more.
    pub fn refuse_snapshot(&mut self, sid: SnapshotRowId) -> Result<(), StoreError> {
        let conn = self.live()?;
        let sql = "UPDATE snapshots SET state = ?2, taken = NULL WHERE sid = ?1";
        conn.prepare_cached(sql)?.execute((sid.0, SnapshotState::Refused.column()))?;
        conn.prepare_cached("DELETE FROM snapshot_needs WHERE sid = ?1")?.execute([sid.0])?;
        Ok(())
    }

    /// Notes up to which key a snapshot's rows were taken in.
    pub fn set_snapshot_taken(&mut self, sid: SnapshotRowId, key: &[u8]) -> Result<(), StoreError> {
        let sql = "UPDATE snapshots SET taken = ?2 WHERE sid = ?1 AND state = ?3 AND taken IS NOT NULL";
        one(self.live()?.prepare_cached(sql)?.execute((sid.0, key, SnapshotState::Told.column()))?)
    }

    /// Forgets a snapshot; its pieces go with [`trim_snapshot_chunks`](Self::trim_snapshot_chunks).
    pub fn remove_snapshot(&mut self, sid: SnapshotRowId) -> Result<(), StoreError> {
        self.live()?.prepare_cached("DELETE FROM snapshots WHERE sid = ?1")?.execute([sid.0])?;
        Ok(())
    }

    /// A snapshot is about to be taken in: what it covers of the log is not taken in any more.
    pub fn begin_adoption(
        &mut self,
        fid: FolderRowId,
        sid: SnapshotRowId,
        group: &GroupId,
        covered: &[(AuthorId, Number)],
    ) -> Result<(), StoreError> {
        let sql = "UPDATE snapshots SET taken = x'' WHERE sid = ?1 AND fid = ?2 AND state = ?3 AND taken IS NULL";
        one(self.live()?.prepare_cached(sql)?.execute((sid.0, fid.0, SnapshotState::Told.column()))?)?;
        self.cover(fid, group, covered, false)
    }

    fn cover(
        &mut self,
        fid: FolderRowId,
        group: &GroupId,
        covered: &[(AuthorId, Number)],
        compared: bool,
    ) -> Result<(), StoreError> {
        for (author, number) in covered {
            let change = self.change(group)?;
            let feed = change.group.feed(change.conn, *author, false)?.row;
            self.live()?
                .prepare_cached(
                    "INSERT INTO folder_covered (fid, feed, last, compared) VALUES (?1, ?2, ?3, ?4) \
                     ON CONFLICT (fid, feed) DO UPDATE \
                     SET last = max(last, excluded.last), compared = max(compared, excluded.compared)",
                )?
                .execute((fid.0, feed, signed(number.0), if compared { signed(number.0) } else { 0 }))?;
        }
        Ok(())
    }

    /// A snapshot is all here, the index agrees with it, and it covers these feeds up to these numbers. What it covers may
    /// be dropped if it was `compared` with what the log says. Fails, and changes nothing, unless it was told and is here.
    pub fn complete_snapshot(
        &mut self,
        fid: FolderRowId,
        sid: SnapshotRowId,
        group: &GroupId,
        covered: &[(AuthorId, Number)],
        compared: bool,
    ) -> Result<(), StoreError> {
        let (told, complete) = (SnapshotState::Told.column(), SnapshotState::Complete.column());
        let sql = "UPDATE snapshots SET state = ?3, taken = NULL WHERE sid = ?1 AND fid = ?2 AND state = ?4";
        one(self.live()?.prepare_cached(sql)?.execute((sid.0, fid.0, complete, told))?)?;
        self.cover(fid, group, covered, compared)?;
        let conn = self.live()?;
        conn.prepare_cached(
            "UPDATE folders SET since_records = 0, since_entries = (\
               SELECT coalesce(sum(r.last - max(r.first, coalesce(c.last, 0) + 1) + 1), 0) \
               FROM folder_runs r LEFT JOIN folder_covered c ON c.fid = r.fid AND c.feed = r.feed \
               WHERE r.fid = ?1 AND r.last > coalesce(c.last, 0)) WHERE fid = ?1",
        )?
        .execute([fid.0])?;
        Ok(())
    }

    /// Has a snapshot of a folder written as soon as can be, also after a restart.
    pub fn call_for_snapshot(&mut self, fid: FolderRowId) -> Result<(), StoreError> {
        let sql = "UPDATE folders SET since_entries = ?2 WHERE fid = ?1";
        self.live()?.prepare_cached(sql)?.execute((fid.0, CALLED_FOR))?;
        Ok(())
    }

    /// Keeps a piece of a snapshot.
    pub fn put_snapshot_chunk(
        &mut self,
        fid: FolderRowId,
        sid: SnapshotRowId,
        hash: &[u8; 32],
        chunk: &SnapshotChunk,
    ) -> Result<(), StoreError> {
        let SnapshotChunk { codec, len, bytes } = chunk;
        self.live()?
            .prepare_cached(
                "INSERT INTO snapshot_chunks (fid, hash, codec, len, bytes) VALUES (?1, ?2, ?3, ?4, ?5) \
                 ON CONFLICT (hash, fid) DO NOTHING",
            )?
            .execute(params![fid.0, hash, codec, len, bytes])?;
        self.need_snapshot_chunk(sid, hash)
    }

    /// Says that a snapshot needs a piece, unless the snapshot was forgotten meanwhile.
    fn need_snapshot_chunk(&mut self, sid: SnapshotRowId, hash: &[u8; 32]) -> Result<(), StoreError> {
        let sql = "INSERT INTO snapshot_needs (sid, hash) SELECT sid, ?2 FROM snapshots WHERE sid = ?1 \
             ON CONFLICT (sid, hash) DO NOTHING";
        self.live()?.prepare_cached(sql)?.execute((sid.0, hash))?;
        Ok(())
    }

    /// Forgets a piece that is not what its hash says, so that it is fetched once more.
    pub fn remove_snapshot_chunk(&mut self, fid: FolderRowId, hash: &[u8; 32]) -> Result<(), StoreError> {
        let sql = "DELETE FROM snapshot_chunks WHERE hash = ?1 AND fid = ?2";
        self.live()?.prepare_cached(sql)?.execute((hash, fid.0))?;
        Ok(())
    }

    /// Says that a piece that is here is needed by a snapshot; false if it is not here.
    pub fn claim_snapshot_chunk(
        &mut self,
        fid: FolderRowId,
        sid: SnapshotRowId,
        hash: &[u8; 32],
    ) -> Result<bool, StoreError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM snapshot_chunks WHERE hash = ?1 AND fid = ?2)";
        let is_here: bool = self.live()?.prepare_cached(sql)?.query_row((hash, fid.0), |row| row.get(0))?;
        if is_here {
            self.need_snapshot_chunk(sid, hash)?;
        }
        Ok(is_here)
    }

    /// Removes some pieces that no snapshot needs; returns how many, none once all are gone.
    pub fn trim_snapshot_chunks(&mut self, fid: FolderRowId, limit: usize) -> Result<usize, StoreError> {
        let sql = "DELETE FROM snapshot_chunks WHERE id IN (\
             SELECT c.id FROM snapshot_chunks c WHERE c.fid = ?1 AND NOT EXISTS (\
               SELECT 1 FROM snapshot_needs n JOIN snapshots s ON s.sid = n.sid \
               WHERE n.hash = c.hash AND s.fid = c.fid) LIMIT ?2)";
        Ok(self.live()?.prepare_cached(sql)?.execute((fid.0, signed(limit as u64)))?)
    }

    /// Counts what is not here of ranges as held without its envelopes, and as taken in; with each the hash at its end. An
    /// envelope that is here stays what it is: only who has read it knows whose it is.
    pub fn adopt_ranges(
        &mut self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        ranges: &[(Range, EnvelopeHash)],
    ) -> Result<(), StoreError> {
        self.change(group)?.adopt_ranges(fid, *author, ranges)
    }

    /// Notes that an entry that a snapshot which was taken in covers, and that is here, was read and is one of the folder's.
    pub fn note_covered(
        &mut self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        number: Number,
    ) -> Result<(), StoreError> {
        let feed =
            self.reader().feed_id(group, author)?.ok_or_else(|| StoreError::corrupt("an entry without a feed"))?;
        add_run(self.live()?, fid, feed, Range { first: number, last: number })?;
        Ok(())
    }

    /// Drops entries that snapshots of a folder cover which were compared, at most `limit`; none once all are gone.
    ///
    /// Of each feed these stay: the last one that is covered, what is not sealed, what nobody else has acknowledged, and
    /// everything from a fork on.
    pub fn drop_covered(&mut self, fid: FolderRowId, group: &GroupId, limit: usize) -> Result<Dropped, StoreError> {
        let acked = self.reader().acked(group)?;
        self.change(group)?.drop_covered(fid, acked, limit)
    }

    /// Forgets paths where nothing is and nothing lies, as far as `is_memory` does not need them, among `limit` rows after
    /// `after`; the key of the last row looked at, none at the end.
    pub fn remove_dead(
        &mut self,
        fid: FolderRowId,
        after: Option<&[u8]>,
        limit: usize,
        is_memory: &dyn Fn(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let rows = self.reader().files_after(fid, after, limit)?;
        let last = rows.last().filter(|_| rows.len() == limit).map(|row| row.key.clone());
        for row in rows {
            if !row.live && !row.pending && row.disk.is_none() && !is_memory(&row.versions) {
                self.remove_file(row.file)?;
            }
        }
        Ok(last)
    }
}

impl Change<'_> {
    fn adopt_ranges(
        self,
        fid: FolderRowId,
        author: AuthorId,
        ranges: &[(Range, EnvelopeHash)],
    ) -> Result<(), StoreError> {
        let Change { conn, group, .. } = self;
        let feed = group.feed(conn, author, false)?;
        let mut adopted = Vec::new();
        let mut head_at = None;
        for (range, head) in ranges {
            if range.last > MAX_NUMBER {
                return Err(StoreError::Exhausted("number"));
            }
            let lacking = feed.state.held.lacking(*range);
            for gap in &lacking {
                let behind = match gap.last.next() {
                    Some(next) => held_at(conn, feed.row, next)?,
                    None => Vec::new(),
                };
                // what follows names the hash, whatever a snapshot says; what was dropped there itself takes the gap in
                let head = behind.iter().find_map(|behind| behind.previous).unwrap_or(*head);
                add_dropped(conn, feed.row, DroppedRange { range: *gap, head }, *range)?;
            }
            if !lacking.is_empty() {
                adopted.push(*range);
                head_at = Some((range.last, *head));
            }
            for gone in dropped_within(conn, feed.row, *range)? {
                add_run(conn, fid, feed.row, gone)?;
            }
        }
        if let Some((last, head)) = head_at {
            let highest = feed.state.held.highest();
            let held = feed.state.held.ranges().iter().copied().chain(adopted).collect::<Vec<_>>();
            feed.state.held = RangeSet::from_ranges(held);
            if highest.is_none_or(|highest| highest < last) {
                feed.state.head = head;
            }
            write_ranges(conn, feed)?;
            write_head(conn, feed)?;
        }
        Ok(())
    }

    fn drop_covered(self, fid: FolderRowId, acked: Cursor, limit: usize) -> Result<Dropped, StoreError> {
        let Change { conn, group, .. } = self;
        let covered = conn
            .prepare_cached("SELECT feed, compared FROM folder_covered WHERE fid = ?1 ORDER BY feed")?
            .query_map([fid.0], |row| Ok((row.get(0)?, unsigned(row.get(1)?))))?
            .collect::<Result<Vec<(i64, u64)>, rusqlite::Error>>()?;
        let acked = row_id(group.gid, acked);
        let newest = row_id(group.gid, group.max_cursor);
        let mut dropped = Dropped::default();
        let mut highest = 0;
        for (row, last) in covered {
            let Some(feed) = group.feeds.values().find(|feed| feed.row == row) else { continue };
            let left = limit - dropped.entries;
            // the last one proves that the feed went that far
            let below = feed.state.fork.map_or(last, |fork| fork.0.min(last));
            let gone = covered_entries(conn, fid, feed, below, acked, left)?;
            for entry in &gone {
                dropped.entries += 1;
                dropped.bytes += entry.bytes;
                highest = highest.max(entry.id);
                // the newest row keeps the cursors from being given again
                let sql = if entry.id == newest { EMPTY } else { "DELETE FROM entries WHERE id = ?1" };
                conn.prepare_cached(sql)?.execute([entry.id])?;
            }
            for run in gone.chunk_by(|one, next| one.number + 1 == next.number && one.run == next.run) {
                let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
                let range = Range { first: Number(first.number), last: Number(last.number) };
                add_dropped(conn, row, DroppedRange { range, head: last.hash }, first.run)?;
            }
            if dropped.entries >= limit {
                break;
            }
        }
        if dropped.entries > 0 {
            conn.prepare_cached("UPDATE groups SET holds_from = max(holds_from, ?2) WHERE gid = ?1")?
                .execute((group.gid, signed(cursor_of(highest).0 + 1)))?;
        }
        Ok(dropped)
    }
}

/// Forgets the snapshot whose entry is taken out of a feed; false if it is none's.
pub(super) fn take_out(conn: &Connection, feed: i64, number: i64) -> Result<bool, StoreError> {
    let sql = "DELETE FROM snapshots WHERE feed = ?1 AND number = ?2";
    Ok(conn.prepare_cached(sql)?.execute((feed, number))? > 0)
}

/// Of a feed nothing counts as covered or taken in from a number on: what was there is issued again, and what others have
/// there is to come. Whoever lost a snapshot by it writes another.
pub(super) fn uncover(conn: &Connection, feed: i64, from: Number) -> Result<(), StoreError> {
    let from = signed(from.0);
    let count = conn
        .prepare_cached(
            "UPDATE folder_covered SET last = min(last, ?2 - 1), compared = min(compared, ?2 - 1) \
             WHERE feed = ?1 AND last >= ?2",
        )?
        .execute((feed, from))?;
    if count > 0 {
        conn.prepare_cached(
            "UPDATE folders SET since_entries = ?2 WHERE fid IN (SELECT fid FROM folder_covered WHERE feed = ?1)",
        )?
        .execute((feed, CALLED_FOR))?;
    }
    conn.prepare_cached("DELETE FROM folder_runs WHERE feed = ?1 AND first >= ?2")?.execute((feed, from))?;
    conn.prepare_cached("UPDATE folder_runs SET last = ?2 - 1 WHERE feed = ?1 AND last >= ?2")?
        .execute((feed, from))?;
    Ok(())
}

/// Entries that count as taken in since the last snapshot where one is to be written whatever there is.
const CALLED_FOR: i64 = i64::MAX / 2;
/// Leaves of a row its cursor and check.
pub(super) const EMPTY: &str = "UPDATE entries SET state = 2, feed = NULL, number = NULL, class = NULL, own = NULL, source = NULL, \
    blob_id = NULL, hash = NULL, previous = NULL, digest = NULL, epoch_number = NULL, epoch_hash = NULL, bytes = NULL \
    WHERE id = ?1";

/// An entry that is covered.
struct Covered {
    id: i64,
    number: u64,
    /// The run of its folder's entries that it is in.
    run: Range,
    hash: EnvelopeHash,
    bytes: u64,
}

fn covered_entries(
    conn: &Connection,
    fid: FolderRowId,
    feed: &Feed,
    below: u64,
    acked: i64,
    limit: usize,
) -> Result<Vec<Covered>, StoreError> {
    let mut statement = conn.prepare_cached(
        "SELECT e.id, e.number, r.first, r.last, e.hash, length(e.bytes) \
         FROM folder_runs r JOIN entries e ON e.feed = r.feed AND e.number BETWEEN r.first AND r.last \
         WHERE r.fid = ?1 AND r.feed = ?2 AND r.first < ?3 AND e.number < ?3 AND e.class = ?4 AND e.state = 0 \
           AND (e.own < 2 OR e.id <= ?5) ORDER BY r.first, e.number LIMIT ?6",
    )?;
    let values = params![fid.0, feed.row, signed(below), Class::Sealed.code(), acked, signed(limit as u64)];
    let entries = statement.query_map(values, |row| {
        Ok(Covered {
            id: row.get(0)?,
            number: unsigned(row.get(1)?),
            run: Range { first: Number(unsigned(row.get(2)?)), last: Number(unsigned(row.get(3)?)) },
            hash: EnvelopeHash(row.get(4)?),
            bytes: unsigned(row.get(5)?),
        })
    })?;
    Ok(entries.collect::<Result<_, _>>()?)
}

/// Adds numbers to those of a folder's entries that were taken in; false if all of them were there.
fn add_run(conn: &Connection, fid: FolderRowId, feed: i64, range: Range) -> Result<bool, StoreError> {
    let touching = conn
        .prepare_cached(
            "SELECT first, last FROM folder_runs WHERE fid = ?1 AND feed = ?2 AND first <= ?4 + 1 AND last >= ?3 - 1 \
             AND first >= coalesce((SELECT max(first) FROM folder_runs WHERE fid = ?1 AND feed = ?2 AND first <= ?3), 0)",
        )?
        .query_map((fid.0, feed, signed(range.first.0), signed(range.last.0)), |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<Vec<(i64, i64)>, rusqlite::Error>>()?;
    let (first, last) = (signed(range.first.0), signed(range.last.0));
    if touching.iter().any(|run| run.0 <= first && last <= run.1) {
        return Ok(false);
    }
    let first = touching.iter().map(|run| run.0).min().unwrap_or(first).min(first);
    let last = touching.iter().map(|run| run.1).max().unwrap_or(last).max(last);
    for (begins, _) in touching.iter().filter(|run| run.0 != first) {
        conn.prepare_cached("DELETE FROM folder_runs WHERE fid = ?1 AND feed = ?2 AND first = ?3")?
            .execute((fid.0, feed, begins))?;
    }
    conn.prepare_cached(
        "INSERT INTO folder_runs (fid, feed, first, last) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (fid, feed, first) DO UPDATE SET last = excluded.last",
    )?
    .execute((fid.0, feed, first, last))?;
    Ok(true)
}

/// What was dropped of a range, as far as the hash at its end is known.
fn dropped_within(conn: &Connection, feed: i64, range: Range) -> Result<Vec<Range>, StoreError> {
    let mut statement = conn.prepare_cached(
        "SELECT max(first, ?2), last FROM dropped WHERE feed = ?1 AND last BETWEEN ?2 AND ?3 ORDER BY first",
    )?;
    let dropped = statement.query_map((feed, signed(range.first.0), signed(range.last.0)), |row| {
        Ok(Range { first: Number(unsigned(row.get(0)?)), last: Number(unsigned(row.get(1)?)) })
    })?;
    Ok(dropped.collect::<Result<_, _>>()?)
}

/// One row was to change.
fn one(changed: usize) -> Result<(), StoreError> {
    if changed == 1 { Ok(()) } else { Err(StoreError::UnknownSnapshot) }
}

/// Adds a range whose envelopes are not here, joined with those beside it in the same run; the hash at the end of a run is
/// kept, since a snapshot names it.
pub(super) fn add_dropped(conn: &Connection, feed: i64, dropped: DroppedRange, run: Range) -> Result<(), StoreError> {
    let range = dropped.range;
    let before = match range.first.previous() {
        Some(before) if run.contains(before) => cache::dropped_at(conn, feed, before)?,
        _ => None,
    };
    let behind = match range.last.next() {
        Some(next) if run.contains(next) => cache::dropped_at(conn, feed, next)?,
        _ => None,
    };
    let mut delete = conn.prepare_cached("DELETE FROM dropped WHERE feed = ?1 AND first = ?2")?;
    if let Some(behind) = behind {
        delete.execute((feed, signed(behind.range.first.0)))?;
    }
    let DroppedRange { range, head } = dropped.joined(before, behind);
    delete.execute((feed, signed(range.first.0)))?;
    conn.prepare_cached("INSERT INTO dropped (feed, first, last, head) VALUES (?1, ?2, ?3, ?4)")?.execute((
        feed,
        signed(range.first.0),
        signed(range.last.0),
        head.0,
    ))?;
    Ok(())
}

impl Reader<'_> {
    pub(super) fn feed_id(&self, group: &GroupId, author: &AuthorId) -> Result<Option<i64>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT feed FROM feeds WHERE gid = ?1 AND author = ?2")?;
        Ok(statement.query_row((self.gid(group)?, author.0), |row| row.get(0)).optional()?)
    }

    /// The first cursor from which on nothing was dropped.
    pub fn holds_from(&self, group: &GroupId) -> Result<Cursor, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT holds_from FROM groups WHERE id = ?1")?;
        let from: Option<i64> = statement.query_row([group.0], |row| row.get(0)).optional()?;
        from.map(|from| Cursor(unsigned(from))).ok_or(StoreError::UnknownGroup(*group))
    }

    /// What was taken into a folder since its last snapshot.
    pub fn since_snapshot(&self, fid: FolderRowId) -> Result<Since, StoreError> {
        let mut statement =
            self.conn.prepare_cached("SELECT since_entries, since_records FROM folders WHERE fid = ?1")?;
        let read =
            |row: &rusqlite::Row<'_>| Ok(Since { entries: unsigned(row.get(0)?), records: unsigned(row.get(1)?) });
        Ok(statement.query_row([fid.0], read).optional()?.unwrap_or_default())
    }

    /// Whether an entry was taken into a folder.
    pub fn is_taken(
        &self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        range: Range,
    ) -> Result<bool, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else { return Ok(false) };
        let mut statement = self.conn.prepare_cached(
            "SELECT last FROM folder_runs WHERE fid = ?1 AND feed = ?2 AND first <= ?3 ORDER BY first DESC LIMIT 1",
        )?;
        let last: Option<i64> =
            statement.query_row((fid.0, feed, signed(range.first.0)), |row| row.get(0)).optional()?;
        Ok(last.is_some_and(|last| unsigned(last) >= range.last.0))
    }

    /// The authors whose entries were taken into a folder.
    pub fn taken_authors(&self, fid: FolderRowId) -> Result<Vec<AuthorId>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT author FROM feeds WHERE feed IN (SELECT DISTINCT feed FROM folder_runs WHERE fid = ?1) ORDER BY author",
        )?;
        Ok(statement.query_map([fid.0], |row| row.get(0).map(AuthorId))?.collect::<Result<_, _>>()?)
    }

    /// An author's entries that were taken into a folder, as runs that end behind `after`, at most `limit`.
    pub fn taken_runs(
        &self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        after: Number,
        limit: usize,
    ) -> Result<Vec<Range>, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else { return Ok(Vec::new()) };
        let mut statement = self.conn.prepare_cached(
            "SELECT first, last FROM folder_runs WHERE fid = ?1 AND feed = ?2 AND last > ?3 ORDER BY first LIMIT ?4",
        )?;
        let values = (fid.0, feed, signed(after.0), signed(limit as u64));
        let runs = statement.query_map(values, |row| {
            Ok(Range { first: Number(unsigned(row.get(0)?)), last: Number(unsigned(row.get(1)?)) })
        })?;
        Ok(runs.collect::<Result<_, _>>()?)
    }

    /// The last of an author's entries up to a number that were taken into a folder.
    pub fn last_taken(
        &self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        until: Number,
    ) -> Result<Option<Number>, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else { return Ok(None) };
        let mut statement = self.conn.prepare_cached(
            "SELECT last FROM folder_runs WHERE fid = ?1 AND feed = ?2 AND first <= ?3 ORDER BY first DESC LIMIT 1",
        )?;
        let last: Option<i64> = statement.query_row((fid.0, feed, signed(until.0)), |row| row.get(0)).optional()?;
        Ok(last.map(|last| Number(unsigned(last)).min(until)))
    }

    /// The highest number up to which all of a feed is here, readable, and without a second branch.
    pub fn whole_until(&self, group: &GroupId, author: &AuthorId) -> Result<Number, StoreError> {
        let state = self.feed(group, author)?;
        let Some(feed) = self.feed_id(group, author)? else { return Ok(Number(0)) };
        let first = state.held.ranges().first().filter(|range| range.first == Number(1));
        let mut until = first.map_or(0, |range| range.last.0);
        if let Some(fork) = state.fork {
            until = until.min(fork.0.saturating_sub(1));
        }
        let mut statement =
            self.conn.prepare_cached("SELECT min(number) FROM entries WHERE state = 1 AND feed = ?1")?;
        if let Some(waits) = statement.query_row([feed], |row| row.get::<_, Option<i64>>(0))? {
            until = until.min(unsigned(waits).saturating_sub(1));
        }
        Ok(Number(until))
    }

    /// Whether something of a feed up to a number is not here, or was dropped from here for a folder that is not here any
    /// more.
    pub fn lacks_until(&self, group: &GroupId, author: &AuthorId, number: Number) -> Result<bool, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else { return Ok(true) };
        let state = self.feed(group, author)?;
        if !state.held.lacking(Range { first: Number(1), last: number }).is_empty() {
            return Ok(true);
        }
        let mut statement = self.conn.prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM dropped d WHERE d.feed = ?1 AND d.first <= ?2 AND NOT EXISTS (\
               SELECT 1 FROM folder_runs r WHERE r.feed = d.feed AND r.first <= d.first AND r.last >= d.first))",
        )?;
        Ok(statement.query_row((feed, signed(number.0)), |row| row.get(0))?)
    }

    /// Whether a feed is known to go as far as a number: its envelope is here, or was and left, or one behind it is here.
    pub fn reaches(&self, group: &GroupId, author: &AuthorId, number: Number) -> Result<bool, StoreError> {
        Ok(self.feed(group, author)?.held.highest().is_some_and(|highest| highest >= number))
    }

    /// What is here of a range of entries that somebody says are a folder's.
    pub fn range_here(
        &self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        range: Range,
    ) -> Result<RangeHere, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else {
            return Ok(RangeHere { lacks: true, elsewhere: false });
        };
        let gaps = !self.feed(group, author)?.held.lacking(range).is_empty();
        let values = (fid.0, feed, signed(range.first.0), signed(range.last.0));
        let dropped = "SELECT max(first, ?3) AS first, min(last, ?4) AS last FROM dropped \
             WHERE feed = ?2 AND first <= ?4 AND last >= ?3";
        let strange = format!(
            "SELECT EXISTS (SELECT 1 FROM ({dropped}) d WHERE NOT EXISTS (SELECT 1 FROM folder_runs r \
             WHERE r.fid = ?1 AND r.feed = ?2 AND r.first <= d.first AND r.last >= d.last))"
        );
        let others = format!(
            "SELECT EXISTS (SELECT 1 FROM ({dropped}) d JOIN folder_runs r ON r.feed = ?2 \
             WHERE r.fid <> ?1 AND r.first <= d.last AND r.last >= d.first)"
        );
        let strange: bool = self.conn.prepare_cached(&strange)?.query_row(values, |row| row.get(0))?;
        let elsewhere = strange && self.conn.prepare_cached(&others)?.query_row(values, |row| row.get(0))?;
        Ok(RangeHere { lacks: gaps || strange, elsewhere })
    }

    /// Entries that are here in a range, and were not taken into a folder, from a number on, at most `limit`.
    pub fn untaken(
        &self,
        fid: FolderRowId,
        group: &GroupId,
        author: &AuthorId,
        range: Range,
        limit: usize,
    ) -> Result<Vec<Untaken>, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else { return Ok(Vec::new()) };
        let mut statement = self.conn.prepare_cached(
            "SELECT e.number, e.state, e.bytes FROM entries e \
             WHERE e.feed = ?2 AND e.number BETWEEN ?3 AND ?4 AND NOT EXISTS (SELECT 1 FROM folder_runs r \
               WHERE r.fid = ?1 AND r.feed = ?2 AND r.first <= e.number AND r.last >= e.number) \
             ORDER BY e.number, e.id LIMIT ?5",
        )?;
        let values = (fid.0, feed, signed(range.first.0), signed(range.last.0), signed(limit as u64));
        let rows = statement.query_map(values, |row| {
            let readable = row.get::<_, i64>(1)? == 0;
            Ok(Untaken { number: Number(unsigned(row.get(0)?)), readable, bytes: row.get(2)? })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The hashes known at a number: of what is here, or at the end of what was dropped.
    pub fn hashes_at(
        &self,
        group: &GroupId,
        author: &AuthorId,
        number: Number,
    ) -> Result<Vec<EnvelopeHash>, StoreError> {
        let Some(feed) = self.feed_id(group, author)? else { return Ok(Vec::new()) };
        Ok(held_at(self.conn, feed, number)?.into_iter().map(|held| held.hash).collect())
    }

    /// Up to which numbers snapshots cover the feeds of a folder.
    pub fn covered(&self, fid: FolderRowId) -> Result<Vec<(AuthorId, Number)>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT f.author, c.last FROM folder_covered c JOIN feeds f ON f.feed = c.feed WHERE c.fid = ?1",
        )?;
        let covered = statement.query_map([fid.0], |row| Ok((AuthorId(row.get(0)?), Number(unsigned(row.get(1)?)))))?;
        Ok(covered.collect::<Result<_, _>>()?)
    }

    /// The snapshots of a folder, in the order they came.
    pub fn snapshots(&self, fid: FolderRowId) -> Result<Vec<SnapshotRow>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT s.sid, f.author, s.number, s.state, s.taken, s.body \
             FROM snapshots s LEFT JOIN feeds f ON f.feed = s.feed WHERE s.fid = ?1 ORDER BY s.sid",
        )?;
        let mut rows = statement.query([fid.0])?;
        let mut snapshots = Vec::new();
        while let Some(row) = rows.next()? {
            let author = row.get::<_, Option<[u8; 32]>>(1)?.map(AuthorId);
            let number = row.get::<_, Option<i64>>(2)?.map(|number| Number(unsigned(number)));
            snapshots.push(SnapshotRow {
                sid: SnapshotRowId(row.get(0)?),
                entry: author.zip(number),
                state: SnapshotState::of(row.get(3)?)?,
                taken: row.get(4)?,
                body: row.get(5)?,
            });
        }
        Ok(snapshots)
    }

    /// A piece of a snapshot of a folder.
    pub fn snapshot_chunk(&self, fid: FolderRowId, hash: &[u8; 32]) -> Result<Option<SnapshotChunk>, StoreError> {
        let sql = "SELECT codec, len, bytes FROM snapshot_chunks WHERE hash = ?1 AND fid = ?2";
        Ok(self.conn.prepare_cached(sql)?.query_row((hash, fid.0), chunk_row).optional()?)
    }

    /// A piece of a snapshot of any folder of a group.
    pub fn group_snapshot_chunk(&self, group: &GroupId, hash: &[u8; 32]) -> Result<Option<SnapshotChunk>, StoreError> {
        let sql = "SELECT c.codec, c.len, c.bytes FROM snapshot_chunks c JOIN folders f ON f.fid = c.fid \
             WHERE c.hash = ?1 AND f.gid = ?2 LIMIT 1";
        Ok(self.conn.prepare_cached(sql)?.query_row((hash, self.gid(group)?), chunk_row).optional()?)
    }

    /// Bytes of all pieces of a folder's snapshots, as they are packed.
    pub fn snapshot_bytes(&self, fid: FolderRowId) -> Result<u64, StoreError> {
        let sql = "SELECT coalesce(sum(length(bytes)), 0) FROM snapshot_chunks WHERE fid = ?1";
        Ok(unsigned(self.conn.prepare_cached(sql)?.query_row([fid.0], |row| row.get(0))?))
    }

    /// What of a group's log is here, and what is not any more; looks at all of it.
    pub fn compaction(&self, group: &GroupId) -> Result<Compaction, StoreError> {
        let gid = self.gid(group)?;
        let mut statement = self.conn.prepare_cached(
            "SELECT count(*), coalesce(sum(length(e.bytes)), 0), \
               (SELECT coalesce(sum(d.last - d.first + 1), 0) FROM dropped d JOIN feeds f ON f.feed = d.feed \
                WHERE f.gid = ?1) \
             FROM entries e JOIN feeds f ON f.feed = e.feed WHERE f.gid = ?1",
        )?;
        let read = |row: &rusqlite::Row<'_>| {
            let [entries, bytes, dropped] = [row.get(0)?, row.get(1)?, row.get(2)?].map(unsigned);
            Ok(Compaction { entries, bytes, dropped })
        };
        Ok(statement.query_row([gid], read)?)
    }
}

fn chunk_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<SnapshotChunk> {
    Ok(SnapshotChunk { codec: row.get(0)?, len: row.get(1)?, bytes: row.get(2)? })
}
