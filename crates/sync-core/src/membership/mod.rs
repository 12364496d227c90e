//! Who belongs to a group: a pure function of its charter and a set of signed operations, whatever their order.
//!
//! Which operations are stored depends on admissions alone, removed or not, so that everyone comes to hold the same.
//! Who belongs is what they lead to: an operation counts when its sender is admitted, may do what it does, and was not
//! removed by somebody who had not seen it.
//!
//! Each admission gives its author a standing, a role and a member; what justifies an operation is one standing of its
//! sender and never a mixture.
//! So whatever counts has a chain of admissions from the founder that shows it alone: a token.

mod removal;
mod roster;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use sync_crypto::author::{SignPurpose, verify};
use sync_crypto::pairing::verify_consent;
use sync_types::bounds::{MAX_SEEN, MAX_TOKEN};
use sync_types::{
    AuthorId, AuthorKeys, Charter, Class, Cut, Envelope, EnvelopeHash, EpochId, FormatError, GroupId, GroupKind,
    InviteId, MemberId, Number, Operation, Role, SignedOperation, Timestamp, succession_statement,
};

pub use removal::PendingRemoval;
use removal::{Log, Verdict};
use roster::{Admission, Op, Past, Place, Removal, Roster, Standing};

/// An author that belongs to the group.
#[derive(Debug, Clone)]
pub struct Admitted {
    /// Its public keys.
    pub keys: AuthorKeys,
    /// Whose it is.
    pub member: MemberId,
    /// What its member may do.
    pub role: Role,
    /// The invite it answered.
    pub invite: Option<InviteId>,
    /// Who admitted or preceded it; none for the founder.
    pub by: Option<AuthorId>,
    /// Hash of the envelope that admitted it.
    hash: EnvelopeHash,
    /// The founder's place, which nobody gave it.
    root: Option<Place>,
    /// Every admission of it that counts: nobody can take another's place away by admitting it again.
    admissions: BTreeMap<Standing, Admission>,
}

impl Admitted {
    /// Whether some admission counts it to a member.
    #[must_use]
    pub fn belongs_to(&self, member: &MemberId) -> bool {
        self.places().any(|place| place.member == *member)
    }

    /// Whether it is what it is shown as by going on from another author.
    #[must_use]
    pub fn succeeds(&self) -> bool {
        let shown = |(standing, admission): (&Standing, &Admission)| standing.succeeds && admission.hash == self.hash;
        self.admissions.iter().any(shown)
    }

    /// Every member that some admission counts it to.
    pub fn members(&self) -> impl Iterator<Item = MemberId> {
        self.places().map(|place| place.member)
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        self.root.into_iter().chain(self.admissions.keys().map(|standing| standing.place))
    }

    /// Who let it in as what it is shown as, and by which envelope.
    fn admitted_by(&self) -> Option<(AuthorId, EnvelopeHash)> {
        self.by.map(|by| (by, self.hash))
    }
}

/// An invite as membership entries tell it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Invited {
    /// Who made it.
    pub by: AuthorId,
    /// Proves knowledge of the code.
    pub verifier: [u8; 32],
    /// Role the newcomer gets.
    pub role: Role,
    /// The member whose further device is invited.
    pub member: Option<MemberId>,
    /// When it ends.
    pub expires: Timestamp,
}

/// What an author's envelopes are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Belonging {
    /// It belongs to the group.
    Belongs,
    /// It did, and its sealed envelopes count up to this one.
    Until(Cut),
    /// It never did.
    Never,
}

/// Why a membership envelope is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// The payload is not an operation.
    #[error("not a membership operation: {0}")]
    Malformed(#[from] FormatError),
    /// The sender does not belong to the group.
    #[error("sender {0:?} is not admitted")]
    NotAdmitted(AuthorId),
    /// A succession that is another's, or that its predecessor never signed.
    #[error("succession of {0:?} is not signed by its predecessor")]
    SuccessionForged(AuthorId),
    /// An admission under keys that the author did not sign.
    #[error("admission of {0:?} is not signed by it")]
    AdmissionForged(AuthorId),
}

