//! Tells what became of versions that lost: each was renamed or merged ([`super::carry`]), and is told with what took its
//! place.
//!
//! What won is at hand before anything is told: a record says what whoever wrote it holds.

use std::ops::ControlFlow;
use std::sync::Arc;

use sync_core::folder::Disk;
use sync_folder::apply::{Applier, ApplyError, Check, Expected, Ready};
use sync_folder::cut::Cut;
use sync_store::{Appended, NewKept, Reader, StoreError, Txn};
use sync_types::folder::{Node, TreePath};
use tokio::runtime::Handle;

use super::engine::Folder;
use super::index::{self, Conflict, Loser, Merged, new_kept};
use super::rows::ChunkRow;
use super::{rows, texts};
use crate::group::now;

/// Bytes a conflict's two records take beside their paths.
const RECORDS_BYTES: usize = 512;
/// Conflicts told in one entry: two records each, and a record may hold a long list of chunks.
const AT_ONCE: usize = 64;

/// Puts what two edits of a text come to in their place; none where they cannot be merged.
pub(crate) fn merge(
    folder: &Arc<Folder>,
    applier: &Applier,
    handle: &Handle,
    (path, take): (&TreePath, &Disk),
    loser: &Loser,
    (ready, chunks): (&Ready, Vec<ChunkRow>),
    expected: Expected,
) -> Result<Option<Merged>, ApplyError> {
    let Some(text) = texts::merged(folder, applier, handle, path, &loser.version, take, ready) else { return Ok(None) };
    let incoming = applier.receive(text.len() as u64)?;
    incoming.write_at(0, &text)?;
    let mtime = i64::try_from(now().0).unwrap_or(i64::MAX).saturating_mul(1_000_000);
    let merged = incoming.finish(Check::Done, take.mode, mtime)?;
    let placed = applier.sync(std::slice::from_ref(&merged)).and_then(|()| applier.place(&merged, path, expected));
    let placed = match placed {
        Ok(placed) => placed,
        Err(error) => {
            applier.discard(&merged)?;
            return Err(error);
        }
    };
    let hash_of = |node: &Node| match node {
        Node::File(file) => Some(file.hash),
        _ => None,
    };
    let lost = placed.kept.map(|kept| new_kept(path, kept, hash_of(&loser.version.node), loser.chunks.clone(), now()));
    let won = new_kept(path, applier.keep(ready)?, hash_of(&take.node), chunks, now());
    let kept: Vec<NewKept> = lost.into_iter().chain([won]).collect();
    let cut = folder.cutter.cut_file(applier.root(), path, &placed.stat, &mut |_| ControlFlow::Continue(()));
    let Ok(Cut { content, stat, list, settled, .. }) = cut else {
        // whoever was faster edited the merged text: the next look at it tells, and both edits stay in the list
        let fid = folder.fid;
        let noting = folder
            .store()
            .write(RECORDS_BYTES, move |txn| kept.iter().try_for_each(|kept| txn.add_kept(fid, kept).map(drop)));
        if let Err(error) = handle.block_on(noting) {
            tracing::warn!(%error, "versions are in no list until the next start");
        }
        return Err(ApplyError::Changed);
    };
    let chunks = rows::chunk_rows(&content, list.as_deref());
    let (path, take) = (path.clone(), take.clone());
    Ok(Some(Merged { path, take, stat, content, chunks, settled, kept }))
}

/// Tells conflicts that are settled on disk, some at a time.
pub(crate) async fn tell(folder: &Arc<Folder>, conflicts: Vec<Conflict>) -> Result<(), StoreError> {
    let mut conflicts = conflicts.into_iter().peekable();
    while conflicts.peek().is_some() {
        tell_some(folder, conflicts.by_ref().take(AT_ONCE).collect()).await?;
    }
    Ok(())
}

/// Appends the records that settle conflicts, and takes them into the index with what lies on disk.
async fn tell_some(folder: &Arc<Folder>, conflicts: Vec<Conflict>) -> Result<(), StoreError> {
    let place = folder.place();
    let conflicts = Arc::new(conflicts);
    let bytes = conflicts.len() * RECORDS_BYTES;
    let build = {
        let conflicts = conflicts.clone();
        let place = place.clone();
        move |reader: &Reader<'_>| index::settle(reader, &place, &conflicts)
    };
    let work = {
        let conflicts = conflicts.clone();
        move |txn: &mut Txn<'_>, appended: Option<&Appended>, settling| {
            let Some(appended) = appended else { return Ok(None) };
            index::settled(txn, &place, &conflicts, appended, settling)?;
            Ok(Some(appended.hash))
        }
    };
    let told = folder.group.append_built(bytes, build, work).await;
    folder.release(conflicts.iter().filter_map(Conflict::copy));
    if let Some(hash) = told? {
        folder.remember_own(hash);
    }
    for conflict in conflicts.iter() {
        match conflict {
            Conflict::Aside(aside) => folder.add_conflict(&aside.copy),
            Conflict::Merged(merged) => {
                folder.keep_text(&merged.path);
                folder.look_again(&merged.path);
            }
        }
    }
    folder.wake();
    Ok(())
}
