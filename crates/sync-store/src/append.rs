//! What an author adds to its own feed, and who seals it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use sync_types::{AuthorId, BlobId, Class, EnvelopeHash, Number, Timestamp};

/// An entry of our own before it has a number.
#[derive(Clone, PartialEq, Eq)]
pub struct NewEntry {
    /// The author's name for it; asking again with the same one stores nothing twice.
    pub blob_id: BlobId,
    /// When it was made; information only.
    pub timestamp: Timestamp,
    /// What it says.
    pub content: Content,
    /// [`Content::digest`]: tells a retry from another entry under the same blob id.
    pub digest: [u8; 32],
}

/// What an entry says, before it is sealed.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// Content for members.
    Sealed {
        /// What the body is.
        kind: u16,
        /// What it belongs to.
        stream: String,
        /// The bytes.
        body: Vec<u8>,
    },
    /// An encoded membership operation, in the clear.
    Membership(Vec<u8>),
    /// An encoded rotation.
    Rotation(Vec<u8>),
}

impl Content {
    /// The class of the envelope it becomes.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Sealed { .. } => Class::Sealed,
            Self::Membership(_) => Class::Membership,
            Self::Rotation(_) => Class::Rotation,
        }
    }

    /// Hash of the content, which the database keeps in the clear; the key keeps a thief of it from testing guesses.
    #[must_use]
    pub fn digest(&self, key: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(key);
        match self {
            Self::Sealed { kind, stream, body } => {
                hasher.update(&[self.class().code()]).update(&kind.to_le_bytes());
                hasher.update(&(stream.len() as u64).to_le_bytes()).update(stream.as_bytes()).update(body);
            }
            Self::Membership(payload) | Self::Rotation(payload) => {
                hasher.update(&[self.class().code()]).update(payload);
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// Bytes it weighs in a commit.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Sealed { body, .. } => body.len(),
            Self::Membership(payload) | Self::Rotation(payload) => payload.len(),
        }
    }
}

impl fmt::Debug for NewEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewEntry").field("blob_id", &self.blob_id).field("content", &self.content).finish()
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({} bytes)", self.class(), self.len())
    }
}

/// Seals and signs entries as one author; the database says where in the feed they stand.
pub trait SealEntries: Send + Sync {
    /// Whose feed the entries go to.
    fn author(&self) -> AuthorId;

    /// The envelope of an entry: exactly this number, previous hash, blob id, author and class.
    fn seal(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Result<Vec<u8>, SealError>;
}

/// Why an entry could not be sealed, or an envelope not be opened to seal it anew.
#[derive(Debug, Clone, thiserror::Error)]
#[error(transparent)]
pub struct SealError(Arc<dyn Error + Send + Sync>);

impl SealError {
    /// Wraps the sealer's own error.
    pub fn new(error: impl Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }

    /// The sealer's own error, if it is of this type.
    #[must_use]
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_every_part_of_the_content_apart() {
        let sealed =
            |kind, stream: &str, body: &[u8]| Content::Sealed { kind, stream: stream.to_owned(), body: body.to_vec() };
        let contents = [
            sealed(1, "app", b"x"),
            sealed(2, "app", b"x"),
            sealed(1, "ap", b"px"),
            sealed(1, "app", b"y"),
            Content::Membership(b"x".to_vec()),
            Content::Rotation(b"x".to_vec()),
        ];
        for (i, one) in contents.iter().enumerate() {
            for (j, other) in contents.iter().enumerate() {
                assert_eq!(one.digest(&[1; 32]) == other.digest(&[1; 32]), i == j, "{one:?} and {other:?}");
            }
            assert_ne!(one.digest(&[1; 32]), one.digest(&[2; 32]), "another key, another digest");
        }
    }
}
