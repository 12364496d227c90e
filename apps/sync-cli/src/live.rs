//! What happens in a served home, as it happens: a view that renews itself at a terminal, lines elsewhere.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use sync_client::folders::{FolderState, FolderStatus};
use tokio::time::Instant;

use crate::api::{Event, EventLine, Overview};
use crate::backend::{Backend, Events};
use crate::exit::Failure;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal::{self, clean};

/// Time between two lines about one folder where nothing can be renewed: a log file stays short.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Span over which rates are taken: long enough to be calm, short enough to follow.
const RATE_SPAN: Duration = Duration::from_secs(5);

/// Bytes per second below which it is not worth saying how many.
const SHOWN: u64 = 1 << 10;

/// Time between two looks at whether a line is due.
const TICK: Duration = Duration::from_secs(1);

/// Tells what happens until someone wishes to stop, or nobody serves the home any more.
pub(crate) async fn watch(backend: &Backend, stop: &mut Stop, out: Output) -> Result<(), Failure> {
    let tell = async {
        // first, so that nothing falls between the two
        let events = backend.events("").await?;
        let overview = backend.overview().await?;
        narrate(events, &overview, out).await
    };
    tokio::select! {
        result = tell => result,
        () = stop.requested() => Ok(()),
        () = backend.quit() => Ok(()),
    }
}

/// Tells what happens in all groups and folders until the events end.
pub(crate) async fn narrate(mut events: Events, overview: &Overview, out: Output) -> Result<(), Failure> {
    let mut live = Live::new(out);
    for folder in &overview.folders {
        live.update(folder.clone());
    }
    let mut ticks = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            line = events.next() => match line? {
                Some(line) => live.tell(line)?,
                None => return Ok(()),
            },
            _ = ticks.tick() => live.tick(),
        }
    }
}

/// The folders as they were last heard of, and how they are shown.
struct Live {
    out: Output,
    bars: Option<MultiProgress>,
    views: BTreeMap<String, View>,
}

struct View {
    folder: FolderStatus,
    rates: Rates,
    bar: Option<ProgressBar>,
    /// Most bytes that were to be synced since nothing was.
    peak: u64,
    /// When a line was written about it.
    told: Option<Instant>,
    /// Something has changed since.
    news: bool,
}

impl Live {
    fn new(out: Output) -> Self {
        let bars = (!out.is_json() && terminal::sees_notes()).then(MultiProgress::new);
        Self { out, bars, views: BTreeMap::new() }
    }

    fn tell(&mut self, line: EventLine) -> Result<(), Failure> {
        self.out.object(&line)?;
        let group = line.group.get(..8).unwrap_or(&line.group);
        match line.event {
            Event::Connected { name, pending: 0, .. } => self.say(&format!("{group} connected to {}", clean(&name))),
            Event::Connected { name, pending, .. } => {
                self.say(&format!("{group} connected to {}, handing over {pending}", clean(&name)))
            }
            Event::Disconnected { name, reason, .. } => {
                self.say(&format!("{group} lost {}: {}", clean(&name), clean(&reason)))
            }
            Event::Joined { name, author } => {
                let author = author.get(..8).unwrap_or(&author);
                self.say(&format!("{group} {} has joined as {author}", clean(&name)))
            }
            Event::Error { message, .. } => {
                self.note(&format!("{group} {}", clean(&message)));
                Ok(())
            }
            Event::Folder { folder } => {
                self.update(*folder);
                Ok(())
            }
            Event::FolderConflict { folder, path } => {
                let name = self.views.get(&folder).map_or(&folder, |view| &view.folder.name);
                self.note(&format!("{}: conflict, both are kept: {}", clean(name), clean(&path)));
                Ok(())
            }
            Event::FolderLeft { folder } => {
                if let Some(view) = self.views.remove(&folder) {
                    if let (Some(bars), Some(bar)) = (&self.bars, &view.bar) {
                        bars.remove(bar);
                    }
                    self.note(&format!("{}: synced here no longer", clean(&view.folder.name)));
                }
                Ok(())
            }
            // there may be thousands a second, and a person can pull them
            Event::BlobAvailable { .. } | Event::Lagged { .. } | Event::Unknown => Ok(()),
        }
    }

