//! What an implementation in another language said to a relay, and what the relay answered, as it was recorded.
//!
//! The channel itself is replayed where it is made, in `sync-link`.

use data_encoding::HEXLOWER;
use serde_json::Value;
use sync_core::session::{Side, hello_statement};
use sync_crypto::author::{SignPurpose, verify};
use sync_types::{Envelope, Frame, GroupId};

const RECORDED: &str = include_str!("../vectors/channel.json");

struct Recorded {
    binding: [u8; 32],
    /// Frames in order, the device's and the relay's.
    frames: Vec<(String, Vec<u8>)>,
}

fn recorded() -> Recorded {
    let all: Value = serde_json::from_str(RECORDED).unwrap();
    let hex = |value: &Value| HEXLOWER.decode(value.as_str().unwrap().as_bytes()).unwrap();
    let channel = &all["relay"];
    let said = |said: &Value| (said["from"].as_str().unwrap().to_owned(), hex(&said["frame"]));
    Recorded {
        binding: hex(&channel["binding"]).try_into().unwrap(),
        frames: channel["frames"].as_array().unwrap().iter().map(said).collect(),
    }
}

#[test]
fn frames_that_another_implementation_wrote_are_ours_byte_for_byte() {
    let mut kinds = Vec::new();
    for (from, bytes) in recorded().frames {
        let frame = Frame::decode(&bytes).unwrap();
        assert_eq!(frame.encode(), bytes, "{from}: {frame:?}");
        kinds.push(bytes[1..3].to_vec());
    }
    kinds.sort();
    kinds.dedup();
    assert!(kinds.len() >= 6, "CHARTER, HELLO, PULL, PULL_RESPONSE, WELCOME and PUSH_ACK: {kinds:?}");
}

#[test]
fn the_author_that_another_implementation_proved_is_proven_on_its_channel_and_no_other() {
    let Recorded { binding, frames } = recorded();
    let mut frames = frames.iter().map(|(_, bytes)| Frame::decode(bytes).unwrap());
    let Some(Frame::Charter { charter, .. }) = frames.next() else { panic!("no CHARTER first") };
    let Some(Frame::Hello { group, author, replica, token, proof }) = frames.next() else { panic!("no HELLO next") };
    assert_eq!(group, GroupId::of(&charter));
    assert!(!token.is_empty(), "someone else let it in");
    for (binding, holds) in [(binding, true), ([0; 32], false)] {
        let statement = hello_statement(&binding, Side::Dialler, &group, &replica);
        assert_eq!(verify(&author, SignPurpose::Hello, &[&statement], &proof), holds);
    }
}

#[test]
fn every_envelope_that_a_relay_gave_another_implementation_has_its_signature_and_its_place_in_a_feed() {
    let mut count = 0;
    let mut heads = std::collections::BTreeMap::new();
    for (_, bytes) in recorded().frames {
        let Frame::PullResponse { request: 2, entries, .. } = Frame::decode(&bytes).unwrap() else { continue };
        for carried in entries {
            let envelope = Envelope::parse(&carried.envelope).unwrap();
            let (sender, number) = (envelope.header.sender, envelope.header.number);
            assert!(verify(&sender, SignPurpose::Envelope, &[envelope.signed_bytes()], envelope.signature()));
            if let Some(before) = heads.insert((sender, number.0), envelope.hash()) {
                panic!("{before:?} twice");
            }
            if let Some(before) = heads.get(&(sender, number.0 - 1)) {
                assert_eq!(envelope.header.previous, *before);
            }
            count += 1;
        }
    }
    assert!(count >= 5, "an invite, an admission and three blobs: {count}");
}
