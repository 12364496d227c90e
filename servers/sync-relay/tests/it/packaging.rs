//! What `packaging/` and the guides say is true of this program.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use sync_relay::Config;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sync-relay");

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The value behind a word at the beginning of a line.
fn after<'a>(text: &'a str, word: &str) -> &'a str {
    text.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_else(|| panic!("no {word}")).trim()
}

struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the program with the arguments of a package, in which only places are others; what it prints first.
fn start(arguments: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let config = repository().join("packaging/relay.toml");
    let mut command = Command::new(PROGRAM);
    for argument in arguments {
        match *argument {
            "/etc/sync-relay/relay.toml" => command.arg(&config),
            "/data" | "/var/lib/sync-relay" => command.arg(dir.path().join("data")),
            "0.0.0.0:7841" | "[::]:7841" => command.arg("127.0.0.1:0"),
            option => command.arg(option),
        };
    }
    let mut started = Started(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(started.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(dir.path().join("data/relay.db").exists(), "{arguments:?}");
    line
}

/// Whether an address lets only who has the operator's token keep a new group.
fn has_token(address: &str) -> bool {
    address.trim().split_once('#').is_some_and(|(_, fragment)| fragment.contains('.'))
}

#[test]
fn the_service_starts_the_program_as_it_takes_its_arguments() {
    let unit = text("packaging/sync-relay.service");
    let mut words = after(&unit, "ExecStart=").split(' ');
    assert_eq!(words.next(), Some("/usr/local/bin/sync-relay"));
    let address = start(&words.collect::<Vec<_>>());
    assert!(has_token(&address), "{address}");
    assert!(unit.contains("StateDirectory=sync-relay"), "it is what --data names");
}

#[test]
fn the_service_is_one_to_systemd() {
    let analyze = |arguments: &[&str], path: &Path| {
        Command::new("systemd-analyze").args(arguments).arg(path).env("SYSTEMD_COLORS", "0").output()
    };
    if analyze(&["--version"], Path::new("")).is_err() {
        eprintln!("skipped: systemd-analyze is not there; the package systemd has it");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sync-relay.service");
    // it looks for the program too
    let unit = text("packaging/sync-relay.service").replace("/usr/local/bin/sync-relay ", &format!("{PROGRAM} "));
    std::fs::write(&path, unit).unwrap();
    let output = analyze(&["verify", "--man=no", "--recursive-errors=no"], &path).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("sync-relay.service:"), "{said}");
}

#[test]
fn the_image_starts_the_program_as_it_takes_its_arguments_and_copies_what_is_there() {
    let dockerfile = text("packaging/Dockerfile");
    let words = |instruction: &str| -> Vec<String> { serde_json::from_str(after(&dockerfile, instruction)).unwrap() };
    let all = [words("ENTRYPOINT "), words("CMD ")].concat();
    let (program, arguments) = all.split_first().unwrap();
    assert_eq!(program, "/usr/local/bin/sync-relay");
    let address = start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(has_token(&address), "{address}");
    for line in dockerfile.lines().filter(|line| line.starts_with("COPY packaging/")) {
        let copied = line.split(' ').nth(1).unwrap();
        assert!(repository().join(copied).exists(), "{copied}");
    }
    assert!(dockerfile.contains("\nUSER nonroot"));
    let compose = text("packaging/compose.yaml");
    for named in ["dockerfile: packaging/Dockerfile", "./relay.toml:/etc/sync-relay/relay.toml:ro", "read_only: true"] {
        assert!(compose.contains(named), "{named}");
    }
}

#[test]
fn every_setting_that_the_guides_show_is_one() {
    let mut guides: Vec<PathBuf> =
        std::fs::read_dir(repository().join("docs/relay")).unwrap().map(|entry| entry.unwrap().path()).collect();
    guides.extend(["docs/relay.md", "packaging/relay.toml"].map(|path| repository().join(path)));
    let mut shown = 0;
    for path in guides {
        let text = std::fs::read_to_string(&path).unwrap();
        let is_settings = path.extension().is_some_and(|extension| extension == "toml");
        let blocks: Vec<&str> = if is_settings {
            vec![&text]
        } else {
            text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
        };
        for block in blocks {
            let config: Config = toml::from_str(block).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            config.check().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            shown += 1;
        }
    }
    assert!(shown >= 3, "{shown}");
}
