//! What a rendezvous keeps, and invites as they are shown: the link, an invite's record, a member's record, and what a
//! joiner and an inviter tell each other through a relay. Also what a home keeps of invites it may answer, and of its own
//! requests that wait.

use crate::bounds::{MAX_ADDRESSES, MAX_RELAYS, MAX_TEXT};
use crate::ids::{DeviceId, MemberId, Timestamp};
use crate::operation::Role;
use crate::wire::{FormatError, Reader, Writer};

const VERSION: u64 = 1;
/// What every link starts with; what follows is in the fragment, which no server is sent.
pub const LINK_PREFIX: &str = "syncshell://join#";
/// Plaintext length of a record, the same whatever it holds.
pub const RECORD_LEN: usize = 512;
/// Characters of a link: as many relays and addresses as it may have, few of which are as long as they may be.
const MAX_LINK: usize = 4096;
/// Plaintext length of what a joiner leaves at a relay: a JOIN with its keys and as many addresses as a device has.
pub const RELAYED_LEN: usize = 4096;
/// Kind of the entry that lets other members answer an invite.
pub const KIND_INVITE: u16 = 32;
/// The stream that such entries belong to.
pub const INVITE_STREAM: &str = "invites";
/// Bytes of a request at most: what a joiner leaves, and what sealing adds.
const MAX_SEALED_REQUEST: usize = RELAYED_LEN + 256;
/// Plaintext length of an answer at most: a GRANT with the longest token and as many epochs as may be.
pub const MAX_RELAYED: usize = 1 << 20;

/// An invite as link and QR show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The code's 80 bits.
    pub secret: [u8; 10],
    /// The inviter's device.
    pub device: DeviceId,
    /// Where it can be dialled.
    pub addresses: Vec<String>,
    /// Relays where it can be found if not.
    pub relays: Vec<String>,
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("device", &self.device).field("addresses", &self.addresses).finish()
    }
}

impl Ticket {
    /// The link.
    #[must_use]
    pub fn to_link(&self) -> String {
        let mut writer = Writer::array_of(5);
        writer.uint(VERSION).bin(&self.secret).bin(&self.device.0).texts(&self.addresses).texts(&self.relays);
        format!("{LINK_PREFIX}{}", data_encoding::BASE64URL_NOPAD.encode(&writer.finish()))
    }

    /// Reads a link.
    pub fn from_link(link: &str) -> Result<Self, FormatError> {
        let malformed = FormatError::Malformed { field: "link" };
        let encoded = link.trim().strip_prefix(LINK_PREFIX).ok_or(malformed.clone())?;
        if encoded.len() > MAX_LINK {
            return Err(FormatError::TooMany { field: "link", got: encoded.len(), max: MAX_LINK });
        }
        let bytes = data_encoding::BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| malformed)?;
        let mut reader = Reader::new(&bytes);
        let fields = reader.array("link", 5, 64)?;
        check_version("link", &mut reader)?;
        let ticket = Self {
            secret: reader.fixed("secret")?,
            device: DeviceId(reader.fixed("device")?),
            addresses: reader.texts("addresses", MAX_ADDRESSES)?,
            relays: reader.texts("relays", MAX_RELAYS)?,
        };
        reader.skip("link", fields - 5)?;
        reader.end()?;
        Ok(ticket)
    }
}

/// What became of an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InviteState {
    /// It waits for someone.
    Open,
    /// Someone was admitted.
    Used,
    /// Its time ran out.
    Expired,
    /// It was taken back.
    Revoked,
}

/// What a rendezvous keeps, sealed, for whoever knows the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InviteRecord {
    /// What became of the invite.
    pub state: InviteState,
    /// The inviter's device.
    pub device: DeviceId,
    /// Where it can be dialled.
    pub addresses: Vec<String>,
    /// When the invite ends, by the inviter's clock.
    pub expires: Timestamp,
}

