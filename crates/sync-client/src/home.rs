//! A home: the directory of one installation, with its key, its database and its lock.
//!
//! Making one is staged so that dying at any step leaves either no home or a whole one:
//! the settings are written beside their place, the key goes to its store, and then the settings move into place.
//! A directory without settings is not a home, and making one there again clears what was left behind,
//! also in the keychain, whose entry the staged settings name.

pub(crate) mod files;
mod fingerprint;
mod key_store;
mod lock;
mod passphrase;
#[cfg(all(test, target_os = "linux"))]
mod secret_service_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use directories::ProjectDirs;
use rand_core::CryptoRng;
use serde::{Deserialize, Serialize};

pub use fingerprint::Fingerprint;
pub use key_store::{KeyStoreError, KeyStoreKind, UnknownKeyStore, Warning};
pub use lock::{Holder, HomeLock, LockError};
pub use passphrase::{MAX_PASSPHRASE, PASSPHRASE_CREDENTIAL, PassphraseError, PassphraseSource, Prompt};

use key_store::Keychain;
use sync_crypto::HomeKey;
use sync_types::bounds::MAX_NAME;

/// Version of the settings this program writes, and the newest it reads.
const VERSION: u64 = 1;

/// Bytes of the settings: a few short lines.
const MAX_CONFIG: usize = 4 << 10;

const CONFIG_FILE: &str = "home.toml";
const KEY_FILE: &str = "key";
const DB_FILE: &str = "sync.db";
/// Says that there was a database: where it is gone, nobody begins anew unasked.
const OPENED_FILE: &str = "opened";
const LOCK_FILE: &str = "lock";
const SOCKET_FILE: &str = "api.sock";

/// An open home: its directory, and the key to what is in it.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    name: String,
    key_store: KeyStoreKind,
    public_relays: bool,
    key: HomeKey,
}

