//! What is read from a folder's index and written to it: the same code under the engine and in the simulator.
//!
//! Everything here is a function of one transaction and its arguments.
//! What is told goes in two steps, the same for every teller: one builds the entry from what the index says, the other
//! takes it in, in the transaction that appends it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::iter::successors;

use sync_core::folder::snapshot::remembered;
use sync_core::folder::{
    Action, Change, Disk, Reissue, Seen, Version, Versions, basis, decide, moved_aside, overtaken,
};
use sync_folder::selection::Selection;
use sync_folder::versions::Kept;
use sync_folder::walk::{Kind, Stat};
use sync_store::{Appended, Content, DiskState, FileRow, FolderRow, FolderRowId, NewKept, Reader, StoreError, Txn};
use sync_types::folder::{Chunks, Dot, FileContent, KIND_RECORDS, Node, Record, RecordBatch, TreePath, folder_stream};
use sync_types::{AuthorId, Cursor, FolderId, GroupId, Number, Timestamp};

use super::engine::Settings;
use super::rows::{self, ChunkRow};
use super::status::Direction;

/// Rows below a path that are looked through at once for one that is live.
const LOOKED_THROUGH: usize = 64;
/// Bytes a record takes beside its path.
const RECORD_BYTES: usize = 100;

/// A folder in a database, and what of it is synced which way.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever works on an index names all of it")]
pub struct Place {
    /// Its row.
    pub fid: FolderRowId,
    /// Its id in the group.
    pub id: FolderId,
    /// Which way changes go on this device.
    pub way: Direction,
    /// Which paths this device takes.
    pub selection: Selection,
}

impl Place {
    /// Whether this device takes the path of a key.
    fn takes(&self, key: &[u8]) -> bool {
        self.selection.is_everything() || TreePath::from_key(key).is_some_and(|path| self.selection.takes(&path))
    }
}

// ---- what the group says ----

/// A batch of records, and where it stands in the log.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "a batch has a place in the log and nothing else")]
pub struct Batch {
    /// Whose entry it is.
    pub author: AuthorId,
    /// The entry's number.
    pub number: Number,
    /// What it says.
    pub records: Vec<Record>,
}

/// Takes records in, and notes how far the log was taken in; whether something is to be done now.
pub fn take(txn: &mut Txn<'_>, place: &Place, batches: Vec<Batch>, reached: Cursor) -> Result<bool, StoreError> {
    let mut news = false;
    let mut directories = HashSet::new();
    for batch in batches {
        news |= take_batch(txn, place, batch, &mut directories)?;
    }
    txn.set_folder_cursor(place.fid, reached)?;
    Ok(news)
}

/// Takes the records of an entry in; `directories` are those known to be some, so that their other entries need no look at
/// them.
pub(super) fn take_batch(
    txn: &mut Txn<'_>,
    place: &Place,
    batch: Batch,
    directories: &mut HashSet<TreePath>,
) -> Result<bool, StoreError> {
    let Batch { author, number, records } = batch;
    let mut news = false;
    for (index, record) in (0..=u16::MAX).zip(records) {
        let row = txn.reader().file(place.fid, &record.path.key())?;
        let mut versions = rows::versions(row.as_ref())?;
        if versions.insert(Version::new(&record, Dot::new(author, number, index))) {
            news |= put_versions(txn, place, &record.path, row.as_ref(), &versions, directories)?;
        }
    }
    Ok(news)
}

/// Puts what the group says of a path into the index, and has the directories above looked at; whether something is to be
/// done now.
pub(super) fn put_versions(
    txn: &mut Txn<'_>,
    place: &Place,
    path: &TreePath,
    row: Option<&FileRow>,
    versions: &Versions,
    directories: &mut HashSet<TreePath>,
) -> Result<bool, StoreError> {
    let key = path.key();
    let disk = row.and_then(|row| row.disk.as_ref());
    let pending = differs(&txn.reader(), place, &key, versions, disk)?;
    let (live, size) = extent(versions);
    let file = txn.put_versions(place.fid, &key, &versions.encode(), live, size, pending)?;
    if row.is_none() && !place.takes(&key) {
        txn.set_left_out(file, true)?;
    }
    let mut news = pending;
    if !live {
        return Ok(emptied_above(txn, place, &key)? || news);
    }
    news |= look_all_above(txn, place, path, directories)?;
    Ok(news)
}

/// Something is at a path now: everything above is to be a directory.
fn look_all_above(
    txn: &mut Txn<'_>,
    place: &Place,
    path: &TreePath,
    directories: &mut HashSet<TreePath>,
) -> Result<bool, StoreError> {
    let mut news = false;
    let mut above = path.parent();
    while let Some(directory) = above.filter(|directory| directories.insert(directory.clone())) {
        news |= look_above(txn, place, &directory)?;
        above = directory.parent();
    }
    Ok(news)
}

