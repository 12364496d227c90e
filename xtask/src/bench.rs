//! `cargo xtask bench`: our figures and the peers', measured by `sync-bench` in a release build.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;

use crate::shell::{self, cargo};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure and how, as sync-bench takes it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Builds and runs the benchmark with the arguments given.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let build_and_run = ["run", "--release", "--package", "sync-bench", "--"];
    shell::run(cargo(root, build_and_run).args(&args.rest))
}
