//! A relay's process.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use sync_link::relay::RelayUrl;
use sync_link::relay::meeting::get;

/// Limits that nothing here reaches.
const SETTINGS: &str = "[limits]
connections = 100000
connections_per_address = 100000
silence_seconds = 3600
messages_per_minute = 4294967295
group_bytes = 1099511627776
groups = 100000
database_bytes = 1099511627776
";

/// A relay that ends with this value.
pub(super) struct Relay {
    child: Child,
    pub(super) url: RelayUrl,
}

impl Drop for Relay {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Relay {
    /// Starts the one that lies beside this program, on a new database.
    pub(super) fn start(dir: &Path, tls: bool) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let program = program.with_file_name(format!("sync-relay{}", std::env::consts::EXE_SUFFIX));
        let settings = dir.join("relay.toml");
        fs::write(&settings, format!("plain = {}\n{SETTINGS}", !tls)).context("cannot write the relay's settings")?;
        let log = dir.join("log");
        let mut child = Command::new(&program)
            .args(["--bind", "127.0.0.1:0", "--data"])
            .arg(dir.join("data"))
            .arg("--config")
            .arg(settings)
            .stdout(Stdio::piped())
            .stderr(File::create(&log).context("cannot write the relay's log")?)
            .spawn()
            .with_context(|| format!("cannot start {}; build it as this program was built", program.display()))?;
        let said = child.stdout.take().context("the relay has no output")?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line).context("the relay says no address")?;
        ensure!(!line.is_empty(), "the relay ended: {}", fs::read_to_string(log).unwrap_or_default());
        let url = line.trim().parse();
        Ok(Self { child, url: url.context("the relay's address cannot be read")? })
    }

    /// KiB that it has in memory; NaN where the system does not tell.
    pub(super) fn memory_kib(&self) -> Result<f64> {
        resident_kib(self.child.id())
    }

    /// Connections that it holds.
    pub(super) async fn connections(&self) -> Result<u64> {
        let text = get(&self.url, "/metrics").await.context("the relay shows no numbers")?;
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find_map(|line| line.strip_prefix("syncrelay_connections_active "));
        line.context("the relay does not count connections")?.parse().context("no number")
    }
}

/// KiB that a process has in memory; NaN where the system does not tell.
pub(super) fn resident_kib(process: u32) -> Result<f64> {
    let Ok(status) = fs::read_to_string(format!("/proc/{process}/status")) else { return Ok(f64::NAN) };
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a process without memory")?;
    line.trim().trim_end_matches("kB").trim().parse().context("no number")
}
