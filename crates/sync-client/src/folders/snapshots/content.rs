//! A snapshot's content: its pieces in the database, fetched where they lack, and what they say.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sync_core::folder::Versions;
use sync_folder::root::free_space;
use sync_store::{Reader, SnapshotChunk, SnapshotRowId, StoreError};
use sync_types::bounds::{MAX_CHUNK, MAX_SNAPSHOT};
use sync_types::folder::{
    ChunkRef, Chunks, FileContent, KIND_RECORDS, KIND_SNAPSHOT, TreePath, decode_chunks, folder_stream, total,
};
use sync_types::snapshot::{Item, Items, Snapshot};
use sync_types::{AuthorId, Class, Envelope, EnvelopeHash, Number, Range};
use tokio::runtime::Handle;

use super::super::engine::Folder;
use crate::chunks::{ChunkFetcher, Want};

/// Pieces of a content at most: as if all were a quarter of the shortest that is cut.
const MAX_PIECES: u64 = MAX_SNAPSHOT / (64 << 10);
/// Entries opened at once to see whose they are.
const OPENED: usize = 64;
/// What of a disk stays free, as where files are applied: one part in so many.
const RESERVE: u64 = 100;
/// Pieces claimed in one commit.
const CLAIMED: usize = 1024;

/// The pieces of a content that is here, in order.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) pieces: Vec<[u8; 32]>,
}

/// What comes of fetching a content.
pub(super) enum Fetch {
    Here(Content),
    /// Nobody has it who is connected.
    Lacks,
    /// The disk has no room for it.
    NoRoom,
    Wrong(String),
}

/// A piece as the database keeps it.
pub(super) fn pack(piece: &[u8]) -> SnapshotChunk {
    let len = u32::try_from(piece.len()).expect("BUG: a piece has four megabytes at most");
    let compressed = lz4_flex::block::compress(piece);
    match compressed.len() < piece.len() {
        true => SnapshotChunk { codec: 1, len, bytes: compressed },
        false => SnapshotChunk { codec: 0, len, bytes: piece.to_vec() },
    }
}

/// The piece itself; none where it is not what its hash says.
pub(crate) fn unpack(chunk: SnapshotChunk, hash: &[u8; 32]) -> Option<Vec<u8>> {
    let len = usize::try_from(chunk.len).ok().filter(|_| u64::from(chunk.len) <= MAX_CHUNK)?;
    let piece = match chunk.codec {
        0 => chunk.bytes,
        _ => lz4_flex::block::decompress(&chunk.bytes, len).ok()?,
    };
    (blake3::hash(&piece) == *hash).then_some(piece)
}

/// Gets all of a content's pieces into the database.
pub(super) async fn fetch(
    folder: &Arc<Folder>,
    sid: SnapshotRowId,
    content: &FileContent,
) -> Result<Fetch, StoreError> {
    let wrong = || Ok(Fetch::Wrong("a snapshot names no content".to_owned()));
    let refs = match &content.chunks {
        Chunks::Whole => vec![ChunkRef { hash: Some(content.hash), len: content.size }],
        Chunks::Inline(refs) => refs.clone(),
        Chunks::Listed(list) => {
            if list.iter().any(|piece| piece.hash.is_none()) || total(list).is_none_or(|len| len > MAX_PIECES * 40) {
                return wrong();
            }
            match fetch_pieces(folder, sid, list).await? {
                Pieces::Here => {}
                Pieces::Lack => return Ok(Fetch::Lacks),
                Pieces::NoRoom => return Ok(Fetch::NoRoom),
            }
            let (fid, hashes) = (folder.fid, hashes(list));
            let list = folder.store().read(move |reader| {
                let mut list = Vec::new();
                for hash in &hashes {
                    list.extend(piece(reader, fid, hash)?);
                }
                Ok(list)
            });
            match decode_chunks(&list.await?) {
                Ok(refs) => refs,
                Err(_) => return wrong(),
            }
        }
    };
    let count = refs.len() as u64;
    if count > MAX_PIECES || total(&refs) != Some(content.size) || refs.iter().any(|piece| piece.hash.is_none()) {
        return wrong();
    }
    Ok(match fetch_pieces(folder, sid, &refs).await? {
        Pieces::Here => Fetch::Here(Content { pieces: hashes(&refs) }),
        Pieces::Lack => Fetch::Lacks,
        Pieces::NoRoom => Fetch::NoRoom,
    })
}

