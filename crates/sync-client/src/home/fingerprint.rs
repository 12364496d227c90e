//! What a copy of a home changes.
//!
//! Two copies of one database would both number the feed's next entry alike.
//! So a database remembers the fingerprint of its own place; where it differs from the present one, the file was
//! copied, moved or restored, and whoever opens it starts a new author key before writing.
//! Starting one in vain costs a membership entry; missing a copy costs a fork.

use std::fs::{self, Metadata};
use std::io;
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Sets this hash apart from every other use of BLAKE3.
const CONTEXT: &str = "syncshell v1 home fingerprint";

/// Hash of machine, path, file number and birth time of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Computes the fingerprint of the database at `db_path`, which must exist.
    pub fn of(db_path: &Path) -> io::Result<Self> {
        let path = db_path.canonicalize()?;
        let metadata = fs::metadata(&path)?;
        // a system without a machine id is compared by the rest
        let machine = machine_uid::get().unwrap_or_default();
        Ok(Self::derive(&Place {
            machine: &machine,
            path: &path.to_string_lossy(),
            file: file_number(&path, &metadata)?,
            born: born(&metadata),
        }))
    }

    /// The bytes to store.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A fingerprint that was stored.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    fn derive(place: &Place<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        for field in [place.machine.as_bytes(), place.path.as_bytes(), &place.file, &place.born] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// What goes into a fingerprint; a field this system does not have is empty.
struct Place<'a> {
    machine: &'a str,
    path: &'a str,
    file: Vec<u8>,
    born: Vec<u8>,
}

/// Number of the file on its file system; that of the device changes with every restart and is left out.
#[cfg(unix)]
fn file_number(_: &Path, metadata: &Metadata) -> io::Result<Vec<u8>> {
    Ok(std::os::unix::fs::MetadataExt::ino(metadata).to_le_bytes().to_vec())
}

/// Number of the file on its file system.
#[cfg(windows)]
fn file_number(path: &Path, _: &Metadata) -> io::Result<Vec<u8>> {
    Ok(match file_id::get_file_id(path)? {
        file_id::FileId::Inode { inode_number, .. } => inode_number.to_le_bytes().to_vec(),
        file_id::FileId::LowRes { file_index, .. } => file_index.to_le_bytes().to_vec(),
        file_id::FileId::HighRes { file_id, .. } => file_id.to_le_bytes().to_vec(),
    })
}

/// Number of the file on its file system, which this system does not tell.
#[cfg(not(any(unix, windows)))]
fn file_number(_: &Path, _: &Metadata) -> io::Result<Vec<u8>> {
    Ok(Vec::new())
}

fn born(metadata: &Metadata) -> Vec<u8> {
    metadata
        .created()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map(|since| since.as_nanos().to_le_bytes().to_vec())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_to_a_database_or_reaching_it_another_way_keeps_its_fingerprint() {
        let dir = tempfile::tempdir().expect("a directory");
        let db = dir.path().join("sync.db");
        fs::write(&db, b"one").expect("written");
        let before = Fingerprint::of(&db).expect("there");

        fs::OpenOptions::new()
            .append(true)
            .open(&db)
            .and_then(|mut f| io::Write::write_all(&mut f, b"two"))
            .expect("ok");
        assert_eq!(Fingerprint::of(&db).expect("there"), before);
        assert_eq!(Fingerprint::of(&dir.path().join(".").join("sync.db")).expect("there"), before);
        assert_eq!(Fingerprint::from_bytes(*before.as_bytes()), before);
    }

    #[test]
    fn a_copy_a_move_and_a_restore_each_change_the_fingerprint() {
        let dir = tempfile::tempdir().expect("a directory");
        let db = dir.path().join("sync.db");
        fs::write(&db, b"one").expect("written");
        let before = Fingerprint::of(&db).expect("there");

        let copy = dir.path().join("copy.db");
        fs::copy(&db, &copy).expect("copied");
        assert_ne!(Fingerprint::of(&copy).expect("there"), before);

        let moved = dir.path().join("moved.db");
        fs::rename(&db, &moved).expect("moved");
        assert_ne!(Fingerprint::of(&moved).expect("there"), before);

        // the moved file keeps its number, so the restored one has another
        fs::copy(&copy, &db).expect("restored");
        assert_ne!(Fingerprint::of(&db).expect("there"), before);
    }

    #[test]
    fn every_field_counts_and_none_runs_into_the_next() {
        let of = |machine: &str, path: &str, file: &[u8], born: &[u8]| {
            Fingerprint::derive(&Place { machine, path, file: file.to_vec(), born: born.to_vec() })
        };
        let all = [
            of("m", "p", b"f", b"b"),
            of("n", "p", b"f", b"b"),
            of("m", "q", b"f", b"b"),
            of("m", "p", b"g", b"b"),
            of("m", "p", b"f", b"c"),
            of("", "mp", b"f", b"b"),
            of("mp", "", b"f", b"b"),
            of("m", "p", b"fb", b""),
            of("m", "p", b"", b"fb"),
        ];
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert_ne!(a, b);
            }
        }
    }

    #[test]
    fn a_database_that_is_not_there_has_no_fingerprint() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = Fingerprint::of(&dir.path().join("sync.db")).expect_err("not there");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
