//! Where who makes an invite and who joins by it meet: sealed records under ids that tell nothing.
//!
//! Kept in memory, and not for long: an inviter leaves its record again after a restart.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use bytes::Bytes;
use data_encoding::HEXLOWER;
use subtle::ConstantTimeEq as _;
use sync_link::relay::meeting::{MAX_ANSWER, MAX_REQUEST, MEETINGS_PATH, NUMBER_HEADER, POLL};
use sync_link::rendezvous::MAX_RECORD;
use tokio::sync::Notify;

use crate::limiter::{Limiter, subscriber};
use crate::server::{Inner, REQUEST_WAIT};

/// Time for which a record is kept: as long as an invite lasts.
const LIFETIME: Duration = Duration::from_secs(600);
/// Records kept at once.
const MAX_MEETINGS: usize = 1000;
/// Records of one subscriber kept at once: more than a household makes in ten minutes.
const MAX_OWN_MEETINGS: usize = 10;
/// Bytes kept of all requests: of their own, so that answers keep nobody from asking.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Bytes kept of all answers together.
const MAX_ANSWER_BYTES: usize = 12 << 20;
/// Bytes of requests and answers kept of one subscriber: one answer of any size, and room beside it.
const MAX_OWN_BYTES: usize = 2 << 20;
/// Requests of one record that wait for the inviter; one invite admits one device.
const MAX_REQUESTS: usize = 8;
/// Wait of an address that asks for what is not there, once it has done so too often; it doubles each time.
const FIRST_WAIT: Duration = Duration::from_secs(30);
/// The longest such wait.
const LAST_WAIT: Duration = Duration::from_secs(3600);
/// Addresses whose wait is remembered.
const MAX_WAITING: usize = 20_000;

type Id = [u8; 16];

/// How much of it one address may do in a minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rates {
    pub(crate) create: u32,
    pub(crate) fetch: u32,
    pub(crate) missed: u32,
}

/// What is kept.
pub(crate) struct Meetings {
    kept: Mutex<Kept>,
    creating: Limiter<IpAddr>,
    fetching: Limiter<IpAddr>,
    missing: Missing<IpAddr>,
}

#[derive(Default)]
struct Kept {
    meetings: HashMap<Id, Meeting>,
    request_bytes: usize,
    answer_bytes: usize,
    /// What of it is whose.
    held: HashMap<IpAddr, Held>,
}

/// What is kept of one subscriber.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Held {
    meetings: usize,
    bytes: usize,
}

/// Which bytes are counted.
#[derive(Debug, Clone, Copy)]
enum What {
    Request,
    Answer,
}

struct Meeting {
    owner: Id,
    /// Whose it is, the answers included.
    from: IpAddr,
    /// None once it was given away.
    record: Option<Bytes>,
    ends: Instant,
    /// With whose each is.
    requests: VecDeque<(u32, IpAddr, Bytes)>,
    asked: u32,
    answers: HashMap<u32, Bytes>,
    /// Told when a request or an answer has come.
    told: Arc<Notify>,
}

impl Meeting {
    /// Whether the request with this number was made and has no answer.
    fn may_answer(&self, number: u32) -> Result<(), Refusal> {
        let is_next = (1..=self.asked).contains(&number) && self.answers.len() < MAX_REQUESTS;
        if is_next && !self.answers.contains_key(&number) { Ok(()) } else { Err(Refusal::Full) }
    }
}

