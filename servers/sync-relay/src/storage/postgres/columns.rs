//! Between our types and PostgreSQL's columns.

use sync_types::{AuthorId, Class, EnvelopeHash, Number};

use super::damaged;
use crate::storage::StorageError;

/// The last number of a feed that fits a column.
pub(super) const MAX_NUMBER: Number = Number(i64::MAX as u64);

/// A count as a column holds it; one too large for a column as the largest.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A column that never holds less than 0.
pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

pub(super) fn number(column: i64) -> Number {
    Number(unsigned(column))
}

/// An id or a hash.
pub(super) fn fixed<const N: usize>(column: &[u8]) -> Result<[u8; N], StorageError> {
    column.try_into().map_err(|_| damaged("an id or a hash of another length"))
}

pub(super) fn author(column: &[u8]) -> Result<AuthorId, StorageError> {
    Ok(AuthorId(fixed(column)?))
}

pub(super) fn hash(column: &[u8]) -> Result<EnvelopeHash, StorageError> {
    Ok(EnvelopeHash(fixed(column)?))
}

pub(super) fn class(column: i16) -> Result<Class, StorageError> {
    [Class::Sealed, Class::Membership, Class::Rotation]
        .into_iter()
        .find(|class| i16::from(class.code()) == column)
        .ok_or_else(|| damaged("an entry of an unknown class"))
}
