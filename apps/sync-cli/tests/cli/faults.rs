//! Folders between real processes when something goes wrong, and each guard where it is met.

use std::os::unix::fs::symlink;

use super::*;

// ---- killed ----

#[cfg(target_os = "linux")]
mod killed {
    use sync_soak::command::Program;
    use sync_soak::faults::{self, Victim, Which};

    use super::*;

    /// Kills of one test, each a matter of seconds; `cargo xtask faults` does it at every step.
    const KILLS: usize = 6;

    fn killed(victim: Victim) {
        if let Err(why) = faults::is_possible() {
            return skip(&why);
        }
        let world = World::new();
        let program = Program::find(Some(Path::new(PROGRAM)), world.dir().join("run")).expect("built");
        let report = faults::run(&program, world.dir(), victim, Which::Some(KILLS), |line| eprintln!("{line}"));
        let report = report.unwrap_or_else(|error| panic!("{error:#}"));
        assert!(report.kills > 3, "{report:?}");
    }

    #[test]
    fn r9_who_applies_a_change_may_be_killed_after_any_step() {
        killed(Victim::Receiver);
    }

    #[test]
    fn r9_who_tells_a_change_may_be_killed_after_any_step() {
        killed(Victim::Sender);
    }
}

// ---- full disks ----

/// A small file system of its own.
pub(super) struct Disk(pub(super) PathBuf);

impl Disk {
    /// None where this process may not mount one.
    pub(super) fn new(at: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&at).expect("made");
        let mounted = geteuid().is_root() && mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], &at);
        if !mounted {
            skip("a full disk is made by mounting a small one, which is not allowed here");
        }
        mounted.then_some(Self(at))
    }

    fn resize(&self, size: &str) {
        assert!(mount(&["-o", &format!("remount,size={size}")], &self.0), "remounted");
    }

    /// Fills it until so many bytes are left.
    pub(super) fn fill(&self, left: u64) -> PathBuf {
        let filler = self.0.join("filler");
        let free = || {
            let stat = rustix::fs::statvfs(&self.0).expect("a file system");
            stat.f_bavail * stat.f_frsize
        };
        let mut file = fs::File::create(&filler).expect("made");
        while free() > left {
            let block = vec![b'f'; usize::try_from((free() - left).min(1 << 16)).expect("small")];
            file.write_all(&block).expect("written");
        }
        filler
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

fn mount(arguments: &[&str], at: &Path) -> bool {
    Command::new("mount").args(arguments).arg(at).output().is_ok_and(|output| output.status.success())
}

/// Bytes that no compression makes less.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("read");
    bytes
}

/// Two homes in sync, both served.
struct Synced {
    world: World,
    anna: Home,
    ben: Home,
    here: PathBuf,
    there: PathBuf,
    serving: [Option<Reaped>; 2],
}

impl Synced {
    fn new() -> Self {
        Self::of(World::new())
    }

    fn of(world: World) -> Self {
        let (here, there) = (world.dir().join("here"), world.dir().join("there"));
        Self::between(world, here, there)
    }

    fn between(world: World, here: PathBuf, there: PathBuf) -> Self {
        let (anna, ben) = (world.home("anna"), world.home("ben"));
        Self::with(world, anna, ben, here, there)
    }

    fn with(world: World, anna: Home, ben: Home, here: PathBuf, there: PathBuf) -> Self {
        let (anna, ben) = (anna.made(), ben.made());
        write(&here.join("first.txt"), "the first");
        let serving = [Some(anna.serve()), Some(ben.serve())];
        let synced = Self { world, anna, ben, here, there, serving };
        let mut share = synced.anna.spawn(&["share", &text(&synced.here), "--json"]);
        let code = share.line()["code"].as_str().expect("a code").to_owned();
        synced.ben.ran(&["join", &code, &text(&synced.there)]).success();
        share.line();
        assert_eq!(share.wait().code(), Some(0));
        synced.settle();
        synced
    }

    /// Waits until both are equal and say so.
    fn settle(&self) {
        equal(&self.here, &self.there);
        self.anna.settled();
        self.ben.settled();
        equal(&self.here, &self.there);
    }

    fn stop(&mut self, who: usize) {
        if let Some(serving) = self.serving[who].take() {
            signal(serving.0.id(), Signal::TERM);
            assert_eq!(serving.wait().code(), Some(0));
        }
    }

