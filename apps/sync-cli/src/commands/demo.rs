//! `syncshell demo`: two devices as two real processes, paired, killed and brought back.

use std::fmt::Display;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use sync_client::Network;

use crate::api;
use crate::api::Blob;
use crate::api::client::ApiClient;
use crate::backend::Backend;
use crate::exit::Failure;
use crate::follow::Follow;
use crate::output::Output;
use crate::signals::Stop;

/// Blobs pushed while the other device is down.
const BACKLOG: usize = 100;

/// How long a step may take: far more than it does on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks for a process that is starting.
const POLL: Duration = Duration::from_millis(20);

/// Show what this does: two devices on this machine, paired, one killed and brought back
///
/// Makes two throw-away homes and leaves them to look at. Uses nothing but the loopback network.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory to make the homes in, which must not exist; one for temporary files unless named
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Serialize)]
struct Step<'a> {
    step: &'a str,
    ms: u64,
    text: String,
}

#[derive(Serialize)]
struct End<'a> {
    ok: bool,
    ms: u64,
    dir: &'a Path,
    homes: [&'a Path; 2],
}

impl Args {
    pub(crate) async fn run(self, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let dir = self.make_dir()?;
        // the devices end with their guards, also when this is interrupted
        tokio::select! {
            result = show(&dir, out) => result,
            () = stop.requested() => {
                Err(Failure::new("demo", format!("the demo was broken off; its homes are in {}", dir.display())))
            }
        }
    }

    fn make_dir(&self) -> Result<PathBuf, Failure> {
        let Some(dir) = &self.dir else {
            let made = tempfile::Builder::new().prefix("syncshell-demo-").tempdir();
            return Ok(made.map_err(Failure::io("cannot make a directory for the homes"))?.keep());
        };
        std::fs::create_dir(dir).map_err(Failure::io(format!("cannot make {}", dir.display())))?;
        std::path::absolute(dir).map_err(Failure::io(format!("cannot use {}", dir.display())))
    }
}

async fn show(dir: &Path, out: Output) -> Result<(), Failure> {
    let started = Instant::now();
    let mut story = Story { out, last: started };
    let (mut anna, mut ben) = (Device::new(dir, "anna"), Device::new(dir, "ben"));
    anna.init()?;
    ben.init()?;
    story.tell("homes", format!("made two homes in {}, their keys in plain files, for show only", dir.display()))?;

    anna.start().await?;
    ben.start().await?;
    story.tell("start", format!("anna runs as process {}, ben as process {}", anna.pid(), ben.pid()))?;

    let invite = anna.client().invite("", None).await?;
    story.tell("invite", format!("anna makes a group and shows the code {}", invite.code))?;
    ben.client().join(&invite.code, |_| {}).await?;
    anna.client().outcome(&invite.id).await?;
    story.tell("join", "ben types the code and is in the group")?;

    hand_over(&anna, &ben, "hello ben").await?;
    story.tell("push", "anna pushes, and ben has it")?;
    hand_over(&ben, &anna, "hello anna").await?;
    story.tell("push-back", "ben pushes, and anna has it")?;

    survive(&mut anna, &mut ben, &mut story).await?;
    survive(&mut ben, &mut anna, &mut story).await?;

    let (annas, bens) = (anna.everything().await?, ben.everything().await?);
    check(annas.len() == 2 + 2 * BACKLOG, format!("anna has {} blobs", annas.len()))?;
    check(same(annas, bens), "anna and ben do not have the same blobs")?;
    story.tell("compare", format!("both have the same {} blobs, each once", 2 + 2 * BACKLOG))?;

    anna.stop().await?;
    ben.stop().await?;
    story.tell("stop", "both end in order")?;
    let end = End { ok: true, ms: millis(started.elapsed()), dir, homes: [&anna.home, &ben.home] };
    let text = format!(
        "\nall is well after {} ms; the homes are left to look at:\n  syncshell --home {} status\n  syncshell --home {} pull",
        end.ms,
        anna.home.display(),
        ben.home.display()
    );
    out.result(text, &end)
}