/// A group's membership.
#[derive(Debug, Clone)]
pub struct Membership {
    group: GroupId,
    charter: Arc<Charter>,
    /// Who was ever let in: whose operations are stored.
    ever: Roster,
    ops: BTreeMap<EnvelopeHash, Arc<Op>>,
    /// The operations in the order they came.
    order: Vec<Arc<Op>>,
    /// Operations some of whose past is not here, by the hash that lacks.
    lacking: BTreeMap<EnvelopeHash, Vec<EnvelopeHash>>,
    /// How many hashes lack of those that an operation names.
    incomplete: BTreeMap<EnvelopeHash, usize>,
    /// Named as seen by some operation.
    named: BTreeSet<EnvelopeHash>,
    tips: BTreeSet<EnvelopeHash>,
    /// The last operation of each author, which its next one names.
    latest: BTreeMap<AuthorId, (Number, EnvelopeHash)>,
    /// Removals that pass in the past they name.
    verdicts: BTreeMap<EnvelopeHash, Verdict>,
    /// Who belongs, once somebody asks; unused while there are no removals.
    now: OnceLock<Arc<Now>>,
}

/// What removals leave.
#[derive(Debug)]
struct Now {
    /// Who is let in, with those whom removals took out again.
    counted: Roster,
    living: BTreeMap<AuthorId, Admitted>,
    ends: Arc<BTreeMap<AuthorId, Cut>>,
    pending: Vec<PendingRemoval>,
}

impl Membership {
    /// The membership of a group nobody was admitted to yet.
    pub fn new(charter: &[u8]) -> Result<Self, FormatError> {
        let decoded = Charter::decode(charter)?;
        Ok(Self {
            group: GroupId::of(charter),
            ever: Roster::new(&decoded, Arc::from([])),
            charter: Arc::new(decoded),
            ops: BTreeMap::new(),
            order: Vec::new(),
            lacking: BTreeMap::new(),
            incomplete: BTreeMap::new(),
            named: BTreeSet::new(),
            tips: BTreeSet::new(),
            latest: BTreeMap::new(),
            verdicts: BTreeMap::new(),
            now: OnceLock::new(),
        })
    }

    /// The group.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The charter.
    #[must_use]
    pub fn charter(&self) -> &Charter {
        &self.charter
    }

    /// Whether an author belongs to the group.
    #[must_use]
    pub fn is_admitted(&self, author: &AuthorId) -> bool {
        self.living().contains_key(author)
    }

    /// Whether an author belongs to the group or ever did.
    #[must_use]
    pub fn was_admitted(&self, author: &AuthorId) -> bool {
        self.ever.authors.contains_key(author)
    }

    /// An author that belongs to the group.
    #[must_use]
    pub fn author(&self, author: &AuthorId) -> Option<&Admitted> {
        self.living().get(author)
    }

    /// Every author that belongs to the group.
    pub fn authors(&self) -> impl Iterator<Item = (&AuthorId, &Admitted)> {
        self.living().iter()
    }

    /// The members of the group.
    #[must_use]
    pub fn members(&self) -> BTreeSet<MemberId> {
        self.authors().flat_map(|(_, admitted)| admitted.members()).collect()
    }

    /// What an author's sealed envelopes are worth.
    #[must_use]
    pub fn belonging(&self, author: &AuthorId) -> Belonging {
        if self.is_admitted(author) {
            return Belonging::Belongs;
        }
        self.now().and_then(|now| now.ends.get(author)).map_or(Belonging::Never, |end| Belonging::Until(*end))
    }

    /// Where the feeds of those end who do not belong any more.
    #[must_use]
    pub fn ends(&self) -> Arc<BTreeMap<AuthorId, Cut>> {
        self.now().map(|now| now.ends.clone()).unwrap_or_default()
    }

    /// Removals that wait for signatures of other members.
    #[must_use]
    pub fn pending_removals(&self) -> &[PendingRemoval] {
        self.now().map_or(&[], |now| &now.pending)
    }

    /// An invite, unless it was never made.
    #[must_use]
    pub fn invite(&self, id: &InviteId) -> Option<&Invited> {
        self.counted().invites.get(id)
    }

    /// Whether an invite was taken back.
    #[must_use]
    pub fn is_revoked(&self, id: &InviteId) -> bool {
        self.counted().revoked.contains(id)
    }

    /// The author an invite admitted.
    #[must_use]
    pub fn used_by(&self, id: &InviteId) -> Option<AuthorId> {
        self.counted().used.get(id).copied()
    }

