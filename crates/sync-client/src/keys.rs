//! A group's keys in memory: its epochs, and the author that seals and signs with them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rand_core::CryptoRng;
use sync_core::Membership;
use sync_crypto::author::SignPurpose;
use sync_crypto::rotation::Rotation;
use sync_crypto::seal::{Sealer, Suite, TAG_LEN};
use sync_crypto::{
    AuthorSecret, Content as Opened, ContentError, EpochKeys, EpochSecret, OpenError, content, rotation_reaches, seal,
};
use sync_store::{Content, NewEntry, SealEntries, SealError};
use sync_types::{
    AuthorId, AuthorKeys, Charter, Class, Draft, Envelope, EnvelopeHash, EnvelopeType, EpochId, FormatError, GroupId,
    Header, MemberId, Number, Operation, SignedOperation, succession_statement,
};

/// Kind of an app's blob.
pub const KIND_BLOB: u16 = 1;
/// Stream an app's blobs belong to unless the app names another.
pub const APP_STREAM: &str = "app";

/// A generator that may be shared between threads.
pub type SharedRng = Arc<Mutex<dyn CryptoRng + Send>>;

/// Draws from a shared generator.
pub(crate) fn with_rng<T>(rng: &SharedRng, draw: impl FnOnce(&mut Borrowed<'_>) -> T) -> T {
    let mut rng = rng.lock().unwrap_or_else(PoisonError::into_inner);
    draw(&mut Borrowed(&mut *rng))
}

/// A borrowed generator, sized where the original may not be.
pub struct Borrowed<'a>(&'a mut (dyn CryptoRng + Send));

impl rand_core::TryRng for Borrowed<'_> {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        self.0.try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        self.0.try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.0.try_fill_bytes(bytes)
    }
}

impl rand_core::TryCryptoRng for Borrowed<'_> {}

/// Draws an array.
pub(crate) fn draw<const N: usize>(rng: &SharedRng) -> [u8; N] {
    let mut bytes = [0; N];
    with_rng(rng, |rng| rand_core::Rng::fill_bytes(rng, &mut bytes));
    bytes
}

/// Every epoch of a group that this device can open.
#[derive(Debug)]
pub struct GroupKeys {
    group: GroupId,
    suite: Suite,
    first: EpochId,
    commitment: [u8; 32],
    epochs: BTreeMap<EpochKey, (EpochSecret, EpochKeys)>,
    /// The epoch that is sealed in, or that there is none; unset before anyone decided that.
    sealed_in: Option<Option<EpochKey>>,
}

/// Orders epochs as sealing prefers them: number, then hash.
type EpochKey = (u32, [u8; 32]);

/// Why a group's keys cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The charter cannot be read.
    #[error("charter cannot be read: {0}")]
    Charter(#[from] FormatError),
    /// The charter names a cipher suite of a later version.
    #[error("group uses cipher suite {0}, which this program does not know; update it")]
    Suite(u32),
    /// The secret is not the one the charter commits to.
    #[error("group key is not the one the charter commits to")]
    Commitment,
    /// No epoch is known, so nothing can be sealed.
    #[error("no group key is known")]
    None,
    /// Every epoch that is known is known to a removed member too, or not to all members.
    #[error("no group key is known that removed members lack; a new one has to be made")]
    Stale,
}

/// Why an entry's content cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnsealError {
    /// Its epoch is not known here.
    #[error("sealed in epoch {0}, which is not known here")]
    UnknownEpoch(u32),
    /// It does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It opens to something else than an entry.
    #[error("sealed content is malformed: {0}")]
    Content(String),
}

impl From<ContentError> for UnsealError {
    fn from(error: ContentError) -> Self {
        Self::Content(error.to_string())
    }
}

impl GroupKeys {
    /// The keys of the group with this charter, none known yet.
    pub fn new(charter: &[u8]) -> Result<Self, KeysError> {
        let decoded = Charter::decode(charter)?;
        let suite = Suite::from_u64(decoded.suite.into()).ok_or(KeysError::Suite(decoded.suite))?;
        Ok(Self {
            group: GroupId::of(charter),
            suite,
            first: EpochId::first(charter),
            commitment: decoded.commitment,
            epochs: BTreeMap::new(),
            sealed_in: None,
        })
    }

