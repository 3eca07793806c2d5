//! A batch: one record of 64 bytes, followed by its ranges in the same datagram.
//!
//! Each range has 16 bytes: the first guest-physical address and the length in bytes, both little-endian. The record's
//! `length` is the number of ranges; its `gpa` is 0.

use passgate_bindings::units::{Gpa, PageRange};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::record::{Kind, RECORD_LEN, Record, RecordError};
use crate::gate::Ranges;

/// The maximum number of ranges of a batch.
pub const MAX_RANGES: usize = 4096;

/// The maximum length of a datagram in bytes: a record and [`MAX_RANGES`] ranges.
pub const MAX_DATAGRAM: usize = RECORD_LEN + MAX_RANGES * size_of::<WireRange>();

/// One range in wire format.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WireRange {
    gpa: U64,
    length: U64,
}

/// Splits a datagram into its record and the bytes of the ranges after it. Only a batch may have bytes after the record.
pub fn split(datagram: &[u8]) -> Result<(Record, &[u8]), RecordError> {
    let length = RecordError::Length(datagram.len());
    let (head, ranges) = datagram.split_at_checked(RECORD_LEN).ok_or(length)?;
    let record = Record::parse(head)?;
    let is_batch = matches!(record.kind(), Some(Kind::BeginMany | Kind::ConvertMany));
    if is_batch || ranges.is_empty() { Ok((record, ranges)) } else { Err(length) }
}

/// Parses and checks `count` ranges from the bytes after a record. No later code checks them again.
pub(super) fn ranges(count: u64, bytes: &[u8]) -> Result<Ranges, RecordError> {
    if count == 0 || count > MAX_RANGES as u64 {
        return Err(RecordError::Count(count));
    }
    let wire_ranges = <[WireRange]>::ref_from_bytes(bytes).ok().filter(|ranges| ranges.len() as u64 == count);
    let wire_ranges = wire_ranges.ok_or(RecordError::Length(RECORD_LEN + bytes.len()))?;
    let check = |(index, wire_range): (usize, &WireRange)| {
        let range = PageRange::<Gpa>::new(wire_range.gpa.get(), wire_range.length.get());
        range.map_err(|error| RecordError::InBatch(index, error))
    };
    let ranges: Vec<_> = wire_ranges.iter().enumerate().map(check).collect::<Result<_, _>>()?;
    Ok(Ranges::try_from(ranges)?)
}

/// Returns the datagram of a batch: `record`, with the number of ranges as its length, and the ranges after it.
pub fn datagram(record: &Record, ranges: &[PageRange<Gpa>]) -> Vec<u8> {
    let record = Record { length: U64::new(ranges.len() as u64), ..*record };
    let mut bytes = Vec::with_capacity(RECORD_LEN + size_of_val(ranges));
    bytes.extend_from_slice(record.as_bytes());
    for range in ranges {
        let range = WireRange { gpa: U64::new(range.start().0), length: U64::new(range.len()) };
        bytes.extend_from_slice(range.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::RangesError;
    use crate::protocol::record::Request;
    use passgate_bindings::PAGE;

    fn range(page: u64, pages: u64) -> PageRange<Gpa> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn parse(bytes: &[u8]) -> Result<Request, RecordError> {
        let (record, ranges) = split(bytes)?;
        record.request(ranges)
    }

    #[test]
    fn batch_layout_matches_the_protocol() {
        let ranges = [range(1, 2), range(0x200, 1)];
        let bytes = datagram(&Record::new(Kind::BeginMany, 7), &ranges);
        assert_eq!((bytes.len(), &bytes[..4]), (96, &[5, 0, 1, 0][..]));
        assert_eq!(bytes[24..32], 2u64.to_le_bytes());
        assert_eq!(bytes[64..72], 0x1000u64.to_le_bytes());
        assert_eq!(bytes[72..80], 0x2000u64.to_le_bytes());
        assert_eq!(bytes[80..88], 0x20_0000u64.to_le_bytes());
        let Ok(Request::Begin { ranges: read, convert: false, .. }) = parse(&bytes) else {
            panic!("{:?}", parse(&bytes))
        };
        assert_eq!(read.as_slice(), ranges);
    }

    #[test]
    fn malformed_batch_is_refused_with_the_reason() {
        let good = |n: usize| {
            let ranges: Vec<_> = (0..n as u64).map(|page| range(2 * page, 1)).collect();
            datagram(&Record::new(Kind::ConvertMany, 7), &ranges)
        };
        assert!(parse(&good(MAX_RANGES)).is_ok() && good(MAX_RANGES).len() == MAX_DATAGRAM);
        assert_eq!(parse(&good(MAX_RANGES + 1)), Err(RecordError::Count(MAX_RANGES as u64 + 1)));
        assert_eq!(parse(&good(0)), Err(RecordError::Count(0)));
        assert_eq!(parse(&good(3)[..100]), Err(RecordError::Length(100)));
        assert_eq!(parse(&good(3)[..96]), Err(RecordError::Length(96)));
        let changed = |at: usize, value: u64| {
            let mut bytes = good(3);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            parse(&bytes)
        };
        assert_eq!(changed(24, u64::MAX), Err(RecordError::Count(u64::MAX)));
        assert_eq!(changed(16, PAGE), Err(RecordError::NotZero));
        assert!(matches!(changed(64 + 16, 1), Err(RecordError::InBatch(1, _))));
        assert!(matches!(changed(64 + 40, u64::MAX - 0xfff), Err(RecordError::InBatch(2, _))));
        assert_eq!(changed(64 + 16, 0), Err(RecordError::Ranges(RangesError::Order(1))));
        let mut alone = Record::new(Kind::Echo, 1).as_bytes().to_vec();
        alone.push(0);
        assert_eq!(parse(&alone), Err(RecordError::Length(65)));
    }
}
