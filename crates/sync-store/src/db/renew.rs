//! A new author for this installation, and a new id for this database: after a copy, an import or a rollback.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension};
use sync_core::{Refusal, judge};
use sync_types::{AuthorId, Check, Class, Cursor, EnvelopeHash, GroupId, Number, ReplicaId};

use super::append::Appended;
use super::cache::{Feed, HeldFeeds, Inserter, NewRow, Origin, held_at, write_head, write_ranges};
use super::convert::{row_id, signed, unsigned};
use super::manage::REPLICA;
use super::{Change, Txn, snapshots};
use crate::append::{NewEntry, SealEntries, SealError};
use crate::error::StoreError;

/// Opens an own envelope to issue it again; none leaves it where it is.
///
/// The number is the lowest of those that are issued again, this one included: what it says of numbers from there on is
/// said of entries that leave the feed.
pub type Reopen<'a> = dyn Fn(&[u8], Number) -> Result<Option<NewEntry>, SealError> + 'a;

/// How to go on under a new author.
pub struct Renewal<'a> {
    /// Entry 1 of the new author's feed: its succession.
    pub succession: &'a [u8],
    /// Seals as the new author.
    pub sealer: &'a dyn SealEntries,
    /// Issues again what no peer acknowledged; none leaves everything where it is.
    pub reopen: Option<&'a Reopen<'a>>,
}

/// What became of a renewal.
#[derive(Debug, Default)]
pub struct Renewed {
    /// Entries issued again, with the cursor each had before.
    pub reissued: Vec<(Cursor, Appended)>,
    /// Whose they were, and the lowest number that left that feed.
    pub left: Option<(AuthorId, Number)>,
    /// The new number of each.
    pub numbers: BTreeMap<Number, Number>,
}

impl Txn<'_> {
    /// Goes on under a new author; put its secret into the same transaction.
    ///
    /// What is issued again leaves the old feed, so that its numbers can be filled by what others hold under them.
    /// Asked again with the same succession, it does nothing.
    pub fn renew_author(&mut self, group: &GroupId, renewal: &Renewal<'_>) -> Result<Renewed, StoreError> {
        let Some(old) = self.change(group)?.succeed(group, renewal)? else { return Ok(Renewed::default()) };
        let Some(reopen) = renewal.reopen else { return Ok(Renewed::default()) };
        let (taken, lowest) = self.change(group)?.take_out(old, reopen)?;
        // an operation may be among what was taken out
        self.forget(group);
        let entries: Vec<NewEntry> = taken.iter().map(|(_, _, entry)| entry.clone()).collect();
        let appended = self.append(group, &entries, renewal.sealer)?;
        let numbers = taken.iter().zip(&appended).map(|((_, number, _), again)| (*number, again.number)).collect();
        let reissued = taken.into_iter().zip(appended).map(|((cursor, ..), again)| (cursor, again)).collect();
        Ok(Renewed { reissued, left: lowest.map(|lowest| (old, lowest)), numbers })
    }

    /// Draws a new id for this database, and forgets up to where peers were read: they will be asked from zero.
    pub fn renew_replica(&mut self) -> Result<ReplicaId, StoreError> {
        self.live()?;
        let mut replica = ReplicaId([0; ReplicaId::LEN]);
        self.db.rng.fill_bytes(&mut replica.0);
        self.put_meta(REPLICA, &replica.0)?;
        self.live()?.execute("UPDATE peers SET cursor = 0, chk = ?1", [Check::NONE.0])?;
        Ok(replica)
    }
}

