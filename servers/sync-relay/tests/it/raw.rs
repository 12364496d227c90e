//! Members and strangers who speak the protocol by hand, honestly or not.

use std::time::Duration;

use rand_core::Rng as _;
use sync_core::session::{Side, hello_statement};
use sync_crypto::AuthorSecret;
use sync_crypto::author::SignPurpose;
use sync_link::relay::{RelayConnection, RelayError, connect};
use sync_types::bounds::MAX_FRAME;
use sync_types::{
    BlobId, Carried, Charter, Check, Chunker, Class, Cursor, Draft, Envelope, EnvelopeHash, EnvelopeType, EpochId,
    ErrorCode, FeedHave, Frame, GroupId, GroupKind, Header, MemberId, Number, Operation, Quorum, ReplicaId, Role,
    Scope, SignedOperation, Timestamp,
};

use crate::site::PATIENCE;

pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand_core::UnwrapErr(getrandom::SysRng).fill_bytes(&mut bytes);
    bytes
}

pub(crate) fn author() -> AuthorSecret {
    AuthorSecret::make(&mut rand_core::UnwrapErr(getrandom::SysRng))
}

/// An author with a feed of its own in a group.
pub(crate) struct Member {
    pub(crate) secret: AuthorSecret,
    pub(crate) charter: Vec<u8>,
    pub(crate) token: Vec<Vec<u8>>,
    pub(crate) replica: ReplicaId,
    pub(crate) feed: Vec<Vec<u8>>,
}

impl Member {
    /// The founder of a new group.
    pub(crate) fn founder() -> Self {
        let secret = author();
        let (founder, quorum, chunker) = (secret.keys(), Quorum::default(), Chunker::default());
        let (nonce, commitment) = (random(), random());
        let charter = Charter { kind: GroupKind::Random, founder, quorum, suite: 1, chunker, nonce, commitment };
        Self::new(secret, charter.encode())
    }

    pub(crate) fn new(secret: AuthorSecret, charter: Vec<u8>) -> Self {
        Self { secret, charter, token: Vec::new(), replica: ReplicaId(random()), feed: Vec::new() }
    }

    pub(crate) fn group(&self) -> GroupId {
        GroupId::of(&self.charter)
    }

    /// Lets another author in.
    pub(crate) fn admit(&mut self) -> Self {
        let secret = author();
        let (keys, member) = (secret.keys(), MemberId(secret.id().0));
        let consent = sync_crypto::pairing::consent(&secret, [0; 32], None);
        let operation = Operation::Admit { keys, member, role: Role::Member, invite: None, consent };
        let payload = SignedOperation { seen: Vec::new(), operation }.encode();
        let admission = self.write(Class::Membership, BlobId(random()), &payload);
        Self { token: vec![admission], ..Self::new(secret, self.charter.clone()) }
    }

    /// Removes another author, having seen everything that was written here.
    pub(crate) fn remove(&mut self, other: &Self) -> Vec<u8> {
        let envelopes = self.feed.iter().map(|bytes| Envelope::parse(bytes).unwrap());
        let seen = envelopes.filter(|envelope| envelope.header.class == Class::Membership).map(|seen| seen.hash());
        let operation = Operation::Remove { member: MemberId(other.secret.id().0), cuts: Vec::new() };
        let payload = SignedOperation { seen: seen.collect(), operation }.encode();
        self.write(Class::Membership, BlobId(random()), &payload)
    }

    /// Writes an entry that only its signature makes one: a relay cannot tell.
    pub(crate) fn entry(&mut self, bytes: usize) -> Vec<u8> {
        self.entry_as(BlobId(random()), bytes)
    }

    /// The same under a blob id of one's choice.
    pub(crate) fn entry_as(&mut self, blob_id: BlobId, bytes: usize) -> Vec<u8> {
        self.write(Class::Sealed, blob_id, &vec![7; bytes])
    }

    fn write(&mut self, class: Class, blob_id: BlobId, payload: &[u8]) -> Vec<u8> {
        let previous = self.feed.last().map_or(EnvelopeHash::NONE, |last| Envelope::parse(last).unwrap().hash());
        let sealed = class == Class::Sealed;
        let header = Header {
            kind: EnvelopeType::Push,
            sender: self.secret.id(),
            group: self.group(),
            timestamp: Timestamp(1),
            nonce: random(),
            blob_id,
            number: Number(self.feed.len() as u64 + 1),
            previous,
            class,
            epoch: if sealed { EpochId::first(&self.charter) } else { EpochId { number: 0, hash: [0; 32] } },
            commitment: if sealed { random() } else { [0; 32] },
        };
        let mut draft = Draft::new(&header, payload.len()).unwrap();
        draft.payload_mut().copy_from_slice(payload);
        let signature = self.secret.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        let entry = draft.sign(&signature);
        self.feed.push(entry.clone());
        entry
    }

    /// A HELLO as it should be.
    pub(crate) fn hello(&self, binding: &[u8; 32]) -> Frame {
        let statement = hello_statement(binding, Side::Dialler, &self.group(), &self.replica);
        Frame::Hello {
            group: self.group(),
            author: self.secret.id(),
            replica: self.replica,
            token: self.token.clone(),
            proof: self.secret.sign(SignPurpose::Hello, &[&statement]),
        }
    }

