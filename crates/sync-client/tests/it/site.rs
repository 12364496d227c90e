//! Devices under test in throw-away homes, and raw peers that speak the protocol by hand, honestly or not.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::{Rng as _, UnwrapErr};
use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::keys::{APP_STREAM, GroupKeys, KIND_BLOB};
use sync_client::{Bind, Config, Cursor, Device, Event, InviteOutcome, Network, Status, Subscription, SyncClient};
use sync_core::session::{Side, hello_statement};
use sync_crypto::author::SignPurpose;
use sync_crypto::pairing::prove_author;
use sync_crypto::seal::{Sealer, TAG_LEN};
use sync_crypto::{AuthorSecret, Code, InviteKeys, content, open_grant};
use sync_link::frame::FrameStream;
use sync_link::iroh_link::{CloseReason, Connection, DeviceId as LinkDevice, Endpoint, EndpointConfig};
use sync_types::{
    BlobId, Carried, Check, Class, Draft, Envelope, EnvelopeHash, EnvelopeType, EpochId, ErrorCode, FeedHave, Frame,
    Grant, GroupId, Header, MemberId, Number, Operation, ReplicaId, Scope, SignedOperation, Ticket, Timestamp,
};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How long invites last.
pub(crate) const LIFETIME: Duration = Duration::from_secs(600);
/// Time between two looks at something that is awaited.
pub(crate) const LOOK: Duration = Duration::from_millis(20);
/// What a raw peer sends and receives at most: more than a device does.
const RAW_FRAME: usize = 16 << 20;

pub(crate) const SYNC_ALPN: &[u8] = b"syncshell/sync/1";
pub(crate) const PAIR_ALPN: &[u8] = b"syncshell/pair/1";

/// A directory with homes.
pub(crate) struct Site {
    dir: tempfile::TempDir,
    /// Whether devices find each other through the runtime directory.
    same_machine: bool,
}

impl Site {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory"), same_machine: true }
    }

    /// Devices here know of each other only what they said in a session.
    pub(crate) fn without_directory() -> Self {
        Self { same_machine: false, ..Self::new() }
    }

    pub(crate) fn init(&self, name: &str) {
        Home::create(self.path(name), name, Some(KeyStoreKind::File), &PassphraseSource::none(), &mut rng())
            .expect("a home");
    }

    pub(crate) fn config(&self, name: &str) -> Config {
        let network = Network {
            bind: Bind::Loopback,
            mdns: false,
            lan: false,
            public_relays: false,
            same_machine: self.same_machine,
            runtime_dir: Some(self.path("run")),
            ..Network::default()
        };
        Config { home: self.path(name), passphrase: PassphraseSource::none(), network, snapshot_after: None }
    }

    pub(crate) async fn open(&self, name: &str) -> Device {
        Device::open(self.config(name)).await.expect("opens")
    }

    pub(crate) async fn device(&self, name: &str) -> Device {
        self.init(name);
        self.open(name).await
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

pub(crate) fn rng() -> UnwrapErr<getrandom::SysRng> {
    UnwrapErr(getrandom::SysRng)
}

pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rng().fill_bytes(&mut bytes);
    bytes
}

/// Pairs by code, which takes the same-machine directory.
pub(crate) async fn pair(inviter: &SyncClient, joiner: &Device) -> SyncClient {
    let mut invite = inviter.device().invite(inviter.group(), LIFETIME).await.expect("invites");
    let joined = joiner.join(&invite.code, |_| {}).await.expect("joins");
    let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.expect("in time");
    assert!(matches!(outcome, InviteOutcome::Joined { .. }), "{outcome:?}");
    joined
}

pub(crate) async fn founder(device: &Device) -> SyncClient {
    let group = device.create_group().await.expect("a group");
    device.client(group).expect("a client")
}

