//! What is inside a seal: stream, kind and body, compressed where that helps, padded with zeros to the PADMÉ length.

use sync_types::{FormatError, Reader, Writer};

use crate::padme::padded_len;

/// Bytes of a body: an app's 1 MiB and room for what its kind wraps around it.
pub const MAX_BODY: usize = (1 << 20) + (64 << 10);
/// Bytes of a stream's name.
pub const MAX_STREAM: usize = 64;

/// Fields every version has.
const FIELDS: usize = 4;
/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
/// Bytes of the uncompressed length before an LZ4 block.
const LENGTH_LEN: usize = 4;

/// An entry before sealing.
#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    /// What the entry belongs to: one folder, one app's state.
    pub stream: String,
    /// What the body is.
    pub kind: u16,
    /// The body, uncompressed.
    pub body: Vec<u8>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content").field("kind", &self.kind).field("len", &self.body.len()).finish_non_exhaustive()
    }
}

/// Why content cannot be encoded, or bytes are no content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// The name of the stream is too long.
    #[error("stream name has {got} bytes, at most {MAX_STREAM} are allowed; choose a shorter one")]
    StreamTooLong {
        /// Bytes given.
        got: usize,
    },
    /// The body is too long.
    #[error("body has {got} bytes, at most {MAX_BODY} are allowed; split it")]
    BodyTooLong {
        /// Bytes given or announced.
        got: usize,
    },
    /// The fields are not as they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The codec is of a later version.
    #[error("body is compressed by the unknown codec {got}; update this program")]
    UnknownCodec {
        /// The codec found.
        got: u64,
    },
    /// The compressed body does not decompress to the length it announces.
    #[error("compressed body is damaged")]
    Compression,
    /// The padding is not zeros up to the PADMÉ length.
    #[error("padding is not as it should be")]
    Padding,
}

/// How a body is compressed.
#[derive(Clone, Copy)]
enum Codec {
    Plain = 0,
    Lz4 = 1,
}

/// Lays content out for sealing.
///
/// # Errors
/// When the stream's name or the body is too long.
pub fn encode(stream: &str, kind: u16, body: &[u8]) -> Result<Vec<u8>, ContentError> {
    if stream.len() > MAX_STREAM {
        return Err(ContentError::StreamTooLong { got: stream.len() });
    }
    if body.len() > MAX_BODY {
        return Err(ContentError::BodyTooLong { got: body.len() });
    }
    let compressed = lz4_flex::block::compress_prepend_size(body);
    let (codec, body) =
        if compressed.len() < body.len() { (Codec::Lz4, &compressed[..]) } else { (Codec::Plain, body) };
    let mut header = Writer::array_of(FIELDS);
    header.text(stream).uint(kind.into()).uint(codec as u64).bin_header(body.len());
    let header = header.finish();
    let padded = padded(header.len() + body.len());
    let mut bytes = Vec::with_capacity(padded + crate::TAG_LEN);
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(body);
    bytes.resize(padded, 0);
    Ok(bytes)
}

/// Reads what was sealed.
///
/// # Errors
/// When the bytes are not content of a version and codec this program knows, padded as it should be.
pub fn decode(bytes: &[u8]) -> Result<Content, ContentError> {
    let mut reader = Reader::new(bytes);
    let fields = reader.array("content", FIELDS, MAX_FIELDS)?;
    let stream = reader.text("stream", MAX_STREAM)?;
    let kind =
        u16::try_from(reader.uint("content kind")?).map_err(|_| FormatError::Malformed { field: "content kind" })?;
    let codec = reader.uint("codec")?;
    let body = reader.bin("body", MAX_BODY)?;
    reader.skip("later field", fields - FIELDS)?;
    let padding = reader.rest();
    if padded(bytes.len() - padding.len()) != bytes.len() || padding.iter().any(|&byte| byte != 0) {
        return Err(ContentError::Padding);
    }
    let body = match codec {
        0 => body.to_vec(),
        1 => decompress(body)?,
        got => return Err(ContentError::UnknownCodec { got }),
    };
    Ok(Content { stream: stream.to_owned(), kind, body })
}

fn decompress(bytes: &[u8]) -> Result<Vec<u8>, ContentError> {
    let (length, block) = bytes.split_first_chunk::<LENGTH_LEN>().ok_or(ContentError::Compression)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| ContentError::Compression)?;
    if length > MAX_BODY {
        return Err(ContentError::BodyTooLong { got: length });
    }
    let mut body = vec![0; length];
    match lz4_flex::block::decompress_into(block, &mut body) {
        Ok(written) if written == length => Ok(body),
        _ => Err(ContentError::Compression),
    }
}