/// Kills one device, lets the other push meanwhile, and checks what arrives once it is back.
async fn survive(pusher: &mut Device, victim: &mut Device, story: &mut Story) -> Result<(), Failure> {
    let (pusher, name) = (&*pusher, victim.name);
    let before = victim.newest().await?;
    victim.kill()?;
    story.tell("kill", format!("{name} is killed as by kill -9"))?;

    let mut cursors = Vec::new();
    for number in 0..BACKLOG {
        cursors.push(pusher.push(&backlog(number)).await?);
    }
    let text = format!("{} pushes {BACKLOG} blobs meanwhile, each durable before the next", pusher.name);
    story.tell("push-while-down", text)?;

    victim.start().await?;
    story.tell("restart", format!("{name} runs again as process {}", victim.pid()))?;
    let arrived = victim.read(before, BACKLOG).await?;
    let in_order = arrived.iter().enumerate().all(|(number, blob)| blob.bytes == backlog(number).into_bytes());
    check(in_order, format!("the {BACKLOG} blobs did not reach {name} in order and once each"))?;
    story.tell("catch-up", format!("{name} has all {BACKLOG}, in order and once each"))?;

    let half = BACKLOG / 2;
    let rest = pusher.after(cursors[half - 1]).await?;
    let exact = rest.len() == BACKLOG - half
        && rest.iter().zip(half..).all(|(blob, number)| blob.bytes == backlog(number).into_bytes());
    check(exact, format!("pulling after the cursor of number {half} gave {} blobs", rest.len()))?;
    story.tell(
        "pull-after",
        format!("{} pulls after number {half} and gets exactly the other {}", pusher.name, rest.len()),
    )?;
    Ok(())
}

async fn hand_over(from: &Device, to: &Device, text: &str) -> Result<(), Failure> {
    let before = to.newest().await?;
    from.push(text).await?;
    let arrived = to.read(before, 1).await?;
    check(arrived.iter().all(|blob| blob.bytes == text.as_bytes()), format!("{} got something else", to.name))
}

fn backlog(number: usize) -> String {
    format!("blob {} of {BACKLOG}", number + 1)
}

/// Whether both hold the same blobs, in whatever order they arrived.
fn same(mut one: Vec<Blob>, mut other: Vec<Blob>) -> bool {
    for blobs in [&mut one, &mut other] {
        for blob in blobs.iter_mut() {
            blob.cursor = 0;
        }
        blobs.sort_by(|a, b| (&a.sender, &a.blob_id).cmp(&(&b.sender, &b.blob_id)));
    }
    one == other && one.windows(2).all(|pair| pair[0] != pair[1])
}

fn check(holds: bool, otherwise: impl Into<String>) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::new("demo", otherwise)) }
}

/// Tells the steps with the time each took.
struct Story {
    out: Output,
    last: Instant,
}

