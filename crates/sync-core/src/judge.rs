//! Judges arriving envelopes: which count, which are known, which are refused, and where a feed forks.
//!
//! An envelope counts if its sender is admitted and its own signature verifies or a valid later envelope's chain reaches it.
//! A contiguous run therefore costs one signature check and a hash per entry.
//! One that is refused because nothing vouches for it yet leaves a gap, and is asked for again.
//!
//! Of who was removed, sealed envelopes count up to where the removal says.
//! Its operations and rotations are taken all the same, since they are what others may name or may have sealed with;
//! what they are worth is for [`Membership`] to say.

use std::collections::HashMap;

use sync_crypto::author::{SignPurpose, verify};
use sync_types::{AuthorId, Class, Envelope, EnvelopeHash, FormatError, GroupId, GroupKind, Number};

use crate::membership::{Belonging, Membership, MembershipError};

/// What is stored at a number of a feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldEnvelope {
    /// The envelope's hash.
    pub hash: EnvelopeHash,
    /// The hash it names as its previous one; none where the envelope was dropped.
    pub previous: Option<EnvelopeHash>,
}

/// What a judge needs to know about what is stored.
pub trait Held {
    /// Why it could not be read.
    type Error;

    /// The highest number stored of a feed.
    fn highest(&mut self, author: &AuthorId) -> Result<Option<Number>, Self::Error>;

    /// Everything stored at a number, more than one at a fork.
    fn at(&mut self, author: &AuthorId, number: Number) -> Result<Vec<HeldEnvelope>, Self::Error>;

    /// Whether a sealed envelope at a number is not wanted any more, since a snapshot that is here covers it.
    fn is_dropped(&mut self, author: &AuthorId, number: Number) -> Result<bool, Self::Error>;
}

/// Why an envelope is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The bytes are no envelope.
    #[error("not an envelope: {0}")]
    Malformed(#[from] FormatError),
    /// It belongs to another group.
    #[error("envelope of another group {0:?}")]
    WrongGroup(GroupId),
    /// Neither its own signature nor a later envelope vouches for it.
    #[error("signature of envelope {number} by {author:?} does not verify")]
    Unsigned {
        /// The author it names.
        author: AuthorId,
        /// Its number.
        number: Number,
    },
    /// Its sender does not belong to the group.
    #[error("author {0:?} is not admitted")]
    NotAdmitted(AuthorId),
    /// The founder of a passphrase group is everyone who knows the passphrase: its feed stays empty.
    #[error("envelope in the founder's feed of a passphrase group")]
    FoundersFeed,
    /// Its sender was removed, and what it sealed counts no further than the removal says.
    #[error("author {author:?} was removed, and its envelope {number} does not count")]
    Removed {
        /// The author.
        author: AuthorId,
        /// The envelope's number.
        number: Number,
    },
    /// A membership envelope that is none.
    #[error(transparent)]
    Membership(#[from] MembershipError),
}

/// An envelope that counts.
#[derive(Debug)]
pub struct Accepted<'a> {
    /// The envelope.
    pub envelope: Envelope<'a>,
    /// Its hash.
    pub hash: EnvelopeHash,
    /// The lowest number that it shows to have two hashes.
    pub fork: Option<Number>,
}

/// The verdict on a batch.
#[derive(Debug, Default)]
pub struct Judged<'a> {
    /// New envelopes that count, in the order of the batch.
    pub accepted: Vec<Accepted<'a>>,
    /// Envelopes that are stored already.
    pub duplicates: usize,
    /// Refused envelopes by their index in the batch.
    pub refused: Vec<(usize, Refusal)>,
}

/// What is to be stored of a batch.
#[derive(Debug, Default)]
pub struct Storable<'a> {
    /// What counts: operations first, otherwise in the order of the batch.
    pub accepted: Vec<Accepted<'a>>,
    /// Envelopes that are stored already.
    pub duplicates: usize,
    /// Refused envelopes by their index in the batch.
    pub refused: Vec<(usize, Refusal)>,
    /// The membership took in an operation that is not stored: it is to be built anew from what is.
    pub membership_ahead: bool,
}

