//! Kills the command after every step of an apply, and checks that nothing is lost and all go on.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Kills the command after every step of an apply, and checks that nothing is lost and all go on
#[derive(Debug, Parser)]
#[command(name = "sync-faults", version)]
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "strace is for Linux"))]
struct Cli {
    /// After so many steps of each side, evenly spread; after every one unless given
    #[arg(long)]
    steps: Option<usize>,
    /// Kill only this side
    #[arg(long, value_parser = ["receiver", "sender"])]
    only: Option<String>,
    /// The command; the one beside this program unless named
    #[arg(long, value_name = "FILE")]
    command: Option<PathBuf>,
    /// Where to make the homes; beside this program unless named
    #[arg(long)]
    dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(target_os = "linux")]
fn run(cli: &Cli) -> anyhow::Result<()> {
    use sync_soak::command::Program;
    use sync_soak::faults::{self, Victim, Which};

    faults::is_possible().map_err(anyhow::Error::msg)?;
    let dir = match &cli.dir {
        Some(dir) => dir.clone(),
        None => sync_soak::tree::beside_the_program("faults")?,
    };
    for (name, victim) in [("receiver", Victim::Receiver), ("sender", Victim::Sender)] {
        if cli.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let site = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(&dir)?.keep();
        let program = Program::find(cli.command.as_deref(), site.join("run"))?;
        let which = cli.steps.map_or(Which::All, Which::Some);
        let report = faults::run(&program, &site, victim, which, |line| println!("{name}: {line}"))
            .inspect_err(|_| eprintln!("faults: homes and logs are left in {}", site.display()))?;
        println!("{name}: killed {} times, of {} steps; after {:?}", report.kills, report.steps, report.calls);
        std::fs::remove_dir_all(&site)?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn run(_cli: &Cli) -> anyhow::Result<()> {
    anyhow::bail!("processes are killed at their steps with strace, which is for Linux: run this there")
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
