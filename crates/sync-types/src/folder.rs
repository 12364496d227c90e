//! What the log says about folders: records of paths in batches, chunk lists, and the frames that fetch chunks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::bounds::{
    MAX_BATCH_AUTHORS, MAX_CHUNK, MAX_CHUNKS_ASKED, MAX_COMPONENT, MAX_INLINE_CHUNKS, MAX_KEPT, MAX_NAME, MAX_PATH,
    MAX_PATH_DEPTH, MAX_RECORDS, MAX_VECTOR,
};
use crate::ids::{AuthorId, FolderId, Number};
use crate::wire::{FormatError, Reader, Writer};

/// Kind of an entry that announces a folder: [`Announcement`].
pub const KIND_FOLDER: u16 = 16;
/// Kind of an entry with records of a folder: [`RecordBatch`].
pub const KIND_RECORDS: u16 = 17;

/// Kind of an entry that says what a folder's records have led to: [`Snapshot`](crate::snapshot::Snapshot).
pub const KIND_SNAPSHOT: u16 = 18;

/// The name under a folder's root that the program keeps for itself; no record names anything below it.
pub const OWN_DIR: &str = ".syncshell";

/// Bits of a version's count that are its place in its batch.
const INDEX_BITS: u32 = 16;
/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
/// Bytes of a chunk's reference in a list: its hash and its length.
const REF_LEN: usize = 40;

/// The stream that a folder's entries belong to.
#[must_use]
pub fn folder_stream(folder: &FolderId) -> String {
    format!("folder/{folder}")
}

/// The folder whose entries a stream holds.
#[must_use]
pub fn folder_of(stream: &str) -> Option<FolderId> {
    stream.strip_prefix("folder/")?.parse().ok()
}

/// A path below a folder's root: components between slashes, none empty, `.` or `..`, none too long, and none of our own.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TreePath(String);

/// Why a text is no path of a folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// No component, or one that is empty.
    #[error("path has an empty component")]
    Empty,
    /// A component that leads elsewhere.
    #[error("path has a component that leads out of the folder")]
    Escape,
    /// A NUL, or a slash or backslash where it would be read as a separator.
    #[error("path holds a character that no path may hold")]
    Character,
    /// More bytes or components than are kept.
    #[error(
        "path is too long: a component may have {MAX_COMPONENT} bytes, all of it {MAX_PATH}, {MAX_PATH_DEPTH} deep"
    )]
    TooLong,
    /// It is in the directory that the program keeps for itself.
    #[error("path is in {OWN_DIR}, which is not synced")]
    Own,
}

impl TreePath {
    /// Checks a path written with slashes.
    pub fn new(path: impl Into<String>) -> Result<Self, PathError> {
        let path = path.into();
        if path.len() > MAX_PATH {
            return Err(PathError::TooLong);
        }
        for (depth, component) in path.split('/').enumerate() {
            match component {
                "" => return Err(PathError::Empty),
                "." | ".." => return Err(PathError::Escape),
                // in any case: some file systems do not tell them apart
                own if depth == 0 && own.eq_ignore_ascii_case(OWN_DIR) => return Err(PathError::Own),
                long if long.len() > MAX_COMPONENT || depth >= MAX_PATH_DEPTH => return Err(PathError::TooLong),
                odd if odd.contains('\0') => return Err(PathError::Character),
                _ => {}
            }
        }
        Ok(Self(path))
    }

    /// The path with slashes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The components.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }

    /// The last component.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// The directory it is in; none for the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        self.0.rsplit_once('/').map(|(parent, _)| Self(parent.to_owned()))
    }

    /// What is called `name` in this directory.
    pub fn join(&self, name: &str) -> Result<Self, PathError> {
        Self::new(format!("{}/{name}", self.0))
    }

    /// Whether it is in a directory or below it.
    #[must_use]
    pub fn is_below(&self, directory: &Self) -> bool {
        self.0.strip_prefix(&directory.0).is_some_and(|rest| rest.starts_with('/'))
    }

    /// Bytes that sort as a walk does that takes each directory's names in byte order, a directory before what is in it.
    #[must_use]
    pub fn key(&self) -> Vec<u8> {
        self.0.replace('/', "\0").into_bytes()
    }

    /// The path of a key.
    #[must_use]
    pub fn from_key(key: &[u8]) -> Option<Self> {
        Self::new(std::str::from_utf8(key).ok()?.replace('\0', "/")).ok()
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TreePath({:?})", self.0)
    }
}

