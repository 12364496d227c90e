//! `cargo xtask tidy`: what review would ask to change, said by a test and kindly.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::shell;

/// The largest file a clone should carry: above it, a fixture belongs into a generator.
const MAX_FILE_BYTES: usize = 512 * 1024;

/// Folders whose children are named after the crate inside.
const NAMED_AFTER_CRATE: [&str; 3] = ["crates", "servers", "apps"];

/// The page that says what each crate is for.
const ARCHITECTURE: &str = "docs/architecture.md";

// Spelt in two halves, so that this file may be checked like any other.
const HOST_PATHS: [&str; 2] = [concat!("/ro", "ot/"), concat!("/wo", "rk/")];
const UNFINISHED: [&str; 2] = [concat!("to", "do!"), concat!("unimple", "mented!")];
const IGNORED_TEST: &str = concat!("#[ig", "nore");

/// Checks every file git tracks or would track.
pub(crate) fn run(root: &Path) -> Result<()> {
    let files = shell::tracked_files(root)?
        .into_iter()
        .map(|path| {
            let bytes = fs::read(root.join(&path)).with_context(|| format!("cannot read {path}"))?;
            Ok(File { path, bytes })
        })
        .collect::<Result<Vec<_>>>()?;
    let findings = check(&files);
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    ensure!(findings.is_empty(), "{} places to tidy in {} files", findings.len(), files.len());
    println!("tidy: {} files, nothing to mend", files.len());
    Ok(())
}

struct File {
    path: String,
    bytes: Vec<u8>,
}

impl File {
    /// The contents of a text file; none of a binary one.
    fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.bytes).ok()
    }
}

fn check(files: &[File]) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files {
        size(file, &mut findings);
        let Some(text) = file.text() else { continue };
        host_paths(&file.path, text, &mut findings);
        if file.path.ends_with(".rs") {
            rust(&file.path, text, &mut findings);
        }
        if file.path.ends_with(".cargo/config.toml") {
            cargo_config(&file.path, text, &mut findings);
        }
    }
    packages(files, &mut findings);
    findings
}

fn size(file: &File, findings: &mut Vec<String>) {
    if file.bytes.len() > MAX_FILE_BYTES {
        findings.push(format!(
            "{}: {} KiB is more than every clone should carry (at most {}); generate it, or keep a smaller one",
            file.path,
            file.bytes.len().div_ceil(1024),
            MAX_FILE_BYTES / 1024
        ));
    }
}

fn host_paths(path: &str, text: &str, findings: &mut Vec<String>) {
    for (number, line) in numbered(text) {
        for needle in HOST_PATHS {
            if starts_a_path(line, needle) {
                findings
                    .push(format!("{path}:{number}: `{needle}` exists on one machine only; name a path everyone has"));
            }
        }
    }
}

/// Finds `needle` where it is the beginning of an absolute path, so not in `net/work/` of a relative one.
fn starts_a_path(line: &str, needle: &str) -> bool {
    line.match_indices(needle).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "._-~*}".contains(c))
    })
}

fn rust(path: &str, text: &str, findings: &mut Vec<String>) {
    if !has_module_doc(text) {
        findings.push(format!(
            "{path}: begins without `//!`; one line that says what the module is helps whoever opens it"
        ));
    }
    for (number, line) in numbered(text) {
        for needle in UNFINISHED {
            if line.contains(needle) {
                findings.push(format!(
                    "{path}:{number}: `{needle}` panics in front of someone; finish it, or leave the path out"
                ));
            }
        }
        if line.contains(IGNORED_TEST) {
            findings.push(format!(
                "{path}:{number}: nobody runs an ignored test; make it pass, or skip with one line that says why"
            ));
        }
    }
}

/// `//!` comes before any item; blank lines, plain comments and inner attributes may precede it.
fn has_module_doc(text: &str) -> bool {
    let mut in_attribute = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("//!") {
            return true;
        }
        if in_attribute || line.starts_with("#![") {
            in_attribute = !line.ends_with(']');
        } else if !line.is_empty() && (line.starts_with("///") || !line.starts_with("//")) {
            return false;
        }
    }
    false
}

fn cargo_config(path: &str, text: &str, findings: &mut Vec<String>) {
    let config: toml::Table = match toml::from_str(text) {
        Ok(config) => config,
        Err(error) => {
            findings.push(format!("{path}: cargo cannot read it: {}", error.message()));
            return;
        }
    };
    for key in ["source", "registries", "registry"] {
        if config.contains_key(key) {
            findings.push(format!(
                "{path}: `[{key}]` binds every clone to one mirror; keep it in your own home's configuration"
            ));
        }
    }
}

