//! One placed folder while the device runs: what it knows of itself, and its two tasks.
//!
//! One task tells what changes on disk (`tell`), the other takes in what the log says and applies it (`take`).
//! They meet in the database, whose writer orders them, and in the set of paths that are just being applied.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sync_core::folder::{Counts, Guard, guard};
use sync_folder::apply::Applier;
use sync_folder::cut::Cutter;
use sync_folder::root::Root;
use sync_folder::selection::Selection;
use sync_store::{FolderRow, FolderRowId, Store, StoreError, Txn};
use sync_types::folder::TreePath;
use sync_types::{EnvelopeHash, FolderId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::carry::Job;
use super::error::FolderError;
use super::index::Place;
use super::snapshots::{self, Snapshots};
use super::status::{Direction, FolderState, FolderStatus, PathProblem, Watching};
use super::{apply, take, tell, texts as texts_kept};
use crate::error::ClientError;
use crate::event::Event;
use crate::group::Group;

/// Paths with problems, and conflict copies, that a status names: more than anyone reads.
const MOST_NAMED: usize = 100;
/// Requests that wait for the task that tells.
const REQUESTS: usize = 64;
/// Large files that wait for those under way.
const LARGE: usize = 256;
/// Own entries remembered until they come back from the log; one that is forgotten is only taken in twice.
const MOST_OWN: usize = 4096;

/// What of a folder is kept as settings in the database.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    #[serde(default)]
    pub(crate) direction: Direction,
    #[serde(default)]
    pub(crate) paused: bool,
    /// The paths that this device takes; empty: all.
    #[serde(default)]
    pub(crate) selected: Vec<String>,
    /// What was selected before, until the index was brought in line and the folder was walked.
    #[serde(default)]
    pub(crate) selected_before: Option<Vec<String>>,
}

impl Settings {
    pub(crate) fn of(row: &FolderRow) -> Self {
        Self::read(&row.settings)
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub(crate) fn read(settings: &str) -> Self {
        serde_json::from_str(settings).unwrap_or_default()
    }

    /// The paths that this device takes.
    pub(crate) fn selection(&self) -> Selection {
        selection(&self.selected)
    }

    /// Those that it took before, if that is not brought to its end.
    pub(crate) fn selection_before(&self) -> Option<Selection> {
        self.selected_before.as_deref().map(selection)
    }

    pub(crate) fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

fn selection(paths: &[String]) -> Selection {
    Selection::of(paths.iter().filter_map(|path| TreePath::new(path.as_str()).ok()))
}

/// What a folder is asked to do.
pub(crate) enum Request {
    /// Walk all of it.
    Rescan(oneshot::Sender<()>),
    /// Look at some paths.
    Look(Vec<TreePath>),
}

/// A folder with a place on this device.
pub(crate) struct Folder {
    pub(crate) group: Arc<Group>,
    pub(crate) fid: FolderRowId,
    pub(crate) id: FolderId,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Where the database is.
    pub(crate) home: PathBuf,
    pub(crate) direction: Direction,
    pub(crate) selection: Selection,
    /// Nothing is applied before what is here was compared with what is selected now.
    comparing: AtomicBool,
    pub(crate) cutter: Cutter,
    pub(crate) counters: Counters,
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) cancel: CancellationToken,
    tasks: TaskTracker,
    known: Mutex<Known>,
    /// Paths that are just being applied.
    busy: Mutex<HashSet<TreePath>>,
    /// Paths that were seen to change meanwhile.
    again: Mutex<HashSet<TreePath>>,
    own: Mutex<VecDeque<EnvelopeHash>>,
    /// Large files that are being received beside everything else.
    large: Mutex<HashSet<TreePath>>,
    pub(crate) large_jobs: mpsc::Sender<Job>,
    texts: mpsc::Sender<TreePath>,
    pub(crate) applier: Mutex<Option<Arc<Applier>>>,
    pub(crate) guard: Mutex<Guard>,
    /// What is held back until somebody says that it is meant.
    held: Mutex<Option<(Counts, String)>>,
    pub(crate) snapshots: Snapshots,
    /// Moves when rows may have become pending.
    pub(crate) pending: watch::Sender<u64>,
}

/// Figures that only grow.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) scanned: AtomicU64,
    pub(crate) fetched: AtomicU64,
    pub(crate) served: AtomicU64,
    pub(crate) reused: AtomicU64,
}

