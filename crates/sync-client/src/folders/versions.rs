//! What was replaced or removed, here and on devices that are connected: listed, brought back, and thinned out.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use sync_folder::apply::{Applier, ApplyError, Expected};
use sync_folder::root::Root;
use sync_folder::versions::{Kept, Versions, thin};
use sync_folder::walk;
use sync_store::{KeptRow, StoreError};
use sync_types::FolderId;
use sync_types::folder::{KeptFile, TreePath};

use super::engine::Folder;
use super::error::FolderError;
use super::status::{KeptVersion, RestoreTo};
use super::{assemble, index};
use crate::chunks::ask_kept;
use crate::device::Device;
use crate::error::ClientError;
use crate::group::now;

/// The share of a disk that versions may take: one part in so many.
const SHARE: u64 = 10;
/// Digits of a content's hash that name a version: too many for a member to find another content that has them.
const DIGITS: usize = 16;
/// Versions looked at together when some are to go.
const LOOKED_AT: usize = 10_000;
/// How far beyond the newest version the clock is believed, in seconds: one that is years ahead would end all of them.
const BELIEVED: i64 = 30 * 24 * 3600;

impl Device {
    /// What was replaced or removed at a path and is kept, on this device and those that are connected, newest first.
    pub async fn versions(&self, folder: FolderId, path: &str) -> Result<Vec<KeptVersion>, ClientError> {
        let folder = self.running(folder)?;
        let path = tree_path(path)?;
        let (fid, key, group) = (folder.fid, path.key(), folder.group.id);
        let look = move |reader: &sync_store::Reader<'_>| Ok((reader.kept(fid, &key)?, reader.peers(&group)?));
        let (kept, peers) = folder.store().read(look).await?;
        let mut all: Vec<KeptVersion> = Vec::new();
        for row in &kept {
            let version = version_of(row);
            if !all.iter().any(|known| known.version == version) {
                let (at, modified, hash) = (row.at.0, row.mtime / 1_000_000, row.hash.as_ref().map(hex));
                let path = path.to_string();
                let devices = Vec::new();
                all.push(KeptVersion { version, path, at, modified, size: row.size, hash, here: true, devices });
            }
        }
        for (device, files) in ask_kept(&folder.group, folder.id, &path).await {
            let known = peers.iter().find(|peer| peer.device.is_some_and(|id| id.0 == device.0));
            let name = known.map_or_else(|| HEXLOWER.encode(&device.0[..4]), |peer| peer.name.clone());
            for file in files {
                let hash = hex(&file.content.hash);
                let known = all.iter().position(|known| known.hash.as_ref() == Some(&hash));
                let at = known.unwrap_or_else(|| {
                    all.push(KeptVersion {
                        version: hash[..DIGITS].to_owned(),
                        path: path.to_string(),
                        at: file.at,
                        modified: file.mtime / 1_000_000,
                        size: file.content.size,
                        hash: Some(hash),
                        here: false,
                        devices: Vec::new(),
                    });
                    all.len() - 1
                });
                all[at].at = all[at].at.max(file.at);
                if !all[at].devices.contains(&name) {
                    all[at].devices.push(name.clone());
                }
            }
        }
        all.sort_by(|one, other| (other.at, &one.version).cmp(&(one.at, &other.version)));
        Ok(all)
    }

