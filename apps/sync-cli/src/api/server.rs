//! The serving end of the local API: a thin shell around [`Service`].

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{BytesRejection, JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use sync_types::bounds::MAX_APP_BYTES;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::socket::{self, Address};
use super::{Handed, Invite, JoinLine, JoinRequest, Joined, Outcome, Overview, PAGE_BLOBS, Page, Pushed};
use super::{RevokeRequest, VERSION, VERSION_HEADER};
use crate::exit::Failure;
use crate::service::Service;

/// How long requests may go on once the process is to end; whoever waits longer is told to try again.
const DRAIN: Duration = Duration::from_secs(2);

/// Longest wait a request may ask for: an hour, after which the asker has probably gone.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// Steps of a join that wait for their reader; there are no more of them.
const JOIN_LINES: usize = 16;

/// A home being served.
#[derive(Debug)]
pub(crate) struct Server {
    stop: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// Serves a home whose lock this process holds.
    pub(crate) fn start(service: Arc<Service>, address: &Address) -> Result<Self, Failure> {
        let listener = socket::bind(address).map_err(Failure::io("cannot serve the local API"))?;
        let stop = CancellationToken::new();
        let router = router(App { service, stop: stop.clone() });
        let stopped = stop.clone().cancelled_owned();
        let task = tokio::spawn(axum::serve(listener, router).with_graceful_shutdown(stopped).into_future());
        Ok(Self { stop, task })
    }

    /// Takes no more requests and waits a little for those under way.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(DRAIN, &mut self.task).await.is_err() {
            self.task.abort();
            let _ = self.task.await;
        }
    }
}

#[derive(Debug, Clone)]
struct App {
    service: Arc<Service>,
    /// Ends what would never end by itself.
    stop: CancellationToken,
}

fn router(app: App) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/push", post(push).layer(DefaultBodyLimit::max(MAX_APP_BYTES)))
        .route("/v1/pull", get(pull))
        .route("/v1/events", get(events))
        .route("/v1/handed", get(handed))
        .route("/v1/invites", post(invite))
        .route("/v1/invites/revoke", post(revoke))
        .route("/v1/invites/{id}/outcome", get(outcome))
        .route("/v1/join", post(join))
        .route("/v1/stop", post(stop))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_route)
        .layer(middleware::from_fn(same_version))
        .with_state(app)
}

/// A failure as an answer.
struct Refusal(Failure);

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

async fn events(State(app): State<App>, query: Result<Query<InGroup>, QueryRejection>) -> Result<Response, Refusal> {
    let events = app.service.events(&query?.group)?;
    let lines = stream::unfold(events, async |mut events| {
        let event = events.next().await?;
        Some((event, events))
    });
    Ok(json_lines(lines, &app))
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
    tokio::select! {
        handed = app.service.handed(&query.group, query.cursor, wait) => Ok(Json(handed?)),
        () = app.stop.cancelled() => Err(ending()),
    }
}

#[derive(Debug, Deserialize)]
struct InviteQuery {
    #[serde(default)]
    group: String,
    expires_in: Option<u64>,
}

async fn invite(State(app): State<App>, query: Result<Query<InviteQuery>, QueryRejection>) -> Answer<Invite> {
    let Query(query) = query?;
    Ok(Json(app.service.invite(&query.group, query.expires_in.map(Duration::from_secs)).await?))
}

async fn outcome(State(app): State<App>, Path(id): Path<String>) -> Answer<Outcome> {
    tokio::select! {
        outcome = app.service.outcome(&id) => Ok(Json(outcome?)),
        () = app.stop.cancelled() => Err(ending()),
    }
}

async fn revoke(
    State(app): State<App>,
    request: Result<Json<RevokeRequest>, JsonRejection>,
) -> Answer<serde_json::Value> {
    app.service.revoke(&request?.invite).await?;
    Ok(Json(serde_json::json!({})))
}

async fn join(State(app): State<App>, request: Result<Json<JoinRequest>, JsonRejection>) -> Result<Response, Refusal> {
    let Json(JoinRequest { invite }) = request?;
    let (lines, reader) = mpsc::channel(JOIN_LINES);
    let service = Arc::clone(&app.service);
    // ends with the stream, so that a joiner who goes away stops joining
    let task = AbortOnDropHandle::new(tokio::spawn(async move {
        let progress = lines.clone();
        let result = service.join(&invite, move |step| drop(progress.try_send(JoinLine::Progress(step)))).await;
        let last = match result {
            Ok(group) => JoinLine::Joined(Joined { group }),
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

async fn stop(State(app): State<App>) -> Json<serde_json::Value> {
    app.service.quit().cancel();
    Json(serde_json::json!({}))
}

fn ending() -> Refusal {
    Refusal(Failure::new("closed", "the process that serves this home is ending"))
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