/// Removes the pieces of a content that are not what their hashes say; how many those were.
pub(super) fn remove_damaged(folder: &Folder, snapshot: &Snapshot) -> Result<usize, StoreError> {
    let fid = folder.fid;
    let sound = |reader: &Reader<'_>, hash: &[u8; 32]| piece(reader, fid, hash).is_ok();
    let damaged = folder.store().read_here(|reader| {
        let mut pieces = match &snapshot.content.chunks {
            Chunks::Whole => vec![snapshot.content.hash],
            Chunks::Inline(refs) | Chunks::Listed(refs) => hashes(refs),
        };
        if let Chunks::Listed(_) = &snapshot.content.chunks {
            let list: Vec<u8> = pieces.iter().filter_map(|hash| piece(reader, fid, hash).ok()).flatten().collect();
            pieces.extend(decode_chunks(&list).iter().flat_map(|refs| hashes(refs)));
        }
        let mut damaged = Vec::new();
        for hash in pieces {
            // one that is not here is fetched as it is
            if reader.snapshot_chunk(fid, &hash)?.is_some() && !sound(reader, &hash) {
                damaged.push(hash);
            }
        }
        Ok(damaged)
    })?;
    let count = damaged.len();
    let work =
        move |txn: &mut sync_store::Txn<'_>| damaged.iter().try_for_each(|hash| txn.remove_snapshot_chunk(fid, hash));
    Handle::current().block_on(folder.store().write(0, work))?;
    Ok(count)
}

fn hashes(refs: &[ChunkRef]) -> Vec<[u8; 32]> {
    refs.iter().filter_map(|piece| piece.hash).collect()
}

/// What comes of fetching pieces.
enum Pieces {
    Here,
    /// Some lack still.
    Lack,
    NoRoom,
}

/// Gets pieces into the database.
async fn fetch_pieces(folder: &Arc<Folder>, sid: SnapshotRowId, refs: &[ChunkRef]) -> Result<Pieces, StoreError> {
    let fid = folder.fid;
    let (mut wants, mut named) = (Vec::new(), HashSet::new());
    for some in refs.chunks(CLAIMED) {
        let new = some.iter().filter_map(|piece| Some(Want { hash: piece.hash?, len: u32::try_from(piece.len).ok()? }));
        let new: Vec<Want> = new.filter(|want| named.insert(want.hash)).collect();
        let claim = move |txn: &mut sync_store::Txn<'_>| {
            let mut lacking = Vec::new();
            for want in new {
                if !txn.claim_snapshot_chunk(fid, sid, &want.hash)? {
                    lacking.push(want);
                }
            }
            Ok(lacking)
        };
        wants.extend(folder.store().write(0, claim).await?);
    }
    if wants.is_empty() {
        return Ok(Pieces::Here);
    }
    let need = wants.iter().map(|want| u64::from(want.len)).sum::<u64>();
    let home = folder.home.clone();
    let space = tokio::task::spawn_blocking(move || free_space(&home)).await.unwrap_or_default();
    if space.is_some_and(|(free, total)| free < need.saturating_add(total / RESERVE)) {
        return Ok(Pieces::NoRoom);
    }
    let (queue, mut fetched) = ChunkFetcher::new(folder.group.clone());
    let mut open = wants.len();
    let asking = async move {
        for want in wants {
            if !queue.push(want).await {
                return;
            }
        }
        // dropping the queue ends the fetcher once all is answered
    };
    let taking = async {
        let mut complete = true;
        while open > 0 {
            let Some(answer) = fetched.recv().await else { return Ok(Pieces::Lack) };
            open -= 1;
            let Some(bytes) = answer.bytes else {
                complete = false;
                continue;
            };
            folder.snapshots.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let hash = answer.hash;
            let chunk = pack(&bytes);
            let len = chunk.bytes.len();
            folder.store().write(len, move |txn| txn.put_snapshot_chunk(fid, sid, &hash, &chunk)).await?;
        }
        Ok::<Pieces, StoreError>(if complete { Pieces::Here } else { Pieces::Lack })
    };
    tokio::select! {
        ((), complete) = async { tokio::join!(asking, taking) } => complete,
        () = folder.cancel.cancelled() => Ok(Pieces::Lack),
    }
}

