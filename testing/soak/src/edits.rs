//! What users do to a tree, at random: everything that programs and people do to files, on any side.
//!
//! Each edit works on what the journal knows of the side, and is written down once it is done.
//! Where sync was faster and a file is not what the journal says any more, the edit is called off and the side looked at.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use sync_soak::random::Draw;
use sync_soak::tree::{Item, Reader};

use crate::journal::{Hash, Journal};

/// Looks at a tree that finds something missing until two agree, since a walk may miss a file that is moved meanwhile.
const LOOKS: usize = 4;

/// The share of a side's files that one edit may move or remove: less than what looks like an accident.
const MOST: usize = 12;

/// The largest file that is read to be changed.
const MAX_CHANGED: u64 = 8 << 20;

/// All sides, and what has been done to them.
#[derive(Debug)]
pub(crate) struct Editor {
    roots: Vec<PathBuf>,
    readers: Vec<Reader>,
    trees: Vec<BTreeMap<String, Item>>,
    draw: Draw,
    journal: Journal,
    number: u64,
    done: BTreeMap<&'static str, u64>,
    called_off: u64,
}

/// Something a user does.
#[derive(Debug, Clone, Copy)]
enum Edit {
    Create,
    CreateLarge,
    CreateSparse,
    Append,
    Rewrite,
    SaveAside,
    ChangeLine,
    InsertMiddle,
    Truncate,
    RenameFile,
    RenameOver,
    RenameDirectory,
    RemoveFile,
    RemoveDirectory,
    MakeDirectory,
    ChangeMode,
    Link,
    FileToDirectory,
    DirectoryToFile,
    Touch,
}

/// How often each comes up, and its name.
const EDITS: [(Edit, u64, &str); 20] = [
    (Edit::Create, 12, "create"),
    (Edit::CreateLarge, 1, "create large"),
    (Edit::CreateSparse, 1, "create sparse"),
    (Edit::Append, 10, "append"),
    (Edit::Rewrite, 10, "rewrite"),
    (Edit::SaveAside, 10, "save aside"),
    (Edit::ChangeLine, 10, "change a line"),
    (Edit::InsertMiddle, 4, "insert"),
    (Edit::Truncate, 4, "truncate"),
    (Edit::RenameFile, 10, "rename"),
    (Edit::RenameOver, 4, "rename over another"),
    (Edit::RenameDirectory, 4, "rename a directory"),
    (Edit::RemoveFile, 8, "remove"),
    (Edit::RemoveDirectory, 1, "remove a directory"),
    (Edit::MakeDirectory, 4, "make a directory"),
    (Edit::ChangeMode, 5, "change a mode"),
    (Edit::Link, 3, "link"),
    (Edit::FileToDirectory, 2, "file to directory"),
    (Edit::DirectoryToFile, 2, "directory to file"),
    (Edit::Touch, 3, "touch"),
];

impl Editor {
    /// Begins with trees that nobody has looked at.
    pub(crate) fn new(roots: Vec<PathBuf>, seed: u64, journal: Journal) -> Self {
        let sides = roots.len();
        Self {
            roots,
            readers: (0..sides).map(|_| Reader::default()).collect(),
            trees: vec![BTreeMap::new(); sides],
            draw: Draw::new(seed, "edits"),
            journal,
            number: 0,
            done: BTreeMap::new(),
            called_off: 0,
        }
    }

    /// The journal.
    pub(crate) fn journal(&mut self) -> &mut Journal {
        &mut self.journal
    }

    /// A side's tree as it was last seen.
    pub(crate) fn tree(&self, side: usize) -> &BTreeMap<String, Item> {
        &self.trees[side]
    }

