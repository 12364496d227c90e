//! What is to happen at a path, and in which order at many.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sync_types::folder::{Node, TreePath, Vector};

use super::version::{Version, Versions, bounded};

/// Bits without which nothing can be made in a directory.
const ENTER_AND_WRITE: u32 = 0o700;
/// Bits of a directory that nobody said anything about.
const PLAIN_DIRECTORY: u32 = 0o755;

/// What lies at a path, or is to lie there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// What it is; never [`Node::Deleted`].
    pub node: Node,
    /// Unix permission bits; where the system has none, those of the version it is.
    pub mode: u32,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
    /// What has been seen by whoever edits it; empty where it was never told, which is what lay here before the device
    /// joined, and a receive-only device's own change.
    pub vector: Vector,
}

/// Which way a folder is synced on this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// What is changed here is told, and what is told is applied.
    #[default]
    Both,
    /// What is changed here is told; nothing is applied.
    SendOnly,
    /// What is told is applied; nothing is told.
    ReceiveOnly,
}

/// What is known of a path.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// What the group says.
    pub versions: &'a Versions,
    /// What lies there; nothing that has changed since the index looked at it.
    pub disk: Option<&'a Disk>,
    /// Whether anything below the path is live: then it is a directory, whatever is said about it.
    pub live_below: bool,
    /// Which way the folder is synced.
    pub direction: Direction,
}

/// What is to happen at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// It is as it should be.
    Nothing,
    /// This is to lie there; what it replaces was seen by it, and is kept.
    Take(Disk),
    /// Nothing is to lie there any more.
    Remove,
    /// Only the mode is another.
    SetMeta(Disk),
    /// What lies there is what counts: only the index learns that it has seen more.
    Adopt(Disk),
    /// What lies there lost: it is renamed, what won takes its place, and both are told ([`super::settle`]).
    Conflict {
        /// The version that lies there.
        loser: Version,
        /// What takes its place; its vector is the basis of what is told about it.
        take: Disk,
    },
    /// Something is to happen, but not by itself.
    Held(Held),
}

/// Why nothing happens at a path where disk and group differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Held {
    /// What lies there was not told yet.
    #[error("a change made here has not been told yet")]
    Untold,
    /// The folder is send-only here.
    #[error("the others have another version; this folder only sends from here")]
    SendOnly,
    /// A change made on a receive-only device.
    #[error("it was changed here, where this folder only receives; revert it to take the others' version")]
    ReceiveOnly,
}

/// Compares what the group says about a path with what lies there.
#[must_use]
pub fn decide(seen: &Seen<'_>) -> Action {
    let wanted = wanted(seen);
    let Some(disk) = seen.disk else {
        return match (wanted, seen.direction) {
            (None, _) => Action::Nothing,
            (Some(_), Direction::SendOnly) => Action::Held(Held::SendOnly),
            (Some(wanted), _) => Action::Take(wanted),
        };
    };
    if wanted.is_none() && seen.versions.winner().is_none() {
        return Action::Nothing;
    }
    if let Some(wanted) = &wanted
        && wanted.node.is_same(&disk.node)
    {
        return agree(disk, wanted, seen.direction);
    }
    if seen.direction == Direction::SendOnly {
        return Action::Held(Held::SendOnly);
    }
    let lies_here = |version: &&Version| version.node.is_same(&disk.node);
    let loser = seen.versions.maximal().iter().find(lies_here);
    if loser.is_none() && (disk.vector.is_empty() || !seen.versions.covers(&disk.vector)) {
        let receives = seen.direction == Direction::ReceiveOnly;
        return Action::Held(if receives { Held::ReceiveOnly } else { Held::Untold });
    }
    match (wanted, loser) {
        (None, _) => Action::Remove,
        (Some(wanted), Some(loser)) if seen.direction == Direction::Both => {
            // Only what is settled here is seen: another loser lies on another disk, whose device publishes it.
            let settled = seen.versions.seen_by(|version| lies_here(&version));
            let take = Disk { vector: joined(&wanted.vector, &settled), ..wanted };
            Action::Conflict { loser: loser.clone(), take }
        }
        (Some(wanted), _) => Action::Take(wanted),
    }
}

