//! The serving end of the local API: a thin shell around [`Service`].

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{BytesRejection, JsonRejection, QueryRejection};
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::handler::Handler;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use sync_client::Removed;
use sync_client::folders::FolderStatus;
use sync_types::bounds::MAX_APP_BYTES;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::loopback::{self, Guard, Loopback};
use super::socket::{self, Address};
use super::{
    BackedUp, BackupRequest, Devices, Folders, Handed, HomeRelays, Invite, InviteRequest, JoinLine, JoinRequest,
    Members, OfferedFolders, Outcome, Overview, PAGE_BLOBS, Page, PlaceRequest, Pushed, RateRequest, RelayRequest,
    RemoveRequest, RestoreRequest, Restored, RevokeRequest, Rotated, SelectRequest, Undone, VERSION, VERSION_HEADER,
    Versions, VersionsRequest, WakeRequest,
};
use crate::exit::Failure;
use crate::service::{Events, Service};

/// How long requests may go on once the process is to end; whoever waits longer is told to try again.
const DRAIN: Duration = Duration::from_secs(2);

/// Longest wait a request may ask for: an hour, after which the asker has probably gone.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// Steps of a join that wait for their reader; there are no more of them.
const JOIN_LINES: usize = 16;

/// Bytes a reader of events may send in one message: it has nothing to say.
const MAX_MESSAGE: usize = 4 << 10;

/// A home being served.
#[derive(Debug)]
pub(crate) struct Server {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<std::io::Result<()>>>,
    loopback: Option<Guard>,
}

impl Server {
    /// Serves a home whose lock this process holds: to its user, and on the loopback network if that was asked for.
    pub(crate) fn start(service: Arc<Service>, address: &Address, loopback: Option<Loopback>) -> Result<Self, Failure> {
        let listener = socket::bind(address).map_err(Failure::io("cannot serve the local API"))?;
        let stop = CancellationToken::new();
        if let Some(loopback) = &loopback {
            service.set_api(loopback.guard.address().to_owned());
        }
        let router = router(App { service, stop: stop.clone() });
        let stopped = || stop.clone().cancelled_owned();
        let guard = loopback.as_ref().map(|loopback| loopback.guard.clone());
        let mut tasks = Vec::new();
        if let Some(Loopback { listener, guard }) = loopback {
            let router = router.clone().layer(middleware::from_fn_with_state(guard, loopback::check));
            tasks.push(tokio::spawn(axum::serve(listener, router).with_graceful_shutdown(stopped()).into_future()));
        }
        tasks.push(tokio::spawn(axum::serve(listener, router).with_graceful_shutdown(stopped()).into_future()));
        Ok(Self { stop, tasks, loopback: guard })
    }

    /// Takes no more requests and waits a little for those under way.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        let give_up = tokio::time::Instant::now() + DRAIN;
        for mut task in self.tasks {
            if tokio::time::timeout_at(give_up, &mut task).await.is_err() {
                task.abort();
                let _ = task.await;
            }
        }
        if let Some(guard) = self.loopback {
            guard.forget();
        }
    }
}

#[derive(Debug, Clone)]
struct App {
    service: Arc<Service>,
    /// Ends what would never end by itself.
    stop: CancellationToken,
}

/// A route and what answers there.
struct Route {
    #[cfg_attr(not(test), expect(dead_code, reason = "compared with the description"))]
    method: &'static str,
    path: &'static str,
    handler: MethodRouter<App>,
}

fn reads<H: Handler<T, App>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route { method: "get", path, handler: get(handler) }
}

fn acts<H: Handler<T, App>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route { method: "post", path, handler: post(handler) }
}

