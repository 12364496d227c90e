//! Reading along never misses an entry, whatever happens meanwhile: checked against a model.

use std::collections::BTreeSet;

use proptest::prelude::*;
use sync_core::Selection;
use sync_types::{Cursor, EnvelopeHash, GroupId, Number, Scope};
use tempfile::TempDir;

use super::support::*;
use crate::{Db, Limits, StoreError};

/// Something that happens to the database.
#[derive(Debug, Clone)]
enum Step {
    /// Entries of our own.
    Append(u64),
    /// Some of bob's entries arrive, by index, in this order.
    Arrive(Vec<usize>),
    /// The later epoch becomes known.
    Learn,
    /// The app reads on.
    Read(usize),
    /// A peer reads on.
    Serve(usize),
    /// A command does all this and fails.
    Fail(Vec<usize>),
    /// A transaction is dropped before its commit.
    Abandon(Vec<usize>),
    /// The program starts anew.
    Reopen,
}

/// Bob's entries: some in the later epoch, the last ones of another branch.
const THEIRS: usize = 24;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let some = || proptest::collection::vec(0..THEIRS, 1..8);
    let step = prop_oneof![
        3 => (1..4u64).prop_map(Step::Append),
        4 => some().prop_map(Step::Arrive),
        1 => Just(Step::Learn),
        3 => (1..6usize).prop_map(Step::Read),
        3 => (1..6usize).prop_map(Step::Serve),
        1 => some().prop_map(Step::Fail),
        1 => some().prop_map(Step::Abandon),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

/// What should be true of the database.
#[derive(Default)]
struct Model {
    own: u64,
    own_hashes: BTreeSet<EnvelopeHash>,
    theirs: BTreeSet<usize>,
    learnt: bool,
}

/// Who reads along, and what reached it.
#[derive(Default)]
struct Follower {
    after: Cursor,
    seen: Vec<(Cursor, EnvelopeHash)>,
}

struct World {
    dir: TempDir,
    db: Option<Db>,
    group: GroupId,
    theirs: Vec<(Vec<u8>, bool)>,
    model: Model,
    app: Follower,
    peer: Follower,
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let (alice, bob) = (author(1), author(2));
        let (mut db, group) = founded(dir.path(), &alice);
        let writer = Writer { group, author: alice };
        let signed = sync_types::SignedOperation { seen: vec![], operation: admission(&bob) };
        let admit = new_entry(blob(u64::MAX), crate::Content::Membership(signed.encode()));
        db.write(|txn| txn.append(&group, &[admit], &writer)).unwrap();
        let mut feed = Feed::new(group, bob);
        let mut theirs = Vec::new();
        let mut branch = None;
        for n in 0..THEIRS {
            if n == THEIRS - 6 {
                branch = Some(feed.branch());
            }
            let on = match &mut branch {
                Some(branch) if n >= THEIRS - 3 => branch,
                _ => &mut feed,
            };
            let late = n % 4 == 3;
            on.epoch = if late { LATER } else { EPOCH };
            theirs.push((on.say(&n.to_string()), late));
        }
        let (model, app, peer) = Default::default();
        Self { dir, db: Some(db), group, theirs, model, app, peer }
    }

    fn db(&mut self) -> &mut Db {
        self.db.as_mut().unwrap()
    }

    fn batch(&self, which: &[usize]) -> Vec<Vec<u8>> {
        which.iter().map(|&at| self.theirs[at].0.clone()).collect()
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let (group, learnt) = (self.group, self.model.learnt);
        let readable = move |epoch| epoch == EPOCH || learnt;
        match step {
            Step::Append(count) => {
                let first = self.model.own + 1;
                let entries: Vec<_> = (first..first + count).map(|n| entry(blob(n), n.to_le_bytes())).collect();
                let writer = Writer { group, author: author(1) };
                let appended = self.db().write(|txn| txn.append(&group, &entries, &writer)).unwrap();
                for (at, appended) in appended.iter().enumerate() {
                    // number 1 is the admission
                    prop_assert_eq!(appended.number, Number(first + at as u64 + 1));
                    self.model.own_hashes.insert(appended.hash);
                }
                self.model.own += count;
            }
            Step::Arrive(which) => {
                let batch = self.batch(which);
                let done = self.db().write(|txn| txn.ingest(&group, &batch, None, None, &readable)).unwrap();
                let new: BTreeSet<_> = which.iter().copied().filter(|at| !self.model.theirs.contains(at)).collect();
                prop_assert_eq!((done.stored.len(), done.duplicates), (new.len(), which.len() - new.len()));
                prop_assert!(done.refused.is_empty());
                self.model.theirs.extend(new);
            }
            Step::Learn => {
                let waiting = self.model.theirs.iter().filter(|&&at| self.theirs[at].1 && !learnt).count();
                prop_assert_eq!(self.db().write(|txn| txn.epoch_readable(&group, LATER)).unwrap(), waiting);
                self.model.learnt = true;
            }
            Step::Read(limit) => {
                self.read(*limit);
            }
            Step::Serve(limit) => {
                self.serve(*limit);
            }
            Step::Fail(which) => {
                let batch = self.batch(which);
                let failed: Result<(), _> = self.db().write(|txn| {
                    txn.attempt(|txn| {
                        txn.ingest(&group, &batch, None, None, &readable)?;
                        txn.epoch_readable(&group, LATER)?;
                        Err(StoreError::UnknownPeer)
                    })
                });
                prop_assert!(failed.is_err());
            }
            Step::Abandon(which) => {
                let batch = self.batch(which);
                let mut txn = self.db().begin().unwrap();
                txn.ingest(&group, &batch, None, None, &readable).unwrap();
                txn.epoch_readable(&group, LATER).unwrap();
            }
            Step::Reopen => {
                self.db = None;
                self.db = Some(open(self.dir.path()));
            }
        }
        Ok(())
    }

    /// The app reads one batch on; true if there was more.
    fn read(&mut self, limit: usize) -> bool {
        let (group, after) = (self.group, self.app.after);
        let limits = Limits { entries: limit, bytes: 4096 };
        let batch = self.db().read(|reader| reader.read_sealed(&group, after, limits)).unwrap();
        self.app.seen.extend(batch.entries.iter().map(|entry| (entry.cursor, hash(&entry.bytes))));
        self.app.after = batch.max_cursor;
        batch.has_more
    }

    /// A peer reads one batch on; true if there was more.
    fn serve(&mut self, limit: usize) -> bool {
        let (group, after) = (self.group, self.peer.after);
        let limits = Limits { entries: limit, bytes: 4096 };
        let selection = Selection::everything(Scope::All);
        let batch = self.db().read(|reader| reader.read_after(&group, after, limits, &selection, None)).unwrap();
        let known = self.db().read(|reader| reader.check_at(&group, batch.max_cursor)).unwrap();
        assert_eq!(known, Some(batch.check));
        self.peer.seen.extend(batch.entries.iter().map(|entry| (entry.cursor, hash(&entry.envelope))));
        self.peer.after = batch.max_cursor;
        batch.has_more
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        while self.read(3) {}
        while self.serve(3) {}
        for follower in [&self.app, &self.peer] {
            prop_assert!(follower.seen.windows(2).all(|pair| pair[0].0 < pair[1].0), "cursors only grow");
        }
        let Model { own_hashes, theirs, learnt, .. } = &self.model;
        let all = &self.theirs;
        let of = |readable: bool| {
            let held = theirs.iter().filter(move |&&at| !readable || !all[at].1 || *learnt);
            held.map(|&at| hash(&all[at].0)).chain(own_hashes.iter().copied()).collect::<BTreeSet<_>>()
        };
        let app: Vec<_> = self.app.seen.iter().map(|(_, hash)| *hash).collect();
        prop_assert_eq!(app.len(), of(true).len(), "each once");
        prop_assert_eq!(app.into_iter().collect::<BTreeSet<_>>(), of(true));
        let peer: BTreeSet<_> = self.peer.seen.iter().map(|(_, hash)| *hash).collect();
        // and the admission
        prop_assert_eq!(peer.len(), of(false).len() + 1);
        prop_assert!(peer.is_superset(&of(false)));

        let group = self.group;
        let numbers: BTreeSet<u64> =
            theirs.iter().map(|&at| if at < THEIRS - 3 { at as u64 + 1 } else { at as u64 - 2 }).collect();
        let feed = self.db().read(|reader| reader.feed(&group, &author(2).id())).unwrap();
        let rows: i64 = self
            .db()
            .raw()
            .query_row("SELECT count(*) FROM feed_ranges r JOIN feeds f USING (feed) WHERE f.own = 0", [], |row| {
                row.get(0)
            })
            .unwrap();
        prop_assert_eq!(rows, i64::try_from(feed.held.ranges().len()).unwrap(), "no range is written twice");
        for number in 0..=THEIRS as u64 {
            prop_assert_eq!(feed.held.contains(Number(number)), numbers.contains(&number), "number {}", number);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn reading_along_never_misses_an_entry(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.step(step)?;
        }
        world.check()?;
    }
}