impl Ord for TreePath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.bytes().map(separated).cmp(other.0.bytes().map(separated))
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

fn separated(byte: u8) -> u8 {
    if byte == b'/' { 0 } else { byte }
}

/// Where a version was written: the author's feed, and the place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dot {
    /// The author of the entry.
    pub author: AuthorId,
    /// The entry's number and the record's place in its batch: [`Dot::new`].
    pub count: u64,
}

impl Dot {
    /// The version of the record at `index` in the batch that is entry `number`.
    #[must_use]
    pub fn new(author: AuthorId, number: Number, index: u16) -> Self {
        let number = number.0.min(u64::MAX >> INDEX_BITS);
        Self { author, count: (number << INDEX_BITS) | u64::from(index) }
    }

    /// The number of the entry.
    #[must_use]
    pub fn number(&self) -> Number {
        Number(self.count >> INDEX_BITS)
    }
}

/// What a version has seen: of each author the highest count.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Vector(BTreeMap<AuthorId, u64>);

impl Vector {
    /// Adds a version.
    pub fn add(&mut self, dot: Dot) {
        let count = self.0.entry(dot.author).or_default();
        *count = dot.count.max(*count);
    }

    /// Adds everything another one has seen.
    pub fn join(&mut self, other: &Self) {
        for (author, count) in &other.0 {
            self.add(Dot { author: *author, count: *count });
        }
    }

    /// Whether it has seen a version.
    #[must_use]
    pub fn contains(&self, dot: Dot) -> bool {
        self.0.get(&dot.author).is_some_and(|count| dot.count <= *count)
    }

    /// Whether it has seen everything another one has.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        other.0.iter().all(|(author, count)| self.0.get(author).is_some_and(|own| count <= own))
    }

    /// The sum of the counts.
    #[must_use]
    pub fn sum(&self) -> u128 {
        self.0.values().map(|count| u128::from(*count)).sum()
    }

    /// The counts by author.
    pub fn iter(&self) -> impl Iterator<Item = Dot> {
        self.0.iter().map(|(author, count)| Dot { author: *author, count: *count })
    }

    /// Nothing was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Dot> for Vector {
    fn from_iter<I: IntoIterator<Item = Dot>>(dots: I) -> Self {
        let mut vector = Self::default();
        dots.into_iter().for_each(|dot| vector.add(dot));
        vector
    }
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// BLAKE3 of its bytes; none for a hole, which is zeros that take no room.
    pub hash: Option<[u8; 32]>,
    /// Bytes.
    pub len: u64,
}

/// How a file is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunks {
    /// The whole file is one chunk, or it is empty.
    Whole,
    /// Its chunks, in order.
    Inline(Vec<ChunkRef>),
    /// Its list of chunks ([`encode_chunks`]) is too long for a record, and is itself cut into these.
    Listed(Vec<ChunkRef>),
}

/// A file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileContent {
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of all of it.
    pub hash: [u8; 32],
    /// How it is cut.
    pub chunks: Chunks,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Nothing any more.
    Deleted,
    /// A directory.
    Directory,
    /// A file.
    File(FileContent),
    /// A symbolic link, with the text it holds; never followed.
    Symlink(String),
}

impl Node {
    /// Whether it is the same thing: kind and content, whatever its cuts.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(other)) => one.hash == other.hash && one.size == other.size,
            (one, other) => one == other,
        }
    }
}

/// What an author says is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The path.
    pub path: TreePath,
    /// What is there.
    pub node: Node,
    /// Unix permission bits, at most 0o777; 0 for a link and where nothing is.
    pub mode: u32,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
    /// What it follows: every version of this path that its author had seen. Its own version is where it stands.
    pub basis: Vector,
}

/// Records of one folder, in the order of their author.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RecordBatch {
    /// At most [`MAX_RECORDS`].
    pub records: Vec<Record>,
}

