//! Secrets at rest: the home key under a passphrase, and everything else under the home key.

use rand_core::CryptoRng;
use sync_types::{FormatError, Reader, Writer};
use zeroize::Zeroizing;

use crate::hazmat::kdf::{Cost, OutOfMemory, stretch};
use crate::passphrase::normalise;
use crate::seal::{BOX_OVERHEAD, OpenError, open_box, seal_box};
use crate::secret::{random, secret};

const VERSION: u64 = 1;
const FIELDS: usize = 6;
/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
const SALT_LEN: usize = 16;
const SEALED_LEN: usize = 32 + BOX_OVERHEAD;
const VAULT: &str = "vault";

/// What stretching the passphrase of a vault costs; written into the vault and authenticated with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VaultParams {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes, which a guesser can run at once.
    pub lanes: u32,
}

impl VaultParams {
    /// The second choice of RFC 9106, section 4: about a fifth of a second.
    pub const RECOMMENDED: Self = Self { memory_kib: 64 << 10, passes: 3, lanes: 4 };
    /// The least that is made or accepted: OWASP's minimum for Argon2id.
    pub const FLOOR: Self = Self { memory_kib: 19 << 10, passes: 2, lanes: 1 };
    /// The most that is made or accepted, so that a forged file cannot exhaust the machine.
    pub const CEILING: Self = Self { memory_kib: 1 << 20, passes: 16, lanes: 16 };

    fn within_bounds(&self) -> bool {
        (Self::FLOOR.memory_kib..=Self::CEILING.memory_kib).contains(&self.memory_kib)
            && (Self::FLOOR.passes..=Self::CEILING.passes).contains(&self.passes)
            && (Self::FLOOR.lanes..=Self::CEILING.lanes).contains(&self.lanes)
    }

    fn cost(&self) -> Cost {
        Cost { memory_kib: self.memory_kib, passes: self.passes, lanes: self.lanes }
    }
}

/// Why a vault was not made or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VaultError {
    /// The passphrase is another one; a changed salt looks the same.
    #[error("wrong passphrase; try again")]
    WrongPassphrase,
    /// The vault is not as it was written.
    #[error("key file is damaged; restore it from a backup")]
    Damaged,
    /// The vault is of a version this program does not know.
    #[error("key file is of version {got}, this program reads {known}; update it")]
    UnsupportedVersion {
        /// The version found.
        got: u64,
        /// The version known.
        known: u64,
    },
    /// The vault asks for less than is safe or more than is sane.
    #[error(
        "key file asks for {memory_kib} KiB, {passes} passes and {lanes} lanes, which is out of bounds; restore it from a backup"
    )]
    ParametersOutOfBounds {
        /// Memory in KiB.
        memory_kib: u64,
        /// Passes.
        passes: u64,
        /// Lanes.
        lanes: u64,
    },
    /// The memory is not to be had.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Seals a secret under a passphrase.
///
/// # Errors
/// When the parameters are out of bounds, or the memory is not to be had.
pub fn seal_with_passphrase(
    passphrase: &str,
    secret: &[u8; 32],
    params: VaultParams,
    rng: &mut impl CryptoRng,
) -> Result<Vec<u8>, VaultError> {
    if !params.within_bounds() {
        return Err(out_of_bounds(params.memory_kib.into(), params.passes.into(), params.lanes.into()));
    }
    let salt: [u8; SALT_LEN] = random(rng);
    let key = stretch(normalise(passphrase).as_bytes(), &salt, params.cost())?;
    let mut header = Writer::array_of(FIELDS);
    header.uint(VERSION).uint(params.memory_kib.into()).uint(params.passes.into()).uint(params.lanes.into()).bin(&salt);
    let header = header.finish();
    let sealed = seal_box(&key, VAULT, &header, secret, rng);
    let mut vault = Writer::default();
    vault.raw(&header).bin(&sealed);
    Ok(vault.finish())
}

/// Opens what [`seal_with_passphrase`] sealed.
///
/// # Errors
/// When the passphrase is wrong, or the vault is damaged, of a later version or out of bounds.
pub fn open_with_passphrase(passphrase: &str, vault: &[u8]) -> Result<Zeroizing<[u8; 32]>, VaultError> {
    let (header, params, salt, sealed) = parse(vault)?;
    let key = stretch(normalise(passphrase).as_bytes(), &salt, params.cost())?;
    let secret = open_box(&key, VAULT, header, sealed).map_err(|error| match error {
        OpenError::WrongKey => VaultError::WrongPassphrase,
        OpenError::Forged => VaultError::Damaged,
    })?;
    let mut opened = Zeroizing::new([0; 32]);
    if secret.len() != opened.len() {
        return Err(VaultError::Damaged);
    }
    opened.copy_from_slice(&secret);
    Ok(opened)
}

/// Header as associated data, parameters, salt and box.
type Parsed<'a> = (&'a [u8], VaultParams, [u8; SALT_LEN], &'a [u8]);

fn parse(vault: &[u8]) -> Result<Parsed<'_>, VaultError> {
    let damaged = |_: FormatError| VaultError::Damaged;
    let mut reader = Reader::new(vault);
    let fields = reader.array("vault", FIELDS, MAX_FIELDS).map_err(damaged)?;
    let version = reader.uint("vault version").map_err(damaged)?;
    if version != VERSION {
        return Err(VaultError::UnsupportedVersion { got: version, known: VERSION });
    }
    let memory_kib = reader.uint("memory").map_err(damaged)?;
    let passes = reader.uint("passes").map_err(damaged)?;
    let lanes = reader.uint("lanes").map_err(damaged)?;
    let params = match (u32::try_from(memory_kib), u32::try_from(passes), u32::try_from(lanes)) {
        (Ok(memory_kib), Ok(passes), Ok(lanes)) => VaultParams { memory_kib, passes, lanes },
        _ => return Err(out_of_bounds(memory_kib, passes, lanes)),
    };
    if !params.within_bounds() {
        return Err(out_of_bounds(memory_kib, passes, lanes));
    }
    let salt = reader.fixed("salt").map_err(damaged)?;
    let header = &vault[..vault.len() - reader.rest().len()];
    let sealed = reader.bin("vault box", SEALED_LEN).map_err(damaged)?;
    reader.skip("vault", fields - FIELDS).map_err(damaged)?;
    reader.end().map_err(damaged)?;
    Ok((header, params, salt, sealed))
}

