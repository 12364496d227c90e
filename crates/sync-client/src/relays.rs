//! Relays: which ones a group uses, and one task that keeps a session with each.
//!
//! A relay is added for one group or for every group of the home.
//! What is pushed goes to all of a group's relays and what is pulled comes from all; none waits for another, and one that
//! is full, away or lying costs the others nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sync_core::connection::{Action, Event as Step, State, step};
use sync_core::session::{Close, Report, blind_known_as};
use sync_link::relay::{RelayUrl, RelayUrlError, connect};
use sync_store::{Reader, Store, StoreError, Txn};
use sync_types::bounds::{MAX_FRAME, MAX_RELAYS, MAX_TEXT, MAX_WAKE_URL};
use sync_types::{ErrorCode, GroupId, ReplicaId};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::client::state_name;
use crate::device::Inner;
use crate::error::ClientError;
use crate::event::Event;
use crate::group::{Group, now};
use crate::link::{self, Shown};
use crate::punching;
use crate::status::RelayStatus;

/// Where the relays of every group are kept, and before a group's id those of that one.
const META_RELAYS: &str = "relays";
/// Where the address is kept at which relays wake this device.
const META_WAKE: &str = "wake";
/// Reports of a session that wait for the task.
const REPORTS: usize = 64;
/// Time for a relay to judge us and to exchange membership.
const ESTABLISH_WAIT: Duration = Duration::from_secs(30);
/// Wait after a relay refused us: only its operator, or a person here, changes that.
const REFUSED_WAIT: Duration = Duration::from_secs(60);
/// Wait after more was sent than a relay takes in a minute: by then it takes some again.
const TOO_FAST_WAIT: Duration = Duration::from_secs(20);
/// Time after which what did not fit is offered again.
const FULL_WAIT: Duration = Duration::from_secs(600);

/// A relay as it was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HomeRelay {
    /// Its address, without the operator's token.
    pub url: String,
    /// The group it was added for; none for every group.
    pub group: Option<GroupId>,
}

/// The relays that a group uses while the device runs.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    used: Mutex<BTreeMap<RelayUrl, Used>>,
    /// Told when others may be used now.
    changed: Notify,
}

/// One of them.
#[derive(Debug)]
struct Used {
    cancel: CancellationToken,
    again: Arc<Notify>,
    state: State,
    /// Its database, once it has proven its key.
    replica: Option<ReplicaId>,
    problem: Option<String>,
}

impl Relays {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<RelayUrl, Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, url: &RelayUrl, change: impl FnOnce(&mut Used)) {
        if let Some(used) = self.lock().get_mut(url) {
            change(used);
        }
    }
}

fn key_of(group: Option<&GroupId>) -> String {
    group.map_or_else(|| META_RELAYS.to_owned(), |group| format!("{META_RELAYS} {group}"))
}

fn read_list(reader: &Reader<'_>, group: Option<&GroupId>) -> Result<Vec<RelayUrl>, StoreError> {
    let stored = reader.meta(&key_of(group))?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&stored).lines().filter_map(|line| line.parse().ok()).collect())
}

fn write_list(txn: &mut Txn<'_>, group: Option<&GroupId>, relays: &[RelayUrl]) -> Result<(), StoreError> {
    let lines: Vec<String> = relays.iter().map(ToString::to_string).collect();
    txn.put_meta(&key_of(group), lines.join("\n").as_bytes())
}

/// The relays that were added for a group, or for every group.
pub(crate) fn stored(reader: &Reader<'_>, group: Option<&GroupId>) -> Result<Vec<String>, StoreError> {
    Ok(read_list(reader, group)?.iter().map(ToString::to_string).collect())
}

/// Adds relays to those of a group, or of every group, as far as there is room.
pub(crate) fn add_stored(txn: &mut Txn<'_>, group: Option<&GroupId>, urls: &[String]) -> Result<(), StoreError> {
    let added = urls.iter().filter_map(|url| url.parse().ok()).collect();
    let mut relays = merge(read_list(&txn.reader(), group)?, added);
    relays.truncate(MAX_RELAYS);
    write_list(txn, group, &relays)
}

/// The relays of a group, those of every group and its own.
fn read_used(reader: &Reader<'_>, group: &GroupId) -> Result<Vec<RelayUrl>, StoreError> {
    Ok(merge(read_list(reader, None)?, read_list(reader, Some(group))?))
}

