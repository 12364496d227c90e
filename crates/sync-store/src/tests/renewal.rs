//! A database that was copied or rolled back goes on under a new author; peers, invites and what they hold.

use sync_core::pairing::InviteStatus;
use sync_types::{
    Check, Class, Cursor, DeviceId, Envelope, FeedHave, InviteId, InviteState, Number, Range, ReplicaId, Scope,
    Timestamp,
};
use tempfile::TempDir;

use super::support::*;
use crate::{NewEntry, PeerNote, Renewal, SealError, StoreError};

/// Opens what [`Writer`] seals.
fn reopen(bytes: &[u8], _: Number) -> Result<Option<NewEntry>, SealError> {
    let envelope = Envelope::parse(bytes).unwrap();
    let sealed = envelope.header.class == Class::Sealed;
    Ok(sealed.then(|| entry(envelope.header.blob_id, envelope.payload())))
}

#[test]
fn a_rolled_back_database_issues_again_what_it_wrote_and_takes_back_what_it_lost() {
    let dir = TempDir::new().unwrap();
    let (alice, new) = (author(1), author(11));
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice.clone() };
    let peer = db.write(|txn| txn.peer(&group, &ReplicaId([5; 16]))).unwrap();
    // 1 and 2 reached the peer; 3 and 4 were written, lost by a rollback, and 3' and 4' written since
    let mut lost = Feed::new(group, alice.clone());
    db.write(|txn| txn.append(&group, &[entry(blob(1), "1"), entry(blob(2), "2")], &writer)).unwrap();
    db.write(|txn| txn.record_ack(&group, peer, Cursor(2))).unwrap();
    let kept = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
    (lost.number, lost.head) = (2, hash(&kept.entries[1].bytes));
    let lost = [lost.say("3"), lost.say("4"), lost.say("5")];
    db.write(|txn| txn.append(&group, &[entry(blob(3), "3'"), entry(blob(4), "4'")], &writer)).unwrap();
    assert_eq!(db.read(|reader| reader.unacked(&group)).unwrap(), 2);

    let mut theirs = db.read(|reader| reader.have(&group)).unwrap();
    assert!(!db.read(|reader| reader.knows_more(&group, &theirs)).unwrap());
    (theirs[0].ranges[0].last, theirs[0].heads[0]) = (Number(5), hash(&lost[2]));
    assert!(db.read(|reader| reader.knows_more(&group, &theirs)).unwrap());

    // first contact
    let done = db.write(|txn| txn.ingest(&group, &lost[..1], Some(peer), None, &|_| true)).unwrap();
    assert!(done.own_feed_foreign);
    assert_eq!(done.forks, [(alice.id(), Number(3))]);
    assert!(db.read(|reader| reader.group(&group)).unwrap().behind);
    let refused = db.write(|txn| txn.append(&group, &[entry(blob(9), "no")], &writer));
    assert!(matches!(refused, Err(StoreError::AuthorBehind(_))), "{refused:?}");
    let repeated = db.write(|txn| txn.append(&group, &[entry(blob(3), "3'")], &writer)).unwrap();
    assert!(repeated[0].repeated, "a retry is still answered");

    let succession = succession(group, &alice, &new);
    let sealer = Writer { group, author: new.clone() };
    let renewal = Renewal { succession: &succession, sealer: &sealer, reopen: Some(&reopen) };
    let renewed = db.write(|txn| {
        txn.put_secret("author", &new.id().0, b"sealed")?;
        txn.renew_author(&group, &renewal)
    });
    let reissued = renewed.unwrap().reissued;
    assert_eq!(reissued.iter().map(|(old, new)| (old.0, new.number.0)).collect::<Vec<_>>(), [(3, 2), (4, 3)]);
    let row = db.read(|reader| reader.group(&group)).unwrap();
    assert_eq!((row.author, row.behind), (new.id(), false));
    assert!(db.membership(&group).unwrap().is_admitted(&new.id()));

    // the old feed is what the peer holds: no fork, and room for the rest
    let feed = db.read(|reader| reader.feed(&group, &alice.id())).unwrap();
    assert_eq!((feed.fork, feed.head, feed.held.highest()), (None, hash(&lost[0]), Some(Number(3))));
    let rest = db.write(|txn| txn.ingest(&group, &lost, Some(peer), None, &|_| true)).unwrap();
    assert_eq!((rest.stored.len(), rest.duplicates, rest.own_feed_foreign), (2, 1, false));
    assert!(rest.forks.is_empty());

    // a retry of what was issued again, or of what came back, stores nothing
    let again = db.write(|txn| txn.append(&group, &[entry(blob(3), "3'"), entry(blob(1), "1")], &sealer)).unwrap();
    assert_eq!((again[0].repeated, again[0].author), (true, new.id()));
    assert_eq!((again[1].repeated, again[1].author), (true, alice.id()));
    let back = Envelope::parse(&lost[1]).unwrap().header.blob_id;
    assert!(db.write(|txn| txn.append(&group, &[entry(back, "4")], &sealer)).unwrap()[0].repeated);

    let bodies = |after| {
        let read = db.read(|reader| reader.read_sealed(&group, Cursor(after), ALL)).unwrap();
        read.entries
            .iter()
            .map(|stored| String::from_utf8(Envelope::parse(&stored.bytes).unwrap().payload().to_vec()).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(bodies(0), ["1", "2", "3", "3'", "4'", "4", "5"]);
    assert!(db.read(|reader| reader.check_at(&group, Cursor(3))).unwrap().is_some(), "the emptied row keeps its check");
    // asked again, nothing changes
    let renewal = Renewal { succession: &succession, sealer: &sealer, reopen: Some(&reopen) };
    assert!(db.write(|txn| txn.renew_author(&group, &renewal)).unwrap().reissued.is_empty());
    drop(db);
    let mut db = open(dir.path());
    assert!(db.membership(&group).unwrap().is_admitted(&new.id()));
    assert_eq!(
        db.read(|reader| reader.feed(&group, &alice.id())).unwrap().held.ranges(),
        [Range { first: Number(1), last: Number(5) }]
    );
}

#[test]
fn a_fork_others_hold_stays_after_renewal() {
    let dir = TempDir::new().unwrap();
    let (alice, new) = (author(1), author(11));
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice.clone() };
    let mut elsewhere = Feed::new(group, alice.clone());
    let (one, two) = (elsewhere.say("one"), elsewhere.say("two"));
    let mut third = elsewhere.branch();
    db.write(|txn| txn.append(&group, &[entry(blob(1), "1"), entry(blob(2), "2")], &writer)).unwrap();
    ingest(&mut db, &group, &[one, two, elsewhere.say("three"), third.say("drei")]).unwrap();
    assert_eq!(db.read(|reader| reader.feed(&group, &alice.id())).unwrap().fork, Some(Number(1)));
    let succession = succession(group, &alice, &new);
    let sealer = Writer { group, author: new };
    let renewal = Renewal { succession: &succession, sealer: &sealer, reopen: Some(&reopen) };
    db.write(|txn| txn.renew_author(&group, &renewal)).unwrap();
    let feed = db.read(|reader| reader.feed(&group, &alice.id())).unwrap();
    assert_eq!((feed.fork, feed.held.highest()), (Some(Number(3)), Some(Number(3))));
}

