//! Making and opening homes, with a keychain in memory; the real one is tested beside the key stores.

use std::collections::BTreeSet;
use std::sync::Arc;

use keyring_core::{CredentialStore, mock};

use super::testing::{given, rng};
use super::*;

struct Place {
    dir: tempfile::TempDir,
    store: Arc<mock::Store>,
    keychain: Keychain,
}

impl Place {
    fn new() -> Self {
        let store = mock::Store::new().expect("a store");
        let keychain = Keychain::over({
            let store = store.clone();
            move || Ok(store.clone() as Arc<CredentialStore>)
        });
        Self { dir: tempfile::tempdir().expect("a directory"), store, keychain }
    }

    fn without_keychain() -> Self {
        Self { keychain: Keychain::over(|| Err(keyring_core::Error::NoDefaultStore)), ..Self::new() }
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.home().join(name)
    }

    fn create(
        &self,
        kind: Option<KeyStoreKind>,
        passphrase: &PassphraseSource,
    ) -> Result<(Home, Vec<Warning>), HomeError> {
        Home::create_with(&self.home(), "laptop", kind, passphrase, &self.keychain, &mut rng())
    }

    fn open(&self, passphrase: &PassphraseSource) -> Result<Home, HomeError> {
        Home::open_with(&self.home(), passphrase, &self.keychain)
    }

    /// Makes the keychain answer the next use of this home's entry with `error`.
    fn keychain_fails_with(&self, error: keyring_core::Error) {
        let creds = self.store.inner.lock().expect("no panic");
        let creds = creds.borrow();
        let stored = creds.iter().find(|cred| holds_secret(cred)).expect("an entry");
        stored.set_error(error);
    }

    fn stored_entries(&self) -> Vec<String> {
        let creds = self.store.inner.lock().expect("no panic");
        let creds = creds.borrow();
        creds.iter().filter(|cred| holds_secret(cred)).map(|cred| cred.specifiers.1.clone()).collect()
    }

    fn edit_config(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.file(CONFIG_FILE)).expect("read");
        assert!(text.contains(from), "{text}");
        fs::write(self.file(CONFIG_FILE), text.replace(from, to)).expect("written");
    }
}

fn holds_secret(cred: &mock::Cred) -> bool {
    cred.inner.lock().expect("no panic").borrow().secret.is_some()
}

fn ways() -> [(KeyStoreKind, PassphraseSource); 3] {
    [
        (KeyStoreKind::Keychain, PassphraseSource::none()),
        (KeyStoreKind::Passphrase, given("four plain words here")),
        (KeyStoreKind::File, PassphraseSource::none()),
    ]
}

#[test]
fn a_home_of_each_kind_opens_again_with_the_same_key() {
    for (kind, passphrase) in ways() {
        let place = Place::new();
        let (made, warnings) = place.create(Some(kind), &passphrase).expect("made");
        let opened = place.open(&passphrase).expect("opened");

        assert_eq!(opened.key().expose_bytes(), made.key().expose_bytes());
        assert_eq!((opened.name(), opened.key_store()), ("laptop", kind));
        assert_eq!(opened.path(), place.home());
        assert_eq!(opened.db_path(), place.file("sync.db"));
        assert_eq!(opened.socket_path(), place.file("api.sock"));
        assert_eq!(opened.lock_path(), place.file("lock"));
        match kind {
            KeyStoreKind::File => {
                assert_eq!(warnings, [Warning::KeyInPlainFile { path: place.file(KEY_FILE) }]);
            }
            _ => assert_eq!(warnings, []),
        }
    }
}

