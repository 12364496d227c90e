//! The local API: HTTP over a socket that only this user can open.
//!
//! `docs/local-api.md` describes it for programs; this module has what both ends share.

pub(crate) mod client;
pub(crate) mod loopback;
pub(crate) mod server;
mod socket;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sync_client::folders::{DeviceStatus, Direction, FolderStatus, KeptVersion, Offered, RestoreTo};
use sync_client::{MemberStatus, Status};

use crate::exit::Failure;

pub(crate) use socket::socket_path;

/// This program's version; both ends must be of the same one.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Header by which each end says its version.
pub(crate) const VERSION_HEADER: &str = "syncshell-version";

/// Blobs in one answer to a pull: keeps the list short in memory.
pub(crate) const PAGE_BLOBS: usize = 1024;

/// Bytes of blobs after which an answer to a pull ends: one more of the largest may follow.
pub(crate) const PAGE_BYTES: usize = 4 << 20;

/// A home and its groups.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Overview {
    /// Version of the process that answers.
    pub(crate) version: String,
    /// Its process id, if it serves the home.
    pub(crate) served_by: Option<u32>,
    /// The home's directory.
    pub(crate) home: String,
    /// Name of the device.
    pub(crate) name: String,
    /// The device's id.
    pub(crate) device: String,
    /// What does not work as it should, in words.
    pub(crate) warnings: Vec<String>,
    /// Where the API is served on the loopback network, if that was asked for.
    pub(crate) api: Option<String>,
    /// Its groups.
    pub(crate) groups: Vec<Status>,
    /// Its folders.
    pub(crate) folders: Vec<FolderStatus>,
}

/// A blob that is durable here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pushed {
    pub(crate) cursor: u64,
    pub(crate) blob_id: String,
}

/// Blobs in the order in which they arrived.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Page {
    pub(crate) blobs: Vec<Blob>,
    /// Where to pull on from.
    pub(crate) max_cursor: u64,
    /// Whether there is more right now.
    pub(crate) has_more: bool,
}

/// A blob as it was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Blob {
    pub(crate) cursor: u64,
    pub(crate) blob_id: String,
    /// Its author.
    pub(crate) sender: String,
    /// Milliseconds since 1970 by the sender's clock.
    pub(crate) timestamp: u64,
    #[serde(with = "base64")]
    pub(crate) bytes: Vec<u8>,
}

/// One line of the stream of events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventLine {
    /// The group it happened in.
    pub(crate) group: String,
    #[serde(flatten)]
    pub(crate) event: Event,
}

/// What happens in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// A replica is connected.
    Connected { replica: String, name: String, max_cursor: u64, pending: u64 },
    /// A replica is no longer connected.
    Disconnected { replica: String, name: String, reason: String },
    /// A blob can be pulled.
    BlobAvailable { blob_id: String, cursor: u64, sender: String },
    /// Someone joined.
    Joined { name: String, author: String },
    /// Something went wrong that stops nothing.
    Error { code: String, message: String },
    /// A folder changed its state, or made progress.
    Folder { folder: Box<FolderStatus> },
    /// Two devices changed a file without knowing of each other; one content was kept at this path.
    FolderConflict { folder: String, path: String },
    /// A folder is synced here no longer.
    FolderLeft { folder: String },
    /// The reader was too slow and missed events: pull.
    Lagged { missed: u64 },
    /// Something a later version tells.
    #[serde(other)]
    Unknown,
}

/// Who holds what was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Handed {
    /// Names of their devices.
    pub(crate) holders: Vec<String>,
}

/// An open invite; its code and link are secrets until it is used or has expired.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Invite {
    pub(crate) id: String,
    pub(crate) group: String,
    pub(crate) code: String,
    pub(crate) link: String,
    /// Milliseconds since 1970.
    pub(crate) expires: u64,
}

impl std::fmt::Debug for Invite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Invite").field("id", &self.id).field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// How an invite ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// Someone joined by it.
    Joined { name: String, author: String },
    /// Its time ran out.
    Expired,
    /// It was taken back.
    Revoked,
}

/// Asks to take an invite back.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct RevokeRequest {
    /// Code, link or id.
    pub(crate) invite: String,
}

/// Asks for an invite.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct InviteRequest {
    /// Relays where it is found too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) relays: Vec<String>,
    /// The role of a person of their own; none for one more device of this member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<String>,
}

/// Asks to join by an invite.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct JoinRequest {
    /// Code or link.
    pub(crate) invite: String,
    /// Relays where it is looked for too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) relays: Vec<String>,
}

/// A line of the answer to a join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum JoinLine {
    /// A step was reached.
    Progress(String),
    /// The home belongs to the group now; the last line.
    Joined(Joined),
    /// It failed; the last line.
    Error(Failure),
}

/// The group that was joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joined {
    pub(crate) group: String,
    /// It was joined before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) already: bool,
}

/// Folders with a place on this device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Folders {
    pub(crate) folders: Vec<FolderStatus>,
}

