//! Pairing over a connection or through a relay: makes invites, answers them, and joins by code or link.

pub(crate) mod away;
pub(crate) mod relayed;

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use sync_core::Membership;
use sync_core::pairing::{Decision, INVITE_LIFETIME_MS, REQUEST_LIFETIME_MS, decide, place};
use sync_core::session::known_as;
use sync_crypto::pairing::{prove_author, verify_author, verify_join};
use sync_crypto::{AuthorSecret, Code, InviteKeys, check_keys, open_grant, seal_grant};
use sync_link::frame::FrameStream;
use sync_link::iroh_link::{Connection, DIAL_TIMEOUT, DeviceId as LinkDevice, Relays};
use sync_link::relay::{RelayUrl, RelayUrlError};
use sync_link::rendezvous::{Found, LookupId as Place, Publication, Record, race};
use sync_store::{Content, NewEntry, PeerNote, StoreError};
use sync_types::bounds::{MAX_ADDRESSES, MAX_FRAME, MAX_NAME, MAX_TOKEN};
use sync_types::invite::LINK_PREFIX;
use sync_types::{
    AuthorId, AuthorKeys, BlobId, Consent, DeviceId, ErrorCode, Frame, Grant, GroupId, InviteId, InviteRecord,
    InviteState, MemberId, Operation, ReplicaId, Role, SharedInvite, SignedOperation, Ticket, Timestamp,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::device::Inner;
use crate::error::ClientError;
use crate::event::Event;
use crate::group::{Group, now, put_all};
use crate::keys::{GroupKeys, draw, with_rng};
use crate::{peers, relays, secrets};

/// Name of the pairing protocol in the connection handshake.
pub(crate) const PAIR_ALPN: &[u8] = b"syncshell/pair/1";
const EXPORT_LABEL: &[u8] = b"syncshell pair v1";
/// Time to reach a device directly where a relay can stand in for the way to it.
const RELAYED_DIAL_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for relays to let in who has a link.
const LET_IN_WAIT: Duration = Duration::from_secs(2);
/// Time to look for who answers a code: LAN answers come within a second, a slow Wi-Fi within some.
const LOOKUP_WAIT: Duration = Duration::from_secs(8);
/// Time for each step of the exchange.
const STEP_WAIT: Duration = Duration::from_secs(10);
/// How long a used, expired or revoked invite is still answered, so that its holder hears why it does not work.
const CLOSED_WAIT: Duration = Duration::from_secs(10 * 60);

/// What became of an invite.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InviteOutcome {
    /// Someone joined.
    Joined {
        /// The name of their device.
        name: String,
        /// Their author.
        author: AuthorId,
    },
    /// Its time ran out.
    Expired,
    /// It was taken back.
    Revoked,
}

/// An invite that was just made.
#[derive(Clone)]
pub struct Invitation {
    /// Names the invite.
    pub id: InviteId,
    /// The code to read aloud.
    pub code: String,
    /// The link, which the QR code shows too.
    pub link: String,
    /// When it ends.
    pub expires: Timestamp,
    outcome: watch::Receiver<Option<InviteOutcome>>,
}

impl std::fmt::Debug for Invitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Invitation").field("id", &self.id).field("expires", &self.expires).finish_non_exhaustive()
    }
}

impl Invitation {
    /// Waits until someone joined, or the invite expired or was taken back. Cancel safe.
    pub async fn outcome(&mut self) -> InviteOutcome {
        let Ok(outcome) = self.outcome.wait_for(Option::is_some).await else { return InviteOutcome::Revoked };
        outcome.clone().unwrap_or(InviteOutcome::Revoked)
    }
}

/// Steps of joining, for people who wait.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JoinProgress {
    /// Looking for the device that made the invite.
    Looking,
    /// Found it.
    Found {
        /// By which way.
        by: String,
    },
    /// Connected to it.
    Connected,
    /// Admitted and stored.
    Joined {
        /// The group.
        group: GroupId,
        /// The name of the inviter's device.
        name: String,
    },
}

/// An invite this device answers.
pub(crate) struct OpenInvite {
    pub(crate) group: GroupId,
    keys: InviteKeys,
    expires: Timestamp,
    publications: Vec<Publication>,
    /// Ends answering at relays.
    relayed: CancellationToken,
    outcome: watch::Sender<Option<InviteOutcome>>,
}

