//! What a device says to a relay, without a device behind it: its entries only a signature makes ones.

use anyhow::{Context as _, Result, bail};
use rand_core::{Rng as _, UnwrapErr};
use sync_core::session::{Side, hello_statement};
use sync_crypto::AuthorSecret;
use sync_crypto::author::SignPurpose;
use sync_link::relay::{RelayReceiver, RelaySender, RelayUrl, connect};
use sync_types::bounds::MAX_FRAME;
use sync_types::{
    BlobId, Carried, Charter, Check, Chunker, Class, Cursor, Draft, Envelope, EnvelopeHash, EnvelopeType, EpochId,
    Frame, GroupId, GroupKind, Header, Number, Quorum, ReplicaId, Scope, Timestamp,
};

use super::PATIENCE;

/// The question for everything; the one for memberships is the one before.
const REQUEST: u32 = 2;

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    UnwrapErr(getrandom::SysRng).fill_bytes(&mut bytes);
    bytes
}

/// The founder of a new group, with its feed.
pub(super) struct Founder {
    secret: AuthorSecret,
    charter: Vec<u8>,
    group: GroupId,
    last: (Number, EnvelopeHash),
}

impl Founder {
    pub(super) fn new() -> Self {
        let secret = AuthorSecret::make(&mut UnwrapErr(getrandom::SysRng));
        let (founder, quorum, chunker) = (secret.keys(), Quorum::default(), Chunker::default());
        let (nonce, commitment) = (random(), random());
        let charter = Charter { kind: GroupKind::Random, founder, quorum, suite: 1, chunker, nonce, commitment };
        let charter = charter.encode();
        Self { group: GroupId::of(&charter), charter, secret, last: (Number(0), EnvelopeHash::NONE) }
    }

    /// The next entry, with so many bytes that nothing compresses.
    pub(super) fn entry(&mut self, size: usize) -> Result<Vec<u8>> {
        let number = Number(self.last.0.0 + 1);
        let header = Header {
            kind: EnvelopeType::Push,
            sender: self.secret.id(),
            group: self.group,
            timestamp: Timestamp(1),
            nonce: random(),
            blob_id: BlobId(random()),
            number,
            previous: self.last.1,
            class: Class::Sealed,
            epoch: EpochId::first(&self.charter),
            commitment: random(),
        };
        let mut draft = Draft::new(&header, size)?;
        UnwrapErr(getrandom::SysRng).fill_bytes(draft.payload_mut());
        let signature = self.secret.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        let entry = draft.sign(&signature);
        self.last = (number, Envelope::parse(&entry)?.hash());
        Ok(entry)
    }
}

/// A channel on which entries flow.
pub(super) struct Client {
    sender: RelaySender,
    receiver: RelayReceiver,
}

impl Client {
    /// Comes in as the founder on a new device, and exchanges what there is.
    pub(super) async fn open(url: &RelayUrl, founder: &Founder) -> Result<Self> {
        tokio::time::timeout(PATIENCE, Self::come_in(url, founder)).await.context("the relay does not let in")?
    }

    async fn come_in(url: &RelayUrl, founder: &Founder) -> Result<Self> {
        let connection = connect(url, &founder.secret.noise_secret(), MAX_FRAME).await?;
        let (binding, replica) = (connection.binding, ReplicaId(random()));
        let mut client = Self { sender: connection.sender, receiver: connection.receiver };
        let statement = hello_statement(&binding, Side::Dialler, &founder.group, &replica);
        let proof = founder.secret.sign(SignPurpose::Hello, &[&statement]);
        let (group, author) = (founder.group, founder.secret.id());
        client
            .queue(&Frame::Charter { charter: founder.charter.clone(), registration: Vec::new(), pass: None })
            .await?;
        client.queue(&Frame::Hello { group, author, replica, token: Vec::new(), proof }).await?;
        client.pull(Scope::Membership, REQUEST - 1).await?;
        let (mut asked, mut answered) = (false, false);
        while !(asked && answered) {
            match client.frame().await? {
                Frame::Pull { request, scope: Scope::Membership, .. } => {
                    asked = true;
                    client.answer(request).await?;
                }
                Frame::PullResponse { has_more, .. } => answered = !has_more,
                frame => bail!("an answer to nothing: {frame:?}"),
            }
        }
        let (max_cursor, check, incarnation) = (Cursor(0), Check::NONE, random());
        let (name, addresses) = (String::new(), Vec::new());
        client.queue(&Frame::Welcome { replica, max_cursor, check, name, addresses, incarnation }).await?;
        client.pull(Scope::All, REQUEST).await?;
        let (mut asked, mut answered) = (false, false);
        while !(asked && answered) {
            match client.frame().await? {
                Frame::Pull { request, .. } => {
                    asked = true;
                    client.answer(request).await?;
                }
                Frame::PullResponse { request: REQUEST, has_more, .. } => answered = !has_more,
                _ => {}
            }
        }
        Ok(client)
    }

    async fn queue(&mut self, frame: &Frame) -> Result<()> {
        Ok(self.sender.send(&frame.encode()).await?)
    }

    async fn send(&mut self, frame: &Frame) -> Result<()> {
        self.queue(frame).await?;
        Ok(self.sender.flush().await?)
    }

    async fn pull(&mut self, scope: Scope, request: u32) -> Result<()> {
        let (after, check, have, covered) = (Cursor(0), Check::NONE, Vec::new(), Vec::new());
        self.send(&Frame::Pull { request, scope, after, check, limit: 1000, have, covered }).await
    }

    /// That there is nothing.
    async fn answer(&mut self, request: u32) -> Result<()> {
        let (entries, max_cursor, check) = (Vec::new(), Cursor(0), Check::NONE);
        let (has_more, reset, holds_from) = (false, false, Cursor(1));
        self.send(&Frame::PullResponse { request, entries, max_cursor, check, has_more, reset, holds_from }).await
    }

    async fn frame(&mut self) -> Result<Frame> {
        let bytes = self.receiver.recv().await?.context("the relay ended the channel")?;
        match Frame::decode(&bytes)? {
            Frame::Error { code, text } => bail!("the relay refused: {code:?}: {text}"),
            frame => Ok(frame),
        }
    }

    /// Pushes one entry under a cursor of this side's.
    pub(super) async fn push(&mut self, cursor: u64, envelope: Vec<u8>) -> Result<()> {
        let entries = vec![Carried { cursor: Cursor(cursor), envelope }];
        self.send(&Frame::Push { entries, max_cursor: Cursor(cursor), check: Check([1; 8]) }).await
    }

    /// The cursor up to which pushes are acknowledged, once that is said again.
    pub(super) async fn acknowledged(&mut self) -> Result<u64> {
        loop {
            let frame = tokio::time::timeout(PATIENCE, self.frame()).await.context("a push is not acknowledged")?;
            if let Frame::PushAck { cursor } = frame? {
                return Ok(cursor.0);
            }
        }
    }

    /// The number in its author's feed of the next entry that is pushed to this side, which acknowledges it.
    pub(super) async fn heard(&mut self) -> Result<u64> {
        loop {
            if let Frame::Push { entries, max_cursor, .. } = self.frame().await? {
                let [carried] = &entries[..] else { bail!("{} entries at once", entries.len()) };
                let number = Envelope::parse(&carried.envelope)?.header.number.0;
                self.send(&Frame::PushAck { cursor: max_cursor }).await?;
                return Ok(number);
            }
        }
    }
}