/// Something is below a path now: it is to be a directory, whatever was said of it.
fn look_above(txn: &mut Txn<'_>, place: &Place, path: &TreePath) -> Result<bool, StoreError> {
    let key = path.key();
    let Some(row) = txn.reader().file(place.fid, &key)? else { return Ok(false) };
    let versions = rows::versions(Some(&row))?;
    if versions.winner().is_some_and(|winner| winner.node == Node::Directory) {
        return Ok(false);
    }
    let pending = differs(&txn.reader(), place, &key, &versions, row.disk.as_ref())?;
    txn.put_versions(place.fid, &key, &row.versions, row.live, row.size, pending)?;
    Ok(pending)
}

// ---- what was issued again ----

/// Rows looked at together for what was issued again.
const LOOKED_AT: usize = 1024;

/// The body of an entry with records that is issued again: of its old author it has seen all that stays.
#[must_use]
pub fn reissue_body(body: &[u8], old: AuthorId, lowest: Number) -> Vec<u8> {
    let Ok(RecordBatch { mut records }) = RecordBatch::decode(body) else { return body.to_vec() };
    let reissue = Reissue { old, lowest, new: old, numbers: BTreeMap::new() };
    for record in &mut records {
        record.basis = reissue.basis(&record.basis);
    }
    RecordBatch { records }.encode()
}

/// Puts the new places of what was issued again into the indexes of a group's folders.
///
/// Without that this device would know versions that nobody else ever will.
pub fn reissued(txn: &mut Txn<'_>, group: &GroupId, reissue: &Reissue) -> Result<(), StoreError> {
    let folders = txn.reader().folders()?;
    for FolderRow { fid, id, settings, .. } in folders.into_iter().filter(|row| row.group == *group) {
        let settings = Settings::read(&settings);
        let place = Place { fid, id, way: settings.direction, selection: settings.selection() };
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = txn.reader().files_after(fid, after.as_deref(), LOOKED_AT)?;
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            for row in page {
                let before = rows::versions(Some(&row))?;
                let seen = row.disk.as_ref().and_then(|disk| reissue.vector(&rows::decode_vector(&disk.vector)));
                let again = before.reissued(reissue);
                if seen.is_none() && again.is_none() {
                    continue;
                }
                let versions = again.unwrap_or(before);
                let disk = row.disk.map(|disk| match &seen {
                    Some(seen) => DiskState { vector: rows::encode_vector(seen), ..disk },
                    None => disk,
                });
                let pending = differs(&txn.reader(), &place, &row.key, &versions, disk.as_ref())?;
                let (live, size) = extent(&versions);
                txn.put_versions(fid, &row.key, &versions.encode(), live, size, pending)?;
                txn.set_disk(row.file, disk.as_ref(), pending)?;
            }
        }
    }
    Ok(())
}

// ---- what is selected ----

/// Brings a page of rows in line with another selection; the key after which the next one begins, none at the end.
///
/// Of what is left out the index keeps which version lay here, and where its chunks lie, which are checked whenever one is
/// read, so that others can go on to fetch what they have not got yet. Of what is taken again nobody knows how it looks by
/// now: all of it is looked at, what changed is told as an edit of that version, and absence is no deletion.
pub fn reselect(
    txn: &mut Txn<'_>,
    place: &Place,
    before: &Selection,
    after: Option<&[u8]>,
    limit: usize,
) -> Result<Option<Vec<u8>>, StoreError> {
    let page = txn.reader().files_after(place.fid, after, limit)?;
    let next = page.last().filter(|_| page.len() == limit).map(|row| row.key.clone());
    for row in page {
        let Some(path) = TreePath::from_key(&row.key) else { continue };
        let taken = place.selection.takes(&path);
        if taken && before.takes(&path) {
            continue;
        }
        let disk = match &row.disk {
            Some(disk) if taken => Some(rows::unlooked(disk)),
            disk => disk.clone(),
        };
        let pending = differs(&txn.reader(), place, &row.key, &rows::versions(Some(&row))?, disk.as_ref())?;
        txn.set_disk(row.file, disk.as_ref(), pending)?;
        txn.set_left_out(row.file, !taken)?;
    }
    Ok(next)
}

// ---- what is to happen ----

/// What the index says of a path that is to be changed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Known {
    /// What lay there when it was last looked at.
    pub disk: Option<DiskState>,
    /// The chunks that lay there.
    pub chunks: Vec<ChunkRow>,
}

/// What is to happen at some paths.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Decided {
    /// What is to change.
    pub changes: Vec<Change>,
    /// What is known of those paths.
    pub known: HashMap<TreePath, Known>,
    /// What needs nothing, to be noted as such.
    pub settled: Vec<Applied>,
}

