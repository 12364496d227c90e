//! Joins by a code whose inviter is away: another member completes them, or they wait for one.

use std::time::Instant;

use crate::processes::{Home, Spawned};
use crate::site::{PATIENCE, RelayProcess, Site};

/// Names of homes and of the machines that they are on.
const ANNA: (&str, &str) = ("anna", "m1");
const BEN: (&str, &str) = ("ben", "m2");
const CARL: (&str, &str) = ("carl", "m3");
const DORA: (&str, &str) = ("dora", "m4");

/// Waits until something is so.
fn until(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Homes that know a relay, each on a machine of its own.
fn homes<'a, const N: usize>(site: &'a Site, relay: &RelayProcess, names: [(&'a str, &'a str); N]) -> [Home<'a>; N] {
    names.map(|name| {
        let home = Home { site, name: name.0, machine: name.1 };
        home.ran(&["init", "--key-store", "file", "--name", home.name]);
        home.ran(&["relay", "add", &relay.url]);
        home
    })
}

fn serve(home: &Home<'_>) -> Spawned {
    let mut serving = home.spawn(&["run", "--json"]);
    assert_eq!(serving.line()["event"], "serving");
    serving
}

fn invite(home: &Home<'_>, command: &[&str]) -> (Spawned, String) {
    let mut inviting = home.spawn(command);
    let code = inviting.line()["code"].as_str().unwrap().to_owned();
    (inviting, code)
}

/// Two homes in one group, which has an entry.
fn befriend(anna: &Home<'_>, carl: &Home<'_>) {
    let (mut inviting, code) = invite(anna, &["pair", "--create", "--json"]);
    carl.ran(&["pair", "--join", &code]);
    assert!(inviting.0.wait().unwrap().success());
    anna.ran(&["push", "bread and milk", "--wait", "60"]);
}

/// Waits until all that a home wrote is held by the relay.
fn hand_over(home: &Home<'_>) {
    until("handed over", || home.status()["groups"][0]["pending"] == 0);
}

fn until_pulled(home: &Home<'_>) {
    until("pulled", || home.tried(&["pull"]) == "bread and milk\n");
}

#[test]
fn while_the_inviter_is_away_another_member_completes_the_join_and_nobody_else_is_let_in() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let [anna, ben, carl, dora] = homes(&site, &relay, [ANNA, BEN, CARL, DORA]);
    befriend(&anna, &carl);
    let _carl = serve(&carl);
    let (inviting, code) = invite(&anna, &["pair", "--create", "--json"]);
    hand_over(&anna);
    // killed
    drop(inviting);
    ben.ran(&["pair", "--join", &code]);
    let _ben = serve(&ben);
    until_pulled(&ben);
    assert_eq!(ben.status()["groups"][0]["authors"], 3);
    let refused = dora.failed(&["pair", "--join", &code]);
    assert!(refused.contains("has been used"), "{refused}");
}

#[test]
fn where_no_member_is_there_a_join_waits_over_kills_of_joiner_and_relay_and_completes_by_itself() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "");
    let [anna, ben, carl] = homes(&site, &relay, [ANNA, BEN, CARL]);
    befriend(&anna, &carl);
    let (inviting, code) = invite(&anna, &["pair", "--create", "--json"]);
    hand_over(&anna);
    drop(inviting);
    let waits = ben.failed(&["pair", "--join", &code]);
    assert!(waits.contains("completes by itself"), "{waits}");
    drop(serve(&ben));
    relay.kill();
    relay.restart();
    let _ben = serve(&ben);
    assert!(ben.status()["groups"].as_array().unwrap().is_empty());
    let _carl = serve(&carl);
    until_pulled(&ben);
    assert_eq!(ben.status()["groups"][0]["authors"], 3);
}

#[test]
fn by_an_invite_that_was_taken_back_no_member_lets_anyone_in() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let [anna, ben, carl] = homes(&site, &relay, [ANNA, BEN, CARL]);
    befriend(&anna, &carl);
    let (_carl, running) = (serve(&carl), serve(&anna));
    let (_inviting, code) = invite(&anna, &["pair", "--create", "--json"]);
    anna.ran(&["pair", "--revoke", &code]);
    hand_over(&anna);
    // killed, so that the code stays at the relay
    drop(running);
    let refused = ben.failed(&["pair", "--join", &code]);
    assert!(refused.contains("was taken back"), "{refused}");
}
