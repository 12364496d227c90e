//! `syncshell share`: makes a directory a folder, and invites someone to it.

use std::path::PathBuf;

use serde::Serialize;
use sync_client::folders::FolderStatus;

use super::pair::{At, Offer};
use crate::api::PlaceRequest;
use crate::backend::{Backend, Mode};
use crate::cli::{Global, Ways};
use crate::exit::Failure;
use crate::live;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal;

/// Sync a directory with other devices, and invite the first one
///
/// The folder gets a group of its own unless --group names one. Then an invite is shown until
/// someone has joined by it, as `syncshell invite` does later. If nobody else serves the home, this
/// goes on to keep the folder in sync until Ctrl-C.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory
    folder: PathBuf,

    /// What others see it called; the directory's name unless given
    #[arg(long)]
    name: Option<String>,

    #[command(flatten)]
    ways: Ways,

    /// Invite nobody: share it, and end
    #[arg(long, conflicts_with_all = ["expires_in", "qr"])]
    no_invite: bool,

    #[command(flatten)]
    offer: Offer,

    #[command(flatten)]
    at: At,
}

/// A folder that is synced here from now on.
#[derive(Serialize)]
pub(super) struct Placed<'a> {
    event: &'static str,
    folder: &'a str,
    group: &'a str,
    name: &'a str,
    path: &'a std::path::Path,
}

impl<'a> Placed<'a> {
    pub(super) fn new(event: &'static str, folder: &'a FolderStatus) -> Self {
        Self { event, folder: &folder.id, group: &folder.group, name: &folder.name, path: &folder.path }
    }
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let mode = if self.no_invite { Mode::Online } else { Mode::Serve };
        let backend = stop.or(Backend::open(global, mode)).await?;
        let result = self.share(&backend, global, &mut stop, out).await;
        backend.close().await;
        result
    }

    async fn share(&self, backend: &Backend, global: &Global, stop: &mut Stop, out: Output) -> Result<(), Failure> {
        let request =
            PlaceRequest { path: absolute(&self.folder)?, name: self.name.clone(), direction: self.ways.direction() };
        let folder = backend.share(global.group(), request).await?;
        let text = format!("shared {} as {}", folder.path.display(), terminal::clean(&folder.name));
        if self.no_invite {
            out.result(text, &Placed::new("shared", &folder))?;
            out.note(if backend.is_local() {
                "It syncs while `syncshell run` or `syncshell up` serves this home; `syncshell invite` lets others in."
            } else {
                "`syncshell invite` lets others in."
            });
            return Ok(());
        }
        out.text(text)?;
        self.offer.make(backend, &folder.group, &self.at.relays, Some(&folder), stop, out).await?;
        if backend.is_local() {
            out.note("keeping it in sync until Ctrl-C; `syncshell up` does so in the background");
            live::watch(backend, stop, out).await?;
        }
        Ok(())
    }
}

/// A directory's path that means the same to every process; without links where it exists.
pub(super) fn absolute(path: &std::path::Path) -> Result<PathBuf, Failure> {
    std::fs::canonicalize(path)
        .or_else(|_| std::path::absolute(path))
        .map_err(Failure::io(format!("cannot use {}", path.display())))
}