/// Compares rows with what lies on disk.
pub fn decide_all(reader: &Reader<'_>, place: &Place, page: Vec<FileRow>) -> Result<Decided, StoreError> {
    let mut decided = Decided::default();
    for row in page {
        let Some(path) = TreePath::from_key(&row.key) else { continue };
        let versions = rows::versions(Some(&row))?;
        let disk = row.disk.as_ref().map(|disk| rows::disk(disk, &versions));
        let action = action(reader, place, &row.key, &versions, disk.as_ref())?;
        // of what stays or moves the chunks are still there
        let chunks = match row.disk {
            Some(_) => reader.chunk_list(row.file)?,
            None => Vec::new(),
        };
        match action {
            Action::Nothing | Action::Held(_) => {
                decided.settled.push(Applied { path, disk: row.disk, chunks, kept: None });
            }
            action => {
                decided.known.insert(path.clone(), Known { disk: row.disk, chunks });
                decided.changes.push(Change { path, disk, action });
            }
        }
    }
    Ok(decided)
}

/// The way changes go, as the decisions of `sync-core` take it.
fn direction(direction: Direction) -> sync_core::folder::Direction {
    match direction {
        Direction::Both => sync_core::folder::Direction::Both,
        Direction::SendOnly => sync_core::folder::Direction::SendOnly,
        Direction::ReceiveOnly => sync_core::folder::Direction::ReceiveOnly,
    }
}

/// Whether anything below a path exists, as far as the group says.
fn live_below(reader: &Reader<'_>, fid: FolderRowId, key: &[u8]) -> Result<bool, StoreError> {
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = reader.files_below(fid, key, after.as_deref(), LOOKED_THROUGH)?;
        if page.iter().any(|row| row.live) {
            return Ok(true);
        }
        let Some(last) = page.last().filter(|_| page.len() == LOOKED_THROUGH) else { return Ok(false) };
        after = Some(last.key.clone());
    }
}

/// What is to happen at a path.
fn action(
    reader: &Reader<'_>,
    place: &Place,
    key: &[u8],
    versions: &Versions,
    disk: Option<&Disk>,
) -> Result<Action, StoreError> {
    let taken = place.takes(key);
    let directory = versions.winner().is_some_and(|winner| winner.node == Node::Directory);
    let live_below = taken && !directory && live_below(reader, place.fid, key)?;
    Ok(decide(&Seen { versions, disk, live_below, direction: direction(place.way), taken }))
}

/// Whether something is to be done at a path.
pub(super) fn differs(
    reader: &Reader<'_>,
    place: &Place,
    key: &[u8],
    versions: &Versions,
    disk: Option<&DiskState>,
) -> Result<bool, StoreError> {
    let disk = disk.map(|disk| rows::disk(disk, versions));
    let action = action(reader, place, key, versions, disk.as_ref())?;
    Ok(!matches!(action, Action::Nothing | Action::Held(_)))
}

/// Whether something is at a path, and its bytes.
pub(super) fn extent(versions: &Versions) -> (bool, u64) {
    let size = match versions.winner().map(|winner| &winner.node) {
        Some(Node::File(file)) => file.size,
        _ => 0,
    };
    (versions.is_live(), size)
}

// ---- what was done ----

/// What was done at a path.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever did something says all of it")]
pub struct Applied {
    /// The path.
    pub path: TreePath,
    /// What lies there now.
    pub disk: Option<DiskState>,
    /// The chunks of it.
    pub chunks: Vec<ChunkRow>,
    /// What lay there before, where it is kept.
    pub kept: Option<Kept>,
}

/// Notes what was done; what the group says meanwhile is compared again. Whether something is still to be done.
pub fn commit(txn: &mut Txn<'_>, place: &Place, applied: Vec<Applied>, now: Timestamp) -> Result<bool, StoreError> {
    let mut pending = false;
    for Applied { path, disk, chunks, kept } in applied {
        if let Some(kept) = kept {
            let kept = kept_from(&txn.reader(), place.fid, &path, kept, now)?;
            txn.add_kept(place.fid, &kept)?;
        }
        pending |= put(txn, place, &path.key(), disk.as_ref(), &chunks)?;
    }
    Ok(pending)
}

/// What was kept, as the database has it, with the hash and the chunks of what lay there where those are known.
pub(super) fn new_kept(
    path: &TreePath,
    kept: Kept,
    hash: Option<[u8; 32]>,
    chunks: Vec<ChunkRow>,
    at: Timestamp,
) -> NewKept {
    let Kept { name, size, mode, mtime, .. } = kept;
    let whole = matches!(&chunks[..], [(chunk, ..)] if Some(*chunk) == hash);
    let chunks = if whole { Vec::new() } else { chunks };
    NewKept { key: path.key(), at, name, size, hash, mode, mtime, reason: 0, chunks }
}

