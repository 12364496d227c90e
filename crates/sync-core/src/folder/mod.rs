//! What devices make of a folder's records: which version counts, what is to happen on a disk, and when to ask first.
//!
//! [`Versions`] is what the group says about one path, [`Disk`] what lies there; [`decide`] compares the two and
//! [`plan`] puts the decisions of many paths in an order in which they can be carried out. `docs/folders.md` is the
//! design in prose.
//!
//! **Invariant:** what a device keeps of a path is a function of the set of versions it was given, whatever their
//! order, and what is decided is a function of that and of what lies on its disk.

pub mod conflict;
pub mod guard;
pub mod merge;
pub mod reconcile;
pub mod snapshot;
pub mod version;

pub use conflict::{conflict_path, moved_aside, settle};
pub use guard::{Counts, Guard, Verdict};
pub use merge::merge;
pub use reconcile::{
    Action, Change, Direction, Disk, Displaced, Held, Operation, Over, Plan, Seen, basis, decide, overtaken, plan,
    revert,
};
pub use snapshot::Coverage;
pub use version::{Reissue, Version, Versions};

#[cfg(test)]
mod tests;
