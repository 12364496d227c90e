//! The folders' rows: first sync, an insert, a rename, a rescan, one save; ours and the peers' on the same trees.
//!
//! The real command runs as processes, as do Syncthing, rsync, `cp` and `find` (Debian's packages).
//! A first sync ends when both sides say that nothing is pending and the receiving tree has the entries and bytes of the
//! sending one.

mod away;
mod copy;
mod ours;
mod pair;
mod syncthing;
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use sync_soak::command::Program;
use sync_soak::tree;

use self::copy::Tools;
use self::pair::Pair;
use self::table::{Goal, Table, Tool, Unit};
use crate::figures::quantile;
use crate::machine;

/// Crates whose sources make the real source tree: some thousand files, about 60 MB.
const SOURCES: [&str; 6] = ["libc", "linux-raw-sys", "ring", "rustix", "tokio", "web-sys"];

/// Bytes inserted into the middle of the large file.
const INSERTED: u64 = 1024;

/// Rescans of which the table has the median.
const RESCANS: usize = 5;

/// Saves that Syncthing is timed for: each takes its watcher's second.
const SYNCTHING_SAVES: usize = 8;

/// Time between two rounds. Where ext4 has no journal, a file that was removed less than a minute ago slows down whoever
/// makes files near it several times over; so nothing of many files is removed within a round either.
const REST: Duration = Duration::from_secs(65);

/// How to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A small part of the work: shows that it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Only these rows
    #[arg(long, value_name = "ROW", value_enum)]
    only: Vec<Work>,
    /// Rounds, each with new homes; the table has the median
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=99))]
    rounds: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Measure ours alone
    #[arg(long)]
    alone: bool,
    /// Where trees and homes are made, for the time of a row; beside the program unless named
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The command; the one beside this program unless named
    #[arg(long, value_name = "FILE")]
    command: Option<PathBuf>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Work {
    /// First sync of a random file of 1 GiB
    File,
    /// 1 KiB inserted into the middle of that file
    Insert,
    /// First sync of a source tree of some thousand files
    Source,
    /// A small file saved, until it is on the other side
    Save,
    /// First sync of 100,000 small files
    Small,
    /// Rescan of those, unchanged; needs their first sync, which takes Syncthing minutes
    Rescan,
    /// Rename of a directory with 10,000 files
    Rename,
    /// A device that was off while a tree changed 50,000 times; ours alone
    Away,
}

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => tree::beside_the_program("bench")?,
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let wanted: BTreeSet<Work> = if args.only.is_empty() {
        Work::value_variants().iter().copied().collect()
    } else {
        args.only.iter().copied().collect()
    };
    let tools = Tools::find(args.alone);
    let mut table = Table::new();
    let ours = Program::find(args.command.as_deref(), dir.join("none"))?.version()?;
    table.note(format!("{ours}; {}", tools.versions()));
    for missing in tools.missing() {
        table.note(missing);
    }
    let mut failed = 0;
    for number in 1..=args.rounds {
        if number > 1 {
            machine::settle_disk();
            thread::sleep(REST);
        }
        eprintln!("round {number} of {}", args.rounds);
        let site = tempfile::Builder::new().prefix("folders-").tempdir_in(&dir).context("cannot make a directory")?;
        table.load(machine::load());
        let mut round =
            Round { args, site: site.path(), wanted: &wanted, tools: &tools, table: &mut table, places: 0, failed: 0 };
        round.large_file()?;
        round.sources()?;
        round.small_files()?;
        round.rename()?;
        round.away()?;
        failed += round.failed;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        print!("{}", table.text());
    }
    ensure!(failed == 0, "{failed} measurements failed");
    Ok(())
}

/// One round under way.
struct Round<'a> {
    args: &'a Args,
    site: &'a Path,
    wanted: &'a BTreeSet<Work>,
    tools: &'a Tools,
    table: &'a mut Table,
    /// Places given out. What was made in them stays until the round ends: see [`REST`].
    places: u32,
    /// Measurements that came to nothing.
    failed: u32,
}

