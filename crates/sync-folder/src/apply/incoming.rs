//! Files that are being received: written in `.syncshell/tmp`, out of sight until they are whole.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use sync_types::folder::TreePath;

use super::{Applier, ApplyError, sys};
use crate::root::{Root, TMP_DIR};
use crate::versions::{own_dir, random_name};
use crate::walk::{Kind, Stat, stat_of};

/// How much is read at once to hash it.
const READ_BUFFER: u64 = 256 * 1024;

/// Bytes of a file after which the disk begins to be written to, so that the wait for it at the end is short.
const WRITE_BEHIND: u64 = 8 * 1024 * 1024;

/// Whether what was received is known to be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Every byte was checked when it was written.
    Done,
    /// All of it has this BLAKE3, and is read again to see that.
    Blake3([u8; 32]),
}

/// A file that is being received.
///
/// It stays when this is dropped, to be taken up again: see [`Applier::reopen`] and [`Incoming::discard`].
#[derive(Debug)]
pub struct Incoming {
    root: Arc<Root>,
    name: String,
    file: File,
    size: u64,
    behind: Mutex<Behind>,
}

/// What was written since the disk was last told to begin: how much, and where.
#[derive(Debug, Default)]
struct Behind {
    bytes: u64,
    from: u64,
    to: u64,
}

/// A file that was received as a whole and waits for its place; [`Applier::sync`] makes it durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    pub(super) name: String,
    pub(super) stat: Stat,
    pub(super) is_synced: bool,
}

impl Incoming {
    pub(super) fn create(root: &Arc<Root>, size: u64) -> Result<Self, ApplyError> {
        Self::create_as(root, random_name()?, size)
    }

    fn create_as(root: &Arc<Root>, name: String, size: u64) -> Result<Self, ApplyError> {
        let tmp = own_dir(root, TMP_DIR)?;
        let file = sys::create_file(&tmp, &name)?;
        if size > 0
            && let Err(error) = file.set_len(size)
        {
            tmp.remove_file(&name)?;
            return Err(error.into());
        }
        Ok(Self { root: root.clone(), name, file, size, behind: Mutex::default() })
    }

    pub(super) fn reopen(root: &Arc<Root>, name: &str) -> Result<Self, ApplyError> {
        check_name(name)?;
        let tmp = own_dir(root, TMP_DIR)?;
        let file = match sys::open_entry(&tmp, name, Kind::File, true) {
            Err(ApplyError::Denied) => {
                // It was finished with bits that forbid writing, and the program ended before it had its place.
                let sys::There::Entry(stat) = sys::look(&tmp, name)? else { return Err(ApplyError::Missing) };
                sys::set_meta_closed(&tmp, name, &stat, 0o600, None)?;
                sys::open_entry(&tmp, name, Kind::File, true)?
            }
            other => other?,
        };
        let size = file.metadata()?.len();
        Ok(Self { root: root.clone(), name: name.to_owned(), file, size, behind: Mutex::default() })
    }