/// Why something is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// There is no such record, or it is another's.
    NotThere,
    /// It was given away.
    Fetched,
    /// Someone else's is there.
    Taken,
    /// Too many bytes.
    TooLong,
    /// Too many of them.
    Full,
    /// Not so fast.
    TooFast(&'static str),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, text) = match self {
            Self::NotThere => (StatusCode::NOT_FOUND, "nothing is here"),
            Self::Fetched => (StatusCode::GONE, "it was given away"),
            Self::Taken => (StatusCode::CONFLICT, "another record is here"),
            Self::TooLong => (StatusCode::PAYLOAD_TOO_LARGE, "it is too long"),
            Self::Full => (StatusCode::SERVICE_UNAVAILABLE, "as much is kept as may be"),
            Self::TooFast(text) => (StatusCode::TOO_MANY_REQUESTS, text),
        };
        (status, text).into_response()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kept {
    /// Forgets what is over.
    fn forget(&mut self, now: Instant) {
        let ended: Vec<Meeting> =
            self.meetings.extract_if(|_, meeting| meeting.ends <= now).map(|(_, meeting)| meeting).collect();
        for meeting in ended {
            self.let_go(&meeting);
        }
    }

    /// Counts what was kept for a record no longer.
    fn let_go(&mut self, meeting: &Meeting) {
        for (_, from, request) in &meeting.requests {
            self.release(What::Request, *from, request.len());
        }
        for answer in meeting.answers.values() {
            self.release(What::Answer, meeting.from, answer.len());
        }
        self.change(meeting.from, |held| held.meetings = held.meetings.saturating_sub(1));
        meeting.told.notify_waiters();
    }

    fn change(&mut self, whose: IpAddr, change: impl FnOnce(&mut Held)) {
        let held = self.held.entry(whose).or_default();
        change(held);
        if *held == Held::default() {
            self.held.remove(&whose);
        }
    }

    fn bytes_of(&mut self, what: What) -> (&mut usize, usize) {
        match what {
            What::Request => (&mut self.request_bytes, MAX_REQUEST_BYTES),
            What::Answer => (&mut self.answer_bytes, MAX_ANSWER_BYTES),
        }
    }

    /// Counts bytes, if there is room for them.
    fn charge(&mut self, what: What, whose: IpAddr, bytes: usize) -> Result<(), Refusal> {
        let own = self.held.get(&whose).map_or(0, |held| held.bytes);
        let (all, most) = self.bytes_of(what);
        if *all + bytes > most {
            return Err(Refusal::Full);
        }
        if own + bytes > MAX_OWN_BYTES {
            return Err(Refusal::TooFast("as much is kept of your address as may be"));
        }
        *all += bytes;
        self.change(whose, |held| held.bytes += bytes);
        Ok(())
    }

    fn release(&mut self, what: What, whose: IpAddr, bytes: usize) {
        let (all, _) = self.bytes_of(what);
        *all = all.saturating_sub(bytes);
        self.change(whose, |held| held.bytes = held.bytes.saturating_sub(bytes));
    }

    /// What is under an id, for whom the record is.
    fn own(&mut self, id: &Id, owner: Option<Id>) -> Result<&mut Meeting, Refusal> {
        let meeting = self.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
        let is_own = owner.is_some_and(|owner| bool::from(owner.ct_eq(&meeting.owner)));
        if is_own { Ok(meeting) } else { Err(Refusal::NotThere) }
    }
}

impl Meetings {
    pub(crate) fn new(rates: Rates) -> Self {
        Self {
            kept: Mutex::default(),
            creating: Limiter::new(rates.create),
            fetching: Limiter::new(rates.fetch),
            missing: Missing::new(rates.missed),
        }
    }

    /// How many records are kept.
    pub(crate) fn count(&self) -> usize {
        lock(&self.kept).meetings.len()
    }

