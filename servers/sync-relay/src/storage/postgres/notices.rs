//! What the processes tell each other: a group's newest cursor, and that a member lacks what expired.
//!
//! They are hints. A notice is sent after the commit it tells of, many in one, since PostgreSQL lets commits that carry
//! notices through one at a time. One that is lost with its process is made up for when the others look by themselves.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use data_encoding::HEXLOWER;
use sync_core::connection::back_off;
use sync_types::{Cursor, GroupId};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_postgres::{AsyncMessage, Client, Config, Notification};
use tokio_util::sync::CancellationToken;

use super::columns::{fixed, unsigned};
use super::tls::Tls;
use super::{CONNECT_WAIT, Shared, damaged};
use crate::storage::StorageError;

/// On which all processes of a database listen.
const CHANNEL: &str = "sync_relay";
/// What is said in place of a cursor.
const WANTED: &str = "wanted";
/// Time between two looks for what no notice told of.
///
/// Tests are to see that notices come by themselves.
const LOOK: Duration = Duration::from_secs(if cfg!(test) { 3600 } else { 10 });

/// What is to be told.
#[derive(Default)]
pub(super) struct Telling {
    waiting: Mutex<BTreeMap<GroupId, News>>,
    some: Notify,
}

#[derive(Default)]
struct News {
    newest: Option<Cursor>,
    wanted: bool,
}

impl Telling {
    /// A group's log goes up to here.
    pub(super) fn newest(&self, group: GroupId, newest: Cursor) {
        self.note(group, |news| news.newest = news.newest.max(Some(newest)));
    }

    /// A member lacks what expired here.
    pub(super) fn wanted(&self, group: GroupId) {
        self.note(group, |news| news.wanted = true);
    }

    fn note(&self, group: GroupId, what: impl FnOnce(&mut News)) {
        what(self.waiting.lock().unwrap_or_else(PoisonError::into_inner).entry(group).or_default());
        self.some.notify_one();
    }

    fn take(&self) -> BTreeMap<GroupId, News> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// It was not told: the next connection tells it.
    fn put_back(&self, untold: BTreeMap<GroupId, News>) {
        for (group, News { newest, wanted }) in untold {
            self.note(group, |news| {
                news.newest = news.newest.max(newest);
                news.wanted |= wanted;
            });
        }
    }
}

/// Listens and tells until it is to stop; a connection that is lost is made again.
pub(super) async fn run(first: Listener, shared: Arc<Shared>, config: Config, tls: Tls, stop: CancellationToken) {
    let (mut next, mut attempt) = (Ok(first), 0);
    loop {
        let worked = match next {
            Ok(listener) => {
                attempt = 0;
                listener.work(&shared, &stop).await
            }
            Err(error) => Err(error),
        };
        let Err(error) = worked else { return };
        tracing::warn!(%error, "no notices from other relays until the database is reached again");
        let jitter = getrandom::u64().expect("BUG: the system has no random numbers");
        tokio::select! {
            () = tokio::time::sleep(back_off(attempt, jitter)) => attempt += 1,
            () = stop.cancelled() => return,
        }
        next = Listener::open(&shared, &config, &tls).await;
    }
}

/// A connection that listens.
pub(super) struct Listener {
    client: Client,
    hearing: JoinHandle<()>,
}

impl Listener {
    /// Connects and listens; whatever was said before is looked up.
    pub(super) async fn open(shared: &Arc<Shared>, config: &Config, tls: &Tls) -> Result<Self, StorageError> {
        within(Self::connect(shared, config, tls)).await
    }

