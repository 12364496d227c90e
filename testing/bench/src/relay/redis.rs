//! Redis, told to be as durable as a relay: each answer comes after its append was synced.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::stream::{StreamExt as _, TryStreamExt as _};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::server::resident_kib;
use super::{HEARD, OPENING, PATIENCE, PAUSE};
use crate::floor::ms;

const PROGRAM: &str = "redis-server";
/// The stream that everyone reads.
const FAN_OUT: &str = "fan-out";
/// Time between two looks whether it takes connections.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of a line, and elements of a list, that are read: all of ours are far shorter.
const MAX_PART: usize = 1 << 20;

/// A server that ends with this value.
pub(super) struct Redis {
    child: Child,
    address: SocketAddr,
}

impl Drop for Redis {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Redis {
    pub(super) fn is_there() -> bool {
        let mut command = Command::new(PROGRAM);
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    pub(super) async fn start(dir: &Path, connections: usize) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        // it says nowhere which port the system gave it: one that was free a moment ago is named
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let child = Command::new(PROGRAM)
            .args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--dir"])
            .arg(dir)
            .args(["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"])
            .args(["--save", "", "--tcp-backlog", "511", "--maxclients", &connections.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start Redis")?;
        let mut redis = Self { child, address };
        let start = Instant::now();
        while redis.connect().await.is_err() {
            ensure!(redis.child.try_wait()?.is_none() && start.elapsed() < PATIENCE, "Redis does not start");
            tokio::time::sleep(LOOK).await;
        }
        Ok(redis)
    }

    async fn connect(&self) -> Result<Client> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let mut client = Client { stream: BufReader::new(stream) };
        client.send(&[b"PING"]).await?;
        client.answer().await?;
        Ok(client)
    }

    async fn connect_all(&self, count: usize) -> Result<Vec<Client>> {
        let opening = futures_util::stream::iter(0..count).map(|_| self.connect());
        opening.buffer_unordered(OPENING).try_collect().await
    }

    /// `XADD` a second, of connections with a stream each that have so many under way.
    pub(super) async fn adds(&self, connections: usize, each: usize, window: usize, size: usize) -> Result<f64> {
        let clients = self.connect_all(connections).await?;
        let mut tasks = JoinSet::new();
        let start = Instant::now();
        for (at, mut client) in clients.into_iter().enumerate() {
            tasks.spawn(async move {
                let (stream, body) = (format!("{window} {at}"), vec![0x5a; size]);
                let mut under_way = 0;
                for _ in 0..each {
                    client.send(&[b"XADD", stream.as_bytes(), b"*", b"e", &body]).await?;
                    under_way += 1;
                    while under_way >= window {
                        client.answer().await?;
                        under_way -= 1;
                    }
                }
                while under_way > 0 {
                    client.answer().await?;
                    under_way -= 1;
                }
                anyhow::Ok(client)
            });
        }
        let mut clients = Vec::new();
        while let Some(done) = tasks.join_next().await {
            clients.push(done??);
        }
        Ok((connections * each) as f64 / start.elapsed().as_secs_f64())
    }

    /// Milliseconds from each `XADD` to the moment when each connection that waits for it in `XREAD` has it.
    pub(super) async fn fan_out(&self, connections: usize, count: usize, size: usize) -> Result<Vec<f64>> {
        let mut adding = self.connect().await?;
        let (told, mut hearing) = tokio::sync::mpsc::channel(HEARD);
        let mut tasks = JoinSet::new();
        for mut client in self.connect_all(connections).await? {
            let told = told.clone();
            tasks.spawn(async move {
                for number in 1..=count as u64 {
                    // each entry has the number as its id, so that none is missed
                    let after = format!("{}-0", number - 1);
                    client.send(&[b"XREAD", b"BLOCK", b"0", b"STREAMS", FAN_OUT.as_bytes(), after.as_bytes()]).await?;
                    client.answer().await?;
                    told.send((number, Instant::now())).await?;
                }
                anyhow::Ok(client)
            });
        }
        let body = vec![0x5a; size];
        let mut deliveries = Vec::with_capacity(connections * count);
        for number in 1..=count as u64 {
            let id = format!("{number}-0");
            // those who have just heard ask again first
            tokio::time::sleep(PAUSE).await;
            let start = Instant::now();
            adding.send(&[b"XADD", FAN_OUT.as_bytes(), id.as_bytes(), b"e", &body]).await?;
            for _ in 0..connections {
                let hearing = tokio::time::timeout(PATIENCE, hearing.recv()).await.context("an entry is not read")?;
                let (heard, at) = hearing.context("nobody reads")?;
                ensure!(heard == number, "entry {heard} was read instead of {number}");
                deliveries.push(ms(at - start));
            }
            adding.answer().await?;
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(deliveries)
    }

    /// KiB that each of so many connections costs that says nothing.
    pub(super) async fn idle(&self, count: usize, rest: Duration) -> Result<f64> {
        let first = self.connect_all(OPENING).await?;
        tokio::time::sleep(rest).await;
        let before = resident_kib(self.child.id())?;
        let clients = self.connect_all(count.saturating_sub(first.len())).await?;
        tokio::time::sleep(rest).await;
        Ok((resident_kib(self.child.id())? - before) / clients.len() as f64)
    }
}

/// A connection.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    async fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        Ok(self.stream.write_all(&bytes).await?)
    }

    /// Reads an answer to its end.
    async fn answer(&mut self) -> Result<()> {
        let mut parts = 1_usize;
        while parts > 0 {
            let mut line = String::new();
            self.stream.read_line(&mut line).await?;
            let line = line.trim_end();
            let (kind, rest) = line.split_at_checked(1).context("Redis ended the connection")?;
            let length = || rest.parse::<usize>().ok().filter(|length| *length <= MAX_PART).context("no length");
            parts -= 1;
            match kind {
                "+" | ":" => {}
                "$" => {
                    let mut body = vec![0; length()? + 2];
                    self.stream.read_exact(&mut body).await?;
                }
                "*" => parts += length()?,
                _ => bail!("Redis answers: {line}"),
            }
        }
        Ok(())
    }
}
