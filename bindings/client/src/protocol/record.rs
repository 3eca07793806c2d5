//! The record of the notification channel: 64 bytes, little-endian, one per datagram.
//!
//! Requests and replies have the same layout, so that a C program needs one struct. Fields that a kind does not use are
//! zero. docs/protocol.md, "The notification channel".

use std::fmt;

/// The length of a record in bytes.
pub const RECORD_LEN: usize = 64;

/// The version of the record layout. There is no other.
pub const VERSION: u8 = 1;

/// The deadline of a begin or convert without one, in milliseconds.
pub const DEFAULT_DEADLINE_MS: u32 = 1000;

/// The minimum deadline of a request in milliseconds: the shortest that is met whatever the devices and the kernel do.
pub const MIN_DEADLINE_MS: u32 = 10;

/// The maximum deadline of a request in milliseconds.
pub const MAX_DEADLINE_MS: u32 = 60_000;

/// The kind of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Request: send an empty reply. For measurements.
    Echo = 1,
    /// Request: the client is about to convert a range.
    Begin = 2,
    /// Request: the outcome of a conversion that was granted.
    End = 3,
    /// Request: passgate itself is to convert a range.
    Convert = 4,
    /// Request: the client is about to convert the ranges after the record, as one conversion ([`super::batch`]).
    BeginMany = 5,
    /// Request: passgate itself is to convert the ranges after the record.
    ConvertMany = 6,
    /// Reply to an echo.
    Echoed = 0x8001,
    /// Reply to a begin or a convert.
    Verdict = 0x8002,
    /// Reply to an end: the outcome is recorded.
    Ended = 0x8003,
    /// Reply to a request that was refused; nothing has changed. `errno` is the reason.
    Wrong = 0x80ff,
}

impl Kind {
    fn from_raw(raw: u16) -> Option<Self> {
        use Kind::*;
        [Echo, Begin, End, Convert, BeginMany, ConvertMany, Echoed, Verdict, Ended, Wrong]
            .into_iter()
            .find(|kind| *kind as u16 == raw)
    }
}

/// The reason why a record is not valid. Its text is the error message for the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordError {
    /// The datagram does not have [`RECORD_LEN`] bytes, but this number.
    Length(usize),
    /// The kind is not that of a reply to the request.
    Kind(u16),
    /// The field has a number that is not defined.
    Field(&'static str, u64),
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(length) => write!(f, "a record has {RECORD_LEN} bytes, this one has {length}"),
            Self::Kind(kind) => write!(f, "record kind {kind:#x} does not answer the request"),
            Self::Field(field, number) => write!(f, "`{field}` cannot be {number}: see docs/protocol.md"),
        }
    }
}

impl std::error::Error for RecordError {}

/// One record, in the byte order of this machine; [`Record::to_bytes`] and [`Record::from_bytes`] convert it. The fields have
/// the offsets of the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// A [`Kind`].
    pub kind: u16,
    /// [`VERSION`].
    pub version: u8,
    /// Reserved: 0 in requests and in replies.
    pub flags: u8,
    /// Begin, convert: the new state of the pages (0 shared, 1 private, 2 hole).
    pub to: u32,
    /// The client's number for the request; copied to the reply.
    pub cookie: u64,
    /// The first guest-physical address; in a verdict that is not *done*, that of the first range that failed.
    pub gpa: u64,
    /// The length in bytes, in a batch the number of its ranges; in a verdict that is not *done*, the length of the first
    /// range that failed.
    pub length: u64,
    /// The id of the invalidation: in the verdict, and in the end that belongs to it.
    pub invalidation: u64,
    /// End: 0 committed, 1 not committed, 2 unknown. Verdict: 0 done, 1 refused, 2 unknown.
    pub outcome: u32,
    /// Verdict: the cause ([`crate::Cause`]); 0 where done.
    pub cause: u32,
    /// A Linux errno. End: of the owner's kernel call. Verdict: of the failed call, or 0. Wrong: the reason of the refusal.
    pub errno: i32,
    /// Begin, convert: the deadline in milliseconds, 0 for the default. Verdict: the number of the device that could not be
    /// stopped, plus 1; 0 for none.
    pub deadline_or_device: u32,
    /// End: the number of bytes of the range (of a batch, of its ranges in order) that the owner has converted. Else 0.
    pub offset: u64,
}

impl Record {
    /// Returns a record with this kind and cookie; all other fields are zero.
    pub fn new(kind: Kind, cookie: u64) -> Self {
        Self { kind: kind as u16, version: VERSION, cookie, ..Self::default() }
    }

