//! Where the passphrase of a home comes from; never from an argument, which every process could read.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::files;

/// Name of the systemd credential that holds the passphrase (`LoadCredential=syncshell.passphrase:…`).
pub const PASSPHRASE_CREDENTIAL: &str = "syncshell.passphrase";

/// Bytes of a passphrase: far more than anyone types, and little to read from a file named by mistake.
pub const MAX_PASSPHRASE: usize = 1024;

/// What a passphrase is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// To protect a new home; ask for it twice.
    Choose,
    /// To open a home.
    Enter,
}

type Ask = dyn Fn(Prompt) -> io::Result<Zeroizing<String>> + Send + Sync;

/// The ways to a passphrase; the first that is there is used: given, file, systemd credential, prompt.
#[derive(Default)]
pub struct PassphraseSource {
    given: Option<Zeroizing<String>>,
    file: Option<PathBuf>,
    credentials: Option<PathBuf>,
    ask: Option<Box<Ask>>,
}

/// Why there is no passphrase.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassphraseError {
    /// None of the ways is there.
    #[error(
        "a passphrase is needed and there is none: run this in a terminal, name a file with `--passphrase-file`, \
         or pass the systemd credential `{PASSPHRASE_CREDENTIAL}`"
    )]
    NoSource,
    /// It has no characters.
    #[error("the passphrase is empty; choose one of several words")]
    Empty,
    /// It is longer than [`MAX_PASSPHRASE`].
    #[error("the passphrase is longer than {MAX_PASSPHRASE} bytes; check that it comes from the right file")]
    TooLong,
    /// It is not UTF-8.
    #[error("the passphrase in {path} is not UTF-8 text; check that this is the right file", path = .path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("the passphrase file {path} cannot be read: {source}; check its name and permissions", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The person could not be asked.
    #[error(
        "the passphrase cannot be asked for: {source}; name a file with `--passphrase-file`, \
         or pass the systemd credential `{PASSPHRASE_CREDENTIAL}`"
    )]
    Prompt {
        /// What happened.
        source: io::Error,
    },
}

impl PassphraseSource {
    /// No way to a passphrase.
    pub fn none() -> Self {
        Self::default()
    }

    /// The systemd credential, where this process was started with one.
    pub fn system() -> Self {
        Self { credentials: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from), ..Self::default() }
    }

    /// Adds a passphrase that is known already.
    pub fn with_passphrase(mut self, passphrase: Zeroizing<String>) -> Self {
        self.given = Some(passphrase);
        self
    }

    /// Adds a file; a line end after the passphrase is not part of it.
    pub fn with_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// Adds a way to ask a person; leave it out where none is there.
    pub fn with_prompt(
        mut self,
        ask: impl Fn(Prompt) -> io::Result<Zeroizing<String>> + Send + Sync + 'static,
    ) -> Self {
        self.ask = Some(Box::new(ask));
        self
    }

    /// Whether someone named a passphrase for this very call.
    pub(super) fn is_explicit(&self) -> bool {
        self.given.is_some() || self.file.is_some()
    }

    /// Whether there is any way.
    pub(super) fn is_available(&self) -> bool {
        self.is_explicit() || self.credential().is_some() || self.ask.is_some()
    }

    pub(super) fn get(&self, prompt: Prompt) -> Result<Zeroizing<String>, PassphraseError> {
        let passphrase = if let Some(given) = &self.given {
            given.clone()
        } else if let Some(path) = &self.file {
            read(path)?
        } else if let Some(path) = self.credential() {
            read(&path)?
        } else if let Some(ask) = &self.ask {
            ask(prompt).map_err(|source| PassphraseError::Prompt { source })?
        } else {
            return Err(PassphraseError::NoSource);
        };
        match passphrase.len() {
            0 => Err(PassphraseError::Empty),
            1..=MAX_PASSPHRASE => Ok(passphrase),
            _ => Err(PassphraseError::TooLong),
        }
    }

    fn credential(&self) -> Option<PathBuf> {
        self.credentials.as_ref().map(|dir| dir.join(PASSPHRASE_CREDENTIAL)).filter(|path| path.exists())
    }
}

impl fmt::Debug for PassphraseSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassphraseSource")
            .field("given", &self.given.is_some())
            .field("file", &self.file)
            .field("credentials", &self.credentials)
            .field("ask", &self.ask.is_some())
            .finish()
    }
}

