//! Snapshots: what is dropped, what of it still counts as held, and what a newcomer holds without having had it.

use proptest::prelude::*;
use sync_types::{
    AuthorId, BlobId, Cursor, EnvelopeHash, FeedHave, FolderId, GroupId, Number, Range, ReplicaId, Scope,
};
use tempfile::TempDir;

use super::support::*;
use crate::{Compaction, Db, Dropped, FolderRowId, RangeHere, SnapshotChunk, SnapshotState, StoreError};

const FOLDER: FolderId = FolderId([7; 16]);

fn range(first: u64, last: u64) -> Range {
    Range { first: Number(first), last: Number(last) }
}

/// A database of a group with two authors and a folder; the founder writes here.
struct Home {
    _dir: TempDir,
    db: Db,
    group: GroupId,
    fid: FolderRowId,
}

impl Home {
    fn new(admission: &[Vec<u8>]) -> Self {
        let dir = TempDir::new().unwrap();
        let (mut db, group) = founded(dir.path(), &author(1));
        ingest(&mut db, &group, admission).unwrap();
        let fid = db.write(|txn| txn.add_folder(&group, &FOLDER, "folder")).unwrap();
        Self { _dir: dir, db, group, fid }
    }

    /// Notes that entries of an author were taken into the folder.
    fn take(&mut self, author: AuthorId, numbers: impl IntoIterator<Item = u64>) {
        let (group, fid) = (self.group, self.fid);
        let numbers: Vec<u64> = numbers.into_iter().collect();
        let note = |txn: &mut crate::Txn<'_>| {
            numbers.iter().try_for_each(|n| txn.note_taken(fid, &group, &author, Number(*n), 1).map(|_| ()))
        };
        self.db.write(note).unwrap();
    }

    /// A snapshot is complete that covers an author's entries up to a number.
    fn cover(&mut self, author: AuthorId, number: u64) {
        let (group, fid) = (self.group, self.fid);
        let complete = |txn: &mut crate::Txn<'_>| {
            let sid = txn.add_snapshot(fid, &group, Some((author, Number(number))), b"body")?;
            txn.complete_snapshot(fid, sid, &group, &[(author, Number(number))], true)
        };
        self.db.write(complete).unwrap();
    }

    fn drop_covered(&mut self, limit: usize) -> Dropped {
        let (group, fid) = (self.group, self.fid);
        self.db.write(|txn| txn.drop_covered(fid, &group, limit)).unwrap()
    }

    fn adopt(&mut self, author: AuthorId, adopted: Range, head: EnvelopeHash) {
        let (group, fid) = (self.group, self.fid);
        self.db.write(|txn| txn.adopt_ranges(fid, &group, &author, &[(adopted, head)])).unwrap();
    }

    fn have(&self) -> Vec<FeedHave> {
        self.db.read(|reader| reader.have(&self.group)).unwrap()
    }

    fn have_of(&self, author: AuthorId) -> FeedHave {
        self.have().into_iter().find(|feed| feed.author == author).unwrap()
    }

    fn log(&self) -> Compaction {
        self.db.read(|reader| reader.compaction(&self.group)).unwrap()
    }

    fn knows_more(&self, have: &[FeedHave]) -> bool {
        self.db.read(|reader| reader.knows_more(&self.group, have)).unwrap()
    }
}

fn want(author: AuthorId, first: u64, last: u64) -> sync_types::Want {
    sync_types::Want { author, range: range(first, last) }
}

/// The admission of the second author, and its feed's first entries.
fn feed(len: usize) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let group = GroupId::of(&charter(&author(1), 1));
    let admission = Feed::new(group, author(1)).admit(&author(2));
    let mut feed = Feed::new(group, author(2));
    (vec![admission], (0..len).map(|n| feed.say(&n.to_string())).collect())
}

