//! Changes a folder so that nothing is lost: every operation says what it expects to find, and touches nothing else.
//!
//! A file is received beside ([`Incoming`]), made durable with others ([`Applier::sync`]) and put in its place
//! ([`Applier::place`]); what lay there is kept ([`crate::versions`]). Between any two system calls the program may be
//! killed: the path then holds the old or the new content as a whole, and the old one is there or among the versions.
//!
//! No directory stays open between operations. A handle would follow its directory to wherever the user moves it, out
//! of the folder too; and where the kernel resolves a whole path at once, opening costs less than looking up a cache.

mod error;
mod incoming;
pub(crate) mod sys;
#[cfg(all(test, unix))]
mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cap_std::fs::Dir;
use sync_types::folder::{OWN_DIR, TreePath};

pub use self::error::ApplyError;
pub use self::incoming::{Check, Incoming, Ready};
use self::sys::There;
use crate::root::{Root, TMP_DIR, VERSIONS_DIR};
use crate::versions::{Kept, Slot, Versions, own_dir, random_name};
use crate::walk::{Kind, Stat, stat_of};

/// Up to so many files or directories are synced one by one, each for a commit of the file system's journal; above, one
/// call for all of the file system takes less time, though it waits for what other programs wrote too.
const SYNC_EACH: usize = 4;
/// The share of a disk that stays free: one part in so many.
const RESERVE: u64 = 100;

/// What the caller knows to lie at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "something lies there or it does not")]
pub enum Expected {
    /// Nothing.
    Nothing,
    /// This, and unchanged: of a directory it has to be the same one, of anything else size and time count too.
    This(Stat),
}

/// Something is in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// What lies there now.
    pub stat: Stat,
    /// What lay there before.
    pub kept: Option<Kept>,
}

/// Changes one folder; operations on different paths may run at the same time.
#[derive(Debug)]
pub struct Applier {
    root: Arc<Root>,
    versions: Versions,
    /// Directories with names that may not be durable yet, as paths from the root.
    touched: Mutex<BTreeSet<String>>,
    /// Whether the system's moves in one step are used; tests try what happens without.
    in_one_step: bool,
}

impl Applier {
    /// Changes the folder of an open root.
    #[must_use]
    pub fn new(root: Arc<Root>) -> Self {
        Self { versions: Versions::new(root.clone()), root, touched: Mutex::default(), in_one_step: true }
    }

    /// The folder's root.
    #[must_use]
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// What was replaced or removed.
    #[must_use]
    pub fn versions(&self) -> &Versions {
        &self.versions
    }

    /// Whether so many bytes more leave one part in a hundred of the disk free.
    ///
    /// # Errors
    /// [`ApplyError::DiskFull`] if they do not.
    pub fn room(&self, need: u64) -> Result<(), ApplyError> {
        match self.root.free_space() {
            Some((free, total)) if free < need.saturating_add(total / RESERVE) => Err(ApplyError::DiskFull),
            _ => Ok(()),
        }
    }

    /// Begins to receive a file of so many bytes.
    pub fn receive(&self, size: u64) -> Result<Incoming, ApplyError> {
        Incoming::create(&self.root, size)
    }

    /// Takes up again what was being received when the program ended; which pieces are there, [`Incoming::holds`] says.
    pub fn reopen(&self, name: &str) -> Result<Incoming, ApplyError> {
        Incoming::reopen(&self.root, name)
    }

    /// Makes the content of received files durable.
    pub fn sync(&self, ready: &[Ready]) -> Result<(), ApplyError> {
        let names: Vec<_> = ready.iter().filter(|ready| !ready.is_synced).map(Ready::name).collect();
        if names.len() > SYNC_EACH && sys::sync_all(self.root.dir())? {
            return Ok(());
        }
        let tmp = own_dir(&self.root, TMP_DIR)?;
        for (index, name) in names.iter().enumerate() {
            let file = sys::open_entry(&tmp, name, Kind::File, cfg!(windows))?;
            sys::sync_file(&file, index + 1 == names.len())?;
        }
        Ok(())
    }

