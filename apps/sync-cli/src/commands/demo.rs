//! `syncshell demo`: two devices as two real processes, paired by code, keep a folder in sync.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use getrandom::SysRng;
use indicatif::BinaryBytes;
use rand_core::{Rng as _, UnwrapErr};
use serde::Serialize;
use sync_client::Network;
use sync_client::folders::{Direction, FolderState, FolderStatus, RestoreTo};
use sync_types::folder::OWN_DIR;

use crate::api;
use crate::api::client::ApiClient;
use crate::api::{Blob, PlaceRequest, RestoreRequest};
use crate::backend::Backend;
use crate::exit::Failure;
use crate::follow::Follow;
use crate::output::Output;
use crate::signals::Stop;

/// Blobs pushed while the other device is down.
const BACKLOG: usize = 100;

/// Files and directories of the folder that is made where none is named.
const FILES: usize = 400;
const DIRECTORIES: usize = 20;

/// Bytes of the large file in it, and of the small ones at most.
const LARGE: usize = 64 << 20;
const SMALL: usize = 16 << 10;

/// A directory in the folder that the demo plays in, so that it also works in a folder of somebody's own.
const STAGE: &str = "syncshell demo";

/// Bytes that may travel where only what is said about a file should: far less than a file that is worth a look.
const WORDS: u64 = 256 << 10;

/// How long a step may take, or a transfer stand still: far more than either does on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a person takes at least to look at what arrived, before they change it.
const GLANCE: Duration = Duration::from_millis(500);

/// Time between two looks for what is to come.
const POLL: Duration = Duration::from_millis(20);

/// Show what this does: two devices on this machine keep a folder in sync
///
/// Makes two throw-away homes, pairs them by code and syncs a copy of FOLDER, or a folder made for
/// this: edits, renames and deletes on both sides, a conflict, a device that is killed and comes
/// back, and an old version restored. Leaves everything to look at. FOLDER itself is only read;
/// nothing but the loopback network is used.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory to copy and sync; twice its size is needed for temporary files
    folder: Option<PathBuf>,

    /// Directory to make everything in, which must not exist; one for temporary files unless named
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
    folders: [&'a Path; 2],
    files: u64,
    bytes: u64,
    /// Of the first sync.
    bytes_per_second: u64,
}

impl Args {
    pub(crate) async fn run(self, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let dir = self.make_dir()?;
        // the devices end with their guards, also when this is interrupted
        tokio::select! {
            result = show(&dir, self.folder.as_deref(), out) => {
                result.map_err(|failure| {
                    let left = format!("; everything is left in {}", dir.display());
                    Failure { message: failure.message + &left, ..failure }
                })
            }
            () = stop.requested() => {
                Err(Failure::new("demo", format!("the demo was broken off; everything is left in {}", dir.display())))
            }
        }
    }

    fn make_dir(&self) -> Result<PathBuf, Failure> {
        let Some(dir) = &self.dir else {
            let made = tempfile::Builder::new().prefix("syncshell-demo-").tempdir();
            return Ok(made.map_err(Failure::io("cannot make a directory for the homes"))?.keep());
        };
        fs::create_dir(dir).map_err(Failure::io(format!("cannot make {}", dir.display())))?;
        std::path::absolute(dir).map_err(Failure::io(format!("cannot use {}", dir.display())))
    }
}

