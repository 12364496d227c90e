//! Where the one key of a home is kept.
//!
//! A store is chosen once, when the home is made, and recorded in it; opening uses that one and never another.
//! Nothing here falls back to a weaker store than the one asked for.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{fmt, fs, io, thread};

use data_encoding::HEXLOWER;
use keyring_core::CredentialStore;
use rand_core::CryptoRng;
use serde::{Deserialize, Serialize};
use sync_crypto::{HomeKey, OutOfMemory, VaultError, VaultParams, open_with_passphrase, seal_with_passphrase};
use zeroize::Zeroizing;

use super::passphrase::{PassphraseError, PassphraseSource, Prompt};
use super::{KEY_FILE, files};

/// Service under which entries are kept in the OS keychain.
const SERVICE: &str = "syncshell";

/// How long the OS keychain may take: its dialog waits for a person to type a password.
const KEYCHAIN_WAIT: Duration = Duration::from_secs(120);

/// Bytes of a key file: a hex key, or a sealed one with its salt and parameters.
const MAX_KEY_FILE: usize = 4 << 10;

/// A place for the key of a home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyStoreKind {
    /// The keychain of the operating system.
    Keychain,
    /// A file, sealed under a passphrase.
    Passphrase,
    /// A file that only its owner may read, and nothing more.
    File,
}

/// The text names no key store.
#[derive(Debug, thiserror::Error)]
#[error("unknown key store {0:?}; choose keychain, passphrase or file")]
pub struct UnknownKeyStore(String);

/// What a person should know about how a key is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// The key lies in a file, open to whoever reads it.
    KeyInPlainFile {
        /// The file.
        path: PathBuf,
    },
    /// The OS keychain would have been the first choice.
    KeychainNotUsed {
        /// What is wrong with it.
        reason: String,
    },
    /// A passphrase was named, and the OS keychain does without.
    PassphraseNotUsed,
}

/// Why the key of a home could not be kept or fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyStoreError {
    /// No store was asked for, and none of the good ones is there.
    #[error(
        "no place to keep the key of this home: the OS keychain does not work here ({reason}), and there is neither a \
         terminal, a `--passphrase-file` nor a systemd credential for a passphrase; \
         choose with `--key-store keychain|passphrase|file`"
    )]
    NoneUsable {
        /// What is wrong with the keychain.
        reason: String,
    },
    /// There is no keychain, or it failed.
    #[error(
        "the OS keychain does not work here: {source}; start it, \
         or for a new home choose `--key-store passphrase` or `--key-store file`"
    )]
    KeychainUnavailable {
        /// What happened.
        source: keyring_core::Error,
    },
    /// The keychain does not let us in.
    #[error(
        "the OS keychain is locked ({source}); unlock it and try again, \
         or for a new home choose `--key-store passphrase` or `--key-store file`"
    )]
    KeychainLocked {
        /// What happened.
        source: keyring_core::Error,
    },
    /// The keychain neither answered nor failed.
    #[error(
        "the OS keychain gave no answer within {} s; answer its dialog and try again, \
         or for a new home choose `--key-store passphrase` or `--key-store file`",
        .waited.as_secs()
    )]
    KeychainSilent {
        /// How long we waited.
        waited: Duration,
    },
    /// The keychain has no such entry.
    #[error(
        "the OS keychain has no entry {entry} of service {SERVICE}: it was deleted, or this home was copied without it; \
         put the entry back from a backup of the keychain, or make a new home in another directory"
    )]
    KeychainEntryMissing {
        /// Name of the entry.
        entry: String,
    },
    /// What the keychain gave back is not what we stored.
    #[error(
        "the OS keychain did not give back what was stored in its entry {entry} of service {SERVICE}; \
         put the entry back from a backup of the keychain, \
         or for a new home choose `--key-store passphrase` or `--key-store file`"
    )]
    KeychainEntryDamaged {
        /// Name of the entry.
        entry: String,
    },
    /// There is no passphrase.
    #[error(transparent)]
    Passphrase(#[from] PassphraseError),
    /// It is another passphrase.
    #[error("wrong passphrase; try again")]
    WrongPassphrase,
    /// The key file is gone.
    #[error("the key file {path} is missing; put it back from a backup, or make a new home in another directory", path = .path.display())]
    KeyFileMissing {
        /// The file.
        path: PathBuf,
    },
    /// Others may read the key file.
    #[error(
        "the key file {path} is open to other users (mode {mode:03o}); shut it with `chmod 600 {path}`, \
         and if they may have read it, make a new home",
        path = .path.display()
    )]
    KeyFileExposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key file is not one, or no longer.
    #[error("the key file {path} is damaged; put it back from a backup", path = .path.display())]
    KeyFileDamaged {
        /// The file.
        path: PathBuf,
    },
    /// A newer program wrote the key file.
    #[error("the key file {path} is from a newer version of syncshell; update this one", path = .path.display())]
    KeyFileTooNew {
        /// The file.
        path: PathBuf,
    },
    /// The key file asks for a derivation that is too weak or too costly.
    #[error(
        "the key file {path} asks for a passphrase hash outside the allowed bounds, so someone changed it; \
         put it back from a backup",
        path = .path.display()
    )]
    KeyFileParameters {
        /// The file.
        path: PathBuf,
    },
    /// The passphrase cannot be hashed on this machine now.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// The key file cannot be read or written.
    #[error("the key file {path} cannot be used: {source}; check the permissions and space of its directory", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

