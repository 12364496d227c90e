//! A device: one opened home with its database, keys and endpoint, shared by the clients of all its groups.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use sync_core::connection::Event as Step;
use sync_crypto::{AuthorSecret, EpochSecret, GroupRoot, HomeKey, passphrase};
use sync_link::iroh_link::{Connection, Discovery, Endpoint, EndpointConfig};
use sync_link::lan::Lan;
use sync_link::rendezvous::Rendezvous;
use sync_link::same_machine::{DevicePublication, SameMachine};
use sync_store::{Store, StoreError};
use sync_types::{BlobId, Charter, Chunker, DeviceId, EpochId, GroupId, GroupKind, InviteId, Quorum, Role};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use crate::backup::{self, BackedUp, Recovered};
use crate::chunks::Pace;
use crate::client::SyncClient;
use crate::config::Config;
use crate::error::ClientError;
use crate::folders::{self, Folders};
use crate::group::{Group, Shared};
use crate::home::{Fingerprint, Home, HomeLock};
use crate::keys::{Author, GroupKeys, SharedRng, draw, succession, with_rng};
use crate::link::SYNC_ALPN;
use crate::pairing::{self, Invitation, JoinProgress, OpenInvite, PAIR_ALPN};
use crate::punching::{self, Punching};
use crate::relays::{self, HomeRelay};
use crate::{discovery, peers, secrets};

/// Name under which mDNS announces devices.
const MDNS_SERVICE: &str = "syncshell";
/// Wait for another process to let go of the home: longer than a short command takes.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// Time tasks get to end when a device is closed.
const CLOSE_WAIT: Duration = Duration::from_secs(3);

const META_FINGERPRINT: &str = "fingerprint";
const META_PORT: &str = "port";

/// One opened home. Clones and clients share it; [`Device::close`] ends it for all, as does dropping the last of them.
#[derive(Debug, Clone)]
pub struct Device {
    pub(crate) inner: Owner,
}

/// A share in a device; the device ends with the last, while its tasks only borrow it.
#[derive(Debug, Clone)]
pub(crate) struct Owner(Arc<LastDrop>);

#[derive(Debug)]
struct LastDrop(Arc<Inner>);

impl Drop for LastDrop {
    fn drop(&mut self) {
        self.0.closed.cancel();
        self.0.tasks.close();
    }
}

impl Owner {
    fn new(inner: Arc<Inner>) -> Self {
        Self(Arc::new(LastDrop(inner)))
    }
}

impl std::ops::Deref for Owner {
    type Target = Arc<Inner>;

    fn deref(&self) -> &Arc<Inner> {
        &self.0.0
    }
}

/// What all parts of a device share.
pub(crate) struct Inner {
    pub(crate) shared: Shared,
    /// Held until the device is closed or dropped.
    lock: Mutex<Option<HomeLock>>,
    device_id: DeviceId,
    endpoint: Option<Endpoint>,
    pub(crate) rendezvous: Vec<Arc<dyn Rendezvous>>,
    same_machine: Option<SameMachine>,
    publication: Mutex<Option<DevicePublication>>,
    groups: RwLock<HashMap<GroupId, Arc<Group>>>,
    pub(crate) invites: Mutex<HashMap<InviteId, OpenInvite>>,
    /// One admission at a time, so that an invite is used once.
    pub(crate) admitting: tokio::sync::Mutex<()>,
    /// Requests of this device that wait at relays, and what ends waiting for each invite.
    pub(crate) joining: Mutex<HashMap<InviteId, CancellationToken>>,
    /// One answer to a request of this device is taken in at a time.
    pub(crate) taking: tokio::sync::Mutex<()>,
    closed: CancellationToken,
    tasks: TaskTracker,
    refused: AtomicU64,
    /// Room for channels of peers that have not proven themselves.
    unproven: Arc<Semaphore>,
    warnings: Vec<String>,
    home: PathBuf,
    pub(crate) folders: Folders,
    /// What lets this device in where connections begin.
    pub(crate) punching: Punching,
    /// Bytes per second that chunks may use each way.
    pub(crate) limit: watch::Sender<Option<u64>>,
    /// Of serving and of fetching, for all groups together.
    pub(crate) paces: [Arc<Pace>; 2],
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("id", &self.device_id).finish_non_exhaustive()
    }
}

