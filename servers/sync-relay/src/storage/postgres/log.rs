//! A group's log under the lock of its row: what changes it, and what this process remembers of it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;

use deadpool_postgres::{Client, Transaction};
use sync_core::{DroppedRange, FeedState, Held, HeldEnvelope, Membership, Origin, RangeSet, judge};
use sync_store::exec::Arrival;
use sync_store::make_check;
use sync_types::{AuthorId, Class, Cursor, Envelope, EnvelopeHash, GroupId, Number, Range, Timestamp, Want};
use tokio::sync::OwnedMutexGuard;
use tokio_postgres::IsolationLevel;

use super::columns::{MAX_NUMBER, author, hash, number, signed, unsigned};
use super::{Hosted, Shared, damaged};
use crate::storage::{Room, StorageError, Stored};

/// What this process remembers of a group's log; it counts only as long as the locked row has the same version.
pub(super) struct Log {
    version: i64,
    membership: Membership,
    /// A copy of the membership for others; none after it changed.
    published: Option<Arc<Membership>>,
    /// Up to here operations were taken in.
    cursor: i64,
    feeds: BTreeMap<AuthorId, Feed>,
}

struct Feed {
    row: i64,
    state: FeedState,
}

impl Log {
    /// Brings what is remembered up to a version, or reads it anew.
    async fn read(txn: &Transaction<'_>, gid: i64, row: &Row, known: Option<Self>) -> Result<Self, StorageError> {
        let (membership, cursor) = match known {
            Some(known) if known.version == row.version => return Ok(known),
            Some(known) => (known.membership, known.cursor),
            None => {
                let statement = txn.prepare_cached("SELECT charter FROM groups WHERE gid = $1").await?;
                let charter: Vec<u8> = txn.query_one(&statement, &[&gid]).await?.try_get(0)?;
                (Membership::new(&charter).map_err(|_| damaged("a charter cannot be read"))?, 0)
            }
        };
        let feeds = feeds(txn, gid).await?;
        let mut log = Self { version: row.version, membership, published: None, cursor, feeds };
        log.take_operations(txn, gid, row.max_cursor).await?;
        Ok(log)
    }

    async fn take_operations(&mut self, txn: &Transaction<'_>, gid: i64, max_cursor: i64) -> Result<(), StorageError> {
        let statement = txn
            .prepare_cached("SELECT bytes FROM entries WHERE gid = $1 AND class = 1 AND cursor > $2 ORDER BY cursor")
            .await?;
        let rows = txn.query(&statement, &[&gid, &self.cursor]).await?;
        let stored = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<Vec<u8>>, _>>()?;
        let left = self.membership.replay(stored).map_err(|_| damaged("a membership entry cannot be read"))?;
        if left > 0 {
            tracing::warn!(entries = left, "membership entries of senders who are not admitted");
        }
        self.cursor = max_cursor;
        Ok(())
    }

    fn published(&mut self) -> Arc<Membership> {
        self.published.get_or_insert_with(|| Arc::new(self.membership.clone())).clone()
    }

    fn wants(&self) -> Vec<Want> {
        let mut feeds: Vec<_> = self.feeds.iter().collect();
        // in the order in which they came, as they are read from the database
        feeds.sort_unstable_by_key(|(_, feed)| feed.row);
        let held = feeds.into_iter().flat_map(|(author, feed)| {
            feed.state.held.ranges().iter().map(|range| Ok::<_, Infallible>((*author, *range)))
        });
        let Ok(wants) = sync_core::wants(held);
        wants
    }
}

