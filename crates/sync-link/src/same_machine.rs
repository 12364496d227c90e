//! Same machine: processes of one user find each other through a directory only that user can enter.
//!
//! `invites/` holds sealed records, named by their lookup id and, since several processes may publish under one, a suffix.
//! `devices/` holds the current addresses of each running device, one a line, named by the BLAKE3 of its device id.
//! Files appear whole and are removed by whoever wrote them; what a crash leaves behind is an address at which nobody answers, and is swept later.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::future::{self, BoxFuture, FutureExt as _};
use tokio::task::JoinSet;

use crate::rendezvous::{
    Lookup, LookupId, LookupSink, MAX_CANDIDATES, MAX_RECORD, Publication, Published, Record, Rendezvous,
    RendezvousError,
};

/// A record is shown for at most this long; an invite lives ten minutes, and whatever is older was left by a crash.
pub const INVITE_STALE: Duration = Duration::from_secs(60 * 60);

/// Addresses that were not refreshed for this long were left by a crash; see [`REFRESH_EVERY`].
pub const DEVICE_STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// A running device writes its addresses again this often, because a runtime directory may be cleaned of files untouched for six hours.
pub const REFRESH_EVERY: Duration = Duration::from_secs(3 * 60 * 60);

/// The rendezvous through a directory of this machine. Clones share it.
///
/// Its calls touch a few small files and wait for no disk.
#[derive(Clone, Debug)]
pub struct SameMachine {
    directory: Arc<Directory>,
}

impl SameMachine {
    /// Opens the given directory, or the user's own, making it where it is missing.
    ///
    /// # Errors
    /// A directory that others own, can enter, or have replaced by a link is refused.
    pub fn open(explicit: Option<&Path>) -> Result<Self, DirectoryError> {
        let path = match explicit {
            Some(path) => path.to_owned(),
            None => user_directory()?,
        };
        let directory = Directory { path };
        directory.ensure()?;
        directory.sweep(INVITES, INVITE_STALE);
        directory.sweep(DEVICES, DEVICE_STALE);
        Ok(Self { directory: Arc::new(directory) })
    }

    /// The directory in use.
    pub fn path(&self) -> &Path {
        &self.directory.path
    }

    /// Tells processes of this machine where a device can be dialled, until the result is dropped.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn publish_device(
        &self,
        device: &[u8; 32],
        addresses: &[SocketAddr],
    ) -> Result<DevicePublication, DirectoryError> {
        let file = Arc::new(OwnFile::new(self.directory.clone(), device_file(device)));
        file.write(&address_lines(addresses))?;
        let mut refresh = JoinSet::new();
        refresh.spawn({
            let file = file.clone();
            async move {
                loop {
                    tokio::time::sleep(REFRESH_EVERY).await;
                    if let Err(error) = file.rewrite() {
                        tracing::debug!(%error, "addresses not refreshed");
                    }
                }
            }
        });
        Ok(DevicePublication { file, _refresh: refresh })
    }

    /// Where a device of this machine said it can be dialled; empty if it did not, and stale if it crashed.
    pub fn resolve_device(&self, device: &[u8; 32]) -> Result<Vec<SocketAddr>, DirectoryError> {
        let bytes = self.directory.read(&device_file(device), MAX_DEVICE_FILE, DEVICE_STALE)?;
        Ok(bytes.as_deref().map(read_addresses).unwrap_or_default())
    }
}

impl Rendezvous for SameMachine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn publish(&self, id: LookupId, record: Record) -> BoxFuture<'_, Result<Publication, RendezvousError>> {
        self.directory.sweep(INVITES, INVITE_STALE);
        let file = OwnFile::new(self.directory.clone(), new_record_file(id));
        let written = file.write(record.as_bytes());
        future::ready(match written {
            Ok(()) => Ok(Publication::new(Invite(file))),
            Err(error) => Err(error.into()),
        })
        .boxed()
    }

    fn lookup(&self, id: LookupId) -> Lookup {
        let directory = self.directory.clone();
        Lookup::spawn(NAME, move |sink| watch_invite(directory, id, sink))
    }
}

/// The addresses of a running device; dropping this removes them.
#[must_use = "the addresses are removed when this is dropped"]
pub struct DevicePublication {
    file: Arc<OwnFile>,
    _refresh: JoinSet<()>,
}

impl DevicePublication {
    /// Publishes other addresses.
    pub fn update(&self, addresses: &[SocketAddr]) -> Result<(), DirectoryError> {
        self.file.write(&address_lines(addresses))
    }
}

impl Drop for DevicePublication {
    fn drop(&mut self) {
        self.file.remove();
    }
}