#[test]
fn a_home_holds_what_its_kind_needs_and_the_plain_key_only_in_a_key_file() {
    for (kind, passphrase) in ways() {
        let place = Place::new();
        let (home, _) = place.create(Some(kind), &passphrase).expect("made");
        let hex = data_encoding::HEXLOWER.encode(home.key().expose_bytes());

        let mut names = BTreeSet::new();
        let mut shows_key = false;
        for entry in fs::read_dir(place.home()).expect("read") {
            let entry = entry.expect("an entry");
            names.insert(entry.file_name().into_string().expect("text"));
            let bytes = fs::read(entry.path()).expect("read");
            shows_key |= bytes.windows(64).any(|w| w == hex.as_bytes());
            shows_key |= bytes.windows(32).any(|w| w == home.key().expose_bytes());
        }
        let expected: &[&str] = match kind {
            KeyStoreKind::Keychain => &["home.toml", "lock"],
            _ => &["home.toml", "key", "lock"],
        };
        assert!(names.iter().eq(expected), "{kind}: {names:?}");
        assert_eq!(shows_key, kind == KeyStoreKind::File);
        assert_eq!(place.stored_entries().len(), usize::from(kind == KeyStoreKind::Keychain));
        assert!(!format!("{home:?}").contains(&hex));
    }
}

#[test]
fn the_settings_of_version_1_read_as_they_were_written() {
    let place = Place::new();
    fs::create_dir(place.home()).expect("made");
    let text = "version = 1\nname = \"laptop\"\nkey_store = \"keychain\"\nkeychain_entry = \"0a1b\"\n";
    fs::write(place.file(CONFIG_FILE), text).expect("written");

    let config = Config::read(&place.home()).expect("read");
    assert_eq!((config.name.as_str(), config.key_store), ("laptop", KeyStoreKind::Keychain));
    assert_eq!(config.keychain_entry.as_deref(), Some("0a1b"));
    assert_eq!(config.to_toml(), text);

    // a key later programs of this version may add
    fs::write(place.file(CONFIG_FILE), format!("{text}colour = \"red\"\n")).expect("written");
    assert_eq!(Config::read(&place.home()).expect("read").to_toml(), text);
}

#[test]
fn without_a_choice_the_keychain_comes_first_and_a_passphrase_second() {
    let place = Place::new();
    let (home, warnings) = place.create(None, &PassphraseSource::none()).expect("made");
    assert_eq!((home.key_store(), warnings), (KeyStoreKind::Keychain, vec![]));

    let place = Place::new();
    let (home, warnings) = place.create(None, &given("words")).expect("made");
    assert_eq!((home.key_store(), warnings), (KeyStoreKind::Keychain, vec![Warning::PassphraseNotUsed]));

    let place = Place::without_keychain();
    let (home, warnings) = place.create(None, &given("words")).expect("made");
    assert_eq!(home.key_store(), KeyStoreKind::Passphrase);
    assert!(matches!(&warnings[..], [Warning::KeychainNotUsed { .. }]), "{warnings:?}");
}

#[test]
fn without_a_choice_a_keychain_and_a_passphrase_the_error_names_the_three_and_nothing_is_made() {
    let place = Place::without_keychain();
    let error = place.create(None, &PassphraseSource::none()).expect_err("no place for a key");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::NoneUsable { .. })), "{error}");
    assert!(error.to_string().contains("--key-store keychain|passphrase|file"), "{error}");
    assert!(!place.home().exists());
}

#[test]
fn an_asked_for_keychain_that_does_not_work_is_never_replaced() {
    let place = Place::without_keychain();
    let error = place.create(Some(KeyStoreKind::Keychain), &given("words")).expect_err("no keychain");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeychainUnavailable { .. })), "{error}");
    let text = error.to_string();
    assert!(text.contains("--key-store passphrase") && text.contains("--key-store file"), "{text}");
    assert!(!place.home().exists());
}

#[test]
fn an_asked_for_passphrase_that_is_not_there_is_never_replaced() {
    let place = Place::new();
    let error = place.create(Some(KeyStoreKind::Passphrase), &PassphraseSource::none()).expect_err("no passphrase");
    let HomeError::KeyStore(KeyStoreError::Passphrase(PassphraseError::NoSource)) = error else { panic!("{error}") };
    assert!(!place.home().exists());
}

