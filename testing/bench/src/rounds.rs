//! What measuring a log and a relay have in common: how often, how much, where, and how the figures are shown.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sync_soak::tree::beside_the_program;

use crate::figures::{Report, Row};
use crate::machine;

/// Part of the work that a quick run does.
const QUICK: usize = 10;
/// Rounds unless told otherwise.
const ROUNDS: u8 = 3;

/// How to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A tenth of the work, once: shows that it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Rounds, each with everything new; the table has the median
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=99))]
    rounds: Option<u8>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Where homes and databases are made, for the time of a round; beside the program unless named
    #[arg(long)]
    dir: Option<PathBuf>,
}

impl Args {
    /// By what the work is divided.
    pub(crate) fn share(&self) -> usize {
        if self.quick { QUICK } else { 1 }
    }

    /// Does every round in a directory of its own, and prints what the rows make of them.
    pub(crate) async fn measure<R>(
        &self,
        round: impl AsyncFn(&Path) -> Result<R>,
        rows: impl FnOnce(&[R]) -> Vec<Row>,
    ) -> Result<()> {
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => beside_the_program("bench")?,
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let rounds = self.rounds.unwrap_or(if self.quick { 1 } else { ROUNDS });
        let (mut loads, mut done) = (Vec::new(), Vec::new());
        for number in 1..=rounds {
            eprintln!("round {number} of {rounds}");
            loads.push(machine::load().unwrap_or(f64::NAN));
            let site = tempfile::Builder::new().prefix("round-").tempdir_in(&dir).context("cannot make a directory")?;
            done.push(round(site.path()).await?);
        }
        let report = Report {
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: machine::memory_mib(),
            load: loads,
            rows: rows(&done),
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report.json())?);
        } else {
            print!("{}", report.table());
        }
        Ok(())
    }
}
