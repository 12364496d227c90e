//! Pairing through a relay: the joiner leaves its request where the invite's record was, the inviter leaves its answer.
//!
//! Both are sealed under keys of the code, and the relay sees two addresses and two sizes.
//! What a channel's binding is elsewhere is here made of what the joiner drew for this one try.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use sync_core::connection::back_off;
use sync_crypto::{AuthorSecret, InviteKeys};
use sync_link::relay::meeting::{Meeting, MeetingError, POLL};
use sync_link::relay::{RelayError, RelayUrl};
use sync_link::rendezvous::{Lookup, LookupId as Place, RendezvousError};
use sync_types::{DeviceId, Frame, InviteState, Relayed, Timestamp};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{JoinProgress, Request, Whereabouts, answer_to, note_joined, record, request, take_grant, words};
use crate::device::Inner;
use crate::error::ClientError;
use crate::group::{Group, now};
use crate::keys::{draw, with_rng};
use crate::{relays, secrets};

/// Time for a relay to take a new code before the code is shown; one that takes it later is used then.
const PUBLISH_WAIT: Duration = Duration::from_secs(3);
/// Wait after a relay could not be asked, or did not want to be.
const AGAIN: Duration = Duration::from_secs(10);
/// Wait before a relay that gave nothing of use at once is asked again; it grows.
const PAUSE: Duration = Duration::from_secs(1);
/// Time for the inviter to answer through the relay.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// Answers whose joiners may still say that they have them.
const MAX_ANSWERED: usize = 8;

/// What stands for the channel of one try.
fn binding(nonce: &[u8; 32], joiner: &DeviceId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("syncshell v1 pairing through a relay");
    *hasher.update(nonce).update(&joiner.0).finalize().as_bytes()
}

/// Asks a relay for the record of a code, once.
pub(super) fn lookup(url: &RelayUrl, place: Place) -> Lookup {
    let meeting = Meeting::new(url, place);
    Lookup::spawn("relay", async move |mut sink| match meeting.fetch().await {
        Ok(record) => sink.candidate(&record).await,
        Err(MeetingError::NotThere) => {}
        Err(error) => sink.warn(RendezvousError::Meeting(error)).await,
    })
}

