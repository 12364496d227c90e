//! Two devices that keep a folder in sync, whoever made them, and what is done to them.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sync_soak::random::Draw;
use sync_soak::tree::{self, Counts};

use super::table::Tool;
use crate::machine::Usage;

/// How long a first sync may take: several times what the slowest tool needs for the largest tree.
const FIRST_PATIENCE: Duration = Duration::from_secs(1800);

/// How long a change may take to arrive, of which each tool writes a fraction of a tree.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long one save may take.
const SAVE_PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks for a saved file.
const SAVE_POLL: Duration = Duration::from_micros(500);

/// The least time between two looks at anything else, and the most.
const POLL: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// The file that is saved.
pub(crate) const SAVED: &str = "saved.txt";

/// Two devices of one tool.
pub(crate) trait Pair {
    /// Whose they are.
    fn tool(&self) -> Tool;

    /// Shares a directory with the other device, and has that put it into another directory.
    /// Seconds until the other device was let in, if that is part of it.
    fn share(&mut self, source: &Path, target: &Path) -> Result<Option<f64>>;

    /// Whether both say that nothing is pending, the receiver with as many entries as expected.
    fn is_settled(&mut self, expected: Counts) -> Result<bool>;

    /// Bytes that the receiver has got from the sender.
    fn received_bytes(&mut self) -> Result<u64>;

    /// Walks the sender's tree, and waits for the end.
    fn rescan(&mut self, source: &Path) -> Result<Rescan>;

    /// What the sender and the receiver have used.
    fn usage(&self) -> [Usage; 2];

    /// Ends both in order.
    fn close(self: Box<Self>) -> Result<()>;
}

/// A walk of an unchanged tree.
#[derive(Debug)]
pub(crate) struct Rescan {
    /// From asking for it to the answer.
    pub(crate) seconds: f64,
    /// The scan alone, if that is told.
    pub(crate) scan_seconds: Option<f64>,
}

/// A first sync.
#[derive(Debug)]
pub(crate) struct Took {
    /// From sharing to both at rest.
    pub(crate) seconds: f64,
    /// Of that, until the other device was let in.
    pub(crate) joined: Option<f64>,
}

/// Shares a directory, waits until both are at rest, and compares.
pub(crate) fn first_sync(pair: &mut dyn Pair, source: &Path, target: &Path, expected: Counts) -> Result<Took> {
    let start = Instant::now();
    let joined = pair.share(source, target)?;
    wait(start, FIRST_PATIENCE, "the first sync", || pair.is_settled(expected))?;
    let seconds = start.elapsed().as_secs_f64();
    let (sent, got) = (tree::count(source)?, tree::count(target)?);
    ensure!(sent == expected, "{} changed the sending tree from {expected:?} to {sent:?}", pair.tool().name());
    ensure!(got == expected, "{} says it is done, with {got:?} instead of {expected:?}", pair.tool().name());
    Ok(Took { seconds, joined })
}

/// Seconds from a change on one side until it has come about on the other.
pub(crate) fn until(
    what: &str,
    change: impl FnOnce() -> Result<()>,
    arrived: impl Fn() -> Result<bool>,
) -> Result<f64> {
    let start = Instant::now();
    change()?;
    wait(start, PATIENCE, what, arrived)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Waits for something that began at `start`, looking the rarer the longer it takes: the figure is off by 2 % at most.
fn wait(start: Instant, limit: Duration, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    while !done()? {
        let passed = start.elapsed();
        ensure!(passed < limit, "{what} is not done after {} s", limit.as_secs());
        thread::sleep((passed / 50).clamp(POLL[0], POLL[1]));
    }
    Ok(())
}

/// Milliseconds of each save, at random moments, until the other side has it.
pub(crate) fn saves(source: &Path, target: &Path, count: usize) -> Result<Vec<f64>> {
    let mut draw = Draw::new(1, "saves");
    let (here, there) = (source.join(SAVED), target.join(SAVED));
    let mut took = Vec::new();
    for number in 0..=count {
        thread::sleep(Duration::from_millis(draw.between(100, 1000)));
        let text = format!("save {number} of {}\n", draw.below(1 << 40));
        let start = Instant::now();
        fs::write(&here, &text)?;
        while !fs::read(&there).is_ok_and(|bytes| bytes == text.as_bytes()) {
            ensure!(start.elapsed() < SAVE_PATIENCE, "save {number} is not there after {} s", SAVE_PATIENCE.as_secs());
            thread::sleep(SAVE_POLL);
        }
        // the first one makes the file, the others change it
        if number > 0 {
            took.push(start.elapsed().as_secs_f64() * 1000.0);
        }
    }
    Ok(took)
}

/// Fails unless two files have the same content.
pub(crate) fn ensure_same(one: &Path, other: &Path) -> Result<()> {
    ensure!(tree::hash(one)? == tree::hash(other)?, "the file arrived otherwise than it was sent");
    Ok(())
}
