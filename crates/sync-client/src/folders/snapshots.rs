//! Snapshots of a folder: written when the log has grown, taken in where it lacks, compared where it does not.
//!
//! A snapshot that a member told is fetched like a file's chunks and looked through before anything is made of it. Where
//! all that it covers was taken in here, it is compared with the index, and what it covers leaves the log. Where some of
//! that lacks, its rows are taken into the index, a page in a commit, and then what it covers counts as taken in.
//! Each step can be done again, so that an end in between costs nothing but the step.

mod adopt;
mod content;
mod write;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sync_core::folder::Coverage;
use sync_store::{FolderRowId, Reader, Since, SnapshotRow, SnapshotRowId, SnapshotState, StoreError, Txn};
use sync_types::snapshot::Snapshot;
use sync_types::{AuthorId, Cursor, GroupId, Number};
use tokio::sync::{Notify, watch};

pub(crate) use self::content::unpack;
use self::content::{Content, Looked};
use super::engine::Folder;

/// Entries taken in since the last snapshot, after which one is worth more than they are; and the least number of records.
const SNAPSHOT_AFTER: u64 = 10_000;
/// Entries dropped, or rows looked at for being forgotten, in one commit.
const DROPPED: usize = 2_000;
/// Pieces of older snapshots removed in one commit.
const TRIMMED: usize = 16;
/// Wait before what could not be done is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Wait between two looks, so that many arrivals are one.
const PAUSE: Duration = Duration::from_millis(100);
/// How long nothing is applied for a snapshot whose content nobody has who is connected.
const PATIENCE: Duration = Duration::from_secs(10);

/// Times that something of a snapshot is found damaged here, until it is given up: fetching it once more mends a piece, and
/// where that does not help the disk is at fault, or something else in the database.
const DAMAGED: u32 = 3;
/// Looks at a snapshot of which it cannot be said whether it is right, until it is refused.
const LOOKS: u32 = 12;
/// The longest wait between two such looks.
const LONGEST: Duration = Duration::from_secs(3600);

/// A snapshot of which it could not be said whether it is right.
#[derive(Debug, Clone, Copy)]
struct Unsure {
    /// How far the log was taken in then.
    cursor: Cursor,
    looks: u32,
    again: Instant,
}

/// What a folder knows of its snapshots.
#[derive(Debug)]
pub(crate) struct Snapshots {
    /// Entries after which one is written.
    after: u64,
    wake: Notify,
    /// One is to be written here.
    due: AtomicBool,
    /// One was told that says what is not in the log: until it is here, the index is not what the group says.
    awaits: watch::Sender<bool>,
    since: Mutex<Option<Instant>>,
    /// Authors whose snapshots were waited for in vain.
    waited: Mutex<HashSet<AuthorId>>,
    unsure: Mutex<HashMap<SnapshotRowId, Unsure>>,
    /// How often something of a snapshot was damaged here.
    damaged: Mutex<HashMap<SnapshotRowId, u32>>,
    problem: Mutex<Option<String>>,
    pub(crate) fetched: AtomicU64,
}

impl Snapshots {
    pub(crate) fn new(after: Option<u64>) -> Self {
        Self {
            after: after.unwrap_or(SNAPSHOT_AFTER).max(1),
            wake: Notify::new(),
            due: AtomicBool::new(false),
            awaits: watch::channel(false).0,
            since: Mutex::default(),
            waited: Mutex::default(),
            unsure: Mutex::default(),
            damaged: Mutex::default(),
            problem: Mutex::default(),
            fetched: AtomicU64::new(0),
        }
    }

    /// Whether what the log says is only part of what the group says.
    pub(crate) fn awaits(&self) -> bool {
        *self.awaits.borrow()
    }

    fn set_awaits(&self, awaits: bool) -> bool {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = if awaits { since.or_else(|| Some(Instant::now())) } else { None };
        self.awaits.send_if_modified(|now| std::mem::replace(now, awaits) != awaits)
    }

