//! Seals the next entries on a second thread while the writer stores the one before.
//!
//! Each envelope names the hash of the one before it, so one thread can seal at a time, but storing need not wait for it.
//! What was sealed ahead counts only where the database asks for exactly that place in the feed; the rest is thrown away
//! unseen, and sealed anew under another nonce.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::Scope;

use sync_types::{AuthorId, BlobId, Envelope, EnvelopeHash, Number};

use crate::append::{NewEntry, SealEntries, SealError};

/// Entries from which a second thread saves more than its start costs, which is about two seals.
const WORTHWHILE: usize = 16;
/// Entries handed over at once: waking the writer for each would cost as much as storing it.
const TOGETHER: usize = 8;
/// Bytes handed over at once, so that large entries do not pile up.
const TOGETHER_BYTES: usize = 256 << 10;
/// Handovers that wait for the writer: it is the faster one as a rule.
const WAITING: usize = 2;

/// Does some work with a sealer for these entries that seals ahead.
pub(super) fn seal_ahead<T>(
    entries: &[NewEntry],
    sealer: &dyn SealEntries,
    work: impl FnOnce(&dyn SealEntries) -> T,
) -> T {
    if entries.len() < WORTHWHILE {
        return work(sealer);
    }
    std::thread::scope(|scope| work(&Ahead { entries, sealer, scope, state: Mutex::new(State::Unasked) }))
}

struct Ahead<'scope, 'env> {
    entries: &'env [NewEntry],
    sealer: &'env dyn SealEntries,
    scope: &'scope Scope<'scope, 'env>,
    state: Mutex<State>,
}

enum State {
    /// Where the feed stands is not known yet.
    Unasked,
    /// The other thread seals.
    Running { handed: Receiver<Vec<Sealed>>, ready: VecDeque<Sealed> },
    /// The entries were not asked for one after the other, or the other thread ended.
    Alone,
}

struct Sealed {
    blob_id: BlobId,
    number: Number,
    previous: EnvelopeHash,
    bytes: Vec<u8>,
}

impl SealEntries for Ahead<'_, '_> {
    fn author(&self) -> AuthorId {
        self.sealer.author()
    }

    fn seal(&self, number: Number, previous: EnvelopeHash, entry: &NewEntry) -> Result<Vec<u8>, SealError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Running { handed, ready } = &mut *state {
            if ready.is_empty() {
                ready.extend(handed.recv().into_iter().flatten());
            }
            let asked = (entry.blob_id, number, previous);
            if let Some(sealed) = ready.pop_front()
                && (sealed.blob_id, sealed.number, sealed.previous) == asked
            {
                return Ok(sealed.bytes);
            }
            *state = State::Alone;
        }
        let bytes = self.sealer.seal(number, previous, entry)?;
        if matches!(*state, State::Unasked) {
            *state = self.start(number, entry, &bytes);
        }
        Ok(bytes)
    }
}

impl<'scope, 'env> Ahead<'scope, 'env> {
    /// Starts the other thread behind an entry.
    fn start(&self, number: Number, entry: &NewEntry, bytes: &[u8]) -> State {
        let place = self.entries.iter().position(|known| std::ptr::eq(known, entry));
        let (Some(place), Some(hash)) = (place, hash(bytes)) else { return State::Alone };
        let (hand, handed) = sync_channel(WAITING);
        let (rest, sealer) = (&self.entries[place + 1..], self.sealer);
        self.scope.spawn(move || seal_all(rest, sealer, number, hash, &hand));
        State::Running { handed, ready: VecDeque::new() }
    }
}

/// Seals entries behind a place in a feed until all are sealed, one cannot be, or nobody wants them.
fn seal_all(
    entries: &[NewEntry],
    sealer: &dyn SealEntries,
    mut number: Number,
    mut previous: EnvelopeHash,
    hand: &SyncSender<Vec<Sealed>>,
) {
    let (mut together, mut size) = (Vec::with_capacity(TOGETHER), 0);
    for entry in entries {
        let Some(next) = number.next() else { break };
        // who stores it seals it again, and is told why it cannot be
        let Ok(bytes) = sealer.seal(next, previous, entry) else { break };
        let Some(hash) = hash(&bytes) else { break };
        size += bytes.len();
        together.push(Sealed { blob_id: entry.blob_id, number: next, previous, bytes });
        (number, previous) = (next, hash);
        if together.len() >= TOGETHER || size >= TOGETHER_BYTES {
            if hand.send(std::mem::replace(&mut together, Vec::with_capacity(TOGETHER))).is_err() {
                return;
            }
            size = 0;
        }
    }
    // who stores may have stopped
    let _ = hand.send(together);
}

fn hash(bytes: &[u8]) -> Option<EnvelopeHash> {
    Envelope::parse(bytes).ok().map(|envelope| envelope.hash())
}
