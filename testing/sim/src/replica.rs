//! One replica: a real database on a simulated disk, with its keys, its author and its app.
//!
//! What it does with an effect is what `sync-client` does, by the same functions, without the async shell.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rand_chacha::ChaCha20Rng;
use sync_client::exec::{self, Arrival, Pull};
use sync_client::keys::{Author, GroupKeys, KeysError, SharedRng, succession};
use sync_client::{reissued, reopen};
use sync_core::epochs::open_rotations;
use sync_core::session::{Effect, Reply};
use sync_core::{Belonging, Membership, Refusal};
use sync_crypto::author::AUTHOR_SECRET_LEN;
use sync_crypto::rotation::{Before, History, make_rotation};
use sync_crypto::{AuthorSecret, EpochSecret};
use sync_store::{
    Appended, Content, Db, DbOptions, Limits, NewEntry, Renewal, SealEntries, SealError, StoreError, Txn,
};
use sync_types::{
    AuthorId, AuthorKeys, BlobId, Class, Cursor, Cut, Envelope, EnvelopeHash, EpochId, GroupId, MemberId, Number,
    Operation, ReplicaId, Role, Scope, SignedOperation, Timestamp,
};

use crate::folder::Folder;
use crate::random::{bytes, derive};
use crate::tree::Tree;
use crate::vfs::{Disk, Image};

/// Keys the digests that tell a retry from another entry.
const DIGEST_KEY: [u8; 32] = [7; 32];
/// Kinds of secrets, as the client names them; nothing here is worth sealing.
const AUTHOR: &str = "author";
const EPOCH: &str = "epoch";
/// Renewals tried for one request, as in the client.
const MAX_RENEWALS: usize = 3;
/// No limit worth the name.
pub(crate) const ALL: Limits = Limits { entries: usize::MAX, bytes: usize::MAX };

/// Everything ever sealed here, in order.
type Seals = Arc<Mutex<Vec<Vec<u8>>>>;

/// An app that reads what comes.
#[derive(Debug, Clone, Default)]
pub(crate) struct App {
    /// Where it reads on.
    pub(crate) cursor: Cursor,
    /// Envelopes it was given.
    pub(crate) seen: BTreeSet<EnvelopeHash>,
}

/// A copy of a home, made while it was in use.
#[derive(Debug, Clone)]
pub(crate) struct Backup {
    image: Image,
    app: App,
    copied: bool,
    tree: Tree,
}

/// A place where a replica is, was or may be.
pub(crate) struct Replica {
    // closed before its disk goes
    pub(crate) running: Option<Running>,
    pub(crate) disk: Disk,
    /// The machine's source of randomness; no crash and no backup rewinds it.
    rng: SharedRng,
    seals: Seals,
    /// The keys with which a newcomer asks to be admitted, again after a crash.
    pub(crate) newcomer: AuthorSecret,
    /// There is a home here, with a database or soon to have one.
    pub(crate) exists: bool,
    /// The home is a copy that has not started as a replica of its own yet.
    copied: bool,
    /// How often it was replaced by a backup.
    pub(crate) restored: u32,
    /// Ms that its clock is off.
    pub(crate) clock: i64,
    /// Something is wrong with its disk, so that errors are no surprise.
    pub(crate) troubled: bool,
    /// What it holds for certain.
    pub(crate) held: BTreeSet<EnvelopeHash>,
    /// Epochs it can open.
    pub(crate) opens: BTreeSet<EpochId>,
    /// The highest number of its own feeds that others were seen to hold.
    pub(crate) shown: BTreeMap<AuthorId, Number>,
    pub(crate) app: App,
    /// What the app asked to push and was not told to be stored.
    pub(crate) outbox: Vec<NewEntry>,
    pub(crate) backup: Option<Backup>,
    /// The folder's files.
    pub(crate) tree: Tree,
    /// The folder, while it is up and has a place here.
    pub(crate) folder: Option<Folder>,
    /// Times that what could not be done in the folder is tried again.
    pub(crate) retries: u32,
}

/// A replica that is up.
pub(crate) struct Running {
    pub(crate) db: Db,
    pub(crate) group: GroupId,
    pub(crate) keys: Arc<RwLock<GroupKeys>>,
    author: Arc<Recorder>,
    pub(crate) id: ReplicaId,
    rng: SharedRng,
    seals: Seals,
    copied: bool,
    /// Drawn at this start.
    pub(crate) incarnation: [u8; 8],
    /// Members whose word on our own feed was taken once.
    believed: BTreeSet<MemberId>,
}

