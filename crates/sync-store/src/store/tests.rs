//! The shell: shared commits, answers after them, readers beside the writer, closing.

use std::sync::mpsc;

use sync_types::{AuthorId, BlobId, Envelope, EnvelopeHash, Number};
use tempfile::TempDir;
use tokio::task::{JoinHandle, JoinSet};

use super::*;
use crate::SealError;
use crate::tests::support::*;

async fn founded_store(dir: &TempDir) -> (Store, GroupId, Arc<Writer>) {
    let store = Store::open(&dir.path().join("db"), rng(1)).unwrap();
    let alice = author(1);
    let (charter, id) = (charter(&alice, 1), alice.id());
    let group = store.write(0, move |txn| txn.create_group(&charter, id)).await.unwrap();
    (store, group, Arc::new(Writer { group, author: alice }))
}

/// Holds the writer up until the sender is dropped; the task has a clone of the store.
async fn hold(store: &Store) -> (mpsc::SyncSender<()>, JoinHandle<()>) {
    let (release, held) = mpsc::sync_channel::<()>(0);
    let (started, running) = oneshot::channel();
    let store = store.clone();
    let task = tokio::spawn(async move {
        let held = store.write(0, move |_| {
            started.send(()).unwrap();
            // ends when the sender is dropped
            assert!(held.recv().is_err());
            Ok(())
        });
        held.await.unwrap();
    });
    running.await.unwrap();
    (release, task)
}

/// Waits until so many commands wait for the writer.
async fn waiting(store: &Store, commands: usize) {
    while store.inner.commands.as_ref().unwrap().capacity() > MAX_WAITING - commands {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn pushes_at_one_time_share_a_commit_and_one_that_fails_fails_alone() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    let (release, _holding) = hold(&store).await;
    let before = store.stats();
    let mut pushes = JoinSet::new();
    for n in 0..100 {
        let (store, writer) = (store.clone(), writer.clone());
        // every tenth claims the blob id of another
        let id = if n % 10 == 9 { n - 1 } else { n };
        pushes.spawn(async move { store.append(group, vec![entry(blob(id), n.to_le_bytes())], writer).await });
    }
    waiting(&store, 100).await;
    assert_eq!(store.stats(), before);
    assert!(pushes.try_join_next().is_none(), "nothing is answered before its commit");
    drop(release);
    let done = pushes.join_all().await;
    let failed = done.iter().filter(|push| matches!(push, Err(StoreError::BlobIdReused { .. }))).count();
    let mut numbers: Vec<_> = done.iter().flatten().map(|appended| appended[0].number).collect();
    numbers.sort_unstable();
    assert_eq!(failed, 10);
    assert_eq!(numbers, (1..=90).map(Number).collect::<Vec<_>>());
    let after = store.stats();
    assert_eq!((after.commits - before.commits, after.commands - before.commands), (2, 101));
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_commit_that_fails_is_told_to_everyone_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    let cursors = store.watch(&group).unwrap();
    let (release, _holding) = hold(&store).await;
    let mut pushes = JoinSet::new();
    for n in 0..10 {
        let (store, writer) = (store.clone(), writer.clone());
        pushes.spawn(async move { store.append(group, vec![entry(blob(n), "x")], writer).await });
    }
    waiting(&store, 10).await;
    // the last command of the commit takes the transaction from under it
    let spoiler = store.clone();
    let spoiled = tokio::spawn(async move {
        spoiler.write(0, |txn| txn.raw().execute_batch("ROLLBACK").map_err(StoreError::from)).await
    });
    waiting(&store, 11).await;
    drop(release);
    assert!(spoiled.await.unwrap().is_err());
    for push in pushes.join_all().await {
        assert!(matches!(push, Err(StoreError::RolledBack)), "{push:?}");
    }
    assert_eq!((*cursors.borrow(), store.max_cursor(&group).unwrap()), (Cursor(0), Cursor(0)));
    let next = store.append(group, vec![entry(blob(1), "x")], writer).await.unwrap()[0];
    assert_eq!((next.cursor, next.number, next.repeated), (Cursor(1), Number(1), false));
}

#[tokio::test]
async fn readers_see_what_is_committed_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    let mut cursors = store.watch(&group).unwrap();
    store.append(group, vec![entry(blob(1), "one")], writer.clone()).await.unwrap();
    cursors.wait_for(|cursor| *cursor == Cursor(1)).await.unwrap();

    let (release, held) = mpsc::sync_channel::<()>(0);
    let (started, running) = oneshot::channel();
    let writing = {
        let (store, writer) = (store.clone(), writer.clone());
        tokio::spawn(async move {
            store
                .write(0, move |txn| {
                    txn.append(&group, &[entry(blob(2), "two")], &*writer)?;
                    started.send(txn.reader().max_cursor(&group)?).unwrap();
                    assert!(held.recv().is_err());
                    Ok(())
                })
                .await
        })
    };
    assert_eq!(running.await.unwrap(), Cursor(2), "the transaction sees itself");
    // more at once than there are connections
    let mut reads = JoinSet::new();
    for _ in 0..12 {
        let store = store.clone();
        reads.spawn(async move { store.read_sealed(group, Cursor(0), ALL).await.unwrap().max_cursor });
    }
    assert!(reads.join_all().await.into_iter().all(|cursor| cursor == Cursor(1)));
    assert_eq!((*cursors.borrow_and_update(), store.max_cursor(&group).unwrap()), (Cursor(1), Cursor(1)));
    drop(release);
    writing.await.unwrap().unwrap();
    assert_eq!(*cursors.borrow_and_update(), Cursor(2));
    assert_eq!(store.read_sealed(group, Cursor(0), ALL).await.unwrap().max_cursor, Cursor(2));
}

