//! A relay: keeps for devices what others of their group say while they are away, and can read none of it.
//!
//! It is a blind replica.
//! It speaks the session of `sync-core` like a device, judges membership like one, and keeps envelopes byte for byte;
//! it has no author, no epoch and no key but the one that proves which relay it is.
//!
//! `docs/relay.md` says what it sees and what it takes.

#![cfg_attr(test, expect(clippy::unwrap_used, reason = "tests"))]

mod access;
mod channel;
mod config;
mod data;
mod limiter;
mod mailbox;
mod meetings;
mod metrics;
mod operate;
mod punching;
mod relay;
mod server;
mod storage;
mod tls;
mod wake;

pub use config::{Config, ConfigError, Limits};
pub use data::DataError;
pub use operate::{OperateError, check, stats};
pub use server::{Server, StartError};
pub use storage::StorageError;
pub use tls::TlsError;
