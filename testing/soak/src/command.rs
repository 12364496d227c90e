//! Homes of the real command, driven as a script drives them: processes, their output as JSON, signals.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// How long one command may take: far more than it does on a slow and busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Time between two looks whether a process has ended.
const POLL: Duration = Duration::from_millis(2);

/// Lines of a command that wait to be read: it says a handful in all.
const LINES: usize = 64;

/// Bytes of a log that are shown with an error.
const TAIL: i64 = 2000;

/// The command, and the directory by which homes on this machine find each other.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    runtime: PathBuf,
}

impl Program {
    /// The command at a path, or else the one in the directory of the program that runs.
    pub fn find(path: Option<&Path>, runtime: PathBuf) -> Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => {
                let this = std::env::current_exe().context("cannot tell where this program lies")?;
                this.with_file_name(format!("syncshell{}", std::env::consts::EXE_SUFFIX))
            }
        };
        ensure!(
            path.is_file(),
            "{} is missing; `cargo build --release --package sync-cli` makes it, --command names another",
            path.display()
        );
        Ok(Self { path, runtime })
    }

    /// What it calls itself.
    pub fn version(&self) -> Result<String> {
        let output = Command::new(&self.path).arg("--version").output().context("cannot start the command")?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// The command on a home, on the loopback network only, whatever the environment says.
    fn on(&self, home: &Path) -> Command {
        self.dressed(Command::new(&self.path), home)
    }

    /// The command on a home, started by another program.
    fn under(&self, mut tracer: Command, home: &Path) -> Command {
        tracer.arg(&self.path);
        self.dressed(tracer, home)
    }

    fn dressed(&self, mut command: Command, home: &Path) -> Command {
        for name in ["SYNCSHELL_HOME", "SYNCSHELL_SAME_MACHINE", "SYNCSHELL_LOG"] {
            command.env_remove(name);
        }
        command
            .env("SYNCSHELL_BIND", "loopback")
            .env("SYNCSHELL_MDNS", "off")
            .env("SYNCSHELL_LAN", "off")
            .env("SYNCSHELL_PUBLIC_RELAYS", "off")
            .env("SYNCSHELL_RUNTIME_DIR", &self.runtime)
            .arg("--home")
            .arg(home)
            .arg("--json")
            .stdin(Stdio::null());
        command
    }
}

/// What a home says of a folder, as far as it is asked here.
#[derive(Debug, Clone, Deserialize)]
pub struct Folder {
    /// What it does; `up-to-date` when nothing is pending.
    pub state: String,
    /// Why it is stopped.
    pub problem: Option<String>,
    /// Files, directories and links that exist.
    pub files: u64,
    /// Paths that differ from what the group says.
    pub pending_files: u64,
    /// Milliseconds of the last whole scan.
    #[serde(default)]
    pub scan_ms: Option<u64>,
    /// Bytes of chunks fetched since the start.
    #[serde(default)]
    pub fetched_bytes: u64,
    /// Bytes taken from files that were here since the start.
    #[serde(default)]
    pub reused_bytes: u64,
    /// Paths that are not in sync, and why.
    #[serde(default)]
    pub problems: Vec<Value>,
}

impl Folder {
    /// Whether it says that there is nothing to do.
    #[must_use]
    pub fn is_up_to_date(&self) -> bool {
        self.state == "up-to-date" && self.pending_files == 0
    }
}

/// A home, and the process that serves it, which ends with this value.
#[derive(Debug)]
pub struct Home {
    program: Program,
    dir: PathBuf,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Its end tells the process to end in order.
    input: ChildStdin,
}

impl Home {
    /// Makes a home in a directory that does not exist yet.
    pub fn init(program: &Program, dir: PathBuf, name: &str) -> Result<Self> {
        let home = Self { program: program.clone(), dir, running: None };
        home.ask(&["init", "--name", name, "--key-store", "file"], &[], PATIENCE)?;
        Ok(home)
    }

    /// What the serving process has written, its errors last.
    #[must_use]
    pub fn log(&self) -> [PathBuf; 2] {
        [self.dir.with_extension("out"), self.dir.with_extension("err")]
    }

    /// Serves it, and waits until that is so.
    pub fn start(&mut self) -> Result<()> {
        self.serve(self.program.on(&self.dir))
    }

    /// Serves it as the child of another program, which ends with it; waits until that is so.
    pub fn start_under(&mut self, tracer: Command) -> Result<()> {
        self.serve(self.program.under(tracer, &self.dir))
    }

