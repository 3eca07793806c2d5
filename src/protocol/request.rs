//! The requests of the notification channel, as the daemon reads and checks them. No later code checks their fields again.

use passgate_bindings::units::{Gpa, PageRange, RangeError};

use super::batch::{self, MAX_RANGES};
use super::record::{self, DEFAULT_DEADLINE_MS, Kind, MAX_DEADLINE_MS, MIN_DEADLINE_MS, RECORD_LEN, Record};
use crate::gate::{OutcomeKind, PageState, Ranges, RangesError, ReportedEnd};

/// Checks a requested deadline and returns it in milliseconds; 0 requests [`DEFAULT_DEADLINE_MS`].
pub fn deadline_ms(requested: u32) -> Result<u32, RequestError> {
    match requested {
        0 => Ok(DEFAULT_DEADLINE_MS),
        MIN_DEADLINE_MS..=MAX_DEADLINE_MS => Ok(requested),
        other => Err(RequestError::Field("deadline", other.into())),
    }
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
        said: ReportedEnd,
    },
}

/// The reason why a datagram is not a valid request. Its text is the error message for the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The datagram does not have the length of its record, in bytes.
    #[error("a record has {RECORD_LEN} bytes, this one has {0}")]
    Length(usize),
    /// The version is not [`record::VERSION`].
    #[error("record version {0} is not known: this is version {v}", v = record::VERSION)]
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
    /// The number of ranges of a batch is 0 or above [`batch::MAX_RANGES`].
    #[error("a batch has 1 to {max} ranges, this one has {0}", max = batch::MAX_RANGES)]
    Count(u64),
    /// The range at this index of a batch is not a page range.
    #[error("range {0} of the batch: {1}")]
    InBatch(usize, RangeError),
    /// The ranges of a batch are not ascending, or overlap.
    #[error(transparent)]
    Ranges(#[from] RangesError),
}