/// What was kept of what the index says lay at a path.
pub(super) fn kept_from(
    reader: &Reader<'_>,
    fid: FolderRowId,
    path: &TreePath,
    kept: Kept,
    at: Timestamp,
) -> Result<NewKept, StoreError> {
    let row = reader.file(fid, &path.key())?;
    let known = row.and_then(|row| Some((row.file, row.disk.filter(|disk| disk.size == kept.size)?.hash?)));
    Ok(match known {
        Some((file, hash)) if kept.kind == Kind::File => new_kept(path, kept, Some(hash), reader.chunk_list(file)?, at),
        _ => new_kept(path, kept, None, Vec::new(), at),
    })
}

/// Notes that directories that others removed stay, because something that is not synced is in them.
pub fn keep(txn: &mut Txn<'_>, place: &Place, kept: &[(TreePath, DiskState)]) -> Result<(), StoreError> {
    for (path, disk) in kept {
        if let Some(row) = txn.reader().file(place.fid, &path.key())? {
            txn.set_disk(row.file, Some(disk), false)?;
        }
    }
    Ok(())
}

/// Puts what lies on disk into the index; whether something is still to be done there.
fn put(
    txn: &mut Txn<'_>,
    place: &Place,
    key: &[u8],
    disk: Option<&DiskState>,
    chunks: &[ChunkRow],
) -> Result<bool, StoreError> {
    let row = txn.reader().file(place.fid, key)?;
    let mut versions = rows::versions(row.as_ref())?;
    let said = row.filter(|_| versions.winner().is_some());
    if let Some(disk) = disk.filter(|_| said.is_none()) {
        // it was deleted, and forgotten, while it was being put there
        let covered = txn.reader().covered(place.fid)?.into_iter().collect();
        versions = remembered(&rows::decode_vector(&disk.vector), &covered).unwrap_or(versions);
    }
    let pending = differs(&txn.reader(), place, key, &versions, disk)?;
    let file = match said {
        // what the group says stays as it is
        Some(row) => {
            txn.set_disk(row.file, disk, pending)?;
            row.file
        }
        None => {
            let (live, size) = extent(&versions);
            txn.put_file(place.fid, key, &versions.encode(), live, size, disk, pending)?
        }
    };
    txn.put_chunks(file, chunks)?;
    let emptied = disk.is_none() && emptied_above(txn, place, key)?;
    Ok(pending || emptied)
}

/// Something went from a path: a directory above it that others removed or replaced, and that stayed because of it, is
/// looked at again.
fn emptied_above(txn: &mut Txn<'_>, place: &Place, key: &[u8]) -> Result<bool, StoreError> {
    let mut above = TreePath::from_key(key).and_then(|path| path.parent());
    let mut found = false;
    while let Some(directory) = above {
        let Some(row) = txn.reader().file(place.fid, &directory.key())? else { return Ok(found) };
        let versions = rows::versions(Some(&row))?;
        let stays = versions.winner().is_some_and(|winner| winner.node == Node::Directory);
        if stays || !row.disk.as_ref().is_some_and(rows::is_directory) {
            return Ok(found);
        }
        if !row.pending {
            txn.set_disk(row.file, row.disk.as_ref(), true)?;
        }
        found = true;
        above = directory.parent();
    }
    Ok(found)
}

// ---- what a walk finds ----

/// A file that is to be read.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever reads a file needs all of it")]
pub struct Candidate {
    /// Where it is.
    pub path: TreePath,
    /// What the file system said of it.
    pub stat: Stat,
    /// What the index says.
    pub before: Option<DiskState>,
}

/// What is to happen with something that a walk found.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "there is nothing else to be done with what was found")]
pub enum Next {
    /// Nothing before the walk has ended.
    Wait,
    /// It is read.
    Read(Candidate),
    /// It is told.
    Tell(Difference),
}

/// Compares what a walk finds with the index; what was renamed is known by its inode, size and time, and not read.
#[derive(Debug)]
pub struct Comparison {
    /// New files, until it is known what is gone.
    held: Vec<Candidate>,
    most: usize,
    gone: Vec<FileRow>,
    /// Files and links where the index knows a directory.
    replaced: Vec<Replaced>,
}

#[derive(Debug)]
enum Replaced {
    File(Candidate),
    Link(Difference),
}

impl Replaced {
    fn path(&self) -> &TreePath {
        match self {
            Self::File(candidate) => &candidate.path,
            Self::Link(difference) => &difference.path,
        }
    }
}

/// What a walk comes to, in the order in which it is told.
#[derive(Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "whoever walks does all of it")]
pub struct Finished {
    /// What was moved, and what is gone from below a name that is no directory's any more: as long as that is live, the
    /// name counts as a directory's, and what took its place loses to it.
    pub first: Vec<Difference>,
    /// Files that are to be read.
    pub read: Vec<Candidate>,
    /// What else is gone.
    pub last: Vec<Difference>,
}

