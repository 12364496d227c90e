//! Answering in place of an inviter that is away: an invite is shared, sealed, with every member, and each that may let
//! its joiner in watches the relays for who asks.

use std::sync::Arc;

use sync_core::pairing::InviteStatus;
use sync_crypto::InviteKeys;
use sync_store::{Content, Ingested, NewEntry, StoreError, Txn};
use sync_types::invite::{INVITE_STREAM, KIND_INVITE};
use sync_types::{AuthorId, BlobId, Class, Envelope, GroupId, InviteId, SharedInvite};

use super::{InviteOutcome, InviteState, OpenInvite, end, lock, resume};
use crate::device::Inner;
use crate::group::{Group, Shared, now};
use crate::keys::GroupKeys;
use crate::secrets;

/// The entry that shares an invite; none where someone belongs who may not invite, and could by reading it.
pub(super) fn entry(group: &Group, id: InviteId, invite: &SharedInvite) -> Option<NewEntry> {
    let all_may = group.membership().authors().all(|(_, admitted)| admitted.role.may_invite());
    let (stream, body) = (INVITE_STREAM.to_owned(), invite.encode());
    // under this name the entry is found without opening any other
    all_may.then(|| group.entry(BlobId(id.0), Content::Sealed { kind: KIND_INVITE, stream, body }))
}

/// Keeps the invites that a batch shares with this device, in the transaction that stores it; whether there was one.
pub(crate) fn learn(
    txn: &mut Txn<'_>,
    shared: &Shared,
    group: &GroupId,
    keys: &GroupKeys,
    batch: &[Vec<u8>],
    ingested: &Ingested,
) -> Result<bool, StoreError> {
    let mut learnt = false;
    let sealed = |envelope: &Envelope<'_>| envelope.header.class == Class::Sealed;
    let membership = txn.membership(group)?;
    for envelope in batch.iter().filter_map(|bytes| Envelope::parse(bytes).ok()).filter(sealed) {
        let id = InviteId(envelope.header.blob_id.0);
        let Some(invited) = membership.invite(&id).filter(|invited| invited.by == envelope.header.sender) else {
            continue;
        };
        let status = InviteStatus { state: InviteState::Open, expires: invited.expires, used_by: None };
        if !status.seen_in(&id, &membership, None).may_wait(now()) {
            continue;
        }
        let (number, hash) = (envelope.header.number, envelope.hash());
        let is_stored = |stored: &sync_store::StoredEntry| {
            stored.author == invited.by && stored.number == number && stored.hash == hash && stored.readable
        };
        if !ingested.stored.iter().any(is_stored) || txn.reader().invite(group, &id)?.is_some() {
            continue;
        }
        let opened = keys.unseal(&envelope).ok().filter(|content| content.kind == KIND_INVITE);
        let Some(invite) = opened.and_then(|content| SharedInvite::decode(&content.body).ok()) else { continue };
        let derived = InviteKeys::from_prk(invite.prk);
        if derived.invite_id() == id && derived.verifier() == invited.verifier {
            secrets::seal_invite(shared, id, &invite).put(txn)?;
            txn.put_invite(group, &id, invited.expires)?;
            learnt = true;
        }
    }
    Ok(learnt)
}

/// Answers the invites that others share while the device is open, and ends those that others have used or taken back.
pub(crate) async fn run(device: Arc<Inner>, group: Arc<Group>) {
    let (mut changed, closed) = (group.watch_invites(), device.closed());
    loop {
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            () = closed.cancelled() => return,
        }
        if let Err(error) = resume(&device, &group).await {
            tracing::warn!(%error, "invites of others cannot be answered");
        }
        let waiting = |(id, open): (&InviteId, &OpenInvite)| {
            (open.group == group.id && open.outcome.borrow().is_none()).then_some(*id)
        };
        let waiting: Vec<InviteId> = lock(&device.invites).iter().filter_map(waiting).collect();
        let membership = group.membership();
        for id in waiting {
            // whom this device lets in itself is told of once it has its admission
            let own = group.author().secret().id();
            let by = |author: &AuthorId| membership.author(author).and_then(|admitted| admitted.by);
            if let Some(author) = membership.used_by(&id).filter(|author| by(author) != Some(own)) {
                let name = author.short().to_string();
                end(&device, id, InviteState::Used, InviteOutcome::Joined { name, author }).await;
            } else if membership.is_revoked(&id) {
                end(&device, id, InviteState::Revoked, InviteOutcome::Revoked).await;
            }
        }
    }
}
