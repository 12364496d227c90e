//! Where the version that lost a conflict goes, and what is said about it.

use sync_types::bounds::{MAX_COMPONENT, MAX_PATH};
use sync_types::folder::{Node, Record, TreePath, Vector};

use super::reconcile::Disk;
use super::version::{Version, Versions, content_hash};

/// Bytes of what is read as an extension; a longer one is part of a sentence.
const MAX_EXTENSION: usize = 16;
/// Digits of the content's hash that are tried where a name is taken.
const DIGITS: [usize; 3] = [8, 16, 64];

/// The path of a conflict copy: `name (conflict 2026-11-21 AB12CD).ext`, beside the original.
///
/// Every device arrives at the same name, from the record that lost. `taken` says whether something *else* than the
/// loser's content is at a path, or was said to be; then digits of the content's hash follow, then numbers.
pub fn conflict_path(path: &TreePath, loser: &Version, taken: impl Fn(&TreePath) -> bool) -> TreePath {
    let (stem, extension) = split(path.name(), &loser.node);
    let date = date(loser.mtime);
    let author = data_encoding::HEXUPPER.encode(&loser.dot.author.as_bytes()[..3]);
    let hash = data_encoding::HEXLOWER.encode(&content_hash(&loser.node));
    let digits = DIGITS.iter().map(|digits| format!(" {}", &hash[..*digits]));
    let numbers = (2u64..).map(|number| format!(" {hash} {number}"));
    for more in std::iter::once(String::new()).chain(digits).chain(numbers) {
        let copy = beside(path, stem, &format!(" (conflict {date} {author}{more}){extension}"));
        if !taken(&copy) {
            return copy;
        }
    }
    unreachable!("BUG: numbers do not end")
}

/// The two records that settle a conflict: the copy, and what has taken its place.
///
/// `basis` is what is known at the copy's path ([`super::basis`]), `take` what was decided ([`super::Action::Conflict`]),
/// whose vector is the other record's basis.
#[must_use]
pub fn settle(path: TreePath, take: &Disk, copy: TreePath, basis: Vector, loser: &Version) -> [Record; 2] {
    let copy = Record { path: copy, node: loser.node.clone(), mode: loser.mode, mtime: loser.mtime, basis };
    let basis = take.vector.clone();
    [copy, Record { path, node: take.node.clone(), mode: take.mode, mtime: take.mtime, basis }]
}

/// The record that takes the place of the second one where something else wins by now: that the loser is gone from its
/// path, since nobody else would say so. It supersedes the loser alone, and names no content that may not be here. None
/// where others have said so.
#[must_use]
pub fn moved_aside(path: TreePath, now: &Versions, loser: &Version) -> Option<Record> {
    let lies = now.maximal().iter().any(|version| version.dot == loser.dot);
    lies.then(|| Record { path, node: Node::Deleted, mode: 0, mtime: 0, basis: loser.vector.clone() })
}

fn split<'a>(name: &'a str, node: &Node) -> (&'a str, &'a str) {
    if *node == Node::Directory {
        return (name, "");
    }
    let Some(dot) = name.rfind('.') else { return (name, "") };
    let (stem, extension) = name.split_at(dot);
    let usual = extension.len() > 1 && extension.len() <= MAX_EXTENSION && !extension.contains(char::is_whitespace);
    let named = !stem.trim_start_matches('.').is_empty();
    if usual && named { (stem, extension) } else { (name, "") }
}

/// A name that ends so, in the same directory, or in the first one above where the path is not too long.
fn beside(path: &TreePath, stem: &str, end: &str) -> TreePath {
    let mut directory = path.parent();
    loop {
        let above = directory.as_ref().map_or(0, |directory| directory.as_str().len() + 1);
        let room = MAX_COMPONENT.min(MAX_PATH - above);
        if let Some(room) = room.checked_sub(end.len()) {
            let name = format!("{}{end}", &stem[..stem.floor_char_boundary(room)]);
            let made = match &directory {
                Some(directory) => directory.join(&name),
                None => TreePath::new(name),
            };
            return made.expect("BUG: a name that is no longer than it may be is refused");
        }
        directory = directory.expect("BUG: the longest ending fits the root").parent();
    }
}

fn date(mtime: i64) -> String {
    let seconds = mtime.div_euclid(1_000_000_000);
    let at = time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    format!("{:04}-{:02}-{:02}", at.year(), u8::from(at.month()), at.day())
}

#[cfg(test)]
mod tests {
    use sync_types::AuthorId;
    use sync_types::folder::{Chunks, Dot, FileContent};

    use super::*;

    const NOVEMBER_21: i64 = 1_795_305_599_999_999_999;

