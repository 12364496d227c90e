//! `cargo xtask soak`: random edits on all sides of one folder, with processes of the command killed meanwhile.

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::shell::{self, cargo};

/// Seconds of one CI run; the long runs are `cargo xtask soak`.
const CI_SECONDS: &str = "60";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long and with which seed, as sync-soak takes it; ten minutes unless told otherwise
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Soaks the command in a release build.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    shell::run(&mut cargo(root, ["build", "--release", "--package", "sync-cli"]))?;
    shell::run(cargo(root, ["run", "--release", "--package", "sync-soak", "--bin", "sync-soak", "--"]).args(&args.rest))
}

/// Soaks the command that lies beside this program, as the workspace's own build left it.
pub(crate) fn run_built(root: &Path) -> Result<()> {
    let xtask = env::current_exe().context("cannot tell where this program lies")?;
    let soak = xtask.with_file_name(format!("sync-soak{}", env::consts::EXE_SUFFIX));
    shell::run(Command::new(soak).current_dir(root).args(["--seconds", CI_SECONDS, "--homes", "3"]))
}