impl Counters {
    /// Bytes that went to peers or came from them.
    pub(crate) fn moved(&self) -> u64 {
        self.served.load(Ordering::Relaxed).wrapping_add(self.fetched.load(Ordering::Relaxed))
    }
}

/// What a folder knows of itself.
struct Known {
    root: Option<Arc<Root>>,
    scanning: bool,
    applying: bool,
    paused: bool,
    problem: Option<String>,
    watching: Watching,
    /// Why it is not watched, or not all of it.
    unwatched: Option<String>,
    scan_ms: Option<u64>,
    /// What keeps a task from its work; it tries again.
    troubles: BTreeMap<&'static str, String>,
    problems: HashMap<String, String>,
    /// Why what others say could not be applied at a path; it counts as long as the path is pending.
    unapplied: HashMap<TreePath, String>,
    conflicts: VecDeque<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Folder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Folder").field("id", &self.id).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Folder {
    /// Starts to serve a folder that has a place; ends with `cancel`.
    pub(crate) fn start(
        group: Arc<Group>,
        home: &Path,
        row: &FolderRow,
        chunker: &sync_types::Chunker,
        snapshot_after: Option<u64>,
        cancel: CancellationToken,
        spawn: impl Fn(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>),
    ) -> Result<Option<Arc<Self>>, FolderError> {
        let Some(path) = row.root.as_ref().map(PathBuf::from) else { return Ok(None) };
        let settings = Settings::of(row);
        let (requests, asked) = mpsc::channel(REQUESTS);
        let (large_jobs, large) = mpsc::channel(LARGE);
        let (texts, synced) = mpsc::channel(texts_kept::WAITING);
        let seed = group.keys().chunker_seed();
        let folder = Arc::new(Self {
            group,
            fid: row.fid,
            id: row.id,
            name: row.name.clone(),
            path,
            home: home.to_owned(),
            direction: settings.direction,
            selection: settings.selection(),
            comparing: AtomicBool::new(settings.selected_before.is_some()),
            cutter: Cutter::new(chunker, seed)?,
            counters: Counters::default(),
            requests,
            cancel,
            tasks: TaskTracker::new(),
            known: Mutex::new(Known {
                root: None,
                scanning: !settings.paused,
                applying: false,
                paused: settings.paused,
                problem: None,
                watching: Watching::Events,
                unwatched: None,
                scan_ms: None,
                troubles: BTreeMap::new(),
                problems: HashMap::new(),
                unapplied: HashMap::new(),
                conflicts: VecDeque::new(),
            }),
            busy: Mutex::default(),
            again: Mutex::default(),
            own: Mutex::default(),
            large: Mutex::default(),
            large_jobs,
            texts,
            applier: Mutex::default(),
            guard: Mutex::new(Guard::new(guard::Settings::default())),
            held: Mutex::default(),
            snapshots: Snapshots::new(snapshot_after),
            pending: watch::channel(0).0,
        });
        if !settings.paused {
            spawn(Box::pin(folder.tasks.track_future(tell::run(folder.clone(), asked))));
            spawn(Box::pin(folder.tasks.track_future(take::run(folder.clone()))));
            spawn(Box::pin(folder.tasks.track_future(apply::run(folder.clone()))));
            spawn(Box::pin(folder.tasks.track_future(apply::run_large(folder.clone(), large))));
            spawn(Box::pin(folder.tasks.track_future(snapshots::run(folder.clone()))));
            spawn(Box::pin(folder.tasks.track_future(texts_kept::run(folder.clone(), synced))));
        }
        folder.tasks.close();
        Ok(Some(folder))
    }