    fn is_patient(&self) -> bool {
        let since = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() < PATIENCE)
    }

    /// Why the last snapshot that came is not believed.
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Takes note of how much of the log was taken in: who crosses the line writes a snapshot, others only far beyond it.
    pub(crate) fn note(&self, before: Since, now: Since, live: u64, own: bool) {
        let weight = |since: Since| self.weight(since, live);
        if weight(now) >= 2 || (own && weight(before) == 0 && weight(now) == 1) {
            self.due.store(true, Ordering::Relaxed);
        }
    }

    /// How many snapshots what was taken in since the last one is worth.
    fn weight(&self, since: Since, live: u64) -> u64 {
        (since.entries / self.after).max(self.weight_of_records(since, live))
    }

    fn weight_of_records(&self, since: Since, live: u64) -> u64 {
        since.records / self.after.saturating_add(live.saturating_mul(2)).max(1)
    }

    /// Has what was told looked at, and lets nothing be applied before if the author of what is awaited was not waited for
    /// in vain.
    pub(crate) fn wake(&self, awaited: Option<AuthorId>) {
        if awaited.is_some_and(|author| self.is_worth_waiting(&author)) {
            self.set_awaits(true);
        }
        self.wake.notify_one();
    }

    fn is_worth_waiting(&self, author: &AuthorId) -> bool {
        !self.waited.lock().unwrap_or_else(PoisonError::into_inner).contains(author)
    }

    /// Goes on waiting for these authors' snapshots, or for none of theirs any more; whether that changed anything.
    fn go_on_waiting(&self, lacking: &HashSet<AuthorId>) -> bool {
        let is_patient = self.is_patient();
        if self.awaits() && !is_patient {
            self.waited.lock().unwrap_or_else(PoisonError::into_inner).extend(lacking);
        }
        self.set_awaits(is_patient && lacking.iter().any(|author| self.is_worth_waiting(author)))
    }

    /// Whether a snapshot is to be looked at: not one that says no more than when it was looked at last.
    fn is_to_be_looked_at(&self, sid: SnapshotRowId, cursor: Cursor) -> bool {
        let unsure = self.unsure.lock().unwrap_or_else(PoisonError::into_inner);
        unsure.get(&sid).is_none_or(|last| last.cursor != cursor && last.again <= Instant::now())
    }

    /// Notes that nothing could be said of a snapshot; false once that was so too often.
    fn is_unsure(&self, sid: SnapshotRowId, cursor: Cursor) -> bool {
        let mut unsure = self.unsure.lock().unwrap_or_else(PoisonError::into_inner);
        let looks = unsure.get(&sid).map_or(0, |last| last.looks) + 1;
        let pause = RETRY.saturating_mul(1 << looks.min(LOOKS)).min(LONGEST);
        unsure.insert(sid, Unsure { cursor, looks, again: Instant::now() + pause });
        looks < LOOKS
    }

    /// Notes that something of a snapshot was damaged here; false once that was so too often.
    fn is_damaged(&self, sid: SnapshotRowId) -> bool {
        let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        let times = damaged.entry(sid).or_default();
        *times += 1;
        *times < DAMAGED
    }
}

/// Waits a moment for a snapshot without which the index says little of what the group does.
pub(crate) async fn before_scan(folder: &Folder) {
    let mut awaits = folder.snapshots.awaits.subscribe();
    let here = async { while *awaits.borrow_and_update() && awaits.changed().await.is_ok() {} };
    tokio::select! {
        _ = tokio::time::timeout(PATIENCE, here) => {}
        () = folder.cancel.cancelled() => {}
    }
}

/// What comes of a snapshot that was told.
enum Settled {
    /// The index agrees with it.
    Complete,
    /// It says less than what is known.
    Obsolete,
    /// Something it needs is not here yet.
    Waits,
    /// Whether it is right shows only once more was taken in.
    Unsure,
    /// It is not what it claims to be.
    Refused(String),
}

