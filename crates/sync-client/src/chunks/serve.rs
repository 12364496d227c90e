//! Answering peers that ask for chunks: reading, compressing and sending overlap.

use std::sync::Arc;

use sync_link::frame::{FrameError, FrameReceiver, FrameSender, FrameStream};
use sync_link::iroh_link::Connection;
use sync_types::GroupId;
use sync_types::bounds::{MAX_CHUNK, MAX_CHUNK_FRAME, MAX_CHUNKS_ASKED, MAX_KEPT, MAX_PATH};
use sync_types::folder::ChunkFrame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::wire::Packed;
use super::{BULK_PRIORITY, ChunkSource, PACED_PIECE, Pace};
use crate::group::Group;

/// Streams of one peer that are answered beside each other, two for each folder; more wait. One that is idle costs little,
/// and all share what is read ahead.
const MAX_STREAMS: usize = 64;
/// Bytes read ahead for one peer, on all its streams.
const READ_AHEAD: u32 = 16 << 20;
/// Bytes read in one go: enough that changing threads weighs nothing, little enough that sending starts soon.
const READ_BYTES: usize = 1 << 20;
/// What one go may read, as the last chunk may be a large one.
const READ_MOST: u32 = 5 << 20;
const _: () = assert!(READ_MOST as u64 >= READ_BYTES as u64 + MAX_CHUNK);
/// Reads that wait to be sent; their bytes are bounded by [`READ_AHEAD`].
const READ_GOES: usize = 16;
/// A frame that asks, the longest there is: 34 bytes for each hash.
const MAX_ASK_FRAME: usize = 64 + 34 * MAX_CHUNKS_ASKED;
const _: () = assert!(MAX_ASK_FRAME > 64 + MAX_PATH);
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

/// Answers read in one go, and the room they take.
struct Go {
    answers: Answers,
    _room: OwnedSemaphorePermit,
}

/// What is answered in one go.
enum Answers {
    /// Chunks, none for each that is not to be had.
    Chunks(Vec<Option<Packed>>),
    /// Another frame.
    Frame(Vec<u8>),
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
                Ok(ChunkFrame::AskKept { folder, path }) => {
                    let Ok(mut room) = ahead.clone().acquire_many_owned(READ_MOST).await else { return Ok(()) };
                    let (source, id) = (group.chunks.source(), group.id);
                    let look = move || source.map_or_else(Vec::new, |source| source.kept(&id, &folder, &path));
                    let Ok(mut files) = tokio::task::spawn_blocking(look).await else { return Ok(()) };
                    files.truncate(MAX_KEPT);
                    let frame = ChunkFrame::Kept { files }.encode();
                    drop(room.split((READ_MOST as usize).saturating_sub(frame.len())));
                    if goes.send(Go { answers: Answers::Frame(frame), _room: room }).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
                Ok(_) => return Err("an answer to nothing".to_owned()),
                Err(error) => return Err(error.to_string()),
            },
            Err(error @ FrameError::TooLong { .. }) => return Err(error.to_string()),
            // also inside a frame: who asks may go away at any time
            Ok(None) | Err(_) => return Ok(()),
        };
        let hashes: Arc<[_]> = hashes.into();
        let mut done = 0;
        while done < hashes.len() {
            let Ok(mut room) = ahead.clone().acquire_many_owned(READ_MOST).await else { return Ok(()) };
            let (source, id, rest) = (group.chunks.source(), group.id, hashes.clone());
            let job = tokio::task::spawn_blocking(move || read_some(source.as_deref(), &id, &rest[done..]));
            // only a panic of the source's, which has been told
            let Ok(answers) = job.await else { return Ok(()) };
            done += answers.len();
            let bytes = answers.iter().flatten().map(|packed| packed.bytes.len()).sum::<usize>();
            // what turned out not to be needed
            drop(room.split((READ_MOST as usize).saturating_sub(bytes)));
            if goes.send(Go { answers: Answers::Chunks(answers), _room: room }).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Reads chunks until there are enough for one go; none for each that is not to be had.
fn read_some(source: Option<&dyn ChunkSource>, group: &GroupId, hashes: &[[u8; 32]]) -> Vec<Option<Packed>> {
    let Some(source) = source else { return vec![None; hashes.len()] };
    let mut answers = Vec::new();
    let mut bytes = 0;
    while bytes < READ_BYTES && answers.len() < hashes.len() {
        let rest = &hashes[answers.len()..];
        let read = source.read_some(group, rest, READ_BYTES - bytes);
        if read.is_empty() || read.len() > rest.len() {
            tracing::error!("chunks are not read as they were asked for");
            break;
        }
        for chunk in read {
            let packed = chunk.and_then(pack);
            bytes += packed.as_ref().map_or(0, |packed| packed.bytes.len());
            answers.push(packed);
        }
    }
    answers
}

/// A chunk as it travels; none if it is longer than chunks are.
fn pack(chunk: Vec<u8>) -> Option<Packed> {
    let len = u32::try_from(chunk.len()).ok().filter(|len| u64::from(*len) <= MAX_CHUNK)?;
    let compressed = compress(&chunk);
    let codec = u8::from(compressed.is_some());
    Some(Packed { codec, len, bytes: compressed.unwrap_or(chunk).into() })
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
            match go.answers {
                Answers::Chunks(answers) => {
                    for answer in answers {
                        send_answer(&mut sender, answer, &pace).await?;
                    }
                }
                Answers::Frame(frame) => sender.send(frame).await?,
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

async fn send_answer(sender: &mut FrameSender, answer: Option<Packed>, pace: &Pace) -> Result<(), FrameError> {
    let Some(packed) = answer else { return sender.send(ChunkFrame::Missing.encode()).await };
    let head = packed.head();
    let mut bytes = packed.bytes;
    sender.begin(head.len() + bytes.len())?;
    sender.part(head).await?;
    if pace.is_limited() {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PACED_PIECE));
            pace.take(piece.len()).await;
            sender.part(piece).await?;
            sender.flush().await?;
        }
        return Ok(());
    }
    sender.part(bytes).await
}