impl OpenInvite {
    /// Stops answering; that it was used or ended stays to be read where that is possible.
    pub(crate) fn release(self) {
        self.relayed.cancel();
        let ended = self.outcome.borrow().is_some();
        for publication in self.publications {
            if ended { publication.leave() } else { publication.withdraw() }
        }
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn derive(code: Code) -> Result<InviteKeys, ClientError> {
    let deriving = tokio::task::spawn_blocking(move || InviteKeys::derive(&code));
    let derived = deriving.await.map_err(|_| ClientError::Closed)?;
    derived.map_err(|error| ClientError::Memory(error.to_string()))
}

/// Makes an invite and answers it until it is used, revoked or too old.
pub(crate) async fn invite(
    device: &Arc<Inner>,
    group: &Arc<Group>,
    lifetime: Duration,
    relays: &[String],
    person: Option<Role>,
) -> Result<Invitation, ClientError> {
    let named = parse_relays(relays)?;
    if device.endpoint().is_none() {
        return Err(ClientError::Offline);
    }
    let code = with_rng(&group.shared().rng, |rng| Code::make(rng));
    let text = code.to_string();
    let mut at = relays::used(group).await;
    relays::add_new(&mut at, named);
    at.retain(RelayUrl::takes_codes);
    let ticket = Ticket {
        relays: relays::shareable(&at),
        secret: code.secret_bytes(),
        device: device.device_id(),
        addresses: device.told_addresses(),
    };
    let keys = derive(code).await?;
    let id = keys.invite_id();
    let lifetime = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX).min(INVITE_LIFETIME_MS);
    let expires = Timestamp(now().0.saturating_add(lifetime));
    record_invite(group, &keys, expires, person, &at).await?;
    let outcome = serve(device, group, keys, expires, InviteState::Open, at, true).await;
    Ok(Invitation { id, code: text, link: ticket.to_link(), expires, outcome })
}

/// Answers an invite until it ends and some time longer.
async fn serve(
    device: &Arc<Inner>,
    group: &Arc<Group>,
    keys: InviteKeys,
    expires: Timestamp,
    state: InviteState,
    at: Vec<RelayUrl>,
    ours: bool,
) -> watch::Receiver<Option<InviteOutcome>> {
    let id = keys.invite_id();
    let (outcome, watched) = watch::channel(None);
    let publications = if ours && now().0 < expires.0.saturating_add(millis(CLOSED_WAIT)) {
        let record = record(device, &keys, state, expires);
        publish(device, &keys, record).await
    } else {
        Vec::new()
    };
    let relayed = device.closed().child_token();
    let open =
        OpenInvite { group: group.id, keys: keys.clone(), expires, publications, relayed: relayed.clone(), outcome };
    lock(&device.invites).insert(id, open);
    // nobody is let in any more by one that was used or taken back
    let at = if matches!(state, InviteState::Open | InviteState::Expired) { &at[..] } else { &[] };
    relayed::attend_all(device, group, &keys, expires, at, ours, &relayed).await;
    let (inner, group) = (device.clone(), group.clone());
    let left = expires.0.saturating_sub(now().0).min(INVITE_LIFETIME_MS);
    device.spawn(async move { tend(&inner, &group, id, left).await });
    watched
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Answers again what this device answered when it was last closed or killed, and says what became of the rest; also
/// answers what others share with it.
pub(crate) async fn resume(device: &Arc<Inner>, group: &Arc<Group>) -> Result<(), ClientError> {
    let id = group.id;
    let known = group.store().read(move |reader| reader.invites(&id)).await?;
    for (invite, status) in known {
        let membership = group.membership();
        let status = status.seen_in(&invite, &membership, None);
        let is_fresh = now().0 < status.expires.0.saturating_add(millis(CLOSED_WAIT));
        let served = lock(&device.invites).contains_key(&invite);
        if served || !(is_fresh || status.may_wait(now())) {
            continue;
        }
        let Some((keys, shared)) = secrets::invite(group.shared(), invite).await? else { continue };
        let ours = match membership.invite(&invite) {
            Some(invited) => secrets::author(group.shared(), invited.by).await.is_ok(),
            None => true,
        };
        let own = membership.author(&group.author().secret().id());
        let may = own
            .is_some_and(|own| place((shared.role, shared.member), (own.role, own.member), own.keys.verify).is_some());
        if ours || may {
            let mut at = relays::used(group).await;
            let named = relays::told(&at, &shared.relays);
            relays::add_new(&mut at, named);
            serve(device, group, keys, status.expires, status.state_at(now()), at, ours).await;
        }
    }
    Ok(())
}

/// Writes the invite's membership entry, its state and its keys, and shares it with the members that may answer it.
///
/// It is for a person of their own with a role, or for one more device of ours.
async fn record_invite(
    group: &Arc<Group>,
    keys: &InviteKeys,
    expires: Timestamp,
    person: Option<Role>,
    at: &[RelayUrl],
) -> Result<(), ClientError> {
    let membership = group.membership();
    let author = group.author();
    let own = membership.author(&author.secret().id()).ok_or(ClientError::MayNotInvite)?;
    if !own.role.may_invite() || person.is_some_and(|role| role < own.role) {
        return Err(ClientError::MayNotInvite);
    }
    let id = keys.invite_id();
    let (role, member) = person.map_or((own.role, Some(own.member)), |role| (role, None));
    let operation = Operation::Invite { id, verifier: keys.verifier(), role, member, expires };
    let shared = SharedInvite { prk: *keys.expose_prk(), role, member, relays: relays::shareable(at) };
    let sealed = secrets::seal_invite(group.shared(), id, &shared);
    let group_id = group.id;
    group
        .store()
        .write(0, move |txn| {
            sealed.put(txn)?;
            txn.put_invite(&group_id, &id, expires)
        })
        .await?;
    let mut entries = vec![operation_entry(group, operation)];
    entries.extend(away::entry(group, id, &shared));
    group.append(entries).await?;
    Ok(())
}

fn operation_entry(group: &Group, operation: Operation) -> NewEntry {
    let seen = group.membership().seen_by(&group.author().secret().id());
    let payload = SignedOperation { seen, operation }.encode();
    group.entry(BlobId(draw(&group.shared().rng)), Content::Membership(payload))
}

pub(crate) async fn append_operation(group: &Group, operation: Operation) -> Result<(), ClientError> {
    group.append(vec![operation_entry(group, operation)]).await?;
    Ok(())
}

fn record(device: &Inner, keys: &InviteKeys, state: InviteState, expires: Timestamp) -> Vec<u8> {
    let mut addresses = device.told_addresses();
    if let Some(endpoint) = device.endpoint() {
        addresses.extend(endpoint.loopback_addresses().iter().map(ToString::to_string));
    }
    addresses.truncate(MAX_ADDRESSES);
    let plain = InviteRecord { state, device: device.device_id(), addresses, expires }.encode();
    with_rng(&device.shared.rng, |rng| keys.seal_record(&plain, rng))
}

/// Publishes a record wherever that works; a way that does not is only worth a warning.
async fn publish(device: &Inner, keys: &InviteKeys, record: Vec<u8>) -> Vec<Publication> {
    let place = Place(keys.lookup_id().0);
    let mut publications = Vec::new();
    for rendezvous in &device.rendezvous {
        let published = match Record::new(record.clone()) {
            Ok(record) => rendezvous.publish(place, record).await,
            Err(error) => Err(error),
        };
        match published {
            Ok(publication) => publications.push(publication),
            Err(error) => tracing::warn!(way = rendezvous.name(), %error, "the code cannot be found this way"),
        }
    }
    publications
}

/// Ends an invite when its time is up, and stops answering it some time after it ended for whatever reason.
async fn tend(device: &Arc<Inner>, group: &Group, id: InviteId, lifetime_ms: u64) {
    let closed = device.closed();
    tokio::select! {
        () = tokio::time::sleep(Duration::from_millis(lifetime_ms)) => {}
        () = closed.cancelled() => return,
    }
    let group_id = group.id;
    let expired = group.store().write(0, move |txn| {
        let status = txn.reader().invite(&group_id, &id)?;
        let open = status.is_some_and(|status| status.state == InviteState::Open);
        if open {
            txn.set_invite(&group_id, &id, InviteState::Expired, None)?;
        }
        Ok(open)
    });
    if expired.await.unwrap_or(false) {
        end(device, id, InviteState::Expired, InviteOutcome::Expired).await;
    }
    tokio::select! {
        () = tokio::time::sleep(CLOSED_WAIT) => {}
        () = closed.cancelled() => return,
    }
    let status = group.store().read(move |reader| reader.invite(&group_id, &id)).await.ok().flatten();
    if let Some(status) = status.map(|status| status.seen_in(&id, &group.membership(), None))
        && status.may_wait(now())
    {
        // what was left at a relay in time still waits for an answer
        let publications = lock(&device.invites).get_mut(&id).map(|open| std::mem::take(&mut open.publications));
        publications.into_iter().flatten().for_each(Publication::leave);
        let left = status.expires.0.saturating_add(REQUEST_LIFETIME_MS).saturating_sub(now().0);
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(left)) => {}
            () = closed.cancelled() => return,
        }
    }
    let open = lock(&device.invites).remove(&id);
    if let Some(open) = open {
        open.release();
    }
}