/// A piece that is in the database.
fn piece(reader: &Reader<'_>, fid: sync_store::FolderRowId, hash: &[u8; 32]) -> Result<Vec<u8>, StoreError> {
    let chunk = reader.snapshot_chunk(fid, hash)?;
    chunk.and_then(|chunk| unpack(chunk, hash)).ok_or_else(|| StoreError::Corrupt("a snapshot's piece".into()))
}

/// Reads a content's items, a piece at a time.
pub(super) struct Stream<'c> {
    fid: sync_store::FolderRowId,
    pieces: std::slice::Iter<'c, [u8; 32]>,
    items: Items,
    hasher: Option<blake3::Hasher>,
}

/// Why a content is not what it claims to be.
pub(super) enum Broken {
    Content(String),
    Store(StoreError),
}

impl From<StoreError> for Broken {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl<'c> Stream<'c> {
    pub(super) fn new(folder: &Folder, content: &'c Content) -> Self {
        Self { fid: folder.fid, pieces: content.pieces.iter(), items: Items::default(), hasher: None }
    }

    /// The next item.
    pub(super) fn next(&mut self, reader: &Reader<'_>) -> Result<Option<Item>, Broken> {
        loop {
            if let Some(item) = self.items.next() {
                return item.map(Some).map_err(|error| Broken::Content(format!("a snapshot cannot be read: {error}")));
            }
            let Some(hash) = self.pieces.next() else { return Ok(None) };
            let piece = piece(reader, self.fid, hash)?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&piece);
            }
            self.items.push(&piece);
        }
    }
}

/// What comes of looking through a content.
pub(super) enum Looked {
    /// It is in order; `lacks`: not all that it covers was taken in here; `unknown`: it has versions of an author that is
    /// none of the group's here.
    Sound {
        lacks: bool,
        unknown: bool,
    },
    Wrong(String),
}

/// Reads all of a content and checks it by itself and against the log.
pub(super) fn look_through(folder: &Folder, content: &Content, snapshot: &Snapshot) -> Result<Looked, StoreError> {
    folder.store().read_here(|reader| {
        let mut stream = Stream { hasher: Some(blake3::Hasher::new()), ..Stream::new(folder, content) };
        let mut ends: Vec<(AuthorId, Number)> = Vec::new();
        let (mut lacks, mut unknown) = (false, false);
        let membership = folder.group.membership();
        loop {
            match stream.next(reader) {
                Ok(Some(Item::Covered { author, ranges })) => {
                    for (range, head) in ranges {
                        lacks |= match check_range(reader, folder, &author, range, head)? {
                            Ok(lacks) => lacks,
                            Err(reason) => return Ok(Looked::Wrong(reason)),
                        };
                        match ends.last_mut() {
                            Some((last, end)) if *last == author => *end = range.last,
                            _ => ends.push((author, range.last)),
                        }
                    }
                }
                Ok(Some(Item::Row { path, versions })) => match row(&path, &versions) {
                    Ok(versions) => unknown |= versions.dots().any(|dot| !membership.is_admitted(&dot.author)),
                    Err(reason) => return Ok(Looked::Wrong(reason)),
                },
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(Broken::Content(reason)) => return Ok(Looked::Wrong(reason)),
                Err(Broken::Store(error)) => return Err(error),
            }
        }
        let hash = stream.hasher.as_ref().map(blake3::Hasher::finalize);
        if !stream.items.is_complete() || hash.is_none_or(|hash| hash != snapshot.content.hash) {
            return Ok(Looked::Wrong("a snapshot's content is not what its entry says".to_owned()));
        }
        if ends != snapshot.covered {
            return Ok(Looked::Wrong("a snapshot does not say which entries it covers".to_owned()));
        }
        Ok(Looked::Sound { lacks, unknown })
    })
}