    fn file() -> Node {
        Node::File(FileContent { size: 1, hash: [0x5e; 32], chunks: Chunks::Whole })
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    fn loser(node: Node, mtime: i64) -> Version {
        let mut author = [0xab; 32];
        author[1..3].copy_from_slice(&[0x12, 0xcd]);
        let dot = Dot { author: AuthorId(author), count: 1 };
        Version { dot, vector: [dot].into_iter().collect(), node, mode: 0o600, mtime }
    }

    fn copy_of(name: &str) -> String {
        conflict_path(&path(name), &loser(file(), NOVEMBER_21), |_| false).to_string()
    }

    #[test]
    fn a_copy_says_when_and_whose() {
        for (name, copy) in [
            ("a.txt", "a (conflict 2026-11-21 AB12CD).txt"),
            ("d.d/a", "d.d/a (conflict 2026-11-21 AB12CD)"),
            ("a.tar.gz", "a.tar (conflict 2026-11-21 AB12CD).gz"),
            (".bashrc", ".bashrc (conflict 2026-11-21 AB12CD)"),
            ("..rc", "..rc (conflict 2026-11-21 AB12CD)"),
            (".a.toml", ".a (conflict 2026-11-21 AB12CD).toml"),
            ("a.", "a. (conflict 2026-11-21 AB12CD)"),
            ("Mr. X to Y", "Mr. X to Y (conflict 2026-11-21 AB12CD)"),
        ] {
            assert_eq!(copy_of(name), copy);
        }
        let directory = conflict_path(&path("a.d"), &loser(Node::Directory, 0), |_| false);
        assert_eq!(directory.as_str(), "a.d (conflict 1970-01-01 AB12CD)");
    }

    #[test]
    fn the_date_is_utc_and_any_time_has_one() {
        for (mtime, date) in [
            (NOVEMBER_21, "2026-11-21"),
            (NOVEMBER_21 + 1, "2026-11-22"),
            (-1, "1969-12-31"),
            (951_782_400_000_000_000, "2000-02-29"),
            (i64::MIN, "1677-09-21"),
            (i64::MAX, "2262-04-11"),
        ] {
            assert_eq!(super::date(mtime), date);
        }
    }

    #[test]
    fn a_loser_that_was_set_aside_for_nothing_is_gone_and_nothing_else_is() {
        let at = |n: u8| Dot { author: AuthorId([n; 32]), count: 1 };
        let lost = Version { vector: [at(1)].into_iter().collect(), dot: at(1), ..loser(file(), 0) };
        let other = Node::File(FileContent { size: 2, hash: [2; 32], chunks: Chunks::Whole });
        let wins = Version { vector: [at(2)].into_iter().collect(), dot: at(2), ..loser(other, 0) };
        let mut now = Versions::default();
        now.insert(lost.clone());
        now.insert(wins.clone());
        let told = moved_aside(path("a"), &now, &lost).expect("it lies there for all that is known");
        now.insert(Version::new(&told, at(3)));
        assert_eq!(now.winner(), Some(&wins));
        assert!(now.maximal().iter().all(|version| version.dot != lost.dot));
        assert_eq!(moved_aside(path("a"), &now, &lost), None, "others have said so");
    }

    #[test]
    fn a_taken_name_gets_digits_of_the_content() {
        let taken = |names: &'static [&'static str]| move |path: &TreePath| names.contains(&path.as_str());
        let loser = loser(file(), NOVEMBER_21);
        let one = ["a (conflict 2026-11-21 AB12CD).b"];
        let copy = conflict_path(&path("a.b"), &loser, |path| one.contains(&path.as_str()));
        assert_eq!(copy.as_str(), "a (conflict 2026-11-21 AB12CD 5e5e5e5e).b");
        let two = taken(&["a (conflict 2026-11-21 AB12CD).b", "a (conflict 2026-11-21 AB12CD 5e5e5e5e).b"]);
        assert!(conflict_path(&path("a.b"), &loser, two).as_str().ends_with(" 5e5e5e5e5e5e5e5e).b"));
        let digits = "5e".repeat(32);
        let tried = std::cell::Cell::new(0);
        let last = conflict_path(&path("a.b"), &loser, |_| tried.replace(tried.get() + 1) < 5);
        assert!(last.as_str().ends_with(&format!(" {digits} 3).b")), "{last}");
    }

    #[test]
    fn a_copy_is_no_longer_than_a_path_may_be() {
        let long = "ä".repeat(125) + ".text";
        let copy = copy_of(&long);
        assert!(copy.len() <= MAX_COMPONENT && copy.ends_with("ä (conflict 2026-11-21 AB12CD).text"), "{copy}");
        assert!(copy_of(&("x.".to_owned() + &"y".repeat(200))).ends_with("yy (conflict 2026-11-21 AB12CD)"));
        let deep = format!("{}/{}/a.txt", vec!["d".repeat(255); 15].join("/"), "e".repeat(249));
        let copy = copy_of(&deep);
        assert!(copy.len() <= MAX_PATH && copy.ends_with("dd/a (conflict 2026-11-21 AB12CD).txt"), "{copy}");
    }

    #[test]
    fn both_records_say_what_was_decided() {
        let loser = loser(file(), 7);
        let vector = loser.vector.clone();
        let take = Disk { node: Node::Symlink("x".to_owned()), mode: 0, mtime: 9, vector: vector.clone() };
        let [copy, winner] = settle(path("a"), &take, path("b"), Vector::default(), &loser);
        assert_eq!((copy.path, copy.node, copy.mode, copy.mtime), (path("b"), file(), 0o600, 7));
        assert!(copy.basis.is_empty());
        assert_eq!((winner.path, winner.node, winner.mtime, winner.basis), (path("a"), take.node, 9, vector));
    }
}
