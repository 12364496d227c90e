//! LAN multicast: a device asks the local network for a lookup id and whoever publishes it answers.
//!
//! `docs/protocol.md` section 8 has the packets.
//! A query is as long as the longest answer, so that nobody can use a server to send a victim more than they send themselves.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::{self, BoxFuture, FutureExt as _};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{net::UdpSocket, task::JoinSet};

use crate::rendezvous::{Lookup, LookupId, LookupSink, Publication, Published, Record, Rendezvous, RendezvousError};

/// Exact length of a query and greatest length of an answer: one packet on any network.
pub const QUERY_LEN: usize = 700;

/// Longest record that fits in an answer.
pub const MAX_LAN_RECORD: usize = QUERY_LEN - ANSWER_HEADER;

/// Answers per second to one address; an asker sends two queries a second over IPv4 and two over IPv6 on each interface.
pub const ANSWERS_PER_SOURCE: u32 = 10;

/// Answers per second in all; sources are easily forged, and 70 kB/s disturb no network.
pub const ANSWERS_PER_SECOND: u32 = 100;

/// Where queries are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanConfig {
    /// The IPv4 group.
    pub group_v4: Ipv4Addr,
    /// The IPv6 group, of link-local scope.
    pub group_v6: Ipv6Addr,
    /// The UDP port of both.
    pub port: u16,
}

impl Default for LanConfig {
    fn default() -> Self {
        Self {
            group_v4: Ipv4Addr::new(239, 255, 83, 83),
            group_v6: Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0, 0x5359, 0x5359),
            port: 21083,
        }
    }
}

/// The rendezvous by multicast. Clones share it.
///
/// It listens only while something is published; all publications share one server.
#[derive(Clone, Debug, Default)]
pub struct Lan {
    config: LanConfig,
    server: Arc<Mutex<Weak<Server>>>,
    counters: Arc<Counters>,
}

impl Lan {
    /// Uses these groups and this port.
    pub fn new(config: LanConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// What the servers of this rendezvous have seen so far.
    pub fn counters(&self) -> LanCounters {
        LanCounters {
            malformed: self.counters.malformed.load(Ordering::Relaxed),
            unknown: self.counters.unknown.load(Ordering::Relaxed),
            answered: self.counters.answered.load(Ordering::Relaxed),
            limited: self.counters.limited.load(Ordering::Relaxed),
        }
    }

    fn server(&self) -> io::Result<Arc<Server>> {
        let mut running = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = running.upgrade() {
            return Ok(server);
        }
        let server = Arc::new(Server::start(self.config, self.counters.clone())?);
        *running = Arc::downgrade(&server);
        Ok(server)
    }
}

impl Rendezvous for Lan {
    fn name(&self) -> &'static str {
        NAME
    }

    fn publish(&self, id: LookupId, record: Record) -> BoxFuture<'_, Result<Publication, RendezvousError>> {
        future::lazy(move |_| {
            let answer = answer_packet(id, &record)?;
            let server = self.server().map_err(RendezvousError::Network)?;
            let number = server.board.put(id, answer);
            Ok(Publication::new(Posted { server, id, number }))
        })
        .boxed()
    }

    fn lookup(&self, id: LookupId) -> Lookup {
        let config = self.config;
        Lookup::spawn(NAME, move |sink| ask(config, id, sink))
    }
}

/// Packets a server got and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LanCounters {
    /// No query of ours.
    pub malformed: u64,
    /// Queries for what is not published here.
    pub unknown: u64,
    /// Queries answered.
    pub answered: u64,
    /// Queries not answered because too many came.
    pub limited: u64,
}

/// The names of the interfaces over which this rendezvous would talk.
pub fn multicast_interfaces() -> io::Result<Vec<String>> {
    Ok(Interfaces::list()?.names)
}

#[derive(Debug, Default)]
struct Counters {
    malformed: AtomicU64,
    unknown: AtomicU64,
    answered: AtomicU64,
    limited: AtomicU64,
}

struct Posted {
    server: Arc<Server>,
    id: LookupId,
    number: u64,
}

impl Published for Posted {
    fn replace(&mut self, record: Record) -> BoxFuture<'_, Result<(), RendezvousError>> {
        let replaced =
            answer_packet(self.id, &record).map(|answer| self.server.board.replace(self.id, self.number, answer));
        future::ready(replaced).boxed()
    }

    fn withdraw(&mut self) {
        self.server.board.take(self.id, self.number);
    }
}

/// Listens while publications hold it.
#[derive(Debug)]
struct Server {
    board: Arc<Board>,
    _tasks: JoinSet<()>,
}

