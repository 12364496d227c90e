//! A device that was off while the tree changed many times and two others were on: how it comes back, and what the log
//! weighs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rusqlite::{Connection, OpenFlags};
use sync_soak::command::{Home, Program};
use sync_soak::tree;

use super::mib;
use super::table::{Table, Tool, Unit};
use crate::machine;

/// How long each step may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Time between two looks.
const POLL: Duration = Duration::from_millis(100);
/// Of so many files one changes in each round: fewer than half of all, so that nobody is asked whether it is meant.
const ONE_OF: usize = 3;

/// What of a home's log is in its database.
#[derive(Debug, Clone, Copy)]
struct Log {
    entries: u64,
    bytes: u64,
    dropped: u64,
    snapshots: u64,
    snapshot_bytes: u64,
}

impl Log {
    /// Reads it beside the process that serves the home.
    fn of(home: &Path) -> Result<Self> {
        let db = Connection::open_with_flags(home.join("sync.db"), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        db.busy_timeout(Duration::from_secs(5))?;
        let figure = |sql: &str| -> Result<u64> {
            let figure: i64 = db.query_row(sql, [], |row| row.get(0))?;
            u64::try_from(figure).context("a count below zero")
        };
        Ok(Self {
            entries: figure("SELECT count(*) FROM entries WHERE bytes IS NOT NULL")?,
            bytes: figure("SELECT coalesce(sum(length(bytes)), 0) FROM entries")?,
            dropped: figure("SELECT coalesce(sum(last - first + 1), 0) FROM dropped")?,
            snapshots: figure("SELECT count(*) FROM snapshots WHERE state = 2")?,
            snapshot_bytes: figure("SELECT coalesce(sum(length(bytes)), 0) FROM snapshot_chunks")?,
        })
    }
}

/// Makes a tree, changes it while one of three devices is off, and measures how that one comes back.
pub(super) fn run(site: &Path, command: Option<&Path>, quick: bool, table: &mut Table) -> Result<()> {
    let (files, changes) = if quick { (2_000, 20_000) } else { (15_000, 50_000) };
    let place = site.join("away");
    fs::create_dir(&place)?;
    let (source, target) = (place.join("source"), place.join("target"));
    fs::create_dir(&source)?;
    tree::make_small_files(&source, files, 3)?;
    let program = Program::find(command, place.join("run"))?;
    let (one, other) = (place.join("a"), place.join("b"));
    // what nobody else has stays in the log, so that there must be somebody else
    let third = place.join("third");
    let mut stays = Home::init(&program, one.clone(), "stays")?;
    let mut beside = Home::init(&program, place.join("c"), "stays too")?;
    let mut away = Home::init(&program, other.clone(), "away")?;
    stays.start()?;
    away.start()?;
    beside.start()?;
    let invitation = stays.share(&source)?;
    away.join(invitation.code(), &target)?;
    invitation.joined()?;
    let invitation = stays.invite()?;
    beside.join(invitation.code(), &third)?;
    invitation.joined()?;
    settle(&stays, &away, &source, &target)?;
    settle(&stays, &beside, &source, &third)?;
    away.stop()?;
    let before = Log::of(&other)?;

    let paths = paths(&source)?;
    let (mut changed, mut round) = (0, 0usize);
    while changed < changes {
        for path in paths.iter().step_by(ONE_OF).take(changes - changed) {
            fs::write(path, format!("{round} {}\n", path.display()))?;
            changed += 1;
        }
        round += 1;
        stays.rescan(&source)?;
    }
    let told = Log::of(&one)?;
    // every tenth of those goes, and one is made again
    let gone: Vec<&PathBuf> = paths.iter().step_by(ONE_OF).step_by(10).collect();
    for path in &gone {
        fs::remove_file(path)?;
    }
    stays.rescan(&source)?;
    let again = gone.first().context("a tree without files")?;
    fs::write(again, "made again")?;
    stays.rescan(&source)?;
    let start = Instant::now();
    let short = |log: &Log| log.snapshots > 0 && log.dropped > 0;
    while !short(&Log::of(&one)?) || !short(&Log::of(&place.join("c"))?) {
        ensure!(start.elapsed() < PATIENCE, "no snapshot was written, or nothing left the log");
        std::thread::sleep(POLL);
    }
    settle(&stays, &beside, &source, &third)?;
    let later = paths.get(1).context("a tree without files")?;
    fs::write(later, "after the snapshot")?;
    stays.rescan(&source)?;

    // what the device that was off has changed itself
    let below = paths.get(2).and_then(|path| path.strip_prefix(&source).ok()).context("a path of the tree")?;
    fs::write(target.join(below), "changed while off")?;
    machine::settle_disk();
    let start = Instant::now();
    away.start()?;
    settle(&stays, &away, &source, &target)?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(fs::read(source.join(below))? == b"changed while off", "the change made while off was lost");
    let back = Log::of(&other)?;
    let after = Log::of(&one)?;
    let line = format!("{changed} changes of {files} files while off, until back");
    table.add(&line, Unit::Seconds, Tool::Ours, seconds);
    for (line, bytes) in [
        ("  the log where it was on, when the last changes were told", told.bytes),
        ("  the log after, there", after.bytes),
        ("  the log after, where it was off", back.bytes),
        ("  the snapshot, as it is stored", back.snapshot_bytes),
    ] {
        table.add(line, Unit::Mebibytes, Tool::Ours, mib(bytes));
    }
    table.note(format!(
        "away: {} entries fetched, {} instead by the snapshot; on the other sides {} entries are in the log, {} were dropped",
        back.entries.saturating_sub(before.entries),
        back.dropped,
        after.entries,
        after.dropped,
    ));
    away.stop()?;
    beside.stop()?;
    stays.stop()?;
    tree::remove_own(&source)
}

/// Every file of a tree, in order.
fn paths(root: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    tree::walk(root, |_, path, metadata| {
        if metadata.is_file() {
            paths.push(path.to_owned());
        }
        Ok(())
    })?;
    paths.sort();
    Ok(paths)
}

/// Waits until both say that nothing is to be done and have the same tree.
fn settle(one: &Home, other: &Home, source: &Path, target: &Path) -> Result<()> {
    let start = Instant::now();
    let at_rest = |home: &Home| -> Result<bool> { Ok(home.folder()?.is_some_and(|folder| folder.is_up_to_date())) };
    loop {
        if at_rest(other)? && at_rest(one)? && tree::count(source)? == tree::count(target)? {
            let mut same = true;
            for path in paths(source)? {
                let below = path.strip_prefix(source)?;
                same &= fs::read(&path).ok() == fs::read(target.join(below)).ok();
            }
            if same {
                return Ok(());
            }
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "the trees do not become equal: {:?}, {:?}",
            one.folder()?,
            other.folder()?
        );
        std::thread::sleep(POLL);
    }
}
