//! A disk in memory that forgets what was not synced, as an SQLite VFS.
//!
//! What SQLite writes is visible at once and durable only after `xSync`.
//! When the power fails, any subset of the sectors written since then may have reached the disk.
//! Faults are injected at the n-th operation that changes the disk; a disk whose power was cut answers nothing.
//!
//! One connection at a time: there are no locks and no shared memory, so a database is opened with
//! [`sync_store::DbOptions::exclusive`].

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand_core::Rng;
use rusqlite::ffi;

/// Bytes the disk writes whole or not at all.
const SECTOR: usize = 512;
/// The same as SQLite is told.
const SECTOR_SIZE: c_int = 512;

/// What happens at the n-th operation that changes the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails, and the next one works again.
    IoError,
    /// The power is cut before it: nothing works until [`Disk::restart`].
    PowerCut,
}

/// What is left of unsynced changes after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survive {
    /// Everything: only the process was killed.
    Everything,
    /// Nothing.
    Nothing,
    /// Some sectors, drawn at random.
    Some,
}

/// The files of a disk as they could be copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image(BTreeMap<String, Vec<u8>>);

#[derive(Debug)]
enum Change {
    Write { at: usize, bytes: Vec<u8> },
    Truncate(usize),
}

#[derive(Debug, Default)]
struct Inode {
    visible: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
    handles: u32,
    linked: bool,
}

fn write_at(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    let end = at + new.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(new);
}

impl Inode {
    fn sync(&mut self) {
        for change in self.unsynced.drain(..) {
            match change {
                Change::Write { at, bytes } => write_at(&mut self.durable, at, &bytes),
                Change::Truncate(len) => self.durable.resize(len, 0),
            }
        }
    }

    /// Keeps some of what was not synced, sector by sector.
    fn tear(&mut self, rng: &mut impl Rng) {
        for change in self.unsynced.drain(..) {
            match change {
                Change::Truncate(len) => {
                    if flip(rng) {
                        self.durable.resize(len, 0);
                    }
                }
                Change::Write { mut at, bytes } => {
                    let mut rest = &bytes[..];
                    while !rest.is_empty() {
                        let (sector, after) = rest.split_at(rest.len().min(SECTOR - at % SECTOR));
                        if flip(rng) {
                            write_at(&mut self.durable, at, sector);
                        }
                        at += sector.len();
                        rest = after;
                    }
                }
            }
        }
    }
}

fn flip(rng: &mut impl Rng) -> bool {
    rng.next_u32() & 1 == 1
}

#[derive(Debug, Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    /// Names made since the last sync of any file; the directory is one file.
    fresh: BTreeSet<String>,
    next: u64,
    operations: u64,
    fault: Option<(u64, Fault)>,
    room: Option<usize>,
    dead: bool,
    /// Says yes to a sync and does nothing: what a test of this disk must notice.
    forgets_syncs: bool,
}

impl State {
    fn used(&self) -> usize {
        self.inodes.values().map(|inode| inode.visible.len()).sum()
    }

