//! What a folder leaves out: the patterns in its `.syncshellignore`, in gitignore syntax.

use std::io::{self, Read};

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use sync_types::folder::TreePath;

use crate::root::{Root, is_absent};
use crate::walk::stat_of;

/// The file in a folder's root with its patterns; it is synced like any other.
pub const IGNORE_FILE: &str = ".syncshellignore";

/// Bytes of an ignore file that are read: thousands of patterns, and a matcher that is built in well under a second.
pub const MAX_IGNORE_FILE: u64 = 64 << 10;

/// Why nobody can say what is ignored; nothing may be scanned then, or what should stay here would go out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IgnoreError {
    /// It is not a file.
    #[error("{IGNORE_FILE} is not a regular file; replace it by one or remove it")]
    NotAFile,
    /// It is longer than any list of patterns.
    #[error("{IGNORE_FILE} has more than {MAX_IGNORE_FILE} bytes; shorten it")]
    TooLong,
    /// Its patterns are too much together.
    #[error("the patterns in {IGNORE_FILE} cannot be used; simplify it: {0}")]
    Patterns(ignore::Error),
    /// The system refused.
    #[error("cannot read {IGNORE_FILE}: {0}")]
    Io(#[from] io::Error),
}

/// A line that is no pattern; the others count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidLine {
    /// Its number, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// What is ignored in a folder.
#[derive(Debug, Clone)]
pub struct Ignored {
    patterns: Gitignore,
    invalid: Vec<InvalidLine>,
}

impl Default for Ignored {
    fn default() -> Self {
        Self { patterns: Gitignore::empty(), invalid: Vec::new() }
    }
}

impl Ignored {
    /// Reads a folder's patterns; none where there is no such file.
    pub fn load(root: &Root) -> Result<Self, IgnoreError> {
        let path = TreePath::new(IGNORE_FILE).expect("BUG: the name is a path");
        let file = match root.open_file(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            // a symbolic link: what it leads to is none of our business
            Err(error) if is_absent(&error) => return Err(IgnoreError::NotAFile),
            Err(error) => return Err(error.into()),
        };
        if stat_of(&file)?.is_none_or(|stat| stat.kind != crate::walk::Kind::File) {
            return Err(IgnoreError::NotAFile);
        }
        let mut bytes = Vec::new();
        file.take(MAX_IGNORE_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_IGNORE_FILE {
            return Err(IgnoreError::TooLong);
        }
        Self::parse(&bytes)
    }

    /// Reads patterns, one in each line.
    pub fn parse(bytes: &[u8]) -> Result<Self, IgnoreError> {
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        let mut builder = GitignoreBuilder::new("");
        let mut invalid = Vec::new();
        for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let added = match std::str::from_utf8(line.strip_suffix(b"\r").unwrap_or(line)) {
                Ok(line) => builder.add_line(None, line).map(|_| ()).map_err(|error| error.to_string()),
                Err(_) => Err("it is not UTF-8".to_owned()),
            };
            if let Err(reason) = added {
                invalid.push(InvalidLine { line: number + 1, reason });
            }
        }
        Ok(Self { patterns: builder.build().map_err(IgnoreError::Patterns)?, invalid })
    }

    /// The lines that are no patterns.
    #[must_use]
    pub fn invalid(&self) -> &[InvalidLine] {
        &self.invalid
    }

    /// Whether a path is ignored, or a directory it lies in is: nothing below an ignored directory is taken back in.
    #[must_use]
    pub fn matches(&self, path: &TreePath, is_dir: bool) -> bool {
        let slashes = path.as_str().bytes().enumerate().filter(|(_, byte)| *byte == b'/');
        !self.patterns.is_empty()
            && (slashes.map(|(at, _)| &path.as_str()[..at]).any(|parent| self.is_match(parent, true))
                || self.is_match(path.as_str(), is_dir))
    }

    /// Whether a path is ignored whose directories are known not to be.
    pub(crate) fn matches_itself(&self, path: &TreePath, is_dir: bool) -> bool {
        self.is_match(path.as_str(), is_dir)
    }

    fn is_match(&self, path: &str, is_dir: bool) -> bool {
        self.patterns.matched(path, is_dir).is_ignore()
    }
}