/// Seals as an author and remembers what was sealed, stored or not.
struct Recorder {
    author: Author,
    seals: Seals,
}

impl SealEntries for Recorder {
    fn author(&self) -> AuthorId {
        self.author.author()
    }

    fn seal(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Result<Vec<u8>, SealError> {
        let sealed = self.author.seal(number, previous, entry)?;
        remember(&self.seals, &sealed);
        Ok(sealed)
    }
}

fn remember(seals: &Seals, sealed: &[u8]) {
    seals.lock().unwrap_or_else(PoisonError::into_inner).push(sealed.to_vec());
}

/// What stands under one cursor.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) cursor: Cursor,
    pub(crate) hash: EnvelopeHash,
    pub(crate) sender: AuthorId,
    pub(crate) number: Number,
}

/// An entry of an author, timestamp and digest included.
pub(crate) fn entry(blob_id: BlobId, now: Timestamp, content: Content) -> NewEntry {
    let digest = content.digest(&DIGEST_KEY);
    NewEntry { blob_id, timestamp: now, content, digest }
}

fn random<const N: usize>(rng: &SharedRng) -> [u8; N] {
    bytes(&mut Draws(rng))
}

/// A shared generator, locked for each draw.
struct Draws<'a>(&'a SharedRng);

impl rand_core::TryRng for Draws<'_> {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).try_fill_bytes(bytes)
    }
}

impl rand_core::TryCryptoRng for Draws<'_> {}

fn epoch_name(epoch: EpochId) -> Vec<u8> {
    [&epoch.number.to_be_bytes()[..], &epoch.hash].concat()
}

fn epoch_of(name: &[u8]) -> Option<EpochId> {
    let (number, hash) = name.split_first_chunk::<4>()?;
    Some(EpochId { number: u32::from_be_bytes(*number), hash: hash.try_into().ok()? })
}

fn damaged(what: &str) -> StoreError {
    StoreError::Corrupt(what.into())
}

fn put_author(txn: &mut Txn<'_>, secret: &AuthorSecret) -> Result<(), StoreError> {
    txn.put_secret(AUTHOR, &secret.id().0, &secret.expose_bytes()[..])
}

fn put_epoch(txn: &mut Txn<'_>, kind: &str, epoch: EpochId, secret: &EpochSecret) -> Result<(), StoreError> {
    txn.put_secret(kind, &epoch_name(epoch), secret.expose_bytes())
}

fn insert(keys: &mut GroupKeys, epoch: EpochId, secret: EpochSecret) -> Result<(), StoreError> {
    keys.insert(epoch, secret).map_err(|error| damaged(&error.to_string()))
}

impl Replica {
    pub(crate) fn new(seed: u64, place: usize) -> Self {
        let mut rng: ChaCha20Rng = derive(seed, &format!("replica {place}"));
        let newcomer = AuthorSecret::make(&mut rng);
        Self {
            running: None,
            disk: Disk::new(),
            rng: Arc::new(Mutex::new(rng)),
            seals: Arc::default(),
            newcomer,
            exists: false,
            copied: false,
            restored: 0,
            clock: 0,
            troubled: false,
            held: BTreeSet::new(),
            opens: BTreeSet::new(),
            shown: BTreeMap::new(),
            app: App::default(),
            outbox: Vec::new(),
            backup: None,
            tree: Tree::new(seed, place),
            folder: None,
            retries: 0,
        }
    }

    /// Lends what is up.
    pub(crate) fn take_folder(&mut self) -> Option<(Running, Folder)> {
        self.running.take_if(|_| self.folder.is_some()).zip(self.folder.take())
    }

    /// Takes back what was lent.
    pub(crate) fn put_folder(&mut self, taken: Option<(Running, Folder)>) {
        if let Some((running, folder)) = taken {
            self.running = Some(running);
            self.folder = Some(folder);
        }
    }

    /// What lay in the folder when the backup was made.
    pub(crate) fn backup_tree(&self) -> Option<Tree> {
        self.backup.as_ref().map(|backup| backup.tree.clone())
    }

    pub(crate) fn random<const N: usize>(&self) -> [u8; N] {
        random(&self.rng)
    }