/// Publishes what became of an invite, and tells who waits.
async fn end(device: &Inner, id: InviteId, state: InviteState, outcome: InviteOutcome) {
    let (record, mut publications) = {
        let mut invites = lock(&device.invites);
        let Some(open) = invites.get_mut(&id) else { return };
        open.outcome.send_replace(Some(outcome));
        (record(device, &open.keys, state, open.expires), std::mem::take(&mut open.publications))
    };
    for publication in &mut publications {
        let replaced = match Record::new(record.clone()) {
            Ok(record) => publication.replace(record).await,
            Err(error) => Err(error),
        };
        if let Err(error) = replaced {
            tracing::debug!(%error, "record not replaced");
        }
    }
    if let Some(open) = lock(&device.invites).get_mut(&id) {
        open.publications = publications;
    }
}

/// Takes an invite back, named by its code, link or id.
pub(crate) async fn revoke(device: &Arc<Inner>, invite: &str) -> Result<(), ClientError> {
    let id = match invite.trim().parse::<InviteId>() {
        Ok(id) => id,
        Err(_) => derive(parse(invite)?.0).await?.invite_id(),
    };
    for group in device.groups().values() {
        let group_id = group.id;
        let _one = device.admitting.lock().await;
        let revoked = group.store().write(0, move |txn| {
            let Some(status) = txn.reader().invite(&group_id, &id)? else { return Ok(None) };
            if status.state == InviteState::Open {
                txn.set_invite(&group_id, &id, InviteState::Revoked, None)?;
            }
            Ok(Some(status.state_at(now())))
        });
        match revoked.await? {
            None => continue,
            Some(InviteState::Used) => return Err(ClientError::InviteUsed),
            Some(InviteState::Expired) => return Err(ClientError::InviteExpired),
            Some(_) => {
                append_operation(group, Operation::Revoke { id }).await?;
                end(device, id, InviteState::Revoked, InviteOutcome::Revoked).await;
                return Ok(());
            }
        }
    }
    Err(ClientError::InviteNotFound)
}

