//! `kill -9` after every step of an apply, one run of the command for each.
//!
//! The command knows nothing of it: `strace` writes down each system call that changes a file system and halts its thread
//! for a moment, in which whoever reads that log kills the process.
//! What is counted are the steps of all threads together, in the order in which they happened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::command::{Home, Program};
use crate::tree::{self, Item, Reader};

/// The system calls that change a file system; which of them a machine has differs.
const CALLS: [&str; 21] = [
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "mkdir",
    "mkdirat",
    "unlink",
    "unlinkat",
    "rmdir",
    "symlink",
    "symlinkat",
    "fchmod",
    "fchmodat",
    "utimensat",
    "fsync",
    "fdatasync",
    "syncfs",
    "pwrite64",
    "ftruncate",
    "copy_file_range",
];

/// What the name of a home's database, and of the files beside it, begins with.
const DATABASE: &str = "/sync.db";

/// Microseconds that a thread halts after each of them: many times what reading the log takes.
const HALT_US: u32 = 4000;

/// Time between two looks at the log.
const LOOK: Duration = Duration::from_micros(200);

/// Time between two looks whether both sides agree.
const POLL: Duration = Duration::from_millis(50);

/// How long both must go on to agree: a change that was not noticed yet would show.
const CALM: Duration = Duration::from_millis(400);

/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// Files that nothing happens to, so that what happens is never most of the folder.
const STILL: usize = 300;

/// Bytes of the file that takes several chunks.
const LARGE: usize = 5 << 20;

/// Whose process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a change has two sides")]
pub enum Victim {
    /// Who applies what the other has changed.
    Receiver,
    /// Who tells what has changed.
    Sender,
}

/// After which steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "all or some")]
pub enum Which {
    /// Each, until a run ends before it.
    All,
    /// At most so many, of each system call as many and evenly spread.
    Some(usize),
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// Steps of a run that nothing stops.
    pub steps: usize,
    /// Runs that were killed.
    pub kills: usize,
    /// What the last step of each of them was.
    pub calls: BTreeMap<String, usize>,
}

/// Whether this machine lets `strace` do it; if not, what to do about it.
pub fn is_possible() -> Result<(), String> {
    let output = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", "trace=?openat", "-e", "inject=?openat:delay_exit=1", "true"])
        .stdin(Stdio::null())
        .output();
    match output {
        Err(_) => Err("processes are killed at their steps with strace: install the package strace".to_owned()),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("strace may not trace here: {}", said.lines().next().unwrap_or("no reason given")))
        }
    }
}

/// Kills one side after its steps, in an empty directory; the first run after which something is wrong is the error.
pub fn run(program: &Program, site: &Path, victim: Victim, which: Which, mut say: impl FnMut(&str)) -> Result<Report> {
    let mut pair = Pair::new(program, site, victim)?;
    let unharmed = pair.round(None)?;
    let steps = unharmed.steps.len();
    ensure!(steps > 0, "strace shows no step");
    say(&format!("{steps} steps"));
    let mut report = Report { steps, kills: 0, calls: BTreeMap::new() };
    let moments: Vec<Moment> = match which {
        // far more than any run takes: it ends with the first that was not killed
        Which::All => (1..=20 * steps).map(Moment::Step).collect(),
        Which::Some(count) => some_of(&unharmed.steps, count),
    };
    for moment in moments {
        let watched = pair.round(Some(moment.clone()))?;
        let Some(last) = watched.steps.last().filter(|_| watched.killed) else {
            say(&format!("{moment:?} did not come: {} steps", watched.steps.len()));
            if which == Which::All {
                break;
            }
            continue;
        };
        say(&format!("killed after step {}, {last}", watched.steps.len()));
        report.kills += 1;
        *report.calls.entry(call_of(last).to_owned()).or_default() += 1;
    }
    pair.end()?;
    Ok(report)
}

/// When a process is killed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Moment {
    /// After so many steps.
    Step(usize),
    /// After a call, on the database or elsewhere, for the so many-th time.
    Call { call: String, on_database: bool, times: usize },
}