/// Why nobody was joined through a relay.
pub(super) enum JoinError {
    /// It knows nothing of the code.
    NotThere,
    /// It could not be asked, or what it gives was not made with the code: another may be honest.
    Relay(String),
    /// The inviter answered, or it is of no use to ask anyone.
    Ended(ClientError),
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

/// Joins through a relay.
pub(super) async fn join(
    device: &Arc<Inner>,
    url: &RelayUrl,
    keys: &InviteKeys,
    progress: &(dyn Fn(JoinProgress) + Send + Sync),
) -> Result<Arc<Group>, JoinError> {
    let meeting = Meeting::new(url, Place(keys.lookup_id().0));
    let shared = &device.shared;
    // durable before it is shown to anyone, so that a crash from here on leads to the same admission
    let author = secrets::joining_author(shared, keys.invite_id()).await?;
    let exchange = Exchange { device, keys, author, nonce: draw(&shared.rng) };
    let number = exchange.ask(&meeting).await?;
    progress(JoinProgress::Found { by: format!("relay {}", url.authority()) });
    let answering = async {
        loop {
            if let Some(answer) = meeting.answered(number).await? {
                return Ok::<_, MeetingError>(answer);
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    let answer = tokio::time::timeout(ANSWER_WAIT, answering).await;
    let silent = |_| JoinError::Relay("the device that made the invite does not answer".to_owned());
    let answer = match answer.map_err(silent)? {
        // it knew the code when it was asked
        Err(MeetingError::NotThere) => return Err(JoinError::Relay("the relay forgot the request".to_owned())),
        answer => answer?,
    };
    let Ok(plain) = exchange.keys.open_answer(&exchange.nonce, &answer) else {
        return Err(JoinError::Relay("what the relay gives was not made with the code".to_owned()));
    };
    let (group, name) = exchange.take(&plain, url).await?;
    // if that is lost, the inviter's invite ends by itself
    if let Err(error) = exchange.send(&meeting, &Frame::Joined).await {
        tracing::debug!(%error, "the inviter was not told");
    }
    progress(JoinProgress::Joined { group: group.id, name });
    Ok(group)
}

/// One try to join.
struct Exchange<'a> {
    device: &'a Arc<Inner>,
    keys: &'a InviteKeys,
    author: AuthorSecret,
    nonce: [u8; 32],
}

impl Exchange<'_> {
    fn binding(&self) -> [u8; 32] {
        binding(&self.nonce, &self.device.device_id())
    }

    async fn ask(&self, meeting: &Meeting) -> Result<u32, MeetingError> {
        self.send(meeting, &request(self.device, self.keys, &self.author, &self.binding())).await
    }

    async fn send(&self, meeting: &Meeting, frame: &Frame) -> Result<u32, MeetingError> {
        let message = Relayed { nonce: self.nonce, device: self.device.device_id(), frame: frame.encode() };
        let plain = message.encode().map_err(|error| RelayError::Lost(error.to_string()))?;
        meeting.ask(&with_rng(&self.device.shared.rng, |rng| self.keys.seal_request(&plain, rng))).await
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
        take_grant(self.device, self.keys, &self.author, &self.binding(), &inviter, &message.frame).await
    }
}

/// Answers an invite at relays until `stop`; returns once each has it, or does not take it at once.
pub(super) async fn attend_all(
    device: &Arc<Inner>,
    group: &Arc<Group>,
    keys: &InviteKeys,
    expires: Timestamp,
    at: &[RelayUrl],
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
            place: url.authority(),
            meeting: Meeting::new(url, Place(keys.lookup_id().0)),
            answered: VecDeque::new(),
        };
        // one that was only named for the code stays as long as that
        let while_used = used.contains(url).then(|| url.clone());
        device.spawn(attendant.run(told, while_used, stop.clone()));
        published.push(tokio::time::timeout(PUBLISH_WAIT, tells));
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

/// Answers an invite at one relay.
struct Attendant {
    device: Arc<Inner>,
    group: Arc<Group>,
    keys: InviteKeys,
    expires: Timestamp,
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
        tokio::select! {
            () = unused => {}
            () = self.attend(&owner, told) => {}
            () = stop.cancelled() => {}
        }
        // it may have been forgotten there before
        let _ = self.meeting.withdraw(&owner).await;
    }

    async fn attend(&mut self, owner: &[u8; 16], told: oneshot::Sender<()>) {
        let (mut told, mut published, mut useless) = (Some(told), false, 0);
        loop {
            let began = Instant::now();
            match self.step(owner, published).await {
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
                }
                // its time is up there, or the relay was started anew
                Err(MeetingError::NotThere) if published && self.is_open().await => published = false,
                Err(MeetingError::NotThere) => return,
                Err(error) => {
                    tracing::warn!(relay = %self.place, %error, "the code cannot be used through the relay");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            }
            // whatever the relay does, it does not keep this device busy
            useless += 1;
            tokio::time::sleep(PAUSE + back_off(useless, self.device.jitter())).await;
        }
    }

    async fn is_open(&self) -> bool {
        let (group, invite) = (self.group.id, self.keys.invite_id());
        let status = self.group.store().read(move |reader| reader.invite(&group, &invite)).await;
        status.ok().flatten().is_some_and(|status| status.state_at(now()) == InviteState::Open)
    }

    async fn step(&mut self, owner: &[u8; 16], published: bool) -> Result<Step, MeetingError> {
        if !published {
            let record = record(&self.device, &self.keys, InviteState::Open, self.expires);
            return self.meeting.publish(owner, &record).await.map(|()| Step::Published);
        }
        let Some((number, sealed)) = self.meeting.asked(owner).await? else { return Ok(Step::Nothing) };
        let Some((answer, step)) = self.answer(&sealed).await else { return Ok(Step::Nothing) };
        self.meeting.answer(owner, number, &answer).await?;
        Ok(step)
    }

    /// The answer to a request; none to one that needs none, or does not come from who knows the code.
    async fn answer(&mut self, sealed: &[u8]) -> Option<(Vec<u8>, Step)> {
        let opened = self.keys.open_request(sealed).ok().and_then(|plain| Relayed::decode(&plain).ok());
        let said = opened.and_then(|message| Frame::decode(&message.frame).ok().map(|frame| (frame, message)));
        let Some((frame, message)) = said else {
            self.device.count_refused();
            return None;
        };
        if matches!(frame, Frame::Joined) {
            if let Some((_, its, request)) = self.answered.iter().find(|(nonce, ..)| *nonce == message.nonce) {
                note_joined(&self.device, &self.group, request, *its).await;
            }
            return None;
        }
        let Some(request) = Request::of(frame) else {
            self.device.count_refused();
            return None;
        };
        let answered = if request.invite == self.keys.invite_id() {
            answer_to(&self.device, &request, &binding(&message.nonce, &message.device)).await
        } else {
            Err(sync_types::ErrorCode::InviteWrong)
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
            Err(refusal) => {
                self.device.count_refused();
                tracing::debug!(?refusal, "join refused");
                (Frame::error(refusal, words(refusal)), Step::Nothing)
            }
        };
        let answer = Relayed { nonce: message.nonce, device: self.device.device_id(), frame: frame.encode() };
        let plain = answer.encode().ok()?;
        let sealed = with_rng(&self.device.shared.rng, |rng| self.keys.seal_answer(&message.nonce, &plain, rng));
        Some((sealed, step))
    }
}