    fn kept(&self, now: Instant) -> MutexGuard<'_, Kept> {
        let mut kept = lock(&self.kept);
        kept.forget(now);
        kept
    }

    fn publish(&self, from: IpAddr, id: Id, owner: Id, record: Bytes, now: Instant) -> Result<(), Refusal> {
        if !self.creating.take(from, now) {
            return Err(Refusal::TooFast("too many new codes from your address"));
        }
        if record.is_empty() || record.len() > MAX_RECORD {
            return Err(Refusal::TooLong);
        }
        let mut kept = self.kept(now);
        let count = kept.meetings.len();
        let own = kept.held.get(&from).map_or(0, |held| held.meetings);
        match kept.meetings.get_mut(&id) {
            Some(meeting) if !bool::from(meeting.owner.ct_eq(&owner)) => Err(Refusal::Taken),
            Some(meeting) => {
                meeting.record = meeting.record.as_ref().map(|_| record);
                Ok(())
            }
            None if count >= MAX_MEETINGS => Err(Refusal::Full),
            None if own >= MAX_OWN_MEETINGS => Err(Refusal::TooFast("your address has as many codes here as it may")),
            None => {
                let (requests, answers, told) = (VecDeque::new(), HashMap::new(), Arc::default());
                let ends = now + LIFETIME;
                let record = Some(record);
                kept.meetings.insert(id, Meeting { owner, from, record, ends, requests, asked: 0, answers, told });
                kept.change(from, |held| held.meetings += 1);
                Ok(())
            }
        }
    }

    fn fetch(&self, from: IpAddr, id: &Id, now: Instant) -> Result<Bytes, Refusal> {
        self.look_for(from, now, || {
            let mut kept = self.kept(now);
            let meeting = kept.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
            meeting.record.take().ok_or(Refusal::Fetched)
        })
    }

    fn ask(&self, from: IpAddr, id: &Id, request: Bytes, now: Instant) -> Result<u32, Refusal> {
        self.look_for(from, now, || {
            let mut kept = self.kept(now);
            if kept.meetings.get(id).ok_or(Refusal::NotThere)?.requests.len() >= MAX_REQUESTS {
                return Err(Refusal::Full);
            }
            kept.charge(What::Request, from, request.len())?;
            let meeting = kept.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
            meeting.asked += 1;
            let number = meeting.asked;
            meeting.requests.push_back((number, from, request));
            meeting.told.notify_waiters();
            Ok(number)
        })
    }

    /// Looks something up for an address, unless it has done so too often or for what is not there.
    fn look_for<T>(&self, from: IpAddr, now: Instant, look: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
        if self.missing.waits(&from, now) {
            return Err(Refusal::TooFast("your address asked too often for what is not here"));
        }
        if !self.fetching.take(from, now) {
            return Err(Refusal::TooFast("your address asks too often"));
        }
        let found = look();
        if matches!(found, Err(Refusal::NotThere)) {
            self.missing.missed(from, now);
        }
        found
    }

    fn withdraw(&self, id: &Id, owner: Option<Id>, now: Instant) -> Result<(), Refusal> {
        let mut kept = self.kept(now);
        kept.own(id, owner)?;
        if let Some(meeting) = kept.meetings.remove(id) {
            kept.let_go(&meeting);
        }
        Ok(())
    }

    /// Keeps room for an answer that is to be read.
    fn reserve(
        &self,
        id: &Id,
        owner: Option<Id>,
        number: u32,
        bytes: usize,
        now: Instant,
    ) -> Result<Reserved<'_>, Refusal> {
        let mut kept = self.kept(now);
        let meeting = kept.own(id, owner)?;
        meeting.may_answer(number)?;
        let from = meeting.from;
        kept.charge(What::Answer, from, bytes)?;
        Ok(Reserved { meetings: self, from, bytes })
    }

    fn answer(&self, id: &Id, owner: Option<Id>, number: u32, answer: Bytes, now: Instant) -> Result<(), Refusal> {
        let mut kept = self.kept(now);
        let meeting = kept.own(id, owner)?;
        meeting.may_answer(number)?;
        let from = meeting.from;
        kept.charge(What::Answer, from, answer.len())?;
        let meeting = kept.own(id, owner)?;
        meeting.answers.insert(number, answer);
        meeting.told.notify_waiters();
        Ok(())
    }

    /// The next request, if there is one, and else what tells that there may be one.
    fn asked(&self, id: &Id, owner: Option<Id>, now: Instant) -> Result<Result<(u32, Bytes), Arc<Notify>>, Refusal> {
        let mut kept = self.kept(now);
        let meeting = kept.own(id, owner)?;
        let Some((number, from, request)) = meeting.requests.pop_front() else { return Ok(Err(meeting.told.clone())) };
        kept.release(What::Request, from, request.len());
        Ok(Ok((number, request)))
    }

    /// The answer with a number, if there is one, and else what tells that there may be one.
    fn answered(&self, id: &Id, number: u32, now: Instant) -> Result<Result<Bytes, Arc<Notify>>, Refusal> {
        let mut kept = self.kept(now);
        let meeting = kept.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
        if number == 0 || number > meeting.asked {
            return Err(Refusal::NotThere);
        }
        let Some(answer) = meeting.answers.remove(&number) else { return Ok(Err(meeting.told.clone())) };
        let from = meeting.from;
        kept.release(What::Answer, from, answer.len());
        Ok(Ok(answer))
    }
}

/// Room for an answer that is being read, until dropped.
struct Reserved<'a> {
    meetings: &'a Meetings,
    from: IpAddr,
    bytes: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        lock(&self.meetings.kept).release(What::Answer, self.from, self.bytes);
    }
}

/// Who asks for what is not there waits, and longer each time.
struct Missing<K> {
    free: Limiter<K>,
    waiting: Mutex<HashMap<K, (Instant, Duration)>>,
}

impl<K: Hash + Eq + Copy> Missing<K> {
    fn new(per_minute: u32) -> Self {
        Self { free: Limiter::new(per_minute), waiting: Mutex::default() }
    }

