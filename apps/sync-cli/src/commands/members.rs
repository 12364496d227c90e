//! `syncshell members`, `remove` and `rotate`: who belongs to a group, how one gets out, and new keys for the others.

use std::fmt::Write as _;

use sync_client::{MemberStatus, Removed};

use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::terminal::clean;

/// List the members of a group, what each may do, their devices, and who let them in
#[derive(Debug, clap::Args)]
pub(crate) struct Members {}

/// Remove a member from a group for good, or take a device of your own out
///
/// Everyone who hears of it refuses the removed one, and what is written from then on opens for it
/// no longer. What it had before stays with it. In a group of more than ten members another one must
/// sign too, by `syncshell remove --approve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Remove {
    /// The member or device: its name or the first digits of its id, as `members` shows them
    member: String,

    /// Sign a removal that another member began
    #[arg(long)]
    approve: bool,
}

/// Make a new group key: what is written from now on opens for those only who belong now
#[derive(Debug, clap::Args)]
pub(crate) struct Rotate {}

impl Members {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Offline).await?;
        let members = backend.members(global.group()).await;
        backend.close().await;
        let members = members?;
        out.result(members.members.iter().map(describe).collect::<Vec<_>>().join("\n"), &members)
    }
}

impl Remove {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let removed = backend.remove_member(global.group(), &self.member, self.approve).await;
        backend.close().await;
        let removed = removed?;
        out.result(outcome(&self.member, &removed), &removed)
    }
}

impl Rotate {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Online).await?;
        let rotated = backend.rotate(global.group()).await;
        backend.close().await;
        let rotated = rotated?;
        out.result(format!("the group has key {} now", rotated.epoch), &rotated)
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

fn describe(member: &MemberStatus) -> String {
    let mut text = format!("{} {}", short(&member.member), clean(&member.role));
    if member.own {
        text += ", you";
    }
    match &member.admitted_by {
        Some(by) => _ = write!(text, ", let in by {}", short(by)),
        None => text += ", made the group",
    }
    for author in &member.authors {
        let name = author.name.as_deref().map_or_else(|| "a device not seen yet".to_owned(), clean);
        _ = write!(text, "\n  {} {name}", short(&author.author));
    }
    if let Some(removal) = &member.removal {
        let signed: Vec<&str> = removal.signed_by.iter().map(|member| short(member)).collect();
        _ = write!(text, "\n  to be removed: signed by {} of {} members", signed.join(" and "), removal.needed);
    }
    text
}

fn outcome(who: &str, removed: &Removed) -> String {
    let who = clean(who);
    if removed.done {
        return format!("{who} is removed; what is written from now on opens for it no longer");
    }
    let may: Vec<&str> = removed.may_sign.iter().map(|member| short(member)).collect();
    format!(
        "{who} is not removed yet: {} more of {} must sign, by `syncshell remove --approve {}`",
        removed.lacking,
        may.join(", "),
        short(&removed.member)
    )
}

#[cfg(test)]
mod tests {
    use sync_client::{AuthorStatus, RemovalStatus};

    use super::*;

    #[test]
    fn a_member_is_told_with_its_devices_and_what_waits() {
        let author = |author: &str, name: Option<&str>| AuthorStatus {
            author: author.into(),
            name: name.map(str::to_owned),
            device: None,
        };
        let founder = MemberStatus {
            member: "0123456789".into(),
            role: "admin".into(),
            own: true,
            admitted_by: None,
            authors: vec![author("0123456789", Some("anna")), author("abcdefabcdef", None)],
            removal: None,
        };
        assert_eq!(
            describe(&founder),
            "01234567 admin, you, made the group\n  01234567 anna\n  abcdefab a device not seen yet"
        );
        let other = MemberStatus {
            own: false,
            role: "member".into(),
            admitted_by: Some("0123456789".into()),
            authors: vec![author("fedcba9876", Some("ben\x1b"))],
            removal: Some(RemovalStatus { signed_by: vec!["11112222333".into()], needed: 2 }),
            ..founder
        };
        assert_eq!(
            describe(&other),
            "01234567 member, let in by 01234567\n  fedcba98 ben\u{fffd}\n  to be removed: signed by 11112222 of 2 members"
        );
    }

    #[test]
    fn who_must_sign_too_is_named() {
        let removed = Removed {
            member: "0123456789".into(),
            authors: vec![],
            done: false,
            lacking: 1,
            may_sign: vec!["aaaaaaaaaa".into(), "bbbbbbbbbb".into()],
        };
        assert_eq!(
            outcome("ben", &removed),
            "ben is not removed yet: 1 more of aaaaaaaa, bbbbbbbb must sign, by `syncshell remove --approve 01234567`"
        );
    }
}
