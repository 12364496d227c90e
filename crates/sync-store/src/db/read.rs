//! Reading: for the app, for peers, and what can be said of feeds.

use rusqlite::{Connection, OptionalExtension};
use sync_core::serve::Own;
use sync_core::{FeedState, RangeSet, Selection, fork_digest, knows_more_than_author};
use sync_types::bounds::{MAX_FEEDS, MAX_RANGES};
use sync_types::{
    AuthorId, Carried, Check, Class, Cursor, EnvelopeHash, FeedHave, GroupId, Number, Range, Scope, Want,
};

use super::cache;
use super::convert::{MAX_CURSOR, class_of, cursor_of, row_id, signed, unsigned};
use super::peers::PeerId;
use crate::error::StoreError;

/// Reads one state of the database.
pub struct Reader<'c> {
    pub(super) conn: &'c Connection,
}

/// How much to read at once; a first entry is read whatever its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries.
    pub entries: usize,
    /// Bytes of envelopes.
    pub bytes: usize,
}

/// Entries for a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The entries, by cursor.
    pub entries: Vec<Carried>,
    /// Everything wanted up to here is in this batch or came before it.
    pub max_cursor: Cursor,
    /// The check beside that cursor.
    pub check: Check,
    /// More is wanted beyond it.
    pub has_more: bool,
}

/// Entries for the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The entries, by cursor.
    pub entries: Vec<StoredBytes>,
    /// Everything up to here is in this batch or came before it.
    pub max_cursor: Cursor,
    /// More follows beyond it.
    pub has_more: bool,
}

/// A stored envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBytes {
    /// Its cursor.
    pub cursor: Cursor,
    /// Its author.
    pub author: AuthorId,
    /// Its number in the author's feed.
    pub number: Number,
    /// The envelope, byte for byte.
    pub bytes: Vec<u8>,
}

