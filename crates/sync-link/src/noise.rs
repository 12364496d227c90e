//! A channel to a relay: Noise XX over messages, and frames in it.
//!
//! Each WebSocket message carries one Noise message.
//! The first three are the handshake, without payload; every later one is one byte and a part of a frame.
//! The byte is 1 if more of the frame follows, and 0 at its end.
//!
//! Nothing here does I/O: messages come in and go out as bytes, so that both ends and every test share it.

use std::sync::Arc;

use bytes::Bytes;
use snow::{Builder, HandshakeState, StatelessTransportState};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// The suite.
const SUITE: &str = "Noise_XX_25519_ChaChaPoly_BLAKE2s";
/// What both ends must mean alike before anything else.
const PROLOGUE: &[u8] = b"syncshell relay v1";
/// Bytes of a Noise message at most.
pub const MAX_MESSAGE: usize = 65_535;
/// Bytes that a message has beyond what it seals.
const TAG: usize = 16;
/// Bytes of a frame in one message.
pub const MAX_PART: usize = MAX_MESSAGE - TAG - 1;

const LAST: u8 = 0;
const MORE: u8 = 1;

/// Why a channel cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoiseError {
    /// A message of the handshake is not what it should be.
    #[error("handshake message does not verify")]
    Handshake,
    /// A message was changed, lost, repeated or reordered.
    #[error("message does not open")]
    Message,
    /// A frame is longer than the bound.
    #[error("frame of more than {max} bytes")]
    TooLong {
        /// The bound.
        max: usize,
    },
}

/// The public key of a secret.
#[must_use]
pub fn public_key(secret: &[u8; 32]) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from(*secret)).to_bytes()
}

/// A handshake under way. Messages alternate, the initiator's first.
pub struct Handshake {
    state: HandshakeState,
}

impl std::fmt::Debug for Handshake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshake").field("initiator", &self.state.is_initiator()).finish_non_exhaustive()
    }
}

impl Handshake {
    /// The end that opens the channel.
    #[must_use]
    pub fn initiator(secret: &[u8; 32]) -> Self {
        Self { state: builder(secret).build_initiator().expect("BUG: the suite is complete") }
    }

    /// The other end.
    #[must_use]
    pub fn responder(secret: &[u8; 32]) -> Self {
        Self { state: builder(secret).build_responder().expect("BUG: the suite is complete") }
    }

    /// Whether the next message is ours to send.
    #[must_use]
    pub fn is_our_turn(&self) -> bool {
        self.state.is_my_turn() && !self.is_finished()
    }

    /// Whether both sides have all messages.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.state.is_handshake_finished()
    }

    /// The next message to send.
    pub fn write(&mut self) -> Result<Vec<u8>, NoiseError> {
        let mut message = vec![0; HANDSHAKE_BYTES];
        let len = self.state.write_message(&[], &mut message).map_err(|_| NoiseError::Handshake)?;
        message.truncate(len);
        Ok(message)
    }

    /// Takes in a message; one with a payload is refused.
    pub fn read(&mut self, message: &[u8]) -> Result<(), NoiseError> {
        let mut payload = [0; HANDSHAKE_BYTES];
        if message.len() > HANDSHAKE_BYTES {
            return Err(NoiseError::Handshake);
        }
        match self.state.read_message(message, &mut payload) {
            Ok(0) => Ok(()),
            _ => Err(NoiseError::Handshake),
        }
    }

    /// The channel, once the handshake is finished.
    pub fn finish(self, max_frame: usize) -> Result<Channel, NoiseError> {
        let key = self.state.get_remote_static().and_then(|key| key.try_into().ok()).ok_or(NoiseError::Handshake)?;
        let binding = self.state.get_handshake_hash().try_into().map_err(|_| NoiseError::Handshake)?;
        let state = self.state.into_stateless_transport_mode().map_err(|_| NoiseError::Handshake)?;
        let state = Arc::new(state);
        let opener = Opener { state: state.clone(), nonce: 0, partial: Vec::new(), max_frame };
        Ok(Channel { key, binding, sealer: Sealer { state, nonce: 0 }, opener })
    }
}

