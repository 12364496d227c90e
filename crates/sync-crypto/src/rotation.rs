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
    let enc = reader.bin("slot key", ENC_LEN)?.try_into().map_err(|_| FormatError::Malformed { field: "slot key" })?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    const GROUP: GroupId = GroupId([1; 32]);
    const BEFORE: EpochId = EpochId { number: 4, hash: [2; 32] };

    fn rng(seed: u8) -> ChaCha20Rng {
        ChaCha20Rng::from_seed([seed; 32])
    }

    fn author(seed: u8) -> AuthorSecret {
        AuthorSecret::make(&mut rng(seed))
    }

    fn before_secret() -> EpochSecret {
        EpochSecret::from_bytes([3; 32])
    }

    fn rotate(history: History, recipients: &[AuthorKeys]) -> Made {
        let secret = before_secret();
        let before = Before { epoch: BEFORE, secret: &secret, history };
        make_rotation(&GROUP, before, recipients, &mut rng(100)).expect("few recipients")
    }

    #[test]
    fn every_recipient_finds_its_slot_with_and_without_the_epoch_before() {
        let authors = [author(1), author(2), author(3)];
        let made = rotate(History::Open, &authors.each_ref().map(AuthorSecret::keys));
        let keys = before_secret().derive_keys();
        assert_eq!(made.epoch.number, 5);
        for author in &authors {
            for before in [Some(&keys), None] {
                let opened = open_rotation(&made.payload, &GROUP, author, before).expect("a recipient");
                assert_eq!((opened.epoch, &opened.secret), (made.epoch, &made.secret));
                assert_eq!(opened.before, Some((BEFORE, before_secret())));
            }
            assert!(rotation_reaches(&made.payload, &keys.hint, &author.id()));
        }
    }

    #[test]
    fn who_was_left_out_opens_nothing() {
        let made = rotate(History::Open, &[author(1).keys(), author(2).keys(), author(3).keys()]);
        let keys = before_secret().derive_keys();
        let removed = author(4);
        for before in [Some(&keys), None] {
            let opened = open_rotation(&made.payload, &GROUP, &removed, before);
            assert!(matches!(opened, Err(RotationError::NotARecipient)));
        }
        assert!(!rotation_reaches(&made.payload, &keys.hint, &removed.id()));
    }

    #[test]
    fn closed_history_ends_the_chain() {
        let made = rotate(History::Closed, &[author(1).keys()]);
        let opened = open_rotation(&made.payload, &GROUP, &author(1), None).expect("a recipient");
        assert_eq!(opened.before, None);
    }

    #[test]
    fn slots_are_a_power_of_two_and_alike() {
        for (recipients, slots) in [(0, 1), (1, 1), (2, 2), (3, 4), (5, 8)] {
            let keys: Vec<_> = (1..=recipients).map(|seed| author(seed).keys()).collect();
            let made = rotate(History::Open, &keys);
            let rotation = Rotation::decode(&made.payload).expect("own bytes");
            assert_eq!(rotation.slots.len(), slots);
            for slot in rotation.slots {
                assert_eq!(slot.enc[ENC_LEN - 1] & 0x80, 0, "an X25519 key has its top bit clear");
            }
        }
    }

    #[test]
    fn a_place_says_nothing_about_its_owner() {
        let authors = [author(1), author(2)];
        let keys = authors.each_ref().map(AuthorSecret::keys);
        let secret = before_secret();
        let hints = secret.derive_keys().hint;
        let first = (0..16)
            .filter(|seed| {
                let before = Before { epoch: BEFORE, secret: &secret, history: History::Closed };
                let made = make_rotation(&GROUP, before, &keys, &mut rng(*seed)).expect("few recipients");
                let rotation = Rotation::decode(&made.payload).expect("own bytes");
                rotation.slots[0].hint == hints.hint(&authors[0].id(), &rotation.nonce)
            })
            .count();
        assert!((1..16).contains(&first), "{first} of 16 times in the first place");
    }

    #[test]
    fn a_malformed_key_keeps_nobody_else_from_rotating() {
        let mut malformed = author(2).keys();
        malformed.kem[..3].fill(0xff);
        let made = rotate(History::Open, &[author(1).keys(), malformed]);
        assert!(open_rotation(&made.payload, &GROUP, &author(1), None).is_ok());
        assert!(!rotation_reaches(&made.payload, &before_secret().derive_keys().hint, &author(2).id()));
    }

    #[test]
    fn too_many_recipients_and_the_last_number_are_refused() {
        let keys = vec![author(1).keys(); MAX_SLOTS + 1];
        let secret = before_secret();
        let mut before = Before { epoch: BEFORE, secret: &secret, history: History::Closed };
        let refused = make_rotation(&GROUP, before, &keys, &mut rng(1)).expect_err("too many");
        assert_eq!(refused, RotationError::TooManyRecipients { got: 513 });
        before.epoch.number = u32::MAX;
        assert_eq!(make_rotation(&GROUP, before, &[], &mut rng(1)).expect_err("no number"), RotationError::Exhausted);
    }

    #[test]
    fn a_rotation_belongs_to_its_group() {
        let made = rotate(History::Open, &[author(1).keys()]);
        let opened = open_rotation(&made.payload, &GroupId([9; 32]), &author(1), None);
        assert!(matches!(opened, Err(RotationError::NotARecipient)));
    }

    #[test]
    fn a_change_anywhere_is_refused_or_makes_another_epoch_nobody_takes_for_this_one() {
        let made = rotate(History::Open, &[author(1).keys()]);
        // every byte but those of the encapsulated key, of which one in 37
        let enc = made.payload.len() - 2 - SEALED_LEN - ENC_LEN..made.payload.len() - 2 - SEALED_LEN;
        for at in (0..made.payload.len()).filter(|at| !enc.contains(at) || at % 37 == 0) {
            let mut changed = made.payload.clone();
            changed[at] ^= 1;
            if let Ok(opened) = open_rotation(&changed, &GROUP, &author(1), None) {
                assert_ne!(opened.epoch, made.epoch, "byte {at}");
                assert_eq!(opened.secret, made.secret, "byte {at}");
            }
            assert!(open_rotation(&made.payload[..at], &GROUP, &author(1), None).is_err(), "cut at {at}");
        }
        let longer = [&made.payload[..], &[0]].concat();
        assert!(matches!(
            open_rotation(&longer, &GROUP, &author(1), None),
            Err(RotationError::Malformed(FormatError::Trailing(1)))
        ));
    }

    #[test]
    fn a_maker_that_hands_out_another_secret_or_a_false_chain_is_caught() {
        let made = rotate(History::Open, &[author(1).keys()]);
        let rotation = Rotation::decode(&made.payload).expect("own bytes");

        // a slot that opens, to a secret the commitment is not to
        let info = rotation_info(&GROUP, &rotation.nonce);
        let recipient = Recipient::new(&author(1).keys().kem).expect("sound key");
        let (enc, sealed) = recipient.seal(&info, &rotation.commitment, &[8; 32], &mut rng(5));
        let mut lying = made.payload.clone();
        let sealed_at = lying.len() - SEALED_LEN;
        let enc_at = sealed_at - 2 - ENC_LEN;
        lying[sealed_at..].copy_from_slice(&sealed);
        lying[enc_at..enc_at + ENC_LEN].copy_from_slice(&enc);
        let opened = open_rotation(&lying, &GROUP, &author(1), None);
        assert!(matches!(opened, Err(RotationError::Contradiction)));

        let chain = rotation.chain.expect("open history");
        let chain_at = made.payload.windows(CHAIN_LEN).position(|window| window == chain).expect("is in there");
        let mut lying = made.payload.clone();
        lying[chain_at] ^= 1;
        let opened = open_rotation(&lying, &GROUP, &author(1), None);
        assert!(matches!(opened, Err(RotationError::Contradiction)));
    }

    #[test]
    fn a_count_of_slots_that_is_no_power_of_two_or_too_large_is_refused() {
        for count in [0usize, 3, 1024] {
            let mut writer = Writer::array_of(ROTATION_FIELDS);
            writer.uint(VERSION).bin(&[0; 32]).bin(&[0; 32]).array(2).uint(1).bin(&[0; 32]);
            writer.bin_or_nil(None).array(count);
            for _ in 0..count {
                writer.array(SLOT_FIELDS).bin(&[0; HINT_LEN]).bin(&[0; ENC_LEN]).bin(&[0; SEALED_LEN]);
            }
            let payload = writer.finish();
            assert!(matches!(Rotation::decode(&payload), Err(RotationError::Malformed(_))), "{count}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Rotation::decode(&bytes);
            prop_assert!(open_grant(&GROUP, &[0; 32], &author(1), &bytes).is_err());
        }
    }

    fn epochs() -> Vec<(EpochId, EpochSecret)> {
        (1..=3)
            .map(|number: u8| {
                let epoch = EpochId { number: number.into(), hash: [number; 32] };
                (epoch, EpochSecret::from_bytes([number; 32]))
            })
            .collect()
    }

    #[test]
    fn a_grant_opens_for_its_author_channel_and_group_only() {
        let newcomer = author(1);
        let sealed = seal_grant(&GROUP, &[5; 32], &newcomer.keys().kem, &epochs(), &mut rng(2)).expect("sound key");
        assert_eq!(open_grant(&GROUP, &[5; 32], &newcomer, &sealed).as_ref(), Ok(&epochs()));
        for (group, binding, author) in
            [(GroupId([9; 32]), [5; 32], author(1)), (GROUP, [6; 32], author(1)), (GROUP, [5; 32], author(2))]
        {
            assert_eq!(open_grant(&group, &binding, &author, &sealed), Err(GrantError::Refused));
        }
        for at in (0..ENC_LEN).step_by(37).chain(ENC_LEN..sealed.len()) {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(open_grant(&GROUP, &[5; 32], &newcomer, &changed), Err(GrantError::Refused), "byte {at}");
        }
    }

    #[test]
    fn a_grant_of_too_many_epochs_or_to_a_malformed_key_is_not_made() {
        let many = vec![epochs().remove(0); MAX_EPOCHS + 1];
        let mut key = author(1).keys().kem;
        let made = seal_grant(&GROUP, &[5; 32], &key, &many, &mut rng(2));
        assert_eq!(made, Err(GrantError::TooManyEpochs { got: MAX_EPOCHS + 1 }));
        let most = seal_grant(&GROUP, &[5; 32], &key, &many[..MAX_EPOCHS], &mut rng(2)).expect("as many as allowed");
        assert_eq!(open_grant(&GROUP, &[5; 32], &author(1), &most).map(|epochs| epochs.len()), Ok(MAX_EPOCHS));
        key[..3].fill(0xff);
        assert_eq!(seal_grant(&GROUP, &[5; 32], &key, &[], &mut rng(2)), Err(GrantError::MalformedKey));
    }
}
