//! Where who makes an invite and who joins by it meet: sealed records under ids that tell nothing.
//!
//! Records are kept in memory, and not for long: an inviter leaves its record again after a restart.
//! A request that was left while there was a record waits for days in the database, and in memory as well.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use bytes::Bytes;
use data_encoding::HEXLOWER;
use subtle::ConstantTimeEq as _;
use sync_link::relay::meeting::{
    AGE_HEADER, MAX_ANSWER, MAX_REQUEST, MEETINGS_PATH, NUMBER_HEADER, PASS_HEADER, POLL, REQUEST_LIFETIME,
    WAITED_HEADER,
};
use sync_link::rendezvous::MAX_RECORD;
use sync_store::WaitingRequest;
use sync_types::Timestamp;
use tokio::sync::Notify;

use crate::limiter::{Limiter, subscriber};
use crate::punching::pass_of;
use crate::server::{Inner, REQUEST_WAIT};
use crate::storage::{Storage, StorageError};

/// Time for which a record is kept and requests may be left: as long as an invite lasts.
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
/// Requests of one record that are kept; one invite admits one device.
const MAX_REQUESTS: usize = 8;
/// Requests that are kept longer than their record: less than half the bytes of all, so that others can always ask.
const MAX_LASTING: usize = 400;
/// Those of one subscriber.
const MAX_OWN_LASTING: usize = 10;
/// Bytes of answers that are kept longer than their record: a third of all; what is beyond is answered again.
const MAX_LASTING_ANSWERS: usize = 4 << 20;
/// Time to answer a request for whom it was given to, before it is given to another who may.
const GIVEN: Duration = Duration::from_secs(15);
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
    /// Whose record it is; none once its time is over, or after a restart.
    from: Option<IpAddr>,
    /// None once it was given away.
    record: Option<Bytes>,
    /// Until when requests may be left.
    ends: Instant,
    requests: BTreeMap<u32, Request>,
    asked: u32,
    /// Told when a request or an answer has come.
    told: Arc<Notify>,
}

/// A request to join.
struct Request {
    /// Who left it; none after a restart.
    from: Option<IpAddr>,
    bytes: Bytes,
    since: Instant,
    /// How old it was then.
    age: Duration,
    /// It is in the database, and kept longer than the record.
    lasts: bool,
    /// When it was given to who may answer.
    given: Option<Instant>,
    answer: Option<Answer>,
}

struct Answer {
    /// To whom it is counted.
    from: Option<IpAddr>,
    bytes: Bytes,
    at: Instant,
    lasts: bool,
}

/// Bytes that are kept no longer.
type Freed = (What, Option<IpAddr>, usize);

impl Meeting {
    /// One whose record is not here.
    fn over(owner: Id, now: Instant) -> Self {
        let (requests, told) = (BTreeMap::new(), Arc::default());
        Self { owner, from: None, record: None, ends: now, requests, asked: 0, told }
    }

    fn is_live(&self) -> bool {
        self.from.is_some()
    }

    /// Whether the request with this number is there and has no answer.
    fn may_answer(&self, number: u32) -> Result<&Request, Refusal> {
        self.requests.get(&number).filter(|request| request.answer.is_none()).ok_or(Refusal::Full)
    }

    /// Forgets requests and answers that are over.
    fn forget(&mut self, now: Instant, freed: &mut Vec<Freed>) {
        let is_live = self.is_live();
        for (_, request) in self
            .requests
            .extract_if(.., |_, request| request.age(now) >= REQUEST_LIFETIME || (!request.lasts && !is_live))
        {
            freed.extend(request.counted());
        }
        for request in self.requests.values_mut() {
            let over = |answer: &mut Answer| !answer.lasts && now.saturating_duration_since(answer.at) >= LIFETIME;
            if let Some(answer) = request.answer.take_if(over) {
                freed.push((What::Answer, answer.from, answer.bytes.len()));
                request.given = None;
            }
        }
    }
}

impl Request {
    fn age(&self, now: Instant) -> Duration {
        self.age.saturating_add(now.saturating_duration_since(self.since))
    }

