//! `cargo xtask audit`: what we depend on is licensed as we can use it, not banned, and from one registry.
//!
//! This much works offline from `deny.toml` and `cargo metadata`.
//! Advisories come on top where cargo-deny is installed and their database can be fetched.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use crate::shell::{self, cargo};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what needs no network: licences, bans, sources
    #[arg(long)]
    offline: bool,
}

/// Runs the offline checks and, unless told otherwise, the advisories.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    if args.offline {
        return offline(root);
    }
    fetch(root);
    offline(root)?;
    advisories(root)
}

/// Checks licences, bans and sources of every dependency of every platform.
pub(crate) fn offline(root: &Path) -> Result<()> {
    let policy = fs::read_to_string(root.join("deny.toml")).context("cannot read deny.toml")?;
    let policy = Policy::parse(&policy)?;
    let graph = graph(root)?;
    let findings = check(&graph, &policy);
    for finding in &findings {
        eprintln!("audit: {finding}");
    }
    ensure!(
        findings.is_empty(),
        "{} of the dependencies' {} crates cannot stay as they are; \
         `cargo tree --workspace --target all --invert NAME` shows who asks for one",
        findings.len(),
        graph.packages.len()
    );
    println!("audit: {} crates, licences, bans and sources in order", graph.packages.len());
    Ok(())
}

/// Brings the crates of all platforms into cargo's cache; where it cannot, [`offline`] checks what is there.
pub(crate) fn fetch(root: &Path) {
    shell::succeeds(&mut cargo(root, ["fetch", "--locked"]));
}

fn advisories(root: &Path) -> Result<()> {
    if !shell::succeeds(&mut cargo(root, ["deny", "--version"])) {
        println!(
            "audit: advisories not checked, cargo-deny is missing: \
             `cargo install --locked cargo-deny` installs it"
        );
        return Ok(());
    }
    if !shell::succeeds(&mut cargo(root, ["deny", "fetch", "db"])) {
        println!("audit: advisories not checked, their database cannot be fetched from here");
        return Ok(());
    }
    shell::run(&mut cargo(root, ["deny", "--offline", "check", "advisories"]))
}

/// The dependency graph from the lock file; without the other platforms' crates where the cache lacks them.
fn graph(root: &Path) -> Result<Graph> {
    const METADATA: [&str; 5] = ["metadata", "--format-version", "1", "--offline", "--locked"];
    let json = match shell::output(&mut cargo(root, METADATA)) {
        Ok(json) => json,
        Err(all_platforms) => {
            let host = host(root)?;
            let mut command = cargo(root, METADATA);
            command.args(["--filter-platform", &host]);
            // The first error is the more telling one: it also names a stale lock file.
            let json = shell::output(&mut command).map_err(|_| all_platforms)?;
            println!("audit: crates of other platforms are not in cargo's cache: checking {host}");
            json
        }
    };
    serde_json::from_slice(&json).context("cargo metadata printed something unexpected")
}

fn host(root: &Path) -> Result<String> {
    let printed = shell::output(&mut cargo(root, ["--version", "--verbose"]))?;
    let printed = String::from_utf8_lossy(&printed);
    let host = printed.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("cargo does not name its host")?.to_owned())
}

/// What we read of `cargo metadata`.
#[derive(Deserialize)]
struct Graph {
    packages: Vec<Package>,
    workspace_members: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// What we read of `deny.toml`; cargo-deny reads the same lines.
#[derive(Debug)]
struct Policy {
    allow: Vec<Licensee>,
    exceptions: BTreeMap<String, Vec<Licensee>>,
    bans: BTreeMap<String, String>,
}

impl Policy {
    fn parse(text: &str) -> Result<Self> {
        let file: DenyFile = toml::from_str(text).context("cannot understand deny.toml")?;
        let mut policy =
            Self { allow: licensees(&file.licenses.allow)?, exceptions: BTreeMap::new(), bans: BTreeMap::new() };
        for exception in file.licenses.exceptions {
            let allow = licensees(&exception.allow)?;
            policy.exceptions.insert(plain_name(exception.name)?, allow);
        }
        for ban in file.bans.deny {
            policy.bans.insert(plain_name(ban.name)?, ban.reason);
        }
        Ok(policy)
    }

