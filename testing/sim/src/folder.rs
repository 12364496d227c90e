//! What one replica does for a folder: the functions of `sync-client`, on the simulated disk and without its tasks.
//!
//! What the tasks of the engine do beside each other are steps here, and the world decides which comes next: looking at
//! the tree, telling what was found, taking in what the log says, deciding, and carrying out some operations.

use std::collections::{BTreeSet, VecDeque};

use sync_client::folders::Direction;
use sync_client::folders::carry::{Desk, Executor, Job, Whole, place_all};
use sync_client::folders::index::{
    self, After, Applied, Batch, Candidate, Comparison, Conflict, Difference, Finished, Loser, Merged, Next, Place,
};
use sync_client::folders::rows::{self, ChunkRow};
use sync_core::folder::{Operation, plan};
use sync_folder::apply::{ApplyError, Expected};
use sync_folder::cut::Cutter;
use sync_folder::selection::Selection;
use sync_store::{FileRow, FolderRowId, StoreError};
use sync_types::folder::{KIND_RECORDS, Node, RecordBatch, TreePath, folder_stream};
use sync_types::{Charter, Cursor, Envelope, EnvelopeHash, FolderId, GroupId, Timestamp};

use crate::ledger::{Broken, DURABLE};
use crate::replica::{ALL, Running};
use crate::tree::{Ready, Tree};

/// The only folder of a group.
pub(crate) const FOLDER: FolderId = FolderId([7; 16]);
/// New files held back until the walk has shown which ones are gone.
const HELD_BACK: usize = 1000;

/// A folder with a place here, while the replica is up.
pub(crate) struct Folder {
    place: Place,
    cutter: Cutter,
    /// Own entries that were taken into the index when they were told.
    own: BTreeSet<EnvelopeHash>,
    /// What a look at the tree found and is not told yet.
    found: Vec<Difference>,
    /// What was decided and is not done yet.
    operations: VecDeque<Operation>,
    executor: Executor,
    /// Entries appended since this was last asked.
    pub(crate) told: Vec<EnvelopeHash>,
    /// Something is to be looked at again.
    pub(crate) look_again: bool,
    /// How much was done so far.
    pub(crate) done: u64,
    /// What was done, for whoever replays a run.
    pub(crate) notes: Vec<String>,
    /// A promise that was seen to be broken.
    pub(crate) broken: Option<Broken>,
}

/// Where chunks are had from: places that are connected, by hash and length.
pub(crate) type Fetch<'a> = dyn FnMut(&[u8; 32], u64) -> Option<Vec<u8>> + 'a;

/// Puts the folder into the database.
pub(crate) fn settle(running: &mut Running) -> Result<(), StoreError> {
    let group = running.group;
    running.db.write(|txn| {
        let fid = txn.add_folder(&group, &FOLDER, "folder")?;
        txn.set_folder_root(fid, Some("/"))
    })
}

/// Reads a chunk where the index says that it lies.
pub(crate) fn read_chunk(
    running: &Running,
    tree: &Tree,
    group: &GroupId,
    hash: &[u8; 32],
    len: u64,
) -> Result<Option<Vec<u8>>, StoreError> {
    let places = running.db.read(|reader| reader.chunk_places(group, hash, 8))?;
    let read = |place: sync_store::ChunkPlace| {
        let bytes = tree.read(&TreePath::from_key(&place.key)?)?;
        let from = usize::try_from(place.offset).ok()?;
        let chunk = bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)?;
        (blake3::hash(chunk) == *hash).then(|| chunk.to_vec())
    };
    if let Some(chunk) = places.into_iter().filter(|place| place.len == len).find_map(read) {
        return Ok(Some(chunk));
    }
    let kept = running.db.read(|reader| reader.kept_places(group, hash, 8))?;
    let read = |(_, kept, from, _): (_, sync_store::KeptRow, u64, u64)| {
        let bytes = tree.read_kept(&kept.name)?;
        let from = usize::try_from(from).ok()?;
        let chunk = bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)?;
        (blake3::hash(chunk) == *hash).then(|| chunk.to_vec())
    };
    Ok(kept.into_iter().filter(|(.., at_hand)| *at_hand == len).find_map(read))
}

impl Folder {
    /// The folder of a database, if it has a place there.
    pub(crate) fn open(running: &Running) -> Result<Option<Self>, StoreError> {
        let group = running.group;
        let (row, charter) =
            running.db.read(|reader| Ok((reader.folder(&group, &FOLDER)?, reader.group(&group)?.charter)))?;
        let Some(row) = row.filter(|row| row.root.is_some()) else { return Ok(None) };
        let damaged = || StoreError::Corrupt("a charter".into());
        let charter = Charter::decode(&charter).map_err(|_| damaged())?;
        let seed = running.with_keys(|keys| keys.chunker_seed());
        Ok(Some(Self {
            place: Place { fid: row.fid, id: FOLDER, way: Direction::Both, selection: Selection::default() },
            cutter: Cutter::new(&charter.chunker, seed).map_err(|_| damaged())?,
            own: BTreeSet::new(),
            found: Vec::new(),
            operations: VecDeque::new(),
            executor: Executor::default(),
            told: Vec::new(),
            look_again: false,
            done: 0,
            notes: Vec::new(),
            broken: None,
        }))
    }

