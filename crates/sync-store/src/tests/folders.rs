//! Folders: their rows, the index of their files, where chunks lie, and what was kept.

use std::collections::BTreeMap;

use proptest::prelude::*;
use sync_types::{Cursor, FolderId, GroupId, Timestamp, TreePath};
use tempfile::TempDir;

use super::support::*;
use crate::{Db, DiskState, FileRow, FolderRow, FolderRowId, FolderTotals, NewKept, Store, StoreError, Text};

const FOLDER: FolderId = FolderId([4; 16]);

/// A database with one folder.
fn with_folder(dir: &TempDir) -> (Db, GroupId, FolderRowId) {
    let (mut db, group) = founded(dir.path(), &author(1));
    let fid = db.write(|txn| txn.add_folder(&group, &FOLDER, "photos")).unwrap();
    (db, group, fid)
}

/// Adds a folder to the group of another founder.
fn other_group(db: &mut Db, founder: u8) -> (GroupId, FolderRowId) {
    let founder = author(founder);
    db.write(|txn| {
        let group = txn.create_group(&charter(&founder, 1), founder.id())?;
        Ok((group, txn.add_folder(&group, &FOLDER, "theirs")?))
    })
    .unwrap()
}

fn disk(size: u64, hash: Option<[u8; 32]>) -> DiskState {
    DiskState { kind: 2, size, mtime: -5, ino: u64::MAX, mode: 0o640, hash, vector: vec![1, 2] }
}

fn kept(key: &[u8], at: u64, size: u64) -> NewKept {
    let (key, at) = (key.to_vec(), Timestamp(at));
    let (name, hash, chunks) = (format!("2026-11/{}", at.0), Some([7; 32]), Vec::new());
    NewKept { key, at, name, size, hash, mode: 0o600, mtime: -1, reason: 3, chunks }
}

/// What a paging call gives, page by page.
fn paged(page: impl Fn(Option<&[u8]>) -> Result<Vec<FileRow>, StoreError>) -> Vec<FileRow> {
    let mut all: Vec<FileRow> = Vec::new();
    loop {
        let rows = page(all.last().map(|row| &row.key[..])).unwrap();
        if rows.is_empty() {
            return all;
        }
        all.extend(rows);
    }
}

fn keys(rows: &[FileRow]) -> Vec<&[u8]> {
    rows.iter().map(|row| &row.key[..]).collect()
}

fn count(db: &Db, table: &str) -> i64 {
    db.raw().query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
}

#[test]
fn a_folder_is_added_once_and_keeps_what_is_said_of_it() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, fid) = with_folder(&dir);
    db.write(|txn| {
        txn.set_folder_name(fid, "pictures")?;
        txn.set_folder_root(fid, Some("/home/alice/pictures"))?;
        txn.set_folder_settings(fid, "{}")?;
        txn.set_folder_cursor(fid, Cursor(9))
    })
    .unwrap();
    let again = db.write(|txn| txn.add_folder(&group, &FOLDER, "another name")).unwrap();
    assert_eq!(again, fid);
    let row = FolderRow {
        fid,
        group,
        id: FOLDER,
        name: "pictures".to_owned(),
        root: Some("/home/alice/pictures".to_owned()),
        settings: "{}".to_owned(),
        cursor: Cursor(9),
    };
    let (other, theirs) = other_group(&mut db, 2);
    assert_ne!(theirs, fid);
    db.close().unwrap();
    let mut db = open(dir.path());
    assert_eq!(db.read(|reader| reader.folder(&group, &FOLDER)).unwrap(), Some(row.clone()));
    assert_eq!(db.read(|reader| reader.folder(&group, &FolderId([5; 16]))).unwrap(), None);
    let all = db.read(|reader| reader.folders()).unwrap();
    assert_eq!((&all[0], all[1].group, all[1].root.as_ref(), all.len()), (&row, other, None, 2));
    db.write(|txn| txn.set_folder_root(fid, None)).unwrap();
    assert_eq!(db.read(|reader| reader.folders()).unwrap()[0].root, None);
    let stranger = db.write(|txn| txn.add_folder(&GroupId([0; 32]), &FOLDER, ""));
    assert!(matches!(stranger, Err(StoreError::UnknownGroup(_))), "{stranger:?}");
}