fn packages(files: &[File], findings: &mut Vec<String>) {
    let architecture = files.iter().find(|file| file.path == ARCHITECTURE).and_then(File::text);
    if architecture.is_none() {
        findings.push(format!("{ARCHITECTURE} is missing; it tells a newcomer what each crate is for"));
    }
    for (folder, name) in files.iter().filter_map(package) {
        if let Some((parent, child)) = folder.rsplit_once('/')
            && NAMED_AFTER_CRATE.contains(&parent)
            && child != name
        {
            findings.push(format!(
                "{folder}: holds the crate `{name}`; call the folder {parent}/{name}, so that `ls` tells"
            ));
        }
        if architecture.is_some_and(|text| !text.contains(name.as_str())) {
            findings.push(format!(
                "{ARCHITECTURE}: says nothing of `{name}` ({folder}); a paragraph on what it is for would do"
            ));
        }
    }
}

/// Folder and name of the package a manifest describes; none for other files and the root manifest.
fn package(file: &File) -> Option<(&str, String)> {
    #[derive(Deserialize)]
    struct Manifest {
        package: Option<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
    }
    let folder = file.path.strip_suffix("/Cargo.toml")?;
    // A manifest that cannot be read stops cargo itself long before us.
    let manifest: Manifest = toml::from_str(file.text()?).ok()?;
    Some((folder, manifest.package?.name))
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: impl Into<Vec<u8>>) -> File {
        File { path: path.to_owned(), bytes: text.into() }
    }

    /// The findings of a tree that is in order but for the file given.
    fn findings(path: &str, text: impl Into<Vec<u8>>) -> Vec<String> {
        check(&[
            file(ARCHITECTURE, "`sync-core` decides."),
            file("crates/sync-core/Cargo.toml", "[package]\nname = \"sync-core\""),
            file(path, text),
        ])
    }

    fn one(path: &str, text: impl Into<Vec<u8>>) -> String {
        let mut found = findings(path, text);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn a_tree_in_order_has_no_findings() {
        let text = "//! Says what it is.\n\nfn main() {}\n";
        assert_eq!(findings("crates/sync-core/src/lib.rs", text), [""; 0]);
    }

    #[test]
    fn unfinished_code_is_named_with_its_line() {
        for needle in UNFINISHED {
            let found = one("a.rs", format!("//! A.\nfn f() {{\n    {needle}();\n}}\n"));
            assert!(found.starts_with("a.rs:3: "), "{found}");
            assert!(found.contains("finish it"), "{found}");
        }
        let found = one("a.rs", format!("//! A.\n{IGNORED_TEST} = \"slow\"]\n"));
        assert!(found.contains("nobody runs an ignored test"), "{found}");
    }

    #[test]
    fn paths_of_one_machine_are_found_in_any_text() {
        for path in HOST_PATHS {
            let found = one("docs/guide.md", format!("first\nsee `{path}x`\n"));
            assert!(found.starts_with("docs/guide.md:2: "), "{found}");
            assert_eq!(findings("b.md", format!("see net{path}x")), [""; 0]);
            let mut binary = vec![0xff];
            binary.extend_from_slice(path.as_bytes());
            assert_eq!(findings("b.bin", binary), [""; 0]);
        }
    }

    #[test]
    fn a_mirror_in_the_cargo_configuration_is_found() {
        let text = "[source.crates-io]\nreplace-with = \"mirror\"\n";
        assert!(one(".cargo/config.toml", text).contains("`[source]`"));
        let text = "[alias]\nxtask = \"run\"\n";
        assert_eq!(findings(".cargo/config.toml", text), [""; 0]);
        assert!(one(".cargo/config.toml", "[alias").contains("cannot read"));
    }

    #[test]
    fn large_files_are_found_at_the_limit() {
        assert_eq!(findings("a.bin", vec![0; MAX_FILE_BYTES]), [""; 0]);
        let found = one("a.bin", vec![0; MAX_FILE_BYTES + 1]);
        assert!(found.starts_with("a.bin: 513 KiB"), "{found}");
    }

    #[test]
    fn a_module_says_what_it_is_before_any_item() {
        for (text, passes) in [
            ("//! A.\n", true),
            ("// licence\n\n//! A.\n", true),
            ("#![no_std]\n//! A.\n", true),
            ("#![cfg_attr(\n    test,\n    expect(x)\n)]\n//! A.\n", true),
            ("", false),
            ("fn main() {}\n//! late\n", false),
            ("/// An item's.\nfn main() {}\n", false),
            ("#![no_std]\nfn main() {}\n", false),
        ] {
            let found = findings("a.rs", text);
            assert_eq!(found.is_empty(), passes, "{text:?}: {found:?}");
        }
    }

    #[test]
    fn folders_are_named_after_their_crate_and_described() {
        let manifest = "[package]\nname = \"sync-link\"\n";
        let found = findings("crates/link/Cargo.toml", manifest);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("call the folder crates/sync-link"));
        assert!(found[1].contains("says nothing of `sync-link`"));
        let found = one("testing/link/Cargo.toml", manifest);
        assert!(found.contains("says nothing of `sync-link`"));
    }

    #[test]
    fn a_missing_architecture_page_is_one_finding() {
        let tree = [file("xtask/Cargo.toml", "[package]\nname = \"xtask\"")];
        assert_eq!(check(&tree).len(), 1);
    }
}
