//! The record of the notification channel: 64 bytes, little-endian, one per datagram.
//!
//! Requests and replies have the same layout, so that a C program needs one struct. Fields that a kind does not use are
//! zero. docs/protocol.md, "The notification channel".

use passgate_bindings::units::{PageRange, RangeError};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::batch;
use crate::gate::{PageState, Ranges, RangesError, Said, Word};

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

/// Checks a requested deadline and returns it in milliseconds; 0 requests [`DEFAULT_DEADLINE_MS`].
pub fn deadline_ms(requested: u32) -> Result<u32, RecordError> {
    match requested {
        0 => Ok(DEFAULT_DEADLINE_MS),
        MIN_DEADLINE_MS..=MAX_DEADLINE_MS => Ok(requested),
        other => Err(RecordError::Field("deadline", other.into())),
    }
}

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

/// The numbers of the verdicts, in [`Record::outcome`] of a reply.
pub mod verdict {
    /// Done: no device can access the range any more.
    pub const DONE: u32 = 0;
    /// Refused: the client must not convert.
    pub const REFUSED: u32 = 1;
    /// Unknown: the client must not convert; devices may still access the range.
    pub const UNKNOWN: u32 = 2;
}

/// One record. docs/protocol.md has the offsets of the fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Record {
    /// A [`Kind`].
    pub kind: U16,
    /// [`VERSION`].
    pub version: u8,
    /// Reserved: 0 in requests and in replies.
    pub flags: u8,
    /// Begin, convert: the new state of the pages (0 shared, 1 private, 2 hole).
    pub to: U32,
    /// The client's number for the request; copied to the reply.
    pub cookie: U64,
    /// The first guest-physical address; in a verdict that is not *done*, that of the first range that failed.
    pub gpa: U64,
    /// The length in bytes, in a batch the number of its ranges; in a verdict that is not *done*, the length of the first
    /// range that failed.
    pub length: U64,
    /// The id of the invalidation: in the verdict, and in the end that belongs to it.
    pub invalidation: U64,
    /// End: 0 committed, 1 not committed, 2 unknown. Verdict: 0 done, 1 refused, 2 unknown.
    pub outcome: U32,
    /// Verdict: the cause ([`crate::gate::Cause`]); 0 where done.
    pub cause: U32,
    /// A Linux errno. End: of the owner's kernel call. Verdict: of the failed call, or 0. Wrong: the reason of the refusal.
    pub errno: I32,
    /// Begin, convert: the deadline in milliseconds, 0 for the default. Verdict: the number of the device that could not be
    /// stopped, plus 1; 0 for none.
    pub deadline_or_device: U32,
    /// End: the number of bytes of the range (of a batch, of its ranges in order) that the owner has converted. Else 0.
    pub offset: U64,
}

/// A checked request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// An empty reply is requested.
    Echo,
    /// Ranges are about to be converted.
    Begin {
        /// The ranges; one, unless the request is a batch.
        ranges: Ranges,
        /// The new state of their pages.
        to: PageState,
        /// The deadline of the verdict in milliseconds.
        deadline_ms: u32,
        /// True where passgate itself converts them, false where the client does.
        convert: bool,
    },
    /// A conversion has ended.
    End {
        /// The id of the invalidation.
        invalidation: u64,
        /// The owner's statement. Its consistency can be checked only with the length of the ranges.
        said: Said,
    },
}