#[test]
fn who_reads_along_is_sent_the_other_branch_of_a_fork_that_shows_later() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let mut feed = Feed::new(group, alice.clone());
    let one = feed.say("one");
    let mut other = feed.branch();
    let (two, zwei) = (feed.say("two"), other.say("zwei"));
    let peer = db.write(|txn| txn.peer(&group, &ReplicaId([9; 16]))).unwrap();
    ingest(&mut db, &group, &[one, two]).unwrap();
    let theirs = db.read(|reader| reader.have(&group)).unwrap();
    let selection = db.read(|reader| reader.select(&group, Scope::All, &theirs, &[])).unwrap();
    ingest(&mut db, &group, std::slice::from_ref(&zwei)).unwrap();
    let sent = db.read(|reader| reader.read_after(&group, Cursor(2), ALL, &selection, Some(peer))).unwrap();
    let sent: Vec<Vec<u8>> = sent.entries.into_iter().map(|carried| carried.envelope).collect();
    assert_eq!(sent, [zwei]);
}

#[test]
fn who_may_hold_another_branch_is_sent_the_operations_of_ours_before_whom_they_admit() {
    let dir = TempDir::new().unwrap();
    let (alice, bob) = (author(1), author(2));
    let (mut db, group) = founded(dir.path(), &alice);
    let (admission, hello) = (Feed::new(group, alice.clone()).admit(&bob), Feed::new(group, bob).say("hello"));
    let peer = db.write(|txn| txn.peer(&group, &ReplicaId([9; 16]))).unwrap();
    ingest(&mut db, &group, &[admission.clone(), hello.clone()]).unwrap();
    // what it holds at 1 does not show here, where nothing is held at 2
    let mut elsewhere = Feed::new(group, alice.clone());
    elsewhere.say("eins");
    let head = hash(&elsewhere.say("zwei"));
    let ranges = vec![Range { first: Number(1), last: Number(2) }];
    let theirs = FeedHave { author: alice.id(), ranges, heads: vec![head], fork: None, digest: [0; 32] };
    let selection = db.read(|reader| reader.select(&group, Scope::All, &[theirs], &[])).unwrap();
    for not_from in [None, Some(peer)] {
        let sent = db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &selection, not_from)).unwrap();
        let sent: Vec<Vec<u8>> = sent.entries.into_iter().map(|carried| carried.envelope).collect();
        assert_eq!(sent, [admission.clone(), hello.clone()]);
    }
}

