//! Takes in what the log says about a folder.

use std::sync::Arc;
use std::time::Duration;

use sync_store::{Limits, StoreError};
use sync_types::folder::{KIND_RECORDS, RecordBatch, folder_stream};
use sync_types::{Cursor, Envelope};

use super::engine::Folder;
use super::index::{self, Batch};

/// Entries taken in at once: an entry may hold thousands of records.
const ENTRIES: usize = 64;
/// Bytes of entries taken in at once.
const BYTES: usize = 2 << 20;
/// Wait before the log is read again where that failed.
const RETRY: Duration = Duration::from_secs(5);

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
            if folder.is_own(&envelope.hash()) {
                continue;
            }
            let opened = folder.group.keys().unseal(&envelope);
            let content = match opened {
                Ok(content) => content,
                Err(error) => {
                    folder.group.unreadable(entry.author, &error);
                    continue;
                }
            };
            if content.kind != KIND_RECORDS || content.stream != stream {
                continue;
            }
            match RecordBatch::decode(&content.body) {
                Ok(RecordBatch { records }) => {
                    batches.push(Batch { author: entry.author, number: entry.number, records });
                }
                Err(error) => {
                    folder.group.count_refused(1);
                    tracing::debug!(%error, author = %entry.author.short(), "records refused");
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

/// Puts records into the index, and how far the log was taken in.
async fn put(folder: &Arc<Folder>, batches: Vec<Batch>, reached: Cursor) -> Result<(), StoreError> {
    let place = folder.place();
    let bytes = batches.iter().map(|batch| batch.records.len() * 256).sum();
    if folder.store().write(bytes, move |txn| index::take(txn, &place, batches, reached)).await? {
        folder.wake();
        folder.changed();
    }
    Ok(())
}
