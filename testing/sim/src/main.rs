//! `sync-sim`: runs the recorded corpus and fresh seeds, and writes down what breaks an invariant.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use sync_sim::action::{Recording, draw};
use sync_sim::ledger::Broken;
use sync_sim::run::{STEPS, replay, shrink};

/// Worlds run at once; each is single-threaded.
const THREADS: usize = 2;
/// Recorded runs, below the root of the repository.
const CORPUS: &str = "testing/sim/corpus";
/// Where recordings of failures go, below the root of the repository.
const FAILURES: &str = "target/sim";

/// Runs whole groups in one process, each from one seed, and checks what must always hold.
#[derive(Parser)]
struct Args {
    /// How many seeds to run
    #[arg(long, default_value_t = 50)]
    seeds: u64,
    /// The first seed; fresh ones are drawn without it
    #[arg(long)]
    start: Option<u64>,
    /// Steps of each run
    #[arg(long, default_value_t = STEPS)]
    steps: usize,
    /// Run one recording and tell what happens
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Folder of recordings to run first
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("sync-sim: {error}");
            ExitCode::from(2)
        }
    }
}

/// The root of the repository: the folder above that holds this package, or where the program was started.
fn root() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    here.ancestors().find(|dir| dir.join("testing/sim").is_dir()).map_or_else(|| here.clone(), Path::to_path_buf)
}

fn run(args: &Args) -> Result<bool, String> {
    if let Some(path) = &args.replay {
        let recording = load(path)?;
        return Ok(match replay(&recording, true) {
            Ok(summary) => {
                println!("nothing broken: {summary:?}");
                true
            }
            Err(broken) => {
                println!("seed {}: {broken}", recording.seed);
                false
            }
        });
    }
    let corpus = args.corpus.clone().unwrap_or_else(|| root().join(CORPUS));
    let mut recordings: Vec<PathBuf> = match fs::read_dir(&corpus) {
        Ok(files) => files.filter_map(|file| Some(file.ok()?.path())).collect(),
        Err(_) if args.corpus.is_none() => Vec::new(),
        Err(error) => return Err(format!("cannot list {}: {error}", corpus.display())),
    };
    recordings.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    recordings.sort();
    for path in &recordings {
        let recording = load(path)?;
        if let Err(broken) = replay(&recording, false) {
            println!("recording {}: {broken}", path.display());
            println!("replay: cargo run -p sync-sim -- --replay {}", path.display());
            return Ok(false);
        }
    }
    let start = match args.start {
        Some(start) => start,
        None => fresh_start()?,
    };
    let end = start.saturating_add(args.seeds);
    println!("{} recordings hold; seeds {start}..{end} with {} steps each", recordings.len(), args.steps);
    let began = Instant::now();
    let Some((seed, broken)) = run_seeds(start, end, args.steps) else {
        println!("{} seeds, nothing broken, {:.1} s", args.seeds, began.elapsed().as_secs_f64());
        return Ok(true);
    };
    println!("seed {seed}: {broken}");
    let (smaller, broken) = shrink(&draw(seed, args.steps), &broken);
    let path = save(&smaller)?;
    println!("smallest found, {} steps: {broken}", smaller.steps.len());
    println!("replay: cargo run -p sync-sim -- --replay {}", path.display());
    println!("or again from its seed: cargo run -p sync-sim -- --seeds 1 --start {seed} --steps {}", args.steps);
    Ok(false)
}

/// A seed nobody ran before, small enough to type.
fn fresh_start() -> Result<u64, String> {
    let drawn = getrandom::u32().map_err(|error| format!("cannot draw seeds: {error}; give --start"))?;
    Ok(u64::from(drawn) * 1000)
}

/// The first failure found, if any.
fn run_seeds(start: u64, end: u64, steps: usize) -> Option<(u64, Broken)> {
    let next = AtomicU64::new(start);
    let stop = AtomicBool::new(false);
    let found = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    if let Err(broken) = sync_sim::run::run_seed(seed, steps) {
                        stop.store(true, Ordering::Relaxed);
                        if let Ok(mut found) = found.lock() {
                            found.get_or_insert((seed, broken));
                        }
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_default()
}

fn load(path: &Path) -> Result<Recording, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{} is no recording: {error}", path.display()))
}

fn save(recording: &Recording) -> Result<PathBuf, String> {
    let dir = root().join(FAILURES);
    let path = dir.join(format!("{}.json", recording.seed));
    let text = serde_json::to_string_pretty(recording).map_err(|error| error.to_string())?;
    let written = fs::create_dir_all(&dir).and_then(|()| fs::write(&path, text + "\n"));
    written.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    Ok(path)
}
