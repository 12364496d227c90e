//! What is held of a feed: ranges of numbers, the head, and where it forks.

use sync_types::bounds::{MAX_RANGES, MAX_WANTS};
use sync_types::{AuthorId, EnvelopeHash, Number, Range, Want};

/// A set of numbers kept as ranges, ascending and never touching.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<Range>,
}

impl RangeSet {
    /// The set of all numbers in some ranges.
    pub fn from_ranges(ranges: impl IntoIterator<Item = Range>) -> Self {
        let mut ranges: Vec<Range> = ranges.into_iter().collect();
        ranges.sort_unstable();
        let mut set = Self::default();
        for range in ranges {
            set.append(range);
        }
        set
    }

    /// Adds a range that starts no earlier than the last one does.
    fn append(&mut self, range: Range) {
        match self.ranges.last_mut() {
            Some(last) if range.first.0 <= last.last.0.saturating_add(1) => last.last = last.last.max(range.last),
            _ => self.ranges.push(range),
        }
    }

    /// Adds a number; false if it was there.
    pub fn insert(&mut self, number: Number) -> bool {
        let at = self.ranges.partition_point(|range| range.last < number);
        if self.ranges.get(at).is_some_and(|range| range.first <= number) {
            return false;
        }
        let joins_next = self.ranges.get(at).is_some_and(|next| next.first.0 == number.0.saturating_add(1));
        let joins_last = at > 0 && self.ranges[at - 1].last.0.saturating_add(1) == number.0;
        match (joins_last, joins_next) {
            (true, true) => {
                self.ranges[at - 1].last = self.ranges[at].last;
                self.ranges.remove(at);
            }
            (true, false) => self.ranges[at - 1].last = number,
            (false, true) => self.ranges[at].first = number,
            (false, false) => self.ranges.insert(at, Range { first: number, last: number }),
        }
        true
    }

    /// The parts of a range that are not in the set, ascending.
    #[must_use]
    pub fn lacking(&self, range: Range) -> Vec<Range> {
        let mut lacking = Vec::new();
        let mut next = range.first.0;
        let from = self.ranges.partition_point(|held| held.last < range.first);
        for held in self.ranges[from..].iter().take_while(|held| held.first <= range.last) {
            if held.first.0 > next {
                lacking.push(Range { first: Number(next), last: Number(held.first.0 - 1) });
            }
            next = held.last.0.saturating_add(1);
        }
        if next <= range.last.0 {
            lacking.push(Range { first: Number(next), last: range.last });
        }
        lacking
    }

    /// The set without the numbers of some ranges.
    #[must_use]
    pub fn without(&self, ranges: &[Range]) -> Self {
        let out = Self::from_ranges(ranges.iter().copied());
        Self { ranges: self.ranges.iter().flat_map(|range| out.lacking(*range)).collect() }
    }

    /// Takes a number out; false if it was not there.
    pub fn remove(&mut self, number: Number) -> bool {
        let at = self.ranges.partition_point(|range| range.last < number);
        let Some(range) = self.ranges.get(at).copied().filter(|range| range.contains(number)) else {
            return false;
        };
        self.ranges.remove(at);
        if number < range.last {
            self.ranges.insert(at, Range { first: Number(number.0 + 1), last: range.last });
        }
        if range.first < number {
            self.ranges.insert(at, Range { first: range.first, last: Number(number.0 - 1) });
        }
        true
    }

    /// Whether a number is in the set.
    #[must_use]
    pub fn contains(&self, number: Number) -> bool {
        let at = self.ranges.partition_point(|range| range.last < number);
        self.ranges.get(at).is_some_and(|range| range.first <= number)
    }

    /// The ranges, ascending.
    #[must_use]
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// The highest number.
    #[must_use]
    pub fn highest(&self) -> Option<Number> {
        self.ranges.last().map(|range| range.last)
    }

    /// The numbers lacking below the highest.
    #[must_use]
    pub fn gaps(&self) -> Vec<Range> {
        let mut next = 1;
        let mut gaps = Vec::new();
        for range in &self.ranges {
            if range.first.0 > next {
                gaps.push(Range { first: Number(next), last: Number(range.first.0 - 1) });
            }
            next = range.last.0.saturating_add(1);
        }
        gaps
    }
}

/// What is held of one feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedState {
    /// The numbers.
    pub held: RangeSet,
    /// Hash of the highest envelope held.
    pub head: EnvelopeHash,
    /// Lowest number with two known hashes: there the feed is closed.
    pub fork: Option<Number>,
}

impl Default for FeedState {
    fn default() -> Self {
        Self { held: RangeSet::default(), head: EnvelopeHash::NONE, fork: None }
    }
}

impl FeedState {
    /// Takes in an envelope that counts, with the lowest number that it shows to have two hashes.
    pub fn take(&mut self, number: Number, hash: EnvelopeHash, fork: Option<Number>) {
        let highest = self.held.highest();
        if highest.is_none_or(|highest| number > highest) {
            self.head = hash;
        } else if highest == Some(number) {
            // of two the lower hash, whichever came first
            self.head = self.head.min(hash);
        }
        self.held.insert(number);
        self.fork = [self.fork, fork].into_iter().flatten().min();
    }

