//! What the index says of a path, between the database's columns and the decisions of `sync-core`.

use sync_core::folder::{Disk, Version, Versions};
use sync_folder::walk::{Kind, Stat};
use sync_store::{DiskState, FileRow, StoreError};
use sync_types::bounds::MAX_CHUNK;
use sync_types::folder::Vector;
use sync_types::folder::{ChunkRef, Chunks, Dot, FileContent, Node, decode_chunks, encode_chunks};

/// Codes of [`DiskState::kind`].
const FILE: u8 = 0;
const DIRECTORY: u8 = 1;
const SYMLINK: u8 = 2;

/// Where the rows of list pieces begin: no file is that long.
pub const LIST_OFFSET: u64 = 1 << 62;

/// A piece of a file in the table of chunks: hash, offset, length.
pub type ChunkRow = ([u8; 32], u64, u64);

/// The maximal versions of a row.
pub fn versions(row: Option<&FileRow>) -> Result<Versions, StoreError> {
    match row {
        Some(row) => Versions::decode(&row.versions).map_err(|_| StoreError::Corrupt("a path's versions".into())),
        None => Ok(Versions::default()),
    }
}

/// The vector of a version on disk, as bytes for the database: pairs of author and count.
pub fn encode_vector(vector: &Vector) -> Vec<u8> {
    vector.iter().flat_map(|dot| [&dot.author.0[..], &dot.count.to_be_bytes()].concat()).collect()
}

/// Reads what [`encode_vector`] wrote.
pub fn decode_vector(bytes: &[u8]) -> Vector {
    let (pairs, _) = bytes.as_chunks::<40>();
    let dot = |pair: &[u8; 40]| {
        let (author, count) = pair.split_first_chunk::<32>()?;
        Some(Dot { author: sync_types::AuthorId(*author), count: u64::from_be_bytes(count.try_into().ok()?) })
    };
    pairs.iter().filter_map(dot).collect()
}

/// What lies on disk, as the index keeps it.
pub fn disk_state(stat: &Stat, node: &Node, vector: &Vector) -> DiskState {
    let (kind, hash) = match node {
        Node::File(file) => (FILE, Some(file.hash)),
        Node::Symlink(target) => (SYMLINK, Some(*blake3::hash(target.as_bytes()).as_bytes())),
        _ => (DIRECTORY, None),
    };
    let mode = if kind == SYMLINK { 0 } else { stat.mode };
    let (size, mtime) = if kind == DIRECTORY { (0, 0) } else { (stat.size, stat.mtime) };
    DiskState { kind, size, mtime, ino: stat.ino, mode, hash, vector: encode_vector(vector) }
}

/// A time that nothing on disk has, and that no unsettled file is given either.
const LEFT_OUT: i64 = i64::MIN + 1;

/// What lay at a path before it was left out: the version is known, and what is there now is not.
pub fn unlooked(disk: &DiskState) -> DiskState {
    DiskState { mtime: LEFT_OUT, ..disk.clone() }
}

/// Whether nobody looked at a path since it was left out, so that its absence tells nothing.
pub fn is_unlooked(disk: &DiskState) -> bool {
    disk.mtime == LEFT_OUT
}

/// Whether a path still looks as the index says, without reading it.
pub fn looks_the_same(disk: &DiskState, stat: &Stat) -> bool {
    match (disk.kind, stat.kind) {
        _ if is_unlooked(disk) => false,
        // another directory is one that an operation would not expect
        (DIRECTORY, Kind::Directory) => (disk.ino, disk.mode) == (stat.ino, stat.mode),
        (FILE, Kind::File) => {
            (disk.size, disk.mtime, disk.ino, disk.mode) == (stat.size, stat.mtime, stat.ino, stat.mode)
        }
        (SYMLINK, Kind::Symlink) => (disk.size, disk.mtime, disk.ino) == (stat.size, stat.mtime, stat.ino),
        _ => false,
    }
}

/// Whether a row is of a directory that stays although nobody says so: it is decided again whenever it is looked at, since
/// nothing tells when what kept it is gone.
pub fn only_stays(row: &FileRow) -> bool {
    let is_wanted = |versions: Versions| versions.winner().is_none_or(|winner| winner.node == Node::Directory);
    let stays = !row.pending && row.disk.as_ref().is_some_and(is_directory);
    stays && !versions(Some(row)).is_ok_and(is_wanted)
}

/// Whether two looks at a path saw the same, whatever version it is.
pub fn same_look(one: Option<&DiskState>, other: Option<&DiskState>) -> bool {
    let look = |disk: &DiskState| (disk.kind, disk.size, disk.mtime, disk.ino, disk.mode, disk.hash);
    one.map(look) == other.map(look)
}

