//! A PostgreSQL of one test: on a Unix socket in a directory of its own, and gone with the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than a database takes to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Who has no rights: root may not run PostgreSQL.
const NOBODY: u32 = 65534;

/// A server that runs.
pub(crate) struct Postgresql {
    dir: tempfile::TempDir,
    bin: PathBuf,
    child: Child,
    /// Part of its socket's name, and where it listens once a test has it do so.
    pub(crate) port: u16,
}

impl Postgresql {
    /// Starts one; none where it is not installed, which it says in one line.
    pub(crate) fn start() -> Option<Self> {
        let Some(bin) = installed() else {
            println!("skipped, as it needs the Debian package `postgresql`");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        if rustix::process::geteuid().is_root() {
            use std::os::unix::fs::PermissionsExt as _;

            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
            for owned in [dir.path(), &data] {
                std::os::unix::fs::chown(owned, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        let made = unprivileged(&bin.join("initdb"), dir.path())
            .args([
                "--no-sync",
                "--no-instructions",
                "--auth=trust",
                "--username=relay",
                "--encoding=UTF8",
                "--locale=C",
            ])
            .arg("--pgdata")
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let conf = data.join("postgresql.conf");
        let settings = std::fs::read_to_string(&conf).unwrap() + "\nlisten_addresses = ''\nshared_buffers = 16MB\n";
        std::fs::write(&conf, settings).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = serve(&bin, dir.path(), port);
        let server = Self { dir, bin, child, port };
        server.wait();
        Some(server)
    }

    /// The address of a database, made if there is none of that name.
    pub(crate) fn database(&self, name: &str) -> String {
        let known = self.ask("postgres", &format!("SELECT 1 FROM pg_database WHERE datname = '{name}'"));
        if known.is_empty() {
            self.ask("postgres", &format!("CREATE DATABASE {name}"));
        }
        format!("postgres://relay@/{name}?host={}&port={}", self.dir.path().display(), self.port)
    }

    /// Runs a statement and returns what it gives, as text.
    pub(crate) fn ask(&self, database: &str, sql: &str) -> String {
        let output = self.psql(database, sql).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn psql(&self, database: &str, sql: &str) -> Command {
        let mut command = Command::new(self.bin.join("psql"));
        command.args(["-X", "-A", "-t", "-U", "relay", "-d", database, "-c", sql, "-h"]).arg(self.dir.path());
        command.arg("-p").arg(self.port.to_string());
        command
    }

    /// Ends it as an operator's `systemctl restart` would, and starts it again.
    pub(crate) fn restart(&mut self) {
        self.end("fast");
        self.child = serve(&self.bin, self.dir.path(), self.port);
        self.wait();
    }

    /// Ends it as a power cut would, and starts it again.
    pub(crate) fn crash(&mut self) {
        self.end("immediate");
        self.child = serve(&self.bin, self.dir.path(), self.port);
        self.wait();
    }

    fn end(&mut self, how: &str) {
        let mut command = unprivileged(&self.bin.join("pg_ctl"), self.dir.path());
        command.args(["stop", "--silent", "--mode", how, "--pgdata"]).arg(self.dir.path().join("data"));
        // it may have ended already
        let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn wait(&self) {
        let start = Instant::now();
        while !self.psql("postgres", "SELECT 1").output().unwrap().status.success() {
            assert!(start.elapsed() < PATIENCE, "{}", log(self.dir.path()));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Postgresql {
    fn drop(&mut self) {
        self.end("immediate");
    }
}

fn log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("log")).unwrap_or_default()
}

fn serve(bin: &Path, dir: &Path, port: u16) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    unprivileged(&bin.join("postgres"), dir)
        .arg("-D")
        .arg(dir.join("data"))
        .arg("-k")
        .arg(dir)
        .arg("-p")
        .arg(port.to_string())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// A command as someone who has no rights.
fn unprivileged(program: &Path, dir: &Path) -> Command {
    use std::os::unix::process::CommandExt as _;

    let mut command = Command::new(program);
    command.current_dir(dir).stdin(Stdio::null());
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// The directory of its programs.
fn installed() -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH")?).collect();
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        places.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    // one whose other programs lie beside it
    places
        .into_iter()
        .find(|place| ["postgres", "initdb", "pg_ctl", "psql"].iter().all(|name| place.join(name).exists()))
}
