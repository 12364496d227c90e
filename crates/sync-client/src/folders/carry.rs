//! Carries out what was decided: the same code on a real disk and on the simulator's, under tasks and without.
//!
//! What is changed on disk is durable before the index says so: a crash in between leaves something for the next look,
//! and never an index that names what is not there.

use std::collections::HashMap;

use sync_core::folder::{Disk, Operation, Over, Version, conflict_path};
use sync_folder::apply::{Applier, ApplyError, Expected, Placed, Ready};
use sync_folder::versions::Kept;
use sync_folder::walk::{self, Stat};
use sync_store::{DiskState, FileRow, StoreError};
use sync_types::folder::{Node, TreePath};

use super::index::{Applied, Aside, Conflict, Known, Loser, Merged, Winner};
use super::rows::{self, ChunkRow};

/// Permission bits of a directory that nobody said anything of.
pub(super) const DIRECTORY_MODE: u32 = 0o755;
/// Paths whose new state is committed together.
const COMMITTED: usize = 1024;

/// What changes a folder's tree; every operation says what it expects to find, and touches nothing else.
pub trait Files {
    /// A file that was received as a whole and waits for its place.
    type Ready: Clone;

    /// Whether nothing at all is at a path.
    fn is_free(&self, path: &TreePath) -> bool;
    /// Makes the content of received files durable.
    fn sync(&self, ready: &[Self::Ready]) -> Result<(), ApplyError>;
    /// Puts a received file in its place, and keeps what lay there.
    fn place(&self, ready: &Self::Ready, path: &TreePath, expected: Expected) -> Result<Placed, ApplyError>;
    /// Removes a received file that is not going to get a place.
    fn discard(&self, ready: &Self::Ready) -> Result<(), ApplyError>;
    /// Moves something to a path where nothing is.
    fn rename(&self, from: &TreePath, expected: &Stat, to: &TreePath) -> Result<Stat, ApplyError>;
    /// Takes a file or a link away and keeps it; none where nothing is there already.
    fn remove(&self, path: &TreePath, expected: &Stat) -> Result<Option<Kept>, ApplyError>;
    /// Makes a directory and those above it; one that is there already stays as it is.
    fn make_dir(&self, path: &TreePath, mode: u32) -> Result<Stat, ApplyError>;
    /// Takes away a directory that holds nothing.
    fn remove_dir(&self, path: &TreePath) -> Result<(), ApplyError>;
    /// Puts a symbolic link at a path, and keeps what lay there.
    fn make_link(&self, path: &TreePath, target: &str, expected: Expected) -> Result<Placed, ApplyError>;
    /// Sets permission bits, and the time if there is one.
    fn set_meta(&self, path: &TreePath, expected: &Stat, mode: u32, mtime: Option<i64>) -> Result<Stat, ApplyError>;
    /// Makes all names durable that were changed since the last call.
    fn sync_dirs(&self) -> Result<(), ApplyError>;
}

impl Files for Applier {
    type Ready = Ready;

    fn is_free(&self, path: &TreePath) -> bool {
        matches!(walk::stat(self.root(), path), Ok(None))
    }

    fn sync(&self, ready: &[Ready]) -> Result<(), ApplyError> {
        self.sync(ready)
    }

    fn place(&self, ready: &Ready, path: &TreePath, expected: Expected) -> Result<Placed, ApplyError> {
        self.place(ready, path, expected)
    }

    fn discard(&self, ready: &Ready) -> Result<(), ApplyError> {
        self.discard(ready)
    }

    fn rename(&self, from: &TreePath, expected: &Stat, to: &TreePath) -> Result<Stat, ApplyError> {
        self.rename(from, expected, to)
    }

    fn remove(&self, path: &TreePath, expected: &Stat) -> Result<Option<Kept>, ApplyError> {
        self.remove(path, expected)
    }

    fn make_dir(&self, path: &TreePath, mode: u32) -> Result<Stat, ApplyError> {
        self.make_dir(path, mode)
    }

    fn remove_dir(&self, path: &TreePath) -> Result<(), ApplyError> {
        self.remove_dir(path)
    }

    fn make_link(&self, path: &TreePath, target: &str, expected: Expected) -> Result<Placed, ApplyError> {
        self.make_link(path, target, expected)
    }

    fn set_meta(&self, path: &TreePath, expected: &Stat, mode: u32, mtime: Option<i64>) -> Result<Stat, ApplyError> {
        self.set_meta(path, expected, mode, mtime)
    }

    fn sync_dirs(&self) -> Result<(), ApplyError> {
        self.sync_dirs()
    }
}