fn read(path: &Path) -> Result<Zeroizing<String>, PassphraseError> {
    // the passphrase and the line end behind it
    let bytes = files::read_bounded(path, MAX_PASSPHRASE + 2).map_err(|source| match source.kind() {
        io::ErrorKind::FileTooLarge => PassphraseError::TooLong,
        _ => PassphraseError::File { path: path.to_owned(), source },
    })?;
    let bytes = Zeroizing::new(bytes);
    let text = str::from_utf8(&bytes).map_err(|_| PassphraseError::NotText { path: path.to_owned() })?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    Ok(Zeroizing::new(text.strip_suffix('\r').unwrap_or(text).to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn given(text: &str) -> PassphraseSource {
        PassphraseSource::none().with_passphrase(Zeroizing::new(text.to_owned()))
    }

    fn from_file(bytes: &[u8]) -> Result<String, PassphraseError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pass");
        fs::write(&path, bytes).expect("written");
        PassphraseSource::none().with_file(path).get(Prompt::Enter).map(|text| text.to_string())
    }

    #[test]
    fn the_first_way_that_is_there_is_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        fs::write(&file, "from file").expect("written");

        let mut source = given("given").with_file(&file).with_prompt(|prompt| {
            assert_eq!(prompt, Prompt::Choose);
            Ok(Zeroizing::new("from prompt".to_owned()))
        });
        source.credentials = Some(dir.path().to_owned());
        let get = |source: &PassphraseSource| source.get(Prompt::Choose).expect("a passphrase").to_string();

        assert_eq!(get(&source), "given");
        source.given = None;
        assert_eq!(get(&source), "from file");
        source.file = None;
        assert_eq!(get(&source), "from prompt", "a directory without our credential is no way");
        fs::write(dir.path().join(PASSPHRASE_CREDENTIAL), "from systemd\n").expect("written");
        assert_eq!(get(&source), "from systemd");
        assert!(source.is_available() && !source.is_explicit());
        source.ask = None;
        source.credentials = None;
        assert!(!source.is_available());
        assert!(matches!(source.get(Prompt::Choose), Err(PassphraseError::NoSource)));
    }

    #[test]
    fn one_line_end_behind_the_passphrase_is_left_out() {
        for (bytes, expected) in [
            (&b"a b"[..], "a b"),
            (b"a b\n", "a b"),
            (b"a b\r\n", "a b"),
            (b" a b \n", " a b "),
            (b"a\n\n", "a\n"),
            ("pässe\n".as_bytes(), "pässe"),
        ] {
            assert_eq!(from_file(bytes).expect("text"), expected);
        }
    }

    #[test]
    fn an_empty_overlong_or_binary_passphrase_is_refused() {
        assert!(matches!(from_file(b""), Err(PassphraseError::Empty)));
        assert!(matches!(from_file(b"\n"), Err(PassphraseError::Empty)));
        assert!(matches!(from_file(&[0xff, 0xfe]), Err(PassphraseError::NotText { .. })));
        assert!(from_file(&[b'a'; MAX_PASSPHRASE]).is_ok());
        assert!(matches!(from_file(&[b'a'; MAX_PASSPHRASE + 1]), Err(PassphraseError::TooLong)));
        assert!(matches!(from_file(&vec![b'a'; 1 << 20]), Err(PassphraseError::TooLong)));
        assert!(matches!(given("").get(Prompt::Enter), Err(PassphraseError::Empty)));
    }

    #[test]
    fn a_named_file_that_cannot_be_read_is_an_error_and_not_a_reason_to_ask() {
        let dir = tempfile::tempdir().expect("a directory");
        let source = PassphraseSource::none()
            .with_file(dir.path().join("missing"))
            .with_prompt(|_| Ok(Zeroizing::new("from prompt".to_owned())));
        let error = source.get(Prompt::Enter).expect_err("missing");
        assert!(matches!(error, PassphraseError::File { .. }), "{error}");
        assert!(error.to_string().contains("missing"), "{error}");
    }

    #[test]
    fn debug_output_does_not_show_the_passphrase() {
        assert!(!format!("{:?}", given("hunter2")).contains("hunter2"));
    }
}
