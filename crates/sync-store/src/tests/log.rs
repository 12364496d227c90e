//! The log: numbers, cursors, arrivals, forks, waiting epochs, reading.

use sync_core::{Refusal, Selection};
use sync_types::bounds::MAX_RANGES;
use sync_types::{
    BlobId, Carried, Check, Class, Cursor, Cut, Number, Operation, Range, ReplicaId, Role, Scope, SignedOperation, Want,
};
use tempfile::TempDir;

use super::support::*;
use crate::{Content, Db, Limits, StoreError};

fn everything() -> Selection {
    Selection::everything(Scope::All)
}

fn range(first: u64, last: u64) -> Range {
    Range { first: Number(first), last: Number(last) }
}

#[test]
fn a_push_repeated_is_stored_once_and_another_under_its_blob_id_refused() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice };
    let first = db.write(|txn| txn.append(&group, &[entry(blob(1), "one")], &writer)).unwrap()[0];
    assert_eq!((first.cursor, first.number, first.repeated), (Cursor(1), Number(1), false));
    let again = db.write(|txn| txn.append(&group, &[entry(blob(1), "one")], &writer)).unwrap()[0];
    assert!(again.repeated);
    assert_eq!((again.cursor, again.number, again.hash), (first.cursor, first.number, first.hash));
    let other = db.write(|txn| txn.append(&group, &[entry(blob(1), "two")], &writer));
    assert!(matches!(other, Err(StoreError::BlobIdReused { cursor: Cursor(1), .. })), "{other:?}");
    let twice = db.write(|txn| txn.append(&group, &[entry(blob(2), "x"), entry(blob(2), "x")], &writer)).unwrap();
    assert_eq!((twice[0].cursor, twice[1].cursor, twice[1].repeated), (Cursor(2), Cursor(2), true));
    assert_eq!(db.read(|reader| reader.max_cursor(&group)).unwrap(), Cursor(2));
}

#[test]
fn numbers_cursors_and_checks_go_on_after_reopening() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice.clone() };
    db.write(|txn| txn.append(&group, &[entry(blob(1), "one"), entry(blob(2), "two")], &writer)).unwrap();
    let replica = db.read(|reader| reader.replica_id()).unwrap();
    let check = db.read(|reader| reader.check_at(&group, Cursor(2))).unwrap().unwrap();
    let feed = db.read(|reader| reader.feed(&group, &alice.id())).unwrap();
    db.close().unwrap();

    let mut db = open(dir.path());
    assert_eq!(db.read(|reader| reader.replica_id()).unwrap(), replica);
    assert_eq!(db.read(|reader| reader.check_at(&group, Cursor(2))).unwrap(), Some(check));
    assert_eq!(db.read(|reader| reader.check_at(&group, Cursor(0))).unwrap(), Some(Check::NONE));
    assert_eq!(db.read(|reader| reader.check_at(&group, Cursor(3))).unwrap(), None);
    assert_eq!(db.read(|reader| reader.check_at(&group, Cursor(u64::MAX))).unwrap(), None);
    assert_eq!(db.read(|reader| reader.feed(&group, &alice.id())).unwrap(), feed);
    let third = db.write(|txn| txn.append(&group, &[entry(blob(3), "three")], &writer)).unwrap()[0];
    assert_eq!((third.cursor, third.number), (Cursor(3), Number(3)));
    let read = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
    let previous = sync_types::Envelope::parse(&read.entries[2].bytes).unwrap().header.previous;
    assert_eq!(previous, feed.head);
}

#[test]
fn only_the_present_author_appends_and_only_what_was_asked_for() {
    struct Swapped(Writer);
    impl crate::SealEntries for Swapped {
        fn author(&self) -> sync_types::AuthorId {
            self.0.author()
        }
        fn seal(
            &self,
            number: Number,
            previous: sync_types::EnvelopeHash,
            entry: &crate::NewEntry,
        ) -> Result<Vec<u8>, crate::SealError> {
            self.0.seal(number, previous, &crate::NewEntry { blob_id: blob(99), ..entry.clone() })
        }
    }
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let stranger = Writer { group, author: bob };
    let refused = db.write(|txn| txn.append(&group, &[entry(blob(1), "x")], &stranger));
    assert!(matches!(refused, Err(StoreError::AuthorChanged { .. })), "{refused:?}");
    let swapped = Swapped(Writer { group, author: alice });
    let refused = db.write(|txn| txn.append(&group, &[entry(blob(1), "x")], &swapped));
    assert!(matches!(refused, Err(StoreError::SealedOtherwise { field: "blob id" })), "{refused:?}");
    assert_eq!(db.read(|reader| reader.max_cursor(&group)).unwrap(), Cursor(0));
}

