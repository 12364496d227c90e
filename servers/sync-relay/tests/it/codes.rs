//! Codes that are found at a relay, and joins that go through it.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sync_client::{Device, InviteOutcome, JoinProgress, SyncClient};
use sync_crypto::pairing::prove_author;
use sync_crypto::{AuthorSecret, Code, InviteKeys, open_grant};
use sync_link::relay::meeting::{Meeting, MeetingError};
use sync_link::relay::{RelayError, RelayUrl};
use sync_link::rendezvous::LookupId;
use sync_types::{AuthorKeys, DeviceId, ErrorCode, Frame, GroupId, Relayed, ReplicaId, Ticket};

use crate::raw::{author, random};
use crate::site::{PATIENCE, RelayProcess, Site, until_has};

const LIFETIME: Duration = Duration::from_secs(600);

/// The place of a code at a relay.
fn place(relay: &RelayProcess, code: &str) -> Meeting {
    let keys = InviteKeys::derive(&Code::parse(code).unwrap()).unwrap();
    Meeting::new(&relay.url.parse::<RelayUrl>().unwrap(), LookupId(keys.lookup_id().0))
}

/// Joins, and tells by which way the inviter was found.
async fn join(device: &Device, invite: &str, relays: &[String]) -> (SyncClient, Vec<String>) {
    let ways = std::sync::Mutex::new(Vec::new());
    let joined = device.join_at(invite, relays, |step| {
        if let JoinProgress::Found { by } = step {
            ways.lock().unwrap().push(by);
        }
    });
    let client = joined.await.unwrap();
    (client, ways.into_inner().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_is_found_at_a_relay_that_both_sides_name() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "plain = false\n");
    let (a, b) = (site.open("anna").await, site.open("ben").await);
    let group = a.create_group().await.unwrap();
    let named = [relay.url.clone()];
    let mut invite = a.invite_at(group, LIFETIME, &named).await.unwrap();
    assert_eq!(b.join(&invite.code, |_| {}).await.unwrap_err().code(), "invite-not-found");
    let (_, ways) = join(&b, &invite.code, &named).await;
    assert_eq!(ways, ["relay"]);
    let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.unwrap();
    assert!(matches!(outcome, InviteOutcome::Joined { .. }), "{outcome:?}");
    assert_eq!(place(&relay, &invite.code).fetch(None).await, Err(MeetingError::Fetched));
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_reach_the_inviter_joins_through_the_relay_and_uses_it_from_then_on() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let (a, b) = (site.open("anna").await, site.open("ben").await);
    let group = a.create_group().await.unwrap();
    a.add_relay(&relay.url, None).await.unwrap();
    let anna = a.client(group).unwrap();
    anna.push("from before").await.unwrap();
    let mut invite = a.invite(group, LIFETIME).await.unwrap();
    // whoever takes the record first learns nothing, and leaves the joiner without an address
    let record = place(&relay, &invite.code).fetch(None).await.unwrap();
    assert!(!record.windows(9).any(|window| window == b"127.0.0.1"));
    let (ben, ways) = join(&b, &invite.code, std::slice::from_ref(&relay.url)).await;
    assert!(ways.len() == 1 && ways[0].starts_with("relay 127.0.0.1"), "{ways:?}");
    let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.unwrap();
    assert!(matches!(&outcome, InviteOutcome::Joined { name, .. } if name == "ben-of-the-household"), "{outcome:?}");
    assert_eq!(b.relays().await.unwrap()[0].url, relay.url);
    until_has(&ben, "from before").await;
    // it admits nobody else
    let c = site.open("carl").await;
    let error = c.join_at(&invite.code, std::slice::from_ref(&relay.url), |_| {}).await.unwrap_err();
    assert_eq!(error.code(), "invite-used");
    drop((anna, ben));
    a.close().await;
    b.close().await;
    c.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_names_the_relay_and_needs_nothing_else() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "plain = false\n");
    let (a, b) = (site.open("anna").await, site.open("ben").await);
    let group = a.create_group().await.unwrap();
    a.add_relay(&relay.url, None).await.unwrap();
    let mut invite = a.invite(group, LIFETIME).await.unwrap();
    let mut ticket = Ticket::from_link(&invite.link).unwrap();
    assert_eq!(ticket.relays, std::slice::from_ref(&relay.url));
    // nobody is where the link says
    ticket.addresses = vec!["127.0.0.1:9".to_owned()];
    let (_, ways) = join(&b, &ticket.to_link(), &[]).await;
    assert!(ways.last().unwrap().starts_with("relay 127.0.0.1"), "{ways:?}");
    let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.unwrap();
    assert!(matches!(outcome, InviteOutcome::Joined { .. }), "{outcome:?}");
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_that_was_taken_back_is_not_found_and_after_a_restart_of_the_relay_an_open_one_is() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "");
    let a = site.open("anna").await;
    let group = a.create_group().await.unwrap();
    let named = [relay.url.clone()];
    let open = a.invite_at(group, LIFETIME, &named).await.unwrap();
    let revoked = a.invite_at(group, LIFETIME, &named).await.unwrap();
    a.revoke(&revoked.code).await.unwrap();
    let c = site.open("carl").await;
    let error = c.join_at(&revoked.code, &named, |_| {}).await.unwrap_err();
    assert_eq!(error.code(), "invite-revoked");
    relay.kill();
    relay.restart();
    let start = std::time::Instant::now();
    while relay.http("/health").1.contains("\"codes\":0") {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    join(&c, &open.code, &named).await;
    a.close().await;
    c.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_joins_is_told_why_a_relay_does_not_say() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "[limits]\ncode_misses_per_minute = 1\n");
    let b = site.open("ben").await;
    let named = [relay.url.clone()];
    let mut heard = Vec::new();
    for _ in 0..2 {
        let error = b.join_at("0000-0000-0000-0000", &named, |_| {}).await.unwrap_err();
        heard.push((error.code(), error.to_string()));
    }
    relay.kill();
    let error = b.join_at("0000-0000-0000-0000", &named, |_| {}).await.unwrap_err();
    heard.push((error.code(), error.to_string()));
    let said = ["asked too often", "asked too often", "cannot be reached"];
    for ((code, text), said) in heard.iter().zip(said) {
        assert!(*code == "relay-unavailable" && text.contains(said), "{text}");
    }
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_guesses_codes_or_writes_too_much_is_refused() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let url: RelayUrl = relay.url.parse().unwrap();
    let at = || Meeting::new(&url, LookupId(random()));
    let status = |error: MeetingError| match error {
        MeetingError::Relay(RelayError::Refused { status, .. }) => status,
        error => panic!("{error}"),
    };
    let meeting = at();
    for long in [1025, 100_000, 8 << 20] {
        // the relay may hang up on what it does not read
        assert!(meeting.publish(&[1; 16], &vec![0; long]).await.is_err());
    }
    meeting.publish(&[1; 16], b"sealed").await.unwrap();
    assert_eq!(meeting.publish(&[2; 16], b"forged").await, Err(MeetingError::Taken));
    assert_eq!(meeting.asked(&[2; 16], Duration::ZERO).await, Err(MeetingError::NotThere));
    assert_eq!(meeting.answer(&[2; 16], 1, b"forged").await, Err(MeetingError::NotThere));
    assert!(meeting.ask(&vec![0; 100_000]).await.is_err());
    assert_eq!(meeting.fetch(None).await.unwrap(), "sealed");
    assert_eq!(meeting.fetch(None).await, Err(MeetingError::Fetched));
    for _ in 0..3 {
        assert_eq!(at().fetch(None).await, Err(MeetingError::NotThere));
    }
    assert_eq!(status(at().fetch(None).await.unwrap_err()), 429);
    assert_eq!(status(meeting.fetch(None).await.unwrap_err()), 429, "nor what is there");
    while meeting.publish(&[1; 16], b"sealed").await.is_ok() {}
    assert_eq!(status(meeting.publish(&[1; 16], b"sealed").await.unwrap_err()), 429);
    assert!(relay.http("/health").0.contains("200"));
}