    /// Takes in an epoch; the first one only if it is what the charter commits to.
    pub fn insert(&mut self, epoch: EpochId, secret: EpochSecret) -> Result<(), KeysError> {
        let first = epoch.number <= 1;
        if first && (epoch != self.first || !secret.matches(&self.commitment)) {
            return Err(KeysError::Commitment);
        }
        let keys = secret.derive_keys();
        self.epochs.insert((epoch.number, epoch.hash), (secret, keys));
        Ok(())
    }

    /// Whether entries of an epoch can be opened.
    #[must_use]
    pub fn knows(&self, epoch: EpochId) -> bool {
        self.epochs.contains_key(&(epoch.number, epoch.hash))
    }

    /// The epoch entries are sealed in now; before anyone decided that, the highest one.
    pub fn current(&self) -> Result<(EpochId, &EpochKeys), KeysError> {
        let newest = self.epochs.keys().next_back().copied().ok_or(KeysError::None)?;
        let (number, hash) = self.sealed_in.unwrap_or(Some(newest)).ok_or(KeysError::Stale)?;
        let (_, keys) = self.epochs.get(&(number, hash)).ok_or(KeysError::None)?;
        Ok((EpochId { number, hash }, keys))
    }

    /// The epoch that a new one follows: the highest that is known, whoever else knows it.
    #[must_use]
    pub fn newest(&self) -> Option<(EpochId, EpochSecret)> {
        let ((number, hash), (secret, _)) = self.epochs.iter().next_back()?;
        Some((EpochId { number: *number, hash: *hash }, secret.clone()))
    }

    /// Names of the epochs that are known, the oldest first.
    pub fn epochs(&self) -> impl Iterator<Item = EpochId> {
        self.epochs.keys().map(|(number, hash)| EpochId { number: *number, hash: *hash })
    }

    /// Draws the chunker's table: the same on every device of the group, unknown outside.
    #[must_use]
    pub fn chunker_seed(&self) -> u64 {
        let first = self.epochs.get(&(self.first.number, self.first.hash));
        let secret = first.map(|(secret, _)| blake3::derive_key("syncshell v1 chunker", secret.expose_bytes()));
        secret.map_or(0, |secret| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|at| secret[at])))
    }

    /// Every epoch that is known.
    #[must_use]
    pub fn everything(&self) -> Vec<(EpochId, EpochSecret)> {
        let epoch = |(number, hash): &EpochKey| EpochId { number: *number, hash: *hash };
        self.epochs.iter().map(|(key, (secret, _))| (epoch(key), secret.clone())).collect()
    }

    /// Decides which epoch is sealed in from now on: the highest that all members can open and nobody who was removed.
    ///
    /// An epoch whose rotation is not here was handed over by a member, whose word it is. Of the others the rotation's
    /// maker must have seen what counts, and have left nobody out.
    pub fn settle(&mut self, membership: &Membership, rotations: &[Vec<u8>]) {
        let made: BTreeMap<EpochKey, Envelope<'_>> = rotations
            .iter()
            .filter_map(|bytes| Envelope::parse(bytes).ok())
            .map(|envelope| ((envelope.header.epoch.number, envelope.header.epoch.hash), envelope))
            .collect();
        let may = |(number, hash): &EpochKey| {
            let epoch = EpochId { number: *number, hash: *hash };
            match made.get(&(*number, *hash)) {
                Some(rotation) => self.is_sound(epoch, rotation, membership),
                None if *number > 1 => true,
                None => membership.may_seal_in(&epoch, &membership.charter().founder.verify).is_some(),
            }
        };
        let best = self.epochs.keys().rev().find(|key| may(key)).copied();
        self.sealed_in = Some(best);
    }

    /// Whether a rotation gave its epoch to everyone its maker knew to belong, and to nobody who was removed.
    fn is_sound(&self, epoch: EpochId, rotation: &Envelope<'_>, membership: &Membership) -> bool {
        let Some(reached) = membership.may_seal_in(&epoch, &rotation.header.sender) else { return false };
        let Ok(decoded) = Rotation::decode(rotation.payload()) else { return false };
        // without the epoch before nobody can tell whose slots there are
        let Some((_, before)) = self.epochs.get(&(decoded.before.number, decoded.before.hash)) else { return true };
        let has_slot = |author: &AuthorId| rotation_reaches(rotation.payload(), &before.hint, author);
        reached.iter().all(has_slot) && !membership.ends().keys().any(has_slot)
    }

    /// Opens a sealed entry.
    pub fn unseal(&self, envelope: &Envelope<'_>) -> Result<Opened, UnsealError> {
        let header = &envelope.header;
        let key = (header.epoch.number, header.epoch.hash);
        let (_, keys) = self.epochs.get(&key).ok_or(UnsealError::UnknownEpoch(header.epoch.number))?;
        let associated = envelope.associated_data();
        let plain =
            seal::open(&keys.entry, self.suite, &header.nonce, &header.commitment, &associated, envelope.payload())?;
        Ok(content::decode(&plain)?)
    }
}

