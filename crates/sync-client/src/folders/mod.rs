//! Folders: shared here, joined from elsewhere, kept equal.

mod apply;
mod assemble;
pub mod carry;
mod conflicts;
mod engine;
mod error;
pub mod index;
pub mod rows;
mod serve;
mod snapshots;
mod status;
mod take;
mod tell;
mod texts;
mod undo;
mod versions;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use error::FolderError;
pub use snapshots::FolderLog;
pub use status::{
    DeviceStatus, Direction, FolderState, FolderStatus, KeptVersion, Offered, PathProblem, RestoreTo, Watching,
};
use sync_folder::root::{self, Root};
use sync_folder::selection::{MAX_SELECTED, Selection};
use sync_store::{Content, FolderRow, Limits};
use sync_types::folder::{Announcement, KIND_FOLDER, OWN_DIR, TreePath, folder_of, folder_stream};
use sync_types::{Charter, Cursor, Envelope, FolderId, GroupId};
use tokio::sync::oneshot;

use self::engine::{Folder, Request, Settings};
use self::index::Place;
use crate::device::{Device, Inner};
use crate::error::ClientError;
use crate::group::Group;
use crate::keys::draw;

/// Entries looked through at once for announcements.
const LOOKED_THROUGH: usize = 1024;

/// Rows of a folder that is left, removed in one commit.
const REMOVED: usize = 10_000;

/// Rows brought in line with another selection in one commit.
const RESELECTED: usize = 10_000;

/// How a folder is placed on this device.
#[derive(Debug, Clone, Default)]
pub struct FolderOptions {
    /// What the folder is called; the directory's name unless given.
    pub name: Option<String>,
    /// Which way changes go.
    pub direction: Direction,
}

/// The folders of a device while it runs.
#[derive(Debug, Default)]
pub(crate) struct Folders {
    running: Mutex<HashMap<FolderId, Arc<Folder>>>,
    /// One is shared, placed or left at a time: two could overlap.
    changing: tokio::sync::Mutex<()>,
    snapshot_after: Option<u64>,
}

impl Folders {
    /// None is running; they write a snapshot after this many entries, or the usual number.
    pub(crate) fn new(snapshot_after: Option<u64>) -> Self {
        Self { snapshot_after, ..Self::default() }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<FolderId, Arc<Folder>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, id: &FolderId) -> Option<Arc<Folder>> {
        self.running().get(id).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Folder>> {
        self.running().values().cloned().collect()
    }
}

/// Starts every folder of the home that has a place.
pub(crate) async fn start_all(device: &Arc<Inner>) -> Result<(), ClientError> {
    for row in device.shared.store.read(|reader| reader.folders()).await? {
        if row.root.is_some()
            && let Some(group) = device.group(&row.group)
        {
            start(device, &group, &row).await?;
        }
    }
    Ok(())
}

async fn start(device: &Arc<Inner>, group: &Arc<Group>, row: &FolderRow) -> Result<(), ClientError> {
    let id = group.id;
    reselect(group, row).await?;
    let charter = group.store().read(move |reader| Ok(reader.group(&id)?.charter)).await?;
    let chunker = Charter::decode(&charter).map_err(crate::keys::KeysError::from)?.chunker;
    let spawn = |task| device.spawn(task);
    let snapshot_after = device.folders.snapshot_after;
    let closed = device.closed().child_token();
    let home = device.home_path();
    if let Some(folder) = Folder::start(group.clone(), home, row, &chunker, snapshot_after, closed, spawn)? {
        let [serving, fetching] = device.paces.clone();
        group.set_chunk_pace(serving, fetching);
        group.set_chunk_source(Arc::new(serve::Source::new(device, group)));
        device.folders.running().insert(row.id, folder);
    }
    Ok(())
}

/// Brings the index in line with another selection. That is done from its beginning until the folder was walked after it:
/// what was found in a walk that did not come to its end is compared once more.
async fn reselect(group: &Arc<Group>, row: &FolderRow) -> Result<(), ClientError> {
    let settings = Settings::of(row);
    let Some(before) = settings.selection_before() else { return Ok(()) };
    let place = Place { fid: row.fid, id: row.id, way: settings.direction, selection: settings.selection() };
    let mut after: Option<Vec<u8>> = None;
    loop {
        let (place, before, from) = (place.clone(), before.clone(), after.take());
        let work =
            move |txn: &mut sync_store::Txn<'_>| index::reselect(txn, &place, &before, from.as_deref(), RESELECTED);
        after = group.store().write(RESELECTED * 256, work).await?;
        if after.is_none() {
            return Ok(());
        }
    }
}

impl Inner {
    /// Ends the tasks of a folder, if it has any.
    async fn stop_folder(&self, id: FolderId) {
        let running = self.folders.running().remove(&id);
        if let Some(running) = running {
            running.cancel.cancel();
            running.ended().await;
        }
    }

