//! Two homes of the real command.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use sync_soak::command::{Folder, Home, Program};
use sync_soak::tree::Counts;

use super::pair::{Pair, Rescan};
use super::table::Tool;
use crate::machine::Usage;

/// A home that shares and one that joins, both served.
#[derive(Debug)]
pub(crate) struct Homes {
    sender: Home,
    receiver: Home,
}

impl Homes {
    /// Makes and serves them.
    pub(crate) fn start(site: &Path, command: Option<&Path>) -> Result<Self> {
        let program = Program::find(command, site.join("run"))?;
        let mut sender = Home::init(&program, site.join("a"), "sender")?;
        let mut receiver = Home::init(&program, site.join("b"), "receiver")?;
        sender.start()?;
        receiver.start()?;
        Ok(Self { sender, receiver })
    }

    fn folder(home: &Home) -> Result<Folder> {
        home.folder()?.context("a home has no folder")
    }
}

impl Pair for Homes {
    fn tool(&self) -> Tool {
        Tool::Ours
    }

    fn share(&mut self, source: &Path, target: &Path) -> Result<Option<f64>> {
        let start = Instant::now();
        let invitation = self.sender.share(source)?;
        self.receiver.join(invitation.code(), target)?;
        let joined = start.elapsed().as_secs_f64();
        invitation.joined()?;
        Ok(Some(joined))
    }

    fn is_settled(&mut self, expected: Counts) -> Result<bool> {
        let receiver = Self::folder(&self.receiver)?;
        if !receiver.is_up_to_date() || receiver.files < expected.entries {
            return Ok(false);
        }
        Ok(Self::folder(&self.sender)?.is_up_to_date())
    }

    fn received_bytes(&mut self) -> Result<u64> {
        Ok(Self::folder(&self.receiver)?.fetched_bytes)
    }

    fn rescan(&mut self, source: &Path) -> Result<Rescan> {
        let start = Instant::now();
        self.sender.rescan(source)?;
        let seconds = start.elapsed().as_secs_f64();
        let scan_seconds = Self::folder(&self.sender)?.scan_ms.map(|ms| ms as f64 / 1000.0);
        Ok(Rescan { seconds, scan_seconds })
    }

    fn usage(&self) -> [Usage; 2] {
        [&self.sender, &self.receiver].map(|home| home.pid().map(Usage::of).unwrap_or_default())
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        self.sender.stop()?;
        self.receiver.stop()
    }
}