    pub(crate) fn charter_frame(&self, registration: &str) -> Frame {
        Frame::Charter { charter: self.charter.clone(), registration: registration.as_bytes().to_vec(), pass: None }
    }

    /// Comes in, and exchanges memberships until entries flow.
    pub(crate) async fn live(&self, url: &str) -> Talk {
        let mut talk = Talk::open(url).await;
        talk.greet(self, "").await;
        talk.go_live().await;
        talk
    }
}

/// A channel by hand.
pub(crate) struct Talk {
    pub(crate) connection: RelayConnection,
}

impl Talk {
    pub(crate) async fn open(url: &str) -> Self {
        Self::try_open(url).await.unwrap()
    }

    pub(crate) async fn try_open(url: &str) -> Result<Self, RelayError> {
        Ok(Self { connection: connect(&url.parse().unwrap(), &random(), MAX_FRAME).await? })
    }

    pub(crate) async fn send(&mut self, frame: &Frame) {
        self.send_bytes(&frame.encode()).await;
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        // the relay may have ended the channel
        let _ = self.connection.sender.send(bytes).await;
        let _ = self.connection.sender.flush().await;
    }

    /// The next frame; none at the end.
    pub(crate) async fn recv(&mut self) -> Option<Frame> {
        let received = tokio::time::timeout(PATIENCE, self.connection.receiver.recv()).await.unwrap();
        received.ok().flatten().map(|bytes| Frame::decode(&bytes).unwrap())
    }

    /// Shows who it is.
    pub(crate) async fn greet(&mut self, member: &Member, registration: &str) {
        let binding = self.connection.binding;
        self.send(&member.charter_frame(registration)).await;
        self.send(&member.hello(&binding)).await;
    }

    /// The refusal that comes next, whatever else does before it.
    pub(crate) async fn error(&mut self) -> (ErrorCode, String) {
        loop {
            match self.recv().await {
                Some(Frame::Error { code, text }) => return (code, text),
                Some(_) => {}
                None => panic!("the channel ended without a word"),
            }
        }
    }

    pub(crate) async fn ended(&mut self) {
        while self.recv().await.is_some() {}
    }

    async fn go_live(&mut self) {
        self.pull(Scope::Membership, 1, Vec::new()).await;
        let (mut asked, mut answered) = (false, false);
        while !(asked && answered) {
            match self.recv().await.expect("let in") {
                Frame::Pull { request, scope: Scope::Membership, .. } => {
                    asked = true;
                    self.answer(request, Vec::new()).await;
                }
                Frame::PullResponse { request: 1, has_more, .. } => answered = !has_more,
                frame => panic!("{frame:?}"),
            }
        }
        // its question for everything comes once memberships are equal
        loop {
            if let Frame::Pull { request, scope: Scope::All, .. } = self.recv().await.expect("still let in") {
                self.answer(request, Vec::new()).await;
                return;
            }
        }
    }

    pub(crate) async fn pull(&mut self, scope: Scope, request: u32, have: Vec<FeedHave>) {
        let (after, check) = (Cursor(0), Check::NONE);
        self.send(&Frame::Pull { request, scope, after, check, limit: 1000, have, covered: Vec::new() }).await;
    }

    async fn answer(&mut self, request: u32, entries: Vec<Carried>) {
        let (max_cursor, check) = (Cursor(0), Check::NONE);
        let (has_more, reset, holds_from) = (false, false, Cursor(1));
        self.send(&Frame::PullResponse { request, entries, max_cursor, check, has_more, reset, holds_from }).await;
    }

    /// Pushes one entry under a cursor of the sender's.
    pub(crate) async fn push(&mut self, cursor: u64, envelope: Vec<u8>) {
        let entries = vec![Carried { cursor: Cursor(cursor), envelope }];
        self.send(&Frame::Push { entries, max_cursor: Cursor(cursor), check: Check([1; 8]) }).await;
    }

    /// Waits until so much is acknowledged.
    pub(crate) async fn acknowledged(&mut self, cursor: u64) {
        loop {
            match self.recv().await.expect("an answer") {
                Frame::PushAck { cursor: acked } if acked == Cursor(cursor) => return,
                Frame::Error { code, text } => panic!("{code:?}: {text}"),
                _ => {}
            }
        }
    }

    /// Every entry the relay gives of everything.
    pub(crate) async fn pulled(&mut self) -> Vec<Vec<u8>> {
        self.pull(Scope::All, 7, Vec::new()).await;
        let mut all = Vec::new();
        loop {
            if let Frame::PullResponse { request: 7, entries, has_more, .. } = self.recv().await.expect("an answer") {
                all.extend(entries.into_iter().map(|carried| carried.envelope));
                if !has_more {
                    return all;
                }
            }
        }
    }

    /// Whether so much is not acknowledged for a moment.
    pub(crate) async fn is_unacknowledged(&mut self, cursor: u64) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.acknowledged(cursor)).await.is_err()
    }

    /// Whether nothing comes for a moment.
    pub(crate) async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.connection.receiver.recv()).await.is_err()
    }
}
