//! Devices in one process over real sockets, homes and databases, and peers that mean them ill.

mod hostile;
mod members;
mod pairs;
mod site;
