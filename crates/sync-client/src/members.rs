//! Who belongs to a group, how one is removed, and new keys for those who stay.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sync_core::Membership;
use sync_store::Peer;
use sync_types::{AuthorId, Cut, GroupId, GroupKind, MemberId, Operation, Role};

use crate::client::SyncClient;
use crate::error::ClientError;
use crate::group::Group;
use crate::pairing::{append_operation, revoke_open};

/// A member of a group, as this device knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// The member's id.
    pub member: String,
    /// What it may do: `admin`, `member`, `read-only` or `guest`.
    pub role: String,
    /// Whether this device is one of its own.
    pub own: bool,
    /// The member that admitted it; none for the founder.
    pub admitted_by: Option<String>,
    /// Its authors: one for each device, and those the device had before.
    pub authors: Vec<AuthorStatus>,
    /// A removal of it that waits for signatures of others.
    pub removal: Option<RemovalStatus>,
}

/// An author of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorStatus {
    /// The author's id.
    pub author: String,
    /// The name of its device, where that is known.
    pub name: Option<String>,
    /// The device's id, where that is known.
    pub device: Option<String>,
}

/// A removal that waits for signatures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovalStatus {
    /// Members that have signed.
    pub signed_by: Vec<String>,
    /// Signatures of different members that it needs.
    pub needed: usize,
}

/// What came of a removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// The member that is removed, or whose devices are.
    pub member: String,
    /// Authors that do not belong any more.
    pub authors: Vec<String>,
    /// It counts, and a new group key was made; if not, others must sign too.
    pub done: bool,
    /// Signatures of different members that are still needed.
    pub lacking: usize,
    /// Members that may give one.
    pub may_sign: Vec<String>,
}

/// The word for a role.
#[must_use]
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Admin => "admin",
        Role::Member => "member",
        Role::ReadOnly => "read-only",
        _ => "guest",
    }
}

/// The role with a word.
#[must_use]
pub fn role_named(name: &str) -> Option<Role> {
    [Role::Admin, Role::Member, Role::ReadOnly, Role::Guest].into_iter().find(|role| role_name(*role) == name)
}

impl SyncClient {
    /// The members of the group, this device's own first.
    pub async fn members(&self) -> Result<Vec<MemberStatus>, ClientError> {
        let group = self.inner_group();
        let peers = group.stored_peers().await;
        Ok(list(&group.membership(), &self.author(), &group.device_name(), &peers))
    }

    /// Removes a member, named by the first digits of its id or by a device of it; or takes one of this member's own
    /// devices out.
    ///
    /// Final: a removed member comes back only as a new one. Where the group is large another member must sign too.
    pub async fn remove_member(&self, who: &str) -> Result<Removed, ClientError> {
        let group = self.inner_group();
        let (membership, own) = own_membership(group)?;
        let own_member = membership.author(&own).map(|own| own.member).ok_or(ClientError::Removed)?;
        match find(&membership, &self.members().await?, who)? {
            (member, authors) if member == own_member => {
                let cuts = cuts(group, &authors).await?;
                append_operation(group, Operation::Withdraw { member, cuts }).await?;
                self.settle_removal(member, authors).await
            }
            (member, _) => {
                let pending = membership.pending_removals().iter().any(|pending| pending.member == member);
                if pending {
                    return self.approve_removal(who).await;
                }
                let authors = authors_of(&membership, &member);
                let cuts = cuts(group, &authors).await?;
                append_operation(group, Operation::Remove { member, cuts }).await?;
                self.settle_removal(member, authors).await
            }
        }
    }

    /// Signs a removal that another member began.
    pub async fn approve_removal(&self, who: &str) -> Result<Removed, ClientError> {
        let group = self.inner_group();
        let (membership, _) = own_membership(group)?;
        let (member, _) = find(&membership, &self.members().await?, who)?;
        let pending = membership.pending_removals().iter().find(|pending| pending.member == member);
        let tombstone = pending.ok_or_else(|| ClientError::NothingToApprove(who.to_owned()))?.tombstone;
        let authors = authors_of(&membership, &member);
        let cuts = cuts(group, &authors).await?;
        append_operation(group, Operation::Approve { tombstone, cuts }).await?;
        self.settle_removal(member, authors).await
    }