    /// Edits that came about, by name.
    pub(crate) fn done(&self) -> &BTreeMap<&'static str, u64> {
        &self.done
    }

    /// Edits that sync was faster than.
    pub(crate) fn called_off(&self) -> u64 {
        self.called_off
    }

    /// Looks at all of a side.
    pub(crate) fn look(&mut self, side: usize) -> Result<()> {
        let reader = &mut self.readers[side];
        let mut tree = reader.read(&self.roots[side])?;
        for _ in 1..LOOKS {
            let missing = self.journal.files(side).keys().any(|path| !tree.contains_key(path));
            if !missing {
                break;
            }
            let again = reader.read(&self.roots[side])?;
            let settled = again == tree;
            tree = again;
            if settled {
                break;
            }
        }
        self.journal.saw(side, &tree)?;
        self.trees[side] = tree;
        Ok(())
    }

    /// Does something on one side.
    pub(crate) fn edit(&mut self, side: usize) -> Result<()> {
        let total = EDITS.iter().map(|(_, weight, _)| weight).sum();
        let mut at = self.draw.below(total);
        let chosen = EDITS.iter().find(|(_, weight, _)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        let (edit, _, name) = chosen.context("BUG: the weights do not add up")?;
        let came = self.perform(*edit, side)?;
        self.count(came, name, side)
    }

    /// Does two things to one path on two sides at once, which cannot both be right.
    pub(crate) fn clash(&mut self, one: usize, other: usize) -> Result<()> {
        let (name, came) = match self.draw.below(5) {
            0 => ("clash: new file", self.create_twice(one, other, false)?),
            1 => ("clash: file and directory", self.create_twice(one, other, true)?),
            choice => {
                let files = self.journal.files(other);
                let both: Vec<String> =
                    self.journal.files(one).keys().filter(|path| files.contains_key(*path)).cloned().collect();
                let Some(path) = self.draw.pick(&both).cloned() else { return Ok(()) };
                let first = self.rewrite(one, &path)?;
                if choice == 2 {
                    ("clash: edit and removal", first && self.remove_file(other, &path)?)
                } else {
                    ("clash: two edits", first && self.save_aside(other, &path)?)
                }
            }
        };
        self.count(came, name, one)?;
        if came { Ok(()) } else { self.look(other) }
    }

    fn count(&mut self, came: bool, name: &'static str, side: usize) -> Result<()> {
        if came {
            *self.done.entry(name).or_default() += 1;
            return Ok(());
        }
        self.called_off += 1;
        self.look(side)
    }

    /// Whether it came about; if not, there was nothing for it, or sync was faster.
    fn perform(&mut self, edit: Edit, side: usize) -> Result<bool> {
        match edit {
            Edit::Create => {
                let (path, bytes) = (self.new_path(side), self.content());
                self.create(side, &path, &bytes)
            }
            Edit::CreateLarge => {
                let path = self.new_path(side);
                let mut bytes = vec![0; 1 << 20];
                bytes.resize(self.draw.index(3 << 20) + (300 << 10), 0);
                self.draw.fill(&mut bytes);
                self.create(side, &path, &bytes)
            }
            Edit::CreateSparse => self.create_sparse(side),
            Edit::RenameFile => {
                let to = self.new_path(side);
                self.on_file(side, |editor, path| editor.rename(side, path, &to))
            }
            Edit::RenameOver => {
                let Some(to) = self.file(side) else { return Ok(false) };
                self.on_file(side, |editor, path| {
                    Ok(path != to && editor.is_known(side, &to)? && editor.rename(side, path, &to)?)
                })
            }
            Edit::RenameDirectory => self.rename_directory(side),
            Edit::RemoveDirectory => self.on_directory(side, MOST, |editor, path| editor.remove_directory(side, path)),
            Edit::MakeDirectory => {
                let path = self.new_path(side);
                let deep = if self.draw.one_in(3) { format!("{path}/below/it") } else { path };
                let made = soft(fs::create_dir_all(self.at(side, &deep)))?.is_some();
                self.journal.note(side, "made", &deep)?;
                Ok(made)
            }
            Edit::ChangeMode => self.change_mode(side),
            Edit::Link => self.link(side),
            Edit::DirectoryToFile => {
                let bytes = self.content();
                self.on_directory(side, 5, |editor, path| {
                    Ok(editor.remove_directory(side, path)? && editor.create(side, path, &bytes)?)
                })
            }
            Edit::Append => self.on_file(side, |editor, path| {
                let line = editor.line();
                editor.change(side, path, |bytes, _| bytes.extend_from_slice(line.as_bytes()))
            }),
            Edit::Rewrite => self.on_file(side, |editor, path| editor.rewrite(side, path)),
            Edit::SaveAside => self.on_file(side, |editor, path| editor.save_aside(side, path)),
            Edit::ChangeLine => self.on_file(side, |editor, path| {
                let line = editor.line();
                editor.change(side, path, |bytes, draw| change_line(bytes, &line, draw))
            }),
            Edit::InsertMiddle => self.on_file(side, |editor, path| {
                let line = editor.line();
                editor.change(side, path, |bytes, draw| {
                    let at = draw.index(bytes.len() + 1);
                    bytes.splice(at..at, line.bytes());
                })
            }),
            Edit::Truncate => self.on_file(side, |editor, path| {
                editor.change(side, path, |bytes, draw| bytes.truncate(draw.index(bytes.len() + 1)))
            }),
            Edit::RemoveFile => self.on_file(side, |editor, path| editor.remove_file(side, path)),
            Edit::FileToDirectory => self.on_file(side, |editor, path| {
                if !editor.remove_file(side, path)? || soft(fs::create_dir(editor.at(side, path)))?.is_none() {
                    return Ok(false);
                }
                let bytes = editor.content();
                editor.create(side, &format!("{path}/inside"), &bytes)
            }),
            Edit::Touch => self.on_file(side, |editor, path| {
                let opened = soft(File::options().append(true).open(editor.at(side, path)))?;
                let Some(file) = opened else { return Ok(false) };
                file.set_modified(std::time::SystemTime::now())?;
                editor.journal.note(side, "touched", path)?;
                Ok(true)
            }),
        }
    }

    // ---- what is chosen ----

    fn at(&self, side: usize, path: &str) -> PathBuf {
        self.roots[side].join(path)
    }

    /// A file of a side.
    fn file(&mut self, side: usize) -> Option<String> {
        let files = self.journal.files(side);
        let at = self.draw.index(files.len());
        files.keys().nth(at).cloned()
    }

    /// A directory of a side as it was last seen; none if it has none but its root.
    fn directory(&mut self, side: usize) -> Option<String> {
        let directories: Vec<&String> = self.trees[side]
            .iter()
            .filter(|(_, item)| matches!(item, Item::Directory { .. }))
            .map(|(at, _)| at)
            .collect();
        self.draw.pick(&directories).map(|path| (*path).clone())
    }

    fn on_file(&mut self, side: usize, edit: impl FnOnce(&mut Self, &str) -> Result<bool>) -> Result<bool> {
        let Some(path) = self.file(side) else { return Ok(false) };
        Ok(self.is_known(side, &path)? && edit(self, &path)?)
    }

    /// Whether a file is what the journal says.
    fn is_known(&mut self, side: usize, path: &str) -> Result<bool> {
        let at = self.at(side, path);
        let found = self.readers[side].look(&at).with_context(|| format!("cannot read {}", at.display()))?;
        let expected = self.journal.files(side).get(path);
        Ok(matches!((found, expected), (Some(Item::File { hash, .. }), Some(known)) if hash == *known))
    }

    /// Something to be done to a directory that does not hold more than one part in `most` of the files.
    fn on_directory(
        &mut self,
        side: usize,
        most: usize,
        edit: impl FnOnce(&mut Self, &str) -> Result<bool>,
    ) -> Result<bool> {
        self.look(side)?;
        let Some(path) = self.directory(side) else { return Ok(false) };
        let files = self.journal.files(side);
        let prefix = format!("{path}/");
        let below = files.keys().filter(|at| at.starts_with(&prefix)).count();
        Ok(below * MOST <= files.len() && below <= most * MOST && edit(self, &path)?)
    }

    /// A path where nothing is, in some directory.
    fn new_path(&mut self, side: usize) -> String {
        self.number += 1;
        let number = self.number;
        let stem = self.draw.pick(&["note", "with space", "größe", "日本", "x.tar", ".hidden", "-dash", "a'b\"c"]);
        let stem = stem.copied().unwrap_or_default();
        let long = if self.draw.one_in(40) { "l".repeat(150) } else { String::new() };
        let ending = self.draw.pick(&["", ".txt", ".rs", "~", ".bin"]).copied().unwrap_or_default();
        let name = format!("{stem}{long}-{number}{ending}");
        match self.directory(side) {
            Some(directory) if !self.draw.one_in(6) && directory.len() < 600 => format!("{directory}/{name}"),
            _ => name,
        }
    }

    /// A line that nobody else writes.
    fn line(&mut self) -> String {
        self.number += 1;
        format!("line {} of {}\n", self.number, self.draw.below(1 << 48))
    }

    /// A content that nobody else writes: text or bytes, mostly small.
    fn content(&mut self) -> Vec<u8> {
        let mut bytes = self.line().into_bytes();
        if self.draw.one_in(3) {
            let most = if self.draw.one_in(10) { 700 << 10 } else { 20 << 10 };
            let mut random = vec![0; self.draw.index(most)];
            self.draw.fill(&mut random);
            bytes.extend(random);
        } else {
            for _ in 0..self.draw.below(80) {
                bytes.extend(self.line().into_bytes());
            }
        }
        bytes
    }

    // ---- what is done ----

    fn create(&mut self, side: usize, path: &str, bytes: &[u8]) -> Result<bool> {
        let Some(mut file) = soft(File::create_new(self.at(side, path)))? else { return Ok(false) };
        file.write_all(bytes)?;
        self.journal.wrote(side, path, hash(bytes))?;
        Ok(true)
    }

    fn create_sparse(&mut self, side: usize) -> Result<bool> {
        let path = self.new_path(side);
        let line = self.line();
        let size = self.draw.between(1 << 20, 6 << 20);
        let offset = self.draw.below(size);
        let Some(mut file) = soft(File::options().read(true).write(true).create_new(true).open(self.at(side, &path)))?
        else {
            return Ok(false);
        };
        file.set_len(size)?;
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(line.as_bytes())?;
        // the same open file, whatever is at the path by now
        file.seek(SeekFrom::Start(0))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut file)?;
        self.journal.wrote(side, &path, *hasher.finalize().as_bytes())?;
        Ok(true)
    }

    fn create_twice(&mut self, one: usize, other: usize, directory: bool) -> Result<bool> {
        let path = self.new_path(one);
        let (first, second) = (self.content(), self.content());
        if !self.create(one, &path, &first)? {
            return Ok(false);
        }
        if !directory {
            return self.create(other, &path, &second);
        }
        let made = soft(fs::create_dir(self.at(other, &path)))?.is_some();
        Ok(made && self.create(other, &format!("{path}/inside"), &second)?)
    }

    /// Writes a file anew in its place.
    fn rewrite(&mut self, side: usize, path: &str) -> Result<bool> {
        let bytes = self.content();
        if !self.is_known(side, path)? {
            return Ok(false);
        }
        let opened = soft(File::options().write(true).truncate(true).open(self.at(side, path)))?;
        let Some(mut file) = opened else { return Ok(false) };
        // in two steps, as a program writes that computes: half a file may be seen
        let half = bytes.len() / 2;
        file.write_all(&bytes[..half])?;
        file.write_all(&bytes[half..])?;
        self.journal.wrote(side, path, hash(&bytes))?;
        Ok(true)
    }

    /// Writes beside and renames, as editors do.
    fn save_aside(&mut self, side: usize, path: &str) -> Result<bool> {
        let bytes = self.content();
        self.number += 1;
        let aside = match path.rsplit_once('/') {
            Some((directory, _)) => format!("{directory}/.save-{}", self.number),
            None => format!(".save-{}", self.number),
        };
        Ok(self.create(side, &aside, &bytes)? && self.is_known(side, path)? && self.rename(side, &aside, path)?)
    }

    /// Reads a file, changes it and writes it back, all on one open file, so that it is known what it holds then.
    fn change(&mut self, side: usize, path: &str, change: impl FnOnce(&mut Vec<u8>, &mut Draw)) -> Result<bool> {
        let opened = soft(File::options().read(true).write(true).open(self.at(side, path)))?;
        let Some(mut file) = opened else { return Ok(false) };
        if file.metadata()?.len() > MAX_CHANGED {
            return Ok(false);
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        change(&mut bytes, &mut self.draw);
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&bytes)?;
        file.set_len(bytes.len() as u64)?;
        self.journal.wrote(side, path, hash(&bytes))?;
        Ok(true)
    }

    fn rename(&mut self, side: usize, from: &str, to: &str) -> Result<bool> {
        if soft(fs::rename(self.at(side, from), self.at(side, to)))?.is_none() {
            return Ok(false);
        }
        self.journal.moved(side, from, to)?;
        Ok(true)
    }

    fn rename_directory(&mut self, side: usize) -> Result<bool> {
        let to = self.new_path(side);
        self.on_directory(side, MOST, |editor, path| {
            let below_itself = to.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
            Ok(!below_itself && editor.rename(side, path, &to)?)
        })
    }

    fn remove_file(&mut self, side: usize, path: &str) -> Result<bool> {
        if !self.is_known(side, path)? || soft(fs::remove_file(self.at(side, path)))?.is_none() {
            return Ok(false);
        }
        self.journal.removed(side, path)?;
        Ok(true)
    }

    fn remove_directory(&mut self, side: usize, path: &str) -> Result<bool> {
        // what it could not remove is found again by the next look
        let removed = soft(fs::remove_dir_all(self.at(side, path)))?.is_some();
        self.journal.removed(side, path)?;
        Ok(removed)
    }

    fn change_mode(&mut self, side: usize) -> Result<bool> {
        let directory = self.draw.one_in(4);
        let path = if directory { self.directory(side) } else { self.file(side) };
        let Some(path) = path else { return Ok(false) };
        let modes = if directory { [0o755, 0o700, 0o750, 0o775] } else { [0o644, 0o600, 0o755, 0o640] };
        let mode = self.draw.pick(&modes).copied().unwrap_or(0o700);
        let changed = soft(set_mode(&self.at(side, &path), mode))?.is_some();
        self.journal.note(side, &format!("set mode {mode:o} of"), &path)?;
        Ok(changed)
    }

    fn link(&mut self, side: usize) -> Result<bool> {
        let path = self.new_path(side);
        let target = match self.file(side) {
            Some(file) if self.draw.one_in(2) => file,
            _ => format!("../nowhere-{}", self.number),
        };
        let made = soft(make_link(&target, &self.at(side, &path)))?.is_some();
        self.journal.note(side, "linked", &path)?;
        Ok(made)
    }
}

