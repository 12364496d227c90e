//! A sync session: two replicas of one group over one authenticated channel, as `docs/protocol.md` section 7 tells it.
//!
//! The shell feeds what happens and carries out what comes out, in order:
//!
//! ```text
//! loop {
//!     while let Some(effect) = session.poll_effect() { /* send, store, read, report or close */ }
//!     // then wait for a frame (while session.accepts_frames()), a reply or a newer cursor:
//!     session.handle_frame(frame) / session.handle_reply(reply) / session.handle_newest(cursor)
//! }
//! ```
//!
//! Membership is equal on both sides before any other group data moves, and nothing is acknowledged before it is stored.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use sync_crypto::author::{SignPurpose, verify};
use sync_types::bounds::{FRAME_BYTES_TARGET, MAX_FRAME_ENVELOPES, MAX_WANTS};
use sync_types::{
    AuthorId, Carried, Check, Class, Cursor, Envelope, ErrorCode, FeedHave, Frame, GroupId, MemberId, ReplicaId, Scope,
    Want,
};

use crate::membership::Membership;
use crate::serve::Selection;

/// Bytes sent and not yet acknowledged: enough to keep a fast link busy, bounded whatever the log's length.
pub const WINDOW: usize = 4 << 20;
/// Batches received and not yet stored; a peer that ignores the window waits in its own buffers.
pub const MAX_STORING: usize = 8;
/// Entries per answer we ask for.
pub const PULL_LIMIT: u32 = 1000;

const MEMBERSHIP_REQUEST: u32 = 1;
const ALL_REQUEST: u32 = 2;
const FIRST_WANT_REQUEST: u32 = 3;

/// Which end of the channel this is; part of what a HELLO signs, so that none can be reflected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Opened the channel.
    Dialler,
    /// Was dialled.
    Acceptor,
}

impl Side {
    /// The other end.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Dialler => Self::Acceptor,
            Self::Acceptor => Self::Dialler,
        }
    }
}

/// What an author signs to prove itself on a channel.
#[must_use]
pub fn hello_statement(binding: &[u8; 32], side: Side, group: &GroupId, replica: &ReplicaId) -> Vec<u8> {
    let side = match side {
        Side::Dialler => 0,
        Side::Acceptor => 1,
    };
    [&binding[..], &[side], &group.0, &replica.0].concat()
}

/// What the two ends of a session are.
///
/// A blind replica keeps the log and reads nothing of it. It has no author: the channel itself proves its key, it says
/// no HELLO, and it only ever accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// Both are members' devices.
    Members,
    /// The other end is the blind replica with this key.
    ToBlind([u8; 32]),
    /// This end is a blind replica.
    Blind,
}

/// The author of who has none.
pub const NO_AUTHOR: AuthorId = AuthorId([0; 32]);

/// Names a blind replica by its key: as a peer, and in place of the author and member that it does not have.
fn blind_peer(key: &[u8; 32]) -> Peer {
    let name = blake3::derive_key("syncshell v1 blind replica", key);
    let author = AuthorId(name);
    Peer { author, replica: known_as(&author, &ReplicaId([0; ReplicaId::LEN])), member: Some(MemberId(name)) }
}

/// Under which id the database of a blind replica is known here.
#[must_use]
pub fn blind_known_as(key: &[u8; 32]) -> ReplicaId {
    blind_peer(key).replica
}

/// The id that a database shows a blind replica: another one for each group and replica, so that none can be linked.
#[must_use]
pub fn shown_to_blind(replica: &ReplicaId, group: &GroupId, key: &[u8; 32]) -> ReplicaId {
    let hash = blake3::derive_key("syncshell v1 replica shown", &[&replica.0[..], &group.0, key].concat());
    let mut id = ReplicaId([0; ReplicaId::LEN]);
    id.0.copy_from_slice(&hash[..ReplicaId::LEN]);
    id
}

/// What a session starts with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which end this is.
    pub side: Side,
    /// What both ends are.
    pub ends: Ends,
    /// The group.
    pub group: GroupId,
    /// Who speaks.
    pub author: AuthorId,
    /// The speaker's database.
    pub replica: ReplicaId,
    /// The speaker's token.
    pub token: Vec<Vec<u8>>,
    /// Exported from the channel; the same on both ends and nowhere else.
    pub binding: [u8; 32],
    /// The author's signature over [`hello_statement`].
    pub proof: [u8; 64],
    /// The device's name.
    pub name: String,
    /// Where the device can be dialled.
    pub addresses: Vec<String>,
    /// Drawn at the device's start.
    pub incarnation: [u8; 8],
}

