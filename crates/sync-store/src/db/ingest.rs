//! Arrivals: judged, stored, and the position in the sender's log with them.

use sync_core::{Origin as From, Refusal, judge};
use sync_types::bounds::MAX_WANTS;
use sync_types::{AuthorId, Check, Class, Cursor, EnvelopeHash, EpochId, GroupId, Number, Want};

use super::cache::{HeldFeeds, Inserter, NewRow, Origin, load, make_check, next_cursor};
use super::convert::{MAX_NUMBER, row_id};
use super::ends::settle_ends;
use super::{Change, PeerId, Txn};
use crate::error::StoreError;

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Ingested {
    /// What was stored: operations first, otherwise in the order of the batch.
    pub stored: Vec<StoredEntry>,
    /// Bytes of the envelopes that were stored.
    pub bytes: u64,
    /// Envelopes that were stored already.
    pub duplicates: usize,
    /// Refused envelopes by their index in the batch.
    pub refused: Vec<(usize, Refusal)>,
    /// Feeds that turned out to be forked, and from which number.
    pub forks: Vec<(AuthorId, Number)>,
    /// What lacks in the feeds that got something, at most [`MAX_WANTS`] ranges.
    pub gaps: Vec<Want>,
    /// Entries of our present author arrived that were not written here: a new author must be started.
    pub own_feed_foreign: bool,
}

/// An entry that was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredEntry {
    /// The cursor it got.
    pub cursor: Cursor,
    /// The check beside it.
    pub check: Check,
    /// Its author.
    pub author: AuthorId,
    /// Its number in the author's feed.
    pub number: Number,
    /// Who can read it.
    pub class: Class,
    /// Hash of its envelope.
    pub hash: EnvelopeHash,
    /// Its epoch is known; if not, it gets another cursor once it is.
    pub readable: bool,
    /// Its feed has two branches here, from its number or a lower one on.
    pub forked: bool,
}

impl Txn<'_> {
    /// Stores what counts of a batch, and `position`: the (cursor, check) of `source` up to which it has now sent
    /// everything.
    ///
    /// Without a source the entries came with an invitation, and have no position. `readable` says whether an epoch can be opened.
    pub fn ingest(
        &mut self,
        group: &GroupId,
        batch: &[Vec<u8>],
        source: Option<PeerId>,
        position: Option<(Cursor, Check)>,
        readable: &dyn Fn(EpochId) -> bool,
    ) -> Result<Ingested, StoreError> {
        if let Some(peer) = source {
            match position {
                Some((cursor, check)) => self.set_position(group, peer, cursor, check)?,
                None => self.expect_peer(group, peer)?,
            }
        }
        if batch.is_empty() {
            return Ok(Ingested::default());
        }
        let (ingested, reload) = self.change(group)?.ingest(group, batch, source, readable)?;
        if reload {
            self.forget(group);
        }
        Ok(ingested)
    }

    /// The numbers lacking, with this transaction's changes: what [`Reader::wants`](super::Reader::wants) would read.
    pub fn wants(&mut self, group: &GroupId) -> Result<Vec<Want>, StoreError> {
        self.live()?;
        let group = load(&self.db.conn, &mut self.db.groups, group)?;
        let mut lacking: Vec<_> = group.feeds.iter().filter(|(_, feed)| !feed.state.held.gaps().is_empty()).collect();
        lacking.sort_unstable_by_key(|(_, feed)| feed.row);
        sync_core::wants(
            lacking
                .into_iter()
                .flat_map(|(author, feed)| feed.state.held.ranges().iter().map(|range| Ok((*author, *range)))),
        )
    }

    /// Hands out what waited for an epoch: each such entry gets a new cursor, since who reads along has passed the old
    /// one. Returns how many there were.
    pub fn epoch_readable(&mut self, group: &GroupId, epoch: EpochId) -> Result<usize, StoreError> {
        self.change(group)?.epoch_readable(epoch)
    }
}

