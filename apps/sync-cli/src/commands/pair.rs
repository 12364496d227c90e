//! `syncshell pair`: makes an invite, joins by one, or takes one back.

use std::io::{self, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use zeroize::Zeroizing;

use crate::api::{Invite, Joined, Outcome};
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal;

/// Bytes of a code or link that are read from standard input: the longest link, with room.
const MAX_INVITE: u64 = 4096;

/// Let another device into the group, or get into the group of another
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["create", "join", "revoke"]))]
pub(crate) struct Args {
    /// Make an invite and show it until someone has joined or it has expired; Ctrl-C takes it back
    ///
    /// Makes the home's group if it has none, and serves the home meanwhile.
    #[arg(long)]
    create: bool,

    /// Join the group that a code or link invites to; read from standard input if left out or -
    #[arg(long, value_name = "CODE|LINK", num_args = 0..=1, default_missing_value = "-")]
    join: Option<String>,

    /// Take an invite back, named by its code, link or id; read from standard input if left out or -
    #[arg(long, value_name = "CODE|LINK|ID", num_args = 0..=1, default_missing_value = "-")]
    revoke: Option<String>,

    /// How long the invite lasts
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "create",
          value_parser = clap::value_parser!(u16).range(1..=600))]
    expires_in: u16,

    /// Show a QR code even where output is no terminal
    #[arg(long, requires = "create")]
    qr: bool,
}

#[derive(Serialize)]
struct Revoked {
    outcome: &'static str,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        if let Some(invite) = &self.join {
            let invite = stop.or(given_or_read(invite, "Code or link: ")).await?;
            let backend = stop.or(Backend::open(global, Mode::Online)).await?;
            let result = join(&backend, &invite, &mut stop, out).await;
            backend.close().await;
            return result;
        }
        if let Some(invite) = &self.revoke {
            let invite = stop.or(given_or_read(invite, "Code, link or id: ")).await?;
            let backend = stop.or(Backend::open(global, Mode::Offline)).await?;
            let result = backend.revoke(&invite).await;
            backend.close().await;
            result?;
            return out.result("the invite was taken back", &Revoked { outcome: "revoked" });
        }
        let backend = stop.or(Backend::open(global, Mode::Serve)).await?;
        let result = self.create(&backend, global.group(), &mut stop, out).await;
        backend.close().await;
        result
    }

    async fn create(&self, backend: &Backend, group: &str, stop: &mut Stop, out: Output) -> Result<(), Failure> {
        let invite = backend.invite(group, Some(Duration::from_secs(self.expires_in.into()))).await?;
        self.show(&invite, out)?;
        let outcome = tokio::select! {
            outcome = backend.outcome(&invite.id) => outcome?,
            () = stop.requested() => revoke(backend, &invite.id).await?,
            () = backend.quit() => revoke(backend, &invite.id).await?,
        };
        out.object(&outcome)?;
        match outcome {
            Outcome::Joined { name, author } => {
                let author = author.get(..8).unwrap_or(&author);
                out.text(format!("{} has joined as {author}", terminal::clean(&name)))
            }
            Outcome::Expired => Err(Failure::new(
                "invite-expired",
                "nobody joined in time; make a new invite with `syncshell pair --create`",
            )),
            Outcome::Revoked => Err(Failure::new("invite-revoked", "the invite was taken back; nobody has joined")),
        }
    }

    fn show(&self, invite: &Invite, out: Output) -> Result<(), Failure> {
        out.object(invite)?;
        if (self.qr || terminal::sees_output())
            && let Some(qr) = terminal::qr(&invite.link)
        {
            out.text(qr)?;
        }
        out.text(format!("code  {}\nlink  {}", invite.code, invite.link))?;
        out.note(format!(
            "Give one of them to the other device within {}: `syncshell pair --join`. Each admits one device.",
            in_words(time_left(invite.expires))
        ));
        Ok(())
    }
}

/// Takes an invite back, unless it has ended by itself just before.
async fn revoke(backend: &Backend, id: &str) -> Result<Outcome, Failure> {
    match backend.revoke(id).await {
        Ok(()) => Ok(Outcome::Revoked),
        Err(failure) if matches!(&*failure.code, "invite-used" | "invite-expired") => backend.outcome(id).await,
        Err(failure) => Err(failure),
    }
}

async fn join(backend: &Backend, invite: &str, stop: &mut Stop, out: Output) -> Result<(), Failure> {
    let group = tokio::select! {
        joined = backend.join(invite, |step| out.note(step)) => joined?,
        () = stop.requested() => {
            let message = "the join was broken off; repeat it, the same invite still holds for this device";
            return Err(Failure::new("interrupted", message));
        }
    };
    out.result(format!("joined group {group}"), &Joined { group: group.clone() })
}

/// A secret from the command line, or from standard input where other users cannot see it.
async fn given_or_read(given: &str, prompt: &'static str) -> Result<Zeroizing<String>, Failure> {
    if given != "-" {
        return Ok(Zeroizing::new(given.to_owned()));
    }
    let read = tokio::task::spawn_blocking(move || {
        use std::io::{BufRead as _, Read as _};

        if terminal::is_there() {
            write!(io::stderr(), "{prompt}")?;
        }
        let mut line = Zeroizing::new(String::new());
        io::stdin().lock().take(MAX_INVITE).read_line(&mut line)?;
        io::Result::Ok(line)
    });
    let line = read
        .await
        .map_err(|error| Failure::new("io", error.to_string()))?
        .map_err(Failure::io("cannot read standard input"))?;
    if line.trim().is_empty() {
        return Err(Failure::usage("standard input holds no code or link"));
    }
    Ok(Zeroizing::new(line.trim().to_owned()))
}

fn time_left(expires: u64) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_millis(expires).saturating_sub(now)
}

fn in_words(left: Duration) -> String {
    match left.as_millis().div_ceil(1000) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds => format!("{} minutes", seconds.div_ceil(60)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_told_in_round_words() {
        for (millis, expected) in [(0, "0 s"), (900, "1 s"), (119_000, "119 s"), (599_980, "10 minutes")] {
            assert_eq!(in_words(Duration::from_millis(millis)), expected);
        }
    }
}
