//! The notification channel: requests and replies are 64-byte records, one reply per request, and many may be in flight.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use passgate_bindings::{Gpa, PageRange};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{I32, U32, U64};

use super::{ANSWER_GRACE, ANSWER_TIMEOUT};
use crate::error::{Error, Result};
use crate::gate::{Cause, Outcome, PageState};
use crate::protocol::batch;
use crate::protocol::record::{
    DEFAULT_DEADLINE_MS, Kind, MAX_DEADLINE_MS, RECORD_LEN, Record, RecordError, verdict,
};

/// The cookie bit that is set in this file's requests, so that they differ from those of [`Channel::send`]'s callers.
const OWN_COOKIE_BIT: u64 = 1 << 63;

/// The daemon's answer to a begin or a convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// No device can access the range any more. After a begin: convert it now, then call [`Channel::end`]. After a convert:
    /// it is converted.
    Granted {
        /// The id of the invalidation, for [`Channel::end`].
        invalidation: u64,
    },
    /// The range must not be converted: passgate could not prove that no device can access it, or could not convert it.
    Refused(Failure),
    /// The range must not be converted: a kernel call has not returned in time, and devices may still access the range.
    Unknown(Failure),
}

/// The first failure of an invalidation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// The id of the invalidation, for `Explain`.
    pub invalidation: u64,
    /// The range that failed.
    pub range: PageRange<Gpa>,
    /// The number of the [`Cause`].
    pub cause: u32,
    /// The errno of the failed kernel call; 0 where there was none.
    pub errno: i32,
    /// The index, in the list of `Status`, of the device that could not be stopped; none where no device is the cause.
    pub device: Option<u32>,
}

impl Failure {
    /// Returns the name of the cause, as [`Cause::word`] does; `?` for an unknown number.
    pub fn word(&self) -> &'static str {
        Cause::ALL.into_iter().find(|cause| *cause as u32 == self.cause).map_or("?", Cause::word)
    }
}

/// The id of a submitted request, which its answer repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A notification channel. Closing it closes nothing else: an invalidation that was begun on it and not ended stays open
/// until the connection that opened the channel is closed.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    /// The cookie of the last request of this file's own.
    last_cookie: u64,
    /// The replies to other requests that were received while waiting for one.
    early: VecDeque<Record>,
    /// The receive timeout of the socket: the longest deadline requested so far, plus [`ANSWER_GRACE`].
    receive_timeout: Option<Duration>,
}

