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
    single_shot_open::<ChaCha20Poly1305, HkdfSha256, XWing>(&OpModeR::Base, &private(seed), &enc, info, sealed, aad)
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

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use serde_json::Value;

    use super::*;
    use crate::secret::Replay;

    fn hex(value: &Value) -> Vec<u8> {
        HEXLOWER.decode(value.as_str().expect("text").as_bytes()).expect("hex")
    }

    fn array<const N: usize>(value: &Value) -> [u8; N] {
        hex(value).try_into().expect("length")
    }

    #[test]
    fn x_wing_encapsulates_as_its_draft_says() {
        let vectors: Vec<Value> =
            serde_json::from_str(include_str!("../../tests/vectors/x-wing.json")).expect("vectors");
        assert_eq!(vectors.len(), 3);
        for vector in vectors {
            let seed = array::<32>(&vector["seed"]);
            assert_eq!(public_key(&seed)[..], hex(&vector["pk"]));
            let recipient = Recipient::new(&array(&vector["pk"])).expect("sound key");
            let mut rng = Replay(hex(&vector["eseed"]).into_iter());
            let (secret, enc) = XWing::encap_with_rng(&recipient.0, None, &mut rng).expect("encapsulates");
            assert_eq!(enc.to_bytes()[..], hex(&vector["ct"]));
            assert_eq!(secret.0[..], hex(&vector["ss"]));
            let opened = XWing::decap(&private(&seed), None, &enc).expect("decapsulates");
            assert_eq!(opened.0[..], hex(&vector["ss"]));
        }
    }

    #[test]
    fn hpke_seals_and_opens_as_another_implementation_does() {
        let vector: Value = serde_json::from_str(include_str!("../../tests/vectors/hpke.json")).expect("vector");
        assert_eq!((&vector["mode"], &vector["kem_id"]), (&0.into(), &0x647a.into()));
        assert_eq!((&vector["kdf_id"], &vector["aead_id"]), (&1.into(), &3.into()));
        let message = &vector["encryptions"][0];
        let (info, aad, plaintext) = (hex(&vector["info"]), hex(&message["aad"]), hex(&message["pt"]));

        let recipient = Recipient::new(&array(&vector["pkRm"])).expect("sound key");
        let mut rng = Replay(hex(&vector["ikmE"]).into_iter());
        let (enc, sealed) = recipient.seal(&info, &aad, &plaintext, &mut rng);
        assert_eq!(enc[..], hex(&vector["enc"]));
        assert_eq!(sealed, hex(&message["ct"]));

        let opened = open(&array(&vector["skRm"]), &enc, &info, &aad, &sealed).expect("opens");
        assert_eq!(opened[..], plaintext[..]);
    }

    #[test]
    fn a_key_with_a_coefficient_out_of_range_is_refused() {
        let mut key = *public_key(&[1; 32]);
        assert!(Recipient::new(&key).is_ok());
        // twelve bits each, little endian; q is 3329
        key[..3].copy_from_slice(&[0xff; 3]);
        assert!(matches!(Recipient::new(&key), Err(MalformedKey)));
    }

    #[test]
    fn nothing_opens_once_any_part_is_changed() {
        let seed = [1; 32];
        let recipient = Recipient::new(&public_key(&seed)).expect("sound key");
        let (enc, sealed) = recipient.seal(b"info", b"aad", b"secret", &mut ChaCha20Rng::from_seed([2; 32]));
        let opens = |seed, enc: &[u8; ENC_LEN], info: &[u8], aad: &[u8], sealed: &[u8]| {
            open(seed, enc, info, aad, sealed).is_some()
        };
        assert!(opens(&seed, &enc, b"info", b"aad", &sealed));
        assert!(!opens(&[3; 32], &enc, b"info", b"aad", &sealed));
        assert!(!opens(&seed, &enc, b"other", b"aad", &sealed));
        assert!(!opens(&seed, &enc, b"info", b"other", &sealed));
        // both halves of the encapsulated key: ML-KEM-768 first, X25519 last
        for at in [0, 500, 1087, 1088, ENC_LEN - 2] {
            let mut changed = enc;
            changed[at] ^= 1;
            assert!(!opens(&seed, &changed, b"info", b"aad", &sealed), "byte {at}");
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(!opens(&seed, &enc, b"info", b"aad", &changed), "byte {at}");
            assert!(!opens(&seed, &enc, b"info", b"aad", &sealed[..at]), "cut at {at}");
        }
    }

    #[test]
    fn an_all_zero_agreement_opens_nothing_sealed_with_another() {
        let seed = [1; 32];
        let recipient = Recipient::new(&public_key(&seed)).expect("sound key");
        let (mut enc, sealed) = recipient.seal(b"info", b"aad", b"secret", &mut ChaCha20Rng::from_seed([2; 32]));
        enc[1088..].fill(0);
        assert!(open(&seed, &enc, b"info", b"aad", &sealed).is_none());
    }
}
