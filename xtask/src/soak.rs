//! `cargo xtask soak`: random edits on all sides of one folder, with processes of the command killed meanwhile.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;

use crate::shell::{self, cargo};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long and with which seed, as sync-soak takes it; ten minutes unless told otherwise
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Soaks the command in a release build.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    shell::run(&mut cargo(root, ["build", "--release", "--package", "sync-cli"]))?;
    shell::run(cargo(root, ["run", "--release", "--package", "sync-soak", "--"]).args(&args.rest))
}
