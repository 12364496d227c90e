//! Which removals count.
//!
//! Each is judged in the past that it names: what its signer may do, whom it may remove, and how many signatures the
//! roster of that past needs. That verdict never changes.
//! Of those that pass, one falls if another takes its signer out without having seen it; `docs/groups.md` has the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sync_types::{AuthorId, Charter, Cut, EnvelopeHash, GroupKind, MemberId, Operation, Role};

use super::roster::{Op, Past, Place, Removal, Roster};

/// What a removal is worth by the past it names.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    /// The tombstone that it signs; its own hash unless it is an approval.
    tombstone: EnvelopeHash,
    member: MemberId,
    named_only: bool,
    cuts: Vec<Cut>,
    past: Arc<Past>,
    sender: AuthorId,
    /// As which members its sender may do this.
    signers: BTreeSet<MemberId>,
    /// Signatures from different members that a tombstone needs.
    needed: usize,
    /// How early its sender was admitted.
    age: usize,
}

/// A removal that waits for signatures of other members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingRemoval {
    /// The tombstone.
    pub tombstone: EnvelopeHash,
    /// Who is to be removed.
    pub member: MemberId,
    /// Authors that have signed.
    pub signed: Vec<AuthorId>,
    /// Signatures from different members that it needs.
    pub needed: usize,
}

/// A set of operations to evaluate.
pub(super) struct Log<'a> {
    pub(super) charter: &'a Charter,
    /// In the order they came, which is close to the order they were made.
    pub(super) ops: Vec<&'a Arc<Op>>,
    pub(super) verdicts: &'a BTreeMap<EnvelopeHash, Verdict>,
}

impl<'a> Log<'a> {
    /// The part of a log that is in a past.
    pub(super) fn within(&self, past: &Past) -> Self {
        let ops = self.ops.iter().copied().filter(|op| past.contains(&op.hash)).collect();
        Self { charter: self.charter, ops, verdicts: self.verdicts }
    }

    /// Who is let in while certain removals count.
    pub(super) fn roster(&self, removals: Arc<[Removal]>) -> Roster {
        let mut roster = Roster::new(self.charter, removals);
        for op in &self.ops {
            roster.take(op);
        }
        roster
    }

    /// Who belongs by everything in this log.
    pub(super) fn settled(&self) -> Roster {
        self.roster(self.effective().0)
    }

    /// What a removal is worth, this log being its past; none for what is no removal or counts for nothing.
    pub(super) fn judge(&self, op: &Op, past: &Arc<Past>) -> Option<Verdict> {
        if self.charter.kind == GroupKind::Passphrase {
            return None;
        }
        let roster = self.settled();
        let living: BTreeMap<AuthorId, _> =
            roster.authors.iter().filter_map(|(id, admitted)| Some((*id, roster.left(id, admitted)?))).collect();
        let sender = living.get(&op.sender)?;
        let (tombstone, member, named_only, cuts, needed) = match &op.operation {
            Operation::Remove { member, cuts } => {
                let members: BTreeSet<MemberId> = living.values().flat_map(|admitted| admitted.members()).collect();
                let quorum = self.charter.quorum;
                let small = members.len() <= usize::try_from(quorum.small_group).unwrap_or(usize::MAX);
                let needed = if small { quorum.small } else { quorum.large };
                (op.hash, *member, false, cuts, usize::try_from(needed).unwrap_or(usize::MAX).max(1))
            }
            Operation::Withdraw { member, cuts } => (op.hash, *member, true, cuts, 1),
            Operation::Approve { tombstone, cuts } => {
                let Operation::Remove { member, .. } = self.ops.iter().find(|op| op.hash == *tombstone)?.operation
                else {
                    return None;
                };
                (*tombstone, member, false, cuts, 1)
            }
            _ => return None,
        };
        // what is removed already may be signed for once more: of two that cut each other the one with more signers counts
        let places: Vec<Place> = match &op.operation {
            Operation::Approve { .. } => roster.authors.values().flat_map(|admitted| admitted.places()).collect(),
            _ => living.values().flat_map(|admitted| admitted.places()).collect(),
        };
        let target = places.iter().filter(|place| place.member == member).map(|place| place.role).min()?;
        let may = |member_of: MemberId, role: Role| match named_only {
            true => member_of == member,
            false => member_of != member && role.may_remove() && target >= role,
        };
        let signers: BTreeSet<MemberId> =
            sender.places().filter(|place| may(place.member, place.role)).map(|place| place.member).collect();
        // who has a place in the member it removes signs for that one too
        if signers.is_empty() || (!named_only && sender.belongs_to(&member)) {
            return None;
        }
        Some(Verdict {
            tombstone,
            member,
            named_only,
            cuts: cuts.clone(),
            past: past.clone(),
            sender: op.sender,
            signers,
            needed,
            age: self.age(&roster, &op.sender),
        })
    }