impl Moment {
    fn has_come(&self, steps: &[String]) -> bool {
        match self {
            Self::Step(step) => steps.len() >= *step,
            Self::Call { call, on_database, times } => {
                let is_it = |step: &&String| call_of(step) == call && step.contains(DATABASE) == *on_database;
                steps.iter().filter(is_it).count() >= *times
            }
        }
    }
}

/// At most `count` moments among steps: of each call on the database, and of each elsewhere, as many.
fn some_of(steps: &[String], count: usize) -> Vec<Moment> {
    let mut kinds: BTreeMap<(&str, bool), usize> = BTreeMap::new();
    for step in steps {
        *kinds.entry((call_of(step), step.contains(DATABASE))).or_default() += 1;
    }
    let each = count.div_ceil(kinds.len().max(1)).max(1);
    let moments: Vec<Moment> = kinds
        .into_iter()
        .flat_map(|((call, on_database), seen)| {
            let taken = each.min(seen);
            (0..taken).map(move |at| {
                let times = 1 + (2 * at + 1) * seen / (2 * taken).max(1);
                Moment::Call { call: call.to_owned(), on_database, times: times.min(seen) }
            })
        })
        .collect();
    let taken = count.min(moments.len());
    (0..taken).map(|at| moments[at * moments.len() / taken].clone()).collect()
}

fn call_of(line: &str) -> &str {
    line.split(['(', ' ']).next().unwrap_or(line)
}

/// One of two devices.
struct Side {
    home: Home,
    tree: PathBuf,
    reader: Reader,
}

impl Side {
    fn read(&mut self) -> Result<BTreeMap<String, Item>> {
        self.reader.read(&self.tree)
    }

    fn pause(&self, paused: bool) -> Result<()> {
        self.home.pause(&self.tree, paused)
    }
}

/// Two devices that share a folder: the first one changes it, the second applies that, and changes what conflicts.
struct Pair {
    sides: [Side; 2],
    victim: usize,
    log: PathBuf,
    round: usize,
    /// Contents of the files among the versions, which never change.
    kept: BTreeMap<PathBuf, [u8; 32]>,
}

impl Pair {
    fn new(program: &Program, site: &Path, victim: Victim) -> Result<Self> {
        let side = |name: &str| -> Result<Side> {
            let home = Home::init(program, site.join(name), name)?;
            Ok(Side { home, tree: site.join(format!("{name}-tree")), reader: Reader::default() })
        };
        let mut sides = [side("sender")?, side("receiver")?];
        let first = &sides[0].tree;
        for number in 0..STILL {
            write(&first.join(format!("still/{number}")), format!("still {number}"))?;
        }
        prepare(first, 0)?;
        for side in &mut sides {
            side.home.start()?;
        }
        let invitation = sides[0].home.share(&sides[0].tree)?;
        sides[1].home.join(invitation.code(), &sides[1].tree)?;
        invitation.joined()?;
        let victim = usize::from(victim == Victim::Receiver);
        let mut pair = Self { sides, victim, log: site.join("steps"), round: 0, kept: BTreeMap::new() };
        pair.agree()?;
        Ok(pair)
    }

    /// Ends both in order; neither may have panicked meanwhile.
    fn end(mut self) -> Result<()> {
        for side in &mut self.sides {
            side.home.stop()?;
            for log in side.home.log() {
                let text = fs::read(&log).with_context(|| format!("no log {}", log.display()))?;
                let text = String::from_utf8_lossy(&text);
                let panicked = text.lines().find(|line| line.contains("panicked at"));
                ensure!(panicked.is_none(), "{}: {}", log.display(), panicked.unwrap_or_default());
            }
        }
        Ok(())
    }

