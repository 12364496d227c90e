//! Tells what changes on disk: watches and walks the folder, cuts what is new, and appends records.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as threads};
use std::time::{Duration, Instant};

use sync_folder::cut::{Cut, CutError};
use sync_folder::ignored::{IGNORE_FILE, Ignored};
use sync_folder::root::Root;
use sync_folder::walk::{self, Found, Kind, Stat};
use sync_folder::watch::{Changed, Reason, WatchError, Watcher};
use sync_store::{Appended, FileRow, Reader, StoreError, Txn};
use sync_types::bounds::{MAX_RECORDS, RECORDS_BYTES_TARGET};
use sync_types::folder::{Node, TreePath};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::engine::{Folder, Request};
use super::index::{self, After, Candidate, Comparison, Difference, Finished, Next, Telling};
use super::rows;
use super::texts;

/// Time between walks of the whole tree where the system tells of changes.
const RESCAN: Duration = Duration::from_secs(3600);
/// The same where it does not.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(60);
/// What is said where watching ends.
const WATCHING_FAILED: &str = "watching failed; pause and resume the folder to try again";
/// Time until a folder that is not there is looked for again, and until what could not be told is.
const RETRY: Duration = Duration::from_secs(5);
/// Wait before a file that changed while it was read is read again.
const CHANGED: Duration = Duration::from_millis(200);
/// Threads that read and cut: one for each core of a small machine.
const CUTTERS: usize = 2;
/// Files between the walk, the threads that cut and the one that tells.
const QUEUE: usize = 1024;
/// Rows read from the index at once.
const PAGE: usize = 4096;
/// New files held back until the walk has shown which ones are gone, so that a rename is told without reading: as many as
/// take little memory; more are read.
const HELD_BACK: usize = 50_000;
/// Longest that a record waits for others to be told with.
const GATHER: Duration = Duration::from_millis(20);

/// Runs until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>, mut asked: mpsc::Receiver<Request>) {
    // what the group says is known first, so that what is here already is compared with it
    if super::take::take_in(&folder).await.is_err() {
        tracing::debug!("log could not be read before the first scan");
    }
    super::snapshots::before_scan(&folder).await;
    while !folder.cancel.is_cancelled() {
        match open(&folder).await {
            Ok(root) => {
                if let Err(error) = super::versions::recover(&folder, &root).await {
                    tracing::debug!(%error, "versions that are in no list stay so");
                }
                folder.set_root(Some(root.clone()));
                folder.set_problem(None);
                serve(&folder, &root, &mut asked).await;
                folder.set_root(None);
            }
            Err(problem) => folder.set_problem(Some(problem)),
        }
        folder.set_scanning(false);
        tokio::select! {
            () = folder.cancel.cancelled() => {}
            () = tokio::time::sleep(RETRY) => {}
            request = asked.recv() => match request {
                None => return,
                Some(Request::Rescan(done)) => drop(done),
                Some(Request::Look(_)) => {}
            }
        }
    }
}