/// What is to happen at a path of a receive-only folder so that it is as the others have it, whatever lies there.
#[must_use]
pub fn revert(seen: &Seen<'_>) -> Action {
    match (wanted(seen), seen.disk) {
        (None, None) => Action::Nothing,
        (None, Some(_)) => Action::Remove,
        (Some(wanted), Some(disk)) if wanted.node.is_same(&disk.node) => agree(disk, &wanted, Direction::ReceiveOnly),
        (Some(wanted), _) => Action::Take(wanted),
    }
}

/// What a change made here has seen: the basis of its record.
///
/// Where nothing lies although something should, it has not been taken yet, so whoever writes here has not seen it.
#[must_use]
pub fn basis(versions: &Versions, disk: Option<&Disk>) -> Vector {
    match disk {
        Some(disk) => disk.vector.clone(),
        None if versions.is_live() => versions.bygone(),
        None => versions.agreed(),
    }
}

fn agree(disk: &Disk, wanted: &Disk, direction: Direction) -> Action {
    let agreed = Disk { vector: joined(&wanted.vector, &disk.vector), ..disk.clone() };
    if disk.mode != wanted.mode && !matches!(disk.node, Node::Symlink(_)) {
        if direction == Direction::SendOnly {
            return Action::Held(Held::SendOnly);
        }
        return Action::SetMeta(Disk { vector: agreed.vector, ..wanted.clone() });
    }
    if agreed.vector == disk.vector { Action::Nothing } else { Action::Adopt(agreed) }
}

/// What should lie at a path.
fn wanted(seen: &Seen<'_>) -> Option<Disk> {
    let winner = seen.versions.winner();
    if let Some(winner) = winner
        && (winner.node == Node::Directory || (winner.node != Node::Deleted && !seen.live_below))
    {
        let (node, vector) = (winner.node.clone(), seen.versions.agreed());
        return Some(Disk { node, mode: winner.mode, mtime: winner.mtime, vector });
    }
    // Nobody has edited a directory that is only there for what is below it, so it has seen nothing that it hides.
    seen.live_below.then(|| Disk {
        node: Node::Directory,
        mode: seen.disk.filter(|disk| disk.node == Node::Directory).map_or(PLAIN_DIRECTORY, |disk| disk.mode),
        mtime: winner.map_or(0, |winner| winner.mtime),
        vector: seen.versions.bygone(),
    })
}

fn joined(first: &Vector, second: &Vector) -> Vector {
    if first.covers(second) {
        return first.clone();
    }
    let mut both = first.clone();
    both.join(second);
    bounded(both.iter())
}

/// A path, what lies there, and what is to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The path.
    pub path: TreePath,
    /// What lies there now.
    pub disk: Option<Disk>,
    /// What [`decide`] said.
    pub action: Action,
}

/// What becomes of what lies where something is to be put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Over {
    /// Nothing lies there.
    Nothing,
    /// It is kept among the folder's versions.
    Keep,
    /// It is the version that lost: it is renamed to its [`super::conflict_path`], and that is told.
    Conflict(Version),
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Makes a directory; its parent is there.
    MakeDirectory {
        /// Where.
        path: TreePath,
        /// What is to lie there; its mode lets it be filled, and is set at the end where it should not.
        disk: Disk,
        /// What becomes of what lies there.
        over: Over,
    },
    /// Copies a file of the folder that is removed or moved later.
    Copy {
        /// The file.
        from: TreePath,
        /// Where to.
        path: TreePath,
        /// What is to lie there.
        disk: Disk,
        /// What becomes of what lies there.
        over: Over,
    },
    /// Renames a file of the folder to where nothing lies; mode and time are set if they are others.
    Move {
        /// The file.
        from: TreePath,
        /// Where to.
        path: TreePath,
        /// What is to lie there.
        disk: Disk,
    },
    /// Writes a file, or makes a link.
    Write {
        /// Where.
        path: TreePath,
        /// What is to lie there.
        disk: Disk,
        /// What becomes of what lies there.
        over: Over,
    },
    /// Sets the mode.
    SetMeta {
        /// Where.
        path: TreePath,
        /// What is to lie there; only its mode is not there yet.
        disk: Disk,
    },
    /// Notes in the index what has been seen; nothing on disk changes.
    Adopt {
        /// Where.
        path: TreePath,
        /// What lies there.
        disk: Disk,
    },
    /// Removes a file or link, and keeps it among the folder's versions.
    Remove {
        /// Where.
        path: TreePath,
    },
    /// Removes a directory that is empty by now.
    RemoveDirectory {
        /// Where.
        path: TreePath,
    },
}

