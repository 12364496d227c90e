//! Whole groups in one process from one seed, on the real database over a disk that forgets what was not synced.
//!
//! A seed draws a [`action::Recording`]; a [`world::World`] carries it out in virtual time, without threads and without
//! a clock, so that the same recording always leads to the same trace.
//! After every step and at the end it checks the invariants that [`ledger`] names.

pub mod action;
mod folder;
pub mod ledger;
mod liar;
pub mod random;
mod replica;
pub mod run;
pub mod tree;
#[expect(unsafe_code, reason = "an SQLite VFS is a table of C functions")]
pub mod vfs;
pub mod world;
