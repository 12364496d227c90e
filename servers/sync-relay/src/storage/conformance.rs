//! What every storage must do, as functions over the trait; each runs for SQLite and for PostgreSQL.

#[cfg(unix)]
#[path = "../../tests/it/postgresql.rs"]
mod postgresql;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use sync_core::Selection;
use sync_core::session::Reply;
use sync_crypto::AuthorSecret;
use sync_crypto::author::SignPurpose;
use sync_store::exec::{Arrival, Pull};
use sync_store::{Limits, WaitingRequest};
use sync_types::{
    AuthorId, BlobId, Carried, Charter, Check, Chunker, Class, Cursor, Draft, Envelope, EnvelopeHash, EnvelopeType,
    EpochId, ErrorCode, FeedHave, GroupId, GroupKind, Header, MemberId, Number, Operation, Quorum, Range, ReplicaId,
    Role, Scope, SignedOperation, Timestamp, Want,
};

use super::{Live, Reading, Room, Storage, Stored, open};
use crate::config::Config;

/// A database that can be opened again.
struct Place {
    dir: tempfile::TempDir,
    database: Option<String>,
}

impl Place {
    fn sqlite() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), database: None }
    }

    async fn open(&self) -> Arc<dyn Storage> {
        let (data, database) = (self.dir.path().to_owned(), self.database.clone());
        open(&Config { data, database, ..Config::default() }).await.unwrap()
    }
}

/// Its name, and what checks it.
type Clause = (&'static str, fn(Place) -> BoxFuture<'static, ()>);

/// Lists what is checked, runs each for SQLite as a test of its own, and all of it for PostgreSQL on one server.
macro_rules! contract {
    ($($name:ident)*) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::$name(super::Place::sqlite()).await;
                }
            )*
        }

        #[cfg(unix)]
        const CONTRACT: &[Clause] = &[$((stringify!($name), |place| $name(place).boxed())),*];
    };
}