impl Change<'_> {
    /// Stores the succession and makes its author ours; returns the author before, unless that had happened before.
    fn succeed(&mut self, id: &GroupId, renewal: &Renewal<'_>) -> Result<Option<AuthorId>, StoreError> {
        let new = renewal.sealer.author();
        let batch = [renewal.succession.to_vec()];
        let mut held = HeldFeeds { conn: self.conn, feeds: &self.group.feeds };
        let mut judged = judge(id, &mut self.group.membership, &mut held, sync_core::Origin::Member, &batch)?;
        if let Some((_, refusal)) = judged.refused.pop() {
            return Err(StoreError::Succession(refusal));
        }
        let old = self.group.author;
        let Some(accepted) = judged.accepted.first() else {
            return if old == new { Ok(None) } else { Err(StoreError::AuthorChanged { current: old, got: new }) };
        };
        let header = &accepted.envelope.header;
        if header.sender != new || header.number != Number(1) || header.class != Class::Membership {
            return Err(StoreError::Succession(Refusal::NotAdmitted(new)));
        }
        self.conn.execute("UPDATE groups SET author = ?2, behind = 0 WHERE gid = ?1", (self.group.gid, new.0))?;
        self.group.author = new;
        self.group.behind = false;
        self.group.feed(self.conn, new, true)?;
        let mut inserter = Inserter::new(self.conn, self.rng, self.group)?;
        let (envelope, hash) = (&accepted.envelope, accepted.hash);
        inserter.add(&NewRow {
            envelope,
            hash,
            waits: false,
            origin: Origin::Here { digest: None },
            fork: accepted.fork,
        })?;
        inserter.finish()?;
        Ok(Some(old))
    }

    /// Takes what nobody acknowledged out of an author's feed, as entries to issue again, with the lowest number of all.
    fn take_out(self, author: AuthorId, reopen: &Reopen<'_>) -> Result<(Vec<Taken>, Option<Number>), StoreError> {
        let Change { conn, group, .. } = self;
        let Some(feed) = group.feeds.get_mut(&author) else { return Ok((Vec::new(), None)) };
        let acked: i64 = conn
            .prepare_cached("SELECT coalesce(max(acked), 0) FROM peers WHERE gid = ?1")?
            .query_row([group.gid], |row| row.get(0))?;
        let mut statement = conn.prepare_cached(
            "SELECT id, number FROM entries \
             WHERE feed = ?1 AND own = 2 AND digest IS NOT NULL AND id > ?2 ORDER BY id",
        )?;
        let unacked = statement
            .query_map((feed.row, row_id(group.gid, Cursor(unsigned(acked)))), |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<Vec<(i64, i64)>, rusqlite::Error>>()?;
        let mut bytes_of = conn.prepare_cached("SELECT bytes FROM entries WHERE id = ?1")?;
        let mut clear = conn.prepare_cached(
            "UPDATE entries SET state = 2, feed = NULL, number = NULL, class = NULL, own = NULL, blob_id = NULL, \
             hash = NULL, previous = NULL, digest = NULL, epoch_number = NULL, epoch_hash = NULL, bytes = NULL \
             WHERE id = ?1",
        )?;
        let (mut taken, mut lowest) = (Vec::new(), None);
        for (id, number) in unacked {
            let bytes: Vec<u8> = bytes_of.query_row([id], |row| row.get(0))?;
            let so_far = lowest.unwrap_or(Number(unsigned(number)));
            // a snapshot of what is taken out says nothing any more
            let again = if snapshots::take_out(conn, feed.row, number)? { None } else { Some(reopen(&bytes, so_far)?) };
            if again.as_ref().is_some_and(Option::is_none) {
                continue;
            }
            clear.execute([id])?;
            let number = Number(unsigned(number));
            if held_at(conn, feed.row, number)?.is_empty() {
                feed.state.held.remove(number);
            }
            lowest = Some(lowest.map_or(number, |lowest: Number| lowest.min(number)));
            taken.extend(again.flatten().map(|entry| (super::convert::cursor_of(id), number, entry)));
        }
        if let Some(lowest) = lowest {
            rewrite(conn, feed)?;
            snapshots::uncover(conn, feed.row, lowest)?;
        }
        Ok((taken, lowest))
    }
}

/// An entry that was taken out of a feed: its cursor and number, and what it held.
type Taken = (Cursor, Number, NewEntry);

/// Writes anew what a feed is after entries left it.
fn rewrite(conn: &Connection, feed: &mut Feed) -> Result<(), StoreError> {
    write_ranges(conn, feed)?;
    let highest = feed.state.held.highest();
    let at_highest = highest.map(|number| held_at(conn, feed.row, number)).transpose()?.unwrap_or_default();
    feed.state.head = at_highest.iter().map(|held| held.hash).min().unwrap_or(EnvelopeHash::NONE);
    if let Some(fork) = feed.state.fork {
        // a number's hashes are those stored there and those named by what follows it
        let number: Option<i64> = conn
            .prepare_cached(
                "SELECT number FROM (SELECT number, hash FROM entries WHERE feed = ?1 AND number >= ?2 \
                 UNION SELECT number - 1, previous FROM entries WHERE feed = ?1 AND number > ?2) \
                 GROUP BY number HAVING count(*) > 1 ORDER BY number LIMIT 1",
            )?
            .query_row((feed.row, signed(fork.0)), |row| row.get(0))
            .optional()?;
        feed.state.fork = number.map(|number| Number(unsigned(number)));
    }
    write_head(conn, feed)
}
