//! Who belongs to a group: a pure function of its charter and a set of signed operations, whatever their order.
//!
//! An operation counts when its sender is admitted and may do what it does.
//! Rights only ever grow by admissions, so an operation that does not count yet is kept and looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sync_crypto::author::{SignPurpose, verify};
use sync_types::bounds::{MAX_SEEN, MAX_TOKEN};
use sync_types::{
    AuthorId, AuthorKeys, Charter, Class, Envelope, EnvelopeHash, FormatError, GroupId, InviteId, MemberId, Number,
    Operation, Role, SignedOperation, Timestamp, succession_statement,
};

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
    /// Every admission of it that counts, by who made it: nobody can take another's place away by admitting it again.
    admissions: BTreeMap<AuthorId, Admission>,
}

#[derive(Debug, Clone)]
struct Admission {
    member: MemberId,
    hash: EnvelopeHash,
    envelope: Arc<[u8]>,
}

impl Admitted {
    /// Whether some admission counts it to a member.
    #[must_use]
    pub fn belongs_to(&self, member: &MemberId) -> bool {
        self.member == *member || self.admissions.values().any(|admission| admission.member == *member)
    }
}

/// An invite as membership entries tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// A succession whose predecessor never signed it.
    #[error("succession of {0:?} is not signed by its predecessor")]
    SuccessionForged(AuthorId),
}

/// A group's membership.
#[derive(Debug, Clone)]
pub struct Membership {
    group: GroupId,
    charter: Arc<Charter>,
    authors: BTreeMap<AuthorId, Admitted>,
    invites: BTreeMap<InviteId, Invited>,
    revoked: BTreeSet<InviteId>,
    used: BTreeMap<InviteId, AuthorId>,
    tips: BTreeSet<EnvelopeHash>,
    /// Operations of admitted senders that do not count yet.
    waiting: Vec<Waiting>,
}

#[derive(Debug, Clone)]
struct Waiting {
    sender: AuthorId,
    hash: EnvelopeHash,
    operation: Operation,
    envelope: Arc<[u8]>,
}

