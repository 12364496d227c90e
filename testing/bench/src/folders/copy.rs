//! The tools that copy or walk a tree on one machine, and what files are made with.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::table::Tool;
use crate::machine;

/// The tools that are here, by their versions.
#[derive(Debug)]
pub(crate) struct Tools {
    alone: bool,
    /// Syncthing.
    pub(crate) syncthing: Option<String>,
    rsync: Option<String>,
    cp: Option<String>,
}

impl Tools {
    /// Asks each for its version; none if ours are to be measured alone.
    pub(crate) fn find(alone: bool) -> Self {
        let version = |tool: &str| if alone { None } else { version(tool) };
        Self { alone, syncthing: version("syncthing"), rsync: version("rsync"), cp: version("cp") }
    }

    /// What they call themselves.
    pub(crate) fn versions(&self) -> String {
        let found: Vec<&str> =
            [&self.syncthing, &self.rsync, &self.cp].into_iter().flatten().map(String::as_str).collect();
        if found.is_empty() { "no others".to_owned() } else { found.join("; ") }
    }

    /// A line for each that is missing.
    pub(crate) fn missing(&self) -> Vec<String> {
        let missing =
            |(name, version): &(&str, &Option<String>)| (!self.alone && version.is_none()).then(|| name.to_string());
        let tools = [("syncthing", &self.syncthing), ("rsync", &self.rsync)];
        let line = |name| format!("{name} is missing, so its column is: `apt-get install {name}` brings it");
        tools.iter().filter_map(missing).map(line).collect()
    }

    /// Seconds of a local copy by each tool that is here, each into a directory of its own in `to`, which is made.
    pub(crate) fn copy(&self, from: &Path, to: &Path) -> Result<Vec<(Tool, f64)>> {
        fs::create_dir(to)?;
        let mut took = Vec::new();
        // with the slash rsync copies what is in the directory, as cp does to a name that is not there
        let inside = format!("{}/", from.display());
        for (tool, here, program, source) in
            [(Tool::Rsync, &self.rsync, "rsync", inside.as_ref()), (Tool::Cp, &self.cp, "cp", from)]
        {
            if here.is_none() {
                continue;
            }
            machine::settle_disk();
            let seconds = run(Command::new(program).arg("-a").arg(source).arg(to.join(program)))?;
            took.push((tool, seconds));
        }
        Ok(took)
    }
}

/// Seconds of a walk that prints what a scan compares; none without GNU find.
pub(crate) fn find(tree: &Path) -> Result<Option<f64>> {
    if version("find").is_none() {
        return Ok(None);
    }
    run(Command::new("find").arg(tree).args(["-printf", "%s %T@ %i %m %p\\n"])).map(Some)
}

/// A tool's first line about its version; none if it is not there.
fn version(tool: &str) -> Option<String> {
    let output = Command::new(tool).arg("--version").stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    let line = text.lines().next()?;
    Some(line.split_once(" (go").map_or(line, |(name, _)| name).split("  protocol").next()?.to_owned())
}

fn run(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot start a tool")?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(status.success(), "{} ended with {status}", command.get_program().display());
    Ok(seconds)
}

/// Copies a file with bytes inserted at a place.
pub(crate) fn insert(from: &Path, to: &Path, at: u64, count: u64) -> Result<()> {
    let mut original = File::open(from)?;
    let mut changed = File::create_new(to)?;
    io::copy(&mut (&mut original).take(at), &mut changed)?;
    io::copy(&mut io::repeat(0x5a).take(count), &mut changed)?;
    original.seek(SeekFrom::Start(at))?;
    io::copy(&mut original, &mut changed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_inserted_and_none_lost() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "0123456789").expect("written");
        insert(&from, &to, 4, 3).expect("inserted");
        assert_eq!(fs::read_to_string(&to).expect("read"), "0123ZZZ456789");
    }

    #[test]
    fn a_missing_tool_is_said_with_what_brings_it() {
        let tools = Tools { alone: false, syncthing: None, rsync: Some("rsync 1".into()), cp: None };
        assert_eq!(tools.missing(), ["syncthing is missing, so its column is: `apt-get install syncthing` brings it"]);
        assert_eq!(tools.versions(), "rsync 1");
        assert_eq!(Tools::find(true).missing(), [""; 0]);
        assert_eq!(version("no-such-tool"), None);
    }
}