/// Does some work on one state of the database, whatever others commit meanwhile.
pub(crate) fn snapshot<T>(
    conn: &Connection,
    work: impl FnOnce(&Reader<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let txn = conn.unchecked_transaction()?;
    work(&Reader::new(&txn))
}

/// All that serving needs of a row before its bytes.
struct Meta {
    id: i64,
    author: AuthorId,
    number: Number,
    class: Class,
    source: Option<PeerId>,
    /// Its feed has two branches here.
    forked: bool,
}

struct Scan {
    rows: Vec<Meta>,
    max_cursor: Cursor,
    has_more: bool,
}

impl<'c> Reader<'c> {
    pub(super) fn new(conn: &'c Connection) -> Self {
        Self { conn }
    }

    pub(super) fn gid(&self, group: &GroupId) -> Result<i64, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT gid FROM groups WHERE id = ?1")?;
        let gid = statement.query_row([group.0], |row| row.get(0)).optional()?;
        gid.ok_or(StoreError::UnknownGroup(*group))
    }

    /// The newest cursor of a group; 0 where nothing is stored.
    pub fn max_cursor(&self, group: &GroupId) -> Result<Cursor, StoreError> {
        cache::max_cursor(self.conn, self.gid(group)?)
    }

    /// The check beside a cursor; none if the cursor was never given.
    pub fn check_at(&self, group: &GroupId, cursor: Cursor) -> Result<Option<Check>, StoreError> {
        let gid = self.gid(group)?;
        match cursor {
            Cursor(0) => Ok(Some(Check::NONE)),
            cursor if cursor > MAX_CURSOR => Ok(None),
            cursor => {
                let mut statement = self.conn.prepare_cached("SELECT chk FROM entries WHERE id = ?1")?;
                Ok(statement.query_row([row_id(gid, cursor)], |row| row.get(0)).optional()?.map(Check))
            }
        }
    }

    /// Entries for a peer: what a selection sends after a cursor; for one that reads along, without what came from it
    /// (`not_from`), and with both branches of a fork.
    pub fn read_after(
        &self,
        group: &GroupId,
        after: Cursor,
        limits: Limits,
        selection: &Selection,
        not_from: Option<PeerId>,
    ) -> Result<Batch, StoreError> {
        let sql = if selection.scope() == Scope::All { SERVED } else { SERVED_OPEN };
        let scan = self.scan(self.gid(group)?, after, limits, sql, |row| {
            let Meta { author, number, class, source, forked, .. } = row;
            (not_from.is_none() || *source != not_from)
                && selection.sends(author, *number, *class, not_from.is_some(), *forked)
        })?;
        let carried = |row: &Meta| Ok(Carried { cursor: cursor_of(row.id), envelope: self.bytes(row.id)? });
        Ok(Batch {
            entries: scan.rows.iter().map(carried).collect::<Result<_, StoreError>>()?,
            max_cursor: scan.max_cursor,
            check: self
                .check_at(group, scan.max_cursor)?
                .ok_or_else(|| StoreError::corrupt("a cursor without a check"))?,
            has_more: scan.has_more,
        })
    }

    /// Sealed entries for the app after a cursor; those whose epoch is not known yet come later, under another cursor.
    pub fn read_sealed(&self, group: &GroupId, after: Cursor, limits: Limits) -> Result<Sealed, StoreError> {
        let scan = self.scan(self.gid(group)?, after, limits, READABLE, |_| true)?;
        let stored = |row: &Meta| {
            let (author, number) = (row.author, row.number);
            Ok(StoredBytes { cursor: cursor_of(row.id), author, number, bytes: self.bytes(row.id)? })
        };
        let entries = scan.rows.iter().map(stored).collect::<Result<_, StoreError>>()?;
        Ok(Sealed { entries, max_cursor: scan.max_cursor, has_more: scan.has_more })
    }

    /// Picks rows after a cursor until a limit; the position reached takes in the rows passed over.
    fn scan(
        &self,
        gid: i64,
        after: Cursor,
        limits: Limits,
        sql: &str,
        wanted: impl Fn(&Meta) -> bool,
    ) -> Result<Scan, StoreError> {
        let mut scan = Scan { rows: Vec::new(), max_cursor: after, has_more: false };
        let mut bytes = 0;
        let mut statement = self.conn.prepare_cached(sql)?;
        let mut rows = statement.query([row_id(gid, after), row_id(gid, MAX_CURSOR)])?;
        while let Some(row) = rows.next()? {
            let number = Number(unsigned(row.get(2)?));
            let meta = Meta {
                id: row.get(0)?,
                author: AuthorId(row.get(1)?),
                number,
                class: class_of(row.get(3)?)?,
                source: row.get::<_, Option<i64>>(4)?.map(PeerId),
                forked: row.get::<_, Option<i64>>(6)?.is_some_and(|fork| unsigned(fork) <= number.0),
            };
            let cursor = cursor_of(meta.id);
            if wanted(&meta) {
                let len = length(row.get(5)?);
                if !scan.rows.is_empty() && (scan.rows.len() >= limits.entries || bytes + len > limits.bytes) {
                    scan.has_more = true;
                    return Ok(scan);
                }
                bytes += len;
                scan.rows.push(meta);
            }
            scan.max_cursor = cursor;
        }
        scan.max_cursor = cache::max_cursor(self.conn, gid)?;
        Ok(scan)
    }

    fn bytes(&self, id: i64) -> Result<Vec<u8>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT bytes FROM entries WHERE id = ?1")?;
        Ok(statement.query_row([id], |row| row.get(0))?)
    }

    /// What is held of a feed.
    pub fn feed(&self, group: &GroupId, author: &AuthorId) -> Result<FeedState, StoreError> {
        let gid = self.gid(group)?;
        let Some(row) = self.feed_row(gid, author)? else { return Ok(FeedState::default()) };
        let mut statement = self.conn.prepare_cached("SELECT first, last FROM feed_ranges WHERE feed = ?1")?;
        let ranges = statement.query_map([row.feed], range)?.collect::<Result<Vec<_>, rusqlite::Error>>()?;
        Ok(FeedState { held: RangeSet::from_ranges(ranges), head: row.head, fork: row.fork })
    }

    /// What is held of every feed, to tell a peer: at most [`MAX_FEEDS`] feeds with their highest [`MAX_RANGES`] ranges.
    pub fn have(&self, group: &GroupId) -> Result<Vec<FeedHave>, StoreError> {
        let gid = self.gid(group)?;
        let mut statement = self
            .conn
            .prepare_cached("SELECT feed, author, head, fork FROM feeds WHERE gid = ?1 ORDER BY own DESC, feed")?;
        let rows = statement.query_map([gid], FeedRow::read)?.collect::<Result<Vec<_>, rusqlite::Error>>()?;
        let mut have = Vec::new();
        for row in rows {
            let feed = self.feed_have(&row)?;
            if !feed.ranges.is_empty() && have.len() < MAX_FEEDS {
                have.push(feed);
            }
        }
        Ok(have)
    }

    fn feed_have(&self, row: &FeedRow) -> Result<FeedHave, StoreError> {
        let mut statement = self
            .conn
            .prepare_cached("SELECT first, last FROM feed_ranges WHERE feed = ?1 ORDER BY first DESC LIMIT ?2")?;
        let ranges = statement.query_map((row.feed, signed(MAX_RANGES as u64)), range)?;
        let mut ranges = ranges.collect::<Result<Vec<_>, rusqlite::Error>>()?;
        ranges.reverse();
        let below = ranges.iter().rev().skip(1).rev();
        let mut heads = below.map(|range| self.lowest_hash(row.feed, range.last)).collect::<Result<Vec<_>, _>>()?;
        heads.extend(ranges.last().map(|_| row.head));
        let digest = match row.fork {
            None => [0; 32],
            Some(fork) => {
                let mut statement =
                    self.conn.prepare_cached("SELECT hash FROM entries WHERE feed = ?1 AND number >= ?2")?;
                let hashes = statement.query_map((row.feed, signed(fork.0)), |row| row.get(0).map(EnvelopeHash))?;
                fork_digest(hashes.collect::<Result<_, rusqlite::Error>>()?)
            }
        };
        Ok(FeedHave { author: row.author, ranges, heads, fork: row.fork, digest })
    }

    /// The lowest hash held at a number that is held.
    fn lowest_hash(&self, feed: i64, number: Number) -> Result<EnvelopeHash, StoreError> {
        let held = cache::held_at(self.conn, feed, number)?;
        held.iter().map(|held| held.hash).min().ok_or_else(|| StoreError::corrupt("a range without its envelope"))
    }

    fn feed_row(&self, gid: i64, author: &AuthorId) -> Result<Option<FeedRow>, StoreError> {
        let mut statement =
            self.conn.prepare_cached("SELECT feed, author, head, fork FROM feeds WHERE gid = ?1 AND author = ?2")?;
        Ok(statement.query_row((gid, author.0), FeedRow::read).optional()?)
    }

    /// The numbers lacking below the highest held, at most [`MAX_WANTS`](sync_types::bounds::MAX_WANTS) ranges.
    pub fn wants(&self, group: &GroupId) -> Result<Vec<Want>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT r.first, r.last, f.author FROM feeds f JOIN feed_ranges r ON r.feed = f.feed \
             WHERE f.gid = ?1 AND (f.ends IS NULL OR r.first <= f.ends) ORDER BY f.feed, r.first",
        )?;
        let rows = statement.query_map([self.gid(group)?], |row| Ok((AuthorId(row.get(2)?), range(row)?)))?;
        Ok(sync_core::wants(rows)?)
    }

    /// What is held of what a peer lacks, by feed and number, up to the limits.
    pub fn entries_at(&self, group: &GroupId, wants: &[Want], limits: Limits) -> Result<Vec<Carried>, StoreError> {
        let gid = self.gid(group)?;
        let mut statement = self.conn.prepare_cached(
            "SELECT id, length(bytes) FROM entries WHERE feed = ?1 AND number BETWEEN ?2 AND ?3 \
             AND state <> 3 ORDER BY number, id",
        )?;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for want in wants {
            let Some(feed) = self.feed_row(gid, &want.author)? else { continue };
            let mut rows = statement.query((feed.feed, signed(want.range.first.0), signed(want.range.last.0)))?;
            while let Some(row) = rows.next()? {
                let len = length(row.get(1)?);
                if !entries.is_empty() && (entries.len() >= limits.entries || bytes + len > limits.bytes) {
                    return Ok(entries);
                }
                bytes += len;
                let id = row.get(0)?;
                entries.push(Carried { cursor: cursor_of(id), envelope: self.bytes(id)? });
            }
        }
        Ok(entries)
    }

    /// What a peer lacks that says it holds `have` and does not want `covered`.
    pub fn select(
        &self,
        group: &GroupId,
        scope: Scope,
        have: &[FeedHave],
        covered: &[FeedHave],
    ) -> Result<Selection, StoreError> {
        Selection::new(scope, have, covered, &mut OwnFeeds { reader: self, gid: self.gid(group)? })
    }

    /// Whether a peer holds more or other entries of our present author than this database.
    pub fn knows_more(&self, group: &GroupId, have: &[FeedHave]) -> Result<bool, StoreError> {
        let author = self.group(group)?.author;
        let mut own = OwnFeeds { reader: self, gid: self.gid(group)? };
        have.iter().find(|feed| feed.author == author).map_or(Ok(false), |feed| knows_more_than_author(feed, &mut own))
    }

    /// Looks through the whole file for damage.
    pub fn integrity(&self) -> Result<(), StoreError> {
        let verdict: String = self.conn.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict == "ok" { Ok(()) } else { Err(StoreError::corrupt(&verdict)) }
    }
}