impl Round<'_> {
    fn wants(&self, work: &[Work]) -> bool {
        work.iter().any(|work| self.wanted.contains(work))
    }

    /// Tools that keep two folders in sync, ours first.
    fn syncing(&self) -> Vec<Tool> {
        let syncthing = self.tools.syncthing.as_ref().map(|_| Tool::Syncthing);
        std::iter::once(Tool::Ours).chain(syncthing).collect()
    }

    /// A place where nothing is yet.
    fn new_place(&mut self, name: &str) -> PathBuf {
        self.places += 1;
        self.site.join(format!("{name}-{}", self.places))
    }

    /// Two devices of a tool that are ready to share.
    fn pair(&mut self, tool: Tool) -> Result<Box<dyn Pair>> {
        let place = self.new_place("pair");
        fs::create_dir(&place)?;
        Ok(match tool {
            Tool::Syncthing => Box::new(syncthing::Instances::start(&place)?),
            _ => Box::new(ours::Homes::start(&place, self.args.command.as_deref())?),
        })
    }

    /// Measures two devices of each tool; what fails is said, and the others are measured all the same.
    fn each(
        &mut self,
        title: &str,
        source: &Path,
        mut measure: impl FnMut(&mut Self, &mut dyn Pair, &Path) -> Result<()>,
    ) -> Result<()> {
        for tool in self.syncing() {
            eprintln!("  {title}: {}", tool.name());
            let target = self.new_place("target");
            fs::create_dir(&target)?;
            machine::settle_disk();
            let mut measured = || {
                let mut pair = self.pair(tool)?;
                measure(self, &mut *pair, &target)?;
                pair.close()
            };
            if let Err(error) = measured() {
                self.failed += 1;
                self.table.note(format!("{} failed at {title}: {error:#}", tool.name()));
            }
            tree::remove_own(source)?;
        }
        Ok(())
    }

    /// The first sync of a tree by every tool; `then` goes on with each pair and the receiving tree.
    fn first_sync(
        &mut self,
        work: Work,
        title: &str,
        source: &Path,
        mut then: impl FnMut(&mut Self, &mut dyn Pair, &Path) -> Result<()>,
    ) -> Result<()> {
        let shown = self.wanted.contains(&work);
        let expected = tree::count(source)?;
        let title = format!("first sync, {title}, {} files, {:.0} MB", expected.files, expected.bytes as f64 / 1e6);
        let memory = |side: &str| format!("  most memory of the {side}, {}", short(work));
        self.each(&title, source, |round, pair, target| {
            let took = pair::first_sync(pair, source, target, expected)?;
            if shown {
                round.show(work, &title, pair, &took);
            }
            then(round, pair, target)
        })?;
        if !shown {
            return Ok(());
        }
        let copies = self.new_place("copies");
        for (tool, seconds) in self.tools.copy(source, &copies)? {
            self.table.add(&title, Unit::Seconds, tool, seconds);
        }
        for goal in goals(work) {
            let (limit, against, lines) = match goal {
                First::Time(limit, tool) => (limit, Some(tool), vec![title.clone()]),
                First::Memory(limit) => (limit, None, vec![memory("sender"), memory("receiver")]),
            };
            for line in lines {
                self.table.goal(Goal { line, limit, against });
            }
        }
        Ok(())
    }

    /// What a first sync took.
    fn show(&mut self, work: Work, title: &str, pair: &dyn Pair, took: &pair::Took) {
        let (tool, tree) = (pair.tool(), short(work));
        self.table.add(title, Unit::Seconds, tool, took.seconds);
        if let Some(joined) = took.joined {
            self.table.add(&format!("  until joined, {tree}"), Unit::Seconds, tool, joined);
        }
        let usage = pair.usage();
        for (side, usage) in ["sender", "receiver"].into_iter().zip(usage) {
            if let Some(memory) = usage.memory_mib {
                self.table.add(&format!("  most memory of the {side}, {tree}"), Unit::Mebibytes, tool, memory);
            }
        }
        if let [Some(one), Some(other)] = usage.map(|usage| usage.cpu_seconds) {
            self.table.add(&format!("  processor time of both, {tree}"), Unit::Seconds, tool, one + other);
        }
    }

    fn large_file(&mut self) -> Result<()> {
        if !self.wants(&[Work::File, Work::Insert]) {
            return Ok(());
        }
        let size: u64 = if self.args.quick { 64 << 20 } else { 1 << 30 };
        let source = self.site.join("file");
        let (original, inserted) = (self.site.join("original"), self.site.join("inserted"));
        let file = source.join("random");
        fs::create_dir(&source)?;
        tree::make_random_file(&file, size, 1)?;
        let inserts = self.wants(&[Work::Insert]);
        if inserts {
            fs::copy(&file, &original)?;
            copy::insert(&original, &inserted, size / 2, INSERTED)?;
        }
        self.first_sync(Work::File, "random file", &source, |round, pair, target| {
            if !inserts {
                return Ok(());
            }
            // every tool gets the same bytes, renamed into place as an editor does
            let ready = round.site.join("ready");
            fs::copy(&inserted, &ready)?;
            machine::settle_disk();
            let before = pair.received_bytes()?;
            let arriving = target.join("random");
            let arrived = || Ok(fs::metadata(&arriving).is_ok_and(|found| found.len() == size + INSERTED));
            let seconds = pair::until("the insert", || Ok(fs::rename(&ready, &file)?), arrived);
            let same = seconds.and_then(|seconds| pair::ensure_same(&file, &arriving).map(|()| seconds));
            // the next tool begins with the original, whatever became of this one
            fs::copy(&original, &file)?;
            let (seconds, received) = (same?, pair.received_bytes()?.saturating_sub(before));
            let line = format!("1 KiB into the middle of {} MiB, received", size >> 20);
            round.table.add(&line, Unit::Mebibytes, pair.tool(), mib(received));
            round.table.goal(Goal { line, limit: 6.0, against: None });
            round.table.add("  the insert, until it has arrived", Unit::Seconds, pair.tool(), seconds);
            Ok(())
        })?;
        // few files, but many bytes
        for entry in fs::read_dir(self.site)? {
            let path = entry?.path();
            if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
        Ok(())
    }

    fn sources(&mut self) -> Result<()> {
        if !self.wants(&[Work::Source, Work::Save]) {
            return Ok(());
        }
        let source = self.site.join("source");
        tree::copy_sources(&SOURCES, &source)?;
        let saves = if self.args.quick { 20 } else { 100 };
        self.first_sync(Work::Source, "source tree", &source, |round, pair, target| {
            if !round.wants(&[Work::Save]) {
                return Ok(());
            }
            let count = if pair.tool() == Tool::Ours { saves } else { SYNCTHING_SAVES };
            let took = pair::saves(&source, target, count);
            fs::remove_file(source.join(pair::SAVED))?;
            let took = took?;
            for (line, percent, limit) in
                [("one small save until it has arrived, median", 50, 60.0), ("  the same save, p99", 99, 250.0)]
            {
                round.table.add(line, Unit::Milliseconds, pair.tool(), quantile(&took, percent));
                round.table.goal(Goal { line: line.to_owned(), limit, against: None });
            }
            Ok(())
        })
    }

    fn small_files(&mut self) -> Result<()> {
        if !self.wants(&[Work::Small, Work::Rescan]) {
            return Ok(());
        }
        let files = if self.args.quick { 5_000 } else { 100_000 };
        let source = self.site.join("small");
        fs::create_dir(&source)?;
        tree::make_small_files(&source, files, 1)?;
        let line = format!("rescan of {files} unchanged files");
        self.first_sync(Work::Small, "small files", &source, |round, pair, _| {
            if !round.wants(&[Work::Rescan]) {
                return Ok(());
            }
            let (mut took, mut scans, mut found) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..RESCANS {
                let rescan = pair.rescan(&source)?;
                took.push(rescan.seconds);
                scans.extend(rescan.scan_seconds);
                if pair.tool() == Tool::Ours {
                    found.extend(copy::find(&source)?);
                }
            }
            for (line, tool, figures) in [
                (line.as_str(), pair.tool(), took),
                ("  the scan alone, as it says itself", pair.tool(), scans),
                (line.as_str(), Tool::Find, found),
            ] {
                if !figures.is_empty() {
                    round.table.add(line, Unit::Seconds, tool, quantile(&figures, 50));
                }
            }
            round.table.goal(Goal { line: line.clone(), limit: 2.0, against: Some(Tool::Find) });
            Ok(())
        })
    }

    fn away(&mut self) -> Result<()> {
        if !self.wants(&[Work::Away]) {
            return Ok(());
        }
        eprintln!("  a device that was off");
        machine::settle_disk();
        if let Err(error) = away::run(self.site, self.args.command.as_deref(), self.args.quick, self.table) {
            self.failed += 1;
            self.table.note(format!("ours failed at a device that was off: {error:#}"));
        }
        Ok(())
    }

    fn rename(&mut self) -> Result<()> {
        if !self.wants(&[Work::Rename]) {
            return Ok(());
        }
        let files = if self.args.quick { 1_000 } else { 10_000 };
        let source = self.site.join("rename");
        let (old, new) = (source.join("old"), source.join("new"));
        fs::create_dir_all(&old)?;
        tree::make_small_files(&old, files, 2)?;
        let expected = tree::count(&source)?;
        let line = format!("rename of a directory with {files} files");
        self.each(&line, &source, |round, pair, target| {
            pair::first_sync(pair, &source, target, expected)?;
            machine::settle_disk();
            let before = pair.received_bytes()?;
            let arrived = || {
                let moved = !target.join("old").exists() && target.join("new").exists();
                Ok(moved && tree::count(target)? == expected)
            };
            let seconds = pair::until("the rename", || Ok(fs::rename(&old, &new)?), arrived);
            fs::rename(&new, &old)?;
            let (seconds, received) = (seconds?, pair.received_bytes()?.saturating_sub(before));
            round.table.add(&line, Unit::Seconds, pair.tool(), seconds);
            round.table.add("  the rename, received", Unit::Mebibytes, pair.tool(), mib(received));
            Ok(())
        })
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What a first sync must be.
enum First {
    /// At most this many times another tool's time.
    Time(f64, Tool),
    /// At most this much memory in MiB, each side.
    Memory(f64),
}

fn goals(work: Work) -> Vec<First> {
    match work {
        Work::File => vec![First::Time(0.75, Tool::Syncthing), First::Time(1.3, Tool::Cp), First::Memory(100.0)],
        Work::Source => vec![First::Time(0.35, Tool::Syncthing), First::Time(1.3, Tool::Rsync)],
        Work::Small => vec![First::Time(0.2, Tool::Syncthing), First::Time(1.5, Tool::Rsync), First::Memory(150.0)],
        Work::Insert | Work::Save | Work::Rescan | Work::Rename | Work::Away => Vec::new(),
    }
}

/// The tree, where a title would be too long.
fn short(work: Work) -> &'static str {
    match work {
        Work::File => "large file",
        Work::Source => "source tree",
        _ => "small files",
    }
}