    async fn placed(&self) -> Result<Vec<FolderRow>, ClientError> {
        let rows = self.shared.store.read(|reader| reader.folders()).await?;
        Ok(rows.into_iter().filter(|row| row.root.is_some()).collect())
    }

    async fn row(&self, id: FolderId) -> Result<FolderRow, ClientError> {
        let rows = self.placed().await?;
        let row = rows.into_iter().find(|row| row.id == id);
        row.ok_or_else(|| FolderError::Unknown(id.to_string()).into())
    }

    /// Checks that a directory may become a folder: it is outside of all others, and of the home.
    async fn free(&self, path: &Path) -> Result<(), ClientError> {
        if root::overlaps(path, self.home_path()) {
            return Err(FolderError::Home(path.to_owned()).into());
        }
        for other in self.placed().await?.into_iter().filter_map(|row| row.root).map(PathBuf::from) {
            if root::overlaps(path, &other) {
                return Err(FolderError::Overlap { path: path.to_owned(), other }.into());
            }
        }
        Ok(())
    }
}

fn absolute(path: &Path) -> Result<PathBuf, ClientError> {
    let io = |source| FolderError::Io { path: path.to_owned(), source };
    let absolute = std::path::absolute(path).map_err(io)?;
    Ok(std::fs::canonicalize(&absolute).unwrap_or(absolute))
}

async fn make_root(path: PathBuf, id: FolderId) -> Result<(), ClientError> {
    let made = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&path).map_err(|source| FolderError::Io { path: path.clone(), source })?;
        Root::create(&path, &id).map_err(FolderError::from)
    });
    made.await.map_err(|_| ClientError::Closed)??;
    Ok(())
}

