//! Frames on a stream: a length as `u32` big-endian, then that many bytes.

use std::collections::VecDeque;

pub use bytes::Bytes;
use bytes::BytesMut;
use iroh::endpoint::{ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};

use crate::iroh_link::CloseReason;

/// Both directions of a stream that carries frames.
#[derive(Debug)]
pub struct FrameStream {
    /// The direction towards the peer.
    pub sender: FrameSender,
    /// The direction from the peer.
    pub receiver: FrameReceiver,
}

impl FrameStream {
    pub(crate) fn new(send: SendStream, receive: RecvStream, max_frame: usize) -> Self {
        Self {
            sender: FrameSender {
                stream: send,
                max_frame,
                buffer: BytesMut::new(),
                queue: Vec::new(),
                queued: 0,
                owed: 0,
            },
            receiver: FrameReceiver { stream: receive, max_frame, arrived: VecDeque::new(), frame: Partial::default() },
        }
    }

    /// Splits the stream, so that two tasks may use its directions.
    pub fn split(self) -> (FrameSender, FrameReceiver) {
        (self.sender, self.receiver)
    }
}

/// Sends frames; small ones are gathered until [`flush`](Self::flush) or until enough has come together.
///
/// Dropping it finishes the stream without what was not flushed.
#[derive(Debug)]
pub struct FrameSender {
    stream: SendStream,
    max_frame: usize,
    /// Headers and small frames that follow `queue`.
    buffer: BytesMut,
    /// Bytes the stream has not taken yet, in order.
    queue: Vec<Bytes>,
    /// Bytes in `queue` and `buffer`.
    queued: usize,
    /// Bytes of the frame begun that are still to come.
    owed: usize,
}

impl FrameSender {
    /// Queues a frame and hands the queue to the stream once it holds 64 KiB.
    ///
    /// Waits while the peer does not read.
    /// Cancel safe: once polled the frame is queued as a whole, and whatever the stream has not taken stays queued; flush before sending more, or the queue grows.
    ///
    /// # Errors
    /// A frame above the bound is refused with [`FrameError::TooLong`] and the stream stays usable.
    pub async fn send(&mut self, frame: impl Into<Bytes>) -> Result<(), FrameError> {
        let frame = frame.into();
        self.begin(frame.len())?;
        self.part(frame).await
    }

    /// Begins a frame of so many bytes, which follow by [`part`](Self::part).
    ///
    /// # Errors
    /// A frame above the bound is refused with [`FrameError::TooLong`] and the stream stays usable; one that begins
    /// inside another is [`FrameError::Truncated`].
    pub fn begin(&mut self, len: usize) -> Result<(), FrameError> {
        let too_long = FrameError::TooLong { got: len, max: self.max_frame };
        if len > self.max_frame {
            return Err(too_long);
        }
        if self.owed > 0 {
            return Err(FrameError::Truncated);
        }
        let header = u32::try_from(len).map_err(|_| too_long)?;
        self.buffer.extend_from_slice(&header.to_be_bytes());
        self.queued += HEADER_LEN;
        self.owed = len;
        Ok(())
    }

    /// Queues bytes of the frame begun; waits and may be dropped like [`send`](Self::send).
    ///
    /// # Errors
    /// More than the frame announced is refused with [`FrameError::TooLong`].
    pub async fn part(&mut self, bytes: impl Into<Bytes>) -> Result<(), FrameError> {
        let bytes = bytes.into();
        let too_long = FrameError::TooLong { got: bytes.len(), max: self.owed };
        self.owed = self.owed.checked_sub(bytes.len()).ok_or(too_long)?;
        self.queued += bytes.len();
        if bytes.len() < COPY_BELOW {
            self.buffer.extend_from_slice(&bytes);
        } else {
            self.seal_buffer();
            self.queue.push(bytes);
        }
        if self.queued >= WRITE_AT {
            self.flush().await?;
        }
        Ok(())
    }

    /// Lets what is sent here wait for what the connection's other streams have to send, which is of priority 0.
    pub fn set_priority(&self, priority: i32) {
        // fails only if the stream has ended, and then nothing is sent
        let _ = self.stream.set_priority(priority);
    }