#[test]
fn a_path_is_one_row_whatever_is_said_of_it_first() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let read = |db: &Db| db.read(|reader| reader.file(fid, b"a")).unwrap().unwrap();
    let file = db.write(|txn| txn.put_versions(fid, b"a", b"v1", true, 10, true)).unwrap();
    let mut row =
        FileRow { file, key: b"a".to_vec(), versions: b"v1".to_vec(), disk: None, pending: true, live: true, size: 10 };
    assert_eq!(read(&db), row);
    let there = disk(10, Some([3; 32]));
    db.write(|txn| txn.set_disk(file, Some(&there), false)).unwrap();
    (row.disk, row.pending) = (Some(there.clone()), false);
    assert_eq!(read(&db), row);
    assert_eq!(db.write(|txn| txn.put_versions(fid, b"a", b"v2", false, 0, true)).unwrap(), file);
    (row.versions, row.live, row.size, row.pending) = (b"v2".to_vec(), false, 0, true);
    assert_eq!(read(&db), row, "what is known of the disk stays");
    let link = DiskState { hash: None, mtime: i64::MIN, ino: 0, ..there };
    assert_eq!(db.write(|txn| txn.put_file(fid, b"a", b"v3", true, 5, Some(&link), false)).unwrap(), file);
    (row.versions, row.live, row.size, row.pending, row.disk) = (b"v3".to_vec(), true, 5, false, Some(link));
    assert_eq!(read(&db), row);
    assert_eq!(db.write(|txn| txn.put_file(fid, b"a", b"", true, u64::MAX, None, false)).unwrap(), file);
    (row.versions, row.size, row.disk) = (vec![], i64::MAX.unsigned_abs(), None);
    assert_eq!(read(&db), row, "a size no column holds is the largest one");
    db.close().unwrap();
    let mut db = open(dir.path());
    assert_eq!(read(&db), row);
    db.write(|txn| txn.remove_file(file)).unwrap();
    assert_eq!(db.read(|reader| reader.file(fid, b"a")).unwrap(), None);
    db.write(|txn| txn.remove_file(file)).unwrap();
}

#[test]
fn paths_come_in_the_order_of_a_walk() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let (_, theirs) = other_group(&mut db, 2);
    // a character below the slash, and one above, after a name that is also a directory's
    let ordered = ["a", "a/b", "a/b/c", "a/ü", "a b", "a-", "a0", "b"].map(|path| TreePath::new(path).unwrap());
    db.write(|txn| {
        for path in ordered.iter().rev() {
            txn.put_versions(fid, &path.key(), b"", true, 1, path.as_str().starts_with("a/"))?;
        }
        txn.put_versions(theirs, b"a\0theirs", b"", true, 1, true)
    })
    .unwrap();
    let ordered: Vec<Vec<u8>> = ordered.iter().map(TreePath::key).collect();
    for limit in [1, 2, 3, 100] {
        let all = paged(|after| db.read(|reader| reader.files_after(fid, after, limit)));
        assert_eq!(keys(&all), ordered);
        let below = paged(|after| db.read(|reader| reader.files_below(fid, b"a", after, limit)));
        assert_eq!(keys(&below), ordered[1..4], "neither the directory nor what only begins like it");
        let pending = paged(|after| db.read(|reader| reader.pending_after(fid, after, limit)));
        assert_eq!(pending, below);
    }
    let between = db.read(|reader| reader.files_after(fid, Some(b"a\0a"), 1)).unwrap();
    assert_eq!(keys(&between), [b"a\0b"], "the key to go on from need not exist");
    assert_eq!(db.read(|reader| reader.files_below(fid, b"b", None, 9)).unwrap(), []);
    assert_eq!(db.read(|reader| reader.files_below(fid, b"a", Some(b"b"), 9)).unwrap(), []);
}

#[test]
fn what_is_pending_is_found_until_it_is_settled() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let pending = |db: &Db| db.read(|reader| reader.pending_after(fid, None, 9)).unwrap().len();
    let file = db.write(|txn| txn.put_versions(fid, b"a", b"", true, 1, true)).unwrap();
    assert_eq!(pending(&db), 1);
    db.write(|txn| txn.set_disk(file, Some(&disk(1, None)), false)).unwrap();
    assert_eq!(pending(&db), 0);
    db.write(|txn| txn.put_versions(fid, b"a", b"", true, 2, true)).unwrap();
    assert_eq!(pending(&db), 1);
    db.write(|txn| txn.remove_file(file)).unwrap();
    assert_eq!(pending(&db), 0);
}

#[test]
fn files_are_found_by_the_hash_they_have_on_disk() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let (_, theirs) = other_group(&mut db, 2);
    let (hash, mut twin) = ([8; 32], [8; 32]);
    twin[31] = 0;
    let files = db
        .write(|txn| {
            txn.put_file(theirs, b"theirs", b"", true, 1, Some(&disk(1, Some(hash))), false)?;
            txn.put_file(fid, b"twin", b"", true, 1, Some(&disk(1, Some(twin))), false)?;
            txn.put_file(fid, b"none", b"", true, 1, Some(&disk(1, None)), false)?;
            let one = txn.put_file(fid, b"one", b"", true, 1, Some(&disk(1, Some(hash))), false)?;
            Ok([one, txn.put_file(fid, b"two", b"", true, 1, Some(&disk(1, Some(hash))), false)?])
        })
        .unwrap();
    let found = |db: &Db, limit| {
        let rows = db.read(|reader| reader.files_by_hash(fid, &hash, limit)).unwrap();
        rows.iter().map(|row| row.file).collect::<Vec<_>>()
    };
    assert_eq!(found(&db, 9), files);
    assert_eq!(found(&db, 1).len(), 1);
    db.write(|txn| txn.set_disk(files[0], None, true)).unwrap();
    assert_eq!(found(&db, 9), files[1..]);
    db.write(|txn| txn.set_disk(files[1], Some(&disk(1, Some(twin))), false)).unwrap();
    assert_eq!(found(&db, 9), []);
}

