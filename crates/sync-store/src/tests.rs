//! Tests of the whole crate, one module per behaviour.

mod durability;
mod expiry;
mod files;
mod folders;
mod log;
mod model;
mod renewal;
mod snapshots;
pub(crate) mod support;
