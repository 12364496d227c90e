//! `syncshell leave`: stops syncing a folder here.

use serde::Serialize;

use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;
use crate::terminal;

/// Stop syncing a folder on this device; its files stay, here and elsewhere
///
/// Asks first; where there is no terminal, --yes says so. What was changed here and has not reached
/// another device stays here alone.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder: its path, name or the first digits of its id
    folder: String,

    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

#[derive(Serialize)]
struct Left<'a> {
    folder: &'a str,
    path: &'a std::path::Path,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let result = self.leave(&backend, out).await;
        backend.close().await;
        result
    }

    async fn leave(&self, backend: &Backend, out: Output) -> Result<(), Failure> {
        let folders = backend.folders().await?.folders;
        let folder = select::find(&folders, &self.folder)?;
        if !self.yes {
            if !terminal::is_there() {
                return Err(Failure::usage("there is nobody to ask whether to leave the folder; `--yes` leaves it"));
            }
            let question = format!("Stop syncing {} in {}?", terminal::clean(&folder.name), folder.path.display());
            let asked = tokio::task::spawn_blocking(move || terminal::agrees(&question)).await;
            let agreed = asked.map_err(|error| Failure::new("io", error.to_string()))?;
            if !agreed.map_err(Failure::io("cannot ask"))? {
                return Err(Failure::new("interrupted", "nothing was changed"));
            }
        }
        backend.leave(&folder.id).await?;
        let text = format!("left {}; the files stay in {}", terminal::clean(&folder.name), folder.path.display());
        out.result(text, &Left { folder: &folder.id, path: &folder.path })
    }
}