/// A joiner that speaks by hand.
struct Joiner {
    keys: InviteKeys,
    author: AuthorSecret,
    nonce: [u8; 32],
    device: DeviceId,
}

impl Joiner {
    fn new(code: &str) -> Self {
        let keys = InviteKeys::derive(&Code::parse(code).unwrap()).unwrap();
        Self { keys, author: author(), nonce: random(), device: DeviceId(random()) }
    }

    fn binding(&self) -> [u8; 32] {
        let bytes = [self.nonce, self.device.0].concat();
        blake3::derive_key("syncshell v1 pairing through a relay", &bytes)
    }

    /// What it leaves at a relay.
    fn request(&self) -> Vec<u8> {
        let invite = self.keys.invite_id();
        let join = Frame::Join {
            invite,
            keys: self.author.keys(),
            replica: ReplicaId(random()),
            name: "by hand".to_owned(),
            addresses: Vec::new(),
            invite_proof: self.keys.prove_join(&self.binding(), &self.author.keys()),
            author_proof: prove_author(&self.author, &self.binding(), &invite),
        };
        self.seal(&join)
    }

    fn seal(&self, frame: &Frame) -> Vec<u8> {
        let message = Relayed { nonce: self.nonce, device: self.device, frame: frame.encode() };
        self.keys.seal_request(&message.encode().unwrap(), &mut rand_core::UnwrapErr(getrandom::SysRng))
    }