impl Server {
    fn start(config: LanConfig, counters: Arc<Counters>) -> io::Result<Self> {
        let board = Arc::new(Board { counters, state: Mutex::default() });
        let mut tasks = JoinSet::new();
        let mut last_error = None;
        for family in [Family::V4, Family::V6] {
            match family.listen(config) {
                Ok(socket) => {
                    let mut joined = HashSet::new();
                    family.join(config, &socket, &mut joined);
                    tasks.spawn(serve(family, config, socket, joined, board.clone()));
                }
                Err(error) => {
                    tracing::debug!(?family, %error, "cannot listen on the local network");
                    last_error = Some(error);
                }
            }
        }
        match last_error {
            Some(error) if tasks.is_empty() => Err(error),
            _ => Ok(Self { board, _tasks: tasks }),
        }
    }
}

async fn serve(family: Family, config: LanConfig, socket: UdpSocket, mut joined: HashSet<Joined>, board: Arc<Board>) {
    let mut list_again = tokio::time::interval(LIST_EVERY);
    let mut packet = vec![0; RECEIVE_LEN];
    loop {
        tokio::select! {
            _ = list_again.tick() => family.join(config, &socket, &mut joined),
            received = socket.recv_from(&mut packet) => match received {
                Ok((length, from)) => {
                    let packet = packet.get(..length).unwrap_or_default();
                    if let Some(answer) = board.answer(packet, from.ip(), Instant::now()) {
                        // a lost answer is asked for again
                        let _ = socket.try_send_to(&answer, from);
                    }
                }
                Err(error) => pause_after(&error).await,
            },
        }
    }
}

/// What is published, and who has been answered.
#[derive(Debug)]
struct Board {
    counters: Arc<Counters>,
    state: Mutex<BoardState>,
}

#[derive(Debug, Default)]
struct BoardState {
    /// Answers by id, with the number of the publication each belongs to.
    answers: BTreeMap<LookupId, (u64, Arc<[u8]>)>,
    next_number: u64,
    limit: Limit,
}

impl Board {
    fn put(&self, id: LookupId, answer: Arc<[u8]>) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.next_number;
        state.next_number += 1;
        state.answers.insert(id, (number, answer));
        number
    }

    fn replace(&self, id: LookupId, number: u64, answer: Arc<[u8]>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // a later publication of the same id has taken over
        if let Some(entry) = state.answers.get_mut(&id)
            && entry.0 == number
        {
            entry.1 = answer;
        }
    }

    fn take(&self, id: LookupId, number: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.answers.get(&id).is_some_and(|entry| entry.0 == number) {
            state.answers.remove(&id);
        }
    }

    fn answer(&self, packet: &[u8], from: IpAddr, now: Instant) -> Option<Arc<[u8]>> {
        let count = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        let Some(id) = read_query(packet) else {
            count(&self.counters.malformed);
            return None;
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(answer) = state.answers.get(&id).map(|entry| entry.1.clone()) else {
            count(&self.counters.unknown);
            return None;
        };
        if !state.limit.allow(from, now) {
            count(&self.counters.limited);
            return None;
        }
        count(&self.counters.answered);
        Some(answer)
    }
}

/// Counts answers second by second; holds at most [`ANSWERS_PER_SECOND`] sources.
#[derive(Debug, Default)]
struct Limit {
    second: Option<Instant>,
    total: u32,
    sources: HashMap<IpAddr, u32>,
}

impl Limit {
    fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        let running = self.second.is_some_and(|start| now.saturating_duration_since(start) < Duration::from_secs(1));
        if !running {
            self.second = Some(now);
            self.total = 0;
            self.sources.clear();
        }
        if self.total >= ANSWERS_PER_SECOND {
            return false;
        }
        let given = self.sources.entry(source).or_default();
        if *given >= ANSWERS_PER_SOURCE {
            return false;
        }
        *given += 1;
        self.total += 1;
        true
    }
}

/// Asks on every interface until the lookup is dropped.
async fn ask(config: LanConfig, id: LookupId, mut sink: LookupSink) {
    let v4 = Family::V4.open();
    let v6 = Family::V6.open();
    let (v4, v6) = match (v4, v6) {
        (Err(error), Err(_)) => return sink.warn(RendezvousError::Network(error)).await,
        (v4, v6) => (v4.ok(), v6.ok()),
    };
    let query = query_packet(id);
    let mut ask_again = tokio::time::interval(ASK_EVERY);
    let mut v4_packet = vec![0; RECEIVE_LEN];
    let mut v6_packet = vec![0; RECEIVE_LEN];
    loop {
        let (received, packet) = tokio::select! {
            _ = ask_again.tick() => {
                if let Err(error) = send_query(config, v4.as_ref(), v6.as_ref(), &query) {
                    sink.warn(error).await;
                }
                continue;
            }
            received = receive(v4.as_ref(), &mut v4_packet) => (received, &v4_packet),
            received = receive(v6.as_ref(), &mut v6_packet) => (received, &v6_packet),
        };
        match received {
            Ok(length) => {
                let packet = packet.get(..length).unwrap_or_default();
                match read_answer(packet, id) {
                    Some(record) => sink.candidate(record).await,
                    None => tracing::debug!(length, "packet is no answer"),
                }
            }
            Err(error) => pause_after(&error).await,
        }
    }
}

