//! What the group says about one path: its maximal versions, and what they and all before them have seen.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use sync_types::bounds::{MAX_BATCH_AUTHORS, MAX_FEEDS, MAX_VECTOR};
use sync_types::folder::{Dot, Node, Record, Vector, read_node, write_node};
use sync_types::{AuthorId, FormatError, Number, Reader, Writer};

/// Versions of one dot that are kept: a feed forks when a device was copied, which makes two; more is a feed that lies.
pub const MAX_TWINS: usize = 4;
/// Maximal versions a row may hold: of each of a group's authors only the last dot can be maximal.
pub const MAX_MAXIMAL: usize = MAX_FEEDS * MAX_TWINS;
/// Authors of whom it is remembered how far they were seen: as many as one entry with records may name.
const MAX_SEEN: usize = MAX_BATCH_AUTHORS;
/// Fields of a row that a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;

/// What one record says is at its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Where it was written.
    pub dot: Dot,
    /// What it has seen, its own dot included.
    pub vector: Vector,
    /// What is there.
    pub node: Node,
    /// Unix permission bits.
    pub mode: u32,
    /// When it was changed, Unix nanoseconds.
    pub mtime: i64,
}

impl Version {
    /// The version that a record at a place of the log is.
    ///
    /// Of its own author it has seen what came before it, and nothing later, whatever it claims.
    #[must_use]
    pub fn new(record: &Record, dot: Dot) -> Self {
        let others = record.basis.iter().filter(|seen| seen.author != dot.author);
        let vector = bounded([dot].into_iter().chain(others));
        Self { dot, vector, node: record.node.clone(), mode: record.mode, mtime: record.mtime }
    }

    /// Which of two versions counts more; equal only where they are the same.
    #[must_use]
    pub fn cmp_rank(&self, other: &Self) -> Ordering {
        let rank = |version: &Self| {
            let (live, directory) = (version.node != Node::Deleted, version.node == Node::Directory);
            (live, directory, version.vector.sum(), version.dot)
        };
        rank(self)
            .cmp(&rank(other))
            .then_with(|| content_hash(&self.node).cmp(&content_hash(&other.node)))
            .then_with(|| self.encoded().cmp(&other.encoded()))
    }

    /// Which of two versions weighs more: whoever has seen another weighs more than that one, unless a feed has forked.
    fn cmp_weight(&self, other: &Self) -> Ordering {
        self.vector.sum().cmp(&other.vector.sum()).then_with(|| self.cmp_rank(other))
    }

    /// What others need not have seen of what this one has: all but itself.
    fn claims(&self) -> impl Iterator<Item = Dot> {
        self.vector.iter().filter_map(|seen| {
            let before = if seen.author == self.dot.author { seen.count.checked_sub(1)? } else { seen.count };
            Some(Dot { count: before, ..seen })
        })
    }

    fn encoded(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let authors: Vec<AuthorId> = self.vector.iter().map(|seen| seen.author).collect();
        writer.bins(&authors);
        write_version(&mut writer, self, &authors);
        writer.finish()
    }
}

/// Entries that left their author's feed and were issued again under another: what was said by them is said by others now.
///
/// A database that was rolled back issues numbers again that are others' by then; what nobody holds of that leaves the
/// feed. What was seen of those numbers was seen of other entries, and must not be claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reissue {
    /// Whose feed they left.
    pub old: AuthorId,
    /// The lowest number that left it.
    pub lowest: Number,
    /// Who issued them again.
    pub new: AuthorId,
    /// The new number of each.
    pub numbers: BTreeMap<Number, Number>,
}

impl Reissue {
    /// Whether a version is one of theirs.
    fn has(&self, dot: Dot) -> bool {
        dot.author == self.old && dot.number() >= self.lowest
    }

    /// Up to where the old author's feed stays as it was.
    fn kept(&self) -> Dot {
        let count = Dot::new(self.old, self.lowest, 0).count.saturating_sub(1);
        Dot { author: self.old, count }
    }

