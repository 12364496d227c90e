//! When so much goes at once that somebody is asked first.

use std::collections::BTreeMap;

use sync_types::folder::TreePath;

use super::reconcile::{Displaced, Plan};

/// Paths of which it is remembered that they changed lately; beyond that, changes are counted without a look at which.
const MAX_RECENT: usize = 1 << 16;
/// Milliseconds that are counted together beyond [`MAX_RECENT`].
const SLICE: u64 = 60_000;

/// When to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// More than so many of a hundred of the folder's files.
    pub percent: u8,
    /// And at least so many.
    pub least: u64,
    /// Of those that went in the last milliseconds, and those that wait.
    pub window: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { percent: 50, least: 20, window: 10 * 60_000 }
    }
}

/// How many files' content goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Files removed.
    pub deleted: u64,
    /// Files replaced.
    pub rewritten: u64,
}

impl Counts {
    /// What a plan takes away; what it moves, makes, or renames as a conflict is not counted.
    #[must_use]
    pub fn of(plan: &Plan) -> Self {
        let mut counts = Self::default();
        plan.displaced().for_each(|(_, how)| counts.add(how));
        counts
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.deleted.saturating_add(self.rewritten)
    }

    /// Counts one more.
    pub fn add(&mut self, how: Displaced) {
        let count = match how {
            Displaced::Deleted => &mut self.deleted,
            Displaced::Rewritten => &mut self.rewritten,
        };
        *count = count.saturating_add(1);
    }

    fn join(&mut self, other: Self) {
        self.deleted = self.deleted.saturating_add(other.deleted);
        self.rewritten = self.rewritten.saturating_add(other.rewritten);
    }
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is what happens every day.
    Go,
    /// Somebody is to say that it is meant.
    Hold {
        /// Files removed, those that went lately included.
        deleted: u64,
        /// Files replaced, those that went lately included.
        rewritten: u64,
        /// Files the folder had before.
        of: u64,
    },
}

/// Adds up what went lately and what waits, so that a mass change is one however it is cut into batches.
///
/// Times are milliseconds from any fixed beginning on a clock that does not go back.
#[derive(Debug, Clone)]
pub struct Guard {
    settings: Settings,
    recent: BTreeMap<u64, (u64, Displaced)>,
    more: BTreeMap<u64, Counts>,
    confirmed: u64,
    forgot: u64,
}

impl Guard {
    /// A guard that has seen nothing.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, recent: BTreeMap::new(), more: BTreeMap::new(), confirmed: 0, forgot: 0 }
    }

    /// Takes note of content that went from a path. A file that is rewritten again and again is one file.
    pub fn applied(&mut self, now: u64, path: &TreePath, how: Displaced) {
        if now.saturating_sub(self.forgot) >= SLICE {
            self.forget(now);
        }
        let id = id(path);
        if self.recent.len() < MAX_RECENT || self.recent.contains_key(&id) {
            self.recent.insert(id, (now, how));
        } else {
            self.more.entry(now / SLICE).or_default().add(how);
        }
    }

    /// Whether content went from a path lately, so that what waits there is counted already.
    #[must_use]
    pub fn is_counted(&self, now: u64, path: &TreePath) -> bool {
        self.recent.get(&id(path)).is_some_and(|(at, _)| *at >= self.since(now))
    }

    /// Judges what waits in a folder that has so many files on this disk; of what waits only what [is not counted
    /// already](Self::is_counted).
    pub fn check(&mut self, now: u64, files: u64, pending: Counts) -> Verdict {
        self.forget(now);
        let mut counts = self.lately();
        let of = files.saturating_add(counts.deleted);
        counts.join(pending);
        if counts.total() == 0 {
            self.confirmed = 0;
        }
        let Settings { percent, least, .. } = self.settings;
        let share = u128::from(counts.total()) * 100 > u128::from(of) * u128::from(percent);
        let unconfirmed = counts.total().saturating_sub(self.confirmed);
        if share && unconfirmed >= least.max(1) {
            let Counts { deleted, rewritten } = counts;
            return Verdict::Hold { deleted, rewritten, of };
        }
        Verdict::Go
    }

    /// Somebody said that what went lately and what waits now is meant; only what comes on top is counted, until all is
    /// done and forgotten.
    pub fn confirm(&mut self, now: u64, pending: Counts) {
        self.forget(now);
        let mut counts = self.lately();
        counts.join(pending);
        self.confirmed = counts.total();
    }

    fn lately(&self) -> Counts {
        let mut counts = Counts::default();
        self.recent.values().for_each(|(_, how)| counts.add(*how));
        self.more.values().for_each(|more| counts.join(*more));
        counts
    }

    fn since(&self, now: u64) -> u64 {
        now.saturating_sub(self.settings.window)
    }

    fn forget(&mut self, now: u64) {
        self.forgot = now;
        let since = self.since(now);
        self.recent.retain(|_, (at, _)| *at >= since);
        self.more.retain(|slice, _| *slice >= since / SLICE);
    }
}