/// Why a home could not be made or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HomeError {
    /// There is a home in that place.
    #[error("{path} is a home already; use it as it is, or name another directory with `--home`", path = .path.display())]
    AlreadyExists {
        /// The directory.
        path: PathBuf,
    },
    /// There is no home in that place.
    #[error("{path} is not a home; run `syncshell init`, or name the right directory with `--home`", path = .path.display())]
    NotAHome {
        /// The directory.
        path: PathBuf,
    },
    /// The directory holds something else.
    #[error("{path} holds other files ({found}); name an empty or new directory with `--home`", path = .path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of them.
        found: String,
    },
    /// The name does not fit.
    #[error("the name {name:?} does not fit; choose one of 1 to {MAX_NAME} bytes without control characters")]
    BadName {
        /// The name.
        name: String,
    },
    /// The system does not say where homes go.
    #[error("this user has no directory for data; name one with `--home`")]
    NoDefaultPath,
    /// A newer program made the home.
    #[error(
        "the home {path} is from a newer version of syncshell (format {found}, this one knows {VERSION}); update this one",
        path = .path.display()
    )]
    TooNew {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// The settings cannot be understood.
    #[error("{path} is damaged ({reason}); put it back from a backup", path = .path.display())]
    Damaged {
        /// The settings file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There was a database.
    #[error(
        "{path} is gone or empty, and with it this device's groups, folders and whatever nobody else has; put it back from a \
         backup, or go on as a new device without groups by `syncshell init --anew`",
        path = .path.display()
    )]
    DatabaseGone {
        /// The database.
        path: PathBuf,
    },
    /// There is a database and no settings.
    #[error("{path} is missing beside a database; put it back from a backup, or move the database away", path = .path.display())]
    ConfigMissing {
        /// The settings file.
        path: PathBuf,
    },
    /// We may not read or write there.
    #[error("no permission for {path} ({source}); make it accessible to this user, or name another directory with `--home`", path = .path.display())]
    NoPermission {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// Something else went wrong there.
    #[error("{path} cannot be used: {source}; check the disk, or name another directory with `--home`", path = .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The key could not be kept or fetched.
    #[error(transparent)]
    KeyStore(#[from] KeyStoreError),
    /// Someone else is at work in that place.
    #[error(transparent)]
    Lock(#[from] LockError),
}

impl Home {
    /// Where the home of this user is unless they name another place.
    pub fn default_path() -> Result<PathBuf, HomeError> {
        // local, because a Windows profile that roams would copy the home to other machines
        let dirs = ProjectDirs::from("", "", "syncshell").ok_or(HomeError::NoDefaultPath)?;
        Ok(dirs.data_local_dir().to_owned())
    }

    /// Makes a home in a new or empty directory and keeps its key in `key_store`.
    ///
    /// Without a `key_store` it takes the OS keychain if that works, else a passphrase if there is one, else none.
    /// Blocks the thread, also for what a person types.
    pub fn create(
        path: impl AsRef<Path>,
        name: &str,
        key_store: Option<KeyStoreKind>,
        passphrase: &PassphraseSource,
        rng: &mut impl CryptoRng,
    ) -> Result<(Self, Vec<Warning>), HomeError> {
        Self::create_with(path.as_ref(), name, key_store, passphrase, &Keychain::system(), rng)
    }

    /// Opens a home with the key from where the home says it is; blocks the thread, also for what a person types.
    pub fn open(path: impl AsRef<Path>, passphrase: &PassphraseSource) -> Result<Self, HomeError> {
        Self::open_with(path.as_ref(), passphrase, &Keychain::system())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Name of the device, as its person chose it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the key is kept.
    pub fn key_store(&self) -> KeyStoreKind {
        self.key_store
    }

    /// Whether connections may begin at public relays while no group names one.
    pub fn uses_public_relays(&self) -> bool {
        self.public_relays
    }

    /// Whether connections may begin at public relays from the next time on that the home is opened.
    pub fn set_public_relays(path: impl AsRef<Path>, used: bool) -> Result<(), HomeError> {
        let dir = std::path::absolute(path.as_ref()).map_err(failed_at(path.as_ref()))?;
        let config = Config { public_relays: used, ..Config::read(&dir)? };
        let path = dir.join(CONFIG_FILE);
        files::write_private(&path, config.to_toml().as_bytes()).map_err(failed_at(&path))
    }

    /// The key that protects all other secrets of this home.
    pub fn key(&self) -> &HomeKey {
        &self.key
    }

    /// Path of the database.
    pub fn db_path(&self) -> PathBuf {
        self.dir.join(DB_FILE)
    }

    /// Checks, under the lock, that the database is there if it ever was.
    pub(crate) fn check_database(&self) -> Result<(), HomeError> {
        let (path, opened) = (self.db_path(), self.dir.join(OPENED_FILE));
        let there = |path: &Path| path.try_exists().map_err(failed_at(path));
        if there(&opened)? && is_gone(&path)? {
            // what is beside a database that is gone must not be read into the one that is put in its place
            for end in ["db-wal", "db-shm"] {
                let beside = path.with_extension(end);
                if there(&beside)? {
                    let aside = path.with_extension(format!("{end}.old"));
                    fs::rename(&beside, aside).map_err(failed_at(&beside))?;
                }
            }
            return Err(HomeError::DatabaseGone { path });
        }
        Ok(())
    }

    /// Remembers, once there is a database, that there is one.
    pub(crate) fn note_database(&self) -> Result<(), HomeError> {
        let path = self.dir.join(OPENED_FILE);
        if path.try_exists().map_err(failed_at(&path))? {
            return Ok(());
        }
        files::write_private(&path, b"").map_err(failed_at(&path))
    }

    /// Gives up the database of a home, which is gone: the next one who opens it begins as a new device without groups.
    pub fn begin_anew(path: impl AsRef<Path>) -> Result<(), HomeError> {
        let dir = std::path::absolute(path.as_ref()).map_err(failed_at(path.as_ref()))?;
        Config::read(&dir)?;
        let _lock = HomeLock::acquire_in(&dir, Duration::ZERO)?;
        if !is_gone(&dir.join(DB_FILE))? {
            return Err(HomeError::AlreadyExists { path: dir });
        }
        // what is beside a database that is gone belongs to no other one
        for name in ["sync.db-wal", "sync.db-shm", DB_FILE, OPENED_FILE] {
            let path = dir.join(name);
            files::remove_if_there(&path).map_err(failed_at(&path))?;
        }
        Ok(())
    }

    /// Path of the socket on which a running process serves this home.
    pub fn socket_path(&self) -> PathBuf {
        self.dir.join(SOCKET_FILE)
    }

    /// Path of the lock that process holds.
    pub fn lock_path(&self) -> PathBuf {
        self.dir.join(LOCK_FILE)
    }

    fn create_with(
        path: &Path,
        name: &str,
        key_store: Option<KeyStoreKind>,
        passphrase: &PassphraseSource,
        keychain: &Keychain,
        rng: &mut impl CryptoRng,
    ) -> Result<(Self, Vec<Warning>), HomeError> {
        if !is_name(name) {
            return Err(HomeError::BadName { name: name.to_owned() });
        }
        let dir = std::path::absolute(path).map_err(failed_at(path))?;
        refuse_occupied(&dir)?;
        // whoever has no place for a key has no directory made either
        let (chosen, mut warnings) = key_store::choose(key_store, passphrase, keychain, rng)?;

        files::make_private_dir(&dir).map_err(failed_at(&dir))?;
        let _lock = HomeLock::acquire_in(&dir, Duration::ZERO)?;
        refuse_occupied(&dir)?;
        clear_half_made(&dir, keychain)?;

        let key = HomeKey::make(rng);
        let entry = key_store::make_entry_name(rng);
        let config = Config {
            version: VERSION,
            name: name.to_owned(),
            key_store: chosen.kind(),
            keychain_entry: (chosen.kind() == KeyStoreKind::Keychain).then(|| entry.clone()),
            public_relays: true,
        };
        let config_path = dir.join(CONFIG_FILE);
        let staged = files::stage(&config_path, config.to_toml().as_bytes()).map_err(failed_at(&config_path))?;
        chosen.keep(&key, &dir, &entry, keychain, rng)?;
        staged.publish().map_err(failed_at(&config_path))?;

        if chosen.kind() == KeyStoreKind::File {
            warnings.push(Warning::KeyInPlainFile { path: dir.join(KEY_FILE) });
        }
        let Config { name, key_store, public_relays, .. } = config;
        Ok((Self { dir, name, key_store, public_relays, key }, warnings))
    }

    fn open_with(path: &Path, passphrase: &PassphraseSource, keychain: &Keychain) -> Result<Self, HomeError> {
        let dir = std::path::absolute(path).map_err(failed_at(path))?;
        let config = Config::read(&dir)?;
        let entry = config.keychain_entry.as_deref().unwrap_or_default();
        let key = key_store::fetch(config.key_store, &dir, entry, passphrase, keychain)?;
        let Config { name, key_store, public_relays, .. } = config;
        Ok(Self { dir, name, key_store, public_relays, key })
    }
}

/// The settings of a home.
#[derive(Serialize, Deserialize)]
struct Config {
    version: u64,
    name: String,
    key_store: KeyStoreKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    keychain_entry: Option<String>,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    public_relays: bool,
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

impl Config {
    fn read(dir: &Path) -> Result<Self, HomeError> {
        let path = dir.join(CONFIG_FILE);
        let damaged = |reason: &str| HomeError::Damaged { path: path.clone(), reason: reason.to_owned() };
        let bytes = files::read_bounded(&path, MAX_CONFIG).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => HomeError::NotAHome { path: dir.to_owned() },
            io::ErrorKind::FileTooLarge => damaged("it is too long"),
            _ => failed_at(&path)(source),
        })?;
        let text = str::from_utf8(&bytes).map_err(|_| damaged("it is not UTF-8"))?;

        // first, because a later version may mean anything by the rest
        let Header { version } = toml::from_str(text).map_err(|e| damaged(e.message()))?;
        if version > VERSION {
            return Err(HomeError::TooNew { path: dir.to_owned(), found: version });
        }
        let config: Self = toml::from_str(text).map_err(|e| damaged(e.message()))?;
        if !is_name(&config.name) {
            return Err(damaged("its name does not fit"));
        }
        if config.key_store == KeyStoreKind::Keychain && config.keychain_entry.is_none() {
            return Err(damaged("it names no keychain entry"));
        }
        Ok(config)
    }

    fn to_toml(&self) -> String {
        toml::to_string(self).expect("BUG: settings are a flat table")
    }
}

/// What every version of the settings begins with.
#[derive(Deserialize)]
struct Header {
    version: u64,
}

fn is_name(name: &str) -> bool {
    !name.trim().is_empty() && name.len() <= MAX_NAME && !name.contains(char::is_control)
}

/// Whether nothing is at the path of a database, or nothing in what is and in the log beside it.
fn is_gone(path: &Path) -> Result<bool, HomeError> {
    let len = |path: &Path| match fs::metadata(path) {
        Ok(found) => Ok(Some(found.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed_at(path)(error)),
    };
    Ok(match len(path)? {
        None => true,
        Some(0) => len(&path.with_extension("db-wal"))?.unwrap_or_default() == 0,
        Some(_) => false,
    })
}

/// Refuses a directory that is a home or anything else but empty or half made.
fn refuse_occupied(dir: &Path) -> Result<(), HomeError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed_at(dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed_at(dir))?.file_name().to_string_lossy().into_owned());
    }
    if names.iter().any(|name| name == CONFIG_FILE) {
        return Err(HomeError::AlreadyExists { path: dir.to_owned() });
    }
    if names.iter().any(|name| name == DB_FILE) {
        return Err(HomeError::ConfigMissing { path: dir.join(CONFIG_FILE) });
    }
    let is_ours = |name: &str| name == LOCK_FILE || half_made(dir).iter().any(|path| path.ends_with(name));
    match names.into_iter().find(|name| !is_ours(name)) {
        Some(found) => Err(HomeError::NotEmpty { path: dir.to_owned(), found }),
        None => Ok(()),
    }
}

