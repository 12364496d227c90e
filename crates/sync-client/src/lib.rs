//! App state synced between devices, end to end encrypted and without a service: what an app adds.
//!
//! A [`Device`] is one opened home; a [`SyncClient`] is one of its groups.
//! Pushing stores locally and returns; everything else happens when devices meet.

mod client;
mod config;
mod device;
mod discovery;
mod error;
mod event;
pub mod exec;
mod group;
pub mod home;
pub mod keys;
mod link;
mod pairing;
mod peers;
mod secrets;
mod status;

pub use client::{Blob, DEFAULT_LIMIT, MAX_LIMIT, Pulled, Pushed, SyncClient};
pub use config::{Bind, Config, Network};
pub use device::Device;
pub use error::ClientError;
pub use event::{EVENT_BACKLOG, Event, Subscription};
pub use group::reopen;
pub use pairing::{Invitation, InviteOutcome, JoinProgress};
pub use status::{Fork, Gap, PeerStatus, Status, SyncState};
pub use sync_types::bounds::MAX_APP_BYTES;
pub use sync_types::{AuthorId, BlobId, Cursor, DeviceId, GroupId, InviteId, MemberId, ReplicaId, Timestamp};
