//! Networks made of namespaces, and the real programs on their hosts.
//!
//! A [`Lab`] is one shell, the first process of namespaces of its own: what is started in it sees no other network, and
//! ends with it.
//! It needs no root where unprivileged user namespaces are allowed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Time between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(200);
/// Begins the line that follows what a command said; no program of ours writes it.
const END: char = '\u{1}';

/// What every lab begins with.
const PRELUDE: &str = r#"
mount -t tmpfs none /run
mkdir /run/netns
ip link set lo up
# in NAME COMMAND...: runs something on a host
in_host() { host=$1; shift; ip netns exec "$host" "$@"; }
"#;

/// Hosts and what connects them.
#[derive(Debug)]
pub struct Lab {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

impl Lab {
    /// An empty lab; none, and a line that says so, where namespaces are not allowed or a tool is missing.
    ///
    /// # Panics
    /// Where the system gives no directory or process.
    #[must_use]
    pub fn new() -> Option<Self> {
        let probe = "ip link && nft list tables && echo 1 >/proc/sys/net/ipv4/ip_forward";
        let allowed = Command::new("unshare").args(["-Urnm", "sh", "-c", probe]).output();
        if !allowed.is_ok_and(|output| output.status.success()) {
            eprintln!(
                "skipped: hosts are made of namespaces, which are not allowed here, or `unshare`, `ip` or `nft` is missing"
            );
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let mut child = Command::new("unshare")
            .args(["-Urnm", "--kill-child", "--pid", "--fork", "sh"])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", dir.path())
            .env("DIR", dir.path())
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
            .env("SYNCSHELL_PUBLIC_RELAYS", "off")
            .env("SYNCSHELL_LOG", std::env::var_os("SYNCSHELL_LOG").unwrap_or_else(|| "warn".into()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let input = child.stdin.take().expect("its input is piped");
        let output = BufReader::new(child.stdout.take().expect("its output is piped"));
        let mut lab = Self { child, input, output, dir };
        lab.define(PRELUDE);
        Some(lab)
    }

    /// The directory of everything that lies on its hosts.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs commands in the shell itself, for what they define.
    ///
    /// # Panics
    /// If the last one fails.
    pub fn define(&mut self, script: &str) {
        let (status, said) = self.told(&format!("{{ {script}\n}}"));
        assert_eq!(status, 0, "{script}: {said}");
    }

    /// Runs commands, and returns the exit status and all they said.
    pub fn run(&mut self, script: &str) -> (i32, String) {
        self.told(&format!("( set -e; {script}\n)"))
    }

    /// Runs commands that are to succeed, and returns all they said.
    ///
    /// # Panics
    /// If one fails.
    pub fn ran(&mut self, script: &str) -> String {
        let (status, said) = self.run(script);
        assert_eq!(status, 0, "{script}: {said}\n{}", self.logs());
        said
    }

    /// Runs commands again and again until they succeed, and returns how long that took.
    ///
    /// # Panics
    /// If they have not after `patience`.
    pub fn until(&mut self, patience: Duration, script: &str) -> Duration {
        let start = Instant::now();
        loop {
            let (status, said) = self.run(script);
            if status == 0 {
                return start.elapsed();
            }
            assert!(start.elapsed() < patience, "not yet: {script}: {said}\n{}", self.logs());
            std::thread::sleep(LOOK);
        }
    }

    /// The ends of all logs in its directory.
    fn logs(&mut self) -> String {
        self.told(r#"for log in "$DIR"/*.log; do echo "== $log"; tail -n 40 "$log"; done"#).1
    }

    fn told(&mut self, script: &str) -> (i32, String) {
        let sent = writeln!(self.input, "{script} </dev/null 2>&1; printf '\\n\\001%d\\n' $?");
        sent.and_then(|()| self.input.flush()).expect("the shell listens");
        let mut said = String::new();
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).expect("the shell says text");
            assert!(read > 0, "the shell has ended: {said}");
            if let Some(status) = line.trim_end().strip_prefix(END) {
                return (status.parse().expect("a status"), said);
            }
            said += &line;
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // all that runs in it ends with it
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program of the workspace, beside the test that runs; built if it is not there, as where this crate alone is tested.
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn program(package: &str, name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program has a path");
    let target = test.parent().and_then(Path::parent).expect("tests lie in target/debug/deps");
    let program = target.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !program.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "--quiet", "-p", package]).status();
        assert!(built.is_ok_and(|status| status.success()), "{name} cannot be built");
    }
    program
}
