//! What all connections of a relay share, and what is stored for them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq as _;
use sync_core::Membership;
use sync_core::session::Reply;
use sync_store::exec::Arrival;
use sync_types::{AuthorId, ErrorCode, GroupId, ReplicaId, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::access::Shown;
use crate::config::Limits;
use crate::limiter::{Connections, Limiter};
use crate::meetings::{Meetings, Rates};
use crate::metrics::{Counter, Metrics, Now};
use crate::punching::Punching;
use crate::storage::{Live, Room, Storage, StorageError, Stored, Usage};
use crate::wake::Wakes;

/// Entries that expire in one commit: pushes wait for it.
const EXPIRE_AT_ONCE: usize = 500;

/// A running relay.
pub(crate) struct Relay {
    pub(crate) limits: Limits,
    pub(crate) secret: Zeroizing<[u8; 32]>,
    pub(crate) replica: ReplicaId,
    pub(crate) storage: Arc<dyn Storage>,
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
    /// Where connections between devices begin; none where that is switched off.
    pub(crate) punching: Option<Arc<Punching>>,
    /// Who belongs to groups from which somebody was removed, so that open sessions hear of it.
    pub(crate) removals: watch::Sender<BTreeMap<GroupId, Arc<Membership>>>,
    pub(crate) stop: CancellationToken,
    /// What lets a group be new here; none where everyone may.
    registration: Option<String>,
    started: Instant,
}

impl Relay {
    pub(crate) fn new(
        limits: Limits,
        secret: Zeroizing<[u8; 32]>,
        storage: Arc<dyn Storage>,
        registration: Option<String>,
        punching: Option<Arc<Punching>>,
    ) -> Self {
        let stop = CancellationToken::new();
        Self {
            connections: Connections::new(limits.connections, limits.connections_per_address),
            messages: Limiter::new(limits.messages_per_minute),
            strangers: Limiter::new(limits.messages_per_minute),
            meetings: Meetings::new(Rates {
                create: limits.codes_per_minute,
                fetch: limits.code_fetches_per_minute,
                missed: limits.code_misses_per_minute,
            }),
            punching,
            limits,
            secret,
            replica: storage.replica(),
            storage,
            metrics: Metrics::default(),
            wakes: Wakes::new(stop.clone()),
            removals: watch::Sender::default(),
            stop,
            registration,
            started: Instant::now(),
        }
    }

    /// The group a member asks for; one that is new here is taken in if it may be.
    pub(crate) async fn host(&self, shown: &Shown) -> Result<Live, HostError> {
        if let Some(live) = self.storage.live(shown.group).await? {
            return Ok(live);
        }
        if let Some(token) = &self.registration
            && !bool::from(token.as_bytes().ct_eq(&shown.registration))
        {
            return Err(HostError::Refused(ErrorCode::RegistrationNeeded, "new groups need the operator's token here"));
        }
        let Limits { groups, database_bytes, .. } = self.limits;
        match self.storage.host(shown.charter.clone(), groups, database_bytes).await? {
            None => self.storage.live(shown.group).await?.ok_or(StorageError::UnknownGroup(shown.group).into()),
            Some(code @ ErrorCode::TooManyGroups) => {
                Err(HostError::Refused(code, "this relay keeps as many groups as it may"))
            }
            Some(code) => Err(HostError::Refused(code, NO_ROOM)),
        }
    }

    /// Stores what came from a member, as far as there is room.
    pub(crate) async fn store(
        self: Arc<Self>,
        group: GroupId,
        told_full: Arc<AtomicBool>,
        id: u64,
        arrival: Arrival,
    ) -> Reply {
        let Limits { group_bytes, database_bytes, .. } = self.limits;
        match self.storage.store(group, arrival, Room { told_full, group_bytes, database_bytes }).await {
            Ok(stored) => self.stored(group, id, stored),
            Err(error) if error.is_full() => {
                let text = "the disk of this relay is full".to_owned();
                Reply::Full { id, code: ErrorCode::StorageFull, text }
            }
            Err(error) => failed(&error),
        }
    }

    fn stored(&self, group: GroupId, id: u64, stored: Stored) -> Reply {
        let Stored { lacking, new, refused, membership, wants } = stored;
        self.metrics.stored.add(new as u64);
        self.metrics.refused_entries.add(refused as u64);
        let ends = membership.ends();
        if !ends.is_empty() {
            self.removals.send_if_modified(|groups| {
                let changed = groups.get(&group).is_none_or(|known| known.ends() != ends);
                if changed {
                    groups.insert(group, membership.clone());
                }
                changed
            });
        }
        let Some(code) = lacking else { return Reply::Stored { id, membership, wants } };
        self.metrics.refuse(code);
        let text = match code {
            ErrorCode::StorageFull => NO_ROOM,
            _ => "the group uses all the room it has on this relay",
        };
        Reply::Full { id, code, text: text.to_owned() }
    }

    /// Drops what is older than it is to be kept.
    pub(crate) async fn expire(&self, now: Timestamp, keep: Duration) -> Result<(), StorageError> {
        let before = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let before = Timestamp(now.0.saturating_sub(before));
        for group in self.storage.groups().await? {
            self.storage.mark_time(group, now).await?;
            loop {
                let dropped = self.storage.expire(group, before, EXPIRE_AT_ONCE).await?;
                self.metrics.expired.add(dropped as u64);
                if dropped < EXPIRE_AT_ONCE {
                    break;
                }
            }
        }
        Ok(())
    }

    /// What an operator is shown beside the counters.
    pub(crate) async fn now(&self) -> Result<Now, StorageError> {
        let Usage { groups, bytes, commits } = self.storage.usage().await?;
        let (relayed_connections, relayed_bytes) =
            self.punching.as_ref().map(|punching| punching.counts()).unwrap_or_default();
        Ok(Now {
            relayed_connections,
            relayed_bytes,
            connections: self.connections.count(),
            groups,
            database_bytes: bytes,
            commits,
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
    Storage(#[from] StorageError),
}

const NO_ROOM: &str = "this relay has no room left";

/// What is told when the database does not work; the reason is the operator's matter.
pub(crate) fn failed(error: &StorageError) -> Reply {
    tracing::warn!(%error, "database does not work");
    Reply::Failed { text: "the relay's database does not work at the moment".to_owned() }
}
