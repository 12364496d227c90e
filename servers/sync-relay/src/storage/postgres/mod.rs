//! PostgreSQL: one database for several processes.
//!
//! Whoever changes a group's log locks its row first, so cursors are given without gaps and become visible in their order,
//! and what the row says of room and of the newest cursor is true for all.
//! What a process remembers of a log counts only if the locked row has the version it had then.
//! The processes tell each other what is new by NOTIFY: a hint, and every process looks by itself now and then.

mod columns;
mod log;
mod notices;
mod read;
mod tls;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::{Client, Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime, Transaction};
use futures_util::FutureExt as _;
use rand_core::Rng as _;
use sync_core::Membership;
use sync_core::session::Reply;
use sync_store::WaitingRequest;
use sync_store::exec::{Arrival, Pull};
use sync_store::{Limits, Window};
use sync_types::{Cursor, ErrorCode, GroupId, ReplicaId, Timestamp, Want};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, Row};
use tokio_util::sync::CancellationToken;

use super::{Live, Reading, Room, Storage, StorageError, Stored, Tail, Usage, Work};
use columns::{fixed, signed, unsigned};
use notices::{Listener, Telling};
use tls::Tls;

const MIGRATION: &str = include_str!("../../../migrations/0001_postgres.sql");
/// The version of the schema.
const VERSION: u32 = 1;
/// Connections beside the one that listens: more than a database's disk can use, and six processes fit the hundred that
/// PostgreSQL allows unless told otherwise.
const CONNECTIONS: usize = 15;
/// Time for a connection to be made or to become free: who waits longer hears that the database does not work.
const CONNECT_WAIT: Duration = Duration::from_secs(5);
/// Time without an answer from a host after which a connection to it counts as lost.
const LOST_AFTER: Duration = Duration::from_secs(30);
/// What holds for each connection: durable commits, and no lock of a process that hangs is waited for without end.
const OPTIONS: &str = "-c search_path=sync_relay -c synchronous_commit=on -c lock_timeout=10s \
    -c statement_timeout=60s -c idle_in_transaction_session_timeout=30s";
/// The lock under which the schema is made and groups are counted: the same number for every process.
const LOCK: i64 = 0x7379_6e63_7265_6c61;
/// For how long the sum over all groups is good: others may store as much meanwhile as they can in that time.
const SUM_AGE: Duration = Duration::from_secs(1);

/// A database in PostgreSQL.
pub(super) struct Postgres {
    shared: Arc<Shared>,
    stop: CancellationToken,
    telling: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

/// What all that use it share.
struct Shared {
    pool: Pool,
    replica: ReplicaId,
    groups: Mutex<HashMap<GroupId, Arc<Hosted>>>,
    used: Mutex<Option<Used>>,
    commits: AtomicU64,
    telling: Telling,
}

/// A group that is kept here.
struct Hosted {
    gid: i64,
    newest: watch::Sender<Cursor>,
    wanted: watch::Sender<()>,
    tail: Arc<Tail>,
    /// One of this process changes it at a time.
    log: Arc<tokio::sync::Mutex<Option<log::Log>>>,
}

/// Bytes of all groups.
struct Used {
    at: Instant,
    bytes: u64,
}

impl Postgres {
    /// Opens the database that a URL names, and makes what belongs into it where that is not there.
    pub(super) async fn open(url: &str, authority: Option<&Path>) -> Result<Self, StorageError> {
        let config = config(url)?;
        let tls = Tls::new(authority)?;
        let how = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let pool = Pool::builder(Manager::from_config(config.clone(), tls.clone(), how))
            .max_size(CONNECTIONS)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(CONNECT_WAIT))
            .create_timeout(Some(CONNECT_WAIT))
            .build()
            .map_err(|error| StorageError::Postgres(error.to_string()))?;
        let replica = prepare(&mut pool.get().await?).await?;
        let shared = Arc::new(Shared {
            pool,
            replica,
            groups: Mutex::default(),
            used: Mutex::default(),
            commits: AtomicU64::new(0),
            telling: Telling::default(),
        });
        let stop = CancellationToken::new();
        // before anything is read, so that no notice is missed
        let first = Listener::open(&shared, &config, &tls).await?;
        let telling = tokio::spawn(notices::run(first, shared.clone(), config, tls, stop.clone()));
        Ok(Self { shared, stop, telling: tokio::sync::Mutex::new(Some(telling)) })
    }
}

