//! A relay's rows: durable pushes, fan-out and memory, beside Redis that is as durable.
//!
//! The relay is a process of its own, the release build of `sync-relay`; this program is the load.
//! Redis stands beside it with a commit for each answer (`appendfsync always`), as many connections and the same sizes;
//! it neither seals channels nor checks signatures.

mod device;
mod redis;
mod server;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::stream::{StreamExt as _, TryStreamExt as _};
use tokio::task::JoinSet;

use self::device::{Client, Founder};
use self::redis::Redis;
use self::server::Relay;
use crate::figures::{Row, Target, Unit, quantile};
use crate::floor::ms;
use crate::rounds::Args;

/// Bytes of an entry before it is an envelope.
const SIZE: usize = 1024;
/// Connections that push at once, each for a group of its own.
const PUSHING: usize = 64;
/// Pushes of one step.
const PUSHES: usize = 32_000;
/// Pushes of one connection that are under way at once, in the second step.
const WINDOW: usize = 16;
/// Connections of one group that hear of each push.
const LISTENING: usize = 1000;
/// Pushes whose way to all of them is timed.
const FANNED_OUT: usize = 100;
/// Time between two of those.
const PAUSE: Duration = Duration::from_millis(50);
/// Deliveries that wait to be noted: one of each connection and more.
const HEARD: usize = 2 * LISTENING;
/// Idle connections at most: what a relay is to hold.
const IDLE: usize = 10_000;
/// Idle connections with TLS: each costs a handshake more.
const IDLE_TLS: usize = 1000;
/// Connections opened at once.
const OPENING: usize = 64;
/// Files that this program and the relay need beside connections.
const OTHER_FILES: usize = 200;
/// Time in which what connecting needed is given back.
const REST: Duration = Duration::from_secs(2);
/// Longest wait for anything that takes seconds at most.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures and prints.
pub(crate) async fn run(args: &Args) -> Result<()> {
    let size = Size::new(args.share());
    if size.idle < IDLE {
        eprintln!("bench: {} idle connections, as many as files may be open here or as asked for", size.idle);
    }
    let beside = Redis::is_there();
    if !beside {
        eprintln!("bench: nothing is measured beside the relay; install redis-server for that");
    }
    args.measure(async |site| round(site, &size, beside).await, |done| rows(done, &size)).await
}

/// How much of it.
struct Size {
    pushes: usize,
    fanned_out: usize,
    idle: usize,
    idle_tls: usize,
}

impl Size {
    fn new(share: usize) -> Self {
        let room = open_files().saturating_sub(OTHER_FILES);
        Self {
            pushes: PUSHES / share,
            fanned_out: FANNED_OUT / share,
            idle: (IDLE / share).min(room),
            idle_tls: (IDLE_TLS / share).min(room),
        }
    }
}

/// Files that may be open at once, here and in the processes started here.
fn open_files() -> usize {
    #[cfg(unix)]
    {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
    }
    #[cfg(not(unix))]
    {
        usize::MAX
    }
}

/// What one server did in a round.
#[derive(Default)]
struct Figures {
    singly: f64,
    windowed: f64,
    /// Milliseconds of each delivery.
    deliveries: Vec<f64>,
    /// KiB.
    idle: f64,
}

struct Round {
    relay: Figures,
    /// KiB of an idle connection with TLS.
    idle_tls: f64,
    redis: Option<Figures>,
}

async fn round(site: &Path, size: &Size, beside: bool) -> Result<Round> {
    let relay = measure_relay(site, size).await?;
    let idle_tls = {
        let tls = Relay::start(&site.join("tls"), true)?;
        idle(&tls, size.idle_tls).await?
    };
    let redis = if beside { Some(measure_redis(site, size).await?) } else { None };
    Ok(Round { relay, idle_tls, redis })
}

async fn measure_relay(site: &Path, size: &Size) -> Result<Figures> {
    let relay = Relay::start(&site.join("pushes"), false)?;
    let singly = pushes(&relay, size.pushes, 1).await.context("pushes fail")?;
    let windowed = pushes(&relay, size.pushes, WINDOW).await.context("pushes under way together fail")?;
    drop(relay);
    let relay = Relay::start(&site.join("fan-out"), false)?;
    let deliveries = fan_out(&relay, size.fanned_out).await.context("fan-out fails")?;
    drop(relay);
    let relay = Relay::start(&site.join("idle"), false)?;
    let idle = idle(&relay, size.idle).await.context("idle connections fail")?;
    Ok(Figures { singly, windowed, deliveries, idle })
}

