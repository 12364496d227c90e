//! Pairing through a relay: the joiner leaves its request where the invite's record was, the inviter leaves its answer.
//!
//! Both are sealed under keys of the code, and the relay sees two addresses and two sizes.
//! What a channel's binding is elsewhere is here made of what the joiner drew for this one try.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use sync_core::connection::back_off;
use sync_core::pairing::REQUEST_LIFETIME_MS;
use sync_crypto::{AuthorSecret, InviteKeys};
use sync_link::relay::meeting::{Asked, Meeting, MeetingError, POLL};
use sync_link::relay::{RelayError, RelayUrl};
use sync_link::rendezvous::{Lookup, LookupId as Place, RendezvousError};
use sync_types::{DeviceId, ErrorCode, Frame, InviteId, InviteState, PendingJoin, Relayed, Timestamp};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    JoinProgress, Request, Whereabouts, answer_to, lock, millis, note_joined, record, request, take_grant, words,
};
use crate::device::Inner;
use crate::error::ClientError;
use crate::group::{Group, now};
use crate::keys::{draw, with_rng};
use crate::{punching, relays, secrets};

/// Time for a relay to take a new code before the code is shown; one that takes it later is used then.
const PUBLISH_WAIT: Duration = Duration::from_secs(3);
/// Wait after a relay could not be asked, or did not want to be.
const AGAIN: Duration = Duration::from_secs(10);
/// Wait before a relay that gave nothing of use at once is asked again; it grows.
const PAUSE: Duration = Duration::from_secs(1);
/// Time for the inviter to answer through the relay.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// Time for which a request that waits is asked after all the time.
const IMPATIENT: Duration = Duration::from_secs(600);
/// Wait between two questions after one that waits longer.
const SELDOM: Duration = Duration::from_secs(60);
/// Time for which requests are left to who made the invite, and half of it more by chance: not all answer then.
const HOLD_BACK: Duration = Duration::from_secs(4);
/// Answers whose joiners may still say that they have them.
const MAX_ANSWERED: usize = 8;

/// What stands for the channel of one try.
fn binding(nonce: &[u8; 32], joiner: &DeviceId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("syncshell v1 pairing through a relay");
    *hasher.update(nonce).update(&joiner.0).finalize().as_bytes()
}

/// Asks a relay for the record of a code, once.
pub(super) fn lookup(device: &Arc<Inner>, url: &RelayUrl, place: Place) -> Lookup {
    let (device, url) = (device.clone(), url.clone());
    Lookup::spawn("relay", async move |mut sink| match fetch(&device, &url, place).await {
        Ok(record) => sink.candidate(&record).await,
        Err(MeetingError::NotThere) => {}
        Err(error) => sink.warn(RendezvousError::Meeting(error)).await,
    })
}

/// Takes the record of a code, and is let in for a while where connections begin.
pub(super) async fn fetch(device: &Inner, url: &RelayUrl, place: Place) -> Result<Vec<u8>, MeetingError> {
    let pass = punching::pass_of_guest(device, url);
    let record = Meeting::new(url, place).fetch(pass.as_ref()).await?;
    if let Some(pass) = pass {
        punching::use_relay(device, url, &pass).await;
    }
    Ok(record.to_vec())
}

/// Why nobody was joined through a relay.
#[derive(Debug)]
pub(super) enum JoinError {
    /// It knows nothing of the code.
    NotThere,
    /// It could not be asked, or what it gives was not made with the code: another may be honest.
    Relay(String),
    /// Nobody is there who could answer; the request stays there.
    Waits,
    /// The inviter answered, or it is of no use to ask anyone.
    Ended(ClientError),
}

impl std::fmt::Display for JoinError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotThere => f.write_str("the relay knows no such code"),
            Self::Relay(text) => f.write_str(text),
            Self::Waits => f.write_str("nobody has answered yet"),
            Self::Ended(error) => error.fmt(f),
        }
    }
}

impl From<MeetingError> for JoinError {
    fn from(error: MeetingError) -> Self {
        match error {
            MeetingError::NotThere => Self::NotThere,
            error => Self::Relay(error.to_string()),
        }
    }
}

