//! Tells which paths of a folder were changed, soon after and not one by one.
//!
//! What is told is a hint: whoever hears it looks at the paths and at everything below them. That also covers what was
//! put into a new directory before the system began to watch it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, EventKind, ModifyKind, RenameMode};
use notify::{Config, EventKindMask, RecommendedWatcher, RecursiveMode, Watcher as _};
use sync_types::folder::{OWN_DIR, TreePath};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::root::Root;

/// How long nothing may happen before what did is told: what a program does to save one file takes less.
pub const QUIET: Duration = Duration::from_millis(10);
/// How long is waited for quiet at most.
pub const AT_MOST: Duration = Duration::from_millis(100);
/// Paths told at once; looking at everything is quicker than at more of them.
pub const MAX_PATHS: usize = 4096;
/// Tidings that wait to be heard; what follows them is gathered until then.
const WAITING: usize = 1;

/// What was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Changed {
    /// Something at these paths or below them.
    Paths(BTreeSet<TreePath>),
    /// Nobody knows what: everything is looked at again.
    Everything(Reason),
}

/// Why nobody knows what was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// More happened than the system kept.
    Overflow,
    /// More than [`MAX_PATHS`] paths at once.
    TooManyPaths,
    /// The root itself was moved, removed or changed.
    Root,
    /// The system did not say where.
    Unknown,
    /// New directories are not watched: the system's limit is reached. From now on changes in them are not told.
    Limit,
    /// Watching failed. From now on some changes are not told.
    Failed,
}

/// Why a folder cannot be watched; it is looked through from time to time instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The system watches no more directories.
    #[error("too many directories to watch; raise fs.inotify.max_user_watches to hear of changes at once")]
    Limit,
    /// Changes made elsewhere are not told on a network's file system.
    #[error("changes are not told on a {0} file system; the folder is looked through from time to time")]
    FileSystem(&'static str),
    /// The system refused.
    #[error("cannot watch the folder: {0}")]
    Io(io::Error),
}

impl From<notify::Error> for WatchError {
    fn from(error: notify::Error) -> Self {
        match error.kind {
            notify::ErrorKind::MaxFilesWatch => Self::Limit,
            // too many instances of inotify
            notify::ErrorKind::Io(error) if error.raw_os_error() == Some(EMFILE) => Self::Limit,
            notify::ErrorKind::Io(error) => Self::Io(error),
            other => Self::Io(io::Error::other(notify::Error::new(other))),
        }
    }
}

/// The number of "too many open files", the same on every Unix.
const EMFILE: i32 = 24;

/// Watches a folder until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
}

impl Watcher {
    /// Begins to watch; what is changed after this returned is told.
    pub fn start(root: &Root) -> Result<(Self, Receiver<Changed>), WatchError> {
        if let Some(name) = network_file_system(root) {
            return Err(WatchError::FileSystem(name));
        }
        // macOS tells the paths of what it watches with every link resolved
        let path = root.path().canonicalize().map_err(WatchError::Io)?;
        let shared = Arc::new(Shared::default());
        let handler = Handler { root: path.clone(), shared: shared.clone() };
        let mut watcher = RecommendedWatcher::new(move |event| handler.handle(event), config())?;
        watcher.watch(&path, RecursiveMode::Recursive)?;
        // not all systems can leave something out; what they tell of it is dropped
        if let Err(error) = watcher.unwatch(&path.join(OWN_DIR)) {
            tracing::debug!(%error, "own directory stays watched");
        }
        let (told, changes) = channel(WAITING);
        let gathering = shared.clone();
        let spawned = thread::Builder::new().name("folder-watch".to_owned());
        spawned.spawn(move || gather(&gathering, &path, watcher, &told)).map_err(WatchError::Io)?;
        Ok((Self { shared }, changes))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.lock().is_stopped = true;
        self.shared.changed.notify_all();
    }
}

