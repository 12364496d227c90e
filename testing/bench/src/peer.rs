//! A device in a process of its own: takes orders as lines of JSON, and answers each with one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::{Bind, Config, Cursor, Device, Event, InviteOutcome, MAX_LIMIT, Network, SyncClient};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::task::JoinSet;

use crate::floor::ms;

/// Longest wait for anything that takes seconds at most.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Time between two looks at how far a catch-up has come: a thousandth of what it takes.
const LOOK: Duration = Duration::from_millis(1);
/// Longest life of an invite.
const LIFETIME: Duration = Duration::from_secs(600);
/// Distinct bytes that bodies are cut from, so that none compresses and none equals another.
const POOL: usize = 1 << 20;

/// What a device is told to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Open the home, making it where there is none.
    Open { home: PathBuf, runtime: PathBuf },
    /// Make a group.
    Found,
    /// Make an invite.
    Invite,
    /// Wait until the invite was used.
    AwaitJoined,
    /// Join by code.
    Join { code: String },
    /// Push one blob and wait until someone else holds it.
    Settle { size: usize },
    /// Push one after the other.
    PushSingly { count: usize, size: usize },
    /// Push in one step each so many.
    PushTogether { count: usize, size: usize, together: usize },
    /// Push from so many tasks at once.
    PushConcurrently { count: usize, size: usize, tasks: usize },
    /// Push one blob after each pause.
    PushPaced { count: usize, size: usize, pause: Duration },
    /// Listen for blobs of others; answered at once, and again with [`Answer::Heard`].
    Listen { count: usize },
    /// Open the home and wait until it holds so many entries more than it did; with a subscriber or without.
    CatchUp { home: PathBuf, runtime: PathBuf, after: u64, count: u64, subscribe: bool },
    /// Tell the largest memory this process used.
    Memory,
    /// Open every blob stored and count them.
    CountBlobs,
    /// Close the home.
    Close,
}

/// What a device answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// An invite.
    Invited { code: String },
    /// Milliseconds each push took.
    Took { each: Vec<f64> },
    /// Seconds all of it took.
    TookTogether { seconds: f64 },
    /// When each blob was about to be pushed, by the machine's clock.
    Pushed { blobs: Vec<(String, u64)> },
    /// When the event of each blob was there, by the machine's clock.
    Heard { blobs: Vec<(String, u64)> },
    /// Seconds until the first entry was stored and until the last one was, opening included.
    CaughtUp { first: f64, last: f64 },
    /// MiB, where the system tells.
    Memory { mib: Option<f64> },
    /// Blobs.
    Counted { blobs: usize },
    /// The newest cursor when the home was closed.
    Closed { cursor: u64 },
    /// It did not work.
    Failed { text: String },
}

/// Serves orders until the input ends.
pub(crate) async fn run() -> Result<()> {
    let mut peer = Peer { open: None, invite: None };
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = orders.next_line().await? {
        let order = serde_json::from_str(&line).context("an order cannot be read")?;
        let answer = match peer.obey(order).await {
            Ok(answer) => answer,
            Err(error) => Answer::Failed { text: format!("{error:#}") },
        };
        say(&answer).await?;
    }
    Ok(())
}

async fn say(answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut out = tokio::io::stdout();
    out.write_all(&line).await?;
    out.flush().await?;
    Ok(())
}

struct Peer {
    open: Option<(Device, Option<SyncClient>)>,
    invite: Option<sync_client::Invitation>,
}

