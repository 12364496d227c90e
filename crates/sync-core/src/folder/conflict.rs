//! Where the version that lost a conflict goes, and what is said about it.

use sync_types::bounds::{MAX_COMPONENT, MAX_PATH};
use sync_types::folder::{Node, Record, TreePath, Vector};

use super::reconcile::Disk;
use super::version::{Version, content_hash};

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
