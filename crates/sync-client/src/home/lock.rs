//! The lock of a home: one process serves it at a time.
//!
//! The operating system holds the lock and drops it when the process ends, however it ends.
//! The text in the file only says who holds it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use super::{Home, LOCK_FILE};

/// Time between two tries for a lock that someone holds: short against what a person notices.
const POLL: Duration = Duration::from_millis(20);

/// Bytes of the holder's text that are read: a process id and a version.
const MAX_HOLDER: u64 = 128;

/// The right to serve a home, held until dropped.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct HomeLock {
    // closing it releases the lock
    _file: File,
}

/// Who holds the lock of a home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its version of this program.
    pub version: String,
}

/// Why the lock of a home was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process serves the home.
    #[error("the home is in use by {}; stop that process, or wait until it is done", in_words(.holder.as_ref()))]
    Busy {
        /// That process, where the system lets us read it.
        holder: Option<Holder>,
    },
    /// The lock file failed.
    #[error("the lock {path} cannot be used: {source}; the home needs a writable file system that has file locks", path = .path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

impl HomeLock {
    /// Takes the lock of `home`, waiting up to `wait` for another holder; blocks the thread.
    pub fn acquire(home: &Home, wait: Duration) -> Result<Self, LockError> {
        Self::acquire_in(home.path(), wait)
    }

    pub(super) fn acquire_in(dir: &Path, wait: Duration) -> Result<Self, LockError> {
        let path = dir.join(LOCK_FILE);
        let failed = |source| LockError::Io { path: path.clone(), source };
        let mut file = open(&path).map_err(failed)?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Err(TryLockError::WouldBlock) => {}
            }
            let left = wait.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(LockError::Busy { holder: Holder::read(&mut file) });
            }
            thread::sleep(left.min(POLL));
        }
        Holder::current().write(&mut file).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

impl Holder {
    fn current() -> Self {
        Self { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() }
    }

    fn write(&self, file: &mut File) -> io::Result<()> {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{} {}", self.pid, self.version)
    }

    /// Reads what the holder wrote; Windows does not let anyone else read a locked file.
    fn read(file: &mut File) -> Option<Self> {
        let mut text = String::new();
        file.rewind().ok()?;
        file.take(MAX_HOLDER).read_to_string(&mut text).ok()?;
        let (pid, version) = text.strip_suffix('\n')?.split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, version: version.to_owned() })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} (version {})", self.pid, self.version)
    }
}

fn in_words(holder: Option<&Holder>) -> String {
    holder.map_or_else(|| "another process".to_owned(), Holder::to_string)
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // the text of the present holder stays until the lock is ours
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;
    use std::process::Stdio;

    use super::super::testing;
    use super::*;

    const HOLD_IN: &str = "SYNCSHELL_TEST_HOLD_LOCK_IN";

    #[test]
    fn a_second_taker_is_told_who_holds_the_lock_and_gets_it_after_the_drop() {
        let dir = tempfile::tempdir().expect("a directory");
        let held = HomeLock::acquire_in(dir.path(), Duration::ZERO).expect("free");

        let error = HomeLock::acquire_in(dir.path(), Duration::ZERO).expect_err("held");
        let LockError::Busy { holder } = &error else { panic!("{error}") };
        if cfg!(unix) {
            assert_eq!(holder.as_ref(), Some(&Holder::current()));
            assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        }

        drop(held);
        drop(HomeLock::acquire_in(dir.path(), Duration::ZERO).expect("free again"));
    }

    #[test]
    fn a_taker_who_waits_gets_the_lock_when_it_is_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let held = HomeLock::acquire_in(dir.path(), Duration::ZERO).expect("free");
        thread::scope(|scope| {
            let waiter = scope.spawn(|| HomeLock::acquire_in(dir.path(), Duration::from_secs(60)));
            thread::sleep(POLL * 3);
            assert!(!waiter.is_finished());
            drop(held);
            drop(waiter.join().expect("no panic").expect("taken"));
        });
    }

    #[test]
    fn text_of_another_kind_in_the_lock_file_names_no_holder() {
        for text in ["", "12", "12 0.1", "x 0.1\n", "99999999999999 0.1\n", "\u{fffd}"] {
            let mut file = tempfile::tempfile().expect("a file");
            file.write_all(text.as_bytes()).expect("written");
            assert_eq!(Holder::read(&mut file), None, "{text:?}");
        }
    }

    #[test]
    fn killing_the_holder_releases_the_lock() {
        if let Some(dir) = std::env::var_os(HOLD_IN) {
            let _held = HomeLock::acquire_in(Path::new(&dir), Duration::ZERO).expect("free");
            println!("\nheld");
            thread::sleep(Duration::from_secs(600));
            return;
        }

        let dir = tempfile::tempdir().expect("a directory");
        let mut holder = testing::this_test("home::lock::tests::killing_the_holder_releases_the_lock")
            .env(HOLD_IN, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawned");
        let mut lines = io::BufReader::new(holder.stdout.take().expect("piped")).lines();
        assert!(lines.any(|line| line.expect("a line") == "held"), "the holder ended early");

        let error = HomeLock::acquire_in(dir.path(), Duration::ZERO).expect_err("held");
        if cfg!(unix) {
            assert!(error.to_string().contains(&holder.id().to_string()), "{error}");
        }

        holder.kill().expect("killed");
        holder.wait().expect("gone");
        drop(HomeLock::acquire_in(dir.path(), Duration::ZERO).expect("released"));
    }
}
