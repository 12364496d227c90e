//! Meeting at a relay: an inviter leaves a sealed record under a lookup id, and answers who asks there.
//!
//! All of it is HTTP, one request on each connection, sealed bytes in and out.

use std::time::Duration;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;

use super::tls::dial;
use super::{CONNECT_TIMEOUT, MAX_TEXT, RelayError, RelayUrl};
use crate::rendezvous::LookupId;

/// Below which path a relay keeps records.
pub const MEETINGS_PATH: &str = "/v1/meetings";
/// The header with a request's number.
pub const NUMBER_HEADER: &str = "x-number";
/// The header that says for how many seconds a request must have been left: who asks so leaves it to others first.
pub const WAITED_HEADER: &str = "x-waited";
/// The header with the pass that whoever takes a record wants to be let in by where connections begin, in hex.
pub const PASS_HEADER: &str = "x-pass";
/// The header with the seconds for which a request was left.
pub const AGE_HEADER: &str = "x-age";
/// Time for which a request that was left in time waits for who may answer.
pub const REQUEST_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time for which a relay keeps a question open until there is an answer.
pub const POLL: Duration = Duration::from_secs(20);
/// Bytes of a request at most: what a joiner says, sealed.
pub const MAX_REQUEST: usize = 4096 + 256;
/// Bytes of an answer at most: what an inviter answers, sealed.
pub const MAX_ANSWER: usize = (1 << 20) + 4096;

/// Why a relay does not do what it is asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MeetingError {
    /// It keeps nothing under that id.
    #[error("the relay knows no such code")]
    NotThere,
    /// It gave the record to somebody before.
    #[error("the relay has given the code's record away already")]
    Fetched,
    /// It keeps something of somebody else under that id.
    #[error("the relay keeps another record under that id")]
    Taken,
    /// Its address has no TLS and is not of this machine.
    #[error("the relay's address has no TLS, without which codes could be taken over on the way")]
    Plain,
    /// It could not be asked, or refuses.
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// A request as a relay gives it to who may answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its number.
    pub number: u32,
    /// For how long it was left, by the relay's clock.
    pub age: Duration,
    /// What was left, sealed.
    pub request: Bytes,
}

/// A place at a relay.
#[derive(Debug, Clone)]
pub struct Meeting {
    url: RelayUrl,
    id: LookupId,
}

impl Meeting {
    /// The place under an id at a relay.
    #[must_use]
    pub fn new(url: &RelayUrl, id: LookupId) -> Self {
        Self { url: url.clone(), id }
    }

    /// Leaves a record. Whoever shows the same owner again keeps it there.
    pub async fn publish(&self, owner: &[u8; 16], record: &[u8]) -> Result<(), MeetingError> {
        self.call(Method::PUT, "", Some(owner), record, CONNECT_TIMEOUT, MAX_REQUEST).await.map(drop)
    }

    /// Takes the record: it is given once. With a pass, connections of who shows it may begin at the relay for a while.
    pub async fn fetch(&self, pass: Option<&[u8; 16]>) -> Result<Bytes, MeetingError> {
        let headers: Vec<_> = pass.map(|pass| (PASS_HEADER, HEXLOWER.encode(pass))).into_iter().collect();
        Ok(self.call_with(Method::GET, "", None, &headers, &[], CONNECT_TIMEOUT, MAX_REQUEST).await?.body)
    }

    /// Takes the record back, and all that was left there.
    pub async fn withdraw(&self, owner: &[u8; 16]) -> Result<(), MeetingError> {
        self.call(Method::DELETE, "", Some(owner), &[], CONNECT_TIMEOUT, MAX_REQUEST).await.map(drop)
    }

    /// Leaves a request for a member; the number under which it is answered. The same one again has the same number.
    pub async fn ask(&self, request: &[u8]) -> Result<u32, MeetingError> {
        self.call(Method::POST, "/requests", None, request, CONNECT_TIMEOUT, MAX_REQUEST).await?.number()
    }

    /// The next request that was left for so long, as soon as there is one; none if there was none for a while.
    pub async fn asked(&self, owner: &[u8; 16], waited: Duration) -> Result<Option<Asked>, MeetingError> {
        let wait = POLL + CONNECT_TIMEOUT;
        let headers = [(WAITED_HEADER, waited.as_secs().to_string())];
        let answer = self.call_with(Method::GET, "/requests", Some(owner), &headers, &[], wait, MAX_REQUEST).await?;
        if answer.status == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let age = Duration::from_secs(answer.age.ok_or_else(|| RelayError::Lost("it left out an age".to_owned()))?);
        Ok(Some(Asked { number: answer.number()?, age, request: answer.body }))
    }