/// An author of this device: seals entries in the current epoch and signs them.
pub struct Author {
    secret: AuthorSecret,
    keys: Arc<RwLock<GroupKeys>>,
    rng: SharedRng,
}

impl std::fmt::Debug for Author {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Author").field("id", &self.secret.id()).finish_non_exhaustive()
    }
}

impl Author {
    /// An author that seals with a group's keys.
    pub fn new(secret: AuthorSecret, keys: Arc<RwLock<GroupKeys>>, rng: SharedRng) -> Self {
        Self { secret, keys, rng }
    }

    /// Its secret keys.
    #[must_use]
    pub fn secret(&self) -> &AuthorSecret {
        &self.secret
    }

    fn header(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Header {
        Header {
            kind: EnvelopeType::Push,
            sender: self.secret.id(),
            group: self.keys.read().unwrap_or_else(PoisonError::into_inner).group,
            timestamp: entry.timestamp,
            nonce: [0; 24],
            blob_id: entry.blob_id,
            number,
            previous,
            class: entry.content.class(),
            epoch: EpochId::NONE,
            commitment: [0; 32],
        }
    }

    fn seal_content(&self, mut header: Header, plain: &[u8]) -> Result<Draft, SealError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let (epoch, epoch_keys) = keys.current().map_err(SealError::new)?;
        header.nonce = draw(&self.rng);
        header.epoch = epoch;
        let sealer = Sealer::new(&epoch_keys.entry, keys.suite, &header.nonce);
        header.commitment = sealer.commitment();
        let mut draft = Draft::new(&header, plain.len() + TAG_LEN).map_err(SealError::new)?;
        let associated = draft.associated_data();
        let (body, tag) = draft.payload_mut().split_at_mut(plain.len());
        body.copy_from_slice(plain);
        tag.copy_from_slice(&sealer.seal_in_place(&associated, body));
        Ok(draft)
    }

    fn sign(&self, draft: Draft) -> Vec<u8> {
        let signature = self.secret.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        draft.sign(&signature)
    }
}

impl SealEntries for Author {
    fn author(&self) -> AuthorId {
        self.secret.id()
    }

    fn seal(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Result<Vec<u8>, SealError> {
        let mut header = self.header(number, previous, entry);
        let payload = match &entry.content {
            Content::Sealed { kind, stream, body } => {
                let plain = content::encode(stream, *kind, body).map_err(SealError::new)?;
                return Ok(self.sign(self.seal_content(header, &plain)?));
            }
            Content::Membership(payload) => payload,
            Content::Rotation(payload) => {
                let rotation = sync_crypto::rotation::Rotation::decode(payload).map_err(SealError::new)?;
                header.epoch = rotation.epoch;
                payload
            }
        };
        let mut draft = Draft::new(&header, payload.len()).map_err(SealError::new)?;
        draft.payload_mut().copy_from_slice(payload);
        Ok(self.sign(draft))
    }
}

/// The first entry of a new author's feed: its predecessor says that it goes on under this key.
pub fn succession(
    successor: &Author,
    predecessor: &AuthorSecret,
    member: MemberId,
    seen: Vec<EnvelopeHash>,
    entry: impl FnOnce(Content) -> NewEntry,
) -> Result<Vec<u8>, SealError> {
    let keys: AuthorKeys = successor.secret.keys();
    let group = successor.keys.read().unwrap_or_else(PoisonError::into_inner).group;
    let statement = succession_statement(&keys, member);
    let proof = predecessor.sign(SignPurpose::Succession, &[&group.0, &statement]);
    let operation = Operation::Succeed { keys, member, predecessor: predecessor.id(), proof };
    let entry = entry(Content::Membership(SignedOperation { seen, operation }.encode()));
    debug_assert_eq!(entry.content.class(), Class::Membership);
    successor.seal(Number(1), EnvelopeHash::NONE, &entry)
}