    /// Returns the record as it is sent.
    pub fn to_bytes(&self) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        let mut rest = &mut bytes[..];
        let mut put = |field: &[u8]| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(field.len());
            head.copy_from_slice(field);
            rest = tail;
        };
        put(&self.kind.to_le_bytes());
        put(&[self.version, self.flags]);
        put(&self.to.to_le_bytes());
        put(&self.cookie.to_le_bytes());
        put(&self.gpa.to_le_bytes());
        put(&self.length.to_le_bytes());
        put(&self.invalidation.to_le_bytes());
        put(&self.outcome.to_le_bytes());
        put(&self.cause.to_le_bytes());
        put(&self.errno.to_le_bytes());
        put(&self.deadline_or_device.to_le_bytes());
        put(&self.offset.to_le_bytes());
        bytes
    }

    /// Reads a record. Its fields are not checked.
    pub fn from_bytes(bytes: &[u8; RECORD_LEN]) -> Self {
        let mut at = 0;
        Self {
            kind: u16::from_le_bytes(next(bytes, &mut at)),
            version: u8::from_le_bytes(next(bytes, &mut at)),
            flags: u8::from_le_bytes(next(bytes, &mut at)),
            to: u32::from_le_bytes(next(bytes, &mut at)),
            cookie: u64::from_le_bytes(next(bytes, &mut at)),
            gpa: u64::from_le_bytes(next(bytes, &mut at)),
            length: u64::from_le_bytes(next(bytes, &mut at)),
            invalidation: u64::from_le_bytes(next(bytes, &mut at)),
            outcome: u32::from_le_bytes(next(bytes, &mut at)),
            cause: u32::from_le_bytes(next(bytes, &mut at)),
            errno: i32::from_le_bytes(next(bytes, &mut at)),
            deadline_or_device: u32::from_le_bytes(next(bytes, &mut at)),
            offset: u64::from_le_bytes(next(bytes, &mut at)),
        }
    }

    /// Reads a record from a datagram of [`RECORD_LEN`] bytes. Its fields are not checked.
    pub fn parse(datagram: &[u8]) -> Result<Self, RecordError> {
        let bytes = datagram.try_into().map_err(|_| RecordError::Length(datagram.len()))?;
        Ok(Self::from_bytes(bytes))
    }

    /// Returns its kind; none for an unknown number.
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_raw(self.kind)
    }
}

/// Returns the `N` bytes at `at`, and advances it past them.
fn next<const N: usize>(bytes: &[u8; RECORD_LEN], at: &mut usize) -> [u8; N] {
    let start = *at;
    *at += N;
    std::array::from_fn(|index| bytes[start + index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_layout_matches_the_protocol() {
        assert_eq!(size_of::<Record>(), RECORD_LEN);
        let mut record = Record::new(Kind::Begin, 0x1122_3344_5566_7788);
        record.to = 1;
        record.gpa = 0x20_0000;
        record.length = 0x1000;
        record.deadline_or_device = 250;
        let bytes = record.to_bytes();
        assert_eq!(bytes[0..4], [2, 0, 1, 0]);
        assert_eq!(bytes[4..8], [1, 0, 0, 0]);
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(bytes[16..24], 0x20_0000u64.to_le_bytes());
        assert_eq!(bytes[52..56], 250u32.to_le_bytes());
        assert_eq!(Record::parse(&bytes), Ok(record));
        assert_eq!(Record::parse(&[0; 63]), Err(RecordError::Length(63)));
    }

    #[test]
    fn record_fields_lie_at_the_offsets_of_the_struct() {
        let bytes: [u8; RECORD_LEN] = std::array::from_fn(|index| index as u8 + 1);
        let record = Record::from_bytes(&bytes);
        assert_eq!(record.to_bytes(), bytes);
        // Each field begins with the byte at its offset.
        let first = [
            (std::mem::offset_of!(Record, kind), record.kind as u8),
            (std::mem::offset_of!(Record, version), record.version),
            (std::mem::offset_of!(Record, flags), record.flags),
            (std::mem::offset_of!(Record, to), record.to as u8),
            (std::mem::offset_of!(Record, cookie), record.cookie as u8),
            (std::mem::offset_of!(Record, gpa), record.gpa as u8),
            (std::mem::offset_of!(Record, length), record.length as u8),
            (std::mem::offset_of!(Record, invalidation), record.invalidation as u8),
            (std::mem::offset_of!(Record, outcome), record.outcome as u8),
            (std::mem::offset_of!(Record, cause), record.cause as u8),
            (std::mem::offset_of!(Record, errno), record.errno as u8),
            (std::mem::offset_of!(Record, deadline_or_device), record.deadline_or_device as u8),
            (std::mem::offset_of!(Record, offset), record.offset as u8),
        ];
        for (offset, byte) in first {
            assert_eq!(usize::from(byte), offset + 1);
        }
    }
}
