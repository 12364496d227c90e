//! Reading and writing MessagePack fields: a thin layer over `rmp` that knows bounds and borrows.

use rmp::Marker;
use rmp::decode::{self, RmpRead};

use crate::bounds::{MAX_DEPTH, MAX_TEXT};

/// What is wrong with bytes that should be one of our formats.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes end early, or hold another type than the field has.
    #[error("malformed {field}")]
    Malformed {
        /// Which field.
        field: &'static str,
    },
    /// A count or length is above its bound.
    #[error("{field} has {got}, at most {max} are allowed")]
    TooMany {
        /// Which field.
        field: &'static str,
        /// Count or length announced.
        got: usize,
        /// The bound.
        max: usize,
    },
    /// A version this program does not know.
    #[error("{what} is of version {got}, this program reads {known}; update it")]
    Version {
        /// Which format.
        what: &'static str,
        /// The version found.
        got: u64,
        /// The version known.
        known: u64,
    },
    /// A value outside the set the field allows.
    #[error("{field} has the unknown value {got}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// The value found.
        got: u64,
    },
    /// Bytes follow where the format ends.
    #[error("{0} bytes follow the end")]
    Trailing(usize),
}

/// Reads fields from borrowed bytes.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not yet read.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// An array's length, between the fields known and a bound.
    pub fn array(&mut self, field: &'static str, min: usize, max: usize) -> Result<usize, FormatError> {
        let len = decode::read_array_len(&mut self.rest).map_err(|_| FormatError::Malformed { field })?;
        let len = usize::try_from(len).map_err(|_| FormatError::Malformed { field })?;
        if len < min {
            return Err(FormatError::Malformed { field });
        }
        if len > max {
            return Err(FormatError::TooMany { field, got: len, max });
        }
        Ok(len)
    }

    /// An unsigned integer.
    pub fn uint(&mut self, field: &'static str) -> Result<u64, FormatError> {
        decode::read_int(&mut self.rest).map_err(|_| FormatError::Malformed { field })
    }

    /// An unsigned integer that fits 32 bits.
    pub fn uint32(&mut self, field: &'static str) -> Result<u32, FormatError> {
        u32::try_from(self.uint(field)?).map_err(|_| FormatError::Malformed { field })
    }

    /// A truth value.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, FormatError> {
        decode::read_bool(&mut self.rest).map_err(|_| FormatError::Malformed { field })
    }

    /// A byte string up to a bound.
    pub fn bin(&mut self, field: &'static str, max: usize) -> Result<&'a [u8], FormatError> {
        let len = decode::read_bin_len(&mut self.rest).map_err(|_| FormatError::Malformed { field })?;
        self.take(field, len, max)
    }

    /// A byte string of exactly `N` bytes.
    pub fn fixed<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FormatError> {
        self.bin(field, N)?.try_into().map_err(|_| FormatError::Malformed { field })
    }

    /// A byte string of exactly `N` bytes, or nil.
    pub fn fixed_or_nil<const N: usize>(&mut self, field: &'static str) -> Result<Option<[u8; N]>, FormatError> {
        if self.take_nil() {
            return Ok(None);
        }
        self.fixed(field).map(Some)
    }

    /// A UTF-8 text up to a bound in bytes.
    pub fn text(&mut self, field: &'static str, max: usize) -> Result<&'a str, FormatError> {
        let len = decode::read_str_len(&mut self.rest).map_err(|_| FormatError::Malformed { field })?;
        let bytes = self.take(field, len, max)?;
        std::str::from_utf8(bytes).map_err(|_| FormatError::Malformed { field })
    }

    /// A list of texts of at most [`MAX_TEXT`] bytes each.
    pub fn texts(&mut self, field: &'static str, max: usize) -> Result<Vec<String>, FormatError> {
        let len = self.array(field, 0, max)?;
        (0..len).map(|_| self.text(field, MAX_TEXT).map(str::to_owned)).collect()
    }

    /// A list of byte strings, with a bound on each.
    pub fn bins(&mut self, field: &'static str, max: usize, each: usize) -> Result<Vec<Vec<u8>>, FormatError> {
        let len = self.array(field, 0, max)?;
        (0..len).map(|_| self.bin(field, each).map(<[u8]>::to_vec)).collect()
    }

    /// Passes over a nil if one is next.
    fn take_nil(&mut self) -> bool {
        let nil = self.rest.first() == Some(&Marker::Null.to_u8());
        if nil {
            self.rest = &self.rest[1..];
        }
        nil
    }

    /// Passes over `count` values of any kind: fields of a later version.
    pub fn skip(&mut self, field: &'static str, count: usize) -> Result<(), FormatError> {
        for _ in 0..count {
            self.skip_value(field, 0)?;
        }
        Ok(())
    }

    fn skip_value(&mut self, field: &'static str, depth: usize) -> Result<(), FormatError> {
        let malformed = FormatError::Malformed { field };
        if depth > MAX_DEPTH {
            return Err(FormatError::TooMany { field, got: depth, max: MAX_DEPTH });
        }
        let marker = Marker::from_u8(*self.rest.first().ok_or(malformed.clone())?);
        let children = match marker {
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
                decode::read_array_len(&mut self.rest).map_err(|_| malformed.clone())?
            }
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => {
                let pairs = decode::read_map_len(&mut self.rest).map_err(|_| malformed.clone())?;
                pairs.checked_mul(2).ok_or(malformed.clone())?
            }
            _ => return self.skip_scalar(field, marker),
        };
        // every child takes a byte, so a count above what is left is a lie
        if usize::try_from(children).map_or(true, |n| n > self.rest.len()) {
            return Err(malformed);
        }
        for _ in 0..children {
            self.skip_value(field, depth + 1)?;
        }
        Ok(())
    }

    fn skip_scalar(&mut self, field: &'static str, marker: Marker) -> Result<(), FormatError> {
        let malformed = || FormatError::Malformed { field };
        let rest = &mut self.rest;
        let len = match marker {
            Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                decode::read_str_len(rest).map_err(|_| malformed())?
            }
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => decode::read_bin_len(rest).map_err(|_| malformed())?,
            Marker::FixExt1 | Marker::FixExt2 | Marker::FixExt4 | Marker::FixExt8 | Marker::FixExt16 => {
                decode::read_ext_meta(rest).map_err(|_| malformed())?.size
            }
            Marker::Ext8 | Marker::Ext16 | Marker::Ext32 => decode::read_ext_meta(rest).map_err(|_| malformed())?.size,
            Marker::Reserved => return Err(malformed()),
            _ => {
                rest.read_u8().map_err(|_| malformed())?;
                scalar_len(marker)
            }
        };
        self.take(field, len, usize::MAX).map(|_| ())
    }

    fn take(&mut self, field: &'static str, len: u32, max: usize) -> Result<&'a [u8], FormatError> {
        let len = usize::try_from(len).map_err(|_| FormatError::Malformed { field })?;
        if len > max {
            return Err(FormatError::TooMany { field, got: len, max });
        }
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(FormatError::Malformed { field })?;
        self.rest = rest;
        Ok(taken)
    }

    /// The end: nothing may follow.
    pub fn end(self) -> Result<(), FormatError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FormatError::Trailing(self.rest.len())) }
    }
}