#[cfg(test)]
mod tests {
    use rand_core::{Rng as _, SeedableRng as _};

    use super::*;

    #[test]
    fn only_what_gets_shorter_is_compressed() {
        let mut noise = vec![0; 300_000];
        rand_chacha::ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut noise);
        assert_eq!(compress(&noise), None);
        assert_eq!(compress(&[]), None);
        let text = b"as it was in the beginning, ".repeat(10_000);
        let compressed = compress(&text).expect("shorter");
        assert_eq!(lz4_flex::block::decompress(&compressed, text.len()).expect("opens"), text);
        let mut mixed = [&text[..SAMPLE], &noise].concat();
        assert!(compress(&mixed).is_some_and(|compressed| compressed.len() < mixed.len()));
        mixed.drain(1..SAMPLE);
        assert_eq!(compress(&mixed), None);
        // a few bytes saved are not worth it
        let nearly = [&noise[..50_000], &[0; 2_000]].concat();
        assert_eq!(compress(&nearly), None);
    }

    #[test]
    fn a_go_reads_until_it_has_enough_and_answers_in_order() {
        struct Some4;
        impl ChunkSource for Some4 {
            fn read(&self, _: &GroupId, hash: &[u8; 32]) -> Option<Vec<u8>> {
                match hash[0] {
                    0 => None,
                    1 => Some(vec![1; READ_BYTES / 4 * 3]),
                    // longer than any chunk is
                    2 => Some(vec![2; MAX_CHUNK_FRAME]),
                    _ => {
                        let mut noise = vec![0; READ_BYTES / 4 * 3];
                        rand_chacha::ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut noise);
                        Some(noise)
                    }
                }
            }
        }
        let mut noisy = [[0; 32]; 6];
        noisy[1][0] = 2;
        noisy[4][0] = 1;
        let answers = read_some(Some(&Some4), &GroupId([0; 32]), &noisy);
        assert!(answers.iter().map(Option::is_some).eq([false, false, false, false, true, false]), "{answers:?}");
        assert_eq!(read_some(None, &GroupId([0; 32]), &noisy), vec![None; 6], "without a source all are missing");
        noisy[0][0] = 1;
        assert_eq!(read_some(Some(&Some4), &GroupId([0; 32]), &noisy).len(), 6, "these compress well");
        noisy[..4].fill([3; 32]);
        assert_eq!(read_some(Some(&Some4), &GroupId([0; 32]), &noisy).len(), 2, "and these do not");
    }
}
