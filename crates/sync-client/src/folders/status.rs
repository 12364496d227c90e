//! A picture of a folder on this device, for people and programs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which way changes of a folder go on this device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Direction {
    /// Changes are told and taken.
    #[default]
    Both,
    /// Changes are told, those of others are not taken.
    SendOnly,
    /// Changes of others are taken, those made here are not told.
    ReceiveOnly,
}

/// What a folder does, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FolderState {
    /// Equal to what is known of the others.
    UpToDate,
    /// The tree is being read.
    Scanning,
    /// Something is to be fetched or applied.
    Syncing,
    /// Stopped by the user.
    Paused,
    /// Stopped by a problem, which is named.
    Stopped,
}

/// How changes on disk are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Watching {
    /// The system tells.
    Events,
    /// By walking the tree from time to time.
    Rescans,
}

/// A path that is not in sync, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathProblem {
    /// The path below the folder.
    pub path: String,
    /// What is wrong, and what to do.
    pub problem: String,
}

/// A folder with a place on this device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderStatus {
    /// Folder id.
    pub id: String,
    /// Its group's id.
    pub group: String,
    /// What it is called.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Which way changes go.
    pub direction: Direction,
    /// What it does.
    pub state: FolderState,
    /// Why it is stopped, and what to do.
    pub problem: Option<String>,
    /// How changes are noticed.
    pub watching: Watching,
    /// Why the system does not tell of changes, or not of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unwatched: Option<String>,
    /// Files, directories and links that exist.
    pub files: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// Paths that differ from what the group says.
    pub pending_files: u64,
    /// Bytes of those.
    pub pending_bytes: u64,
    /// The paths that this device takes; empty: all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub selected: Vec<String>,
    /// Those of `files` that are not selected here.
    pub left_out_files: u64,
    /// Bytes of them.
    pub left_out_bytes: u64,
    /// Files read and told by the scan under way, or by the last one.
    pub scanned_files: u64,
    /// Milliseconds the last whole scan took.
    pub scan_ms: Option<u64>,
    /// Bytes of chunks fetched since the start.
    pub fetched_bytes: u64,
    /// Bytes of chunks served since the start.
    pub served_bytes: u64,
    /// Bytes taken from files that were here already since the start.
    pub reused_bytes: u64,
    /// Paths that are not in sync, and why; at most a hundred.
    pub problems: Vec<PathProblem>,
    /// Conflict copies made here since the start; at most a hundred.
    pub conflicts: Vec<String>,
}

/// A folder that a member announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    /// Folder id.
    pub id: String,
    /// What its maker calls it.
    pub name: String,
    /// Where it is on this device, if it has a place.
    pub path: Option<PathBuf>,
}

/// A version that was replaced or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptVersion {
    /// Names it in [`crate::Device::restore`]: the first digits of its hash, the same on every device, or where that is not
    /// known `k` and a number of this device.
    pub version: String,
    /// The path it was at.
    pub path: String,
    /// When it was replaced, Unix ms.
    pub at: u64,
    /// When it was last changed, Unix ms.
    pub modified: i64,
    /// Bytes.
    pub size: u64,
    /// BLAKE3, where it is known.
    pub hash: Option<String>,
    /// Whether this device keeps it.
    pub here: bool,
    /// The connected devices that keep it too.
    pub devices: Vec<String>,
}

/// Where a version is restored to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RestoreTo {
    /// The path it was at.
    Place,
    /// A path outside or inside the folder, where nothing is.
    Path(PathBuf),
}

/// A device known to a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Its device id.
    pub device: String,
    /// Groups it shares with this device.
    pub groups: Vec<String>,
    /// "this", or how it is connected.
    pub state: String,
    /// Where it is connected from or to directly.
    pub address: Option<String>,
    /// The relay that the connection goes through while no direct way is found.
    pub relayed_by: Option<String>,
    /// Round-trip time in microseconds.
    pub rtt_us: Option<u64>,
    /// Milliseconds since it was last connected.
    pub last_seen_ms: Option<u64>,
}
