//! `cargo xtask interop`: an implementation of the protocol in another language talks to a relay that runs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::shell::{self, cargo};

/// The implementation and what it is made of.
const SCRIPT: &str = "testing/interop/interop.py";
const REQUIREMENTS: &str = "testing/interop/requirements.txt";
/// What a run that is to be kept said; tests of the noise and the relay replay it.
const VECTORS: &str = "servers/sync-relay/tests/vectors/channel.json";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Keep what was said as the vectors that tests replay
    #[arg(long)]
    record: bool,
    /// The Python that the virtual environment is made of
    #[arg(long, default_value = "python3", value_name = "PROGRAM")]
    python: PathBuf,
}

/// Builds the relay and two homes, and has a device in Python talk to them.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let build = ["build", "--package", "sync-relay", "--bin", "sync-relay", "--example", "interop_member"];
    shell::run(&mut cargo(root, build))?;
    let xtask = std::env::current_exe().context("cannot tell where this program lies")?;
    let built = xtask.parent().context("this program lies nowhere")?;
    let dir = built.join("interop");
    let python = environment(root, &dir, &args.python)?;

    let site = dir.join("site");
    if site.exists() {
        fs::remove_dir_all(&site).with_context(|| format!("cannot remove {}", site.display()))?;
    }
    fs::create_dir_all(&site).with_context(|| format!("cannot make {}", site.display()))?;
    let (_relay, url) = start(&program(&built.join("sync-relay")), &site.join("relay"))?;
    let mut homes = Command::new(program(&built.join("examples/interop_member")));
    let member = shell::output(homes.arg(&site).arg(&url))?;
    let (member_path, transcript) = (site.join("member.json"), site.join("transcript.json"));
    fs::write(&member_path, member).context("cannot write the member's keys")?;
    shell::run(Command::new(python).arg(root.join(SCRIPT)).arg(&url).arg(&member_path).arg(&transcript))?;
    if args.record {
        let vectors = root.join(VECTORS);
        fs::copy(&transcript, &vectors).with_context(|| format!("cannot write {}", vectors.display()))?;
        println!("interop: recorded {VECTORS}");
    }
    Ok(())
}

/// A virtual environment with what the script needs; made once.
fn environment(root: &Path, dir: &Path, python: &Path) -> Result<PathBuf> {
    let environment = dir.join("venv");
    let programs = environment.join(if cfg!(windows) { "Scripts" } else { "bin" });
    let made = environment.join("requirements.txt");
    let wanted = fs::read(root.join(REQUIREMENTS)).with_context(|| format!("cannot read {REQUIREMENTS}"))?;
    if fs::read(&made).is_ok_and(|made| made == wanted) {
        return Ok(program(&programs.join("python")));
    }
    shell::run(Command::new(python).args(["-m", "venv", "--clear"]).arg(&environment))?;
    let mut install = Command::new(program(&programs.join("python")));
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]);
    shell::run(install.arg(root.join(REQUIREMENTS)))?;
    fs::write(&made, wanted).with_context(|| format!("cannot write {}", made.display()))?;
    Ok(program(&programs.join("python")))
}

/// A program as this system names it.
fn program(path: &Path) -> PathBuf {
    path.with_extension(std::env::consts::EXE_EXTENSION)
}

/// A relay that ends with this value.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a relay on the loopback network; its address.
fn start(program: &Path, data: &Path) -> Result<(Relay, String)> {
    let log = File::create(data.with_extension("log")).context("cannot write the relay's log")?;
    let child = Command::new(program)
        .args(["--bind", "127.0.0.1:0", "--data"])
        .arg(data)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut relay = Relay(child);
    let said = relay.0.stdout.take().context("the relay has no output")?;
    let mut line = String::new();
    BufReader::new(said).read_line(&mut line).context("the relay says no address")?;
    ensure!(!line.is_empty(), "the relay ended at once; {} says why", data.with_extension("log").display());
    Ok((relay, line.trim().to_owned()))
}
