//! Pairing: what an admitting member decides about a JOIN, by its own state and clock.

use sync_types::{AuthorId, ErrorCode, InviteId, InviteState, MemberId, Role, Timestamp};

use crate::membership::Membership;

/// How long an invite is good for.
pub const INVITE_LIFETIME_MS: u64 = 10 * 60 * 1000;
/// How long a request that was left at a relay in that time may be answered.
pub const REQUEST_LIFETIME_MS: u64 = 7 * 24 * 3600 * 1000;

/// What the admitting member knows of an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InviteStatus {
    /// What became of it.
    pub state: InviteState,
    /// When it ends.
    pub expires: Timestamp,
    /// Who was admitted by it.
    pub used_by: Option<AuthorId>,
}

impl InviteStatus {
    /// What became of the invite as of now.
    #[must_use]
    pub fn state_at(&self, now: Timestamp) -> InviteState {
        match self.state {
            InviteState::Open if now >= self.expires => InviteState::Expired,
            state => state,
        }
    }

    /// The same with what other members did: they may have admitted someone by it, or taken it back.
    ///
    /// Of several that were admitted, each hears that it was.
    #[must_use]
    pub fn seen_in(mut self, invite: &InviteId, membership: &Membership, joiner: Option<AuthorId>) -> Self {
        let admitted = joiner.filter(|joiner| membership.author(joiner).is_some_and(|it| it.invite == Some(*invite)));
        self.used_by = self.used_by.or(admitted).or_else(|| membership.used_by(invite));
        if self.used_by.is_some() {
            self.state = InviteState::Used;
        } else if membership.is_revoked(invite) {
            self.state = InviteState::Revoked;
        }
        self
    }

    /// Whether a request that was left in time may still be answered.
    #[must_use]
    pub fn may_wait(&self, now: Timestamp) -> bool {
        let unused = matches!(self.state, InviteState::Open | InviteState::Expired);
        unused && now.0 < self.expires.0.saturating_add(REQUEST_LIFETIME_MS)
    }
}

/// What to do about a JOIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Admit the joiner.
    Admit,
    /// The joiner was admitted already and asks again, after a crash for instance.
    GrantAgain,
    /// Refuse.
    Refuse(ErrorCode),
}

/// Decides about a JOIN that was asked at some time; `proven` says whether both its proofs verify.
#[must_use]
pub fn decide(
    invite: Option<&InviteStatus>,
    joiner: AuthorId,
    proven: bool,
    asked: Timestamp,
    now: Timestamp,
) -> Decision {
    // who cannot prove the code learns nothing about the invite
    let Some(invite) = invite.filter(|_| proven) else { return Decision::Refuse(ErrorCode::InviteWrong) };
    match invite.state {
        InviteState::Used if invite.used_by == Some(joiner) => Decision::GrantAgain,
        InviteState::Used => Decision::Refuse(ErrorCode::InviteUsed),
        InviteState::Revoked => Decision::Refuse(ErrorCode::InviteRevoked),
        _ if asked < invite.expires && invite.may_wait(now) => Decision::Admit,
        _ => Decision::Refuse(ErrorCode::InviteExpired),
    }
}

/// As what a member of this role lets a joiner in by an invite that is for this role and member; none if it may not.
#[must_use]
pub fn place(
    (role, member): (Role, Option<MemberId>),
    own: (Role, MemberId),
    joiner: AuthorId,
) -> Option<(Role, MemberId)> {
    let (own_role, own_member) = own;
    let may = own_role.may_invite() && role >= own_role && member.is_none_or(|member| member == own_member);
    may.then(|| (role, member.unwrap_or_else(|| joiner.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_answer() {
        let (alice, bob) = (AuthorId([1; 32]), AuthorId([2; 32]));
        let invite = |state, used_by| InviteStatus { state, expires: Timestamp(100), used_by };
        let open = invite(InviteState::Open, None);
        let expired = invite(InviteState::Expired, None);
        let used = invite(InviteState::Used, Some(alice));
        let revoked = invite(InviteState::Revoked, None);
        let refuse = Decision::Refuse;
        let last = 100 + REQUEST_LIFETIME_MS;
        for (status, joiner, proven, asked, now, expected) in [
            (Some(open), alice, true, 99, 99, Decision::Admit),
            (Some(open), alice, true, 100, 100, refuse(ErrorCode::InviteExpired)),
            (Some(open), alice, false, 99, 99, refuse(ErrorCode::InviteWrong)),
            (None, alice, true, 99, 99, refuse(ErrorCode::InviteWrong)),
            (Some(used), alice, true, 5000, 5000, Decision::GrantAgain),
            (Some(used), bob, true, 99, 99, refuse(ErrorCode::InviteUsed)),
            (Some(used), bob, false, 99, 99, refuse(ErrorCode::InviteWrong)),
            (Some(revoked), alice, true, 99, 99, refuse(ErrorCode::InviteRevoked)),
            (Some(revoked), alice, true, 99, 5000, refuse(ErrorCode::InviteRevoked)),
            (Some(open), alice, true, 99, last - 1, Decision::Admit),
            (Some(expired), alice, true, 99, last - 1, Decision::Admit),
            (Some(expired), alice, true, 100, 200, refuse(ErrorCode::InviteExpired)),
            (Some(expired), alice, true, 99, last, refuse(ErrorCode::InviteExpired)),
        ] {
            let got = decide(status.as_ref(), joiner, proven, Timestamp(asked), Timestamp(now));
            assert_eq!(got, expected, "{status:?} asked at {asked} at {now}");
        }
    }

    #[test]
    fn only_who_may_let_in_as_what_an_invite_is_for_completes_it() {
        let (joiner, own, other) = (AuthorId([1; 32]), MemberId([2; 32]), MemberId([3; 32]));
        let new = MemberId::from(joiner);
        for (invite, role, expected) in [
            ((Role::Member, None), Role::Member, Some((Role::Member, new))),
            ((Role::Member, None), Role::Admin, Some((Role::Member, new))),
            ((Role::Admin, None), Role::Member, None),
            ((Role::Member, None), Role::Guest, None),
            ((Role::Guest, None), Role::ReadOnly, None),
            ((Role::Guest, None), Role::Guest, None),
            ((Role::Member, Some(own)), Role::Member, Some((Role::Member, own))),
            ((Role::Member, Some(other)), Role::Admin, None),
        ] {
            assert_eq!(place(invite, (role, own), joiner), expected, "{invite:?} by {role:?}");
        }
    }
}
