//! Who is asked for what: wants spread over sources, each of which answers in the order it was asked in.
//!
//! Pure: time comes in as an argument, and a source is woken when there is something to ask it for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Want;

/// Chunks under way from one source at most: small ones come by the packet, and a round trip of 50 ms still lets 20,000 a
/// second through.
pub(super) const WINDOW_CHUNKS: usize = 1024;
/// Bytes under way from one source at most: more than any link holds.
const WINDOW_MAX: u64 = 32 << 20;
/// Bytes under way from a source that is slow; one chunk always is.
const WINDOW_MIN: u64 = 1 << 20;
/// Bytes under way from a source that is new.
const WINDOW_START: u64 = 8 << 20;
/// What is answered within this time may be more.
const QUICK: Duration = Duration::from_secs(1);
/// What takes longer than this is too much: at the end, everyone waits for the slowest.
const SLOW: Duration = Duration::from_secs(2);

/// Wants, and the sources they are with.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    sources: BTreeMap<u64, Source>,
    /// With nobody, the oldest first.
    waiting: VecDeque<Item>,
    nowhere: VecDeque<[u8; 32]>,
}

#[derive(Debug)]
struct Source {
    /// In the order of the answers.
    items: VecDeque<Item>,
    /// How many of them it was asked for.
    asked: usize,
    bytes: u64,
    window: u64,
    wake: Arc<Notify>,
}

#[derive(Debug)]
struct Item {
    want: Want,
    /// Sources that do not have it.
    without: Vec<u64>,
    /// Whether it was with no source yet.
    new: bool,
    /// When it was given to its source.
    since: Option<Instant>,
}

impl Source {
    fn has_room(&self) -> bool {
        self.items.len() < WINDOW_CHUNKS && self.bytes < self.window
    }

    fn take_front(&mut self) -> Option<Item> {
        self.asked = self.asked.checked_sub(1)?;
        let item = self.items.pop_front()?;
        self.bytes -= u64::from(item.want.len);
        Some(item)
    }
}

impl Schedule {
    /// Adds a want.
    pub(super) fn push(&mut self, want: Want) {
        self.waiting.push_back(Item { want, without: Vec::new(), new: true, since: None });
    }

    /// Adds a source, which is woken when [`Self::take_asks`] has something for it.
    pub(super) fn up(&mut self, source: u64, wake: Arc<Notify>) {
        self.down(source);
        let source_state = Source { items: VecDeque::new(), asked: 0, bytes: 0, window: WINDOW_START, wake };
        self.sources.insert(source, source_state);
    }

    /// Removes a source; what it was to answer waits for others.
    pub(super) fn down(&mut self, source: u64) {
        let Some(mut gone) = self.sources.remove(&source) else { return };
        while let Some(item) = gone.items.pop_back() {
            self.waiting.push_front(item);
        }
    }

    /// Gives wants to sources with room, the least busy first, and gives up those that no source has; how many left the
    /// queue for the first time.
    pub(super) fn dispatch(&mut self, now: Instant) -> usize {
        let mut new = 0;
        let mut at = 0;
        while at < self.waiting.len() && self.sources.values().any(Source::has_room) {
            let without = &self.waiting[at].without;
            let mut anyone = false;
            let candidates = self.sources.iter_mut().filter(|(id, _)| !without.contains(id));
            let free = candidates.inspect(|_| anyone = true).filter(|(_, source)| source.has_room());
            let best = free.min_by_key(|(_, source)| (source.bytes, source.items.len())).map(|(_, source)| source);
            if best.is_none() && anyone {
                // all that may have it are busy
                at += 1;
                continue;
            }
            let Some(mut item) = self.waiting.remove(at) else { break };
            new += usize::from(std::mem::take(&mut item.new));
            if let Some(source) = best {
                source.bytes += u64::from(item.want.len);
                item.since = Some(now);
                source.items.push_back(item);
                source.wake.notify_one();
            } else {
                self.nowhere.push_back(item.want.hash);
            }
        }
        new
    }

    /// Gives up what waits if there is no source at all; how many left the queue for the first time.
    pub(super) fn give_up(&mut self) -> usize {
        if !self.sources.is_empty() {
            return 0;
        }
        let new = self.waiting.iter().filter(|item| item.new).count();
        self.nowhere.extend(self.waiting.drain(..).map(|item| item.want.hash));
        new
    }

    /// A want that nobody has, or that nobody was there for.
    pub(super) fn pop_nowhere(&mut self) -> Option<[u8; 32]> {
        self.nowhere.pop_front()
    }

    /// What a source is to be asked for next, at most `max`.
    pub(super) fn take_asks(&mut self, source: u64, max: usize) -> Vec<[u8; 32]> {
        let Some(source) = self.sources.get_mut(&source) else { return Vec::new() };
        let asks: Vec<_> = source.items.iter().skip(source.asked).take(max).map(|item| item.want.hash).collect();
        source.asked += asks.len();
        asks
    }

    /// What a source is to answer next.
    pub(super) fn awaited(&self, source: u64) -> Option<Want> {
        let source = self.sources.get(&source)?;
        if source.asked == 0 {
            return None;
        }
        source.items.front().map(|item| item.want)
    }

    /// The source has answered with what was asked for.
    pub(super) fn answered(&mut self, source: u64, now: Instant) {
        let Some(source) = self.sources.get_mut(&source) else { return };
        let Some(item) = source.take_front() else { return };
        let took = item.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let len = u64::from(item.want.len);
        if took < QUICK {
            source.window = (source.window + len).min(WINDOW_MAX);
        } else if took > SLOW {
            source.window = source.window.saturating_sub(len).max(WINDOW_MIN);
        }
    }

    /// The source does not have what it was to answer.
    pub(super) fn missing(&mut self, source: u64) {
        let Some(mut item) = self.sources.get_mut(&source).and_then(Source::take_front) else { return };
        item.without.push(source);
        self.waiting.push_front(item);
    }

    /// Nothing waits, is under way or has to be told.
    pub(super) fn is_idle(&self) -> bool {
        let mut sources = self.sources.values();
        self.waiting.is_empty() && self.nowhere.is_empty() && sources.all(|source| source.items.is_empty())
    }

    /// Something waits and nobody is there.
    pub(super) fn is_stranded(&self) -> bool {
        self.sources.is_empty() && !self.waiting.is_empty()
    }

    /// Something has to be told, is stranded, or all is done.
    pub(super) fn needs_attention(&self) -> bool {
        !self.nowhere.is_empty() || self.is_stranded() || self.is_idle()
    }
}