    /// What an operation has seen that an author makes now: its own last one, and the tips as far as [`MAX_SEEN`] allows.
    #[must_use]
    pub fn seen_by(&self, author: &AuthorId) -> Vec<EnvelopeHash> {
        let own = self.latest.get(author).map(|(_, hash)| *hash);
        let others = self.tips.iter().copied().filter(|tip| Some(*tip) != own);
        own.into_iter().chain(others).take(MAX_SEEN).collect()
    }

    /// Who can open an epoch that may be sealed in: the authors for whom its rotation has a slot. None if it may not be.
    ///
    /// It may be if somebody who may made it and had seen every removal that counts, and if every author that belongs had
    /// a slot or was let in by somebody who knew the epoch. The first epoch may be as long as nobody was removed.
    ///
    /// `by` is who wrote the rotation: nobody else can say what its maker had seen.
    #[must_use]
    pub fn may_seal_in(&self, epoch: &EpochId, by: &AuthorId) -> Option<Vec<AuthorId>> {
        if epoch.number <= 1 {
            return self.counted().removals.is_empty().then(Vec::new);
        }
        if self.charter.kind == GroupKind::Passphrase {
            return None;
        }
        let made =
            |op: &&Arc<Op>| op.sender == *by && matches!(&op.operation, Operation::Rotate { epoch: of } if of == epoch);
        // of several the first: what it saw later its rotation did not know
        self.reached_by(self.order.iter().filter(made).min_by_key(|op| (op.number, op.hash))?)
    }

    /// Who had a slot in a rotation that may be sealed in.
    fn reached_by(&self, op: &Op) -> Option<Vec<AuthorId>> {
        if self.incomplete.contains_key(&op.hash) {
            return None;
        }
        let counted = self.counted();
        let past = self.past(op);
        let may = counted.places_for(&op.sender, &op.hash).iter().any(|place| place.role.may_rotate());
        if !may || !counted.removals.iter().all(|removal| past.contains(&removal.hash)) {
            return None;
        }
        let then = self.log().within(&past).settled();
        let reached: Vec<AuthorId> =
            then.authors.iter().filter_map(|(id, admitted)| then.left(id, admitted).map(|_| *id)).collect();
        let sound = reached.iter().all(|author| self.is_admitted(author));
        (sound && self.living().keys().all(|author| self.can_open(author, op, &reached))).then_some(reached)
    }

    /// Whether an author has a rotation's epoch: by a slot, from who let it in, or from the author it succeeds.
    fn can_open(&self, author: &AuthorId, rotation: &Op, reached: &[AuthorId]) -> bool {
        let (mut next, mut passed) = (vec![*author], BTreeSet::new());
        while let Some(at) = next.pop() {
            if reached.contains(&at) {
                return true;
            }
            let admissions = self.ever.authors.get(&at).into_iter().flat_map(|admitted| &admitted.admissions);
            for (standing, admission) in admissions {
                let knew = |op: &Arc<Op>| !standing.succeeds && self.past(op).contains(&rotation.hash);
                if self.ops.get(&admission.hash).is_some_and(knew) {
                    return true;
                }
                if standing.succeeds && passed.insert(standing.by) {
                    next.push(standing.by);
                }
            }
        }
        false
    }

    /// The envelopes of a shortest way from the founder to an author, founder's side first; none if it is too long.
    ///
    /// Each counts by the one before alone, whatever else is known: an author that was let in twice may have the right to
    /// let others in from one of the two.
    #[must_use]
    pub fn token(&self, author: &AuthorId) -> Option<Vec<Vec<u8>>> {
        let counted = self.counted();
        let mut let_in: BTreeMap<AuthorId, Vec<(AuthorId, &Standing, &Admission)>> = BTreeMap::new();
        for (id, admitted) in &counted.authors {
            for (standing, admission) in &admitted.admissions {
                let_in.entry(standing.by).or_default().push((*id, standing, admission));
            }
        }
        let founder = self.charter.founder.verify;
        let start = (founder, counted.authors.get(&founder)?.places().next()?);
        // breadth first, so that an author is first reached over the fewest admissions
        let mut reached = BTreeMap::from([(start, None)]);
        let mut tier = vec![start];
        for _ in 0..=MAX_TOKEN {
            if let Some(end) = tier.iter().filter(|(id, _)| id == author).min() {
                return Some(chain_to(*end, &reached));
            }
            let mut next = Vec::new();
            for at in tier {
                for (id, standing, admission) in let_in.get(&at.0).into_iter().flatten() {
                    let place = standing.place;
                    let counts = if standing.succeeds { place == at.1 } else { at.1.may_admit(id, &place) };
                    if counts && !reached.contains_key(&(*id, place)) {
                        reached.insert((*id, place), Some((at, *admission)));
                        next.push((*id, place));
                    }
                }
            }
            tier = next;
        }
        None
    }