#[test]
fn chunks_are_found_where_they_lie() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, fid) = with_folder(&dir);
    let [one, two, three] = [[1; 32], [2; 32], [3; 32]];
    let file = db.write(|txn| txn.put_file(fid, b"a", b"", true, 30, Some(&disk(30, Some([9; 32]))), false)).unwrap();
    db.write(|txn| txn.put_chunks(file, &[(three, 5, 10), (one, 0, 5), (three, 20, 10)])).unwrap();
    let list = |db: &Db| db.read(|reader| reader.chunk_list(file)).unwrap();
    assert_eq!(list(&db), [(one, 0, 5), (three, 5, 10), (three, 20, 10)]);
    assert_eq!(db.read(|reader| reader.chunks_of(file)).unwrap(), [(0, 5), (5, 10), (20, 10)]);
    let places = |db: &Db, hash, limit| {
        let places = db.read(|reader| reader.chunk_places(&group, &hash, limit)).unwrap();
        places.into_iter().map(|place| (place.key, place.offset, place.len)).collect::<Vec<_>>()
    };
    assert_eq!(places(&db, three, 9), [(b"a".to_vec(), 5, 10), (b"a".to_vec(), 20, 10)]);
    assert_eq!(places(&db, three, 1).len(), 1);
    assert_eq!(places(&db, two, 9), []);
    db.write(|txn| txn.put_chunks(file, &[(two, 0, 30)])).unwrap();
    assert_eq!((places(&db, three, 9), places(&db, two, 9)), (vec![], vec![(b"a".to_vec(), 0, 30)]));
    assert_eq!(list(&db), [(two, 0, 30)]);
    db.write(|txn| txn.remove_file(file)).unwrap();
    assert_eq!((places(&db, two, 9), list(&db), count(&db, "chunks")), (vec![], vec![], 0));
}

#[test]
fn a_file_that_is_one_chunk_takes_no_row_of_chunks() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, fid) = with_folder(&dir);
    let hash = [6; 32];
    let there = disk(7, Some(hash));
    let places = |db: &Db| {
        let places = db.read(|reader| reader.chunk_places(&group, &hash, 9)).unwrap();
        places.into_iter().map(|place| (place.key, place.offset, place.len)).collect::<Vec<_>>()
    };
    let list = |db: &Db, file| db.read(|reader| reader.chunk_list(file)).unwrap();
    let file = db.write(|txn| txn.put_file(fid, b"a", b"", true, 7, Some(&there), false)).unwrap();
    assert_eq!((places(&db), list(&db, file)), (vec![], vec![]), "a hash alone makes no chunk");
    db.write(|txn| txn.put_chunks(file, &[(hash, 0, 7)])).unwrap();
    let known = (vec![(b"a".to_vec(), 0, 7)], vec![(hash, 0, 7)]);
    assert_eq!((places(&db), list(&db, file), count(&db, "chunks")), (known.0.clone(), known.1.clone(), 0));
    // touched and moved about, it is the same content
    db.write(|txn| txn.set_disk(file, Some(&DiskState { mtime: 0, ..there.clone() }), true)).unwrap();
    db.write(|txn| txn.put_file(fid, b"a", b"v", true, 7, Some(&there), false)).unwrap();
    assert_eq!((places(&db), list(&db, file)), known);
    // other content, or none: the chunk is gone with the hash, and does not come back with it
    for other in [Some(disk(7, Some([1; 32]))), Some(disk(7, None)), None] {
        db.write(|txn| txn.put_chunks(file, &[(hash, 0, 7)])).unwrap();
        db.write(|txn| txn.set_disk(file, other.as_ref(), true)).unwrap();
        assert_eq!((places(&db), list(&db, file)), (vec![], vec![]));
        db.write(|txn| txn.set_disk(file, Some(&there), false)).unwrap();
        assert_eq!(places(&db), []);
        db.write(|txn| txn.put_chunks(file, &[(hash, 0, 7)])).unwrap();
        db.write(|txn| txn.put_file(fid, b"a", b"", true, 7, other.as_ref(), true)).unwrap();
        assert_eq!(places(&db), []);
        db.write(|txn| txn.set_disk(file, Some(&there), false)).unwrap();
    }
    db.write(|txn| txn.put_chunks(file, &[(hash, 0, 7)])).unwrap();
    // only a part of it, or several: these take rows
    for chunks in [&[(hash, 0, 6)][..], &[(hash, 1, 7)], &[([1; 32], 0, 7)], &[(hash, 0, 3), (hash, 3, 4)], &[]] {
        db.write(|txn| txn.put_chunks(file, chunks)).unwrap();
        assert_eq!((list(&db, file), count(&db, "chunks")), (chunks.to_vec(), i64::try_from(chunks.len()).unwrap()));
        let found: Vec<_> = chunks.iter().filter(|chunk| chunk.0 == hash).map(|(_, at, len)| (*at, *len)).collect();
        assert_eq!(places(&db).iter().map(|place| (place.1, place.2)).collect::<Vec<_>>(), found);
    }
    // told before what is on disk is known, it takes a row, and is still one place
    let early = db.write(|txn| txn.put_versions(fid, b"b", b"", true, 7, true)).unwrap();
    db.write(|txn| txn.put_chunks(early, &[(hash, 0, 7)])).unwrap();
    db.write(|txn| txn.set_disk(early, Some(&there), false)).unwrap();
    assert_eq!((places(&db), list(&db, early)), (vec![(b"b".to_vec(), 0, 7)], vec![(hash, 0, 7)]));
    assert_eq!(db.read(|reader| reader.chunks_of(early)).unwrap(), [(0, 7)]);
}