/// The first entry of a folder's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// What its maker calls the folder.
    pub name: String,
}

impl Announcement {
    /// The body of its entry.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::array_of(1);
        writer.text(&self.name);
        writer.finish()
    }

    /// Reads the body of its entry.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("announcement", 1, MAX_FIELDS)?;
        let name = reader.text("name", MAX_NAME)?.to_owned();
        reader.skip("announcement", fields - 1)?;
        reader.end()?;
        Ok(Self { name })
    }
}

impl RecordBatch {
    /// The body of its entry: the authors named, then the records, which name them by their place.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let authors: BTreeSet<AuthorId> =
            self.records.iter().flat_map(|record| record.basis.iter().map(|dot| dot.author)).collect();
        let authors: Vec<AuthorId> = authors.into_iter().collect();
        let mut writer = Writer::array_of(2);
        writer.bins(&authors);
        writer.array(self.records.len());
        for record in &self.records {
            write_record(&mut writer, record, &authors);
        }
        writer.finish()
    }

    /// How many records the body of an entry holds, without reading them.
    pub fn count(bytes: &[u8]) -> Result<usize, FormatError> {
        let mut reader = Reader::new(bytes);
        reader.array("batch", 2, MAX_FIELDS)?;
        reader.bins("authors", MAX_BATCH_AUTHORS, AuthorId::LEN)?;
        reader.array("records", 0, MAX_RECORDS)
    }

    /// Reads the body of its entry.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("batch", 2, MAX_FIELDS)?;
        let authors = reader.bins("authors", MAX_BATCH_AUTHORS, AuthorId::LEN)?;
        let authors = authors
            .into_iter()
            .map(|author| author.try_into().map(AuthorId).map_err(|_| FormatError::Malformed { field: "authors" }))
            .collect::<Result<Vec<_>, _>>()?;
        let count = reader.array("records", 0, MAX_RECORDS)?;
        let mut records = Vec::new();
        for _ in 0..count {
            records.push(read_record(&mut reader, &authors)?);
        }
        reader.skip("batch", fields - 2)?;
        reader.end()?;
        Ok(Self { records })
    }
}

fn write_record(writer: &mut Writer, record: &Record, authors: &[AuthorId]) {
    writer.array(6).text(record.path.as_str());
    write_node(writer, &record.node);
    writer.uint(u64::from(record.mode)).uint(zigzag(record.mtime));
    let dots: Vec<Dot> = record.basis.iter().collect();
    writer.array(dots.len());
    for dot in &dots {
        let at = authors.binary_search(&dot.author).expect("BUG: every author is in the table");
        writer.array(2).uint(at as u64).uint(dot.count);
    }
    // room that a later version may use without moving what follows
    writer.uint(0);
}

fn read_record(reader: &mut Reader<'_>, authors: &[AuthorId]) -> Result<Record, FormatError> {
    let fields = reader.array("record", 6, MAX_FIELDS)?;
    let path = TreePath::new(reader.text("path", MAX_PATH)?).map_err(|_| FormatError::Malformed { field: "path" })?;
    let node = read_node(reader)?;
    let mode = reader.uint32("mode")?;
    if mode > 0o777 {
        return Err(FormatError::Malformed { field: "mode" });
    }
    let mtime = unzigzag(reader.uint("mtime")?);
    let count = reader.array("basis", 0, MAX_VECTOR)?;
    let mut basis = Vector::default();
    for _ in 0..count {
        reader.array("basis", 2, 2)?;
        let at = reader.uint("author")?;
        let author = usize::try_from(at).ok().and_then(|at| authors.get(at));
        let author = *author.ok_or(FormatError::Malformed { field: "author" })?;
        basis.add(Dot { author, count: reader.uint("count")? });
    }
    reader.skip("record", fields - 5)?;
    Ok(Record { path, node, mode, mtime, basis })
}

