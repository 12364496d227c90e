//! Own entries: numbered, chained, sealed and stored in one step.

use rusqlite::{Connection, OptionalExtension};
use sync_types::{AuthorId, Class, Cursor, Envelope, EnvelopeHash, GroupId, Number};

use super::Txn;
use super::cache::{Group, Inserter, NewRow, Origin};
use super::convert::{MAX_NUMBER, cursor_of, unsigned};
use super::ends::settle_ends;
use crate::append::{NewEntry, SealEntries};
use crate::error::StoreError;

/// Where an own entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its cursor.
    pub cursor: Cursor,
    /// The author it was written as: an earlier one, if it was stored before a renewal.
    pub author: AuthorId,
    /// Its number in that author's feed.
    pub number: Number,
    /// Hash of its envelope.
    pub hash: EnvelopeHash,
    /// It was stored before; nothing changed.
    pub repeated: bool,
}

impl Txn<'_> {
    /// Seals entries into our feed of a group, in this order.
    ///
    /// An entry whose blob id one of our authors used for the same content is not stored again.
    pub fn append(
        &mut self,
        group: &GroupId,
        entries: &[NewEntry],
        sealer: &dyn SealEntries,
    ) -> Result<Vec<Appended>, StoreError> {
        let change = self.change(group)?;
        let (current, got) = (change.group.author, sealer.author());
        if got != current {
            return Err(StoreError::AuthorChanged { current, got });
        }
        let conn = change.conn;
        let before = change.group.membership.ends();
        let mut inserter = Inserter::new(conn, &mut *change.rng, &mut *change.group)?;
        let mut appended = Vec::with_capacity(entries.len());
        for entry in entries {
            appended.push(match stored_before(conn, inserter.group, entry)? {
                Some(stored) => stored,
                None if inserter.group.behind => return Err(StoreError::AuthorBehind(got)),
                None => append(&mut inserter, group, entry, sealer)?,
            });
        }
        inserter.finish()?;
        // what counts again by it and cannot be opened is looked at again when its epoch comes
        settle_ends(conn, change.rng, change.group, &before, &[], &|_| false)?;
        Ok(appended)
    }
}

/// Where an entry stands that asks to be stored again.
fn stored_before(conn: &Connection, group: &Group, entry: &NewEntry) -> Result<Option<Appended>, StoreError> {
    let mut statement = conn.prepare_cached(
        "SELECT id, number, hash, digest FROM entries WHERE feed = ?1 AND blob_id = ?2 AND own > 0 ORDER BY id",
    )?;
    for &(author, feed) in &group.own {
        let stored = statement
            .query_row((feed, entry.blob_id.0), |row| {
                let (id, number): (i64, i64) = (row.get(0)?, row.get(1)?);
                Ok((id, number, EnvelopeHash(row.get(2)?), row.get::<_, Option<[u8; 32]>>(3)?))
            })
            .optional()?;
        let Some((id, number, hash, digest)) = stored else { continue };
        let cursor = cursor_of(id);
        // one that came back from a peer has no digest; the blob id, random as it is, must do
        if digest.is_some_and(|digest| digest != entry.digest) {
            return Err(StoreError::BlobIdReused { blob_id: entry.blob_id, cursor });
        }
        let number = Number(unsigned(number));
        return Ok(Some(Appended { cursor, author, number, hash, repeated: true }));
    }
    Ok(None)
}

fn append(
    inserter: &mut Inserter<'_>,
    id: &GroupId,
    entry: &NewEntry,
    sealer: &dyn SealEntries,
) -> Result<Appended, StoreError> {
    let author = inserter.group.author;
    let (highest, previous) = match inserter.group.feeds.get(&author) {
        Some(feed) => (feed.state.held.highest().unwrap_or_default(), feed.state.head),
        None => return Err(StoreError::corrupt("the own feed is missing")),
    };
    if highest >= MAX_NUMBER {
        return Err(StoreError::Exhausted("number"));
    }
    let number = Number(highest.0 + 1);
    let bytes = sealer.seal(number, previous, entry)?;
    let envelope = Envelope::parse(&bytes).map_err(|_| StoreError::SealedOtherwise { field: "format" })?;
    let header = &envelope.header;
    for (field, fits) in [
        ("group", header.group == *id),
        ("sender", header.sender == author),
        ("number", header.number == number),
        ("previous hash", header.previous == previous),
        ("blob id", header.blob_id == entry.blob_id),
        ("class", header.class == entry.content.class()),
    ] {
        if !fits {
            return Err(StoreError::SealedOtherwise { field });
        }
    }
    if header.class == Class::Membership {
        inserter.group.membership.apply(&envelope)?;
    }
    let (hash, digest) = (envelope.hash(), Some(entry.digest));
    let row = NewRow { envelope: &envelope, hash, waits: false, origin: Origin::Here { digest }, fork: None };
    let (cursor, _) = inserter.add(&row)?;
    Ok(Appended { cursor, author, number, hash, repeated: false })
}
