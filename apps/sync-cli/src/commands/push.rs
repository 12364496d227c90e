//! `syncshell push`: puts a blob into the group's log.

use std::io::Read as _;
use std::time::Duration;

use getrandom::SysRng;
use rand_core::{Rng as _, UnwrapErr};
use serde::Serialize;
use sync_types::BlobId;
use sync_types::bounds::MAX_APP_BYTES;

use crate::api::Pushed;
use crate::api::server::too_large;
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal;

/// Store a text or a file's bytes in the group, and hand it to whoever can be reached
///
/// Succeeds as soon as it is stored durably here, whatever the network does.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The text, or - for the exact bytes of standard input, at most 1 MiB
    #[arg(allow_hyphen_values = true)]
    what: String,

    /// How long to wait until another device has it, 0 for not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    wait: u32,

    /// Name it by 32 hex digits of your own: pushing the same again then stores nothing new
    #[arg(long, value_name = "HEX")]
    blob_id: Option<BlobId>,
}

#[derive(Serialize)]
struct Report<'a> {
    state: &'static str,
    #[serde(flatten)]
    pushed: &'a Pushed,
    #[serde(skip_serializing_if = "Option::is_none")]
    holders: Option<&'a [String]>,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let bytes = stop.or(self.bytes()).await?;
        let blob_id = self.blob_id.unwrap_or_else(draw_blob_id).to_string();
        let mode = if self.wait == 0 { Mode::Offline } else { Mode::Online };
        let backend = stop.or(Backend::open(global, mode)).await?;
        let wait = Duration::from_secs(self.wait.into());
        let result = push(&backend, global.group(), &blob_id, bytes, out).await;
        let result = match result {
            Ok(pushed) if !wait.is_zero() => tokio::select! {
                result = hand_over(&backend, global.group(), &pushed, wait, out) => result,
                // it is durable, so nothing that happens from here on is a failure
                () = stop.requested() => Ok(()),
            },
            other => other.map(drop),
        };
        backend.close().await;
        result
    }

    async fn bytes(&self) -> Result<Vec<u8>, Failure> {
        let bytes = if self.what == "-" {
            let read = tokio::task::spawn_blocking(|| {
                let mut bytes = Vec::new();
                // one more shows that it is too much; the rest is nobody's business
                let limit = u64::try_from(MAX_APP_BYTES + 1).unwrap_or(u64::MAX);
                std::io::stdin().lock().take(limit).read_to_end(&mut bytes).map(|_| bytes)
            });
            read.await
                .map_err(|error| Failure::new("io", error.to_string()))?
                .map_err(Failure::io("cannot read standard input"))?
        } else {
            self.what.clone().into_bytes()
        };
        if bytes.len() > MAX_APP_BYTES { Err(too_large()) } else { Ok(bytes) }
    }
}

async fn push(backend: &Backend, group: &str, blob_id: &str, bytes: Vec<u8>, out: Output) -> Result<Pushed, Failure> {
    let pushed = backend.push(group, blob_id, bytes).await.map_err(|failure| match &*failure.code {
        "interrupted" | "closed" => {
            let advice = format!("; it may be stored: repeat the push with `--blob-id {blob_id}`");
            Failure { message: failure.message + &advice, ..failure }
        }
        _ => failure,
    })?;
    let stored = format!("stored at cursor {} as {}", pushed.cursor, pushed.blob_id);
    out.result(stored, &Report { state: "stored", pushed: &pushed, holders: None })?;
    Ok(pushed)
}

/// Waits until someone else has what was stored, and says who.
async fn hand_over(
    backend: &Backend,
    group: &str,
    pushed: &Pushed,
    wait: Duration,
    out: Output,
) -> Result<(), Failure> {
    let holders = match backend.handed(group, pushed.cursor, wait).await {
        Ok(handed) => handed.holders,
        Err(failure) => {
            out.warn(format!("it is stored, and who else has it is not known: {failure}"));
            return Ok(());
        }
    };
    let report = Report { state: "handed-over", pushed, holders: Some(&holders) };
    if holders.is_empty() {
        let waiting = "nobody else has it yet; it goes out when another device is reached while this home is open";
        out.result(waiting, &Report { state: "waiting", ..report })
    } else {
        let names: Vec<_> = holders.iter().map(|name| terminal::clean(name)).collect();
        out.result(format!("handed over to {}", names.join(", ")), &report)
    }
}

/// Draws a blob id.
pub(crate) fn draw_blob_id() -> BlobId {
    let mut id = BlobId([0; BlobId::LEN]);
    UnwrapErr(SysRng).fill_bytes(&mut id.0);
    id
}