    /// Hands everything queued to the stream, which sends it without further calls.
    ///
    /// Waits while the peer does not read; cancel safe, what the stream has not taken stays queued.
    pub async fn flush(&mut self) -> Result<(), FrameError> {
        self.seal_buffer();
        while !self.queue.is_empty() {
            let before = self.queue.len();
            let mut rest = self.queue.as_mut_slice();
            let written = self.stream.write_many_chunks(&mut rest).await?;
            let done = before - rest.len();
            self.queue.drain(..done);
            self.queued -= written;
        }
        Ok(())
    }

    /// Flushes and tells the peer that nothing follows. Cancel safe.
    pub async fn finish(&mut self) -> Result<(), FrameError> {
        self.flush().await?;
        self.stream.finish().map_err(|_| FrameError::Closed)
    }

    /// Waits until the peer's machine has acknowledged everything sent before [`finish`](Self::finish).
    ///
    /// A connection closed earlier may lose the last frames. Cancel safe.
    ///
    /// # Errors
    /// [`FrameError::Refused`] if the peer stopped reading.
    pub async fn delivered(&mut self) -> Result<(), FrameError> {
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(FrameError::Refused { code: code.into_inner() }),
            Err(StoppedError::ConnectionLost(error)) => Err(FrameError::Lost(error.into())),
            Err(StoppedError::ZeroRttRejected) => Err(FrameError::Closed),
        }
    }

    fn seal_buffer(&mut self) {
        if !self.buffer.is_empty() {
            self.queue.push(self.buffer.split().freeze());
        }
    }
}

/// Receives frames.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: RecvStream,
    max_frame: usize,
    /// What has arrived and belongs to frames not begun yet.
    arrived: VecDeque<Bytes>,
    frame: Partial,
}

/// What there is of a frame.
#[derive(Debug, Default)]
struct Partial {
    header: [u8; HEADER_LEN],
    /// Bytes of the header that are there.
    headed: usize,
    /// Grows with what arrives and not with what is announced, which counts up to [`FIRST_ROOM`] only.
    bytes: Vec<u8>,
}

impl FrameReceiver {
    /// Returns the next frame, or `None` once the peer has finished.
    ///
    /// Cancel safe: what has arrived of a frame is kept here until the rest is there.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if the announced length is above the bound; it is returned again by later calls.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, FrameError> {
        loop {
            if let Some(frame) = self.frame.take_from(&mut self.arrived, self.max_frame)? {
                return Ok(Some(frame));
            }
            let mut chunks = [const { Bytes::new() }; CHUNKS_PER_READ];
            let Some(count) = self.stream.read_many_chunks(&mut chunks).await? else {
                return if self.frame.headed == 0 { Ok(None) } else { Err(FrameError::Truncated) };
            };
            self.arrived.extend(chunks.into_iter().take(count));
        }
    }

    /// Bounds the frames that follow.
    pub fn set_max_frame(&mut self, max_frame: usize) {
        self.max_frame = max_frame;
    }

    /// Bytes that have arrived of the frame that is awaited: whether a slow peer sends at all.
    pub fn progress(&self) -> usize {
        self.frame.headed + self.frame.bytes.len()
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: u32) {
        // fails only if the stream has ended, and then there is nothing to stop
        let _ = self.stream.stop(VarInt::from_u32(code));
    }
}

impl Partial {
    /// Takes bytes until a frame is whole.
    fn take_from(&mut self, arrived: &mut VecDeque<Bytes>, max: usize) -> Result<Option<Bytes>, FrameError> {
        loop {
            if self.headed == HEADER_LEN {
                let length = usize::try_from(u32::from_be_bytes(self.header)).unwrap_or(usize::MAX);
                if length > max {
                    return Err(FrameError::TooLong { got: length, max });
                }
                let missing = length - self.bytes.len();
                if missing == 0 {
                    self.headed = 0;
                    return Ok(Some(std::mem::take(&mut self.bytes).into()));
                }
                let Some(chunk) = arrived.front_mut() else { return Ok(None) };
                let taken = chunk.split_to(chunk.len().min(missing));
                self.make_room(taken.len(), length);
                self.bytes.extend_from_slice(&taken);
            } else {
                let Some(chunk) = arrived.front_mut() else { return Ok(None) };
                let taken = chunk.split_to(chunk.len().min(HEADER_LEN - self.headed));
                self.header[self.headed..self.headed + taken.len()].copy_from_slice(&taken);
                self.headed += taken.len();
            }
            if arrived.front().is_some_and(Bytes::is_empty) {
                arrived.pop_front();
            }
        }
    }

