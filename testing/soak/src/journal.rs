//! Which content was on which disk, and who took it away: the user, or sync.
//!
//! The journal follows each content at each path of each side.
//! What the user's own hand ends (an edit, a deletion) is owed by nobody.
//! What is gone from a side's tree without that hand was taken by an arriving change, and is **owed**: at the end it has
//! to be somewhere, in a tree or among the versions kept.
//! That covers both halves of **no silent overwrite**: what lay on a disk when a change arrived, and what reached a second
//! device, whose disk it left only by an arriving change.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use data_encoding::HEXLOWER;
use serde::Serialize;
use sync_soak::tree::Item;

/// BLAKE3 of a content.
pub(crate) type Hash = [u8; 32];

/// Contents by side and path, and what is owed.
#[derive(Debug)]
pub(crate) struct Journal {
    file: BufWriter<File>,
    started: Instant,
    sides: Vec<BTreeMap<String, Hash>>,
    contents: HashSet<Hash>,
    owed: BTreeMap<Hash, Taken>,
}

/// Where and when sync took a content from a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    /// The side.
    pub(crate) side: usize,
    /// The path it was at.
    pub(crate) path: String,
    /// When that was noticed, after the start.
    pub(crate) ms: u128,
}

#[derive(Serialize)]
struct Line<'a> {
    ms: u128,
    side: usize,
    did: &'a str,
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl Journal {
    /// Begins a journal that is also written to a file, one object a line.
    pub(crate) fn create(file: &Path, sides: usize) -> Result<Self> {
        let created = File::create_new(file).with_context(|| format!("cannot make {}", file.display()))?;
        Ok(Self {
            file: BufWriter::new(created),
            started: Instant::now(),
            sides: vec![BTreeMap::new(); sides],
            contents: HashSet::new(),
            owed: BTreeMap::new(),
        })
    }

    /// The files of a side, as far as it is known.
    pub(crate) fn files(&self, side: usize) -> &BTreeMap<String, Hash> {
        &self.sides[side]
    }

    /// Different contents seen on any disk.
    pub(crate) fn contents(&self) -> usize {
        self.contents.len()
    }

    /// Notes what is no matter of content.
    pub(crate) fn note(&mut self, side: usize, did: &str, path: &str) -> Result<()> {
        self.line(side, did, path, None, None)
    }

    /// The user's hand wrote a content.
    pub(crate) fn wrote(&mut self, side: usize, path: &str, content: Hash) -> Result<()> {
        self.contents.insert(content);
        self.sides[side].insert(path.to_owned(), content);
        self.line(side, "wrote", path, None, Some(content))
    }

    /// The user's hand removed what was at a path, and what was below it.
    pub(crate) fn removed(&mut self, side: usize, path: &str) -> Result<()> {
        take(&mut self.sides[side], path);
        self.line(side, "removed", path, None, None)
    }

    /// The user's hand moved what was at a path, and what was below it.
    pub(crate) fn moved(&mut self, side: usize, from: &str, to: &str) -> Result<()> {
        let files = &mut self.sides[side];
        take(files, to);
        for (below, content) in take(files, from) {
            files.insert(format!("{to}{below}"), content);
        }
        self.line(side, "moved", from, Some(to), None)
    }

    /// What a look at all of a side's tree has shown: whatever else is gone, sync has taken.
    pub(crate) fn saw(&mut self, side: usize, tree: &BTreeMap<String, Item>) -> Result<()> {
        let file = |(path, item): (&String, &Item)| match item {
            Item::File { hash, .. } => Some((path.clone(), *hash)),
            _ => None,
        };
        let seen: BTreeMap<String, Hash> = tree.iter().filter_map(file).collect();
        let present: BTreeSet<Hash> = seen.values().copied().collect();
        let before = std::mem::take(&mut self.sides[side]);
        for (path, content) in &before {
            // a file that sync has moved, or made a conflict copy of, is still there
            if !present.contains(content) && !is_nothing(content) {
                self.line(side, "lost", path, None, Some(*content))?;
                let ms = self.started.elapsed().as_millis();
                self.owed.entry(*content).or_insert_with(|| Taken { side, path: path.clone(), ms });
            }
        }
        for (path, content) in &seen {
            if before.get(path) != Some(content) {
                self.contents.insert(*content);
                self.line(side, "got", path, None, Some(*content))?;
            }
        }
        self.sides[side] = seen;
        self.file.flush()?;
        Ok(())
    }

    /// What sync took from a disk.
    pub(crate) fn owed(&self) -> &BTreeMap<Hash, Taken> {
        &self.owed
    }

    fn line(&mut self, side: usize, did: &str, path: &str, to: Option<&str>, content: Option<Hash>) -> Result<()> {
        let content = content.map(|content| short(&content));
        let line = Line { ms: self.started.elapsed().as_millis(), side, did, path, to, content };
        serde_json::to_writer(&mut self.file, &line)?;
        Ok(self.file.write_all(b"\n")?)
    }
}

