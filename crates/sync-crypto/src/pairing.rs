//! Pairing: what both sides derive from an invite's code, and how each proves to the other that it knows the code.
//!
//! Both the lookup id and every key come from all sixteen characters, stretched.
//! So a rendezvous that sees the id learns nothing it could search.

use std::fmt;
use std::sync::LazyLock;

use data_encoding::{Encoding, Specification};
use rand_core::CryptoRng;
use subtle::ConstantTimeEq;
use sync_types::charter::write_keys;
use sync_types::{AuthorId, AuthorKeys, Consent, InviteId, LookupId, Writer};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::author::{AuthorSecret, SignPurpose, verify};
use crate::hazmat::kdf::{Cost, OutOfMemory, expand, stretch};
use crate::seal::{OpenError, open_box, seal_box};
use crate::secret::random;

/// Bytes of a code: 2^80 guesses, each of which has to be stretched.
pub const CODE_LEN: usize = 10;

/// Characters of a code without its hyphens.
const CODE_CHARS: usize = 16;
/// Characters between hyphens.
const CODE_GROUP: usize = 4;
/// Crockford's base32: no I, L, O or U.
const ALPHABET: &str = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const SALT: &[u8; 16] = b"syncshell/pair/1";
/// The second choice of RFC 9106, section 4: about a fifth of a second, and a phone has the memory.
const COST: Cost = Cost { memory_kib: 64 << 10, passes: 3, lanes: 4 };
const RECORD: &str = "record";
const REQUEST: &str = "join request";
const ANSWER: &str = "join answer";

static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut specification = Specification::new();
    specification.symbols.push_str(ALPHABET);
    specification.encoding().expect("BUG: the alphabet has 32 distinct characters")
});

/// The secret of an invite, as people read it out: `XXXX-XXXX-XXXX-XXXX`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Code([u8; CODE_LEN]);

/// A text that is no code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// It has too many or too few characters.
    #[error("a code has {CODE_CHARS} letters and digits, this has {got}; check that it is complete")]
    Length {
        /// Characters given, not counting hyphens and blanks.
        got: usize,
    },
    /// A character no code has.
    #[error("a code has no {got:?}; check that character")]
    Character {
        /// The character.
        got: char,
    },
}

impl Code {
    /// Draws a code.
    #[must_use]
    pub fn make(rng: &mut impl CryptoRng) -> Self {
        Self(random(rng))
    }

    /// Takes the bytes a link carries.
    #[must_use]
    pub fn from_bytes(bytes: [u8; CODE_LEN]) -> Self {
        Self(bytes)
    }

    /// Reads what a person typed: case, hyphens and blanks do not matter, I and L are 1, O is 0.
    ///
    /// # Errors
    /// When that leaves other than sixteen characters, or one outside the alphabet.
    pub fn parse(text: &str) -> Result<Self, CodeError> {
        let mut normalised = Zeroizing::new([0; CODE_CHARS]);
        let mut len = 0;
        for given in text.chars().filter(|c| *c != '-' && !c.is_whitespace()) {
            let upper = match given.to_ascii_uppercase() {
                'I' | 'L' => '1',
                'O' => '0',
                other => other,
            };
            let byte = u8::try_from(upper).ok().filter(|byte| ALPHABET.as_bytes().contains(byte));
            let byte = byte.ok_or(CodeError::Character { got: given })?;
            if let Some(place) = normalised.get_mut(len) {
                *place = byte;
            }
            len += 1;
        }
        if len != CODE_CHARS {
            return Err(CodeError::Length { got: len });
        }
        let mut bytes = [0; CODE_LEN];
        BASE32.decode_mut(&normalised[..], &mut bytes).expect("BUG: sixteen characters of the alphabet are ten bytes");
        Ok(Self(bytes))
    }

    /// The bytes a link carries.
    #[must_use]
    pub fn secret_bytes(&self) -> [u8; CODE_LEN] {
        self.0
    }

    fn characters(&self) -> Zeroizing<[u8; CODE_CHARS]> {
        let mut characters = Zeroizing::new([0; CODE_CHARS]);
        BASE32.encode_mut(&self.0, &mut characters[..]);
        characters
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, character) in self.characters().iter().enumerate() {
            if position > 0 && position % CODE_GROUP == 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", char::from(*character))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code(redacted)")
    }
}

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        self.0[..].ct_eq(&other.0[..]).into()
    }
}

impl Eq for Code {}

