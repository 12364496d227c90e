//! `syncshell versions`: lists what was kept of a path.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::BinaryBytes;
use sync_client::folders::KeptVersion;

use super::status::age;
use crate::api::Versions;
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::select;

/// List what was kept of a file when sync replaced or removed it, the newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file, whether or not it exists now
    path: PathBuf,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let versions = self.versions(&backend).await;
        backend.close().await;
        let versions = versions?;
        let lines: Vec<_> = versions.versions.iter().map(line).collect();
        let text =
            if lines.is_empty() { format!("nothing is kept of {}", self.path.display()) } else { lines.join("\n") };
        out.result(text, &versions)
    }

    async fn versions(&self, backend: &Backend) -> Result<Versions, Failure> {
        let folders = backend.folders().await?.folders;
        let (folder, below) = select::inside(&folders, &self.path)?;
        backend.versions(&folder.id, &below).await
    }
}

fn line(kept: &KeptVersion) -> String {
    let ago = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_millis(kept.at)).unwrap_or_default();
    let ago = age(u64::try_from(ago.as_millis()).unwrap_or(u64::MAX));
    format!("@{} {}, replaced {ago} ago", kept.version, BinaryBytes(kept.size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_by_what_restore_takes() {
        let kept = KeptVersion { version: 7, path: "a".into(), at: u64::MAX / 2, modified: 0, size: 2048, hash: None };
        assert_eq!(line(&kept), "@7 2.00 KiB, replaced 0 s ago");
    }
}
