//! Rendezvous: two devices that share a secret find each other.
//!
//! One publishes a sealed record under a lookup id, the other looks the id up.
//! A provider sees neither what a record says nor whether it is genuine, so a lookup yields every answer and the caller, who can open the right one, listens until it has come.

use std::{collections::HashSet, fmt, io};

use futures_util::future::BoxFuture;
use tokio::{sync::mpsc, task::JoinSet};

use crate::same_machine::DirectoryError;

/// Longest record of any provider: a sealed record is about 600 bytes, and one must fit in a packet.
pub const MAX_RECORD: usize = 1024;

/// Different answers one lookup takes from one provider; a forger can make any number, and each costs the caller an attempt to open it.
pub const MAX_CANDIDATES: usize = 16;

/// What a record is published under; it tells nothing about the secret it came from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LookupId(pub [u8; 16]);

impl LookupId {
    /// The id in lower-case hex.
    pub fn to_hex(self) -> String {
        data_encoding::HEXLOWER.encode(&self.0)
    }
}

impl fmt::Debug for LookupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LookupId({})", self.to_hex())
    }
}

/// A sealed record of 1 to [`MAX_RECORD`] bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Record(Vec<u8>);

impl Record {
    /// Takes the bytes if their length is allowed.
    pub fn new(bytes: Vec<u8>) -> Result<Self, RendezvousError> {
        match bytes.len() {
            0 => Err(RendezvousError::EmptyRecord),
            got if got > MAX_RECORD => Err(RendezvousError::RecordTooLong { got, max: MAX_RECORD }),
            _ => Ok(Self(bytes)),
        }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A way to find a peer from a lookup id.
pub trait Rendezvous: Send + Sync + fmt::Debug {
    /// The provider's name, for people.
    fn name(&self) -> &'static str;

    /// Publishes a record until its [`Publication`] is dropped.
    fn publish(&self, id: LookupId, record: Record) -> BoxFuture<'_, Result<Publication, RendezvousError>>;

    /// Looks an id up until the [`Lookup`] is dropped.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    fn lookup(&self, id: LookupId) -> Lookup;
}

/// A provider's side of a [`Publication`].
pub trait Published: Send {
    /// Publishes other bytes in place of the record.
    fn replace(&mut self, record: Record) -> BoxFuture<'_, Result<(), RendezvousError>>;

    /// Takes the record back as well as it can be without waiting; called once, last.
    fn withdraw(&mut self);
}

/// A published record; dropping this withdraws it.
#[must_use = "a record is withdrawn when its publication is dropped"]
pub struct Publication {
    published: Box<dyn Published>,
    stays: bool,
}

impl Publication {
    /// Wraps a provider's side.
    pub fn new(published: impl Published + 'static) -> Self {
        Self { published: Box::new(published), stays: false }
    }

    /// Publishes other bytes under the same id, as when an invite has been used.
    pub async fn replace(&mut self, record: Record) -> Result<(), RendezvousError> {
        self.published.replace(record).await
    }

    /// Takes the record back.
    pub fn withdraw(self) {}

    /// Leaves the record to grow stale where a provider keeps it without us, as when it says that an invite was used.
    pub fn leave(mut self) {
        self.stays = true;
    }
}

impl Drop for Publication {
    fn drop(&mut self) {
        if !self.stays {
            self.published.withdraw();
        }
    }
}

impl fmt::Debug for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Publication")
    }
}

/// What a lookup came upon.
///
/// Exhaustive, because a caller has to decide about each.
#[derive(Debug)]
pub enum Found {
    /// An answer, genuine or not.
    Candidate {
        /// Which provider had it.
        provider: &'static str,
        /// The answer.
        record: Record,
    },
    /// A provider does not work; the others go on.
    Warning {
        /// Which provider.
        provider: &'static str,
        /// What is wrong.
        error: RendezvousError,
    },
}

/// The answers to a lookup as they come; dropping this ends the lookup.
#[derive(Debug)]
pub struct Lookup {
    found: mpsc::Receiver<Found>,
    _tasks: JoinSet<()>,
}

impl Lookup {
    /// Runs a provider's search in the background.
    pub fn spawn<F>(provider: &'static str, search: impl FnOnce(LookupSink) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, found) = mpsc::channel(MAX_CANDIDATES);
        let mut tasks = JoinSet::new();
        tasks.spawn(search(LookupSink { provider, sender, seen: HashSet::new(), warned: HashSet::new() }));
        Self { found, _tasks: tasks }
    }

    /// Returns the next answer or warning, or `None` when every provider has given up. Cancel safe.
    ///
    /// A provider that works goes on until the lookup is dropped, so callers bring their own timeout.
    pub async fn next(&mut self) -> Option<Found> {
        self.found.recv().await
    }
}

/// Merges lookups: answers and warnings of all come as they arrive, and none waits for another.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn race(lookups: impl IntoIterator<Item = Lookup>) -> Lookup {
    let (sender, found) = mpsc::channel(MAX_CANDIDATES);
    let mut tasks = JoinSet::new();
    for mut lookup in lookups {
        let sender = sender.clone();
        tasks.spawn(async move {
            while let Some(found) = lookup.next().await {
                if sender.send(found).await.is_err() {
                    return;
                }
            }
        });
    }
    Lookup { found, _tasks: tasks }
}

/// Where a provider's search puts what it finds: each answer once, [`MAX_CANDIDATES`] in all, each kind of warning once.
#[derive(Debug)]
pub struct LookupSink {
    provider: &'static str,
    sender: mpsc::Sender<Found>,
    seen: HashSet<Record>,
    warned: HashSet<std::mem::Discriminant<RendezvousError>>,
}

impl LookupSink {
    /// Passes an answer on unless it is known or no record at all.
    pub async fn candidate(&mut self, bytes: &[u8]) {
        let Ok(record) = Record::new(bytes.to_vec()) else {
            return;
        };
        if self.seen.len() >= MAX_CANDIDATES || !self.seen.insert(record.clone()) {
            return;
        }
        self.put(Found::Candidate { provider: self.provider, record }).await;
    }

    /// Passes a warning on unless one of its kind has gone before.
    pub async fn warn(&mut self, error: RendezvousError) {
        tracing::debug!(provider = self.provider, %error, "rendezvous");
        if !self.warned.insert(std::mem::discriminant(&error)) {
            return;
        }
        self.put(Found::Warning { provider: self.provider, error }).await;
    }

    async fn put(&self, found: Found) {
        // fails only when the lookup is gone, and its task with it
        let _ = self.sender.send(found).await;
    }
}

/// Why a record could not be published or looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// A record has bytes.
    #[error("record is empty")]
    EmptyRecord,
    /// The record does not fit this provider.
    #[error("record of {got} bytes, at most {max} fit")]
    RecordTooLong {
        /// The length found.
        got: usize,
        /// The bound.
        max: usize,
    },
    /// The directory for processes of this machine cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// No interface takes part in multicast.
    #[error("no network interface for multicast, connect to a network or pair by link")]
    NoInterface,
    /// A relay does not give the record.
    #[error(transparent)]
    Meeting(#[from] crate::relay::meeting::MeetingError),
    /// The network refused.
    #[error("local network cannot be used: {0}")]
    Network(#[source] io::Error),
}
