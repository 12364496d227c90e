//! Two instances of Syncthing on loopback, set up by its REST interface, without discovery, relays or NAT.
//!
//! The delay of its file watcher is set to its minimum, one second.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sync_soak::tree::Counts;
use tokio::net::TcpStream;
use tokio::runtime::Handle;

use super::pair::{Pair, Rescan};
use super::table::Tool;
use crate::machine::Usage;

/// How long an instance may take to start or end.
const PATIENCE: Duration = Duration::from_secs(60);

/// The folder's name between both.
const FOLDER: &str = "f";

/// An instance that shares and one that receives.
#[derive(Debug)]
pub(crate) struct Instances {
    sender: Instance,
    receiver: Instance,
}

#[derive(Debug)]
struct Instance {
    child: Child,
    device: String,
    key: String,
    interface: SocketAddr,
    listens: SocketAddr,
}

impl Instances {
    /// Makes and starts them, and tells each of the other.
    pub(crate) fn start(site: &Path) -> Result<Self> {
        let (sender, receiver) = (Instance::start(site.join("a"))?, Instance::start(site.join("b"))?);
        for (instance, other) in [(&sender, &receiver), (&receiver, &sender)] {
            let device = json!({ "deviceID": other.device, "addresses": [format!("tcp://{}", other.listens)] });
            instance.call(Method::PUT, &format!("/rest/config/devices/{}", other.device), Some(&device))?;
        }
        Ok(Self { sender, receiver })
    }
}

impl Pair for Instances {
    fn tool(&self) -> Tool {
        Tool::Syncthing
    }

    fn share(&mut self, source: &Path, target: &Path) -> Result<Option<f64>> {
        for (instance, path) in [(&self.sender, source), (&self.receiver, target)] {
            let devices = [&self.sender, &self.receiver].map(|one| json!({ "deviceID": one.device }));
            let folder = json!({
                "id": FOLDER, "path": path, "type": "sendreceive", "devices": devices,
                "fsWatcherEnabled": true, "fsWatcherDelayS": 1, "rescanIntervalS": 3600,
            });
            instance.call(Method::PUT, &format!("/rest/config/folders/{FOLDER}"), Some(&folder))?;
        }
        Ok(None)
    }

