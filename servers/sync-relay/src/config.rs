//! What an operator may set, in `relay.toml`; everything has a default.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sync_link::punching::ADDRESS_DISCOVERY_PORT;
use sync_link::relay::{DEFAULT_PORT, GONE_AFTER};
use sync_types::bounds::{MAX_APP_BYTES, MAX_ENVELOPE, MAX_TEXT};

/// What a relay is started with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where it listens; the loopback network unless told otherwise.
    pub bind: SocketAddr,
    /// Directory of its key, and of its database unless that is in PostgreSQL.
    pub data: PathBuf,
    /// Address of a database in PostgreSQL, as `postgres://USER:PASSWORD@HOST/NAME`; unless set, SQLite in `data`.
    pub database: Option<String>,
    /// File of certificates that may sign that of PostgreSQL, as PEM; those that web sites are signed by unless set.
    pub database_ca: Option<PathBuf>,
    /// The name under which devices reach it, for the address it prints; the one it listens on unless set.
    pub host: Option<String>,
    /// Whether it goes without TLS; unless set, only where it listens on the loopback network and has no `cert`.
    pub plain: Option<bool>,
    /// File of the operator's certificate and what it was signed by, as PEM; unless set, one is made and kept.
    pub cert: Option<PathBuf>,
    /// File of its key.
    pub key: Option<PathBuf>,
    /// Whether everyone may keep a new group here; unless set, only where it listens on the loopback network.
    pub open: Option<bool>,
    /// What lets a group be new here where not everyone may; unless set, one is made and kept.
    pub registration_token: Option<String>,
    /// Seconds for which an entry is kept at least; 0 keeps it for ever, and memberships always stay.
    pub keep_seconds: u64,
    /// Seconds between two looks for what is older.
    pub sweep_seconds: u64,
    /// Whether a proxy stands before it, whose `X-Forwarded-For` names the address that asks.
    pub behind_proxy: bool,
    /// Whether `/metrics` answers others than this machine.
    pub public_metrics: bool,
    /// Whether connections between devices may begin here, to become direct.
    pub punching: bool,
    /// Whether devices are told their public address; unless set, where it has TLS and is not on the loopback network.
    pub address_discovery: Option<bool>,
    /// Where they ask for it, by UDP; unless set, port 7842 where it listens.
    pub address_discovery_bind: Option<SocketAddr>,
    /// How much it takes.
    pub limits: Limits,
}

/// How much a relay takes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Connections at once from one address.
    pub connections_per_address: usize,
    /// Seconds without a whole message after which a connection is let go; devices say something every 25.
    pub silence_seconds: u64,
    /// Pushes and refused requests of one device in a minute.
    pub messages_per_minute: u32,
    /// Codes that one address makes in a minute.
    pub codes_per_minute: u32,
    /// Codes that one address looks up in a minute, and questions about them.
    pub code_fetches_per_minute: u32,
    /// Of these, such as are not there; beyond it, the address has to wait.
    pub code_misses_per_minute: u32,
    /// Bytes of an app in one blob.
    pub blob_bytes: usize,
    /// Bytes kept of one group.
    pub group_bytes: u64,
    /// Groups.
    pub groups: usize,
    /// Bytes of the database.
    pub database_bytes: u64,
    /// Bytes that one device may send others in a second while they have no direct way.
    pub relayed_bytes_per_second: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DEFAULT_PORT),
            data: default_data(),
            database: None,
            database_ca: None,
            host: None,
            plain: None,
            cert: None,
            key: None,
            open: None,
            registration_token: None,
            keep_seconds: 7 * 24 * 3600,
            sweep_seconds: 3600,
            behind_proxy: false,
            public_metrics: false,
            punching: true,
            address_discovery: None,
            address_discovery_bind: None,
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1000,
            connections_per_address: 10,
            silence_seconds: GONE_AFTER.as_secs(),
            messages_per_minute: 100,
            codes_per_minute: 5,
            code_fetches_per_minute: 10,
            code_misses_per_minute: 3,
            blob_bytes: MAX_APP_BYTES,
            group_bytes: 100 << 20,
            groups: 1000,
            database_bytes: 1 << 30,
            relayed_bytes_per_second: 2 << 20,
        }
    }
}

impl Limits {
    /// Bytes of the largest envelope that is taken: the largest blob, padded and with its header.
    #[must_use]
    pub fn envelope_bytes(&self) -> usize {
        (self.blob_bytes + self.blob_bytes / 4).clamp(MIN_ENVELOPE, MAX_ENVELOPE)
    }
}

/// Bytes of an envelope that is always taken: memberships need them.
const MIN_ENVELOPE: usize = 16 << 10;

/// A day: whoever says nothing for longer is not there.
const MAX_SILENCE: u64 = 24 * 3600;