impl InviteRecord {
    /// The plaintext of the record, always [`RECORD_LEN`] bytes; addresses that do not fit are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        for count in (0..=self.addresses.len().min(MAX_ADDRESSES)).rev() {
            let mut bytes = self.encode_with(&self.addresses[..count]);
            if bytes.len() <= RECORD_LEN {
                bytes.resize(RECORD_LEN, 0);
                return bytes;
            }
        }
        unreachable!("BUG: a record without addresses is short")
    }

    fn encode_with(&self, addresses: &[String]) -> Vec<u8> {
        let mut writer = Writer::array_of(5);
        writer
            .uint(VERSION)
            .uint(match self.state {
                InviteState::Open => 0,
                InviteState::Used => 1,
                InviteState::Expired => 2,
                InviteState::Revoked => 3,
            })
            .bin(&self.device.0)
            .texts(addresses)
            .uint(self.expires.0);
        writer.finish()
    }

    /// Reads the plaintext of a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() != RECORD_LEN {
            return Err(FormatError::Malformed { field: "record" });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("record", 5, 64)?;
        check_version("record", &mut reader)?;
        let state = match reader.uint("invite state")? {
            0 => InviteState::Open,
            1 => InviteState::Used,
            2 => InviteState::Expired,
            3 => InviteState::Revoked,
            got => return Err(FormatError::Unknown { field: "invite state", got }),
        };
        let record = Self {
            state,
            device: DeviceId(reader.fixed("device")?),
            addresses: reader.texts("addresses", MAX_ADDRESSES)?,
            expires: Timestamp(reader.uint("expires")?),
        };
        reader.skip("record", fields - 5)?;
        Ok(record)
    }
}

/// What a rendezvous keeps, sealed, for the members of a group: where one of their devices can be dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberRecord {
    /// The device.
    pub device: DeviceId,
    /// Where it can be dialled.
    pub addresses: Vec<String>,
}

impl MemberRecord {
    /// The plaintext of the record, always [`RECORD_LEN`] bytes; addresses that do not fit are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        for count in (0..=self.addresses.len().min(MAX_ADDRESSES)).rev() {
            let mut writer = Writer::array_of(3);
            writer.uint(VERSION).bin(&self.device.0).texts(&self.addresses[..count]);
            let mut bytes = writer.finish();
            if bytes.len() <= RECORD_LEN {
                bytes.resize(RECORD_LEN, 0);
                return bytes;
            }
        }
        unreachable!("BUG: a record without addresses is short")
    }

    /// Reads the plaintext of a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() != RECORD_LEN {
            return Err(FormatError::Malformed { field: "record" });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("record", 3, 64)?;
        check_version("record", &mut reader)?;
        let record =
            Self { device: DeviceId(reader.fixed("device")?), addresses: reader.texts("addresses", MAX_ADDRESSES)? };
        reader.skip("record", fields - 3)?;
        Ok(record)
    }
}

/// What a joiner and an inviter tell each other through a relay, sealed: a frame, and who sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relayed {
    /// Drawn by the joiner for one try; the inviter repeats it.
    pub nonce: [u8; 32],
    /// The sender's device.
    pub device: DeviceId,
    /// The frame: JOIN or JOINED of a joiner, GRANT or ERROR of an inviter.
    pub frame: Vec<u8>,
}

impl Relayed {
    /// The plaintext: [`RELAYED_LEN`] bytes, or the next power of two that suffices.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut writer = Writer::array_of(4);
        writer.uint(VERSION).bin(&self.nonce).bin(&self.device.0).bin(&self.frame);
        let mut bytes = writer.finish();
        let len = bytes.len().next_power_of_two().max(RELAYED_LEN);
        if len > MAX_RELAYED {
            return Err(FormatError::TooMany { field: "frame", got: len, max: MAX_RELAYED });
        }
        bytes.resize(len, 0);
        Ok(bytes)
    }

    /// Reads the plaintext.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_RELAYED {
            return Err(FormatError::TooMany { field: "frame", got: bytes.len(), max: MAX_RELAYED });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("message", 4, 64)?;
        check_version("message", &mut reader)?;
        let relayed = Self {
            nonce: reader.fixed("nonce")?,
            device: DeviceId(reader.fixed("device")?),
            frame: reader.bin("frame", MAX_RELAYED)?.to_vec(),
        };
        reader.skip("message", fields - 4)?;
        Ok(relayed)
    }
}

