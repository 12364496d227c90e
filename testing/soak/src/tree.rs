//! Trees of files: found, made from a seed, counted, compared.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, FileType, Metadata};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
#[cfg(unix)]
use std::time::UNIX_EPOCH;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::random::Draw;

/// What programs keep for themselves in the root of a tree.
const OWN: [&str; 2] = [".syncshell", ".stfolder"];

/// Bytes of text of which the small files are cut.
const TEXT: usize = 2 << 20;

/// The largest small file.
const MAX_SMALL: f64 = 1048576.0;

/// Files in one directory of a tree of small files.
const PER_DIRECTORY: usize = 100;

/// What a tree holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Files, directories and links.
    pub entries: u64,
    /// Files.
    pub files: u64,
    /// Bytes of the files.
    pub bytes: u64,
}

/// Walks a tree without what programs keep for themselves in its root; what vanishes meanwhile is left out.
pub fn walk(root: &Path, mut visit: impl FnMut(&str, &Path, &Metadata) -> io::Result<()>) -> Result<()> {
    let mut waiting = vec![String::new()];
    while let Some(directory) = waiting.pop() {
        let Some(entries) = there(fs::read_dir(root.join(&directory)))? else { continue };
        for entry in entries {
            let Some(entry) = there(entry)? else { continue };
            let name = entry.file_name();
            let name = name.to_str().context("a name is not UTF-8")?;
            if directory.is_empty() && OWN.contains(&name) {
                continue;
            }
            let path = if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") };
            let Some(metadata) = there(entry.metadata())? else { continue };
            if there(visit(&path, &entry.path(), &metadata))?.is_some() && metadata.is_dir() {
                waiting.push(path);
            }
        }
    }
    Ok(())
}

/// A result, or none where something is not there any more.
fn there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Counts what a tree holds.
pub fn count(root: &Path) -> Result<Counts> {
    let mut counts = Counts::default();
    walk(root, |_, _, metadata| {
        counts.entries += 1;
        if metadata.is_file() {
            counts.files += 1;
            counts.bytes += metadata.len();
        }
        Ok(())
    })?;
    Ok(counts)
}

/// More than a tick of any file system's clock that is in use here.
const TICK: Duration = Duration::from_millis(100);

/// Removes what programs keep for themselves in a tree's root.
pub fn remove_own(root: &Path) -> Result<()> {
    for own in OWN {
        there(fs::remove_dir_all(root.join(own)))?;
    }
    Ok(())
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
    },
    /// A file.
    File {
        /// Permission bits.
        mode: u32,
        /// Bytes.
        size: u64,
        /// BLAKE3.
        hash: [u8; 32],
    },
    /// A symbolic link.
    Link {
        /// The text it holds.
        target: PathBuf,
    },
    /// Neither.
    Other,
}

/// Reads trees, and of files that have not changed since remembers what was read.
#[derive(Debug, Default)]
pub struct Reader {
    known: HashMap<PathBuf, (Stamp, [u8; 32])>,
}