    /// The version that says it now.
    fn renamed(&self, dot: Dot) -> Option<Dot> {
        let index = u16::try_from(dot.count & u64::from(u16::MAX)).unwrap_or(u16::MAX);
        let (old, new) = self.numbers.range(..=dot.number()).next_back()?;
        Some(Dot::new(self.new, *new, if *old == dot.number() { index } else { u16::MAX }))
    }

    /// The basis of one of their records: of its old author it had seen all that came before.
    #[must_use]
    pub fn basis(&self, basis: &Vector) -> Vector {
        bounded([self.kept()].into_iter().chain(basis.iter().filter(|dot| dot.author != self.old)))
    }

    /// What a vector has seen that named them; none if it did not.
    #[must_use]
    pub fn vector(&self, vector: &Vector) -> Option<Vector> {
        let named = vector.iter().find(|dot| self.has(*dot))?;
        let first = self.renamed(named).into_iter().chain([self.kept()]);
        Some(bounded(first.chain(vector.iter().filter(|dot| dot.author != self.old))))
    }

    fn version(&self, version: &Version) -> Version {
        match self.renamed(version.dot).filter(|_| self.has(version.dot)) {
            Some(dot) => {
                let others = self.basis(&version.vector);
                let vector = bounded([dot].into_iter().chain(others.iter()));
                Version { dot, vector, ..version.clone() }
            }
            None => version.clone(),
        }
    }
}

/// A hash of what is there, for names and for telling equal things apart.
pub(super) fn content_hash(node: &Node) -> [u8; 32] {
    match node {
        Node::File(file) => file.hash,
        Node::Symlink(target) => *blake3::hash(target.as_bytes()).as_bytes(),
        Node::Deleted | Node::Directory => [0; 32],
    }
}

/// A vector of the authors named first, as many as a record may name.
pub(super) fn bounded(dots: impl Iterator<Item = Dot>) -> Vector {
    let mut authors = BTreeSet::new();
    dots.filter(|dot| {
        let named = authors.contains(&dot.author) || authors.len() < MAX_VECTOR;
        if named {
            authors.insert(dot.author);
        }
        named
    })
    .collect()
}

/// The maximal versions of one path: those that no other one has seen.
///
/// A version is superseded by one of another dot that has seen its dot. Two of the *same* dot come from a forked feed;
/// neither has seen the other. Keeping only versions would make the result hang on the order of arrival, because
/// seeing is not transitive once a feed has forked or a member lies: if `b` has seen `a`, and `c` has seen `b` but not
/// `a`, then `a` is superseded for whoever had `b` before `c`, and not for the others. So what superseded versions had
/// seen is remembered too, in one vector.
///
/// With that the whole is a join: `seen` is the union of what all versions claim to have seen besides themselves, and a
/// version is maximal iff its dot is not in it. Both only grow with the set of versions, in any order.
///
/// Where a feed has forked or a member lies, versions may have seen each other in a circle, and none is left. Then the one
/// counts that weighs most of all there ever were, which is why that one is kept too where it was superseded. Of an
/// honest history it never is.
///
/// The size is bounded without giving that up. A version has seen all earlier dots of its author, so of each author only
/// the last dot is maximal: there are no more of them than the group has authors, who are admitted one by one. Of one
/// dot the [`MAX_TWINS`] that rank highest are kept; they are superseded all at once or not at all, so one that was
/// dropped could never come back. (A bound on the number of *all* maximal versions would not do: one that was dropped
/// because there were too many would have been kept had the version arrived earlier that supersedes the others.)
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions {
    /// The highest rank first.
    maximal: Vec<Version>,
    seen: Vector,
    /// The version that weighs most, if it is not among the maximal ones.
    heaviest: Option<Version>,
}

impl Versions {
    /// Takes a version in; whether that changed anything.
    pub fn insert(&mut self, version: Version) -> bool {
        let changed = self.see(version.claims());
        if self.superseded()(version.dot) {
            return self.weigh(version) || changed;
        }
        let Err(at) = self.maximal.binary_search_by(|kept| version.cmp_rank(kept)) else {
            return changed;
        };
        let dot = version.dot;
        self.maximal.insert(at, version);
        let mut twins = (0..self.maximal.len()).filter(|at| self.maximal[*at].dot == dot);
        if let Some(lowest) = twins.nth(MAX_TWINS) {
            let dropped = self.maximal.remove(lowest);
            return self.weigh(dropped) || changed || lowest != at;
        }
        self.lighten();
        true
    }

