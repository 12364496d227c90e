//! How fast chunks may move.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// A rate that everything moving in one direction shares; none by default.
#[derive(Debug, Default)]
pub struct Pace {
    /// Bytes per second; none for no limit.
    limit: Option<watch::Receiver<Option<u64>>>,
    /// When what was taken so far is paid for.
    paid: Mutex<Option<Instant>>,
}

impl Pace {
    /// Follows a limit in bytes per second, none for no limit; a change counts at once.
    #[must_use]
    pub fn new(limit: watch::Receiver<Option<u64>>) -> Self {
        Self { limit: Some(limit), paid: Mutex::default() }
    }

    pub(super) fn is_limited(&self) -> bool {
        self.limit.as_ref().is_some_and(|limit| limit.borrow().is_some())
    }

    /// Takes these bytes, and waits until they are paid for and what others have taken before.
    pub(super) async fn take(&self, bytes: usize) {
        let Some(mut limit) = self.limit.clone() else { return };
        let Some(rate) = *limit.borrow_and_update() else { return };
        let cost = Duration::from_nanos(u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(NANOS) / rate.max(1));
        let due = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let before = paid.map_or(now, |paid| paid.max(now));
            let due = before.checked_add(cost).unwrap_or(before);
            *paid = Some(due);
            due
        };
        tokio::select! {
            () = tokio::time::sleep_until(due) => {}
            // at the old rate it might have been a long wait
            Ok(()) = limit.changed() => *self.paid.lock().unwrap_or_else(PoisonError::into_inner) = None,
        }
    }
}

const NANOS: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn takers_share_the_rate_and_a_change_counts_at_once() {
        let (set, limit) = watch::channel(Some(1000));
        let pace = Pace::new(limit);
        let start = Instant::now();
        for _ in 0..5 {
            tokio::join!(pace.take(1000), pace.take(1000));
        }
        assert_eq!(start.elapsed().as_secs(), 10, "the last one too");
        set.send_replace(Some(1));
        let slow = async {
            pace.take(1000).await;
            start.elapsed()
        };
        let change = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            set.send_replace(None);
        };
        let (at, ()) = tokio::join!(slow, change);
        assert!(at.as_secs() < 20, "{at:?}");
        let before = Instant::now();
        pace.take(usize::MAX).await;
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