    /// Whether an envelope may be looked at: its sender is or was admitted, or it succeeds one who is or was.
    ///
    /// The proofs of successions and admissions are checked here; the envelope's own signature is the caller's business.
    pub fn examine(&self, envelope: &Envelope<'_>) -> Result<SignedOperation, MembershipError> {
        let sender = envelope.header.sender;
        let signed = SignedOperation::decode(envelope.payload())?;
        let Operation::Succeed { keys, member, predecessor, proof } = &signed.operation else {
            if !self.was_admitted(&sender) {
                return Err(MembershipError::NotAdmitted(sender));
            }
            return match &signed.operation {
                Operation::Admit { keys, invite, consent, .. } if !verify_consent(keys, *invite, consent) => {
                    Err(MembershipError::AdmissionForged(keys.verify))
                }
                _ => Ok(signed),
            };
        };
        // also of one who belongs already: it could make anyone anyone's successor
        let own = keys.verify == sender && envelope.header.number == Number(1);
        let statement = succession_statement(keys, *member);
        if !own || !verify(predecessor, SignPurpose::Succession, &[&self.group.0, &statement], proof) {
            return Err(MembershipError::SuccessionForged(sender));
        }
        let succeeds = self.ever.authors.get(predecessor).is_some_and(|before| before.belongs_to(member));
        if succeeds || self.was_admitted(&sender) { Ok(signed) } else { Err(MembershipError::NotAdmitted(sender)) }
    }

    /// Whether an operation counts as things stand: its sender, or the one it succeeds, is not removed.
    #[must_use]
    pub fn would_count(&self, envelope: &Envelope<'_>, signed: &SignedOperation) -> bool {
        let by = match &signed.operation {
            Operation::Succeed { predecessor, .. } => predecessor,
            _ => &envelope.header.sender,
        };
        let hash = envelope.hash();
        !self.counted().places_for(by, &hash).is_empty() || self.is_admitted(&envelope.header.sender)
    }

    /// Takes in a membership envelope whose signature was checked; true if it changed who belongs.
    pub fn apply(&mut self, envelope: &Envelope<'_>) -> Result<bool, MembershipError> {
        debug_assert_eq!(envelope.header.class, Class::Membership);
        let SignedOperation { seen, operation } = self.examine(envelope)?;
        let hash = envelope.hash();
        if self.ops.contains_key(&hash) {
            return Ok(false);
        }
        let (sender, number) = (envelope.header.sender, envelope.header.number);
        let op = Arc::new(Op { sender, number, hash, seen, operation, envelope: Arc::from(envelope.bytes()) });
        self.ops.insert(hash, op.clone());
        self.order.push(op.clone());
        let changed = self.ever.take(&op);
        self.link(&op);
        // without removals nobody asks for it
        self.now = OnceLock::new();
        Ok(changed || !self.verdicts.is_empty())
    }

    /// Notes what an operation has seen; it is complete once all of that is here and complete.
    fn link(&mut self, op: &Op) {
        let lacks: BTreeSet<EnvelopeHash> = op
            .seen
            .iter()
            .copied()
            .filter(|hash| !self.ops.contains_key(hash) || self.incomplete.contains_key(hash))
            .collect();
        if !lacks.is_empty() {
            self.incomplete.insert(op.hash, lacks.len());
            for hash in lacks {
                self.lacking.entry(hash).or_default().push(op.hash);
            }
            return;
        }
        let mut complete = vec![op.hash];
        while let Some(hash) = complete.pop() {
            self.complete(&hash);
            for later in self.lacking.remove(&hash).unwrap_or_default() {
                let Some(left) = self.incomplete.get_mut(&later) else { continue };
                *left -= 1;
                if *left == 0 {
                    self.incomplete.remove(&later);
                    complete.push(later);
                }
            }
        }
    }

