//! `cargo xtask ci`: every check in one run, cheap first.
//!
//! The tests come last and nothing is printed after them, so that a passing run ends with the test runner's own summary.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::shell::{self, cargo, seconds};
use crate::{audit, sim, soak, tidy, wasm};

/// Runs all steps; the first that fails ends the run and is named.
pub(crate) fn run(root: &Path) -> Result<()> {
    step("tidy", || tidy::run(root))?;
    step("fmt", || shell::run(&mut cargo(root, ["fmt", "--all", "--check"])))?;
    step("audit", || {
        audit::fetch(root);
        audit::offline(root)
    })?;
    step("clippy", || {
        shell::run(&mut cargo(root, ["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    step("doc", || {
        let args = ["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"];
        shell::run(cargo(root, args).env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    step("wasm", || wasm::run(root))?;
    // One build of everything: the simulator, the soak, the doc tests and the tests then share its artefacts,
    // where building one package alone would choose other features and compile its dependencies again.
    step("build", || shell::run(&mut cargo(root, ["build", "--locked", "--workspace", "--all-targets"])))?;
    step("sim", || sim::run_built(root))?;
    step("soak", || soak::run_built(root))?;
    step("doc tests", || shell::run(&mut cargo(root, ["test", "--locked", "--workspace", "--doc"])))?;
    last_step("tests", || tests(root))
}

fn tests(root: &Path) -> Result<()> {
    if shell::succeeds(&mut cargo(root, ["nextest", "--version"])) {
        return shell::run(&mut cargo(root, ["nextest", "run", "--locked", "--workspace"]));
    }
    let args = ["test", "--locked", "--workspace", "--lib", "--bins", "--tests", "--examples"];
    shell::run(&mut cargo(root, args))
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    last_step(name, work)?;
    eprintln!("ci: {name} passed in {}", seconds(started.elapsed()));
    Ok(())
}

fn last_step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("ci: {name}");
    let started = Instant::now();
    work().with_context(|| format!("{name} failed after {}", seconds(started.elapsed())))
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_failing_step_is_named_before_its_cause() {
        let error = step("fmt", || bail!("two files differ")).expect_err("the step fails");
        let text = format!("{error:#}");
        assert!(text.starts_with("fmt failed after 0."), "{text}");
        assert!(text.ends_with("two files differ"), "{text}");
    }
}
