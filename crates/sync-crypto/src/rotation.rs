//! Rotations hand a new epoch secret to those who remain; grants hand the known epochs to a newcomer.
//!
//! A rotation names nobody.
//! A recipient finds its slot by a hint only holders of the epoch before can compute; empty slots are sealed for nobody and look like any other.

use rand_core::CryptoRng;
use sync_types::bounds::MAX_EPOCHS_SEALED;
use sync_types::{AuthorId, AuthorKeys, EpochId, FormatError, GroupId, KEM_KEY_LEN, Reader, Writer};
use zeroize::Zeroizing;

use crate::author::AuthorSecret;
use crate::epoch::{EpochKeys, EpochSecret, HINT_LEN, HintKey};
use crate::hazmat::hpke::{self, ENC_LEN, Recipient};
use crate::seal::{BOX_OVERHEAD, open_box, seal_box};
use crate::secret::random;

/// Slots of a rotation: as many as fit an envelope as a power of two.
pub const MAX_SLOTS: usize = 512;
/// Epochs in a grant: three centuries of monthly rotations.
pub const MAX_EPOCHS: usize = 4096;

const VERSION: u64 = 1;
const ROTATION_FIELDS: usize = 6;
const SLOT_FIELDS: usize = 3;
const EPOCH_FIELDS: usize = 3;
/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
/// An epoch secret and its tag.
const SEALED_LEN: usize = 48;
const CHAIN_LEN: usize = 32 + BOX_OVERHEAD;
const CHAIN: &str = "chain";
const ROTATION_INFO: &[u8] = b"syncshell v1 rotation\0";
const GRANT_INFO: &[u8] = b"syncshell v1 grant\0";
const ROTATION_HASH: &str = "syncshell v1 rotation";

/// Why a rotation cannot be made or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The payload is no rotation.
    #[error(transparent)]
    Malformed(#[from] FormatError),
    /// No slot is for this author.
    #[error("rotation has no slot for this author")]
    NotARecipient,
    /// A slot opens to a secret that was not committed to, or the chain does not open: its maker cheated.
    #[error("rotation contradicts itself")]
    Contradiction,
    /// There are more recipients than slots.
    #[error("rotation is for {got} authors, at most {MAX_SLOTS} are possible")]
    TooManyRecipients {
        /// Recipients given.
        got: usize,
    },
    /// The epoch before is the last there can be.
    #[error("epoch numbers are exhausted")]
    Exhausted,
}

/// Whether a new epoch opens those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    /// Whoever opens the new epoch opens all before it.
    Open,
    /// The chain ends here; newcomers get a snapshot.
    Closed,
}

/// The epoch a rotation follows.
#[derive(Debug, Clone, Copy)]
pub struct Before<'a> {
    /// Its name.
    pub epoch: EpochId,
    /// Its secret.
    pub secret: &'a EpochSecret,
    /// Whether the new epoch opens it.
    pub history: History,
}

/// A rotation just made.
#[derive(Debug, Clone)]
pub struct Made {
    /// Payload of the rotation's envelope.
    pub payload: Vec<u8>,
    /// The new epoch.
    pub epoch: EpochId,
    /// Its secret.
    pub secret: EpochSecret,
}

/// What a recipient finds in a rotation.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The new epoch.
    pub epoch: EpochId,
    /// Its secret.
    pub secret: EpochSecret,
    /// The epoch before, where history is open; its commitment is for the caller to compare.
    pub before: Option<(EpochId, EpochSecret)>,
}