/// Bytes after the marker of a value that announces no length.
fn scalar_len(marker: Marker) -> u32 {
    match marker {
        Marker::U8 | Marker::I8 => 1,
        Marker::U16 | Marker::I16 => 2,
        Marker::U32 | Marker::I32 | Marker::F32 => 4,
        Marker::U64 | Marker::I64 | Marker::F64 => 8,
        _ => 0,
    }
}

/// Writes fields, each in its shortest encoding.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

/// Writing to a `Vec` cannot fail.
const INFALLIBLE: &str = "BUG: writing to memory failed";

impl Writer {
    /// Starts with an array of `len` fields.
    #[must_use]
    pub fn array_of(len: usize) -> Self {
        let mut writer = Self::default();
        writer.array(len);
        writer
    }

    /// An array header.
    pub fn array(&mut self, len: usize) -> &mut Self {
        rmp::encode::write_array_len(&mut self.bytes, length(len)).expect(INFALLIBLE);
        self
    }

    /// An unsigned integer.
    pub fn uint(&mut self, value: u64) -> &mut Self {
        rmp::encode::write_uint(&mut self.bytes, value).expect(INFALLIBLE);
        self
    }

    /// A truth value.
    pub fn bool(&mut self, value: bool) -> &mut Self {
        rmp::encode::write_bool(&mut self.bytes, value).expect(INFALLIBLE);
        self
    }

