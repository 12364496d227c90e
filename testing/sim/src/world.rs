//! A group in one process: replicas, a network between them, and virtual time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand_chacha::ChaCha20Rng;
use sync_client::exec::Arrival;
use sync_client::keys::GroupKeys;
use sync_core::Membership;
use sync_core::session::{Config, Effect, Ends, Reply, Report, Session, Side, hello_statement, kept_check, known_as};
use sync_crypto::pairing::consent;
use sync_crypto::{EpochSecret, SignPurpose};
use sync_store::{Content, NewEntry, StoreError};
use sync_types::{
    AuthorId, BlobId, Charter, Chunker, Class, Consent, Cursor, Envelope, EnvelopeHash, EpochId, ErrorCode, FeedHave,
    Frame, GroupId, GroupKind, InviteId, MemberId, Number, Operation, Quorum, ReplicaId, Role, Timestamp,
};

use crate::action::Liar as LiarRole;
use crate::action::{Action, Left, Lie, Recording, Step};
use crate::ledger::{CONVERGE, Checked, DURABLE, HOSTILE_INPUT, Ledger, NO_GAPS, REMOVED_IS_OUT, broken};
use crate::liar::{Liar, Talk};
use crate::random::{below, bytes, chance, derive, index};
use crate::replica::{ALL, Entry, Executed, Refused, Replica, Running, entry};
use crate::vfs::{Fault, Survive};

macro_rules! say {
    ($world:expr, $($word:tt)*) => {
        if $world.verbose {
            println!("{:>8} {}", $world.now - $crate::world::START, format_args!($($word)*));
        }
    };
}

mod folders;

/// When the simulation starts, in Unix ms.
pub(crate) const START: u64 = 1_800_000_000_000;
/// Ms a frame travels at most; frames of one connection keep their order.
const LATENCY: u64 = 30;
/// Ms an effect waits at most until it is carried out.
const WORK: u64 = 4;
/// Ms a conversation with the liar lasts.
const LIE: u64 = 600;
/// Connections two replicas have at once at most.
const CONNECTIONS: usize = 2;
/// Checks that look at whole logs are made once in so many steps.
const CHECK_EVERY: usize = 8;
/// Events until a group must have come to rest: many times what the longest sound run needs.
const MOST_EVENTS: usize = 60_000;
/// Times that all connections are made anew before all must hold the same: a fork shows in one session and is
/// compared in the next, and that once more for what a restored home writes anew.
const ROUNDS: usize = 4;
/// How files are cut, so that small ones have several chunks.
const SMALL: Chunker = Chunker { id: 1, min: 64, average: 256, max: 1024 };
/// What the app gives again after it was stored.
const RECENT: usize = 3;

/// Something that will happen.
#[derive(Debug, Clone, Copy)]
enum Event {
    Frame(u32, usize),
    Work(u32, usize, Lane),
    Break(u32),
    Restart(usize),
    Folder(usize, folders::Work),
}

/// Effects of one lane are carried out in order, those of different lanes in any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Store,
    Read,
    /// Of several acknowledgements that wait, the last says it all.
    Acknowledge,
}

enum Wire {
    Bytes(Vec<u8>),
    End,
}

/// Who is at an end of a connection.
enum Party {
    Replica { place: usize, session: Box<Session> },
    Liar(Talk),
}

/// One end of a connection.
struct End {
    party: Party,
    inbox: VecDeque<(u64, Wire)>,
    /// Nothing reaches this end before.
    last_arrival: u64,
    lanes: [VecDeque<Effect>; 3],
    /// What the peer said it holds, where that was compared.
    shown: Vec<FeedHave>,
    /// The session takes no frames at the moment.
    stalled: bool,
    closed: bool,
}

struct Link {
    ends: [End; 2],
}

/// What a newcomer is given.
struct Welcome {
    token: Vec<Vec<u8>>,
    epochs: Vec<(EpochId, EpochSecret)>,
}

/// How a replica that is about to crash comes back.
#[derive(Debug, Clone, Copy)]
struct CrashPlan {
    survive: Survive,
    down: u64,
    again: Option<u64>,
}

impl Default for CrashPlan {
    fn default() -> Self {
        Self { survive: Survive::Some, down: 1, again: None }
    }
}

/// A group and its history.
pub struct World {
    seed: u64,
    now: u64,
    rng: ChaCha20Rng,
    charter: Vec<u8>,
    group: GroupId,
    replicas: Vec<Replica>,
    plans: Vec<CrashPlan>,
    recent: Vec<VecDeque<NewEntry>>,
    liar: Option<Liar>,
    /// The liar belongs to the group.
    liar_admitted: bool,
    /// Epochs that replicas sealed in which knew that the hostile peer was removed.
    without_liar: BTreeSet<EpochId>,
    links: BTreeMap<u32, Link>,
    next_link: u32,
    queue: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    sides: Vec<u8>,
    invites: BTreeSet<InviteId>,
    /// Every database there ever was.
    databases: BTreeSet<ReplicaId>,
    ledger: Ledger,
    trace: blake3::Hasher,
    events: u64,
    /// The group has a folder.
    with_folders: bool,
    folder_rng: ChaCha20Rng,
    /// What devices are about to do for their folders.
    waiting: BTreeSet<(usize, folders::Work)>,
    /// Whether to tell what happens.
    pub verbose: bool,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Hash of everything that happened, in order.
    pub trace: [u8; 32],
    /// Events that happened.
    pub events: u64,
    /// Envelopes sealed.
    pub sealed: usize,
    /// Envelopes refused.
    pub refused: u64,
}

impl World {
    /// A group as a recording begins it.
    pub fn new(recording: &Recording, verbose: bool) -> Checked<Self> {
        let seed = recording.seed;
        let replicas: Vec<Replica> = (0..recording.replicas.max(1)).map(|place| Replica::new(seed, place)).collect();
        let mut rng = derive(seed, "network");
        let first = EpochSecret::make(&mut rng);
        let charter = Charter {
            kind: GroupKind::Random,
            founder: replicas[0].newcomer.keys(),
            quorum: Quorum::default(),
            suite: 1 + u32::from(chance(&mut rng, 25)),
            chunker: if recording.folders { SMALL } else { Chunker::default() },
            nonce: bytes(&mut rng),
            commitment: first.commitment(),
        }
        .encode();
        let places = replicas.len();
        let mut world = Self {
            seed,
            now: START,
            group: GroupId::of(&charter),
            plans: vec![CrashPlan::default(); places],
            recent: vec![VecDeque::new(); places],
            sides: vec![0; places],
            replicas,
            liar: recording.liar.is_some().then(|| Liar::new(seed, &charter)),
            liar_admitted: false,
            without_liar: BTreeSet::new(),
            links: BTreeMap::new(),
            next_link: 0,
            queue: BTreeMap::new(),
            next_event: 0,
            invites: BTreeSet::new(),
            databases: BTreeSet::new(),
            ledger: Ledger::default(),
            trace: blake3::Hasher::new(),
            events: 0,
            with_folders: recording.folders,
            folder_rng: derive(seed, "folders"),
            waiting: BTreeSet::new(),
            verbose,
            rng,
            charter,
        };
        let epoch = EpochId::first(&world.charter);
        let settled = world.replicas[0].settle(&world.charter, &[], &[(epoch, first)]);
        world.attempt(0, settled)?;
        let founder = world.replicas[0].newcomer.id();
        world.ledger.authors.insert(founder);
        world.recount(0)?;
        for newcomer in 1..recording.joined.min(places) {
            world.join(0, newcomer, newcomer % 2 == 0)?;
        }
        if recording.liar == Some(LiarRole::Member) {
            world.admit_liar()?;
        }
        for place in 0..places {
            world.folder_place(place)?;
        }
        Ok(world)
    }