/// Every route; `docs/openapi.json` describes the same.
fn routes() -> Vec<Route> {
    vec![
        reads("/v1/status", status),
        reads("/v1/devices", devices),
        reads("/v1/members", members),
        acts("/v1/members/remove", remove_member),
        acts("/v1/rotate", rotate),
        reads("/v1/events", events),
        acts("/v1/push", push.layer(DefaultBodyLimit::max(MAX_APP_BYTES))),
        reads("/v1/pull", pull),
        reads("/v1/handed", handed),
        acts("/v1/invites", invite),
        acts("/v1/invites/revoke", revoke),
        reads("/v1/invites/{id}/outcome", outcome),
        acts("/v1/join", join),
        reads("/v1/folders", folders),
        acts("/v1/folders", share),
        reads("/v1/folders/offered", offered),
        acts("/v1/folders/{folder}/place", place),
        acts("/v1/folders/{folder}/pause", pause),
        acts("/v1/folders/{folder}/resume", resume),
        acts("/v1/folders/{folder}/select", select),
        acts("/v1/folders/{folder}/rescan", rescan),
        acts("/v1/folders/{folder}/leave", leave),
        acts("/v1/folders/{folder}/confirm", confirm),
        acts("/v1/folders/{folder}/undo", undo),
        acts("/v1/folders/{folder}/versions", versions),
        acts("/v1/folders/{folder}/restore", restore),
        reads("/v1/relays", relays),
        acts("/v1/relays", add_relay),
        acts("/v1/relays/remove", remove_relay),
        acts("/v1/relays/wake", set_wake),
        acts("/v1/backup", back_up),
        acts("/v1/limit-rate", limit_rate),
        acts("/v1/stop", stop),
    ]
}

fn router(app: App) -> Router {
    routes()
        .into_iter()
        .fold(Router::new(), |router, Route { path, handler, .. }| router.route(path, handler))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_route)
        .layer(middleware::from_fn(same_version))
        .with_state(app)
}

/// A failure as an answer.
pub(super) struct Refusal(pub(super) Failure);

impl<F: Into<Failure>> From<F> for Refusal {
    fn from(failure: F) -> Self {
        Self(failure.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.kind().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self::usage(rejection.body_text())
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        Self::usage(rejection.body_text())
    }
}

impl From<BytesRejection> for Failure {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            return too_large();
        }
        Self::usage(rejection.body_text())
    }
}

/// More was given than one blob can hold; how much more is not read.
pub(crate) fn too_large() -> Failure {
    let message = format!(
        "this is more than {MAX_APP_BYTES} bytes, the most one blob can hold; split it up, or share it as a file"
    );
    Failure::new("too-large", message)
}

type Answer<T> = Result<Json<T>, Refusal>;

async fn same_version(request: Request, next: Next) -> Response {
    let theirs = request.headers().get(VERSION_HEADER);
    let mut response = if theirs.is_some_and(|version| version == VERSION) {
        next.run(request).await
    } else {
        let theirs = theirs.and_then(|version| version.to_str().ok());
        Refusal(other_version(VERSION, theirs)).into_response()
    };
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    response
}

/// Two versions do not talk to each other.
pub(crate) fn other_version(server: &str, client: Option<&str>) -> Failure {
    let message = match client {
        Some(client) => format!(
            "this home is served by version {server} of syncshell and this is version {client}; \
             end the other process, or use its version"
        ),
        None => format!("every request names its version in the header `{VERSION_HEADER}`, here {server}"),
    };
    Failure::new("other-version", message)
}

async fn unknown_route() -> Refusal {
    Refusal(Failure::new("not-found", "there is no such route; docs/local-api.md lists them"))
}

/// The group a request is about, by the first digits of its id; empty for the only one.
#[derive(Debug, Default, Deserialize)]
struct InGroup {
    #[serde(default)]
    group: String,
}

async fn status(State(app): State<App>) -> Answer<Overview> {
    Ok(Json(app.service.overview().await?))
}

#[derive(Debug, Deserialize)]
struct PushQuery {
    #[serde(default)]
    group: String,
    blob_id: Option<String>,
}