    /// Its row.
    pub(crate) fn fid(&self) -> FolderRowId {
        self.place.fid
    }

    /// Whether something that was found is not told yet.
    pub(crate) fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// Whether something that was decided is not done yet.
    pub(crate) fn has_operations(&self) -> bool {
        !self.operations.is_empty()
    }

    /// Compares the tree with the index; whether a file has to be read again soon.
    pub(crate) fn scan(&mut self, running: &Running, tree: &Tree) -> Result<bool, StoreError> {
        let fid = self.place.fid;
        let mut comparison = Comparison::new(HELD_BACK);
        let (mut found, mut candidates) = (Vec::new(), Vec::new());
        let rows = running.db.read(|reader| reader.files_after(fid, None, usize::MAX))?;
        let mut rows = rows.into_iter().peekable();
        for (path, stat, target) in tree.walk() {
            let key = path.key();
            while let Some(row) = rows.next_if(|row| row.key < key) {
                missing(&mut comparison, row);
            }
            let row = rows.next_if(|row| row.key == key);
            let only_stays = row.as_ref().is_some_and(rows::only_stays);
            let before = row.and_then(|row| row.disk);
            if before.as_ref().is_some_and(|disk| rows::looks_the_same(disk, &stat)) && !only_stays {
                tree.forget_edit(&path);
                continue;
            }
            match comparison.here(path, stat, target, before) {
                Next::Wait => {}
                Next::Read(candidate) => candidates.push(candidate),
                Next::Tell(difference) => found.push(difference),
            }
        }
        rows.for_each(|row| missing(&mut comparison, row));
        comparison.look_for_gone(|path| Some(tree.stat(path).is_some()));
        let Finished { first, read, last } = running.db.read(|reader| comparison.finish(reader))?;
        found.extend(first);
        candidates.extend(read);
        let mut unsettled = false;
        for Candidate { path, stat, before } in candidates {
            let Some(bytes) = tree.read(&path) else { continue };
            let Ok((content, list)) = self.cutter.cut_bytes(&bytes) else { continue };
            let settled = tree.is_settled(stat.mtime);
            unsettled |= !settled;
            let chunks = rows::chunk_rows(&content, list.as_deref());
            let after = After::Here { stat, node: Node::File(content), chunks, settled };
            found.push(Difference { path, before, after });
        }
        found.extend(last);
        self.found = found;
        Ok(unsettled)
    }

    /// Tells what a look found; whether something is to be done now.
    pub(crate) fn tell(&mut self, running: &mut Running, tree: &Tree, now: Timestamp) -> Result<bool, StoreError> {
        let found = std::mem::take(&mut self.found);
        if found.is_empty() {
            return Ok(false);
        }
        let place = self.place.clone();
        let (hash, told) = running.append_built(
            now,
            |reader| index::tell(reader, &place, &found),
            |txn, appended, telling| index::told(txn, &place, &found, appended, telling),
        )?;
        self.remember(hash);
        // a directory that only stays is told of at every look
        let is_new = |found: &Difference| match &found.after {
            After::Here { stat, .. } => !found.before.as_ref().is_some_and(|disk| rows::looks_the_same(disk, stat)),
            After::Gone => true,
        };
        self.done += u64::from(found.iter().any(is_new));
        self.notes.extend(found.iter().map(|found| format!("found {found:?}")));
        self.look_again |= !told.stale.is_empty();
        for Difference { path, after, .. } in found.iter().filter(|found| !told.stale.contains(&found.path)) {
            if let After::Here { node: Node::File(file), .. } = after {
                tree.is_seen(&file.hash);
            }
            let still = match after {
                After::Gone => tree.stat(path).is_none(),
                After::Here { stat, settled, .. } => *settled && tree.stat(path) == Some(*stat),
            };
            if still {
                tree.forget_edit(path);
            }
        }
        Ok(told.pending)
    }

    fn remember(&mut self, hash: Option<EnvelopeHash>) {
        self.told.extend(hash);
        self.own.extend(hash);
    }