fn hash(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

fn change_line(bytes: &mut Vec<u8>, line: &str, draw: &mut Draw) {
    let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    let changed = draw.index(lines.len());
    let start = lines.iter().take(changed).map(|line| line.len()).sum::<usize>();
    let end = start + lines.get(changed).map_or(0, |line| line.len());
    bytes.splice(start..end, line.bytes());
}

/// A result, or none if sync was faster: something is there by now, or not there any more.
fn soft<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    use io::ErrorKind::{
        AlreadyExists, DirectoryNotEmpty, InvalidFilename, IsADirectory, NotADirectory, NotFound, PermissionDenied,
    };
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.kind() {
            AlreadyExists | DirectoryNotEmpty | InvalidFilename | IsADirectory | NotADirectory | NotFound
            | PermissionDenied => Ok(None),
            _ => Err(error),
        },
    }
}

#[cfg(unix)]
fn set_mode(at: &std::path::Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(at, fs::Permissions::from_mode(mode))
}

#[cfg(unix)]
fn make_link(target: &str, at: &std::path::Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, at)
}

#[cfg(not(unix))]
fn set_mode(at: &std::path::Path, mode: u32) -> io::Result<()> {
    let mut permissions = fs::metadata(at)?.permissions();
    permissions.set_readonly(mode & 0o200 == 0);
    fs::set_permissions(at, permissions)
}

