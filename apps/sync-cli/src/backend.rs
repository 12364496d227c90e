//! A home to work with: opened by this process, or served by another.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sync_client::folders::FolderStatus;
use sync_client::{Device, Removed};

use crate::api::client::{ApiClient, Lines};
use crate::api::loopback::Loopback;
use crate::api::server::Server;
use crate::api::{
    self, BackedUp, Devices, EventLine, Folders, Handed, HomeRelays, Invite, Joined, Members, OfferedFolders, Outcome,
    Overview, Page, PlaceRequest, Pushed, RestoreRequest, Restored, Rotated, Versions,
};
use crate::cli::Global;
use crate::exit::Failure;
use crate::service::{self, Service};

/// What this process wants of a home that no other serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Its data, without the network.
    Offline,
    /// Its data and its peers, for a moment.
    Online,
    /// The same for long, so that other commands come here.
    Serve,
}

/// A home to work with.
#[derive(Debug)]
pub(crate) enum Backend {
    /// Open in this process.
    Local(Local),
    /// Served by another.
    Remote(ApiClient),
}

/// A home open in this process.
#[derive(Debug)]
pub(crate) struct Local {
    service: Arc<Service>,
    server: Option<Server>,
}

impl Backend {
    /// Goes to whoever serves the home, or opens it.
    pub(crate) async fn open(global: &Global, mode: Mode) -> Result<Self, Failure> {
        let home = global.home()?;
        if let Some(client) = find_server(global, &home).await? {
            return Ok(Self::Remote(client));
        }
        match Local::open(global, &home, mode).await {
            // whoever was opening the home serves it by now, or has been at work for some seconds
            Err(failure) if failure.code == "busy" => {
                find_server(global, &home).await?.map(Self::Remote).ok_or(failure)
            }
            opened => Ok(Self::Local(opened?)),
        }
    }

    /// Waits until the process is asked to end through the local API; for ever where another serves.
    pub(crate) async fn quit(&self) {
        match self {
            Self::Local(local) => local.service.quit().cancelled().await,
            Self::Remote(_) => std::future::pending().await,
        }
    }

    pub(crate) async fn overview(&self) -> Result<Overview, Failure> {
        match self {
            Self::Local(local) => local.service.overview().await,
            Self::Remote(client) => client.overview().await,
        }
    }

    pub(crate) async fn push(&self, group: &str, blob_id: &str, bytes: Vec<u8>) -> Result<Pushed, Failure> {
        match self {
            Self::Local(local) => local.service.push(group, Some(blob_id), bytes).await,
            Self::Remote(client) => client.push(group, blob_id, bytes).await,
        }
    }

    pub(crate) async fn pull(&self, group: &str, after: u64, limit: usize) -> Result<Page, Failure> {
        match self {
            Self::Local(local) => local.service.pull(group, after, limit).await,
            Self::Remote(client) => client.pull(group, after, limit).await,
        }
    }

    pub(crate) async fn events(&self, group: &str) -> Result<Events, Failure> {
        match self {
            Self::Local(local) => local.service.events(group).await.map(Events::Local),
            Self::Remote(client) => client.events(group).await.map(Events::Remote),
        }
    }

    pub(crate) async fn handed(&self, group: &str, cursor: u64, wait: Duration) -> Result<Handed, Failure> {
        match self {
            Self::Local(local) => local.service.handed(group, cursor, wait).await,
            Self::Remote(client) => client.handed(group, cursor, wait).await,
        }
    }

    pub(crate) async fn invite(
        &self,
        group: &str,
        expires_in: Option<Duration>,
        relays: &[String],
        role: Option<&str>,
    ) -> Result<Invite, Failure> {
        match self {
            Self::Local(local) => local.service.invite(group, expires_in, relays, role).await,
            Self::Remote(client) => client.invite(group, expires_in, relays, role).await,
        }
    }