    /// What the inviter answers to a request.
    async fn answer(&self, meeting: &Meeting, request: &[u8]) -> Frame {
        let number = meeting.ask(request).await.unwrap();
        let answer = tokio::time::timeout(PATIENCE, meeting.answered(number)).await.unwrap().unwrap().unwrap();
        let message = Relayed::decode(&self.keys.open_answer(&self.nonce, &answer).unwrap()).unwrap();
        Frame::decode(&message.frame).unwrap()
    }

    /// What someone who has learnt the code makes of a request, so that another's keys are in it.
    fn tampered(&self, request: &[u8], put: impl Fn(&AuthorKeys) -> AuthorKeys) -> Vec<u8> {
        let opened = Relayed::decode(&self.keys.open_request(request).unwrap()).unwrap();
        let mut join = Frame::decode(&opened.frame).unwrap();
        let Frame::Join { keys, invite_proof, .. } = &mut join else { panic!("no JOIN") };
        *keys = put(keys);
        *invite_proof = self.keys.prove_join(&self.binding(), keys);
        self.seal(&join)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_whose_keys_were_replaced_and_resealed_with_the_code_is_refused_the_first_time_and_again() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "[limits]\ncode_fetches_per_minute = 100\n");
    let a = site.open("anna").await;
    let group = a.create_group().await.unwrap();
    let invite = a.invite_at(group, LIFETIME, std::slice::from_ref(&relay.url)).await.unwrap();
    let (meeting, joiner, thief) = (place(&relay, &invite.code), Joiner::new(&invite.code), author().keys());
    let genuine = joiner.request();
    let kem_replaced = joiner.tampered(&genuine, |keys| AuthorKeys { kem: thief.kem.clone(), ..keys.clone() });
    let noise_replaced = joiner.tampered(&genuine, |keys| AuthorKeys { noise: thief.noise, ..keys.clone() });
    let untouched = joiner.tampered(&genuine, AuthorKeys::clone);
    for time in ["first", "again"] {
        for forged in [&kem_replaced, &noise_replaced] {
            let answer = joiner.answer(&meeting, forged).await;
            assert!(matches!(answer, Frame::Error { code: ErrorCode::InviteWrong, .. }), "{time}: {answer:?}");
        }
        // opening and sealing it again is not what was refused
        let Frame::Grant(grant) = joiner.answer(&meeting, &untouched).await else { panic!("no grant, {time}") };
        let opened = open_grant(&GroupId::of(&grant.charter), &joiner.binding(), &joiner.author, &grant.epochs);
        assert_eq!(opened.unwrap().len(), 1, "{time}");
    }
    a.close().await;
}

/// A relay that takes whatever is left at it, and gives only what `give` says.
struct Liar {
    url: String,
    asked: Arc<AtomicUsize>,
}