/// The stat that an index row stands for, to be compared with what is on disk right before it is changed.
pub fn stat_of(disk: &DiskState) -> Stat {
    let kind = match disk.kind {
        FILE => Kind::File,
        DIRECTORY => Kind::Directory,
        _ => Kind::Symlink,
    };
    Stat { kind, size: disk.size, mtime: disk.mtime, ino: disk.ino, mode: disk.mode }
}

/// Whether what lies on disk is a directory.
pub fn is_directory(disk: &DiskState) -> bool {
    disk.kind == DIRECTORY
}

/// What lies on disk, as a node; of a file only size and hash are known.
pub fn disk_node(disk: &DiskState, versions: &Versions) -> Node {
    match (disk.kind, disk.hash) {
        (FILE, Some(hash)) => Node::File(FileContent { size: disk.size, hash, chunks: Chunks::Whole }),
        (SYMLINK, Some(hash)) => {
            let is_it = |version: &&Version| match &version.node {
                Node::Symlink(target) => *blake3::hash(target.as_bytes()).as_bytes() == hash,
                _ => false,
            };
            versions.maximal().iter().find(is_it).map_or(Node::Symlink(String::new()), |version| version.node.clone())
        }
        _ => Node::Directory,
    }
}

/// What lies on disk, as decisions take it.
pub fn disk(disk: &DiskState, versions: &Versions) -> Disk {
    let node = disk_node(disk, versions);
    Disk { node, mode: disk.mode, mtime: disk.mtime, vector: decode_vector(&disk.vector) }
}

/// Where a file's content lies, for whoever asks for a chunk; `list` is the encoded list where the record names only its
/// pieces.
pub fn chunk_rows(content: &FileContent, list: Option<&[u8]>) -> Vec<ChunkRow> {
    let placed = |chunks: &[ChunkRef], from: u64| {
        let mut offset = from;
        let mut rows = Vec::new();
        for chunk in chunks {
            rows.extend(chunk.hash.map(|hash| (hash, offset, chunk.len)));
            offset = offset.saturating_add(chunk.len);
        }
        rows
    };
    match &content.chunks {
        Chunks::Whole if content.size == 0 => Vec::new(),
        Chunks::Whole => vec![(content.hash, 0, content.size)],
        Chunks::Inline(chunks) => placed(chunks, 0),
        Chunks::Listed(pieces) => {
            let mut rows = list.and_then(|list| decode_chunks(list).ok()).map_or(Vec::new(), |all| placed(&all, 0));
            rows.extend(placed(pieces, LIST_OFFSET));
            rows
        }
    }
}

/// How a file is cut, made again from where its chunks lie: the other way round than [`chunk_rows`].
pub(crate) fn chunks_of(size: u64, rows: &[ChunkRow]) -> Chunks {
    let mut pieces: Vec<&ChunkRow> = rows.iter().filter(|row| row.1 >= LIST_OFFSET).collect();
    if !pieces.is_empty() {
        pieces.sort_unstable_by_key(|row| row.1);
        return Chunks::Listed(
            pieces.into_iter().map(|(hash, _, len)| ChunkRef { hash: Some(*hash), len: *len }).collect(),
        );
    }
    match placed(rows, size) {
        // without chunks it is one, or a hole as long as no chunk is
        Some(chunks) if !rows.is_empty() || size > MAX_CHUNK => Chunks::Inline(chunks),
        _ => Chunks::Whole,
    }
}

/// A file's chunks in order, with holes between them.
fn placed(rows: &[ChunkRow], size: u64) -> Option<Vec<ChunkRef>> {
    let mut placed: Vec<&ChunkRow> = rows.iter().filter(|row| row.1 < LIST_OFFSET).collect();
    placed.sort_unstable_by_key(|row| row.1);
    let (mut chunks, mut end) = (Vec::new(), 0u64);
    for (hash, offset, len) in placed {
        if *offset > end {
            chunks.push(ChunkRef { hash: None, len: offset - end });
        }
        chunks.push(ChunkRef { hash: Some(*hash), len: *len });
        end = offset.checked_add(*len)?;
    }
    if size > end {
        chunks.push(ChunkRef { hash: None, len: size - end });
    }
    Some(chunks)
}

/// The bytes of a piece of a file's encoded list, made again from where its chunks lie; what is between them are holes.
pub fn list_piece(rows: &[ChunkRow], size: u64, offset: u64, len: u64) -> Option<Vec<u8>> {
    let chunks = placed(rows, size)?;
    let list = encode_chunks(&chunks);
    let from = usize::try_from(offset.checked_sub(LIST_OFFSET)?).ok()?;
    let to = from.checked_add(usize::try_from(len).ok()?)?;
    list.get(from..to).map(<[u8]>::to_vec)
}