    fn start(&mut self, who: usize) {
        self.serving[who] = Some([&self.anna, &self.ben][who].serve());
    }
}

/// Waits until `status` says something.
fn until_said(home: &Home, wanted: &str) -> String {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let status = home.ran(&["status"]).success();
        if status.contains(wanted) {
            return status;
        }
        assert!(Instant::now() < give_up, "{wanted:?} is not said: {status}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn is_at(path: &Path, content: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|there| there == content)
}

#[test]
fn r9_a_receiver_whose_disk_is_full_says_so_and_goes_on_once_there_is_room() {
    let world = World::new();
    let Some(disk) = Disk::new(world.dir().join("disk"), "20m") else { return };
    let (here, there) = (world.dir().join("here"), disk.0.join("there"));
    let synced = Synced::between(world, here.clone(), there.clone());
    // it would fit, and leave less than one part in a hundred free
    let filler = disk.fill(240 << 10);
    write(&here.join("small"), &"s".repeat(100 << 10));
    write(&here.join("first.txt"), "the second");
    until_said(&synced.ben, "the disk is full: free some space");
    assert!(!there.join("small").exists());
    fs::remove_file(filler).expect("removed");
    synced.settle();
    // and what would not fit at all
    write(&here.join("large"), &"l".repeat(30 * MIB));
    let status = until_said(&synced.ben, "large: the disk is full");
    assert!(status.contains("syncing, "), "{status}");
    write(&there.join("bens.txt"), "goes on");
    until("what needs no room goes on", || is_at(&here.join("bens.txt"), "goes on"));
    disk.resize("80m");
    synced.settle();
    assert_eq!(tree(&there).len(), 4, "{:?}", tree(&there).keys());
}

#[test]
fn r9_a_home_whose_disk_is_full_says_so_and_goes_on_once_there_is_room() {
    for (who, name) in ["anna", "ben"].into_iter().enumerate() {
        let world = World::new();
        let Some(disk) = Disk::new(world.dir().join("disk"), "24m") else { return };
        let mut homes = [world.home("anna"), world.home("ben")];
        homes[who].path = disk.0.join(name);
        let [anna, ben] = homes;
        let (here, there) = (world.dir().join("here"), world.dir().join("there"));
        let synced = Synced::with(world, anna, ben, here.clone(), there.clone());
        let filler = disk.fill(0);
        for number in 0..200 {
            write(&here.join(format!("many/{number}")), &format!("number {number}"));
        }
        write(&here.join("first.txt"), "the second");
        let home = [&synced.anna, &synced.ben][who];
        until_said(home, "full");
        assert!(["the first", "the second"].iter().any(|content| is_at(&there.join("first.txt"), content)));
        fs::remove_file(filler).expect("removed");
        synced.settle();
        assert_eq!(tree(&there).len(), 202);
    }
}

// ---- what changes under our feet ----

#[test]
fn a_file_that_changes_while_it_is_sent_arrives_as_it_is_in_the_end() {
    let mut synced = Synced::new();
    let (here, there) = (synced.here.clone(), synced.there.clone());
    let kept = fs::read_to_string(there.join("first.txt")).expect("there");
    synced.stop(0);
    let command = synced.anna.command(&[&SERVE[..], &["--limit-rate", "4M"]].concat());
    synced.serving[0] = Some(synced.anna.serve_as(command));
    let mut bytes = noise(24 * MIB);
    fs::write(here.join("large"), &bytes).expect("written");
    until("a part of it has arrived", || {
        synced.ben.only_folder()["fetched_bytes"].as_u64().is_some_and(|fetched| fetched > MIB as u64)
    });
    assert!(!there.join("large").exists(), "no part of a file is seen");
    // in place, at its begin and its end
    let mut file = fs::OpenOptions::new().write(true).open(here.join("large")).expect("there");
    bytes[..9].copy_from_slice(b"the begin");
    file.write_all(b"the begin").expect("written");
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).expect("there");
    file.write_all(b"the end").expect("written");
    bytes.extend_from_slice(b"the end");
    drop(file);
    until("all of it has arrived", || fs::read(there.join("large")).is_ok_and(|there| there == bytes));
    synced.settle();
    assert!(is_at(&there.join("first.txt"), &kept));
    assert_eq!(tree(&there).len(), 2, "{:?}", tree(&there).keys());
}