impl<'a> Judged<'a> {
    /// What a store takes whose numbers end at `last`.
    ///
    /// Operations come first: whoever reads along by cursor meets an author's admission before its entries.
    #[must_use]
    pub fn storable(self, batch: &[Vec<u8>], last: Number) -> Storable<'a> {
        let mut storable = Storable { duplicates: self.duplicates, refused: self.refused, ..Storable::default() };
        let (operations, others): (Vec<_>, Vec<_>) =
            self.accepted.into_iter().partition(|accepted| accepted.envelope.header.class == Class::Membership);
        for accepted in operations.into_iter().chain(others) {
            let header = &accepted.envelope.header;
            if header.number <= last {
                storable.accepted.push(accepted);
                continue;
            }
            storable.membership_ahead |= header.class == Class::Membership;
            let index = batch.iter().position(|bytes| std::ptr::eq(bytes.as_slice(), accepted.envelope.bytes()));
            let refusal = FormatError::Malformed { field: "number" }.into();
            storable.refused.push((index.unwrap_or(batch.len()), refusal));
        }
        storable.refused.sort_by_key(|(index, _)| *index);
        storable
    }
}

struct Candidate<'a> {
    index: usize,
    envelope: Envelope<'a>,
    hash: EnvelopeHash,
    valid: Option<bool>,
}

struct Batch<'a, 'h, H> {
    candidates: Vec<Candidate<'a>>,
    places: HashMap<(AuthorId, Number), Vec<usize>>,
    held: &'h mut H,
    highest: HashMap<AuthorId, Option<Number>>,
}

/// Who a batch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From who belongs to the group, or from this device.
    Member,
    /// From who has yet to show that it belongs: nothing is taken of what does not count, so that a removed member
    /// leaves nothing.
    Unproven,
}

/// Judges a batch against what is stored, and lets `membership` take in the operations among it.
pub fn judge<'a, H: Held>(
    group: &GroupId,
    membership: &mut Membership,
    held: &mut H,
    origin: Origin,
    batch: &'a [Vec<u8>],
) -> Result<Judged<'a>, H::Error> {
    let mut judged = Judged::default();
    let mut work = Batch { candidates: Vec::new(), places: HashMap::new(), held, highest: HashMap::new() };
    let charter = membership.charter();
    let nobodys = (charter.kind == GroupKind::Passphrase).then_some(charter.founder.verify);
    for (index, bytes) in batch.iter().enumerate() {
        match Envelope::parse(bytes) {
            Ok(envelope) if nobodys == Some(envelope.header.sender) => {
                judged.refused.push((index, Refusal::FoundersFeed));
            }
            Err(error) => judged.refused.push((index, error.into())),
            Ok(envelope) if envelope.header.group != *group => {
                judged.refused.push((index, Refusal::WrongGroup(envelope.header.group)));
            }
            Ok(envelope) => judged.duplicates += usize::from(!work.add(index, envelope)?),
        }
    }
    let mut verdicts = vec![None; work.candidates.len()];
    work.judge_membership(membership, origin, &mut verdicts)?;
    for (at, verdict) in verdicts.iter_mut().enumerate() {
        if verdict.is_none() {
            *verdict = Some(work.judge_content(at, membership)?);
        }
    }
    work.finish(verdicts, judged)
}

type Verdict = Result<(), Refusal>;