/// What changes whenever a file is written or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: Option<SystemTime>,
    #[cfg(unix)]
    identity: (u64, i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        use std::os::unix::fs::MetadataExt as _;
        Self {
            size: metadata.len(),
            modified: metadata.modified().ok(),
            #[cfg(unix)]
            identity: (metadata.ino(), metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether that long has passed since the last change.
    fn is_older_than(&self, age: Duration) -> bool {
        #[cfg(unix)]
        let changed = {
            let (_, seconds, nanos) = self.identity;
            let nanos = u32::try_from(nanos).unwrap_or(0);
            u64::try_from(seconds).ok().map(|seconds| UNIX_EPOCH + Duration::new(seconds, nanos))
        };
        #[cfg(not(unix))]
        let changed = self.modified;
        changed.and_then(|changed| changed.elapsed().ok()).is_some_and(|passed| passed > age)
    }
}

impl Reader {
    /// Everything in a tree, by path.
    pub fn read(&mut self, root: &Path) -> Result<BTreeMap<String, Item>> {
        let mut items = BTreeMap::new();
        walk(root, |path, at, metadata| {
            let item = self.item(at, metadata)?;
            items.insert(path.to_owned(), item);
            Ok(())
        })?;
        Ok(items)
    }

    /// What is at one path.
    pub fn look(&mut self, at: &Path) -> io::Result<Option<Item>> {
        let Some(metadata) = there(fs::symlink_metadata(at))? else { return Ok(None) };
        there(self.item(at, &metadata))
    }

    fn item(&mut self, at: &Path, metadata: &Metadata) -> io::Result<Item> {
        let kind: FileType = metadata.file_type();
        let mode = mode(metadata);
        if kind.is_dir() {
            return Ok(Item::Directory { mode });
        }
        if kind.is_symlink() {
            return Ok(Item::Link { target: fs::read_link(at)? });
        }
        if !kind.is_file() {
            return Ok(Item::Other);
        }
        let stamp = Stamp::of(metadata);
        let size = metadata.len();
        if let Some((known, hash)) = self.known.get(at)
            && *known == stamp
        {
            return Ok(Item::File { mode, size, hash: *hash });
        }
        let (size, hash) = hash(at)?;
        // another write within the same tick of the file system's clock would leave the same stamp
        if stamp.is_older_than(TICK) {
            self.known.insert(at.to_owned(), (stamp, hash));
        }
        Ok(Item::File { mode, size, hash })
    }
}

/// Size and BLAKE3 of a file.
pub fn hash(file: &Path) -> io::Result<(u64, [u8; 32])> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(file)?)?;
    Ok((hasher.count(), *hasher.finalize().as_bytes()))
}

#[cfg(unix)]
fn mode(metadata: &Metadata) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    metadata.permissions().mode() & 0o777
}

#[cfg(not(unix))]
fn mode(metadata: &Metadata) -> u32 {
    u32::from(!metadata.permissions().readonly())
}

/// Where trees are made: a directory of the build's, on the disk that the work is on and not in memory.
pub fn beside_the_program(name: &str) -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let target = program.ancestors().nth(2).context("this program is not in a build directory: name one with --dir")?;
    let dir = target.join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Copies the sources of some of the workspace's dependencies, each into a directory of its name and version.
pub fn copy_sources(names: &[&str], to: &Path) -> Result<()> {
    let sources = sources()?;
    for name in names {
        let from = sources.get(*name).with_context(|| format!("the workspace does not depend on {name}"))?;
        let directory = from.file_name().with_context(|| format!("the source of {name} has no name"))?;
        copy_all(from, &to.join(directory)).with_context(|| format!("cannot copy the source of {name}"))?;
    }
    Ok(())
}

/// Where cargo keeps the sources of the dependencies: of each name the newest version.
fn sources() -> Result<BTreeMap<String, PathBuf>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        source: Option<String>,
        manifest_path: PathBuf,
    }
    let cargo = || Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let metadata = |offline: &[&str]| {
        cargo().args(["metadata", "--format-version", "1", "--locked"]).args(offline).output().context("no cargo here")
    };
    // of other platforms too, which a build alone does not bring
    let mut output = metadata(&["--offline"])?;
    if !output.status.success() {
        output = metadata(&[])?;
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo does not tell where sources are; call this in the workspace: {complaint}");
    let metadata: Metadata = serde_json::from_slice(&output.stdout)?;
    let mut sources = BTreeMap::new();
    for package in metadata.packages {
        let Some(directory) = package.manifest_path.parent() else { continue };
        if package.source.is_some() {
            let place = sources.entry(package.name).or_insert_with(|| directory.to_owned());
            if *place < *directory {
                *place = directory.to_owned();
            }
        }
    }
    Ok(sources)
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    walk(from, |path, at, metadata| {
        let place = to.join(path);
        if metadata.is_dir() { fs::create_dir(place) } else { fs::copy(at, place).map(drop) }
    })
}

/// Makes a file of random bytes.
pub fn make_random_file(path: &Path, size: u64, seed: u64) -> Result<()> {
    let mut stream = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    let mut file = File::create_new(path)?;
    let mut block = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        stream.fill(&mut block);
        let taken = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        file.write_all(&block[..taken])?;
        left -= taken as u64;
    }
    Ok(())
}