async fn receive(socket: Option<&UdpSocket>, packet: &mut [u8]) -> io::Result<usize> {
    match socket {
        Some(socket) => socket.recv_from(packet).await.map(|(length, _)| length),
        None => future::pending().await,
    }
}

fn send_query(
    config: LanConfig,
    v4: Option<&UdpSocket>,
    v6: Option<&UdpSocket>,
    query: &[u8],
) -> Result<(), RendezvousError> {
    let interfaces = Interfaces::list().map_err(RendezvousError::Network)?;
    let over_v4 = interfaces.v4.iter().filter_map(|&ip| {
        let socket = SockRef::from(v4?);
        let to = SocketAddrV4::new(config.group_v4, config.port);
        Some(socket.set_multicast_if_v4(&ip).and_then(|()| socket.send_to(query, &to.into())))
    });
    let over_v6 = interfaces.v6.iter().filter_map(|&index| {
        let socket = SockRef::from(v6?);
        let to = SocketAddrV6::new(config.group_v6, config.port, 0, index);
        Some(socket.set_multicast_if_v6(index).and_then(|()| socket.send_to(query, &to.into())))
    });
    let sent: Vec<io::Result<usize>> = over_v4.chain(over_v6).collect();
    if sent.iter().any(Result::is_ok) {
        return Ok(());
    }
    Err(match sent.into_iter().find_map(Result::err) {
        Some(error) => RendezvousError::Network(error),
        None => RendezvousError::NoInterface,
    })
}

/// Some systems report a peer's closed port on the next receive, again and again.
async fn pause_after(error: &io::Error) {
    tracing::debug!(%error, "receive failed");
    tokio::time::sleep(ERROR_PAUSE).await;
}

#[derive(Clone, Copy, Debug)]
enum Family {
    V4,
    V6,
}

/// A membership: the interface's address for IPv4, its index for IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Joined {
    V4(Ipv4Addr),
    V6(u32),
}

impl Family {
    /// A socket for asking, on any port.
    fn open(self) -> io::Result<UdpSocket> {
        let socket = self.socket()?;
        socket.bind(&self.any(0).into())?;
        UdpSocket::from_std(socket.into())
    }

    /// A socket for answering, whose port other processes may share.
    fn listen(self, config: LanConfig) -> io::Result<UdpSocket> {
        let socket = self.socket()?;
        socket.set_reuse_address(true)?;
        // Linux would bind it to one user; the others share multicast ports only with it
        #[cfg(all(unix, not(any(target_os = "linux", target_os = "android"))))]
        socket.set_reuse_port(true)?;
        socket.bind(&self.any(config.port).into())?;
        UdpSocket::from_std(socket.into())
    }

    fn socket(self) -> io::Result<Socket> {
        let domain = match self {
            Self::V4 => Domain::IPV4,
            Self::V6 => Domain::IPV6,
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        // processes of one host find each other too
        match self {
            Self::V4 => {
                socket.set_multicast_ttl_v4(HOPS)?;
                socket.set_multicast_loop_v4(true)?;
            }
            Self::V6 => {
                socket.set_only_v6(true)?;
                socket.set_multicast_hops_v6(HOPS)?;
                socket.set_multicast_loop_v6(true)?;
            }
        }
        Ok(socket)
    }

    fn any(self, port: u16) -> SocketAddr {
        match self {
            Self::V4 => (Ipv4Addr::UNSPECIFIED, port).into(),
            Self::V6 => (Ipv6Addr::UNSPECIFIED, port).into(),
        }
    }

    /// Joins the group on interfaces that have come, leaves it on those that have gone.
    fn join(self, config: LanConfig, socket: &UdpSocket, joined: &mut HashSet<Joined>) {
        let interfaces = match Interfaces::list() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                tracing::debug!(%error, "cannot list network interfaces");
                return;
            }
        };
        let present: HashSet<Joined> = match self {
            Self::V4 => interfaces.v4.into_iter().map(Joined::V4).collect(),
            Self::V6 => interfaces.v6.into_iter().map(Joined::V6).collect(),
        };
        let socket = SockRef::from(socket);
        joined.retain(|membership| {
            let stays = present.contains(membership);
            if !stays {
                // fails where the interface took the membership with it
                let _ = match membership {
                    Joined::V4(ip) => socket.leave_multicast_v4(&config.group_v4, ip),
                    Joined::V6(index) => socket.leave_multicast_v6(&config.group_v6, *index),
                };
            }
            stays
        });
        for membership in present {
            if joined.contains(&membership) {
                continue;
            }
            let result = match membership {
                Joined::V4(ip) => socket.join_multicast_v4(&config.group_v4, &ip),
                Joined::V6(index) => socket.join_multicast_v6(&config.group_v6, index),
            };
            match result {
                Ok(()) => {
                    joined.insert(membership);
                }
                Err(error) => tracing::debug!(?membership, %error, "cannot join"),
            }
        }
    }
}