#[test]
fn r9_a_folder_that_is_replaced_or_gone_stops_and_deletes_nothing() {
    let synced = Synced::new();
    let (here, there, away) = (synced.here.clone(), synced.there.clone(), synced.world.dir().join("away"));
    let elsewhere = synced.world.dir().join("elsewhere");
    write(&elsewhere.join("private"), "not synced");
    type Replace = fn(&Path, &Path);
    let replacements: [(&str, Replace, &str); 5] = [
        ("nothing", |_, _| {}, "is missing"),
        ("a file", |at, _| fs::write(at, "a file").expect("written"), "is a file"),
        ("a link", |at, to| symlink(to, at).expect("made"), "does not say that it is this folder"),
        ("an empty directory", |at, _| fs::create_dir(at).expect("made"), "does not say that it is this folder"),
        ("a dangling link", |at, _| symlink("/nonexistent", at).expect("made"), "is missing"),
    ];
    for (what, replace, said) in replacements {
        fs::rename(&there, &away).expect("renamed");
        replace(&there, &elsewhere);
        let status = {
            // whoever asks for a look gets one at once
            synced.ben.ran(&["rescan", "here"]);
            until_said(&synced.ben, said)
        };
        assert!(status.contains("stopped: "), "{what}: {status}");
        write(&here.join(what), what);
        thread::sleep(Duration::from_millis(300));
        assert!(is_at(&here.join("first.txt"), "the first"), "{what}");
        assert_eq!(tree(&elsewhere).len(), 1, "{what}: {:?}", tree(&elsewhere).keys());
        assert!(!elsewhere.join(".syncshell").exists(), "{what}");
        match fs::symlink_metadata(&there) {
            Ok(kind) if kind.is_dir() => {
                assert!(tree(&there).is_empty(), "{what}");
                fs::remove_dir_all(&there).expect("removed");
            }
            Ok(_) => fs::remove_file(&there).expect("removed"),
            Err(_) => {}
        }
        write(&away.join(format!("made while {what} was there")), what);
        fs::rename(&away, &there).expect("renamed");
        synced.ben.ran(&["rescan", "here"]);
        synced.settle();
        assert!(is_at(&there.join(what), what));
    }
    assert_eq!(tree(&here).len(), 11);
}

#[test]
fn r9_a_home_whose_database_is_deleted_takes_no_file_with_it() {
    let mut synced = Synced::new();
    let (here, there) = (synced.here.clone(), synced.there.clone());
    for name in ["sync.db", "sync.db-wal", "sync.db-shm"] {
        fs::remove_file(synced.ben.path.join(name)).expect("removed");
    }
    write(&here.join("annas"), "anna's");
    write(&there.join("bens"), "ben's");
    thread::sleep(Duration::from_secs(1));
    // a database without a name is still one, until the process ends
    drop(synced.serving[1].take());
    let contents = |root: &Path| tree(root).into_values().collect::<Vec<_>>();
    for root in [&here, &there] {
        assert!(is_at(&root.join("first.txt"), "the first"));
    }
    assert!(contents(&there).contains(&"ben's".to_owned()));
    // it begins anew only if that is said, and takes the folder up where it is
    for verb in [&["status"][..], &["run"], &["push", "x"]] {
        let refused = synced.ben.ran(verb).fails(5);
        assert!(refused.contains("sync.db is gone or empty"), "{refused}");
    }
    synced.ben.ran(&["init", "--anew"]).success();
    assert!(synced.ben.ran(&["status"]).success().contains("no group yet"));
    // there is a database again
    assert!(synced.ben.ran(&["init", "--anew"]).fails(5).contains("is a home already"));
    synced.start(1);
    let mut invite = synced.anna.spawn(&["invite", "--json"]);
    let code = invite.line()["code"].as_str().expect("a code").to_owned();
    synced.ben.ran(&["join", &code, &text(&there)]).success();
    synced.settle();
    assert_eq!(contents(&here).len(), 3, "{:?}", tree(&here));
    assert!(contents(&here).contains(&"ben's".to_owned()));
}

// ---- clocks ----

/// What lets a program see another time; none where it is not installed.
fn other_clock() -> Option<PathBuf> {
    let found = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    found.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.exists())
}

