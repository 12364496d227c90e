//! `cargo xtask sim`: whole groups in one process, many seeds; `--mutants` asks whether the simulator would notice.

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::mutants;
use crate::shell::{self, cargo};

/// Seeds of one CI run: a minute's worth; the long runs are `cargo xtask sim --seeds 1000`.
const CI_SEEDS: u64 = 50;
/// The first of them: the same for every run, so that what CI says depends on the code alone. Fresh ones are for `sim`.
const CI_START: u64 = 298_561_655_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many fresh seeds to run
    #[arg(long)]
    seeds: Option<u64>,
    /// Apply each patch of testing/sim/mutants to a copy of the tree and demand that the simulator finds it
    #[arg(long, conflicts_with_all = ["seeds", "rest"])]
    mutants: bool,
    /// Further arguments, passed on to sync-sim
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Runs the simulator in a release build, or the mutants.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    if args.mutants {
        return mutants::run(root);
    }
    let mut command = cargo(root, ["run", "--release", "--package", "sync-sim", "--"]);
    if let Some(seeds) = args.seeds {
        add_seeds(&mut command, seeds);
    }
    shell::run(command.args(&args.rest))
}

/// Runs the simulator that lies beside this program, as the workspace's own build left it.
pub(crate) fn run_built(root: &Path) -> Result<()> {
    let xtask = env::current_exe().context("cannot tell where this program lies")?;
    let sim = xtask.with_file_name(format!("sync-sim{}", env::consts::EXE_SUFFIX));
    let mut command = Command::new(sim);
    command.current_dir(root);
    command.arg("--start").arg(CI_START.to_string());
    add_seeds(&mut command, CI_SEEDS);
    shell::run(&mut command)
}

/// The simulator's own command line for a number of fresh seeds.
pub(crate) fn add_seeds(command: &mut Command, seeds: u64) {
    command.arg("--seeds").arg(seeds.to_string());
}