impl Peer {
    async fn obey(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Open { home, runtime } => {
                let device = open(&home, &runtime).await?;
                let client = device.only_client().ok();
                self.open = Some((device, client));
                Ok(Answer::Done)
            }
            Order::Found => {
                let (device, client) = self.open.as_mut().context("no home is open")?;
                *client = Some(device.client(device.create_group().await?)?);
                Ok(Answer::Done)
            }
            Order::Invite => {
                let client = self.client()?;
                let invite = client.device().invite(client.group(), LIFETIME).await?;
                let code = invite.code.clone();
                self.invite = Some(invite);
                Ok(Answer::Invited { code })
            }
            Order::AwaitJoined => {
                let invite = self.invite.as_mut().context("no invite was made")?;
                match tokio::time::timeout(PATIENCE, invite.outcome()).await.context("nobody joined")? {
                    InviteOutcome::Joined { .. } => Ok(Answer::Done),
                    outcome => bail!("nobody joined: {outcome:?}"),
                }
            }
            Order::Join { code } => {
                let (device, client) = self.open.as_mut().context("no home is open")?;
                *client = Some(device.join(&code, |_| {}).await?);
                Ok(Answer::Done)
            }
            Order::Settle { size } => {
                let client = self.client()?;
                let pushed = client.push(bodies(1, size)?.remove(0)).await?;
                ensure!(!client.handed_to(pushed.cursor, PATIENCE).await.is_empty(), "nobody took the blob");
                Ok(Answer::Done)
            }
            Order::PushSingly { count, size } => push_singly(self.client()?, bodies(count, size)?).await,
            Order::PushTogether { count, size, together } => {
                push_together(self.client()?, bodies(count, size)?, together).await
            }
            Order::PushConcurrently { count, size, tasks } => {
                push_concurrently(self.client()?, bodies(count, size)?, tasks).await
            }
            Order::PushPaced { count, size, pause } => push_paced(self.client()?, bodies(count, size)?, pause).await,
            Order::Listen { count } => listen(self.client()?, count).await,
            Order::CatchUp { home, runtime, after, count, subscribe } => {
                let start = Instant::now();
                let device = open(&home, &runtime).await?;
                let client = device.only_client()?;
                let listener = subscribe.then(|| tokio::spawn(count_events(client.subscribe())));
                let caught_up = catch_up(&client, start, Cursor(after), count).await;
                if let Some(listener) = listener {
                    listener.abort();
                }
                self.open = Some((device, Some(client)));
                caught_up
            }
            Order::Memory => Ok(Answer::Memory { mib: peak_memory() }),
            Order::CountBlobs => count_blobs(self.client()?).await,
            Order::Close => {
                let cursor = self.client()?.last_cursor().0;
                if let Some((device, _)) = self.open.take() {
                    device.close().await;
                }
                Ok(Answer::Closed { cursor })
            }
        }
    }

    fn client(&self) -> Result<&SyncClient> {
        self.open.as_ref().and_then(|(_, client)| client.as_ref()).context("no group is open")
    }
}

async fn open(home: &Path, runtime: &Path) -> Result<Device> {
    if !home.exists() {
        let name = home.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
        Home::create(home, &name, Some(KeyStoreKind::File), &PassphraseSource::none(), &mut rng)?;
    }
    let network = Network {
        bind: Bind::Loopback,
        mdns: false,
        lan: false,
        public_relays: false,
        runtime_dir: Some(runtime.to_owned()),
        ..Network::default()
    };
    let config = Config { home: home.to_owned(), passphrase: PassphraseSource::none(), network, snapshot_after: None };
    Ok(Device::open(config).await?)
}

/// Bodies to push, each other bytes than the next.
fn bodies(count: usize, size: usize) -> Result<Vec<Vec<u8>>> {
    let mut pool = vec![0; POOL + size];
    getrandom::fill(&mut pool).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    Ok((0..count).map(|n| pool[n % POOL..][..size].to_vec()).collect())
}

async fn push_singly(client: &SyncClient, bodies: Vec<Vec<u8>>) -> Result<Answer> {
    let mut each = Vec::with_capacity(bodies.len());
    for body in bodies {
        let start = Instant::now();
        client.push(body).await?;
        each.push(ms(start.elapsed()));
    }
    Ok(Answer::Took { each })
}