#[test]
fn a_group_is_never_told_of_another_groups_chunks() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, fid) = with_folder(&dir);
    let (other, theirs) = other_group(&mut db, 2);
    let (cut, whole) = ([1; 32], [2; 32]);
    db.write(|txn| {
        for fid in [fid, theirs] {
            let file = txn.put_file(fid, b"cut", b"", true, 9, Some(&disk(9, Some([9; 32]))), false)?;
            txn.put_chunks(file, &[(cut, 0, 4), ([3; 32], 4, 5)])?;
            let file = txn.put_file(fid, b"whole", b"", true, 9, Some(&disk(9, Some(whole))), false)?;
            txn.put_chunks(file, &[(whole, 0, 9)])?;
        }
        for (key, hash, len) in [(b"one", [4; 32], 9), (b"two", [5; 32], 4)] {
            let only_theirs = txn.put_file(theirs, key, b"", true, 9, Some(&disk(9, Some([4; 32]))), false)?;
            txn.put_chunks(only_theirs, &[(hash, 0, len)])?;
        }
        Ok(())
    })
    .unwrap();
    let places = |group, hash| db.read(|reader| reader.chunk_places(&group, &hash, 9)).unwrap();
    for (group, fid) in [(group, fid), (other, theirs)] {
        for hash in [cut, whole] {
            let found = places(group, hash);
            assert_eq!(found.iter().map(|place| place.fid).collect::<Vec<_>>(), [fid]);
        }
    }
    for hash in [[4; 32], [5; 32]] {
        assert_eq!((places(group, hash).len(), places(other, hash).len()), (0, 1));
    }
    let stranger = db.read(|reader| reader.chunk_places(&GroupId([0; 32]), &cut, 9));
    assert!(matches!(stranger, Err(StoreError::UnknownGroup(_))), "{stranger:?}");
}

#[test]
fn folders_that_are_placed_are_the_first_to_be_read_from() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, unplaced) = with_folder(&dir);
    let placed = db.write(|txn| txn.add_folder(&group, &FolderId([5; 16]), "placed")).unwrap();
    let hash = [1; 32];
    db.write(|txn| {
        txn.set_folder_root(placed, Some("/srv"))?;
        for fid in [unplaced, placed] {
            let file = txn.put_file(fid, b"a", b"", true, 9, Some(&disk(9, Some(hash))), false)?;
            txn.put_chunks(file, &[(hash, 0, 9)])?;
        }
        Ok(())
    })
    .unwrap();
    let roots = |limit| {
        let places = db.read(|reader| reader.chunk_places(&group, &hash, limit)).unwrap();
        places.into_iter().map(|place| place.root).collect::<Vec<_>>()
    };
    assert_eq!(roots(9), [Some("/srv".to_owned()), None]);
    assert_eq!(roots(1), [Some("/srv".to_owned())]);
}

#[test]
fn chunks_of_kept_versions_are_found_until_they_are_forgotten() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, fid) = with_folder(&dir);
    let cut = NewKept { chunks: vec![([1; 32], 0, 10), ([2; 32], 10, 5), ([1; 32], 15, 10)], ..kept(b"a", 1, 25) };
    let cut = NewKept { hash: Some([9; 32]), ..cut };
    let kid = db.write(|txn| txn.add_kept(fid, &cut)).unwrap();
    let whole = db.write(|txn| txn.add_kept(fid, &kept(b"b", 2, 3))).unwrap();
    let places = |db: &Db, hash| {
        let found = db.read(|reader| reader.kept_places(&group, &[hash; 32], 9)).unwrap();
        found.into_iter().map(|(in_folder, row, offset, len)| (in_folder, row.kid, offset, len)).collect::<Vec<_>>()
    };
    assert_eq!(places(&db, 1), [(fid, kid, 0, 10), (fid, kid, 15, 10)]);
    assert_eq!(places(&db, 7), [(fid, whole, 0, 3)]);
    assert_eq!(places(&db, 9), [(fid, kid, 0, 25)]);
    assert_eq!(places(&db, 3), []);
    assert_eq!(db.read(|reader| reader.kept_chunks(kid)).unwrap(), cut.chunks);
    db.write(|txn| txn.remove_kept(kid)).unwrap();
    assert_eq!(places(&db, 1), []);
}