impl Inner {
    pub(crate) fn device_id(&self) -> DeviceId {
        self.device_id
    }

    /// The home's directory.
    pub(crate) fn home_path(&self) -> &Path {
        &self.home
    }

    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_ref()
    }

    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let closed = self.closed.clone();
        self.tasks.spawn(async move {
            // a task that ends by itself on closing gets a moment to do so
            tokio::select! {
                () = task => {}
                () = async { closed.cancelled().await; tokio::time::sleep(CLOSE_WAIT).await } => {}
            }
        });
    }

    pub(crate) fn jitter(&self) -> u64 {
        u64::from_le_bytes(draw(&self.shared.rng))
    }

    pub(crate) fn unproven(&self) -> Arc<Semaphore> {
        self.unproven.clone()
    }

    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed) + self.endpoint.as_ref().map_or(0, Endpoint::refused)
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        self.warnings.clone()
    }

    pub(crate) fn group(&self, id: &GroupId) -> Option<Arc<Group>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn groups(&self) -> HashMap<GroupId, Arc<Group>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where this device can be dialled, also by processes of this machine.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let Some(endpoint) = &self.endpoint else { return Vec::new() };
        let mut addresses = endpoint.local_addresses();
        addresses.truncate(sync_types::bounds::MAX_ADDRESSES);
        addresses
    }

    /// Where this device says it can be dialled: at a public relay, and at its addresses.
    ///
    /// Relays of its groups are told with the groups.
    pub(crate) fn told_addresses(&self) -> Vec<String> {
        let public = self.endpoint.as_ref().and_then(Endpoint::public_relay);
        let mut told: Vec<String> =
            public.into_iter().chain(self.addresses().iter().map(ToString::to_string)).collect();
        told.truncate(sync_types::bounds::MAX_ADDRESSES);
        told
    }

    pub(crate) fn same_machine_addresses(&self, peer: &DeviceId) -> Vec<SocketAddr> {
        let resolve = |same: &SameMachine| same.resolve_device(&peer.0).ok();
        self.same_machine.as_ref().and_then(resolve).unwrap_or_default()
    }

    /// Opens a group that is in the database now, and starts to look for its members.
    pub(crate) async fn open_group(self: &Arc<Self>, id: GroupId, copied: bool) -> Result<Arc<Group>, ClientError> {
        let row = self.shared.store.read(move |reader| reader.group(&id)).await?;
        let group = Group::open(self.shared.clone(), row, copied).await?;
        self.groups.write().unwrap_or_else(PoisonError::into_inner).insert(id, group.clone());
        peers::want_all(self, &group).await;
        if self.endpoint.is_some() {
            self.spawn(discovery::run(self.clone(), group.clone()));
            relays::follow(self, &group).await?;
            pairing::resume(self, &group).await?;
            self.spawn(pairing::away::run(self.clone(), group.clone()));
        }
        Ok(group)
    }
}