/// Bytes of the longest handshake message, which has two sealed keys.
const HANDSHAKE_BYTES: usize = 128;

fn builder(secret: &[u8; 32]) -> Builder<'_> {
    let params = SUITE.parse().expect("BUG: the suite's name parses");
    let builder = Builder::new(params).local_private_key(secret).expect("BUG: set once");
    builder.prologue(PROLOGUE).expect("BUG: set once")
}

/// A channel that stands.
#[derive(Debug)]
pub struct Channel {
    /// The other end's key, which the handshake has proven.
    pub key: [u8; 32],
    /// The same on both ends and on no other channel.
    pub binding: [u8; 32],
    /// Our direction.
    pub sealer: Sealer,
    /// Theirs.
    pub opener: Opener,
}

/// Turns frames into messages.
pub struct Sealer {
    state: Arc<StatelessTransportState>,
    nonce: u64,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sealer({} messages)", self.nonce)
    }
}

impl Sealer {
    /// The messages of a frame, to be sent in order.
    pub fn seal(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        let mut parts: Vec<&[u8]> = frame.chunks(MAX_PART).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        let last = parts.len() - 1;
        let seal = |(at, part): (usize, &[u8])| {
            let mut plain = Zeroizing::new(Vec::with_capacity(part.len() + 1));
            plain.push(if at == last { LAST } else { MORE });
            plain.extend_from_slice(part);
            let mut message = vec![0; plain.len() + TAG];
            let sealed = self.state.write_message(self.nonce, &plain, &mut message);
            let len = sealed.expect("BUG: the message fits, and 2^64 of them are never sent");
            message.truncate(len);
            self.nonce += 1;
            message
        };
        parts.into_iter().enumerate().map(seal).collect()
    }
}

/// Turns messages into frames.
pub struct Opener {
    state: Arc<StatelessTransportState>,
    nonce: u64,
    /// What has come of a frame.
    partial: Vec<u8>,
    max_frame: usize,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opener({} messages)", self.nonce)
    }
}

impl Opener {
    /// Takes in a message; a frame if it was the last of one. After an error the channel is of no use.
    pub fn open(&mut self, message: &[u8]) -> Result<Option<Bytes>, NoiseError> {
        if message.len() > MAX_MESSAGE {
            return Err(NoiseError::Message);
        }
        let mut plain = Zeroizing::new(vec![0; message.len()]);
        let len = self.state.read_message(self.nonce, message, &mut plain).map_err(|_| NoiseError::Message)?;
        self.nonce += 1;
        let Some((flag, part)) = plain[..len].split_first() else { return Err(NoiseError::Message) };
        if self.partial.len() + part.len() > self.max_frame {
            return Err(NoiseError::TooLong { max: self.max_frame });
        }
        match *flag {
            LAST if self.partial.is_empty() => Ok(Some(Bytes::copy_from_slice(part))),
            LAST => {
                self.partial.extend_from_slice(part);
                Ok(Some(std::mem::take(&mut self.partial).into()))
            }
            // a frame in parts has full ones, or they would cost more than they carry
            MORE if part.len() == MAX_PART => {
                self.partial.extend_from_slice(part);
                Ok(None)
            }
            _ => Err(NoiseError::Message),
        }
    }