/// Whether some of a range of entries lacks here; the reason if it ends in another entry than the one here, or names one
/// that is not the folder's.
fn check_range(
    reader: &Reader<'_>,
    folder: &Folder,
    author: &AuthorId,
    range: Range,
    head: EnvelopeHash,
) -> Result<Result<bool, String>, StoreError> {
    let group = folder.group.id;
    let hashes = reader.hashes_at(&group, author, range.last)?;
    if !hashes.is_empty() && !hashes.contains(&head) {
        return Ok(Err(format!("a snapshot covers other entries of author {} than are here", author.short())));
    }
    let here = reader.range_here(folder.fid, &group, author, range)?;
    // one that has nothing yet may have been told wrong things of what another folder's entries are
    let elsewhere = here.elsewhere && !reader.covered(folder.fid)?.is_empty();
    let untaken = untaken(reader, folder, author, range)?;
    if elsewhere || untaken.strange {
        return Ok(Err(format!("a snapshot covers entries of author {} that are not the folder's", author.short())));
    }
    // what came after a snapshot that covers it was begun and given up is here, and was not taken in
    Ok(Ok(here.lacks || !untaken.ours.is_empty()))
}

/// Entries that are here in a range and were not taken into the folder.
#[derive(Default)]
pub(super) struct UntakenOf {
    /// Those that are the folder's.
    pub(super) ours: Vec<Number>,
    /// Some are not; no further ones were looked at.
    pub(super) strange: bool,
}

/// Opens what is here of a range and was not taken into the folder.
pub(super) fn untaken(
    reader: &Reader<'_>,
    folder: &Folder,
    author: &AuthorId,
    range: Range,
) -> Result<UntakenOf, StoreError> {
    let stream = folder_stream(&folder.id);
    let mut found = UntakenOf::default();
    let mut left = Some(range);
    while let Some(range) = left {
        let some = reader.untaken(folder.fid, &folder.group.id, author, range, OPENED)?;
        for entry in &some {
            // what cannot be read yet is nobody's
            if !entry.readable {
                continue;
            }
            let Ok(envelope) = Envelope::parse(&entry.bytes) else { continue };
            let content = match envelope.header.class {
                Class::Sealed => folder.group.keys().unseal(&envelope),
                _ => return Ok(UntakenOf { strange: true, ..found }),
            };
            match content {
                Ok(content) if content.stream != stream => return Ok(UntakenOf { strange: true, ..found }),
                Ok(content) if matches!(content.kind, KIND_RECORDS | KIND_SNAPSHOT) => found.ours.push(entry.number),
                Ok(_) => return Ok(UntakenOf { strange: true, ..found }),
                Err(_) => {}
            }
        }
        // two branches of a fork may stand at one number
        let next = some.last().filter(|_| some.len() == OPENED).and_then(|last| last.number.next());
        left = next.filter(|next| *next <= range.last).map(|first| Range { first, last: range.last });
    }
    Ok(found)
}

/// What a snapshot says of a path.
pub(super) fn row(path: &TreePath, versions: &[u8]) -> Result<Versions, String> {
    let decoded = Versions::decode(versions).ok().filter(|decoded| decoded.winner().is_some());
    let sound = decoded.filter(|decoded| decoded.encode() == versions);
    sound.ok_or_else(|| format!("a snapshot says of {path} what no record can say"))
}
