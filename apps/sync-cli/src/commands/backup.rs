//! `syncshell backup` and `syncshell recover`: a device's places in its groups, taken along in one sealed file.

use std::path::{Path, PathBuf};

use getrandom::SysRng;
use rand_core::UnwrapErr;
use serde::Serialize;
use sync_client::ClientError;
use sync_client::home::{HomeError, KeyStoreKind};
use sync_crypto::make_recovery_key;
use zeroize::Zeroizing;

use super::init::{host_name, make_home, read_passphrase};
use super::share::absolute;
use crate::backend::{Backend, Local, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::terminal;

/// Write this device's places in its groups into a sealed file, so that they are not lost with it
///
/// The file is sealed under a passphrase that is asked for, or read from --backup-passphrase-file;
/// an empty answer or --recovery-key draws twelve words and shows them once. It is recovered once
/// into a database that is thrown away, and only then takes its name. What is in the groups is not
/// in it: whoever recovers gets that from the other devices. Make a new one after joining a group.
#[derive(Debug, clap::Args)]
pub(crate) struct Backup {
    /// Where to write it; an older backup there is replaced, anything else is not
    file: PathBuf,

    /// File with the passphrase to seal it under
    #[arg(long, value_name = "FILE", conflicts_with = "recovery_key")]
    backup_passphrase_file: Option<PathBuf>,

    /// Draw a recovery key and show it, instead of asking for a passphrase
    #[arg(long)]
    recovery_key: bool,
}

/// Take the places of a lost device in its groups again, from a file that `backup` wrote
///
/// Makes a home if there is none, as `init` does. Works beside the device that the backup is of, if
/// that turns up again: each writes under a name of its own. Who was removed since gets nothing new.
#[derive(Debug, clap::Args)]
pub(crate) struct Recover {
    /// The backup
    file: PathBuf,

    /// File with its passphrase or recovery key
    #[arg(long, value_name = "FILE")]
    backup_passphrase_file: Option<PathBuf>,

    /// Name by which others know this device; the host's name unless given
    #[arg(long)]
    name: Option<String>,

    /// Where to keep the key of a new home: keychain, passphrase or file
    #[arg(long, value_name = "STORE")]
    key_store: Option<KeyStoreKind>,
}

#[derive(Serialize)]
struct Written<'a> {
    event: &'static str,
    file: &'a Path,
    groups: &'a [String],
    bytes: u64,
    /// Only where it was drawn here: it is shown nowhere else and never again.
    #[serde(skip_serializing_if = "Option::is_none")]
    recovery_key: Option<&'a str>,
}

#[derive(Serialize)]
struct Taken<'a> {
    event: &'static str,
    of: &'a str,
    groups: &'a [String],
    here: &'a [String],
}

impl Backup {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let file = absolute(&self.file)?;
        let (passphrase, drawn) = self.passphrase()?;
        let backend = Backend::open(global, Mode::Offline).await?;
        let written = backend.back_up(&file, &passphrase).await;
        backend.close().await;
        let written = written?;
        let key = drawn.then(|| passphrase.as_str());
        let mut text = format!(
            "The places of this device in {} are in {}, {} bytes, and can be recovered from it.",
            count(written.groups.len()),
            file.display(),
            written.bytes
        );
        if let Some(key) = key {
            text += &format!("\nIts recovery key, which is shown this once: {key}");
        }
        let (groups, bytes) = (&written.groups[..], written.bytes);
        out.result(text, &Written { event: "backed-up", file: &file, groups, bytes, recovery_key: key })?;
        if drawn {
            out.note("Write it down and keep it apart from the file: whoever has both is a member of these groups.");
        }
        Ok(())
    }

    /// What to seal it under, and whether that was drawn.
    fn passphrase(&self) -> Result<(Zeroizing<String>, bool), Failure> {
        if let Some(file) = &self.backup_passphrase_file {
            return Ok((read_passphrase(file)?, false));
        }
        if !self.recovery_key {
            if !terminal::is_there() {
                let message = "a passphrase for the backup is needed and there is no terminal; name a file with \
                               `--backup-passphrase-file`, or have a key drawn with `--recovery-key`";
                return Err(Failure::usage(message));
            }
            let typed = terminal::ask_twice("Passphrase of the backup, empty for a recovery key to be drawn: ")
                .map_err(Failure::io("cannot ask for the passphrase of the backup"))?;
            if !typed.is_empty() {
                return Ok((typed, false));
            }
        }
        Ok((make_recovery_key(&mut UnwrapErr(SysRng)), true))
    }
}

impl Recover {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let file = absolute(&self.file)?;
        // first, so that a wrong name leaves no home behind
        std::fs::metadata(&file).map_err(Failure::io(format!("{} cannot be read", file.display())))?;
        let passphrase = self.passphrase()?;
        let home = global.home()?;
        self.make_missing_home(&home, global, out).await?;
        let local = Local::open(global, &home, Mode::Offline).await?;
        let recovered = local.service().recover(&file, &passphrase).await;
        local.close().await;
        let recovered = recovered?;
        let of = terminal::clean(&recovered.of);
        let mut text = format!("This home has the places of {of} in {}.", count(recovered.groups.len()));
        for group in &recovered.groups {
            text += &format!("\n{group}");
        }
        if !recovered.here.is_empty() {
            text += &format!("\nIt was in {} of the backup already.", count(recovered.here.len()));
        }
        let (groups, here) = (&recovered.groups[..], &recovered.here[..]);
        out.result(text, &Taken { event: "recovered", of: &recovered.of, groups, here })?;
        out.note(
            "`syncshell up` gets from other devices what is in them; `syncshell join GROUP FOLDER` places a folder.",
        );
        Ok(())
    }

    fn passphrase(&self) -> Result<Zeroizing<String>, Failure> {
        if let Some(file) = &self.backup_passphrase_file {
            return read_passphrase(file);
        }
        if !terminal::is_there() {
            let message = "the passphrase or recovery key of the backup is needed and there is no terminal; \
                           name a file with `--backup-passphrase-file`";
            return Err(Failure::usage(message));
        }
        terminal::ask_secret("Passphrase or recovery key of the backup: ")
            .map_err(Failure::io("cannot ask for the passphrase of the backup"))
    }

    async fn make_missing_home(&self, home: &Path, global: &Global, out: Output) -> Result<(), Failure> {
        let name = self.name.clone().unwrap_or_else(host_name);
        let made = make_home(home, &name, self.key_store, global.passphrase(), out).await;
        match made {
            Ok(_) => Ok(()),
            Err(ClientError::Home(HomeError::AlreadyExists { .. })) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn count(groups: usize) -> String {
    if groups == 1 { "1 group".to_owned() } else { format!("{groups} groups") }
}