#[cfg(not(unix))]
fn make_link(_: &str, _: &std::path::Path) -> io::Result<()> {
    Err(io::ErrorKind::PermissionDenied.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without anybody who syncs, the journal must know everything, and owe nothing.
    #[test]
    fn without_sync_the_journal_knows_what_is_there_and_owes_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let roots: Vec<PathBuf> = ["a", "b"].iter().map(|name| dir.path().join(name)).collect();
        for root in &roots {
            fs::create_dir(root)?;
            for number in 0..60 {
                let directory = root.join(format!("d{}", number % 13));
                fs::create_dir_all(&directory)?;
                fs::write(directory.join(format!("f{number}")), format!("one\ntwo\n{number}\n"))?;
            }
        }
        let mut editor = Editor::new(roots.clone(), 5, Journal::create(&dir.path().join("journal"), 2)?);
        editor.look(0)?;
        editor.look(1)?;
        for number in 0..600 {
            if number % 10 == 0 {
                editor.clash(0, 1)?;
            }
            editor.edit(number % 2)?;
        }
        for (side, root) in roots.iter().enumerate() {
            let known = editor.journal().files(side).clone();
            for (path, content) in &known {
                let (_, found) = sync_soak::tree::hash(&root.join(path))?;
                assert_eq!(found, *content, "{path}");
            }
            editor.look(side)?;
            assert_eq!(*editor.journal().files(side), known);
        }
        assert!(editor.journal().owed().is_empty());
        assert!(editor.done().len() > 22, "{:?}", editor.done());
        assert!(editor.called_off() < 300, "{} of {:?}", editor.called_off(), editor.done());
        Ok(())
    }
}
