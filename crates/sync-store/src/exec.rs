//! Carries out a session's effects on a database: the same code under the shells and in the simulator.

use std::sync::Arc;

use sync_core::session::Reply;
use sync_types::bounds::{FRAME_BYTES_TARGET, MAX_FRAME_ENVELOPES};
use sync_types::{Check, Cursor, EpochId, FeedHave, GroupId, ReplicaId, Scope, Want};

use crate::db::{Ingested, Limits, Reader, Txn};
use crate::error::StoreError;

/// A batch to store for a session.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The peer's database; none before it has shown that it belongs to the group.
    pub replica: Option<ReplicaId>,
    /// The envelopes.
    pub batch: Vec<Vec<u8>>,
    /// Cursor and check of the peer's replica up to which nothing is missing now.
    pub position: Option<(Cursor, Check)>,
}

/// Stores a batch, and with it the position reached.
pub fn store(
    txn: &mut Txn<'_>,
    group: &GroupId,
    arrival: &Arrival,
    readable: &dyn Fn(EpochId) -> bool,
) -> Result<(Ingested, Vec<Want>), StoreError> {
    let peer = match &arrival.replica {
        Some(replica) => Some(txn.peer(group, replica)?),
        None => None,
    };
    let ingested = txn.ingest(group, &arrival.batch, peer, arrival.position, readable)?;
    let wants = txn.wants(group)?;
    Ok((ingested, wants))
}

/// Notes what a peer acknowledged.
pub fn acknowledge(txn: &mut Txn<'_>, group: &GroupId, replica: &ReplicaId, cursor: Cursor) -> Result<(), StoreError> {
    let peer = txn.peer(group, replica)?;
    txn.record_ack(group, peer, cursor)
}

/// Tells what is held.
pub fn survey(reader: &Reader<'_>, group: &GroupId, replica: &ReplicaId) -> Result<Reply, StoreError> {
    let position = match reader.peer(group, replica)? {
        Some(peer) => reader.position(group, peer)?,
        None => (Cursor(0), Check::NONE),
    };
    let newest = reader.max_cursor(group)?;
    let check = reader.check_at(group, newest)?.unwrap_or(Check::NONE);
    Ok(Reply::Survey { have: reader.have(group)?, position, newest: (newest, check) })
}

/// A PULL to compare with what is held.
#[derive(Debug, Clone)]
pub struct Pull {
    /// Which entries are meant.
    pub scope: Scope,
    /// Last cursor the peer saw here.
    pub after: Cursor,
    /// The check it saw with it.
    pub check: Check,
    /// What it holds.
    pub have: Vec<FeedHave>,
    /// What it does not want.
    pub covered: Vec<FeedHave>,
}

/// Compares what a peer holds with what is held; none if our author must be renewed first.
///
/// Already where only membership is meant: an operation sent before would be the highest of our feed on both sides, and
/// hide that they differ below it.
pub fn select(reader: &Reader<'_>, group: &GroupId, pull: &Pull) -> Result<Option<Reply>, StoreError> {
    if reader.knows_more(group, &pull.have)? {
        return Ok(None);
    }
    select_anyway(reader, group, pull).map(Some)
}

/// Compares what a peer holds with what is held, whatever it says of our own feed.
pub fn select_anyway(reader: &Reader<'_>, group: &GroupId, pull: &Pull) -> Result<Reply, StoreError> {
    let known = reader.check_at(group, pull.after)? == Some(pull.check);
    let selection = Arc::new(reader.select(group, pull.scope, &pull.have, &pull.covered)?);
    let start = if known { pull.after } else { Cursor(0) };
    Ok(Reply::Selected { scope: pull.scope, selection, start, reset: !known })
}

/// Reads entries to send.
pub fn read(
    reader: &Reader<'_>,
    group: &GroupId,
    scope: Scope,
    not_from: Option<ReplicaId>,
    after: Cursor,
    limits: Limits,
    selection: &sync_core::Selection,
) -> Result<Reply, StoreError> {
    let not_from = match not_from {
        Some(replica) => reader.peer(group, &replica)?,
        None => None,
    };
    let batch = reader.read_after(group, after, limits, selection, not_from)?;
    Ok(Reply::Read {
        scope,
        entries: batch.entries,
        max_cursor: batch.max_cursor,
        check: batch.check,
        has_more: batch.has_more,
        holds_from: reader.holds_from(group)?,
    })
}

/// Reads entries by number.
pub fn read_wanted(reader: &Reader<'_>, group: &GroupId, request: u32, wants: &[Want]) -> Result<Reply, StoreError> {
    let limits = Limits { entries: MAX_FRAME_ENVELOPES, bytes: 2 * FRAME_BYTES_TARGET };
    Ok(Reply::Wanted { request, entries: reader.entries_at(group, wants, limits)? })
}
