//! The envelope: a sealed, signed entry as it rests and travels, byte for byte unchanged for ever.
//!
//! Decoding is a view into the received bytes: nothing is re-encoded, so fields of a later version survive being forwarded.

use std::fmt;
use std::ops::Range;

use crate::bounds::MAX_ENVELOPE;
use crate::ids::{AuthorId, BlobId, EnvelopeHash, EpochId, GroupId, Number, Timestamp};
use crate::wire::{FormatError, Reader, Writer};

/// Version of the envelope format.
pub const ENVELOPE_VERSION: u64 = 1;
/// Fields every version has, the signature included.
const FIELDS: usize = 16;
/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
/// `bin 8` header of the 64-byte signature, the only encoding accepted.
const SIGNATURE_HEADER: [u8; 2] = [0xc4, 64];
/// Length of the signature element.
const SIGNATURE_ELEMENT: usize = SIGNATURE_HEADER.len() + 64;

/// What an envelope asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum EnvelopeType {
    /// Keep this entry.
    Push,
    /// This entry takes back an earlier one.
    Delete,
}

impl EnvelopeType {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Push => 0x10,
            Self::Delete => 0x40,
        }
    }

    fn from_code(code: u64) -> Result<Self, FormatError> {
        match code {
            0x10 => Ok(Self::Push),
            0x40 => Ok(Self::Delete),
            got => Err(FormatError::Unknown { field: "envelope type", got }),
        }
    }
}

/// Who can read an envelope's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Class {
    /// Members: content.
    Sealed,
    /// Everyone who stores it: author keys, admissions and removals.
    Membership,
    /// Its recipients: nameless key slots.
    Rotation,
}

impl Class {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Sealed => 0,
            Self::Membership => 1,
            Self::Rotation => 2,
        }
    }

    fn from_code(code: u64) -> Result<Self, FormatError> {
        match code {
            0 => Ok(Self::Sealed),
            1 => Ok(Self::Membership),
            2 => Ok(Self::Rotation),
            got => Err(FormatError::Unknown { field: "class", got }),
        }
    }
}

/// Every header field of an envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// PUSH or DELETE.
    pub kind: EnvelopeType,
    /// Whose feed it belongs to.
    pub sender: AuthorId,
    /// The group.
    pub group: GroupId,
    /// When its author says it was made; information only.
    pub timestamp: Timestamp,
    /// Drawn for this envelope alone.
    pub nonce: [u8; 24],
    /// The author's name for it.
    pub blob_id: BlobId,
    /// Position in the feed.
    pub number: Number,
    /// Hash of the feed's previous envelope.
    pub previous: EnvelopeHash,
    /// Who can read the payload.
    pub class: Class,
    /// Epoch the payload is sealed in, or which it makes.
    pub epoch: EpochId,
    /// Commitment to the key the payload is sealed under; zeros where it is not sealed.
    pub commitment: [u8; 32],
}

/// An envelope under construction: laid out with room for its payload, not yet sealed or signed.
pub struct Draft {
    bytes: Vec<u8>,
    payload: Range<usize>,
}

impl Draft {
    /// Lays out the header around a payload of zeros.
    ///
    /// # Errors
    /// When the envelope would be larger than [`MAX_ENVELOPE`].
    pub fn new(header: &Header, payload_len: usize) -> Result<Self, FormatError> {
        if payload_len > MAX_ENVELOPE {
            return Err(FormatError::TooMany { field: "payload", got: payload_len, max: MAX_ENVELOPE });
        }
        let mut writer = Writer::array_of(FIELDS);
        writer
            .uint(ENVELOPE_VERSION)
            .uint(header.kind.code().into())
            .bin(&header.sender.0)
            .bin(&header.group.0)
            .uint(0)
            .uint(header.timestamp.0)
            .bin(&header.nonce)
            .bin_header(payload_len);
        let start = writer.len();
        writer
            .raw(&vec![0; payload_len])
            .bin(&header.blob_id.0)
            .uint(header.number.0)
            .bin(&header.previous.0)
            .uint(header.class.code().into())
            .uint(header.epoch.number.into())
            .bin(&header.epoch.hash)
            .bin(&header.commitment);
        let bytes = writer.finish();
        let total = bytes.len() + SIGNATURE_ELEMENT;
        if total > MAX_ENVELOPE {
            return Err(FormatError::TooMany { field: "envelope", got: total, max: MAX_ENVELOPE });
        }
        Ok(Self { bytes, payload: start..start + payload_len })
    }

    /// Signed bytes without the payload's content: what a seal binds itself to.
    #[must_use]
    pub fn associated_data(&self) -> Vec<u8> {
        cut(&self.bytes, &self.payload)
    }

    /// Room for the payload.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.payload.clone()]
    }

    /// What the signature covers.
    #[must_use]
    pub fn signed_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Completes the envelope.
    #[must_use]
    pub fn sign(mut self, signature: &[u8; 64]) -> Vec<u8> {
        self.bytes.extend_from_slice(&SIGNATURE_HEADER);
        self.bytes.extend_from_slice(signature);
        self.bytes
    }
}