    fn is_settled(&mut self, expected: Counts) -> Result<bool> {
        for instance in [&self.receiver, &self.sender] {
            // it answers with an error until it has taken the folder in
            let Ok(status) = instance.call(Method::GET, &format!("/rest/db/status?folder={FOLDER}"), None) else {
                return Ok(false);
            };
            let number = |field: &str| status.get(field).and_then(Value::as_u64).unwrap_or(u64::MAX);
            let idle = status.get("state").and_then(Value::as_str) == Some("idle");
            if !idle || number("needTotalItems") != 0 || number("globalFiles") != expected.files {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn received_bytes(&mut self) -> Result<u64> {
        let connections = self.receiver.call(Method::GET, "/rest/system/connections", None)?;
        let total = connections.pointer("/total/inBytesTotal").and_then(Value::as_u64);
        total.context("Syncthing does not say what it received")
    }

    fn rescan(&mut self, _: &Path) -> Result<Rescan> {
        let start = Instant::now();
        self.sender.call(Method::POST, &format!("/rest/db/scan?folder={FOLDER}"), None)?;
        Ok(Rescan { seconds: start.elapsed().as_secs_f64(), scan_seconds: None })
    }

    fn usage(&self) -> [Usage; 2] {
        [&self.sender, &self.receiver].map(|instance| Usage::of(instance.child.id()))
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        for instance in [&mut self.sender, &mut self.receiver] {
            instance.call(Method::POST, "/rest/system/shutdown", None)?;
            let deadline = Instant::now() + PATIENCE;
            while instance.child.try_wait()?.is_none() {
                ensure!(Instant::now() < deadline, "Syncthing does not end");
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

impl Instance {
    fn start(home: PathBuf) -> Result<Self> {
        let generated = Command::new("syncthing")
            .args(["generate", "--no-default-folder", "--home"])
            .arg(&home)
            .output()
            .context("cannot start syncthing")?;
        ensure!(generated.status.success(), "syncthing generate: {}", String::from_utf8_lossy(&generated.stderr));
        let (interface, listens) = (free_port()?, free_port()?);
        let config = home.join("config.xml");
        let text = fs::read_to_string(&config)?;
        let device = between(&text, "<device id=\"", "\"")?;
        let key = between(&text, "<apikey>", "</apikey>")?;
        fs::write(&config, quiet(&text, interface, listens)?)?;
        let log = File::create(home.join("log"))?;
        let child = Command::new("syncthing")
            .args(["serve", "--no-browser", "--no-restart", "--no-upgrade", "--home"])
            .arg(&home)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start syncthing")?;
        let mut instance = Self { child, device, key, interface, listens };
        let deadline = Instant::now() + PATIENCE;
        while instance.call(Method::GET, "/rest/system/ping", None).is_err() {
            if let Some(status) = instance.child.try_wait()? {
                bail!("Syncthing ended with {status}");
            }
            ensure!(Instant::now() < deadline, "Syncthing does not answer");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(instance)
    }

    /// One request; null if the answer has no body.
    fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.interface.to_string())
            .header("x-api-key", &self.key)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let (status, bytes) = Handle::current().block_on(async {
            let stream = TcpStream::connect(self.interface).await?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            // its error is told by the request
            let serving = tokio::spawn(connection);
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let bytes = answer.into_body().collect().await?.to_bytes();
            serving.abort();
            anyhow::Ok((status, bytes))
        })?;
        ensure!(status.is_success(), "Syncthing answers {status}: {}", String::from_utf8_lossy(&bytes));
        if bytes.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_slice(&bytes)?) }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // it has ended in order, or an error is told already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The configuration with our addresses, and without what would look beyond this machine.
fn quiet(config: &str, interface: SocketAddr, listens: SocketAddr) -> Result<String> {
    let mut text = config.to_owned();
    let gui = between(&text, "<gui", "</gui>")?;
    let address = between(&gui, "<address>", "</address>")?;
    text = text.replacen(&format!("<address>{address}</address>"), &format!("<address>{interface}</address>"), 1);
    let set = |text: String, option: &str, value: &str| -> Result<String> {
        let (open, close) = (format!("<{option}>"), format!("</{option}>"));
        let old = between(&text, &open, &close)?;
        Ok(text.replace(&format!("{open}{old}{close}"), &format!("{open}{value}{close}")))
    };
    text = set(text, "listenAddress", &format!("tcp://{listens}"))?;
    text = set(text, "autoUpgradeIntervalH", "0")?;
    // decided, so that nothing is sent
    text = set(text, "urAccepted", "-1")?;
    for option in [
        "globalAnnounceEnabled",
        "localAnnounceEnabled",
        "relaysEnabled",
        "natEnabled",
        "crashReportingEnabled",
        "startBrowser",
    ] {
        text = set(text, option, "false")?;
    }
    Ok(text)
}

/// What stands between two marks, the first time.
fn between(text: &str, open: &str, close: &str) -> Result<String> {
    let rest = text.split_once(open).with_context(|| format!("Syncthing's configuration has no {open}"))?.1;
    Ok(rest.split_once(close).with_context(|| format!("Syncthing's configuration has no {close}"))?.0.to_owned())
}

fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_keeps_its_devices_and_looks_at_nothing_beyond_this_machine() {
        let options = [
            "globalAnnounceEnabled",
            "localAnnounceEnabled",
            "relaysEnabled",
            "natEnabled",
            "crashReportingEnabled",
            "startBrowser",
        ];
        let options: String = options.map(|option| format!("<{option}>true</{option}>")).concat();
        let config = format!(
            "<device id=\"AB\"><address>dynamic</address></device><gui enabled=\"true\"><address>127.0.0.1:8384</address>\
             </gui><options><listenAddress>default</listenAddress>{options}<autoUpgradeIntervalH>12</autoUpgradeIntervalH>\
             <urAccepted>0</urAccepted></options>"
        );
        let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let text = quiet(&config, address(1), address(2)).expect("a configuration");
        assert!(
            text.contains("<address>dynamic</address>") && text.contains("<address>127.0.0.1:1</address>"),
            "{text}"
        );
        assert!(text.contains("<listenAddress>tcp://127.0.0.1:2</listenAddress>"), "{text}");
        assert!(!text.contains("<globalAnnounceEnabled>true") && !text.contains("Enabled>true"), "{text}");
        assert!(quiet("<gui></gui>", address(1), address(2)).is_err());
    }
}
