//! The writer thread: takes commands, carries out as many as wait in one commit, then answers all of them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sync_types::GroupId;
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use crate::append::{NewEntry, SealEntries};
use crate::db::{Appended, Db, Txn};
use crate::error::StoreError;

/// Commands in one commit: their answers wait for the last of them.
const MAX_COMMANDS: usize = 256;
/// Bytes in one commit, for the same reason.
const MAX_BYTES: usize = 4 << 20;

pub(super) enum Command {
    Append(Append),
    Work(Box<dyn Work>),
    Close(oneshot::Sender<Result<(), StoreError>>),
}

/// Something to carry out in a commit.
enum Task {
    Append(Append),
    Work(Box<dyn Work>),
}

impl Task {
    /// Whether both are carried out in one step: appending to one feed.
    fn joins(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Append(one), Self::Append(next)) => {
                one.group == next.group && Arc::ptr_eq(&one.sealer, &next.sealer)
            }
            _ => false,
        }
    }

    /// Does what is to be done once the commit is durable, before anyone is told of it.
    fn committed(&mut self) {
        if let Self::Work(work) = self {
            work.committed();
        }
    }

    fn answer(self, committed: &Result<(), StoreError>) {
        match self {
            Self::Append(append) => answer(append.done, committed, append.answer),
            Self::Work(work) => work.answer(committed),
        }
    }
}

/// Entries for our own feed.
pub(super) struct Append {
    pub(super) group: GroupId,
    pub(super) entries: Vec<NewEntry>,
    pub(super) sealer: Arc<dyn SealEntries>,
    pub(super) answer: oneshot::Sender<Result<Vec<Appended>, StoreError>>,
    pub(super) done: Option<Result<Vec<Appended>, StoreError>>,
}

impl Append {
    fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.content.len()).sum()
    }
}

