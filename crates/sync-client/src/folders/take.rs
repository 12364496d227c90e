//! Takes in what the log says about a folder.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sync_core::folder::Version;
use sync_store::{FolderRowId, Limits, StoreError, Txn};
use sync_types::folder::{Dot, KIND_RECORDS, Node, RecordBatch, TreePath, folder_stream};
use sync_types::{AuthorId, Cursor, Envelope, Number};

use super::apply;
use super::engine::Folder;
use super::rows;
use super::status::Direction;

/// Entries taken in at once: an entry may hold thousands of records.
const ENTRIES: usize = 64;
/// Bytes of entries taken in at once.
const BYTES: usize = 2 << 20;
/// Wait before the log is read again where that failed.
const RETRY: Duration = Duration::from_secs(5);

/// A batch and where it stands.
struct Placed {
    author: AuthorId,
    number: Number,
    batch: RecordBatch,
}

/// Runs until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>) {
    let mut newest = folder.group.watch_newest();
    loop {
        newest.borrow_and_update();
        let failed = match take_in(&folder).await {
            Ok(()) => false,
            Err(StoreError::Closed) => return,
            Err(error) => {
                folder.set_path_problem("", Some(error.to_string()));
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
                Ok(batch) => batches.push(Placed { author: entry.author, number: entry.number, batch }),
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
async fn put(folder: &Arc<Folder>, batches: Vec<Placed>, reached: Cursor) -> Result<(), StoreError> {
    let (fid, direction) = (folder.fid, folder.direction);
    let bytes = batches.iter().map(|placed| placed.batch.records.len() * 256).sum();
    let news = folder.store().write(bytes, move |txn| {
        let mut news = false;
        // directories that are known to be some, so that their other entries need no look at them
        let mut directories = HashSet::new();
        for Placed { author, number, batch } in batches {
            for (index, record) in (0..=u16::MAX).zip(batch.records) {
                let key = record.path.key();
                let row = txn.reader().file(fid, &key)?;
                let mut versions = rows::versions(row.as_ref())?;
                if !versions.insert(Version::new(&record, Dot::new(author, number, index))) {
                    continue;
                }
                let disk = row.as_ref().and_then(|row| row.disk.as_ref());
                let pending = apply::differs(&txn.reader(), fid, &key, &versions, disk, direction)?;
                let (live, size) = apply::extent(&versions);
                txn.put_versions(fid, &key, &versions.encode(), live, size, pending)?;
                news |= pending;
                if !live {
                    news |= apply::emptied_above(txn, fid, &key)?;
                } else {
                    let mut above = record.path.parent();
                    while let Some(directory) = above.filter(|directory| directories.insert(directory.clone())) {
                        news |= look_above(txn, fid, &directory, direction)?;
                        above = directory.parent();
                    }
                }
            }
        }
        txn.set_folder_cursor(fid, reached)?;
        Ok(news)
    });
    if news.await? {
        folder.wake();
        folder.changed();
    }
    Ok(())
}

/// Something is below a path now: it is to be a directory, whatever was said of it.
fn look_above(txn: &mut Txn<'_>, fid: FolderRowId, path: &TreePath, way: Direction) -> Result<bool, StoreError> {
    let key = path.key();
    let Some(row) = txn.reader().file(fid, &key)? else { return Ok(false) };
    let versions = rows::versions(Some(&row))?;
    if versions.winner().is_some_and(|winner| winner.node == Node::Directory) {
        return Ok(false);
    }
    let pending = apply::differs(&txn.reader(), fid, &key, &versions, row.disk.as_ref(), way)?;
    txn.put_versions(fid, &key, &row.versions, row.live, row.size, pending)?;
    Ok(pending)
}