/// What the shell is to do.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Effect {
    /// Send a frame.
    Send(Frame),
    /// Store entries durably, and with them the position reached in the peer's replica; answered by [`Reply::Stored`].
    Store {
        /// Repeated in the answer.
        id: u64,
        /// The peer's database; none before the peer has shown that it belongs to the group, so that nothing is
        /// remembered of strangers.
        replica: Option<ReplicaId>,
        /// The envelopes.
        batch: Vec<Vec<u8>>,
        /// Cursor and check of the peer's replica up to which nothing is missing now.
        position: Option<(Cursor, Check)>,
    },
    /// Tell what is held; answered by [`Reply::Survey`].
    Survey {
        /// The peer's database.
        replica: ReplicaId,
    },
    /// Compare what a peer holds with what is held here; answered by [`Reply::Selected`].
    ///
    /// If the peer knows more of our own feed than we do, the shell renews the author first.
    Select {
        /// The peer's author, whose word it is.
        author: AuthorId,
        /// Which entries are meant.
        scope: Scope,
        /// Last cursor the peer saw here.
        after: Cursor,
        /// The check it saw with it.
        check: Check,
        /// What it holds.
        have: Vec<FeedHave>,
        /// What it does not want.
        covered: Vec<FeedHave>,
    },
    /// Read entries to send; answered by [`Reply::Read`].
    Read {
        /// Which answer this prepares.
        scope: Scope,
        /// Leave out what came from this database: while catching up none, since a peer may have lost what it sent once.
        not_from: Option<ReplicaId>,
        /// Start behind this cursor.
        after: Cursor,
        /// Entries at most.
        limit: usize,
        /// Stop once this many bytes are read.
        bytes: usize,
        /// Which of them the peer lacks.
        selection: Arc<Selection>,
    },
    /// Read entries by number; answered by [`Reply::Wanted`].
    ReadWanted {
        /// Repeated in the answer.
        request: u32,
        /// The numbers.
        wants: Vec<Want>,
    },
    /// The peer holds everything sent up to this cursor of ours.
    Acknowledged {
        /// The peer's database.
        replica: ReplicaId,
        /// Our cursor.
        cursor: Cursor,
    },
    /// Something the application may want to know.
    Report(Report),
    /// End the channel.
    Close(Close),
}

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Close {
    /// Told to the peer too.
    pub code: ErrorCode,
    /// The same in words.
    pub text: String,
    /// Whether the peer said so, and not we.
    pub by_peer: bool,
}

/// Progress of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Report {
    /// The peer has proven itself and membership is equal.
    Established {
        /// Who it is.
        author: AuthorId,
        /// Its database.
        replica: ReplicaId,
        /// Its newest cursor.
        max_cursor: Cursor,
        /// Its name.
        name: String,
        /// Where it can be dialled.
        addresses: Vec<String>,
        /// Drawn at its start.
        incarnation: [u8; 8],
    },
    /// Everything the peer held at the start is stored.
    CaughtUp,
    /// The peer has been sent and has acknowledged everything held here.
    HandedOver {
        /// Our cursor up to which that is so.
        cursor: Cursor,
    },
    /// The peer takes no entries for now; it still gives what it has.
    Full {
        /// Why.
        code: ErrorCode,
        /// The same in words.
        text: String,
    },
}

/// What the shell answers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Reply {
    /// Entries are stored durably.
    Stored {
        /// Repeated from the effect.
        id: u64,
        /// Membership after it.
        membership: Arc<Membership>,
        /// Numbers lacking now.
        wants: Vec<Want>,
    },
    /// What is held.
    Survey {
        /// Every feed.
        have: Vec<FeedHave>,
        /// Last cursor and check seen from the peer's replica.
        position: (Cursor, Check),
        /// Our newest cursor and its check.
        newest: (Cursor, Check),
    },
    /// The comparison.
    Selected {
        /// Which PULL it answers.
        scope: Scope,
        /// What the peer lacks.
        selection: Arc<Selection>,
        /// Where to start.
        start: Cursor,
        /// The peer's pair of cursor and check is not known here.
        reset: bool,
    },
    /// Entries to send.
    Read {
        /// Repeated from the effect.
        scope: Scope,
        /// The entries.
        entries: Vec<Carried>,
        /// Everything up to here was looked at.
        max_cursor: Cursor,
        /// The check stored beside that cursor.
        check: Check,
        /// Whether more follows.
        has_more: bool,
        /// First cursor still held.
        holds_from: Cursor,
    },
    /// Entries by number.
    Wanted {
        /// Repeated from the effect.
        request: u32,
        /// The entries held of those.
        entries: Vec<Carried>,
    },
    /// There is no room for all of a batch; what there is room for is stored durably, and its position is not.
    Full {
        /// Repeated from the effect.
        id: u64,
        /// Which room.
        code: ErrorCode,
        /// The same in words.
        text: String,
    },
    /// The shell could not do it.
    Failed {
        /// Why.
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing heard from the peer.
    Greeting,
    /// The peer's token is being stored and evaluated.
    Evaluating,
    /// Membership is being exchanged.
    Membership,
    /// Entries flow.
    Live,
    Closed,
}

/// What the peer's WELCOME says.
#[derive(Debug, Clone)]
struct Welcome {
    max_cursor: Cursor,
    name: String,
    addresses: Vec<String>,
    incarnation: [u8; 8],
}

#[derive(Debug, Clone, Copy)]
struct Peer {
    author: AuthorId,
    replica: ReplicaId,
    /// Whose it is, once membership says so.
    member: Option<MemberId>,
}

