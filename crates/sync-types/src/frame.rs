//! Frames: the messages between two replicas; they carry envelopes and what surrounds them.

use std::collections::BTreeSet;

use crate::bounds::{
    MAX_ADDRESSES, MAX_CHARTER, MAX_ENVELOPE, MAX_EPOCHS_SEALED, MAX_FEEDS, MAX_FRAME, MAX_FRAME_ENVELOPES, MAX_NAME,
    MAX_RANGES, MAX_RELAYS, MAX_TEXT, MAX_TOKEN, MAX_WAKE_URL, MAX_WANTS,
};
use crate::charter::{read_keys, write_keys};
use crate::ids::{AuthorId, AuthorKeys, Check, Cursor, EnvelopeHash, GroupId, InviteId, Number, ReplicaId};
use crate::wire::{FormatError, Reader, Writer};

const VERSION: u64 = 1;

/// Inclusive range of numbers in a feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// First number.
    pub first: Number,
    /// Last number.
    pub last: Number,
}

impl Range {
    /// Whether a number lies inside.
    #[must_use]
    pub fn contains(&self, number: Number) -> bool {
        self.first <= number && number <= self.last
    }
}

/// What a replica holds of one feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedHave {
    /// The feed.
    pub author: AuthorId,
    /// Numbers held, ascending and apart; claiming less than is held is safe.
    pub ranges: Vec<Range>,
    /// Hash of the envelope at the last number of each range: the chain vouches for the rest of it.
    pub heads: Vec<EnvelopeHash>,
    /// Lowest number with two known hashes.
    pub fork: Option<Number>,
    /// BLAKE3 over the sorted hashes held from the fork on; zeros without a fork.
    pub digest: [u8; 32],
}

impl FeedHave {
    /// Whether a number is among the ranges.
    #[must_use]
    pub fn contains(&self, number: Number) -> bool {
        self.ranges.iter().any(|range| range.contains(number))
    }

    /// The highest number held.
    #[must_use]
    pub fn highest(&self) -> Option<Number> {
        self.ranges.last().map(|range| range.last)
    }

    /// The last number of each range, and the hash there.
    pub fn ends(&self) -> impl Iterator<Item = (Number, EnvelopeHash)> {
        self.ranges.iter().zip(&self.heads).map(|(range, head)| (range.last, *head))
    }
}

/// An envelope with the cursor its replica gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carried {
    /// Position in the sending replica.
    pub cursor: Cursor,
    /// The envelope, byte for byte.
    pub envelope: Vec<u8>,
}

/// Which entries a PULL asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scope {
    /// Membership and rotations, before anything else.
    Membership,
    /// Everything.
    All,
}

/// Numbers of a feed someone lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Want {
    /// The feed.
    pub author: AuthorId,
    /// The numbers.
    pub range: Range,
}

/// Why a peer ends a session or refuses a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// No invite answers to this code.
    InviteWrong,
    /// The invite was used.
    InviteUsed,
    /// The invite is too old.
    InviteExpired,
    /// The invite was taken back.
    InviteRevoked,
    /// Unknown group, or no member of it.
    Refused,
    /// No longer a member.
    Removed,
    /// The frame cannot be read or comes at the wrong time.
    Protocol,
    /// The peer cannot go on, a full disk for instance.
    Unavailable,
    /// A relay takes no envelope of this size.
    TooLarge,
    /// The group uses all the room that a relay gives it.
    GroupFull,
    /// A relay has no room left for anyone.
    StorageFull,
    /// More was sent to a relay than it takes in a minute.
    TooFast,
    /// A relay holds as many groups as it will.
    TooManyGroups,
    /// A relay takes new groups only from who shows its operator's token.
    RegistrationNeeded,
    /// A code of a later version.
    Unknown(u64),
}

impl ErrorCode {
    const CODES: [(Self, u64); 14] = [
        (Self::InviteWrong, 10),
        (Self::InviteUsed, 11),
        (Self::InviteExpired, 12),
        (Self::InviteRevoked, 13),
        (Self::Refused, 20),
        (Self::Removed, 21),
        (Self::Protocol, 30),
        (Self::Unavailable, 31),
        (Self::TooLarge, 40),
        (Self::GroupFull, 41),
        (Self::StorageFull, 42),
        (Self::TooFast, 43),
        (Self::TooManyGroups, 44),
        (Self::RegistrationNeeded, 45),
    ];

