//! A peer that lies: it speaks frames well enough to be listened to, and then says what it likes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, RwLock};

use rand_chacha::ChaCha20Rng;
use sync_client::keys::{Author, GroupKeys};
use sync_core::epochs::open_rotations;
use sync_core::session::{Side, hello_statement};
use sync_crypto::pairing::consent;
use sync_crypto::rotation::{Before, History, make_rotation};
use sync_crypto::{AuthorSecret, EpochSecret, SignPurpose};
use sync_store::{Content, SealEntries};
use sync_types::bounds::MAX_WANTS;
use sync_types::{
    AuthorId, AuthorKeys, BlobId, Carried, Check, Class, Consent, Cursor, Draft, Envelope, EnvelopeHash, EpochId,
    FeedHave, Frame, GroupId, InviteId, MemberId, Number, Operation, Range, ReplicaId, Role, Scope, SignedOperation,
    Timestamp, Want,
};

use crate::action::Lie;
use crate::random::{bytes, chance, derive, index};
use crate::replica::entry;

/// Request under which the liar pulls.
const REQUEST: u32 = 77;
/// PULLs of a bomb: more than a session may have waiting.
const BOMB: usize = 50;

/// The liar, across all its conversations.
pub(crate) struct Liar {
    rng: ChaCha20Rng,
    group: GroupId,
    replica: ReplicaId,
    author: Author,
    keys: Arc<RwLock<GroupKeys>>,
    token: Vec<Vec<u8>>,
    number: Number,
    head: EnvelopeHash,
    /// The head before, to branch from.
    before: EnvelopeHash,
    /// Everything it signed, or had vouched for by what it signed.
    pub(crate) signed: BTreeSet<EnvelopeHash>,
    /// Entries it was sent.
    loot: BTreeMap<EnvelopeHash, Vec<u8>>,
    haves: BTreeMap<AuthorId, FeedHave>,
    places: BTreeMap<ReplicaId, (Cursor, Check)>,
    tokens: Vec<(AuthorId, Vec<Vec<u8>>, [u8; 64])>,
}

/// One conversation of the liar.
#[derive(Debug, Clone)]
pub(crate) struct Talk {
    pub(crate) lie: Lie,
    /// Which end the liar is.
    pub(crate) side: Side,
    pub(crate) binding: [u8; 32],
    /// The database it says it is.
    replica: ReplicaId,
    asked: bool,
}

fn carried(entries: Vec<Vec<u8>>) -> Vec<Carried> {
    let carry = |(at, envelope)| Carried { cursor: Cursor(at as u64 + 1), envelope };
    entries.into_iter().enumerate().map(carry).collect()
}

fn response(request: u32, entries: Vec<Vec<u8>>, position: (Cursor, Check)) -> Frame {
    Frame::PullResponse {
        request,
        entries: carried(entries),
        max_cursor: position.0,
        check: position.1,
        has_more: false,
        reset: false,
        holds_from: Cursor(1),
    }
}

fn push(entries: Vec<Vec<u8>>, position: (Cursor, Check)) -> Frame {
    Frame::Push { entries: carried(entries), max_cursor: position.0, check: position.1 }
}

/// The envelope with another signature.
fn spoil_signature(envelope: &mut [u8]) {
    if let Some(last) = envelope.last_mut() {
        *last ^= 1;
    }
}

fn hash(envelope: &[u8]) -> EnvelopeHash {
    Envelope::parse(envelope).map_or(EnvelopeHash::NONE, |envelope| envelope.hash())
}

