//! Which paths of a folder this device takes.

use std::collections::BTreeSet;
use std::sync::Arc;

use sync_types::folder::TreePath;

use crate::ignored::IGNORE_FILE;

/// Paths that a selection may name: each is kept with the folder's settings, and more than anyone types.
pub const MAX_SELECTED: usize = 1024;

/// The paths that a device takes: those that are named, what is below them, and the directories that lead to them.
///
/// The file with the patterns of what is ignored is always taken: it says what the selected paths are to leave out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection(Option<Arc<BTreeSet<TreePath>>>);

impl Selection {
    /// Takes these paths; everything where none is named.
    #[must_use]
    pub fn of(paths: impl IntoIterator<Item = TreePath>) -> Self {
        let paths: BTreeSet<TreePath> = paths.into_iter().collect();
        Self((!paths.is_empty()).then(|| Arc::new(paths)))
    }

    /// Whether nothing is left out.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.0.is_none()
    }

    /// The paths that are named, none where everything is taken.
    pub fn paths(&self) -> impl Iterator<Item = &TreePath> {
        self.0.iter().flat_map(|paths| paths.iter())
    }

    /// Whether this device takes a path.
    #[must_use]
    pub fn takes(&self, path: &TreePath) -> bool {
        let Some(paths) = &self.0 else { return true };
        // what is below a path follows it
        let leads_to = |next: &TreePath| next == path || next.is_below(path);
        paths.range(path..).next().is_some_and(leads_to)
            || std::iter::successors(path.parent(), TreePath::parent).any(|above| paths.contains(&above))
            || path.as_str() == IGNORE_FILE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("a path")
    }

    #[test]
    fn what_is_named_is_taken_with_what_is_below_it_and_what_leads_to_it() {
        let some = Selection::of(["a/b", "a/b/c", "d", "e!/f"].map(path));
        for (text, taken) in [
            ("a", true),
            ("a/b", true),
            ("a/b/c", true),
            ("a/b/x/y", true),
            ("a/bc", false),
            ("a/b!", false),
            ("a/x", false),
            ("d/deep/er", true),
            ("d.txt", false),
            ("e", false),
            ("e!", true),
            ("e!/g", false),
            ("z", false),
            (IGNORE_FILE, true),
            ("z/.syncshellignore", false),
        ] {
            assert_eq!(some.takes(&path(text)), taken, "{text}");
            assert!(Selection::default().takes(&path(text)), "{text}");
        }
        assert!(Selection::of([]).takes(&path("z")));
    }
}
