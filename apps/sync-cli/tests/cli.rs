//! The command as people and scripts meet it: real processes, real homes, nothing but the loopback network.
#![cfg(unix)]

#[path = "cli/backup.rs"]
mod backup;
#[path = "cli/faults.rs"]
mod faults;

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use expect_test::{expect, expect_file};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_syncshell");

/// How long anything may take: far more than it does on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const MIB: usize = 1 << 20;

/// What keeps a home in sync until a test lets go of it.
const SERVE: [&str; 3] = ["run", "--json", "--until-eof"];

const VERBS: [&str; 29] = [
    "init", "share", "join", "invite", "run", "status", "folders", "devices", "members", "remove", "rotate", "pause",
    "resume", "rescan", "select", "leave", "relay", "confirm", "undo", "versions", "restore", "backup", "recover",
    "up", "down", "unit", "pair", "push", "pull",
];

// ---- the manual ----

#[test]
fn the_help_of_each_verb_is_as_reviewed() {
    let world = World::new();
    expect_file!["help/syncshell.txt"].assert_eq(&world.ran(&["--help"]).success());
    for verb in VERBS {
        let help = world.ran(&[verb, "--help"]).success();
        expect_file![format!("help/{verb}.txt")].assert_eq(&help);
    }
    expect_file!["help/demo.txt"].assert_eq(&world.ran(&["demo", "--help"]).success());
}

#[test]
fn what_cannot_be_understood_is_a_usage_error() {
    let home = World::new().home("anna");
    for arguments in [
        &["fly"][..],
        &["push"],
        &["pair"],
        &["pair", "--create", "--join", "X"],
        &["pair", "--create", "--expires-in", "601"],
        &["pull", "--raw", "--json"],
        &["--group", "xyz", "status"],
        &["init", "--key-store", "cloud"],
        &["push", "x", "--blob-id", "12"],
        &["share"],
        &["share", "x", "--send-only", "--receive-only"],
        &["share", "x", "--no-invite", "--qr"],
        &["join"],
        &["pause"],
        &["pause", "x", "--all"],
        &["select", "x"],
        &["select", "x", "y", "--all"],
        &["run", "--limit-rate", "fast"],
        &["run", "--api-port", "65536"],
        &["pair", "--join", "x", "--qr"],
    ] {
        home.ran(arguments).fails(2);
    }
}

// ---- init ----