impl<'a, H: Held> Batch<'a, '_, H> {
    /// Takes in an envelope unless it is known.
    fn add(&mut self, index: usize, envelope: Envelope<'a>) -> Result<bool, H::Error> {
        let hash = envelope.hash();
        let place = (envelope.header.sender, envelope.header.number);
        let twice = self.places.get(&place).is_some_and(|at| at.iter().any(|&at| self.candidates[at].hash == hash));
        let stored = if twice { Vec::new() } else { self.stored(place.0, place.1)? };
        if twice || stored.iter().any(|stored| stored.hash == hash) {
            return Ok(false);
        }
        // without a hash to compare with it can only be what was dropped; operations are never dropped
        if stored.is_empty() && envelope.header.class == Class::Sealed && self.held.is_dropped(&place.0, place.1)? {
            return Ok(false);
        }
        self.places.entry(place).or_default().push(self.candidates.len());
        self.candidates.push(Candidate { index, envelope, hash, valid: None });
        Ok(true)
    }

    /// What is stored at a number; above the highest the store is not asked.
    fn stored(&mut self, author: AuthorId, number: Number) -> Result<Vec<HeldEnvelope>, H::Error> {
        let highest = match self.highest.get(&author) {
            Some(known) => *known,
            None => {
                let highest = self.held.highest(&author)?;
                self.highest.insert(author, highest);
                highest
            }
        };
        if highest.is_none_or(|highest| number > highest) {
            return Ok(Vec::new());
        }
        self.held.at(&author, number)
    }

    /// Operations first, again and again while they admit someone, so that their order in the batch does not matter.
    fn judge_membership(
        &mut self,
        membership: &mut Membership,
        origin: Origin,
        verdicts: &mut [Option<Verdict>],
    ) -> Result<(), H::Error> {
        loop {
            let mut progress = false;
            for (at, verdict) in verdicts.iter_mut().enumerate() {
                if self.candidates[at].envelope.header.class != Class::Membership || matches!(verdict, Some(Ok(()))) {
                    continue;
                }
                *verdict = Some(match membership.examine(&self.candidates[at].envelope) {
                    Err(MembershipError::NotAdmitted(author)) => Err(Refusal::NotAdmitted(author)),
                    Err(error) => Err(error.into()),
                    Ok(signed)
                        if origin == Origin::Unproven
                            && !membership.would_count(&self.candidates[at].envelope, &signed) =>
                    {
                        Err(self.removed(at))
                    }
                    Ok(_) if !self.valid(at)? => Err(self.unsigned(at)),
                    Ok(_) => {
                        progress = true;
                        membership.apply(&self.candidates[at].envelope).map(|_| ()).map_err(Refusal::from)
                    }
                });
            }
            if !progress {
                return Ok(());
            }
        }
    }

    fn judge_content(&mut self, at: usize, membership: &Membership) -> Result<Verdict, H::Error> {
        let Candidate { envelope, hash, .. } = &self.candidates[at];
        let (sender, number) = (envelope.header.sender, envelope.header.number);
        match membership.belonging(&sender) {
            Belonging::Never => return Ok(Err(Refusal::NotAdmitted(sender))),
            Belonging::Until(end)
                if envelope.header.class == Class::Sealed
                    && (number > end.number || (number == end.number && *hash != end.hash)) =>
            {
                return Ok(Err(self.removed(at)));
            }
            Belonging::Until(_) | Belonging::Belongs => {}
        }
        Ok(if self.valid(at)? { Ok(()) } else { Err(self.unsigned(at)) })
    }

    fn removed(&self, at: usize) -> Refusal {
        let header = &self.candidates[at].envelope.header;
        Refusal::Removed { author: header.sender, number: header.number }
    }

    fn unsigned(&self, at: usize) -> Refusal {
        let header = &self.candidates[at].envelope.header;
        Refusal::Unsigned { author: header.sender, number: header.number }
    }

    /// Whether a valid later envelope or its own signature vouches for an envelope.
    fn valid(&mut self, at: usize) -> Result<bool, H::Error> {
        // follow the chain upwards through the batch until something is known, then settle it downwards
        let mut chain = vec![at];
        let mut vouched = loop {
            let top = *chain.last().expect("BUG: the chain starts with one");
            if let Some(valid) = self.candidates[top].valid {
                chain.pop();
                break valid;
            }
            match self.successor(top) {
                Some(next) => chain.push(next),
                None => break false,
            }
        };
        for at in chain.into_iter().rev() {
            vouched = vouched || self.vouched_by_stored(at)? || self.signature_verifies(at);
            self.candidates[at].valid = Some(vouched);
        }
        Ok(vouched)
    }

    /// An envelope of the batch that names this one as its previous.
    fn successor(&self, at: usize) -> Option<usize> {
        let Candidate { envelope, hash, .. } = &self.candidates[at];
        let next = envelope.header.number.next()?;
        let places = self.places.get(&(envelope.header.sender, next))?;
        let follows = |&&at: &&usize| self.candidates[at].envelope.header.previous == *hash;
        let followers = || places.iter().filter(follows);
        // of several the one known to be valid, so that a forged follower cannot hide a true one
        followers().find(|&&at| self.candidates[at].valid == Some(true)).or_else(|| followers().next()).copied()
    }

    fn vouched_by_stored(&mut self, at: usize) -> Result<bool, H::Error> {
        let Candidate { envelope, hash, .. } = &self.candidates[at];
        let (sender, hash) = (envelope.header.sender, *hash);
        let Some(next) = envelope.header.number.next() else { return Ok(false) };
        Ok(self.stored(sender, next)?.iter().any(|stored| stored.previous == Some(hash)))
    }

    fn signature_verifies(&self, at: usize) -> bool {
        let envelope = &self.candidates[at].envelope;
        verify(&envelope.header.sender, SignPurpose::Envelope, &[envelope.signed_bytes()], envelope.signature())
    }

    fn finish(mut self, verdicts: Vec<Option<Verdict>>, mut judged: Judged<'a>) -> Result<Judged<'a>, H::Error> {
        let verdicts: Vec<Verdict> = verdicts.into_iter().map(|v| v.expect("BUG: every candidate is judged")).collect();
        let mut forks = Vec::with_capacity(verdicts.len());
        for (at, verdict) in verdicts.iter().enumerate() {
            forks.push(if verdict.is_ok() { self.fork(at, &verdicts)? } else { None });
        }
        for ((candidate, verdict), fork) in self.candidates.into_iter().zip(verdicts).zip(forks) {
            let Candidate { index, envelope, hash, .. } = candidate;
            match verdict {
                Ok(()) => judged.accepted.push(Accepted { envelope, hash, fork }),
                Err(refusal) => judged.refused.push((index, refusal)),
            }
        }
        judged.refused.sort_by_key(|(index, _)| *index);
        Ok(judged)
    }

    /// The lowest number that an accepted envelope shows to have two hashes.
    fn fork(&mut self, at: usize, verdicts: &[Verdict]) -> Result<Option<Number>, H::Error> {
        let Candidate { envelope, hash, .. } = &self.candidates[at];
        let (sender, number, previous, hash) =
            (envelope.header.sender, envelope.header.number, envelope.header.previous, *hash);
        let beside = self.known_at(sender, number, verdicts)?;
        if let Some(before) = number.previous() {
            let known = self.known_at(sender, before, verdicts)?;
            let apart = !known.is_empty() && known.iter().all(|known| known.hash != previous);
            if apart || beside.iter().any(|beside| beside.previous.is_some_and(|other| other != previous)) {
                return Ok(Some(before));
            }
        }
        if beside.iter().any(|beside| beside.hash != hash) {
            return Ok(Some(number));
        }
        if let Some(next) = number.next() {
            let known = self.known_at(sender, next, verdicts)?;
            if known.iter().any(|known| known.previous.is_some_and(|previous| previous != hash)) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// Everything stored or accepted at a number.
    fn known_at(
        &mut self,
        author: AuthorId,
        number: Number,
        verdicts: &[Verdict],
    ) -> Result<Vec<HeldEnvelope>, H::Error> {
        let mut known = self.stored(author, number)?;
        let places = self.places.get(&(author, number)).map_or(&[][..], Vec::as_slice);
        known.extend(places.iter().filter(|&&at| verdicts[at].is_ok()).map(|&at| {
            let Candidate { envelope, hash, .. } = &self.candidates[at];
            HeldEnvelope { hash: *hash, previous: Some(envelope.header.previous) }
        }));
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::convert::Infallible;

    use proptest::prelude::*;
    use sync_crypto::AuthorSecret;
    use sync_types::{BlobId, Charter, Chunker, Draft, EnvelopeType, EpochId, Header, Quorum, Timestamp};

    use super::*;

    fn author() -> AuthorSecret {
        AuthorSecret::from_bytes(&[7; 96])
    }

    fn charter() -> Vec<u8> {
        let quorum = Quorum::default();
        let (founder, chunker) = (author().keys(), Chunker::default());
        Charter { kind: GroupKind::Random, founder, quorum, suite: 1, chunker, nonce: [1; 32], commitment: [0; 32] }
            .encode()
    }

    fn entry(number: u64, previous: EnvelopeHash, content: u8) -> Vec<u8> {
        let header = Header {
            kind: EnvelopeType::Push,
            sender: author().id(),
            group: GroupId::of(&charter()),
            timestamp: Timestamp(1),
            nonce: [0; 24],
            blob_id: BlobId([content; 16]),
            number: Number(number),
            previous,
            class: Class::Sealed,
            epoch: EpochId { number: 1, hash: [1; 32] },
            commitment: [1; 32],
        };
        let draft = Draft::new(&header, 1).expect("a draft");
        let signature = author().sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        draft.sign(&signature)
    }

    fn hash(bytes: &[u8]) -> EnvelopeHash {
        Envelope::parse(bytes).expect("an envelope").hash()
    }

    /// What is stored of the one author's feed.
    #[derive(Default)]
    struct Log(BTreeMap<Number, Vec<HeldEnvelope>>, Option<Number>);

    impl Held for Log {
        type Error = Infallible;

        fn highest(&mut self, _: &AuthorId) -> Result<Option<Number>, Infallible> {
            Ok(self.0.keys().next_back().copied())
        }

        fn at(&mut self, _: &AuthorId, number: Number) -> Result<Vec<HeldEnvelope>, Infallible> {
            Ok(self.0.get(&number).cloned().unwrap_or_default())
        }

        fn is_dropped(&mut self, _: &AuthorId, number: Number) -> Result<bool, Infallible> {
            Ok(self.1.is_some_and(|last| number <= last))
        }
    }

    /// The lowest number at which envelopes show a fork that arrive in these batches.
    fn fork(batches: &[&[Vec<u8>]]) -> Option<u64> {
        let mut membership = Membership::new(&charter()).expect("a charter");
        let mut log = Log::default();
        let mut lowest: Option<Number> = None;
        for batch in batches {
            let judged =
                judge(&GroupId::of(&charter()), &mut membership, &mut log, Origin::Member, batch).expect("infallible");
            assert_eq!(judged.accepted.len(), batch.len(), "{judged:?}");
            for Accepted { envelope, hash, fork } in judged.accepted {
                let held = HeldEnvelope { hash, previous: Some(envelope.header.previous) };
                log.0.entry(envelope.header.number).or_default().push(held);
                lowest = [lowest, fork].into_iter().flatten().min();
            }
        }
        lowest.map(|number| number.0)
    }

    /// Two entries with nothing known around them, one by one in both orders and together.
    fn forks(one: &[u8], other: &[u8]) -> [Option<u64>; 3] {
        let (one, other) = ([one.to_vec()], [other.to_vec()]);
        let together = [one.clone(), other.clone()].concat();
        [fork(&[&one, &other]), fork(&[&other, &one]), fork(&[&together])]
    }

    #[test]
    fn two_entries_of_a_number_that_follow_different_ones_show_a_fork_one_below() {
        let (one, other) = (entry(5, EnvelopeHash([1; 32]), 1), entry(5, EnvelopeHash([2; 32]), 2));
        assert_eq!(forks(&one, &other), [Some(4); 3]);
    }

    #[test]
    fn two_entries_of_a_number_that_follow_the_same_one_show_a_fork_at_it() {
        let (one, other) = (entry(5, EnvelopeHash([1; 32]), 1), entry(5, EnvelopeHash([1; 32]), 2));
        assert_eq!(forks(&one, &other), [Some(5); 3]);
        let first = entry(1, EnvelopeHash::NONE, 1);
        assert_eq!(forks(&first, &entry(1, EnvelopeHash::NONE, 2)), [Some(1); 3]);
        assert_eq!(forks(&first, &entry(2, hash(&first), 2)), [None; 3]);
    }

    #[test]
    fn what_was_dropped_is_not_taken_again_and_what_follows_it_is() {
        let mut entries = vec![entry(1, EnvelopeHash::NONE, 1)];
        for number in 2..=5 {
            let previous = hash(&entries[entries.len() - 1]);
            entries.push(entry(number, previous, 1));
        }
        let mut membership = Membership::new(&charter()).expect("a charter");
        // 1 to 3 are gone, and of them only the last one's hash is known
        let known = HeldEnvelope { hash: hash(&entries[2]), previous: None };
        let mut log = Log([(Number(3), vec![known])].into_iter().collect(), Some(Number(3)));
        let judged =
            judge(&GroupId::of(&charter()), &mut membership, &mut log, Origin::Member, &entries).expect("infallible");
        let accepted: Vec<_> = judged.accepted.iter().map(|accepted| accepted.envelope.header.number.0).collect();
        assert_eq!((accepted, judged.duplicates), (vec![4, 5], 3));
        assert!(judged.accepted.iter().all(|accepted| accepted.fork.is_none()));
        let other = [entry(3, hash(&entries[1]), 2), entry(4, EnvelopeHash([9; 32]), 2)];
        for (entry, fork) in other.iter().zip([3, 3]) {
            let batch = [entry.clone()];
            let judged =
                judge(&GroupId::of(&charter()), &mut membership, &mut log, Origin::Member, &batch).expect("infallible");
            assert_eq!(judged.accepted.first().and_then(|accepted| accepted.fork), Some(Number(fork)));
        }
    }

    /// Two branches of six entries, which part at a number.
    fn branches(part: u64) -> Vec<Vec<u8>> {
        let mut entries: Vec<Vec<u8>> = Vec::new();
        for branch in [1, 2] {
            let mut previous = EnvelopeHash::NONE;
            for number in 1..=6 {
                let bytes = entry(number, previous, if number < part { 0 } else { branch });
                previous = hash(&bytes);
                if !entries.contains(&bytes) {
                    entries.push(bytes);
                }
            }
        }
        entries
    }

    /// The lowest number with two hashes: those of what stands there, and those that what stands above names.
    fn known_twice(entries: &[Vec<u8>]) -> Option<u64> {
        let mut known: BTreeMap<u64, BTreeSet<EnvelopeHash>> = BTreeMap::new();
        for bytes in entries {
            let envelope = Envelope::parse(bytes).expect("an envelope");
            known.entry(envelope.header.number.0).or_default().insert(envelope.hash());
            if let Some(before) = envelope.header.number.previous() {
                known.entry(before.0).or_default().insert(envelope.header.previous);
            }
        }
        known.into_iter().find(|(_, hashes)| hashes.len() > 1).map(|(number, _)| number)
    }

    fn arrivals() -> impl Strategy<Value = (Vec<Vec<u8>>, usize)> {
        (1u64..=6).prop_flat_map(|part| {
            let all = branches(part);
            let some = proptest::sample::subsequence(all.clone(), 0..=all.len());
            (some.prop_shuffle(), 1usize..=4)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn where_a_feed_forks_does_not_hang_on_the_order_of_arrival((entries, at_once) in arrivals()) {
            let batches: Vec<&[Vec<u8>]> = entries.chunks(at_once).collect();
            prop_assert_eq!(fork(&batches), known_twice(&entries));
        }
    }
}