#[test]
fn r9_a_clock_a_year_off_neither_resurrects_nor_loses() {
    let Some(library) = other_clock() else {
        return skip("another clock is made with libfaketime: install the package faketime");
    };
    for offset in ["+365d", "-365d"] {
        let mut synced = Synced::new();
        let (here, there) = (synced.here.clone(), synced.there.clone());
        for name in ["gone here", "gone there", "edited here", "edited there", "both"] {
            write(&here.join(name), name);
        }
        synced.settle();
        synced.stop(1);
        fs::remove_file(here.join("gone here")).expect("removed");
        write(&here.join("edited here"), "anna's edit");
        write(&here.join("both"), "anna's of both");
        synced.anna.ran(&["rescan", "here"]).success();
        fs::remove_file(there.join("gone there")).expect("removed");
        write(&there.join("edited there"), "ben's edit");
        write(&there.join("both"), "ben's of both");
        // programs of that day give their files its times
        let year = Duration::from_secs(365 * 24 * 3600);
        let now = std::time::SystemTime::now();
        let then = if offset.starts_with('+') { now + year } else { now - year };
        for name in ["edited there", "both"] {
            let file = fs::OpenOptions::new().write(true).open(there.join(name)).expect("there");
            file.set_modified(then).expect("set");
        }
        let mut command = synced.ben.command(&SERVE);
        command.env("LD_PRELOAD", &library).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        synced.serving[1] = Some(synced.ben.serve_as(command));
        synced.settle();
        // versions are named by the clock that the process sees
        write(&here.join("edited there"), "anna's over it");
        until("it arrives", || is_at(&there.join("edited there"), "anna's over it"));
        synced.settle();
        let versions = synced.ben.json(&["versions", &text(&there.join("edited there"))])[0]["versions"].clone();
        let real = now.duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let is_off = |version: &Value| {
            version["at"].as_u64().is_some_and(|at| Duration::from_millis(at).abs_diff(real) > year / 2)
        };
        assert!(versions.as_array().is_some_and(|versions| versions.iter().any(is_off)), "{offset}: {versions}");

        let tree = tree(&here);
        let mut contents: Vec<&str> = tree.values().map(String::as_str).collect();
        contents.sort_unstable();
        let expected = ["anna's edit", "anna's of both", "anna's over it", "ben's of both", "the first"];
        assert_eq!(contents, expected, "{offset}: {:?}", tree.keys());
        assert_eq!(
            tree.keys().filter(|path| text(path).starts_with("both (conflict ")).count(),
            1,
            "{:?}",
            tree.keys()
        );
        // and back in its time it is the same
        synced.stop(1);
        synced.start(1);
        fs::remove_file(there.join("edited here")).expect("removed");
        until("it is gone", || !here.join("edited here").exists());
        synced.settle();
        assert_eq!(super::tree(&here).len(), 4, "{offset}");
    }
}

