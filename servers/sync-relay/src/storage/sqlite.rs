//! The database of `sync-store`: one file of this process alone.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use sync_core::session::Reply;
use sync_store::exec::{self, Arrival, Pull};
use sync_store::{Limits, Store, StoredEntry, Txn, WaitingRequest, Window, WindowRow};
use sync_types::{Class, Cursor, ErrorCode, GroupId, ReplicaId, Timestamp, Want};
use tokio::sync::watch;

use super::{Live, Reading, Room, Storage, StorageError, Stored, Tail, Usage, Work};
use crate::data::private;

const DATABASE: &str = "relay.db";

/// A database in a file.
pub(super) struct Sqlite {
    store: Store,
    replica: ReplicaId,
    groups: Mutex<HashMap<GroupId, Arc<Hosted>>>,
}

/// A group that is kept here.
#[derive(Debug)]
struct Hosted {
    /// Bytes of its envelopes.
    bytes: AtomicU64,
    wanted: watch::Sender<()>,
    tail: Arc<Tail>,
}

impl Sqlite {
    /// Opens the database in a directory, and makes it if there is none.
    pub(super) async fn open(path: PathBuf) -> Result<Self, StorageError> {
        let at = path.clone();
        let open = move || {
            let file = path.join(DATABASE);
            private().create(true).truncate(false).open(&file)?;
            Store::open(&file, rand_core::UnwrapErr(getrandom::SysRng))
        };
        let opened = tokio::task::spawn_blocking(open).await;
        let opened = opened.expect("BUG: opening does not panic and is not cancelled");
        let failed = |source| StorageError::Open { path: at.clone(), source };
        let store = opened.map_err(failed)?;
        let replica = store.read(|reader| reader.replica_id()).await.map_err(failed)?;
        Ok(Self { store, replica, groups: Mutex::default() })
    }

    /// A group that is known here.
    async fn hosted(&self, group: GroupId) -> Result<Option<Arc<Hosted>>, StorageError> {
        if let Some(hosted) = self.known(&group) {
            return Ok(Some(hosted));
        }
        if self.store.membership(&group).is_err() {
            return Ok(None);
        }
        let bytes = self.store.read(move |reader| reader.log_bytes(&group)).await?;
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        // whoever was faster counts already
        let new = || {
            let (wanted, tail) = (watch::Sender::new(()), Arc::default());
            Arc::new(Hosted { bytes: AtomicU64::new(bytes), wanted, tail })
        };
        Ok(Some(groups.entry(group).or_insert_with(new).clone()))
    }

    fn known(&self, group: &GroupId) -> Option<Arc<Hosted>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).get(group).cloned()
    }
}

impl Storage for Sqlite {
    fn replica(&self) -> ReplicaId {
        self.replica
    }

