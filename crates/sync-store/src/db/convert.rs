//! Between our types and SQLite's columns.

use sync_types::{Class, Cursor, InviteState, Number, Timestamp};

use crate::error::StoreError;

/// Bits of a row id that hold the cursor; the rest holds the group.
const CURSOR_BITS: u32 = 40;
/// The last cursor a group can give: a trillion entries.
pub(super) const MAX_CURSOR: Cursor = Cursor((1 << CURSOR_BITS) - 1);
/// The last number of a feed that fits a column.
pub(super) const MAX_NUMBER: Number = Number(i64::MAX as u64);

/// The row of a cursor; of one beyond all cursors the group's last.
pub(super) fn row_id(gid: i64, cursor: Cursor) -> i64 {
    (gid << CURSOR_BITS) | signed(cursor.min(MAX_CURSOR).0)
}

/// The cursor of a row.
pub(super) fn cursor_of(id: i64) -> Cursor {
    Cursor(unsigned(id) & MAX_CURSOR.0)
}

/// A count as a column holds it; one too large for a column as the largest.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A column that never holds less than 0.
pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

pub(super) fn timestamp(column: Option<i64>) -> Option<Timestamp> {
    column.map(|ms| Timestamp(unsigned(ms)))
}

pub(super) fn class_of(column: i64) -> Result<Class, StoreError> {
    [Class::Sealed, Class::Membership, Class::Rotation]
        .into_iter()
        .find(|class| i64::from(class.code()) == column)
        .ok_or_else(|| StoreError::corrupt("an entry of an unknown class"))
}

const INVITE_STATES: [InviteState; 4] =
    [InviteState::Open, InviteState::Used, InviteState::Expired, InviteState::Revoked];

pub(super) fn invite_state(column: i64) -> Result<InviteState, StoreError> {
    usize::try_from(column)
        .ok()
        .and_then(|at| INVITE_STATES.get(at).copied())
        .ok_or_else(|| StoreError::corrupt("an invite in an unknown state"))
}

pub(super) fn invite_column(state: InviteState) -> i64 {
    let at = INVITE_STATES.iter().position(|known| *known == state);
    at.and_then(|at| i64::try_from(at).ok()).expect("BUG: every state has its column")
}