impl Comparison {
    /// Holds back at most so many new files until it is known what is gone.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { held: Vec::new(), most, gone: Vec::new(), replaced: Vec::new() }
    }

    /// Something is at a path that does not look as the index says; of a link with its text.
    pub fn here(&mut self, path: TreePath, stat: Stat, target: Option<String>, before: Option<DiskState>) -> Next {
        let was_directory = before.as_ref().is_some_and(rows::is_directory);
        let node = match (stat.kind, target) {
            (Kind::File, _) => {
                let candidate = Candidate { path, stat, before };
                if was_directory {
                    self.replaced.push(Replaced::File(candidate));
                    return Next::Wait;
                }
                if candidate.before.is_none() && self.held.len() < self.most {
                    self.held.push(candidate);
                    return Next::Wait;
                }
                return Next::Read(candidate);
            }
            (Kind::Symlink, target) => Node::Symlink(target.unwrap_or_default()),
            (Kind::Directory, _) => Node::Directory,
        };
        let is_link = matches!(node, Node::Symlink(_));
        let after = After::Here { stat, node, chunks: Vec::new(), settled: true };
        let difference = Difference { path, before, after };
        if was_directory && is_link {
            self.replaced.push(Replaced::Link(difference));
            return Next::Wait;
        }
        Next::Tell(difference)
    }

    /// The index knows something at a path, and nothing is there.
    pub fn missing(&mut self, row: FileRow) {
        self.gone.push(row);
    }

    /// Looks once more for what the walk did not find, which may have come after the walk had passed: `look` says
    /// whether something is there, or nothing where that cannot be seen. What came is to be looked at again.
    pub fn look_for_gone(&mut self, mut look: impl FnMut(&TreePath) -> Option<bool>) -> Vec<TreePath> {
        let mut there = Vec::new();
        self.gone.retain(|row| {
            let Some(path) = TreePath::from_key(&row.key) else { return false };
            let is_there = look(&path);
            if is_there == Some(true) {
                there.push(path);
            }
            is_there == Some(false)
        });
        there
    }

    /// What is to be told and read now that it is known what is gone.
    pub fn finish(self, reader: &Reader<'_>) -> Result<Finished, StoreError> {
        let mut by_look: HashMap<(u64, u64, i64), &FileRow> = HashMap::new();
        for row in &self.gone {
            if let Some(disk) = row.disk.as_ref().filter(|disk| disk.hash.is_some()) {
                by_look.insert((disk.ino, disk.size, disk.mtime), row);
            }
        }
        let (mut first, mut rest, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for candidate in self.held {
            let Stat { ino, size, mtime, .. } = candidate.stat;
            let Some((node, file)) =
                by_look.get(&(ino, size, mtime)).and_then(|row| Some((content_of(row)?, row.file)))
            else {
                rest.push(candidate);
                continue;
            };
            let Candidate { path, stat, before } = candidate;
            let chunks = reader.chunk_list(file)?;
            first.push(Difference { path, before, after: After::Here { stat, node, chunks, settled: true } });
        }
        let names: HashSet<TreePath> = self.replaced.iter().map(|replaced| replaced.path().clone()).collect();
        for row in self.gone {
            let Some(path) = TreePath::from_key(&row.key) else { continue };
            let is_below = successors(path.parent(), TreePath::parent).any(|above| names.contains(&above));
            let difference = Difference { path, before: row.disk, after: After::Gone };
            if is_below { first.push(difference) } else { last.push(difference) }
        }
        for replaced in self.replaced {
            match replaced {
                Replaced::File(candidate) => rest.push(candidate),
                Replaced::Link(difference) => first.push(difference),
            }
        }
        Ok(Finished { first, read: rest, last })
    }
}

/// The content that lay on disk at a row, with its chunks, where the index has them without reading.
fn content_of(row: &FileRow) -> Option<Node> {
    let hash = row.disk.as_ref()?.hash?;
    let versions = rows::versions(Some(row)).ok()?;
    let same = |version: &&Version| match &version.node {
        Node::File(file) => file.hash == hash,
        _ => false,
    };
    versions.maximal().iter().find(same).map(|version| version.node.clone())
}

// ---- what is told ----

/// A path that differs from the index.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever looked at a path says all of it")]
pub struct Difference {
    /// The path.
    pub path: TreePath,
    /// What the index said when it was compared.
    pub before: Option<DiskState>,
    /// What is there.
    pub after: After,
}

/// What a look at a path found.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_enums, reason = "something is there or it is not")]
pub enum After {
    /// Nothing.
    Gone,
    /// Something.
    Here {
        /// What the file system says of it.
        stat: Stat,
        /// What it is.
        node: Node,
        /// The chunks of it.
        chunks: Vec<ChunkRow>,
        /// Whether a later change shows in its time.
        settled: bool,
    },
}

