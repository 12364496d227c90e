//! The repository's own tasks: `cargo xtask ci` is what CI runs, the rest are its parts and the long runs beside it.

mod audit;
mod bench;
mod ci;
mod faults;
mod interop;
mod mutants;
mod shell;
mod sim;
mod soak;
mod tidy;
mod wasm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The repository's own tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run everything CI runs, cheap checks first and the tests last
    Ci,
    /// Check licences, banned crates and sources, and advisories where the network allows
    Audit(audit::Args),
    /// Check the tree for what review would ask to change
    Tidy,
    /// Run the simulator, or hunt mutants with it
    Sim(sim::Args),
    /// Measure: `bench log`, `bench folders` and `bench relay` print their rows with their targets
    Bench(bench::Args),
    /// Edit one folder on all sides, kill what serves it, and check that nothing is lost
    Soak(soak::Args),
    /// Kill the command after every step of an apply, and check that nothing is lost
    Faults(faults::Args),
    /// Have a device in another language talk to a relay, by the protocol's page alone
    Interop(interop::Args),
    /// Compile the pure crates for the browser
    Wasm,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let root = shell::root();
    let done = match cli.task {
        Task::Ci => ci::run(&root),
        Task::Audit(args) => audit::run(&root, &args),
        Task::Tidy => tidy::run(&root),
        Task::Sim(args) => sim::run(&root, &args),
        Task::Bench(args) => bench::run(&root, &args),
        Task::Soak(args) => soak::run(&root, &args),
        Task::Faults(args) => faults::run(&root, &args),
        Task::Interop(args) => interop::run(&root, &args),
        Task::Wasm => wasm::run(&root),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
