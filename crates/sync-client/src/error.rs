//! What can go wrong for an application, each with a stable word for programs and advice for people.

use std::io;
use std::path::PathBuf;

use sync_crypto::BackupError;
use sync_link::iroh_link::BindError;
use sync_link::relay::RelayUrlError;
use sync_store::StoreError;
use sync_types::GroupId;
use sync_types::bounds::{MAX_APP_BYTES, MAX_RELAYS};

use crate::folders::FolderError;
use crate::home::{HomeError, LockError};
use crate::keys::KeysError;

/// Why a client did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    // the caller
    /// The blob is larger than a log entry may be.
    #[error(
        "{got} bytes are too large for one blob, at most {MAX_APP_BYTES} are possible; split it up, or share it as a file"
    )]
    TooLarge {
        /// Bytes given.
        got: usize,
    },
    /// The home has no group.
    #[error(
        "this home has no group yet; run `syncshell pair --create` to make one or `syncshell pair --join` to join one"
    )]
    NoGroup,
    /// The home has several groups and none was named.
    #[error("this home has {0} groups; name one with `--group`")]
    SeveralGroups(usize),
    /// The home has no such group.
    #[error("this home has no group {0}; `syncshell status` lists what it has")]
    UnknownGroup(GroupId),
    /// The group is in this home already.
    #[error("this home already belongs to group {0}")]
    AlreadyJoined(GroupId),
    /// What was given is neither a code nor a link.
    #[error("{0}; a code looks like XXXX-XXXX-XXXX-XXXX, a link starts with syncshell://join#")]
    InviteMalformed(String),
    /// The blob id names another blob already.
    #[error("{0}")]
    BlobIdReused(StoreError),
    /// The passphrase of a group is too weak.
    #[error("{0}")]
    WeakPassphrase(String),
    /// The text is no address of a relay.
    #[error(transparent)]
    RelayMalformed(#[from] RelayUrlError),
    /// The relay was not added, or not in this way.
    #[error("no such relay was added; `syncshell relay list` shows those that were")]
    UnknownRelay,
    /// The group or the home has as many relays as it may.
    #[error("{MAX_RELAYS} relays are the most; remove one with `syncshell relay remove`")]
    TooManyRelays,
    /// The author may not invite.
    #[error("this device may not invite others to this group")]
    MayNotInvite,
    /// The role may not remove that member, or not rotate.
    #[error("this device may not do that in this group; ask an admin of it")]
    MayNotRemove,
    /// Nobody and nothing of the group is called that.
    #[error("no member or device of the group is called {0}; `syncshell members` lists them")]
    UnknownMember(String),
    /// Several are called that.
    #[error("{0} may mean several; give more digits of the id that `syncshell members` shows")]
    SeveralMembers(String),
    /// No removal of that member waits for a signature.
    #[error("no removal of {0} waits for a signature; `syncshell members` shows those that do")]
    NothingToApprove(String),
    /// Whoever knows the passphrase belongs to the group.
    #[error("nobody can be removed from a passphrase group; make a new group with the others")]
    PassphraseGroup,
    /// This device was removed.
    #[error("this device was removed from this group; ask a member for an invite to join as a new one")]
    Removed,
    /// No new group key can be made.
    #[error("no new group key can be made: {0}")]
    Rotation(String),

    // the peer
    /// No invite answers to the code.
    #[error(
        "no invite answers to this code; compare it with the other device, and check that it still shows it and is on this network"
    )]
    InviteNotFound,
    /// No invite answers to the code nearby, and a relay where it might does not say.
    #[error("no invite answers to this code nearby, and {0}; wait a moment, or check the relay's address")]
    RelayUnavailable(String),
    /// The request was left at a relay, and nobody who may answer it is there.
    #[error(
        "nobody who may let this device in is there at the moment; the request waits for seven days at the relay ({0}), and completes by itself while `syncshell up` or `syncshell run` runs here, once a device of the group is back"
    )]
    JoinWaits(String),
    /// The inviter does not know the code.
    #[error("the other device does not know this code; compare the two, or make a new one")]
    InviteWrong,
    /// The invite was used.
    #[error("this invite has been used, and each admits one device; make a new one with `syncshell pair --create`")]
    InviteUsed,
    /// The invite expired.
    #[error("this invite has expired, they last ten minutes; make a new one with `syncshell pair --create`")]
    InviteExpired,
    /// The invite was taken back.
    #[error("this invite was taken back; ask for a new one")]
    InviteRevoked,
    /// The other device answered against the protocol, or someone else answered.
    #[error("the other device did not prove that it made this invite: {0}; make a new one and try again")]
    InviteForged(String),
    /// The other device cannot be reached.
    #[error(
        "the other device was found but cannot be reached: {0}; check that both are on one network and no firewall is between"
    )]
    Unreachable(String),
    /// No network was asked for.
    #[error("this needs the network, which is switched off")]
    Offline,

    // the environment
    /// The home cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Another process works on the home.
    #[error(transparent)]
    Busy(#[from] LockError),
    /// The database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No socket can be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Keys in the database do not open with the home's key.
    #[error(
        "a secret in the database does not open ({0}); the database belongs to another home, or is damaged: restore both from one backup"
    )]
    Secret(String),
    /// The group's keys are not what they should be.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Not enough memory to derive a key.
    #[error("not enough memory to derive a key: {0}; free some and try again")]
    Memory(String),
    /// A backup was not made or opened.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The file of a backup cannot be read or written.
    #[error("{path} cannot be used: {source}", path = .path.display())]
    BackupFile {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// There is something else where a backup was to go.
    #[error("{path} is there already and is no backup; name another file", path = .0.display())]
    BackupExists(PathBuf),
    /// The backup's device was not in the group when it was made.
    #[error("the backup has no place in group {0}: its device had been removed from it")]
    NotInGroup(GroupId),
    /// Something about a folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The client was closed.
    #[error("the client was closed")]
    Closed,
}

