//! The log's rows: push, delivery, catch-up.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::figures::{Row, Target, Unit, quantile};
use crate::floor::{self, Floors};
use crate::peer::{Answer, Order};
use crate::remote::{Remote, unexpected};
use crate::rounds::Args;

/// Bytes of a blob.
const SIZE: usize = 1024;
/// Blobs pushed one after the other.
const SINGLY: usize = 1000;
/// Blobs of one step.
const TOGETHER: usize = 100;
/// Tasks that push at once: as many as the store takes into one commit.
const TASKS: usize = 256;
/// Blobs whose way is timed.
const PACED: usize = 500;
/// Time between two of those, so that each finds the devices at rest.
const PAUSE: Duration = Duration::from_millis(10);
/// Blobs to catch up with.
const CATCH_UP: usize = 100_000;

/// Measures and prints.
pub(crate) async fn run(args: &Args) -> Result<()> {
    let share = args.share();
    args.measure(async |site| round(site, share).await, |done| rows(done, share)).await
}

/// What one round found.
struct Round {
    floors: Floors,
    singly: Vec<f64>,
    together: f64,
    concurrently: f64,
    delivery: Vec<f64>,
    silent: CaughtUp,
    listening: CaughtUp,
    sender_memory: Option<f64>,
}

struct CaughtUp {
    first: f64,
    rate: f64,
    memory: Option<f64>,
}

async fn round(site: &Path, share: usize) -> Result<Round> {
    let place = |name: &str| site.join(name);
    let runtime = place("run");
    let floors = {
        let (dir, rows) = (site.to_owned(), CATCH_UP / share);
        tokio::task::spawn_blocking(move || floor::measure(&dir, SIZE, rows)).await??
    };

    let open = |name: &str| Order::Open { home: place(name), runtime: runtime.clone() };
    let mut a = Remote::start()?;
    a.order(open("a")).await?;
    a.order(Order::Found).await?;
    // who catches up later joins now, so that pairing is no part of it
    let mut joined = Vec::new();
    for name in ["c", "b"] {
        let mut joiner = Remote::start()?;
        joiner.order(open(name)).await?;
        let Answer::Invited { code } = a.ask(Order::Invite).await? else { bail!("no invite was made") };
        joiner.order(Order::Join { code }).await?;
        a.order(Order::AwaitJoined).await?;
        a.order(Order::Settle { size: SIZE }).await?;
        joined.push(joiner);
    }
    let mut b = joined.pop().context("nobody joined")?;
    let c = joined.pop().context("one joined")?;
    let c_cursor = c.close().await?;
    let delivery = delivery(&mut a, &mut b, PACED / share).await?;
    let b_cursor = b.close().await?;

    let Answer::Took { each: singly } = a.ask(Order::PushSingly { count: SINGLY / share, size: SIZE }).await? else {
        bail!("pushing took no time")
    };
    let half = CATCH_UP / share / 2;
    let count = half - SINGLY / share;
    let together = rate(count, &a.ask(Order::PushTogether { count, size: SIZE, together: TOGETHER }).await?)?;
    let concurrently = rate(half, &a.ask(Order::PushConcurrently { count: half, size: SIZE, tasks: TASKS }).await?)?;
    let newest = a.close().await?;

    // a process of its own again, so that its memory is what serving takes
    let mut a = Remote::start()?;
    a.order(open("a")).await?;
    let listening = catch_up(&place("c"), &runtime, c_cursor, newest, true).await?;
    let silent = catch_up(&place("b"), &runtime, b_cursor, newest, false).await?;
    let sender_memory = memory_of(&mut a).await?;
    a.close().await?;
    Ok(Round { floors, singly, together, concurrently, delivery, silent, listening, sender_memory })
}

/// Milliseconds from each push to the event on the other side.
async fn delivery(a: &mut Remote, b: &mut Remote, count: usize) -> Result<Vec<f64>> {
    b.order(Order::Listen { count }).await?;
    let pushed = match a.ask(Order::PushPaced { count, size: SIZE, pause: PAUSE }).await? {
        Answer::Pushed { blobs } => blobs,
        other => return unexpected(&other),
    };
    let heard: HashMap<String, u64> = match b.answer().await? {
        Answer::Heard { blobs } => blobs.into_iter().collect(),
        other => return unexpected(&other),
    };
    let way = |(blob, start): &(String, u64)| {
        let end = heard.get(blob).with_context(|| format!("blob {blob} was not heard of"))?;
        Ok(floor::ms(Duration::from_nanos(end.saturating_sub(*start))))
    };
    pushed.iter().map(way).collect()
}