    /// Remembers a version that is not maximal if none weighs more; whether that changed anything.
    pub(super) fn weigh(&mut self, version: Version) -> bool {
        let outweighs = |kept: &Version| version.cmp_weight(kept).is_gt();
        if !self.heaviest.as_ref().is_none_or(outweighs) || !self.maximal.iter().all(outweighs) {
            return false;
        }
        self.heaviest = Some(version);
        true
    }

    /// Forgets the heaviest version if a maximal one weighs more.
    fn lighten(&mut self) {
        let maximal = &self.maximal;
        self.heaviest = self.heaviest.take().filter(|heavy| maximal.iter().all(|kept| heavy.cmp_weight(kept).is_gt()));
    }

    /// Takes in everything another row of the same path holds; whether that changed anything.
    pub fn join(&mut self, other: &Self) -> bool {
        self.join_unless(other, |_| false)
    }

    /// Takes in what another row of the same path holds, but for versions that a test leaves out; whether that changed
    /// anything.
    pub(super) fn join_unless(&mut self, other: &Self, is_left_out: impl Fn(&Version) -> bool) -> bool {
        let mut changed = self.see(other.seen.iter());
        for version in other.maximal.iter().filter(|version| !is_left_out(version)) {
            changed |= self.insert(version.clone());
        }
        if let Some(heavy) = other.heaviest.as_ref().filter(|heavy| !is_left_out(heavy))
            && !self.maximal.contains(heavy)
        {
            changed |= self.weigh(heavy.clone());
        }
        changed
    }

    /// Takes out versions that something forgotten has superseded; where none is left, a deletion stands for it. Whether
    /// that changed anything.
    pub(super) fn bury(&mut self, is_superseded: impl Fn(&Version) -> bool) -> bool {
        self.heaviest = self.heaviest.take().filter(|heavy| !self.maximal.is_empty() || !is_superseded(heavy));
        let (buried, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.maximal).into_iter().partition(|version| is_superseded(version));
        self.maximal = left;
        let Some(highest) = buried.first() else { return false };
        let seen = buried.iter().flat_map(|version| version.vector.iter()).chain(self.seen.iter());
        if self.maximal.is_empty() {
            // nothing that the others have seen is later of that author, or it would have been superseded
            let vector = bounded([highest.dot].into_iter().chain(seen));
            self.insert(Version { dot: highest.dot, vector, node: Node::Deleted, mode: 0, mtime: 0 });
        } else {
            let seen: Vec<Dot> = seen.collect();
            self.see(seen);
        }
        true
    }

    /// Whether a version of another dot has seen a dot.
    pub(super) fn has_superseded(&self, dot: Dot) -> bool {
        self.superseded()(dot)
    }

    /// The versions that are kept, by their dots.
    pub fn dots(&self) -> impl Iterator<Item = Dot> {
        self.maximal.iter().chain(&self.heaviest).map(|version| version.dot)
    }

    /// The version that outweighs the maximal ones, if one does.
    pub(super) fn heaviest(&self) -> Option<&Version> {
        self.heaviest.as_ref()
    }

    /// What is superseded.
    pub(super) fn superseded_dots(&self) -> impl Iterator<Item = Dot> {
        self.seen.iter()
    }

    /// Everything that all of them are or have seen.
    pub(super) fn reached(&self) -> impl Iterator<Item = Dot> {
        self.maximal.iter().chain(&self.heaviest).flat_map(|version| version.vector.iter()).chain(self.seen.iter())
    }

    /// The same where entries were issued again; none if none of them said anything here.
    #[must_use]
    pub fn reissued(&self, reissue: &Reissue) -> Option<Self> {
        let versions = || self.maximal.iter().chain(&self.heaviest);
        if !versions().any(|version| reissue.has(version.dot)) && !self.seen.iter().any(|dot| reissue.has(dot)) {
            return None;
        }
        let mut again = Self::default();
        again.see(reissue.vector(&self.seen).unwrap_or_else(|| self.seen.clone()).iter());
        versions().for_each(|version| {
            again.insert(reissue.version(version));
        });
        Some(again)
    }