async fn feeds(txn: &Transaction<'_>, gid: i64) -> Result<BTreeMap<AuthorId, Feed>, StorageError> {
    let statement = txn
        .prepare_cached(
            "SELECT r.feed, r.first, r.last FROM feed_ranges r JOIN feeds f ON f.feed = r.feed WHERE f.gid = $1",
        )
        .await?;
    let mut ranges: HashMap<i64, Vec<Range>> = HashMap::new();
    for row in txn.query(&statement, &[&gid]).await? {
        let range = Range { first: number(row.try_get(1)?), last: number(row.try_get(2)?) };
        ranges.entry(row.try_get(0)?).or_default().push(range);
    }
    let statement = txn.prepare_cached("SELECT feed, author, head, fork FROM feeds WHERE gid = $1").await?;
    let mut feeds = BTreeMap::new();
    for row in txn.query(&statement, &[&gid]).await? {
        let feed: i64 = row.try_get(0)?;
        let state = FeedState {
            held: RangeSet::from_ranges(ranges.remove(&feed).unwrap_or_default()),
            head: hash(row.try_get(2)?)?,
            fork: row.try_get::<_, Option<i64>>(3)?.map(number),
        };
        feeds.insert(author(row.try_get(1)?)?, Feed { row: feed, state });
    }
    Ok(feeds)
}

/// A group's locked row.
struct Row {
    version: i64,
    max_cursor: i64,
    bytes: i64,
}

/// A group's log whose row is locked until the transaction ends.
struct Locked<'t> {
    txn: Transaction<'t>,
    group: GroupId,
    gid: i64,
    row: Row,
    log: Log,
    /// Something of the log is another than the row's version says.
    changed: bool,
}

impl<'t> Locked<'t> {
    async fn lock(client: &'t mut Client, group: GroupId, gid: i64, known: Option<Log>) -> Result<Self, StorageError> {
        let txn = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
        let statement =
            txn.prepare_cached("SELECT version, max_cursor, bytes FROM logs WHERE gid = $1 FOR UPDATE").await?;
        let row = txn.query_opt(&statement, &[&gid]).await?.ok_or(StorageError::UnknownGroup(group))?;
        let row = Row { version: row.try_get(0)?, max_cursor: row.try_get(1)?, bytes: row.try_get(2)? };
        let log = Log::read(&txn, gid, &row, known).await?;
        Ok(Self { txn, group, gid, row, log, changed: false })
    }

    /// Makes everything durable, and lets others at the log.
    async fn commit(mut self) -> Result<Log, StorageError> {
        if self.changed {
            self.row.version += 1;
            let Row { version, max_cursor, bytes } = self.row;
            let sql = "UPDATE logs SET version = $2, max_cursor = $3, bytes = $4 WHERE gid = $1";
            let statement = self.txn.prepare_cached(sql).await?;
            self.txn.execute(&statement, &[&self.gid, &version, &max_cursor, &bytes]).await?;
            self.log.version = version;
            self.log.cursor = max_cursor;
        }
        self.txn.commit().await?;
        Ok(self.log)
    }

    /// Remembers who sent a batch, and up to where that one's log was read with it.
    async fn note_peer(&self, arrival: &Arrival) -> Result<(), StorageError> {
        let Some(replica) = &arrival.replica else { return Ok(()) };
        let (txn, gid, replica) = (&self.txn, &self.gid, &replica.0[..]);
        match &arrival.position {
            None => {
                let sql = "INSERT INTO peers (gid, replica) VALUES ($1, $2) ON CONFLICT DO NOTHING";
                txn.execute(&txn.prepare_cached(sql).await?, &[gid, &replica]).await?;
            }
            Some((cursor, check)) => {
                let sql = "INSERT INTO peers (gid, replica, cursor, chk) VALUES ($1, $2, $3, $4) \
                    ON CONFLICT (gid, replica) DO UPDATE SET cursor = $3, chk = $4";
                let (cursor, check) = (signed(cursor.0), &check.0[..]);
                txn.execute(&txn.prepare_cached(sql).await?, &[gid, &replica, &cursor, &check]).await?;
            }
        }
        Ok(())
    }

