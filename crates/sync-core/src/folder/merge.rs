//! Merging two edits of one text.

use std::collections::HashMap;

/// Bytes of a text that is merged: what people write by hand.
pub const MAX_TEXT: usize = 1 << 20;
/// Lines of a text that is merged; comparing takes time that grows with lines times differences.
const MAX_LINES: usize = 50_000;
/// Lines in which an edit may differ from its base, those that went and those that came: an edit that changed more was
/// a new text, and comparing it could take minutes.
const MAX_EDITS: usize = 2_000;

/// Joins two edits of one text that touch different lines; none where they do not, or where one of the texts is none.
///
/// Which of the two is whose does not matter: every device that merges arrives at the same bytes.
#[must_use]
pub fn merge(base: &[u8], ours: &[u8], theirs: &[u8]) -> Option<String> {
    let [base, ours, theirs] = [text(base)?, text(ours)?, text(theirs)?];
    let mut numbers = HashMap::new();
    let lines = numbered(base, &mut numbers)?;
    for edit in [ours, theirs] {
        if !is_near(&lines, &numbered(edit, &mut numbers)?) {
            return None;
        }
    }
    diffy::merge(base, ours, theirs).ok()
}

fn text(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > MAX_TEXT || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// A number for each line, equal for equal lines.
fn numbered<'a>(text: &'a str, numbers: &mut HashMap<&'a str, usize>) -> Option<Vec<usize>> {
    let mut lines = Vec::new();
    for line in text.split_inclusive('\n') {
        if lines.len() == MAX_LINES {
            return None;
        }
        let next = numbers.len();
        lines.push(*numbers.entry(line).or_insert(next));
    }
    Some(lines)
}

/// Whether one text becomes the other by at most [`MAX_EDITS`] lines that go or come: the first algorithm of Myers,
/// "An O(ND) difference algorithm and its variations" (1986), which gives up there. The library has no such end.
fn is_near(base: &[usize], edit: &[usize]) -> bool {
    // `furthest[diagonal]` is how far along `base` that many edits lead on the diagonal `MAX_EDITS + base - edit`
    let mut furthest = vec![0usize; 2 * MAX_EDITS + 2];
    for edits in 0..=MAX_EDITS {
        let (lowest, highest) = (MAX_EDITS - edits, MAX_EDITS + edits);
        for diagonal in (lowest..=highest).step_by(2) {
            let comes = diagonal == lowest || (diagonal != highest && furthest[diagonal - 1] < furthest[diagonal + 1]);
            let mut at = if comes { furthest[diagonal + 1] } else { furthest[diagonal - 1] + 1 };
            while let Some(line) = base.get(at)
                && edit.get(at + MAX_EDITS - diagonal) == Some(line)
            {
                at += 1;
            }
            if at >= base.len() && at + MAX_EDITS - diagonal >= edit.len() {
                return true;
            }
            furthest[diagonal] = at;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn merged(base: &str, ours: &str, theirs: &str) -> Option<String> {
        merge(base.as_bytes(), ours.as_bytes(), theirs.as_bytes())
    }

    #[test]
    fn edits_of_different_lines_are_joined() {
        let base = "one\ntwo\nthree\nfour\nfive\n";
        let joined = merged(base, "ONE\ntwo\nthree\nfour\nfive\n", "one\ntwo\nthree\nfour\nfive\nsix\n");
        assert_eq!(joined.as_deref(), Some("ONE\ntwo\nthree\nfour\nfive\nsix\n"));
        let same = "one\n2\nthree\nfour\nfive\n";
        assert_eq!(merged(base, same, same).as_deref(), Some(same));
        assert_eq!(merged(base, same, base).as_deref(), Some(same));
    }

    #[test]
    fn edits_of_one_line_are_not() {
        for (base, ours, theirs) in [
            ("a\n", "b\n", "c\n"),
            ("a\nb\nc\n", "a\nB\nc\n", "a\nc\n"),
            ("a\nb\n", "a\nx\nb\n", "a\ny\nb\n"),
            ("", "x\n", "y\n"),
            ("a\nb\n", "a\nb", "a\nb\nc\n"),
        ] {
            assert_eq!(merged(base, ours, theirs), None, "{base:?} {ours:?} {theirs:?}");
        }
    }

    #[test]
    fn line_endings_stay_as_they_are() {
        let joined = merged("a\r\nb\r\nc\r\nd", "A\r\nb\r\nc\r\nd", "a\r\nb\r\nc\r\nD");
        assert_eq!(joined.as_deref(), Some("A\r\nb\r\nc\r\nD"));
        // one side changed every ending, so it edited every line
        assert_eq!(merged("a\r\nb\r\nc\r\n", "a\nb\nc\n", "a\r\nb\r\nC\r\n"), None);
    }

    #[test]
    fn what_is_no_text_is_not_merged() {
        assert_eq!(merge(b"a\n\0", b"a\n\0", b"a\n\0"), None);
        assert_eq!(merge(b"a\n\xff", b"a\n", b"a\n"), None);
        let long = "x".repeat(MAX_TEXT + 1);
        assert_eq!(merged(&long, &long, &long), None);
        let many = "\n".repeat(MAX_LINES + 1);
        assert_eq!(merged(&many, &many, &many), None);
    }

    #[test]
    fn a_new_text_is_not_compared_line_by_line() {
        let base: String = (0..MAX_EDITS).map(|line| format!("{line}\n")).collect();
        let other: String = (0..MAX_EDITS).map(|line| format!("other {line}\n")).collect();
        assert_eq!(merged(&base, &other, &base), None);
        let half: String = (0..MAX_EDITS).map(|line| format!("{}\n", line.max(MAX_EDITS / 2))).collect();
        assert_eq!(merged(&base, &half, &base), Some(half));
    }

    fn lines() -> impl Strategy<Value = String> {
        let line = prop_oneof![Just("a\n"), Just("b\n"), Just("c\r\n"), Just("\n"), Just("é\n")];
        (proptest::collection::vec(line, 0..12), prop_oneof![Just(""), Just("a")])
            .prop_map(|(lines, end)| lines.concat() + end)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn both_sides_arrive_at_the_same_text(base in lines(), ours in lines(), theirs in lines()) {
            let joined = merged(&base, &ours, &theirs);
            prop_assert_eq!(&joined, &merged(&base, &theirs, &ours));
            prop_assert_eq!(merged(&base, &ours, &base), Some(ours.clone()));
            if let Some(joined) = joined {
                let known = |line: &str| [&base, &ours, &theirs].iter().any(|text| text.lines().any(|own| own == line));
                prop_assert!(joined.lines().all(known), "{:?}", joined);
            }
        }

        #[test]
        fn separate_edits_both_count(
            count in 3usize..40,
            (one, other) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
            deletes in any::<bool>(),
        ) {
            let (one, other) = (one.index(count), other.index(count));
            prop_assume!(one.abs_diff(other) > 1);
            let text = |edits: &[usize]| -> String {
                let line = |at: usize| match (edits.contains(&at), deletes) {
                    (false, _) => format!("line {at}\n"),
                    (true, false) => format!("edited {at}\n"),
                    (true, true) => String::new(),
                };
                (0..count).map(line).collect()
            };
            prop_assert_eq!(merged(&text(&[]), &text(&[one]), &text(&[other])), Some(text(&[one, other])));
        }

        #[test]
        fn any_bytes_are_merged_or_not(base: Vec<u8>, ours: Vec<u8>, theirs: Vec<u8>) {
            let _ = merge(&base, &ours, &theirs);
        }
    }
}
