//! What is kept in memory of a group: membership, ranges of feeds, the newest cursor.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rand_core::CryptoRng;
use rusqlite::{CachedStatement, Connection, OptionalExtension, params};
use sync_core::{DroppedRange, FeedState, Held, HeldEnvelope, Membership, RangeSet};
use sync_types::{AuthorId, Check, Class, Cursor, Envelope, EnvelopeHash, GroupId, Header, Number, Range};

use super::convert::{MAX_CURSOR, cursor_of, row_id, signed, unsigned};
use super::peers::PeerId;
use crate::error::StoreError;

/// A group as far as writing to it needs.
pub(super) struct Group {
    pub(super) gid: i64,
    /// Who writes here.
    pub(super) author: AuthorId,
    /// Others hold entries of our author that were not written here.
    pub(super) behind: bool,
    pub(super) membership: Membership,
    /// A copy of the membership for others; none after it changed.
    published: Option<Arc<Membership>>,
    pub(super) max_cursor: Cursor,
    pub(super) feeds: BTreeMap<AuthorId, Feed>,
    /// Feeds of authors that are or were ours.
    pub(super) own: Vec<(AuthorId, i64)>,
}

/// A feed as far as writing to it needs.
pub(super) struct Feed {
    pub(super) row: i64,
    /// Its author is or was ours.
    pub(super) own: bool,
    pub(super) state: FeedState,
}

/// The group in memory, read from the database if it is not there.
pub(super) fn load<'g>(
    conn: &Connection,
    groups: &'g mut BTreeMap<GroupId, Group>,
    id: &GroupId,
) -> Result<&'g mut Group, StoreError> {
    match groups.entry(*id) {
        Entry::Occupied(known) => Ok(known.into_mut()),
        Entry::Vacant(place) => Ok(place.insert(Group::load(conn, id)?)),
    }
}

impl Group {
    fn load(conn: &Connection, id: &GroupId) -> Result<Self, StoreError> {
        let (gid, charter, author, behind): (i64, Vec<u8>, [u8; 32], bool) = conn
            .prepare_cached("SELECT gid, charter, author, behind FROM groups WHERE id = ?1")?
            .query_row([id.0], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
            .optional()?
            .ok_or(StoreError::UnknownGroup(*id))?;
        let mut membership = Membership::new(&charter).map_err(|_| StoreError::corrupt("a charter cannot be read"))?;
        replay(conn, gid, &mut membership)?;
        let feeds = feeds(conn, gid)?;
        Ok(Self {
            gid,
            author: AuthorId(author),
            behind,
            membership,
            published: None,
            max_cursor: max_cursor(conn, gid)?,
            own: feeds.iter().filter(|(_, feed)| feed.own).map(|(author, feed)| (*author, feed.row)).collect(),
            feeds,
        })
    }

    /// Who belongs to the group, to give away.
    pub(super) fn published(&mut self) -> Arc<Membership> {
        self.published.get_or_insert_with(|| Arc::new(self.membership.clone())).clone()
    }

    /// The membership took in an operation.
    pub(super) fn membership_changed(&mut self) {
        self.published = None;
    }

    /// The feed of an author, made if nothing is held of it.
    pub(super) fn feed(&mut self, conn: &Connection, author: AuthorId, own: bool) -> Result<&mut Feed, StoreError> {
        match self.feeds.entry(author) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => {
                let state = FeedState::default();
                let row = conn
                    .prepare_cached("INSERT INTO feeds (gid, author, own, head) VALUES (?1, ?2, ?3, ?4)")?
                    .insert(params![self.gid, author.0, own, state.head.0])?;
                if own {
                    self.own.push((author, row));
                }
                Ok(place.insert(Feed { row, own, state }))
            }
        }
    }
}

