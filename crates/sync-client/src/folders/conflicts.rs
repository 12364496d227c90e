//! What becomes of a version that lost: it is renamed, and told together with what has taken its place.
//!
//! What won is at hand before anything is told: a record says what whoever wrote it holds.

use std::ops::ControlFlow;
use std::sync::Arc;

use sync_core::folder::{Disk, Version, basis, conflict_path, settle};
use sync_folder::apply::{Applier, ApplyError, Check, Expected, Ready};
use sync_folder::cut::Cut;
use sync_folder::walk::{self, Stat};
use sync_store::{Appended, Content, DiskState, FileRow, FolderRowId, NewKept, Reader, StoreError, Txn};
use sync_types::folder::{Dot, FileContent, KIND_RECORDS, Node, Record, RecordBatch, TreePath, folder_stream};
use tokio::runtime::Handle;

use super::apply::{differs, extent, new_kept};
use super::engine::Folder;
use super::rows::{self, ChunkRow};
use super::status::Direction;
use super::texts;
use crate::group::now;

/// Bytes a conflict's two records take beside their paths.
const RECORDS_BYTES: usize = 512;
/// Conflicts told in one entry: two records each, and a record may hold a long list of chunks.
const AT_ONCE: usize = 64;

/// What lies at a path and lost, with its pieces.
#[derive(Clone)]
pub(crate) struct Loser {
    pub(crate) version: Version,
    pub(crate) chunks: Vec<ChunkRow>,
}

/// What is at a path whose version was set aside.
pub(crate) enum Winner {
    /// What won, with its pieces.
    Here(Stat, Vec<ChunkRow>),
    /// Nothing yet: what won needs no content and comes in the next round.
    Next,
    /// Something else was faster: nothing is told of it.
    Lost,
}

/// A conflict that is settled on disk, and is still to be told.
pub(crate) enum Settled {
    /// What lost lies beside what won.
    Aside(Aside),
    /// Both are one text.
    Merged(Merged),
}

/// A version that was set aside.
pub(crate) struct Aside {
    path: TreePath,
    copy: TreePath,
    stat: Stat,
    loser: Version,
    chunks: Vec<ChunkRow>,
    take: Disk,
    winner: Winner,
}

impl Settled {
    /// The same, with what is at the path now.
    pub(crate) fn with(self, winner: Winner) -> Self {
        match self {
            Self::Aside(aside) => Self::Aside(Aside { winner, ..aside }),
            merged => merged,
        }
    }

    /// The name that is claimed for it beside its path.
    fn copy(&self) -> Option<&TreePath> {
        match self {
            Self::Aside(aside) => Some(&aside.copy),
            Self::Merged(_) => None,
        }
    }
}

/// A text that was merged from what lay at a path and what won; both are kept.
pub(crate) struct Merged {
    path: TreePath,
    take: Disk,
    stat: Stat,
    content: FileContent,
    chunks: Vec<ChunkRow>,
    /// Whether a later change shows in the file's time.
    settled: bool,
    kept: Vec<NewKept>,
}

/// Gives back the names of copies that are not told: the next look at them does.
pub(crate) fn give_up(folder: &Arc<Folder>, conflicts: &[Settled]) {
    let copies = || conflicts.iter().filter_map(Settled::copy);
    folder.release(copies());
    copies().for_each(|copy| folder.look_again(copy));
}

/// Puts what two edits of a text come to in their place; none where they cannot be merged.
pub(crate) fn merge(
    folder: &Arc<Folder>,
    applier: &Applier,
    handle: &Handle,
    (path, take): (&TreePath, &Disk),
    loser: &Loser,
    (ready, chunks): (&Ready, Vec<ChunkRow>),
    expected: Expected,
) -> Result<Option<Settled>, ApplyError> {
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
    let lost = placed.kept.map(|kept| new_kept(path, kept, hash_of(&loser.version.node), loser.chunks.clone()));
    let won = new_kept(path, applier.keep(ready)?, hash_of(&take.node), chunks);
    let kept = lost.into_iter().chain([won]).collect();
    let cut = folder.cutter.cut_file(applier.root(), path, &placed.stat, &mut |_| ControlFlow::Continue(()));
    // whoever was faster edited the merged text: the next look at it tells
    let Cut { content, stat, list, settled, .. } = cut.map_err(|_| ApplyError::Changed)?;
    let chunks = rows::chunk_rows(&content, list.as_deref());
    let (path, take) = (path.clone(), take.clone());
    Ok(Some(Settled::Merged(Merged { path, take, stat, content, chunks, settled, kept })))
}