    /// Takes in everything that the log says and was not taken in; whether something is to be done now.
    pub(crate) fn take_in(&mut self, running: &mut Running) -> Result<bool, StoreError> {
        let (group, stream) = (running.group, folder_stream(&self.place.id));
        let row = running.db.read(|reader| reader.folder(&group, &self.place.id))?;
        let Some(after) = row.map(|row| row.cursor) else { return Ok(false) };
        let sealed = running.db.read(|reader| reader.read_sealed(&group, after, ALL))?;
        if sealed.max_cursor == after {
            return Ok(false);
        }
        let mut batches = Vec::new();
        for entry in &sealed.entries {
            let Ok(envelope) = Envelope::parse(&entry.bytes) else { continue };
            if self.own.remove(&envelope.hash()) {
                continue;
            }
            let Ok(content) = running.with_keys(|keys| keys.unseal(&envelope)) else { continue };
            if content.kind != KIND_RECORDS || content.stream != stream {
                continue;
            }
            if let Ok(RecordBatch { records }) = RecordBatch::decode(&content.body) {
                batches.push(Batch { author: entry.author, number: entry.number, records });
            }
        }
        let place = self.place.clone();
        self.done += 1;
        running.db.write(|txn| index::take(txn, &place, batches, sealed.max_cursor))
    }

    /// Every version that the log says, by path.
    pub(crate) fn everything_said(
        running: &Running,
    ) -> Result<Vec<(TreePath, sync_core::folder::Version)>, StoreError> {
        let (group, stream) = (running.group, folder_stream(&FOLDER));
        let sealed = running.db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL))?;
        let mut said = Vec::new();
        for entry in &sealed.entries {
            let Ok(envelope) = Envelope::parse(&entry.bytes) else { continue };
            let Ok(content) = running.with_keys(|keys| keys.unseal(&envelope)) else { continue };
            if content.kind != KIND_RECORDS || content.stream != stream {
                continue;
            }
            let Ok(batch) = RecordBatch::decode(&content.body) else { continue };
            for (index, record) in (0..=u16::MAX).zip(batch.records) {
                let dot = sync_types::folder::Dot::new(entry.author, entry.number, index);
                said.push((record.path.clone(), sync_core::folder::Version::new(&record, dot)));
            }
        }
        Ok(said)
    }

    /// What kept versions that the index lists hold.
    pub(crate) fn listed_versions(&self, running: &Running, tree: &Tree) -> Result<BTreeSet<[u8; 32]>, StoreError> {
        let kept = running.db.read(|reader| reader.kept_oldest(self.place.fid, None, usize::MAX))?;
        let bytes = kept.iter().filter_map(|kept| tree.read_kept(&kept.name));
        Ok(bytes.map(|bytes| *blake3::hash(&bytes).as_bytes()).collect())
    }

    /// Decides what is to be done.
    pub(crate) fn decide(&mut self, running: &mut Running, tree: &Tree, now: Timestamp) -> Result<(), StoreError> {
        let place = self.place.clone();
        let page = running.db.read(|reader| reader.pending_after(place.fid, None, usize::MAX))?;
        if page.is_empty() {
            return Ok(());
        }
        let decided = running.db.read(|reader| index::decide_all(reader, &place, page))?;
        running.db.write(|txn| index::commit(txn, &place, decided.settled, now))?;
        let planned = plan(decided.changes, |path| tree.entries(path));
        self.executor = Executor::new(decided.known);
        let known = self.executor.known();
        let kept: Vec<_> =
            planned.kept.into_iter().filter_map(|path| Some((path.clone(), known.get(&path)?.disk.clone()?))).collect();
        running.db.write(|txn| index::keep(txn, &place, &kept))?;
        self.operations = planned.operations.into();
        Ok(())
    }

    /// Carries out some operations; whether another round gets on at once.
    pub(crate) fn carry_out(
        &mut self,
        running: &mut Running,
        tree: &Tree,
        now: Timestamp,
        most: usize,
        fetch: &mut Fetch<'_>,
    ) -> Result<bool, StoreError> {
        let is_job = self.operations.front().is_some_and(Job::is_one);
        let mut some = Vec::new();
        while some.len() < most && self.operations.front().is_some_and(|next| Job::is_one(next) == is_job) {
            some.extend(self.operations.pop_front());
        }
        self.notes.extend(some.iter().map(|operation| format!("{operation:?}")));
        let mut executor = std::mem::take(&mut self.executor);
        let done = if is_job {
            let jobs: Vec<Job> =
                some.into_iter().filter_map(|operation| Job::of(operation, executor.known())).collect();
            self.assemble(running, tree, now, &jobs, fetch)
        } else {
            let mut desk = Bench { running, folder: self, tree, now };
            executor.run(tree, &mut desk, some)
        };
        let again = executor.goes_on() && self.operations.is_empty();
        self.executor = executor;
        done.map(|()| again)
    }

    fn assemble(
        &mut self,
        running: &mut Running,
        tree: &Tree,
        now: Timestamp,
        jobs: &[Job],
        fetch: &mut Fetch<'_>,
    ) -> Result<(), StoreError> {
        let group = running.group;
        let mut whole = Vec::new();
        for job in jobs {
            let Node::File(content) = &job.take.node else { continue };
            let chunks = rows::chunk_rows(content, None);
            let mut bytes = vec![0; usize::try_from(content.size).unwrap_or(0)];
            let mut all = true;
            for (hash, offset, len) in &chunks {
                let chunk = match read_chunk(running, tree, &group, hash, *len)? {
                    Some(chunk) => Some(chunk),
                    None => fetch(hash, *len).filter(|chunk| blake3::hash(chunk) == *hash),
                };
                let from = usize::try_from(*offset).unwrap_or(usize::MAX);
                match chunk.and_then(|chunk| Some((bytes.get_mut(from..from.checked_add(chunk.len())?)?, chunk))) {
                    Some((place, chunk)) => place.copy_from_slice(&chunk),
                    None => all = false,
                }
            }
            if !all || blake3::hash(&bytes) != content.hash {
                continue;
            }
            match tree.receive(bytes, job.take.mode, job.take.mtime) {
                Ok(ready) => whole.push(Whole { job, ready, chunks }),
                Err(_) => self.look_again = true,
            }
        }
        if whole.is_empty() {
            return Ok(());
        }
        place_all(tree, &mut Bench { running, folder: self, tree, now }, whole).map(drop)
    }
}

