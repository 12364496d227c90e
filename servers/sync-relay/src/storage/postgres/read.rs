//! Reading a group's log, each time from one state of it.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;

use deadpool_postgres::{Client, Transaction};
use sync_core::session::Reply;
use sync_core::{HeldEnvelope, Own, Selection, fork_digest};
use sync_store::exec::Pull;
use sync_store::{Limits, Window, WindowRow};
use sync_types::bounds::{FRAME_BYTES_TARGET, MAX_FEEDS, MAX_FRAME_ENVELOPES, MAX_RANGES};
use sync_types::{
    AuthorId, Carried, Check, Cursor, EnvelopeHash, FeedHave, GroupId, Number, Range, ReplicaId, Scope, Want,
};
use tokio_postgres::IsolationLevel;

use super::columns::{MAX_NUMBER, author, class, fixed, hash, number, signed, unsigned};
use super::log::held_at;
use super::{Shared, damaged};
use crate::storage::{Reading, StorageError};

/// Rows looked at with one question: many more than most answers pass over.
const PAGE: i64 = 1024;

/// One state of a group's log.
struct Snapshot<'t> {
    txn: Transaction<'t>,
    gid: i64,
}

impl<'t> Snapshot<'t> {
    async fn take(client: &'t mut Client, gid: i64) -> Result<Self, StorageError> {
        let begin = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
        Ok(Self { txn: begin.start().await?, gid })
    }

    /// The newest cursor, and the first from which on nothing was dropped.
    async fn ends(&self) -> Result<(Cursor, Cursor), StorageError> {
        let sql = "SELECT max_cursor, holds_from FROM logs WHERE gid = $1";
        let row = self.txn.query_one(&self.txn.prepare_cached(sql).await?, &[&self.gid]).await?;
        Ok((Cursor(unsigned(row.try_get(0)?)), Cursor(unsigned(row.try_get(1)?))))
    }

    /// The check beside a cursor; none if the cursor was never given.
    async fn check_at(&self, cursor: Cursor) -> Result<Option<Check>, StorageError> {
        if cursor == Cursor(0) {
            return Ok(Some(Check::NONE));
        }
        let sql = "SELECT chk FROM entries WHERE gid = $1 AND cursor = $2";
        let row = self.txn.query_opt(&self.txn.prepare_cached(sql).await?, &[&self.gid, &signed(cursor.0)]).await?;
        row.map(|row| Ok(Check(fixed(row.try_get(0)?)?))).transpose()
    }

    /// The rows of these authors' feeds.
    async fn rows(&self, authors: &[AuthorId]) -> Result<HashMap<AuthorId, i64>, StorageError> {
        let sql = "SELECT author, feed FROM feeds WHERE gid = $1 AND author = ANY ($2)";
        let authors: Vec<&[u8]> = authors.iter().map(|author| &author.0[..]).collect();
        let rows = self.txn.query(&self.txn.prepare_cached(sql).await?, &[&self.gid, &authors]).await?;
        rows.iter().map(|row| Ok((author(row.try_get(0)?)?, row.try_get(1)?))).collect()
    }