/// Relays that are known and others; of two addresses of one relay the known one, which nobody else told.
fn merge(mut known: Vec<RelayUrl>, others: Vec<RelayUrl>) -> Vec<RelayUrl> {
    for url in others {
        match known.iter_mut().find(|known| known.is_same_relay(&url)) {
            Some(same) => *same = prefer(same, url),
            None => known.push(url),
        }
    }
    known
}

/// Of two addresses of one relay the known one, unless the other differs by having TLS.
fn prefer(known: &RelayUrl, other: RelayUrl) -> RelayUrl {
    if other.is_sealed_form_of(known) { other.with_token(known.token()) } else { known.clone() }
}

/// The relays that someone told of: with keys, and as they are known here where they are.
pub(crate) fn told(known: &[RelayUrl], texts: &[String]) -> Vec<RelayUrl> {
    let urls = texts.iter().filter_map(|text| text.parse().ok()).filter(RelayUrl::has_key);
    let as_known = |url: RelayUrl| match known.iter().find(|known| known.is_same_relay(&url)) {
        Some(known) => prefer(known, url),
        None => url,
    };
    merge(Vec::new(), urls.take(MAX_RELAYS).map(as_known).collect())
}

/// Uses a relay for a group, or for all.
pub(crate) async fn add(device: &Arc<Inner>, url: &str, group: Option<GroupId>) -> Result<(), ClientError> {
    let url: RelayUrl = url.parse()?;
    let added = device.shared.store.write(0, move |txn| {
        let mut relays = read_list(&txn.reader(), group.as_ref())?;
        // the same one again may have a new key or token
        relays.retain(|known| !known.is_same_relay(&url));
        if relays.len() >= MAX_RELAYS {
            return Ok(false);
        }
        relays.push(url);
        write_list(txn, group.as_ref(), &relays)?;
        Ok(true)
    });
    if !added.await? {
        return Err(ClientError::TooManyRelays);
    }
    follow_all(device).await
}

/// Uses a relay no longer.
pub(crate) async fn remove(device: &Arc<Inner>, url: &str, group: Option<GroupId>) -> Result<(), ClientError> {
    let url: RelayUrl = url.parse()?;
    let proven = |group: &Arc<Group>| {
        let used = group.relays.lock();
        used.iter().find(|(known, _)| known.is_same_relay(&url)).and_then(|(_, used)| used.replica)
    };
    let replica = url.key().map(|key| blind_known_as(&key)).or_else(|| device.groups().values().find_map(proven));
    let removed = device.shared.store.write(0, move |txn| {
        let mut relays = read_list(&txn.reader(), group.as_ref())?;
        let before = relays.len();
        relays.retain(|known| !known.is_same_relay(&url));
        write_list(txn, group.as_ref(), &relays)?;
        for row in txn.reader().groups()? {
            let used = read_used(&txn.reader(), &row.id)?.iter().any(|used| used.is_same_relay(&url));
            if let Some(replica) = replica.filter(|_| !used) {
                // what only this relay holds waits to be handed over again
                txn.forget_held(&row.id, &replica)?;
            }
        }
        Ok(relays.len() < before)
    });
    if !removed.await? {
        return Err(ClientError::UnknownRelay);
    }
    follow_all(device).await
}

/// Where relays wake this device; empty for nowhere.
pub(crate) async fn read_wake(store: &Store) -> Result<String, ClientError> {
    let stored = store.read(|reader| reader.meta(META_WAKE)).await?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&stored).into_owned())
}

/// Has relays wake this device there from now on.
pub(crate) async fn set_wake(device: &Inner, url: &str) -> Result<(), ClientError> {
    let place = url.strip_prefix("https://").map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
    let fits = url.len() <= MAX_WAKE_URL && url.chars().all(|c| c.is_ascii_graphic()) && !url.contains('#');
    let is_address = fits && place.is_some_and(|place| !place.is_empty() && !place.contains('@'));
    if !url.is_empty() && !is_address {
        return Err(RelayUrlError::Wake.into());
    }
    let stored = url.as_bytes().to_vec();
    device.shared.store.write(0, move |txn| txn.put_meta(META_WAKE, &stored)).await?;
    device.shared.wake.send_replace(url.to_owned());
    Ok(())
}

/// Forgets what a relay acknowledged while it was being removed.
async fn forget(group: &Group, replica: ReplicaId) {
    let id = group.id;
    if let Err(error) = group.store().write(0, move |txn| txn.forget_held(&id, &replica)).await {
        tracing::warn!(%error, "relay could not be forgotten");
    }
    group.progress();
}

