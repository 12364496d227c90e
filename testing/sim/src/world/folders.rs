//! Folders in a world: what users and devices do to them, and what must hold of them.

use std::collections::{BTreeMap, BTreeSet};

use sync_client::folders::rows;
use sync_core::folder::{Version, Versions};
use sync_folder::walk::Kind;
use sync_store::StoreError;
use sync_types::folder::{Node, TreePath};

use super::{Event, World};
use crate::folder::{self, Folder};
use crate::ledger::{CONVERGE, Checked, NO_SILENT_OVERWRITE, broken};
use crate::random::{below, chance};
use crate::replica::{Replica, Running};
use crate::tree::{Edit, Tree};
use crate::vfs::Survive;

/// Ms until a change is noticed at most.
const NOTICED: u64 = 60;
/// Ms until a file that was just written is read again.
const AGAIN: u64 = 40;
/// Ms between two steps of an apply at most.
const STEP: u64 = 12;
/// Operations carried out in one step at most.
const OPERATIONS: u64 = 4;
/// Times that what could not be done is tried again before something else has to happen.
const RETRIES: u32 = 2;
/// Ms until it is tried again at most.
const RETRY: u64 = 120;
/// Rounds until folders must have come to rest: one for each device that makes a conflict copy of another's, and more.
const ROUNDS: usize = 24;

/// One step of what a device does for a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    Scan,
    Tell,
    TakeIn,
    Apply,
}

/// Whether a version is a file whose content lies nowhere any more.
fn is_gone(node: &Node, lies: &BTreeSet<[u8; 32]>) -> bool {
    matches!(node, Node::File(file) if file.size > 0 && !lies.contains(&file.hash))
}

/// What lies at a path of a tree.
type Shown = BTreeMap<TreePath, (Kind, u32, [u8; 32])>;

impl World {
    fn folder_soon(&mut self, place: usize, most: u64, work: Work) {
        if self.replicas[place].folder.is_none() || !self.waiting.insert((place, work)) {
            return;
        }
        let wait = below(&mut self.folder_rng, most + 1);
        self.schedule(self.now + wait, Event::Folder(place, work));
    }

    /// A device has something to do for its folder.
    pub(super) fn folder_event(&mut self, place: usize, work: Work) -> Checked<()> {
        self.waiting.remove(&(place, work));
        say!(self, "replica {place}: {work:?}");
        match work {
            Work::Scan => {
                let unsettled = self.folder_work(place, |running, folder, tree, _| folder.scan(running, tree))?;
                if unsettled == Some(true) {
                    self.folder_soon(place, AGAIN, Work::Scan);
                }
                if self.replicas[place].folder.as_ref().is_some_and(Folder::has_found) {
                    self.folder_soon(place, STEP, Work::Tell);
                }
                Ok(())
            }
            Work::Tell => {
                let told = self.folder_work(place, |running, folder, tree, now| folder.tell(running, tree, now))?;
                match told {
                    Some(true) => self.wake(place),
                    Some(false) => {}
                    // what was found is found again
                    None => self.folder_soon(place, RETRY, Work::Scan),
                }
                Ok(())
            }
            Work::TakeIn => {
                match self.folder_work(place, |running, folder, _, _| folder.take_in(running))? {
                    Some(true) => self.wake(place),
                    Some(false) => {}
                    None => self.folder_soon(place, RETRY, Work::TakeIn),
                }
                Ok(())
            }
            Work::Apply => self.folder_apply(place),
        }
    }

    fn wake(&mut self, place: usize) {
        self.replicas[place].retries = RETRIES;
        self.folder_soon(place, STEP, Work::Apply);
    }

    fn folder_apply(&mut self, place: usize) -> Checked<()> {
        let Some(folder) = &self.replicas[place].folder else { return Ok(()) };
        if !folder.has_operations() {
            self.folder_work(place, |running, folder, tree, now| folder.decide(running, tree, now))?;
            if self.replicas[place].folder.as_ref().is_some_and(Folder::has_operations) {
                self.folder_soon(place, STEP, Work::Apply);
            }
            return Ok(());
        }
        let most = 1 + usize::try_from(below(&mut self.folder_rng, OPERATIONS)).unwrap_or(0);
        let again = self.carry_out_operations(place, most, false)?;
        let Some(folder) = &self.replicas[place].folder else { return Ok(()) };
        if again == Some(true) || folder.has_operations() {
            self.folder_soon(place, STEP, Work::Apply);
        } else if self.replicas[place].retries > 0 {
            self.replicas[place].retries -= 1;
            self.folder_soon(place, RETRY, Work::Apply);
        }
        Ok(())
    }

