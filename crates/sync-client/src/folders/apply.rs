//! Makes the folder what the group says: decides, plans, and carries out, a page of paths at a time.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sync_core::folder::{
    Action, Change, Counts, Disk, Guard, Operation, Over, Seen, Verdict, Version, Versions, decide, plan,
};
use sync_folder::apply::{Applier, ApplyError, Expected};
use sync_folder::versions::Kept;
use sync_folder::walk::{self, Kind};
use sync_store::{DiskState, FileRow, FolderRowId, NewKept, Reader, StoreError, Txn};
use sync_types::folder::{Node, TreePath};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::assemble::{self, DIRECTORY_MODE, Job};
use super::conflicts::{self, Loser};
use super::engine::Folder;
use super::rows::{self, ChunkRow};
use super::status::Direction;
use super::versions;
use crate::chunks::{ChunkFetcher, FetchQueue, Fetched};
use crate::group::now;

/// Paths decided on together: renames are found among them.
const PAGE: usize = 8192;
/// Rows below a path that are looked through at once for one that is live.
const LOOKED_THROUGH: usize = 64;
/// Paths whose new state is committed together.
const COMMITTED: usize = 1024;
/// Rounds one after the other where each left something for the next: a conflict takes two.
const ROUNDS: usize = 8;
/// Bytes from which a file is received beside everything else.
const LARGE: u64 = 32 << 20;
/// Large files received at once.
const LARGE_AT_ONCE: usize = 16;
/// Paths below which nothing is ever held back.
const LEAST_HELD: u64 = 20;
/// Wait before what could not be done is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Time between two looks at which versions are too many.
const TRIM: Duration = Duration::from_secs(3600);

/// What came of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// Nothing is left to do.
    Done,
    /// Something is left for later.
    Left,
}

/// What was done at a path.
pub(crate) struct Applied {
    pub(crate) path: TreePath,
    pub(crate) disk: Option<DiskState>,
    pub(crate) chunks: Vec<ChunkRow>,
    pub(crate) kept: Option<Kept>,
}

/// What applying keeps from round to round.
struct Applying {
    queue: FetchQueue,
    fetched: mpsc::Receiver<Fetched>,
}

/// Applies what is pending until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>) {
    let mut pending = folder.pending.subscribe();
    let mut progress = folder.group.watch_progress();
    let mut applying = Applying::new(&folder);
    let mut trimmed: Option<Instant> = None;
    loop {
        pending.borrow_and_update();
        progress.borrow_and_update();
        let mut left = false;
        if folder.direction != Direction::SendOnly && !folder.is_stopped() && folder.root().is_some() {
            folder.set_applying(true);
            match applying.round(&folder).await {
                Ok(Round::Done) => folder.set_path_problem("", None),
                Ok(Round::Left) => left = true,
                Err(StoreError::Closed) => return,
                Err(error) => {
                    folder.set_path_problem("", Some(error.to_string()));
                    left = true;
                }
            }
            folder.set_applying(false);
            if trimmed.is_none_or(|trimmed| trimmed.elapsed() >= TRIM) {
                trimmed = Some(Instant::now());
                if let Err(error) = versions::trim(&folder).await {
                    tracing::debug!(%error, "versions stay");
                }
            }
        }
        tokio::select! {
            () = folder.cancel.cancelled() => return,
            changed = pending.changed() => if changed.is_err() { return },
            changed = progress.changed(), if left => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if left => {}
        }
    }
}

