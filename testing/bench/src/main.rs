//! Our figures, measured on the real client, beside what the machine itself can do in the same minute.
//!
//! `sync-bench log` works on real homes on disk, between processes of this program that talk over iroh on loopback.
//! `sync-bench folders` drives the command itself, and other people's tools beside it.
//! `sync-bench relay` drives a relay, and Redis beside it.
//! Times are printed with their targets and never asserted: the exit code says whether everything worked.

mod figures;
mod floor;
mod folders;
mod log;
mod machine;
mod peer;
mod relay;
mod remote;
mod rounds;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Syncshell.
#[derive(Parser)]
#[command(name = "sync-bench", version)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Push, delivery and catch-up of 1 KiB blobs
    Log(rounds::Args),
    /// First sync, rename, insert, rescan and save of folders, beside Syncthing, rsync and cp
    Folders(folders::Args),
    /// Durable pushes, fan-out and memory of a relay, beside Redis
    Relay(rounds::Args),
    /// One device of a measurement, told what to do on standard input
    #[command(hide = true)]
    Peer,
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Cli::parse().bench {
        Bench::Log(args) => log::run(&args).await,
        Bench::Folders(args) => tokio::task::spawn_blocking(move || folders::run(&args)).await.unwrap_or_else(failed),
        Bench::Relay(args) => relay::run(&args).await,
        Bench::Peer => peer::run().await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A panic of ours, which has said what it is.
fn failed(error: tokio::task::JoinError) -> anyhow::Result<()> {
    Err(error.into())
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