    /// Carries out some operations, with chunks of whoever is connected, or of everybody.
    fn carry_out_operations(&mut self, place: usize, most: usize, all: bool) -> Checked<Option<bool>> {
        let peers: Vec<usize> = (0..self.replicas.len())
            .filter(|other| *other != place && (all || !self.links_between(place, *other).is_empty()))
            .collect();
        let lies = !all && chance(&mut self.folder_rng, 5);
        let group = self.group;
        // what is lent is put back: the others are only read from
        let mut taken = self.replicas[place].take_folder();
        let mut unreadable = Vec::new();
        let done = match &mut taken {
            Some((running, folder)) => {
                let replicas = &self.replicas;
                let mut fetch = |hash: &[u8; 32], len: u64| {
                    if lies {
                        return Some(vec![0; usize::try_from(len).unwrap_or(0)]);
                    }
                    peers.iter().find_map(|peer| {
                        let Replica { running: Some(other), tree, .. } = &replicas[*peer] else { return None };
                        match folder::read_chunk(other, tree, &group, hash, len) {
                            Ok(chunk) => chunk,
                            Err(error) => {
                                unreadable.push((*peer, error));
                                None
                            }
                        }
                    })
                };
                let (tree, now) = (&self.replicas[place].tree, self.timestamp(place));
                tree.set_now(self.now);
                let before = tree.contents();
                let author = running.author();
                let done = folder.carry_out(running, tree, now, most, &mut fetch);
                Some((done, before, author))
            }
            None => None,
        };
        self.replicas[place].put_folder(taken);
        for (peer, error) in unreadable {
            self.attempt::<()>(peer, Err(error))?;
        }
        match done {
            Some((done, before, author)) => self.after_folder_work(place, done, &before, author),
            None => Ok(None),
        }
    }

    /// Does something for a folder that is up, and takes in what came of it; none if it is down or a disk failed.
    fn folder_work<T>(
        &mut self,
        place: usize,
        work: impl FnOnce(&mut Running, &mut Folder, &Tree, sync_types::Timestamp) -> Result<T, StoreError>,
    ) -> Checked<Option<T>> {
        let now = self.timestamp(place);
        let Replica { running: Some(running), folder: Some(folder), tree, .. } = &mut self.replicas[place] else {
            return Ok(None);
        };
        tree.set_now(self.now);
        let (before, author) = (tree.contents(), running.author());
        let done = work(running, folder, tree, now);
        self.after_folder_work(place, done, &before, author)
    }

    fn after_folder_work<T>(
        &mut self,
        place: usize,
        done: Result<T, StoreError>,
        before: &BTreeSet<[u8; 32]>,
        author: sync_types::AuthorId,
    ) -> Checked<Option<T>> {
        let replica = &mut self.replicas[place];
        if replica.tree.is_dead() {
            replica.disk.cut_power();
        }
        let (mut told, mut look_again) = (Vec::new(), false);
        if let Some(folder) = &mut replica.folder {
            if let Some(broken) = folder.broken.take() {
                return Err(broken);
            }
            told = std::mem::take(&mut folder.told);
            look_again = std::mem::take(&mut folder.look_again);
        }
        replica.held.extend(told.iter().copied());
        let notes = replica.folder.as_mut().map(|folder| std::mem::take(&mut folder.notes)).unwrap_or_default();
        for note in notes {
            say!(self, "replica {place}: {note}");
        }
        self.check_nothing_is_lost(place, before, "sync removed it and kept it nowhere")?;
        let renewed = self.running(place).is_some_and(|running| running.author() != author);
        let outcome = self.attempt(place, done)?;
        if look_again {
            self.folder_soon(place, NOTICED, Work::Scan);
        }
        if renewed {
            self.recount(place)?;
        }
        if !told.is_empty() {
            self.note("told", &(told.len() as u64).to_le_bytes());
            self.changed(place)?;
        }
        Ok(outcome)
    }

    fn check_nothing_is_lost(&self, place: usize, before: &BTreeSet<[u8; 32]>, how: &str) -> Checked<()> {
        let tree = &self.replicas[place].tree;
        if let Some(content) = tree.overlooked() {
            let content = &data_encoding::HEXLOWER.encode(&content)[..8];
            let text = format!("replica {place} takes away content {content}, which it has never seen");
            return broken(NO_SILENT_OVERWRITE, text);
        }
        let (after, destroyed) = (tree.contents(), tree.destroyed());
        match before.iter().find(|content| !after.contains(*content) && !destroyed.contains(*content)) {
            Some(content) => {
                let content = &data_encoding::HEXLOWER.encode(content)[..8];
                broken(NO_SILENT_OVERWRITE, format!("content {content} lay at replica {place}, and {how}"))
            }
            None => Ok(()),
        }
    }

    /// The log of a replica may say something new.
    pub(super) fn folder_news(&mut self, place: usize) {
        self.folder_soon(place, STEP, Work::TakeIn);
    }

