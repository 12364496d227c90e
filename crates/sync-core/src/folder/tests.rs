//! Whole groups on simulated disks: whatever is edited, in whatever order it arrives, all end with the same tree, and
//! nothing that sync replaced or removed is gone.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sync_types::folder::{Chunks, Dot, FileContent, Node, Record, TreePath};
use sync_types::{AuthorId, Number};

use super::*;

/// Rounds of exchanging everything after which a group must be quiet.
const ROUNDS: usize = 20;
/// Devices of a group, copies included.
const MAX_DEVICES: usize = 6;
/// Permission bits that are tried, closed directories among them.
const MODES: [u32; 3] = [0o755, 0o644, 0o500];

fn path(text: &str) -> TreePath {
    TreePath::new(text).expect("a path")
}

fn file(content: u64) -> Node {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&content.to_le_bytes());
    Node::File(FileContent { size: content % 3, hash, chunks: Chunks::Whole })
}

/// What of a node could be lost.
fn content(node: &Node) -> Option<String> {
    match node {
        Node::Deleted | Node::Directory => None,
        Node::File(file) => Some(format!("{:?}", file.hash)),
        Node::Symlink(target) => Some(target.clone()),
    }
}

#[derive(Clone)]
struct Device {
    author: AuthorId,
    number: u64,
    direction: Direction,
    rows: BTreeMap<TreePath, Versions>,
    disk: BTreeMap<TreePath, Disk>,
    /// The paths it takes; empty: all.
    selected: BTreeSet<TreePath>,
    /// What lies on its disk where it takes nothing, and its index does not know.
    left_out: BTreeMap<TreePath, (Node, u32)>,
    kept: BTreeSet<String>,
    waiting: Vec<usize>,
}

struct World {
    devices: Vec<Device>,
    log: Vec<(Record, Dot)>,
    /// Where conflict copies were made since a plan was.
    copies: BTreeSet<TreePath>,
    /// Contents that sync put on a disk, or took from one.
    handled: BTreeSet<String>,
    /// Contents that somebody overwrote or removed by hand.
    discarded: BTreeSet<String>,
}

impl Device {
    fn takes(&self, path: &TreePath) -> bool {
        let related = |other: &TreePath| other == path || path.is_below(other) || other.is_below(path);
        self.selected.is_empty() || self.selected.iter().any(related)
    }

    fn is_live_below(&self, path: &TreePath) -> bool {
        self.rows.iter().any(|(other, row)| other.is_below(path) && row.is_live())
    }

    fn seen<'a>(&'a self, path: &TreePath, none: &'a Versions) -> Seen<'a> {
        let (versions, disk) = (self.rows.get(path).unwrap_or(none), self.disk.get(path));
        Seen {
            versions,
            disk,
            live_below: self.is_live_below(path),
            direction: self.direction,
            taken: self.takes(path),
        }
    }

    fn changes(&self) -> Vec<Change> {
        let none = Versions::default();
        let ancestors = |path: &TreePath| std::iter::successors(Some(path.clone()), TreePath::parent);
        let paths: BTreeSet<TreePath> = self.rows.keys().chain(self.disk.keys()).flat_map(ancestors).collect();
        let change = |path: &TreePath| {
            let seen = self.seen(path, &none);
            Change { path: path.clone(), disk: seen.disk.cloned(), action: decide(&seen) }
        };
        paths.iter().map(change).collect()
    }

    fn entries(&self, directory: &TreePath) -> Vec<TreePath> {
        let lying = self.disk.keys().chain(self.left_out.keys());
        lying.filter(|path| path.parent().as_ref() == Some(directory)).cloned().collect()
    }

    fn assert_room_for(&self, path: &TreePath) {
        assert!(!self.disk.contains_key(path) && !self.left_out.contains_key(path), "{path} is taken");
        let parent = path.parent();
        let parent = parent.as_ref().map(|parent| self.disk.get(parent).map(|disk| &disk.node));
        assert!(matches!(parent, None | Some(Some(Node::Directory))), "{path} has no directory");
    }

    /// What the others see of the disk.
    fn tree(&self) -> BTreeMap<&TreePath, (&Node, u32)> {
        self.disk.iter().map(|(path, disk)| (path, (&disk.node, disk.mode))).collect()
    }
}