    /// Changes the folder, with the victim killed at a moment, and checks what came of it.
    fn round(&mut self, moment: Option<Moment>) -> Result<Watched> {
        self.round += 1;
        let round = self.round;
        self.sides[self.victim].home.stop()?;
        // what was counted before says nothing of the next run
        let _ = fs::remove_file(&self.log);
        self.sides[self.victim].home.start_under(tracer(&self.log))?;
        self.agree()?;
        let before = self.sides[0].read()?;
        self.sides.iter().try_for_each(|side| side.pause(true))?;
        change(&self.sides[0].tree, round)?;
        contradict(&self.sides[1].tree, round)?;
        let wanted = self.sides[0].read()?;
        let contradicted = self.sides[1].read()?;

        let watch = Watch::start(&self.log, self.sides[self.victim].home.pid(), moment)?;
        for at in [0, 1] {
            let resumed = self.sides[at].pause(false);
            // it may be killed while it is asked
            if !watch.has_killed() {
                resumed?;
            }
        }
        let agreed = self.agree_or(&watch)?;
        let watched = watch.end()?;
        if !agreed {
            let home = &mut self.sides[self.victim].home;
            let deadline = Instant::now() + PATIENCE;
            while home.has_ended()?.is_none() {
                ensure!(Instant::now() < deadline, "strace does not end with what it traces");
                thread::sleep(POLL);
            }
            home.kill()?;
            home.start()?;
            for side in &self.sides {
                side.pause(false)?;
            }
        }
        let line = watched.steps.last().map_or("nothing", String::as_str);
        let what = || format!("round {round}, killed: {}, last step {line}", watched.killed);
        self.agree().with_context(what)?;
        self.check(&before, &wanted, &contradicted).with_context(what)?;
        Ok(watched)
    }

    fn agree(&mut self) -> Result<()> {
        self.until_agreed(|| false).map(drop)
    }

    /// Waits until both agree, and then true, or until the victim was killed.
    fn agree_or(&mut self, watch: &Watch) -> Result<bool> {
        self.until_agreed(|| watch.has_killed())
    }

