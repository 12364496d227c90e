//! What all connections of a relay share, and what is stored for them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq as _;
use sync_core::session::Reply;
use sync_store::exec::{self, Arrival};
use sync_store::{Ingested, Store, StoreError, Txn};
use sync_types::{AuthorId, Class, Envelope, ErrorCode, GroupId, ReplicaId, Timestamp, Want};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::access::Shown;
use crate::config::Limits;
use crate::limiter::{Connections, Limiter};
use crate::meetings::{Meetings, Rates};
use crate::metrics::{Counter, Metrics, Now};
use crate::wake::Wakes;

/// Part of a group's room that memberships and rotations have beyond it, without which nobody could be judged.
const OPEN_ROOM: u64 = 4;

/// Entries that expire in one commit: pushes wait for it.
const EXPIRE_AT_ONCE: usize = 500;

/// A running relay.
pub(crate) struct Relay {
    pub(crate) limits: Limits,
    pub(crate) secret: Zeroizing<[u8; 32]>,
    pub(crate) replica: ReplicaId,
    pub(crate) store: Store,
    pub(crate) metrics: Metrics,
    pub(crate) connections: Arc<Connections>,
    /// Pushes and refused requests of members.
    pub(crate) messages: Limiter<AuthorId>,
    /// Refused requests of who is no member.
    pub(crate) strangers: Limiter<IpAddr>,
    /// Where codes are found.
    pub(crate) meetings: Meetings,
    /// Who is to be woken.
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) stop: CancellationToken,
    /// What lets a group be new here; none where everyone may.
    registration: Option<String>,
    groups: Mutex<HashMap<GroupId, Arc<Hosted>>>,
    /// New groups are counted and taken in one after the other.
    taking: tokio::sync::Mutex<()>,
    started: Instant,
}

/// A group that is kept here.
#[derive(Debug)]
pub(crate) struct Hosted {
    pub(crate) id: GroupId,
    /// Bytes of its envelopes.
    bytes: AtomicU64,
    /// Told when a member lacks what expired here: whoever has it is asked.
    pub(crate) wanted: watch::Sender<()>,
}

impl Relay {
    pub(crate) async fn new(
        limits: Limits,
        secret: Zeroizing<[u8; 32]>,
        store: Store,
        registration: Option<String>,
    ) -> Result<Self, StoreError> {
        let replica = store.read(|reader| reader.replica_id()).await?;
        let stop = CancellationToken::new();
        Ok(Self {
            connections: Connections::new(limits.connections, limits.connections_per_address),
            messages: Limiter::new(limits.messages_per_minute),
            strangers: Limiter::new(limits.messages_per_minute),
            meetings: Meetings::new(Rates {
                create: limits.codes_per_minute,
                fetch: limits.code_fetches_per_minute,
                missed: limits.code_misses_per_minute,
            }),
            limits,
            secret,
            replica,
            store,
            metrics: Metrics::default(),
            wakes: Wakes::new(stop.clone()),
            stop,
            registration,
            groups: Mutex::default(),
            taking: tokio::sync::Mutex::new(()),
            started: Instant::now(),
        })
    }

    /// The group a member asks for; one that is new here is taken in if it may be.
    pub(crate) async fn host(&self, shown: &Shown) -> Result<Arc<Hosted>, HostError> {
        if let Some(hosted) = self.hosted(&shown.group).await? {
            return Ok(hosted);
        }
        if let Some(token) = &self.registration
            && !bool::from(token.as_bytes().ct_eq(&shown.registration))
        {
            return Err(HostError::Refused(ErrorCode::RegistrationNeeded, "new groups need the operator's token here"));
        }
        let _one = self.taking.lock().await;
        if self.store.read(|reader| reader.groups()).await?.len() >= self.limits.groups {
            return Err(HostError::Refused(ErrorCode::TooManyGroups, "this relay keeps as many groups as it may"));
        }
        let room = self.limits.database_bytes;
        let charter = shown.charter.clone();
        let taken = self.store.write(charter.len(), move |txn| {
            let full = txn.reader().used_bytes()? >= room;
            if full { Ok(false) } else { txn.host_group(&charter).map(|_| true) }
        });
        if !taken.await? {
            return Err(HostError::Refused(ErrorCode::StorageFull, "this relay has no room left"));
        }
        self.hosted(&shown.group).await?.ok_or(HostError::Store(StoreError::UnknownGroup(shown.group)))
    }

    /// A group that is known here.
    async fn hosted(&self, group: &GroupId) -> Result<Option<Arc<Hosted>>, StoreError> {
        let known = || self.groups.lock().unwrap_or_else(PoisonError::into_inner).get(group).cloned();
        if let Some(hosted) = known() {
            return Ok(Some(hosted));
        }
        if self.store.membership(group).is_err() {
            return Ok(None);
        }
        let _one = self.taking.try_lock();
        let id = *group;
        let bytes = self.store.read(move |reader| reader.log_bytes(&id)).await?;
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        // whoever was faster counts already
        let new = || Arc::new(Hosted { id, bytes: AtomicU64::new(bytes), wanted: watch::Sender::new(()) });
        Ok(Some(groups.entry(id).or_insert_with(new).clone()))
    }