#[test]
fn texts_of_a_path_are_few_and_all_together_have_a_bound() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let text = |n: u8, len| Text { hash: [n; 32], vector: vec![n], packed: vec![n; len] };
    let hashes = |db: &Db, key: &[u8]| {
        let texts = db.read(|reader| reader.texts(fid, key)).unwrap();
        texts.iter().map(|text| text.hash[0]).collect::<Vec<_>>()
    };
    for n in 1..=5 {
        db.write(|txn| txn.put_text(fid, b"a", &text(n, 10), Timestamp(n.into()), 3)).unwrap();
    }
    db.write(|txn| txn.put_text(fid, b"b", &text(6, 100), Timestamp(2), 3)).unwrap();
    assert_eq!((hashes(&db, b"a"), hashes(&db, b"b")), (vec![5, 4, 3], vec![6]));
    db.write(|txn| txn.put_text(fid, b"a", &text(3, 10), Timestamp(9), 3)).unwrap();
    assert_eq!(hashes(&db, b"a"), [3, 5, 4], "the same text again is newer");
    db.write(|txn| txn.trim_texts(fid, 30)).unwrap();
    assert_eq!((hashes(&db, b"a"), hashes(&db, b"b")), (vec![3, 5, 4], vec![]));
    db.write(|txn| txn.trim_texts(fid, 19)).unwrap();
    assert_eq!(hashes(&db, b"a"), [3]);
    assert_eq!(db.read(|reader| reader.texts(fid, b"a")).unwrap(), [text(3, 10)]);
}

#[test]
fn kept_versions_are_listed_by_path_and_by_age() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let (_, theirs) = other_group(&mut db, 2);
    let (ids, other) = db
        .write(|txn| {
            let mut ids = Vec::new();
            for (key, at, size) in [(b"a", 5, 100), (b"b", 3, 10), (b"a", 7, 1 << 40), (b"a", 5, 9)] {
                ids.push(txn.add_kept(fid, &kept(key, at, size))?);
            }
            Ok((ids, txn.add_kept(theirs, &kept(b"a", 6, 1))?))
        })
        .unwrap();
    let of_a = db.read(|reader| reader.kept(fid, b"a")).unwrap();
    assert_eq!(of_a.iter().map(|row| row.kid).collect::<Vec<_>>(), [ids[2], ids[3], ids[0]]);
    let row = &of_a[1];
    let NewKept { key, at, name, size, hash, mode, mtime, reason, .. } = kept(b"a", 5, 9);
    assert_eq!((&row.key, row.at, &row.name, row.size, row.hash), (&key, at, &name, size, hash));
    assert_eq!((row.mode, row.mtime, row.reason), (mode, mtime, reason));
    for limit in [1, 2, 9] {
        let mut oldest: Vec<crate::KeptRow> = Vec::new();
        loop {
            let after = oldest.last().map(|row| (row.at, row.kid));
            let page = db.read(|reader| reader.kept_oldest(fid, after, limit)).unwrap();
            if page.is_empty() {
                break;
            }
            oldest.extend(page);
        }
        assert_eq!(oldest.iter().map(|row| row.kid).collect::<Vec<_>>(), [ids[1], ids[0], ids[3], ids[2]]);
    }
    assert_eq!(db.read(|reader| reader.kept_bytes(fid)).unwrap(), (1 << 40) + 119);
    db.write(|txn| txn.remove_kept(ids[2])).unwrap();
    assert_eq!(db.read(|reader| reader.kept_bytes(fid)).unwrap(), 119);
    assert_eq!(db.read(|reader| reader.kept(theirs, b"a")).unwrap()[0].kid, other);
}