/// The index, and whoever else works on the folder.
pub trait Desk<F: Files> {
    /// What the index says of a path.
    fn row(&mut self, path: &TreePath) -> Result<Option<FileRow>, StoreError>;
    /// Notes what was done, durably: [`super::index::commit`].
    fn commit(&mut self, applied: Vec<Applied>) -> Result<(), StoreError>;
    /// Puts what two edits of a text come to in their place; none where they cannot be merged.
    fn merge(
        &mut self,
        files: &F,
        job: &Job,
        loser: &Loser,
        won: (&F::Ready, &[ChunkRow]),
        expected: Expected,
    ) -> Result<Option<Merged>, ApplyError>;
    /// Tells conflicts and takes them into the index: [`super::index::settle`] and [`super::index::settled`].
    fn settle(&mut self, conflicts: Vec<Conflict>) -> Result<(), StoreError>;
    /// Claims a path: whoever scans passes it over meanwhile.
    fn claim(&mut self, path: &TreePath);
    /// Gives paths back.
    fn release(&mut self, paths: &[TreePath]);
    /// Has a path looked at, since it is not what the index says.
    fn look_again(&mut self, path: &TreePath);
    /// Notes that a path is out of sync, and why, or that it is in sync.
    fn note(&mut self, path: &TreePath, problem: Option<String>);
}

/// A file that is to be there.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "whoever receives a file needs all of it")]
pub struct Job {
    /// Where.
    pub path: TreePath,
    /// What is to lie there.
    pub take: Disk,
    /// What the index says of what lies there.
    pub before: Option<DiskState>,
    /// What lies there lost, and is renamed.
    pub loser: Option<Loser>,
}

impl Job {
    /// The file that an operation is to make, with what is known of what lies in its place; none if it makes none.
    #[must_use]
    pub fn of(operation: Operation, known: &mut HashMap<TreePath, Known>) -> Option<Self> {
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
        Some(Self { path, take, before, loser })
    }

    /// Whether an operation is a file whose content is to come.
    #[must_use]
    pub fn is_one(operation: &Operation) -> bool {
        match operation {
            Operation::Write { disk, .. } | Operation::Copy { disk, .. } => matches!(disk.node, Node::File(_)),
            _ => false,
        }
    }

    /// Bytes of the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        match &self.take.node {
            Node::File(file) => file.size,
            _ => 0,
        }
    }
}

/// A file that is whole, for the place it is to take.
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "whoever received a file says all of it")]
pub struct Whole<'a, R> {
    /// What it is for.
    pub job: &'a Job,
    /// It.
    pub ready: R,
    /// The chunks of it.
    pub chunks: Vec<ChunkRow>,
}

/// Makes files durable, gives them their place, and commits that; how many got none.
pub fn place_all<F: Files>(
    files: &F,
    desk: &mut impl Desk<F>,
    whole: Vec<Whole<'_, F::Ready>>,
) -> Result<usize, StoreError> {
    let ready: Vec<F::Ready> = whole.iter().map(|whole| whole.ready.clone()).collect();
    if let Err(error) = files.sync(&ready) {
        for Whole { job, ready, .. } in &whole {
            desk.note(&job.path, Some(error.to_string()));
            discard(files, ready);
        }
        return Ok(whole.len());
    }
    let paths: Vec<TreePath> = whole.iter().map(|whole| whole.job.path.clone()).collect();
    paths.iter().for_each(|path| desk.claim(path));
    let (mut applied, mut conflicts, mut left) = (Vec::with_capacity(whole.len()), Vec::new(), 0);
    for Whole { job, ready, chunks } in whole {
        let done = match &job.loser {
            None => place(files, &ready, &job.path, expected(job.before.as_ref())).map(|placed| {
                let disk = rows::disk_state(&placed.stat, &job.take.node, &job.take.vector);
                applied.push(Applied { path: job.path.clone(), disk: Some(disk), chunks, kept: placed.kept });
            }),
            Some(loser) => settle(files, desk, job, loser, &ready, chunks, &mut conflicts),
        };
        match done {
            Ok(()) => desk.note(&job.path, None),
            Err(error) => {
                discard(files, &ready);
                if matches!(error, ApplyError::Changed) {
                    desk.look_again(&job.path);
                }
                left += 1;
                desk.note(&job.path, Some(error.to_string()));
            }
        }
    }
    if let Err(error) = files.sync_dirs() {
        // what lies there now is taken in by the next look at it: an index that names it first could lose it
        give_up(desk, &conflicts);
        desk.release(&paths);
        for path in &paths {
            desk.look_again(path);
            desk.note(path, Some(error.to_string()));
        }
        return Ok(left + paths.len());
    }
    let committed = desk.commit(applied).and_then(|()| desk.settle(conflicts));
    desk.release(&paths);
    committed.map(|()| left)
}

