//! The `syncshell` command, and the daemon it becomes while it serves a home.
//!
//! **Invariant:** everything the command can do, a program can do through `sync-client` or the local API;
//! nothing here knows a key, a frame or a format.

mod api;
mod backend;
mod cli;
mod commands;
mod exit;
mod follow;
mod live;
mod output;
mod select;
mod service;
mod signals;
mod terminal;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};
use exit::Failure;
use output::{OUTPUT_CLOSED, Output};

/// How long the end waits for work that cannot be cancelled, such as a read of standard input.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let out = Output::new(cli.global.json);
    log_to_stderr(cli.global.verbose);

    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return end(out, Err(Failure::io("cannot start")(error))),
    };
    let result = runtime.block_on(execute(cli, out));
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    end(out, result)
}

async fn execute(Cli { global, command }: Cli, out: Output) -> Result<(), Failure> {
    match command {
        Command::Init(args) => args.run(&global, out).await,
        Command::Share(args) => args.run(&global, out).await,
        Command::Join(args) => args.run(&global, out).await,
        Command::Invite(args) => args.run(&global, out).await,
        Command::Folders(args) => args.run(&global, out).await,
        Command::Devices(args) => args.run(&global, out).await,
        Command::Members(args) => args.run(&global, out).await,
        Command::Remove(args) => args.run(&global, out).await,
        Command::Rotate(args) => args.run(&global, out).await,
        Command::Pause(args) => args.run(&global, out).await,
        Command::Resume(args) => args.run(&global, out).await,
        Command::Rescan(args) => args.run(&global, out).await,
        Command::Select(args) => args.run(&global, out).await,
        Command::Leave(args) => args.run(&global, out).await,
        Command::Relay(args) => args.run(&global, out).await,
        Command::Confirm(args) => args.run(&global, out).await,
        Command::Undo(args) => args.run(&global, out).await,
        Command::Versions(args) => args.run(&global, out).await,
        Command::Restore(args) => args.run(&global, out).await,
        Command::Backup(args) => args.run(&global, out).await,
        Command::Recover(args) => args.run(&global, out).await,
        Command::Up(args) => args.run(&global, out).await,
        Command::Down(args) => args.run(&global, out).await,
        Command::Unit(args) => args.run(&global, out),
        Command::Pair(args) => args.run(&global, out).await,
        Command::Push(args) => args.run(&global, out).await,
        Command::Pull(args) => args.run(&global, out).await,
        Command::Run(args) => args.run(&global, out).await,
        Command::Status(args) => args.run(&global, out).await,
        Command::Demo(args) => args.run(out).await,
    }
}

fn end(out: Output, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.code == OUTPUT_CLOSED => ExitCode::SUCCESS,
        Err(failure) => {
            out.failure(&failure);
            ExitCode::from(failure.kind().exit)
        }
    }
}

fn log_to_stderr(verbose: u8) {
    let ours = |level| {
        ["syncshell", "sync_client", "sync_core", "sync_crypto", "sync_folder", "sync_link", "sync_store"]
            .map(|target| format!("{target}={level}"))
            .join(",")
    };
    // others' logs name addresses and device ids: not unless asked for
    let filter = match verbose {
        0 => "off".to_owned(),
        1 => format!("error,{}", ours("info")),
        2 => format!("warn,{}", ours("debug")),
        _ => format!("debug,{}", ours("trace")),
    };
    let filter = EnvFilter::try_from_env("SYNCSHELL_LOG").unwrap_or_else(|_| EnvFilter::new(filter));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
