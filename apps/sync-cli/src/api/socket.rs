//! Where a home is served, and how both ends get there: a Unix socket, or a named pipe on Windows.
//!
//! Whoever binds holds the lock of the home, so a socket found in its place was left by a process that died.

use std::path::Path;

use sync_client::Network;

use crate::exit::Failure;

#[cfg(unix)]
pub(crate) use unix::{bind, connect};
#[cfg(windows)]
pub(crate) use windows::{bind, connect};

/// Where a home is served.
#[cfg(unix)]
pub(crate) type Address = std::path::PathBuf;
/// Where a home is served.
#[cfg(windows)]
pub(crate) type Address = std::ffi::OsString;

/// Where the home in this directory is served.
pub(crate) fn socket_path(home: &Path, network: &Network) -> Result<Address, Failure> {
    #[cfg(unix)]
    return unix::address(home, network);
    #[cfg(windows)]
    {
        let _ = network;
        Ok(windows::address(home))
    }
}

/// Names a home by its path where the path itself is too long or of the wrong form.
fn hash_of(home: &Path) -> String {
    // one home under two paths should be one; where that cannot be told, the path given has to do
    let path = std::fs::canonicalize(home).unwrap_or_else(|_| home.to_owned());
    let hash = blake3::hash(path.as_os_str().as_encoded_bytes());
    data_encoding::HEXLOWER.encode(&hash.as_bytes()[..16])
}

#[cfg(unix)]
mod unix {
    use std::fs::{self, Permissions};
    use std::io;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::{Path, PathBuf};

    use sync_client::Network;
    use sync_link::same_machine::SameMachine;
    use tokio::net::UnixListener;

    use super::hash_of;
    use crate::exit::Failure;

    pub(crate) type Stream = tokio::net::UnixStream;

    /// Bytes of a socket's path: macOS has room for 103, Linux for 107.
    const MAX_PATH: usize = 103;

    /// A listening socket; dropping it removes the socket from the file system.
    #[derive(Debug)]
    pub(crate) struct Listener {
        inner: UnixListener,
        path: PathBuf,
    }

    pub(super) fn address(home: &Path, network: &Network) -> Result<PathBuf, Failure> {
        let beside = home.join("api.sock");
        if beside.as_os_str().as_bytes().len() <= MAX_PATH {
            return Ok(beside);
        }
        let directory = SameMachine::open(network.runtime_dir.as_deref())
            .map_err(|error| Failure::new("io", format!("no place for the socket of the local API: {error}")))?;
        let path = directory.path().join(format!("api-{}.sock", hash_of(home)));
        if path.as_os_str().as_bytes().len() > MAX_PATH {
            let message = format!("no place for the socket of the local API: {} is too long", path.display());
            return Err(Failure::new("io", message + "; choose a shorter path for the home"));
        }
        Ok(path)
    }