impl From<ClientError> for JoinError {
    fn from(error: ClientError) -> Self {
        Self::Ended(error)
    }
}

/// Joins through a relay; a request that nobody answers at once waits there.
pub(super) async fn join(
    device: &Arc<Inner>,
    url: &RelayUrl,
    keys: &InviteKeys,
    progress: &(dyn Fn(JoinProgress) + Send + Sync),
) -> Result<Arc<Group>, JoinError> {
    let invite = keys.invite_id();
    let place = url.without_token().to_string();
    // durable before it is shown to anyone, so that a crash from here on leads to the same admission
    let author = secrets::joining_author(&device.shared, invite).await?;
    let pending = match secrets::pending(&device.shared, invite, &place).await {
        Some(pending) => pending,
        None => {
            let pending = Exchange::new(device, keys, &author, draw(&device.shared.rng)).pending(place)?;
            secrets::put_pending(&device.shared, invite, &pending).await?;
            pending
        }
    };
    let waiting = Waiting { device: device.clone(), url: url.clone(), keys: keys.clone(), pending };
    let number = match waiting.ask().await {
        Ok(number) => number,
        Err(error) => {
            waiting.forget().await;
            return Err(error.into());
        }
    };
    progress(JoinProgress::Found { by: format!("relay {}", url.authority()) });
    let answer = tokio::time::timeout(ANSWER_WAIT, waiting.answer(number)).await;
    let answer = match answer.map_err(|_| JoinError::Waits)? {
        Ok(answer) => answer,
        Err(error) => {
            waiting.forget().await;
            return Err(match error {
                // it knew the code when it was asked
                MeetingError::NotThere => JoinError::Relay("the relay forgot the request".to_owned()),
                error => error.into(),
            });
        }
    };
    let (group, name) = waiting.take(number, &answer).await?;
    progress(JoinProgress::Joined { group: group.id, name });
    Ok(group)
}

/// Waits for answers to what this device left at relays, by every invite or by one.
pub(crate) async fn resume(device: &Arc<Inner>, only: Option<InviteId>) -> Result<(), ClientError> {
    for pending in secrets::all_pending(&device.shared).await? {
        let keys = InviteKeys::from_prk(pending.prk);
        let (invite, relay) = (keys.invite_id(), pending.relay.clone());
        if only.is_some_and(|only| only != invite) {
            continue;
        }
        let Some(url) = relay.parse().ok().filter(|_| now() < pending.until) else {
            secrets::forget_pending(&device.shared, invite, &relay).await?;
            continue;
        };
        let stop = lock(&device.joining).entry(invite).or_insert_with(|| device.closed().child_token()).clone();
        let waiting = Waiting { device: device.clone(), url, keys, pending };
        device.spawn(async move { waiting.run(&stop).await });
    }
    Ok(())
}

/// Ends waiting for answers to an invite.
pub(super) fn stop_waiting(device: &Inner, invite: InviteId) {
    if let Some(waiting) = lock(&device.joining).remove(&invite) {
        waiting.cancel();
    }
}

/// A request that was left at a relay, and waits there for an answer.
struct Waiting {
    device: Arc<Inner>,
    url: RelayUrl,
    keys: InviteKeys,
    pending: PendingJoin,
}

impl Waiting {
    fn meeting(&self) -> Meeting {
        Meeting::new(&self.url, Place(self.keys.lookup_id().0))
    }

    async fn ask(&self) -> Result<u32, MeetingError> {
        self.meeting().ask(&self.pending.request).await
    }