    /// Whether the session goes on after it: the peer takes no entries for now, and gives what it has.
    #[must_use]
    pub fn is_full(self) -> bool {
        matches!(self, Self::GroupFull | Self::StorageFull)
    }

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u64 {
        match self {
            Self::Unknown(code) => code,
            known => Self::CODES.iter().find(|(named, _)| *named == known).map_or(0, |(_, code)| *code),
        }
    }

    fn from_code(code: u64) -> Self {
        Self::CODES.iter().find(|(_, number)| *number == code).map_or(Self::Unknown(code), |(named, _)| *named)
    }
}

/// One message between two replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Frame {
    /// Proves an author, bound to the channel, and shows its token.
    Hello {
        /// The group meant.
        group: GroupId,
        /// Who speaks.
        author: AuthorId,
        /// The speaker's database.
        replica: ReplicaId,
        /// Admissions from the founder's side to the author.
        token: Vec<Vec<u8>>,
        /// The author's signature over the channel.
        proof: [u8; 64],
    },
    /// Names the replica, its newest cursor and how to reach it.
    Welcome {
        /// The speaker's database.
        replica: ReplicaId,
        /// Its newest cursor.
        max_cursor: Cursor,
        /// The check stored beside that cursor.
        check: Check,
        /// The device's name.
        name: String,
        /// Where the device can be dialled.
        addresses: Vec<String>,
        /// Drawn at the device's start, so that a peer tells a restart from a second connection.
        incarnation: [u8; 8],
    },
    /// Shows a blind replica the group that the HELLO after it is about.
    Charter {
        /// The group's charter.
        charter: Vec<u8>,
        /// The operator's token, which lets the group be new there; empty for none.
        registration: Vec<u8>,
        /// What the device will show where connections begin that are to become direct; none if it does not need to.
        pass: Option<[u8; 16]>,
    },
    /// New entries.
    Push {
        /// The entries.
        entries: Vec<Carried>,
        /// Everything the receiver lacks up to here has now been sent.
        max_cursor: Cursor,
        /// The check stored beside that cursor.
        check: Check,
    },
    /// Entries the receiver holds durably.
    PushAck {
        /// Everything sent up to this cursor of the sender of those entries.
        cursor: Cursor,
    },
    /// Asks for entries.
    Pull {
        /// Repeated in the answer.
        request: u32,
        /// Which entries.
        scope: Scope,
        /// Last cursor seen from this replica.
        after: Cursor,
        /// The check seen with it.
        check: Check,
        /// Entries per answer.
        limit: u32,
        /// What is held.
        have: Vec<FeedHave>,
        /// What is not wanted.
        covered: Vec<FeedHave>,
    },
    /// Answers a PULL or a WANT.
    PullResponse {
        /// The request answered.
        request: u32,
        /// The entries.
        entries: Vec<Carried>,
        /// Everything wanted up to here has now been sent.
        max_cursor: Cursor,
        /// The check stored beside that cursor.
        check: Check,
        /// Whether another answer follows.
        has_more: bool,
        /// The pair of cursor and check was not known: this starts from zero.
        reset: bool,
        /// First cursor this replica still holds.
        holds_from: Cursor,
    },
    /// Asks for entries someone's feed lacks.
    Want {
        /// Repeated in the answer.
        request: u32,
        /// The numbers lacking.
        wants: Vec<Want>,
    },
    /// Last values of authors.
    Presence {
        /// Sealed slots.
        slots: Vec<Vec<u8>>,
    },
    /// A hint that something is new.
    Notify {
        /// Newest cursor.
        max_cursor: Cursor,
    },
    /// Asks a relay to wake this device when something arrives for it while it is away.
    Wake {
        /// Where an empty POST does that; empty for no longer.
        url: String,
    },
    /// Asks for an admission.
    Join {
        /// The invite.
        invite: InviteId,
        /// The author to admit.
        keys: AuthorKeys,
        /// The joiner's database.
        replica: ReplicaId,
        /// The device's name.
        name: String,
        /// Where the device can be dialled.
        addresses: Vec<String>,
        /// Knowledge of the code, bound to the channel.
        invite_proof: [u8; 64],
        /// Possession of the author key, bound to the channel.
        author_proof: [u8; 64],
    },
    /// Grants an admission.
    Grant(Grant),
    /// The grant is stored.
    Joined,
    /// A refusal; the channel closes after it.
    Error {
        /// What is wrong.
        code: ErrorCode,
        /// The same in words.
        text: String,
    },
    /// A frame of a later version: counted and skipped.
    Unknown(u64),
}