    async fn connect(shared: &Arc<Shared>, config: &Config, tls: &Tls) -> Result<Self, StorageError> {
        let (client, mut connection) = config.connect(tls.clone()).await?;
        let heard = shared.clone();
        let (own, from_here) = tokio::sync::oneshot::channel::<i32>();
        let hearing = tokio::spawn(async move {
            let (mut from_here, mut own) = (Some(from_here), None);
            while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                if let Some(id) = from_here.as_mut().and_then(|told| told.try_recv().ok()) {
                    (own, from_here) = (Some(id), None);
                }
                if let AsyncMessage::Notification(notice) = message
                    && own != Some(notice.process_id())
                {
                    heard.hear(&notice);
                }
            }
        });
        let listener = Self { client, hearing };
        let id = listener.client.query_one("SELECT pg_backend_pid()", &[]).await?.try_get(0)?;
        // it ends only with the connection
        let _ = own.send(id);
        listener.client.batch_execute(&format!("LISTEN {CHANNEL}")).await?;
        // whatever was said while nobody listened
        listener.look(shared).await?;
        for hosted in shared.groups().values() {
            hosted.wanted.send_replace(());
        }
        Ok(listener)
    }

    async fn work(mut self, shared: &Shared, stop: &CancellationToken) -> Result<(), StorageError> {
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                () = shared.telling.some.notified() => self.tell(shared).await?,
                _ = ticks.tick() => self.look(shared).await?,
                _ = &mut self.hearing => return Err(StorageError::Postgres("connection lost".to_owned())),
                () = stop.cancelled() => return self.tell(shared).await,
            }
        }
    }

    /// Tells what is to be told.
    async fn tell(&self, shared: &Shared) -> Result<(), StorageError> {
        let news = shared.telling.take();
        if news.is_empty() {
            return Ok(());
        }
        let mut notices = Vec::new();
        for (group, News { newest, wanted }) in &news {
            let group = HEXLOWER.encode(&group.0);
            notices.extend(newest.map(|newest| format!("{group} {}", newest.0)));
            notices.extend(wanted.then(|| format!("{group} {WANTED}")));
        }
        let sql = "SELECT pg_notify($1, n) FROM unnest($2::text[]) AS n";
        let told = within(async { Ok(self.client.execute(sql, &[&CHANNEL, &notices]).await?) }).await;
        told.map(|_| ()).inspect_err(|_| shared.telling.put_back(news))
    }

    /// Looks how far the log of each group goes.
    async fn look(&self, shared: &Shared) -> Result<(), StorageError> {
        let gids: Vec<i64> = shared.groups().values().map(|hosted| hosted.gid).collect();
        let sql = "SELECT g.id, l.max_cursor FROM groups g JOIN logs l ON l.gid = g.gid WHERE g.gid = ANY ($1)";
        for row in within(async { Ok(self.client.query(sql, &[&gids]).await?) }).await? {
            shared.raise(GroupId(fixed(row.try_get(0)?)?), Cursor(unsigned(row.try_get(1)?)));
        }
        Ok(())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.hearing.abort();
    }
}

/// An answer, unless the database is silent.
async fn within<T>(work: impl Future<Output = Result<T, StorageError>>) -> Result<T, StorageError> {
    let late = |_| StorageError::Postgres("no answer in time".to_owned());
    tokio::time::timeout(CONNECT_WAIT, work).await.map_err(late)?
}

impl Shared {
    fn raise(&self, group: GroupId, newest: Cursor) {
        if let Some(hosted) = self.groups().get(&group) {
            hosted.raise(newest);
        }
    }

    fn hear(&self, notice: &Notification) {
        if let Err(error) = self.take_notice(notice.payload()) {
            tracing::debug!(%error, "notice that means nothing");
        }
    }

    fn take_notice(&self, said: &str) -> Result<(), StorageError> {
        let nonsense = || damaged("a notice that no relay sends");
        let (group, what) = said.split_once(' ').ok_or_else(nonsense)?;
        let group = HEXLOWER.decode(group.as_bytes()).map_err(|_| nonsense())?;
        let group = GroupId(fixed(&group)?);
        if what == WANTED {
            if let Some(hosted) = self.groups().get(&group) {
                hosted.wanted.send_replace(());
            }
        } else {
            self.raise(group, Cursor(what.parse().map_err(|_| nonsense())?));
        }
        Ok(())
    }
}
