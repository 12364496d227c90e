//! One seed, and from it a generator for each actor, so that one drawing more does not change what another draws.

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};

/// The generator of an actor.
#[must_use]
pub fn derive(seed: u64, actor: &str) -> ChaCha20Rng {
    let mut hasher = blake3::Hasher::new_derive_key("syncshell v1 simulator");
    hasher.update(&seed.to_le_bytes()).update(actor.as_bytes());
    ChaCha20Rng::from_seed(*hasher.finalize().as_bytes())
}

/// A number below `end`, which is not zero.
pub fn below(rng: &mut impl Rng, end: u64) -> u64 {
    // the bias is far below what a simulation notices
    rng.next_u64() % end.max(1)
}

/// An index below `end`, which is not zero.
pub fn index(rng: &mut impl Rng, end: usize) -> usize {
    usize::try_from(below(rng, end as u64)).unwrap_or(0)
}

/// True in so many of a hundred cases.
pub fn chance(rng: &mut impl Rng, percent: u64) -> bool {
    below(rng, 100) < percent
}

/// An array of random bytes.
pub fn bytes<const N: usize>(rng: &mut impl Rng) -> [u8; N] {
    let mut bytes = [0; N];
    rng.fill_bytes(&mut bytes);
    bytes
}