#[test]
fn what_arrives_in_any_order_is_stored_once_and_leaves_no_gap() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let mut founder = Feed::new(group, alice.clone());
    let admission = founder.admit(&bob);
    let mut feed = Feed::new(group, bob.clone());
    let said: Vec<_> = (0..6).map(|n| feed.say(&n.to_string())).collect();

    // before the admission nothing of bob's counts
    let early = ingest(&mut db, &group, &said[..1]).unwrap();
    assert!(matches!(early.refused[..], [(0, Refusal::NotAdmitted(_))]));
    assert!(early.stored.is_empty());

    // in one batch its place does not matter
    let batch = [said[5].clone(), said[2].clone(), admission.clone(), said[5].clone()];
    let mixed = ingest(&mut db, &group, &batch).unwrap();
    assert_eq!(mixed.stored.iter().map(|stored| stored.cursor.0).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!((mixed.duplicates, mixed.refused.len(), mixed.forks.len()), (1, 0, 0));
    let gaps = [Want { author: bob.id(), range: range(1, 2) }, Want { author: bob.id(), range: range(4, 5) }];
    assert_eq!(mixed.gaps, gaps);
    assert_eq!(db.read(|reader| reader.wants(&group)).unwrap(), gaps);
    assert!(mixed.own_feed_foreign, "the admission is by our own author and was not written here");

    let rest = ingest(&mut db, &group, &said).unwrap();
    assert_eq!((rest.stored.len(), rest.duplicates), (4, 2));
    assert!(rest.gaps.is_empty());
    assert!(db.read(|reader| reader.wants(&group)).unwrap().is_empty());
    let feed_state = db.read(|reader| reader.feed(&group, &bob.id())).unwrap();
    assert_eq!((feed_state.held.ranges(), feed_state.head), (&[range(1, 6)][..], feed.head));

    drop(db);
    let mut db = open(dir.path());
    assert!(db.membership(&group).unwrap().is_admitted(&bob.id()), "read back from the log");
    assert_eq!(ingest(&mut db, &group, &said).unwrap().duplicates, 6);
    let batch = db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &everything(), None)).unwrap();
    let mut bytes: Vec<_> = batch.entries.into_iter().map(|carried| carried.envelope).collect();
    bytes.sort();
    let mut expected = [said, vec![admission]].concat();
    expected.sort();
    assert_eq!(bytes, expected, "byte for byte");
}

#[test]
fn forged_foreign_and_broken_arrivals_are_refused_by_index_and_the_rest_is_stored() {
    let dir = TempDir::new().unwrap();
    let (alice, bob, mallory) = (author(1), author(2), author(3));
    let (mut db, group) = founded(dir.path(), &alice);
    let admission = Feed::new(group, alice.clone()).admit(&bob);
    let mut feed = Feed::new(group, bob);
    let good = feed.say("good");
    let mut forged = feed.say("forged");
    let at = forged.len() - 1;
    forged[at] ^= 1;
    let elsewhere = Feed::new(sync_types::GroupId([9; 32]), author(2)).say("elsewhere");
    let stranger = Feed::new(group, mallory).say("stranger");
    let mut truncated = good.clone();
    truncated.pop();
    let batch = [admission, forged, elsewhere, good, stranger, truncated, vec![], vec![0xff; 40]];
    let done = ingest(&mut db, &group, &batch).unwrap();
    assert_eq!(done.stored.len(), 2);
    let refused: Vec<_> = done.refused.iter().map(|(index, _)| *index).collect();
    assert_eq!(refused, [1, 2, 4, 5, 6, 7]);
    assert!(matches!(done.refused[0].1, Refusal::Unsigned { .. }));
    assert!(matches!(done.refused[1].1, Refusal::WrongGroup(_)));
    assert!(matches!(done.refused[2].1, Refusal::NotAdmitted(_)));
    assert!(matches!(done.refused[3].1, Refusal::Malformed(_)));
}