    fn waits(&self, who: &K, now: Instant) -> bool {
        lock(&self.waiting).get(who).is_some_and(|(until, _)| now < *until)
    }

    fn missed(&self, who: K, now: Instant) {
        self.free.take(who, now);
        if !self.free.is_empty(&who, now) {
            return;
        }
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= MAX_WAITING {
            // who has waited as long again as it had to begins anew
            waiting.retain(|_, (until, wait)| *until + *wait > now);
            if waiting.len() >= MAX_WAITING {
                waiting.clear();
            }
        }
        let before = waiting.get(&who).filter(|(until, _)| *until + LAST_WAIT > now).map(|(_, wait)| *wait);
        let wait = before.map_or(FIRST_WAIT, |wait| (wait * 2).min(LAST_WAIT));
        waiting.insert(who, (now + wait, wait));
    }
}

/// The routes.
pub(crate) fn routes() -> Router<Arc<Inner>> {
    let below = |rest: &str| format!("{MEETINGS_PATH}/{{id}}{rest}");
    Router::new()
        .route(&below(""), get(fetch).put(publish).delete(withdraw))
        .route(&below("/requests"), post(ask).get(asked))
        .route(&below("/answers/{number}"), put(answer).get(answered))
}

fn parse(text: &str) -> Result<Id, Refusal> {
    let bytes = HEXLOWER.decode(text.as_bytes()).ok();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(Refusal::NotThere)
}

fn owner(headers: &HeaderMap) -> Option<Id> {
    parse(headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?).ok()
}

/// A body that comes whole in time and is not too long.
async fn whole(body: Body, most: usize) -> Result<Bytes, Refusal> {
    let read = tokio::time::timeout(REQUEST_WAIT, to_bytes(body, most)).await;
    read.ok().and_then(Result::ok).ok_or(Refusal::TooLong)
}

/// Waits for something that may be there later.
async fn wait_for<T>(mut look: impl FnMut() -> Result<Result<T, Arc<Notify>>, Refusal>) -> Result<Option<T>, Refusal> {
    let give_up = tokio::time::Instant::now() + POLL;
    loop {
        let told = match look()? {
            Ok(found) => return Ok(Some(found)),
            Err(told) => told,
        };
        let notified = told.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        // it may have come before we listened
        if let Ok(found) = look()? {
            return Ok(Some(found));
        }
        if tokio::time::timeout_at(give_up, notified).await.is_err() {
            return Ok(None);
        }
    }
}

async fn publish(
    State(inner): State<Arc<Inner>>,
    Extension(socket): Extension<IpAddr>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let (id, owner) = (parse(&id)?, owner(&headers).ok_or(Refusal::NotThere)?);
    let record = whole(body, MAX_RECORD).await?;
    let from = subscriber(inner.asking(&headers, socket));
    inner.relay.meetings.publish(from, id, owner, record, Instant::now()).map(|()| StatusCode::CREATED)
}