impl Liar {
    pub(crate) fn new(seed: u64, charter: &[u8]) -> Self {
        let mut rng = derive(seed, "liar");
        let secret = AuthorSecret::make(&mut rng);
        let replica = ReplicaId(bytes(&mut rng));
        let keys = GroupKeys::new(charter).expect("BUG: the simulator's charters are sound");
        let keys = Arc::new(RwLock::new(keys));
        let sealing = Arc::new(Mutex::new(derive(seed, "liar's nonces")));
        Self {
            rng,
            group: GroupId::of(charter),
            replica,
            author: Author::new(secret, keys.clone(), sealing),
            keys,
            token: Vec::new(),
            number: Number(0),
            head: EnvelopeHash::NONE,
            before: EnvelopeHash::NONE,
            signed: BTreeSet::new(),
            loot: BTreeMap::new(),
            haves: BTreeMap::new(),
            places: BTreeMap::new(),
            tokens: Vec::new(),
        }
    }

    pub(crate) fn id(&self) -> AuthorId {
        self.author.author()
    }

    pub(crate) fn public(&self) -> (AuthorKeys, Consent) {
        let secret = self.author.secret();
        (secret.keys(), consent(secret, [0; 32], None))
    }

    /// The epochs of these that open for it, by what it has and with all rotations there are.
    pub(crate) fn opens(&self, epochs: &BTreeSet<EpochId>, rotations: &[Vec<u8>]) -> Option<EpochId> {
        let known = self.keys.read().map(|keys| keys.everything()).unwrap_or_default();
        let secret = std::slice::from_ref(self.author.secret());
        let opened = open_rotations(&self.group, &known, rotations, secret);
        known.iter().chain(&opened).map(|(epoch, _)| *epoch).find(|epoch| epochs.contains(epoch))
    }

    /// Someone let it in.
    pub(crate) fn admit(&mut self, token: Vec<Vec<u8>>, epochs: Vec<(EpochId, EpochSecret)>) {
        self.token = token;
        for (epoch, secret) in epochs {
            self.learn(epoch, secret);
        }
    }

    fn learn(&self, epoch: EpochId, secret: EpochSecret) {
        if let Ok(mut keys) = self.keys.write() {
            // an epoch it cannot use is one lie less
            let _ = keys.insert(epoch, secret);
        }
    }

    pub(crate) fn talk(&mut self, lie: Lie, side: Side, binding: [u8; 32]) -> Talk {
        let replica = match lie {
            Lie::Impersonate if !self.places.is_empty() => {
                let at = index(&mut self.rng, self.places.len());
                self.places.keys().nth(at).copied().unwrap_or(self.replica)
            }
            _ => self.replica,
        };
        Talk { lie, side, binding, replica, asked: false }
    }

    /// What it says before it hears anything.
    pub(crate) fn begin(&mut self, talk: &Talk) -> Vec<Vec<u8>> {
        if talk.lie == Lie::Silence {
            return Vec::new();
        }
        match talk.side {
            Side::Dialler => self.greet(talk),
            Side::Acceptor => Vec::new(),
        }
    }

    fn greet(&mut self, talk: &Talk) -> Vec<Vec<u8>> {
        match talk.lie {
            Lie::Garbage => vec![self.garbage()],
            // an array of four thousand million elements, and a byte string as long
            Lie::LengthBomb => {
                vec![vec![0xdd, 0xff, 0xff, 0xff, 0xff], vec![0x92, 1, 0xc6, 0xff, 0xff, 0xff, 0xff]]
            }
            Lie::EarlyFrames => {
                let pull = self.pull(Scope::All, Vec::new());
                [push(vec![], (Cursor(9), Check([9; 8]))), pull].iter().map(Frame::encode).collect()
            }
            lie => vec![self.hello(talk, lie).encode()],
        }
    }