/// Everything that derives from a code.
#[derive(Clone)]
pub struct InviteKeys {
    prk: Zeroizing<[u8; 32]>,
}

impl InviteKeys {
    /// Stretches a code: a fifth of a second and 64 MiB.
    ///
    /// # Errors
    /// When the memory is not to be had.
    pub fn derive(code: &Code) -> Result<Self, OutOfMemory> {
        stretch(&code.characters()[..], SALT, COST).map(|prk| Self { prk })
    }

    /// Takes what [`InviteKeys::expose_prk`] gave.
    #[must_use]
    pub fn from_prk(prk: [u8; 32]) -> Self {
        Self { prk: prk.into() }
    }

    /// The stretched code, for an inviter that has to outlive a restart.
    #[must_use]
    pub fn expose_prk(&self) -> &[u8; 32] {
        &self.prk
    }

    /// Where a rendezvous keeps the invite's record.
    #[must_use]
    pub fn lookup_id(&self) -> LookupId {
        LookupId(expand(&self.prk, "lookup"))
    }

    /// What membership entries call the invite.
    #[must_use]
    pub fn invite_id(&self) -> InviteId {
        InviteId(expand(&self.prk, "invite id"))
    }

    /// Seals the record kept at a rendezvous.
    #[must_use]
    pub fn seal_record(&self, record: &[u8], rng: &mut impl CryptoRng) -> Vec<u8> {
        seal_box(&self.record_key(), RECORD, self.lookup_id().as_bytes(), record, rng)
    }

    /// Opens the record kept at a rendezvous.
    ///
    /// # Errors
    /// When it belongs to another invite, or was changed.
    pub fn open_record(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        open_box(&self.record_key(), RECORD, self.lookup_id().as_bytes(), sealed)
    }

    /// What shows a relay that the invite's record is ours.
    #[must_use]
    pub fn relay_owner(&self) -> [u8; 16] {
        expand(&self.prk, "owner")
    }

    /// Seals what a joiner leaves at a relay.
    #[must_use]
    pub fn seal_request(&self, request: &[u8], rng: &mut impl CryptoRng) -> Vec<u8> {
        seal_box(&self.relay_key(), REQUEST, self.lookup_id().as_bytes(), request, rng)
    }

    /// Opens what a joiner left at a relay.
    ///
    /// # Errors
    /// When it belongs to another invite, or was changed.
    pub fn open_request(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        open_box(&self.relay_key(), REQUEST, self.lookup_id().as_bytes(), sealed)
    }

    /// Seals the answer to the request with this nonce.
    #[must_use]
    pub fn seal_answer(&self, nonce: &[u8; 32], answer: &[u8], rng: &mut impl CryptoRng) -> Vec<u8> {
        seal_box(&self.relay_key(), ANSWER, nonce, answer, rng)
    }

    /// Opens the answer to the request with this nonce.
    ///
    /// # Errors
    /// When it answers another request, or was changed.
    pub fn open_answer(&self, nonce: &[u8; 32], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        open_box(&self.relay_key(), ANSWER, nonce, sealed)
    }

    fn relay_key(&self) -> Zeroizing<[u8; 32]> {
        expand(&self.prk, "relay").into()
    }

    /// What the membership entry of the invite publishes, so that any member can check a joiner.
    #[must_use]
    pub fn verifier(&self) -> [u8; 32] {
        self.invite_author().id().0
    }

    /// Proves, on the channel with this binding, that the author with these keys knows the code.
    #[must_use]
    pub fn prove_join(&self, binding: &[u8; 32], keys: &AuthorKeys) -> [u8; 64] {
        let (invite, hash) = (self.invite_id(), keys_hash(keys));
        self.invite_author().sign(SignPurpose::Join, &join_statement(binding, &invite, &hash))
    }

    /// Proves, on the channel with this binding, that who sends the grant with this hash knows the code.
    #[must_use]
    pub fn prove_inviter(&self, binding: &[u8; 32], grant_hash: &[u8; 32]) -> [u8; 32] {
        let key: Zeroizing<[u8; 32]> = expand(&self.prk, "inviter").into();
        *blake3::Hasher::new_keyed(&key).update(binding).update(grant_hash).finalize().as_bytes()
    }

    /// Checks what [`InviteKeys::prove_inviter`] proves.
    #[must_use]
    pub fn verify_inviter(&self, binding: &[u8; 32], grant_hash: &[u8; 32], proof: &[u8; 32]) -> bool {
        self.prove_inviter(binding, grant_hash)[..].ct_eq(&proof[..]).into()
    }