    /// Everything sealed since this was last asked.
    pub(crate) fn take_seals(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.seals.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open_db(&self) -> Result<Db, StoreError> {
        let options = DbOptions { vfs: Some(self.disk.vfs().to_owned()), exclusive: true };
        let rng: ChaCha20Rng = rand_core::SeedableRng::from_seed(self.random());
        Db::open(Path::new("db"), &options, rng)
    }

    /// Puts a group into this home, as its founder or as a newcomer with a token.
    pub(crate) fn settle(
        &mut self,
        charter: &[u8],
        token: &[Vec<u8>],
        epochs: &[(EpochId, EpochSecret)],
    ) -> Result<(), StoreError> {
        self.exists = true;
        let mut db = self.open_db()?;
        let author = &self.newcomer;
        let done = db.write(|txn| {
            put_author(txn, author)?;
            for (epoch, secret) in epochs {
                put_epoch(txn, EPOCH, *epoch, secret)?;
            }
            let id = txn.create_group(charter, author.id())?;
            let ingested = txn.ingest(&id, token, None, None, &|_| true)?;
            match ingested.refused.into_iter().next() {
                Some((_, refusal)) => Err(StoreError::Succession(refusal)),
                None => Ok(()),
            }
        });
        drop(db);
        match done {
            Ok(()) | Err(StoreError::GroupExists(_)) => self.start(),
            Err(error) => Err(error),
        }
    }

    /// Opens the home as the client does; false if there is no group in it.
    pub(crate) fn start(&mut self) -> Result<(), StoreError> {
        let mut db = self.open_db()?;
        let Some(row) = db.read(|reader| reader.groups())?.into_iter().next() else { return Ok(()) };
        let mut keys = GroupKeys::new(&row.charter).map_err(|error| damaged(&error.to_string()))?;
        for secret in db.read(|reader| reader.secrets(EPOCH))? {
            let epoch = epoch_of(&secret.id).ok_or_else(|| damaged("an epoch's name"))?;
            let secret: [u8; 32] = secret.value.try_into().map_err(|_| damaged("an epoch's secret"))?;
            insert(&mut keys, epoch, EpochSecret::from_bytes(secret))?;
        }
        // a crash may have come between an epoch and what waited for it
        db.write(|txn| {
            let known = keys.everything();
            known.iter().try_for_each(|(epoch, _)| txn.epoch_readable(&row.id, *epoch).map(|_| ()))
        })?;
        if self.copied {
            db.write(|txn| txn.renew_replica())?;
        }
        let keys = Arc::new(RwLock::new(keys));
        let secret = author_secret(&db, row.author)?;
        let author = Author::new(secret, keys.clone(), self.rng.clone());
        let mut running = Running {
            id: db.read(|reader| reader.replica_id())?,
            db,
            group: row.id,
            keys,
            author: Arc::new(Recorder { author, seals: self.seals.clone() }),
            rng: self.rng.clone(),
            seals: self.seals.clone(),
            copied: self.copied,
            incarnation: self.random(),
            believed: BTreeSet::new(),
        };
        running.open_rotations()?;
        running.settle_keys()?;
        if running.copied || row.behind {
            running.renew(row.behind)?;
        }
        self.copied = false;
        running.copied = false;
        self.running = Some(running);
        Ok(())
    }

    /// Copies the home as it is.
    pub(crate) fn back_up(&mut self) {
        self.backup = Some(Backup {
            image: self.disk.image(),
            app: self.app.clone(),
            copied: self.copied,
            tree: self.tree.image(),
        });
    }

    /// Replaces the home by its backup.
    pub(crate) fn restore(&mut self) {
        let Some(backup) = self.backup.clone() else { return };
        self.running = None;
        self.disk.load(&backup.image);
        self.app = backup.app;
        self.copied = backup.copied;
        self.restored += 1;
        self.shown.clear();
        self.held.clear();
        self.opens.clear();
    }

    /// Makes this place a copy of another home.
    pub(crate) fn copy_of(&mut self, other: &Self) {
        self.disk.load(&other.disk.image());
        self.tree.load(&other.tree.image());
        self.app = other.app.clone();
        self.exists = true;
        self.copied = true;
    }
}

fn author_secret(db: &Db, id: AuthorId) -> Result<AuthorSecret, StoreError> {
    let secret = db.read(|reader| reader.secret(AUTHOR, &id.0))?.ok_or_else(|| damaged("an author's keys"))?;
    let secret: [u8; AUTHOR_SECRET_LEN] = secret.try_into().map_err(|_| damaged("an author's keys"))?;
    Ok(AuthorSecret::from_bytes(&secret))
}

impl Running {
    pub(crate) fn author(&self) -> AuthorId {
        self.author.author()
    }