    /// What is counted for it.
    fn counted(&self) -> impl Iterator<Item = Freed> + use<> {
        let request = (What::Request, self.from, self.bytes.len());
        let answer = self.answer.as_ref().map(|answer| (What::Answer, answer.from, answer.bytes.len()));
        std::iter::once(request).chain(answer)
    }

    /// For how long it is not to be given out yet to one who leaves it to others for some time.
    fn held_back(&self, waited: Duration, now: Instant) -> Duration {
        let given = self.given.map_or(Duration::ZERO, |given| (given + GIVEN).saturating_duration_since(now));
        given.max(waited.saturating_sub(self.age(now)))
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
        let (mut freed, mut ended) = (Vec::new(), Vec::new());
        for meeting in self.meetings.values_mut() {
            if meeting.ends <= now {
                ended.extend(meeting.from.take());
                meeting.record = None;
            }
            let before = freed.len();
            meeting.forget(now, &mut freed);
            if freed.len() > before {
                meeting.told.notify_waiters();
            }
        }
        for (_, meeting) in self.meetings.extract_if(|_, meeting| !meeting.is_live() && meeting.requests.is_empty()) {
            meeting.told.notify_waiters();
        }
        self.free(freed);
        for from in ended {
            self.change(from, |held| held.meetings = held.meetings.saturating_sub(1));
        }
    }

