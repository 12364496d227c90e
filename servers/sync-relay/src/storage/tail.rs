//! The newest part of a group's log, read once for all sessions that read along.
//!
//! Whoever asks is answered as the database was at some moment since the newest cursor that it knows became durable: the
//! part in memory counts only up to there, for a short time, and not beyond an expiry of this process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use sync_core::session::Reply;
use sync_store::{Limits, Window, WindowRow};
use sync_types::bounds::FRAME_BYTES_TARGET;
use sync_types::{Cursor, GroupId};

use super::{Reading, Storage, StorageError};

/// For how long it is kept: sessions ask at once when something is new, and other processes may let entries expire.
///
/// What tests compare does not change behind its back, and may take them longer.
const LIFE: Duration = Duration::from_secs(if cfg!(test) { 3600 } else { 1 });
/// How much is kept: what one answer holds at most, and so many small entries that who is a little behind finds them.
const KEPT: Limits = Limits { entries: 256, bytes: FRAME_BYTES_TARGET };

/// The newest part of a group's log.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    kept: Mutex<Kept>,
    /// One reads the database at a time; whoever waited finds what that one read.
    reading: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Kept {
    /// With the time at which its oldest entry was read.
    window: Option<(Arc<Window>, Instant)>,
    /// A task waits to let go of it.
    ageing: bool,
}

impl Tail {
    /// The answer to a session that knows of a newest cursor, if it is in memory.
    pub(crate) fn answer(&self, newest: Cursor, reading: &Reading) -> Option<Reply> {
        let window = self.window().filter(|window| window.newest >= newest)?;
        answer(&window, reading)
    }

    /// The same from the database where it is not.
    pub(crate) async fn read(
        self: &Arc<Self>,
        storage: &dyn Storage,
        group: GroupId,
        newest: Cursor,
        reading: Reading,
    ) -> Result<Reply, StorageError> {
        let one = self.reading.lock().await;
        if let Some(reply) = self.answer(newest, &reading) {
            return Ok(reply);
        }
        let kept = self.window();
        if kept.as_ref().is_some_and(|kept| reading.after < kept.after) {
            // who is far behind reads by itself, and leaves the others what they read
            drop(one);
            return storage.read(group, reading).await;
        }
        let kept = kept.filter(|kept| reading.after <= kept.end);
        let since = Instant::now();
        let next = storage.window(group, kept.as_ref().map_or(reading.after, |kept| kept.end), KEPT).await?;
        let window = match &kept {
            Some(kept) => Arc::new(kept.followed_by(next, KEPT)),
            None => Arc::new(next),
        };
        self.keep(window.clone(), since, kept.is_some_and(|kept| window.after < kept.end));
        drop(one);
        match answer(&window, &reading) {
            Some(reply) => Ok(reply),
            None => storage.read(group, reading).await,
        }
    }

    /// Takes in what was stored at once and is durable, if it follows what is in memory.
    pub(crate) fn grow(&self, rows: Vec<WindowRow>) {
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return };
        let mut kept = self.lock();
        let Some((window, _)) = &mut kept.window else { return };
        // what two branches make of entries read before only the database tells
        let follows = window.end == window.newest && first.cursor.0 == window.end.0 + 1;
        if !follows || rows.iter().any(|row| row.forked) {
            return;
        }
        let (after, end, check, holds_from) = (window.end, last.cursor, last.check, window.holds_from);
        let rows = rows.into_iter().map(Arc::new).collect();
        *window = Arc::new(window.followed_by(Window { after, rows, end, check, newest: end, holds_from }, KEPT));
    }

    /// Entries have expired: nothing that was read before counts.
    pub(crate) async fn forget(&self) {
        let _one = self.reading.lock().await;
        self.lock().window = None;
    }

    fn window(&self) -> Option<Arc<Window>> {
        let kept = self.lock();
        let fresh = kept.window.as_ref().filter(|(_, since)| since.elapsed() < LIFE);
        fresh.map(|(window, _)| window.clone())
    }

    /// Keeps a window; `older` says whether it has entries that were read before.
    fn keep(self: &Arc<Self>, window: Arc<Window>, since: Instant, older: bool) {
        let mut kept = self.lock();
        let since = kept.window.as_ref().filter(|_| older).map_or(since, |(_, since)| *since);
        kept.window = Some((window, since));
        if !std::mem::replace(&mut kept.ageing, true) {
            tokio::spawn(age(Arc::downgrade(self)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer(window: &Window, reading: &Reading) -> Option<Reply> {
    let Reading { scope, not_from, after, limits, selection } = reading;
    let batch = window.read(*after, *limits, selection, *not_from)?;
    Some(Reply::Read {
        scope: *scope,
        entries: batch.entries,
        max_cursor: batch.max_cursor,
        check: batch.check,
        has_more: batch.has_more,
        holds_from: window.holds_from,
    })
}

/// Lets go of what nobody asks for any more.
async fn age(tail: Weak<Tail>) {
    loop {
        tokio::time::sleep(LIFE).await;
        let Some(tail) = tail.upgrade() else { return };
        let mut kept = tail.lock();
        if kept.window.as_ref().is_none_or(|(_, since)| since.elapsed() >= LIFE) {
            *kept = Kept::default();
            return;
        }
    }
}
