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
/// Bytes under way from a source that was silent: one chunk, until it has answered.
const WINDOW_PROBE: u64 = 1;
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
    /// When it last answered.
    last: Option<Instant>,
    /// The window is filled to its end, and then only once a part of it is free: small chunks are asked for many at once.
    filling: bool,
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
    fn settle(&mut self) {
        if self.items.len() >= WINDOW_CHUNKS || self.bytes >= self.window {
            self.filling = false;
        } else if self.items.len() <= WINDOW_CHUNKS / 4 * 3 && self.bytes <= self.window / 4 * 3 {
            self.filling = true;
        }
    }

    fn give(&mut self, item: Item) {
        self.bytes += u64::from(item.want.len);
        self.items.push_back(item);
        self.settle();
        self.wake.notify_one();
    }

    fn take_front(&mut self) -> Option<Item> {
        self.asked = self.asked.checked_sub(1)?;
        let item = self.items.pop_front()?;
        self.bytes -= u64::from(item.want.len);
        self.settle();
        Some(item)
    }
}

impl Schedule {
    /// Adds a want.
    pub(super) fn push(&mut self, want: Want) {
        self.waiting.push_back(Item { want, without: Vec::new(), new: true, since: None });
    }

    /// Adds a source, which is woken when [`Self::take_asks`] has something for it.
    ///
    /// One that was silent is asked for one thing, and for no more before it has answered: the rest does not wait for it.
    pub(super) fn up(&mut self, source: u64, wake: Arc<Notify>, was_silent: bool) {
        self.down(source);
        let window = if was_silent { WINDOW_PROBE } else { WINDOW_START };
        let new = Source { items: VecDeque::new(), asked: 0, bytes: 0, window, last: None, filling: true, wake };
        self.sources.insert(source, new);
    }