/// Renames what lost; both paths stay claimed until [`tell`] is through.
pub(crate) fn set_aside(
    folder: &Arc<Folder>,
    applier: &Applier,
    handle: &Handle,
    (path, take): (&TreePath, &Disk),
    loser: Loser,
    expected: Expected,
) -> Result<Settled, ApplyError> {
    let Expected::This(expected) = expected else { return Err(ApplyError::Changed) };
    let taken = |copy: &TreePath| {
        let said = row_at(folder, handle, copy).ok().flatten().is_some_and(|row| row.live || row.disk.is_some());
        said || !matches!(walk::stat(applier.root(), copy), Ok(None))
    };
    let Loser { version: loser, chunks } = loser;
    let copy = conflict_path(path, &loser, taken);
    folder.claim(&copy);
    match applier.rename(path, &expected, &copy) {
        Ok(stat) => {
            let (path, take) = (path.clone(), take.clone());
            Ok(Settled::Aside(Aside { path, copy, stat, loser, chunks, take, winner: Winner::Next }))
        }
        Err(error) => {
            folder.release([&copy]);
            Err(error)
        }
    }
}

fn row_at(folder: &Arc<Folder>, handle: &Handle, path: &TreePath) -> Result<Option<FileRow>, StoreError> {
    let (fid, key) = (folder.fid, path.key());
    handle.block_on(folder.store().read(move |reader| reader.file(fid, &key)))
}

/// Tells conflicts that are settled on disk, some at a time.
pub(crate) async fn tell(folder: &Arc<Folder>, conflicts: Vec<Settled>) -> Result<(), StoreError> {
    let mut conflicts = conflicts.into_iter().peekable();
    while conflicts.peek().is_some() {
        tell_some(folder, conflicts.by_ref().take(AT_ONCE).collect()).await?;
    }
    Ok(())
}

/// What is said of a conflict.
enum Said {
    /// The copy, and what won if it still wins.
    Aside(Record, Option<Record>),
    Merged(Record),
}

impl Said {
    fn of(reader: &Reader<'_>, fid: FolderRowId, conflict: &Settled) -> Result<Self, StoreError> {
        let known = |path: &TreePath| rows::versions(reader.file(fid, &path.key())?.as_ref());
        Ok(match conflict {
            Settled::Aside(Aside { path, copy, loser, take, winner, .. }) => {
                let basis = basis(&known(copy)?, None);
                let [copy, record] = settle(path.clone(), take, copy.clone(), basis, loser);
                let wins = !matches!(winner, Winner::Lost)
                    && known(path)?.winner().is_some_and(|now| now.node.is_same(&take.node));
                Self::Aside(copy, wins.then_some(record))
            }
            Settled::Merged(Merged { path, take, stat, content, .. }) => {
                let (node, basis) = (Node::File(content.clone()), take.vector.clone());
                Self::Merged(Record { path: path.clone(), node, mode: stat.mode, mtime: stat.mtime, basis })
            }
        })
    }

    fn records(&self) -> impl Iterator<Item = &Record> {
        let (first, second) = match self {
            Self::Aside(copy, winner) => (copy, winner.as_ref()),
            Self::Merged(record) => (record, None),
        };
        std::iter::once(first).chain(second)
    }
}