    fn live(&self, group: GroupId) -> Work<'_, Option<Live>> {
        async move {
            let Some(hosted) = self.hosted(group).await? else { return Ok(None) };
            let (newest, wanted) = (self.store.watch(&group)?, hosted.wanted.subscribe());
            Ok(Some(Live { newest, wanted, tail: hosted.tail.clone() }))
        }
        .boxed()
    }

    fn host(&self, charter: Vec<u8>, groups: usize, database_bytes: u64) -> Work<'_, Option<ErrorCode>> {
        async move {
            let work = move |txn: &mut Txn<'_>| {
                let reader = txn.reader();
                let kept = reader.groups()?;
                let known = kept.iter().any(|row| row.id == GroupId::of(&charter));
                if !known && kept.len() >= groups {
                    return Ok(Some(ErrorCode::TooManyGroups));
                }
                if !known && reader.used_bytes()? >= database_bytes {
                    return Ok(Some(ErrorCode::StorageFull));
                }
                txn.host_group(&charter).map(|_| None)
            };
            Ok(self.store.write(0, work).await?)
        }
        .boxed()
    }

    fn store(&self, group: GroupId, mut arrival: Arrival, room: Room) -> Work<'_, Stored> {
        async move {
            let hosted = self.hosted(group).await?.ok_or(StorageError::UnknownGroup(group))?;
            let bytes = arrival.batch.iter().map(Vec::len).sum();
            let tail = hosted.tail.clone();
            let work = move |txn: &mut Txn<'_>| {
                let of_group = hosted.bytes.load(Ordering::Relaxed);
                let lacking = room.fit(&mut arrival, of_group, txn.reader().used_bytes()?);
                let (ingested, wants) = exec::store(txn, &group, &arrival, &|_| true)?;
                hosted.bytes.fetch_add(ingested.bytes, Ordering::Relaxed);
                let (new, refused) = (ingested.stored.len(), ingested.refused.len());
                let stored = Stored { lacking, new, refused, membership: txn.membership(&group)?, wants };
                Ok((stored, rows(arrival, &ingested.stored)))
            };
            let grow = move |(_, rows): &mut (Stored, Vec<WindowRow>)| tail.grow(std::mem::take(rows));
            Ok(self.store.write_then(bytes, work, grow).await?.0)
        }
        .boxed()
    }

    fn survey(&self, group: GroupId, replica: ReplicaId) -> Work<'_, Reply> {
        async move { Ok(self.store.read(move |reader| exec::survey(reader, &group, &replica)).await?) }.boxed()
    }

    fn select(&self, group: GroupId, pull: Pull) -> Work<'_, Reply> {
        async move { Ok(self.store.read(move |reader| exec::select_anyway(reader, &group, &pull)).await?) }.boxed()
    }

    fn read(&self, group: GroupId, reading: Reading) -> Work<'_, Reply> {
        async move {
            let Reading { scope, not_from, after, limits, selection } = reading;
            let read = move |reader: &sync_store::Reader<'_>| {
                exec::read(reader, &group, scope, not_from, after, limits, &selection)
            };
            Ok(self.store.read(read).await?)
        }
        .boxed()
    }

    fn window(&self, group: GroupId, after: Cursor, limits: Limits) -> Work<'_, Window> {
        async move { Ok(self.store.read(move |reader| reader.window(&group, after, limits)).await?) }.boxed()
    }

    fn read_wanted(&self, group: GroupId, request: u32, wants: Vec<Want>) -> Work<'_, Reply> {
        async move { Ok(self.store.read(move |reader| exec::read_wanted(reader, &group, request, &wants)).await?) }
            .boxed()
    }

    fn wants(&self, group: GroupId) -> Work<'_, Vec<Want>> {
        async move { Ok(self.store.wants(group).await?) }.boxed()
    }

    fn want_again(&self, group: GroupId, wants: Vec<Want>) -> Work<'_, ()> {
        async move {
            let asked = wants.clone();
            if !self.store.read(move |reader| reader.was_dropped(&group, &asked)).await? {
                return Ok(());
            }
            let wanted = self.store.write(0, move |txn| txn.want_again(&group, &wants)).await?;
            if let Some(hosted) = self.known(&group).filter(|_| wanted) {
                hosted.wanted.send_replace(());
            }
            Ok(())
        }
        .boxed()
    }

    fn groups(&self) -> Work<'_, Vec<GroupId>> {
        async move {
            let rows = self.store.read(|reader| reader.groups()).await?;
            Ok(rows.into_iter().map(|row| row.id).collect())
        }
        .boxed()
    }

    fn mark_time(&self, group: GroupId, now: Timestamp) -> Work<'_, ()> {
        async move {
            self.store.write(0, move |txn| txn.mark_time(&group, now)).await?;
            Ok(())
        }
        .boxed()
    }

    fn expire(&self, group: GroupId, before: Timestamp, limit: usize) -> Work<'_, usize> {
        async move {
            let dropped = self.store.write(0, move |txn| txn.expire(&group, before, limit)).await?;
            if let Some(hosted) = self.known(&group) {
                // what was counted before it was stored may expire first: never below nothing
                let less = |bytes: u64| Some(bytes.saturating_sub(dropped.bytes));
                let _ = hosted.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
                hosted.tail.forget().await;
            }
            Ok(dropped.entries)
        }
        .boxed()
    }

    fn keep_request(&self, request: WaitingRequest, oldest: Timestamp) -> Work<'_, ()> {
        async move { Ok(self.store.write(0, move |txn| txn.put_request(&request, oldest)).await?) }.boxed()
    }

    fn keep_answer(&self, place: [u8; 16], number: u32, answer: Vec<u8>) -> Work<'_, ()> {
        async move { Ok(self.store.write(answer.len(), move |txn| txn.put_answer(&place, number, &answer)).await?) }
            .boxed()
    }

    fn forget_requests(&self, place: [u8; 16], number: Option<u32>) -> Work<'_, ()> {
        async move { Ok(self.store.write(0, move |txn| txn.delete_requests(&place, number)).await?) }.boxed()
    }

    fn requests(&self) -> Work<'_, Vec<WaitingRequest>> {
        async move { Ok(self.store.read(|reader| reader.requests()).await?) }.boxed()
    }

    fn usage(&self) -> Work<'_, Usage> {
        async move {
            let read = self.store.read(|reader| Ok((reader.groups()?.len(), reader.used_bytes()?)));
            let (groups, bytes) = read.await?;
            Ok(Usage { groups, bytes, commits: self.store.stats().commits })
        }
        .boxed()
    }

    fn close(&self) -> Work<'_, ()> {
        async move { Ok(self.store.clone().close().await?) }.boxed()
    }
}

/// What was stored of a batch, as it would be read; nothing where more than its order would have to be found out.
fn rows(arrival: Arrival, stored: &[StoredEntry]) -> Vec<WindowRow> {
    if stored.len() != arrival.batch.len() || stored.iter().any(|entry| entry.class != Class::Sealed) {
        return Vec::new();
    }
    let row = |(entry, envelope): (&StoredEntry, Vec<u8>)| {
        let StoredEntry { cursor, check, author, number, class, forked, .. } = *entry;
        WindowRow { cursor, check, author, number, class, source: arrival.replica, forked, envelope }
    };
    stored.iter().zip(arrival.batch).map(row).collect()
}
