//! Requests to join that wait at a relay for a member who is away, sealed, and their answers.

use rusqlite::params;
use sync_types::Timestamp;

use super::convert::{signed, unsigned};
use super::{Reader, Txn};
use crate::error::StoreError;

/// A request to join that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingRequest {
    /// The lookup id of its code.
    pub place: [u8; 16],
    /// Its number there.
    pub number: u32,
    /// What shows whose it is to answer.
    pub owner: [u8; 16],
    /// When it was left.
    pub left: Timestamp,
    /// What was left.
    pub request: Vec<u8>,
    /// What was answered.
    pub answer: Option<Vec<u8>>,
}

impl Txn<'_> {
    /// Keeps a request, and forgets those that were left before `oldest`.
    pub fn put_request(&mut self, request: &WaitingRequest, oldest: Timestamp) -> Result<(), StoreError> {
        let conn = self.live()?;
        conn.prepare_cached("DELETE FROM requests WHERE left_at < ?1")?.execute([signed(oldest.0)])?;
        let WaitingRequest { place, number, owner, left, request, answer } = request;
        conn.prepare_cached(
            "INSERT OR REPLACE INTO requests (place, number, owner, left_at, request, answer) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![place, number, owner, signed(left.0), request, answer])?;
        Ok(())
    }

    /// Keeps the answer to a request, if that is still here.
    pub fn put_answer(&mut self, place: &[u8; 16], number: u32, answer: &[u8]) -> Result<(), StoreError> {
        let sql = "UPDATE requests SET answer = ?3 WHERE place = ?1 AND number = ?2";
        self.live()?.prepare_cached(sql)?.execute((place, number, answer))?;
        Ok(())
    }

    /// Forgets a request, or all of a code where none is named.
    pub fn delete_requests(&mut self, place: &[u8; 16], number: Option<u32>) -> Result<(), StoreError> {
        let sql = "DELETE FROM requests WHERE place = ?1 AND number = coalesce(?2, number)";
        self.live()?.prepare_cached(sql)?.execute((place, number))?;
        Ok(())
    }
}

impl Reader<'_> {
    /// Every request that is kept.
    pub fn requests(&self) -> Result<Vec<WaitingRequest>, StoreError> {
        let sql = "SELECT place, number, owner, left_at, request, answer FROM requests ORDER BY place, number";
        let mut statement = self.conn.prepare_cached(sql)?;
        let rows = statement.query_map([], |row| {
            Ok(WaitingRequest {
                place: row.get(0)?,
                number: row.get(1)?,
                owner: row.get(2)?,
                left: Timestamp(unsigned(row.get(3)?)),
                request: row.get(4)?,
                answer: row.get(5)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
