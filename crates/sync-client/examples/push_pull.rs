//! Pushes blobs, pulls them page by page, and goes on after a restart.
//!
//! `cargo run -p sync-client --example push_pull`

use std::error::Error;
use std::path::Path;

use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::{Bind, Config, Cursor, Network, SyncClient};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    make_home(dir.path())?;

    // makes a group, as the home has none
    let client = SyncClient::new(config(dir.path())).await?;
    println!("device {} in group {}", client.endpoint_id().short(), client.group().short());

    let bread = client.push("bread").await?;
    println!("pushed bread: durable at cursor {}", bread.cursor.0);
    let more = client.push_many(vec![b"milk".to_vec(), b"eggs".to_vec(), b"salt".to_vec()]).await?;
    println!("pushed {} more in one step", more.len());

    // an app keeps this cursor beside what it made of the blobs, in one transaction of its own
    let seen = pull_all(&client, Cursor(0)).await?;
    client.device().close().await;

    let client = SyncClient::new(config(dir.path())).await?;
    println!("opened again: the last cursor is still {}", client.last_cursor().0);
    client.push("butter").await?;
    let after = pull_all(&client, seen).await?;
    assert!(after > seen, "what was pushed since is there");
    client.device().close().await;
    Ok(())
}

/// Pulls what is stored after a cursor, two blobs at a time, and returns where to go on.
async fn pull_all(client: &SyncClient, mut after: Cursor) -> Result<Cursor, Box<dyn Error>> {
    loop {
        let page = client.pull(after, 2).await?;
        for blob in &page.blobs {
            println!("pulled {} at cursor {}", String::from_utf8_lossy(&blob.bytes), blob.cursor.0);
        }
        // not the last blob's cursor: entries that are no blobs have cursors too
        after = page.max_cursor;
        if !page.has_more {
            return Ok(after);
        }
    }
}

fn make_home(dir: &Path) -> Result<(), Box<dyn Error>> {
    // an app takes the default store, the keychain; a key in a plain file suits a home that is thrown away
    let store = Some(KeyStoreKind::File);
    let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
    Home::create(dir.join("laptop"), "laptop", store, &PassphraseSource::none(), &mut rng)?;
    Ok(())
}

fn config(dir: &Path) -> Config {
    let runtime_dir = Some(dir.join("run"));
    let network = Network { bind: Bind::Loopback, mdns: false, lan: false, runtime_dir, ..Network::default() };
    Config { network, ..Config::new(dir.join("laptop")) }
}