impl Operation {
    /// The path at which something changes.
    #[must_use]
    pub fn path(&self) -> &TreePath {
        match self {
            Self::MakeDirectory { path, .. }
            | Self::Copy { path, .. }
            | Self::Move { path, .. }
            | Self::Write { path, .. }
            | Self::SetMeta { path, .. }
            | Self::Adopt { path, .. }
            | Self::Remove { path }
            | Self::RemoveDirectory { path } => path,
        }
    }
}

/// How content goes from a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Displaced {
    /// Nothing lies there any more.
    Deleted,
    /// Something else does.
    Rewritten,
}

/// Operations in an order in which they can be carried out, and what stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Directories from the root down, copies, moves, files and links, modes, what only the index learns, removals of
    /// files, then of directories from the leaves up, files that replace a directory, and modes of directories that
    /// let nothing be made in them.
    pub operations: Vec<Operation>,
    /// Directories that stay because something is in them that stays.
    pub kept: Vec<TreePath>,
    /// Paths where something waits for somebody.
    pub held: Vec<(TreePath, Held)>,
}

impl Plan {
    /// What of other people's doing makes content go from a path; what is moved, or renamed as a conflict, does not.
    pub fn displaced(&self) -> impl Iterator<Item = (&TreePath, Displaced)> {
        self.operations.iter().filter_map(|operation| match operation {
            Operation::Remove { path } => Some((path, Displaced::Deleted)),
            Operation::MakeDirectory { path, over: Over::Keep, .. }
            | Operation::Copy { path, over: Over::Keep, .. }
            | Operation::Write { path, over: Over::Keep, .. } => Some((path, Displaced::Rewritten)),
            _ => None,
        })
    }
}

/// Puts what is to happen at many paths in order.
///
/// `entries` lists what is in a directory on disk, whatever it is: a directory goes only if all of that goes. Ancestors
/// of a path that is to be taken are among the changes where they are not directories yet; a path has one change.
pub fn plan(changes: Vec<Change>, entries: impl Fn(&TreePath) -> Vec<TreePath>) -> Plan {
    let mut stages = Stages::default();
    for change in changes {
        stages.sort(change);
    }
    stages.order(entries)
}

#[derive(Default)]
struct Stages {
    directories: BTreeMap<TreePath, (Disk, Over)>,
    written: BTreeMap<TreePath, (Disk, Over)>,
    over_directories: BTreeMap<TreePath, Disk>,
    meta: BTreeMap<TreePath, Disk>,
    adopted: BTreeMap<TreePath, Disk>,
    removed: BTreeMap<TreePath, Disk>,
    emptied: BTreeSet<TreePath>,
    plan: Plan,
}

impl Stages {
    fn sort(&mut self, Change { path, disk, action }: Change) {
        match action {
            Action::Nothing => {}
            Action::Take(take) => {
                let over = if disk.is_some() { Over::Keep } else { Over::Nothing };
                self.put(path, take, over, disk);
            }
            Action::Conflict { loser, take } => self.put(path, take, Over::Conflict(loser), disk),
            Action::Remove => match disk {
                Some(disk) if disk.node == Node::Directory => {
                    self.emptied.insert(path);
                }
                Some(disk) => {
                    self.removed.insert(path, disk);
                }
                None => {}
            },
            Action::SetMeta(disk) => {
                self.meta.insert(path, disk);
            }
            Action::Adopt(disk) => {
                self.adopted.insert(path, disk);
            }
            Action::Held(why) => self.plan.held.push((path, why)),
        }
    }