/// Makes a new epoch for the recipients.
///
/// A recipient whose key is malformed could open nothing; it gets an empty slot and keeps nobody else from rotating.
///
/// # Errors
/// When there are more recipients than [`MAX_SLOTS`], or no number is left.
pub fn make_rotation(
    group: &GroupId,
    before: Before<'_>,
    recipients: &[AuthorKeys],
    rng: &mut impl CryptoRng,
) -> Result<Made, RotationError> {
    if recipients.len() > MAX_SLOTS {
        return Err(RotationError::TooManyRecipients { got: recipients.len() });
    }
    let number = before.epoch.number.checked_add(1).ok_or(RotationError::Exhausted)?;
    let nonce: [u8; 32] = random(rng);
    let secret = EpochSecret::make(rng);
    let commitment = secret.commitment();
    let chain = match before.history {
        History::Open => {
            let key = secret.derive_chain_key();
            Some(seal_box(&key, CHAIN, &before.epoch.hash, before.secret.expose_bytes(), rng))
        }
        History::Closed => None,
    };

    let hint_key = before.secret.derive_keys().hint;
    let info = rotation_info(group, &nonce);
    let nobody = Recipient::nobody(rng);
    let mut slots = Vec::with_capacity(recipients.len().next_power_of_two());
    for keys in recipients {
        slots.push(match Recipient::new(&keys.kem) {
            Ok(recipient) => {
                let (enc, sealed) = recipient.seal(&info, &commitment, secret.expose_bytes(), rng);
                (hint_key.hint(&keys.verify, &nonce), enc, sealed)
            }
            Err(hpke::MalformedKey) => empty_slot(&nobody, &info, &commitment, rng),
        });
    }
    for _ in recipients.len()..recipients.len().next_power_of_two() {
        slots.push(empty_slot(&nobody, &info, &commitment, rng));
    }
    shuffle(&mut slots, rng);

    let mut writer = Writer::array_of(ROTATION_FIELDS);
    writer.uint(VERSION).bin(&nonce).bin(&commitment);
    writer.array(2).uint(before.epoch.number.into()).bin(&before.epoch.hash);
    writer.bin_or_nil(chain.as_deref());
    writer.array(slots.len());
    for (hint, enc, sealed) in &slots {
        writer.array(SLOT_FIELDS).bin(hint).bin(enc).bin(sealed);
    }
    let payload = writer.finish();
    let epoch = EpochId { number, hash: rotation_hash(&payload) };
    Ok(Made { payload, epoch, secret })
}

/// Opens a rotation that has a slot for this author.
///
/// With the keys of the epoch before, only slots with this author's hint are tried; without, every slot.
///
/// # Errors
/// When the payload is malformed or contradicts itself, or no slot opens.
pub fn open_rotation(
    payload: &[u8],
    group: &GroupId,
    author: &AuthorSecret,
    before: Option<&EpochKeys>,
) -> Result<Opened, RotationError> {
    let rotation = Rotation::decode(payload)?;
    let hint = before.map(|keys| keys.hint.hint(&author.id(), &rotation.nonce));
    let info = rotation_info(group, &rotation.nonce);
    let secret = rotation
        .slots
        .iter()
        .filter(|slot| hint.is_none_or(|hint| slot.hint == hint))
        .find_map(|slot| hpke::open(author.kem_seed(), slot.enc, &info, &rotation.commitment, slot.sealed))
        .ok_or(RotationError::NotARecipient)?;
    let secret = epoch_secret(&secret).ok_or(RotationError::Contradiction)?;
    if !secret.matches(&rotation.commitment) {
        return Err(RotationError::Contradiction);
    }
    let before = match rotation.chain {
        Some(chain) => {
            let opened = open_box(&secret.derive_chain_key(), CHAIN, &rotation.before.hash, chain).ok();
            let opened = opened.and_then(|bytes| epoch_secret(&bytes)).ok_or(RotationError::Contradiction)?;
            Some((rotation.before, opened))
        }
        None => None,
    };
    Ok(Opened { epoch: rotation.epoch, secret, before })
}

/// Whether some slot of the rotation carries this author's hint, computed with the key of the epoch before; never for a malformed payload.
#[must_use]
pub fn rotation_reaches(payload: &[u8], hint_key: &HintKey, author: &AuthorId) -> bool {
    Rotation::decode(payload).is_ok_and(|rotation| {
        let hint = hint_key.hint(author, &rotation.nonce);
        rotation.slots.iter().any(|slot| slot.hint == hint)
    })
}

