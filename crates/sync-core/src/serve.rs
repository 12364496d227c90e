//! What a peer lacks: compares what it says it holds with what is held here.

use std::collections::BTreeMap;

use sync_types::{AuthorId, Class, EnvelopeHash, FeedHave, Number, Range, Scope};

/// What a replica knows of its own feeds, for comparing.
pub trait Own {
    /// Why it could not be read.
    type Error;

    /// What is held of a feed.
    fn feed(&mut self, author: &AuthorId) -> Result<Option<FeedHave>, Self::Error>;

    /// Hashes held at a number, more than one at a fork.
    fn hashes_at(&mut self, author: &AuthorId, number: Number) -> Result<Vec<EnvelopeHash>, Self::Error>;
}

/// Decides for every entry whether a peer is to be sent it.
#[derive(Debug, Clone)]
pub struct Selection {
    scope: Scope,
    feeds: BTreeMap<AuthorId, Skip>,
}

#[derive(Debug, Clone, Default)]
struct Skip {
    held: Vec<Range>,
    /// From here on the peer's ranges say nothing, because it holds another branch.
    all_from: Option<Number>,
    covered: Vec<Range>,
}

impl Selection {
    /// Everything in a scope, for a peer that said nothing.
    #[must_use]
    pub fn everything(scope: Scope) -> Self {
        Self { scope, feeds: BTreeMap::new() }
    }

    /// What a peer lacks that says it holds `have` and does not want `covered`.
    pub fn new<O: Own>(scope: Scope, have: &[FeedHave], covered: &[FeedHave], own: &mut O) -> Result<Self, O::Error> {
        let mut feeds: BTreeMap<AuthorId, Skip> = BTreeMap::new();
        for theirs in have {
            let all_from = diverges_from(theirs, own)?;
            let skip = feeds.entry(theirs.author).or_default();
            skip.held = theirs.ranges.clone();
            skip.all_from = all_from;
        }
        for theirs in covered {
            feeds.entry(theirs.author).or_default().covered = theirs.ranges.clone();
        }
        Ok(Self { scope, feeds })
    }

    /// Which entries are meant.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Whether the peer may hold another branch of some feed.
    #[must_use]
    pub fn diverges(&self) -> bool {
        self.feeds.values().any(|skip| skip.all_from.is_some())
    }

    /// Whether the peer is to be sent this entry.
    #[must_use]
    pub fn wanted(&self, author: &AuthorId, number: Number, class: Class) -> bool {
        let held = |skip: &Skip| skip.all_from.is_none_or(|from| number < from) && contains(&skip.held, number);
        self.allows(author, number, class) && !self.feeds.get(author).is_some_and(held)
    }

    /// Whether the peer is sent this entry: `along` says that it reads along, `forked` that the entry's feed has two
    /// branches here.
    ///
    /// Among everything are all operations and rotations, also under numbers that the peer says it holds: it may hold
    /// another branch there, and would refuse whom they admit, or have been told that a snapshot covers them.
    #[must_use]
    pub fn sends(&self, author: &AuthorId, number: Number, class: Class, along: bool, forked: bool) -> bool {
        let open = self.scope == Scope::All && class != Class::Sealed;
        // of a fork that showed after the peer said what it holds, it may hold either branch
        let branch = (along && forked) || open;
        self.wanted(author, number, class) || (branch && self.allows(author, number, class))
    }

    /// Whether the peer may be sent this entry whatever it holds under its number: one of another branch, that is.
    #[must_use]
    pub fn allows(&self, author: &AuthorId, number: Number, class: Class) -> bool {
        let open = self.scope != Scope::Membership || class != Class::Sealed;
        open && !self.feeds.get(author).is_some_and(|skip| contains(&skip.covered, number))
    }
}

/// The number from which a peer's branch of a feed may be another than ours.
fn diverges_from<O: Own>(theirs: &FeedHave, own: &mut O) -> Result<Option<Number>, O::Error> {
    let Some(ours) = own.feed(&theirs.author)? else { return Ok(None) };
    if theirs.fork.is_none() && ours.fork.is_none() {
        return Ok(differs(theirs, own)?.then_some(Number(1)));
    }
    if theirs.fork == ours.fork && theirs.digest == ours.digest {
        return Ok(None);
    }
    // the branches may part below the lowest number that either side knows two hashes of
    Ok(Some(Number(1)))
}

/// Whether a peer holds more of a feed than its own author does, or something else: the author's database was rolled back.
pub fn knows_more_than_author<O: Own>(theirs: &FeedHave, own: &mut O) -> Result<bool, O::Error> {
    let Some(highest) = theirs.highest() else { return Ok(false) };
    // two hashes of one number, of which the author knows one at most
    if theirs.fork.is_some() {
        return Ok(true);
    }
    let ours = own.feed(&theirs.author)?;
    let Some(ours_highest) = ours.as_ref().and_then(FeedHave::highest) else { return Ok(true) };
    if highest > ours_highest {
        return Ok(true);
    }
    differs(theirs, own)
}

