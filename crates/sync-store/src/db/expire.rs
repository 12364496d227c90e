//! Expiry in a blind replica: what is sealed and old is dropped, and asked for again when a member turns out to lack it.
//!
//! A dropped number counts as held here, so nobody who has it sends it again.
//! The last entry of each feed stays: from it a member sees that something lacks.

use rusqlite::Connection;
use sync_core::DroppedRange;
use sync_types::{Class, Cursor, EnvelopeHash, GroupId, Number, Range, Timestamp, Want};

use super::cache::{Feed, write_ranges};
use super::convert::{MAX_NUMBER, row_id, signed, unsigned};
use super::snapshots::{Dropped, EMPTY, add_dropped};
use super::{Change, Reader, Txn};
use crate::error::StoreError;

impl Txn<'_> {
    /// Notes up to where a group's log goes now; false if it went there at the time noted last.
    pub fn mark_time(&mut self, group: &GroupId, now: Timestamp) -> Result<bool, StoreError> {
        let gid = self.reader().gid(group)?;
        let newest = signed(self.reader().max_cursor(group)?.0);
        let conn = self.live()?;
        let last: Option<i64> =
            conn.prepare_cached("SELECT max(cursor) FROM marks WHERE gid = ?1")?.query_row([gid], |row| row.get(0))?;
        if last.unwrap_or(0) == newest {
            return Ok(false);
        }
        conn.prepare_cached("INSERT OR REPLACE INTO marks (gid, at, cursor) VALUES (?1, ?2, ?3)")?.execute((
            gid,
            signed(now.0),
            newest,
        ))?;
        Ok(true)
    }

    /// Drops what is sealed and was here at `before`, at most `limit` entries; none once all of it is gone.
    ///
    /// Of each feed the last entry stays, and everything from a fork on.
    pub fn expire(&mut self, group: &GroupId, before: Timestamp, limit: usize) -> Result<Dropped, StoreError> {
        let Some(cursor) = self.reader().mark_before(group, before)? else { return Ok(Dropped::default()) };
        let dropped = self.change(group)?.expire(cursor, limit)?;
        if dropped.entries < limit {
            let gid = self.reader().gid(group)?;
            // what it covers is gone; the newest such mark says so to later ones
            self.live()?
                .prepare_cached("DELETE FROM marks WHERE gid = ?1 AND cursor < ?2")?
                .execute((gid, signed(cursor.0)))?;
        }
        Ok(dropped)
    }

    /// Counts what was dropped of these as lacking from now on, with what was dropped together with it; false if none was.
    pub fn want_again(&mut self, group: &GroupId, wants: &[Want]) -> Result<bool, StoreError> {
        self.change(group)?.want_again(wants)
    }
}

impl Reader<'_> {
    /// The newest cursor that was noted at a time or before it.
    fn mark_before(&self, group: &GroupId, before: Timestamp) -> Result<Option<Cursor>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT max(cursor) FROM marks WHERE gid = ?1 AND at <= ?2")?;
        let cursor: Option<i64> = statement.query_row((self.gid(group)?, signed(before.0)), |row| row.get(0))?;
        Ok(cursor.map(|cursor| Cursor(unsigned(cursor))))
    }

    /// Whether any of these was dropped here.
    pub fn was_dropped(&self, group: &GroupId, wants: &[Want]) -> Result<bool, StoreError> {
        for want in wants {
            if let Some(feed) = self.feed_id(group, &want.author)?
                && !overlapping(self.conn, feed, want.range)?.is_empty()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// An entry that is old.
struct Old {
    id: i64,
    number: u64,
    hash: [u8; 32],
    bytes: u64,
}

impl Change<'_> {
    fn expire(self, up_to: Cursor, limit: usize) -> Result<Dropped, StoreError> {
        let Change { conn, group, .. } = self;
        let last = row_id(group.gid, up_to);
        let newest = row_id(group.gid, group.max_cursor);
        let mut dropped = Dropped::default();
        for feed in group.feeds.values() {
            let gone = old_entries(conn, feed, last, limit - dropped.entries)?;
            for entry in &gone {
                dropped.entries += 1;
                dropped.bytes += entry.bytes;
                // the newest row keeps the cursors from being given again
                let sql = if entry.id == newest { EMPTY } else { "DELETE FROM entries WHERE id = ?1" };
                conn.prepare_cached(sql)?.execute([entry.id])?;
            }
            for run in gone.chunk_by(|one, next| one.number + 1 == next.number) {
                let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
                let range = Range { first: Number(first.number), last: Number(last.number) };
                let whole = Range { first: Number(1), last: MAX_NUMBER };
                add_dropped(conn, feed.row, DroppedRange { range, head: EnvelopeHash(last.hash) }, whole)?;
            }
            if dropped.entries >= limit {
                break;
            }
        }
        if dropped.entries > 0 {
            conn.prepare_cached("UPDATE groups SET holds_from = max(holds_from, ?2) WHERE gid = ?1")?
                .execute((group.gid, signed(up_to.0 + 1)))?;
        }
        Ok(dropped)
    }

    fn want_again(self, wants: &[Want]) -> Result<bool, StoreError> {
        let Change { conn, group, .. } = self;
        let mut any = false;
        for want in wants {
            let Some(feed) = group.feeds.get_mut(&want.author) else { continue };
            let lacking = overlapping(conn, feed.row, want.range)?;
            if lacking.is_empty() {
                continue;
            }
            any = true;
            let mut forget = conn.prepare_cached("DELETE FROM dropped WHERE feed = ?1 AND first = ?2")?;
            for range in &lacking {
                forget.execute((feed.row, signed(range.first.0)))?;
            }
            feed.state.held = feed.state.held.without(&lacking);
            write_ranges(conn, feed)?;
        }
        Ok(any)
    }
}

fn old_entries(conn: &Connection, feed: &Feed, last: i64, limit: usize) -> Result<Vec<Old>, StoreError> {
    let Some(below) = feed.state.may_expire_below() else { return Ok(Vec::new()) };
    let mut statement = conn.prepare_cached(
        "SELECT id, number, hash, length(bytes) FROM entries \
         WHERE feed = ?1 AND number < ?2 AND id <= ?3 AND class = ?4 AND state = 0 ORDER BY number LIMIT ?5",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = statement.query_map((feed.row, signed(below.0), last, Class::Sealed.code(), limit), |row| {
        let (number, bytes) = (unsigned(row.get(1)?), unsigned(row.get(3)?));
        Ok(Old { id: row.get(0)?, number, hash: row.get(2)?, bytes })
    })?;
    Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
}

/// What was dropped of a feed that overlaps a range: each whole, since only the hash at its end is known.
fn overlapping(conn: &Connection, feed: i64, range: Range) -> Result<Vec<Range>, StoreError> {
    let mut statement = conn.prepare_cached(
        "SELECT first, last FROM dropped WHERE feed = ?1 AND first <= ?3 AND last >= ?2 ORDER BY first",
    )?;
    let rows = statement.query_map((feed, signed(range.first.0), signed(range.last.0)), |row| {
        Ok(Range { first: Number(unsigned(row.get(0)?)), last: Number(unsigned(row.get(1)?)) })
    })?;
    Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
}