#[test]
fn init_keeps_the_key_in_a_file_of_its_owner_and_warns() {
    let home = World::new().home("anna");
    let ran = home.ran(&["init", "--key-store", "file", "--name", "anna"]);
    assert!(ran.errors.contains("warning: the key of this home lies unprotected in"), "{ran:?}");
    assert!(ran.success().starts_with("Made the home of anna in "));
    assert_eq!(mode(&home.path), 0o700);
    for entry in fs::read_dir(&home.path).expect("a home") {
        let path = entry.expect("an entry").path();
        assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
    }
    expect![[r#"
        home    HOME (not served; `syncshell run` keeps it in sync)
        device  anna DEVICE
        no group yet; `syncshell share FOLDER` makes one, `syncshell join CODE` joins one
    "#]]
    .assert_eq(&home.plain_status());
}

#[test]
fn init_says_that_public_relays_are_used_unless_it_is_told_not_to() {
    let world = World::new();
    for (name, no) in [("anna", false), ("ben", true)] {
        let home = world.home(name);
        let mut arguments = vec!["init", "--key-store", "file", "--name", name];
        arguments.extend(no.then_some("--no-public-relays"));
        // nothing is connected to yet
        let ran = home.command(&arguments).env_remove("SYNCSHELL_PUBLIC_RELAYS").ran();
        let settings = || std::fs::read_to_string(home.path.join("home.toml")).expect("settings");
        assert_eq!(ran.errors.contains("public relays of n0"), !no, "{}", ran.errors);
        assert_eq!(settings().contains("public_relays = false"), no);
        home.ran(&["relay", "public", "off"]).success();
        assert!(settings().contains("public_relays = false"));
        home.ran(&["relay", "public", "on"]).success();
        assert!(!settings().contains("public_relays"));
    }
}

#[test]
fn init_with_a_passphrase_needs_the_same_one_ever_after() {
    let home = World::new().home("anna");
    let (right, wrong) = (home.file("right", "correct horse battery\n"), home.file("wrong", "incorrect horse"));
    home.ran(&["init", "--key-store", "passphrase", "--passphrase-file", &right, "--json"]).success();

    home.ran(&["status", "--passphrase-file", &right]).success();
    let ran = home.ran(&["status", "--passphrase-file", &wrong]);
    assert!(ran.fails(5).contains("wrong passphrase"));
    let ran = home.ran(&["status"]);
    assert!(ran.fails(5).contains("--passphrase-file"));
}

#[test]
fn init_takes_the_passphrase_that_systemd_passes() {
    let home = World::new().home("anna");
    let credential = home.file("syncshell.passphrase", "correct horse battery");
    let directory = Path::new(&credential).parent().expect("a directory");
    let with_credential = |arguments: &[&str]| home.command(arguments).env("CREDENTIALS_DIRECTORY", directory).ran();
    with_credential(&["init", "--key-store", "passphrase"]).success();
    with_credential(&["status"]).success();
    home.ran(&["status"]).fails(5);
}

#[test]
fn init_without_a_keychain_and_a_terminal_names_the_three_ways() {
    let home = World::new().home("anna");
    let errors = home.ran(&["init"]).fails(5);
    assert!(errors.contains("--key-store keychain|passphrase|file"), "{errors}");
    assert!(!home.path.exists());

    let errors = home.ran(&["init", "--key-store", "keychain"]).fails(5);
    assert!(errors.contains("the OS keychain does not work here"), "{errors}");
    let errors = home.ran(&["init", "--key-store", "passphrase"]).fails(5);
    assert!(errors.contains("--passphrase-file"), "{errors}");
    assert!(!home.path.exists(), "nothing weaker was taken");
}

#[test]
fn init_twice_leaves_the_first_home_alone() {
    let home = World::new().home("anna").made();
    let before = home.json(&["status"])[0]["device"].clone();
    let errors = home.ran(&["init", "--key-store", "file"]).fails(5);
    assert!(errors.contains("is a home already"), "{errors}");
    assert_eq!(home.json(&["status"])[0]["device"], before);
}

#[test]
fn a_passphrase_group_is_the_same_for_all_who_know_it() {
    let world = World::new();
    let (anna, ben, eve) = (world.home("anna"), world.home("ben"), world.home("eve"));
    let init = |home: &Home, passphrase: &str| {
        let file = home.file("group", passphrase);
        let group = ["--passphrase-group", "Family", "--group-passphrase-file", &file];
        home.ran(&[&["init", "--json", "--key-store", "file"], &group[..]].concat())
    };
    let made = json_lines(&init(&anna, "ferry lantern gravel mosaic tundra quiver\n").success());
    assert_eq!(made[0]["group"].as_str().map(str::len), Some(64));
    assert_eq!(made[0]["group_passphrase"], Value::Null, "its person knows it");
    let same = json_lines(&init(&ben, "ferry lantern gravel mosaic tundra quiver").success());
    assert_eq!(made[0]["group"], same[0]["group"]);
    anna.push("for all who know it");
    {
        let _serving = [anna.serve(), ben.serve()];
        assert_eq!(texts(&ben.follow(0, 1)), ["for all who know it"]);
    }

    let errors = init(&eve, "Family123").fails(2);
    assert!(errors.contains("weak-passphrase"), "{errors}");
    assert!(!eve.path.exists(), "a home without its group is none");

    let zoe = world.home("zoe");
    let errors = zoe.ran(&["init", "--key-store", "file", "--passphrase-group", "Family"]).fails(2);
    assert!(errors.contains("--group-passphrase-file"), "{errors}");
    let file = zoe.file("group", "ferry lantern gravel mosaic tundra quivers");
    let group = ["--passphrase-group", "Family", "--group-passphrase-file", &file];
    let ran = zoe.ran(&[&["init", "--key-store", "file"], &group[..]].concat());
    assert!(ran.errors.contains("can try passphrases on it at leisure"), "{ran:?}");
    assert!(ran.errors.contains("Nobody can be removed from it"), "{ran:?}");
    assert!(!ran.success().contains(made[0]["group"].as_str().expect("a group")));
}

// ---- push and pull in one home ----

#[test]
fn every_byte_comes_back_as_it_was_pushed() {
    let (anna, ben) = World::new().pair();
    let every_byte: Vec<u8> = (0..=255).collect();
    let blobs = [
        every_byte.clone(),
        Vec::new(),
        b"no newline".to_vec(),
        b"\n".to_vec(),
        b"\r\n\0".to_vec(),
        every_byte.iter().rev().copied().cycle().take(MIB).collect(),
    ];
    let mut before = anna.newest();
    let serving = [anna.serve(), ben.serve()];
    for blob in &blobs {
        let cursor = anna.push_bytes(blob);
        let after = before.to_string();
        let alone = anna.ran(&["pull", "--after-cursor", &after, "--limit", "1", "--raw"]).output();
        assert!(alone == *blob, "{} bytes became {}", blob.len(), alone.len());
        before = cursor;
    }
    let arrived = ben.follow(0, blobs.len());
    assert!(arrived.iter().map(|blob| &blob.bytes).eq(&blobs));
    drop(serving);

    // the same with nobody serving, all at once
    assert!(ben.ran(&["pull", "--raw"]).output() == blobs.concat());
    let with_nul: Vec<u8> = blobs.iter().flat_map(|blob| [blob, &b"\0"[..]].concat()).collect();
    assert!(ben.ran(&["pull", "-0"]).output() == with_nul);
    assert!(ben.pull(0).iter().map(|blob| &blob.bytes).eq(&blobs));
    let plain = [&every_byte[..], b"\nno newline\n\n\r\n\0", &blobs[5]].concat();
    assert!(ben.ran(&["pull"]).output() == plain, "only text gets a newline");
}

#[test]
fn push_and_pull_say_where_things_are() {
    let home = World::new().home("anna").made();
    let errors = home.ran(&["push", "early", "--wait", "0"]).fails(1);
    assert!(errors.contains("syncshell pair --create"), "{errors}");
    home.make_group();

    let stored = home.ran(&["push", "one", "--wait", "0"]).success();
    let words: Vec<_> = stored.split_whitespace().collect();
    let ["stored", "at", "cursor", cursor, "as", blob_id] = words[..] else { panic!("{stored}") };
    assert_eq!(blob_id.len(), 32);
    let lines = home.json(&["push", "-two", "--wait", "1"]);
    assert_eq!(lines[0]["state"], "stored");
    assert_eq!((&lines[1]["state"], &lines[1]["holders"]), (&"waiting".into(), &Value::Array(vec![])));
    let two = lines[0]["cursor"].as_u64().expect("a cursor");

    let ran = home.ran(&["pull"]);
    assert_eq!(ran.errors, format!("up to cursor {two}\n"));
    assert_eq!(ran.success(), "one\n-two\n");
    let lines = home.json(&["pull", "--limit", "1"]);
    assert_eq!((&lines[0]["text"], &lines[0]["bytes"]), (&"one".into(), &"b25l".into()));
    assert_eq!(
        (&lines[0]["cursor"], &lines[0]["blob_id"]),
        (&cursor.parse::<u64>().expect("one").into(), &blob_id.into())
    );
    assert_eq!((&lines[1]["max_cursor"], &lines[1]["has_more"]), (&lines[0]["cursor"], &true.into()));
    assert_eq!(home.ran(&["pull", "--after-cursor", cursor]).success(), "-two\n");
    let lines = home.json(&["pull", "--after-cursor", &two.to_string()]);
    assert_eq!(lines, [serde_json::json!({ "max_cursor": two, "has_more": false })]);
}

#[test]
fn a_push_repeated_under_its_blob_id_is_stored_once() {
    let home = World::new().home("anna").made();
    home.make_group();
    let push = |what: &str| home.ran(&["push", what, "--json", "--wait", "0", "--blob-id", &"ab".repeat(16)]);
    assert_eq!(push("one").success(), push("one").success());
    assert!(push("two").fails(2).contains("blob-id-reused"));
    assert_eq!(home.pull(0).len(), 1);
}

#[test]
fn more_than_a_blob_can_hold_is_refused_before_it_is_read() {
    let home = World::new().home("anna").made();
    home.make_group();
    let refused = |what: &str| {
        let errors = home.endless_push().fails(6);
        assert!(errors.contains("this is more than 1048576 bytes"), "{what}: {errors}");
    };
    refused("alone");
    home.push_bytes(&vec![b'x'; MIB]);
    let serving = home.serve();
    refused("through the server");
    home.push_bytes(&vec![b'y'; MIB]);
    let answer = home.http("POST", "/v1/push", &[VERSION_LINE], &vec![b'z'; MIB + 1]);
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains(r#""code":"too-large""#), "{answer}");
    drop(serving);
    assert_eq!(home.pull(0).len(), 2);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let home = World::new().home("anna").made();
    home.make_group();
    home.push_bytes(&vec![b'x'; MIB]);
    home.push_bytes(&vec![b'y'; MIB]);
    let mut child = home.command(&["pull"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ended");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

// ---- two and three homes ----

#[test]
fn two_homes_pair_by_code_and_exchange_blobs_while_they_run() {
    let (anna, ben) = World::new().pair();
    let _serving = [anna.serve(), ben.serve()];
    let mut follow = ben.spawn(&["pull", "--follow", "--json"]);

    for (text, number) in [("one", 1), ("two", 2)] {
        let ran = anna.ran(&["push", text, "--wait", "30"]);
        assert!(ran.success().ends_with("handed over to ben\n"), "push {number}");
        assert_eq!(follow.line()["text"], text);
    }
    ben.push("back");
    assert_eq!(follow.line()["text"], "back");
    assert_eq!(texts(&anna.follow(0, 3)), ["one", "two", "back"]);

    let status = &anna.json(&["status"])[0]["groups"][0];
    assert_eq!((&status["state"], &status["pending"]), (&"synced".into(), &0.into()), "{status}");
    let peer = &status["peers"][0];
    assert_eq!((&peer["name"], &peer["state"]), (&"ben".into(), &"connected".into()), "{status}");
    assert_eq!(follow.interrupt().code(), Some(0));
}

#[test]
fn a_link_joins_as_well_as_a_code_and_the_qr_code_is_drawn_on_demand() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let mut create = anna.spawn(&["pair", "--create", "--qr"]);
    let mut drawn = 0;
    let link = loop {
        let line = create.text_line();
        drawn += usize::from(line.contains('█'));
        if let Some(link) = line.strip_prefix("link  ") {
            break link.to_owned();
        }
    };
    assert!(drawn > 10, "{drawn} lines");
    assert!(link.starts_with("syncshell://join#"), "{link}");
    let joined = ben.ran_with(&["pair", "--join"], format!("{link}\n").as_bytes()).success();
    assert!(joined.starts_with("joined group "), "{joined}");
    assert!(create.text_line().starts_with("ben has joined as "));
    assert_eq!(create.wait().code(), Some(0));
}

#[test]
fn without_a_server_push_hands_over_to_whoever_runs() {
    let (anna, ben) = World::new().pair();
    let _ben = ben.serve();
    let lines = anna.json(&["push", "quick", "--wait", "30"]);
    assert_eq!((&lines[1]["state"], &lines[1]["holders"][0]), (&"handed-over".into(), &"ben".into()), "{lines:?}");
    assert_eq!(texts(&ben.follow(0, 1)), ["quick"]);
}

#[test]
fn a_hundred_pushes_while_the_other_is_down_arrive_in_order_once_each() {
    let (anna, ben) = World::new().pair();
    let anna_serving = anna.serve();
    drop(ben.serve());

    let sent: Vec<String> = (0..100).map(|number| format!("number {number}")).collect();
    let cursors: Vec<u64> = sent.iter().map(|text| anna.push(text)).collect();
    let _ben = ben.serve();
    assert_eq!(texts(&ben.follow(0, 100)), sent);
    assert_eq!(texts(&ben.pull(0)), sent);
    assert_eq!(texts(&anna.pull(cursors[49])), sent[50..]);
    drop(anna_serving);
    assert_eq!(texts(&anna.pull(cursors[49])), sent[50..], "also with nobody serving");
}

#[test]
fn nothing_acknowledged_is_missing_when_either_is_killed_at_any_time() {
    let (anna, ben) = World::new().pair();
    let (mut anna_serving, mut ben_serving) = (anna.serve(), ben.serve());
    let mut acknowledged: [Vec<String>; 2] = Default::default();
    for round in 0..8_u64 {
        let victim_is_anna = round % 2 == 0;
        let victim = if victim_is_anna { anna_serving.0.id() } else { ben_serving.0.id() };
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20 + 37 * round));
            signal(victim, Signal::KILL);
        });
        let mut number = 0;
        while !killer.is_finished() || number == 0 {
            for (home, sent) in [(&anna, 0), (&ben, 1)] {
                let text = format!("{sent} round {round} number {number}");
                // a push that fails or whose answer is lost was not acknowledged, and may be there or not
                if home.ran(&["push", &text, "--wait", "0"]).status.success() {
                    acknowledged[sent].push(text);
                }
            }
            number += 1;
        }
        killer.join().expect("no panic");
        if victim_is_anna {
            anna_serving = anna.restart(anna_serving);
        } else {
            ben_serving = ben.restart(ben_serving);
        }
    }
    let last = [(&anna, "0 last"), (&ben, "1 last")];
    for (home, text) in last {
        home.push(text);
    }
    for home in [&anna, &ben] {
        let all = home.follow_until(|blobs| last.iter().all(|(_, text)| texts(blobs).iter().any(|each| each == text)));
        let arrived = texts(&all);
        for (sent, texts) in acknowledged.iter().enumerate() {
            let mine: Vec<_> = arrived.iter().filter(|text| texts.contains(text)).collect();
            assert!(mine.iter().copied().eq(texts), "{} of {} of sender {sent}", mine.len(), texts.len());
        }
    }
    let count: usize = acknowledged.iter().map(Vec::len).sum();
    assert!(count > 16, "only {count} pushes were acknowledged");
}

#[test]
fn entries_reach_a_third_home_through_a_second_when_first_and_third_never_meet() {
    let (anna, ben) = World::new().pair();
    let carol = anna.world().home("carol").made();
    drop((anna, ben));
    let (anna, ben) = carol.world().pair_named("dora", "emil");
    {
        let _serving = [anna.serve(), ben.serve()];
        anna.push("from the first");
        assert_eq!(texts(&ben.follow(0, 1)), ["from the first"]);
    }
    join_by_code(&ben, &carol);
    let (_ben, _carol) = (ben.serve(), carol.serve());
    assert_eq!(texts(&carol.follow(0, 1)), ["from the first"]);
    carol.push("from the third");
    ben.follow(0, 2);
    drop(_carol);
    let _anna = anna.serve();
    assert_eq!(texts(&anna.follow(0, 2)), ["from the first", "from the third"]);
}

// ---- members ----

#[test]
fn g1_g16_a_removed_member_is_refused_by_all_and_nothing_new_reaches_it() {
    let (anna, ben) = World::new().pair_as(Some("member"));
    let carol = anna.world().home("carol").made();
    join_as(&anna, &carol, Some("member"));
    let serving = [anna.serve(), ben.serve(), carol.serve()];
    anna.push("before");
    for home in [&ben, &carol] {
        assert_eq!(texts(&home.follow(0, 1)), ["before"]);
        until("all know of each other", || home.members().len() == 3);
    }
    let removed = carol.members()[0].clone();
    assert_eq!((&removed["own"], &removed["role"]), (&true.into(), &"member".into()));
    let id = removed["member"].as_str().expect("an id").to_owned();
    assert_eq!(ben.json(&["remove", &id[..8]])[0]["done"], true);
    for home in [&anna, &ben] {
        until("it is removed", || home.members().len() == 2);
    }
    until("nobody speaks with it", || carol.connected() == 0);
    anna.push("after");
    assert_eq!(texts(&ben.follow(0, 2)), ["before", "after"]);
    // what it says reaches nobody, and nothing of the others reaches it, also after all were started again
    carol.push("from the removed one");
    drop(serving);
    let _serving = [anna.serve(), ben.serve(), carol.serve()];
    ben.push("at last");
    assert_eq!(texts(&anna.follow(0, 3)), ["before", "after", "at last"]);
    assert_eq!(texts(&ben.pull(0)), ["before", "after", "at last"]);
    let there = texts(&carol.pull(0));
    assert!(there.iter().all(|text| ["before", "from the removed one"].contains(&&**text)), "{there:?}");
    until("it is refused", || anna.refused() + ben.refused() > 0);
    assert_eq!(carol.connected(), 0);
    carol.ran(&["remove", &id[..8], "--approve"]).fails(1);
}

#[test]
fn a_device_of_ones_own_is_taken_out_and_others_go_on_under_a_new_key() {
    let (anna, ben) = World::new().pair();
    let _serving = [anna.serve(), ben.serve()];
    anna.push("before");
    assert_eq!(texts(&ben.follow(0, 1)), ["before"]);
    assert_eq!(anna.members()[0]["authors"].as_array().map(Vec::len), Some(2));
    let epoch = |home: &Home| home.json(&["rotate"])[0]["epoch"].as_u64();
    assert_eq!(epoch(&anna), Some(2));
    let outcome = anna.ran(&["remove", "ben"]).success();
    assert_eq!(outcome, "ben is removed; what is written from now on opens for it no longer\n");
    assert_eq!(anna.members()[0]["authors"].as_array().map(Vec::len), Some(1));
    until("nobody speaks with it", || ben.connected() == 0);
    assert_eq!(epoch(&anna), Some(4));
    anna.push("after");
    assert_eq!(texts(&ben.pull(0)), ["before"]);
    let unknown = anna.ran(&["remove", "nobody"]).fails(1);
    assert!(unknown.contains("no member or device of the group is called nobody"), "{unknown}");
}

// ---- invites ----

#[test]
fn a_code_that_admits_nobody_says_why() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let _anna = anna.serve();
    let join = |code: &str| ben.ran(&["--json", "pair", "--join", code]);
    let refused = |code: &str, expected: &str| {
        let ran = join(code);
        let error: Value = serde_json::from_str(&ran.fails(3)).expect("one line");
        assert_eq!(error["error"]["code"], expected, "{error}");
    };
    refused("not a code", "invite-malformed");
    refused("syncshell://join#AAAA", "invite-malformed");
    refused("0000-0000-0000-0000", "invite-not-found");

    let mut create = anna.spawn(&["pair", "--create", "--json", "--expires-in", "1"]);
    let expired = create.line()["code"].as_str().expect("a code").to_owned();
    assert_eq!(create.line()["outcome"], "expired");
    assert_eq!(create.wait().code(), Some(3));
    refused(&expired, "invite-expired");

    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let invite = create.line();
    let revoked = invite["code"].as_str().expect("a code").to_owned();
    assert_eq!(anna.ran_with(&["pair", "--revoke"], revoked.as_bytes()).success(), "the invite was taken back\n");
    assert_eq!(create.line()["outcome"], "revoked");
    assert_eq!(create.wait().code(), Some(3));
    refused(&revoked, "invite-revoked");

    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let revoked = create.line();
    assert_eq!(create.interrupt().code(), Some(3));
    refused(revoked["code"].as_str().expect("a code"), "invite-revoked");

    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let used = create.line()["code"].as_str().expect("a code").to_owned();
    join(&used).success();
    assert_eq!((&create.line()["outcome"], create.wait().code()), (&"joined".into(), Some(0)));
    let carol = world.home("carol").made();
    let errors = carol.ran(&["pair", "--join", &used]).fails(3);
    assert!(errors.contains("this invite has been used"), "{errors}");

    // the link of one invite with the secret of none: the device is found and does not know it
    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let link = create.line()["link"].as_str().expect("a link").to_owned();
    let (prefix, body) = link.split_once('#').expect("a fragment");
    let mut bytes = data_encoding::BASE64URL_NOPAD.decode(body.as_bytes()).expect("base64");
    // array header, version, header of the secret, then the secret
    bytes[4] ^= 1;
    let wrong = format!("{prefix}#{}", data_encoding::BASE64URL_NOPAD.encode(&bytes));
    let errors = carol.ran(&["--json", "pair", "--join", &wrong]).fails(3);
    assert!(errors.contains("invite-wrong"), "{errors}");
    create.interrupt();
}