    fn serve(&mut self, mut command: Command) -> Result<()> {
        ensure!(self.running.is_none(), "the home is served already");
        let [out, err] = self.log();
        let append = |path: &Path| {
            let opened = File::options().append(true).create(true).open(path);
            opened.with_context(|| format!("cannot open {}", path.display()))
        };
        let (out_file, err_file) = (append(&out)?, append(&err)?);
        let before = out_file.metadata()?.len();
        let mut child = command
            .args(["run", "--until-eof"])
            .stdin(Stdio::piped())
            .stdout(out_file)
            .stderr(err_file)
            .spawn()
            .context("cannot start the command")?;
        let input = child.stdin.take().context("no way to the process")?;
        self.running = Some(Running { child, input });
        let deadline = Instant::now() + PATIENCE;
        while !serves(&out, before)? {
            if let Some(status) = self.has_ended()? {
                bail!("`run` ended with {status}: {}", tail(&err));
            }
            ensure!(Instant::now() < deadline, "`run` does not begin to serve: {}", tail(&err));
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// The serving process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.child.id())
    }

    /// How the serving process ended, if it did so by itself.
    pub fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.running {
            Some(running) => Ok(running.child.try_wait()?),
            None => Ok(None),
        }
    }

    /// Ends the serving process as `kill -9` does.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut running) = self.running.take() {
            running.child.kill()?;
            running.child.wait()?;
        }
        Ok(())
    }

    /// Ends the serving process in order.
    pub fn stop(&mut self) -> Result<()> {
        let Some(Running { mut child, input }) = self.running.take() else { return Ok(()) };
        drop(input);
        let Some(status) = wait(&mut child, PATIENCE)? else {
            child.kill()?;
            child.wait()?;
            bail!("`run` did not end within {} s: {}", PATIENCE.as_secs(), tail(&self.log()[1]));
        };
        ensure!(status.success(), "`run` ended with {status}: {}", tail(&self.log()[1]));
        Ok(())
    }

    /// Shares a directory and makes an invite to it.
    pub fn share(&self, folder: &Path) -> Result<Invitation> {
        self.invitation(&["share"], &[folder])
    }

    /// Makes another invite to the group.
    pub fn invite(&self) -> Result<Invitation> {
        self.invitation(&["invite"], &[])
    }

    /// Joins by a code and puts the folder into a directory.
    pub fn join(&self, code: &str, folder: &Path) -> Result<()> {
        self.ask(&["join", code], &[folder], PATIENCE).map(drop)
    }

    /// Stops a folder for a while, or goes on.
    pub fn pause(&self, folder: &Path, paused: bool) -> Result<()> {
        self.ask(&[if paused { "pause" } else { "resume" }], &[folder], PATIENCE).map(drop)
    }

    /// Walks the whole folder, and waits for the end.
    pub fn rescan(&self, folder: &Path) -> Result<()> {
        self.ask(&["rescan"], &[folder], PATIENCE).map(drop)
    }

    /// What it says of its one folder; none while it has none.
    pub fn folder(&self) -> Result<Option<Folder>> {
        let lines = self.ask(&["status"], &[], PATIENCE)?;
        let status = lines.into_iter().next().context("`status` said nothing")?;
        let folders = status.get("folders").cloned().context("`status` says nothing of folders")?;
        let folders: Vec<Folder> = serde_json::from_value(folders).context("`status` describes a folder otherwise")?;
        Ok(folders.into_iter().next())
    }

    /// Runs a verb to its end; the objects it printed.
    fn ask(&self, words: &[&str], paths: &[&Path], limit: Duration) -> Result<Vec<Value>> {
        let verb = words.first().copied().unwrap_or_default();
        let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut child = self
            .program
            .on(&self.dir)
            .args(words)
            .args(paths)
            .stdout(out.try_clone()?)
            .stderr(err.try_clone()?)
            .spawn()
            .context("cannot start the command")?;
        let status = wait(&mut child, limit)?;
        if status.is_none() {
            child.kill()?;
            child.wait()?;
        }
        let (mut said, mut complaint) = (String::new(), String::new());
        out.seek(SeekFrom::Start(0))?;
        out.read_to_string(&mut said)?;
        err.seek(SeekFrom::Start(0))?;
        err.read_to_string(&mut complaint)?;
        match status {
            Some(status) if status.success() => {}
            Some(status) => bail!("`{verb}` ended with {status}: {}", complaint.trim()),
            None => bail!("`{verb}` did not end within {} s: {}", limit.as_secs(), complaint.trim()),
        }
        let lines = said.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        lines.with_context(|| format!("`{verb}` printed no JSON: {said}"))
    }

    fn invitation(&self, words: &[&str], paths: &[&Path]) -> Result<Invitation> {
        let verb = words.first().copied().unwrap_or_default().to_owned();
        let err = tempfile::tempfile()?;
        let mut child = self
            .program
            .on(&self.dir)
            .args(words)
            .args(paths)
            .stdout(Stdio::piped())
            .stderr(err.try_clone()?)
            .spawn()
            .context("cannot start the command")?;
        let out = BufReader::new(child.stdout.take().context("no way from the process")?);
        let (sender, lines) = sync_channel(LINES);
        thread::spawn(move || {
            for line in out.lines() {
                let parsed = line.map_err(anyhow::Error::from).and_then(|line| Ok(serde_json::from_str(&line)?));
                if sender.send(parsed).is_err() {
                    return;
                }
            }
        });
        let mut invitation = Invitation { verb, child, lines, err, code: String::new() };
        while invitation.code.is_empty() {
            let line = invitation.line()?;
            if let Some(code) = line.get("code").and_then(Value::as_str) {
                invitation.code = code.to_owned();
            }
        }
        Ok(invitation)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // nobody is left who could be told
        let _ = self.kill();
    }
}