/// Acknowledged pushes a second, of connections that each have so many under way.
async fn pushes(relay: &Relay, count: usize, window: usize) -> Result<f64> {
    let each = count / PUSHING;
    let mut writers = Vec::new();
    for _ in 0..PUSHING {
        let mut founder = Founder::new();
        // signing them is the device's work
        let entries: Vec<Vec<u8>> = (0..each).map(|_| founder.entry(SIZE)).collect::<Result<_>>()?;
        writers.push((Client::open(&relay.url, &founder).await?, entries));
    }
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for (mut client, entries) in writers {
        tasks.spawn(async move {
            let mut acknowledged = 0;
            for (sent, entry) in (1..).zip(entries) {
                client.push(sent, entry).await?;
                while sent - acknowledged >= window as u64 {
                    acknowledged = client.acknowledged().await?;
                }
            }
            while acknowledged < each as u64 {
                acknowledged = client.acknowledged().await?;
            }
            anyhow::Ok(client)
        });
    }
    let mut clients = Vec::new();
    while let Some(done) = tasks.join_next().await {
        clients.push(done??);
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok((each * PUSHING) as f64 / seconds)
}

/// Milliseconds from each push to the moment when each of the others has opened it.
async fn fan_out(relay: &Relay, count: usize) -> Result<Vec<f64>> {
    let mut founder = Founder::new();
    let mut pusher = Client::open(&relay.url, &founder).await?;
    let listeners = open_all(relay, &founder, LISTENING).await?;
    let (told, mut hearing) = tokio::sync::mpsc::channel(HEARD);
    let mut tasks = JoinSet::new();
    for mut client in listeners {
        let told = told.clone();
        tasks.spawn(async move {
            for _ in 0..count {
                let number = client.heard().await?;
                told.send((number, Instant::now())).await?;
            }
            anyhow::Ok(client)
        });
    }
    let mut deliveries = Vec::with_capacity(count * LISTENING);
    for number in 1..=count as u64 {
        let entry = founder.entry(SIZE)?;
        let start = Instant::now();
        pusher.push(number, entry).await?;
        for _ in 0..LISTENING {
            let hearing = tokio::time::timeout(PATIENCE, hearing.recv()).await.context("a push is not heard of")?;
            let (heard, at) = hearing.context("nobody listens")?;
            ensure!(heard == number, "number {heard} was heard instead of {number}");
            deliveries.push(ms(at - start));
        }
        while pusher.acknowledged().await? < number {}
        // the acknowledgements of all are no part of the next way
        tokio::time::sleep(PAUSE).await;
    }
    let mut clients = Vec::new();
    while let Some(done) = tasks.join_next().await {
        clients.push(done??);
    }
    Ok(deliveries)
}

/// KiB that each of so many connections costs the relay that says nothing.
async fn idle(relay: &Relay, count: usize) -> Result<f64> {
    let founder = Founder::new();
    // what the first ones need is needed once
    let first = open_all(relay, &founder, OPENING).await?;
    tokio::time::sleep(REST).await;
    let before = relay.memory_kib()?;
    let clients = open_all(relay, &founder, count.saturating_sub(first.len())).await?;
    tokio::time::sleep(REST).await;
    let after = relay.memory_kib()?;
    let held = relay.connections().await?;
    ensure!(held >= count as u64, "only {held} of {count} connections are held");
    Ok((after - before) / clients.len() as f64)
}

/// Connections of one member, each as a device of its own.
async fn open_all(relay: &Relay, founder: &Founder, count: usize) -> Result<Vec<Client>> {
    let opening = futures_util::stream::iter(0..count).map(|_| Client::open(&relay.url, founder));
    opening.buffer_unordered(OPENING).try_collect().await
}

async fn measure_redis(site: &Path, size: &Size) -> Result<Figures> {
    let redis = Redis::start(&site.join("redis"), size.idle.max(LISTENING) + OTHER_FILES).await?;
    let singly = redis.adds(PUSHING, size.pushes / PUSHING, 1, SIZE).await.context("Redis fails")?;
    let windowed = redis.adds(PUSHING, size.pushes / PUSHING, WINDOW, SIZE).await.context("Redis fails")?;
    let deliveries = redis.fan_out(LISTENING, size.fanned_out, SIZE).await.context("Redis fails")?;
    drop(redis);
    let redis = Redis::start(&site.join("redis-idle"), size.idle + OTHER_FILES).await?;
    let idle = redis.idle(size.idle, REST).await.context("Redis fails")?;
    Ok(Figures { singly, windowed, deliveries, idle })
}

fn rows(rounds: &[Round], size: &Size) -> Vec<Row> {
    let row = |work: String, unit: Unit, figure: &dyn Fn(&Figures) -> f64| {
        let row = Row::new(work, unit, rounds.iter().map(|round| figure(&round.relay)).collect());
        let beside: Option<Vec<f64>> = rounds.iter().map(|round| round.redis.as_ref().map(figure)).collect();
        match beside {
            Some(figures) => row.floor("Redis", figures),
            None => row,
        }
    };
    let pushes = |what: &str| format!("durable pushes of 1 KiB, {PUSHING} connections, {what}");
    let fan_out = |what: &str| format!("push of 1 KiB to each of {LISTENING} connections, {what}");
    vec![
        row(pushes("one at a time each"), Unit::PerSecond, &|figures| figures.singly).target(Target::AtLeast(5000.0)),
        row(pushes(&format!("{WINDOW} under way each")), Unit::PerSecond, &|figures| figures.windowed)
            .target(Target::AtLeast(5000.0)),
        row(fan_out("median"), Unit::Milliseconds, &|figures| quantile(&figures.deliveries, 50)),
        row(fan_out("p99"), Unit::Milliseconds, &|figures| quantile(&figures.deliveries, 99)),
        row(format!("memory of an idle connection, of {}", size.idle), Unit::Kibibytes, &|figures| figures.idle)
            .target(Target::AtMost(20.0)),
        Row::new(
            format!("the same with TLS, of {}", size.idle_tls),
            Unit::Kibibytes,
            rounds.iter().map(|round| round.idle_tls).collect(),
        ),
    ]
}