async fn show(dir: &Path, folder: Option<&Path>, out: Output) -> Result<(), Failure> {
    let started = Instant::now();
    let mut story = Story { out, last: started };
    let (mut anna, mut ben) = (Device::new(dir, "anna"), Device::new(dir, "ben"));
    prepare(folder, anna.files.clone()).await?;
    story.tell(
        "folder",
        match folder {
            Some(folder) => format!("copied {} to {}", folder.display(), anna.files.display()),
            None => format!("made a folder of {FILES} files in {}", anna.files.display()),
        },
    )?;
    anna.init()?;
    ben.init()?;
    story.tell("homes", "made two homes, their keys in plain files, for show only")?;
    anna.start().await?;
    ben.start().await?;
    story.tell("start", format!("anna runs as process {}, ben as process {}", anna.pid(), ben.pid()))?;

    let bytes_per_second = pair(&mut anna, &mut ben, &mut story).await?;
    edit(&anna, &ben, &mut story).await?;
    move_large(&anna, &ben, &mut story).await?;
    restore(&anna, &ben, &mut story).await?;
    part(&anna, &mut ben, &mut story).await?;

    settle(&anna, &ben).await?;
    let (annas, bens) = (tree(&anna.files).await?, tree(&ben.files).await?);
    check(annas == bens, "the two folders are not equal in the end")?;
    let FolderStatus { files, bytes, .. } = ben.folder().await?;
    let text = format!("both folders hold the same {} files, directories and links, byte for byte", annas.len());
    story.tell("compare", text)?;

    anna.stop().await?;
    ben.stop().await?;
    story.tell("stop", "both end in order")?;
    let end = End {
        ok: true,
        ms: millis(started.elapsed()),
        dir,
        homes: [&anna.home, &ben.home],
        folders: [&anna.files, &ben.files],
        files,
        bytes,
        bytes_per_second,
    };
    let text = format!(
        "\nall is well after {} ms: {} files, {}, first synced at {}/s\nleft to look at:\n  {}\n  {}\n  syncshell --home {} status",
        end.ms,
        files,
        BinaryBytes(bytes),
        BinaryBytes(bytes_per_second),
        anna.files.display(),
        ben.files.display(),
        anna.home.display(),
    );
    out.result(text, &end)
}

/// Shares the folder, lets the other in by code, and waits until both are equal. Returns the rate.
async fn pair(anna: &mut Device, ben: &mut Device, story: &mut Story) -> Result<u64, Failure> {
    let request = |path: &Path| PlaceRequest { path: path.to_owned(), name: None, direction: Direction::Both };
    let shared = anna.client().share("", request(&anna.files)).await?;
    anna.folder_id.clone_from(&shared.id);
    let invite = anna.client().invite(&shared.group, None, &[], None).await?;
    story.tell("share", format!("anna shares the folder and shows the code {}", invite.code))?;

    let group = ben.client().join(&invite.code, &[], |_| {}).await?.group;
    anna.client().outcome(&invite.id).await?;
    let offered = ben.client().offered(&group, PATIENCE).await?.offered;
    let offered = offered.first().ok_or_else(|| Failure::new("demo", "ben was not told of the folder"))?;
    ben.folder_id.clone_from(&offered.id);
    let began = Instant::now();
    ben.client().place(&group, &offered.id, request(&ben.files)).await?;
    story.tell("join", "ben types the code and says where to put it")?;

    settle(anna, ben).await?;
    let took = began.elapsed().saturating_sub(GLANCE);
    let (annas, bens) = (tree(&anna.files).await?, tree(&ben.files).await?);
    check(annas == bens, "the two folders are not equal after the first sync")?;
    let FolderStatus { files, bytes, .. } = ben.folder().await?;
    let rate = per_second(bytes, took);
    let text = format!(
        "ben has all of it: {files} files, {}, in {} ms, {}/s",
        BinaryBytes(bytes),
        took.as_millis(),
        BinaryBytes(rate)
    );
    story.tell("first-sync", text)?;
    Ok(rate)
}

/// Small changes on both sides, each waited for on the other.
async fn edit(anna: &Device, ben: &Device, story: &mut Story) -> Result<(), Failure> {
    let stage = anna.files.join(STAGE);
    fs::create_dir(&stage).map_err(Failure::io(format!("cannot make {}", stage.display())))?;
    for (name, text) in [("notes.txt", "bread\n"), ("old.txt", "to be deleted\n"), ("plan.txt", "first plan\n")] {
        anna.write(name, text)?;
    }
    for name in ["notes.txt", "old.txt", "plan.txt"] {
        ben.sees(name, |there| there.is_some()).await?;
    }
    story.tell("create", "anna makes a directory with three files, and ben has them")?;

    settle(anna, ben).await?;
    ben.write("notes.txt", "bread\nbutter\n")?;
    anna.sees("notes.txt", |there| there == Some("bread\nbutter\n")).await?;
    story.tell("edit", "ben edits one, and anna has the change")?;

    settle(anna, ben).await?;
    let stage = ben.files.join(STAGE);
    fs::create_dir(stage.join("shop")).map_err(Failure::io("cannot make a directory"))?;
    fs::rename(stage.join("notes.txt"), stage.join("shop").join("list.txt")).map_err(Failure::io("cannot rename"))?;
    anna.sees("shop/list.txt", |there| there.is_some()).await?;
    anna.sees("notes.txt", |there| there.is_none()).await?;
    story.tell("rename", "ben moves it into a new directory, and so it is at anna's")?;

    settle(anna, ben).await?;
    fs::remove_file(anna.files.join(STAGE).join("old.txt")).map_err(Failure::io("cannot delete"))?;
    ben.sees("old.txt", |there| there.is_none()).await?;
    story.tell("delete", "anna deletes another, and it is gone at ben's")
}

