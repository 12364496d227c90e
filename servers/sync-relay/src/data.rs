//! The directory of a relay: its key, its operator's token, and its database where that is SQLite.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use data_encoding::BASE64URL_NOPAD;
use zeroize::Zeroizing;

const KEY: &str = "relay.key";
const TOKEN: &str = "registration-token";
const LOCK: &str = "lock";
/// The address of the relay that runs, for who asks it from this machine.
const ADDRESS: &str = "address";

/// Why a relay's directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The system refused something.
    #[error("cannot use {path}: {source}")]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another relay runs on it.
    #[error("another relay works in {0}; stop it, or name another directory with --data")]
    Busy(PathBuf),
    /// The key is not one.
    #[error(
        "{0} holds no key; put it back from a backup, or remove it: then the relay gets a new key, \
         and every device must be given its new address"
    )]
    Key(PathBuf),
    /// No relay has run on it.
    #[error("no relay has run in {0}; start it, or name its directory with --data")]
    NotRun(PathBuf),
}

/// An open directory.
#[derive(Debug)]
pub(crate) struct Data {
    pub(crate) secret: Zeroizing<[u8; 32]>,
    /// Made once, and kept for when the operator sets none.
    pub(crate) token: String,
    /// Held by the operating system until this is dropped.
    _lock: File,
}

impl Data {
    /// Opens a directory, and makes it and what belongs into it where it is not there.
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let io = |at: &Path| {
            let path = at.to_owned();
            move |source| DataError::Io { path, source }
        };
        make_directory(path).map_err(io(path))?;
        let lock_path = path.join(LOCK);
        let lock = private().create(true).truncate(false).open(&lock_path).map_err(io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(DataError::Busy(path.to_owned())),
            Err(fs::TryLockError::Error(source)) => return Err(DataError::Io { path: lock_path, source }),
        }
        let key_path = path.join(KEY);
        let text = kept(&key_path, || BASE64URL_NOPAD.encode(&draw::<32>())).map_err(io(&key_path))?;
        let bytes = BASE64URL_NOPAD.decode(text.trim().as_bytes()).map(Zeroizing::new);
        let secret = bytes.ok().and_then(|bytes| <[u8; 32]>::try_from(&bytes[..]).ok());
        let secret = Zeroizing::new(secret.ok_or(DataError::Key(key_path))?);
        let token_path = path.join(TOKEN);
        let token = kept(&token_path, || BASE64URL_NOPAD.encode(&draw::<12>())).map_err(io(&token_path))?;
        Ok(Self { secret, token: token.trim().to_owned(), _lock: lock })
    }
}

fn draw<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // fails only on systems without a generator, where nothing else would work either
    getrandom::fill(&mut bytes).expect("BUG: the system has no random numbers");
    bytes
}

/// Notes the address of the relay that runs on a directory.
pub(crate) fn note_address(data: &Path, address: &str) -> Result<(), DataError> {
    let path = data.join(ADDRESS);
    write(&path, address).map_err(|source| DataError::Io { path, source })
}

/// The address of the relay that runs on a directory, or ran last.
pub(crate) fn read_address(data: &Path) -> Result<String, DataError> {
    let path = data.join(ADDRESS);
    fs::read_to_string(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DataError::NotRun(data.to_owned()),
        _ => DataError::Io { path, source },
    })
}

/// The text of a file, which is made whole or not at all.
pub(crate) fn kept(path: &Path, make: impl FnOnce() -> String) -> io::Result<Zeroizing<String>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        read => return read.map(Zeroizing::new),
    }
    let text = Zeroizing::new(make());
    write(path, &text)?;
    Ok(text)
}

/// Writes a file wholly or not at all.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = private().create(true).truncate(true).open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

#[cfg(unix)]
fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;

    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(not(unix))]
fn make_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// How files are opened that nobody else may read.
pub(crate) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_stays_the_same_and_nobody_else_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = Data::open(&path).unwrap();
        assert!(matches!(Data::open(&path), Err(DataError::Busy(_))));
        let (secret, token) = (first.secret.clone(), first.token.clone());
        drop(first);
        let again = Data::open(&path).unwrap();
        assert_eq!((again.secret.clone(), &again.token), (secret, &token));
        assert!(token.len() >= 16);
        #[cfg(unix)]
        for entry in fs::read_dir(&path).unwrap() {
            use std::os::unix::fs::PermissionsExt as _;

            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.path());
        }
    }

    #[test]
    fn a_damaged_key_is_reported_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(KEY), "nonsense").unwrap();
        assert!(matches!(Data::open(dir.path()), Err(DataError::Key(_))));
        assert_eq!(fs::read(dir.path().join(KEY)).unwrap(), b"nonsense");
    }
}
