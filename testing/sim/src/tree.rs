//! A folder's file system in memory that forgets what was not synced, with a user who changes it at any moment.
//!
//! A change of names is one step, as journals make it; what is synced is durable, and when the power fails any of the
//! other steps may have reached the disk, in an order that makes sense. What a file holds is durable once the file is
//! synced, its bits and its time with it or with the directory it is in; before that its name may be there without it.
//!
//! The operations on it are those of `sync_folder::apply`, made of the same steps, between any two of which the power
//! may fail, the disk may be full, or a user may be faster.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};

use rand_core::Rng;
use serde::{Deserialize, Serialize};
use sync_client::folders::carry::Files;
use sync_folder::apply::{ApplyError, Expected, Placed};
use sync_folder::versions::Kept;
use sync_folder::walk::{Kind, Stat};
use sync_types::folder::TreePath;

use crate::random::{chance, index};
use crate::vfs::Survive;

/// The directories that are always there: the folder's root, what is being received, and what is kept.
const ROOT: u64 = 1;
const TMP: u64 = 2;
const VERSIONS: u64 = 3;
/// The first inode of anything else.
const FIRST: u64 = 10;
/// Nanoseconds between two times that the file system tells apart.
const TICK: i64 = 4_000_000;
/// Nanoseconds after which a change must bear another time: more than a tick, as in `sync_folder::cut`.
const SETTLED: i64 = 20_000_000;

/// What a user does to a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "edit", rename_all = "snake_case")]
#[expect(missing_docs, reason = "what a variant says names its fields")]
pub enum Edit {
    /// Writes a file of so many bytes: over the old one, or beside it and then renamed.
    Write { path: String, size: usize, beside: bool },
    /// Writes a file that holds what another one holds.
    Copy { from: String, to: String },
    /// Removes whatever is there, with all below it.
    Remove { path: String },
    /// Renames whatever is there; what is at the other path goes.
    Rename { from: String, to: String },
    /// Sets permission bits.
    Mode { path: String, mode: u32 },
    /// Makes a directory in place of whatever is there.
    Directory { path: String },
    /// Makes a link in place of whatever is there.
    Link { path: String, target: String },
}

/// What happens at the n-th operation of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The power is cut before it.
    PowerCut,
    /// It fails.
    IoError,
    /// There is no room for it.
    DiskFull,
}

/// A name in a directory.
type Slot = (u64, String);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inode {
    kind: Kind,
    bytes: Vec<u8>,
    mode: u32,
    mtime: i64,
    hash: [u8; 32],
}

impl Inode {
    fn new(kind: Kind, bytes: Vec<u8>, mode: u32, mtime: i64) -> Self {
        let hash = *blake3::hash(&bytes).as_bytes();
        Self { kind, bytes, mode, mtime, hash }
    }
}

/// Changes of names that happen together, or not at all.
#[derive(Debug, Clone)]
struct Step {
    slots: Vec<(Slot, Option<u64>)>,
    /// Inodes it is about.
    inodes: Vec<u64>,
    /// The engine did it.
    by_engine: bool,
}

#[derive(Debug, Clone, Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<Slot, u64>,
    /// What is left if nothing that was not synced survives.
    durable: BTreeMap<Slot, u64>,
    /// Inodes as they are durably; those that were never synced are not among them.
    synced: BTreeMap<u64, Inode>,
    /// What was done to names and not synced.
    steps: Vec<Step>,
    /// Inodes whose content the engine wrote and did not sync.
    unsynced: BTreeSet<u64>,
    /// The same of their bits and times.
    unsynced_bits: BTreeSet<u64>,
    /// Directories in which the engine changed names.
    touched: BTreeSet<u64>,
    next: u64,
    /// Names given so far.
    drawn: u64,
    now: i64,
    operations: u64,
    trouble: Option<(u64, Trouble)>,
    dead: bool,
    /// What a user does after so many more operations.
    later: Vec<(u64, Edit)>,
    /// Contents that a user removed or overwrote.
    destroyed: BTreeSet<[u8; 32]>,
    /// Paths a user changed since they were told.
    edited: BTreeSet<String>,
    /// Contents a user wrote that no look at the tree has seen.
    unseen: BTreeSet<[u8; 32]>,
    /// One of those that the engine replaced or removed.
    overlooked: Option<[u8; 32]>,
    /// Contents made so far.
    contents: u64,
    seed: u64,
}

/// A folder's files on one device.
#[derive(Debug, Clone)]
pub(crate) struct Tree(RefCell<State>);

/// A received file that waits.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    name: String,
    stat: Stat,
}

/// One entry of a walk: a path, what is there, and the text of a link.
pub(crate) type Entry = (TreePath, Stat, Option<String>);

fn failed() -> ApplyError {
    ApplyError::Io(io::Error::other("the disk fails"))
}

fn is_same(expected: &Stat, found: &Stat) -> bool {
    match (expected.kind, found.kind) {
        (Kind::Directory, Kind::Directory) => expected.ino == found.ino,
        // a mode that was set meanwhile is a change that is to be told first
        (Kind::File, Kind::File) => expected.is_unchanged(found) && expected.mode == found.mode,
        _ => expected.is_unchanged(found),
    }
}

