//! A device's places in its groups, taken along in a file between real processes.

use super::faults::Disk;
use super::*;

/// Backs a home up under a key that is drawn, and returns it.
fn backed_up(home: &Home, file: &Path) -> String {
    let lines = home.json(&["backup", &text(file), "--recovery-key"]);
    assert_eq!((&lines[0]["event"], lines[0]["groups"].as_array().map(Vec::len)), (&"backed-up".into(), Some(1)));
    lines[0]["recovery_key"].as_str().expect("a key").to_owned()
}

/// Takes the places of a backup in a new home.
fn recovered(world: &World, name: &'static str, file: &Path, key: &str) -> Home {
    let home = world.home(name);
    let key = home.file("key", &format!("{key}\n"));
    let new = ["recover", &text(file), "--backup-passphrase-file", &key, "--key-store", "file", "--name", name];
    let lines = home.json(&new);
    assert_eq!(lines.last().expect("a line")["event"], "recovered", "{lines:?}");
    home
}

#[test]
fn a_lost_device_comes_back_from_its_backup_with_its_folder_and_its_rights() {
    let world = World::new();
    let [here, there, again] = ["here", "there", "again"].map(|name| world.dir().join(name));
    fs::create_dir(&here).expect("made");
    fs::write(here.join("letter"), "kept by anna").expect("written");
    let (anna, ben) = world.share(&here, &there);
    let file = world.dir().join("ben.backup");
    let served = [anna.serve(), ben.serve()];
    // by the process that serves the home
    let key = backed_up(&ben, &file);
    assert_eq!(mode(&file), 0o600);
    drop(served);
    fs::remove_dir_all(&ben.path).expect("lost");
    fs::remove_dir_all(&there).expect("lost");

    let found = recovered(&world, "ben-again", &file, &key);
    let _anna = anna.serve();
    let group = found.json(&["status"])[0]["groups"][0]["group"].as_str().expect("a group").to_owned();
    let placing = found.spawn(&["join", &group, &text(&again), "--json"]);
    until("what anna has is there", || fs::read_to_string(again.join("letter")).is_ok_and(|it| it == "kept by anna"));
    fs::write(again.join("answer"), "from ben").expect("written");
    until("anna has the answer", || here.join("answer").exists());
    assert_eq!(placing.interrupt().code(), Some(0));
    // and lets others in as before
    join_by_code(&found, &world.home("carl").made());
}

#[test]
fn a_backup_that_is_killed_or_has_no_room_leaves_the_older_one() {
    let world = World::new();
    let Some(disk) = Disk::new(world.dir().join("disk"), "1m") else { return };
    let (anna, _ben) = world.pair();
    let file = disk.0.join("anna.backup");
    let key = backed_up(&anna, &file);
    let older = fs::read(&file).expect("read");
    let filler = disk.fill(0);
    let full = anna.ran(&["backup", &text(&file), "--recovery-key"]).fails(7);
    assert!(full.contains("anna.backup"), "{full}");
    assert_eq!(fs::read(&file).expect("read"), older);
    fs::remove_file(filler).expect("removed");

    let passphrase = anna.file("passphrase", "seven lamps under a quiet bridge\n");
    let backup = ["backup", &text(&file), "--backup-passphrase-file", &passphrase];
    for wait in [20, 200, 400, 600, 800, 1000, 1200] {
        let mut child = Reaped(anna.piped(&backup));
        thread::sleep(Duration::from_millis(wait));
        child.0.kill().expect("killed");
        child.0.wait().expect("ended");
        if fs::read(&file).expect("read") != older {
            break;
        }
    }
    // what a killed one has put there is whole
    if fs::read(&file).expect("read") == older {
        anna.ran(&backup).success();
    }
    recovered(&world, "anna-again", &file, "seven lamps under a quiet bridge");
    let wrong = world.home("carl");
    let key = wrong.file("key", &key);
    let new = ["recover", &text(&file), "--backup-passphrase-file", &key, "--key-store", "file"];
    assert!(wrong.ran(&new).errors.contains("wrong passphrase or recovery key"));
}

#[test]
fn a_backup_needs_something_to_be_sealed_under_and_a_free_name() {
    let world = World::new();
    let home = world.home("anna").made();
    let said = home.ran(&["backup", "file"]).fails(2);
    assert!(said.contains("--backup-passphrase-file") && said.contains("--recovery-key"), "{said}");
    let thesis = PathBuf::from(home.file("thesis", "years of work"));
    let said = home.ran(&["backup", &text(&thesis), "--recovery-key"]).fails(2);
    assert!(said.contains("is there already and is no backup"), "{said}");
    assert_eq!(fs::read(&thesis).expect("read"), b"years of work");
    let weak = home.file("weak", "password\n");
    let said = home.ran(&["backup", &text(&world.dir().join("new")), "--backup-passphrase-file", &weak]).fails(2);
    assert!(said.contains("guess"), "{said}");
    let nobody = world.home("ben");
    assert!(nobody.ran(&["recover", "/no/such/file", "--key-store", "file"]).errors.contains("/no/such/file"));
    assert!(!nobody.path.exists(), "no home is made for a backup that is not there");
}
