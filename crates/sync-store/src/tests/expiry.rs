//! What a relay lets expire, and what it asks for again.

use sync_types::{Cursor, Number, Range, Timestamp, Want};
use tempfile::TempDir;

use super::support::*;

#[test]
fn what_is_old_is_dropped_but_the_last_of_a_feed_and_lacks_once_somebody_wants_it() {
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let mut db = open(dir.path());
    let group = db.write(|txn| txn.host_group(&charter(&alice, 1))).unwrap();
    let mut feed = Feed::new(group, alice.clone());
    let entries: Vec<Vec<u8>> = (1..=6).map(|number| feed.say(&format!("entry {number}"))).collect();
    let store = |db: &mut crate::Db, batch: &[Vec<u8>]| {
        db.write(|txn| txn.ingest(&group, batch, None, None, &|_| true)).unwrap()
    };
    store(&mut db, &entries[..4]);
    assert!(db.write(|txn| txn.mark_time(&group, Timestamp(100))).unwrap());
    assert!(!db.write(|txn| txn.mark_time(&group, Timestamp(150))).unwrap(), "nothing came since");
    store(&mut db, &entries[4..]);
    assert!(db.write(|txn| txn.mark_time(&group, Timestamp(200))).unwrap());
    let expire = |db: &mut crate::Db, before| db.write(|txn| txn.expire(&group, Timestamp(before), 3)).unwrap();
    assert_eq!(expire(&mut db, 99).entries, 0);
    let have = db.read(|reader| reader.have(&group)).unwrap();
    assert_eq!((expire(&mut db, 100).entries, expire(&mut db, 100).entries, expire(&mut db, 100).entries), (3, 1, 0));
    // nobody sends it again
    assert_eq!(db.read(|reader| reader.have(&group)).unwrap(), have);
    assert_eq!(store(&mut db, &entries[..4]).stored.len(), 0);
    assert_eq!(db.read(|reader| reader.holds_from(&group)).unwrap(), Cursor(5));
    assert_eq!(expire(&mut db, 200).entries, 1, "the last one stays");

    let range = |first, last| Range { first: Number(first), last: Number(last) };
    let want = |first, last| [Want { author: alice.id(), range: range(first, last) }];
    assert!(!db.read(|reader| reader.was_dropped(&group, &want(6, 9))).unwrap());
    assert!(!db.write(|txn| txn.want_again(&group, &want(6, 9))).unwrap());
    assert!(db.read(|reader| reader.was_dropped(&group, &want(2, 3))).unwrap());
    assert!(db.write(|txn| txn.want_again(&group, &want(2, 3))).unwrap());
    drop(db);
    let mut db = open(dir.path());
    assert_eq!(db.read(|reader| reader.wants(&group)).unwrap(), want(1, 5));
    assert_eq!(store(&mut db, &entries[..5]).stored.len(), 5);
    assert_eq!(db.read(|reader| reader.wants(&group)).unwrap(), []);
    assert_eq!(db.read(|reader| reader.max_cursor(&group)).unwrap(), Cursor(11));
}