fn default_data() -> PathBuf {
    let project = directories::ProjectDirs::from("", "", "sync-relay");
    project.map_or_else(|| PathBuf::from("sync-relay-data"), |project| project.data_local_dir().to_owned())
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file says something unknown.
    #[error("cannot use {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{0}")]
    Value(&'static str),
}

impl Config {
    /// Reads a configuration file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
    }

    /// Whether everyone may keep a new group here.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open.unwrap_or_else(|| self.bind.ip().is_loopback())
    }

    /// Whether it goes without TLS.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.plain.unwrap_or_else(|| self.bind.ip().is_loopback() && self.cert.is_none())
    }

    /// Where devices are told their public address, if they are.
    #[must_use]
    pub fn address_discovery(&self) -> Option<SocketAddr> {
        let wanted = self.address_discovery.unwrap_or_else(|| !self.bind.ip().is_loopback());
        let bind = self.address_discovery_bind.unwrap_or(SocketAddr::new(self.bind.ip(), ADDRESS_DISCOVERY_PORT));
        (self.punching && wanted && !self.is_plain()).then_some(bind)
    }

    /// Fails where a value makes no sense.
    pub fn check(&self) -> Result<(), ConfigError> {
        let token = self.registration_token.as_deref().unwrap_or("token");
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if token.is_empty() || token.len() > MAX_TEXT / 2 || !token.chars().all(fits) {
            return Err(ConfigError::Value("registration_token must be 1 to 128 letters, digits, - and _"));
        }
        let host = self.host.as_deref().unwrap_or("host");
        let is_name = host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if host.is_empty() || !(is_name || host.parse::<IpAddr>().is_ok()) {
            return Err(ConfigError::Value("host must be a name or an address, without port"));
        }
        if self.cert.is_some() != self.key.is_some() {
            return Err(ConfigError::Value("cert and key belong together: set both or none"));
        }
        if self.cert.is_some() && self.is_plain() {
            return Err(ConfigError::Value("a certificate is of no use with plain = true: set one of them"));
        }
        if self.database_ca.is_some() && self.database.is_none() {
            return Err(ConfigError::Value("database_ca is of no use without database: set both or none"));
        }
        if self.sweep_seconds == 0 {
            return Err(ConfigError::Value("sweep_seconds is at least 1"));
        }
        if self.address_discovery == Some(true) && self.is_plain() {
            return Err(ConfigError::Value("address_discovery needs a certificate: leave it out with plain = true"));
        }
        if self.limits.relayed_bytes_per_second == 0 {
            return Err(ConfigError::Value("relayed_bytes_per_second is at least 1; punching = false takes none"));
        }
        if self.limits.blob_bytes > MAX_APP_BYTES {
            return Err(ConfigError::Value("blob_bytes is at most 1048576, which no blob exceeds"));
        }
        if !(1..=MAX_SILENCE).contains(&self.limits.silence_seconds) {
            return Err(ConfigError::Value("silence_seconds is at least 1 and at most 86400"));
        }
        let Limits { connections, connections_per_address, messages_per_minute, groups, .. } = self.limits;
        if connections == 0 || connections_per_address == 0 || messages_per_minute == 0 || groups == 0 {
            return Err(ConfigError::Value("a relay that takes no connection, message or group is of no use"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_means_the_defaults() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config, Config::default());
        assert!(config.is_plain() && config.is_open(), "on the loopback network everyone is of this machine");
        assert!(config.check().is_ok());
    }

    #[test]
    fn everyone_may_keep_a_group_elsewhere_only_if_the_operator_says_so() {
        let config: Config = toml::from_str("bind = '0.0.0.0:80'").unwrap();
        assert!(!config.is_open() && !config.is_plain());
        let config: Config = toml::from_str("bind = '0.0.0.0:80'\nopen = true\n[limits]\ngroups = 3").unwrap();
        assert!(config.is_open());
        assert_eq!(config.limits, Limits { groups: 3, ..Limits::default() });
    }

    #[test]
    fn devices_are_told_their_addresses_where_that_is_of_use() {
        for (text, at) in [
            ("", None),
            ("plain = false", None),
            ("bind = '0.0.0.0:443'", Some("0.0.0.0:7842")),
            ("bind = '0.0.0.0:443'\nplain = true", None),
            ("bind = '0.0.0.0:443'\naddress_discovery = false", None),
            ("bind = '0.0.0.0:443'\npunching = false", None),
            ("plain = false\naddress_discovery = true\naddress_discovery_bind = '127.0.0.1:9'", Some("127.0.0.1:9")),
        ] {
            let config: Config = toml::from_str(text).unwrap();
            assert_eq!(config.address_discovery(), at.map(|at| at.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_misspelt_or_makes_no_sense_is_refused() {
        assert!(toml::from_str::<Config>("bindd = '0.0.0.0:80'").is_err());
        for text in [
            "registration_token = ''",
            "registration_token = 'a b'",
            "host = 'a:1'",
            "sweep_seconds = 0",
            "address_discovery = true\nplain = true",
            "[limits]\nrelayed_bytes_per_second = 0",
            "cert = 'a.pem'",
            "database_ca = 'a.pem'",
            "cert = 'a.pem'\nkey = 'b.pem'\nplain = true",
            "[limits]\nblob_bytes = 2000000",
            "[limits]\nconnections = 0",
            "[limits]\nsilence_seconds = 0",
        ] {
            let config: Config = toml::from_str(text).unwrap();
            assert!(matches!(config.check(), Err(ConfigError::Value(_))), "{text}");
        }
    }

    #[test]
    fn the_largest_blob_fits_the_largest_envelope() {
        assert_eq!(Limits::default().envelope_bytes(), MAX_ENVELOPE);
        assert_eq!(Limits { blob_bytes: 0, ..Limits::default() }.envelope_bytes(), MIN_ENVELOPE);
    }
}
