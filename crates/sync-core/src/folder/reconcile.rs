//! What is to happen at a path, and in which order at many.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sync_types::folder::{Node, TreePath, Vector};

use super::version::{Version, Versions, bounded};

/// Bits without which nothing can be made in a directory.
const ENTER_AND_WRITE: u32 = 0o700;
/// Bits of a directory that is only there for what is below it: the same on all devices, and nobody gains access.
const UNSAID_MODE: u32 = 0o700;

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
    /// Whether this device takes the path; what is at one that it leaves out is nobody's business.
    pub taken: bool,
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
    if !seen.taken {
        return Action::Nothing;
    }
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
    // A directory that goes is empty: there is nothing to lose, and one made for what came below it was never told.
    let untold = disk.node != Node::Directory && (disk.vector.is_empty() || !seen.versions.covers(&disk.vector));
    if loser.is_none() && untold {
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

/// The basis of a record that says what the group says already, if there is to be one: what lay here before had lost to
/// that, it is gone, and nobody else would say so.
#[must_use]
pub fn overtaken(versions: &Versions, before: &Disk, node: &Node) -> Option<Vector> {
    let is_gone = |version: &Version| {
        version.node != Node::Deleted && !version.node.is_same(node) && before.vector.contains(version.dot)
    };
    versions.maximal().iter().any(is_gone).then(|| joined(&versions.agreed(), &before.vector))
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
        mode: UNSAID_MODE,
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
    /// Directories from the root down, modes of directories, copies, moves, files, links, modes of files, what only the
    /// index learns, removals of files, then of directories from the leaves up, files that replace a directory, and
    /// modes of directories that let nothing be made in them.
    ///
    /// A conflict copy that is made on the way may lie where something else is to be put; what is there is looked at
    /// before each operation, and where it is not what the plan was made from, the path is decided anew.
    pub operations: Vec<Operation>,
    /// Directories that stay because something is in them that stays; to be decided again when that changes.
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
        let mut last_meta = BTreeMap::new();
        for (path, (disk, over)) in std::mem::take(&mut self.directories) {
            let open = Disk { mode: disk.mode | ENTER_AND_WRITE, ..disk.clone() };
            if open.mode != disk.mode {
                last_meta.insert(path.clone(), disk);
            }
            self.plan.operations.push(Operation::MakeDirectory { path, disk: open, over });
        }
        let mut later_meta = Vec::new();
        for (path, disk) in std::mem::take(&mut self.meta) {
            let (is_directory, opens) = (disk.node == Node::Directory, disk.mode & ENTER_AND_WRITE == ENTER_AND_WRITE);
            match (is_directory, opens) {
                (true, true) => self.plan.operations.push(Operation::SetMeta { path, disk }),
                (true, false) => {
                    last_meta.insert(path, disk);
                }
                (false, _) => later_meta.push(Operation::SetMeta { path, disk }),
            }
        }
        self.write();
        self.plan.operations.append(&mut later_meta);
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
        operations.extend(last_meta.into_iter().rev().map(|(path, disk)| Operation::SetMeta { path, disk }));
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

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use sync_types::AuthorId;
    use sync_types::folder::{Chunks, Dot, FileContent, Record};

    use super::*;

    fn dot(n: u8, count: u64) -> Dot {
        Dot { author: AuthorId([n; 32]), count }
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    fn file(n: u8) -> Node {
        Node::File(FileContent { size: u64::from(n), hash: [n; 32], chunks: Chunks::Whole })
    }

    fn version(at: Dot, basis: &[Dot], node: Node) -> Version {
        let basis = basis.iter().copied().collect();
        Version::new(&Record { path: path("a"), node, mode: 0o644, mtime: 1, basis }, at)
    }

    fn row(versions: &[&Version]) -> Versions {
        let mut row = Versions::default();
        versions.iter().for_each(|version| assert!(row.insert((*version).clone())));
        row
    }

    fn disk(node: Node, seen: &[Dot]) -> Disk {
        Disk { node, mode: 0o644, mtime: 1, vector: seen.iter().copied().collect() }
    }

    fn action(versions: &Versions, disk: Option<&Disk>) -> Action {
        decide(&Seen { versions, disk, live_below: false, direction: Direction::Both, taken: true })
    }

    fn above(versions: &Versions, disk: Option<&Disk>) -> Action {
        decide(&Seen { versions, disk, live_below: true, direction: Direction::Both, taken: true })
    }

    #[test]
    fn what_is_superseded_gives_way() {
        let first = version(dot(1, 1), &[], file(1));
        let edit = version(dot(2, 1), &[dot(1, 1)], file(2));
        let gone = version(dot(1, 2), &[dot(2, 1)], Node::Deleted);
        let lies = disk(file(1), &[dot(1, 1)]);
        assert_eq!(action(&row(&[]), Some(&lies)), Action::Nothing);
        assert_eq!(action(&row(&[&first]), Some(&lies)), Action::Nothing);
        assert_eq!(action(&row(&[&first]), None), Action::Take(lies.clone()));
        assert_eq!(action(&row(&[&first, &edit]), Some(&lies)), Action::Take(disk(file(2), &[dot(1, 1), dot(2, 1)])));
        assert_eq!(action(&row(&[&first, &edit, &gone]), Some(&lies)), Action::Remove);
        assert_eq!(action(&row(&[&first, &edit, &gone]), None), Action::Nothing);
    }

    #[test]
    fn equal_content_is_adopted_and_only_its_mode_is_set() {
        let (one, other) = (version(dot(1, 1), &[], file(1)), version(dot(2, 1), &[], file(1)));
        let both = [dot(1, 1), dot(2, 1)];
        let untold = Disk { mtime: 77, ..disk(file(1), &[]) };
        let adopted = Action::Adopt(Disk { mtime: 77, ..disk(file(1), &both) });
        assert_eq!(action(&row(&[&one, &other]), Some(&untold)), adopted, "joining moves nothing");
        assert_eq!(action(&row(&[&one, &other]), Some(&disk(file(1), &both))), Action::Nothing);
        let closed = Disk { mode: 0o600, ..disk(file(1), &both) };
        assert_eq!(action(&row(&[&one, &other]), Some(&closed)), Action::SetMeta(disk(file(1), &both)));
        let link = version(dot(1, 1), &[], Node::Symlink("x".to_owned()));
        let lies = Disk { mode: 0, ..disk(link.node.clone(), &[dot(1, 1)]) };
        assert_eq!(action(&row(&[&link]), Some(&lies)), Action::Nothing, "a link has no mode");
    }

    #[test]
    fn what_lost_and_lies_here_is_renamed_and_only_that_is_settled() {
        let (lost, won) = (version(dot(1, 1), &[], file(1)), version(dot(3, 1), &[], file(3)));
        let elsewhere = version(dot(2, 1), &[], file(2));
        let versions = row(&[&lost, &elsewhere, &won]);
        let take = disk(file(3), &[dot(1, 1), dot(3, 1)]);
        let lies = disk(file(1), &[dot(1, 1)]);
        assert_eq!(action(&versions, Some(&lies)), Action::Conflict { loser: lost.clone(), take: take.clone() });
        assert_eq!(action(&versions, None), Action::Take(disk(file(3), &[dot(3, 1)])));
        let mut settled = versions.clone();
        let record = Record { path: path("a"), node: file(3), mode: 0o644, mtime: 1, basis: take.vector };
        settled.insert(Version::new(&record, dot(1, 2)));
        assert_eq!(settled.losers().collect::<Vec<_>>(), [&elsewhere], "whoever has it publishes it");
    }

    #[test]
    fn what_lost_and_is_gone_from_its_place_is_said_to_be_gone() {
        let (lost, won) = (version(dot(1, 1), &[], file(1)), version(dot(3, 1), &[], Node::Directory));
        let versions = row(&[&lost, &won]);
        let seen = overtaken(&versions, &disk(file(1), &[dot(1, 1)]), &Node::Directory);
        assert_eq!(seen, Some([dot(1, 1), dot(3, 1)].into_iter().collect()));
        assert_eq!(overtaken(&versions, &disk(file(9), &[dot(2, 1)]), &Node::Directory), None, "it lay elsewhere");
        assert_eq!(overtaken(&row(&[&won]), &disk(file(1), &[dot(1, 1)]), &Node::Directory), None, "others said so");
    }

    #[test]
    fn a_change_that_was_not_told_is_told_first() {
        let first = version(dot(1, 1), &[], file(1));
        assert_eq!(action(&row(&[&first]), Some(&disk(file(9), &[]))), Action::Held(Held::Untold));
        assert_eq!(action(&row(&[&first]), Some(&disk(file(9), &[dot(5, 5)]))), Action::Held(Held::Untold));
        let gone = version(dot(1, 1), &[], Node::Deleted);
        assert_eq!(action(&row(&[&gone]), Some(&disk(file(9), &[]))), Action::Held(Held::Untold));
    }

    #[test]
    fn a_path_with_something_below_is_a_directory() {
        let (lost, gone) = (version(dot(1, 1), &[], file(1)), version(dot(1, 1), &[], Node::Deleted));
        let plain = |seen: &[Dot]| Disk { mode: 0o700, ..disk(Node::Directory, seen) };
        let lies = disk(file(1), &[dot(1, 1)]);
        let take = Disk { vector: [dot(1, 1)].into_iter().collect(), ..plain(&[]) };
        assert_eq!(above(&row(&[&lost]), Some(&lies)), Action::Conflict { loser: lost.clone(), take: take.clone() });
        assert_eq!(above(&row(&[&gone]), None), Action::Take(take.clone()));
        assert_eq!(above(&row(&[&gone]), Some(&take)), Action::Nothing);
        assert_eq!(action(&row(&[&gone]), Some(&take)), Action::Remove, "until nothing is below");
        assert_eq!(above(&row(&[]), None), Action::Take(Disk { mtime: 0, ..plain(&[]) }));
        let Action::Take(hides) = above(&row(&[&lost]), None) else { panic!("a directory") };
        assert!(!hides.vector.contains(dot(1, 1)), "who edits the directory has not seen the file");
    }

    #[test]
    fn one_way_folders() {
        let (lost, won) = (version(dot(1, 1), &[], file(1)), version(dot(3, 1), &[], file(3)));
        let versions = row(&[&lost, &won]);
        let seen = |direction, disk| Seen { versions: &versions, disk, live_below: false, direction, taken: true };
        let go = |direction, disk| decide(&seen(direction, disk));
        let (lies, mine) = (disk(file(1), &[dot(1, 1)]), disk(file(7), &[]));
        let take = disk(file(3), &[dot(3, 1)]);
        assert_eq!(go(Direction::SendOnly, None), Action::Held(Held::SendOnly));
        assert_eq!(go(Direction::SendOnly, Some(&lies)), Action::Held(Held::SendOnly));
        assert_eq!(go(Direction::ReceiveOnly, None), Action::Take(take.clone()));
        assert_eq!(go(Direction::ReceiveOnly, Some(&lies)), Action::Take(take.clone()), "nothing is told from here");
        assert_eq!(go(Direction::ReceiveOnly, Some(&mine)), Action::Held(Held::ReceiveOnly));
        let (live_below, direction) = (false, Direction::ReceiveOnly);
        let revert = |versions: &Versions, disk| revert(&Seen { versions, disk, live_below, direction, taken: true });
        assert_eq!(revert(&versions, Some(&mine)), Action::Take(take));
        assert_eq!(revert(&row(&[]), Some(&mine)), Action::Remove);
        assert_eq!(revert(&row(&[]), None), Action::Nothing);
    }

    #[test]
    fn a_change_follows_what_lay_there() {
        let (won, gone) = (version(dot(3, 1), &[dot(4, 4)], file(3)), version(dot(2, 2), &[], Node::Deleted));
        let lies = disk(file(3), &[dot(3, 1)]);
        assert_eq!(basis(&row(&[&won]), Some(&lies)), lies.vector);
        let waiting = basis(&row(&[&won, &gone]), None);
        assert!(!waiting.contains(dot(3, 1)), "what has not been taken yet was not seen");
        assert!(waiting.contains(dot(4, 4)) && waiting.contains(dot(2, 2)));
        assert!(basis(&row(&[&gone]), None).contains(dot(2, 2)));
    }

    fn change(at: &str, disk: Option<Disk>, action: Action) -> Change {
        Change { path: path(at), disk, action }
    }

    fn shown(plan: &Plan) -> String {
        let mut text = String::new();
        for operation in &plan.operations {
            let over = match operation {
                Operation::MakeDirectory { over, .. }
                | Operation::Write { over, .. }
                | Operation::Copy { over, .. } => match over {
                    Over::Nothing => "",
                    Over::Keep => " over kept",
                    Over::Conflict(_) => " over conflict",
                },
                _ => "",
            };
            let (what, disk) = match operation {
                Operation::MakeDirectory { disk, .. } => ("mkdir".to_owned(), Some(disk)),
                Operation::Copy { from, .. } => (format!("copy {from}"), None),
                Operation::Move { from, .. } => (format!("move {from}"), None),
                Operation::Write { disk, .. } if matches!(disk.node, Node::Symlink(_)) => ("link".to_owned(), None),
                Operation::Write { .. } => ("write".to_owned(), None),
                Operation::SetMeta { disk, .. } => ("chmod".to_owned(), Some(disk)),
                Operation::Adopt { .. } => ("adopt".to_owned(), None),
                Operation::Remove { .. } => ("rm".to_owned(), None),
                Operation::RemoveDirectory { .. } => ("rmdir".to_owned(), None),
            };
            let mode = disk.map(|disk| format!(" {:o}", disk.mode)).unwrap_or_default();
            writeln!(text, "{what} {}{mode}{over}", operation.path()).expect("memory");
        }
        text
    }

    fn directory(mode: u32) -> Disk {
        Disk { mode, ..disk(Node::Directory, &[]) }
    }

    #[test]
    fn a_plan_can_be_carried_out_from_top_to_bottom() {
        let link = disk(Node::Symlink("x".to_owned()), &[]);
        let lost = version(dot(1, 1), &[], file(8));
        let changes = vec![
            change("old/deep", Some(directory(0o755)), Action::Remove),
            change("old/deep/gone", Some(disk(file(5), &[])), Action::Remove),
            change("old", Some(directory(0o755)), Action::Remove),
            change("new/in/fresh", None, Action::Take(disk(file(2), &[]))),
            change("new/in", None, Action::Take(directory(0o500))),
            change("new", Some(disk(file(1), &[])), Action::Take(directory(0o755))),
            change("link", None, Action::Take(link)),
            change("mode", Some(disk(file(3), &[])), Action::SetMeta(disk(file(3), &[]))),
            change("opened", Some(directory(0o500)), Action::SetMeta(directory(0o700))),
            change("closed", Some(directory(0o700)), Action::SetMeta(directory(0o500))),
            change("same", Some(disk(file(4), &[])), Action::Adopt(disk(file(4), &[]))),
            change("quiet", Some(disk(file(4), &[])), Action::Nothing),
            change("lost", Some(disk(file(8), &[])), Action::Conflict { loser: lost, take: disk(file(9), &[]) }),
            change("mine", Some(disk(file(4), &[])), Action::Held(Held::Untold)),
            change("file", Some(directory(0o755)), Action::Take(disk(file(6), &[]))),
            change("file/gone", Some(disk(file(7), &[])), Action::Remove),
        ];
        let entries = |directory: &TreePath| match directory.as_str() {
            "old" => vec![path("old/deep")],
            "old/deep" => vec![path("old/deep/gone")],
            "file" => vec![path("file/gone")],
            other => panic!("{other} stays"),
        };
        let expected = "mkdir new 755 over kept\nmkdir new/in 700\nchmod opened 700\nwrite lost over conflict\n\
            write new/in/fresh\nlink link\nchmod mode 644\nadopt same\nrm file/gone\nrm old/deep/gone\n\
            rmdir old/deep\nrmdir old\nrmdir file\nwrite file\nchmod new/in 500\nchmod closed 500\n";
        let forth = plan(changes.clone(), entries);
        assert_eq!(shown(&forth), expected);
        assert_eq!(forth.held, [(path("mine"), Held::Untold)]);
        assert_eq!(plan(changes.into_iter().rev().collect(), entries), forth, "whatever the order of the changes");
    }

    #[test]
    fn what_goes_is_moved_to_where_it_is_wanted() {
        let same = |seen: &[Dot]| disk(file(1), seen);
        let changes = vec![
            change("a/one", Some(same(&[])), Action::Remove),
            change("a/two", Some(same(&[])), Action::Remove),
            change("b/new", None, Action::Take(same(&[]))),
            change("b/one", None, Action::Take(same(&[]))),
            change("b/over", Some(disk(file(2), &[])), Action::Take(same(&[]))),
            change("b/third", None, Action::Take(same(&[]))),
            change("b/other", None, Action::Take(disk(file(3), &[]))),
            change("empty", Some(disk(file(0), &[])), Action::Remove),
            change("b/empty", None, Action::Take(disk(file(0), &[]))),
        ];
        let expected = "copy a/two b/over over kept\ncopy a/two b/third\nmove a/one b/new\nmove a/two b/one\n\
            write b/empty\nwrite b/other\nrm empty\n";
        assert_eq!(shown(&plan(changes, |_| vec![])), expected);
        let renamed = vec![
            change("a/one", Some(same(&[])), Action::Remove),
            change("a/two", Some(same(&[])), Action::Remove),
            change("b/one", None, Action::Take(same(&[]))),
            change("b/two", None, Action::Take(same(&[]))),
        ];
        assert_eq!(shown(&plan(renamed, |_| vec![])), "move a/one b/one\nmove a/two b/two\n");
    }

    #[test]
    fn a_directory_with_something_in_it_stays() {
        let changes = vec![
            change("d", Some(directory(0o755)), Action::Remove),
            change("d/e", Some(directory(0o755)), Action::Take(disk(file(2), &[]))),
            change("d/gone", Some(disk(file(7), &[])), Action::Remove),
        ];
        let entries = |directory: &TreePath| match directory.as_str() {
            "d" => vec![path("d/e"), path("d/gone")],
            _ => vec![path("d/e/ignored")],
        };
        let plan = plan(changes, entries);
        assert_eq!(shown(&plan), "rm d/gone\n");
        assert_eq!(plan.kept, [path("d/e"), path("d")]);
    }
}
