//! Tells what changes on disk: watches and walks the folder, cuts what is new, and appends records.

use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as threads};
use std::time::{Duration, Instant};

use sync_core::folder::{Version, basis};
use sync_folder::cut::{Cut, CutError};
use sync_folder::ignored::{IGNORE_FILE, Ignored};
use sync_folder::root::Root;
use sync_folder::walk::{self, Found, Kind, Stat};
use sync_folder::watch::{Changed, Watcher};
use sync_store::{Content, DiskState, FileRow, StoreError};
use sync_types::bounds::{MAX_RECORDS, RECORDS_BYTES_TARGET};
use sync_types::folder::{Chunks, Dot, KIND_RECORDS, Node, Record, RecordBatch, TreePath, folder_stream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::apply;
use super::engine::{Folder, Request};
use super::rows::{self, ChunkRow};
use super::status::{Direction, Watching};
use super::texts;

/// Time between walks of the whole tree where the system tells of changes.
const RESCAN: Duration = Duration::from_secs(3600);
/// The same where it does not.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(60);
/// Time until a folder that is not there is looked for again.
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
/// Bytes a record takes beside its path.
const RECORD_BYTES: usize = 100;

/// A path that differs from the index.
#[derive(Debug)]
pub(crate) struct Change {
    path: TreePath,
    /// What the index said when it was compared.
    before: Option<DiskState>,
    after: After,
}

#[derive(Debug)]
enum After {
    Gone,
    Here { stat: Stat, node: Node, chunks: Vec<ChunkRow>, settled: bool },
}

/// A file that is to be read.
struct Candidate {
    path: TreePath,
    stat: Stat,
    before: Option<DiskState>,
}

/// Runs until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>, mut asked: mpsc::Receiver<Request>) {
    // what the group says is known first, so that what is here already is compared with it
    if super::take::take_in(&folder).await.is_err() {
        tracing::debug!("log could not be read before the first scan");
    }
    while !folder.cancel.is_cancelled() {
        match open(&folder).await {
            Ok(root) => {
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
            folder.set_watching(Watching::Events);
            (Some(watcher), Some(events))
        }
        Err(error) => {
            tracing::warn!(folder = %folder.name, %error, "folder cannot be watched");
            folder.set_watching(Watching::Rescans);
            folder.set_path_problem("", Some(format!("changes are found by walking the folder: {error}")));
            (None, None)
        }
    };
    let mut look = Look::Everything;
    let mut done = None;
    loop {
        folder.set_scanning(matches!(look, Look::Everything));
        let again = match scan(folder, root, look).await {
            Ok(again) => again,
            Err(Stop::Root(problem)) => return folder.set_problem(Some(problem)),
            Err(Stop::Store(StoreError::Closed)) => return,
            Err(Stop::Store(error)) => {
                folder.set_path_problem("", Some(error.to_string()));
                BTreeSet::new()
            }
        };
        folder.set_scanning(false);
        folder.wake();
        // whoever asked for it has waited long enough
        drop::<Option<tokio::sync::oneshot::Sender<()>>>(done.take());
        let rescan = if events.is_some() { RESCAN } else { RESCAN_UNWATCHED };
        look = tokio::select! {
            () = folder.cancel.cancelled() => return,
            changed = next(&mut events) => match changed {
                Some(Changed::Paths(mut paths)) => {
                    paths.extend(again);
                    Look::Paths(paths)
                }
                Some(Changed::Everything(reason)) => {
                    tracing::info!(folder = %folder.name, ?reason, "whole folder is walked");
                    Look::Everything
                }
                Some(_) => Look::Everything,
                None => {
                    events = None;
                    folder.set_watching(Watching::Rescans);
                    Look::Everything
                }
            },
            request = asked.recv() => match request {
                Some(Request::Rescan(answer)) => {
                    done = Some(answer);
                    Look::Everything
                }
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
    tell: threads::SyncSender<Change>,
    failed: &'s AtomicBool,
    /// To be looked at again soon.
    again: &'s Mutex<BTreeSet<TreePath>>,
    /// New files, until it is known what is gone.
    held: Vec<Candidate>,
    gone: Vec<FileRow>,
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
        for line in ignored.invalid() {
            let problem = format!("line {} is no pattern: {}", line.line, line.reason);
            folder.set_path_problem(IGNORE_FILE, Some(problem));
        }
        let again = Mutex::new(BTreeSet::new());
        let failed = AtomicBool::new(false);
        let (cut, to_cut) = threads::sync_channel::<Candidate>(QUEUE);
        let (tell, to_tell) = threads::sync_channel::<Change>(QUEUE);
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
                held: Vec::new(),
                gone: Vec::new(),
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
        let before = row.and_then(|row| row.disk);
        if before.as_ref().is_some_and(|disk| rows::looks_the_same(disk, &stat)) || self.folder.is_busy(&path) {
            return Ok(());
        }
        match (stat.kind, target) {
            (Kind::File, _) => {
                let candidate = Candidate { path, stat, before };
                if candidate.before.is_none() && self.held.len() < HELD_BACK {
                    self.held.push(candidate);
                } else {
                    self.read(candidate);
                }
            }
            (Kind::Symlink, Some(target)) => self.change(path, before, stat, Node::Symlink(target)),
            (Kind::Symlink, None) => {
                let problem = "the link's target is no text, and is not synced".to_owned();
                self.folder.set_path_problem(path.as_str(), Some(problem));
            }
            _ => self.change(path, before, stat, Node::Directory),
        }
        Ok(())
    }

    fn change(&self, path: TreePath, before: Option<DiskState>, stat: Stat, node: Node) {
        let after = After::Here { stat, node, chunks: Vec::new(), settled: true };
        // a teller that failed has said why
        let _ = self.tell.send(Change { path, before, after });
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
            self.gone.push(row);
        }
    }

    /// What the walk did not find may have come after the walk had passed, before the index was read.
    fn look_for_gone(&mut self) {
        let (mut gone, mut there) = (Vec::new(), Vec::new());
        for row in std::mem::take(&mut self.gone) {
            let Some(path) = TreePath::from_key(&row.key) else { continue };
            match walk::stat(self.root, &path) {
                Ok(Some(_)) if is_named_so(self.root, &path) => there.push(path),
                Ok(_) => gone.push(row),
                // what cannot be looked at says nothing
                Err(_) => {}
            }
        }
        self.gone = gone;
        self.again.lock().unwrap_or_else(PoisonError::into_inner).extend(there);
    }

    /// Tells what is gone, and reads what is new unless it is what is gone under another name.
    fn finish(&mut self) -> Result<(), Stop> {
        self.look_for_gone();
        type Look = (u64, u64, i64);
        let mut by_look: HashMap<Look, &FileRow> = HashMap::new();
        for row in &self.gone {
            if let Some(disk) = row.disk.as_ref().filter(|disk| disk.hash.is_some()) {
                by_look.insert((disk.ino, disk.size, disk.mtime), row);
            }
        }
        let mut moved = Vec::new();
        let mut rest = Vec::new();
        for candidate in std::mem::take(&mut self.held) {
            let Stat { ino, size, mtime, .. } = candidate.stat;
            match by_look.get(&(ino, size, mtime)).and_then(|row| Some((content_of(row)?, row.file))) {
                Some((node, file)) => moved.push((candidate, node, file)),
                None => rest.push(candidate),
            }
        }
        for (Candidate { path, stat, before }, node, file) in moved {
            let chunks = self.handle.block_on(self.folder.store().read(move |reader| reader.chunk_list(file)))?;
            let _ = self.tell.send(Change { path, before, after: After::Here { stat, node, chunks, settled: true } });
        }
        for candidate in rest {
            self.read(candidate);
        }
        for row in std::mem::take(&mut self.gone) {
            let Some(path) = TreePath::from_key(&row.key) else { continue };
            let _ = self.tell.send(Change { path, before: row.disk, after: After::Gone });
        }
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
    tell: &threads::SyncSender<Change>,
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
                if tell.send(Change { path, before, after }).is_err() {
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
    changes: &threads::Receiver<Change>,
    again: &Mutex<BTreeSet<TreePath>>,
    failed: &AtomicBool,
) -> Result<(), StoreError> {
    let mut ended = false;
    while !ended {
        let Ok(first) = changes.recv() else { break };
        let since = Instant::now();
        let mut bytes = weight(&first);
        let mut batch = vec![first];
        while bytes < RECORDS_BYTES_TARGET && batch.len() < MAX_RECORDS {
            match changes.recv_timeout(GATHER.saturating_sub(since.elapsed())) {
                Ok(change) => {
                    bytes += weight(&change);
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

fn weight(change: &Change) -> usize {
    let chunks = match &change.after {
        After::Here { node: Node::File(file), .. } => match &file.chunks {
            Chunks::Whole => 0,
            Chunks::Inline(chunks) | Chunks::Listed(chunks) => chunks.len() * 40,
        },
        _ => 0,
    };
    change.path.as_str().len() + RECORD_BYTES + chunks
}

/// What becomes of a change.
struct Step {
    change: usize,
    said: Said,
}

/// What a look at a path comes to.
enum Said {
    /// It is what it was: only the look is new.
    Same,
    /// It is what the group says already.
    Adopted,
    /// A record, and its place in the batch.
    Told(u16, Record),
}

/// Appends records of changes and takes them into the index in one commit; the paths whose index changed meanwhile.
async fn tell(folder: &Arc<Folder>, changes: Vec<Change>) -> Result<Vec<TreePath>, StoreError> {
    let (fid, direction, stream) = (folder.fid, folder.direction, folder_stream(&folder.id));
    let changes = Arc::new(changes);
    let bytes = changes.iter().map(weight).sum();
    let build = {
        let changes = changes.clone();
        move |reader: &sync_store::Reader<'_>| {
            let (mut steps, mut stale, mut batch) = (Vec::new(), Vec::new(), RecordBatch::default());
            for (at, change) in changes.iter().enumerate() {
                let row = reader.file(fid, &change.path.key())?;
                if !rows::same_look(row.as_ref().and_then(|row| row.disk.as_ref()), change.before.as_ref()) {
                    stale.push(change.path.clone());
                    continue;
                }
                let Ok(index) = u16::try_from(batch.records.len()) else {
                    stale.push(change.path.clone());
                    continue;
                };
                match say(change, row.as_ref(), index)? {
                    Said::Told(..) if direction == Direction::ReceiveOnly => {}
                    said => {
                        if let Said::Told(_, record) = &said {
                            batch.records.push(record.clone());
                        }
                        steps.push(Step { change: at, said });
                    }
                }
            }
            let content = (!batch.records.is_empty()).then(|| Content::Sealed {
                kind: KIND_RECORDS,
                stream: stream.clone(),
                body: batch.encode(),
            });
            Ok((content, (steps, stale)))
        }
    };
    let work = {
        let changes = changes.clone();
        move |txn: &mut sync_store::Txn<'_>,
              appended: Option<&sync_store::Appended>,
              (steps, stale): (Vec<Step>, Vec<TreePath>)| {
            let mut pending = false;
            for Step { change, said } in steps {
                let Change { path, after, before } = &changes[change];
                let key = path.key();
                let mut versions = rows::versions(txn.reader().file(fid, &key)?.as_ref())?;
                let vector = match (said, appended) {
                    (Said::Told(index, record), Some(appended)) => {
                        let version = Version::new(&record, Dot::new(appended.author, appended.number, index));
                        let vector = version.vector.clone();
                        versions.insert(version);
                        vector
                    }
                    (Said::Same, _) => {
                        before.as_ref().map(|disk| rows::decode_vector(&disk.vector)).unwrap_or_default()
                    }
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
                let differs = apply::differs(&txn.reader(), fid, &key, &versions, disk.as_ref(), direction)?;
                pending |= differs;
                let (live, size) = apply::extent(&versions);
                let file = txn.put_file(fid, &key, &versions.encode(), live, size, disk.as_ref(), differs)?;
                let chunks = match after {
                    After::Gone => &[][..],
                    After::Here { chunks, .. } => &chunks[..],
                };
                txn.put_chunks(file, chunks)?;
                pending |= disk.is_none() && apply::emptied_above(txn, fid, &key)?;
            }
            Ok((appended.map(|appended| appended.hash), pending, stale))
        }
    };
    let (told, pending, stale) = folder.group.append_built(bytes, build, work).await?;
    let is_text = |change: &&Change| matches!(&change.after, After::Here { node, .. } if texts::may_be(node));
    changes.iter().filter(is_text).for_each(|change| folder.keep_text(&change.path));
    if let Some(hash) = told {
        folder.remember_own(hash);
        folder.changed();
    }
    if pending {
        folder.wake();
    }
    Ok(stale)
}

/// What is to be said of a change: a record at a place of the batch, or nothing.
fn say(change: &Change, row: Option<&FileRow>, index: u16) -> Result<Said, StoreError> {
    let versions = rows::versions(row)?;
    let winner = versions.winner();
    let (node, mode, mtime) = match &change.after {
        After::Gone => (Node::Deleted, 0, 0),
        After::Here { stat, node, .. } => match node {
            Node::Symlink(_) => (node.clone(), 0, stat.mtime),
            Node::Directory => (node.clone(), stat.mode, 0),
            _ => (node.clone(), stat.mode, stat.mtime),
        },
    };
    let before = change.before.as_ref().map(|disk| rows::disk(disk, &versions));
    // a time that changed alone is no change of content, and stays here
    if before.as_ref().is_some_and(|before| before.node.is_same(&node) && before.mode == mode) {
        return Ok(Said::Same);
    }
    let said = match winner {
        None => node == Node::Deleted,
        Some(winner) => {
            let same_mode = winner.mode == mode || matches!(node, Node::Symlink(_));
            // what is first seen here and is what the group has is taken as that
            winner.node.is_same(&node) && (same_mode || change.before.is_none())
        }
    };
    if said {
        return Ok(Said::Adopted);
    }
    let basis = basis(&versions, before.as_ref());
    Ok(Said::Told(index, Record { path: change.path.clone(), node, mode, mtime, basis }))
}