#[test]
fn a_device_that_was_off_for_a_year_comes_back_by_a_snapshot_and_neither_resurrects_nor_loses() {
    let Some(library) = other_clock() else {
        return skip("another clock is made with libfaketime: install the package faketime");
    };
    let year = Duration::from_secs(365 * 24 * 3600);
    for offset in ["+365d", "-365d"] {
        let mut synced = Synced::new();
        let (here, there, third) = (synced.here.clone(), synced.there.clone(), synced.world.dir().join("third"));
        for name in ["gone here", "gone there", "edited here", "edited there", "both", "gone and edited"] {
            write(&here.join(name), name);
        }
        synced.settle();
        synced.stop(1);
        synced.stop(0);
        let cleo = synced.world.home("cleo").made();
        let serve = |home: &Home, clock: Option<&str>| {
            let log = synced.world.dir().join(format!("{}.log", home.name));
            let mut command = home.command(&SERVE);
            command.env("SYNCSHELL_SNAPSHOT_AFTER", "30").env("SYNCSHELL_LOG", "sync_client=debug");
            command.stderr(fs::File::create(&log).expect("made"));
            if let Some(offset) = clock {
                command.env("LD_PRELOAD", &library).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            }
            (home.serve_as(command), log)
        };
        let (_anna, annas_log) = serve(&synced.anna, None);
        let (_cleo, _) = serve(&cleo, None);
        let mut invite = synced.anna.spawn(&["invite", "--json"]);
        let code = invite.line()["code"].as_str().expect("a code").to_owned();
        cleo.ran(&["join", &code, &text(&third)]).success();
        equal(&here, &third);

        // what happens meanwhile is more than a snapshot's worth, and leaves the log once another device has it
        for name in ["gone here", "gone and edited"] {
            fs::remove_file(here.join(name)).expect("removed");
        }
        for name in ["edited here", "both"] {
            write(&here.join(name), &format!("anna's {name}"));
        }
        for number in 0..100 {
            let (path, content) = (format!("in/{}", number % 10), number.to_string());
            match number % 4 {
                0 => write(&here.join("passing"), &content),
                2 => fs::remove_file(here.join("passing")).expect("removed"),
                _ => write(&here.join(&path), &content),
            }
            let arrived = || match number % 4 {
                0 => is_at(&third.join("passing"), &content),
                2 => !third.join("passing").exists(),
                _ => is_at(&third.join(&path), &content),
            };
            until("it arrives", arrived);
        }
        let said = |log: &Path, what: &str| fs::read_to_string(log).is_ok_and(|log| log.contains(what));
        until("the log is short", || said(&annas_log, "covered entries left the log"));

        // and on the device that is off, whose programs give their files the times of its clock
        let now = std::time::SystemTime::now();
        let then = if offset.starts_with('+') { now + year } else { now - year };
        fs::remove_file(there.join("gone there")).expect("removed");
        for name in ["edited there", "both", "gone and edited", "new"] {
            write(&there.join(name), &format!("ben's {name}"));
            let file = fs::OpenOptions::new().write(true).open(there.join(name)).expect("there");
            file.set_modified(then).expect("set");
        }
        let (_ben, bens_log) = serve(&synced.ben, Some(offset));
        equal(&here, &there);
        synced.ben.settled();
        synced.anna.settled();
        equal(&here, &there);
        equal(&here, &third);
        assert!(said(&bens_log, "a snapshot was taken in"), "{offset}: it came by the log");

        let mut found = tree(&here);
        found.retain(|path, _| !path.starts_with("in") || path == Path::new("in/9"));
        let copy = |path: &Path| text(path).starts_with("both (conflict ");
        let copies: Vec<_> = found.iter().filter(|(path, _)| copy(path)).map(|(_, content)| content.clone()).collect();
        found.retain(|path, _| !copy(path));
        let both = found.remove(Path::new("both")).into_iter().chain(copies).collect::<std::collections::BTreeSet<_>>();
        assert!(both.iter().eq(["anna's both", "ben's both"]), "{offset}: {both:?}");
        let found: Vec<_> = found.iter().map(|(path, content)| (text(path), content.as_str())).collect();
        let found: Vec<_> = found.iter().map(|(path, content)| (path.as_str(), *content)).collect();
        let expected = [
            ("edited here", "anna's edited here"),
            ("edited there", "ben's edited there"),
            ("first.txt", "the first"),
            ("gone and edited", "ben's gone and edited"),
            ("in/9", "99"),
            ("new", "ben's new"),
        ];
        assert_eq!(found, expected, "{offset}");
    }
}

// ---- what may not be read or written ----

/// A home that is served without the rights of root, which no permission stops.
fn serve_as_nobody(home: &Home) -> Reaped {
    let mut command = home.command(&SERVE);
    if geteuid().is_root() {
        let dir = home.world.dir();
        let program = dir.join("program");
        fs::copy(PROGRAM, &program).expect("copied");
        let given = Command::new("chown").args(["-R", "65534:65534"]).arg(dir).status().expect("started");
        assert!(given.success());
        command = Command::new(program);
        command.args(SERVE);
        command = home.world.hermetic(command);
        command.env("SYNCSHELL_HOME", &home.path).uid(65_534).gid(65_534);
    }
    home.serve_as(command)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
}