    /// Brings a kept version back, from this device or one that is connected: to its place, which keeps what is there now,
    /// or elsewhere. Returns where it is.
    pub async fn restore(
        &self,
        folder: FolderId,
        path: &str,
        version: &str,
        to: RestoreTo,
    ) -> Result<PathBuf, ClientError> {
        let folder = self.running(folder)?;
        let path = tree_path(path)?;
        let (fid, key) = (folder.fid, path.key());
        let root = folder.root().ok_or_else(|| FolderError::Stopped("it is not there".to_owned()))?;
        let applier = Arc::new(Applier::new(root));
        let kept = folder.store().read(move |reader| reader.kept(fid, &key)).await?;
        let name = match kept.into_iter().find(|row| version_of(row) == version) {
            Some(row) => row.name,
            None => self.fetch_version(&folder, &applier, &path, version).await?,
        };
        let (whole, at) = (folder.path.join(path.as_str()), path.clone());
        let restoring = tokio::task::spawn_blocking(move || match to {
            RestoreTo::Path(to) if to.symlink_metadata().is_ok() => Err(Restored::Exists(to)),
            RestoreTo::Path(to) => {
                applier.versions().copy_out(&name, &to)?;
                Ok((to, None))
            }
            RestoreTo::Place => {
                let there =
                    walk::stat(applier.root(), &at).map_err(|problem| Restored::Problem(problem.to_string()))?;
                let expected = there.map_or(Expected::Nothing, |(stat, _)| Expected::This(stat));
                if let Some(parent) = at.parent() {
                    applier.make_dir(&parent, super::carry::DIRECTORY_MODE)?;
                }
                let placed = applier.restore(&name, &at, expected)?;
                applier.sync_dirs()?;
                Ok((whole, placed.kept))
            }
        });
        let (restored, replaced) = match restoring.await.map_err(|_| ClientError::Closed)? {
            Ok(done) => done,
            Err(Restored::Exists(to)) => return Err(FolderError::Exists(to).into()),
            Err(Restored::Apply(error)) => return Err(FolderError::Stopped(error.to_string()).into()),
            Err(Restored::Problem(problem)) => return Err(FolderError::Stopped(problem).into()),
        };
        if let Some(kept) = replaced {
            let at = path.clone();
            let work = move |txn: &mut sync_store::Txn<'_>| {
                // what the index says of it holds only if it is what the index saw
                let row = txn.reader().file(fid, &at.key())?.and_then(|row| row.disk);
                let same = row.is_some_and(|disk| disk.size == kept.size && disk.mtime == kept.mtime);
                let kept = match same {
                    true => index::kept_from(&txn.reader(), fid, &at, kept, now())?,
                    false => index::new_kept(&at, kept, None, Vec::new(), now()),
                };
                txn.add_kept(fid, &kept)
            };
            folder.store().write(256, work).await?;
        }
        folder.look_again(&path);
        Ok(restored)
    }

    /// Fetches a version that others keep, and keeps it here too; its name among the versions.
    async fn fetch_version(
        &self,
        folder: &Arc<Folder>,
        applier: &Arc<Applier>,
        path: &TreePath,
        version: &str,
    ) -> Result<String, ClientError> {
        let kept = ask_kept(&folder.group, folder.id, path).await;
        let mut files = kept.into_iter().flat_map(|(_, files)| files);
        let file = files.find(|file| version.len() >= DIGITS && hex(&file.content.hash).starts_with(version));
        let unknown = || FolderError::NoVersion { path: path.to_string(), version: version.to_owned() };
        let KeptFile { content, mode, mtime, .. } = file.ok_or_else(unknown)?;
        let received = match assemble::receive(folder, applier, &content, mode, mtime).await {
            Ok(received) => received.ok_or_else(unknown)?,
            Err(assemble::ReceiveError::Store(error)) => return Err(error.into()),
            Err(assemble::ReceiveError::Apply(error)) => return Err(FolderError::Stopped(error.to_string()).into()),
        };
        let ((ready, chunks), keeping) = (received, applier.clone());
        let keeping = tokio::task::spawn_blocking(move || {
            let kept = keeping.keep(&ready)?;
            keeping.sync_dirs().map(|()| kept)
        });
        let kept = keeping.await.map_err(|_| ClientError::Closed)?;
        let kept = kept.map_err(|error| FolderError::Stopped(error.to_string()))?;
        let (name, fid) = (kept.name.clone(), folder.fid);
        let new = index::new_kept(path, kept, Some(content.hash), chunks, now());
        folder.store().write(256, move |txn| txn.add_kept(fid, &new)).await?;
        Ok(name)
    }

    fn running(&self, id: FolderId) -> Result<Arc<Folder>, ClientError> {
        self.inner.folders.get(&id).ok_or_else(|| FolderError::Unknown(id.to_string()).into())
    }
}

/// What a version is called: digits of its content's hash, the same on every device, or where that is not known the number
/// it has here.
fn version_of(row: &KeptRow) -> String {
    row.hash.as_ref().map_or_else(|| format!("k{}", row.kid.number()), |hash| hex(hash)[..DIGITS].to_owned())
}

fn hex(hash: &[u8; 32]) -> String {
    HEXLOWER.encode(hash)
}

enum Restored {
    Exists(PathBuf),
    Apply(ApplyError),
    Problem(String),
}

impl From<ApplyError> for Restored {
    fn from(error: ApplyError) -> Self {
        Self::Apply(error)
    }
}

fn tree_path(path: &str) -> Result<TreePath, ClientError> {
    TreePath::new(path).map_err(|_| FolderError::Path(path.to_owned()).into())
}

