//! Backups: a device's places in its groups, in one sealed file that was proven before it counts.
//!
//! What is in the groups is not in it: the other members have that, and give it to whoever takes the place again.
//! Taking it starts a new author, which the old one vouches for, since the device that was lost may still write.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use sync_core::Membership;
use sync_crypto::backup::MAX_BACKUP;
use sync_crypto::{
    AuthorSecret, Backup, BackupError, EpochBackup, GroupBackup, HomeKey, PeerBackup, VaultParams, is_backup,
    open_backup, seal_backup,
};
use sync_store::{NewEntry, PeerNote, Renewal, SealEntries as _, Store, StoreError};
use sync_types::{AuthorId, BlobId, Envelope, EpochId, FormatError, GroupId, MemberId};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::device::Inner;
use crate::error::ClientError;
use crate::group::{Group, Shared, now, put_all};
use crate::home::files;
use crate::keys::{Author, GroupKeys, SharedRng, draw, succession, with_rng};
use crate::{relays, secrets};

/// A backup that was written and proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackedUp {
    /// Groups in it.
    pub groups: Vec<GroupId>,
    /// Bytes of the file.
    pub bytes: u64,
}

/// What came of recovering.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The device that the backup is of.
    pub name: String,
    /// Groups whose places were taken.
    pub groups: Vec<GroupId>,
    /// Groups that this home was in already.
    pub here: Vec<GroupId>,
}

/// Writes a backup of a home beside `path`, proves that it can be recovered, and puts it there.
///
/// What is at `path` already goes only if it is a backup too.
pub(crate) async fn write(device: &Arc<Inner>, path: &Path, passphrase: &str) -> Result<BackedUp, ClientError> {
    let path = std::path::absolute(path).map_err(|source| failed_at(path, source))?;
    may_be_replaced(&path)?;
    let backup = collect(device).await?;
    let (rng, passphrase) = (device.shared.rng.clone(), Zeroizing::new(passphrase.to_owned()));
    let sealing = {
        let (path, passphrase) = (path.clone(), passphrase.clone());
        move || {
            let sealed = with_rng(&rng, |rng| seal_backup(&backup, &passphrase, VaultParams::RECOMMENDED, rng))?;
            files::stage(&path, &sealed).map_err(|source| failed_at(&path, source))
        }
    };
    let staged = tokio::task::spawn_blocking(sealing).await.map_err(|_| ClientError::Closed)??;
    // as it lies on the disk, not as it is in memory
    match prove(staged.path(), &passphrase).await {
        Ok((groups, bytes)) => {
            staged.publish().map_err(|source| failed_at(&path, source))?;
            Ok(BackedUp { groups, bytes })
        }
        Err(error) => {
            staged.discard();
            Err(error)
        }
    }
}

/// Takes the places of a backup in this home, in every group that it is not in.
pub(crate) async fn recover(device: &Arc<Inner>, path: &Path, passphrase: &str) -> Result<Recovered, ClientError> {
    let (backup, _) = open(path, passphrase).await?;
    let mut recovered = Recovered { name: backup.name.clone(), groups: Vec::new(), here: Vec::new() };
    let home_relays = backup.relays.clone();
    device.shared.store.write(0, move |txn| relays::add_stored(txn, None, &home_relays)).await?;
    for group in backup.groups {
        let id = GroupId::of(&group.charter);
        if device.group(&id).is_some() {
            recovered.here.push(id);
            continue;
        }
        take_place(&device.shared, group).await?;
        device.open_group(id, false).await?;
        recovered.groups.push(id);
    }
    Ok(recovered)
}

/// Recovers a file into a database that is thrown away; returns its groups and length.
async fn prove(path: &Path, passphrase: &str) -> Result<(Vec<GroupId>, u64), ClientError> {
    let (backup, bytes) = open(path, passphrase).await?;
    let scratch = tempfile::tempdir().map_err(|source| failed_at(&std::env::temp_dir(), source))?;
    let shared = scratch_home(scratch.path(), &backup.name).await?;
    let mut groups = Vec::new();
    for group in backup.groups {
        let id = GroupId::of(&group.charter);
        take_place(&shared, group).await?;
        let row = shared.store.read(move |reader| reader.group(&id)).await?;
        let opened = Group::open(shared.clone(), row, false).await?;
        let author = opened.author().author();
        if !opened.membership().is_admitted(&author) {
            return Err(ClientError::NotInGroup(id));
        }
        opened.keys().current()?;
        groups.push(id);
    }
    shared.store.close().await?;
    Ok((groups, bytes))
}