    pub(crate) async fn outcome(&self, id: &str) -> Result<Outcome, Failure> {
        match self {
            Self::Local(local) => local.service.outcome(id).await,
            Self::Remote(client) => client.outcome(id).await,
        }
    }

    pub(crate) async fn revoke(&self, invite: &str) -> Result<(), Failure> {
        match self {
            Self::Local(local) => local.service.revoke(invite).await,
            Self::Remote(client) => client.revoke(invite).await,
        }
    }

    pub(crate) async fn join(
        &self,
        invite: &str,
        relays: &[String],
        progress: impl Fn(String) + Send + Sync,
    ) -> Result<Joined, Failure> {
        match self {
            Self::Local(local) => local.service.join(invite, relays, progress).await,
            Self::Remote(client) => client.join(invite, relays, progress).await,
        }
    }

    pub(crate) async fn folders(&self) -> Result<Folders, Failure> {
        match self {
            Self::Local(local) => local.service.folders().await,
            Self::Remote(client) => client.folders().await,
        }
    }

    pub(crate) async fn share(&self, group: &str, request: PlaceRequest) -> Result<FolderStatus, Failure> {
        match self {
            Self::Local(local) => local.service.share(group, request).await,
            Self::Remote(client) => client.share(group, request).await,
        }
    }

    pub(crate) async fn offered(&self, group: &str, wait: Duration) -> Result<OfferedFolders, Failure> {
        match self {
            Self::Local(local) => local.service.offered(group, wait).await,
            Self::Remote(client) => client.offered(group, wait).await,
        }
    }

    pub(crate) async fn place(
        &self,
        group: &str,
        folder: &str,
        request: PlaceRequest,
    ) -> Result<FolderStatus, Failure> {
        match self {
            Self::Local(local) => local.service.place(group, folder, request).await,
            Self::Remote(client) => client.place(group, folder, request).await,
        }
    }

    pub(crate) async fn pause(&self, folder: &str, paused: bool) -> Result<(), Failure> {
        match self {
            Self::Local(local) => local.service.pause(folder, paused).await,
            Self::Remote(client) => client.pause(folder, paused).await,
        }
    }

    pub(crate) async fn select(&self, folder: &str, paths: Vec<String>) -> Result<FolderStatus, Failure> {
        match self {
            Self::Local(local) => local.service.select(folder, paths).await,
            Self::Remote(client) => client.select(folder, paths).await,
        }
    }

    pub(crate) async fn rescan(&self, folder: &str) -> Result<FolderStatus, Failure> {
        match self {
            Self::Local(local) => local.service.rescan(folder).await,
            Self::Remote(client) => client.rescan(folder).await,
        }
    }

    pub(crate) async fn leave(&self, folder: &str) -> Result<(), Failure> {
        match self {
            Self::Local(local) => local.service.leave(folder).await,
            Self::Remote(client) => client.leave(folder).await,
        }
    }

    pub(crate) async fn versions(&self, folder: &str, path: &str) -> Result<Versions, Failure> {
        match self {
            Self::Local(local) => local.service.versions(folder, path).await,
            Self::Remote(client) => client.versions(folder, path).await,
        }
    }

    pub(crate) async fn restore(&self, folder: &str, request: RestoreRequest) -> Result<Restored, Failure> {
        match self {
            Self::Local(local) => local.service.restore(folder, request).await,
            Self::Remote(client) => client.restore(folder, request).await,
        }
    }

    pub(crate) async fn add_relay(&self, group: &str, url: &str) -> Result<(), Failure> {
        match self {
            Self::Local(local) => local.service.add_relay(group, url).await,
            Self::Remote(client) => client.add_relay(group, url).await,
        }
    }

    pub(crate) async fn remove_relay(&self, group: &str, url: &str) -> Result<(), Failure> {
        match self {
            Self::Local(local) => local.service.remove_relay(group, url).await,
            Self::Remote(client) => client.remove_relay(group, url).await,
        }
    }