/// The newest cursor of a group.
pub(super) fn max_cursor(conn: &Connection, gid: i64) -> Result<Cursor, StoreError> {
    let id: Option<i64> = conn
        .prepare_cached("SELECT max(id) FROM entries WHERE id > ?1 AND id <= ?2")?
        .query_row([row_id(gid, Cursor(0)), row_id(gid, MAX_CURSOR)], |row| row.get(0))?;
    Ok(id.map_or(Cursor(0), cursor_of))
}

/// Applies every membership entry held.
fn replay(conn: &Connection, gid: i64, membership: &mut Membership) -> Result<(), StoreError> {
    let mut statement = conn.prepare_cached(
        "SELECT e.bytes FROM entries e JOIN feeds f ON f.feed = e.feed WHERE f.gid = ?1 AND e.class = 1 ORDER BY e.id",
    )?;
    let stored =
        statement.query_map([gid], |row| row.get::<_, Vec<u8>>(0))?.collect::<Result<Vec<_>, rusqlite::Error>>()?;
    let left = membership.replay(stored).map_err(|_| StoreError::corrupt("a membership entry cannot be read"))?;
    if left > 0 {
        // what admitted them was an own entry that was moved and not issued again
        tracing::warn!(entries = left, "membership entries of senders who are not admitted");
    }
    Ok(())
}

fn feeds(conn: &Connection, gid: i64) -> Result<BTreeMap<AuthorId, Feed>, StoreError> {
    let mut ranges: HashMap<i64, Vec<Range>> = HashMap::new();
    let mut statement = conn.prepare_cached(
        "SELECT r.feed, r.first, r.last FROM feed_ranges r JOIN feeds f ON f.feed = r.feed WHERE f.gid = ?1",
    )?;
    let mut rows = statement.query([gid])?;
    while let Some(row) = rows.next()? {
        let range = Range { first: Number(unsigned(row.get(1)?)), last: Number(unsigned(row.get(2)?)) };
        ranges.entry(row.get(0)?).or_default().push(range);
    }
    let mut feeds = BTreeMap::new();
    let mut statement = conn.prepare_cached("SELECT feed, author, own, head, fork FROM feeds WHERE gid = ?1")?;
    let mut rows = statement.query([gid])?;
    while let Some(row) = rows.next()? {
        let feed: i64 = row.get(0)?;
        let state = FeedState {
            held: RangeSet::from_ranges(ranges.remove(&feed).unwrap_or_default()),
            head: EnvelopeHash(row.get(3)?),
            fork: row.get::<_, Option<i64>>(4)?.map(|number| Number(unsigned(number))),
        };
        feeds.insert(AuthorId(row.get(1)?), Feed { row: feed, own: row.get(2)?, state });
    }
    Ok(feeds)
}

/// What is stored at a number of a feed, or of what was dropped there the hash, if it is known.
pub(super) fn held_at(conn: &Connection, feed: i64, number: Number) -> Result<Vec<HeldEnvelope>, StoreError> {
    let mut statement =
        conn.prepare_cached("SELECT hash, previous FROM entries WHERE feed = ?1 AND number = ?2 ORDER BY id")?;
    let held = statement
        .query_map((feed, signed(number.0)), |row| {
            Ok(HeldEnvelope { hash: EnvelopeHash(row.get(0)?), previous: Some(EnvelopeHash(row.get(1)?)) })
        })?
        .collect::<Result<Vec<_>, rusqlite::Error>>()?;
    if !held.is_empty() {
        return Ok(held);
    }
    let end = dropped_at(conn, feed, number)?.filter(|dropped| dropped.range.last == number);
    Ok(end.map(|dropped| HeldEnvelope { hash: dropped.head, previous: None }).into_iter().collect())
}