    /// The version that counts.
    #[must_use]
    pub fn winner(&self) -> Option<&Version> {
        self.maximal().first()
    }

    /// All maximal versions, the highest rank first.
    #[must_use]
    pub fn maximal(&self) -> &[Version] {
        if self.maximal.is_empty() { self.heaviest.as_slice() } else { &self.maximal }
    }

    /// Whether something is there, by these versions alone.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.winner().is_some_and(|winner| winner.node != Node::Deleted)
    }

    /// The maximal versions whose content loses: neither the winner's nor a deletion.
    pub fn losers(&self) -> impl Iterator<Item = &Version> {
        let winner = self.winner();
        self.maximal().iter().filter(move |version| {
            version.node != Node::Deleted && winner.is_some_and(|winner| !version.node.is_same(&winner.node))
        })
    }

    /// What all of them have seen together, as far as one record may say.
    #[must_use]
    pub fn vector(&self) -> Vector {
        bounded(self.maximal().iter().map(|version| version.dot).chain(self.seen.iter()))
    }

    /// What those versions have seen that say what the winner says, and the deletions, which have nothing to lose.
    ///
    /// This is what a device has seen on whose disk the winner lies. A loser is not in it: whoever edits here has not
    /// seen it, and must not take from the device where it lies the reason to keep a copy.
    #[must_use]
    pub fn agreed(&self) -> Vector {
        let Some(winner) = self.winner() else { return Vector::default() };
        self.seen_by(|version| version.node == Node::Deleted || version.node.is_same(&winner.node))
    }

    /// What the versions that a test picks have seen.
    pub(super) fn seen_by(&self, pick: impl Fn(&Version) -> bool) -> Vector {
        let picked = || self.maximal().iter().filter(|version| pick(version));
        bounded(picked().map(|version| version.dot).chain(picked().flat_map(|version| version.vector.iter())))
    }

    /// What was superseded, and the deletions: everything that has no content to lose.
    pub(super) fn bygone(&self) -> Vector {
        let deletions = self.maximal().iter().filter(|version| version.node == Node::Deleted);
        bounded(deletions.map(|version| version.dot).chain(self.seen.iter()))
    }

    /// Whether every version that a vector has seen is known here, as maximal or as superseded.
    #[must_use]
    pub fn covers(&self, vector: &Vector) -> bool {
        let superseded = self.superseded();
        let known = |dot: &Dot| self.maximal().iter().any(|version| version.vector.contains(*dot));
        vector.iter().all(|dot| superseded(dot) || known(&dot))
    }

    /// Tells whether a version of another dot has seen a dot.
    ///
    /// Where more authors were claimed than are remembered, those beyond the last one count as seen: that too can only
    /// become more. Who claims that many could as well claim the future of everybody.
    fn superseded(&self) -> impl Fn(Dot) -> bool + use<'_> {
        let last = self.seen.iter().nth(MAX_SEEN - 1);
        move |dot| self.seen.contains(dot) || last.is_some_and(|last| last.author < dot.author)
    }

    fn see(&mut self, dots: impl IntoIterator<Item = Dot>) -> bool {
        let superseded = self.superseded();
        let new: Vec<Dot> = dots.into_iter().filter(|dot| !superseded(*dot)).collect();
        drop(superseded);
        if new.is_empty() {
            return false;
        }
        new.into_iter().for_each(|dot| self.seen.add(dot));
        if self.seen.iter().nth(MAX_SEEN).is_some() {
            self.seen = self.seen.iter().take(MAX_SEEN).collect();
        }
        let maximal = std::mem::take(&mut self.maximal);
        let superseded = self.superseded();
        let (gone, maximal): (Vec<_>, _) = maximal.into_iter().partition(|version| superseded(version.dot));
        drop(superseded);
        self.maximal = maximal;
        gone.into_iter().for_each(|version| {
            self.weigh(version);
        });
        true
    }

    /// The row's bytes: the authors named, the maximal versions, what only superseded ones have seen, and the heaviest.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let claimed: Vector = self.maximal.iter().flat_map(Version::claims).collect();
        let only: Vec<Dot> = self.seen.iter().filter(|dot| !claimed.contains(*dot)).collect();
        let versions = self.maximal.iter().chain(&self.heaviest);
        let named = versions.flat_map(|version| version.vector.iter()).chain(only.iter().copied());
        let authors: BTreeSet<AuthorId> = named.map(|dot| dot.author).collect();
        let authors: Vec<AuthorId> = authors.into_iter().collect();
        let mut writer = Writer::array_of(4);
        writer.bins(&authors).array(self.maximal.len());
        for version in &self.maximal {
            write_version(&mut writer, version, &authors);
        }
        write_dots(&mut writer, &only, &authors);
        writer.array(self.heaviest.iter().count());
        if let Some(version) = &self.heaviest {
            write_version(&mut writer, version, &authors);
        }
        writer.finish()
    }

    /// Reads a row.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("versions", 4, MAX_FIELDS)?;
        let authors = reader.bins("authors", MAX_MAXIMAL * MAX_VECTOR, AuthorId::LEN)?;
        let authors = authors
            .into_iter()
            .map(|author| author.try_into().map(AuthorId).map_err(|_| FormatError::Malformed { field: "authors" }))
            .collect::<Result<Vec<_>, _>>()?;
        let mut versions = Self::default();
        for _ in 0..reader.array("maximal", 0, MAX_MAXIMAL)? {
            versions.insert(read_version(&mut reader, &authors)?);
        }
        versions.see(read_dots(&mut reader, "seen", MAX_SEEN, &authors)?);
        if reader.array("heaviest", 0, 1)? == 1 {
            let heavy = read_version(&mut reader, &authors)?;
            if !versions.maximal.contains(&heavy) {
                versions.weigh(heavy);
            }
        }
        reader.skip("versions", fields - 4)?;
        reader.end()?;
        Ok(versions)
    }
}