impl World {
    fn new(count: u8) -> Self {
        let device = |n| Device {
            author: AuthorId([n; 32]),
            number: 0,
            direction: Direction::Both,
            rows: BTreeMap::new(),
            disk: BTreeMap::new(),
            selected: BTreeSet::new(),
            left_out: BTreeMap::new(),
            kept: BTreeSet::new(),
            waiting: Vec::new(),
        };
        let devices = (1..=count).map(device).collect();
        Self { devices, log: Vec::new(), copies: BTreeSet::new(), handled: BTreeSet::new(), discarded: BTreeSet::new() }
    }

    fn publish(&mut self, at: usize, record: Record) -> Version {
        let device = &mut self.devices[at];
        device.number += 1;
        let dot = Dot::new(device.author, Number(device.number), 0);
        let version = Version::new(&record, dot);
        device.rows.entry(record.path.clone()).or_default().insert(version.clone());
        for (other, device) in self.devices.iter_mut().enumerate() {
            if other != at {
                device.waiting.push(self.log.len());
            }
        }
        self.log.push((record, dot));
        version
    }

    /// Somebody changes a path by hand, and the device tells.
    fn change(&mut self, at: usize, path: &TreePath, node: Node, mode: u32) {
        let device = &mut self.devices[at];
        let before = device.disk.remove(path);
        if let Some(before) = &before {
            self.discarded.extend(content(&before.node).filter(|_| !before.node.is_same(&node)));
        }
        let basis = basis(device.rows.entry(path.clone()).or_default(), before.as_ref());
        let mtime = i64::try_from(self.log.len()).expect("a short log");
        let version = self.publish(at, Record { path: path.clone(), node: node.clone(), mode, mtime, basis });
        if node != Node::Deleted {
            let disk = Disk { node, mode, mtime, vector: version.vector };
            self.devices[at].disk.insert(path.clone(), disk);
        }
    }

    /// A device takes other paths from now on: what lies where it took nothing before is compared as where one joins.
    fn select(&mut self, at: usize, selected: BTreeSet<TreePath>) {
        let device = &mut self.devices[at];
        let before = Device { selected: std::mem::replace(&mut device.selected, selected), ..device.clone() };
        for (path, lies) in &before.disk {
            if !(before.takes(path) && device.takes(path)) {
                device.disk.remove(path);
                device.left_out.insert(path.clone(), (lies.node.clone(), lies.mode));
            }
        }
        for (path, (node, mode)) in device.left_out.clone() {
            let device = &mut self.devices[at];
            if !device.takes(&path) {
                continue;
            }
            device.left_out.remove(&path);
            let row = device.rows.entry(path.clone()).or_default();
            match row.winner().filter(|winner| winner.node.is_same(&node)) {
                Some(winner) => {
                    let disk = Disk { node, mode, mtime: winner.mtime, vector: row.agreed() };
                    device.disk.insert(path, disk);
                }
                None => self.change(at, &path, node, mode),
            }
        }
    }

    fn write(&mut self, at: usize, path: &TreePath, node: Node) {
        if !self.devices[at].takes(path) {
            return;
        }
        let mut above = path.parent();
        let mut missing = Vec::new();
        while let Some(directory) = above {
            match self.devices[at].disk.get(&directory).map(|disk| &disk.node) {
                Some(Node::Directory) => break,
                Some(_) => return,
                None => missing.push(directory.clone()),
            }
            above = directory.parent();
        }
        let lies = self.devices[at].disk.get(path).map(|disk| disk.node.clone());
        if lies.is_some_and(|lies| lies == Node::Directory || node == Node::Directory) {
            return;
        }
        for directory in missing.iter().rev() {
            self.change(at, directory, Node::Directory, 0o755);
        }
        let mode = if node == Node::Directory { 0o755 } else { 0o644 };
        self.change(at, path, node, mode);
    }

    fn delete(&mut self, at: usize, path: &TreePath) {
        let below = |other: &&TreePath| *other == path || other.is_below(path);
        let paths: Vec<TreePath> = self.devices[at].disk.keys().filter(below).cloned().collect();
        for path in paths.iter().rev() {
            self.change(at, path, Node::Deleted, 0);
        }
        let gone = self.devices[at].left_out.extract_if(.., |other, _| other == path || other.is_below(path));
        self.discarded.extend(gone.filter_map(|(_, (node, _))| content(&node)));
    }

