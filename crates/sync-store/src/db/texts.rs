//! Texts as they were last in sync: what two edits of one text are merged from.

use rusqlite::{Row, params};
use sync_types::Timestamp;

use super::convert::signed;
use super::{FolderRowId, Reader, Txn};
use crate::error::StoreError;

/// A text that lay at a path; what its bytes and its vector mean is the engine's matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// BLAKE3 of its content.
    pub hash: [u8; 32],
    /// What the version that it is has seen.
    pub vector: Vec<u8>,
    /// Its content, packed.
    pub packed: Vec<u8>,
}

impl Txn<'_> {
    /// Keeps a text of a path, and of that path only the newest `of_path`.
    pub fn put_text(
        &mut self,
        fid: FolderRowId,
        key: &[u8],
        text: &Text,
        at: Timestamp,
        of_path: usize,
    ) -> Result<(), StoreError> {
        self.db
            .conn
            .prepare_cached(
                "INSERT OR REPLACE INTO texts (fid, key, hash, at, vector, packed) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![fid.0, key, text.hash, signed(at.0), text.vector, text.packed])?;
        self.db
            .conn
            .prepare_cached(
                "DELETE FROM texts WHERE fid = ?1 AND key = ?2 AND hash IN \
                 (SELECT hash FROM texts WHERE fid = ?1 AND key = ?2 ORDER BY at DESC, hash LIMIT -1 OFFSET ?3)",
            )?
            .execute(params![fid.0, key, i64::try_from(of_path).unwrap_or(i64::MAX)])?;
        Ok(())
    }

    /// Lets the oldest texts of a folder go until the others have at most so many bytes together.
    pub fn trim_texts(&mut self, fid: FolderRowId, most: u64) -> Result<(), StoreError> {
        let mut sized = self
            .db
            .conn
            .prepare_cached("SELECT key, hash, length(packed) FROM texts WHERE fid = ?1 ORDER BY at DESC, key, hash")?;
        let mut gone = Vec::new();
        let mut sum = 0u64;
        let mut found = sized.query([fid.0])?;
        while let Some(row) = found.next()? {
            sum = sum.saturating_add(row.get::<_, i64>(2)?.unsigned_abs());
            if sum > most {
                gone.push((row.get::<_, Vec<u8>>(0)?, row.get::<_, [u8; 32]>(1)?));
            }
        }
        let mut delete = self.db.conn.prepare_cached("DELETE FROM texts WHERE fid = ?1 AND key = ?2 AND hash = ?3")?;
        for (key, hash) in gone {
            delete.execute(params![fid.0, key, hash])?;
        }
        Ok(())
    }
}

impl Reader<'_> {
    /// The texts kept of a path, newest first.
    pub fn texts(&self, fid: FolderRowId, key: &[u8]) -> Result<Vec<Text>, StoreError> {
        let sql = "SELECT hash, vector, packed FROM texts WHERE fid = ?1 AND key = ?2 ORDER BY at DESC, hash";
        let text = |row: &Row<'_>| Ok(Text { hash: row.get(0)?, vector: row.get(1)?, packed: row.get(2)? });
        Ok(self.conn.prepare_cached(sql)?.query_map(params![fid.0, key], text)?.collect::<Result<_, _>>()?)
    }
}
