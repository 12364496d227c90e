//! `syncshell invite`: lets one more device in.

use super::pair::{At, Offer};
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;
use crate::signals::Stop;

/// Let one more device into the group of a folder, as `share` does for the first
///
/// Shows an invite until someone has joined by it or it has expired; Ctrl-C takes it back. The same
/// as `syncshell pair --create`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder: its path, name or the first digits of its id; not needed where there is one group
    folder: Option<String>,

    #[command(flatten)]
    offer: Offer,

    #[command(flatten)]
    at: At,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let backend = stop.or(Backend::open(global, Mode::Serve)).await?;
        let result = self.invite(&backend, global, &mut stop, out).await;
        backend.close().await;
        result
    }

    async fn invite(&self, backend: &Backend, global: &Global, stop: &mut Stop, out: Output) -> Result<(), Failure> {
        let mut folders = backend.folders().await?.folders;
        folders.retain(|folder| folder.group.starts_with(global.group()));
        let folder = match &self.folder {
            Some(what) => Some(select::find(&folders, what)?),
            None => None,
        };
        let group = folder.map_or(global.group(), |folder| &folder.group);
        self.offer.make(backend, group, &self.at.relays, folder, stop, out).await
    }
}
