//! `cargo xtask sim --mutants`: would the simulator notice?
//!
//! Each patch in `testing/sim/mutants` breaks one promise on purpose.
//! Its first lines say how many seeds may be spent and which invariant must be named:
//!
//! ```text
//! # seeds: 200
//! # expect: no gaps
//! ```
//!
//! The patch is applied to a copy of the tree under `target/mutants`, so the working tree is never touched.
//! The simulator built there has to fail with a line that holds `invariant broken: no gaps`.
//! A mutant that survives, fails otherwise, does not build or does not apply is a failure of the whole run.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::shell::{self, cargo, seconds};
use crate::sim;

const PATCHES: &str = "testing/sim/mutants";

/// What the simulator prints in front of the name of a broken invariant.
const BROKEN: &str = "invariant broken: ";

/// A mutant may make the simulator spin for ever; a thousand seeds of the sound tree take less than this.
const RUN_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Long enough to cost nothing, short enough not to show in the table.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// Runs the sound tree, then every mutant, and prints a table.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mutants = Mutant::all(&root.join(PATCHES))?;
    let lab = Lab::new(root)?;
    lab.refresh()?;
    lab.build("sound").context("the tree does not build without any mutant")?;
    let most_seeds = mutants.iter().map(|mutant| mutant.seeds).max();
    let (end, _) = lab.simulate("sound", most_seeds.unwrap_or(0))?;
    ensure!(
        end.is_some_and(|status| status.success()),
        "the simulator fails without any mutant, see {}",
        lab.log("sound").display()
    );

    println!("{:<32} {:<18} {:>6}  verdict", "mutant", "expects", "seeds");
    let mut failures = 0;
    for mutant in &mutants {
        lab.refresh()?;
        let started = Instant::now();
        let verdict = lab.examine(mutant)?;
        println!(
            "{:<32} {:<18} {:>6}  {verdict} ({})",
            mutant.name,
            mutant.expect,
            mutant.seeds,
            seconds(started.elapsed())
        );
        failures += u32::from(verdict != Verdict::Found);
    }
    ensure!(
        failures == 0,
        "{failures} of {} mutants were not found; their logs are in {}",
        mutants.len(),
        lab.dir.display()
    );
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Mutant {
    name: String,
    patch: PathBuf,
    seeds: u64,
    expect: String,
}

impl Mutant {
    /// Reads every patch in `dir`, by name.
    fn all(dir: &Path) -> Result<Vec<Self>> {
        let mut mutants = Vec::new();
        for entry in fs::read_dir(dir).with_context(|| format!("cannot list {PATCHES}"))? {
            let patch = entry?.path();
            if patch.extension().is_some_and(|extension| extension == "patch") {
                let text = fs::read_to_string(&patch).with_context(|| format!("cannot read {}", patch.display()))?;
                mutants.push(Self::parse(&patch, &text)?);
            }
        }
        ensure!(!mutants.is_empty(), "{PATCHES} holds no *.patch");
        mutants.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(mutants)
    }

    fn parse(patch: &Path, text: &str) -> Result<Self> {
        let name = patch.file_stem().unwrap_or_default().to_string_lossy();
        let mut seeds = None;
        let mut expect = None;
        let header = text.lines().take_while(|line| line.starts_with('#'));
        for (key, value) in header.flat_map(|line| line.split('#')).filter_map(field) {
            match key {
                "seeds" => {
                    seeds = Some(value.parse().with_context(|| format!("{name}: `seeds` is no number: {value}"))?);
                }
                "expect" => expect = Some(value.to_owned()),
                _ => bail!("{name}: unknown line `# {key}:`, known are seeds and expect"),
            }
        }
        let missing = |key| format!("{name}: begins without `# {key}: …`");
        Ok(Self {
            seeds: seeds.with_context(|| missing("seeds"))?,
            expect: expect.with_context(|| missing("expect"))?,
            patch: patch.to_owned(),
            name: name.into_owned(),
        })
    }
}

/// `key: value` of a header; prose without a colon is a remark.
fn field(text: &str) -> Option<(&str, &str)> {
    let (key, value) = text.split_once(':')?;
    Some((key.trim(), value.trim()))
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Found,
    Survived,
    OtherFailure,
    NeverEnded,
    NotBuilt,
    NotApplied,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Found => "found",
            Self::Survived => "SURVIVED",
            Self::OtherFailure => "FAILED WITHOUT NAMING IT",
            Self::NeverEnded => "NEVER ENDED",
            Self::NotBuilt => "DOES NOT BUILD",
            Self::NotApplied => "DOES NOT APPLY",
        })
    }
}

