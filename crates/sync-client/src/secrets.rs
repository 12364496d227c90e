//! The device's secrets in its database, each sealed under the home's key.

use sync_crypto::author::AUTHOR_SECRET_LEN;
use sync_crypto::{AuthorSecret, EpochSecret, InviteKeys};
use sync_store::{StoreError, Txn};
use sync_types::{AuthorId, EpochId, GroupId, InviteId, PendingJoin, SharedInvite};
use zeroize::Zeroizing;

use crate::error::ClientError;
use crate::group::Shared;
use crate::keys::with_rng;

const AUTHOR: &str = "author";
const EPOCH: &str = "epoch";
const INVITE: &str = "invite";
const JOIN: &str = "join";
const PENDING: &str = "pending-join";
const DEVICE: &str = "device";

/// A secret sealed for the database.
pub(crate) struct SealedSecret {
    kind: &'static str,
    id: Vec<u8>,
    sealed: Vec<u8>,
}

impl SealedSecret {
    /// Writes it as part of a transaction.
    pub(crate) fn put(&self, txn: &mut Txn<'_>) -> Result<(), StoreError> {
        txn.put_secret(self.kind, &self.id, &self.sealed)
    }
}

fn seal(shared: &Shared, kind: &'static str, id: Vec<u8>, secret: &[u8]) -> SealedSecret {
    let sealed = with_rng(&shared.rng, |rng| shared.home_key.seal(kind, &id, secret, rng));
    SealedSecret { kind, id, sealed }
}