/// Takes back every invite of a group that is known here and unused: who was removed may have read what shares it.
pub(crate) async fn revoke_open(group: &Group) -> Result<(), ClientError> {
    let (id, membership) = (group.id, group.membership());
    for (invite, status) in group.store().read(move |reader| reader.invites(&id)).await? {
        if status.seen_in(&invite, &membership, None).may_wait(now()) {
            group.store().write(0, move |txn| txn.set_invite(&id, &invite, InviteState::Revoked, None)).await?;
            append_operation(group, Operation::Revoke { id: invite }).await?;
        }
    }
    Ok(())
}

/// Reads a code or a link.
fn parse(text: &str) -> Result<(Code, Option<Ticket>), ClientError> {
    let text = text.trim();
    if text.starts_with(LINK_PREFIX) {
        let ticket = Ticket::from_link(text).map_err(|error| ClientError::InviteMalformed(error.to_string()))?;
        return Ok((Code::from_bytes(ticket.secret), Some(ticket)));
    }
    let code = Code::parse(text).map_err(|error| ClientError::InviteMalformed(error.to_string()))?;
    Ok((code, None))
}

/// The relays that are named for a code.
fn parse_relays(relays: &[String]) -> Result<Vec<RelayUrl>, ClientError> {
    let urls: Vec<RelayUrl> = relays.iter().map(|url| url.parse()).collect::<Result<_, _>>()?;
    if urls.iter().all(RelayUrl::takes_codes) { Ok(urls) } else { Err(RelayUrlError::Plain.into()) }
}

/// Answers a connection that asks for an admission.
pub(crate) async fn answer(device: &Arc<Inner>, connection: Connection) {
    let Ok(Ok(mut stream)) = tokio::time::timeout(STEP_WAIT, connection.accept_stream(MAX_FRAME)).await else {
        device.count_refused();
        return connection.close(1, "nothing said");
    };
    if let Err(refusal) = grant(device, &connection, &mut stream).await {
        device.count_refused();
        tracing::debug!(?refusal, "join refused");
        let frame = Frame::error(refusal, words(refusal));
        let _ = tokio::time::timeout(STEP_WAIT, async {
            if stream.sender.send(frame.encode()).await.is_ok() && stream.sender.finish().await.is_ok() {
                let _ = stream.sender.delivered().await;
            }
        })
        .await;
    }
    connection.close(0, "done");
}

fn words(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::InviteWrong => "no such invite",
        ErrorCode::InviteUsed => "invite was used",
        ErrorCode::InviteExpired => "invite has expired",
        ErrorCode::InviteRevoked => "invite was taken back",
        ErrorCode::Unavailable => "this device cannot admit anyone at the moment",
        _ => "not understood",
    }
}

/// A JOIN as it came.
struct Request {
    invite: InviteId,
    keys: AuthorKeys,
    replica: ReplicaId,
    name: String,
    addresses: Vec<String>,
    invite_proof: [u8; 64],
    author_proof: [u8; 64],
}

async fn receive(stream: &mut FrameStream) -> Result<Frame, ErrorCode> {
    let received = tokio::time::timeout(STEP_WAIT, stream.receiver.recv()).await;
    let bytes = received.ok().and_then(Result::ok).flatten().ok_or(ErrorCode::Protocol)?;
    Frame::decode(&bytes).map_err(|_| ErrorCode::Protocol)
}

impl Request {
    fn of(frame: Frame) -> Option<Self> {
        let Frame::Join { invite, keys, replica, name, addresses, invite_proof, author_proof } = frame else {
            return None;
        };
        Some(Self { invite, keys, replica, name: clean(&name), addresses, invite_proof, author_proof })
    }
}

async fn grant(device: &Arc<Inner>, connection: &Connection, stream: &mut FrameStream) -> Result<(), ErrorCode> {
    let request = Request::of(receive(stream).await?).ok_or(ErrorCode::Protocol)?;
    let binding = connection.export(EXPORT_LABEL, b"").map_err(|_| ErrorCode::Unavailable)?;
    let (group, grant) = answer_to(device, &request, &binding, now()).await?;
    let frame = Frame::Grant(grant).encode();
    let sending = async { stream.sender.send(frame).await.is_ok() && stream.sender.flush().await.is_ok() };
    let sent = tokio::time::timeout(STEP_WAIT, sending).await.unwrap_or(false);
    if !sent || !matches!(receive(stream).await, Ok(Frame::Joined)) {
        // whether it stored the grant shows when it asks again, or comes as a member
        return Ok(());
    }
    note_joined(device, &group, &request, DeviceId(connection.remote_device().0)).await;
    Ok(())
}

