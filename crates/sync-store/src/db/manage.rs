//! Everything beside the log: what the database says about itself, sealed secrets, groups and invites.

use std::fmt;

use rusqlite::{OptionalExtension, params};
use sync_core::Membership;
use sync_core::pairing::InviteStatus;
use sync_core::session::NO_AUTHOR;
use sync_types::{AuthorId, Cursor, GroupId, InviteId, InviteState, ReplicaId, Timestamp};

use super::convert::{MAX_CURSOR, invite_column, invite_state, row_id, signed, unsigned};
use super::{Reader, Txn};
use crate::error::StoreError;

/// Where the replica id is kept.
pub(super) const REPLICA: &str = "replica";

/// A group of this home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRow {
    /// The group.
    pub id: GroupId,
    /// Its charter.
    pub charter: Vec<u8>,
    /// The author that writes here.
    pub author: AuthorId,
    /// Whether it is still in use here.
    pub active: bool,
    /// Others hold entries of our author that were not written here: a new author must be started before writing.
    pub behind: bool,
}

/// A secret, sealed before it came here.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedSecret {
    /// Names it within its kind.
    pub id: Vec<u8>,
    /// The sealed bytes.
    pub value: Vec<u8>,
}

impl fmt::Debug for SealedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedSecret({} bytes)", self.value.len())
    }
}

impl Txn<'_> {
    /// Keeps a value under a name of the caller's.
    pub fn put_meta(&mut self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.live()?
            .prepare_cached("INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = ?2")?
            .execute((key, value))?;
        Ok(())
    }

    /// Keeps a sealed secret.
    pub fn put_secret(&mut self, kind: &str, id: &[u8], sealed: &[u8]) -> Result<(), StoreError> {
        self.live()?
            .prepare_cached(
                "INSERT INTO secrets (kind, id, value) VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET value = ?3",
            )?
            .execute((kind, id, sealed))?;
        Ok(())
    }

    /// Deletes a sealed secret; true if there was one.
    pub fn delete_secret(&mut self, kind: &str, id: &[u8]) -> Result<bool, StoreError> {
        let sql = "DELETE FROM secrets WHERE kind = ?1 AND id = ?2";
        Ok(self.live()?.prepare_cached(sql)?.execute((kind, id))? > 0)
    }

    /// Takes a group into this home, with the author that is to write to it.
    pub fn create_group(&mut self, charter: &[u8], author: AuthorId) -> Result<GroupId, StoreError> {
        Membership::new(charter).map_err(StoreError::Charter)?;
        let id = GroupId::of(charter);
        let conn = self.live()?;
        let known: bool = conn
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM groups WHERE id = ?1)")?
            .query_row([id.0], |row| row.get(0))?;
        if known {
            return Err(StoreError::GroupExists(id));
        }
        conn.prepare_cached("INSERT INTO groups (id, charter, author) VALUES (?1, ?2, ?3)")?
            .execute(params![id.0, charter, author.0])?;
        let change = self.change(&id)?;
        change.group.feed(change.conn, author, true)?;
        Ok(id)
    }

    /// Takes a group into a blind replica, which has no author in it.
    pub fn host_group(&mut self, charter: &[u8]) -> Result<GroupId, StoreError> {
        Membership::new(charter).map_err(StoreError::Charter)?;
        let id = GroupId::of(charter);
        self.live()?
            .prepare_cached("INSERT INTO groups (id, charter, author) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")?
            .execute(params![id.0, charter, NO_AUTHOR.0])?;
        self.change(&id)?;
        Ok(id)
    }

    /// Marks a group as left, or as in use again; its log stays.
    pub fn set_active(&mut self, group: &GroupId, active: bool) -> Result<(), StoreError> {
        let sql = "UPDATE groups SET state = ?2 WHERE id = ?1";
        let changed = self.live()?.prepare_cached(sql)?.execute((group.0, i64::from(!active)))?;
        if changed == 0 { Err(StoreError::UnknownGroup(*group)) } else { Ok(()) }
    }

    /// Keeps a new, open invite; one already known stays as it is.
    pub fn put_invite(&mut self, group: &GroupId, invite: &InviteId, expires: Timestamp) -> Result<(), StoreError> {
        let gid = self.reader().gid(group)?;
        let sql = "INSERT INTO invites (gid, invite, state, expires) VALUES (?1, ?2, 0, ?3) ON CONFLICT DO NOTHING";
        self.live()?.prepare_cached(sql)?.execute((gid, invite.0, signed(expires.0)))?;
        Ok(())
    }

    /// Says what became of an invite, and who was admitted by it.
    pub fn set_invite(
        &mut self,
        group: &GroupId,
        invite: &InviteId,
        state: InviteState,
        used_by: Option<AuthorId>,
    ) -> Result<(), StoreError> {
        let gid = self.reader().gid(group)?;
        let sql = "UPDATE invites SET state = ?3, used_by = ?4 WHERE gid = ?1 AND invite = ?2";
        let values = (gid, invite.0, invite_column(state), used_by.map(|author| author.0));
        let changed = self.live()?.prepare_cached(sql)?.execute(values)?;
        if changed == 0 { Err(StoreError::UnknownInvite) } else { Ok(()) }
    }
}