/// Moves the largest file, then changes a little of it: neither moves the file again.
async fn move_large(anna: &Device, ben: &Device, story: &mut Story) -> Result<(), Failure> {
    let Some((path, size)) = largest(&anna.files).await? else { return Ok(()) };
    if size < 4 * WORDS {
        return Ok(());
    }
    settle(anna, ben).await?;
    let before = ben.folder().await?.fetched_bytes;
    let moved = anna.files.join(STAGE).join("moved");
    fs::rename(&path, &moved).map_err(Failure::io(format!("cannot move {}", path.display())))?;
    let there = ben.files.join(STAGE).join("moved");
    ben.waits(|| Ok(there.metadata().is_ok_and(|metadata| metadata.len() == size)), "the moved file").await?;
    settle(anna, ben).await?;
    let fetched = ben.folder().await?.fetched_bytes - before;
    check(fetched < WORDS, format!("moving a file of {size} bytes moved {fetched} bytes of content"))?;
    story.tell("move-large", format!("anna moves a file of {}; {fetched} bytes of it travel", BinaryBytes(size)))?;

    insert(&moved, b"a few new bytes", size / 2).map_err(Failure::io(format!("cannot change {}", moved.display())))?;
    let size = size + 15;
    ben.waits(|| Ok(there.metadata().is_ok_and(|metadata| metadata.len() == size)), "the changed file").await?;
    settle(anna, ben).await?;
    let fetched = ben.folder().await?.fetched_bytes - before - fetched;
    story.tell("insert", format!("anna inserts a few bytes in its middle; {} of it travel", BinaryBytes(fetched)))
}

/// Brings back what the other one overwrote.
async fn restore(anna: &Device, ben: &Device, story: &mut Story) -> Result<(), Failure> {
    settle(anna, ben).await?;
    ben.write("plan.txt", "second plan\n")?;
    anna.sees("plan.txt", |there| there == Some("second plan\n")).await?;
    let path = format!("{STAGE}/plan.txt");
    settle(anna, ben).await?;
    let kept = anna.client().versions(&anna.folder_id, &path).await?.versions;
    let newest = kept.first().ok_or_else(|| Failure::new("demo", "anna has kept no version of what ben overwrote"))?;
    let request = RestoreRequest { path, version: newest.version.clone(), to: RestoreTo::Place };
    anna.client().restore(&anna.folder_id, request).await?;
    for device in [anna, ben] {
        device.sees("plan.txt", |there| there == Some("first plan\n")).await?;
    }
    story.tell("restore", "ben overwrites a file, anna restores the version before, and both have it again")
}

/// Kills one device, has both change the same file meanwhile, and checks what happens once it is back.
async fn part(anna: &Device, ben: &mut Device, story: &mut Story) -> Result<(), Failure> {
    settle(anna, ben).await?;
    let before = ben.newest().await?;
    ben.kill()?;
    story.tell("kill", "ben is killed as by kill -9")?;

    anna.write("plan.txt", "anna's plan\n")?;
    ben.write("plan.txt", "ben's plan\n")?;
    for number in 0..BACKLOG {
        anna.push(&backlog(number)).await?;
    }
    let text = format!("both change the same file meanwhile, and anna pushes {BACKLOG} blobs of an app");
    story.tell("change-while-down", text)?;

    ben.start().await?;
    story.tell("restart", format!("ben runs again as process {}", ben.pid()))?;
    let arrived = ben.read(before, BACKLOG).await?;
    let in_order = arrived.iter().enumerate().all(|(number, blob)| blob.bytes == backlog(number).into_bytes());
    check(in_order, format!("the {BACKLOG} blobs did not reach ben in order and once each"))?;
    story.tell("catch-up", format!("ben has all {BACKLOG} blobs, in order and once each"))?;

    let both = ["anna's plan\n".to_owned(), "ben's plan\n".to_owned()];
    let mut name = String::new();
    for device in [anna, &*ben] {
        let stage = device.files.join(STAGE);
        let found = || {
            let mut plans = plans(&stage)?;
            name = plans.keys().find(|name| name.contains("(conflict ")).cloned().unwrap_or_default();
            let mut texts: Vec<String> = std::mem::take(&mut plans).into_values().collect();
            texts.sort_unstable();
            Ok(texts == both)
        };
        device.waits(found, "both plans").await?;
    }
    story.tell("conflict", format!("both plans are kept on both sides, one as {name:?}"))
}