#[test]
fn a_number_no_column_holds_is_refused_and_harms_nothing() {
    let dir = TempDir::new().unwrap();
    let (alice, bob, carol) = (author(1), author(2), author(3));
    let (mut db, group) = founded(dir.path(), &alice);
    let admission = Feed::new(group, alice.clone()).admit(&bob);
    let mut feed = Feed::new(group, bob.clone());
    (feed.number, feed.head) = (u64::MAX - 2, sync_types::EnvelopeHash([1; 32]));
    let batch = [admission, feed.say("far out"), feed.admit(&carol)];
    let done = ingest(&mut db, &group, &batch).unwrap();
    assert_eq!(done.stored.len(), 1);
    assert_eq!(done.refused.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2]);
    assert!(!db.membership(&group).unwrap().is_admitted(&carol.id()), "what is not stored does not count");
    let mut feed = Feed::new(group, bob.clone());
    (feed.number, feed.head) = (i64::MAX as u64 - 1, sync_types::EnvelopeHash([1; 32]));
    assert_eq!(ingest(&mut db, &group, &[feed.say("the last")]).unwrap().stored.len(), 1);
    let wants = db.read(|reader| reader.wants(&group)).unwrap();
    assert_eq!(wants, [Want { author: bob.id(), range: range(1, i64::MAX as u64 - 1) }]);
}

#[test]
fn a_fork_keeps_both_branches_and_shows_in_what_is_said_of_the_feed() {
    let (alice, bob) = (author(1), author(2));
    let make = |order: [usize; 5]| {
        let dir = TempDir::new().unwrap();
        let (mut db, group) = founded(dir.path(), &alice);
        let admission = Feed::new(group, alice.clone()).admit(&bob);
        let mut feed = Feed::new(group, bob.clone());
        let one = feed.say("one");
        let mut other = feed.branch();
        let all = [one, feed.say("two"), feed.say("three"), other.say("zwei"), other.say("drei")];
        ingest(&mut db, &group, &[admission]).unwrap();
        let mut forks = Vec::new();
        for at in order {
            forks.extend(ingest(&mut db, &group, &all[at..=at]).unwrap().forks);
        }
        assert!(forks.contains(&(bob.id(), Number(2))), "{forks:?}");
        drop(db);
        let db = open(dir.path());
        let have = db.read(|reader| reader.have(&group)).unwrap();
        let held = db.read(|reader| reader.entries_at(&group, &[Want { author: bob.id(), range: range(2, 3) }], ALL));
        assert_eq!(held.unwrap().len(), 4);
        have.into_iter().find(|feed| feed.author == bob.id()).unwrap()
    };
    let have = make([0, 1, 2, 3, 4]);
    assert_eq!((have.fork, &have.ranges[..]), (Some(Number(2)), &[range(1, 3)][..]));
    assert_ne!(have.digest, [0; 32]);
    assert_eq!(make([4, 1, 3, 0, 2]), have, "whatever came first, the same is said");
    assert_eq!(make([3, 4, 2, 1, 0]), have);
}

#[test]
fn at_most_64_ranges_are_claimed_of_a_feed_and_they_are_the_highest() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let mut batch = vec![Feed::new(group, alice.clone()).admit(&bob)];
    let mut feed = Feed::new(group, bob.clone());
    batch.extend((0..200).map(|n| feed.say(&n.to_string())).step_by(2));
    ingest(&mut db, &group, &batch).unwrap();
    let have = db.read(|reader| reader.have(&group)).unwrap();
    let ranges = &have.iter().find(|feed| feed.author == bob.id()).unwrap().ranges;
    assert_eq!((ranges.len(), ranges[0], ranges[63]), (MAX_RANGES, range(73, 73), range(199, 199)));
}