    /// Does what a recording says, heals everything, and checks what must hold then.
    pub fn run(&mut self, steps: &[Step]) -> Checked<Summary> {
        for (at, step) in steps.iter().enumerate() {
            self.run_until(self.now + step.wait)?;
            self.note("step", &step.id.to_le_bytes());
            say!(self, "step {} {:?}", step.id, step.action);
            self.act(step)?;
            if at % CHECK_EVERY == CHECK_EVERY - 1 {
                self.check_positions()?;
                self.check_equals()?;
            }
        }
        self.finish()?;
        Ok(Summary {
            trace: *self.trace.finalize().as_bytes(),
            events: self.events,
            sealed: self.ledger.sealed.len(),
            refused: self.ledger.refused,
        })
    }

    fn note(&mut self, what: &str, bytes: &[u8]) {
        self.trace.update(&self.now.to_le_bytes());
        self.trace.update(what.as_bytes());
        self.trace.update(&(bytes.len() as u64).to_le_bytes());
        self.trace.update(bytes);
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.next_event += 1;
        self.queue.insert((at.max(self.now), self.next_event), event);
    }

    fn schedule_in(&mut self, most: u64, event: Event) {
        let wait = below(&mut self.rng, most + 1);
        self.schedule(self.now + wait, event);
    }

    fn run_until(&mut self, end: u64) -> Checked<()> {
        while let Some(first) = self.queue.first_entry() {
            let at = first.key().0;
            if at > end {
                break;
            }
            let event = first.remove();
            self.now = at;
            self.happen(event)?;
        }
        self.now = end;
        Ok(())
    }

    fn settle(&mut self) -> Checked<()> {
        for _ in 0..MOST_EVENTS {
            let Some(((at, _), event)) = self.queue.pop_first() else { return Ok(()) };
            self.now = at;
            self.happen(event)?;
        }
        broken(HOSTILE_INPUT, format!("the group does not come to rest within {MOST_EVENTS} events"))
    }

    fn happen(&mut self, event: Event) -> Checked<()> {
        self.events += 1;
        match event {
            Event::Frame(link, end) => self.frame(link, end),
            Event::Work(link, end, lane) => self.work(link, end, lane),
            Event::Break(link) => self.cut(link),
            Event::Restart(place) => self.restart(place),
            Event::Folder(place, work) => self.folder_event(place, work),
        }
    }

    // ---- replicas ----

    fn running(&mut self, place: usize) -> Option<&mut Running> {
        self.replicas.get_mut(place)?.running.as_mut()
    }

    fn timestamp(&self, place: usize) -> Timestamp {
        Timestamp(self.now.saturating_add_signed(self.replicas[place].clock))
    }

    /// Whether a replica knows that the hostile peer was removed.
    fn has_removed_liar(&mut self, place: usize) -> bool {
        let Some(liar) = self.liar.as_ref().map(Liar::id) else { return false };
        self.running(place).is_some_and(|running| running.has_removed(&liar).unwrap_or(false))
    }

    /// Takes in how something on a replica went: none if its disk was to blame.
    fn attempt<T>(&mut self, place: usize, done: Result<T, StoreError>) -> Checked<Option<T>> {
        let removed = self.has_removed_liar(place);
        let replica = &mut self.replicas[place];
        for sealed in replica.take_seals() {
            self.ledger.seal(place, replica.restored, &replica.shown, &sealed)?;
            let epoch = Envelope::parse(&sealed).ok().filter(|envelope| envelope.header.class == Class::Sealed);
            self.without_liar.extend(epoch.filter(|_| removed).map(|envelope| envelope.header.epoch));
        }
        if let Some(running) = &replica.running {
            replica.opens = running.with_keys(|keys| keys.epochs().collect());
        }
        let dead = replica.disk.is_dead();
        let outcome = match done {
            Ok(done) => Some(done),
            Err(error) => {
                say!(self, "replica {place}: {error}");
                self.note("failure", &[u8::try_from(place).unwrap_or(u8::MAX)]);
                let blamed = matches!(error, StoreError::Io(_) | StoreError::DiskFull | StoreError::RolledBack);
                if !dead && (!blamed || !self.replicas[place].troubled) {
                    return broken(DURABLE, format!("replica {place} cannot go on: {error}"));
                }
                None
            }
        };
        if dead {
            self.crash(place)?;
        }
        Ok(outcome)
    }

    /// Reads something that must be readable.
    fn read<T>(
        &mut self,
        place: usize,
        work: impl FnOnce(&mut Running) -> Result<T, StoreError>,
    ) -> Checked<Option<T>> {
        let Some(running) = self.running(place) else { return Ok(None) };
        let done = work(running);
        self.attempt(place, done)
    }

    /// The process is gone; the machine comes back as planned.
    fn crash(&mut self, place: usize) -> Checked<()> {
        let CrashPlan { down, .. } = self.plans[place];
        say!(self, "replica {place} is down for {down} ms");
        self.note("crash", &[u8::try_from(place).unwrap_or(u8::MAX)]);
        let replica = &mut self.replicas[place];
        replica.disk.cut_power();
        replica.tree.cut_power();
        replica.running = None;
        replica.folder = None;
        let links: Vec<u32> = self.links_of(place);
        for link in links {
            self.cut(link)?;
        }
        self.schedule(self.now + down, Event::Restart(place));
        Ok(())
    }

    fn restart(&mut self, place: usize) -> Checked<()> {
        let CrashPlan { survive, again, .. } = std::mem::take(&mut self.plans[place]);
        let replica = &mut self.replicas[place];
        if replica.running.is_some() || !replica.exists {
            return Ok(());
        }
        let troubled = replica.troubled;
        replica.disk.restart(survive, &mut self.rng);
        self.folder_crash(place, survive)?;
        let replica = &mut self.replicas[place];
        if let Some(again) = again.filter(|_| troubled) {
            replica.disk.fail_after(again, Fault::PowerCut);
        }
        let started = replica.start();
        say!(self, "replica {place} starts again: {}", started.is_ok());
        if self.attempt(place, started)?.is_none() {
            if !self.replicas[place].disk.is_dead() {
                self.schedule(self.now + 1 + LATENCY, Event::Restart(place));
            }
            return Ok(());
        }
        // it started, and only a group makes it run
        let lost = self.replicas[place].held.len();
        if self.replicas[place].running.is_none() && lost > 0 {
            return broken(DURABLE, format!("replica {place} lost its group and {lost} entries"));
        }
        self.replicas[place].exists = self.replicas[place].running.is_some();
        self.recount(place)?;
        self.folder_start(place)
    }

