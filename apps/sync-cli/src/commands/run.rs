//! `syncshell run`: keeps a home in sync until it is told to stop.

use std::io::Read as _;

use serde::Serialize;

use crate::api::Overview;
use crate::backend::{Backend, Local, Mode, find_server};
use crate::cli::Global;
use crate::exit::Failure;
use crate::live;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal;

/// Keep this home in sync until Ctrl-C, and serve other commands on it
///
/// Shows what happens: at a terminal in a view that renews itself, elsewhere in lines every few
/// seconds while something changes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also end when standard input ends, for programs that start this one
    #[arg(long)]
    until_eof: bool,

    #[command(flatten)]
    how: How,

    /// Leave the terminal, for `up`
    #[arg(long, hide = true)]
    detached: bool,
}

/// What `run` and `up` take.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// Bytes a second that files may use each way, as in 500K or 2.5M; 0 for no limit
    #[arg(long, value_name = "RATE", value_parser = rate)]
    limit_rate: Option<u64>,

    /// Also serve the local API on this port of the loopback network, 0 for any free one
    ///
    /// Whoever asks there shows the token in the file `api-token` of the home.
    #[arg(long, value_name = "PORT")]
    api_port: Option<u16>,
}

impl How {
    /// The same as arguments.
    pub(super) fn forwarded(&self) -> Vec<String> {
        let rate = self.limit_rate.map(|rate| format!("--limit-rate={rate}"));
        rate.into_iter().chain(self.api_port.map(|port| format!("--api-port={port}"))).collect()
    }
}

#[derive(Serialize)]
struct Serving<'a> {
    event: &'static str,
    #[serde(flatten)]
    overview: &'a Overview,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        if self.detached {
            leave_terminal();
        }
        let mut stop = Stop::listen()?;
        let home = global.home()?;
        if let Some(server) = find_server(global, &home).await? {
            return Err(served_by(&server.overview().await?));
        }
        let opening = Local::open_with(global, &home, Mode::Serve, self.how.api_port);
        let local = match stop.or(opening).await {
            Err(failure) if failure.code == "busy" => {
                // it may have begun to serve while we waited, and says more about itself than its lock
                let Some(server) = find_server(global, &home).await? else { return Err(failure) };
                return Err(served_by(&server.overview().await?));
            }
            opened => opened?,
        };
        let backend = Backend::Local(local);
        let result = tokio::select! {
            result = self.serve(&backend, out) => result,
            () = stop.requested() => Ok(()),
            () = backend.quit() => Ok(()),
            () = end_of_input(), if self.until_eof => Ok(()),
        };
        backend.close().await;
        out.note("stopped");
        result
    }

    async fn serve(&self, backend: &Backend, out: Output) -> Result<(), Failure> {
        if let (Backend::Local(local), Some(rate)) = (backend, self.how.limit_rate) {
            local.service().limit_rate((rate > 0).then_some(rate)).await?;
        }
        // before the line that says so, so that whoever reads it misses nothing that follows
        let events = backend.events("").await?;
        let overview = backend.overview().await?;
        announce(&overview, out)?;
        live::narrate(events, &overview, out).await
    }
}

fn served_by(overview: &Overview) -> Failure {
    let pid = overview.served_by.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
    let message = format!(
        "the home {} is served by {pid} (version {}) already; commands on it go there, so nothing is missing",
        overview.home, overview.version
    );
    Failure::new("busy", message)
}

fn announce(overview: &Overview, out: Output) -> Result<(), Failure> {
    let (groups, folders) = (overview.groups.len(), overview.folders.len());
    let text = format!(
        "serving {} as {} with {groups} {} and {folders} {}",
        overview.home,
        terminal::clean(&overview.name),
        if groups == 1 { "group" } else { "groups" },
        if folders == 1 { "folder" } else { "folders" },
    );
    for warning in &overview.warnings {
        out.warn(terminal::clean(warning));
    }
    if groups == 0 {
        out.note("it has no group yet: `syncshell share FOLDER` makes one, `syncshell join CODE` joins one");
    }
    if let Some(api) = &overview.api {
        out.note(format!("the local API is on http://{api} too; its token is in `api-token` of the home"));
    }
    out.result(text, &Serving { event: "serving", overview })
}

/// Goes on when the terminal is closed; on Windows whoever starts this sees to it.
fn leave_terminal() {
    // fails only for the leader of a group of processes, which has no terminal to lose
    #[cfg(unix)]
    let _ = rustix::process::setsid();
}

/// Bytes a second.
fn rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text} is no rate; write it like 500K, 2.5M or 1G");
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (&text[..at], unit.to_ascii_uppercase()),
        _ => (text, 'B'),
    };
    let power = match unit {
        'B' => 0,
        'K' => 1,
        'M' => 2,
        'G' => 3,
        _ => return Err(wrong()),
    };
    // exact to a thousandth of the unit, in whole numbers throughout
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 3 {
        return Err(wrong());
    }
    let thousandths: u64 = format!("{whole}{fraction:0<3}").parse().map_err(|_| wrong())?;
    thousandths.checked_mul(1024_u64.pow(power)).map(|bytes| bytes / 1000).ok_or_else(wrong)
}

/// Waits for the end of standard input; a failing one has ended too.
async fn end_of_input() {
    let (ended, end) = tokio::sync::oneshot::channel();
    // a thread of its own: the runtime would wait for the read when it ends
    std::thread::spawn(move || {
        let mut ignored = [0; 1024];
        let mut input = std::io::stdin().lock();
        while input.read(&mut ignored).is_ok_and(|length| length > 0) {}
        let _ = ended.send(());
    });
    let _ = end.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_with_a_unit() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1000", Some(1000)),
            ("500K", Some(500 << 10)),
            ("2.5m", Some(5 << 19)),
            ("1G", Some(1 << 30)),
            ("", None),
            ("M", None),
            ("-1", None),
            ("1.2345M", None),
            ("1T", None),
            ("99999999999999999999G", None),
            ("1ä", None),
        ] {
            assert_eq!(rate(text).ok(), expected, "{text:?}");
        }
    }
}