#[test]
fn what_may_not_be_read_is_named_and_comes_once_it_may() {
    let mut synced = Synced::new();
    let (here, there) = (synced.here.clone(), synced.there.clone());
    write(&here.join("closed/inside"), "inside");
    synced.settle();
    synced.stop(0);
    write(&here.join("secret"), "secret");
    set_mode(&here.join("secret"), 0o000);
    set_mode(&here.join("closed"), 0o000);
    synced.serving[0] = Some(serve_as_nobody(&synced.anna));
    let status = until_said(&synced.anna, "not in sync: secret: ");
    assert!(status.contains("not in sync: closed: "), "{status}");
    // the rest is watched as before
    assert!(!status.contains("changes are found by rescans"), "{status}");
    write(&here.join("open"), "open");
    until("the rest goes on", || is_at(&there.join("open"), "open"));
    assert!(is_at(&there.join("closed/inside"), "inside"), "what cannot be seen is not gone");
    assert!(!there.join("secret").exists());
    set_mode(&here.join("secret"), 0o600);
    set_mode(&here.join("closed"), 0o755);
    until("it comes", || is_at(&there.join("secret"), "secret"));
    synced.settle();
    // and what could not be read is watched from here on
    write(&here.join("closed/later"), "later");
    until("it comes too", || is_at(&there.join("closed/later"), "later"));
    synced.anna.ran(&["rescan", "here"]).success();
    let status = synced.anna.ran(&["status"]).success();
    assert!(!status.contains("not in sync"), "{status}");
}

