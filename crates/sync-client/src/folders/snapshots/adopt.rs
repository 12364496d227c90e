//! Comparing a snapshot with the index, and taking one in.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet, VecDeque};

use sync_core::folder::snapshot::{Comparison, adopt as adopt_row, compare as compare_row};
use sync_core::folder::{Coverage, Versions};
use sync_store::{FileRow, FolderRowId, Reader, SnapshotRow, SnapshotRowId, StoreError, Txn};
use sync_types::folder::{Dot, TreePath};
use sync_types::snapshot::{Item, Snapshot};
use sync_types::{AuthorId, EnvelopeHash, GroupId, Range};
use tokio::runtime::Handle;

use super::super::engine::Folder;
use super::super::index::{self, Place};
use super::super::rows;
use super::content::{Broken, Content, Stream, untaken};
use super::{Settled, complete, coverage};

/// Rows compared or taken in at once.
const PAGE: usize = 1024;
/// Bytes of rows, as they are encoded, taken in at once: a row may have a megabyte.
const PAGE_BYTES: usize = 4 << 20;
/// Ranges of entries that count as taken in from one commit on.
const RANGES: usize = 4096;

/// Compares a snapshot with the index, which has taken in all that it covers; where they agree, it is complete.
pub(super) fn compare(
    folder: &Folder,
    sid: SnapshotRowId,
    content: &Content,
    snapshot: &Snapshot,
) -> Result<Settled, StoreError> {
    let covered = coverage(snapshot.covered.iter().copied());
    let compared = folder.store().read_here(|reader| {
        // what an older one covers may be forgotten here: only one that covers as much says anything of it
        if !covered.covers(&coverage(reader.covered(folder.fid)?)) {
            return Ok(None);
        }
        compare_all(reader, folder, content, &covered).map(Some)
    })?;
    let verdict = match compared {
        None => return Ok(Settled::Obsolete),
        Some(verdict) => verdict,
    };
    match verdict {
        (Comparison::Different, path) => {
            let path = path.map(|path| path.to_string()).unwrap_or_default();
            Ok(Settled::Refused(format!("a snapshot does not say of {path} what the log says, and is not used")))
        }
        (Comparison::Unknown, _) => Ok(Settled::Unsure),
        (Comparison::Same, _) => {
            let (fid, group, covered) = (folder.fid, folder.group.id, snapshot.covered.clone());
            let complete = move |txn: &mut Txn<'_>| complete(txn, fid, sid, &group, &covered, true);
            Handle::current().block_on(folder.store().write(0, complete))?;
            Ok(Settled::Complete)
        }
    }
}

fn compare_all(
    reader: &Reader<'_>,
    folder: &Folder,
    content: &Content,
    covered: &Coverage,
) -> Result<(Comparison, Option<TreePath>), StoreError> {
    let mut index = Index { fid: folder.fid, page: VecDeque::new(), last: None, ended: false };
    let mut items = Stream::new(folder, content);
    let mut verdict = Comparison::Same;
    loop {
        let said = next_row(&mut items, reader)?;
        let key = said.as_ref().map(|(path, _)| path.key());
        // rows that the snapshot does not name
        while let Some(row) = index.peek(reader)?.filter(|row| key.as_ref().is_none_or(|key| row.key < *key)) {
            let path = TreePath::from_key(&row.key);
            match compare_row(&rows::versions(Some(row))?, None, covered) {
                Comparison::Different => return Ok((Comparison::Different, path)),
                Comparison::Unknown => verdict = Comparison::Unknown,
                Comparison::Same => {}
            }
            index.page.pop_front();
        }
        let Some((path, said)) = said else { return Ok((verdict, None)) };
        let here = index.peek(reader)?.filter(|row| Some(&row.key) == key.as_ref());
        let versions = rows::versions(here)?;
        if here.is_some() {
            index.page.pop_front();
        }
        match compare_row(&versions, Some(&decoded(&said)?), covered) {
            Comparison::Different => return Ok((Comparison::Different, Some(path))),
            Comparison::Unknown => verdict = Comparison::Unknown,
            Comparison::Same => {}
        }
    }
}

/// Rows of the index in the order of their keys.
struct Index {
    fid: FolderRowId,
    page: VecDeque<FileRow>,
    last: Option<Vec<u8>>,
    ended: bool,
}

