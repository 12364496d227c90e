//! Writing a snapshot: one state of the index, cut into pieces as it is read, and the entry that names them.

use std::sync::Arc;

use sync_core::folder::Coverage;
use sync_core::folder::snapshot::is_forgotten;
use sync_store::{Appended, Reader, SnapshotRowId, StoreError, Txn};
use sync_types::bounds::{MAX_BATCH_AUTHORS, MAX_INLINE_CHUNKS, MAX_SNAPSHOT, MAX_SNAPSHOT_ITEM, MAX_SNAPSHOT_RANGES};
use sync_types::folder::{ChunkRef, Chunks, FileContent, KIND_SNAPSHOT, TreePath, encode_chunks, folder_stream};
use sync_types::snapshot::{Item, Snapshot};
use sync_types::{AuthorId, EnvelopeHash, Number, Range};
use tokio::runtime::Handle;

use super::super::engine::Folder;
use super::super::rows;
use super::content::pack;
use super::{blocking, complete, coverage};

/// Rows read at once.
const PAGE: usize = 4096;
/// Bytes of items between two looks for cuts: more than the longest piece has.
const BUFFER: usize = 6 << 20;
/// As many entries as no log has count as taken in where a snapshot is called for.
const CALLED_FOR: u64 = 1 << 61;
/// Bytes of the pieces that a long list of pieces is cut into.
const LIST_PIECE: usize = 1 << 20;

/// Writes a snapshot of what was taken in, and tells of it; false if that cannot be done yet.
pub(super) async fn write(folder: &Arc<Folder>) -> Result<bool, StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let looking = folder.clone();
    if folder.store().read(move |reader| covered(reader, &looking)).await?.is_none() {
        return Ok(false);
    }
    let sid = folder.store().write(0, move |txn| txn.add_snapshot(fid, &group, None, &[])).await?;
    let writing = folder.clone();
    let written = blocking(move || read_index(&writing, sid)).await;
    let snapshot = match written {
        Ok(Some(snapshot)) => snapshot,
        Ok(None) => {
            folder.store().write(0, move |txn| txn.remove_snapshot(sid)).await?;
            return Ok(false);
        }
        Err(error) => {
            folder.store().write(0, move |txn| txn.remove_snapshot(sid)).await?;
            return Err(error);
        }
    };
    let body = snapshot.encode();
    let bytes = body.len();
    let content =
        sync_store::Content::Sealed { kind: KIND_SNAPSHOT, stream: folder_stream(&folder.id), body: body.clone() };
    let build = move |_: &Reader<'_>| Ok((Some(content.clone()), ()));
    let work = move |txn: &mut Txn<'_>, appended: Option<&Appended>, ()| {
        let Some(appended) = appended else { return Ok(None) };
        txn.set_snapshot_entry(sid, &group, (appended.author, appended.number), &body)?;
        complete(txn, fid, sid, &group, &snapshot.covered, true)?;
        Ok(Some(appended.hash))
    };
    if let Some(hash) = folder.group.append_built(bytes, build, work).await? {
        folder.remember_own(hash);
    }
    folder.changed();
    Ok(true)
}

/// What a snapshot of the present state would cover: of each author the last entry before the first that lacks.
fn covered(reader: &Reader<'_>, folder: &Folder) -> Result<Option<Vec<(AuthorId, Number)>>, StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let row = reader.folders()?.into_iter().find(|row| row.fid == fid);
    if row.is_none_or(|row| row.cursor < reader.max_cursor(&group).unwrap_or_default()) {
        return Ok(None);
    }
    let mut covered = Vec::new();
    for author in reader.taken_authors(fid)? {
        let whole = reader.whole_until(&group, &author)?;
        let Some(last) = reader.last_taken(fid, &group, &author, whole)? else { continue };
        // the hash at the end is said, and is not known of a feed that forked amid what was dropped
        if !reader.hashes_at(&group, &author, last)?.is_empty() {
            covered.push((author, last));
        }
    }
    // one that covers less than the last would be of use to nobody
    let before = coverage(reader.covered(fid)?);
    let now = coverage(covered.iter().copied());
    let more = now.covers(&before) && !before.covers(&now) && covered.len() <= MAX_BATCH_AUTHORS;
    // behind a hole entries pile up that none can cover: a snapshot for each that comes beside them would be too many
    let gain: u64 = covered.iter().map(|(author, number)| number.0.saturating_sub(before.until(author).0)).sum();
    let since = reader.since_snapshot(fid)?;
    let records = folder.snapshots.weight_of_records(since, reader.folder_totals(fid)?.files);
    let worth = gain >= folder.snapshots.after / 2 || records > 0 || since.entries >= CALLED_FOR;
    Ok((more && worth).then_some(covered))
}

