//! What a device is opened with.

use std::path::PathBuf;

pub use sync_link::iroh_link::Bind;

use crate::home::PassphraseSource;

/// What a device is opened with.
#[derive(Debug)]
pub struct Config {
    /// The home's directory.
    pub home: PathBuf,
    /// Where the passphrase of a home protected by one comes from.
    pub passphrase: PassphraseSource,
    /// How the device is reached and reaches others.
    pub network: Network,
    /// Entries after which a snapshot of a folder is written: for tests, which have no year.
    #[doc(hidden)]
    pub snapshot_after: Option<u64>,
}

impl Config {
    /// A home on the usual network, its passphrase from a systemd credential if it needs one.
    #[must_use]
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self {
            home: home.into(),
            passphrase: PassphraseSource::system(),
            network: Network::default(),
            snapshot_after: None,
        }
    }
}

/// How a device is reached and reaches others.
#[derive(Debug, Clone)]
pub struct Network {
    /// False for no network at all: what is pushed waits.
    pub online: bool,
    /// Which addresses to listen on.
    pub bind: Bind,
    /// Whether devices on the local network are found by mDNS.
    pub mdns: bool,
    /// Whether codes are looked up by multicast on the local network.
    pub lan: bool,
    /// Whether connections may begin at the groups' relays where no direct way is known; not with [`Bind::Loopback`].
    pub punching: bool,
    /// Whether they may begin at n0's public relays until a group names one; the home may forbid it too.
    pub public_relays: bool,
    /// Whether devices and codes on the same machine are found.
    pub same_machine: bool,
    /// Where devices on the same machine find each other; the user's runtime directory unless named.
    pub runtime_dir: Option<PathBuf>,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            online: true,
            bind: Bind::Any,
            mdns: true,
            lan: true,
            punching: true,
            public_relays: true,
            same_machine: true,
            runtime_dir: None,
        }
    }
}

impl Network {
    /// Whether connections may begin at relays: nobody but this machine reaches one that listens there alone.
    pub(crate) fn punches(&self) -> bool {
        self.online && self.punching && self.bind == Bind::Any
    }

    /// The usual network, changed by `SYNCSHELL_BIND=loopback`, `SYNCSHELL_MDNS=off`, `SYNCSHELL_LAN=off`,
    /// `SYNCSHELL_PUNCHING=off`, `SYNCSHELL_PUBLIC_RELAYS=off`, `SYNCSHELL_SAME_MACHINE=off` and
    /// `SYNCSHELL_RUNTIME_DIR=DIR`.
    #[must_use]
    pub fn from_env() -> Self {
        let off = |name: &str| std::env::var(name).is_ok_and(|value| value == "off");
        let loopback = std::env::var("SYNCSHELL_BIND").is_ok_and(|value| value == "loopback");
        Self {
            online: true,
            bind: if loopback { Bind::Loopback } else { Bind::Any },
            mdns: !off("SYNCSHELL_MDNS"),
            lan: !off("SYNCSHELL_LAN"),
            punching: !off("SYNCSHELL_PUNCHING"),
            public_relays: !off("SYNCSHELL_PUBLIC_RELAYS"),
            same_machine: !off("SYNCSHELL_SAME_MACHINE"),
            runtime_dir: std::env::var_os("SYNCSHELL_RUNTIME_DIR").map(PathBuf::from),
        }
    }
}
