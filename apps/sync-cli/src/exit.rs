//! What went wrong, and the one table from there to exit code, HTTP status and hint.

use std::borrow::Cow;
use std::io;

use serde::{Deserialize, Serialize};
use sync_client::ClientError;

/// A failure of a command or of a request: a stable word for programs, and text for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub(crate) struct Failure {
    /// One of [`KINDS`], or a word of a later version.
    pub(crate) code: Cow<'static, str>,
    /// What happened and what to do next.
    pub(crate) message: String,
}

/// What a kind of failure means outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) code: &'static str,
    pub(crate) exit: u8,
    pub(crate) status: u16,
    /// What to do, where the message itself cannot know.
    pub(crate) hint: Option<&'static str>,
}

const fn kind(code: &'static str, exit: u8, status: u16) -> Kind {
    Kind { code, exit, status, hint: None }
}

const fn hinted(code: &'static str, exit: u8, status: u16, hint: &'static str) -> Kind {
    Kind { code, exit, status, hint: Some(hint) }
}

/// A failure of a kind this version has no entry for.
const OTHER: Kind = kind("other", 1, 500);

/// Every kind there is, by exit code; `docs/cli.md` shows the same to people.
pub(crate) const KINDS: &[Kind] = &[
    // 1: something else
    kind("io", 1, 500),
    kind("interrupted", 1, 503),
    kind("no-group", 1, 409),
    kind("already-joined", 1, 409),
    kind("may-not-invite", 1, 403),
    kind("not-in-group", 1, 410),
    kind("unreachable", 1, 502),
    kind("relay-unavailable", 1, 503),
    kind("join-waits", 1, 503),
    kind("offline", 1, 503),
    kind("bind", 1, 500),
    kind("memory", 1, 503),
    kind("demo", 1, 500),
    kind("no-folder", 1, 504),
    kind("folder-missing", 1, 500),
    kind("folder-stopped", 1, 409),
    kind("not-served", 1, 503),
    kind("no-token", 1, 401),
    kind("wrong-host", 1, 403),
    hinted("closed", 1, 503, "the process that serves this home is ending; try again"),
    // 2: the request makes no sense
    kind("usage", 2, 400),
    kind("not-found", 2, 404),
    kind("several-groups", 2, 409),
    kind("unknown-group", 2, 404),
    kind("blob-id-reused", 2, 409),
    kind("weak-passphrase", 2, 400),
    kind("wrong-passphrase", 2, 403),
    kind("unknown-folder", 2, 404),
    kind("several-folders", 2, 409),
    kind("folder-overlaps", 2, 409),
    kind("folder-placed", 2, 409),
    kind("bad-path", 2, 400),
    kind("no-version", 2, 404),
    kind("exists", 2, 409),
    kind("relay-malformed", 2, 400),
    kind("unknown-relay", 2, 404),
    kind("too-many-relays", 2, 409),
    // 3: invites
    kind("invite-malformed", 3, 400),
    kind("invite-not-found", 3, 404),
    kind("invite-wrong", 3, 403),
    kind("invite-used", 3, 410),
    kind("invite-expired", 3, 410),
    kind("invite-revoked", 3, 410),
    kind("invite-forged", 3, 502),
    // 4: somebody else is at work
    kind("busy", 4, 409),
    kind("other-version", 4, 426),
    // 5: the home
    kind("home-exists", 5, 409),
    kind("not-a-home", 5, 404),
    kind("database-gone", 5, 409),
    kind("newer-home", 5, 500),
    kind("no-permission", 5, 500),
    kind("key-store", 5, 500),
    kind("home", 5, 500),
    kind("backup", 5, 400),
    hinted("newer-group", 5, 500, "update syncshell; this version cannot read the group's folders"),
    hinted("newer-database", 5, 500, "update syncshell; this version leaves the database alone"),
    hinted("corrupt", 5, 500, "put the whole home back from a backup, or make a new one and pair it again"),
    hinted("not-a-database", 5, 500, "put the whole home back from a backup, or make a new one and pair it again"),
    hinted("read-only", 5, 500, "make the home writable for this user"),
    kind("store", 5, 500),
    kind("secret", 5, 500),
    kind("keys", 5, 500),
    // 6: size
    kind("too-large", 6, 413),
    // 7: space
    hinted("disk-full", 7, 507, "free some space; what was reported as stored is safe"),
];

impl Failure {
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code: Cow::Borrowed(code), message: message.into() }
    }

    /// A request that makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new("usage", message)
    }

    /// The process at the other end of the local API ended.
    pub(crate) fn interrupted(what: impl std::fmt::Display) -> Self {
        Self::new(
            "interrupted",
            format!("the process that serves this home ended before it answered ({what}); try again"),
        )
    }

    /// Reading or writing something named failed.
    pub(crate) fn io(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.kind() {
            io::ErrorKind::StorageFull => Self::new("disk-full", format!("{what}: {error}")),
            _ => Self::new("io", format!("{what}: {error}")),
        }
    }

    /// What this kind of failure means outside.
    pub(crate) fn kind(&self) -> Kind {
        KINDS.iter().find(|kind| kind.code == self.code).copied().unwrap_or(OTHER)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_is_listed_once_with_codes_that_fit() {
        let codes: BTreeSet<_> = KINDS.iter().map(|kind| kind.code).collect();
        assert_eq!(codes.len(), KINDS.len());
        for kind in KINDS {
            assert!((1..=7).contains(&kind.exit), "{kind:?}");
            assert!((400..=599).contains(&kind.status), "{kind:?}");
            assert!(kind.code.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{kind:?}");
        }
    }

    #[test]
    fn every_kind_is_in_the_manual_with_its_exit_code() {
        let manual = include_str!("../../../docs/cli.md");
        for Kind { code, exit, .. } in KINDS {
            let row = manual.lines().find(|line| line.starts_with(&format!("| {exit} |")));
            assert!(row.is_some_and(|row| row.contains(&format!("`{code}`"))), "{code} under {exit}");
        }
    }

    #[test]
    fn a_word_of_a_later_version_is_an_ordinary_failure() {
        let failure: Failure = serde_json::from_str(r#"{"code":"brand-new","message":"m"}"#).expect("read");
        assert_eq!((failure.kind().exit, failure.kind().status), (1, 500));
    }
}
