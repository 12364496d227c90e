//! A picture of a group on this device, for people and programs.

use serde::{Deserialize, Serialize};

/// What an application shows in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SyncState {
    /// Everything of ours is held by someone else too.
    Synced,
    /// Something waits to be handed over, and someone is connected.
    Pending,
    /// Something waits, or may wait, and nobody is connected.
    Offline,
}

/// A group on this device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Group id.
    pub group: String,
    /// Our author in it.
    pub author: String,
    /// Our member in it.
    pub member: String,
    /// This device.
    pub device: String,
    /// This device's name.
    pub name: String,
    /// Our newest cursor.
    pub max_cursor: u64,
    /// Entries of our own that nobody else holds yet.
    pub pending: u64,
    /// The same in one word.
    pub state: SyncState,
    /// Members' devices known here.
    pub peers: Vec<PeerStatus>,
    /// Relays that the group uses.
    pub relays: Vec<RelayStatus>,
    /// Authors that belong to the group.
    pub authors: usize,
    /// Entries that are known to exist and lack.
    pub gaps: Vec<Gap>,
    /// Feeds with two entries of one number.
    pub forks: Vec<Fork>,
    /// Entries refused since the start.
    pub refused: u64,
    /// What does not work as it should, in words.
    pub warnings: Vec<String>,
}

/// A device of the group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Its device id.
    pub device: String,
    /// Its author.
    pub author: String,
    /// disconnected, connecting, handshaking, connected or reconnecting.
    pub state: String,
    /// Where it is connected from or to directly.
    pub address: Option<String>,
    /// The relay that the connection goes through while no direct way is found.
    pub relayed_by: Option<String>,
    /// Addresses it was last known under.
    pub addresses: Vec<String>,
    /// Age of those addresses in milliseconds.
    pub addresses_age_ms: Option<u64>,
    /// Round-trip time in microseconds.
    pub rtt_us: Option<u64>,
    /// Our newest cursor that it holds.
    pub acknowledged: u64,
    /// Milliseconds since it was last connected.
    pub last_seen_ms: Option<u64>,
}

/// A relay of the group. It keeps entries; the contents of files come from devices alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayStatus {
    /// Its address, without the operator's token.
    pub url: String,
    /// disconnected, connecting, handshaking, connected or reconnecting.
    pub state: String,
    /// Our newest cursor that it holds.
    pub acknowledged: u64,
    /// Milliseconds since it was last connected.
    pub last_seen_ms: Option<u64>,
    /// Why it is not used as it should be, in words.
    pub problem: Option<String>,
}

/// Numbers lacking in a feed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Whose feed.
    pub author: String,
    /// First number.
    pub first: u64,
    /// Last number.
    pub last: u64,
}

/// A number with two entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// Whose feed.
    pub author: String,
    /// The number.
    pub number: u64,
}
