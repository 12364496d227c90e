//! Sealing objects: a key and a commitment to it, fresh for each nonce, then the charter's cipher.
//!
//! The ciphers alone are not key-committing: one ciphertext can open under two keys.
//! So a reader compares the commitment, in constant time, before it opens anything.

use rand_core::CryptoRng;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::epoch::EntryKey;
use crate::hazmat::aead;
use crate::hazmat::kdf::extract_and_expand;
use crate::secret::random;

/// Bytes a seal adds to its plaintext.
pub const TAG_LEN: usize = aead::TAG_LEN;
/// Bytes a box adds to its plaintext: nonce, commitment and tag.
pub const BOX_OVERHEAD: usize = NONCE_LEN + COMMITMENT_LEN + TAG_LEN;

const NONCE_LEN: usize = 24;
const COMMITMENT_LEN: usize = 32;
const INFO: &[u8] = b"syncshell v1 seal ";
const ENTRY: &str = "entry";

/// The cipher of a group, fixed by its charter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Suite {
    /// The default; as fast without hardware support.
    #[default]
    XChaCha20Poly1305 = 1,
    /// For those who must.
    Aes256Gcm = 2,
}

impl Suite {
    /// The suite with this number.
    #[must_use]
    pub const fn from_u64(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::XChaCha20Poly1305),
            2 => Some(Self::Aes256Gcm),
            _ => None,
        }
    }

    /// The number in a charter.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::XChaCha20Poly1305 => 1,
            Self::Aes256Gcm => 2,
        }
    }
}

/// Why a seal was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The commitment is to another key.
    #[error("sealed under another key")]
    WrongKey,
    /// Ciphertext, tag or associated data are not what was sealed.
    #[error("sealed bytes were changed")]
    Forged,
}

/// Seals one entry: the commitment goes into the header first, then the payload is sealed with the header as associated data.
pub struct Sealer {
    suite: Suite,
    nonce: [u8; NONCE_LEN],
    object: ObjectKey,
}

impl Sealer {
    /// Derives the key of the entry with this nonce.
    ///
    /// The nonce has to be random, and its own for each entry.
    #[must_use]
    pub fn new(key: &EntryKey, suite: Suite, nonce: &[u8; NONCE_LEN]) -> Self {
        Self { suite, nonce: *nonce, object: ObjectKey::derive(key.expose_bytes(), ENTRY, suite, nonce) }
    }

    /// What the entry's header carries.
    #[must_use]
    pub fn commitment(&self) -> [u8; COMMITMENT_LEN] {
        self.object.commitment
    }

    /// Turns the plaintext in `buffer` into ciphertext and gives the tag that follows it.
    #[must_use]
    pub fn seal_in_place(self, aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
        aead::seal(self.suite, &self.object.key, &self.nonce, aad, buffer)
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("suite", &self.suite).finish_non_exhaustive()
    }
}

/// Opens an entry's ciphertext and tag.
///
/// # Errors
/// When the entry was sealed under another key, or anything of it was changed.
pub fn open(
    key: &EntryKey,
    suite: Suite,
    nonce: &[u8; NONCE_LEN],
    commitment: &[u8; COMMITMENT_LEN],
    aad: &[u8],
    sealed: &[u8],
) -> Result<Vec<u8>, OpenError> {
    ObjectKey::derive(key.expose_bytes(), ENTRY, suite, nonce).open(suite, nonce, commitment, aad, sealed)
}

/// Seals into one byte string: nonce, commitment, ciphertext and tag.
#[must_use]
pub fn seal_box(key: &[u8; 32], purpose: &str, aad: &[u8], plaintext: &[u8], rng: &mut impl CryptoRng) -> Vec<u8> {
    let suite = Suite::XChaCha20Poly1305;
    let nonce: [u8; NONCE_LEN] = random(rng);
    let object = ObjectKey::derive(key, purpose, suite, &nonce);
    let mut sealed = Vec::with_capacity(plaintext.len() + BOX_OVERHEAD);
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(&object.commitment);
    sealed.extend_from_slice(plaintext);
    let tag = aead::seal(suite, &object.key, &nonce, aad, &mut sealed[NONCE_LEN + COMMITMENT_LEN..]);
    sealed.extend_from_slice(&tag);
    sealed
}

