//! `syncshell folders`: lists the folders that are synced here.

use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::live::{Rate, in_words};
use crate::output::Output;

/// List the folders that are synced here, and what they do
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let folders = backend.folders().await;
        backend.close().await;
        let mut folders = folders?;
        folders.folders.retain(|folder| folder.group.starts_with(global.group()));
        let lines = folders.folders.iter().map(|folder| {
            let id = folder.id.get(..8).unwrap_or(&folder.id);
            format!("{id} {} in {}", in_words(folder, Rate::default()), folder.path.display())
        });
        let text = match lines.collect::<Vec<_>>().join("\n") {
            none if none.is_empty() => {
                "no folder yet; `syncshell share FOLDER` shares one, `syncshell join CODE` joins one".to_owned()
            }
            lines => lines,
        };
        out.result(text, &folders)
    }
}
