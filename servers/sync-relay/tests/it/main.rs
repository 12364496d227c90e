//! A relay in a process of its own, and devices that meet there.

#![cfg(unix)]
#![cfg_attr(test, expect(clippy::unwrap_used, reason = "tests"))]

mod access;
mod codes;
mod expiry;
mod limits;
mod mailbox;
mod processes;
mod raw;
mod site;
mod tls;