/// The interfaces that are up and no loopback, each once per family.
#[derive(Debug, Default)]
struct Interfaces {
    names: Vec<String>,
    v4: Vec<Ipv4Addr>,
    v6: Vec<u32>,
}

impl Interfaces {
    fn list() -> io::Result<Self> {
        let mut listed = Self::default();
        let mut seen_v4 = HashSet::new();
        for interface in if_addrs::get_if_addrs()? {
            if interface.is_loopback() || !interface.is_oper_up() {
                continue;
            }
            if !listed.names.contains(&interface.name) {
                if listed.names.len() >= MAX_INTERFACES {
                    continue;
                }
                listed.names.push(interface.name.clone());
            }
            match (interface.ip(), interface.index) {
                (IpAddr::V4(ip), _) => {
                    if seen_v4.insert(interface.name) {
                        listed.v4.push(ip);
                    }
                }
                (IpAddr::V6(_), Some(index)) => {
                    if !listed.v6.contains(&index) {
                        listed.v6.push(index);
                    }
                }
                (IpAddr::V6(_), None) => {}
            }
        }
        Ok(listed)
    }
}

fn query_packet(id: LookupId) -> [u8; QUERY_LEN] {
    let mut packet = [0; QUERY_LEN];
    let head = [QUERY_MAGIC.as_slice(), &[VERSION], &id.0].concat();
    for (to, from) in packet.iter_mut().zip(head) {
        *to = from;
    }
    packet
}

fn read_query(packet: &[u8]) -> Option<LookupId> {
    if packet.len() != QUERY_LEN {
        return None;
    }
    let (id, padding) = read_head(packet, QUERY_MAGIC)?;
    padding.iter().all(|byte| *byte == 0).then_some(id)
}

fn answer_packet(id: LookupId, record: &Record) -> Result<Arc<[u8]>, RendezvousError> {
    let record = record.as_bytes();
    let too_long = || RendezvousError::RecordTooLong { got: record.len(), max: MAX_LAN_RECORD };
    if record.len() > MAX_LAN_RECORD {
        return Err(too_long());
    }
    let length = u16::try_from(record.len()).map_err(|_| too_long())?;
    let packet = [ANSWER_MAGIC.as_slice(), &[VERSION], &id.0, &length.to_be_bytes(), record].concat();
    Ok(packet.into())
}

fn read_answer(packet: &[u8], asked: LookupId) -> Option<&[u8]> {
    let (id, rest) = read_head(packet, ANSWER_MAGIC)?;
    let (length, record) = rest.split_first_chunk::<2>()?;
    let exact = usize::from(u16::from_be_bytes(*length)) == record.len();
    (id == asked && exact && record.len() <= MAX_LAN_RECORD).then_some(record)
}

fn read_head<'a>(packet: &'a [u8], magic: &[u8; 4]) -> Option<(LookupId, &'a [u8])> {
    let rest = packet.strip_prefix(magic.as_slice())?;
    let rest = rest.strip_prefix(&[VERSION])?;
    let (id, rest) = rest.split_first_chunk::<16>()?;
    Some((LookupId(*id), rest))
}

impl fmt::Debug for Posted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Posted").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The provider's name.
const NAME: &str = "local network";

/// Begins a query.
const QUERY_MAGIC: &[u8; 4] = b"SSLQ";

/// Begins an answer.
const ANSWER_MAGIC: &[u8; 4] = b"SSLA";

/// The version of both.
const VERSION: u8 = 1;

/// Bytes of an answer before its record.
const ANSWER_HEADER: usize = 4 + 1 + 16 + 2;

/// No router forwards a query.
const HOPS: u32 = 1;