impl Story {
    fn tell(&mut self, step: &str, text: impl Display) -> Result<(), Failure> {
        let now = Instant::now();
        let ms = millis(now - self.last);
        self.last = now;
        let text = text.to_string();
        self.out.result(format!("{ms:>6} ms  {text}"), &Step { step, ms, text: text.clone() })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A device in a process of its own.
#[derive(Debug)]
struct Device {
    name: &'static str,
    home: PathBuf,
    log: PathBuf,
    runtime_dir: PathBuf,
    process: Option<Guard>,
    backend: Option<Backend>,
}

impl Device {
    fn new(dir: &Path, name: &'static str) -> Self {
        Self {
            name,
            home: dir.join(name),
            log: dir.join(format!("{name}.log")),
            runtime_dir: dir.join("run"),
            process: None,
            backend: None,
        }
    }

    /// This program, for this device, on the loopback network alone.
    fn command(&self) -> Result<Command, Failure> {
        let program = std::env::current_exe().map_err(Failure::io("cannot find this program"))?;
        let open =
            |result: std::io::Result<File>| result.map_err(Failure::io(format!("cannot write {}", self.log.display())));
        let log = open(File::options().create(true).append(true).open(&self.log))?;
        let mut command = Command::new(program);
        command
            .arg("--home")
            .arg(&self.home)
            .env("SYNCSHELL_BIND", "loopback")
            .env("SYNCSHELL_MDNS", "off")
            .env("SYNCSHELL_LAN", "off")
            .env("SYNCSHELL_SAME_MACHINE", "on")
            .env("SYNCSHELL_RUNTIME_DIR", &self.runtime_dir)
            .stdout(open(log.try_clone())?)
            .stderr(log);
        Ok(command)
    }

    fn init(&self) -> Result<(), Failure> {
        let made = self
            .command()?
            .args(["init", "--key-store", "file", "--name", self.name])
            .stdin(Stdio::null())
            .status()
            .map_err(Failure::io("cannot start this program"))?;
        check(made.success(), format!("the home of {} was not made; {} says why", self.name, self.log.display()))
    }

    async fn start(&mut self) -> Result<(), Failure> {
        let child = self
            .command()?
            .args(["run", "--until-eof"])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(Failure::io("cannot start this program"))?;
        let mut process = Guard(child);
        let network = Network { runtime_dir: Some(self.runtime_dir.clone()), ..Network::default() };
        let address = api::socket_path(&self.home, &network)?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(client) = ApiClient::find(&address).await? {
                self.backend = Some(Backend::Remote(client));
                self.process = Some(process);
                return Ok(());
            }
            let ended = process.0.try_wait().map_err(Failure::io("cannot watch a process"))?.is_some();
            let late = Instant::now() > give_up;
            check(!ended && !late, format!("{} did not start; {} says why", self.name, self.log.display()))?;
            tokio::time::sleep(POLL).await;
        }
    }

    fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.0.id())
    }

    /// Ends it without a chance to do anything about it.
    fn kill(&mut self) -> Result<(), Failure> {
        self.backend = None;
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.0.kill().and_then(|()| process.0.wait()).map(drop).map_err(Failure::io("cannot kill a process"))
    }

    /// Asks it to end and waits until it has.
    async fn stop(&mut self) -> Result<(), Failure> {
        self.client().stop().await?;
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let give_up = Instant::now() + PATIENCE;
        loop {
            match process.0.try_wait().map_err(Failure::io("cannot watch a process"))? {
                Some(status) => return check(status.success(), format!("{} ended with {status}", self.name)),
                None => check(Instant::now() < give_up, format!("{} does not end", self.name))?,
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn backend(&self) -> &Backend {
        self.backend.as_ref().expect("BUG: the device was started")
    }

    fn client(&self) -> &ApiClient {
        match self.backend() {
            Backend::Remote(client) => client,
            Backend::Local(_) => unreachable!("BUG: a device is a process of its own"),
        }
    }

    async fn push(&self, text: &str) -> Result<u64, Failure> {
        let id = super::push::draw_blob_id().to_string();
        Ok(self.client().push("", &id, text.as_bytes().to_vec()).await?.cursor)
    }

    /// The cursor after everything it has.
    async fn newest(&self) -> Result<u64, Failure> {
        let overview = self.client().overview().await?;
        Ok(overview.groups.first().map_or(0, |group| group.max_cursor))
    }

    /// Reads what comes after a cursor, waiting for it.
    async fn read(&self, after: u64, count: usize) -> Result<Vec<Blob>, Failure> {
        let read = async {
            let mut reader = Follow::new(self.backend(), "", after, true).await?;
            let mut blobs = Vec::new();
            while blobs.len() < count {
                blobs.extend(reader.next(count - blobs.len()).await?);
            }
            Ok(blobs)
        };
        tokio::time::timeout(PATIENCE, read).await.unwrap_or_else(|_| {
            let (name, seconds) = (self.name, PATIENCE.as_secs());
            Err(Failure::new("demo", format!("{name} did not get what was pushed within {seconds} s")))
        })
    }

    /// Reads what is there after a cursor.
    async fn after(&self, cursor: u64) -> Result<Vec<Blob>, Failure> {
        let mut reader = Follow::new(self.backend(), "", cursor, false).await?;
        let mut blobs = Vec::new();
        while let Some(blob) = reader.next(usize::MAX).await? {
            blobs.push(blob);
        }
        Ok(blobs)
    }

    async fn everything(&self) -> Result<Vec<Blob>, Failure> {
        self.after(0).await
    }
}

/// A process that is killed and reaped with this.
#[derive(Debug)]
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