    fn hello(&mut self, talk: &Talk, lie: Lie) -> Frame {
        let borrowed = self.tokens.first().cloned();
        let (mut group, mut author, mut token) = (self.group, self.id(), self.token.clone());
        match (lie, borrowed) {
            (Lie::OtherGroup, _) => group = GroupId(bytes(&mut self.rng)),
            (Lie::NoToken, _) => {
                author = AuthorSecret::make(&mut self.rng).id();
                token.clear();
            }
            (Lie::OwnToken, _) => {
                let keys = AuthorSecret::make(&mut self.rng);
                author = keys.id();
                token = vec![self.self_admission(&keys)];
            }
            (Lie::BorrowedToken, Some((_, other, _))) => token = other,
            (Lie::OtherName | Lie::OldProof, Some((name, other, _))) => {
                author = name;
                token = other;
            }
            _ => {}
        }
        let statement = hello_statement(&talk.binding, talk.side, &group, &talk.replica);
        let proof = match (lie, self.tokens.first()) {
            (Lie::OldProof, Some((_, _, old))) => *old,
            _ => self.author.secret().sign(SignPurpose::Hello, &[&statement]),
        };
        Frame::Hello { group, author, replica: talk.replica, token, proof }
    }

    /// An author that admits itself.
    fn self_admission(&mut self, secret: &AuthorSecret) -> Vec<u8> {
        let keys = secret.keys();
        let consent = consent(secret, [0; 32], None);
        let member = MemberId::from(keys.verify);
        let operation = Operation::Admit { member, keys, role: Role::Admin, invite: None, consent };
        let content = Content::Membership(SignedOperation { seen: Vec::new(), operation }.encode());
        let entry = entry(BlobId(bytes(&mut self.rng)), Timestamp(1), content);
        let sealing = Arc::new(Mutex::new(derive(1, "self admission")));
        let author = Author::new(secret.clone(), self.keys.clone(), sealing);
        author.seal(Number(1), EnvelopeHash::NONE, &entry).unwrap_or_default()
    }

    fn garbage(&mut self) -> Vec<u8> {
        let mut garbage = vec![0; 1 + index(&mut self.rng, 400)];
        rand_core::Rng::fill_bytes(&mut self.rng, &mut garbage);
        if chance(&mut self.rng, 50) {
            // past the first check at least
            garbage.splice(0..0, [0x95, 1, [1, 2, 0x10, 0x20, 0x21, 0x22][index(&mut self.rng, 6)]]);
        }
        garbage
    }

    fn pull(&mut self, scope: Scope, have: Vec<FeedHave>) -> Frame {
        Frame::Pull {
            request: REQUEST,
            scope,
            after: Cursor(0),
            check: Check::NONE,
            limit: 1000,
            have,
            covered: Vec::new(),
        }
    }