/// Admits who asked at some time, and makes what it is told.
async fn answer_to(
    device: &Inner,
    request: &Request,
    binding: &[u8; 32],
    asked: Timestamp,
) -> Result<(Arc<Group>, Grant), ErrorCode> {
    let group = group_of(device, request.invite).await.ok_or(ErrorCode::InviteWrong)?;
    admit(device, &group, request, binding, asked).await?;
    let grant = make_grant(device, &group, request, binding).await?;
    Ok((group, grant))
}

/// Remembers a newcomer that is known to have stored its admission.
async fn note_joined(device: &Arc<Inner>, group: &Arc<Group>, request: &Request, its: DeviceId) {
    let author = request.keys.verify;
    let note = PeerNote {
        author,
        device: its,
        name: request.name.clone(),
        addresses: request.addresses.iter().take(MAX_ADDRESSES).cloned().collect(),
        now: now(),
    };
    let replica = known_as(&author, &request.replica);
    if let Err(error) = group.store().note_peer(group.id, replica, note).await {
        tracing::warn!(%error, "newcomer's addresses could not be remembered");
    }
    has_joined(device, group, author, &request.name).await;
    peers::want(device, group, its);
}

/// Ends the invite that admitted an author, now that it is known to have stored its admission.
pub(crate) async fn has_joined(device: &Inner, group: &Group, author: AuthorId, name: &str) {
    let Some(invite) = group.membership().author(&author).and_then(|admitted| admitted.invite) else { return };
    let waiting = |open: &OpenInvite| open.group == group.id && open.outcome.borrow().is_none();
    if !lock(&device.invites).get(&invite).is_some_and(waiting) {
        return;
    }
    group.emit(Event::Joined { name: name.to_owned(), author });
    let outcome = InviteOutcome::Joined { name: name.to_owned(), author };
    end(device, invite, InviteState::Used, outcome).await;
}

/// A name as it may be shown: no control characters, not too long.
pub(crate) fn clean(name: &str) -> String {
    let mut clean: String = name.chars().filter(|c| !c.is_control()).collect();
    while clean.len() > MAX_NAME {
        clean.pop();
    }
    if clean.is_empty() { "unnamed".to_owned() } else { clean }
}

async fn group_of(device: &Inner, invite: InviteId) -> Option<Arc<Group>> {
    for group in device.groups().into_values() {
        let id = group.id;
        let known = group.store().read(move |reader| reader.invite(&id, &invite)).await;
        if known.ok().flatten().is_some() {
            return Some(group);
        }
    }
    None
}

/// Gives the invite to the joiner durably, unless that happened before.
async fn admit(
    device: &Inner,
    group: &Arc<Group>,
    request: &Request,
    binding: &[u8; 32],
    asked: Timestamp,
) -> Result<(), ErrorCode> {
    let unavailable = |_| ErrorCode::Unavailable;
    let (id, invite, author) = (group.id, request.invite, request.keys.verify);
    let _one = device.admitting.lock().await;
    let known = secrets::invite(group.shared(), invite).await.map_err(unavailable)?;
    let (keys, shared) = known.ok_or(ErrorCode::InviteWrong)?;
    // an author that is admitted already asks with the keys that were admitted
    let same_keys = group.membership().author(&author).is_none_or(|admitted| admitted.keys == request.keys);
    let proven = verify_join(&keys.verifier(), binding, &invite, &request.keys, &request.invite_proof)
        && verify_author(&request.keys, binding, &invite, &request.author_proof)
        && check_keys(&request.keys).is_ok()
        && same_keys;
    // a newcomer whose token would be too long could not prove itself: better no admission than a useless one
    let own = group.membership().token(&group.author().secret().id());
    let membership = group.membership();
    let room = own.is_some_and(|token| token.len() < MAX_TOKEN) && place_of(group, &shared, author).is_some();
    // the invite is used first: of a crash between the two, the joiner hears that it was used by itself and gets its
    // admission then, and nobody else can get in
    let decided = group.store().write(0, move |txn| {
        let status = txn.reader().invite(&id, &invite)?;
        let status = status.map(|status| status.seen_in(&invite, &membership, Some(author)));
        let decision = decide(status.as_ref(), author, proven, asked, now());
        if decision == Decision::Admit && room {
            txn.set_invite(&id, &invite, InviteState::Used, Some(author))?;
        }
        Ok(decision)
    });
    match decided.await.map_err(|_| ErrorCode::Unavailable)? {
        Decision::Refuse(code) => Err(code),
        Decision::Admit if !room => Err(ErrorCode::Unavailable),
        Decision::Admit | Decision::GrantAgain => Ok(()),
    }
}

/// As what this device may let a joiner in by an invite.
fn place_of(group: &Group, shared: &SharedInvite, joiner: AuthorId) -> Option<(Role, MemberId)> {
    let membership = group.membership();
    let own = membership.author(&group.author().secret().id())?;
    place((shared.role, shared.member), (own.role, own.member), joiner)
}

