//! The asking end of the local API.

use std::path::Path;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sync_client::Removed;
use sync_client::folders::FolderStatus;
use tokio_util::task::AbortOnDropHandle;

use super::socket::{self, Address};
use super::{
    BackedUp, BackupRequest, Devices, EventLine, Folders, Handed, HomeRelays, Invite, InviteRequest, JoinLine,
    JoinRequest, Joined, Members, OfferedFolders, Outcome, Overview, Page, PlaceRequest, Pushed, RelayRequest,
    RemoveRequest, RestoreRequest, Restored, RevokeRequest, Rotated, SelectRequest, Undone, VERSION, VERSION_HEADER,
    Versions, VersionsRequest, WakeRequest,
};
use crate::exit::Failure;

/// How long an answer may take beyond what was asked for: a slow disk, never a hung process for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// An invite's outcome is known when it expires, at the latest after ten minutes.
const OUTCOME_PATIENCE: Duration = Duration::from_secs(11 * 60);

/// Reading a whole tree may take hours; the one who serves may be asked meanwhile how far it is.
const SCAN_PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// Bytes of a whole answer: a page of blobs in base64, which ends somewhat above its target, with room.
const MAX_ANSWER: usize = 48 << 20;

/// Bytes of one line of a stream: a folder with two hundred of the longest paths, escaped, and room.
const MAX_LINE: usize = 8 << 20;

/// A home that another process serves.
#[derive(Debug, Clone)]
pub(crate) struct ApiClient {
    address: Address,
}

impl ApiClient {
    /// The one who serves at this address; none if nobody does.
    pub(crate) async fn find(address: &Address) -> Result<Option<Self>, Failure> {
        let found = socket::connect(address).await.map_err(Failure::io("cannot reach the local API"))?;
        Ok(found.map(|_| Self { address: address.clone() }))
    }

