//! What a folder leaves out: the patterns in its `.syncshellignore`, in gitignore syntax, and what is not selected here.

use std::io::{self, Read};

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use sync_types::folder::TreePath;

use crate::root::{Root, is_absent};
use crate::selection::Selection;
use crate::walk::stat_of;

/// The file in a folder's root with its patterns; it is synced like any other.
pub const IGNORE_FILE: &str = ".syncshellignore";

/// Bytes of an ignore file that are read: thousands of patterns, and a matcher whose building no peer can drag out.
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

/// What is ignored in a folder on this device.
#[derive(Debug, Clone)]
pub struct Ignored {
    patterns: Gitignore,
    invalid: Vec<InvalidLine>,
    selection: Selection,
}

impl Default for Ignored {
    fn default() -> Self {
        Self { patterns: Gitignore::empty(), invalid: Vec::new(), selection: Selection::default() }
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
        let patterns = builder.build().map_err(IgnoreError::Patterns)?;
        Ok(Self { patterns, invalid, selection: Selection::default() })
    }

    /// Leaves out what is not selected too.
    #[must_use]
    pub fn and_all_but(self, selection: Selection) -> Self {
        Self { selection, ..self }
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
        !self.selection.takes(path)
            || !self.patterns.is_empty()
                && (slashes.map(|(at, _)| &path.as_str()[..at]).any(|parent| self.is_match(parent, true))
                    || self.is_match(path.as_str(), is_dir))
    }

    /// Whether a path is ignored whose directories are known not to be.
    pub(crate) fn matches_itself(&self, path: &TreePath, is_dir: bool) -> bool {
        !self.selection.takes(path) || self.is_match(path.as_str(), is_dir)
    }

    fn is_match(&self, path: &str, is_dir: bool) -> bool {
        self.patterns.matched(path, is_dir).is_ignore()
    }
}

#[cfg(test)]
mod tests {
    use sync_types::FolderId;

    use super::*;

    fn matches(patterns: &str, path: &str, is_dir: bool) -> bool {
        let ignored = Ignored::parse(patterns.as_bytes()).expect("patterns");
        ignored.matches(&TreePath::new(path).expect("a path"), is_dir)
    }

    #[test]
    fn patterns_mean_what_they_mean_to_git() {
        for (patterns, path, is_dir, expected) in [
            ("", "a", false, false),
            ("# a\n\na", "a", false, true),
            ("a", "b/a", false, true),
            ("/a", "b/a", false, false),
            ("/a", "a/b/c", false, true),
            ("a/", "a", false, false),
            ("a/", "a", true, true),
            ("a/", "a/b", false, true),
            ("a/b", "c/a/b", false, false),
            ("*.o\n!keep.o", "x/keep.o", false, false),
            ("*.o\n!keep.o", "x/lose.o", false, true),
            ("a/\n!a/b", "a/b", false, true),
            ("a/*\n!a/b", "a/b", false, false),
            ("a/*\n!a/b", "a/c", false, true),
            ("**/x/*.tmp", "a/x/1.tmp", false, true),
            ("x?[0-9]", "xy7", false, true),
            ("a \r\nb\r\n", "b", false, true),
            ("\\#a", "#a", false, true),
            ("\u{feff}a", "a", false, true),
            ("Ä*", "b/Äpfel", true, true),
        ] {
            assert_eq!(matches(patterns, path, is_dir), expected, "{patterns:?} {path:?}");
        }
    }

    #[test]
    fn an_invalid_line_is_told_and_the_others_count() {
        let ignored = Ignored::parse(b"a\n{x\n\xff\nb").expect("patterns");
        assert_eq!(ignored.invalid().iter().map(|line| line.line).collect::<Vec<_>>(), [2, 3]);
        for name in ["a", "b"] {
            assert!(ignored.matches(&TreePath::new(name).expect("a path"), false), "{name}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_does_not_mean_that_nothing_is_ignored() {
        let temp = tempfile::tempdir().expect("a directory");
        let root = Root::create(temp.path(), &FolderId([7; 16])).expect("a root");
        let path = temp.path().join(IGNORE_FILE);
        let secret = TreePath::new("secret").expect("a path");
        assert!(!Ignored::load(&root).expect("no patterns").matches(&secret, false));
        std::fs::write(&path, "secret\n").expect("written");
        assert!(Ignored::load(&root).expect("patterns").matches(&secret, false));
        std::fs::write(&path, "secret\n".repeat(10_000)).expect("written");
        assert!(matches!(Ignored::load(&root), Err(IgnoreError::TooLong)));
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("made");
        assert!(matches!(Ignored::load(&root), Err(IgnoreError::NotAFile)));
        #[cfg(unix)]
        {
            std::fs::remove_dir(&path).expect("removed");
            std::os::unix::fs::symlink("/etc/hostname", &path).expect("linked");
            assert!(matches!(Ignored::load(&root), Err(IgnoreError::NotAFile)));
        }
    }

    #[test]
    fn the_longest_file_of_patterns_can_be_used() {
        let line = "**/a*b*c*d*/**/?[x-z]*.tmp\n";
        let most = usize::try_from(MAX_IGNORE_FILE).expect("a small number") / line.len();
        let ignored = Ignored::parse(line.repeat(most).as_bytes());
        assert!(ignored.is_ok_and(|ignored| ignored.matches(&TreePath::new("abcd/q/xy.tmp").expect("a path"), false)));
    }
}