impl Channel {
    /// Takes a connected SOCK_SEQPACKET socket, from a reply to `OpenChannel`.
    pub fn from_fd(socket: OwnedFd) -> Self {
        // A daemon that does not read must not block a sender for ever. An error means that this is not a socket; then every
        // call fails.
        let _ = set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT));
        Self { socket, last_cookie: OWN_COOKIE_BIT, early: VecDeque::new(), receive_timeout: None }
    }

    /// Announces the conversion of `range` to the state `to`, and waits for the verdict. `deadline_ms` is the verdict's
    /// deadline in milliseconds; none or 0 for the default.
    pub fn begin(
        &mut self,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.request_verdict(Kind::Begin, range, to, deadline_ms)
    }

    /// passgate itself converts `range`. Allowed only in memory that was added with `sole_mapper`.
    pub fn convert(
        &mut self,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.request_verdict(Kind::Convert, range, to, deadline_ms)
    }

    /// As [`Channel::begin`], for a batch of up to [`batch::MAX_RANGES`] ranges, which are ascending and do not overlap. The
    /// batch has one answer and one [`Channel::end`]. If it is refused, none of the ranges may be converted; the ranges that
    /// did not fail may be begun again.
    pub fn begin_many(
        &mut self,
        ranges: &[PageRange<Gpa>],
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.request_batch_verdict(Kind::BeginMany, ranges, to, deadline_ms)
    }

    /// As [`Channel::convert`], for a batch of ranges.
    pub fn convert_many(
        &mut self,
        ranges: &[PageRange<Gpa>],
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.request_batch_verdict(Kind::ConvertMany, ranges, to, deadline_ms)
    }

    /// Sends the request of [`Channel::begin`] without waiting for its answer, which [`Channel::completed`] returns with the
    /// same ticket. Many requests may be in flight. Where the socket's buffer is full this waits until the daemon has read
    /// from it ([`Error::NoAnswer`] where it does not); a caller with more than a few hundred requests takes answers in
    /// between.
    pub fn submit(
        &mut self,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Ticket> {
        let record = range_request(Kind::Begin, self.next_cookie(), to, deadline_ms);
        self.wait_at_least(answer_timeout(effective_deadline(deadline_ms)))?;
        self.send(&Record { gpa: U64::new(range.start().0), length: U64::new(range.len()), ..record })?;
        Ok(Ticket(record.cookie.get()))
    }

    /// Returns the next answer to a submitted request, in the order in which the answers arrive. Where none arrives in time,
    /// the channel is closed ([`Error::NoAnswer`]).
    pub fn completed(&mut self) -> Result<(Ticket, Result<Answer>)> {
        self.wait_at_least(answer_timeout(DEFAULT_DEADLINE_MS))?;
        let reply = match self.early.pop_front() {
            Some(reply) => reply,
            None => self.receive()?.ok_or_else(|| self.give_up())?,
        };
        Ok((Ticket(reply.cookie.get()), check(reply).and_then(|reply| answer(&reply))))
    }

    /// Reports the outcome of a conversion that was granted.
    pub fn end(&mut self, invalidation: u64, outcome: Outcome) -> Result<()> {
        let mut record = Record::new(Kind::End, self.next_cookie());
        record.invalidation = U64::new(invalidation);
        match outcome {
            Outcome::Committed => {}
            Outcome::NotCommitted => record.outcome = U32::new(1),
            Outcome::Unknown { errno, offset } => {
                record.outcome = U32::new(2);
                record.errno = I32::new(errno);
                record.offset = U64::new(offset);
            }
        }
        self.round_trip(&record, DEFAULT_DEADLINE_MS).map(drop)
    }

    /// Waits for a reply to an empty request, for measurements.
    pub fn echo(&mut self) -> Result<()> {
        let record = Record::new(Kind::Echo, self.next_cookie());
        self.round_trip(&record, DEFAULT_DEADLINE_MS).map(drop)
    }

    /// Sends any record. The top bit of its cookie is reserved for the other methods.
    pub fn send(&self, record: &Record) -> Result<()> {
        self.send_bytes(record.as_bytes())
    }

    /// Sends any datagram. [`Error::NoAnswer`] where the socket's buffer stays full for [`ANSWER_TIMEOUT`].
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<()> {
        let begun = Instant::now();
        loop {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if begun.elapsed() >= ANSWER_TIMEOUT => {
                    return Err(no_answer(ANSWER_TIMEOUT));
                }
                sent => return Ok(sent.map(drop)?),
            }
        }
    }

    /// Returns the next reply, in the order in which they arrive. Waits at least [`MAX_DEADLINE_MS`]; where no reply arrives
    /// the channel is closed ([`Error::NoAnswer`]).
    pub fn recv(&mut self) -> Result<Record> {
        self.wait_at_least(answer_timeout(MAX_DEADLINE_MS))?;
        match self.early.pop_front() {
            Some(record) => Ok(record),
            None => self.receive()?.ok_or_else(|| self.give_up()),
        }
    }

    /// Raises the receive timeout of the socket to `timeout`, unless it is that long already.
    fn wait_at_least(&mut self, timeout: Duration) -> Result<()> {
        if self.receive_timeout.is_none_or(|now| now < timeout) {
            set_socket_timeout(&self.socket, Timeout::Recv, Some(timeout))?;
            self.receive_timeout = Some(timeout);
        }
        Ok(())
    }

    /// Closes the channel, because an answer is overdue: if it came later and were a grant, nothing would ever end it.
    fn give_up(&self) -> Error {
        let _ = shutdown(&self.socket, Shutdown::Both);
        no_answer(self.receive_timeout.unwrap_or_default())
    }

    fn next_cookie(&mut self) -> u64 {
        self.last_cookie = OWN_COOKIE_BIT | self.last_cookie.wrapping_add(1);
        self.last_cookie
    }

    fn request_verdict(
        &mut self,
        kind: Kind,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        let record = range_request(kind, self.next_cookie(), to, deadline_ms);
        let record = Record { gpa: U64::new(range.start().0), length: U64::new(range.len()), ..record };
        answer(&self.round_trip(&record, effective_deadline(deadline_ms))?)
    }

    fn request_batch_verdict(
        &mut self,
        kind: Kind,
        ranges: &[PageRange<Gpa>],
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        let record = range_request(kind, self.next_cookie(), to, deadline_ms);
        let reply = self.round_trip_bytes(
            &batch::datagram(&record, ranges),
            record.cookie,
            effective_deadline(deadline_ms),
        )?;
        answer(&reply)
    }

    fn round_trip(&mut self, request: &Record, deadline_ms: u32) -> Result<Record> {
        self.round_trip_bytes(request.as_bytes(), request.cookie, deadline_ms)
    }

    /// Sends a request and returns the reply with its cookie. Replies to other requests that arrive before are stored.
    fn round_trip_bytes(&mut self, request: &[u8], cookie: U64, deadline_ms: u32) -> Result<Record> {
        self.wait_at_least(answer_timeout(deadline_ms))?;
        self.send_bytes(request)?;
        loop {
            match self.receive()? {
                Some(reply) if reply.cookie != cookie => self.early.push_back(reply),
                Some(reply) => return check(reply),
                None => return Err(self.give_up()),
            }
        }
    }

    /// Returns one reply; none where the receive timeout has expired.
    fn receive(&self) -> Result<Option<Record>> {
        // One byte more than a record, so that a longer datagram is an error and not cut off.
        let mut space = [MaybeUninit::uninit(); RECORD_LEN + 1];
        loop {
            match recv(&self.socket, &mut space, RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
                Ok((([], _), _)) => return Err(Error::Connection(Errno::CONNRESET)),
                Ok(((bytes, _), _)) => return Ok(Some(Record::parse(bytes)?)),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Returns a request about ranges, without the ranges.
fn range_request(kind: Kind, cookie: u64, to: PageState, deadline_ms: Option<u32>) -> Record {
    let deadline_or_device = U32::new(deadline_ms.unwrap_or(0));
    Record { to: U32::new(to as u32), deadline_or_device, ..Record::new(kind, cookie) }
}

fn no_answer(within: Duration) -> Error {
    Error::NoAnswer { daemon: "the notification channel".into(), within }
}

/// Returns the time after which the answer to a request with this deadline is overdue.
fn answer_timeout(deadline_ms: u32) -> Duration {
    Duration::from_millis(deadline_ms.into()) + ANSWER_GRACE
}

/// Returns the deadline in milliseconds that the daemon applies to a requested one.
fn effective_deadline(deadline_ms: Option<u32>) -> u32 {
    deadline_ms.filter(|requested| *requested != 0).unwrap_or(DEFAULT_DEADLINE_MS)
}

/// Returns the reply, or [`Error::Refused`] where it refuses the request.
fn check(reply: Record) -> Result<Record> {
    if reply.kind() != Some(Kind::Wrong) {
        return Ok(reply);
    }
    let errno = reply.errno.get();
    // These errors are about an address (docs/protocol.md).
    let at = match Errno::from_raw_os_error(errno) {
        Errno::FAULT | Errno::BUSY | Errno::IO => format!(" at {:#x}", reply.gpa.get()),
        _ => String::new(),
    };
    let message = format!("passgate refused the record{at}: {}", Errno::from_raw_os_error(errno));
    Err(Error::Refused { message, errno })
}

/// Returns the answer in a verdict.
fn answer(reply: &Record) -> Result<Answer> {
    if reply.kind() != Some(Kind::Verdict) {
        return Err(RecordError::Kind(reply.kind.get()).into());
    }
    let invalidation = reply.invalidation.get();
    let failure = || {
        Ok::<_, Error>(Failure {
            invalidation,
            range: PageRange::new(reply.gpa.get(), reply.length.get())?,
            cause: reply.cause.get(),
            errno: reply.errno.get(),
            device: reply.deadline_or_device.get().checked_sub(1),
        })
    };
    match reply.outcome.get() {
        verdict::DONE => Ok(Answer::Granted { invalidation }),
        verdict::REFUSED => Ok(Answer::Refused(failure()?)),
        verdict::UNKNOWN => Ok(Answer::Unknown(failure()?)),
        other => Err(RecordError::Field("outcome", other.into()).into()),
    }
}