/// Everything a newcomer needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The group's charter.
    pub charter: Vec<u8>,
    /// The newcomer's token.
    pub token: Vec<Vec<u8>>,
    /// Epochs sealed for the newcomer.
    pub epochs: Vec<u8>,
    /// The inviter's database.
    pub replica: ReplicaId,
    /// Name of the inviter's device.
    pub name: String,
    /// Where the inviter's device can be dialled.
    pub addresses: Vec<String>,
    /// The relays that the group uses.
    pub relays: Vec<String>,
    /// The inviter's knowledge of the code, bound to the channel and to this grant.
    pub proof: [u8; 32],
}

impl Grant {
    /// What the inviter's proof covers: BLAKE3 of the frame before the proof.
    #[must_use]
    pub fn proven_hash(&self) -> [u8; 32] {
        *blake3::hash(&self.head().finish()).as_bytes()
    }

    fn head(&self) -> Writer {
        let mut writer = Writer::array_of(10);
        writer.uint(VERSION).uint(0x51).bin(&self.charter).bins(&self.token).bin(&self.epochs);
        writer.bin(&self.replica.0).text(&self.name).texts(&self.addresses).texts(&self.relays);
        writer
    }
}

impl Frame {
    /// A refusal, its words cut to what a frame may hold.
    #[must_use]
    pub fn error(code: ErrorCode, text: &str) -> Self {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self::Error { code, text: text[..end].to_owned() }
    }