#[test]
fn what_waited_for_an_epoch_gets_a_new_cursor_and_reaches_an_app_that_had_passed_it() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let mut batch = vec![Feed::new(group, alice.clone()).admit(&bob)];
    let mut feed = Feed::new(group, bob);
    batch.push(feed.say("now"));
    feed.epoch = LATER;
    batch.push(feed.say("later"));
    feed.epoch = EPOCH;
    batch.push(feed.say("now again"));
    let done = db.write(|txn| txn.ingest(&group, &batch, None, None, &|epoch| epoch == EPOCH)).unwrap();
    assert_eq!(done.stored.iter().map(|stored| stored.readable).collect::<Vec<_>>(), [true, true, false, true]);
    let seen = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
    assert_eq!(seen.entries.iter().map(|stored| stored.cursor.0).collect::<Vec<_>>(), [2, 4]);
    assert_eq!(seen.max_cursor, Cursor(4));
    let old = db.read(|reader| reader.check_at(&group, Cursor(3))).unwrap();

    // peers are given it whether we can read it or not
    let served = db.read(|reader| reader.read_after(&group, Cursor(2), ALL, &everything(), None)).unwrap();
    assert_eq!(served.entries[0].envelope, batch[2]);

    assert_eq!(db.write(|txn| txn.epoch_readable(&group, LATER)).unwrap(), 1);
    assert_eq!(db.write(|txn| txn.epoch_readable(&group, LATER)).unwrap(), 0);
    let late = db.read(|reader| reader.read_sealed(&group, seen.max_cursor, ALL)).unwrap();
    assert_eq!(
        late.entries.iter().map(|stored| (stored.cursor.0, &stored.bytes)).collect::<Vec<_>>(),
        [(5, &batch[2])]
    );
    assert_eq!(db.read(|reader| reader.check_at(&group, Cursor(3))).unwrap(), old, "the old position is still known");
    assert_eq!(ingest(&mut db, &group, &batch).unwrap().duplicates, 4);
    assert_eq!(db.read(|reader| reader.max_cursor(&group)).unwrap(), Cursor(5));
}

#[test]
fn a_peer_is_sent_what_it_lacks_within_limits_and_the_position_passes_the_rest() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let mut batch = vec![Feed::new(group, alice.clone()).admit(&bob)];
    let mut feed = Feed::new(group, bob.clone());
    batch.extend((0..9).map(|n| feed.say(&n.to_string())));
    let peer = db.write(|txn| txn.peer(&group, &ReplicaId([5; 16]))).unwrap();
    db.write(|txn| txn.ingest(&group, &batch[..7], None, None, &|_| true)).unwrap();
    let position = (Cursor(77), Check([7; 8]));
    db.write(|txn| txn.ingest(&group, &batch[7..], Some(peer), Some(position), &|_| true)).unwrap();
    assert_eq!(db.read(|reader| reader.position(&group, peer)).unwrap(), position);

    // the peer holds bob's 1..=4
    let mut theirs = db.read(|reader| reader.have(&group)).unwrap();
    theirs.retain(|feed| feed.author == bob.id());
    let fourth = hash(&batch[4]);
    (theirs[0].ranges, theirs[0].heads) = (vec![range(1, 4)], vec![fourth]);
    let select = |scope| db.read(|reader| reader.select(&group, scope, &theirs, &[])).unwrap();
    let read = |after, limits, selection: &Selection, not_from| {
        let batch = db.read(|reader| reader.read_after(&group, Cursor(after), limits, selection, not_from)).unwrap();
        let cursors: Vec<_> = batch.entries.iter().map(|Carried { cursor, .. }| cursor.0).collect();
        let check = db.read(|reader| reader.check_at(&group, batch.max_cursor)).unwrap();
        assert_eq!(check, Some(batch.check));
        (cursors, batch.max_cursor.0, batch.has_more)
    };
    let two = Limits { entries: 2, bytes: usize::MAX };
    let all = select(Scope::All);
    assert_eq!(read(0, ALL, &all, None), (vec![1, 6, 7, 8, 9, 10], 10, false));
    assert_eq!(read(0, two, &all, None), (vec![1, 6], 6, true));
    assert_eq!(read(1, Limits { entries: 9, bytes: 1 }, &all, None), (vec![6], 6, true), "one at least");
    assert_eq!(read(0, ALL, &all, Some(peer)), (vec![1, 6, 7], 10, false), "not what came from it");
    assert_eq!(read(7, two, &all, Some(peer)), (vec![], 10, false));
    assert_eq!(read(0, ALL, &select(Scope::Membership), None), (vec![1], 10, false));
    assert_eq!(
        read(0, Limits { entries: 1, bytes: ALL.bytes }, &select(Scope::Membership), None),
        (vec![1], 10, false)
    );
    assert_eq!(read(99, ALL, &all, None), (vec![], 10, false), "a position from another life");
}