#[test]
fn what_is_covered_is_dropped_and_still_counts_as_held() {
    let (admission, said) = feed(20);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    ingest(&mut home.db, &home.group, &said).unwrap();
    // 11 is an app's
    home.take(bob, (1..=10).chain(12..=20));
    let (have, before) = (home.have(), home.log());
    home.cover(bob, 18);
    let first = home.drop_covered(5);
    assert_eq!(first.entries, 5);
    let rest = home.drop_covered(1000);
    assert_eq!((rest.entries, home.drop_covered(1000).entries), (11, 0));
    let after = home.log();
    // beside the admission: the app's, the last one that is covered, and what is not
    assert_eq!((after.entries, after.dropped), (5, 16));
    assert_eq!(after.bytes + first.bytes + rest.bytes, before.bytes);
    assert!(first.bytes > 1000);
    assert_eq!(home.have(), have);
    let group = home.group;
    assert!(home.db.read(|reader| reader.wants(&group)).unwrap().is_empty());
    let hashes = |n| home.db.read(|reader| reader.hashes_at(&group, &bob, Number(n))).unwrap();
    assert_eq!(hashes(10), [hash(&said[9])], "the end of a run");
    assert_eq!(hashes(17), [hash(&said[16])]);
    assert_eq!(hashes(5), []);
    assert!(home.db.read(|reader| reader.holds_from(&group)).unwrap() > Cursor(10));

    // what was dropped comes again and is not taken
    let again = ingest(&mut home.db, &home.group, &said).unwrap();
    assert_eq!((again.duplicates, again.stored.len(), again.refused.len(), again.forks.len()), (20, 0, 0, 0));
    assert_eq!(home.log(), after);
}

#[test]
fn what_nobody_has_acknowledged_is_neither_dropped_nor_held_back() {
    let alice = author(1).id();
    let mut home = Home::new(&[]);
    let group = home.group;
    let writer = Writer { group, author: author(1) };
    let entries: Vec<_> = (0..10).map(|n| entry(blob(n), n.to_string())).collect();
    home.db.write(|txn| txn.append(&group, &entries, &writer)).unwrap();
    home.take(alice, 1..=10);
    home.cover(alice, 10);
    assert_eq!(home.drop_covered(100).entries, 0);
    let pending = home.db.read(|reader| reader.unacked(&group)).unwrap();
    assert_eq!(pending, 10);
    // it is sent as ever: whoever has a snapshot of its own that covers less has no other way to it
    let everything = sync_core::Selection::everything(Scope::All);
    let sent = home.db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &everything, None)).unwrap();
    assert_eq!((sent.entries.len(), sent.max_cursor), (10, Cursor(10)));
    assert_eq!(home.db.read(|reader| reader.entries_at(&group, &[want(alice, 1, 9)], ALL)).unwrap().len(), 9);
    let acknowledge = |txn: &mut crate::Txn<'_>| {
        let peer = txn.peer(&group, &ReplicaId([5; 16]))?;
        txn.record_ack(&group, peer, Cursor(6))
    };
    home.db.write(acknowledge).unwrap();
    assert_eq!(home.drop_covered(100).entries, 6);
    assert_eq!(home.db.read(|reader| reader.unacked(&group)).unwrap(), pending - 6);
}

