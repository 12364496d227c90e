//! The simulator itself: some seeds and every recording hold, and the same recording leads to the same trace.

use std::fs;
use std::path::Path;

use sync_sim::action::{Action, Recording, Step, draw};
use sync_sim::run::{STEPS, replay, run_seed};
use sync_sim::tree::Edit;

fn recordings() -> Vec<(String, Recording)> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let files = fs::read_dir(corpus).expect("the corpus");
    let mut recordings: Vec<(String, Recording)> = files
        .map(|file| {
            let path = file.expect("a file").path();
            let text = fs::read_to_string(&path).expect("a recording");
            (path.display().to_string(), serde_json::from_str(&text).expect("a recording"))
        })
        .collect();
    recordings.sort_by(|a, b| a.0.cmp(&b.0));
    recordings
}

#[test]
fn every_recording_holds() {
    let recordings = recordings();
    assert!(!recordings.is_empty());
    for (path, recording) in recordings {
        if let Err(broken) = replay(&recording, false) {
            panic!("{path}: {broken}");
        }
    }
}

#[test]
fn some_seeds_hold_and_lead_to_the_same_trace_twice() {
    for seed in 0..6 {
        let first = run_seed(seed, STEPS).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        let second = run_seed(seed, STEPS).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        assert_eq!(first, second, "seed {seed}");
        assert!(first.sealed > 1 && first.events > 10, "seed {seed} does nothing: {first:?}");
    }
}

#[test]
fn another_seed_leads_to_another_trace() {
    let trace = |seed| run_seed(seed, 10).expect("a sound run").trace;
    assert_ne!(trace(1), trace(2));
}

#[test]
fn a_recording_is_written_and_read_back_as_it_was() {
    let recording = draw(7, 200);
    let text = serde_json::to_string(&recording).expect("JSON");
    assert_eq!(serde_json::from_str::<Recording>(&text).expect("a recording"), recording);
}

#[test]
fn steps_that_make_no_sense_are_passed_over() {
    let nowhere = [
        Action::Push { at: 9, sizes: vec![1] },
        Action::Connect { from: 9, to: 0, lasts: None },
        Action::Crash { at: 9, after: None, survive: sync_sim::action::Left::Some, down: 1, again: None },
        Action::Restore { at: 9 },
        Action::Copy { from: 0, to: 0 },
        Action::Join { by: 0, newcomer: 9, admin: false },
        Action::Grant { from: 0, to: 9 },
        Action::Lie { to: 0, dials: true, lie: sync_sim::action::Lie::Fork },
        Action::Edit { at: 9, edit: Edit::Remove { path: "a".to_owned() }, after: None, noticed: true },
        Action::Edit { at: 0, edit: Edit::Remove { path: "../a".to_owned() }, after: None, noticed: true },
        Action::Scan { at: 9 },
    ];
    let steps = (0..).zip(nowhere).map(|(id, action)| Step { id, wait: 1, action }).collect();
    let recording = Recording { seed: 1, replicas: 2, joined: 2, liar: None, folders: true, steps, broke: None };
    replay(&recording, false).expect("a sound run");
}