#[test]
fn what_cannot_be_written_into_a_read_only_directory_is_named_and_comes_once_it_can() {
    let mut synced = Synced::new();
    let (here, there) = (synced.here.clone(), synced.there.clone());
    write(&here.join("fixed/old"), "old");
    write(&here.join("fixed/goes"), "goes");
    synced.settle();
    // without a way to tell of the mode, or the other side would have it too
    synced.ben.ran(&["pause", "here"]).success();
    synced.stop(1);
    write(&here.join("fixed/new"), "new");
    write(&here.join("fixed/old"), "old, and edited");
    fs::remove_file(here.join("fixed/goes")).expect("removed");
    synced.anna.ran(&["rescan", "here"]).success();
    synced.serving[1] = Some(serve_as_nobody(&synced.ben));
    set_mode(&there.join("fixed"), 0o500);
    synced.ben.ran(&["resume", "here"]).success();
    let status = until_said(&synced.ben, "fixed/new: permission denied: give the user that runs syncshell");
    assert!(status.contains("syncing, "), "{status}");
    assert_eq!(fs::read_dir(there.join("fixed")).expect("there").count(), 2);
    assert!(is_at(&there.join("fixed/old"), "old") && is_at(&there.join("fixed/goes"), "goes"));
    set_mode(&there.join("fixed"), 0o755);
    until("it comes", || is_at(&there.join("fixed/new"), "new") && is_at(&there.join("fixed/old"), "old, and edited"));
    synced.settle();
    assert!(!there.join("fixed/goes").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn where_the_system_watches_no_more_directories_rescans_find_what_changes() {
    for watched in [1, 12] {
        let mut synced = Synced::new();
        let (here, there) = (synced.here.clone(), synced.there.clone());
        for number in 0..8 {
            write(&here.join(format!("dir {number}/file")), "file");
        }
        synced.settle();
        synced.stop(0);
        // one, and no directory can be watched; twelve, and those that come later cannot
        let script = format!(r#"echo {watched} > /proc/sys/user/max_inotify_watches && exec "$0" "$@""#);
        let plain = synced.anna.command(&SERVE);
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "sh", "-c", &script])
            .arg(plain.get_program())
            .args(plain.get_args());
        let mut command = synced.world.hermetic(command);
        command.env("SYNCSHELL_HOME", &synced.anna.path).env("PATH", search_path());
        let mut probe = Command::new("unshare");
        probe.args([
            "--user",
            "--map-root-user",
            "sh",
            "-c",
            &format!("echo {watched} > /proc/sys/user/max_inotify_watches"),
        ]);
        if !probe.ran().status.success() {
            return skip("a limit of what is watched is set in a user namespace, which is not allowed here");
        }
        synced.serving[0] = Some(synced.anna.serve_as(command));
        if watched > 1 {
            synced.anna.settled();
            for number in 0..20 {
                write(&here.join(format!("later {number}/file")), "file");
            }
        }
        let status = until_said(&synced.anna, "changes are found by rescans");
        assert!(status.contains("fs.inotify.max_user_watches"), "{status}");
        write(&here.join("dir 7/new"), "new");
        synced.anna.ran(&["rescan", "here"]).success();
        until("it arrives", || is_at(&there.join("dir 7/new"), "new"));
        synced.settle();
    }
}

// ---- guards, by the command ----

#[test]
fn a_mass_change_that_is_held_back_is_undone_or_confirmed_by_the_command() {
    let mut synced = Synced::new();
    let (here, there) = (synced.here.clone(), synced.there.clone());
    for number in 0..40 {
        write(&here.join(format!("{number}")), &format!("number {number}"));
    }
    synced.settle();
    for verb in ["undo", "confirm"] {
        // all at once for the other, however it is noticed here
        synced.stop(1);
        for number in 0..15 {
            fs::remove_file(here.join(format!("{number}"))).expect("removed");
        }
        for number in 15..30 {
            write(&here.join(format!("{number}")), &format!("encrypted {verb} {number}"));
        }
        synced.anna.ran(&["rescan", "here"]).success();
        synced.start(1);
        let status = until_said(&synced.ben, "stopped: others deleted 15 and rewrote 15 of 4");
        assert!(status.contains("syncshell confirm"), "{status}");
        write(&here.join("meanwhile"), verb);
        thread::sleep(Duration::from_millis(500));
        assert_eq!(tree(&there).len() - usize::from(verb == "confirm"), 41, "{verb}");
        assert!(is_at(&there.join("20"), "number 20"));
        let done = &synced.ben.json(&[verb, "here"])[0];
        if verb == "undo" {
            assert_eq!(done["paths"], 30, "{done}");
        }
        synced.settle();
        let files = if verb == "undo" { 42 } else { 27 };
        assert_eq!(tree(&here).len(), files, "{verb}: {:?}", tree(&here).keys());
        let content = if verb == "undo" { "number 20".to_owned() } else { format!("encrypted {verb} 20") };
        assert!(is_at(&here.join("20"), &content) && is_at(&there.join("20"), &content));
    }
    // what was applied is kept
    let versions = synced.ben.json(&["versions", &text(&there.join("3"))]);
    assert_eq!(versions[0]["versions"].as_array().map(Vec::len), Some(1), "{versions:?}");
    assert!(synced.ben.ran(&["confirm", "nothing"]).fails(2).contains("no folder nothing"));
}

#[test]
fn a_limit_of_the_rate_holds_for_what_a_process_takes() {
    let mut synced = Synced::new();
    let (here, there) = (synced.here.clone(), synced.there.clone());
    synced.stop(1);
    let command = synced.ben.command(&[&SERVE[..], &["--limit-rate", "1M"]].concat());
    synced.serving[1] = Some(synced.ben.serve_as(command));
    let bytes = noise(4 * MIB);
    fs::write(here.join("large"), &bytes).expect("written");
    until("it is coming", || synced.ben.only_folder()["pending_bytes"].as_u64().is_some_and(|left| left > 0));
    thread::sleep(Duration::from_secs(1));
    assert!(!there.join("large").exists(), "4 MiB within a second at 1 MiB a second");
    until("it has come", || fs::read(there.join("large")).is_ok_and(|there| there == bytes));
}

#[test]
fn a_receive_only_folder_takes_changes_and_tells_none() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("x"), "x");
    let _serving = [anna.serve(), ben.serve()];
    let mut share = anna.spawn(&["share", &text(&here), "--json"]);
    let code = share.line()["code"].as_str().expect("a code").to_owned();
    ben.ran(&["join", &code, &text(&there), "--receive-only"]).success();
    equal(&here, &there);
    ben.settled();
    write(&there.join("mine"), "ben's");
    write(&there.join("x"), "ben's x");
    ben.ran(&["rescan", "here"]).success();
    write(&here.join("y"), "y");
    until("it arrives", || is_at(&there.join("y"), "y"));
    assert!(!here.join("mine").exists() && is_at(&here.join("x"), "x"));
    // an own edit is not overwritten without a copy
    write(&here.join("x"), "anna's x");
    until("both are there", || {
        let left: Vec<String> = tree(&there).into_values().collect();
        left.contains(&"anna's x".to_owned()) || ben.ran(&["status"]).success().contains("not in sync: x")
    });
    let kept = tree(&there).into_values().chain(tree(&there.join(".syncshell/versions")).into_values());
    assert!(kept.into_iter().any(|content| content == "ben's x"), "{:?}", tree(&there));
    assert!(ben.ran(&["status"]).success().contains("receive-only: changes made here are not told"));
}