impl KeyStoreKind {
    fn name(self) -> &'static str {
        match self {
            Self::Keychain => "keychain",
            Self::Passphrase => "passphrase",
            Self::File => "file",
        }
    }
}

impl fmt::Display for KeyStoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for KeyStoreKind {
    type Err = UnknownKeyStore;

    fn from_str(text: &str) -> Result<Self, UnknownKeyStore> {
        [Self::Keychain, Self::Passphrase, Self::File]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| UnknownKeyStore(text.to_owned()))
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyInPlainFile { path } => write!(
                f,
                "the key of this home lies unprotected in {}: whoever reads that file can read everything",
                path.display()
            ),
            Self::KeychainNotUsed { reason } => {
                write!(f, "the OS keychain does not work here ({reason}), so the key is kept under a passphrase")
            }
            Self::PassphraseNotUsed => f.write_str(
                "the key is kept in the OS keychain, so the passphrase is not used; \
                 to use it, make the home with `--key-store passphrase`",
            ),
        }
    }
}

/// A store that was found to work, with what it needs to take a key.
pub(super) enum Chosen {
    Keychain,
    Passphrase(Zeroizing<String>),
    File,
}

impl Chosen {
    pub(super) fn kind(&self) -> KeyStoreKind {
        match self {
            Self::Keychain => KeyStoreKind::Keychain,
            Self::Passphrase(_) => KeyStoreKind::Passphrase,
            Self::File => KeyStoreKind::File,
        }
    }

    /// Keeps `key`: in the keychain under `entry`, or in the key file of `dir`.
    pub(super) fn keep(
        &self,
        key: &HomeKey,
        dir: &Path,
        entry: &str,
        keychain: &Keychain,
        rng: &mut impl CryptoRng,
    ) -> Result<(), KeyStoreError> {
        let path = dir.join(KEY_FILE);
        let bytes = match self {
            Self::Keychain => return keychain.put(entry, to_hex(key)),
            Self::Passphrase(passphrase) => {
                seal_with_passphrase(passphrase, key.expose_bytes(), VaultParams::RECOMMENDED, rng)
                    .map(Zeroizing::new)
                    .map_err(|error| KeyStoreError::from_vault(error, &path))?
            }
            Self::File => Zeroizing::new(format!("{}\n", *to_hex(key)).into_bytes()),
        };
        files::write_private(&path, &bytes).map_err(|source| KeyStoreError::Io { path, source })
    }
}