    /// Waits until both tasks have ended after `cancel`.
    pub(crate) async fn ended(&self) {
        self.tasks.wait().await;
    }

    pub(crate) fn store(&self) -> &Store {
        self.group.store()
    }

    /// Where it is in the database.
    pub(crate) fn place(&self) -> Place {
        Place { fid: self.fid, id: self.id, way: self.direction, selection: self.selection.clone() }
    }

    /// The open root, if it is there.
    pub(crate) fn root(&self) -> Option<Arc<Root>> {
        lock(&self.known).root.clone()
    }

    pub(crate) fn set_root(&self, root: Option<Arc<Root>>) {
        lock(&self.known).root = root;
    }

    /// Stops with a reason, or goes on; told to those who listen when it is news.
    pub(crate) fn set_problem(&self, problem: Option<String>) {
        let news = {
            let mut known = lock(&self.known);
            let news = known.problem != problem;
            known.problem.clone_from(&problem);
            news
        };
        if news {
            if let Some(message) = problem {
                tracing::warn!(folder = %self.name, %message, "folder stops");
                self.group
                    .emit(Event::Error { code: "folder".to_owned(), message: format!("{}: {message}", self.name) });
            }
            self.changed();
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        lock(&self.known).problem.is_some()
    }

    pub(crate) fn set_scanning(&self, scanning: bool) {
        lock(&self.known).scanning = scanning;
        self.changed();
    }

    pub(crate) fn set_applying(&self, applying: bool) {
        let news = {
            let mut known = lock(&self.known);
            std::mem::replace(&mut known.applying, applying) != applying
        };
        if news {
            self.changed();
        }
    }

    /// Whether it is walked or something is being applied.
    pub(crate) fn is_at_work(&self) -> bool {
        let known = lock(&self.known);
        known.scanning || known.applying
    }

    /// Has the text at a path kept, as it is now, once there is time; while too many wait it is not.
    pub(crate) fn keep_text(&self, path: &TreePath) {
        let _ = self.texts.try_send(path.clone());
    }

    /// Whether the system tells of changes, and if not of all, why.
    pub(crate) fn set_watching(&self, unwatched: Option<String>) {
        {
            let mut known = lock(&self.known);
            known.watching = if unwatched.is_some() { Watching::Rescans } else { Watching::Events };
            known.unwatched = unwatched;
        }
        self.changed();
    }

    /// Notes what keeps a task from its work, or that nothing does any more; told to those who listen when it is news.
    pub(crate) fn set_trouble(&self, task: &'static str, trouble: Option<String>) {
        let news = {
            let mut known = lock(&self.known);
            match trouble.clone() {
                Some(trouble) => known.troubles.insert(task, trouble),
                None => known.troubles.remove(task),
            }
        } != trouble;
        if news {
            if let Some(message) = trouble {
                tracing::warn!(task, %message, "folder waits");
                let message = format!("{}: {message}", self.name);
                self.group.emit(Event::Error { code: "folder".to_owned(), message });
            }
            self.changed();
        }
    }

    /// Whether another selection was made, and the folder was not walked since.
    pub(crate) fn is_comparing(&self) -> bool {
        self.comparing.load(Ordering::Acquire)
    }

    /// Notes that all of the folder was compared with what is selected.
    pub(crate) async fn compared(&self) -> Result<(), StoreError> {
        if !self.is_comparing() {
            return Ok(());
        }
        let (group, id) = (self.group.id, self.id);
        let settled = move |txn: &mut Txn<'_>| {
            let Some(row) = txn.reader().folder(&group, &id)? else { return Ok(()) };
            let settings = Settings { selected_before: None, ..Settings::of(&row) };
            txn.set_folder_settings(row.fid, &settings.encode())
        };
        self.store().write(0, settled).await?;
        self.comparing.store(false, Ordering::Release);
        Ok(())
    }

    pub(crate) fn set_scan_time(&self, took: Duration) {
        lock(&self.known).scan_ms = Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }

    /// Notes that a path is out of sync, or is in sync again.
    pub(crate) fn set_path_problem(&self, path: &str, problem: Option<String>) {
        let mut known = lock(&self.known);
        match problem {
            Some(problem) if known.problems.len() < MOST_NAMED || known.problems.contains_key(path) => {
                known.problems.insert(path.to_owned(), problem);
            }
            Some(_) => {}
            None => {
                known.problems.remove(path);
            }
        }
    }

    /// Notes why something could not be applied at a path, or that it could.
    pub(crate) fn set_unapplied(&self, path: &TreePath, problem: Option<String>) {
        let mut known = lock(&self.known);
        match problem {
            Some(problem) if known.unapplied.len() < MOST_NAMED || known.unapplied.contains_key(path) => {
                known.unapplied.insert(path.clone(), problem);
            }
            Some(_) => {}
            None => {
                known.unapplied.remove(path);
            }
        }
    }

    pub(crate) fn clear_path_problems(&self) {
        lock(&self.known).problems.clear();
    }

    pub(crate) fn add_conflict(&self, path: &TreePath) {
        let mut known = lock(&self.known);
        if known.conflicts.len() == MOST_NAMED {
            known.conflicts.pop_front();
        }
        known.conflicts.push_back(path.to_string());
        drop(known);
        self.group.emit(Event::FolderConflict { folder: self.id, path: path.to_string() });
    }

    /// Tells those who listen that the picture changed.
    pub(crate) fn changed(&self) {
        self.group.emit(Event::FolderChanged { folder: self.id });
    }

    /// Wakes the task that applies.
    pub(crate) fn wake(&self) {
        self.pending.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Claims a path for applying; whoever scans passes it over meanwhile.
    pub(crate) fn claim(&self, path: &TreePath) {
        lock(&self.busy).insert(path.clone());
    }

    /// Claims a large file for receiving it beside everything else; false if it is under way already.
    pub(crate) fn claim_large(&self, path: &TreePath) -> bool {
        lock(&self.large).insert(path.clone())
    }

    pub(crate) fn release_large(&self, paths: impl IntoIterator<Item = TreePath>) {
        let mut large = lock(&self.large);
        for path in paths {
            large.remove(&path);
        }
    }

    /// Holds a mass change back and says why, or lets it go.
    pub(crate) fn hold(&self, held: Option<(Counts, String)>) {
        let news = {
            let mut known = lock(&self.held);
            std::mem::replace(&mut *known, held.clone()) != held
        };
        if news {
            if let Some((_, message)) = held {
                let message = format!("{}: {message}", self.name);
                self.group.emit(Event::Error { code: "held".to_owned(), message });
            }
            self.changed();
        }
    }

    /// Says that what is held back is meant.
    pub(crate) fn confirm(&self) {
        let held = lock(&self.held).take();
        if let Some((held, _)) = held {
            lock(&self.guard).confirm(crate::group::now().0, held);
            self.changed();
        }
        self.wake();
    }

    /// Gives paths back; those that were seen to change meanwhile are looked at again.
    pub(crate) fn release<'a>(&self, paths: impl IntoIterator<Item = &'a TreePath>) {
        let mut look = Vec::new();
        {
            let (mut busy, mut again) = (lock(&self.busy), lock(&self.again));
            for path in paths {
                busy.remove(path);
                look.extend(again.take(path));
            }
        }
        if !look.is_empty() {
            // if it does not fit, the next scan finds them
            let _ = self.requests.try_send(Request::Look(look));
        }
    }

    /// Whether a path is just being applied; it is looked at again later.
    pub(crate) fn is_busy(&self, path: &TreePath) -> bool {
        let busy = lock(&self.busy);
        let is_busy = busy.contains(path);
        if is_busy {
            // before it can be given back
            lock(&self.again).insert(path.clone());
        }
        is_busy
    }

    /// Leaves out the paths that are just being applied; they are looked at again later.
    pub(crate) fn retain_idle(&self, paths: &mut BTreeSet<TreePath>) {
        let busy = lock(&self.busy);
        if !busy.is_empty() {
            let mut again = lock(&self.again);
            again.extend(paths.extract_if(.., |path| busy.contains(path)));
        }
    }

