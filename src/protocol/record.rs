//! The record of the notification channel: 64 bytes, little-endian, one per datagram.
//!
//! One layout serves requests and replies, so that a C program needs one struct. What a kind does not use is zero.

use passgate_bindings::units::{PageRange, RangeError};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::batch;
use crate::gate::{PageState, Ranges, RangesError, Said, Word};

/// Bytes of a record.
pub const RECORD_LEN: usize = 64;

/// The only version there is.
pub const VERSION: u8 = 1;

/// The deadline of a begin or convert that names none, in milliseconds.
pub const DEFAULT_DEADLINE_MS: u32 = 1000;

/// The shortest deadline that can be kept whatever happens, in milliseconds.
pub const MIN_DEADLINE_MS: u32 = 10;

/// The longest deadline that may be asked for, in milliseconds.
pub const MAX_DEADLINE_MS: u32 = 60_000;

/// A deadline as it is asked for: 0 for the default.
pub fn deadline_ms(asked: u32) -> Result<u32, RecordError> {
    match asked {
        0 => Ok(DEFAULT_DEADLINE_MS),
        MIN_DEADLINE_MS..=MAX_DEADLINE_MS => Ok(asked),
        other => Err(RecordError::Field("deadline", other.into())),
    }
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Request: say it back.
    Echo = 1,
    /// Request: a range is about to change.
    Begin = 2,
    /// Request: how it went.
    End = 3,
    /// Request: passgate changes the range itself.
    Convert = 4,
    /// Request: the ranges behind it are about to change, together ([`super::batch`]).
    BeginMany = 5,
    /// Request: passgate changes the ranges behind it itself.
    ConvertMany = 6,
    /// Reply to an echo.
    Echoed = 0x8001,
    /// Reply to a begin or a convert.
    Verdict = 0x8002,
    /// Reply to an end: taken down.
    Ended = 0x8003,
    /// Reply to any request that was wrong: nothing changed. `errno` says why.
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

/// Verdicts as numbers, in [`Record::outcome`] of a reply.
pub mod verdict {
    /// No device sees the range any more.
    pub const DONE: u32 = 0;
    /// Do not convert.
    pub const REFUSED: u32 = 1;
    /// Do not convert; not even passgate knows.
    pub const UNKNOWN: u32 = 2;
}

/// One record. Offsets in docs/protocol.md.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Record {
    /// A [`Kind`].
    pub kind: U16,
    /// [`VERSION`].
    pub version: u8,
    /// Reply flags: bit 0, the answer waited for DMA in flight. 0 in requests.
    pub flags: u8,
    /// Begin, convert: what the pages will be (0 shared, 1 private, 2 hole).
    pub to: U32,
    /// The client's own number for the request; comes back untouched.
    pub cookie: U64,
    /// First guest-physical address; in a refusal the first that failed.
    pub gpa: U64,
    /// Length in bytes; in a refusal of what failed; of a batch the number of its ranges.
    pub length: U64,
    /// Names the invalidation: in the verdict, and in the end that belongs to it.
    pub invalidation: U64,
    /// End: 0 committed, 1 not committed, 2 unknown. Verdict: 0 done, 1 refused, 2 unknown.
    pub outcome: U32,
    /// Verdict: why (`gate::Cause`); 0 where done.
    pub cause: U32,
    /// A Linux errno: of the owner's call (end), of the kernel's answer (verdict), of the mistake (wrong).
    pub errno: I32,
    /// Begin, convert: deadline in milliseconds, 0 for the default. Verdict: number of the device to blame + 1.
    pub deadline_or_device: U32,
    /// End: how many bytes into the range (or the ranges, in order) the owner got. Else 0.
    pub offset: U64,
}