    /// Reads what a replica holds and compares it with what it must hold.
    fn recount(&mut self, place: usize) -> Checked<()> {
        let Some(entries) = self.read(place, |running| running.scan())? else { return Ok(()) };
        let held: BTreeSet<EnvelopeHash> = entries.iter().map(|entry| entry.hash).collect();
        for entry in &entries {
            self.check_sound(place, entry.hash, entry.sender, entry.number)?;
        }
        let removed = self.has_removed_liar(place);
        for lost in self.replicas[place].held.difference(&held) {
            // what nobody had acknowledged may have been issued again by a new author
            let again = self.ledger.sealed.get(lost).is_some_and(|lost| {
                let issued = |hash| {
                    let again: Option<&crate::ledger::Sealed> = self.ledger.sealed.get(hash);
                    again.is_some_and(|again| again.place == place && again.blob_id == lost.blob_id)
                };
                lost.place == place && lost.class == Class::Sealed && held.iter().any(issued)
            });
            // of who was removed what stands behind the end does not count any more
            let ended = removed && !self.ledger.sealed.contains_key(lost);
            if !again && !ended {
                let what = self.ledger.sealed.get(lost).map(|sealed| (sealed.sender.short(), sealed.number));
                return broken(DURABLE, format!("replica {place} no longer holds {what:?}, which it had stored"));
            }
        }
        self.replicas[place].held = held;
        let database = self.running(place).map(|running| running.id);
        self.databases.extend(database);
        Ok(())
    }

    /// Nothing counts that its author did not seal.
    fn check_sound(&self, place: usize, hash: EnvelopeHash, sender: AuthorId, number: Number) -> Checked<()> {
        let liar = self.liar.as_ref().filter(|_| self.liar_admitted);
        let sound = if self.ledger.authors.contains(&sender) {
            self.ledger.sealed.contains_key(&hash)
        } else {
            liar.is_some_and(|liar| sender == liar.id() && liar.signed.contains(&hash))
        };
        if sound {
            return Ok(());
        }
        broken(HOSTILE_INPUT, format!("replica {place} stores entry {number} that {} never signed", sender.short()))
    }

    /// After anything that may have changed a log: sessions learn of it.
    fn changed(&mut self, place: usize) -> Checked<()> {
        let both = self.read(place, |running| Ok((running.newest()?, running.membership()?)))?;
        let Some((newest, membership)) = both else { return Ok(()) };
        self.folder_news(place);
        for link in self.links_of(place) {
            for end in 0..2 {
                let at = self.links.get_mut(&link).map(|link| &mut link.ends[end]);
                if let Some(End { party: Party::Replica { place: who, session }, .. }) = at
                    && *who == place
                {
                    session.handle_membership(&membership);
                    session.handle_newest(newest);
                    self.carry_out(link, end)?;
                }
            }
        }
        Ok(())
    }

    /// Works on a replica that is up, and takes in what that changed; none if it is down or its disk failed.
    fn operate<T>(
        &mut self,
        place: usize,
        work: impl FnOnce(&mut Running) -> Result<T, StoreError>,
    ) -> Checked<Option<T>> {
        let Some(running) = self.running(place) else { return Ok(None) };
        let author = running.author();
        let done = work(running);
        let renewed = self.running(place).is_some_and(|running| running.author() != author);
        let outcome = self.attempt(place, done)?;
        if renewed {
            say!(self, "replica {place} goes on as another author");
            self.recount(place)?;
        }
        Ok(outcome)
    }

    // ---- the network ----

    fn links_of(&self, place: usize) -> Vec<u32> {
        let here = |end: &End| matches!(end.party, Party::Replica { place: who, .. } if who == place);
        self.links.iter().filter(|(_, link)| link.ends.iter().any(here)).map(|(id, _)| *id).collect()
    }

    fn links_between(&self, a: usize, b: usize) -> Vec<u32> {
        let of_b = self.links_of(b);
        self.links_of(a).into_iter().filter(|link| of_b.contains(link)).collect()
    }

    /// A session of a replica on a new channel.
    fn session(&mut self, place: usize, side: Side, binding: [u8; 32]) -> Checked<Option<Party>> {
        let group = self.group;
        let configured = self.read(place, |running| {
            let membership = running.membership()?;
            let (author, replica) = (running.author(), running.id);
            let Some(token) = membership.token(&author) else { return Ok(None) };
            let statement = hello_statement(&binding, side, &group, &replica);
            let proof = running.secret().sign(SignPurpose::Hello, &[&statement]);
            let config = Config {
                side,
                ends: Ends::Members,
                group,
                author,
                replica,
                token,
                binding,
                proof,
                name: format!("replica {place}"),
                addresses: Vec::new(),
                incarnation: running.incarnation,
            };
            Ok(Some((config, running.newest()?)))
        })?;
        match configured {
            None => Ok(None),
            Some(None) => broken(CONVERGE, format!("replica {place} has no token of its own")),
            Some(Some((config, newest))) => {
                let mut session = Box::new(Session::new(config));
                session.handle_newest(newest);
                Ok(Some(Party::Replica { place, session }))
            }
        }
    }

    fn connect(&mut self, from: usize, to: usize) -> Checked<Option<u32>> {
        let apart = self.sides.get(from) != self.sides.get(to);
        if from == to || apart || self.links_between(from, to).len() >= CONNECTIONS {
            return Ok(None);
        }
        let binding = bytes(&mut self.rng);
        let Some(dialler) = self.session(from, Side::Dialler, binding)? else { return Ok(None) };
        let Some(acceptor) = self.session(to, Side::Acceptor, binding)? else { return Ok(None) };
        if self.running(from).is_none() {
            return Ok(None);
        }
        let link = self.join_up(dialler, acceptor);
        self.folder_met(from);
        self.folder_met(to);
        self.carry_out(link, 0)?;
        self.carry_out(link, 1)?;
        Ok(Some(link))
    }

    fn join_up(&mut self, dialler: Party, acceptor: Party) -> u32 {
        let end = |party| End {
            party,
            inbox: VecDeque::new(),
            last_arrival: 0,
            lanes: Default::default(),
            shown: Vec::new(),
            stalled: false,
            closed: false,
        };
        self.next_link += 1;
        self.links.insert(self.next_link, Link { ends: [end(dialler), end(acceptor)] });
        self.next_link
    }

    /// A connection is gone, and what was under way on it; storing that had begun may still end.
    fn cut(&mut self, link: u32) -> Checked<()> {
        let Some(gone) = self.links.remove(&link) else { return Ok(()) };
        self.note("cut", &link.to_le_bytes());
        for end in gone.ends {
            let Party::Replica { place, .. } = end.party else { continue };
            if chance(&mut self.rng, 50) {
                continue;
            }
            let [store, ..] = end.lanes;
            if !store.is_empty() {
                self.execute(place, store.into(), false)?;
            }
        }
        Ok(())
    }

    fn end(&mut self, link: u32, end: usize) -> Option<&mut End> {
        self.links.get_mut(&link).map(|link| &mut link.ends[end])
    }

    fn send(&mut self, link: u32, from: usize, wire: Wire) {
        let latency = below(&mut self.rng, LATENCY) + 1;
        let earliest = self.now + latency;
        let Some(to) = self.end(link, 1 - from) else { return };
        let at = earliest.max(to.last_arrival);
        to.last_arrival = at;
        to.inbox.push_back((at, wire));
        self.schedule(at, Event::Frame(link, 1 - from));
    }

    /// The next frame of an end's inbox, if its time has come and it is wanted.
    fn frame(&mut self, link: u32, at: usize) -> Checked<()> {
        let now = self.now;
        let Some(end) = self.end(link, at) else { return Ok(()) };
        if end.inbox.front().is_none_or(|(due, _)| *due > now) {
            return Ok(());
        }
        if let Party::Replica { session, .. } = &end.party
            && !end.closed
            && !session.accepts_frames()
        {
            end.stalled = true;
            return Ok(());
        }
        let Some((_, wire)) = end.inbox.pop_front() else { return Ok(()) };
        if end.closed {
            return Ok(());
        }
        match wire {
            Wire::End => {
                end.closed = true;
                let both = self.links.get(&link).is_some_and(|link| link.ends.iter().all(|end| end.closed));
                if both { self.cut(link) } else { Ok(()) }
            }
            Wire::Bytes(bytes) => self.hear(link, at, &bytes),
        }
    }

