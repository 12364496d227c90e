//! sync-client.

pub mod home;