    /// A replica may have somebody to fetch from now.
    pub(super) fn folder_met(&mut self, place: usize) {
        if self.replicas[place].folder.is_some() {
            self.wake(place);
        }
    }

    /// A replica is up again, and its folder with it.
    pub(super) fn folder_start(&mut self, place: usize) -> Checked<()> {
        let Some(opened) = self.read(place, |running| Folder::open(running))? else { return Ok(()) };
        self.replicas[place].folder = opened;
        self.folder_soon(place, 1, Work::TakeIn);
        self.folder_soon(place, NOTICED, Work::Scan);
        self.wake(place);
        Ok(())
    }

    /// The power was cut: what of a folder was not synced may be gone, and nothing else.
    pub(super) fn folder_crash(&mut self, place: usize, survive: Survive) -> Checked<()> {
        if !self.with_folders || !self.replicas[place].tree.is_dead() {
            return Ok(());
        }
        let durable = self.replicas[place].tree.durable_contents();
        self.replicas[place].tree.restart(survive, &mut self.folder_rng);
        self.check_nothing_is_lost(place, &durable, "is gone after a crash, although it was durable")
    }

    /// Gives the folder a place.
    pub(super) fn folder_place(&mut self, place: usize) -> Checked<()> {
        if !self.with_folders || self.running(place).is_none() || self.replicas[place].folder.is_some() {
            return Ok(());
        }
        if self.operate(place, folder::settle)?.is_some() {
            self.folder_start(place)?;
        }
        Ok(())
    }

    /// A user does something.
    pub(super) fn folder_edit(&mut self, place: usize, edit: &Edit, after: Option<u64>, noticed: bool) -> Checked<()> {
        let flushed = chance(&mut self.folder_rng, 70);
        let Some(replica) = self.replicas.get_mut(place).filter(|replica| !replica.tree.is_dead()) else {
            return Ok(());
        };
        replica.tree.set_now(self.now);
        match after {
            Some(after) => replica.tree.edit_later(after, edit.clone()),
            None => {
                replica.tree.edit(edit, flushed);
                if noticed {
                    self.folder_soon(place, NOTICED, Work::Scan);
                }
            }
        }
        Ok(())
    }

    /// Looks at everything.
    pub(super) fn folder_scan(&mut self, place: usize) {
        if place < self.replicas.len() {
            self.folder_soon(place, 1, Work::Scan);
        }
    }

    // ---- what must hold in the end ----

    /// Users stop, and everybody syncs until nothing is left.
    pub(super) fn finish_folders(&mut self) -> Checked<()> {
        if !self.with_folders {
            return Ok(());
        }
        for place in self.places() {
            self.replicas[place].tree.heal();
            self.folder_place(place)?;
        }
        self.settle()?;
        for round in 0.. {
            let before = self.folder_progress();
            for place in self.places() {
                self.now += 2 * AGAIN;
                self.folder_rest(place)?;
            }
            self.meet()?;
            if self.folder_progress() == before {
                break;
            }
            if round == ROUNDS {
                return broken(CONVERGE, format!("folders do not come to rest within {ROUNDS} rounds"));
            }
        }
        self.check_folders()
    }

    fn folder_progress(&self) -> Vec<(usize, u64)> {
        let done = |replica: &Replica| replica.folder.as_ref().map_or(0, |folder| folder.done);
        self.replicas.iter().map(|replica| (replica.held.len(), done(replica))).collect()
    }

    /// Does everything that a device can do by itself.
    fn folder_rest(&mut self, place: usize) -> Checked<()> {
        self.folder_work(place, |running, folder, _, _| folder.take_in(running))?;
        self.folder_work(place, |running, folder, tree, _| folder.scan(running, tree))?;
        self.folder_work(place, |running, folder, tree, now| folder.tell(running, tree, now))?;
        for _ in 0..ROUNDS {
            if !self.replicas[place].folder.as_ref().is_some_and(Folder::has_operations) {
                self.folder_work(place, |running, folder, tree, now| folder.decide(running, tree, now))?;
            }
            let mut again = false;
            while self.replicas[place].folder.as_ref().is_some_and(Folder::has_operations) {
                again |= self.carry_out_operations(place, usize::MAX, true)? == Some(true);
            }
            if !again {
                break;
            }
        }
        Ok(())
    }