#[test]
fn a_removed_folder_leaves_nothing_and_others_alone() {
    let dir = TempDir::new().unwrap();
    let (mut db, group, fid) = with_folder(&dir);
    let (_, theirs) = other_group(&mut db, 2);
    let fill = |db: &mut Db, fid| {
        db.write(|txn| {
            for key in 0..10u8 {
                let file = txn.put_file(fid, &[key], b"v", true, 9, Some(&disk(9, Some([key; 32]))), key % 2 == 0)?;
                txn.put_chunks(file, &[([key; 32], 0, 4), ([key; 32], 4, 5)])?;
                txn.add_kept(fid, &kept(&[key], 1, 1))?;
            }
            Ok(())
        })
        .unwrap();
    };
    let counts = |db: &Db| ["folders", "folder_totals", "files", "chunks", "kept"].map(|table| count(db, table));
    fill(&mut db, theirs);
    let others = counts(&db);
    fill(&mut db, fid);
    assert_eq!(counts(&db), [2, 2, 20, 40, 20]);
    assert_eq!(db.write(|txn| txn.remove_files(fid, 7)).unwrap(), 7);
    assert_eq!(db.read(|reader| reader.folder_totals(fid)).unwrap().files, 3);
    db.write(|txn| txn.remove_folder(fid)).unwrap();
    assert_eq!(counts(&db), [1, 1, others[2], others[3], others[4]]);
    assert_eq!(db.read(|reader| reader.folder(&group, &FOLDER)).unwrap(), None);
    assert_eq!(db.read(|reader| reader.folder_totals(fid)).unwrap(), FolderTotals::default());
    db.read(|reader| reader.group(&group)).unwrap();
    // added again, it begins anew
    let again = db.write(|txn| txn.add_folder(&group, &FOLDER, "photos")).unwrap();
    assert_eq!(db.read(|reader| reader.files_after(again, None, 9)).unwrap(), []);
    db.read(|reader| reader.integrity()).unwrap();
}

#[test]
fn what_is_said_of_a_folder_that_is_gone_is_refused() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    let file = db.write(|txn| txn.put_versions(fid, b"a", b"", true, 1, false)).unwrap();
    let before = db.read(|reader| reader.folder_totals(fid)).unwrap();
    let other = db.write(|txn| {
        txn.remove_folder(fid)?;
        for refused in [
            txn.attempt(|txn| txn.set_folder_cursor(fid, Cursor(1))).err(),
            txn.attempt(|txn| txn.put_versions(fid, b"a", b"", true, 1, false)).err(),
            txn.attempt(|txn| txn.put_file(fid, b"a", b"", true, 1, None, false)).err(),
            txn.attempt(|txn| txn.set_disk(file, None, false)).err(),
            txn.attempt(|txn| txn.put_chunks(file, &[([1; 32], 0, 1)])).err(),
            txn.attempt(|txn| txn.add_kept(fid, &kept(b"a", 1, 1))).err(),
        ] {
            assert!(matches!(refused, Some(StoreError::Sql(_))), "{refused:?}");
        }
        Err::<(), _>(StoreError::Closed)
    });
    assert!(matches!(other, Err(StoreError::Closed)));
    assert_eq!(db.read(|reader| reader.folder_totals(fid)).unwrap(), before, "the removal was taken back");
}

#[test]
fn sizes_that_no_disk_holds_do_not_overflow_the_totals() {
    let dir = TempDir::new().unwrap();
    let (mut db, _, fid) = with_folder(&dir);
    db.write(|txn| {
        for key in 0..5u8 {
            txn.put_versions(fid, &[key], b"", true, u64::MAX, true)?;
        }
        txn.put_versions(fid, b"small", b"", true, 3, false)
    })
    .unwrap();
    let totals = |db: &Db| db.read(|reader| reader.folder_totals(fid)).unwrap();
    let full = FolderTotals {
        files: 6,
        bytes: u64::MAX,
        pending_files: 5,
        pending_bytes: u64::MAX,
        ..FolderTotals::default()
    };
    assert_eq!(totals(&db), full);
    assert_eq!(db.write(|txn| txn.remove_files(fid, 5)).unwrap(), 5);
    assert_eq!(totals(&db), FolderTotals { files: 1, bytes: 3, ..FolderTotals::default() });
}

/// A change to the index.
#[derive(Debug, Clone)]
enum Step {
    /// All of a path: live, size, pending.
    File(u8, bool, u64, bool),
    /// What the group says of a path.
    Versions(u8, bool, u64, bool),
    /// What lies on disk.
    Disk(u8, bool),
    /// Whether the path is left out.
    LeftOut(u8, bool),
    Remove(u8),
    RemoveSome(usize),
    /// Changes that are taken back.
    Fail(Vec<Step>),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![0..100u64, Just(1 << 32), Just((1 << 33) - 1)];
    let said = (0..6u8, any::<bool>(), size, any::<bool>());
    let change = prop_oneof![
        4 => said.clone().prop_map(|(key, live, size, pending)| Step::File(key, live, size, pending)),
        4 => said.prop_map(|(key, live, size, pending)| Step::Versions(key, live, size, pending)),
        3 => (0..6u8, any::<bool>()).prop_map(|(key, pending)| Step::Disk(key, pending)),
        3 => (0..6u8, any::<bool>()).prop_map(|(key, left_out)| Step::LeftOut(key, left_out)),
        2 => (0..6u8).prop_map(Step::Remove),
        1 => (0..4usize).prop_map(Step::RemoveSome),
    ];
    let step = prop_oneof![
        12 => change.clone(),
        1 => proptest::collection::vec(change, 1..4).prop_map(Step::Fail),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..30)
}