    /// Stores what came from a member, as far as there is room.
    ///
    /// Of a session that was told that there is none, only what everyone must have is stored, and no position: it would
    /// claim what was left out.
    pub(crate) async fn store(
        self: Arc<Self>,
        hosted: Arc<Hosted>,
        told_full: Arc<AtomicBool>,
        id: u64,
        mut arrival: Arrival,
    ) -> Reply {
        let bytes: usize = arrival.batch.iter().map(Vec::len).sum();
        let (relay, group) = (self.clone(), hosted.clone());
        let work = move |txn: &mut Txn<'_>| {
            let room = relay.room(&group, txn, bytes as u64)?;
            let code =
                if told_full.load(Ordering::Relaxed) { Some(room.unwrap_or(ErrorCode::GroupFull)) } else { room };
            if code.is_some() {
                told_full.store(true, Ordering::Relaxed);
                arrival.batch.retain(|bytes| is_open(bytes));
                arrival.position = None;
                let bytes: usize = arrival.batch.iter().map(Vec::len).sum();
                let most = relay.limits.group_bytes.saturating_add(relay.limits.group_bytes / OPEN_ROOM);
                if group.bytes.load(Ordering::Relaxed).saturating_add(bytes as u64) > most {
                    arrival.batch.clear();
                }
            }
            let (ingested, wants) = exec::store(txn, &group.id, &arrival, &|_| true)?;
            group.bytes.fetch_add(ingested.bytes, Ordering::Relaxed);
            Ok((code, ingested, wants))
        };
        match self.store.write(bytes, work).await {
            Ok((code, ingested, wants)) => self.stored(&hosted, id, code, &ingested, wants),
            Err(StoreError::DiskFull) => {
                let text = "the disk of this relay is full".to_owned();
                Reply::Full { id, code: ErrorCode::StorageFull, text }
            }
            Err(error) => failed(&error),
        }
    }

    fn stored(
        &self,
        hosted: &Hosted,
        id: u64,
        code: Option<ErrorCode>,
        ingested: &Ingested,
        wants: Vec<Want>,
    ) -> Reply {
        self.metrics.stored.add(ingested.stored.len() as u64);
        self.metrics.refused_entries.add(ingested.refused.len() as u64);
        match (code, self.store.membership(&hosted.id)) {
            (Some(code), Ok(_)) => {
                self.metrics.refuse(code);
                let text = match code {
                    ErrorCode::StorageFull => "this relay has no room left",
                    _ => "the group uses all the room it has on this relay",
                };
                Reply::Full { id, code, text: text.to_owned() }
            }
            (None, Ok(membership)) => Reply::Stored { id, membership, wants },
            (_, Err(error)) => failed(&error),
        }
    }

    /// Has what a member asks for be asked of others, where it expired here.
    pub(crate) async fn want_again(&self, hosted: &Hosted, wants: &[Want]) -> Result<(), StoreError> {
        let (id, asked) = (hosted.id, wants.to_vec());
        if !self.store.read(move |reader| reader.was_dropped(&id, &asked)).await? {
            return Ok(());
        }
        let wants = wants.to_vec();
        if self.store.write(0, move |txn| txn.want_again(&id, &wants)).await? {
            hosted.wanted.send_replace(());
        }
        Ok(())
    }

    /// Drops what is older than it is to be kept.
    pub(crate) async fn expire(&self, now: Timestamp, keep: Duration) -> Result<(), StoreError> {
        let before = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let before = Timestamp(now.0.saturating_sub(before));
        for row in self.store.read(|reader| reader.groups()).await? {
            let id = row.id;
            self.store.write(0, move |txn| txn.mark_time(&id, now)).await?;
            loop {
                let dropped = self.store.write(0, move |txn| txn.expire(&id, before, EXPIRE_AT_ONCE)).await?;
                self.metrics.expired.add(dropped.entries as u64);
                let hosted = self.groups.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
                if let Some(hosted) = hosted {
                    // what was counted before it was stored may expire first: never below nothing
                    let less = |bytes: u64| Some(bytes.saturating_sub(dropped.bytes));
                    let _ = hosted.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
                }
                if dropped.entries < EXPIRE_AT_ONCE {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Which room is lacking for so many bytes more.
    fn room(&self, group: &Hosted, txn: &Txn<'_>, bytes: u64) -> Result<Option<ErrorCode>, StoreError> {
        if group.bytes.load(Ordering::Relaxed).saturating_add(bytes) > self.limits.group_bytes {
            return Ok(Some(ErrorCode::GroupFull));
        }
        let used = txn.reader().used_bytes()?;
        Ok((used.saturating_add(bytes) > self.limits.database_bytes).then_some(ErrorCode::StorageFull))
    }

    /// What an operator is shown beside the counters.
    pub(crate) async fn now(&self) -> Result<Now, StoreError> {
        let (groups, database_bytes) =
            self.store.read(|reader| Ok((reader.groups()?.len(), reader.used_bytes()?))).await?;
        Ok(Now {
            connections: self.connections.count(),
            groups,
            database_bytes,
            commits: self.store.stats().commits,
            uptime_seconds: self.started.elapsed().as_secs(),
            wakes: [&self.wakes.woken, &self.wakes.not_woken, &self.wakes.refused].map(Counter::get),
        })
    }
}

/// Why a group is not kept for someone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// It may not be.
    #[error("{1}")]
    Refused(ErrorCode, &'static str),
    /// The database does not work.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is told when the database does not work; the reason is the operator's matter.
pub(crate) fn failed(error: &StoreError) -> Reply {
    tracing::warn!(%error, "database does not work");
    Reply::Failed { text: "the relay's database does not work at the moment".to_owned() }
}

/// Whether everyone must have it, whatever the room.
fn is_open(bytes: &[u8]) -> bool {
    Envelope::parse(bytes).is_ok_and(|envelope| envelope.header.class != Class::Sealed)
}
