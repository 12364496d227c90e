//! Admissions, removals, and the attacks on both.

use std::sync::LazyLock;

use proptest::prelude::*;
use sync_crypto::AuthorSecret;
use sync_crypto::pairing::consent;
use sync_types::{BlobId, Chunker, Draft, EnvelopeType, EpochId, GroupKind, Header, Quorum};

use super::*;

/// The founder and others.
static AUTHORS: LazyLock<Vec<(AuthorSecret, AuthorKeys)>> = LazyLock::new(|| {
    let author = |seed| AuthorSecret::from_bytes(&[seed; 96]);
    (1..=8).map(|seed| (author(seed), author(seed).keys())).collect()
});

fn keys(author: usize) -> AuthorKeys {
    AUTHORS[author].1.clone()
}

fn id(author: usize) -> AuthorId {
    keys(author).verify
}

/// Two signatures are needed where there are more than four members.
fn charter() -> Vec<u8> {
    let (quorum, chunker) = (Quorum { small_group: 4, small: 1, large: 2 }, Chunker::default());
    let (kind, founder) = (GroupKind::Random, keys(0));
    Charter { kind, founder, quorum, suite: 1, chunker, nonce: [1; 32], commitment: [0; 32] }.encode()
}

fn envelope(by: usize, number: u64, operation: Operation) -> Vec<u8> {
    signed(by, number, vec![], operation)
}

/// Operations are judged elsewhere by who signed them, so nobody does here.
fn signed(by: usize, number: u64, seen: Vec<EnvelopeHash>, operation: Operation) -> Vec<u8> {
    let payload = SignedOperation { seen, operation }.encode();
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
    envelope(by, 2, admission(author, member, role))
}