impl Difference {
    /// About so many bytes of a batch.
    #[must_use]
    pub fn weight(&self) -> usize {
        let chunks = match &self.after {
            After::Here { node: Node::File(file), .. } => match &file.chunks {
                Chunks::Whole => 0,
                Chunks::Inline(chunks) | Chunks::Listed(chunks) => chunks.len() * 40,
            },
            _ => 0,
        };
        self.path.as_str().len() + RECORD_BYTES + chunks
    }
}

/// What becomes of looks at some paths: built by [`tell`], taken in by [`told`].
#[derive(Debug, Default)]
pub struct Telling {
    steps: Vec<Step>,
    stale: Vec<TreePath>,
}

/// What becomes of a look.
#[derive(Debug)]
struct Step {
    difference: usize,
    said: Said,
}

/// What a look at a path comes to.
#[derive(Debug)]
enum Said {
    /// It is what it was: only the look is new.
    Same,
    /// It is what the group says already, or nothing is to be said of it.
    Adopted,
    /// A record, and its place in the batch.
    Told(u16, Record),
}

/// What came of looks that were taken in.
#[derive(Debug)]
#[non_exhaustive]
pub struct Told {
    /// Whether something is to be done now.
    pub pending: bool,
    /// Paths whose index changed since they were compared, to be looked at again.
    pub stale: Vec<TreePath>,
}

/// The entry that tells what looks found, if anything is to be told.
pub fn tell(
    reader: &Reader<'_>,
    place: &Place,
    differences: &[Difference],
) -> Result<(Option<Content>, Telling), StoreError> {
    let (mut telling, mut records) = (Telling::default(), Vec::new());
    for (at, difference) in differences.iter().enumerate() {
        let row = reader.file(place.fid, &difference.path.key())?;
        if !rows::same_look(row.as_ref().and_then(|row| row.disk.as_ref()), difference.before.as_ref()) {
            telling.stale.push(difference.path.clone());
            continue;
        }
        let Ok(index) = u16::try_from(records.len()) else {
            telling.stale.push(difference.path.clone());
            continue;
        };
        match say(difference, row.as_ref(), index)? {
            Said::Told(_, record) if place.way == Direction::ReceiveOnly => {
                if let Some(said) = unsaid(difference, row.as_ref(), &record)? {
                    telling.steps.push(Step { difference: at, said });
                }
            }
            said => {
                if let Said::Told(_, record) = &said {
                    records.push(record.clone());
                }
                telling.steps.push(Step { difference: at, said });
            }
        }
    }
    Ok((content(place, records), telling))
}

/// An entry of records, if there are any.
fn content(place: &Place, records: Vec<Record>) -> Option<Content> {
    let body = (!records.is_empty()).then(|| RecordBatch { records }.encode())?;
    Some(Content::Sealed { kind: KIND_RECORDS, stream: folder_stream(&place.id), body })
}

/// Takes in what was found and told.
pub fn told(
    txn: &mut Txn<'_>,
    place: &Place,
    differences: &[Difference],
    appended: Option<&Appended>,
    telling: Telling,
) -> Result<Told, StoreError> {
    let mut pending = false;
    let mut directories = HashSet::new();
    for Step { difference, said } in telling.steps {
        let Difference { path, after, before } = &differences[difference];
        let key = path.key();
        let mut versions = rows::versions(txn.reader().file(place.fid, &key)?.as_ref())?;
        let vector = match (said, appended) {
            (Said::Told(index, record), Some(appended)) => {
                let version = Version::new(&record, Dot::new(appended.author, appended.number, index));
                let vector = version.vector.clone();
                versions.insert(version);
                vector
            }
            (Said::Same, _) => before.as_ref().map(|disk| rows::decode_vector(&disk.vector)).unwrap_or_default(),
            _ => versions.agreed(),
        };
        let disk = match after {
            After::Gone => None,
            After::Here { stat, node, settled, .. } => {
                let mut disk = rows::disk_state(stat, node, &vector);
                // a time that nothing on disk has, so that the next look reads
                disk.mtime = if *settled { disk.mtime } else { i64::MIN };
                Some(disk)
            }
        };
        let differs = differs(&txn.reader(), place, &key, &versions, disk.as_ref())?;
        pending |= differs;
        let (live, size) = extent(&versions);
        let file = txn.put_file(place.fid, &key, &versions.encode(), live, size, disk.as_ref(), differs)?;
        let chunks = match after {
            After::Gone => &[][..],
            After::Here { chunks, .. } => &chunks[..],
        };
        txn.put_chunks(file, chunks)?;
        pending |= disk.is_none() && emptied_above(txn, place, &key)?;
        if live {
            pending |= look_all_above(txn, place, path, &mut directories)?;
        }
    }
    Ok(Told { pending, stale: telling.stale })
}

