//! What becomes of a version that lost: it is renamed, and told together with what has taken its place.
//!
//! What won is at hand before anything is told: a record says what whoever wrote it holds.

use std::sync::Arc;

use sync_core::folder::{Disk, Version, basis, conflict_path, settle};
use sync_folder::apply::{Applier, ApplyError, Expected};
use sync_folder::walk::{self, Stat};
use sync_store::{Appended, Content, DiskState, FileRow, FolderRowId, Reader, StoreError, Txn};
use sync_types::folder::{Dot, KIND_RECORDS, Record, RecordBatch, TreePath, folder_stream};
use tokio::runtime::Handle;

use super::apply::{differs, extent};
use super::engine::Folder;
use super::rows::{self, ChunkRow};
use super::status::Direction;

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

/// A version that was set aside, and is still to be told.
pub(crate) struct Aside {
    path: TreePath,
    copy: TreePath,
    stat: Stat,
    loser: Version,
    chunks: Vec<ChunkRow>,
    take: Disk,
    winner: Winner,
}

impl Aside {
    /// The same, with what is at the path now.
    pub(crate) fn with(self, winner: Winner) -> Self {
        Self { winner, ..self }
    }
}

/// Gives back the names of copies that are not told: the next look at them does.
pub(crate) fn give_up(folder: &Arc<Folder>, asides: &[Aside]) {
    folder.release(asides.iter().map(|aside| &aside.copy));
    asides.iter().for_each(|aside| folder.look_again(&aside.copy));
}

/// Renames what lost; both paths stay claimed until [`tell`] is through.
pub(crate) fn set_aside(
    folder: &Arc<Folder>,
    applier: &Applier,
    handle: &Handle,
    path: &TreePath,
    loser: Loser,
    take: &Disk,
    expected: Expected,
) -> Result<Aside, ApplyError> {
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
            Ok(Aside { path, copy, stat, loser, chunks, take, winner: Winner::Next })
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

/// Tells what was set aside, some at a time.
pub(crate) async fn tell(folder: &Arc<Folder>, asides: Vec<Aside>) -> Result<(), StoreError> {
    let mut asides = asides.into_iter().peekable();
    while asides.peek().is_some() {
        tell_some(folder, asides.by_ref().take(AT_ONCE).collect()).await?;
    }
    Ok(())
}

/// Appends the records that settle conflicts, and takes them into the index with what lies on disk.
///
/// What was renamed is durable already. What won is told only while it still wins: of what was superseded meanwhile only
/// the index learns that it lies here.
async fn tell_some(folder: &Arc<Folder>, asides: Vec<Aside>) -> Result<(), StoreError> {
    let (fid, way) = (folder.fid, folder.direction);
    let asides = Arc::new(asides);
    let bytes = asides.len() * RECORDS_BYTES;
    let build = {
        let (asides, stream) = (asides.clone(), folder_stream(&folder.id));
        move |reader: &Reader<'_>| {
            let mut told = Vec::new();
            for aside in asides.iter() {
                let versions = rows::versions(reader.file(fid, &aside.copy.key())?.as_ref())?;
                let basis = basis(&versions, None);
                let [copy, winner] = settle(aside.path.clone(), &aside.take, aside.copy.clone(), basis, &aside.loser);
                let versions = rows::versions(reader.file(fid, &aside.path.key())?.as_ref())?;
                let wins = !matches!(aside.winner, Winner::Lost)
                    && versions.winner().is_some_and(|now| now.node.is_same(&aside.take.node));
                told.push((copy, wins.then_some(winner)));
            }
            let records = told.iter().flat_map(|(copy, winner)| [Some(copy), winner.as_ref()]).flatten().cloned();
            let body = RecordBatch { records: records.collect() }.encode();
            Ok((Some(Content::Sealed { kind: KIND_RECORDS, stream: stream.clone(), body }), told))
        }
    };
    let work = {
        let asides = asides.clone();
        move |txn: &mut Txn<'_>, appended: Option<&Appended>, told: Vec<(Record, Option<Record>)>| {
            let Some(appended) = appended else { return Ok(None) };
            let mut index = 0u16;
            let mut version_of = |record: &Record| {
                let version = Version::new(record, Dot::new(appended.author, appended.number, index));
                index += 1;
                version
            };
            for (aside, (copy, winner)) in asides.iter().zip(&told) {
                let version = version_of(copy);
                let state = rows::disk_state(&aside.stat, &copy.node, &version.vector);
                put(txn, (fid, way), &aside.copy, Some(version), Some(state), &aside.chunks)?;
                let version = winner.as_ref().map(&mut version_of);
                let vector = version.as_ref().map_or(&aside.take.vector, |version| &version.vector);
                let (state, chunks) = match &aside.winner {
                    Winner::Here(stat, chunks) => (Some(rows::disk_state(stat, &aside.take.node, vector)), &chunks[..]),
                    Winner::Next | Winner::Lost => (None, &[][..]),
                };
                put(txn, (fid, way), &aside.path, version, state, chunks)?;
            }
            Ok(Some(appended.hash))
        }
    };
    let told = folder.group.append_built(bytes, build, work).await;
    folder.release(asides.iter().map(|aside| &aside.copy));
    if let Some(hash) = told? {
        folder.remember_own(hash);
    }
    for aside in asides.iter() {
        folder.add_conflict(&aside.copy);
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