fn admission(author: usize, member: usize, role: Role) -> Operation {
    let consent = consent(&AUTHORS[author].0, [0; 32], None);
    Operation::Admit { keys: keys(author), member: id(member).into(), role, invite: None, consent }
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
        envelope(1, 1, Operation::Succeed { keys: keys(1), member: id(0).into(), predecessor: id(0), proof: [9; 64] }),
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
    let all = 6usize;
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
    let mut shown: Vec<String> = membership.authors().map(author).collect();
    shown.extend(membership.ends().iter().map(|(author, end)| format!("{author:?} ended {end:?}")));
    shown.extend(membership.pending_removals().iter().map(|pending| format!("{pending:?}")));
    let epochs = (1..4).map(|number| EpochId { number, hash: [7; 32] });
    shown.extend(epochs.map(|epoch| {
        let by = (0..AUTHORS.len()).map(|by| membership.may_seal_in(&epoch, &id(by)));
        format!("{epoch:?} {:?}", by.collect::<Vec<_>>())
    }));
    shown.push(format!("{:?}", membership.tips));
    shown
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

/// What one device knows, and what it makes of that.
#[derive(Clone)]
struct View {
    membership: Membership,
    log: Vec<Vec<u8>>,
}

impl View {
    fn new() -> Self {
        Self { membership: Membership::new(&charter()).expect("a charter"), log: Vec::new() }
    }

    fn take(&mut self, bytes: &[u8]) {
        if !self.log.iter().any(|known| known == bytes) && apply(&mut self.membership, bytes).is_ok() {
            self.log.push(bytes.to_vec());
        }
    }

    fn merge(&mut self, other: &Self) {
        // an operation may stand before what admits its sender
        for _ in 0..2 {
            other.log.iter().for_each(|bytes| self.take(bytes));
        }
    }

    /// An operation of an author that has seen everything here; it is not taken in.
    fn make(&self, by: usize, operation: Operation) -> Vec<u8> {
        let number = 2 + self.membership.latest.get(&id(by)).map_or(0, |(number, _)| number.0);
        signed(by, number, self.membership.seen_by(&id(by)), operation)
    }

    fn act(&mut self, by: usize, operation: Operation) -> EnvelopeHash {
        let bytes = self.make(by, operation);
        apply(&mut self.membership, &bytes).expect("its sender was admitted");
        self.log.push(bytes.clone());
        hash(&bytes)
    }

    /// Admits persons, the founder every one of them.
    fn with(people: std::ops::RangeInclusive<usize>) -> Self {
        let mut view = Self::new();
        for person in people {
            view.act(0, admission(person, person, Role::Member));
        }
        view
    }

    fn has(&self, author: usize) -> bool {
        self.membership.is_admitted(&id(author))
    }

    fn people(&self) -> Vec<usize> {
        (0..AUTHORS.len()).filter(|author| self.has(*author)).collect()
    }
}

fn cut(author: usize, number: u64) -> Cut {
    Cut { author: id(author), number: Number(number), hash: EnvelopeHash([1; 32]) }
}

fn remove(author: usize) -> Operation {
    Operation::Remove { member: id(author).into(), cuts: vec![cut(author, 9)] }
}

fn approve(tombstone: EnvelopeHash, author: usize, number: u64) -> Operation {
    Operation::Approve { tombstone, cuts: vec![cut(author, number)] }
}

fn rotation(number: u32) -> (EpochId, Operation) {
    let epoch = EpochId { number, hash: [7; 32] };
    (epoch, Operation::Rotate { epoch })
}

/// Both views once each knows what the other does.
fn merged(mut one: View, mut other: View) -> View {
    let before = one.clone();
    one.merge(&other);
    other.merge(&before);
    assert_eq!(shown(&one.membership), shown(&other.membership));
    one
}

#[test]
fn a_member_is_removed_with_all_its_devices_and_its_feeds_end_where_the_tombstone_says() {
    let mut view = View::with(1..=2);
    view.act(1, admission(3, 1, Role::Member));
    view.act(0, remove(1));
    assert_eq!(view.people(), vec![0, 2]);
    assert_eq!(view.membership.belonging(&id(1)), Belonging::Until(cut(1, 9)));
    let nothing = Cut { author: id(3), number: Number(0), hash: EnvelopeHash::NONE };
    assert_eq!(view.membership.belonging(&id(3)), Belonging::Until(nothing), "what is not named ends before it begins");
    assert_eq!(view.membership.belonging(&id(4)), Belonging::Never);
    assert!(view.membership.token(&id(2)).is_some());
}

#[test]
fn who_was_let_in_by_a_removed_member_stays_if_the_tombstone_had_seen_it() {
    let mut view = View::with(1..=1);
    let mut apart = view.clone();
    view.act(1, admission(2, 2, Role::Member));
    apart.act(1, admission(3, 3, Role::Member));
    view.act(0, remove(1));
    assert_eq!(merged(view, apart).people(), vec![0, 2]);
}

#[test]
fn g1_a_removed_member_comes_back_by_no_admission_and_no_succession() {
    let mut view = View::with(1..=2);
    view.act(0, remove(1));
    let mut again = view.clone();
    for operation in [admission(1, 1, Role::Member), admission(1, 1, Role::Admin)] {
        again.act(0, operation);
        assert!(!again.has(1), "a removal is final");
    }
    // by a device that it lets in itself, and by a key that its own one signs for
    let mut own = view.clone();
    own.take(&signed(1, 20, view.membership.seen_by(&id(1)), admission(3, 1, Role::Member)));
    own.take(&signed(1, 22, view.membership.seen_by(&id(1)), admission(4, 4, Role::Member)));
    own.take(&succeed(5, 5, 1, 1));
    assert_eq!(own.people(), vec![0, 2]);
    assert_eq!(
        own.membership.token(&id(1)).map(|token| token.len()),
        Some(1),
        "the chain is still there, and is no use"
    );
}

#[test]
fn g2_what_a_removed_admin_dates_back_does_not_count() {
    let mut view = View::with(1..=1);
    view.act(0, admission(2, 2, Role::Admin));
    let before = view.clone();
    view.act(0, remove(2));
    // it says that it knew of nothing, or only of what was before
    for seen in [vec![], before.membership.seen_by(&id(2))] {
        for (number, operation) in [(2, remove(1)), (3, admission(3, 3, Role::Admin)), (4, rotation(2).1)] {
            let mut attacked = view.clone();
            attacked.take(&signed(2, number, seen.clone(), operation));
            assert_eq!(attacked.people(), vec![0, 1]);
            assert!(attacked.membership.may_seal_in(&rotation(2).0, &id(2)).is_none());
        }
    }
}

#[test]
fn g3_a_large_group_needs_two_different_members_that_may() {
    let mut view = View::with(1..=4);
    view.act(0, admission(5, 5, Role::Guest));
    view.act(1, admission(6, 1, Role::Member));
    let tombstone = view.act(1, remove(4));
    assert!(view.has(4));
    assert_eq!(view.membership.pending_removals().len(), 1);
    // the same author again, another device of the same member, a guest, the one it is about, a stranger
    for (by, operation) in [
        (1, approve(tombstone, 4, 9)),
        (1, remove(4)),
        (6, approve(tombstone, 4, 9)),
        (5, approve(tombstone, 4, 9)),
        (4, approve(tombstone, 4, 9)),
    ] {
        view.act(by, operation);
        assert!(view.has(4), "{by}");
    }
    assert!(apply(&mut view.membership, &signed(7, 1, vec![tombstone], approve(tombstone, 4, 9))).is_err());
    view.act(2, approve(tombstone, 4, 5));
    assert!(!view.has(4));
    assert_eq!(view.membership.belonging(&id(4)), Belonging::Until(cut(4, 5)), "of two ends the lower");
    assert!(view.membership.pending_removals().is_empty());
}

#[test]
fn g3_signatures_of_who_was_removed_count_only_if_the_removal_had_seen_them() {
    let view = View::with(1..=5);
    let (mut one, mut other) = (view.clone(), view);
    let tombstone = one.act(1, remove(5));
    one.act(2, approve(tombstone, 5, 9));
    assert!(!one.has(5));
    let second = other.act(3, remove(2));
    other.act(4, approve(second, 2, 9));
    let all = merged(one, other);
    // the second signer is out, and its signature with it
    assert_eq!(all.people(), vec![0, 1, 3, 4, 5]);
}

#[test]
fn g3_who_has_acted_in_a_large_group_cannot_name_a_past_in_which_it_was_small() {
    let mut view = View::with(1..=2);
    let small = view.clone();
    for person in 3..=5 {
        view.act(0, admission(person, person, Role::Member));
    }
    let honest = {
        let mut apart = small.clone();
        apart.act(1, remove(2));
        merged(apart, view.clone())
    };
    assert!(!honest.has(2), "what sufficed once suffices");
    view.act(1, Operation::Revoke { id: InviteId([1; 16]) });
    view.take(&signed(1, 40, small.membership.seen_by(&id(1)), remove(2)));
    assert!(view.has(2));
}

#[test]
fn g4_of_two_tombstones_that_cut_each_other_one_counts_and_it_is_everywhere_the_same() {
    // more signers first
    let mut view = View::with(1..=5);
    let mut other = view.clone();
    let two = view.act(2, remove(1));
    view.act(3, approve(two, 1, 9));
    view.act(4, approve(two, 1, 9));
    let three = other.act(1, remove(2));
    other.act(5, approve(three, 2, 9));
    assert_eq!(merged(view, other).people(), vec![0, 2, 3, 4, 5]);
    // of equally many the one whose signer was admitted earlier
    let (mut view, mut other) = (View::with(1..=2), View::with(1..=2));
    view.act(1, remove(2));
    other.act(2, remove(1));
    assert_eq!(merged(view, other).people(), vec![0, 1]);
    // three in a ring
    let views = [(1, 2), (2, 3), (3, 1)].map(|(by, whom)| {
        let mut view = View::with(1..=3);
        view.act(by, remove(whom));
        view
    });
    let [one, two, three] = views;
    assert_eq!(merged(merged(one, two), three).people(), vec![0, 1, 3]);
}

#[test]
fn g4_only_an_admin_removes_an_admin_and_the_last_one_stays_for_others() {
    let mut view = View::with(1..=1);
    view.act(1, remove(0));
    assert_eq!(view.people(), vec![0, 1]);
    view.act(0, admission(2, 2, Role::Admin));
    view.act(2, remove(0));
    assert_eq!(view.people(), vec![1, 2]);
    assert!(view.membership.token(&id(1)).is_some(), "chains begin at the founder, removed or not");
}

#[test]
fn a_member_takes_a_device_of_its_own_out_alone_and_nobody_elses() {
    let mut view = View::with(1..=5);
    view.act(1, admission(6, 1, Role::Member));
    let withdraw =
        |member: usize, author| Operation::Withdraw { member: id(member).into(), cuts: vec![cut(author, 3)] };
    view.act(2, withdraw(1, 6));
    view.act(2, withdraw(2, 6));
    assert!(view.has(6));
    view.act(1, withdraw(1, 6));
    assert_eq!(view.people(), vec![0, 1, 2, 3, 4, 5]);
    assert_eq!(view.membership.belonging(&id(6)), Belonging::Until(cut(6, 3)));
    view.act(5, withdraw(5, 5));
    assert!(!view.has(5), "and leaves");
}

#[test]
fn g9_g15_nobody_is_admitted_under_keys_that_it_did_not_sign() {
    let mut membership = evaluate(&[admit(0, 1, 1, Role::Member)]);
    let mut keys = keys(1);
    keys.kem = AUTHORS[2].1.kem.clone();
    let consents = [consent(&AUTHORS[1].0, [0; 32], None), consent(&AUTHORS[2].0, [0; 32], None)];
    for consent in consents {
        let (keys, member) = (keys.clone(), id(1).into());
        let bytes = envelope(0, 4, Operation::Admit { keys, member, role: Role::Admin, invite: None, consent });
        assert_eq!(apply(&mut membership, &bytes), Err(MembershipError::AdmissionForged(id(1))));
    }
}

#[test]
fn g13_nobody_can_keep_removals_from_counting_by_naming_what_cannot_be_had() {
    let mut view = View::with(1..=2);
    view.take(&signed(1, 6, vec![EnvelopeHash([66; 32])], Operation::Revoke { id: InviteId([1; 16]) }));
    view.act(0, remove(1));
    assert_eq!(view.people(), vec![0, 2]);
}

#[test]
fn g5_after_a_removal_only_an_epoch_counts_whose_maker_had_seen_it() {
    let mut view = View::with(1..=2);
    let first = EpochId { number: 1, hash: [1; 32] };
    assert!(view.membership.may_seal_in(&first, &id(0)).is_some());
    let (second, operation) = rotation(2);
    view.act(1, operation);
    assert_eq!(view.membership.may_seal_in(&second, &id(1)).map(|reached| reached.len()), Some(3));
    let mut apart = view.clone();
    view.act(0, remove(1));
    let (third, operation) = rotation(3);
    apart.act(2, operation.clone());
    let mut all = merged(view, apart);
    // that somebody says of an older epoch that it was made later changes nothing
    all.act(0, operation.clone());
    all.act(2, operation);
    for (epoch, by) in [(first, 0), (second, 1), (third, 2)] {
        assert!(all.membership.may_seal_in(&epoch, &id(by)).is_none(), "{epoch:?}");
    }
    let (fourth, operation) = rotation(4);
    all.act(2, operation);
    assert_eq!(all.membership.may_seal_in(&fourth, &id(2)).map(|reached| reached.len()), Some(2));
}

#[test]
fn g5_an_epoch_counts_only_if_every_member_has_it() {
    let mut view = View::with(1..=1);
    let mut apart = view.clone();
    let (epoch, operation) = rotation(2);
    view.act(1, operation);
    assert!(view.membership.may_seal_in(&epoch, &id(1)).is_some());
    // let in by who knew the epoch: it was told
    view.act(1, admission(2, 2, Role::Member));
    assert!(view.membership.may_seal_in(&epoch, &id(1)).is_some());
    // by who did not
    apart.act(0, admission(3, 3, Role::Member));
    let all = merged(view, apart);
    assert!(all.membership.may_seal_in(&epoch, &id(1)).is_none());
    assert!(all.membership.may_seal_in(&EpochId { number: 1, hash: [1; 32] }, &id(0)).is_some());
}

#[derive(Debug, Clone)]
enum Step {
    Admit { at: usize, by: usize, author: usize, member: usize, role: Role },
    Remove { at: usize, by: usize, whom: usize },
    Withdraw { at: usize, by: usize, author: usize },
    Approve { at: usize, by: usize },
    Rotate { at: usize, by: usize, number: u32 },
    Lie { at: usize, by: usize, whom: usize },
    Meet { one: usize, other: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (view, person) = (0usize..3, 0usize..8);
    let role = prop_oneof![1 => Just(Role::Admin), 4 => Just(Role::Member), 1 => Just(Role::Guest)];
    prop_oneof![
        6 => (view.clone(), person.clone(), person.clone(), any::<bool>(), role).prop_map(
            |(at, by, author, own, role)| Step::Admit { at, by, author, member: if own { by } else { author }, role }),
        4 => (view.clone(), person.clone(), person.clone()).prop_map(|(at, by, whom)| Step::Remove { at, by, whom }),
        1 => (view.clone(), person.clone(), person.clone()).prop_map(|(at, by, author)| Step::Withdraw { at, by, author }),
        3 => (view.clone(), person.clone()).prop_map(|(at, by)| Step::Approve { at, by }),
        2 => (view.clone(), person.clone(), 2u32..4).prop_map(|(at, by, number)| Step::Rotate { at, by, number }),
        1 => (view.clone(), person.clone(), person).prop_map(|(at, by, whom)| Step::Lie { at, by, whom }),
        2 => (view.clone(), view).prop_map(|(one, other)| Step::Meet { one, other }),
    ]
}

/// What three devices make of their steps, and everything any of them knows at the end.
fn play(steps: &[Step]) -> Vec<Vec<u8>> {
    let mut start = View::with(1..=5);
    start.act(0, admission(6, 1, Role::Member));
    let mut views = [start.clone(), start.clone(), start];
    for step in steps {
        let (at, by, operation) = match step.clone() {
            Step::Admit { at, by, author, member, role } => (at, by, admission(author, member, role)),
            Step::Remove { at, by, whom } => (at, by, remove(whom)),
            Step::Withdraw { at, by, author } => {
                let Some(member) = views[at].membership.author(&id(by)).map(|admitted| admitted.member) else {
                    continue;
                };
                (at, by, Operation::Withdraw { member, cuts: vec![cut(author, 4)] })
            }
            Step::Approve { at, by } => {
                let Some(tombstone) = views[at].membership.pending_removals().first().map(|pending| pending.tombstone)
                else {
                    continue;
                };
                (at, by, Operation::Approve { tombstone, cuts: vec![] })
            }
            Step::Rotate { at, by, number } => (at, by, rotation(number).1),
            Step::Lie { at, by, whom } => {
                let lie = signed(by, 50, views[at].membership.tips.iter().take(1).copied().collect(), remove(whom));
                views[at].take(&lie);
                continue;
            }
            Step::Meet { one, other } => {
                let known = views[other].clone();
                views[one].merge(&known);
                continue;
            }
        };
        if views[at].membership.was_admitted(&id(by)) {
            views[at].act(by, operation);
        }
    }
    let [mut one, two, three] = views;
    one.merge(&two);
    one.merge(&three);
    one.log
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whoever_holds_the_same_operations_says_the_same_in_whatever_order_they_came(
        steps in proptest::collection::vec(step(), 0..14), seed: u64,
    ) {
        let log = play(&steps);
        let expected = shown(&evaluate(&log));
        let mut order = log.clone();
        // a permutation of its own for each case
        let mut at = seed;
        for last in (1..order.len()).rev() {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(last, usize::try_from(at >> 33).unwrap_or(0) % (last + 1));
        }
        prop_assert_eq!(&shown(&evaluate(&order)), &expected);
        // two halves that meet
        let mut halves = [View::new(), View::new()];
        for (at, bytes) in order.iter().enumerate() {
            halves[at % 2].take(bytes);
        }
        let [mut one, other] = halves;
        for _ in 0..log.len() {
            let before = one.log.len();
            one.merge(&other);
            order.iter().for_each(|bytes| one.take(bytes));
            if one.log.len() == before {
                break;
            }
        }
        prop_assert_eq!(&shown(&one.membership), &expected);
    }
}
