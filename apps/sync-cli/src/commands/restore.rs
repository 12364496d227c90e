//! `syncshell restore`: brings a kept version back.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use sync_client::folders::RestoreTo;

use crate::api::{RestoreRequest, Restored};
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;

/// Bring back what was kept of a file, the newest unless @VERSION names one that `versions` lists
///
/// What is in its place now is kept in turn.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file, whether or not it exists now; a name that itself ends like a version needs one
    #[arg(value_name = "PATH[@VERSION]")]
    path: PathBuf,

    /// Put it there, where nothing may be, instead of in its place
    #[arg(long, value_name = "DEST")]
    to: Option<PathBuf>,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let restored = self.restore(&backend).await;
        backend.close().await;
        let restored = restored?;
        out.result(format!("restored {}", restored.path.display()), &restored)
    }

    async fn restore(&self, backend: &Backend) -> Result<Restored, Failure> {
        let (path, version) = split(&self.path);
        let folders = backend.folders().await?.folders;
        let (folder, below) = select::inside(&folders, &path)?;
        let version = match version {
            Some(version) => version,
            None => {
                let newest =
                    backend.versions(&folder.id, &below).await?.versions.into_iter().next().map(|kept| kept.version);
                let nothing = || Failure::new("no-version", format!("nothing is kept of {}", path.display()));
                newest.ok_or_else(nothing)?
            }
        };
        let to = match &self.to {
            Some(to) => {
                let failed = Failure::io(format!("cannot use {}", to.display()));
                RestoreTo::Path(std::path::absolute(to).map_err(failed)?)
            }
            None => RestoreTo::Place,
        };
        backend.restore(&folder.id, RestoreRequest { path: below, version, to }).await
    }
}

/// A path, and the version named behind it: the first digits of a hash, or k and a number.
fn split(path: &Path) -> (PathBuf, Option<String>) {
    let is_hash = |text: &str| {
        (16..=64).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_number = |text: &str| text.strip_prefix('k').is_some_and(|number| number.parse::<u64>().is_ok());
    let named = path.file_name().and_then(OsStr::to_str).and_then(|name| {
        let (name, version) = name.rsplit_once('@')?;
        (is_hash(version) || is_number(version)).then(|| (path.with_file_name(name), version.to_owned()))
    });
    match named {
        Some((path, version)) => (path, Some(version)),
        None => (path.to_owned(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_what_follows_the_last_at() {
        for (text, path, version) in [
            ("a/b.txt", "a/b.txt", None),
            ("a/b.txt@0123abcd0123abcd", "a/b.txt", Some("0123abcd0123abcd")),
            ("a/b.txt@0123abcd", "a/b.txt@0123abcd", None),
            ("a@k1/b", "a@k1/b", None),
            ("a@k1@k2", "a@k1", Some("k2")),
            ("me@example.org", "me@example.org", None),
            ("a@3", "a@3", None),
            ("a@k", "a@k", None),
            ("a@0123ABCD0123ABCD", "a@0123ABCD0123ABCD", None),
        ] {
            assert_eq!(split(Path::new(text)), (PathBuf::from(path), version.map(str::to_owned)), "{text}");
        }
    }
}
