//! Who belongs to a group: a pure function of its charter and a set of signed operations, whatever their order.
//!
//! An operation counts when its sender is admitted and may do what it does.
//! Rights only ever grow by admissions, so an operation that does not count yet is kept and looked at again.
//!
//! Each admission gives its author a standing, a role and a member; what justifies an operation is one standing of its
//! sender and never a mixture.
//! So whatever counts has a chain of admissions from the founder that shows it alone: a token.

use std::collections::btree_map::Entry;
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
    /// Every admission of it that counts: nobody can take another's place away by admitting it again.
    admissions: BTreeMap<Standing, Admission>,
}

/// As what an author belongs to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    role: Role,
    member: MemberId,
}

/// As what an author was let in, by whom and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Standing {
    by: AuthorId,
    place: Place,
    /// It succeeds who let it in, in that one's place.
    succeeds: bool,
}

/// Of several for one standing the one with the lowest hash, so that they stay few.
#[derive(Debug, Clone)]
struct Admission {
    hash: EnvelopeHash,
    envelope: Arc<[u8]>,
}

impl Admitted {
    /// Whether some admission counts it to a member.
    #[must_use]
    pub fn belongs_to(&self, member: &MemberId) -> bool {
        self.places().any(|place| place.member == *member)
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        let own = Place { role: self.role, member: self.member };
        std::iter::once(own).chain(self.admissions.keys().map(|standing| standing.place))
    }
}