/// The relays that were added.
pub(crate) async fn list(device: &Inner) -> Result<Vec<HomeRelay>, ClientError> {
    let listed = device.shared.store.read(|reader| {
        let mut all = Vec::new();
        let groups = reader.groups()?;
        for group in std::iter::once(None).chain(groups.iter().map(|row| Some(row.id))) {
            for url in read_list(reader, group.as_ref())? {
                all.push(HomeRelay { url: url.without_token().to_string(), group });
            }
        }
        Ok(all)
    });
    Ok(listed.await?)
}

/// The relays of a group.
pub(crate) async fn used(group: &Group) -> Vec<RelayUrl> {
    let id = group.id;
    group.store().read(move |reader| read_used(reader, &id)).await.unwrap_or_default()
}

/// Returns once a group uses a relay no longer. Cancel safe.
pub(crate) async fn until_unused(group: &Group, url: &RelayUrl) {
    loop {
        let changed = group.relays.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if !used(group).await.iter().any(|known| known.is_same_relay(url)) {
            return;
        }
        changed.await;
    }
}

/// The relays of every group of this home.
pub(crate) async fn of_home(device: &Inner) -> Vec<RelayUrl> {
    device.shared.store.read(|reader| read_list(reader, None)).await.unwrap_or_default()
}

/// Adds those that are not there yet.
pub(crate) fn add_new(urls: &mut Vec<RelayUrl>, more: Vec<RelayUrl>) {
    for url in more {
        if !urls.iter().any(|known| known.is_same_relay(&url)) {
            urls.push(url);
        }
    }
}

/// What of relays others may be told: not an operator's token, and not what means another relay elsewhere.
pub(crate) fn shareable(urls: &[RelayUrl]) -> Vec<String> {
    let named = urls.iter().filter(|url| url.has_key()).map(|url| url.without_token().to_string());
    named.filter(|url| url.len() <= MAX_TEXT).take(MAX_RELAYS).collect()
}

/// The relays to tell a newcomer of.
pub(crate) async fn to_give_away(group: &Group) -> Vec<String> {
    shareable(&used(group).await)
}

/// Takes in the relays that an inviter told of.
pub(crate) fn take_given(txn: &mut Txn<'_>, group: &GroupId, given: &[String]) -> Result<(), StoreError> {
    let urls = told(&[], given);
    if urls.is_empty() { Ok(()) } else { write_list(txn, Some(group), &urls) }
}

async fn follow_all(device: &Arc<Inner>) -> Result<(), ClientError> {
    if device.endpoint().is_some() {
        for group in device.groups().values() {
            follow(device, group).await?;
        }
        punching::follow(device).await;
    }
    Ok(())
}

/// Starts and ends sessions so that they are with the relays that the group uses now.
pub(crate) async fn follow(device: &Arc<Inner>, group: &Arc<Group>) -> Result<(), ClientError> {
    let id = group.id;
    let wanted = group.store().read(move |reader| read_used(reader, &id)).await?;
    group.relays.changed.notify_waiters();
    let mut used = group.relays.lock();
    used.retain(|url, each| {
        let stays = wanted.contains(url);
        if !stays {
            each.cancel.cancel();
        }
        stays
    });
    for url in wanted {
        if used.contains_key(&url) {
            continue;
        }
        let (cancel, again) = (device.closed().child_token(), Arc::new(Notify::new()));
        let state = State::Disconnected;
        let entry = Used { cancel: cancel.clone(), again: again.clone(), state, replica: None, problem: None };
        used.insert(url.clone(), entry);
        let task = Task { device: device.clone(), group: group.clone(), url, cancel, again, state };
        device.spawn(task.run());
    }
    Ok(())
}

/// Has every relay dialled at once that waits for its next attempt.
pub(crate) fn network_changed(groups: &HashMap<GroupId, Arc<Group>>) {
    for group in groups.values() {
        for used in group.relays.lock().values() {
            used.again.notify_one();
        }
    }
}

/// The relays of a group, for people and programs.
pub(crate) async fn statuses(group: &Group) -> Vec<RelayStatus> {
    let id = group.id;
    let listed = group.store().read(move |reader| read_used(reader, &id)).await.unwrap_or_default();
    let peers = group.stored_peers().await;
    let now = now();
    let used = group.relays.lock();
    let status = |url: &RelayUrl| {
        let running = used.get(url);
        let replica = running.and_then(|running| running.replica).or_else(|| url.key().map(|key| blind_known_as(&key)));
        let peer = replica.and_then(|replica| peers.iter().find(|peer| peer.replica == replica));
        RelayStatus {
            url: url.without_token().to_string(),
            state: state_name(running.map_or(State::Disconnected, |running| running.state)),
            acknowledged: peer.map_or(0, |peer| peer.acked.0),
            last_seen_ms: peer.and_then(|peer| peer.last_seen).map(|seen| now.0.saturating_sub(seen.0)),
            problem: running.and_then(|running| running.problem.clone()),
        }
    };
    listed.iter().map(status).collect()
}