    fn hear(&mut self, link: u32, at: usize, bytes: &[u8]) -> Checked<()> {
        self.note("frame", bytes);
        let decoded = Frame::decode(bytes);
        let Some(end) = self.links.get_mut(&link).map(|link| &mut link.ends[at]) else { return Ok(()) };
        match (&mut end.party, decoded) {
            (Party::Liar(talk), Ok(frame)) => {
                let answers = self.liar.as_mut().map(|liar| liar.hear(talk, frame)).unwrap_or_default();
                for answer in answers {
                    self.send(link, at, Wire::Bytes(answer));
                }
                Ok(())
            }
            (Party::Liar(_), Err(error)) => broken(HOSTILE_INPUT, format!("an honest frame does not decode: {error}")),
            (Party::Replica { session, .. }, Ok(frame)) => {
                session.handle_frame(frame);
                self.carry_out(link, at)
            }
            (Party::Replica { place, .. }, Err(error)) => {
                self.ledger.refused += 1;
                let place = *place;
                let other = self.links.get(&link).map(|link| matches!(link.ends[1 - at].party, Party::Liar(_)));
                if other == Some(false) {
                    return broken(CONVERGE, format!("replica {place} cannot read an honest frame: {error}"));
                }
                let frame = Frame::Error { code: ErrorCode::Protocol, text: error.to_string() };
                self.send(link, at, Wire::Bytes(frame.encode()));
                self.close(link, at)
            }
        }
    }

    fn close(&mut self, link: u32, at: usize) -> Checked<()> {
        if let Some(end) = self.end(link, at) {
            end.closed = true;
        }
        self.send(link, at, Wire::End);
        Ok(())
    }

    /// Carries out what a session asks for, or puts it into its lane.
    fn carry_out(&mut self, link: u32, at: usize) -> Checked<()> {
        loop {
            let Some(End { party: Party::Replica { place, session }, lanes, .. }) =
                self.links.get_mut(&link).map(|link| &mut link.ends[at])
            else {
                return Ok(());
            };
            let place = *place;
            let Some(effect) = session.poll_effect() else { break };
            match effect {
                Effect::Send(frame) => {
                    let shown = self.end(link, at).map(|end| end.shown.clone()).unwrap_or_default();
                    let author = self.running(place).map(|running| running.author());
                    let shown = shown.iter().find(|feed| Some(feed.author) == author);
                    let nothing = BTreeSet::new();
                    let to_liar =
                        matches!(self.links.get(&link).map(|link| &link.ends[1 - at].party), Some(Party::Liar(_)));
                    let entries = !matches!(frame, Frame::Hello { .. }) && !envelopes(&frame).is_empty();
                    if to_liar && entries && self.has_removed_liar(place) {
                        let text = format!("replica {place} sends {} to the one it knows to be removed", short(&frame));
                        return broken(REMOVED_IS_OUT, text);
                    }
                    let holds = match self.links.get(&link).map(|link| &link.ends[1 - at].party) {
                        Some(Party::Replica { place, .. }) => &self.replicas[*place].held,
                        _ => &nothing,
                    };
                    for envelope in envelopes(&frame) {
                        self.ledger.send(place, shown, holds, envelope)?;
                    }
                    say!(self, "{place} -> link {link}: {}", short(&frame));
                    self.send(link, at, Wire::Bytes(frame.encode()));
                }
                Effect::Report(report) => self.report(link, at, place, &report)?,
                Effect::Close(close) => {
                    say!(self, "replica {place} ends link {link}: {}", close.text);
                    let honest = self
                        .links
                        .get(&link)
                        .is_some_and(|link| link.ends.iter().all(|end| matches!(end.party, Party::Replica { .. })));
                    if honest && close.code != ErrorCode::Unavailable {
                        return broken(CONVERGE, format!("honest replica {place} ends a session: {}", close.text));
                    }
                    self.close(link, at)?;
                }
                effect => {
                    let lane = match effect {
                        Effect::Store { .. } => Lane::Store,
                        Effect::Acknowledged { .. } => Lane::Acknowledge,
                        _ => Lane::Read,
                    };
                    let waiting = &mut lanes[lane as usize];
                    if lane == Lane::Acknowledge && !waiting.is_empty() {
                        waiting.clear();
                        waiting.push_back(effect);
                        continue;
                    }
                    waiting.push_back(effect);
                    if waiting.len() == 1 {
                        self.schedule_in(WORK, Event::Work(link, at, lane));
                    }
                }
            }
        }
        let Some(end) = self.end(link, at) else { return Ok(()) };
        if end.stalled {
            end.stalled = false;
            // every frame that came meanwhile had its turn and was left
            let waiting = end.inbox.len();
            for _ in 0..waiting {
                self.schedule(self.now, Event::Frame(link, at));
            }
        }
        Ok(())
    }

    /// The first effect of a lane, or several arrivals in one commit.
    fn work(&mut self, link: u32, at: usize, lane: Lane) -> Checked<()> {
        let Some(waiting) = self.end(link, at).map(|end| end.lanes[lane as usize].len()) else { return Ok(()) };
        let count = if lane == Lane::Store { 1 + index(&mut self.rng, waiting.max(1)) } else { 1 };
        let Some(end) = self.end(link, at) else { return Ok(()) };
        let Party::Replica { place, .. } = end.party else { return Ok(()) };
        let effects: Vec<Effect> = end.lanes[lane as usize].iter().take(count).cloned().collect();
        let have = match effects.first() {
            Some(Effect::Select { have, .. }) => have.clone(),
            Some(_) => Vec::new(),
            None => return Ok(()),
        };
        let honest = !self.links.get(&link).is_some_and(|link| matches!(link.ends[1 - at].party, Party::Liar(_)));
        let executed = self.execute(place, effects, honest)?;
        // a crash takes the connection with it
        let Some(end) = self.end(link, at) else { return Ok(()) };
        end.lanes[lane as usize].drain(..count);
        let replies = match executed {
            Some(executed) => {
                if executed.believed {
                    end.shown = have;
                }
                executed.replies
            }
            None => {
                if lane == Lane::Store {
                    // what was to follow a batch that was not stored must not be stored as if it had been
                    end.lanes[lane as usize].clear();
                }
                vec![Reply::Failed { text: "the database does not work at the moment".to_owned() }]
            }
        };
        let more = !end.lanes[lane as usize].is_empty();
        if let Party::Replica { session, .. } = &mut end.party {
            replies.into_iter().for_each(|reply| session.handle_reply(reply));
        }
        if more {
            self.schedule_in(WORK, Event::Work(link, at, lane));
        }
        self.carry_out(link, at)
    }

