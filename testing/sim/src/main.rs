//! sync-sim.
fn main() {}
