//! `syncshell up` and `syncshell down`: keep a home in sync in the background.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::api::client::ApiClient;
use crate::backend::find_server;
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;

/// What the background process writes goes here, in the home.
const LOG_FILE: &str = "run.log";

/// Bytes of a log from which on a new one is begun; the one before is kept beside it.
const MAX_LOG: u64 = 8 << 20;

/// How long a home may take to be served: opening it waits for a slow disk, or for others to let go of it.
const STARTS_WITHIN: Duration = Duration::from_secs(60);

/// How long a process may take until it serves no more: it waits for requests under way.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// How long it may then take to close its database; what comes later waits for the home's lock.
const CLOSES_WITHIN: Duration = Duration::from_secs(5);

/// Time between two looks.
const POLL: Duration = Duration::from_millis(50);

/// Bytes from the end of the log that are looked at for why it ended.
const TAIL: u64 = 4096;

/// Keep this home in sync in the background
///
/// Starts `run`, which writes to run.log in the home, and ends once it serves; does nothing if it
/// is served already. The process ends with the machine: `syncshell unit` shows how to have it
/// started again.
#[derive(Debug, clap::Args)]
pub(crate) struct Up {
    #[command(flatten)]
    how: super::run::How,
}

/// End the process that serves this home
#[derive(Debug, clap::Args)]
pub(crate) struct Down {}

#[derive(Serialize)]
struct Served {
    served_by: Option<u32>,
    started: bool,
    log: PathBuf,
}

#[derive(Serialize)]
struct Stopped {
    stopped: bool,
}

impl Up {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let home = global.home()?;
        let log = home.join(LOG_FILE);
        let started = match find_server(global, &home).await? {
            Some(_) => false,
            None => {
                self.start(global, &home, &log).await?;
                true
            }
        };
        let Some(server) = find_server(global, &home).await? else {
            return Err(Failure::new("not-served", format!("the process has ended again; {} says why", log.display())));
        };
        let served_by = server.overview().await?.served_by;
        let pid = served_by.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
        let text = if started {
            format!("{pid} keeps {} in sync and writes to {}", home.display(), log.display())
        } else {
            format!("{pid} serves {} already", home.display())
        };
        out.result(text, &Served { served_by, started, log })
    }

    async fn start(&self, global: &Global, home: &Path, log: &Path) -> Result<(), Failure> {
        // a log in a directory that is no home would be all there is in it
        if !home.join("home.toml").is_file() {
            return Err(sync_client::ClientError::from(sync_client::home::HomeError::NotAHome {
                path: home.to_owned(),
            })
            .into());
        }
        let mut child = self.spawn(global, home, log)?;
        let give_up = Instant::now() + STARTS_WITHIN;
        while find_server(global, home).await?.is_none() {
            if child.try_wait().map_err(Failure::io("cannot watch the process"))?.is_some() {
                let said = last_line(log).unwrap_or_else(|| format!("{} may say why", log.display()));
                return Err(Failure::new("not-served", format!("the process ended before it served the home: {said}")));
            }
            if Instant::now() > give_up {
                // it would come to serve unseen
                let _ = child.kill();
                let _ = child.wait();
                let seconds = STARTS_WITHIN.as_secs();
                return Err(Failure::new(
                    "not-served",
                    format!("the process did not serve the home within {seconds} s"),
                ));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    fn spawn(&self, global: &Global, home: &Path, log: &Path) -> Result<Child, Failure> {
        let failed = || format!("cannot write {}", log.display());
        if log.metadata().is_ok_and(|metadata| metadata.len() > MAX_LOG) {
            std::fs::rename(log, log.with_extension("log.old")).map_err(Failure::io(failed()))?;
        }
        let mut options = File::options();
        options.create(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let output = options.open(log).map_err(Failure::io(failed()))?;
        let program = std::env::current_exe().map_err(Failure::io("cannot find this program"))?;
        let mut command = Command::new(program);
        command
            .arg("--home")
            .arg(home)
            .args(global.forwarded()?)
            .args(["run", "--detached"])
            .args(self.how.forwarded());
        command.stdin(Stdio::null()).stdout(output.try_clone().map_err(Failure::io(failed()))?).stderr(output);
        #[cfg(windows)]
        {
            use std::os::windows::process::CommandExt as _;

            /// No console, and none of the Ctrl-C of this one.
            const DETACHED: u32 = 0x0000_0008 | 0x0000_0200;
            command.creation_flags(DETACHED);
        }
        command.spawn().map_err(Failure::io("cannot start this program"))
    }
}

impl Down {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let home = global.home()?;
        let Some(server) = find_server(global, &home).await? else {
            return out.result(format!("nobody serves {}", home.display()), &Stopped { stopped: false });
        };
        let pid = server.overview().await?.served_by;
        stop(global, &home, &server, pid).await?;
        let what = pid.map_or_else(|| "the process".to_owned(), |pid| format!("process {pid}"));
        out.result(format!("{what} serves {} no longer", home.display()), &Stopped { stopped: true })
    }
}

async fn stop(global: &Global, home: &Path, server: &ApiClient, pid: Option<u32>) -> Result<(), Failure> {
    server.stop().await?;
    let give_up = Instant::now() + ENDS_WITHIN;
    while find_server(global, home).await?.is_some() {
        if Instant::now() > give_up {
            let message = format!("the process has not ended within {} s; end it yourself", ENDS_WITHIN.as_secs());
            return Err(Failure::new("busy", message));
        }
        tokio::time::sleep(POLL).await;
    }
    // it lets go of the home by itself; one that nobody reaps would be there for ever
    let give_up = Instant::now() + CLOSES_WITHIN;
    while pid.is_some_and(is_running) && Instant::now() < give_up {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Whether a process is there; where that cannot be told, its socket has to do.
fn is_running(pid: u32) -> bool {
    #[cfg(unix)]
    {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        pid.is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
    }
    #[cfg(not(unix))]
    {
        let _ = pid;
        false
    }
}

fn last_line(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .rfind(|line| !line.trim().is_empty())
        .map(|line| crate::terminal::clean(line.trim_start_matches("error: ")))
}