async fn catch_up(home: &Path, runtime: &Path, after: u64, newest: u64, subscribe: bool) -> Result<CaughtUp> {
    let mut device = Remote::start()?;
    let (home, runtime) = (home.to_owned(), runtime.to_owned());
    // cursors count entries, and both sides will have the same ones
    let count = newest.checked_sub(after).context("the other side holds less")?;
    let (first, last) = match device.ask(Order::CatchUp { home, runtime, after, count, subscribe }).await? {
        Answer::CaughtUp { first, last } => (first, last),
        other => return unexpected(&other),
    };
    let memory = memory_of(&mut device).await?;
    let blobs = match device.ask(Order::CountBlobs).await? {
        Answer::Counted { blobs } => blobs,
        other => return unexpected(&other),
    };
    ensure!(blobs as u64 >= count, "of {count} entries only {blobs} can be opened");
    device.close().await?;
    Ok(CaughtUp { first: first * 1000.0, rate: count as f64 / last, memory })
}

async fn memory_of(device: &mut Remote) -> Result<Option<f64>> {
    match device.ask(Order::Memory).await? {
        Answer::Memory { mib } => Ok(mib),
        other => unexpected(&other),
    }
}

fn rate(count: usize, answer: &Answer) -> Result<f64> {
    match answer {
        Answer::TookTogether { seconds } => Ok(count as f64 / seconds),
        other => unexpected(other),
    }
}

fn rows(rounds: &[Round], share: usize) -> Vec<Row> {
    let each = |figure: &dyn Fn(&Round) -> f64| -> Vec<f64> { rounds.iter().map(figure).collect() };
    let fsync = |percent| each(&|round| quantile(&round.floors.fsyncs, percent));
    let sqlite = || each(&|round| round.floors.rows_per_second);
    let way = || each(&|round| 2.0 * quantile(&round.floors.fsyncs, 50) + quantile(&round.floors.round_trips, 50));
    let count = CATCH_UP / share;
    let mut rows = vec![
        Row::new("machine: fsync after appending 4 KiB, median", Unit::Milliseconds, fsync(50)),
        Row::new("machine: the same, p99", Unit::Milliseconds, fsync(99)),
        Row::new(
            "machine: 1 KiB there and back over TCP on loopback, median",
            Unit::Milliseconds,
            each(&|round| quantile(&round.floors.round_trips, 50)),
        ),
        Row::new("machine: 1 KiB rows into SQLite, 1000 a transaction, synchronous=FULL", Unit::PerSecond, sqlite()),
        Row::new(
            "push 1 KiB, durable, one after the other, median",
            Unit::Milliseconds,
            each(&|round| quantile(&round.singly, 50)),
        )
        .floor("fsync", fsync(50)),
        Row::new("the same, p99", Unit::Milliseconds, each(&|round| quantile(&round.singly, 99)))
            .floor("fsync p99", fsync(99))
            .target(Target::AtMost(10.0)),
        Row::new("push 1 KiB, durable, 100 in one step", Unit::PerSecond, each(&|round| round.together))
            .floor("SQLite", sqlite())
            .target(Target::AtLeast(20_000.0)),
        Row::new("push 1 KiB, durable, 256 tasks at once", Unit::PerSecond, each(&|round| round.concurrently))
            .floor("SQLite", sqlite())
            .target(Target::AtLeast(20_000.0)),
        Row::new(
            "push on A to event on B, iroh on loopback, median",
            Unit::Milliseconds,
            each(&|round| quantile(&round.delivery, 50)),
        )
        .floor("2 fsyncs and a round trip", way())
        .target(Target::AtMost(5.0)),
        Row::new("the same, p99", Unit::Milliseconds, each(&|round| quantile(&round.delivery, 99))),
        Row::new(
            format!("catch up {count} blobs of 1 KiB, from opening to the last one stored"),
            Unit::PerSecond,
            each(&|round| round.silent.rate),
        )
        .floor("SQLite", sqlite())
        .target(Target::AtLeast(50_000.0)),
        Row::new("the same with a subscriber", Unit::PerSecond, each(&|round| round.listening.rate))
            .floor("SQLite", sqlite()),
        Row::new("of that, until the first one stored", Unit::Milliseconds, each(&|round| round.silent.first)),
    ];
    for (work, memory) in [
        ("catch up, most memory of the receiver", each(&|round| round.silent.memory.unwrap_or(f64::NAN))),
        ("catch up, most memory of the sender", each(&|round| round.sender_memory.unwrap_or(f64::NAN))),
        (
            "catch up, most memory of a receiver with a subscriber",
            each(&|round| round.listening.memory.unwrap_or(f64::NAN)),
        ),
    ] {
        rows.push(Row::new(work, Unit::Mebibytes, memory));
    }
    rows
}
