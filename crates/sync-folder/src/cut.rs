//! Cuts a file into chunks by its content, and reads a chunk again.
//!
//! Only data is read: what the file system keeps as a hole of at least the smallest chunk becomes a hole of the list.
//! One thread reads and looks for the cuts, another hashes, with a bounded number of buffers between them.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use fastcdc::v2020::{self, Normalization};
use sync_types::Chunker;
use sync_types::bounds::{MAX_CHUNK, MAX_INLINE_CHUNKS};
use sync_types::folder::{ChunkRef, Chunks, FileContent, TreePath, encode_chunks};

use crate::root::{Root, is_absent};
use crate::walk::{Kind, Stat, stat_of};

/// The only chunker there is: FastCDC v2020.
const FASTCDC_V2020: u32 = 1;
/// Bytes of the pieces that a long list of chunks is cut into.
const LIST_PIECE: usize = 1 << 20;
/// Chunks whose list, of 40 bytes each, is as many pieces as a record names: some 1.6 TiB of data.
const MAX_LISTED_CHUNKS: usize = MAX_INLINE_CHUNKS * LIST_PIECE / 40;
/// Buffers that are full and not yet hashed: one lets reading and hashing overlap, more only take memory.
const BUFFERS_AHEAD: usize = 1;
/// Bytes of a hole between two reports of progress, and two chances to stop: a fraction of a second of hashing.
const HOLE_STEP: u64 = 256 << 20;
/// What holes are hashed from: little enough to stay in a core's cache.
static ZEROS: [u8; 128 << 10] = [0; 128 << 10];

/// The time stamps of most file systems follow the kernel's tick, 100 Hz or faster.
const TICK: i64 = 20_000_000;
/// The time stamps of FAT, and of what only counts seconds.
const COARSE_TICK: i64 = 2_000_000_000;

/// Parameters that this version cannot cut with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the group cuts files in a way this version does not know; update it")]
pub struct ChunkerError;

/// Why a file was not cut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CutError {
    /// It is not what was expected, or changed while it was read; look at it again.
    #[error("the file is being changed; it is read again")]
    Changed,
    /// It is gone, or something else is in its place.
    #[error("the file is gone")]
    Missing,
    /// We may not read it.
    #[error("permission denied; allow reading the file to sync it")]
    Unreadable,
    /// Its list of chunks is longer than a record can name.
    #[error("the file is too large to sync; split it or ignore it")]
    TooLarge,
    /// The caller told it to stop.
    #[error("reading was stopped")]
    Stopped,
    /// The system failed.
    #[error("cannot read the file: {0}")]
    Io(io::Error),
}

impl From<io::Error> for CutError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // it became shorter than it was, or a program that lent it for writing has not given it back
            io::ErrorKind::UnexpectedEof | io::ErrorKind::WouldBlock => Self::Changed,
            io::ErrorKind::PermissionDenied => Self::Unreadable,
            _ if is_absent(&error) => Self::Missing,
            _ => Self::Io(error),
        }
    }
}

/// What is in a file.
#[derive(Debug)]
#[non_exhaustive]
pub struct Cut {
    /// What a record says.
    pub content: FileContent,
    /// Its pieces and where they begin; one for a file that is whole, none for one that is empty.
    pub chunks: Vec<(ChunkRef, u64)>,
    /// The list that [`Chunks::Listed`] names the pieces of.
    pub list: Option<Vec<u8>>,
    /// What the file system said before and after.
    pub stat: Stat,
    /// Whether a later change shows in its time. If not, the file was changed so shortly before it was read that another
    /// change may bear the same time: an index must not trust this time, or that change would never be seen.
    pub settled: bool,
}

/// Cuts files in the way of one group.
#[derive(Debug, Clone)]
pub struct Cutter {
    min: usize,
    average: usize,
    max: usize,
    masks: (u64, u64),
    gear: Cow<'static, [u64]>,
    gear_shifted: Cow<'static, [u64]>,
    buffer: usize,
}