    async fn answer(&self, number: u32) -> Result<Vec<u8>, MeetingError> {
        let meeting = self.meeting();
        loop {
            if let Some(answer) = meeting.answered(number).await? {
                return Ok(answer.to_vec());
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Takes an answer in; the request is over then, here and there.
    async fn take(&self, number: u32, answer: &[u8]) -> Result<(Arc<Group>, String), JoinError> {
        let Ok(plain) = self.keys.open_answer(&self.pending.nonce, answer) else {
            self.forget().await;
            return Err(JoinError::Relay("what the relay gives was not made with the code".to_owned()));
        };
        let author = secrets::joining_author(&self.device.shared, self.keys.invite_id()).await?;
        let exchange = Exchange::new(&self.device, &self.keys, &author, self.pending.nonce);
        let taken = {
            let _one = self.device.taking.lock().await;
            exchange.take(&plain, &self.url).await
        };
        let meeting = self.meeting();
        if taken.is_ok() {
            // if that is lost, the inviter's invite ends by itself
            let joined = exchange.seal(&Frame::Joined);
            if let Err(error) = async { meeting.ask(&joined?).await }.await {
                tracing::debug!(%error, "the inviter was not told");
            }
        }
        if let Err(error) = meeting.forget(&self.keys.relay_owner(), number).await {
            tracing::debug!(%error, "the relay keeps the request until it is old");
        }
        self.forget().await;
        Ok(taken?)
    }

    async fn forget(&self) {
        let forgotten = secrets::forget_pending(&self.device.shared, self.keys.invite_id(), &self.pending.relay);
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "a request to join could not be forgotten");
        }
    }

    /// Waits for an answer until there is one, or none can come any more.
    async fn run(self, stop: &CancellationToken) {
        let relay = self.url.authority();
        let answered = tokio::select! {
            answered = self.patiently() => answered,
            () = stop.cancelled() => return,
        };
        let Some((number, answer)) = answered else {
            tracing::warn!(%relay, "a request to join waits no longer: the relay has forgotten it, or it is too old");
            return self.forget().await;
        };
        match self.take(number, &answer).await {
            Ok((group, _)) => {
                tracing::info!(group = %group.id, "joined a group: the request that waited at a relay was answered");
            }
            Err(error) => tracing::warn!(%relay, %error, "a request to join that waited at a relay came to nothing"),
        }
    }

    async fn patiently(&self) -> Option<(u32, Vec<u8>)> {
        let (began, mut failed) = (Instant::now(), 0);
        while now() < self.pending.until {
            let asking = async {
                let number = self.ask().await?;
                Ok::<_, MeetingError>((number, self.meeting().answered(number).await?))
            };
            let pause = match asking.await {
                Ok((number, Some(answer))) => return Some((number, answer.to_vec())),
                Ok(_) => {
                    failed = 0;
                    // whoever is online answers within seconds; later it is somebody who comes back
                    if began.elapsed() < IMPATIENT { PAUSE } else { SELDOM }
                }
                Err(MeetingError::NotThere) => return None,
                Err(error) => {
                    tracing::debug!(relay = %self.url.authority(), %error, "the relay cannot be asked for an answer");
                    failed += 1;
                    AGAIN + back_off(failed, self.device.jitter())
                }
            };
            tokio::time::sleep(pause).await;
        }
        None
    }
}

/// One try to join.
struct Exchange<'a> {
    device: &'a Arc<Inner>,
    keys: &'a InviteKeys,
    author: &'a AuthorSecret,
    nonce: [u8; 32],
}

impl<'a> Exchange<'a> {
    fn new(device: &'a Arc<Inner>, keys: &'a InviteKeys, author: &'a AuthorSecret, nonce: [u8; 32]) -> Self {
        Self { device, keys, author, nonce }
    }

    fn binding(&self) -> [u8; 32] {
        binding(&self.nonce, &self.device.device_id())
    }

    /// The request, as it is left at a relay and kept here.
    fn pending(&self, relay: String) -> Result<PendingJoin, MeetingError> {
        let request = self.seal(&request(self.device, self.keys, self.author, &self.binding()))?;
        let until = Timestamp(now().0.saturating_add(REQUEST_LIFETIME_MS));
        Ok(PendingJoin { prk: *self.keys.expose_prk(), nonce: self.nonce, relay, until, request })
    }

    fn seal(&self, frame: &Frame) -> Result<Vec<u8>, MeetingError> {
        let message = Relayed { nonce: self.nonce, device: self.device.device_id(), frame: frame.encode() };
        let plain = message.encode().map_err(|error| RelayError::Lost(error.to_string()))?;
        Ok(with_rng(&self.device.shared.rng, |rng| self.keys.seal_request(&plain, rng)))
    }