/// Looks after a folder's snapshots until the folder is stopped.
pub(crate) async fn run(folder: Arc<Folder>) {
    let mut progress = folder.group.watch_progress();
    let mut started = false;
    loop {
        progress.borrow_and_update();
        let done = async {
            if !started {
                tidy(&folder).await?;
                started = true;
            }
            step(&folder).await
        };
        let left = match done.await {
            Ok(left) => left,
            Err(StoreError::Closed) => return,
            Err(error) => {
                tracing::warn!(folder = %folder.name, %error, "snapshot waits");
                true
            }
        };
        tokio::select! {
            () = folder.cancel.cancelled() => return,
            () = folder.snapshots.wake.notified() => {}
            changed = progress.changed(), if left => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if left => {}
        }
        tokio::select! {
            () = folder.cancel.cancelled() => return,
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

/// Removes what was being written when the program ended, and finds what still waits.
async fn tidy(folder: &Arc<Folder>) -> Result<(), StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let work = move |txn: &mut Txn<'_>| {
        for row in txn.reader().snapshots(fid)? {
            if row.state == SnapshotState::Written {
                txn.remove_snapshot(row.sid)?;
            }
        }
        waiting(&txn.reader(), fid, &group)
    };
    let waiting = folder.store().write(0, work).await?;
    if waiting.iter().any(|(.., lacks)| *lacks) {
        folder.snapshots.set_awaits(true);
    }
    make_due(folder, 1).await?;
    trim(folder).await
}

/// Has a snapshot written if what was taken in since the last one is worth so many, whatever else was due.
async fn make_due(folder: &Arc<Folder>, weight: u64) -> Result<(), StoreError> {
    let fid = folder.fid;
    let since = move |reader: &Reader<'_>| Ok((reader.since_snapshot(fid)?, reader.folder_totals(fid)?.files));
    let (since, live) = folder.store().read(since).await?;
    if folder.snapshots.weight(since, live) >= weight {
        folder.snapshots.due.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// A snapshot is complete; those go that cover nothing it does not, also one that is half taken in. Where it leaves some of what is covered out, one is
/// written here that does not.
fn complete(
    txn: &mut Txn<'_>,
    fid: FolderRowId,
    sid: SnapshotRowId,
    group: &GroupId,
    covered: &[(AuthorId, Number)],
    compared: bool,
) -> Result<(), StoreError> {
    let covers = coverage(covered.iter().copied());
    let known =
        |row: &SnapshotRow| matches!(row.state, SnapshotState::Complete | SnapshotState::Told) && row.sid != sid;
    for row in txn.reader().snapshots(fid)?.into_iter().filter(known) {
        if covers.covers(&coverage(decode(&row)?.covered)) {
            txn.remove_snapshot(row.sid)?;
        }
    }
    txn.complete_snapshot(fid, sid, group, covered, compared)?;
    if !covers.covers(&coverage(txn.reader().covered(fid)?)) {
        txn.call_for_snapshot(fid)?;
    }
    Ok(())
}

/// The snapshots that were told and are not complete, and whether each can be taken in and the log lacks some of what it
/// covers.
fn waiting(
    reader: &Reader<'_>,
    fid: FolderRowId,
    group: &GroupId,
) -> Result<Vec<(SnapshotRow, Snapshot, bool)>, StoreError> {
    let mut waiting = Vec::new();
    for row in reader.snapshots(fid)?.into_iter().filter(|row| row.state == SnapshotState::Told) {
        let snapshot = decode(&row)?;
        let lacks = row.taken.is_some() || lacks(reader, group, &snapshot)?;
        waiting.push((row, snapshot, lacks));
    }
    Ok(waiting)
}

/// Whether the log lacks some of what a snapshot covers, of feeds that are all known to go so far.
pub(crate) fn lacks(reader: &Reader<'_>, group: &GroupId, snapshot: &Snapshot) -> Result<bool, StoreError> {
    for (author, number) in &snapshot.covered {
        if !reader.reaches(group, author, *number)? {
            return Ok(false);
        }
    }
    for (author, number) in &snapshot.covered {
        if reader.lacks_until(group, author, *number)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn decode(row: &SnapshotRow) -> Result<Snapshot, StoreError> {
    Snapshot::decode(&row.body).map_err(|_| StoreError::Corrupt("a snapshot's entry".into()))
}

/// What a folder's snapshots cover, as decisions take it.
pub(crate) fn coverage(covered: impl IntoIterator<Item = (AuthorId, Number)>) -> Coverage {
    covered.into_iter().collect()
}

/// Does what can be done now; whether something is left for later.
async fn step(folder: &Arc<Folder>) -> Result<bool, StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let look = move |reader: &Reader<'_>| {
        let cursor = reader.folders()?.into_iter().find(|row| row.fid == fid).map(|row| row.cursor);
        Ok((waiting(reader, fid, &group)?, cursor.unwrap_or_default()))
    };
    let (mut told, cursor) = folder.store().read(look).await?;
    let weight = |snapshot: &Snapshot| snapshot.covered.iter().map(|(_, number)| u128::from(number.0)).sum::<u128>();
    // one that was begun comes first, then what says most
    told.sort_by_key(|(row, snapshot, _)| (row.taken.is_none(), std::cmp::Reverse(weight(snapshot)), row.sid));
    let (mut left, mut lacking) = (false, HashSet::new());
    for (row, snapshot, lacks) in told {
        let (sid, by) = (row.sid, row.entry.map(|(author, _)| author));
        if !folder.snapshots.is_to_be_looked_at(sid, cursor) {
            left = true;
            continue;
        }
        let settled = match settle(folder, row, snapshot).await? {
            Settled::Unsure if !folder.snapshots.is_unsure(sid, cursor) => {
                Settled::Refused("a snapshot has seen what never came".to_owned())
            }
            settled => settled,
        };
        match settled {
            Settled::Complete => {
                folder.snapshots.set_problem(None);
                if let Some(by) = &by {
                    folder.snapshots.waited.lock().unwrap_or_else(PoisonError::into_inner).remove(by);
                }
                trim(folder).await?;
                folder.changed();
            }
            Settled::Obsolete => {
                folder.store().write(0, move |txn| txn.remove_snapshot(sid)).await?;
                trim(folder).await?;
            }
            Settled::Waits | Settled::Unsure => {
                left = true;
                lacking.extend(by.filter(|_| lacks));
            }
            Settled::Refused(reason) => {
                tracing::warn!(folder = %folder.name, %reason, "snapshot is not believed");
                folder.group.count_refused(1);
                folder.snapshots.set_problem(Some(reason));
                folder.store().write(0, move |txn| txn.refuse_snapshot(sid)).await?;
                trim(folder).await?;
                folder.changed();
            }
        }
    }
    if folder.snapshots.go_on_waiting(&lacking) {
        folder.wake();
        folder.changed();
    }
    make_due(folder, 2).await?;
    if folder.snapshots.due.load(Ordering::Relaxed) {
        if write::write(folder).await? {
            folder.snapshots.due.store(false, Ordering::Relaxed);
            trim(folder).await?;
        } else {
            left = true;
        }
    }
    Ok(left | compact(folder).await?)
}

/// Fetches, looks through, and then compares a snapshot with the index or takes it in.
async fn settle(folder: &Arc<Folder>, row: SnapshotRow, snapshot: Snapshot) -> Result<Settled, StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let first = {
        let (row, snapshot) = (row.clone(), snapshot.clone());
        move |reader: &Reader<'_>| first_look(reader, fid, &group, &row, &snapshot)
    };
    if let Some(settled) = folder.store().read(first).await? {
        return Ok(settled);
    }
    let fetched = match content::fetch(folder, row.sid, &snapshot.content).await {
        Err(StoreError::Corrupt(what)) => return damaged(folder, row.sid, snapshot, &what).await,
        fetched => fetched?,
    };
    let content = match fetched {
        content::Fetch::Here(content) => content,
        content::Fetch::Lacks => return Ok(Settled::Waits),
        content::Fetch::NoRoom => {
            let size = snapshot.content.size >> 20;
            folder.snapshots.set_problem(Some(format!(
                "a snapshot of {size} MiB has no room on the disk of this home; it is fetched once there is room"
            )));
            return Ok(Settled::Waits);
        }
        content::Fetch::Wrong(reason) => return Ok(Settled::Refused(reason)),
    };
    let read = {
        let (folder, row, snapshot) = (folder.clone(), row.clone(), snapshot.clone());
        blocking(move || read(&folder, &row, &content, &snapshot)).await
    };
    match read {
        Err(StoreError::Corrupt(what)) => damaged(folder, row.sid, snapshot, &what).await,
        read => read,
    }
}

/// Looks through a content that is here, and then compares it with the index or takes it in.
fn read(
    folder: &Arc<Folder>,
    row: &SnapshotRow,
    content: &Content,
    snapshot: &Snapshot,
) -> Result<Settled, StoreError> {
    let begun = row.taken.is_some();
    match content::look_through(folder, content, snapshot)? {
        // one that was begun is gone through with: what it says is half here
        _ if begun => {}
        Looked::Wrong(reason) => return Ok(Settled::Refused(reason)),
        Looked::Sound { lacks: false, .. } => return adopt::compare(folder, row.sid, content, snapshot),
        // who was admitted may still be to come, and what nobody admitted says nothing
        Looked::Sound { unknown: true, .. } => return Ok(Settled::Unsure),
        Looked::Sound { .. } => {}
    }
    adopt::adopt(folder, row, content, snapshot)?;
    tracing::info!(folder = %folder.id, "a snapshot was taken in for what the log lacks");
    folder.wake();
    Ok(Settled::Complete)
}

/// Something of a snapshot cannot be read as it was written here: what is damaged is fetched once more, from whoever has
/// it, and where that does not help the snapshot is given up, also one that is half taken in.
async fn damaged(
    folder: &Arc<Folder>,
    sid: SnapshotRowId,
    snapshot: Snapshot,
    what: &str,
) -> Result<Settled, StoreError> {
    tracing::warn!(folder = %folder.name, what, "a snapshot is damaged in the database");
    if !folder.snapshots.is_damaged(sid) {
        let reason = format!("a snapshot cannot be read in this home's database ({what}); the next one is waited for");
        return Ok(Settled::Refused(reason));
    }
    let removing = folder.clone();
    let pieces = blocking(move || content::remove_damaged(&removing, &snapshot)).await?;
    let problem = format!("a snapshot is damaged in this home's database ({what}); {pieces} pieces are fetched again");
    folder.snapshots.set_problem(Some(problem));
    folder.changed();
    Ok(Settled::Waits)
}

/// Runs what reads and computes for long on a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(StoreError::Closed))
}

/// What can be said of a snapshot before its content is fetched.
fn first_look(
    reader: &Reader<'_>,
    fid: FolderRowId,
    group: &GroupId,
    row: &SnapshotRow,
    snapshot: &Snapshot,
) -> Result<Option<Settled>, StoreError> {
    if row.taken.is_some() {
        return Ok(None);
    }
    let covered = coverage(reader.covered(fid)?);
    if covered.covers(&coverage(snapshot.covered.iter().copied())) {
        return Ok(Some(Settled::Obsolete));
    }
    if let Some((author, number)) = row.entry
        && snapshot.covered_of(&author).is_some_and(|covered| covered >= number)
    {
        return Ok(Some(Settled::Refused("a snapshot covers its own entry".to_owned())));
    }
    for (author, number) in &snapshot.covered {
        if reader.feed(group, author)?.fork.is_some_and(|fork| fork <= *number) {
            let reason = format!("a snapshot covers the feed of author {} from where it forks", author.short());
            return Ok(Some(Settled::Refused(reason)));
        }
        // the last entry of what is covered, or one behind it, proves that the feed went so far
        if !reader.reaches(group, author, *number)? {
            return Ok(Some(Settled::Waits));
        }
    }
    let row = reader.folders()?.into_iter().find(|row| row.fid == fid);
    let behind = match row {
        Some(row) => row.cursor < reader.max_cursor(group)?,
        None => true,
    };
    Ok(behind.then_some(Settled::Waits))
}

/// Removes pieces that no snapshot needs any more.
async fn trim(folder: &Arc<Folder>) -> Result<(), StoreError> {
    let fid = folder.fid;
    while folder.store().write(0, move |txn| txn.trim_snapshot_chunks(fid, TRIMMED)).await? > 0 {}
    Ok(())
}

/// Drops what snapshots cover from the log and from the index, a piece in a commit; whether something is left for later.
async fn compact(folder: &Arc<Folder>) -> Result<bool, StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let mut entries = 0;
    while !folder.cancel.is_cancelled() {
        let dropped = folder.store().write(0, move |txn| txn.drop_covered(fid, &group, DROPPED)).await?;
        if dropped.entries == 0 {
            break;
        }
        entries += dropped.entries;
    }
    if entries > 0 {
        tracing::debug!(folder = %folder.name, entries, "covered entries left the log");
        forget(folder).await?;
        folder.changed();
    }
    let unacknowledged = move |reader: &Reader<'_>| Ok(!reader.covered(fid)?.is_empty() && reader.unacked(&group)? > 0);
    folder.store().read(unacknowledged).await
}