/// Writes what is at a path: `[kind, …]`.
pub fn write_node(writer: &mut Writer, node: &Node) {
    match node {
        Node::Deleted => writer.array(1).uint(0),
        Node::Directory => writer.array(1).uint(1),
        Node::File(file) => {
            let (form, chunks) = match &file.chunks {
                Chunks::Whole => (0, &[][..]),
                Chunks::Inline(chunks) => (1, &chunks[..]),
                Chunks::Listed(chunks) => (2, &chunks[..]),
            };
            writer.array(5).uint(2).uint(file.size).bin(&file.hash).uint(form).bin(&encode_chunks(chunks))
        }
        Node::Symlink(target) => writer.array(2).uint(3).text(target),
    };
}

/// Reads what is at a path.
pub fn read_node(reader: &mut Reader<'_>) -> Result<Node, FormatError> {
    let fields = reader.array("node", 1, MAX_FIELDS)?;
    let (node, read) = match reader.uint("kind")? {
        0 => (Node::Deleted, 1),
        1 => (Node::Directory, 1),
        2 if fields >= 5 => {
            let size = reader.uint("size")?;
            let hash = reader.fixed("hash")?;
            let form = reader.uint("form")?;
            let chunks = decode_chunks(reader.bin("chunks", MAX_INLINE_CHUNKS * REF_LEN)?)?;
            let malformed = FormatError::Malformed { field: "chunks" };
            let chunks = match form {
                0 if chunks.is_empty() && size <= MAX_CHUNK => Chunks::Whole,
                1 if total(&chunks) == Some(size) && !chunks.is_empty() => Chunks::Inline(chunks),
                2 if chunks.iter().all(|chunk| chunk.hash.is_some()) && !chunks.is_empty() => Chunks::Listed(chunks),
                _ => return Err(malformed),
            };
            (Node::File(FileContent { size, hash, chunks }), 5)
        }
        3 if fields >= 2 => {
            let target = reader.text("target", MAX_PATH)?;
            if target.is_empty() || target.contains('\0') {
                return Err(FormatError::Malformed { field: "target" });
            }
            (Node::Symlink(target.to_owned()), 2)
        }
        got => return Err(FormatError::Unknown { field: "kind", got }),
    };
    reader.skip("node", fields - read)?;
    Ok(node)
}

/// A list of chunks as bytes: of each its hash, zeros for a hole, and its length as eight bytes, little end first.
#[must_use]
pub fn encode_chunks(chunks: &[ChunkRef]) -> Vec<u8> {
    let bytes = |chunk: &ChunkRef| [&chunk.hash.unwrap_or_default()[..], &chunk.len.to_le_bytes()].concat();
    chunks.iter().flat_map(bytes).collect()
}

/// Reads a list of chunks; each but a hole has between one and [`MAX_CHUNK`] bytes.
pub fn decode_chunks(bytes: &[u8]) -> Result<Vec<ChunkRef>, FormatError> {
    let malformed = FormatError::Malformed { field: "chunks" };
    let (refs, rest) = bytes.as_chunks::<REF_LEN>();
    if !rest.is_empty() {
        return Err(malformed);
    }
    let chunk = |bytes: &[u8; REF_LEN]| {
        let (hash, len) = bytes.split_first_chunk::<32>()?;
        let len = u64::from_le_bytes(len.try_into().ok()?);
        let hash = Some(*hash).filter(|hash| *hash != [0; 32]);
        (len > 0 && (hash.is_none() || len <= MAX_CHUNK)).then_some(ChunkRef { hash, len })
    };
    refs.iter().map(chunk).collect::<Option<Vec<_>>>().ok_or(malformed)
}

/// Bytes of all chunks together; none if that is more than a number holds.
#[must_use]
pub fn total(chunks: &[ChunkRef]) -> Option<u64> {
    chunks.iter().try_fold(0u64, |sum, chunk| sum.checked_add(chunk.len))
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// One message on a stream that fetches chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChunkFrame {
    /// Asks for chunks, by hash; answered in order, each by one [`ChunkFrame::Chunk`] or [`ChunkFrame::Missing`].
    Ask {
        /// At most [`MAX_CHUNKS_ASKED`].
        hashes: Vec<[u8; 32]>,
    },
    /// A chunk.
    Chunk {
        /// 0 if `bytes` are the chunk, 1 if they are an LZ4 block of it.
        codec: u8,
        /// Bytes of the chunk.
        len: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The chunk is not held here any more.
    Missing,
    /// Asks what is kept of what was replaced or removed at a path; answered by [`ChunkFrame::Kept`].
    AskKept {
        /// The folder, of the session's group.
        folder: FolderId,
        /// The path.
        path: TreePath,
    },
    /// The files that are kept of a path, the newest first; their chunks can be asked for.
    Kept {
        /// At most [`MAX_KEPT`].
        files: Vec<KeptFile>,
    },
}

/// A file that was replaced or removed, and is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptFile {
    /// When it was replaced or removed, Unix milliseconds.
    pub at: u64,
    /// Its content.
    pub content: FileContent,
    /// Its permission bits, at most 0o777.
    pub mode: u32,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
}

