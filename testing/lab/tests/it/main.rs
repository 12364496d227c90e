//! The real programs on hosts whose networks are made here.

#![cfg(target_os = "linux")]

mod home_routers;
