//! App state synced between devices, end to end encrypted and without a service: what an app adds.
//!
//! A [`Device`] is one opened home; a [`SyncClient`] is one of its groups.
//! Pushing stores locally and returns; everything else happens when devices meet.
//!
//! ```
//! use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
//! use sync_client::{Config, Cursor, Network, SyncClient};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("home");
//! // once for each installation; without a choice of store the key goes to the system's keychain
//! let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
//! Home::create(&path, "laptop", Some(KeyStoreKind::File), &PassphraseSource::none(), &mut rng)?;
//!
//! // without a network, what is pushed waits
//! let network = Network { online: false, ..Network::default() };
//! let client = SyncClient::new(Config { network, ..Config::new(&path) }).await?;
//! client.push("bread").await?;
//!
//! let page = client.pull(Cursor(0), 100).await?;
//! assert_eq!(page.blobs[0].bytes, b"bread");
//! assert!(!page.has_more);
//! client.device().close().await;
//! # Ok(())
//! # }
//! ```
//!
//! - Let another device in: [`Device::invite`] on one, [`Device::join`] on the other.
//! - Read everything: [`SyncClient::subscribe`] first, then [`SyncClient::pull`] after the last `max_cursor` until
//!   `has_more` is false, and again on each [`Event::BlobAvailable`] and [`Event::Lagged`].
//! - A blob is known by its blob id. After a rollback one of our own may come again, under another cursor and sender.
//! - Futures may be dropped: a push is then stored or not, never half, and repeating it under the same blob id
//!   ([`SyncClient::push_as`]) stores it once. [`Subscription::next`] loses no event.
//! - [`ClientError::code`] gives each failure a word that programs can rely on.
//!
//! `docs/library.md` is the guide, and `examples/` has programs that run.

mod backup;
pub mod chunks;
mod client;
mod config;
mod device;
mod discovery;
mod error;
mod event;
pub mod folders;
mod group;
pub mod home;
pub mod keys;
mod link;
mod members;
mod pairing;
mod peers;
mod punching;
mod relays;
mod secrets;
mod status;

pub use backup::{BackedUp, Recovered};
pub use client::{Blob, DEFAULT_LIMIT, MAX_LIMIT, Pulled, Pushed, SyncClient};
pub use config::{Bind, Config, Network};
pub use device::Device;
pub use error::ClientError;
pub use event::{EVENT_BACKLOG, Event, Subscription};
pub use group::{reissued, reopen};
pub use members::{AuthorStatus, MemberStatus, RemovalStatus, Removed, role_name, role_named};
pub use pairing::{Invitation, InviteOutcome, JoinProgress};
pub use relays::HomeRelay;
pub use status::{Fork, Gap, PeerStatus, RelayStatus, Status, SyncState};
pub use sync_store::exec;
pub use sync_types::bounds::{MAX_APP_BYTES, MAX_TOKEN};
pub use sync_types::{
    AuthorId, BlobId, Cursor, DeviceId, FolderId, GroupId, InviteId, MemberId, ReplicaId, Role, Timestamp,
};
