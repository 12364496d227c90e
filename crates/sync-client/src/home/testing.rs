//! What the tests of homes share.

use std::process::Command;

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use zeroize::Zeroizing;

use super::PassphraseSource;

/// A generator whose draws repeat.
pub(super) fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(7)
}

pub(super) fn given(passphrase: &str) -> PassphraseSource {
    PassphraseSource::none().with_passphrase(Zeroizing::new(passphrase.to_owned()))
}

/// This test program again, running only the test of that name.
pub(super) fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(this_test_args(name));
    command
}

pub(super) fn this_test_args(name: &str) -> [&str; 3] {
    ["--exact", name, "--nocapture"]
}