/// Whether a peer holds something else at a number that is held here, as far as the ends of its ranges show; the ends of
/// ours show it the rest.
fn differs<O: Own>(theirs: &FeedHave, own: &mut O) -> Result<bool, O::Error> {
    for (number, hash) in theirs.ends() {
        let hashes = own.hashes_at(&theirs.author, number)?;
        if !hashes.is_empty() && !hashes.contains(&hash) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn contains(ranges: &[Range], number: Number) -> bool {
    let at = ranges.partition_point(|range| range.last < number);
    ranges.get(at).is_some_and(|range| range.first <= number)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    struct Feed(FeedHave, EnvelopeHash);

    impl Own for Feed {
        type Error = Infallible;

        fn feed(&mut self, author: &AuthorId) -> Result<Option<FeedHave>, Infallible> {
            Ok((*author == self.0.author).then(|| self.0.clone()))
        }

        fn hashes_at(&mut self, _: &AuthorId, number: Number) -> Result<Vec<EnvelopeHash>, Infallible> {
            Ok(if self.0.contains(number) { vec![self.1] } else { vec![] })
        }
    }

    const AUTHOR: AuthorId = AuthorId([1; 32]);

    fn have(last: u64, head: u8, fork: Option<u64>, digest: u8) -> FeedHave {
        FeedHave {
            author: AUTHOR,
            ranges: vec![Range { first: Number(1), last: Number(last) }],
            heads: vec![EnvelopeHash([head; 32])],
            fork: fork.map(Number),
            digest: [digest; 32],
        }
    }

    /// Numbers of 1..=9 a peer with `theirs` is sent by a replica with `ours`, whose hash at any number is `hash`.
    fn sent(theirs: &FeedHave, ours: FeedHave, hash: u8) -> Vec<u64> {
        let mut own = Feed(ours, EnvelopeHash([hash; 32]));
        let selection = Selection::new(Scope::All, std::slice::from_ref(theirs), &[], &mut own).expect("infallible");
        (1..=9).filter(|&n| selection.wanted(&AUTHOR, Number(n), Class::Sealed)).collect()
    }

    #[test]
    fn what_is_held_is_not_sent() {
        assert_eq!(sent(&have(4, 7, None, 0), have(9, 9, None, 0), 7), vec![5, 6, 7, 8, 9]);
    }

    #[test]
    fn another_head_at_the_same_number_sends_the_whole_feed() {
        assert_eq!(sent(&have(4, 8, None, 0), have(9, 9, None, 0), 7), (1..=9).collect::<Vec<_>>());
    }

    #[test]
    fn another_hash_below_a_hole_sends_the_whole_feed() {
        let mut theirs = have(4, 8, None, 0);
        theirs.ranges.push(Range { first: Number(6), last: Number(7) });
        theirs.heads.push(EnvelopeHash([7; 32]));
        assert_eq!(sent(&theirs, have(9, 9, None, 0), 7), (1..=9).collect::<Vec<_>>());
        theirs.heads[0] = EnvelopeHash([7; 32]);
        assert_eq!(sent(&theirs, have(9, 9, None, 0), 7), vec![5, 8, 9]);
    }

    #[test]
    fn a_fork_of_which_only_one_side_knows_or_knows_all_sends_the_whole_feed() {
        let everything: Vec<u64> = (1..=9).collect();
        assert_eq!(sent(&have(9, 7, None, 0), have(9, 7, Some(6), 1), 7), everything);
        assert_eq!(sent(&have(9, 7, Some(6), 1), have(9, 7, Some(6), 1), 7), Vec::<u64>::new());
        assert_eq!(sent(&have(9, 7, Some(6), 2), have(9, 7, Some(5), 1), 7), everything);
    }

    #[test]
    fn membership_comes_without_content_and_covered_is_never_sent() {
        let mut own = Feed(have(9, 9, None, 0), EnvelopeHash([9; 32]));
        let selection = Selection::new(Scope::Membership, &[], &[have(3, 0, None, 0)], &mut own).expect("infallible");
        assert!(!selection.wanted(&AUTHOR, Number(5), Class::Sealed));
        assert!(!selection.wanted(&AUTHOR, Number(3), Class::Membership));
        assert!(selection.wanted(&AUTHOR, Number(4), Class::Membership));
        assert!(selection.wanted(&AUTHOR, Number(4), Class::Rotation));
    }

    #[test]
    fn an_author_learns_that_others_know_more() {
        let more = |theirs: &FeedHave, hash: u8| {
            knows_more_than_author(theirs, &mut Feed(have(4, 7, None, 0), EnvelopeHash([hash; 32])))
                .expect("infallible")
        };
        assert!(!more(&have(4, 7, None, 0), 7));
        assert!(!more(&have(3, 7, None, 0), 7));
        assert!(more(&have(5, 9, None, 0), 7));
        assert!(more(&have(4, 9, None, 0), 7), "same number, other bytes");
        assert!(more(&have(4, 7, Some(2), 1), 7), "same head, other bytes below");
    }
}