/// What peers are served; a moved row is empty, and what stands behind a removal is kept back.
const SERVED: &str = "SELECT e.id, f.author, e.number, e.class, e.source, length(e.bytes), f.fork \
    FROM entries e JOIN feeds f ON f.feed = e.feed \
    WHERE e.id > ?1 AND e.id <= ?2 AND e.state <> 3 ORDER BY e.id";
/// The same without sealed entries: few among many, so that greeting a peer does not look through the whole log.
const SERVED_OPEN: &str = "SELECT e.id, f.author, e.number, e.class, e.source, length(e.bytes), f.fork \
    FROM entries e INDEXED BY entries_open JOIN feeds f ON f.feed = e.feed \
    WHERE e.class > 0 AND e.id > ?1 AND e.id <= ?2 ORDER BY e.id";
/// What the app reads.
const READABLE: &str = "SELECT e.id, f.author, e.number, e.class, e.source, length(e.bytes), f.fork \
    FROM entries e JOIN feeds f ON f.feed = e.feed \
    WHERE e.id > ?1 AND e.id <= ?2 AND e.state = 0 AND e.class = 0 ORDER BY e.id";

struct FeedRow {
    feed: i64,
    author: AuthorId,
    head: EnvelopeHash,
    fork: Option<Number>,
}