    /// Stores what counts of a batch: returns how many entries, and how many do not count.
    async fn take(&mut self, arrival: &Arrival) -> Result<(usize, usize), StorageError> {
        let batch = &arrival.batch[..];
        if batch.is_empty() {
            return Ok((0, 0));
        }
        let held = held_at(&self.txn, &self.log.around(batch)).await?;
        let origin = if arrival.replica.is_some() { Origin::Member } else { Origin::Unproven };
        let Log { membership, feeds, .. } = &mut self.log;
        let Ok(judged) = judge(&self.group, membership, &mut Here { feeds, held: &held }, origin, batch);
        let storable = judged.storable(batch, MAX_NUMBER);
        let refused = storable.refused.len();
        let authors = storable.accepted.iter().map(|accepted| accepted.envelope.header.sender);
        self.make_feeds(authors).await?;
        let mut rows = Rows::default();
        let mut before: BTreeMap<AuthorId, RangeSet> = BTreeMap::new();
        let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
        for accepted in &storable.accepted {
            let (envelope, header) = (&accepted.envelope, &accepted.envelope.header);
            let feed = self.log.feeds.get_mut(&header.sender).ok_or_else(|| damaged("a feed was not made"))?;
            before.entry(header.sender).or_insert_with(|| feed.state.held.clone());
            feed.state.take(header.number, accepted.hash, accepted.fork);
            self.row.max_cursor += 1;
            self.row.bytes += signed(envelope.bytes().len() as u64);
            rows.cursor.push(self.row.max_cursor);
            rows.check.push(make_check(&mut rng).0.to_vec());
            rows.feed.push(feed.row);
            rows.number.push(signed(header.number.0));
            rows.class.push(i16::from(header.class.code()));
            rows.hash.push(accepted.hash.0.to_vec());
            rows.previous.push(header.previous.0.to_vec());
            rows.bytes.push(envelope.bytes());
            if header.class == Class::Membership {
                self.log.published = None;
            }
        }
        if !storable.accepted.is_empty() {
            self.changed = true;
            rows.insert(&self.txn, self.gid, arrival).await?;
            self.write_feeds(&before).await?;
        }
        if storable.membership_ahead {
            self.log = Log::read(&self.txn, self.gid, &self.row, None).await?;
        }
        Ok((storable.accepted.len(), refused))
    }