    /// Takes in an answer that was made with the code.
    async fn take(&self, plain: &[u8], url: &RelayUrl) -> Result<(Arc<Group>, String), ClientError> {
        let message = Relayed::decode(plain).map_err(|error| ClientError::InviteForged(error.to_string()))?;
        if message.nonce != self.nonce {
            return Err(ClientError::InviteForged("it answers another request".to_owned()));
        }
        if message.device == self.device.device_id() {
            return Err(ClientError::InviteMalformed("this device made that invite itself".to_owned()));
        }
        let by = format!("relay {}", url.authority());
        let inviter = Whereabouts { by, device: message.device, addresses: Vec::new(), expires: None };
        take_grant(self.device, self.keys, self.author, &self.binding(), &inviter, &message.frame).await
    }
}

/// Answers an invite at relays until `stop`; returns once each has it, or does not take it at once.
pub(super) async fn attend_all(
    device: &Arc<Inner>,
    group: &Arc<Group>,
    keys: &InviteKeys,
    expires: Timestamp,
    at: &[RelayUrl],
    ours: bool,
    stop: &CancellationToken,
) {
    let (mut published, used) = (Vec::new(), relays::used(group).await);
    for url in at.iter().filter(|url| url.takes_codes()) {
        let (told, tells) = oneshot::channel();
        let attendant = Attendant {
            device: device.clone(),
            group: group.clone(),
            keys: keys.clone(),
            expires,
            ours,
            hold_back: if ours { Duration::ZERO } else { HOLD_BACK + Duration::from_secs(device.jitter() % 3) },
            place: url.authority(),
            meeting: Meeting::new(url, Place(keys.lookup_id().0)),
            answered: VecDeque::new(),
        };
        // one that was only named for the code stays as long as that
        let while_used = used.contains(url).then(|| url.clone());
        device.spawn(attendant.run(told, while_used, stop.clone()));
        if ours {
            published.push(tokio::time::timeout(PUBLISH_WAIT, tells));
        }
    }
    join_all(published).await;
}

/// What came of asking a relay once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It has the record.
    Published,
    /// Nobody asked, or nobody with a right to it, or again.
    Nothing,
    /// Who asked was let in.
    Admitted,
}

/// What to do about a request.
enum Said {
    /// It is answered so.
    Answer(Vec<u8>, Step),
    /// It needs no answer, or does not come from who knows the code.
    Nothing,
    /// It cannot be answered at present.
    Later,
}

/// Answers an invite at one relay.
struct Attendant {
    device: Arc<Inner>,
    group: Arc<Group>,
    keys: InviteKeys,
    expires: Timestamp,
    /// This device made the invite.
    ours: bool,
    /// Time for which requests are left to others.
    hold_back: Duration,
    place: String,
    meeting: Meeting,
    /// Requests that were granted, by what their joiners drew.
    answered: VecDeque<([u8; 32], DeviceId, Request)>,
}

impl Attendant {
    async fn run(mut self, told: oneshot::Sender<()>, while_used: Option<RelayUrl>, stop: CancellationToken) {
        let (owner, group) = (self.keys.relay_owner(), self.group.clone());
        let unused = async {
            match &while_used {
                Some(url) => relays::until_unused(&group, url).await,
                None => std::future::pending().await,
            }
        };
        let removed = tokio::select! {
            () = unused => true,
            () = self.attend(&owner, told) => false,
            () = stop.cancelled() => false,
        };
        // who is let in by somebody else is to find it there
        if self.ours && (removed || !self.may_wait().await) {
            // it may have been forgotten there before
            let _ = self.meeting.withdraw(&owner).await;
        }
    }

    async fn attend(&mut self, owner: &[u8; 16], told: oneshot::Sender<()>) {
        let (mut told, mut published, mut useless) = (Some(told), false, 0);
        loop {
            let began = Instant::now();
            let is_open = now() < self.expires;
            let wait = match self.step(owner, published || !self.ours || !is_open).await {
                Ok(step) => {
                    published = true;
                    // who waited may have gone
                    told.take().map(|told| told.send(()));
                    if step == Step::Admitted || began.elapsed() > POLL / 2 {
                        useless = 0;
                    }
                    if step != Step::Nothing || began.elapsed() > POLL / 2 {
                        continue;
                    }
                    PAUSE
                }
                // no request can be left any more, and none waits
                Err(MeetingError::NotThere) if !is_open || !self.may_wait().await => return,
                // its time is up there, or the relay was started anew; or who made the invite has not left it yet
                Err(MeetingError::NotThere) => {
                    published = false;
                    PAUSE
                }
                Err(error) => {
                    tracing::warn!(relay = %self.place, %error, "the code cannot be used through the relay");
                    AGAIN
                }
            };
            // whatever the relay does, it does not keep this device busy
            useless += 1;
            tokio::time::sleep(wait + back_off(useless, self.device.jitter())).await;
        }
    }