impl Place {
    /// Whether who stands here may let an author in as `place`.
    fn may_admit(&self, author: &AuthorId, place: &Self) -> bool {
        let newcomer = place.member == MemberId::from(*author);
        self.role.may_invite() && place.role >= self.role && (newcomer || place.member == self.member)
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
    waiting: Vec<Arc<Waiting>>,
    /// Successions by their predecessor: what it is given later, its successors have too.
    heirs: BTreeMap<AuthorId, Vec<Arc<Waiting>>>,
}

#[derive(Debug)]
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
            heirs: BTreeMap::new(),
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
    ///
    /// Each counts by the one before alone, whatever else is known: an author that was let in twice may have the right to
    /// let others in from one of the two.
    #[must_use]
    pub fn token(&self, author: &AuthorId) -> Option<Vec<Vec<u8>>> {
        let mut let_in: BTreeMap<AuthorId, Vec<(AuthorId, &Standing, &Admission)>> = BTreeMap::new();
        for (id, admitted) in &self.authors {
            for (standing, admission) in &admitted.admissions {
                let_in.entry(standing.by).or_default().push((*id, standing, admission));
            }
        }
        let founder = self.charter.founder.verify;
        let start = (founder, self.authors.get(&founder)?.places().next()?);
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

    /// Whether an envelope may be looked at: its sender is admitted, or it succeeds one who is.
    ///
    /// The proof of a succession is checked here; the envelope's own signature is the caller's business.
    pub fn examine(&self, envelope: &Envelope<'_>) -> Result<SignedOperation, MembershipError> {
        let sender = envelope.header.sender;
        let signed = SignedOperation::decode(envelope.payload())?;
        let Operation::Succeed { keys, member, predecessor, proof } = &signed.operation else {
            return if self.is_admitted(&sender) { Ok(signed) } else { Err(MembershipError::NotAdmitted(sender)) };
        };
        // also of one who belongs already: it could make anyone anyone's successor
        let own = keys.verify == sender && envelope.header.number == Number(1);
        let statement = succession_statement(keys, *member);
        if !own || !verify(predecessor, SignPurpose::Succession, &[&self.group.0, &statement], proof) {
            return Err(MembershipError::SuccessionForged(sender));
        }
        let succeeds = self.authors.get(predecessor).is_some_and(|before| before.belongs_to(member));
        if succeeds || self.is_admitted(&sender) { Ok(signed) } else { Err(MembershipError::NotAdmitted(sender)) }
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
        let new = Arc::new(Waiting { sender, hash, operation, envelope });
        if let Operation::Succeed { predecessor, .. } = &new.operation {
            self.heirs.entry(*predecessor).or_default().push(new.clone());
        }
        match self.count(&new) {
            Counted::Grown(author) => {
                self.settle(author);
                return Ok(true);
            }
            // it cannot make any other count, so those that wait are not looked at: there may be many
            Counted::NotYet => self.waiting.push(new),
            Counted::Yes | Counted::Never => {}
        }
        Ok(false)
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

    fn count(&mut self, waiting: &Waiting) -> Counted {
        match &waiting.operation {
            Operation::Admit { keys, member, role, invite } => {
                let place = Place { role: *role, member: *member };
                let may = |own: Place| own.may_admit(&keys.verify, &place);
                if !self.places(&waiting.sender).into_iter().any(may) {
                    return Counted::NotYet;
                }
                if let Some(invite) = invite {
                    let first = self.used.entry(*invite).or_insert(keys.verify);
                    *first = (*first).min(keys.verify);
                }
                self.admit(waiting, keys, Standing { by: waiting.sender, place, succeeds: false }, *invite)
            }
            Operation::Succeed { keys, member, predecessor, .. } => {
                let mut counted = Counted::NotYet;
                for place in self.places(predecessor).into_iter().filter(|place| place.member == *member) {
                    let standing = Standing { by: *predecessor, place, succeeds: true };
                    match self.admit(waiting, keys, standing, None) {
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
                if !self.places(&waiting.sender).into_iter().any(may) {
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
                let known = self.invites.entry(*id).or_insert_with(|| invited.clone());
                if invited < *known {
                    *known = invited;
                }
                Counted::Yes
            }
            Operation::Revoke { id } => {
                self.revoked.insert(*id);
                Counted::Yes
            }
            _ => Counted::Never,
        }
    }

    fn places(&self, author: &AuthorId) -> Vec<Place> {
        self.authors.get(author).map(|admitted| admitted.places().collect()).unwrap_or_default()
    }

    fn admit(&mut self, waiting: &Waiting, keys: &AuthorKeys, standing: Standing, invite: Option<InviteId>) -> Counted {
        let Standing { by, place: Place { role, member }, .. } = standing;
        let (author, hash) = (keys.verify, waiting.hash);
        let admission = Admission { hash, envelope: waiting.envelope.clone() };
        let admitted =
            |admissions| Admitted { keys: keys.clone(), member, role, invite, by: Some(by), hash, admissions };
        let known = self.authors.entry(author).or_insert_with(|| admitted(BTreeMap::new()));
        if known.by.is_none() {
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

enum Counted {
    Yes,
    /// And an author has a standing it did not have.
    Grown(AuthorId),
    NotYet,
    Never,
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use sync_crypto::AuthorSecret;
    use sync_types::{BlobId, Chunker, Draft, EnvelopeType, EpochId, GroupKind, Header, Quorum};

    use super::*;

    /// The founder and others.
    static AUTHORS: LazyLock<Vec<(AuthorSecret, AuthorKeys)>> = LazyLock::new(|| {
        let author = |seed| AuthorSecret::from_bytes(&[seed; 96]);
        (1..=6).map(|seed| (author(seed), author(seed).keys())).collect()
    });

    fn keys(author: usize) -> AuthorKeys {
        AUTHORS[author].1.clone()
    }

    fn id(author: usize) -> AuthorId {
        keys(author).verify
    }

    fn charter() -> Vec<u8> {
        let (quorum, chunker) = (Quorum::default(), Chunker::default());
        let (kind, founder) = (GroupKind::Random, keys(0));
        Charter { kind, founder, quorum, suite: 1, chunker, nonce: [1; 32], commitment: [0; 32] }.encode()
    }

    /// Operations are judged elsewhere by who signed them, so nobody does here.
    fn envelope(by: usize, number: u64, operation: Operation) -> Vec<u8> {
        let payload = SignedOperation { seen: vec![], operation }.encode();
        let header = Header {
            kind: EnvelopeType::Push,
            sender: id(by),
            group: GroupId::of(&charter()),
            timestamp: Timestamp(1),
            nonce: [0; 24],
            blob_id: BlobId([0; 16]),
            number: Number(number),
            previous: if number == 1 { EnvelopeHash::NONE } else { EnvelopeHash([1; 32]) },
            class: Class::Membership,
            epoch: EpochId::NONE,
            commitment: [0; 32],
        };
        let mut draft = Draft::new(&header, payload.len()).expect("a draft");
        draft.payload_mut().copy_from_slice(&payload);
        draft.sign(&[0; 64])
    }

    fn admit(by: usize, author: usize, member: usize, role: Role) -> Vec<u8> {
        envelope(by, 2, Operation::Admit { keys: keys(author), member: id(member).into(), role, invite: None })
    }

    /// That an author precedes another, as `sender` says.
    fn succeed(sender: usize, author: usize, member: usize, predecessor: usize) -> Vec<u8> {
        let (keys, member) = (keys(author), id(member).into());
        let statement = succession_statement(&keys, member);
        let group = GroupId::of(&charter());
        let proof = AUTHORS[predecessor].0.sign(SignPurpose::Succession, &[&group.0, &statement]);
        envelope(sender, 1, Operation::Succeed { keys, member, predecessor: id(predecessor), proof })
    }

    fn apply(membership: &mut Membership, bytes: &[u8]) -> Result<bool, MembershipError> {
        membership.apply(&Envelope::parse(bytes).expect("an envelope"))
    }

    /// What operations make of a group, each tried again while others count.
    fn evaluate(operations: &[Vec<u8>]) -> Membership {
        let mut membership = Membership::new(&charter()).expect("a charter");
        let mut left: Vec<&Vec<u8>> = operations.iter().collect();
        loop {
            let before = left.len();
            left.retain(|bytes| apply(&mut membership, bytes).is_err());
            if left.len() == before {
                return membership;
            }
        }
    }

    #[test]
    fn who_belongs_cannot_name_another_a_successor() {
        let mut membership = evaluate(&[admit(0, 1, 1, Role::Guest)]);
        let forged = [
            // another's key, with and without a proof of the predecessor
            succeed(1, 2, 0, 0),
            succeed(1, 2, 0, 1),
            // their own key, without one
            envelope(
                1,
                1,
                Operation::Succeed { keys: keys(1), member: id(0).into(), predecessor: id(0), proof: [9; 64] },
            ),
        ];
        for bytes in forged {
            assert!(matches!(apply(&mut membership, &bytes), Err(MembershipError::SuccessionForged(_))));
        }
        assert!(!membership.is_admitted(&id(2)));
        assert_eq!(membership.author(&id(1)).map(|author| author.role), Some(Role::Guest));
    }

    #[test]
    fn a_token_leads_over_an_admission_that_gives_the_right_it_needs() {
        // 3 lets in 4 as an admin, which it is by 1 and not by 2
        let common = [admit(0, 1, 1, Role::Admin), admit(0, 2, 2, Role::Member), admit(1, 3, 3, Role::Admin)];
        for weaker in [admit(2, 3, 3, Role::Member), admit(0, 3, 3, Role::Member)] {
            let operations = [&common[..], &[weaker, admit(3, 4, 4, Role::Admin)]].concat();
            let token = evaluate(&operations).token(&id(4)).expect("a token");
            assert_eq!(evaluate(&token).author(&id(4)).map(|author| author.role), Some(Role::Admin));
        }
    }

    #[test]
    fn what_a_predecessor_is_given_later_its_successor_has_too() {
        let early = [admit(0, 1, 1, Role::Member), succeed(2, 2, 1, 1), admit(0, 1, 1, Role::Admin)];
        let role = |membership: &Membership| membership.author(&id(2)).map(|author| author.role);
        assert_eq!(role(&evaluate(&early)), Some(Role::Admin));
        let late = [early[0].clone(), early[2].clone(), early[1].clone()];
        assert_eq!(role(&evaluate(&late)), Some(Role::Admin));
    }

    #[test]
    fn another_admission_takes_no_devices_away() {
        // 2 is a device of 1; that 5 lets it in as a person of its own leaves it the right to let in 3 for 1
        let operations = [
            admit(0, 1, 1, Role::Member),
            admit(0, 5, 5, Role::Member),
            admit(1, 2, 1, Role::Member),
            admit(5, 2, 2, Role::Member),
            admit(2, 3, 1, Role::Member),
        ];
        for at in 0..operations.len() {
            let mut order = operations.to_vec();
            order.rotate_left(at);
            let admitted = evaluate(&order);
            assert!(admitted.author(&id(3)).is_some_and(|author| author.belongs_to(&id(1).into())), "{at}");
        }
    }

    #[derive(Debug, Clone)]
    enum Drawn {
        Admit { by: usize, author: usize, member: usize, role: Role },
        Succeed { author: usize, member: usize, predecessor: usize },
    }

    impl Drawn {
        fn encode(&self) -> Vec<u8> {
            match *self {
                Self::Admit { by, author, member, role } => admit(by, author, member, role),
                Self::Succeed { author, member, predecessor } => succeed(author, author, member, predecessor),
            }
        }
    }

    fn drawn() -> impl Strategy<Value = Drawn> {
        let all = AUTHORS.len();
        let role = prop_oneof![3 => Just(Role::Admin), 3 => Just(Role::Member), 1 => Just(Role::Guest)];
        let admission = (0..all, 1..all, 0..all, role, 0usize..4);
        prop_oneof![
            4 => admission.prop_map(|(by, author, other, role, whose)| {
                let member = [author, author, by, other][whose];
                Drawn::Admit { by, author, member, role }
            }),
            1 => (1..all, 0..all, 0..all, any::<bool>()).prop_map(|(author, other, predecessor, same)| {
                Drawn::Succeed { author, member: if same { predecessor } else { other }, predecessor }
            }),
        ]
    }

    /// All there is to say of who belongs.
    fn shown(membership: &Membership) -> Vec<String> {
        let author = |(id, author): (&AuthorId, &Admitted)| {
            let (places, token) = (author.places().collect::<BTreeSet<_>>(), membership.token(id));
            let token: Vec<EnvelopeHash> = token.iter().flatten().map(|bytes| hash(bytes)).collect();
            format!("{id:?} {:?} {:?} {:?} {places:?} {token:?}", author.role, author.member, author.by)
        };
        membership.authors().map(author).collect()
    }

    fn hash(bytes: &[u8]) -> EnvelopeHash {
        Envelope::parse(bytes).expect("an envelope").hash()
    }

    proptest! {
        #[test]
        fn who_belongs_does_not_hang_on_the_order_and_each_can_show_it(
            (some, others) in proptest::collection::vec(drawn(), 0..24)
                .prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))
        ) {
            let of = |drawn: &[Drawn]| evaluate(&drawn.iter().map(Drawn::encode).collect::<Vec<_>>());
            let (one, other) = (of(&some), of(&others));
            prop_assert_eq!(shown(&one), shown(&other));
            for (author, _) in one.authors() {
                let mut alone = Membership::new(&charter()).expect("a charter");
                for bytes in &one.token(author).expect("a token") {
                    prop_assert!(apply(&mut alone, bytes).is_ok());
                }
                prop_assert!(alone.is_admitted(author));
            }
        }
    }
}