impl State {
    fn stat(&self, ino: u64) -> Option<Stat> {
        let inode = self.inodes.get(&ino)?;
        let size = if inode.kind == Kind::Directory { 0 } else { inode.bytes.len() as u64 };
        let mode = if inode.kind == Kind::Symlink { 0 } else { inode.mode };
        Some(Stat { kind: inode.kind, size, mtime: inode.mtime, ino, mode })
    }

    fn at(&self, slot: &Slot) -> Option<u64> {
        self.names.get(slot).copied()
    }

    fn look(&self, slot: &Slot) -> Option<Stat> {
        self.stat(self.at(slot)?)
    }

    fn time(&self) -> i64 {
        self.now - self.now.rem_euclid(TICK)
    }

    fn parent(&self, path: &TreePath) -> Result<u64, ApplyError> {
        let mut dir = ROOT;
        let mut components: Vec<&str> = path.components().collect();
        components.pop();
        for component in components {
            let ino = self.at(&(dir, component.to_owned())).ok_or(ApplyError::Missing)?;
            match self.inodes[&ino].kind {
                Kind::Directory => dir = ino,
                Kind::Symlink => return Err(ApplyError::Escape),
                Kind::File => return Err(ApplyError::Changed),
            }
        }
        Ok(dir)
    }

    fn slot(&self, path: &TreePath) -> Result<Slot, ApplyError> {
        Ok((self.parent(path)?, path.name().to_owned()))
    }

    fn children(&self, dir: u64) -> Vec<(Slot, u64)> {
        let below = self.names.range((dir, String::new())..(dir + 1, String::new()));
        below.map(|(slot, ino)| (slot.clone(), *ino)).collect()
    }

