//! Runs of seeds and recordings, and making a failing one smaller.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::action::{Recording, draw};
use crate::ledger::{Broken, Checked, HOSTILE_INPUT};
use crate::world::{Summary, World};

/// Steps of a run unless told otherwise.
pub const STEPS: usize = 120;
/// Runs spent on making a failing recording smaller.
const SHRINKING: usize = 200;

/// Carries out a recording; a panic breaks an invariant too.
pub fn replay(recording: &Recording, verbose: bool) -> Checked<Summary> {
    let run = || World::new(recording, verbose)?.run(&recording.steps);
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "no message".to_owned());
        Err(Broken { name: HOSTILE_INPUT, text: format!("panic: {text}") })
    })
}

/// Draws and runs a seed.
pub fn run_seed(seed: u64, steps: usize) -> Checked<Summary> {
    replay(&draw(seed, steps), false)
}

/// Takes out steps while the same invariant stays broken.
#[must_use]
pub fn shrink(recording: &Recording, broke: &Broken) -> (Recording, Broken) {
    let mut smallest = (Recording { broke: Some(broke.name.to_owned()), ..recording.clone() }, broke.clone());
    let mut left = SHRINKING;
    let mut size = recording.steps.len().div_ceil(2);
    while size > 0 && left > 0 {
        let mut at = 0;
        let mut smaller = false;
        while at < smallest.0.steps.len() && left > 0 {
            left -= 1;
            let mut shorter = smallest.0.clone();
            let end = shorter.steps.len().min(at + size);
            // the time stays, so that what follows meets the same moment
            let waited: u64 = shorter.steps.drain(at..end).map(|step| step.wait).sum();
            if let Some(next) = shorter.steps.get_mut(at) {
                next.wait += waited;
            }
            match replay(&shorter, false) {
                Err(broken) if broken.name == broke.name => {
                    smallest = (shorter, broken);
                    smaller = true;
                }
                _ => at += size,
            }
        }
        if size == 1 && !smaller {
            break;
        }
        size = if size == 1 { 1 } else { size.div_ceil(2) };
    }
    smallest
}