    /// Bounds the frames that follow.
    pub fn set_max_frame(&mut self, max_frame: usize) {
        self.max_frame = max_frame;
    }
}

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// What `cargo xtask interop` recorded of an implementation in another language.
    const RECORDED: &str = include_str!("../../../servers/sync-relay/tests/vectors/channel.json");

    /// Two ends whose handshake is done.
    fn pair(max_frame: usize) -> (Channel, Channel) {
        let (mut here, mut there) = (Handshake::initiator(&[1; 32]), Handshake::responder(&[2; 32]));
        while !(here.is_finished() && there.is_finished()) {
            if here.is_our_turn() {
                there.read(&here.write().expect("ours")).expect("theirs");
            } else {
                here.read(&there.write().expect("theirs")).expect("ours");
            }
        }
        (here.finish(max_frame).expect("finished"), there.finish(max_frame).expect("finished"))
    }

    fn carry(from: &mut Sealer, to: &mut Opener, frame: &[u8]) -> Bytes {
        let mut messages = from.seal(frame);
        let last = messages.pop().expect("one at least");
        for message in messages {
            assert!(message.len() <= MAX_MESSAGE);
            assert_eq!(to.open(&message), Ok(None));
        }
        to.open(&last).expect("opens").expect("the last")
    }

    #[test]
    fn both_ends_know_each_other_and_share_a_binding() {
        let (here, there) = pair(10);
        assert_eq!((here.key, there.key), (public_key(&[2; 32]), public_key(&[1; 32])));
        assert_eq!(here.binding, there.binding);
        assert_ne!(here.binding, pair(10).0.binding, "no two channels have the same");
    }

    #[test]
    fn the_handshake_messages_have_the_sizes_of_the_specification() {
        let (mut here, mut there) = (Handshake::initiator(&[1; 32]), Handshake::responder(&[2; 32]));
        let first = here.write().expect("ours");
        there.read(&first).expect("theirs");
        let second = there.write().expect("theirs");
        here.read(&second).expect("ours");
        let third = here.write().expect("ours");
        assert_eq!((first.len(), second.len(), third.len()), (32, 96, 64));
    }

    #[test]
    fn frames_of_any_length_come_whole_and_both_ways() {
        let (mut here, mut there) = pair(1 << 20);
        for len in [0, 1, MAX_PART - 1, MAX_PART, MAX_PART + 1, 3 * MAX_PART, 1 << 20] {
            let frame: Vec<u8> = (0..=255).cycle().take(len).collect();
            assert_eq!(carry(&mut here.sealer, &mut there.opener, &frame), frame);
            assert_eq!(carry(&mut there.sealer, &mut here.opener, &frame), frame);
        }
    }

    #[test]
    fn a_frame_beyond_the_bound_is_refused_before_it_is_whole() {
        let (mut here, mut there) = pair(MAX_PART + 10);
        let messages = here.sealer.seal(&vec![0; 3 * MAX_PART]);
        assert_eq!(there.opener.open(&messages[0]), Ok(None));
        assert_eq!(there.opener.open(&messages[1]), Err(NoiseError::TooLong { max: MAX_PART + 10 }));
    }

    #[test]
    fn a_message_that_was_lost_repeated_reordered_or_turned_around_does_not_open() {
        for order in [&[1][..], &[0, 0], &[0, 2]] {
            let (mut here, mut there) = pair(100);
            let messages: Vec<_> = (0..3).flat_map(|n| here.sealer.seal(&[n])).collect();
            let (wrong, right) = order.split_last().expect("one at least");
            for &at in right {
                there.opener.open(&messages[at]).expect("in order");
            }
            assert_eq!(there.opener.open(&messages[*wrong]), Err(NoiseError::Message), "{order:?}");
        }
        let (mut here, _) = pair(100);
        let own = here.sealer.seal(b"x");
        assert_eq!(here.opener.open(&own[0]), Err(NoiseError::Message));
    }

    #[test]
    fn short_parts_and_unknown_marks_are_refused() {
        for plain in [&[][..], &[MORE], &[MORE, 1, 2], &[2, 1]] {
            let (here, mut there) = pair(100);
            let mut message = vec![0; plain.len() + TAG];
            here.sealer.state.write_message(0, plain, &mut message).expect("sealed");
            assert_eq!(there.opener.open(&message), Err(NoiseError::Message), "{plain:?}");
        }
    }

    /// One of the recorded channels.
    fn recorded(name: &str) -> Value {
        let mut all: Value = serde_json::from_str(RECORDED).expect("JSON");
        all[name].take()
    }

    fn hex(value: &Value) -> Vec<u8> {
        HEXLOWER.decode(value.as_str().expect("text").as_bytes()).expect("hex")
    }

    fn list(value: &Value) -> &[Value] {
        value.as_array().expect("a list")
    }

    /// An end with the keys that the recorded one had.
    fn again(channel: &Value, end: &str) -> Handshake {
        let key = |what: &str| <[u8; 32]>::try_from(hex(&channel[format!("{end}_{what}")])).expect("a key");
        let (secret, ephemeral) = (key("static"), key("ephemeral"));
        let builder = builder(&secret).fixed_ephemeral_key_for_testing_only(&ephemeral);
        let built = if end == "device" { builder.build_initiator() } else { builder.build_responder() };
        Handshake { state: built.expect("the suite is complete") }
    }

    /// Writes the recorded messages of a handshake that are this end's, and reads the others.
    fn shake(mut end: Handshake, channel: &Value) -> Channel {
        for message in list(&channel["handshake"]) {
            let message = hex(message);
            if end.is_our_turn() {
                assert_eq!(end.write().expect("ours"), message);
            } else {
                end.read(&message).expect("theirs");
            }
        }
        let done = end.finish(4 << 20).expect("finished");
        assert_eq!(done.binding.to_vec(), hex(&channel["binding"]));
        done
    }

    #[test]
    fn a_channel_of_another_implementation_with_a_relay_is_the_same_here_byte_for_byte() {
        let channel = recorded("relay");
        let mut device = shake(again(&channel, "device"), &channel);
        assert_eq!(device.key.to_vec(), hex(&channel["relay_key"]));
        let mut heard = 0;
        for said in list(&channel["frames"]) {
            let (frame, messages) = (hex(&said["frame"]), list(&said["messages"]));
            if said["from"] == "device" {
                let sealed = device.sealer.seal(&frame);
                assert_eq!(sealed, messages.iter().map(hex).collect::<Vec<_>>());
            } else {
                let opened = messages.iter().filter_map(|message| device.opener.open(&hex(message)).expect("opens"));
                assert_eq!(opened.collect::<Vec<_>>(), [frame]);
                heard += 1;
            }
        }
        assert!(heard > 2, "{heard}");
    }

    #[test]
    fn both_ends_of_another_implementation_s_channel_are_the_same_here_byte_for_byte() {
        let channel = recorded("both_ends");
        let (mut device, mut relay) =
            (shake(again(&channel, "device"), &channel), shake(again(&channel, "relay"), &channel));
        for said in list(&channel["frames"]) {
            let length = said["length"].as_u64().expect("a number");
            let frame: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).expect("below 251")).collect();
            let (from, to) =
                if said["from"] == "device" { (&mut device, &mut relay) } else { (&mut relay, &mut device) };
            let sealed = from.sealer.seal(&frame);
            let hashes: Vec<String> = sealed.iter().map(|message| blake3::hash(message).to_string()).collect();
            assert_eq!(list(&said["messages"]), hashes);
            let opened = sealed.iter().filter_map(|message| to.opener.open(message).expect("opens"));
            assert_eq!(opened.collect::<Vec<_>>(), [frame]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_a_handshake_or_a_channel_in_order(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Handshake::responder(&[1; 32]).read(&bytes);
            let mut initiator = Handshake::initiator(&[1; 32]);
            initiator.write().expect("ours");
            prop_assert!(initiator.read(&bytes).is_err());
            let (_, mut there) = pair(100);
            prop_assert!(there.opener.open(&bytes).is_err());
        }
    }
}