#[test]
fn ctrl_c_takes_an_invite_back() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let code = create.line()["code"].as_str().expect("a code").to_owned();
    assert_eq!(create.interrupt().code(), Some(3));
    ben.ran(&["pair", "--join", &code]).fails(3);
    let _anna = anna.serve();
    ben.ran(&["pair", "--join", &code]).fails(3);
}

// ---- who serves ----

#[test]
fn a_second_server_is_refused_and_told_who_serves() {
    let home = World::new().home("anna").made();
    let serving = home.serve();
    let errors = home.ran(&["run"]).fails(4);
    let pid = serving.0.id().to_string();
    assert!(errors.contains(&format!("is served by process {pid} ")), "{errors}");
    assert_eq!(home.json(&["status"])[0]["served_by"], serving.0.id());
    assert_eq!(mode(&home.path.join("api.sock")), 0o600);

    // also while the first has no socket, as between its start and its first request
    fs::remove_file(home.path.join("api.sock")).expect("removed");
    let errors = home.ran(&["run"]).fails(4);
    assert!(errors.contains(&format!("process {pid} ")), "{errors}");
}

#[test]
fn pairing_and_following_serve_the_home_meanwhile() {
    let home = World::new().home("anna").made();
    let mut create = home.spawn(&["pair", "--create", "--json"]);
    create.line();
    assert_eq!(home.json(&["status"])[0]["served_by"], create.child.0.id());
    home.push("through the invite's process");
    create.interrupt();

    let mut follow = home.spawn(&["pull", "--follow", "--json"]);
    assert_eq!(follow.line()["text"], "through the invite's process");
    home.push("through the reader's");
    assert_eq!(follow.line()["text"], "through the reader's");
    assert_eq!(home.json(&["status"])[0]["served_by"], follow.child.0.id());
    assert_eq!(follow.terminate().code(), Some(0));
    assert!(!home.path.join("api.sock").exists());
    assert_eq!(home.pull(0).len(), 2);
}

#[test]
fn a_home_with_a_very_long_path_is_served_all_the_same() {
    let world = World::new();
    let home = Home { path: world.dir().join("x".repeat(120)), ..world.home("anna") }.made();
    let serving = home.serve();
    assert_eq!(home.json(&["status"])[0]["served_by"], serving.0.id());
    assert!(!home.path.join("api.sock").exists());
}

