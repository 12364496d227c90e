//! Ids: a newtype for every array of bytes that names something.

use std::fmt;

/// Defines an id of `$len` bytes whose `Debug` shows the first characters and `Display` all of them, in lower-case hex.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// The bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }

            /// First eight hex digits, for people and logs.
            #[must_use]
            pub fn short(&self) -> String {
                data_encoding::HEXLOWER.encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let wrong = || IdError { expected: $len * 2, got: text.len() };
                let bytes = data_encoding::HEXLOWER_PERMISSIVE
                    .decode(text.as_bytes())
                    .map_err(|_| wrong())?;
                bytes.try_into().map(Self).map_err(|_| wrong())
            }
        }

        impl From<[u8; $len]> for $name {
            fn from(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
    };
}

/// A text that is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("id must be {expected} hex digits, got {got} characters that are not")]
pub struct IdError {
    /// Hex digits such an id has.
    pub expected: usize,
    /// Characters given.
    pub got: usize,
}

id!(
    /// The unit of sharing: hash of its charter, so it certifies itself.
    GroupId, 32
);
id!(
    /// An author's Ed25519 verifying key: names its feed.
    AuthorId, 32
);
id!(
    /// A person's place in a group: author id of the member's first author.
    MemberId, 32
);
id!(
    /// One installation: its iroh endpoint id.
    DeviceId, 32
);
id!(
    /// One database of one installation, drawn anew when a copy is noticed.
    ReplicaId, 16
);
id!(
    /// An author's name for one of its entries, for idempotent retry; scoped by the author.
    BlobId, 16
);
id!(
    /// BLAKE3 over an envelope's signed bytes and signature.
    EnvelopeHash, 32
);
id!(
    /// Names a folder in its group.
    FolderId, 16
);
id!(
    /// Names an invite in membership entries.
    InviteId, 16
);
id!(
    /// Where a rendezvous keeps an invite's record; derives from the whole code.
    LookupId, 16
);
id!(
    /// Random value a replica stores beside a cursor; shows whether it still is the replica it was.
    Check, 8
);

impl EnvelopeHash {
    /// What the first envelope of a feed names as its previous one.
    pub const NONE: Self = Self([0; 32]);
}

impl Check {
    /// The check of cursor 0, where nothing is stored.
    pub const NONE: Self = Self([0; 8]);
}

impl From<AuthorId> for MemberId {
    fn from(author: AuthorId) -> Self {
        Self(author.0)
    }
}

/// Position at which one replica stored an envelope; each replica numbers its own arrivals from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Cursor(pub u64);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Position of an envelope in its feed, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Number(pub u64);

impl Number {
    /// The number after this one, unless the feed is exhausted.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }

    /// The number before this one, unless this is the first.
    #[must_use]
    pub fn previous(self) -> Option<Self> {
        (self.0 > 1).then(|| Self(self.0 - 1))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Unix time in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u64);

/// Names a generation of the group key: number, and hash of the rotation that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpochId {
    /// From 1.
    pub number: u32,
    /// Hash of the rotation, or for number 1 of the charter.
    pub hash: [u8; 32],
}

impl EpochId {
    /// What an envelope that is not sealed carries.
    pub const NONE: Self = Self { number: 0, hash: [0; 32] };
}

/// Public half of an author: what others need to verify it and to seal for it.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthorKeys {
    /// Ed25519 verifying key; the author id.
    pub verify: AuthorId,
    /// X25519 key for Noise towards relays.
    pub noise: [u8; 32],
    /// X-Wing encapsulation key that receives group keys.
    pub kem: Box<[u8; KEM_KEY_LEN]>,
}

/// Length of an X-Wing encapsulation key (draft-connolly-cfrg-xwing-kem).
pub const KEM_KEY_LEN: usize = 1216;

impl fmt::Debug for AuthorKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AuthorKeys").field(&self.verify).finish()
    }
}