/// A home whose key is in memory alone, so that what it leaves on the disk opens nothing.
async fn scratch_home(dir: &Path, name: &str) -> Result<Shared, ClientError> {
    let rng: SharedRng = Arc::new(Mutex::new(rand_core::UnwrapErr(getrandom::SysRng)));
    let home_key = with_rng(&rng, |rng| HomeKey::make(rng));
    let store = Store::open(&dir.join("sync.db"), rand_core::UnwrapErr(getrandom::SysRng))?;
    let replica = store.read(|reader| reader.replica_id()).await?;
    Ok(Shared {
        wake: watch::Sender::new(String::new()),
        digest_key: draw(&rng),
        store,
        incarnation: draw(&rng),
        rng,
        home_key: Arc::new(home_key),
        name: name.to_owned(),
        replica,
        addresses: watch::channel(Vec::new()).1,
    })
}

async fn open(path: &Path, passphrase: &str) -> Result<(Backup, u64), ClientError> {
    let (path, passphrase) = (path.to_owned(), Zeroizing::new(passphrase.to_owned()));
    let opening = move || {
        let bytes = files::read_bounded(&path, MAX_BACKUP).map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => BackupError::NotABackup.into(),
            _ => failed_at(&path, source),
        })?;
        Ok((open_backup(&passphrase, &bytes)?, bytes.len() as u64))
    };
    tokio::task::spawn_blocking(opening).await.map_err(|_| ClientError::Closed)?
}

/// Refuses a place where something else is that a person may want to keep.
fn may_be_replaced(path: &Path) -> Result<(), ClientError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed_at(path, error)),
        Ok(found) if !found.is_file() => return Err(ClientError::BackupExists(path.to_owned())),
        Ok(_) => {}
    }
    // its first bytes tell
    let mut start = Vec::new();
    let file = fs::File::open(path).map_err(|source| failed_at(path, source))?;
    io::Read::read_to_end(&mut io::Read::take(file, 64), &mut start).map_err(|source| failed_at(path, source))?;
    if is_backup(&start) { Ok(()) } else { Err(ClientError::BackupExists(path.to_owned())) }
}

fn failed_at(path: &Path, source: io::Error) -> ClientError {
    ClientError::BackupFile { path: PathBuf::from(path), source }
}

/// What of a home goes into a backup: every group that it belongs to.
async fn collect(device: &Arc<Inner>) -> Result<Backup, ClientError> {
    let shared = &device.shared;
    let relays = shared.store.read(|reader| relays::stored(reader, None)).await?;
    // who was removed has no place to take along
    let belongs = |group: &Arc<Group>| group.membership().is_admitted(&group.author().author());
    let mut groups: Vec<Arc<Group>> = device.groups().into_values().filter(belongs).collect();
    groups.sort_unstable_by_key(|group| group.id);
    let mut collected = Vec::with_capacity(groups.len());
    for group in groups {
        collected.push(collect_group(shared, &group).await?);
    }
    Ok(Backup { name: shared.name.clone(), made: now(), relays, groups: collected })
}

async fn collect_group(shared: &Shared, group: &Group) -> Result<GroupBackup, ClientError> {
    let id = group.id;
    let read = shared.store.read(move |reader| {
        Ok((reader.group(&id)?, reader.open_entries(&id)?, relays::stored(reader, Some(&id))?, reader.peers(&id)?))
    });
    let (row, entries, relays, peers) = read.await?;
    let membership = group.membership();
    let mut authors = secrets::authors(shared).await?;
    authors.retain(|author| author.id() == row.author || membership.is_admitted(&author.id()));
    let epochs = secrets::epochs(shared, id).await?;
    let peers = peers.into_iter().filter_map(|peer| {
        let (author, device) = (peer.author?, peer.device?);
        Some(PeerBackup { replica: peer.replica, author, device, name: peer.name, addresses: peer.addresses })
    });
    Ok(GroupBackup {
        charter: row.charter,
        author: row.author,
        authors,
        epochs: epochs.into_iter().map(|(id, secret)| EpochBackup { id, secret }).collect(),
        entries,
        relays,
        peers: peers.collect(),
    })
}

