//! `syncshell relay`: through which relays devices reach each other that are not online together.

use clap::Subcommand;
use serde::Serialize;
use sync_client::ClientError;
use sync_client::home::Home;

use crate::api::HomeRelay;
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::terminal::clean;

/// Choose the relays where this home leaves what others get later
///
/// A relay keeps entries while the devices of a group are not online together, sealed: it can read
/// nothing of them. The contents of files come from devices alone. Anyone can run a relay with
/// `sync-relay`, which prints the address to give here. Whoever joins a group uses its relays too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Use a relay for every group of this home, or for the one that --group names
    Add {
        /// Its address, as `sync-relay` prints it
        url: String,
    },
    /// List the relays of this home, and how they are
    List,
    /// Use a relay no longer
    Remove {
        /// Its address
        url: String,
    },
    /// Have relays wake this device when something arrives for it while it is away, by an empty POST
    Wake {
        /// The https:// address that a push service gave for this device, as UnifiedPush does; `off` for none
        url: String,
    },
    /// Choose whether connections may begin at the public relays of n0 until a group names a relay
    Public {
        /// Whether they may, from the next time on that this home is served
        used: OnOff,
    },
}

/// A choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum OnOff {
    On,
    Off,
}

#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    relay: &'a str,
}

#[derive(Serialize)]
struct WakeLine<'a> {
    event: &'static str,
    wake: Option<&'a str>,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        if let What::Public { used } = self.what {
            return set_public(global, used, out);
        }
        let backend = Backend::open(global, Mode::Offline).await?;
        let result = self.what.run(&backend, global.group(), out).await;
        backend.close().await;
        result
    }
}

impl What {
    async fn run(&self, backend: &Backend, group: &str, out: Output) -> Result<(), Failure> {
        match self {
            Self::Add { url } => {
                backend.add_relay(group, url).await?;
                // the operator's token, if it has one, is nobody else's matter
                let shown = without_token(url);
                out.result(format!("added {shown}"), &Line { event: "added", relay: shown })?;
                if backend.is_local() {
                    out.note("It is used while `syncshell run` or `syncshell up` serves this home.");
                }
                Ok(())
            }
            Self::Remove { url } => {
                backend.remove_relay(group, url).await?;
                let shown = without_token(url);
                out.result(format!("removed {shown}"), &Line { event: "removed", relay: shown })
            }
            Self::Wake { url } => {
                let wake = Some(url.as_str()).filter(|url| *url != "off");
                backend.set_wake(wake).await?;
                let text = wake.map_or_else(
                    || "relays wake this device no longer".to_owned(),
                    |url| format!("relays wake this device at {}", clean(url)),
                );
                out.result(text, &WakeLine { event: "wake", wake })
            }
            // needs nobody who serves the home
            Self::Public { .. } => Ok(()),
            Self::List => {
                let mut relays = backend.relays().await?;
                relays.relays.retain(|relay| relay.group.as_deref().is_none_or(|id| id.starts_with(group)));
                let mut text = match &relays.relays[..] {
                    [] => "no relay; `syncshell relay add ADDRESS` uses one, `sync-relay` runs one".to_owned(),
                    some => some.iter().map(line).collect::<Vec<_>>().join("\n"),
                };
                if let Some(url) = &relays.wake {
                    text += &format!("\nthey wake this device at {}", clean(url));
                }
                out.result(text, &relays)
            }
        }
    }
}

fn set_public(global: &Global, used: OnOff, out: Output) -> Result<(), Failure> {
    Home::set_public_relays(global.home()?, used == OnOff::On).map_err(ClientError::from)?;
    let (event, text) = match used {
        OnOff::On => ("public-relays-on", "connections may begin at public relays until a group names a relay"),
        OnOff::Off => ("public-relays-off", "no connection begins at public relays"),
    };
    out.result(text, &serde_json::json!({ "event": event }))?;
    out.note("It counts from the next time on that this home is served.");
    Ok(())
}

fn without_token(url: &str) -> &str {
    let fragment = url.find('#').unwrap_or(url.len());
    let end = url[fragment..].find('.').map_or(url.len(), |dot| fragment + dot);
    &url[..end]
}

fn line(relay: &HomeRelay) -> String {
    let of = match &relay.group {
        Some(group) => format!("group {}", group.get(..8).unwrap_or(group)),
        None => "every group".to_owned(),
    };
    format!("{} for {of}", clean(&relay.url))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operators_token_is_not_shown() {
        for (url, shown) in [
            ("ws://relay.example:80/#KEY.TOKEN", "ws://relay.example:80/#KEY"),
            ("ws://relay.example:80/#KEY", "ws://relay.example:80/#KEY"),
            ("ws://127.0.0.1:80", "ws://127.0.0.1:80"),
        ] {
            assert_eq!(without_token(url), shown);
        }
    }
}