/// Appends the records that settle conflicts, and takes them into the index with what lies on disk.
///
/// What was renamed is durable already. What won is told only while it still wins: of what was superseded meanwhile only
/// the index learns that it lies here.
async fn tell_some(folder: &Arc<Folder>, conflicts: Vec<Settled>) -> Result<(), StoreError> {
    let (fid, way) = (folder.fid, folder.direction);
    let conflicts = Arc::new(conflicts);
    let bytes = conflicts.len() * RECORDS_BYTES;
    let build = {
        let (conflicts, stream) = (conflicts.clone(), folder_stream(&folder.id));
        move |reader: &Reader<'_>| {
            let said: Vec<Said> =
                conflicts.iter().map(|conflict| Said::of(reader, fid, conflict)).collect::<Result<_, _>>()?;
            let records = said.iter().flat_map(Said::records).cloned().collect();
            let body = RecordBatch { records }.encode();
            Ok((Some(Content::Sealed { kind: KIND_RECORDS, stream: stream.clone(), body }), said))
        }
    };
    let work = {
        let conflicts = conflicts.clone();
        move |txn: &mut Txn<'_>, appended: Option<&Appended>, said: Vec<Said>| {
            let Some(appended) = appended else { return Ok(None) };
            let mut index = 0u16;
            let mut version_of = |record: &Record| {
                let version = Version::new(record, Dot::new(appended.author, appended.number, index));
                index += 1;
                version
            };
            for (conflict, said) in conflicts.iter().zip(&said) {
                match (conflict, said) {
                    (Settled::Aside(aside), Said::Aside(copy, winner)) => {
                        let version = version_of(copy);
                        let state = rows::disk_state(&aside.stat, &copy.node, &version.vector);
                        put(txn, (fid, way), &aside.copy, Some(version), Some(state), &aside.chunks)?;
                        let version = winner.as_ref().map(&mut version_of);
                        let vector = version.as_ref().map_or(&aside.take.vector, |version| &version.vector);
                        let (state, chunks) = match &aside.winner {
                            Winner::Here(stat, chunks) => {
                                (Some(rows::disk_state(stat, &aside.take.node, vector)), &chunks[..])
                            }
                            Winner::Next | Winner::Lost => (None, &[][..]),
                        };
                        put(txn, (fid, way), &aside.path, version, state, chunks)?;
                    }
                    (Settled::Merged(merged), Said::Merged(record)) => {
                        let version = version_of(record);
                        let mut state = rows::disk_state(&merged.stat, &record.node, &version.vector);
                        // a time that nothing on disk has, so that the next look reads
                        state.mtime = if merged.settled { state.mtime } else { i64::MIN };
                        put(txn, (fid, way), &merged.path, Some(version), Some(state), &merged.chunks)?;
                        for kept in &merged.kept {
                            txn.add_kept(fid, kept)?;
                        }
                    }
                    _ => {}
                }
            }
            Ok(Some(appended.hash))
        }
    };
    let told = folder.group.append_built(bytes, build, work).await;
    folder.release(conflicts.iter().filter_map(Settled::copy));
    if let Some(hash) = told? {
        folder.remember_own(hash);
    }
    for conflict in conflicts.iter() {
        match conflict {
            Settled::Aside(aside) => folder.add_conflict(&aside.copy),
            Settled::Merged(merged) => {
                folder.keep_text(&merged.path);
                folder.look_again(&merged.path);
            }
        }
    }
    folder.wake();
    Ok(())
}

/// Puts what was told and what lies at a path into the index.
fn put(
    txn: &mut Txn<'_>,
    (fid, way): (FolderRowId, Direction),
    path: &TreePath,
    version: Option<Version>,
    disk: Option<DiskState>,
    chunks: &[ChunkRow],
) -> Result<(), StoreError> {
    let key = path.key();
    let mut versions = rows::versions(txn.reader().file(fid, &key)?.as_ref())?;
    version.map(|version| versions.insert(version));
    let pending = differs(&txn.reader(), fid, &key, &versions, disk.as_ref(), way)?;
    let (live, size) = extent(&versions);
    let file = txn.put_file(fid, &key, &versions.encode(), live, size, disk.as_ref(), pending)?;
    txn.put_chunks(file, chunks)
}
