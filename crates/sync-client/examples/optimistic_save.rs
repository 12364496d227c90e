//! Saving without waiting: the app shows a change at once, and stores and hands it over behind its own back.
//!
//! - The app names each change by a blob id before it pushes; pushing again under that id stores nothing twice.
//! - Until the push has returned, the app keeps the draft; then the change is durable, whatever the network does.
//! - Nothing shown to the user waits for another device; that one has it is only told.
//!
//! `cargo run -p sync-client --example optimistic_save`

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::{Bind, BlobId, Config, Cursor, Device, Network, SyncClient};
use tokio::sync::mpsc;

/// What the app shows beside a note.
enum Saved {
    /// Durable on this device.
    Here,
    /// On another device too.
    On(String),
    /// Kept as a draft, with what to tell the user.
    NotYet { code: &'static str, advice: String },
}

impl fmt::Display for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here => f.write_str("saved here"),
            Self::On(device) => write!(f, "saved here and on {device}"),
            Self::NotYet { code, advice } => write!(f, "not saved ({code}): {advice}"),
        }
    }
}

/// An app with notes; its own state is what the user sees.
struct Notes {
    client: SyncClient,
    notes: Vec<(BlobId, String)>,
    progress: mpsc::Sender<(BlobId, Saved)>,
}

impl Notes {
    /// Shows a note and returns; saving goes on by itself.
    fn save(&mut self, text: &str) -> Result<BlobId, Box<dyn Error>> {
        let mut id = BlobId([0; BlobId::LEN]);
        getrandom::fill(&mut id.0)?;
        self.notes.push((id, text.to_owned()));
        self.push(id, text);
        Ok(id)
    }

    /// Pushes a note; safe to call again, as after a failure or a crash of the app.
    fn push(&self, id: BlobId, text: &str) {
        let (client, progress, text) = (self.client.clone(), self.progress.clone(), text.to_owned());
        tokio::spawn(async move {
            let pushed = match client.push_as(id, text).await {
                Ok(pushed) => pushed,
                Err(error) => {
                    let failed = Saved::NotYet { code: error.code(), advice: error.to_string() };
                    let _ = progress.send((id, failed)).await;
                    return;
                }
            };
            let _ = progress.send((id, Saved::Here)).await;
            let holders = client.handed_to(pushed.cursor, Duration::from_secs(30)).await;
            if let Some(holder) = holders.into_iter().next() {
                let _ = progress.send((id, Saved::On(holder))).await;
            }
        });
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let laptop = open(dir.path(), "laptop").await?;
    let group = laptop.create_group().await?;
    let (progress, mut saved) = mpsc::channel(16);
    let mut app = Notes { client: laptop.client(group)?, notes: Vec::new(), progress };

    let milk = app.save("buy milk")?;
    println!("shown: {}", app.notes[0].1);
    println!("then: {}, with no other device in sight", wait(&mut saved, milk).await?);

    // the app crashed before it heard, and pushes its draft again
    let first = app.client.pull(Cursor(0), 10).await?.blobs.len();
    let again = app.client.push_as(milk, "buy milk").await?;
    let second = app.client.pull(Cursor(0), 10).await?.blobs.len();
    assert_eq!(first, second);
    println!("pushed again: still {second} blob, at cursor {}", again.cursor.0);

    let novel = app.save(&"a".repeat(sync_client::MAX_APP_BYTES + 1))?;
    println!("a novel: {}", wait(&mut saved, novel).await?);
    println!("the app still has its {} bytes", app.notes[1].1.len());

    let phone = open(dir.path(), "phone").await?;
    let invite = laptop.invite(group, Duration::from_secs(600)).await?;
    phone.join(&invite.code, |_| {}).await?;
    println!("phone joins: {}", wait(&mut saved, milk).await?);
    println!("the group is {:?}", app.client.status().await?.state);

    phone.close().await;
    laptop.close().await;
    Ok(())
}

/// What becomes of a note next.
async fn wait(saved: &mut mpsc::Receiver<(BlobId, Saved)>, note: BlobId) -> Result<Saved, Box<dyn Error>> {
    let next = async {
        while let Some((id, state)) = saved.recv().await {
            if id == note {
                return Some(state);
            }
        }
        None
    };
    let state = tokio::time::timeout(Duration::from_secs(30), next).await?;
    state.ok_or_else(|| "the app has ended".into())
}

async fn open(dir: &Path, name: &str) -> Result<Device, Box<dyn Error>> {
    let store = Some(KeyStoreKind::File);
    let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
    Home::create(dir.join(name), name, store, &PassphraseSource::none(), &mut rng)?;
    let runtime_dir = Some(dir.join("run"));
    let network = Network { bind: Bind::Loopback, mdns: false, lan: false, runtime_dir, ..Network::default() };
    Ok(Device::open(Config { network, ..Config::new(dir.join(name)) }).await?)
}
