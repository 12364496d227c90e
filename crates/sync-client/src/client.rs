//! The client of one group: push, pull, subscribe.

use std::sync::Arc;
use std::time::Duration;

use sync_core::connection::State;
use sync_link::iroh_link::{Connection, Way};
use sync_store::{Content, Limits, StoreError};
use sync_types::bounds::MAX_APP_BYTES;
use sync_types::{AuthorId, BlobId, Cursor, DeviceId, Envelope, GroupId, Timestamp};

use crate::config::Config;
use crate::device::{Device, Owner};
use crate::error::ClientError;
use crate::event::Subscription;
use crate::group::{Group, now};
use crate::keys::{APP_STREAM, KIND_BLOB, draw};
use crate::status::{Fork, Gap, PeerStatus, Status, SyncState};

/// Blobs a pull returns where the caller does not say.
pub const DEFAULT_LIMIT: usize = 100;
/// Blobs a pull returns at most: more are a matter of pulling again.
pub const MAX_LIMIT: usize = 10_000;
/// Bytes of blobs, and of entries read at once, after which a pull returns what it has.
const PULL_BYTES: usize = 16 << 20;

/// Where a pushed blob is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// Our name for it.
    pub blob_id: BlobId,
    /// Its cursor on this device.
    pub cursor: Cursor,
}

/// A blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its cursor on this device.
    pub cursor: Cursor,
    /// Its author's name for it.
    pub blob_id: BlobId,
    /// Its author.
    pub sender: AuthorId,
    /// When its author says it was made.
    pub timestamp: Timestamp,
    /// What was pushed.
    pub bytes: Vec<u8>,
}

/// An answer to a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The blobs, by ascending cursor.
    pub blobs: Vec<Blob>,
    /// Everything up to here is in this answer or came before it; pull after it next.
    pub max_cursor: Cursor,
    /// Whether more is there already.
    pub has_more: bool,
}

/// The client of one group. Clones are the same client.
///
/// # Cancellation
/// Dropping the future of a push may leave the blob pushed or not, never half; push again under the same blob id to be
/// sure. Dropping any other future has no effect.
#[derive(Debug, Clone)]
pub struct SyncClient {
    device: Owner,
    group: Arc<Group>,
}

impl SyncClient {
    /// Opens a home and gives the client of its only group, making one if it has none.
    pub async fn new(config: Config) -> Result<Self, ClientError> {
        let device = Device::open(config).await?;
        if device.groups().is_empty() {
            device.create_group().await?;
        }
        device.only_client()
    }

    pub(crate) fn new_in(device: Owner, group: Arc<Group>) -> Self {
        Self { device, group }
    }

    pub(crate) fn inner_group(&self) -> &Arc<Group> {
        &self.group
    }

    /// The device this client belongs to, for its other groups, invites and closing.
    #[must_use]
    pub fn device(&self) -> Device {
        Device { inner: self.device.clone() }
    }

    /// Joins a further group on the same device, by code or link.
    pub async fn join_group(&self, invite: &str) -> Result<Self, ClientError> {
        self.device().join(invite, |_| {}).await
    }