/// A view of a rotation's payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation<'a> {
    /// The epoch it makes.
    pub epoch: EpochId,
    /// The epoch it follows.
    pub before: EpochId,
    /// Commitment to the new secret.
    pub commitment: [u8; 32],
    nonce: [u8; 32],
    chain: Option<&'a [u8]>,
    slots: Vec<Slot<'a>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot<'a> {
    hint: [u8; HINT_LEN],
    enc: &'a [u8; ENC_LEN],
    sealed: &'a [u8],
}

impl<'a> Rotation<'a> {
    /// Looks at the payload of a rotation entry.
    ///
    /// # Errors
    /// When it is malformed, or of a later version.
    pub fn decode(payload: &'a [u8]) -> Result<Self, RotationError> {
        let mut reader = Reader::new(payload);
        let fields = reader.array("rotation", ROTATION_FIELDS, MAX_FIELDS)?;
        let version = reader.uint("rotation version")?;
        if version != VERSION {
            return Err(FormatError::Version { what: "rotation", got: version, known: VERSION }.into());
        }
        let nonce = reader.fixed("rotation nonce")?;
        let commitment = reader.fixed("rotation commitment")?;
        let before_fields = reader.array("epoch before", 2, MAX_FIELDS)?;
        let before = EpochId { number: reader.uint32("epoch number")?, hash: reader.fixed("epoch hash")? };
        reader.skip("epoch before", before_fields - 2)?;
        let chain = match reader.fixed_or_nil::<CHAIN_LEN>("chain")? {
            // the reader copies; the view borrows the bytes it has just passed
            Some(_) => {
                let end = payload.len() - reader.rest().len();
                Some(&payload[end - CHAIN_LEN..end])
            }
            None => None,
        };
        let count = reader.array("slots", 1, MAX_SLOTS)?;
        if !count.is_power_of_two() {
            return Err(FormatError::Malformed { field: "slots" }.into());
        }
        let slots = (0..count).map(|_| read_slot(&mut reader)).collect::<Result<_, _>>()?;
        reader.skip("rotation", fields - ROTATION_FIELDS)?;
        reader.end()?;
        let number = before.number.checked_add(1).ok_or(RotationError::Exhausted)?;
        let epoch = EpochId { number, hash: rotation_hash(payload) };
        Ok(Self { epoch, before, commitment, nonce, chain, slots })
    }
}

fn read_slot<'a>(reader: &mut Reader<'a>) -> Result<Slot<'a>, FormatError> {
    let fields = reader.array("slot", SLOT_FIELDS, MAX_FIELDS)?;
    let hint = reader.fixed("hint")?;
    let enc =
        reader.bin("slot key", ENC_LEN)?.try_into().map_err(|_| FormatError::Malformed { field: "slot key" })?;
    let sealed = reader.bin("slot", SEALED_LEN)?;
    if sealed.len() != SEALED_LEN {
        return Err(FormatError::Malformed { field: "slot" });
    }
    reader.skip("slot", fields - SLOT_FIELDS)?;
    Ok(Slot { hint, enc, sealed })
}

fn rotation_hash(payload: &[u8]) -> [u8; 32] {
    blake3::derive_key(ROTATION_HASH, payload)
}

fn rotation_info(group: &GroupId, nonce: &[u8; 32]) -> Vec<u8> {
    [ROTATION_INFO, &group.0, nonce].concat()
}

/// Random bytes would not do: an X25519 key has its top bit clear and lies on the curve, which half of them do not.
fn empty_slot(
    nobody: &Recipient,
    info: &[u8],
    aad: &[u8],
    rng: &mut impl CryptoRng,
) -> ([u8; HINT_LEN], [u8; ENC_LEN], Vec<u8>) {
    let (enc, sealed) = nobody.seal(info, aad, &random::<32>(rng), rng);
    (random(rng), enc, sealed)
}

/// Fisher–Yates, so that a slot's place says nothing about its owner.
fn shuffle<T>(items: &mut [T], rng: &mut impl CryptoRng) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(last + 1, rng));
    }
}

