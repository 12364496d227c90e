//! Makes the folder what the group says: decides, plans, and carries out, a page of paths at a time.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sync_core::folder::{Counts, Displaced, Guard, Verdict, plan};
use sync_folder::apply::{Applier, ApplyError, Expected, Ready};
use sync_store::{FileRow, StoreError, Txn};
use sync_types::folder::{Node, TreePath};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::assemble;
use super::carry::{Desk, Executor, Job};
use super::conflicts;
use super::engine::Folder;
use super::index::{self, Applied, Conflict, Decided, Loser, Merged};
use super::rows::{self, ChunkRow};
use super::status::Direction;
use super::versions;
use crate::chunks::{ChunkFetcher, FetchQueue, Fetched};
use crate::group::now;

/// Paths decided on together: renames are found among them.
const PAGE: usize = 8192;
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
        let ready =
            !folder.is_stopped() && folder.root().is_some() && !folder.snapshots.awaits() && !folder.is_comparing();
        if folder.direction != Direction::SendOnly && ready {
            folder.set_applying(true);
            match applying.round(&folder).await {
                Ok(round) => {
                    folder.set_trouble("apply", None);
                    left = round == Round::Left;
                }
                Err(StoreError::Closed) => return,
                Err(error) => {
                    folder.set_trouble("apply", Some(error.to_string()));
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

/// Notes what was done, in one commit; what the group says meanwhile is compared again.
pub(crate) async fn commit(folder: &Folder, applied: Vec<Applied>) -> Result<(), StoreError> {
    if applied.is_empty() {
        return Ok(());
    }
    let (place, now) = (folder.place(), now());
    let bytes = applied.len() * 512;
    applied.iter().filter(|applied| applied.disk.is_some()).for_each(|applied| folder.keep_text(&applied.path));
    let work = move |txn: &mut Txn<'_>| index::commit(txn, &place, applied, now);
    if folder.store().write(bytes, work).await? {
        folder.wake();
    }
    Ok(())
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
        let files = totals.files.saturating_sub(totals.left_out_files);
        if totals.pending_files < LEAST_HELD || totals.pending_files < files / 4 {
            folder.hold(None);
            return Ok(false);
        }
        let (mut counts, mut deleted) = (Counts::default(), 0u64);
        let mut after: Option<Vec<u8>> = None;
        loop {
            let from = after.clone();
            let page = folder.store().read(move |reader| reader.pending_after(fid, from.as_deref(), PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            if page.iter().all(|row| row.disk.is_none()) {
                // nothing of this device's is in the way, as in a first sync
                continue;
            }
            let Decided { changes, .. } = decide_all(folder, page).await?;
            let root = applier.root().clone();
            let planning = tokio::task::spawn_blocking(move || plan(changes, |path| entries(&root, path)));
            let planned = planning.await.map_err(|_| StoreError::Closed)?;
            let (now, guard) = (now().0, lock_guard(folder));
            for (path, how) in planned.displaced() {
                deleted += u64::from(how == Displaced::Deleted);
                if !guard.is_counted(now, path) {
                    counts.add(how);
                }
            }
        }
        let verdict = lock_guard(folder).check(now().0, files.saturating_add(deleted), counts);
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
        let Decided { changes, known, settled } = decide_all(folder, page).await?;
        commit(folder, settled).await?;
        let planning = {
            let root = applier.root().clone();
            tokio::task::spawn_blocking(move || {
                let listed = RefCell::new(Listed::new());
                let planned = plan(changes, |path| {
                    let found = entries(&root, path);
                    listed.borrow_mut().insert(path.clone(), found.iter().cloned().collect());
                    found
                });
                (planned, listed.into_inner())
            })
        };
        let (planned, listed) = planning.await.map_err(|_| StoreError::Closed)?;
        {
            let (now, mut guard) = (now().0, lock_guard(folder));
            planned.displaced().for_each(|(path, how)| guard.applied(now, path, how));
        }
        let mut executor = Executor::new(known);
        keep(folder, applier, &mut executor, planned.kept, listed).await?;
        let mut left = 0;
        let mut operations = planned.operations.into_iter().peekable();
        while operations.peek().is_some() {
            let mut jobs = Vec::new();
            while let Some(operation) = operations.next_if(Job::is_one) {
                let Some(job) = Job::of(operation, executor.known()) else { continue };
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
            while let Some(operation) = operations.next_if(|operation| !Job::is_one(operation)) {
                others.push(operation);
            }
            if !others.is_empty() {
                let (folder, applier, handle) = (folder.clone(), applier.clone(), Handle::current());
                let mut doing = executor;
                let done = tokio::task::spawn_blocking(move || {
                    let mut desk = FolderDesk { folder: &folder, handle: &handle };
                    doing.run(&*applier, &mut desk, others).map(|()| doing)
                });
                executor = done.await.map_err(|_| StoreError::Closed)??;
            }
            if folder.cancel.is_cancelled() {
                break;
            }
        }
        Ok((left + executor.left(), executor.goes_on()))
    }
}

/// Compares rows with what lies on disk.
async fn decide_all(folder: &Arc<Folder>, page: Vec<FileRow>) -> Result<Decided, StoreError> {
    let place = folder.place();
    folder.store().read(move |reader| index::decide_all(reader, &place, page)).await
}

fn lock_guard(folder: &Folder) -> std::sync::MutexGuard<'_, Guard> {
    folder.guard.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What was in directories when it was decided what stays.
type Listed = BTreeMap<TreePath, BTreeSet<TreePath>>;

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

/// Directories that stay because something else is in them are as they should be.
///
/// Whoever looks at one that is still to be removed leaves it to this: what is in it now and was not when that was decided,
/// or the other way round, is looked at once more.
async fn keep(
    folder: &Arc<Folder>,
    applier: &Applier,
    executor: &mut Executor,
    kept: Vec<TreePath>,
    listed: Listed,
) -> Result<(), StoreError> {
    let place = folder.place();
    let mut keeping = Vec::new();
    for path in kept {
        let text = "others removed this directory; it stays because something in it is not synced".to_owned();
        folder.set_path_problem(path.as_str(), Some(text));
        keeping.extend(executor.known().get(&path).and_then(|known| known.disk.clone()).map(|disk| (path, disk)));
    }
    if keeping.is_empty() {
        return Ok(());
    }
    let paths: Vec<TreePath> = keeping.iter().map(|(path, _)| path.clone()).collect();
    folder.store().write(0, move |txn| index::keep(txn, &place, &keeping)).await?;
    let root = applier.root().clone();
    let is_other = move |path: &TreePath| {
        let now: BTreeSet<TreePath> = entries(&root, path).into_iter().collect();
        listed.get(path).is_some_and(|before| *before != now)
    };
    let looking = tokio::task::spawn_blocking(move || paths.into_iter().filter(is_other).collect());
    let others: Vec<TreePath> = looking.await.map_err(|_| StoreError::Closed)?;
    others.iter().for_each(|path| folder.look_again(path));
    Ok(())
}

/// The folder's index and its other tasks, for whoever carries something out on a thread that may block.
pub(crate) struct FolderDesk<'a> {
    pub(crate) folder: &'a Arc<Folder>,
    pub(crate) handle: &'a Handle,
}

impl Desk<Applier> for FolderDesk<'_> {
    fn row(&mut self, path: &TreePath) -> Result<Option<FileRow>, StoreError> {
        let (fid, key) = (self.folder.fid, path.key());
        self.handle.block_on(self.folder.store().read(move |reader| reader.file(fid, &key)))
    }

    fn commit(&mut self, applied: Vec<Applied>) -> Result<(), StoreError> {
        self.handle.block_on(commit(self.folder, applied))
    }

    fn merge(
        &mut self,
        applier: &Applier,
        job: &Job,
        loser: &Loser,
        (ready, chunks): (&Ready, &[ChunkRow]),
        expected: Expected,
    ) -> Result<Option<Merged>, ApplyError> {
        let won = (ready, chunks.to_vec());
        conflicts::merge(self.folder, applier, self.handle, (&job.path, &job.take), loser, won, expected)
    }

    fn settle(&mut self, conflicts: Vec<Conflict>) -> Result<(), StoreError> {
        self.handle.block_on(conflicts::tell(self.folder, conflicts))
    }

    fn claim(&mut self, path: &TreePath) {
        self.folder.claim(path);
    }

    fn release(&mut self, paths: &[TreePath]) {
        self.folder.release(paths);
    }

    fn look_again(&mut self, path: &TreePath) {
        self.folder.look_again(path);
    }

    fn note(&mut self, path: &TreePath, problem: Option<String>) {
        self.folder.set_unapplied(path, problem);
    }
}