/// Gives a file the place of what lost to it: both are merged, or that is renamed.
fn settle<F: Files>(
    files: &F,
    desk: &mut impl Desk<F>,
    job: &Job,
    loser: &Loser,
    ready: &F::Ready,
    chunks: Vec<ChunkRow>,
    conflicts: &mut Vec<Conflict>,
) -> Result<(), ApplyError> {
    let expected = expected(job.before.as_ref());
    if let Some(merged) = desk.merge(files, job, loser, (ready, &chunks), expected)? {
        conflicts.push(Conflict::Merged(merged));
        return Ok(());
    }
    let aside = set_aside(files, desk, &job.path, loser.clone(), &job.take, expected)?;
    let placed = place(files, ready, &job.path, Expected::Nothing);
    let winner = placed.as_ref().map_or(Winner::Lost, |placed| Winner::Here(placed.stat, chunks));
    conflicts.push(Conflict::Aside(Aside { winner, ..aside }));
    placed.map(drop)
}

/// Gives a file its place; the directories above it are made where they lack.
fn place<F: Files>(files: &F, ready: &F::Ready, path: &TreePath, expected: Expected) -> Result<Placed, ApplyError> {
    below_a_directory(files, path, || files.place(ready, path, expected))
}

/// Does something below a directory, which is made where it lacks.
fn below_a_directory<T>(
    files: &impl Files,
    path: &TreePath,
    work: impl Fn() -> Result<T, ApplyError>,
) -> Result<T, ApplyError> {
    match (work(), path.parent()) {
        (Err(ApplyError::Missing), Some(parent)) => {
            files.make_dir(&parent, DIRECTORY_MODE)?;
            work()
        }
        (done, _) => done,
    }
}

fn discard<F: Files>(files: &F, ready: &F::Ready) {
    if let Err(error) = files.discard(ready) {
        tracing::debug!(%error, "what was received stays until the next start");
    }
}

fn expected(disk: Option<&DiskState>) -> Expected {
    disk.map_or(Expected::Nothing, |disk| Expected::This(rows::stat_of(disk)))
}

/// Renames what lost; both paths stay claimed until that was told.
fn set_aside<F: Files>(
    files: &F,
    desk: &mut impl Desk<F>,
    path: &TreePath,
    loser: Loser,
    take: &Disk,
    expected: Expected,
) -> Result<Aside, ApplyError> {
    let Expected::This(expected) = expected else { return Err(ApplyError::Changed) };
    let copy = {
        let desk = std::cell::RefCell::new(&mut *desk);
        let taken = |copy: &TreePath| {
            let row = desk.borrow_mut().row(copy).ok().flatten();
            row.is_some_and(|row| row.live || row.disk.is_some()) || !files.is_free(copy)
        };
        conflict_path(path, &loser.version, taken)
    };
    desk.claim(&copy);
    match files.rename(path, &expected, &copy) {
        Ok(stat) => {
            let (path, take) = (path.clone(), take.clone());
            Ok(Aside { path, copy, stat, loser, take, winner: Winner::Next })
        }
        Err(error) => {
            desk.release(&[copy]);
            Err(error)
        }
    }
}

/// Gives back the names of copies that are not told: the next look at them does.
fn give_up<F: Files>(desk: &mut impl Desk<F>, conflicts: &[Conflict]) {
    for copy in conflicts.iter().filter_map(Conflict::copy) {
        desk.release(std::slice::from_ref(copy));
        desk.look_again(copy);
    }
}

/// Carries out operations one after the other, but for files whose content is to come.
#[derive(Debug, Default)]
pub struct Executor {
    known: HashMap<TreePath, Known>,
    applied: Vec<Applied>,
    left: usize,
    again: bool,
}

impl Executor {
    /// Knows what the index says of the paths that operations are about.
    #[must_use]
    pub fn new(known: HashMap<TreePath, Known>) -> Self {
        Self { known, ..Self::default() }
    }

    /// What is known of the paths.
    pub fn known(&mut self) -> &mut HashMap<TreePath, Known> {
        &mut self.known
    }