async fn push_together(client: &SyncClient, bodies: Vec<Vec<u8>>, together: usize) -> Result<Answer> {
    let batches: Vec<Vec<Vec<u8>>> = bodies.chunks(together).map(<[Vec<u8>]>::to_vec).collect();
    let start = Instant::now();
    for batch in batches {
        client.push_many(batch).await?;
    }
    Ok(Answer::TookTogether { seconds: start.elapsed().as_secs_f64() })
}

async fn push_concurrently(client: &SyncClient, mut bodies: Vec<Vec<u8>>, tasks: usize) -> Result<Answer> {
    let share = bodies.len().div_ceil(tasks);
    let mut shares = Vec::with_capacity(tasks);
    while !bodies.is_empty() {
        shares.push(bodies.split_off(bodies.len().saturating_sub(share)));
    }
    let start = Instant::now();
    let mut pushing: JoinSet<Result<()>> = JoinSet::new();
    for share in shares {
        let client = client.clone();
        pushing.spawn(async move {
            for body in share {
                client.push(body).await?;
            }
            Ok(())
        });
    }
    while let Some(done) = pushing.join_next().await {
        done??;
    }
    Ok(Answer::TookTogether { seconds: start.elapsed().as_secs_f64() })
}

async fn push_paced(client: &SyncClient, bodies: Vec<Vec<u8>>, pause: Duration) -> Result<Answer> {
    let mut blobs = Vec::with_capacity(bodies.len());
    for body in bodies {
        tokio::time::sleep(pause).await;
        let at = clock();
        let pushed = client.push(body).await?;
        blobs.push((pushed.blob_id.to_string(), at));
    }
    Ok(Answer::Pushed { blobs })
}

async fn listen(client: &SyncClient, count: usize) -> Result<Answer> {
    let own = client.author();
    let mut events = client.subscribe();
    say(&Answer::Done).await?;
    let mut blobs = Vec::with_capacity(count);
    while blobs.len() < count {
        let event = tokio::time::timeout(PATIENCE, events.next()).await.context("blobs are missing")?;
        match event.context("the client was closed")? {
            Event::BlobAvailable { blob_id, sender, .. } if sender != own => blobs.push((blob_id.to_string(), clock())),
            Event::Lagged { missed } => bail!("missed {missed} events"),
            _ => {}
        }
    }
    Ok(Answer::Heard { blobs })
}

/// Takes every event, as a program would that shows them.
async fn count_events(mut events: sync_client::Subscription) -> usize {
    let mut count = 0;
    while events.next().await.is_some() {
        count += 1;
    }
    count
}

async fn catch_up(client: &SyncClient, start: Instant, after: Cursor, count: u64) -> Result<Answer> {
    let expected = Cursor(after.0 + count);
    let mut first = None;
    loop {
        let now = client.last_cursor();
        let elapsed = start.elapsed();
        if now > after && first.is_none() {
            first = Some(elapsed);
        }
        if now >= expected {
            let first = first.unwrap_or(elapsed).as_secs_f64();
            return Ok(Answer::CaughtUp { first, last: elapsed.as_secs_f64() });
        }
        ensure!(elapsed < PATIENCE, "only {} of {count} entries came", now.0.saturating_sub(after.0));
        tokio::time::sleep(LOOK).await;
    }
}

async fn count_blobs(client: &SyncClient) -> Result<Answer> {
    let (mut after, mut blobs) = (Cursor(0), 0);
    loop {
        let pulled = client.pull(after, MAX_LIMIT).await?;
        blobs += pulled.blobs.len();
        after = pulled.max_cursor;
        if !pulled.has_more {
            return Ok(Answer::Counted { blobs });
        }
    }
}

/// Nanoseconds by a clock that all processes of the machine share.
#[cfg(unix)]
fn clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let parts = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    parts.0.unwrap_or(0) * 1_000_000_000 + parts.1.unwrap_or(0)
}

/// Nanoseconds by a clock that all processes of the machine share.
#[cfg(not(unix))]
fn clock() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The largest resident memory of this process so far.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix("kB")?.trim();
    Some(kib.parse::<f64>().ok()? / 1024.0)
}