/// Reads one state of the index into pieces.
fn read_index(folder: &Folder, sid: SnapshotRowId) -> Result<Option<Snapshot>, StoreError> {
    folder.store().read_here(|reader| {
        let Some(covered) = covered(reader, folder)? else { return Ok(None) };
        let mut pieces = Pieces::new(folder, sid);
        for (author, last) in &covered {
            let mut after = Number(0);
            loop {
                let runs = reader.taken_runs(folder.fid, &folder.group.id, author, after, MAX_SNAPSHOT_RANGES)?;
                let Some(end) = runs.last().map(|run| run.last) else { break };
                let mut ranges = Vec::new();
                for run in runs.into_iter().filter(|run| run.first <= *last) {
                    let range = Range { first: run.first, last: run.last.min(*last) };
                    ranges.push((range, head(reader, folder, author, range.last)?));
                }
                if !ranges.is_empty() {
                    pieces.item(&Item::Covered { author: *author, ranges })?;
                }
                after = end;
                if after >= *last {
                    break;
                }
            }
        }
        let coverage = coverage(covered.iter().copied());
        let Some(rows) = read_rows(reader, folder, &coverage, &mut pieces)? else {
            return Ok(None);
        };
        pieces.item(&Item::End { rows })?;
        Ok(pieces.finish()?.map(|content| Snapshot { covered, content }))
    })
}

fn head(reader: &Reader<'_>, folder: &Folder, author: &AuthorId, number: Number) -> Result<EnvelopeHash, StoreError> {
    let hashes = reader.hashes_at(&folder.group.id, author, number)?;
    hashes.into_iter().min().ok_or_else(|| StoreError::Corrupt("the end of a range without its hash".into()))
}

/// Reads all rows that a snapshot needs; none if the folder was stopped meanwhile.
fn read_rows(
    reader: &Reader<'_>,
    folder: &Folder,
    covered: &Coverage,
    pieces: &mut Pieces<'_>,
) -> Result<Option<u64>, StoreError> {
    let mut count = 0;
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = reader.files_after(folder.fid, after.as_deref(), PAGE)?;
        after = page.last().map(|row| row.key.clone());
        let is_end = page.len() < PAGE;
        for row in page {
            let versions = rows::versions(Some(&row))?;
            // what lies here and was never told is no part of it
            if versions.winner().is_none() || is_forgotten(&versions, covered) {
                continue;
            }
            let Some(path) = TreePath::from_key(&row.key) else { continue };
            pieces.item(&Item::Row { path, versions: versions.encode() })?;
            count += 1;
        }
        if folder.cancel.is_cancelled() {
            return Ok(None);
        }
        if is_end {
            return Ok(Some(count));
        }
    }
}

/// Cuts a content as it grows, and keeps its pieces in the database.
struct Pieces<'f> {
    folder: &'f Folder,
    sid: SnapshotRowId,
    handle: Handle,
    buffer: Vec<u8>,
    hasher: blake3::Hasher,
    size: u64,
    refs: Vec<ChunkRef>,
    /// An item is longer than one may be.
    too_long: bool,
}

impl<'f> Pieces<'f> {
    fn new(folder: &'f Folder, sid: SnapshotRowId) -> Self {
        Self {
            folder,
            sid,
            handle: Handle::current(),
            buffer: Vec::new(),
            hasher: blake3::Hasher::new(),
            size: 0,
            refs: Vec::new(),
            too_long: false,
        }
    }

    fn item(&mut self, item: &Item) -> Result<(), StoreError> {
        let before = self.buffer.len();
        item.append(&mut self.buffer);
        self.too_long |= self.buffer.len() - before > MAX_SNAPSHOT_ITEM;
        if self.buffer.len() >= BUFFER { self.cut(false) } else { Ok(()) }
    }

    /// Keeps the pieces that do not depend on what follows.
    fn cut(&mut self, is_end: bool) -> Result<(), StoreError> {
        let cuts = self.folder.cutter.cuts(&self.buffer, is_end);
        let mut at = 0;
        for len in cuts {
            let piece = &self.buffer[at..at + len];
            at += len;
            self.hasher.update(piece);
            self.size += len as u64;
            let piece = self.keep(piece)?;
            self.refs.push(piece);
        }
        self.buffer.drain(..at);
        Ok(())
    }

    fn keep(&self, piece: &[u8]) -> Result<ChunkRef, StoreError> {
        let (fid, sid, hash) = (self.folder.fid, self.sid, *blake3::hash(piece).as_bytes());
        let chunk = pack(piece);
        let work = move |txn: &mut Txn<'_>| match txn.claim_snapshot_chunk(fid, sid, &hash)? {
            true => Ok(()),
            false => txn.put_snapshot_chunk(fid, sid, &hash, &chunk),
        };
        self.handle.block_on(self.folder.store().write(piece.len(), work))?;
        Ok(ChunkRef { hash: Some(hash), len: piece.len() as u64 })
    }

    /// The whole content; none if it is longer than one may be.
    fn finish(mut self) -> Result<Option<FileContent>, StoreError> {
        self.cut(true)?;
        let hash = *self.hasher.finalize().as_bytes();
        if self.too_long || self.size > MAX_SNAPSHOT {
            return Ok(None);
        }
        let chunks = match self.refs.len() {
            0 | 1 => Chunks::Whole,
            2..=MAX_INLINE_CHUNKS => Chunks::Inline(self.refs),
            _ => {
                let list = encode_chunks(&self.refs);
                Chunks::Listed(list.chunks(LIST_PIECE).map(|piece| self.keep(piece)).collect::<Result<_, _>>()?)
            }
        };
        Ok(Some(FileContent { size: self.size, hash, chunks }))
    }
}
