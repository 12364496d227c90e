//! `syncshell pull`: reads the group's blobs in the order in which they arrived here.

use serde::Serialize;

use crate::api::{Blob, PAGE_BLOBS};
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::follow::Follow;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal;

/// Read what was pushed in the group, in the order in which it arrived here
///
/// Writes the bytes exactly as they were pushed. Only a blob of text that does not end its last
/// line gets a newline, so that each begins on a line of its own; --raw leaves that out too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Begin after this cursor, as push and pull print it
    #[arg(long, value_name = "N", default_value_t = 0)]
    after_cursor: u64,

    /// End after so many blobs
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Go on with what is to come, and serve the home meanwhile
    #[arg(long)]
    follow: bool,

    /// Write the bytes of each blob and nothing else
    #[arg(long, conflicts_with_all = ["null", "json"])]
    raw: bool,

    /// Write a NUL byte after each blob, and nothing else besides its bytes
    #[arg(short = '0', long, conflicts_with = "json")]
    null: bool,
}

/// A blob for programs: `text` is there where the bytes are UTF-8.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    blob: &'a Blob,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
}

/// The last line for programs.
#[derive(Serialize)]
struct End {
    max_cursor: u64,
    has_more: bool,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let mode = if self.follow { Mode::Serve } else { Mode::Offline };
        let backend = stop.or(Backend::open(global, mode)).await?;
        let result = tokio::select! {
            result = self.pull(&backend, global.group(), out) => result,
            () = stop.requested() => Ok(()),
            () = backend.quit() => Ok(()),
        };
        backend.close().await;
        result
    }

    async fn pull(&self, backend: &Backend, group: &str, out: Output) -> Result<(), Failure> {
        let mut left = self.limit.unwrap_or(usize::MAX);
        let mut last = self.after_cursor;
        let mut reader = Follow::new(backend, group, self.after_cursor, self.follow).await?;
        while left > 0 {
            let Some(blob) = reader.next(left.min(PAGE_BLOBS)).await? else { break };
            last = blob.cursor;
            left -= 1;
            self.write(&blob, out)?;
        }

        // what was not asked for is still to come
        let has_more = left == 0 && self.limit != Some(0) && reader.has_more();
        let max_cursor = if left == 0 { last } else { reader.max_cursor().max(last) };
        out.object(&End { max_cursor, has_more })?;
        out.note(format!("up to cursor {max_cursor}{}", if has_more { "; there is more" } else { "" }));
        Ok(())
    }

    fn write(&self, blob: &Blob, out: Output) -> Result<(), Failure> {
        let text = std::str::from_utf8(&blob.bytes).ok();
        if out.is_json() {
            return out.object(&Line { blob, text });
        }
        if self.raw {
            return out.bytes(&blob.bytes);
        }
        if self.null {
            return out.bytes(&[&blob.bytes[..], b"\0"].concat());
        }
        let is_text = text.is_some_and(is_text);
        if terminal::sees_output() {
            out.note(format!("[{} from {}]", blob.cursor, blob.sender.get(..8).unwrap_or(&blob.sender)));
            if !is_text {
                let (length, before) = (blob.bytes.len(), blob.cursor - 1);
                let how = format!("syncshell pull --after-cursor {before} --limit 1 --raw > FILE");
                return out.text(format!("({length} bytes that are no text; `{how}` writes them)"));
            }
        }
        if is_text && !blob.bytes.ends_with(b"\n") {
            return out.bytes(&[&blob.bytes[..], b"\n"].concat());
        }
        out.bytes(&blob.bytes)
    }
}

/// Whether a terminal shows it and does nothing else with it.
fn is_text(text: &str) -> bool {
    text.chars().all(|c| matches!(c, '\t' | '\r' | '\n') || !c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_control_a_terminal_is_no_text() {
        for (text, expected) in [
            ("", true),
            ("one\r\ntwo\tthree", true),
            ("ä€🙂", true),
            ("\0", false),
            ("\x1b[2J", false),
            ("\u{9b}2J", false),
            ("\x7f", false),
        ] {
            assert_eq!(is_text(text), expected, "{text:?}");
        }
    }
}