/// Clears what an attempt to make a home here left when it died.
fn clear_half_made(dir: &Path, keychain: &Keychain) -> Result<(), HomeError> {
    let staged = files::staging_path(&dir.join(CONFIG_FILE));
    if let Some(entry) = staged_keychain_entry(&staged) {
        // an entry that cannot be deleted now opens nothing: its home never came to be
        let _ = keychain.forget(&entry);
    }
    for path in half_made(dir) {
        files::remove_if_there(&path).map_err(failed_at(&path))?;
    }
    Ok(())
}

fn staged_keychain_entry(staged: &Path) -> Option<String> {
    let bytes = files::read_bounded(staged, MAX_CONFIG).ok()?;
    toml::from_str::<Config>(str::from_utf8(&bytes).ok()?).ok()?.keychain_entry
}

/// The files that an unfinished home consists of; the one that names a keychain entry goes last.
fn half_made(dir: &Path) -> [PathBuf; 3] {
    let key = dir.join(KEY_FILE);
    [files::staging_path(&key), key, files::staging_path(&dir.join(CONFIG_FILE))]
}

fn failed_at(path: &Path) -> impl Fn(io::Error) -> HomeError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            HomeError::NoPermission { path: path.clone(), source }
        }
        _ => HomeError::Io { path: path.clone(), source },
    }
}
