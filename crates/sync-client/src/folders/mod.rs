//! Folders: shared here, joined from elsewhere, kept equal.

mod status;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use status::{
    DeviceStatus, Direction, FolderState, FolderStatus, KeptVersion, Offered, PathProblem, RestoreTo, Watching,
};
use sync_types::{FolderId, GroupId};

use crate::device::Device;
use crate::error::ClientError;

/// How a folder is placed on this device.
#[derive(Debug, Clone, Default)]
pub struct FolderOptions {
    /// What the folder is called; the directory's name unless given.
    pub name: Option<String>,
    /// Which way changes go.
    pub direction: Direction,
}

impl Device {
    /// Shares a directory: in a group of this home, or in a new one. Returns once the folder is announced; its files are
    /// read and told afterwards, as [`Device::folders`] shows.
    pub async fn share_folder(
        &self,
        path: &Path,
        group: Option<GroupId>,
        options: FolderOptions,
    ) -> Result<FolderStatus, ClientError> {
        let _ = (path, group, options);
        Err(ClientError::Closed)
    }

    /// Folders that members announced in a group; waits up to `wait` for the first one.
    pub async fn offered_folders(&self, group: GroupId, wait: Duration) -> Result<Vec<Offered>, ClientError> {
        let _ = (group, wait);
        Err(ClientError::Closed)
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
        let _ = (group, folder, path, options);
        Err(ClientError::Closed)
    }

    /// Every folder with a place on this device.
    pub async fn folders(&self) -> Result<Vec<FolderStatus>, ClientError> {
        Ok(Vec::new())
    }

    /// Stops or resumes a folder; survives restarts.
    pub async fn pause_folder(&self, folder: FolderId, paused: bool) -> Result<(), ClientError> {
        let _ = (folder, paused);
        Err(ClientError::Closed)
    }

    /// Walks the whole folder now, and returns once what was found is told.
    pub async fn rescan_folder(&self, folder: FolderId) -> Result<FolderStatus, ClientError> {
        let _ = folder;
        Err(ClientError::Closed)
    }

    /// Stops syncing a folder on this device; its files stay, others keep theirs.
    pub async fn leave_folder(&self, folder: FolderId) -> Result<(), ClientError> {
        let _ = folder;
        Err(ClientError::Closed)
    }

    /// What was replaced or removed at a path, the newest first.
    pub async fn versions(&self, folder: FolderId, path: &str) -> Result<Vec<KeptVersion>, ClientError> {
        let _ = (folder, path);
        Err(ClientError::Closed)
    }

    /// Brings a kept version back: to its place, which keeps what is there now, or elsewhere. Returns where it is.
    pub async fn restore(
        &self,
        folder: FolderId,
        path: &str,
        version: u64,
        to: RestoreTo,
    ) -> Result<PathBuf, ClientError> {
        let _ = (folder, path, version, to);
        Err(ClientError::Closed)
    }

    /// Bytes per second that fetching and serving chunks may use together, each way; none for no limit.
    pub async fn limit_rate(&self, bytes_per_second: Option<u64>) -> Result<(), ClientError> {
        let _ = bytes_per_second;
        Err(ClientError::Closed)
    }

    /// Devices of all groups, this one first.
    pub async fn devices(&self) -> Result<Vec<DeviceStatus>, ClientError> {
        Ok(Vec::new())
    }
}