/// A uniform index below `bound`, which is at most [`MAX_SLOTS`].
fn below(bound: usize, rng: &mut impl CryptoRng) -> usize {
    let mask = bound.next_power_of_two() - 1;
    loop {
        let candidate = usize::from(u16::from_le_bytes(random(rng))) & mask;
        if candidate < bound {
            return candidate;
        }
    }
}

/// Why epochs cannot be granted, or a grant is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// The newcomer's encapsulation key is malformed.
    #[error("newcomer's encapsulation key is malformed")]
    MalformedKey,
    /// There are more epochs than a grant holds.
    #[error("grant has {got} epochs, at most {MAX_EPOCHS} are possible")]
    TooManyEpochs {
        /// Epochs given.
        got: usize,
    },
    /// It was sealed for someone else, another channel or another group, or was changed.
    #[error("grant is not for this author on this channel")]
    Refused,
    /// What was sealed is no list of epochs.
    #[error(transparent)]
    Malformed(#[from] FormatError),
}

/// Seals epochs for a newcomer; they open on the channel with this binding only.
///
/// # Errors
/// When the newcomer's key is malformed, or there are more epochs than [`MAX_EPOCHS`].
pub fn seal_grant(
    group: &GroupId,
    binding: &[u8; 32],
    recipient: &[u8; KEM_KEY_LEN],
    epochs: &[(EpochId, EpochSecret)],
    rng: &mut impl CryptoRng,
) -> Result<Vec<u8>, GrantError> {
    if epochs.len() > MAX_EPOCHS {
        return Err(GrantError::TooManyEpochs { got: epochs.len() });
    }
    let recipient = Recipient::new(recipient).map_err(|hpke::MalformedKey| GrantError::MalformedKey)?;
    let mut writer = Writer::array_of(epochs.len());
    for (epoch, secret) in epochs {
        writer.array(EPOCH_FIELDS).uint(epoch.number.into()).bin(&epoch.hash).bin(secret.expose_bytes());
    }
    let plaintext = Zeroizing::new(writer.finish());
    let (enc, sealed) = recipient.seal(&grant_info(group), binding, &plaintext, rng);
    Ok([&enc[..], &sealed].concat())
}

/// Opens what [`seal_grant`] sealed for this author on this channel; the commitments are for the caller to compare.
///
/// # Errors
/// When it was sealed for another author, channel or group, or is no list of epochs.
pub fn open_grant(
    group: &GroupId,
    binding: &[u8; 32],
    author: &AuthorSecret,
    sealed: &[u8],
) -> Result<Vec<(EpochId, EpochSecret)>, GrantError> {
    if sealed.len() > MAX_EPOCHS_SEALED {
        return Err(FormatError::TooMany { field: "grant", got: sealed.len(), max: MAX_EPOCHS_SEALED }.into());
    }
    let (enc, sealed) = sealed.split_first_chunk::<ENC_LEN>().ok_or(GrantError::Refused)?;
    let plaintext =
        hpke::open(author.kem_seed(), enc, &grant_info(group), binding, sealed).ok_or(GrantError::Refused)?;
    let mut reader = Reader::new(&plaintext);
    let count = reader.array("epochs", 0, MAX_EPOCHS)?;
    let epochs = (0..count).map(|_| read_epoch(&mut reader)).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(epochs)
}

fn read_epoch(reader: &mut Reader<'_>) -> Result<(EpochId, EpochSecret), FormatError> {
    let fields = reader.array("epoch", EPOCH_FIELDS, MAX_FIELDS)?;
    let epoch = EpochId { number: reader.uint32("epoch number")?, hash: reader.fixed("epoch hash")? };
    let secret = EpochSecret::from_bytes(reader.fixed("epoch secret")?);
    reader.skip("epoch", fields - EPOCH_FIELDS)?;
    Ok((epoch, secret))
}

fn grant_info(group: &GroupId) -> Vec<u8> {
    [GRANT_INFO, &group.0].concat()
}

fn epoch_secret(bytes: &[u8]) -> Option<EpochSecret> {
    bytes.try_into().ok().map(EpochSecret::from_bytes)
}