    /// Puts a received file in its place, and keeps what lay there.
    ///
    /// # Errors
    /// [`ApplyError::Changed`] if what lies there is not what was expected, [`ApplyError::NotEmpty`] if that is a
    /// directory; the file goes on waiting.
    pub fn place(&self, ready: &Ready, path: &TreePath, expected: Expected) -> Result<Placed, ApplyError> {
        let kept = self.put(&ready.name, &ready.stat, path, expected)?;
        Ok(Placed { stat: ready.stat, kept })
    }

    /// Puts a symbolic link at a path; its text may lead anywhere, for nothing here follows it.
    ///
    /// # Errors
    /// Those of [`Applier::place`], and [`ApplyError::Unsupported`] where this user or file system cannot have links.
    pub fn make_link(&self, path: &TreePath, target: &str, expected: Expected) -> Result<Placed, ApplyError> {
        let (tmp, name) = (own_dir(&self.root, TMP_DIR)?, random_name()?);
        sys::make_link(&tmp, &name, target)?;
        let There::Entry(stat) = sys::look(&tmp, &name)? else { return Err(ApplyError::Changed) };
        match self.put(&name, &stat, path, expected) {
            Ok(kept) => Ok(Placed { stat, kept }),
            Err(error) => {
                tmp.remove_file(&name)?;
                Err(error)
            }
        }
    }

    /// Takes a file or a link away and keeps it; nothing is there already where nothing is returned.
    pub fn remove(&self, path: &TreePath, expected: &Stat) -> Result<Option<Kept>, ApplyError> {
        let parent = match self.parent(path) {
            Err(ApplyError::Missing) => return Ok(None),
            other => other?,
        };
        match sys::look(&parent, path.name())? {
            There::Nothing => return Ok(None),
            There::Entry(Stat { kind: Kind::Directory, .. }) => return Err(ApplyError::NotEmpty),
            There::Entry(stat) if is_same(expected, &stat) => {}
            _ => return Err(ApplyError::Changed),
        }
        let slot = self.slot()?;
        match parent.rename(path.name(), &slot.dir, &slot.name).map_err(ApplyError::from) {
            Err(ApplyError::Missing) => return Ok(None),
            other => other?,
        }
        self.touch_parent(path);
        self.settle_removal(&parent, path.name(), expected, &slot)
    }

    /// What was taken away stays so if it is what was expected, and goes back if it is not.
    fn settle_removal(
        &self,
        parent: &Dir,
        name: &str,
        expected: &Stat,
        slot: &Slot,
    ) -> Result<Option<Kept>, ApplyError> {
        match sys::look(&slot.dir, &slot.name)? {
            There::Entry(stat) if is_same(expected, &stat) => Ok(Some(slot.kept(&stat))),
            There::Entry(stat) => match self.rename_new(&slot.dir, &slot.name, parent, name) {
                Ok(()) => Err(ApplyError::Changed),
                // Its name was taken meanwhile; it stays with the versions.
                Err(ApplyError::Changed) => Ok(Some(slot.kept(&stat))),
                Err(error) => Err(error),
            },
            There::Special | There::Nothing => Err(ApplyError::Changed),
        }
    }

    /// Takes away a directory that holds nothing.
    ///
    /// # Errors
    /// [`ApplyError::NotEmpty`] if it holds something, [`ApplyError::Changed`] if it is no directory.
    pub fn remove_dir(&self, path: &TreePath) -> Result<(), ApplyError> {
        match self.parent(path).and_then(|parent| Ok(parent.remove_dir(path.name())?)) {
            Ok(()) => {}
            Err(ApplyError::Missing) => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut touched = self.touched();
        touched.remove(path.as_str());
        touched.insert(parent_of(path));
        Ok(())
    }

    /// Makes a directory and those above it; one that is there already stays as it is.
    ///
    /// What is to come into it needs the right to write there: a mode that forbids it is set last, with
    /// [`Applier::set_meta`].
    pub fn make_dir(&self, path: &TreePath, mode: u32) -> Result<Stat, ApplyError> {
        let parent = match (self.parent(path), path.parent()) {
            (Err(ApplyError::Missing), Some(above)) => {
                self.make_plain_dir(&above)?;
                self.parent(path)?
            }
            (other, _) => other?,
        };
        match sys::make_dir(&parent, path.name(), mode) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return dir_at(&parent, path.name()),
            Err(error) => return Err(error.into()),
        }
        self.touch_parent(path);
        let dir = sys::open_entry(&parent, path.name(), Kind::Directory, false)?;
        sys::set_mode(&dir, mode)?;
        stat_of(&dir)?.ok_or(ApplyError::Changed)
    }