    /// How much an author's admission had seen, and more than that of who let it in.
    fn age(&self, roster: &Roster, author: &AuthorId) -> usize {
        let by_hash: BTreeMap<EnvelopeHash, &Arc<Op>> = self.ops.iter().map(|op| (op.hash, *op)).collect();
        let (mut age, mut above, mut at) = (0, 0, *author);
        let mut passed = BTreeSet::new();
        while let Some((by, hash)) = roster.authors.get(&at).and_then(|admitted| admitted.admitted_by())
            && passed.insert(at)
        {
            let mut seen = BTreeSet::new();
            let mut next = vec![hash];
            while let Some(op) = next.pop().and_then(|hash| by_hash.get(&hash)) {
                next.extend(op.seen.iter().filter(|hash| seen.insert(**hash)));
            }
            age = age.max(above + seen.len() + 1);
            above += 1;
            at = by;
        }
        age
    }

    /// The removals that count, and the tombstones that would with more signatures.
    pub(super) fn effective(&self) -> (Arc<[Removal]>, Vec<PendingRemoval>) {
        let here = self.ops.iter().filter_map(|op| Some((op.hash, self.verdicts.get(&op.hash)?)));
        let mut signatures: BTreeMap<EnvelopeHash, Vec<(EnvelopeHash, &Verdict)>> = BTreeMap::new();
        for (hash, verdict) in here.filter(|(hash, verdict)| !self.forgets(hash, verdict)) {
            signatures.entry(verdict.tombstone).or_default().push((hash, verdict));
        }
        // an approval alone says nothing
        signatures.retain(|tombstone, signed| signed.iter().any(|(hash, _)| hash == tombstone));
        if signatures.is_empty() {
            return (Arc::from([]), Vec::new());
        }
        let tombstones: Vec<Tombstone<'_>> =
            signatures.into_iter().map(|(hash, signed)| Tombstone::new(hash, signed)).collect();
        let (ready, waiting): (Vec<_>, Vec<_>) =
            tombstones.into_iter().partition(|tombstone| tombstone.strength(&tombstone.all()) >= tombstone.needed);
        let mut counting = self.stand(ready);
        // what several together take from a signature none of them does alone
        while let Some(weakest) = self.fallen(&counting) {
            counting.remove(weakest);
        }
        let removals: Arc<[Removal]> = counting.iter().map(|tombstone| tombstone.removal(&tombstone.all())).collect();
        let gone = |member: &MemberId| removals.iter().any(|removal| !removal.named_only && removal.member == *member);
        let pending = waiting.iter().filter(|tombstone| !gone(&tombstone.member())).map(Tombstone::pending).collect();
        (removals, pending)
    }

    /// Whether a removal does not see something that its own author had made before: its past is not all its author knew.
    fn forgets(&self, hash: &EnvelopeHash, verdict: &Verdict) -> bool {
        let Some(op) = self.ops.iter().find(|op| op.hash == *hash) else { return true };
        let unseen = |other: &&Arc<Op>| -> bool {
            other.sender == op.sender && other.number < op.number && !verdict.past.contains(&other.hash)
        };
        self.ops.iter().any(unseen)
    }