    fn put(&mut self, path: TreePath, take: Disk, over: Over, disk: Option<Disk>) {
        if take.node == Node::Directory {
            self.directories.insert(path, (take, over));
        } else if disk.is_some_and(|disk| disk.node == Node::Directory) {
            self.emptied.insert(path.clone());
            self.over_directories.insert(path, take);
        } else {
            self.written.insert(path, (take, over));
        }
    }

    fn order(mut self, entries: impl Fn(&TreePath) -> Vec<TreePath>) -> Plan {
        let mut filled: BTreeSet<TreePath> = BTreeSet::new();
        for path in self.directories.keys().chain(self.written.keys()) {
            filled.extend(path.parent());
        }
        let mut gone: BTreeSet<TreePath> = self.removed.keys().cloned().collect();
        let mut last_meta = Vec::new();
        for (path, (disk, over)) in std::mem::take(&mut self.directories) {
            let open = Disk { mode: disk.mode | ENTER_AND_WRITE, ..disk.clone() };
            if open.mode != disk.mode {
                last_meta.push(Operation::SetMeta { path: path.clone(), disk });
            }
            self.plan.operations.push(Operation::MakeDirectory { path, disk: open, over });
        }
        self.write();
        for (path, disk) in std::mem::take(&mut self.meta) {
            let closes = disk.node == Node::Directory && disk.mode & ENTER_AND_WRITE != ENTER_AND_WRITE;
            let operation = Operation::SetMeta { path, disk };
            if closes { last_meta.push(operation) } else { self.plan.operations.push(operation) }
        }
        let operations = &mut self.plan.operations;
        operations.extend(self.adopted.into_iter().map(|(path, disk)| Operation::Adopt { path, disk }));
        operations.extend(self.removed.into_keys().map(|path| Operation::Remove { path }));
        for path in self.emptied.into_iter().rev() {
            if filled.contains(&path) || !entries(&path).iter().all(|entry| gone.contains(entry)) {
                self.over_directories.remove(&path);
                self.plan.kept.push(path);
                continue;
            }
            gone.insert(path.clone());
            operations.push(Operation::RemoveDirectory { path });
        }
        let written = self.over_directories.into_iter();
        operations.extend(written.map(|(path, disk)| Operation::Write { path, disk, over: Over::Nothing }));
        operations.extend(last_meta.into_iter().rev());
        self.plan
    }

    /// Content of files that go is moved to where it is wanted, or copied if it is wanted at more places than it goes
    /// from, or where something lies.
    fn write(&mut self) {
        let mut sources: BTreeMap<([u8; 32], u64), VecDeque<TreePath>> = BTreeMap::new();
        for (path, disk) in &self.removed {
            if let Some(content) = content(&disk.node) {
                sources.entry(content).or_default().push_back(path.clone());
            }
        }
        let (mut copies, mut moves, mut files, mut links) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (path, (disk, over)) in std::mem::take(&mut self.written) {
            let Some(content) = content(&disk.node) else {
                let stage = if matches!(disk.node, Node::Symlink(_)) { &mut links } else { &mut files };
                stage.push(Operation::Write { path, disk, over });
                continue;
            };
            let Some(from) = sources.get_mut(&content) else {
                files.push(Operation::Write { path, disk, over });
                continue;
            };
            let at = from.iter().position(|from| from.name() == path.name()).unwrap_or(0);
            let still_there = self.removed.contains_key(&from[at]);
            if over == Over::Nothing && still_there {
                let from = if from.len() > 1 { from.remove(at) } else { from.front().cloned() };
                let from = from.expect("BUG: a place that was found is not there");
                self.removed.remove(&from);
                moves.push(Operation::Move { from, path, disk });
            } else {
                copies.push(Operation::Copy { from: from[at].clone(), path, disk, over });
            }
        }
        self.plan.operations.extend([copies, moves, files, links].into_iter().flatten());
    }
}

/// A file's content; none of an empty one, which is made sooner than moved.
fn content(node: &Node) -> Option<([u8; 32], u64)> {
    match node {
        Node::File(file) if file.size > 0 => Some((file.hash, file.size)),
        _ => None,
    }
}