/// Receives large files beside everything else, so that a saved text does not wait for a film.
pub(crate) async fn run_large(folder: Arc<Folder>, mut jobs: mpsc::Receiver<Job>) {
    let (queue, mut fetched) = ChunkFetcher::new(folder.group.clone());
    let mut batch = Vec::new();
    loop {
        let received = tokio::select! {
            received = jobs.recv_many(&mut batch, LARGE_AT_ONCE) => received,
            () = folder.cancel.cancelled() => return,
        };
        if received == 0 {
            return;
        }
        let batch = std::mem::take(&mut batch);
        let paths: Vec<TreePath> = batch.iter().map(|job| job.path.clone()).collect();
        let left = match applier(&folder).await {
            Some(applier) => assemble::run(&folder, &applier, &queue, &mut fetched, batch).await,
            None => Ok(batch.len()),
        };
        match left {
            Err(StoreError::Closed) => return,
            // tried again when it is decided on again
            Ok(1..) | Err(_) => tokio::time::sleep(RETRY).await,
            Ok(0) => {}
        }
        folder.release_large(paths);
        folder.wake();
    }
}

/// Names of files that were being received and are still wanted.
async fn resumed(folder: &Arc<Folder>) -> Result<BTreeSet<String>, StoreError> {
    let mut names = BTreeSet::new();
    let mut after: Option<Vec<u8>> = None;
    loop {
        let (fid, from) = (folder.fid, after.clone());
        let page = folder.store().read(move |reader| reader.pending_after(fid, from.as_deref(), PAGE)).await?;
        let Some(last) = page.last() else { return Ok(names) };
        after = Some(last.key.clone());
        for row in &page {
            let versions = rows::versions(Some(row))?;
            let (Some(winner), Some(path)) = (versions.winner(), TreePath::from_key(&row.key)) else { continue };
            if let Node::File(file) = &winner.node {
                names.extend(assemble::resumed_as(&path, file));
            }
        }
    }
}

/// What changes the folder's tree; none while the folder is not there.
async fn applier(folder: &Arc<Folder>) -> Option<Arc<Applier>> {
    let root = folder.root()?;
    let applier = {
        let mut known = folder.applier.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*known {
            Some(applier) if Arc::ptr_eq(applier.root(), &root) => return Some(applier.clone()),
            _ => known.insert(Arc::new(Applier::new(root))).clone(),
        }
    };
    let keep = match resumed(folder).await {
        Ok(keep) => keep,
        Err(error) => {
            tracing::debug!(%error, "what was being received before stays");
            return Some(applier);
        }
    };
    let clearing = applier.clone();
    let cleared = tokio::task::spawn_blocking(move || clearing.clear_stale(&keep));
    if let Ok(Err(error)) = cleared.await {
        tracing::debug!(%error, "what was being received before stays");
    }
    Some(applier)
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
    fid: FolderRowId,
    key: &[u8],
    versions: &Versions,
    disk: Option<&Disk>,
    way: Direction,
) -> Result<Action, StoreError> {
    let directory = versions.winner().is_some_and(|winner| winner.node == Node::Directory);
    let live_below = !directory && live_below(reader, fid, key)?;
    Ok(decide(&Seen { versions, disk, live_below, direction: direction(way) }))
}

/// Whether something is to be done at a path.
pub(crate) fn differs(
    reader: &Reader<'_>,
    fid: FolderRowId,
    key: &[u8],
    versions: &Versions,
    disk: Option<&DiskState>,
    way: Direction,
) -> Result<bool, StoreError> {
    let disk = disk.map(|disk| rows::disk(disk, versions));
    let action = action(reader, fid, key, versions, disk.as_ref(), way)?;
    Ok(!matches!(action, Action::Nothing | Action::Held(_)))
}

/// Whether something is at a path, and its bytes.
pub(crate) fn extent(versions: &Versions) -> (bool, u64) {
    let size = match versions.winner().map(|winner| &winner.node) {
        Some(Node::File(file)) => file.size,
        _ => 0,
    };
    (versions.is_live(), size)
}

/// What was kept, as the database has it, with the hash and the chunks of what lay there where those are known.
pub(crate) fn new_kept(path: &TreePath, kept: Kept, hash: Option<[u8; 32]>, chunks: Vec<ChunkRow>) -> NewKept {
    let Kept { name, size, mode, mtime, .. } = kept;
    let whole = matches!(&chunks[..], [(chunk, ..)] if Some(*chunk) == hash);
    let chunks = if whole { Vec::new() } else { chunks };
    NewKept { key: path.key(), at: now(), name, size, hash, mode, mtime, reason: 0, chunks }
}