#[test]
fn wanted_numbers_are_answered_within_limits() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let mut batch = vec![Feed::new(group, alice.clone()).admit(&bob)];
    let mut feed = Feed::new(group, bob.clone());
    batch.extend((0..9).map(|n| feed.say(&n.to_string())));
    ingest(&mut db, &group, &batch).unwrap();
    let wants = [
        Want { author: author(9).id(), range: range(1, u64::MAX) },
        Want { author: bob.id(), range: range(8, u64::MAX) },
        Want { author: bob.id(), range: range(2, 3) },
    ];
    let held = |limits| db.read(|reader| reader.entries_at(&group, &wants, limits)).unwrap();
    let expected: Vec<_> = [8, 9, 2, 3].map(|at| batch[at].clone()).into();
    assert_eq!(held(ALL).into_iter().map(|carried| carried.envelope).collect::<Vec<_>>(), expected);
    assert_eq!(held(Limits { entries: 3, bytes: usize::MAX }).len(), 3);
    assert_eq!(held(Limits { entries: 3, bytes: 0 }).len(), 1);
}

#[test]
fn own_membership_operations_count_at_once_and_failed_ones_leave_no_trace() {
    let dir = TempDir::new().unwrap();
    let (alice, bob, carol) = (author(1), author(2), author(3));
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice };
    let operation = |newcomer: &_| {
        let signed = SignedOperation { seen: vec![], operation: admission(newcomer) };
        new_entry(BlobId(rand_id(newcomer)), Content::Membership(signed.encode()))
    };
    db.write(|txn| txn.append(&group, &[operation(&bob)], &writer)).unwrap();
    let membership = db.membership(&group).unwrap();
    assert_eq!(membership.author(&bob.id()).unwrap().role, Role::Member);
    let said = Feed::new(group, bob.clone()).say("hello");
    assert_eq!(ingest(&mut db, &group, &[said]).unwrap().stored.len(), 1);

    // the second entry fails, so the first is taken back, and the membership in memory with it
    let broken = new_entry(blob(77), Content::Membership(vec![0xc0]));
    let failed = db.write(|txn| txn.append(&group, &[operation(&carol), broken], &writer));
    assert!(matches!(failed, Err(StoreError::Membership(_))), "{failed:?}");
    assert!(!db.membership(&group).unwrap().is_admitted(&carol.id()));
    let next = db.write(|txn| txn.append(&group, &[entry(blob(5), "next")], &writer)).unwrap()[0];
    assert_eq!((next.cursor, next.number), (Cursor(3), Number(2)));
}

fn rand_id(author: &sync_crypto::author::AuthorSecret) -> [u8; 16] {
    *author.id().0.first_chunk().unwrap()
}

#[test]
fn a_command_that_fails_is_taken_back_alone() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice };
    let mut txn = db.begin().unwrap();
    txn.attempt(|txn| txn.append(&group, &[entry(blob(1), "one")], &writer)).unwrap();
    let failed = txn.attempt(|txn| {
        txn.append(&group, &[entry(blob(2), "two")], &writer)?;
        txn.put_secret("kind", b"id", b"sealed")?;
        txn.append(&group, &[entry(blob(1), "not one")], &writer)
    });
    assert!(matches!(failed, Err(StoreError::BlobIdReused { .. })));
    let third = txn.attempt(|txn| txn.append(&group, &[entry(blob(3), "three")], &writer)).unwrap()[0];
    assert_eq!((third.cursor, third.number), (Cursor(2), Number(2)));
    let changes = txn.commit().unwrap();
    assert_eq!(changes.groups.iter().map(|change| change.max_cursor).collect::<Vec<_>>(), [Cursor(2)]);
    assert_eq!(db.read(|reader| reader.secret("kind", b"id")).unwrap(), None);
    let read = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
    assert_eq!(read.entries.len(), 2);

    // dropped without commit, all of it is
    let mut txn = db.begin().unwrap();
    txn.append(&group, &[entry(blob(4), "four")], &writer).unwrap();
    drop(txn);
    let again = db.write(|txn| txn.append(&group, &[entry(blob(5), "five")], &writer)).unwrap()[0];
    assert_eq!((again.cursor, again.number), (Cursor(3), Number(3)));
}