/// Chooses the store of a new home: the one asked for, or else the keychain, or else a passphrase.
pub(super) fn choose(
    asked: Option<KeyStoreKind>,
    passphrase: &PassphraseSource,
    keychain: &Keychain,
    rng: &mut impl CryptoRng,
) -> Result<(Chosen, Vec<Warning>), KeyStoreError> {
    match asked {
        Some(KeyStoreKind::Keychain) => {
            keychain.probe(rng)?;
            Ok((Chosen::Keychain, Vec::new()))
        }
        Some(KeyStoreKind::Passphrase) => Ok((Chosen::Passphrase(passphrase.get(Prompt::Choose)?), Vec::new())),
        Some(KeyStoreKind::File) => Ok((Chosen::File, Vec::new())),
        None => match keychain.probe(rng) {
            Ok(()) => {
                let unused = passphrase.is_explicit().then_some(Warning::PassphraseNotUsed);
                Ok((Chosen::Keychain, unused.into_iter().collect()))
            }
            Err(error) if passphrase.is_available() => {
                let warning = Warning::KeychainNotUsed { reason: error.reason() };
                Ok((Chosen::Passphrase(passphrase.get(Prompt::Choose)?), vec![warning]))
            }
            Err(error) => Err(KeyStoreError::NoneUsable { reason: error.reason() }),
        },
    }
}

/// Fetches the key of a home from where the home says it is.
pub(super) fn fetch(
    kind: KeyStoreKind,
    dir: &Path,
    entry: &str,
    passphrase: &PassphraseSource,
    keychain: &Keychain,
) -> Result<HomeKey, KeyStoreError> {
    let path = dir.join(KEY_FILE);
    match kind {
        KeyStoreKind::Keychain => keychain.get(entry),
        KeyStoreKind::File => {
            let bytes = read_key_file(&path)?;
            from_hex(bytes.trim_ascii_end()).ok_or(KeyStoreError::KeyFileDamaged { path })
        }
        KeyStoreKind::Passphrase => {
            // before anyone is asked to type
            let bytes = read_key_file(&path)?;
            let passphrase = passphrase.get(Prompt::Enter)?;
            let key =
                open_with_passphrase(&passphrase, &bytes).map_err(|error| KeyStoreError::from_vault(error, &path))?;
            Ok(HomeKey::from_bytes(*key))
        }
    }
}

/// The key as text, because KDE's wallet keeps nothing else.
fn to_hex(key: &HomeKey) -> Zeroizing<String> {
    Zeroizing::new(HEXLOWER.encode(key.expose_bytes()))
}

fn from_hex(hex: &[u8]) -> Option<HomeKey> {
    let mut bytes = Zeroizing::new([0; 32]);
    let right_length = HEXLOWER.decode_len(hex.len()) == Ok(bytes.len());
    (right_length && HEXLOWER.decode_mut(hex, &mut *bytes).is_ok()).then(|| HomeKey::from_bytes(*bytes))
}

fn read_key_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyStoreError::KeyFileMissing { path: path.to_owned() },
        io::ErrorKind::FileTooLarge => KeyStoreError::KeyFileDamaged { path: path.to_owned() },
        _ => KeyStoreError::Io { path: path.to_owned(), source },
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(KeyStoreError::KeyFileDamaged { path: path.to_owned() });
    }
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyStoreError::KeyFileExposed { path: path.to_owned(), mode });
        }
    }
    Ok(Zeroizing::new(files::read_bounded(path, MAX_KEY_FILE).map_err(failed)?))
}

type Connect = dyn Fn() -> keyring_core::Result<Arc<CredentialStore>> + Send + Sync;

/// The OS keychain.
///
/// Each use runs on a thread of its own: the Secret Service client starts a runtime, which it cannot from within
/// another, and a dialog nobody answers would hold us for ever.
#[derive(Clone)]
pub(super) struct Keychain {
    connect: Arc<Connect>,
    wait: Duration,
}

impl Keychain {
    /// The one of this system.
    pub(super) fn system() -> Self {
        Self { connect: Arc::new(connect), wait: KEYCHAIN_WAIT }
    }

