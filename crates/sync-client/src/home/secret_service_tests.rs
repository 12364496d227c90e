//! Homes with and without a real Secret Service, each in a session of its own.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::key_store::Keychain;
use super::testing::{given, rng, this_test, this_test_args};
use super::*;

const ROLE: &str = "SYNCSHELL_TEST_SECRET_SERVICE";
const MODULE: &str = "home::secret_service_tests::";

#[test]
fn without_a_session_bus_a_keychain_is_refused_and_the_choices_are_named() {
    if std::env::var_os(ROLE).is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut command =
            this_test(&format!("{MODULE}without_a_session_bus_a_keychain_is_refused_and_the_choices_are_named"));
        without_session(command.env(ROLE, "1"), dir.path());
        return assert_passes(&mut command);
    }

    let dir = tempfile::tempdir().expect("a directory");
    let (none, words) = (PassphraseSource::none(), given("words"));
    let create = |kind, passphrase| Home::create(dir.path().join("home"), "laptop", kind, passphrase, &mut rng());

    let error = create(Some(KeyStoreKind::Keychain), &words).expect_err("no keychain");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeychainUnavailable { .. })), "{error}");
    let text = error.to_string();
    assert!(text.contains("`--key-store passphrase`") && text.contains("`--key-store file`"), "{text}");

    let error = create(None, &none).expect_err("no store");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::NoneUsable { .. })), "{error}");
    assert!(error.to_string().contains("`--key-store keychain|passphrase|file`"), "{error}");

    let (home, warnings) = create(None, &words).expect("made");
    assert_eq!(home.key_store(), KeyStoreKind::Passphrase);
    assert!(matches!(&warnings[..], [Warning::KeychainNotUsed { .. }]), "{warnings:?}");
}

#[test]
fn the_secret_service_keeps_a_key_and_tells_locked_from_gone() {
    if std::env::var_os(ROLE).is_some() {
        return with_a_secret_service();
    }
    if !["dbus-run-session", "dbus-send", "gnome-keyring-daemon"].iter().all(is_on_path) {
        println!("skipped, as it needs the Debian packages `gnome-keyring` and `dbus`");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let test = format!("{MODULE}the_secret_service_keeps_a_key_and_tells_locked_from_gone");
    let mut command = Command::new("dbus-run-session");
    command
        .args(["--", "sh", "-c", &format!("{START_UNLOCKED} && exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().expect("this program"))
        .args(this_test_args(&test));
    without_session(command.env(ROLE, "1"), dir.path());
    assert_passes(&mut command);
}

/// Also unlocks what runs already, by taking its place.
const START_UNLOCKED: &str = "printf pw | gnome-keyring-daemon --replace --unlock --components=secrets >/dev/null";

fn with_a_secret_service() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("home");
    let none = PassphraseSource::none();
    let open = || match Home::open(&path, &none).expect_err("an error") {
        HomeError::KeyStore(error) => error,
        error => panic!("{error}"),
    };

    // an app calls this from within its runtime, where the client's own would panic
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let (home, warnings) =
        runtime.block_on(async { Home::create(&path, "laptop", None, &none, &mut rng()) }).expect("made");
    assert_eq!((home.key_store(), warnings), (KeyStoreKind::Keychain, vec![]));
    assert!(!path.join(KEY_FILE).exists());
    let opened = Home::open(&path, &none).expect("opened");
    assert_eq!(opened.key().expose_bytes(), home.key().expose_bytes());

    run(
        "dbus-send",
        &[
            "--session",
            "--print-reply",
            "--dest=org.freedesktop.secrets",
            "/org/freedesktop/secrets",
            "org.freedesktop.Secret.Service.Lock",
            "array:objpath:/org/freedesktop/secrets/collection/login",
        ],
    );
    let error = open();
    assert!(matches!(error, KeyStoreError::KeychainLocked { .. }), "{error}");
    let error = Home::create(dir.path().join("second"), "phone", None, &none, &mut rng()).expect_err("locked");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::NoneUsable { .. })), "{error}");

    run("sh", &["-c", START_UNLOCKED]);
    let opened = Home::open(&path, &none).expect("opened again");
    assert_eq!(opened.key().expose_bytes(), home.key().expose_bytes());

    let config = fs::read_to_string(path.join("home.toml")).expect("read");
    let entry = config.lines().find_map(|line| line.strip_prefix("keychain_entry = ")).expect("an entry");
    let entry = entry.trim_matches('"');
    Keychain::system().forget(entry).expect("forgotten");
    let error = open();
    assert!(matches!(&error, KeyStoreError::KeychainEntryMissing { entry: e } if e == entry), "{error}");
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("spawned");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs one test as `command` does and fails unless exactly that test ran and passed.
fn assert_passes(command: &mut Command) {
    let output = command.output().expect("spawned");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let passed = output.status.success() && stdout.contains("test result: ok. 1 passed");
    assert!(passed, "{}\n{stdout}\n{stderr}", output.status);
}

/// Gives the process a place of its own for everything a desktop session keeps, and no bus or display.
fn without_session(command: &mut Command, dir: &Path) {
    for variable in ["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"] {
        command.env(variable, dir);
    }
    for variable in ["DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", "GNOME_KEYRING_CONTROL"] {
        command.env_remove(variable);
    }
}

fn is_on_path(program: impl AsRef<OsStr>) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program.as_ref()).is_file())
}