    fn rename(&mut self, at: usize, from: &TreePath, to: &TreePath) {
        let disk = &self.devices[at].disk;
        let parent = to.parent().and_then(|parent| disk.get(&parent).map(|disk| disk.node == Node::Directory));
        let room = to.parent().is_none() || parent == Some(true);
        let device = &self.devices[at];
        let crosses = |other: &TreePath| other == from || other.is_below(from);
        let leads_on = device.selected.iter().any(|other| other.is_below(to));
        if !device.takes(to) || leads_on || device.left_out.keys().any(crosses) {
            return;
        }
        if !disk.contains_key(from) || disk.contains_key(to) || from == to || to.is_below(from) || !room {
            return;
        }
        let moved: Vec<(TreePath, Disk)> = disk
            .iter()
            .filter(|(path, _)| *path == from || path.is_below(from))
            .map(|(path, disk)| {
                let to = format!("{to}{}", &path.as_str()[from.as_str().len()..]);
                (self::path(&to), disk.clone())
            })
            .collect();
        let discarded = self.discarded.clone();
        self.delete(at, from);
        self.discarded = discarded;
        for (to, disk) in moved {
            self.change(at, &to, disk.node, disk.mode);
        }
    }

    fn chmod(&mut self, at: usize, path: &TreePath, mode: u32) {
        if let Some(Disk { node: node @ (Node::File(_) | Node::Directory), .. }) = self.devices[at].disk.get(path) {
            let node = node.clone();
            self.change(at, path, node, mode);
        }
    }

    /// A record that waits arrives, and stays to arrive again if `twice`.
    fn deliver(&mut self, at: usize, which: usize, twice: bool) {
        let device = &mut self.devices[at];
        if device.waiting.is_empty() {
            return;
        }
        let which = which % device.waiting.len();
        let entry = if twice { device.waiting[which] } else { device.waiting.swap_remove(which) };
        let (record, dot) = &self.log[entry];
        device.rows.entry(record.path.clone()).or_default().insert(Version::new(record, *dot));
    }

    /// Carries out the first operations of what is to be done on a device; whether that was all and there was any.
    fn apply(&mut self, at: usize, first: usize) -> bool {
        let device = &self.devices[at];
        let plan = plan(device.changes(), |directory| device.entries(directory));
        assert_eq!(plan.held, [], "everything is told");
        self.copies.clear();
        for operation in plan.operations.iter().take(first) {
            // A copy that was made meanwhile lies where the same was to be taken: that is decided anew.
            if !self.copies.contains(operation.path()) {
                self.execute(at, operation.clone());
            }
        }
        plan.operations.is_empty()
    }

    fn keep(&mut self, at: usize, path: &TreePath) {
        let disk = self.devices[at].disk.remove(path).expect("nothing lies there");
        self.handled.extend(content(&disk.node));
        self.devices[at].kept.extend(content(&disk.node));
    }

    /// Makes room for what is to be put at a path, and tells what was decided about a conflict.
    fn make_room(&mut self, at: usize, path: &TreePath, over: Over, take: &mut Disk) {
        match over {
            Over::Nothing => {}
            Over::Keep => self.keep(at, path),
            Over::Conflict(loser) => self.set_aside(at, path, &loser, take),
        }
        self.devices[at].assert_room_for(path);
    }

    fn set_aside(&mut self, at: usize, path: &TreePath, loser: &Version, take: &mut Disk) {
        let device = &mut self.devices[at];
        let differs = |node: &Node| !node.is_same(&loser.node);
        let copy = conflict_path(path, loser, |copy| {
            let said = device.rows.get(copy).filter(|row| row.is_live()).and_then(Versions::winner);
            said.is_some_and(|said| differs(&said.node))
                || device.disk.get(copy).is_some_and(|disk| differs(&disk.node))
                || device.left_out.get(copy).is_some_and(|(node, _)| differs(node))
                || device.is_live_below(copy)
        });
        let lies = device.disk.remove(path).expect("the loser lies there");
        device.left_out.remove(&copy);
        assert!(lies.node.is_same(&loser.node));
        self.handled.extend(content(&lies.node));
        let row = device.rows.entry(copy.clone()).or_default();
        let is_told = row.winner().is_some_and(|winner| winner.node.is_same(&loser.node));
        let [mut record, winner] = settle(path.clone(), take, copy.clone(), basis(row, device.disk.get(&copy)), loser);
        record.mode = lies.mode;
        let vector = if is_told { row.agreed() } else { self.publish(at, record.clone()).vector };
        self.copies.insert(copy.clone());
        self.devices[at].disk.insert(copy, Disk { mode: lies.mode, vector, ..lies });
        take.vector = self.publish(at, winner).vector;
    }