    fn until_agreed(&mut self, is_over: impl Fn() -> bool) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        let mut since = None;
        loop {
            let why = self.disagreement();
            if is_over() {
                return Ok(false);
            }
            let why = why?;
            match (&why, since) {
                (None, None) => since = Some(Instant::now()),
                (None, Some(since)) if since.elapsed() >= CALM => return Ok(true),
                (None, Some(_)) => {}
                (Some(_), _) => since = None,
            }
            if Instant::now() > deadline {
                bail!("the sides do not agree: {}", why.unwrap_or_else(|| "not for long".to_owned()));
            }
            thread::sleep(POLL);
        }
    }

    fn disagreement(&mut self) -> Result<Option<String>> {
        for side in &mut self.sides {
            let folder = side.home.folder()?.context("a home has lost its folder")?;
            if !folder.is_up_to_date() {
                return Ok(Some(format!("{}: {folder:?}", side.tree.display())));
            }
        }
        let [sender, receiver] = &mut self.sides;
        let (one, other) = (sender.read()?, receiver.read()?);
        let differs = one.iter().find(|(path, item)| other.get(*path) != Some(item));
        let differs = differs.or_else(|| other.iter().find(|(path, _)| !one.contains_key(*path)));
        Ok(differs.map(|(path, _)| format!("{path}: {:?} and {:?}", one.get(path), other.get(path))))
    }

    /// What was wanted is there, one conflict copy beside it, and every content is somewhere.
    fn check(
        &mut self,
        before: &BTreeMap<String, Item>,
        wanted: &BTreeMap<String, Item>,
        contradicted: &BTreeMap<String, Item>,
    ) -> Result<()> {
        let found = self.sides[0].read()?;
        let (both, edited) = (at(self.round, BOTH), at(self.round, EDITED_AND_DELETED));
        for (path, item) in wanted.iter().filter(|(path, _)| **path != both) {
            ensure!(found.get(path) == Some(item), "{path} should be {item:?}, and is {:?}", found.get(path));
        }
        let others: Vec<&String> = found.keys().filter(|path| !wanted.contains_key(*path)).collect();
        let (copies, rest): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|path| path.starts_with(&format!("{both} (conflict ")));
        ensure!(copies.len() == 1, "one conflict copy of {both} is due, and there are {copies:?}");
        ensure!(rest == [&edited], "beside what is wanted there is {rest:?}");
        let contents: BTreeSet<[u8; 32]> = found.values().filter_map(content).collect();
        // what both sides' own hands took away is owed by nobody
        let by_hand = |path: &String| *path == both || *path == edited;
        let owed = before.iter().filter(|(path, _)| !by_hand(path)).chain(wanted).chain(contradicted);
        self.look_at_versions()?;
        let kept: BTreeSet<&[u8; 32]> = self.kept.values().collect();
        for (path, item) in owed {
            let Some(content) = content(item) else { continue };
            let is_there = contents.contains(&content) || kept.contains(&content);
            ensure!(is_there, "no silent overwrite: a content of {path} is nowhere");
        }
        Ok(())
    }

    fn look_at_versions(&mut self) -> Result<()> {
        let Self { sides, kept, .. } = self;
        for side in sides {
            tree::walk(&side.tree.join(".syncshell").join("versions"), |_, at, metadata| {
                if metadata.is_file() && !kept.contains_key(at) {
                    kept.insert(at.to_owned(), tree::hash(at)?.1);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn content(item: &Item) -> Option<[u8; 32]> {
    match item {
        Item::File { hash, .. } => Some(*hash),
        _ => None,
    }
}

/// Edited on both sides.
const BOTH: &str = "both";
/// Removed on one side and edited on the other.
const EDITED_AND_DELETED: &str = "edited and deleted";

/// A path in the directory of what a round changes.
fn at(round: usize, name: &str) -> String {
    format!("round {:04}/{name}", round - 1)
}

/// Makes what a later round changes.
fn prepare(root: &Path, round: usize) -> Result<()> {
    let dir = root.join(format!("round {round:04}"));
    for name in
        [BOTH, EDITED_AND_DELETED, "edited", "deleted", "moved", "bits", "dir/a", "dir/b", "file", "directory/x"]
    {
        write(&dir.join(name), format!("{name} of round {round}"))?;
    }
    let mut large = vec![0; LARGE];
    blake3::Hasher::new().update(&round.to_le_bytes()).finalize_xof().fill(&mut large);
    write(&dir.join("large"), large)?;
    fs::create_dir(dir.join("empty"))?;
    for name in ["link", "old link"] {
        symlink("edited", dir.join(name))?;
    }
    Ok(())
}

/// Changes what was prepared, prepares the next, and removes what was changed before.
fn change(root: &Path, round: usize) -> Result<()> {
    let place = |name: &str| root.join(at(round, name));
    write(&place("edited"), format!("edited in round {round}, and longer"))?;
    write(&place(BOTH), format!("the sender's in round {round}"))?;
    fs::remove_file(place(EDITED_AND_DELETED))?;
    fs::remove_file(place("deleted"))?;
    fs::create_dir(place("new"))?;
    fs::rename(place("moved"), place("new/moved"))?;
    fs::rename(place("dir"), place("directory with another name"))?;
    fs::set_permissions(place("bits"), fs::Permissions::from_mode(0o640))?;
    fs::remove_dir(place("empty"))?;
    fs::create_dir(place("newly empty"))?;
    // a name that becomes something of another kind
    fs::remove_file(place("file"))?;
    write(&place("file/below"), format!("below a file's name in round {round}"))?;
    fs::remove_dir_all(place("directory"))?;
    write(&place("directory"), format!("a file by a directory's name in round {round}"))?;
    fs::remove_file(place("link"))?;
    symlink(format!("elsewhere {round}"), place("link"))?;
    fs::remove_file(place("old link"))?;
    let mut large = fs::read(place("large"))?;
    large.splice(LARGE / 2..LARGE / 2, format!("inserted in round {round}").into_bytes());
    fs::write(place("large"), large)?;
    if round > 1 {
        fs::remove_dir_all(root.join(at(round - 1, "")))?;
    }
    prepare(root, round)
}

/// Changes on the other side what conflicts.
fn contradict(root: &Path, round: usize) -> Result<()> {
    write(&root.join(at(round, BOTH)), format!("the receiver's in round {round}"))?;
    write(&root.join(at(round, EDITED_AND_DELETED)), format!("edited in round {round}"))
}

/// Writes a file, and before it the directories it is in.
fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let parent = path.parent().context("no directory")?;
    fs::create_dir_all(parent).and_then(|()| fs::write(path, content))?;
    Ok(())
}

/// What starts a program so that its steps are written to a log.
fn tracer(log: &Path) -> Command {
    let calls: Vec<String> = CALLS.iter().map(|call| format!("?{call}")).collect();
    let calls = calls.join(",");
    let mut strace = Command::new("strace");
    strace.args(["--follow-forks", "--seccomp-bpf", "--quiet=all", "--decode-fds=path", "--string-limit=48"]);
    strace.arg("--trace").arg(&calls).arg("--inject").arg(format!("{calls}:delay_exit={HALT_US}"));
    strace.arg("--output").arg(log);
    strace
}

/// Reads a log of steps, and kills after one of them.
struct Watch {
    killed: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Watched>>,
}

/// What a [`Watch`] has seen.
#[derive(Debug)]
struct Watched {
    steps: Vec<String>,
    killed: bool,
}

impl Watch {
    /// Watches the child of a tracer from now on.
    fn start(log: &Path, tracer: Option<u32>, moment: Option<Moment>) -> Result<Self> {
        let tracer = tracer.context("nothing is traced")?;
        let victim = child_of(tracer)?;
        let mut file = File::open(log).with_context(|| format!("cannot open {}", log.display()))?;
        file.seek(SeekFrom::End(0))?;
        let (killed, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (killed, over) = (killed.clone(), over.clone());
            thread::spawn(move || {
                let (mut text, mut steps) = (String::new(), Vec::new());
                while !over.load(Ordering::Acquire) {
                    file.read_to_string(&mut text)?;
                    let whole = text.rfind('\n').map_or(0, |at| at + 1);
                    steps.extend(text[..whole].lines().filter_map(step).map(str::to_owned));
                    text.drain(..whole);
                    if moment.as_ref().is_some_and(|moment| moment.has_come(&steps)) {
                        kill(victim)?;
                        killed.store(true, Ordering::Release);
                        break;
                    }
                    thread::sleep(LOOK);
                }
                Ok(Watched { steps, killed: killed.load(Ordering::Acquire) })
            })
        };
        Ok(Self { killed, over, thread })
    }

    fn has_killed(&self) -> bool {
        self.killed.load(Ordering::Acquire)
    }

    fn end(self) -> Result<Watched> {
        self.over.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("the log's reader has panicked"))?
    }
}

/// The system call of a line of the log, if it changed something.
fn step(line: &str) -> Option<&str> {
    let (_thread, call) = line.split_once(' ')?;
    let call = call.trim_start();
    let call = call.strip_prefix("<... ").unwrap_or(call);
    let happened = CALLS.contains(&call_of(call)) && call.contains(" = ") && !call.contains(" = -1 ");
    happened.then_some(call)
}

fn child_of(process: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"))?;
    children.split_whitespace().next().context("strace has started nothing")?.parse().context("no process id")
}

fn kill(process: u32) -> Result<()> {
    let status = Command::new("kill").args(["-KILL", &process.to_string()]).status().context("cannot start kill")?;
    ensure!(status.success(), "the process to be killed is gone");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_call_some_steps_are_chosen() {
        let of = |call: &str, count: usize| vec![format!("{call}(3</x/sync.db>) = 0"); count];
        let steps = [of("pwrite64", 100), of("fsync", 2), of("mkdirat", 1)].concat();
        let chosen = some_of(&steps, 6);
        let expected = [("fsync", 1), ("fsync", 2), ("mkdirat", 1), ("pwrite64", 26), ("pwrite64", 76)];
        let moment = |(call, times): (&str, usize)| Moment::Call { call: call.to_owned(), on_database: true, times };
        assert_eq!(chosen, expected.map(moment));
        assert!(chosen.iter().all(|moment| moment.has_come(&steps) && !moment.has_come(&[])));
        assert_eq!(some_of(&[], 6), []);
    }

    #[test]
    fn only_what_has_changed_something_is_a_step() {
        for (line, expected) in [
            (r#"812 renameat2(4</a>, "x", 5</b>, "y", RENAME_NOREPLACE) = 0 (DELAYED)"#, Some("renameat2")),
            ("812  fsync(4</a>) = 0", Some("fsync")),
            ("812 <... fsync resumed>) = 0 (DELAYED)", Some("fsync")),
            ("812 fsync(4</a> <unfinished ...>", None),
            (r#"812 mkdirat(4</a>, "x", 0700) = -1 EEXIST (File exists) (DELAYED)"#, None),
            ("812 +++ killed by SIGKILL +++", None),
            ("812 read(4</a>) = 0", None),
        ] {
            assert_eq!(step(line).map(call_of), expected, "{line}");
        }
    }
}