#[test]
fn what_was_covered_in_a_database_that_went_back_is_issued_again() {
    let (alice, new) = (author(1), author(11));
    let mut home = Home::new(&[]);
    let (group, fid) = (home.group, home.fid);
    let writer = Writer { group, author: alice.clone() };
    let entries: Vec<_> = (0..10).map(|n| entry(blob(n), n.to_string())).collect();
    home.db.write(|txn| txn.append(&group, &entries, &writer)).unwrap();
    let acknowledge = |txn: &mut crate::Txn<'_>| {
        let peer = txn.peer(&group, &ReplicaId([5; 16]))?;
        txn.record_ack(&group, peer, Cursor(4))
    };
    home.db.write(acknowledge).unwrap();
    // all but the last are records, and that is the snapshot
    home.take(alice.id(), 1..=10);
    let complete = |txn: &mut crate::Txn<'_>| {
        let sid = txn.add_snapshot(fid, &group, Some((alice.id(), Number(10))), b"body")?;
        txn.complete_snapshot(fid, sid, &group, &[(alice.id(), Number(9))], true)
    };
    home.db.write(complete).unwrap();
    assert_eq!(home.drop_covered(100).entries, 4);
    // others have written 5 and 6 under this name
    let succession = succession(group, &alice, &new);
    let sealer = Writer { group, author: new.clone() };
    let reopen = |bytes: &[u8], _: Number| {
        let envelope = sync_types::Envelope::parse(bytes).unwrap();
        Ok(Some(entry(envelope.header.blob_id, envelope.payload().to_vec())))
    };
    let renewal = crate::Renewal { succession: &succession, sealer: &sealer, reopen: Some(&reopen) };
    let renewed = home.db.write(|txn| txn.renew_author(&group, &renewal)).unwrap();
    let reissued: Vec<_> = renewed.reissued.iter().map(|(old, new)| (old.0, new.number.0)).collect();
    assert_eq!(reissued, [(5, 2), (6, 3), (7, 4), (8, 5), (9, 6)], "not the snapshot");
    assert_eq!(home.have_of(alice.id()).ranges, [range(1, 4)]);
    assert_eq!(home.db.read(|reader| reader.covered(fid)).unwrap(), [(alice.id(), Number(4))]);
    assert!(home.db.read(|reader| reader.snapshots(fid)).unwrap().is_empty());
    assert!(home.db.read(|reader| reader.since_snapshot(fid)).unwrap().entries > 1 << 40);
    home.take(alice.id(), [5]);
    assert_eq!(
        home.db.read(|reader| reader.last_taken(fid, &group, &alice.id(), Number(99))).unwrap(),
        Some(Number(5))
    );
}

#[test]
fn what_a_snapshot_covers_that_was_only_believed_is_not_dropped() {
    let (admission, said) = feed(6);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    let (group, fid) = (home.group, home.fid);
    ingest(&mut home.db, &group, &said).unwrap();
    home.take(bob, 1..=6);
    let adopt = |txn: &mut crate::Txn<'_>| {
        let sid = txn.add_snapshot(fid, &group, Some((bob, Number(6))), b"body")?;
        txn.begin_adoption(fid, sid, &group, &[(bob, Number(6))])?;
        txn.complete_snapshot(fid, sid, &group, &[(bob, Number(6))], false)
    };
    home.db.write(adopt).unwrap();
    assert_eq!(home.db.read(|reader| reader.covered(fid)).unwrap(), [(bob, Number(6))]);
    assert_eq!(home.drop_covered(100).entries, 0);
    home.cover(bob, 4);
    assert_eq!(home.drop_covered(100).entries, 3);
}

