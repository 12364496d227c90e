//! Read-only connections, made when first needed and used on tokio's blocking threads.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, TryAcquireError};

use crate::db::{Reader, open_read_only, snapshot};
use crate::error::StoreError;

/// Connections that read at once: more than the cores of a phone, few enough to be cheap.
const MAX_READERS: u32 = 4;

pub(super) struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Readers {
    pub(super) fn new(path: &Path) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_READERS as usize));
        Self { path: path.to_owned(), permits, idle: Arc::default() }
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Reader<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let (path, idle) = (self.path.clone(), self.idle.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let known = lock(&idle).pop();
            let conn = match known {
                Some(conn) => conn,
                None => open_read_only(&path)?,
            };
            let done = snapshot(&conn, work);
            lock(&idle).push(conn);
            // only now, so that there are never more connections than permits
            drop(permit);
            done
        });
        match reading.await {
            Ok(done) => done,
            Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
            Err(_) => Err(StoreError::Closed),
        }
    }

    /// The same on this thread, which may block and belongs to tokio.
    pub(super) fn read_here<T>(
        &self,
        work: impl FnOnce(&Reader<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(TryAcquireError::Closed) => return Err(StoreError::Closed),
            Err(TryAcquireError::NoPermits) => {
                let waiting = self.permits.clone().acquire_owned();
                Handle::current().block_on(waiting).map_err(|_| StoreError::Closed)?
            }
        };
        let known = lock(&self.idle).pop();
        let conn = match known {
            Some(conn) => conn,
            None => open_read_only(&self.path)?,
        };
        let done = snapshot(&conn, work);
        lock(&self.idle).push(conn);
        drop(permit);
        done
    }

    /// Waits for what is being read, and closes every connection for good.
    pub(super) async fn close(&self) {
        // an error: closed before
        let Ok(all) = self.permits.acquire_many(MAX_READERS).await else { return };
        self.permits.close();
        all.forget();
        lock(&self.idle).clear();
    }
}

fn lock(idle: &Mutex<Vec<Connection>>) -> std::sync::MutexGuard<'_, Vec<Connection>> {
    // a push or a pop is done or not done
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}