/// What was dropped around a number of a feed, and the hash at its end.
pub(super) fn dropped_at(conn: &Connection, feed: i64, number: Number) -> Result<Option<DroppedRange>, StoreError> {
    let mut statement = conn.prepare_cached(
        "SELECT first, last, head FROM dropped WHERE feed = ?1 AND first <= ?2 ORDER BY first DESC LIMIT 1",
    )?;
    let dropped = statement
        .query_row((feed, signed(number.0)), |row| {
            let range = Range { first: Number(unsigned(row.get(0)?)), last: Number(unsigned(row.get(1)?)) };
            Ok(DroppedRange { range, head: EnvelopeHash(row.get(2)?) })
        })
        .optional()?;
    Ok(dropped.filter(|dropped| dropped.range.contains(number)))
}

/// What the judge asks; only what a feed's ranges name is looked up.
pub(super) struct HeldFeeds<'a> {
    pub(super) conn: &'a Connection,
    pub(super) feeds: &'a BTreeMap<AuthorId, Feed>,
}

impl Held for HeldFeeds<'_> {
    type Error = StoreError;

    fn highest(&mut self, author: &AuthorId) -> Result<Option<Number>, StoreError> {
        Ok(self.feeds.get(author).and_then(|feed| feed.state.held.highest()))
    }

    fn at(&mut self, author: &AuthorId, number: Number) -> Result<Vec<HeldEnvelope>, StoreError> {
        match self.feeds.get(author) {
            Some(feed) if feed.state.held.contains(number) => held_at(self.conn, feed.row, number),
            _ => Ok(Vec::new()),
        }
    }

    fn is_dropped(&mut self, author: &AuthorId, number: Number) -> Result<bool, StoreError> {
        match self.feeds.get(author) {
            Some(feed) if feed.state.held.contains(number) => Ok(dropped_at(self.conn, feed.row, number)?.is_some()),
            _ => Ok(false),
        }
    }
}

/// Where an envelope comes from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// It was written here.
    Here {
        /// Digest of its content; none of what is never issued again.
        digest: Option<[u8; 32]>,
    },
    /// Someone sent it.
    Arrived {
        /// Who.
        source: Option<PeerId>,
    },
}

/// An envelope about to be stored.
pub(super) struct NewRow<'a> {
    pub(super) envelope: &'a Envelope<'a>,
    pub(super) hash: EnvelopeHash,
    /// Its epoch is not known yet.
    pub(super) waits: bool,
    pub(super) origin: Origin,
    /// The lowest number it shows to have two hashes.
    pub(super) fork: Option<Number>,
}

/// Stores envelopes one after the other, and at the end what that makes of their feeds.
pub(super) struct Inserter<'a> {
    conn: &'a Connection,
    rng: &'a mut dyn CryptoRng,
    pub(super) group: &'a mut Group,
    insert: CachedStatement<'a>,
    grown: BTreeMap<AuthorId, Grown>,
}

/// What was added to a feed.
#[derive(Default)]
struct Grown {
    numbers: Vec<Number>,
    /// A range that was written before starts earlier now, or is part of the one before it.
    joined: bool,
}

impl<'a> Inserter<'a> {
    pub(super) fn new(
        conn: &'a Connection,
        rng: &'a mut dyn CryptoRng,
        group: &'a mut Group,
    ) -> Result<Self, StoreError> {
        let insert = conn.prepare_cached(
            "INSERT INTO entries (id, chk, state, feed, number, class, own, source, blob_id, hash, previous, digest, \
             epoch_number, epoch_hash, bytes) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
        )?;
        Ok(Self { conn, rng, group, insert, grown: BTreeMap::new() })
    }

