//! Takes in what the log says about a folder.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sync_core::folder::Coverage;
use sync_store::{FolderRowId, Limits, SealEntries as _, Since, SnapshotRow, SnapshotState, StoreError, Txn};
use sync_types::folder::{KIND_RECORDS, KIND_SNAPSHOT, Record, RecordBatch, folder_stream};
use sync_types::snapshot::Snapshot;
use sync_types::{AuthorId, Cursor, Envelope, GroupId, Number};

use super::engine::Folder;
use super::index::{self, Batch};
use super::snapshots::{self, coverage};

/// Entries taken in at once: an entry may hold thousands of records.
const ENTRIES: usize = 64;
/// Bytes of entries taken in at once.
const BYTES: usize = 2 << 20;
/// Wait before the log is read again where that failed.
const RETRY: Duration = Duration::from_secs(5);

/// An entry of the folder's stream, and where it stands.
struct Placed {
    author: AuthorId,
    number: Number,
    said: Said,
}

/// What an entry of the folder's stream says.
enum Said {
    /// Records.
    Records(Vec<Record>),
    /// This many records, which were taken in when they were told here.
    Told(usize),
    /// What all before have led to.
    Snapshot(Box<Snapshot>),
}

/// Runs until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>) {
    let mut newest = folder.group.watch_newest();
    loop {
        newest.borrow_and_update();
        let failed = match take_in(&folder).await {
            Ok(()) => {
                folder.set_trouble("take", None);
                false
            }
            Err(StoreError::Closed) => return,
            Err(error) => {
                folder.set_trouble("take", Some(error.to_string()));
                true
            }
        };
        tokio::select! {
            () = folder.cancel.cancelled() => return,
            changed = newest.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if failed => {}
        }
    }
}

/// Takes everything of the log that was not yet taken into the index.
pub(crate) async fn take_in(folder: &Arc<Folder>) -> Result<(), StoreError> {
    let (group, id, stream) = (folder.group.id, folder.id, folder_stream(&folder.id));
    let row = folder.store().read(move |reader| reader.folder(&group, &id)).await?;
    let Some(row) = row else { return Ok(()) };
    let mut after = row.cursor;
    loop {
        let limits = Limits { entries: ENTRIES, bytes: BYTES };
        let sealed = folder.store().read_sealed(group, after, limits).await?;
        let mut batches = Vec::new();
        for entry in &sealed.entries {
            let Ok(envelope) = Envelope::parse(&entry.bytes) else { continue };
            let own = folder.is_own(&envelope.hash());
            let opened = folder.group.keys().unseal(&envelope);
            let content = match opened {
                Ok(content) => content,
                Err(error) => {
                    folder.group.unreadable(entry.author, &error);
                    continue;
                }
            };
            if content.stream != stream {
                continue;
            }
            let said = match content.kind {
                KIND_RECORDS if own => RecordBatch::count(&content.body).map(Said::Told),
                KIND_RECORDS => RecordBatch::decode(&content.body).map(|batch| Said::Records(batch.records)),
                KIND_SNAPSHOT => Snapshot::decode(&content.body).map(|snapshot| Said::Snapshot(Box::new(snapshot))),
                _ => continue,
            };
            match said {
                Ok(said) => batches.push(Placed { author: entry.author, number: entry.number, said }),
                Err(error) => {
                    folder.group.count_refused(1);
                    tracing::debug!(%error, author = %entry.author.short(), "entry of a folder refused");
                }
            }
        }
        let reached = sealed.max_cursor;
        if reached != after {
            put(folder, batches, reached).await?;
        }
        after = reached;
        if !sealed.has_more {
            return Ok(());
        }
    }
}

/// What came of putting entries into the index.
#[derive(Default)]
struct Put {
    /// Something is to be done on disk.
    news: bool,
    /// Whose snapshot came that covers what the log lacks.
    awaited: Option<AuthorId>,
    before: Since,
    since: Since,
    live: u64,
    /// The last entry with records is our own.
    own: bool,
}

/// Puts entries into the index, and how far the log was taken in.
async fn put(folder: &Arc<Folder>, batches: Vec<Placed>, reached: Cursor) -> Result<(), StoreError> {
    let (fid, group, place) = (folder.fid, folder.group.id, folder.place());
    let author = folder.group.author().author();
    let weight = |placed: &Placed| match &placed.said {
        Said::Records(records) => records.len() * 256,
        _ => 256,
    };
    let bytes = batches.iter().map(weight).sum();
    let work = move |txn: &mut Txn<'_>| {
        let mut put = Put { before: txn.reader().since_snapshot(fid)?, ..Put::default() };
        let covered = coverage(txn.reader().covered(fid)?);
        // directories that are known to be some, so that their other entries need no look at them
        let mut directories = HashSet::new();
        for Placed { author: by, number, said } in batches {
            // a snapshot says what it led to, and may remember that this is gone
            if covered.contains_entry(&by, number) {
                continue;
            }
            match said {
                Said::Records(records) => {
                    put.own = by == author;
                    txn.note_taken(fid, &group, &by, number, records.len())?;
                    let batch = Batch { author: by, number, records };
                    put.news |= index::take_batch(txn, &place, batch, &mut directories)?;
                }
                Said::Told(records) => {
                    put.own = true;
                    txn.note_taken(fid, &group, &by, number, records)?;
                }
                Said::Snapshot(snapshot) => {
                    txn.note_taken(fid, &group, &by, number, 0)?;
                    if note_snapshot(txn, fid, &group, (by, number), &snapshot, &covered)? {
                        let lacks = snapshots::lacks(&txn.reader(), &group, &snapshot)?;
                        put.awaited = Some(by).filter(|_| lacks).or(put.awaited);
                    }
                }
            }
        }
        txn.set_folder_cursor(fid, reached)?;
        put.since = txn.reader().since_snapshot(fid)?;
        put.live = txn.reader().folder_totals(fid)?.files;
        Ok(put)
    };
    let put = folder.store().write(bytes, work).await?;
    folder.snapshots.note(put.before, put.since, put.live, put.own);
    folder.snapshots.wake(put.awaited);
    if put.news {
        folder.wake();
        folder.changed();
    }
    Ok(())
}

/// Remembers a snapshot to be looked at; false if there is nothing to be learned from it.
fn note_snapshot(
    txn: &mut Txn<'_>,
    fid: FolderRowId,
    group: &GroupId,
    entry: (AuthorId, Number),
    snapshot: &Snapshot,
    covered: &Coverage,
) -> Result<bool, StoreError> {
    let known = txn.reader().snapshots(fid)?;
    if known.iter().any(|row| row.entry == Some(entry)) || covered.covers(&coverage(snapshot.covered.iter().copied())) {
        return Ok(false);
    }
    // of each author the last one counts, so that nobody can fill the database with them
    let older = |row: &&SnapshotRow| row.taken.is_none() && row.entry.is_some_and(|(author, _)| author == entry.0);
    let replaced = |row: &&SnapshotRow| matches!(row.state, SnapshotState::Told | SnapshotState::Refused);
    for row in known.iter().filter(replaced).filter(older) {
        txn.remove_snapshot(row.sid)?;
    }
    txn.add_snapshot(fid, group, Some(entry), &snapshot.encode())?;
    Ok(true)
}