/// Opens what [`seal_box`] sealed under the same key, purpose and associated data.
///
/// # Errors
/// When it was sealed under another key or purpose, or anything of it was changed.
pub fn open_box(key: &[u8; 32], purpose: &str, aad: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let suite = Suite::XChaCha20Poly1305;
    let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(OpenError::Forged)?;
    let (commitment, sealed) = rest.split_first_chunk::<COMMITMENT_LEN>().ok_or(OpenError::Forged)?;
    ObjectKey::derive(key, purpose, suite, nonce).open(suite, nonce, commitment, aad, sealed).map(Zeroizing::new)
}

/// Key of one object, and the commitment to it.
struct ObjectKey {
    key: Zeroizing<[u8; 32]>,
    commitment: [u8; COMMITMENT_LEN],
}

impl ObjectKey {
    fn derive(key: &[u8; 32], purpose: &str, suite: Suite, nonce: &[u8; NONCE_LEN]) -> Self {
        let okm = extract_and_expand::<64>(nonce, key, &[INFO, purpose.as_bytes(), &[0, suite.number()]]);
        let (key, commitment) = okm.split_first_chunk().expect("BUG: 64 bytes hold 32");
        Self { key: Zeroizing::new(*key), commitment: *commitment.first_chunk().expect("BUG: 64 bytes hold 32 twice") }
    }