#[test]
fn a_succession_that_does_not_count_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let (alice, mallory, new) = (author(1), author(3), author(11));
    let (mut db, group) = founded(dir.path(), &alice);
    let sealer = Writer { group, author: new.clone() };
    let forged = succession(group, &mallory, &new);
    let mut cut = succession(group, &alice, &new);
    cut.pop();
    let other = Feed::new(group, alice.clone()).admit(&new);
    for bytes in [forged, cut, other] {
        let renewal = Renewal { succession: &bytes, sealer: &sealer, reopen: None };
        let refused = db.write(|txn| txn.renew_author(&group, &renewal));
        assert!(matches!(refused, Err(StoreError::Succession(_))), "{refused:?}");
        assert_eq!(db.read(|reader| reader.group(&group)).unwrap().author, alice.id());
        assert!(!db.membership(&group).unwrap().is_admitted(&new.id()));
        assert_eq!(db.read(|reader| reader.max_cursor(&group)).unwrap(), Cursor(0));
    }
}

#[test]
fn a_new_replica_id_forgets_up_to_where_peers_were_read() {
    let dir = TempDir::new().unwrap();
    let (mut db, group) = founded(dir.path(), &author(1));
    let old = db.read(|reader| reader.replica_id()).unwrap();
    let peer = db.write(|txn| txn.peer(&group, &ReplicaId([5; 16]))).unwrap();
    db.write(|txn| txn.set_position(&group, peer, Cursor(9), Check([9; 8]))).unwrap();
    let new = db.write(|txn| txn.renew_replica()).unwrap();
    assert_ne!(new, old);
    assert_eq!(db.read(|reader| reader.replica_id()).unwrap(), new);
    assert_eq!(db.read(|reader| reader.position(&group, peer)).unwrap(), (Cursor(0), Check::NONE));
}

#[test]
fn a_peer_is_known_once_and_its_addresses_are_replaced() {
    let dir = TempDir::new().unwrap();
    let (mut db, group) = founded(dir.path(), &author(1));
    let peer = db.write(|txn| txn.peer(&group, &ReplicaId([5; 16]))).unwrap();
    assert_eq!(db.write(|txn| txn.peer(&group, &ReplicaId([5; 16]))).unwrap(), peer);
    let note = |name: &str, addresses: &[&str], now| PeerNote {
        author: author(2).id(),
        device: DeviceId([3; 32]),
        name: name.to_owned(),
        addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
        now: Timestamp(now),
    };
    let mut noted = |note: PeerNote| {
        db.write(|txn| txn.note_peer(&group, peer, &note)).unwrap();
        db.read(|reader| reader.peers(&group)).unwrap().remove(0)
    };
    let first = noted(note("laptop", &["10.0.0.1:1", "bad\nline", "", "10.0.0.2:2"], 5));
    assert_eq!(
        (first.name.as_str(), &first.addresses[..]),
        ("laptop", &["10.0.0.1:1".into(), "10.0.0.2:2".into()][..])
    );
    let second = noted(note("laptop", &[], 6));
    assert_eq!((second.addresses, second.addresses_at), (first.addresses, Some(Timestamp(5))));
    assert_eq!(second.last_seen, Some(Timestamp(6)));
    let third = noted(note(&"é".repeat(100), &["10.0.0.9:9"], 7));
    assert_eq!((third.addresses, third.addresses_at), (vec!["10.0.0.9:9".to_owned()], Some(Timestamp(7))));
    assert_eq!(third.name, "é".repeat(32));
}

