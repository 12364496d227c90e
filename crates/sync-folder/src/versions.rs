//! What was replaced or removed: kept in `.syncshell/versions/<yyyy-mm>/`, and thinned out with age.
//!
//! Whatever lay at a path is moved here in one step with what takes its place, so that no crash loses it. The engine
//! remembers the name under which it is kept; what no index names (a crash came first) is found by [`Versions::list`].

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cap_std::fs::Dir;
use sync_types::bounds::MAX_CHUNK;

use crate::apply::ApplyError;
use crate::apply::sys::{self, There};
use crate::root::{Root, VERSIONS_DIR};
use crate::walk::{Kind, Stat, stat_of};

/// Something that was replaced or removed, and where it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its name among the versions: a month, a slash, and a name of its own.
    pub name: String,
    /// When it came here, Unix seconds.
    pub at: i64,
    /// A file or a link.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// When it was changed last, Unix nanoseconds.
    pub mtime: i64,
    /// The text of a link, where it is text.
    pub target: Option<String>,
    /// Its inode, which it had where it lay.
    pub ino: u64,
}

/// What a folder keeps of what was replaced or removed.
#[derive(Debug, Clone)]
pub struct Versions {
    root: Arc<Root>,
}

impl Versions {
    /// The versions of a folder.
    #[must_use]
    pub fn new(root: Arc<Root>) -> Self {
        Self { root }
    }

    /// Opens a kept file for reading.
    pub fn open(&self, name: &str) -> Result<File, ApplyError> {
        let (month, own) = split(name)?;
        sys::open_entry(&self.month(month)?, own, Kind::File, false)
    }

    /// Reads a chunk of a kept file; none if that is not what it holds.
    pub fn read_chunk(
        &self,
        name: &str,
        offset: u64,
        len: u64,
        hash: &[u8; 32],
    ) -> Result<Option<Vec<u8>>, ApplyError> {
        let Some(len) = usize::try_from(len).ok().filter(|len| *len as u64 <= MAX_CHUNK) else { return Ok(None) };
        let file = self.open(name)?;
        let mut bytes = vec![0; len];
        let mut read = 0;
        while read < len {
            match sys::read_at(&file, &mut bytes[read..], offset.saturating_add(read as u64))? {
                0 => return Ok(None),
                more => read += more,
            }
        }
        Ok((blake3::hash(&bytes) == *hash).then_some(bytes))
    }

    /// What is kept under a name.
    pub fn get(&self, name: &str) -> Result<Kept, ApplyError> {
        let (month, own) = split(name)?;
        let month = self.month(month)?;
        match sys::look(&month, own)? {
            There::Entry(stat) => Ok(kept(&month, name, &stat)),
            There::Nothing => Err(ApplyError::Missing),
            There::Special => Err(ApplyError::Changed),
        }
    }

    /// Copies a kept file to a place outside the folder that the user chose; what is there already is left alone.
    pub fn copy_out(&self, name: &str, to: &Path) -> Result<(), ApplyError> {
        let from = self.open(name)?;
        let stat = stat_of(&from)?.ok_or(ApplyError::Changed)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(to)?;
        let copied = copy_whole(&from, &file, &stat);
        if copied.is_err() {
            // Half a file would look like the version that was asked for; it was made here, a moment ago.
            drop(file);
            std::fs::remove_file(to)?;
        }
        copied
    }

    /// Forgets a kept file or link.
    pub fn remove(&self, name: &str) -> Result<(), ApplyError> {
        let (month, own) = split(name)?;
        match self.month(month).and_then(|month| Ok(month.remove_file(own)?)) {
            Err(ApplyError::Missing) => Ok(()),
            other => other,
        }
    }

    /// Everything that is kept, oldest month first.
    pub fn list(&self) -> Result<Vec<Kept>, ApplyError> {
        let mut all = Vec::new();
        let versions = self.versions()?;
        for month in names(&versions)? {
            let Ok(dir) = sys::open_dir(&versions, &month) else { continue };
            for own in names(&dir)? {
                let name = format!("{month}/{own}");
                if let (Ok(_), There::Entry(stat)) = (split(&name), sys::look(&dir, &own)?) {
                    all.push(kept(&dir, &name, &stat));
                }
            }
        }
        Ok(all)
    }