#[test]
fn two_versions_do_not_talk_to_each_other() {
    let home = World::new().home("anna").made();
    let serving = home.serve();
    for version in [&[][..], &["syncshell-version: 99.0.0"]] {
        let answer = home.http("GET", "/v1/status", version, b"");
        assert!(answer.starts_with("HTTP/1.1 426 "), "{answer}");
        assert!(answer.contains("syncshell-version: ") && answer.contains(r#""code":"other-version""#), "{answer}");
    }
    let answer = home.http("GET", "/v1/status", &[VERSION_LINE], b"");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(serving);

    // the killed server left its socket
    fs::remove_file(home.path.join("api.sock")).expect("removed");
    let server = UnixListener::bind(home.path.join("api.sock")).expect("bound");
    let other = thread::spawn(move || {
        // one connection asks whether anyone is there, the next asks for something
        for stream in server.incoming().take(2) {
            let mut stream = stream.expect("a connection");
            let mut request = [0; 4096];
            if stream.read(&mut request).is_ok_and(|length| length > 0) {
                let head = "HTTP/1.1 426 Upgrade Required\r\nsyncshell-version: 99.0.0\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(head.as_bytes()).expect("answered");
            }
        }
    });
    let errors = home.ran(&["status"]).fails(4);
    assert!(errors.contains("served by version 99.0.0 of syncshell and this is version"), "{errors}");
    other.join().expect("no panic");
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let home = World::new().home("anna").made();
    home.make_group();
    let _serving = home.serve();
    for (method, path, body, status, code) in [
        ("GET", "/v1/none", "", 404, "not-found"),
        ("DELETE", "/v1/status", "", 404, "not-found"),
        ("GET", "/v1/pull?after=minus", "", 400, "usage"),
        ("GET", "/v1/pull?group=ffffffffffffffff", "", 404, "unknown-group"),
        ("GET", "/v1/handed", "", 400, "usage"),
        ("POST", "/v1/push?blob_id=12", "x", 400, "usage"),
        ("POST", "/v1/join", "{", 400, "usage"),
        ("POST", "/v1/invites/revoke", "[]", 400, "usage"),
        ("GET", "/v1/invites/00/outcome", "", 404, "not-found"),
    ] {
        let lines = [VERSION_LINE, "content-type: application/json"];
        let answer = home.http(method, path, &lines, body.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{method} {path}: {answer}");
        assert!(answer.contains(&format!(r#""code":"{code}""#)), "{method} {path}: {answer}");
    }
}

#[test]
fn a_server_ends_in_order_when_asked_by_signal_input_or_request() {
    let home = World::new().home("anna").made();
    for stop in [Signal::TERM, Signal::INT] {
        let serving = home.serve();
        // a stream without end must not hold it up
        let mut events = home.connect("GET", "/v1/events", &[VERSION_LINE], b"");
        signal(serving.0.id(), stop);
        assert_eq!(serving.wait().code(), Some(0), "{stop:?}");
        let mut rest = Vec::new();
        // a socket whose process has ended may be reset where its request was not read to the end
        let ended = events.read_to_end(&mut rest).map_or_else(|error| error.kind(), |_| ErrorKind::UnexpectedEof);
        assert!(matches!(ended, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{ended}");
    }
    let mut serving = home.serve();
    drop(serving.0.stdin.take());
    assert_eq!(serving.wait().code(), Some(0));
    let serving = home.serve();
    home.http("POST", "/v1/stop", &[VERSION_LINE], b"");
    assert_eq!(serving.wait().code(), Some(0));
    assert!(!home.path.join("api.sock").exists());
}

// ---- homes in a bad way ----

#[test]
fn a_directory_that_is_no_home_is_named() {
    let world = World::new();
    let errors = world.home("nowhere").ran(&["status"]).fails(5);
    assert!(errors.contains("nowhere is not a home; run `syncshell init`"), "{errors}");
    fs::write(world.dir().join("file"), "x").expect("written");
    let inside = Home { path: world.dir().join("file").join("home"), ..world.home("x") };
    inside.ran(&["status"]).fails(5);
    inside.ran(&["init", "--key-store", "file"]).fails(5);
}

#[test]
fn a_home_that_may_not_be_written_is_named() {
    let world = World::new();
    let home = world.home("anna");
    fs::set_permissions(world.dir(), fs::Permissions::from_mode(0o755)).expect("set");
    let closed = world.dir().join("closed");
    fs::create_dir(&closed).expect("made");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).expect("set");
    let inside = Home { path: closed.join("home"), ..world.home("x") };
    let errors = inside.ran_as_nobody(&["init", "--key-store", "file"]).fails(5);
    assert!(errors.contains("no permission for"), "{errors}");

    let open = world.dir().join("open");
    fs::create_dir(&open).expect("made");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("set");
    let home = Home { path: open.join("home"), ..home };
    home.ran_as_nobody(&["init", "--key-store", "file"]).success();
    for (mode, arguments, said) in
        [(0o500, &["push", "x"][..], "check the permissions of the home"), (0o000, &["status"], "no permission for")]
    {
        fs::set_permissions(&home.path, fs::Permissions::from_mode(mode)).expect("set");
        let errors = home.ran_as_nobody(arguments).fails(5);
        assert!(errors.contains(said), "{errors}");
    }
    fs::set_permissions(&home.path, fs::Permissions::from_mode(0o700)).expect("set");
}

#[test]
fn a_damaged_or_newer_home_is_refused_and_left_as_it_is() {
    let world = World::new();
    let damage = |name: &'static str, file: &str, change: &dyn Fn(&mut Vec<u8>), code: &str| {
        let home = world.home(name).made();
        home.make_group();
        for byte in 0..10 {
            home.push_bytes(&[byte; 10_000]);
        }
        let path = home.path.join(file);
        let mut bytes = fs::read(&path).expect("there");
        change(&mut bytes);
        fs::write(&path, &bytes).expect("written");
        let error: Value = serde_json::from_str(&home.ran(&["pull", "--json"]).fails(5)).expect("one line");
        assert_eq!(error["error"]["code"], code, "{name}: {error}");
        let errors = home.ran(&["push", "x", "--wait", "0"]).fails(5);
        assert!(errors.starts_with("error: "), "{name}: {errors}");
        assert!(fs::read(&path).expect("there") == bytes, "{name}: the file was changed");
    };
    damage("garbage", "sync.db", &|bytes| bytes.fill(b'x'), "not-a-database");
    damage("holed", "sync.db", &|bytes| bytes[4096..].fill(0xff), "corrupt");
    // the version of a SQLite file's schema, where its format puts it
    damage("newer", "sync.db", &|bytes| bytes[60..64].copy_from_slice(&99_u32.to_be_bytes()), "newer-database");
    let newer_settings = |bytes: &mut Vec<u8>| {
        *bytes = String::from_utf8_lossy(bytes).replace("version = 1", "version = 99").into_bytes();
    };
    damage("newer-home", "home.toml", &newer_settings, "newer-home");
    damage("settings", "home.toml", &|bytes| bytes.truncate(3), "home");
}

#[test]
fn a_full_disk_is_named_and_what_was_stored_is_safe() {
    if !geteuid().is_root() {
        return skip("a full disk is made by mounting a small one, which takes root");
    }
    let world = World::new();
    let home = Home { path: world.dir().join("disk").join("home"), ..world.home("anna") };
    let script = format!(
        r#"set -e
        mount -t tmpfs -o size=6m none "$DISK"
        {PROGRAM} init --key-store file >&2
        {PROGRAM} pair --create --json >/dev/null & pid=$!
        for i in $(seq 200); do [ -S "$SYNCSHELL_HOME/api.sock" ] && break; sleep 0.05; done
        {PROGRAM} status --json >/dev/null
        stored=0
        code=0
        while [ $stored -lt 100 ] && [ $code = 0 ]; do
            head -c 300000 /dev/urandom | {PROGRAM} push - --wait 0 >/dev/null 2>"$ERRORS" && stored=$((stored+1)) || code=$?
        done
        kill $pid; wait $pid || true
        echo "$stored $code"
        {PROGRAM} pull --json >"$PULLED" || true
        "#
    );
    fs::create_dir(world.dir().join("disk")).expect("made");
    let (pulled, errors) = (world.dir().join("pulled"), world.dir().join("errors"));
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    let ran = world
        .hermetic(command)
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("DISK", world.dir().join("disk"))
        .env("SYNCSHELL_HOME", &home.path)
        .env("PULLED", &pulled)
        .env("ERRORS", &errors)
        .ran();
    if !ran.status.success() && ran.errors.contains("unshare") {
        return skip("a full disk is made in a mount namespace, which is not allowed here");
    }
    let output = ran.success();
    let (stored, code) = output.trim().split_once(' ').expect("two numbers");
    assert_eq!(code, "7", "{stored} stored: {}", fs::read_to_string(&errors).unwrap_or_default());
    let stored: usize = stored.parse().expect("a number");
    assert!(stored > 2, "{stored}");
    assert!(fs::read_to_string(&errors).expect("written").contains("hint: free some space"));
    let lines = json_lines(&fs::read_to_string(&pulled).expect("written"));
    assert!(lines.len() > stored, "{} of {stored} blobs and the end", lines.len());
}

// ---- folders ----

#[test]
fn share_and_join_keep_a_folder_in_sync_while_they_run() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let (here, there) = (world.dir().join("anna-files"), world.dir().join("ben-files"));
    write(&here.join("notes.txt"), "bread");
    write(&here.join("deep/down/x"), "y");
    fs::create_dir(here.join("empty")).expect("made");
    std::os::unix::fs::symlink("notes.txt", here.join("link")).expect("made");
    fs::set_permissions(here.join("notes.txt"), fs::Permissions::from_mode(0o640)).expect("set");

    let mut share = anna.spawn(&["share", &text(&here), "--name", "Notes", "--json"]);
    let invited = share.line();
    assert_eq!(invited["event"], "invited");
    let code = invited["code"].as_str().expect("a code");
    assert!(invited["link"].as_str().is_some_and(|link| link.starts_with("syncshell://join#")), "{invited}");
    let mut join = ben.spawn(&["join", code, &text(&there), "--json"]);
    let joined = join.line();
    assert_eq!((&joined["event"], &joined["group"]), (&"joined".into(), &invited["group"]));
    let placed = join.line();
    assert_eq!((&placed["event"], &placed["folder"]), (&"placed".into(), &invited["folder"]));
    assert_eq!((&placed["name"], &placed["path"]), (&"Notes".into(), &text(&there).into()));
    let joined = share.line();
    assert_eq!((&joined["event"], &joined["name"]), (&"joined".into(), &"ben".into()));

    equal(&here, &there);
    assert_eq!(mode(&there.join("notes.txt")), 0o640);
    ben.settled();
    write(&there.join("notes.txt"), "bread\nbutter");
    equal(&here, &there);
    assert_eq!(fs::read_to_string(here.join("notes.txt")).expect("there"), "bread\nbutter");
    fs::rename(here.join("deep"), here.join("deeper")).expect("renamed");
    fs::remove_file(here.join("link")).expect("removed");
    equal(&here, &there);
    assert!(there.join("deeper/down/x").exists() && !there.join("deep").exists());

    // both serve, so that others come here, and both end in order
    ben.settled();
    let folder = ben.only_folder();
    assert_eq!((&folder["name"], &folder["state"]), (&"Notes".into(), &"up-to-date".into()), "{folder}");
    let devices = ben.json(&["devices"])[0]["devices"].clone();
    assert_eq!((&devices[0]["name"], &devices[0]["state"]), (&"ben".into(), &"this".into()), "{devices}");
    assert_eq!((&devices[1]["name"], &devices[1]["state"]), (&"anna".into(), &"connected".into()), "{devices}");
    let status = ben.ran(&["status"]).success();
    assert!(status.contains("folder  Notes: up to date, 5 files, "), "{status}");
    assert_eq!(share.interrupt().code(), Some(0));
    assert_eq!(join.terminate().code(), Some(0));
    // what is changed with nobody serving is found later
    write(&here.join("late"), "x");
    let _serving = [anna.serve(), ben.serve()];
    equal(&here, &there);
}

#[test]
fn where_a_process_serves_share_and_join_only_ask_it() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let mut serving = ben.spawn_serving();
    let _anna = anna.serve();
    let here = world.dir().join("Photos");
    write(&here.join("a"), "a");
    let elsewhere = world.dir().join("elsewhere");
    fs::create_dir(&elsewhere).expect("made");

    let mut share = anna.spawn(&["share", &text(&here), "--json"]);
    let code = share.line()["code"].as_str().expect("a code").to_owned();
    let joined = ben.command(&["join", &code]).current_dir(&elsewhere).ran();
    assert!(joined.success().ends_with(&format!("Photos is in {}\n", elsewhere.join("Photos").display())));
    assert_eq!(share.line()["event"], "joined");
    assert_eq!(share.wait().code(), Some(0));
    equal(&here, &elsewhere.join("Photos"));
    // the one who serves tells of it
    while serving.line()["event"] != "folder" {}

    // further folders, in the same group, found by name or as the one without a place
    let (second, third) = (world.dir().join("second"), world.dir().join("third"));
    write(&second.join("2"), "2");
    write(&third.join("3"), "3");
    let group = ben.only_folder()["group"].as_str().expect("a group").to_owned();
    for path in [&second, &third] {
        let line = &anna.json(&["share", &text(path), "--group", &group[..8], "--no-invite"])[0];
        assert_eq!((&line["event"], &line["group"]), (&"shared".into(), &group.as_str().into()));
    }
    let place = |name: &str, path: &Path| ben.json(&["join", &group[..8], &text(path), "--folder", name]);
    assert_eq!(place("third", &elsewhere.join("3"))[0]["event"], "placed");
    equal(&third, &elsewhere.join("3"));
    let ran = ben.ran(&["join", &group[..8], &text(&elsewhere.join("2"))]);
    assert!(ran.errors.contains("the group has the folders Photos, second, third"), "{ran:?}");
    assert!(ran.success().contains(&format!("second is in {}", elsewhere.join("2").display())));
    assert!(ben.ran(&["join", &group[..8], &text(&elsewhere.join("4"))]).fails(2).contains("is synced in"));
}

#[test]
fn joining_into_an_equal_folder_moves_nothing_and_into_a_different_one_keeps_both() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    for root in [&here, &there] {
        write(&root.join("same.txt"), "the same");
        fs::write(root.join("large"), vec![b'x'; 3 * MIB]).expect("written");
    }
    let (anna, ben) = world.share(&here, &there);
    let _serving = [anna.serve(), ben.serve()];
    equal(&here, &there);
    ben.settled();
    let folder = ben.only_folder();
    assert_eq!((&folder["fetched_bytes"], &folder["conflicts"]), (&0.into(), &serde_json::json!([])), "{folder}");
    assert_eq!(anna.only_folder()["served_bytes"], 0);

    let (other, differing) = (world.dir().join("other"), world.dir().join("differing"));
    write(&other.join("note.txt"), "anna's");
    write(&differing.join("note.txt"), "ben's");
    write(&differing.join("only.txt"), "ben's alone");
    let group = anna.json(&["share", &text(&other), "--no-invite"])[0]["group"].as_str().expect("a group").to_owned();
    let mut invite = anna.spawn(&["invite", "other", "--json"]);
    let invited = invite.line();
    assert_eq!(invited["group"], group.as_str());
    ben.ran(&["join", invited["code"].as_str().expect("a code"), &text(&differing)]).success();
    assert_eq!(invite.line()["event"], "joined");
    until("both are kept", || tree(&other).len() == 3 && tree(&other) == tree(&differing));
    let mut contents: Vec<_> = tree(&other).into_values().collect();
    contents.sort_unstable();
    assert_eq!(contents, ["anna's", "ben's", "ben's alone"]);
}

#[test]
fn folders_that_overlap_are_refused_before_an_invite_is_used() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let here = world.dir().join("here");
    write(&here.join("inside/x"), "x");
    let shared = anna.json(&["share", &text(&here), "--no-invite"]);
    let again = anna.json(&["share", &text(&here), "--no-invite"]);
    assert_eq!(shared, again, "it is shared already");
    for path in [here.join("inside"), world.dir().to_owned(), anna.path.clone(), anna.path.join("deep")] {
        fs::create_dir_all(&path).expect("made");
        let errors = anna.ran(&["share", &text(&path), "--no-invite"]).fails(2);
        assert!(errors.contains("overlaps with"), "{errors}");
    }
    let mine = world.dir().join("mine");
    write(&mine.join("y"), "y");
    ben.json(&["share", &text(&mine), "--no-invite"]);
    let mut invite = anna.spawn(&["invite", "--json"]);
    let code = invite.line()["code"].as_str().expect("a code").to_owned();
    let error: Value =
        serde_json::from_str(&ben.ran(&["join", &code, &text(&mine.join("in")), "--json"]).fails(2)).expect("JSON");
    assert_eq!(error["error"]["code"], "folder-overlaps", "{error}");
    assert_eq!(ben.json(&["status"])[0]["groups"].as_array().map(Vec::len), Some(1), "it has not joined");
    invite.interrupt();
    assert!(anna.ran(&["share", &text(&world.dir().join("nowhere")), "--no-invite"]).fails(1).contains("nowhere"));
}

#[test]
fn what_is_here_already_is_only_taken_when_it_is_named() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let _serving = [anna.serve(), ben.serve()];
    let here = world.dir().join("Photos");
    write(&here.join("x"), "x");
    let elsewhere = world.dir().join("elsewhere");
    write(&elsewhere.join("Photos/private"), "mine");
    let mut share = anna.spawn(&["share", &text(&here), "--json"]);
    let code = share.line()["code"].as_str().expect("a code").to_owned();
    let ran = ben.command(&["join", &code]).current_dir(&elsewhere).ran();
    assert_eq!(ran.status.code(), Some(2), "{ran:?}");
    assert!(ran.errors.contains("is here already; name it") && ran.errors.contains("syncshell join "), "{ran:?}");
    assert!(ben.json(&["folders"])[0]["folders"].as_array().is_some_and(Vec::is_empty));
    // it goes on from there
    let group = anna.only_folder()["group"].as_str().expect("a group").to_owned();
    let ran = ben.command(&["join", &group[..8], "Photos"]).current_dir(&elsewhere).ran();
    ran.success();
    equal(&here, &elsewhere.join("Photos"));
    assert_eq!(fs::read_to_string(here.join("private")).expect("synced"), "mine");
}

#[test]
fn a_folder_that_is_left_keeps_its_files_and_syncs_no_more() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("x"), "x");
    let (anna, ben) = world.share(&here, &there);
    let _serving = [anna.serve(), ben.serve()];
    equal(&here, &there);
    ben.settled();
    let errors = ben.ran(&["leave", &text(&there)]).fails(2);
    assert!(errors.contains("--yes"), "{errors}");
    let left = ben.json(&["leave", &text(&there), "--yes"]);
    assert_eq!(left[0]["path"], text(&there));
    assert_eq!(fs::read_to_string(there.join("x")).expect("stays"), "x");
    assert!(ben.ran(&["folders"]).success().starts_with("no folder yet"));
    assert!(ben.ran(&["leave", &text(&there), "--yes"]).fails(2).contains("no folder"));
    write(&here.join("y"), "y");
    write(&there.join("z"), "z");
    anna.ran(&["rescan", "here"]).success();
    thread::sleep(Duration::from_millis(500));
    assert!(!there.join("y").exists() && !here.join("z").exists());

    // and may come back, with what changed meanwhile
    let group = anna.only_folder()["group"].as_str().expect("a group").to_owned();
    ben.ran(&["join", &group, &text(&there)]).success();
    equal(&here, &there);
    assert!(here.join("z").exists() && there.join("y").exists());
}

