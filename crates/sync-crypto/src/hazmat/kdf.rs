//! Key derivation: HKDF-SHA-256 and Argon2id.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

/// What every label of ours starts with.
const PREFIX: &[u8] = b"syncshell v1 ";

/// HKDF-Expand of a uniformly random `secret` under one of our labels.
pub(crate) fn expand<const N: usize>(secret: &[u8; 32], label: &str) -> [u8; N] {
    let mut out = [0; N];
    Hkdf::<Sha256>::from_prk(secret)
        .expect("BUG: 32 bytes are a pseudo-random key")
        .expand_multi_info(&[PREFIX, label.as_bytes()], &mut out)
        .expect("BUG: output is short");
    out
}

/// The whole HKDF, with the info given in parts.
pub(crate) fn extract_and_expand<const N: usize>(salt: &[u8], secret: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; N]> {
    let mut out = Zeroizing::new([0; N]);
    Hkdf::<Sha256>::new(Some(salt), secret).expand_multi_info(info, &mut out[..]).expect("BUG: output is short");
    out
}

/// Cost of stretching a passphrase or a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) memory_kib: u32,
    pub(crate) passes: u32,
    pub(crate) lanes: u32,
}

/// There is not enough memory to stretch a passphrase or a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not enough memory: {mib} MiB are needed for a moment; close something and try again")]
pub struct OutOfMemory {
    /// Memory that was asked for.
    pub mib: u32,
}

/// Argon2id version 1.3, 32 bytes.
pub(crate) fn stretch(password: &[u8], salt: &[u8], cost: Cost) -> Result<Zeroizing<[u8; 32]>, OutOfMemory> {
    let mut out = Zeroizing::new([0; 32]);
    let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(out.len()))
        .expect("BUG: costs are bounded before they get here");
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let mut memory = Vec::<Block>::new();
    memory
        .try_reserve_exact(argon2.params().block_count())
        .map_err(|_| OutOfMemory { mib: cost.memory_kib.div_ceil(1024) })?;
    memory.resize(argon2.params().block_count(), Block::new());
    argon2
        .hash_password_into_with_memory(password, salt, &mut out[..], &mut memory[..])
        .expect("BUG: salts have 16 bytes and passphrases fewer than 4 GiB");
    // whoever finds the last blocks has the output
    memory.iter_mut().for_each(Zeroize::zeroize);
    Ok(out)
}