impl Cutter {
    /// Cuts with a charter's parameters and a group's seed.
    pub fn new(chunker: &Chunker, seed: u64) -> Result<Self, ChunkerError> {
        let Chunker { id, min, average, max } = *chunker;
        let size = |value: u32, least: usize, most: usize| match usize::try_from(value) {
            Ok(size) if size.is_multiple_of(2) && (least..=most).contains(&size) => Ok(size),
            _ => Err(ChunkerError),
        };
        if id != FASTCDC_V2020 || min > average || average > max || u64::from(max) > MAX_CHUNK {
            return Err(ChunkerError);
        }
        let average = size(average, v2020::AVERAGE_MIN, v2020::AVERAGE_MAX)?;
        let max = size(max, v2020::MAXIMUM_MIN, v2020::MAXIMUM_MAX)?;
        let (gear, gear_shifted) = v2020::get_gear_with_seed(seed);
        Ok(Self {
            min: size(min, v2020::MINIMUM_MIN, v2020::MINIMUM_MAX)?,
            average,
            max,
            masks: v2020::select_masks(average, Normalization::Level1),
            gear,
            gear_shifted,
            // room for the longest chunk and some to read behind it
            buffer: max + max / 2,
        })
    }

    /// Reads a file once and says what is in it; `progress` is told how many bytes more are done.
    pub fn cut_file(
        &self,
        root: &Root,
        path: &TreePath,
        expected: &Stat,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Cut, CutError> {
        let began = SystemTime::now();
        let file = root.open_file(path)?;
        let stat = stat_of(&file)?.filter(|stat| stat.kind == Kind::File).ok_or(CutError::Missing)?;
        if !stat.is_unchanged(expected) {
            return Err(CutError::Changed);
        }
        let Pieces { hash, chunks } = if stat.size <= self.min as u64 {
            read_whole(&file, stat.size, progress)?
        } else {
            self.read(&file, stat.size, progress)?
        };
        // whoever writes after this changes the time, and the next scan sees it
        let after = stat_of(&file)?.ok_or(CutError::Changed)?;
        if !after.is_unchanged(&stat) {
            return Err(CutError::Changed);
        }
        let (form, list) = form(&chunks, stat.size)?;
        let content = FileContent { size: stat.size, hash, chunks: form };
        Ok(Cut { content, chunks, list, stat: after, settled: is_settled(stat.mtime, began) })
    }

    /// Says what is in bytes that are at hand, as of a file that holds them, and its list of chunks where that is long.
    pub fn cut_bytes(&self, bytes: &[u8]) -> Result<(FileContent, Option<Vec<u8>>), CutError> {
        let size = bytes.len() as u64;
        let mut hasher = Hasher::new(size);
        if !bytes.is_empty() {
            let cuts = if bytes.len() <= self.min { vec![bytes.len()] } else { self.cuts(bytes, true) };
            hasher.take(Piece::Data { buffer: bytes.to_vec(), cuts });
        }
        let Pieces { hash, chunks } = hasher.finish();
        let (form, list) = form(&chunks, size)?;
        Ok((FileContent { size, hash, chunks: form }, list))
    }

    fn read(
        &self,
        file: &File,
        size: u64,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Pieces, CutError> {
        let mut hasher = Hasher::new(size);
        if size <= self.buffer as u64 {
            // a thread would cost more than it saves
            Reading { cutter: self, sink: &mut hasher, progress }.file(file, size)?;
            return Ok(hasher.finish());
        }
        let (full, to_hash) = sync_channel(BUFFERS_AHEAD);
        let (to_refill, empty) = sync_channel(BUFFERS_AHEAD + 1);
        std::thread::scope(|scope| {
            let hashing = scope.spawn(move || {
                for piece in to_hash {
                    if let Some(buffer) = hasher.take(piece) {
                        // the reader has all it needs if there is no room, or is done
                        let _ = to_refill.try_send(buffer);
                    }
                }
                hasher.finish()
            });
            let mut sink = ToThread { full, empty };
            let read = Reading { cutter: self, sink: &mut sink, progress }.file(file, size);
            drop(sink);
            let hashed = hashing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            read.map(|()| hashed)
        })
    }

    /// The lengths of the chunks at the beginning of some data, of which more may follow.
    ///
    /// A cut that comes before the end of the data does not depend on what follows. There is always one in a full
    /// buffer, which is longer than the longest chunk.
    #[must_use]
    pub fn cuts(&self, data: &[u8], is_end: bool) -> Vec<usize> {
        let (mask_s, mask_l) = self.masks;
        let mut cuts = Vec::new();
        let mut rest = data;
        while !rest.is_empty() {
            let (_, cut) = v2020::cut_gear(
                rest,
                self.min,
                self.average,
                self.max,
                mask_s,
                mask_l,
                mask_s << 1,
                mask_l << 1,
                &self.gear,
                &self.gear_shifted,
            );
            if cut == rest.len() && cut < self.max && !is_end {
                break;
            }
            cuts.push(cut);
            rest = &rest[cut..];
        }
        cuts
    }
}

/// Reads a chunk of a file; none if that is not at this place any more.
pub fn read_chunk(root: &Root, path: &TreePath, offset: u64, len: u64, hash: &[u8; 32]) -> io::Result<Option<Vec<u8>>> {
    match read_at(root, path, offset, len) {
        Ok(bytes) => Ok(bytes.filter(|bytes| blake3::hash(bytes) == *hash)),
        Err(error) if is_absent(&error) || error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_at(root: &Root, path: &TreePath, offset: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
    let Some(len) = usize::try_from(len).ok().filter(|_| len <= MAX_CHUNK) else { return Ok(None) };
    let mut file = root.open_file(path)?;
    match stat_of(&file)? {
        Some(stat) if stat.kind == Kind::File && offset.saturating_add(len as u64) <= stat.size => {}
        _ => return Ok(None),
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes)?;
    Ok(Some(bytes))
}

/// What was read of a file.
struct Pieces {
    /// Of all of it.
    hash: [u8; 32],
    /// With the places where they begin.
    chunks: Vec<(ChunkRef, u64)>,
}

/// What the reader hands to the hasher, in the order of the file.
enum Piece {
    /// Chunks one behind the other at the beginning of a buffer, by their lengths.
    Data { buffer: Vec<u8>, cuts: Vec<usize> },
    /// A part of a hole, which is one chunk.
    Hole { len: u64, is_last: bool, whole: u64 },
}

/// Takes what was read, and gives used buffers back.
trait Sink {
    fn put(&mut self, piece: Piece) -> Result<(), CutError>;
    fn buffer(&mut self) -> Vec<u8>;
}

/// Reads a file's data and cuts it.
struct Reading<'a> {
    cutter: &'a Cutter,
    sink: &'a mut dyn Sink,
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
}

impl Reading<'_> {
    fn file(&mut self, mut file: &File, size: u64) -> Result<(), CutError> {
        let mut holes = Holes::new(file, size, self.cutter.min as u64);
        let mut at = 0;
        while at < size {
            let (hole, hole_len) = holes.after(at);
            if at < hole {
                file.seek(SeekFrom::Start(at))?;
                self.data(file, hole - at)?;
            }
            self.hole(hole_len)?;
            at = hole + hole_len;
        }
        Ok(())
    }

    fn hole(&mut self, whole: u64) -> Result<(), CutError> {
        let mut left = whole;
        while left > 0 {
            let len = left.min(HOLE_STEP);
            left -= len;
            self.sink.put(Piece::Hole { len, is_last: left == 0, whole })?;
            tell(self.progress, len)?;
        }
        Ok(())
    }

    /// Cuts a run of data as if nothing were around it.
    fn data(&mut self, mut source: impl Read, len: u64) -> Result<(), CutError> {
        let capacity = usize::try_from(len).unwrap_or(usize::MAX).min(self.cutter.buffer);
        let (mut unread, mut held) = (len, 0);
        let mut buffer = self.buffer(capacity);
        loop {
            let room = (capacity - held).min(usize::try_from(unread).unwrap_or(usize::MAX));
            source.read_exact(&mut buffer[held..held + room])?;
            unread -= room as u64;
            held += room;
            let cuts = self.cutter.cuts(&buffer[..held], unread == 0);
            if unread == 0 {
                self.sink.put(Piece::Data { buffer, cuts })?;
                return tell(self.progress, room as u64);
            }
            let done: usize = cuts.iter().sum();
            let mut next = self.buffer(capacity);
            next[..held - done].copy_from_slice(&buffer[done..held]);
            held -= done;
            self.sink.put(Piece::Data { buffer: std::mem::replace(&mut buffer, next), cuts })?;
            tell(self.progress, room as u64)?;
        }
    }

    fn buffer(&mut self, capacity: usize) -> Vec<u8> {
        let mut buffer = self.sink.buffer();
        if buffer.len() < capacity {
            buffer = vec![0; capacity];
        }
        buffer
    }
}

struct ToThread {
    full: SyncSender<Piece>,
    empty: Receiver<Vec<u8>>,
}

impl Sink for ToThread {
    fn put(&mut self, piece: Piece) -> Result<(), CutError> {
        // the other end is gone only after a panic, which joining the thread passes on
        self.full.send(piece).map_err(|_| CutError::Stopped)
    }

    fn buffer(&mut self) -> Vec<u8> {
        self.empty.try_recv().unwrap_or_default()
    }
}

struct Hasher {
    size: u64,
    whole: blake3::Hasher,
    chunks: Vec<(ChunkRef, u64)>,
    at: u64,
}

impl Hasher {
    fn new(size: u64) -> Self {
        Self { size, whole: blake3::Hasher::new(), chunks: Vec::new(), at: 0 }
    }

    /// Takes a piece in, and gives its buffer back.
    fn take(&mut self, piece: Piece) -> Option<Vec<u8>> {
        match piece {
            Piece::Data { buffer, cuts } => {
                let mut rest = &buffer[..];
                for cut in cuts {
                    let (chunk, behind) = rest.split_at(cut);
                    rest = behind;
                    // of a file of one chunk both hashes are the same
                    if cut as u64 != self.size {
                        self.whole.update(chunk);
                    }
                    self.push(ChunkRef { hash: Some(*blake3::hash(chunk).as_bytes()), len: cut as u64 });
                }
                Some(buffer)
            }
            Piece::Hole { len, is_last, whole } => {
                let mut left = len;
                while left > 0 {
                    let step = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
                    self.whole.update(&ZEROS[..step]);
                    left -= step as u64;
                }
                if is_last {
                    self.push(ChunkRef { hash: None, len: whole });
                }
                None
            }
        }
    }

    fn push(&mut self, chunk: ChunkRef) {
        self.chunks.push((chunk, self.at));
        self.at += chunk.len;
    }

    fn finish(self) -> Pieces {
        let hash = match self.chunks[..] {
            [(ChunkRef { hash: Some(hash), .. }, _)] => hash,
            _ => *self.whole.finalize().as_bytes(),
        };
        Pieces { hash, chunks: self.chunks }
    }
}

impl Sink for Hasher {
    fn put(&mut self, piece: Piece) -> Result<(), CutError> {
        self.take(piece);
        Ok(())
    }

    fn buffer(&mut self) -> Vec<u8> {
        Vec::new()
    }
}

fn read_whole(
    mut file: &File,
    size: u64,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Pieces, CutError> {
    let mut bytes = vec![0; usize::try_from(size).map_err(|_| CutError::TooLarge)?];
    file.read_exact(&mut bytes)?;
    tell(progress, size)?;
    let hash = *blake3::hash(&bytes).as_bytes();
    let chunks = if size == 0 { Vec::new() } else { vec![(ChunkRef { hash: Some(hash), len: size }, 0)] };
    Ok(Pieces { hash, chunks })
}

fn tell(progress: &mut dyn FnMut(u64) -> ControlFlow<()>, bytes: u64) -> Result<(), CutError> {
    match progress(bytes) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(CutError::Stopped),
    }
}

/// How a record names the chunks, and the list if it is too long for the record.
fn form(chunks: &[(ChunkRef, u64)], size: u64) -> Result<(Chunks, Option<Vec<u8>>), CutError> {
    match chunks {
        [] => return Ok((Chunks::Whole, None)),
        [(chunk, _)] if chunk.hash.is_some() && size <= MAX_CHUNK => return Ok((Chunks::Whole, None)),
        _ => {}
    }
    let refs: Vec<ChunkRef> = chunks.iter().map(|(chunk, _)| *chunk).collect();
    if refs.len() <= MAX_INLINE_CHUNKS {
        return Ok((Chunks::Inline(refs), None));
    }
    if refs.len() > MAX_LISTED_CHUNKS {
        return Err(CutError::TooLarge);
    }
    let list = encode_chunks(&refs);
    let piece = |piece: &[u8]| ChunkRef { hash: Some(*blake3::hash(piece).as_bytes()), len: piece.len() as u64 };
    Ok((Chunks::Listed(list.chunks(LIST_PIECE).map(piece).collect()), Some(list)))
}

/// Whether a change after `began` would get another time than this one.
fn is_settled(mtime: i64, began: SystemTime) -> bool {
    let tick = if mtime % 1_000_000_000 == 0 { COARSE_TICK } else { TICK };
    let began = began.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    i64::try_from(began).is_ok_and(|began| mtime.saturating_add(tick) <= began)
}

/// The holes of a file that are worth a place in its list.
struct Holes<'a> {
    /// None where the file has no holes, or nobody can tell.
    file: Option<&'a File>,
    size: u64,
    min: u64,
}

impl<'a> Holes<'a> {
    fn new(file: &'a File, size: u64, min: u64) -> Self {
        Self { file: Some(file).filter(|file| sys::may_have_holes(file, size)), size, min }
    }

