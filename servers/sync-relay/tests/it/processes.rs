//! The relay and the `syncshell` command, as a person has them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::site::{PATIENCE, RelayProcess, Site};

/// The command beside the relay; built if it is not there, as where this crate alone is tested.
fn syncshell() -> PathBuf {
    let relay = Path::new(env!("CARGO_BIN_EXE_sync-relay"));
    let command = relay.with_file_name(format!("syncshell{}", std::env::consts::EXE_SUFFIX));
    if !command.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "--quiet", "-p", "sync-cli"]).status().unwrap();
        assert!(built.success());
    }
    command
}

/// A home, used by one process after the other.
struct Home<'a> {
    site: &'a Site,
    name: &'a str,
}

impl Home<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(syncshell());
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.site.path(""))
            .env("SYNCSHELL_HOME", self.site.path(self.name))
            .env("SYNCSHELL_RUNTIME_DIR", self.site.path("run"))
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
            .env("SYNCSHELL_BIND", "loopback")
            .env("SYNCSHELL_MDNS", "off")
            .env("SYNCSHELL_LAN", "off");
        command
    }

    fn ran(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn spawn(&self, arguments: &[&str]) -> Spawned {
        Spawned(self.command(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.ran(&["status", "--json"])).unwrap()
    }
}

struct Spawned(Child);

impl Spawned {
    /// The first line of its output.
    fn line(&mut self) -> Value {
        use std::io::{BufRead as _, BufReader};

        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pushes_and_exits_and_b_starts_later_and_gets_everything_from_the_relay() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let (anna, ben) = (Home { site: &site, name: "anna" }, Home { site: &site, name: "ben" });
    for home in [&anna, &ben] {
        home.ran(&["init", "--key-store", "file", "--name", home.name]);
    }
    assert!(anna.ran(&["relay", "list"]).starts_with("no relay"));
    anna.ran(&["relay", "add", &relay.url]);
    assert!(anna.ran(&["relay", "list"]).contains(&relay.url));
    let mut create = anna.spawn(&["pair", "--create", "--json"]);
    let code = create.line()["code"].as_str().unwrap().to_owned();
    ben.ran(&["pair", "--join", &code]);
    assert!(create.0.wait().unwrap().success());
    assert!(ben.ran(&["relay", "list"]).contains(&relay.url), "who joins is told of it");

    // each process ends before the next one starts: they meet nowhere but at the relay
    let pushed = anna.ran(&["push", "bread and milk", "--wait", "60"]);
    assert!(pushed.contains("relay 127.0.0.1"), "{pushed}");
    let mut serving = ben.spawn(&["run", "--json"]);
    assert_eq!(serving.line()["event"], "serving");
    let give_up = Instant::now() + PATIENCE;
    while ben.ran(&["pull"]) != "bread and milk\n" {
        assert!(Instant::now() < give_up, "{}", ben.status());
    }
    let status = ben.status();
    let relays = status["groups"][0]["relays"].as_array().unwrap();
    assert_eq!((relays.len(), &relays[0]["state"]), (1, &"connected".into()), "{status}");
    let peers = status["groups"][0]["peers"].as_array().unwrap();
    assert!(peers.iter().all(|peer| peer["state"] != "connected"), "{status}");
    assert!(ben.ran(&["status"]).contains("files' contents come from devices alone"));
    drop(serving);

    let removed = anna.ran(&["relay", "remove", &relay.url]);
    assert!(removed.starts_with("removed ws://127.0.0.1"), "{removed}");
}