    /// Sets permission bits, and the time if there is one, of what lies at a path.
    pub fn set_meta(
        &self,
        path: &TreePath,
        expected: &Stat,
        mode: u32,
        mtime: Option<i64>,
    ) -> Result<Stat, ApplyError> {
        let (parent, name) = (self.parent(path)?, path.name());
        expect(&parent, name, expected)?;
        let opened = match expected.kind {
            Kind::Symlink => Err(ApplyError::Denied),
            kind => sys::open_entry(&parent, name, kind, cfg!(windows)),
        };
        match opened {
            Ok(file) => {
                if !stat_of(&file)?.is_some_and(|found| is_same(expected, &found)) {
                    return Err(ApplyError::Changed);
                }
                sys::set_mode(&file, mode)?;
                if let Some(mtime) = mtime {
                    sys::set_mtime(&file, mtime)?;
                }
            }
            Err(ApplyError::Denied) => sys::set_meta_closed(&parent, name, expected, mode, mtime)?,
            Err(error) => return Err(error),
        }
        // The journal that makes its directory durable holds its bits and its time too.
        self.touch_parent(path);
        match sys::look(&parent, name)? {
            // The size is the expected one: what was written meanwhile is to be noticed.
            There::Entry(stat) if stat.ino == expected.ino => Ok(Stat { size: expected.size, ..stat }),
            _ => Err(ApplyError::Changed),
        }
    }

    /// Moves a file, a link or a directory with all it holds to a path where nothing is.
    pub fn rename(&self, from: &TreePath, expected: &Stat, to: &TreePath) -> Result<Stat, ApplyError> {
        if to.is_below(from) {
            return Err(ApplyError::Unsupported("a directory cannot be moved into itself"));
        }
        let (old, new) = (self.parent(from)?, self.parent(to)?);
        expect(&old, from.name(), expected)?;
        match self.rename_in_one_step(&old, from.name(), &new, to.name()) {
            Ok(()) => {}
            Err(error) if is_no_such_move(&error) => {
                self.rename_in_two(&old, from.name(), expected, &new, to.name())?
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Where case does not count, a new spelling of a name exists already, as the old one.
                if !sys::is_one_entry(&old, from.name(), &new, to.name())? {
                    return Err(ApplyError::Changed);
                }
                old.rename(from.name(), &new, to.name())?;
            }
            Err(error) => return Err(error.into()),
        }
        self.touch_moved(from, to);
        self.settle_move(&old, from.name(), expected, &new, to.name())
    }

    /// What was moved stays so if it is what was expected, and goes back if it is not.
    fn settle_move(&self, old: &Dir, from: &str, expected: &Stat, new: &Dir, to: &str) -> Result<Stat, ApplyError> {
        match sys::look(new, to)? {
            There::Entry(stat) if is_same(expected, &stat) => Ok(stat),
            There::Nothing => Err(ApplyError::Changed),
            _ => match self.rename_new(new, to, old, from) {
                // If its old name was taken meanwhile it stays in the folder under the new one.
                Ok(()) | Err(ApplyError::Changed) => Err(ApplyError::Changed),
                Err(error) => Err(error),
            },
        }
    }

