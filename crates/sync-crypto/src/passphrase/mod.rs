//! Passphrases: groups that derive from one, and which ones are good enough.

use rand_core::{CryptoRng, Rng};
use unicode_normalization::UnicodeNormalization;
use zeroize::Zeroizing;

use crate::author::{AUTHOR_SECRET_LEN, AuthorSecret};
use crate::epoch::EpochSecret;
use crate::hazmat::kdf::{Cost, OutOfMemory, expand, stretch};

/// Fixed by the format: whoever sees a group id can test guesses for ever, so each costs about a second and 256 MiB.
const GROUP_COST: Cost = Cost { memory_kib: 256 << 10, passes: 3, lanes: 4 };
const SALT: &str = "syncshell v1 passphrase salt";
const SALT_LEN: usize = 16;

/// Guesses a passphrase has to withstand, as a power of ten: at [`GROUP_COST`] some ten thousand graphics cards for a year.
///
/// Zxcvbn's own best score begins at 10^10, enough where a server counts the guesses, which nobody does here.
const STRENGTH: f64 = 14.0;

/// Words of a generated passphrase: 66 bits.
const WORDS: usize = 6;
/// The English list of BIP-39 (bitcoin/bips, bip-0039/english.txt, MIT).
///
/// Chosen over the longer lists for being a power of two, for words that differ within four letters, and for being under a permissive licence.
const WORD_LIST: &str = include_str!("words.txt");
const WORD_COUNT: u32 = 2048;

/// What a passphrase group grows from.
#[derive(Clone)]
pub struct GroupRoot(Zeroizing<[u8; 32]>);

impl GroupRoot {
    /// Stretches a passphrase: about a second and 256 MiB.
    ///
    /// Equal for every way a keyboard encodes the same text, and for every case of the group's name.
    ///
    /// # Errors
    /// When the memory is not to be had.
    pub fn derive(passphrase: &str, group_name: &str) -> Result<Self, OutOfMemory> {
        let salt = group_salt(group_name);
        stretch(normalise(passphrase).as_bytes(), &salt, GROUP_COST).map(Self)
    }

    /// The founder, whose feed stays empty.
    #[must_use]
    pub fn founder(&self) -> AuthorSecret {
        let mut bytes = Zeroizing::new([0; AUTHOR_SECRET_LEN]);
        for (part, label) in bytes.chunks_exact_mut(32).zip(["founder sign", "founder noise", "founder kem"]) {
            let derived: Zeroizing<[u8; 32]> = expand(&self.0, label).into();
            part.copy_from_slice(&derived[..]);
        }
        AuthorSecret::from_bytes(&bytes)
    }

    /// The charter's nonce.
    #[must_use]
    pub fn charter_nonce(&self) -> [u8; 32] {
        expand(&self.0, "charter nonce")
    }

    /// The secret of epoch 1.
    #[must_use]
    pub fn first_epoch(&self) -> EpochSecret {
        EpochSecret::from_bytes(expand(&self.0, "first epoch"))
    }
}

impl std::fmt::Debug for GroupRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GroupRoot(redacted)")
    }
}

/// A passphrase that can be guessed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("passphrase is guessed within about 10^{guesses_log10} tries, 10^14 are needed; use a generated one of six words, or add uncommon words")]
pub struct WeakPassphrase {
    /// Guesses it withstands, as a power of ten.
    pub guesses_log10: u32,
}

/// Refuses a passphrase that can be guessed; `known` are words whoever guesses would try first, like the group's name.
///
/// # Errors
/// When it is estimated to withstand fewer than 10^14 guesses.
pub fn check_strength(passphrase: &str, known: &[&str]) -> Result<(), WeakPassphrase> {
    let guesses_log10 = zxcvbn::zxcvbn(&normalise(passphrase), known).guesses_log10();
    if guesses_log10 >= STRENGTH {
        return Ok(());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 14 here")]
    let guesses_log10 = guesses_log10.max(0.0) as u32;
    Err(WeakPassphrase { guesses_log10 })
}

/// Draws a passphrase of six words.
#[must_use]
pub fn generate(rng: &mut impl CryptoRng) -> Zeroizing<String> {
    let words: Vec<&str> = WORD_LIST.lines().collect();
    let mut passphrase = Zeroizing::new(String::with_capacity(WORDS * 9));
    for position in 0..WORDS {
        if position > 0 {
            passphrase.push(' ');
        }
        let index = rng.next_u32() % WORD_COUNT;
        passphrase.push_str(words[usize::try_from(index).expect("BUG: 2047 fits")]);
    }
    passphrase
}

/// One text for every way to encode it: NFKC.
pub(crate) fn normalise(passphrase: &str) -> Zeroizing<String> {
    Zeroizing::new(passphrase.nfkc().collect())
}

fn group_salt(group_name: &str) -> [u8; SALT_LEN] {
    let name: String = group_name.nfkc().collect();
    let hash = blake3::derive_key(SALT, name.trim().to_lowercase().as_bytes());
    *hash.first_chunk().expect("BUG: a hash is longer than a salt")
}
