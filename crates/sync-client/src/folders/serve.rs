//! Answers for chunks: reads them from the files they lie in.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use sync_folder::cut::read_chunk;
use sync_types::GroupId;
use sync_types::folder::TreePath;

use super::rows::{self, LIST_OFFSET};
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

    fn find(&self, group: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>> {
        let (device, this) = (self.device.upgrade()?, self.group.upgrade()?);
        let (group, hash) = (*group, *hash);
        let look = this.store().read_here(|reader| {
            let places = reader.chunk_places(&group, &hash, PLACES)?;
            // a piece of a list is not in the file, but follows from what is
            for place in places.iter().filter(|place| place.offset >= LIST_OFFSET) {
                if let Some(row) = reader.file(place.fid, &place.key)? {
                    let size = row.disk.map_or(0, |disk| disk.size);
                    let piece = rows::list_piece(&reader.chunk_list(row.file)?, size, place.offset, place.len);
                    if let Some(piece) = piece.filter(|piece| *blake3::hash(piece).as_bytes() == hash) {
                        return Ok((Vec::new(), Some(piece)));
                    }
                }
            }
            Ok((places, None))
        });
        let (places, piece) = look.ok()?;
        if piece.is_some() {
            return piece;
        }
        let folders = device.folders.all();
        for place in places.iter().filter(|place| place.offset < LIST_OFFSET) {
            let Some(folder) = folders.iter().find(|folder| folder.fid == place.fid) else { continue };
            let (Some(root), Some(path)) = (folder.root(), TreePath::from_key(&place.key)) else { continue };
            if let Ok(Some(bytes)) = read_chunk(&root, &path, place.offset, place.len, &hash) {
                folder.counters.served.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                return Some(bytes);
            }
        }
        None
    }
}

impl ChunkSource for Source {
    fn read(&self, group: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>> {
        self.find(group, hash)
    }
}