    /// Stores an envelope under the next cursor: returns that one and the check beside it.
    pub(super) fn add(&mut self, row: &NewRow<'_>) -> Result<(Cursor, Check), StoreError> {
        let header: &Header = &row.envelope.header;
        let (gid, cursor, check) = (self.group.gid, next_cursor(self.group)?, make_check(self.rng));
        let feed = self.group.feed(self.conn, header.sender, false)?;
        let waits = row.waits.then_some(header.epoch);
        let (own, source, digest) = match row.origin {
            Origin::Here { digest } => (2, None, digest),
            Origin::Arrived { source } => (i64::from(feed.own), source, None),
        };
        self.insert.execute(params![
            row_id(gid, cursor),
            check.0,
            i64::from(row.waits),
            feed.row,
            signed(header.number.0),
            header.class.code(),
            own,
            source.map(|peer| peer.0),
            header.blob_id.0,
            row.hash.0,
            header.previous.0,
            digest,
            waits.map(|epoch| epoch.number),
            waits.map(|epoch| epoch.hash),
            row.envelope.bytes(),
        ])?;
        let grown = self.grown.entry(header.sender).or_default();
        grown.joined |= header.number.next().is_some_and(|next| feed.state.held.contains(next));
        grown.numbers.push(header.number);
        feed.state.take(header.number, row.hash, row.fork);
        if header.class == Class::Membership {
            self.group.membership_changed();
        }
        self.group.max_cursor = cursor;
        Ok((cursor, check))
    }

    /// Writes ranges, head and fork of every feed that got an envelope.
    pub(super) fn finish(self) -> Result<(), StoreError> {
        let mut shrink =
            self.conn.prepare_cached("DELETE FROM feed_ranges WHERE feed = ?1 AND first > ?2 AND first <= ?3")?;
        let mut grow = self.conn.prepare_cached(
            "INSERT INTO feed_ranges (feed, first, last) VALUES (?1, ?2, ?3) \
             ON CONFLICT (feed, first) DO UPDATE SET last = excluded.last",
        )?;
        for (author, Grown { mut numbers, joined }) in self.grown {
            let Some(feed) = self.group.feeds.get(&author) else { continue };
            numbers.sort_unstable();
            let ranges = feed.state.held.ranges();
            let mut at = 0;
            while at < numbers.len() {
                let range = ranges[ranges.partition_point(|range| range.last < numbers[at])];
                if joined {
                    shrink.execute((feed.row, signed(range.first.0), signed(range.last.0)))?;
                }
                grow.execute((feed.row, signed(range.first.0), signed(range.last.0)))?;
                at += numbers[at..].partition_point(|number| *number <= range.last);
            }
            write_head(self.conn, feed)?;
        }
        Ok(())
    }
}

/// Writes a feed's ranges anew.
pub(super) fn write_ranges(conn: &Connection, feed: &Feed) -> Result<(), StoreError> {
    conn.prepare_cached("DELETE FROM feed_ranges WHERE feed = ?1")?.execute([feed.row])?;
    let mut insert = conn.prepare_cached("INSERT INTO feed_ranges (feed, first, last) VALUES (?1, ?2, ?3)")?;
    for range in RangeSet::ranges(&feed.state.held) {
        insert.execute((feed.row, signed(range.first.0), signed(range.last.0)))?;
    }
    Ok(())
}

/// Writes a feed's head and fork.
pub(super) fn write_head(conn: &Connection, feed: &Feed) -> Result<(), StoreError> {
    conn.prepare_cached("UPDATE feeds SET head = ?2, fork = ?3 WHERE feed = ?1")?.execute((
        feed.row,
        feed.state.head.0,
        feed.state.fork.map(|number| signed(number.0)),
    ))?;
    Ok(())
}

/// The cursor after the newest.
pub(super) fn next_cursor(group: &Group) -> Result<Cursor, StoreError> {
    if group.max_cursor >= MAX_CURSOR {
        return Err(StoreError::Exhausted("cursor"));
    }
    Ok(Cursor(group.max_cursor.0 + 1))
}

/// Draws what stands beside a cursor.
pub fn make_check(rng: &mut dyn CryptoRng) -> Check {
    let mut check = Check::NONE;
    // cursor 0 alone has the check of zeros
    while check == Check::NONE {
        rng.fill_bytes(&mut check.0);
    }
    check
}
