//! Members who mean ill: forged, broken and lying entries, feeds, positions and admissions.

use sync_client::{AuthorId, Device};
use sync_crypto::AuthorSecret;
use sync_crypto::padded_len;
use sync_crypto::pairing::consent;
use sync_crypto::seal::{Sealer, TAG_LEN};
use sync_types::bounds::MAX_ENVELOPE;
use sync_types::{
    BlobId, Check, Class, Cursor, Draft, Envelope, EnvelopeHash, EpochId, ErrorCode, FeedHave, Frame, GroupId, Header,
    MemberId, Number, Operation, Range, ReplicaId, Role, SignedOperation, Want, Writer,
};

use crate::site::*;

/// Two honest devices, a member who is neither, and where to reach them.
struct Stage {
    friends: Friends,
    alice: Target,
    bob: Target,
    raw: Raw,
    mallory: Member,
}

impl Stage {
    async fn new() -> Self {
        let friends = Friends::new().await;
        let (raw, alice, bob) = (
            Raw::new().await,
            Target::of(&friends.alice, &friends.bob).await,
            Target::of(&friends.bob, &friends.alice).await,
        );
        let mallory = raw.join(&friends.alice).await;
        Self { friends, alice, bob, raw, mallory }
    }

    /// A live session of the ill-meaning member with a device.
    async fn session(&self, target: &Target) -> Talk {
        let mut talk = self.raw.dial(target).await;
        talk.go_live(&self.mallory, Offer::default()).await;
        talk
    }

    fn name(&self) -> String {
        self.mallory.author.id().to_string()
    }
}

