//! What a rendezvous keeps, and invites as they are shown: the link, an invite's record, a member's record, and what a
//! joiner and an inviter tell each other through a relay.

use crate::bounds::{MAX_ADDRESSES, MAX_RELAYS, MAX_TEXT};
use crate::ids::{DeviceId, Timestamp};
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
