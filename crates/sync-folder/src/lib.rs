//! A folder on disk: walks and watches it, cuts its files into chunks, and changes it without losing anything.
//!
//! Everything happens relative to one open directory ([`cap_std::fs::Dir`], owned by `Root`), never through a symbolic
//! link and never outside. It blocks: programs call it from threads of their own.

pub mod apply;
pub mod cut;
pub mod ignored;
pub mod root;
pub mod selection;
pub mod versions;
pub mod walk;
pub mod watch;