    /// Counts a step of the engine, which a user may precede, or makes it fail.
    fn tick(&mut self) -> Result<(), ApplyError> {
        if self.dead {
            return Err(failed());
        }
        self.operations += 1;
        let mut due = Vec::new();
        self.later.retain_mut(|(after, edit)| {
            let now = *after == 0;
            *after = after.saturating_sub(1);
            if now {
                due.push(edit.clone());
            }
            !now
        });
        due.iter().for_each(|edit| self.edit(edit));
        match &mut self.trouble {
            Some((0, trouble)) => {
                let trouble = *trouble;
                self.trouble = None;
                self.dead = trouble == Trouble::PowerCut;
                Err(if trouble == Trouble::DiskFull { ApplyError::DiskFull } else { failed() })
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn make(&mut self, inode: Inode) -> u64 {
        self.next += 1;
        self.inodes.insert(self.next, inode);
        self.next
    }

    /// Nothing can be put into a directory that a user has removed meanwhile.
    fn enter(&self, slot: &Slot) -> Result<(), ApplyError> {
        let is_there = slot.0 < FIRST || self.names.values().any(|ino| *ino == slot.0);
        if is_there { Ok(()) } else { Err(ApplyError::Missing) }
    }

    fn step(&mut self, slots: Vec<(Slot, Option<u64>)>, by_engine: bool) {
        let mut inodes: Vec<u64> = slots.iter().filter_map(|(slot, _)| self.at(slot)).collect();
        inodes.extend(slots.iter().filter_map(|(_, ino)| *ino));
        for (slot, ino) in &slots {
            match ino {
                Some(ino) => self.names.insert(slot.clone(), *ino),
                None => self.names.remove(slot),
            };
            if by_engine {
                self.touched.insert(slot.0);
            }
        }
        self.steps.push(Step { slots, inodes, by_engine });
    }

    fn rename(&mut self, from: &Slot, to: &Slot, by_engine: bool) {
        let ino = self.at(from);
        self.step(vec![(from.clone(), None), (to.clone(), ino)], by_engine);
    }

    /// Makes everything durable that was done to names in a directory, and what that follows; with the bits of what is
    /// in it.
    fn sync_dir(&mut self, dir: u64) {
        let mut wanted = vec![false; self.steps.len()];
        let (mut inodes, mut slots) = (BTreeSet::from([dir]), BTreeSet::new());
        for (at, step) in self.steps.iter().enumerate().rev() {
            let is_in = step.slots.iter().any(|(slot, _)| slot.0 == dir || slots.contains(slot));
            let is_of = step.inodes.iter().any(|ino| inodes.contains(ino));
            let below = step.slots.iter().any(|(slot, _)| inodes.contains(&slot.0));
            if is_in || is_of || below {
                wanted[at] = true;
                inodes.extend(step.inodes.iter().copied());
                slots.extend(step.slots.iter().map(|(slot, _)| slot.clone()));
            }
        }
        let mut wanted = wanted.into_iter();
        let (durable, rest) = std::mem::take(&mut self.steps).into_iter().partition(|_| wanted.next() == Some(true));
        self.steps = rest;
        for Step { slots, inodes, .. } in durable {
            keep(&mut self.durable, &slots);
            inodes.into_iter().for_each(|ino| self.sync_bits(ino));
        }
        self.sync_bits(dir);
        for (_, ino) in self.children(dir) {
            self.sync_bits(ino);
        }
    }

    fn sync_bits(&mut self, ino: u64) {
        let Some(inode) = self.inodes.get(&ino).cloned() else { return };
        self.unsynced_bits.remove(&ino);
        match self.synced.get_mut(&ino) {
            // the time of what a user wrote comes with it: where it came before, only reading would tell (docs/folders.md)
            Some(synced) if synced.hash != inode.hash => synced.mode = inode.mode,
            Some(synced) => (synced.mode, synced.mtime) = (inode.mode, inode.mtime),
            // the content of a directory or a link is in its inode
            None if inode.kind != Kind::File => {
                self.synced.insert(ino, inode);
            }
            None => {}
        }
    }

    fn sync_file(&mut self, ino: u64) {
        if let Some(inode) = self.inodes.get(&ino) {
            self.synced.insert(ino, inode.clone());
            self.unsynced.remove(&ino);
            self.unsynced_bits.remove(&ino);
        }
    }

    fn sync_all(&mut self) {
        for step in std::mem::take(&mut self.steps) {
            keep(&mut self.durable, &step.slots);
        }
        self.synced = self.inodes.clone();
        self.unsynced.clear();
        self.unsynced_bits.clear();
    }

    /// Contents found below the root or among what is kept, by names and inodes.
    fn contents(names: &BTreeMap<Slot, u64>, inodes: &BTreeMap<u64, Inode>) -> BTreeSet<[u8; 32]> {
        let mut found = BTreeSet::new();
        let mut dirs = vec![ROOT, VERSIONS];
        let mut seen = BTreeSet::new();
        while let Some(dir) = dirs.pop() {
            if !seen.insert(dir) {
                continue;
            }
            for (_, ino) in names.range((dir, String::new())..(dir + 1, String::new())) {
                match inodes.get(ino) {
                    Some(inode) if inode.kind == Kind::Directory => dirs.push(*ino),
                    Some(inode) if inode.kind == Kind::File && !inode.bytes.is_empty() => {
                        found.insert(inode.hash);
                    }
                    _ => {}
                }
            }
        }
        found
    }

    fn walk(&self, dir: u64, above: Option<&TreePath>, found: &mut Vec<Entry>) {
        for ((_, name), ino) in self.children(dir) {
            let path = match above {
                Some(above) => above.join(&name),
                None => TreePath::new(name),
            };
            let (Ok(path), Some(stat)) = (path, self.stat(ino)) else { continue };
            let target =
                (stat.kind == Kind::Symlink).then(|| String::from_utf8_lossy(&self.inodes[&ino].bytes).into_owned());
            found.push((path.clone(), stat, target));
            if stat.kind == Kind::Directory {
                self.walk(ino, Some(&path), found);
            }
        }
    }

    // ---- the user ----

    fn edit(&mut self, edit: &Edit) {
        let before = Self::contents(&self.names, &self.inodes);
        let paths: Vec<&str> = match edit {
            Edit::Write { path, .. }
            | Edit::Remove { path }
            | Edit::Mode { path, .. }
            | Edit::Directory { path }
            | Edit::Link { path, .. } => vec![path],
            Edit::Copy { to, .. } => vec![to],
            Edit::Rename { from, to } => vec![from, to],
        };
        self.edited.extend(paths.iter().map(|path| (*path).to_owned()));
        let files = self.files();
        // a path that makes no sense any more is passed over
        let _ = self.try_edit(edit);
        let after = Self::contents(&self.names, &self.inodes);
        self.destroyed.extend(before.difference(&after));
        // what else holds the same may not be durable
        let there = self.files();
        let lost = || files.iter().filter(|(ino, content)| there.get(ino) != Some(content));
        let mut elsewhere = self.synced.clone();
        elsewhere.retain(|ino, _| !lost().any(|(gone, _)| gone == ino));
        let elsewhere = Self::contents(&self.durable, &elsewhere);
        self.destroyed.extend(lost().map(|(_, content)| *content).filter(|content| !elsewhere.contains(content)));
    }

    /// The content of each file below the root.
    fn files(&self) -> BTreeMap<u64, [u8; 32]> {
        let (mut files, mut dirs) = (BTreeMap::new(), vec![ROOT]);
        while let Some(dir) = dirs.pop() {
            for (_, ino) in self.children(dir) {
                match self.inodes.get(&ino) {
                    Some(inode) if inode.kind == Kind::Directory => dirs.push(ino),
                    Some(inode) if inode.kind == Kind::File => drop(files.insert(ino, inode.hash)),
                    _ => {}
                }
            }
        }
        files
    }

    /// The slot of a path, its directories made; files in the way go.
    fn clear_way(&mut self, path: &TreePath) -> Slot {
        let mut dir = ROOT;
        let components: Vec<&str> = path.components().collect();
        let (name, above) = components.split_last().expect("BUG: a path has a component");
        for component in above {
            let slot = (dir, (*component).to_owned());
            dir = match self.at(&slot) {
                Some(ino) if self.inodes[&ino].kind == Kind::Directory => ino,
                _ => {
                    let made = self.make(Inode::new(Kind::Directory, Vec::new(), 0o755, self.time()));
                    self.step(vec![(slot, Some(made))], false);
                    made
                }
            };
        }
        (dir, (*name).to_owned())
    }

    fn clear(&mut self, slot: &Slot) {
        if let Some(ino) = self.at(slot) {
            for (child, _) in self.children(ino) {
                self.clear(&child);
            }
            self.step(vec![(slot.clone(), None)], false);
        }
    }

    fn new_content(&mut self, size: usize) -> Vec<u8> {
        self.contents += 1;
        let mut bytes = vec![0; size.max(24)];
        let mut rng = crate::random::derive(self.seed, &format!("content {}", self.contents));
        rng.fill_bytes(&mut bytes);
        self.unseen.insert(*blake3::hash(&bytes).as_bytes());
        bytes
    }

    fn try_edit(&mut self, edit: &Edit) -> Option<()> {
        let time = self.time();
        let parse = |path: &str| TreePath::new(path).ok();
        match edit {
            Edit::Write { path, size, beside } => {
                let path = parse(path)?;
                let bytes = self.new_content(*size);
                self.write(&path, bytes, *beside);
            }
            Edit::Copy { from, to } => {
                let ino = self.at(&self.slot(&parse(from)?).ok()?)?;
                let bytes = self.inodes.get(&ino).filter(|inode| inode.kind == Kind::File)?.bytes.clone();
                self.write(&parse(to)?, bytes, true);
            }
            Edit::Remove { path } => {
                let slot = self.slot(&parse(path)?).ok()?;
                self.clear(&slot);
            }
            Edit::Rename { from, to } => {
                let (from, to) = (parse(from)?, parse(to)?);
                if from == to || to.is_below(&from) || from.is_below(&to) {
                    return None;
                }
                let old = self.slot(&from).ok()?;
                self.at(&old)?;
                let new = self.clear_way(&to);
                self.clear(&new);
                self.rename(&old, &new, false);
            }
            Edit::Mode { path, mode } => {
                let ino = self.at(&self.slot(&parse(path)?).ok()?)?;
                let inode = self.inodes.get_mut(&ino)?;
                inode.mode = if inode.kind == Kind::Directory { mode | 0o700 } else { mode | 0o600 };
            }
            Edit::Directory { path } => {
                let path = parse(path)?;
                let slot = self.clear_way(&path);
                self.clear(&slot);
                let made = self.make(Inode::new(Kind::Directory, Vec::new(), 0o755, time));
                self.step(vec![(slot, Some(made))], false);
            }
            Edit::Link { path, target } => {
                let path = parse(path)?;
                let slot = self.clear_way(&path);
                self.clear(&slot);
                let made = self.make(Inode::new(Kind::Symlink, target.clone().into_bytes(), 0, time));
                self.step(vec![(slot, Some(made))], false);
            }
        }
        Some(())
    }

    fn write(&mut self, path: &TreePath, bytes: Vec<u8>, beside: bool) {
        let time = self.time();
        let slot = self.clear_way(path);
        let old = self.at(&slot).filter(|ino| self.inodes[ino].kind == Kind::File);
        match old {
            Some(ino) if !beside => {
                let mode = self.inodes[&ino].mode;
                self.inodes.insert(ino, Inode::new(Kind::File, bytes, mode, time));
            }
            _ => {
                if old.is_none() {
                    self.clear(&slot);
                }
                let made = self.make(Inode::new(Kind::File, bytes, 0o644, time));
                self.step(vec![(slot, Some(made))], false);
            }
        }
    }
}

fn keep(names: &mut BTreeMap<Slot, u64>, slots: &[(Slot, Option<u64>)]) {
    for (slot, ino) in slots {
        match ino {
            Some(ino) => names.insert(slot.clone(), *ino),
            None => names.remove(slot),
        };
    }
}

impl Tree {
    /// An empty folder.
    pub(crate) fn new(seed: u64, place: usize) -> Self {
        let directory = || Inode::new(Kind::Directory, Vec::new(), 0o755, 0);
        let inodes: BTreeMap<u64, Inode> = [ROOT, TMP, VERSIONS].map(|ino| (ino, directory())).into();
        let mut state = State { synced: inodes.clone(), inodes, next: FIRST, ..State::default() };
        state.seed = seed.wrapping_mul(64).wrapping_add(place as u64);
        Self(RefCell::new(state))
    }

    /// Says what time it is.
    pub(crate) fn set_now(&self, ms: u64) {
        self.0.borrow_mut().now = i64::try_from(ms).unwrap_or(i64::MAX).saturating_mul(1_000_000);
    }

    /// A user does something now; `flushed`: the system writes it to the disk soon enough.
    pub(crate) fn edit(&self, edit: &Edit, flushed: bool) {
        let mut state = self.0.borrow_mut();
        state.edit(edit);
        if flushed {
            // the engine's own steps keep their place: only what it is bound to sync is left to it
            let engine = state.steps.iter().any(|step| step.by_engine)
                || !state.unsynced.is_empty()
                || !state.unsynced_bits.is_empty();
            if !engine {
                state.sync_all();
            }
        }
    }

    /// A user does something after so many more operations of the engine.
    pub(crate) fn edit_later(&self, after: u64, edit: Edit) {
        self.0.borrow_mut().later.push((after, edit));
    }

    /// Has trouble happen after so many more operations of the engine.
    pub(crate) fn trouble(&self, after: u64, trouble: Trouble) {
        self.0.borrow_mut().trouble = Some((after, trouble));
    }

    /// Takes back trouble and edits that have not happened yet.
    pub(crate) fn heal(&self) {
        let mut state = self.0.borrow_mut();
        state.trouble = None;
        state.later.clear();
    }

    /// Whether the power was cut.
    pub(crate) fn is_dead(&self) -> bool {
        self.0.borrow().dead
    }

    /// Nothing works any more until [`Tree::restart`].
    pub(crate) fn cut_power(&self) {
        self.0.borrow_mut().dead = true;
    }

    /// Starts again with what survived.
    pub(crate) fn restart(&self, survive: Survive, rng: &mut impl Rng) {
        let mut state = self.0.borrow_mut();
        state.dead = false;
        state.touched.clear();
        if survive != Survive::Everything {
            let mut names = state.durable.clone();
            let (mut lost, mut lost_slots) = (BTreeSet::new(), BTreeSet::new());
            for step in std::mem::take(&mut state.steps) {
                let follows = step.inodes.iter().any(|ino| lost.contains(ino))
                    || step.slots.iter().any(|(slot, _)| lost_slots.contains(slot) || lost.contains(&slot.0))
                    // a directory goes after what was in it
                    || (step.slots.iter().all(|(_, ino)| ino.is_none())
                        && lost_slots.iter().any(|(dir, _)| step.inodes.contains(dir)));
                if !follows && survive == Survive::Some && chance(rng, 50) {
                    keep(&mut names, &step.slots);
                } else {
                    lost.extend(step.inodes);
                    lost_slots.extend(step.slots.into_iter().map(|(slot, _)| slot));
                }
            }
            state.names = names;
            let synced = std::mem::take(&mut state.synced);
            let engines = state.unsynced.clone();
            for (ino, inode) in &mut state.inodes {
                let all = survive == Survive::Some && chance(rng, 50);
                if all {
                    continue;
                }
                match synced.get(ino) {
                    Some(synced) => inode.clone_from(synced),
                    None if inode.kind != Kind::File => {}
                    // a name without its data; where the size says nothing of that, whoever wrote it has to sync it
                    None if !engines.contains(ino) || chance(rng, 50) => {
                        *inode = Inode::new(Kind::File, Vec::new(), inode.mode, inode.mtime)
                    }
                    None => {
                        let mut bytes = std::mem::take(&mut inode.bytes);
                        let from = index(rng, bytes.len().max(1));
                        bytes.iter_mut().skip(from).for_each(|byte| *byte = 0);
                        *inode = Inode::new(Kind::File, bytes, inode.mode, inode.mtime);
                    }
                }
            }
        }
        state.sync_all();
        state.durable = state.names.clone();
        // what is received is not taken up again here
        let waiting = state.children(TMP);
        for (slot, _) in waiting {
            state.names.remove(&slot);
            state.durable.remove(&slot);
        }
    }

    /// Everything in it, in the order of the index.
    pub(crate) fn walk(&self) -> Vec<Entry> {
        let mut found = Vec::new();
        self.0.borrow().walk(ROOT, None, &mut found);
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// What is in a directory.
    pub(crate) fn entries(&self, path: &TreePath) -> Vec<TreePath> {
        let state = self.0.borrow();
        let dir = state.slot(path).ok().and_then(|slot| state.at(&slot));
        let children = dir.map(|dir| state.children(dir)).unwrap_or_default();
        children.into_iter().filter_map(|((_, name), _)| path.join(&name).ok()).collect()
    }

    /// What is at a path.
    pub(crate) fn stat(&self, path: &TreePath) -> Option<Stat> {
        let state = self.0.borrow();
        state.look(&state.slot(path).ok()?)
    }

    /// What is in the file at a path.
    pub(crate) fn read(&self, path: &TreePath) -> Option<Vec<u8>> {
        let state = self.0.borrow();
        let ino = state.at(&state.slot(path).ok()?)?;
        state.inodes.get(&ino).filter(|inode| inode.kind == Kind::File).map(|inode| inode.bytes.clone())
    }

    /// What a kept version holds.
    pub(crate) fn read_kept(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.0.borrow();
        let ino = state.at(&(VERSIONS, name.strip_prefix("versions/")?.to_owned()))?;
        state.inodes.get(&ino).map(|inode| inode.bytes.clone())
    }

    /// Hashes of all that lies in the folder.
    pub(crate) fn shown_contents(&self) -> BTreeSet<[u8; 32]> {
        self.0.borrow().files().into_values().collect()
    }

    /// Whether a change after now would bear another time than this one.
    pub(crate) fn is_settled(&self, mtime: i64) -> bool {
        mtime.saturating_add(SETTLED) <= self.0.borrow().now
    }

    /// Hashes of all that lies in it or is kept.
    pub(crate) fn contents(&self) -> BTreeSet<[u8; 32]> {
        let state = self.0.borrow();
        State::contents(&state.names, &state.inodes)
    }

    /// The same, if nothing that was not synced survives.
    pub(crate) fn durable_contents(&self) -> BTreeSet<[u8; 32]> {
        let state = self.0.borrow();
        State::contents(&state.durable, &state.synced)
    }

    /// Contents that a user overwrote or removed.
    pub(crate) fn destroyed(&self) -> BTreeSet<[u8; 32]> {
        self.0.borrow().destroyed.clone()
    }

    /// Whether what the engine did at a path is not durable; not where a user was there since.
    pub(crate) fn is_unsynced(&self, path: &TreePath) -> bool {
        let state = self.0.borrow();
        let is_edited = |edited: &String| {
            let edited = TreePath::new(edited.clone());
            edited.is_ok_and(|edited| edited == *path || path.is_below(&edited) || edited.is_below(path))
        };
        let Ok(slot) = state.slot(path) else { return false };
        if state.edited.iter().any(is_edited) {
            return false;
        }
        let named = state.steps.iter().any(|step| step.by_engine && step.slots.iter().any(|(at, _)| *at == slot));
        let unsynced = |ino| state.unsynced.contains(&ino) || state.unsynced_bits.contains(&ino);
        named || state.at(&slot).is_some_and(unsynced)
    }

    /// What a user did at a path is known now.
    pub(crate) fn forget_edit(&self, path: &TreePath) {
        self.0.borrow_mut().edited.remove(path.as_str());
    }

    /// A look at the tree has seen a content, and it is told.
    pub(crate) fn is_seen(&self, content: &[u8; 32]) {
        self.0.borrow_mut().unseen.remove(content);
    }

    /// A content that no look had seen when the engine replaced or removed it.
    pub(crate) fn overlooked(&self) -> Option<[u8; 32]> {
        self.0.borrow_mut().overlooked.take()
    }

    /// Receives a file.
    pub(crate) fn receive(&self, bytes: Vec<u8>, mode: u32, mtime: i64) -> Result<Ready, ApplyError> {
        let mut state = self.0.borrow_mut();
        state.tick()?;
        state.drawn += 1;
        let name = format!("{:032x}", state.drawn);
        let ino = state.make(Inode::new(Kind::File, bytes, mode, mtime));
        // whoever sent it has seen it
        if let Some(hash) = state.inodes.get(&ino).map(|inode| inode.hash) {
            state.unseen.remove(&hash);
        }
        state.step(vec![((TMP, name.clone()), Some(ino))], true);
        state.unsynced.insert(ino);
        let stat = state.stat(ino).ok_or(ApplyError::Missing)?;
        Ok(Ready { name, stat })
    }

    /// A copy of all that lies there.
    pub(crate) fn image(&self) -> Self {
        let copy = self.clone();
        let mut state = copy.0.borrow_mut();
        state.sync_all();
        state.durable = state.names.clone();
        state.trouble = None;
        state.later.clear();
        state.dead = false;
        drop(state);
        copy
    }

    /// Goes back to a copy; contents made since are not made again.
    pub(crate) fn load(&self, image: &Self) {
        let had = self.contents();
        let (contents, seed) = {
            let state = self.0.borrow();
            (state.contents, state.seed)
        };
        let destroyed = self.destroyed();
        *self.0.borrow_mut() = image.0.borrow().clone();
        let mut state = self.0.borrow_mut();
        (state.contents, state.seed) = (contents.max(state.contents), seed);
        state.destroyed = destroyed;
        state.destroyed.extend(had);
        state.dead = false;
    }
}

impl State {
    /// Takes what was moved to what is kept, or back where it came from if it is not what was expected.
    fn settle_removal(&mut self, at: &Slot, expected: &Stat, slot: &Slot) -> Result<Option<Kept>, ApplyError> {
        let stat = self.look(slot).ok_or(ApplyError::Changed)?;
        if is_same(expected, &stat) {
            return Ok(Some(self.kept(slot, &stat)));
        }
        self.tick()?;
        if self.at(at).is_none() {
            self.rename(slot, at, true);
        }
        Err(ApplyError::Changed)
    }

    fn kept(&mut self, slot: &Slot, stat: &Stat) -> Kept {
        let hash = self.at(slot).and_then(|ino| self.inodes.get(&ino)).map(|inode| inode.hash);
        self.overlooked = self.overlooked.or(hash.filter(|hash| self.unseen.contains(hash)));
        Kept {
            name: format!("versions/{}", slot.1),
            at: self.now / 1_000_000_000,
            kind: stat.kind,
            size: stat.size,
            mode: stat.mode,
            mtime: stat.mtime,
            target: None,
            ino: stat.ino,
        }
    }

    fn version_slot(&mut self) -> Slot {
        self.drawn += 1;
        (VERSIONS, format!("{:08}", self.drawn))
    }

    fn put(&mut self, name: &str, new: &Stat, path: &TreePath, expected: Expected) -> Result<Option<Kept>, ApplyError> {
        let (from, at) = ((TMP, name.to_owned()), self.slot(path)?);
        let old = match expected {
            Expected::Nothing => {
                self.tick()?;
                self.enter(&at)?;
                if self.at(&at).is_some() {
                    return Err(ApplyError::Changed);
                }
                self.rename(&from, &at, true);
                return Ok(None);
            }
            Expected::This(Stat { kind: Kind::Directory, .. }) => return Err(ApplyError::NotEmpty),
            Expected::This(old) => old,
        };
        if !self.look(&at).is_some_and(|found| is_same(&old, &found)) {
            return Err(ApplyError::Changed);
        }
        let slot = self.version_slot();
        self.tick()?;
        self.rename(&from, &slot, true);
        if let Err(error) = self.tick() {
            if !self.dead {
                self.rename(&slot, &from, true);
            }
            return Err(error);
        }
        let Some(there) = self.at(&at) else {
            self.rename(&slot, &from, true);
            return Err(ApplyError::Changed);
        };
        let ours = self.at(&slot);
        self.step(vec![(at.clone(), ours), (slot.clone(), Some(there))], true);
        self.tick()?;
        let came = self.look(&slot);
        if came.is_some_and(|came| is_same(&old, &came)) {
            return Ok(came.map(|came| self.kept(&slot, &came)));
        }
        if self.look(&at).is_some_and(|found| is_same(new, &found)) {
            let (there, ours) = (self.at(&slot), self.at(&at));
            self.step(vec![(at, there), (slot.clone(), ours)], true);
            self.rename(&slot, &from, true);
        }
        Err(ApplyError::Changed)
    }
}

impl Files for Tree {
    type Ready = Ready;

    fn is_free(&self, path: &TreePath) -> bool {
        self.stat(path).is_none()
    }

    fn sync(&self, ready: &[Ready]) -> Result<(), ApplyError> {
        let mut state = self.0.borrow_mut();
        for Ready { stat, .. } in ready {
            state.tick()?;
            state.sync_file(stat.ino);
        }
        Ok(())
    }

    fn place(&self, ready: &Ready, path: &TreePath, expected: Expected) -> Result<Placed, ApplyError> {
        let kept = self.0.borrow_mut().put(&ready.name, &ready.stat, path, expected)?;
        Ok(Placed { stat: ready.stat, kept })
    }

    fn discard(&self, ready: &Ready) -> Result<(), ApplyError> {
        let mut state = self.0.borrow_mut();
        state.tick()?;
        let slot = (TMP, ready.name.clone());
        if state.at(&slot).is_some() {
            state.step(vec![(slot, None)], true);
        }
        Ok(())
    }

    fn rename(&self, from: &TreePath, expected: &Stat, to: &TreePath) -> Result<Stat, ApplyError> {
        let mut state = self.0.borrow_mut();
        if to.is_below(from) {
            return Err(ApplyError::Unsupported("a directory cannot be moved into itself"));
        }
        let (old, new) = (state.slot(from)?, state.slot(to)?);
        if !state.look(&old).is_some_and(|found| is_same(expected, &found)) {
            return Err(ApplyError::Changed);
        }
        state.tick()?;
        state.enter(&new)?;
        if state.at(&new).is_some() {
            return Err(ApplyError::Changed);
        }
        if state.at(&old).is_none() {
            return Err(ApplyError::Missing);
        }
        state.rename(&old, &new, true);
        match state.look(&new) {
            Some(stat) if is_same(expected, &stat) => Ok(stat),
            _ => {
                if state.at(&old).is_none() {
                    state.rename(&new, &old, true);
                }
                Err(ApplyError::Changed)
            }
        }
    }

    fn remove(&self, path: &TreePath, expected: &Stat) -> Result<Option<Kept>, ApplyError> {
        let mut state = self.0.borrow_mut();
        let at = match state.slot(path) {
            Err(ApplyError::Missing) => return Ok(None),
            other => other?,
        };
        match state.look(&at) {
            None => return Ok(None),
            Some(Stat { kind: Kind::Directory, .. }) => return Err(ApplyError::NotEmpty),
            Some(found) if is_same(expected, &found) => {}
            Some(_) => return Err(ApplyError::Changed),
        }
        let slot = state.version_slot();
        state.tick()?;
        if state.at(&at).is_none() {
            return Ok(None);
        }
        state.rename(&at, &slot, true);
        state.settle_removal(&at, expected, &slot)
    }

    fn make_dir(&self, path: &TreePath, mode: u32) -> Result<Stat, ApplyError> {
        if let Some(above) = path.parent()
            && matches!(self.0.borrow().parent(path), Err(ApplyError::Missing))
        {
            self.make_dir(&above, 0o755)?;
        }
        let mut state = self.0.borrow_mut();
        let slot = state.slot(path)?;
        state.tick()?;
        state.enter(&slot)?;
        match state.look(&slot) {
            Some(stat) if stat.kind == Kind::Directory => return Ok(stat),
            Some(_) => return Err(ApplyError::Changed),
            None => {}
        }
        let time = state.time();
        let ino = state.make(Inode::new(Kind::Directory, Vec::new(), mode, time));
        state.step(vec![(slot, Some(ino))], true);
        state.stat(ino).ok_or(ApplyError::Changed)
    }

    fn remove_dir(&self, path: &TreePath) -> Result<(), ApplyError> {
        let mut state = self.0.borrow_mut();
        let slot = match state.slot(path) {
            Err(ApplyError::Missing) => return Ok(()),
            other => other?,
        };
        state.tick()?;
        let Some(ino) = state.at(&slot) else { return Ok(()) };
        if state.inodes[&ino].kind != Kind::Directory {
            return Err(io::Error::from(ErrorKind::NotADirectory).into());
        }
        if !state.children(ino).is_empty() {
            return Err(ApplyError::NotEmpty);
        }
        state.touched.remove(&ino);
        state.step(vec![(slot, None)], true);
        Ok(())
    }

    fn make_link(&self, path: &TreePath, target: &str, expected: Expected) -> Result<Placed, ApplyError> {
        let mut state = self.0.borrow_mut();
        state.tick()?;
        state.drawn += 1;
        let name = format!("{:032x}", state.drawn);
        let time = state.time();
        let ino = state.make(Inode::new(Kind::Symlink, target.as_bytes().to_vec(), 0, time));
        state.step(vec![((TMP, name.clone()), Some(ino))], true);
        let stat = state.stat(ino).ok_or(ApplyError::Changed)?;
        match state.put(&name, &stat, path, expected) {
            Ok(kept) => Ok(Placed { stat, kept }),
            Err(error) => {
                let slot = (TMP, name);
                if !state.dead && state.at(&slot).is_some() {
                    state.step(vec![(slot, None)], true);
                }
                Err(error)
            }
        }
    }

    fn set_meta(&self, path: &TreePath, expected: &Stat, mode: u32, mtime: Option<i64>) -> Result<Stat, ApplyError> {
        let mut state = self.0.borrow_mut();
        let slot = state.slot(path)?;
        if !state.look(&slot).is_some_and(|found| is_same(expected, &found)) {
            return Err(ApplyError::Changed);
        }
        state.tick()?;
        let ino = state.at(&slot).filter(|ino| *ino == expected.ino).ok_or(ApplyError::Changed)?;
        let inode = state.inodes.get_mut(&ino).ok_or(ApplyError::Changed)?;
        inode.mode = mode;
        if let Some(mtime) = mtime {
            inode.mtime = mtime;
        }
        state.unsynced_bits.insert(ino);
        // as in `sync_folder::apply`: what was changed is synced with the directory it is in
        state.touched.insert(slot.0);
        let stat = state.stat(ino).ok_or(ApplyError::Changed)?;
        Ok(Stat { size: expected.size, ..stat })
    }

    fn sync_dirs(&self) -> Result<(), ApplyError> {
        let mut state = self.0.borrow_mut();
        for dir in state.touched.clone() {
            state.tick()?;
            state.sync_dir(dir);
        }
        state.touched.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::derive;

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    /// Contents at two paths after a crash, of a tree with a file that was replaced.
    fn replaced(seed: u64, synced: bool) -> (Option<Vec<u8>>, BTreeSet<[u8; 32]>, [u8; 32]) {
        let tree = Tree::new(seed, 0);
        tree.edit(&Edit::Write { path: "a".to_owned(), size: 30, beside: false }, true);
        let old = *blake3::hash(&tree.read(&path("a")).expect("a file")).as_bytes();
        tree.forget_edit(&path("a"));
        let before = tree.stat(&path("a")).expect("a file");
        let ready = tree.receive(vec![7; 40], 0o644, 1).expect("a sound disk");
        if synced {
            tree.sync(std::slice::from_ref(&ready)).expect("a sound disk");
        }
        tree.place(&ready, &path("a"), Expected::This(before)).expect("a sound disk");
        assert!(tree.is_unsynced(&path("a")));
        if synced {
            tree.sync_dirs().expect("a sound disk");
            assert!(!tree.is_unsynced(&path("a")));
        }
        tree.cut_power();
        tree.restart(Survive::Some, &mut derive(seed, "crash"));
        (tree.read(&path("a")), tree.contents(), old)
    }

    #[test]
    fn what_was_synced_is_there_after_a_crash() {
        for seed in 0..20 {
            let (there, contents, old) = replaced(seed, true);
            assert_eq!(there, Some(vec![7; 40]));
            assert!(contents.contains(&old), "what was replaced is kept");
        }
    }

    #[test]
    fn what_was_not_synced_may_be_gone_or_a_name_without_its_data() {
        let after: Vec<_> = (0..200).map(|seed| replaced(seed, false)).collect();
        assert!(after.iter().all(|(.., contents, old)| contents.contains(old)), "what was durable stays");
        let new = |there: &Option<Vec<u8>>| *there == Some(vec![7; 40]);
        let is_old =
            |there: &Option<Vec<u8>>, old: &[u8; 32]| there.as_ref().is_some_and(|there| blake3::hash(there) == *old);
        assert!(after.iter().any(|(there, ..)| new(there)));
        assert!(after.iter().any(|(there, _, old)| is_old(there, old)));
        assert!(after.iter().any(|(there, _, old)| there.is_some() && !new(there) && !is_old(there, old)));
    }

    #[test]
    fn a_user_who_is_faster_is_not_overtaken() {
        let tree = Tree::new(1, 0);
        let edit = Edit::Write { path: "a".to_owned(), size: 30, beside: true };
        tree.edit(&edit, true);
        let before = tree.stat(&path("a")).expect("a file");
        tree.set_now(1_000_000);
        let ready = tree.receive(vec![7; 40], 0o644, 1).expect("a sound disk");
        // after the look, before the exchange
        tree.edit_later(1, edit);
        let placed = tree.place(&ready, &path("a"), Expected::This(before));
        assert!(matches!(placed, Err(ApplyError::Changed)), "{placed:?}");
        assert_ne!(tree.read(&path("a")), Some(vec![7; 40]));
        assert_eq!(tree.overlooked(), None);
    }
}
