//! Where the feeds of removed authors end: what stands behind is kept and does not count.

use std::collections::BTreeMap;

use rand_core::CryptoRng;
use rusqlite::{Connection, OptionalExtension};
use sync_types::{AuthorId, Check, Class, Cut, EnvelopeHash, EpochId, Number};

use super::cache::{Feed, Group, make_check, next_cursor};
use super::convert::{row_id, signed};
use crate::error::StoreError;

/// Takes out of the log what removals take, and puts back what one no longer does: `before` are the ends as they were,
/// `touched` the feeds that got something.
///
/// Operations and rotations stay: others may name them, or have sealed with them.
pub(super) fn settle_ends(
    conn: &Connection,
    rng: &mut dyn CryptoRng,
    group: &mut Group,
    before: &BTreeMap<AuthorId, Cut>,
    touched: &[AuthorId],
    readable: &dyn Fn(EpochId) -> bool,
) -> Result<(), StoreError> {
    let after = group.membership.ends();
    let again: Vec<AuthorId> =
        before.iter().filter(|(author, was)| after.get(author) != Some(was)).map(|(author, _)| *author).collect();
    for author in &again {
        put_back(conn, rng, group, author, readable)?;
    }
    if !again.is_empty() {
        // what was refused meanwhile stands before the positions that were reached
        conn.prepare_cached("UPDATE peers SET cursor = 0, chk = ?2 WHERE gid = ?1")?
            .execute((group.gid, Check::NONE.0))?;
    }
    for (author, end) in after.iter() {
        let moved = before.get(author) != Some(end);
        if let Some(feed) = group.feeds.get(author).filter(|_| moved || touched.contains(author)) {
            take_out(conn, feed, end)?;
        }
    }
    Ok(())
}

/// Has everything of a feed count again, under new cursors: who reads along has passed the old ones.
fn put_back(
    conn: &Connection,
    rng: &mut dyn CryptoRng,
    group: &mut Group,
    author: &AuthorId,
    readable: &dyn Fn(EpochId) -> bool,
) -> Result<(), StoreError> {
    let Some(feed) = group.feeds.get(author).map(|feed| feed.row) else { return Ok(()) };
    conn.prepare_cached("UPDATE feeds SET ends = NULL WHERE feed = ?1")?.execute([feed])?;
    let mut statement = conn.prepare_cached(
        "SELECT id, chk, epoch_number, epoch_hash FROM entries WHERE feed = ?1 AND state = 3 ORDER BY number, id",
    )?;
    let rows = statement
        .query_map([feed], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?
        .collect::<Result<Vec<(i64, [u8; 8], Option<u32>, Option<[u8; 32]>)>, rusqlite::Error>>()?;
    let mut renumber = conn.prepare_cached(
        "UPDATE entries SET id = ?2, chk = ?3, state = ?4, epoch_number = ?5, epoch_hash = ?6 WHERE id = ?1",
    )?;
    let mut leave = conn.prepare_cached("INSERT INTO entries (id, chk, state) VALUES (?1, ?2, 2)")?;
    for (id, check, number, hash) in rows {
        let epoch = number.zip(hash).map(|(number, hash)| EpochId { number, hash });
        let waits = epoch.filter(|epoch| !readable(*epoch));
        let cursor = next_cursor(group)?;
        let values = (id, row_id(group.gid, cursor), make_check(rng).0, i64::from(waits.is_some()));
        renumber.execute((
            values.0,
            values.1,
            values.2,
            values.3,
            waits.map(|epoch| epoch.number),
            waits.map(|epoch| epoch.hash),
        ))?;
        leave.execute((id, check))?;
        group.max_cursor = cursor;
    }
    Ok(())
}

/// Takes out of a feed what stands behind its end, and what is not of the branch that leads to it.
fn take_out(conn: &Connection, feed: &Feed, end: &Cut) -> Result<(), StoreError> {
    conn.prepare_cached("UPDATE feeds SET ends = ?2 WHERE feed = ?1")?.execute((feed.row, signed(end.number.0)))?;
    let sealed = Class::Sealed.code();
    conn.prepare_cached(
        "UPDATE entries SET state = 3 WHERE feed = ?1 AND class = ?2 AND state IN (0, 1) \
         AND (number > ?3 OR (number = ?3 AND hash <> ?4))",
    )?
    .execute((feed.row, sealed, signed(end.number.0), end.hash.0))?;
    let Some(fork) = feed.state.fork else { return Ok(()) };
    let mut previous =
        conn.prepare_cached("SELECT previous FROM entries WHERE feed = ?1 AND number = ?2 AND hash = ?3")?;
    let mut others = conn.prepare_cached(
        "UPDATE entries SET state = 3 \
         WHERE feed = ?1 AND number = ?2 AND hash <> ?3 AND class = ?4 AND state IN (0, 1)",
    )?;
    let (mut number, mut hash) = (end.number, end.hash);
    // down the chain as far as it is here: below a gap nobody can say yet which branch it is
    while number > fork
        && let Some(before) = number.previous()
        && let Some(named) =
            previous.query_row((feed.row, signed(number.0), hash.0), |row| row.get(0).map(EnvelopeHash)).optional()?
    {
        others.execute((feed.row, signed(before.0), named.0, sealed))?;
        (number, hash) = (Number(before.0), named);
    }
    Ok(())
}
