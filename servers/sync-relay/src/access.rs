//! Who may come in: judged on what a device shows, before anything is looked up.

use std::convert::Infallible;

use sync_core::session::{Side, hello_statement};
use sync_core::{Held, HeldEnvelope, Membership, Origin, judge};
use sync_crypto::author::{SignPurpose, verify};
use sync_types::{AuthorId, Class, Envelope, Frame, GroupId, Number, ReplicaId};

use crate::punching::Pass;

/// What a device shows first: CHARTER, and then HELLO.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) group: GroupId,
    pub(crate) author: AuthorId,
    pub(crate) charter: Vec<u8>,
    pub(crate) registration: Vec<u8>,
    /// What its device shows where connections begin, if it wants to.
    pub(crate) pass: Option<Pass>,
    /// For the session, which judges it once more against everything that is known of the group.
    pub(crate) hello: Frame,
}

/// Holds nothing: what is judged counts by itself.
struct Nothing;

impl Held for Nothing {
    type Error = Infallible;

    fn highest(&mut self, _: &AuthorId) -> Result<Option<Number>, Infallible> {
        Ok(None)
    }

    fn at(&mut self, _: &AuthorId, _: Number) -> Result<Vec<HeldEnvelope>, Infallible> {
        Ok(Vec::new())
    }

    fn is_dropped(&mut self, _: &AuthorId, _: Number) -> Result<bool, Infallible> {
        Ok(false)
    }
}

/// What a device shows, if its token makes it a member of the group whose charter it is and the proof is this channel's.
///
/// Whether the group is known here makes no difference, so that nobody learns it by asking.
pub(crate) fn examine(charter: Frame, hello: Frame, binding: &[u8; 32]) -> Option<Shown> {
    let Frame::Charter { charter, registration, pass } = charter else { return None };
    let Frame::Hello { group, author, replica, token, proof } = hello else { return None };
    let mut membership = Membership::new(&charter).ok()?;
    let proven = is_proven(&group, &author, &replica, &proof, binding);
    if membership.group() != group || !proven {
        return None;
    }
    let operations: Vec<Vec<u8>> = token
        .iter()
        .filter(|bytes| Envelope::parse(bytes).is_ok_and(|envelope| envelope.header.class == Class::Membership))
        .cloned()
        .collect();
    let Ok(_) = judge(&group, &mut membership, &mut Nothing, Origin::Unproven, &operations);
    let hello = Frame::Hello { group, author, replica, token, proof };
    membership.is_admitted(&author).then_some(Shown { group, author, charter, registration, pass, hello })
}

fn is_proven(group: &GroupId, author: &AuthorId, replica: &ReplicaId, proof: &[u8; 64], binding: &[u8; 32]) -> bool {
    verify(author, SignPurpose::Hello, &[&hello_statement(binding, Side::Dialler, group, replica)], proof)
}