    /// A byte string.
    pub fn bin(&mut self, value: &[u8]) -> &mut Self {
        rmp::encode::write_bin(&mut self.bytes, value).expect(INFALLIBLE);
        self
    }

    /// A byte string, or nil.
    pub fn bin_or_nil(&mut self, value: Option<&[u8]>) -> &mut Self {
        match value {
            Some(value) => self.bin(value),
            None => {
                rmp::encode::write_nil(&mut self.bytes).expect(INFALLIBLE);
                self
            }
        }
    }

    /// The header of a byte string whose content the caller appends with [`Writer::raw`].
    pub fn bin_header(&mut self, len: usize) -> &mut Self {
        rmp::encode::write_bin_len(&mut self.bytes, length(len)).expect(INFALLIBLE);
        self
    }

    /// A text.
    pub fn text(&mut self, value: &str) -> &mut Self {
        rmp::encode::write_str(&mut self.bytes, value).expect(INFALLIBLE);
        self
    }

    /// A list of texts.
    pub fn texts(&mut self, values: &[String]) -> &mut Self {
        self.array(values.len());
        for value in values {
            self.text(value);
        }
        self
    }

    /// A list of byte strings.
    pub fn bins<B: AsRef<[u8]>>(&mut self, values: &[B]) -> &mut Self {
        self.array(values.len());
        for value in values {
            self.bin(value.as_ref());
        }
        self
    }

    /// Bytes that are encoded already.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("BUG: every length is bounded far below 2^32")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_length_is_checked_before_the_bytes_are_looked_at() {
        let announced = [0xc6, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(
            Reader::new(&announced).bin("payload", 100),
            Err(FormatError::TooMany { field: "payload", got: 0xffff_ffff, max: 100 })
        );
        assert_eq!(
            Reader::new(&announced).bin("payload", usize::MAX),
            Err(FormatError::Malformed { field: "payload" })
        );
    }

    #[test]
    fn nesting_without_end_is_refused() {
        let deep = vec![0x91; 1 << 16];
        assert!(matches!(Reader::new(&deep).skip("later", 1), Err(FormatError::TooMany { .. })));
        let wide = [0xdd, 0xff, 0xff, 0xff, 0xff, 0x00];
        assert_eq!(Reader::new(&wide).skip("later", 1), Err(FormatError::Malformed { field: "later" }));
    }

    #[test]
    fn every_kind_of_value_is_skipped_whole() {
        for value in [
            &[0x05][..],
            &[0xe0],
            &[0xc0],
            &[0xc2],
            &[0xcc, 1],
            &[0xcd, 1, 2],
            &[0xce, 1, 2, 3, 4],
            &[0xcf, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xca, 1, 2, 3, 4],
            &[0xcb, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xa2, b'a', b'b'],
            &[0xc4, 2, 1, 2],
            &[0xd4, 1, 9],
            &[0xc7, 1, 5, 9],
            &[0x92, 0xc0, 0x91, 0x01],
            &[0x81, 0xa1, b'k', 0xc3],
        ] {
            let mut bytes = value.to_vec();
            bytes.push(0x2a);
            let mut reader = Reader::new(&bytes);
            reader.skip("later", 1).expect("skips");
            assert_eq!(reader.uint("next"), Ok(0x2a), "after {value:02x?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_skipped_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(&bytes);
            if reader.skip("any", 1).is_ok() {
                prop_assert!(reader.rest().len() < bytes.len());
            }
        }
    }
}