    fn record_key(&self) -> Zeroizing<[u8; 32]> {
        expand(&self.prk, "record").into()
    }

    /// The signing key that stands for the code.
    fn invite_author(&self) -> AuthorSecret {
        let mut bytes = Zeroizing::new([0; crate::author::AUTHOR_SECRET_LEN]);
        let seed: Zeroizing<[u8; 32]> = expand(&self.prk, "verifier").into();
        bytes[..32].copy_from_slice(&seed[..]);
        AuthorSecret::from_bytes(&bytes)
    }
}

impl fmt::Debug for InviteKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteKeys(redacted)")
    }
}

/// Checks what [`InviteKeys::prove_join`] proves, by the verifier the membership entry of the invite names.
#[must_use]
pub fn verify_join(
    verifier: &[u8; 32],
    binding: &[u8; 32],
    invite: &InviteId,
    keys: &AuthorKeys,
    proof: &[u8; 64],
) -> bool {
    let hash = keys_hash(keys);
    verify(&AuthorId(*verifier), SignPurpose::Join, &join_statement(binding, invite, &hash), proof)
}

/// The joiner's other proof: that it holds the author key it asks to be admitted, and that the others are its own.
#[must_use]
pub fn prove_author(author: &AuthorSecret, binding: &[u8; 32], invite: &InviteId) -> [u8; 64] {
    author.sign(SignPurpose::Join, &join_statement(binding, invite, &keys_hash(&author.keys())))
}

/// An author's word that it wants to be admitted under its keys, by an invite or without one.
#[must_use]
pub fn consent(author: &AuthorSecret, binding: [u8; 32], invite: Option<InviteId>) -> Consent {
    Consent { binding, proof: prove_author(author, &binding, &invite.unwrap_or(NO_INVITE)) }
}

/// Checks what [`consent`] gives: the same proof that a JOIN carries.
#[must_use]
pub fn verify_consent(keys: &AuthorKeys, invite: Option<InviteId>, consent: &Consent) -> bool {
    verify_author(keys, &consent.binding, &invite.unwrap_or(NO_INVITE), &consent.proof)
}

/// Stands for the invite of an admission without one.
const NO_INVITE: InviteId = InviteId([0; InviteId::LEN]);

/// Checks what [`prove_author`] proves.
#[must_use]
pub fn verify_author(keys: &AuthorKeys, binding: &[u8; 32], invite: &InviteId, proof: &[u8; 64]) -> bool {
    verify(&keys.verify, SignPurpose::Join, &join_statement(binding, invite, &keys_hash(keys)), proof)
}

/// Both proofs name all keys of the author: who can open and seal a JOIN may replace none of them.
fn join_statement<'a>(binding: &'a [u8; 32], invite: &'a InviteId, keys_hash: &'a [u8; 32]) -> [&'a [u8]; 3] {
    [binding, &invite.0, keys_hash]
}