    /// What is held of every feed or of some authors', in the order in which they came, with their highest
    /// [`MAX_RANGES`] ranges.
    async fn have(&self, of: Option<&[AuthorId]>) -> Result<Vec<FeedHave>, StorageError> {
        let of: Option<Vec<&[u8]>> = of.map(|authors| authors.iter().map(|author| &author.0[..]).collect());
        let sql = "SELECT feed, author, head, fork FROM feeds \
            WHERE gid = $1 AND ($2::bytea[] IS NULL OR author = ANY ($2)) ORDER BY feed";
        let feeds = self.txn.query(&self.txn.prepare_cached(sql).await?, &[&self.gid, &of]).await?;
        let sql = "SELECT f.feed, r.first, r.last, coalesce( \
                (SELECT e.hash FROM entries e WHERE e.feed = f.feed AND e.number = r.last ORDER BY e.hash LIMIT 1), \
                (SELECT d.head FROM dropped d WHERE d.feed = f.feed AND d.first <= r.last AND d.last = r.last LIMIT 1)) \
            FROM feeds f CROSS JOIN LATERAL ( \
                SELECT first, last FROM feed_ranges WHERE feed_ranges.feed = f.feed ORDER BY first DESC LIMIT $3 \
            ) AS r WHERE f.gid = $1 AND ($2::bytea[] IS NULL OR f.author = ANY ($2)) ORDER BY f.feed, r.first";
        let most = signed(MAX_RANGES as u64);
        let mut ranges: HashMap<i64, Vec<(Range, Option<EnvelopeHash>)>> = HashMap::new();
        for row in self.txn.query(&self.txn.prepare_cached(sql).await?, &[&self.gid, &of, &most]).await? {
            let range = Range { first: number(row.try_get(1)?), last: number(row.try_get(2)?) };
            let lowest = row.try_get::<_, Option<&[u8]>>(3)?.map(hash).transpose()?;
            ranges.entry(row.try_get(0)?).or_default().push((range, lowest));
        }
        let mut have = Vec::new();
        for row in feeds {
            let feed: i64 = row.try_get(0)?;
            let Some(held) = ranges.remove(&feed).filter(|_| have.len() < MAX_FEEDS) else { continue };
            let below = held.len().saturating_sub(1);
            let lowest = held[..below].iter().map(|(_, lowest)| *lowest);
            let heads: Option<Vec<_>> = lowest.chain([Some(hash(row.try_get(2)?)?)]).collect();
            let fork = row.try_get::<_, Option<i64>>(3)?.map(number);
            have.push(FeedHave {
                author: author(row.try_get(1)?)?,
                ranges: held.iter().map(|(range, _)| *range).collect(),
                heads: heads.ok_or_else(|| damaged("a range without its envelope"))?,
                fork,
                digest: match fork {
                    None => [0; 32],
                    Some(fork) => self.digest(feed, fork).await?,
                },
            });
        }
        Ok(have)
    }

    async fn digest(&self, feed: i64, fork: Number) -> Result<[u8; 32], StorageError> {
        let sql = "SELECT hash FROM entries WHERE feed = $1 AND number >= $2";
        let rows = self.txn.query(&self.txn.prepare_cached(sql).await?, &[&feed, &signed(fork.0)]).await?;
        let hashes: Result<_, StorageError> = rows.iter().map(|row| hash(row.try_get(0)?)).collect();
        Ok(fork_digest(hashes?))
    }

    async fn knows_peer(&self, replica: &ReplicaId) -> Result<Option<(Cursor, Check)>, StorageError> {
        let sql = "SELECT cursor, chk FROM peers WHERE gid = $1 AND replica = $2";
        let row = self.txn.query_opt(&self.txn.prepare_cached(sql).await?, &[&self.gid, &&replica.0[..]]).await?;
        row.map(|row| Ok((Cursor(unsigned(row.try_get(0)?)), Check(fixed(row.try_get(1)?)?)))).transpose()
    }
}

/// Tells what is held.
pub(super) async fn survey(shared: &Shared, group: GroupId, replica: ReplicaId) -> Result<Reply, StorageError> {
    let gid = shared.gid(group).await?;
    let mut client = shared.client().await?;
    let snapshot = Snapshot::take(&mut client, gid).await?;
    let position = snapshot.knows_peer(&replica).await?.unwrap_or((Cursor(0), Check::NONE));
    let (newest, _) = snapshot.ends().await?;
    let check = snapshot.check_at(newest).await?.unwrap_or(Check::NONE);
    Ok(Reply::Survey { have: snapshot.have(None).await?, position, newest: (newest, check) })
}

/// What is held, as far as comparing with a peer asks for it.
struct Ours {
    feeds: HashMap<AuthorId, FeedHave>,
    rows: HashMap<AuthorId, i64>,
    stored: HashMap<(i64, Number), Vec<HeldEnvelope>>,
}

impl Own for Ours {
    type Error = Infallible;

