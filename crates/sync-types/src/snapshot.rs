//! Snapshots of a folder: an entry that names a content, and the items that content is a sequence of.
//!
//! A snapshot says what a folder's records have led to, up to a number of each feed. Its content is cut into chunks like a
//! file's: items one behind the other, first of each author which entries it covers, then a row for each path, by key,
//! then the end.

use crate::bounds::{MAX_BATCH_AUTHORS, MAX_PATH, MAX_SNAPSHOT, MAX_SNAPSHOT_ITEM, MAX_SNAPSHOT_RANGES};
use crate::folder::{FileContent, Node, TreePath, read_node, write_node};
use crate::frame::Range;
use crate::ids::{AuthorId, EnvelopeHash, Number};
use crate::wire::{FormatError, Reader, Writer};

/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
/// Bytes of the length in front of an item.
const LENGTH: usize = 4;

/// The body of an entry of kind [`KIND_SNAPSHOT`](crate::folder::KIND_SNAPSHOT).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Of each author the number up to which the folder's entries are covered, by author; at most [`MAX_BATCH_AUTHORS`].
    pub covered: Vec<(AuthorId, Number)>,
    /// How long the content is, its hash and its chunks.
    pub content: FileContent,
}

impl Snapshot {
    /// The body of its entry.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::array_of(2);
        writer.array(self.covered.len());
        for (author, number) in &self.covered {
            writer.array(2).bin(&author.0).uint(number.0);
        }
        write_node(&mut writer, &Node::File(self.content.clone()));
        writer.finish()
    }

    /// Reads the body of its entry.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("snapshot", 2, MAX_FIELDS)?;
        let mut covered: Vec<(AuthorId, Number)> = Vec::new();
        for _ in 0..reader.array("covered", 0, MAX_BATCH_AUTHORS)? {
            let fields = reader.array("covered", 2, MAX_FIELDS)?;
            let (author, number) = (AuthorId(reader.fixed("author")?), Number(reader.uint("number")?));
            reader.skip("covered", fields - 2)?;
            if number == Number(0) || covered.last().is_some_and(|(last, _)| *last >= author) {
                return Err(FormatError::Malformed { field: "covered" });
            }
            covered.push((author, number));
        }
        let Node::File(content) = read_node(&mut reader)? else {
            return Err(FormatError::Malformed { field: "content" });
        };
        if content.size > MAX_SNAPSHOT {
            return Err(FormatError::Malformed { field: "size" });
        }
        reader.skip("snapshot", fields - 2)?;
        reader.end()?;
        Ok(Self { covered, content })
    }

    /// Up to which number an author's entries are covered.
    #[must_use]
    pub fn covered_of(&self, author: &AuthorId) -> Option<Number> {
        let at = self.covered.binary_search_by_key(author, |(author, _)| *author).ok()?;
        self.covered.get(at).map(|(_, number)| *number)
    }

    /// Whether it covers all that these numbers do.
    #[must_use]
    pub fn covers(&self, covered: &[(AuthorId, Number)]) -> bool {
        covered.iter().all(|(author, number)| self.covered_of(author).is_some_and(|own| *number <= own))
    }
}

/// One item of a snapshot's content.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Item {
    /// Numbers of an author's feed that are entries of the folder and covered, each range with the hash at its end.
    Covered {
        /// The author.
        author: AuthorId,
        /// Ascending and apart; an author with more than [`MAX_SNAPSHOT_RANGES`] has several items.
        ranges: Vec<(Range, EnvelopeHash)>,
    },
    /// What the records say of a path.
    Row {
        /// The path.
        path: TreePath,
        /// Its maximal versions, as a row of the index has them.
        versions: Vec<u8>,
    },
    /// The end.
    End {
        /// How many rows there were.
        rows: u64,
    },
}

impl Item {
    const COVERED: u64 = 0;
    const ROW: u64 = 1;
    const END: u64 = 2;