#[test]
fn two_groups_in_one_database_do_not_mix() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, one) = founded(dir.path(), &alice);
    let two = db.write(|txn| txn.create_group(&charter(&alice, 2), alice.id())).unwrap();
    let twice = db.write(|txn| txn.create_group(&charter(&alice, 2), alice.id()));
    assert!(matches!(twice, Err(StoreError::GroupExists(group)) if group == two));
    for group in [one, two] {
        let writer = Writer { group, author: alice.clone() };
        let appended = db.write(|txn| txn.append(&group, &[entry(blob(1), group.0)], &writer)).unwrap()[0];
        assert_eq!((appended.cursor, appended.number), (Cursor(1), Number(1)), "each group counts for itself");
    }
    let foreign = Feed::new(two, alice.clone()).admit(&bob);
    assert!(ingest(&mut db, &one, std::slice::from_ref(&foreign)).unwrap().stored.is_empty());
    let read = db.read(|reader| reader.read_sealed(&one, Cursor(0), ALL)).unwrap();
    assert_eq!((read.entries.len(), read.max_cursor), (1, Cursor(1)));
    let peer = db.write(|txn| txn.peer(&one, &ReplicaId([1; 16]))).unwrap();
    let elsewhere = db.write(|txn| txn.record_ack(&two, peer, Cursor(1)));
    assert!(matches!(elsewhere, Err(StoreError::UnknownPeer)));
    assert!(db.read(|reader| reader.peers(&two)).unwrap().is_empty());
    let stranger = sync_types::GroupId([0; 32]);
    assert!(matches!(db.read(|reader| reader.have(&stranger)), Err(StoreError::UnknownGroup(_))));
}

#[test]
fn rotations_and_operations_are_never_handed_to_the_app() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice };
    let revoke = SignedOperation { seen: vec![], operation: Operation::Revoke { id: sync_types::InviteId([1; 16]) } };
    let entries = [
        new_entry(blob(1), Content::Membership(revoke.encode())),
        entry(blob(2), "app"),
        new_entry(blob(3), Content::Rotation(vec![1, 2, 3])),
    ];
    db.write(|txn| txn.append(&group, &entries, &writer)).unwrap();
    let read = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
    assert_eq!((read.entries.len(), read.max_cursor, read.has_more), (1, Cursor(3), false));
    let selection = Selection::everything(Scope::Membership);
    let served = db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &selection, None)).unwrap();
    let classes: Vec<_> = served
        .entries
        .iter()
        .map(|carried| sync_types::Envelope::parse(&carried.envelope).unwrap().header.class)
        .collect();
    assert_eq!(classes, [Class::Membership, Class::Rotation]);
}

#[test]
fn what_stands_behind_a_removal_is_kept_back_and_comes_again_if_the_removal_falls() {
    let dir = TempDir::new().unwrap();
    let (alice, bob, carol) = (author(1), author(2), author(3));
    let (mut db, group) = founded(dir.path(), &alice);
    let mut founder = Feed::new(group, alice.clone());
    let admissions = [founder.admit(&bob), founder.admit(&carol)];
    let mut feed = Feed::new(group, bob.clone());
    let said: Vec<_> = (0..4).map(|n| feed.say(&n.to_string())).collect();
    ingest(&mut db, &group, &[&admissions[..], &said].concat()).unwrap();
    let sealed = |db: &Db| {
        let read = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
        read.entries.iter().map(|entry| (entry.number.0, entry.cursor.0)).collect::<Vec<_>>()
    };
    let served = |db: &Db| {
        let read = db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &everything(), None)).unwrap();
        read.entries.into_iter().map(|carried| carried.envelope).collect::<Vec<_>>()
    };
    assert_eq!(sealed(&db), [(1, 3), (2, 4), (3, 5), (4, 6)]);

    let cuts = vec![Cut { author: bob.id(), number: Number(2), hash: hash(&said[1]) }];
    let tombstone = Operation::Remove { member: bob.id().into(), cuts };
    let tombstone = Feed::new(group, carol.clone()).operate_having_seen(tombstone, &admissions);
    ingest(&mut db, &group, std::slice::from_ref(&tombstone)).unwrap();
    let more = ingest(&mut db, &group, &[feed.say("more")]).unwrap();
    assert!(matches!(more.refused[..], [(0, Refusal::Removed { .. })]));
    drop(db);
    let mut db = open(dir.path());
    assert_eq!(sealed(&db), [(1, 3), (2, 4)]);
    assert!(!served(&db).contains(&said[2]) && served(&db).contains(&said[1]));
    assert!(db.read(|reader| reader.wants(&group)).unwrap().is_empty());

    // whoever signed it was removed meanwhile by somebody who had not seen it
    let other = Operation::Remove { member: carol.id().into(), cuts: vec![] };
    let other = founder.operate_having_seen(other, &admissions);
    ingest(&mut db, &group, &[other]).unwrap();
    assert_eq!(sealed(&db), [(1, 3), (2, 4), (3, 9), (4, 10)]);
    assert!(served(&db).contains(&said[3]) && served(&db).contains(&tombstone));
}