/// What is asked of the system. Opening and reading are left out: every look at a file of our own would be told.
fn config() -> Config {
    // who writes through a mapping is heard of only when the file is closed
    let kinds = EventKindMask::CORE | EventKindMask::ACCESS_CLOSE;
    Config::default().with_follow_symlinks(false).with_event_kinds(kinds)
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What happened and was not told yet.
#[derive(Debug, Default)]
struct Pending {
    paths: BTreeSet<TreePath>,
    everything: Option<Reason>,
    /// Directories that could not be watched because they may not be read: tried again when something happens to them.
    unwatched: BTreeSet<TreePath>,
    /// A directory is new: it may not be watched yet.
    has_new_directory: bool,
    /// When the last of it happened, to see whether it is quiet.
    last: Option<Instant>,
    is_stopped: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.paths.is_empty() && self.everything.is_none()
    }

    fn add(&mut self, path: TreePath) {
        self.last = Some(Instant::now());
        if self.everything.is_some() {
            return;
        }
        self.paths.insert(path);
        if self.paths.len() > MAX_PATHS {
            self.add_everything(Reason::TooManyPaths);
        }
    }

    fn add_everything(&mut self, reason: Reason) {
        self.last = Some(Instant::now());
        self.paths.clear();
        // that some changes are never told again must not be lost behind a passing reason
        if !matches!(self.everything, Some(Reason::Limit | Reason::Failed)) {
            self.everything = Some(reason);
        }
    }

    fn take(&mut self) -> Changed {
        self.has_new_directory = false;
        match self.everything.take() {
            Some(reason) => Changed::Everything(reason),
            None => Changed::Paths(std::mem::take(&mut self.paths)),
        }
    }
}

/// Hears of events on the thread of the library, which must not wait.
struct Handler {
    root: PathBuf,
    shared: Arc<Shared>,
}

impl Handler {
    fn handle(&self, event: notify::Result<notify::Event>) {
        let mut pending = self.shared.lock();
        let was_empty = pending.is_empty();
        match event {
            Err(error) if matches!(error.kind, notify::ErrorKind::MaxFilesWatch) => {
                pending.add_everything(Reason::Limit);
            }
            // the system goes on with the others, and a scan names the directory
            Err(error) if is_unreadable(&error) && self.below(&error).is_some() => {
                for path in self.below(&error).into_iter().flatten() {
                    pending.unwatched.insert(path.clone());
                    pending.add(path);
                }
            }
            Err(error) => {
                tracing::debug!(%error, "watching failed");
                pending.add_everything(Reason::Failed);
            }
            Ok(event) if event.need_rescan() => pending.add_everything(Reason::Overflow),
            // reading changes nothing; our own scans would be told without end
            Ok(event) if is_reading(event.kind) => {}
            Ok(event) if event.paths.is_empty() => pending.add_everything(Reason::Unknown),
            Ok(event) => {
                for path in &event.paths {
                    self.add(&mut pending, path, event.kind);
                }
            }
        }
        // whoever waits for quiet looks at the time by itself
        if was_empty && !pending.is_empty() {
            drop(pending);
            self.shared.changed.notify_all();
        }
    }

    /// The paths below the root that an error is about; none if it is about something else too, or about nothing.
    fn below(&self, error: &notify::Error) -> Option<Vec<TreePath>> {
        let below = |path: &PathBuf| tree_path(path.strip_prefix(&self.root).ok()?);
        let paths: Option<Vec<_>> = error.paths.iter().map(below).collect();
        paths.filter(|paths| !paths.is_empty())
    }

    fn add(&self, pending: &mut Pending, path: &Path, kind: EventKind) {
        match path.strip_prefix(&self.root) {
            Ok(below) if below.as_os_str().is_empty() => {
                // its own times change with every name in it, which is told by itself
                if !matches!(kind, EventKind::Modify(ModifyKind::Metadata(_))) {
                    pending.add_everything(Reason::Root);
                }
            }
            Ok(below) => {
                if let Some(path) = tree_path(below) {
                    pending.has_new_directory |= may_be_new_directory(kind);
                    pending.add(path);
                }
            }
            Err(_) => pending.add_everything(Reason::Unknown),
        }
    }
}