impl fmt::Debug for DevicePublication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePublication").field("file", &self.file.name).finish_non_exhaustive()
    }
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Somebody may have put a link there to lead us elsewhere.
    #[error("{} is not a directory of its own, remove it and try again", .path.display())]
    NotADirectory {
        /// The directory.
        path: PathBuf,
    },
    /// Somebody else made it first.
    #[error("{} belongs to another user, have it removed or set XDG_RUNTIME_DIR to a directory of your own", .path.display())]
    ForeignOwner {
        /// The directory.
        path: PathBuf,
    },
    /// Others could read or forge what is in it.
    #[error("{} is open to other users (mode {mode:03o}), run chmod 700 on it", .path.display())]
    OpenToOthers {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The system names no directory for local data.
    #[error("this user has no directory for local data, set LOCALAPPDATA")]
    NoPlace,
    /// The file system refused.
    #[error("cannot use {}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

struct Invite(OwnFile);

impl Published for Invite {
    fn replace(&mut self, record: Record) -> BoxFuture<'_, Result<(), RendezvousError>> {
        let written = self.0.write(record.as_bytes());
        future::ready(written.map_err(RendezvousError::from)).boxed()
    }

    fn withdraw(&mut self) {
        self.0.remove();
    }
}

async fn watch_invite(directory: Arc<Directory>, id: LookupId, mut sink: LookupSink) {
    let mut poll = tokio::time::interval(POLL_EVERY);
    loop {
        poll.tick().await;
        let records = match directory.records_of(id) {
            Ok(records) => records,
            Err(error) => {
                sink.warn(error.into()).await;
                continue;
            }
        };
        for name in records {
            match directory.read(&name, MAX_RECORD, INVITE_STALE) {
                Ok(Some(bytes)) => sink.candidate(&bytes).await,
                Ok(None) => {}
                Err(error) => sink.warn(error.into()).await,
            }
        }
    }
}

/// A file that only its last writer removes: another process may have written its own under the same name.
struct OwnFile {
    directory: Arc<Directory>,
    name: PathBuf,
    /// What we wrote last; nothing once removed.
    content: Mutex<Vec<u8>>,
}

impl OwnFile {
    fn new(directory: Arc<Directory>, name: PathBuf) -> Self {
        Self { directory, name, content: Mutex::new(Vec::new()) }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), DirectoryError> {
        if bytes.is_empty() {
            self.remove();
            return Ok(());
        }
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        self.directory.write(&self.name, bytes)?;
        *content = bytes.to_vec();
        Ok(())
    }

    fn rewrite(&self) -> Result<(), DirectoryError> {
        let content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        if content.is_empty() {
            return Ok(());
        }
        self.directory.write(&self.name, &content)
    }

    fn remove(&self) {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = std::mem::take(&mut *content);
        let path = self.directory.path.join(&self.name);
        let found = read_bounded(&path, MAX_DEVICE_FILE.max(MAX_RECORD));
        if !matches!(found, Ok(Some(found)) if found == ours) {
            return;
        }
        if let Err(error) = fs::remove_file(&path) {
            tracing::debug!(%error, "published file not removed");
        }
    }
}

/// A directory that is ours alone.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Makes what is missing and refuses what is not ours.
    fn ensure(&self) -> Result<(), DirectoryError> {
        make_private(&self.path).map_err(|error| self.io(&self.path, error))?;
        self.check()?;
        // nobody else can enter from here on
        for name in [INVITES, DEVICES] {
            let path = self.path.join(name);
            make_private(&path).map_err(|error| self.io(&path, error))?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), DirectoryError> {
        let found = fs::symlink_metadata(&self.path).map_err(|error| self.io(&self.path, error))?;
        if !found.is_dir() {
            return Err(DirectoryError::NotADirectory { path: self.path.clone() });
        }
        check_owner(&self.path, &found)
    }

    /// Writes a file beside and renames it, so that a reader finds all of it or nothing.
    ///
    /// Nothing is synced: after a crash of the machine nobody listens at what these files say.
    fn write(&self, name: &Path, bytes: &[u8]) -> Result<(), DirectoryError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);

        self.ensure()?;
        let path = self.path.join(name);
        let beside =
            path.with_extension(format!("{}-{}{BESIDE}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        let written = write_new(&beside, bytes).and_then(|()| fs::rename(&beside, &path));
        if written.is_err() {
            // the first error is the one to tell
            let _ = fs::remove_file(&beside);
        }
        written.map_err(|error| self.io(&path, error))
    }

    /// Reads a file that is neither stale nor longer than `max`.
    fn read(&self, name: &Path, max: usize, stale: Duration) -> Result<Option<Vec<u8>>, DirectoryError> {
        // whoever cleaned up may not be who made it anew
        self.check()?;
        let path = self.path.join(name);
        if is_older(&path, stale) {
            return Ok(None);
        }
        read_bounded(&path, max).map_err(|error| self.io(&path, error))
    }

    /// The files that hold records under an id, at most [`MAX_CANDIDATES`].
    fn records_of(&self, id: LookupId) -> Result<Vec<PathBuf>, DirectoryError> {
        // whoever cleaned up may not be who made it anew
        self.check()?;
        let prefix = format!("{}-", id.to_hex());
        let Ok(entries) = fs::read_dir(self.path.join(INVITES)) else { return Ok(Vec::new()) };
        let names = entries.take(MAX_SWEEP).flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names
            .filter(|name| name.starts_with(&prefix) && !name.ends_with(BESIDE))
            .take(MAX_CANDIDATES)
            .map(|name| Path::new(INVITES).join(name))
            .collect())
    }

    /// Removes stale files; what cannot be removed is harmless.
    fn sweep(&self, name: &str, stale: Duration) {
        let Ok(entries) = fs::read_dir(self.path.join(name)) else {
            return;
        };
        for entry in entries.take(MAX_SWEEP).flatten() {
            let path = entry.path();
            if is_older(&path, stale)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::debug!(%error, "stale file not removed");
            }
        }
    }

    fn io(&self, path: &Path, source: io::Error) -> DirectoryError {
        DirectoryError::Io { path: path.to_owned(), source }
    }
}

