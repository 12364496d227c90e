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