#[test]
fn opening_uses_what_the_home_records_and_nothing_else() {
    // a passphrase at hand does not open a keychain home
    let place = Place::new();
    place.create(Some(KeyStoreKind::Keychain), &PassphraseSource::none()).expect("made");
    place.keychain.forget(&place.stored_entries()[0]).expect("forgotten");
    let error = place.open(&given("words")).expect_err("no entry");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeychainEntryMissing { .. })), "{error}");

    // nor a plain key file one that records a passphrase
    let place = Place::new();
    place.create(Some(KeyStoreKind::File), &PassphraseSource::none()).expect("made");
    place.edit_config("\"file\"", "\"passphrase\"");
    let error = place.open(&given("words")).expect_err("no sealed key");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeyFileDamaged { .. })), "{error}");
}

#[test]
fn a_keychain_that_is_locked_emptied_or_replaced_gets_its_own_error() {
    let place = Place::new();
    place.create(Some(KeyStoreKind::Keychain), &PassphraseSource::none()).expect("made");
    let open = || match place.open(&PassphraseSource::none()).expect_err("an error") {
        HomeError::KeyStore(error) => error,
        error => panic!("{error}"),
    };
    let locked = || keyring_core::Error::NoStorageAccess(Box::new(io::Error::other("locked")));

    place.keychain_fails_with(locked());
    assert!(matches!(open(), KeyStoreError::KeychainLocked { .. }));
    place.keychain_fails_with(keyring_core::Error::PlatformFailure(Box::new(io::Error::other("gone"))));
    assert!(matches!(open(), KeyStoreError::KeychainUnavailable { .. }));
    place.open(&PassphraseSource::none()).expect("it works again");

    let entry = place.stored_entries().remove(0);
    for wrong in [&b"too short"[..], &[b'x'; 64], &[0xff; 4]] {
        place.store.inner.lock().expect("no panic").borrow()[..]
            .iter()
            .find(|cred| cred.specifiers.1 == entry)
            .expect("the entry")
            .inner
            .lock()
            .expect("no panic")
            .get_mut()
            .secret = Some(wrong.to_vec());
        assert!(matches!(open(), KeyStoreError::KeychainEntryDamaged { .. }));
    }
    place.keychain.forget(&entry).expect("forgotten");
    assert!(matches!(open(), KeyStoreError::KeychainEntryMissing { .. }));
}

#[test]
fn a_wrong_passphrase_is_called_that_and_equal_text_in_another_form_is_right() {
    let place = Place::new();
    place.create(Some(KeyStoreKind::Passphrase), &given("p\u{e4}sse \u{fb01}x")).expect("made");
    let error = place.open(&given("passe fix")).expect_err("wrong");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::WrongPassphrase)), "{error}");
    place.open(&given("pa\u{308}sse fix")).expect("the same text under NFKC");
}

#[test]
fn a_key_file_that_is_missing_or_damaged_gets_its_own_error() {
    for (kind, passphrase) in &ways()[1..] {
        let place = Place::new();
        place.create(Some(*kind), passphrase).expect("made");
        let open = || match place.open(passphrase).expect_err("an error") {
            HomeError::KeyStore(error) => error,
            error => panic!("{error}"),
        };
        let whole = fs::read(place.file(KEY_FILE)).expect("read");

        for damaged in [&b""[..], &whole[..whole.len() / 2], &[b'g'; 65], &vec![b'a'; 1 << 20]] {
            fs::write(place.file(KEY_FILE), damaged).expect("written");
            let error = open();
            assert!(matches!(error, KeyStoreError::KeyFileDamaged { .. }), "{kind}: {error}");
        }
        fs::remove_file(place.file(KEY_FILE)).expect("removed");
        assert!(matches!(open(), KeyStoreError::KeyFileMissing { .. }));
        fs::create_dir(place.file(KEY_FILE)).expect("made");
        assert!(matches!(open(), KeyStoreError::KeyFileDamaged { .. }));
    }
}

