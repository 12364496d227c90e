//! Attacks on pairing: guesses, replays, impostors on both sides, races, crashes, and what the logs let slip.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sync_client::{Config, Device, JoinProgress, Network, SyncClient};
use sync_crypto::{AuthorSecret, Code, InviteKeys, seal_grant};
use sync_link::iroh_link::Connection;
use sync_types::bounds::MAX_FRAME;
use sync_types::{
    AuthorKeys, Consent, DeviceId, Envelope, EnvelopeHash, ErrorCode, Frame, Grant, InviteId, Operation, ReplicaId,
    Role, Ticket,
};
use tracing_subscriber::fmt::MakeWriter;

use crate::site::*;

#[tokio::test(flavor = "multi_thread")]
async fn p1_guesses_and_joins_without_the_code_are_refused_alike_and_counted() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let target = Target::of_link(&invite.link, alice.group());
    let author = AuthorSecret::make(&mut rng());
    let code_keys = keys_of(&invite.code).await;
    let cases = [
        "an invite that was never made",
        "proof by another code",
        "no invite proof",
        "no author proof",
        "proofs swapped",
        "another author's key",
        "weak keys",
    ];
    for what in cases {
        let before = refused(&alice).await;
        let raw = Raw::new().await;
        let asking = raw.ask(&target, code_keys.clone()).await;
        let mut join = asking.join(&author);
        let Frame::Join { invite: named, keys, invite_proof, author_proof, .. } = &mut join else { unreachable!() };
        match what {
            "an invite that was never made" => *named = InviteId(random()),
            "proof by another code" => {
                *invite_proof = InviteKeys::from_prk([9; 32]).prove_join(&asking.talk.binding, &author.keys());
            }
            "no invite proof" => *invite_proof = [0; 64],
            "no author proof" => *author_proof = [0; 64],
            "proofs swapped" => std::mem::swap(invite_proof, author_proof),
            "another author's key" => *keys = AuthorSecret::make(&mut rng()).keys(),
            _ => *keys = AuthorKeys { noise: [0; 32], ..author.keys() },
        }
        assert_eq!(asking.refused(&join).await, ErrorCode::InviteWrong, "{what}");
        assert_eq!(refused(&alice).await, before + 1, "{what}");
    }
    // what is no JOIN at all
    for bytes in [Frame::Joined.encode(), Vec::new(), random::<99>().to_vec(), vec![0xdd, 0xff, 0xff, 0xff, 0xff]] {
        let before = refused(&alice).await;
        let raw = Raw::new().await;
        let mut talk = raw.ask(&target, code_keys.clone()).await.talk;
        talk.send_bytes(bytes).await;
        assert_eq!(talk.error().await.0, ErrorCode::Protocol);
        assert_eq!(refused(&alice).await, before + 1);
    }
    assert_eq!(alice.status().await.expect("status").authors, 1);
    // the invite was not harmed by any of it
    let bob = b.join(&invite.code, |_| {}).await.expect("joins");
    alice.push("welcome").await.expect("pushes");
    eventually(&bob, &["welcome"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_mistyped_used_expired_or_revoked_each_says_so() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let used = a.invite(alice.group(), LIFETIME).await.expect("invites");
    b.join(&used.code, |_| {}).await.expect("joins");
    let revoked = a.invite(alice.group(), LIFETIME).await.expect("invites");
    a.revoke(&revoked.link).await.expect("revokes");
    let expired = a.invite(alice.group(), Duration::ZERO).await.expect("invites");
    // another secret towards the same device, as a link with a typing error has it
    let mut wrong = Ticket::from_link(&used.link).expect("a link");
    wrong.secret = random();
    let cases = [
        (&used.code, "invite-used"),
        (&used.link, "invite-used"),
        (&revoked.code, "invite-revoked"),
        (&revoked.link, "invite-revoked"),
        (&expired.code, "invite-expired"),
        (&expired.link, "invite-expired"),
        (&wrong.to_link(), "invite-wrong"),
    ];
    for (invite, code) in cases {
        let before = refused(&alice).await;
        let error = c.join(invite, |_| {}).await.expect_err(code);
        assert_eq!(error.code(), code, "{error}");
        // by code the record says so already, by link the inviter does
        let asked = u64::from(invite.starts_with("syncshell:"));
        assert_eq!(refused(&alice).await, before + asked, "{code}");
    }
    assert!(c.groups().is_empty());
    assert_eq!(alice.status().await.expect("status").authors, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn g6_of_two_who_race_for_one_invite_exactly_one_gets_in() {
    let site = Site::new();
    let (a, b, c) = (site.device("a").await, site.device("b").await, site.device("c").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let (one, other) = tokio::join!(b.join(&invite.link, |_| {}), c.join(&invite.link, |_| {}));
    let (joined, error) = match (one, other) {
        (Ok(joined), Err(error)) | (Err(error), Ok(joined)) => (joined, error),
        both => panic!("{both:?}"),
    };
    assert_eq!(error.code(), "invite-used", "{error}");
    assert_eq!(alice.status().await.expect("status").authors, 2);
    assert_eq!(b.groups().len() + c.groups().len(), 1);
    alice.push("welcome").await.expect("pushes");
    eventually(&joined, &["welcome"]).await;
}

/// A device that joins by a link to the raw peer, and the channel on which it asks.
async fn lure(site: &Site, raw: &Raw, secret: [u8; 10]) -> (tokio::task::JoinHandle<(Device, String)>, Talk, Frame) {
    let victim = site.device("victim").await;
    let addresses = raw.endpoint.local_addresses().iter().map(ToString::to_string).collect();
    let link = Ticket { secret, device: DeviceId(raw.endpoint.device_id().0), addresses, relays: vec![] }.to_link();
    let joining = tokio::spawn(async move {
        let error = victim.join(&link, |_| {}).await.expect_err("lured");
        (victim, error.code().to_owned())
    });
    let (talk, join) = caught(raw).await;
    (joining, talk, join)
}

/// The channel of whoever dials next, and what it asks.
async fn caught(raw: &Raw) -> (Talk, Frame) {
    let connection: Connection =
        tokio::time::timeout(PATIENCE, raw.endpoint.accept()).await.expect("in time").expect("the victim dials");
    let binding = connection.export(b"syncshell pair v1", b"").expect("exports");
    let stream = connection.accept_stream(MAX_FRAME).await.expect("a stream");
    let mut talk = Talk { connection, stream, binding };
    let join = talk.recv().await.expect("a frame");
    (talk, join)
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_p11_a_join_caught_by_an_impostor_is_worth_nothing_anywhere_else() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let target = Target::of_link(&invite.link, alice.group());
    let secret = Ticket::from_link(&invite.link).expect("a link").secret;
    // stands in the middle: takes the victim's JOIN and shows it to the inviter on a channel of its own
    let raw = Raw::accepting(&[PAIR_ALPN]).await;
    let (joining, mut talk, caught) = lure(&site, &raw, secret).await;
    for _ in 0..2 {
        let before = refused(&alice).await;
        let asking = raw.ask(&target, InviteKeys::from_prk([9; 32])).await;
        assert_eq!(asking.refused(&caught).await, ErrorCode::InviteWrong);
        assert_eq!(refused(&alice).await, before + 1);
    }
    talk.send(&Frame::Joined).await;
    let (victim, code) = joining.await.expect("ends");
    assert_eq!(code, "invite-forged");
    assert!(victim.groups().is_empty());
    assert_eq!(alice.status().await.expect("status").authors, 1);
    b.join(&invite.code, |_| {}).await.expect("the invite is still open");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_grant_by_one_who_does_not_know_the_code_is_refused_and_leaves_nothing() {
    let site = Site::new();
    let (a, d) = (site.device("a").await, site.device("d").await);
    let alice = founder(&a).await;
    // a true grant, for another channel and another author, is what the impostor has to offer
    let raw = Raw::accepting(&[PAIR_ALPN]).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let target = Target::of_link(&invite.link, alice.group());
    let mut asking = raw.ask(&target, keys_of(&invite.code).await).await;
    let join = asking.join(&AuthorSecret::make(&mut rng()));
    asking.talk.send(&join).await;
    let Some(Frame::Grant(stolen)) = asking.talk.recv().await else { panic!("no grant") };
    let secret: [u8; 10] = random();
    let keys = keys_of(&Code::from_bytes(secret).to_string()).await;

    let forged = |grant: Grant, binding: &[u8; 32], keys: &InviteKeys| {
        let mut grant = grant;
        grant.proof = keys.prove_inviter(binding, &grant.proven_hash());
        Frame::Grant(grant)
    };
    let empty = Grant { charter: Vec::new(), token: Vec::new(), epochs: Vec::new(), ..stolen.clone() };
    let cases = [
        ("a grant replayed", "invite-forged"),
        ("a proof by another code", "invite-forged"),
        // whoever knows the code may still not bring in what does not fit
        ("the code, and epochs of another channel", "invite-forged"),
        ("the code, and a group of nothing", "keys"),
        ("words instead of a grant", "unreachable"),
        ("a HELLO", "invite-forged"),
        ("garbage", "invite-forged"),
    ];
    for (what, expected) in cases {
        let site = Site::new();
        let (joining, mut talk, _) = lure(&site, &raw, secret).await;
        let binding = talk.binding;
        let frame = match what {
            "a grant replayed" => Frame::Grant(stolen.clone()),
            "a proof by another code" => forged(stolen.clone(), &binding, &InviteKeys::from_prk([9; 32])),
            "the code, and epochs of another channel" => forged(stolen.clone(), &binding, &keys),
            "the code, and a group of nothing" => forged(empty.clone(), &binding, &keys),
            "words instead of a grant" => {
                Frame::Error { code: ErrorCode::Unknown(99), text: "\u{1b}[31mbuy this\u{7}".to_owned() }
            }
            _ => Frame::Hello {
                group: alice.group(),
                author: alice.author(),
                replica: ReplicaId([1; 16]),
                token: Vec::new(),
                proof: [0; 64],
            },
        };
        match what {
            "garbage" => talk.send_bytes(random::<400>().to_vec()).await,
            _ => talk.send(&frame).await,
        }
        let (victim, code) = joining.await.expect("ends");
        assert_eq!(code, expected, "{what}");
        assert!(victim.groups().is_empty(), "{what}");
        if what == "the code, and epochs of another channel" {
            victim.close().await;
            assert!(site.open("victim").await.groups().is_empty(), "{what}");
        }
    }
    let own = d.create_group().await.expect("a group");
    assert_eq!(d.groups(), [own]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_admits_the_joiner_under_keys_that_are_not_its_own_is_refused() {
    let site = Site::new();
    let a = site.device("a").await;
    let alice = founder(&a).await;
    let raw = Raw::accepting(&[PAIR_ALPN]).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let mut asking = raw.ask(&Target::of_link(&invite.link, alice.group()), keys_of(&invite.code).await).await;
    let inviter = AuthorSecret::make(&mut rng());
    let join = asking.join(&inviter);
    asking.talk.send(&join).await;
    let Some(Frame::Grant(own)) = asking.talk.recv().await else { panic!("no grant") };
    let member = Member::of(inviter, &own, &asking.talk.binding);
    let secret: [u8; 10] = random();
    let code_keys = keys_of(&Code::from_bytes(secret).to_string()).await;
    for replaced in [true, false] {
        let site = Site::new();
        let victim = site.device("victim").await;
        let addresses = raw.endpoint.local_addresses().iter().map(ToString::to_string).collect();
        let device = DeviceId(raw.endpoint.device_id().0);
        let link = Ticket { secret, device, addresses, relays: vec![] }.to_link();
        let joining = tokio::spawn({
            let victim = victim.clone();
            async move { victim.join(&link, |_| {}).await }
        });
        let (mut talk, join) = caught(&raw).await;
        let Frame::Join { keys: asked, invite, author_proof, .. } = join else { panic!("no JOIN") };
        let kem = if replaced { AuthorSecret::make(&mut rng()).keys().kem } else { asked.kem.clone() };
        let keys = AuthorKeys { kem, ..asked.clone() };
        let consent = Consent { binding: talk.binding, proof: author_proof };
        let (member_id, role, invite) = (member.member(), Role::Admin, Some(invite));
        let admission = Operation::Admit { keys, member: member_id, role, invite, consent };
        let mut token = own.token.clone();
        token.push(member.operation(1, EnvelopeHash::NONE, admission));
        let epochs = member.keys.everything();
        let epochs = seal_grant(&member.group, &talk.binding, &asked.kem, &epochs, &mut rng()).expect("seals");
        let mut grant = Grant { token, epochs, ..own.clone() };
        grant.proof = code_keys.prove_inviter(&talk.binding, &grant.proven_hash());
        talk.send(&Frame::Grant(grant)).await;
        let joined = joining.await.expect("ends");
        assert_eq!(joined.as_ref().err().map(|error| error.code()), replaced.then_some("invite-forged"), "{joined:?}");
        assert_eq!(victim.groups().len(), usize::from(!replaced));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_that_died_before_it_stored_its_grant_gets_the_same_admission_again() {
    let site = Site::new();
    let (a, c) = (site.device("a").await, site.device("c").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let target = Target::of_link(&invite.link, alice.group());
    let author = AuthorSecret::make(&mut rng());
    let raw = Raw::new().await;
    let keys = keys_of(&invite.code).await;
    let mut tokens = Vec::new();
    for _ in 0..3 {
        let mut asking = raw.ask(&target, keys.clone()).await;
        let join = asking.join(&author);
        asking.talk.send(&join).await;
        let Some(Frame::Grant(grant)) = asking.talk.recv().await else { panic!("no grant") };
        // it opens each time, sealed for the channel it came on
        let member = Member::of(author.clone(), &grant, &asking.talk.binding);
        assert!(member.keys.current().is_ok());
        tokens.push(grant.token);
        asking.talk.connection.close(9, "killed");
    }
    assert_eq!(tokens[0], tokens[1]);
    assert_eq!(tokens[0], tokens[2]);
    assert_eq!(Envelope::parse(&tokens[0][0]).expect("an envelope").header.sender, alice.author());
    assert_eq!(alice.status().await.expect("status").authors, 2);
    // it is used for everyone else, also by the true code
    assert_eq!(c.join(&invite.link, |_| {}).await.expect_err("used").code(), "invite-used");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_dropped_at_any_step_can_be_repeated_and_admits_once() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    for stop_at in [JoinProgress::Looking, JoinProgress::Connected] {
        let (stop, mut stopped) = tokio::sync::mpsc::channel(8);
        let progress = move |step: JoinProgress| {
            if step == stop_at {
                let _ = stop.try_send(());
            }
        };
        tokio::select! {
            _ = stopped.recv() => {}
            joined = b.join(&invite.link, progress) => panic!("not stopped: {joined:?}"),
        }
    }
    let bob = b.join(&invite.link, |_| {}).await.expect("joins");
    assert_eq!(alice.status().await.expect("status").authors, 2);
    alice.push("welcome").await.expect("pushes");
    eventually(&bob, &["welcome"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p9_forged_records_do_not_keep_the_real_one_from_being_found() {
    let site = Site::new();
    let (a, b) = (site.device("a").await, site.device("b").await);
    let alice = founder(&a).await;
    // a group of its own, so that what it refuses is counted where we can see it
    let own = founder(&b).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let keys = keys_of(&invite.code).await;
    let place = keys.lookup_id().to_string();
    let dir = site.path("run").join("invites");
    let genuine = || {
        let names = fs::read_dir(&dir).expect("a directory").map(|entry| entry.expect("an entry").path());
        names.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&place)))
    };
    let (path, record) = genuine().map(|path| (path.clone(), fs::read(path).expect("reads"))).next().expect("a record");
    // someone is there first: garbage, the record of another code, and the true one with a bit changed
    fs::remove_file(&path).expect("removes");
    let other = InviteKeys::from_prk([9; 32]).seal_record(&[0; 512], &mut rng());
    let mut changed = record.clone();
    changed[200] ^= 1;
    for (number, forged) in [noise(600), other, changed, vec![0; 616]].into_iter().enumerate() {
        fs::write(dir.join(format!("{place}-1-{number}-0")), forged).expect("writes");
    }
    let before = refused(&own).await;
    let joining = tokio::spawn({
        let (b, code) = (b.clone(), invite.code.clone());
        async move { b.join(&code, |_| {}).await }
    });
    until(&own, "forged ones seen", |status| status.refused >= before + 4).await;
    fs::write(&path, &record).expect("writes");
    let bob = joining.await.expect("ends").expect("joins");
    alice.push("welcome").await.expect("pushes");
    eventually(&bob, &["welcome"]).await;
}

/// Everything that was logged, by anyone in this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panics here").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The ways in which bytes get into a log by mistake.
fn forms(secret: &[u8]) -> Vec<String> {
    let list = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    vec![
        data_encoding::HEXLOWER.encode(secret),
        data_encoding::HEXUPPER.encode(secret),
        data_encoding::BASE64_NOPAD.encode(secret),
        data_encoding::BASE64URL_NOPAD.encode(secret),
        list(&secret[..secret.len().min(10)]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_and_no_content_gets_into_the_log_at_any_level_and_no_name_above_debug() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).expect("the only one of this process");

    let site = Site::new();
    let names = ["quillfeather", "marshbramble"];
    let (a, b) = (site.device(names[0]).await, site.device(names[1]).await);
    let alice = founder(&a).await;
    let invite = a.invite(alice.group(), LIFETIME).await.expect("invites");
    let bob = b.join(&invite.code, |_| {}).await.expect("joins");
    let text = "a sentence that nobody else may read";
    let binary = noise(2000);
    alice.push(text).await.expect("pushes");
    bob.push(binary.clone()).await.expect("pushes");
    eventually_has(&bob, text).await;
    until(&alice, "handed over", |status| status.pending == 0 && status.max_cursor >= 4).await;
    let raw = Raw::new().await;
    let member = raw.join(&alice).await;
    raw.dial(&Target::of(&alice, &bob).await).await.send(&Frame::Joined).await;
    let used = b.join(&invite.code, |_| {}).await.expect_err("used");
    assert_eq!(used.code(), "invite-used");
    let keys = keys_of(&invite.code).await;
    let homes: Vec<Vec<u8>> =
        names.iter().map(|name| fs::read(site.path(name).join("key")).expect("a key file")).collect();
    let (epoch, epoch_secret) = member.keys.everything().remove(0);
    assert_eq!(epoch.number, 1);
    a.close().await;
    b.close().await;

    let logged = String::from_utf8_lossy(&log.0.lock().expect("nobody panics here")).into_owned();
    assert!(logged.lines().count() > 100, "the log was captured");
    assert!(logged.contains("TRACE"), "down to the last level");
    let plain = invite.code.replace('-', "");
    let mut forbidden: Vec<(&str, String)> = vec![
        ("code", invite.code.clone()),
        ("code without hyphens", plain.clone()),
        ("code in lower case", plain.to_lowercase()),
        ("link", invite.link.clone()),
        ("link without its scheme", invite.link.split_once('#').expect("a fragment").1.to_owned()),
        ("blob", text.to_owned()),
        ("a part of the blob", text[5..20].to_owned()),
    ];
    let secret = Ticket::from_link(&invite.link).expect("a link").secret;
    let derived = epoch_secret.derive_keys();
    let secrets: [(&str, &[u8]); 7] = [
        ("code's bytes", &secret),
        ("derived from the code", keys.expose_prk()),
        ("binary blob", &binary[..24]),
        ("epoch secret", epoch_secret.expose_bytes()),
        ("entry key", derived.entry.expose_bytes()),
        ("rendezvous secret", derived.rendezvous.expose_bytes()),
        ("blob's bytes", text.as_bytes()),
    ];
    for (what, bytes) in secrets {
        forbidden.extend(forms(bytes).into_iter().map(|form| (what, form)));
    }
    for home in &homes {
        let hex = String::from_utf8_lossy(home).trim().to_owned();
        let bytes = data_encoding::HEXLOWER.decode(hex.as_bytes()).expect("a key in hex");
        forbidden.extend(forms(&bytes).into_iter().map(|form| ("home key", form)));
    }
    for (what, form) in forbidden {
        let line = logged.lines().find(|line| line.contains(&form));
        assert!(line.is_none(), "{what} is in the log: {line:?}");
    }
    let path = site.path("").to_string_lossy().into_owned();
    for line in logged.lines().filter(|line| [" INFO ", " WARN ", "ERROR "].iter().any(|level| line.contains(level))) {
        assert!(!names.iter().any(|name| line.contains(name)) && !line.contains(path.trim_end_matches('/')), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_network_there_is_no_invite_and_no_join() {
    let site = Site::new();
    site.init("a");
    let network = Network { online: false, ..Network::default() };
    let client = SyncClient::new(Config { network, ..site.config("a") }).await.expect("opens");
    let device = client.device();
    assert_eq!(device.invite(client.group(), LIFETIME).await.expect_err("offline").code(), "offline");
    assert_eq!(device.join("0000-0000-0000-0000", |_| {}).await.expect_err("offline").code(), "offline");
    client.push("waits").await.expect("pushes");
    assert_eq!(client.status().await.expect("status").pending, 1);
}
