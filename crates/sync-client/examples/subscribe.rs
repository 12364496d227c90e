//! Two devices pair by code; one follows what the other pushes by events, and misses nothing.
//!
//! `cargo run -p sync-client --example subscribe`

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::{Bind, Config, Cursor, Device, Event, Network, SyncClient};

const TEXTS: [&str; 3] = ["bread", "milk", "eggs"];

type AnyError = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let laptop = open(dir.path(), "laptop").await?;
    let phone = open(dir.path(), "phone").await?;

    let group = laptop.create_group().await?;
    let invite = laptop.invite(group, Duration::from_secs(600)).await?;
    println!("laptop shows the code {}", invite.code);
    let follower = tokio::spawn(follow(laptop.client(group)?));

    let client = phone.join(&invite.code, |step| println!("phone: {step:?}")).await?;
    for text in TEXTS {
        let pushed = client.push(text).await?;
        let holders = client.handed_to(pushed.cursor, Duration::from_secs(30)).await;
        println!("phone pushed {text}, and {} has it", holders.join(", "));
    }
    phone.close().await;

    let texts = tokio::time::timeout(Duration::from_secs(30), follower).await???;
    assert_eq!(texts, TEXTS);
    laptop.close().await;
    Ok(())
}

/// Reads until the other device is gone and everything it pushed is here.
async fn follow(client: SyncClient) -> Result<Vec<String>, AnyError> {
    // subscribe first and pull then: what arrives between the two is in both, and nothing falls between
    let mut events = client.subscribe();
    let mut texts = Vec::new();
    let mut seen = read(&client, Cursor(0), &mut texts).await?;
    while let Some(event) = events.next().await {
        match event {
            Event::Joined { name, .. } => println!("laptop: {name} joined"),
            Event::Connected { name, pending, .. } => println!("laptop: connected to {name}, {pending} to hand over"),
            // an event says that there is something to pull; pulling says what, however many events were missed
            Event::BlobAvailable { .. } | Event::Lagged { .. } => seen = read(&client, seen, &mut texts).await?,
            Event::Error { code, message } => println!("laptop: {code}: {message}"),
            Event::Disconnected { name, .. } => {
                println!("laptop: {name} is gone");
                if texts.len() == TEXTS.len() {
                    break;
                }
            }
            // a later version may tell more
            _ => {}
        }
    }
    Ok(texts)
}

async fn read(client: &SyncClient, mut after: Cursor, texts: &mut Vec<String>) -> Result<Cursor, AnyError> {
    loop {
        let page = client.pull(after, sync_client::DEFAULT_LIMIT).await?;
        for blob in page.blobs {
            let text = String::from_utf8_lossy(&blob.bytes).into_owned();
            println!("laptop: {text} from {} at cursor {}", blob.sender.short(), blob.cursor.0);
            texts.push(text);
        }
        after = page.max_cursor;
        if !page.has_more {
            return Ok(after);
        }
    }
}

async fn open(dir: &Path, name: &str) -> Result<Device, AnyError> {
    let store = Some(KeyStoreKind::File);
    let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
    Home::create(dir.join(name), name, store, &PassphraseSource::none(), &mut rng)?;
    // both in one runtime directory, where they find the code and each other
    let runtime_dir = Some(dir.join("run"));
    let network = Network { bind: Bind::Loopback, mdns: false, lan: false, runtime_dir, ..Network::default() };
    Ok(Device::open(Config { network, ..Config::new(dir.join(name)) }).await?)
}