impl ClientError {
    /// A word for the kind of error that programs can rely on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too-large",
            Self::NoGroup => "no-group",
            Self::SeveralGroups(_) => "several-groups",
            Self::UnknownGroup(_) => "unknown-group",
            Self::AlreadyJoined(_) => "already-joined",
            Self::InviteMalformed(_) => "invite-malformed",
            Self::BlobIdReused(_) => "blob-id-reused",
            Self::WeakPassphrase(_) => "weak-passphrase",
            Self::RelayMalformed(_) => "relay-malformed",
            Self::RelayUnavailable(_) => "relay-unavailable",
            Self::UnknownRelay => "unknown-relay",
            Self::TooManyRelays => "too-many-relays",
            Self::MayNotInvite => "may-not-invite",
            Self::MayNotRemove => "may-not-remove",
            Self::UnknownMember(_) => "unknown-member",
            Self::SeveralMembers(_) => "several-members",
            Self::NothingToApprove(_) => "nothing-to-approve",
            Self::PassphraseGroup => "passphrase-group",
            Self::Removed => "removed",
            Self::Rotation(_) => "rotation",
            Self::InviteNotFound => "invite-not-found",
            Self::JoinWaits(_) => "join-waits",
            Self::InviteWrong => "invite-wrong",
            Self::InviteUsed => "invite-used",
            Self::InviteExpired => "invite-expired",
            Self::InviteRevoked => "invite-revoked",
            Self::InviteForged(_) => "invite-forged",
            Self::Unreachable(_) => "unreachable",
            Self::Offline => "offline",
            Self::Home(HomeError::Lock(error)) | Self::Busy(error) => lock_code(error),
            Self::Home(error) => home_code(error),
            Self::Store(error) => store_code(error),
            Self::Bind(_) => "bind",
            Self::Secret(_) => "secret",
            Self::Keys(_) => "keys",
            Self::Memory(_) => "memory",
            Self::Backup(BackupError::WrongPassphrase) => "wrong-passphrase",
            Self::Backup(BackupError::OutOfMemory(_)) => "memory",
            Self::Backup(_) => "backup",
            Self::BackupFile { source, .. } => file_code(source),
            Self::BackupExists(_) => "exists",
            Self::NotInGroup(_) => "not-in-group",
            Self::Folder(error) => error.code(),
            Self::Closed => "closed",
        }
    }
}

fn file_code(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "disk-full",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "no-permission",
        _ => "io",
    }
}

fn home_code(error: &HomeError) -> &'static str {
    match error {
        HomeError::AlreadyExists { .. } => "home-exists",
        HomeError::NotAHome { .. } => "not-a-home",
        HomeError::TooNew { .. } => "newer-home",
        HomeError::DatabaseGone { .. } => "database-gone",
        HomeError::NoPermission { .. } => "no-permission",
        HomeError::KeyStore(_) => "key-store",
        _ => "home",
    }
}

fn lock_code(error: &LockError) -> &'static str {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};

    match error {
        LockError::Busy { .. } => "busy",
        LockError::Io { source, .. } if matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem) => {
            "no-permission"
        }
        LockError::Io { .. } => "home",
    }
}

fn store_code(error: &StoreError) -> &'static str {
    match error {
        StoreError::BlobIdReused { .. } => "blob-id-reused",
        StoreError::Newer { .. } => "newer-database",
        StoreError::Corrupt(_) => "corrupt",
        StoreError::NotADatabase => "not-a-database",
        StoreError::DiskFull => "disk-full",
        StoreError::ReadOnly => "read-only",
        StoreError::Busy => "busy",
        StoreError::Closed => "closed",
        _ => "store",
    }
}