    fn update(&mut self, folder: FolderStatus) {
        if self.out.is_json() {
            return;
        }
        let view = self.views.entry(folder.id.clone()).or_insert_with(|| View::new(folder.clone()));
        view.take(folder);
        if let Some(bars) = &self.bars {
            let bar = view.bar.get_or_insert_with(|| bars.add(ProgressBar::new(0)));
            show(bar, &view.folder, view.rates.now(), view.peak);
        }
        self.tick();
    }

    /// Writes the lines that are due.
    fn tick(&mut self) {
        if self.out.is_json() || self.bars.is_some() {
            return;
        }
        for view in self.views.values_mut() {
            if view.news && view.told.is_none_or(|told| told.elapsed() >= LINE_EVERY) {
                view.news = false;
                view.told = Some(Instant::now());
                self.out.note(in_words(&view.folder, view.rates.now()));
            }
        }
    }

    fn say(&self, text: &str) -> Result<(), Failure> {
        match &self.bars {
            Some(bars) => bars.suspend(|| self.out.text(text)),
            None => self.out.text(text),
        }
    }

    fn note(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| self.out.note(text)),
            None => self.out.note(text),
        }
    }
}

impl View {
    fn new(folder: FolderStatus) -> Self {
        Self { folder, rates: Rates::default(), bar: None, peak: 0, told: None, news: true }
    }

    fn take(&mut self, folder: FolderStatus) {
        self.rates.add(Instant::now(), folder.fetched_bytes, folder.served_bytes);
        self.peak = if folder.pending_bytes == 0 { 0 } else { self.peak.max(folder.pending_bytes) };
        self.news |= folder != self.folder;
        self.folder = folder;
    }
}

fn show(bar: &ProgressBar, folder: &FolderStatus, rate: Rate, peak: u64) {
    let template = if peak > 0 { "{bar:24} {wide_msg}" } else { "{wide_msg}" };
    // both templates are fixed and parse
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_length(peak);
    bar.set_position(peak - folder.pending_bytes.min(peak));
    bar.set_message(in_words(folder, rate));
}

/// Bytes per second, each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) down: u64,
    pub(crate) up: u64,
}

/// What was moved by when, over the last seconds.
#[derive(Debug, Default)]
struct Rates(VecDeque<(Instant, u64, u64)>);

impl Rates {
    fn add(&mut self, now: Instant, down: u64, up: u64) {
        while self.0.len() > 1 && self.0.get(1).is_some_and(|(then, ..)| now.duration_since(*then) >= RATE_SPAN) {
            self.0.pop_front();
        }
        self.0.push_back((now, down, up));
    }

    fn now(&self) -> Rate {
        let (Some((first, down, up)), Some((last, down_now, up_now))) = (self.0.front(), self.0.back()) else {
            return Rate::default();
        };
        let millis = u64::try_from(last.duration_since(*first).as_millis()).unwrap_or(u64::MAX);
        let per_second = |bytes: u64| bytes.saturating_mul(1000).checked_div(millis).unwrap_or(0);
        Rate { down: per_second(down_now.saturating_sub(*down)), up: per_second(up_now.saturating_sub(*up)) }
    }
}

/// How much of a folder this device does not take, if it does not take everything.
pub(crate) fn left_out_in_words(folder: &FolderStatus) -> Option<String> {
    let (files, bytes) = (HumanCount(folder.left_out_files), BinaryBytes(folder.left_out_bytes));
    (!folder.selected.is_empty()).then(|| format!("{files} files and {bytes} are left out here"))
}