/// A view of received bytes that have the form of an envelope; nothing in it is verified.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope<'a> {
    bytes: &'a [u8],
    payload: Range<usize>,
    /// The header fields.
    pub header: Header,
}

impl<'a> Envelope<'a> {
    /// Looks at bytes as an envelope.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_ENVELOPE {
            return Err(FormatError::TooMany { field: "envelope", got: bytes.len(), max: MAX_ENVELOPE });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("envelope", FIELDS, MAX_FIELDS)?;
        let version = reader.uint("version")?;
        if version != ENVELOPE_VERSION {
            return Err(FormatError::Version { what: "envelope", got: version, known: ENVELOPE_VERSION });
        }
        let kind = EnvelopeType::from_code(reader.uint("envelope type")?)?;
        let sender = AuthorId(reader.fixed("sender")?);
        let group = GroupId(reader.fixed("group")?);
        if reader.uint("cursor")? != 0 {
            return Err(FormatError::Malformed { field: "cursor" });
        }
        let timestamp = Timestamp(reader.uint("timestamp")?);
        let nonce = reader.fixed("nonce")?;
        let payload_len = reader.bin("payload", MAX_ENVELOPE)?.len();
        let payload_end = bytes.len() - reader.rest().len();
        let header = Header {
            kind,
            sender,
            group,
            timestamp,
            nonce,
            blob_id: BlobId(reader.fixed("blob id")?),
            number: Number(reader.uint("number")?),
            previous: EnvelopeHash(reader.fixed("previous")?),
            class: Class::from_code(reader.uint("class")?)?,
            epoch: EpochId { number: reader.uint32("epoch number")?, hash: reader.fixed("epoch hash")? },
            commitment: reader.fixed("commitment")?,
        };
        reader.skip("later field", fields - FIELDS)?;
        let rest = reader.rest();
        if rest.len() > SIGNATURE_ELEMENT {
            return Err(FormatError::Trailing(rest.len() - SIGNATURE_ELEMENT));
        }
        if rest.len() < SIGNATURE_ELEMENT || rest[..2] != SIGNATURE_HEADER {
            return Err(FormatError::Malformed { field: "signature" });
        }
        check_header(&header)?;
        Ok(Self { bytes, payload: payload_end - payload_len..payload_end, header })
    }

    /// The bytes as received.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The payload: ciphertext, operation or rotation, by class.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.payload.clone()]
    }

    /// What the signature covers.
    #[must_use]
    pub fn signed_bytes(&self) -> &'a [u8] {
        &self.bytes[..self.bytes.len() - SIGNATURE_ELEMENT]
    }

    /// The signature.
    #[must_use]
    pub fn signature(&self) -> &'a [u8; 64] {
        self.bytes.last_chunk().expect("BUG: parse saw the signature")
    }

    /// Signed bytes without the payload's content.
    #[must_use]
    pub fn associated_data(&self) -> Vec<u8> {
        cut(self.signed_bytes(), &self.payload)
    }

    /// BLAKE3 over signed bytes and signature: what the next envelope names as its previous one.
    #[must_use]
    pub fn hash(&self) -> EnvelopeHash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.signed_bytes()).update(self.signature());
        EnvelopeHash(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for Envelope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope").field("header", &self.header).field("len", &self.bytes.len()).finish()
    }
}

/// What must hold between header fields whoever signed them.
fn check_header(header: &Header) -> Result<(), FormatError> {
    if header.number.0 == 0 {
        return Err(FormatError::Malformed { field: "number" });
    }
    if (header.number.0 == 1) != (header.previous == EnvelopeHash::NONE) {
        return Err(FormatError::Malformed { field: "previous" });
    }
    Ok(())
}