    /// Makes room for bytes that are there, and for as many again.
    fn make_room(&mut self, more: usize, length: usize) {
        let needed = self.bytes.len() + more;
        if needed > self.bytes.capacity() {
            let capacity = needed.max(2 * self.bytes.capacity()).max(FIRST_ROOM).min(length);
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
    }
}

/// Why a frame could not be sent or received.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A frame, or its announcement, is above the bound.
    #[error("frame of {got} bytes, at most {max} are allowed")]
    TooLong {
        /// The length found.
        got: usize,
        /// The bound.
        max: usize,
    },
    /// The peer finished the stream in the middle of a frame.
    #[error("stream ended inside a frame")]
    Truncated,
    /// The peer gave up its direction of the stream.
    #[error("stream reset by the peer with code {code}")]
    Reset {
        /// What the peer gave as its reason.
        code: u64,
    },
    /// The peer reads no further.
    #[error("peer stopped reading with code {code}")]
    Refused {
        /// What the peer gave as its reason.
        code: u64,
    },
    /// The connection is gone.
    #[error("connection lost: {0}")]
    Lost(#[source] CloseReason),
    /// This direction was already finished or stopped here.
    #[error("stream is closed")]
    Closed,
}

impl From<ReadError> for FrameError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Reset { code: code.into_inner() },
            ReadError::ConnectionLost(error) => Self::Lost(error.into()),
            ReadError::ClosedStream | ReadError::ZeroRttRejected => Self::Closed,
        }
    }
}

impl From<WriteError> for FrameError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Refused { code: code.into_inner() },
            WriteError::ConnectionLost(error) => Self::Lost(error.into()),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Closed,
        }
    }
}

/// Bytes of a frame's length.
const HEADER_LEN: usize = 4;

/// Frames below this are copied together; above, sharing the allocation is cheaper than a copy.
const COPY_BELOW: usize = 16 * 1024;

/// A queue of this many bytes is handed to the stream: enough to fill a batch of packets, too little to matter in memory.
const WRITE_AT: usize = 64 * 1024;

/// Chunks taken from the stream under one lock; each is about one packet, so this is one receive batch.
const CHUNKS_PER_READ: usize = 64;

/// Room made for the first bytes of a frame: what a stream of small frames needs, too little to matter if nothing follows.
const FIRST_ROOM: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn framed(frames: &[Vec<u8>]) -> Vec<u8> {
        let header = |frame: &Vec<u8>| u32::try_from(frame.len()).expect("short").to_be_bytes();
        frames.iter().flat_map(|frame| [&header(frame)[..], frame].concat()).collect()
    }

    proptest! {
        #[test]
        fn frames_are_the_same_however_their_bytes_arrive(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..8),
            pieces in proptest::collection::vec(1_usize..500, 1..40),
        ) {
            let mut rest = Bytes::from(framed(&frames));
            let mut partial = Partial::default();
            let mut arrived = VecDeque::new();
            let mut got = Vec::new();
            for piece in pieces.iter().cycle() {
                while let Some(frame) = partial.take_from(&mut arrived, 300).expect("within the bound") {
                    got.push(frame.to_vec());
                }
                prop_assert!(arrived.is_empty());
                if rest.is_empty() {
                    break;
                }
                arrived.push_back(rest.split_to(rest.len().min(*piece)));
            }
            prop_assert_eq!(partial.headed, 0);
            prop_assert_eq!(got, frames);
        }
    }

    #[test]
    fn room_is_made_for_what_arrives_and_not_for_what_is_announced() {
        let announced = u32::try_from(64 << 20).expect("fits").to_be_bytes();
        let mut partial = Partial::default();
        let mut arrived = VecDeque::from([Bytes::copy_from_slice(&announced), Bytes::from(vec![1; 100])]);
        assert_eq!(partial.take_from(&mut arrived, usize::MAX), Ok(None));
        assert!(partial.bytes.capacity() <= FIRST_ROOM);
        arrived.push_back(Bytes::from(vec![1; 1 << 20]));
        assert_eq!(partial.take_from(&mut arrived, usize::MAX), Ok(None));
        assert!(partial.bytes.capacity() <= 3 << 20);
    }
}
