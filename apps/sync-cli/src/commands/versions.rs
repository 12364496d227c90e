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
use crate::terminal::clean;

/// List what is kept of a file that sync replaced or removed, on this device and those that are connected, newest first
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
    let size = BinaryBytes(kept.size);
    let here = kept.here.then_some("here");
    let on: Vec<&str> = here.into_iter().chain(kept.devices.iter().map(String::as_str)).collect();
    format!("@{} {size}, replaced {ago} ago, kept {}", kept.version, clean(&on.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_by_what_restore_takes() {
        let kept = KeptVersion {
            version: "0123abcd".into(),
            path: "a".into(),
            at: u64::MAX / 2,
            modified: 0,
            size: 2048,
            hash: Some("0123abcd".repeat(8)),
            here: true,
            devices: vec!["laptop".into(), "\u{1b}[31m".into()],
        };
        assert_eq!(line(&kept), "@0123abcd 2.00 KiB, replaced 0 s ago, kept here, laptop, \u{fffd}[31m");
        let elsewhere = KeptVersion { here: false, devices: vec!["phone".into()], ..kept };
        assert_eq!(line(&elsewhere), "@0123abcd 2.00 KiB, replaced 0 s ago, kept phone");
    }
}