#[test]
fn a_paused_folder_waits_and_a_rescan_ends_when_all_is_told() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("deep/x"), "x");
    let (anna, ben) = world.share(&here, &there);
    let _anna = anna.serve();
    {
        let _ben = ben.serve();
        equal(&here, &there);
        ben.settled();
        // by a path in it, by its name, and by its id
        let id = ben.only_folder()["id"].as_str().expect("an id").to_owned();
        for (verb, what, paused) in [
            ("pause", text(&there.join("deep")), true),
            ("resume", "here".to_owned(), false),
            ("pause", id[..6].to_owned(), true),
        ] {
            assert_eq!(ben.json(&[verb, &what]), [serde_json::json!({ "folder": id, "paused": paused })]);
        }
        assert_eq!(ben.only_folder()["state"], "paused");
        write(&here.join("y"), "y");
        thread::sleep(Duration::from_millis(500));
        assert!(!there.join("y").exists());
    }
    let _ben = ben.serve();
    assert_eq!(ben.only_folder()["state"], "paused", "also after a restart");
    ben.ran(&["resume", "--all"]).success();
    equal(&here, &there);

    for number in 0..50 {
        write(&here.join(format!("many/{number}")), "x");
    }
    let scanned = &anna.json(&["rescan", &text(&here)])[0];
    // the directories count too
    assert_eq!(scanned["files"], 54, "{scanned}");
    assert!(ben.ran(&["rescan", "nothing"]).fails(2).contains("no folder nothing"));
}

#[test]
fn a_device_takes_the_paths_of_a_folder_that_are_selected_there() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("docs/a"), "a");
    write(&here.join("photos/1"), "12345");
    let (anna, ben) = world.share(&here, &there);
    let _anna = anna.serve();
    {
        let _ben = ben.serve();
        equal(&here, &there);
        let told = ben.ran(&["select", "here", "docs/"]).success().to_owned();
        assert_eq!(told, "here: 2 files and 5 B are left out here\n");
        write(&here.join("photos/2"), "1234567");
        write(&here.join("docs/b"), "b");
        until("there", || there.join("docs/b").exists());
        fs::remove_file(there.join("photos/1")).expect("removes");
        ben.ran(&["rescan", "here"]).success();
    }
    assert!(here.join("photos/1").exists() && !there.join("photos/2").exists());
    // it is shown, also where nobody serves the home
    let folder = ben.only_folder();
    assert_eq!(folder["selected"], serde_json::json!(["docs"]));
    assert_eq!((&folder["left_out_files"], &folder["left_out_bytes"]), (&3.into(), &12.into()));
    let status = ben.ran(&["status"]).success().to_owned();
    assert!(status.contains("takes docs; `syncshell select` chooses"), "{status}");
    assert!(ben.ran(&["folders"]).success().contains("3 files and 12 B are left out here"));
    assert!(ben.ran(&["select", "here", "../docs"]).fails(2).contains("../docs is no path of this folder"));
    assert!(ben.ran(&["select", "nothing", "--all"]).fails(2).contains("no folder nothing"));

    let _ben = ben.serve();
    let all = &ben.json(&["select", &text(&there), "--all"])[0];
    assert_eq!((&all["left_out_files"], &all["selected"]), (&0.into(), &serde_json::Value::Null));
    equal(&here, &there);
    assert!(there.join("photos/1").exists() && there.join("photos/2").exists());
}

#[test]
fn what_sync_replaced_can_be_listed_and_restored() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("deep/plan.txt"), "first");
    let (anna, ben) = world.share(&here, &there);
    let _serving = [anna.serve(), ben.serve()];
    let (mine, bens) = (here.join("deep/plan.txt"), there.join("deep/plan.txt"));
    for text in ["second", "third"] {
        equal(&here, &there);
        ben.settled();
        write(&bens, text);
        until("it arrives", || fs::read_to_string(&mine).is_ok_and(|there| there == text));
    }
    let versions = || anna.json(&["versions", &text(&mine)])[0]["versions"].as_array().expect("a list").clone();
    until("both are kept", || versions().len() == 2);
    let oldest = versions()[1]["version"].as_str().expect("a name").to_owned();
    assert!(anna.ran(&["versions", &text(&mine)]).success().contains(&format!("@{oldest} 5 B, replaced ")));
    // ben, whose edits they were, has kept nothing, and takes them from anna
    let there_too = ben.json(&["versions", &text(&bens)])[0]["versions"].as_array().expect("a list").clone();
    assert_eq!(there_too.len(), 2, "{there_too:?}");
    assert!(
        there_too.iter().all(|kept| kept["here"] == false && kept["devices"] == serde_json::json!(["anna"])),
        "{there_too:?}"
    );
    let fetched = world.dir().join("fetched.txt");
    ben.ran(&["restore", &format!("{}@{oldest}", text(&bens)), "--to", &text(&fetched)]).success();
    assert_eq!(fs::read_to_string(&fetched).expect("there"), "first");
    let aside = world.dir().join("aside.txt");
    let named = format!("{}@{oldest}", text(&mine));
    assert_eq!(anna.json(&["restore", &named, "--to", &text(&aside)])[0]["path"], text(&aside));
    assert_eq!(fs::read_to_string(&aside).expect("there"), "first");
    assert_eq!(fs::read_to_string(&mine).expect("there"), "third");
    assert!(anna.ran(&["restore", &named, "--to", &text(&aside)]).fails(2).contains("is there already"));
    anna.ran(&["restore", &named]).success();
    until("it arrives", || fs::read_to_string(&bens).is_ok_and(|there| there == "first"));
    // what it replaced is kept in turn, and the newest
    anna.ran(&["restore", &text(&mine)]).success();
    assert_eq!(fs::read_to_string(&mine).expect("there"), "third");
    equal(&here, &there);
    ben.settled();

    fs::remove_file(&bens).expect("removed");
    until("it is gone", || !mine.exists());
    anna.ran(&["restore", &text(&mine)]).success();
    equal(&here, &there);
    assert!(bens.exists());
    assert!(
        anna.ran(&["restore", &format!("{}@9999999999999999", text(&mine))])
            .fails(2)
            .contains("no version 9999999999999999")
    );
    assert!(anna.ran(&["versions", "/etc/passwd"]).fails(2).contains("in no folder"));
    assert!(ben.ran(&["versions", &text(&there.join("never"))]).success().contains("nothing is kept"));
}