    /// Those that stand when each takes out who signed others without having seen that.
    fn stand<'v>(&self, ready: Vec<Tombstone<'v>>) -> Vec<Tombstone<'v>> {
        let count = ready.len();
        let fells: Vec<Vec<bool>> =
            ready.iter().map(|one| ready.iter().map(|other| self.fells(one, other)).collect()).collect();
        let mut stands: Vec<Option<bool>> = vec![None; count];
        loop {
            let mut settled = true;
            for at in 0..count {
                let felling = |by: &usize| fells[*by][at];
                if stands[at].is_some() {
                    continue;
                }
                if (0..count).filter(felling).any(|by| stands[by] == Some(true)) {
                    (stands[at], settled) = (Some(false), false);
                } else if (0..count).filter(felling).all(|by| stands[by] == Some(false)) {
                    (stands[at], settled) = (Some(true), false);
                }
            }
            if !settled {
                continue;
            }
            // only such as fell each other are left: of those that nothing else fells the first in order stands
            let open = |at: &usize| stands[*at].is_none();
            let reaches = |from: usize| {
                let (mut reached, mut next) = (BTreeSet::new(), vec![from]);
                while let Some(at) = next.pop() {
                    next.extend((0..count).filter(open).filter(|to| fells[at][*to] && reached.insert(*to)));
                }
                reached
            };
            let among_themselves = |at: &usize| {
                let reached = reaches(*at);
                (0..count).filter(open).filter(|by| fells[*by][*at]).all(|by| reached.contains(&by))
            };
            let first = (0..count).filter(open).filter(among_themselves).min_by_key(|at| ready[*at].order());
            let Some(first) = first else { break };
            for by in 0..count {
                if fells[by][first] && stands[by].is_none() {
                    stands[by] = Some(false);
                }
            }
            stands[first] = Some(true);
        }
        ready
            .into_iter()
            .zip(stands)
            .filter(|(_, stands)| *stands == Some(true))
            .map(|(tombstone, _)| tombstone)
            .collect()
    }

    /// Whether a tombstone lacks signatures once another counts.
    fn fells(&self, one: &Tombstone<'_>, other: &Tombstone<'_>) -> bool {
        if one.hash == other.hash || other.signed.iter().all(|(hash, _)| one.past().contains(hash)) {
            return false;
        }
        let roster = self.roster(Arc::from([one.removal(&one.all())]));
        other.strength(&other.living(&roster)) < other.needed
    }

    /// The place of a tombstone that lacks signatures once all the others count, of several the last in order.
    fn fallen(&self, counting: &[Tombstone<'_>]) -> Option<usize> {
        let falls = |at: &usize| {
            let tombstone = &counting[*at];
            let others = || counting.iter().filter(|other| other.hash != tombstone.hash);
            if others().all(|other| tombstone.signed.iter().all(|(hash, _)| other.past().contains(hash))) {
                return false;
            }
            let roster = self.roster(others().map(|other| other.removal(&other.all())).collect());
            tombstone.strength(&tombstone.living(&roster)) < tombstone.needed
        };
        (0..counting.len()).filter(falls).max_by_key(|at| counting[*at].order())
    }
}

type Signature<'v> = (EnvelopeHash, &'v Verdict);

/// A tombstone, or what a member withdrew, with everything that signs it.
struct Tombstone<'v> {
    hash: EnvelopeHash,
    needed: usize,
    signed: Vec<Signature<'v>>,
}

impl<'v> Tombstone<'v> {
    fn new(hash: EnvelopeHash, mut signed: Vec<Signature<'v>>) -> Self {
        // its own signature first, then in an order that is everywhere the same
        signed.sort_by_key(|(of, _)| (*of != hash, *of));
        Self { hash, needed: signed.first().map_or(usize::MAX, |(_, verdict)| verdict.needed), signed }
    }

    fn own(&self) -> &'v Verdict {
        self.signed[0].1
    }

    fn past(&self) -> &Past {
        &self.own().past
    }

    fn member(&self) -> MemberId {
        self.own().member
    }

    fn all(&self) -> Vec<&Signature<'v>> {
        self.signed.iter().collect()
    }

    /// The signatures whose senders may still give them.
    fn living(&self, roster: &Roster) -> Vec<&Signature<'v>> {
        let lives = |(hash, verdict): &&Signature<'v>| {
            let places = roster.places_for(&verdict.sender, hash);
            places.iter().any(|place| verdict.signers.contains(&place.member))
        };
        self.signed.iter().filter(lives).collect()
    }

    /// From how many different members signatures are; none without the tombstone's own.
    fn strength(&self, signatures: &[&Signature<'v>]) -> usize {
        if !signatures.iter().any(|(hash, _)| *hash == self.hash) {
            return 0;
        }
        let mut members: BTreeSet<MemberId> = BTreeSet::new();
        let mut count = 0;
        for (_, verdict) in signatures {
            if members.is_disjoint(&verdict.signers) {
                count += 1;
            }
            members.extend(&verdict.signers);
        }
        count
    }

    /// More signers come first, then who was admitted earlier.
    fn order(&self) -> (std::cmp::Reverse<usize>, usize, EnvelopeHash) {
        let age = self.signed.iter().map(|(_, verdict)| verdict.age).min().unwrap_or(usize::MAX);
        (std::cmp::Reverse(self.strength(&self.all())), age, self.hash)
    }

    fn removal(&self, signatures: &[&Signature<'v>]) -> Removal {
        let own = self.own();
        // one that needs no other's signature has no other's word on where feeds end
        let signatures = if self.needed > 1 { signatures } else { &signatures[..1] };
        Removal {
            hash: self.hash,
            member: own.member,
            named_only: own.named_only,
            cuts: signatures.iter().map(|(_, verdict)| verdict.cuts.clone()).collect(),
            past: own.past.clone(),
        }
    }

    fn pending(&self) -> PendingRemoval {
        let signed = self.signed.iter().map(|(_, verdict)| verdict.sender).collect();
        PendingRemoval { tombstone: self.hash, member: self.member(), signed, needed: self.needed }
    }
}