/// Under which id a peer's database is known here: anyone may name any replica, so what is remembered of one hangs on the
/// author that was proven with it.
#[must_use]
pub fn known_as(author: &AuthorId, replica: &ReplicaId) -> ReplicaId {
    let hash = blake3::derive_key("syncshell v1 known replica", &[&author.0[..], &replica.0].concat());
    let mut id = ReplicaId([0; ReplicaId::LEN]);
    id.0.copy_from_slice(&hash[..ReplicaId::LEN]);
    id
}

/// The check of a position as it is kept, or a kept one as the peer's replica gave it.
///
/// A position is kept for the member who said it and the author who asked; any other pair makes another check of it,
/// which the peer does not know, so that it answers from zero:
/// - any member may name any replica as its own, and must not make us pass over what that replica holds;
/// - with a new author we may hold less than the old one said when it asked.
#[must_use]
pub fn kept_check(cursor: Cursor, check: Check, said_by: &MemberId, asked_by: &AuthorId) -> Check {
    if cursor == Cursor(0) {
        return check;
    }
    let mask = blake3::derive_key("syncshell v1 kept position", &[said_by.0, asked_by.0].concat());
    Check(std::array::from_fn(|at| check.0[at] ^ mask[at]))
}

/// What a stored batch leads to.
#[derive(Debug, Clone, Copy)]
enum Storing {
    Token,
    Membership { last: bool },
    Entries { position: Cursor, last: bool },
    Wanted,
}

/// Serving one PULL.
#[derive(Debug)]
struct Serving {
    request: u32,
    limit: usize,
    selection: Arc<Selection>,
    position: Cursor,
    reset: bool,
    reading: bool,
    caught_up: bool,
    in_flight: VecDeque<(Cursor, usize)>,
    in_flight_bytes: usize,
}

#[derive(Debug)]
struct PendingPull {
    request: u32,
    limit: usize,
    after: Cursor,
    check: Check,
    have: Vec<FeedHave>,
    covered: Vec<FeedHave>,
}

/// One sync session.
#[derive(Debug)]
pub struct Session {
    config: Config,
    phase: Phase,
    peer: Option<Peer>,
    welcome: Option<Welcome>,
    established: bool,
    membership_pulled: bool,
    membership_served: bool,
    serving_membership: Option<Serving>,
    serving: Option<Serving>,
    /// PULLs by scope whose comparison is under way.
    selecting: Vec<(Scope, u32, usize)>,
    /// A PULL that came before our side of the membership exchange was done.
    early_pull: Option<PendingPull>,
    surveying: Option<Scope>,
    storing: VecDeque<(u64, Storing)>,
    next_store: u64,
    next_want: u32,
    asked: BTreeSet<Want>,
    caught_up: bool,
    newest: Cursor,
    acknowledged: Cursor,
    handed: Cursor,
    /// The peer was told that there is no room here.
    said_full: bool,
    /// The peer has no room.
    peer_full: bool,
    effects: VecDeque<Effect>,
}

