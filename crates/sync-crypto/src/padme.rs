//! PADMÉ padding: lengths leak at most O(log log L) bits for at most 12 % more bytes (PURBs, PoPETs 2019/4).

/// The length to which `len` bytes are padded.
///
/// Saturates near `u64::MAX`, where no such length exists.
#[must_use]
pub const fn padded_len(len: u64) -> u64 {
    if len < 2 {
        return len;
    }
    let exponent = len.ilog2();
    let exponent_bits = if exponent == 0 { 0 } else { exponent.ilog2() + 1 };
    let mask = (1 << (exponent - exponent_bits)) - 1;
    len.saturating_add(mask) & !mask
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::padded_len;

    proptest! {
        #[test]
        fn a_padded_length_is_longer_by_at_most_an_eighth_and_stays_as_it_is(len in 0..1u64 << 62) {
            let padded = padded_len(len);
            prop_assert!(padded >= len);
            prop_assert!(padded - len <= len / 8 + 1);
            prop_assert_eq!(padded_len(padded), padded);
        }

        #[test]
        fn a_longer_length_never_has_a_shorter_padding(len in 0..1u64 << 62, more in 0..1u64 << 20) {
            prop_assert!(padded_len(len) <= padded_len(len + more));
        }
    }

    #[test]
    fn the_longest_lengths_do_not_overflow() {
        assert!(padded_len(u64::MAX) >= padded_len(u64::MAX - (1 << 60)));
    }
}