/// Folders that members announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OfferedFolders {
    pub(crate) offered: Vec<Offered>,
}

/// Devices of all groups, this one first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Devices {
    pub(crate) devices: Vec<DeviceStatus>,
}

/// Members of a group, this device's own first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Members {
    pub(crate) members: Vec<MemberStatus>,
}

/// Asks to remove a member, or to sign a removal that another began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RemoveRequest {
    /// The first digits of its id, or the name of a device.
    pub(crate) member: String,
    #[serde(default)]
    pub(crate) approve: bool,
}

/// The key that a group has now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rotated {
    pub(crate) epoch: u32,
}

/// Asks to share a directory, or to give an announced folder a place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlaceRequest {
    /// Absolute path of the directory.
    pub(crate) path: PathBuf,
    /// What the folder is called; the directory's name unless given.
    #[serde(default)]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) direction: Direction,
}

/// Asks for a part of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SelectRequest {
    /// Paths below the folder; none for all of it.
    pub(crate) paths: Vec<String>,
}

/// Asks what is kept of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VersionsRequest {
    /// The path below the folder, with slashes.
    pub(crate) path: String,
}

/// What is kept of a path, the newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Versions {
    pub(crate) versions: Vec<KeptVersion>,
}

/// Names a relay.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct RelayRequest {
    /// Its address, with the operator's token where there is one.
    pub(crate) url: String,
}

/// The relays that were added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HomeRelays {
    pub(crate) relays: Vec<HomeRelay>,
    /// Where relays wake this device.
    pub(crate) wake: Option<String>,
}

/// Names where relays wake this device.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct WakeRequest {
    /// An address of a push service; none for nowhere.
    pub(crate) url: Option<String>,
}

/// A relay as it was added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HomeRelay {
    /// Its address, without the operator's token.
    pub(crate) url: String,
    /// The group it is used for; none for every group.
    pub(crate) group: Option<String>,
}

/// Asks to bring a kept version back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RestoreRequest {
    /// The path below the folder, with slashes.
    pub(crate) path: String,
    pub(crate) version: String,
    pub(crate) to: RestoreTo,
}

/// Where a version was restored to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Restored {
    pub(crate) path: PathBuf,
}

/// How many paths were put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Undone {
    pub(crate) paths: u64,
}

/// Asks to limit what fetching and serving files use together, each way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RateRequest {
    /// None for no limit.
    pub(crate) bytes_per_second: Option<u64>,
}

/// Asks for a backup.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct BackupRequest {
    /// The file, by its absolute path.
    pub(crate) path: PathBuf,
    /// What to seal it under.
    pub(crate) passphrase: String,
}

/// A backup that was written and proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackedUp {
    /// The groups in it.
    pub(crate) groups: Vec<String>,
    /// Its length.
    pub(crate) bytes: u64,
}

/// What came of recovering from a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// The device that the backup is of.
    pub(crate) of: String,
    pub(crate) groups: Vec<String>,
    /// Groups that the home was in before.
    pub(crate) here: Vec<String>,
}

/// Bytes as base64 text, with padding.
mod base64 {
    use data_encoding::BASE64;
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(value: &impl Serialize, expected: &Expect) {
        expected.assert_eq(&serde_json::to_string(value).expect("JSON"));
    }

    #[test]
    fn what_programs_rely_on_has_the_form_the_manual_shows() {
        let blob = Blob {
            cursor: 7,
            blob_id: "0a".repeat(16),
            sender: "0b".repeat(32),
            timestamp: 1,
            bytes: vec![0, 255, b'\n'],
        };
        check(
            &blob,
            &expect![[
                r#"{"cursor":7,"blob_id":"0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a","sender":"0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b","timestamp":1,"bytes":"AP8K"}"#
            ]],
        );
        check(
            &Event::BlobAvailable { blob_id: "00".into(), cursor: 3, sender: "11".into() },
            &expect![[r#"{"event":"blob-available","blob_id":"00","cursor":3,"sender":"11"}"#]],
        );
        check(&Outcome::Expired, &expect![[r#"{"outcome":"expired"}"#]]);
        check(
            &JoinLine::Error(Failure::new("invite-used", "used")),
            &expect![[r#"{"error":{"code":"invite-used","message":"used"}}"#]],
        );
        check(&JoinLine::Progress("found".into()), &expect![[r#"{"progress":"found"}"#]]);
    }

    #[test]
    fn an_event_of_a_later_version_is_passed_over() {
        let event: Event = serde_json::from_str(r#"{"event":"brand-new","with":[1]}"#).expect("read");
        assert_eq!(event, Event::Unknown);
    }

    #[test]
    fn debug_output_of_an_invite_does_not_show_its_secrets() {
        let invite = Invite {
            id: "1".into(),
            group: "2".into(),
            code: "SECRET".into(),
            link: "syncshell://join#SECRET".into(),
            expires: 0,
        };
        assert!(!format!("{invite:?}").contains("SECRET"));
    }
}
