//! `syncshell confirm` and `syncshell undo`: what to do about a mass change that is held back.

use serde::Serialize;
use sync_client::folders::FolderStatus;

use crate::api::client::ApiClient;
use crate::backend::find_server;
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;
use crate::terminal;

/// Apply a change of very many files that is held back in a folder
///
/// Where a change by another device would delete or rewrite more than half of a folder, it waits
/// until someone says what is meant; `status` names it.
#[derive(Debug, clap::Args)]
pub(crate) struct Confirm {
    /// The folder: its path, name or the first digits of its id
    folder: String,
}

/// Take back a change of very many files that is held back: everyone gets what is here
#[derive(Debug, clap::Args)]
pub(crate) struct Undo {
    /// The folder: its path, name or the first digits of its id
    folder: String,
}

#[derive(Serialize)]
struct Line<'a> {
    folder: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    paths: Option<u64>,
}

impl Confirm {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let (server, folder) = held_in(global, &self.folder).await?;
        server.confirm(&folder.id).await?;
        let text = format!("the change of {} goes on", terminal::clean(&folder.name));
        out.result(text, &Line { folder: &folder.id, paths: None })
    }
}

impl Undo {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let (server, folder) = held_in(global, &self.folder).await?;
        let paths = server.undo(&folder.id).await?.paths;
        let text = format!("{paths} paths of {} stay as they are here", terminal::clean(&folder.name));
        out.result(text, &Line { folder: &folder.id, paths: Some(paths) })
    }
}

/// The folder, where it is served: only there is something held back.
async fn held_in(global: &Global, what: &str) -> Result<(ApiClient, FolderStatus), Failure> {
    let home = global.home()?;
    let Some(server) = find_server(global, &home).await? else {
        let message = "nobody serves this home, so nothing is held back; `syncshell up` serves it";
        return Err(Failure::new("not-served", message));
    };
    let folders = server.folders().await?.folders;
    let folder = select::find(&folders, what)?.clone();
    Ok((server, folder))
}
