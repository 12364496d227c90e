//! Relays as processes, and devices in throw-away homes that can meet nowhere else.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sync_client::home::{Home, KeyStoreKind, PassphraseSource};
use sync_client::{Bind, Config, Cursor, Device, InviteOutcome, Network, Status, SyncClient};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(20);
const LIFETIME: Duration = Duration::from_secs(600);

/// A relay's process.
pub(crate) struct RelayProcess {
    child: Child,
    data: PathBuf,
    config: PathBuf,
    pub(crate) url: String,
}

impl RelayProcess {
    /// Starts one with these settings in a directory of its own.
    pub(crate) fn start(site: &Site, name: &str, settings: &str) -> Self {
        let (data, config) = (site.path(name), site.path(&format!("{name}.toml")));
        std::fs::write(&config, settings).unwrap();
        let (child, url) = spawn(&data, &config, "127.0.0.1:0", &[]);
        Self { child, data, config, url }
    }

    /// Starts one whose directory is a disk of a few mebibytes; none where that cannot be made.
    pub(crate) fn start_on_small_disk(site: &Site, name: &str, mebibytes: u32) -> Option<Self> {
        let mount = format!("mount -t tmpfs -o size={mebibytes}m none \"$0\" && exec \"$@\"");
        let (data, config) = (site.path(name), site.path(&format!("{name}.toml")));
        std::fs::write(&config, "").unwrap();
        std::fs::create_dir(&data).unwrap();
        let prefix = ["unshare", "-Urm", "sh", "-c", &mount, data.to_str().unwrap()];
        let allowed = Command::new(prefix[0]).args(&prefix[1..]).arg("true").output();
        if !allowed.is_ok_and(|output| output.status.success()) {
            return None;
        }
        let (child, url) = spawn(&data, &config, "127.0.0.1:0", &prefix);
        Some(Self { child, data, config, url })
    }

    /// Where it has a file of its directory, also on a disk that only it sees.
    pub(crate) fn as_it_sees(&self, name: &str) -> PathBuf {
        let data = self.data.strip_prefix("/").unwrap();
        Path::new("/proc").join(self.child.id().to_string()).join("root").join(data).join(name)
    }