/// Takes a group into a home that is not in it, under a new author; all of it or nothing.
async fn take_place(shared: &Shared, backup: GroupBackup) -> Result<(), ClientError> {
    let GroupBackup { charter, author: old, authors, epochs, entries, relays, peers } = backup;
    let id = GroupId::of(&charter);
    let mut keys = GroupKeys::new(&charter)?;
    let mut sealed = Vec::new();
    for EpochBackup { id: epoch, secret } in epochs {
        sealed.push(secrets::seal_epoch(shared, id, epoch, &secret));
        keys.insert(epoch, secret)?;
    }
    sealed.extend(authors.iter().map(|author| secrets::seal_author(shared, author)));

    let membership = replayed(&charter, &entries)?;
    let member = membership.author(&old).map(|admitted| admitted.member).ok_or(ClientError::NotInGroup(id))?;
    let predecessor = first_of(&membership, old, &authors).ok_or(BackupError::Damaged)?;
    let new = with_rng(&shared.rng, |rng| AuthorSecret::make(rng));
    sealed.push(secrets::seal_author(shared, &new));
    let known: Vec<EpochId> = keys.epochs().collect();
    let author = Author::new(new, Arc::new(RwLock::new(keys)), shared.rng.clone());
    let succession = succeed(shared, &author, &predecessor, member, &membership)?;
    let at = now();
    let bytes = entries.iter().map(Vec::len).sum::<usize>() + succession.len();
    let taken = shared.store.write(bytes, move |txn| {
        put_all(txn, &sealed)?;
        txn.create_group(&charter, old)?;
        txn.ingest(&id, &entries, None, None, &|epoch| known.contains(&epoch))?;
        let renewal = Renewal { succession: &succession, sealer: &author, reopen: None };
        txn.renew_author(&id, &renewal)?;
        relays::add_stored(txn, Some(&id), &relays)?;
        for PeerBackup { replica, author, device, name, addresses } in &peers {
            let peer = txn.peer(&id, replica)?;
            let (name, addresses) = (name.clone(), addresses.clone());
            txn.note_peer(&id, peer, &PeerNote { author: *author, device: *device, name, addresses, now: at })?;
        }
        Ok(())
    });
    Ok(taken.await?)
}

/// Who belonged when the backup was made.
fn replayed(charter: &[u8], entries: &[Vec<u8>]) -> Result<Membership, ClientError> {
    let damaged = |_: FormatError| BackupError::Damaged;
    let mut membership = Membership::new(charter).map_err(damaged)?;
    let mut operations = Vec::new();
    for bytes in entries {
        let envelope = Envelope::parse(bytes).map_err(damaged)?;
        if envelope.header.class == sync_types::Class::Membership {
            operations.push(bytes.clone());
        }
    }
    // such as are signed wrongly are refused when they are stored
    membership.replay(operations).map_err(damaged)?;
    Ok(membership)
}

/// The earliest author of the home that is in the backup: it certifies every later one.
fn first_of(membership: &Membership, from: AuthorId, authors: &[AuthorSecret]) -> Option<AuthorSecret> {
    let secret = |id: &AuthorId| authors.iter().find(|author| author.id() == *id);
    let mut first = secret(&from)?;
    while let Some(earlier) = membership.author(&first.id()).and_then(|admitted| admitted.by).as_ref().and_then(secret)
    {
        first = earlier;
    }
    Some(first.clone())
}

fn succeed(
    shared: &Shared,
    author: &Author,
    predecessor: &AuthorSecret,
    member: MemberId,
    membership: &Membership,
) -> Result<Vec<u8>, ClientError> {
    let (blob_id, digest_key) = (BlobId(draw(&shared.rng)), shared.digest_key);
    let entry = |content: sync_store::Content| {
        let digest = content.digest(&digest_key);
        NewEntry { blob_id, timestamp: now(), content, digest }
    };
    Ok(succession(author, predecessor, member, membership.seen_by(&predecessor.id()), entry)
        .map_err(StoreError::from)?)
}