/// What was kept of what the index says lay at a path.
pub(crate) fn kept_from(
    reader: &Reader<'_>,
    fid: FolderRowId,
    path: &TreePath,
    kept: Kept,
) -> Result<NewKept, StoreError> {
    let row = reader.file(fid, &path.key())?;
    let known = row.and_then(|row| Some((row.file, row.disk.filter(|disk| disk.size == kept.size)?.hash?)));
    Ok(match known {
        Some((file, hash)) if kept.kind == Kind::File => new_kept(path, kept, Some(hash), reader.chunk_list(file)?),
        _ => new_kept(path, kept, None, Vec::new()),
    })
}

/// Notes what was done, in one commit; what the group says meanwhile is compared again.
pub(crate) async fn commit(folder: &Folder, applied: Vec<Applied>) -> Result<(), StoreError> {
    if applied.is_empty() {
        return Ok(());
    }
    let (fid, way) = (folder.fid, folder.direction);
    let bytes = applied.len() * 512;
    applied.iter().filter(|applied| applied.disk.is_some()).for_each(|applied| folder.keep_text(&applied.path));
    let work = move |txn: &mut Txn<'_>| {
        let mut pending = false;
        for Applied { path, disk, chunks, kept } in applied {
            if let Some(kept) = kept {
                let kept = kept_from(&txn.reader(), fid, &path, kept)?;
                txn.add_kept(fid, &kept)?;
            }
            pending |= put(txn, fid, &path.key(), disk.as_ref(), &chunks, way)?;
        }
        Ok(pending)
    };
    if folder.store().write(bytes, work).await? {
        folder.wake();
    }
    Ok(())
}

/// Puts what lies on disk into the index; whether something is still to be done there.
fn put(
    txn: &mut Txn<'_>,
    fid: FolderRowId,
    key: &[u8],
    disk: Option<&DiskState>,
    chunks: &[ChunkRow],
    way: Direction,
) -> Result<bool, StoreError> {
    let versions = rows::versions(txn.reader().file(fid, key)?.as_ref())?;
    let pending = differs(&txn.reader(), fid, key, &versions, disk, way)?;
    let (live, size) = extent(&versions);
    let file = txn.put_file(fid, key, &versions.encode(), live, size, disk, pending)?;
    txn.put_chunks(file, chunks)?;
    let emptied = disk.is_none() && emptied_above(txn, fid, key)?;
    Ok(pending || emptied)
}