/// Lets go of versions that are too many or too large together.
pub(crate) async fn trim(folder: &Arc<Folder>) -> Result<(), StoreError> {
    let Some(root) = folder.root() else { return Ok(()) };
    let fid = folder.fid;
    let seconds = |row: &KeptRow| i64::try_from(row.at.0 / 1000).unwrap_or(i64::MAX);
    let (newest, mut sum) =
        folder.store().read(move |reader| Ok((reader.kept_newest(fid)?, reader.kept_bytes(fid)?))).await?;
    let Some(newest) = newest else { return Ok(()) };
    let newest = i64::try_from(newest.0 / 1000).unwrap_or(i64::MAX);
    let today = i64::try_from(now().0 / 1000).unwrap_or(i64::MAX).min(newest.saturating_add(BELIEVED));
    let most = root.free_space().map_or(u64::MAX, |(_, total)| total / SHARE);
    let mut after = None;
    loop {
        let from = after;
        let kept = folder.store().read(move |reader| reader.kept_oldest(fid, from, LOOKED_AT)).await?;
        let Some(last) = kept.last() else { break };
        after = Some((last.at, last.kid));
        let mut by_path: std::collections::BTreeMap<&[u8], Vec<&KeptRow>> = std::collections::BTreeMap::new();
        for row in &kept {
            by_path.entry(&row.key).or_default().push(row);
        }
        let mut gone: std::collections::BTreeSet<sync_store::KeptRowId> = std::collections::BTreeSet::new();
        for rows in by_path.values() {
            let times: Vec<i64> = rows.iter().map(|row| seconds(row)).collect();
            gone.extend(thin(today, &times).into_iter().map(|at| rows[at].kid));
        }
        for row in &kept {
            // the oldest of all go first
            if sum > most {
                gone.insert(row.kid);
            }
            if gone.contains(&row.kid) {
                sum = sum.saturating_sub(row.size);
            }
        }
        forget(folder, &root, kept.into_iter().filter(|row| gone.contains(&row.kid)).collect()).await?;
    }
    let removing = tokio::task::spawn_blocking(move || Versions::new(root).remove_empty_months());
    if let Ok(Err(error)) = removing.await {
        tracing::debug!(%error, "empty directories of versions stay");
    }
    Ok(())
}

/// Removes versions, files first: one that stays behind a crash is found again by [`recover`], and a row without its file
/// is only a line.
async fn forget(folder: &Arc<Folder>, root: &Arc<Root>, gone: Vec<KeptRow>) -> Result<(), StoreError> {
    if gone.is_empty() {
        return Ok(());
    }
    let (root, gone) = (root.clone(), Arc::new(gone));
    let names = gone.clone();
    let removing = tokio::task::spawn_blocking(move || {
        let versions = Versions::new(root);
        for row in names.iter() {
            if let Err(error) = versions.remove(&row.name) {
                tracing::debug!(%error, "a version could not be removed");
            }
        }
    });
    removing.await.map_err(|_| StoreError::Closed)?;
    folder.store().write(0, move |txn| gone.iter().try_for_each(|row| txn.remove_kept(row.kid))).await
}

/// Notes what lies among the versions and is in no list: a crash came between putting it there and noting that.
///
/// A kept file is the very one that lay at its path, by its inode; so the index still says which path that was.
pub(crate) async fn recover(folder: &Arc<Folder>, root: &Arc<Root>) -> Result<(), StoreError> {
    let listing = root.clone();
    let listed = tokio::task::spawn_blocking(move || Versions::new(listing).list());
    let mut unknown: HashMap<String, Kept> = match listed.await.map_err(|_| StoreError::Closed)? {
        Ok(listed) => listed.into_iter().map(|kept| (kept.name.clone(), kept)).collect(),
        Err(error) => {
            tracing::debug!(%error, "versions cannot be listed");
            return Ok(());
        }
    };
    let fid = folder.fid;
    let mut after = None;
    while !unknown.is_empty() {
        let from = after;
        let kept = folder.store().read(move |reader| reader.kept_oldest(fid, from, LOOKED_AT)).await?;
        let Some(last) = kept.last() else { break };
        after = Some((last.at, last.kid));
        kept.iter().for_each(|row| drop(unknown.remove(&row.name)));
    }
    if unknown.is_empty() {
        return Ok(());
    }
    let mut by_inode: HashMap<(u64, u64), Kept> =
        unknown.into_values().map(|kept| ((kept.ino, kept.size), kept)).collect();
    let mut after: Option<Vec<u8>> = None;
    while !by_inode.is_empty() {
        let from = after.clone();
        let rows = folder.store().read(move |reader| reader.files_after(fid, from.as_deref(), LOOKED_AT)).await?;
        let Some(last) = rows.last() else { break };
        after = Some(last.key.clone());
        for row in &rows {
            let Some(disk) = &row.disk else { continue };
            let Some(kept) = by_inode.remove(&(disk.ino, disk.size)) else { continue };
            let Some(path) = TreePath::from_key(&row.key).filter(|_| kept.mtime == disk.mtime) else { continue };
            let work = move |txn: &mut sync_store::Txn<'_>| {
                let kept = index::kept_from(&txn.reader(), fid, &path, kept.clone(), now())?;
                txn.add_kept(fid, &kept)
            };
            folder.store().write(256, work).await?;
        }
    }
    Ok(())
}
