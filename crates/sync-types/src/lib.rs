//! Ids, envelopes, frames and invites: every format that travels or rests, and nothing that acts.
//!
//! `docs/protocol.md` is the same in prose, byte by byte.

pub mod bounds;
pub mod charter;
pub mod envelope;
pub mod folder;
pub mod frame;
pub mod ids;
pub mod invite;
pub mod operation;
pub mod snapshot;
pub mod wire;

pub use charter::{Charter, Chunker, GroupKind, Quorum};
pub use envelope::{Class, Draft, Envelope, EnvelopeType, Header};
pub use folder::{TreePath, Vector};
pub use frame::{Carried, ErrorCode, FeedHave, Frame, Grant, Range, Scope, Want};
pub use ids::*;
pub use invite::{InviteRecord, InviteState, MemberRecord, PendingJoin, Relayed, SharedInvite, Ticket};
pub use operation::{Consent, Cut, Operation, Role, SignedOperation, succession_statement};
pub use wire::{FormatError, Reader, Writer};
