//! The verbs, one module each.

pub(crate) mod backup;
pub(crate) mod demo;
pub(crate) mod devices;
pub(crate) mod folders;
pub(crate) mod held;
pub(crate) mod init;
pub(crate) mod invite;
pub(crate) mod join;
pub(crate) mod leave;
pub(crate) mod members;
pub(crate) mod pair;
pub(crate) mod pause;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod relay;
pub(crate) mod rescan;
pub(crate) mod restore;
pub(crate) mod run;
pub(crate) mod select;
pub(crate) mod share;
pub(crate) mod status;
pub(crate) mod unit;
pub(crate) mod up;
pub(crate) mod versions;
