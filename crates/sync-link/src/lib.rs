//! Links and rendezvous: carries bytes between devices and finds their addresses.
//!
//! Nothing here knows a protocol or a format of Syncshell: ids, records and frames are opaque bytes.
//!
//! - [`iroh_link`] dials and accepts authenticated connections, [`frame`] cuts their streams into frames.
//! - [`punching`] has the relays at which connections between devices begin.
//! - [`relay`] opens a channel to a relay, which [`noise`] seals.
//! - [`certificates`] says which one a relay must show.
//! - [`rendezvous`] is what every way of finding a peer offers; [`same_machine`] and [`lan`] are two of them.

pub mod certificates;
pub mod frame;
pub mod iroh_link;
pub mod lan;
pub mod noise;
pub mod punching;
pub mod relay;
pub mod rendezvous;
pub mod same_machine;