impl Liar {
    fn start(give: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("ws://{}/", listener.local_addr().unwrap());
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if !matches!(stream.read(&mut byte), Ok(1)) {
                        break;
                    }
                    head.push(byte[0]);
                }
                counted.fetch_add(1, Ordering::Relaxed);
                let head = String::from_utf8_lossy(&head).into_owned();
                let _ = match head.split(' ').next().unwrap() {
                    "POST" | "PUT" => {
                        stream.write_all(b"HTTP/1.1 201 Created\r\nx-number: 1\r\ncontent-length: 0\r\n\r\n")
                    }
                    "GET" => stream.write_all(give.as_bytes()),
                    _ => stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n"),
                };
                // what was not read would cut the answer off
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

const NOTHING: &str = "HTTP/1.1 204 No Content\r\n\r\n";
const GARBAGE: &str = "HTTP/1.1 200 OK\r\nx-number: 1\r\ncontent-length: 7\r\n\r\ngarbage";
const HANG_UP: &str = "";

#[tokio::test(flavor = "multi_thread")]
async fn relays_that_lie_do_not_keep_an_honest_one_from_being_used() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let (a, b) = (site.open("anna").await, site.open("ben").await);
    let group = a.create_group().await.unwrap();
    let invite = a.invite_at(group, LIFETIME, std::slice::from_ref(&relay.url)).await.unwrap();
    place(&relay, &invite.code).fetch(None).await.unwrap();
    let liars = [NOTHING, GARBAGE, HANG_UP].map(Liar::start);
    let mut named = liars.each_ref().map(|liar| liar.url.clone()).to_vec();
    let error = b.join_at(&invite.code, &named, |_| {}).await.unwrap_err();
    assert_eq!(error.code(), "join-waits", "one of them says that it keeps the request: {error}");
    let said = ["", "not made with the code", "was lost"];
    for (liar, said) in liars.iter().zip(said) {
        let place = &liar.url["ws://".len()..liar.url.len() - 1];
        assert!(error.to_string().contains(place) && error.to_string().contains(said), "{error}");
    }
    named.push(relay.url.clone());
    let (_, ways) = join(&b, &invite.code, &named[1..]).await;
    assert!(ways.last().unwrap().starts_with("relay 127.0.0.1"), "{ways:?}");
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_answers_at_once_with_nothing_of_use_is_asked_seldom() {
    let site = Site::new();
    let a = site.open("anna").await;
    let group = a.create_group().await.unwrap();
    for give in [NOTHING, GARBAGE, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"] {
        let liar = Liar::start(give);
        let _invite = a.invite_at(group, LIFETIME, std::slice::from_ref(&liar.url)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(4)).await;
        // at most a record left and looked for in each second
        assert!((2..=10).contains(&liar.asked()), "{give}: {}", liar.asked());
    }
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_not_left_or_looked_for_where_others_could_hear_whose_they_are() {
    let site = Site::new();
    let a = site.open("anna").await;
    let group = a.create_group().await.unwrap();
    let named = [RelayUrl::new("relay.example", 7841, &[1; 32]).to_string()];
    let errors = [
        a.invite_at(group, LIFETIME, &named).await.unwrap_err(),
        a.join_at("0000-0000-0000-0000", &named, |_| {}).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.code(), "relay-malformed");
        assert!(error.to_string().contains("https://"), "{error}");
    }
    // one that the group uses for entries is passed over
    a.add_relay(&named[0], None).await.unwrap();
    let invite = a.invite(group, LIFETIME).await.unwrap();
    assert_eq!(Ticket::from_link(&invite.link).unwrap().relays, Vec::<String>::new());
    a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_of_a_link_that_has_no_key_is_not_asked() {
    let site = Site::new();
    let (liar, b) = (Liar::start(GARBAGE), site.open("ben").await);
    let ticket = Ticket {
        secret: random(),
        device: DeviceId(random()),
        addresses: vec!["127.0.0.1:9".to_owned()],
        relays: vec![liar.url.clone()],
    };
    assert_eq!(b.join(&ticket.to_link(), |_| {}).await.unwrap_err().code(), "unreachable");
    assert_eq!(liar.asked(), 0);
    b.close().await;
}

/// Begins a request about a place of owner 09… from some address, and sends as much of its body as is given.
fn begin(relay: &RelayProcess, from: &str, call: &str, id: u8, path: &str, len: usize, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(relay.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (id, owner) = (format!("{id:02x}").repeat(16), "09".repeat(16));
    let head = format!(
        "{call} /v1/meetings/{id}{path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\nx-forwarded-for: {from}\r\n\
         authorization: Bearer {owner}\r\ncontent-length: {len}\r\n\r\n"
    );
    // it may answer without reading
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    stream
}

/// The status that is answered.
fn status(mut stream: TcpStream) -> u16 {
    let mut head = [0; 12];
    stream.read_exact(&mut head).unwrap();
    String::from_utf8_lossy(&head[9..]).parse().unwrap()
}

fn call(relay: &RelayProcess, from: &str, call: &str, id: u8, path: &str, body: &[u8]) -> u16 {
    status(begin(relay, from, call, id, path, body.len(), body))
}

const OF_MANY: &str = "behind_proxy = true\n[limits]\ncodes_per_minute = 100\ncode_fetches_per_minute = 100\n";

#[test]
fn answers_that_fill_a_relay_keep_nobody_from_asking() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", OF_MANY);
    let long = vec![0; 1 << 20];
    let mut kept = 0;
    for id in 0..20 {
        let (inviter, joiner) = (format!("10.0.0.{id}"), format!("10.1.0.{id}"));
        assert_eq!(call(&relay, &inviter, "PUT", id, "", b"sealed"), 201);
        assert_eq!(call(&relay, &joiner, "POST", id, "/requests", b"sealed"), 201, "after {kept}");
        match call(&relay, &inviter, "PUT", id, "/answers/1", &long) {
            201 => kept += 1,
            other => assert_eq!(other, 503),
        }
    }
    assert_eq!(kept, 12);
}

#[test]
fn one_address_has_ten_codes_and_two_mebibytes_at_a_relay_and_others_have_theirs() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", OF_MANY);
    let made: Vec<u16> = (0..11).map(|id| call(&relay, "10.0.0.1", "PUT", id, "", b"sealed")).collect();
    assert_eq!(made, [&[201; 10][..], &[429]].concat());
    for id in 0..3 {
        assert_eq!(call(&relay, "10.1.0.1", "POST", id, "/requests", b"sealed"), 201);
    }
    let long = vec![0; 1 << 20];
    let answered: Vec<u16> = (0..3).map(|id| call(&relay, "10.0.0.1", "PUT", id, "/answers/1", &long)).collect();
    assert_eq!(answered, [201, 201, 429]);
    assert_eq!(call(&relay, "10.0.0.2", "PUT", 50, "", b"sealed"), 201);
    // whatever was taken in makes room
    assert_eq!(call(&relay, "10.1.0.1", "GET", 0, "/answers/1", b""), 200);
    assert_eq!(call(&relay, "10.0.0.1", "PUT", 2, "/answers/1", &long), 429);
    assert_eq!(call(&relay, "10.1.0.1", "DELETE", 0, "/requests/1", b""), 204);
    assert_eq!(call(&relay, "10.0.0.1", "PUT", 2, "/answers/1", &long), 201);
    assert_eq!(call(&relay, "10.0.0.1", "DELETE", 3, "", b""), 204);
    assert_eq!(call(&relay, "10.0.0.1", "PUT", 11, "", b"sealed"), 201);
}

#[test]
fn an_answer_that_nobody_asked_for_or_that_has_no_room_is_refused_before_it_is_sent() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", OF_MANY);
    assert_eq!(call(&relay, "10.0.0.1", "PUT", 1, "", b"sealed"), 201);
    assert_eq!(call(&relay, "10.1.0.1", "POST", 1, "/requests", b"sealed"), 201);
    let announce = |path: &str, len: usize| begin(&relay, "10.0.0.1", "PUT", 1, path, len, b"");
    assert_eq!(status(announce("/answers/2", 1 << 20)), 503);
    assert_eq!(status(announce("/answers/1", (1 << 20) + 4097)), 413);
    // those that were announced have their room, until who announced them is gone
    let mut waiting = Vec::new();
    loop {
        let mut stream = announce("/answers/1", 1 << 20);
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut head = [0; 12];
        if stream.read_exact(&mut head).is_ok() {
            assert_eq!(&head, b"HTTP/1.1 429");
            break;
        }
        waiting.push(stream);
    }
    assert!(waiting.len() >= 2, "for two there is room");
    drop(waiting);
    let start = std::time::Instant::now();
    while call(&relay, "10.0.0.1", "PUT", 1, "/answers/1", b"sealed") != 201 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}
