//! Snapshots: what of a row goes into one, what a row becomes that takes one in, and whether one says what a row says.
//!
//! A snapshot covers of each author the entries up to a number. Of a path that it does not name it says that nothing is
//! there, and that whatever covered version says otherwise was superseded: that is the memory of the deletions in it.
//!
//! Two states are joined as states with a memory of their own are: what both hold stays, and what one holds alone stays
//! unless the other knew it, and so has seen what superseded it.

use std::collections::BTreeMap;

use sync_types::folder::{Dot, Node, Vector};
use sync_types::{AuthorId, Number};

use super::version::{Version, Versions};

/// Up to which number of each author the entries of a folder are covered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<AuthorId, Number>);

impl Coverage {
    /// Whether a version is covered.
    #[must_use]
    pub fn contains(&self, dot: Dot) -> bool {
        self.0.get(&dot.author).is_some_and(|number| dot.number() <= *number)
    }

    /// Whether an entry is covered.
    #[must_use]
    pub fn contains_entry(&self, author: &AuthorId, number: Number) -> bool {
        self.0.get(author).is_some_and(|last| number <= *last)
    }

    /// Up to which number of an author entries are covered; 0 for none.
    #[must_use]
    pub fn until(&self, author: &AuthorId) -> Number {
        self.0.get(author).copied().unwrap_or_default()
    }

    /// Whether it covers all that another one does.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        other.0.iter().all(|(author, number)| self.contains_entry(author, *number))
    }
}

impl FromIterator<(AuthorId, Number)> for Coverage {
    fn from_iter<I: IntoIterator<Item = (AuthorId, Number)>>(covered: I) -> Self {
        let mut numbers: BTreeMap<AuthorId, Number> = BTreeMap::new();
        for (author, number) in covered {
            let last = numbers.entry(author).or_default();
            *last = number.max(*last);
        }
        Self(numbers)
    }
}

/// Whether a row needs no place in a snapshot: nothing is there, and nothing that it has seen is still to come.
///
/// A deletion that has seen an entry beyond what is covered must stay, or that entry would bring back what it deleted.
#[must_use]
pub fn is_forgotten(row: &Versions, covered: &Coverage) -> bool {
    row.maximal().iter().all(|version| version.node == Node::Deleted) && row.reached().all(|dot| covered.contains(dot))
}

/// Takes in what a snapshot says of a path, nothing if it does not name it; whether that changed the row.
///
/// `known` tells whether the entry of a version was taken in here.
pub fn adopt(row: &mut Versions, snapshot: Option<&Versions>, covered: &Coverage, known: impl Fn(Dot) -> bool) -> bool {
    let mut changed = false;
    if let Some(snapshot) = snapshot {
        let held: Vec<Dot> = row.maximal().iter().map(|version| version.dot).collect();
        changed |= row.join_unless(snapshot, |version| !held.contains(&version.dot) && known(version.dot));
    }
    let said = snapshot.map_or(&[][..], Versions::maximal);
    let superseded = |version: &Version| {
        version.node != Node::Deleted
            && covered.contains(version.dot)
            && !said.iter().any(|said| said.dot == version.dot)
    };
    row.bury(superseded) || changed
}

/// The row of a path that was forgotten and at which something lies all the same, with what that has seen: if all of it is
/// covered it was deleted, and what lies there is to go. None of what was never told, or told later.
#[must_use]
pub fn remembered(seen: &Vector, covered: &Coverage) -> Option<Versions> {
    let dot = seen.iter().next().filter(|_| seen.iter().all(|dot| covered.contains(dot)))?;
    let mut row = Versions::default();
    row.insert(Version { dot, vector: seen.clone(), node: Node::Deleted, mode: 0, mtime: 0 });
    Some(row)
}

/// What comes of comparing a snapshot with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// It says what the row says, as far as it is covered.
    Same,
    /// It has seen beyond what it covers, and that is not here yet.
    Unknown,
    /// It leaves something out, or says what nobody wrote.
    Different,
}

