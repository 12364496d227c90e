//! The verbs, one module each.

pub(crate) mod demo;
pub(crate) mod init;
pub(crate) mod pair;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod run;
pub(crate) mod status;