/// Tells paths apart: two of one number would count as one, which nobody can bring about for many.
fn id(path: &TreePath) -> u64 {
    let hash = blake3::hash(path.as_str().as_bytes());
    let (id, _) = hash.as_bytes().split_first_chunk::<8>().expect("BUG: a hash is shorter than eight bytes");
    u64::from_le_bytes(*id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::folder::{Action, Change, Disk, plan};
    use sync_types::folder::{Chunks, FileContent, Node, Vector};

    const MINUTE: u64 = 60_000;

    fn path(n: u64) -> TreePath {
        TreePath::new(format!("f{n}")).expect("a path")
    }

    fn guard() -> Guard {
        Guard::new(Settings::default())
    }

    fn deleted(deleted: u64) -> Counts {
        Counts { deleted, rewritten: 0 }
    }

    fn holds(verdict: Verdict) -> bool {
        verdict != Verdict::Go
    }

    #[test]
    fn more_than_half_and_at_least_twenty() {
        for (files, pending, held) in [
            (19, deleted(19), false),
            (20, deleted(20), true),
            (40, deleted(20), false),
            (40, deleted(21), true),
            (40, Counts { deleted: 10, rewritten: 11 }, true),
            (1_000_000, deleted(500_000), false),
            (1_000_000, deleted(500_001), true),
            (0, Counts::default(), false),
            (u64::MAX, deleted(u64::MAX), true),
        ] {
            assert_eq!(holds(guard().check(0, files, pending)), held, "{files} {pending:?}");
        }
        let hold = Verdict::Hold { deleted: 10, rewritten: 11, of: 40 };
        assert_eq!(guard().check(0, 40, Counts { deleted: 10, rewritten: 11 }), hold);
    }

    #[test]
    fn small_batches_add_up() {
        let mut guard = guard();
        for n in 0..29 {
            assert_eq!(guard.check(n * 1000, 59 - n, deleted(1)), Verdict::Go);
            guard.applied(n * 1000, &path(n), Displaced::Deleted);
        }
        assert_eq!(guard.check(30_000, 30, deleted(1)), Verdict::Hold { deleted: 30, rewritten: 0, of: 59 });
        assert_eq!(guard.check(30_000 + 11 * MINUTE, 29, deleted(1)), Verdict::Go);
    }

    #[test]
    fn a_file_saved_again_and_again_is_one() {
        let mut guard = guard();
        for n in 0..500 {
            guard.applied(n * 1000, &path(n % 3), Displaced::Rewritten);
            assert_eq!(guard.check(n * 1000, 30, Counts { deleted: 0, rewritten: 1 }), Verdict::Go);
        }
    }

    #[test]
    fn what_waits_where_something_went_lately_is_counted_once() {
        let mut guard = guard();
        for now in 0..20 {
            let waits = (0..10).filter(|n| !guard.is_counted(now, &path(*n))).count() as u64;
            assert_eq!(waits, if now == 0 { 10 } else { 0 });
            assert_eq!(guard.check(now, 30, Counts { deleted: 0, rewritten: waits }), Verdict::Go);
            (0..10).for_each(|n| guard.applied(now, &path(n), Displaced::Rewritten));
        }
        assert!(!guard.is_counted(20 + 10 * MINUTE, &path(0)), "it is forgotten by then");
    }

    #[test]
    fn what_was_confirmed_is_not_asked_again() {
        let mut guard = guard();
        assert!(holds(guard.check(0, 100, deleted(80))));
        guard.confirm(0, deleted(80));
        for n in 0..80 {
            assert_eq!(guard.check(n, 100 - n, deleted(80 - n)), Verdict::Go);
            guard.applied(n, &path(n), Displaced::Deleted);
        }
        assert!(holds(guard.check(80, 20, deleted(20))), "what comes on top is asked again");
        assert_eq!(guard.check(20 * MINUTE, 20, deleted(0)), Verdict::Go);
        assert!(holds(guard.check(20 * MINUTE, 20, deleted(20))), "and so is what comes when all is done");
    }

    #[test]
    fn moves_and_new_files_are_not_counted() {
        let file = |n: u8| Disk {
            node: Node::File(FileContent { size: 9, hash: [n; 32], chunks: Chunks::Whole }),
            mode: 0o644,
            mtime: 0,
            vector: Vector::default(),
        };
        let change = |at, disk, action| Change { path: path(at), disk, action };
        let plan = plan(
            vec![
                change(1, Some(file(1)), Action::Remove),
                change(2, None, Action::Take(file(1))),
                change(3, None, Action::Take(file(3))),
                change(4, Some(file(4)), Action::Take(file(5))),
                change(6, Some(file(6)), Action::Remove),
            ],
            |_| vec![],
        );
        assert_eq!(Counts::of(&plan), Counts { deleted: 1, rewritten: 1 });
    }

    #[test]
    fn memory_is_bounded_and_nothing_is_forgotten_early() {
        let mut guard = guard();
        let count = MAX_RECENT as u64 + 5000;
        (0..count).for_each(|n| guard.applied(n / 1000, &path(n), Displaced::Deleted));
        (0..100).for_each(|n| guard.applied(count / 1000, &path(n), Displaced::Deleted));
        assert_eq!(guard.recent.len(), MAX_RECENT);
        assert_eq!(guard.check(MINUTE, 0, deleted(0)), Verdict::Hold { deleted: count, rewritten: 0, of: count });
        guard.applied(MINUTE * 12, &path(0), Displaced::Deleted);
        assert_eq!((guard.recent.len(), guard.more.len()), (1, 0));
    }

    proptest! {
        #[test]
        fn a_mass_change_is_one_however_it_is_cut(
            files in 1u64..300, goes in 0u64..300, cuts in proptest::collection::vec(1u64..60, 0..20),
        ) {
            let goes = goes.min(files);
            let at_once = holds(guard().check(0, files, deleted(goes)));
            let (mut guard, mut gone, mut held) = (guard(), 0, false);
            for cut in cuts.into_iter().chain([goes]) {
                let batch = cut.min(goes - gone);
                held |= holds(guard.check(gone, files - gone, deleted(batch)));
                (gone..gone + batch).for_each(|n| guard.applied(gone, &path(n), Displaced::Deleted));
                gone += batch;
            }
            prop_assert_eq!(held, at_once);
        }
    }
}
