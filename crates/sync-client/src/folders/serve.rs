//! Answers for chunks: reads them from the files they lie in.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use sync_folder::cut::read_chunk;
use sync_folder::versions::Versions as Kept;
use sync_store::{ChunkPlace, FolderRowId, KeptRow, Reader, StoreError};
use sync_types::bounds::MAX_KEPT;
use sync_types::folder::{FileContent, KeptFile, TreePath};
use sync_types::{FolderId, GroupId};

use super::rows::{self, LIST_OFFSET};
use super::snapshots::unpack;
use crate::chunks::ChunkSource;
use crate::device::Inner;
use crate::group::Group;

/// Places looked at for one chunk: where one file changed, another may still hold it.
const PLACES: usize = 8;

/// The folders of a group, for peers that ask for chunks.
pub(crate) struct Source {
    device: Weak<Inner>,
    group: Weak<Group>,
}

impl Source {
    pub(crate) fn new(device: &Arc<Inner>, group: &Arc<Group>) -> Self {
        Self { device: Arc::downgrade(device), group: Arc::downgrade(group) }
    }

    fn find(&self, group: &GroupId, hashes: &[[u8; 32]], enough: usize) -> Option<Vec<Option<Vec<u8>>>> {
        let (device, this) = (self.device.upgrade()?, self.group.upgrade()?);
        let look = this.store().read_here(|reader| {
            let mut found = Vec::new();
            let mut bytes = 0;
            for hash in hashes {
                let one = locate(reader, group, hash)?;
                bytes += one.len();
                found.push(one);
                if bytes >= enough as u64 {
                    break;
                }
            }
            Ok(found)
        });
        let folders = device.folders.all();
        let read = |(found, hash): (Located, &[u8; 32])| match found {
            Located::Piece(piece) => Some(piece),
            Located::Places(places) => places.iter().find_map(|place| {
                let folder = folders.iter().find(|folder| folder.fid == place.fid)?;
                let (root, path) = (folder.root()?, TreePath::from_key(&place.key)?);
                let bytes = read_chunk(&root, &path, place.offset, place.len, hash).ok()??;
                folder.counters.served.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Some(bytes)
            }),
            Located::Kept(places) => places.iter().find_map(|(fid, kept, offset, len)| {
                let folder = folders.iter().find(|folder| folder.fid == *fid)?;
                let bytes = Kept::new(folder.root()?).read_chunk(&kept.name, *offset, *len, hash).ok()??;
                folder.counters.served.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Some(bytes)
            }),
        };
        Some(look.ok()?.into_iter().zip(hashes).map(read).collect())
    }
}

/// Where a chunk is to be had.
enum Located {
    /// It is a piece of a list, which is not in the file, but follows from what is; or of a snapshot, which is in none.
    Piece(Vec<u8>),
    /// In one of these, if any.
    Places(Vec<ChunkPlace>),
    /// In one of these versions that are kept: with its folder, where it begins and its length.
    Kept(Vec<(FolderRowId, KeptRow, u64, u64)>),
}

impl Located {
    /// Bytes, as far as the index knows.
    fn len(&self) -> u64 {
        match self {
            Self::Piece(piece) => piece.len() as u64,
            Self::Places(places) => places.first().map_or(0, |place| place.len),
            Self::Kept(places) => places.first().map_or(0, |(.., len)| *len),
        }
    }
}

fn locate(reader: &Reader<'_>, group: &GroupId, hash: &[u8; 32]) -> Result<Located, StoreError> {
    let mut places = reader.chunk_places(group, hash, PLACES)?;
    for place in places.iter().filter(|place| place.offset >= LIST_OFFSET) {
        if let Some(row) = reader.file(place.fid, &place.key)? {
            let size = row.disk.map_or(row.size, |disk| disk.size);
            let piece = rows::list_piece(&reader.chunk_list(row.file)?, size, place.offset, place.len);
            if let Some(piece) = piece.filter(|piece| blake3::hash(piece) == *hash) {
                return Ok(Located::Piece(piece));
            }
        }
    }
    places.retain(|place| place.offset < LIST_OFFSET);
    if !places.is_empty() {
        return Ok(Located::Places(places));
    }
    let mut kept = reader.kept_places(group, hash, PLACES)?;
    for (_, row, offset, len) in kept.iter().filter(|(.., offset, _)| *offset >= LIST_OFFSET) {
        let piece = rows::list_piece(&reader.kept_chunks(row.kid)?, row.size, *offset, *len);
        if let Some(piece) = piece.filter(|piece| blake3::hash(piece) == *hash) {
            return Ok(Located::Piece(piece));
        }
    }
    kept.retain(|(.., offset, _)| *offset < LIST_OFFSET);
    if kept.is_empty()
        && let Some(piece) = reader.group_snapshot_chunk(group, hash)?.and_then(|packed| unpack(packed, hash))
    {
        return Ok(Located::Piece(piece));
    }
    Ok(Located::Kept(kept))
}

impl ChunkSource for Source {
    fn read(&self, group: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>> {
        self.find(group, &[*hash], 0)?.pop()?
    }

    fn read_some(&self, group: &GroupId, hashes: &[[u8; 32]], enough: usize) -> Vec<Option<Vec<u8>>> {
        self.find(group, hashes, enough).unwrap_or_else(|| vec![None; hashes.len()])
    }

    fn kept(&self, group: &GroupId, folder: &FolderId, path: &TreePath) -> Vec<KeptFile> {
        let Some(this) = self.group.upgrade() else { return Vec::new() };
        let look = this.store().read_here(|reader| {
            let Some(row) = reader.folder(group, folder)? else { return Ok(Vec::new()) };
            let mut files = Vec::new();
            for kept in reader.kept(row.fid, &path.key())?.into_iter().take(MAX_KEPT) {
                let Some(hash) = kept.hash else { continue };
                let chunks = rows::chunks_of(kept.size, &reader.kept_chunks(kept.kid)?);
                let content = FileContent { size: kept.size, hash, chunks };
                files.push(KeptFile { at: kept.at.0, content, mode: kept.mode & 0o777, mtime: kept.mtime });
            }
            Ok(files)
        });
        look.unwrap_or_default()
    }
}
