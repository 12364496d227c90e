//! Random edits on all sides of one folder, with processes killed meanwhile; at the end nothing may be lost.
//!
//! Two or three homes of the real command share a copy of a public source tree.
//! The soak edits on every side, kills and restarts what serves the homes, and writes down every content it sees.
//! Once it is quiet, the trees must be equal, and **no silent overwrite** must hold: what sync took from a disk is in
//! the tree, in a conflict copy or among the versions that some device kept.

mod edits;
mod journal;
mod soak;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Edits one folder on several devices, kills them, and checks that nothing is lost
#[derive(Debug, Parser)]
#[command(name = "sync-soak", version)]
struct Cli {
    /// What the choices follow from; drawn unless given. When processes act is their own affair, so a seed repeats the
    /// choices, not the run.
    #[arg(long)]
    seed: Option<u64>,
    /// How long to edit
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Devices; the third one joins when a third of the time is over
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=3))]
    homes: u8,
    /// How long the devices may take to agree once it is quiet
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    settle: u64,
    /// Dependencies of the workspace whose sources the tree begins with
    #[arg(long, value_name = "CRATE", default_values = ["tokio", "anyhow"])]
    sources: Vec<String>,
    /// The command; the one beside this program unless named
    #[arg(long, value_name = "FILE")]
    command: Option<PathBuf>,
    /// Where to make the homes; beside this program unless named
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Leave the homes and the journal even if all is well
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Soaks and prints; whether nothing was violated.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    let seed = match cli.seed {
        Some(seed) => seed,
        None => getrandom::u32().map(u64::from)?,
    };
    let dir = match &cli.dir {
        Some(dir) => dir.clone(),
        None => sync_soak::tree::beside_the_program("soak")?,
    };
    let site = tempfile::Builder::new().prefix(&format!("{seed}-")).tempdir_in(dir)?.keep();
    let plan = soak::Plan {
        seed,
        time: Duration::from_secs(cli.seconds),
        homes: usize::from(cli.homes),
        settle: Duration::from_secs(cli.settle),
        sources: cli.sources.clone(),
        command: cli.command.clone(),
    };
    let left = || format!("seed {seed}; homes, logs and journal are left in {}", site.display());
    let report = soak::run(&plan, &site).inspect_err(|_| eprintln!("soak: {}", left()))?;
    for violation in &report.violations {
        println!("violation: {violation}");
    }
    println!("soak: {}", report.summary);
    let held = report.violations.is_empty();
    if !held || cli.keep {
        println!("soak: {}", left());
    } else {
        std::fs::remove_dir_all(&site)?;
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