/// The same envelope with a broken signature.
fn broken(envelope: &[u8]) -> Vec<u8> {
    let mut broken = envelope.to_vec();
    *broken.last_mut().expect("a signature") ^= 1;
    broken
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_foreign_broken_and_repeated_envelopes_are_refused_each_and_the_rest_arrives() {
    let stage = Stage::new().await;
    let (alice, mallory) = (&stage.friends.alice, &stage.mallory);
    let own = mallory.chain(&["first", "second"]);
    let header = || mallory.header(3, hash_of(&own[1]));
    let other_group = Member { group: GroupId(random()), ..mallory.clone() };
    let stranger = Member { author: AuthorSecret::make(&mut rng()), ..mallory.clone() };
    let mut too_long = own[0].clone();
    too_long.resize(MAX_ENVELOPE + 1, 0);
    let mut version = own[1].clone();
    version[3] = 2;
    let mut later_type = own[1].clone();
    later_type[4] = 0x11;
    let mut payload = own[1].clone();
    let middle = payload.len() / 2;
    payload[middle] ^= 1;
    let refused_ones = vec![
        // signed by another than it names
        mallory.seal(Header { sender: stage.friends.bob.author(), ..header() }, &plain("bob says")),
        stranger.chain(&["a stranger says"]).remove(0),
        other_group.chain(&["of another group"]).remove(0),
        broken(&own[1]),
        payload,
        own[1][..own[1].len() - 1].to_vec(),
        own[1][..100].to_vec(),
        [&own[1][..], &[0]].concat(),
        version,
        later_type,
        mallory.blob(u64::MAX, EnvelopeHash([1; 32]), "no number follows"),
        mallory.clear(Header { number: Number(0), ..header() }, b"number 0"),
        mallory.clear(Header { class: Class::Membership, epoch: EpochId::NONE, ..header() }, b"no operation"),
        Vec::new(),
        random::<500>().to_vec(),
        b"\xdd\xff\xff\xff\xff".to_vec(),
    ];
    let mut talk = stage.session(&stage.alice).await;
    let before = refused(alice).await;
    let count = u64::try_from(refused_ones.len()).expect("few");
    talk.push([vec![own[0].clone()], refused_ones.clone()].concat(), 1).await;
    assert_eq!(refused(alice).await, before + count);
    eventually_has(alice, "first").await;

    // replayed, in another order and several times in one batch
    let replayed = [own[1].clone(), own[0].clone(), own[1].clone(), own[0].clone()].to_vec();
    talk.push(replayed.clone(), 2).await;
    talk.push(replayed, 2).await;
    assert_eq!(refused(alice).await, before + count, "what is known is not refused");
    eventually_all(alice, &["first", "second"]).await;

    // one refused again is refused by itself, and harms nothing stored
    for one in refused_ones {
        let before = refused(alice).await;
        talk.push(vec![one], 3).await;
        assert_eq!(refused(alice).await, before + 1);
    }
    // one that is too long makes the frame too much, and ends the session
    let before = refused(alice).await;
    talk.send(&Frame::Push { entries: carried(vec![too_long]), max_cursor: Cursor(4), check: Check([4; 8]) }).await;
    assert_eq!(talk.error().await.0, ErrorCode::Protocol);
    until_refused(alice, before).await;
    assert!(alice.status().await.expect("status").gaps.is_empty());
    eventually_all(alice, &["first", "second"]).await;
    eventually_all(&stage.friends.bob, &["first", "second"]).await;
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_signature_in_the_middle_of_a_run_leaves_a_gap_that_heals() {
    let stage = Stage::new().await;
    let alice = &stage.friends.alice;
    let run = stage.mallory.chain(&["one", "two", "three", "four", "five"]);
    let mut damaged = run.clone();
    damaged[2] = broken(&run[2]);
    let mut talk = stage.session(&stage.alice).await;
    let before = refused(alice).await;
    talk.push(damaged, 5).await;
    assert_eq!(refused(alice).await, before + 1);
    for client in [alice, &stage.friends.bob] {
        eventually(client, &["one", "two", "four", "five"]).await;
        let status = until(client, "a gap", |status| !status.gaps.is_empty()).await;
        let gap = (&status.gaps[0].author, status.gaps[0].first, status.gaps[0].last);
        assert_eq!((gap, status.gaps.len()), ((&stage.name(), 3, 3), 1));
    }
    talk.push(vec![run[2].clone()], 6).await;
    for client in [alice, &stage.friends.bob] {
        // what fills a gap gets a new cursor like any arrival
        eventually(client, &["one", "two", "four", "five", "three"]).await;
        until(client, "whole", |status| status.gaps.is_empty() && status.forks.is_empty()).await;
    }
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_counts_by_what_follows_it_whatever_the_order_of_arrival() {
    let stage = Stage::new().await;
    let (alice, bob, mallory) = (&stage.friends.alice, &stage.friends.bob, &stage.mallory);
    let one = mallory.blob(1, EnvelopeHash::NONE, "one");
    // badly signed by its own author, who went on from it
    let two = broken(&mallory.blob(2, hash_of(&one), "two"));
    let three = mallory.blob(3, hash_of(&two), "three");
    let mut to_alice = stage.session(&stage.alice).await;
    let before = refused(alice).await;
    to_alice.push(vec![one.clone(), two.clone()], 1).await;
    assert_eq!(refused(alice).await, before + 1, "nothing vouches for it yet");
    to_alice.push(vec![three.clone()], 2).await;
    until(alice, "a gap", |status| status.gaps.len() == 1).await;
    to_alice.push(vec![two.clone()], 3).await;
    eventually(alice, &["one", "three", "two"]).await;
    let mut to_bob = stage.session(&stage.bob).await;
    to_bob.push(vec![two, three, one], 1).await;
    eventually_all(bob, &["one", "three", "two"]).await;
    for client in [alice, bob] {
        until(client, "whole", |status| status.gaps.is_empty() && status.forks.is_empty()).await;
    }
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_blocks_nothing_is_named_and_is_filled_by_whoever_returns_with_it() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&alice).await;
    let group = alice.group();
    let at = Target::of(&alice, &bob).await;
    let to_bob = Target::of(&bob, &alice).await;
    until(&bob, "aware of mallory", |status| status.authors == 3).await;
    drop(alice);
    a.close().await;
    // bob alone gets all of it
    let run = mallory.chain(&["one", "two", "three", "four"]);
    let mut talk = raw.dial(&to_bob).await;
    talk.go_live(&mallory, Offer::default()).await;
    talk.push(run.clone(), 4).await;
    eventually(&bob, &["one", "two", "three", "four"]).await;
    drop(talk);
    drop(bob);
    b.close().await;
    // and alice alone what leaves a gap
    let a = site.open("a").await;
    let alice = a.client(group).expect("a client");
    let mut events = alice.subscribe();
    let at = Target { addresses: addresses_of(&a, &alice).await, ..at };
    let mut talk = raw.dial(&at).await;
    talk.go_live(&mallory, Offer::default()).await;
    talk.push(vec![run[0].clone(), run[3].clone()], 1).await;
    eventually(&alice, &["one", "four"]).await;
    let status = alice.status().await.expect("status");
    assert_eq!(status.gaps.len(), 1, "{status:?}");
    let gap = &status.gaps[0];
    assert_eq!((&gap.author, gap.first, gap.last), (&mallory.author.id().to_string(), 2, 3));
    for expected in ["one", "four"] {
        assert_eq!(available(&mut events).await, mallory.author.id(), "{expected}");
    }
    // the one who has the rest was asked for it, says nothing, and is gone
    let wanted = talk.recv_until(|frame| match frame {
        Frame::Want { wants, .. } => Some(wants),
        _ => None,
    });
    let wanted = wanted.await;
    assert_eq!(wanted.len(), 1);
    assert_eq!(wanted[0].range, Range { first: Number(2), last: Number(3) });
    drop(talk);

    let b = site.open("b").await;
    let bob = b.client(group).expect("a client");
    eventually_all(&alice, &["four", "one", "three", "two"]).await;
    until(&alice, "whole", |status| status.gaps.is_empty()).await;
    drop(bob);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_filled_in_part_is_asked_for_again_in_part() {
    let stage = Stage::new().await;
    let alice = &stage.friends.alice;
    let run = stage.mallory.chain(&["one", "two", "three", "four", "five"]);
    let mut talk = stage.session(&stage.alice).await;
    talk.push(vec![run[0].clone(), run[4].clone()], 1).await;
    // as one does who has more than fits into an answer
    for (first, given) in [(2, 1), (3, 2), (4, 3)] {
        let (request, wants) = talk
            .recv_until(|frame| match frame {
                Frame::Want { request, wants } => Some((request, wants)),
                _ => None,
            })
            .await;
        let range = Range { first: Number(first), last: Number(4) };
        assert_eq!(wants, [Want { author: stage.mallory.author.id(), range }]);
        talk.send(&answer(request, vec![run[given].clone()], (Cursor(0), Check::NONE))).await;
    }
    eventually(alice, &["one", "five", "two", "three", "four"]).await;
    stage.friends.still_sync().await;
}

/// Where a device can be dialled now, as an invite says.
async fn addresses_of(device: &Device, client: &sync_client::SyncClient) -> Vec<std::net::SocketAddr> {
    let invite = device.invite(client.group(), LIFETIME).await.expect("invites");
    Target::of_link(&invite.link, client.group()).addresses
}

async fn available(events: &mut sync_client::Subscription) -> AuthorId {
    let waiting = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(sync_client::Event::BlobAvailable { sender, .. }) = events.next().await {
                return sender;
            }
        }
    });
    waiting.await.expect("an event")
}