async fn push(
    State(app): State<App>,
    query: Result<Query<PushQuery>, QueryRejection>,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer<Pushed> {
    let Query(query) = query?;
    Ok(Json(app.service.push(&query.group, query.blob_id.as_deref(), bytes?.into()).await?))
}

#[derive(Debug, Deserialize)]
struct PullQuery {
    #[serde(default)]
    group: String,
    #[serde(default)]
    after: u64,
    limit: Option<usize>,
}

async fn pull(State(app): State<App>, query: Result<Query<PullQuery>, QueryRejection>) -> Answer<Page> {
    let Query(query) = query?;
    let limit = query.limit.unwrap_or(PAGE_BLOBS).min(PAGE_BLOBS);
    Ok(Json(app.service.pull(&query.group, query.after, limit).await?))
}

async fn events(
    State(app): State<App>,
    query: Result<Query<InGroup>, QueryRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    let events = app.service.events(&query?.group).await?;
    match upgrade {
        Ok(upgrade) => {
            let upgrade = upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
            Ok(upgrade.on_upgrade(move |socket| tell(events, socket, app.stop)))
        }
        // an ordinary request
        Err(
            WebSocketUpgradeRejection::InvalidConnectionHeader(_) | WebSocketUpgradeRejection::InvalidUpgradeHeader(_),
        ) => {
            let lines = stream::unfold(events, async |mut events| {
                let event = events.next().await?;
                Some((event, events))
            });
            Ok(json_lines(lines, &app))
        }
        Err(rejection) => Err(Failure::usage(rejection.body_text()).into()),
    }
}

/// Passes events on as one text message each, until either end or the server ends.
async fn tell(mut events: Events, mut socket: WebSocket, stop: CancellationToken) {
    loop {
        tokio::select! {
            line = events.next() => {
                let Some(line) = line else { break };
                let text = serde_json::to_string(&line).unwrap_or_default();
                if socket.send(Message::Text(text.into())).await.is_err() {
                    return;
                }
            }
            // pings are answered below this; whatever else is said is passed over
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
            () = stop.cancelled() => break,
        }
    }
    // it may have gone already
    let _ = socket.send(Message::Close(None)).await;
}

#[derive(Debug, Deserialize)]
struct HandedQuery {
    #[serde(default)]
    group: String,
    cursor: u64,
    #[serde(default)]
    wait_ms: u64,
}

async fn handed(State(app): State<App>, query: Result<Query<HandedQuery>, QueryRejection>) -> Answer<Handed> {
    let Query(query) = query?;
    let wait = Duration::from_millis(query.wait_ms).min(MAX_WAIT);
    app.unless_stopped(app.service.handed(&query.group, query.cursor, wait)).await
}

#[derive(Debug, Deserialize)]
struct InviteQuery {
    #[serde(default)]
    group: String,
    expires_in: Option<u64>,
}

async fn invite(
    State(app): State<App>,
    query: Result<Query<InviteQuery>, QueryRejection>,
    request: Result<Option<Json<InviteRequest>>, JsonRejection>,
) -> Answer<Invite> {
    let Query(query) = query?;
    let Json(InviteRequest { relays, role }) = request?.unwrap_or_default();
    let expires_in = query.expires_in.map(Duration::from_secs);
    Ok(Json(app.service.invite(&query.group, expires_in, &relays, role.as_deref()).await?))
}

async fn outcome(State(app): State<App>, Path(id): Path<String>) -> Answer<Outcome> {
    app.unless_stopped(app.service.outcome(&id)).await
}

async fn revoke(
    State(app): State<App>,
    request: Result<Json<RevokeRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    app.service.revoke(&request?.invite).await?;
    done()
}

async fn join(State(app): State<App>, request: Result<Json<JoinRequest>, JsonRejection>) -> Result<Response, Refusal> {
    let Json(JoinRequest { invite, relays }) = request?;
    let (lines, reader) = mpsc::channel(JOIN_LINES);
    let service = Arc::clone(&app.service);
    // ends with the stream, so that a joiner who goes away stops joining
    let task = AbortOnDropHandle::new(tokio::spawn(async move {
        let progress = lines.clone();
        let result =
            service.join(&invite, &relays, move |step| drop(progress.try_send(JoinLine::Progress(step)))).await;
        let last = match result {
            Ok(joined) => JoinLine::Joined(joined),
            Err(failure) => JoinLine::Error(failure),
        };
        // nobody reads any more
        let _ = lines.send(last).await;
    }));
    let lines = stream::unfold((reader, task), async |(mut reader, task)| {
        let line = reader.recv().await?;
        Some((line, (reader, task)))
    });
    Ok(json_lines(lines, &app))
}

async fn folders(State(app): State<App>) -> Answer<Folders> {
    Ok(Json(app.service.folders().await?))
}

async fn share(
    State(app): State<App>,
    query: Result<Query<InGroup>, QueryRejection>,
    request: Result<Json<PlaceRequest>, JsonRejection>,
) -> Answer<FolderStatus> {
    Ok(Json(app.service.share(&query?.group, request?.0).await?))
}

#[derive(Debug, Deserialize)]
struct OfferedQuery {
    #[serde(default)]
    group: String,
    #[serde(default)]
    wait_ms: u64,
}

async fn offered(State(app): State<App>, query: Result<Query<OfferedQuery>, QueryRejection>) -> Answer<OfferedFolders> {
    let Query(query) = query?;
    let wait = Duration::from_millis(query.wait_ms).min(MAX_WAIT);
    app.unless_stopped(app.service.offered(&query.group, wait)).await
}

async fn place(
    State(app): State<App>,
    Path(folder): Path<String>,
    query: Result<Query<InGroup>, QueryRejection>,
    request: Result<Json<PlaceRequest>, JsonRejection>,
) -> Answer<FolderStatus> {
    let (query, request) = (query?, request?.0);
    app.unless_stopped(app.service.place(&query.group, &folder, request)).await
}

async fn pause(State(app): State<App>, Path(folder): Path<String>) -> Answer<serde_json::Value> {
    app.service.pause(&folder, true).await?;
    done()
}

async fn resume(State(app): State<App>, Path(folder): Path<String>) -> Answer<serde_json::Value> {
    app.service.pause(&folder, false).await?;
    done()
}

async fn select(
    State(app): State<App>,
    Path(folder): Path<String>,
    request: Result<Json<SelectRequest>, JsonRejection>,
) -> Answer<FolderStatus> {
    Ok(Json(app.service.select(&folder, request?.0.paths).await?))
}

async fn rescan(State(app): State<App>, Path(folder): Path<String>) -> Answer<FolderStatus> {
    app.unless_stopped(app.service.rescan(&folder)).await
}

async fn leave(State(app): State<App>, Path(folder): Path<String>) -> Answer<serde_json::Value> {
    app.service.leave(&folder).await?;
    done()
}

async fn confirm(State(app): State<App>, Path(folder): Path<String>) -> Answer<serde_json::Value> {
    app.service.confirm(&folder).await?;
    done()
}

async fn undo(State(app): State<App>, Path(folder): Path<String>) -> Answer<Undone> {
    app.unless_stopped(app.service.undo(&folder)).await
}

async fn versions(
    State(app): State<App>,
    Path(folder): Path<String>,
    request: Result<Json<VersionsRequest>, JsonRejection>,
) -> Answer<Versions> {
    Ok(Json(app.service.versions(&folder, &request?.path).await?))
}

async fn restore(
    State(app): State<App>,
    Path(folder): Path<String>,
    request: Result<Json<RestoreRequest>, JsonRejection>,
) -> Answer<Restored> {
    let Json(request) = request?;
    app.unless_stopped(app.service.restore(&folder, request)).await
}

async fn limit_rate(
    State(app): State<App>,
    request: Result<Json<RateRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    app.service.limit_rate(request?.bytes_per_second).await?;
    done()
}

async fn relays(State(app): State<App>) -> Answer<HomeRelays> {
    Ok(Json(app.service.relays().await?))
}

async fn add_relay(
    State(app): State<App>,
    query: Result<Query<InGroup>, QueryRejection>,
    request: Result<Json<RelayRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    app.service.add_relay(&query?.group, &request?.url).await?;
    done()
}

async fn set_wake(
    State(app): State<App>,
    request: Result<Json<WakeRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    app.service.set_wake(request?.url.as_deref()).await?;
    done()
}

async fn back_up(State(app): State<App>, request: Result<Json<BackupRequest>, JsonRejection>) -> Answer<BackedUp> {
    let Json(request) = request?;
    Ok(Json(app.service.back_up(&request.path, &request.passphrase).await?))
}

async fn remove_relay(
    State(app): State<App>,
    query: Result<Query<InGroup>, QueryRejection>,
    request: Result<Json<RelayRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    app.service.remove_relay(&query?.group, &request?.url).await?;
    done()
}

async fn devices(State(app): State<App>) -> Answer<Devices> {
    Ok(Json(app.service.devices().await?))
}

async fn members(State(app): State<App>, query: Result<Query<InGroup>, QueryRejection>) -> Answer<Members> {
    Ok(Json(app.service.members(&query?.group).await?))
}

async fn remove_member(
    State(app): State<App>,
    query: Result<Query<InGroup>, QueryRejection>,
    request: Result<Json<RemoveRequest>, JsonRejection>,
) -> Answer<Removed> {
    let (Query(query), Json(RemoveRequest { member, approve })) = (query?, request?);
    Ok(Json(app.service.remove_member(&query.group, &member, approve).await?))
}

async fn rotate(State(app): State<App>, query: Result<Query<InGroup>, QueryRejection>) -> Answer<Rotated> {
    Ok(Json(app.service.rotate(&query?.group).await?))
}

async fn stop(State(app): State<App>) -> Json<serde_json::Value> {
    app.service.quit().cancel();
    Json(serde_json::json!({}))
}

fn done() -> Answer<serde_json::Value> {
    Ok(Json(serde_json::json!({})))
}

impl App {
    /// Answers with what may take long, unless the server ends before.
    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Answer<T> {
        tokio::select! {
            result = work => Ok(Json(result?)),
            () = self.stop.cancelled() => Err(Refusal(Failure::new("closed", "the process that serves this home is ending"))),
        }
    }
}

/// One JSON value a line, until the values or the server end.
fn json_lines<T: Serialize>(values: impl Stream<Item = T> + Send + 'static, app: &App) -> Response {
    let lines = values.map(|value| {
        let mut line = serde_json::to_vec(&value).unwrap_or_default();
        line.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(line))
    });
    let until_stop = lines.take_until(app.stop.clone().cancelled_owned());
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(until_stop)).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use serde_json::{Value, json};
    use sync_client::folders::{DeviceStatus, Direction, KeptVersion, Offered, RestoreTo};

    use super::*;
    use crate::api::{Blob, Event, EventLine, Folders};
    use crate::select::tests::folder;

    fn description() -> Value {
        serde_json::from_str(include_str!("../../../../docs/openapi.json")).expect("JSON")
    }

    #[test]
    fn every_route_is_described_and_no_other() {
        let served: BTreeSet<_> =
            routes().iter().map(|route| (route.path.to_owned(), route.method.to_owned())).collect();
        assert_eq!(served.len(), routes().len());
        let description = description();
        let paths = description["paths"].as_object().expect("paths");
        let described: BTreeSet<_> = paths
            .iter()
            .flat_map(|(path, methods)| {
                methods.as_object().into_iter().flatten().map(|(method, _)| (path.clone(), method.clone()))
            })
            .collect();
        assert_eq!(served, described);
        for (path, operation) in paths.iter().flat_map(|(path, methods)| {
            methods.as_object().into_iter().flatten().map(move |(_, operation)| (path, operation))
        }) {
            let named: BTreeSet<_> = operation["parameters"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|each| each["in"] == "path")
                .map(|each| each["name"].as_str().unwrap_or_default().to_owned())
                .collect();
            let in_path: BTreeSet<_> = path
                .split('/')
                .filter_map(|part| Some(part.strip_prefix('{')?.strip_suffix('}')?.to_owned()))
                .collect();
            assert_eq!(named, in_path, "{path}");
        }
        // the same for people
        let manual = include_str!("../../../../docs/local-api.md");
        for (path, _) in served {
            let last = path.rsplit('/').next().unwrap_or_default();
            let short = path.replace("{id}", "ID").replace("{folder}", "ID");
            assert!(manual.contains(&short) || manual.contains(&format!("…/{last}`")), "{path}");
        }
    }

    #[test]
    fn every_reference_of_the_description_leads_somewhere() {
        fn check(value: &Value, whole: &Value) {
            if let Some(reference) = value["$ref"].as_str() {
                let pointer = reference.strip_prefix('#').expect("within the description");
                assert!(whole.pointer(pointer).is_some(), "{reference}");
            }
            match value {
                Value::Object(fields) => fields.values().for_each(|value| check(value, whole)),
                Value::Array(values) => values.iter().for_each(|value| check(value, whole)),
                _ => {}
            }
        }
        let whole = description();
        check(&whole, &whole);
    }

    #[test]
    fn what_is_sent_has_the_fields_that_are_described() {
        let folder = folder("aa", "photos", Path::new("/photos"));
        let kept = KeptVersion {
            version: "k1".into(),
            path: "a".into(),
            at: 1,
            modified: -1,
            size: 1,
            hash: None,
            here: true,
            devices: vec!["b".into()],
        };
        let offered = Offered { id: "aa".into(), name: "photos".into(), path: None };
        let device = DeviceStatus {
            name: "anna".into(),
            device: "dd".into(),
            groups: vec![],
            state: "this".into(),
            address: None,
            relayed_by: None,
            rtt_us: None,
            last_seen_ms: None,
        };
        let place = PlaceRequest { path: "/photos".into(), name: None, direction: Direction::Both };
        let restore = RestoreRequest { path: "a".into(), version: "0123abcd".into(), to: RestoreTo::Place };
        let overview = Overview {
            version: "1".into(),
            served_by: None,
            home: "/h".into(),
            name: "anna".into(),
            device: "dd".into(),
            warnings: vec![],
            api: None,
            groups: vec![],
            folders: vec![],
        };
        let invite = Invite { id: "1".into(), group: "2".into(), code: "3".into(), link: "4".into(), expires: 5 };
        let blob = Blob { cursor: 1, blob_id: "0".into(), sender: "1".into(), timestamp: 1, bytes: vec![] };
        let described: BTreeMap<&str, Vec<Value>> = [
            ("FolderStatus", vec![json!(folder)]),
            ("Folders", vec![json!(Folders { folders: vec![] })]),
            ("KeptVersion", vec![json!(kept)]),
            ("Offered", vec![json!(offered)]),
            ("DeviceStatus", vec![json!(device)]),
            ("PlaceRequest", vec![json!(place)]),
            ("RestoreRequest", vec![json!(restore)]),
            ("Overview", vec![json!(overview)]),
            ("Invite", vec![json!(invite)]),
            ("Blob", vec![json!(blob)]),
            ("Pushed", vec![json!(Pushed { cursor: 1, blob_id: "0".into() })]),
            ("RelayRequest", vec![json!(RelayRequest { url: "ws://127.0.0.1".into() })]),
            ("HomeRelays", vec![json!(HomeRelays { relays: vec![], wake: None })]),
            ("HomeRelay", vec![json!(crate::api::HomeRelay { url: "ws://127.0.0.1".into(), group: None })]),
            ("WakeRequest", vec![json!(WakeRequest { url: None })]),
            ("RateRequest", vec![json!(RateRequest { bytes_per_second: None })]),
            ("Undone", vec![json!(Undone { paths: 1 })]),
            (
                "Outcome",
                vec![json!(Outcome::Expired), json!(Outcome::Joined { name: "ben".into(), author: "1".into() })],
            ),
            ("Failure", vec![json!(Failure::usage("x"))]),
            (
                "EventLine",
                [
                    Event::Folder { folder: Box::new(folder.clone()) },
                    Event::FolderConflict { folder: "aa".into(), path: "a".into() },
                    Event::FolderLeft { folder: "aa".into() },
                    Event::Lagged { missed: 1 },
                    Event::Connected { replica: "1".into(), name: "ben".into(), max_cursor: 1, pending: 0 },
                ]
                .map(|event| json!(EventLine { group: "ab".into(), event }))
                .into(),
            ),
        ]
        .into();
        let description = description();
        for (name, values) in described {
            let schema = &description["components"]["schemas"][name];
            for value in values {
                let fields = value.as_object().expect("an object");
                for field in fields.keys() {
                    assert!(schema["properties"].get(field).is_some(), "{name} is not described to have {field}");
                }
                for field in schema["required"].as_array().expect("a list") {
                    assert!(fields.contains_key(field.as_str().expect("a name")), "{name} has no {field}");
                }
            }
        }
        assert_eq!(json!(restore)["to"], "place");
    }
}