    /// Forgets an entry; one that is not there is forgotten already.
    pub(super) fn forget(&self, entry: &str) -> Result<(), KeyStoreError> {
        self.on_entry(entry, |entry| match entry.delete_credential() {
            Err(keyring_core::Error::NoEntry) => Ok(()),
            other => other,
        })
    }

    /// Finds out whether an entry can be written, read back and deleted.
    fn probe(&self, rng: &mut impl CryptoRng) -> Result<(), KeyStoreError> {
        let name = format!("probe-{}", make_entry_name(rng));
        let text = make_entry_name(rng);
        let back = self.on_entry(&name, {
            let text = text.clone();
            move |entry| {
                entry.set_password(&text)?;
                let back = entry.get_password();
                entry.delete_credential()?;
                back
            }
        })?;
        if back == text { Ok(()) } else { Err(KeyStoreError::KeychainEntryDamaged { entry: name }) }
    }

    fn put(&self, entry: &str, hex: Zeroizing<String>) -> Result<(), KeyStoreError> {
        self.on_entry(entry, move |entry| entry.set_password(&hex))
    }

    fn get(&self, entry: &str) -> Result<HomeKey, KeyStoreError> {
        let hex = self.on_entry(entry, |entry| entry.get_password().map(Zeroizing::new))?;
        from_hex(hex.as_bytes()).ok_or_else(|| KeyStoreError::KeychainEntryDamaged { entry: entry.to_owned() })
    }

    fn on_entry<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce(&keyring_core::Entry) -> keyring_core::Result<T> + Send + 'static,
    ) -> Result<T, KeyStoreError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (connect, entry) = (self.connect.clone(), name.to_owned());
        thread::Builder::new()
            .name("keychain".to_owned())
            .spawn(move || {
                let result = connect().and_then(|store| work(&store.build(SERVICE, &entry, None)?));
                // nobody waits any more: the answer came too late
                let _ = sender.send(result);
            })
            .map_err(|e| KeyStoreError::KeychainUnavailable { source: platform_failure(e) })?;
        match receiver.recv_timeout(self.wait) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(KeyStoreError::from_keychain(error, name)),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(KeyStoreError::KeychainSilent { waited: self.wait }),
            Err(e @ mpsc::RecvTimeoutError::Disconnected) => {
                Err(KeyStoreError::KeychainUnavailable { source: platform_failure(e) })
            }
        }
    }
}

impl KeyStoreError {
    fn from_keychain(error: keyring_core::Error, entry: &str) -> Self {
        match error {
            keyring_core::Error::NoEntry => Self::KeychainEntryMissing { entry: entry.to_owned() },
            keyring_core::Error::BadEncoding(_) | keyring_core::Error::BadDataFormat(..) => {
                Self::KeychainEntryDamaged { entry: entry.to_owned() }
            }
            source @ keyring_core::Error::NoStorageAccess(_) => Self::KeychainLocked { source },
            source => Self::KeychainUnavailable { source },
        }
    }

    fn from_vault(error: VaultError, path: &Path) -> Self {
        let path = path.to_owned();
        match error {
            VaultError::WrongPassphrase => Self::WrongPassphrase,
            VaultError::UnsupportedVersion { .. } => Self::KeyFileTooNew { path },
            VaultError::ParametersOutOfBounds { .. } => Self::KeyFileParameters { path },
            VaultError::OutOfMemory(error) => Self::OutOfMemory(error),
            _ => Self::KeyFileDamaged { path },
        }
    }

    /// What is wrong, without the advice.
    fn reason(&self) -> String {
        match self {
            Self::KeychainUnavailable { source } => source.to_string(),
            Self::KeychainLocked { source } => format!("it is locked: {source}"),
            Self::KeychainSilent { waited } => format!("no answer within {} s", waited.as_secs()),
            Self::KeychainEntryMissing { .. } | Self::KeychainEntryDamaged { .. } => {
                "it does not give back what it was given".to_owned()
            }
            other => other.to_string(),
        }
    }
}

