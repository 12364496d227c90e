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