/// What a URL and this program say of each connection.
fn config(url: &str) -> Result<Config, StorageError> {
    let mut config: Config = url.parse().map_err(|error| StorageError::Url(told(&error)))?;
    let options = config.get_options().map_or(OPTIONS.to_owned(), |more| format!("{more} {OPTIONS}"));
    config.options(options).application_name("sync-relay").connect_timeout(CONNECT_WAIT);
    config.keepalives_idle(LOST_AFTER).tcp_user_timeout(LOST_AFTER);
    Ok(config)
}

/// Makes what belongs into the database, unless it is there: returns the database's id.
async fn prepare(client: &mut Client) -> Result<ReplicaId, StorageError> {
    let txn = client.transaction().await?;
    txn.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    let made = txn.query_one("SELECT to_regclass('sync_relay.meta') IS NOT NULL", &[]).await?;
    if !made.try_get::<_, bool>(0)? {
        txn.batch_execute(MIGRATION).await?;
        let mut replica = [0; ReplicaId::LEN];
        rand_core::UnwrapErr(getrandom::SysRng).fill_bytes(&mut replica);
        let sql = "INSERT INTO meta (key, value) VALUES ('version', $1), ('replica', $2)";
        txn.execute(sql, &[&&VERSION.to_be_bytes()[..], &&replica[..]]).await?;
    }
    let meta = txn.query("SELECT key, value FROM meta", &[]).await?;
    txn.commit().await?;
    let (mut found, mut replica) = (None, None);
    for row in meta {
        match row.try_get(0)? {
            "version" => found = Some(u32::from_be_bytes(fixed(row.try_get(1)?)?)),
            "replica" => replica = Some(ReplicaId(fixed(row.try_get(1)?)?)),
            _ => {}
        }
    }
    match found {
        Some(found) if found > VERSION => Err(StorageError::Newer { found, known: VERSION }),
        Some(_) => replica.ok_or_else(|| damaged("its id is missing")),
        None => Err(damaged("its version is missing")),
    }
}

impl Shared {
    async fn client(&self) -> Result<Client, StorageError> {
        Ok(self.pool.get().await?)
    }

    /// A group that is kept here.
    async fn hosted(&self, group: GroupId) -> Result<Option<Arc<Hosted>>, StorageError> {
        if let Some(hosted) = self.groups().get(&group) {
            return Ok(Some(hosted.clone()));
        }
        let client = self.client().await?;
        let sql = "SELECT gid FROM groups WHERE id = $1";
        let Some(row) = client.query_opt(&client.prepare_cached(sql).await?, &[&&group.0[..]]).await? else {
            return Ok(None);
        };
        let gid = row.try_get(0)?;
        let hosted = {
            let new = || {
                let (newest, wanted) = (watch::Sender::new(Cursor(0)), watch::Sender::new(()));
                Arc::new(Hosted { gid, newest, wanted, tail: Arc::default(), log: Arc::default() })
            };
            self.groups().entry(group).or_insert_with(new).clone()
        };
        // once it is known, so that no notice of a later cursor is passed over
        let sql = "SELECT max_cursor FROM logs WHERE gid = $1";
        let row = client.query_one(&client.prepare_cached(sql).await?, &[&gid]).await?;
        hosted.raise(Cursor(unsigned(row.try_get(0)?)));
        Ok(Some(hosted))
    }

    async fn gid(&self, group: GroupId) -> Result<i64, StorageError> {
        self.expect(group).await.map(|hosted| hosted.gid)
    }

    async fn expect(&self, group: GroupId) -> Result<Arc<Hosted>, StorageError> {
        self.hosted(group).await?.ok_or(StorageError::UnknownGroup(group))
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<GroupId, Arc<Hosted>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the envelopes of all groups, as they were a moment ago.
    async fn used(&self, txn: &Transaction<'_>) -> Result<u64, StorageError> {
        let fresh = |used: &&Used| used.at.elapsed() < SUM_AGE;
        if let Some(used) = self.sum().as_ref().filter(fresh) {
            return Ok(used.bytes);
        }
        let row = txn.query_one("SELECT coalesce(sum(bytes), 0)::bigint FROM logs", &[]).await?;
        let bytes = unsigned(row.try_get(0)?);
        *self.sum() = Some(Used { at: Instant::now(), bytes });
        Ok(bytes)
    }

    fn sum(&self) -> MutexGuard<'_, Option<Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something became durable, and so many bytes with it.
    fn committed(&self, bytes: u64) {
        self.commits.fetch_add(1, Ordering::Relaxed);
        if let Some(used) = &mut *self.sum() {
            used.bytes = used.bytes.saturating_add(bytes);
        }
    }

    /// A group's log goes up to here now: tells those of this process, and the others.
    fn grown(&self, hosted: &Hosted, group: GroupId, newest: Cursor) {
        hosted.raise(newest);
        self.telling.newest(group, newest);
    }
}

impl Hosted {
    /// Its log goes at least up to here.
    fn raise(&self, newest: Cursor) {
        self.newest.send_if_modified(|known| {
            let more = newest > *known;
            *known = newest.max(*known);
            more
        });
    }
}

impl Storage for Postgres {
    fn replica(&self) -> ReplicaId {
        self.shared.replica
    }