fn out_of_bounds(memory_kib: u64, passes: u64, lanes: u64) -> VaultError {
    VaultError::ParametersOutOfBounds { memory_kib, passes, lanes }
}

secret!(
    /// Seals what a home's database keeps secret.
    HomeKey
);

impl HomeKey {
    /// Draws the key of a new home.
    #[must_use]
    pub fn make(rng: &mut impl CryptoRng) -> Self {
        Self(random(rng))
    }

    /// Seals a secret of one purpose; `id` says whose it is, so that two rows cannot be swapped.
    #[must_use]
    pub fn seal(&self, purpose: &str, id: &[u8], secret: &[u8], rng: &mut impl CryptoRng) -> Vec<u8> {
        seal_box(&self.0, &home_purpose(purpose), id, secret, rng)
    }

    /// Opens what [`HomeKey::seal`] sealed for the same purpose and id.
    ///
    /// # Errors
    /// When it was sealed under another key or purpose, or anything of it was changed.
    pub fn open(&self, purpose: &str, id: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        open_box(&self.0, &home_purpose(purpose), id, sealed)
    }
}

fn home_purpose(purpose: &str) -> String {
    format!("home {purpose}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    fn rng() -> ChaCha20Rng {
        ChaCha20Rng::from_seed([1; 32])
    }

    fn vault() -> Vec<u8> {
        seal_with_passphrase("passphrase", &[7; 32], VaultParams::FLOOR, &mut rng()).expect("within bounds")
    }

    #[test]
    fn a_vault_opens_for_its_passphrase() {
        assert_eq!(open_with_passphrase("passphrase", &vault()).expect("own vault")[..], [7; 32]);
        assert_eq!(open_with_passphrase("passphrases", &vault()), Err(VaultError::WrongPassphrase));
    }

    #[test]
    fn parameters_are_authenticated_and_bounded() {
        // array, version, then memory as `cd 4c 00`, passes, lanes
        let good = vault();
        assert_eq!(good[..7], [0x96, 1, 0xcd, 0x4c, 0x00, 2, 1]);
        let mut costlier = good.clone();
        costlier[5] = 3;
        assert_eq!(open_with_passphrase("passphrase", &costlier), Err(VaultError::WrongPassphrase));
        for (at, value) in [(3, 0x4b), (5, 1), (5, 17), (6, 0), (6, 17)] {
            let mut changed = good.clone();
            changed[at] = value;
            let opened = open_with_passphrase("passphrase", &changed);
            assert!(matches!(opened, Err(VaultError::ParametersOutOfBounds { .. })), "byte {at}: {opened:?}");
        }
        let huge = VaultParams { memory_kib: (1 << 20) + 1, ..VaultParams::CEILING };
        let made = seal_with_passphrase("passphrase", &[7; 32], huge, &mut rng());
        assert!(matches!(made, Err(VaultError::ParametersOutOfBounds { .. })));
    }

    #[test]
    fn a_memory_bomb_is_refused_before_anything_is_allocated() {
        let mut writer = Writer::array_of(FIELDS);
        writer.uint(VERSION).uint(u64::MAX).uint(3).uint(4).bin(&[0; SALT_LEN]).bin(&[0; SEALED_LEN]);
        let opened = open_with_passphrase("passphrase", &writer.finish());
        assert_eq!(opened, Err(VaultError::ParametersOutOfBounds { memory_kib: u64::MAX, passes: 3, lanes: 4 }));
    }

    #[test]
    fn a_later_version_and_damage_are_told_apart() {
        let good = vault();
        let mut later = good.clone();
        later[1] = 2;
        let opened = open_with_passphrase("passphrase", &later);
        assert_eq!(opened, Err(VaultError::UnsupportedVersion { got: 2, known: 1 }));
        let mut flipped = good.clone();
        *flipped.last_mut().expect("long") ^= 1;
        assert_eq!(open_with_passphrase("passphrase", &flipped), Err(VaultError::Damaged));
        for len in 0..good.len() {
            assert_eq!(open_with_passphrase("passphrase", &good[..len]), Err(VaultError::Damaged), "cut at {len}");
        }
        let longer = [&good[..], &[0]].concat();
        assert_eq!(open_with_passphrase("passphrase", &longer), Err(VaultError::Damaged));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(&bytes).is_err());
        }
    }

    #[test]
    fn a_home_box_opens_for_its_purpose_and_row_only() {
        let key = HomeKey::make(&mut rng());
        let sealed = key.seal("epoch", b"row 1", b"secret", &mut rng());
        assert_eq!(key.open("epoch", b"row 1", &sealed).expect("own box")[..], b"secret"[..]);
        assert_eq!(key.open("author", b"row 1", &sealed), Err(OpenError::WrongKey));
        assert_eq!(key.open("epoch", b"row 2", &sealed), Err(OpenError::Forged));
        assert_eq!(HomeKey::from_bytes([0; 32]).open("epoch", b"row 1", &sealed), Err(OpenError::WrongKey));
    }
}
