//! Membership operations: the clear payload of a membership envelope.

use crate::bounds::{MAX_CUTS, MAX_OPERATION, MAX_SEEN};
use crate::charter::{read_keys, write_keys};
use crate::ids::{AuthorId, AuthorKeys, EnvelopeHash, EpochId, InviteId, MemberId, Number, Timestamp};
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

    /// Whether removals by this role count: of members whose role is no stronger.
    #[must_use]
    pub const fn may_remove(self) -> bool {
        self.may_invite()
    }

    /// Whether epochs made by this role are sealed in: whoever writes must be able to.
    #[must_use]
    pub const fn may_rotate(self) -> bool {
        !matches!(self, Self::ReadOnly)
    }
}

/// That an author wants to be admitted under its keys: its proof from a JOIN, so that nobody admits it under others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consent {
    /// What the JOIN was bound to.
    pub binding: [u8; 32],
    /// The author's signature.
    pub proof: [u8; 64],
}

/// The last envelope of a feed that counts; number 0 where none does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    /// Whose feed it is.
    pub author: AuthorId,
    /// The number of that envelope.
    pub number: Number,
    /// Its hash.
    pub hash: EnvelopeHash,
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
        /// The author's own word.
        consent: Consent,
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
    /// A tombstone: a member is removed, with all its authors.
    Remove {
        /// The member.
        member: MemberId,
        /// Where each of its feeds ends; those that are not named end before their first envelope.
        cuts: Vec<Cut>,
    },
    /// Another member signs a tombstone too.
    Approve {
        /// The envelope of the tombstone.
        tombstone: EnvelopeHash,
        /// Where each feed ends by this one's knowledge: of two ends the lower counts.
        cuts: Vec<Cut>,
    },
    /// A member takes authors of its own out.
    Withdraw {
        /// The member.
        member: MemberId,
        /// The authors, and where their feeds end.
        cuts: Vec<Cut>,
    },
    /// An epoch was made by somebody who had seen what this operation has seen.
    Rotate {
        /// The epoch.
        epoch: EpochId,
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
            Operation::Admit { keys, member, role, invite, consent } => {
                head(1, 6);
                write_keys(&mut writer, keys);
                writer.bin(&member.0).uint(role.code().into()).bin_or_nil(invite.as_ref().map(AsRef::as_ref));
                writer.bin(&consent.binding).bin(&consent.proof);
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
            Operation::Remove { member, cuts } => {
                head(5, 2);
                writer.bin(&member.0);
                write_cuts(&mut writer, cuts);
            }
            Operation::Approve { tombstone, cuts } => {
                head(6, 2);
                writer.bin(&tombstone.0);
                write_cuts(&mut writer, cuts);
            }
            Operation::Withdraw { member, cuts } => {
                head(7, 2);
                writer.bin(&member.0);
                write_cuts(&mut writer, cuts);
            }
            Operation::Rotate { epoch } => {
                head(8, 1);
                writer.array(2).uint(epoch.number.into()).bin(&epoch.hash);
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
                let read = known(6)?;
                let keys = read_keys(&mut reader)?;
                let member = MemberId(reader.fixed("member")?);
                let role = Role::from_code(reader.uint("role")?)?;
                let invite = reader.fixed_or_nil("invite")?.map(InviteId);
                let consent = Consent { binding: reader.fixed("binding")?, proof: reader.fixed("proof")? };
                (Operation::Admit { keys, member, role, invite, consent }, read)
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
            5 => {
                let read = known(2)?;
                let member = MemberId(reader.fixed("member")?);
                (Operation::Remove { member, cuts: read_cuts(&mut reader)? }, read)
            }
            6 => {
                let read = known(2)?;
                let tombstone = EnvelopeHash(reader.fixed("tombstone")?);
                (Operation::Approve { tombstone, cuts: read_cuts(&mut reader)? }, read)
            }
            7 => {
                let read = known(2)?;
                let member = MemberId(reader.fixed("member")?);
                (Operation::Withdraw { member, cuts: read_cuts(&mut reader)? }, read)
            }
            8 => {
                let read = known(1)?;
                let fields = reader.array("epoch", 2, 64)?;
                let epoch = EpochId { number: reader.uint32("epoch number")?, hash: reader.fixed("epoch hash")? };
                reader.skip("epoch", fields - 2)?;
                (Operation::Rotate { epoch }, read)
            }
            code => (Operation::Unknown(code), 2),
        };
        reader.skip("operation", fields - read)?;
        reader.end()?;
        Ok(Self { seen, operation })
    }
}

