//! Answering peers that ask for chunks: reading, compressing and sending overlap.

use std::sync::Arc;

use sync_link::frame::{FrameError, FrameReceiver, FrameSender, FrameStream};
use sync_link::iroh_link::Connection;
use sync_types::GroupId;
use sync_types::bounds::{MAX_CHUNK, MAX_CHUNK_FRAME, MAX_CHUNKS_ASKED};
use sync_types::folder::ChunkFrame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{BULK_PRIORITY, ChunkSource, PACED_PIECE, Pace};
use crate::group::Group;

/// Streams of one peer that are answered beside each other; more wait.
const MAX_STREAMS: usize = 4;
/// Bytes read ahead for one peer, on all its streams.
const READ_AHEAD: u32 = 16 << 20;
/// Bytes read in one go: enough that changing threads weighs nothing, little enough that sending starts soon.
const READ_BYTES: usize = 1 << 20;
/// What one go may read, as the last chunk may be a large one.
const READ_MOST: u32 = 6 << 20;
const _: () = assert!(READ_MOST as u64 > READ_BYTES as u64 + MAX_CHUNK_FRAME as u64);
/// Goes that wait to be sent; their bytes are bounded by [`READ_AHEAD`].
const READ_GOES: usize = 16;
/// A frame that asks, the longest there is: 34 bytes for each hash.
const MAX_ASK_FRAME: usize = 64 + 34 * MAX_CHUNKS_ASKED;
/// Bytes that are tried for whether they compress at all.
const SAMPLE: usize = 64 << 10;
/// Code with which a stream ends whose peer does not keep to the protocol.
const STOP_PROTOCOL: u32 = 1;

/// Answers on streams that the peer opens, until the session ends.
pub(super) async fn run(group: Arc<Group>, connection: Connection, cancel: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_STREAMS));
    let ahead = Arc::new(Semaphore::new(READ_AHEAD as usize));
    let mut streams = JoinSet::new();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.ok()?;
            let stream = connection.accept_stream(MAX_CHUNK_FRAME).await.ok()?;
            Some((place, stream))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            Some(_) = streams.join_next() => continue,
            () = cancel.cancelled() => return,
        };
        let Some((place, stream)) = accepted else { return };
        let (group, ahead) = (group.clone(), ahead.clone());
        streams.spawn(async move {
            let _place = place;
            if let Err(reason) = answer(&group, stream, ahead).await {
                group.count_refused(1);
                tracing::debug!(%reason, "stream for chunks refused");
            }
        });
    }
}

/// Answers on one stream; the reason if the peer does not keep to the protocol.
async fn answer(group: &Group, stream: FrameStream, ahead: Arc<Semaphore>) -> Result<(), String> {
    let (sender, mut receiver) = stream.split();
    receiver.set_max_frame(MAX_ASK_FRAME);
    sender.set_priority(BULK_PRIORITY);
    let (goes, waiting) = mpsc::channel(READ_GOES);
    let sending = send(sender, waiting, group.chunks.paces().serving);
    let reading = async {
        let read = read_asked(group, &mut receiver, goes, ahead).await;
        if read.is_err() {
            receiver.stop(STOP_PROTOCOL);
        }
        read
    };
    tokio::pin!(sending);
    tokio::select! {
        read = reading => {
            read?;
            sending.await;
        }
        () = &mut sending => {}
    }
    Ok(())
}

/// Frames read in one go, and the room they take.
struct Go {
    frames: Vec<Vec<u8>>,
    _room: OwnedSemaphorePermit,
}

