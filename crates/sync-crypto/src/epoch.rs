//! Epochs: the secret of a generation of the group key, and what derives from it.

use rand_core::CryptoRng;
use subtle::ConstantTimeEq;
use sync_types::AuthorId;

use crate::hazmat::kdf::expand;
use crate::secret::{random, secret};

secret!(
    /// The secret of one epoch, from which all its keys derive.
    EpochSecret
);
secret!(
    /// Seals entries.
    EntryKey
);
secret!(
    /// Seals slots: phonebook, presence, wants.
    SlotKey
);
secret!(
    /// Makes the hints by which a recipient finds its slot in the next rotation.
    HintKey
);
secret!(
    /// Finds the group's members at a rendezvous.
    RendezvousSecret
);
secret!(
    /// Names the group's gossip topic.
    GossipTopic
);
secret!(
    /// Protects what links say before a session opens.
    LinkKey
);

/// Length of a slot's hint.
pub(crate) const HINT_LEN: usize = 4;

/// Every key of an epoch.
#[derive(Debug, Clone)]
pub struct EpochKeys {
    /// Seals entries.
    pub entry: EntryKey,
    /// Seals slots.
    pub slot: SlotKey,
    /// Finds slots in the next rotation.
    pub hint: HintKey,
    /// Finds members.
    pub rendezvous: RendezvousSecret,
    /// Names the gossip topic.
    pub gossip: GossipTopic,
    /// Protects what links say.
    pub link: LinkKey,
}

impl EpochSecret {
    /// Draws the secret of a first epoch; later ones come from rotations.
    #[must_use]
    pub fn make(rng: &mut impl CryptoRng) -> Self {
        Self(random(rng))
    }

    /// What a charter or a rotation publishes so that nobody can be handed another secret.
    #[must_use]
    pub fn commitment(&self) -> [u8; 32] {
        expand(&self.0, "epoch commitment")
    }

    /// Whether this is the secret that was committed to.
    #[must_use]
    pub fn matches(&self, commitment: &[u8; 32]) -> bool {
        self.commitment()[..].ct_eq(&commitment[..]).into()
    }

    /// The keys of the epoch.
    #[must_use]
    pub fn derive_keys(&self) -> EpochKeys {
        EpochKeys {
            entry: EntryKey(expand(&self.0, "entry")),
            slot: SlotKey(expand(&self.0, "slot")),
            hint: HintKey(expand(&self.0, "hint")),
            rendezvous: RendezvousSecret(expand(&self.0, "rendezvous")),
            gossip: GossipTopic(expand(&self.0, "gossip")),
            link: LinkKey(expand(&self.0, "link")),
        }
    }

    /// The key that seals the secret of the epoch before this one.
    pub(crate) fn derive_chain_key(&self) -> zeroize::Zeroizing<[u8; 32]> {
        expand(&self.0, "chain").into()
    }
}

impl HintKey {
    /// By what an author finds its slot in the rotation with this nonce.
    pub(crate) fn hint(&self, author: &AuthorId, nonce: &[u8; 32]) -> [u8; HINT_LEN] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        let hash = hasher.update(&author.0).update(nonce).finalize();
        *hash.as_bytes().first_chunk().expect("BUG: a hash is longer than a hint")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_matches_its_own_commitment_only() {
        let secret = EpochSecret::from_bytes([1; 32]);
        assert!(secret.matches(&secret.commitment()));
        assert!(!EpochSecret::from_bytes([2; 32]).matches(&secret.commitment()));
    }

    #[test]
    fn every_key_of_an_epoch_differs() {
        let keys = EpochSecret::from_bytes([1; 32]).derive_keys();
        let all = [
            keys.entry.expose_bytes(),
            keys.slot.expose_bytes(),
            keys.hint.expose_bytes(),
            keys.rendezvous.expose_bytes(),
            keys.gossip.expose_bytes(),
            keys.link.expose_bytes(),
        ];
        let distinct: std::collections::BTreeSet<_> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn debug_output_shows_no_byte_of_a_secret() {
        let secret = EpochSecret::from_bytes([0xab; 32]);
        assert_eq!(format!("{secret:?}"), "EpochSecret(redacted)");
        assert!(!format!("{:?}", secret.derive_keys()).contains('['));
    }
}
