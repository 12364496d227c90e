//! Chunks of files over the wire: asked for by hash, on streams of their own, on the channels of established sessions.
//!
//! The session is what lets a peer in: streams are taken while it is established and end with it, and what is asked for
//! on one is answered only from the session's group. `schedule` is the pure half, which decides who is asked for what;
//! `fetch` and `serve` are the two ends of a stream.
//! `kept` asks in the same way what others keep of a path.

mod fetch;
mod kept;
mod pace;
mod schedule;
mod serve;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

pub use fetch::{FetchQueue, Fetched};
pub(crate) use kept::ask_kept;
pub use pace::Pace;
use sync_link::iroh_link::Connection;
use sync_types::folder::{KeptFile, TreePath};
use sync_types::{FolderId, GroupId};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::device::{Device, Inner};
use crate::error::ClientError;
use crate::group::Group;

/// Bytes that count as one step where the rate is limited: small enough that a slow link shows progress all the time.
const PACED_PIECE: usize = 16 << 10;
/// What else is sent on a connection goes first: a saved file is told of in a packet, and the bulk can wait for it.
const BULK_PRIORITY: i32 = -1;

/// Where chunks are read that peers ask for.
pub trait ChunkSource: Send + Sync {
    /// The bytes of a chunk of the group, whose hash was compared just now; called on threads that may block.
    fn read(&self, group: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>>;

    /// The same of several chunks, in their order; ends early once it has `enough` bytes. Where finding a chunk takes longer
    /// than reading it, finding many at once pays.
    fn read_some(&self, group: &GroupId, hashes: &[[u8; 32]], enough: usize) -> Vec<Option<Vec<u8>>> {
        let mut chunks = Vec::new();
        let mut bytes = 0;
        for hash in hashes {
            let chunk = self.read(group, hash);
            bytes += chunk.as_ref().map_or(0, Vec::len);
            chunks.push(chunk);
            if bytes >= enough {
                break;
            }
        }
        chunks
    }

    /// What is kept of a path of a folder of the group, newest first; called on threads that may block.
    fn kept(&self, group: &GroupId, folder: &FolderId, path: &TreePath) -> Vec<KeptFile> {
        let _ = (group, folder, path);
        Vec::new()
    }
}

/// A chunk that is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
    /// Bytes.
    pub len: u32,
}

/// A group's share in moving chunks.
pub(crate) struct Chunks {
    source: RwLock<Option<Arc<dyn ChunkSource>>>,
    /// Channels of established sessions, by session.
    channels: watch::Sender<BTreeMap<u64, Connection>>,
    paces: RwLock<Paces>,
}

/// How fast chunks move.
#[derive(Clone, Default)]
struct Paces {
    serving: Arc<Pace>,
    fetching: Arc<Pace>,
}

impl Default for Chunks {
    fn default() -> Self {
        Self { source: RwLock::default(), channels: watch::channel(BTreeMap::new()).0, paces: RwLock::default() }
    }
}

fn read<T: Clone>(lock: &RwLock<T>) -> T {
    lock.read().unwrap_or_else(PoisonError::into_inner).clone()
}

impl Chunks {
    fn source(&self) -> Option<Arc<dyn ChunkSource>> {
        read(&self.source)
    }

    fn paces(&self) -> Paces {
        read(&self.paces)
    }

    /// Asks a session's peer for nothing more.
    fn drop_channel(&self, session: u64) {
        self.channels.send_if_modified(|channels| channels.remove(&session).is_some());
    }
}

impl Group {
    /// Answers what peers ask for from now on.
    pub(crate) fn set_chunk_source(&self, source: Arc<dyn ChunkSource>) {
        *self.chunks.source.write().unwrap_or_else(PoisonError::into_inner) = Some(source);
    }

    /// Keeps to these rates, which other groups may share; streams that are open keep the ones they have.
    pub(crate) fn set_chunk_pace(&self, serving: Arc<Pace>, fetching: Arc<Pace>) {
        *self.chunks.paces.write().unwrap_or_else(PoisonError::into_inner) = Paces { serving, fetching };
    }
}

/// Fetches chunks of a group.
pub(crate) struct ChunkFetcher;

impl ChunkFetcher {
    /// Starts to fetch: wants go in at one end, and come out at the other as they are answered, in any order.
    #[expect(clippy::new_ret_no_self, reason = "the two ends are all there is")]
    pub(crate) fn new(group: Arc<Group>) -> (FetchQueue, mpsc::Receiver<Fetched>) {
        fetch::start(group)
    }
}

impl Device {
    /// Answers from `source` what members of a group ask for.
    pub fn serve_chunks(&self, group: GroupId, source: Arc<dyn ChunkSource>) -> Result<(), ClientError> {
        self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?.set_chunk_source(source);
        Ok(())
    }

    /// Serves and fetches a group's chunks at these rates, which other groups may share; streams that are open keep theirs.
    pub fn pace_chunks(&self, group: GroupId, serving: Arc<Pace>, fetching: Arc<Pace>) -> Result<(), ClientError> {
        self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?.set_chunk_pace(serving, fetching);
        Ok(())
    }

    /// Fetches chunks of a group from whoever is connected. Both ends are used from different tasks: a queue that is full
    /// waits until something is taken out.
    pub fn fetch_chunks(&self, group: GroupId) -> Result<(FetchQueue, mpsc::Receiver<Fetched>), ClientError> {
        Ok(ChunkFetcher::new(self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?))
    }
}

/// A session's channel while chunks may move on it.
pub(crate) struct Open {
    group: Arc<Group>,
    session: u64,
    _serving: DropGuard,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.group.chunks.drop_channel(self.session);
    }
}

/// Lets chunks move on the channel of a session that is established, until what is returned is dropped.
pub(crate) fn open(device: &Inner, group: &Arc<Group>, session: u64, connection: &Connection) -> Open {
    let cancel = CancellationToken::new();
    group.chunks.channels.send_modify(|channels| {
        channels.insert(session, connection.clone());
    });
    device.spawn(serve::run(group.clone(), connection.clone(), cancel.clone()));
    Open { group: group.clone(), session, _serving: cancel.drop_guard() }
}