/// A name for a record under this id that no other publication has, also none of a process that is gone.
fn new_record_file(id: LookupId) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);

    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (process, count) = (std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    Path::new(INVITES).join(format!("{}-{process}-{count}-{}", id.to_hex(), since.as_nanos()))
}

fn device_file(device: &[u8; 32]) -> PathBuf {
    // the id itself is nothing to leave lying about
    Path::new(DEVICES).join(blake3::hash(device).to_hex().as_str())
}

fn address_lines(addresses: &[SocketAddr]) -> Vec<u8> {
    addresses.iter().take(MAX_ADDRESSES).map(|address| format!("{address}\n")).collect::<String>().into_bytes()
}

fn read_addresses(bytes: &[u8]) -> Vec<SocketAddr> {
    String::from_utf8_lossy(bytes).lines().filter_map(|line| line.parse().ok()).take(MAX_ADDRESSES).collect()
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600);
    }
    options.open(path)?.write_all(bytes)
}

/// Reads a plain file of 1 to `max` bytes; anything else is no file of ours.
fn read_bounded(path: &Path, max: usize) -> io::Result<Option<Vec<u8>>> {
    let max = u64::try_from(max).unwrap_or(u64::MAX);
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && (1..=max).contains(&found.len()) => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(max).read_to_end(&mut bytes)?,
        // withdrawn in between
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(bytes))
}

fn is_older(path: &Path, age: Duration) -> bool {
    fs::symlink_metadata(path)
        .and_then(|found| found.modified())
        .is_ok_and(|modified| SystemTime::now().duration_since(modified).is_ok_and(|passed| passed > age))
}

#[cfg(unix)]
fn user_directory() -> Result<PathBuf, DirectoryError> {
    use std::os::unix::fs::MetadataExt as _;

    let user = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .filter(|path| fs::metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == user));
    Ok(match runtime {
        Some(path) => path.join("syncshell"),
        None => std::env::temp_dir().join(format!("syncshell-{user}")),
    })
}

#[cfg(not(unix))]
fn user_directory() -> Result<PathBuf, DirectoryError> {
    let base = directories::BaseDirs::new().ok_or(DirectoryError::NoPlace)?;
    Ok(base.data_local_dir().join("syncshell").join("run"))
}

#[cfg(unix)]
fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;

    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

#[cfg(not(unix))]
fn make_private(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

#[cfg(unix)]
fn check_owner(path: &Path, found: &fs::Metadata) -> Result<(), DirectoryError> {
    use std::os::unix::fs::MetadataExt as _;

    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(DirectoryError::ForeignOwner { path: path.to_owned() });
    }
    let mode = found.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(DirectoryError::OpenToOthers { path: path.to_owned(), mode });
    }
    Ok(())
}

/// Elsewhere the directory lies in the user's profile, which the system keeps from others.
#[cfg(not(unix))]
fn check_owner(_: &Path, _: &fs::Metadata) -> Result<(), DirectoryError> {
    Ok(())
}

/// The provider's name.
const NAME: &str = "same machine";

/// Records by lookup id.
const INVITES: &str = "invites";

/// Addresses by device.
const DEVICES: &str = "devices";

/// Ends the names of files not yet renamed.
const BESIDE: &str = ".new";

/// A lookup looks this often; one look is one `stat`.
const POLL_EVERY: Duration = Duration::from_millis(100);

/// Addresses of one device: a machine has some interfaces with some addresses each.
const MAX_ADDRESSES: usize = 64;

/// [`MAX_ADDRESSES`] lines of the longest IPv6 address with scope and port.
const MAX_DEVICE_FILE: usize = MAX_ADDRESSES * 64;

/// Entries one sweep looks at, so that a full directory costs no start-up time.
const MAX_SWEEP: usize = 4096;