#[test]
fn an_acknowledgement_counts_no_further_than_what_was_stored() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (mut db, group) = founded(dir.path(), &alice);
    let writer = Writer { group, author: alice };
    let (one, two) =
        db.write(|txn| Ok((txn.peer(&group, &ReplicaId([1; 16]))?, txn.peer(&group, &ReplicaId([2; 16]))?))).unwrap();
    db.write(|txn| txn.append(&group, &[entry(blob(1), "1"), entry(blob(2), "2")], &writer)).unwrap();
    db.write(|txn| txn.record_ack(&group, one, Cursor(u64::MAX))).unwrap();
    db.write(|txn| txn.record_ack(&group, two, Cursor(1))).unwrap();
    db.write(|txn| txn.record_ack(&group, one, Cursor(1))).unwrap();
    db.write(|txn| txn.append(&group, &[entry(blob(3), "3")], &writer)).unwrap();
    assert_eq!(db.read(|reader| reader.unacked(&group)).unwrap(), 1);
    let handed = |cursor| {
        let peers = db.read(|reader| reader.handed_to(&group, Cursor(cursor))).unwrap();
        peers.into_iter().map(|peer| peer.id).collect::<Vec<_>>()
    };
    assert_eq!((handed(1), handed(2), handed(3)), (vec![one, two], vec![one], vec![]));
}

#[test]
fn invites_and_secrets_are_kept() {
    let dir = TempDir::new().unwrap();
    let (mut db, group) = founded(dir.path(), &author(1));
    let (one, two) = (InviteId([1; 16]), InviteId([2; 16]));
    db.write(|txn| {
        txn.put_invite(&group, &one, Timestamp(10))?;
        txn.put_invite(&group, &two, Timestamp(20))?;
        txn.set_invite(&group, &one, InviteState::Used, Some(author(2).id()))?;
        txn.put_invite(&group, &one, Timestamp(99))?;
        txn.put_secret("epoch", b"1", b"old")?;
        txn.put_secret("epoch", b"1", b"one")?;
        txn.put_secret("epoch", b"2", b"two")?;
        txn.put_secret("device", b"", b"key")?;
        txn.put_meta("fingerprint", b"here")
    })
    .unwrap();
    let used = InviteStatus { state: InviteState::Used, expires: Timestamp(10), used_by: Some(author(2).id()) };
    let open = InviteStatus { state: InviteState::Open, expires: Timestamp(20), used_by: None };
    assert_eq!(db.read(|reader| reader.invites(&group)).unwrap(), [(one, used), (two, open)]);
    assert_eq!(db.read(|reader| reader.invite(&group, &one)).unwrap(), Some(used));
    assert_eq!(db.read(|reader| reader.invite(&group, &InviteId([3; 16]))).unwrap(), None);
    let unknown = db.write(|txn| txn.set_invite(&group, &InviteId([3; 16]), InviteState::Revoked, None));
    assert!(matches!(unknown, Err(StoreError::UnknownInvite)));
    let epochs = db.read(|reader| reader.secrets("epoch")).unwrap();
    assert_eq!(epochs.iter().map(|secret| &secret.value[..]).collect::<Vec<_>>(), [b"one", b"two"]);
    assert!(db.write(|txn| txn.delete_secret("epoch", b"1")).unwrap());
    assert!(!db.write(|txn| txn.delete_secret("epoch", b"1")).unwrap());
    assert_eq!(db.read(|reader| reader.secret("epoch", b"1")).unwrap(), None);
    assert_eq!(db.read(|reader| reader.secret("device", b"")).unwrap(), Some(b"key".to_vec()));
    assert_eq!(db.read(|reader| reader.meta("fingerprint")).unwrap(), Some(b"here".to_vec()));
    assert_eq!(format!("{:?}", epochs[0]), "SealedSecret(3 bytes)");
    db.write(|txn| txn.set_active(&group, false)).unwrap();
    assert!(!db.read(|reader| reader.group(&group)).unwrap().active);
}