#[test]
fn a_sealed_key_that_asks_for_a_weaker_hash_or_another_version_is_refused_before_hashing() {
    let place = Place::new();
    let words = given("four plain words here");
    place.create(Some(KeyStoreKind::Passphrase), &words).expect("made");
    let whole = fs::read(place.file(KEY_FILE)).expect("read");
    // an array of six: version 1, 65536 KiB, 3 passes, 4 lanes
    assert_eq!(whole[..9], [0x96, 1, 0xce, 0, 1, 0, 0, 3, 4]);
    let open_with = |at: usize, byte: u8| {
        let mut changed = whole.clone();
        changed[at] = byte;
        fs::write(place.file(KEY_FILE), changed).expect("written");
        place.open(&words).expect_err("an error")
    };

    // 0 KiB, 16 GiB, 1 pass, 17 passes, 0 lanes, 17 lanes
    for (at, byte) in [(4, 0), (3, 1), (7, 1), (7, 17), (8, 0), (8, 17)] {
        let error = open_with(at, byte);
        assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeyFileParameters { .. })), "{error}");
    }
    let error = open_with(1, 2);
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeyFileTooNew { .. })), "{error}");
    // within the bounds, and not what it was sealed under
    let error = open_with(7, 2);
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::WrongPassphrase)), "{error}");
}

#[cfg(unix)]
#[test]
fn a_key_file_that_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;

    for (kind, passphrase) in &ways()[1..] {
        let place = Place::new();
        place.create(Some(*kind), passphrase).expect("made");
        for mode in [0o640, 0o604, 0o660, 0o610] {
            fs::set_permissions(place.file(KEY_FILE), fs::Permissions::from_mode(mode)).expect("set");
            let error = place.open(passphrase).expect_err("open to others");
            assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeyFileExposed { .. })), "{error}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        fs::set_permissions(place.file(KEY_FILE), fs::Permissions::from_mode(0o400)).expect("set");
        place.open(passphrase).expect("shut again");
    }
}

#[test]
fn settings_that_are_newer_or_damaged_are_told_apart() {
    let place = Place::new();
    fs::create_dir(place.home()).expect("made");
    let open = |text: &[u8]| {
        fs::write(place.file(CONFIG_FILE), text).expect("written");
        place.open(&PassphraseSource::none()).expect_err("an error")
    };

    let error = open(b"version = 2\nkey_store = \"stone tablet\"\n");
    assert!(matches!(error, HomeError::TooNew { found: 2, .. }), "{error}");
    for text in [
        &b""[..],
        b"version = -1",
        b"version = \"1\"",
        b"\xff",
        b"version = 1\nname = \"a\"",
        b"version = 1\nname = \"a\"\nkey_store = \"stone tablet\"",
        b"version = 1\nname = \"a\"\nkey_store = \"keychain\"",
        b"version = 1\nname = \"\"\nkey_store = \"file\"",
        &[b' '; MAX_CONFIG + 1],
    ] {
        let error = open(text);
        assert!(matches!(error, HomeError::Damaged { .. }), "{error}");
    }
}

#[test]
fn what_is_not_a_home_is_called_that() {
    let place = Place::new();
    let error = place.open(&PassphraseSource::none()).expect_err("nothing there");
    assert!(matches!(error, HomeError::NotAHome { .. }), "{error}");
    assert!(error.to_string().contains("syncshell init"), "{error}");
    fs::create_dir(place.home()).expect("made");
    assert!(matches!(place.open(&PassphraseSource::none()), Err(HomeError::NotAHome { .. })));
}