    fn allows(&self, name: &str, expression: &Expression) -> bool {
        let exceptions = self.exceptions.get(name).map_or(&[][..], Vec::as_slice);
        expression.evaluate(|required| self.allow.iter().chain(exceptions).any(|allowed| allowed.satisfies(required)))
    }
}

#[derive(Deserialize)]
struct DenyFile {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    #[serde(default)]
    exceptions: Vec<Exception>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

// A field we do not know, such as `wrappers`, would change what the ban means: refuse it rather than ignore it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

fn licensees(names: &[String]) -> Result<Vec<Licensee>> {
    names
        .iter()
        .map(|name| Licensee::parse(name).with_context(|| format!("deny.toml allows `{name}`, no SPDX id")))
        .collect()
}

fn plain_name(name: String) -> Result<String> {
    if name.contains(['@', ':']) {
        bail!("deny.toml names `{name}`; this check reads crate names without versions");
    }
    Ok(name)
}

/// One line per crate that cannot stay, in the graph's order.
fn check(graph: &Graph, policy: &Policy) -> Vec<String> {
    let mut findings = Vec::new();
    let mut registries = BTreeSet::new();
    for package in &graph.packages {
        let name = format!("{} {}", package.name, package.version);
        if let Some(reason) = policy.bans.get(&package.name) {
            findings.push(format!("{name} is banned: {reason}"));
        }
        findings.extend(license_finding(package, policy).map(|finding| format!("{name} {finding}")));
        match &package.source {
            None if graph.workspace_members.contains(&package.id) => {}
            None => findings.push(format!("{name} comes from a path outside the workspace; nobody else has it")),
            Some(source) if source.starts_with("git+") => {
                findings.push(format!("{name} comes from a git repository; depend on a published version"))
            }
            Some(registry) => {
                registries.insert(registry);
            }
        }
    }
    if registries.len() > 1 {
        findings.push(format!("crates come from several registries: {registries:?}"));
    }
    findings
}

fn license_finding(package: &Package, policy: &Policy) -> Option<String> {
    let Some(license) = &package.license else {
        return Some("states no licence; ask its authors, or do without it".to_owned());
    };
    // Lax: crates of old still write `MIT/Apache-2.0`.
    match Expression::parse_mode(license, ParseMode::LAX) {
        Ok(expression) if policy.allows(&package.name, &expression) => None,
        Ok(_) => Some(format!(
            "is under `{license}`, which deny.toml does not allow; \
             choose another crate, or allow the licence there and say why"
        )),
        Err(error) => Some(format!("has a licence we cannot read, `{license}`: {}", error.reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTRY: &str = "registry+index";

    fn policy() -> Policy {
        let text = r#"
            [licenses]
            allow = ["MIT", "Apache-2.0", "BSD-3-Clause"]
            exceptions = [{ crate = "lone", allow = ["MPL-2.0"] }]
            [bans]
            deny = [{ crate = "openssl-sys", reason = "we speak rustls" }]
        "#;
        Policy::parse(text).expect("a policy")
    }

    fn package(name: &str, license: Option<&str>, source: Option<&str>) -> Package {
        Package {
            id: format!("{name}#1.0.0"),
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            license: license.map(str::to_owned),
            source: source.map(str::to_owned),
        }
    }

    fn findings(packages: Vec<Package>) -> Vec<String> {
        let graph = Graph { packages, workspace_members: BTreeSet::from(["ours#1.0.0".to_owned()]) };
        check(&graph, &policy())
    }

    #[test]
    fn licences_are_judged_as_expressions() {
        for (name, license, passes) in [
            ("a", "MIT", true),
            ("a", "GPL-3.0-only OR MIT", true),
            ("a", "MIT/Apache-2.0", true),
            ("a", "(MIT OR GPL-3.0-only) AND BSD-3-Clause", true),
            ("a", "MIT AND GPL-3.0-only", false),
            ("a", "GPL-3.0-only", false),
            ("a", "MPL-2.0", false),
            ("lone", "MPL-2.0", true),
            ("lone", "GPL-3.0-only", false),
            ("a", "My own words", false),
            ("a", "", false),
        ] {
            let found = findings(vec![package(name, Some(license), Some(REGISTRY))]);
            assert_eq!(found.is_empty(), passes, "{name} under {license}: {found:?}");
        }
        let found = findings(vec![package("a", None, Some(REGISTRY))]);
        assert_eq!(found, ["a 1.0.0 states no licence; ask its authors, or do without it"]);
    }

    #[test]
    fn a_banned_crate_is_named_with_the_reason() {
        let found = findings(vec![package("openssl-sys", Some("MIT"), Some(REGISTRY))]);
        assert_eq!(found, ["openssl-sys 1.0.0 is banned: we speak rustls"]);
    }

    #[test]
    fn sources_are_the_workspace_and_one_registry() {
        let ours = package("ours", Some("MIT"), None);
        let theirs = package("theirs", Some("MIT"), Some(REGISTRY));
        assert!(findings(vec![ours, theirs]).is_empty());

        let path = findings(vec![package("stray", Some("MIT"), None)]);
        assert!(path[0].contains("a path outside"), "{path:?}");
        let git = findings(vec![package("stray", Some("MIT"), Some("git+repo#1"))]);
        assert!(git[0].contains("a git repository"), "{git:?}");
        let two = findings(vec![
            package("a", Some("MIT"), Some(REGISTRY)),
            package("b", Some("MIT"), Some("registry+other")),
        ]);
        assert!(two[0].contains("several registries"), "{two:?}");
    }

    #[test]
    fn a_policy_we_would_misread_is_refused() {
        for (text, says) in [
            ("[licenses]\nallow = [\"MITT\"]\n[bans]\ndeny = []", "no SPDX id"),
            ("[licenses]\nallow = []\n[bans]\ndeny = [{ crate = \"a@1\", reason = \"\" }]", "without versions"),
            (
                "[licenses]\nallow = []\n[bans]\ndeny = [{ crate = \"a\", reason = \"\", wrappers = [] }]",
                "unknown field",
            ),
            ("[bans]\ndeny = []", "missing field `licenses`"),
        ] {
            let error = Policy::parse(text).expect_err(text);
            assert!(format!("{error:#}").contains(says), "{error:#}");
        }
    }

    #[test]
    fn the_repository_s_own_policy_is_read() {
        let text = fs::read_to_string(shell::root().join("deny.toml")).expect("deny.toml");
        let policy = Policy::parse(&text).expect("a policy");
        assert!(policy.bans.contains_key("openssl-sys"));
    }
}