fn write_version(writer: &mut Writer, version: &Version, authors: &[AuthorId]) {
    let vector: Vec<Dot> = version.vector.iter().collect();
    writer.array(5).uint(place(version.dot.author, authors));
    write_dots(writer, &vector, authors);
    write_node(writer, &version.node);
    writer.uint(u64::from(version.mode)).uint(version.mtime.cast_unsigned());
}

fn read_version(reader: &mut Reader<'_>, authors: &[AuthorId]) -> Result<Version, FormatError> {
    let fields = reader.array("version", 5, MAX_FIELDS)?;
    let author = author(reader.uint("author")?, authors)?;
    let vector: Vector = read_dots(reader, "vector", MAX_VECTOR, authors)?.into_iter().collect();
    let dot = vector.iter().find(|dot| dot.author == author).ok_or(FormatError::Malformed { field: "vector" })?;
    let node = read_node(reader)?;
    let mode = reader.uint32("mode")?;
    let mtime = reader.uint("mtime")?.cast_signed();
    reader.skip("version", fields - 5)?;
    Ok(Version { dot, vector, node, mode, mtime })
}

fn write_dots(writer: &mut Writer, dots: &[Dot], authors: &[AuthorId]) {
    writer.array(dots.len() * 2);
    for dot in dots {
        writer.uint(place(dot.author, authors)).uint(dot.count);
    }
}

fn read_dots(
    reader: &mut Reader<'_>,
    field: &'static str,
    max: usize,
    authors: &[AuthorId],
) -> Result<Vec<Dot>, FormatError> {
    let count = reader.array(field, 0, max * 2)?;
    if count % 2 != 0 {
        return Err(FormatError::Malformed { field });
    }
    let mut dots = Vec::new();
    for _ in 0..count / 2 {
        dots.push(Dot { author: author(reader.uint(field)?, authors)?, count: reader.uint(field)? });
    }
    Ok(dots)
}

fn place(author: AuthorId, authors: &[AuthorId]) -> u64 {
    authors.binary_search(&author).expect("BUG: every author is in the table") as u64
}