/// What is to be said of a look: a record at a place of the batch, or nothing.
fn say(found: &Difference, row: Option<&FileRow>, index: u16) -> Result<Said, StoreError> {
    if matches!(found.after, After::Gone) && found.before.as_ref().is_some_and(rows::is_unlooked) {
        return Ok(Said::Adopted);
    }
    let versions = rows::versions(row)?;
    let winner = versions.winner();
    let (node, mode, mtime) = match &found.after {
        After::Gone => (Node::Deleted, 0, 0),
        After::Here { stat, node, .. } => match node {
            Node::Symlink(_) => (node.clone(), 0, stat.mtime),
            Node::Directory => (node.clone(), stat.mode, 0),
            _ => (node.clone(), stat.mode, stat.mtime),
        },
    };
    let before = found.before.as_ref().map(|disk| rows::disk(disk, &versions));
    // a time that changed alone is no change of content, and stays here
    if before.as_ref().is_some_and(|before| before.node.is_same(&node) && before.mode == mode) {
        return Ok(Said::Same);
    }
    let said = match winner {
        None => node == Node::Deleted,
        Some(winner) => {
            let same_mode = winner.mode == mode || matches!(node, Node::Symlink(_));
            // what is first seen here and is what the group has is taken as that
            winner.node.is_same(&node) && (same_mode || found.before.is_none())
        }
    };
    let basis = match (said, &before) {
        (false, before) => basis(&versions, before.as_ref()),
        (true, Some(before)) => match overtaken(&versions, before, &node) {
            Some(basis) => basis,
            None => return Ok(Said::Adopted),
        },
        (true, None) => return Ok(Said::Adopted),
    };
    Ok(Said::Told(index, Record { path: found.path.clone(), node, mode, mtime, basis }))
}

/// What a change comes to where nothing is told from here: what the group has anyway is taken as that, and of a mode that
/// was set the look is noted, or nothing could be put there any more. Anything else is looked at again.
fn unsaid(found: &Difference, row: Option<&FileRow>, record: &Record) -> Result<Option<Said>, StoreError> {
    let versions = rows::versions(row)?;
    if versions.winner().is_some_and(|winner| winner.node.is_same(&record.node) && winner.mode == record.mode) {
        return Ok(Some(Said::Adopted));
    }
    let before = found.before.as_ref().map(|disk| rows::disk(disk, &versions));
    Ok(before.filter(|before| before.node.is_same(&record.node)).map(|_| Said::Same))
}

// ---- what settles a conflict ----

/// What lies at a path and lost, with its chunks.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "a version with its chunks and nothing else")]
pub struct Loser {
    /// The version.
    pub version: Version,
    /// The chunks of it.
    pub chunks: Vec<ChunkRow>,
}

/// What is at a path whose version was set aside.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_enums, reason = "it is here, comes later or lost")]
pub enum Winner {
    /// What won, with its chunks.
    Here(Stat, Vec<ChunkRow>),
    /// Nothing yet: what won needs no content and comes in the next round.
    Next,
    /// Something else was faster: nothing is told of it.
    Lost,
}

/// A version that was set aside, and is still to be told.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever sets something aside says all of it")]
pub struct Aside {
    /// Where it lay.
    pub path: TreePath,
    /// Where it lies now.
    pub copy: TreePath,
    /// What the file system says of it there.
    pub stat: Stat,
    /// What it is.
    pub loser: Loser,
    /// What takes its place.
    pub take: Disk,
    /// What is at its path by now.
    pub winner: Winner,
}

/// A text that was merged from what lay at a path and what won; both are kept.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever merges says all of it")]
pub struct Merged {
    /// Where.
    pub path: TreePath,
    /// What won; its vector is the basis of what is told.
    pub take: Disk,
    /// What the file system says of the merged text.
    pub stat: Stat,
    /// Its content.
    pub content: FileContent,
    /// Its chunks.
    pub chunks: Vec<ChunkRow>,
    /// Whether a later change shows in the file's time.
    pub settled: bool,
    /// What was merged.
    pub kept: Vec<NewKept>,
}

/// A conflict that is settled on disk, and is still to be told.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_enums, reason = "both versions stay, or both are one")]
pub enum Conflict {
    /// What lost lies beside what won.
    Aside(Aside),
    /// Both are one text.
    Merged(Merged),
}

impl Conflict {
    /// The name that is claimed for it beside its path.
    #[must_use]
    pub fn copy(&self) -> Option<&TreePath> {
        match self {
            Self::Aside(aside) => Some(&aside.copy),
            Self::Merged(_) => None,
        }
    }
}

/// The records that settle conflicts: built by [`settle`], taken in by [`settled`].
#[derive(Debug)]
pub struct Settling(Vec<[Option<Record>; 2]>);