async fn read_asked(
    group: &Group,
    receiver: &mut FrameReceiver,
    goes: mpsc::Sender<Go>,
    ahead: Arc<Semaphore>,
) -> Result<(), String> {
    loop {
        let hashes = match receiver.recv().await {
            Ok(Some(bytes)) => match ChunkFrame::decode(&bytes) {
                Ok(ChunkFrame::Ask { hashes }) => hashes,
                Ok(_) => return Err("an answer to nothing".to_owned()),
                Err(error) => return Err(error.to_string()),
            },
            Err(error @ (FrameError::TooLong { .. } | FrameError::Truncated)) => return Err(error.to_string()),
            Ok(None) | Err(_) => return Ok(()),
        };
        let hashes: Arc<[_]> = hashes.into();
        let mut done = 0;
        while done < hashes.len() {
            let Ok(mut room) = ahead.clone().acquire_many_owned(READ_MOST).await else { return Ok(()) };
            let (source, id, rest) = (group.chunks.source(), group.id, hashes.clone());
            let job = tokio::task::spawn_blocking(move || read_some(source.as_deref(), &id, &rest[done..]));
            // only a panic of the source's, which has been told
            let Ok(frames) = job.await else { return Ok(()) };
            done += frames.len();
            let bytes = frames.iter().map(Vec::len).sum::<usize>();
            let kept = u32::try_from(bytes).unwrap_or(u32::MAX).min(READ_MOST);
            let room = match room.split(kept as usize) {
                Some(kept) => kept,
                None => room,
            };
            if goes.send(Go { frames, _room: room }).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Reads chunks until there are enough for one go.
fn read_some(source: Option<&dyn ChunkSource>, group: &GroupId, hashes: &[[u8; 32]]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut bytes = 0;
    for hash in hashes {
        let chunk = source.and_then(|source| source.read(group, hash));
        let frame = chunk.and_then(frame_of).unwrap_or(ChunkFrame::Missing).encode();
        bytes += frame.len();
        frames.push(frame);
        if bytes >= READ_BYTES {
            break;
        }
    }
    frames
}

/// The answer that carries a chunk; none if it is longer than chunks are.
fn frame_of(chunk: Vec<u8>) -> Option<ChunkFrame> {
    let len = u32::try_from(chunk.len()).ok().filter(|len| u64::from(*len) <= MAX_CHUNK)?;
    Some(match compress(&chunk) {
        Some(bytes) => ChunkFrame::Chunk { codec: 1, len, bytes },
        None => ChunkFrame::Chunk { codec: 0, len, bytes: chunk },
    })
}

/// The chunk as an LZ4 block, where that is worth opening it again.
fn compress(chunk: &[u8]) -> Option<Vec<u8>> {
    let pays = |from: &[u8], to: &[u8]| to.len() < from.len() - from.len() / 20;
    let sample = &chunk[..chunk.len().min(SAMPLE)];
    let compressed = lz4_flex::block::compress(sample);
    if !pays(sample, &compressed) {
        return None;
    }
    if sample.len() == chunk.len() {
        return Some(compressed);
    }
    Some(lz4_flex::block::compress(chunk)).filter(|compressed| pays(chunk, compressed))
}

/// Sends what was read, and flushes when nothing waits.
async fn send(mut sender: FrameSender, mut goes: mpsc::Receiver<Go>, pace: Arc<Pace>) {
    let sent: Result<(), FrameError> = async {
        while let Some(go) = goes.recv().await {
            for frame in go.frames {
                send_frame(&mut sender, frame, &pace).await?;
            }
            if goes.is_empty() {
                sender.flush().await?;
            }
        }
        sender.finish().await
    }
    .await;
    if let Err(error) = sent {
        tracing::debug!(%error, "peer takes no more chunks");
    }
}

async fn send_frame(sender: &mut FrameSender, frame: Vec<u8>, pace: &Pace) -> Result<(), FrameError> {
    if !pace.is_limited() {
        return sender.send(frame).await;
    }
    sender.begin(frame.len())?;
    for piece in frame.chunks(PACED_PIECE) {
        pace.take(piece.len()).await;
        sender.part(piece.to_vec()).await?;
        sender.flush().await?;
    }
    Ok(())
}
