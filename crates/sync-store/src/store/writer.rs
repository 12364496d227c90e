//! The writer thread: takes commands, carries out as many as wait in one commit, then answers all of them.

use std::sync::atomic::Ordering;

use tokio::sync::{mpsc, oneshot};

use super::Shared;
use crate::db::{Db, Txn};
use crate::error::StoreError;

/// Commands in one commit: their answers wait for the last of them.
const MAX_COMMANDS: usize = 256;
/// Bytes in one commit, for the same reason.
const MAX_BYTES: usize = 4 << 20;

pub(super) enum Command {
    Work(Box<dyn Work>),
    Close(oneshot::Sender<Result<(), StoreError>>),
}

/// A command of any kind.
pub(super) trait Work: Send {
    /// About how many bytes it writes.
    fn bytes(&self) -> usize;
    /// Carries it out and keeps what came of it.
    fn carry_out(&mut self, txn: &mut Txn<'_>);
    /// Tells what came of it, now that the commit is durable or has failed.
    fn answer(self: Box<Self>, committed: &Result<(), StoreError>);
}

/// A command whose work is a closure.
pub(super) struct Job<F, T> {
    bytes: usize,
    work: Option<F>,
    done: Option<Result<T, StoreError>>,
    answer: oneshot::Sender<Result<T, StoreError>>,
}

impl<F, T> Job<F, T>
where
    F: FnOnce(&mut Txn<'_>) -> Result<T, StoreError> + Send + 'static,
    T: Send + 'static,
{
    pub(super) fn boxed(bytes: usize, work: F, answer: oneshot::Sender<Result<T, StoreError>>) -> Box<dyn Work> {
        Box::new(Self { bytes, work: Some(work), done: None, answer })
    }
}

impl<F, T> Work for Job<F, T>
where
    F: FnOnce(&mut Txn<'_>) -> Result<T, StoreError> + Send,
    T: Send,
{
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn carry_out(&mut self, txn: &mut Txn<'_>) {
        if let Some(work) = self.work.take() {
            self.done = Some(txn.attempt(work));
        }
    }

    fn answer(self: Box<Self>, committed: &Result<(), StoreError>) {
        let done = match (self.done, committed) {
            // its own failure says more than the commit's
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(done)), Ok(())) => Ok(done),
            (_, Err(error)) => Err(error.clone()),
            (None, Ok(())) => Err(StoreError::Closed),
        };
        // who asked may have gone
        drop(self.answer.send(done));
    }
}

/// Serves commands until the store is closed or dropped.
pub(super) fn run(mut db: Db, mut commands: mpsc::Receiver<Command>, shared: &Shared) {
    let mut closing = Vec::new();
    while let Some(first) = commands.blocking_recv() {
        let mut next = Some(first);
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(command) = next {
            match command {
                Command::Work(work) => {
                    bytes += work.bytes();
                    batch.push(work);
                }
                Command::Close(answer) => {
                    // what was sent before is still received, then the channel ends
                    commands.close();
                    closing.push(answer);
                }
            }
            let room = batch.len() < MAX_COMMANDS && bytes < MAX_BYTES;
            next = if room { commands.try_recv().ok() } else { None };
        }
        if !batch.is_empty() {
            carry_out(&mut db, batch, shared);
        }
    }
    let closed = db.close();
    if let Err(error) = &closed {
        tracing::warn!(%error, "database could not be closed cleanly; it will be recovered when next opened");
    }
    for answer in closing {
        // who asked may have gone
        drop(answer.send(closed.clone()));
    }
}

/// One commit.
fn carry_out(db: &mut Db, mut batch: Vec<Box<dyn Work>>, shared: &Shared) {
    let committed = db.begin().and_then(|mut txn| {
        for work in &mut batch {
            work.carry_out(&mut txn);
        }
        txn.commit()
    });
    let committed = committed.map(|changes| {
        shared.commits.fetch_add(1, Ordering::Relaxed);
        shared.commands.fetch_add(batch.len() as u64, Ordering::Relaxed);
        shared.publish(changes);
    });
    if let Err(error) = &committed {
        tracing::warn!(%error, commands = batch.len(), "commit failed, nothing of it was stored");
    }
    for work in batch {
        work.answer(&committed);
    }
}
