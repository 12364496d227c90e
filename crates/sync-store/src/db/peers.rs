//! Other replicas of a group: where they can be dialled, how far each was read, and how far each has read us.

use rusqlite::{OptionalExtension, params};
use sync_types::bounds::{MAX_ADDRESSES, MAX_NAME, MAX_TEXT};
use sync_types::{AuthorId, Check, Cursor, DeviceId, GroupId, ReplicaId, Timestamp};

use super::convert::{MAX_CURSOR, row_id, signed, timestamp, unsigned};
use super::{Reader, Txn};
use crate::error::StoreError;

/// A replica this home knows in one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub(super) i64);

/// What is known of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Names it here.
    pub id: PeerId,
    /// Its database.
    pub replica: ReplicaId,
    /// The author it proved.
    pub author: Option<AuthorId>,
    /// Its device.
    pub device: Option<DeviceId>,
    /// Its device's name.
    pub name: String,
    /// Where it can be dialled.
    pub addresses: Vec<String>,
    /// When it said so.
    pub addresses_at: Option<Timestamp>,
    /// When it was last connected.
    pub last_seen: Option<Timestamp>,
    /// Last cursor seen from it.
    pub cursor: Cursor,
    /// The check seen with that cursor.
    pub check: Check,
    /// Our highest cursor up to which it holds everything.
    pub acked: Cursor,
}

/// What a replica says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerNote {
    /// The author it proved.
    pub author: AuthorId,
    /// Its device.
    pub device: DeviceId,
    /// Its device's name.
    pub name: String,
    /// Where it can be dialled; none leaves those known before.
    pub addresses: Vec<String>,
    /// When it says so.
    pub now: Timestamp,
}

impl Txn<'_> {
    /// The peer of a replica, known from now on.
    pub fn peer(&mut self, group: &GroupId, replica: &ReplicaId) -> Result<PeerId, StoreError> {
        self.live()?;
        if let Some(known) = self.reader().peer(group, replica)? {
            return Ok(known);
        }
        let gid = self.reader().gid(group)?;
        let mut insert = self.live()?.prepare_cached("INSERT INTO peers (gid, replica) VALUES (?1, ?2)")?;
        Ok(PeerId(insert.insert((gid, replica.0))?))
    }

    /// Remembers what a replica says of itself; new addresses replace the old ones.
    pub fn note_peer(&mut self, group: &GroupId, peer: PeerId, note: &PeerNote) -> Result<(), StoreError> {
        self.expect_peer(group, peer)?;
        let name = &note.name[..note.name.floor_char_boundary(MAX_NAME)];
        let addresses = note
            .addresses
            .iter()
            .filter(|address| !address.is_empty() && address.len() <= MAX_TEXT && !address.contains(char::is_control));
        let addresses: Vec<&str> = addresses.take(MAX_ADDRESSES).map(String::as_str).collect();
        let now = signed(note.now.0);
        let conn = self.live()?;
        conn.prepare_cached("UPDATE peers SET author = ?2, device = ?3, name = ?4, last_seen = ?5 WHERE peer = ?1")?
            .execute(params![peer.0, note.author.0, note.device.0, name, now])?;
        if !addresses.is_empty() {
            conn.prepare_cached("UPDATE peers SET addresses = ?2, addresses_at = ?3 WHERE peer = ?1")?
                .execute(params![peer.0, addresses.join("\n"), now])?;
        }
        Ok(())
    }

    /// Remembers that a replica without author and device is there, and under which name.
    pub fn note_blind(&mut self, group: &GroupId, peer: PeerId, name: &str, now: Timestamp) -> Result<(), StoreError> {
        self.expect_peer(group, peer)?;
        let name = &name[..name.floor_char_boundary(MAX_TEXT)];
        self.live()?.prepare_cached("UPDATE peers SET name = ?2, last_seen = ?3 WHERE peer = ?1")?.execute((
            peer.0,
            name,
            signed(now.0),
        ))?;
        Ok(())
    }

    /// Forgets what a replica holds, and up to where it was read: it is no longer asked.
    pub fn forget_held(&mut self, group: &GroupId, replica: &ReplicaId) -> Result<(), StoreError> {
        let gid = self.reader().gid(group)?;
        self.live()?
            .prepare_cached("UPDATE peers SET acked = 0, cursor = 0, chk = ?3 WHERE gid = ?1 AND replica = ?2")?
            .execute((gid, replica.0, Check::NONE.0))?;
        Ok(())
    }

    /// A peer holds everything of ours up to a cursor; a cursor we never gave counts as our newest.
    pub fn record_ack(&mut self, group: &GroupId, peer: PeerId, cursor: Cursor) -> Result<(), StoreError> {
        self.expect_peer(group, peer)?;
        let reader = self.reader();
        let cursor = cursor.min(reader.max_cursor(group)?);
        self.live()?
            .prepare_cached("UPDATE peers SET acked = max(acked, ?2) WHERE peer = ?1")?
            .execute((peer.0, signed(cursor.0)))?;
        Ok(())
    }

    /// Remembers up to where a peer's log was read; `(Cursor(0), Check::NONE)` reads it from the start.
    pub fn set_position(
        &mut self,
        group: &GroupId,
        peer: PeerId,
        cursor: Cursor,
        check: Check,
    ) -> Result<(), StoreError> {
        self.expect_peer(group, peer)?;
        self.live()?.prepare_cached("UPDATE peers SET cursor = ?2, chk = ?3 WHERE peer = ?1")?.execute((
            peer.0,
            signed(cursor.0),
            check.0,
        ))?;
        Ok(())
    }

    /// Fails unless the peer belongs to the group.
    pub(super) fn expect_peer(&self, group: &GroupId, peer: PeerId) -> Result<(), StoreError> {
        let gid = self.reader().gid(group)?;
        let mut statement =
            self.live()?.prepare_cached("SELECT EXISTS (SELECT 1 FROM peers WHERE peer = ?1 AND gid = ?2)")?;
        let known: bool = statement.query_row((peer.0, gid), |row| row.get(0))?;
        if known { Ok(()) } else { Err(StoreError::UnknownPeer) }
    }
}