    /// The bytes of the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut head = |code: u64, fields: usize| {
            writer.array(fields + 2).uint(VERSION).uint(code);
        };
        match self {
            Self::Hello { group, author, replica, token, proof } => {
                head(0x01, 5);
                writer.bin(&group.0).bin(&author.0).bin(&replica.0).bins(token).bin(proof);
            }
            Self::Welcome { replica, max_cursor, check, name, addresses, incarnation } => {
                head(0x02, 6);
                writer.bin(&replica.0).uint(max_cursor.0).bin(&check.0).text(name).texts(addresses).bin(incarnation);
            }
            Self::Charter { charter, registration, pass } => {
                head(0x03, 2 + usize::from(pass.is_some()));
                writer.bin(charter).bin(registration);
                if let Some(pass) = pass {
                    writer.bin(pass);
                }
            }
            Self::Push { entries, max_cursor, check } => {
                head(0x10, 3);
                write_carried(&mut writer, entries);
                writer.uint(max_cursor.0).bin(&check.0);
            }
            Self::PushAck { cursor } => {
                head(0x11, 1);
                writer.uint(cursor.0);
            }
            Self::Pull { request, scope, after, check, limit, have, covered } => {
                head(0x20, 7);
                writer.uint((*request).into()).uint(match scope {
                    Scope::Membership => 0,
                    Scope::All => 1,
                });
                writer.uint(after.0).bin(&check.0).uint((*limit).into());
                write_have(&mut writer, have);
                write_have(&mut writer, covered);
            }
            Self::PullResponse { request, entries, max_cursor, check, has_more, reset, holds_from } => {
                head(0x21, 7);
                writer.uint((*request).into());
                write_carried(&mut writer, entries);
                writer.uint(max_cursor.0).bin(&check.0).bool(*has_more).bool(*reset).uint(holds_from.0);
            }
            Self::Want { request, wants } => {
                head(0x22, 2);
                writer.uint((*request).into()).array(wants.len());
                for Want { author, range } in wants {
                    writer.array(3).bin(&author.0).uint(range.first.0).uint(range.last.0);
                }
            }
            Self::Presence { slots } => {
                head(0x30, 1);
                writer.bins(slots);
            }
            Self::Wake { url } => {
                head(0x32, 1);
                writer.text(url);
            }
            Self::Notify { max_cursor } => {
                head(0x31, 1);
                writer.uint(max_cursor.0);
            }
            Self::Join { invite, keys, replica, name, addresses, invite_proof, author_proof } => {
                head(0x50, 7);
                writer.bin(&invite.0);
                write_keys(&mut writer, keys);
                writer.bin(&replica.0).text(name).texts(addresses).bin(invite_proof).bin(author_proof);
            }
            Self::Grant(grant) => {
                writer = grant.head();
                writer.bin(&grant.proof);
            }
            Self::Joined => head(0x52, 0),
            Self::Error { code, text } => {
                head(0xff, 2);
                writer.uint(code.code()).text(text);
            }
            Self::Unknown(code) => head(*code, 0),
        }
        writer.finish()
    }

    /// Reads a frame.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_FRAME {
            return Err(FormatError::TooMany { field: "frame", got: bytes.len(), max: MAX_FRAME });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("frame", 2, 64)?;
        let version = reader.uint("frame version")?;
        if version != VERSION {
            return Err(FormatError::Version { what: "frame", got: version, known: VERSION });
        }
        let code = reader.uint("frame type")?;
        let known = match known_fields(code) {
            // the one that may be left out
            Some(known) if code == 0x03 && fields > known + 2 => known + 1,
            Some(known) if fields >= known + 2 => known,
            Some(_) => return Err(FormatError::Malformed { field: "frame" }),
            None => 0,
        };
        let frame = Self::decode_fields(code, known, &mut reader)?;
        reader.skip("frame", fields - 2 - known)?;
        reader.end()?;
        Ok(frame)
    }

    fn decode_fields(code: u64, fields: usize, reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(match code {
            0x01 => Self::Hello {
                group: GroupId(reader.fixed("group")?),
                author: AuthorId(reader.fixed("author")?),
                replica: ReplicaId(reader.fixed("replica")?),
                token: reader.bins("token", MAX_TOKEN, MAX_ENVELOPE)?,
                proof: reader.fixed("proof")?,
            },
            0x02 => Self::Welcome {
                replica: ReplicaId(reader.fixed("replica")?),
                max_cursor: Cursor(reader.uint("max cursor")?),
                check: Check(reader.fixed("check")?),
                name: reader.text("name", MAX_NAME)?.to_owned(),
                addresses: reader.texts("addresses", MAX_ADDRESSES)?,
                incarnation: reader.fixed("incarnation")?,
            },
            0x03 => Self::Charter {
                charter: reader.bin("charter", MAX_CHARTER)?.to_vec(),
                registration: reader.bin("registration", MAX_TEXT)?.to_vec(),
                pass: if fields > 2 { Some(reader.fixed("pass")?) } else { None },
            },
            0x10 => Self::Push {
                entries: read_carried(reader)?,
                max_cursor: Cursor(reader.uint("max cursor")?),
                check: Check(reader.fixed("check")?),
            },
            0x11 => Self::PushAck { cursor: Cursor(reader.uint("cursor")?) },
            0x20 => Self::Pull {
                request: reader.uint32("request")?,
                scope: match reader.uint("scope")? {
                    0 => Scope::Membership,
                    1 => Scope::All,
                    got => return Err(FormatError::Unknown { field: "scope", got }),
                },
                after: Cursor(reader.uint("after")?),
                check: Check(reader.fixed("check")?),
                limit: reader.uint32("limit")?,
                have: read_have(reader)?,
                covered: read_have(reader)?,
            },
            0x21 => Self::PullResponse {
                request: reader.uint32("request")?,
                entries: read_carried(reader)?,
                max_cursor: Cursor(reader.uint("max cursor")?),
                check: Check(reader.fixed("check")?),
                has_more: reader.bool("has more")?,
                reset: reader.bool("reset")?,
                holds_from: Cursor(reader.uint("holds from")?),
            },
            0x22 => Self::Want { request: reader.uint32("request")?, wants: read_wants(reader)? },
            0x30 => Self::Presence { slots: reader.bins("slots", MAX_FEEDS, MAX_ENVELOPE)? },
            0x31 => Self::Notify { max_cursor: Cursor(reader.uint("max cursor")?) },
            0x32 => Self::Wake { url: reader.text("wake", MAX_WAKE_URL)?.to_owned() },
            0x50 => Self::Join {
                invite: InviteId(reader.fixed("invite")?),
                keys: read_keys(reader)?,
                replica: ReplicaId(reader.fixed("replica")?),
                name: reader.text("name", MAX_NAME)?.to_owned(),
                addresses: reader.texts("addresses", MAX_ADDRESSES)?,
                invite_proof: reader.fixed("invite proof")?,
                author_proof: reader.fixed("author proof")?,
            },
            0x51 => Self::Grant(Grant {
                charter: reader.bin("charter", MAX_CHARTER)?.to_vec(),
                token: reader.bins("token", MAX_TOKEN, MAX_ENVELOPE)?,
                epochs: reader.bin("epochs", MAX_EPOCHS_SEALED)?.to_vec(),
                replica: ReplicaId(reader.fixed("replica")?),
                name: reader.text("name", MAX_NAME)?.to_owned(),
                addresses: reader.texts("addresses", MAX_ADDRESSES)?,
                relays: reader.texts("relays", MAX_RELAYS)?,
                proof: reader.fixed("proof")?,
            }),
            0x52 => Self::Joined,
            0xff => Self::Error {
                code: ErrorCode::from_code(reader.uint("error code")?),
                text: reader.text("error text", MAX_TEXT)?.to_owned(),
            },
            code => Self::Unknown(code),
        })
    }
}

