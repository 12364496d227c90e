//! Throw-away authors, groups and envelopes.

use std::path::Path;

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use sync_crypto::author::{AuthorSecret, SignPurpose};
use sync_types::{
    AuthorId, BlobId, Charter, Chunker, Class, Draft, Envelope, EnvelopeHash, EnvelopeType, EpochId, GroupId,
    GroupKind, Header, MemberId, Number, Operation, Quorum, Role, SignedOperation, Timestamp, succession_statement,
};

use crate::{Content, Db, DbOptions, Limits, NewEntry, SealEntries, SealError, StoreError};

pub(crate) const ALL: Limits = Limits { entries: usize::MAX, bytes: usize::MAX };
pub(crate) const EPOCH: EpochId = EpochId { number: 1, hash: [1; 32] };
pub(crate) const LATER: EpochId = EpochId { number: 2, hash: [2; 32] };

pub(crate) fn rng(seed: u8) -> ChaCha20Rng {
    ChaCha20Rng::from_seed([seed; 32])
}

pub(crate) fn open(dir: &Path) -> Db {
    Db::open(&dir.join("db"), &DbOptions::default(), rng(7)).unwrap()
}

pub(crate) fn author(seed: u8) -> AuthorSecret {
    AuthorSecret::from_bytes(&[seed; 96])
}

pub(crate) fn blob(number: u64) -> BlobId {
    BlobId(u128::from(number).to_be_bytes())
}

/// The charter of a group founded by an author; `nonce` tells groups apart.
pub(crate) fn charter(founder: &AuthorSecret, nonce: u8) -> Vec<u8> {
    Charter {
        kind: GroupKind::Random,
        founder: founder.keys(),
        quorum: Quorum::default(),
        suite: 1,
        chunker: Chunker::default(),
        nonce: [nonce; 32],
        commitment: [0; 32],
    }
    .encode()
}

/// A database with one group whose founder writes to it.
pub(crate) fn founded(dir: &Path, founder: &AuthorSecret) -> (Db, GroupId) {
    let mut db = open(dir);
    let group = db.write(|txn| txn.create_group(&charter(founder, 1), founder.id())).unwrap();
    (db, group)
}

/// What stands in an envelope that only tests look into.
pub(crate) struct Plain<'a> {
    pub(crate) number: u64,
    pub(crate) previous: EnvelopeHash,
    pub(crate) class: Class,
    pub(crate) epoch: EpochId,
    pub(crate) blob_id: BlobId,
    pub(crate) payload: &'a [u8],
}

pub(crate) fn envelope(group: GroupId, author: &AuthorSecret, plain: &Plain<'_>) -> Vec<u8> {
    let header = Header {
        kind: EnvelopeType::Push,
        sender: author.id(),
        group,
        timestamp: Timestamp(1),
        nonce: [0; 24],
        blob_id: plain.blob_id,
        number: Number(plain.number),
        previous: plain.previous,
        class: plain.class,
        epoch: if plain.class == Class::Membership { EpochId::NONE } else { plain.epoch },
        commitment: [0; 32],
    };
    let mut draft = Draft::new(&header, plain.payload.len()).unwrap();
    draft.payload_mut().copy_from_slice(plain.payload);
    let signature = author.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
    draft.sign(&signature)
}

pub(crate) fn hash(bytes: &[u8]) -> EnvelopeHash {
    Envelope::parse(bytes).unwrap().hash()
}

/// A feed under construction outside of any database.
pub(crate) struct Feed {
    pub(crate) group: GroupId,
    pub(crate) author: AuthorSecret,
    pub(crate) epoch: EpochId,
    pub(crate) number: u64,
    pub(crate) head: EnvelopeHash,
}

impl Feed {
    pub(crate) fn new(group: GroupId, author: AuthorSecret) -> Self {
        Self { group, author, epoch: EPOCH, number: 0, head: EnvelopeHash::NONE }
    }