    /// Carries out effects of one lane on a replica's database; none if it failed.
    fn execute(&mut self, place: usize, effects: Vec<Effect>, honest: bool) -> Checked<Option<Executed>> {
        let shown: Vec<FeedHave> = match effects.first() {
            Some(Effect::Select { have, .. }) => have.clone(),
            _ => Vec::new(),
        };
        let before = self.running(place).map(|running| running.author());
        let done = self.operate(place, |running| {
            let mut arrivals = Vec::new();
            let mut executed = Executed::default();
            for effect in effects {
                match effect {
                    Effect::Store { id, replica, batch, position } => {
                        arrivals.push((id, Arrival { replica, batch, position }));
                    }
                    effect => executed = running.execute(effect)?,
                }
            }
            if arrivals.is_empty() { Ok(executed) } else { running.arrive(&arrivals) }
        })?;
        let Some(executed) = done else { return Ok(None) };
        if executed.failed_to_open && !self.replicas[place].troubled {
            return broken(DURABLE, format!("replica {place} cannot open a rotation on a sound disk"));
        }
        if let Some(author) = before.filter(|_| executed.believed) {
            let highest = shown.iter().filter(|feed| feed.author == author).filter_map(FeedHave::highest).max();
            if let Some(highest) = highest {
                let known = self.replicas[place].shown.entry(author).or_default();
                *known = (*known).max(highest);
            }
        }
        for Refused { bytes, comes_again } in &executed.refused {
            self.ledger.refused += 1;
            // of a feed with two branches a peer may have shown us one while we have the other, with whom it admits; what
            // is refused before membership was compared anew comes again with everything
            if *comes_again && self.ledger.forked() {
                continue;
            }
            let hash = Envelope::parse(bytes).map(|envelope| envelope.hash());
            if honest && hash.is_ok_and(|hash| self.ledger.sealed.contains_key(&hash)) {
                return broken(CONVERGE, format!("replica {place} refuses a sound entry of an honest peer"));
            }
        }
        for hash in &executed.stored {
            if let Some(sealed) = self.ledger.sealed.get(hash) {
                self.check_sound(place, *hash, sealed.sender, sealed.number)?;
            } else if !self.liar.as_ref().is_some_and(|liar| liar.signed.contains(hash)) {
                return broken(HOSTILE_INPUT, format!("replica {place} stores an entry that nobody signed"));
            }
            self.replicas[place].held.insert(*hash);
        }
        if !executed.stored.is_empty() {
            self.changed(place)?;
        }
        Ok(Some(executed))
    }

    /// What a session reports must be true.
    fn report(&mut self, link: u32, at: usize, place: usize, report: &Report) -> Checked<()> {
        let other = self.links.get(&link).map(|link| &link.ends[1 - at].party);
        let Some(Party::Replica { place: other, .. }) = other else { return Ok(()) };
        let other = *other;
        if let Report::HandedOver { cursor } = report {
            let Some(entries) = self.read(place, |running| running.scan())? else { return Ok(()) };
            let Some(others) = self.read(other, |running| running.scan())? else { return Ok(()) };
            let author = self.running(place).map(|running| running.author());
            for entry in entries.iter().filter(|entry| entry.cursor <= *cursor && Some(entry.sender) == author) {
                // another branch of the feed shows when they meet again
                let known = others.iter().any(|held| (held.sender, held.number) == (entry.sender, entry.number));
                if !known {
                    let text = format!(
                        "replica {place} says it handed everything up to {cursor} to {other}, which lacks entry {} of {}",
                        entry.number,
                        entry.sender.short()
                    );
                    return broken(DURABLE, text);
                }
            }
        }
        Ok(())
    }

    fn honest(&self, entry: &Entry) -> bool {
        self.ledger.authors.contains(&entry.sender)
    }
}

/// The envelopes a frame carries.
fn envelopes(frame: &Frame) -> Vec<&[u8]> {
    match frame {
        Frame::Push { entries, .. } | Frame::PullResponse { entries, .. } => {
            entries.iter().map(|carried| carried.envelope.as_slice()).collect()
        }
        Frame::Hello { token, .. } => token.iter().map(Vec::as_slice).collect(),
        _ => Vec::new(),
    }
}

/// A frame in a few words.
fn short(frame: &Frame) -> String {
    match frame {
        Frame::Push { entries, max_cursor, .. } => format!("PUSH {} up to {max_cursor}", entries.len()),
        Frame::PullResponse { request, entries, max_cursor, has_more, reset, .. } => {
            format!("RESPONSE {request}: {} up to {max_cursor}, more {has_more}, reset {reset}", entries.len())
        }
        Frame::Pull { request, after, have, .. } => {
            let feeds: Vec<String> = have
                .iter()
                .map(|feed| {
                    let ranges: Vec<String> =
                        feed.ranges.iter().map(|range| format!("{}-{}", range.first, range.last)).collect();
                    format!("{}:{} fork {:?}", feed.author.short(), ranges.join(","), feed.fork)
                })
                .collect();
            format!("PULL {request} after {after}: {}", feeds.join("; "))
        }
        Frame::PushAck { cursor } => format!("ACK {cursor}"),
        Frame::Want { wants, .. } => format!("WANT {} ranges", wants.len()),
        Frame::Hello { author, .. } => format!("HELLO {}", author.short()),
        Frame::Welcome { max_cursor, .. } => format!("WELCOME {max_cursor}"),
        Frame::Error { text, .. } => format!("ERROR {text}"),
        _ => "another frame".to_owned(),
    }
}

// ---- what is done ----