impl FeedRow {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            feed: row.get(0)?,
            author: AuthorId(row.get(1)?),
            head: EnvelopeHash(row.get(2)?),
            fork: row.get::<_, Option<i64>>(3)?.map(|number| Number(unsigned(number))),
        })
    }
}

/// A length of bytes.
fn length(column: i64) -> usize {
    usize::try_from(column).unwrap_or(usize::MAX)
}

/// A range in the first two columns.
fn range(row: &rusqlite::Row<'_>) -> rusqlite::Result<Range> {
    Ok(Range { first: Number(unsigned(row.get(0)?)), last: Number(unsigned(row.get(1)?)) })
}

/// Our feeds, to compare a peer's with.
struct OwnFeeds<'r, 'c> {
    reader: &'r Reader<'c>,
    gid: i64,
}

impl Own for OwnFeeds<'_, '_> {
    type Error = StoreError;

    fn feed(&mut self, author: &AuthorId) -> Result<Option<FeedHave>, StoreError> {
        self.reader.feed_row(self.gid, author)?.map(|row| self.reader.feed_have(&row)).transpose()
    }

    fn hashes_at(&mut self, author: &AuthorId, number: Number) -> Result<Vec<EnvelopeHash>, StoreError> {
        let Some(row) = self.reader.feed_row(self.gid, author)? else { return Ok(Vec::new()) };
        let held = cache::held_at(self.reader.conn, row.feed, number)?;
        Ok(held.into_iter().map(|held| held.hash).collect())
    }
}

impl Reader<'_> {
    /// Every operation and rotation of a group, in the order they were stored.
    pub fn open_entries(&self, group: &GroupId) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT e.bytes FROM entries e INDEXED BY entries_open JOIN feeds f ON f.feed = e.feed \
             WHERE f.gid = ?1 AND e.class > 0 ORDER BY e.id",
        )?;
        let rows = statement.query_map([self.gid(group)?], |row| row.get(0))?;
        Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
    }

    /// Every rotation of a group, in the order they were stored.
    pub fn rotations(&self, group: &GroupId) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT e.bytes FROM entries e JOIN feeds f ON f.feed = e.feed \
             WHERE f.gid = ?1 AND e.class = 2 ORDER BY e.id",
        )?;
        let rows = statement.query_map([self.gid(group)?], |row| row.get(0))?;
        Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
    }
}