    /// Removes the directories of past months that hold nothing any more.
    pub fn remove_empty_months(&self) -> Result<(), ApplyError> {
        let (versions, current) = (self.versions()?, month_of(now()));
        for month in names(&versions)?.into_iter().filter(|month| *month != current) {
            match versions.remove_dir(&month).map_err(ApplyError::from) {
                Ok(()) | Err(ApplyError::NotEmpty | ApplyError::Changed | ApplyError::Missing) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A name that nothing has, in the current month's directory.
    pub(crate) fn slot(&self) -> Result<Slot, ApplyError> {
        let at = now();
        let month = month_of(at);
        let (dir, is_new) = match self.month(&month) {
            Err(ApplyError::Missing) => (make_own_dir(&self.versions()?, &month)?, true),
            other => (other?, false),
        };
        let name = format!("{at}-{}", random_name()?);
        Ok(Slot { dir, month, name, is_new })
    }

    fn versions(&self) -> Result<Dir, ApplyError> {
        own_dir(&self.root, VERSIONS_DIR)
    }

    fn month(&self, month: &str) -> Result<Dir, ApplyError> {
        sys::open_dir(self.root.own_dir(), &format!("{VERSIONS_DIR}/{month}"))
    }
}

/// Where something is going to be kept.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) dir: Dir,
    pub(crate) month: String,
    pub(crate) name: String,
    /// The month's directory was made for it.
    pub(crate) is_new: bool,
}

impl Slot {
    /// What came to lie there.
    pub(crate) fn kept(&self, stat: &Stat) -> Kept {
        kept(&self.dir, &format!("{}/{}", self.month, self.name), stat)
    }
}

/// A directory of our own below the folder's root, made again if someone removed it.
pub(crate) fn own_dir(root: &Root, name: &str) -> Result<Dir, ApplyError> {
    match sys::open_dir(root.own_dir(), name) {
        Err(ApplyError::Missing) => make_own_dir(root.own_dir(), name),
        other => other,
    }
}

/// Another thread may be faster.
fn make_own_dir(own: &Dir, name: &str) -> Result<Dir, ApplyError> {
    match sys::make_dir(own, name, 0o700) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.into()),
        _ => sys::open_dir(own, name),
    }
}

/// A name that nobody guesses and nothing has.
pub(crate) fn random_name() -> Result<String, ApplyError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| ApplyError::Io(io::Error::other(error)))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// Which versions of one path go, as places in `kept_at` (Unix seconds, ascending): the staggered keep.
///
/// For an hour one stays of every 30 seconds, for a day one of every hour, for 30 days one of every day, for a year one
/// of every week. The last one replaced stays, whatever was replaced shortly before it and however old it is.
#[must_use]
pub fn thin(now: i64, kept_at: &[i64]) -> Vec<usize> {
    let mut last_age = None;
    let mut drop = Vec::new();
    for (index, at) in kept_at.iter().enumerate() {
        // A time still to come is a clock that was set back.
        let age = now.saturating_sub(*at).max(0);
        if index + 1 == kept_at.len() {
            break;
        }
        let Some((_, step)) = STEPS.iter().find(|(until, _)| age < *until) else {
            drop.push(index);
            continue;
        };
        if last_age.is_some_and(|last: i64| last - age < *step) {
            drop.push(index);
        } else {
            last_age = Some(age);
        }
    }
    drop
}

/// Seconds up to which an age goes, and how far apart versions of that age are at least.
const STEPS: [(i64, i64); 4] =
    [(HOUR, 30), (24 * HOUR, HOUR), (30 * 24 * HOUR, 24 * HOUR), (365 * 24 * HOUR, 168 * HOUR)];
const HOUR: i64 = 3600;

fn kept(dir: &Dir, name: &str, stat: &Stat) -> Kept {
    let target = match stat.kind {
        Kind::Symlink => {
            dir.read_link_contents(own_part(name)).ok().and_then(|target| target.into_os_string().into_string().ok())
        }
        _ => None,
    };
    let at = own_part(name).split('-').next().and_then(|at| at.parse().ok()).unwrap_or_default();
    let Stat { kind, size, mode, mtime, ino } = *stat;
    Kept { name: name.to_owned(), at, kind, size, mode, mtime, target, ino }
}