fn missing(comparison: &mut Comparison, row: FileRow) {
    if row.disk.is_some() {
        comparison.missing(row);
    }
}

/// The index of a replica, for whoever carries something out.
struct Bench<'a> {
    running: &'a mut Running,
    folder: &'a mut Folder,
    tree: &'a Tree,
    now: Timestamp,
}

impl Bench<'_> {
    /// Nothing is said of a path in the index before it is durable on disk; and nothing at all without power.
    fn check(&mut self, paths: &[&TreePath]) -> Result<(), StoreError> {
        if self.tree.is_dead() {
            return Err(StoreError::Io(std::sync::Arc::new(std::io::Error::other("the power is cut"))));
        }
        if let Some(path) = paths.iter().find(|path| self.tree.is_unsynced(path)) {
            let text = format!("the index is told of {path} before it is durable on disk");
            self.folder.broken = Some(Broken { name: DURABLE, text });
        }
        Ok(())
    }
}

impl Desk<Tree> for Bench<'_> {
    fn row(&mut self, path: &TreePath) -> Result<Option<FileRow>, StoreError> {
        let (fid, key) = (self.folder.place.fid, path.key());
        self.running.db.read(|reader| reader.file(fid, &key))
    }

    fn commit(&mut self, applied: Vec<Applied>) -> Result<(), StoreError> {
        if applied.is_empty() {
            return Ok(());
        }
        self.check(&applied.iter().map(|applied| &applied.path).collect::<Vec<_>>())?;
        let (place, now) = (self.folder.place.clone(), self.now);
        self.folder.done += 1;
        self.running.db.write(|txn| index::commit(txn, &place, applied, now)).map(drop)
    }

    fn merge(
        &mut self,
        _files: &Tree,
        _job: &Job,
        _loser: &Loser,
        _won: (&Ready, &[ChunkRow]),
        _expected: Expected,
    ) -> Result<Option<Merged>, ApplyError> {
        // what is written here is no text
        Ok(None)
    }

    fn settle(&mut self, conflicts: Vec<Conflict>) -> Result<(), StoreError> {
        if conflicts.is_empty() {
            return Ok(());
        }
        let paths: Vec<&TreePath> = conflicts
            .iter()
            .flat_map(|conflict| match conflict {
                Conflict::Aside(aside) => vec![&aside.path, &aside.copy],
                Conflict::Merged(merged) => vec![&merged.path],
            })
            .collect();
        self.check(&paths)?;
        let place = self.folder.place.clone();
        let (hash, ()) = self.running.append_built(
            self.now,
            |reader| index::settle(reader, &place, &conflicts),
            |txn, appended, settling| match appended {
                Some(appended) => index::settled(txn, &place, &conflicts, appended, settling),
                None => Ok(()),
            },
        )?;
        self.folder.remember(hash);
        self.folder.done += 1;
        Ok(())
    }

    fn claim(&mut self, _path: &TreePath) {}

    fn release(&mut self, _paths: &[TreePath]) {}

    fn look_again(&mut self, _path: &TreePath) {
        self.folder.look_again = true;
    }

    fn note(&mut self, path: &TreePath, problem: Option<String>) {
        self.folder.notes.push(match problem {
            None => format!("{path} is done"),
            Some(problem) => format!("{path} is not done: {problem}"),
        });
    }
}