    /// Its name, by which it is taken up again after a crash.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes it will have.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes a piece; what is never written stays a hole.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), ApplyError> {
        self.check_range(offset, bytes.len() as u64)?;
        sys::write_at(&self.file, bytes, offset)?;
        self.write_behind(offset, bytes.len() as u64);
        Ok(())
    }

    fn write_behind(&self, offset: u64, len: u64) {
        let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        behind.from = if behind.bytes == 0 { offset } else { behind.from.min(offset) };
        behind.to = behind.to.max(offset + len);
        behind.bytes += len;
        if behind.bytes >= WRITE_BEHIND {
            let Behind { from, to, .. } = std::mem::take(&mut *behind);
            sys::begin_write_back(&self.file, from, to);
        }
    }

    /// Copies a piece of a file of the folder, sharing its blocks where the file system can.
    ///
    /// That file may change meanwhile: what came is to be checked, with [`Incoming::holds`] or at the end.
    pub fn copy_from(&self, path: &TreePath, offset: u64, len: u64, to: u64) -> Result<(), ApplyError> {
        self.check_range(to, len)?;
        let parent = super::open_parent(&self.root, path)?;
        let from = sys::open_entry(&parent, path.name(), Kind::File, false)?;
        if sys::copy_range(&from, offset, &self.file, to, len)? == len { Ok(()) } else { Err(ApplyError::Changed) }
    }

    pub(super) fn fill_from(&self, from: &File) -> Result<(), ApplyError> {
        let copied = sys::copy_range(from, 0, &self.file, 0, self.size)?;
        if copied == self.size { Ok(()) } else { Err(ApplyError::Changed) }
    }

    /// Whether a piece of it is there and has this BLAKE3: after a crash, or after a copy.
    pub fn holds(&self, offset: u64, len: u64, hash: &[u8; 32]) -> Result<bool, ApplyError> {
        self.check_range(offset, len)?;
        Ok(self.hash(offset, len)? == *hash)
    }

    /// Checks it, and gives it permission bits and time.
    ///
    /// # Errors
    /// [`ApplyError::Mismatch`] if it is not what was announced; then it is gone.
    pub fn finish(self, check: Check, mode: u32, mtime: i64) -> Result<Ready, ApplyError> {
        if let Check::Blake3(hash) = check
            && self.hash(0, self.size)? != hash
        {
            self.discard()?;
            return Err(ApplyError::Mismatch);
        }
        sys::set_mode(&self.file, mode)?;
        sys::set_mtime(&self.file, mtime)?;
        // What its owner may not read cannot be opened again to be synced with others.
        let is_synced = mode & 0o400 == 0;
        if is_synced {
            sys::sync_file(&self.file, true)?;
        }
        let stat = stat_of(&self.file)?.ok_or(ApplyError::Changed)?;
        if stat.size != self.size {
            return Err(ApplyError::Mismatch);
        }
        Ok(Ready { name: self.name, stat, is_synced })
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), ApplyError> {
        drop(self.file);
        Ok(own_dir(&self.root, TMP_DIR)?.remove_file(&self.name)?)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), ApplyError> {
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        if is_inside { Ok(()) } else { Err(ApplyError::Mismatch) }
    }

    fn hash(&self, offset: u64, len: u64) -> Result<[u8; 32], ApplyError> {
        let mut hasher = blake3::Hasher::new();
        let mut range = Range { file: &self.file, at: offset, end: offset + len };
        let mut buffer = vec![0; usize::try_from(READ_BUFFER.min(len)).unwrap_or_default()];
        loop {
            match range.read(&mut buffer)? {
                0 => return Ok(*hasher.finalize().as_bytes()),
                read => hasher.update(&buffer[..read]),
            };
        }
    }
}

impl Ready {
    /// What it will be at its path.
    #[must_use]
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// Its name while it waits.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Applier {
    /// Begins to receive a file under a name of 32 hex digits, or takes up again what was being received under it;
    /// which pieces are there, [`Incoming::holds`] says.
    pub fn receive_as(&self, name: &str, size: u64) -> Result<Incoming, ApplyError> {
        check_name(name)?;
        match Incoming::reopen(self.root(), name) {
            Ok(incoming) if incoming.size == size => Ok(incoming),
            Ok(incoming) => {
                incoming.discard()?;
                Incoming::create_as(self.root(), name.to_owned(), size)
            }
            Err(ApplyError::Missing) => Incoming::create_as(self.root(), name.to_owned(), size),
            Err(error) => Err(error),
        }
    }

    /// Names of what was being received when the program ended.
    pub fn incoming_names(&self) -> Result<Vec<String>, ApplyError> {
        let mut names = Vec::new();
        for entry in own_dir(self.root(), TMP_DIR)?.read_dir(".")? {
            names.extend(entry?.file_name().into_string().ok().filter(|name| check_name(name).is_ok()));
        }
        Ok(names)
    }

    /// Removes what was being received and is not going to be taken up again; says how many those were.
    pub fn clear_stale(&self, keep: &BTreeSet<String>) -> Result<usize, ApplyError> {
        let tmp = own_dir(self.root(), TMP_DIR)?;
        let mut removed = 0;
        for name in self.incoming_names()?.iter().filter(|name| !keep.contains(*name)) {
            tmp.remove_file(name)?;
            removed += 1;
        }
        Ok(removed)
    }
}

/// Only names of this module's making are looked for.
fn check_name(name: &str) -> Result<(), ApplyError> {
    let is_ours = name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_ours { Ok(()) } else { Err(ApplyError::Missing) }
}

/// A part of a file, read without moving its cursor.
struct Range<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let read = sys::read_at(self.file, &mut buffer[..most], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