fn padded(len: usize) -> usize {
    let padded = padded_len(u64::try_from(len).expect("BUG: a length fits 64 bits"));
    usize::try_from(padded).expect("BUG: content is bounded far below 4 GiB")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Content as a liar lays it out, padded as it should be.
    fn laid_out(codec: u64, body: &[u8]) -> Vec<u8> {
        let mut writer = Writer::array_of(FIELDS);
        writer.text("app").uint(1).uint(codec).bin(body);
        let mut bytes = writer.finish();
        bytes.resize(padded(bytes.len()), 0);
        bytes
    }

    proptest! {
        #[test]
        fn content_is_read_back(
            stream in "[a-zà-ü]{0,20}",
            kind: u16,
            body in proptest::collection::vec(any::<u8>(), 0..3000),
            repeats in 1usize..4,
        ) {
            let body = body.repeat(repeats);
            let bytes = encode(&stream, kind, &body).expect("within bounds");
            prop_assert_eq!(padded(bytes.len()), bytes.len());
            prop_assert_eq!(decode(&bytes), Ok(Content { stream, kind, body }));
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
            // the same behind a plausible start, for what comes after the first fields
            bytes.splice(0..0, [0x94, 0xa1, b'a', 1, 1]);
            bytes.resize(padded(bytes.len()), 0);
            let _ = decode(&bytes);
        }

        #[test]
        fn a_flipped_bit_is_refused_or_read_as_something_else(at in 0usize..10_000, bit in 0u8..8) {
            let good = encode("app", 1, b"the quick brown fox jumps over the lazy dog").expect("short");
            let mut bad = good.clone();
            let at = at % bad.len();
            bad[at] ^= 1 << bit;
            prop_assert_ne!(decode(&bad), decode(&good));
        }
    }

    #[test]
    fn a_body_is_compressed_only_where_that_makes_it_shorter() {
        let zeros = encode("app", 1, &[0; 100_000]).expect("within bounds");
        assert!(zeros.len() < 1000);
        // array, string header, "app", kind
        let codec_of = |bytes: &[u8]| bytes[1 + 1 + 3 + 1];
        let short = encode("app", 1, b"abc").expect("within bounds");
        assert_eq!((codec_of(&zeros), codec_of(&short)), (1, 0));
    }

    #[test]
    fn the_largest_body_fits_and_one_more_byte_does_not() {
        // a counter hashed: nothing to compress
        let mut body = vec![0; MAX_BODY];
        blake3::Hasher::new().finalize_xof().fill(&mut body);
        let bytes = encode("app", 1, &body).expect("within bounds");
        assert!(bytes.len() < sync_types::bounds::MAX_ENVELOPE - 1024, "leaves no room for a header");
        assert_eq!(decode(&bytes).expect("own bytes").body, body);
        body.push(0);
        assert_eq!(encode("app", 1, &body), Err(ContentError::BodyTooLong { got: MAX_BODY + 1 }));
        assert_eq!(encode(&"s".repeat(MAX_STREAM + 1), 1, &[]), Err(ContentError::StreamTooLong { got: 65 }));
    }

    #[test]
    fn a_decompression_bomb_is_refused_before_anything_is_allocated() {
        let mut bomb = vec![0xff; 4];
        bomb.extend_from_slice(&[0; 16]);
        assert_eq!(decode(&laid_out(1, &bomb)), Err(ContentError::BodyTooLong { got: 0xffff_ffff }));
    }

    #[test]
    fn a_block_that_holds_more_or_less_than_it_announces_is_refused() {
        let block = lz4_flex::block::compress(&[7; 1000]);
        for announced in [0u32, 1, 999, 1001, 100_000] {
            let body = [&announced.to_le_bytes()[..], &block].concat();
            assert_eq!(decode(&laid_out(1, &body)), Err(ContentError::Compression), "announced {announced}");
        }
        let body = [&1000u32.to_le_bytes()[..], &block].concat();
        assert_eq!(decode(&laid_out(1, &body)).expect("honest").body, [7; 1000]);
        assert_eq!(decode(&laid_out(1, &[0; 3])), Err(ContentError::Compression));
    }

    #[test]
    fn padding_has_to_be_zeros_of_exactly_the_padme_length() {
        let good = encode("app", 1, &(0..100).collect::<Vec<u8>>()).expect("short");
        assert_eq!(good.len(), 112);
        let mut dirty = good.clone();
        *dirty.last_mut().expect("long") = 1;
        assert_eq!(decode(&dirty), Err(ContentError::Padding));
        assert_eq!(decode(&good[..good.len() - 1]), Err(ContentError::Padding));
        assert_eq!(decode(&[&good[..], &[0; 8]].concat()), Err(ContentError::Padding));
    }

    #[test]
    fn an_unknown_codec_is_named_and_later_fields_are_passed_over() {
        assert_eq!(decode(&laid_out(2, b"body")), Err(ContentError::UnknownCodec { got: 2 }));
        let mut writer = Writer::array_of(FIELDS + 1);
        writer.text("app").uint(1).uint(0).bin(b"body").text("later");
        let mut bytes = writer.finish();
        bytes.resize(padded(bytes.len()), 0);
        assert_eq!(decode(&bytes).expect("readable").body, b"body");
    }
}