    /// Makes a new group key for everyone who belongs now: what is pushed from now on opens for nobody else.
    ///
    /// Returns the number of the epoch.
    pub async fn rotate(&self) -> Result<u32, ClientError> {
        Ok(self.inner_group().rotate().await?.number)
    }

    /// Makes a new key where a removal counts, and says what came of it.
    async fn settle_removal(&self, member: MemberId, authors: Vec<AuthorId>) -> Result<Removed, ClientError> {
        let group = self.inner_group();
        if let Err(error) = revoke_open(group).await {
            // the removal counts all the same
            tracing::warn!(%error, "open invites could not be taken back");
        }
        let membership = group.membership();
        let own = group.author().secret().id();
        let texts = |ids: &BTreeSet<MemberId>| ids.iter().map(ToString::to_string).collect();
        let mut removed = Removed {
            member: member.to_string(),
            authors: authors.iter().map(ToString::to_string).collect(),
            done: !authors.iter().any(|author| membership.is_admitted(author)),
            lacking: 0,
            may_sign: Vec::new(),
        };
        if removed.done {
            // who took itself out makes no key
            if membership.is_admitted(&own) {
                group.rotate().await?;
            }
            return Ok(removed);
        }
        let pending = membership.pending_removals().iter().find(|pending| pending.member == member);
        let Some(pending) = pending else { return Err(ClientError::MayNotRemove) };
        let signed = members_of(&membership, &pending.signed);
        let target = membership.authors().filter(|(_, admitted)| admitted.member == member);
        let target = target.map(|(_, admitted)| admitted.role).min().unwrap_or(Role::Guest);
        let may = membership
            .authors()
            .filter(|(_, other)| other.role.may_remove() && other.role <= target && other.member != member)
            .map(|(_, other)| other.member)
            .filter(|other| !signed.contains(other))
            .collect();
        removed.lacking = pending.needed.saturating_sub(signed.len());
        removed.may_sign = texts(&may);
        Ok(removed)
    }
}

fn own_membership(group: &Group) -> Result<(Arc<Membership>, AuthorId), ClientError> {
    let (membership, own) = (group.membership(), group.author().secret().id());
    if membership.charter().kind == GroupKind::Passphrase {
        return Err(ClientError::PassphraseGroup);
    }
    if !membership.is_admitted(&own) {
        return Err(ClientError::Removed);
    }
    Ok((membership, own))
}

fn authors_of(membership: &Membership, member: &MemberId) -> Vec<AuthorId> {
    membership.authors().filter(|(_, admitted)| admitted.belongs_to(member)).map(|(id, _)| *id).collect()
}

fn members_of(membership: &Membership, authors: &[AuthorId]) -> BTreeSet<MemberId> {
    authors.iter().filter_map(|author| Some(membership.author(author)?.member)).collect()
}

/// Where the feeds of authors end by what is held here.
async fn cuts(group: &Group, authors: &[AuthorId]) -> Result<Vec<Cut>, ClientError> {
    let (id, authors): (GroupId, Vec<AuthorId>) = (group.id, authors.to_vec());
    let read = group.store().read(move |reader| {
        let mut cuts = Vec::new();
        for author in authors {
            let feed = reader.feed(&id, &author)?;
            // one that wrote nothing is named all the same: a withdrawal takes those that it names
            cuts.push(Cut { author, number: feed.held.highest().unwrap_or_default(), hash: feed.head });
        }
        Ok(cuts)
    });
    let mut cuts = read.await?;
    // of a member with more authors than an operation names those that wrote most stay
    cuts.sort_by_key(|cut| std::cmp::Reverse(cut.number));
    cuts.truncate(sync_types::bounds::MAX_CUTS);
    Ok(cuts)
}

