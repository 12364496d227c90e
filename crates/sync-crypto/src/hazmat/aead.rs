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
