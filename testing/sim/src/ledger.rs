//! What the simulator knows and no replica does: everything sealed, sent and promised; and the invariants by name.

use std::collections::{BTreeMap, BTreeSet};

use sync_types::{AuthorId, BlobId, Class, Envelope, EnvelopeHash, EpochId, FeedHave, Number};

/// A promise that was not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The invariant.
    pub name: &'static str,
    /// What happened.
    pub text: String,
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "invariant broken: {}: {}", self.name, self.text)
    }
}

/// The result of something that may break an invariant.
pub type Checked<T> = Result<T, Broken>;

/// Replicas that hold the same envelopes show the same, and in the end all hold the same.
pub const CONVERGE: &str = "converge";
/// What was acknowledged is there after a crash, and in the end everywhere.
pub const DURABLE: &str = "durable";
/// Reading after a cursor never misses an entry stored up to it, for an app or for a peer.
pub const NO_GAPS: &str = "no gaps";
/// Whatever a peer sends ends in a refusal: nothing forged counts, nothing panics, nothing gets stuck.
pub const HOSTILE_INPUT: &str = "hostile input";
/// No two envelopes of one author with one number leave a replica, unless a backup was restored between them and
/// nothing had shown it yet; and never once a peer has shown it.
pub const NUMBERS: &str = "numbers are used once";
/// Sync never replaces or removes content without keeping it: what lay on a disk is in a tree or among the versions
/// unless a user removed it, and an edit that no other one has seen is in every tree.
pub const NO_SILENT_OVERWRITE: &str = "no silent overwrite";
/// No nonce is sealed with twice.
pub const NONCES: &str = "nonces are used once";

/// Who has seen a removal gives the removed member nothing, and seals in no epoch that opens for it.
pub const REMOVED_IS_OUT: &str = "removed is out";

/// That an invariant is broken.
pub(crate) fn broken<T>(name: &'static str, text: impl Into<String>) -> Checked<T> {
    Err(Broken { name, text: text.into() })
}

/// An envelope sealed by an honest replica.
#[derive(Debug, Clone)]
pub(crate) struct Sealed {
    pub(crate) place: usize,
    /// How often its home had been restored.
    pub(crate) restored: u32,
    pub(crate) sender: AuthorId,
    pub(crate) number: Number,
    pub(crate) blob_id: BlobId,
    pub(crate) class: Class,
    pub(crate) epoch: EpochId,
}

/// A blob the app was told to be stored.
#[derive(Debug, Clone)]
pub(crate) struct Promise {
    /// Hash of its body.
    pub(crate) body: [u8; 32],
    /// False once every replica that held it, or every one that could open it, was rolled back.
    pub(crate) stands: bool,
}

/// Everything that was ever sealed, sent and promised.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) sealed: BTreeMap<EnvelopeHash, Sealed>,
    pub(crate) authors: BTreeSet<AuthorId>,
    nonces: BTreeSet<[u8; 24]>,
    sent: BTreeMap<(AuthorId, Number), BTreeSet<EnvelopeHash>>,
    pub(crate) promises: BTreeMap<BlobId, Promise>,
    /// Bodies of blobs as their apps gave them, stored or not.
    pub(crate) bodies: BTreeMap<BlobId, [u8; 32]>,
    /// Envelopes refused.
    pub(crate) refused: u64,
}

impl Ledger {
    /// Notes an envelope that a replica sealed.
    pub(crate) fn seal(
        &mut self,
        place: usize,
        restored: u32,
        shown: &BTreeMap<AuthorId, Number>,
        bytes: &[u8],
    ) -> Checked<()> {
        let Ok(envelope) = Envelope::parse(bytes) else {
            return broken(CONVERGE, format!("replica {place} sealed what is no envelope"));
        };
        let header = &envelope.header;
        let (sender, number) = (header.sender, header.number);
        if header.class == Class::Sealed && !self.nonces.insert(header.nonce) {
            return broken(NONCES, format!("replica {place} seals entry {number} with a nonce used before"));
        }
        if let Some(known) = shown.get(&sender)
            && number <= *known
        {
            let author = sender.short();
            let text = format!("replica {place} seals {number} as {author} after a peer showed it {known}");
            return broken(NUMBERS, text);
        }
        self.authors.insert(sender);
        let sealed = Sealed {
            place,
            restored,
            sender,
            number,
            blob_id: header.blob_id,
            class: header.class,
            epoch: header.epoch,
        };
        self.sealed.insert(envelope.hash(), sealed);
        Ok(())
    }

    /// Whether some author sealed two envelopes with one number, with a restored backup between them.
    pub(crate) fn forked(&self) -> bool {
        let mut restored: BTreeMap<(AuthorId, Number), u32> = BTreeMap::new();
        self.sealed.values().any(|sealed| {
            let before = restored.insert((sealed.sender, sealed.number), sealed.restored);
            before.is_some_and(|before| before != sealed.restored)
        })
    }

    /// Notes an envelope that an honest replica sends to a peer that has `shown` what it holds of the present author, and
    /// in truth `holds` these envelopes.
    pub(crate) fn send(
        &mut self,
        place: usize,
        shown: Option<&FeedHave>,
        holds: &BTreeSet<EnvelopeHash>,
        bytes: &[u8],
    ) -> Checked<()> {
        let Ok(envelope) = Envelope::parse(bytes) else {
            return broken(HOSTILE_INPUT, format!("replica {place} sends on what is no envelope"));
        };
        let (sender, number, hash) = (envelope.header.sender, envelope.header.number, envelope.hash());
        if !self.authors.contains(&sender) {
            return Ok(());
        }
        let Some(sealed) = self.sealed.get(&hash) else {
            let text = format!("replica {place} sends on entry {number} that {} never sealed", sender.short());
            return broken(HOSTILE_INPUT, text);
        };
        let others = self.sent.entry((sender, number)).or_default();
        for other in others.iter().filter(|other| **other != hash) {
            let other = &self.sealed[other];
            if other.place != sealed.place || other.restored == sealed.restored {
                let text = format!(
                    "two entries {number} by {} left replica {place}; replicas {} and {} sealed them",
                    sender.short(),
                    other.place,
                    sealed.place
                );
                return broken(NUMBERS, text);
            }
            // an operation is sent again to who holds it
            let shown = shown.filter(|feed| feed.author == sender && feed.contains(number));
            if shown.is_some() && !holds.contains(&hash) {
                let author = sender.short();
                let text = format!("replica {place} goes on as {author} with {number} to a peer that holds another");
                return broken(NUMBERS, text);
            }
        }
        others.insert(hash);
        Ok(())
    }
}