/// Makes a tree of small files with the sizes of source code: half of them below 4 KiB, 15 KB on average.
pub fn make_small_files(root: &Path, files: usize, seed: u64) -> Result<()> {
    let mut draw = Draw::new(seed, "small files");
    let text = text(&mut draw);
    for number in 0..files {
        let directory = number / PER_DIRECTORY;
        let directory = root.join(format!("part{:02}/module{directory:04}", directory % 40));
        if number % PER_DIRECTORY == 0 {
            fs::create_dir_all(&directory)?;
        }
        // as logarithms of sizes of source files are spread: median e^8.3, mean 3.7 times that
        let size = (8.3 + 1.62 * draw.normal()).exp().clamp(1.0, MAX_SMALL);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and a mebibyte")]
        let size = size as usize;
        let at = draw.index(TEXT - size);
        let mut file = File::create_new(directory.join(format!("unit_{number:06}.rs")))?;
        file.write_all(format!("//! Unit {number} of {seed}.\n").as_bytes())?;
        file.write_all(&text[at..at + size])?;
    }
    Ok(())
}

/// Lines of words as code has them, so that compression finds what it does in code.
fn text(draw: &mut Draw) -> Vec<u8> {
    let words: Vec<String> = (0..2000)
        .map(|_| {
            let letters = (0..draw.between(2, 9)).map(|_| char::from(b'a' + u8::try_from(draw.below(26)).unwrap_or(0)));
            letters.collect()
        })
        .collect();
    let mut text = Vec::with_capacity(TEXT + 64);
    while text.len() < TEXT {
        text.extend(std::iter::repeat_n(b' ', 4 * draw.index(4)));
        for _ in 0..draw.between(1, 9) {
            let word = draw.pick(&words).map_or(&[][..], |word| word.as_bytes());
            text.extend_from_slice(word);
            text.extend_from_slice(
                draw.pick(&[" ", "_", "::", "(", "); ", ".", " = "]).map_or("", |mark| *mark).as_bytes(),
            );
        }
        text.push(b'\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_from_a_seed_is_the_same_again_and_has_the_sizes_of_code() {
        let dir = tempfile::tempdir().expect("a directory");
        let make = |name: &str, seed| {
            make_small_files(&dir.path().join(name), 300, seed).expect("made");
            Reader::default().read(&dir.path().join(name)).expect("read")
        };
        let (one, again, other) = (make("a", 1), make("b", 1), make("c", 2));
        assert_eq!(one, again);
        assert_ne!(one, other);
        let counts = count(&dir.path().join("a")).expect("counted");
        assert_eq!((counts.files, counts.entries), (300, 300 + 3 + 3));
        assert!((1_000_000..12_000_000).contains(&counts.bytes), "{counts:?}");
    }

    #[test]
    fn what_programs_keep_for_themselves_is_no_part_of_a_tree() {
        let dir = tempfile::tempdir().expect("a directory");
        for own in [".syncshell/x", ".stfolder/x", "a/.syncshell/x"] {
            let path = dir.path().join(own);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, "1234").expect("written");
        }
        assert_eq!(count(dir.path()).expect("counted"), Counts { entries: 3, files: 1, bytes: 4 });
    }

    #[test]
    fn a_file_that_changes_within_its_size_is_read_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("f");
        let mut reader = Reader::default();
        for pause in [Duration::ZERO, 2 * TICK] {
            fs::write(&file, "one").expect("written");
            std::thread::sleep(pause);
            let one = reader.read(dir.path()).expect("read");
            assert_eq!(reader.read(dir.path()).expect("read"), one);
            fs::write(&file, "two").expect("written");
            assert_ne!(reader.read(dir.path()).expect("read"), one);
        }
        assert_eq!(reader.look(&dir.path().join("none")).expect("looked"), None);
    }

    #[test]
    fn a_random_file_has_the_size_asked_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("f");
        make_random_file(&file, (1 << 20) + 5, 3).expect("made");
        assert_eq!(fs::metadata(&file).expect("there").len(), (1 << 20) + 5);
    }

    #[test]
    fn the_sources_of_dependencies_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        copy_sources(&["anyhow"], dir.path()).expect("copied");
        assert!(count(dir.path()).expect("counted").files > 20);
        assert!(copy_sources(&["no-such-crate"], dir.path()).is_err());
    }
}