/// The entry that settles conflicts: of each the copy, if there is one, and what lies at the path now.
///
/// What was renamed is durable already. What won is told only while it still wins: of what was superseded meanwhile only
/// the index learns that it lies here, and of the loser it is told that it is there no longer.
pub fn settle(
    reader: &Reader<'_>,
    place: &Place,
    conflicts: &[Conflict],
) -> Result<(Option<Content>, Settling), StoreError> {
    let known = |path: &TreePath| rows::versions(reader.file(place.fid, &path.key())?.as_ref());
    let mut settling = Vec::new();
    for conflict in conflicts {
        settling.push(match conflict {
            Conflict::Aside(Aside { path, copy, loser, take, winner, .. }) => {
                let basis = basis(&known(copy)?, None);
                let [copy, won] = sync_core::folder::settle(path.clone(), take, copy.clone(), basis, &loser.version);
                let now = known(path)?;
                let still_wins = |now: &Version| now.node.is_same(&take.node);
                let wins = !matches!(winner, Winner::Lost)
                    && (now.winner().is_some_and(still_wins)
                        // a directory that nobody told, and that is there for what is below it: untold, what it hid
                        // would be back when that is gone
                        || (take.node == Node::Directory && live_below(reader, place.fid, &path.key())?));
                let won = if wins { Some(won) } else { moved_aside(path.clone(), &now, &loser.version) };
                [Some(copy), won]
            }
            Conflict::Merged(Merged { path, take, stat, content, .. }) => {
                let (node, basis) = (Node::File(content.clone()), take.vector.clone());
                [None, Some(Record { path: path.clone(), node, mode: stat.mode, mtime: stat.mtime, basis })]
            }
        });
    }
    let records = settling.iter().flatten().flatten().cloned().collect();
    Ok((content(place, records), Settling(settling)))
}

/// Takes in what settled conflicts, with what lies on disk.
pub fn settled(
    txn: &mut Txn<'_>,
    place: &Place,
    conflicts: &[Conflict],
    appended: &Appended,
    settling: Settling,
) -> Result<(), StoreError> {
    let mut index = 0u16;
    let mut version_of = |record: Record| {
        let version = Version::new(&record, Dot::new(appended.author, appended.number, index));
        index += 1;
        version
    };
    for (conflict, records) in conflicts.iter().zip(settling.0) {
        let [copy, won] = records.map(|record| record.map(&mut version_of));
        match conflict {
            Conflict::Aside(aside) => {
                let vector = copy.as_ref().map(|version| version.vector.clone()).unwrap_or_default();
                let state = rows::disk_state(&aside.stat, &aside.loser.version.node, &vector);
                put_told(txn, place, &aside.copy, copy, Some(state), &aside.loser.chunks)?;
                let lies_here = |version: &&Version| version.node.is_same(&aside.take.node);
                let vector = won.as_ref().filter(lies_here).map_or(&aside.take.vector, |version| &version.vector);
                let (state, chunks) = match &aside.winner {
                    Winner::Here(stat, chunks) => (Some(rows::disk_state(stat, &aside.take.node, vector)), &chunks[..]),
                    Winner::Next | Winner::Lost => (None, &[][..]),
                };
                put_told(txn, place, &aside.path, won, state, chunks)?;
            }
            Conflict::Merged(merged) => {
                let vector = won.as_ref().map(|version| version.vector.clone()).unwrap_or_default();
                let mut state = rows::disk_state(&merged.stat, &Node::File(merged.content.clone()), &vector);
                // a time that nothing on disk has, so that the next look reads
                state.mtime = if merged.settled { state.mtime } else { i64::MIN };
                put_told(txn, place, &merged.path, won, Some(state), &merged.chunks)?;
                for kept in &merged.kept {
                    txn.add_kept(place.fid, kept)?;
                }
            }
        }
    }
    Ok(())
}

/// Puts what was told and what lies at a path into the index.
fn put_told(
    txn: &mut Txn<'_>,
    place: &Place,
    path: &TreePath,
    version: Option<Version>,
    disk: Option<DiskState>,
    chunks: &[ChunkRow],
) -> Result<(), StoreError> {
    let key = path.key();
    let row = txn.reader().file(place.fid, &key)?;
    let mut versions = rows::versions(row.as_ref())?;
    version.map(|version| versions.insert(version));
    let pending = differs(&txn.reader(), place, &key, &versions, disk.as_ref())?;
    let (live, size) = extent(&versions);
    let file = txn.put_file(place.fid, &key, &versions.encode(), live, size, disk.as_ref(), pending)?;
    if row.is_none() && !place.takes(&key) {
        // a conflict copy beside the one file that is selected
        txn.set_left_out(file, true)?;
    }
    txn.put_chunks(file, chunks)
}
