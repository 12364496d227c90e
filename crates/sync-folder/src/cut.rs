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
/// Buffers that are full and not yet hashed: two let reading and hashing overlap, more only take memory.
const BUFFERS_AHEAD: usize = 2;
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
            // it became shorter than it was
            io::ErrorKind::UnexpectedEof => Self::Changed,
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
            // room for the longest chunk and as much to read behind it
            buffer: 2 * max,
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
    fn cuts(&self, data: &[u8], is_end: bool) -> Vec<usize> {
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
    let list = encode_chunks(&refs);
    if list.len().div_ceil(LIST_PIECE) > MAX_INLINE_CHUNKS {
        return Err(CutError::TooLarge);
    }
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
