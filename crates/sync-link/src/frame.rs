//! Frames on a stream: a length as `u32` big-endian, then that many bytes.

use bytes::{Buf as _, Bytes, BytesMut};
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
            sender: FrameSender { stream: send, max_frame, buffer: BytesMut::new(), queue: Vec::new(), queued: 0 },
            receiver: FrameReceiver { stream: receive, max_frame, buffer: BytesMut::new() },
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
        let too_long = FrameError::TooLong { got: frame.len(), max: self.max_frame };
        if frame.len() > self.max_frame {
            return Err(too_long);
        }
        let header = u32::try_from(frame.len()).map_err(|_| too_long)?;
        self.buffer.extend_from_slice(&header.to_be_bytes());
        self.queued += HEADER_LEN + frame.len();
        if frame.len() < COPY_BELOW {
            self.buffer.extend_from_slice(&frame);
        } else {
            self.seal_buffer();
            self.queue.push(frame);
        }
        if self.queued >= WRITE_AT {
            self.flush().await?;
        }
        Ok(())
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
    /// What has arrived and belongs to frames not handed out yet.
    buffer: BytesMut,
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
            if let Some(frame) = self.take_frame()? {
                return Ok(Some(frame));
            }
            let mut chunks = [const { Bytes::new() }; CHUNKS_PER_READ];
            let Some(count) = self.stream.read_many_chunks(&mut chunks).await? else {
                return match self.buffer.len() {
                    0 => Ok(None),
                    _ => Err(FrameError::Truncated),
                };
            };
            for chunk in chunks.iter().take(count) {
                self.buffer.extend_from_slice(chunk);
            }
        }
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: u32) {
        // fails only if the stream has ended, and then there is nothing to stop
        let _ = self.stream.stop(VarInt::from_u32(code));
    }

    /// Cuts one frame off the buffer, which grows with what arrives and never with what is announced.
    fn take_frame(&mut self) -> Result<Option<Bytes>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
        if length > self.max_frame {
            return Err(FrameError::TooLong { got: length, max: self.max_frame });
        }
        if self.buffer.len() - HEADER_LEN < length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_LEN);
        Ok(Some(self.buffer.split_to(length).freeze()))
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