impl Device {
    /// Shares a directory: in a group of this home, or in a new one. Returns once the folder is announced; its files are
    /// read and told afterwards, as [`Device::folders`] shows.
    ///
    /// A directory that is shared already is left as it is.
    pub async fn share_folder(
        &self,
        path: &Path,
        group: Option<GroupId>,
        options: FolderOptions,
    ) -> Result<FolderStatus, ClientError> {
        let inner = &self.inner;
        let path = absolute(path)?;
        if !path.is_dir() {
            let source = std::io::ErrorKind::NotADirectory.into();
            return Err(FolderError::Io { path, source }.into());
        }
        let _one = inner.folders.changing.lock().await;
        let same = |row: &FolderRow| row.root.as_deref().map(Path::new) == Some(&*path);
        if let Some(row) = inner.placed().await?.into_iter().find(same) {
            return match group {
                Some(group) if group != row.group => Err(FolderError::AlreadyPlaced(path).into()),
                _ => self.folder_status(row.id).await,
            };
        }
        inner.free(&path).await?;
        let group = match group {
            Some(group) => group,
            None => self.create_group().await?,
        };
        let group = inner.group(&group).ok_or(ClientError::UnknownGroup(group))?;
        let id = FolderId(draw(&inner.shared.rng));
        let directory = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut name = options.name.or(directory).unwrap_or_else(|| "folder".to_owned());
        name.truncate(name.floor_char_boundary(sync_types::bounds::MAX_NAME));
        make_root(path.clone(), id).await?;
        let settings = Settings { direction: options.direction, ..Settings::default() }.encode();
        let announcement = Announcement { name: name.clone() }.encode();
        let content = Content::Sealed { kind: KIND_FOLDER, stream: folder_stream(&id), body: announcement };
        let (gid, root) = (group.id, path_text(&path));
        let build = move |_: &sync_store::Reader<'_>| Ok((Some(content.clone()), ()));
        let work = move |txn: &mut sync_store::Txn<'_>, _: Option<&sync_store::Appended>, ()| {
            let fid = txn.add_folder(&gid, &id, &name)?;
            txn.set_folder_root(fid, Some(&root))?;
            txn.set_folder_settings(fid, &settings)
        };
        group.append_built(256, build, work).await?;
        start(inner, &group, &inner.row(id).await?).await?;
        self.folder_status(id).await
    }

    /// Folders that members announced in a group; waits up to `wait` for the first one.
    pub async fn offered_folders(&self, group: GroupId, wait: Duration) -> Result<Vec<Offered>, ClientError> {
        let group = self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?;
        let placed = self.inner.placed().await?;
        let deadline = tokio::time::Instant::now() + wait;
        let mut newest = group.watch_newest();
        let mut after = Cursor(0);
        let mut offered: Vec<Offered> = Vec::new();
        loop {
            newest.borrow_and_update();
            let limits = Limits { entries: LOOKED_THROUGH, bytes: 4 << 20 };
            let sealed = group.store().read_sealed(group.id, after, limits).await?;
            for entry in &sealed.entries {
                let Ok(envelope) = Envelope::parse(&entry.bytes) else { continue };
                let Ok(content) = group.keys().unseal(&envelope) else { continue };
                let Some(id) = folder_of(&content.stream).filter(|_| content.kind == KIND_FOLDER) else { continue };
                let Ok(Announcement { name }) = Announcement::decode(&content.body) else { continue };
                if offered.iter().any(|known| known.id == id.to_string()) {
                    continue;
                }
                let place = placed.iter().find(|row| row.group == group.id && row.id == id);
                let path = place.and_then(|row| row.root.clone()).map(PathBuf::from);
                offered.push(Offered { id: id.to_string(), name, path });
            }
            after = sealed.max_cursor;
            if sealed.has_more {
                continue;
            }
            if !offered.is_empty() {
                return Ok(offered);
            }
            match tokio::time::timeout_at(deadline, newest.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(ClientError::Closed),
                Err(_) => return Ok(offered),
            }
        }
    }

    /// Gives an announced folder a place on this device and starts to sync it.
    ///
    /// The directory is made where there is none; what is in it already is compared first.
    pub async fn place_folder(
        &self,
        group: GroupId,
        folder: FolderId,
        path: &Path,
        options: FolderOptions,
    ) -> Result<FolderStatus, ClientError> {
        let inner = &self.inner;
        let path = absolute(path)?;
        let offered = self.offered_folders(group, Duration::ZERO).await?;
        let group = inner.group(&group).ok_or(ClientError::UnknownGroup(group))?;
        let _one = inner.folders.changing.lock().await;
        let known = offered.into_iter().find(|offered| offered.id == folder.to_string());
        let known = known.ok_or_else(|| FolderError::NotOffered(folder.to_string()))?;
        if let Some(there) = known.path {
            return if there == path {
                self.folder_status(folder).await
            } else {
                Err(FolderError::AlreadyPlaced(there).into())
            };
        }
        inner.free(&path).await?;
        make_root(path.clone(), folder).await?;
        let path = absolute(&path)?;
        let settings = Settings { direction: options.direction, ..Settings::default() }.encode();
        let (gid, root, name) = (group.id, path_text(&path), options.name.unwrap_or(known.name));
        let placing = inner.shared.store.write(256, move |txn| {
            let fid = txn.add_folder(&gid, &folder, &name)?;
            txn.set_folder_root(fid, Some(&root))?;
            txn.set_folder_settings(fid, &settings)
        });
        placing.await?;
        start(inner, &group, &inner.row(folder).await?).await?;
        self.folder_status(folder).await
    }

    async fn folder_status(&self, id: FolderId) -> Result<FolderStatus, ClientError> {
        match self.inner.folders.get(&id) {
            Some(folder) => folder.status().await,
            None => Err(FolderError::Unknown(id.to_string()).into()),
        }
    }

    /// Every folder with a place on this device.
    pub async fn folders(&self) -> Result<Vec<FolderStatus>, ClientError> {
        let mut statuses = Vec::new();
        for folder in self.inner.folders.all() {
            statuses.push(folder.status().await?);
        }
        let running: Vec<String> = statuses.iter().map(|status| status.id.clone()).collect();
        for row in self.inner.placed().await? {
            if !running.contains(&row.id.to_string()) {
                statuses.push(resting(&self.inner, row).await?);
            }
        }
        statuses.sort_by(|one, other| (&one.name, &one.id).cmp(&(&other.name, &other.id)));
        Ok(statuses)
    }

    /// Stops or resumes a folder; survives restarts.
    pub async fn pause_folder(&self, folder: FolderId, paused: bool) -> Result<(), ClientError> {
        let inner = &self.inner;
        let _one = inner.folders.changing.lock().await;
        let row = inner.row(folder).await?;
        let settings = Settings { paused, ..Settings::of(&row) }.encode();
        inner.shared.store.write(0, move |txn| txn.set_folder_settings(row.fid, &settings)).await?;
        inner.stop_folder(folder).await;
        let row = inner.row(folder).await?;
        let group = inner.group(&row.group).ok_or(ClientError::UnknownGroup(row.group))?;
        start(inner, &group, &row).await
    }

    /// Chooses the paths of a folder that this device takes, with what is below them; all of them where none is named.
    ///
    /// What is left out stays on disk as it is and is not synced from here on. What is taken again is compared with the
    /// version that lay here: what changed here is an edit of that one, and what is not here is fetched.
    pub async fn select_paths(&self, folder: FolderId, paths: &[String]) -> Result<FolderStatus, ClientError> {
        let inner = &self.inner;
        if paths.len() > MAX_SELECTED {
            return Err(FolderError::Selected.into());
        }
        let paths = paths.iter().map(|path| {
            let tidy = path.strip_prefix("./").unwrap_or(path).trim_end_matches('/');
            TreePath::new(tidy).map_err(|_| FolderError::Path(path.clone()))
        });
        let selection = Selection::of(paths.collect::<Result<Vec<_>, _>>()?);
        let _one = inner.folders.changing.lock().await;
        inner.stop_folder(folder).await;
        let row = inner.row(folder).await?;
        let group = inner.group(&row.group).ok_or(ClientError::UnknownGroup(row.group))?;
        let settings = Settings::of(&row);
        if settings.selection() != selection {
            // what the index says is in line with what it was before, also where that was chosen just now
            reselect(&group, &row).await?;
            let selected = selection.paths().map(ToString::to_string).collect();
            let settings = Settings { selected, selected_before: Some(settings.selected), ..settings }.encode();
            inner.shared.store.write(0, move |txn| txn.set_folder_settings(row.fid, &settings)).await?;
        }
        start(inner, &group, &inner.row(folder).await?).await?;
        self.folder_status(folder).await
    }

    /// Walks the whole folder now, and returns once what was found is told.
    pub async fn rescan_folder(&self, folder: FolderId) -> Result<FolderStatus, ClientError> {
        let running = self.inner.folders.get(&folder).ok_or_else(|| FolderError::Unknown(folder.to_string()))?;
        let (done, ended) = oneshot::channel();
        running.requests.send(Request::Rescan(done)).await.map_err(|_| FolderError::Stopped("paused".to_owned()))?;
        // the answer is dropped at its end, whichever it is
        let _ = ended.await;
        running.status().await
    }

    /// Stops syncing a folder on this device; its files stay, others keep theirs.
    pub async fn leave_folder(&self, folder: FolderId) -> Result<(), ClientError> {
        let inner = &self.inner;
        let _one = inner.folders.changing.lock().await;
        let row = inner.row(folder).await?;
        inner.stop_folder(folder).await;
        // first so that half an index is never taken for a whole one, then in pieces, so that no commit is large
        inner.shared.store.write(0, move |txn| txn.set_folder_root(row.fid, None)).await?;
        while inner.shared.store.write(0, move |txn| txn.remove_files(row.fid, REMOVED)).await? > 0 {}
        inner.shared.store.write(0, move |txn| txn.remove_folder(row.fid)).await?;
        if let Some(root) = row.root {
            // without its mark it may be shared or placed again; what was kept stays where it is
            let mark = Path::new(&root).join(OWN_DIR).join("folder");
            if let Err(error) = tokio::fs::remove_file(mark).await {
                tracing::info!(%error, "the folder's mark stays");
            }
        }
        Ok(())
    }

    /// Says that a mass change which is held back is meant, and applies it.
    pub async fn confirm_folder(&self, folder: FolderId) -> Result<(), ClientError> {
        let running = self.inner.folders.get(&folder).ok_or_else(|| FolderError::Unknown(folder.to_string()))?;
        running.confirm();
        Ok(())
    }

    /// Takes a mass change back that is held back: everyone gets what is here. Returns how many paths that are.
    pub async fn undo_folder(&self, folder: FolderId) -> Result<u64, ClientError> {
        let running = self.inner.folders.get(&folder).ok_or_else(|| FolderError::Unknown(folder.to_string()))?;
        Ok(undo::run(&running).await?)
    }

    /// What of a folder's group is in the log, and what a snapshot stands for; looks through the whole log.
    pub async fn folder_log(&self, folder: FolderId) -> Result<FolderLog, ClientError> {
        let running = self.inner.folders.get(&folder).ok_or_else(|| FolderError::Unknown(folder.to_string()))?;
        Ok(snapshots::log(&running).await?)
    }

    /// Bytes per second that fetching and serving chunks may use together, each way; none for no limit.
    pub async fn limit_rate(&self, bytes_per_second: Option<u64>) -> Result<(), ClientError> {
        self.inner.limit.send_replace(bytes_per_second);
        Ok(())
    }

    /// Devices of all groups, this one first.
    pub async fn devices(&self) -> Result<Vec<DeviceStatus>, ClientError> {
        let groups = self.groups();
        let mut devices = vec![DeviceStatus {
            name: self.name().to_owned(),
            device: self.device_id().to_string(),
            groups: groups.iter().map(ToString::to_string).collect(),
            state: "this".to_owned(),
            address: None,
            relayed_by: None,
            rtt_us: None,
            last_seen_ms: None,
        }];
        for group in groups {
            for peer in self.client(group)?.status().await?.peers {
                match devices.iter_mut().find(|known| known.device == peer.device) {
                    Some(known) => known.groups.push(group.to_string()),
                    None => devices.push(DeviceStatus {
                        name: peer.name,
                        device: peer.device,
                        groups: vec![group.to_string()],
                        state: peer.state,
                        address: peer.address,
                        relayed_by: peer.relayed_by,
                        rtt_us: peer.rtt_us,
                        last_seen_ms: peer.last_seen_ms,
                    }),
                }
            }
        }
        Ok(devices)
    }
}