async fn fetch(
    State(inner): State<Arc<Inner>>,
    Extension(socket): Extension<IpAddr>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Bytes, Refusal> {
    let from = subscriber(inner.asking(&headers, socket));
    inner.relay.meetings.fetch(from, &parse(&id)?, Instant::now())
}

async fn withdraw(
    State(inner): State<Arc<Inner>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Refusal> {
    inner.relay.meetings.withdraw(&parse(&id)?, owner(&headers), Instant::now()).map(|()| StatusCode::NO_CONTENT)
}

async fn ask(
    State(inner): State<Arc<Inner>>,
    Extension(socket): Extension<IpAddr>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let request = whole(body, MAX_REQUEST).await?;
    let from = subscriber(inner.asking(&headers, socket));
    let number = inner.relay.meetings.ask(from, &parse(&id)?, request, Instant::now())?;
    Ok((StatusCode::CREATED, [(NUMBER_HEADER, number.to_string())]).into_response())
}

async fn asked(
    State(inner): State<Arc<Inner>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (id, owner) = (parse(&id)?, owner(&headers));
    let meetings = &inner.relay.meetings;
    let found = inner.unless_stopped(wait_for(|| meetings.asked(&id, owner, Instant::now()))).await?;
    Ok(match found {
        Some((number, request)) => ([(NUMBER_HEADER, number.to_string())], request).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

async fn answer(
    State(inner): State<Arc<Inner>>,
    Path((id, number)): Path<(String, u32)>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let (id, owner) = (parse(&id)?, owner(&headers));
    let meetings = &inner.relay.meetings;
    let len = headers.get(header::CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
    let len = len.unwrap_or(MAX_ANSWER);
    if len > MAX_ANSWER {
        return Err(Refusal::TooLong);
    }
    // nothing is read for whom it is not, or for which there is no room
    let reserved = meetings.reserve(&id, owner, number, len, Instant::now())?;
    let answer = whole(body, len).await?;
    // what is counted next is no more than this
    drop(reserved);
    meetings.answer(&id, owner, number, answer, Instant::now()).map(|()| StatusCode::CREATED)
}

async fn answered(
    State(inner): State<Arc<Inner>>,
    Extension(socket): Extension<IpAddr>,
    Path((id, number)): Path<(String, u32)>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (id, meetings) = (parse(&id)?, &inner.relay.meetings);
    let from = subscriber(inner.asking(&headers, socket));
    let first = meetings.look_for(from, Instant::now(), || meetings.answered(&id, number, Instant::now()))?;
    let found = match first {
        Ok(answer) => Some(answer),
        Err(_) => inner.unless_stopped(wait_for(|| meetings.answered(&id, number, Instant::now()))).await?,
    };
    Ok(found.map_or_else(|| StatusCode::NO_CONTENT.into_response(), IntoResponse::into_response))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const RATES: Rates = Rates { create: 5, fetch: 10, missed: 3 };

    fn record() -> Bytes {
        Bytes::from_static(b"sealed")
    }

    fn holds_nothing(meetings: &Meetings) -> bool {
        let kept = lock(&meetings.kept);
        kept.meetings.is_empty() && kept.held.is_empty() && kept.request_bytes + kept.answer_bytes == 0
    }

    /// One of many subscribers.
    fn from(number: usize) -> IpAddr {
        IpAddr::from((10_u128 << 112 | u128::try_from(number).unwrap() << 64).to_be_bytes())
    }

    #[test]
    fn a_record_is_given_away_once_and_no_longer_than_an_invite_lasts() {
        let (meetings, start) = (Meetings::new(RATES), Instant::now());
        meetings.publish(FROM, [1; 16], [9; 16], record(), start).unwrap();
        meetings.publish(FROM, [2; 16], [9; 16], record(), start).unwrap();
        assert_eq!(meetings.fetch(FROM, &[1; 16], start), Ok(record()));
        assert_eq!(meetings.fetch(FROM, &[1; 16], start), Err(Refusal::Fetched));
        // its owner does not make it fresh again
        meetings.publish(FROM, [1; 16], [9; 16], record(), start).unwrap();
        assert_eq!(meetings.fetch(FROM, &[1; 16], start), Err(Refusal::Fetched));
        assert_eq!(meetings.fetch(FROM, &[2; 16], start + LIFETIME), Err(Refusal::NotThere));
        assert!(holds_nothing(&meetings));
    }

    #[test]
    fn only_its_owner_replaces_a_record_or_hears_who_asks() {
        let (meetings, now) = (Meetings::new(RATES), Instant::now());
        meetings.publish(FROM, [1; 16], [9; 16], record(), now).unwrap();
        assert_eq!(meetings.publish(FROM, [1; 16], [8; 16], record(), now), Err(Refusal::Taken));
        assert_eq!(meetings.ask(FROM, &[1; 16], record(), now), Ok(1));
        for owner in [None, Some([8; 16])] {
            assert!(meetings.asked(&[1; 16], owner, now).is_err());
            assert_eq!(meetings.answer(&[1; 16], owner, 1, record(), now), Err(Refusal::NotThere));
            assert_eq!(meetings.withdraw(&[1; 16], owner, now), Err(Refusal::NotThere));
        }
        assert_eq!(meetings.asked(&[1; 16], Some([9; 16]), now).unwrap().unwrap(), (1, record()));
        assert!(meetings.answered(&[1; 16], 1, now).unwrap().is_err(), "not yet");
        assert_eq!(meetings.answer(&[1; 16], Some([9; 16]), 2, record(), now), Err(Refusal::Full));
        assert_eq!(meetings.answer(&[1; 16], Some([9; 16]), 1, record(), now), Ok(()));
        assert_eq!(meetings.answered(&[1; 16], 1, now).unwrap().unwrap(), record());
        assert_eq!(meetings.withdraw(&[1; 16], Some([9; 16]), now), Ok(()));
        assert!(holds_nothing(&meetings));
    }

    #[test]
    fn an_address_makes_five_codes_fetches_ten_and_misses_three_a_minute() {
        let (meetings, now) = (Meetings::new(RATES), Instant::now());
        let made = (0..9).take_while(|id| meetings.publish(FROM, [*id; 16], [9; 16], record(), now).is_ok()).count();
        assert_eq!(made, 5);
        let elsewhere = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
        let asked = (0..99)
            .take_while(|_| {
                meetings.fetch(elsewhere, &[1; 16], now) != Err(Refusal::TooFast("your address asks too often"))
            })
            .count();
        assert_eq!(asked, 10);
        let mut at = now;
        for wait in [30, 60, 120] {
            at += Duration::from_secs(60);
            while meetings.fetch(FROM, &[99; 16], at) == Err(Refusal::NotThere) {}
            let just_before = at + Duration::from_secs(wait) - Duration::from_millis(1);
            assert!(meetings.missing.waits(&FROM, just_before), "{wait}");
            at += Duration::from_secs(wait);
            assert!(!meetings.missing.waits(&FROM, at), "{wait}");
        }
    }

    #[test]
    fn what_is_kept_has_bounds() {
        let (meetings, now) = (Meetings::new(Rates { create: 5000, fetch: 50_000, missed: 3 }), Instant::now());
        let id = |number: usize| u128::try_from(number).unwrap().to_be_bytes();
        let publish = |at: usize| meetings.publish(from(at / MAX_OWN_MEETINGS), id(at), [9; 16], record(), now);
        let made = (0..).take_while(|at| publish(*at).is_ok()).count();
        assert_eq!(made, MAX_MEETINGS);
        let asked = (0..99).take_while(|_| meetings.ask(FROM, &id(0), record(), now).is_ok()).count();
        assert_eq!(asked, MAX_REQUESTS);
        let long = Bytes::from(vec![0; MAX_REQUEST]);
        let ask = |at: usize, who: IpAddr| meetings.ask(who, &id(at / MAX_REQUESTS), long.clone(), now);
        let of_one = (MAX_REQUESTS..MAX_MEETINGS * MAX_REQUESTS).filter(|at| ask(*at, FROM).is_ok()).count();
        assert_eq!(of_one, MAX_OWN_BYTES / MAX_REQUEST);
        let of_all = (MAX_REQUESTS..MAX_MEETINGS * MAX_REQUESTS).filter(|at| ask(*at, from(*at)).is_ok()).count();
        assert_eq!(of_one + of_all, MAX_REQUEST_BYTES / MAX_REQUEST);
        lock(&meetings.kept).forget(now + LIFETIME);
        assert!(holds_nothing(&meetings));
        assert_eq!(
            meetings.publish(FROM, [1; 16], [9; 16], Bytes::from(vec![0; MAX_RECORD + 1]), now),
            Err(Refusal::TooLong)
        );
    }

    #[test]
    fn an_address_has_ten_records_at_once_and_room_for_answers_that_it_gets_back() {
        let (meetings, now) = (Meetings::new(Rates { create: 5000, fetch: 50_000, missed: 3 }), Instant::now());
        let publish = |id: u8, at: Instant| meetings.publish(FROM, [id; 16], [9; 16], record(), at);
        assert_eq!((0..99).take_while(|id| publish(*id, now).is_ok()).count(), MAX_OWN_MEETINGS);
        assert!(meetings.publish(from(1), [99; 16], [9; 16], record(), now).is_ok(), "another has its own");
        assert_eq!(meetings.ask(from(2), &[0; 16], record(), now), Ok(1));
        let reserve = |number| meetings.reserve(&[0; 16], Some([9; 16]), number, MAX_OWN_BYTES / 2, now);
        assert_eq!(reserve(2).err(), Some(Refusal::Full), "nobody asked that");
        let (one, other) = (reserve(1).ok(), reserve(1).ok());
        assert!(one.is_some() && other.is_some());
        assert!(matches!(reserve(1).err(), Some(Refusal::TooFast(_))));
        drop(one);
        assert!(reserve(1).is_ok());
        drop(other);
        assert_eq!(meetings.answer(&[0; 16], Some([9; 16]), 1, record(), now), Ok(()));
        assert_eq!(reserve(1).err(), Some(Refusal::Full), "it is answered");
        assert!(publish(50, now + LIFETIME).is_ok(), "the others are over");
        assert_eq!(meetings.withdraw(&[50; 16], Some([9; 16]), now + LIFETIME), Ok(()));
        assert!(holds_nothing(&meetings));
    }
}
