//! What a relay gets to see in a real run: all that comes to it, all it keeps and all it logs.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sync_client::InviteOutcome;
use sync_crypto::{Code, InviteKeys};
use sync_link::relay::meeting::Meeting;
use sync_link::rendezvous::LookupId;

use crate::site::{PATIENCE, RelayProcess, Site, device_name, until_handed_over, until_has};

/// Stands before a relay and keeps all that is sent to it.
struct Recorder {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Recorder {
    fn before(relay: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, heard) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<u8>>>::default());
        let hears = heard.clone();
        // ends with the test's process
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let Ok(relay) = TcpStream::connect(relay) else { continue };
                let (from, to) = (socket.try_clone().unwrap(), relay.try_clone().unwrap());
                let hears = hears.clone();
                std::thread::spawn(move || copy(from, to, Some(&hears)));
                std::thread::spawn(move || copy(relay, socket, None));
            }
        });
        Self { address, heard }
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, hears: Option<&Mutex<Vec<u8>>>) {
    let mut buffer = [0; 1 << 16];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        if let Some(hears) = hears {
            hears.lock().unwrap().extend(&buffer[..got]);
        }
        if to.write_all(&buffer[..got]).is_err() {
            break;
        }
    }
    // the other end may have gone
    let _ = to.shutdown(std::net::Shutdown::Write);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_code_and_all_that_follows_a_relay_sees_no_name_content_address_device_or_secret() {
    let site = Site::new();
    let relay = RelayProcess::start(&site, "relay", "");
    let recorder = Recorder::before(relay.address());
    let url = format!("ws://{}/#{}", recorder.address, relay.url.split_once('#').unwrap().1);
    let (a, b) = (site.open("anna").await, site.open("ben").await);
    let group = a.create_group().await.unwrap();
    a.add_relay(&url, None).await.unwrap();
    let anna = a.client(group).unwrap();
    anna.push("a very secret shopping list").await.unwrap();
    let mut invite = a.invite(group, Duration::from_secs(600)).await.unwrap();
    let code = Code::parse(&invite.code).unwrap();
    let keys = InviteKeys::derive(&code).unwrap();
    let place = LookupId(keys.lookup_id().0);
    // so that the join goes through the relay as well
    Meeting::new(&relay.url.parse().unwrap(), place).fetch(None).await.unwrap();
    let ben = b.join_at(&invite.code, std::slice::from_ref(&url), |_| {}).await.unwrap();
    let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.unwrap();
    assert!(matches!(outcome, InviteOutcome::Joined { .. }));
    until_has(&ben, "a very secret shopping list").await;
    until_handed_over(&anna).await;
    let (devices, authors) = ([a.device_id().0, b.device_id().0], [anna.author().0, ben.author().0]);
    drop((anna, ben));
    a.close().await;
    b.close().await;

    let seen = [recorder.heard.lock().unwrap().clone(), relay.stored(), relay.logged()];
    let has = |bytes: &[u8]| seen.iter().position(|seen| seen.windows(bytes.len()).any(|window| window == bytes));
    assert_eq!(has(place.to_hex().as_bytes()), Some(0), "what it must see is there, so the search finds what is");
    assert!(authors.iter().all(|author| has(author) == Some(1)));
    assert!(has(b"relay runs") == Some(2));
    let mut secrets: Vec<Vec<u8>> =
        [&b"shopping"[..], b"of-the-household", &keys.expose_prk()[..], &code.secret_bytes()]
            .map(<[u8]>::to_vec)
            .into();
    secrets.extend([invite.code.clone(), invite.code.replace('-', ""), device_name("anna")].map(String::into_bytes));
    for device in devices {
        secrets.extend([device.to_vec(), data_encoding::HEXLOWER.encode(&device).into_bytes()]);
    }
    for home in ["anna", "ben"] {
        secrets.push(std::fs::read(site.path(home).join("key")).unwrap());
    }
    for secret in secrets {
        assert_eq!(has(&secret), None, "{}", String::from_utf8_lossy(&secret));
    }
    // the only addresses are those of the relay itself, which every request names
    let own = [recorder.address.to_string(), relay.address().to_string()];
    for seen in &seen {
        let text = String::from_utf8_lossy(seen);
        for (at, _) in text.match_indices("127.0.0.1:") {
            assert!(own.iter().any(|own| text[at..].starts_with(own)), "{:?}", text.get(at..at + 20));
        }
    }
}