/// What lets a member answer an invite: sealed to the group by who made it, and kept in each home that may answer.
#[derive(Clone, PartialEq, Eq)]
pub struct SharedInvite {
    /// The stretched code, from which everything of the invite derives.
    pub prk: [u8; 32],
    /// Role the newcomer gets.
    pub role: Role,
    /// The member whose further device is invited, or a new member.
    pub member: Option<MemberId>,
    /// Relays where the code was left.
    pub relays: Vec<String>,
}

impl std::fmt::Debug for SharedInvite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedInvite").field("role", &self.role).field("relays", &self.relays).finish_non_exhaustive()
    }
}

impl SharedInvite {
    /// The body of the entry.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::array_of(5);
        writer.uint(VERSION).bin(&self.prk).uint(self.role.code().into());
        writer.bin_or_nil(self.member.as_ref().map(AsRef::as_ref)).texts(&self.relays);
        writer.finish()
    }

    /// Reads the body of the entry.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("invite", 5, 64)?;
        check_version("invite", &mut reader)?;
        let invite = Self {
            prk: reader.fixed("stretched code")?,
            role: Role::from_code(reader.uint("role")?)?,
            member: reader.fixed_or_nil("member")?.map(MemberId),
            relays: reader.texts("relays", MAX_RELAYS)?,
        };
        reader.skip("invite", fields - 5)?;
        reader.end()?;
        Ok(invite)
    }
}

/// A request to join that a joiner left at a relay, as its home keeps it until there is an answer.
#[derive(Clone, PartialEq, Eq)]
pub struct PendingJoin {
    /// The stretched code.
    pub prk: [u8; 32],
    /// Drawn for this request.
    pub nonce: [u8; 32],
    /// The relay.
    pub relay: String,
    /// Until when an answer may come.
    pub until: Timestamp,
    /// What was left, sealed: the same again is the same request.
    pub request: Vec<u8>,
}

impl std::fmt::Debug for PendingJoin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingJoin").field("relay", &self.relay).field("until", &self.until).finish_non_exhaustive()
    }
}

impl PendingJoin {
    /// The bytes that are kept, sealed.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::array_of(6);
        writer.uint(VERSION).bin(&self.prk).bin(&self.nonce).text(&self.relay).uint(self.until.0).bin(&self.request);
        writer.finish()
    }

    /// Reads what was kept.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes);
        let fields = reader.array("pending join", 6, 64)?;
        check_version("pending join", &mut reader)?;
        let pending = Self {
            prk: reader.fixed("stretched code")?,
            nonce: reader.fixed("nonce")?,
            relay: reader.text("relay", MAX_TEXT)?.to_owned(),
            until: Timestamp(reader.uint("until")?),
            request: reader.bin("request", MAX_SEALED_REQUEST)?.to_vec(),
        };
        reader.skip("pending join", fields - 6)?;
        reader.end()?;
        Ok(pending)
    }
}

fn check_version(what: &'static str, reader: &mut Reader<'_>) -> Result<(), FormatError> {
    match reader.uint("version")? {
        VERSION => Ok(()),
        got => Err(FormatError::Version { what, got, known: VERSION }),
    }
}