contract! {
    a_group_is_kept_once_and_only_where_there_is_room
    what_was_stored_is_given_out_byte_for_byte_by_cursor
    what_does_not_count_is_refused_and_what_is_known_is_stored_once
    operations_of_a_batch_come_before_the_entries_they_let_in
    a_position_is_remembered_and_what_came_from_a_peer_is_not_read_back_to_it
    what_is_read_once_for_all_is_what_each_would_read
    what_lacks_is_wanted_until_it_comes
    both_branches_of_a_fork_are_kept_and_told
    a_full_group_takes_memberships_only
    a_full_database_takes_nothing_sealed
    what_is_old_expires_but_for_the_last_of_each_feed
    what_expired_and_is_lacking_is_wanted_and_stored_anew
    everything_is_there_again_after_it_was_opened_anew
    many_at_once_get_cursors_without_gaps_and_no_more_than_the_room
    requests_to_join_are_kept_with_their_answers_until_they_are_old_or_no_longer_needed
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn postgresql_keeps_the_contract() {
    let Some(server) = postgresql::Postgresql::start() else { return };
    for (at, (name, check)) in CONTRACT.iter().enumerate() {
        eprintln!("postgresql: {name}");
        let database = Some(server.database(&format!("contract{at}")));
        check(Place { dir: tempfile::tempdir().unwrap(), database }).await;
    }
}

/// An author with a feed.
#[derive(Clone)]
struct Writer {
    secret: Arc<AuthorSecret>,
    charter: Vec<u8>,
    written: u64,
    previous: EnvelopeHash,
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand_core::UnwrapErr(getrandom::SysRng).fill_bytes(&mut bytes);
    bytes
}

impl Writer {
    /// The founder of a new group.
    fn founder() -> Self {
        let secret = AuthorSecret::make(&mut rand_core::UnwrapErr(getrandom::SysRng));
        let (founder, quorum, chunker) = (secret.keys(), Quorum::default(), Chunker::default());
        let (nonce, commitment) = (random(), random());
        let charter = Charter { kind: GroupKind::Random, founder, quorum, suite: 1, chunker, nonce, commitment };
        Self::new(secret, charter.encode())
    }

    fn new(secret: AuthorSecret, charter: Vec<u8>) -> Self {
        Self { secret: Arc::new(secret), charter, written: 0, previous: EnvelopeHash::NONE }
    }

    /// Someone else of the group, and what lets that one in.
    fn admit(&mut self) -> (Self, Vec<u8>) {
        let secret = AuthorSecret::make(&mut rand_core::UnwrapErr(getrandom::SysRng));
        let (keys, member) = (secret.keys(), MemberId(secret.id().0));
        let consent = sync_crypto::pairing::consent(&secret, [0; 32], None);
        let operation = Operation::Admit { keys, member, role: Role::Member, invite: None, consent };
        let admission = self.write(Class::Membership, &SignedOperation { seen: Vec::new(), operation }.encode());
        (Self::new(secret, self.charter.clone()), admission)
    }

    fn author(&self) -> AuthorId {
        self.secret.id()
    }

    fn group(&self) -> GroupId {
        GroupId::of(&self.charter)
    }

    fn entry(&mut self, bytes: usize) -> Vec<u8> {
        self.write(Class::Sealed, &vec![7; bytes])
    }

    fn entries(&mut self, count: usize) -> Vec<Vec<u8>> {
        (0..count).map(|_| self.entry(10)).collect()
    }

    fn write(&mut self, class: Class, payload: &[u8]) -> Vec<u8> {
        self.written += 1;
        let sealed = class == Class::Sealed;
        let header = Header {
            kind: EnvelopeType::Push,
            sender: self.author(),
            group: self.group(),
            timestamp: Timestamp(1),
            nonce: random(),
            blob_id: BlobId(random()),
            number: Number(self.written),
            previous: self.previous,
            class,
            epoch: if sealed { EpochId::first(&self.charter) } else { EpochId { number: 0, hash: [0; 32] } },
            commitment: if sealed { random() } else { [0; 32] },
        };
        let mut draft = Draft::new(&header, payload.len()).unwrap();
        draft.payload_mut().copy_from_slice(payload);
        let signature = self.secret.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        let bytes = draft.sign(&signature);
        self.previous = Envelope::parse(&bytes).unwrap().hash();
        bytes
    }
}

const EVERYTHING: Limits = Limits { entries: 1_000_000, bytes: 1 << 30 };
const PEER: ReplicaId = ReplicaId([3; ReplicaId::LEN]);

fn roomy() -> Room {
    Room { told_full: Arc::default(), group_bytes: 1 << 30, database_bytes: 1 << 30 }
}

fn arrival(batch: Vec<Vec<u8>>) -> Arrival {
    Arrival { replica: Some(PEER), batch, position: None }
}

async fn hosted(storage: &dyn Storage, writer: &Writer) -> Live {
    assert_eq!(storage.host(writer.charter.clone(), 1000, 1 << 30).await.unwrap(), None);
    storage.live(writer.group()).await.unwrap().unwrap()
}

async fn stored(storage: &dyn Storage, writer: &Writer, batch: Vec<Vec<u8>>) -> Stored {
    storage.store(writer.group(), arrival(batch), roomy()).await.unwrap()
}

fn reading(scope: Scope, not_from: Option<ReplicaId>, after: Cursor, limits: Limits) -> Reading {
    Reading { scope, not_from, after, limits, selection: Arc::new(Selection::everything(scope)) }
}

/// Entries, the cursor reached, its check, whether there is more, and from where everything is held.
async fn read(storage: &dyn Storage, group: GroupId, reading: Reading) -> (Vec<Carried>, Cursor, Check, bool, Cursor) {
    parts(storage.read(group, reading).await.unwrap())
}

fn parts(reply: Reply) -> (Vec<Carried>, Cursor, Check, bool, Cursor) {
    match reply {
        Reply::Read { entries, max_cursor, check, has_more, holds_from, .. } => {
            (entries, max_cursor, check, has_more, holds_from)
        }
        other => panic!("{other:?}"),
    }
}

async fn all(storage: &dyn Storage, group: GroupId) -> Vec<Vec<u8>> {
    let (entries, ..) = read(storage, group, reading(Scope::All, None, Cursor(0), EVERYTHING)).await;
    let cursors: Vec<u64> = entries.iter().map(|carried| carried.cursor.0).collect();
    assert!(cursors.is_sorted(), "{cursors:?}");
    entries.into_iter().map(|carried| carried.envelope).collect()
}

async fn survey(storage: &dyn Storage, group: GroupId) -> (Vec<FeedHave>, (Cursor, Check), (Cursor, Check)) {
    match storage.survey(group, PEER).await.unwrap() {
        Reply::Survey { have, position, newest } => (have, position, newest),
        other => panic!("{other:?}"),
    }
}

async fn select(storage: &dyn Storage, group: GroupId, pull: Pull) -> (Arc<Selection>, Cursor, bool) {
    match storage.select(group, pull).await.unwrap() {
        Reply::Selected { selection, start, reset, .. } => (selection, start, reset),
        other => panic!("{other:?}"),
    }
}

fn pull(after: Cursor, check: Check, have: Vec<FeedHave>) -> Pull {
    Pull { scope: Scope::All, after, check, have, covered: Vec::new() }
}

fn want(author: AuthorId, first: u64, last: u64) -> Want {
    Want { author, range: Range { first: Number(first), last: Number(last) } }
}

async fn a_group_is_kept_once_and_only_where_there_is_room(place: Place) {
    let storage = place.open().await;
    let (anna, ben) = (Writer::founder(), Writer::founder());
    assert!(storage.live(anna.group()).await.unwrap().is_none());
    assert!(storage.store(anna.group(), arrival(Vec::new()), roomy()).await.is_err());
    assert_eq!(storage.host(anna.charter.clone(), 1, 1 << 30).await.unwrap(), None);
    assert_eq!(storage.host(anna.charter.clone(), 1, 0).await.unwrap(), None, "it is here already");
    assert_eq!(storage.host(ben.charter.clone(), 1, 1 << 30).await.unwrap(), Some(ErrorCode::TooManyGroups));
    assert_eq!(storage.host(ben.charter.clone(), 2, 0).await.unwrap(), Some(ErrorCode::StorageFull));
    assert!(storage.live(ben.group()).await.unwrap().is_none());
    assert_eq!(storage.groups().await.unwrap(), vec![anna.group()]);
    assert_eq!(storage.usage().await.unwrap().groups, 1);
    let (have, position, newest) = survey(&*storage, anna.group()).await;
    assert!(have.is_empty());
    assert_eq!((position, newest), ((Cursor(0), Check::NONE), (Cursor(0), Check::NONE)));
}

async fn what_was_stored_is_given_out_byte_for_byte_by_cursor(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    let mut live = hosted(&*storage, &anna).await;
    let batches = [anna.entries(3), anna.entries(2)];
    for batch in &batches {
        assert_eq!(stored(&*storage, &anna, batch.clone()).await.new, batch.len());
    }
    tokio::time::timeout(Duration::from_secs(60), live.newest.wait_for(|cursor| *cursor == Cursor(5)))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(all(&*storage, anna.group()).await, batches.concat());
    // in parts: what limits there are, a first entry always comes
    let (mut after, mut got) = (Cursor(0), Vec::new());
    loop {
        let limits = Limits { entries: 2, bytes: 1 << 30 };
        let (entries, reached, check, has_more, holds_from) =
            read(&*storage, anna.group(), reading(Scope::All, None, after, limits)).await;
        assert_eq!(holds_from, Cursor(1));
        let (_, start, reset) = select(&*storage, anna.group(), pull(reached, check, Vec::new())).await;
        assert_eq!((start, reset), (reached, false), "a pair that was given is known");
        let (_, start, reset) = select(&*storage, anna.group(), pull(reached, Check([9; 8]), Vec::new())).await;
        assert_eq!((start, reset), (Cursor(0), true));
        got.extend(entries);
        after = reached;
        if !has_more {
            break;
        }
    }
    assert_eq!(got.iter().map(|carried| carried.cursor.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    let limits = Limits { entries: 10, bytes: 1 };
    let (entries, _, _, has_more, _) =
        read(&*storage, anna.group(), reading(Scope::All, None, Cursor(0), limits)).await;
    assert_eq!((entries.len(), has_more), (1, true));
    let (_, _, reset) = select(&*storage, anna.group(), pull(Cursor(6), Check::NONE, Vec::new())).await;
    assert!(reset, "a cursor ahead of the log");
    // by number
    let wants = vec![want(anna.author(), 4, 9), want(anna.author(), 1, 1)];
    match storage.read_wanted(anna.group(), 7, wants).await.unwrap() {
        Reply::Wanted { request: 7, entries } => {
            assert_eq!(entries.iter().map(|carried| carried.cursor.0).collect::<Vec<_>>(), [4, 5, 1]);
        }
        other => panic!("{other:?}"),
    }
}

async fn what_does_not_count_is_refused_and_what_is_known_is_stored_once(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let first = anna.entry(10);
    let mut stranger =
        Writer::new(AuthorSecret::make(&mut rand_core::UnwrapErr(getrandom::SysRng)), anna.charter.clone());
    let mut forged = anna.clone().entry(10);
    *forged.last_mut().unwrap() ^= 1;
    let batch = vec![
        first.clone(),
        first.clone(),
        stranger.entry(10),
        Writer::founder().entry(10),
        forged,
        b"no envelope".to_vec(),
    ];
    let done = stored(&*storage, &anna, batch).await;
    assert_eq!((done.new, done.refused, done.lacking), (1, 4, None));
    let done = stored(&*storage, &anna, vec![first.clone()]).await;
    assert_eq!((done.new, done.refused), (0, 0));
    assert_eq!(all(&*storage, anna.group()).await, [first]);
}

async fn operations_of_a_batch_come_before_the_entries_they_let_in(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let (mut ben, admission) = anna.admit();
    let (carl, second) = ben.admit();
    let entry = ben.entry(10);
    let done = stored(&*storage, &anna, vec![entry.clone(), second.clone(), admission.clone()]).await;
    assert_eq!((done.new, done.refused), (3, 0));
    assert!(done.membership.is_admitted(&ben.author()) && done.membership.is_admitted(&carl.author()));
    assert_eq!(all(&*storage, anna.group()).await, [second.clone(), admission.clone(), entry]);
    // the second stands before what lets its sender in, also when all is read anew
    storage.close().await.unwrap();
    let storage = place.open().await;
    let done = stored(&*storage, &anna, Vec::new()).await;
    assert!(done.membership.is_admitted(&carl.author()));
    let (entries, ..) = read(&*storage, anna.group(), reading(Scope::Membership, None, Cursor(0), EVERYTHING)).await;
    assert_eq!(entries.into_iter().map(|carried| carried.envelope).collect::<Vec<_>>(), [second, admission]);
}

async fn a_position_is_remembered_and_what_came_from_a_peer_is_not_read_back_to_it(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let position = Some((Cursor(9), Check([4; 8])));
    let batch = anna.entries(2);
    storage.store(anna.group(), Arrival { position, ..arrival(batch.clone()) }, roomy()).await.unwrap();
    let other = ReplicaId([8; ReplicaId::LEN]);
    let from_other = anna.entries(1);
    storage
        .store(anna.group(), Arrival { replica: Some(other), ..arrival(from_other.clone()) }, roomy())
        .await
        .unwrap();
    assert_eq!(survey(&*storage, anna.group()).await.1, (Cursor(9), Check([4; 8])));
    let along = |peer| reading(Scope::All, Some(peer), Cursor(0), EVERYTHING);
    let bytes = |entries: Vec<Carried>| entries.into_iter().map(|carried| carried.envelope).collect::<Vec<_>>();
    assert_eq!(bytes(read(&*storage, anna.group(), along(PEER)).await.0), from_other);
    assert_eq!(bytes(read(&*storage, anna.group(), along(other)).await.0), batch);
    let unknown = ReplicaId([9; ReplicaId::LEN]);
    assert_eq!(read(&*storage, anna.group(), along(unknown)).await.0.len(), 3);
}

async fn what_is_read_once_for_all_is_what_each_would_read(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    let live = hosted(&*storage, &anna).await;
    let group = anna.group();
    let (mut ben, admission) = anna.admit();
    from(&*storage, group, PEER, [vec![admission], anna.entries(3)].concat()).await;
    from(&*storage, group, OTHER, ben.entries(3)).await;
    let everything = Arc::new(Selection::everything(Scope::All));
    let memberships = Arc::new(Selection::everything(Scope::Membership));
    same_from_memory(&*storage, &live, group, &[everything.clone(), memberships.clone()]).await;
    let mut twin = anna.clone();
    from(&*storage, group, OTHER, anna.entries(2)).await;
    let (have, ..) = survey(&*storage, group).await;
    let (holding_one_branch, ..) = select(&*storage, group, pull(Cursor(0), Check::NONE, have)).await;
    let selections = [everything, memberships, holding_one_branch];
    same_from_memory(&*storage, &live, group, &selections).await;
    // what was read before does not know that there are two
    from(&*storage, group, PEER, twin.entries(2)).await;
    same_from_memory(&*storage, &live, group, &selections).await;
    from(&*storage, group, PEER, ben.entries(1)).await;
    same_from_memory(&*storage, &live, group, &selections).await;
    storage.mark_time(group, Timestamp(1)).await.unwrap();
    assert!(storage.expire(group, Timestamp(1), 100).await.unwrap() > 0);
    same_from_memory(&*storage, &live, group, &selections).await;

    let (mut walked, mut after) = (Vec::new(), Cursor(0));
    loop {
        let window = storage.window(group, after, Limits { entries: 2, bytes: 1 << 20 }).await.unwrap();
        assert!(window.rows.len() <= 2);
        walked.extend(window.rows.iter().map(|row| row.envelope.clone()));
        after = window.end;
        if after == window.newest {
            break;
        }
    }
    assert_eq!(walked, all(&*storage, group).await);
}

const OTHER: ReplicaId = ReplicaId([8; ReplicaId::LEN]);

async fn from(storage: &dyn Storage, group: GroupId, replica: ReplicaId, batch: Vec<Vec<u8>>) {
    let count = batch.len();
    let arrival = Arrival { replica: Some(replica), ..arrival(batch) };
    assert_eq!(storage.store(group, arrival, roomy()).await.unwrap().new, count);
}

/// Compares what sessions are given from memory with what the database gives them.
async fn same_from_memory(storage: &dyn Storage, live: &Live, group: GroupId, selections: &[Arc<Selection>]) {
    let newest = survey(storage, group).await.2.0;
    // a session that is a little behind is the first to ask
    let first = reading(Scope::All, Some(PEER), Cursor(newest.0 - 2), EVERYTHING);
    live.tail.read(storage, group, newest, first).await.unwrap();
    let mut from_memory = 0;
    let small = [(1, 1 << 20), (2, 1 << 20), (9, 700)].map(|(entries, bytes)| Limits { entries, bytes });
    for limits in [&small[..], &[EVERYTHING]].concat() {
        for selection in selections {
            for (after, not_from) in
                (0..=newest.0).flat_map(|after| [None, Some(PEER), Some(OTHER)].map(|of| (after, of)))
            {
                let (scope, after, selection) = (selection.scope(), Cursor(after), selection.clone());
                let reading = Reading { scope, not_from, after, limits, selection };
                let expected = read(storage, group, reading.clone()).await;
                if let Some(reply) = live.tail.answer(newest, &reading) {
                    from_memory += 1;
                    assert_eq!(parts(reply), expected, "{reading:?}");
                }
                let along = live.tail.read(storage, group, newest, reading.clone()).await.unwrap();
                assert_eq!(parts(along), expected, "{reading:?}");
            }
        }
    }
    assert!(from_memory >= 3 * 3 * selections.len() * 4, "{from_memory}: the last three cursors at least");
    assert!(live.tail.answer(Cursor(newest.0 + 1), &reading(Scope::All, None, newest, EVERYTHING)).is_none());
}

async fn what_lacks_is_wanted_until_it_comes(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let feed = anna.entries(6);
    let done = stored(&*storage, &anna, vec![feed[1].clone(), feed[4].clone()]).await;
    assert_eq!(done.wants, [want(anna.author(), 1, 1), want(anna.author(), 3, 4)]);
    assert_eq!(storage.wants(anna.group()).await.unwrap(), done.wants);
    let done = stored(&*storage, &anna, vec![feed[2].clone(), feed[0].clone()]).await;
    assert_eq!(done.wants, [want(anna.author(), 4, 4)]);
    assert!(stored(&*storage, &anna, vec![feed[3].clone()]).await.wants.is_empty());
    let (have, ..) = survey(&*storage, anna.group()).await;
    assert_eq!(have[0].ranges, [Range { first: Number(1), last: Number(5) }]);
    assert_eq!(have[0].heads, [Envelope::parse(&feed[4]).unwrap().hash()]);
}

async fn both_branches_of_a_fork_are_kept_and_told(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let common = anna.entries(2);
    let mut twin = anna.clone();
    let (ours, theirs) = (anna.entries(2), twin.entries(2));
    stored(&*storage, &anna, [common, ours].concat()).await;
    let (before, ..) = survey(&*storage, anna.group()).await;
    let mut told = before.clone();
    told[0].heads = vec![Envelope::parse(&theirs[1]).unwrap().hash()];
    let (selection, ..) = select(&*storage, anna.group(), pull(Cursor(0), Check::NONE, told)).await;
    assert!(selection.diverges(), "another hash at the same number");
    assert_eq!(stored(&*storage, &anna, theirs).await.new, 2);
    let (have, ..) = survey(&*storage, anna.group()).await;
    assert_eq!(have[0].fork, Some(Number(3)));
    assert_ne!(have[0].digest, [0; 32]);
    assert_eq!(all(&*storage, anna.group()).await.len(), 6);
    let (selection, ..) = select(&*storage, anna.group(), pull(Cursor(0), Check::NONE, before)).await;
    assert!(selection.diverges());
    let (selection, ..) = select(&*storage, anna.group(), pull(Cursor(0), Check::NONE, have)).await;
    assert!(!selection.diverges());
}

async fn a_full_group_takes_memberships_only(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let room = Room { told_full: Arc::new(AtomicBool::new(false)), group_bytes: 40_000, database_bytes: 1 << 30 };
    let put = |batch| storage.store(anna.group(), arrival(batch), room.clone());
    let mut writer = anna.clone();
    let done = put(vec![writer.entry(30_000)]).await.unwrap();
    assert_eq!((done.lacking, done.new), (None, 1));
    let mut half = arrival(vec![writer.entry(9_000), writer.entry(9_000)]);
    half.position = Some((Cursor(5), Check([1; 8])));
    let done = storage.store(anna.group(), half, room.clone()).await.unwrap();
    assert_eq!((done.lacking, done.new), (Some(ErrorCode::GroupFull), 0));
    assert_eq!(survey(&*storage, anna.group()).await.1, (Cursor(0), Check::NONE), "its position is not reached");
    // once it was told, nothing sealed comes in, though it would fit
    let (_, admission) = writer.admit();
    let done = put(vec![writer.entry(10), admission]).await.unwrap();
    assert_eq!((done.lacking, done.new), (Some(ErrorCode::GroupFull), 1));
    let mut many = Vec::new();
    for _ in 0..40 {
        many.push(writer.admit().1);
    }
    assert!(many.concat().len() > 20_000, "more than a quarter");
    assert_eq!(put(many).await.unwrap().new, 0);
    // another session was not told
    let room = Room { told_full: Arc::default(), ..room };
    let done = storage.store(anna.group(), arrival(vec![anna.entry(10)]), room).await.unwrap();
    assert_eq!(done.lacking, None);
}

async fn a_full_database_takes_nothing_sealed(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let room = Room { told_full: Arc::default(), group_bytes: 1 << 30, database_bytes: 1_000_000 };
    let mut kept = 0;
    loop {
        let done = storage.store(anna.group(), arrival(vec![anna.entry(150_000)]), room.clone()).await.unwrap();
        match done.lacking {
            None => kept += 1,
            Some(code) => {
                assert_eq!((code, done.new), (ErrorCode::StorageFull, 0));
                break;
            }
        }
    }
    assert!((1..7).contains(&kept), "{kept}");
    let used = storage.usage().await.unwrap().bytes;
    assert!(used < 1_050_000, "{used}: SQLite counts pages");
    let mut ben = Writer::founder();
    hosted(&*storage, &ben).await;
    let room = Room { told_full: Arc::default(), ..room };
    let done = storage.store(ben.group(), arrival(vec![ben.entry(150_000)]), room).await.unwrap();
    assert_eq!(done.lacking, Some(ErrorCode::StorageFull), "all groups share it");
}

async fn what_is_old_expires_but_for_the_last_of_each_feed(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let group = anna.group();
    let old = anna.entries(4);
    let (mut ben, admission) = anna.admit();
    let last = anna.entry(10);
    stored(&*storage, &anna, [old, vec![admission.clone(), last.clone()]].concat()).await;
    let bens = ben.entry(10);
    stored(&*storage, &ben, vec![bens.clone()]).await;
    assert_eq!(storage.expire(group, Timestamp(1000), 100).await.unwrap(), 0, "nothing is known of its time");
    storage.mark_time(group, Timestamp(500)).await.unwrap();
    let new = ben.entries(2);
    stored(&*storage, &ben, new.clone()).await;
    storage.mark_time(group, Timestamp(1500)).await.unwrap();
    assert_eq!(storage.expire(group, Timestamp(499), 100).await.unwrap(), 0);
    assert_eq!(storage.expire(group, Timestamp(1000), 3).await.unwrap(), 3);
    assert_eq!(storage.expire(group, Timestamp(1000), 3).await.unwrap(), 2, "one of anna's, and ben's first");
    assert_eq!(storage.expire(group, Timestamp(1000), 3).await.unwrap(), 0);
    assert_eq!(all(&*storage, group).await, [vec![admission, last], new].concat());
    let (.., holds_from) = read(&*storage, group, reading(Scope::All, None, Cursor(0), EVERYTHING)).await;
    assert_eq!(holds_from, Cursor(8));
    // what went counts as held
    assert!(storage.wants(group).await.unwrap().is_empty());
    assert_eq!(stored(&*storage, &ben, vec![bens]).await.new, 0);
}

async fn what_expired_and_is_lacking_is_wanted_and_stored_anew(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    let mut live = hosted(&*storage, &anna).await;
    live.wanted.mark_unchanged();
    let group = anna.group();
    let feed = anna.entries(6);
    // the newest cursor is that of a number that fills a gap, and expires
    stored(&*storage, &anna, [&feed[..2], &feed[3..]].concat()).await;
    stored(&*storage, &anna, vec![feed[2].clone()]).await;
    storage.mark_time(group, Timestamp(1)).await.unwrap();
    assert_eq!(storage.expire(group, Timestamp(1), 100).await.unwrap(), 5);
    let (have, _, (newest, check)) = survey(&*storage, group).await;
    assert_eq!((newest, &have[0].ranges[..]), (Cursor(6), &[Range { first: Number(1), last: Number(6) }][..]));
    let (_, _, reset) = select(&*storage, group, pull(newest, check, Vec::new())).await;
    assert!(!reset, "who has read everything need not begin anew");
    storage.want_again(group, vec![want(anna.author(), 6, 6)]).await.unwrap();
    assert!(!live.wanted.has_changed().unwrap(), "that one is here");
    storage.want_again(group, vec![want(anna.author(), 2, 2)]).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), live.wanted.changed()).await.unwrap().unwrap();
    assert_eq!(storage.wants(group).await.unwrap(), [want(anna.author(), 1, 5)], "all that went with it");
    let done = stored(&*storage, &anna, feed[1..3].to_vec()).await;
    assert_eq!(done.new, 2);
    assert_eq!(done.wants, [want(anna.author(), 1, 1), want(anna.author(), 4, 5)]);
    assert_eq!(survey(&*storage, group).await.2.0, Cursor(8));
    let usage = storage.usage().await.unwrap();
    assert!(usage.bytes > 0 && usage.commits > 0);
}

async fn everything_is_there_again_after_it_was_opened_anew(place: Place) {
    let storage = place.open().await;
    let mut anna = Writer::founder();
    hosted(&*storage, &anna).await;
    let (mut ben, admission) = anna.admit();
    let bens = ben.entries(5);
    stored(&*storage, &anna, vec![admission, bens[0].clone(), bens[2].clone(), bens[4].clone()]).await;
    storage.mark_time(anna.group(), Timestamp(1)).await.unwrap();
    storage.expire(anna.group(), Timestamp(1), 1).await.unwrap();
    let before = (storage.replica(), survey(&*storage, anna.group()).await, all(&*storage, anna.group()).await);
    storage.close().await.unwrap();
    drop(storage);
    let storage = place.open().await;
    let after = (storage.replica(), survey(&*storage, anna.group()).await, all(&*storage, anna.group()).await);
    assert_eq!(before, after);
    let live = storage.live(anna.group()).await.unwrap().unwrap();
    assert_eq!(*live.newest.borrow(), Cursor(4));
    let done = stored(&*storage, &anna, vec![bens[3].clone(), bens[1].clone()]).await;
    assert_eq!((done.new, done.refused, done.wants), (2, 0, Vec::new()));
}

async fn requests_to_join_are_kept_with_their_answers_until_they_are_old_or_no_longer_needed(place: Place) {
    let storage = place.open().await;
    let request = |place: u8, number: u32, left: u64| WaitingRequest {
        place: [place; 16],
        number,
        owner: [9; 16],
        left: Timestamp(left),
        request: vec![7; 4352],
        answer: None,
    };
    let [first, second, other] = [request(1, 1, 100), request(1, 2, 101), request(2, 1, 102)];
    for each in [&first, &second, &other] {
        storage.keep_request(each.clone(), Timestamp(0)).await.unwrap();
    }
    storage.keep_answer([1; 16], 2, vec![8; 70_000]).await.unwrap();
    storage.keep_answer([5; 16], 2, vec![8]).await.unwrap();
    storage.close().await.unwrap();
    drop(storage);
    let storage = place.open().await;
    let answered = WaitingRequest { answer: Some(vec![8; 70_000]), ..second };
    assert_eq!(storage.requests().await.unwrap(), [first, answered.clone(), other.clone()]);
    storage.forget_requests([1; 16], Some(1)).await.unwrap();
    assert_eq!(storage.requests().await.unwrap(), [answered, other.clone()]);
    let later = request(3, 1, 200);
    storage.keep_request(later.clone(), Timestamp(102)).await.unwrap();
    assert_eq!(storage.requests().await.unwrap(), [other, later.clone()]);
    storage.forget_requests([2; 16], None).await.unwrap();
    assert_eq!(storage.requests().await.unwrap(), [later]);
    storage.close().await.unwrap();
}

async fn many_at_once_get_cursors_without_gaps_and_no_more_than_the_room(place: Place) {
    let storages = [place.open().await];
    many_at_once(&storages).await;
}

/// Stores from many tasks at once, each through one of these.
async fn many_at_once(storages: &[Arc<dyn Storage>]) {
    let mut anna = Writer::founder();
    hosted(&*storages[0], &anna).await;
    let group = anna.group();
    let mut writers = Vec::new();
    for _ in 0..8 {
        let (writer, admission) = anna.admit();
        stored(&*storages[0], &anna, vec![admission]).await;
        writers.push(writer);
    }
    let before: usize = all(&*storages[0], group).await.iter().map(Vec::len).sum();
    let room = before as u64 + 50_000;
    let tasks: Vec<_> = writers
        .into_iter()
        .enumerate()
        .map(|(at, mut writer)| {
            let storage = storages[at % storages.len()].clone();
            tokio::spawn(async move {
                let room = Room { told_full: Arc::default(), group_bytes: room, database_bytes: 1 << 30 };
                let mut kept = 0;
                for _ in 0..20 {
                    let entry = writer.entry(1000);
                    kept += storage.store(writer.group(), arrival(vec![entry]), room.clone()).await.unwrap().new;
                }
                kept
            })
        })
        .collect();
    let mut kept = 0;
    for task in tasks {
        kept += task.await.unwrap();
    }
    for storage in storages {
        let (entries, newest, ..) = read(&**storage, group, reading(Scope::All, None, Cursor(0), EVERYTHING)).await;
        let cursors: Vec<u64> = entries.iter().map(|carried| carried.cursor.0).collect();
        assert_eq!(cursors, (1..=newest.0).collect::<Vec<_>>());
        assert_eq!(entries.len(), kept + 8);
        let bytes: usize = entries.iter().map(|carried| carried.envelope.len()).sum();
        assert!(bytes as u64 <= room && kept > 20, "{bytes} of {room}, {kept} entries");
    }
}

/// One thing done to a storage.
#[derive(Debug, Clone)]
enum Step {
    /// Entries of a pool by their place in it, from one of three peers.
    Store { batch: Vec<usize>, peer: u8, position: Option<u64> },
    /// Time is noted, and what is older than some of it goes.
    Expire { keep: u64, limit: usize },
    /// A member lacks some numbers of an author.
    Lack { author: usize, first: u64, len: u64 },
    /// A peer that holds what another storage at that time would say asks for the rest.
    Ask { peer: u8, after: u64, limit: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let store = (prop::collection::vec(0..POOL, 0..12), 0u8..3, prop::option::of(0u64..9));
    prop_oneof![
        6 => store.prop_map(|(batch, peer, position)| Step::Store { batch, peer, position }),
        1 => (0u64..6, 1usize..6).prop_map(|(keep, limit)| Step::Expire { keep, limit }),
        1 => (0usize..3, 1u64..12, 0u64..6).prop_map(|(author, first, len)| Step::Lack { author, first, len }),
        2 => (0u8..3, 0u64..30, 1usize..20).prop_map(|(peer, after, limit)| Step::Ask { peer, after, limit }),
    ]
}

/// Entries of the pool: three feeds, of which one forks, and some that do not count.
const POOL: usize = 43;

/// What a group of three wrote.
fn pool() -> (Vec<AuthorId>, Vec<u8>, Vec<Vec<u8>>) {
    let mut anna = Writer::founder();
    let (mut ben, first) = anna.admit();
    let mut pool = vec![first];
    pool.extend(anna.entries(8));
    let (mut carl, second) = ben.admit();
    pool.push(second);
    pool.extend(ben.entries(4));
    let mut twin = ben.clone();
    pool.extend(ben.entries(5));
    pool.extend(twin.entries(3));
    pool.push(twin.admit().1);
    pool.extend(carl.entries(10));
    pool.extend(anna.entries(6));
    let mut forged = anna.entry(20);
    *forged.last_mut().unwrap() ^= 1;
    pool.push(forged);
    pool.push(Writer::founder().entry(10));
    pool.push(vec![1, 2, 3]);
    pool.push(anna.entry(3000));
    assert_eq!(pool.len(), POOL);
    (vec![anna.author(), ben.author(), carl.author()], anna.charter, pool)
}

/// Does a step; returns all that can be seen of it but what is drawn.
async fn see(
    storage: &dyn Storage,
    group: GroupId,
    authors: &[AuthorId],
    pool: &[Vec<u8>],
    at: u64,
    step: &Step,
) -> String {
    let replica = |peer: u8| ReplicaId([peer; ReplicaId::LEN]);
    match step {
        Step::Store { batch, peer, position } => {
            let batch = batch.iter().map(|at| pool[*at].clone()).collect();
            let position = position.map(|cursor| (Cursor(cursor), Check([1; 8])));
            let room = Room { told_full: Arc::default(), group_bytes: 12_000, database_bytes: 1 << 30 };
            let arrival = Arrival { replica: Some(replica(*peer)), batch, position };
            let Stored { lacking, new, refused, membership, wants } =
                storage.store(group, arrival, room).await.unwrap();
            let admitted: Vec<_> = authors.iter().map(|author| membership.is_admitted(author)).collect();
            format!("{lacking:?} {new} {refused} {admitted:?} {wants:?}")
        }
        Step::Expire { keep, limit } => {
            storage.mark_time(group, Timestamp(at)).await.unwrap();
            let before = Timestamp(at.saturating_sub(*keep));
            format!("{}", storage.expire(group, before, *limit).await.unwrap())
        }
        Step::Lack { author, first, len } => {
            let wants = vec![want(authors[*author], *first, first + len)];
            storage.want_again(group, wants.clone()).await.unwrap();
            let given = storage.read_wanted(group, 1, wants).await.unwrap();
            format!("{:?} {given:?}", storage.wants(group).await.unwrap())
        }
        Step::Ask { peer, after, limit } => {
            let limits = Limits { entries: *limit, bytes: 8000 };
            let mut seen = String::new();
            for (scope, along) in [(Scope::All, true), (Scope::All, false), (Scope::Membership, false)] {
                let along = along.then(|| replica(*peer));
                let (entries, reached, _, has_more, from) =
                    read(storage, group, reading(scope, along, Cursor(*after), limits)).await;
                seen += &format!("{entries:?} {reached:?} {has_more} {from:?}\n");
            }
            // of another's feeds some is left out, and some is another's
            let (mut have, ..) = survey(storage, group).await;
            for (at, feed) in have.iter_mut().enumerate() {
                feed.ranges[0].last = Number(feed.ranges[0].last.0.min(*after).max(feed.ranges[0].first.0));
                if at % 2 == 1 {
                    feed.heads[0] = EnvelopeHash([5; 32]);
                }
            }
            let (selection, start, reset) = select(storage, group, pull(Cursor(*after), Check::NONE, have)).await;
            let reading = Reading { selection, ..reading(Scope::All, None, start, limits) };
            let (entries, reached, ..) = read(storage, group, reading).await;
            seen + &format!("{reset} {entries:?} {reached:?}")
        }
    }
}

/// All that is kept but what is drawn.
async fn kept(storage: &dyn Storage, group: GroupId) -> String {
    let (entries, reached, _, _, from) = read(storage, group, reading(Scope::All, None, Cursor(0), EVERYTHING)).await;
    let (have, (position, _), (newest, _)) = survey(storage, group).await;
    let wants = storage.wants(group).await.unwrap();
    format!("{entries:?} {reached:?} {from:?}\n{have:?} {position:?} {newest:?}\n{wants:?}")
}

#[cfg(unix)]
#[test]
fn the_same_in_the_same_order_gives_the_same_in_both() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let Some(server) = postgresql::Postgresql::start() else { return };
    let place = Place { dir: tempfile::tempdir().unwrap(), database: Some(server.database("same")) };
    let (sqlite, postgres) = (Place::sqlite(), place);
    let both = [runtime.block_on(sqlite.open()), runtime.block_on(postgres.open())];
    let mut runner = TestRunner::new(ProptestConfig { cases: 24, ..ProptestConfig::default() });
    let steps = prop::collection::vec(step(), 1..30);
    let done = runner.run(&steps, |steps| {
        runtime.block_on(async {
            // a group of its own for each run
            let (authors, charter, pool) = pool();
            let group = GroupId::of(&charter);
            for storage in &both {
                assert_eq!(storage.host(charter.clone(), 1000, 1 << 30).await.unwrap(), None);
            }
            for (at, step) in steps.iter().enumerate() {
                let mut seen = Vec::new();
                for storage in &both {
                    seen.push(see(&**storage, group, &authors, &pool, at as u64 + 1, step).await);
                }
                prop_assert_eq!(&seen[0], &seen[1], "{:?}", step);
            }
            let [sqlite, postgres] = &both;
            prop_assert_eq!(kept(&**sqlite, group).await, kept(&**postgres, group).await);
            Ok(())
        })
    });
    done.unwrap();
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn two_processes_on_one_database_tell_each_other_and_give_one_log() {
    let Some(server) = postgresql::Postgresql::start() else { return };
    let place = Place { dir: tempfile::tempdir().unwrap(), database: Some(server.database("two")) };
    let (one, other) = (place.open().await, place.open().await);
    assert_eq!(one.replica(), other.replica());
    let mut anna = Writer::founder();
    hosted(&*one, &anna).await;
    let mut live = hosted(&*other, &anna).await;
    let (mut ben, admission) = anna.admit();
    stored(&*one, &anna, vec![admission]).await;
    let patience = Duration::from_secs(60);
    tokio::time::timeout(patience, live.newest.wait_for(|cursor| *cursor == Cursor(1))).await.unwrap().unwrap();
    // let in by the one, ben writes to the other, and to the one again
    let bens = ben.entries(4);
    assert_eq!(stored(&*other, &anna, bens[..2].to_vec()).await.new, 2);
    assert_eq!(stored(&*one, &anna, bens.clone()).await.new, 2);
    assert_eq!(all(&*one, anna.group()).await, all(&*other, anna.group()).await);

    one.mark_time(anna.group(), Timestamp(1)).await.unwrap();
    assert_eq!(other.expire(anna.group(), Timestamp(1), 10).await.unwrap(), 3);
    live.wanted.mark_unchanged();
    one.want_again(anna.group(), vec![want(ben.author(), 2, 2)]).await.unwrap();
    tokio::time::timeout(patience, live.wanted.changed()).await.unwrap().unwrap();
    assert_eq!(other.wants(anna.group()).await.unwrap(), [want(ben.author(), 1, 3)]);
    assert_eq!(stored(&*other, &anna, bens[..3].to_vec()).await.new, 3);

    many_at_once(&[one, other]).await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_database_it_is_used_again_and_others_are_heard() {
    let Some(mut server) = postgresql::Postgresql::start() else { return };
    let place = Place { dir: tempfile::tempdir().unwrap(), database: Some(server.database("again")) };
    let (one, other) = (place.open().await, place.open().await);
    let mut anna = Writer::founder();
    hosted(&*one, &anna).await;
    let mut live = hosted(&*other, &anna).await;
    let mut kept = Vec::new();
    for round in 0..3 {
        let entry = anna.entry(100);
        stored(&*one, &anna, vec![entry.clone()]).await;
        kept.push(entry);
        if round == 1 {
            server.crash();
        } else {
            server.restart();
        }
        // the first who ask may still be told that it is away
        let start = std::time::Instant::now();
        let entry = anna.entry(100);
        while let Err(error) = one.store(anna.group(), arrival(vec![entry.clone()]), roomy()).await {
            assert!(start.elapsed() < Duration::from_secs(60), "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        kept.push(entry);
        let newest = Cursor(kept.len() as u64);
        tokio::time::timeout(Duration::from_secs(60), live.newest.wait_for(|cursor| *cursor == newest))
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(all(&*other, anna.group()).await, kept);
}
