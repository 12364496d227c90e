//! Makes two homes whose group has entries at a relay, and prints one member's keys and what its home holds as JSON.
//!
//! `cargo xtask interop` gives that to an implementation of the protocol in another language.
//! The homes are those of this check alone; a home's keys belong nowhere else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use data_encoding::HEXLOWER;
use rand_core::UnwrapErr;
use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::{Bind, Config, Cursor, Device, InviteOutcome, Network, SyncClient};
use sync_store::{Limits, Store};
use sync_types::{Envelope, Scope};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(20);

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(dir), Some(url), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        bail!("usage: interop_member DIRECTORY RELAY");
    };
    let (dir, url) = (PathBuf::from(dir), url.into_string().ok().context("the address is not UTF-8")?);
    let (a, b) = (open(&dir.join("a")).await?, open(&dir.join("b")).await?);
    let group = a.create_group().await?;
    a.add_relay(&url, None).await?;
    let mut invite = a.invite(group, 10 * PATIENCE).await?;
    b.join(&invite.link, |_| {}).await?;
    let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.context("nobody joined")?;
    ensure!(matches!(outcome, InviteOutcome::Joined { .. }), "{outcome:?}");
    let clients = [a.client(group)?, b.client(group)?];
    let mut pushed = Vec::new();
    for (client, body) in [(&clients[0], "bread"), (&clients[1], "milk"), (&clients[0], "and honey")] {
        pushed.push((client, client.push(body).await?.cursor));
    }
    for (client, cursor) in pushed {
        until_handed_over(client, cursor).await?;
    }
    drop(clients);
    b.close().await;
    a.close().await;
    println!("{}", member(&dir.join("b")).await?);
    Ok(())
}

/// A device that finds nobody by itself.
async fn open(path: &Path) -> Result<Device> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let passphrase = PassphraseSource::none();
    Home::create(path, &name, Some(KeyStoreKind::File), &passphrase, &mut UnwrapErr(getrandom::SysRng))?;
    let network = Network { bind: Bind::Loopback, mdns: false, lan: false, same_machine: false, ..Network::default() };
    Ok(Device::open(Config { passphrase, network, ..Config::new(path) }).await?)
}

async fn until_handed_over(client: &SyncClient, cursor: Cursor) -> Result<()> {
    let waiting = async {
        loop {
            let status = client.status().await?;
            if status.relays.iter().any(|relay| relay.acknowledged >= cursor.0) {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.context("the relay does not take everything")?
}

/// What the member of a closed home shows and knows.
async fn member(path: &Path) -> Result<serde_json::Value> {
    let home = Home::open(path, &PassphraseSource::none())?;
    let store = Store::open(&home.db_path(), UnwrapErr(getrandom::SysRng))?;
    let mut groups = store.read(|reader| reader.groups()).await?;
    let row = groups.pop().context("the home has no group")?;
    let (id, author) = (row.id, row.author);
    let sealed = store.read(move |reader| reader.secret("author", &author.0)).await?;
    let secret = home.key().open("author", &author.0, &sealed.context("the author has no keys")?)?;
    let token = store.membership(&id)?.token(&author).context("the author is no member")?;
    let limits = Limits { entries: 1000, bytes: 1 << 20 };
    let everything = sync_core::Selection::everything(Scope::All);
    let held = store.read(move |reader| reader.read_after(&id, Cursor(0), limits, &everything, None));
    let mut hashes = Vec::new();
    for carried in held.await?.entries {
        hashes.push(HEXLOWER.encode(&Envelope::parse(&carried.envelope)?.hash().0));
    }
    store.close().await?;
    Ok(serde_json::json!({
        "charter": HEXLOWER.encode(&row.charter),
        "token": token.iter().map(|link| HEXLOWER.encode(link)).collect::<Vec<_>>(),
        "sign": HEXLOWER.encode(&secret[..32]),
        "noise": HEXLOWER.encode(&secret[32..64]),
        "entries": hashes,
    }))
}