fn open(shared: &Shared, kind: &str, id: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, ClientError> {
    shared.home_key.open(kind, id, sealed).map_err(|error| ClientError::Secret(error.to_string()))
}

async fn fetch(shared: &Shared, kind: &'static str, id: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, ClientError> {
    let key = id.to_vec();
    let sealed = shared.store.read(move |reader| reader.secret(kind, &key)).await?;
    sealed.map(|sealed| open(shared, kind, id, &sealed)).transpose()
}

fn fixed<const N: usize>(secret: &[u8]) -> Result<Zeroizing<[u8; N]>, ClientError> {
    let array = secret.try_into().map_err(|_| ClientError::Secret("of another length".to_owned()))?;
    Ok(Zeroizing::new(array))
}

/// Seals an author's keys.
pub(crate) fn seal_author(shared: &Shared, author: &AuthorSecret) -> SealedSecret {
    seal(shared, AUTHOR, author.id().0.to_vec(), &author.expose_bytes()[..])
}

/// Fetches the keys of every author this home is or was, in whatever group.
pub(crate) async fn authors(shared: &Shared) -> Result<Vec<AuthorSecret>, ClientError> {
    let all = shared.store.read(|reader| reader.secrets(AUTHOR)).await?;
    all.iter()
        .map(|sealed| {
            let secret = open(shared, AUTHOR, &sealed.id, &sealed.value)?;
            Ok(AuthorSecret::from_bytes(&*fixed::<AUTHOR_SECRET_LEN>(&secret)?))
        })
        .collect()
}

/// Fetches an author's keys.
pub(crate) async fn author(shared: &Shared, id: AuthorId) -> Result<AuthorSecret, ClientError> {
    let secret = fetch(shared, AUTHOR, &id.0).await?;
    let secret = secret.ok_or_else(|| ClientError::Secret("an author's keys are missing".to_owned()))?;
    Ok(AuthorSecret::from_bytes(&*fixed::<AUTHOR_SECRET_LEN>(&secret)?))
}

fn epoch_name(group: GroupId, epoch: EpochId) -> Vec<u8> {
    [&group.0[..], &epoch.number.to_be_bytes(), &epoch.hash].concat()
}

/// Seals an epoch's secret.
pub(crate) fn seal_epoch(shared: &Shared, group: GroupId, epoch: EpochId, secret: &EpochSecret) -> SealedSecret {
    seal(shared, EPOCH, epoch_name(group, epoch), secret.expose_bytes())
}

/// Fetches every epoch of a group.
pub(crate) async fn epochs(shared: &Shared, group: GroupId) -> Result<Vec<(EpochId, EpochSecret)>, ClientError> {
    let all = shared.store.read(|reader| reader.secrets(EPOCH)).await?;
    let of_group = all.into_iter().filter(|secret| secret.id.starts_with(&group.0) && secret.id.len() == 68);
    of_group
        .map(|sync_store::SealedSecret { id, value }| {
            let secret = open(shared, EPOCH, &id, &value)?;
            let malformed = || ClientError::Secret("an epoch's name is malformed".to_owned());
            let number = u32::from_be_bytes(id[32..36].try_into().map_err(|_| malformed())?);
            let hash = id[36..].try_into().map_err(|_| malformed())?;
            Ok((EpochId { number, hash }, EpochSecret::from_bytes(*fixed(&secret)?)))
        })
        .collect()
}

/// Seals what an invite is answered with.
pub(crate) fn seal_invite(shared: &Shared, id: InviteId, invite: &SharedInvite) -> SealedSecret {
    seal(shared, INVITE, id.0.to_vec(), &Zeroizing::new(invite.encode()))
}

/// Fetches what an invite is answered with.
pub(crate) async fn invite(shared: &Shared, id: InviteId) -> Result<Option<(InviteKeys, SharedInvite)>, ClientError> {
    let secret = fetch(shared, INVITE, &id.0).await?;
    secret
        .map(|secret| {
            let invite = SharedInvite::decode(&secret).map_err(|error| ClientError::Secret(error.to_string()))?;
            Ok((InviteKeys::from_prk(invite.prk), invite))
        })
        .transpose()
}

/// What names a request that waits at a relay.
fn pending_name(invite: InviteId, relay: &str) -> Vec<u8> {
    [&invite.0[..], blake3::hash(relay.as_bytes()).as_bytes()].concat()
}

/// Keeps a request that is to be left at a relay.
pub(crate) async fn put_pending(shared: &Shared, invite: InviteId, pending: &PendingJoin) -> Result<(), ClientError> {
    let name = pending_name(invite, &pending.relay);
    let sealed = seal(shared, PENDING, name, &Zeroizing::new(pending.encode()));
    Ok(shared.store.write(0, move |txn| sealed.put(txn)).await?)
}

/// The request that was left at a relay by an invite's code.
pub(crate) async fn pending(shared: &Shared, invite: InviteId, relay: &str) -> Option<PendingJoin> {
    let secret = fetch(shared, PENDING, &pending_name(invite, relay)).await.ok().flatten()?;
    PendingJoin::decode(&secret).ok()
}

/// Every request that was left at a relay and not answered.
pub(crate) async fn all_pending(shared: &Shared) -> Result<Vec<PendingJoin>, ClientError> {
    let all = shared.store.read(|reader| reader.secrets(PENDING)).await?;
    all.iter()
        .map(|sealed| {
            let secret = open(shared, PENDING, &sealed.id, &sealed.value)?;
            PendingJoin::decode(&secret).map_err(|error| ClientError::Secret(error.to_string()))
        })
        .collect()
}

/// Forgets a request that waited at a relay.
pub(crate) async fn forget_pending(shared: &Shared, invite: InviteId, relay: &str) -> Result<(), ClientError> {
    let name = pending_name(invite, relay);
    Ok(shared.store.write(0, move |txn| txn.delete_secret(PENDING, &name).map(|_| ())).await?)
}

/// The author with which this device answers an invite: the same one when it asks again after a crash.
pub(crate) async fn joining_author(shared: &Shared, invite: InviteId) -> Result<AuthorSecret, ClientError> {
    if let Some(secret) = fetch(shared, JOIN, &invite.0).await? {
        return Ok(AuthorSecret::from_bytes(&*fixed::<AUTHOR_SECRET_LEN>(&secret)?));
    }
    let author = with_rng(&shared.rng, |rng| AuthorSecret::make(rng));
    let sealed = seal(shared, JOIN, invite.0.to_vec(), &author.expose_bytes()[..]);
    shared.store.write(0, move |txn| sealed.put(txn)).await?;
    Ok(author)
}

/// Forgets the author and the requests kept for an invite, now that it belongs to a group.
pub(crate) fn forget_joining(txn: &mut Txn<'_>, invite: InviteId) -> Result<(), StoreError> {
    for pending in txn.reader().secrets(PENDING)?.into_iter().filter(|pending| pending.id.starts_with(&invite.0)) {
        txn.delete_secret(PENDING, &pending.id)?;
    }
    txn.delete_secret(JOIN, &invite.0).map(|_| ())
}

/// The device's own secret, as it is in the database; none before the first start.
pub(crate) async fn device(shared: &Shared) -> Result<Option<Zeroizing<[u8; 32]>>, ClientError> {
    fetch(shared, DEVICE, b"").await?.map(|secret| fixed(&secret)).transpose()
}

/// Seals the device's own secret.
pub(crate) fn seal_device(shared: &Shared, secret: &[u8; 32]) -> SealedSecret {
    seal(shared, DEVICE, Vec::new(), secret)
}

/// Whether this device has asked to be admitted by an invite before.
pub(crate) async fn is_joining(shared: &Shared, invite: InviteId) -> bool {
    matches!(fetch(shared, JOIN, &invite.0).await, Ok(Some(_)))
}