/// How one connection ended.
struct End {
    /// A wait longer than the usual one.
    wait: Option<Duration>,
    problem: Option<String>,
}

/// Keeps a session with one relay.
struct Task {
    device: Arc<Inner>,
    group: Arc<Group>,
    url: RelayUrl,
    cancel: CancellationToken,
    again: Arc<Notify>,
    state: State,
}

impl Task {
    async fn run(mut self) {
        self.step(Step::Wanted);
        loop {
            let End { wait, problem } = self.connect().await;
            if let Some(problem) = &problem {
                tracing::debug!(relay = %self.url.authority(), %problem, "no session with the relay");
            }
            self.group.relays.set(&self.url, |used| used.problem = problem);
            let usual = self.step(Step::Lost).unwrap_or(REFUSED_WAIT);
            let wait = wait.unwrap_or(usual);
            let step = tokio::select! {
                () = tokio::time::sleep(wait) => Step::Timeout,
                () = self.again.notified() => Step::AddressChanged,
                () = self.cancel.cancelled() => return,
            };
            self.step(step);
        }
    }

    /// Goes on to the next state; the wait that it orders.
    fn step(&mut self, event: Step) -> Option<Duration> {
        let (state, actions) = step(self.state, event, self.device.jitter());
        self.state = state;
        self.group.relays.set(&self.url, |used| used.state = state);
        actions.into_iter().find_map(|action| match action {
            Action::SetTimer(wait) => Some(wait),
            _ => None,
        })
    }

    /// One connection, from dialling to its end.
    async fn connect(&mut self) -> End {
        let secret = self.group.author().secret().noise_secret();
        let connecting = connect(&self.url, &secret, MAX_FRAME);
        let connected = tokio::select! {
            connected = connecting => connected,
            () = self.cancel.cancelled() => return End { wait: None, problem: None },
        };
        let connection = match connected {
            Ok(connection) => connection,
            Err(error) => {
                return End { wait: error.is_refusal().then_some(REFUSED_WAIT), problem: Some(error.to_string()) };
            }
        };
        let replica = blind_known_as(&connection.key);
        self.group.relays.set(&self.url, |used| used.replica = Some(replica));
        self.step(Step::Opened);
        let cancel = self.cancel.child_token();
        let (progress, reports) = mpsc::channel(REPORTS);
        let group = self.group.clone();
        let url = self.url.clone();
        let shown = Shown { registration: url.token(), pass: punching::name(&self.device, &group, &url) };
        let session = link::run_with_relay(&group, connection, shown, progress, &cancel);
        let (close, seen) = tokio::join!(session, self.watch(replica, reports, &cancel));
        let removed = self.cancel.is_cancelled() && !self.device.closed().is_cancelled();
        if removed || (close.by_peer && matches!(close.code, ErrorCode::Refused | ErrorCode::Removed)) {
            punching::leave(&self.device, &self.group, &self.url);
        }
        if removed {
            forget(&group, replica).await;
        }
        if let Some(name) = &seen.name {
            let (name, reason) = (name.clone(), close.text.clone());
            group.emit(Event::Disconnected { replica, name, reason });
            group.progress();
        }
        seen.end(close)
    }

    /// Follows what a session tells.
    async fn watch(
        &mut self,
        replica: ReplicaId,
        mut reports: mpsc::Receiver<Report>,
        cancel: &CancellationToken,
    ) -> Seen {
        let mut seen = Seen { name: None, full: None };
        // what ends the session if nothing else does
        let mut deadline = tokio::time::Instant::now() + ESTABLISH_WAIT;
        loop {
            let report = tokio::select! {
                report = reports.recv() => report,
                () = tokio::time::sleep_until(deadline), if seen.is_limited() && !cancel.is_cancelled() => {
                    cancel.cancel();
                    continue;
                }
            };
            match report {
                None => return seen,
                Some(Report::Established { max_cursor, .. }) => {
                    let name = format!("relay {}", self.url.authority());
                    self.step(Step::Established);
                    self.group.relays.set(&self.url, |used| used.problem = None);
                    self.note(replica, &name).await;
                    let pending = self.group.pending().await;
                    self.group.emit(Event::Connected { replica, name: name.clone(), max_cursor, pending });
                    seen.name = Some(name);
                    punching::let_in(&self.device, &self.group, &self.url).await;
                }
                Some(Report::Full { text, .. }) => {
                    let text = in_words(ErrorCode::GroupFull, &text);
                    self.group.relays.set(&self.url, |used| used.problem = Some(text.clone()));
                    seen.full = Some(text);
                    deadline = tokio::time::Instant::now() + FULL_WAIT;
                }
                Some(_) => {}
            }
            self.group.progress();
        }
    }