async fn make_grant(
    device: &Inner,
    group: &Arc<Group>,
    request: &Request,
    binding: &[u8; 32],
) -> Result<Grant, ErrorCode> {
    let unavailable = |error: &dyn std::fmt::Display| {
        tracing::warn!(%error, "join cannot be granted");
        ErrorCode::Unavailable
    };
    let author = request.keys.verify;
    let known = secrets::invite(group.shared(), request.invite).await.map_err(|error| unavailable(&error))?;
    let (keys, shared) = known.ok_or(ErrorCode::InviteWrong)?;
    if !group.membership().is_admitted(&author) {
        let (role, member) = place_of(group, &shared, author).ok_or(ErrorCode::Unavailable)?;
        let (keys, invite) = (request.keys.clone(), Some(request.invite));
        let consent = Consent { binding: *binding, proof: request.author_proof };
        let operation = Operation::Admit { keys, member, role, invite, consent };
        append_operation(group, operation).await.map_err(|error| unavailable(&error))?;
    }
    let membership = group.membership();
    // the epochs are sealed for the keys that all members have of it
    let admitted = membership.author(&author).ok_or(ErrorCode::Unavailable)?;
    if admitted.keys != request.keys {
        return Err(ErrorCode::InviteWrong);
    }
    let token = membership.token(&author).ok_or(ErrorCode::Unavailable)?;
    let id = group.id;
    let row = group.store().read(move |reader| reader.group(&id)).await.map_err(|error| unavailable(&error))?;
    let epochs = group.keys().everything();
    let epochs = with_rng(&group.shared().rng, |rng| seal_grant(&id, binding, &admitted.keys.kem, &epochs, rng))
        .map_err(|error| unavailable(&error))?;
    let mut grant = Grant {
        charter: row.charter,
        token,
        epochs,
        replica: group.replica(),
        name: group.device_name(),
        addresses: device.told_addresses(),
        relays: relays::to_give_away(group).await,
        proof: [0; 32],
    };
    grant.proof = keys.prove_inviter(binding, &grant.proven_hash());
    Ok(grant)
}

/// Joins the group that a code or link invites to.
pub(crate) async fn join(
    device: &Arc<Inner>,
    text: &str,
    relays: &[String],
    progress: &(dyn Fn(JoinProgress) + Send + Sync),
) -> Result<Arc<Group>, ClientError> {
    let mut at = parse_relays(relays)?;
    if device.endpoint().is_none() {
        return Err(ClientError::Offline);
    }
    let (code, ticket) = parse(text)?;
    let keys = derive(code).await?;
    let home = relays::of_home(device).await;
    // a relay of a link that makes no sense is one less
    let linked = ticket.as_ref().map(|ticket| relays::told(&home, &ticket.relays));
    relays::add_new(&mut at, linked.unwrap_or_default());
    relays::add_new(&mut at, home);
    at.retain(RelayUrl::takes_codes);
    progress(JoinProgress::Looking);
    let found = match ticket {
        Some(ticket) => {
            let place = Place(keys.lookup_id().0);
            // for being let in there: the link says more than the record
            let let_in = at.iter().map(|url| async move { relayed::fetch(device, url, place).await.is_ok() });
            let _ = tokio::time::timeout(LET_IN_WAIT, join_all(let_in)).await;
            Ok(Whereabouts { by: "link".to_owned(), device: ticket.device, addresses: ticket.addresses, expires: None })
        }
        None => look_up(device, &keys, &at).await,
    };
    let failed = match found {
        Ok(found) => match join_directly(device, &keys, &found, &at, progress).await {
            Err(error @ (ClientError::Unreachable(_) | ClientError::InviteExpired)) => error,
            joined => return joined,
        },
        Err(error) => error,
    };
    // this takes the place of what waits for an answer by the same code
    relayed::stop_waiting(device, keys.invite_id());
    let (mut said, mut waits) = (Vec::new(), Vec::new());
    for url in &at {
        match relayed::join(device, url, &keys, progress).await {
            Ok(group) => return Ok(group),
            Err(relayed::JoinError::NotThere) => {}
            Err(relayed::JoinError::Waits) => waits.push(url.authority()),
            Err(relayed::JoinError::Relay(error)) => {
                tracing::debug!(relay = %url.authority(), %error, "could not join through the relay");
                said.push(format!("at {} {error}", url.authority()));
            }
            Err(relayed::JoinError::Ended(error)) => return Err(error),
        }
    }
    if !waits.is_empty() {
        relayed::resume(device, Some(keys.invite_id())).await?;
        return Err(ClientError::JoinWaits(waits.into_iter().chain(said).collect::<Vec<_>>().join(", ")));
    }
    let said = said.join(", ");
    Err(match failed {
        failed if said.is_empty() => failed,
        ClientError::InviteNotFound => ClientError::RelayUnavailable(said),
        ClientError::Unreachable(why) => ClientError::Unreachable(format!("{why}, {said}")),
        failed => failed,
    })
}

