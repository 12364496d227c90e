//! Pairing: what the admitting member decides about a JOIN, by its own state and clock.

use sync_types::{AuthorId, ErrorCode, InviteState, Timestamp};

/// How long an invite is good for.
pub const INVITE_LIFETIME_MS: u64 = 10 * 60 * 1000;

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

/// Decides about a JOIN; `proven` says whether both its proofs verify.
#[must_use]
pub fn decide(invite: Option<&InviteStatus>, joiner: AuthorId, proven: bool, now: Timestamp) -> Decision {
    // who cannot prove the code learns nothing about the invite
    let Some(invite) = invite.filter(|_| proven) else { return Decision::Refuse(ErrorCode::InviteWrong) };
    match invite.state_at(now) {
        InviteState::Used if invite.used_by == Some(joiner) => Decision::GrantAgain,
        InviteState::Used => Decision::Refuse(ErrorCode::InviteUsed),
        InviteState::Revoked => Decision::Refuse(ErrorCode::InviteRevoked),
        InviteState::Open => Decision::Admit,
        _ => Decision::Refuse(ErrorCode::InviteExpired),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_answer() {
        let (alice, bob) = (AuthorId([1; 32]), AuthorId([2; 32]));
        let invite = |state, used_by| InviteStatus { state, expires: Timestamp(100), used_by };
        let open = invite(InviteState::Open, None);
        let used = invite(InviteState::Used, Some(alice));
        let revoked = invite(InviteState::Revoked, None);
        let refuse = Decision::Refuse;
        for (status, joiner, proven, now, expected) in [
            (Some(open), alice, true, 99, Decision::Admit),
            (Some(open), alice, true, 100, refuse(ErrorCode::InviteExpired)),
            (Some(open), alice, false, 99, refuse(ErrorCode::InviteWrong)),
            (None, alice, true, 99, refuse(ErrorCode::InviteWrong)),
            (Some(used), alice, true, 5000, Decision::GrantAgain),
            (Some(used), bob, true, 99, refuse(ErrorCode::InviteUsed)),
            (Some(used), bob, false, 99, refuse(ErrorCode::InviteWrong)),
            (Some(revoked), alice, true, 99, refuse(ErrorCode::InviteRevoked)),
        ] {
            assert_eq!(decide(status.as_ref(), joiner, proven, Timestamp(now)), expected, "{status:?} at {now}");
        }
    }
}
