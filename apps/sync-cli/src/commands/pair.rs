//! `syncshell pair`: makes an invite, joins by one, or takes one back.

use std::io::{self, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use sync_client::folders::FolderStatus;
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
    #[arg(long, value_name = "CODE|LINK", num_args = 0..=1, default_missing_value = "-",
          conflicts_with_all = ["expires_in", "qr", "role"])]
    join: Option<String>,

    /// Take an invite back, named by its code, link or id; read from standard input if left out or -
    #[arg(long, value_name = "CODE|LINK|ID", num_args = 0..=1, default_missing_value = "-",
          conflicts_with_all = ["expires_in", "qr", "role"])]
    revoke: Option<String>,

    #[command(flatten)]
    offer: Offer,

    #[command(flatten)]
    at: At,
}

/// Relays where a code is found.
#[derive(Debug, clap::Args)]
pub(crate) struct At {
    /// Relay where the code is found, as both sides name it, beside those that the home or group uses
    #[arg(long = "relay", value_name = "URL")]
    pub(crate) relays: Vec<String>,
}

/// How an invite is made and shown.
#[derive(Debug, clap::Args)]
pub(crate) struct Offer {
    /// How long the invite lasts
    #[arg(long, value_name = "SECONDS", default_value_t = 600,
          value_parser = clap::value_parser!(u16).range(1..=600))]
    expires_in: u16,

    /// Show a QR code even where output is no terminal
    #[arg(long)]
    qr: bool,

    /// Let in a person of their own, who may do what this role may, instead of one more device of yours
    #[arg(long, value_parser = ["admin", "member", "read-only", "guest"])]
    role: Option<String>,
}

#[derive(Serialize)]
struct Invited<'a> {
    event: &'static str,
    #[serde(flatten)]
    invite: &'a Invite,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<&'a str>,
}

#[derive(Serialize)]
struct Ended<'a> {
    event: &'a str,
    #[serde(flatten)]
    outcome: &'a Outcome,
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
            let result = join(&backend, &invite, &self.at.relays, &mut stop, out).await;
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
        let result = self.offer.make(&backend, global.group(), &self.at.relays, None, &mut stop, out).await;
        backend.close().await;
        result
    }
}

impl Offer {
    /// Makes an invite, shows it, and waits until someone has joined by it; Ctrl-C takes it back.
    pub(crate) async fn make(
        &self,
        backend: &Backend,
        group: &str,
        relays: &[String],
        folder: Option<&FolderStatus>,
        stop: &mut Stop,
        out: Output,
    ) -> Result<(), Failure> {
        let invite = backend
            .invite(group, Some(Duration::from_secs(self.expires_in.into())), relays, self.role.as_deref())
            .await?;
        self.show(&invite, folder, out)?;
        let outcome = tokio::select! {
            outcome = backend.outcome(&invite.id) => outcome?,
            () = stop.requested() => revoke(backend, &invite.id).await?,
            () = backend.quit() => revoke(backend, &invite.id).await?,
        };
        let event = match outcome {
            Outcome::Joined { .. } => "joined",
            Outcome::Expired => "expired",
            Outcome::Revoked => "revoked",
        };
        out.object(&Ended { event, outcome: &outcome })?;
        let stays = if folder.is_some() { "; the folder stays shared" } else { "" };
        match outcome {
            Outcome::Joined { name, author } => {
                let author = author.get(..8).unwrap_or(&author);
                out.text(format!("{} has joined as {author}", terminal::clean(&name)))
            }
            Outcome::Expired => {
                let message = format!("nobody joined in time{stays}; make a new invite with `syncshell invite`");
                Err(Failure::new("invite-expired", message))
            }
            Outcome::Revoked => {
                Err(Failure::new("invite-revoked", format!("the invite was taken back; nobody has joined{stays}")))
            }
        }
    }

    fn show(&self, invite: &Invite, folder: Option<&FolderStatus>, out: Output) -> Result<(), Failure> {
        out.object(&Invited { event: "invited", invite, folder: folder.map(|folder| &*folder.id) })?;
        if (self.qr || terminal::sees_output())
            && let Some(qr) = terminal::qr(&invite.link)
        {
            out.text(qr)?;
        }
        out.text(format!("code  {}\nlink  {}", invite.code, invite.link))?;
        let how = if folder.is_some() { "syncshell join" } else { "syncshell pair --join" };
        out.note(format!(
            "Give one of them to the other device within {}: `{how}`. Each admits one device.",
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

async fn join(backend: &Backend, invite: &str, relays: &[String], stop: &mut Stop, out: Output) -> Result<(), Failure> {
    let Joined { group, already } = join_group(backend, invite, relays, stop, out).await?;
    if already {
        return Err(Failure::new("already-joined", format!("this home already belongs to group {group}")));
    }
    out.result(format!("joined group {group}"), &Joined { group: group.clone(), already })
}

/// Joins the group that a code or link invites to.
pub(crate) async fn join_group(
    backend: &Backend,
    invite: &str,
    relays: &[String],
    stop: &mut Stop,
    out: Output,
) -> Result<Joined, Failure> {
    tokio::select! {
        joined = backend.join(invite, relays, |step| out.note(step)) => joined,
        () = stop.requested() => {
            let message = "the join was broken off; repeat it, the same invite still holds for this device";
            Err(Failure::new("interrupted", message))
        }
    }
}

/// A secret from the command line, or from standard input where other users cannot see it.
pub(crate) async fn given_or_read(given: &str, prompt: &'static str) -> Result<Zeroizing<String>, Failure> {
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