    pub(crate) async fn overview(&self) -> Result<Overview, Failure> {
        self.ask(Method::GET, "/v1/status", Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn push(&self, group: &str, blob_id: &str, bytes: Vec<u8>) -> Result<Pushed, Failure> {
        let path = format!("/v1/push?group={group}&blob_id={blob_id}");
        self.ask(Method::POST, &path, bytes.into(), PATIENCE).await
    }

    pub(crate) async fn pull(&self, group: &str, after: u64, limit: usize) -> Result<Page, Failure> {
        let path = format!("/v1/pull?group={group}&after={after}&limit={limit}");
        self.ask(Method::GET, &path, Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn events(&self, group: &str) -> Result<Lines<EventLine>, Failure> {
        let path = format!("/v1/events?group={group}");
        self.stream(Method::GET, &path, Bytes::new()).await
    }

    pub(crate) async fn handed(&self, group: &str, cursor: u64, wait: Duration) -> Result<Handed, Failure> {
        let path = format!("/v1/handed?group={group}&cursor={cursor}&wait_ms={}", wait.as_millis());
        self.ask(Method::GET, &path, Bytes::new(), wait + PATIENCE).await
    }

    pub(crate) async fn invite(
        &self,
        group: &str,
        expires_in: Option<Duration>,
        relays: &[String],
        role: Option<&str>,
    ) -> Result<Invite, Failure> {
        let expires = expires_in.map(|after| format!("&expires_in={}", after.as_secs())).unwrap_or_default();
        let body = json(&InviteRequest { relays: relays.to_vec(), role: role.map(str::to_owned) })?;
        self.ask(Method::POST, &format!("/v1/invites?group={group}{expires}"), body, PATIENCE).await
    }

    pub(crate) async fn outcome(&self, id: &str) -> Result<Outcome, Failure> {
        self.ask(Method::GET, &format!("/v1/invites/{id}/outcome"), Bytes::new(), OUTCOME_PATIENCE).await
    }

    pub(crate) async fn revoke(&self, invite: &str) -> Result<(), Failure> {
        let body = json(&RevokeRequest { invite: invite.to_owned() })?;
        self.done("/v1/invites/revoke", body).await
    }

    /// Joins a group; `progress` is told each step.
    pub(crate) async fn join(
        &self,
        invite: &str,
        relays: &[String],
        mut progress: impl FnMut(String),
    ) -> Result<Joined, Failure> {
        let body = json(&JoinRequest { invite: invite.to_owned(), relays: relays.to_vec() })?;
        let mut lines = self.stream(Method::POST, "/v1/join", body).await?;
        while let Some(line) = lines.next().await? {
            match line {
                JoinLine::Progress(step) => progress(step),
                JoinLine::Joined(joined) => return Ok(joined),
                JoinLine::Error(failure) => return Err(failure),
            }
        }
        Err(Failure::interrupted("the join has no result"))
    }

    pub(crate) async fn folders(&self) -> Result<Folders, Failure> {
        self.ask(Method::GET, "/v1/folders", Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn share(&self, group: &str, request: PlaceRequest) -> Result<FolderStatus, Failure> {
        self.ask(Method::POST, &format!("/v1/folders?group={group}"), json(&request)?, PATIENCE).await
    }

    pub(crate) async fn offered(&self, group: &str, wait: Duration) -> Result<OfferedFolders, Failure> {
        let path = format!("/v1/folders/offered?group={group}&wait_ms={}", wait.as_millis());
        self.ask(Method::GET, &path, Bytes::new(), wait + PATIENCE).await
    }

    pub(crate) async fn place(
        &self,
        group: &str,
        folder: &str,
        request: PlaceRequest,
    ) -> Result<FolderStatus, Failure> {
        let path = format!("/v1/folders/{folder}/place?group={group}");
        self.ask(Method::POST, &path, json(&request)?, SCAN_PATIENCE).await
    }

    pub(crate) async fn pause(&self, folder: &str, paused: bool) -> Result<(), Failure> {
        let verb = if paused { "pause" } else { "resume" };
        self.done(&format!("/v1/folders/{folder}/{verb}"), Bytes::new()).await
    }

    pub(crate) async fn select(&self, folder: &str, paths: Vec<String>) -> Result<FolderStatus, Failure> {
        let body = json(&SelectRequest { paths })?;
        self.ask(Method::POST, &format!("/v1/folders/{folder}/select"), body, SCAN_PATIENCE).await
    }

    pub(crate) async fn rescan(&self, folder: &str) -> Result<FolderStatus, Failure> {
        self.ask(Method::POST, &format!("/v1/folders/{folder}/rescan"), Bytes::new(), SCAN_PATIENCE).await
    }

    pub(crate) async fn leave(&self, folder: &str) -> Result<(), Failure> {
        self.done(&format!("/v1/folders/{folder}/leave"), Bytes::new()).await
    }

    pub(crate) async fn confirm(&self, folder: &str) -> Result<(), Failure> {
        self.done(&format!("/v1/folders/{folder}/confirm"), Bytes::new()).await
    }

    pub(crate) async fn undo(&self, folder: &str) -> Result<Undone, Failure> {
        self.ask(Method::POST, &format!("/v1/folders/{folder}/undo"), Bytes::new(), SCAN_PATIENCE).await
    }

    pub(crate) async fn versions(&self, folder: &str, path: &str) -> Result<Versions, Failure> {
        let body = json(&VersionsRequest { path: path.to_owned() })?;
        self.ask(Method::POST, &format!("/v1/folders/{folder}/versions"), body, PATIENCE).await
    }

    pub(crate) async fn restore(&self, folder: &str, request: RestoreRequest) -> Result<Restored, Failure> {
        self.ask(Method::POST, &format!("/v1/folders/{folder}/restore"), json(&request)?, SCAN_PATIENCE).await
    }

    pub(crate) async fn members(&self, group: &str) -> Result<Members, Failure> {
        self.ask(Method::GET, &format!("/v1/members?group={group}"), Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn remove_member(&self, group: &str, member: &str, approve: bool) -> Result<Removed, Failure> {
        let body = json(&RemoveRequest { member: member.to_owned(), approve })?;
        self.ask(Method::POST, &format!("/v1/members/remove?group={group}"), body, PATIENCE).await
    }

    pub(crate) async fn rotate(&self, group: &str) -> Result<Rotated, Failure> {
        self.ask(Method::POST, &format!("/v1/rotate?group={group}"), Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn devices(&self) -> Result<Devices, Failure> {
        self.ask(Method::GET, "/v1/devices", Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn add_relay(&self, group: &str, url: &str) -> Result<(), Failure> {
        self.done(&format!("/v1/relays?group={group}"), json(&RelayRequest { url: url.to_owned() })?).await
    }

    pub(crate) async fn remove_relay(&self, group: &str, url: &str) -> Result<(), Failure> {
        self.done(&format!("/v1/relays/remove?group={group}"), json(&RelayRequest { url: url.to_owned() })?).await
    }

    pub(crate) async fn set_wake(&self, url: Option<&str>) -> Result<(), Failure> {
        self.done("/v1/relays/wake", json(&WakeRequest { url: url.map(str::to_owned) })?).await
    }

    pub(crate) async fn relays(&self) -> Result<HomeRelays, Failure> {
        self.ask(Method::GET, "/v1/relays", Bytes::new(), PATIENCE).await
    }

    pub(crate) async fn back_up(&self, file: &Path, passphrase: &str) -> Result<BackedUp, Failure> {
        let request = BackupRequest { path: file.to_owned(), passphrase: passphrase.to_owned() };
        self.ask(Method::POST, "/v1/backup", json(&request)?, SCAN_PATIENCE).await
    }

    /// Ends the process that serves.
    pub(crate) async fn stop(&self) -> Result<(), Failure> {
        self.done("/v1/stop", Bytes::new()).await
    }

    /// Asks for something that has no answer but that it is done.
    async fn done(&self, path: &str, body: Bytes) -> Result<(), Failure> {
        self.ask::<serde_json::Value>(Method::POST, path, body, PATIENCE).await.map(drop)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<T, Failure> {
        let answer = async {
            let (response, _connection) = self.send(method, path, body).await?;
            whole(response.into_body()).await
        };
        let bytes = tokio::time::timeout(patience, answer).await.map_err(|_| {
            let message = format!("the process that serves this home has not answered for {} s", patience.as_secs());
            Failure::new("busy", message + "; end it and try again")
        })??;
        parse(&bytes)
    }

    async fn stream<T>(&self, method: Method, path: &str, body: Bytes) -> Result<Lines<T>, Failure> {
        let (response, connection) = self.send(method, path, body).await?;
        let lines = Lines { body: response.into_body(), buffer: BytesMut::new(), connection, what: Default::default() };
        Ok(lines)
    }

    /// Sends a request and returns the answer if it is no refusal, with the task that reads it.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), Failure> {
        let stream = socket::connect(&self.address)
            .await
            .map_err(Failure::interrupted)?
            .ok_or_else(|| Failure::interrupted("nobody serves it any more"))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(Failure::interrupted)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            // the request sees the same error
            let _ = connection.await;
        }));
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .header(VERSION_HEADER, VERSION)
            .body(Full::new(body))
            .map_err(|error| Failure::usage(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(Failure::interrupted)?;
        if response.status().is_success() {
            return Ok((response, connection));
        }

        let status = response.status();
        let theirs =
            response.headers().get(VERSION_HEADER).and_then(|version| version.to_str().ok()).map(str::to_owned);
        if status == StatusCode::UPGRADE_REQUIRED {
            let theirs = theirs.as_deref().unwrap_or("unknown");
            return Err(super::server::other_version(theirs, Some(VERSION)));
        }
        let bytes = whole(response.into_body()).await?;
        Err(parse(&bytes).unwrap_or_else(|_| Failure::interrupted(status)))
    }
}

/// JSON values, one a line, as they come.
#[derive(Debug)]
pub(crate) struct Lines<T> {
    body: Incoming,
    buffer: BytesMut,
    #[expect(dead_code, reason = "reads the body until dropped")]
    connection: AbortOnDropHandle<()>,
    what: std::marker::PhantomData<T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next value; none when the server has ended the stream. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<T>, Failure> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                return parse(&line).map(Some);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(Failure::new("io", "the local API sent a line without end"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Some(Err(error)) => return Err(Failure::interrupted(error)),
                None => return Ok(None),
            }
        }
    }
}

async fn whole(body: Incoming) -> Result<Bytes, Failure> {
    let limited = http_body_util::Limited::new(body, MAX_ANSWER);
    Ok(limited.collect().await.map_err(Failure::interrupted)?.to_bytes())
}

fn json(value: &impl Serialize) -> Result<Bytes, Failure> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| Failure::usage(error.to_string()))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|error| Failure::new("io", format!("the local API sent no answer: {error}")))
}