    fn feed(&mut self, author: &AuthorId) -> Result<Option<FeedHave>, Infallible> {
        Ok(self.feeds.get(author).cloned())
    }

    fn hashes_at(&mut self, author: &AuthorId, number: Number) -> Result<Vec<EnvelopeHash>, Infallible> {
        let held = self.rows.get(author).and_then(|feed| self.stored.get(&(*feed, number)));
        Ok(held.into_iter().flatten().map(|held| held.hash).collect())
    }
}

/// Compares what a peer holds with what is held.
pub(super) async fn select(shared: &Shared, group: GroupId, pull: Pull) -> Result<Reply, StorageError> {
    let gid = shared.gid(group).await?;
    let mut client = shared.client().await?;
    let snapshot = Snapshot::take(&mut client, gid).await?;
    let known = snapshot.check_at(pull.after).await? == Some(pull.check);
    let authors: Vec<AuthorId> = pull.have.iter().map(|feed| feed.author).collect();
    let rows = snapshot.rows(&authors).await?;
    let mut places: Vec<(i64, Number)> = Vec::new();
    for theirs in &pull.have {
        let Some(feed) = rows.get(&theirs.author) else { continue };
        let ends = theirs.ends().map(|(number, _)| (*feed, number));
        places.extend(ends.filter(|(_, number)| *number <= MAX_NUMBER));
    }
    let held = held_at(&snapshot.txn, &places).await?;
    let have = snapshot.have(Some(&authors)).await?;
    let feeds = have.into_iter().map(|feed| (feed.author, feed)).collect();
    let mut ours = Ours { feeds, rows, stored: held.stored };
    let Ok(selection) = Selection::new(pull.scope, &pull.have, &pull.covered, &mut ours);
    let start = if known { pull.after } else { Cursor(0) };
    Ok(Reply::Selected { scope: pull.scope, selection: Arc::new(selection), start, reset: !known })
}

/// Reads entries to send.
pub(super) async fn read(shared: &Shared, group: GroupId, reading: Reading) -> Result<Reply, StorageError> {
    let Reading { scope, not_from, after, limits, selection } = reading;
    let gid = shared.gid(group).await?;
    let mut client = shared.client().await?;
    let snapshot = Snapshot::take(&mut client, gid).await?;
    // nothing came from who is not known
    let not_from = match not_from {
        Some(replica) => snapshot.knows_peer(&replica).await?.map(|_| replica),
        None => None,
    };
    let (newest, holds_from) = snapshot.ends().await?;
    let sql = if selection.scope() == Scope::All { SERVED } else { SERVED_OPEN };
    let statement = snapshot.txn.prepare_cached(sql).await?;
    let (mut cursors, mut bytes): (Vec<i64>, usize) = (Vec::new(), 0);
    let (mut reached, mut has_more) = (signed(after.0), false);
    'pages: loop {
        let rows = snapshot.txn.query(&statement, &[&gid, &reached, &PAGE]).await?;
        for row in &rows {
            let cursor: i64 = row.try_get(0)?;
            let (author, number) = (author(row.try_get(1)?)?, number(row.try_get(2)?));
            let came_back = not_from.is_some_and(|replica| {
                row.try_get::<_, Option<&[u8]>>(4).is_ok_and(|source| source == Some(&replica.0[..]))
            });
            let forked = row.try_get::<_, Option<i64>>(6)?.is_some_and(|fork| unsigned(fork) <= number.0);
            let class = class(row.try_get(3)?)?;
            if !came_back && selection.sends(&author, number, class, not_from.is_some(), forked) {
                let len = length(row.try_get(5)?);
                if !cursors.is_empty() && (cursors.len() >= limits.entries || bytes + len > limits.bytes) {
                    has_more = true;
                    break 'pages;
                }
                bytes += len;
                cursors.push(cursor);
            }
            reached = cursor;
        }
        if signed(rows.len() as u64) < PAGE {
            reached = signed(newest.0);
            break;
        }
    }
    let max_cursor = Cursor(unsigned(reached));
    let check = snapshot.check_at(max_cursor).await?.ok_or_else(|| damaged("a cursor without a check"))?;
    Ok(Reply::Read { scope, entries: snapshot.carried(&cursors).await?, max_cursor, check, has_more, holds_from })
}