#[test]
fn a_folder_is_refused_that_overlaps_by_whichever_path() {
    let synced = Synced::new();
    let (world, here) = (&synced.world, &synced.here);
    fs::create_dir_all(here.join("inside/deep")).expect("made");
    let link = world.dir().join("link");
    symlink(here.join("inside"), &link).expect("made");
    let above = world.dir().join("above");
    symlink(world.dir(), &above).expect("made");
    fs::create_dir(world.dir().join("beside")).expect("made");
    for path in [
        link.clone(),
        link.join("deep"),
        link.join("../inside/deep"),
        world.dir().join("beside/../here/inside"),
        above.clone(),
        above.join("here/inside"),
        here.join("inside/../.."),
        link.join("not there yet"),
        synced.world.dir().join("beside/../anna"),
    ] {
        let ran = synced.anna.ran(&["share", &text(&path), "--no-invite"]);
        let is_there = path.exists();
        let errors = ran.fails(if is_there { 2 } else { 1 });
        assert!(!is_there || errors.contains("overlaps with"), "{}: {errors}", path.display());
    }
    let group = synced.anna.only_folder()["group"].as_str().expect("a group").to_owned();
    write(&world.dir().join("beside/x"), "x");
    synced.anna.ran(&["share", &text(&world.dir().join("beside")), "--group", &group, "--no-invite"]).success();
    symlink(&synced.there, world.dir().join("link there")).expect("made");
    for path in [world.dir().join("link there/new"), world.dir().join("beside/../there/new")] {
        let errors = synced.ben.ran(&["join", &group, &text(&path), "--folder", "beside"]).fails(2);
        assert!(errors.contains("overlaps with"), "{}: {errors}", path.display());
        assert!(!synced.there.join("new").exists());
    }
    assert_eq!(synced.anna.json(&["folders"])[0]["folders"].as_array().map(Vec::len), Some(2));
    synced.settle_first();
}

impl Synced {
    /// The same for the folder it began with, where there are more.
    fn settle_first(&self) {
        write(&self.here.join("goes on"), "x");
        equal(&self.here, &self.there);
    }
}

#[test]
fn a_file_that_is_newly_ignored_stays_everywhere_and_syncs_no_more() {
    let synced = Synced::new();
    let (here, there) = (&synced.here, &synced.there);
    write(&here.join("notes.log"), "first");
    write(&here.join("build/out"), "first");
    write(&here.join("keep.txt"), "first");
    synced.settle();
    write(&here.join(".syncshellignore"), "*.log\n/build/\n");
    synced.settle();
    write(&here.join("notes.log"), "anna's");
    write(&there.join("notes.log"), "ben's");
    fs::remove_dir_all(there.join("build")).expect("removed");
    write(&there.join("keep.txt"), "second");
    for home in [&synced.anna, &synced.ben] {
        home.ran(&["rescan", "here"]).success();
    }
    until("the rest goes on", || is_at(&here.join("keep.txt"), "second"));
    thread::sleep(Duration::from_millis(300));
    assert!(is_at(&here.join("notes.log"), "anna's") && is_at(&there.join("notes.log"), "ben's"));
    assert!(is_at(&here.join("build/out"), "first") && !there.join("build").exists());
    synced.anna.settled();
    synced.ben.settled();
}

#[test]
fn pause_and_resume_lose_no_change_of_either_side() {
    let synced = Synced::new();
    let (here, there) = (&synced.here, &synced.there);
    synced.ben.ran(&["pause", "--all"]).success();
    write(&here.join("first.txt"), "anna's");
    write(&there.join("first.txt"), "ben's");
    write(&there.join("made while it was paused"), "x");
    synced.anna.ran(&["rescan", "here"]).success();
    thread::sleep(Duration::from_millis(300));
    assert!(is_at(&there.join("first.txt"), "ben's") && !here.join("made while it was paused").exists());
    synced.ben.ran(&["resume", "here"]).success();
    synced.settle();
    let contents: Vec<String> = tree(here).into_values().collect();
    assert!(["anna's", "ben's", "x"].iter().all(|content| contents.contains(&(*content).to_owned())), "{contents:?}");
    assert_eq!(contents.len(), 3);
}
