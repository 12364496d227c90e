//! What the tests of homes share.

use std::ffi::OsStr;
use std::path::Path;
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

/// Runs one test as `command` does and fails unless exactly that test ran and passed.
pub(super) fn assert_passes(command: &mut Command) {
    let output = command.output().expect("spawned");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let passed = output.status.success() && stdout.contains("test result: ok. 1 passed");
    assert!(passed, "{}\n{stdout}\n{stderr}", output.status);
}

/// Gives the process a place of its own for everything a desktop session keeps, and no bus or display.
pub(super) fn without_session(command: &mut Command, dir: &Path) {
    for variable in ["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"] {
        command.env(variable, dir);
    }
    for variable in ["DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", "GNOME_KEYRING_CONTROL"] {
        command.env_remove(variable);
    }
}

pub(super) fn is_on_path(program: impl AsRef<OsStr>) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program.as_ref()).is_file())
}