#[test]
fn a_home_is_never_made_over_anything_else() {
    let place = Place::new();
    let create = || place.create(Some(KeyStoreKind::File), &PassphraseSource::none());
    let (home, _) = create().expect("made");
    assert!(matches!(create(), Err(HomeError::AlreadyExists { .. })));
    let opened = place.open(&PassphraseSource::none()).expect("still there");
    assert_eq!(opened.key().expose_bytes(), home.key().expose_bytes());

    // its settings are lost, and its key is all that opens the database
    fs::write(place.file(DB_FILE), "entries").expect("written");
    fs::remove_file(place.file(CONFIG_FILE)).expect("removed");
    assert!(matches!(create(), Err(HomeError::ConfigMissing { .. })));
    assert!(place.file(KEY_FILE).exists());

    let place = Place::new();
    fs::create_dir(place.home()).expect("made");
    fs::write(place.file("holiday.jpg"), "a picture").expect("written");
    let error = place.create(Some(KeyStoreKind::File), &PassphraseSource::none()).expect_err("a picture");
    assert!(matches!(&error, HomeError::NotEmpty { found, .. } if found == "holiday.jpg"), "{error}");
    assert_eq!(fs::read_dir(place.home()).expect("read").count(), 1, "nothing was added");
}

#[test]
fn a_home_is_not_made_where_another_process_is_making_one() {
    let place = Place::new();
    fs::create_dir(place.home()).expect("made");
    let _other = HomeLock::acquire_in(&place.home(), Duration::ZERO).expect("free");
    let error = place.create(Some(KeyStoreKind::File), &PassphraseSource::none()).expect_err("busy");
    assert!(matches!(error, HomeError::Lock(LockError::Busy { .. })), "{error}");
}

#[test]
fn a_creation_that_died_at_any_step_can_be_repeated() {
    let old_key = [b'0'; 64];
    let config = "version = 1\nname = \"old\"\nkey_store = \"keychain\"\nkeychain_entry = \"orphan\"\n";
    for left_behind in [
        &[][..],
        &[("lock", &b""[..])],
        &[("lock", b"1 0.1\n"), ("home.toml.new", b"")],
        &[("lock", b"1 0.1\n"), ("home.toml.new", config.as_bytes())],
        &[("lock", b"1 0.1\n"), ("home.toml.new", config.as_bytes()), ("key.new", b"00")],
        &[("lock", b"1 0.1\n"), ("home.toml.new", config.as_bytes()), ("key", &old_key)],
    ] {
        for (kind, passphrase) in ways() {
            let place = Place::new();
            fs::create_dir(place.home()).expect("made");
            for (name, bytes) in left_behind {
                files::write_private(&place.file(name), bytes).expect("written");
            }
            let names_entry = left_behind.iter().any(|(_, bytes)| *bytes == config.as_bytes());
            let orphan = keyring_core::api::CredentialStoreApi::build(&*place.store, "syncshell", "orphan", None);
            orphan.expect("built").set_password("old key").expect("stored");

            assert!(matches!(place.open(&passphrase), Err(HomeError::NotAHome { .. })));
            let (home, _) = place.create(Some(kind), &passphrase).expect("made");
            assert_ne!(home.key().expose_bytes()[..], old_key[..32]);
            place.open(&passphrase).expect("opened");
            assert_eq!(place.stored_entries().contains(&"orphan".to_owned()), !names_entry);
            let leftovers = fs::read_dir(place.home()).expect("read").filter(|entry| {
                let name = entry.as_ref().expect("an entry").file_name();
                name.to_string_lossy().ends_with(".new")
            });
            assert_eq!(leftovers.count(), 0);
            assert_eq!(place.file(KEY_FILE).exists(), kind != KeyStoreKind::Keychain);
        }
    }
}

#[test]
fn a_creation_whose_keychain_fails_late_leaves_no_home_and_can_be_repeated() {
    let place = Place::new();
    // the probe succeeds and what comes after it does not
    let uses = std::sync::atomic::AtomicUsize::new(0);
    let store = place.store.clone();
    let failing = Keychain::over(move || match uses.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 => Ok(store.clone() as Arc<CredentialStore>),
        _ => Err(keyring_core::Error::NoDefaultStore),
    });
    let none = PassphraseSource::none();
    let error = Home::create_with(&place.home(), "laptop", None, &none, &failing, &mut rng()).expect_err("too late");
    assert!(matches!(error, HomeError::KeyStore(KeyStoreError::KeychainUnavailable { .. })), "{error}");
    assert!(matches!(place.open(&none), Err(HomeError::NotAHome { .. })));

    place.create(None, &none).expect("made");
    place.open(&none).expect("opened");
}

