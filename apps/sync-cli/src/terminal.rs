//! The person at the terminal: whether there is one, what they are asked, and what they are shown.

use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};

use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
use sync_client::home::Prompt;
use zeroize::Zeroizing;

/// Bytes read of the answer to a question.
const MAX_ANSWER: u64 = 64;

/// Whether a person can be asked something.
pub(crate) fn is_there() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Whether a person sees what is written to standard output.
pub(crate) fn sees_output() -> bool {
    io::stdout().is_terminal()
}

/// Whether a person sees what is written to standard error.
pub(crate) fn sees_notes() -> bool {
    io::stderr().is_terminal()
}

/// Asks something that only an explicit yes agrees to.
pub(crate) fn agrees(question: &str) -> io::Result<bool> {
    write!(io::stderr(), "{question} [y/N] ")?;
    let mut answer = String::new();
    io::stdin().lock().take(MAX_ANSWER).read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// Asks for the passphrase of a home, twice for a new one.
pub(crate) fn ask_passphrase(prompt: Prompt) -> io::Result<Zeroizing<String>> {
    match prompt {
        Prompt::Enter => ask_secret("Passphrase of this home: "),
        Prompt::Choose => ask_twice("Choose a passphrase for this home: "),
    }
}

/// Asks for something nobody should read over a shoulder, and again until both are the same.
pub(crate) fn ask_twice(prompt: &str) -> io::Result<Zeroizing<String>> {
    loop {
        let first = ask_secret(prompt)?;
        if first.is_empty() || *first == *ask_secret("The same again: ")? {
            return Ok(first);
        }
        writeln!(io::stderr(), "These were not the same.")?;
    }
}

/// Asks for something nobody should read over a shoulder.
pub(crate) fn ask_secret(prompt: &str) -> io::Result<Zeroizing<String>> {
    rpassword::prompt_password(prompt).map(Zeroizing::new)
}

/// Draws a QR code with two pixels in one character; none for text too long for one.
pub(crate) fn qr(text: &str) -> Option<String> {
    let code = QrCode::with_error_correction_level(text, EcLevel::L).ok()?;
    // most terminals are dark, where the full block is the light colour; readers take either
    Some(code.render::<Dense1x2>().dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build())
}

/// Text of someone else, without what would move the cursor or change colours.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if is_shown(c) { c } else { '\u{fffd}' }).collect()
}

/// Whether a terminal shows a character and does nothing else with it.
fn is_shown(c: char) -> bool {
    // the bidirectional controls reorder what stands around them
    !c.is_control() && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_cannot_control_the_terminal() {
        assert_eq!(clean("Änne 1"), "Änne 1");
        assert_eq!(clean("a\x1b[2Jb\nc\u{202e}d"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d");
    }

    #[test]
    fn a_qr_code_is_a_square_of_half_blocks() {
        let drawn = qr("syncshell://join#AAAA").expect("short");
        let lines: Vec<_> = drawn.lines().collect();
        let width = lines[0].chars().count();
        assert_eq!(lines.len(), width.div_ceil(2));
        assert!(lines.iter().all(|line| line.chars().count() == width));
        assert_eq!(qr(&"x".repeat(4000)), None);
    }
}