    /// Makes feeds of which nothing was held, in their order.
    async fn make_feeds(&mut self, authors: impl Iterator<Item = AuthorId>) -> Result<(), StorageError> {
        let mut new: Vec<AuthorId> = Vec::new();
        let mut seen = BTreeSet::new();
        for author in authors.filter(|author| !self.log.feeds.contains_key(author)) {
            if seen.insert(author) {
                new.push(author);
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let sql = "INSERT INTO feeds (gid, author, head) \
            SELECT $1::bigint, n.author, $3::bytea FROM unnest($2::bytea[]) WITH ORDINALITY AS n (author, at) \
            ORDER BY n.at RETURNING feed, author";
        let authors: Vec<&[u8]> = new.iter().map(|author| &author.0[..]).collect();
        let statement = self.txn.prepare_cached(sql).await?;
        let head = FeedState::default().head;
        for row in self.txn.query(&statement, &[&self.gid, &authors, &&head.0[..]]).await? {
            let feed = Feed { row: row.try_get(0)?, state: FeedState::default() };
            self.log.feeds.insert(author(row.try_get(1)?)?, feed);
        }
        Ok(())
    }

    /// Writes ranges, heads and forks of feeds; `before` has what ranges they had.
    async fn write_feeds(&self, before: &BTreeMap<AuthorId, RangeSet>) -> Result<(), StorageError> {
        let (mut rows, mut heads, mut forks) = (Vec::new(), Vec::new(), Vec::new());
        let (mut gone_of, mut gone) = (Vec::new(), Vec::new());
        let (mut new_of, mut first, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (author, before) in before {
            let Some(feed) = self.log.feeds.get(author) else { continue };
            rows.push(feed.row);
            heads.push(&feed.state.head.0[..]);
            forks.push(feed.state.fork.map(|number| signed(number.0)));
            let after: BTreeSet<Range> = feed.state.held.ranges().iter().copied().collect();
            let before: BTreeSet<Range> = before.ranges().iter().copied().collect();
            for range in before.difference(&after) {
                gone_of.push(feed.row);
                gone.push(signed(range.first.0));
            }
            for range in after.difference(&before) {
                new_of.push(feed.row);
                first.push(signed(range.first.0));
                last.push(signed(range.last.0));
            }
        }
        let txn = &self.txn;
        if !gone.is_empty() {
            let sql = "DELETE FROM feed_ranges r USING unnest($1::bigint[], $2::bigint[]) AS g (feed, first) \
                WHERE r.feed = g.feed AND r.first = g.first";
            txn.execute(&txn.prepare_cached(sql).await?, &[&gone_of, &gone]).await?;
        }
        if !first.is_empty() {
            let sql = "INSERT INTO feed_ranges (feed, first, last) \
                SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[])";
            txn.execute(&txn.prepare_cached(sql).await?, &[&new_of, &first, &last]).await?;
        }
        let sql = "UPDATE feeds f SET head = n.head, fork = n.fork \
            FROM unnest($1::bigint[], $2::bytea[], $3::bigint[]) AS n (feed, head, fork) WHERE f.feed = n.feed";
        txn.execute(&txn.prepare_cached(sql).await?, &[&rows, &heads, &forks]).await?;
        Ok(())
    }

    /// Adds a range whose envelopes are not here, joined with those beside it.
    async fn add_dropped(&self, feed: i64, dropped: DroppedRange) -> Result<(), StorageError> {
        let beside = [dropped.range.first.previous(), dropped.range.last.next()];
        let places: Vec<_> = beside.iter().flatten().map(|number| (feed, *number)).collect();
        let found = dropped_at(&self.txn, &places).await?;
        let [before, behind] = beside.map(|number| number.and_then(|number| found.get(&(feed, number)).copied()));
        let DroppedRange { range, head } = dropped.joined(before, behind);
        let (first, last) = (signed(range.first.0), signed(range.last.0));
        let txn = &self.txn;
        let sql = "DELETE FROM dropped WHERE feed = $1 AND first BETWEEN $2 AND $3";
        txn.execute(&txn.prepare_cached(sql).await?, &[&feed, &first, &last]).await?;
        let sql = "INSERT INTO dropped (feed, first, last, head) VALUES ($1, $2, $3, $4)";
        txn.execute(&txn.prepare_cached(sql).await?, &[&feed, &first, &last, &&head.0[..]]).await?;
        Ok(())
    }
}

impl Log {
    /// The places of feeds that judging a batch asks for.
    fn around(&self, batch: &[Vec<u8>]) -> Vec<(i64, Number)> {
        let mut places = BTreeSet::new();
        for envelope in batch.iter().filter_map(|bytes| Envelope::parse(bytes).ok()) {
            let Some(feed) = self.feeds.get(&envelope.header.sender) else { continue };
            let number = envelope.header.number;
            let around = [number.previous(), Some(number), number.next()];
            let held = around.into_iter().flatten().filter(|number| feed.state.held.contains(*number));
            places.extend(held.map(|number| (feed.row, number)));
        }
        places.into_iter().collect()
    }
}

/// What is stored at some places of feeds.
#[derive(Default)]
pub(super) struct HeldAt {
    pub(super) stored: HashMap<(i64, Number), Vec<HeldEnvelope>>,
    dropped: HashSet<(i64, Number)>,
}

/// What is stored at each of these numbers, or of what was dropped there the hash, if it is known.
pub(super) async fn held_at(txn: &Transaction<'_>, places: &[(i64, Number)]) -> Result<HeldAt, StorageError> {
    let mut held = HeldAt::default();
    if places.is_empty() {
        return Ok(held);
    }
    let sql = "SELECT e.feed, e.number, e.hash, e.previous \
        FROM unnest($1::bigint[], $2::bigint[]) AS p (feed, number) \
        JOIN entries e ON e.feed = p.feed AND e.number = p.number ORDER BY e.cursor";
    let (feeds, numbers): (Vec<i64>, Vec<i64>) = places.iter().map(|(feed, number)| (*feed, signed(number.0))).unzip();
    for row in txn.query(&txn.prepare_cached(sql).await?, &[&feeds, &numbers]).await? {
        let envelope = HeldEnvelope { hash: hash(row.try_get(2)?)?, previous: Some(hash(row.try_get(3)?)?) };
        held.stored.entry((row.try_get(0)?, number(row.try_get(1)?))).or_default().push(envelope);
    }
    let lacking: Vec<_> = places.iter().filter(|place| !held.stored.contains_key(place)).copied().collect();
    for (place, dropped) in dropped_at(txn, &lacking).await? {
        held.dropped.insert(place);
        if dropped.range.last == place.1 {
            held.stored.insert(place, vec![HeldEnvelope { hash: dropped.head, previous: None }]);
        }
    }
    Ok(held)
}

/// What was dropped around each of these numbers.
async fn dropped_at(
    txn: &Transaction<'_>,
    places: &[(i64, Number)],
) -> Result<HashMap<(i64, Number), DroppedRange>, StorageError> {
    let mut found = HashMap::new();
    if places.is_empty() {
        return Ok(found);
    }
    let sql = "SELECT p.feed, p.number, d.first, d.last, d.head \
        FROM unnest($1::bigint[], $2::bigint[]) AS p (feed, number) CROSS JOIN LATERAL ( \
            SELECT first, last, head FROM dropped \
            WHERE dropped.feed = p.feed AND dropped.first <= p.number ORDER BY first DESC LIMIT 1 \
        ) AS d WHERE d.last >= p.number";
    let (feeds, numbers): (Vec<i64>, Vec<i64>) = places.iter().map(|(feed, number)| (*feed, signed(number.0))).unzip();
    for row in txn.query(&txn.prepare_cached(sql).await?, &[&feeds, &numbers]).await? {
        let range = Range { first: number(row.try_get(2)?), last: number(row.try_get(3)?) };
        let dropped = DroppedRange { range, head: hash(row.try_get(4)?)? };
        found.insert((row.try_get(0)?, number(row.try_get(1)?)), dropped);
    }
    Ok(found)
}

/// What the judge asks, read beforehand.
struct Here<'a> {
    feeds: &'a BTreeMap<AuthorId, Feed>,
    held: &'a HeldAt,
}

impl Here<'_> {
    fn place(&self, author: &AuthorId, number: Number) -> Option<(i64, Number)> {
        self.feeds.get(author).map(|feed| (feed.row, number))
    }
}

impl Held for Here<'_> {
    type Error = Infallible;