#[test]
fn a_snapshot_that_was_replaced_meanwhile_covers_nothing() {
    let (admission, said) = feed(6);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    let (group, fid) = (home.group, home.fid);
    ingest(&mut home.db, &group, &said).unwrap();
    home.take(bob, 1..=6);
    let add = |txn: &mut crate::Txn<'_>| txn.add_snapshot(fid, &group, Some((bob, Number(6))), b"body");
    let covered = [(bob, Number(5))];
    let gone = home.db.write(add).unwrap();
    home.db.write(|txn| txn.remove_snapshot(gone)).unwrap();
    let refused = home.db.write(add).unwrap();
    home.db.write(|txn| txn.refuse_snapshot(refused)).unwrap();
    for sid in [gone, refused] {
        for compared in [false, true] {
            let complete = home.db.write(|txn| txn.complete_snapshot(fid, sid, &group, &covered, compared));
            assert!(matches!(complete, Err(StoreError::UnknownSnapshot)), "{complete:?}");
        }
        let begun = home.db.write(|txn| txn.begin_adoption(fid, sid, &group, &covered));
        assert!(matches!(begun, Err(StoreError::UnknownSnapshot)), "{begun:?}");
        let taken = home.db.write(|txn| txn.set_snapshot_taken(sid, b"key"));
        assert!(matches!(taken, Err(StoreError::UnknownSnapshot)), "{taken:?}");
        let told = home.db.write(|txn| txn.set_snapshot_entry(sid, &group, (bob, Number(6)), b"body"));
        assert!(matches!(told, Err(StoreError::UnknownSnapshot)), "{told:?}");
    }
    assert_eq!(home.db.read(|reader| reader.covered(fid)).unwrap(), []);
    assert_eq!(home.drop_covered(100).entries, 0);
    // one that was begun is not begun again
    let sid = home.db.write(add).unwrap();
    home.db.write(|txn| txn.begin_adoption(fid, sid, &group, &covered)).unwrap();
    assert!(home.db.write(|txn| txn.begin_adoption(fid, sid, &group, &covered)).is_err());
    home.db.write(|txn| txn.complete_snapshot(fid, sid, &group, &covered, false)).unwrap();
}

#[test]
fn what_a_snapshot_says_is_the_folders_is_not_dropped_unless_it_was_read_and_is() {
    let (admission, said) = feed(12);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    let (group, fid) = (home.group, home.fid);
    let arrived: Vec<_> = said[..3].iter().chain(&said[5..]).cloned().collect();
    ingest(&mut home.db, &group, &arrived).unwrap();
    // 2 and 3 are an app's, 4 and 5 are not here
    home.take(bob, [1].into_iter().chain(6..=10));
    let here = |home: &Home, range| home.db.read(|reader| reader.range_here(fid, &group, &bob, range)).unwrap();
    assert_eq!(here(&home, range(1, 10)), RangeHere { lacks: true, elsewhere: false });
    let untaken = |home: &Home| home.db.read(|reader| reader.untaken(fid, &group, &bob, range(1, 10), 9)).unwrap();
    assert_eq!(untaken(&home).iter().map(|entry| entry.number.0).collect::<Vec<_>>(), [2, 3]);
    home.adopt(bob, range(1, 10), hash(&said[9]));
    assert_eq!(here(&home, range(1, 10)), RangeHere::default(), "2 and 3 are here");
    assert_eq!(untaken(&home).len(), 2, "and still nobody's");
    home.cover(bob, 10);
    assert_eq!(home.drop_covered(100).entries, 5);
    let left = home.db.read(|reader| reader.entries_at(&group, &[want(bob, 1, 12)], ALL)).unwrap();
    assert_eq!(left.len(), 5, "2, 3, and from 10 on");
    // for another folder that dropped range is another's
    let other = home.db.write(|txn| txn.add_folder(&group, &FolderId([8; 16]), "other")).unwrap();
    let elsewhere = |range| home.db.read(|reader| reader.range_here(other, &group, &bob, range)).unwrap();
    assert_eq!(elsewhere(range(1, 3)), RangeHere { lacks: true, elsewhere: true });
    assert_eq!(elsewhere(range(2, 3)), RangeHere::default());
    assert!(home.db.read(|reader| reader.reaches(&group, &bob, Number(12))).unwrap());
    assert!(!home.db.read(|reader| reader.reaches(&group, &bob, Number(13))).unwrap());
}

#[test]
fn nothing_is_dropped_from_a_fork_on() {
    let (admission, said) = feed(6);
    let bob = author(2).id();
    let group = GroupId::of(&charter(&author(1), 1));
    let mut home = Home::new(&admission);
    let mut other = Feed::new(group, author(2));
    let branch: Vec<_> = (0..6).map(|n| other.say(&if n < 3 { n.to_string() } else { format!("other {n}") })).collect();
    ingest(&mut home.db, &group, &said).unwrap();
    ingest(&mut home.db, &group, &branch).unwrap();
    assert_eq!(home.have_of(bob).fork, Some(Number(4)));
    home.take(bob, 1..=6);
    home.cover(bob, 6);
    assert_eq!(home.drop_covered(100).entries, 3);
    assert_eq!(home.db.read(|reader| reader.whole_until(&group, &bob)).unwrap(), Number(3));
}

