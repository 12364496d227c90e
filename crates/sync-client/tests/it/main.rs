//! Devices in one process over real sockets, homes and databases, and peers that mean them ill.

mod backup;
mod chunks;
mod files;
mod folders;
mod hostile;
mod members;
mod pairing_attacks;
mod pairs;
mod reconnect;
mod site;
mod snapshots;