    fn highest(&mut self, author: &AuthorId) -> Result<Option<Number>, Infallible> {
        Ok(self.feeds.get(author).and_then(|feed| feed.state.held.highest()))
    }

    fn at(&mut self, author: &AuthorId, number: Number) -> Result<Vec<HeldEnvelope>, Infallible> {
        let place = self.place(author, number);
        Ok(place.and_then(|place| self.held.stored.get(&place)).cloned().unwrap_or_default())
    }

    fn is_dropped(&mut self, author: &AuthorId, number: Number) -> Result<bool, Infallible> {
        Ok(self.place(author, number).is_some_and(|place| self.held.dropped.contains(&place)))
    }
}

/// Entries about to be stored, by column.
#[derive(Default)]
struct Rows<'a> {
    cursor: Vec<i64>,
    check: Vec<Vec<u8>>,
    feed: Vec<i64>,
    number: Vec<i64>,
    class: Vec<i16>,
    hash: Vec<Vec<u8>>,
    previous: Vec<Vec<u8>>,
    bytes: Vec<&'a [u8]>,
}

impl Rows<'_> {
    async fn insert(&self, txn: &Transaction<'_>, gid: i64, arrival: &Arrival) -> Result<(), StorageError> {
        let sql = "INSERT INTO entries (gid, source, cursor, chk, feed, number, class, hash, previous, bytes) \
            SELECT $1::bigint, $2::bytea, n.* FROM unnest($3::bigint[], $4::bytea[], $5::bigint[], $6::bigint[], \
                $7::smallint[], $8::bytea[], $9::bytea[], $10::bytea[]) AS n";
        let source = arrival.replica.as_ref().map(|replica| &replica.0[..]);
        let Self { cursor, check, feed, number, class, hash, previous, bytes } = self;
        let statement = txn.prepare_cached(sql).await?;
        txn.execute(&statement, &[&gid, &source, cursor, check, feed, number, class, hash, previous, bytes]).await?;
        Ok(())
    }
}

