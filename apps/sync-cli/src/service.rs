//! What can be done with an open home, in the words of the local API: the same for a command and for a request.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use sync_client::folders::{FolderOptions, FolderStatus};
use sync_client::{ClientError, Device, Invitation, JoinProgress, Removed, SyncClient, role_named};
use sync_types::{BlobId, Cursor, FolderId, GroupId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::api::{
    BackedUp, Blob, Devices, Event, EventLine, Folders, Handed, HomeRelay, HomeRelays, Invite, Joined, Members,
    OfferedFolders, Outcome, Overview, PAGE_BYTES, Page, PlaceRequest, Pushed, Recovered, RestoreRequest, Restored,
    Rotated, Undone, VERSION, Versions,
};
use crate::exit::Failure;
use crate::terminal;

/// Invites whose outcome is remembered, oldest forgotten first: more than one person can show at once.
const MAX_INVITES: usize = 64;

/// How long an invite lasts unless someone wants it shorter.
pub(crate) const INVITE_LIFETIME: Duration = Duration::from_secs(600);

/// Blobs asked for at a time while the size of blobs is unknown: at most 16 MiB.
const FIRST_BATCH: usize = 16;

/// Events that wait for their reader; a slow one delays nobody else, and is told what it missed.
const EVENTS: usize = 256;

/// Time between two looks at the folders while someone reads events: what a person sees as it happens.
const FOLDER_TICK: Duration = Duration::from_millis(500);

/// An open home.
pub(crate) struct Service {
    home: String,
    device: Device,
    api: OnceLock<String>,
    invites: Mutex<VecDeque<Invitation>>,
    groups_changed: watch::Sender<()>,
    quit: CancellationToken,
    serving: bool,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("device", &self.device.device_id()).finish_non_exhaustive()
    }
}

impl Service {
    pub(crate) fn new(home: String, device: Device, serving: bool) -> Self {
        Self {
            home,
            device,
            api: OnceLock::new(),
            invites: Mutex::default(),
            groups_changed: watch::Sender::new(()),
            quit: CancellationToken::new(),
            serving,
        }
    }

    /// Tells when the process is asked to end.
    pub(crate) fn quit(&self) -> &CancellationToken {
        &self.quit
    }

    /// Remembers where the API is served on the loopback network.
    pub(crate) fn set_api(&self, address: String) {
        // it is served there once
        let _ = self.api.set(address);
    }

    pub(crate) async fn overview(&self) -> Result<Overview, Failure> {
        let mut groups = Vec::new();
        for group in self.device.groups() {
            groups.push(self.device.client(group)?.status().await?);
        }
        Ok(Overview {
            version: VERSION.to_owned(),
            served_by: self.serving.then(std::process::id),
            home: self.home.clone(),
            name: self.device.name().to_owned(),
            device: self.device.device_id().to_string(),
            warnings: self.device.warnings(),
            api: self.api.get().cloned(),
            groups,
            folders: self.device.folders().await?,
        })
    }

    pub(crate) async fn push(&self, group: &str, blob_id: Option<&str>, bytes: Vec<u8>) -> Result<Pushed, Failure> {
        let client = self.client(group)?;
        let pushed = match blob_id {
            Some(id) => {
                let id: BlobId = id.parse().map_err(|error| Failure::usage(format!("no blob id: {error}")))?;
                client.push_as(id, bytes).await?
            }
            None => client.push(bytes).await?,
        };
        Ok(Pushed { cursor: pushed.cursor.0, blob_id: pushed.blob_id.to_string() })
    }

    /// Up to `limit` blobs after a cursor, and fewer where they are large.
    pub(crate) async fn pull(&self, group: &str, after: u64, limit: usize) -> Result<Page, Failure> {
        let client = self.client(group)?;
        let mut page = Page { blobs: Vec::new(), max_cursor: after, has_more: true };
        let mut bytes = 0;
        let mut batch = FIRST_BATCH;
        while page.has_more && page.blobs.len() < limit && bytes < PAGE_BYTES {
            let count = batch.min(limit - page.blobs.len());
            let pulled = client.pull(Cursor(page.max_cursor), count).await?;
            page.max_cursor = pulled.max_cursor.0.max(page.max_cursor);
            page.has_more = pulled.has_more;
            let before = bytes;
            for blob in pulled.blobs {
                bytes += blob.bytes.len();
                page.blobs.push(Blob {
                    cursor: blob.cursor.0,
                    blob_id: blob.blob_id.to_string(),
                    sender: blob.sender.to_string(),
                    timestamp: blob.timestamp.0,
                    bytes: blob.bytes,
                });
            }
            // as many as would fit if they went on like this
            let each = (bytes - before) / count.max(1) + 1;
            batch = (PAGE_BYTES.saturating_sub(bytes) / each).max(1);
        }
        Ok(page)
    }