impl Device {
    /// Opens a home and starts to serve its groups.
    ///
    /// Blocks others out of the home until it is closed or dropped. Not cancel safe in what it says: a dropped future may
    /// still have started; the home is free again once it has ended.
    pub async fn open(config: Config) -> Result<Self, ClientError> {
        let Config { home, passphrase, network, snapshot_after } = config;
        let opening = tokio::task::spawn_blocking(move || open_home(&home, &passphrase));
        let (home, lock, store) = opening.await.map_err(|_| ClientError::Closed)??;
        let rng: SharedRng = Arc::new(Mutex::new(rand_core::UnwrapErr(getrandom::SysRng)));
        let home_key = Arc::new(HomeKey::from_bytes(*home.key().expose_bytes()));
        let replica = store.read(|reader| reader.replica_id()).await?;
        let (addresses_in, addresses) = watch::channel(Vec::new());
        let wake = relays::read_wake(&store).await?;
        let mut shared = Shared {
            wake: watch::Sender::new(wake),
            digest_key: blake3::derive_key("syncshell v1 entry digest", home_key.expose_bytes()),
            store,
            incarnation: draw(&rng),
            rng,
            home_key,
            name: home.name().to_owned(),
            replica,
            addresses,
        };
        let (device_secret, copied) = settle(&mut shared, &home).await?;
        let mut warnings = Vec::new();
        let same_machine = if network.online && network.same_machine {
            match SameMachine::open(network.runtime_dir.as_deref()) {
                Ok(same_machine) => Some(same_machine),
                Err(error) => {
                    warnings.push(format!("devices on this machine will not find each other: {error}"));
                    None
                }
            }
        } else {
            None
        };
        let endpoint = if network.online { Some(bind(&shared, &network, &device_secret).await?) } else { None };
        warnings.extend(endpoint.iter().flat_map(|endpoint| endpoint.warnings().iter().map(ToString::to_string)));
        let mut rendezvous: Vec<Arc<dyn Rendezvous>> = Vec::new();
        if let Some(same_machine) = &same_machine {
            rendezvous.push(Arc::new(same_machine.clone()));
        }
        if network.online && network.lan {
            rendezvous.push(Arc::new(Lan::default()));
        }
        let device_id = device_id(&device_secret);
        let punching = Punching::new(network.public_relays && home.uses_public_relays());
        let limit = watch::channel(None).0;
        let inner = Arc::new(Inner {
            shared,
            lock: Mutex::new(Some(lock)),
            device_id,
            endpoint,
            rendezvous,
            same_machine,
            publication: Mutex::new(None),
            groups: RwLock::new(HashMap::new()),
            invites: Mutex::new(HashMap::new()),
            admitting: tokio::sync::Mutex::new(()),
            joining: Mutex::default(),
            taking: tokio::sync::Mutex::new(()),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            refused: AtomicU64::new(0),
            unproven: Arc::new(Semaphore::new(peers::MAX_UNPROVEN)),
            warnings,
            home: home.path().to_owned(),
            folders: Folders::new(snapshot_after),
            punching,
            paces: [Arc::new(Pace::new(limit.subscribe())), Arc::new(Pace::new(limit.subscribe()))],
            limit,
        });
        // what is started ends with this, also when opening fails or is dropped
        let device = Self { inner: Owner::new(inner) };
        let inner = &device.inner;
        start(inner, addresses_in).await;
        for row in inner.shared.store.read(|reader| reader.groups()).await? {
            if row.active {
                inner.open_group(row.id, copied).await?;
            }
        }
        punching::follow(inner).await;
        if network.online {
            folders::start_all(inner).await?;
            pairing::relayed::resume(inner, None).await?;
        }
        if copied {
            remember_place(&inner.shared, &home).await?;
        }
        Ok(device)
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.shared.name
    }

    /// The device's id: what peers dial.
    #[must_use]
    pub fn device_id(&self) -> DeviceId {
        self.inner.device_id
    }