    async fn note(&self, replica: ReplicaId, name: &str) {
        let (id, name) = (self.group.id, name.to_owned());
        let noted = self.group.store().write(0, move |txn| {
            let peer = txn.peer(&id, &replica)?;
            txn.note_blind(&id, peer, &name, now())
        });
        if let Err(error) = noted.await {
            tracing::warn!(%error, "relay could not be remembered");
        }
    }
}

/// What was seen of a session.
struct Seen {
    /// The relay's name, once the session was established.
    name: Option<String>,
    /// It has no room.
    full: Option<String>,
}

impl Seen {
    fn is_limited(&self) -> bool {
        self.name.is_none() || self.full.is_some()
    }

    fn end(self, close: Close) -> End {
        let wait = match close.code {
            ErrorCode::TooFast => Some(TOO_FAST_WAIT),
            ErrorCode::Refused
            | ErrorCode::Removed
            | ErrorCode::TooManyGroups
            | ErrorCode::RegistrationNeeded
            | ErrorCode::TooLarge
            | ErrorCode::Protocol
                if close.by_peer =>
            {
                Some(REFUSED_WAIT)
            }
            _ => None,
        };
        let said = close.by_peer.then(|| in_words(close.code, &close.text));
        let lost = self.name.is_none().then(|| format!("the connection ended: {}", close.text));
        End { wait, problem: self.full.or(said).or(lost) }
    }
}

/// What a relay's refusal means to a person.
fn in_words(code: ErrorCode, text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    let advice = match code {
        ErrorCode::GroupFull | ErrorCode::StorageFull => "what is new here stays here until it has room again",
        ErrorCode::TooFast => "the rest follows in a moment",
        ErrorCode::TooManyGroups => "ask its operator, or use another relay",
        ErrorCode::RegistrationNeeded => "add it again with the operator's token: `syncshell relay add URL.TOKEN`",
        ErrorCode::TooLarge => "what is too large for it goes to devices directly",
        ErrorCode::Refused | ErrorCode::Removed => "it does not know this device as a member of the group",
        _ => return format!("the relay refused: {clean}"),
    };
    format!("the relay refused: {clean}; {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> RelayUrl {
        text.parse().expect(text)
    }

    fn texts(urls: &[RelayUrl]) -> Vec<String> {
        urls.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn of_a_relay_that_the_home_has_what_others_tell_changes_nothing_but_that_it_has_tls() {
        let plain = RelayUrl::new("relay.example", 7, &[1; 32]);
        let (sealed, other) = (plain.with_pin(&[2; 32]), RelayUrl::new("relay.example", 7, &[3; 32]));
        let local = url("ws://127.0.0.1:9/");
        for (home, told, used) in [
            (&sealed, &plain, &sealed),
            (&plain, &sealed, &sealed),
            (&plain, &other, &plain),
            (&plain, &other.with_pin(&[2; 32]), &plain),
            (&sealed, &other.with_pin(&[2; 32]), &sealed),
            (&local, &RelayUrl::new("127.0.0.1", 9, &[1; 32]).with_pin(&[2; 32]), &local),
        ] {
            assert_eq!(merge(vec![home.clone()], vec![told.clone()]), std::slice::from_ref(used), "{home} {told}");
            assert_eq!(
                super::told(std::slice::from_ref(home), &[told.to_string()]),
                std::slice::from_ref(used),
                "{home} {told}"
            );
        }
        let with_token = plain.with_token("token");
        assert_eq!(texts(&merge(vec![with_token], vec![sealed.clone()])), [sealed.with_token("token").to_string()]);
        assert_eq!(merge(vec![sealed.clone()], vec![local.clone()]), [sealed, local]);
    }

    #[test]
    fn what_others_tell_of_relays_without_a_key_is_passed_over() {
        let plain = RelayUrl::new("relay.example", 7, &[1; 32]);
        let sealed = plain.with_pin(&[2; 32]);
        let given = ["ws://127.0.0.1:9/", "ws://localhost/", "nonsense", &sealed.to_string(), &plain.to_string()];
        assert_eq!(told(&[], &given.map(str::to_owned)), [sealed]);
    }
}