/// Stores what counts of a batch and has room, and the position reached with it.
pub(super) async fn store(
    shared: Arc<Shared>,
    hosted: Arc<Hosted>,
    mut known: OwnedMutexGuard<Option<Log>>,
    group: GroupId,
    mut arrival: Arrival,
    room: Room,
) -> Result<Stored, StorageError> {
    let mut client = shared.client().await?;
    let mut locked = Locked::lock(&mut client, group, hosted.gid, known.take()).await?;
    let before = locked.row.bytes;
    let of_database = shared.used(&locked.txn).await?;
    let lacking = room.fit(&mut arrival, unsigned(before), of_database);
    locked.note_peer(&arrival).await?;
    let (new, refused) = locked.take(&arrival).await?;
    let (membership, wants) = (locked.log.published(), locked.log.wants());
    let (newest, more) = (Cursor(unsigned(locked.row.max_cursor)), unsigned(locked.row.bytes - before));
    *known = Some(locked.commit().await?);
    shared.committed(more);
    if new > 0 {
        shared.grown(&hosted, group, newest);
    }
    Ok(Stored { lacking, new, refused, membership, wants })
}

/// Counts what was dropped of these as lacking from now on, with what was dropped together with it; false if none was.
pub(super) async fn want_again(shared: &Shared, group: GroupId, wants: &[Want]) -> Result<bool, StorageError> {
    let hosted = shared.expect(group).await?;
    let mut known = hosted.log.lock().await;
    let mut client = shared.client().await?;
    let mut locked = Locked::lock(&mut client, group, hosted.gid, known.take()).await?;
    let (mut feeds, mut first, mut last) = (Vec::new(), Vec::new(), Vec::new());
    for want in wants {
        let Some(feed) = locked.log.feeds.get(&want.author) else { continue };
        feeds.push(feed.row);
        first.push(signed(want.range.first.0));
        last.push(signed(want.range.last.0));
    }
    let sql = "DELETE FROM dropped d USING unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS w (feed, first, last) \
        WHERE d.feed = w.feed AND d.first <= w.last AND d.last >= w.first RETURNING d.feed, d.first, d.last";
    let rows = locked.txn.query(&locked.txn.prepare_cached(sql).await?, &[&feeds, &first, &last]).await?;
    let mut lacking: HashMap<i64, Vec<Range>> = HashMap::new();
    for row in rows {
        let range = Range { first: number(row.try_get(1)?), last: number(row.try_get(2)?) };
        lacking.entry(row.try_get(0)?).or_default().push(range);
    }
    let mut before = BTreeMap::new();
    for (author, feed) in &mut locked.log.feeds {
        let Some(lacking) = lacking.get(&feed.row) else { continue };
        let held = feed.state.held.without(lacking);
        before.insert(*author, std::mem::replace(&mut feed.state.held, held));
    }
    if !before.is_empty() {
        locked.changed = true;
        locked.write_feeds(&before).await?;
    }
    *known = Some(locked.commit().await?);
    Ok(!before.is_empty())
}

/// An entry that is old.
struct Old {
    feed: i64,
    number: Number,
    hash: EnvelopeHash,
}