/// An invite that a process shows until someone has joined by it.
#[derive(Debug)]
pub struct Invitation {
    verb: String,
    child: Child,
    lines: Receiver<Result<Value>>,
    err: File,
    code: String,
}

impl Invitation {
    /// What the joiner types.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.code
    }

    /// Waits until someone has joined and the command has ended.
    pub fn joined(mut self) -> Result<()> {
        loop {
            let line = self.line()?;
            let says = |field: &str| line.get(field).and_then(Value::as_str) == Some("joined");
            if says("event") || says("outcome") {
                break;
            }
        }
        match wait(&mut self.child, PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("`{}` ended with {status}: {}", self.verb, self.complaint()),
            None => bail!("`{}` goes on after the join although `run` serves the home", self.verb),
        }
    }

    fn line(&self) -> Result<Value> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(_) => bail!("`{}` said no more: {}", self.verb, self.complaint()),
        }
    }

    fn complaint(&self) -> String {
        let (mut err, mut text) = (&self.err, String::new());
        // an error here would hide the one that is told
        let _ = err.seek(SeekFrom::Start(0)).and_then(|_| err.read_to_string(&mut text));
        text.trim().to_owned()
    }
}

impl Drop for Invitation {
    fn drop(&mut self) {
        // it has ended, or nobody waits for it any more
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Whether a `run` whose output begins here has said that it serves.
fn serves(out: &Path, from: u64) -> Result<bool> {
    let mut file = File::open(out)?;
    file.seek(SeekFrom::Start(from))?;
    let mut line = String::new();
    BufReader::new(file).read_line(&mut line)?;
    Ok(line.ends_with('\n') && line.contains(r#""event":"serving""#))
}

/// The end of a log, for a message.
fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let len = i64::try_from(file.metadata()?.len()).unwrap_or(i64::MAX);
        file.seek(SeekFrom::End(-len.min(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_command_is_said_with_what_makes_it() {
        let error = Program::find(Some(Path::new("no-such-command")), PathBuf::new()).expect_err("no command");
        assert!(error.to_string().contains("cargo build --release --package sync-cli"), "{error}");
    }

    #[test]
    fn a_process_serves_once_it_has_said_so_in_a_whole_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("out");
        for (text, expected) in [
            ("", false),
            (r#"{"event":"serving""#, false),
            ("{\"event\":\"serving\"}\n", true),
            ("{\"event\":\"connected\"}\n", false),
        ] {
            std::fs::write(&out, format!("old\n{text}")).expect("written");
            assert_eq!(serves(&out, 4).expect("read"), expected, "{text}");
        }
    }

    #[test]
    fn a_status_of_a_later_version_is_read() {
        let json = r#"{"state":"up-to-date","problem":null,"files":3,"pending_files":0,"colour":"blue"}"#;
        let folder: Folder = serde_json::from_str(json).expect("a status");
        assert!(folder.is_up_to_date());
        assert!(!Folder { pending_files: 1, ..folder.clone() }.is_up_to_date());
        assert!(!Folder { state: "scanning".into(), ..folder }.is_up_to_date());
    }
}