#[test]
fn a_name_that_peers_would_refuse_is_refused() {
    let place = Place::new();
    for name in ["", "  ", "a\nb", "\u{7}", &"a".repeat(MAX_NAME + 1)] {
        let result = Home::create_with(
            &place.home(),
            name,
            Some(KeyStoreKind::File),
            &PassphraseSource::none(),
            &place.keychain,
            &mut rng(),
        );
        assert!(matches!(result, Err(HomeError::BadName { .. })), "{name:?}");
    }
    assert!(!place.home().exists());
}

#[cfg(unix)]
#[test]
fn a_directory_that_may_not_be_written_gets_its_own_error() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o500)).expect("set");
    // root writes everywhere but where there is nothing to write to
    let is_root = fs::write(dir.path().join("probe"), "").is_ok();
    let parent = if is_root { Path::new("/sys") } else { dir.path() };

    let place = Place::new();
    let error = Home::create_with(
        &parent.join("syncshell-test-home"),
        "laptop",
        Some(KeyStoreKind::File),
        &PassphraseSource::none(),
        &place.keychain,
        &mut rng(),
    )
    .expect_err("not writable");
    assert!(matches!(error, HomeError::NoPermission { .. }), "{error}");
    assert!(error.to_string().contains("--home"), "{error}");
}

#[test]
fn a_path_that_is_a_file_is_refused() {
    let place = Place::new();
    fs::write(place.home(), "a file").expect("written");
    let error = place.create(Some(KeyStoreKind::File), &PassphraseSource::none()).expect_err("a file");
    assert!(matches!(error, HomeError::Io { .. }), "{error}");
    let error = place.open(&PassphraseSource::none()).expect_err("a file");
    assert!(matches!(error, HomeError::Io { .. } | HomeError::NotAHome { .. }), "{error}");
}

#[cfg(unix)]
#[test]
fn a_home_is_shut_to_other_users() {
    use std::os::unix::fs::PermissionsExt as _;

    let place = Place::new();
    place.create(Some(KeyStoreKind::File), &PassphraseSource::none()).expect("made");
    let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
    assert_eq!(mode(&place.home()), 0o700);
    for name in [CONFIG_FILE, KEY_FILE, LOCK_FILE] {
        assert_eq!(mode(&place.file(name)), 0o600, "{name}");
    }
}

#[test]
fn a_home_keeps_its_place_when_it_was_named_by_a_relative_path() {
    assert!(Home::default_path().is_ok_and(|path| path.is_absolute() && path.to_string_lossy().contains("syncshell")));
    let error = Home::open("no/such/home", &PassphraseSource::none()).expect_err("nothing there");
    let HomeError::NotAHome { path } = error else { panic!("{error}") };
    assert!(path.is_absolute());
}

#[test]
fn public_relays_are_used_until_the_home_says_otherwise() {
    let place = Place::without_keychain();
    let (home, _) = place.create(Some(KeyStoreKind::File), &PassphraseSource::none()).expect("a home");
    assert!(home.uses_public_relays());
    let before = fs::read_to_string(place.file("home.toml")).expect("settings");
    for used in [false, true] {
        Home::set_public_relays(place.home(), used).expect("settings");
        assert_eq!(place.open(&PassphraseSource::none()).expect("a home").uses_public_relays(), used);
    }
    assert_eq!(fs::read_to_string(place.file("home.toml")).expect("settings"), before);
    assert!(matches!(Home::set_public_relays(place.file("none"), true), Err(HomeError::NotAHome { .. })));
}