async fn join_directly(
    device: &Arc<Inner>,
    keys: &InviteKeys,
    found: &Whereabouts,
    at: &[RelayUrl],
    progress: &(dyn Fn(JoinProgress) + Send + Sync),
) -> Result<Arc<Group>, ClientError> {
    let endpoint = device.endpoint().ok_or(ClientError::Offline)?;
    progress(JoinProgress::Found { by: found.by.clone() });
    if found.device == device.device_id() {
        return Err(ClientError::InviteMalformed("this device made that invite itself".to_owned()));
    }
    let mut addresses = device.same_machine_addresses(&found.device);
    addresses.extend(found.addresses.iter().filter_map(|text| text.parse::<SocketAddr>().ok()));
    let patience = if at.is_empty() { DIAL_TIMEOUT } else { RELAYED_DIAL_TIMEOUT };
    let relays = Relays { ours: at.to_vec(), told: found.addresses.clone() };
    let device_id = LinkDevice(found.device.0);
    let dialled = endpoint.connect_through(device_id, &addresses, &relays, PAIR_ALPN, patience).await;
    let connection = dialled.map_err(|error| match found.expires {
        Some(expires) if expires <= now() => ClientError::InviteExpired,
        _ => ClientError::Unreachable(error.to_string()),
    })?;
    progress(JoinProgress::Connected);
    let joined = exchange(device, &connection, keys, found).await;
    connection.close(0, "done");
    let (group, name) = joined?;
    progress(JoinProgress::Joined { group: group.id, name });
    Ok(group)
}

/// Who made an invite and where it can be dialled.
struct Whereabouts {
    by: String,
    device: DeviceId,
    addresses: Vec<String>,
    expires: Option<Timestamp>,
}

async fn look_up(device: &Arc<Inner>, keys: &InviteKeys, at: &[RelayUrl]) -> Result<Whereabouts, ClientError> {
    let place = Place(keys.lookup_id().0);
    let near = device.rendezvous.iter().map(|rendezvous| rendezvous.lookup(place));
    let mut lookup = race(near.chain(at.iter().map(|url| relayed::lookup(device, url, place))));
    let searching = tokio::time::timeout(LOOKUP_WAIT, async {
        while let Some(found) = lookup.next().await {
            let (provider, record) = match found {
                Found::Candidate { provider, record } => (provider, record),
                Found::Warning { provider, error } => {
                    tracing::warn!(way = provider, %error, "the code cannot be looked up this way");
                    continue;
                }
            };
            // whoever does not know the code can only make records that do not open
            let Some(record) =
                keys.open_record(record.as_bytes()).ok().and_then(|plain| InviteRecord::decode(&plain).ok())
            else {
                device.count_refused();
                continue;
            };
            let ask = match record.state {
                InviteState::Open => true,
                // it may be this device that used it, before a crash: the inviter decides
                InviteState::Used => secrets::is_joining(&device.shared, keys.invite_id()).await,
                _ => false,
            };
            return match record.state {
                _ if ask => {
                    let InviteRecord { device, addresses, expires, .. } = record;
                    Ok(Whereabouts { by: provider.to_owned(), device, addresses, expires: Some(expires) })
                }
                InviteState::Used => Err(ClientError::InviteUsed),
                InviteState::Expired => Err(ClientError::InviteExpired),
                _ => Err(ClientError::InviteRevoked),
            };
        }
        Err(ClientError::InviteNotFound)
    });
    searching.await.unwrap_or(Err(ClientError::InviteNotFound))
}

async fn exchange(
    device: &Arc<Inner>,
    connection: &Connection,
    keys: &InviteKeys,
    inviter: &Whereabouts,
) -> Result<(Arc<Group>, String), ClientError> {
    let lost = |error: &dyn std::fmt::Display| ClientError::Unreachable(error.to_string());
    let binding = connection.export(EXPORT_LABEL, b"").map_err(|error| lost(&error))?;
    let shared = &device.shared;
    let invite = keys.invite_id();
    // durable before it is shown to anyone, so that a crash from here on leads to the same admission
    let author = secrets::joining_author(shared, invite).await?;
    let join = request(device, keys, &author, &binding);
    let mut stream = connection.open_stream(MAX_FRAME).await.map_err(|error| lost(&error))?;
    let sending = async {
        stream.sender.send(join.encode()).await?;
        stream.sender.flush().await
    };
    let sent = tokio::time::timeout(STEP_WAIT, sending).await;
    sent.map_err(|_| ClientError::Unreachable("it does not read".to_owned()))?.map_err(|error| lost(&error))?;
    let received = tokio::time::timeout(STEP_WAIT, stream.receiver.recv()).await;
    let bytes = received
        .map_err(|_| ClientError::Unreachable("it does not answer".to_owned()))?
        .map_err(|error| lost(&error))?
        .ok_or_else(|| ClientError::Unreachable("it hung up".to_owned()))?;
    let (opened, name) = take_grant(device, keys, &author, &binding, inviter, &bytes).await?;
    // the answer is stored: say so; if that is lost, the inviter learns it from the first session
    let _ = tokio::time::timeout(STEP_WAIT, async {
        if stream.sender.send(Frame::Joined.encode()).await.is_ok() && stream.sender.finish().await.is_ok() {
            let _ = stream.sender.delivered().await;
        }
    })
    .await;
    Ok((opened, name))
}

/// What a joiner asks with.
fn request(device: &Inner, keys: &InviteKeys, author: &AuthorSecret, binding: &[u8; 32]) -> Frame {
    let (shared, invite) = (&device.shared, keys.invite_id());
    Frame::Join {
        invite,
        keys: author.keys(),
        replica: shared.replica,
        name: shared.name.clone(),
        addresses: device.told_addresses(),
        invite_proof: keys.prove_join(binding, &author.keys()),
        author_proof: prove_author(author, binding, &invite),
    }
}