#[test]
fn cursors_are_not_given_again_after_the_newest_entry_is_dropped() {
    let (admission, mut said) = feed(4);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    let group = home.group;
    said.rotate_right(1);
    ingest(&mut home.db, &group, &said).unwrap();
    let newest = home.db.read(|reader| reader.max_cursor(&group)).unwrap();
    let check = home.db.read(|reader| reader.check_at(&group, newest)).unwrap();
    home.take(bob, 1..=4);
    home.cover(bob, 4);
    assert_eq!(home.drop_covered(100).entries, 3);
    assert_eq!(home.db.read(|reader| reader.max_cursor(&group)).unwrap(), newest);
    assert_eq!(home.db.read(|reader| reader.check_at(&group, newest)).unwrap(), check);
    let everything = sync_core::Selection::everything(Scope::All);
    let batch = home.db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &everything, None)).unwrap();
    assert_eq!((batch.max_cursor, batch.entries.len()), (newest, 2));
}

#[test]
fn a_newcomer_holds_what_it_never_had_and_asks_for_nothing() {
    let (admission, said) = feed(12);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    ingest(&mut home.db, &home.group, &said).unwrap();
    home.take(bob, 1..=10);
    home.cover(bob, 10);
    home.drop_covered(100);

    let mut newcomer = Home::new(&admission);
    let group = newcomer.group;
    let everything = sync_core::Selection::everything(Scope::All);
    let sent = home.db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &everything, None)).unwrap();
    let sent: Vec<Vec<u8>> = sent.entries.into_iter().map(|carried| carried.envelope).collect();
    let stored = ingest(&mut newcomer.db, &group, &sent).unwrap();
    assert_eq!((stored.stored.len(), stored.refused.len()), (3, 0), "a chain with a hole");
    assert_eq!(newcomer.have_of(bob).ranges, [range(10, 12)]);
    assert!(newcomer.db.read(|reader| reader.lacks_until(&group, &bob, Number(10))).unwrap());
    newcomer.adopt(bob, range(1, 10), hash(&said[9]));
    assert!(!newcomer.db.read(|reader| reader.lacks_until(&group, &bob, Number(10))).unwrap());
    assert_eq!(newcomer.have(), home.have());
    assert!(newcomer.db.read(|reader| reader.wants(&group)).unwrap().is_empty());
    // one that has dropped nothing sends all of it
    let again = ingest(&mut newcomer.db, &group, &said).unwrap();
    assert_eq!((again.duplicates, again.stored.len()), (12, 0));
    // and the feed goes on
    let mut more = Feed::new(group, author(2));
    let next = (0..13).map(|n| more.say(&n.to_string())).collect::<Vec<_>>().pop().unwrap();
    assert_eq!(ingest(&mut newcomer.db, &group, &[next]).unwrap().stored.len(), 1);
}