impl Session {
    /// Starts a session; the dialler's HELLO is the first effect.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let mut session = Self {
            phase: Phase::Greeting,
            peer: None,
            welcome: None,
            established: false,
            membership_pulled: false,
            membership_served: false,
            serving_membership: None,
            serving: None,
            selecting: Vec::new(),
            early_pull: None,
            surveying: None,
            storing: VecDeque::new(),
            next_store: 0,
            next_want: FIRST_WANT_REQUEST,
            asked: BTreeSet::new(),
            caught_up: false,
            newest: Cursor(0),
            acknowledged: Cursor(0),
            handed: Cursor(0),
            said_full: false,
            peer_full: false,
            effects: VecDeque::new(),
            config,
        };
        if session.config.side == Side::Dialler {
            session.greet();
        }
        if let Ends::ToBlind(key) = session.config.ends {
            // who it is the channel has proven already, and it asks once it has judged us
            session.peer = Some(blind_peer(&key));
            session.phase = Phase::Membership;
            session.survey(Scope::Membership);
        }
        session
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Whether another frame may be read; false while the peer is being evaluated, and while as many batches as allowed
    /// wait to be stored.
    #[must_use]
    pub fn accepts_frames(&self) -> bool {
        !matches!(self.phase, Phase::Closed | Phase::Evaluating) && self.storing.len() < MAX_STORING
    }

    /// Who is at the other end, once it has shown who it claims to be.
    #[must_use]
    pub fn peer(&self) -> Option<(AuthorId, ReplicaId)> {
        self.peer.map(|peer| (peer.author, peer.replica))
    }

    /// Takes in a frame.
    pub fn handle_frame(&mut self, frame: Frame) {
        match (self.phase, frame) {
            (Phase::Closed, _)
            | (_, Frame::Unknown(_) | Frame::Notify { .. } | Frame::Presence { .. } | Frame::Wake { .. }) => {}
            (_, Frame::Error { code, text }) if code.is_full() => {
                // what it has not acknowledged is offered again by the next session
                self.peer_full = true;
                self.effects.push_back(Effect::Report(Report::Full { code, text }));
            }
            (_, Frame::Error { code, text }) => self.close(Close { code, text, by_peer: true }),
            (Phase::Greeting, Frame::Hello { group, author, replica, token, proof }) => {
                self.handle_hello(group, Peer { author, replica, member: None }, token, &proof);
            }
            (Phase::Membership, Frame::Pull { request, scope: Scope::Membership, limit, have, covered, .. }) => {
                self.select(
                    Scope::Membership,
                    PendingPull { request, limit: bounded(limit), after: Cursor(0), check: Check::NONE, have, covered },
                );
            }
            (
                Phase::Membership | Phase::Live,
                Frame::Pull { request, scope: Scope::All, after, check, limit, have, covered },
            ) => {
                let pull = PendingPull { request, limit: bounded(limit), after, check, have, covered };
                if self.phase == Phase::Live {
                    self.select(Scope::All, pull);
                } else {
                    self.early_pull = Some(pull);
                }
            }
            (Phase::Membership, Frame::PullResponse { request: MEMBERSHIP_REQUEST, entries, has_more, .. }) => {
                let batch = keep_membership(entries);
                self.store(batch, None, Storing::Membership { last: !has_more });
            }
            (Phase::Membership | Phase::Live, Frame::Welcome { max_cursor, name, addresses, incarnation, .. }) => {
                self.welcome = Some(Welcome { max_cursor, name, addresses, incarnation });
                self.report_established();
            }
            (Phase::Live, Frame::PullResponse { request: ALL_REQUEST, entries, max_cursor, check, has_more, .. }) => {
                self.store_entries(entries, max_cursor, check, !has_more);
            }
            (Phase::Live, Frame::PullResponse { entries, .. }) => {
                let batch = entries.into_iter().map(|carried| carried.envelope).collect();
                self.store(batch, None, Storing::Wanted);
            }
            (Phase::Live, Frame::Push { entries, max_cursor, check }) => {
                self.store_entries(entries, max_cursor, check, false);
            }
            (Phase::Live, Frame::PushAck { cursor }) => self.handle_ack(cursor),
            (Phase::Live, Frame::Want { request, wants }) => {
                self.effects.push_back(Effect::ReadWanted { request, wants });
            }
            (_, frame) => self.violation(&frame),
        }
    }

    /// Takes in an answer of the shell.
    pub fn handle_reply(&mut self, reply: Reply) {
        if self.phase == Phase::Closed {
            return;
        }
        match reply {
            Reply::Stored { id, membership, wants } => self.handle_stored(id, &membership, wants),
            Reply::Survey { have, position, newest } => self.handle_survey(have, position, newest),
            Reply::Selected { scope, selection, start, reset } => self.handle_selected(scope, selection, start, reset),
            Reply::Read { scope, entries, max_cursor, check, has_more, holds_from } => {
                self.handle_read(scope, entries, (max_cursor, check), has_more, holds_from);
            }
            Reply::Wanted { request, entries } => self.effects.push_back(Effect::Send(Frame::PullResponse {
                request,
                entries,
                max_cursor: Cursor(0),
                check: Check::NONE,
                has_more: false,
                reset: false,
                holds_from: Cursor(1),
            })),
            Reply::Full { id, code, text } => self.handle_full(id, code, &text),
            Reply::Failed { text } => self.refuse(ErrorCode::Unavailable, &text),
        }
    }

    /// Takes in that entries up to a cursor are durable here.
    pub fn handle_newest(&mut self, newest: Cursor) {
        self.newest = self.newest.max(newest);
        self.pump();
    }

    /// Takes in who belongs now: a peer that was removed is let go before it gets anything else.
    ///
    /// To be called whenever that may have changed, and before what was read meanwhile is handed in.
    pub fn handle_membership(&mut self, membership: &Membership) {
        let proven =
            matches!(self.phase, Phase::Membership | Phase::Live) && !matches!(self.config.ends, Ends::ToBlind(_));
        if proven && self.peer.is_some_and(|peer| !membership.is_admitted(&peer.author)) {
            self.refuse_outsider(membership);
        }
    }

    /// Takes in that something lacks here which nobody lacked when this session began.
    pub fn handle_wants(&mut self, wants: Vec<Want>) {
        if self.phase == Phase::Live {
            self.want(wants);
        }
    }

    fn greet(&mut self) {
        let Config { group, author, replica, token, proof, .. } = &self.config;
        let hello =
            Frame::Hello { group: *group, author: *author, replica: *replica, token: token.clone(), proof: *proof };
        self.effects.push_back(Effect::Send(hello));
    }

    fn handle_hello(&mut self, group: GroupId, peer: Peer, token: Vec<Vec<u8>>, proof: &[u8; 64]) {
        let statement = hello_statement(&self.config.binding, self.config.side.other(), &group, &peer.replica);
        let proven = verify(&peer.author, SignPurpose::Hello, &[&statement], proof);
        if group != self.config.group || !proven || peer.replica == self.config.replica {
            return self.refuse_stranger();
        }
        self.peer = Some(Peer { replica: known_as(&peer.author, &peer.replica), ..peer });
        self.phase = Phase::Evaluating;
        let token = token.into_iter().filter(|bytes| is_membership(bytes)).collect();
        self.store(token, None, Storing::Token);
    }

    fn store_entries(&mut self, entries: Vec<Carried>, position: Cursor, check: Check, last: bool) {
        let batch = entries.into_iter().map(|carried| carried.envelope).collect();
        self.store(batch, Some((position, check)), Storing::Entries { position, last });
    }

    fn store(&mut self, batch: Vec<Vec<u8>>, position: Option<(Cursor, Check)>, what: Storing) {
        let Some(peer) = self.peer else { return };
        let position = position.and_then(|position| self.kept(position));
        let id = self.next_store;
        self.next_store += 1;
        self.storing.push_back((id, what));
        let replica = (self.phase != Phase::Evaluating).then_some(peer.replica);
        self.effects.push_back(Effect::Store { id, replica, batch, position });
    }

    /// A position of the peer between how it is kept and how the peer knows it.
    fn kept(&self, (cursor, check): (Cursor, Check)) -> Option<(Cursor, Check)> {
        let member = self.peer?.member?;
        Some((cursor, kept_check(cursor, check, &member, &self.config.author)))
    }

    fn handle_stored(&mut self, id: u64, membership: &Membership, wants: Vec<Want>) {
        let Some(at) = self.storing.iter().position(|(storing, _)| *storing == id) else { return };
        let Some((_, what)) = self.storing.remove(at) else { return };
        let Some(peer) = &mut self.peer else { return };
        if !matches!(self.config.ends, Ends::ToBlind(_)) {
            let Some(admitted) = membership.author(&peer.author) else { return self.refuse_outsider(membership) };
            peer.member = Some(admitted.member);
        }
        match what {
            Storing::Token => {
                if self.config.side == Side::Acceptor && self.config.ends == Ends::Members {
                    self.greet();
                }
                self.phase = Phase::Membership;
                self.survey(Scope::Membership);
            }
            Storing::Membership { last } => {
                self.membership_pulled |= last;
                self.go_live();
            }
            Storing::Entries { position, last } => {
                self.effects.push_back(Effect::Send(Frame::PushAck { cursor: position }));
                if last && !self.caught_up {
                    self.caught_up = true;
                    self.effects.push_back(Effect::Report(Report::CaughtUp));
                }
                self.want(wants);
            }
            // an answer holds as much as fits: what lacks still is another range, and asked for as such
            Storing::Wanted => self.want(wants),
        }
    }

    /// Tells the peer once that there is no room; it goes on reading what is here.
    fn handle_full(&mut self, id: u64, code: ErrorCode, text: &str) {
        let Some(at) = self.storing.iter().position(|(storing, _)| *storing == id) else { return };
        let Some((_, what)) = self.storing.remove(at) else { return };
        if matches!(what, Storing::Token | Storing::Membership { .. }) {
            // without them nobody can be judged
            return self.refuse(ErrorCode::Unavailable, text);
        }
        if !std::mem::replace(&mut self.said_full, true) {
            self.effects.push_back(Effect::Send(Frame::error(code, text)));
        }
    }

    fn survey(&mut self, scope: Scope) {
        let Some(peer) = self.peer else { return };
        self.surveying = Some(scope);
        self.effects.push_back(Effect::Survey { replica: peer.replica });
    }

    fn handle_survey(&mut self, have: Vec<FeedHave>, position: (Cursor, Check), newest: (Cursor, Check)) {
        let Some(scope) = self.surveying.take() else { return };
        let (request, position) = match scope {
            Scope::All => (ALL_REQUEST, self.kept(position).unwrap_or((Cursor(0), Check::NONE))),
            _ => (MEMBERSHIP_REQUEST, (Cursor(0), Check::NONE)),
        };
        if scope == Scope::All {
            let Config { replica, name, addresses, incarnation, .. } = &self.config;
            self.effects.push_back(Effect::Send(Frame::Welcome {
                replica: *replica,
                max_cursor: newest.0,
                check: newest.1,
                name: name.clone(),
                addresses: addresses.clone(),
                incarnation: *incarnation,
            }));
        }
        self.effects.push_back(Effect::Send(Frame::Pull {
            request,
            scope,
            after: position.0,
            check: position.1,
            limit: PULL_LIMIT,
            have,
            covered: Vec::new(),
        }));
    }

    fn go_live(&mut self) {
        if self.phase != Phase::Membership || !self.membership_pulled || !self.membership_served {
            return;
        }
        self.phase = Phase::Live;
        self.serving_membership = None;
        self.survey(Scope::All);
        self.report_established();
        if let Some(pull) = self.early_pull.take() {
            self.select(Scope::All, pull);
        }
    }

    fn report_established(&mut self) {
        if self.phase != Phase::Live || self.established {
            return;
        }
        let (Some(peer), Some(welcome)) = (self.peer, self.welcome.clone()) else { return };
        let Welcome { max_cursor, name, addresses, incarnation } = welcome;
        self.established = true;
        let Peer { author, replica, .. } = peer;
        self.effects.push_back(Effect::Report(Report::Established {
            author,
            replica,
            max_cursor,
            name,
            addresses,
            incarnation,
        }));
    }

    fn select(&mut self, scope: Scope, pull: PendingPull) {
        let Some(peer) = self.peer else { return };
        let PendingPull { request, limit, after, check, have, covered } = pull;
        if self.selecting.iter().any(|(selecting, ..)| *selecting == scope) {
            return self.refuse(ErrorCode::Protocol, "a second PULL came before the first was answered");
        }
        self.selecting.push((scope, request, limit));
        self.effects.push_back(Effect::Select { author: peer.author, scope, after, check, have, covered });
    }

    fn handle_selected(&mut self, scope: Scope, selection: Arc<Selection>, start: Cursor, reset: bool) {
        let Some(at) = self.selecting.iter().position(|(selecting, ..)| *selecting == scope) else { return };
        let (_, request, limit) = self.selecting.remove(at);
        // what the peer lacks of another branch may stand anywhere, also before what it has read
        let start = if selection.diverges() { Cursor(0) } else { start };
        let serving = Serving {
            request,
            limit,
            selection,
            position: start,
            reset,
            reading: false,
            caught_up: false,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
        };
        match scope {
            Scope::All => self.serving = Some(serving),
            _ => self.serving_membership = Some(serving),
        }
        self.pump();
    }

    /// Asks for entries to send where there is something to send and room under way.
    fn pump(&mut self) {
        let Some(peer) = self.peer else { return };
        let (newest, peer_full) = (self.newest, self.peer_full);
        for scope in [Scope::Membership, Scope::All] {
            let Some(serving) = self.serving_of(scope) else { continue };
            // what comes while membership is exchanged follows with everything else
            let due = !serving.caught_up || (scope == Scope::All && serving.position < newest);
            let full = scope == Scope::All && peer_full;
            if serving.reading || !due || full || serving.in_flight_bytes >= WINDOW {
                continue;
            }
            serving.reading = true;
            let read = Effect::Read {
                scope,
                not_from: serving.caught_up.then_some(peer.replica),
                after: serving.position,
                limit: serving.limit,
                bytes: FRAME_BYTES_TARGET,
                selection: serving.selection.clone(),
            };
            self.effects.push_back(read);
        }
    }

    fn serving_of(&mut self, scope: Scope) -> Option<&mut Serving> {
        match scope {
            Scope::All => self.serving.as_mut(),
            _ => self.serving_membership.as_mut(),
        }
    }

    fn handle_read(
        &mut self,
        scope: Scope,
        entries: Vec<Carried>,
        (max_cursor, check): (Cursor, Check),
        has_more: bool,
        holds_from: Cursor,
    ) {
        let Some(serving) = self.serving_of(scope) else { return };
        serving.reading = false;
        serving.position = max_cursor;
        let bytes: usize = entries.iter().map(|carried| carried.envelope.len()).sum();
        let answering = !serving.caught_up;
        serving.caught_up |= !has_more;
        let tracked = scope == Scope::All && (answering || !entries.is_empty());
        if tracked {
            serving.in_flight.push_back((max_cursor, bytes));
            serving.in_flight_bytes += bytes;
        }
        let frame = if answering {
            let (request, reset) = (serving.request, std::mem::take(&mut serving.reset));
            Some(Frame::PullResponse { request, entries, max_cursor, check, has_more, reset, holds_from })
        } else {
            (!entries.is_empty()).then_some(Frame::Push { entries, max_cursor, check })
        };
        let nothing_under_way = serving.in_flight.is_empty();
        self.effects.extend(frame.map(Effect::Send));
        if scope == Scope::All {
            self.newest = self.newest.max(max_cursor);
            if nothing_under_way {
                // what was left out came from the peer: nothing of our own that it would have to acknowledge
                self.report_handed(max_cursor);
            }
        } else if !has_more {
            self.membership_served = true;
            self.go_live();
        }
        self.pump();
    }

    fn handle_ack(&mut self, cursor: Cursor) {
        let Some(serving) = &mut self.serving else { return };
        // only what was sent can be acknowledged
        let cursor = cursor.min(serving.position);
        while serving.in_flight.front().is_some_and(|(sent, _)| *sent <= cursor) {
            if let Some((_, bytes)) = serving.in_flight.pop_front() {
                serving.in_flight_bytes -= bytes;
            }
        }
        let (nothing_under_way, position) = (serving.in_flight.is_empty(), serving.position);
        self.acknowledged(cursor);
        if nothing_under_way {
            self.report_handed(position);
        }
        self.pump();
    }

    fn acknowledged(&mut self, cursor: Cursor) {
        let Some(peer) = self.peer else { return };
        if cursor > self.acknowledged {
            self.acknowledged = cursor;
            self.effects.push_back(Effect::Acknowledged { replica: peer.replica, cursor });
        }
    }

    fn report_handed(&mut self, cursor: Cursor) {
        if cursor > self.handed {
            self.handed = cursor;
            self.effects.push_back(Effect::Report(Report::HandedOver { cursor }));
        }
    }

    /// Asks for what lacks, each range once a session: what the peer gets later it sends by itself.
    fn want(&mut self, wants: Vec<Want>) {
        if !self.caught_up {
            return;
        }
        let room = MAX_WANTS.saturating_sub(self.asked.len());
        let new: Vec<Want> = wants.into_iter().filter(|want| !self.asked.contains(want)).take(room).collect();
        if new.is_empty() {
            return;
        }
        self.asked.extend(new.iter().copied());
        let request = self.next_want;
        self.next_want = self.next_want.wrapping_add(1).max(FIRST_WANT_REQUEST);
        self.effects.push_back(Effect::Send(Frame::Want { request, wants: new }));
    }

    fn violation(&mut self, frame: &Frame) {
        let text = format!("frame out of turn: {}", name(frame));
        self.refuse(ErrorCode::Protocol, &text);
    }

    /// The same words for a stranger, an unknown group and a bad proof, so that none can be told from another.
    fn refuse_stranger(&mut self) {
        self.refuse(ErrorCode::Refused, REFUSED_TEXT);
    }

    /// Who was removed hears it; it has proved that it is who was.
    fn refuse_outsider(&mut self, membership: &Membership) {
        let was = self.peer.is_some_and(|peer| membership.was_admitted(&peer.author));
        if was { self.refuse(ErrorCode::Removed, REMOVED_TEXT) } else { self.refuse_stranger() }
    }

    fn refuse(&mut self, code: ErrorCode, text: &str) {
        self.effects.push_back(Effect::Send(Frame::error(code, text)));
        self.close(Close { code, text: text.to_owned(), by_peer: false });
    }

    fn close(&mut self, close: Close) {
        self.phase = Phase::Closed;
        self.effects.push_back(Effect::Close(close));
    }
}