fn carry_out(txn: &mut crate::Txn<'_>, fid: FolderRowId, step: &Step) -> Result<(), StoreError> {
    match *step {
        Step::File(key, live, size, pending) => {
            let there = disk(size, None);
            txn.put_file(fid, &[key], b"", live, size, live.then_some(&there), pending)?;
        }
        Step::Versions(key, live, size, pending) => {
            txn.put_versions(fid, &[key], b"", live, size, pending)?;
        }
        Step::Disk(key, pending) => {
            if let Some(row) = txn.reader().file(fid, &[key])? {
                txn.set_disk(row.file, None, pending)?;
            }
        }
        Step::LeftOut(key, left_out) => {
            if let Some(row) = txn.reader().file(fid, &[key])? {
                txn.set_left_out(row.file, left_out)?;
            }
        }
        Step::Remove(key) => {
            if let Some(row) = txn.reader().file(fid, &[key])? {
                txn.remove_file(row.file)?;
            }
        }
        Step::RemoveSome(limit) => {
            txn.remove_files(fid, limit)?;
        }
        Step::Fail(ref steps) => {
            let failed = txn.attempt(|txn| {
                steps.iter().try_for_each(|step| carry_out(txn, fid, step))?;
                Err::<(), _>(StoreError::Closed)
            });
            assert!(matches!(failed, Err(StoreError::Closed)), "{failed:?}");
        }
        Step::Reopen => {}
    }
    Ok(())
}

/// What is known of a path, as the totals count it: live, size, pending, left out.
type Model = BTreeMap<u8, (bool, u64, bool, bool)>;

fn model(model: &mut Model, step: &Step) {
    match *step {
        Step::File(key, live, size, pending) | Step::Versions(key, live, size, pending) => {
            let left_out = model.get(&key).is_some_and(|known| known.3);
            model.insert(key, (live, size, pending, left_out));
        }
        Step::Disk(key, pending) => {
            model.entry(key).and_modify(|known| known.2 = pending);
        }
        Step::LeftOut(key, left_out) => {
            model.entry(key).and_modify(|known| known.3 = left_out);
        }
        Step::Remove(key) => {
            model.remove(&key);
        }
        Step::RemoveSome(limit) => *model = model.iter().skip(limit).map(|(key, known)| (*key, *known)).collect(),
        Step::Fail(_) | Step::Reopen => {}
    }
}

fn recount(model: &Model) -> FolderTotals {
    let mut totals = FolderTotals::default();
    for &(live, size, pending, left_out) in model.values() {
        totals.files += u64::from(live);
        totals.bytes += u64::from(live) * size;
        totals.pending_files += u64::from(pending);
        totals.pending_bytes += u64::from(live && pending) * size;
        totals.left_out_files += u64::from(live && left_out);
        totals.left_out_bytes += u64::from(live && left_out) * size;
    }
    totals
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn totals_are_what_a_recount_gives(steps in steps()) {
        let dir = TempDir::new().unwrap();
        let (mut db, _, fid) = with_folder(&dir);
        let (_, theirs) = other_group(&mut db, 2);
        db.write(|txn| txn.put_versions(theirs, &[0], b"", true, 77, true)).unwrap();
        let mut known = Model::new();
        for step in &steps {
            if let Step::Reopen = step {
                drop(db);
                db = open(dir.path());
            }
            db.write(|txn| carry_out(txn, fid, step)).unwrap();
            model(&mut known, step);
            prop_assert_eq!(db.read(|reader| reader.folder_totals(fid)).unwrap(), recount(&known));
        }
        let rows = db.read(|reader| reader.files_after(fid, None, 9)).unwrap();
        let rows: Vec<_> = rows.iter().map(|row| (row.key[0], row.live, row.size, row.pending)).collect();
        let known: Vec<_> = known.into_iter().map(|(key, (live, size, pending, _))| (key, live, size, pending)).collect();
        prop_assert_eq!(rows, known);
        let pending = FolderTotals { pending_files: 1, pending_bytes: 77, ..FolderTotals::default() };
        let others = FolderTotals { files: 1, bytes: 77, ..pending };
        prop_assert_eq!(db.read(|reader| reader.folder_totals(theirs)).unwrap(), others);
    }
}

/// Files of the large folder, and how many are read at once.
const MANY: usize = 100_000;
const PAGE: usize = 4096;