fn author(at: u64, authors: &[AuthorId]) -> Result<AuthorId, FormatError> {
    let author = usize::try_from(at).ok().and_then(|at| authors.get(at));
    author.copied().ok_or(FormatError::Malformed { field: "author" })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sync_types::folder::{Chunks, FileContent, TreePath};

    use super::*;

    fn author(n: u8) -> AuthorId {
        AuthorId([n; 32])
    }

    fn dot(n: u8, count: u64) -> Dot {
        Dot { author: author(n), count }
    }

    fn node(n: u8) -> Node {
        match n {
            0 => Node::Deleted,
            1 => Node::Directory,
            2 => Node::Symlink("target".to_owned()),
            n => Node::File(FileContent { size: 1, hash: [n; 32], chunks: Chunks::Whole }),
        }
    }

    fn version(at: Dot, basis: &[Dot], what: u8) -> Version {
        let path = TreePath::new("a").expect("a path");
        let basis = basis.iter().copied().collect();
        Version::new(&Record { path, node: node(what), mode: 0o644, mtime: -5, basis }, at)
    }

    fn row<'a>(versions: impl IntoIterator<Item = &'a Version>) -> Versions {
        let mut row = Versions::default();
        for version in versions {
            row.insert(version.clone());
        }
        row
    }

    #[test]
    fn who_has_seen_it_supersedes_it() {
        let first = version(dot(1, 1), &[], 3);
        let edit = version(dot(2, 1), &[dot(1, 1)], 4);
        let other = version(dot(3, 1), &[dot(1, 1)], 5);
        let mut versions = row([&first]);
        assert!(versions.insert(edit.clone()) && !versions.insert(edit.clone()) && !versions.insert(first));
        assert_eq!(versions.maximal(), std::slice::from_ref(&edit));
        assert!(versions.insert(other.clone()));
        assert_eq!(versions.winner(), Some(&other), "equal sums, larger author");
        assert_eq!(versions.losers().collect::<Vec<_>>(), [&edit]);
        let later = version(dot(2, 9), &[dot(2, 1)], 6);
        versions.insert(later.clone());
        assert_eq!(versions.maximal(), [later, other], "the larger sum");
    }

    #[test]
    fn what_is_issued_again_is_known_as_others_will_know_it() {
        let at = |n: u8, number: u64, index: u16| Dot::new(author(n), Number(number), index);
        let reissue = Reissue {
            old: author(1),
            lowest: Number(5),
            new: author(3),
            numbers: [(Number(5), Number(2)), (Number(7), Number(3))].into(),
        };
        let (kept, mine) = (at(1, 4, 0), at(1, 5, 1));
        let other = version(at(2, 9, 0), &[kept], 6);
        let path = TreePath::new("a").expect("a path");
        let basis: Vector = [mine, at(2, 8, 0)].into_iter().collect();
        let record = Record { path, node: node(4), mode: 0o644, mtime: -5, basis };
        let here =
            row([&version(kept, &[], 3), &version(mine, &[kept], 5), &other, &Version::new(&record, at(1, 7, 0))]);
        let told = Record { basis: reissue.basis(&record.basis), ..record };
        assert!(!told.basis.contains(mine) && told.basis.contains(kept) && told.basis.contains(at(2, 8, 0)));
        let first = version(at(3, 2, 1), &[at(1, 4, u16::MAX)], 5);
        let there = row([&version(kept, &[], 3), &first, &other, &Version::new(&told, at(3, 3, 0))]);
        let again = here.reissued(&reissue).expect("it said something here");
        assert_eq!(again, there);
        assert_eq!(again.reissued(&reissue), None);
        let seen = reissue.vector(&here.maximal()[0].vector).or_else(|| reissue.vector(&here.maximal()[1].vector));
        assert!(seen.is_some_and(|seen| seen.contains(at(3, 3, 0)) && !seen.contains(at(1, 5, 0))));
    }

    #[test]
    fn an_edit_beats_a_deletion_and_a_directory_anything() {
        let gone = version(dot(9, 9), &[dot(8, 9)], 0);
        let file = version(dot(2, 2), &[], 3);
        let directory = version(dot(1, 1), &[], 1);
        let versions = row([&gone, &file, &directory]);
        assert_eq!(versions.maximal(), [directory, file.clone(), gone]);
        assert_eq!(versions.losers().collect::<Vec<_>>(), [&file]);
    }

    #[test]
    fn equal_content_is_no_conflict() {
        let (one, other) = (version(dot(1, 1), &[], 3), version(dot(2, 7), &[], 3));
        let versions = row([&one, &other]);
        assert_eq!(versions.losers().count(), 0);
        assert_eq!(versions.agreed(), [dot(1, 1), dot(2, 7)].into_iter().collect());
    }

    #[test]
    fn whoever_edits_the_winner_has_not_seen_the_loser() {
        let (winner, loser, gone) =
            (version(dot(3, 3), &[], 3), version(dot(1, 1), &[], 4), version(dot(2, 2), &[], 0));
        let versions = row([&winner, &loser, &gone]);
        assert!(versions.agreed().contains(dot(3, 3)) && versions.agreed().contains(dot(2, 2)));
        assert!(!versions.agreed().contains(dot(1, 1)) && versions.vector().contains(dot(1, 1)));
    }

    #[test]
    fn a_forked_feed_keeps_both_until_somebody_has_seen_one() {
        let (one, twin) = (version(dot(1, 5), &[], 3), version(dot(1, 5), &[dot(4, 2)], 4));
        let mut versions = row([&one, &twin]);
        assert_eq!(versions.maximal().len(), 2);
        versions.insert(version(dot(2, 1), &[dot(1, 5)], 5));
        assert_eq!(versions.maximal().len(), 1);
        // what the twin had seen stays seen, whenever it arrives
        assert!(!versions.insert(version(dot(4, 2), &[], 6)));
    }

    #[test]
    fn versions_that_have_seen_each_other_still_have_a_winner() {
        let (one, twin) = (version(dot(1, 5), &[], 3), version(dot(1, 5), &[dot(2, 7)], 4));
        let between = version(dot(2, 7), &[dot(1, 5)], 5);
        let versions = row([&one, &between, &twin]);
        assert_eq!((versions.maximal(), versions.agreed()), (&[between.clone()][..], between.vector.clone()));
        let mut edited = versions.clone();
        edited.insert(version(dot(3, 9), &[dot(2, 7)], 6));
        assert_eq!(edited.winner().map(|winner| winner.dot), Some(dot(3, 9)));
        assert_eq!(row([&twin, &between, &one]), versions);
        assert_eq!(Versions::decode(&versions.encode()), Ok(versions));
    }

    #[test]
    fn nobody_has_seen_the_own_future() {
        let liar = version(dot(1, 5), &[dot(1, 900)], 3);
        assert!(!liar.vector.contains(dot(1, 6)));
        assert_eq!(row([&liar, &version(dot(1, 6), &[], 4)]).maximal().len(), 1);
    }

    #[test]
    fn made_up_authors_do_not_grow_a_row_without_bound() {
        let made_up = |from: u64, own: u8| {
            let claims: Vec<Dot> = (0..MAX_VECTOR as u64)
                .map(|n| {
                    let mut author = [7; 32];
                    author[24..].copy_from_slice(&(from + n).to_be_bytes());
                    Dot { author: AuthorId(author), count: 1 }
                })
                .collect();
            version(dot(9, u64::from(own)), &claims, own)
        };
        let mut all: Vec<Version> = (1..10u8).map(|own| made_up(u64::from(own) * 1000, own)).collect();
        all.push(version(dot(3, 1), &[], 3));
        all.push(version(dot(200, 1), &[], 4));
        let forth = row(&all);
        all.reverse();
        assert_eq!(row(&all), forth);
        assert!(forth.seen.iter().count() <= MAX_SEEN && forth.vector().iter().count() <= MAX_VECTOR);
        assert_eq!(Versions::decode(&forth.encode()), Ok(forth));
    }

    #[test]
    fn the_bytes_stay_yesterdays() {
        let versions = row([&version(dot(1, 1), &[], 3), &version(dot(2, 70_000), &[dot(1, 1)], 1)]);
        let (one, two) = ("01".repeat(32), "02".repeat(32));
        assert_eq!(
            data_encoding::HEXLOWER.encode(&versions.encode()),
            format!("9492c420{one}c420{two}91950194000101ce000111709101cd01a4cffffffffffffffffb9090")
        );
    }

    /// Versions as a group writes them: most have seen what came before, some feeds fork, and some members lie.
    fn history() -> impl Strategy<Value = Vec<Version>> {
        let step = (0u8..4, any::<u16>(), 0u8..6, 0u8..8, proptest::option::weighted(0.15, (0u8..5, 0u64..12)));
        proptest::collection::vec(step, 1..14).prop_map(|steps| {
            let mut counts = [0u64; 4];
            let mut all: Vec<Version> = Vec::new();
            for (who, sees, what, forks, lie) in steps {
                let count = &mut counts[usize::from(who)];
                if forks != 0 || *count == 0 {
                    *count += 1;
                }
                let seen = all.iter().enumerate().filter(|(at, _)| sees & (1 << (at % 16)) != 0);
                let mut basis: Vec<Dot> = seen.flat_map(|(_, version)| version.vector.iter()).collect();
                basis.extend(lie.map(|(who, count)| dot(who, count)));
                all.push(version(dot(who, *count), &basis, what));
            }
            all
        })
    }

    fn permutations(of: &[Version]) -> Vec<Vec<Version>> {
        let [first, rest @ ..] = of else { return vec![vec![]] };
        let insert = |rest: Vec<Version>| {
            (0..=rest.len()).map(move |at| {
                let mut all = rest.clone();
                all.insert(at, first.clone());
                all
            })
        };
        permutations(rest).into_iter().flat_map(insert).collect()
    }

    proptest! {
        #[test]
        fn the_order_of_arrival_does_not_matter(
            (all, shuffled) in history().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
            twice in any::<prop::sample::Index>(),
        ) {
            let versions = row(&all);
            let twice = &shuffled[twice.index(shuffled.len())];
            prop_assert_eq!(&row(shuffled.iter().chain([twice])), &versions);
            let (some, others) = shuffled.split_at(shuffled.len() / 2);
            let mut joined = row(some);
            joined.join(&row(others));
            prop_assert_eq!(&joined, &versions);
            prop_assert!(!joined.join(&versions));
            prop_assert_eq!(Versions::decode(&versions.encode()), Ok(versions));
        }

        #[test]
        fn exactly_those_are_kept_that_no_other_has_seen(all in history()) {
            let unseen = |one: &&Version| {
                !all.iter().any(|other| other.dot != one.dot && other.vector.contains(one.dot))
            };
            let versions = row(&all);
            for version in all.iter().filter(unseen) {
                let twins = versions.maximal().iter().filter(|kept| kept.dot == version.dot).count();
                prop_assert!(versions.maximal().contains(version) || twins == MAX_TWINS);
            }
            let circle = versions.maximal().len() == 1 && !all.iter().any(|version| unseen(&version));
            prop_assert!(circle || versions.maximal().iter().all(|kept| unseen(&kept)));
            prop_assert!(!versions.maximal().is_empty());
            let highest = versions.maximal().iter().max_by(|one, other| one.cmp_rank(other));
            prop_assert_eq!(versions.winner(), highest);
            prop_assert!(all.iter().all(|version| versions.covers(&version.vector)));
        }

        #[test]
        fn all_permutations_of_a_few_agree(all in history()) {
            let all = &all[..all.len().min(5)];
            let versions = row(all);
            for order in permutations(all) {
                prop_assert_eq!(&row(&order), &versions);
            }
        }

        #[test]
        fn many_twins_in_any_order(shuffled in Just((0..9u8).collect::<Vec<u8>>()).prop_shuffle()) {
            let twin = |what: &u8| version(dot(1, 5), &[dot(2, u64::from(*what))], 3 + what % 5);
            let versions = row(shuffled.iter().map(twin).collect::<Vec<_>>().iter());
            prop_assert_eq!(versions.maximal().len(), MAX_TWINS);
            prop_assert_eq!(&versions, &row((0..9).map(|what| twin(&what)).collect::<Vec<_>>().iter()));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Versions::decode(&bytes);
        }

        #[test]
        fn damaged_rows_are_read_or_refused(all in history(), at: prop::sample::Index, byte: u8) {
            let mut bytes = row(&all).encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(read) = Versions::decode(&bytes) {
                prop_assert_eq!(Versions::decode(&read.encode()), Ok(read));
            }
        }
    }
}