    /// Whether what a source is to answer may be had from another one that answers, or has nothing to do.
    ///
    /// One that is slow itself is nobody to turn to, or what two slow ones send would come from neither.
    pub(super) fn is_elsewhere(&self, source: u64, now: Instant) -> bool {
        let Some(item) = self.sources.get(&source).and_then(|source| source.items.front()) else { return false };
        let answers = |other: &Source| {
            let lately = other.last.is_some_and(|last| now.saturating_duration_since(last) < QUICK);
            other.window != WINDOW_PROBE && (other.items.is_empty() || lately)
        };
        let mut others = self.sources.iter().filter(|(id, _)| **id != source && !item.without.contains(id));
        others.any(|(_, other)| answers(other))
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
        while at < self.waiting.len() && self.sources.values().any(|source| source.filling) {
            let without = &self.waiting[at].without;
            let mut anyone = false;
            let candidates = self.sources.iter_mut().filter(|(id, _)| !without.contains(id));
            let free = candidates.inspect(|_| anyone = true).filter(|(_, source)| source.filling);
            let best = free.min_by_key(|(_, source)| (source.bytes, source.items.len())).map(|(_, source)| source);
            if best.is_none() && anyone {
                // all that may have it are busy
                at += 1;
                continue;
            }
            let Some(mut item) = self.waiting.remove(at) else { break };
            new += usize::from(std::mem::take(&mut item.new));
            if let Some(source) = best {
                item.since = Some(now);
                source.give(item);
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
        source.last = Some(now);
        if source.window == WINDOW_PROBE {
            source.window = WINDOW_START;
            return source.settle();
        }
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
        let Some(from) = self.sources.get_mut(&source) else { return };
        let Some(mut item) = from.take_front() else { return };
        from.window = from.window.max(WINDOW_MIN);
        from.settle();
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand_chacha::ChaCha8Rng;
    use rand_core::{Rng as _, SeedableRng as _};

    use super::*;

    fn want(number: u32, len: u32) -> Want {
        let mut hash = [0; 32];
        hash[..4].copy_from_slice(&number.to_le_bytes());
        Want { hash, len }
    }

    fn number(hash: [u8; 32]) -> u32 {
        u32::from_le_bytes(*hash.first_chunk().expect("32 bytes"))
    }

    fn with(sources: &[u64], wants: impl IntoIterator<Item = Want>) -> Schedule {
        let mut schedule = Schedule::default();
        sources.iter().for_each(|source| schedule.up(*source, Arc::default(), false));
        wants.into_iter().for_each(|want| schedule.push(want));
        schedule.dispatch(Instant::now());
        schedule
    }

    fn asks(schedule: &mut Schedule, source: u64) -> Vec<u32> {
        schedule.take_asks(source, usize::MAX).into_iter().map(number).collect()
    }

    #[test]
    fn wants_go_to_the_least_busy_and_windows_bound_what_is_under_way() {
        let mut schedule = with(&[1, 2], (0..10).map(|number| want(number, 1000)));
        assert_eq!(asks(&mut schedule, 1), [0, 2, 4, 6, 8]);
        assert_eq!(asks(&mut schedule, 2), [1, 3, 5, 7, 9]);
        let mut small = with(&[1, 2], (0..5000).map(|number| want(number, 1)));
        assert_eq!((asks(&mut small, 1).len(), asks(&mut small, 2).len()), (WINDOW_CHUNKS, WINDOW_CHUNKS));
        let mut large = with(&[1], (0..100).map(|number| want(number, 4 << 20)));
        assert_eq!(asks(&mut large, 1), [0, 1]);
        let now = Instant::now();
        for _ in 0..20 {
            large.answered(1, now);
            large.dispatch(now);
            asks(&mut large, 1);
        }
        assert_eq!(large.sources[&1].window, WINDOW_MAX, "what is quick gets more");
        for _ in 0..20 {
            large.answered(1, now + 10 * SLOW);
            large.dispatch(now);
            asks(&mut large, 1);
            assert!(large.awaited(1).is_some() && large.sources[&1].items.len() <= 8);
        }
        assert_eq!(large.sources[&1].window, WINDOW_MIN, "what is slow gets less");
    }

    #[test]
    fn what_one_lacks_others_are_asked_for_and_what_all_lack_is_given_up() {
        let mut schedule = with(&[1, 2, 3], [want(7, 1)]);
        for source in [1, 2, 3] {
            assert_eq!(schedule.pop_nowhere(), None);
            assert_eq!(asks(&mut schedule, source), [7]);
            schedule.missing(source);
            schedule.dispatch(Instant::now());
        }
        assert_eq!(schedule.pop_nowhere().map(number), Some(7));
        assert!(schedule.is_idle());
    }

    #[test]
    fn what_a_lost_source_was_to_answer_others_are_asked_for_first() {
        let mut schedule = with(&[1], (0..2000).map(|number| want(number, 1)));
        asks(&mut schedule, 1);
        schedule.answered(1, Instant::now());
        schedule.down(1);
        assert!(schedule.is_stranded());
        schedule.up(2, Arc::default(), false);
        schedule.dispatch(Instant::now());
        assert_eq!(asks(&mut schedule, 2), (1..=1024).collect::<Vec<_>>());
        schedule.answered(1, Instant::now());
        schedule.missing(1);
        assert_eq!(schedule.sources[&2].items.len(), WINDOW_CHUNKS, "what a lost one says no longer counts");
    }

    #[test]
    fn who_was_silent_is_asked_for_one_thing_until_it_answers() {
        let mut schedule = Schedule::default();
        schedule.up(1, Arc::default(), true);
        schedule.up(2, Arc::default(), false);
        (0..100).for_each(|number| schedule.push(want(number, 10)));
        schedule.dispatch(Instant::now());
        assert_eq!(asks(&mut schedule, 1).len(), 1);
        assert_eq!(asks(&mut schedule, 2).len(), 99);
        schedule.down(2);
        schedule.answered(1, Instant::now());
        schedule.dispatch(Instant::now());
        assert_eq!(asks(&mut schedule, 1).len(), 99);
    }

    #[test]
    fn whom_to_turn_to_from_a_silent_source_is_one_that_answers() {
        let now = Instant::now();
        let mut schedule = with(&[1, 2], [want(1, 10), want(2, 10)]);
        assert_eq!([asks(&mut schedule, 1), asks(&mut schedule, 2)], [[1], [2]]);
        assert!(!schedule.is_elsewhere(1, now), "the other one has said nothing either");
        schedule.answered(2, now);
        assert!(schedule.is_elsewhere(1, now), "it has nothing to do");
        schedule.push(want(3, 10));
        schedule.push(want(4, 100));
        schedule.dispatch(now);
        assert!(schedule.is_elsewhere(1, now), "it has answered just now");
        assert!(!schedule.is_elsewhere(1, now + 10 * QUICK));
        schedule.up(2, Arc::default(), true);
        assert!(!schedule.is_elsewhere(1, now), "it was silent");
        schedule.down(2);
        assert!(!schedule.is_elsewhere(1, now) && !schedule.is_elsewhere(2, now));
        let mut lacks = with(&[1, 2], [want(1, 10)]);
        asks(&mut lacks, 1);
        lacks.missing(1);
        lacks.dispatch(now);
        asks(&mut lacks, 2);
        assert!(!lacks.is_elsewhere(2, now), "the other one does not have it");
    }

    /// Whatever sources do, every want is answered once or given up once, and only after all that are there were asked.
    #[test]
    fn no_want_is_lost_or_answered_twice() {
        for seed in 0..300 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut draw = |below: u32| rng.next_u32() % below;
            let mut schedule = Schedule::default();
            let (mut up, mut pushed, mut left) = (BTreeSet::new(), 0, 0);
            let (mut done, mut lacking) = (BTreeSet::new(), BTreeSet::new());
            for step in 0..2000 {
                let (now, source) = (Instant::now(), u64::from(draw(4)));
                match draw(12) {
                    _ if step > 1500 && up.is_empty() => {
                        schedule.up(source, Arc::default(), seed % 3 == 0);
                        up.insert(source);
                    }
                    0 if step < 1500 => {
                        schedule.down(source);
                        up.remove(&source);
                    }
                    1 if !up.contains(&source) => {
                        schedule.up(source, Arc::default(), seed % 3 == 0);
                        up.insert(source);
                    }
                    2..5 if step < 1500 => {
                        schedule.push(want(pushed, draw(4 << 20)));
                        pushed += 1;
                    }
                    5 => {
                        schedule.take_asks(source, 3);
                    }
                    6 if step < 1500 => {
                        if let Some(want) = schedule.awaited(source) {
                            lacking.insert((number(want.hash), source));
                            schedule.missing(source);
                        }
                    }
                    _ => {
                        if let Some(want) = schedule.awaited(source) {
                            assert!(done.insert(number(want.hash)), "seed {seed}: answered twice");
                            schedule.answered(source, now);
                        }
                    }
                }
                left += schedule.dispatch(now);
                while let Some(hash) = schedule.pop_nowhere() {
                    let number = number(hash);
                    assert!(
                        up.iter().all(|source| lacking.contains(&(number, *source))),
                        "seed {seed}: given up early"
                    );
                    assert!(done.insert(number), "seed {seed}: answered twice");
                }
                assert!(schedule.sources.values().all(|source| source.items.len() <= WINDOW_CHUNKS));
            }
            while !schedule.is_idle() {
                for source in &up {
                    schedule.take_asks(*source, usize::MAX);
                    while let Some(want) = schedule.awaited(*source) {
                        assert!(done.insert(number(want.hash)), "seed {seed}: answered twice");
                        schedule.answered(*source, Instant::now());
                    }
                }
                left += schedule.dispatch(Instant::now());
                while let Some(hash) = schedule.pop_nowhere() {
                    assert!(done.insert(number(hash)), "seed {seed}: answered twice");
                }
            }
            assert_eq!(done.len(), pushed as usize, "seed {seed}: none is lost");
            assert_eq!(left, pushed as usize, "seed {seed}: each left the queue once");
        }
    }
}
