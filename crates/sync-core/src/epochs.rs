//! Which epochs the rotations of a group open.
//!
//! A rotation gives its own epoch to whoever has a slot, and names a secret for the epoch before.
//! The first is sound by the rotation's commitment; the second is only what the rotating member says, so it counts
//! where the epoch's own rotation is held and commits to it: a member could otherwise shut others out of an epoch by
//! being the first to hand them a wrong secret for it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use sync_crypto::rotation::Rotation;
use sync_crypto::{AuthorSecret, EpochSecret, open_rotation};
use sync_types::{Class, Envelope, EpochId, GroupId};

/// The epochs that rotation entries open and that are not `known` yet, for someone who is or was any of `authors`.
///
/// Entries that are no rotations are passed over.
#[must_use]
pub fn open_rotations(
    group: &GroupId,
    known: &[(EpochId, EpochSecret)],
    entries: &[Vec<u8>],
    authors: &[AuthorSecret],
) -> Vec<(EpochId, EpochSecret)> {
    let envelopes = entries.iter().filter_map(|bytes| Envelope::parse(bytes).ok());
    let payloads: Vec<&[u8]> = envelopes
        .filter(|envelope| envelope.header.class == Class::Rotation)
        .map(|envelope| envelope.payload())
        .collect();
    let rotations: BTreeMap<EpochId, (&[u8], Rotation<'_>)> = payloads
        .iter()
        .filter_map(|payload| Rotation::decode(payload).ok().map(|rotation| (rotation.epoch, (*payload, rotation))))
        .collect();
    let mut secrets: BTreeMap<EpochId, EpochSecret> =
        known.iter().map(|(epoch, secret)| (*epoch, secret.clone())).collect();
    let mut opened = Vec::new();
    // oldest first: with the epoch before known, a slot is found by its hint
    for (payload, rotation) in rotations.values() {
        if secrets.contains_key(&rotation.epoch) && secrets.contains_key(&rotation.before) {
            continue;
        }
        let before = secrets.get(&rotation.before).map(EpochSecret::derive_keys);
        let open = |before| authors.iter().find_map(|author| open_rotation(payload, group, author, before).ok());
        // without the hints too: they are only as true as what the rotating member says of the epoch before
        let Some(found) = before.as_ref().and_then(|before| open(Some(before))).or_else(|| open(None)) else {
            continue;
        };
        let sound = |(epoch, secret): &(EpochId, EpochSecret)| {
            rotations.get(epoch).is_some_and(|(_, rotation)| secret.matches(&rotation.commitment))
        };
        let own = (found.epoch, found.secret);
        for (epoch, secret) in found.before.filter(sound).into_iter().chain([own]) {
            if let Entry::Vacant(vacant) = secrets.entry(epoch) {
                vacant.insert(secret.clone());
                opened.push((epoch, secret));
            }
        }
    }
    opened
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use sync_crypto::author::SignPurpose;
    use sync_crypto::rotation::{Before, History, Made, make_rotation};
    use sync_types::{BlobId, Draft, EnvelopeHash, EnvelopeType, Header, Number, Timestamp};

    use super::*;

    const GROUP: GroupId = GroupId([1; 32]);
    const FIRST: EpochId = EpochId { number: 1, hash: [1; 32] };

    fn author(seed: u8) -> AuthorSecret {
        AuthorSecret::from_bytes(&[seed; 96])
    }

    fn rotate(seed: u8, epoch: EpochId, secret: &EpochSecret, recipients: &[&AuthorSecret]) -> Made {
        let keys: Vec<_> = recipients.iter().map(|author| author.keys()).collect();
        let before = Before { epoch, secret, history: History::Open };
        make_rotation(&GROUP, before, &keys, &mut ChaCha20Rng::from_seed([seed; 32])).expect("a rotation")
    }

    fn entry(made: &Made) -> Vec<u8> {
        let header = Header {
            kind: EnvelopeType::Push,
            sender: author(9).id(),
            group: GROUP,
            timestamp: Timestamp(1),
            nonce: [0; 24],
            blob_id: BlobId([0; 16]),
            number: Number(1),
            previous: EnvelopeHash::NONE,
            class: Class::Rotation,
            epoch: made.epoch,
            commitment: [0; 32],
        };
        let mut draft = Draft::new(&header, made.payload.len()).expect("a draft");
        draft.payload_mut().copy_from_slice(&made.payload);
        let signature = author(9).sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        draft.sign(&signature)
    }

    fn epochs(opened: &[(EpochId, EpochSecret)]) -> Vec<EpochId> {
        opened.iter().map(|(epoch, _)| *epoch).collect()
    }

    #[test]
    fn a_former_author_opens_and_the_chain_leads_to_the_epoch_before() {
        let (alice, former, bob) = (author(1), author(2), author(3));
        let first = EpochSecret::from_bytes([5; 32]);
        let second = rotate(1, FIRST, &first, &[&bob]);
        let third = rotate(2, second.epoch, &second.secret, &[&former, &bob]);
        let entries = [entry(&third), entry(&second)];
        let opened = open_rotations(&GROUP, &[(FIRST, first)], &entries, &[alice, former]);
        assert_eq!(epochs(&opened), vec![second.epoch, third.epoch]);
        assert!(opened[0].1.matches(&second.secret.commitment()));
    }

    #[test]
    fn a_chain_cannot_say_what_another_epoch_is() {
        let (alice, bob) = (author(1), author(2));
        let first = EpochSecret::from_bytes([5; 32]);
        let known = [(FIRST, first.clone())];
        let second = rotate(1, FIRST, &first, &[&alice, &bob]);
        let lie = rotate(2, second.epoch, &EpochSecret::from_bytes([6; 32]), &[&alice]);
        // whether the true rotation is there or not yet
        let early = open_rotations(&GROUP, &known, &[entry(&lie)], std::slice::from_ref(&alice));
        assert_eq!(epochs(&early), vec![lie.epoch]);
        let late = open_rotations(&GROUP, &known, &[entry(&lie), entry(&second)], &[alice]);
        assert_eq!(epochs(&late), vec![second.epoch, lie.epoch]);
        assert!(late[0].1.matches(&second.secret.commitment()));
    }
}