/// Compares what a snapshot says of a path with a row that has taken in all that is covered, and maybe more.
#[must_use]
pub fn compare(row: &Versions, snapshot: Option<&Versions>, covered: &Coverage) -> Comparison {
    let said = snapshot.map_or(&[][..], Versions::maximal);
    let is_here = |version: &Version| row.maximal().contains(version) || row.has_superseded(version.dot);
    let is_live = |version: &&Version| version.node != Node::Deleted;
    // a deletion more or less is the same: one may have been forgotten
    let is_named = |version: &Version| match is_live(&version) {
        true => said.contains(version),
        false => said.iter().any(|said| said.dot == version.dot),
    };
    let made_up = |version: &Version| covered.contains(version.dot) && !is_here(version);
    if said.iter().filter(is_live).any(made_up) {
        return Comparison::Different;
    }
    // whoever writes a snapshot may have seen more than it covers, but then that is written somewhere
    let ahead = |dot: Dot| !covered.contains(dot) && !row.has_superseded(dot);
    let unknown = said.iter().any(|version| !covered.contains(version.dot) && !is_here(version))
        || snapshot.is_some_and(|snapshot| snapshot.superseded_dots().any(ahead));
    if unknown {
        return Comparison::Unknown;
    }
    // what was superseded here may stand there only if what did that is still to come for who takes the snapshot in
    let comes = |said: &Version| {
        let mut later = row.maximal().iter().filter(|version| !covered.contains(version.dot));
        later.any(|version| version.vector.contains(said.dot))
    };
    let outdated =
        |version: &Version| covered.contains(version.dot) && !row.maximal().contains(version) && !comes(version);
    let outweighs = snapshot.is_some_and(|said| said.heaviest().is_some() && said.heaviest() != row.heaviest());
    if said.iter().filter(is_live).any(outdated) || outweighs {
        let all_covered = row.reached().all(|dot| covered.contains(dot));
        return if all_covered { Comparison::Different } else { Comparison::Unknown };
    }
    let within = |version: &Version| version.vector.iter().all(|dot| covered.contains(dot));
    let left_out = |version: &Version| {
        let needed = version.node != Node::Deleted || !within(version);
        covered.contains(version.dot) && needed && !is_named(version)
    };
    if row.maximal().iter().any(left_out) { Comparison::Different } else { Comparison::Same }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use sync_types::folder::{Chunks, FileContent, Record, TreePath};

    use super::*;

    const AUTHORS: usize = 3;
    const PATHS: usize = 3;

    fn author(n: usize) -> AuthorId {
        AuthorId([u8::try_from(n + 1).expect("few"); 32])
    }

    fn file(n: u8) -> Node {
        Node::File(FileContent { size: 1, hash: [n; 32], chunks: Chunks::Whole })
    }

    /// What a record in an entry of its own says.
    #[derive(Debug, Clone)]
    struct Entry {
        author: usize,
        number: u64,
        path: usize,
        version: Version,
    }

    #[derive(Debug, Clone)]
    struct Snap {
        covered: Coverage,
        rows: BTreeMap<usize, Versions>,
    }

    #[derive(Debug, Clone, Default)]
    struct Device {
        rows: BTreeMap<usize, Versions>,
        taken: BTreeSet<(usize, u64)>,
        covered: Coverage,
    }

    impl Device {
        fn take(&mut self, entry: &Entry) {
            let (author, number) = (author(entry.author), Number(entry.number));
            if !self.covered.contains_entry(&author, number) && self.taken.insert((entry.author, entry.number)) {
                self.rows.entry(entry.path).or_default().insert(entry.version.clone());
            }
        }

        /// A snapshot of what it has taken in; it covers the beginning of each feed.
        fn snapshot(&self) -> Snap {
            let mut numbers: BTreeMap<usize, u64> = BTreeMap::new();
            for (author, number) in &self.taken {
                let last = numbers.entry(*author).or_default();
                if *number == *last + 1 {
                    *last = *number;
                }
            }
            numbers.retain(|_, last| *last > 0);
            let covered: Coverage = numbers.into_iter().map(|(n, last)| (author(n), Number(last))).collect();
            let named = self.rows.iter().filter(|(_, row)| !is_forgotten(row, &covered));
            let rows: BTreeMap<usize, Versions> = named.map(|(path, row)| (*path, row.clone())).collect();
            Snap { covered, rows }
        }

        fn has_all(&self, covered: &Coverage) -> bool {
            let mut entries = covered
                .0
                .iter()
                .flat_map(|(author, last)| (1..=last.0).map(|number| (usize::from(author.0[0]) - 1, number)));
            entries.all(|entry| self.taken.contains(&entry))
        }

        /// Adopts what it lacks, or compares; false where it holds the snapshot for a lie.
        fn settle(&mut self, snap: &Snap) -> bool {
            if self.has_all(&snap.covered) {
                if !snap.covered.covers(&self.covered) {
                    return true;
                }
                let empty = Versions::default();
                let row = |path| self.rows.get(&path).unwrap_or(&empty);
                let compared: Vec<Comparison> =
                    (0..PATHS).map(|path| compare(row(path), snap.rows.get(&path), &snap.covered)).collect();
                if compared.contains(&Comparison::Different) {
                    return false;
                }
                if compared.contains(&Comparison::Unknown) {
                    return true;
                }
            } else {
                for path in 0..PATHS {
                    let mut row = self.rows.remove(&path).unwrap_or_default();
                    let known = |dot: Dot| self.taken.contains(&(usize::from(dot.author.0[0]) - 1, dot.number().0));
                    adopt(&mut row, snap.rows.get(&path), &snap.covered, known);
                    if row.winner().is_some() {
                        assert_eq!(Versions::decode(&row.encode()).as_ref(), Ok(&row));
                        self.rows.insert(path, row);
                    }
                }
                for (author, last) in &snap.covered.0 {
                    self.taken.extend((1..=last.0).map(|number| (usize::from(author.0[0]) - 1, number)));
                }
            }
            self.covered = self.covered.0.clone().into_iter().chain(snap.covered.0.clone()).collect();
            let covered = self.covered.clone();
            self.rows.retain(|_, row| !is_forgotten(row, &covered));
            true
        }

        fn winners(&self) -> Vec<Option<Node>> {
            let winner = |path| self.rows.get(&path).and_then(Versions::winner).map(|winner| winner.node.clone());
            (0..PATHS).map(|path| winner(path).filter(|node| *node != Node::Deleted)).collect()
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// A device changes a path: what it has seen there is the basis.
        Write { device: usize, path: usize, content: Option<u8> },
        /// A device gets some of an author's entries, in order.
        Get { device: usize, author: usize, count: usize },
        /// A device gets one entry, whatever lacks before it.
        Stray { device: usize, at: usize },
        /// A device makes a snapshot.
        Snapshot { device: usize },
        /// A device meets a snapshot.
        Settle { device: usize, at: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let device = 0..AUTHORS;
        prop_oneof![
            4 => (device.clone(), 0..PATHS, proptest::option::weighted(0.6, 0u8..5))
                .prop_map(|(device, path, content)| Step::Write { device, path, content }),
            4 => (device.clone(), 0..AUTHORS, 1usize..9)
                .prop_map(|(device, author, count)| Step::Get { device, author, count }),
            1 => (device.clone(), 0usize..100).prop_map(|(device, at)| Step::Stray { device, at }),
            1 => device.clone().prop_map(|device| Step::Snapshot { device }),
            1 => (device, 0usize..10).prop_map(|(device, at)| Step::Settle { device, at }),
        ]
    }

    fn number_of(entries: &[Entry], author: usize) -> u64 {
        entries.iter().filter(|entry| entry.author == author).count() as u64
    }

    /// Runs a history; all entries, all snapshots, and the devices, none of which took a snapshot for a lie.
    fn run(steps: &[Step]) -> (Vec<Entry>, Vec<Snap>, Vec<Device>) {
        let (mut entries, mut snaps): (Vec<Entry>, Vec<Snap>) = (Vec::new(), Vec::new());
        let mut devices = vec![Device::default(); AUTHORS];
        for step in steps {
            match *step {
                Step::Write { device, path, content } => {
                    let number = number_of(&entries, device) + 1;
                    let basis = devices[device].rows.get(&path).map(Versions::agreed).unwrap_or_default();
                    let node = content.map_or(Node::Deleted, file);
                    let record = Record { path: TreePath::new("p").expect("a path"), node, mode: 0, mtime: 0, basis };
                    let version = Version::new(&record, Dot::new(author(device), Number(number), 0));
                    let entry = Entry { author: device, number, path, version };
                    devices[device].take(&entry);
                    entries.push(entry);
                }
                Step::Get { device, author, count } => {
                    let new = |entry: &&Entry| {
                        entry.author == author && !devices[device].taken.contains(&(entry.author, entry.number))
                    };
                    let new: Vec<Entry> = entries.iter().filter(new).take(count).cloned().collect();
                    new.iter().for_each(|entry| devices[device].take(entry));
                }
                Step::Stray { device, at } => {
                    if let Some(entry) = entries.get(at % entries.len().max(1)) {
                        devices[device].take(entry);
                    }
                }
                Step::Snapshot { device } => {
                    let snap = devices[device].snapshot();
                    assert!(devices[device].settle(&snap), "its own snapshot");
                    snaps.push(snap);
                }
                Step::Settle { device, at } => {
                    if let Some(snap) = snaps.get(at % snaps.len().max(1)) {
                        assert!(devices[device].settle(snap), "an honest snapshot");
                    }
                }
            }
        }
        (entries, snaps, devices)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn whoever_adopts_compares_or_reads_all_of_the_log_sees_the_same(
            steps in proptest::collection::vec(step(), 0..60),
            order in any::<u64>(),
        ) {
            let (entries, snaps, mut devices) = run(&steps);
            let mut full = Device::default();
            entries.iter().for_each(|entry| full.take(entry));
            // newcomers that get only a snapshot and what it does not cover, in another order
            for snap in &snaps {
                let mut newcomer = Device::default();
                prop_assert!(newcomer.settle(snap));
                devices.push(newcomer);
            }
            for (n, device) in devices.iter_mut().enumerate() {
                let mut left: Vec<&Entry> = entries.iter().collect();
                let turn = usize::try_from(order).unwrap_or(n) % left.len().max(1);
                left.rotate_left(turn);
                left.into_iter().for_each(|entry| device.take(entry));
                prop_assert_eq!(device.winners(), full.winners());
                // and whatever snapshot still comes changes nothing
                for snap in &snaps {
                    prop_assert!(device.settle(snap));
                }
                prop_assert_eq!(device.winners(), full.winners());
            }
        }

        #[test]
        fn a_snapshot_that_lies_is_not_agreed_with(
            steps in proptest::collection::vec(step(), 1..60),
            path in 0..PATHS,
            lie in 0u8..3,
        ) {
            let (entries, ..) = run(&steps);
            let mut full = Device::default();
            entries.iter().for_each(|entry| full.take(entry));
            let honest = full.snapshot();
            let mut lying = honest.clone();
            let said = lying.rows.get(&path).cloned();
            match (lie, said) {
                // a file is left out
                (0, Some(row)) if row.is_live() => {
                    lying.rows.remove(&path);
                }
                // a file is made up, in an entry that said something else
                (1, _) => {
                    let Some(entry) = entries.first() else { return Ok(()) };
                    let version = Version { node: file(99), ..entry.version.clone() };
                    let has_seen = full.rows.get(&path).is_some_and(|row| row.has_superseded(version.dot));
                    if has_seen {
                        return Ok(());
                    }
                    lying.rows.entry(path).or_default().insert(version);
                }
                // somebody is said to have seen what is still to come
                (2, _) => {
                    let basis: Vector = [Dot::new(author(2), Number(10_000), 0)].into_iter().collect();
                    let record =
                        Record { path: TreePath::new("p").expect("a path"), node: file(1), mode: 0, mtime: 0, basis };
                    if number_of(&entries, 0) == 0 {
                        return Ok(());
                    }
                    lying.rows.entry(path).or_default().insert(Version::new(&record, Dot::new(author(0), Number(1), 0)));
                }
                _ => return Ok(()),
            }
            let before = full.covered.clone();
            let believed = full.settle(&lying);
            // what is still to come may be written somewhere, so nothing is said and nothing dropped
            let unheard = if lie == 2 { full.covered == before } else { !believed };
            prop_assert!(unheard);
        }
    }

    #[test]
    fn a_snapshot_that_says_another_thing_under_the_same_dot_or_brings_back_or_outweighs_is_not_agreed_with() {
        let record = |node, basis: &[Dot]| Record {
            path: TreePath::new("p").expect("a path"),
            node,
            mode: 0,
            mtime: 0,
            basis: basis.iter().copied().collect(),
        };
        let row = |versions: &[&Version]| {
            let mut row = Versions::default();
            versions.iter().for_each(|version| {
                row.insert((*version).clone());
            });
            row
        };
        let (first, second) = (Dot::new(author(0), Number(5), 0), Dot::new(author(1), Number(9), 0));
        let covered: Coverage = [(author(0), Number(5)), (author(1), Number(9))].into_iter().collect();
        let before: Coverage = [(author(0), Number(5)), (author(1), Number(8))].into_iter().collect();
        let here = Version::new(&record(file(1), &[]), first);
        let twin = Version::new(&record(Node::Deleted, &[]), first);
        let gone = Version::new(&record(Node::Deleted, &[first]), second);
        let edit = Version::new(&record(file(2), &[first]), second);

        // a deletion in the place of what is there
        assert_eq!(compare(&row(&[&here]), Some(&row(&[&here])), &covered), Comparison::Same);
        assert_eq!(compare(&row(&[&here]), Some(&row(&[&twin])), &covered), Comparison::Different);
        // what was deleted or overwritten, in the place of nothing or of what is there
        let other = Version { node: file(99), ..here.clone() };
        for later in [&gone, &edit] {
            let superseded = row(&[&here, later]);
            for back in [&here, &other] {
                assert_eq!(compare(&superseded, Some(&row(&[back])), &covered), Comparison::Different);
            }
            // one that was written before that says so, and who takes it in gets what followed
            assert_eq!(compare(&superseded, Some(&row(&[&here])), &before), Comparison::Same);
            assert_eq!(compare(&superseded, Some(&superseded), &covered), Comparison::Same);
        }
        // one that has seen what is to come beyond what is covered, under a dot that is superseded here
        let vast: Vector = [first, Dot::new(author(2), Number(1 << 40), 0)].into_iter().collect();
        let heavy = Version { vector: vast, node: file(7), ..here.clone() };
        let mut outweighed = row(&[&edit]);
        assert!(outweighed.weigh(heavy));
        assert_eq!(compare(&row(&[&here, &edit]), Some(&outweighed), &covered), Comparison::Different);
    }

    #[test]
    fn a_deletion_that_has_seen_what_is_still_to_come_stays_in_the_snapshot() {
        let record = |node, basis: &[Dot]| Record {
            path: TreePath::new("p").expect("a path"),
            node,
            mode: 0,
            mtime: 0,
            basis: basis.iter().copied().collect(),
        };
        let (early, late) = (Dot::new(author(0), Number(1), 0), Dot::new(author(1), Number(7), 0));
        let gone = Version::new(&record(Node::Deleted, &[late]), early);
        let mut row = Versions::default();
        row.insert(gone);
        let covered: Coverage = [(author(0), Number(1)), (author(1), Number(6))].into_iter().collect();
        assert!(!is_forgotten(&row, &covered));
        let mut newcomer = Versions::default();
        adopt(&mut newcomer, Some(&row), &covered, |_| false);
        newcomer.insert(Version::new(&record(file(1), &[]), late));
        assert!(!newcomer.is_live());
        let covered: Coverage = [(author(0), Number(1)), (author(1), Number(7))].into_iter().collect();
        assert!(is_forgotten(&row, &covered));
    }

    #[test]
    fn what_lies_at_a_forgotten_path_goes_unless_it_is_new() {
        let covered: Coverage = [(author(0), Number(5))].into_iter().collect();
        let seen: Vector = [Dot::new(author(0), Number(3), 0)].into_iter().collect();
        let row = remembered(&seen, &covered).expect("it was deleted");
        assert!(!row.is_live() && row.covers(&seen));
        let later: Vector = seen.iter().chain([Dot::new(author(1), Number(1), 0)]).collect();
        assert_eq!(remembered(&later, &covered), None);
        assert_eq!(remembered(&Vector::default(), &covered), None);
    }

    #[test]
    fn an_edit_that_is_not_covered_stays_where_the_snapshot_says_that_nothing_is() {
        let record =
            |node, basis: Vector| Record { path: TreePath::new("p").expect("a path"), node, mode: 0, mtime: 0, basis };
        let covered: Coverage = [(author(0), Number(5))].into_iter().collect();
        let old = Version::new(&record(file(1), Vector::default()), Dot::new(author(0), Number(3), 0));
        let mut row = Versions::default();
        row.insert(old.clone());
        let mut untouched = row.clone();
        assert!(adopt(&mut untouched, None, &covered, |_| true));
        assert!(!untouched.is_live() && untouched.winner().is_some() && untouched.covers(&old.vector));
        let edit = Version::new(&record(file(2), old.vector.clone()), Dot::new(author(1), Number(1), 0));
        row.insert(edit.clone());
        assert!(!adopt(&mut row, None, &covered, |_| true));
        assert_eq!(row.winner(), Some(&edit));
        // one that was made beside it
        let mut beside = untouched.clone();
        assert!(beside.insert(Version { vector: [edit.dot].into_iter().collect(), ..edit.clone() }));
        assert_eq!(beside.winner().map(|winner| &winner.node), Some(&file(2)));
    }
}
