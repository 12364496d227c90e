//! One run: homes, edits, kills, and what must hold in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sync_soak::command::{Home, Program};
use sync_soak::random::Draw;
use sync_soak::tree::{self, Item};

use crate::edits::Editor;
use crate::journal::{Hash, Journal, short};

/// Differences between two trees that are named; the first ones tell the story.
const SHOWN: usize = 20;

/// Time between two looks whether all agree.
const POLL: Duration = Duration::from_millis(200);

/// How long all must go on to agree: a change that was not noticed yet would show.
const CALM: Duration = Duration::from_secs(2);

/// The longest that a killed process stays away.
const MAX_DOWN_MS: u64 = 4000;

/// What is to be done.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What the choices follow from.
    pub(crate) seed: u64,
    /// How long to edit.
    pub(crate) time: Duration,
    /// Devices.
    pub(crate) homes: usize,
    /// How long they may take to agree.
    pub(crate) settle: Duration,
    /// Crates whose sources the tree begins with.
    pub(crate) sources: Vec<String>,
    /// The command, unless it is beside this program.
    pub(crate) command: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Report {
    /// Everything that must not be.
    pub(crate) violations: Vec<String>,
    /// One line.
    pub(crate) summary: String,
}

/// A device.
#[derive(Debug)]
struct Side {
    name: &'static str,
    home: Home,
    tree: PathBuf,
    joined: bool,
    down_until: Option<Instant>,
    paused_until: Option<Instant>,
}

/// A run under way.
struct Run {
    sides: Vec<Side>,
    editor: Editor,
    draw: Draw,
    versions: Versions,
    violations: Vec<String>,
    kills: u32,
    pauses: u32,
}

/// What was among the versions of any device at any look.
///
/// A device thins out what it has kept: of a file that changes every few seconds not every version stays.
/// So what counts is that a content was kept when it was taken, which only looking all the time can tell.
#[derive(Debug, Default)]
struct Versions {
    files: BTreeSet<PathBuf>,
    contents: BTreeSet<Hash>,
}

impl Versions {
    /// Reads what is new; a version never changes under its name.
    fn look(&mut self, tree: &Path) -> Result<()> {
        let Self { files, contents } = self;
        tree::walk(&tree.join(".syncshell").join("versions"), |_, at, metadata| {
            if metadata.is_file() && !files.contains(at) {
                contents.insert(tree::hash(at)?.1);
                files.insert(at.to_owned());
            }
            Ok(())
        })
    }
}

/// Soaks in an empty directory.
pub(crate) fn run(plan: &Plan, site: &Path) -> Result<Report> {
    let started = Instant::now();
    let mut run = Run::begin(plan, site)?;
    let joins_late = Instant::now() + plan.time / 3;
    let end = Instant::now() + plan.time;
    while Instant::now() < end {
        if run.sides.iter().any(|side| !side.joined) && Instant::now() > joins_late {
            run.join_last()?;
        }
        run.faults()?;
        run.edits()?;
        if !run.violations.is_empty() {
            break;
        }
    }
    if run.sides.iter().any(|side| !side.joined) {
        run.join_last()?;
    }
    let edited = started.elapsed();
    run.quiet()?;
    let settling = Instant::now();
    if run.violations.is_empty() {
        run.settle(plan.settle)?;
    }
    let settled = settling.elapsed();
    let kept = run.check()?;
    let summary = run.summary(plan, edited, settled, &kept);
    for side in &mut run.sides {
        if let Err(error) = side.home.stop() {
            run.violations.push(format!("{} does not end in order: {error:#}", side.name));
        }
    }
    Ok(Report { violations: run.violations, summary })
}

/// Where contents were found in the end.
struct Kept {
    in_trees: usize,
    kept: usize,
    still_kept: usize,
    conflicts: usize,
}