/// Fields after version and type, for the types this version knows.
fn known_fields(code: u64) -> Option<usize> {
    Some(match code {
        0x01 => 5,
        0x02 => 6,
        0x10 => 3,
        0x11 | 0x30..=0x32 => 1,
        0x20 | 0x21 | 0x50 => 7,
        0x03 | 0x22 | 0xff => 2,
        0x51 => 8,
        0x52 => 0,
        _ => return None,
    })
}

fn write_carried(writer: &mut Writer, entries: &[Carried]) {
    writer.array(entries.len());
    for Carried { cursor, envelope } in entries {
        writer.array(2).uint(cursor.0).bin(envelope);
    }
}

fn read_carried(reader: &mut Reader<'_>) -> Result<Vec<Carried>, FormatError> {
    let count = reader.array("entries", 0, MAX_FRAME_ENVELOPES)?;
    (0..count)
        .map(|_| {
            let fields = reader.array("entry", 2, 64)?;
            let cursor = Cursor(reader.uint("cursor")?);
            let envelope = reader.bin("envelope", MAX_ENVELOPE)?.to_vec();
            reader.skip("entry", fields - 2)?;
            Ok(Carried { cursor, envelope })
        })
        .collect()
}

fn write_have(writer: &mut Writer, feeds: &[FeedHave]) {
    writer.array(feeds.len());
    for feed in feeds {
        writer.array(4).bin(&feed.author.0).array(feed.ranges.len());
        for (range, head) in feed.ranges.iter().zip(&feed.heads) {
            writer.array(3).uint(range.first.0).uint(range.last.0).bin(&head.0);
        }
        writer.uint(feed.fork.map_or(0, |number| number.0)).bin(&feed.digest);
    }
}

fn read_have(reader: &mut Reader<'_>) -> Result<Vec<FeedHave>, FormatError> {
    let count = reader.array("have", 0, MAX_FEEDS)?;
    let mut authors = BTreeSet::new();
    (0..count)
        .map(|_| {
            let fields = reader.array("feed", 4, 64)?;
            let author = AuthorId(reader.fixed("author")?);
            if !authors.insert(author) {
                // comparing a feed costs reading it
                return Err(FormatError::Malformed { field: "have" });
            }
            let ranges = reader.array("ranges", 0, MAX_RANGES)?;
            let ranges = (0..ranges).map(|_| read_held(reader)).collect::<Result<Vec<_>, _>>()?;
            let (ranges, heads): (Vec<Range>, Vec<EnvelopeHash>) = ranges.into_iter().unzip();
            if ranges.windows(2).any(|pair| pair[0].last >= pair[1].first) {
                return Err(FormatError::Malformed { field: "ranges" });
            }
            let fork = Some(Number(reader.uint("fork")?)).filter(|number| number.0 > 0);
            let digest = reader.fixed("digest")?;
            reader.skip("feed", fields - 4)?;
            Ok(FeedHave { author, ranges, heads, fork, digest })
        })
        .collect()
}