/// Reads everything behind a cursor, up to the limits.
pub(super) async fn window(
    shared: &Shared,
    group: GroupId,
    after: Cursor,
    limits: Limits,
) -> Result<Window, StorageError> {
    let gid = shared.gid(group).await?;
    let mut client = shared.client().await?;
    let snapshot = Snapshot::take(&mut client, gid).await?;
    let (newest, holds_from) = snapshot.ends().await?;
    let statement = snapshot.txn.prepare_cached(WINDOW).await?;
    // one more than are taken shows that there are more
    let most = signed(limits.entries as u64 + 1);
    let found = snapshot.txn.query(&statement, &[&gid, &signed(after.0), &most]).await?;
    let (mut cursors, mut bytes): (Vec<i64>, usize) = (Vec::new(), 0);
    for row in &found {
        let len = length(row.try_get(5)?);
        if !cursors.is_empty() && (cursors.len() >= limits.entries || bytes + len > limits.bytes) {
            break;
        }
        bytes += len;
        cursors.push(row.try_get(0)?);
    }
    let cut = cursors.len() < found.len();
    let mut rows = Vec::with_capacity(cursors.len());
    for (row, Carried { cursor, envelope }) in found.iter().zip(snapshot.carried(&cursors).await?) {
        let number = number(row.try_get(2)?);
        rows.push(Arc::new(WindowRow {
            cursor,
            check: Check(fixed(row.try_get(7)?)?),
            author: author(row.try_get(1)?)?,
            number,
            class: class(row.try_get(3)?)?,
            source: row.try_get::<_, Option<&[u8]>>(4)?.map(fixed).transpose()?.map(ReplicaId),
            forked: row.try_get::<_, Option<i64>>(6)?.is_some_and(|fork| unsigned(fork) <= number.0),
            envelope,
        }));
    }
    let (end, check) = match rows.last().filter(|_| cut) {
        Some(last) => (last.cursor, last.check),
        None => {
            let check = snapshot.check_at(newest).await?;
            (newest, check.ok_or_else(|| damaged("a cursor without a check"))?)
        }
    };
    Ok(Window { after, rows, end, check, newest, holds_from })
}

/// What peers are served, whoever they are.
const WINDOW: &str = "SELECT e.cursor, f.author, e.number, e.class, e.source, octet_length(e.bytes)::bigint, f.fork, \
    e.chk FROM entries e JOIN feeds f ON f.feed = e.feed \
    WHERE e.gid = $1 AND e.cursor > $2 ORDER BY e.cursor LIMIT $3";
/// What peers are served; a row that expired has no feed.
const SERVED: &str = "SELECT e.cursor, f.author, e.number, e.class, e.source, octet_length(e.bytes)::bigint, f.fork \
    FROM entries e JOIN feeds f ON f.feed = e.feed WHERE e.gid = $1 AND e.cursor > $2 ORDER BY e.cursor LIMIT $3";
/// The same without sealed entries.
const SERVED_OPEN: &str = "SELECT e.cursor, f.author, e.number, e.class, e.source, octet_length(e.bytes)::bigint, \
    f.fork FROM entries e JOIN feeds f ON f.feed = e.feed \
    WHERE e.gid = $1 AND e.cursor > $2 AND e.class > 0 ORDER BY e.cursor LIMIT $3";

