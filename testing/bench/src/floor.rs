//! What the machine does without us: the cost of an fsync, a round trip on loopback, rows into SQLite.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rusqlite::Connection;

/// Bytes appended before each fsync: a page, as a small commit writes.
const APPEND: usize = 4096;
/// fsyncs and round trips per round.
const SAMPLES: usize = 300;
/// Rows per transaction: what one frame of a catch-up carries at most.
const ROWS: usize = 1000;

/// The floors of one round.
#[derive(Debug)]
pub(crate) struct Floors {
    /// Milliseconds of each fsync after an append.
    pub(crate) fsyncs: Vec<f64>,
    /// Milliseconds of each round trip of `size` bytes over TCP on loopback.
    pub(crate) round_trips: Vec<f64>,
    /// Rows of `size` bytes a second, durably.
    pub(crate) rows_per_second: f64,
}

/// Measures the machine; files are made in `dir`.
pub(crate) fn measure(dir: &Path, size: usize, rows: usize) -> Result<Floors> {
    Ok(Floors {
        fsyncs: fsyncs(dir).context("cannot measure fsync")?,
        round_trips: round_trips(size).context("cannot measure a round trip on loopback")?,
        rows_per_second: rows_per_second(dir, size, rows).context("cannot measure SQLite")?,
    })
}

/// A duration in milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn fsyncs(dir: &Path) -> Result<Vec<f64>> {
    let mut file = File::create_new(dir.join("fsync"))?;
    let page = [0x5a; APPEND];
    let mut sample = || {
        let start = Instant::now();
        file.write_all(&page)?;
        file.sync_all()?;
        Ok(ms(start.elapsed()))
    };
    (0..SAMPLES).map(|_| sample()).collect()
}

fn round_trips(size: usize) -> Result<Vec<f64>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let mut bytes = vec![0x5a; size];
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || {
            let mut bytes = vec![0; size];
            for _ in 0..SAMPLES {
                far.read_exact(&mut bytes)?;
                far.write_all(&bytes)?;
            }
            Ok(())
        });
        let mut sample = || {
            let start = Instant::now();
            near.write_all(&bytes)?;
            near.read_exact(&mut bytes)?;
            Ok(ms(start.elapsed()))
        };
        let samples: Result<Vec<f64>> = (0..SAMPLES).map(|_| sample()).collect();
        // else the other side would wait for ever after an error here; it may have gone by now
        let _ = near.shutdown(std::net::Shutdown::Both);
        let echoed: Result<()> = echo.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the other side panicked")));
        let samples = samples?;
        echoed?;
        Ok(samples)
    })
}

fn rows_per_second(dir: &Path, size: usize, rows: usize) -> Result<f64> {
    let mut conn = Connection::open(dir.join("rows.db"))?;
    conn.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    conn.pragma_update(None, "synchronous", "FULL")?;
    conn.execute_batch("CREATE TABLE rows (id INTEGER PRIMARY KEY, bytes BLOB NOT NULL) STRICT")?;
    let bytes = vec![0x5a; size];
    let start = Instant::now();
    for _ in 0..rows.div_ceil(ROWS) {
        let txn = conn.transaction()?;
        {
            let mut insert = txn.prepare_cached("INSERT INTO rows (bytes) VALUES (?1)")?;
            for _ in 0..ROWS {
                insert.execute([&bytes])?;
            }
        }
        txn.commit()?;
    }
    Ok((rows.div_ceil(ROWS) * ROWS) as f64 / start.elapsed().as_secs_f64())
}
