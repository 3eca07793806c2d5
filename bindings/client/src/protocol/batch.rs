//! A batch: one record of 64 bytes, followed by its ranges in the same datagram.
//!
//! Each range has 16 bytes: the first guest-physical address and the length in bytes, both little-endian. The record's
//! `length` is the number of ranges; its `gpa` is 0.

use super::record::{RECORD_LEN, Record};
use crate::units::{Gpa, PageRange};

/// The maximum number of ranges of a batch.
pub const MAX_RANGES: usize = 4096;

/// The length of a range in bytes.
pub const RANGE_LEN: usize = 16;

/// The maximum length of a datagram in bytes: a record and [`MAX_RANGES`] ranges.
pub const MAX_DATAGRAM: usize = RECORD_LEN + MAX_RANGES * RANGE_LEN;

/// Returns the datagram of a batch: `record`, with the number of ranges as its length, and the ranges after it.
pub fn datagram(record: &Record, ranges: &[PageRange<Gpa>]) -> Vec<u8> {
    let record = Record { length: ranges.len() as u64, ..*record };
    let mut bytes = Vec::with_capacity(RECORD_LEN + ranges.len() * RANGE_LEN);
    bytes.extend_from_slice(&record.to_bytes());
    for range in ranges {
        bytes.extend_from_slice(&range.start().0.to_le_bytes());
        bytes.extend_from_slice(&range.len().to_le_bytes());
    }
    bytes
}

/// Returns the address and the length of each range in the bytes after a record, not checked; none unless they are whole
/// ranges.
pub fn ranges(bytes: &[u8]) -> Option<impl ExactSizeIterator<Item = (u64, u64)> + '_> {
    let (ranges, rest) = bytes.as_chunks::<RANGE_LEN>();
    let number = |half: [u8; 8]| u64::from_le_bytes(half);
    let pair = move |range: &[u8; RANGE_LEN]| {
        let [a, b, c, d, e, f, g, h, length @ ..] = *range;
        (number([a, b, c, d, e, f, g, h]), number(length))
    };
    rest.is_empty().then(|| ranges.iter().map(pair))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::record::Kind;
    use crate::units::PAGE;

    #[test]
    fn batch_layout_matches_the_protocol() {
        let range = |page: u64, pages: u64| PageRange::new(page * PAGE, pages * PAGE).unwrap();
        let bytes = datagram(&Record::new(Kind::BeginMany, 7), &[range(1, 2), range(0x200, 1)]);
        assert_eq!((bytes.len(), &bytes[..4]), (96, &[5, 0, 1, 0][..]));
        assert_eq!(bytes[24..32], 2u64.to_le_bytes());
        assert_eq!(bytes[64..72], 0x1000u64.to_le_bytes());
        assert_eq!(bytes[72..80], 0x2000u64.to_le_bytes());
        assert_eq!(bytes[80..88], 0x20_0000u64.to_le_bytes());
        let read: Vec<_> = ranges(&bytes[64..]).unwrap().collect();
        assert_eq!(read, [(0x1000, 0x2000), (0x20_0000, 0x1000)]);
        assert!(ranges(&bytes[64..95]).is_none());
    }
}