fn is_unreadable(error: &notify::Error) -> bool {
    matches!(&error.kind, notify::ErrorKind::Io(error) if error.kind() == io::ErrorKind::PermissionDenied)
}

/// The path, if a record can name it; what cannot be named is found and reported by the next scan.
fn tree_path(below: &Path) -> Option<TreePath> {
    let components = below.components().map(|component| component.as_os_str().to_str());
    TreePath::new(components.collect::<Option<Vec<_>>>()?.join("/")).ok()
}

fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

fn may_be_new_directory(kind: EventKind) -> bool {
    use EventKind::{Any, Create, Modify};
    use RenameMode::From;
    match kind {
        Create(kind) => kind != CreateKind::File,
        Modify(ModifyKind::Name(mode)) => mode != From,
        Any | Modify(ModifyKind::Any) => true,
        _ => false,
    }
}

/// Tells what happened once it is quiet, until nobody listens.
fn gather(shared: &Shared, root: &Path, mut watcher: RecommendedWatcher, told: &Sender<Changed>) {
    loop {
        let mut pending = shared.lock();
        while pending.is_empty() && !pending.is_stopped {
            pending = shared.changed.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        let at_most = Instant::now() + AT_MOST;
        while !pending.is_stopped {
            let quiet = pending.last.map_or(at_most, |last| (last + QUIET).min(at_most));
            let left = quiet.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            pending = shared.changed.wait_timeout(pending, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if pending.is_stopped {
            return;
        }
        let has_new_directory = pending.has_new_directory;
        let changed = pending.take();
        let touched = |path: &TreePath| match &changed {
            Changed::Paths(paths) => paths.contains(path),
            Changed::Everything(_) => true,
        };
        let again: Vec<TreePath> = pending.unwatched.extract_if(.., |path| touched(path)).collect();
        drop(pending);
        for path in again {
            // what is in it is looked at after that, since its directory changed
            if watcher.watch(&root.join(path.as_str()), RecursiveMode::Recursive).is_err() {
                shared.lock().unwatched.insert(path);
            }
        }
        if has_new_directory {
            // It is answered by the thread that adds watches to new directories, after it did: whoever looks at what is
            // told from here on sees what happened before they were watched.
            if let Err(error) = watcher.configure(config()) {
                tracing::debug!(%error, "the watcher did not answer");
            }
        }
        if told.blocking_send(changed).is_err() {
            return;
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn network_file_system(root: &Root) -> Option<&'static str> {
    // the numbers of linux/magic.h, in the low half of a word that is signed on some machines
    let kind = rustix::fs::fstatfs(root.dir()).ok()?.f_type;
    match i128::from(kind) & 0xffff_ffff {
        0x6969 => Some("NFS"),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some("SMB"),
        0x0102_1997 => Some("9P"),
        0x00c3_6400 => Some("Ceph"),
        0x5346_414f | 0x6b41_4653 => Some("AFS"),
        0x7375_7245 => Some("Coda"),
        _ => None,
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn network_file_system(_root: &Root) -> Option<&'static str> {
    None
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sync_types::FolderId;
    use tempfile::TempDir;
    use tokio::sync::mpsc::error::TryRecvError;

    use super::*;

    /// Longer than a loaded machine takes to tell anything.
    const PATIENCE: Duration = Duration::from_secs(20);

    struct Watched {
        temp: TempDir,
        root: Root,
        _watcher: Watcher,
        changes: Receiver<Changed>,
    }

    impl Watched {
        fn new() -> Self {
            Self::after(|_| ())
        }

        fn after(prepare: impl FnOnce(&Path)) -> Self {
            let temp = tempfile::tempdir().expect("a directory");
            let root = Root::create(&temp.path().join("root"), &FolderId([7; 16])).expect("a root");
            prepare(root.path());
            let (watcher, changes) = Watcher::start(&root).expect("watched");
            Self { temp, root, _watcher: watcher, changes }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn next(&mut self, patience: Duration) -> Option<Changed> {
            let until = Instant::now() + patience;
            while Instant::now() < until {
                match self.changes.try_recv() {
                    Ok(changed) => return Some(changed),
                    Err(TryRecvError::Empty) => thread::sleep(Duration::from_millis(1)),
                    Err(TryRecvError::Disconnected) => panic!("the watcher ended"),
                }
            }
            None
        }

        /// Waits until all of these were told, each by itself or by a directory it lies in.
        fn wait_for(&mut self, paths: &[&str]) {
            let mut left: BTreeSet<TreePath> = paths.iter().map(|path| TreePath::new(*path).expect("a path")).collect();
            while !left.is_empty() {
                match self.next(PATIENCE) {
                    Some(Changed::Paths(told)) => {
                        left.retain(|path| !told.iter().any(|told| told == path || path.is_below(told)));
                    }
                    other => panic!("{left:?} not told, but {other:?}"),
                }
            }
        }

        fn assert_quiet(&mut self) {
            assert_eq!(self.next(Duration::from_millis(300)), None);
        }
    }

    #[test]
    fn what_is_done_to_a_file_is_told() {
        let mut watched = Watched::after(|root| {
            fs::create_dir_all(root.join("a/b")).expect("made");
            fs::write(root.join("a/b/old"), "").expect("written");
        });
        let told = |path: &str| Some(Changed::Paths([TreePath::new(path).expect("a path")].into()));
        fs::write(watched.at("a/b/file"), "content").expect("written");
        assert_eq!(watched.next(PATIENCE), told("a/b/file"));
        fs::File::options().append(true).open(watched.at("a/b/old")).expect("opened").set_len(9).expect("grown");
        watched.wait_for(&["a/b/old"]);
        let mut read_only = fs::metadata(watched.at("a/b/old")).expect("there").permissions();
        read_only.set_readonly(true);
        fs::set_permissions(watched.at("a/b/old"), read_only).expect("set");
        watched.wait_for(&["a/b/old"]);
        fs::rename(watched.at("a/b/file"), watched.at("moved")).expect("moved");
        watched.wait_for(&["a/b/file", "moved"]);
        fs::remove_file(watched.at("a/b/old")).expect("removed");
        watched.wait_for(&["a/b/old"]);
        fs::rename(watched.at("moved"), watched.temp.path().join("out")).expect("moved");
        watched.wait_for(&["moved"]);
        watched.assert_quiet();
    }

    #[test]
    fn a_burst_is_told_in_few_pieces() {
        let mut watched = Watched::new();
        let began = Instant::now();
        for n in 0..500 {
            fs::write(watched.at(&n.to_string()), "content").expect("written");
        }
        let most = 2 + began.elapsed().as_millis() / QUIET.as_millis();
        let (mut left, mut told) = ((0..500).map(|n| n.to_string()).collect::<BTreeSet<_>>(), 0);
        while !left.is_empty() {
            let Some(Changed::Paths(paths)) = watched.next(PATIENCE) else { panic!("{left:?} not told") };
            left.retain(|path| !paths.iter().any(|told| told.as_str() == path));
            told += 1;
        }
        assert!(told <= most.min(100), "{told} of {most}");
    }

    #[test]
    fn neither_reading_nor_our_own_directory_is_told() {
        let mut watched = Watched::after(|root| fs::write(root.join("file"), "content").expect("written"));
        fs::read(watched.at("file")).expect("read");
        fs::write(watched.at(".syncshell/tmp/x"), "").expect("written");
        fs::rename(watched.at(".syncshell/tmp/x"), watched.at(".syncshell/versions/x")).expect("moved");
        crate::walk::walk(&watched.root, None, &crate::ignored::Ignored::default(), &mut |_| {
            std::ops::ControlFlow::Continue(())
        })
        .expect("walked");
        watched.assert_quiet();
    }

    #[test]
    fn what_is_put_into_a_new_directory_is_told() {
        let mut watched = Watched::new();
        for n in 0..20 {
            let deep = watched.at(&format!("{n}/a/b/c"));
            fs::create_dir_all(&deep).expect("made");
            fs::write(deep.join("file"), "content").expect("written");
        }
        let files: Vec<_> = (0..20).map(|n| format!("{n}/a/b/c/file")).collect();
        watched.wait_for(&files.iter().map(String::as_str).collect::<Vec<_>>());
        while watched.next(Duration::from_millis(300)).is_some() {}
        // once a directory was told, what follows in it is told by itself
        for n in 0..20 {
            let path = format!("{n}/a/b/c/later");
            fs::write(watched.at(&path), "").expect("written");
            watched.wait_for(&[&path]);
        }
    }

    #[test]
    fn a_directory_that_was_moved_is_watched_where_it_is() {
        let mut watched = Watched::after(|root| fs::create_dir_all(root.join("a/b")).expect("made"));
        let outside = watched.temp.path().join("outside");
        fs::create_dir_all(outside.join("deep")).expect("made");
        fs::rename(&outside, watched.at("in")).expect("moved");
        watched.wait_for(&["in"]);
        fs::write(watched.at("in/deep/file"), "").expect("written");
        watched.wait_for(&["in/deep/file"]);
        fs::rename(watched.at("a"), watched.at("z")).expect("moved");
        watched.wait_for(&["a", "z"]);
        fs::write(watched.at("z/b/file"), "").expect("written");
        watched.wait_for(&["z/b/file"]);
    }

    #[test]
    fn too_many_paths_are_everything() {
        let mut pending = Pending::default();
        let path = |n: usize| TreePath::new(n.to_string()).expect("a path");
        (0..MAX_PATHS).for_each(|n| pending.add(path(n)));
        assert_eq!(pending.take(), Changed::Paths((0..MAX_PATHS).map(path).collect()));
        (0..3 * MAX_PATHS).for_each(|n| pending.add(path(n)));
        assert!(pending.paths.is_empty());
        assert_eq!(pending.take(), Changed::Everything(Reason::TooManyPaths));
        pending.add(path(0));
        assert_eq!(pending.take(), Changed::Paths([path(0)].into()));
    }

    #[test]
    fn a_root_that_is_moved_is_everything() {
        let mut watched = Watched::new();
        fs::rename(watched.root.path(), watched.temp.path().join("away")).expect("moved");
        assert_eq!(watched.next(PATIENCE), Some(Changed::Everything(Reason::Root)));
    }

    #[test]
    fn a_watcher_that_is_dropped_tells_no_more() {
        let Watched { _watcher: watcher, mut changes, temp, root } = Watched::new();
        drop(watcher);
        fs::write(root.path().join("file"), "").expect("written");
        assert_eq!(changes.blocking_recv(), None);
        drop(temp);
    }

    #[test]
    fn a_lasting_reason_is_not_lost_behind_a_passing_one() {
        let mut pending = Pending::default();
        pending.add_everything(Reason::Overflow);
        pending.add_everything(Reason::Limit);
        pending.add_everything(Reason::Overflow);
        assert_eq!(pending.take(), Changed::Everything(Reason::Limit));
        assert!(pending.is_empty());
    }

    #[test]
    fn a_full_table_of_watches_is_told_as_such() {
        let full = notify::Error::new(notify::ErrorKind::MaxFilesWatch);
        assert!(matches!(WatchError::from(full), WatchError::Limit));
        let too_many = notify::Error::io(io::Error::from_raw_os_error(EMFILE));
        assert!(matches!(WatchError::from(too_many), WatchError::Limit));
        let other = notify::Error::io(io::ErrorKind::PermissionDenied.into());
        assert!(matches!(WatchError::from(other), WatchError::Io(_)));
    }
}