/// A content as messages name it.
pub(crate) fn short(content: &Hash) -> String {
    HEXLOWER.encode(&content[..8])
}

/// The content of an empty file, which nobody can lose.
fn is_nothing(content: &Hash) -> bool {
    blake3::hash(b"").as_bytes() == content
}

/// Takes out what is at a path and below it, by what follows that path.
fn take(files: &mut BTreeMap<String, Hash>, path: &str) -> Vec<(String, Hash)> {
    let below = |at: &String| at.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let taken: Vec<String> = files.keys().filter(|at| below(at)).cloned().collect();
    let rest = |at: String| files.remove(&at).map(|content| (at[path.len()..].to_owned(), content));
    taken.into_iter().filter_map(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, u8)]) -> BTreeMap<String, Item> {
        let file = |(path, n): &(&str, u8)| ((*path).to_owned(), Item::File { mode: 0o644, size: 1, hash: [*n; 32] });
        files.iter().map(file).collect()
    }

    fn owed(journal: &Journal) -> Vec<(u8, usize, &str)> {
        journal.owed().iter().map(|(content, taken)| (content[0], taken.side, taken.path.as_str())).collect()
    }

    fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::create(&dir.path().join("journal"), 2).expect("made");
        (dir, journal)
    }

    #[test]
    fn what_the_users_own_hand_ends_is_owed_by_nobody() -> Result<()> {
        let (_dir, mut journal) = journal();
        for (path, n) in [("a", 1), ("d/b", 2), ("d/c", 3), ("dd", 4)] {
            journal.wrote(0, path, [n; 32])?;
        }
        journal.wrote(0, "a", [5; 32])?;
        journal.removed(0, "d")?;
        journal.moved(0, "dd", "e")?;
        journal.saw(0, &tree(&[("a", 5), ("e", 4)]))?;
        assert_eq!(owed(&journal), []);
        assert_eq!(journal.contents(), 5);
        Ok(())
    }

    #[test]
    fn what_is_gone_without_that_hand_is_owed() -> Result<()> {
        let (_dir, mut journal) = journal();
        journal.wrote(0, "a", [1; 32])?;
        journal.wrote(0, "b", [2; 32])?;
        journal.saw(0, &tree(&[("a", 3), ("b", 2)]))?;
        assert_eq!(owed(&journal), [(1, 0, "a")]);
        journal.saw(0, &tree(&[("a", 3)]))?;
        assert_eq!(owed(&journal), [(1, 0, "a"), (2, 0, "b")]);
        Ok(())
    }

    #[test]
    fn what_reached_a_second_disk_is_owed_once_a_change_arrives_there() -> Result<()> {
        let (_dir, mut journal) = journal();
        journal.wrote(0, "a", [1; 32])?;
        journal.saw(1, &tree(&[("a", 1)]))?;
        journal.wrote(0, "a", [2; 32])?;
        assert_eq!(owed(&journal), []);
        journal.saw(1, &tree(&[("a", 2)]))?;
        assert_eq!(owed(&journal), [(1, 1, "a")]);
        Ok(())
    }

    #[test]
    fn what_sync_moves_or_copies_aside_is_still_there() -> Result<()> {
        let (_dir, mut journal) = journal();
        journal.wrote(0, "a", [1; 32])?;
        journal.saw(0, &tree(&[("a", 2), ("a (conflict)", 1)]))?;
        assert_eq!(owed(&journal), []);
        journal.moved(0, "a (conflict)", "c")?;
        journal.saw(0, &tree(&[("a", 2)]))?;
        assert_eq!(owed(&journal), [(1, 0, "c")]);
        Ok(())
    }

    #[test]
    fn an_empty_file_holds_nothing_to_lose() -> Result<()> {
        let (_dir, mut journal) = journal();
        journal.wrote(0, "a", *blake3::hash(b"").as_bytes())?;
        journal.saw(0, &tree(&[]))?;
        assert_eq!(owed(&journal), []);
        Ok(())
    }
}
