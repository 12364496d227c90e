//! Which folder is meant: by where it is, what it is called, or how its id begins.

use std::path::{Component, Path, PathBuf};

use sync_client::folders::FolderStatus;

use crate::exit::Failure;

/// The folder whose id begins with these digits.
pub(crate) fn by_id<'a>(folders: &'a [FolderStatus], prefix: &str) -> Result<&'a FolderStatus, Failure> {
    let named: Vec<_> = folders.iter().filter(|folder| !prefix.is_empty() && folder.id.starts_with(prefix)).collect();
    only_one(&named, prefix)
}

/// The folder that is here, is called so, holds this path, or whose id begins so; the first of these that fits counts.
pub(crate) fn find<'a>(folders: &'a [FolderStatus], what: &str) -> Result<&'a FolderStatus, Failure> {
    let real = std::fs::canonicalize(what).ok();
    if let Some(found) = folders.iter().find(|folder| real.as_ref().is_some_and(|path| *path == folder.path)) {
        return Ok(found);
    }
    let named: Vec<_> = folders.iter().filter(|folder| folder.name == what).collect();
    if !named.is_empty() {
        return only_one(&named, what);
    }
    match real.and_then(|path| holder(folders, &path)) {
        Some(found) => Ok(found),
        None => by_id(folders, &what.to_ascii_lowercase()),
    }
}

/// The folder that holds a path, whether or not something is there now, and the path below it with slashes.
pub(crate) fn inside<'a>(folders: &'a [FolderStatus], path: &Path) -> Result<(&'a FolderStatus, String), Failure> {
    let none = || {
        let message = format!("{} is in no folder that is synced here; `syncshell folders` lists them", path.display());
        Failure::new("unknown-folder", message)
    };
    let absolute = real(path)?;
    let folder = holder(folders, &absolute).ok_or_else(none)?;
    let below = absolute.strip_prefix(&folder.path).map_err(|_| none())?;
    let names = below.components().map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let names: Option<Vec<_>> = names.collect();
    let names = names.ok_or_else(|| Failure::usage(format!("the path {} is no Unicode text", path.display())))?;
    Ok((folder, names.join("/")))
}

/// The path without links, as far as it exists; a link at its end stays one.
fn real(path: &Path) -> Result<PathBuf, Failure> {
    let failed = || format!("cannot use {}", path.display());
    let absolute = std::path::absolute(path).map_err(Failure::io(failed()))?;
    let mut missing = Vec::new();
    let mut there = absolute.as_path();
    while let (Some(parent), Some(name)) = (there.parent(), there.file_name()) {
        missing.push(name);
        match std::fs::canonicalize(parent) {
            Ok(real) => return Ok(missing.iter().rev().fold(real, |path, name| path.join(name))),
            Err(_) => there = parent,
        }
    }
    std::fs::canonicalize(&absolute).map_err(Failure::io(failed()))
}

fn holder<'a>(folders: &'a [FolderStatus], path: &Path) -> Option<&'a FolderStatus> {
    folders.iter().find(|folder| path.starts_with(&folder.path))
}

fn only_one<'a>(named: &[&'a FolderStatus], what: &str) -> Result<&'a FolderStatus, Failure> {
    match named[..] {
        [folder] => Ok(folder),
        [] => {
            let message = format!("no folder {what} is synced here; `syncshell folders` lists those that are");
            Err(Failure::new("unknown-folder", message))
        }
        _ => {
            let message = format!("{} folders are called {what}; name its path, or more digits of its id", named.len());
            Err(Failure::new("several-folders", message))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sync_client::folders::{Direction, FolderState, Watching};

    use super::*;

    /// A folder in which nothing happens.
    pub(crate) fn folder(id: &str, name: &str, path: &Path) -> FolderStatus {
        FolderStatus {
            id: id.to_owned(),
            group: "ab".repeat(32),
            name: name.to_owned(),
            path: path.to_owned(),
            direction: Direction::Both,
            state: FolderState::UpToDate,
            problem: None,
            watching: Watching::Events,
            unwatched: None,
            files: 0,
            bytes: 0,
            pending_files: 0,
            pending_bytes: 0,
            selected: Vec::new(),
            left_out_files: 0,
            left_out_bytes: 0,
            scanned_files: 0,
            scan_ms: None,
            fetched_bytes: 0,
            served_bytes: 0,
            reused_bytes: 0,
            problems: Vec::new(),
            conflicts: Vec::new(),
        }
    }

    #[test]
    fn a_folder_is_found_by_path_name_and_id() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path().canonicalize().expect("there");
        for path in ["one/deep", "two", "elsewhere"] {
            std::fs::create_dir_all(root.join(path)).expect("made");
        }
        let folders = [
            folder("aa11", "photos", &root.join("one")),
            folder("aa22", "notes", &root.join("two")),
            folder("bb33", "notes", &root.join("three")),
        ];
        let find = |what: &str| super::find(&folders, what).map(|found| found.id.clone());
        let code = |what: &str| find(what).map_err(|failure| failure.code.into_owned());
        let path = |below: &str| root.join(below).to_string_lossy().into_owned();
        for (what, expected) in [
            (path("one"), Ok("aa11")),
            (path("one/deep"), Ok("aa11")),
            (path("one/../two"), Ok("aa22")),
            (path("elsewhere"), Err("unknown-folder")),
            (path("one/missing"), Err("unknown-folder")),
            ("photos".to_owned(), Ok("aa11")),
            ("notes".to_owned(), Err("several-folders")),
            ("bb".to_owned(), Ok("bb33")),
            ("AA2".to_owned(), Ok("aa22")),
            ("aa".to_owned(), Err("several-folders")),
            (String::new(), Err("unknown-folder")),
        ] {
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(code(&what), expected, "{what:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_path_below_a_folder_is_told_whether_or_not_it_exists() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path().canonicalize().expect("there");
        std::fs::create_dir_all(root.join("one/deep")).expect("made");
        std::os::unix::fs::symlink("/etc/passwd", root.join("one/link")).expect("made");
        std::os::unix::fs::symlink(root.join("one"), root.join("way")).expect("made");
        let folders = [folder("aa", "one", &root.join("one"))];
        let below =
            |path: &str| inside(&folders, &root.join(path)).map(|(_, below)| below).map_err(|failure| failure.code);
        for (path, expected) in [
            ("one/deep/x.txt", Ok("deep/x.txt")),
            ("one/gone/there/x.txt", Ok("gone/there/x.txt")),
            ("one/link", Ok("link")),
            ("way/x", Ok("x")),
            ("one", Ok("")),
            ("other/x", Err("unknown-folder")),
        ] {
            assert_eq!(below(path).as_deref().map_err(|code| &**code), expected, "{path}");
        }
    }
}