/// BLAKE3 of author keys as the formats nest them.
#[must_use]
pub fn keys_hash(keys: &AuthorKeys) -> [u8; 32] {
    let mut writer = Writer::default();
    write_keys(&mut writer, keys);
    *blake3::hash(&writer.finish()).as_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    fn keys() -> InviteKeys {
        InviteKeys::from_prk([1; 32])
    }

    proptest! {
        #[test]
        fn a_code_is_read_back_however_it_is_written(bytes: [u8; CODE_LEN]) {
            let code = Code::from_bytes(bytes);
            let text = code.to_string();
            prop_assert_eq!(text.len(), 19);
            for written in [
                text.clone(),
                text.to_lowercase(),
                text.replace('-', ""),
                text.replace('-', " "),
                format!("\t{text}\n"),
                text.replace('1', "l").replace('0', "o"),
                text.replace('1', "I").replace('0', "O"),
            ] {
                prop_assert_eq!(Code::parse(&written), Ok(code.clone()));
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}") {
            if let Ok(code) = Code::parse(&text) {
                prop_assert_eq!(Code::parse(&code.to_string()), Ok(code));
            }
        }
    }

    #[test]
    fn what_is_wrong_with_a_code_is_said() {
        let cases = [
            ("", CodeError::Length { got: 0 }),
            ("0123-4567-89AB-CDE", CodeError::Length { got: 15 }),
            ("0123-4567-89AB-CDEF-G", CodeError::Length { got: 17 }),
            ("0123-4567-89AB-CDEU", CodeError::Character { got: 'U' }),
            ("0123-4567-89ab-cdeu", CodeError::Character { got: 'u' }),
            ("0123-4567-89AB-CDE\u{130}", CodeError::Character { got: '\u{130}' }),
        ];
        for (text, error) in cases {
            assert_eq!(Code::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn debug_output_shows_no_code_and_no_key() {
        assert_eq!(format!("{:?}", Code::from_bytes([0xab; 10])), "Code(redacted)");
        assert_eq!(format!("{:?}", keys()), "InviteKeys(redacted)");
    }

    #[test]
    fn what_goes_through_a_relay_opens_for_its_invite_and_an_answer_for_its_request_only() {
        let mut rng = ChaCha20Rng::from_seed([3; 32]);
        let (keys, other) = (InviteKeys::from_prk([1; 32]), InviteKeys::from_prk([2; 32]));
        let (request, answer) = (keys.seal_request(b"join", &mut rng), keys.seal_answer(&[7; 32], b"grant", &mut rng));
        assert_eq!(&keys.open_request(&request).expect("sealed for these keys")[..], b"join");
        assert_eq!(&keys.open_answer(&[7; 32], &answer).expect("sealed for these keys")[..], b"grant");
        assert!(other.open_request(&request).is_err() && other.open_answer(&[7; 32], &answer).is_err());
        assert!(keys.open_answer(&[8; 32], &answer).is_err(), "of another request");
        assert!(keys.open_request(&answer).is_err() && keys.open_answer(&[7; 32], &request).is_err());
        assert!(keys.open_record(&request).is_err());
        assert_ne!(keys.relay_owner(), other.relay_owner());
    }

    #[test]
    fn a_record_opens_for_its_invite_only() {
        let sealed = keys().seal_record(&[7; 512], &mut ChaCha20Rng::from_seed([2; 32]));
        assert_eq!(keys().open_record(&sealed).expect("own record")[..], [7; 512]);
        assert_eq!(InviteKeys::from_prk([2; 32]).open_record(&sealed), Err(OpenError::WrongKey));
    }

    #[test]
    fn a_joiner_proves_the_code_and_its_keys_on_one_channel() {
        let author = AuthorSecret::make(&mut ChaCha20Rng::from_seed([3; 32]));
        let other = AuthorSecret::make(&mut ChaCha20Rng::from_seed([5; 32])).keys();
        let (binding, invite, verifier, own) = ([4; 32], keys().invite_id(), keys().verifier(), author.keys());
        let replaced = [
            other.clone(),
            AuthorKeys { kem: other.kem, ..own.clone() },
            AuthorKeys { noise: other.noise, ..own.clone() },
            AuthorKeys { verify: other.verify, ..own.clone() },
        ];
        let proof = keys().prove_join(&binding, &own);
        assert!(verify_join(&verifier, &binding, &invite, &own, &proof));
        assert!(!verify_join(&verifier, &[5; 32], &invite, &own, &proof), "another channel");
        assert!(!verify_join(&verifier, &binding, &InviteId([5; 16]), &own, &proof), "another invite");
        for replaced in &replaced {
            assert!(!verify_join(&verifier, &binding, &invite, replaced, &proof), "other keys");
        }
        let stranger = InviteKeys::from_prk([2; 32]);
        let guessed = stranger.prove_join(&binding, &own);
        assert!(!verify_join(&verifier, &binding, &invite, &own, &guessed), "another code");

        let proof = prove_author(&author, &binding, &invite);
        assert!(verify_author(&own, &binding, &invite, &proof));
        assert!(!verify_author(&own, &[5; 32], &invite, &proof));
        for replaced in &replaced {
            assert!(!verify_author(replaced, &binding, &invite, &proof), "other keys");
        }
        assert!(!verify_join(&verifier, &binding, &invite, &own, &proof), "the author's is not the code's");
    }

    #[test]
    fn an_inviter_proves_the_code_for_one_grant_on_one_channel() {
        let proof = keys().prove_inviter(&[4; 32], &[5; 32]);
        assert!(keys().verify_inviter(&[4; 32], &[5; 32], &proof));
        assert!(!keys().verify_inviter(&[6; 32], &[5; 32], &proof));
        assert!(!keys().verify_inviter(&[4; 32], &[6; 32], &proof));
        assert!(!InviteKeys::from_prk([2; 32]).verify_inviter(&[4; 32], &[5; 32], &proof));
    }
}