impl Reader<'_> {
    /// Every replica known in a group, the one seen last first.
    pub fn peers(&self, group: &GroupId) -> Result<Vec<Peer>, StoreError> {
        let mut statement = self.conn.prepare_cached(
            "SELECT peer, replica, author, device, name, addresses, addresses_at, last_seen, cursor, chk, acked \
             FROM peers WHERE gid = ?1 ORDER BY last_seen DESC, peer",
        )?;
        let rows = statement.query_map([self.gid(group)?], |row| {
            Ok(Peer {
                id: PeerId(row.get(0)?),
                replica: ReplicaId(row.get(1)?),
                author: row.get::<_, Option<_>>(2)?.map(AuthorId),
                device: row.get::<_, Option<_>>(3)?.map(DeviceId),
                name: row.get(4)?,
                addresses: row.get::<_, String>(5)?.lines().map(str::to_owned).collect(),
                addresses_at: timestamp(row.get(6)?),
                last_seen: timestamp(row.get(7)?),
                cursor: Cursor(unsigned(row.get(8)?)),
                check: Check(row.get(9)?),
                acked: Cursor(unsigned(row.get(10)?)),
            })
        })?;
        Ok(rows.collect::<Result<_, rusqlite::Error>>()?)
    }

    /// The peer of a replica, if it is known.
    pub fn peer(&self, group: &GroupId, replica: &ReplicaId) -> Result<Option<PeerId>, StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT peer FROM peers WHERE gid = ?1 AND replica = ?2")?;
        Ok(statement.query_row((self.gid(group)?, replica.0), |row| row.get(0).map(PeerId)).optional()?)
    }

    /// Up to where a peer's log was read.
    pub fn position(&self, group: &GroupId, peer: PeerId) -> Result<(Cursor, Check), StoreError> {
        let mut statement = self.conn.prepare_cached("SELECT cursor, chk FROM peers WHERE gid = ?1 AND peer = ?2")?;
        let read = |row: &rusqlite::Row<'_>| Ok((Cursor(unsigned(row.get(0)?)), Check(row.get(1)?)));
        statement.query_row((self.gid(group)?, peer.0), read).optional()?.ok_or(StoreError::UnknownPeer)
    }

    /// Our highest cursor up to which some peer holds everything.
    pub fn acked(&self, group: &GroupId) -> Result<Cursor, StoreError> {
        Ok(self.peers(group)?.into_iter().map(|peer| peer.acked).max().unwrap_or_default())
    }

    /// How many entries written here no peer has acknowledged.
    pub fn unacked(&self, group: &GroupId) -> Result<u64, StoreError> {
        let gid = self.gid(group)?;
        let mut statement =
            self.conn.prepare_cached("SELECT count(*) FROM entries WHERE id > ?1 AND id <= ?2 AND own = 2")?;
        let span = (row_id(gid, self.acked(group)?), row_id(gid, MAX_CURSOR));
        Ok(unsigned(statement.query_row(span, |row| row.get(0))?))
    }

    /// The peers that hold everything of ours up to a cursor.
    pub fn handed_to(&self, group: &GroupId, cursor: Cursor) -> Result<Vec<Peer>, StoreError> {
        let mut peers = self.peers(group)?;
        peers.retain(|peer| peer.acked >= cursor);
        Ok(peers)
    }
}