impl ChunkFrame {
    const ASK: u64 = 0x60;
    const CHUNK: u64 = 0x61;
    const MISSING: u64 = 0x62;
    const ASK_KEPT: u64 = 0x63;
    const KEPT: u64 = 0x64;

    /// The frame's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Ask { hashes } => {
                let mut writer = Writer::array_of(2);
                writer.uint(Self::ASK).bins(hashes);
                writer.finish()
            }
            Self::Chunk { codec, len, bytes } => {
                let mut writer = Writer::array_of(4);
                writer.uint(Self::CHUNK).uint(u64::from(*codec)).uint(u64::from(*len)).bin(bytes);
                writer.finish()
            }
            Self::Missing => {
                let mut writer = Writer::array_of(1);
                writer.uint(Self::MISSING);
                writer.finish()
            }
            Self::AskKept { folder, path } => {
                let mut writer = Writer::array_of(3);
                writer.uint(Self::ASK_KEPT).bin(&folder.0).text(path.as_str());
                writer.finish()
            }
            Self::Kept { files } => {
                let mut writer = Writer::array_of(2);
                writer.uint(Self::KEPT).array(files.len());
                for KeptFile { at, content, mode, mtime } in files {
                    writer.array(4).uint(*at);
                    write_node(&mut writer, &Node::File(content.clone()));
                    writer.uint(u64::from(*mode)).uint(zigzag(*mtime));
                }
                writer.finish()
            }
        }
    }

    /// Reads a frame; the length announced is checked before anything is made room for.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("frame", 1, MAX_FIELDS)?;
        let (frame, read) = match reader.uint("type")? {
            Self::ASK if fields >= 2 => {
                let hashes = reader.bins("hashes", MAX_CHUNKS_ASKED, 32)?;
                let hashes = hashes.into_iter().map(TryInto::try_into).collect::<Result<Vec<_>, _>>();
                (Self::Ask { hashes: hashes.map_err(|_| FormatError::Malformed { field: "hashes" })? }, 2)
            }
            Self::CHUNK if fields >= 4 => {
                let codec =
                    u8::try_from(reader.uint("codec")?).map_err(|_| FormatError::Malformed { field: "codec" })?;
                let len = reader.uint32("len")?;
                if u64::from(len) > MAX_CHUNK || codec > 1 {
                    return Err(FormatError::Malformed { field: "len" });
                }
                let most = usize::try_from(MAX_CHUNK).unwrap_or(usize::MAX);
                (Self::Chunk { codec, len, bytes: reader.bin("bytes", most)?.to_vec() }, 4)
            }
            Self::MISSING => (Self::Missing, 1),
            Self::ASK_KEPT if fields >= 3 => {
                let folder = FolderId(reader.fixed("folder")?);
                let path = TreePath::new(reader.text("path", MAX_PATH)?);
                (Self::AskKept { folder, path: path.map_err(|_| FormatError::Malformed { field: "path" })? }, 3)
            }
            Self::KEPT if fields >= 2 => {
                let count = reader.array("files", 0, MAX_KEPT)?;
                let files = (0..count).map(|_| read_kept(&mut reader)).collect::<Result<_, _>>()?;
                (Self::Kept { files }, 2)
            }
            got => return Err(FormatError::Unknown { field: "type", got }),
        };
        reader.skip("frame", fields - read)?;
        reader.end()?;
        Ok(frame)
    }
}