/// Removes rows of paths where nothing is, and whose deletions the snapshots remember.
async fn forget(folder: &Arc<Folder>) -> Result<(), StoreError> {
    let fid = folder.fid;
    let mut after: Option<Vec<u8>> = None;
    loop {
        let from = after.clone();
        let work = move |txn: &mut Txn<'_>| {
            let covered = coverage(txn.reader().covered(fid)?);
            let is_memory = |versions: &[u8]| {
                let versions = sync_core::folder::Versions::decode(versions);
                !versions.is_ok_and(|versions| sync_core::folder::snapshot::is_forgotten(&versions, &covered))
            };
            txn.remove_dead(fid, from.as_deref(), DROPPED, &is_memory)
        };
        after = folder.store().write(0, work).await?;
        if after.is_none() || folder.cancel.is_cancelled() {
            return Ok(());
        }
    }
}

/// What of a folder's group is in the log, and what is not any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FolderLog {
    /// Entries of the group that are here, of whatever stream.
    pub entries: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Entries that a snapshot stands for: dropped from here, or never fetched.
    pub dropped: u64,
    /// Bytes of the folder's snapshot, as it is stored.
    pub snapshot_bytes: u64,
    /// Bytes of snapshots fetched since the start.
    pub snapshot_fetched: u64,
    /// Entries taken in since the last snapshot.
    pub since_snapshot: u64,
}

/// Looks through a folder's log.
pub(crate) async fn log(folder: &Folder) -> Result<FolderLog, StoreError> {
    let (fid, group) = (folder.fid, folder.group.id);
    let fetched = folder.snapshots.fetched.load(Ordering::Relaxed);
    let look = move |reader: &Reader<'_>| {
        let log = reader.compaction(&group)?;
        Ok(FolderLog {
            entries: log.entries,
            bytes: log.bytes,
            dropped: log.dropped,
            snapshot_bytes: reader.snapshot_bytes(fid)?,
            snapshot_fetched: fetched,
            since_snapshot: reader.since_snapshot(fid)?.entries,
        })
    };
    folder.store().read(look).await
}