fn read_held(reader: &mut Reader<'_>) -> Result<(Range, EnvelopeHash), FormatError> {
    let fields = reader.array("range", 3, 64)?;
    let range = checked_range(reader.uint("first")?, reader.uint("last")?)?;
    let head = EnvelopeHash(reader.fixed("head")?);
    reader.skip("range", fields - 3)?;
    Ok((range, head))
}

fn read_wants(reader: &mut Reader<'_>) -> Result<Vec<Want>, FormatError> {
    let count = reader.array("wants", 0, MAX_WANTS)?;
    (0..count)
        .map(|_| {
            let fields = reader.array("want", 3, 64)?;
            let author = AuthorId(reader.fixed("author")?);
            let range = checked_range(reader.uint("first")?, reader.uint("last")?)?;
            reader.skip("want", fields - 3)?;
            Ok(Want { author, range })
        })
        .collect()
}

fn checked_range(first: u64, last: u64) -> Result<Range, FormatError> {
    if first == 0 || first > last {
        return Err(FormatError::Malformed { field: "range" });
    }
    Ok(Range { first: Number(first), last: Number(last) })
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;

    fn keys() -> AuthorKeys {
        AuthorKeys { verify: AuthorId([1; 32]), noise: [2; 32], kem: Box::new([3; 1216]) }
    }

    fn have() -> Vec<FeedHave> {
        let range = |first, last| Range { first: Number(first), last: Number(last) };
        vec![FeedHave {
            author: AuthorId([1; 32]),
            ranges: vec![range(1, 4), range(6, 6)],
            heads: vec![EnvelopeHash([2; 32]), EnvelopeHash([4; 32])],
            fork: Some(Number(6)),
            digest: [3; 32],
        }]
    }

    fn every_frame() -> Vec<Frame> {
        let entries = vec![Carried { cursor: Cursor(300), envelope: vec![0xab; 5] }];
        let check = Check([9; 8]);
        vec![
            Frame::Hello {
                group: GroupId([1; 32]),
                author: AuthorId([2; 32]),
                replica: ReplicaId([3; 16]),
                token: vec![vec![4; 3]],
                proof: [5; 64],
            },
            Frame::Welcome {
                replica: ReplicaId([3; 16]),
                max_cursor: Cursor(7),
                check,
                name: "laptop".into(),
                addresses: vec!["127.0.0.1:9".into()],
                incarnation: [5; 8],
            },
            Frame::Charter { charter: vec![6; 3], registration: b"token".to_vec(), pass: None },
            Frame::Charter { charter: vec![6; 3], registration: b"token".to_vec(), pass: Some([7; 16]) },
            Frame::Push { entries: entries.clone(), max_cursor: Cursor(300), check },
            Frame::PushAck { cursor: Cursor(300) },
            Frame::Pull {
                request: 1,
                scope: Scope::All,
                after: Cursor(2),
                check,
                limit: 100,
                have: have(),
                covered: vec![],
            },
            Frame::PullResponse {
                request: 1,
                entries,
                max_cursor: Cursor(300),
                check,
                has_more: true,
                reset: false,
                holds_from: Cursor(1),
            },
            Frame::Want {
                request: 2,
                wants: vec![Want { author: AuthorId([1; 32]), range: Range { first: Number(5), last: Number(5) } }],
            },
            Frame::Presence { slots: vec![vec![1]] },
            Frame::Notify { max_cursor: Cursor(8) },
            Frame::Wake { url: "https://push.example".into() },
            Frame::Join {
                invite: InviteId([1; 16]),
                keys: keys(),
                replica: ReplicaId([7; 16]),
                name: "phone".into(),
                addresses: vec!["127.0.0.1:8".into()],
                invite_proof: [2; 64],
                author_proof: [3; 64],
            },
            Frame::Grant(Grant {
                charter: vec![1],
                token: vec![vec![2]],
                epochs: vec![3],
                replica: ReplicaId([6; 16]),
                name: "laptop".into(),
                addresses: vec![],
                relays: vec!["ws://127.0.0.1:7841".into()],
                proof: [4; 32],
            }),
            Frame::Joined,
            Frame::Error { code: ErrorCode::InviteUsed, text: "used".into() },
            Frame::Unknown(0x7e),
        ]
    }

    #[test]
    fn every_frame_is_read_back_and_no_part_of_one_is() {
        for frame in every_frame() {
            let bytes = frame.encode();
            assert_eq!(Frame::decode(&bytes).as_ref(), Ok(&frame));
            for len in 0..bytes.len() {
                assert!(Frame::decode(&bytes[..len]).is_err(), "{frame:?} truncated to {len}");
            }
        }
    }

    #[test]
    fn the_bytes_stay_yesterdays() {
        let lines: Vec<String> = every_frame()
            .iter()
            .map(|frame| {
                let bytes = frame.encode();
                let shown = &bytes[..bytes.len().min(40)];
                format!("{:>4} {}", bytes.len(), data_encoding::HEXLOWER.encode(shown))
            })
            .collect();
        expect![[r#"
             161 970101c4200101010101010101010101010101010101010101010101010101010101010101c42002
              62 980102c4100303030303030303030303030303030307c4080909090909090909a66c6170746f7091
              15 940103c403060606c405746f6b656e
              33 950103c403060606c405746f6b656ec41007070707070707070707070707070707
              28 9501109192cd012cc405abababababcd012cc4080909090909090909
               6 930111cd012c
             164 990120010102c4080909090909090909649194c42001010101010101010101010101010101010101
              32 990121019192cd012cc405abababababcd012cc4080909090909090909c3c201
              42 940122029193c4200101010101010101010101010101010101010101010101010101010101010101
               7 93013091c40101
               4 93013108
              24 930132b468747470733a2f2f707573682e6578616d706c65
            1478 990150c4100101010101010101010101010101010193c42001010101010101010101010101010101
              94 9a0151c4010191c40102c40103c41006060606060606060606060606060606a66c6170746f709091
               3 920152
              10 9401ccff0ba475736564
               3 92017e"#]]
        .assert_eq(&lines.join("\n"));
    }

    #[test]
    fn a_refusal_fits_its_frame_whatever_it_says() {
        let bytes = Frame::error(ErrorCode::Unavailable, &"ä".repeat(MAX_TEXT)).encode();
        assert!(Frame::decode(&bytes).is_ok());
    }

    #[test]
    fn later_fields_are_ignored_and_missing_ones_refused() {
        let mut bytes = Frame::PushAck { cursor: Cursor(3) }.encode();
        bytes[0] = 0x94;
        bytes.push(0xc0);
        assert_eq!(Frame::decode(&bytes), Ok(Frame::PushAck { cursor: Cursor(3) }));
        assert!(Frame::decode(&[0x92, 1, 0x11]).is_err());
    }

    #[test]
    fn counts_are_bounded_before_anything_is_allocated() {
        let bomb = [0x95, 1, 0x10, 0xdd, 0xff, 0xff, 0xff, 0xff];
        expect!["entries has 4294967295, at most 4096 are allowed"]
            .assert_eq(&Frame::decode(&bomb).expect_err("bomb").to_string());
        let overlapping = Frame::Want {
            request: 1,
            wants: vec![Want { author: AuthorId([1; 32]), range: Range { first: Number(9), last: Number(3) } }],
        };
        assert!(Frame::decode(&overlapping.encode()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Frame::decode(&bytes);
        }

        #[test]
        fn a_frame_with_a_flipped_bit_is_read_or_refused(which in 0usize..16, at: usize, bit in 0u8..8) {
            let mut bytes = every_frame()[which].encode();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = Frame::decode(&bytes);
        }
    }
}
