//! sync-cli.
fn main() {}
