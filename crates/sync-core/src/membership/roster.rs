//! Who is let in by a set of operations while certain removals count.
//!
//! Rights only ever grow by admissions, so an operation that does not count yet is kept and looked at again.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sync_types::{
    AuthorId, AuthorKeys, Charter, Cut, Envelope, EnvelopeHash, InviteId, MemberId, Number, Operation, Role,
    SignedOperation,
};

use super::{Admitted, Invited};

/// As what an author belongs to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) role: Role,
    pub(super) member: MemberId,
}

impl Place {
    /// Whether who stands here may let an author in as `place`.
    pub(super) fn may_admit(&self, author: &AuthorId, place: &Self) -> bool {
        let newcomer = place.member == MemberId::from(*author);
        self.role.may_invite() && place.role >= self.role && (newcomer || place.member == self.member)
    }
}

/// As what an author was let in, by whom and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Standing {
    pub(super) by: AuthorId,
    pub(super) place: Place,
    /// It succeeds who let it in, in that one's place.
    pub(super) succeeds: bool,
}

/// Of several for one standing the one with the lowest hash, so that they stay few.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    pub(super) hash: EnvelopeHash,
    pub(super) envelope: Arc<[u8]>,
}

/// An operation of somebody who is or was let in.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) sender: AuthorId,
    pub(super) number: Number,
    pub(super) hash: EnvelopeHash,
    pub(super) seen: Vec<EnvelopeHash>,
    pub(super) operation: Operation,
    pub(super) envelope: Arc<[u8]>,
}

/// The operations that an operation's author had seen, and those that their authors had.
pub(super) type Past = BTreeSet<EnvelopeHash>;

/// A removal that counts.
#[derive(Debug, Clone)]
pub(super) struct Removal {
    /// The operation that says so.
    pub(super) hash: EnvelopeHash,
    pub(super) member: MemberId,
    /// Only the authors that are named go, not the whole member.
    pub(super) named_only: bool,
    /// Where feeds end, by each who signed: the lowest end counts.
    pub(super) cuts: Vec<Vec<Cut>>,
    pub(super) past: Arc<Past>,
}

impl Removal {
    /// Whether it takes this place from this author.
    pub(super) fn ends(&self, author: &AuthorId, member: &MemberId) -> bool {
        *member == self.member && (!self.named_only || self.cuts.iter().flatten().any(|cut| cut.author == *author))
    }

    /// Where it ends an author's feed.
    pub(super) fn end_of(&self, author: &AuthorId) -> Cut {
        let nothing = Cut { author: *author, number: Number(0), hash: EnvelopeHash::NONE };
        let named = |cuts: &Vec<Cut>| {
            let of_author = cuts.iter().filter(|cut| cut.author == *author);
            of_author.min_by_key(|cut| (cut.number, cut.hash)).copied().unwrap_or(nothing)
        };
        self.cuts.iter().map(named).min_by_key(|cut| (cut.number, cut.hash)).unwrap_or(nothing)
    }
}

/// Who is let in, and the invites there are.
#[derive(Debug, Clone)]
pub(super) struct Roster {
    pub(super) authors: BTreeMap<AuthorId, Admitted>,
    pub(super) invites: BTreeMap<InviteId, Invited>,
    pub(super) revoked: BTreeSet<InviteId>,
    pub(super) used: BTreeMap<InviteId, AuthorId>,
    /// The removals that count.
    pub(super) removals: Arc<[Removal]>,
    /// Operations that do not count yet.
    waiting: Vec<Arc<Op>>,
    /// Successions by their predecessor: what it is given later, its successors have too.
    heirs: BTreeMap<AuthorId, Vec<Arc<Op>>>,
}

enum Counted {
    Yes,
    /// And an author has a standing it did not have.
    Grown(AuthorId),
    NotYet,
    Never,
}

impl Roster {
    /// Nobody but the founder.
    pub(super) fn new(charter: &Charter, removals: Arc<[Removal]>) -> Self {
        let member = charter.founder.verify.into();
        let founder = Admitted {
            keys: charter.founder.clone(),
            member,
            role: Role::Admin,
            invite: None,
            by: None,
            hash: EnvelopeHash::NONE,
            root: Some(Place { role: Role::Admin, member }),
            admissions: BTreeMap::new(),
        };
        Self {
            authors: BTreeMap::from([(charter.founder.verify, founder)]),
            invites: BTreeMap::new(),
            revoked: BTreeSet::new(),
            used: BTreeMap::new(),
            removals,
            waiting: Vec::new(),
            heirs: BTreeMap::new(),
        }
    }

    /// Takes in an operation; true if it changed who is let in.
    pub(super) fn take(&mut self, new: &Arc<Op>) -> bool {
        if let Operation::Succeed { predecessor, .. } = &new.operation {
            self.heirs.entry(*predecessor).or_default().push(new.clone());
        }
        match self.count(new) {
            Counted::Grown(author) => {
                self.settle(author);
                return true;
            }
            // it cannot make any other count, so those that wait are not looked at: there may be many
            Counted::NotYet => self.waiting.push(new.clone()),
            Counted::Yes | Counted::Never => {}
        }
        false
    }

    /// Looks at what may count now that an author has another standing, and so on until nothing more does.
    fn settle(&mut self, author: AuthorId) {
        let mut grown = vec![author];
        while let Some(author) = grown.pop() {
            for heir in self.heirs.get(&author).cloned().unwrap_or_default() {
                if let Counted::Grown(heir) = self.count(&heir) {
                    grown.push(heir);
                }
            }
            for waiting in std::mem::take(&mut self.waiting) {
                match self.count(&waiting) {
                    Counted::Grown(author) => grown.push(author),
                    Counted::NotYet => self.waiting.push(waiting),
                    Counted::Yes | Counted::Never => {}
                }
            }
        }
    }