    /// Has a path looked at, since it is not what the index says.
    pub(crate) fn look_again(&self, path: &TreePath) {
        let _ = self.requests.try_send(Request::Look(vec![path.clone()]));
    }

    pub(crate) fn remember_own(&self, hash: EnvelopeHash) {
        let mut own = lock(&self.own);
        if own.len() == MOST_OWN {
            own.pop_front();
        }
        own.push_back(hash);
    }

    /// Whether an entry is one that was taken into the index when it was told.
    pub(crate) fn is_own(&self, hash: &EnvelopeHash) -> bool {
        let mut own = lock(&self.own);
        match own.iter().position(|known| known == hash) {
            Some(at) => {
                own.remove(at);
                true
            }
            None => false,
        }
    }

    /// A picture of it.
    pub(crate) async fn status(&self) -> Result<FolderStatus, ClientError> {
        let fid = self.fid;
        let unapplied: Vec<TreePath> = lock(&self.known).unapplied.keys().cloned().collect();
        let (totals, cursor, settled) = {
            let (group, id) = (self.group.id, self.id);
            self.store()
                .read(move |reader| {
                    let cursor = reader.folder(&group, &id)?.map(|row| row.cursor);
                    // what came to nothing by itself, since others changed it once more
                    let mut settled = Vec::new();
                    for path in unapplied {
                        if !reader.file(fid, &path.key())?.is_some_and(|row| row.pending) {
                            settled.push(path);
                        }
                    }
                    Ok((reader.folder_totals(fid)?, cursor, settled))
                })
                .await?
        };
        let behind = cursor.is_some_and(|cursor| cursor < *self.group.watch_newest().borrow());
        let held = lock(&self.held).as_ref().map(|(_, message)| message.clone());
        let trouble = self.group.trouble();
        let mut known = lock(&self.known);
        settled.iter().for_each(|path| drop(known.unapplied.remove(path)));
        let unapplied = known.unapplied.iter().map(|(path, problem)| (path.to_string(), problem.clone()));
        let mut problems: Vec<_> = known.problems.clone().into_iter().chain(unapplied).collect();
        problems.sort();
        problems.truncate(MOST_NAMED);
        let state = if known.paused {
            FolderState::Paused
        } else if known.problem.is_some() || held.is_some() || !known.troubles.is_empty() || trouble.is_some() {
            FolderState::Stopped
        } else if known.scanning {
            FolderState::Scanning
        } else if known.applying
            || behind
            || self.snapshots.awaits()
            || (totals.pending_files > 0 && self.direction != Direction::SendOnly)
        {
            FolderState::Syncing
        } else {
            FolderState::UpToDate
        };
        let figure = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(FolderStatus {
            id: self.id.to_string(),
            group: self.group.id.to_string(),
            name: self.name.clone(),
            path: self.path.clone(),
            direction: self.direction,
            state,
            problem: known.problem.clone().or(held).or_else(|| known.troubles.values().next().cloned()).or(trouble),
            watching: known.watching,
            unwatched: known.unwatched.clone(),
            files: totals.files,
            bytes: totals.bytes,
            pending_files: totals.pending_files,
            pending_bytes: totals.pending_bytes,
            selected: self.selection.paths().map(ToString::to_string).collect(),
            left_out_files: totals.left_out_files,
            left_out_bytes: totals.left_out_bytes,
            scanned_files: figure(&self.counters.scanned),
            scan_ms: known.scan_ms,
            fetched_bytes: figure(&self.counters.fetched),
            served_bytes: figure(&self.counters.served),
            reused_bytes: figure(&self.counters.reused),
            problems: problems
                .into_iter()
                .map(|(path, problem)| PathProblem { path, problem })
                .chain(self.snapshots.problem().map(|problem| PathProblem { path: String::new(), problem }))
                .collect(),
            conflicts: known.conflicts.iter().cloned().collect(),
        })
    }
}