#[tokio::test]
async fn a_push_whose_future_is_dropped_is_carried_out_or_not_but_never_by_half() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    let (release, _holding) = hold(&store).await;
    let push = tokio::spawn({
        let (store, writer) = (store.clone(), writer.clone());
        async move { store.append(group, vec![entry(blob(1), "1"), entry(blob(2), "2")], writer).await }
    });
    waiting(&store, 1).await;
    push.abort();
    assert!(push.await.unwrap_err().is_cancelled());
    drop(release);
    // asked again, it turns out to be stored
    let again = store.append(group, vec![entry(blob(1), "1"), entry(blob(2), "2")], writer).await.unwrap();
    assert!(again.iter().all(|appended| appended.repeated));
    assert_eq!(store.max_cursor(&group).unwrap(), Cursor(2));
}

#[tokio::test]
async fn membership_is_told_once_it_is_durable() {
    let dir = TempDir::new().unwrap();
    let (store, group, _) = founded_store(&dir).await;
    let bob = author(2);
    assert!(!store.membership(&group).unwrap().is_admitted(&bob.id()));
    let admission = Feed::new(group, author(1)).admit(&bob);
    let readable = Arc::new(|_| true);
    store.ingest(group, vec![admission], None, None, readable).await.unwrap();
    assert!(store.membership(&group).unwrap().is_admitted(&bob.id()));
    drop(store);
    let store = Store::open(&dir.path().join("db"), rng(2)).unwrap();
    assert!(store.membership(&group).unwrap().is_admitted(&bob.id()));
    assert_eq!(*store.watch(&group).unwrap().borrow(), Cursor(1));
    let unknown = store.watch(&GroupId([0; 32]));
    assert!(matches!(unknown, Err(StoreError::UnknownGroup(_))));
}