#[test]
fn one_way_folders_go_one_way() {
    let world = World::new();
    let (anna, ben) = (world.home("anna").made(), world.home("ben").made());
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("x"), "x");
    let _serving = [anna.serve(), ben.serve()];
    let mut share = anna.spawn(&["share", &text(&here), "--send-only", "--json"]);
    let code = share.line()["code"].as_str().expect("a code").to_owned();
    ben.ran(&["join", &code, &text(&there)]).success();
    share.line();
    assert_eq!(share.wait().code(), Some(0));
    equal(&here, &there);
    write(&there.join("y"), "y");
    ben.ran(&["rescan", "here"]).success();
    write(&here.join("z"), "z");
    until("it arrives", || there.join("z").exists());
    assert!(!here.join("y").exists());
    assert_eq!(anna.only_folder()["direction"], "send-only");
    assert!(anna.ran(&["status"]).success().contains("send-only: changes of others are not taken"));
}

#[test]
fn progress_stays_readable_in_a_log_file() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    fs::create_dir(&here).expect("made");
    let (anna, ben) = world.share(&here, &there);
    let _anna = anna.serve();
    let mut child = ben
        .command(&["run"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut errors = BufReader::new(child.stderr.take().expect("piped"));
    let child = Reaped(child);
    fs::write(here.join("large"), vec![b'x'; 8 * MIB]).expect("written");
    equal(&here, &there);
    let mut lines = Vec::new();
    while !lines.last().is_some_and(|line: &String| line.contains("up to date, 1 files, 8.00 MiB")) {
        let mut line = String::new();
        assert!(errors.read_line(&mut line).expect("read") > 0, "{lines:?}");
        assert!(!line.contains('\x1b') && !line.contains('\r'), "{line:?}");
        lines.push(line);
    }
    assert!(lines.len() < 20, "{lines:?}");
    signal(child.0.id(), Signal::TERM);
    assert_eq!(child.wait().code(), Some(0));
    let errors = ben.ran(&["status", "--follow"]).fails(1);
    assert!(errors.contains("nobody serves this home"), "{errors}");
}

#[test]
fn nothing_is_shared_from_a_directory_that_is_no_home() {
    let world = World::new();
    for arguments in
        [&["share", "."][..], &["share", ".", "--no-invite"], &["join", "0000-0000-0000-0000"], &["up"], &["folders"]]
    {
        let errors = world.home("nowhere").ran(arguments).fails(5);
        assert!(errors.contains("nowhere is not a home; run `syncshell init`"), "{errors}");
        assert!(!world.dir().join("nowhere").exists());
    }
}

// ---- in the background ----

#[test]
fn up_and_down_serve_a_home_in_the_background_and_repeat_harmlessly() {
    let world = World::new();
    let home = world.home("anna").made();
    let up = &home.json(&["up"])[0];
    assert_eq!(up["started"], true);
    let pid = up["served_by"].as_u64().expect("a process id");
    let again = &home.json(&["up"])[0];
    assert_eq!((&again["started"], &again["served_by"]), (&false.into(), &pid.into()));
    assert_eq!(home.json(&["status"])[0]["served_by"], pid);
    let log = home.path.join("run.log");
    assert_eq!(mode(&log), 0o600);
    assert!(fs::read_to_string(&log).expect("there").contains("serving "));
    let mut follow = home.spawn(&["status", "--follow", "--json"]);
    assert_eq!(home.json(&["down"])[0]["stopped"], true);
    follow.lines.iter().for_each(drop);
    // 1 where it was just asking
    let ended = follow.child.0.wait().expect("ended").code();
    assert!(matches!(ended, Some(0 | 1)), "it ends with the one who served: {ended:?}");
    assert!(!home.path.join("api.sock").exists());
    assert_eq!(home.json(&["down"])[0]["stopped"], false);
    assert_eq!(home.json(&["status"])[0]["served_by"], Value::Null);

    // what keeps it from serving is said
    fs::write(home.path.join("sync.db"), vec![b'x'; 10_000]).expect("written");
    let errors = home.ran(&["up"]).fails(1);
    assert!(errors.contains("ended before it served"), "{errors}");
}

#[test]
fn the_unit_names_this_program_and_this_home() {
    let world = World::new();
    let home = world.home("anna").made();
    let unit = home.ran(&["unit"]).success();
    let expected = format!("ExecStart=\"{PROGRAM}\" \"--home\" \"{}\" \"run\"", home.path.display());
    assert!(unit.lines().any(|line| line == expected), "{unit}");
    let path = world.dir().join(".config/systemd/user/syncshell.service");
    assert_eq!(home.json(&["unit", "--install"])[0]["installed"], text(&path));
    assert_eq!(fs::read_to_string(&path).expect("written"), unit);
    home.ran(&["unit", "--install"]).success();
    fs::write(&path, "mine").expect("written");
    home.ran(&["unit", "--install"]).fails(2);
    assert_eq!(fs::read_to_string(&path).expect("there"), "mine");
}

// ---- the local API beside the socket ----

#[test]
fn on_the_loopback_network_only_the_token_under_the_right_name_gets_in() {
    let world = World::new();
    let home = world.home("anna").made();
    let mut serving = home.spawn(&["run", "--json", "--until-eof", "--api-port", "0"]);
    let line = serving.line();
    let address = line["api"].as_str().expect("an address").to_owned();
    let file = home.path.join("api-token");
    assert_eq!(mode(&file), 0o600);
    let token = fs::read_to_string(&file).expect("there");
    assert_eq!(token.len(), 64);
    let bearer = format!("authorization: Bearer {token}");
    let ask = |host: &str, headers: &[&str]| {
        let mut stream = std::net::TcpStream::connect(&address).expect("served");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        write!(stream, "GET /v1/status HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{headers}\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read");
        answer
    };
    assert!(ask(&address, &[VERSION_LINE, &bearer]).starts_with("HTTP/1.1 200 "));
    let port = address.rsplit(':').next().expect("a port");
    assert!(ask(&format!("localhost:{port}"), &[VERSION_LINE, &bearer]).starts_with("HTTP/1.1 200 "));
    for (host, headers, status, code) in [
        (&*address, &[VERSION_LINE][..], 401, "no-token"),
        (&address, &[VERSION_LINE, "authorization: Bearer 00"], 401, "no-token"),
        (&format!("evil.example:{port}"), &[VERSION_LINE, &bearer], 403, "wrong-host"),
        ("127.0.0.1", &[VERSION_LINE, &bearer], 403, "wrong-host"),
        (&address, &[&bearer], 426, "other-version"),
    ] {
        let answer = ask(host, headers);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host} {headers:?}: {answer}");
        assert!(answer.contains(&format!(r#""code":"{code}""#)), "{host} {headers:?}: {answer}");
        assert!(!answer.to_ascii_lowercase().contains("access-control-"), "{answer}");
    }
    // who can open the socket needs no token
    assert!(home.http("GET", "/v1/status", &[VERSION_LINE], b"").starts_with("HTTP/1.1 200 "));

    // a stream of events behind the same door
    let open = |token: &str| {
        let stream = std::net::TcpStream::connect(&address).expect("served");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        websocket(stream, &format!("ws://{address}/v1/events"), &[("authorization", &format!("Bearer {token}"))])
    };
    assert!(open("00").is_err());
    let mut events = open(&token).expect("let in");
    drop(serving.child.0.stdin.take());
    until_closed(&mut events);
    assert_eq!(serving.wait().code(), Some(0));
    assert!(!file.exists(), "it opens nothing any more");
}

#[test]
fn events_come_as_messages_of_a_websocket_too() {
    let world = World::new();
    let (here, there) = (world.dir().join("here"), world.dir().join("there"));
    write(&here.join("x"), "x");
    let (anna, ben) = world.share(&here, &there);
    let serving = anna.serve();
    let stream = UnixStream::connect(anna.path.join("api.sock")).expect("served");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut events = websocket(stream, "ws://localhost/v1/events", &[]).expect("upgraded");
    let _ben = ben.serve();
    let mut seen = Vec::new();
    while !["connected", "folder"].iter().all(|wanted| seen.iter().any(|event: &Value| event["event"] == *wanted)) {
        write(&here.join("y"), &seen.len().to_string());
        let message = events.read().expect("a message");
        if let tokio_tungstenite::tungstenite::Message::Text(text) = message {
            let event: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(event["group"].as_str().map(str::len), Some(64), "{event}");
            seen.push(event);
        }
    }
    let folder = seen.iter().find(|event| event["event"] == "folder").expect("there");
    assert_eq!(folder["folder"]["path"], text(&here));
    signal(serving.0.id(), Signal::TERM);
    until_closed(&mut events);
    assert_eq!(serving.wait().code(), Some(0));
}

fn websocket<S: std::io::Read + std::io::Write>(
    stream: S,
    uri: &str,
    headers: &[(&'static str, &str)],
) -> Result<tokio_tungstenite::tungstenite::WebSocket<S>, String> {
    use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

    let mut request = uri.into_client_request().expect("a request");
    for (name, value) in headers.iter().chain(&[("syncshell-version", env!("CARGO_PKG_VERSION"))]) {
        request.headers_mut().insert(*name, value.parse().expect("a value"));
    }
    let opened = tokio_tungstenite::tungstenite::client(request, stream);
    opened.map(|(socket, _)| socket).map_err(|error| error.to_string())
}

fn until_closed<S: std::io::Read + std::io::Write>(events: &mut tokio_tungstenite::tungstenite::WebSocket<S>) {
    while let Ok(message) = events.read() {
        assert!(!message.is_binary());
    }
}

// ---- the demo, and the network ----

#[test]
fn the_demo_ends_well_and_names_every_step() {
    let world = World::new();
    let dir = world.dir().join("demo");
    let dir_text = dir.to_string_lossy();
    let lines = json_lines(&world.ran(&["demo", "--json", "--dir", &dir_text]).success());
    let steps: Vec<_> = lines.iter().filter_map(|line| line["step"].as_str()).collect();
    let expected = [
        "folder",
        "homes",
        "start",
        "share",
        "join",
        "first-sync",
        "create",
        "edit",
        "rename",
        "delete",
        "move-large",
        "insert",
        "restore",
        "kill",
        "change-while-down",
        "restart",
        "catch-up",
        "conflict",
        "compare",
        "stop",
    ];
    assert_eq!(steps, expected);
    let end = lines.last().expect("an end");
    assert_eq!(end["ok"], true);
    assert!(end["files"].as_u64().is_some_and(|files| files > 400), "{end}");
    for home in end["homes"].as_array().expect("two homes") {
        let home = Home { path: home.as_str().expect("a path").into(), ..world.home("x") };
        assert_eq!(home.pull(0).len(), 100);
        assert!(!home.path.join("api.sock").exists(), "nobody serves it any more");
    }
    world.ran(&["demo", "--dir", &dir_text]).fails(1);
}

#[test]
fn the_demo_reads_a_folder_of_ones_own_and_leaves_it_alone() {
    let world = World::new();
    let own = world.dir().join("own");
    write(&own.join("deep/down/x.txt"), "mine");
    std::os::unix::fs::symlink("x.txt", own.join("deep/down/link")).expect("made");
    let before = tree(&own);
    let dir = world.dir().join("demo");
    let lines = json_lines(&world.ran(&["demo", "--json", "--dir", &text(&dir), &text(&own)]).success());
    let end = lines.last().expect("an end");
    assert_eq!(end["ok"], true);
    assert_eq!(tree(&own), before);
    for folder in end["folders"].as_array().expect("two folders") {
        let folder = Path::new(folder.as_str().expect("a path"));
        assert_eq!(fs::read_to_string(folder.join("deep/down/x.txt")).expect("there"), "mine");
        assert_eq!(fs::read_link(folder.join("deep/down/link")).expect("a link"), Path::new("x.txt"));
    }
    world.ran(&["demo", "--dir", &text(&own.join("inside")), &text(&own)]).fails(2);
}

#[test]
fn two_hosts_on_a_bridge_pair_by_code_over_multicast() {
    if !geteuid().is_root() {
        return skip("hosts of their own are network namespaces, which take root");
    }
    let Some(bridge) = Bridge::new() else {
        return skip("hosts of their own are network namespaces, which are not allowed here");
    };
    let world = World::new();
    let (anna, ben) = (world.home("anna").on(&bridge.hosts[0]), world.home("ben").on(&bridge.hosts[1]));
    for home in [&anna, &ben] {
        home.ran(&["init", "--key-store", "file", "--name", home.name]).success();
    }
    join_by_code(&anna, &ben);
    let _serving = [anna.serve(), ben.serve()];
    anna.push("over the bridge");
    assert_eq!(texts(&ben.follow(0, 1)), ["over the bridge"]);
    let peers = anna.json(&["status"])[0]["groups"][0]["peers"].clone();
    assert!(peers[0]["address"].as_str().is_some_and(|address| address.starts_with("10.83.")), "{peers}");
}

/// A bridge with two hosts on it; dropping it takes all down.
struct Bridge {
    hosts: [String; 2],
    hub: String,
}

impl Bridge {
    fn new() -> Option<Self> {
        let id = std::process::id() % 100_000;
        let bridge = Self { hosts: [format!("ss{id}a"), format!("ss{id}b")], hub: format!("ss{id}h") };
        // the bridge has a namespace too, so that nothing of this is seen outside
        for name in [&bridge.hub, &bridge.hosts[0], &bridge.hosts[1]] {
            ip(&["netns", "add", name]).then_some(())?;
            ip(&["-n", name, "link", "set", "lo", "up"]).then_some(())?;
        }
        ip(&["-n", &bridge.hub, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0"]).then_some(())?;
        ip(&["-n", &bridge.hub, "link", "set", "br0", "up"]).then_some(())?;
        for (number, host) in bridge.hosts.iter().enumerate() {
            let port = format!("port{number}");
            let address = format!("10.83.0.{}/24", number + 1);
            for command in [
                &["-n", &bridge.hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", host][..],
                &["-n", &bridge.hub, "link", "set", &port, "master", "br0", "up"],
                &["-n", host, "addr", "add", &address, "dev", "eth0"],
                &["-n", host, "link", "set", "eth0", "up"],
                &["-n", host, "route", "add", "224.0.0.0/4", "dev", "eth0"],
            ] {
                ip(command).then_some(())?;
            }
        }
        Some(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.hub]) {
            ip(&["netns", "del", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> bool {
    let mut command = Command::new("ip");
    command.args(arguments).env("PATH", search_path()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The search path, with where tools of the administrator are.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

// ---- how it is all driven ----

const VERSION_LINE: &str = concat!("syncshell-version: ", env!("CARGO_PKG_VERSION"));

/// A directory in which homes find each other and nobody else.
#[derive(Clone)]
struct World(std::rc::Rc<TempDir>);

impl World {
    fn new() -> Self {
        Self(TempDir::with_prefix("syncshell-test-").expect("a directory").into())
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn home(&self, name: &'static str) -> Home {
        Home { world: self.clone(), name, path: self.dir().join(name), host: None }
    }

    fn pair(&self) -> (Home, Home) {
        self.pair_named("anna", "ben")
    }

    /// Two homes of which the second is let in with a role.
    fn pair_as(&self, role: Option<&str>) -> (Home, Home) {
        let (anna, ben) = (self.home("anna").made(), self.home("ben").made());
        join_as(&anna, &ben, role);
        (anna, ben)
    }

    fn pair_named(&self, inviter: &'static str, joiner: &'static str) -> (Home, Home) {
        let (inviter, joiner) = (self.home(inviter).made(), self.home(joiner).made());
        join_by_code(&inviter, &joiner);
        (inviter, joiner)
    }

    /// Two homes that share a folder, with nobody serving.
    fn share(&self, here: &Path, there: &Path) -> (Home, Home) {
        let (anna, ben) = (self.home("anna").made(), self.home("ben").made());
        let mut share = anna.spawn(&["share", &text(here), "--json"]);
        let code = share.line()["code"].as_str().expect("a code").to_owned();
        let mut join = ben.spawn(&["join", &code, &text(there), "--json"]);
        while join.line()["event"] != "placed" {}
        assert_eq!(share.line()["event"], "joined");
        assert_eq!(join.interrupt().code(), Some(0));
        assert_eq!(share.interrupt().code(), Some(0));
        (anna, ben)
    }

    fn ran(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(PROGRAM);
        command.args(arguments);
        self.hermetic(command).ran()
    }

    fn hermetic(&self, mut command: Command) -> Command {
        command
            .env_clear()
            .env("HOME", self.dir())
            .env("TMPDIR", self.dir())
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
            .env("SYNCSHELL_BIND", "loopback")
            .env("SYNCSHELL_MDNS", "off")
            .env("SYNCSHELL_LAN", "off")
            .env("SYNCSHELL_PUBLIC_RELAYS", "off")
            .env("SYNCSHELL_RUNTIME_DIR", self.dir().join("run"));
        command
    }
}

struct Home {
    world: World,
    name: &'static str,
    path: PathBuf,
    /// The network namespace it lives in.
    host: Option<String>,
}

/// What a blob is to a reader.
#[derive(Debug, Clone)]
struct Blob {
    cursor: u64,
    bytes: Vec<u8>,
}

fn texts(blobs: &[Blob]) -> Vec<String> {
    blobs.iter().map(|blob| String::from_utf8_lossy(&blob.bytes).into_owned()).collect()
}

impl Home {
    fn world(&self) -> World {
        self.world.clone()
    }

    fn made(self) -> Self {
        self.ran(&["init", "--key-store", "file", "--name", self.name]).success();
        self
    }

    fn on(self, host: &str) -> Self {
        Self { host: Some(host.to_owned()), ..self }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let Some(host) = &self.host else {
            let mut command = Command::new(PROGRAM);
            command.args(arguments);
            let mut command = self.world.hermetic(command);
            command.env("SYNCSHELL_HOME", &self.path);
            return command;
        };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", host, PROGRAM]).args(arguments);
        let mut command = self.world.hermetic(command);
        command
            .env("PATH", search_path())
            .env("SYNCSHELL_HOME", &self.path)
            .env("SYNCSHELL_SAME_MACHINE", "off")
            .env_remove("SYNCSHELL_BIND")
            .env_remove("SYNCSHELL_LAN");
        command
    }

    fn ran(&self, arguments: &[&str]) -> Ran {
        self.command(arguments).ran()
    }

    fn ran_with(&self, arguments: &[&str], input: &[u8]) -> Ran {
        let mut child = Reaped(self.piped(arguments));
        let mut stdin = child.0.stdin.take().expect("piped");
        let input = input.to_owned();
        // it may end without reading all
        let writer = thread::spawn(move || drop(stdin.write_all(&input)));
        let ran = child.ran();
        writer.join().expect("no panic");
        ran
    }

    /// Pushes from an input that never ends.
    fn endless_push(&self) -> Ran {
        let mut child = Reaped(self.piped(&["push", "-", "--wait", "0"]));
        let mut stdin = child.0.stdin.take().expect("piped");
        let writer = thread::spawn(move || while stdin.write_all(&[b'x'; 1 << 16]).is_ok() {});
        let ran = child.ran();
        writer.join().expect("no panic");
        ran
    }

    /// Without the rights of root, which no permission stops.
    fn ran_as_nobody(&self, arguments: &[&str]) -> Ran {
        let mut command = self.command(arguments);
        if geteuid().is_root() {
            // the program may lie where nobody else gets
            let program = self.world.dir().join("program");
            if !program.exists() {
                fs::copy(PROGRAM, &program).expect("copied");
            }
            command = Command::new(program);
            command.args(arguments);
            command = self.world.hermetic(command);
            command.env("SYNCSHELL_HOME", &self.path).uid(65_534).gid(65_534);
        }
        command.env("SYNCSHELL_RUNTIME_DIR", self.path.join("run")).ran()
    }

    fn piped(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("started")
    }

    fn json(&self, arguments: &[&str]) -> Vec<Value> {
        json_lines(&self.ran(&[arguments, &["--json"]].concat()).success())
    }

    fn file(&self, name: &str, content: &str) -> String {
        let directory = self.world.dir().join(format!("{}-files", self.name));
        fs::create_dir_all(&directory).expect("made");
        let path = directory.join(name);
        fs::write(&path, content).expect("written");
        path.to_string_lossy().into_owned()
    }

    /// Makes its group without anyone joining.
    fn make_group(&self) {
        let mut create = self.spawn(&["pair", "--create", "--json"]);
        create.line();
        create.interrupt();
    }

    fn push(&self, text: &str) -> u64 {
        self.push_bytes(text.as_bytes())
    }

    fn push_bytes(&self, bytes: &[u8]) -> u64 {
        let output = self.ran_with(&["push", "-", "--json", "--wait", "0"], bytes).success();
        json_lines(&output)[0]["cursor"].as_u64().expect("a cursor")
    }

    fn newest(&self) -> u64 {
        self.json(&["status"])[0]["groups"][0]["max_cursor"].as_u64().expect("a cursor")
    }

    fn pull(&self, after: u64) -> Vec<Blob> {
        let mut lines = self.json(&["pull", "--after-cursor", &after.to_string()]);
        assert_eq!(lines.pop().expect("an end")["has_more"], false);
        in_order(lines.iter().map(blob).collect())
    }

    /// Reads so many blobs, waiting for those to come.
    fn follow(&self, after: u64, count: usize) -> Vec<Blob> {
        let (after, limit) = (after.to_string(), count.to_string());
        let mut reader = self.spawn(&["pull", "--follow", "--json", "--after-cursor", &after, "--limit", &limit]);
        let blobs = (0..count).map(|_| blob(&reader.line())).collect();
        reader.line();
        assert_eq!(reader.wait().code(), Some(0));
        in_order(blobs)
    }

    /// Reads until it is enough.
    fn follow_until(&self, enough: impl Fn(&[Blob]) -> bool) -> Vec<Blob> {
        let mut reader = self.spawn(&["pull", "--follow", "--json"]);
        let mut blobs = Vec::new();
        while !enough(&blobs) {
            blobs.push(blob(&reader.line()));
        }
        reader.interrupt();
        in_order(blobs)
    }

    fn members(&self) -> Vec<Value> {
        self.json(&["members"])[0]["members"].as_array().expect("members").clone()
    }

    fn status(&self) -> Value {
        self.json(&["status"])[0]["groups"][0].clone()
    }

    /// Devices that speak with it.
    fn connected(&self) -> usize {
        let status = self.status();
        let peers = status["peers"].as_array().expect("peers");
        peers.iter().filter(|peer| peer["state"] == "connected").count()
    }

    fn refused(&self) -> u64 {
        self.status()["refused"].as_u64().expect("a count")
    }

    fn only_folder(&self) -> Value {
        let folders = self.json(&["folders"])[0]["folders"].clone();
        assert_eq!(folders.as_array().map(Vec::len), Some(1), "{folders}");
        folders[0].clone()
    }

    /// Waits until its only folder has nothing left to do.
    fn settled(&self) {
        until("nothing is left to do", || self.only_folder()["state"] == "up-to-date");
    }

    fn plain_status(&self) -> String {
        let device = self.json(&["status"])[0]["device"].as_str().expect("an id").to_owned();
        let status = self.ran(&["status"]).success();
        status.replace(&*self.path.to_string_lossy(), "HOME").replace(&device, "DEVICE")
    }

    /// Starts to serve it, and returns once that is so.
    fn serve(&self) -> Reaped {
        self.serve_as(self.command(&SERVE))
    }

    fn serve_as(&self, command: Command) -> Reaped {
        let Spawned { child, lines, .. } = self.spawn_serving_as(command);
        // read on, or it would wait for a reader
        thread::spawn(move || lines.iter().for_each(drop));
        child
    }

    fn spawn_serving(&self) -> Spawned {
        self.spawn_serving_as(self.command(&SERVE))
    }

    /// The same by a command that stands for `run`.
    fn spawn_serving_as(&self, command: Command) -> Spawned {
        let mut serving = self.spawn_as(command, &SERVE);
        assert_eq!(serving.line()["event"], "serving");
        serving
    }

    /// Serves it again after its server was killed.
    fn restart(&self, mut killed: Reaped) -> Reaped {
        assert!(!killed.0.wait().expect("reaped").success());
        self.serve()
    }

    fn spawn(&self, arguments: &[&str]) -> Spawned {
        self.spawn_as(self.command(arguments), arguments)
    }

    /// Starts a command that stands for one with these arguments.
    fn spawn_as(&self, mut command: Command, arguments: &[&str]) -> Spawned {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("started");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        // far more lines than any test leaves unread for long
        let (sender, lines) = sync_channel(1 << 16);
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Spawned { child: Reaped(child), lines, what: format!("{arguments:?}") }
    }

    fn connect(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.path.join("api.sock")).expect("served");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        // it may answer without reading all
        let _ = stream.write_all(body);
        stream
    }

    fn http(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> String {
        let mut answer = Vec::new();
        // what was not read of the body makes the end a reset
        let _ = self.connect(method, path, headers, body).read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

fn join_by_code(inviter: &Home, joiner: &Home) {
    join_as(inviter, joiner, None);
}

/// Lets a home in, as a device of the inviter or as a person with a role.
fn join_as(inviter: &Home, joiner: &Home, role: Option<&str>) {
    let mut arguments = vec!["pair", "--create", "--json"];
    arguments.extend(role.iter().flat_map(|role| ["--role", role]));
    let mut create = inviter.spawn(&arguments);
    let code = create.line()["code"].as_str().expect("a code").to_owned();
    joiner.ran_with(&["pair", "--join", "-"], code.as_bytes()).success();
    let outcome = create.line();
    assert_eq!((&outcome["outcome"], &outcome["name"]), (&"joined".into(), &joiner.name.into()));
    assert_eq!(create.wait().code(), Some(0));
}

fn blob(line: &Value) -> Blob {
    let bytes = BASE64.decode(line["bytes"].as_str().expect("bytes").as_bytes()).expect("base64");
    Blob { cursor: line["cursor"].as_u64().expect("a cursor"), bytes }
}

fn in_order(blobs: Vec<Blob>) -> Vec<Blob> {
    assert!(blobs.is_sorted_by(|one, next| one.cursor < next.cursor), "{blobs:?}");
    blobs
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

fn text(path: &Path) -> String {
    path.to_str().expect("text").to_owned()
}

/// Writes a file, and before it the directories it is in.
fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a directory")).expect("made");
    fs::write(path, text).expect("written");
}

/// What is in a folder, by path below it.
fn tree(root: &Path) -> std::collections::BTreeMap<PathBuf, String> {
    let mut found = std::collections::BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else { continue };
            let content = match kind {
                kind if kind.is_symlink() => fs::read_link(&path).map(|to| format!("-> {}", to.display())),
                kind if kind.is_file() => fs::read(&path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
                _ if entry.file_name() == ".syncshell" => continue,
                _ => {
                    left.push(path.clone());
                    Ok("directory".to_owned())
                }
            };
            let below = path.strip_prefix(root).expect("below").to_owned();
            // it may go while it is read
            found.insert(below, content.unwrap_or_default());
        }
    }
    found
}

/// Waits until two folders hold the same.
fn equal(one: &Path, other: &Path) {
    let give_up = Instant::now() + PATIENCE;
    while !other.is_dir() || tree(one) != tree(other) {
        assert!(Instant::now() < give_up, "{:?}\n{:?}", tree(one).keys(), tree(other).keys());
        thread::sleep(Duration::from_millis(20));
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < give_up, "waited too long until {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777
}

fn signal(process: u32, signal: Signal) {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).expect("signalled");
}

/// A process that ended.
#[derive(Debug)]
struct Ran {
    status: ExitStatus,
    output: Vec<u8>,
    errors: String,
}

impl Ran {
    fn output(self) -> Vec<u8> {
        assert!(self.status.success(), "{}: {}", self.status, self.errors);
        self.output
    }

    fn success(self) -> String {
        String::from_utf8(self.output()).expect("text")
    }

    /// Checks the exit code and that nothing was written to standard output, and returns what was said.
    fn fails(self, code: i32) -> String {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert!(self.output.is_empty(), "{self:?}");
        self.errors
    }
}

trait RanExt {
    fn ran(&mut self) -> Ran;
}

impl RanExt for Command {
    fn ran(&mut self) -> Ran {
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Reaped(self.spawn().expect("started")).ran()
    }
}

/// A process that is killed and reaped with this.
struct Reaped(Child);

impl Reaped {
    fn ran(mut self) -> Ran {
        let mut output = self.0.stdout.take().expect("piped");
        let mut errors = self.0.stderr.take().expect("piped");
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            errors.read_to_end(&mut bytes).map(|_| bytes)
        });
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).expect("read");
        let errors = reader.join().expect("no panic").expect("read");
        Ran { status: self.wait(), output: bytes, errors: String::from_utf8_lossy(&errors).into_owned() }
    }

    fn wait(mut self) -> ExitStatus {
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().expect("watched") {
                return status;
            }
            assert!(Instant::now() < give_up, "the process does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        // it may have ended
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process whose lines are read as they come.
struct Spawned {
    child: Reaped,
    lines: Receiver<String>,
    what: String,
}

impl Spawned {
    fn text_line(&mut self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("{} says nothing", self.what),
            Err(RecvTimeoutError::Disconnected) => panic!("{} has ended: {:?}", self.what, self.child.0.wait()),
        }
    }

    fn line(&mut self) -> Value {
        serde_json::from_str(&self.text_line()).expect("JSON")
    }

    /// Presses Ctrl-C.
    fn interrupt(self) -> ExitStatus {
        signal(self.child.0.id(), Signal::INT);
        self.wait()
    }

    fn terminate(self) -> ExitStatus {
        signal(self.child.0.id(), Signal::TERM);
        self.wait()
    }

    fn wait(self) -> ExitStatus {
        self.child.wait()
    }
}