    /// Takes in that the whole past of an operation is here: only then others name it, so that nobody can make them name
    /// what cannot be had.
    fn complete(&mut self, hash: &EnvelopeHash) {
        let Some(op) = self.ops.get(hash).cloned() else { return };
        for seen in &op.seen {
            self.tips.remove(seen);
            self.named.insert(*seen);
        }
        if !self.named.contains(hash) {
            self.tips.insert(*hash);
        }
        let latest = self.latest.entry(op.sender).or_insert((op.number, op.hash));
        *latest = (*latest).max((op.number, op.hash));
        if matches!(op.operation, Operation::Remove { .. } | Operation::Approve { .. } | Operation::Withdraw { .. }) {
            let past = Arc::new(self.past(&op));
            if let Some(verdict) = self.log().within(&past).judge(&op, &past) {
                self.verdicts.insert(*hash, verdict);
            }
        }
    }

    /// Everything an operation's author had seen, as far as it is here.
    fn past(&self, op: &Op) -> Past {
        let mut past = Past::new();
        let mut next: Vec<EnvelopeHash> = op.seen.clone();
        while let Some(hash) = next.pop() {
            if let Some(seen) = self.ops.get(&hash)
                && past.insert(hash)
            {
                next.extend(&seen.seen);
            }
        }
        past
    }

    fn log(&self) -> Log<'_> {
        Log { charter: &self.charter, ops: self.order.iter().collect(), verdicts: &self.verdicts }
    }

    /// What removals leave; none while there are none.
    fn now(&self) -> Option<&Arc<Now>> {
        if self.verdicts.is_empty() {
            return None;
        }
        Some(self.now.get_or_init(|| {
            let log = self.log();
            let (removals, pending) = log.effective();
            let counted = log.roster(removals);
            let living: BTreeMap<AuthorId, Admitted> =
                counted.authors.iter().filter_map(|(id, admitted)| Some((*id, counted.left(id, admitted)?))).collect();
            let gone = self.ever.authors.keys().filter(|author| !living.contains_key(author));
            let ends = gone.map(|author| (*author, end_of(&counted, author))).collect();
            Arc::new(Now { counted, living, ends: Arc::new(ends), pending })
        }))
    }

    fn counted(&self) -> &Roster {
        self.now().map_or(&self.ever, |now| &now.counted)
    }

    fn living(&self) -> &BTreeMap<AuthorId, Admitted> {
        self.now().map_or(&self.ever.authors, |now| &now.living)
    }

    /// Takes in stored membership envelopes; returns how many senders' are not admitted by any of them.
    ///
    /// Again and again while someone is admitted: within a batch an entry may stand before what admits its sender.
    pub fn replay(&mut self, mut left: Vec<Vec<u8>>) -> Result<usize, FormatError> {
        loop {
            let before = left.len();
            let mut still = Vec::new();
            for bytes in left {
                if self.apply(&Envelope::parse(&bytes)?).is_err() {
                    still.push(bytes);
                }
            }
            left = still;
            if left.is_empty() || left.len() == before {
                return Ok(left.len());
            }
        }
    }
}

/// Where the feed of an author ends that does not belong any more: of its places the one that lets most of it count, and
/// of that one's removals the one that lets least.
fn end_of(counted: &Roster, author: &AuthorId) -> Cut {
    let nothing = Cut { author: *author, number: Number(0), hash: EnvelopeHash::NONE };
    let Some(admitted) = counted.authors.get(author) else { return nothing };
    let of_place = |place: Place| {
        let removals = counted.removals.iter().filter(|removal| removal.ends(author, &place.member));
        removals.map(|removal: &Removal| removal.end_of(author)).min_by_key(|cut| (cut.number, cut.hash))
    };
    admitted.places().filter_map(of_place).max_by_key(|cut| (cut.number, cut.hash)).unwrap_or(nothing)
}

/// A way to an author: where it was reached from, and by which admission.
type Reached<'a> = BTreeMap<(AuthorId, Place), Option<((AuthorId, Place), &'a Admission)>>;

fn chain_to(end: (AuthorId, Place), reached: &Reached<'_>) -> Vec<Vec<u8>> {
    let mut chain = Vec::new();
    let mut at = end;
    while let Some(Some((before, admission))) = reached.get(&at) {
        chain.push(admission.envelope.to_vec());
        at = *before;
    }
    chain.reverse();
    chain
}

#[cfg(test)]
mod tests;
