//! What was replaced or removed on this device: listed, brought back, and thinned out.

use std::path::PathBuf;
use std::sync::Arc;

use sync_folder::apply::{Applier, ApplyError, Expected};
use sync_folder::versions::{over, thin};
use sync_folder::walk;
use sync_store::{KeptRow, StoreError};
use sync_types::FolderId;
use sync_types::folder::TreePath;

use super::engine::Folder;
use super::error::FolderError;
use super::status::{KeptVersion, RestoreTo};
use crate::device::Device;
use crate::error::ClientError;
use crate::group::now;

/// The share of a disk that versions may take: one part in so many.
const SHARE: u64 = 10;
/// Versions looked at when some are to go; the rest follows the next time.
const LOOKED_AT: usize = 10_000;

impl Device {
    /// What was replaced or removed at a path on this device, the newest first.
    pub async fn versions(&self, folder: FolderId, path: &str) -> Result<Vec<KeptVersion>, ClientError> {
        let folder = self.running(folder)?;
        let path = tree_path(path)?;
        let (fid, key) = (folder.fid, path.key());
        let kept = folder.store().read(move |reader| reader.kept(fid, &key)).await?;
        let version = |row: KeptRow| KeptVersion {
            version: row.kid.number(),
            path: path.to_string(),
            at: row.at.0,
            modified: row.mtime / 1_000_000,
            size: row.size,
            hash: row.hash.map(|hash| blake3::Hash::from_bytes(hash).to_hex().to_string()),
        };
        Ok(kept.into_iter().map(version).collect())
    }

    /// Brings a kept version back: to its place, which keeps what is there now, or elsewhere. Returns where it is.
    pub async fn restore(
        &self,
        folder: FolderId,
        path: &str,
        version: u64,
        to: RestoreTo,
    ) -> Result<PathBuf, ClientError> {
        let folder = self.running(folder)?;
        let path = tree_path(path)?;
        let (fid, key) = (folder.fid, path.key());
        let kept = folder.store().read(move |reader| reader.kept(fid, &key)).await?;
        let kept = kept.into_iter().find(|row| row.kid.number() == version);
        let kept = kept.ok_or_else(|| FolderError::NoVersion { path: path.to_string(), version })?;
        let root = folder.root().ok_or_else(|| FolderError::Stopped("it is not there".to_owned()))?;
        let (whole, at) = (folder.path.join(path.as_str()), path.clone());
        let restoring = tokio::task::spawn_blocking(move || {
            let applier = Applier::new(root);
            match to {
                RestoreTo::Path(to) if to.symlink_metadata().is_ok() => Err(Restored::Exists(to)),
                RestoreTo::Path(to) => {
                    applier.versions().copy_out(&kept.name, &to)?;
                    Ok((to, None))
                }
                RestoreTo::Place => {
                    let there =
                        walk::stat(applier.root(), &at).map_err(|problem| Restored::Problem(problem.to_string()))?;
                    let expected = there.map_or(Expected::Nothing, |(stat, _)| Expected::This(stat));
                    if let Some(parent) = at.parent() {
                        applier.make_dir(&parent, super::assemble::DIRECTORY_MODE)?;
                    }
                    let placed = applier.restore(&kept.name, &at, expected)?;
                    applier.sync_dirs()?;
                    Ok((whole, placed.kept))
                }
            }
        });
        let (restored, replaced) = match restoring.await.map_err(|_| ClientError::Closed)? {
            Ok(done) => done,
            Err(Restored::Exists(to)) => return Err(FolderError::Exists(to).into()),
            Err(Restored::Apply(error)) => return Err(FolderError::Stopped(error.to_string()).into()),
            Err(Restored::Problem(problem)) => return Err(FolderError::Stopped(problem).into()),
        };
        if let Some(kept) = replaced {
            let key = path.key();
            let new = sync_store::NewKept {
                key,
                at: now(),
                name: kept.name,
                size: kept.size,
                hash: None,
                mode: kept.mode,
                mtime: kept.mtime,
                reason: 0,
            };
            folder.store().write(256, move |txn| txn.add_kept(fid, &new)).await?;
        }
        folder.look_again(&path);
        Ok(restored)
    }

    fn running(&self, id: FolderId) -> Result<Arc<Folder>, ClientError> {
        self.inner.folders.get(&id).ok_or_else(|| FolderError::Unknown(id.to_string()).into())
    }
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
    let kept = folder.store().read(move |reader| reader.kept_oldest(fid, None, LOOKED_AT)).await?;
    let seconds = |row: &KeptRow| i64::try_from(row.at.0 / 1000).unwrap_or(i64::MAX);
    let today = i64::try_from(now().0 / 1000).unwrap_or(i64::MAX);
    let mut by_path: std::collections::BTreeMap<&[u8], Vec<&KeptRow>> = std::collections::BTreeMap::new();
    for row in &kept {
        by_path.entry(&row.key).or_default().push(row);
    }
    let mut gone: std::collections::BTreeSet<sync_store::KeptRowId> = std::collections::BTreeSet::new();
    for rows in by_path.values() {
        let times: Vec<i64> = rows.iter().map(|row| seconds(row)).collect();
        gone.extend(thin(today, &times).into_iter().map(|at| rows[at].kid));
    }
    let rest: Vec<&KeptRow> = kept.iter().filter(|row| !gone.contains(&row.kid)).collect();
    let most = root.free_space().map_or(u64::MAX, |(_, total)| total / SHARE);
    let sizes: Vec<(i64, u64)> = rest.iter().map(|row| (seconds(row), row.size)).collect();
    gone.extend(over(most, &sizes).into_iter().map(|at| rest[at].kid));
    if gone.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = kept.iter().filter(|row| gone.contains(&row.kid)).map(|row| row.name.clone()).collect();
    // files first: one that stays behind a crash would never be found again, a row without its file is only a line
    let removing = tokio::task::spawn_blocking(move || {
        let versions = sync_folder::versions::Versions::new(root);
        for name in &names {
            if let Err(error) = versions.remove(name) {
                tracing::debug!(%error, "a version could not be removed");
            }
        }
        versions.remove_empty_months()
    });
    if let Ok(Err(error)) = removing.await {
        tracing::debug!(%error, "empty directories of versions stay");
    }
    folder.store().write(0, move |txn| gone.into_iter().try_for_each(|kid| txn.remove_kept(kid))).await
}
