//! What an operator asks of a relay that runs: its numbers, and whether devices reach it.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use sync_link::relay::meeting::get;
use sync_link::relay::{RelayError, RelayUrl, RelayUrlError, connect};

use crate::data::{self, DataError};

/// Bytes of a frame, none of which is expected.
const NO_FRAME: usize = 1024;
/// Time for the last words on a channel.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Why an operator gets no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperateError {
    /// Its directory says nothing.
    #[error(transparent)]
    Data(#[from] DataError),
    /// What its directory says, or the operator, is no address.
    #[error(transparent)]
    Url(#[from] RelayUrlError),
    /// Nobody answers as a relay.
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// The numbers of the relay that runs on a directory, one a line, each with what it counts.
pub async fn stats(data: &Path) -> Result<String, OperateError> {
    let text = get(&running(data)?, "/metrics").await?;
    Ok(table(&String::from_utf8_lossy(&text)))
}

/// Whether a relay answers at an address, as devices use it; unless named, at the one that it printed.
///
/// Tells each step in words, and goes as far as the first one that fails.
pub async fn check(data: &Path, address: Option<&str>, mut tell: impl FnMut(&str)) -> Result<(), OperateError> {
    let url = match address {
        Some(address) => address.parse()?,
        None => running(data)?,
    };
    tell(&format!("checking {}", url.without_token()));
    get(&url, "/health").await?;
    tell("ok: it answers, and its database works");
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).expect("BUG: the system has no random numbers");
    let mut connection = connect(&url, &secret, NO_FRAME).await?;
    tell(if url.has_key() {
        "ok: it has proven its key on a channel"
    } else {
        "ok: it opens channels; no key was checked"
    });
    // it may be faster
    let _ = tokio::time::timeout(CLOSE_WAIT, connection.sender.close()).await;
    Ok(())
}

/// The address of the relay that runs on a directory.
fn running(data: &Path) -> Result<RelayUrl, OperateError> {
    Ok(data::read_address(data)?.parse()?)
}

/// What Prometheus reads, for people.
fn table(metrics: &str) -> String {
    let mut rows: Vec<(String, &str, &str)> = Vec::new();
    let mut help = "";
    for line in metrics.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = text.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((name, value)) = line.rsplit_once(' ').filter(|_| !line.starts_with('#')) {
            let name = name.strip_prefix("syncrelay_").unwrap_or(name).replace("{", " ").replace(['}', '"'], "");
            rows.push((name, value, help));
        }
    }
    let widest = |of: fn(&(String, &str, &str)) -> usize| rows.iter().map(of).max().unwrap_or(0);
    let (names, values) = (widest(|row| row.0.len()), widest(|row| row.1.len()));
    let mut text = String::new();
    for (name, value, help) in &rows {
        // writing to a string cannot fail
        let _ = writeln!(text, "{name:names$}  {value:>values$}  {help}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_below_each_other_with_what_they_count() {
        let metrics = "# HELP syncrelay_groups Groups.\n# TYPE syncrelay_groups gauge\nsyncrelay_groups 12\n\
            # HELP syncrelay_bytes_total Bytes.\nsyncrelay_bytes_total{direction=\"sent\"} 3\n";
        let expected = "groups                      12  Groups.\nbytes_total direction=sent   3  Bytes.\n";
        assert_eq!(table(metrics), expected);
    }
}