/// What a stranger and an asker after an unknown group are told.
pub const REFUSED_TEXT: &str = "not a member of this group here";

/// What a removed member is told.
pub const REMOVED_TEXT: &str = "removed from this group";

fn bounded(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(MAX_FRAME_ENVELOPES).clamp(1, MAX_FRAME_ENVELOPES)
}

fn is_membership(bytes: &[u8]) -> bool {
    Envelope::parse(bytes).is_ok_and(|envelope| envelope.header.class == Class::Membership)
}

/// What may come before membership is equal: nothing sealed.
fn keep_membership(entries: Vec<Carried>) -> Vec<Vec<u8>> {
    let open = |bytes: &Vec<u8>| Envelope::parse(bytes).is_ok_and(|envelope| envelope.header.class != Class::Sealed);
    entries.into_iter().map(|carried| carried.envelope).filter(open).collect()
}

fn name(frame: &Frame) -> &'static str {
    match frame {
        Frame::Hello { .. } => "HELLO",
        Frame::Welcome { .. } => "WELCOME",
        Frame::Charter { .. } => "CHARTER",
        Frame::Push { .. } => "PUSH",
        Frame::PushAck { .. } => "PUSH_ACK",
        Frame::Pull { .. } => "PULL",
        Frame::PullResponse { .. } => "PULL_RESPONSE",
        Frame::Want { .. } => "WANT",
        Frame::Join { .. } => "JOIN",
        Frame::Grant(_) => "GRANT",
        Frame::Joined => "JOINED",
        _ => "another",
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use sync_crypto::AuthorSecret;
    use sync_types::{Charter, Chunker, EnvelopeHash, GroupKind, Number, Quorum, Range};

    use super::*;
    use crate::serve::Own;

    const BINDING: [u8; 32] = [4; 32];
    const OURS: ReplicaId = ReplicaId([1; 16]);
    const THEIRS: ReplicaId = ReplicaId([2; 16]);

    fn author() -> AuthorSecret {
        AuthorSecret::from_bytes(&[7; 96])
    }

    fn charter() -> Vec<u8> {
        let quorum = Quorum::default();
        let (founder, chunker) = (author().keys(), Chunker::default());
        Charter { kind: GroupKind::Random, founder, quorum, suite: 1, chunker, nonce: [1; 32], commitment: [0; 32] }
            .encode()
    }

    fn hello(side: Side, replica: ReplicaId) -> Frame {
        let group = GroupId::of(&charter());
        let proof = author().sign(SignPurpose::Hello, &[&hello_statement(&BINDING, side, &group, &replica)]);
        Frame::Hello { group, author: author().id(), replica, token: vec![], proof }
    }

    fn drain(session: &mut Session) -> Vec<Effect> {
        std::iter::from_fn(|| session.poll_effect()).collect()
    }

    fn stored(session: &mut Session, id: u64) {
        let membership = Arc::new(Membership::new(&charter()).expect("a charter"));
        session.handle_reply(Reply::Stored { id, membership, wants: vec![] });
    }

    fn pull(scope: Scope) -> Frame {
        let (after, check) = (Cursor(0), Check::NONE);
        Frame::Pull { request: 1, scope, after, check, limit: 9, have: vec![], covered: vec![] }
    }

    fn answer(request: u32, max_cursor: Cursor, check: Check) -> Frame {
        let (has_more, reset, holds_from) = (false, false, Cursor(1));
        Frame::PullResponse { request, entries: vec![], max_cursor, check, has_more, reset, holds_from }
    }

    fn survey(session: &mut Session, position: (Cursor, Check)) -> Vec<Effect> {
        session.handle_reply(Reply::Survey { have: vec![], position, newest: (Cursor(0), Check::NONE) });
        drain(session)
    }

    /// A session that has answered the peer's PULL of membership and waits for the answer to its own.
    fn waiting() -> Session {
        let Frame::Hello { group, author, replica, token, proof } = hello(Side::Acceptor, OURS) else { unreachable!() };
        let (name, incarnation) = (String::new(), [0; 8]);
        let side = Side::Acceptor;
        let (binding, ends) = (BINDING, Ends::Members);
        let config =
            Config { side, ends, group, author, replica, token, binding, proof, name, addresses: vec![], incarnation };
        let mut session = Session::new(config);
        session.handle_frame(hello(Side::Dialler, THEIRS));
        stored(&mut session, 0);
        drain(&mut session);
        survey(&mut session, (Cursor(0), Check::NONE));
        session.handle_frame(pull(Scope::Membership));
        select(&mut session, Scope::Membership, Selection::everything(Scope::Membership), Cursor(0));
        let (scope, max_cursor, check) = (Scope::Membership, Cursor(0), Check::NONE);
        let (entries, has_more, holds_from) = (vec![], false, Cursor(1));
        session.handle_reply(Reply::Read { scope, entries, max_cursor, check, has_more, holds_from });
        drain(&mut session);
        session
    }

    fn select(session: &mut Session, scope: Scope, selection: Selection, start: Cursor) -> Vec<Effect> {
        session.handle_reply(Reply::Selected { scope, selection: Arc::new(selection), start, reset: false });
        drain(session)
    }

    /// The same session once membership is equal.
    fn live() -> Session {
        let mut session = waiting();
        session.handle_frame(answer(MEMBERSHIP_REQUEST, Cursor(0), Check::NONE));
        stored(&mut session, 1);
        drain(&mut session);
        session
    }

    #[test]
    fn what_comes_while_membership_is_exchanged_is_not_pushed_before_it_is_equal() {
        let mut session = waiting();
        session.handle_newest(Cursor(5));
        assert!(drain(&mut session).is_empty());
    }

    #[test]
    fn a_position_is_kept_for_who_said_it_and_who_asked() {
        let (member, other) = (MemberId(author().id().0), MemberId([9; 32]));
        let (cursor, check) = (Cursor(7), Check([3; 8]));
        let kept = kept_check(cursor, check, &member, &author().id());
        assert_ne!(kept, check);
        assert_ne!(kept, kept_check(cursor, check, &other, &author().id()));
        assert_ne!(kept, kept_check(cursor, check, &member, &AuthorId([9; 32])));

        let mut session = live();
        let effects = survey(&mut session, (cursor, kept));
        let asked = effects.iter().find_map(|effect| match effect {
            Effect::Send(Frame::Pull { after, check, .. }) => Some((*after, *check)),
            _ => None,
        });
        assert_eq!(asked, Some((cursor, check)), "the peer is asked with what it gave");
        session.handle_frame(answer(ALL_REQUEST, cursor, check));
        let effects = drain(&mut session);
        assert!(matches!(effects[..], [Effect::Store { position: Some(position), .. }] if position == (cursor, kept)));
    }

    #[test]
    fn a_peer_on_another_branch_is_answered_from_the_start() {
        struct Branch;
        impl Own for Branch {
            type Error = Infallible;
            fn feed(&mut self, author: &AuthorId) -> Result<Option<FeedHave>, Infallible> {
                Ok(Some(have(*author, 1)))
            }
            fn hashes_at(&mut self, _: &AuthorId, _: Number) -> Result<Vec<EnvelopeHash>, Infallible> {
                Ok(vec![EnvelopeHash([1; 32])])
            }
        }
        fn have(author: AuthorId, head: u8) -> FeedHave {
            let ranges = vec![Range { first: Number(1), last: Number(3) }];
            FeedHave { author, ranges, heads: vec![EnvelopeHash([head; 32])], fork: None, digest: [0; 32] }
        }
        for (head, start) in [(1, Cursor(9)), (2, Cursor(0))] {
            let mut session = live();
            survey(&mut session, (Cursor(0), Check::NONE));
            session.handle_frame(pull(Scope::All));
            drain(&mut session);
            let theirs = [have(author().id(), head)];
            let selection = Selection::new(Scope::All, &theirs, &[], &mut Branch).expect("infallible");
            let effects = select(&mut session, Scope::All, selection, Cursor(9));
            assert!(matches!(effects[..], [Effect::Read { after, .. }] if after == start), "{effects:?}");
        }
    }
}
