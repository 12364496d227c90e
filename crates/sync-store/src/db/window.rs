//! A part of a group's log for many who read along: read once, and answered from memory for each.

use std::sync::Arc;

use sync_core::Selection;
use sync_types::{AuthorId, Carried, Check, Class, Cursor, GroupId, Number, ReplicaId};

use super::convert::{MAX_CURSOR, class_of, cursor_of, row_id, unsigned};
use super::{Batch, Limits, Reader};
use crate::error::StoreError;

/// All that was stored behind a cursor and up to another one, as one state of the database shows it.
#[derive(Debug, Clone)]
pub struct Window {
    /// Behind this cursor it begins.
    pub after: Cursor,
    /// The entries, by cursor.
    pub rows: Vec<Arc<WindowRow>>,
    /// The cursor up to which it goes.
    pub end: Cursor,
    /// The check beside that one.
    pub check: Check,
    /// The newest cursor there was.
    pub newest: Cursor,
    /// First cursor still held.
    pub holds_from: Cursor,
}

/// An entry with all that decides who is sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowRow {
    /// Its cursor.
    pub cursor: Cursor,
    /// The check beside it.
    pub check: Check,
    /// Its author.
    pub author: AuthorId,
    /// Its number in the author's feed.
    pub number: Number,
    /// Who can read it.
    pub class: Class,
    /// The database that sent it.
    pub source: Option<ReplicaId>,
    /// Its feed has two branches here, from its number or a lower one on.
    pub forked: bool,
    /// The envelope, byte for byte.
    pub envelope: Vec<u8>,
}

impl Window {
    /// What [`Reader::read_after`] gives a peer that is known; none where the window does not reach.
    #[must_use]
    pub fn read(
        &self,
        after: Cursor,
        limits: Limits,
        selection: &Selection,
        not_from: Option<ReplicaId>,
    ) -> Option<Batch> {
        if after < self.after || after > self.end || (after == self.end && self.has_more()) {
            return None;
        }
        let mut batch = Batch { entries: Vec::new(), max_cursor: self.end, check: self.check, has_more: false };
        let (mut reached, mut bytes) = ((self.end, self.check), 0);
        let start = self.rows.partition_point(|row| row.cursor <= after);
        for row in &self.rows[start..] {
            let WindowRow { cursor, author, number, class, .. } = &**row;
            let came_back = not_from.is_some() && row.source == not_from;
            if !came_back && selection.sends(author, *number, *class, not_from.is_some(), row.forked) {
                let len = row.envelope.len();
                if !batch.entries.is_empty() && (batch.entries.len() >= limits.entries || bytes + len > limits.bytes) {
                    (batch.max_cursor, batch.check) = reached;
                    batch.has_more = true;
                    return Some(batch);
                }
                bytes += len;
                batch.entries.push(Carried { cursor: *cursor, envelope: row.envelope.clone() });
            }
            reached = (*cursor, row.check);
        }
        batch.has_more = self.has_more();
        Some(batch)
    }

    /// This window with the one behind it, as far back as the limits allow.
    ///
    /// What was read earlier is left out where it may be otherwise by now: a branch that showed since then is among what
    /// was read now, unless more was stored than that.
    #[must_use]
    pub fn followed_by(&self, next: Self, limits: Limits) -> Self {
        if next.after != self.end || next.has_more() || next.rows.iter().any(|row| row.forked) {
            return next;
        }
        let mut rows: Vec<_> = self.rows.iter().chain(&next.rows).cloned().collect();
        let (mut kept, mut bytes) = (0, 0);
        for row in rows.iter().rev().take(limits.entries) {
            bytes += row.envelope.len();
            if bytes > limits.bytes {
                break;
            }
            kept += 1;
        }
        let left_out = rows.len() - kept.max(next.rows.len());
        let after = rows[..left_out].last().map_or(self.after, |row| row.cursor);
        rows.drain(..left_out);
        Self { after, rows, ..next }
    }

    /// Whether more was stored behind it.
    fn has_more(&self) -> bool {
        self.end < self.newest
    }
}

impl Reader<'_> {
    /// Everything behind a cursor, up to the limits.
    pub fn window(&self, group: &GroupId, after: Cursor, limits: Limits) -> Result<Window, StoreError> {
        let gid = self.gid(group)?;
        let newest = self.max_cursor(group)?;
        let (mut found, mut bytes, mut cut) = (Vec::new(), 0, None);
        let mut statement = self.conn.prepare_cached(
            "SELECT e.id, e.chk, f.author, e.number, e.class, p.replica, f.fork, e.bytes \
             FROM entries e JOIN feeds f ON f.feed = e.feed LEFT JOIN peers p ON p.peer = e.source \
             WHERE e.id > ?1 AND e.id <= ?2 AND e.state <> 3 ORDER BY e.id",
        )?;
        let mut rows = statement.query([row_id(gid, after), row_id(gid, MAX_CURSOR)])?;
        while let Some(row) = rows.next()? {
            let number = Number(unsigned(row.get(3)?));
            let envelope: Vec<u8> = row.get(7)?;
            if !found.is_empty() && (found.len() >= limits.entries || bytes + envelope.len() > limits.bytes) {
                cut = found.last().map(|row: &Arc<WindowRow>| (row.cursor, row.check));
                break;
            }
            bytes += envelope.len();
            found.push(Arc::new(WindowRow {
                cursor: cursor_of(row.get(0)?),
                check: Check(row.get(1)?),
                author: AuthorId(row.get(2)?),
                number,
                class: class_of(row.get(4)?)?,
                source: row.get::<_, Option<_>>(5)?.map(ReplicaId),
                forked: row.get::<_, Option<i64>>(6)?.is_some_and(|fork| unsigned(fork) <= number.0),
                envelope,
            }));
        }
        let (end, check) = match cut {
            Some(end) => end,
            None => {
                let check = self.check_at(group, newest)?;
                (newest, check.ok_or_else(|| StoreError::corrupt("a cursor without a check"))?)
            }
        };
        Ok(Window { after, rows: found, end, check, newest, holds_from: self.holds_from(group)? })
    }
}