    /// The first hole at or behind a place, and its length; the end of the file and 0 where there is none.
    ///
    /// Shorter holes count as data: a file of thousands of tiny ones would have a list longer than its content.
    fn after(&mut self, mut at: u64) -> (u64, u64) {
        while let Some(file) = self.file
            && at < self.size
        {
            let Some(hole) = sys::next_hole(file, at) else {
                self.file = None;
                break;
            };
            if hole >= self.size {
                break;
            }
            let data = sys::next_data(file, hole).unwrap_or(self.size).min(self.size);
            if data - hole >= self.min {
                return (hole, data - hole);
            }
            at = data;
        }
        (self.size, 0)
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd", target_vendor = "apple"))]
mod sys {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::{SeekFrom, seek};

    pub(super) fn may_have_holes(file: &File, size: u64) -> bool {
        file.metadata().is_ok_and(|metadata| metadata.blocks().saturating_mul(512) < size)
    }

    /// The first hole at or behind a place; none if the file system cannot tell.
    pub(super) fn next_hole(file: &File, at: u64) -> Option<u64> {
        seek(file, SeekFrom::Hole(at)).ok()
    }

    /// The first data at or behind a place; none if there is nothing but a hole.
    pub(super) fn next_data(file: &File, at: u64) -> Option<u64> {
        seek(file, SeekFrom::Data(at)).ok()
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd", target_vendor = "apple")))]
mod sys {
    use std::fs::File;

    pub(super) fn may_have_holes(_file: &File, _size: u64) -> bool {
        false
    }

    pub(super) fn next_hole(_file: &File, _at: u64) -> Option<u64> {
        None
    }

    pub(super) fn next_data(_file: &File, _at: u64) -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use fastcdc::v2020::FastCDC;
    use proptest::prelude::*;
    use sync_types::FolderId;
    use sync_types::folder::decode_chunks;
    use tempfile::TempDir;

    use super::*;
    use crate::walk::stat;

    const SEED: u64 = 0x5eed_5eed_5eed_5eed;
    const SMALL: Chunker = Chunker { id: 1, min: 64, average: 256, max: 1024 };

    fn root() -> (TempDir, Root) {
        let temp = tempfile::tempdir().expect("a directory");
        let root = Root::create(temp.path(), &FolderId([7; 16])).expect("a root");
        (temp, root)
    }

    fn path() -> TreePath {
        TreePath::new("file").expect("a path")
    }

    fn random(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn cut(root: &Root, cutter: &Cutter) -> Result<Cut, CutError> {
        let (expected, _) = stat(root, &path()).expect("looked").expect("a file");
        cutter.cut_file(root, &path(), &expected, &mut |_| ControlFlow::Continue(()))
    }

    fn cut_bytes(chunker: &Chunker, bytes: &[u8]) -> Cut {
        let (_temp, root) = root();
        fs::write(root.path().join("file"), bytes).expect("written");
        let cut = cut(&root, &Cutter::new(chunker, SEED).expect("a cutter")).expect("cut");
        assert_eq!(cut.content.size, bytes.len() as u64);
        assert_eq!(cut.content.hash, *blake3::hash(bytes).as_bytes());
        let mut at = 0;
        for (chunk, offset) in &cut.chunks {
            assert_eq!(*offset, at);
            if let Some(hash) = chunk.hash {
                let read = read_chunk(&root, &path(), *offset, chunk.len, &hash).expect("read").expect("the chunk");
                assert_eq!(&bytes[usize::try_from(at).expect("a place")..][..read.len()], read);
            }
            at += chunk.len;
        }
        assert_eq!(at, bytes.len() as u64);
        let at_hand = Cutter::new(chunker, SEED).expect("a cutter").cut_bytes(bytes).expect("cut");
        assert_eq!(at_hand, (cut.content.clone(), cut.list.clone()), "what is at hand is cut as a file is");
        cut
    }

    fn at_once(chunker: &Chunker, bytes: &[u8]) -> Vec<u64> {
        let [min, average, max] =
            [chunker.min, chunker.average, chunker.max].map(|size| usize::try_from(size).expect("a size"));
        FastCDC::with_level_and_seed(bytes, min, average, max, Normalization::Level1, SEED)
            .map(|chunk| chunk.length as u64)
            .collect()
    }

    fn lengths(cut: &Cut) -> Vec<u64> {
        cut.chunks.iter().map(|(chunk, _)| chunk.len).collect()
    }

    #[test]
    fn the_cuts_stay_where_they_were() {
        let bytes = random(20 << 20);
        let cut = cut_bytes(&Chunker::default(), &bytes);
        assert_eq!(lengths(&cut), at_once(&Chunker::default(), &bytes));
        let expected = [
            1622930, 1528352, 1572503, 1463815, 728885, 1086094, 1191718, 2018285, 1874617, 932614, 2022869, 2354411,
            1963971, 610456,
        ];
        assert_eq!(lengths(&cut), expected);
    }

    #[test]
    fn what_a_record_says_depends_on_the_number_of_chunks() {
        let empty = cut_bytes(&SMALL, b"");
        assert!(empty.content.chunks == Chunks::Whole && empty.chunks.is_empty());
        for len in [1, 63, 64] {
            let whole = cut_bytes(&SMALL, &random(len));
            assert_eq!(whole.content.chunks, Chunks::Whole);
            assert_eq!(whole.chunks.len(), 1);
        }
        let inline = cut_bytes(&SMALL, &random(4096));
        let refs: Vec<_> = inline.chunks.iter().map(|(chunk, _)| *chunk).collect();
        assert!(refs.len() > 1 && inline.list.is_none());
        assert_eq!(inline.content.chunks, Chunks::Inline(refs));

        let listed = cut_bytes(&SMALL, &random(9 << 20));
        let list = listed.list.expect("a list");
        let refs: Vec<_> = listed.chunks.iter().map(|(chunk, _)| *chunk).collect();
        assert_eq!(decode_chunks(&list).expect("chunks"), refs);
        let Chunks::Listed(pieces) = listed.content.chunks else { panic!("{} chunks", refs.len()) };
        assert_eq!(pieces.len(), 2);
        let (first, second) = list.split_at(LIST_PIECE);
        for (piece, bytes) in pieces.iter().zip([first, second]) {
            assert_eq!(*piece, ChunkRef { hash: Some(*blake3::hash(bytes).as_bytes()), len: bytes.len() as u64 });
        }
    }

    #[test]
    fn a_list_that_no_record_can_name_is_refused() {
        let chunk = ChunkRef { hash: Some([1; 32]), len: 1 };
        assert_eq!((encode_chunks(&[chunk]).len() * MAX_LISTED_CHUNKS).div_ceil(LIST_PIECE), MAX_INLINE_CHUNKS);
        assert!(matches!(form(&vec![(chunk, 0); MAX_LISTED_CHUNKS + 1], 1 << 50), Err(CutError::TooLarge)));
    }

    #[test]
    fn parameters_that_are_not_ours_are_refused() {
        let ours = Chunker::default();
        for other in [
            Chunker { id: 2, ..ours },
            Chunker { min: 0, ..ours },
            Chunker { min: 255, ..ours },
            Chunker { min: 2 << 20, ..ours },
            Chunker { average: 8 << 20, max: 16 << 20, ..ours },
            Chunker { max: 8 << 20, ..ours },
            Chunker { max: 512 << 10, ..ours },
        ] {
            assert_eq!(Cutter::new(&other, SEED).err(), Some(ChunkerError), "{other:?}");
        }
    }

    #[test]
    fn an_insertion_moves_few_chunks() {
        let mut bytes = random(8 << 20);
        let hashes = |bytes: &[u8]| -> std::collections::BTreeSet<_> {
            cut_bytes(&Chunker { id: 1, min: 4096, average: 16 << 10, max: 64 << 10 }, bytes)
                .chunks
                .iter()
                .map(|(chunk, _)| chunk.hash)
                .collect()
        };
        let before = hashes(&bytes);
        bytes.splice(4_000_000..4_000_000, random(1000));
        let after = hashes(&bytes);
        assert!(before.len() > 300 && after.difference(&before).count() <= 4);
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_not_cut() {
        let (_temp, root) = root();
        let file = root.path().join("file");
        let cutter = Cutter::new(&SMALL, SEED).expect("a cutter");
        for size in [10_u64, 1000, 100_000] {
            let changes: [&dyn Fn(); 3] = [
                &|| fs::write(&file, "other").expect("written"),
                &|| {
                    let opened = fs::File::options().append(true).open(&file).expect("opened");
                    opened.set_len(size + 1).expect("grown");
                },
                &|| {
                    let opened = fs::File::options().write(true).open(&file).expect("opened");
                    opened.set_modified(SystemTime::now() + Duration::from_secs(5)).expect("set");
                },
            ];
            for change in changes {
                fs::write(&file, random(usize::try_from(size).expect("a size"))).expect("written");
                let (expected, _) = stat(&root, &path()).expect("looked").expect("a file");
                let mut is_first = true;
                let result = cutter.cut_file(&root, &path(), &expected, &mut |_| {
                    if std::mem::take(&mut is_first) {
                        change();
                    }
                    ControlFlow::Continue(())
                });
                assert!(matches!(result, Err(CutError::Changed)), "{size} {result:?}");
                let result = cutter.cut_file(&root, &path(), &expected, &mut |_| panic!("it is another already"));
                assert!(matches!(result, Err(CutError::Changed)), "{size} {result:?}");
            }
        }
    }

    #[test]
    fn reading_stops_when_it_is_told() {
        let (_temp, root) = root();
        let cutter = Cutter::new(&SMALL, SEED).expect("a cutter");
        for size in [10, 1000, 100_000] {
            fs::write(root.path().join("file"), random(size)).expect("written");
            let (expected, _) = stat(&root, &path()).expect("looked").expect("a file");
            let result = cutter.cut_file(&root, &path(), &expected, &mut |_| ControlFlow::Break(()));
            assert!(matches!(result, Err(CutError::Stopped)));
        }
    }

    #[test]
    fn progress_adds_up_to_the_size() {
        let (_temp, root) = root();
        let cutter = Cutter::new(&SMALL, SEED).expect("a cutter");
        for size in [0, 10, 1000, 100_000] {
            fs::write(root.path().join("file"), random(size)).expect("written");
            let (expected, _) = stat(&root, &path()).expect("looked").expect("a file");
            let mut done = 0;
            let mut add = |bytes| {
                done += bytes;
                ControlFlow::Continue(())
            };
            cutter.cut_file(&root, &path(), &expected, &mut add).expect("cut");
            assert_eq!(done, size as u64);
        }
    }

    #[test]
    fn a_time_that_another_change_may_bear_is_not_trusted() {
        let (_temp, root) = root();
        let cutter = Cutter::new(&SMALL, SEED).expect("a cutter");
        fs::write(root.path().join("file"), "content").expect("written");
        let file = fs::File::options().write(true).open(root.path().join("file")).expect("opened");
        let now = SystemTime::now();
        let nanos = |nanos| UNIX_EPOCH + Duration::from_nanos(nanos);
        let second = now.duration_since(UNIX_EPOCH).expect("after 1970").as_secs() * 1_000_000_000;
        for (mtime, settled) in [
            (now, false),
            (now + Duration::from_secs(60), false),
            // in whole seconds, as FAT counts them
            (nanos(second - 1_000_000_000), false),
            (nanos(second - 10_000_000_000), true),
            (nanos(second - 1_000_000_001), true),
            (UNIX_EPOCH - Duration::from_secs(1), true),
        ] {
            file.set_modified(mtime).expect("set");
            assert_eq!(is_settled(stat_of(&file).expect("looked").expect("a file").mtime, now), settled, "{mtime:?}");
        }
        file.set_modified(nanos(second - 1_000_000_001)).expect("set");
        assert!(cut(&root, &cutter).expect("cut").settled);
    }

    #[test]
    fn a_chunk_that_is_not_there_any_more_is_not_read() {
        let (_temp, root) = root();
        let file = root.path().join("file");
        fs::write(&file, "one two").expect("written");
        let hash = *blake3::hash(b"two").as_bytes();
        let read = |offset, len| read_chunk(&root, &path(), offset, len, &hash).expect("read");
        assert_eq!(read(4, 3).as_deref(), Some(&b"two"[..]));
        for (offset, len) in [(3, 3), (4, 4), (5, 3), (u64::MAX, 3), (4, u64::MAX), (4, MAX_CHUNK + 1)] {
            assert_eq!(read(offset, len), None);
        }
        fs::write(&file, "one owt").expect("written");
        assert_eq!(read(4, 3), None);
        fs::remove_file(&file).expect("removed");
        assert_eq!(read(4, 3), None);
        fs::create_dir(&file).expect("made");
        assert_eq!(read(4, 3), None);
    }

    #[cfg(unix)]
    #[test]
    fn only_regular_files_are_read() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let (temp, root) = root();
        let outside = tempfile::NamedTempFile::new().expect("a file");
        let file = temp.path().join("file");
        let cutter = Cutter::new(&SMALL, SEED).expect("a cutter");
        fs::write(&file, "content").expect("written");
        let (expected, _) = stat(&root, &path()).expect("looked").expect("a file");
        let is_missing = || {
            let result = cutter.cut_file(&root, &path(), &expected, &mut |_| ControlFlow::Continue(()));
            assert!(matches!(result, Err(CutError::Missing)), "{result:?}");
            assert_eq!(read_chunk(&root, &path(), 0, 0, blake3::hash(b"").as_bytes()).expect("read"), None);
        };
        fs::remove_file(&file).expect("removed");
        is_missing();
        std::os::unix::fs::symlink(outside.path(), &file).expect("linked");
        is_missing();
        fs::remove_file(&file).expect("removed");
        mknodat(CWD, &file, FileType::Fifo, Mode::RUSR, 0).expect("made");
        is_missing();
        fs::remove_file(&file).expect("removed");
        fs::create_dir(&file).expect("made");
        is_missing();
    }

    #[cfg(target_os = "linux")]
    mod holes {
        use std::os::unix::fs::FileExt;

        use super::*;

        fn sparse(root: &Root, size: u64, data: &[(u64, &[u8])]) {
            let file = fs::File::create(root.path().join("file")).expect("made");
            file.set_len(size).expect("grown");
            for (at, bytes) in data {
                file.write_all_at(bytes, *at).expect("written");
            }
        }

        #[test]
        fn holes_stay_holes() {
            let (_temp, root) = root();
            let cutter = Cutter::new(&Chunker::default(), SEED).expect("a cutter");
            let size = (40 << 20) + 5;
            let byte = [1];
            sparse(&root, size, &[(10 << 20, &byte), (30 << 20, &random(1 << 20))]);
            let cut = cut(&root, &cutter).expect("cut");
            let all = fs::read(root.path().join("file")).expect("read");
            assert_eq!(cut.content.hash, *blake3::hash(&all).as_bytes());
            let shape: Vec<_> = cut.chunks.iter().map(|(chunk, at)| (chunk.hash.is_some(), *at)).collect();
            assert_eq!(shape[..4], [(false, 0), (true, 10 << 20), (false, (10 << 20) + 4096), (true, 30 << 20)]);
            assert_eq!(shape.last(), Some(&(false, 31 << 20)));
            let refs: Vec<_> = cut.chunks.iter().map(|(chunk, _)| *chunk).collect();
            assert_eq!(sync_types::folder::total(&refs), Some(size));
            assert_eq!(cut.content.chunks, Chunks::Inline(refs));
        }

        #[test]
        fn a_file_of_nothing_but_a_hole_is_one() {
            let (_temp, root) = root();
            let cutter = Cutter::new(&Chunker::default(), SEED).expect("a cutter");
            for size in [1 << 20, 1 << 30] {
                sparse(&root, size, &[]);
                let cut = cut(&root, &cutter).expect("cut");
                assert_eq!(cut.content.chunks, Chunks::Inline(vec![ChunkRef { hash: None, len: size }]));
            }
            sparse(&root, 1 << 20, &[]);
            let zeros = vec![0; 1 << 20];
            assert_eq!(cut(&root, &cutter).expect("cut").content.hash, *blake3::hash(&zeros).as_bytes());
        }

        #[test]
        fn tiny_holes_are_read_as_zeros() {
            let (_temp, root) = root();
            let cutter = Cutter::new(&Chunker::default(), SEED).expect("a cutter");
            let byte = [1];
            let data: Vec<_> = (0..100).map(|n| (n * (64 << 10), &byte[..])).collect();
            sparse(&root, 100 * (64 << 10), &data);
            let cut = cut(&root, &cutter).expect("cut");
            assert!(cut.chunks.iter().all(|(chunk, _)| chunk.hash.is_some()));
            let all = fs::read(root.path().join("file")).expect("read");
            assert_eq!(lengths(&cut), at_once(&Chunker::default(), &all));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn a_stream_is_cut_as_the_whole_is(
            len in 0_usize..40_000,
            period in 1_usize..40_000,
            buffer in 1025_usize..8000,
        ) {
            let bytes: Vec<u8> = random(period).into_iter().cycle().take(len).collect();
            let cutter = Cutter { buffer, ..Cutter::new(&SMALL, SEED).expect("a cutter") };
            let mut hasher = Hasher::new(len as u64);
            let mut reading = Reading { cutter: &cutter, sink: &mut hasher, progress: &mut |_| ControlFlow::Continue(()) };
            reading.data(&bytes[..], len as u64).expect("read");
            let pieces = hasher.finish();
            let lengths: Vec<u64> = pieces.chunks.iter().map(|(chunk, _)| chunk.len).collect();
            prop_assert_eq!(lengths, at_once(&SMALL, &bytes));
            prop_assert_eq!(pieces.hash, *blake3::hash(&bytes).as_bytes());
        }
    }
}