    /// The group.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group.id
    }

    /// Our author in the group; it changes after a copy or a rollback.
    #[must_use]
    pub fn author(&self) -> AuthorId {
        self.group.author().secret().id()
    }

    /// The device's id.
    #[must_use]
    pub fn endpoint_id(&self) -> DeviceId {
        self.device.device_id()
    }

    /// The newest cursor stored here; it survives restarts.
    #[must_use]
    pub fn last_cursor(&self) -> Cursor {
        *self.group.watch_newest().borrow()
    }

    /// Stores a blob durably and returns; peers get it when they can be reached, now or after any number of restarts.
    pub async fn push(&self, bytes: impl Into<Vec<u8>>) -> Result<Pushed, ClientError> {
        let mut pushed = self.push_many(vec![bytes.into()]).await?;
        Ok(pushed.remove(0))
    }

    /// Pushes under a blob id of the caller's: the same blob pushed again is stored once.
    pub async fn push_as(&self, blob_id: BlobId, bytes: impl Into<Vec<u8>>) -> Result<Pushed, ClientError> {
        let mut pushed = self.push_all(vec![(blob_id, bytes.into())]).await?;
        Ok(pushed.remove(0))
    }

    /// Pushes several blobs in one step: all are stored, or none.
    pub async fn push_many(&self, blobs: Vec<Vec<u8>>) -> Result<Vec<Pushed>, ClientError> {
        self.push_all(blobs.into_iter().map(|bytes| (self.draw_blob_id(), bytes)).collect()).await
    }

    /// Draws a blob id that starts with the time, as the envelope does: an index then takes in each beside the last one
    /// instead of anywhere, which is most of what a push writes.
    fn draw_blob_id(&self) -> BlobId {
        let mut id: [u8; 16] = draw(&self.device.shared.rng);
        id[..6].copy_from_slice(&now().0.to_be_bytes()[2..]);
        BlobId(id)
    }

    async fn push_all(&self, blobs: Vec<(BlobId, Vec<u8>)>) -> Result<Vec<Pushed>, ClientError> {
        if let Some(got) = blobs.iter().map(|(_, bytes)| bytes.len()).find(|&len| len > MAX_APP_BYTES) {
            return Err(ClientError::TooLarge { got });
        }
        let ids: Vec<BlobId> = blobs.iter().map(|(id, _)| *id).collect();
        let entry = |(blob_id, body)| {
            self.group.entry(blob_id, Content::Sealed { kind: KIND_BLOB, stream: APP_STREAM.to_owned(), body })
        };
        let appended =
            self.group.append(blobs.into_iter().map(entry).collect()).await.map_err(|error| match error {
                StoreError::BlobIdReused { .. } => ClientError::BlobIdReused(error),
                error => error.into(),
            })?;
        Ok(ids.into_iter().zip(appended).map(|(blob_id, stored)| Pushed { blob_id, cursor: stored.cursor }).collect())
    }

    /// Blobs stored here after a cursor, at most `limit` and [`MAX_LIMIT`], our own among them.
    pub async fn pull(&self, after: Cursor, limit: usize) -> Result<Pulled, ClientError> {
        let limit = limit.clamp(1, MAX_LIMIT);
        let mut pulled = Pulled { blobs: Vec::new(), max_cursor: after, has_more: true };
        let mut opened = 0;
        while pulled.has_more && pulled.blobs.len() < limit {
            let limits = Limits { entries: limit - pulled.blobs.len(), bytes: PULL_BYTES };
            let stored = self.group.store().read_sealed(self.group.id, pulled.max_cursor, limits).await?;
            for entry in &stored.entries {
                // what is small when sealed may be large when opened
                if opened >= PULL_BYTES {
                    pulled.has_more = true;
                    return Ok(pulled);
                }
                pulled.max_cursor = entry.cursor;
                if let Some(blob) = self.open(entry.cursor, &entry.bytes) {
                    opened += blob.bytes.len();
                    pulled.blobs.push(blob);
                }
            }
            pulled.max_cursor = stored.max_cursor;
            pulled.has_more = stored.has_more;
        }
        Ok(pulled)
    }

    /// Opens an entry if it is an app's blob.
    fn open(&self, cursor: Cursor, bytes: &[u8]) -> Option<Blob> {
        let envelope = Envelope::parse(bytes).ok()?;
        let header = &envelope.header;
        match self.group.keys().unseal(&envelope) {
            Ok(content) if content.kind == KIND_BLOB && content.stream == APP_STREAM => Some(Blob {
                cursor,
                blob_id: header.blob_id,
                sender: header.sender,
                timestamp: header.timestamp,
                bytes: content.body.clone(),
            }),
            Ok(_) => None,
            Err(error) => {
                self.group.unreadable(header.sender, &error);
                None
            }
        }
    }

    /// Events from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription::new(self.group.subscribe())
    }

    /// Waits until some replica holds everything up to a cursor, and names those that do; none if the wait is over.
    pub async fn handed_to(&self, cursor: Cursor, wait: Duration) -> Vec<String> {
        let mut progress = self.group.watch_progress();
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            progress.borrow_and_update();
            let id = self.group.id;
            let holders =
                self.group.store().read(move |reader| reader.handed_to(&id, cursor)).await.unwrap_or_default();
            if !holders.is_empty() {
                let mut seen = std::collections::HashSet::new();
                // of relays each counts, and none has a device
                let new = |peer: &sync_store::Peer| peer.device.is_none_or(|device| seen.insert(device));
                return holders.into_iter().filter(new).map(|peer| peer.name).collect();
            }
            match tokio::time::timeout_at(deadline, progress.changed()).await {
                Ok(Ok(())) => {}
                _ => return Vec::new(),
            }
        }
    }

    /// A picture of the group on this device.
    pub async fn status(&self) -> Result<Status, ClientError> {
        let group = &self.group;
        let id = group.id;
        let author = self.author();
        let (pending, wants, have) =
            group.store().read(move |reader| Ok((reader.unacked(&id)?, reader.wants(&id)?, reader.have(&id)?))).await?;
        let membership = group.membership();
        let live = group.peers.live();
        let peers = self.peer_statuses().await;
        let relays = crate::relays::statuses(group).await;
        let alone = live.is_empty() && !relays.iter().any(|relay| relay.state == state_name(State::Connected));
        let state = match (alone, pending) {
            (true, _) => SyncState::Offline,
            (false, 0) => SyncState::Synced,
            (false, _) => SyncState::Pending,
        };
        let fork = |feed: &sync_types::FeedHave| {
            feed.fork.map(|number| Fork { author: feed.author.to_string(), number: number.0 })
        };
        let gap = |want: sync_types::Want| Gap {
            author: want.author.to_string(),
            first: want.range.first.0,
            last: want.range.last.0,
        };
        Ok(Status {
            group: id.to_string(),
            author: author.to_string(),
            member: membership.author(&author).map(|own| own.member.to_string()).unwrap_or_default(),
            device: self.device.device_id().to_string(),
            name: group.device_name(),
            max_cursor: self.last_cursor().0,
            pending,
            state,
            peers,
            relays,
            authors: membership.authors().count(),
            gaps: wants.into_iter().map(gap).collect(),
            forks: have.iter().filter_map(fork).collect(),
            refused: group.refused() + self.device.refused(),
            warnings: self.device.warnings().into_iter().chain(group.trouble()).collect(),
        })
    }

    async fn peer_statuses(&self) -> Vec<PeerStatus> {
        let live = self.group.peers.live();
        let now = now();
        let age = |since: Timestamp| now.0.saturating_sub(since.0);
        let mut statuses: Vec<PeerStatus> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for peer in self.group.stored_peers().await {
            // a device that went on under a new author is listed once, as it was last seen
            let Some(device) = peer.device.filter(|device| seen.insert(*device)) else { continue };
            let session = live.get(&device).filter(|live| live.replica == peer.replica);
            let connection = session.map(|live| &live.connection);
            let (address, relayed_by) = match connection.and_then(Connection::way) {
                Some(Way::Direct(address)) => (Some(address.to_string()), None),
                Some(Way::Relayed(url)) => (None, Some(url)),
                None => (None, None),
            };
            let rtt = connection.and_then(Connection::rtt);
            statuses.push(PeerStatus {
                name: session.map_or(peer.name, |live| live.name.clone()),
                device: device.to_string(),
                author: session.map(|live| live.author).or(peer.author).map(|id| id.to_string()).unwrap_or_default(),
                state: state_name(if session.is_some() { State::Connected } else { self.group.peers.state(&device) }),
                address,
                relayed_by,
                addresses: peer.addresses,
                addresses_age_ms: peer.addresses_at.map(age),
                rtt_us: rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                acknowledged: peer.acked.0,
                last_seen_ms: peer.last_seen.map(age),
            });
        }
        statuses
    }
}

pub(crate) fn state_name(state: State) -> String {
    match state {
        State::Connecting { .. } => "connecting",
        State::Handshaking { .. } => "handshaking",
        State::Connected => "connected",
        State::Reconnecting { .. } => "reconnecting",
        _ => "disconnected",
    }
    .to_owned()
}