pub(crate) async fn bodies(client: &SyncClient) -> Vec<String> {
    let mut bodies = Vec::new();
    let mut after = Cursor(0);
    loop {
        let pulled = client.pull(after, 10_000).await.expect("pulls");
        bodies.extend(pulled.blobs.into_iter().map(|blob| String::from_utf8_lossy(&blob.bytes).into_owned()));
        after = pulled.max_cursor;
        if !pulled.has_more {
            return bodies;
        }
    }
}

/// Waits until a client holds these blobs in this order.
pub(crate) async fn eventually(client: &SyncClient, expected: &[&str]) {
    wait_for(client, expected, |_| {}).await;
}

/// Waits until a client holds these blobs in whatever order.
pub(crate) async fn eventually_all(client: &SyncClient, expected: &[&str]) {
    wait_for(client, expected, |got| got.sort()).await;
}

async fn wait_for(client: &SyncClient, expected: &[&str], arrange: impl Fn(&mut Vec<String>)) {
    let start = Instant::now();
    loop {
        let mut got = bodies(client).await;
        arrange(&mut got);
        if got == expected {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "expected {expected:?}, got {got:?}, {:?}", client.status().await);
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a client holds a blob, whatever else it holds.
pub(crate) async fn eventually_has(client: &SyncClient, expected: &str) {
    let start = Instant::now();
    while !bodies(client).await.iter().any(|body| body == expected) {
        assert!(start.elapsed() < PATIENCE, "no {expected:?}, {:?}", client.status().await);
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a client's status is as it should be.
pub(crate) async fn until(client: &SyncClient, what: &str, is: impl Fn(&Status) -> bool) -> Status {
    let start = Instant::now();
    loop {
        let status = client.status().await.expect("status");
        if is(&status) {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "not {what}: {status:?}");
        tokio::time::sleep(LOOK).await;
    }
}

pub(crate) async fn refused(client: &SyncClient) -> u64 {
    client.status().await.expect("status").refused
}

/// Waits until a client has counted a refusal beyond those before.
pub(crate) async fn until_refused(client: &SyncClient, before: u64) {
    until(client, "refused", |status| status.refused > before).await;
}

/// Waits for an error event with this code, and gives its words.
pub(crate) async fn error_event(events: &mut Subscription, wanted: &str) -> String {
    let waiting = tokio::time::timeout(PATIENCE, async {
        loop {
            match events.next().await {
                Some(Event::Error { code, message }) if code == wanted => return message,
                Some(_) => {}
                None => panic!("the client was closed"),
            }
        }
    });
    waiting.await.unwrap_or_else(|_| panic!("no error event {wanted}"))
}

/// Two honest devices of one group.
pub(crate) struct Friends {
    pub(crate) site: Site,
    pub(crate) alice: SyncClient,
    pub(crate) bob: SyncClient,
}

impl Friends {
    pub(crate) async fn new() -> Self {
        let site = Site::new();
        let (a, b) = (site.device("a").await, site.device("b").await);
        let alice = founder(&a).await;
        let bob = pair(&alice, &b).await;
        Self { site, alice, bob }
    }

    /// The attack is over: both still sync.
    pub(crate) async fn still_sync(&self) {
        self.alice.push("alice is well").await.expect("pushes");
        self.bob.push("bob is well").await.expect("pushes");
        for client in [&self.alice, &self.bob] {
            eventually_has(client, "alice is well").await;
            eventually_has(client, "bob is well").await;
        }
    }
}

/// Where a device under test can be dialled.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) device: LinkDevice,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) group: GroupId,
}

impl Target {
    /// As another device of the group has it in its address book.
    pub(crate) async fn of(client: &SyncClient, friend: &SyncClient) -> Self {
        let wanted = client.endpoint_id().to_string();
        let status = until(friend, "in touch", |status| {
            status.peers.iter().any(|peer| peer.device == wanted && !peer.addresses.is_empty())
        });
        let peers = status.await.peers;
        let peer = peers.into_iter().find(|peer| peer.device == wanted).expect("just seen");
        let addresses = peer.addresses.iter().filter_map(|text| text.parse().ok()).collect();
        Self { device: LinkDevice(client.endpoint_id().0), addresses, group: client.group() }
    }

    /// As an invite has it.
    pub(crate) fn of_link(link: &str, group: GroupId) -> Self {
        let ticket = Ticket::from_link(link).expect("a link");
        let addresses = ticket.addresses.iter().filter_map(|text| text.parse().ok()).collect();
        Self { device: LinkDevice(ticket.device.0), addresses, group }
    }
}

/// A device that is no `Device`.
pub(crate) struct Raw {
    pub(crate) endpoint: Endpoint,
}

impl Raw {
    pub(crate) async fn new() -> Self {
        Self::accepting(&[]).await
    }

    /// One that can be dialled too.
    pub(crate) async fn accepting(alpns: &[&[u8]]) -> Self {
        let alpns = alpns.iter().map(|alpn| alpn.to_vec()).collect();
        let mut config = EndpointConfig::new(&random(), alpns);
        config.bind = Bind::Loopback;
        Self { endpoint: Endpoint::bind(config).await.expect("binds") }
    }

    pub(crate) async fn connect(&self, target: &Target, alpn: &[u8]) -> Connection {
        self.endpoint.connect(target.device, &target.addresses, alpn, PATIENCE).await.expect("connects")
    }

    /// Opens a sync session up to where HELLO is due.
    pub(crate) async fn dial(&self, target: &Target) -> Talk {
        let connection = self.connect(target, SYNC_ALPN).await;
        let binding = connection.export(b"syncshell sync v1", &target.group.0).expect("exports");
        let stream = connection.open_stream(RAW_FRAME).await.expect("opens");
        Talk { connection, stream, binding }
    }

    /// Opens a pairing up to where JOIN is due.
    pub(crate) async fn ask(&self, target: &Target, keys: InviteKeys) -> Asking {
        let connection = self.connect(target, PAIR_ALPN).await;
        let binding = connection.export(b"syncshell pair v1", b"").expect("exports");
        let stream = connection.open_stream(RAW_FRAME).await.expect("opens");
        Asking { talk: Talk { connection, stream, binding }, keys }
    }

    /// Joins as an honest device would.
    pub(crate) async fn join(&self, inviter: &SyncClient) -> Member {
        self.join_from(inviter, Vec::new()).await
    }

    /// Joins, and says where it can be dialled.
    pub(crate) async fn join_from(&self, inviter: &SyncClient, at: Vec<String>) -> Member {
        let invite = inviter.device().invite(inviter.group(), LIFETIME).await.expect("invites");
        let target = Target::of_link(&invite.link, inviter.group());
        let mut asking = self.ask(&target, keys_of(&invite.code).await).await;
        let author = AuthorSecret::make(&mut rng());
        let replica = ReplicaId(random());
        let mut join = asking.join(&author);
        if let Frame::Join { addresses, replica: named, .. } = &mut join {
            (*addresses, *named) = (at, replica);
        }
        asking.talk.send(&join).await;
        let Some(Frame::Grant(grant)) = asking.talk.recv().await else { panic!("no grant") };
        let member = Member { replica, ..Member::of(author, &grant, &asking.talk.binding) };
        asking.talk.send(&Frame::Joined).await;
        asking.talk.ended().await;
        member
    }
}

pub(crate) async fn keys_of(code: &str) -> InviteKeys {
    let code = Code::parse(code).expect("a code");
    tokio::task::spawn_blocking(move || InviteKeys::derive(&code)).await.expect("derives").expect("enough memory")
}

/// A pairing under way.
pub(crate) struct Asking {
    pub(crate) talk: Talk,
    pub(crate) keys: InviteKeys,
}

impl Asking {
    /// A JOIN as it should be.
    pub(crate) fn join(&self, author: &AuthorSecret) -> Frame {
        let (binding, invite) = (&self.talk.binding, self.keys.invite_id());
        Frame::Join {
            invite,
            keys: author.keys(),
            replica: ReplicaId(random()),
            name: "mallory".to_owned(),
            addresses: Vec::new(),
            invite_proof: self.keys.prove_join(binding, &author.keys()),
            author_proof: prove_author(author, binding, &invite),
        }
    }

    /// Sends a JOIN that is refused, and tells how.
    pub(crate) async fn refused(mut self, join: &Frame) -> ErrorCode {
        self.talk.send(join).await;
        self.talk.error().await.0
    }
}

/// What a raw peer holds once it was admitted.
#[derive(Clone)]
pub(crate) struct Member {
    pub(crate) author: AuthorSecret,
    pub(crate) group: GroupId,
    pub(crate) token: Vec<Vec<u8>>,
    pub(crate) replica: ReplicaId,
    pub(crate) keys: Arc<GroupKeys>,
}

impl Member {
    pub(crate) fn of(author: AuthorSecret, grant: &Grant, binding: &[u8; 32]) -> Self {
        let group = GroupId::of(&grant.charter);
        let mut keys = GroupKeys::new(&grant.charter).expect("a charter");
        for (epoch, secret) in open_grant(&group, binding, &author, &grant.epochs).expect("opens") {
            keys.insert(epoch, secret).expect("commits");
        }
        Self { author, group, token: grant.token.clone(), replica: ReplicaId(random()), keys: Arc::new(keys) }
    }

    /// The member the device that invited us belongs to, and so do we.
    pub(crate) fn member(&self) -> MemberId {
        let admission = Envelope::parse(self.token.last().expect("an admission")).expect("an envelope");
        match SignedOperation::decode(admission.payload()).expect("an operation").operation {
            Operation::Admit { member, .. } => member,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn hello(&self, binding: &[u8; 32]) -> Frame {
        self.hello_as(binding, Side::Dialler, &self.replica)
    }

    /// A HELLO whose proof is for this side and replica.
    pub(crate) fn hello_as(&self, binding: &[u8; 32], side: Side, replica: &ReplicaId) -> Frame {
        let statement = hello_statement(binding, side, &self.group, replica);
        Frame::Hello {
            group: self.group,
            author: self.author.id(),
            replica: self.replica,
            token: self.token.clone(),
            proof: self.author.sign(SignPurpose::Hello, &[&statement]),
        }
    }

    pub(crate) fn header(&self, number: u64, previous: EnvelopeHash) -> Header {
        Header {
            kind: EnvelopeType::Push,
            sender: self.author.id(),
            group: self.group,
            timestamp: Timestamp(1_795_000_000_000),
            nonce: random(),
            blob_id: BlobId(random()),
            number: Number(number),
            previous,
            class: Class::Sealed,
            epoch: self.keys.current().expect("an epoch").0,
            commitment: [0; 32],
        }
    }

    /// Seals and signs any plaintext under any header.
    pub(crate) fn seal(&self, mut header: Header, plain: &[u8]) -> Vec<u8> {
        let (_, keys) = self.keys.current().expect("an epoch");
        let sealer = Sealer::new(&keys.entry, sync_crypto::Suite::XChaCha20Poly1305, &header.nonce);
        header.commitment = sealer.commitment();
        let mut draft = Draft::new(&header, plain.len() + TAG_LEN).expect("fits");
        let associated = draft.associated_data();
        let (body, tag) = draft.payload_mut().split_at_mut(plain.len());
        body.copy_from_slice(plain);
        tag.copy_from_slice(&sealer.seal_in_place(&associated, body));
        self.sign(draft)
    }

    /// Signs an entry whose payload is in the clear.
    pub(crate) fn clear(&self, header: Header, payload: &[u8]) -> Vec<u8> {
        let mut draft = Draft::new(&header, payload.len()).expect("fits");
        draft.payload_mut().copy_from_slice(payload);
        self.sign(draft)
    }

    /// Signs a membership operation.
    pub(crate) fn operation(&self, number: u64, previous: EnvelopeHash, operation: Operation) -> Vec<u8> {
        let header = Header { class: Class::Membership, epoch: EpochId::NONE, ..self.header(number, previous) };
        self.clear(header, &SignedOperation { seen: Vec::new(), operation }.encode())
    }

    pub(crate) fn sign(&self, draft: Draft) -> Vec<u8> {
        let signature = self.author.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        draft.sign(&signature)
    }

    /// An app's blob.
    pub(crate) fn blob(&self, number: u64, previous: EnvelopeHash, text: &str) -> Vec<u8> {
        self.seal(self.header(number, previous), &plain(text))
    }

    /// App blobs, chained from number 1.
    pub(crate) fn chain(&self, texts: &[&str]) -> Vec<Vec<u8>> {
        let mut chain: Vec<Vec<u8>> = Vec::new();
        for (number, text) in (1..).zip(texts) {
            let previous = chain.last().map_or(EnvelopeHash::NONE, |bytes| hash_of(bytes));
            chain.push(self.blob(number, previous, text));
        }
        chain
    }
}

/// What an app's blob looks like inside its seal.
pub(crate) fn plain(text: &str) -> Vec<u8> {
    content::encode(APP_STREAM, KIND_BLOB, text.as_bytes()).expect("fits")
}

pub(crate) fn hash_of(envelope: &[u8]) -> EnvelopeHash {
    Envelope::parse(envelope).expect("an envelope").hash()
}

/// A session spoken by hand.
pub(crate) struct Talk {
    pub(crate) connection: Connection,
    pub(crate) stream: FrameStream,
    pub(crate) binding: [u8; 32],
}

impl Talk {
    pub(crate) async fn send(&mut self, frame: &Frame) {
        self.send_bytes(frame.encode()).await;
    }

    /// Sends a frame of any bytes; that the device has hung up meanwhile shows when reading.
    pub(crate) async fn send_bytes(&mut self, bytes: Vec<u8>) {
        if self.stream.sender.send(bytes).await.is_ok() {
            let _ = self.stream.sender.flush().await;
        }
    }

    /// The next frame; none once the device has ended the session.
    pub(crate) async fn recv(&mut self) -> Option<Frame> {
        let received = tokio::time::timeout(PATIENCE, self.stream.receiver.recv()).await.expect("the device hangs");
        let bytes = received.ok().flatten()?;
        Some(Frame::decode(&bytes).expect("a device sends what can be read"))
    }

    /// The next frame that is wanted, passing over others.
    pub(crate) async fn recv_until<T>(&mut self, mut wanted: impl FnMut(Frame) -> Option<T>) -> T {
        loop {
            let frame = self.recv().await.expect("the session goes on");
            if let Some(found) = wanted(frame) {
                return found;
            }
        }
    }

    /// The refusal that ends the session.
    pub(crate) async fn error(&mut self) -> (ErrorCode, String) {
        self.recv_until(|frame| match frame {
            Frame::Error { code, text } => Some((code, text)),
            _ => None,
        })
        .await
    }

    /// How the device ended the connection.
    pub(crate) async fn ended(&self) -> CloseReason {
        tokio::time::timeout(PATIENCE, self.connection.closed()).await.expect("the device ends the connection")
    }

    /// Greets, exchanges membership and everything else as an honest replica would, and gives what the device sent.
    pub(crate) async fn go_live(&mut self, member: &Member, offer: Offer) -> Vec<Carried> {
        let hello = member.hello(&self.binding);
        self.send(&hello).await;
        self.go_on(offer).await
    }

    /// The same after HELLO.
    pub(crate) async fn go_on(&mut self, mut offer: Offer) -> Vec<Carried> {
        let mut got = Vec::new();
        let (mut answered, mut caught_up) = (false, false);
        while !answered || !caught_up {
            match self.recv().await.expect("the session goes on") {
                Frame::Hello { .. } => {
                    let pull = offer.pull(1, Scope::Membership);
                    self.send(&pull).await;
                }
                Frame::Pull { request, scope: Scope::Membership, .. } => {
                    self.send(&answer(request, Vec::new(), Offer::default().position)).await;
                }
                Frame::Pull { request, .. } => {
                    let entries = std::mem::take(&mut offer.entries);
                    self.send(&answer(request, entries, offer.position)).await;
                    answered = true;
                }
                Frame::Welcome { .. } => {
                    let welcome = Frame::Welcome {
                        replica: ReplicaId([9; 16]),
                        max_cursor: offer.position.0,
                        check: offer.position.1,
                        name: "mallory".to_owned(),
                        addresses: Vec::new(),
                        incarnation: random(),
                    };
                    self.send(&welcome).await;
                    let pull = offer.pull(2, Scope::All);
                    self.send(&pull).await;
                }
                Frame::PullResponse { request: 1, .. } | Frame::Push { .. } | Frame::Want { .. } => {}
                Frame::PullResponse { entries, has_more, max_cursor, .. } => {
                    got.extend(entries);
                    caught_up = !has_more;
                    if offer.acknowledge {
                        self.send(&Frame::PushAck { cursor: max_cursor }).await;
                    }
                }
                Frame::PushAck { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        got
    }

    /// Pushes entries and waits until the device has stored what counts of them.
    pub(crate) async fn push(&mut self, entries: Vec<Vec<u8>>, cursor: u64) {
        let frame = Frame::Push { entries: carried(entries), max_cursor: Cursor(cursor), check: Check([7; 8]) };
        self.send(&frame).await;
        self.recv_until(|frame| matches!(frame, Frame::PushAck { cursor: acked } if acked.0 == cursor).then_some(()))
            .await;
    }
}

/// What a raw replica shows of itself.
pub(crate) struct Offer {
    pub(crate) entries: Vec<Vec<u8>>,
    pub(crate) position: (Cursor, Check),
    pub(crate) have: Vec<FeedHave>,
    pub(crate) limit: u32,
    pub(crate) acknowledge: bool,
}

impl Default for Offer {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            position: (Cursor(0), Check::NONE),
            have: Vec::new(),
            limit: 1000,
            acknowledge: true,
        }
    }
}

impl Offer {
    fn pull(&self, request: u32, scope: Scope) -> Frame {
        Frame::Pull {
            request,
            scope,
            after: Cursor(0),
            check: Check::NONE,
            limit: self.limit,
            have: self.have.clone(),
            covered: Vec::new(),
        }
    }
}

/// Bytes that no compressor makes shorter.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng().fill_bytes(&mut bytes);
    bytes
}

/// The answer to a PULL.
pub(crate) fn answer(request: u32, entries: Vec<Vec<u8>>, (max_cursor, check): (Cursor, Check)) -> Frame {
    Frame::PullResponse {
        request,
        entries: carried(entries),
        max_cursor,
        check,
        has_more: false,
        reset: false,
        holds_from: Cursor(1),
    }
}

pub(crate) fn carried(entries: Vec<Vec<u8>>) -> Vec<Carried> {
    (1..).zip(entries).map(|(cursor, envelope)| Carried { cursor: Cursor(cursor), envelope }).collect()
}

/// Puts other bytes into the same file, as a rollback of a whole disk would.
pub(crate) fn overwrite(path: &Path, bytes: &[u8]) {
    use std::io::Write as _;
    for side in ["-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(side);
        let _ = std::fs::remove_file(name);
    }
    let mut file = std::fs::OpenOptions::new().write(true).truncate(true).open(path).expect("opens");
    file.write_all(bytes).expect("writes");
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a directory");
    #[cfg(unix)]
    std::fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("permissions");
    for entry in std::fs::read_dir(from).expect("a home") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copies");
    }
}