    pub(crate) async fn set_wake(&self, url: Option<&str>) -> Result<(), Failure> {
        match self {
            Self::Local(local) => local.service.set_wake(url).await,
            Self::Remote(client) => client.set_wake(url).await,
        }
    }

    pub(crate) async fn relays(&self) -> Result<HomeRelays, Failure> {
        match self {
            Self::Local(local) => local.service.relays().await,
            Self::Remote(client) => client.relays().await,
        }
    }

    pub(crate) async fn back_up(&self, file: &Path, passphrase: &str) -> Result<BackedUp, Failure> {
        match self {
            Self::Local(local) => local.service.back_up(file, passphrase).await,
            Self::Remote(client) => client.back_up(file, passphrase).await,
        }
    }

    pub(crate) async fn members(&self, group: &str) -> Result<Members, Failure> {
        match self {
            Self::Local(local) => local.service.members(group).await,
            Self::Remote(client) => client.members(group).await,
        }
    }

    pub(crate) async fn remove_member(&self, group: &str, member: &str, approve: bool) -> Result<Removed, Failure> {
        match self {
            Self::Local(local) => local.service.remove_member(group, member, approve).await,
            Self::Remote(client) => client.remove_member(group, member, approve).await,
        }
    }

    pub(crate) async fn rotate(&self, group: &str) -> Result<Rotated, Failure> {
        match self {
            Self::Local(local) => local.service.rotate(group).await,
            Self::Remote(client) => client.rotate(group).await,
        }
    }

    pub(crate) async fn devices(&self) -> Result<Devices, Failure> {
        match self {
            Self::Local(local) => local.service.devices().await,
            Self::Remote(client) => client.devices().await,
        }
    }

    /// Whether other commands come here while this process goes on.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// Lets go of the home.
    pub(crate) async fn close(self) {
        if let Self::Local(local) = self {
            local.close().await;
        }
    }
}

impl Local {
    /// Opens a home that nobody serves.
    pub(crate) async fn open(global: &Global, home: &Path, mode: Mode) -> Result<Self, Failure> {
        Self::open_with(global, home, mode, None).await
    }

    /// The same, serving on a port of the loopback network as well.
    pub(crate) async fn open_with(
        global: &Global,
        home: &Path,
        mode: Mode,
        api_port: Option<u16>,
    ) -> Result<Self, Failure> {
        let device = Device::open(global.config(mode != Mode::Offline)?).await?;
        let service = Arc::new(Service::new(home.display().to_string(), device, mode == Mode::Serve));
        let mut local = Self { service, server: None };
        if mode == Mode::Serve {
            match serve(global, home, &local.service, api_port).await {
                Ok(server) => local.server = Some(server),
                Err(failure) => {
                    local.close().await;
                    return Err(failure);
                }
            }
        }
        Ok(local)
    }

    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    /// Stops serving and closes the home.
    pub(crate) async fn close(self) {
        if let Some(server) = self.server {
            server.stop().await;
        }
        self.service.close().await;
    }
}

/// Whoever serves a home.
pub(crate) async fn find_server(global: &Global, home: &Path) -> Result<Option<ApiClient>, Failure> {
    let address = api::socket_path(home, &global.config(true)?.network)?;
    ApiClient::find(&address).await
}

async fn serve(global: &Global, home: &Path, service: &Arc<Service>, api_port: Option<u16>) -> Result<Server, Failure> {
    let address = api::socket_path(home, &global.config(true)?.network)?;
    let loopback = match api_port {
        Some(port) => Some(Loopback::open(home, port).await?),
        None => None,
    };
    Server::start(Arc::clone(service), &address, loopback)
}

/// What happens from now on.
#[derive(Debug)]
pub(crate) enum Events {
    Local(service::Events),
    Remote(Lines<EventLine>),
}

impl Events {
    /// The next event; none once the home is closed. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<EventLine>, Failure> {
        match self {
            Self::Local(events) => Ok(events.next().await),
            Self::Remote(events) => events.next().await,
        }
    }
}