#[test]
fn an_author_whose_database_went_back_learns_it_although_what_it_lost_was_dropped() {
    let (admission, said) = feed(10);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    ingest(&mut home.db, &home.group, &said).unwrap();
    home.take(bob, 1..=10);
    home.cover(bob, 10);
    home.drop_covered(100);

    // the author's own database, from a backup of when it had written four, and of when it had written all
    for (len, behind) in [(4, true), (10, false)] {
        let dir = TempDir::new().unwrap();
        let mut db = open(dir.path());
        let group = db.write(|txn| txn.create_group(&charter(&author(1), 1), author(2).id())).unwrap();
        ingest(&mut db, &group, &admission).unwrap();
        let writer = Writer { group, author: author(2) };
        let entries: Vec<_> = (0..len)
            .map(|n: u64| {
                entry(BlobId(*blake3::hash(n.to_string().as_bytes()).as_bytes().first_chunk().unwrap()), n.to_string())
            })
            .collect();
        db.write(|txn| txn.append(&group, &entries, &writer)).unwrap();
        assert_eq!(db.read(|reader| reader.knows_more(&group, &home.have())).unwrap(), behind, "{len}");
    }
    // what it wrote anew under dropped numbers shows at their end
    let mut other = home.have();
    for feed in &mut other {
        feed.heads = vec![EnvelopeHash([9; 32]); feed.heads.len()];
    }
    assert!(!home.knows_more(&[]));
    let selection = home.db.read(|reader| reader.select(&home.group, Scope::All, &other, &[])).unwrap();
    assert!(selection.diverges());
}

#[test]
fn pieces_stay_while_a_snapshot_needs_them() {
    let (admission, _) = feed(0);
    let mut home = Home::new(&admission);
    let (group, fid) = (home.group, home.fid);
    let chunk = SnapshotChunk { codec: 0, len: 3, bytes: b"abc".to_vec() };
    let (old, new, third) = home
        .db
        .write(|txn| {
            let old = txn.add_snapshot(fid, &group, None, &[])?;
            txn.put_snapshot_chunk(fid, old, &[1; 32], &chunk)?;
            txn.put_snapshot_chunk(fid, old, &[2; 32], &chunk)?;
            let new = txn.add_snapshot(fid, &group, None, &[])?;
            assert!(txn.claim_snapshot_chunk(fid, new, &[2; 32])?);
            assert!(!txn.claim_snapshot_chunk(fid, new, &[3; 32])?);
            txn.set_snapshot_entry(old, &group, (author(1).id(), Number(1)), b"old")?;
            txn.set_snapshot_entry(new, &group, (author(1).id(), Number(2)), b"new")?;
            txn.complete_snapshot(fid, old, &group, &[], true)?;
            txn.remove_snapshot(old)?;
            txn.complete_snapshot(fid, new, &group, &[(author(1).id(), Number(1))], true)?;
            // one that is broken off shares a piece with the complete one
            let third = txn.add_snapshot(fid, &group, None, &[])?;
            assert!(txn.claim_snapshot_chunk(fid, third, &[2; 32])?);
            txn.put_snapshot_chunk(fid, third, &[4; 32], &chunk)?;
            txn.remove_snapshot(third)?;
            // and its last piece comes after that
            txn.put_snapshot_chunk(fid, third, &[2; 32], &chunk)?;
            txn.put_snapshot_chunk(fid, third, &[5; 32], &chunk)?;
            Ok((old, new, third))
        })
        .unwrap();
    assert!(old != new && new != third);
    let known = home.db.read(|reader| reader.snapshots(fid)).unwrap();
    let known: Vec<_> = known.iter().map(|row| (row.sid, row.state, row.body.as_slice())).collect();
    assert_eq!(known, [(new, SnapshotState::Complete, &b"new"[..])]);
    assert_eq!(home.db.write(|txn| txn.trim_snapshot_chunks(fid, 2)).unwrap(), 2);
    assert_eq!(home.db.write(|txn| txn.trim_snapshot_chunks(fid, 10)).unwrap(), 1);
    for gone in [1, 4, 5] {
        assert_eq!(home.db.read(|reader| reader.snapshot_chunk(fid, &[gone; 32])).unwrap(), None);
    }
    assert_eq!(home.db.read(|reader| reader.group_snapshot_chunk(&group, &[2; 32])).unwrap(), Some(chunk));
    home.db.write(|txn| txn.remove_folder(fid)).unwrap();
    assert_eq!(home.db.read(|reader| reader.group_snapshot_chunk(&group, &[2; 32])).unwrap(), None);
}