    /// Where its database is.
    pub(crate) fn database(&self) -> PathBuf {
        self.data.join("relay.db")
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        let rest = self.url.split_once("://").unwrap().1;
        rest[..rest.find('/').unwrap()].parse().unwrap()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again where it was.
    pub(crate) fn restart(&mut self) {
        let (child, url) = spawn(&self.data, &self.config, &self.address().to_string(), &[]);
        assert_eq!(url, self.url, "the key stays");
        self.child = child;
    }

    /// Removes a file of its directory.
    pub(crate) fn lose(&self, name: &str) {
        std::fs::remove_file(self.data.join(name)).unwrap();
    }

    /// Starts it again where it was, after something that changes its address; returns the one it had.
    pub(crate) fn restart_as_another(&mut self) -> String {
        let (child, url) = spawn(&self.data, &self.config, &self.address().to_string(), &[]);
        assert_ne!(url, self.url);
        self.child = child;
        std::mem::replace(&mut self.url, url)
    }

    /// Tells it to stop, and waits until it has.
    pub(crate) fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// Runs another command of the program on its directory: whether it succeeded, and all it said.
    pub(crate) fn operate(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sync-relay"));
        let output = command.args(arguments).arg("--data").arg(&self.data).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    /// Everything it has logged.
    pub(crate) fn logged(&self) -> Vec<u8> {
        std::fs::read(self.data.with_extension("log")).unwrap()
    }

    /// Everything that lies in its directory, the key apart.
    pub(crate) fn stored(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in std::fs::read_dir(&self.data).unwrap() {
            let path = entry.unwrap().path();
            // its key, and its own address
            let own = path.extension().is_some_and(|extension| extension == "key") || path.ends_with("address");
            if !own {
                bytes.extend(std::fs::read(path).unwrap());
            }
        }
        bytes
    }

    /// Removes its database and leaves its key.
    pub(crate) fn lose_database(&self) {
        for name in ["relay.db", "relay.db-wal", "relay.db-shm"] {
            let _ = std::fs::remove_file(self.data.join(name));
        }
    }

    /// What an HTTP route answers: status line and body.
    pub(crate) fn http(&self, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // it may answer without reading
        let _ = write!(stream, "GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }

    /// A number of `/metrics`.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let (_, body) = self.http("/metrics");
        let line = body.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.unwrap_or_else(|| panic!("no {name} in {body}")).rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// Starts a relay, by another program in whose arguments it is named unless `prefix` is empty.
fn spawn(data: &Path, config: &Path, bind: &str, prefix: &[&str]) -> (Child, String) {
    let start = Instant::now();
    let log = std::fs::OpenOptions::new().create(true).append(true).open(data.with_extension("log")).unwrap();
    loop {
        let words = [prefix, &[env!("CARGO_BIN_EXE_sync-relay")]].concat();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(["--bind", bind, "--data"])
            .arg(data)
            .arg("--config")
            .arg(config)
            .env("SYNC_RELAY_LOG", "info,sync_relay=trace,sync_store=trace")
            .stderr(log.try_clone().unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if !line.is_empty() {
            return (child, line.trim().to_owned());
        }
        // the port may be held for a moment by connections that were cut
        child.wait().unwrap();
        assert!(start.elapsed() < PATIENCE, "the relay does not start");
        std::thread::sleep(LOOK);
    }
}

impl Drop for RelayProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with homes and relays.
pub(crate) struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Opens a home, and makes it first if it is not there. It finds nobody by itself.
    pub(crate) async fn open(&self, name: &str) -> Device {
        let path = self.path(name);
        if !path.exists() {
            let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
            Home::create(&path, &device_name(name), Some(KeyStoreKind::File), &PassphraseSource::none(), &mut rng)
                .unwrap();
        }
        let network = Network {
            bind: Bind::Loopback,
            mdns: false,
            lan: false,
            public_relays: false,
            same_machine: false,
            ..Network::default()
        };
        let config = Config { passphrase: PassphraseSource::none(), network, ..Config::new(path) };
        Device::open(config).await.unwrap()
    }

    /// A group of two devices that were never near each other since: each has a port that the other does not know.
    pub(crate) async fn strangers(&self, relays: &[&str]) -> Apart {
        let (a, b) = (self.open("anna").await, self.open("ben").await);
        let group = a.create_group().await.unwrap();
        for url in relays {
            a.add_relay(url, None).await.unwrap();
        }
        let anna = a.client(group).unwrap();
        let mut invite = a.invite(group, LIFETIME).await.unwrap();
        let ben = b.join(&invite.link, |_| {}).await.unwrap();
        let outcome = tokio::time::timeout(PATIENCE, invite.outcome()).await.unwrap();
        assert!(matches!(outcome, InviteOutcome::Joined { .. }), "{outcome:?}");
        let mut held = Vec::new();
        for client in [&anna, &ben] {
            let status = until(client, "in touch", |status| status.peers.iter().any(|peer| peer.address.is_some()));
            let peers = status.await.peers;
            held.extend(
                peers.into_iter().flat_map(|peer| peer.addresses).filter_map(|text| text.parse::<SocketAddr>().ok()),
            );
        }
        drop((anna, ben));
        a.close().await;
        b.close().await;
        held.sort_unstable();
        held.dedup();
        let ports = held.into_iter().map(|address: SocketAddr| occupied(address)).collect();
        Apart { _ports: ports }
    }
}

/// The name of a home's device: nothing that is anywhere by chance.
pub(crate) fn device_name(home: &str) -> String {
    format!("{home}-of-the-household")
}

/// Binds a port that a device has just left.
fn occupied(address: SocketAddr) -> UdpSocket {
    let start = Instant::now();
    loop {
        match UdpSocket::bind(address) {
            Ok(socket) => return socket,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{address}: {error}"),
        }
        std::thread::sleep(LOOK);
    }
}

/// Keeps the ports taken at which two devices know each other.
pub(crate) struct Apart {
    _ports: Vec<UdpSocket>,
}

pub(crate) async fn bodies(client: &SyncClient) -> Vec<String> {
    let pulled = client.pull(Cursor(0), 10_000).await.unwrap();
    pulled.blobs.into_iter().map(|blob| String::from_utf8_lossy(&blob.bytes).into_owned()).collect()
}

/// Waits until a client's status is as it should be.
pub(crate) async fn until(client: &SyncClient, what: &str, is: impl Fn(&Status) -> bool) -> Status {
    let start = Instant::now();
    loop {
        let status = client.status().await.unwrap();
        if is(&status) {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "not {what}: {status:?}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a client holds a blob.
pub(crate) async fn until_has(client: &SyncClient, body: &str) {
    let start = Instant::now();
    while !bodies(client).await.iter().any(|each| each == body) {
        assert!(start.elapsed() < PATIENCE, "no {body}: {:?}", client.status().await);
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until all of a client's entries are held by someone else.
pub(crate) async fn until_handed_over(client: &SyncClient) {
    until(client, "handed over", |status| {
        status.pending == 0 && status.relays.iter().any(|relay| relay.acknowledged == status.max_cursor)
    })
    .await;
}

/// Fails if a device was ever connected to the other directly.
pub(crate) async fn never_met(client: &SyncClient) {
    let status = client.status().await.unwrap();
    assert!(status.peers.iter().all(|peer| peer.state != "connected"), "{status:?}");
}

/// Connections on which something was said that begins nothing.
pub(crate) struct Unfinished(Vec<TcpStream>);

impl RelayProcess {
    /// Says each of these on a connection of its own.
    pub(crate) fn say(&self, unfinished: impl IntoIterator<Item = Vec<u8>>) -> Unfinished {
        let say = |bytes: Vec<u8>| {
            let mut socket = TcpStream::connect(self.address()).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            // it may be let go at once
            let _ = socket.write_all(&bytes);
            socket
        };
        Unfinished(unfinished.into_iter().map(say).collect())
    }
}

impl Unfinished {
    /// Whether the relay ends all of them.
    pub(crate) async fn are_let_go(mut self) -> bool {
        let letting_go = move || {
            self.0.iter_mut().all(|socket| {
                // an error is an end too, but for no answer in time
                let read = socket.read_to_end(&mut Vec::new());
                !read.is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
            })
        };
        tokio::task::spawn_blocking(letting_go).await.unwrap()
    }
}
