//! `cargo xtask faults`: `kill -9` after every step of an apply.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;

use crate::shell::{self, cargo};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which steps of which side, as sync-faults takes it; every one of both unless told otherwise, which takes an hour
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Kills the command in a release build.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    shell::run(&mut cargo(root, ["build", "--release", "--package", "sync-cli"]))?;
    let run = ["run", "--release", "--package", "sync-soak", "--bin", "sync-faults", "--"];
    shell::run(cargo(root, run).args(&args.rest))
}