    /// What does not work and can be done without, in words.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.inner.warnings()
    }

    /// The home's groups.
    #[must_use]
    pub fn groups(&self) -> Vec<GroupId> {
        let mut groups: Vec<GroupId> = self.inner.groups().into_keys().collect();
        groups.sort_unstable();
        groups
    }

    /// Makes a group with this device as its founder. Cancel safe: it is made wholly or not at all.
    pub async fn create_group(&self) -> Result<GroupId, ClientError> {
        let shared = &self.inner.shared;
        let founder = with_rng(&shared.rng, |rng| AuthorSecret::make(rng));
        let first = with_rng(&shared.rng, |rng| EpochSecret::make(rng));
        let charter = charter(GroupKind::Random, &founder, draw(&shared.rng), &first).encode();
        let group = GroupId::of(&charter);
        let sealed = [
            secrets::seal_author(shared, &founder),
            secrets::seal_epoch(shared, group, EpochId::first(&charter), &first),
        ];
        let author = founder.id();
        let made = shared.store.write(charter.len(), move |txn| {
            crate::group::put_all(txn, &sealed)?;
            txn.create_group(&charter, author)
        });
        let id = made.await?;
        self.inner.open_group(id, false).await?;
        Ok(id)
    }

    /// Opens the group that a passphrase and a name make together; every device that knows both is in it.
    ///
    /// Takes about a second and 256 MiB of memory.
    pub async fn open_passphrase_group(&self, name: &str, passphrase: &str) -> Result<GroupId, ClientError> {
        passphrase::check_strength(passphrase, &[name])
            .map_err(|weak| ClientError::WeakPassphrase(weak.to_string()))?;
        let (name, passphrase) = (name.to_owned(), Zeroizing::new(passphrase.to_owned()));
        let deriving = tokio::task::spawn_blocking(move || GroupRoot::derive(&passphrase, &name));
        let root = deriving.await.map_err(|_| ClientError::Closed)?;
        let root = root.map_err(|error| ClientError::Memory(error.to_string()))?;
        let (founder, first) = (root.founder(), root.first_epoch());
        let charter = charter(GroupKind::Passphrase, &founder, root.charter_nonce(), &first).encode();
        let group = GroupId::of(&charter);
        if self.inner.group(&group).is_some() {
            return Err(ClientError::AlreadyJoined(group));
        }
        let shared = &self.inner.shared;
        let epoch = EpochId::first(&charter);
        let mut keys = GroupKeys::new(&charter)?;
        keys.insert(epoch, first.clone())?;
        let own = with_rng(&shared.rng, |rng| AuthorSecret::make(rng));
        // the founder's keys are everyone's: they are used for this one signature and kept nowhere
        let sealed = [secrets::seal_author(shared, &own), secrets::seal_epoch(shared, group, epoch, &first)];
        let author = Author::new(own, Arc::new(RwLock::new(keys)), shared.rng.clone());
        let blob_id = BlobId(draw(&shared.rng));
        let digest_key = shared.digest_key;
        let entry = |content: sync_store::Content| {
            let digest = content.digest(&digest_key);
            sync_store::NewEntry { blob_id, timestamp: crate::group::now(), content, digest }
        };
        let succession =
            succession(&author, &founder, founder.id().into(), Vec::new(), entry).map_err(StoreError::from)?;
        let founder = founder.id();
        let made = shared.store.write(charter.len() + succession.len(), move |txn| {
            crate::group::put_all(txn, &sealed)?;
            let id = txn.create_group(&charter, founder)?;
            let renewal = sync_store::Renewal { succession: &succession, sealer: &author, reopen: None };
            txn.renew_author(&id, &renewal)?;
            Ok(id)
        });
        let id = made.await?;
        self.inner.open_group(id, false).await?;
        Ok(id)
    }

    /// A client of one of the home's groups; clients of one home share its device.
    pub fn client(&self, group: GroupId) -> Result<SyncClient, ClientError> {
        let group = self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?;
        Ok(SyncClient::new_in(self.inner.clone(), group))
    }

    /// A client of the home's only group.
    pub fn only_client(&self) -> Result<SyncClient, ClientError> {
        match self.groups()[..] {
            [] => Err(ClientError::NoGroup),
            [group] => self.client(group),
            ref several => Err(ClientError::SeveralGroups(several.len())),
        }
    }

    /// Makes an invite that admits one further device of this member; it lasts `lifetime`, ten minutes at most.
    ///
    /// It is answered while this device is open. Dropping the future may leave an invite that nobody knows; it expires.
    pub async fn invite(&self, group: GroupId, lifetime: Duration) -> Result<Invitation, ClientError> {
        self.invite_at(group, lifetime, &[]).await
    }

    /// Makes an invite that is found at these relays too, beside those of the group.
    pub async fn invite_at(
        &self,
        group: GroupId,
        lifetime: Duration,
        relays: &[String],
    ) -> Result<Invitation, ClientError> {
        let group = self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?;
        pairing::invite(&self.inner, &group, lifetime, relays, None).await
    }

    /// Makes an invite that admits a person of their own, with a role that is no stronger than ours.
    pub async fn invite_person(
        &self,
        group: GroupId,
        role: Role,
        lifetime: Duration,
        relays: &[String],
    ) -> Result<Invitation, ClientError> {
        let group = self.inner.group(&group).ok_or(ClientError::UnknownGroup(group))?;
        pairing::invite(&self.inner, &group, lifetime, relays, Some(role)).await
    }

    /// Takes an invite back, named by its code, link or id.
    pub async fn revoke(&self, invite: &str) -> Result<(), ClientError> {
        pairing::revoke(&self.inner, invite).await
    }

    /// Joins the group that a code or link invites to.
    ///
    /// May be repeated after a crash or a dropped future: the same invite admits the same device again.
    pub async fn join(
        &self,
        code_or_link: &str,
        progress: impl Fn(JoinProgress) + Send + Sync,
    ) -> Result<SyncClient, ClientError> {
        self.join_at(code_or_link, &[], progress).await
    }

    /// Joins by a code or link that is looked for at these relays too, beside those of this home and of the link.
    pub async fn join_at(
        &self,
        code_or_link: &str,
        relays: &[String],
        progress: impl Fn(JoinProgress) + Send + Sync,
    ) -> Result<SyncClient, ClientError> {
        let joined = pairing::join(&self.inner, code_or_link, relays, &progress).await;
        // at relays that only the invite let in to
        punching::follow(&self.inner).await;
        let group = joined?;
        Ok(SyncClient::new_in(self.inner.clone(), group))
    }

    /// Uses a relay for one group, or for every group of this home.
    ///
    /// What devices that are not online together tell each other waits there, sealed; it can read nothing of it.
    pub async fn add_relay(&self, url: &str, group: Option<GroupId>) -> Result<(), ClientError> {
        relays::add(&self.inner, url, group).await
    }

    /// Uses a relay no longer, as it was added.
    pub async fn remove_relay(&self, url: &str, group: Option<GroupId>) -> Result<(), ClientError> {
        relays::remove(&self.inner, url, group).await
    }

    /// The relays that were added, also by joining a group that uses them.
    pub async fn relays(&self) -> Result<Vec<HomeRelay>, ClientError> {
        relays::list(&self.inner).await
    }

    /// Has relays wake this device at an address of a push service, by an empty POST when something arrives for it while it
    /// is away; none ends that.
    pub async fn set_wake(&self, url: Option<&str>) -> Result<(), ClientError> {
        relays::set_wake(&self.inner, url.unwrap_or_default()).await
    }

    /// Where relays wake this device.
    #[must_use]
    pub fn wake(&self) -> Option<String> {
        Some(self.inner.shared.wake.borrow().clone()).filter(|url| !url.is_empty())
    }

    /// Writes this device's places in its groups into a file, sealed under a passphrase or a recovery key, and proves that
    /// it can be recovered before it takes that name.
    ///
    /// What is in the groups is not in it; whoever recovers gets that from other members. An older backup at `path` goes
    /// when the new one is proven, anything else there is an error.
    pub async fn back_up(&self, path: &Path, passphrase: &str) -> Result<BackedUp, ClientError> {
        passphrase::check_strength(passphrase, &[self.name()])
            .map_err(|weak| ClientError::WeakPassphrase(weak.to_string()))?;
        backup::write(&self.inner, path, passphrase).await
    }

    /// Takes the places of a backed-up device in every group that this home is not in, each under a new author.
    ///
    /// May be repeated after a crash.
    pub async fn recover(&self, path: &Path, passphrase: &str) -> Result<Recovered, ClientError> {
        backup::recover(&self.inner, path, passphrase).await
    }

    /// Tells the device that the network may have changed, after sleep for instance; peers are dialled at once.
    pub async fn network_changed(&self) {
        if let Some(endpoint) = self.inner.endpoint() {
            endpoint.network_changed().await;
        }
        peers::network_changed(&self.inner.groups());
        relays::network_changed(&self.inner.groups());
    }

    /// Ends sessions, tells peers, writes everything into the database's main file and lets go of the home.
    pub async fn close(self) {
        let inner = &self.inner;
        inner.closed.cancel();
        inner.tasks.close();
        let _ = tokio::time::timeout(CLOSE_WAIT, inner.tasks.wait()).await;
        let invites = std::mem::take(&mut *inner.invites.lock().unwrap_or_else(PoisonError::into_inner));
        invites.into_values().for_each(OpenInvite::release);
        inner.publication.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(endpoint) = inner.endpoint() {
            endpoint.close().await;
        }
        if let Err(error) = inner.shared.store.clone().close().await {
            tracing::warn!(%error, "database was not closed in order; nothing is lost");
        }
        inner.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

fn open_home(
    path: &std::path::Path,
    passphrase: &crate::home::PassphraseSource,
) -> Result<(Home, HomeLock, Store), ClientError> {
    let home = Home::open(path, passphrase)?;
    let lock = HomeLock::acquire(&home, LOCK_WAIT)?;
    home.check_database()?;
    make_private(&home.db_path()).map_err(StoreError::from)?;
    let store = Store::open(&home.db_path(), rand_core::UnwrapErr(getrandom::SysRng))?;
    home.note_database()?;
    Ok((home, lock, store))
}

/// Makes the database's file before SQLite does, which would let others read it; what it makes beside it is like it.
#[cfg(unix)]
fn make_private(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// A profile's directory keeps others out.
#[cfg(not(unix))]
fn make_private(_: &std::path::Path) -> std::io::Result<()> {
    Ok(())
}

fn device_id(secret: &[u8; 32]) -> DeviceId {
    DeviceId(sync_link::iroh_link::device_id_of(secret).0)
}

/// The device's secret, and whether the home is a copy: then it gets new ones, and its authors are renewed.
async fn settle(shared: &mut Shared, home: &Home) -> Result<(Zeroizing<[u8; 32]>, bool), ClientError> {
    let here = fingerprint(home)?;
    let stored = shared.store.read(|reader| reader.meta(META_FINGERPRINT)).await?;
    let known = secrets::device(shared).await?;
    if let (Some(secret), true) = (known, stored.as_deref() == Some(&here.as_bytes()[..])) {
        return Ok((secret, false));
    }
    let copied = stored.is_some();
    let secret = Zeroizing::new(draw::<32>(&shared.rng));
    let sealed = secrets::seal_device(shared, &secret);
    let place = *here.as_bytes();
    let settled = shared.store.write(0, move |txn| {
        sealed.put(txn)?;
        if copied {
            // the place is remembered last, once every author is renewed: a crash before that starts over
            txn.renew_replica().map(Some)
        } else {
            txn.put_meta(META_FINGERPRINT, &place)?;
            Ok(None)
        }
    });
    if let Some(replica) = settled.await? {
        tracing::info!("this home is a copy or was moved: it goes on as a new device");
        shared.replica = replica;
    }
    Ok((secret, copied))
}

fn fingerprint(home: &Home) -> Result<Fingerprint, ClientError> {
    Fingerprint::of(&home.db_path()).map_err(|error| ClientError::Store(error.into()))
}

async fn remember_place(shared: &Shared, home: &Home) -> Result<(), ClientError> {
    let place = *fingerprint(home)?.as_bytes();
    Ok(shared.store.write(0, move |txn| txn.put_meta(META_FINGERPRINT, &place)).await?)
}

/// Binds the endpoint, on the port it had before where that is free.
async fn bind(shared: &Shared, network: &crate::config::Network, secret: &[u8; 32]) -> Result<Endpoint, ClientError> {
    let stored = shared.store.read(|reader| reader.meta(META_PORT)).await?;
    let mut config = EndpointConfig::new(secret, vec![SYNC_ALPN.to_vec(), PAIR_ALPN.to_vec()]);
    config.bind = network.bind;
    config.punches = network.punches();
    config.port = stored.and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes);
    config.mdns = network.mdns.then(|| MDNS_SERVICE.to_owned());
    let endpoint = Endpoint::bind(config).await?;
    if let Some(port) = endpoint.bound_port() {
        shared.store.write(0, move |txn| txn.put_meta(META_PORT, &port.to_be_bytes())).await?;
    }
    Ok(endpoint)
}

/// Starts what runs as long as the device is open.
async fn start(inner: &Arc<Inner>, addresses_in: watch::Sender<Vec<String>>) {
    let Some(endpoint) = inner.endpoint().cloned() else { return };
    addresses_in.send_replace(inner.told_addresses());
    if let Some(same_machine) = &inner.same_machine {
        let addresses = [endpoint.loopback_addresses(), inner.addresses()].concat();
        match same_machine.publish_device(&inner.device_id.0, &addresses) {
            Ok(publication) => *inner.publication.lock().unwrap_or_else(PoisonError::into_inner) = Some(publication),
            Err(error) => tracing::warn!(%error, "devices on this machine will not find this one"),
        }
    }
    inner.spawn(accept_loop(inner.clone(), endpoint.clone()));
    let addresses_in = Arc::new(addresses_in);
    let (device, telling) = (inner.clone(), addresses_in.clone());
    let tell = move || drop(telling.send_replace(device.told_addresses()));
    inner.spawn(punching::run(inner.clone(), tell));
    inner.spawn(follow_addresses(inner.clone(), endpoint.clone(), addresses_in));
    inner.spawn(follow_discoveries(inner.clone(), endpoint));
}

async fn accept_loop(inner: Arc<Inner>, endpoint: Endpoint) {
    loop {
        let connection = tokio::select! {
            connection = endpoint.accept() => connection,
            () = inner.closed.cancelled() => return,
        };
        let Some(connection) = connection else { return };
        let device = inner.clone();
        inner.spawn(async move { take(&device, connection).await });
    }
}

async fn take(device: &Arc<Inner>, connection: Connection) {
    if connection.alpn() == PAIR_ALPN {
        let Ok(_unproven) = device.unproven().try_acquire_owned() else {
            device.count_refused();
            return connection.close(1, "too many at once");
        };
        pairing::answer(device, connection).await;
    } else {
        peers::accept(device, connection).await;
    }
}

async fn follow_addresses(inner: Arc<Inner>, endpoint: Endpoint, addresses_in: Arc<watch::Sender<Vec<String>>>) {
    let mut changes = endpoint.watch_addresses();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = inner.closed.cancelled() => return,
        }
        addresses_in.send_replace(inner.told_addresses());
        if let Some(publication) = &*inner.publication.lock().unwrap_or_else(PoisonError::into_inner) {
            let addresses = [endpoint.loopback_addresses(), inner.addresses()].concat();
            if let Err(error) = publication.update(&addresses) {
                tracing::debug!(%error, "addresses not published on this machine");
            }
        }
        peers::network_changed(&inner.groups());
        relays::network_changed(&inner.groups());
    }
}

async fn follow_discoveries(inner: Arc<Inner>, endpoint: Endpoint) {
    let Some(mut discoveries) = endpoint.discovered().await else { return };
    loop {
        let discovery = tokio::select! {
            discovery = discoveries.next() => discovery,
            () = inner.closed.cancelled() => return,
        };
        match discovery {
            Some(Discovery::Found { device, .. }) => {
                for group in inner.groups().values() {
                    group.peers.tell(&DeviceId(device.0), Step::AddressChanged);
                }
            }
            Some(_) => {}
            None => return,
        }
    }
}

fn charter(kind: GroupKind, founder: &AuthorSecret, nonce: [u8; 32], first: &EpochSecret) -> Charter {
    Charter {
        kind,
        founder: founder.keys(),
        quorum: Quorum::default(),
        suite: sync_crypto::Suite::XChaCha20Poly1305.number().into(),
        chunker: Chunker::default(),
        nonce,
        commitment: first.commitment(),
    }
}