/// Takes in what the inviter answered, and opens the group.
async fn take_grant(
    device: &Arc<Inner>,
    keys: &InviteKeys,
    author: &AuthorSecret,
    binding: &[u8; 32],
    inviter: &Whereabouts,
    answer: &[u8],
) -> Result<(Arc<Group>, String), ClientError> {
    let grant = match Frame::decode(answer) {
        Ok(Frame::Grant(grant)) => grant,
        Ok(Frame::Error { code, text }) => return Err(refused(code, text)),
        Ok(_) => return Err(ClientError::InviteForged("it answered out of turn".to_owned())),
        Err(error) => return Err(ClientError::InviteForged(error.to_string())),
    };
    if !keys.verify_inviter(binding, &grant.proven_hash(), &grant.proof) {
        return Err(ClientError::InviteForged("its answer does not show that it knows the code".to_owned()));
    }
    let group = GroupId::of(&grant.charter);
    if device.group(&group).is_some() {
        return Err(ClientError::AlreadyJoined(group));
    }
    let name = clean(&grant.name);
    accept(device, &grant, binding, author, inviter).await?;
    Ok((device.open_group(group, false).await?, name))
}

fn refused(code: ErrorCode, text: String) -> ClientError {
    match code {
        ErrorCode::InviteWrong => ClientError::InviteWrong,
        ErrorCode::InviteUsed => ClientError::InviteUsed,
        ErrorCode::InviteExpired => ClientError::InviteExpired,
        ErrorCode::InviteRevoked => ClientError::InviteRevoked,
        _ => ClientError::Unreachable(clean(&text)),
    }
}

/// Checks a grant and stores the group in one transaction.
async fn accept(
    device: &Inner,
    grant: &Grant,
    binding: &[u8; 32],
    author: &AuthorSecret,
    inviter: &Whereabouts,
) -> Result<(), ClientError> {
    let forged = |error: &dyn std::fmt::Display| ClientError::InviteForged(error.to_string());
    let group = GroupId::of(&grant.charter);
    let shared = &device.shared;
    let mut keys = GroupKeys::new(&grant.charter)?;
    let epochs = open_grant(&group, binding, author, &grant.epochs).map_err(|error| forged(&error))?;
    let mut sealed = vec![secrets::seal_author(shared, author)];
    for (epoch, secret) in epochs {
        sealed.push(secrets::seal_epoch(shared, group, epoch, &secret));
        keys.insert(epoch, secret).map_err(|error| forged(&error))?;
    }
    keys.current().map_err(|error| forged(&error))?;
    let inviter_author = check_token(grant, &author.keys()).map_err(|error| forged(&error))?;
    let note = PeerNote {
        author: inviter_author,
        device: inviter.device,
        name: clean(&grant.name),
        addresses: grant.addresses.iter().chain(&inviter.addresses).take(MAX_ADDRESSES).cloned().collect(),
        now: now(),
    };
    let replica = known_as(&inviter_author, &grant.replica);
    let (charter, token, own) = (grant.charter.clone(), grant.token.clone(), author.id());
    let keys = Arc::new(RwLock::new(keys));
    let invite = inviter_invite(grant, own);
    let given = grant.relays.clone();
    let stored = shared.store.write(charter.len(), move |txn| {
        put_all(txn, &sealed)?;
        let id = txn.create_group(&charter, own)?;
        let readable = |epoch| keys.read().unwrap_or_else(PoisonError::into_inner).knows(epoch);
        let ingested = txn.ingest(&id, &token, None, None, &readable)?;
        if let Some((_, refusal)) = ingested.refused.into_iter().next() {
            return Err(StoreError::Succession(refusal));
        }
        let peer = txn.peer(&id, &replica)?;
        txn.note_peer(&id, peer, &note)?;
        relays::take_given(txn, &id, &given)?;
        if let Some(invite) = invite {
            secrets::forget_joining(txn, invite)?;
        }
        Ok(())
    });
    Ok(stored.await?)
}

/// The invite that the newcomer's admission names.
fn inviter_invite(grant: &Grant, own: AuthorId) -> Option<InviteId> {
    let membership = evaluate(grant)?;
    membership.author(&own)?.invite
}

fn evaluate(grant: &Grant) -> Option<Membership> {
    let mut membership = Membership::new(&grant.charter).ok()?;
    for bytes in &grant.token {
        let envelope = sync_types::Envelope::parse(bytes).ok()?;
        membership.apply(&envelope).ok()?;
    }
    Some(membership)
}

/// Whether a grant's token admits us under our keys, and who did; signatures are checked when it is stored.
fn check_token(grant: &Grant, own: &AuthorKeys) -> Result<AuthorId, String> {
    let membership = evaluate(grant).ok_or("its token is malformed")?;
    let admitted = membership.author(&own.verify).ok_or("its token does not admit this device")?;
    if admitted.keys != *own {
        return Err("its token admits this device under keys that are not its own".to_owned());
    }
    admitted.by.ok_or_else(|| "its token names this device the founder".to_owned())
}