fn cut(bytes: &[u8], payload: &Range<usize>) -> Vec<u8> {
    [&bytes[..payload.start], &bytes[payload.end..]].concat()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            kind: EnvelopeType::Push,
            sender: AuthorId([0x11; 32]),
            group: GroupId([0x22; 32]),
            timestamp: Timestamp(1_795_000_000_000),
            nonce: [0x33; 24],
            blob_id: BlobId([0x44; 16]),
            number: Number(7),
            previous: EnvelopeHash([0x55; 32]),
            class: Class::Sealed,
            epoch: EpochId { number: 1, hash: [0x66; 32] },
            commitment: [0x77; 32],
        }
    }

    fn sample(header: &Header) -> Vec<u8> {
        let mut draft = Draft::new(header, 3).expect("small");
        draft.payload_mut().copy_from_slice(b"abc");
        draft.sign(&[0x88; 64])
    }

    /// One line per field, as `docs/protocol.md` section 3 lists them.
    fn annotate(bytes: &[u8]) -> String {
        let names = [
            "version",
            "type",
            "sender",
            "group",
            "cursor",
            "timestamp",
            "nonce",
            "payload",
            "blob id",
            "number",
            "previous",
            "class",
            "epoch number",
            "epoch hash",
            "commitment",
            "signature",
        ];
        let mut reader = Reader::new(bytes);
        reader.array("envelope", 16, 16).expect("array");
        let mut lines = vec![format!("{:<13} {}", "array", hex(&bytes[..3]))];
        for name in names {
            let before = reader.rest();
            reader.skip("field", 1).expect("field");
            lines.push(format!("{name:<13} {}", hex(&before[..before.len() - reader.rest().len()])));
        }
        lines.join("\n")
    }

    fn hex(bytes: &[u8]) -> String {
        data_encoding::HEXLOWER.encode(bytes)
    }

    #[test]
    fn the_bytes_are_those_of_the_protocol_page() {
        let bytes = sample(&header());
        expect![[r#"
            array         dc0010
            version       01
            type          10
            sender        c4201111111111111111111111111111111111111111111111111111111111111111
            group         c4202222222222222222222222222222222222222222222222222222222222222222
            cursor        00
            timestamp     cf000001a1ee565e00
            nonce         c418333333333333333333333333333333333333333333333333
            payload       c403616263
            blob id       c41044444444444444444444444444444444
            number        07
            previous      c4205555555555555555555555555555555555555555555555555555555555555555
            class         00
            epoch number  01
            epoch hash    c4206666666666666666666666666666666666666666666666666666666666666666
            commitment    c4207777777777777777777777777777777777777777777777777777777777777777
            signature     c44088888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888"#]]
        .assert_eq(&annotate(&bytes));
        let envelope = Envelope::parse(&bytes).expect("own bytes");
        assert_eq!(envelope.header, header());
        assert_eq!(envelope.payload(), b"abc");
    }

    #[test]
    fn a_field_of_a_later_version_is_signed_hashed_and_kept() {
        let bytes = sample(&header());
        let (signed, signature) = bytes.split_at(bytes.len() - SIGNATURE_ELEMENT);
        let mut longer = signed.to_vec();
        longer[2] = 17;
        longer.extend_from_slice(&[0x92, 0x01, 0xa1, b'x']);
        longer.extend_from_slice(signature);
        let envelope = Envelope::parse(&longer).expect("later field");
        assert_eq!(envelope.bytes(), longer);
        assert!(envelope.signed_bytes().ends_with(&[0x92, 0x01, 0xa1, b'x']));
        assert!(envelope.associated_data().ends_with(&[0x92, 0x01, 0xa1, b'x']));
        assert_ne!(envelope.hash(), Envelope::parse(&bytes).expect("short").hash());
    }

    #[test]
    fn other_forms_are_refused() {
        let good = sample(&header());
        let refused = |bytes: &[u8]| Envelope::parse(bytes).expect_err("refused").to_string();
        let mut version = good.clone();
        version[3] = 9;
        expect!["envelope is of version 9, this program reads 1; update it"].assert_eq(&refused(&version));
        let mut kind = good.clone();
        kind[4] = 0x7f;
        expect!["envelope type has the unknown value 127"].assert_eq(&refused(&kind));
        let mut trailing = good.clone();
        trailing.push(0);
        expect!["1 bytes follow the end"].assert_eq(&refused(&trailing));
        expect!["malformed signature"].assert_eq(&refused(&good[..good.len() - 1]));
        let mut wide = good[..good.len() - SIGNATURE_ELEMENT].to_vec();
        wide.extend_from_slice(&[0xc5, 0, 64]);
        wide.extend_from_slice(&[0x88; 64]);
        expect!["1 bytes follow the end"].assert_eq(&refused(&wide));
        let zero = sample(&Header { number: Number(0), ..header() });
        expect!["malformed number"].assert_eq(&refused(&zero));
        let first = sample(&Header { number: Number(1), ..header() });
        expect!["malformed previous"].assert_eq(&refused(&first));
        let huge = vec![0; MAX_ENVELOPE + 1];
        expect!["envelope has 1310721, at most 1310720 are allowed"].assert_eq(&refused(&huge));
        for len in 0..good.len() {
            assert!(Envelope::parse(&good[..len]).is_err(), "truncated to {len}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(number in 2u64.., timestamp: u64, payload in proptest::collection::vec(any::<u8>(), 0..500), epoch: u32) {
            let header = Header { number: Number(number), timestamp: Timestamp(timestamp), epoch: EpochId { number: epoch, hash: [1; 32] }, ..header() };
            let mut draft = Draft::new(&header, payload.len()).expect("small");
            draft.payload_mut().copy_from_slice(&payload);
            let associated = draft.associated_data();
            let bytes = draft.sign(&[9; 64]);
            let envelope = Envelope::parse(&bytes).expect("own bytes");
            prop_assert_eq!(&envelope.header, &header);
            prop_assert_eq!(envelope.payload(), &payload[..]);
            prop_assert_eq!(envelope.associated_data(), associated);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Envelope::parse(&bytes);
        }

        #[test]
        fn a_flipped_byte_changes_what_is_hashed(at in 0usize..300, bit in 0u8..8) {
            let good = sample(&header());
            let mut bad = good.clone();
            let at = at % good.len();
            bad[at] ^= 1 << bit;
            if let Ok(envelope) = Envelope::parse(&bad) {
                prop_assert_ne!(envelope.hash(), Envelope::parse(&good).expect("good").hash());
            }
        }
    }
}