impl RequestError {
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

/// Splits a datagram into its record and the bytes of the ranges after it. Only a batch may have bytes after the record.
pub fn split(datagram: &[u8]) -> Result<(Record, &[u8]), RequestError> {
    let length = RequestError::Length(datagram.len());
    let (head, ranges) = datagram.split_first_chunk::<RECORD_LEN>().ok_or(length)?;
    let record = Record::from_bytes(head);
    let is_batch = matches!(record.kind(), Some(Kind::BeginMany | Kind::ConvertMany));
    if is_batch || ranges.is_empty() { Ok((record, ranges)) } else { Err(length) }
}

impl Request {
    /// Checks a record. `ranges` are the bytes after it, as [`split`] returns them.
    pub fn from_record(record: &Record, ranges: &[u8]) -> Result<Self, RequestError> {
        if record.version != record::VERSION {
            return Err(RequestError::Version(record.version));
        }
        // A copy in which every field that the kind uses is cleared: at the end it must be all zero.
        let mut unused = Record { kind: 0, version: 0, cookie: 0, ..*record };
        let mut clear = |fields: fn(&mut Record)| fields(&mut unused);
        let request = match record.kind() {
            Some(Kind::Echo) => Self::Echo,
            Some(kind @ (Kind::Begin | Kind::Convert | Kind::BeginMany | Kind::ConvertMany)) => {
                clear(|r| (r.to, r.deadline_or_device, r.length) = (0, 0, 0));
                let ranges = if matches!(kind, Kind::Begin | Kind::Convert) {
                    clear(|r| r.gpa = 0);
                    PageRange::new(record.gpa, record.length)?.into()
                } else {
                    batch_ranges(record.length, ranges)?
                };
                let deadline_ms = deadline_ms(record.deadline_or_device)?;
                let to =
                    PageState::from_request(record.to).ok_or(RequestError::Field("to", record.to.into()))?;
                let convert = matches!(kind, Kind::Convert | Kind::ConvertMany);
                Self::Begin { ranges, to, deadline_ms, convert }
            }
            Some(Kind::End) => {
                clear(|r| (r.invalidation, r.offset) = (0, 0));
                clear(|r| (r.outcome, r.errno) = (0, 0));
                let kind = OutcomeKind::from_number(record.outcome)
                    .ok_or(RequestError::Field("outcome", record.outcome.into()))?;
                let said = ReportedEnd { kind, errno: record.errno, offset: record.offset };
                Self::End { invalidation: record.invalidation, said }
            }
            _ => return Err(RequestError::Kind(record.kind)),
        };
        if unused == Record::default() { Ok(request) } else { Err(RequestError::NotZero) }
    }
}

/// Parses and checks `count` ranges from the bytes after a record.
fn batch_ranges(count: u64, bytes: &[u8]) -> Result<Ranges, RequestError> {
    if count == 0 || count > MAX_RANGES as u64 {
        return Err(RequestError::Count(count));
    }
    let ranges = batch::ranges(bytes).filter(|ranges| ranges.len() as u64 == count);
    let ranges = ranges.ok_or(RequestError::Length(RECORD_LEN + bytes.len()))?;
    let check = |(index, (gpa, length))| {
        PageRange::<Gpa>::new(gpa, length).map_err(|error| RequestError::InBatch(index, error))
    };
    let ranges: Vec<_> = ranges.enumerate().map(check).collect::<Result<_, _>>()?;
    Ok(Ranges::try_from(ranges)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use passgate_bindings::PAGE;

    fn range(page: u64, pages: u64) -> PageRange<Gpa> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn parse(bytes: &[u8]) -> Result<Request, RequestError> {
        let (record, ranges) = split(bytes)?;
        Request::from_record(&record, ranges)
    }

    #[test]
    fn malformed_record_is_refused_with_the_reason() {
        assert_eq!(parse(&[0; 63]), Err(RequestError::Length(63)));
        let begin = |change: fn(&mut Record)| {
            let mut record = Record::new(Kind::Begin, 0);
            record.length = 0x1000;
            change(&mut record);
            Request::from_record(&record, &[])
        };
        assert!(begin(|_| {}).is_ok());
        assert_eq!(begin(|r| r.version = 2), Err(RequestError::Version(2)));
        assert_eq!(begin(|r| r.flags = 1), Err(RequestError::NotZero));
        assert_eq!(begin(|r| r.offset = 1), Err(RequestError::NotZero));
        assert_eq!(begin(|r| r.to = 3), Err(RequestError::Field("to", 3)));
        assert_eq!(begin(|r| r.kind = 0x8002), Err(RequestError::Kind(0x8002)));
        assert!(matches!(begin(|r| r.length = 1), Err(RequestError::Range(_))));
        assert!(matches!(begin(|r| r.gpa = u64::MAX - 0xfff), Err(RequestError::Range(_))));
        assert!(begin(|r| r.deadline_or_device = MAX_DEADLINE_MS + 1).is_err());
    }

    #[test]
    fn batch_is_read_as_it_is_written() {
        let ranges = [range(1, 2), range(0x200, 1)];
        let bytes = batch::datagram(&Record::new(Kind::BeginMany, 7), &ranges);
        let Ok(Request::Begin { ranges: read, convert: false, .. }) = parse(&bytes) else {
            panic!("{:?}", parse(&bytes))
        };
        assert_eq!(read.as_slice(), ranges);
    }

    #[test]
    fn malformed_batch_is_refused_with_the_reason() {
        let good = |n: usize| {
            let ranges: Vec<_> = (0..n as u64).map(|page| range(2 * page, 1)).collect();
            batch::datagram(&Record::new(Kind::ConvertMany, 7), &ranges)
        };
        assert!(parse(&good(MAX_RANGES)).is_ok() && good(MAX_RANGES).len() == batch::MAX_DATAGRAM);
        assert_eq!(parse(&good(MAX_RANGES + 1)), Err(RequestError::Count(MAX_RANGES as u64 + 1)));
        assert_eq!(parse(&good(0)), Err(RequestError::Count(0)));
        assert_eq!(parse(&good(3)[..100]), Err(RequestError::Length(100)));
        assert_eq!(parse(&good(3)[..96]), Err(RequestError::Length(96)));
        let changed = |at: usize, value: u64| {
            let mut bytes = good(3);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            parse(&bytes)
        };
        assert_eq!(changed(24, u64::MAX), Err(RequestError::Count(u64::MAX)));
        assert_eq!(changed(16, PAGE), Err(RequestError::NotZero));
        assert!(matches!(changed(64 + 16, 1), Err(RequestError::InBatch(1, _))));
        assert!(matches!(changed(64 + 40, u64::MAX - 0xfff), Err(RequestError::InBatch(2, _))));
        assert_eq!(changed(64 + 16, 0), Err(RequestError::Ranges(RangesError::Order(1))));
        let mut alone = Record::new(Kind::Echo, 1).to_bytes().to_vec();
        alone.push(0);
        assert_eq!(parse(&alone), Err(RequestError::Length(65)));
    }
}