/// A folder that this process does not serve.
async fn resting(device: &Inner, row: FolderRow) -> Result<FolderStatus, ClientError> {
    let fid = row.fid;
    let totals = device.shared.store.read(move |reader| reader.folder_totals(fid)).await?;
    let settings = Settings::of(&row);
    Ok(FolderStatus {
        id: row.id.to_string(),
        group: row.group.to_string(),
        name: row.name,
        path: PathBuf::from(row.root.unwrap_or_default()),
        direction: settings.direction,
        state: if settings.paused { FolderState::Paused } else { FolderState::Stopped },
        problem: Some("nobody serves this home; `syncshell run` or `syncshell up` does".to_owned()),
        watching: Watching::Rescans,
        unwatched: None,
        files: totals.files,
        bytes: totals.bytes,
        pending_files: totals.pending_files,
        pending_bytes: totals.pending_bytes,
        selected: settings.selection().paths().map(ToString::to_string).collect(),
        left_out_files: totals.left_out_files,
        left_out_bytes: totals.left_out_bytes,
        scanned_files: 0,
        scan_ms: None,
        fetched_bytes: 0,
        served_bytes: 0,
        reused_bytes: 0,
        problems: Vec::new(),
        conflicts: Vec::new(),
    })
}

/// A path as the database keeps it.
fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
