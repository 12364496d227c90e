//! Keys, sealing, padding, passphrases and pairing: operations named for their purpose, without knobs.
//!
//! **Invariant:** this crate touches no file and no network, draws no randomness of its own, and no result depends on a clock except the estimate of a passphrase's strength.
//! A function named `make_…`, `seal_…` or `generate` takes a generator; one named `derive_…` or `open_…` gives the same answer for the same arguments.
//! Primitives stay in the private `hazmat`; `docs/protocol.md` names every label and byte.

pub mod author;
pub mod backup;
pub mod content;
pub mod epoch;
mod hazmat;
pub mod padme;
pub mod pairing;
pub mod passphrase;
pub mod rotation;
pub mod seal;
mod secret;
pub mod vault;

pub use author::{AuthorSecret, SignPurpose, UnsoundKeys, check_keys, verify};
pub use backup::{
    Backup, BackupError, EpochBackup, GroupBackup, PeerBackup, is_backup, make_recovery_key, open_backup, seal_backup,
};
pub use content::{Content, ContentError};
pub use epoch::{EntryKey, EpochKeys, EpochSecret, GossipTopic, HintKey, LinkKey, RendezvousSecret, SlotKey};
pub use hazmat::kdf::OutOfMemory;
pub use padme::padded_len;
pub use pairing::{Code, CodeError, InviteKeys};
pub use passphrase::{GroupRoot, WeakPassphrase};
pub use rotation::{
    Before, GrantError, History, Made, Opened, RotationError, make_rotation, open_grant, open_rotation,
    rotation_reaches, seal_grant,
};
pub use seal::{OpenError, Sealer, Suite, TAG_LEN, open, open_box, seal_box};
pub use vault::{HomeKey, VaultError, VaultParams, open_with_passphrase, seal_with_passphrase};