    /// Whether somebody may still be let in.
    async fn may_wait(&self) -> bool {
        let (group, invite) = (self.group.id, self.keys.invite_id());
        let status = self.group.store().read(move |reader| reader.invite(&group, &invite)).await;
        // a home that is being closed answers again when it is opened
        let Ok(status) = status else { return true };
        let membership = self.group.membership();
        status.is_some_and(|status| status.seen_in(&invite, &membership, None).may_wait(now()))
    }

    async fn step(&mut self, owner: &[u8; 16], published: bool) -> Result<Step, MeetingError> {
        if !published {
            let record = record(&self.device, &self.keys, InviteState::Open, self.expires);
            return self.meeting.publish(owner, &record).await.map(|()| Step::Published);
        }
        let Some(Asked { number, age, request }) = self.meeting.asked(owner, self.hold_back).await? else {
            return Ok(Step::Nothing);
        };
        match self.answer(&request, age).await {
            Said::Answer(answer, step) => {
                self.meeting.answer(owner, number, &answer).await?;
                Ok(step)
            }
            Said::Nothing => {
                self.meeting.forget(owner, number).await?;
                Ok(Step::Nothing)
            }
            Said::Later => Ok(Step::Nothing),
        }
    }

    /// What to do about a request that was left for some time.
    async fn answer(&mut self, sealed: &[u8], age: Duration) -> Said {
        let opened = self.keys.open_request(sealed).ok().and_then(|plain| Relayed::decode(&plain).ok());
        let said = opened.and_then(|message| Frame::decode(&message.frame).ok().map(|frame| (frame, message)));
        let Some((frame, message)) = said else {
            self.device.count_refused();
            return Said::Nothing;
        };
        if matches!(frame, Frame::Joined) {
            if let Some((_, its, request)) = self.answered.iter().find(|(nonce, ..)| *nonce == message.nonce) {
                note_joined(&self.device, &self.group, request, *its).await;
            }
            return Said::Nothing;
        }
        let Some(request) = Request::of(frame) else {
            self.device.count_refused();
            return Said::Nothing;
        };
        // what the relay says of its age shortens an invite's time, and lengthens it only by what it lies
        let asked = Timestamp(now().0.saturating_sub(millis(age)));
        let answered = if request.invite == self.keys.invite_id() {
            answer_to(&self.device, &request, &binding(&message.nonce, &message.device), asked).await
        } else {
            Err(ErrorCode::InviteWrong)
        };
        let (frame, step) = match answered {
            Ok((_, grant)) => {
                // what comes again is the relay's doing
                let known = self.answered.iter().any(|(nonce, ..)| *nonce == message.nonce);
                if !known {
                    self.answered.truncate(MAX_ANSWERED - 1);
                    self.answered.push_front((message.nonce, message.device, request));
                }
                (Frame::Grant(grant), if known { Step::Nothing } else { Step::Admitted })
            }
            // another may, or this one later
            Err(ErrorCode::Unavailable) => return Said::Later,
            Err(refusal) => {
                self.device.count_refused();
                tracing::debug!(?refusal, "join refused");
                (Frame::error(refusal, words(refusal)), Step::Nothing)
            }
        };
        let answer = Relayed { nonce: message.nonce, device: self.device.device_id(), frame: frame.encode() };
        let Ok(plain) = answer.encode() else { return Said::Nothing };
        let sealed = with_rng(&self.device.shared.rng, |rng| self.keys.seal_answer(&message.nonce, &plain, rng));
        Said::Answer(sealed, step)
    }
}