    /// Counts an operation that changes the disk, or makes it fail.
    fn operate(&mut self) -> Result<(), c_int> {
        if self.dead {
            return Err(ffi::SQLITE_IOERR);
        }
        self.operations += 1;
        match &mut self.fault {
            Some((0, fault)) => {
                self.dead = *fault == Fault::PowerCut;
                self.fault = None;
                Err(ffi::SQLITE_IOERR)
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn open(&mut self, name: Option<String>, create: bool) -> Result<u64, c_int> {
        if self.dead {
            return Err(ffi::SQLITE_CANTOPEN);
        }
        let known = name.as_ref().and_then(|name| self.names.get(name)).copied();
        let id = match known {
            Some(id) => id,
            None if !create => return Err(ffi::SQLITE_CANTOPEN),
            None => {
                self.operate()?;
                self.next += 1;
                let inode = Inode { linked: name.is_some(), ..Inode::default() };
                self.inodes.insert(self.next, inode);
                if let Some(name) = name {
                    self.names.insert(name.clone(), self.next);
                    self.fresh.insert(name);
                }
                self.next
            }
        };
        self.inode(id)?.handles += 1;
        Ok(id)
    }

    fn inode(&mut self, id: u64) -> Result<&mut Inode, c_int> {
        self.inodes.get_mut(&id).ok_or(ffi::SQLITE_IOERR)
    }

    fn close(&mut self, id: u64) {
        if let Some(inode) = self.inodes.get_mut(&id) {
            inode.handles -= 1;
            if inode.handles == 0 && !inode.linked {
                self.inodes.remove(&id);
            }
        }
    }

    fn read(&mut self, id: u64, at: usize, into: &mut [u8]) -> Result<(), c_int> {
        if self.dead {
            return Err(ffi::SQLITE_IOERR_READ);
        }
        let visible = &self.inode(id)?.visible;
        let found = visible.get(at..).unwrap_or_default();
        let len = found.len().min(into.len());
        into[..len].copy_from_slice(&found[..len]);
        into[len..].fill(0);
        if len < into.len() { Err(ffi::SQLITE_IOERR_SHORT_READ) } else { Ok(()) }
    }

    fn write(&mut self, id: u64, at: usize, bytes: &[u8]) -> Result<(), c_int> {
        self.operate()?;
        if let Some(room) = self.room {
            let grows = (at + bytes.len()).saturating_sub(self.inode(id)?.visible.len());
            if self.used() + grows > room {
                return Err(ffi::SQLITE_FULL);
            }
        }
        let inode = self.inode(id)?;
        write_at(&mut inode.visible, at, bytes);
        inode.unsynced.push(Change::Write { at, bytes: bytes.to_vec() });
        Ok(())
    }

    fn truncate(&mut self, id: u64, len: usize) -> Result<(), c_int> {
        self.operate()?;
        let inode = self.inode(id)?;
        inode.visible.resize(len, 0);
        inode.unsynced.push(Change::Truncate(len));
        Ok(())
    }

    fn sync(&mut self, id: u64) -> Result<(), c_int> {
        self.operate()?;
        if !self.forgets_syncs {
            self.inode(id)?.sync();
            self.fresh.clear();
        }
        Ok(())
    }

    fn size(&mut self, id: u64) -> Result<usize, c_int> {
        if self.dead {
            return Err(ffi::SQLITE_IOERR_FSTAT);
        }
        Ok(self.inode(id)?.visible.len())
    }

    fn delete(&mut self, name: &str) -> Result<(), c_int> {
        self.operate()?;
        let Some(id) = self.names.remove(name) else { return Err(ffi::SQLITE_IOERR_DELETE_NOENT) };
        self.fresh.remove(name);
        self.unlink(id);
        Ok(())
    }

    fn unlink(&mut self, id: u64) {
        if let Some(inode) = self.inodes.get_mut(&id) {
            inode.linked = false;
            if inode.handles == 0 {
                self.inodes.remove(&id);
            }
        }
    }

    fn restart(&mut self, survive: Survive, rng: &mut impl Rng) {
        for (name, id) in self.names.clone() {
            let Some(inode) = self.inodes.get_mut(&id) else { continue };
            match survive {
                Survive::Everything => continue,
                Survive::Nothing => inode.unsynced.clear(),
                Survive::Some => inode.tear(rng),
            }
            inode.visible.clone_from(&inode.durable);
            if self.fresh.contains(&name) && (survive == Survive::Nothing || flip(rng)) {
                self.names.remove(&name);
                self.unlink(id);
            }
        }
        if survive != Survive::Everything {
            self.fresh.clear();
        }
        self.dead = false;
        self.fault = None;
    }
}

/// A disk, registered with SQLite under a name of its own until it is dropped.
pub struct Disk {
    name: String,
    state: Arc<Mutex<State>>,
    registration: *mut Registration,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What SQLite holds pointers to.
struct Registration {
    vfs: ffi::sqlite3_vfs,
    _name: CString,
    state: Arc<Mutex<State>>,
}

/// SQLite's table of VFSes is one for the process, so each disk needs a name that no other has.
static NEXT_NAME: AtomicU64 = AtomicU64::new(1);

/// Longest path SQLite may ask for: names here are a few letters.
const MAX_PATH: c_int = 64;

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        let name = format!("sim-{}", NEXT_NAME.fetch_add(1, Ordering::Relaxed));
        let c_name = CString::new(name.as_str()).expect("BUG: the name holds no zero");
        let state = Arc::new(Mutex::new(State::default()));
        let vfs = ffi::sqlite3_vfs {
            iVersion: 1,
            szOsFile: c_int::try_from(size_of::<OpenFile>()).expect("BUG: a handle is a few words"),
            mxPathname: MAX_PATH,
            pNext: null_mut(),
            zName: c_name.as_ptr(),
            pAppData: null_mut(),
            xOpen: Some(open),
            xDelete: Some(delete),
            xAccess: Some(access),
            xFullPathname: Some(full_pathname),
            xDlOpen: None,
            xDlError: None,
            xDlSym: None,
            xDlClose: None,
            xRandomness: Some(randomness),
            xSleep: Some(sleep),
            xCurrentTime: Some(current_time),
            xGetLastError: None,
            xCurrentTimeInt64: None,
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
        };
        let registration = Box::into_raw(Box::new(Registration { vfs, _name: c_name, state: state.clone() }));
        // SAFETY: the registration was just made and is freed only in `drop`, after SQLite was told to forget it.
        let registered = unsafe {
            (*registration).vfs.pAppData = registration.cast();
            ffi::sqlite3_vfs_register(&raw mut (*registration).vfs, 0)
        };
        assert_eq!(registered, ffi::SQLITE_OK, "BUG: SQLite takes any VFS");
        Self { name, state, registration }
    }

    /// The name to open a database with.
    #[must_use]
    pub fn vfs(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a fault happen after so many more operations that change the disk.
    pub fn fail_after(&self, operations: u64, fault: Fault) {
        self.state().fault = Some((operations, fault));
    }

    /// Leaves so many bytes free, or as many as anyone wants.
    pub fn limit(&self, free: Option<usize>) {
        let mut state = self.state();
        state.room = free.map(|free| state.used() + free);
    }

    /// Takes back faults that have not happened yet, and any limit.
    pub fn heal(&self) {
        let mut state = self.state();
        state.fault = None;
        state.room = None;
    }

    /// Nothing works any more until the next [`Disk::restart`].
    pub fn cut_power(&self) {
        self.state().dead = true;
    }

    /// Whether the power was cut.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// Operations so far that changed the disk.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Starts again with what survived; no file may be open.
    pub fn restart(&self, survive: Survive, rng: &mut impl Rng) {
        let mut state = self.state();
        assert!(state.inodes.values().all(|inode| inode.handles == 0), "BUG: a file is open across a restart");
        state.restart(survive, rng);
    }

    /// Copies every file as it is visible now.
    #[must_use]
    pub fn image(&self) -> Image {
        let state = self.state();
        let file = |(name, id): (&String, &u64)| (name.clone(), state.inodes[id].visible.clone());
        Image(state.names.iter().map(file).collect())
    }

    /// Replaces every file, durably; none may be open.
    pub fn load(&self, image: &Image) {
        let mut state = self.state();
        assert!(state.inodes.values().all(|inode| inode.handles == 0), "BUG: a file is open while all are replaced");
        state.names.clear();
        state.inodes.clear();
        state.fresh.clear();
        for (name, bytes) in &image.0 {
            state.next += 1;
            let id = state.next;
            let inode = Inode { visible: bytes.clone(), durable: bytes.clone(), linked: true, ..Inode::default() };
            state.inodes.insert(id, inode);
            state.names.insert(name.clone(), id);
        }
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.state().inodes.values().any(|inode| inode.handles > 0) {
            // a connection outlives its disk and points to it: the memory is left to it
            return;
        }
        // SAFETY: made in `new`, freed here only; no file is open, so no connection points to it any more.
        unsafe {
            ffi::sqlite3_vfs_unregister(&raw mut (*self.registration).vfs);
            drop(Box::from_raw(self.registration));
        }
    }
}

/// An open file as SQLite allocates it.
#[repr(C)]
struct OpenFile {
    base: ffi::sqlite3_file,
    state: *const Mutex<State>,
    inode: u64,
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(lock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

fn code(done: Result<(), c_int>) -> c_int {
    done.err().unwrap_or(ffi::SQLITE_OK)
}

fn place(offset: ffi::sqlite3_int64) -> usize {
    usize::try_from(offset).unwrap_or(0)
}

fn length(amount: c_int) -> usize {
    usize::try_from(amount).unwrap_or(0)
}

/// The state behind a VFS.
///
/// # Safety
/// `vfs` is one that [`Disk::new`] registered, and its disk lives.
unsafe fn state_of<'a>(vfs: *mut ffi::sqlite3_vfs) -> MutexGuard<'a, State> {
    // SAFETY: as the caller promises, `pAppData` is the registration.
    let registration = unsafe { &*(*vfs).pAppData.cast::<Registration>() };
    registration.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Works on an open file.
///
/// # Safety
/// `file` was opened by [`open`], and its disk lives.
unsafe fn with_file<T>(file: *mut ffi::sqlite3_file, work: impl FnOnce(&mut State, u64) -> T) -> T {
    // SAFETY: as the caller promises, `file` is the beginning of an `OpenFile` that `open` filled in.
    let (state, inode) = unsafe {
        let file = file.cast::<OpenFile>();
        (&*(*file).state, (*file).inode)
    };
    work(&mut state.lock().unwrap_or_else(PoisonError::into_inner), inode)
}

/// A name SQLite gives; none for a temporary file.
///
/// # Safety
/// `name` is null or a C string.
unsafe fn name_of(name: *const c_char) -> Option<String> {
    // SAFETY: as the caller promises.
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}

unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives a VFS of ours, a name or null, room for an `OpenFile`, and a place for flags or null.
    unsafe {
        (*file).pMethods = std::ptr::null();
        let name = name_of(name);
        let create = flags & ffi::SQLITE_OPEN_CREATE != 0 || name.is_none();
        let inode = match state_of(vfs).open(name, create) {
            Ok(inode) => inode,
            Err(code) => return code,
        };
        let state = Arc::as_ptr(&(*(*vfs).pAppData.cast::<Registration>()).state);
        let base = ffi::sqlite3_file { pMethods: &raw const METHODS };
        file.cast::<OpenFile>().write(OpenFile { base, state, inode });
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite gives a file that `open` filled in.
    unsafe { with_file(file, State::close) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(
    file: *mut ffi::sqlite3_file,
    into: *mut c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite gives a file that `open` filled in, and room for `amount` bytes.
    unsafe {
        let into = std::slice::from_raw_parts_mut(into.cast::<u8>(), length(amount));
        code(with_file(file, |state, id| state.read(id, place(offset), into)))
    }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    bytes: *const c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite gives a file that `open` filled in, and `amount` bytes.
    unsafe {
        let bytes = std::slice::from_raw_parts(bytes.cast::<u8>(), length(amount));
        code(with_file(file, |state, id| state.write(id, place(offset), bytes)))
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, len: ffi::sqlite3_int64) -> c_int {
    // SAFETY: SQLite gives a file that `open` filled in.
    code(unsafe { with_file(file, |state, id| state.truncate(id, place(len))) })
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: SQLite gives a file that `open` filled in.
    code(unsafe { with_file(file, State::sync) })
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut ffi::sqlite3_int64) -> c_int {
    // SAFETY: SQLite gives a file that `open` filled in, and a place for the size.
    unsafe {
        match with_file(file, State::size) {
            Ok(len) => {
                *size = ffi::sqlite3_int64::try_from(len).unwrap_or(ffi::sqlite3_int64::MAX);
                ffi::SQLITE_OK
            }
            Err(code) => code,
        }
    }
}

unsafe extern "C" fn lock(_file: *mut ffi::sqlite3_file, _level: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn check_reserved_lock(_file: *mut ffi::sqlite3_file, reserved: *mut c_int) -> c_int {
    // SAFETY: SQLite gives a place for the answer.
    unsafe { *reserved = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_control(_file: *mut ffi::sqlite3_file, _operation: c_int, _argument: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_file: *mut ffi::sqlite3_file) -> c_int {
    SECTOR_SIZE
}

unsafe extern "C" fn device_characteristics(_file: *mut ffi::sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

unsafe extern "C" fn delete(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, _sync_directory: c_int) -> c_int {
    // SAFETY: SQLite gives a VFS of ours and a name.
    unsafe { code(state_of(vfs).delete(&name_of(name).unwrap_or_default())) }
}

unsafe extern "C" fn access(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, _what: c_int, there: *mut c_int) -> c_int {
    // SAFETY: SQLite gives a VFS of ours, a name, and a place for the answer.
    unsafe {
        let known = name_of(name).is_some_and(|name| state_of(vfs).names.contains_key(&name));
        *there = c_int::from(known);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_pathname(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    room: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite gives a name and `room` bytes for the answer.
    unsafe {
        let name = CStr::from_ptr(name).to_bytes_with_nul();
        if name.len() > length(room) {
            return ffi::SQLITE_CANTOPEN;
        }
        std::ptr::copy_nonoverlapping(name.as_ptr(), out.cast::<u8>(), name.len());
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn randomness(_vfs: *mut ffi::sqlite3_vfs, amount: c_int, out: *mut c_char) -> c_int {
    // SAFETY: SQLite gives room for `amount` bytes.
    unsafe { std::ptr::write_bytes(out, 0, length(amount)) };
    amount
}

unsafe extern "C" fn sleep(_vfs: *mut ffi::sqlite3_vfs, microseconds: c_int) -> c_int {
    microseconds
}

unsafe extern "C" fn current_time(_vfs: *mut ffi::sqlite3_vfs, now: *mut f64) -> c_int {
    /// Julian day of 2026-01-01: nothing stored depends on it.
    const JULIAN_DAY: f64 = 2_461_041.5;
    // SAFETY: SQLite gives a place for the answer.
    unsafe { *now = JULIAN_DAY };
    ffi::SQLITE_OK
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rusqlite::{Connection, OpenFlags};

    use super::*;
    use crate::random::derive;

    /// Rows that a workload writes, one commit each.
    const ROWS: i64 = 12;

    fn open(disk: &Disk) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags_and_vfs("db", flags, disk.vfs())?;
        conn.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        conn.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        conn.pragma_update(None, "synchronous", "FULL")?;
        // often enough that a checkpoint is cut short too
        conn.pragma_update_and_check(None, "wal_autocheckpoint", 4, |_| Ok(()))?;
        conn.execute_batch("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, bytes BLOB)")?;
        Ok(conn)
    }

    /// Writes rows until the disk fails, and tells how many commits were answered.
    fn write_rows(disk: &Disk) -> i64 {
        let Ok(conn) = open(disk) else { return 0 };
        for id in 1..=ROWS {
            let row = (id, vec![id.to_le_bytes()[0]; 3000]);
            if conn.execute("INSERT INTO t (id, bytes) VALUES (?1, ?2)", row).is_err() {
                return id - 1;
            }
        }
        ROWS
    }

    fn rows(disk: &Disk) -> rusqlite::Result<Vec<i64>> {
        let conn = open(disk)?;
        let verdict: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        assert_eq!(verdict, "ok");
        conn.prepare("SELECT id FROM t ORDER BY id")?.query_map([], |row| row.get(0))?.collect()
    }

    /// Cuts the power before the n-th operation; whether every commit that was answered is there afterwards.
    fn survives(after: u64, survive: Survive, forgets_syncs: bool, rng: &mut ChaCha20Rng) -> bool {
        let disk = Disk::new();
        disk.state().forgets_syncs = forgets_syncs;
        disk.fail_after(after, Fault::PowerCut);
        let answered = write_rows(&disk);
        disk.cut_power();
        disk.restart(survive, rng);
        match rows(&disk) {
            Ok(found) => i64::try_from(found.len()).is_ok_and(|len| len >= answered) && found.is_sorted(),
            Err(_) => false,
        }
    }

    fn operations() -> u64 {
        let disk = Disk::new();
        assert_eq!(write_rows(&disk), ROWS);
        disk.operations()
    }

    #[test]
    fn what_was_committed_survives_a_power_cut_before_every_operation() {
        let mut rng = derive(1, "test");
        for after in 0..operations() {
            for survive in [Survive::Nothing, Survive::Everything, Survive::Some, Survive::Some] {
                assert!(survives(after, survive, false, &mut rng), "cut before operation {after}, {survive:?} left");
            }
        }
    }

    #[test]
    fn a_disk_that_forgets_syncs_is_noticed() {
        let mut rng = derive(2, "test");
        let lost = (0..operations()).filter(|&after| !survives(after, Survive::Nothing, true, &mut rng)).count();
        assert!(lost > 0);
    }

    #[test]
    fn a_failed_or_full_write_is_an_error_and_what_was_there_stays() {
        let disk = Disk::new();
        assert_eq!(write_rows(&disk), ROWS);
        for fault in 0..12 {
            let conn = open(&disk).expect("a sound disk");
            disk.fail_after(fault, Fault::IoError);
            let failed = conn.execute("INSERT INTO t (id, bytes) VALUES (99, zeroblob(3000))", []);
            disk.heal();
            let there = conn.execute("DELETE FROM t WHERE id = 99", []).expect("a sound disk again");
            assert_eq!(there == 1, failed.is_ok(), "fault {fault}");
        }
        let conn = open(&disk).expect("a sound disk");
        disk.limit(Some(100));
        let full = conn.execute("INSERT INTO t (id, bytes) VALUES (99, zeroblob(90000))", []);
        let code = full.err().and_then(|error| error.sqlite_error_code());
        assert_eq!(code, Some(rusqlite::ErrorCode::DiskFull));
        disk.limit(None);
        drop(conn);
        assert_eq!(rows(&disk).expect("a sound disk").len(), usize::try_from(ROWS).expect("few"));
    }

    #[test]
    fn an_image_brings_back_what_was_there() {
        let disk = Disk::new();
        let conn = open(&disk).expect("a sound disk");
        conn.execute("INSERT INTO t (id) VALUES (1)", []).expect("a row");
        let image = disk.image();
        conn.execute("INSERT INTO t (id) VALUES (2)", []).expect("a row");
        drop(conn);
        disk.load(&image);
        assert_eq!(rows(&disk).expect("a sound disk"), vec![1]);
    }
}