/// Files that hold a plan, by name.
fn plans(stage: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut plans = BTreeMap::new();
    for entry in fs::read_dir(stage)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("plan") {
            plans.insert(name, fs::read_to_string(entry.path())?);
        }
    }
    Ok(plans)
}

/// Waits until nothing is to be done on either side and both count the same.
async fn settle(anna: &Device, ben: &Device) -> Result<(), Failure> {
    let mut last = None;
    let mut give_up = Instant::now() + PATIENCE;
    loop {
        let (one, other) = (anna.folder().await?, ben.folder().await?);
        for (name, folder) in [(anna.name, &one), (ben.name, &other)] {
            let problem = folder.problem.as_deref().unwrap_or_default();
            check(folder.state != FolderState::Stopped, format!("{name}: {problem}"))?;
        }
        let done = [&one, &other].map(|folder| folder.state == FolderState::UpToDate);
        if done == [true, true] && (one.files, one.bytes) == (other.files, other.bytes) && other.files > 0 {
            tokio::time::sleep(GLANCE).await;
            return Ok(());
        }
        let now = Some((one.scanned_files, one.files, other.files, other.pending_bytes, other.fetched_bytes));
        if now != last {
            last = now;
            give_up = Instant::now() + PATIENCE;
        }
        if Instant::now() > give_up {
            let problems = one.problems.iter().chain(&other.problems);
            let why: Vec<_> = problems.map(|each| format!("{}: {}", each.path, each.problem)).collect();
            let message = format!("nothing has moved for {} s; {}", PATIENCE.as_secs(), why.join("; "));
            return Err(Failure::new("demo", message));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Copies the folder, or makes one.
async fn prepare(folder: Option<&Path>, to: PathBuf) -> Result<(), Failure> {
    let Some(from) = folder else {
        let what = format!("cannot make {}", to.display());
        return blocking(move || make_files(&to)).await.map_err(Failure::io(what));
    };
    let what = format!("cannot copy {}", from.display());
    let from = fs::canonicalize(from).map_err(Failure::io(&what))?;
    if to.starts_with(&from) {
        return Err(Failure::usage("the directory for the demo is in the folder to copy; choose another with --dir"));
    }
    blocking(move || copy_tree(&from, &to)).await.map_err(Failure::io(what))
}

fn make_files(to: &Path) -> io::Result<()> {
    let mut rng = UnwrapErr(SysRng);
    let mut bytes = vec![0; LARGE];
    rng.fill_bytes(&mut bytes);
    fs::create_dir(to)?;
    fs::write(to.join("large"), &bytes)?;
    for directory in 0..DIRECTORIES {
        fs::create_dir(to.join(format!("directory {directory}")))?;
    }
    for file in 0..FILES {
        let from = file * SMALL;
        let content = &bytes[from..from + SMALL * (file + 1) / FILES];
        fs::write(to.join(format!("directory {}", file % DIRECTORIES)).join(format!("file {file}")), content)?;
    }
    fs::create_dir(to.join("empty"))
}

/// Copies files, directories and links; what else there is cannot be synced.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let mut left = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = left.pop() {
        fs::create_dir(&to)?;
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            let (kind, to) = (entry.file_type()?, to.join(entry.file_name()));
            if kind.is_dir() && entry.file_name() != OWN_DIR {
                left.push((entry.path(), to));
            } else if kind.is_file() {
                fs::copy(entry.path(), &to)?;
            } else if kind.is_symlink() {
                copy_link(&entry.path(), &to)?;
            }
        }
    }
    Ok(())
}

#[cfg(unix)]
fn copy_link(from: &Path, to: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(fs::read_link(from)?, to)
}

#[cfg(not(unix))]
fn copy_link(_from: &Path, _to: &Path) -> io::Result<()> {
    // making one takes a right that few users have
    Ok(())
}