    /// What happens from now on: in one group, or in all of them and those to come.
    pub(crate) async fn events(&self, group: &str) -> Result<Events, Failure> {
        let only = if group.is_empty() { None } else { Some(self.resolve(group)?) };
        let (sender, lines) = mpsc::channel(EVENTS);
        let changed = self.groups_changed.subscribe();
        let mut teller =
            Teller { device: self.device.clone(), only, sender, read: BTreeSet::new(), readers: JoinSet::new() };
        // before this returns, so that whoever has the stream misses nothing that follows
        teller.subscribe()?;
        let folders = teller.folders().await?;
        let teller = AbortOnDropHandle::new(tokio::spawn(teller.tell(changed, folders)));
        Ok(Events { lines, teller })
    }

    pub(crate) async fn handed(&self, group: &str, cursor: u64, wait: Duration) -> Result<Handed, Failure> {
        Ok(Handed { holders: self.client(group)?.handed_to(Cursor(cursor), wait).await })
    }

    /// Makes an invite, and before it the home's group if there is none.
    pub(crate) async fn invite(
        &self,
        group: &str,
        expires_in: Option<Duration>,
        relays: &[String],
        role: Option<&str>,
    ) -> Result<Invite, Failure> {
        let role = role.map(|name| role_named(name).ok_or_else(|| unknown_role(name))).transpose()?;
        let group = match self.resolve(group) {
            Err(failure) if failure.code == "no-group" => {
                let made = self.device.create_group().await?;
                self.groups_changed.send_replace(());
                made
            }
            found => found?,
        };
        let lifetime = expires_in.unwrap_or(INVITE_LIFETIME);
        let invitation = match role {
            Some(role) => self.device.invite_person(group, role, lifetime, relays).await?,
            None => self.device.invite_at(group, lifetime, relays).await?,
        };
        let invite = Invite {
            id: invitation.id.to_string(),
            group: group.to_string(),
            code: invitation.code.clone(),
            link: invitation.link.clone(),
            expires: invitation.expires.0,
        };
        let mut invites = self.invites.lock().unwrap_or_else(PoisonError::into_inner);
        if invites.len() == MAX_INVITES {
            invites.pop_front();
        }
        invites.push_back(invitation);
        Ok(invite)
    }

    /// Waits for the end of an invite made by this process.
    pub(crate) async fn outcome(&self, id: &str) -> Result<Outcome, Failure> {
        let invitation = {
            let invites = self.invites.lock().unwrap_or_else(PoisonError::into_inner);
            invites.iter().find(|invitation| invitation.id.to_string() == id).cloned()
        };
        let unknown = || Failure::new("not-found", "this process has made no such invite");
        Ok(invitation.ok_or_else(unknown)?.outcome().await.into())
    }

    pub(crate) async fn revoke(&self, invite: &str) -> Result<(), Failure> {
        Ok(self.device.revoke(invite).await?)
    }

