//! Passphrases: groups that derive from one, and which ones are good enough.

use rand_core::CryptoRng;
use unicode_normalization::UnicodeNormalization;
use zeroize::Zeroizing;

use crate::author::{AUTHOR_SECRET_LEN, AuthorSecret};
use crate::epoch::EpochSecret;
use crate::hazmat::kdf::{Cost, OutOfMemory, expand, stretch};

/// Fixed by the format: whoever sees a group id can test guesses for ever, so each costs about a second and 256 MiB.
const GROUP_COST: Cost = Cost { memory_kib: 256 << 10, passes: 3, lanes: 4 };
const SALT: &str = "syncshell v1 passphrase salt";
const SALT_LEN: usize = 16;

/// Guesses a passphrase has to withstand, as a power of ten: at [`GROUP_COST`] some thousands of years of a large graphics card.
///
/// Zxcvbn's own best score begins at 10^10; here nobody counts the guesses, and the group's secrets stay valid for ever.
const STRENGTH: f64 = 14.0;

/// Words of a generated passphrase: 66 bits.
const WORDS: usize = 6;
/// The English list of BIP-39, as the crate `bip39` 3.0.0 carries it (CC0-1.0).
///
/// A power of two, so no draw is rejected; no two words share their first four letters; and unlike the longer lists it asks for no notice.
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
#[error(
    "passphrase is guessed within about 10^{guesses_log10} tries, 10^14 are needed; use a generated one of six words, or add uncommon words"
)]
pub struct WeakPassphrase {
    /// Guesses it withstands, as a power of ten.
    pub guesses_log10: u32,
}

/// Refuses a passphrase that can be guessed; `known` are words whoever guesses would try first, like the group's name.
///
/// The estimator knows dates, and looks up the present year for that: the one place where this crate sees a clock.
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

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_words_are_those_of_bip_39() {
        assert_eq!(WORD_LIST.lines().count(), 2048);
        assert_eq!(
            data_encoding::HEXLOWER.encode(&Sha256::digest(WORD_LIST)),
            "2f5eed53a4727b4bf8880d8f3f199efc90e58503646d9ff8eff3a2ed3b24dbda"
        );
    }

    #[test]
    fn generated_passphrases_are_six_words_that_pass_the_check() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let passphrase = generate(&mut rng);
            assert_eq!(passphrase.split(' ').filter(|word| WORD_LIST.lines().any(|w| w == *word)).count(), 6);
            assert_eq!(check_strength(&passphrase, &[]), Ok(()), "{}", *passphrase);
            assert!(seen.insert(passphrase.to_string()), "drawn twice");
        }
    }

    #[test]
    fn passphrases_people_choose_are_refused() {
        for weak in [
            "",
            "password",
            "correct horse",
            "Tr0ub4dor&3",
            "qwertyuiopasdfghjkl",
            "aaaaaaaaaaaaaaaaaaaaaaaa",
            "2026-11-21",
        ] {
            assert!(check_strength(weak, &[]).is_err(), "{weak}");
        }
    }

    #[test]
    fn the_name_of_the_group_adds_nothing() {
        let name = "Zquorvellaxitybromn";
        assert_eq!(check_strength(name, &[]), Ok(()));
        assert!(check_strength(name, &[name]).is_err());
    }

    #[test]
    fn one_salt_for_every_way_to_write_a_name() {
        let salt = group_salt("Café Österreich");
        for name in [" café österreich\n", "CAFE\u{301} O\u{308}STERREICH", "Ｃafé Österreich"] {
            assert_eq!(group_salt(name), salt, "{name}");
        }
        assert_ne!(group_salt("Cafe Osterreich"), salt);
    }

    #[test]
    fn one_text_for_every_way_to_type_a_passphrase() {
        assert_eq!(normalise("pe\u{301}ché"), normalise("péché"));
        assert_ne!(normalise("peche"), normalise("péché"));
    }
}
