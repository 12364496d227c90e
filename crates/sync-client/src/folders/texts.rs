//! Texts: each as it was last in sync is kept, so that edits made apart are merged where they touch different lines.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use sync_core::folder::merge::{MAX_TEXT, merge};
use sync_core::folder::{Disk, Version};
use sync_folder::apply::{Applier, Ready};
use sync_folder::cut::read_chunk;
use sync_folder::root::Root;
use sync_store::{DiskState, StoreError, Text};
use sync_types::folder::{FileContent, Node, TreePath};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::engine::Folder;
use super::rows;
use crate::group::now;

/// Paths that wait until there is time to keep their texts; of more at once the rest is not kept, which costs a merge.
pub(crate) const WAITING: usize = 4096;
/// How long nothing is to happen before texts are read again: what people wait for goes first.
const CALM: Duration = Duration::from_millis(500);
/// Bytes of packed texts that a folder keeps.
const MOST: u64 = 64 << 20;
/// Texts kept of one path: the ancestor of two edits is rarely older.
const OF_PATH: usize = 4;
/// Paths whose texts are kept in one commit.
const AT_ONCE: usize = 64;

/// Whether a file may be a text that is kept.
pub(crate) fn may_be(node: &Node) -> bool {
    matches!(node, Node::File(file) if (1..=MAX_TEXT as u64).contains(&file.size))
}

/// Keeps texts of paths that came into sync, when nothing else is to do, until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>, mut synced: mpsc::Receiver<TreePath>) {
    let mut waiting = BTreeSet::new();
    let mut calm = Instant::now();
    // a peer that fetches is waited for by somebody too
    let mut moved = 0;
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            received = synced.recv_many(&mut batch, WAITING) => {
                if received == 0 {
                    return;
                }
                if waiting.is_empty() {
                    (calm, moved) = (Instant::now() + CALM, folder.counters.moved());
                }
                batch.truncate(WAITING.saturating_sub(waiting.len()));
                waiting.extend(batch);
            }
            () = tokio::time::sleep_until(calm), if !waiting.is_empty() => {
                calm = Instant::now() + CALM;
                let before = std::mem::replace(&mut moved, folder.counters.moved());
                let root = folder.root().filter(|_| moved == before && !folder.is_at_work());
                if let Some(root) = root {
                    let paths = std::iter::from_fn(|| waiting.pop_first()).take(AT_ONCE).collect();
                    match keep(&folder, root, paths).await {
                        Ok(()) => calm = Instant::now(),
                        Err(StoreError::Closed) => return,
                        Err(error) => tracing::debug!(%error, "texts are not kept"),
                    }
                }
            }
            () = folder.cancel.cancelled() => return,
        }
    }
}

/// Reads texts that are still what the index says, and keeps them.
async fn keep(folder: &Arc<Folder>, root: Arc<Root>, paths: Vec<TreePath>) -> Result<(), StoreError> {
    let fid = folder.fid;
    let known = folder.store().read(move |reader| {
        let mut known = Vec::new();
        for path in paths {
            let key = path.key();
            let Some(disk) = reader.file(fid, &key)?.and_then(|row| row.disk) else { continue };
            let kept = reader.texts(fid, &key)?;
            if !kept.iter().any(|text| Some(text.hash) == disk.hash && text.vector == disk.vector) {
                known.push((path, disk));
            }
        }
        Ok(known)
    });
    let known = known.await?;
    let reading = tokio::task::spawn_blocking(move || {
        let read = |(path, disk): (TreePath, DiskState)| {
            let hash = disk.hash?;
            let bytes = read_chunk(&root, &path, 0, disk.size.min(MAX_TEXT as u64), &hash).ok()??;
            let is_text = !bytes.contains(&0) && std::str::from_utf8(&bytes).is_ok();
            let packed = is_text.then(|| lz4_flex::compress_prepend_size(&bytes))?;
            Some((path.key(), Text { hash, vector: disk.vector, packed }))
        };
        known.into_iter().filter_map(read).collect::<Vec<_>>()
    });
    let texts = reading.await.map_err(|_| StoreError::Closed)?;
    if texts.is_empty() {
        return Ok(());
    }
    let bytes = texts.iter().map(|(_, text)| text.packed.len()).sum();
    let work = move |txn: &mut sync_store::Txn<'_>| {
        for (key, text) in texts {
            txn.put_text(fid, &key, &text, now(), OF_PATH)?;
        }
        txn.trim_texts(fid, MOST)
    };
    folder.store().write(bytes, work).await
}

/// What two edits of a text come to: one that lies at the path, and one that was received.
///
/// None where one is no text, where what both began with is not known any more, or where they touch the same lines.
pub(crate) fn merged(
    folder: &Folder,
    applier: &Applier,
    handle: &Handle,
    path: &TreePath,
    loser: &Version,
    take: &Disk,
    ready: &Ready,
) -> Option<Vec<u8>> {
    let Node::File(FileContent { size, hash, .. }) = &loser.node else { return None };
    if !may_be(&loser.node) || !may_be(&take.node) {
        return None;
    }
    let (fid, key) = (folder.fid, path.key());
    let look = folder
        .store()
        .read(move |reader| Ok((rows::versions(reader.file(fid, &key)?.as_ref())?, reader.texts(fid, &key)?)));
    let (versions, texts) = handle.block_on(look).ok()?;
    let winner = versions.winner().filter(|winner| winner.node.is_same(&take.node))?;
    let before = texts.into_iter().map(|text| (rows::decode_vector(&text.vector), text));
    let common = before.filter(|(vector, _)| loser.vector.covers(vector) && winner.vector.covers(vector));
    let (_, base) = common.max_by_key(|(vector, _)| vector.sum())?;
    let base = lz4_flex::decompress_size_prepended(&base.packed).ok()?;
    let ours = read_chunk(applier.root(), path, 0, *size, hash).ok()??;
    let mut theirs = Vec::new();
    applier.open(ready).ok()?.take(MAX_TEXT as u64 + 1).read_to_end(&mut theirs).ok()?;
    merge(&base, &ours, &theirs).map(String::into_bytes)
}