    fn count(&mut self, op: &Op) -> Counted {
        match &op.operation {
            Operation::Admit { keys, member, role, invite, .. } => {
                let place = Place { role: *role, member: *member };
                let may = |own: Place| own.may_admit(&keys.verify, &place);
                if !self.places_for(&op.sender, &op.hash).into_iter().any(may) {
                    return Counted::NotYet;
                }
                if let Some(invite) = invite {
                    let first = self.used.entry(*invite).or_insert(keys.verify);
                    *first = (*first).min(keys.verify);
                }
                self.admit(op, keys, Standing { by: op.sender, place, succeeds: false }, *invite)
            }
            Operation::Succeed { keys, member, predecessor, .. } => {
                let mut counted = Counted::NotYet;
                let places = self.places_for(predecessor, &op.hash);
                for place in places.into_iter().filter(|place| place.member == *member) {
                    let standing = Standing { by: *predecessor, place, succeeds: true };
                    match self.admit(op, keys, standing, None) {
                        Counted::Yes if matches!(counted, Counted::Grown(_)) => {}
                        other => counted = other,
                    }
                }
                // a predecessor that gets a place later is looked at by itself
                if matches!(counted, Counted::NotYet) { Counted::Never } else { counted }
            }
            Operation::Invite { id, verifier, role, member, expires } => {
                let may = |own: Place| {
                    own.role.may_invite() && *role >= own.role && member.is_none_or(|member| member == own.member)
                };
                if !self.places_for(&op.sender, &op.hash).into_iter().any(may) {
                    return Counted::NotYet;
                }
                let (by, verifier, role, member) = (op.sender, *verifier, *role, *member);
                let invited = Invited { by, verifier, role, member, expires: *expires };
                // an invite id derives from its code: a second one under it is a copy, and the lowest maker stands
                let known = self.invites.entry(*id).or_insert_with(|| invited.clone());
                if invited < *known {
                    *known = invited;
                }
                Counted::Yes
            }
            Operation::Revoke { id } => {
                if self.places_for(&op.sender, &op.hash).is_empty() {
                    return Counted::NotYet;
                }
                self.revoked.insert(*id);
                Counted::Yes
            }
            _ => Counted::Never,
        }
    }

    /// The places by which an operation of an author counts: none that a removal took which had not seen it.
    pub(super) fn places_for(&self, author: &AuthorId, op: &EnvelopeHash) -> Vec<Place> {
        let Some(admitted) = self.authors.get(author) else { return Vec::new() };
        let alive = |place: &Place| {
            self.removals.iter().all(|removal| !removal.ends(author, &place.member) || removal.past.contains(op))
        };
        admitted.places().filter(alive).collect()
    }

    /// An author as it belongs behind all removals; none if they took every place it had.
    pub(super) fn left(&self, author: &AuthorId, admitted: &Admitted) -> Option<Admitted> {
        let alive = |member: &MemberId| !self.removals.iter().any(|removal| removal.ends(author, member));
        if admitted.places().all(|place| alive(&place.member)) {
            return Some(admitted.clone());
        }
        let root = admitted.root.filter(|root| alive(&root.member));
        let of_living = admitted.admissions.iter().filter(|(standing, _)| alive(&standing.place.member));
        let admissions: BTreeMap<Standing, Admission> =
            of_living.map(|(standing, admission)| (*standing, admission.clone())).collect();
        let strongest = admissions.iter().min_by_key(|(standing, admission)| (standing.place.role, admission.hash));
        let mut left = admitted.clone();
        match (root, strongest) {
            (Some(_), _) => {}
            (None, Some((standing, admission))) => {
                let (keys, invite) = said_by(admission)?;
                let Place { role, member } = standing.place;
                left = Admitted { keys, member, role, invite, by: Some(standing.by), hash: admission.hash, ..left };
            }
            (None, None) => return None,
        }
        Some(Admitted { root, admissions, ..left })
    }

    fn admit(&mut self, op: &Op, keys: &AuthorKeys, standing: Standing, invite: Option<InviteId>) -> Counted {
        let Standing { by, place: Place { role, member }, .. } = standing;
        let (author, hash) = (keys.verify, op.hash);
        let admission = Admission { hash, envelope: op.envelope.clone() };
        let admitted = |admissions| {
            let (keys, by) = (keys.clone(), Some(by));
            Admitted { keys, member, role, invite, by, hash, root: None, admissions }
        };
        let known = self.authors.entry(author).or_insert_with(|| admitted(BTreeMap::new()));
        if known.root.is_some() {
            return Counted::Yes;
        }
        // of several admissions the strongest role shows, so that what was allowed once stays allowed; of those the one
        // with the lowest hash, so that the order of arrival does not matter
        if (role, hash) < (known.role, known.hash) {
            *known = admitted(std::mem::take(&mut known.admissions));
        }
        match known.admissions.entry(standing) {
            Entry::Vacant(place) => {
                place.insert(admission);
                Counted::Grown(author)
            }
            Entry::Occupied(mut same) => {
                if admission.hash < same.get().hash {
                    same.insert(admission);
                }
                Counted::Yes
            }
        }
    }
}

/// The keys and the invite that an admission names.
fn said_by(admission: &Admission) -> Option<(AuthorKeys, Option<InviteId>)> {
    let envelope = Envelope::parse(&admission.envelope).ok()?;
    match SignedOperation::decode(envelope.payload()).ok()?.operation {
        Operation::Admit { keys, invite, .. } => Some((keys, invite)),
        Operation::Succeed { keys, .. } => Some((keys, None)),
        _ => None,
    }
}
