//! Membership operations: the clear payload of a membership envelope.

use crate::bounds::{MAX_OPERATION, MAX_SEEN};
use crate::charter::{read_keys, write_keys};
use crate::ids::{AuthorId, AuthorKeys, EnvelopeHash, InviteId, MemberId, Timestamp};
use crate::wire::{FormatError, Reader, Writer};

/// What a member may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Everything, other members' roles included.
    Admin,
    /// Read, write, invite.
    Member,
    /// Read.
    ReadOnly,
    /// Read and write, without inviting.
    Guest,
}

impl Role {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Admin => 0,
            Self::Member => 1,
            Self::ReadOnly => 2,
            Self::Guest => 3,
        }
    }

    /// Reads the number on the wire.
    pub fn from_code(code: u64) -> Result<Self, FormatError> {
        match code {
            0 => Ok(Self::Admin),
            1 => Ok(Self::Member),
            2 => Ok(Self::ReadOnly),
            3 => Ok(Self::Guest),
            got => Err(FormatError::Unknown { field: "role", got }),
        }
    }

    /// Whether invites and admissions by this role count.
    #[must_use]
    pub const fn may_invite(self) -> bool {
        matches!(self, Self::Admin | Self::Member)
    }
}

/// One step of a group's membership.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// A new author enters the group.
    Admit {
        /// The new author.
        keys: AuthorKeys,
        /// Whose it is.
        member: MemberId,
        /// What its member may do.
        role: Role,
        /// The invite it answers.
        invite: Option<InviteId>,
    },
    /// Someone may ask for one admission.
    Invite {
        /// Names the invite.
        id: InviteId,
        /// Ed25519 key that proves knowledge of the code.
        verifier: [u8; 32],
        /// Role the newcomer gets.
        role: Role,
        /// The member whose further device is invited, or a new member.
        member: Option<MemberId>,
        /// When it ends, by the admitting member's clock.
        expires: Timestamp,
    },
    /// An invite is taken back.
    Revoke {
        /// The invite.
        id: InviteId,
    },
    /// An author goes on under a new key.
    Succeed {
        /// The new author, in whose feed this stands first.
        keys: AuthorKeys,
        /// Whose both are.
        member: MemberId,
        /// The author before.
        predecessor: AuthorId,
        /// The predecessor's signature over group, keys and member.
        proof: [u8; 64],
    },
    /// An operation of a later version: stored, forwarded, skipped.
    Unknown(u64),
}

/// An operation and what its author had seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedOperation {
    /// Membership envelopes at the tip of what the author had seen.
    pub seen: Vec<EnvelopeHash>,
    /// The operation.
    pub operation: Operation,
}

impl SignedOperation {
    /// The payload of a membership envelope.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut head = |code: u64, fields: usize| {
            writer.array(fields + 2).uint(code).bins(&self.seen);
        };
        match &self.operation {
            Operation::Admit { keys, member, role, invite } => {
                head(1, 4);
                write_keys(&mut writer, keys);
                writer.bin(&member.0).uint(role.code().into()).bin_or_nil(invite.as_ref().map(AsRef::as_ref));
            }
            Operation::Invite { id, verifier, role, member, expires } => {
                head(2, 5);
                writer.bin(&id.0).bin(verifier).uint(role.code().into());
                writer.bin_or_nil(member.as_ref().map(AsRef::as_ref)).uint(expires.0);
            }
            Operation::Revoke { id } => {
                head(3, 1);
                writer.bin(&id.0);
            }
            Operation::Succeed { keys, member, predecessor, proof } => {
                head(4, 4);
                write_keys(&mut writer, keys);
                writer.bin(&member.0).bin(&predecessor.0).bin(proof);
            }
            Operation::Unknown(code) => head(*code, 0),
        }
        writer.finish()
    }

    /// Reads the payload of a membership envelope.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_OPERATION {
            return Err(FormatError::TooMany { field: "operation", got: bytes.len(), max: MAX_OPERATION });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("operation", 2, 64)?;
        let code = reader.uint("operation")?;
        let count = reader.array("seen", 0, MAX_SEEN)?;
        let seen = (0..count).map(|_| reader.fixed("seen").map(EnvelopeHash)).collect::<Result<_, _>>()?;
        let known = |wanted: usize| {
            (fields >= wanted + 2).then_some(wanted + 2).ok_or(FormatError::Malformed { field: "operation" })
        };
        let (operation, read) = match code {
            1 => {
                let read = known(4)?;
                let keys = read_keys(&mut reader)?;
                let member = MemberId(reader.fixed("member")?);
                let role = Role::from_code(reader.uint("role")?)?;
                let invite = reader.fixed_or_nil("invite")?.map(InviteId);
                (Operation::Admit { keys, member, role, invite }, read)
            }
            2 => {
                let read = known(5)?;
                let id = InviteId(reader.fixed("invite")?);
                let verifier = reader.fixed("verifier")?;
                let role = Role::from_code(reader.uint("role")?)?;
                let member = reader.fixed_or_nil("member")?.map(MemberId);
                let expires = Timestamp(reader.uint("expires")?);
                (Operation::Invite { id, verifier, role, member, expires }, read)
            }
            3 => (Operation::Revoke { id: InviteId(reader.fixed("invite")?) }, known(1)?),
            4 => {
                let read = known(4)?;
                let keys = read_keys(&mut reader)?;
                let member = MemberId(reader.fixed("member")?);
                let predecessor = AuthorId(reader.fixed("predecessor")?);
                let proof = reader.fixed("proof")?;
                (Operation::Succeed { keys, member, predecessor, proof }, read)
            }
            code => (Operation::Unknown(code), 2),
        };
        reader.skip("operation", fields - read)?;
        reader.end()?;
        Ok(Self { seen, operation })
    }
}

/// What a predecessor signs for its successor, after the group id.
#[must_use]
pub fn succession_statement(keys: &AuthorKeys, member: MemberId) -> Vec<u8> {
    let mut writer = Writer::array_of(2);
    write_keys(&mut writer, keys);
    writer.bin(&member.0);
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> AuthorKeys {
        AuthorKeys { verify: AuthorId([1; 32]), noise: [2; 32], kem: Box::new([3; 1216]) }
    }

    #[test]
    fn every_operation_is_read_back() {
        let member = MemberId([4; 32]);
        for operation in [
            Operation::Admit { keys: keys(), member, role: Role::Member, invite: Some(InviteId([5; 16])) },
            Operation::Admit { keys: keys(), member, role: Role::Admin, invite: None },
            Operation::Invite {
                id: InviteId([5; 16]),
                verifier: [6; 32],
                role: Role::Guest,
                member: Some(member),
                expires: Timestamp(7),
            },
            Operation::Revoke { id: InviteId([5; 16]) },
            Operation::Succeed { keys: keys(), member, predecessor: AuthorId([8; 32]), proof: [9; 64] },
            Operation::Unknown(77),
        ] {
            let signed = SignedOperation { seen: vec![EnvelopeHash([7; 32])], operation };
            let bytes = signed.encode();
            assert_eq!(SignedOperation::decode(&bytes), Ok(signed));
            for len in 0..bytes.len() {
                assert!(SignedOperation::decode(&bytes[..len]).is_err(), "truncated to {len}");
            }
        }
    }

    #[test]
    fn the_bytes_stay_yesterdays() {
        let revoke = SignedOperation { seen: vec![], operation: Operation::Revoke { id: InviteId([5; 16]) } };
        assert_eq!(data_encoding::HEXLOWER.encode(&revoke.encode()), "930390c41005050505050505050505050505050505");
    }
}