/// A folder and what it does, in one line.
pub(crate) fn in_words(folder: &FolderStatus, rate: Rate) -> String {
    let mut text = format!("{}: ", clean(&folder.name));
    match folder.state {
        FolderState::UpToDate => {
            let files = HumanCount(folder.files.saturating_sub(folder.left_out_files));
            let bytes = BinaryBytes(folder.bytes.saturating_sub(folder.left_out_bytes));
            text += &format!("up to date, {files} files, {bytes}");
        }
        FolderState::Scanning => text += &format!("reading, {} files so far", HumanCount(folder.scanned_files)),
        FolderState::Syncing => {
            let (files, bytes) = (HumanCount(folder.pending_files), BinaryBytes(folder.pending_bytes));
            text += &format!("syncing, {files} files and {bytes} to go");
        }
        FolderState::Paused => text += "paused",
        FolderState::Stopped => {
            text += &format!("stopped: {}", clean(folder.problem.as_deref().unwrap_or("no reason is given")));
        }
        _ => text += "in a state of a later version",
    }
    if let Some(left_out) = left_out_in_words(folder) {
        text += &format!("; {left_out}");
    }
    for (bytes, way) in [(rate.down, "down"), (rate.up, "up")] {
        if bytes >= SHOWN {
            text += &format!(", {}/s {way}", BinaryBytes(bytes));
        }
    }
    if folder.state == FolderState::Syncing
        && let Some(seconds) = folder.pending_bytes.checked_div(rate.down)
    {
        text += &format!(", {:#} left", HumanDuration(Duration::from_secs(seconds)));
    }
    match folder.problems.len() {
        0 => {}
        1 => text += "; 1 path is not in sync",
        count => text += &format!("; {count} paths are not in sync"),
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::select::tests::folder;

    #[test]
    fn a_rate_is_taken_over_the_last_seconds() {
        let mut rates = Rates::default();
        assert_eq!(rates.now(), Rate::default());
        let start = Instant::now();
        for second in 0..20 {
            // it moves at 1000 a second, and from the tenth second on not at all
            rates.add(start + Duration::from_secs(second), 1000 * second.min(10), second);
            match second {
                0 => assert_eq!(rates.now(), Rate::default()),
                1..=10 => assert_eq!(rates.now(), Rate { down: 1000, up: 1 }, "{second}"),
                16.. => assert_eq!(rates.now(), Rate { down: 0, up: 1 }, "{second}"),
                _ => assert!(rates.now().down < 1000, "{second}"),
            }
        }
        assert!(rates.0.len() < 10);
    }

    #[test]
    fn a_folder_is_told_in_one_line() {
        let still = FolderStatus { files: 1234, bytes: 3 << 30, ..folder("aa", "photos\x1b", Path::new("/p")) };
        let rate = Rate { down: 2 << 20, up: 0 };
        let syncing =
            FolderStatus { state: FolderState::Syncing, pending_files: 12, pending_bytes: 30 << 20, ..still.clone() };
        let stopped =
            FolderStatus { state: FolderState::Stopped, problem: Some("the disk is gone".into()), ..still.clone() };
        let selected = vec!["a".to_owned()];
        let partly = FolderStatus { selected, left_out_files: 1000, left_out_bytes: 2 << 30, ..still.clone() };
        let scanning = FolderStatus { state: FolderState::Scanning, scanned_files: 5, ..still.clone() };
        for (folder, rate, expected) in [
            (&still, Rate::default(), "photos\u{fffd}: up to date, 1,234 files, 3.00 GiB"),
            (&syncing, rate, "photos\u{fffd}: syncing, 12 files and 30.00 MiB to go, 2.00 MiB/s down, 15s left"),
            (&syncing, Rate::default(), "photos\u{fffd}: syncing, 12 files and 30.00 MiB to go"),
            (&stopped, Rate::default(), "photos\u{fffd}: stopped: the disk is gone"),
            (&scanning, Rate::default(), "photos\u{fffd}: reading, 5 files so far"),
            (
                &partly,
                Rate::default(),
                "photos\u{fffd}: up to date, 234 files, 1.00 GiB; 1,000 files and 2.00 GiB are left out here",
            ),
        ] {
            assert_eq!(in_words(folder, rate), expected);
        }
    }

    #[test]
    fn a_line_is_due_at_once_and_then_every_few_seconds() {
        let mut view = View::new(folder("aa", "photos", Path::new("/p")));
        assert!(view.news);
        view.news = false;
        view.take(folder("aa", "photos", Path::new("/p")));
        assert!(!view.news, "nothing has changed");
        view.take(FolderStatus { pending_bytes: 7, ..folder("aa", "photos", Path::new("/p")) });
        assert!(view.news);
        assert_eq!(view.peak, 7);
        view.take(FolderStatus { pending_bytes: 3, ..folder("aa", "photos", Path::new("/p")) });
        assert_eq!(view.peak, 7);
        view.take(folder("aa", "photos", Path::new("/p")));
        assert_eq!(view.peak, 0);
    }
}