fn write_cuts(writer: &mut Writer, cuts: &[Cut]) {
    writer.array(cuts.len());
    for Cut { author, number, hash } in cuts {
        writer.array(3).bin(&author.0).uint(number.0).bin(&hash.0);
    }
}

fn read_cuts(reader: &mut Reader<'_>) -> Result<Vec<Cut>, FormatError> {
    let count = reader.array("cuts", 0, MAX_CUTS)?;
    let cut = |reader: &mut Reader<'_>| {
        let fields = reader.array("cut", 3, 64)?;
        let (author, number) = (AuthorId(reader.fixed("author")?), Number(reader.uint("number")?));
        let cut = Cut { author, number, hash: EnvelopeHash(reader.fixed("hash")?) };
        reader.skip("cut", fields - 3)?;
        Ok(cut)
    };
    (0..count).map(|_| cut(reader)).collect()
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
        let consent = Consent { binding: [1; 32], proof: [2; 64] };
        for operation in [
            Operation::Admit { keys: keys(), member, role: Role::Member, invite: Some(InviteId([5; 16])), consent },
            Operation::Admit { keys: keys(), member, role: Role::Admin, invite: None, consent },
            Operation::Remove { member, cuts: vec![cut(), cut()] },
            Operation::Approve { tombstone: EnvelopeHash([3; 32]), cuts: vec![] },
            Operation::Withdraw { member, cuts: vec![cut()] },
            Operation::Rotate { epoch: EpochId { number: 7, hash: [8; 32] } },
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

    fn cut() -> Cut {
        Cut { author: AuthorId([6; 32]), number: Number(300), hash: EnvelopeHash([7; 32]) }
    }

    #[test]
    fn no_operation_names_more_ends_than_the_bound() {
        let signed = |cuts| SignedOperation {
            seen: vec![EnvelopeHash([1; 32]); MAX_SEEN],
            operation: Operation::Remove { member: MemberId([4; 32]), cuts: vec![cut(); cuts] },
        };
        assert!(SignedOperation::decode(&signed(MAX_CUTS).encode()).is_ok());
        let refused = SignedOperation::decode(&signed(MAX_CUTS + 1).encode());
        assert_eq!(refused, Err(FormatError::TooMany { field: "cuts", got: MAX_CUTS + 1, max: MAX_CUTS }));
    }

    #[test]
    fn the_bytes_stay_yesterdays() {
        let hex = |operation| data_encoding::HEXLOWER.encode(&SignedOperation { seen: vec![], operation }.encode());
        let (four, six, seven) = ("04".repeat(32), "06".repeat(32), "07".repeat(32));
        let cuts = format!("9193c420{six}cd012cc420{seven}");
        let member = MemberId([4; 32]);
        assert_eq!(hex(Operation::Remove { member, cuts: vec![cut()] }), format!("940590c420{four}{cuts}"));
        let tombstone = EnvelopeHash([4; 32]);
        assert_eq!(hex(Operation::Approve { tombstone, cuts: vec![cut()] }), format!("940690c420{four}{cuts}"));
        assert_eq!(hex(Operation::Withdraw { member, cuts: vec![cut()] }), format!("940790c420{four}{cuts}"));
        let epoch = EpochId { number: 2, hash: [4; 32] };
        assert_eq!(hex(Operation::Rotate { epoch }), format!("9308909202c420{four}"));
        let revoke = SignedOperation { seen: vec![], operation: Operation::Revoke { id: InviteId([5; 16]) } };
        assert_eq!(data_encoding::HEXLOWER.encode(&revoke.encode()), "930390c41005050505050505050505050505050505");
    }
}
