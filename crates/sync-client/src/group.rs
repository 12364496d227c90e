//! One group of a home: its log, keys and author, and everything that happens to them.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use sync_core::Membership;
use sync_core::folder::Reissue;
use sync_core::session::{Effect, Reply};
use sync_crypto::rotation::{Before, History, make_rotation};
use sync_crypto::{AuthorSecret, EpochSecret, HomeKey};
use sync_store::{
    Appended, Content, GroupRow, Ingested, Limits, NewEntry, Peer, PeerNote, Renewal, SealEntries, SealError, Store,
    StoreError, Txn,
};
use sync_types::folder::KIND_RECORDS;
use sync_types::{
    AuthorId, AuthorKeys, BlobId, Class, Cursor, DeviceId, Envelope, EpochId, GroupId, GroupKind, MemberId, Number,
    Operation, ReplicaId, SignedOperation, Timestamp,
};
use tokio::sync::{broadcast, watch};

use crate::chunks::Chunks;
use crate::device::Inner;
use crate::error::ClientError;
use crate::event::{EVENT_BACKLOG, Event};
use crate::exec::{self, Arrival, Pull};
use crate::folders;
use crate::keys::{Author, GroupKeys, KIND_BLOB, KeysError, SharedRng, UnsealError, draw, succession, with_rng};
use crate::pairing::away;
use crate::peers::Peers;
use crate::relays::Relays;
use crate::secrets;

/// What a session tells of a peer.
#[derive(Debug, Clone)]
pub(crate) struct PeerFacts {
    pub(crate) replica: ReplicaId,
    pub(crate) author: AuthorId,
    pub(crate) device: DeviceId,
    pub(crate) name: String,
    pub(crate) addresses: Vec<String>,
}

/// What groups of one home share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) rng: SharedRng,
    pub(crate) home_key: Arc<HomeKey>,
    pub(crate) name: String,
    pub(crate) replica: ReplicaId,
    /// Where this device says it can be dialled.
    pub(crate) addresses: watch::Receiver<Vec<String>>,
    /// Drawn at this start, so that peers tell a restart from a second connection.
    pub(crate) incarnation: [u8; 8],
    /// Where relays wake this device; empty for nowhere.
    pub(crate) wake: watch::Sender<String>,
    /// Keys the digests that tell a retry from another entry.
    pub(crate) digest_key: [u8; 32],
}

/// One group of a home.
pub(crate) struct Group {
    pub(crate) id: GroupId,
    pub(crate) peers: Peers,
    pub(crate) relays: Relays,
    pub(crate) chunks: Chunks,
    shared: Shared,
    keys: Arc<RwLock<GroupKeys>>,
    author: RwLock<Arc<Author>>,
    /// One renewal at a time.
    renewing: tokio::sync::Mutex<()>,
    /// One rotation at a time.
    rotating: tokio::sync::Mutex<()>,
    events: broadcast::Sender<Event>,
    /// Moves whenever a peer's progress may have changed.
    progress: watch::Sender<u64>,
    newest: watch::Receiver<Cursor>,
    /// Moves whenever others shared an invite, or who belongs has changed.
    invites: watch::Sender<()>,
    refused: AtomicU64,
    /// Members whose word about our own feed was taken once.
    believed: Mutex<HashSet<MemberId>>,
    /// Why what peers send cannot be stored.
    trouble: Mutex<Option<String>>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("id", &self.id).finish_non_exhaustive()
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Now, by this device's clock.
pub(crate) fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

impl Group {
    /// Opens a group of the database; a new author is started first where the database says so or `copied` does.
    pub(crate) async fn open(shared: Shared, row: GroupRow, copied: bool) -> Result<Arc<Self>, ClientError> {
        let mut keys = GroupKeys::new(&row.charter)?;
        for (epoch, secret) in secrets::epochs(&shared, row.id).await? {
            keys.insert(epoch, secret)?;
        }
        // a crash may have come between an epoch and what waited for it
        let (id, epochs) = (row.id, keys.everything());
        let hand_out = move |txn: &mut Txn<'_>| {
            epochs.iter().try_for_each(|(epoch, _)| txn.epoch_readable(&id, *epoch).map(|_| ()))
        };
        shared.store.write(0, hand_out).await?;
        let keys = Arc::new(RwLock::new(keys));
        let secret = secrets::author(&shared, row.author).await?;
        let author = Author::new(secret, keys.clone(), shared.rng.clone());
        let newest = shared.store.watch(&row.id)?;
        let group = Arc::new(Self {
            id: row.id,
            peers: Peers::default(),
            relays: Relays::default(),
            chunks: Chunks::default(),
            shared,
            keys,
            author: RwLock::new(Arc::new(author)),
            renewing: tokio::sync::Mutex::new(()),
            rotating: tokio::sync::Mutex::new(()),
            events: broadcast::channel(EVENT_BACKLOG).0,
            progress: watch::channel(0).0,
            newest,
            invites: watch::Sender::new(()),
            refused: AtomicU64::new(0),
            believed: Mutex::default(),
            trouble: Mutex::default(),
        });
        group.open_rotations().await?;
        group.settle_keys().await?;
        if copied || row.behind {
            // a copy writes nothing again: what it holds, the original holds under the same names
            group.renew_author(row.author, row.behind).await?;
        }
        Ok(group)
    }

