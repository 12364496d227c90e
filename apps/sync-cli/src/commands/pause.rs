//! `syncshell pause` and `syncshell resume`: stop a folder and let it go on.

use serde::Serialize;

use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;
use crate::terminal;

/// Stop syncing a folder until it is resumed, also across restarts
#[derive(Debug, clap::Args)]
pub(crate) struct Pause {
    #[command(flatten)]
    which: Which,
}

/// Go on syncing a folder that was paused
#[derive(Debug, clap::Args)]
pub(crate) struct Resume {
    #[command(flatten)]
    which: Which,
}

/// One folder, or all.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The folder: its path, name or the first digits of its id
    folder: Option<String>,

    /// Every folder of the home, or of --group
    #[arg(long)]
    all: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    folder: &'a str,
    paused: bool,
}

impl Pause {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        self.which.set(true, global, out).await
    }
}

impl Resume {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        self.which.set(false, global, out).await
    }
}

impl Which {
    async fn set(&self, paused: bool, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let result = self.set_each(&backend, paused, global.group(), out).await;
        backend.close().await;
        result
    }

    async fn set_each(&self, backend: &Backend, paused: bool, group: &str, out: Output) -> Result<(), Failure> {
        let folders = backend.folders().await?.folders;
        let which: Vec<_> = match &self.folder {
            Some(what) => vec![select::find(&folders, what)?],
            None => folders.iter().filter(|folder| folder.group.starts_with(group)).collect(),
        };
        for folder in which {
            backend.pause(&folder.id, paused).await?;
            let verb = if paused { "paused" } else { "resumed" };
            out.result(format!("{verb} {}", terminal::clean(&folder.name)), &Line { folder: &folder.id, paused })?;
        }
        Ok(())
    }
}
