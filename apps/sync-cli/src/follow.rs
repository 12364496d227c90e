//! Reading a group's blobs in order, first those there are and then those to come.

use std::collections::VecDeque;

use crate::api::{Blob, Event, PAGE_BLOBS};
use crate::backend::{Backend, Events};
use crate::exit::Failure;

/// A reader of one group. Events only say when to look: what is delivered comes from pulling.
#[derive(Debug)]
pub(crate) struct Follow<'a> {
    backend: &'a Backend,
    group: String,
    after: u64,
    has_more: bool,
    read: VecDeque<Blob>,
    events: Option<Events>,
}

impl<'a> Follow<'a> {
    /// A reader from a cursor on; one that follows waits for what is to come.
    pub(crate) async fn new(backend: &'a Backend, group: &str, after: u64, follow: bool) -> Result<Self, Failure> {
        // before the first pull, so that nothing falls between the two
        let events = if follow { Some(backend.events(group).await?) } else { None };
        Ok(Self { backend, group: group.to_owned(), after, has_more: true, read: VecDeque::new(), events })
    }

    /// The cursor from which another reader would go on, once all that was read is taken.
    pub(crate) fn max_cursor(&self) -> u64 {
        self.after
    }

    /// Whether there was more when this was last asked for.
    pub(crate) fn has_more(&self) -> bool {
        self.has_more || !self.read.is_empty()
    }

    /// The next blob, of which the caller wants `limit` in all; none at the end of what there is or will be.
    pub(crate) async fn next(&mut self, limit: usize) -> Result<Option<Blob>, Failure> {
        loop {
            if let Some(blob) = self.read.pop_front() {
                return Ok(Some(blob));
            }
            if !self.has_more && !self.wait().await? {
                return Ok(None);
            }
            let page = self.backend.pull(&self.group, self.after, limit.min(PAGE_BLOBS)).await?;
            self.after = page.max_cursor;
            self.has_more = page.has_more;
            self.read.extend(page.blobs);
        }
    }

    /// Waits until there may be more.
    async fn wait(&mut self) -> Result<bool, Failure> {
        let Some(events) = &mut self.events else { return Ok(false) };
        while let Some(line) = events.next().await? {
            if let Event::BlobAvailable { .. } | Event::Lagged { .. } = line.event {
                return Ok(true);
            }
        }
        Err(Failure::new("closed", "the home was closed"))
    }
}
