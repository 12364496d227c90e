//! `cargo xtask wasm`: the pure crates compile for the browser, or one line says what is missing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::shell::{self, cargo};

/// The target of a browser without a system interface: no clock, no randomness, no files.
const TARGET: &str = "wasm32-unknown-unknown";

/// Compiles the pure crates in one call, so that their features are those the browser gets.
pub(crate) fn run(root: &Path) -> Result<()> {
    if !has_target(root)? {
        println!(
            "wasm: not compiled, this toolchain lacks the target: \
             `rustup target add {TARGET}` installs it"
        );
        return Ok(());
    }
    let args = [
        "build",
        "--locked",
        "--target",
        TARGET,
        "--package",
        "sync-types",
        "--package",
        "sync-crypto",
        "--package",
        "sync-core",
    ];
    shell::run(&mut cargo(root, args))?;
    println!("wasm: sync-types, sync-crypto and sync-core compile for {TARGET}");
    Ok(())
}

/// Asks the compiler itself, which also finds a target that another installer than rustup brought.
fn has_target(root: &Path) -> Result<bool> {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(root).args(["--print", "target-libdir", "--target", TARGET]);
    let printed = shell::output(&mut rustc)?;
    Ok(PathBuf::from(String::from_utf8_lossy(&printed).trim()).is_dir())
}