impl World {
    fn act(&mut self, step: &Step) -> Checked<()> {
        let places = self.replicas.len();
        match &step.action {
            Action::Push { at, sizes } => self.push(step.id, *at, sizes),
            Action::Pull { at, limit } => self.pull(*at, *limit),
            Action::Connect { from, to, lasts } => {
                let link = self.connect(*from, *to)?;
                if let (Some(link), Some(lasts)) = (link, lasts) {
                    self.schedule(self.now + lasts, Event::Break(link));
                }
                Ok(())
            }
            Action::Disconnect { a, b } => self.links_between(*a, *b).into_iter().try_for_each(|link| self.cut(link)),
            Action::Partition { sides } => {
                self.sides = sides.iter().copied().chain(std::iter::repeat(0)).take(places).collect();
                for a in 0..places {
                    for b in 0..a {
                        if self.sides[a] != self.sides[b] {
                            self.links_between(a, b).into_iter().try_for_each(|link| self.cut(link))?;
                        }
                    }
                }
                Ok(())
            }
            Action::Heal => {
                self.sides.fill(0);
                Ok(())
            }
            Action::Crash { at, after, survive, down, again } if self.running(*at).is_some() => {
                let survive = if *survive == Left::Everything && after.is_some() { Left::Some } else { *survive };
                self.plans[*at] = CrashPlan { survive: survive.into(), down: *down, again: *again };
                self.replicas[*at].troubled = true;
                match after {
                    Some(after) => {
                        self.replicas[*at].disk.fail_after(*after, Fault::PowerCut);
                        Ok(())
                    }
                    None => self.crash(*at),
                }
            }
            Action::DiskError { at, after } if *at < places => {
                self.replicas[*at].troubled = true;
                self.replicas[*at].disk.fail_after(*after, Fault::IoError);
                Ok(())
            }
            Action::DiskFull { at, free } if *at < places => {
                self.replicas[*at].troubled = true;
                self.replicas[*at].disk.limit(Some(*free));
                Ok(())
            }
            Action::DiskRoom { at } if *at < places => {
                self.replicas[*at].disk.limit(None);
                Ok(())
            }
            Action::Clock { at, days } if *at < places => {
                self.replicas[*at].clock = days * 24 * 60 * 60 * 1000;
                Ok(())
            }
            Action::Backup { at } if self.running(*at).is_some() => {
                self.replicas[*at].back_up();
                Ok(())
            }
            Action::Restore { at } if *at < places => self.restore(*at),
            Action::Copy { from, to } => self.copy(*from, *to),
            Action::Join { by, newcomer, admin } => self.join(*by, *newcomer, *admin),
            Action::Invite { at } => self.invite(step.id, *at),
            Action::Rotate { at } if *at < places => {
                let now = self.timestamp(*at);
                self.operate(*at, |running| running.rotate(now))?;
                self.recount(*at)?;
                self.changed(*at)
            }
            Action::Remove { at } if *at < places && self.liar_admitted => {
                let now = self.timestamp(*at);
                let Some(liar) = self.liar.as_ref().map(Liar::id) else { return Ok(()) };
                self.operate(*at, |running| running.remove(liar, now))?;
                self.recount(*at)?;
                self.changed(*at)
            }
            Action::Grant { from, to } => self.grant(*from, *to),
            Action::Lie { to, dials, lie } => self.lie(*to, *dials, *lie),
            Action::Edit { at, edit, after, noticed } => self.folder_edit(*at, edit, *after, *noticed),
            Action::Scan { at } => {
                self.folder_scan(*at);
                Ok(())
            }
            Action::FolderTrouble { at, after, trouble, survive } if self.running(*at).is_some() => {
                self.replicas[*at].troubled = true;
                self.plans[*at] = CrashPlan { survive: (*survive).into(), ..CrashPlan::default() };
                self.replicas[*at].tree.trouble(*after, *trouble);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn push(&mut self, id: u64, at: usize, sizes: &[usize]) -> Checked<()> {
        if self.running(at).is_none() {
            return Ok(());
        }
        let mut rng = derive(self.seed, &format!("push {id}"));
        let now = self.timestamp(at);
        let mut entries = std::mem::take(&mut self.replicas[at].outbox);
        if chance(&mut rng, 20) {
            entries.extend(self.recent[at].iter().cloned());
        }
        for size in sizes {
            let mut body = vec![0; *size];
            // half of it compresses
            rand_core::Rng::fill_bytes(&mut rng, &mut body[..size / 2]);
            let blob_id = BlobId(bytes(&mut rng));
            self.ledger.bodies.insert(blob_id, *blake3::hash(&body).as_bytes());
            let content = Content::Sealed { kind: 1, stream: "app".to_owned(), body };
            entries.push(entry(blob_id, now, content));
        }
        self.push_entries(at, entries)
    }

    fn push_entries(&mut self, at: usize, entries: Vec<NewEntry>) -> Checked<()> {
        let Some(appended) = self.operate(at, |running| running.append(&entries))? else {
            // the app asks again, with the same ids
            self.replicas[at].outbox = entries;
            return Ok(());
        };
        for (entry, stored) in entries.iter().zip(&appended) {
            let Some(body) = self.ledger.bodies.get(&entry.blob_id).copied() else { continue };
            let promise = self.ledger.promises.entry(entry.blob_id);
            promise.or_insert(crate::ledger::Promise { body, stands: true }).stands = true;
            self.replicas[at].held.insert(stored.hash);
        }
        let recent = &mut self.recent[at];
        recent.extend(entries);
        while recent.len() > RECENT {
            recent.pop_front();
        }
        self.note("push", &(appended.len() as u64).to_le_bytes());
        self.changed(at)
    }

    /// The app reads on, and must not have missed anything before.
    fn pull(&mut self, at: usize, limit: usize) -> Checked<()> {
        let Some(replica) = self.replicas.get(at) else { return Ok(()) };
        let after = replica.app.cursor;
        let limits = sync_store::Limits { entries: limit, bytes: 64 << 10 };
        let Some(sealed) =
            self.read(at, |running| running.db.read(|reader| reader.read_sealed(&running.group, after, limits)))?
        else {
            return Ok(());
        };
        let app = &mut self.replicas[at].app;
        for stored in &sealed.entries {
            if stored.cursor <= after || stored.cursor > sealed.max_cursor {
                return broken(NO_GAPS, format!("replica {at} gives cursor {} after {after}", stored.cursor));
            }
            if let Ok(envelope) = Envelope::parse(&stored.bytes) {
                app.seen.insert(envelope.hash());
            }
        }
        app.cursor = sealed.max_cursor;
        let count = sealed.entries.len() as u64;
        self.note("pull", &count.to_le_bytes());
        self.check_app(at)
    }

    /// Everything readable up to the app's cursor was given to it.
    fn check_app(&mut self, at: usize) -> Checked<()> {
        let everything =
            self.read(at, |running| running.db.read(|reader| reader.read_sealed(&running.group, Cursor(0), ALL)))?;
        let app = &self.replicas[at].app;
        for stored in everything.into_iter().flat_map(|sealed| sealed.entries) {
            let hash = Envelope::parse(&stored.bytes).map(|envelope| envelope.hash()).unwrap_or(EnvelopeHash::NONE);
            if stored.cursor <= app.cursor && !app.seen.contains(&hash) {
                let (number, author) = (stored.number, stored.author.short());
                let text = format!(
                    "the app of replica {at} has read up to {} and was never given entry {number} of {author} at {}",
                    app.cursor, stored.cursor
                );
                return broken(NO_GAPS, text);
            }
        }
        Ok(())
    }

    fn restore(&mut self, at: usize) -> Checked<()> {
        if self.replicas[at].backup.is_none() {
            return Ok(());
        }
        if self.replicas[at].running.is_some() {
            self.plans[at] = CrashPlan { survive: Survive::Everything, down: 1, again: None };
            self.crash(at)?;
        }
        self.plans[at] = CrashPlan { survive: Survive::Everything, down: 1, again: None };
        self.replicas[at].restore();
        self.folder_restore(at);
        self.recent[at].clear();
        // without the faults of before, so that what is held is known at once
        self.replicas[at].disk.restart(Survive::Everything, &mut self.rng);
        self.replicas[at].disk.heal();
        self.restart(at)?;
        // what nobody holds any more, or nobody has the key of, was lost with the home
        let opens: BTreeSet<EpochId> = self.replicas.iter().flat_map(|replica| replica.opens.iter().copied()).collect();
        let held: BTreeSet<BlobId> = self
            .replicas
            .iter()
            .flat_map(|replica| &replica.held)
            .filter_map(|hash| self.ledger.sealed.get(hash))
            .filter(|sealed| opens.contains(&sealed.epoch))
            .map(|sealed| sealed.blob_id)
            .collect();
        for (blob_id, promise) in &mut self.ledger.promises {
            promise.stands &= held.contains(blob_id);
        }
        Ok(())
    }

    fn copy(&mut self, from: usize, to: usize) -> Checked<()> {
        let places = self.replicas.len();
        if from >= places || to >= places || from == to || self.replicas[to].exists || self.running(from).is_none() {
            return Ok(());
        }
        let [original, copy] =
            self.replicas.get_disjoint_mut([from, to]).expect("BUG: two places that exist and are not one");
        copy.copy_of(original);
        self.restart(to)
    }

    fn join(&mut self, by: usize, newcomer: usize, admin: bool) -> Checked<()> {
        let places = self.replicas.len();
        if by >= places || newcomer >= places || self.replicas[newcomer].exists {
            return Ok(());
        }
        let secret = &self.replicas[newcomer].newcomer;
        let (keys, consent) = (secret.keys(), consent(secret, [0; 32], None));
        let Some(Welcome { token, epochs }) = self.admit(by, (keys.clone(), consent), admin)? else { return Ok(()) };
        self.ledger.authors.insert(keys.verify);
        let settled = self.replicas[newcomer].settle(&self.charter, &token, &epochs);
        if self.attempt(newcomer, settled)?.is_none() {
            if !self.replicas[newcomer].disk.is_dead() {
                self.schedule(self.now + LATENCY, Event::Restart(newcomer));
            }
            return Ok(());
        }
        self.recount(newcomer)?;
        self.folder_place(newcomer)
    }

    /// Lets someone in.
    fn admit(
        &mut self,
        by: usize,
        (keys, consent): (sync_types::AuthorKeys, Consent),
        admin: bool,
    ) -> Checked<Option<Welcome>> {
        let now = self.timestamp(by);
        let author = keys.verify;
        let done = self.operate(by, |running| {
            let membership = running.membership()?;
            let role = membership.author(&running.author()).map_or(Role::Guest, |own| own.role);
            if !membership.is_admitted(&author) && role.may_invite() {
                let role = if admin { role } else { Role::Member.max(role) };
                let member = MemberId::from(author);
                running.operate(Operation::Admit { keys, member, role, invite: None, consent }, now)?;
            }
            let token = running.membership()?.token(&author);
            Ok(token.map(|token| Welcome { token, epochs: running.with_keys(GroupKeys::everything) }))
        })?;
        self.recount(by)?;
        self.changed(by)?;
        Ok(done.flatten())
    }

    fn admit_liar(&mut self) -> Checked<()> {
        let Some(keys) = self.liar.as_ref().map(Liar::public) else { return Ok(()) };
        if let Some(Welcome { token, epochs }) = self.admit(0, keys, false)?
            && let Some(liar) = &mut self.liar
        {
            liar.admit(token, epochs);
            self.liar_admitted = true;
        }
        Ok(())
    }

    fn invite(&mut self, id: u64, at: usize) -> Checked<()> {
        if self.running(at).is_none() {
            return Ok(());
        }
        let mut rng = derive(self.seed, &format!("invite {id}"));
        let now = self.timestamp(at);
        let known = self.invites.first().copied().filter(|_| chance(&mut rng, 40));
        let operation = match known {
            Some(id) => Operation::Revoke { id },
            None => {
                let id = InviteId(bytes(&mut rng));
                self.invites.insert(id);
                let expires = Timestamp(now.0.saturating_add(600_000));
                Operation::Invite { id, verifier: bytes(&mut rng), role: Role::Member, member: None, expires }
            }
        };
        self.operate(at, |running| running.operate(operation, now))?;
        self.recount(at)?;
        self.changed(at)
    }

    fn grant(&mut self, from: usize, to: usize) -> Checked<()> {
        let Some(epochs) = self.running(from).map(|running| running.with_keys(GroupKeys::everything)) else {
            return Ok(());
        };
        self.operate(to, |running| epochs.iter().try_for_each(|(epoch, secret)| running.learn(*epoch, secret)))?;
        self.changed(to)
    }

    fn lie(&mut self, to: usize, dials: bool, lie: Lie) -> Checked<()> {
        if self.running(to).is_none() || self.liar.is_none() {
            return Ok(());
        }
        let binding = bytes(&mut self.rng);
        let (here, there) = if dials { (Side::Dialler, Side::Acceptor) } else { (Side::Acceptor, Side::Dialler) };
        let Some(honest) = self.session(to, there, binding)? else { return Ok(()) };
        let Some(liar) = &mut self.liar else { return Ok(()) };
        let talk = liar.talk(lie, here, binding);
        let opening = liar.begin(&talk);
        let (link, liars_end) = if dials {
            (self.join_up(Party::Liar(talk), honest), 0)
        } else {
            (self.join_up(honest, Party::Liar(talk)), 1)
        };
        for bytes in opening {
            self.send(link, liars_end, Wire::Bytes(bytes));
        }
        self.schedule(self.now + LIE, Event::Break(link));
        self.carry_out(link, 1 - liars_end)
    }
}

// ---- what must hold ----

/// What a replica shows of membership and feeds.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    members: Vec<String>,
    invites: Vec<String>,
    have: Vec<FeedHave>,
}

impl World {
    fn places(&self) -> Vec<usize> {
        (0..self.replicas.len()).filter(|place| self.replicas[*place].running.is_some()).collect()
    }

    fn shown(&mut self, place: usize) -> Checked<Option<Shown>> {
        let invites = self.invites.clone();
        self.read(place, |running| {
            let membership: std::sync::Arc<Membership> = running.membership()?;
            let author = |(id, admitted): (&AuthorId, &sync_core::Admitted)| {
                let token = membership.token(id).map(|token| blake3::hash(&token.concat()));
                format!(
                    "{id:?} {:?} {:?} {:?} {:?} {token:?}",
                    admitted.member, admitted.role, admitted.by, admitted.invite
                )
            };
            let invite = |id| format!("{:?} {}", membership.invite(id), membership.is_revoked(id));
            let mut have = running.db.read(|reader| reader.have(&running.group))?;
            have.sort_by_key(|feed| feed.author);
            // what is held of a feed behind its end depends on when the removal came
            have.retain(|feed| !membership.ends().contains_key(&feed.author));
            Ok(Shown {
                members: membership.authors().map(author).collect(),
                invites: invites.iter().map(invite).collect(),
                have,
            })
        })
    }

    /// Replicas that hold the same envelopes show the same.
    fn check_equals(&mut self) -> Checked<()> {
        let mut first: BTreeMap<BTreeSet<EnvelopeHash>, (usize, Shown)> = BTreeMap::new();
        for place in self.places() {
            let held = self.replicas[place].held.clone();
            let Some(shown) = self.shown(place)? else { continue };
            match first.get(&held) {
                Some((other, known)) if *known != shown => {
                    let text =
                        format!("replicas {other} and {place} hold the same and show\n{known:#?}\nand\n{shown:#?}");
                    return broken(CONVERGE, text);
                }
                Some(_) => {}
                None => {
                    first.insert(held, (place, shown));
                }
            }
        }
        Ok(())
    }

    /// What a replica has read of another it holds.
    fn check_positions(&mut self) -> Checked<()> {
        let places = self.places();
        let mut ids: BTreeMap<ReplicaId, usize> = BTreeMap::new();
        let mut logs: BTreeMap<usize, Vec<Entry>> = BTreeMap::new();
        for &place in &places {
            let Some((id, log)) =
                self.read(place, |running| Ok((known_as(&running.author(), &running.id), running.scan()?)))?
            else {
                continue;
            };
            ids.insert(id, place);
            logs.insert(place, log);
        }
        for &place in &places {
            let Some(peers) = self.read(place, |running| running.db.read(|reader| reader.peers(&running.group)))?
            else {
                continue;
            };
            for peer in peers {
                let Some(&other) = ids.get(&peer.replica) else { continue };
                let (cursor, member) = (peer.cursor, self.member_of(other)?);
                let asked_by = self.running(place).map(|running| running.author());
                let (Some(member), Some(asked_by)) = (member, asked_by) else { continue };
                let check = kept_check(cursor, peer.check, &member, &asked_by);
                let known = self.read(other, |running| running.db.read(|r| r.check_at(&running.group, cursor)))?;
                if known.flatten() != Some(check) {
                    continue;
                }
                for entry in logs.get(&other).into_iter().flatten().filter(|entry| entry.cursor <= cursor) {
                    // of another branch of a feed it learns when they meet again
                    let branch = logs.get(&place).is_some_and(|log| {
                        log.iter().any(|held| (held.sender, held.number) == (entry.sender, entry.number))
                    });
                    if self.honest(entry) && !branch && !self.replicas[place].held.contains(&entry.hash) {
                        let text = format!(
                            "replica {place} has read replica {other} up to {cursor} and lacks entry {} of {} at {}",
                            entry.number,
                            entry.sender.short(),
                            entry.cursor
                        );
                        return broken(NO_GAPS, text);
                    }
                }
            }
        }
        Ok(())
    }

    fn member_of(&mut self, place: usize) -> Checked<Option<MemberId>> {
        let member = self.read(place, |running| {
            let author = running.author();
            Ok(running.membership()?.author(&author).map(|admitted| admitted.member))
        })?;
        Ok(member.flatten())
    }

    /// Everything is healed; then nobody may lack anything.
    fn finish(&mut self) -> Checked<()> {
        say!(self, "everything is healed");
        let links: Vec<u32> = self.links.keys().copied().collect();
        for link in links {
            self.cut(link)?;
        }
        self.sides.fill(0);
        for place in 0..self.replicas.len() {
            if self.replicas[place].running.is_some() {
                self.plans[place] = CrashPlan::default();
                self.crash(place)?;
            }
        }
        // no start needs more room than there is; other faults may still happen once
        for replica in &self.replicas {
            replica.disk.limit(None);
        }
        self.settle()?;
        for place in 0..self.replicas.len() {
            self.replicas[place].disk.heal();
            self.replicas[place].troubled = false;
            self.restart(place)?;
        }
        self.settle()?;
        for place in self.places() {
            let outbox = std::mem::take(&mut self.replicas[place].outbox);
            self.push_entries(place, outbox)?;
        }
        for round in 1..=ROUNDS {
            say!(self, "round {round}");
            self.meet()?;
            let places = self.places();
            let held: BTreeSet<&BTreeSet<EnvelopeHash>> =
                places.iter().map(|place| &self.replicas[*place].held).collect();
            if held.len() <= 1 {
                break;
            }
        }
        for place in self.places() {
            self.recount(place)?;
        }
        self.check_positions()?;
        self.check_removed()?;
        self.check_all_hold_the_same()?;
        self.share_epochs()?;
        self.finish_folders()?;
        self.check_equals()?;
        self.check_blobs()?;
        self.check_apps()?;
        self.check_strangers()
    }

    /// All connect with all until nothing happens any more.
    fn meet(&mut self) -> Checked<()> {
        let places = self.places();
        for (at, &a) in places.iter().enumerate() {
            for &b in &places[..at] {
                self.connect(a, b)?;
            }
        }
        self.settle()?;
        let links: Vec<u32> = self.links.keys().copied().collect();
        for link in links {
            self.cut(link)?;
        }
        self.settle()
    }

    /// Nothing that was sealed by who knew of a removal opens for the removed one, whatever it gets hold of.
    fn check_removed(&mut self) -> Checked<()> {
        for place in self.places() {
            let read = self.read(place, |running| running.db.read(|reader| reader.rotations(&running.group)))?;
            let Some((rotations, liar)) = read.zip(self.liar.as_ref()) else { continue };
            if let Some(epoch) = liar.opens(&self.without_liar, &rotations) {
                return broken(REMOVED_IS_OUT, format!("epoch {epoch:?} opens for the one that is removed"));
            }
        }
        Ok(())
    }

    fn check_all_hold_the_same(&mut self) -> Checked<()> {
        let places = self.places();
        for &a in &places {
            for &b in &places {
                let lacking = self.replicas[a].held.difference(&self.replicas[b].held).next();
                if let Some(lacking) = lacking {
                    let what = self.ledger.sealed.get(lacking).map(|sealed| (sealed.sender.short(), sealed.number));
                    let text = format!("replica {b} never gets {what:?}, which replica {a} holds");
                    return broken(CONVERGE, text);
                }
            }
        }
        Ok(())
    }

    fn share_epochs(&mut self) -> Checked<()> {
        for from in self.places() {
            for to in self.places() {
                self.grant(from, to)?;
            }
        }
        Ok(())
    }

    /// Every promised blob opens everywhere, and everyone opens the same.
    fn check_blobs(&mut self) -> Checked<()> {
        let mut first: Option<BTreeSet<(AuthorId, BlobId, [u8; 32])>> = None;
        for place in self.places() {
            let Some(opened) = self.read(place, |running| {
                let all = running.db.read(|reader| reader.read_sealed(&running.group, Cursor(0), ALL))?;
                let mut opened = BTreeSet::new();
                for stored in &all.entries {
                    let Ok(envelope) = Envelope::parse(&stored.bytes) else { continue };
                    if let Ok(content) = running.with_keys(|keys| keys.unseal(&envelope)) {
                        let body = *blake3::hash(&content.body).as_bytes();
                        opened.insert((envelope.header.sender, envelope.header.blob_id, body));
                    }
                }
                Ok(opened)
            })?
            else {
                continue;
            };
            let honest: BTreeSet<(BlobId, [u8; 32])> = opened
                .iter()
                .filter(|(sender, ..)| self.ledger.authors.contains(sender))
                .map(|(_, blob_id, body)| (*blob_id, *body))
                .collect();
            for (blob_id, promise) in self.ledger.promises.iter().filter(|(_, promise)| promise.stands) {
                if !honest.contains(&(*blob_id, promise.body)) {
                    return broken(DURABLE, format!("replica {place} cannot open blob {blob_id:?}, which was stored"));
                }
            }
            for (blob_id, body) in &honest {
                if self.ledger.bodies.get(blob_id).is_some_and(|known| known != body) {
                    return broken(NO_GAPS, format!("replica {place} opens blob {blob_id:?} as something else"));
                }
            }
            match &first {
                Some(known) if *known != opened => {
                    let (more, less) = (opened.difference(known).count(), known.difference(&opened).count());
                    let text = format!("replica {place} opens {more} blobs that another does not, and lacks {less}");
                    return broken(CONVERGE, text);
                }
                Some(_) => {}
                None => first = Some(opened),
            }
        }
        Ok(())
    }

    /// Apps that read to the end have seen everything.
    fn check_apps(&mut self) -> Checked<()> {
        for place in self.places() {
            loop {
                let before = self.replicas[place].app.cursor;
                let limit = 1 + usize::try_from(below(&mut self.rng, 30)).unwrap_or(0);
                self.pull(place, limit)?;
                if self.replicas[place].app.cursor == before {
                    break;
                }
            }
            let Some(newest) = self.read(place, |running| running.newest())? else { continue };
            let cursor = self.replicas[place].app.cursor;
            if cursor != newest {
                return broken(NO_GAPS, format!("the app of replica {place} stops at {cursor}, before {newest}"));
            }
        }
        Ok(())
    }

    /// A stranger leaves nothing behind.
    fn check_strangers(&mut self) -> Checked<()> {
        if self.liar.is_none() || self.liar_admitted {
            return Ok(());
        }
        let known: BTreeSet<ReplicaId> = self
            .ledger
            .authors
            .iter()
            .flat_map(|author| self.databases.iter().map(move |replica| known_as(author, replica)))
            .collect();
        for place in self.places() {
            let peers = self.read(place, |running| running.db.read(|reader| reader.peers(&running.group)))?;
            if peers.into_iter().flatten().any(|peer| !known.contains(&peer.replica)) {
                return broken(HOSTILE_INPUT, format!("replica {place} keeps a stranger as a peer"));
            }
        }
        Ok(())
    }
}