#[tokio::test]
async fn many_files_are_read_in_order_page_by_page() {
    let dir = TempDir::new().unwrap();
    let (db, _, fid) = with_folder(&dir);
    db.close().unwrap();
    let store = Store::open(&dir.path().join("db"), rng(1)).unwrap();
    // by a step that shares no factor with their number, so that they come in no order
    let key = |n: usize| format!("dir{:03}\0file{:05}", n / 1000, n).into_bytes();
    for from in (0..MANY).step_by(PAGE) {
        let write = move |txn: &mut crate::Txn<'_>| {
            for n in (from..MANY.min(from + PAGE)).map(|n| n * 61_803 % MANY) {
                let hash = *blake3::hash(&key(n)).as_bytes();
                let file = txn.put_file(fid, &key(n), &[1; 100], true, 9, Some(&disk(9, Some(hash))), n % 10 == 0)?;
                txn.put_chunks(file, &[(hash, 0, 9)])?;
            }
            Ok(())
        };
        store.write(PAGE * 400, write).await.unwrap();
    }
    let mut read = 0;
    let mut after = None;
    loop {
        let from = after.clone();
        let rows = store.read(move |reader| reader.files_after(fid, from.as_deref(), PAGE)).await.unwrap();
        for row in &rows {
            assert_eq!(row.key, key(read));
            assert!(row.disk.is_some());
            read += 1;
        }
        after = rows.last().map(|row| row.key.clone());
        if rows.len() < PAGE {
            break;
        }
    }
    assert_eq!(read, MANY);
    let pending = store.read(move |reader| reader.pending_after(fid, Some(&key(50_000)), 2)).await.unwrap();
    assert_eq!(keys(&pending), [key(50_010), key(50_020)]);
    let pending = FolderTotals { pending_files: 10_000, pending_bytes: 90_000, ..FolderTotals::default() };
    let totals = FolderTotals { files: 100_000, bytes: 900_000, ..pending };
    assert_eq!(store.read(move |reader| reader.folder_totals(fid)).await.unwrap(), totals);
    store.close().await.unwrap();
    let mut db = open(dir.path());
    assert_eq!(db.read(|reader| reader.folder_totals(fid)).unwrap(), totals);
    while db.write(|txn| txn.remove_files(fid, 10 * PAGE)).unwrap() > 0 {}
    db.write(|txn| txn.remove_folder(fid)).unwrap();
    assert_eq!((count(&db, "files"), count(&db, "folder_totals")), (0, 0));
}

#[test]
fn no_lookup_in_a_folder_reads_all_of_it() {
    let dir = TempDir::new().unwrap();
    let (db, ..) = with_folder(&dir);
    for (sql, index) in [
        ("SELECT * FROM files WHERE fid = ?1 AND key = ?2", "sqlite_autoindex_files_1 (fid=? AND key=?)"),
        (
            "SELECT * FROM files WHERE fid = ?1 AND key >= ?2 ORDER BY key LIMIT ?3",
            "sqlite_autoindex_files_1 (fid=? AND key>?)",
        ),
        (
            "SELECT * FROM files WHERE fid = ?1 AND key >= ?2 AND key < ?3 ORDER BY key LIMIT ?4",
            "sqlite_autoindex_files_1 (fid=? AND key>? AND key<?)",
        ),
        (
            "SELECT * FROM files INDEXED BY files_pending \
             WHERE fid = ?1 AND pending > 0 AND key >= ?2 ORDER BY key LIMIT ?3",
            "files_pending (fid=? AND key>?)",
        ),
        (
            "SELECT * FROM files INDEXED BY files_by_hash \
             WHERE fid = ?1 AND substr(disk_hash, 1, 8) = substr(?2, 1, 8) AND disk_hash = ?2 LIMIT ?3",
            "files_by_hash (fid=? AND <expr>=?)",
        ),
        ("SELECT * FROM chunks WHERE hash = ?1 AND fid = ?2", "PRIMARY KEY (hash=? AND fid=?)"),
        ("DELETE FROM chunks WHERE file = ?1", "chunks_by_file (file=?)"),
        (
            "SELECT disk_hash, 0 AS offset, disk_size FROM files WHERE file = ?1 AND whole \
             UNION ALL SELECT hash, offset, len FROM chunks WHERE file = ?1 ORDER BY offset",
            "chunks_by_file (file=?)",
        ),
        ("SELECT * FROM kept WHERE fid = ?1 AND key = ?2 ORDER BY at DESC, kid DESC", "kept_by_key (fid=? AND key=?)"),
        (
            "SELECT * FROM kept WHERE fid = ?1 AND (at, kid) > (?2, ?3) ORDER BY at, kid LIMIT ?4",
            "kept_by_time (fid=? AND at>?)",
        ),
        ("SELECT sum(size) FROM kept WHERE fid = ?1", "COVERING INDEX kept_by_time (fid=?)"),
        ("DELETE FROM folders WHERE fid = ?1", "INTEGER PRIMARY KEY"),
    ] {
        let mut plan = db.raw().prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let nulls = std::iter::repeat_n(rusqlite::types::Null, plan.parameter_count());
        let steps = plan.query_map(rusqlite::params_from_iter(nulls), |row| row.get("detail")).unwrap();
        let steps: Vec<String> = steps.collect::<Result<_, _>>().unwrap();
        assert!(steps.iter().any(|step| step.contains(index)), "{sql}: {steps:?}");
        assert!(!steps.iter().any(|step| step.contains("SCAN") || step.contains("TEMP B-TREE")), "{sql}: {steps:?}");
    }
}
