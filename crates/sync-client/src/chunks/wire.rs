//! Chunks in their frames without a copy: what [`ChunkFrame`](sync_types::folder::ChunkFrame) has in one piece, in two.

use sync_link::frame::Bytes;
use sync_types::bounds::{MAX_CHUNK, MAX_CHUNK_FRAME};
use sync_types::{Reader, Writer};

const CHUNK: u64 = 0x61;

/// A chunk as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packed {
    /// 0 if `bytes` are the chunk, 1 if they are an LZ4 block of it.
    pub(super) codec: u8,
    /// Bytes of the chunk.
    pub(super) len: u32,
    pub(super) bytes: Bytes,
}

impl Packed {
    /// What comes before the bytes in the frame.
    pub(super) fn head(&self) -> Vec<u8> {
        let mut writer = Writer::array_of(4);
        writer.uint(CHUNK).uint(u64::from(self.codec)).uint(u64::from(self.len)).bin_header(self.bytes.len());
        writer.finish()
    }

    /// The chunk in a frame; none if it is another frame, or one that has to be looked at more closely.
    pub(super) fn in_frame(frame: &Bytes) -> Option<Self> {
        let mut reader = Reader::new(frame);
        reader.array("frame", 4, 4).ok()?;
        if reader.uint("type").ok()? != CHUNK {
            return None;
        }
        let codec = u8::try_from(reader.uint("codec").ok()?).ok().filter(|codec| *codec <= 1)?;
        let len = reader.uint32("len").ok().filter(|len| u64::from(*len) <= MAX_CHUNK)?;
        let bytes = reader.bin("bytes", MAX_CHUNK_FRAME).ok()?;
        reader.end().ok()?;
        Some(Self { codec, len, bytes: frame.slice_ref(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use sync_types::folder::ChunkFrame;

    use super::*;

    #[test]
    fn it_is_the_frame_of_the_protocol() {
        for (codec, len, bytes) in
            [(0, 3, &b"abc"[..]), (1, 70_000, &[7; 300]), (0, 4 << 20, &[]), (1, 0, &[1; 70_000])]
        {
            let whole = ChunkFrame::Chunk { codec, len, bytes: bytes.to_vec() }.encode();
            let packed = Packed { codec, len, bytes: Bytes::copy_from_slice(bytes) };
            assert_eq!([&packed.head(), bytes].concat(), whole);
            assert_eq!(Packed::in_frame(&whole.into()), Some(packed));
        }
        let ask = ChunkFrame::Ask { hashes: vec![[1; 32]] };
        let long = ChunkFrame::Chunk { codec: 0, len: (4 << 20) + 1, bytes: vec![1] };
        let strange = ChunkFrame::Chunk { codec: 2, len: 1, bytes: vec![1] };
        for frame in [ask, long, strange, ChunkFrame::Missing] {
            assert_eq!(Packed::in_frame(&frame.encode().into()), None);
        }
    }
}
