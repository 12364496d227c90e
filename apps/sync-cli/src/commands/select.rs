//! `syncshell select`: chooses the paths of a folder that this device takes.

use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::live::left_out_in_words;
use crate::output::Output;
use crate::select;
use crate::terminal;

/// Choose which paths of a folder this device takes; what it leaves out stays where it is, and stops syncing here
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "syncshell select [OPTIONS] <FOLDER> <PATH>...\n       syncshell select [OPTIONS] <FOLDER> --all"
)]
pub(crate) struct Args {
    /// The folder: its path, name or the first digits of its id
    folder: String,

    #[command(flatten)]
    which: Which,
}

/// Some paths, or all.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// What to take, with all that is below it: paths as they are called in the folder, in place of those chosen before
    #[arg(value_name = "PATH")]
    paths: Vec<String>,

    /// Take everything again
    #[arg(long)]
    all: bool,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let selected = self.select(&backend).await;
        backend.close().await;
        let folder = selected?;
        let name = terminal::clean(&folder.name);
        let text = match left_out_in_words(&folder) {
            Some(left_out) => format!("{name}: {left_out}"),
            None => format!("{name}: everything is taken"),
        };
        out.result(text, &folder)
    }

    async fn select(&self, backend: &Backend) -> Result<sync_client::folders::FolderStatus, Failure> {
        let folders = backend.folders().await?.folders;
        let folder = select::find(&folders, &self.folder)?;
        backend.select(&folder.id, self.which.paths.clone()).await
    }
}