    pub(crate) fn bind(path: &Path) -> io::Result<Listener> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // the directory keeps others out until the mode does
        let listener = Listener { inner: UnixListener::bind(path)?, path: path.to_owned() };
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Connects to whoever serves; none if nobody does.
    pub(crate) async fn connect(path: &Path) -> io::Result<Option<Stream>> {
        match Stream::connect(path).await {
            Ok(stream) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                // opening the home gives the better message for a directory that is none or not ours
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::PermissionDenied => Ok(None),
                _ => Err(error),
            },
        }
    }

    impl axum::serve::Listener for Listener {
        type Io = Stream;
        type Addr = tokio::net::unix::SocketAddr;

        async fn accept(&mut self) -> (Self::Io, Self::Addr) {
            axum::serve::Listener::accept(&mut self.inner).await
        }

        fn local_addr(&self) -> io::Result<Self::Addr> {
            self.inner.local_addr()
        }
    }

    impl Drop for Listener {
        fn drop(&mut self) {
            // what stays is replaced by whoever serves next
            let _ = fs::remove_file(&self.path);
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn network(directory: &Path) -> Network {
            Network { runtime_dir: Some(directory.to_owned()), ..Network::default() }
        }

        #[test]
        fn a_home_with_a_long_path_is_served_from_the_runtime_directory() {
            let directory = tempfile::tempdir().expect("a directory");
            let network = network(&directory.path().join("run"));
            let short = Path::new("/home/anna");
            assert_eq!(address(short, &network).expect("fits"), short.join("api.sock"));

            let long = PathBuf::from(format!("/home/{}", "x".repeat(100)));
            let other = PathBuf::from(format!("/home/{}", "y".repeat(100)));
            let path = address(&long, &network).expect("a place");
            assert!(path.starts_with(directory.path()), "{}", path.display());
            assert_eq!(path, address(&long, &network).expect("the same"));
            assert_ne!(path, address(&other, &network).expect("another"));
        }

        #[tokio::test]
        async fn a_socket_left_by_a_dead_process_is_nobody_and_is_replaced() {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("api.sock");
            assert!(connect(&path).await.expect("nobody").is_none());

            drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
            assert!(connect(&path).await.expect("nobody").is_none());

            let listener = bind(&path).expect("replaced");
            assert!(connect(&path).await.expect("someone").is_some());
            assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
            drop(listener);
            assert!(!path.exists());
        }
    }
}

#[cfg(windows)]
mod windows {
    use std::ffi::{OsStr, OsString};
    use std::io;
    use std::path::Path;
    use std::time::Duration;

    use tokio::net::windows::named_pipe::{ClientOptions, NamedPipeClient, NamedPipeServer, ServerOptions};

    use super::hash_of;

    pub(crate) type Stream = NamedPipeClient;

    /// All instances of the pipe are taken for a moment.
    const ERROR_PIPE_BUSY: i32 = 231;

    /// How long to wait before asking again for a free instance: the server makes one as soon as another is taken.
    const BUSY_WAIT: Duration = Duration::from_millis(20);

    /// The next instance of a pipe that others may connect to.
    #[derive(Debug)]
    pub(crate) struct Listener {
        next: NamedPipeServer,
        name: OsString,
    }

    pub(super) fn address(home: &Path) -> OsString {
        format!(r"\\.\pipe\syncshell-{}", hash_of(home)).into()
    }

    pub(crate) fn bind(name: &OsStr) -> io::Result<Listener> {
        // others may read from a pipe by default, but without writing nobody gets an answer
        let next = ServerOptions::new().first_pipe_instance(true).reject_remote_clients(true).create(name)?;
        Ok(Listener { next, name: name.to_owned() })
    }

    /// Connects to whoever serves; none if nobody does.
    pub(crate) async fn connect(name: &OsStr) -> io::Result<Option<Stream>> {
        loop {
            match ClientOptions::new().open(name) {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) if error.raw_os_error() == Some(ERROR_PIPE_BUSY) => tokio::time::sleep(BUSY_WAIT).await,
                Err(error) => return Err(error),
            }
        }
    }

    impl axum::serve::Listener for Listener {
        type Io = NamedPipeServer;
        type Addr = OsString;

        async fn accept(&mut self) -> (Self::Io, Self::Addr) {
            loop {
                let connected = self.next.connect().await;
                match ServerOptions::new().reject_remote_clients(true).create(&self.name) {
                    Ok(next) => {
                        let taken = std::mem::replace(&mut self.next, next);
                        if connected.is_ok() {
                            return (taken, self.name.clone());
                        }
                    }
                    // out of memory or handles: the one at hand serves again once its client has gone
                    Err(_) => {
                        let _ = self.next.disconnect();
                        tokio::time::sleep(BUSY_WAIT).await;
                    }
                }
            }
        }

        fn local_addr(&self) -> io::Result<Self::Addr> {
            Ok(self.name.clone())
        }
    }
}