    fn execute(&mut self, at: usize, operation: Operation) {
        let path = operation.path().clone();
        assert!(self.devices[at].takes(&path), "{path} is left out");
        let lying = |world: &Self, path: &TreePath| world.devices[at].disk.get(path).cloned();
        let taken = match operation {
            Operation::MakeDirectory { mut disk, over, .. } => {
                let mode = disk.mode;
                self.make_room(at, &path, over, &mut disk);
                assert_eq!(mode & 0o700, 0o700, "it can be filled");
                disk
            }
            Operation::Write { mut disk, over, .. } => {
                self.make_room(at, &path, over, &mut disk);
                disk
            }
            Operation::Copy { from, mut disk, over, .. } => {
                assert!(lying(self, &from).is_some_and(|from| from.node.is_same(&disk.node)));
                self.make_room(at, &path, over, &mut disk);
                disk
            }
            Operation::Move { from, disk, .. } => {
                let lies = self.devices[at].disk.remove(&from).expect("nothing to move");
                assert!(lies.node.is_same(&disk.node));
                self.devices[at].assert_room_for(&path);
                disk
            }
            Operation::SetMeta { disk, .. } => {
                assert!(lying(self, &path).is_some_and(|lies| lies.node.is_same(&disk.node)));
                disk
            }
            Operation::Adopt { disk, .. } => {
                let lies = lying(self, &path).expect("nothing to adopt");
                assert_eq!(Disk { vector: lies.vector.clone(), ..disk.clone() }, lies);
                disk
            }
            Operation::Remove { .. } => return self.keep(at, &path),
            Operation::RemoveDirectory { .. } => {
                assert_eq!(self.devices[at].entries(&path), [], "{path} is not empty");
                self.devices[at].disk.remove(&path).expect("no directory");
                return;
            }
        };
        self.handled.extend(content(&taken.node));
        self.devices[at].disk.insert(path, taken);
    }

    /// Everything arrives everywhere and is carried out, until nobody has anything more to say.
    fn settle(&mut self) {
        for _ in 0..ROUNDS {
            let told = self.log.len();
            for at in 0..self.devices.len() {
                while !self.devices[at].waiting.is_empty() {
                    self.deliver(at, 0, false);
                }
                let done = (0..ROUNDS).any(|_| self.apply(at, usize::MAX));
                assert!(done, "device {at} does not come to rest: {:?}", self.devices[at].changes());
            }
            if self.log.len() == told {
                return;
            }
        }
        panic!("the group does not come to rest");
    }

    fn assert_converged(&self) {
        let first = &self.devices[0];
        for device in &self.devices {
            let plan = plan(device.changes(), |directory| device.entries(directory));
            assert_eq!(plan, Plan::default(), "nothing is left to do, and nothing in the way");
        }
        for other in &self.devices[1..] {
            assert_eq!(first.rows, other.rows);
            assert_eq!(first.tree(), other.tree());
        }
        for path in first.disk.keys() {
            let parent = path.parent();
            let parent = parent.map(|parent| first.disk.get(&parent).map(|disk| disk.node.clone()));
            assert!(matches!(parent, None | Some(Some(Node::Directory))));
        }
    }

    fn contents(&self) -> BTreeSet<String> {
        self.devices[0].disk.values().filter_map(|disk| content(&disk.node)).collect()
    }

    fn assert_nothing_lost(&self) {
        let mut known = self.contents();
        self.devices.iter().for_each(|device| known.extend(device.kept.iter().cloned()));
        let lost: Vec<&String> = self.handled.difference(&known).filter(|one| !self.discarded.contains(*one)).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }
}

const PATHS: [&str; 9] = ["a", "b", "a/x", "a/y", "b/x", "a/x/z", "a/x/z/deep", "c.txt", "a/y/c.txt"];

#[derive(Debug, Clone)]
enum Step {
    Write(usize),
    WriteSame(usize, u64),
    Link(usize),
    MakeDirectory(usize),
    Delete(usize),
    Rename(usize, usize),
    Chmod(usize, usize),
    Deliver(usize, bool),
    DeliverAll,
    Apply,
    ApplySome(usize),
    /// The home is copied: from here on its feed forks.
    Copy,
    /// The device takes these paths, by bits; none: everything.
    Select(usize),
}