/// How a run of the simulator is judged; `end` is none where it had to be stopped.
fn judge(end: Option<ExitStatus>, log: &str, expect: &str) -> Verdict {
    match end {
        None => Verdict::NeverEnded,
        Some(status) if status.success() => Verdict::Survived,
        Some(_) if names(log, expect) => Verdict::Found,
        Some(_) => Verdict::OtherFailure,
    }
}

/// A line names the invariant in full: `no gaps` is not named by `no gaps of that kind`.
fn names(log: &str, expect: &str) -> bool {
    log.lines().filter_map(|line| line.split_once(BROKEN)).any(|(_, name)| {
        name.strip_prefix(expect).is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ',', ';', '(']))
    })
}

/// The copy of the tree and its own build directory, kept between mutants so that builds are incremental.
struct Lab {
    root: PathBuf,
    dir: PathBuf,
    tree: PathBuf,
    target: PathBuf,
}

impl Lab {
    fn new(root: &Path) -> Result<Self> {
        let dir = root.join("target/mutants");
        let lab = Self { root: root.to_owned(), tree: dir.join("tree"), target: dir.join("target"), dir };
        fs::create_dir_all(&lab.tree).context("cannot create target/mutants/tree")?;
        Ok(lab)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Makes the copy equal to the working tree; what is equal already keeps its time, so cargo does not build it again.
    fn refresh(&self) -> Result<()> {
        let files = shell::tracked_files(&self.root)?;
        for path in &files {
            let (from, to) = (self.root.join(path), self.tree.join(path));
            let contents = fs::read(&from).with_context(|| format!("cannot read {path}"))?;
            if fs::read(&to).is_ok_and(|copy| copy == contents) {
                continue;
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&to, contents).with_context(|| format!("cannot copy {path}"))?;
        }
        let known = files.iter().map(|path| self.tree.join(path)).collect();
        remove_others(&self.tree, &known)
    }

    fn examine(&self, mutant: &Mutant) -> Result<Verdict> {
        if let Err(error) = self.apply(&mutant.patch) {
            eprintln!("{}: {error:#}", mutant.name);
            return Ok(Verdict::NotApplied);
        }
        if let Err(error) = self.build(&mutant.name) {
            eprintln!("{}: {error:#}", mutant.name);
            return Ok(Verdict::NotBuilt);
        }
        let (end, log) = self.simulate(&mutant.name, mutant.seeds)?;
        Ok(judge(end, &log, &mutant.expect))
    }

    fn apply(&self, patch: &Path) -> Result<()> {
        let mut git = Command::new("git");
        // Without the ceiling git finds the repository around the copy and silently skips every file.
        git.current_dir(&self.tree).env("GIT_CEILING_DIRECTORIES", &self.dir).arg("apply").arg(patch);
        shell::output(&mut git).map(drop)
    }

    fn build(&self, name: &str) -> Result<()> {
        let args = ["build", "--release", "--locked", "--package", "sync-sim"];
        let log = File::create(self.log(name))?;
        let mut build = cargo(&self.tree, args);
        build.env("CARGO_TARGET_DIR", &self.target).stdout(log.try_clone()?).stderr(log);
        shell::run(&mut build).with_context(|| format!("cannot build, see {}", self.log(name).display()))
    }

    /// Runs the simulator built last; returns how it ended, if it did, and all it wrote.
    fn simulate(&self, name: &str, seeds: u64) -> Result<(Option<ExitStatus>, String)> {
        let path = self.log(name);
        let log = File::create(&path)?;
        let program = format!("release/sync-sim{}", std::env::consts::EXE_SUFFIX);
        let mut command = Command::new(self.target.join(program));
        command.current_dir(&self.tree).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        sim::add_seeds(&mut command, seeds);
        let end = wait(&mut command, RUN_LIMIT)?;
        let log = fs::read(&path)?;
        Ok((end, String::from_utf8_lossy(&log).into_owned()))
    }
}

/// Waits for a command to end, or ends it after `limit` and returns none.
fn wait(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
    let mut child = command.spawn().context("cannot start the simulator")?;
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(POLL_EVERY);
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

/// Removes what an earlier mutant created or the working tree no longer has.
fn remove_others(dir: &Path, known: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            remove_others(&path, known)?;
        } else if !known.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(u64, String)> {
        let mutant = Mutant::parse(Path::new("a/dropped-fsync.patch"), text)?;
        assert_eq!(mutant.name, "dropped-fsync");
        Ok((mutant.seeds, mutant.expect))
    }

    #[test]
    fn a_header_may_take_one_line_or_several() {
        let expected = (200, "no gaps".to_owned());
        for text in [
            "# seeds: 200\n# expect: no gaps\n--- a/x\n",
            "# seeds: 200 # expect: no gaps\n--- a/x\n",
            "# Forgets to flush.\n# expect: no gaps\n# seeds: 200\n--- a/x\n",
        ] {
            assert_eq!(parse(text).expect(text), expected);
        }
    }

    #[test]
    fn a_header_with_a_fault_is_named() {
        for (text, says) in [
            ("# expect: durable\n", "begins without `# seeds: …`"),
            ("# seeds: 5\n--- a/x\n# expect: durable\n", "begins without `# expect: …`"),
            ("# seeds: many\n", "no number"),
            ("# seed: 5\n", "unknown line"),
        ] {
            let error = format!("{:#}", parse(text).expect_err(text));
            assert!(error.starts_with("dropped-fsync: "), "{error}");
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn an_invariant_is_named_in_full_or_not_at_all() {
        for (log, named) in [
            ("seed 7: invariant broken: no gaps", true),
            ("invariant broken: no gaps: bob misses 3", true),
            ("checked: no gaps", false),
            ("invariant broken: no gaps of that kind", false),
            ("invariant broken: durable\nno gaps held", false),
        ] {
            assert_eq!(names(log, "no gaps"), named, "{log}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_run_is_judged_by_its_end_and_its_words() {
        fn end(script: &str, limit: Duration) -> Option<ExitStatus> {
            let mut shell = Command::new("sh");
            wait(shell.args(["-c", script]), limit).expect("a shell")
        }
        const BROKE: &str = "invariant broken: durable";
        let failed = end("exit 1", RUN_LIMIT);
        assert_eq!(judge(failed, BROKE, "durable"), Verdict::Found);
        assert_eq!(judge(failed, BROKE, "converge"), Verdict::OtherFailure);
        let passed = end("exit 0", RUN_LIMIT);
        assert_eq!(judge(passed, BROKE, "durable"), Verdict::Survived);
        let stopped = end("exec sleep 60", Duration::from_millis(1));
        assert_eq!(judge(stopped, BROKE, "durable"), Verdict::NeverEnded);
    }

    /// A repository of one file, with a copy of it beside a patch that changes the file.
    fn lab(dir: &Path) -> Lab {
        fs::write(dir.join("a.txt"), "sound\n").expect("a file");
        fs::write(dir.join(".gitignore"), "target\n").expect("a file");
        let mut git = Command::new("git");
        shell::output(git.current_dir(dir).args(["init", "--quiet"])).expect("a repository");
        Lab::new(dir).expect("a lab")
    }

    #[test]
    fn a_patch_changes_the_copy_and_refreshing_undoes_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let lab = lab(dir.path());
        lab.refresh().expect("a copy");
        let patch = dir.path().join("target/m.patch");
        let text = "# seeds: 1 # expect: durable\n\
                    --- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-sound\n+broken\n\
                    --- /dev/null\n+++ b/b.txt\n@@ -0,0 +1 @@\n+new\n";
        fs::write(&patch, text).expect("a patch");

        lab.apply(&patch).expect("the patch applies");
        let copy = |name: &str| fs::read_to_string(lab.tree.join(name)).ok();
        assert_eq!(copy("a.txt").as_deref(), Some("broken\n"));
        assert_eq!(copy("b.txt").as_deref(), Some("new\n"));
        let original = fs::read_to_string(dir.path().join("a.txt")).expect("the original");
        assert_eq!(original, "sound\n");

        lab.apply(&patch).expect_err("it applies once only");
        lab.refresh().expect("a copy again");
        assert_eq!(copy("a.txt").as_deref(), Some("sound\n"));
        assert_eq!(copy("b.txt"), None);
    }

    #[test]
    fn a_copy_that_is_equal_keeps_its_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let lab = lab(dir.path());
        lab.refresh().expect("a copy");
        let copy = lab.tree.join("a.txt");
        let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let file = File::options().write(true).open(&copy).expect("the copy");
        file.set_modified(long_ago).expect("a time");
        lab.refresh().expect("a copy again");
        let modified = fs::metadata(&copy).and_then(|data| data.modified());
        assert_eq!(modified.expect("a time"), long_ago);
    }
}