    /// Joins a group and returns its id; `progress` is told each step.
    pub(crate) async fn join(
        &self,
        invite: &str,
        relays: &[String],
        progress: impl Fn(String) + Send + Sync,
    ) -> Result<Joined, Failure> {
        match self.device.join_at(invite, relays, |step| progress(in_words(&step))).await {
            Ok(client) => {
                self.groups_changed.send_replace(());
                Ok(Joined { group: client.group().to_string(), already: false })
            }
            Err(ClientError::AlreadyJoined(group)) => Ok(Joined { group: group.to_string(), already: true }),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) async fn folders(&self) -> Result<Folders, Failure> {
        Ok(Folders { folders: self.device.folders().await? })
    }

    /// Shares a directory in a group; in a new one where none is named.
    pub(crate) async fn share(&self, group: &str, request: PlaceRequest) -> Result<FolderStatus, Failure> {
        let group = self.resolve_some(group)?;
        let PlaceRequest { path, name, direction } = request;
        must_be_usable(&path)?;
        let shared = self.device.share_folder(&path, group, FolderOptions { name, direction }).await?;
        self.groups_changed.send_replace(());
        Ok(shared)
    }

    pub(crate) async fn offered(&self, group: &str, wait: Duration) -> Result<OfferedFolders, Failure> {
        let group = self.resolve(group)?;
        Ok(OfferedFolders { offered: self.device.offered_folders(group, wait).await? })
    }

    /// Gives a folder that was announced in a group a place.
    pub(crate) async fn place(
        &self,
        group: &str,
        folder: &str,
        request: PlaceRequest,
    ) -> Result<FolderStatus, Failure> {
        let group = self.resolve(group)?;
        let folder = folder.parse().map_err(|_| Failure::usage(format!("{folder} is no id of a folder")))?;
        let PlaceRequest { path, name, direction } = request;
        must_be_usable(&path)?;
        Ok(self.device.place_folder(group, folder, &path, FolderOptions { name, direction }).await?)
    }

    pub(crate) async fn pause(&self, folder: &str, paused: bool) -> Result<(), Failure> {
        Ok(self.device.pause_folder(self.folder(folder).await?, paused).await?)
    }

    /// Chooses the paths of a folder that this device takes; all where none is named.
    pub(crate) async fn select(&self, folder: &str, paths: Vec<String>) -> Result<FolderStatus, Failure> {
        Ok(self.device.select_paths(self.folder(folder).await?, &paths).await?)
    }

    pub(crate) async fn rescan(&self, folder: &str) -> Result<FolderStatus, Failure> {
        Ok(self.device.rescan_folder(self.folder(folder).await?).await?)
    }

    pub(crate) async fn leave(&self, folder: &str) -> Result<(), Failure> {
        Ok(self.device.leave_folder(self.folder(folder).await?).await?)
    }

    pub(crate) async fn versions(&self, folder: &str, path: &str) -> Result<Versions, Failure> {
        Ok(Versions { versions: self.device.versions(self.folder(folder).await?, path).await? })
    }

    pub(crate) async fn restore(&self, folder: &str, request: RestoreRequest) -> Result<Restored, Failure> {
        let RestoreRequest { path, version, to } = request;
        Ok(Restored { path: self.device.restore(self.folder(folder).await?, &path, &version, to).await? })
    }

    /// Applies a mass change that is held back.
    pub(crate) async fn confirm(&self, folder: &str) -> Result<(), Failure> {
        Ok(self.device.confirm_folder(self.folder(folder).await?).await?)
    }

    /// Takes a mass change back that is held back.
    pub(crate) async fn undo(&self, folder: &str) -> Result<Undone, Failure> {
        Ok(Undone { paths: self.device.undo_folder(self.folder(folder).await?).await? })
    }

    pub(crate) async fn limit_rate(&self, bytes_per_second: Option<u64>) -> Result<(), Failure> {
        Ok(self.device.limit_rate(bytes_per_second).await?)
    }

    pub(crate) async fn add_relay(&self, group: &str, url: &str) -> Result<(), Failure> {
        Ok(self.device.add_relay(url, self.resolve_some(group)?).await?)
    }

    pub(crate) async fn remove_relay(&self, group: &str, url: &str) -> Result<(), Failure> {
        Ok(self.device.remove_relay(url, self.resolve_some(group)?).await?)
    }

    pub(crate) async fn set_wake(&self, url: Option<&str>) -> Result<(), Failure> {
        Ok(self.device.set_wake(url).await?)
    }

    pub(crate) async fn relays(&self) -> Result<HomeRelays, Failure> {
        let relays = self.device.relays().await?.into_iter();
        let relays = relays.map(|relay| HomeRelay { url: relay.url, group: relay.group.map(|id| id.to_string()) });
        Ok(HomeRelays { relays: relays.collect(), wake: self.device.wake() })
    }

    pub(crate) async fn members(&self, group: &str) -> Result<Members, Failure> {
        Ok(Members { members: self.device.client(self.resolve(group)?)?.members().await? })
    }

    pub(crate) async fn remove_member(&self, group: &str, member: &str, approve: bool) -> Result<Removed, Failure> {
        let client = self.device.client(self.resolve(group)?)?;
        Ok(if approve { client.approve_removal(member).await? } else { client.remove_member(member).await? })
    }

    pub(crate) async fn rotate(&self, group: &str) -> Result<Rotated, Failure> {
        Ok(Rotated { epoch: self.device.client(self.resolve(group)?)?.rotate().await? })
    }

    pub(crate) async fn devices(&self) -> Result<Devices, Failure> {
        Ok(Devices { devices: self.device.devices().await? })
    }

    pub(crate) async fn back_up(&self, path: &Path, passphrase: &str) -> Result<BackedUp, Failure> {
        must_be_usable(path)?;
        let sync_client::BackedUp { groups, bytes } = self.device.back_up(path, passphrase).await?;
        Ok(BackedUp { groups: groups.iter().map(GroupId::to_string).collect(), bytes })
    }

    pub(crate) async fn recover(&self, path: &Path, passphrase: &str) -> Result<Recovered, Failure> {
        let sync_client::Recovered { name, groups, here } = self.device.recover(path, passphrase).await?;
        self.groups_changed.send_replace(());
        let ids = |groups: &[GroupId]| groups.iter().map(GroupId::to_string).collect();
        Ok(Recovered { of: name, groups: ids(&groups), here: ids(&here) })
    }

    /// Opens a group that everyone who knows its passphrase belongs to.
    pub(crate) async fn open_passphrase_group(&self, name: &str, passphrase: &str) -> Result<String, Failure> {
        let group = self.device.open_passphrase_group(name, passphrase).await?;
        self.groups_changed.send_replace(());
        Ok(group.to_string())
    }

    /// Closes the home; requests that outlive the server fail.
    pub(crate) async fn close(&self) {
        self.invites.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.device.clone().close().await;
    }

    fn client(&self, group: &str) -> Result<SyncClient, Failure> {
        Ok(self.device.client(self.resolve(group)?)?)
    }

    /// The folder whose id begins with these digits.
    async fn folder(&self, prefix: &str) -> Result<FolderId, Failure> {
        let folders = self.device.folders().await?;
        let id = &crate::select::by_id(&folders, prefix)?.id;
        id.parse().map_err(|_| Failure::new("unknown-folder", format!("{id} is no id of a folder")))
    }

    /// The group whose id begins with these digits; none for none.
    fn resolve_some(&self, prefix: &str) -> Result<Option<GroupId>, Failure> {
        if prefix.is_empty() { Ok(None) } else { self.resolve(prefix).map(Some) }
    }

    /// The group whose id begins with these digits; the only one for none.
    fn resolve(&self, prefix: &str) -> Result<GroupId, Failure> {
        select(&self.device.groups(), prefix)
    }
}

fn in_words(step: &JoinProgress) -> String {
    match step {
        JoinProgress::Looking => "looking for the device that made the invite".to_owned(),
        JoinProgress::Found { by } => format!("found it by {by}"),
        JoinProgress::Connected => "connected to it".to_owned(),
        JoinProgress::Joined { name, .. } => format!("let in by {}", terminal::clean(name)),
        _ => "going on".to_owned(),
    }
}

fn select(groups: &[GroupId], prefix: &str) -> Result<GroupId, Failure> {
    let named: Vec<_> = groups.iter().filter(|group| group.to_string().starts_with(prefix)).collect();
    match named[..] {
        [group] => Ok(*group),
        [] if groups.is_empty() => Err(sync_client::ClientError::NoGroup.into()),
        [] => {
            let message = format!("this home has no group {prefix}; `syncshell status` lists what it has");
            Err(Failure::new("unknown-group", message))
        }
        _ if prefix.is_empty() => Err(sync_client::ClientError::SeveralGroups(groups.len()).into()),
        _ => {
            Err(Failure::new("several-groups", format!("{} groups begin with {prefix}; name more digits", named.len())))
        }
    }
}

/// The engine needs a path that means the same to every process, and programs one that is text.
fn must_be_usable(path: &Path) -> Result<(), Failure> {
    if !path.is_absolute() {
        return Err(Failure::usage(format!("the path {} is not absolute", path.display())));
    }
    if path.to_str().is_none() {
        return Err(Failure::usage(format!("the path {} is no Unicode text; rename the directory", path.display())));
    }
    Ok(())
}

/// What happens from now on.
#[derive(Debug)]
pub(crate) struct Events {
    lines: mpsc::Receiver<EventLine>,
    #[expect(dead_code, reason = "tells until dropped")]
    teller: AbortOnDropHandle<()>,
}

impl Events {
    /// The next event; none once the home is closed. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<EventLine> {
        self.lines.recv().await
    }
}