impl Run {
    fn begin(plan: &Plan, site: &Path) -> Result<Self> {
        let program = Program::find(plan.command.as_deref(), site.join("run"))?;
        let mut sides = Vec::new();
        for name in ["a", "b", "c"].into_iter().take(plan.homes) {
            let home = Home::init(&program, site.join(name), name).with_context(|| format!("no home {name}"))?;
            let tree = site.join(format!("{name}-tree"));
            sides.push(Side { name, home, tree, joined: false, down_until: None, paused_until: None });
        }
        let [first, second, ..] = &mut sides[..] else { bail!("it takes two devices") };
        let names: Vec<&str> = plan.sources.iter().map(String::as_str).collect();
        tree::copy_sources(&names, &first.tree)?;
        first.home.start()?;
        second.home.start()?;
        let invitation = first.home.share(&first.tree)?;
        second.home.join(invitation.code(), &second.tree)?;
        invitation.joined()?;
        (first.joined, second.joined) = (true, true);
        let journal = Journal::create(&site.join("journal"), sides.len())?;
        let roots = sides.iter().map(|side| side.tree.clone()).collect();
        let mut editor = Editor::new(roots, plan.seed, journal);
        editor.look(0)?;
        let draw = Draw::new(plan.seed, "faults");
        Ok(Self { sides, editor, draw, versions: Versions::default(), violations: Vec::new(), kills: 0, pauses: 0 })
    }

    /// Lets the last device in, by an invite of the first.
    fn join_last(&mut self) -> Result<()> {
        self.raise(0)?;
        let [first, .., last] = &mut self.sides[..] else { bail!("it takes two devices") };
        last.home.start()?;
        let invitation = first.home.invite()?;
        last.home.join(invitation.code(), &last.tree)?;
        invitation.joined()?;
        last.joined = true;
        Ok(())
    }

    fn joined(&self) -> Vec<usize> {
        (0..self.sides.len()).filter(|at| self.sides[*at].joined).collect()
    }