#[tokio::test]
async fn closing_leaves_one_file_with_everything_in_it() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    let clone = store.clone();
    let (release, _holding) = hold(&store).await;
    let late = tokio::spawn({
        let (store, writer) = (store.clone(), writer.clone());
        async move { store.append(group, vec![entry(blob(1), "handed over before closing")], writer).await }
    });
    waiting(&store, 1).await;
    let closing = tokio::spawn(store.close());
    waiting(&clone, 2).await;
    drop(release);
    assert_eq!(late.await.unwrap().unwrap()[0].cursor, Cursor(1));
    closing.await.unwrap().unwrap();
    let files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files, ["db"]);
    assert!(matches!(clone.have(group).await, Err(StoreError::Closed)));
    assert!(matches!(clone.append(group, vec![], writer).await, Err(StoreError::Closed)));
    assert!(matches!(clone.close().await, Err(StoreError::Closed)));
}

#[tokio::test]
async fn dropping_the_last_clone_carries_out_what_was_handed_over() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    let (release, holding) = hold(&store).await;
    let push = tokio::spawn({
        let store = store.clone();
        async move { drop(store.append(group, vec![entry(blob(1), "x")], writer).await) }
    });
    waiting(&store, 1).await;
    for asked in [push, holding] {
        asked.abort();
        assert!(asked.await.unwrap_err().is_cancelled());
    }
    drop(release);
    drop(store);
    let store = Store::open(&dir.path().join("db"), rng(2)).unwrap();
    assert_eq!(store.max_cursor(&group).unwrap(), Cursor(1));
    let have = store.have(group).await.unwrap();
    assert_ne!(have[0].heads, [EnvelopeHash::NONE]);
}

/// How many entries there are, in one chain.
async fn chained(store: &Store, group: GroupId) -> usize {
    let stored = store.read_sealed(group, Cursor(0), ALL).await.unwrap().entries;
    let mut previous = EnvelopeHash::NONE;
    for (number, entry) in (1..).zip(&stored) {
        let envelope = Envelope::parse(&entry.bytes).unwrap();
        assert_eq!((envelope.header.number, envelope.header.previous), (Number(number), previous));
        previous = envelope.hash();
    }
    stored.len()
}

#[tokio::test]
async fn what_is_repeated_within_a_long_push_is_stored_once_and_the_chain_goes_on() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    store.append(group, vec![entry(blob(50), "known"), entry(blob(90), "known")], writer.clone()).await.unwrap();
    // 20 comes twice in the push itself
    let ids = (0..100).chain([20]);
    let body = |n| if n == 50 || n == 90 { "known" } else { "new" };
    let entries = ids.map(|n| entry(blob(n), body(n))).collect();
    let appended = store.append(group, entries, writer).await.unwrap();
    let repeated: Vec<_> = (0..).zip(&appended).filter(|(_, one)| one.repeated).map(|(at, _)| at).collect();
    assert_eq!(repeated, [50, 90, 100]);
    assert_eq!(appended[100].number, appended[20].number);
    assert_eq!(chained(&store, group).await, 100);
}

/// Seals as a writer does, but for one entry.
struct Refusing(Arc<Writer>, BlobId);

impl SealEntries for Refusing {
    fn author(&self) -> AuthorId {
        self.0.author()
    }

    fn seal(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Result<Vec<u8>, SealError> {
        if self.1 == entry.blob_id {
            return Err(SealError::new(std::io::Error::other("no key")));
        }
        self.0.seal(number, previous, entry)
    }
}

#[tokio::test]
async fn a_long_push_with_an_entry_that_cannot_be_sealed_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let (store, group, writer) = founded_store(&dir).await;
    for refused in [0, 1, 99] {
        let entries = (0..100).map(|n| entry(blob(n), "x")).collect();
        let sealer = Arc::new(Refusing(writer.clone(), blob(refused)));
        let failed = store.append(group, entries, sealer).await;
        assert!(matches!(failed, Err(StoreError::Seal(_))), "{failed:?}");
        assert_eq!(store.max_cursor(&group).unwrap(), Cursor(0));
    }
}