    /// Makes the names in all directories durable in which something was changed since the last call.
    pub fn sync_dirs(&self) -> Result<(), ApplyError> {
        let touched = std::mem::take(&mut *self.touched());
        let synced = self.sync_each_dir(&touched);
        if synced.is_err() {
            self.touched().extend(touched);
        }
        synced
    }

    fn sync_each_dir(&self, touched: &BTreeSet<String>) -> Result<(), ApplyError> {
        if touched.len() > SYNC_EACH && sys::sync_all(self.root.dir())? {
            return Ok(());
        }
        for (index, path) in touched.iter().enumerate() {
            let is_last = index + 1 == touched.len();
            match sys::open_dir(self.root.dir(), path).and_then(|dir| Ok(sys::sync_dir(&dir, is_last)?)) {
                Ok(()) => {}
                // It was moved away or may not be read. What came into it is on the same disk all the same.
                Err(ApplyError::Missing | ApplyError::Changed | ApplyError::Escape | ApplyError::Denied) => {
                    sys::sync_all(self.root.dir())?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copies a kept version back to a path of the folder; it stays kept.
    pub fn restore(&self, name: &str, path: &TreePath, expected: Expected) -> Result<Placed, ApplyError> {
        let kept = self.versions.get(name)?;
        if kept.kind == Kind::Symlink {
            let target = kept.target.ok_or(ApplyError::Unsupported("the link's text is no text"))?;
            return self.make_link(path, &target, expected);
        }
        let from = self.versions.open(name)?;
        self.room(kept.size)?;
        let incoming = self.receive(kept.size)?;
        if let Err(error) = incoming.fill_from(&from) {
            incoming.discard()?;
            return Err(error);
        }
        let ready = incoming.finish(Check::Done, kept.mode, kept.mtime)?;
        let placed = self.sync(std::slice::from_ref(&ready)).and_then(|()| self.place(&ready, path, expected));
        if placed.is_err() {
            self.discard(&ready)?;
        }
        placed
    }

    /// Removes a received file that is not going to get a place.
    pub fn discard(&self, ready: &Ready) -> Result<(), ApplyError> {
        Ok(own_dir(&self.root, TMP_DIR)?.remove_file(&ready.name)?)
    }

    /// Opens a received file for reading.
    pub fn open(&self, ready: &Ready) -> Result<File, ApplyError> {
        sys::open_entry(&own_dir(&self.root, TMP_DIR)?, &ready.name, Kind::File, false)
    }

    /// Keeps a received file that is not going to get a place among the versions.
    pub fn keep(&self, ready: &Ready) -> Result<Kept, ApplyError> {
        let slot = self.slot()?;
        own_dir(&self.root, TMP_DIR)?.rename(&ready.name, &slot.dir, &slot.name)?;
        Ok(slot.kept(&ready.stat))
    }

    fn put(&self, name: &str, new: &Stat, path: &TreePath, expected: Expected) -> Result<Option<Kept>, ApplyError> {
        let (tmp, parent) = (own_dir(&self.root, TMP_DIR)?, self.parent(path)?);
        let kept = match expected {
            Expected::Nothing => self.rename_new(&tmp, name, &parent, path.name()).map(|()| None)?,
            Expected::This(Stat { kind: Kind::Directory, .. }) => return Err(ApplyError::NotEmpty),
            Expected::This(old) => Some(self.replace(&tmp, name, new, &parent, path.name(), &old)?),
        };
        self.touch_parent(path);
        Ok(kept)
    }

    /// The new one goes where the old one is to be kept, and then both change places: in one step the old one is kept.
    fn replace(
        &self,
        tmp: &Dir,
        name: &str,
        new: &Stat,
        parent: &Dir,
        at: &str,
        old: &Stat,
    ) -> Result<Kept, ApplyError> {
        expect(parent, at, old)?;
        let slot = self.slot()?;
        tmp.rename(name, &slot.dir, &slot.name)?;
        let back = |error| {
            slot.dir.rename(&slot.name, tmp, name)?;
            Err(error)
        };
        match self.exchange(&slot, parent, at) {
            Ok(()) => match self.settle_exchange(&slot, new, parent, at, old)? {
                Settled::Kept(kept) => Ok(kept),
                Settled::SwappedBack => back(ApplyError::Changed),
                Settled::Overtaken => Err(ApplyError::Changed),
            },
            Err(error) if is_no_such_move(&error) => {
                slot.dir.rename(&slot.name, tmp, name)?;
                self.replace_in_two(tmp, name, parent, at, old, &slot)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => back(ApplyError::Changed),
            Err(error) => back(error.into()),
        }
    }

    /// Looks at what came out: if it is not what was expected, a writer was faster, and it goes back.
    fn settle_exchange(
        &self,
        slot: &Slot,
        new: &Stat,
        parent: &Dir,
        at: &str,
        old: &Stat,
    ) -> Result<Settled, ApplyError> {
        match sys::look(&slot.dir, &slot.name)? {
            There::Entry(stat) if is_same(old, &stat) => Ok(Settled::Kept(slot.kept(&stat))),
            _ if matches!(sys::look(parent, at)?, There::Entry(stat) if is_same(new, &stat)) => {
                self.exchange(slot, parent, at)?;
                Ok(Settled::SwappedBack)
            }
            // Something newer lies there already: it stays, and so does what came out, among the versions.
            _ => Ok(Settled::Overtaken),
        }
    }

    /// Where two names cannot change places: after a crash in between nothing lies at the path, and the old one is kept.
    fn replace_in_two(
        &self,
        tmp: &Dir,
        name: &str,
        parent: &Dir,
        at: &str,
        old: &Stat,
        slot: &Slot,
    ) -> Result<Kept, ApplyError> {
        parent.rename(at, &slot.dir, &slot.name)?;
        let kept = self.settle_removal(parent, at, old, slot)?.ok_or(ApplyError::Changed)?;
        match self.rename_new(tmp, name, parent, at) {
            Ok(()) => Ok(kept),
            Err(error) => {
                // Only what took the name meanwhile can refuse it now, and the old one is kept then.
                match self.rename_new(&slot.dir, &slot.name, parent, at) {
                    Ok(()) | Err(ApplyError::Changed) => Err(error),
                    Err(worse) => Err(worse),
                }
            }
        }
    }

    /// Moves what is ours to a name that nothing has.
    fn rename_new(&self, from: &Dir, old: &str, to: &Dir, new: &str) -> Result<(), ApplyError> {
        match self.rename_in_one_step(from, old, to, new) {
            Err(error) if is_no_such_move(&error) => {}
            other => return Ok(other?),
        }
        match from.hard_link(old, to, new) {
            Ok(()) => Ok(from.remove_file(old)?),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(ApplyError::Changed),
            Err(_) => rename_checked(from, old, to, new),
        }
    }

    /// Moves what is not ours to a name that nothing has: what takes the old name meanwhile is not removed for it.
    fn rename_in_two(&self, old: &Dir, from: &str, expected: &Stat, new: &Dir, to: &str) -> Result<(), ApplyError> {
        if expected.kind == Kind::Directory {
            return rename_checked(old, from, new, to);
        }
        match old.hard_link(from, new, to) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(ApplyError::Changed),
            Err(_) => return rename_checked(old, from, new, to),
        }
        let slot = self.slot()?;
        old.rename(from, &slot.dir, &slot.name)?;
        self.settle_removal(old, from, expected, &slot)?;
        // Only a second name of what lies at the new one now; anything else stays with the versions.
        match sys::look(&slot.dir, &slot.name)? {
            There::Entry(stat) if is_same(expected, &stat) => Ok(slot.dir.remove_file(&slot.name)?),
            _ => Ok(()),
        }
    }

    fn rename_in_one_step(&self, from: &Dir, old: &str, to: &Dir, new: &str) -> io::Result<()> {
        if self.in_one_step { sys::rename_new(from, old, to, new) } else { Err(ErrorKind::Unsupported.into()) }
    }

    fn exchange(&self, slot: &Slot, parent: &Dir, at: &str) -> io::Result<()> {
        if !self.in_one_step {
            return Err(ErrorKind::Unsupported.into());
        }
        sys::exchange(&slot.dir, &slot.name, parent, at)
    }

    fn make_plain_dir(&self, path: &TreePath) -> Result<(), ApplyError> {
        let missing: Vec<_> = std::iter::successors(Some(path.clone()), TreePath::parent)
            .take_while(|path| matches!(sys::open_dir(self.root.dir(), path.as_str()), Err(ApplyError::Missing)))
            .collect();
        for path in missing.iter().rev() {
            match self.parent(path)?.create_dir(path.name()) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
                _ => self.touch_parent(path),
            }
        }
        Ok(())
    }

    fn parent(&self, path: &TreePath) -> Result<Dir, ApplyError> {
        open_parent(&self.root, path)
    }

    fn slot(&self) -> Result<Slot, ApplyError> {
        let slot = self.versions.slot()?;
        let mut touched = self.touched();
        if slot.is_new {
            touched.insert(format!("{OWN_DIR}/{VERSIONS_DIR}"));
        }
        touched.insert(format!("{OWN_DIR}/{VERSIONS_DIR}/{}", slot.month));
        drop(touched);
        Ok(slot)
    }

    fn touch_parent(&self, path: &TreePath) {
        self.touched().insert(parent_of(path));
    }

    /// Directories below what was moved are found under the new name from now on.
    fn touch_moved(&self, from: &TreePath, to: &TreePath) {
        let mut touched = self.touched();
        let moved =
            touched.iter().filter_map(|path| Some((path.clone(), path.strip_prefix(from.as_str())?.to_owned())));
        let moved: Vec<_> = moved.filter(|(_, rest)| rest.is_empty() || rest.starts_with('/')).collect();
        for (path, rest) in moved {
            touched.remove(&path);
            touched.insert(format!("{to}{rest}"));
        }
        touched.insert(parent_of(from));
        touched.insert(parent_of(to));
    }

    fn touched(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How an exchange ended.
enum Settled {
    /// What came out is what was expected.
    Kept(Kept),
    /// It was something else, and lies where it lay.
    SwappedBack,
    /// It was something else, and something newer lies in its place.
    Overtaken,
}

fn parent_of(path: &TreePath) -> String {
    path.parent().map_or_else(String::new, |parent| parent.as_str().to_owned())
}

fn open_parent(root: &Root, path: &TreePath) -> Result<Dir, ApplyError> {
    sys::open_dir(root.dir(), &parent_of(path))
}

fn dir_at(parent: &Dir, name: &str) -> Result<Stat, ApplyError> {
    match sys::look(parent, name)? {
        There::Entry(stat) if stat.kind == Kind::Directory => Ok(stat),
        _ => Err(ApplyError::Changed),
    }
}

fn expect(parent: &Dir, name: &str, expected: &Stat) -> Result<(), ApplyError> {
    match sys::look(parent, name)? {
        There::Entry(stat) if is_same(expected, &stat) => Ok(()),
        _ => Err(ApplyError::Changed),
    }
}

/// A directory is the same whatever was put into it; its size and time are not its own.
fn is_same(expected: &Stat, found: &Stat) -> bool {
    match (expected.kind, found.kind) {
        (Kind::Directory, Kind::Directory) => expected.ino == found.ino,
        // a mode that was set meanwhile is a change that is to be told first
        (Kind::File, Kind::File) => expected.is_unchanged(found) && (cfg!(not(unix)) || expected.mode == found.mode),
        _ => expected.is_unchanged(found),
    }
}

/// The last resort where a file system knows neither moves without replacing nor second names: looks, then moves.
fn rename_checked(from: &Dir, old: &str, to: &Dir, new: &str) -> Result<(), ApplyError> {
    match sys::look(to, new)? {
        There::Nothing => Ok(from.rename(old, to, new)?),
        _ => Err(ApplyError::Changed),
    }
}

/// Whether an error says that the file system, or the system, does not know the kind of move.
fn is_no_such_move(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput)
}
