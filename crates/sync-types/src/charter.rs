//! The charter: what is fixed when a group is made, and whose hash names the group.

use crate::bounds::MAX_CHARTER;
use crate::ids::{AuthorId, AuthorKeys, EpochId, GroupId};
use crate::wire::{FormatError, Reader, Writer};

const VERSION: u64 = 1;

/// How a group's first secret came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupKind {
    /// Drawn at random by the founder.
    Random,
    /// Derived from a passphrase; nobody can be removed.
    Passphrase,
}

/// How many signatures a removal needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quorum {
    /// A group of at most this many members is small.
    pub small_group: u32,
    /// Signatures in a small group.
    pub small: u32,
    /// Signatures from different members in a larger one.
    pub large: u32,
}

impl Default for Quorum {
    fn default() -> Self {
        Self { small_group: 10, small: 1, large: 2 }
    }
}

/// How files are cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunker {
    /// 1 is FastCDC v2020.
    pub id: u32,
    /// Smallest chunk in bytes.
    pub min: u32,
    /// Average chunk in bytes.
    pub average: u32,
    /// Largest chunk in bytes.
    pub max: u32,
}

impl Default for Chunker {
    fn default() -> Self {
        Self { id: 1, min: 256 << 10, average: 1 << 20, max: 4 << 20 }
    }
}

/// What is fixed at a group's creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charter {
    /// Where the first secret comes from.
    pub kind: GroupKind,
    /// The founder's author, from which every admission descends.
    pub founder: AuthorKeys,
    /// Signatures a removal needs.
    pub quorum: Quorum,
    /// Cipher suite: 1 XChaCha20-Poly1305, 2 AES-256-GCM.
    pub suite: u32,
    /// Parameters of the chunker.
    pub chunker: Chunker,
    /// Makes two groups of one founder differ.
    pub nonce: [u8; 32],
    /// Commitment to the secret of epoch 1.
    pub commitment: [u8; 32],
}

impl Charter {
    /// The bytes whose hash is the group id.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::array_of(8);
        writer.uint(VERSION).uint(match self.kind {
            GroupKind::Random => 0,
            GroupKind::Passphrase => 1,
        });
        write_keys(&mut writer, &self.founder);
        let Quorum { small_group, small, large } = self.quorum;
        writer.array(3).uint(small_group.into()).uint(small.into()).uint(large.into());
        writer.uint(self.suite.into());
        let Chunker { id, min, average, max } = self.chunker;
        writer.array(4).uint(id.into()).uint(min.into()).uint(average.into()).uint(max.into());
        writer.bin(&self.nonce).bin(&self.commitment);
        writer.finish()
    }

    /// Reads a charter.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_CHARTER {
            return Err(FormatError::TooMany { field: "charter", got: bytes.len(), max: MAX_CHARTER });
        }
        let mut reader = Reader::new(bytes);
        let fields = reader.array("charter", 8, 64)?;
        let version = reader.uint("charter version")?;
        if version != VERSION {
            return Err(FormatError::Version { what: "charter", got: version, known: VERSION });
        }
        let kind = match reader.uint("group kind")? {
            0 => GroupKind::Random,
            1 => GroupKind::Passphrase,
            got => return Err(FormatError::Unknown { field: "group kind", got }),
        };
        let founder = read_keys(&mut reader)?;
        let quorum_fields = reader.array("quorum", 3, 64)?;
        let quorum = Quorum {
            small_group: reader.uint32("small group")?,
            small: reader.uint32("small quorum")?,
            large: reader.uint32("large quorum")?,
        };
        reader.skip("quorum", quorum_fields - 3)?;
        let suite = reader.uint32("suite")?;
        let chunker_fields = reader.array("chunker", 4, 64)?;
        let chunker = Chunker {
            id: reader.uint32("chunker id")?,
            min: reader.uint32("chunker min")?,
            average: reader.uint32("chunker average")?,
            max: reader.uint32("chunker max")?,
        };
        reader.skip("chunker", chunker_fields - 4)?;
        let charter = Self {
            kind,
            founder,
            quorum,
            suite,
            chunker,
            nonce: reader.fixed("charter nonce")?,
            commitment: reader.fixed("charter commitment")?,
        };
        reader.skip("charter", fields - 8)?;
        reader.end()?;
        Ok(charter)
    }
}

impl GroupId {
    /// The id of the group with this charter.
    #[must_use]
    pub fn of(charter: &[u8]) -> Self {
        Self(blake3::derive_key("syncshell v1 group id", charter))
    }
}

impl EpochId {
    /// The first epoch of the group with this charter.
    #[must_use]
    pub fn first(charter: &[u8]) -> Self {
        Self { number: 1, hash: blake3::derive_key("syncshell v1 first epoch", charter) }
    }
}

/// Writes author keys as the formats nest them.
pub fn write_keys(writer: &mut Writer, keys: &AuthorKeys) {
    writer.array(3).bin(&keys.verify.0).bin(&keys.noise).bin(&keys.kem[..]);
}

/// Reads author keys.
pub fn read_keys(reader: &mut Reader<'_>) -> Result<AuthorKeys, FormatError> {
    let fields = reader.array("author keys", 3, 64)?;
    let keys = AuthorKeys {
        verify: AuthorId(reader.fixed("verify key")?),
        noise: reader.fixed("noise key")?,
        kem: Box::new(reader.fixed("kem key")?),
    };
    reader.skip("author keys", fields - 3)?;
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn charter() -> Charter {
        Charter {
            kind: GroupKind::Random,
            founder: AuthorKeys { verify: AuthorId([1; 32]), noise: [2; 32], kem: Box::new([3; 1216]) },
            quorum: Quorum::default(),
            suite: 1,
            chunker: Chunker::default(),
            nonce: [4; 32],
            commitment: [5; 32],
        }
    }

    #[test]
    fn a_charter_is_read_back_and_its_bytes_stay_yesterdays() {
        let bytes = charter().encode();
        assert_eq!(Charter::decode(&bytes).expect("own bytes"), charter());
        expect_test::expect!["bbba5e90"].assert_eq(&GroupId::of(&bytes).short());
        assert_eq!(data_encoding::HEXLOWER.encode(&bytes[..8]), "98010093c4200101");
        for len in 0..bytes.len() {
            assert!(Charter::decode(&bytes[..len]).is_err(), "truncated to {len}");
        }
    }
}
