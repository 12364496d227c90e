//! Takes a mass change back that is held back here: what lies on this disk is told as what follows it.

use std::sync::Arc;

use sync_core::folder::{Version, basis};
use sync_store::{Appended, Content, FileRow, Reader, StoreError, Txn};
use sync_types::bounds::{MAX_INLINE_CHUNKS, RECORDS_BYTES_TARGET};
use sync_types::folder::{
    ChunkRef, Chunks, Dot, FileContent, KIND_RECORDS, Node, Record, RecordBatch, TreePath, encode_chunks, folder_stream,
};

use super::engine::Folder;
use super::index::{differs, extent};
use super::rows::{self, ChunkRow, LIST_OFFSET};

/// Paths told in one entry, of about a hundred bytes each.
const PAGE: usize = RECORDS_BYTES_TARGET / 128;
/// Bytes of the pieces that a long list of chunks is cut into.
const LIST_PIECE: usize = 1 << 20;

/// Tells what lies here wherever others have something else; how many paths that are.
pub(crate) async fn run(folder: &Arc<Folder>) -> Result<u64, StoreError> {
    let mut told = 0;
    let mut after: Option<Vec<u8>> = None;
    loop {
        let (fid, from) = (folder.fid, after.clone());
        let page = folder.store().read(move |reader| reader.pending_after(fid, from.as_deref(), PAGE)).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.key.clone());
        let keys: Vec<Vec<u8>> = page.into_iter().filter(|row| row.disk.is_some()).map(|row| row.key).collect();
        if !keys.is_empty() {
            told += tell(folder, keys).await?;
        }
    }
    folder.hold(None);
    folder.wake();
    Ok(told)
}

async fn tell(folder: &Arc<Folder>, keys: Vec<Vec<u8>>) -> Result<u64, StoreError> {
    let (place, stream) = (folder.place(), folder_stream(&folder.id));
    let fid = place.fid;
    let build = move |reader: &Reader<'_>| {
        let mut records = Vec::new();
        for key in &keys {
            let Some(row) = reader.file(fid, key)? else { continue };
            records.extend(record(&row, &reader.chunk_list(row.file)?)?);
        }
        let batch = RecordBatch { records };
        let content = (!batch.records.is_empty()).then(|| Content::Sealed {
            kind: KIND_RECORDS,
            stream: stream.clone(),
            body: batch.encode(),
        });
        Ok((content, batch.records))
    };
    let work = move |txn: &mut Txn<'_>, appended: Option<&Appended>, records: Vec<Record>| {
        let Some(appended) = appended else { return Ok((None, 0)) };
        let count = records.len() as u64;
        for (index, record) in (0..=u16::MAX).zip(records) {
            let key = record.path.key();
            let Some(row) = txn.reader().file(fid, &key)? else { continue };
            let mut versions = rows::versions(Some(&row))?;
            let version = Version::new(&record, Dot::new(appended.author, appended.number, index));
            let vector = rows::encode_vector(&version.vector);
            versions.insert(version);
            let disk = row.disk.map(|disk| sync_store::DiskState { vector, ..disk });
            let pending = differs(&txn.reader(), &place, &key, &versions, disk.as_ref())?;
            let (live, size) = extent(&versions);
            txn.put_versions(fid, &key, &versions.encode(), live, size, pending)?;
            txn.set_disk(row.file, disk.as_ref(), pending)?;
        }
        Ok((Some(appended.hash), count))
    };
    let (hash, count) = folder.group.append_built(RECORDS_BYTES_TARGET, build, work).await?;
    if let Some(hash) = hash {
        folder.remember_own(hash);
    }
    Ok(count)
}

/// What lies at a path, as what follows everything that was said of it.
fn record(row: &FileRow, chunks: &[ChunkRow]) -> Result<Option<Record>, StoreError> {
    let versions = rows::versions(Some(row))?;
    let (Some(disk), Some(path)) = (&row.disk, TreePath::from_key(&row.key)) else { return Ok(None) };
    let node = match rows::disk_node(disk, &versions) {
        Node::File(file) => Node::File(content(file, chunks)),
        Node::Symlink(target) if target.is_empty() => return Ok(None),
        node => node,
    };
    let mut seen = versions.vector();
    seen.join(&basis(&versions, Some(&rows::disk(disk, &versions))));
    let mtime = if disk.mtime == i64::MIN { 0 } else { disk.mtime };
    Ok(Some(Record { path, node, mode: disk.mode, mtime, basis: seen }))
}

/// A file's content with its chunks, made again from where they lie.
fn content(file: FileContent, chunks: &[ChunkRow]) -> FileContent {
    let mut placed: Vec<&ChunkRow> = chunks.iter().filter(|row| row.1 < LIST_OFFSET).collect();
    placed.sort_unstable_by_key(|row| row.1);
    let whole = |row: &&&ChunkRow| row.0 == file.hash && row.2 == file.size;
    if file.size == 0 || placed.first().filter(whole).is_some() {
        return FileContent { chunks: Chunks::Whole, ..file };
    }
    let (mut list, mut end) = (Vec::new(), 0);
    for (hash, offset, len) in placed {
        if *offset > end {
            list.push(ChunkRef { hash: None, len: offset - end });
        }
        list.push(ChunkRef { hash: Some(*hash), len: *len });
        end = offset + len;
    }
    if file.size > end {
        list.push(ChunkRef { hash: None, len: file.size - end });
    }
    if list.len() <= MAX_INLINE_CHUNKS {
        return FileContent { chunks: Chunks::Inline(list), ..file };
    }
    let piece = |bytes: &[u8]| ChunkRef { hash: Some(*blake3::hash(bytes).as_bytes()), len: bytes.len() as u64 };
    let pieces = encode_chunks(&list).chunks(LIST_PIECE).map(piece).collect();
    FileContent { chunks: Chunks::Listed(pieces), ..file }
}