/// The reason why a record is not a valid request. Its text is the error message for the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The datagram does not have the length of its record, in bytes.
    #[error("a record has {RECORD_LEN} bytes, this one has {0}")]
    Length(usize),
    /// The version is not [`VERSION`].
    #[error("record version {0} is not known: this is version {VERSION}")]
    Version(u8),
    /// The kind is unknown, or that of a reply.
    #[error("record kind {0:#x} is not a request")]
    Kind(u16),
    /// The field has a number that is not defined.
    #[error("`{0}` cannot be {1}: see docs/protocol.md")]
    Field(&'static str, u64),
    /// A field that the kind does not use is not zero.
    #[error("a field that a record of this kind does not use is not zero")]
    NotZero,
    /// The range is not a page range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The number of ranges of a batch is 0 or above [`super::batch::MAX_RANGES`].
    #[error("a batch has 1 to {max} ranges, this one has {0}", max = super::batch::MAX_RANGES)]
    Count(u64),
    /// The range at this index of a batch is not a page range.
    #[error("range {0} of the batch: {1}")]
    InBatch(usize, RangeError),
    /// The ranges of a batch are not ascending, or overlap.
    #[error(transparent)]
    Ranges(#[from] RangesError),
}

impl RecordError {
    /// Returns the errno of the reply, [`Kind::Wrong`].
    pub fn errno(self) -> i32 {
        match self {
            Self::Version(_) | Self::Kind(_) => 71, // EPROTO
            Self::Length(_) => 90,                  // EMSGSIZE
            Self::Count(_) => 7,                    // E2BIG
            Self::Field(..) | Self::NotZero | Self::Range(_) | Self::InBatch(..) | Self::Ranges(_) => 22, // EINVAL
        }
    }
}

impl Record {
    /// Returns a record with this kind and cookie; all other fields are zero.
    pub fn new(kind: Kind, cookie: u64) -> Self {
        Self { kind: U16::new(kind as u16), version: VERSION, cookie: U64::new(cookie), ..Default::default() }
    }

    /// Reads a record from a datagram of [`RECORD_LEN`] bytes.
    pub fn parse(datagram: &[u8]) -> Result<Self, RecordError> {
        Self::read_from_bytes(datagram).map_err(|_| RecordError::Length(datagram.len()))
    }

    /// Returns its kind; none for an unknown number.
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_raw(self.kind.get())
    }

    /// Checks the record and returns its request. `ranges` are the bytes after the record, as [`super::batch::split`] returns
    /// them. No later code checks the fields again.
    pub fn request(&self, ranges: &[u8]) -> Result<Request, RecordError> {
        if self.version != VERSION {
            return Err(RecordError::Version(self.version));
        }
        // A copy in which every field that the kind uses is cleared: at the end it must be all zero.
        let mut unused = Self { kind: U16::default(), version: 0, cookie: U64::default(), ..*self };
        let mut clear = |fields: fn(&mut Self)| fields(&mut unused);
        let request = match self.kind() {
            Some(Kind::Echo) => Request::Echo,
            Some(kind @ (Kind::Begin | Kind::Convert | Kind::BeginMany | Kind::ConvertMany)) => {
                clear(|r| (r.to, r.deadline_or_device, r.length) = Default::default());
                let ranges = if matches!(kind, Kind::Begin | Kind::Convert) {
                    clear(|r| r.gpa = Default::default());
                    PageRange::new(self.gpa.get(), self.length.get())?.into()
                } else {
                    batch::ranges(self.length.get(), ranges)?
                };
                let deadline_ms = deadline_ms(self.deadline_or_device.get())?;
                let to = page_state(self.to.get())?;
                let convert = matches!(kind, Kind::Convert | Kind::ConvertMany);
                Request::Begin { ranges, to, deadline_ms, convert }
            }
            Some(Kind::End) => {
                clear(|r| (r.invalidation, r.offset) = Default::default());
                clear(|r| (r.outcome, r.errno) = Default::default());
                let word = match self.outcome.get() {
                    0 => Word::Committed,
                    1 => Word::NotCommitted,
                    2 => Word::Unknown,
                    other => return Err(RecordError::Field("outcome", other.into())),
                };
                let said = Said { word, errno: self.errno.get(), offset: self.offset.get() };
                Request::End { invalidation: self.invalidation.get(), said }
            }
            _ => return Err(RecordError::Kind(self.kind.get())),
        };
        if unused == Self::default() { Ok(request) } else { Err(RecordError::NotZero) }
    }
}

/// Returns the page state with this number.
fn page_state(raw: u32) -> Result<PageState, RecordError> {
    match raw {
        0 => Ok(PageState::Shared),
        1 => Ok(PageState::Private),
        2 => Ok(PageState::Hole),
        other => Err(RecordError::Field("to", other.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_layout_matches_the_protocol() {
        assert_eq!(size_of::<Record>(), RECORD_LEN);
        let mut record = Record::new(Kind::Begin, 0x1122_3344_5566_7788);
        record.to = U32::new(1);
        record.gpa = U64::new(0x20_0000);
        record.length = U64::new(0x1000);
        record.deadline_or_device = U32::new(250);
        let bytes = record.as_bytes();
        assert_eq!(bytes[0..4], [2, 0, 1, 0]);
        assert_eq!(bytes[4..8], [1, 0, 0, 0]);
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(bytes[16..24], 0x20_0000u64.to_le_bytes());
        assert_eq!(bytes[52..56], 250u32.to_le_bytes());
        assert_eq!(Record::parse(bytes), Ok(record));
    }

    #[test]
    fn malformed_record_is_refused_with_the_reason() {
        assert_eq!(Record::parse(&[0; 63]), Err(RecordError::Length(63)));
        let begin = |change: fn(&mut Record)| {
            let mut record = Record::new(Kind::Begin, 0);
            record.length = U64::new(0x1000);
            change(&mut record);
            record.request(&[])
        };
        assert!(begin(|_| {}).is_ok());
        assert_eq!(begin(|r| r.version = 2), Err(RecordError::Version(2)));
        assert_eq!(begin(|r| r.flags = 1), Err(RecordError::NotZero));
        assert_eq!(begin(|r| r.offset = U64::new(1)), Err(RecordError::NotZero));
        assert_eq!(begin(|r| r.to = U32::new(3)), Err(RecordError::Field("to", 3)));
        assert_eq!(begin(|r| r.kind = U16::new(0x8002)), Err(RecordError::Kind(0x8002)));
        assert!(matches!(begin(|r| r.length = U64::new(1)), Err(RecordError::Range(_))));
        assert!(matches!(begin(|r| r.gpa = U64::new(u64::MAX - 0xfff)), Err(RecordError::Range(_))));
        assert!(begin(|r| r.deadline_or_device = U32::new(MAX_DEADLINE_MS + 1)).is_err());
    }
}
