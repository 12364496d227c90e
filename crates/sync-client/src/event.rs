//! What a client tells its application while it runs.

use sync_types::{AuthorId, BlobId, Cursor, FolderId, ReplicaId};
use tokio::sync::broadcast;

/// Events a subscriber may fall behind; one further behind is told that it lagged and pulls.
pub const EVENT_BACKLOG: usize = 4096;

/// Something an application may want to show or act on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A replica of the group is connected.
    Connected {
        /// Its database.
        replica: ReplicaId,
        /// The name of its device.
        name: String,
        /// Its newest cursor.
        max_cursor: Cursor,
        /// Entries of our own that nobody else holds yet.
        pending: u64,
    },
    /// A replica is no longer connected.
    Disconnected {
        /// Its database.
        replica: ReplicaId,
        /// The name of its device.
        name: String,
        /// Why.
        reason: String,
    },
    /// A blob can be pulled.
    BlobAvailable {
        /// Its author's name for it.
        blob_id: BlobId,
        /// Where it is stored here.
        cursor: Cursor,
        /// Its author.
        sender: AuthorId,
    },
    /// Someone joined the group.
    Joined {
        /// The name of their device.
        name: String,
        /// Their author.
        author: AuthorId,
    },
    /// The picture of a folder changed: [`crate::Device::folders`] has the new one.
    FolderChanged {
        /// The folder.
        folder: FolderId,
    },
    /// A file was kept under another name, because two devices changed it without knowing of each other.
    FolderConflict {
        /// The folder.
        folder: FolderId,
        /// The path of the copy.
        path: String,
    },
    /// Something went wrong that does not end the client.
    Error {
        /// A stable word for it.
        code: String,
        /// The same in words.
        message: String,
    },
    /// This subscriber was too slow and missed events; pull after the last cursor seen.
    Lagged {
        /// How many it missed.
        missed: u64,
    },
}

/// Events as they come. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription {
    events: broadcast::Receiver<Event>,
}

impl Subscription {
    pub(crate) fn new(events: broadcast::Receiver<Event>) -> Self {
        Self { events }
    }

    /// The next event; none once the client is closed. Cancel safe: no event is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Event> {
        match self.events.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Lagged { missed }),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
