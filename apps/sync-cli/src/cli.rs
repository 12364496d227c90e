//! The command line: its grammar, whose doc comments are its help.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use clap::{Args, Parser, Subcommand};
use sync_client::Network;
use sync_client::folders::Direction;
use sync_client::home::{Home, PassphraseSource, Prompt};
use zeroize::Zeroizing;

use crate::commands::{
    backup, demo, devices, folders, held, init, invite, join, leave, members, pair, pause, pull, push, relay, rescan,
    restore, run, select, share, status, unit, up, versions,
};
use crate::exit::Failure;
use crate::terminal;

/// Keeps folders and the state of apps in sync between devices, end to end encrypted, no account
#[derive(Debug, Parser)]
#[command(name = "syncshell", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What all commands take.
#[derive(Debug, Clone, Args)]
#[command(next_display_order = 100)]
pub(crate) struct Global {
    /// Directory of this device's key and data; the user's data directory unless named
    #[arg(long, global = true, value_name = "DIR", env = "SYNCSHELL_HOME", hide_env_values = true)]
    home: Option<PathBuf>,

    /// The group to work on, by the first digits of its id; needed where a home has several
    #[arg(long, global = true, value_name = "ID", value_parser = group_prefix)]
    pub(crate) group: Option<String>,

    /// File with the passphrase of a home that is protected by one
    #[arg(long, global = true, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,

    /// Write JSON for programs instead of text for people
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Log to standard error; twice for details, three times for every packet
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// What was typed for a new home, which is opened right after.
    #[arg(skip)]
    chosen: Arc<OnceLock<Zeroizing<String>>>,
}

/// The verbs, one module each.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Init(init::Args),
    Share(share::Args),
    Join(join::Args),
    Invite(invite::Args),
    Run(run::Args),
    Status(status::Args),
    Folders(folders::Args),
    Devices(devices::Args),
    Members(members::Members),
    Remove(members::Remove),
    Rotate(members::Rotate),
    Pause(pause::Pause),
    Resume(pause::Resume),
    Rescan(rescan::Args),
    Select(select::Args),
    Leave(leave::Args),
    Relay(relay::Args),
    Confirm(held::Confirm),
    Undo(held::Undo),
    Versions(versions::Args),
    Restore(restore::Args),
    Backup(backup::Backup),
    Recover(backup::Recover),
    Up(up::Up),
    Down(up::Down),
    Unit(unit::Args),
    Pair(pair::Args),
    Push(push::Args),
    Pull(pull::Args),
    Demo(demo::Args),
}

impl Global {
    /// The home's directory.
    pub(crate) fn home(&self) -> Result<PathBuf, Failure> {
        match &self.home {
            Some(home) => std::path::absolute(home).map_err(Failure::io(format!("cannot use {}", home.display()))),
            None => Home::default_path().map_err(|error| sync_client::ClientError::from(error).into()),
        }
    }

    /// The group as the local API takes it; empty for the only one.
    pub(crate) fn group(&self) -> &str {
        self.group.as_deref().unwrap_or_default()
    }

    /// Where the passphrase of the home comes from.
    pub(crate) fn passphrase(&self) -> PassphraseSource {
        let mut source = PassphraseSource::system();
        if let Some(file) = &self.passphrase_file {
            source = source.with_file(file);
        }
        if !terminal::is_there() {
            return source;
        }
        let chosen = Arc::clone(&self.chosen);
        source.with_prompt(move |prompt| match (prompt, chosen.get()) {
            (Prompt::Choose, _) => {
                let typed = terminal::ask_passphrase(prompt)?;
                Ok(chosen.get_or_init(|| typed).clone())
            }
            (Prompt::Enter, Some(typed)) => Ok(typed.clone()),
            (Prompt::Enter, None) => terminal::ask_passphrase(prompt),
        })
    }

    /// What another process that works on the home is given beside it.
    pub(crate) fn forwarded(&self) -> Result<Vec<std::ffi::OsString>, Failure> {
        let mut arguments = Vec::new();
        if let Some(file) = &self.passphrase_file {
            let file = std::path::absolute(file).map_err(Failure::io(format!("cannot use {}", file.display())))?;
            arguments.extend(["--passphrase-file".into(), file.into_os_string()]);
        }
        arguments.extend(std::iter::repeat_n("-v".into(), self.verbose.into()));
        Ok(arguments)
    }

    /// What a device is opened with.
    pub(crate) fn config(&self, online: bool) -> Result<sync_client::Config, Failure> {
        let network = Network { online, ..Network::from_env() };
        // for tests, which have no year
        let snapshot_after = std::env::var("SYNCSHELL_SNAPSHOT_AFTER").ok().and_then(|entries| entries.parse().ok());
        Ok(sync_client::Config { home: self.home()?, passphrase: self.passphrase(), network, snapshot_after })
    }
}

/// Which way changes of a folder go, as given by two flags.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Ways {
    /// Tell what is changed here, and take no changes of others
    #[arg(long, conflicts_with = "receive_only")]
    send_only: bool,

    /// Take changes of others, and tell none that are made here
    #[arg(long)]
    receive_only: bool,
}

impl Ways {
    pub(crate) fn direction(self) -> Direction {
        match self {
            Self { send_only: true, .. } => Direction::SendOnly,
            Self { receive_only: true, .. } => Direction::ReceiveOnly,
            Self { .. } => Direction::Both,
        }
    }
}

fn group_prefix(text: &str) -> Result<String, String> {
    let fits = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit());
    if fits { Ok(text.to_ascii_lowercase()) } else { Err("a group id is up to 64 hex digits".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_grammar_has_no_contradictions() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_group_is_named_by_hex_digits_only() {
        for (text, fits) in [("a", true), ("AB12", true), ("", false), ("xyz", false), ("a&limit=1", false)] {
            assert_eq!(group_prefix(text).is_ok(), fits, "{text:?}");
        }
        assert_eq!(group_prefix("AB").as_deref(), Ok("ab"));
    }
}