    /// Adds the item to a content, its length in front.
    pub fn append(&self, content: &mut Vec<u8>) {
        let mut writer;
        match self {
            Self::Covered { author, ranges } => {
                writer = Writer::array_of(3);
                writer.uint(Self::COVERED).bin(&author.0).array(ranges.len());
                for (range, head) in ranges {
                    writer.array(3).uint(range.first.0).uint(range.last.0).bin(&head.0);
                }
            }
            Self::Row { path, versions } => {
                writer = Writer::array_of(3);
                writer.uint(Self::ROW).text(path.as_str()).bin(versions);
            }
            Self::End { rows } => {
                writer = Writer::array_of(2);
                writer.uint(Self::END).uint(*rows);
            }
        }
        let bytes = writer.finish();
        let length = u32::try_from(bytes.len()).expect("BUG: an item is far shorter than four gigabytes");
        content.extend_from_slice(&length.to_le_bytes());
        content.extend_from_slice(&bytes);
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("item", 2, MAX_FIELDS)?;
        let (item, read) = match reader.uint("kind")? {
            Self::COVERED if fields >= 3 => {
                let author = AuthorId(reader.fixed("author")?);
                let mut ranges: Vec<(Range, EnvelopeHash)> = Vec::new();
                for _ in 0..reader.array("ranges", 1, MAX_SNAPSHOT_RANGES)? {
                    reader.array("range", 3, 3)?;
                    let range = Range { first: Number(reader.uint("first")?), last: Number(reader.uint("last")?) };
                    let apart = ranges.last().is_none_or(|(last, _)| last.last < range.first);
                    if range.first == Number(0) || range.first > range.last || !apart {
                        return Err(FormatError::Malformed { field: "range" });
                    }
                    ranges.push((range, EnvelopeHash(reader.fixed("head")?)));
                }
                (Self::Covered { author, ranges }, 3)
            }
            Self::ROW if fields >= 3 => {
                let path = TreePath::new(reader.text("path", MAX_PATH)?);
                let path = path.map_err(|_| FormatError::Malformed { field: "path" })?;
                (Self::Row { path, versions: reader.bin("versions", MAX_SNAPSHOT_ITEM)?.to_vec() }, 3)
            }
            Self::END => (Self::End { rows: reader.uint("rows")? }, 2),
            got => return Err(FormatError::Unknown { field: "kind", got }),
        };
        reader.skip("item", fields - read)?;
        reader.end()?;
        Ok(item)
    }
}

/// Reads a snapshot's content as its pieces come, and checks the order of its items.
#[derive(Debug, Default)]
pub struct Items {
    buffer: Vec<u8>,
    at: usize,
    author: Option<(AuthorId, Number)>,
    path: Option<TreePath>,
    rows: u64,
    ended: bool,
}