fn read_kept(reader: &mut Reader<'_>) -> Result<KeptFile, FormatError> {
    let fields = reader.array("kept", 4, MAX_FIELDS)?;
    let at = reader.uint("at")?;
    let Node::File(content) = read_node(reader)? else { return Err(FormatError::Malformed { field: "content" }) };
    let mode = reader.uint32("mode")?;
    if mode > 0o777 {
        return Err(FormatError::Malformed { field: "mode" });
    }
    let mtime = unzigzag(reader.uint("mtime")?);
    reader.skip("kept", fields - 4)?;
    Ok(KeptFile { at, content, mode, mtime })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn author(n: u8) -> AuthorId {
        AuthorId([n; 32])
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    fn batch() -> RecordBatch {
        let basis: Vector =
            [Dot { author: author(2), count: 9 }, Dot::new(author(1), Number(3), 2)].into_iter().collect();
        let record = |at: &str, node, mode, mtime| Record { path: path(at), node, mode, mtime, basis: basis.clone() };
        let chunk = |n, len| ChunkRef { hash: Some([n; 32]), len };
        let hole = ChunkRef { hash: None, len: 1 << 40 };
        let cut = Chunks::Inline(vec![chunk(7, 300_000), hole, chunk(8, 1)]);
        let listed = Chunks::Listed(vec![chunk(9, 4_000_000)]);
        RecordBatch {
            records: vec![
                record("a", Node::Directory, 0o755, 1),
                record("a/b c", Node::File(FileContent { size: 5, hash: [3; 32], chunks: Chunks::Whole }), 0o644, -1),
                record(
                    "a/cut",
                    Node::File(FileContent { size: 300_001 + (1 << 40), hash: [4; 32], chunks: cut }),
                    0,
                    i64::MAX,
                ),
                record("l", Node::File(FileContent { size: 1 << 41, hash: [5; 32], chunks: listed }), 0, i64::MIN),
                record("s", Node::Symlink("../x".to_owned()), 0, 0),
                Record { basis: Vector::default(), ..record("gone", Node::Deleted, 0, 0) },
            ],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(RecordBatch::decode(&batch().encode()).expect("a batch"), batch());
        assert_eq!(RecordBatch::count(&batch().encode()), Ok(batch().records.len()));
        let announcement = Announcement { name: "Fotos".to_owned() };
        assert_eq!(Announcement::decode(&announcement.encode()).expect("an announcement"), announcement);
        for frame in [
            ChunkFrame::Ask { hashes: vec![[1; 32], [2; 32]] },
            ChunkFrame::Chunk { codec: 1, len: 70, bytes: vec![3; 40] },
            ChunkFrame::Missing,
            ChunkFrame::AskKept { folder: FolderId([4; 16]), path: path("a/b") },
            kept(),
            ChunkFrame::Kept { files: Vec::new() },
        ] {
            assert_eq!(ChunkFrame::decode(&frame.encode()).expect("a frame"), frame);
        }
    }

    fn kept() -> ChunkFrame {
        let cut = Chunks::Inline(vec![ChunkRef { hash: Some([7; 32]), len: 300_000 }]);
        let file = |at, size, chunks, mode, mtime| KeptFile {
            at,
            content: FileContent { size, hash: [6; 32], chunks },
            mode,
            mtime,
        };
        ChunkFrame::Kept { files: vec![file(9, 5, Chunks::Whole, 0o644, -1), file(8, 300_000, cut, 0, i64::MAX)] }
    }

    #[test]
    fn what_is_kept_of_a_path_travels_in_these_bytes() {
        let ask = ChunkFrame::AskKept { folder: FolderId([4; 16]), path: path("a/b") };
        expect_test::expect!["9363c41004040404040404040404040404040404a3612f62"]
            .assert_eq(&data_encoding::HEXLOWER.encode(&ask.encode()));
        expect_test::expect!["9264929409950205c420060606060606060606060606060606060606060606060606060606060606060600c400cd01a40194089502ce000493e0c420060606060606060606060606060606060606060606060606060606060606060601c4280707070707070707070707070707070707070707070707070707070707070707e09304000000000000cffffffffffffffffe"].assert_eq(&data_encoding::HEXLOWER.encode(&kept().encode()));
        let mut directory = Writer::array_of(2);
        directory.uint(0x64).array(1).array(4).uint(1);
        write_node(&mut directory, &Node::Directory);
        directory.uint(0).uint(0);
        assert_eq!(
            ChunkFrame::decode(&directory.finish()),
            Err(FormatError::Malformed { field: "content" }),
            "only files are kept for others"
        );
    }

    #[test]
    fn the_bytes_stay_yesterdays() {
        expect_test::expect!["9292c4200101010101010101010101010101010101010101010101010101010101010101c42002020202020202020202020202020202020202020202020202020202020202029696a1619101cd01ed02929200ce000300029201090096a5612f622063950205c420030303030303030303030303030303030303030303030303030303030303030300c400cd01a401929200ce000300029201090096a5612f6375749502cf00000100000493e1c420040404040404040404040404040404040404040404040404040404040404040401c4780707070707070707070707070707070707070707070707070707070707070707e093040000000000000000000000000000000000000000000000000000000000000000000000000000000000000100000808080808080808080808080808080808080808080808080808080808080808010000000000000000cffffffffffffffffe929200ce000300029201090096a16c9502cf0000020000000000c420050505050505050505050505050505050505050505050505050505050505050502c428090909090909090909090909090909090909090909090909090909090909090900093d000000000000cfffffffffffffffff929200ce000300029201090096a1739203a42e2e2f780000929200ce000300029201090096a4676f6e65910000009000"].assert_eq(&data_encoding::HEXLOWER.encode(&batch().encode()));
    }

    #[test]
    fn a_path_cannot_leave_the_folder() {
        for bad in [
            "",
            "/etc/passwd",
            "a//b",
            "a/",
            "..",
            "a/../b",
            "./a",
            "a/.",
            "a\0b",
            ".syncshell",
            ".syncshell/x",
            ".SyncShell/x",
        ] {
            assert!(TreePath::new(bad).is_err(), "{bad:?}");
        }
        assert!(TreePath::new("x".repeat(256)).is_err());
        assert!(TreePath::new("x/".repeat(300) + "y").is_err());
        assert!(TreePath::new("x".repeat(255)).is_ok());
        assert!(TreePath::new("a/.syncshell/..b/...").is_ok());
        let mut record = batch();
        record.records.truncate(1);
        let bytes = record.encode();
        let at = bytes.iter().position(|byte| *byte == 0xa1).expect("the path");
        let mut bad = bytes.clone();
        bad[at + 1] = b'.';
        assert_eq!(RecordBatch::decode(&bad), Err(FormatError::Malformed { field: "path" }));
    }

    #[test]
    fn keys_sort_as_a_walk_does() {
        let walk = ["a", "a/b", "a/b/c", "a/b.txt", "a b", "a.txt", "b"].map(path);
        assert!(walk.is_sorted());
        assert!(walk.iter().map(TreePath::key).is_sorted());
        for path in walk {
            assert_eq!(TreePath::from_key(&path.key()), Some(path));
        }
    }

    #[test]
    fn a_vector_knows_what_it_has_seen() {
        let one: Vector = [Dot { author: author(1), count: 5 }].into_iter().collect();
        let mut both = one.clone();
        both.add(Dot { author: author(2), count: 1 });
        assert!(both.covers(&one) && !one.covers(&both) && both.contains(Dot { author: author(1), count: 4 }));
        assert!(both.sum() > one.sum());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = RecordBatch::decode(&bytes);
            let _ = ChunkFrame::decode(&bytes);
            let _ = decode_chunks(&bytes);
        }

        #[test]
        fn damaged_batches_are_read_or_refused(at in 0usize..400, byte in any::<u8>()) {
            let mut bytes = batch().encode();
            let len = bytes.len();
            bytes[at % len] = byte;
            if let Ok(read) = RecordBatch::decode(&bytes) {
                prop_assert_eq!(RecordBatch::decode(&read.encode()), Ok(read));
            }
        }

        #[test]
        fn times_before_1970_survive(mtime in any::<i64>()) {
            prop_assert_eq!(unzigzag(zigzag(mtime)), mtime);
        }
    }
}