/// Room for any UDP packet: some systems report one that is cut off as an error, which would slow a server down.
const RECEIVE_LEN: usize = 64 * 1024;

/// An asker repeats itself this often: immediate enough for a person, and nothing to a network.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Interfaces used at once; systems allow some 20 memberships a socket.
const MAX_INTERFACES: usize = 16;

/// Interfaces are listed again this often, so that joining a Wi-Fi is noticed while a person waits.
const LIST_EVERY: Duration = Duration::from_secs(5);

/// See [`pause_after`].
const ERROR_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: LookupId = LookupId([7; 16]);

    fn record(bytes: &[u8]) -> Record {
        Record::new(bytes.to_vec()).expect("length is allowed")
    }

    #[test]
    fn packets_have_the_bytes_of_the_protocol_page() {
        let query = query_packet(ID);
        assert_eq!(query.len(), 700);
        assert_eq!(query[..21], *b"SSLQ\x01\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07");
        assert_eq!(query[21..], [0; 679]);
        let answer = answer_packet(ID, &record(b"abc")).expect("fits");
        assert_eq!(*answer, *b"SSLA\x01\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x00\x03abc");
    }

    #[test]
    fn no_answer_is_longer_than_a_query() {
        let longest = answer_packet(ID, &record(&[1; MAX_LAN_RECORD])).expect("fits");
        assert_eq!(longest.len(), QUERY_LEN);
        let refused = answer_packet(ID, &record(&[1; MAX_LAN_RECORD + 1]));
        assert!(matches!(refused, Err(RendezvousError::RecordTooLong { got: 678, max: 677 })));
    }

    #[test]
    fn an_answer_counts_only_if_all_of_it_fits() {
        let good = answer_packet(ID, &record(b"abc")).expect("fits").to_vec();
        assert_eq!(read_answer(&good, ID), Some(b"abc".as_slice()));
        assert_eq!(read_answer(&good, LookupId([8; 16])), None);
        for cut in 0..good.len() {
            assert_eq!(read_answer(&good[..cut], ID), None, "cut at {cut}");
        }
        let longer = [good.as_slice(), b"d"].concat();
        assert_eq!(read_answer(&longer, ID), None);
        let mut other_version = good;
        other_version[4] = 2;
        assert_eq!(read_answer(&other_version, ID), None);
    }

    #[test]
    fn answers_are_limited_by_source_and_in_all_and_again_allowed_a_second_later() {
        let mut limit = Limit::default();
        let start = Instant::now();
        let source = |last: u8| IpAddr::from([192, 0, 2, last]);
        let allowed = (0..50).filter(|_| limit.allow(source(1), start)).count();
        assert_eq!(allowed, 10);
        let others = (2..=250).filter(|last| limit.allow(source(*last), start)).count();
        assert_eq!(others, 90);
        assert!(limit.sources.len() <= 101, "{}", limit.sources.len());
        assert!(!limit.allow(source(251), start + Duration::from_millis(999)));
        assert!(limit.allow(source(1), start + Duration::from_secs(1)));
    }

    #[test]
    fn an_older_publication_does_not_take_a_newer_one_with_it() {
        let board = Board { counters: Arc::default(), state: Mutex::default() };
        let from = IpAddr::from([192, 0, 2, 1]);
        let ask = || board.answer(&query_packet(ID), from, Instant::now());
        let older = board.put(ID, answer_packet(ID, &record(b"older")).expect("fits"));
        let newer = board.put(ID, answer_packet(ID, &record(b"newer")).expect("fits"));
        board.replace(ID, older, answer_packet(ID, &record(b"wrong")).expect("fits"));
        board.take(ID, older);
        let answer = ask().expect("newer is still there");
        assert_eq!(read_answer(&answer, ID), Some(b"newer".as_slice()));
        board.take(ID, newer);
        assert_eq!(ask(), None);
    }

    proptest! {
        #[test]
        fn any_packet_is_read_or_refused(packet in proptest::collection::vec(any::<u8>(), 0..800)) {
            let query = read_query(&packet);
            prop_assert!(query.is_none() || packet.len() == QUERY_LEN);
            if let Some(record) = read_answer(&packet, ID) {
                prop_assert_eq!(record.len() + ANSWER_HEADER, packet.len());
            }
        }

        #[test]
        fn any_bytes_after_a_good_head_are_read_or_refused(tail in proptest::collection::vec(any::<u8>(), 0..700)) {
            let packet = [b"SSLA\x01".as_slice(), &ID.0, &tail].concat();
            if let Some(record) = read_answer(&packet, ID) {
                prop_assert_eq!(record, &tail[2..]);
            }
        }
    }
}