impl Index {
    fn peek(&mut self, reader: &Reader<'_>) -> Result<Option<&FileRow>, StoreError> {
        if self.page.is_empty() && !self.ended {
            let (page, ended) = reader.files_within(self.fid, self.last.as_deref(), PAGE, PAGE_BYTES)?;
            (self.page, self.ended) = (page.into(), ended);
            self.last = self.page.back().map(|row| row.key.clone());
        }
        Ok(self.page.front())
    }
}

fn decoded(versions: &[u8]) -> Result<Versions, StoreError> {
    Versions::decode(versions).map_err(|_| StoreError::Corrupt("a snapshot's row".into()))
}

/// The next row of a content that was looked through.
fn next_row(items: &mut Stream<'_>, reader: &Reader<'_>) -> Result<Option<(TreePath, Vec<u8>)>, StoreError> {
    loop {
        match next(items, reader)? {
            Some(Item::Row { path, versions }) => return Ok(Some((path, versions))),
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

fn next(items: &mut Stream<'_>, reader: &Reader<'_>) -> Result<Option<Item>, StoreError> {
    items.next(reader).map_err(|broken| match broken {
        Broken::Content(reason) => StoreError::Corrupt(reason.into()),
        Broken::Store(error) => error,
    })
}

/// Takes a snapshot in: its rows into the index, a page in a commit, and then what it covers counts as taken in.
///
/// From before the first page on, entries that it covers are not taken in from the log any more: one that came behind
/// its row would bring back what is gone.
pub(super) fn adopt(
    folder: &Folder,
    begun: &SnapshotRow,
    content: &Content,
    snapshot: &Snapshot,
) -> Result<(), StoreError> {
    let (fid, group, sid) = (folder.fid, folder.group.id, begun.sid);
    let handle = Handle::current();
    let write = |bytes, work: Work| handle.block_on(folder.store().write(bytes, work));
    if begun.taken.is_none() {
        let covered = snapshot.covered.clone();
        write(0, Box::new(move |txn| txn.begin_adoption(fid, sid, &group, &covered)))?;
    }
    adopt_rows(folder, begun, content, coverage(snapshot.covered.iter().copied()), &handle)?;
    let mut items = Stream::new(folder, content);
    loop {
        // a range is known to be covered only once the rows are here
        let ranges = folder.store().read_here(|reader| next_ranges(&mut items, reader))?;
        let Some((author, ranges)) = ranges else { break };
        for some in ranges.chunks(RANGES) {
            let some = some.to_vec();
            write(some.len() * 64, Box::new(move |txn| txn.adopt_ranges(fid, &group, &author, &some)))?;
        }
        for (range, _) in ranges {
            // came while the rows were taken in, and so was not taken in itself
            let came = folder.store().read_here(|reader| untaken(reader, folder, &author, range))?;
            for some in came.ours.chunks(RANGES) {
                let some = some.to_vec();
                let note = move |txn: &mut Txn<'_>| {
                    some.iter().try_for_each(|number| txn.note_covered(fid, &group, &author, *number))
                };
                write(RANGES * 64, Box::new(note))?;
            }
        }
    }
    let covered = snapshot.covered.clone();
    write(0, Box::new(move |txn| complete(txn, fid, sid, &group, &covered, false)))
}

type Work = Box<dyn FnOnce(&mut Txn<'_>) -> Result<(), StoreError> + Send>;
type Ranges = (AuthorId, Vec<(Range, EnvelopeHash)>);

fn next_ranges(items: &mut Stream<'_>, reader: &Reader<'_>) -> Result<Option<Ranges>, StoreError> {
    match next(items, reader)? {
        Some(Item::Covered { author, ranges }) => Ok(Some((author, ranges))),
        _ => Ok(None),
    }
}

fn adopt_rows(
    folder: &Folder,
    begun: &SnapshotRow,
    content: &Content,
    covered: Coverage,
    handle: &Handle,
) -> Result<(), StoreError> {
    let sid = begun.sid;
    let mut after = begun.taken.clone().filter(|key| !key.is_empty());
    let mut items = Stream::new(folder, content);
    let mut said: Vec<Said> = Vec::new();
    let mut ended = false;
    loop {
        let mut held: usize = said.iter().map(|row| row.versions.len()).sum();
        folder.store().read_here(|reader| {
            while said.len() < PAGE && held < PAGE_BYTES && !ended && !folder.cancel.is_cancelled() {
                let Some((path, versions)) = next_row(&mut items, reader)? else {
                    ended = true;
                    break;
                };
                let key = path.key();
                if after.as_ref().is_none_or(|after| key > *after) {
                    held += versions.len();
                    said.push(Said { key, versions });
                }
            }
            Ok(())
        })?;
        if folder.cancel.is_cancelled() {
            return Err(StoreError::Closed);
        }
        let page = Page {
            place: folder.place(),
            group: folder.group.id,
            after: after.clone(),
            said,
            is_last: ended,
            covered: covered.clone(),
        };
        let work = move |txn: &mut Txn<'_>| {
            let (reached, news, rest) = page.take_in(txn)?;
            if let Some(reached) = &reached {
                txn.set_snapshot_taken(sid, reached)?;
            }
            Ok((reached, news, rest))
        };
        let (reached, news, rest) = handle.block_on(folder.store().write(PAGE * 256 + held, work))?;
        said = rest;
        if news {
            folder.wake();
            folder.changed();
        }
        let Some(reached) = reached else { return Ok(()) };
        after = Some(reached);
    }
}

/// What a snapshot says of a path.
struct Said {
    key: Vec<u8>,
    /// As they are encoded: what they take is bounded by what the snapshot has.
    versions: Vec<u8>,
}

/// Rows of a snapshot, to be taken in beside those of the index.
struct Page {
    place: Place,
    group: GroupId,
    after: Option<Vec<u8>>,
    said: Vec<Said>,
    /// No rows of the snapshot follow.
    is_last: bool,
    covered: Coverage,
}

/// The key up to which a page was taken in, none if it is the end; whether something is to be done on disk; and the rows
/// that are left.
type TakenIn = (Option<Vec<u8>>, bool, Vec<Said>);

/// A path's row of the index, and what the snapshot says of it, as it is encoded.
type Both = (Option<FileRow>, Option<Vec<u8>>);

impl Page {
    /// Takes in what can be; the key up to which that is so, none if it is the end, whether something is to be done on disk,
    /// and what is left.
    fn take_in(self, txn: &mut Txn<'_>) -> Result<TakenIn, StoreError> {
        let (rows, ended) = txn.reader().files_within(self.place.fid, self.after.as_deref(), PAGE, PAGE_BYTES)?;
        // what lies behind the end of either page is not known yet
        let of_rows = rows.last().filter(|_| !ended).map(|row| row.key.clone());
        let of_said = self.said.last().filter(|_| !self.is_last).map(|row| row.key.clone());
        let reached = match (of_rows, of_said) {
            (Some(rows), Some(said)) => Some(rows.min(said)),
            (rows, said) => rows.or(said),
        };
        let within = |key: &[u8]| reached.as_ref().is_none_or(|reached| key <= reached.as_slice());
        let mut both: BTreeMap<Vec<u8>, Both> = BTreeMap::new();
        for row in rows.into_iter().filter(|row| within(&row.key)) {
            both.insert(row.key.clone(), (Some(row), None));
        }
        let (said, rest): (Vec<Said>, Vec<Said>) = self.said.into_iter().partition(|row| within(&row.key));
        for Said { key, versions } in said {
            both.entry(key).or_default().1 = Some(versions);
        }
        let mut news = false;
        let mut directories = HashSet::new();
        for (key, (row, said)) in both {
            let mut versions = rows::versions(row.as_ref())?;
            let said = said.map(|said| decoded(&said)).transpose()?;
            let failed = Cell::new(None);
            let changed = {
                let reader = txn.reader();
                let known = |dot: Dot| {
                    let range = Range { first: dot.number(), last: dot.number() };
                    reader.is_taken(self.place.fid, &self.group, &dot.author, range).unwrap_or_else(|error| {
                        failed.set(Some(error));
                        false
                    })
                };
                adopt_row(&mut versions, said.as_ref(), &self.covered, known)
            };
            if let Some(error) = failed.take() {
                return Err(error);
            }
            let Some(path) = TreePath::from_key(&key).filter(|_| changed) else { continue };
            news |= index::put_versions(txn, &self.place, &path, row.as_ref(), &versions, &mut directories)?;
        }
        Ok((reached, news, rest))
    }
}