    pub(crate) fn device_name(&self) -> String {
        self.shared.name.clone()
    }

    pub(crate) fn replica(&self) -> ReplicaId {
        self.shared.replica
    }

    pub(crate) fn store(&self) -> &Store {
        &self.shared.store
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn author(&self) -> Arc<Author> {
        read(&self.author).clone()
    }

    pub(crate) fn keys(&self) -> std::sync::RwLockReadGuard<'_, GroupKeys> {
        read(&self.keys)
    }

    pub(crate) fn membership(&self) -> Arc<Membership> {
        self.shared.store.membership(&self.id).expect("BUG: an open group is in the store")
    }

    pub(crate) fn own_addresses(&self) -> Vec<String> {
        self.shared.addresses.borrow().clone()
    }

    pub(crate) fn watch_newest(&self) -> watch::Receiver<Cursor> {
        self.newest.clone()
    }

    pub(crate) fn watch_invites(&self) -> watch::Receiver<()> {
        self.invites.subscribe()
    }

    pub(crate) fn watch_progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    pub(crate) fn progress(&self) {
        self.progress.send_modify(|count| *count += 1);
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    pub(crate) fn emit(&self, event: Event) {
        let _ = self.events.send(event);
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(crate) fn count_refused(&self, count: u64) {
        self.refused.fetch_add(count, Ordering::Relaxed);
    }

    /// Entries of our own that nobody else holds.
    pub(crate) async fn pending(&self) -> u64 {
        let id = self.id;
        self.shared.store.read(move |reader| reader.unacked(&id)).await.unwrap_or(0)
    }

    /// An entry of ours, with the digest that tells a retry.
    pub(crate) fn entry(&self, blob_id: BlobId, content: Content) -> NewEntry {
        let digest = content.digest(&self.shared.digest_key);
        NewEntry { blob_id, timestamp: now(), content, digest }
    }

    /// Seals entries into our feed, in an epoch that no removed member knows: one is made where there is none.
    pub(crate) async fn append(&self, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError> {
        match self.append_now(&entries).await {
            Err(error) if is_stale(&error) => {
                self.rotate_for(error).await?;
                self.append_now(&entries).await
            }
            done => done,
        }
    }

    async fn rotate_for(&self, stale: StoreError) -> Result<(), StoreError> {
        self.rotate_if_stale().await.map_err(|error| match error {
            ClientError::Store(error) => error,
            error => {
                tracing::warn!(%error, "no group key could be made");
                stale
            }
        })
    }

    /// Seals entries into our feed, and once more under a new author if others turn out to know more of the old one.
    async fn append_now(&self, entries: &[NewEntry]) -> Result<Vec<Appended>, StoreError> {
        for _ in 0..MAX_RENEWALS {
            let author = self.author();
            let id = author.author();
            match self.shared.store.append(self.id, entries.to_vec(), author).await {
                Err(StoreError::AuthorBehind(_)) => self.renew_author(id, true).await?,
                Err(StoreError::AuthorChanged { current, .. }) => self.adopt(current).await?,
                Ok(appended) => {
                    self.announce(entries, &appended, id);
                    if entries.iter().any(|entry| entry.content.class() != Class::Sealed) {
                        self.settle_keys().await?;
                    }
                    return Ok(appended);
                }
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::AuthorBehind(self.author().author()))
    }

    /// Seals an entry into our feed that `build` makes of the database's present state, and does `work` in the same
    /// commit; where it makes none, only the work. Both may run more than once, of which one counts.
    pub(crate) async fn append_built<S: Send + 'static, T: Send + 'static>(
        &self,
        bytes: usize,
        build: impl Fn(&sync_store::Reader<'_>) -> Result<(Option<Content>, S), StoreError> + Send + Sync + 'static,
        work: impl Fn(&mut Txn<'_>, Option<&Appended>, S) -> Result<T, StoreError> + Send + Sync + 'static,
    ) -> Result<T, StoreError> {
        let (blob_id, digest_key) = (BlobId(draw(&self.shared.rng)), self.shared.digest_key);
        let both = Arc::new((build, work));
        for _ in 0..MAX_RENEWALS {
            let author = self.author();
            let id = author.author();
            let (group, both) = (self.id, both.clone());
            let write = self.shared.store.write(bytes, move |txn| {
                let (content, state) = both.0(&txn.reader())?;
                let Some(content) = content else { return both.1(txn, None, state) };
                let digest = content.digest(&digest_key);
                let entry = NewEntry { blob_id, timestamp: now(), content, digest };
                let appended = txn.append(&group, &[entry], &*author)?;
                both.1(txn, appended.first(), state)
            });
            match write.await {
                Err(error) if is_stale(&error) => self.rotate_for(error).await?,
                Err(StoreError::AuthorBehind(_)) => self.renew_author(id, true).await?,
                Err(StoreError::AuthorChanged { current, .. }) => self.adopt(current).await?,
                done => return done,
            }
        }
        Err(StoreError::AuthorBehind(self.author().author()))
    }

    /// Goes on as the author that the database names: a renewal is under way, or was cut off behind its commit.
    async fn adopt(&self, current: AuthorId) -> Result<(), StoreError> {
        let _one = self.renewing.lock().await;
        if self.author().author() == current {
            return Ok(());
        }
        let secret = secrets::author(&self.shared, current).await.map_err(|error| match error {
            ClientError::Store(error) => error,
            _ => StoreError::AuthorChanged { current, got: self.author().author() },
        })?;
        let author = Author::new(secret, self.keys.clone(), self.shared.rng.clone());
        *self.author.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(author);
        Ok(())
    }

    fn announce(&self, entries: &[NewEntry], appended: &[Appended], sender: AuthorId) {
        for (entry, stored) in entries.iter().zip(appended) {
            if matches!(entry.content, Content::Sealed { kind: KIND_BLOB, .. }) && !stored.repeated {
                self.emit(Event::BlobAvailable { blob_id: entry.blob_id, cursor: stored.cursor, sender });
            }
        }
    }

    /// Carries out an effect of a session; storing is [`Self::arrive`]'s.
    pub(crate) async fn execute(self: &Arc<Self>, effect: Effect) -> Option<Reply> {
        self.try_execute(effect).await.unwrap_or_else(|error| Some(self.failed(&error)))
    }

    fn failed(&self, error: &StoreError) -> Reply {
        tracing::warn!(%error, "session cannot go on");
        self.emit(Event::Error { code: "store".to_owned(), message: error.to_string() });
        self.set_trouble(Some(error.to_string()));
        Reply::Failed { text: "the other device's database does not work at the moment".to_owned() }
    }

    fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Why what peers sent last could not be stored.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn try_execute(self: &Arc<Self>, effect: Effect) -> Result<Option<Reply>, StoreError> {
        let id = self.id;
        let store = &self.shared.store;
        match effect {
            Effect::Survey { replica } => store.read(move |reader| exec::survey(reader, &id, &replica)).await.map(Some),
            Effect::Select { author, scope, after, check, have, covered } => {
                let pull = Pull { scope, after, check, have, covered };
                self.select(author, pull).await.map(Some)
            }
            Effect::Read { scope, not_from, after, limit, bytes, selection } => {
                let limits = Limits { entries: limit, bytes };
                let read = move |reader: &sync_store::Reader<'_>| {
                    exec::read(reader, &id, scope, not_from, after, limits, &selection)
                };
                store.read(read).await.map(Some)
            }
            Effect::ReadWanted { request, wants } => {
                store.read(move |reader| exec::read_wanted(reader, &id, request, &wants)).await.map(Some)
            }
            Effect::Acknowledged { replica, cursor } => {
                store.write(0, move |txn| exec::acknowledge(txn, &id, &replica, cursor)).await?;
                self.set_trouble(None);
                self.progress();
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Compares what a peer holds with what is held here.
    ///
    /// That it holds more of our own feed than we do is believed once; after that only entries we signed are, so that no
    /// member can keep us busy with new authors.
    async fn select(&self, peer: AuthorId, pull: Pull) -> Result<Reply, StoreError> {
        let id = self.id;
        let author = self.author().author();
        let asked = pull.clone();
        if let Some(reply) = self.shared.store.read(move |reader| exec::select(reader, &id, &asked)).await? {
            return Ok(reply);
        }
        let member = self.membership().author(&peer).map_or_else(|| peer.into(), |admitted| admitted.member);
        let first = self.believed.lock().unwrap_or_else(PoisonError::into_inner).insert(member);
        if first {
            self.renew_author(author, true).await?;
        } else {
            self.count_refused(1);
        }
        self.shared.store.read(move |reader| exec::select_anyway(reader, &id, &pull)).await
    }

    /// Stores what a peer sent, opens what it unlocks, and tells the application: all of it in one commit, or nothing.
    ///
    /// Each arrival is answered by its id, or all by one failure.
    pub(crate) async fn arrive(self: &Arc<Self>, arrivals: Vec<(u64, Arrival)>) -> Vec<Reply> {
        self.try_arrive(arrivals).await.unwrap_or_else(|error| vec![self.failed(&error)])
    }

    async fn try_arrive(self: &Arc<Self>, arrivals: Vec<(u64, Arrival)>) -> Result<Vec<Reply>, StoreError> {
        let id = self.id;
        let author = self.author().author();
        let keys = self.keys.clone();
        let bytes = arrivals.iter().flat_map(|(_, arrival)| &arrival.batch).map(Vec::len).sum();
        let shared = self.shared.clone();
        let work = move |txn: &mut Txn<'_>| {
            let readable = |epoch: EpochId| read(&keys).knows(epoch);
            let (mut stored, mut learnt) = (Vec::with_capacity(arrivals.len()), false);
            for (reply, arrival) in arrivals {
                let (ingested, wants) = exec::store(txn, &id, &arrival, &readable)?;
                learnt |= away::learn(txn, &shared, &id, &read(&keys), &arrival.batch, &ingested)?;
                stored.push((reply, arrival, ingested, wants));
            }
            Ok((stored, learnt))
        };
        let mut replies = Vec::new();
        let (stored, learnt) = self.shared.store.write(bytes, work).await?;
        let changed = |ingested: &Ingested| ingested.stored.iter().any(|stored| stored.class == Class::Membership);
        if learnt || stored.iter().any(|(_, _, ingested, _)| changed(ingested)) {
            self.invites.send_replace(());
        }
        for (reply, arrival, ingested, wants) in stored {
            self.set_trouble(None);
            self.count(&ingested);
            if ingested.stored.iter().any(|stored| stored.class == Class::Rotation)
                && let Err(error) = self.open_rotations().await
            {
                // what it would open waits, and is tried again with the next one and at the next start
                tracing::warn!(%error, "rotation cannot be opened");
            }
            if ingested.stored.iter().any(|stored| stored.class != Class::Sealed) {
                self.settle_keys().await?;
            }
            if ingested.own_feed_foreign {
                self.renew_author(author, true).await?;
            }
            self.tell(&arrival.batch, &ingested);
            replies.push(Reply::Stored { id: reply, membership: self.membership(), wants });
        }
        Ok(replies)
    }

    fn count(&self, ingested: &Ingested) {
        self.count_refused(u64::try_from(ingested.refused.len()).unwrap_or(u64::MAX));
        for (_, refusal) in &ingested.refused {
            tracing::debug!(%refusal, "entry refused");
        }
        for (author, number) in &ingested.forks {
            let message =
                format!("the feed of author {} forks at entry {number}; both branches are kept", author.short());
            self.emit(Event::Error { code: "fork".to_owned(), message });
        }
    }

    /// Tells subscribers of blobs that arrived; nothing is opened where nobody listens.
    fn tell(&self, batch: &[Vec<u8>], ingested: &Ingested) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let places: std::collections::HashMap<_, _> = ingested
            .stored
            .iter()
            .filter(|stored| stored.class == Class::Sealed && stored.readable)
            .map(|stored| ((stored.author, stored.number, stored.hash), stored.cursor))
            .collect();
        for envelope in batch.iter().filter_map(|bytes| Envelope::parse(bytes).ok()) {
            let header = &envelope.header;
            let Some(cursor) = places.get(&(header.sender, header.number, envelope.hash())) else { continue };
            match self.keys().unseal(&envelope) {
                Ok(content) if content.kind == KIND_BLOB => {
                    self.emit(Event::BlobAvailable { blob_id: header.blob_id, cursor: *cursor, sender: header.sender })
                }
                Ok(_) => {}
                Err(error) => self.unreadable(header.sender, &error),
            }
        }
    }

    /// Notes an entry that counts but does not open: its author sealed it wrongly.
    pub(crate) fn unreadable(&self, sender: AuthorId, error: &UnsealError) {
        let message = format!("an entry by author {} cannot be read: {error}", sender.short());
        tracing::debug!(%message, "entry skipped");
        self.emit(Event::Error { code: "unreadable".to_owned(), message });
    }

    /// Opens every rotation that is stored and whose epoch is not known yet.
    async fn open_rotations(&self) -> Result<(), ClientError> {
        let id = self.id;
        let stored = self.shared.store.read(move |reader| reader.rotations(&id)).await?;
        if stored.is_empty() {
            return Ok(());
        }
        let authors = secrets::authors(&self.shared).await?;
        let known = self.keys().everything();
        for (epoch, secret) in sync_core::epochs::open_rotations(&id, &known, &stored, &authors) {
            self.learn(epoch, secret).await?;
        }
        Ok(())
    }

    /// Decides which epoch is sealed in, now that membership or rotations may have changed.
    pub(crate) async fn settle_keys(&self) -> Result<(), StoreError> {
        let id = self.id;
        let stored = self.shared.store.read(move |reader| reader.rotations(&id)).await?;
        let membership = self.membership();
        self.keys.write().unwrap_or_else(PoisonError::into_inner).settle(&membership, &stored);
        Ok(())
    }

    /// Starts a new epoch for everyone who belongs now.
    pub(crate) async fn rotate(&self) -> Result<EpochId, ClientError> {
        let _one = self.rotating.lock().await;
        self.rotate_now().await
    }

    /// Starts a new epoch unless another one may be sealed in by now.
    async fn rotate_if_stale(&self) -> Result<(), ClientError> {
        let _one = self.rotating.lock().await;
        self.settle_keys().await?;
        let stale = matches!(self.keys().current(), Err(KeysError::Stale));
        if stale { self.rotate_now().await.map(|_| ()) } else { Ok(()) }
    }

    async fn rotate_now(&self) -> Result<EpochId, ClientError> {
        let (membership, author) = (self.membership(), self.author());
        let own = author.secret().id();
        let may = membership.author(&own).is_some_and(|own| own.role.may_rotate());
        if membership.charter().kind == GroupKind::Passphrase {
            return Err(ClientError::PassphraseGroup);
        }
        if !may {
            return Err(if membership.was_admitted(&own) { ClientError::Removed } else { ClientError::MayNotRemove });
        }
        let recipients: Vec<AuthorKeys> = membership.authors().map(|(_, admitted)| admitted.keys.clone()).collect();
        let (epoch, secret) = self.keys().newest().ok_or(KeysError::None)?;
        let before = Before { epoch, secret: &secret, history: History::Open };
        let made = with_rng(&self.shared.rng, |rng| make_rotation(&self.id, before, &recipients, rng))
            .map_err(|error| ClientError::Rotation(error.to_string()))?;
        // known here before anyone else hears of it
        self.learn(made.epoch, made.secret).await?;
        let operation = Operation::Rotate { epoch: made.epoch };
        let announced = SignedOperation { seen: membership.seen_by(&own), operation }.encode();
        let entries = [Content::Rotation(made.payload), Content::Membership(announced)]
            .map(|content| self.entry(BlobId(draw(&self.shared.rng)), content));
        self.append_now(&entries).await?;
        self.settle_keys().await?;
        tracing::info!(epoch = made.epoch.number, "made a new group key");
        Ok(made.epoch)
    }

    /// Takes in an epoch, durably first, and hands out what waited for it.
    async fn learn(&self, epoch: EpochId, secret: EpochSecret) -> Result<(), ClientError> {
        let sealed = secrets::seal_epoch(&self.shared, self.id, epoch, &secret);
        self.shared.store.write(0, move |txn| sealed.put(txn)).await?;
        self.keys.write().unwrap_or_else(PoisonError::into_inner).insert(epoch, secret)?;
        let id = self.id;
        self.shared.store.write(0, move |txn| txn.epoch_readable(&id, epoch)).await?;
        Ok(())
    }

    /// Goes on under a new author instead of `old`; with `reissue` what nobody holds is issued again.
    pub(crate) async fn renew_author(&self, old: AuthorId, reissue: bool) -> Result<(), StoreError> {
        let _one = self.renewing.lock().await;
        let before = self.author();
        if before.author() != old {
            return Ok(());
        }
        let membership = self.membership();
        let member = membership.author(&old).map_or_else(|| old.into(), |admitted| admitted.member);
        let secret = with_rng(&self.shared.rng, |rng| AuthorSecret::make(rng));
        let sealed = secrets::seal_author(&self.shared, &secret);
        let author = Arc::new(Author::new(secret, self.keys.clone(), self.shared.rng.clone()));
        let blob_id = BlobId(draw(&self.shared.rng));
        let entry = |content| self.entry(blob_id, content);
        let predecessor = self.first_author(&membership, &before).await;
        let succession = succession(&author, &predecessor, member, membership.seen_by(&old), entry)?;
        let (id, sealer, keys) = (self.id, author.clone(), self.keys.clone());
        let digest_key = self.shared.digest_key;
        let renewed = self
            .shared
            .store
            .write(succession.len(), move |txn| {
                sealed.put(txn)?;
                let reopen = |bytes: &[u8], lowest| reopen(&read(&keys), &digest_key, bytes, lowest);
                let renewal = Renewal {
                    succession: &succession,
                    sealer: &*sealer,
                    reopen: if reissue { Some(&reopen) } else { None },
                };
                let renewed = txn.renew_author(&id, &renewal)?;
                reissued(txn, &id, &renewed)?;
                Ok(renewed)
            })
            .await?;
        tracing::info!(reissued = renewed.reissued.len(), "went on under a new author");
        *self.author.write().unwrap_or_else(PoisonError::into_inner) = author;
        Ok(())
    }

    /// The earliest of this home's authors: it certifies every later one, so that a token stays short however often a
    /// home is copied or moved.
    async fn first_author(&self, membership: &Membership, from: &Author) -> AuthorSecret {
        let mut first = from.secret().clone();
        while let Some(by) = membership.author(&first.id()).and_then(|admitted| admitted.by) {
            match secrets::author(&self.shared, by).await {
                Ok(earlier) => first = earlier,
                Err(_) => break,
            }
        }
        first
    }

    /// Remembers what a peer says of itself; where the channel comes from counts as an address too.
    pub(crate) async fn note_peer(&self, facts: PeerFacts, seen_at: Option<SocketAddr>) {
        let PeerFacts { replica, author, device, name, mut addresses } = facts;
        if let Some(seen) = seen_at.map(|address| address.to_string())
            && !addresses.contains(&seen)
        {
            addresses.truncate(sync_types::bounds::MAX_ADDRESSES - 1);
            addresses.push(seen);
        }
        let note = PeerNote { author, device, name, addresses, now: now() };
        if let Err(error) = self.shared.store.note_peer(self.id, replica, note).await {
            tracing::warn!(%error, "peer's addresses could not be remembered");
        }
    }

    pub(crate) async fn stored_peers(&self) -> Vec<Peer> {
        self.shared.store.peers(self.id).await.unwrap_or_default()
    }

    /// Devices that this group's members were seen on, the last one seen first.
    pub(crate) async fn known_devices(&self) -> Vec<DeviceId> {
        let mut seen = HashSet::new();
        let devices = self.stored_peers().await.into_iter().filter_map(|peer| peer.device);
        devices.filter(|device| seen.insert(*device)).collect()
    }

    /// Where a device may be dialled: what it publishes on this machine, then what it last said.
    pub(crate) async fn addresses_of(&self, device: &Inner, peer: &DeviceId) -> Vec<SocketAddr> {
        let mut addresses = device.same_machine_addresses(peer);
        addresses.extend(self.peers.found_at(peer));
        let stored = self.stored_peers().await.into_iter().filter(|known| known.device == Some(*peer));
        for address in stored.flat_map(|known| known.addresses).filter_map(|text| text.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }
}

/// Whether nothing was stored because no epoch may be sealed in.
fn is_stale(error: &StoreError) -> bool {
    matches!(error, StoreError::Seal(error) if matches!(error.downcast_ref(), Some(KeysError::Stale)))
}

/// Renewals tried for one request: each is caused by a peer that knows more, and few peers come at once.
const MAX_RENEWALS: usize = 3;

/// Opens an own envelope to issue it again; what cannot be opened stays where it is.
///
/// `lowest` is the lowest number that leaves the feed: records of folders claim no more to have seen what stood there.
pub fn reopen(
    keys: &GroupKeys,
    digest_key: &[u8; 32],
    bytes: &[u8],
    lowest: Number,
) -> Result<Option<NewEntry>, SealError> {
    let envelope = Envelope::parse(bytes).map_err(SealError::new)?;
    let header = &envelope.header;
    let content = match header.class {
        Class::Sealed => match keys.unseal(&envelope) {
            Ok(opened) => {
                let body = match opened.kind {
                    KIND_RECORDS => folders::index::reissue_body(&opened.body, header.sender, lowest),
                    _ => opened.body.clone(),
                };
                Content::Sealed { kind: opened.kind, stream: opened.stream.clone(), body }
            }
            Err(_) => return Ok(None),
        },
        // an operation stays in the feed it was made in, where its hash may have been seen
        _ => return Ok(None),
    };
    let digest = content.digest(digest_key);
    Ok(Some(NewEntry { blob_id: header.blob_id, timestamp: header.timestamp, content, digest }))
}

/// Has folders know of what was issued again, in the transaction that did so.
pub fn reissued(txn: &mut Txn<'_>, group: &GroupId, renewed: &sync_store::Renewed) -> Result<(), StoreError> {
    let (Some((old, lowest)), Some((_, first))) = (renewed.left, renewed.reissued.first()) else { return Ok(()) };
    let reissue = Reissue { old, lowest, new: first.author, numbers: renewed.numbers.clone() };
    folders::index::reissued(txn, group, &reissue)
}

/// A sealed secret on its way into a transaction.
pub(crate) fn put_all(txn: &mut Txn<'_>, secrets: &[secrets::SealedSecret]) -> Result<(), StoreError> {
    secrets.iter().try_for_each(|secret| secret.put(txn))
}
