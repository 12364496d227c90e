//! Merging two edits of one text.

/// Bytes of a text that is merged: what people write by hand.
pub const MAX_TEXT: usize = 1 << 20;

/// Joins two edits of one text that touch different lines; none where they do not, or where one of the texts is none.
///
/// Which of the two is whose does not matter: every device that merges arrives at the same bytes.
#[must_use]
pub fn merge(base: &[u8], ours: &[u8], theirs: &[u8]) -> Option<String> {
    let [base, ours, theirs] = [text(base)?, text(ours)?, text(theirs)?];
    diffy::merge(base, ours, theirs).ok()
}

fn text(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > MAX_TEXT || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}