/// Gathers what happens for one reader.
struct Teller {
    device: Device,
    only: Option<GroupId>,
    sender: mpsc::Sender<EventLine>,
    read: BTreeSet<GroupId>,
    readers: JoinSet<()>,
}

impl Teller {
    /// Reads along in the groups there are and were not yet read.
    fn subscribe(&mut self) -> Result<(), Failure> {
        for group in self.device.groups() {
            if self.only.is_some_and(|only| only != group) || !self.read.insert(group) {
                continue;
            }
            let mut events = self.device.client(group)?.subscribe();
            let sender = self.sender.clone();
            let group = group.to_string();
            self.readers.spawn(async move {
                while let Some(event) = events.next().await {
                    // it says no more than to look, which is done at every tick
                    if let sync_client::Event::FolderChanged { .. } = event {
                        continue;
                    }
                    if sender.send(EventLine { group: group.clone(), event: event.into() }).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(())
    }

    async fn folders(&self) -> Result<BTreeMap<String, FolderStatus>, Failure> {
        let only = self.only.map(|group| group.to_string());
        let folders = self.device.folders().await?.into_iter();
        let wanted = folders.filter(|folder| only.as_ref().is_none_or(|only| *only == folder.group));
        Ok(wanted.map(|folder| (folder.id.clone(), folder)).collect())
    }

    /// Tells until the home is closed or the reader has gone.
    async fn tell(mut self, mut changed: watch::Receiver<()>, mut known: BTreeMap<String, FolderStatus>) {
        let mut ticks = tokio::time::interval(FOLDER_TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Ok(()) = changed.changed() => if self.subscribe().is_err() { return },
                Some(_) = self.readers.join_next() => return,
                _ = ticks.tick() => {
                    let Ok(now) = self.folders().await else { return };
                    for line in differences(&known, &now) {
                        if self.sender.send(line).await.is_err() {
                            return;
                        }
                    }
                    known = now;
                }
            }
        }
    }
}

/// What to tell of the folders.
fn differences(before: &BTreeMap<String, FolderStatus>, now: &BTreeMap<String, FolderStatus>) -> Vec<EventLine> {
    let changed = now.values().filter(|folder| before.get(&folder.id) != Some(folder));
    let changed = changed.map(|folder| EventLine {
        group: folder.group.clone(),
        event: Event::Folder { folder: Box::new(folder.clone()) },
    });
    let left = before.values().filter(|folder| !now.contains_key(&folder.id));
    let left = left.map(|folder| EventLine {
        group: folder.group.clone(),
        event: Event::FolderLeft { folder: folder.id.clone() },
    });
    changed.chain(left).collect()
}

impl From<sync_client::Event> for Event {
    fn from(event: sync_client::Event) -> Self {
        use sync_client::Event as From;

        match event {
            From::Connected { replica, name, max_cursor, pending } => {
                Self::Connected { replica: replica.to_string(), name, max_cursor: max_cursor.0, pending }
            }
            From::Disconnected { replica, name, reason } => {
                Self::Disconnected { replica: replica.to_string(), name, reason }
            }
            From::BlobAvailable { blob_id, cursor, sender } => {
                Self::BlobAvailable { blob_id: blob_id.to_string(), cursor: cursor.0, sender: sender.to_string() }
            }
            From::Joined { name, author } => Self::Joined { name, author: author.to_string() },
            From::FolderConflict { folder, path } => Self::FolderConflict { folder: folder.to_string(), path },
            From::Error { code, message } => Self::Error { code, message },
            From::Lagged { missed } => Self::Lagged { missed },
            _ => Self::Unknown,
        }
    }
}

impl From<sync_client::InviteOutcome> for Outcome {
    fn from(outcome: sync_client::InviteOutcome) -> Self {
        use sync_client::InviteOutcome as From;

        match outcome {
            From::Joined { name, author } => Self::Joined { name, author: author.to_string() },
            From::Expired => Self::Expired,
            // nobody joins by it any more, however a later version puts it
            _ => Self::Revoked,
        }
    }
}

fn unknown_role(name: &str) -> Failure {
    Failure::new("unknown-role", format!("{name} is no role; there are admin, member, read-only and guest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(first: u8) -> GroupId {
        GroupId([first; 32])
    }

    #[test]
    fn a_group_is_found_by_its_first_digits() {
        let code =
            |groups: &[GroupId], prefix: &str| select(groups, prefix).map_err(|failure| failure.code.into_owned());
        let groups = [group(0xab), group(0xac)];
        assert_eq!(code(&groups, "ab"), Ok(groups[0]));
        assert_eq!(code(&groups, &groups[1].to_string()), Ok(groups[1]));
        assert_eq!(code(&groups, "a"), Err("several-groups".to_owned()));
        assert_eq!(code(&groups, ""), Err("several-groups".to_owned()));
        assert_eq!(code(&groups, "b"), Err("unknown-group".to_owned()));
        assert_eq!(code(&groups[..1], ""), Ok(groups[0]));
        assert_eq!(code(&[], ""), Err("no-group".to_owned()));
        assert_eq!(code(&[], "ab"), Err("no-group".to_owned()));
    }
}
