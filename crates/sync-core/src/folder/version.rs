//! What the group says about one path: its maximal versions, and what they and all before them have seen.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use sync_types::bounds::{MAX_BATCH_AUTHORS, MAX_FEEDS, MAX_VECTOR};
use sync_types::folder::{Dot, Node, Record, Vector, read_node, write_node};
use sync_types::{AuthorId, FormatError, Reader, Writer};

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
}

impl Versions {
    /// Takes a version in; whether that changed anything.
    pub fn insert(&mut self, version: Version) -> bool {
        let claims: Vec<Dot> = version.claims().collect();
        let changed = self.see(claims);
        if self.is_superseded(version.dot) {
            return changed;
        }
        let Err(at) = self.maximal.binary_search_by(|kept| version.cmp_rank(kept)) else {
            return changed;
        };
        let dot = version.dot;
        self.maximal.insert(at, version);
        let twins: Vec<usize> = (0..self.maximal.len()).filter(|at| self.maximal[*at].dot == dot).collect();
        if let Some(lowest) = twins.get(MAX_TWINS) {
            self.maximal.remove(*lowest);
            return changed || *lowest != at;
        }
        true
    }

    /// Takes in everything another row of the same path holds; whether that changed anything.
    pub fn join(&mut self, other: &Self) -> bool {
        let mut changed = self.see(other.seen.iter());
        for version in &other.maximal {
            changed |= self.insert(version.clone());
        }
        changed
    }

    /// The version that counts.
    #[must_use]
    pub fn winner(&self) -> Option<&Version> {
        self.maximal.first()
    }

    /// All maximal versions, the highest rank first.
    #[must_use]
    pub fn maximal(&self) -> &[Version] {
        &self.maximal
    }

    /// Whether something is there, by these versions alone.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.winner().is_some_and(|winner| winner.node != Node::Deleted)
    }

    /// The maximal versions whose content loses: neither the winner's nor a deletion.
    pub fn losers(&self) -> impl Iterator<Item = &Version> {
        let winner = self.winner();
        self.maximal.iter().filter(move |version| {
            version.node != Node::Deleted && winner.is_some_and(|winner| !version.node.is_same(&winner.node))
        })
    }

    /// What all of them have seen together, as far as one record may say.
    #[must_use]
    pub fn vector(&self) -> Vector {
        bounded(self.maximal.iter().map(|version| version.dot).chain(self.seen.iter()))
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
        let picked = || self.maximal.iter().filter(|version| pick(version));
        bounded(picked().map(|version| version.dot).chain(picked().flat_map(|version| version.vector.iter())))
    }

    /// What was superseded, and the deletions: everything that has no content to lose.
    pub(super) fn bygone(&self) -> Vector {
        let deletions = self.maximal.iter().filter(|version| version.node == Node::Deleted);
        bounded(deletions.map(|version| version.dot).chain(self.seen.iter()))
    }

    /// Whether every version that a vector has seen is known here, as maximal or as superseded.
    #[must_use]
    pub fn covers(&self, vector: &Vector) -> bool {
        let known = |dot: &Dot| self.maximal.iter().any(|version| version.vector.contains(*dot));
        vector.iter().all(|dot| self.is_superseded(dot) || known(&dot))
    }

    /// Whether a version of another dot has seen this one.
    ///
    /// Where more authors were claimed than are remembered, those beyond the last one count as seen: that too can only
    /// become more. Who claims that many could as well claim the future of everybody.
    fn is_superseded(&self, dot: Dot) -> bool {
        self.seen.contains(dot)
            || (self.seen.iter().count() >= MAX_SEEN
                && self.seen.iter().last().is_some_and(|last| last.author < dot.author))
    }

    fn see(&mut self, dots: impl IntoIterator<Item = Dot>) -> bool {
        let mut changed = false;
        for dot in dots {
            if !self.is_superseded(dot) {
                self.seen.add(dot);
                changed = true;
            }
        }
        if changed {
            if self.seen.iter().count() > MAX_SEEN {
                self.seen = self.seen.iter().take(MAX_SEEN).collect();
            }
            let maximal = std::mem::take(&mut self.maximal);
            self.maximal = maximal.into_iter().filter(|version| !self.is_superseded(version.dot)).collect();
        }
        changed
    }

    /// The row's bytes: the authors named, the maximal versions, and what only superseded ones have seen.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let claimed: Vector = self.maximal.iter().flat_map(Version::claims).collect();
        let only: Vec<Dot> = self.seen.iter().filter(|dot| !claimed.contains(*dot)).collect();
        let named = self.maximal.iter().flat_map(|version| version.vector.iter()).chain(only.iter().copied());
        let authors: BTreeSet<AuthorId> = named.map(|dot| dot.author).collect();
        let authors: Vec<AuthorId> = authors.into_iter().collect();
        let mut writer = Writer::array_of(3);
        writer.bins(&authors).array(self.maximal.len());
        for version in &self.maximal {
            write_version(&mut writer, version, &authors);
        }
        write_dots(&mut writer, &only, &authors);
        writer.finish()
    }

    /// Reads a row.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("versions", 3, MAX_FIELDS)?;
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
        reader.skip("versions", fields - 3)?;
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
