//! The store for async programs: one writer thread, pooled readers.

mod readers;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rand_core::CryptoRng;
use sync_core::{Membership, Selection};
use sync_types::{Carried, Check, Cursor, EpochId, FeedHave, GroupId, ReplicaId, Want};
use tokio::sync::{mpsc, oneshot, watch};

use crate::append::{NewEntry, SealEntries};
use crate::db::{
    Appended, Batch, Changes, Db, DbOptions, GroupChange, Ingested, Limits, Peer, PeerId, PeerNote, Reader, Sealed, Txn,
};
use crate::error::StoreError;
use readers::Readers;
use writer::{Append, Command, Job};

/// Commands that wait for the writer: some commits' worth; who has more waits to hand them over.
const MAX_WAITING: usize = 1024;

/// The database of a home, shared by everything that runs in it; clones are the same store.
///
/// Every write is answered once its commit is durable; concurrent ones share commits.
/// Dropping the last clone waits for what was handed over, and loses nothing.
///
/// # Cancellation
/// A dropped read has no effect.
/// A dropped write takes effect wholly or not at all: once handed to the writer it is carried out without its answer.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    commands: Option<mpsc::Sender<Command>>,
    writer: Option<JoinHandle<()>>,
    readers: Readers,
    shared: Arc<Shared>,
}

/// What the writer tells everyone.
#[derive(Default)]
struct Shared {
    groups: Mutex<BTreeMap<GroupId, Published>>,
    commits: AtomicU64,
    commands: AtomicU64,
}

struct Published {
    cursor: watch::Sender<Cursor>,
    membership: Arc<Membership>,
}

/// How much the writer did since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Commits.
    pub commits: u64,
    /// Commands that shared them.
    pub commands: u64,
}

impl Shared {
    fn groups(&self) -> MutexGuard<'_, BTreeMap<GroupId, Published>> {
        // every change to the map is a single insertion, so a panic elsewhere leaves nothing half-done
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what became durable.
    fn publish(&self, changes: Changes) {
        for GroupChange { group, max_cursor, membership } in changes.groups {
            let mut groups = self.groups();
            let published = groups
                .entry(group)
                .or_insert_with(|| Published { cursor: watch::channel(max_cursor).0, membership: membership.clone() });
            published.membership = membership;
            published.cursor.send_if_modified(|cursor| std::mem::replace(cursor, max_cursor) != max_cursor);
        }
    }
}

impl Store {
    /// Opens the database of a home, makes it if there is none, and starts its writer.
    ///
    /// Blocks for the time of opening a file.
    pub fn open(path: &Path, rng: impl CryptoRng + Send + 'static) -> Result<Self, StoreError> {
        let mut db = Db::open(path, &DbOptions::default(), rng)?;
        let shared = Arc::new(Shared::default());
        let mut changes = Changes::default();
        for row in db.read(|reader| reader.groups())? {
            let max_cursor = db.read(|reader| reader.max_cursor(&row.id))?;
            let membership = db.membership(&row.id)?;
            changes.groups.push(GroupChange { group: row.id, max_cursor, membership });
        }
        shared.publish(changes);
        let (commands, waiting) = mpsc::channel(MAX_WAITING);
        let writer = {
            let (shared, place) = (shared.clone(), writer::Place::of(path)?);
            std::thread::Builder::new()
                .name("sync-store".to_owned())
                .spawn(move || writer::run(db, waiting, &place, &shared))?
        };
        let readers = Readers::new(path);
        Ok(Self { inner: Arc::new(Inner { commands: Some(commands), writer: Some(writer), readers, shared }) })
    }