#[test]
fn what_is_taken_is_counted_until_a_snapshot_covers_it() {
    let (admission, said) = feed(9);
    let bob = author(2).id();
    let mut home = Home::new(&admission);
    ingest(&mut home.db, &home.group, &said).unwrap();
    home.take(bob, [1, 2, 3, 5, 6, 9, 2]);
    let (group, fid) = (home.group, home.fid);
    let runs = |home: &Home| home.db.read(|reader| reader.taken_runs(fid, &group, &bob, Number(0), 10)).unwrap();
    assert_eq!(runs(&home), [range(1, 3), range(5, 6), range(9, 9)]);
    let since = |home: &Home| home.db.read(|reader| reader.since_snapshot(fid)).unwrap().entries;
    assert_eq!(since(&home), 6);
    home.cover(bob, 5);
    assert_eq!(since(&home), 2);
    home.take(bob, [4]);
    assert_eq!(runs(&home), [range(1, 6), range(9, 9)]);
    assert!(home.db.read(|reader| reader.is_taken(fid, &group, &bob, range(2, 6))).unwrap());
    assert!(!home.db.read(|reader| reader.is_taken(fid, &group, &bob, range(2, 7))).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_is_dropped_or_never_was_here_what_is_held_stays_the_same(
        order in Just((0..24usize).collect::<Vec<_>>()).prop_shuffle(),
        folders in proptest::collection::vec(0u8..3, 24),
        cuts in proptest::collection::vec((0u8..2, 1u64..=24, 1usize..9), 1..5),
        had in 0usize..24,
    ) {
        let (admission, said) = feed(24);
        let bob = author(2).id();
        let mut home = Home::new(&admission);
        let group = home.group;
        let arrived: Vec<_> = order.iter().map(|at| said[*at].clone()).collect();
        ingest(&mut home.db, &group, &arrived).unwrap();
        let have = home.have();
        // two folders in one feed, and an app between them
        let other = home.db.write(|txn| txn.add_folder(&group, &FolderId([8; 16]), "other")).unwrap();
        let fids = [home.fid, other];
        for (number, folder) in (1..).zip(&folders) {
            if let Some(fid) = fids.get(usize::from(*folder)) {
                home.fid = *fid;
                home.take(bob, [number]);
            }
        }
        for (folder, number, limit) in cuts {
            home.fid = fids[usize::from(folder)];
            home.cover(bob, number);
            while home.drop_covered(limit).entries > 0 {}
            prop_assert_eq!(&home.have(), &have);
        }
        let left = home.log();
        prop_assert_eq!(left.entries + left.dropped, 25);

        // a newcomer that has some of it and gets the rest, with the runs of both folders instead of what was dropped
        let mut newcomer = Home::new(&admission);
        ingest(&mut newcomer.db, &group, &arrived[..had]).unwrap();
        let everything = sync_core::Selection::everything(Scope::All);
        let sent = home.db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &everything, None)).unwrap();
        let sent: Vec<Vec<u8>> = sent.entries.into_iter().map(|carried| carried.envelope).collect();
        ingest(&mut newcomer.db, &group, &sent).unwrap();
        for fid in fids {
            for run in home.db.read(|reader| reader.taken_runs(fid, &group, &bob, Number(0), 100)).unwrap() {
                let head = home.db.read(|reader| reader.hashes_at(&group, &bob, run.last)).unwrap();
                prop_assert_eq!(head.len(), 1, "the end of {:?}", run);
                newcomer.adopt(bob, run, head[0]);
                // whatever is held, its ends are known
                newcomer.have();
            }
        }
        prop_assert_eq!(newcomer.have(), have);
        // and what it has it drops like everyone
        newcomer.take(bob, 1..=24);
        newcomer.cover(bob, 24);
        while newcomer.drop_covered(3).entries > 0 {}
        prop_assert_eq!(newcomer.have(), home.have());
    }
}
