//! `sync-relay`: runs a relay until it is told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use sync_relay::{Config, Server};
use tracing_subscriber::EnvFilter;

/// Keeps for devices what others of their group say while they are away; it can read none of it
///
/// Prints the address to give to devices: `syncshell relay add ADDRESS`.
#[derive(Debug, Parser)]
#[command(name = "sync-relay", version, max_term_width = 100)]
struct Args {
    /// File with settings; every one has a default
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,

    /// Where to listen; 127.0.0.1:7841 unless named here or in the file
    #[arg(long, value_name = "ADDR")]
    bind: Option<SocketAddr>,

    /// Directory of the database and the key; the user's data directory unless named here or in the file
    #[arg(long, value_name = "DIR", global = true)]
    data: Option<PathBuf>,

    #[command(subcommand)]
    what: Option<What>,
}

/// What is asked of a relay that runs.
#[derive(Debug, Subcommand)]
enum What {
    /// Show the numbers of the relay that runs on the directory
    Stats,
    /// Check that a relay answers as devices use it
    Check {
        /// Its address, as devices are given it; the one that the relay printed last unless named
        url: Option<String>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_env("SYNC_RELAY_LOG").unwrap_or_else(|_| EnvFilter::new("warn,sync_relay=info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let mut config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    if let Some(bind) = args.bind {
        config.bind = bind;
    }
    if let Some(data) = args.data {
        config.data = data;
    }
    let what = args.what;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start")?;
    runtime.block_on(async {
        match what {
            Some(What::Stats) => {
                print!("{}", sync_relay::stats(&config.data).await?);
                return Ok(());
            }
            Some(What::Check { url }) => {
                return Ok(sync_relay::check(&config.data, url.as_deref(), |step| println!("{step}")).await?);
            }
            None => {}
        }
        // before anything else, so that no signal is missed
        let told = told_to_stop().context("cannot listen for signals")?;
        let server = Server::start(config).await?;
        println!("{}", server.url());
        tracing::info!(address = %server.address(), "relay runs");
        told.await;
        tracing::info!("relay stops");
        server.stop().await.context("the database was not closed in order; nothing is lost")
    })
}

/// Waits for what systems send to end a program.
#[cfg(unix)]
fn told_to_stop() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Waits for what systems send to end a program.
#[cfg(not(unix))]
fn told_to_stop() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async {
        // a console that cannot be listened to ends the program by itself
        let _ = tokio::signal::ctrl_c().await;
    })
}