    /// Does some work in a transaction of its own or one shared with other writes; it alone is taken back if it fails.
    ///
    /// `bytes` is about what it writes, so that a shared commit does not grow without bound.
    pub async fn write<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&mut Txn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.write_then(bytes, work, |_| {}).await
    }

    /// The same, and something else once it is durable, before anyone hears of it: short, since the writer does it.
    pub async fn write_then<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&mut Txn<'_>) -> Result<T, StoreError> + Send + 'static,
        then: impl FnOnce(&mut T) + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let commands = self.inner.commands.as_ref().ok_or(StoreError::Closed)?;
        let command = Command::Work(Job::boxed(bytes, work, then, answer));
        commands.send(command).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// Reads from one durable state of the database, beside whatever is being written.
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Reader<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.inner.readers.read(work).await
    }

    /// The same as [`Store::read`] without leaving this thread: one that may block, of tokio's.
    pub fn read_here<T>(&self, work: impl FnOnce(&Reader<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.inner.readers.read_here(work)
    }

    /// Seals entries into our feed: [`Txn::append`].
    pub async fn append(
        &self,
        group: GroupId,
        entries: Vec<NewEntry>,
        sealer: Arc<dyn SealEntries>,
    ) -> Result<Vec<Appended>, StoreError> {
        let (answer, answered) = oneshot::channel();
        let commands = self.inner.commands.as_ref().ok_or(StoreError::Closed)?;
        let command = Command::Append(Append { group, entries, sealer, answer, done: None });
        commands.send(command).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// Stores what counts of a batch: [`Txn::ingest`].
    pub async fn ingest(
        &self,
        group: GroupId,
        batch: Vec<Vec<u8>>,
        source: Option<PeerId>,
        position: Option<(Cursor, Check)>,
        readable: Arc<dyn Fn(EpochId) -> bool + Send + Sync>,
    ) -> Result<Ingested, StoreError> {
        let bytes = batch.iter().map(Vec::len).sum();
        self.write(bytes, move |txn| txn.ingest(&group, &batch, source, position, &*readable)).await
    }

    /// Hands out what waited for an epoch: [`Txn::epoch_readable`].
    pub async fn epoch_readable(&self, group: GroupId, epoch: EpochId) -> Result<usize, StoreError> {
        self.write(0, move |txn| txn.epoch_readable(&group, epoch)).await
    }

    /// The peer of a replica: [`Txn::peer`], with what it says of itself.
    pub async fn note_peer(&self, group: GroupId, replica: ReplicaId, note: PeerNote) -> Result<PeerId, StoreError> {
        self.write(0, move |txn| {
            let peer = txn.peer(&group, &replica)?;
            txn.note_peer(&group, peer, &note)?;
            Ok(peer)
        })
        .await
    }

    /// A peer holds everything of ours up to a cursor: [`Txn::record_ack`].
    pub async fn record_ack(&self, group: GroupId, peer: PeerId, cursor: Cursor) -> Result<(), StoreError> {
        self.write(0, move |txn| txn.record_ack(&group, peer, cursor)).await
    }

    /// Entries for a peer: [`Reader::read_after`].
    pub async fn read_after(
        &self,
        group: GroupId,
        after: Cursor,
        limits: Limits,
        selection: Arc<Selection>,
        not_from: Option<PeerId>,
    ) -> Result<Batch, StoreError> {
        self.read(move |reader| reader.read_after(&group, after, limits, &selection, not_from)).await
    }

    /// Entries for the app: [`Reader::read_sealed`].
    pub async fn read_sealed(&self, group: GroupId, after: Cursor, limits: Limits) -> Result<Sealed, StoreError> {
        self.read(move |reader| reader.read_sealed(&group, after, limits)).await
    }

    /// The check beside a cursor: [`Reader::check_at`].
    pub async fn check_at(&self, group: GroupId, cursor: Cursor) -> Result<Option<Check>, StoreError> {
        self.read(move |reader| reader.check_at(&group, cursor)).await
    }

    /// What is held of every feed: [`Reader::have`].
    pub async fn have(&self, group: GroupId) -> Result<Vec<FeedHave>, StoreError> {
        self.read(move |reader| reader.have(&group)).await
    }

    /// The numbers lacking: [`Reader::wants`].
    pub async fn wants(&self, group: GroupId) -> Result<Vec<Want>, StoreError> {
        self.read(move |reader| reader.wants(&group)).await
    }

    /// What is held of what a peer lacks: [`Reader::entries_at`].
    pub async fn entries_at(
        &self,
        group: GroupId,
        wants: Vec<Want>,
        limits: Limits,
    ) -> Result<Vec<Carried>, StoreError> {
        self.read(move |reader| reader.entries_at(&group, &wants, limits)).await
    }

    /// Every replica known in a group: [`Reader::peers`].
    pub async fn peers(&self, group: GroupId) -> Result<Vec<Peer>, StoreError> {
        self.read(move |reader| reader.peers(&group)).await
    }

    /// The newest durable cursor of a group, now and whenever it moves.
    pub fn watch(&self, group: &GroupId) -> Result<watch::Receiver<Cursor>, StoreError> {
        let groups = self.inner.shared.groups();
        groups.get(group).map(|group| group.cursor.subscribe()).ok_or(StoreError::UnknownGroup(*group))
    }

    /// The newest durable cursor of a group.
    pub fn max_cursor(&self, group: &GroupId) -> Result<Cursor, StoreError> {
        let groups = self.inner.shared.groups();
        groups.get(group).map(|group| *group.cursor.borrow()).ok_or(StoreError::UnknownGroup(*group))
    }

    /// Who belongs to a group, as far as it is durable.
    pub fn membership(&self, group: &GroupId) -> Result<Arc<Membership>, StoreError> {
        let groups = self.inner.shared.groups();
        groups.get(group).map(|group| group.membership.clone()).ok_or(StoreError::UnknownGroup(*group))
    }

    /// How much the writer did.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let Shared { commits, commands, .. } = &*self.inner.shared;
        Stats { commits: commits.load(Ordering::Relaxed), commands: commands.load(Ordering::Relaxed) }
    }

    /// Carries out what was handed over, writes everything into the main file and closes; every clone is closed with it.
    ///
    /// Dropping the future does not stop it.
    pub async fn close(self) -> Result<(), StoreError> {
        // the writer's connection must be the last one, so that the file is left in one piece
        self.inner.readers.close().await;
        let (answer, answered) = oneshot::channel();
        let commands = self.inner.commands.as_ref().ok_or(StoreError::Closed)?;
        commands.send(Command::Close(answer)).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        drop(self.commands.take());
        let Some(writer) = self.writer.take() else { return };
        // a command may hold the last clone; its thread cannot wait for itself
        if writer.thread().id() != std::thread::current().id() && writer.join().is_err() {
            tracing::error!("the writer of the database panicked");
        }
    }
}