/// What is in a folder, by path: the hash of a file, the text of a link.
async fn tree(root: &Path) -> Result<BTreeMap<PathBuf, String>, Failure> {
    let (root, what) = (root.to_owned(), format!("cannot read {}", root.display()));
    let read = move || {
        let mut found = BTreeMap::new();
        walk(&root, |path, kind| {
            let content = if kind.is_dir() {
                "directory".to_owned()
            } else if kind.is_symlink() {
                format!("link to {}", fs::read_link(path)?.display())
            } else {
                let mut hasher = blake3::Hasher::new();
                hasher.update_reader(File::open(path)?)?;
                hasher.finalize().to_string()
            };
            found.insert(path.strip_prefix(&root).unwrap_or(path).to_owned(), content);
            Ok(())
        })?;
        Ok(found)
    };
    blocking(read).await.map_err(Failure::io(what))
}

/// The largest file of a folder.
async fn largest(root: &Path) -> Result<Option<(PathBuf, u64)>, Failure> {
    let (root, what) = (root.to_owned(), format!("cannot read {}", root.display()));
    let read = move || {
        let mut largest: Option<(PathBuf, u64)> = None;
        walk(&root, |path, kind| {
            let size = if kind.is_file() { path.metadata()?.len() } else { 0 };
            if size > largest.as_ref().map_or(0, |(_, size)| *size) {
                largest = Some((path.to_owned(), size));
            }
            Ok(())
        })?;
        Ok(largest)
    };
    blocking(read).await.map_err(Failure::io(what))
}

fn walk(root: &Path, mut visit: impl FnMut(&Path, fs::FileType) -> io::Result<()>) -> io::Result<()> {
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name() == OWN_DIR {
                continue;
            }
            let kind = entry.file_type()?;
            visit(&entry.path(), kind)?;
            if kind.is_dir() {
                left.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Rewrites a file with something in its middle, as an editor does.
fn insert(path: &Path, what: &[u8], at: u64) -> io::Result<()> {
    use std::io::{Read as _, Write as _};

    let old = File::open(path)?;
    let beside = path.with_extension("new");
    let mut new = io::BufWriter::new(File::create(&beside)?);
    io::copy(&mut (&old).take(at), &mut new)?;
    new.write_all(what)?;
    io::copy(&mut &old, &mut new)?;
    new.flush()?;
    fs::rename(beside, path)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    bytes.saturating_mul(1000) / millis(took).max(1)
}

fn backlog(number: usize) -> String {
    format!("blob {} of {BACKLOG}", number + 1)
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
    /// Its folder.
    files: PathBuf,
    folder_id: String,
    log: PathBuf,
    runtime_dir: PathBuf,
    process: Option<Guard>,
    backend: Option<Backend>,
}

impl Device {
    fn new(dir: &Path, name: &'static str) -> Self {
        Self {
            name,
            home: dir.join(format!("{name}-home")),
            files: dir.join(name),
            folder_id: String::new(),
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
            .env("SYNCSHELL_PUBLIC_RELAYS", "off")
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

    async fn folder(&self) -> Result<FolderStatus, Failure> {
        let folders = self.client().folders().await?.folders;
        let folder = folders.into_iter().find(|folder| folder.id == self.folder_id);
        folder.ok_or_else(|| Failure::new("demo", format!("{} does not have the folder any more", self.name)))
    }

    /// Writes a file on the stage.
    fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.files.join(STAGE).join(name);
        fs::write(&path, text).map_err(Failure::io(format!("cannot write {}", path.display())))
    }

    /// Waits until a file on the stage is as it should be.
    async fn sees(&self, name: &str, mut right: impl FnMut(Option<&str>) -> bool) -> Result<(), Failure> {
        let path = self.files.join(STAGE).join(name);
        let look = || match fs::read_to_string(&path) {
            Ok(text) => Ok(right(Some(&text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(right(None)),
            Err(error) => Err(error),
        };
        self.waits(look, name).await
    }

    /// Waits until something is so.
    async fn waits(&self, mut is_so: impl FnMut() -> io::Result<bool>, what: &str) -> Result<(), Failure> {
        let give_up = Instant::now() + PATIENCE;
        while !is_so().map_err(Failure::io(format!("cannot look at {what}")))? {
            let late = Instant::now() > give_up;
            check(!late, format!("{} did not get {what} within {} s", self.name, PATIENCE.as_secs()))?;
            tokio::time::sleep(POLL).await;
        }
        Ok(())
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
