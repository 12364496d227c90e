//! The local API on the loopback network, for programs that cannot open the socket.
//!
//! Any program of any user can connect there, and a web page can make a browser do so: whoever asks shows the token that
//! only this user can read, and names the address by its number, which a page with a rebound name cannot.

use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use getrandom::SysRng;
use rand_core::{Rng as _, UnwrapErr};
use tokio::net::TcpListener;

use super::server::Refusal;
use super::{VERSION, VERSION_HEADER};
use crate::exit::Failure;

/// The file in the home that holds the token.
const TOKEN_FILE: &str = "api-token";

/// Bytes of a token: nobody guesses it.
const TOKEN_LEN: usize = 32;

/// A port of the loopback network, and who gets in.
#[derive(Debug)]
pub(crate) struct Loopback {
    pub(super) listener: TcpListener,
    pub(super) guard: Guard,
}

impl Loopback {
    /// Takes a port, any free one for 0, and writes a new token into the home.
    pub(crate) async fn open(home: &Path, port: u16) -> Result<Self, Failure> {
        let taken = || format!("cannot serve the local API on port {port}");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(Failure::io(taken()))?;
        let port = listener.local_addr().map_err(Failure::io(taken()))?.port();
        let token = draw_token();
        let file = home.join(TOKEN_FILE);
        write_token(&file, &token).map_err(Failure::io(format!("cannot write {}", file.display())))?;
        Ok(Self { listener, guard: Guard::new(&token, port, file) })
    }
}

/// Lets in who shows the token under the right name.
#[derive(Clone)]
pub(crate) struct Guard(Arc<Rules>);

struct Rules {
    /// Hashes are compared in constant time.
    token: blake3::Hash,
    hosts: [String; 2],
    file: PathBuf,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("address", &self.address()).finish_non_exhaustive()
    }
}

impl Guard {
    fn new(token: &str, port: u16, file: PathBuf) -> Self {
        let hosts = [format!("127.0.0.1:{port}"), format!("localhost:{port}")];
        Self(Arc::new(Rules { token: blake3::hash(token.as_bytes()), hosts, file }))
    }

    /// Host and port.
    pub(super) fn address(&self) -> &str {
        &self.0.hosts[0]
    }

    /// Removes the token, which opens nothing any more.
    pub(super) fn forget(&self) {
        // the next one replaces it in any case
        let _ = fs::remove_file(&self.0.file);
    }

    fn allows(&self, headers: &HeaderMap) -> Result<(), Failure> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let host = text(header::HOST);
        if headers.get_all(header::HOST).iter().count() != 1 || !self.0.hosts.iter().any(|known| *known == host) {
            return Err(Failure::new("wrong-host", format!("this is {}; name it so", self.address())));
        }
        let token = text(header::AUTHORIZATION).strip_prefix("Bearer ").unwrap_or_default();
        if blake3::hash(token.as_bytes()) != self.0.token {
            let message =
                format!("every request carries `authorization: Bearer` with what is in {TOKEN_FILE} of the home");
            return Err(Failure::new("no-token", message));
        }
        Ok(())
    }
}

/// Refuses whoever is not let in before anything of the request is looked at.
pub(super) async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    match guard.allows(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(failure) => {
            let mut response = Refusal(failure).into_response();
            response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
            response
        }
    }
}

fn draw_token() -> String {
    let mut bytes = [0; TOKEN_LEN];
    UnwrapErr(SysRng).fill_bytes(&mut bytes);
    data_encoding::HEXLOWER.encode(&bytes)
}

fn write_token(path: &Path, token: &str) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    // a temporary file is its owner's alone from the start
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(token.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_under_the_right_name_is_let_in() {
        let guard = Guard::new("secret", 80, PathBuf::new());
        let check = |host: &[&'static str], authorization: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            for host in host {
                headers.append(header::HOST, HeaderValue::from_static(host));
            }
            if let Some(value) = authorization {
                headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            guard.allows(&headers).map_err(|failure| failure.code.into_owned())
        };
        let right = Some("Bearer secret");
        assert_eq!(check(&["127.0.0.1:80"], right), Ok(()));
        assert_eq!(check(&["localhost:80"], right), Ok(()));
        for host in
            [&[][..], &["evil.example:80"], &["127.0.0.1"], &["127.0.0.1:81"], &["localhost:80", "localhost:80"]]
        {
            assert_eq!(check(host, right), Err("wrong-host".to_owned()), "{host:?}");
        }
        for value in
            [None, Some("Bearer "), Some("Bearer secre"), Some("Bearer secret2"), Some("secret"), Some("Basic secret")]
        {
            assert_eq!(check(&["127.0.0.1:80"], value), Err("no-token".to_owned()), "{value:?}");
        }
    }
}