    /// A few edits on a side, or on two at once, and at times a look at all of it.
    fn edits(&mut self) -> Result<()> {
        let joined = self.joined();
        let side = self.draw.pick(&joined).copied().context("nobody has joined")?;
        for _ in 0..self.draw.between(1, 5) {
            self.editor.edit(side)?;
        }
        if self.draw.one_in(8) {
            let other = self.draw.pick(&joined).copied().unwrap_or(side);
            if other != side {
                self.editor.clash(side, other)?;
            }
        }
        if self.draw.one_in(3) {
            self.editor.look(side)?;
        }
        // mostly one edit soon after another; at times long enough that all can catch up
        let pause = if self.draw.one_in(25) { self.draw.between(500, 3000) } else { self.draw.below(120) };
        let until = Instant::now() + Duration::from_millis(pause);
        loop {
            self.look_at_versions()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(POLL));
        }
    }

    fn look_at_versions(&mut self) -> Result<()> {
        self.sides.iter().try_for_each(|side| self.versions.look(&side.tree))
    }

    /// Kills, brings back, pauses and resumes.
    fn faults(&mut self) -> Result<()> {
        let now = Instant::now();
        for at in self.joined() {
            if self.sides[at].down_until.is_some_and(|until| until <= now) {
                self.raise(at)?;
            }
            let side = &mut self.sides[at];
            if side.down_until.is_some() {
                continue;
            }
            if let Some(status) = side.home.has_ended()? {
                self.violations.push(format!("the process of {} ended by itself with {status}", side.name));
                return Ok(());
            }
            if side.paused_until.is_some_and(|until| until <= now) {
                side.home.pause(&side.tree, false)?;
                side.paused_until = None;
                self.editor.journal().note(at, "resumed", "")?;
            } else if self.draw.one_in(60) {
                side.home.kill()?;
                side.down_until = Some(now + Duration::from_millis(self.draw.below(MAX_DOWN_MS)));
                self.kills += 1;
                self.editor.journal().note(at, "killed", "")?;
            } else if side.paused_until.is_none() && self.draw.one_in(200) {
                side.home.pause(&side.tree, true)?;
                side.paused_until = Some(now + Duration::from_millis(self.draw.below(MAX_DOWN_MS)));
                self.pauses += 1;
                self.editor.journal().note(at, "paused", "")?;
            }
        }
        Ok(())
    }

    /// Brings a killed process back.
    fn raise(&mut self, at: usize) -> Result<()> {
        // it begins by thinning out
        self.look_at_versions()?;
        let side = &mut self.sides[at];
        if side.down_until.take().is_some() {
            side.home.start().with_context(|| format!("{} does not come back after kill -9", side.name))?;
            self.editor.journal().note(at, "started", "")?;
        }
        Ok(())
    }

    /// Everything serves again, and nobody edits any more.
    fn quiet(&mut self) -> Result<()> {
        for at in 0..self.sides.len() {
            self.raise(at)?;
            let side = &mut self.sides[at];
            if side.paused_until.take().is_some() {
                side.home.pause(&side.tree, false)?;
            }
            self.editor.journal().note(at, "quiet", "")?;
            self.editor.look(at)?;
        }
        Ok(())
    }

    /// Waits until all say that they are up to date and all trees are equal, and stay so.
    fn settle(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut since = None;
        loop {
            let why = self.disagreement()?;
            match (&why, since) {
                (None, None) => since = Some(Instant::now()),
                (None, Some(since)) if since.elapsed() >= CALM => return Ok(()),
                (None, Some(_)) => {}
                (Some(_), _) => since = None,
            }
            if Instant::now() > deadline {
                let why = why.unwrap_or_else(|| vec!["they agree and part again".to_owned()]);
                self.violations.push(format!("the devices do not agree after {} s", limit.as_secs()));
                self.violations.extend(why);
                return Ok(());
            }
            thread::sleep(POLL);
        }
    }

    /// Why the devices do not agree yet; none if they do.
    fn disagreement(&mut self) -> Result<Option<Vec<String>>> {
        let mut why = Vec::new();
        for at in 0..self.sides.len() {
            let side = &mut self.sides[at];
            if let Some(status) = side.home.has_ended()? {
                bail!("the process of {} ended by itself with {status}", side.name);
            }
            let folder = side.home.folder()?.context("a home has lost its folder")?;
            if !folder.is_up_to_date() {
                let (state, pending) = (&folder.state, folder.pending_files);
                let problem = folder.problem.as_deref().unwrap_or("no problem");
                why.push(format!("{} is {state}, {pending} pending, {problem}, {:?}", side.name, folder.problems));
            }
            self.editor.look(at)?;
            self.versions.look(&self.sides[at].tree)?;
        }
        for at in 1..self.sides.len() {
            let differences = differences(self.editor.tree(0), self.editor.tree(at));
            let (one, other) = (self.sides[0].name, self.sides[at].name);
            why.extend(differences.into_iter().map(|difference| format!("{one} and {other}: {difference}")));
        }
        Ok((!why.is_empty()).then_some(why))
    }

    /// Looks for everything owed, and for panics.
    fn check(&mut self) -> Result<Kept> {
        self.look_at_versions()?;
        let mut in_trees = BTreeSet::new();
        let mut in_versions = Versions::default();
        let mut conflicts = BTreeSet::new();
        for at in 0..self.sides.len() {
            self.editor.look(at)?;
            let tree = self.editor.tree(at);
            in_trees.extend(tree.values().filter_map(content));
            conflicts.extend(tree.keys().filter(|path| path.contains(" (conflict ")).cloned());
            in_versions.look(&self.sides[at].tree)?;
            for log in self.sides[at].home.log() {
                let text = std::fs::read(&log).with_context(|| format!("no log {}", log.display()))?;
                if let Some(line) = String::from_utf8_lossy(&text).lines().find(|line| line.contains("panicked at")) {
                    self.violations.push(format!("{} panicked: {line}", self.sides[at].name));
                }
            }
        }
        for (content, taken) in self.editor.journal().owed() {
            if !in_trees.contains(content) && !self.versions.contents.contains(content) {
                let (side, path) = (self.sides[taken.side].name, &taken.path);
                self.violations.push(format!(
                    "no silent overwrite: content {} was taken from {path} on {side} {} ms after the start, is in no tree, \
                     and never was among the versions of any device",
                    short(content),
                    taken.ms
                ));
            }
        }
        let owed = self.editor.journal().owed();
        let found = |place: &BTreeSet<Hash>| owed.keys().filter(|content| place.contains(*content)).count();
        let (in_trees, kept) = (found(&in_trees), found(&self.versions.contents));
        Ok(Kept { in_trees, kept, still_kept: found(&in_versions.contents), conflicts: conflicts.len() })
    }

    fn summary(&mut self, plan: &Plan, edited: Duration, settled: Duration, kept: &Kept) -> String {
        let edits: u64 = self.editor.done().values().sum();
        let called_off = self.editor.called_off();
        let entries = self.editor.tree(0).len();
        let (owed, contents) = (self.editor.journal().owed().len(), self.editor.journal().contents());
        format!(
            "seed {}, {} devices: {edits} edits in {:.0} s ({called_off} called off), {} kills, {} pauses; {entries} entries \
             after {:.1} s; of {contents} contents sync took {owed} from a disk: {} are in the tree, {} were kept as versions \
             and {} still are; {} conflict copies; {} violations",
            plan.seed,
            self.sides.len(),
            edited.as_secs_f64(),
            self.kills,
            self.pauses,
            settled.as_secs_f64(),
            kept.in_trees,
            kept.kept,
            kept.still_kept,
            kept.conflicts,
            self.violations.len(),
        )
    }
}