fn own_part(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Month and own part of a name that this module gave.
fn split(name: &str) -> Result<(&str, &str), ApplyError> {
    let is_ours = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    name.split_once('/').filter(|(month, own)| is_ours(month) && is_ours(own)).ok_or(ApplyError::Missing)
}

fn names(dir: &Dir) -> Result<Vec<String>, ApplyError> {
    let mut names = Vec::new();
    for entry in dir.read_dir(".")? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

fn copy_whole(from: &File, to: &File, stat: &Stat) -> Result<(), ApplyError> {
    if sys::copy_range(from, 0, to, 0, stat.size)? != stat.size {
        return Err(ApplyError::Changed);
    }
    sys::set_mode(to, stat.mode)?;
    sys::set_mtime(to, stat.mtime)?;
    Ok(sys::sync_file(to, true)?)
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Year and month of a time, in UTC: `civil_from_days` of Howard Hinnant's "chrono-compatible low-level date algorithms".
fn month_of(at: i64) -> String {
    let days = at.div_euclid(24 * HOUR) + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let month = if month < 10 { month + 3 } else { month - 9 };
    format!("{:04}-{month:02}", year + era * 400 + i64::from(month <= 2))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sync_types::FolderId;

    use super::*;

    const NOW: i64 = 1_763_731_500;

    #[test]
    fn months_are_those_of_the_calendar() {
        for (at, month) in [
            (0, "1970-01"),
            (-1, "1969-12"),
            (951_782_399, "2000-02"),
            (951_868_800, "2000-03"),
            (1_764_547_199, "2025-11"),
            (1_764_547_200, "2025-12"),
            (4_107_542_400, "2100-03"),
        ] {
            assert_eq!(month_of(at), month, "{at}");
        }
    }

    #[test]
    fn only_names_of_our_own_lead_anywhere() {
        let home = tempfile::tempdir().expect("a directory");
        let root = Root::create(home.path(), &FolderId([7; 16])).expect("a root");
        let versions = Versions::new(Arc::new(root));
        for name in ["", "/", "2026-11", "../folder", "2026-11/..", "2026-11/a/b", "/etc/passwd", "./x", "2026-11/"] {
            assert!(matches!(versions.open(name), Err(ApplyError::Missing)), "{name}");
            assert!(versions.get(name).is_err() && versions.remove(name).is_err(), "{name}");
        }
        assert!(home.path().join(".syncshell/folder").exists());
    }

    #[test]
    fn what_is_forgotten_leaves_no_empty_month() {
        let home = tempfile::tempdir().expect("a directory");
        let versions = Versions::new(Arc::new(Root::create(home.path(), &FolderId([7; 16])).expect("a root")));
        let months = home.path().join(".syncshell/versions");
        std::fs::create_dir_all(months.join("2001-01")).expect("a directory");
        std::fs::write(months.join("2001-01/979000000-a"), "kept").expect("a file");
        let slot = versions.slot().expect("a slot");
        versions.remove_empty_months().expect("removed");
        let listed = versions.list().expect("a list");
        assert_eq!(
            listed.iter().map(|kept| (kept.name.as_str(), kept.at)).collect::<Vec<_>>(),
            [("2001-01/979000000-a", 979_000_000)]
        );
        versions.remove("2001-01/979000000-a").expect("removed");
        versions.remove("2001-01/979000000-a").expect("gone already");
        versions.remove_empty_months().expect("removed");
        assert!(!months.join("2001-01").exists() && months.join(slot.month).exists());
    }

    #[test]
    fn versions_thin_out_with_age() {
        let ages = |ages: &[i64]| ages.iter().map(|age| NOW - age).collect::<Vec<_>>();
        for (kept, drop, why) in [
            (vec![], vec![], "nothing"),
            (vec![400 * 86_400], vec![], "more than a year old, but the newest"),
            (vec![400 * 86_400, 364 * 86_400, 0], vec![0], "more than a year old, and less"),
            (vec![100, 80, 60, 40, 0], vec![1, 3], "30 seconds apart, and the newest"),
            (vec![100, 99, 98], vec![1], "the newest stays whatever came before"),
            (vec![7300, 7200, 3700, 3600, 3599], vec![1, 3], "an hour apart, then 30 seconds"),
            (vec![3 * 86_400, 3 * 86_400 - 3600, 2 * 86_400, 90_000], vec![1], "a day apart"),
            (vec![50 * 86_400, 44 * 86_400, 43 * 86_400, 40 * 86_400], vec![1], "a week apart, and the newest"),
            (vec![10, -500], vec![], "a clock that was set back"),
        ] {
            assert_eq!(thin(NOW, &ages(&kept)), drop, "{why}");
        }
    }

    proptest! {
        #[test]
        fn thinning_twice_drops_nothing_more(mut ages in proptest::collection::vec(-100i64..40_000_000, 0..60)) {
            ages.sort_unstable_by(|a, b| b.cmp(a));
            let kept: Vec<_> = ages.iter().map(|age| NOW - age).collect();
            let drop = thin(NOW, &kept);
            let left: Vec<_> = kept.iter().enumerate().filter(|(at, _)| !drop.contains(at)).map(|(_, at)| *at).collect();
            prop_assert_eq!(thin(NOW, &left), Vec::<usize>::new());
            prop_assert_eq!(left.last(), kept.last());
            prop_assert!(left.len() <= 120 + 24 + 30 + 53 + 5);
        }
    }
}
