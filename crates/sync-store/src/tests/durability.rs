//! A process killed at any moment loses nothing it acknowledged.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::Rng;
use sync_types::{Cursor, Envelope, EnvelopeHash, Number, Scope};
use tempfile::TempDir;

use super::support::*;
use crate::Store;

/// Names the database to the process that is to be killed.
const VICTIM: &str = "SYNC_STORE_TEST_VICTIM";
const TEST: &str = "tests::durability::what_was_acknowledged_outlives_a_kill";
const ROUNDS: usize = 25;

#[test]
fn what_was_acknowledged_outlives_a_kill() {
    if let Some(dir) = std::env::var_os(VICTIM) {
        append_until_killed(Path::new(&dir));
        return;
    }
    let dir = TempDir::new().unwrap();
    let alice = author(1);
    let (db, group) = founded(dir.path(), &alice);
    drop(db);
    let mut random = rng(42);
    let mut acknowledged = Vec::new();
    for round in 0..ROUNDS {
        acknowledged.extend(kill_one(dir.path(), Duration::from_millis(u64::from(random.next_u32() % 120))));
        let db = open(dir.path());
        let read = db.read(|reader| reader.read_sealed(&group, Cursor(0), ALL)).unwrap();
        let stored: Vec<_> = read.entries.iter().map(|entry| (entry.cursor, hash(&entry.bytes))).collect();
        let lost: Vec<_> = acknowledged.iter().filter(|known| stored.binary_search(known).is_err()).collect();
        assert!(lost.is_empty(), "round {round}: acknowledged and gone: {lost:?}");
        let mut previous = EnvelopeHash::NONE;
        for (at, entry) in read.entries.iter().enumerate() {
            let envelope = Envelope::parse(&entry.bytes).unwrap();
            assert_eq!(entry.cursor.0, at as u64 + 1, "round {round}");
            assert_eq!((envelope.header.number, envelope.header.previous), (Number(at as u64 + 1), previous));
            previous = envelope.hash();
        }
        let feed = db.read(|reader| reader.feed(&group, &alice.id())).unwrap();
        assert_eq!(feed.held.highest().unwrap_or_default(), Number(read.entries.len() as u64));
        let selection = sync_core::Selection::everything(Scope::All);
        let served = db.read(|reader| reader.read_after(&group, Cursor(0), ALL, &selection, None)).unwrap();
        assert_eq!(served.entries.len(), read.entries.len());
        db.read(|reader| reader.integrity()).unwrap();
    }
    assert!(acknowledged.len() > ROUNDS, "the processes hardly got to work: {}", acknowledged.len());
}

/// Runs this test in another process, which appends until it is killed; returns what it acknowledged.
fn kill_one(dir: &Path, life: Duration) -> Vec<(Cursor, EnvelopeHash)> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([TEST, "--exact", "--nocapture"])
        .env(VICTIM, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut acknowledged = Vec::new();
    let mut dies_at = None;
    let mut killed = false;
    for line in output.lines() {
        let line = line.unwrap();
        if line.contains("ready") {
            dies_at = Some(Instant::now() + life);
        }
        if let Some(rest) = line.split("ack ").nth(1) {
            let (cursor, hash) = rest.split_once(' ').unwrap();
            acknowledged.push((Cursor(cursor.parse().unwrap()), hash.parse().unwrap()));
        }
        if !killed && dies_at.is_some_and(|at| Instant::now() >= at) {
            // what is still in the pipe was acknowledged as well, so go on reading
            killed = kill(&mut child);
        }
    }
    child.wait().unwrap();
    assert!(killed, "it ended by itself");
    acknowledged
}

fn kill(child: &mut Child) -> bool {
    child.kill().is_ok()
}

fn append_until_killed(dir: &Path) {
    let store = Store::open(&dir.join("db"), rng(std::process::id().to_le_bytes()[0])).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async move {
        let group = store.read(|reader| reader.groups()).await.unwrap()[0].id;
        let writer = Arc::new(Writer { group, author: author(1) });
        println!("ready");
        let tasks: Vec<_> = (0..4u64)
            .map(|task| {
                let (store, writer) = (store.clone(), writer.clone());
                tokio::spawn(async move {
                    for count in 0u64.. {
                        let id = u64::from(std::process::id()) << 32 | task << 28 | count;
                        let body = vec![0; usize::try_from(count % 5).unwrap() * 700];
                        let appended = store.append(group, vec![entry(blob(id), body)], writer.clone()).await.unwrap();
                        // one write, so that lines of the tasks do not mix
                        let line = format!("ack {} {}\n", appended[0].cursor, appended[0].hash);
                        std::io::stdout().write_all(line.as_bytes()).unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}