    /// Has the relay forget a request: it needs no answer, or the answer has come.
    pub async fn forget(&self, owner: &[u8; 16], number: u32) -> Result<(), MeetingError> {
        let path = format!("/requests/{number}");
        self.call(Method::DELETE, &path, Some(owner), &[], CONNECT_TIMEOUT, MAX_REQUEST).await.map(drop)
    }

    /// Answers a request.
    pub async fn answer(&self, owner: &[u8; 16], number: u32, answer: &[u8]) -> Result<(), MeetingError> {
        let path = format!("/answers/{number}");
        self.call(Method::PUT, &path, Some(owner), answer, CONNECT_TIMEOUT, MAX_REQUEST).await.map(drop)
    }

    /// The answer to a request, as soon as there is one, until the request is forgotten; none if there was none for a while.
    pub async fn answered(&self, number: u32) -> Result<Option<Bytes>, MeetingError> {
        let path = format!("/answers/{number}");
        let answer = self.call(Method::GET, &path, None, &[], POLL + CONNECT_TIMEOUT, MAX_ANSWER).await?;
        Ok((answer.status != StatusCode::NO_CONTENT).then_some(answer.body))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        owner: Option<&[u8; 16]>,
        body: &[u8],
        patience: Duration,
        most: usize,
    ) -> Result<Answer, MeetingError> {
        self.call_with(method, path, owner, &[], body, patience, most).await
    }

    #[expect(clippy::too_many_arguments, reason = "each says another part of one request")]
    async fn call_with(
        &self,
        method: Method,
        path: &str,
        owner: Option<&[u8; 16]>,
        headers: &[(&str, String)],
        body: &[u8],
        patience: Duration,
        most: usize,
    ) -> Result<Answer, MeetingError> {
        if !self.url.takes_codes() {
            return Err(MeetingError::Plain);
        }
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{MEETINGS_PATH}/{}{path}", self.id.to_hex()))
            .header(HOST, self.url.authority());
        if let Some(owner) = owner {
            request = request.header(AUTHORIZATION, format!("Bearer {}", HEXLOWER.encode(owner)));
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body)));
        let request = request.map_err(|error| RelayError::Unreachable(error.to_string()))?;
        let exchange = tokio::time::timeout(patience, exchange(&self.url, request, most)).await;
        let answer = exchange.map_err(|_| RelayError::Unreachable("it does not answer".to_owned()))??;
        match answer.status {
            status if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Err(MeetingError::NotThere),
            StatusCode::GONE => Err(MeetingError::Fetched),
            StatusCode::CONFLICT => Err(MeetingError::Taken),
            _ => Err(answer.refusal().into()),
        }
    }
}

/// What a relay answers at a path to whoever asks.
pub async fn get(url: &RelayUrl, path: &str) -> Result<Bytes, RelayError> {
    let request = Request::get(path).header(HOST, url.authority()).body(Full::default());
    let request = request.map_err(|error| RelayError::Unreachable(error.to_string()))?;
    let exchange = tokio::time::timeout(CONNECT_TIMEOUT, exchange(url, request, MAX_ANSWER)).await;
    let answer = exchange.map_err(|_| RelayError::Unreachable("it does not answer".to_owned()))??;
    if answer.status.is_success() { Ok(answer.body) } else { Err(answer.refusal()) }
}

struct Answer {
    status: StatusCode,
    number: Option<u32>,
    age: Option<u64>,
    body: Bytes,
}

impl Answer {
    fn refusal(&self) -> RelayError {
        let text = String::from_utf8_lossy(&self.body[..self.body.len().min(MAX_TEXT)]);
        let text = text.chars().filter(|c| !c.is_control()).collect();
        RelayError::Refused { status: self.status.as_u16(), text }
    }

    fn number(&self) -> Result<u32, MeetingError> {
        let lacks = || RelayError::Lost("it left out a number".to_owned());
        Ok(self.number.ok_or_else(lacks)?)
    }
}

async fn exchange(url: &RelayUrl, request: Request<Full<Bytes>>, most: usize) -> Result<Answer, RelayError> {
    let lost = |error: hyper::Error| RelayError::Lost(error.to_string());
    let (stream, _) = dial(url).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
    let asking = async {
        let response = sender.send_request(request).await.map_err(lost)?;
        let said = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let number = said(NUMBER_HEADER).and_then(|text| text.parse().ok());
        let age = said(AGE_HEADER).and_then(|text| text.parse().ok());
        let status = response.status();
        let body = Limited::new(response.into_body(), most).collect().await;
        let body = body.map_err(|error| RelayError::Lost(error.to_string()))?.to_bytes();
        Ok(Answer { status, number, age, body })
    };
    tokio::pin!(asking);
    tokio::select! {
        answer = &mut asking => answer,
        // the answer may be whole when the connection ends
        _ = connection => asking.await,
    }
}
