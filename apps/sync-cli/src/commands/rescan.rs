//! `syncshell rescan`: looks at a whole folder now.

use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::live::{Rate, in_words};
use crate::output::Output;
use crate::select;
use crate::signals::Stop;

/// Look for changes in a whole folder now, and end once what was found is told
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder: its path, name or the first digits of its id
    folder: String,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let backend = stop.or(Backend::open(global, Mode::Online)).await?;
        let scanned = tokio::select! {
            scanned = self.rescan(&backend) => scanned,
            () = stop.requested() => {
                Err(Failure::new("interrupted", "broken off; what was found before is told"))
            }
        };
        backend.close().await;
        let folder = scanned?;
        let took = folder.scan_ms.map(|ms| format!("; read in {ms} ms")).unwrap_or_default();
        out.result(in_words(&folder, Rate::default()) + &took, &folder)
    }

    async fn rescan(&self, backend: &Backend) -> Result<sync_client::folders::FolderStatus, Failure> {
        let folders = backend.folders().await?.folders;
        backend.rescan(&select::find(&folders, &self.folder)?.id).await
    }
}