    fn open(
        &self,
        suite: Suite,
        nonce: &[u8; NONCE_LEN],
        commitment: &[u8; COMMITMENT_LEN],
        aad: &[u8],
        sealed: &[u8],
    ) -> Result<Vec<u8>, OpenError> {
        if !bool::from(self.commitment[..].ct_eq(&commitment[..])) {
            return Err(OpenError::WrongKey);
        }
        let mut buffer = sealed.to_vec();
        aead::open(suite, &self.key, nonce, aad, &mut buffer).map_err(|_| OpenError::Forged)?;
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    const SUITES: [Suite; 2] = [Suite::XChaCha20Poly1305, Suite::Aes256Gcm];
    const NONCE: [u8; 24] = [7; 24];

    fn key(byte: u8) -> EntryKey {
        EntryKey::from_bytes([byte; 32])
    }

    fn sealed(key: &EntryKey, suite: Suite, aad: &[u8], plaintext: &[u8]) -> ([u8; 32], Vec<u8>) {
        let sealer = Sealer::new(key, suite, &NONCE);
        let commitment = sealer.commitment();
        let mut buffer = plaintext.to_vec();
        let tag = sealer.seal_in_place(aad, &mut buffer);
        buffer.extend_from_slice(&tag);
        (commitment, buffer)
    }

    #[test]
    fn what_was_sealed_opens() {
        for suite in SUITES {
            let (commitment, bytes) = sealed(&key(1), suite, b"header", b"plaintext");
            assert_eq!(bytes.len(), 9 + TAG_LEN);
            let opened = open(&key(1), suite, &NONCE, &commitment, b"header", &bytes);
            assert_eq!(opened.as_deref(), Ok(&b"plaintext"[..]));
        }
    }

    #[test]
    fn another_key_suite_or_nonce_is_told_by_the_commitment() {
        let (commitment, bytes) = sealed(&key(1), Suite::XChaCha20Poly1305, b"", b"plaintext");
        for (key, suite, nonce) in [
            (key(2), Suite::XChaCha20Poly1305, NONCE),
            (key(1), Suite::Aes256Gcm, NONCE),
            (key(1), Suite::XChaCha20Poly1305, [8; 24]),
        ] {
            assert_eq!(open(&key, suite, &nonce, &commitment, b"", &bytes), Err(OpenError::WrongKey));
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_and_every_truncation_are_noticed() {
        for suite in SUITES {
            let (commitment, bytes) = sealed(&key(1), suite, b"header", b"plaintext");
            let verdict = |commitment: &[u8; 32], aad: &[u8], bytes: &[u8]| {
                open(&key(1), suite, &NONCE, commitment, aad, bytes).expect_err("was changed")
            };
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(verdict(&commitment, b"header", &changed), OpenError::Forged);
            }
            for len in 0..bytes.len() {
                assert_eq!(verdict(&commitment, b"header", &bytes[..len]), OpenError::Forged);
            }
            for bit in 0..256 {
                let mut changed = commitment;
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(verdict(&changed, b"header", &bytes), OpenError::WrongKey);
            }
            assert_eq!(verdict(&commitment, b"heades", &bytes), OpenError::Forged);
            assert_eq!(verdict(&commitment, b"", &bytes), OpenError::Forged);
        }
    }

    /// A partitioning attack needs one object that the holders of two keys both accept.
    /// Here the attacker knows both keys, and the cipher accepts; the commitment does not.
    #[test]
    fn one_object_opens_under_one_key_only() {
        let nonce = NONCE;
        let suite = Suite::Aes256Gcm;
        let (one, other) = (key(1), key(2));
        let objects = [&one, &other].map(|key| ObjectKey::derive(key.expose_bytes(), ENTRY, suite, &nonce));
        let forged = two_key_ciphertext(&objects[0].key, &objects[1].key, &nonce);
        for object in &objects {
            let mut buffer = forged.clone();
            assert_eq!(
                aead::open(suite, &object.key, &nonce, b"", &mut buffer),
                Ok(()),
                "the cipher accepts both keys"
            );
        }
        for (commitment, refused) in [(objects[0].commitment, &other), (objects[1].commitment, &one)] {
            assert_eq!(open(refused, suite, &nonce, &commitment, b"", &forged), Err(OpenError::WrongKey));
        }
    }

    /// One ciphertext block and a tag that AES-256-GCM accepts under both keys (Grubbs, Lu, Ristenpart 2017; Len, Grubbs, Ristenpart 2021).
    fn two_key_ciphertext(one: &[u8; 32], other: &[u8; 32], nonce: &[u8; 24]) -> Vec<u8> {
        // an empty message's tag is the mask E(J0), as the hash of nothing is zero
        let mask = |key| u128::from_be_bytes(aead::seal(Suite::Aes256Gcm, key, nonce, b"", &mut []));
        // one zero block of associated data A and none of text hash to (A·H ^ L)·H with L its length
        let tagged = |key, aad: &[u8]| u128::from_be_bytes(aead::seal(Suite::Aes256Gcm, key, nonce, aad, &mut []));
        // so tag(A) ^ tag(0) = A·H²: with A = 1 it is H² itself, and its square root is H
        let unit = 1u128 << 127;
        let square = |key| tagged(key, &unit.to_be_bytes()) ^ tagged(key, &[0; 16]);
        let root = |mut x: u128| {
            (0..127).for_each(|_| x = times(x, x));
            x
        };
        let (h1, h2) = (root(square(one)), root(square(other)));
        // tag = C·H² ^ L·H ^ mask under either, so C = (mask1 ^ mask2 ^ L·(H1 ^ H2)) / (H1² ^ H2²)
        let length = 128u128;
        let (m1, m2) = (mask(one), mask(other));
        let difference = m1 ^ m2 ^ times(length, h1 ^ h2);
        let block = times(difference, inverse(times(h1, h1) ^ times(h2, h2)));
        let tag = times(block, times(h1, h1)) ^ times(length, h1) ^ m1;
        [block.to_be_bytes(), tag.to_be_bytes()].concat()
    }

    /// Multiplication in GCM's field (SP 800-38D, 6.3).
    fn times(x: u128, y: u128) -> u128 {
        let (mut product, mut shifted) = (0, y);
        for bit in (0..128).rev() {
            if x >> bit & 1 == 1 {
                product ^= shifted;
            }
            shifted = if shifted & 1 == 1 { shifted >> 1 ^ 0xe1 << 120 } else { shifted >> 1 };
        }
        product
    }

    /// x^(2^128 − 2).
    fn inverse(x: u128) -> u128 {
        let (mut result, mut power) = (1u128 << 127, x);
        for _ in 1..128 {
            power = times(power, power);
            result = times(result, power);
        }
        result
    }

    #[test]
    fn a_box_opens_for_its_key_purpose_and_associated_data_only() {
        let sealed = seal_box(&[1; 32], "purpose", b"aad", b"secret", &mut ChaCha20Rng::from_seed([9; 32]));
        assert_eq!(sealed.len(), 6 + BOX_OVERHEAD);
        let opened = |key: u8, purpose, aad: &[u8], sealed: &[u8]| {
            open_box(&[key; 32], purpose, aad, sealed).map(|opened| opened.to_vec())
        };
        assert_eq!(opened(1, "purpose", b"aad", &sealed), Ok(b"secret".to_vec()));
        assert_eq!(opened(2, "purpose", b"aad", &sealed), Err(OpenError::WrongKey));
        assert_eq!(opened(1, "purposes", b"aad", &sealed), Err(OpenError::WrongKey));
        assert_eq!(opened(1, "purpose", b"other", &sealed), Err(OpenError::Forged));
        for len in 0..sealed.len() {
            assert_eq!(opened(1, "purpose", b"aad", &sealed[..len]), Err(OpenError::Forged), "truncated to {len}");
        }
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(opened(1, "purpose", b"aad", &changed).is_err());
        }
    }
}