    /// The number below which a blind replica may drop what is old: the last entry stays, and everything from a fork on.
    #[must_use]
    pub fn may_expire_below(&self) -> Option<Number> {
        let highest = self.held.highest()?;
        Some(self.fork.map_or(highest, |fork| fork.min(highest)))
    }
}

/// Numbers of a feed that were dropped, and the hash at their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DroppedRange {
    /// The numbers.
    pub range: Range,
    /// Hash of the envelope at the last of them.
    pub head: EnvelopeHash,
}

impl DroppedRange {
    /// The same as one range with what was dropped right before and right behind it.
    #[must_use]
    pub fn joined(self, before: Option<Self>, behind: Option<Self>) -> Self {
        let first = before.map_or(self.range.first, |before| before.range.first);
        // the head of what lies behind is known, that of a gap before it may not be
        let (last, head) = behind.map_or((self.range.last, self.head), |behind| (behind.range.last, behind.head));
        Self { range: Range { first, last }, head }
    }
}

/// The numbers lacking below the highest held of each feed, at most [`MAX_WANTS`] ranges: `held` has all ranges of one
/// feed after another, ascending.
pub fn wants<E>(held: impl IntoIterator<Item = Result<(AuthorId, Range), E>>) -> Result<Vec<Want>, E> {
    let mut wants = Vec::new();
    let mut before: Option<(AuthorId, Number)> = None;
    let mut of_feed = 0;
    for item in held {
        let (author, held) = item?;
        let next = before.filter(|(of, _)| *of == author).map_or(1, |(_, last)| last.0.saturating_add(1));
        of_feed = if before.is_some_and(|(of, _)| of == author) { of_feed } else { 0 };
        if next < held.first.0 && of_feed < MAX_RANGES {
            if wants.len() == MAX_WANTS {
                break;
            }
            // a share for each feed: one full of holes does not hide those of others
            of_feed += 1;
            wants.push(Want { author, range: Range { first: Number(next), last: Number(held.first.0 - 1) } });
        }
        before = Some((author, held.last));
    }
    Ok(wants)
}

/// What two replicas compare of a forked feed: BLAKE3 over the sorted hashes held from the fork on.
#[must_use]
pub fn fork_digest(mut hashes: Vec<EnvelopeHash>) -> [u8; 32] {
    hashes.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    for hash in &hashes {
        hasher.update(&hash.0);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn check(steps: &[(bool, u64)]) -> Result<(), TestCaseError> {
        let mut set = RangeSet::default();
        let mut model = BTreeSet::new();
        for &(add, number) in steps {
            if add {
                prop_assert_eq!(set.insert(Number(number)), model.insert(number));
            } else {
                prop_assert_eq!(set.remove(Number(number)), model.remove(&number));
            }
            prop_assert!(set.ranges().windows(2).all(|pair| pair[0].last.0 + 1 < pair[1].first.0));
        }
        for number in 1..40 {
            prop_assert_eq!(set.contains(Number(number)), model.contains(&number));
            let lacking = set.gaps().iter().any(|gap| gap.contains(Number(number)));
            let below = model.last().is_some_and(|&highest| number < highest);
            prop_assert_eq!(lacking, below && !model.contains(&number));
        }
        prop_assert_eq!(RangeSet::from_ranges(set.ranges().iter().rev().copied()), set);
        Ok(())
    }

    proptest! {
        #[test]
        fn a_range_set_is_a_set(steps in proptest::collection::vec((any::<bool>(), 1u64..40), 0..120)) {
            check(&steps)?;
        }
    }

    proptest! {
        #[test]
        fn what_lacks_of_a_range_is_what_is_not_in_the_set(
            numbers in proptest::collection::vec(1u64..40, 0..30), first in 1u64..40, len in 0u64..20,
        ) {
            let mut set = RangeSet::default();
            for number in &numbers {
                set.insert(Number(*number));
            }
            let range = Range { first: Number(first), last: Number(first + len) };
            let lacking = set.lacking(range);
            for number in 1..70 {
                let lacks = lacking.iter().any(|range| range.contains(Number(number)));
                prop_assert_eq!(lacks, range.contains(Number(number)) && !numbers.contains(&number));
                let left = set.without(&[range]).contains(Number(number));
                prop_assert_eq!(left, numbers.contains(&number) && !range.contains(Number(number)));
            }
        }
    }

    #[test]
    fn the_largest_number_does_not_overflow() {
        let mut set = RangeSet::default();
        assert!(set.insert(Number(u64::MAX)));
        assert!(set.insert(Number(u64::MAX - 1)));
        assert!(!set.insert(Number(u64::MAX)));
        assert_eq!(set.gaps(), vec![Range { first: Number(1), last: Number(u64::MAX - 2) }]);
        assert!(set.remove(Number(u64::MAX)));
    }
}
