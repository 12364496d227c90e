//! HPKE (RFC 9180), base mode: X-Wing (0x647A), HKDF-SHA256 (0x0001), ChaCha20-Poly1305 (0x0003).

use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::{Kem, XWing};
use hpke::{Deserializable, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal_with_rng};
use rand_core::CryptoRng;
use sync_types::KEM_KEY_LEN;
use zeroize::Zeroizing;

type PublicKey = <XWing as Kem>::PublicKey;
type PrivateKey = <XWing as Kem>::PrivateKey;
type EncappedKey = <XWing as Kem>::EncappedKey;

/// Length of an encapsulated key.
pub(crate) const ENC_LEN: usize = 1120;

/// Bytes that are no X-Wing encapsulation key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MalformedKey;

/// Where to seal for.
pub(crate) struct Recipient(PublicKey);

impl Recipient {
    /// Reads and checks an encapsulation key (FIPS 203, 7.2: every coefficient below q).
    pub(crate) fn new(key: &[u8; KEM_KEY_LEN]) -> Result<Self, MalformedKey> {
        PublicKey::from_bytes(key).map(Self).map_err(|_| MalformedKey)
    }

    /// A recipient nobody is: its secret key is drawn and dropped.
    pub(crate) fn nobody(rng: &mut impl CryptoRng) -> Self {
        let seed = Zeroizing::new(crate::secret::random(rng));
        Self(XWing::sk_to_pk(&private(&seed)))
    }

    /// Seals for the recipient; gives the encapsulated key, and ciphertext with tag.
    pub(crate) fn seal(
        &self,
        info: &[u8],
        aad: &[u8],
        plaintext: &[u8],
        rng: &mut impl CryptoRng,
    ) -> ([u8; ENC_LEN], Vec<u8>) {
        let (enc, sealed) = single_shot_seal_with_rng::<ChaCha20Poly1305, HkdfSha256, XWing>(
            &OpModeS::Base,
            &self.0,
            info,
            plaintext,
            aad,
            rng,
        )
        .expect("BUG: X-Wing encapsulation to a checked key cannot fail");
        (enc.to_bytes().into(), sealed)
    }
}

/// Opens what was sealed for the key pair of `seed`.
pub(crate) fn open(
    seed: &[u8; 32],
    enc: &[u8; ENC_LEN],
    info: &[u8],
    aad: &[u8],
    sealed: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let enc = EncappedKey::from_bytes(enc).ok()?;
    single_shot_open::<ChaCha20Poly1305, HkdfSha256, XWing>(
        &OpModeR::Base,
        &private(seed),
        &enc,
        info,
        sealed,
        aad,
    )
    .ok()
    .map(Zeroizing::new)
}

/// The encapsulation key of `seed`.
pub(crate) fn public_key(seed: &[u8; 32]) -> Box<[u8; KEM_KEY_LEN]> {
    Box::new(XWing::sk_to_pk(&private(seed)).to_bytes().into())
}

fn private(seed: &[u8; 32]) -> PrivateKey {
    PrivateKey::from_bytes(seed).expect("BUG: any 32 bytes are an X-Wing seed")
}
