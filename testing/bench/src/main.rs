//! sync-bench.
fn main() {}