    /// How many operations were not done.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Whether another round gets on at once.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        self.again
    }

    /// Carries out operations, and commits what was done.
    pub fn run<F: Files>(
        &mut self,
        files: &F,
        desk: &mut impl Desk<F>,
        operations: Vec<Operation>,
    ) -> Result<(), StoreError> {
        let mut claimed = Vec::new();
        for operation in operations {
            let path = operation.path().clone();
            desk.claim(&path);
            claimed.push(path.clone());
            if let Operation::Move { from, .. } = &operation {
                desk.claim(from);
                claimed.push(from.clone());
            }
            match self.operate(files, desk, operation) {
                Ok(()) => desk.note(&path, None),
                Err(Failed::Store(error)) => {
                    desk.release(&claimed);
                    return Err(error);
                }
                Err(Failed::Apply(error)) => {
                    self.left += 1;
                    if matches!(error, ApplyError::Changed | ApplyError::NotEmpty | ApplyError::Missing) {
                        desk.look_again(&path);
                    }
                    desk.note(&path, Some(error.to_string()));
                }
            }
            if self.applied.len() >= COMMITTED {
                self.flush(files, desk, &mut claimed)?;
            }
        }
        self.flush(files, desk, &mut claimed)
    }

    fn flush<F: Files>(
        &mut self,
        files: &F,
        desk: &mut impl Desk<F>,
        claimed: &mut Vec<TreePath>,
    ) -> Result<(), StoreError> {
        let applied = std::mem::take(&mut self.applied);
        let done = match files.sync_dirs() {
            Ok(()) => desk.commit(applied),
            // what lies there now is taken in by the next look at it: an index that names it first could lose it
            Err(error) => {
                for Applied { path, .. } in &applied {
                    self.left += 1;
                    desk.look_again(path);
                    desk.note(path, Some(error.to_string()));
                }
                Ok(())
            }
        };
        desk.release(claimed);
        claimed.clear();
        done
    }

    fn expected(&self, path: &TreePath) -> Expected {
        expected(self.known.get(path).and_then(|known| known.disk.as_ref()))
    }

    fn done(&mut self, path: TreePath, stat: &Stat, disk: &Disk, kept: Option<Kept>, chunks: Vec<ChunkRow>) {
        let state = rows::disk_state(stat, &disk.node, &disk.vector);
        self.applied.push(Applied { path, disk: Some(state), chunks, kept });
    }

    fn gone(&mut self, path: TreePath, kept: Option<Kept>) {
        self.applied.push(Applied { path, disk: None, chunks: Vec::new(), kept });
    }

    fn operate<F: Files>(&mut self, files: &F, desk: &mut impl Desk<F>, operation: Operation) -> Result<(), Failed> {
        match operation {
            Operation::MakeDirectory { path, over: Over::Conflict(loser), disk }
            | Operation::Write { path, over: Over::Conflict(loser), disk }
            | Operation::Copy { path, over: Over::Conflict(loser), disk, .. } => {
                self.conflict(files, desk, &path, loser, &disk)
            }
            Operation::MakeDirectory { path, disk, over } => {
                let kept = match (over, self.expected(&path)) {
                    (Over::Keep, Expected::This(stat)) => files.remove(&path, &stat)?,
                    _ => None,
                };
                let stat = files.make_dir(&path, disk.mode)?;
                self.done(path, &stat, &disk, kept, Vec::new());
                Ok(())
            }
            Operation::Write { path, disk, .. } | Operation::Copy { path, disk, .. } => {
                let Node::Symlink(target) = &disk.node else { return Ok(()) };
                let expected = self.expected(&path);
                let placed = below_a_directory(files, &path, || files.make_link(&path, target, expected))?;
                self.done(path, &placed.stat, &disk, placed.kept, Vec::new());
                Ok(())
            }
            Operation::Move { from, path, disk } => {
                let Expected::This(expected) = self.expected(&from) else { return Err(ApplyError::Changed.into()) };
                let stat = below_a_directory(files, &path, || files.rename(&from, &expected, &path))?;
                let stat = if (stat.mode, stat.mtime) == (disk.mode, disk.mtime) {
                    stat
                } else {
                    files.set_meta(&path, &stat, disk.mode, Some(disk.mtime))?
                };
                let chunks = self.chunks(&from);
                self.gone(from, None);
                self.done(path, &stat, &disk, None, chunks);
                Ok(())
            }
            Operation::SetMeta { path, disk } => {
                let Expected::This(expected) = self.expected(&path) else { return Err(ApplyError::Changed.into()) };
                let stat = files.set_meta(&path, &expected, disk.mode, None)?;
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
                    Expected::This(stat) => files.remove(&path, &stat)?,
                    Expected::Nothing => None,
                };
                self.gone(path, kept);
                Ok(())
            }
            Operation::RemoveDirectory { path } => {
                files.remove_dir(&path)?;
                self.gone(path, None);
                Ok(())
            }
        }
    }

    fn chunks(&mut self, path: &TreePath) -> Vec<ChunkRow> {
        self.known.get_mut(path).map(|known| std::mem::take(&mut known.chunks)).unwrap_or_default()
    }

    /// What lies at a path lost to what needs no content: that comes in the next round.
    fn conflict<F: Files>(
        &mut self,
        files: &F,
        desk: &mut impl Desk<F>,
        path: &TreePath,
        loser: Version,
        take: &Disk,
    ) -> Result<(), Failed> {
        let expected = self.expected(path);
        let loser = Loser { version: loser, chunks: self.chunks(path) };
        let aside = set_aside(files, desk, path, loser, take, expected)?;
        if let Err(error) = files.sync_dirs() {
            give_up(desk, &[Conflict::Aside(aside)]);
            return Err(error.into());
        }
        desk.settle(vec![Conflict::Aside(aside)])?;
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
