//! A relay in a process of its own, and devices that meet there.

#![cfg(unix)]
#![cfg_attr(test, expect(clippy::unwrap_used, reason = "tests"))]

mod access;
mod attacks;
mod codes;
mod expiry;
mod joins;
mod leaks;
mod limits;
mod mailbox;
mod operate;
mod packaging;
mod postgres;
mod postgresql;
mod processes;
mod punching;
mod raw;
mod site;
mod slow;
mod tls;
mod vectors;
mod wake;