fn content(item: &Item) -> Option<Hash> {
    match item {
        Item::File { hash, .. } => Some(*hash),
        _ => None,
    }
}

/// What differs between two trees.
fn differences(one: &BTreeMap<String, Item>, other: &BTreeMap<String, Item>) -> Vec<String> {
    let paths: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let differ = paths.into_iter().filter(|path| one.get(*path) != other.get(*path));
    let say = |item: Option<&Item>| match item {
        None => "nothing".to_owned(),
        Some(Item::Directory { mode }) => format!("directory {mode:o}"),
        Some(Item::File { mode, size, hash }) => format!("file {mode:o} of {size} B, {}", short(hash)),
        Some(Item::Link { target }) => format!("link to {}", target.display()),
        Some(Item::Other) => "something else".to_owned(),
    };
    differ.take(SHOWN).map(|path| format!("{path}: {} / {}", say(one.get(path)), say(other.get(path)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_differ_in_kind_mode_content_target_and_name() {
        let file = |mode, n| Item::File { mode, size: 1, hash: [n; 32] };
        let tree = |items: &[(&str, Item)]| -> BTreeMap<String, Item> {
            items.iter().map(|(path, item)| ((*path).to_owned(), item.clone())).collect()
        };
        let link = |target: &str| Item::Link { target: target.into() };
        let one = tree(&[("a", file(0o644, 1)), ("l", link("x"))]);
        assert_eq!(differences(&one, &one), [""; 0]);
        for other in [
            tree(&[("a", file(0o600, 1)), ("l", link("x"))]),
            tree(&[("a", file(0o644, 2)), ("l", link("x"))]),
            tree(&[("a", Item::Directory { mode: 0o755 }), ("l", link("x"))]),
            tree(&[("a", file(0o644, 1)), ("l", link("y"))]),
            tree(&[("a", file(0o644, 1)), ("l", link("x")), ("b", file(0o644, 1))]),
        ] {
            assert_eq!(differences(&one, &other).len(), 1, "{other:?}");
        }
    }
}