/// Work of any other kind.
pub(super) trait Work: Send {
    /// About how many bytes it writes.
    fn bytes(&self) -> usize;
    /// Carries it out and keeps what came of it.
    fn carry_out(&mut self, txn: &mut Txn<'_>);
    /// The commit is durable, and nobody was told of it.
    fn committed(&mut self);
    /// Tells what came of it, now that the commit is durable or has failed.
    fn answer(self: Box<Self>, committed: &Result<(), StoreError>);
}

/// A command whose work is a closure.
pub(super) struct Job<F, G, T> {
    bytes: usize,
    work: Option<F>,
    then: Option<G>,
    done: Option<Result<T, StoreError>>,
    answer: oneshot::Sender<Result<T, StoreError>>,
}

impl<F, G, T> Job<F, G, T>
where
    F: FnOnce(&mut Txn<'_>) -> Result<T, StoreError> + Send + 'static,
    G: FnOnce(&mut T) + Send + 'static,
    T: Send + 'static,
{
    pub(super) fn boxed(
        bytes: usize,
        work: F,
        then: G,
        answer: oneshot::Sender<Result<T, StoreError>>,
    ) -> Box<dyn Work> {
        Box::new(Self { bytes, work: Some(work), then: Some(then), done: None, answer })
    }
}

impl<F, G, T> Work for Job<F, G, T>
where
    F: FnOnce(&mut Txn<'_>) -> Result<T, StoreError> + Send,
    G: FnOnce(&mut T) + Send,
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

    fn committed(&mut self) {
        if let (Some(Ok(done)), Some(then)) = (&mut self.done, self.then.take()) {
            then(done);
        }
    }

    fn answer(self: Box<Self>, committed: &Result<(), StoreError>) {
        answer(self.done, committed, self.answer);
    }
}

fn answer<T>(
    done: Option<Result<T, StoreError>>,
    committed: &Result<(), StoreError>,
    answer: oneshot::Sender<Result<T, StoreError>>,
) {
    let done = match (done, committed) {
        // its own failure says more than the commit's
        (Some(Err(error)), _) => Err(error),
        (Some(Ok(done)), Ok(())) => Ok(done),
        (_, Err(error)) => Err(error.clone()),
        (None, Ok(())) => Err(StoreError::Closed),
    };
    // who asked may have gone
    drop(answer.send(done));
}

/// Serves commands until the store is closed or dropped.
pub(super) fn run(mut db: Db, mut commands: mpsc::Receiver<Command>, place: &Place, shared: &Shared) {
    let mut closing = Vec::new();
    while let Some(first) = commands.blocking_recv() {
        let mut next = Some(first);
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(command) = next {
            match command {
                Command::Append(append) => {
                    bytes += append.bytes();
                    batch.push(Task::Append(append));
                }
                Command::Work(work) => {
                    bytes += work.bytes();
                    batch.push(Task::Work(work));
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
            carry_out(&mut db, batch, place, shared);
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

/// Where the open file is found, and that it still is the same one.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    file: u64,
}

impl Place {
    /// The place of a database that was just opened.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: file_number(path)? })
    }

    fn check(&self) -> Result<(), StoreError> {
        if file_number(&self.path).is_ok_and(|file| file == self.file) { Ok(()) } else { Err(StoreError::Gone) }
    }
}

/// What tells one file from another that takes its name.
#[cfg(unix)]
fn file_number(path: &Path) -> io::Result<u64> {
    std::fs::metadata(path).map(|found| std::os::unix::fs::MetadataExt::ino(&found))
}

/// An open file keeps its name here.
#[cfg(not(unix))]
fn file_number(path: &Path) -> io::Result<u64> {
    std::fs::metadata(path).map(|_| 0)
}

/// One commit.
fn carry_out(db: &mut Db, mut batch: Vec<Task>, place: &Place, shared: &Shared) {
    let committed = db.begin().and_then(|mut txn| {
        for together in batch.chunk_by_mut(Task::joins) {
            match together {
                [Task::Work(work)] => work.carry_out(&mut txn),
                appends => append(&mut txn, appends),
            }
        }
        txn.commit()
    });
    // what went into a file that nobody can find again is not stored
    let committed = committed.and_then(|changes| place.check().map(|()| changes));
    let committed = committed.map(|changes| {
        batch.iter_mut().for_each(Task::committed);
        shared.commits.fetch_add(1, Ordering::Relaxed);
        shared.commands.fetch_add(batch.len() as u64, Ordering::Relaxed);
        shared.publish(changes);
    });
    if let Err(error) = &committed {
        tracing::warn!(%error, commands = batch.len(), "commit failed, nothing of it was stored");
    }
    for task in batch {
        task.answer(&committed);
    }
}

/// Appends to one feed what several commands ask for, as if it were one; each alone if that fails.
fn append(txn: &mut Txn<'_>, tasks: &mut [Task]) {
    let mut appends: Vec<&mut Append> = tasks
        .iter_mut()
        .filter_map(|task| match task {
            Task::Append(append) => Some(append),
            Task::Work(_) => None,
        })
        .collect();
    let Some(first) = appends.first() else { return };
    let (group, sealer) = (first.group, first.sealer.clone());
    let lengths: Vec<usize> = appends.iter().map(|append| append.entries.len()).collect();
    let entries: Vec<NewEntry> = appends.iter_mut().flat_map(|append| append.entries.drain(..)).collect();
    match txn.attempt(|txn| txn.append(&group, &entries, &*sealer)) {
        Ok(stored) => {
            let mut stored = stored.into_iter();
            for (append, length) in appends.iter_mut().zip(lengths) {
                append.done = Some(Ok(stored.by_ref().take(length).collect()));
            }
        }
        Err(error) if appends.len() == 1 => appends[0].done = Some(Err(error)),
        Err(_) => {
            let mut rest = &entries[..];
            for (append, length) in appends.iter_mut().zip(lengths) {
                let (own, others) = rest.split_at(length);
                append.done = Some(txn.attempt(|txn| txn.append(&group, own, &*sealer)));
                rest = others;
            }
        }
    }
}