const _: () = assert!(MAX_TEXT < RECORD_LEN, "one address of the longest form fits a record");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_back_and_stays_yesterdays() {
        let (addresses, relays) = (vec!["127.0.0.1:4000".into()], vec!["ws://[::1]:1/#k".into()]);
        let ticket = Ticket { secret: [7; 10], device: DeviceId([8; 32]), addresses, relays };
        let link = ticket.to_link();
        expect_test::expect![
            "syncshell://join#lQHECgcHBwcHBwcHBwfEIAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIka4xMjcuMC4wLjE6NDAwMJGvd3M6Ly9bOjoxXToxLyNr"
        ]
        .assert_eq(&link);
        assert_eq!(Ticket::from_link(&format!(" {link}\n")), Ok(ticket));
        for bad in ["", "syncshell://join#", "syncshell://join#!!", "https://x/#AA"] {
            assert!(Ticket::from_link(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_relayed_message_is_read_back_and_its_length_tells_little() {
        let mut message = Relayed { nonce: [1; 32], device: DeviceId([2; 32]), frame: vec![3; 5] };
        let bytes = message.encode().expect("fits");
        expect_test::expect![[r#"
            "9401c4200101010101010101010101010101010101010101010101010101010101010101c4200202020202020202020202020202020202020202020202020202020202020202c4050303030303"
        "#]]
        .assert_debug_eq(&data_encoding::HEXLOWER.encode(&bytes[..77]));
        assert!(bytes.len() == RELAYED_LEN && bytes[77..].iter().all(|byte| *byte == 0));
        assert_eq!(Relayed::decode(&bytes), Ok(message.clone()));
        message.frame = vec![3; 5000];
        assert_eq!(message.encode().map(|bytes| bytes.len()), Ok(8192));
        message.frame = vec![3; MAX_RELAYED];
        assert!(message.encode().is_err());
        assert!(Relayed::decode(&vec![0; MAX_RELAYED + 1]).is_err());
    }

    #[test]
    fn what_lets_a_member_answer_is_read_back_and_stays_yesterdays() {
        let mut invite = SharedInvite {
            prk: [1; 32],
            role: Role::Member,
            member: Some(MemberId([2; 32])),
            relays: vec!["ws://[::1]:1/#k".into()],
        };
        expect_test::expect![[r#"
            "9501c420010101010101010101010101010101010101010101010101010101010101010101c420020202020202020202020202020202020202020202020202020202020202020291af77733a2f2f5b3a3a315d3a312f236b"
        "#]].assert_debug_eq(&data_encoding::HEXLOWER.encode(&invite.encode()));
        assert_eq!(SharedInvite::decode(&invite.encode()), Ok(invite.clone()));
        invite.member = None;
        let bytes = invite.encode();
        assert_eq!(SharedInvite::decode(&bytes), Ok(invite.clone()));
        assert!((0..bytes.len()).all(|len| SharedInvite::decode(&bytes[..len]).is_err()));
        assert!(!format!("{invite:?}").contains("1, 1"), "no secret is shown");
    }

    #[test]
    fn a_pending_join_is_read_back_and_stays_yesterdays() {
        let pending = PendingJoin {
            prk: [1; 32],
            nonce: [2; 32],
            relay: "ws://[::1]:1/#k".into(),
            until: Timestamp(5),
            request: vec![3; 4],
        };
        let bytes = pending.encode();
        expect_test::expect![[r#"
            "9601c4200101010101010101010101010101010101010101010101010101010101010101c4200202020202020202020202020202020202020202020202020202020202020202af77733a2f2f5b3a3a315d3a312f236b05c40403030303"
        "#]].assert_debug_eq(&data_encoding::HEXLOWER.encode(&bytes));
        assert_eq!(PendingJoin::decode(&bytes), Ok(pending));
        assert!((0..bytes.len()).all(|len| PendingJoin::decode(&bytes[..len]).is_err()));
        assert!(PendingJoin::decode(&[0; 9000]).is_err());
    }

    #[test]
    fn a_record_has_one_length_and_drops_addresses_rather_than_grow() {
        let mut record = InviteRecord {
            state: InviteState::Used,
            device: DeviceId([8; 32]),
            addresses: vec!["127.0.0.1:4000".into()],
            expires: Timestamp(5),
        };
        let bytes = record.encode();
        assert_eq!(bytes.len(), RECORD_LEN);
        assert_eq!(InviteRecord::decode(&bytes), Ok(record.clone()));
        let member = MemberRecord { device: record.device, addresses: vec!["y".repeat(200); 3] };
        let read = MemberRecord::decode(&member.encode()).expect("fits");
        assert_eq!((read.device, read.addresses.len()), (member.device, 2));
        record.addresses = vec!["x".repeat(200); 16];
        let short = InviteRecord::decode(&record.encode()).expect("fits");
        assert_eq!(short.addresses.len(), 2);
    }
}