impl Items {
    /// Adds the next bytes of the content.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..std::mem::take(&mut self.at));
        self.buffer.extend_from_slice(bytes);
    }

    /// The next item; none until more bytes are added.
    #[expect(clippy::should_implement_trait, reason = "it goes on once more bytes are there")]
    pub fn next(&mut self) -> Option<Result<Item, FormatError>> {
        let rest = &self.buffer[self.at..];
        let (length, rest) = rest.split_first_chunk::<LENGTH>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_SNAPSHOT_ITEM {
            return Some(Err(FormatError::TooMany { field: "item", got: length, max: MAX_SNAPSHOT_ITEM }));
        }
        let item = Item::decode(rest.get(..length)?);
        self.at += LENGTH + length;
        Some(item.and_then(|item| self.in_order(item)))
    }

    fn in_order(&mut self, item: Item) -> Result<Item, FormatError> {
        let wrong = |field| Err(FormatError::Malformed { field });
        if self.ended {
            return wrong("end");
        }
        match &item {
            Item::Covered { author, ranges } => {
                let (Some((first, _)), Some((last, _))) = (ranges.first(), ranges.last()) else {
                    return wrong("ranges");
                };
                let follows = self
                    .author
                    .is_none_or(|(before, last)| before < *author || (before == *author && last < first.first));
                if self.path.is_some() || !follows {
                    return wrong("author");
                }
                self.author = Some((*author, last.last));
            }
            Item::Row { path, .. } => {
                if self.path.as_ref().is_some_and(|last| last >= path) {
                    return wrong("path");
                }
                self.path = Some(path.clone());
                self.rows += 1;
            }
            Item::End { rows } => {
                if *rows != self.rows {
                    return wrong("rows");
                }
                self.ended = true;
            }
        }
        Ok(item)
    }

    /// Whether everything up to the end was read, and nothing follows it.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.ended && self.at == self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::folder::{ChunkRef, Chunks};

    fn author(n: u8) -> AuthorId {
        AuthorId([n; 32])
    }

    fn snapshot() -> Snapshot {
        let chunks = Chunks::Inline(vec![ChunkRef { hash: Some([7; 32]), len: 300_000 }]);
        let content = FileContent { size: 300_000, hash: [3; 32], chunks };
        Snapshot { covered: vec![(author(1), Number(5)), (author(2), Number(300))], content }
    }

    fn range(first: u64, last: u64) -> (Range, EnvelopeHash) {
        (Range { first: Number(first), last: Number(last) }, EnvelopeHash([9; 32]))
    }

    fn row(path: &str) -> Item {
        Item::Row { path: TreePath::new(path).expect("a path"), versions: vec![1, 2, 3] }
    }

    fn covered(n: u8, ranges: &[(u64, u64)]) -> Item {
        Item::Covered { author: author(n), ranges: ranges.iter().map(|(first, last)| range(*first, *last)).collect() }
    }

    fn items() -> Vec<Item> {
        vec![
            covered(1, &[(1, 2), (4, 5)]),
            covered(2, &[(1, 300)]),
            row("a"),
            row("a/b"),
            row("a.txt"),
            Item::End { rows: 3 },
        ]
    }

    fn content(items: &[Item]) -> Vec<u8> {
        let mut content = Vec::new();
        items.iter().for_each(|item| item.append(&mut content));
        content
    }

    fn read(content: &[u8], step: usize) -> Result<(Vec<Item>, bool), FormatError> {
        let (mut reader, mut read) = (Items::default(), Vec::new());
        for piece in content.chunks(step) {
            reader.push(piece);
            while let Some(item) = reader.next() {
                read.push(item?);
            }
        }
        Ok((read, reader.is_complete()))
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Snapshot::decode(&snapshot().encode()).expect("a snapshot"), snapshot());
        for step in [1, 7, 1000] {
            assert_eq!(read(&content(&items()), step).expect("items"), (items(), true));
        }
    }

    #[test]
    fn the_bytes_stay_yesterdays() {
        let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
        expect_test::expect!["929292c42001010101010101010101010101010101010101010101010101010101010101010592c4200202020202020202020202020202020202020202020202020202020202020202cd012c9502ce000493e0c420030303030303030303030303030303030303030303030303030303030303030301c4280707070707070707070707070707070707070707070707070707070707070707e093040000000000"].assert_eq(&hex(&snapshot().encode()));
        expect_test::expect!["6f0000009300c420010101010101010101010101010101010101010101010101010101010101010192930102c4200909090909090909090909090909090909090909090909090909090909090909930405c42009090909090909090909090909090909090909090909090909090909090909094c0000009300c4200202020202020202020202020202020202020202020202020202020202020202919301cd012cc4200909090909090909090909090909090909090909090909090909090909090909090000009301a161c4030102030b0000009301a3612f62c4030102030d0000009301a5612e747874c40301020303000000920203"].assert_eq(&hex(&content(&items())));
    }

    #[test]
    fn what_is_out_of_order_twice_or_beyond_the_end_is_refused() {
        let end = |rows| Item::End { rows };
        for bad in [
            vec![row("b"), row("a")],
            vec![row("a"), row("a")],
            vec![row("a.txt"), row("a/b")],
            vec![row("a"), covered(1, &[(1, 2)])],
            vec![covered(2, &[(1, 2)]), covered(1, &[(1, 2)])],
            vec![covered(1, &[(1, 2)]), covered(1, &[(2, 3)])],
            vec![covered(1, &[(3, 4), (1, 2)])],
            vec![covered(1, &[(2, 1)])],
            vec![covered(1, &[(0, 1)])],
            vec![covered(1, &[])],
            vec![row("a"), end(2)],
            vec![end(0), row("a")],
            vec![end(0), end(0)],
        ] {
            assert!(read(&content(&bad), 1000).is_err(), "{bad:?}");
        }
        assert_eq!(read(&content(&[row("a")]), 1000).map(|(_, complete)| complete), Ok(false));
    }

    #[test]
    fn a_path_that_leaves_the_folder_and_an_item_without_bound_are_refused() {
        let bytes = content(&[row("xx")]);
        let at = bytes.iter().position(|byte| *byte == b'x').expect("the path");
        let mut escape = bytes.clone();
        escape[at..at + 2].copy_from_slice(b"..");
        assert_eq!(read(&escape, 1000), Err(FormatError::Malformed { field: "path" }));
        let long = u32::try_from(MAX_SNAPSHOT_ITEM + 1).expect("fits").to_le_bytes();
        assert!(matches!(read(&long, 1000), Err(FormatError::TooMany { .. })));
        let mut huge = snapshot();
        huge.content.size = MAX_SNAPSHOT + 1;
        huge.content.chunks = Chunks::Listed(vec![ChunkRef { hash: Some([1; 32]), len: 40 }]);
        assert!(Snapshot::decode(&huge.encode()).is_err());
    }

    #[test]
    fn it_covers_what_lies_below_its_numbers() {
        let snapshot = snapshot();
        assert!(snapshot.covers(&[(author(1), Number(5))]) && snapshot.covers(&[]));
        assert!(!snapshot.covers(&[(author(1), Number(6))]) && !snapshot.covers(&[(author(3), Number(1))]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Snapshot::decode(&bytes);
            let _ = read(&bytes, 16);
        }

        #[test]
        fn damaged_contents_are_read_or_refused(at in 0usize..400, byte in any::<u8>()) {
            let mut bytes = content(&items());
            let len = bytes.len();
            bytes[at % len] = byte;
            let _ = read(&bytes, 64);
            let mut bytes = snapshot().encode();
            let len = bytes.len();
            bytes[at % len] = byte;
            let _ = Snapshot::decode(&bytes);
        }
    }
}
