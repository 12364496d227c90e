//! The command as a program under measurement: homes as real processes, and the trees they are given.
//!
//! `sync-soak` and `sync-bench folders` both stand on this; neither uses the client's code, only the command.

pub mod command;
#[cfg(target_os = "linux")]
pub mod faults;
pub mod random;
pub mod tree;