    /// Counts what was kept for a record no longer.
    fn let_go(&mut self, meeting: &Meeting) {
        self.free(meeting.requests.values().flat_map(Request::counted).collect());
        if let Some(from) = meeting.from {
            self.change(from, |held| held.meetings = held.meetings.saturating_sub(1));
        }
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
    fn charge(&mut self, what: What, whose: Option<IpAddr>, bytes: usize) -> Result<(), Refusal> {
        let own = whose.map(|whose| self.held.get(&whose).map_or(0, |held| held.bytes));
        let (all, most) = self.bytes_of(what);
        if *all + bytes > most {
            return Err(Refusal::Full);
        }
        if own.is_some_and(|own| own + bytes > MAX_OWN_BYTES) {
            return Err(Refusal::TooFast("as much is kept of your address as may be"));
        }
        *all += bytes;
        if let Some(whose) = whose {
            self.change(whose, |held| held.bytes += bytes);
        }
        Ok(())
    }

    fn free(&mut self, freed: Vec<Freed>) {
        for (what, whose, bytes) in freed {
            let (all, _) = self.bytes_of(what);
            *all = all.saturating_sub(bytes);
            if let Some(whose) = whose {
                self.change(whose, |held| held.bytes = held.bytes.saturating_sub(bytes));
            }
        }
    }

    /// What is under an id, for whom the record is.
    fn own(&mut self, id: &Id, owner: Option<Id>) -> Result<&mut Meeting, Refusal> {
        let meeting = self.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
        let is_own = owner.is_some_and(|owner| bool::from(owner.ct_eq(&meeting.owner)));
        if is_own { Ok(meeting) } else { Err(Refusal::NotThere) }
    }

    fn requests(&self) -> impl Iterator<Item = &Request> {
        self.meetings.values().flat_map(|meeting| meeting.requests.values())
    }

    /// Whether one more request of a subscriber may be kept longer than its record.
    fn may_last(&self, from: IpAddr) -> bool {
        let lasting = || self.requests().filter(|request| request.lasts);
        lasting().count() < MAX_LASTING && lasting().filter(|other| other.from == Some(from)).count() < MAX_OWN_LASTING
    }
}

/// What was found, and else what to wait for.
type Looked<T> = Result<T, Pause>;

/// What tells that there may be something, and the time after which to look again in any case.
struct Pause {
    told: Arc<Notify>,
    at_most: Option<Duration>,
}

/// A request for whom it is to be answered by.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    number: u32,
    age: Duration,
    request: Bytes,
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
        lock(&self.kept).meetings.values().filter(|meeting| meeting.is_live()).count()
    }

    /// Takes in the requests that waited when the relay was ended.
    pub(crate) async fn load(&self, storage: &dyn Storage) -> Result<(), StorageError> {
        let requests = storage.requests().await?;
        self.restore(requests, clock(), Instant::now());
        Ok(())
    }

    fn restore(&self, requests: Vec<WaitingRequest>, clock: Timestamp, now: Instant) {
        let mut kept = lock(&self.kept);
        for WaitingRequest { place, number, owner, left, request, answer } in requests {
            // a clock that was set back makes nothing younger than new
            let age = Duration::from_millis(clock.0.saturating_sub(left.0));
            if age >= REQUEST_LIFETIME || kept.charge(What::Request, None, request.len()).is_err() {
                continue;
            }
            let answer = answer.filter(|answer| kept.charge(What::Answer, None, answer.len()).is_ok());
            let answer = answer.map(|bytes| Answer { from: None, bytes: bytes.into(), at: now, lasts: true });
            let meeting = kept.meetings.entry(place).or_insert_with(|| Meeting::over(owner, now));
            meeting.asked = meeting.asked.max(number);
            let bytes = request.into();
            meeting
                .requests
                .insert(number, Request { from: None, bytes, since: now, age, lasts: true, given: None, answer });
        }
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
        match kept.meetings.get_mut(&id) {
            Some(meeting) if !bool::from(meeting.owner.ct_eq(&owner)) => return Err(Refusal::Taken),
            Some(meeting) if meeting.is_live() => {
                meeting.record = meeting.record.as_ref().map(|_| record);
                return Ok(());
            }
            _ => {}
        }
        let count = kept.meetings.values().filter(|meeting| meeting.is_live()).count();
        let own = kept.held.get(&from).map_or(0, |held| held.meetings);
        if count >= MAX_MEETINGS {
            return Err(Refusal::Full);
        }
        if own >= MAX_OWN_MEETINGS {
            return Err(Refusal::TooFast("your address has as many codes here as it may"));
        }
        let meeting = kept.meetings.entry(id).or_insert_with(|| Meeting::over(owner, now));
        (meeting.from, meeting.record, meeting.ends) = (Some(from), Some(record), now + LIFETIME);
        kept.change(from, |held| held.meetings += 1);
        Ok(())
    }

    fn fetch(&self, from: IpAddr, id: &Id, now: Instant) -> Result<Bytes, Refusal> {
        self.look_for(from, now, || {
            let mut kept = self.kept(now);
            let meeting = kept.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
            meeting.record.take().ok_or(Refusal::Fetched)
        })
    }

    /// Leaves a request: its number, and its owner where it is to be kept in the database. What is here has its number.
    fn ask(&self, from: IpAddr, id: &Id, request: &Bytes, now: Instant) -> Result<(u32, Option<Id>), Refusal> {
        self.look_for(from, now, || {
            let mut kept = self.kept(now);
            let lasts = kept.may_last(from);
            let meeting = kept.meetings.get(id).ok_or(Refusal::NotThere)?;
            if let Some((number, _)) = meeting.requests.iter().find(|(_, same)| same.bytes == *request) {
                return Ok((*number, None));
            }
            if !meeting.is_live() {
                return Err(Refusal::NotThere);
            }
            if meeting.requests.len() >= MAX_REQUESTS {
                return Err(Refusal::Full);
            }
            kept.charge(What::Request, Some(from), request.len())?;
            let meeting = kept.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
            meeting.asked += 1;
            let number = meeting.asked;
            let left = Request {
                from: Some(from),
                bytes: request.clone(),
                since: now,
                age: Duration::ZERO,
                lasts,
                given: None,
                answer: None,
            };
            meeting.requests.insert(number, left);
            meeting.told.notify_waiters();
            Ok((number, lasts.then_some(meeting.owner)))
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

    /// Forgets a request that needs no answer, or whose answer has come.
    fn drop_request(&self, id: &Id, owner: Option<Id>, number: u32, now: Instant) -> Result<(), Refusal> {
        let mut kept = self.kept(now);
        let dropped = kept.own(id, owner)?.requests.remove(&number).ok_or(Refusal::NotThere)?;
        kept.free(dropped.counted().collect());
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

    /// Leaves an answer; whether it is to be kept in the database.
    fn answer(&self, id: &Id, owner: Option<Id>, number: u32, answer: Bytes, now: Instant) -> Result<bool, Refusal> {
        let mut kept = self.kept(now);
        let lasting = kept.requests().filter_map(|request| request.answer.as_ref()).filter(|answer| answer.lasts);
        let room = lasting.map(|answer| answer.bytes.len()).sum::<usize>() + answer.len() <= MAX_LASTING_ANSWERS;
        let meeting = kept.own(id, owner)?;
        let lasts = meeting.may_answer(number)?.lasts && room;
        let from = meeting.from;
        kept.charge(What::Answer, from, answer.len())?;
        let meeting = kept.own(id, owner)?;
        if let Some(request) = meeting.requests.get_mut(&number) {
            request.answer = Some(Answer { from, bytes: answer, at: now, lasts });
        }
        meeting.told.notify_waiters();
        Ok(lasts)
    }

    /// The next request that was left for so long, if there is one, and else what tells that there may be one.
    ///
    /// Nothing is there any more once no request can be left and none waits.
    fn asked(&self, id: &Id, owner: Option<Id>, waited: Duration, now: Instant) -> Result<Looked<Asked>, Refusal> {
        let mut kept = self.kept(now);
        let meeting = kept.own(id, owner)?;
        let is_live = meeting.is_live();
        let mut at_most = None;
        for (number, request) in meeting.requests.iter_mut().filter(|(_, request)| request.answer.is_none()) {
            let held_back = request.held_back(waited, now);
            if held_back.is_zero() {
                request.given = Some(now);
                return Ok(Ok(Asked { number: *number, age: request.age(now), request: request.bytes.clone() }));
            }
            at_most = Some(at_most.map_or(held_back, |other: Duration| other.min(held_back)));
        }
        if !is_live && at_most.is_none() {
            return Err(Refusal::NotThere);
        }
        Ok(Err(Pause { told: meeting.told.clone(), at_most }))
    }

    /// The answer with a number, if there is one, and else what tells that there may be one.
    fn answered(&self, id: &Id, number: u32, now: Instant) -> Result<Looked<Bytes>, Refusal> {
        let mut kept = self.kept(now);
        let meeting = kept.meetings.get_mut(id).ok_or(Refusal::NotThere)?;
        let request = meeting.requests.get(&number).ok_or(Refusal::NotThere)?;
        let answer = request.answer.as_ref().map(|answer| answer.bytes.clone());
        Ok(answer.ok_or_else(|| Pause { told: meeting.told.clone(), at_most: None }))
    }
}

/// Room for an answer that is being read, until dropped.
struct Reserved<'a> {
    meetings: &'a Meetings,
    from: Option<IpAddr>,
    bytes: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        lock(&self.meetings.kept).free(vec![(What::Answer, self.from, self.bytes)]);
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
        .route(&below("/requests/{number}"), delete(drop_request))
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

/// Now, by this machine's clock.
fn clock() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// What the database did; where it does not work nothing is promised.
fn durable<T>(done: Result<T, StorageError>) -> Result<T, Refusal> {
    done.map_err(|error| {
        tracing::warn!(%error, "database does not work");
        Refusal::Full
    })
}

/// Waits for something that may be there later.
async fn wait_for<T>(mut look: impl FnMut() -> Result<Looked<T>, Refusal>) -> Result<Option<T>, Refusal> {
    let give_up = tokio::time::Instant::now() + POLL;
    loop {
        let Pause { told, .. } = match look()? {
            Ok(found) => return Ok(Some(found)),
            Err(pause) => pause,
        };
        let notified = told.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        // it may have come before we listened
        let at_most = match look()? {
            Ok(found) => return Ok(Some(found)),
            Err(pause) => pause.at_most,
        };
        let again = at_most.map_or(give_up, |wait| give_up.min(tokio::time::Instant::now() + wait));
        if tokio::time::timeout_at(again, notified).await.is_err() && tokio::time::Instant::now() >= give_up {
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
    let record = inner.relay.meetings.fetch(from, &parse(&id)?, Instant::now())?;
    let pass = headers.get(PASS_HEADER).and_then(|pass| pass.to_str().ok()).and_then(pass_of);
    if let (Some(pass), Some(punching)) = (pass, &inner.relay.punching) {
        // who has an invite is let in for as long as one whose channel has just ended
        drop(punching.admit(pass));
    }
    Ok(record)
}

async fn withdraw(
    State(inner): State<Arc<Inner>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Refusal> {
    let id = parse(&id)?;
    inner.relay.meetings.withdraw(&id, owner(&headers), Instant::now())?;
    durable(inner.relay.storage.forget_requests(id, None).await)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn ask(
    State(inner): State<Arc<Inner>>,
    Extension(socket): Extension<IpAddr>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let request = whole(body, MAX_REQUEST).await?;
    let (id, from) = (parse(&id)?, subscriber(inner.asking(&headers, socket)));
    let (meetings, storage) = (&inner.relay.meetings, &inner.relay.storage);
    let (number, owner) = meetings.ask(from, &id, &request, Instant::now())?;
    if let Some(owner) = owner {
        let left = clock();
        let oldest = Timestamp(left.0.saturating_sub(u64::try_from(REQUEST_LIFETIME.as_millis()).unwrap_or(u64::MAX)));
        let waiting = WaitingRequest { place: id, number, owner, left, request: request.into(), answer: None };
        if let Err(refusal) = durable(storage.keep_request(waiting, oldest).await) {
            // it may have been answered and dropped meanwhile
            let _ = meetings.drop_request(&id, Some(owner), number, Instant::now());
            return Err(refusal);
        }
    }
    Ok((StatusCode::CREATED, [(NUMBER_HEADER, number.to_string())]).into_response())
}

async fn asked(
    State(inner): State<Arc<Inner>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (id, owner) = (parse(&id)?, owner(&headers));
    let meetings = &inner.relay.meetings;
    let waited = headers.get(WAITED_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    let waited = Duration::from_secs(waited.unwrap_or(0)).min(POLL);
    let found = inner.unless_stopped(wait_for(|| meetings.asked(&id, owner, waited, Instant::now()))).await?;
    Ok(match found {
        Some(Asked { number, age, request }) => {
            let said = [(NUMBER_HEADER, number.to_string()), (AGE_HEADER, age.as_secs().to_string())];
            (said, request).into_response()
        }
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

async fn drop_request(
    State(inner): State<Arc<Inner>>,
    Path((id, number)): Path<(String, u32)>,
    headers: HeaderMap,
) -> Result<StatusCode, Refusal> {
    let id = parse(&id)?;
    inner.relay.meetings.drop_request(&id, owner(&headers), number, Instant::now())?;
    durable(inner.relay.storage.forget_requests(id, Some(number)).await)?;
    Ok(StatusCode::NO_CONTENT)
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
    if meetings.answer(&id, owner, number, answer.clone(), Instant::now())? {
        // where that fails, and the relay ends, the request is answered again
        durable(inner.relay.storage.keep_answer(id, number, answer.into()).await)?;
    }
    Ok(StatusCode::CREATED)
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

    /// A request of full length unlike others.
    fn filled(number: usize) -> Bytes {
        let mut bytes = number.to_be_bytes().to_vec();
        bytes.resize(MAX_REQUEST, 0);
        bytes.into()
    }

    /// The number of the next request to answer.
    fn next(meetings: &Meetings, waited: Duration, now: Instant) -> Result<Option<u32>, Refusal> {
        let looked = meetings.asked(&[1; 16], Some([9; 16]), waited, now)?;
        Ok(looked.ok().map(|asked| asked.number))
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
        assert_eq!(meetings.ask(FROM, &[1; 16], &record(), now), Ok((1, Some([9; 16]))));
        for owner in [None, Some([8; 16])] {
            assert!(meetings.asked(&[1; 16], owner, Duration::ZERO, now).is_err());
            assert_eq!(meetings.answer(&[1; 16], owner, 1, record(), now), Err(Refusal::NotThere));
            assert_eq!(meetings.withdraw(&[1; 16], owner, now), Err(Refusal::NotThere));
        }
        assert_eq!(next(&meetings, Duration::ZERO, now), Ok(Some(1)));
        assert!(meetings.answered(&[1; 16], 1, now).is_ok_and(|looked| looked.is_err()), "not yet");
        assert_eq!(meetings.answer(&[1; 16], Some([9; 16]), 2, record(), now), Err(Refusal::Full));
        assert_eq!(meetings.answer(&[1; 16], Some([9; 16]), 1, record(), now), Ok(true));
        for _ in 0..2 {
            assert_eq!(meetings.answered(&[1; 16], 1, now).ok().and_then(Result::ok), Some(record()));
        }
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
        let asked = (0..99).take_while(|at| meetings.ask(FROM, &id(0), &vec![*at].into(), now).is_ok()).count();
        assert_eq!(asked, MAX_REQUESTS);
        let ask = |at: usize, who: IpAddr| meetings.ask(who, &id(at / MAX_REQUESTS), &filled(at), now);
        let of_one = (MAX_REQUESTS..MAX_MEETINGS * MAX_REQUESTS).filter(|at| ask(*at, FROM).is_ok()).count();
        assert_eq!(of_one, MAX_OWN_BYTES / MAX_REQUEST);
        // what was left before has its number
        let of_all =
            (MAX_REQUESTS + of_one..MAX_MEETINGS * MAX_REQUESTS).filter(|at| ask(*at, from(*at)).is_ok()).count();
        assert_eq!(of_one + of_all, MAX_REQUEST_BYTES / MAX_REQUEST);
        lock(&meetings.kept).forget(now + REQUEST_LIFETIME);
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
        assert_eq!(meetings.ask(from(2), &[0; 16], &record(), now), Ok((1, Some([9; 16]))));
        let reserve = |number| meetings.reserve(&[0; 16], Some([9; 16]), number, MAX_OWN_BYTES / 2, now);
        assert_eq!(reserve(2).err(), Some(Refusal::Full), "nobody asked that");
        let (one, other) = (reserve(1).ok(), reserve(1).ok());
        assert!(one.is_some() && other.is_some());
        assert!(matches!(reserve(1).err(), Some(Refusal::TooFast(_))));
        drop(one);
        assert!(reserve(1).is_ok());
        drop(other);
        assert_eq!(meetings.answer(&[0; 16], Some([9; 16]), 1, record(), now), Ok(true));
        assert_eq!(reserve(1).err(), Some(Refusal::Full), "it is answered");
        assert!(publish(50, now + LIFETIME).is_ok(), "the others are over");
        assert_eq!(meetings.withdraw(&[50; 16], Some([9; 16]), now + LIFETIME), Ok(()));
        assert_eq!(meetings.drop_request(&[0; 16], Some([9; 16]), 1, now + LIFETIME), Ok(()));
        lock(&meetings.kept).forget(now + LIFETIME);
        assert!(holds_nothing(&meetings));
    }

    #[test]
    fn a_request_is_given_to_one_at_a_time_and_to_who_holds_back_only_after_a_while() {
        let (meetings, now) = (Meetings::new(RATES), Instant::now());
        meetings.publish(FROM, [1; 16], [9; 16], record(), now).unwrap();
        assert_eq!(next(&meetings, Duration::ZERO, now), Ok(None));
        meetings.ask(FROM, &[1; 16], &record(), now).unwrap();
        assert_eq!(meetings.ask(FROM, &[1; 16], &record(), now), Ok((1, None)), "the same again has its number");
        let later = |seconds| now + Duration::from_secs(seconds);
        let waited = Duration::from_secs(5);
        assert_eq!(next(&meetings, waited, later(4)), Ok(None));
        assert_eq!(next(&meetings, waited, later(5)), Ok(Some(1)));
        assert_eq!(next(&meetings, Duration::ZERO, later(19)), Ok(None), "somebody has it");
        assert_eq!(next(&meetings, Duration::ZERO, later(20)), Ok(Some(1)), "who had it did not answer");
        meetings.answer(&[1; 16], Some([9; 16]), 1, record(), later(20)).unwrap();
        assert_eq!(next(&meetings, Duration::ZERO, later(60)), Ok(None));
    }

    #[test]
    fn a_request_that_was_left_in_time_waits_for_days_and_over_a_restart_and_none_is_left_later() {
        let (meetings, now) = (Meetings::new(RATES), Instant::now());
        meetings.publish(FROM, [1; 16], [9; 16], record(), now).unwrap();
        assert_eq!(meetings.ask(FROM, &[1; 16], &record(), now), Ok((1, Some([9; 16]))));
        let restarted = Meetings::new(RATES);
        let waiting = WaitingRequest {
            place: [1; 16],
            number: 1,
            owner: [9; 16],
            left: Timestamp(5_000),
            request: record().into(),
            answer: None,
        };
        restarted.restore(vec![waiting], Timestamp(5_000), now);
        for meetings in [meetings, restarted] {
            let at = now + LIFETIME;
            assert_eq!(meetings.ask(FROM, &[1; 16], &filled(1), at), Err(Refusal::NotThere));
            assert_eq!(meetings.ask(FROM, &[1; 16], &record(), at), Ok((1, None)), "what is here is");
            assert_eq!(meetings.count(), 0);
            let late = now + REQUEST_LIFETIME - Duration::from_secs(1);
            let asked = meetings.asked(&[1; 16], Some([9; 16]), Duration::ZERO, late).ok().and_then(Result::ok);
            assert_eq!(asked.map(|asked| asked.age), Some(REQUEST_LIFETIME - Duration::from_secs(1)));
            assert_eq!(meetings.answer(&[1; 16], Some([9; 16]), 1, record(), late), Ok(true));
            assert_eq!(next(&meetings, Duration::ZERO, late), Err(Refusal::NotThere), "nobody is to be answered");
            assert_eq!(meetings.answered(&[1; 16], 1, late).ok().and_then(Result::ok), Some(record()));
            assert!(meetings.answered(&[1; 16], 1, now + REQUEST_LIFETIME).is_err());
            assert!(holds_nothing(&meetings));
        }
    }

    #[test]
    fn requests_that_wait_for_days_leave_room_for_others() {
        let (meetings, now) = (Meetings::new(Rates { create: 5000, fetch: 50_000, missed: 3 }), Instant::now());
        let id = |number: usize| u128::try_from(number).unwrap().to_be_bytes();
        for at in 0..MAX_LASTING {
            meetings.publish(from(at / MAX_OWN_MEETINGS), id(at), [9; 16], record(), now).unwrap();
        }
        let lasts = |who: usize, at: usize| meetings.ask(from(who), &id(at), &filled(who * 100 + at), now).unwrap().1;
        let of_one = (0..20).filter(|at| lasts(1, *at).is_some()).count();
        assert_eq!(of_one, MAX_OWN_LASTING);
        let of_all = (0..MAX_LASTING).filter(|at| lasts(100 + at, *at).is_some()).count();
        assert_eq!(of_one + of_all, MAX_LASTING);
        lock(&meetings.kept).forget(now + LIFETIME);
        assert_eq!(lock(&meetings.kept).requests().count(), MAX_LASTING);
        assert!(lock(&meetings.kept).request_bytes * 2 < MAX_REQUEST_BYTES);
        // an answer that is too long to be kept for days is given for as long as a record is
        let long = Bytes::from(vec![0; MAX_LASTING_ANSWERS + 1]);
        let waits = id(0);
        let number = *lock(&meetings.kept).meetings[&waits].requests.keys().next().unwrap();
        let answered = now + LIFETIME;
        assert_eq!(meetings.answer(&waits, Some([9; 16]), number, long, answered), Ok(false));
        let is_there = |at| meetings.answered(&waits, number, at).is_ok_and(|looked| looked.is_ok());
        assert!(is_there(answered) && !is_there(answered + LIFETIME));
        assert_eq!(lock(&meetings.kept).answer_bytes, 0);
    }
}