/// Reads entries by number.
pub(super) async fn read_wanted(
    shared: &Shared,
    group: GroupId,
    request: u32,
    wants: &[Want],
) -> Result<Reply, StorageError> {
    let gid = shared.gid(group).await?;
    let mut client = shared.client().await?;
    let snapshot = Snapshot::take(&mut client, gid).await?;
    let authors: Vec<AuthorId> = wants.iter().map(|want| want.author).collect();
    let feeds = snapshot.rows(&authors).await?;
    let sql = "SELECT cursor, octet_length(bytes)::bigint FROM entries \
        WHERE feed = $1 AND number BETWEEN $2 AND $3 ORDER BY number, cursor LIMIT $4";
    let statement = snapshot.txn.prepare_cached(sql).await?;
    let most = signed(MAX_FRAME_ENVELOPES as u64);
    let (mut cursors, mut bytes): (Vec<i64>, usize) = (Vec::new(), 0);
    'wants: for want in wants {
        let Some(feed) = feeds.get(&want.author) else { continue };
        let (first, last) = (signed(want.range.first.0), signed(want.range.last.0));
        for row in snapshot.txn.query(&statement, &[feed, &first, &last, &most]).await? {
            let len = length(row.try_get(1)?);
            let full = cursors.len() >= MAX_FRAME_ENVELOPES || bytes + len > 2 * FRAME_BYTES_TARGET;
            if !cursors.is_empty() && full {
                break 'wants;
            }
            bytes += len;
            cursors.push(row.try_get(0)?);
        }
    }
    Ok(Reply::Wanted { request, entries: snapshot.carried(&cursors).await? })
}

impl Snapshot<'_> {
    /// The envelopes at some cursors, in their order.
    async fn carried(&self, cursors: &[i64]) -> Result<Vec<Carried>, StorageError> {
        if cursors.is_empty() {
            return Ok(Vec::new());
        }
        let sql = "SELECT cursor, bytes FROM entries WHERE gid = $1 AND cursor = ANY ($2)";
        let rows = self.txn.query(&self.txn.prepare_cached(sql).await?, &[&self.gid, &cursors]).await?;
        let mut found = BTreeMap::new();
        for row in rows {
            found.insert(row.try_get::<_, i64>(0)?, row.try_get::<_, Vec<u8>>(1)?);
        }
        let carried = |cursor: &i64| {
            // one asked for twice is given twice, as it is from SQLite
            let envelope = found.get(cursor).cloned().ok_or_else(|| damaged("an entry is not there"))?;
            Ok(Carried { cursor: Cursor(unsigned(*cursor)), envelope })
        };
        cursors.iter().map(carried).collect()
    }
}

/// The numbers lacking.
pub(super) async fn wants(shared: &Shared, group: GroupId) -> Result<Vec<Want>, StorageError> {
    let gid = shared.gid(group).await?;
    let client = shared.client().await?;
    let sql = "SELECT f.author, r.first, r.last FROM feeds f JOIN feed_ranges r ON r.feed = f.feed \
        WHERE f.gid = $1 ORDER BY f.feed, r.first";
    let rows = client.query(&client.prepare_cached(sql).await?, &[&gid]).await?;
    sync_core::wants(rows.iter().map(|row| {
        let range = Range { first: number(row.try_get(1)?), last: number(row.try_get(2)?) };
        Ok((author(row.try_get(0)?)?, range))
    }))
}

/// Whether any of these was dropped here.
pub(super) async fn was_dropped(shared: &Shared, group: GroupId, wants: &[Want]) -> Result<bool, StorageError> {
    let gid = shared.gid(group).await?;
    let client = shared.client().await?;
    let sql = "SELECT EXISTS (SELECT 1 \
        FROM unnest($2::bytea[], $3::bigint[], $4::bigint[]) AS w (author, first, last) \
        JOIN feeds f ON f.gid = $1 AND f.author = w.author \
        JOIN dropped d ON d.feed = f.feed AND d.first <= w.last AND d.last >= w.first)";
    let authors: Vec<&[u8]> = wants.iter().map(|want| &want.author.0[..]).collect();
    let first: Vec<i64> = wants.iter().map(|want| signed(want.range.first.0)).collect();
    let last: Vec<i64> = wants.iter().map(|want| signed(want.range.last.0)).collect();
    let row = client.query_one(&client.prepare_cached(sql).await?, &[&gid, &authors, &first, &last]).await?;
    Ok(row.try_get(0)?)
}

/// A length of bytes.
fn length(column: i64) -> usize {
    usize::try_from(column).unwrap_or(usize::MAX)
}