impl Reader<'_> {
    /// The id of this database.
    pub fn replica_id(&self) -> Result<ReplicaId, StoreError> {
        let bytes = self.meta(REPLICA)?.and_then(|bytes| bytes.try_into().ok());
        bytes.map(ReplicaId).ok_or_else(|| StoreError::corrupt("the replica id is missing"))
    }

    /// A value kept under a name.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT value FROM meta WHERE key = ?1")?;
        Ok(statement.query_row([key], |row| row.get(0)).optional()?)
    }

    /// A sealed secret.
    pub fn secret(&self, kind: &str, id: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT value FROM secrets WHERE kind = ?1 AND id = ?2")?;
        Ok(statement.query_row((kind, id), |row| row.get(0)).optional()?)
    }

    /// Every sealed secret of a kind.
    pub fn secrets(&self, kind: &str) -> Result<Vec<SealedSecret>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT id, value FROM secrets WHERE kind = ?1 ORDER BY id")?;
        let rows = statement.query_map([kind], |row| Ok(SealedSecret { id: row.get(0)?, value: row.get(1)? }))?;
        Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
    }

    /// Every group of this home, in the order they came.
    pub fn groups(&self) -> Result<Vec<GroupRow>, StoreError> {
        let mut statement =
            self.conn.prepare_cached("SELECT id, charter, author, state, behind FROM groups ORDER BY gid")?;
        let rows = statement.query_map([], |row| {
            Ok(GroupRow {
                id: GroupId(row.get(0)?),
                charter: row.get(1)?,
                author: AuthorId(row.get(2)?),
                active: row.get::<_, i64>(3)? == 0,
                behind: row.get(4)?,
            })
        })?;
        Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
    }

    /// Bytes of a group's envelopes; looks at all of them.
    pub fn log_bytes(&self, group: &GroupId) -> Result<u64, StoreError> {
        let sql = "SELECT coalesce(sum(length(bytes)), 0) FROM entries WHERE id > ?1 AND id <= ?2";
        let gid = self.gid(group)?;
        let span = (row_id(gid, Cursor(0)), row_id(gid, MAX_CURSOR));
        Ok(unsigned(self.conn.prepare_cached(sql)?.query_row(span, |row| row.get(0))?))
    }

    /// Bytes of the file that are in use.
    pub fn used_bytes(&self) -> Result<u64, StoreError> {
        // a relay asks before each push
        let ask = |pragma| self.conn.prepare_cached(pragma)?.query_row([], |row| row.get::<_, i64>(0));
        let pages = ask("PRAGMA page_count")? - ask("PRAGMA freelist_count")?;
        Ok(unsigned(pages.saturating_mul(ask("PRAGMA page_size")?)))
    }

    /// A group of this home.
    pub fn group(&self, id: &GroupId) -> Result<GroupRow, StoreError> {
        self.groups()?.into_iter().find(|group| group.id == *id).ok_or(StoreError::UnknownGroup(*id))
    }

    /// What this home knows of an invite it made.
    pub fn invite(&self, group: &GroupId, invite: &InviteId) -> Result<Option<InviteStatus>, StoreError> {
        Ok(self.invites(group)?.into_iter().find_map(|(id, status)| (id == *invite).then_some(status)))
    }

    /// Every invite this home made in a group.
    pub fn invites(&self, group: &GroupId) -> Result<Vec<(InviteId, InviteStatus)>, StoreError> {
        let sql = "SELECT invite, state, expires, used_by FROM invites WHERE gid = ?1 ORDER BY expires, invite";
        let mut statement = self.conn.prepare_cached(sql)?;
        let mut rows = statement.query([self.gid(group)?])?;
        let mut invites = Vec::new();
        while let Some(row) = rows.next()? {
            let status = InviteStatus {
                state: invite_state(row.get(1)?)?,
                expires: Timestamp(unsigned(row.get(2)?)),
                used_by: row.get::<_, Option<[u8; 32]>>(3)?.map(AuthorId),
            };
            invites.push((InviteId(row.get(0)?), status));
        }
        Ok(invites)
    }
}