impl Membership {
    /// The membership of a group nobody was admitted to yet.
    pub fn new(charter: &[u8]) -> Result<Self, FormatError> {
        let decoded = Charter::decode(charter)?;
        let founder = Admitted {
            keys: decoded.founder.clone(),
            member: decoded.founder.verify.into(),
            role: Role::Admin,
            invite: None,
            by: None,
            hash: EnvelopeHash::NONE,
            admissions: BTreeMap::new(),
        };
        Ok(Self {
            group: GroupId::of(charter),
            authors: BTreeMap::from([(decoded.founder.verify, founder)]),
            charter: Arc::new(decoded),
            invites: BTreeMap::new(),
            revoked: BTreeSet::new(),
            used: BTreeMap::new(),
            tips: BTreeSet::new(),
            waiting: Vec::new(),
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
        self.authors.contains_key(author)
    }

    /// An author that belongs to the group.
    #[must_use]
    pub fn author(&self, author: &AuthorId) -> Option<&Admitted> {
        self.authors.get(author)
    }

    /// Every author that belongs to the group.
    pub fn authors(&self) -> impl Iterator<Item = (&AuthorId, &Admitted)> {
        self.authors.iter()
    }

    /// An invite, unless it was never made.
    #[must_use]
    pub fn invite(&self, id: &InviteId) -> Option<&Invited> {
        self.invites.get(id)
    }

    /// Whether an invite was taken back.
    #[must_use]
    pub fn is_revoked(&self, id: &InviteId) -> bool {
        self.revoked.contains(id)
    }

    /// The author an invite admitted.
    #[must_use]
    pub fn used_by(&self, id: &InviteId) -> Option<AuthorId> {
        self.used.get(id).copied()
    }

    /// What an operation made now has seen: the tips, at most [`MAX_SEEN`].
    #[must_use]
    pub fn tips(&self) -> Vec<EnvelopeHash> {
        self.tips.iter().take(MAX_SEEN).copied().collect()
    }

    /// The envelopes of a shortest way from the founder to an author, founder's side first; none if it is too long.
    #[must_use]
    pub fn token(&self, author: &AuthorId) -> Option<Vec<Vec<u8>>> {
        // breadth first from the author: the founder is reached over the fewest admissions
        let mut reached: BTreeMap<AuthorId, Option<(AuthorId, &Admission)>> = BTreeMap::from([(*author, None)]);
        let mut tier = vec![*author];
        for _ in 0..=MAX_TOKEN {
            if let Some(founder) = tier.iter().find(|author| **author == self.charter.founder.verify) {
                return Some(chain_from(*founder, &reached));
            }
            let mut next = Vec::new();
            for author in tier {
                for (by, admission) in &self.authors.get(&author)?.admissions {
                    if !reached.contains_key(by) {
                        reached.insert(*by, Some((author, admission)));
                        next.push(*by);
                    }
                }
            }
            tier = next;
        }
        None
    }

    /// Whether an envelope may be looked at: its sender is admitted, or it succeeds one who is.
    ///
    /// The proof of a succession is checked here; the envelope's own signature is the caller's business.
    pub fn examine(&self, envelope: &Envelope<'_>) -> Result<SignedOperation, MembershipError> {
        let sender = envelope.header.sender;
        let signed = SignedOperation::decode(envelope.payload())?;
        if self.is_admitted(&sender) {
            return Ok(signed);
        }
        let Operation::Succeed { keys, member, predecessor, proof } = &signed.operation else {
            return Err(MembershipError::NotAdmitted(sender));
        };
        let before = self.authors.get(predecessor).ok_or(MembershipError::NotAdmitted(sender))?;
        let fits = keys.verify == sender && envelope.header.number == Number(1) && before.belongs_to(member);
        let statement = succession_statement(keys, *member);
        if !fits || !verify(predecessor, SignPurpose::Succession, &[&self.group.0, &statement], proof) {
            return Err(MembershipError::SuccessionForged(sender));
        }
        Ok(signed)
    }

    /// Takes in a membership envelope whose signature was checked; true if it changed who belongs.
    pub fn apply(&mut self, envelope: &Envelope<'_>) -> Result<bool, MembershipError> {
        debug_assert_eq!(envelope.header.class, Class::Membership);
        let SignedOperation { seen, operation } = self.examine(envelope)?;
        let hash = envelope.hash();
        for hash in &seen {
            self.tips.remove(hash);
        }
        self.tips.insert(hash);
        let (sender, envelope) = (envelope.header.sender, Arc::from(envelope.bytes()));
        let new = Waiting { sender, hash, operation, envelope };
        match self.count(&new) {
            Counted::Yes { changed: true } => {
                self.settle();
                return Ok(true);
            }
            // it cannot make any other count, so those that wait are not looked at: there may be many
            Counted::NotYet => self.waiting.push(new),
            Counted::Yes { changed: false } | Counted::Never => {}
        }
        Ok(false)
    }

    /// Looks at waiting operations until none of them counts any more.
    fn settle(&mut self) {
        let mut progress = true;
        while std::mem::take(&mut progress) {
            for waiting in std::mem::take(&mut self.waiting) {
                match self.count(&waiting) {
                    Counted::Yes { changed } => progress |= changed,
                    Counted::NotYet => self.waiting.push(waiting),
                    Counted::Never => {}
                }
            }
        }
    }

    fn count(&mut self, waiting: &Waiting) -> Counted {
        let sender_role = self.authors.get(&waiting.sender).map(|sender| (sender.role, sender.member));
        match &waiting.operation {
            Operation::Admit { keys, member, role, invite } => {
                let Some((own_role, own_member)) = sender_role else { return Counted::NotYet };
                let own_device = *member == own_member;
                let new_member = *member == MemberId::from(keys.verify);
                if !own_device && !new_member {
                    return Counted::Never;
                }
                if !own_role.may_invite() || *role < own_role {
                    return Counted::NotYet;
                }
                if let Some(invite) = invite {
                    let first = self.used.entry(*invite).or_insert(keys.verify);
                    *first = (*first).min(keys.verify);
                }
                self.admit(waiting, keys, *member, *role, *invite)
            }
            Operation::Succeed { keys, member, predecessor, .. } => {
                let Some(before) = self.authors.get(predecessor) else { return Counted::NotYet };
                let role = before.role;
                let mut counted = waiting.clone();
                counted.sender = *predecessor;
                self.admit(&counted, keys, *member, role, None)
            }
            Operation::Invite { id, verifier, role, member, expires } => {
                let Some((own_role, own_member)) = sender_role else { return Counted::NotYet };
                if member.is_some_and(|member| member != own_member) {
                    return Counted::Never;
                }
                if !own_role.may_invite() || *role < own_role {
                    return Counted::NotYet;
                }
                let invited = Invited {
                    by: waiting.sender,
                    verifier: *verifier,
                    role: *role,
                    member: *member,
                    expires: *expires,
                };
                // an invite id derives from its code: a second one under it is a copy, and the lowest maker stands
                match self.invites.get(id) {
                    Some(known) if known.by <= invited.by => Counted::Yes { changed: false },
                    _ => {
                        self.invites.insert(*id, invited);
                        Counted::Yes { changed: false }
                    }
                }
            }
            Operation::Revoke { id } => {
                self.revoked.insert(*id);
                Counted::Yes { changed: false }
            }
            _ => Counted::Never,
        }
    }

    fn admit(
        &mut self,
        waiting: &Waiting,
        keys: &AuthorKeys,
        member: MemberId,
        role: Role,
        invite: Option<InviteId>,
    ) -> Counted {
        let by = waiting.sender;
        let admission = Admission { member, hash: waiting.hash, envelope: waiting.envelope.clone() };
        let Some(known) = self.authors.get_mut(&keys.verify) else {
            let admissions = BTreeMap::from([(by, admission)]);
            let admitted =
                Admitted { keys: keys.clone(), member, role, invite, by: Some(by), hash: waiting.hash, admissions };
            self.authors.insert(keys.verify, admitted);
            return Counted::Yes { changed: true };
        };
        if known.by.is_none() {
            return Counted::Yes { changed: false };
        }
        // of several admissions the strongest role counts, so that what was allowed once stays allowed; of the rest the
        // lowest hash, so that the order of arrival does not matter; and by one author one, so that they stay few
        let stronger = role < known.role;
        known.role = known.role.min(role);
        if admission.hash < known.hash {
            (known.keys, known.member, known.invite) = (keys.clone(), member, invite);
            (known.by, known.hash) = (Some(by), admission.hash);
        }
        let own = known.admissions.entry(by).or_insert_with(|| admission.clone());
        let other_member = own.member != admission.member;
        if admission.hash < own.hash {
            *own = admission;
        }
        Counted::Yes { changed: stronger || other_member }
    }
}

fn chain_from(founder: AuthorId, reached: &BTreeMap<AuthorId, Option<(AuthorId, &Admission)>>) -> Vec<Vec<u8>> {
    let mut chain = Vec::new();
    let mut at = founder;
    while let Some(Some((author, admission))) = reached.get(&at) {
        chain.push(admission.envelope.to_vec());
        at = *author;
    }
    chain
}

enum Counted {
    Yes { changed: bool },
    NotYet,
    Never,
}