fn list(membership: &Membership, own: &AuthorId, own_name: &str, peers: &[Peer]) -> Vec<MemberStatus> {
    let peer_of = |author: &AuthorId| peers.iter().find(|peer| peer.author == Some(*author));
    let mut members: BTreeMap<MemberId, MemberStatus> = BTreeMap::new();
    for (id, admitted) in membership.authors() {
        let status = members.entry(admitted.member).or_insert_with(|| MemberStatus {
            member: admitted.member.to_string(),
            role: role_name(admitted.role).to_owned(),
            own: false,
            admitted_by: None,
            authors: Vec::new(),
            removal: None,
        });
        let strongest = [Some(admitted.role), role_named(&status.role)].into_iter().flatten().min();
        status.role = role_name(strongest.unwrap_or(admitted.role)).to_owned();
        status.own |= id == own;
        if MemberId::from(*id) == admitted.member {
            let by = admitted.by.and_then(|by| membership.author(&by).map(|by| by.member).or(Some(by.into())));
            status.admitted_by = by.map(|member| member.to_string());
        }
        let peer = peer_of(id);
        let name = if id == own { Some(own_name.to_owned()) } else { peer.map(|peer| peer.name.clone()) };
        let device = peer.and_then(|peer| peer.device).map(|device| device.to_string());
        status.authors.push(AuthorStatus {
            author: id.to_string(),
            name: name.filter(|name| !name.is_empty()),
            device,
        });
    }
    for pending in membership.pending_removals() {
        if let Some(status) = members.get_mut(&pending.member) {
            let signed_by = members_of(membership, &pending.signed).iter().map(ToString::to_string).collect();
            status.removal = Some(RemovalStatus { signed_by, needed: pending.needed });
        }
    }
    let mut members: Vec<MemberStatus> = members.into_values().collect();
    members.sort_by_key(|status| !status.own);
    members
}

/// The member that is meant, and of it the authors of the device that was named, if one was.
fn find(
    membership: &Membership,
    members: &[MemberStatus],
    who: &str,
) -> Result<(MemberId, Vec<AuthorId>), ClientError> {
    let digits = who.to_ascii_lowercase();
    let starts = |id: &str| digits.len() >= MIN_DIGITS && id.starts_with(&digits);
    let mut found: BTreeMap<String, BTreeSet<AuthorId>> = BTreeMap::new();
    for status in members {
        for author in &status.authors {
            let named = author.name.as_deref() == Some(who) || author.device.as_deref().is_some_and(starts);
            if (named || starts(&author.author) || (!status.own && starts(&status.member)))
                && let Ok(id) = author.author.parse::<AuthorId>()
            {
                found.entry(status.member.clone()).or_default().insert(id);
            }
        }
    }
    let mut found = found.into_iter();
    let (Some((member, authors)), None) = (found.next(), found.next()) else {
        let several = members.iter().flat_map(|status| &status.authors).any(|author| {
            author.name.as_deref() == Some(who)
                || starts(&author.author)
                || author.device.as_deref().is_some_and(starts)
        });
        let who = who.to_owned();
        return Err(if several { ClientError::SeveralMembers(who) } else { ClientError::UnknownMember(who) });
    };
    let member: MemberId = member.parse().map_err(|_| ClientError::UnknownMember(who.to_owned()))?;
    // with a device go the authors that it went on from and as
    let mut authors = authors;
    loop {
        let before = authors.len();
        for (id, admitted) in membership.authors().filter(|(_, admitted)| admitted.belongs_to(&member)) {
            if admitted.invite.is_none() && admitted.by.is_some_and(|by| authors.contains(&by)) && admitted.succeeds() {
                authors.insert(*id);
            }
        }
        if authors.len() == before {
            return Ok((member, authors.into_iter().collect()));
        }
    }
}

/// Digits of an id that are enough to mean one: fewer are more likely a name.
const MIN_DIGITS: usize = 4;
