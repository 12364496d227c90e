//! The serving end of a channel: Noise over a WebSocket, frames in it.

use std::pin::Pin;
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use bytes::Bytes;
use futures_util::SinkExt as _;
use sync_link::noise::{Handshake, NoiseError, Opener, Sealer};
use sync_types::{ErrorCode, FormatError, Frame};
use tokio::time::{Instant, Sleep};

/// Time for a peer to take what it is sent; one that reads nothing for so long is let go.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a channel is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// What came is not what the other end sent, or no handshake.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// What came is not a frame.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Text where bytes belong.
    #[error("a message of another kind")]
    Kind,
    /// It was lost, or is silent for too long.
    #[error("the channel was lost")]
    Lost,
    /// The peer takes nothing.
    #[error("the peer does not read what it is sent")]
    Unread,
}

impl ChannelError {
    /// What the peer is told, if it can hear it.
    pub(crate) fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Format(FormatError::TooMany { field: "envelope", .. }) => Some(ErrorCode::TooLarge),
            Self::Format(_) | Self::Noise(NoiseError::TooLong { .. }) => Some(ErrorCode::Protocol),
            _ => None,
        }
    }
}

/// A channel that stands.
pub(crate) struct Channel {
    socket: WebSocket,
    sealer: Sealer,
    opener: Opener,
    silence: Silence,
    pub(crate) binding: [u8; 32],
}

impl Channel {
    /// Answers a handshake.
    pub(crate) async fn accept(
        mut socket: WebSocket,
        secret: &[u8; 32],
        max_frame: usize,
        silence: Duration,
    ) -> Result<Self, ChannelError> {
        let mut silence = Silence::new(silence);
        let mut handshake = Handshake::responder(secret);
        while !handshake.is_finished() {
            if handshake.is_our_turn() {
                let message = handshake.write()?;
                write(&mut socket, vec![message]).await?;
            } else {
                let message = next(&mut socket, &mut silence).await?.ok_or(ChannelError::Lost)?;
                handshake.read(&message)?;
            }
        }
        let sync_link::noise::Channel { binding, sealer, opener, .. } = handshake.finish(max_frame)?;
        Ok(Self { socket, sealer, opener, silence, binding })
    }

    /// Bounds the frames that follow.
    pub(crate) fn set_max_frame(&mut self, max_frame: usize) {
        self.opener.set_max_frame(max_frame);
    }

    /// The next frame and how many bytes it has; none at the end. Cancel safe.
    pub(crate) async fn recv(&mut self) -> Result<Option<(Frame, usize)>, ChannelError> {
        while let Some(message) = next(&mut self.socket, &mut self.silence).await? {
            if let Some(bytes) = self.opener.open(&message)? {
                return Ok(Some((Frame::decode(&bytes)?, bytes.len())));
            }
        }
        Ok(None)
    }

    /// Sends a frame, and returns how many bytes it has.
    pub(crate) async fn send(&mut self, frame: &Frame) -> Result<usize, ChannelError> {
        let bytes = frame.encode();
        write(&mut self.socket, self.sealer.seal(&bytes)).await?;
        Ok(bytes.len())
    }

    /// Says that nothing follows.
    pub(crate) async fn close(&mut self) {
        // it may have gone already
        let _ = tokio::time::timeout(CLOSE_WAIT, self.socket.send(Message::Close(None))).await;
    }
}

/// Time for the last message to leave.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

async fn write(socket: &mut WebSocket, messages: Vec<Vec<u8>>) -> Result<(), ChannelError> {
    let writing = async {
        for message in messages {
            socket.feed(Message::Binary(message.into())).await.map_err(|_| ChannelError::Lost)?;
        }
        socket.flush().await.map_err(|_| ChannelError::Lost)
    };
    tokio::time::timeout(WRITE_TIMEOUT, writing).await.map_err(|_| ChannelError::Unread)?
}

/// How long nothing has come whole.
struct Silence {
    heard: Instant,
    /// Time after which the peer is taken for gone.
    longest: Duration,
    /// Ends when that may have passed; what comes does not touch it, since thousands of connections do that at once.
    timer: Pin<Box<Sleep>>,
}

impl Silence {
    fn new(longest: Duration) -> Self {
        Self { heard: Instant::now(), longest, timer: Box::pin(tokio::time::sleep(longest)) }
    }

    /// Ends once it is too long. Cancel safe.
    async fn too_long(&mut self) {
        loop {
            self.timer.as_mut().await;
            let end = self.heard + self.longest;
            if Instant::now() >= end {
                return;
            }
            self.timer.as_mut().reset(end);
        }
    }
}

/// The next message with content; pings are answered below this.
///
/// Part of a message is no sign of life, and neither is that this is called again: it begins no new time.
async fn next(socket: &mut WebSocket, silence: &mut Silence) -> Result<Option<Bytes>, ChannelError> {
    loop {
        let received = tokio::select! {
            biased;
            received = socket.recv() => received,
            () = silence.too_long() => return Err(ChannelError::Lost),
        };
        silence.heard = Instant::now();
        match received {
            Some(Ok(Message::Binary(bytes))) => return Ok(Some(bytes)),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_))) | None => return Ok(None),
            Some(Ok(Message::Text(_))) => return Err(ChannelError::Kind),
            Some(Err(_)) => return Err(ChannelError::Lost),
        }
    }
}
