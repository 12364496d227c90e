//! `cargo xtask bench`: our figures and the peers', measured by `sync-bench` in a release build.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::shell::{self, cargo};

/// Tools that `bench folders` measures beside the command; their Debian packages are called the same.
const FOLDER_PEERS: [&str; 2] = ["syncthing", "rsync"];
/// What `bench relay` measures beside the relay.
const RELAY_PEERS: [&str; 1] = ["redis-server"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure and how, as sync-bench takes it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Builds and runs the benchmark with the arguments given.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    match args.rest.first().and_then(|bench| bench.to_str()) {
        Some("folders") => {
            install(&FOLDER_PEERS);
            shell::run(&mut cargo(root, ["build", "--release", "--package", "sync-cli"]))?;
        }
        Some("relay") => {
            install(&RELAY_PEERS);
            shell::run(&mut cargo(root, ["build", "--release", "--package", "sync-relay"]))?;
        }
        _ => {}
    }
    let build_and_run = ["run", "--release", "--package", "sync-bench", "--"];
    shell::run(cargo(root, build_and_run).args(&args.rest))
}

/// Brings the peers that are missing, where that is possible; where not, the benchmark says what to install.
fn install(peers: &[&str]) {
    let missing = peers.iter().copied().filter(|tool| !shell::succeeds(Command::new(tool).arg("--version")));
    let missing: Vec<&str> = missing.collect();
    if missing.is_empty() || !is_root() {
        return;
    }
    let install = || {
        let mut command = Command::new("apt-get");
        command.args(["install", "-y", "--no-install-recommends"]).args(&missing);
        shell::succeeds(command.env("DEBIAN_FRONTEND", "noninteractive"))
    };
    // the lists of an image are often empty or old
    let installed = install() || (shell::succeeds(Command::new("apt-get").arg("update")) && install());
    if installed {
        eprintln!("bench: installed {}", missing.join(" "));
    }
}

/// Whether packages may be installed, as `id` tells where there is one.
fn is_root() -> bool {
    shell::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim_ascii() == b"0")
}
