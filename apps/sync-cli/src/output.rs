//! What a command writes: text for people or JSON for programs, never both.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use crate::exit::Failure;

/// Where a command writes to, and in which of the two forms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether this is for programs.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// One result, on standard output: the text, or the object on a line of its own.
    pub(crate) fn result(self, text: impl Display, object: &impl Serialize) -> Result<(), Failure> {
        if self.json { self.object(object) } else { write(|out| writeln!(out, "{text}")) }
    }

    /// One object on a line of its own; nothing in text.
    pub(crate) fn object(self, object: &impl Serialize) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        let line = serde_json::to_string(object).map_err(|error| Failure::new("io", error.to_string()))?;
        write(|out| writeln!(out, "{line}"))
    }

    /// Text on standard output; nothing in JSON.
    pub(crate) fn text(self, text: impl Display) -> Result<(), Failure> {
        if self.json { Ok(()) } else { write(|out| writeln!(out, "{text}")) }
    }

    /// Bytes on standard output exactly as they are.
    pub(crate) fn bytes(self, bytes: &[u8]) -> Result<(), Failure> {
        write(|out| out.write_all(bytes))
    }

    /// What a person may want to know beside the result, on standard error; nothing in JSON.
    pub(crate) fn note(self, text: impl Display) {
        if !self.json {
            complain(&text.to_string());
        }
    }

    /// What a person should know, on standard error in either form.
    pub(crate) fn warn(self, text: impl Display) {
        if self.json {
            complain(&serde_json::json!({ "warning": text.to_string() }).to_string());
        } else {
            complain(&format!("warning: {text}"));
        }
    }

    /// Why the command failed, on standard error in either form.
    pub(crate) fn failure(self, failure: &Failure) {
        if self.json {
            complain(&serde_json::json!({ "error": failure }).to_string());
            return;
        }
        complain(&format!("error: {failure}"));
        if let Some(hint) = failure.kind().hint {
            complain(&format!("hint: {hint}"));
        }
    }
}

/// Failing because nobody reads any more is no failure: `syncshell pull | head` ends well.
pub(crate) const OUTPUT_CLOSED: &str = "output-closed";

fn write(write: impl FnOnce(&mut io::StdoutLock<'static>) -> io::Result<()>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write(&mut out).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::new(OUTPUT_CLOSED, "nobody reads the output"),
        _ => Failure::io("cannot write to standard output")(error),
    })
}

fn complain(line: &str) {
    // where standard error is closed there is nobody left to tell
    let _ = writeln!(io::stderr().lock(), "{line}");
}