    /// What it answers to a frame.
    pub(crate) fn hear(&mut self, talk: &mut Talk, frame: Frame) -> Vec<Vec<u8>> {
        if talk.lie == Lie::Silence {
            return Vec::new();
        }
        let answers = match frame {
            Frame::Hello { author, token, proof, .. } => {
                self.tokens.push((author, token.clone(), proof));
                self.keep(token);
                return if talk.side == Side::Acceptor { self.greet(talk) } else { Vec::new() };
            }
            Frame::Pull { request, scope: Scope::Membership, .. } => {
                let operations =
                    |bytes: &&Vec<u8>| Envelope::parse(bytes).is_ok_and(|e| e.header.class == Class::Membership);
                let entries = self.loot.values().filter(operations).cloned().collect();
                let mut answers = vec![response(request, entries, (Cursor(1), Check([1; 8])))];
                if !std::mem::replace(&mut talk.asked, true) {
                    answers.push(self.pull(Scope::Membership, Vec::new()));
                }
                answers
            }
            Frame::Pull { request, scope: Scope::All, have, .. } => {
                self.haves.extend(have.into_iter().map(|feed| (feed.author, feed)));
                return self.lie(talk, request);
            }
            Frame::PullResponse { request: REQUEST, entries, has_more, max_cursor, .. } => {
                self.keep(entries.into_iter().map(|carried| carried.envelope));
                let mut answers = vec![];
                if talk.asked && !has_more {
                    talk.asked = false;
                    let have = self.claims(talk);
                    answers.push(Frame::Welcome {
                        replica: talk.replica,
                        max_cursor: Cursor(1),
                        check: Check([1; 8]),
                        name: "a friend".to_owned(),
                        addresses: Vec::new(),
                        incarnation: [1; 8],
                    });
                    answers.push(self.pull(Scope::All, have));
                } else {
                    answers.push(Frame::PushAck { cursor: max_cursor });
                }
                answers
            }
            Frame::Push { entries, max_cursor, .. } => {
                self.keep(entries.into_iter().map(|carried| carried.envelope));
                vec![Frame::PushAck { cursor: max_cursor }]
            }
            Frame::Welcome { replica, max_cursor, check, .. } => {
                self.places.insert(replica, (max_cursor, check));
                vec![]
            }
            Frame::Want { request, wants } if talk.lie == Lie::Honest => {
                let wanted = |bytes: &&Vec<u8>| {
                    let named = |e: Envelope<'_>| {
                        wants.iter().any(|w| w.author == e.header.sender && w.range.contains(e.header.number))
                    };
                    Envelope::parse(bytes).is_ok_and(named)
                };
                let entries = self.loot.values().filter(wanted).cloned().collect();
                vec![response(request, entries, (Cursor(0), Check::NONE))]
            }
            _ => vec![],
        };
        answers.iter().map(Frame::encode).collect()
    }

    fn keep(&mut self, entries: impl IntoIterator<Item = Vec<u8>>) {
        self.loot.extend(entries.into_iter().map(|bytes| (hash(&bytes), bytes)));
    }

    /// What it says it holds.
    fn claims(&mut self, talk: &Talk) -> Vec<FeedHave> {
        let known: Vec<AuthorId> =
            self.loot.values().filter_map(|bytes| Some(Envelope::parse(bytes).ok()?.header.sender)).collect();
        let authors: BTreeSet<AuthorId> = known.into_iter().chain(self.haves.keys().copied()).collect();
        let upto = |author, last| FeedHave {
            author,
            ranges: vec![Range { first: Number(1), last: Number(last) }],
            heads: vec![EnvelopeHash([3; 32])],
            fork: None,
            digest: [0; 32],
        };
        match talk.lie {
            Lie::HaveAll => {
                let liar = self.id();
                let claim = |feed: &FeedHave| FeedHave {
                    ranges: vec![Range { first: Number(1), last: feed.highest().unwrap_or(Number(1)) }],
                    heads: feed.heads.last().copied().into_iter().collect(),
                    ..feed.clone()
                };
                self.haves.values().filter(|feed| feed.author != liar).map(claim).collect()
            }
            Lie::FeedAhead => {
                let ahead = |author: AuthorId| {
                    let highest = self.haves.get(&author).and_then(FeedHave::highest).unwrap_or(Number(1));
                    upto(author, highest.0 + 5)
                };
                authors.into_iter().map(ahead).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The next entry of its own feed.
    fn say(&mut self) -> Vec<u8> {
        let content = Content::Sealed { kind: 1, stream: "app".to_owned(), body: self.words() };
        self.append(content)
    }

    fn words(&mut self) -> Vec<u8> {
        let word: [u8; 8] = bytes(&mut self.rng);
        word.repeat(1 + index(&mut self.rng, 20))
    }

    fn append(&mut self, content: Content) -> Vec<u8> {
        let number = Number(self.number.0 + 1);
        let bytes = self.seal(number, self.head, content);
        self.number = number;
        self.before = std::mem::replace(&mut self.head, hash(&bytes));
        bytes
    }

    fn seal(&mut self, number: Number, previous: EnvelopeHash, content: Content) -> Vec<u8> {
        let entry = entry(BlobId(bytes(&mut self.rng)), Timestamp(1), content);
        let sealed = self.author.seal(number, previous, &entry).unwrap_or_default();
        self.signed.insert(hash(&sealed));
        sealed
    }

    /// The answer to a PULL of everything, and what else it says then.
    fn lie(&mut self, talk: &Talk, request: u32) -> Vec<Vec<u8>> {
        let here = (Cursor(1 + self.number.0), Check([5; 8]));
        let nothing = response(request, vec![], here);
        let frames = match talk.lie {
            Lie::Forge => vec![response(request, self.forgeries(), here)],
            Lie::BadSignature => {
                let (first, mut second, third) = (self.say(), self.say(), self.say());
                spoil_signature(&mut second);
                vec![response(request, vec![first, second, third], here)]
            }
            Lie::LateVoucher => {
                let mut first = self.say();
                spoil_signature(&mut first);
                self.head = hash(&first);
                self.signed.insert(self.head);
                let second = self.say();
                vec![nothing, push(vec![first], here), push(vec![second], here)]
            }
            Lie::Mangle => vec![response(request, self.mangled(), here)],
            Lie::FakePosition => {
                let far = (Cursor(u64::MAX), Check(bytes(&mut self.rng)));
                let said = self.say();
                vec![push(vec![said], far), response(request, vec![], far), push(vec![], here)]
            }
            Lie::Holes => {
                let mut entries = Vec::new();
                for ahead in [1, 3, 1 << 40, u64::MAX - 1 - self.number.0] {
                    let content = Content::Sealed { kind: 1, stream: "app".to_owned(), body: self.words() };
                    let previous = EnvelopeHash(bytes(&mut self.rng));
                    entries.push(self.seal(Number(self.number.0 + 1 + ahead), previous, content));
                }
                entries.push(self.say());
                vec![response(request, entries, here)]
            }
            Lie::Fork => {
                let content = Content::Sealed { kind: 1, stream: "app".to_owned(), body: self.words() };
                let other = self.seal(self.number.max(Number(1)), self.before, content);
                let (next, next_but_one) = (self.say(), self.say());
                vec![response(request, vec![other, next, next_but_one], here)]
            }
            Lie::PullBomb => std::iter::repeat_with(|| self.pull(Scope::All, Vec::new())).take(BOMB).collect(),
            Lie::WantBomb => {
                let everything = Range { first: Number(1), last: Number(u64::MAX) };
                let authors: Vec<AuthorId> = self.haves.keys().copied().collect();
                let wants = authors.iter().cycle().take(MAX_WANTS.min(authors.len() * 9));
                let wants: Vec<Want> = wants.map(|&author| Want { author, range: everything }).collect();
                vec![nothing, Frame::Want { request: 3, wants: wants.clone() }, Frame::Want { request: 3, wants }]
            }
            Lie::AckUnsent => {
                vec![Frame::PushAck { cursor: Cursor(u64::MAX) }, nothing, Frame::PushAck { cursor: Cursor(1 << 50) }]
            }
            Lie::LateGarbage => {
                let garbage = self.garbage();
                return vec![nothing.encode(), garbage];
            }
            Lie::Impersonate => {
                let position = self.places.get(&talk.replica).copied().unwrap_or(here);
                vec![response(request, vec![], position)]
            }
            Lie::OutOfTurn => {
                let hello = self.hello(talk, Lie::Honest);
                vec![response(9, vec![], here), response(request, vec![], here), hello]
            }
            Lie::Readmit => {
                let mut entries = Vec::new();
                let stranger = AuthorSecret::make(&mut self.rng);
                let stranger = (stranger.keys(), None, consent(&stranger, [0; 32], None));
                let known = self.admissions();
                for (keys, invite, consent) in known.into_iter().chain([stranger]) {
                    let member = MemberId::from(keys.verify);
                    let operation = Operation::Admit { keys, member, role: Role::Member, invite, consent };
                    let payload = SignedOperation { seen: vec![EnvelopeHash([8; 32])], operation }.encode();
                    entries.push(self.append(Content::Membership(payload)));
                }
                vec![response(request, entries, here)]
            }
            Lie::Rotate => {
                let mut entries = self.rotations();
                entries.push(self.say());
                vec![response(request, entries, here)]
            }
            _ => {
                let entries = vec![self.say(), self.say()];
                vec![response(request, entries, here)]
            }
        };
        frames.iter().map(Frame::encode).collect()
    }

    /// The keys of authors that were admitted in what it was sent, and their own word on that.
    fn admissions(&self) -> Vec<(AuthorKeys, Option<InviteId>, Consent)> {
        let operations = self.loot.values().filter_map(|bytes| {
            let envelope = Envelope::parse(bytes).ok()?;
            let signed = SignedOperation::decode(envelope.payload()).ok()?;
            match signed.operation {
                Operation::Admit { keys, invite, consent, .. } => Some((keys, invite, consent)),
                _ => None,
            }
        });
        operations.take(4).collect()
    }

    /// Entries in the name of honest authors.
    fn forgeries(&mut self) -> Vec<Vec<u8>> {
        let liar = self.id();
        let targets: Vec<FeedHave> = self.haves.values().filter(|feed| feed.author != liar).cloned().collect();
        let mut forged = Vec::new();
        for feed in targets {
            let Some(template) = self.loot.values().find_map(|bytes| Envelope::parse(bytes).ok()) else { break };
            let mut header = template.header.clone();
            header.sender = feed.author;
            header.number = Number(feed.highest().map_or(1, |number| number.0 + 1));
            header.previous = feed.heads.last().copied().unwrap_or(EnvelopeHash::NONE);
            header.class = Class::Sealed;
            header.blob_id = BlobId(bytes(&mut self.rng));
            let Ok(mut draft) = Draft::new(&header, 40) else { continue };
            rand_core::Rng::fill_bytes(&mut self.rng, draft.payload_mut());
            let signature = self.author.secret().sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
            forged.push(draft.sign(&signature));
        }
        // true entries with other content
        for original in self.loot.values().take(8) {
            let mut changed = original.clone();
            let at = changed.len().saturating_sub(70 + index(&mut self.rng, 8));
            changed[at] ^= 0x40;
            forged.push(changed);
        }
        forged
    }

    /// True entries cut short, changed, doubled, of another group, and in reverse.
    fn mangled(&mut self) -> Vec<Vec<u8>> {
        let originals: Vec<Vec<u8>> = self.loot.values().take(12).cloned().collect();
        let mut mangled = Vec::new();
        for original in originals.iter().rev() {
            let cut = index(&mut self.rng, original.len());
            mangled.push(original[..cut].to_vec());
            mangled.push(original.clone());
            mangled.push(original.clone());
            let mut longer = original.clone();
            longer.push(0);
            mangled.push(longer);
            let mut elsewhere = original.clone();
            if let Some(byte) = elsewhere.get_mut(45) {
                *byte ^= 0xff;
            }
            mangled.push(elsewhere);
            let mut other_signature = original.clone();
            spoil_signature(&mut other_signature);
            mangled.push(other_signature);
        }
        mangled
    }

    /// Rotations: one for few, and one whose chain says what an epoch of others is.
    fn rotations(&mut self) -> Vec<Vec<u8>> {
        let few: Vec<AuthorKeys> = self.admissions().into_iter().take(2).map(|(keys, ..)| keys).collect();
        let known = self.keys.read().map(|keys| keys.everything()).unwrap_or_default();
        let Some((current, secret)) = known.into_iter().next_back() else { return Vec::new() };
        let foreign = self.loot.values().find_map(|bytes| {
            let header = Envelope::parse(bytes).ok()?.header;
            (header.class == Class::Rotation && header.epoch != current).then_some(header.epoch)
        });
        let guess = EpochSecret::make(&mut self.rng);
        let mut rotations = Vec::new();
        for (epoch, secret) in [(Some(current), &secret), (foreign, &guess)] {
            let Some(epoch) = epoch else { continue };
            let before = Before { epoch, secret, history: History::Open };
            let Ok(made) = make_rotation(&self.group, before, &few, &mut self.rng) else { continue };
            rotations.push(self.append(Content::Rotation(made.payload)));
            self.learn(made.epoch, made.secret);
        }
        rotations
    }
}