/// Something went from a path: a directory above it that others removed or replaced, and that stayed because of it, is
/// looked at again.
pub(crate) fn emptied_above(txn: &mut Txn<'_>, fid: FolderRowId, key: &[u8]) -> Result<bool, StoreError> {
    let mut above = TreePath::from_key(key).and_then(|path| path.parent());
    let mut found = false;
    while let Some(directory) = above {
        let Some(row) = txn.reader().file(fid, &directory.key())? else { return Ok(found) };
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

/// A path that is to be changed, and what the index says of it.
struct Known {
    disk: Option<DiskState>,
    chunks: Vec<ChunkRow>,
}

impl Applying {
    fn new(folder: &Arc<Folder>) -> Self {
        let (queue, fetched) = ChunkFetcher::new(folder.group.clone());
        Self { queue, fetched }
    }

    /// Does what can be done now.
    async fn round(&mut self, folder: &Arc<Folder>) -> Result<Round, StoreError> {
        let Some(applier) = applier(folder).await else { return Ok(Round::Left) };
        if self.is_held(folder, &applier).await? {
            return Ok(Round::Done);
        }
        let mut left = 0;
        for _ in 0..ROUNDS {
            left = 0;
            let mut again = false;
            let mut after: Option<Vec<u8>> = None;
            loop {
                let (fid, from) = (folder.fid, after.clone());
                let page = folder.store().read(move |reader| reader.pending_after(fid, from.as_deref(), PAGE)).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.key.clone());
                let (more_left, more_again) = self.page(folder, &applier, page).await?;
                left += more_left;
                again |= more_again;
                if folder.cancel.is_cancelled() {
                    return Ok(Round::Left);
                }
            }
            if !again {
                break;
            }
        }
        Ok(if left > 0 { Round::Left } else { Round::Done })
    }

    /// Whether so much is to go at once that somebody is asked first.
    async fn is_held(&self, folder: &Arc<Folder>, applier: &Arc<Applier>) -> Result<bool, StoreError> {
        let fid = folder.fid;
        let totals = folder.store().read(move |reader| reader.folder_totals(fid)).await?;
        if totals.pending_files < LEAST_HELD || totals.pending_files < totals.files / 4 {
            folder.hold(None);
            return Ok(false);
        }
        let mut counts = Counts::default();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let from = after.clone();
            let page = folder.store().read(move |reader| reader.pending_after(fid, from.as_deref(), PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            let (changes, ..) = decide_all(folder, page).await?;
            let root = applier.root().clone();
            let planning = tokio::task::spawn_blocking(move || plan(changes, |path| entries(&root, path)));
            let planned = planning.await.map_err(|_| StoreError::Closed)?;
            planned.displaced().for_each(|(_, how)| counts.add(how));
        }
        let verdict = lock_guard(folder).check(now().0, totals.files.saturating_add(counts.deleted), counts);
        let Verdict::Hold { deleted, rewritten, of } = verdict else {
            folder.hold(None);
            return Ok(false);
        };
        let message = format!(
            "others deleted {deleted} and rewrote {rewritten} of {of} files here at once, which is held back; \
             `syncshell confirm` applies it, `syncshell undo` brings everyone back to what is here"
        );
        folder.hold(Some((counts, message)));
        Ok(true)
    }

    /// Does what is to be done at some paths; how many are left, and whether another round gets on at once.
    async fn page(
        &mut self,
        folder: &Arc<Folder>,
        applier: &Arc<Applier>,
        page: Vec<FileRow>,
    ) -> Result<(usize, bool), StoreError> {
        let (changes, known, settled) = decide_all(folder, page).await?;
        commit(folder, settled).await?;
        let planning = {
            let root = applier.root().clone();
            tokio::task::spawn_blocking(move || plan(changes, |path| entries(&root, path)))
        };
        let planned = planning.await.map_err(|_| StoreError::Closed)?;
        {
            let (now, mut guard) = (now().0, lock_guard(folder));
            planned.displaced().for_each(|(path, how)| guard.applied(now, path, how));
        }
        let mut executor = Some(Executor {
            folder: folder.clone(),
            applier: applier.clone(),
            known,
            applied: Vec::new(),
            left: 0,
            again: false,
            handle: Handle::current(),
        });
        if let Some(executor) = &mut executor {
            executor.keep(planned.kept).await?;
        }
        let mut left = 0;
        let mut operations = planned.operations.into_iter().peekable();
        while operations.peek().is_some() {
            let mut jobs = Vec::new();
            while let Some(operation) = operations.next_if(is_job) {
                let job = executor.as_mut().and_then(|executor| job(operation, &mut executor.known));
                let Some(job) = job else { continue };
                match job.size() {
                    0..LARGE => jobs.push(job),
                    _ if folder.claim_large(&job.path) => {
                        if let Err(mpsc::error::TrySendError::Full(job)) = folder.large_jobs.try_send(job) {
                            folder.release_large([job.path]);
                            left += 1;
                        }
                    }
                    _ => {}
                }
            }
            if !jobs.is_empty() {
                left += assemble::run(folder, applier, &self.queue, &mut self.fetched, jobs).await?;
            }
            let mut others = Vec::new();
            while let Some(operation) = operations.next_if(|operation| !is_job(operation)) {
                others.push(operation);
            }
            if let (false, Some(mut doing)) = (others.is_empty(), executor.take()) {
                let done = tokio::task::spawn_blocking(move || doing.run(others).map(|()| doing));
                executor = Some(done.await.map_err(|_| StoreError::Closed)??);
            }
            if folder.cancel.is_cancelled() {
                break;
            }
        }
        let Some(executor) = executor else { return Ok((left, false)) };
        Ok((left + executor.left, executor.again))
    }
}

/// Compares rows with what lies on disk: what is to change, what is known of those paths, and what needs nothing.
async fn decide_all(
    folder: &Arc<Folder>,
    page: Vec<FileRow>,
) -> Result<(Vec<Change>, HashMap<TreePath, Known>, Vec<Applied>), StoreError> {
    let (fid, way) = (folder.fid, folder.direction);
    let deciding = folder.store().read(move |reader| {
        let mut changes = Vec::new();
        let mut known = HashMap::new();
        let mut settled = Vec::new();
        for row in page {
            let Some(path) = TreePath::from_key(&row.key) else { continue };
            let versions = rows::versions(Some(&row))?;
            let disk = row.disk.as_ref().map(|disk| rows::disk(disk, &versions));
            let action = action(reader, fid, &row.key, &versions, disk.as_ref(), way)?;
            // of what stays or moves the chunks are still there
            let chunks = match row.disk {
                Some(_) => reader.chunk_list(row.file)?,
                None => Vec::new(),
            };
            match action {
                Action::Nothing | Action::Held(_) => {
                    settled.push(Applied { path, disk: row.disk, chunks, kept: None });
                }
                action => {
                    known.insert(path.clone(), Known { disk: row.disk, chunks });
                    changes.push(Change { path, disk, action });
                }
            }
        }
        Ok((changes, known, settled))
    });
    deciding.await
}

fn lock_guard(folder: &Folder) -> std::sync::MutexGuard<'_, Guard> {
    folder.guard.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether an operation is a file whose content is to come.
fn is_job(operation: &Operation) -> bool {
    match operation {
        Operation::Write { disk, .. } | Operation::Copy { disk, .. } => matches!(disk.node, Node::File(_)),
        _ => false,
    }
}

/// The file that an operation is to make, with what is known of what lies in its place.
fn job(operation: Operation, known: &mut HashMap<TreePath, Known>) -> Option<Job> {
    let (path, take, over) = match operation {
        Operation::Write { path, disk, over } | Operation::Copy { path, disk, over, .. } => (path, disk, over),
        _ => return None,
    };
    let mut known = known.get_mut(&path);
    let before = known.as_ref().and_then(|known| known.disk.clone());
    let loser = match over {
        Over::Conflict(version) => {
            let chunks = known.as_mut().map(|known| std::mem::take(&mut known.chunks)).unwrap_or_default();
            Some(Loser { version, chunks })
        }
        _ => None,
    };
    Some(Job { path, take, before, loser })
}

/// What is in a directory, whatever it is.
fn entries(root: &sync_folder::root::Root, path: &TreePath) -> Vec<TreePath> {
    let Ok(dir) = root.open_dir(Some(path)) else { return Vec::new() };
    let Ok(entries) = dir.entries() else { return vec![path.clone()] };
    entries
        .map(|entry| {
            let name: Option<String> = entry.ok().and_then(|entry| entry.file_name().into_string().ok());
            // what no record can name goes with no plan: the directory itself stands for it
            name.and_then(|name| path.join(&name).ok()).unwrap_or_else(|| path.clone())
        })
        .collect()
}

/// Carries out operations one after the other, on a thread that may block.
struct Executor {
    folder: Arc<Folder>,
    applier: Arc<Applier>,
    known: HashMap<TreePath, Known>,
    applied: Vec<Applied>,
    left: usize,
    again: bool,
    handle: Handle,
}

impl Executor {
    /// Directories that stay because something else is in them are as they should be.
    async fn keep(&mut self, kept: Vec<TreePath>) -> Result<(), StoreError> {
        let fid = self.folder.fid;
        let mut keeping = Vec::new();
        for path in kept {
            let text = "others removed this directory; it stays because something in it is not synced".to_owned();
            self.folder.set_path_problem(path.as_str(), Some(text));
            keeping.extend(self.known.get(&path).and_then(|known| known.disk.clone()).map(|disk| (path.key(), disk)));
        }
        if keeping.is_empty() {
            return Ok(());
        }
        self.folder
            .store()
            .write(0, move |txn| {
                for (key, disk) in keeping {
                    if let Some(row) = txn.reader().file(fid, &key)? {
                        txn.set_disk(row.file, Some(&disk), false)?;
                    }
                }
                Ok(())
            })
            .await
    }

    fn run(&mut self, operations: Vec<Operation>) -> Result<(), StoreError> {
        let mut claimed = Vec::new();
        for operation in operations {
            let path = operation.path().clone();
            self.folder.claim(&path);
            claimed.push(path.clone());
            if let Operation::Move { from, .. } = &operation {
                self.folder.claim(from);
                claimed.push(from.clone());
            }
            match self.operate(operation) {
                Ok(()) => self.folder.set_path_problem(path.as_str(), None),
                Err(Failed::Store(error)) => {
                    self.folder.release(&claimed);
                    return Err(error);
                }
                Err(Failed::Apply(error)) => {
                    self.left += 1;
                    if matches!(error, ApplyError::Changed | ApplyError::NotEmpty | ApplyError::Missing) {
                        self.folder.look_again(&path);
                    }
                    self.folder.set_path_problem(path.as_str(), Some(error.to_string()));
                }
            }
            if self.applied.len() >= COMMITTED {
                self.flush(&mut claimed)?;
            }
        }
        self.flush(&mut claimed)
    }

    fn flush(&mut self, claimed: &mut Vec<TreePath>) -> Result<(), StoreError> {
        let applied = std::mem::take(&mut self.applied);
        let done = match self.applier.sync_dirs() {
            Ok(()) => self.handle.block_on(commit(&self.folder, applied)),
            // what lies there now is taken in by the next look at it: an index that names it first could lose it
            Err(error) => {
                for Applied { path, .. } in &applied {
                    self.left += 1;
                    self.folder.look_again(path);
                    self.folder.set_path_problem(path.as_str(), Some(error.to_string()));
                }
                Ok(())
            }
        };
        self.folder.release(&*claimed);
        claimed.clear();
        done
    }

    fn expected(&self, path: &TreePath) -> Expected {
        let disk = self.known.get(path).and_then(|known| known.disk.as_ref());
        disk.map_or(Expected::Nothing, |disk| Expected::This(rows::stat_of(disk)))
    }

    fn done(&mut self, path: TreePath, stat: &walk::Stat, disk: &Disk, kept: Option<Kept>, chunks: Vec<ChunkRow>) {
        let state = rows::disk_state(stat, &disk.node, &disk.vector);
        self.applied.push(Applied { path, disk: Some(state), chunks, kept });
    }

    fn operate(&mut self, operation: Operation) -> Result<(), Failed> {
        match operation {
            Operation::MakeDirectory { path, over: Over::Conflict(loser), disk }
            | Operation::Write { path, over: Over::Conflict(loser), disk }
            | Operation::Copy { path, over: Over::Conflict(loser), disk, .. } => self.conflict(&path, loser, &disk),
            Operation::MakeDirectory { path, disk, over } => {
                let kept = match (over, self.expected(&path)) {
                    (Over::Keep, Expected::This(stat)) => self.applier.remove(&path, &stat)?,
                    _ => None,
                };
                let stat = self.applier.make_dir(&path, disk.mode)?;
                self.done(path, &stat, &disk, kept, Vec::new());
                Ok(())
            }
            Operation::Write { path, disk, .. } | Operation::Copy { path, disk, .. } => {
                let Node::Symlink(target) = &disk.node else { return Ok(()) };
                let expected = self.expected(&path);
                let placed = match (self.applier.make_link(&path, target, expected), path.parent()) {
                    (Err(ApplyError::Missing), Some(parent)) => {
                        self.applier.make_dir(&parent, DIRECTORY_MODE)?;
                        self.applier.make_link(&path, target, expected)?
                    }
                    (placed, _) => placed?,
                };
                self.done(path, &placed.stat, &disk, placed.kept, Vec::new());
                Ok(())
            }
            Operation::Move { from, path, disk } => {
                let Expected::This(expected) = self.expected(&from) else { return Err(ApplyError::Changed.into()) };
                let stat = match (self.applier.rename(&from, &expected, &path), path.parent()) {
                    (Err(ApplyError::Missing), Some(parent)) => {
                        self.applier.make_dir(&parent, DIRECTORY_MODE)?;
                        self.applier.rename(&from, &expected, &path)?
                    }
                    (moved, _) => moved?,
                };
                let stat = if (stat.mode, stat.mtime) == (disk.mode, disk.mtime) {
                    stat
                } else {
                    self.applier.set_meta(&path, &stat, disk.mode, Some(disk.mtime))?
                };
                let chunks = self.known.get_mut(&from).map(|known| std::mem::take(&mut known.chunks));
                self.applied.push(Applied { path: from, disk: None, chunks: Vec::new(), kept: None });
                self.done(path, &stat, &disk, None, chunks.unwrap_or_default());
                Ok(())
            }
            Operation::SetMeta { path, disk } => {
                let Expected::This(expected) = self.expected(&path) else { return Err(ApplyError::Changed.into()) };
                let stat = self.applier.set_meta(&path, &expected, disk.mode, None)?;
                let chunks = self.chunks(&path);
                self.done(path, &stat, &disk, None, chunks);
                Ok(())
            }
            Operation::Adopt { path, disk } => {
                let known = self.known.get(&path).and_then(|known| known.disk.clone());
                let chunks = self.chunks(&path);
                if let Some(mut state) = known {
                    state.vector = rows::encode_vector(&disk.vector);
                    self.applied.push(Applied { path, disk: Some(state), chunks, kept: None });
                }
                Ok(())
            }
            Operation::Remove { path } => {
                let kept = match self.expected(&path) {
                    Expected::This(stat) => self.applier.remove(&path, &stat)?,
                    Expected::Nothing => None,
                };
                self.applied.push(Applied { path, disk: None, chunks: Vec::new(), kept });
                Ok(())
            }
            Operation::RemoveDirectory { path } => {
                self.applier.remove_dir(&path)?;
                self.applied.push(Applied { path, disk: None, chunks: Vec::new(), kept: None });
                Ok(())
            }
        }
    }

    fn chunks(&mut self, path: &TreePath) -> Vec<ChunkRow> {
        self.known.get_mut(path).map(|known| std::mem::take(&mut known.chunks)).unwrap_or_default()
    }

    /// What lies at a path lost to what needs no content: that comes in the next round.
    fn conflict(&mut self, path: &TreePath, loser: Version, take: &Disk) -> Result<(), Failed> {
        let expected = self.expected(path);
        let loser = Loser { version: loser, chunks: self.chunks(path) };
        let aside = conflicts::set_aside(&self.folder, &self.applier, &self.handle, (path, take), loser, expected)?;
        if let Err(error) = self.applier.sync_dirs() {
            conflicts::give_up(&self.folder, &[aside]);
            return Err(error.into());
        }
        self.handle.block_on(conflicts::tell(&self.folder, vec![aside]))?;
        self.again = true;
        Ok(())
    }
}

/// Why an operation did not happen.
enum Failed {
    Apply(ApplyError),
    Store(StoreError),
}

impl From<ApplyError> for Failed {
    fn from(error: ApplyError) -> Self {
        Self::Apply(error)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