/// Draws the name of an entry, which says nothing about the home.
pub(super) fn make_entry_name(rng: &mut impl CryptoRng) -> String {
    let mut bytes = [0; 16];
    rng.fill_bytes(&mut bytes);
    HEXLOWER.encode(&bytes)
}

fn platform_failure(error: impl std::error::Error + Send + Sync + 'static) -> keyring_core::Error {
    keyring_core::Error::PlatformFailure(Box::new(error))
}

#[cfg(any(
    target_os = "linux",
    target_os = "freebsd",
    target_os = "openbsd",
    target_os = "netbsd",
    target_os = "dragonfly"
))]
fn connect() -> keyring_core::Result<Arc<CredentialStore>> {
    Ok(zbus_secret_service_keyring_store::Store::new()?)
}

#[cfg(target_os = "macos")]
fn connect() -> keyring_core::Result<Arc<CredentialStore>> {
    Ok(apple_native_keyring_store::keychain::Store::new()?)
}

#[cfg(windows)]
fn connect() -> keyring_core::Result<Arc<CredentialStore>> {
    Ok(windows_native_keyring_store::Store::new()?)
}

#[cfg(not(any(
    target_os = "linux",
    target_os = "freebsd",
    target_os = "openbsd",
    target_os = "netbsd",
    target_os = "dragonfly",
    target_os = "macos",
    windows
)))]
fn connect() -> keyring_core::Result<Arc<CredentialStore>> {
    Err(keyring_core::Error::NoDefaultStore)
}

#[cfg(test)]
mod tests {
    use super::super::testing::rng;
    use super::*;

    impl Keychain {
        /// One that is reached by `connect`.
        pub(in super::super) fn over(
            connect: impl Fn() -> keyring_core::Result<Arc<CredentialStore>> + Send + Sync + 'static,
        ) -> Self {
            Self { connect: Arc::new(connect), wait: KEYCHAIN_WAIT }
        }
    }

    #[test]
    fn a_kind_is_read_as_it_is_written() {
        for (kind, text) in [
            (KeyStoreKind::Keychain, "keychain"),
            (KeyStoreKind::Passphrase, "passphrase"),
            (KeyStoreKind::File, "file"),
        ] {
            assert_eq!(kind.to_string(), text);
            assert_eq!(text.parse::<KeyStoreKind>().expect("a kind"), kind);
        }
        let error = "Keychain".parse::<KeyStoreKind>().expect_err("no kind");
        assert_eq!(error.to_string(), "unknown key store \"Keychain\"; choose keychain, passphrase or file");
    }

    #[test]
    fn a_keychain_that_does_not_answer_is_not_waited_for_for_ever() {
        let (release, released) = mpsc::sync_channel::<()>(0);
        let released = std::sync::Mutex::new(released);
        let mut keychain = Keychain::over(move || {
            let _ = released.lock().expect("no panic").recv();
            Err(keyring_core::Error::NoDefaultStore)
        });
        keychain.wait = Duration::from_millis(50);
        let error = keychain.probe(&mut rng()).expect_err("silent");
        assert!(matches!(error, KeyStoreError::KeychainSilent { .. }), "{error}");
        drop(release);
    }

    #[test]
    fn a_keychain_client_that_panics_is_an_error() {
        let keychain = Keychain::over(|| panic!("a bug in the client, on purpose"));
        let error = keychain.probe(&mut rng()).expect_err("panicked");
        assert!(matches!(error, KeyStoreError::KeychainUnavailable { .. }), "{error}");
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let store = keyring_core::mock::Store::new().expect("a store");
        let keychain = Keychain::over({
            let store = store.clone();
            move || Ok(store.clone() as Arc<CredentialStore>)
        });
        keychain.probe(&mut rng()).expect("works");
        let creds = store.inner.lock().expect("no panic");
        let creds = creds.borrow();
        assert_eq!(creds.len(), 1, "the probe used one entry");
        assert!(creds[0].inner.lock().expect("no panic").borrow().secret.is_none());
    }
}