    fn check_folders(&mut self) -> Checked<()> {
        let places = self.places();
        let mut lies: BTreeSet<[u8; 32]> = BTreeSet::new();
        let mut first: Option<(usize, Shown, BTreeMap<Vec<u8>, Versions>)> = None;
        for &place in &places {
            lies.extend(self.replicas[place].tree.shown_contents());
            let replica = &self.replicas[place];
            if let (Some(folder), Some(running)) = (&replica.folder, &replica.running) {
                let listed = folder.listed_versions(running, &replica.tree);
                lies.extend(self.attempt(place, listed)?.unwrap_or_default());
            }
        }
        for &place in &places {
            let Some(folder) = &self.replicas[place].folder else { continue };
            let fid = folder.fid();
            let Some(index) =
                self.read(place, |running| running.db.read(|reader| reader.files_after(fid, None, usize::MAX)))?
            else {
                continue;
            };
            let mut said = BTreeMap::new();
            let mut waits = BTreeSet::new();
            for row in index {
                let Ok(versions) = rows::versions(Some(&row)) else {
                    return broken(CONVERGE, format!("replica {place} cannot read its index"));
                };
                let path = TreePath::from_key(&row.key);
                let gone = versions.winner().is_some_and(|winner| is_gone(&winner.node, &lies));
                if row.pending && !gone {
                    let text = format!("replica {place} never gets {path:?} right: {row:?} {versions:?}");
                    return broken(CONVERGE, text);
                }
                if gone {
                    waits.extend(path);
                }
                if versions != Versions::default() {
                    said.insert(row.key, versions);
                }
            }
            let mut shown = Shown::new();
            let tree = &self.replicas[place].tree;
            for (path, stat, target) in tree.walk() {
                if waits.contains(&path) {
                    continue;
                }
                let bytes = target.map(String::into_bytes).or_else(|| tree.read(&path)).unwrap_or_default();
                shown.insert(path, (stat.kind, stat.mode, *blake3::hash(&bytes).as_bytes()));
            }
            match &first {
                None => first = Some((place, shown, said)),
                Some((other, known, others)) => {
                    if said != *others {
                        let differs = said.iter().find(|(key, versions)| others.get(*key) != Some(versions));
                        let differs = differs.or_else(|| others.iter().find(|(key, _)| !said.contains_key(*key)));
                        let theirs = differs.and_then(|(key, _)| others.get(key));
                        let text = format!("the indexes of {place} and {other} differ: {differs:?} and {theirs:?}");
                        return broken(CONVERGE, text);
                    }
                    if shown != *known {
                        let ours = shown.iter().find(|(path, there)| known.get(*path) != Some(there));
                        let theirs = known.iter().find(|(path, there)| shown.get(*path) != Some(there));
                        let text = format!("the trees of {place} and {other} differ: {ours:?} and {theirs:?}");
                        return broken(CONVERGE, text);
                    }
                }
            }
        }
        self.check_edits(&lies)
    }

    /// What nobody superseded is in every tree, if it is anywhere.
    ///
    /// A version that lost lies where it was made until that device sets it aside. One whose disk went back is set aside
    /// by nobody: what others have of it is among their versions.
    fn check_edits(&mut self, lies: &BTreeSet<[u8; 32]>) -> Checked<()> {
        let authors: BTreeSet<_> =
            self.places().into_iter().filter_map(|place| Some(self.running(place)?.author())).collect();
        for place in self.places() {
            if self.replicas[place].folder.is_none() {
                continue;
            }
            let Some(said) = self.read(place, |running| Folder::everything_said(running))? else { continue };
            let mut by_path: BTreeMap<TreePath, Vec<Version>> = BTreeMap::new();
            for (path, version) in said {
                by_path.entry(path).or_default().push(version);
            }
            let tree = &self.replicas[place].tree;
            let shown: BTreeSet<[u8; 32]> =
                tree.walk().iter().filter_map(|(path, ..)| Some(*blake3::hash(&tree.read(path)?).as_bytes())).collect();
            for (path, versions) in &by_path {
                let mut row = Versions::default();
                for version in versions {
                    row.insert(version.clone());
                }
                if row.winner().is_some_and(|winner| is_gone(&winner.node, lies)) {
                    // nobody can be given what won, so nobody sets aside what lost
                    continue;
                }
                for version in versions {
                    let Node::File(file) = &version.node else { continue };
                    let superseded =
                        versions.iter().any(|other| other.dot != version.dot && other.vector.contains(version.dot));
                    let lost = !superseded && lies.contains(&file.hash) && !shown.contains(&file.hash);
                    if lost && authors.contains(&version.dot.author) {
                        let author = version.dot.author.short();
                        let text = format!(
                            "what {author} wrote at {path} was seen by no other edit, and replica {place} lacks it"
                        );
                        return broken(NO_SILENT_OVERWRITE, text);
                    }
                }
            }
        }
        Ok(())
    }

    /// A home was replaced by its backup, and perhaps what lay in the folder with it.
    pub(super) fn folder_restore(&mut self, place: usize) {
        let tree_too = chance(&mut self.folder_rng, 50);
        let replica = &mut self.replicas[place];
        if let Some(image) = replica.backup_tree().filter(|_| tree_too) {
            replica.tree.load(&image);
        }
    }
}