fn steps(count: usize) -> impl Strategy<Value = Vec<(usize, Step)>> {
    let at = 0..PATHS.len();
    let step = prop_oneof![
        4 => at.clone().prop_map(Step::Write),
        1 => (at.clone(), 0u64..3).prop_map(|(path, content)| Step::WriteSame(path, content)),
        1 => at.clone().prop_map(Step::Link),
        1 => at.clone().prop_map(Step::MakeDirectory),
        3 => at.clone().prop_map(Step::Delete),
        2 => (at.clone(), at.clone()).prop_map(|(from, to)| Step::Rename(from, to)),
        1 => (at, 0..MODES.len()).prop_map(|(path, mode)| Step::Chmod(path, mode)),
        6 => (any::<usize>(), any::<bool>()).prop_map(|(which, twice)| Step::Deliver(which, twice)),
        2 => Just(Step::DeliverAll),
        4 => Just(Step::Apply),
        2 => (1usize..4).prop_map(Step::ApplySome),
        1 => Just(Step::Copy),
        1 => (0..1usize << PATHS.len()).prop_map(Step::Select),
        1 => Just(Step::Select(0)),
    ];
    proptest::collection::vec((any::<usize>(), step), 1..count)
}

fn run(devices: u8, steps: Vec<(usize, Step)>) -> World {
    let mut world = World::new(devices);
    for (n, (at, step)) in steps.into_iter().enumerate() {
        let at = at % world.devices.len();
        let fresh = 1000 + n as u64;
        match step {
            Step::Write(to) => world.write(at, &path(PATHS[to]), file(fresh)),
            Step::WriteSame(to, content) => world.write(at, &path(PATHS[to]), file(content)),
            Step::Link(to) => world.write(at, &path(PATHS[to]), Node::Symlink(format!("to {fresh}"))),
            Step::MakeDirectory(to) => world.write(at, &path(PATHS[to]), Node::Directory),
            Step::Delete(what) => world.delete(at, &path(PATHS[what])),
            Step::Rename(from, to) => world.rename(at, &path(PATHS[from]), &path(PATHS[to])),
            Step::Chmod(what, mode) => world.chmod(at, &path(PATHS[what]), MODES[mode]),
            Step::Deliver(which, twice) => world.deliver(at, which, twice),
            Step::DeliverAll => (0..world.devices[at].waiting.len()).for_each(|_| world.deliver(at, 0, false)),
            Step::Apply => {
                world.apply(at, usize::MAX);
            }
            Step::ApplySome(first) => {
                world.apply(at, first);
            }
            Step::Copy if world.devices.len() < MAX_DEVICES => {
                let copy = world.devices[at].clone();
                world.devices.push(copy);
            }
            Step::Copy => {}
            Step::Select(bits) => {
                let named = (0..PATHS.len()).filter(|at| bits >> at & 1 == 1 && at % 3 == bits % 3);
                world.select(at, named.map(|at| path(PATHS[at])).collect());
            }
        }
    }
    // what a device leaves out shows in nothing but that it is not there
    (0..world.devices.len()).for_each(|at| world.select(at, BTreeSet::new()));
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn converge(devices in 2u8..5, steps in steps(60)) {
        let mut world = run(devices, steps);
        world.settle();
        world.assert_converged();
    }

    #[test]
    fn no_silent_overwrite(devices in 2u8..5, steps in steps(60)) {
        let mut world = run(devices, steps);
        world.settle();
        world.assert_nothing_lost();
    }

    /// What several wrote at once, none of them knowing of the others, all of them find afterwards, without a look at
    /// what was kept.
    #[test]
    fn no_silent_overwrite_of_what_was_written_at_once(
        devices in 2u8..5,
        writes in proptest::collection::vec((any::<usize>(), prop::sample::select(vec!["a", "c.txt", "d/e"])), 1..8),
        arrivals in proptest::collection::vec((any::<usize>(), any::<usize>(), any::<bool>()), 0..60),
    ) {
        let mut world = World::new(devices);
        let mut wrote = BTreeSet::new();
        for (n, (at, to)) in writes.into_iter().enumerate() {
            let (at, node) = (at % world.devices.len(), file(1000 + n as u64));
            if wrote.insert((at, to)) {
                world.write(at, &path(to), node);
            }
        }
        for (at, which, apply) in arrivals {
            let at = at % world.devices.len();
            world.deliver(at, which, false);
            if apply {
                world.apply(at, usize::MAX);
            }
        }
        world.settle();
        world.assert_converged();
        prop_assert_eq!(world.contents().len(), wrote.len());
    }
}