impl Change<'_> {
    /// Stores what counts; true if the membership in memory is not what is stored.
    fn ingest(
        self,
        id: &GroupId,
        batch: &[Vec<u8>],
        source: Option<PeerId>,
        readable: &dyn Fn(EpochId) -> bool,
    ) -> Result<(Ingested, bool), StoreError> {
        let Change { conn, rng, group } = self;
        let before = group.membership.ends();
        let from = if source.is_some() { From::Member } else { From::Unproven };
        let judged = judge(id, &mut group.membership, &mut HeldFeeds { conn, feeds: &group.feeds }, from, batch)?;
        let storable = judged.storable(batch, MAX_NUMBER);
        let mut ingested =
            Ingested { duplicates: storable.duplicates, refused: storable.refused, ..Ingested::default() };
        let own = group.author;
        let mut touched = Vec::new();
        let origin = Origin::Arrived { source };
        let mut inserter = Inserter::new(conn, rng, group)?;
        for accepted in &storable.accepted {
            let header = &accepted.envelope.header;
            let readable = header.class != Class::Sealed || readable(header.epoch);
            let (envelope, hash, fork) = (&accepted.envelope, accepted.hash, accepted.fork);
            let (cursor, check) = inserter.add(&NewRow { envelope, hash, waits: !readable, origin, fork })?;
            let (author, number, class) = (header.sender, header.number, header.class);
            ingested.bytes += envelope.bytes().len() as u64;
            let forked = inserter
                .group
                .feeds
                .get(&author)
                .is_some_and(|feed| feed.state.fork.is_some_and(|fork| fork <= number));
            ingested.stored.push(StoredEntry { cursor, check, author, number, class, hash, readable, forked });
            if touched.last() != Some(&author) {
                touched.push(author);
            }
            if let Some(number) = fork {
                ingested.forks.push((author, number));
            }
            ingested.own_feed_foreign |= author == own;
        }
        inserter.finish()?;
        ingested.forks.sort_unstable();
        ingested.forks.dedup_by_key(|(author, _)| *author);
        touched.sort_unstable();
        touched.dedup();
        settle_ends(conn, rng, group, &before, &touched, readable)?;
        for author in touched {
            let Some(feed) = group.feeds.get(&author) else { continue };
            let room = MAX_WANTS - ingested.gaps.len();
            ingested.gaps.extend(feed.state.held.gaps().into_iter().take(room).map(|range| Want { author, range }));
        }
        if ingested.own_feed_foreign {
            group.behind = true;
            conn.prepare_cached("UPDATE groups SET behind = 1 WHERE gid = ?1")?.execute([group.gid])?;
        }
        Ok((ingested, storable.membership_ahead))
    }

    fn epoch_readable(self, epoch: EpochId) -> Result<usize, StoreError> {
        let Change { conn, rng, group } = self;
        let mut statement = conn.prepare_cached(
            "SELECT e.id FROM entries e JOIN feeds f ON f.feed = e.feed \
             WHERE e.state = 1 AND e.epoch_number = ?1 AND e.epoch_hash = ?2 AND f.gid = ?3 ORDER BY e.id",
        )?;
        let waiting = statement
            .query_map((epoch.number, epoch.hash, group.gid), |row| row.get(0))?
            .collect::<Result<Vec<i64>, rusqlite::Error>>()?;
        let mut check_of = conn.prepare_cached("SELECT chk FROM entries WHERE id = ?1")?;
        let mut renumber = conn.prepare_cached(
            "UPDATE entries SET id = ?2, chk = ?3, state = 0, epoch_number = NULL, epoch_hash = NULL WHERE id = ?1",
        )?;
        let mut leave = conn.prepare_cached("INSERT INTO entries (id, chk, state) VALUES (?1, ?2, 2)")?;
        for &id in &waiting {
            let check: [u8; 8] = check_of.query_row([id], |row| row.get(0))?;
            let cursor = next_cursor(group)?;
            renumber.execute((id, row_id(group.gid, cursor), make_check(rng).0))?;
            leave.execute((id, check))?;
            group.max_cursor = cursor;
        }
        Ok(waiting.len())
    }
}