    /// The same feed, to be continued another way.
    pub(crate) fn branch(&self) -> Self {
        let Self { group, author, epoch, number, head } = self;
        Self { group: *group, author: author.clone(), epoch: *epoch, number: *number, head: *head }
    }

    fn next(&mut self, class: Class, payload: &[u8]) -> Vec<u8> {
        self.number += 1;
        let Self { number, head: previous, epoch, .. } = *self;
        let blob_id = BlobId(hash_of(payload));
        let bytes = envelope(self.group, &self.author, &Plain { number, previous, class, epoch, blob_id, payload });
        self.head = hash(&bytes);
        bytes
    }

    pub(crate) fn say(&mut self, payload: &str) -> Vec<u8> {
        self.next(Class::Sealed, payload.as_bytes())
    }

    pub(crate) fn operate(&mut self, operation: Operation) -> Vec<u8> {
        self.next(Class::Membership, &SignedOperation { seen: vec![], operation }.encode())
    }

    pub(crate) fn operate_having_seen(&mut self, operation: Operation, seen: &[Vec<u8>]) -> Vec<u8> {
        let seen = seen.iter().map(|bytes| hash(bytes)).collect();
        self.next(Class::Membership, &SignedOperation { seen, operation }.encode())
    }

    pub(crate) fn admit(&mut self, newcomer: &AuthorSecret) -> Vec<u8> {
        self.operate(admission(newcomer))
    }
}

pub(crate) fn admission(newcomer: &AuthorSecret) -> Operation {
    let keys = newcomer.keys();
    let member = MemberId::from(keys.verify);
    let consent = sync_crypto::pairing::consent(newcomer, [0; 32], None);
    Operation::Admit { keys, member, role: Role::Member, invite: None, consent }
}

/// Entry 1 of the feed of `new`, which goes on for `old`.
pub(crate) fn succession(group: GroupId, old: &AuthorSecret, new: &AuthorSecret) -> Vec<u8> {
    let (keys, member) = (new.keys(), MemberId::from(old.id()));
    let proof = old.sign(SignPurpose::Succession, &[&group.0, &succession_statement(&keys, member)]);
    Feed::new(group, new.clone()).operate(Operation::Succeed { keys, member, predecessor: old.id(), proof })
}

fn hash_of(payload: &[u8]) -> [u8; 16] {
    *blake3::hash(payload).as_bytes().first_chunk().unwrap()
}

/// Writes entries as their bodies, and signs them.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) group: GroupId,
    pub(crate) author: AuthorSecret,
}

impl SealEntries for Writer {
    fn author(&self) -> AuthorId {
        self.author.id()
    }

    fn seal(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Result<Vec<u8>, SealError> {
        let payload = match &entry.content {
            Content::Sealed { body, .. } => body,
            Content::Membership(payload) | Content::Rotation(payload) => payload,
        };
        let (number, class, blob_id) = (number.0, entry.content.class(), entry.blob_id);
        let plain = Plain { number, previous, class, epoch: EPOCH, blob_id, payload };
        Ok(envelope(self.group, &self.author, &plain))
    }
}

/// An entry of our own.
pub(crate) fn entry(blob_id: BlobId, body: impl Into<Vec<u8>>) -> NewEntry {
    new_entry(blob_id, Content::Sealed { kind: 1, stream: "app".to_owned(), body: body.into() })
}

pub(crate) fn new_entry(blob_id: BlobId, content: Content) -> NewEntry {
    let digest = content.digest(&[9; 32]);
    NewEntry { blob_id, timestamp: Timestamp(1), content, digest }
}

/// Stores arrivals of nobody in particular, all of them readable.
pub(crate) fn ingest(db: &mut Db, group: &GroupId, batch: &[Vec<u8>]) -> Result<crate::Ingested, StoreError> {
    db.write(|txn| txn.ingest(group, batch, None, None, &|_| true))
}
