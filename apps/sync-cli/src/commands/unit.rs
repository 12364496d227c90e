//! `syncshell unit`: has systemd serve a home.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;

/// The unit as it is in the repository.
const UNIT: &str = include_str!("../../../../contrib/syncshell.service");

/// Name of the unit's file.
const NAME: &str = "syncshell.service";

/// Show the unit by which systemd keeps this home in sync from login on, or install it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write it to where systemd looks for this user's units
    #[arg(long)]
    install: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    unit: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    installed: Option<&'a Path>,
}

impl Args {
    pub(crate) fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let program = std::env::current_exe().map_err(Failure::io("cannot find this program"))?;
        let mut words = vec![program.into_os_string(), "--home".into(), global.home()?.into_os_string()];
        words.extend(global.forwarded()?);
        words.push("run".into());
        let words: Option<Vec<_>> = words.iter().map(|word| word.to_str().map(quoted)).collect();
        let words = words.ok_or_else(|| Failure::usage("a path that is no Unicode text cannot be put into a unit"))?;
        let unit = with_command(&words.join(" "));
        if !self.install {
            return out.result(unit.trim_end(), &Shown { unit: &unit, installed: None });
        }
        let path = directory()?.join(NAME);
        install(&path, &unit)?;
        out.result(format!("wrote {}", path.display()), &Shown { unit: &unit, installed: Some(&path) })?;
        out.note("start it:           systemctl --user daemon-reload && systemctl --user enable --now syncshell");
        out.note("also without login: loginctl enable-linger");
        Ok(())
    }
}

fn with_command(command: &str) -> String {
    let lines = UNIT.lines().map(|line| match line.split_once('=') {
        Some(("ExecStart", _)) => format!("ExecStart={command}\n"),
        _ => format!("{line}\n"),
    });
    lines.collect()
}

/// A word as systemd reads it back: its specifiers, variables and escapes are taken as they are written.
fn quoted(word: &str) -> String {
    let escaped =
        word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$").replace('\n', "\\n");
    format!("\"{escaped}\"")
}

/// Where systemd looks for units of this user.
fn directory() -> Result<PathBuf, Failure> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")));
    let missing = || Failure::usage("neither XDG_CONFIG_HOME nor HOME names a directory; write the unit yourself");
    Ok(config.ok_or_else(missing)?.join("systemd").join("user"))
}

fn install(path: &Path, unit: &str) -> Result<(), Failure> {
    let failed = || format!("cannot write {}", path.display());
    match std::fs::read_to_string(path) {
        Ok(there) if there == unit => return Ok(()),
        Ok(_) => {
            return Err(Failure::new(
                "exists",
                format!("{} is there and says something else; remove it first", path.display()),
            ));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Failure::io(failed())(error)),
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(Failure::io(failed()))?;
    }
    std::fs::write(path, unit).map_err(Failure::io(failed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_starts_the_program_that_printed_it() {
        let unit = with_command("\"/usr/bin/syncshell\" \"run\"");
        assert_eq!(unit.lines().filter(|line| line.starts_with("ExecStart=")).count(), 1);
        assert!(unit.contains("ExecStart=\"/usr/bin/syncshell\" \"run\"\n"), "{unit}");
        assert_eq!(unit.lines().count(), UNIT.lines().count());
    }

    #[test]
    fn a_word_in_a_unit_means_itself() {
        for (word, expected) in [("/home/a b", "\"/home/a b\""), ("100%", "\"100%%\""), ("$x\"\\", "\"$$x\\\"\\\\\"")] {
            assert_eq!(quoted(word), expected);
        }
    }
}