    fn live(&self, group: GroupId) -> Work<'_, Option<Live>> {
        async move {
            let hosted = self.shared.hosted(group).await?;
            Ok(hosted.map(|hosted| Live {
                newest: hosted.newest.subscribe(),
                wanted: hosted.wanted.subscribe(),
                tail: hosted.tail.clone(),
            }))
        }
        .boxed()
    }

    fn host(&self, charter: Vec<u8>, groups: usize, database_bytes: u64) -> Work<'_, Option<ErrorCode>> {
        async move {
            let group = GroupId::of(&charter);
            Membership::new(&charter).map_err(|_| StorageError::UnknownGroup(group))?;
            let mut client = self.shared.client().await?;
            let txn = client.transaction().await?;
            // new groups are counted and taken in one after the other, whichever process they came to
            txn.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
            let sql = "SELECT count(*), coalesce(bool_or(id = $1), false), \
                (SELECT coalesce(sum(bytes), 0)::bigint FROM logs) FROM groups";
            let row = txn.query_one(sql, &[&&group.0[..]]).await?;
            if row.try_get(1)? {
                return Ok(None);
            }
            if unsigned(row.try_get(0)?) >= groups as u64 {
                return Ok(Some(ErrorCode::TooManyGroups));
            }
            if unsigned(row.try_get(2)?) >= database_bytes {
                return Ok(Some(ErrorCode::StorageFull));
            }
            let sql = "WITH new AS (INSERT INTO groups (id, charter) VALUES ($1, $2) RETURNING gid) \
                INSERT INTO logs (gid) SELECT gid FROM new";
            txn.execute(sql, &[&&group.0[..], &charter]).await?;
            txn.commit().await?;
            self.shared.committed(0);
            Ok(None)
        }
        .boxed()
    }

    fn store(&self, group: GroupId, arrival: Arrival, room: Room) -> Work<'_, Stored> {
        async move {
            let hosted = self.shared.expect(group).await?;
            // in the order in which they were asked for
            let known = hosted.log.clone().lock_owned().await;
            // to its end, also where who asked for it goes away: others are told of what was stored
            let work = log::store(self.shared.clone(), hosted, known, group, arrival, room);
            tokio::spawn(work).await.unwrap_or_else(|_| Err(StorageError::Postgres("the relay stops".to_owned())))
        }
        .boxed()
    }

    fn survey(&self, group: GroupId, replica: ReplicaId) -> Work<'_, Reply> {
        read::survey(&self.shared, group, replica).boxed()
    }

    fn select(&self, group: GroupId, pull: Pull) -> Work<'_, Reply> {
        read::select(&self.shared, group, pull).boxed()
    }

    fn read(&self, group: GroupId, reading: Reading) -> Work<'_, Reply> {
        read::read(&self.shared, group, reading).boxed()
    }

    fn window(&self, group: GroupId, after: Cursor, limits: Limits) -> Work<'_, Window> {
        read::window(&self.shared, group, after, limits).boxed()
    }

    fn read_wanted(&self, group: GroupId, request: u32, wants: Vec<Want>) -> Work<'_, Reply> {
        async move { read::read_wanted(&self.shared, group, request, &wants).await }.boxed()
    }

    fn wants(&self, group: GroupId) -> Work<'_, Vec<Want>> {
        read::wants(&self.shared, group).boxed()
    }

    fn want_again(&self, group: GroupId, wants: Vec<Want>) -> Work<'_, ()> {
        async move {
            if read::was_dropped(&self.shared, group, &wants).await?
                && log::want_again(&self.shared, group, &wants).await?
            {
                self.shared.expect(group).await?.wanted.send_replace(());
                self.shared.telling.wanted(group);
            }
            Ok(())
        }
        .boxed()
    }

    fn groups(&self) -> Work<'_, Vec<GroupId>> {
        async move {
            let client = self.shared.client().await?;
            let rows = client.query("SELECT id FROM groups ORDER BY gid", &[]).await?;
            rows.iter().map(|row| Ok(GroupId(fixed(row.try_get(0)?)?))).collect()
        }
        .boxed()
    }

    fn mark_time(&self, group: GroupId, now: Timestamp) -> Work<'_, ()> {
        async move {
            let gid = self.shared.gid(group).await?;
            let client = self.shared.client().await?;
            let sql = "INSERT INTO marks (gid, at, cursor) SELECT l.gid, $2, l.max_cursor FROM logs l WHERE l.gid = $1 \
                AND l.max_cursor <> coalesce((SELECT max(m.cursor) FROM marks m WHERE m.gid = $1), 0) \
                ON CONFLICT (gid, at) DO UPDATE SET cursor = excluded.cursor";
            client.execute(&client.prepare_cached(sql).await?, &[&gid, &signed(now.0)]).await?;
            Ok(())
        }
        .boxed()
    }

    fn expire(&self, group: GroupId, before: Timestamp, limit: usize) -> Work<'_, usize> {
        async move {
            let dropped = log::expire(&self.shared, group, before, limit).await?;
            self.shared.expect(group).await?.tail.forget().await;
            Ok(dropped)
        }
        .boxed()
    }

    fn keep_request(&self, request: WaitingRequest, oldest: Timestamp) -> Work<'_, ()> {
        async move {
            let client = self.shared.client().await?;
            let WaitingRequest { place, number, owner, left, request, answer } = request;
            client.execute("DELETE FROM requests WHERE left_at < $1", &[&signed(oldest.0)]).await?;
            let sql = "INSERT INTO requests (place, number, owner, left_at, request, answer) \
                VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (place, number) DO UPDATE SET owner = excluded.owner, \
                left_at = excluded.left_at, request = excluded.request, answer = excluded.answer";
            let number = i64::from(number);
            let values: [&(dyn ToSql + Sync); 6] =
                [&&place[..], &number, &&owner[..], &signed(left.0), &request, &answer];
            client.execute(sql, &values).await?;
            Ok(())
        }
        .boxed()
    }

    fn keep_answer(&self, place: [u8; 16], number: u32, answer: Vec<u8>) -> Work<'_, ()> {
        async move {
            let client = self.shared.client().await?;
            let sql = "UPDATE requests SET answer = $3 WHERE place = $1 AND number = $2";
            client.execute(sql, &[&&place[..], &i64::from(number), &answer]).await?;
            Ok(())
        }
        .boxed()
    }

    fn forget_requests(&self, place: [u8; 16], number: Option<u32>) -> Work<'_, ()> {
        async move {
            let client = self.shared.client().await?;
            let sql = "DELETE FROM requests WHERE place = $1 AND number = coalesce($2, number)";
            client.execute(sql, &[&&place[..], &number.map(i64::from)]).await?;
            Ok(())
        }
        .boxed()
    }

    fn requests(&self) -> Work<'_, Vec<WaitingRequest>> {
        async move {
            let client = self.shared.client().await?;
            let sql = "SELECT place, number, owner, left_at, request, answer FROM requests ORDER BY place, number";
            let rows = client.query(sql, &[]).await?;
            let read = |row: &Row| {
                Ok(WaitingRequest {
                    place: fixed(row.try_get(0)?)?,
                    number: u32::try_from(row.try_get::<_, i64>(1)?).map_err(|_| damaged("a request's number"))?,
                    owner: fixed(row.try_get(2)?)?,
                    left: Timestamp(unsigned(row.try_get(3)?)),
                    request: row.try_get(4)?,
                    answer: row.try_get(5)?,
                })
            };
            rows.iter().map(read).collect()
        }
        .boxed()
    }

    fn usage(&self) -> Work<'_, Usage> {
        async move {
            let client = self.shared.client().await?;
            let sql = "SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM logs";
            let row = client.query_one(sql, &[]).await?;
            let groups = usize::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0);
            let commits = self.shared.commits.load(Ordering::Relaxed);
            Ok(Usage { groups, bytes: unsigned(row.try_get(1)?), commits })
        }
        .boxed()
    }

    fn close(&self) -> Work<'_, ()> {
        async move {
            self.stop.cancel();
            if let Some(telling) = self.telling.lock().await.take() {
                // it ends by itself
                let _ = telling.await;
            }
            self.shared.pool.close();
            Ok(())
        }
        .boxed()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A row that cannot be what this program wrote.
fn damaged(what: &'static str) -> StorageError {
    StorageError::Damaged(what)
}

/// An error and what led to it: the driver's own words say little.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        text = format!("{text}: {reason}");
        source = reason.source();
    }
    text
}

impl From<tokio_postgres::Error> for StorageError {
    fn from(error: tokio_postgres::Error) -> Self {
        if error.code() == Some(&SqlState::DISK_FULL) { Self::Full } else { Self::Postgres(told(&error)) }
    }
}

impl From<PoolError> for StorageError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => error.into(),
            error => Self::Postgres(told(&error)),
        }
    }
}