/// Drops what is sealed and was here at `before`, at most `limit` entries: returns how many.
pub(super) async fn expire(
    shared: &Shared,
    group: GroupId,
    before: Timestamp,
    limit: usize,
) -> Result<usize, StorageError> {
    let hosted = shared.expect(group).await?;
    let mut known = hosted.log.lock().await;
    let mut client = shared.client().await?;
    let sql = "SELECT max(cursor) FROM marks WHERE gid = $1 AND at <= $2";
    let statement = client.prepare_cached(sql).await?;
    let mark = client.query_one(&statement, &[&hosted.gid, &signed(before.0)]).await?;
    let Some(up_to) = mark.try_get::<_, Option<i64>>(0)? else { return Ok(0) };
    let mut locked = Locked::lock(&mut client, group, hosted.gid, known.take()).await?;
    let old = locked.old(up_to, limit).await?;
    for run in old.chunk_by(|one, next| one.feed == next.feed && one.number.next() == Some(next.number)) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let range = Range { first: first.number, last: last.number };
        locked.add_dropped(first.feed, DroppedRange { range, head: last.hash }).await?;
    }
    let (txn, gid) = (&locked.txn, locked.gid);
    if !old.is_empty() {
        let sql = "UPDATE logs SET holds_from = greatest(holds_from, $2) WHERE gid = $1";
        txn.execute(&txn.prepare_cached(sql).await?, &[&gid, &(up_to + 1)]).await?;
        locked.changed = true;
    }
    if old.len() < limit {
        // what it covers is gone; the newest such mark says so to later ones
        let sql = "DELETE FROM marks WHERE gid = $1 AND cursor < $2";
        txn.execute(&txn.prepare_cached(sql).await?, &[&gid, &up_to]).await?;
    }
    *known = Some(locked.commit().await?);
    shared.committed(0);
    Ok(old.len())
}

impl Locked<'_> {
    /// Takes out entries that are sealed and old; by feed and number.
    async fn old(&mut self, up_to: i64, limit: usize) -> Result<Vec<Old>, StorageError> {
        let (mut feeds, mut below) = (Vec::new(), Vec::new());
        for feed in self.log.feeds.values() {
            if let Some(number) = feed.state.may_expire_below() {
                feeds.push(feed.row);
                below.push(signed(number.0));
            }
        }
        let sql = "SELECT f.feed, e.number, e.hash, e.cursor, octet_length(e.bytes)::bigint \
            FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS f (feed, below, at) CROSS JOIN LATERAL ( \
                SELECT number, hash, cursor, bytes FROM entries \
                WHERE entries.feed = f.feed AND number < f.below AND cursor <= $3 AND class = 0 \
                ORDER BY number LIMIT $4 \
            ) AS e ORDER BY f.at, e.number LIMIT $4";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self.txn.query(&self.txn.prepare_cached(sql).await?, &[&feeds, &below, &up_to, &limit]).await?;
        let (mut old, mut cursors) = (Vec::new(), Vec::new());
        for row in rows {
            old.push(Old { feed: row.try_get(0)?, number: number(row.try_get(1)?), hash: hash(row.try_get(2)?)? });
            cursors.push(row.try_get::<_, i64>(3)?);
            self.row.bytes -= row.try_get::<_, i64>(4)?;
        }
        let (txn, gid) = (&self.txn, &self.gid);
        // the check of the newest cursor is what devices come back with
        let sql = "UPDATE entries SET feed = NULL, number = NULL, class = NULL, source = NULL, hash = NULL, \
            previous = NULL, bytes = NULL WHERE gid = $1 AND cursor = ANY ($2) AND cursor = $3";
        txn.execute(&txn.prepare_cached(sql).await?, &[gid, &cursors, &self.row.max_cursor]).await?;
        let sql = "DELETE FROM entries WHERE gid = $1 AND cursor = ANY ($2) AND cursor <> $3";
        txn.execute(&txn.prepare_cached(sql).await?, &[gid, &cursors, &self.row.max_cursor]).await?;
        Ok(old)
    }
}
