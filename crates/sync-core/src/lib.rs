//! Pure state machines: membership, what counts, what a peer lacks, sessions and connections.
//!
//! Nothing here reads a clock, draws a random number or touches the world; all of that comes in as arguments.

pub mod connection;
pub mod epochs;
pub mod feed;
pub mod folder;
pub mod judge;
pub mod membership;
pub mod pairing;
pub mod serve;
pub mod session;

pub use feed::{DroppedRange, FeedState, RangeSet, fork_digest, wants};
pub use judge::{Accepted, Held, HeldEnvelope, Judged, Origin, Refusal, Storable, judge};
pub use membership::{Admitted, Belonging, Invited, Membership, MembershipError, PendingRemoval};
pub use serve::{Own, Selection, knows_more_than_author};