    pub(crate) fn secret(&self) -> &AuthorSecret {
        self.author.author.secret()
    }

    pub(crate) fn membership(&mut self) -> Result<Arc<Membership>, StoreError> {
        self.db.membership(&self.group)
    }

    pub(crate) fn newest(&self) -> Result<Cursor, StoreError> {
        self.db.read(|reader| reader.max_cursor(&self.group))
    }

    /// Keys of this group, to look something up in.
    pub(crate) fn with_keys<T>(&self, work: impl FnOnce(&GroupKeys) -> T) -> T {
        work(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everything held, by cursor.
    pub(crate) fn scan(&self) -> Result<Vec<Entry>, StoreError> {
        let everything = sync_core::Selection::everything(Scope::All);
        let batch = self.db.read(|reader| reader.read_after(&self.group, Cursor(0), ALL, &everything, None))?;
        let entry = |carried: sync_types::Carried| {
            let envelope = Envelope::parse(&carried.envelope).map_err(|_| damaged("an envelope"))?;
            let (hash, sender, number) = (envelope.hash(), envelope.header.sender, envelope.header.number);
            Ok(Entry { cursor: carried.cursor, hash, sender, number })
        };
        batch.entries.into_iter().map(entry).collect()
    }

    /// Seals entries into the own feed, in an epoch that may be sealed in: one is made where there is none.
    pub(crate) fn append(&mut self, entries: &[NewEntry]) -> Result<Vec<Appended>, StoreError> {
        match self.append_now(entries) {
            Err(error) if is_stale(&error) => {
                self.rotate(Timestamp(0))?;
                self.append_now(entries)
            }
            done => done,
        }
    }

    /// Seals entries into the own feed, under a new author where others know more of the old one.
    fn append_now(&mut self, entries: &[NewEntry]) -> Result<Vec<Appended>, StoreError> {
        for _ in 0..MAX_RENEWALS {
            let sealer = self.author.clone();
            match self.db.write(|txn| txn.append(&self.group, entries, &*sealer)) {
                Err(StoreError::AuthorBehind(_)) => self.renew(true)?,
                done => {
                    if done.is_ok() && entries.iter().any(|entry| entry.content.class() != Class::Sealed) {
                        self.settle_keys()?;
                    }
                    return done;
                }
            }
        }
        Err(StoreError::AuthorBehind(self.author()))
    }

    /// Decides which epoch is sealed in, now that membership or rotations may have changed.
    fn settle_keys(&mut self) -> Result<(), StoreError> {
        let stored = self.db.read(|reader| reader.rotations(&self.group))?;
        let membership = self.membership()?;
        self.keys.write().unwrap_or_else(PoisonError::into_inner).settle(&membership, &stored);
        Ok(())
    }

    /// Appends an entry that follows from what the database says, and does more in the same commit.
    pub(crate) fn append_built<S, T>(
        &mut self,
        now: Timestamp,
        build: impl Fn(&sync_store::Reader<'_>) -> Result<(Option<Content>, S), StoreError>,
        work: impl Fn(&mut Txn<'_>, Option<&Appended>, S) -> Result<T, StoreError>,
    ) -> Result<(Option<EnvelopeHash>, T), StoreError> {
        let blob_id = BlobId(random(&self.rng));
        for _ in 0..MAX_RENEWALS {
            let (sealer, group) = (self.author.clone(), self.group);
            let done = self.db.write(|txn| {
                let (content, state) = build(&txn.reader())?;
                let Some(content) = content else { return Ok((None, work(txn, None, state)?)) };
                let appended = txn.append(&group, &[entry(blob_id, now, content)], &*sealer)?;
                let first = appended.first();
                Ok((first.map(|first| first.hash), work(txn, first, state)?))
            });
            match done {
                Err(error) if is_stale(&error) => self.rotate(now)?,
                Err(StoreError::AuthorBehind(_)) => self.renew(true)?,
                done => return done,
            }
        }
        Err(StoreError::AuthorBehind(self.author()))
    }

    /// Goes on under a new author.
    pub(crate) fn renew(&mut self, reissue: bool) -> Result<(), StoreError> {
        let old = self.author.clone();
        let membership = self.membership()?;
        let member = membership.author(&old.author()).map_or_else(|| old.author().into(), |admitted| admitted.member);
        let secret = AuthorSecret::make(&mut Draws(&self.rng));
        let blob_id = BlobId(random(&self.rng));
        let author = Author::new(secret.clone(), self.keys.clone(), self.rng.clone());
        let first = |content| entry(blob_id, Timestamp(0), content);
        let predecessor = self.first_author(&membership);
        let succession = succession(&author, &predecessor, member, membership.seen_by(&old.author()), first)?;
        remember(&self.seals, &succession);
        let author = Arc::new(Recorder { author, seals: self.seals.clone() });
        let (group, keys) = (self.group, self.keys.clone());
        self.db.write(|txn| {
            put_author(txn, &secret)?;
            let reopen = |bytes: &[u8], lowest| {
                reopen(&keys.read().unwrap_or_else(PoisonError::into_inner), &DIGEST_KEY, bytes, lowest)
            };
            let renewal = Renewal {
                succession: &succession,
                sealer: &*author,
                reopen: if reissue { Some(&reopen) } else { None },
            };
            let renewed = txn.renew_author(&group, &renewal)?;
            reissued(txn, &group, &renewed)
        })?;
        self.author = author;
        Ok(())
    }

    /// The earliest of this home's authors: it certifies every later one.
    fn first_author(&self, membership: &Membership) -> AuthorSecret {
        let mut first = self.secret().clone();
        while let Some(by) = membership.author(&first.id()).and_then(|admitted| admitted.by) {
            match author_secret(&self.db, by) {
                Ok(earlier) => first = earlier,
                Err(_) => break,
            }
        }
        first
    }

    /// Takes in an epoch, durably first, and hands out what waited for it.
    pub(crate) fn learn(&mut self, epoch: EpochId, secret: &EpochSecret) -> Result<(), StoreError> {
        if self.with_keys(|keys| keys.knows(epoch)) {
            return Ok(());
        }
        let group = self.group;
        self.db.write(|txn| put_epoch(txn, EPOCH, epoch, secret))?;
        {
            let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
            insert(&mut keys, epoch, secret.clone())?;
        }
        self.db.write(|txn| txn.epoch_readable(&group, epoch)).map(|_| ())
    }

    /// Opens every rotation held whose epoch is not known.
    pub(crate) fn open_rotations(&mut self) -> Result<(), StoreError> {
        let stored = self.db.read(|reader| reader.rotations(&self.group))?;
        let mut secrets = Vec::new();
        for secret in self.db.read(|reader| reader.secrets(AUTHOR))? {
            let secret: [u8; AUTHOR_SECRET_LEN] = secret.value.try_into().map_err(|_| damaged("an author's keys"))?;
            secrets.push(AuthorSecret::from_bytes(&secret));
        }
        let known = self.with_keys(GroupKeys::everything);
        for (epoch, secret) in open_rotations(&self.group, &known, &stored, &secrets) {
            self.learn(epoch, &secret)?;
        }
        Ok(())
    }

    /// Starts a new epoch for every author.
    pub(crate) fn rotate(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let membership = self.membership()?;
        let own = membership.author(&self.author()).map(|own| own.role);
        if !own.is_some_and(Role::may_rotate) {
            return Ok(());
        }
        let recipients: Vec<AuthorKeys> = membership.authors().map(|(_, admitted)| admitted.keys.clone()).collect();
        let Some((current, secret)) = self.with_keys(GroupKeys::newest) else {
            return Err(damaged("no epoch is known"));
        };
        let before = Before { epoch: current, secret: &secret, history: History::Open };
        let Ok(made) = make_rotation(&self.group, before, &recipients, &mut Draws(&self.rng)) else { return Ok(()) };
        self.learn(made.epoch, &made.secret)?;
        let operation = Operation::Rotate { epoch: made.epoch };
        let announced = SignedOperation { seen: membership.seen_by(&self.author()), operation }.encode();
        let entries = [Content::Rotation(made.payload), Content::Membership(announced)]
            .map(|content| entry(BlobId(random(&self.rng)), now, content));
        self.append_now(&entries).map(|_| ())
    }

    /// Appends a membership operation.
    pub(crate) fn operate(&mut self, operation: sync_types::Operation, now: Timestamp) -> Result<(), StoreError> {
        let seen = self.membership()?.seen_by(&self.author());
        let payload = SignedOperation { seen, operation }.encode();
        let entry = entry(BlobId(random(&self.rng)), now, Content::Membership(payload));
        self.append(&[entry]).map(|_| ())
    }

    /// Removes another author's member, if that may be done here.
    pub(crate) fn remove(&mut self, author: AuthorId, now: Timestamp) -> Result<(), StoreError> {
        let membership = self.membership()?;
        let may = membership.author(&self.author()).is_some_and(|own| own.role.may_remove());
        let Some(member) = membership.author(&author).map(|admitted| admitted.member).filter(|_| may) else {
            return Ok(());
        };
        let feed = self.db.read(|reader| reader.feed(&self.group, &author))?;
        let cuts = vec![Cut { author, number: feed.held.highest().unwrap_or_default(), hash: feed.head }];
        self.operate(Operation::Remove { member, cuts }, now)
    }

    /// Whether an author was removed, as far as this replica knows.
    pub(crate) fn has_removed(&mut self, author: &AuthorId) -> Result<bool, StoreError> {
        Ok(matches!(self.membership()?.belonging(author), Belonging::Until(_)))
    }

    /// Stores what a peer sent in one commit, opens what it unlocks, and renews the author where it must.
    pub(crate) fn arrive(&mut self, arrivals: &[(u64, Arrival)]) -> Result<Executed, StoreError> {
        let (group, keys) = (self.group, self.keys.clone());
        let readable = |epoch: EpochId| keys.read().unwrap_or_else(PoisonError::into_inner).knows(epoch);
        let stored = self.db.write(|txn| {
            arrivals
                .iter()
                .map(|(_, arrival)| exec::store(txn, &group, arrival, &readable))
                .collect::<Result<Vec<_>, _>>()
        })?;
        let mut executed = Executed::default();
        let author = self.author();
        for ((id, arrival), (ingested, wants)) in arrivals.iter().zip(stored) {
            if ingested.stored.iter().any(|stored| stored.class == Class::Rotation) && self.open_rotations().is_err() {
                // what it would open waits, and is tried again with the next one and at the next start
                executed.failed_to_open = true;
            }
            if ingested.stored.iter().any(|stored| stored.class != Class::Sealed) {
                self.settle_keys()?;
            }
            if ingested.own_feed_foreign && self.author() == author {
                self.renew(true)?;
            }
            executed.stored.extend(ingested.stored.iter().map(|stored| stored.hash));
            for (at, refusal) in ingested.refused {
                let Some(bytes) = arrival.batch.get(at).cloned() else { continue };
                let comes_again = arrival.position.is_none() && matches!(refusal, Refusal::NotAdmitted(_));
                executed.refused.push(Refused { bytes, comes_again });
            }
            executed.replies.push(Reply::Stored { id: *id, membership: self.membership()?, wants });
        }
        Ok(executed)
    }

    /// Compares what a peer holds with what is held here, and whether its word on our own feed was taken.
    fn select(&mut self, peer: AuthorId, pull: &Pull) -> Result<(Reply, bool), StoreError> {
        if let Some(reply) = self.db.read(|reader| exec::select(reader, &self.group, pull))? {
            return Ok((reply, true));
        }
        let member = self.membership()?.author(&peer).map_or_else(|| peer.into(), |admitted| admitted.member);
        let first = self.believed.insert(member);
        if first {
            self.renew(true)?;
        }
        Ok((self.db.read(|reader| exec::select_anyway(reader, &self.group, pull))?, first))
    }

    /// Carries out an effect of a session, but for storing.
    pub(crate) fn execute(&mut self, effect: Effect) -> Result<Executed, StoreError> {
        let group = self.group;
        let mut executed = Executed::default();
        let reply = match effect {
            Effect::Survey { replica } => Some(self.db.read(|reader| exec::survey(reader, &group, &replica))?),
            Effect::Select { author, scope, after, check, have, covered } => {
                let (reply, believed) = self.select(author, &Pull { scope, after, check, have, covered })?;
                executed.believed = believed;
                Some(reply)
            }
            Effect::Read { scope, not_from, after, limit, bytes, selection } => {
                let limits = Limits { entries: limit, bytes };
                let read = |reader: &sync_store::Reader<'_>| {
                    exec::read(reader, &group, scope, not_from, after, limits, &selection)
                };
                Some(self.db.read(read)?)
            }
            Effect::ReadWanted { request, wants } => {
                Some(self.db.read(|reader| exec::read_wanted(reader, &group, request, &wants))?)
            }
            Effect::Acknowledged { replica, cursor } => {
                self.db.write(|txn| exec::acknowledge(txn, &group, &replica, cursor))?;
                None
            }
            _ => None,
        };
        executed.replies.extend(reply);
        Ok(executed)
    }
}

/// Whether nothing was stored because no epoch may be sealed in.
fn is_stale(error: &StoreError) -> bool {
    matches!(error, StoreError::Seal(error) if matches!(error.downcast_ref(), Some(KeysError::Stale)))
}

/// An envelope that was refused.
pub(crate) struct Refused {
    pub(crate) bytes: Vec<u8>,
    /// Its author is not known yet, and nothing was noted that would pass over it.
    pub(crate) comes_again: bool,
}

/// What came of an effect.
#[derive(Default)]
pub(crate) struct Executed {
    pub(crate) replies: Vec<Reply>,
    pub(crate) stored: Vec<EnvelopeHash>,
    pub(crate) refused: Vec<Refused>,
    /// A peer's word on our own feed was taken.
    pub(crate) believed: bool,
    /// A rotation could not be opened now.
    pub(crate) failed_to_open: bool,
}

#[cfg(test)]
mod tests {
    use sync_types::{Charter, Chunker, GroupKind, InviteId, Operation, Quorum};

    use super::*;
    use crate::vfs::{Fault, Survive};

    /// A group of one.
    fn founder() -> Replica {
        let mut replica = Replica::new(1, 0);
        let first = EpochSecret::make(&mut Draws(&replica.rng));
        let charter = Charter {
            kind: GroupKind::Random,
            founder: replica.newcomer.keys(),
            quorum: Quorum::default(),
            suite: 1,
            chunker: Chunker::default(),
            nonce: [1; 32],
            commitment: first.commitment(),
        }
        .encode();
        replica.settle(&charter, &[], &[(EpochId::first(&charter), first)]).expect("a sound disk");
        replica
    }

    fn restart(replica: &mut Replica, survive: Survive) -> usize {
        replica.disk.cut_power();
        replica.running = None;
        replica.disk.restart(survive, &mut derive(1, "restart"));
        replica.start().expect("a sound disk");
        replica.running.as_ref().expect("a group").scan().expect("a sound disk").len()
    }

    #[test]
    fn what_is_read_after_a_kill_survives_a_power_cut() {
        let mut reached_the_log = 0;
        for after in 0..30 {
            let mut replica = founder();
            let running = replica.running.as_mut().expect("a group");
            replica.disk.fail_after(after, Fault::PowerCut);
            let done = running.operate(Operation::Revoke { id: InviteId([1; 16]) }, Timestamp(1));
            let after_kill = restart(&mut replica, Survive::Everything);
            reached_the_log += usize::from(done.is_err() && after_kill == 1);
            assert!(done.is_err() || after_kill == 1, "fault {after}");
            assert_eq!(restart(&mut replica, Survive::Nothing), after_kill, "fault {after}");
        }
        assert!(reached_the_log > 0, "no fault came between the log and its sync");
    }

    #[test]
    fn a_copy_holds_nothing_of_a_commit_that_failed() {
        let mut failed = 0;
        for after in 0..30 {
            let mut original = founder();
            let running = original.running.as_mut().expect("a group");
            original.disk.fail_after(after, Fault::IoError);
            let done = running.operate(Operation::Revoke { id: InviteId([1; 16]) }, Timestamp(1));
            original.disk.heal();
            failed += usize::from(done.is_err());
            let mut copy = Replica::new(1, 1);
            copy.copy_of(&original);
            copy.start().expect("a sound disk");
            // its own succession, and what the original holds
            let held = copy.running.as_ref().expect("a group").scan().expect("a sound disk").len();
            assert_eq!(held, 1 + usize::from(done.is_ok()), "fault {after}");
        }
        assert!(failed > 0, "no fault met the commit");
    }
}
