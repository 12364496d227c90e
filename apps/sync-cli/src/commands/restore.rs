//! `syncshell restore`: brings a kept version back.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use sync_client::folders::{KeptVersion, RestoreTo};

use crate::api::{RestoreRequest, Restored};
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;

/// Bring back what was kept of a file, the newest unless @VERSION names one that `versions` lists
///
/// What is in its place now is kept in turn, and not meant by the newest.
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
            None => newest(backend.versions(&folder.id, &below).await?.versions, folder.path.join(&below)).await?,
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

/// The newest version that is another content than what is there now.
async fn newest(kept: Vec<KeptVersion>, path: PathBuf) -> Result<String, Failure> {
    let picking = tokio::task::spawn_blocking(move || {
        let there = content_of(&path, &kept);
        let nothing = match kept.is_empty() {
            true => format!("nothing is kept of {}", path.display()),
            false => format!("nothing is kept of {} but what is there now", path.display()),
        };
        let other = kept.into_iter().find(|kept| there.is_none() || kept.hash != there);
        other.map(|kept| kept.version).ok_or_else(|| Failure::new("no-version", nothing))
    });
    picking.await.unwrap_or_else(|error| Err(Failure::new("io", error.to_string())))
}

/// The hash of what is at a path, if its size says that it may be one of these.
fn content_of(path: &Path, kept: &[KeptVersion]) -> Option<String> {
    let found = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
    if !kept.iter().any(|kept| kept.size == found.len()) {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).ok()?).ok()?;
    Some(hasher.finalize().to_hex().to_string())
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

    #[tokio::test]
    async fn the_newest_version_is_another_content_than_what_is_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.txt");
        let kept = |texts: &[&str]| -> Vec<KeptVersion> {
            let version = |text: &&str| KeptVersion {
                version: format!("of {text}"),
                path: "a.txt".to_owned(),
                at: 0,
                modified: 0,
                size: text.len() as u64,
                hash: Some(blake3::hash(text.as_bytes()).to_hex().to_string()),
                here: true,
                devices: Vec::new(),
            };
            texts.iter().map(version).collect()
        };
        let pick = async |texts: &[&str]| newest(kept(texts), path.clone()).await.map_err(|failure| failure.message);
        assert_eq!(pick(&["one", "two"]).await.as_deref(), Ok("of one"), "nothing is there");
        std::fs::write(&path, "one").expect("written");
        assert_eq!(pick(&["one", "two"]).await.as_deref(), Ok("of two"));
        assert_eq!(pick(&["three", "one"]).await.as_deref(), Ok("of three"));
        assert!(pick(&["one"]).await.is_err_and(|message| message.ends_with("but what is there now")));
        assert!(pick(&[]).await.is_err_and(|message| message.starts_with("nothing is kept of")));
    }

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