/// What a record asks for, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Say it back.
    Echo,
    /// Ranges are about to change, by the client or (`convert`) by passgate.
    Begin {
        /// The ranges; one, but for a batch.
        ranges: Ranges,
        /// What they will be.
        to: PageState,
        /// Within how many milliseconds to answer.
        deadline_ms: u32,
        /// Whether passgate is to do it.
        convert: bool,
    },
    /// How it went.
    End {
        /// What was begun.
        invalidation: u64,
        /// What its owner says of it; whether that contradicts itself depends on the range.
        said: Said,
    },
}

/// Why a record is no request. The text is the message that the user reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not 64 bytes.
    #[error("a record has {RECORD_LEN} bytes, this one has {0}")]
    Length(usize),
    /// Another version.
    #[error("record version {0} is not known: this is version {VERSION}")]
    Version(u8),
    /// Not a request.
    #[error("record kind {0:#x} is not a request")]
    Kind(u16),
    /// A number that means nothing there.
    #[error("`{0}` cannot be {1}: see docs/protocol.md")]
    Field(&'static str, u64),
    /// A field that the kind does not use.
    #[error("a field that a record of this kind does not use is not zero")]
    NotZero,
    /// Not a page range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Too few or too many ranges.
    #[error("a batch has 1 to {max} ranges, this one has {0}", max = super::batch::MAX_RANGES)]
    Count(u64),
    /// Not a page range, in a batch.
    #[error("range {0} of the batch: {1}")]
    InBatch(usize, RangeError),
    /// Ranges that are no batch.
    #[error(transparent)]
    Ranges(#[from] RangesError),
}

impl RecordError {
    /// As a number, for [`Kind::Wrong`].
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
    /// A record of this kind, all else zero.
    pub fn new(kind: Kind, cookie: u64) -> Self {
        Self { kind: U16::new(kind as u16), version: VERSION, cookie: U64::new(cookie), ..Default::default() }
    }

    /// The record in a datagram.
    pub fn parse(datagram: &[u8]) -> Result<Self, RecordError> {
        Self::read_from_bytes(datagram).map_err(|_| RecordError::Length(datagram.len()))
    }

    /// What kind it is, where it is one.
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_raw(self.kind.get())
    }

    /// What it asks for, with what [`super::batch::split`] found behind it: this is the border, nothing behind it checks
    /// again.
    pub fn request(&self, behind: &[u8]) -> Result<Request, RecordError> {
        if self.version != VERSION {
            return Err(RecordError::Version(self.version));
        }
        // What is left once every field that the kind uses is taken out: must be nothing.
        let mut rest = Self { kind: U16::default(), version: 0, cookie: U64::default(), ..*self };
        let mut take = |field: fn(&mut Self)| field(&mut rest);
        let request = match self.kind() {
            Some(Kind::Echo) => Request::Echo,
            Some(kind @ (Kind::Begin | Kind::Convert | Kind::BeginMany | Kind::ConvertMany)) => {
                take(|r| (r.to, r.deadline_or_device, r.length) = Default::default());
                let ranges = if matches!(kind, Kind::Begin | Kind::Convert) {
                    take(|r| r.gpa = Default::default());
                    PageRange::new(self.gpa.get(), self.length.get())?.into()
                } else {
                    batch::ranges(self.length.get(), behind)?
                };
                let deadline_ms = deadline_ms(self.deadline_or_device.get())?;
                let to = state(self.to.get())?;
                let convert = matches!(kind, Kind::Convert | Kind::ConvertMany);
                Request::Begin { ranges, to, deadline_ms, convert }
            }
            Some(Kind::End) => {
                take(|r| (r.invalidation, r.offset) = Default::default());
                take(|r| (r.outcome, r.errno) = Default::default());
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
        if rest == Self::default() { Ok(request) } else { Err(RecordError::NotZero) }
    }
}

/// A page state that may be asked for.
fn state(raw: u32) -> Result<PageState, RecordError> {
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
    fn lies_as_the_protocol_says() {
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
    fn wrong_records_say_what_is_wrong() {
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