#[tokio::test(flavor = "multi_thread")]
async fn m7_a_feed_that_tells_two_stories_is_named_and_both_are_kept_by_both() {
    let stage = Stage::new().await;
    let (alice, bob, mallory) = (&stage.friends.alice, &stage.friends.bob, &stage.mallory);
    let mut events = bob.subscribe();
    let one = mallory.blob(1, EnvelopeHash::NONE, "common");
    let branch = |words: [&str; 2]| {
        let two = mallory.blob(2, hash_of(&one), words[0]);
        let three = mallory.blob(3, hash_of(&two), words[1]);
        vec![one.clone(), two, three]
    };
    let mut to_alice = stage.session(&stage.alice).await;
    let mut to_bob = stage.session(&stage.bob).await;
    // both at once, so that neither has the other's story first
    let (first, second) = (branch(["to alice", "alice only"]), branch(["to bob", "bob only"]));
    tokio::join!(to_alice.push(first, 3), to_bob.push(second, 3));
    for client in [alice, bob] {
        eventually_all(client, &["alice only", "bob only", "common", "to alice", "to bob"]).await;
        let status = until(client, "a fork", |status| !status.forks.is_empty()).await;
        assert_eq!(status.forks.len(), 1, "{status:?}");
        assert_eq!((&status.forks[0].author, status.forks[0].number), (&stage.name(), 2));
    }
    let told = error_event(&mut events, "fork").await;
    assert!(told.contains(&mallory.author.id().short()), "{told}");
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_blob_id_with_other_bytes_is_never_taken_for_a_repetition() {
    let stage = Stage::new().await;
    let mallory = &stage.mallory;
    let blob_id = BlobId([5; 16]);
    let named = |number, previous, text: &str| {
        mallory.seal(Header { blob_id, ..mallory.header(number, previous) }, &plain(text))
    };
    let one = named(1, EnvelopeHash::NONE, "one");
    let two = named(2, hash_of(&one), "another");
    let mut talk = stage.session(&stage.alice).await;
    talk.push(vec![one, two], 2).await;
    for client in [&stage.friends.alice, &stage.friends.bob] {
        eventually(client, &["one", "another"]).await;
    }
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn c11_what_does_not_open_is_told_and_later_entries_still_come() {
    let stage = Stage::new().await;
    let (alice, mallory) = (&stage.friends.alice, &stage.mallory);
    let mut events = alice.subscribe();
    // a body that claims to be 4 GiB, one that claims less than it is, and one within the bound that is not
    let lz4 = |claimed: u32, block: &[u8]| {
        let mut writer = Writer::array_of(4);
        writer.text("app").uint(1).uint(1).bin(&[&claimed.to_le_bytes()[..], block].concat());
        let mut plain = writer.finish();
        let padded = padded_len(u64::try_from(plain.len()).expect("short"));
        plain.resize(usize::try_from(padded).expect("short"), 0);
        plain
    };
    let zeros = [&[0x1f, 0x00, 0x01, 0x00][..], &[0xff; 4096], &[0x00, 0x50, 0, 0, 0, 0, 0]].concat();
    let plains: Vec<Vec<u8>> = vec![
        random::<256>().to_vec(),
        lz4(u32::MAX, &zeros),
        lz4(10, &zeros),
        lz4(1 << 20, &[0xf0; 20]),
        Vec::new(),
        vec![0x94],
        vec![0xdd, 0xff, 0xff, 0xff, 0xff],
    ];
    let mut feed: Vec<Vec<u8>> = Vec::new();
    for plain in &plains {
        let (number, previous) = next(&feed);
        feed.push(mallory.seal(mallory.header(number, previous), plain));
    }
    // sealed by nobody: a commitment and a ciphertext at random
    let (number, previous) = next(&feed);
    let header = Header { commitment: random(), ..mallory.header(number, previous) };
    feed.push(mallory.clear(header, &random::<300>()));
    // the right commitment (C10), another ciphertext
    let (number, previous) = next(&feed);
    let good = mallory.seal(mallory.header(number, previous), &plain("never read"));
    let header = Envelope::parse(&good).expect("an envelope").header;
    feed.push(mallory.clear(header, &random::<300>()));
    let (number, previous) = next(&feed);
    feed.push(mallory.blob(number, previous, "after"));
    let count = feed.len() - 1;

    let mut talk = stage.session(&stage.alice).await;
    let before = refused(alice).await;
    talk.push(feed, 1).await;
    for _ in 0..count {
        let told = error_event(&mut events, "unreadable").await;
        assert!(told.contains(&mallory.author.id().short()), "{told}");
    }
    for client in [alice, &stage.friends.bob] {
        eventually(client, &["after"]).await;
        let status = client.status().await.expect("status");
        assert!(status.gaps.is_empty() && status.forks.is_empty(), "they count: {status:?}");
    }
    assert_eq!(refused(alice).await, before);
    stage.friends.still_sync().await;
}

/// Number and previous hash of what follows a feed.
fn next(feed: &[Vec<u8>]) -> (u64, EnvelopeHash) {
    let number = u64::try_from(feed.len()).expect("short") + 1;
    (number, feed.last().map_or(EnvelopeHash::NONE, |bytes| hash_of(bytes)))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_later_version_says_is_kept_skipped_and_forwarded_byte_for_byte() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let bob = pair(&alice, &b).await;
    let carol = pair(&bob, &c).await;
    let raw = Raw::new().await;
    let mallory = raw.join(&alice).await;
    let to_alice = Target::of(&alice, &bob).await;
    let to_carol = Target::of(&carol, &bob).await;
    let mut feed = Vec::new();
    let content = sync_crypto::content::encode("app", 4321, b"of a later version").expect("fits");
    feed.push(mallory.seal(mallory.header(1, EnvelopeHash::NONE), &content));
    feed.push(with_later_field(&mallory, mallory.header(2, hash_of(&feed[0])), "with a later field"));
    let operation = Header { class: Class::Membership, epoch: EpochId::NONE, ..mallory.header(3, hash_of(&feed[1])) };
    let unknown = SignedOperation { seen: Vec::new(), operation: Operation::Unknown(99) };
    feed.push(mallory.clear(operation, &unknown.encode()));
    let later_epoch = EpochId { number: 7, hash: [7; 32] };
    feed.push(mallory.clear(Header { epoch: later_epoch, ..mallory.header(4, hash_of(&feed[2])) }, &random::<80>()));
    feed.push(mallory.blob(5, hash_of(&feed[3]), "plain"));
    until(&carol, "aware of mallory", |status| status.authors == 4).await;
    // alice has it from mallory, bob from alice, carol from bob
    let group = alice.group();
    drop(carol);
    c.close().await;
    let mut talk = raw.dial(&to_alice).await;
    talk.go_live(&mallory, Offer::default()).await;
    talk.push(feed.clone(), 5).await;
    eventually(&bob, &["with a later field", "plain"]).await;
    drop((talk, alice));
    a.close().await;
    let c = site.open("c").await;
    let carol = c.client(group).expect("a client");
    eventually(&carol, &["with a later field", "plain"]).await;
    let mut talk = raw.dial(&Target { addresses: addresses_of(&c, &carol).await, ..to_carol }).await;
    let got: Vec<Vec<u8>> =
        talk.go_live(&mallory, Offer::default()).await.into_iter().map(|carried| carried.envelope).collect();
    for envelope in &feed {
        assert!(got.contains(envelope), "{:?} was changed", Envelope::parse(envelope));
    }
    drop(bob);
}

/// A blob whose envelope has one more field than this version knows.
fn with_later_field(member: &Member, mut header: Header, text: &str) -> Vec<u8> {
    const LATER: [u8; 4] = [0x92, 0x01, 0xa1, b'x'];
    let plain = plain(text);
    let (_, keys) = member.keys.current().expect("an epoch");
    let sealer = Sealer::new(&keys.entry, sync_crypto::Suite::XChaCha20Poly1305, &header.nonce);
    header.commitment = sealer.commitment();
    let lengthen = |draft: &Draft| {
        let mut bytes = draft.signed_bytes().to_vec();
        bytes[2] += 1;
        bytes.extend_from_slice(&LATER);
        bytes
    };
    let mut draft = Draft::new(&header, plain.len() + TAG_LEN).expect("fits");
    let unsigned = [&lengthen(&draft)[..], &[0xc4, 64], &[0; 64]].concat();
    let associated = Envelope::parse(&unsigned).expect("a later field").associated_data();
    let (body, tag) = draft.payload_mut().split_at_mut(plain.len());
    body.copy_from_slice(&plain);
    tag.copy_from_slice(&sealer.seal_in_place(&associated, body));
    let signed = lengthen(&draft);
    let signature = member.author.sign(sync_crypto::SignPurpose::Envelope, &[&signed]);
    [&signed[..], &[0xc4, 64], &signature].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn m8_lies_about_positions_lose_nothing() {
    let stage = Stage::new().await;
    let (alice, mallory) = (&stage.friends.alice, &stage.mallory);
    let run = mallory.chain(&["one", "two", "three"]);
    let offer = |entries: &[Vec<u8>], position| Offer { entries: entries.to_vec(), position, ..Offer::default() };
    // a cursor far ahead, then back at 0 with a check, then one that goes down
    let mut talk = stage.raw.dial(&stage.alice).await;
    talk.go_live(mallory, offer(&run[..1], (Cursor(u64::MAX), Check([1; 8])))).await;
    eventually(alice, &["one"]).await;
    drop(talk);
    let mut talk = stage.raw.dial(&stage.alice).await;
    talk.go_live(mallory, offer(&run[..2], (Cursor(0), Check([2; 8])))).await;
    eventually(alice, &["one", "two"]).await;
    talk.push(vec![run[2].clone()], 9).await;
    talk.push(Vec::new(), 3).await;
    talk.push(run.clone(), u64::MAX).await;
    eventually(alice, &["one", "two", "three"]).await;
    // answers to what was never asked, and without end
    for request in [0, 2, 3, u32::MAX] {
        talk.send(&answer(request, run.clone(), (Cursor(1), Check([3; 8])))).await;
    }
    talk.push(Vec::new(), 4).await;
    eventually(alice, &["one", "two", "three"]).await;
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn m8_who_names_another_members_replica_takes_nothing_from_it() {
    let stage = Stage::new().await;
    let Friends { site, alice, bob } = stage.friends;
    let bobs = replica_of(&stage.raw, &stage.bob, &stage.mallory).await;
    // of another person, so that the two replicas cannot be one
    let stranger = other_person(&stage.mallory, Role::Member);
    let mut talk = stage.raw.dial(&stage.alice).await;
    talk.go_live(&stage.mallory, Offer::default()).await;
    talk.push(vec![stranger.0], 1).await;
    drop(talk);
    let thief = Member { replica: bobs, ..stranger.1 };
    let raw = Raw::new().await;
    let mut talk = raw.dial(&stage.alice).await;
    let position = (Cursor(1 << 30), Check([8; 8]));
    talk.go_live(&thief, Offer { position, ..Offer::default() }).await;
    alice.push("while the thief is there").await.expect("pushes");
    bob.push("bob goes on").await.expect("pushes");
    for client in [&alice, &bob] {
        eventually_all(client, &["bob goes on", "while the thief is there"]).await;
    }
    let device = bob.endpoint_id().to_string();
    let status = until(&alice, "bob still known", |status| {
        status.peers.iter().any(|peer| peer.device == device && peer.name == "b" && !peer.addresses.is_empty())
    });
    status.await;
    drop(talk);
    // after a restart of both, alice still finds him
    let group = alice.group();
    let (a, b) = (alice.device(), bob.device());
    drop((alice, bob));
    tokio::join!(a.close(), b.close());
    let (a, b) = (site.open("a").await, site.open("b").await);
    let (alice, bob) = (a.client(group).expect("a client"), b.client(group).expect("a client"));
    Friends { site, alice, bob }.still_sync().await;
}

/// An admission of somebody else as a new person, and that person.
fn other_person(member: &Member, role: Role) -> (Vec<u8>, Member) {
    let author = AuthorSecret::make(&mut rng());
    let consent = consent(&author, [0; 32], None);
    let operation = Operation::Admit { keys: author.keys(), member: author.id().into(), role, invite: None, consent };
    let admission = member.operation(1, EnvelopeHash::NONE, operation);
    let token = [&member.token[..], std::slice::from_ref(&admission)].concat();
    (admission, Member { author, token, replica: ReplicaId(random()), ..member.clone() })
}

async fn replica_of(raw: &Raw, target: &Target, member: &Member) -> ReplicaId {
    let mut talk = raw.dial(target).await;
    let hello = member.hello(&talk.binding);
    talk.send(&hello).await;
    talk.recv_until(|frame| match frame {
        Frame::Hello { replica, .. } => Some(replica),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_who_claims_to_hold_more_of_our_feed_does_not_make_us_start_over_again_and_again() {
    let stage = Stage::new().await;
    let alice = &stage.friends.alice;
    alice.push("mine").await.expect("pushes");
    let mut authors = std::collections::BTreeSet::from([alice.author()]);
    for round in 1..6_u64 {
        let author = alice.author();
        let claim = FeedHave {
            author,
            ranges: vec![Range { first: Number(1), last: Number(1000 * round) }],
            heads: vec![EnvelopeHash(random())],
            fork: None,
            digest: [0; 32],
        };
        let mut talk = stage.raw.dial(&stage.alice).await;
        talk.go_live(&stage.mallory, Offer { have: vec![claim], ..Offer::default() }).await;
        authors.insert(alice.author());
    }
    assert!(authors.len() <= 2, "started over {} times", authors.len() - 1);
    eventually_has(&stage.friends.bob, "mine").await;
    stage.friends.still_sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g9_g15_nobody_gets_in_past_those_who_may_admit() {
    let stage = Stage::new().await;
    let (alice, mallory) = (&stage.friends.alice, &stage.mallory);
    let make = || AuthorSecret::make(&mut rng());
    let member_of = |author: &AuthorSecret| MemberId::from(author.id());
    let admit = |author: &AuthorSecret, member, role| {
        let consent = consent(author, [0; 32], None);
        Operation::Admit { keys: author.keys(), member, role, invite: None, consent }
    };
    let guest =
        |author: &AuthorSecret, token: Vec<Vec<u8>>| Member { author: author.clone(), token, ..mallory.clone() };

    // signed by one who is no member
    let (outsider, friend) = (guest(&make(), Vec::new()), make());
    let by_outsider = outsider.operation(1, EnvelopeHash::NONE, admit(&friend, member_of(&friend), Role::Admin));
    // a succession that its predecessor never signed
    let (heir, bob) = (make(), stage.friends.bob.author());
    let succeed = Operation::Succeed {
        keys: heir.keys(),
        member: mallory.member(),
        predecessor: bob,
        proof: heir.sign(sync_crypto::SignPurpose::Succession, &[b"mine"]),
    };
    let by_heir = guest(&heir, Vec::new()).operation(1, EnvelopeHash::NONE, succeed);
    let mut talk = stage.session(&stage.alice).await;
    let before = refused(alice).await;
    talk.push(vec![by_outsider.clone(), by_heir.clone()], 1).await;
    assert_eq!(refused(alice).await, before + 2);

    // a new person, rightly admitted, who reaches for more than their own place
    let (admission, person) = other_person(mallory, Role::Member);
    let (as_alice, as_admin, as_guest) = (make(), make(), make());
    let first = person.operation(1, EnvelopeHash::NONE, admit(&as_alice, mallory.member(), Role::Member));
    let second = person.operation(2, hash_of(&first), admit(&as_admin, member_of(&as_admin), Role::Admin));
    let third = person.operation(3, hash_of(&second), admit(&as_guest, member_of(&as_guest), Role::Guest));
    // whom a guest admits is nobody
    let by_guest = make();
    let fourth = guest(&as_guest, Vec::new()).operation(
        1,
        EnvelopeHash::NONE,
        admit(&by_guest, member_of(&by_guest), Role::Guest),
    );
    let envelopes = [&admission, &first, &second, &third, &fourth].map(Clone::clone);
    talk.push(envelopes.to_vec(), 2).await;
    let known = |status: &sync_client::Status| status.authors == 5;
    until(alice, "founder, bob, mallory, the person and their guest", known).await;

    let chain = |last: &[Vec<u8>]| [&mallory.token[..], last].concat();
    let intruders = [
        ("admitted by an outsider", guest(&friend, vec![by_outsider])),
        ("successor by their own word", guest(&heir, chain(&[by_heir]))),
        ("put in another person's place", guest(&as_alice, chain(&[admission.clone(), first]))),
        ("admitted above the admitter's role", guest(&as_admin, chain(&[admission.clone(), second]))),
        ("admitted by a guest", guest(&by_guest, chain(&[admission, third, fourth]))),
    ];
    for (what, intruder) in intruders {
        let before = refused(alice).await;
        let raw = Raw::new().await;
        let mut talk = raw.dial(&stage.alice).await;
        let hello = intruder.hello(&talk.binding);
        talk.send(&hello).await;
        assert_eq!(talk.error().await.0, ErrorCode::Refused, "{what}");
        until_refused(alice, before).await;
    }
    assert_eq!(alice.status().await.expect("status").authors, 5);
    let mut talk = stage.raw.dial(&stage.alice).await;
    talk.go_live(&person, Offer::default()).await;
    stage.friends.still_sync().await;
}