async fn open(folder: &Arc<Folder>) -> Result<Arc<Root>, String> {
    let (path, id) = (folder.path.clone(), folder.id);
    let opened = tokio::task::spawn_blocking(move || Root::open(&path, &id));
    match opened.await {
        Ok(Ok(root)) => Ok(Arc::new(root)),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Watches and scans until the root is gone or the folder is stopped.
async fn serve(folder: &Arc<Folder>, root: &Arc<Root>, asked: &mut mpsc::Receiver<Request>) {
    let (_watcher, mut events) = match Watcher::start(root) {
        Ok((watcher, events)) => {
            folder.set_watching(None);
            (Some(watcher), Some(events))
        }
        Err(error) => {
            tracing::warn!(folder = %folder.name, %error, "folder cannot be watched");
            folder.set_watching(Some(error.to_string()));
            (None, None)
        }
    };
    let mut rescan = if events.is_some() { RESCAN } else { RESCAN_UNWATCHED };
    let mut look = Look::Everything;
    let mut done = None;
    loop {
        let mut failed = false;
        folder.set_scanning(matches!(look, Look::Everything));
        let again = match scan(folder, root, look).await {
            Ok(again) => {
                folder.set_trouble("tell", None);
                again
            }
            Err(Stop::Root(problem)) => return folder.set_problem(Some(problem)),
            Err(Stop::Store(StoreError::Closed)) => return,
            Err(Stop::Store(error)) => {
                folder.set_trouble("tell", Some(error.to_string()));
                failed = true;
                BTreeSet::new()
            }
        };
        folder.set_scanning(false);
        folder.wake();
        // whoever asked for it has waited long enough
        drop::<Option<tokio::sync::oneshot::Sender<()>>>(done.take());
        look = tokio::select! {
            () = folder.cancel.cancelled() => return,
            // what was not told is in no one's memory
            () = tokio::time::sleep(RETRY), if failed => Look::Everything,
            changed = next(&mut events), if !failed => match changed {
                Some(Changed::Paths(mut paths)) => {
                    paths.extend(again);
                    Look::Paths(paths)
                }
                Some(Changed::Everything(reason)) => {
                    tracing::info!(folder = %folder.name, ?reason, "whole folder is walked");
                    let lasting = match reason {
                        Reason::Limit => Some(WatchError::Limit.to_string()),
                        Reason::Failed => Some(WATCHING_FAILED.to_owned()),
                        _ => None,
                    };
                    if lasting.is_some() {
                        folder.set_watching(lasting);
                        rescan = RESCAN_UNWATCHED;
                    }
                    Look::Everything
                }
                Some(_) => Look::Everything,
                None => {
                    events = None;
                    folder.set_watching(Some(WATCHING_FAILED.to_owned()));
                    rescan = RESCAN_UNWATCHED;
                    Look::Everything
                }
            },
            request = asked.recv() => match request {
                Some(Request::Rescan(answer)) => {
                    done = Some(answer);
                    Look::Everything
                }
                Some(Request::Look(_)) if failed => Look::Everything,
                Some(Request::Look(paths)) => Look::Paths(paths.into_iter().chain(again).collect()),
                None => return,
            },
            () = tokio::time::sleep(CHANGED), if !again.is_empty() => Look::Paths(again),
            () = tokio::time::sleep(rescan) => Look::Everything,
        };
    }
}

async fn next(events: &mut Option<mpsc::Receiver<Changed>>) -> Option<Changed> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// What to look at.
#[derive(Debug)]
enum Look {
    Everything,
    Paths(BTreeSet<TreePath>),
}

/// Why a scan ends before its end.
enum Stop {
    /// The folder is not there, or is another.
    Root(String),
    Store(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Compares disk and index, and tells what differs; the paths to be looked at again soon.
async fn scan(folder: &Arc<Folder>, root: &Arc<Root>, look: Look) -> Result<BTreeSet<TreePath>, Stop> {
    let start = Instant::now();
    let whole = matches!(look, Look::Everything);
    if whole {
        folder.clear_path_problems();
    }
    let (scanned, handle) = (folder.clone(), Handle::current());
    let (root, walked) = (root.clone(), folder.clone());
    let scanning = tokio::task::spawn_blocking(move || {
        let _ = walked;
        Scan::run(&scanned, &root, &handle, look)
    });
    let again = scanning.await.map_err(|_| Stop::Store(StoreError::Closed))??;
    if whole {
        folder.compared().await?;
        folder.set_scan_time(start.elapsed());
    }
    Ok(again)
}

/// The paths that are to be walked, with their rows: all but files that are as the index says, as all are that were just
/// applied. Those that are just being applied come again when they are given back.
fn changed(
    folder: &Folder,
    root: &Root,
    mut paths: BTreeSet<TreePath>,
) -> Result<Vec<(TreePath, Option<FileRow>)>, Stop> {
    let fid = folder.fid;
    folder.retain_idle(&mut paths);
    let rows: Vec<Option<FileRow>> =
        folder.store().read_here(|reader| paths.iter().map(|path| reader.file(fid, &path.key())).collect())?;
    let mut looks = walk::Looks::new(root);
    let mut is_changed = |(path, row): &(TreePath, Option<FileRow>)| {
        let disk = row.as_ref().and_then(|row| row.disk.as_ref()).filter(|disk| !rows::is_directory(disk));
        !disk.is_some_and(|disk| match looks.stat(path) {
            Ok(Some((stat, _))) => rows::looks_the_same(disk, &stat),
            _ => false,
        })
    };
    Ok(paths.into_iter().zip(rows).filter(|found| is_changed(found)).collect())
}

/// A scan under way: the thread that walks and compares.
struct Scan<'s> {
    folder: &'s Arc<Folder>,
    root: &'s Root,
    handle: &'s Handle,
    ignored: Ignored,
    cut: threads::SyncSender<Candidate>,
    tell: threads::SyncSender<Difference>,
    failed: &'s AtomicBool,
    /// To be looked at again soon.
    again: &'s Mutex<BTreeSet<TreePath>>,
    comparison: Comparison,
    /// What lies below could not be read, and says nothing.
    unread: Vec<TreePath>,
}

impl<'s> Scan<'s> {
    fn run(folder: &Arc<Folder>, root: &Root, handle: &Handle, look: Look) -> Result<BTreeSet<TreePath>, Stop> {
        let sound = || root.check().map_err(|error| Stop::Root(error.to_string()));
        sound()?;
        let look = match look {
            Look::Everything => None,
            Look::Paths(paths) => Some(changed(folder, root, paths)?),
        };
        if look.as_ref().is_some_and(Vec::is_empty) {
            return Ok(BTreeSet::new());
        }
        let ignored = Ignored::load(root).map_err(|error| Stop::Root(error.to_string()))?;
        let ignored = ignored.and_all_but(folder.selection.clone());
        for line in ignored.invalid() {
            let problem = format!("line {} is no pattern: {}", line.line, line.reason);
            folder.set_path_problem(IGNORE_FILE, Some(problem));
        }
        let again = Mutex::new(BTreeSet::new());
        let failed = AtomicBool::new(false);
        let (cut, to_cut) = threads::sync_channel::<Candidate>(QUEUE);
        let (tell, to_tell) = threads::sync_channel::<Difference>(QUEUE);
        let to_cut = Mutex::new(to_cut);
        std::thread::scope(|threads| {
            for _ in 0..CUTTERS {
                let (tell, to_cut, again) = (tell.clone(), &to_cut, &again);
                threads.spawn(move || cutter(folder, root, to_cut, &tell, again));
            }
            let teller = {
                let (again, failed) = (&again, &failed);
                threads.spawn(move || teller(folder, handle, &to_tell, again, failed))
            };
            let mut scan = Scan {
                folder,
                root,
                handle,
                ignored,
                cut,
                tell,
                failed: &failed,
                again: &again,
                comparison: Comparison::new(HELD_BACK),
                unread: Vec::new(),
            };
            let walked = match look {
                None => scan.below(None),
                Some(paths) => paths.into_iter().try_for_each(|path| scan.below(Some(path))),
            };
            // an unmounted disk looks empty: what is missing counts only while the folder is there
            let finished = walked.and_then(|()| sound()).and_then(|()| scan.finish());
            drop(scan);
            let told = teller.join().unwrap_or(Err(StoreError::Closed));
            finished?;
            Ok::<(), Stop>(told?)
        })?;
        Ok(again.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Walks a path, or the whole folder, beside the index in the same order.
    fn below(&mut self, from: Option<(TreePath, Option<FileRow>)>) -> Result<(), Stop> {
        let (path, row) = from.unzip();
        let mut rows = Rows::new(self.folder, self.handle, path.as_ref(), row.flatten());
        let mut stopped = None;
        let (root, ignored) = (self.root, self.ignored.clone());
        let walked = walk::walk(root, path.as_ref(), &ignored, &mut |found| {
            let step = self.found(found, &mut rows);
            let ended = self.failed.load(Ordering::Relaxed) || self.folder.cancel.is_cancelled();
            match step {
                Ok(()) if !ended => ControlFlow::Continue(()),
                Ok(()) => {
                    stopped = Some(Stop::Store(StoreError::Closed));
                    ControlFlow::Break(())
                }
                Err(stop) => {
                    stopped = Some(stop);
                    ControlFlow::Break(())
                }
            }
        });
        if let Some(stop) = stopped {
            return Err(stop);
        }
        walked.map_err(|error| Stop::Root(error.to_string()))?;
        while let Some(row) = rows.take()? {
            self.missing(row);
        }
        Ok(())
    }

    fn found(&mut self, found: Found, rows: &mut Rows<'_>) -> Result<(), Stop> {
        match found {
            Found::Entry { path, stat, target } => {
                let key = path.key();
                while rows.peek()?.is_some_and(|row| row.key < key) {
                    if let Some(row) = rows.take()? {
                        self.missing(row);
                    }
                }
                let same = rows.peek()?.is_some_and(|row| row.key == key);
                let row = if same { rows.take()? } else { None };
                self.here(path, stat, target, row)
            }
            Found::Problem { path, at, problem } => {
                self.folder.set_path_problem(&path, Some(problem.to_string()));
                self.unread.extend(at);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Something is at a path.
    fn here(&mut self, path: TreePath, stat: Stat, target: Option<String>, row: Option<FileRow>) -> Result<(), Stop> {
        let only_stays = row.as_ref().is_some_and(rows::only_stays);
        let before = row.and_then(|row| row.disk);
        let same = before.as_ref().is_some_and(|disk| rows::looks_the_same(disk, &stat)) && !only_stays;
        if same || self.folder.is_busy(&path) {
            return Ok(());
        }
        if stat.kind == Kind::Symlink && target.is_none() {
            let problem = "the link's target is no text, and is not synced".to_owned();
            self.folder.set_path_problem(path.as_str(), Some(problem));
            return Ok(());
        }
        match self.comparison.here(path, stat, target, before) {
            Next::Wait => {}
            Next::Read(candidate) => self.read(candidate),
            Next::Tell(difference) => self.tell(difference),
        }
        Ok(())
    }

    fn tell(&self, difference: Difference) {
        // a teller that failed has said why
        let _ = self.tell.send(difference);
    }

    fn read(&self, candidate: Candidate) {
        let _ = self.cut.send(candidate);
    }

    /// The index knows something at a path, and the walk did not find it.
    fn missing(&mut self, row: FileRow) {
        let Some(disk) = &row.disk else { return };
        let Some(path) = TreePath::from_key(&row.key) else { return };
        let unread = self.unread.iter().any(|unread| *unread == path || path.is_below(unread));
        // what is ignored now stays as it is, here and elsewhere
        if !unread && !self.ignored.matches(&path, rows::is_directory(disk)) && !self.folder.is_busy(&path) {
            self.comparison.missing(row);
        }
    }

    /// Tells what is gone, and reads what is new unless it is what is gone under another name.
    fn finish(&mut self) -> Result<(), Stop> {
        let mut comparison = std::mem::replace(&mut self.comparison, Comparison::new(0));
        let came = comparison.look_for_gone(|path| match walk::stat(self.root, path) {
            Ok(found) => Some(found.is_some() && is_named_so(self.root, path)),
            // what cannot be looked at says nothing
            Err(_) => None,
        });
        self.again.lock().unwrap_or_else(PoisonError::into_inner).extend(came);
        let Finished { first, read, last } = self.folder.store().read_here(|reader| comparison.finish(reader))?;
        first.into_iter().for_each(|difference| self.tell(difference));
        read.into_iter().for_each(|candidate| self.read(candidate));
        last.into_iter().for_each(|difference| self.tell(difference));
        Ok(())
    }
}

/// Whether what is found under a name is spelled so: where case does not count, a rename that only changes it leaves
/// both names to be found.
fn is_named_so(root: &Root, path: &TreePath) -> bool {
    if cfg!(not(any(windows, target_vendor = "apple"))) {
        return true;
    }
    let entries = root.open_dir(path.parent().as_ref()).and_then(|parent| parent.entries());
    entries.is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_str() == Some(path.name())))
}

/// Rows of the index in the order of a walk, a page at a time.
struct Rows<'s> {
    folder: &'s Arc<Folder>,
    handle: &'s Handle,
    below: Option<Vec<u8>>,
    page: std::vec::IntoIter<FileRow>,
    next: Option<FileRow>,
    last: Option<Vec<u8>>,
    ended: bool,
}

impl<'s> Rows<'s> {
    /// Rows of the folder, or of a path that has a `row` of its own and what is below it.
    fn new(folder: &'s Arc<Folder>, handle: &'s Handle, from: Option<&TreePath>, row: Option<FileRow>) -> Self {
        let below = from.map(TreePath::key);
        Self { folder, handle, below, page: Vec::new().into_iter(), next: row, last: None, ended: false }
    }

    fn peek(&mut self) -> Result<Option<&FileRow>, StoreError> {
        if self.next.is_none() {
            self.next = self.page.next();
        }
        if self.next.is_none() && !self.ended {
            let (fid, below, after) = (self.folder.fid, self.below.clone(), self.last.clone());
            let page = self.handle.block_on(self.folder.store().read(move |reader| match below {
                None => reader.files_after(fid, after.as_deref(), PAGE),
                Some(below) => reader.files_below(fid, &below, after.as_deref(), PAGE),
            }))?;
            self.ended = page.len() < PAGE;
            self.last = page.last().map(|row| row.key.clone());
            self.page = page.into_iter();
            self.next = self.page.next();
        }
        Ok(self.next.as_ref())
    }

    fn take(&mut self) -> Result<Option<FileRow>, StoreError> {
        self.peek()?;
        Ok(self.next.take())
    }
}

/// Reads and cuts files until there are no more.
fn cutter(
    folder: &Folder,
    root: &Root,
    candidates: &Mutex<threads::Receiver<Candidate>>,
    tell: &threads::SyncSender<Difference>,
    again: &Mutex<BTreeSet<TreePath>>,
) {
    loop {
        let next = candidates.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Candidate { path, stat, before }) = next else { return };
        let mut proceed = |_| match folder.cancel.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        match folder.cutter.cut_file(root, &path, &stat, &mut proceed) {
            Ok(Cut { content, stat, list, settled, .. }) => {
                if !settled {
                    // a change right now may bear the same time: it is read again a moment later
                    again.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone());
                }
                folder.counters.scanned.fetch_add(1, Ordering::Relaxed);
                let chunks = rows::chunk_rows(&content, list.as_deref());
                let after = After::Here { stat, node: Node::File(content), chunks, settled };
                if tell.send(Difference { path, before, after }).is_err() {
                    return;
                }
            }
            Err(CutError::Changed) => {
                again.lock().unwrap_or_else(PoisonError::into_inner).insert(path);
            }
            Err(error) => folder.set_path_problem(path.as_str(), Some(error.to_string())),
        }
    }
}

/// Gathers changes and tells them, as many at once as came while the last ones were made durable.
fn teller(
    folder: &Arc<Folder>,
    handle: &Handle,
    changes: &threads::Receiver<Difference>,
    again: &Mutex<BTreeSet<TreePath>>,
    failed: &AtomicBool,
) -> Result<(), StoreError> {
    let mut ended = false;
    while !ended {
        let Ok(first) = changes.recv() else { break };
        let since = Instant::now();
        let mut bytes = first.weight();
        let mut batch = vec![first];
        while bytes < RECORDS_BYTES_TARGET && batch.len() < MAX_RECORDS {
            match changes.recv_timeout(GATHER.saturating_sub(since.elapsed())) {
                Ok(change) => {
                    bytes += change.weight();
                    batch.push(change);
                }
                Err(threads::RecvTimeoutError::Timeout) => break,
                Err(threads::RecvTimeoutError::Disconnected) => {
                    ended = true;
                    break;
                }
            }
        }
        match handle.block_on(tell(folder, batch)) {
            Ok(stale) => again.lock().unwrap_or_else(PoisonError::into_inner).extend(stale),
            Err(error) => {
                failed.store(true, Ordering::Relaxed);
                // whoever still sends must not wait for ever
                while changes.recv().is_ok() {}
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Appends records of what was found and takes them into the index in one commit; the paths whose index changed meanwhile.
async fn tell(folder: &Arc<Folder>, differences: Vec<Difference>) -> Result<Vec<TreePath>, StoreError> {
    let place = folder.place();
    let differences = Arc::new(differences);
    let bytes = differences.iter().map(Difference::weight).sum();
    let build = {
        let (place, differences) = (place.clone(), differences.clone());
        move |reader: &Reader<'_>| index::tell(reader, &place, &differences)
    };
    let work = {
        let differences = differences.clone();
        move |txn: &mut Txn<'_>, appended: Option<&Appended>, telling: Telling| {
            let told = index::told(txn, &place, &differences, appended, telling)?;
            Ok((appended.map(|appended| appended.hash), told))
        }
    };
    let (hash, told) = folder.group.append_built(bytes, build, work).await?;
    let is_text = |found: &&Difference| matches!(&found.after, After::Here { node, .. } if texts::may_be(node));
    differences.iter().filter(is_text).for_each(|found| folder.keep_text(&found.path));
    if let Some(hash) = hash {
        folder.remember_own(hash);
        folder.changed();
    }
    if told.pending {
        folder.wake();
    }
    Ok(told.stale)
}
