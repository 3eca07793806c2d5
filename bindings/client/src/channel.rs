//! The notification channel: requests and replies are 64-byte records, one reply per request, and many may be in flight.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use crate::client::{ANSWER_GRACE, ANSWER_TIMEOUT};
use crate::error::{Error, Result};
use crate::protocol::batch;
use crate::protocol::record::{DEFAULT_DEADLINE_MS, Kind, MAX_DEADLINE_MS, RECORD_LEN, Record, RecordError};
use crate::units::{Gpa, PageRange};
use crate::{Cause, Outcome, PageState, VerdictKind};

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
    /// The range must not be converted: a page of it is in quarantine from before. Nothing has changed, and trying again is of
    /// no use before the event `range.freed` or `range.released`.
    Quarantined {
        /// The first address in quarantine.
        gpa: Gpa,
    },
}

/// The first failure of an invalidation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// The id of the invalidation, for `Explain`.
    pub invalidation: u64,
    /// The range that failed.
    pub range: PageRange<Gpa>,
    /// The cause; none where the daemon is newer than this library and named one that it does not know.
    pub cause: Option<Cause>,
    /// The errno of the failed kernel call; 0 where there was none.
    pub errno: i32,
    /// The index, in the list of `Status`, of the device that could not be stopped; none where no device is the cause.
    pub device: Option<u32>,
}

impl Failure {
    /// Returns the name of the cause, as [`Cause::word`] does; `?` for a cause that is not known.
    pub fn word(&self) -> &'static str {
        self.cause.map_or("?", Cause::word)
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
        self.send(&Record { gpa: range.start().0, length: range.len(), ..record })?;
        Ok(Ticket(record.cookie))
    }

    /// Returns the next answer to a submitted request, in the order in which the answers arrive. Where none arrives in time,
    /// the channel is closed ([`Error::NoAnswer`]).
    pub fn completed(&mut self) -> Result<(Ticket, Result<Answer>)> {
        self.wait_at_least(answer_timeout(DEFAULT_DEADLINE_MS))?;
        let reply = match self.early.pop_front() {
            Some(reply) => reply,
            None => self.receive()?.ok_or_else(|| self.give_up())?,
        };
        Ok((Ticket(reply.cookie), answer(&reply)))
    }

    /// Reports the outcome of a conversion that was granted.
    pub fn end(&mut self, invalidation: u64, outcome: Outcome) -> Result<()> {
        let mut record = Record::new(Kind::End, self.next_cookie());
        record.invalidation = invalidation;
        record.outcome = outcome.kind() as u32;
        if let Outcome::Unknown { errno, offset } = outcome {
            (record.errno, record.offset) = (errno, offset);
        }
        check(&self.round_trip(&record, DEFAULT_DEADLINE_MS)?)
    }

    /// Waits for a reply to an empty request, for measurements.
    pub fn echo(&mut self) -> Result<()> {
        let record = Record::new(Kind::Echo, self.next_cookie());
        check(&self.round_trip(&record, DEFAULT_DEADLINE_MS)?)
    }

    /// Sends any record. The top bit of its cookie is reserved for the other methods.
    pub fn send(&self, record: &Record) -> Result<()> {
        self.send_bytes(&record.to_bytes())
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
        let record = Record { gpa: range.start().0, length: range.len(), ..record };
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
        self.round_trip_bytes(&request.to_bytes(), request.cookie, deadline_ms)
    }

    /// Sends a request and returns the reply with its cookie. Replies to other requests that arrive before are stored.
    fn round_trip_bytes(&mut self, request: &[u8], cookie: u64, deadline_ms: u32) -> Result<Record> {
        self.wait_at_least(answer_timeout(deadline_ms))?;
        self.send_bytes(request)?;
        loop {
            match self.receive()? {
                Some(reply) if reply.cookie != cookie => self.early.push_back(reply),
                Some(reply) => return Ok(reply),
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
    Record { to: to as u32, deadline_or_device: deadline_ms.unwrap_or(0), ..Record::new(kind, cookie) }
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

/// Returns [`Error::Refused`] where the reply refuses the request.
fn check(reply: &Record) -> Result<()> {
    if reply.kind() != Some(Kind::Wrong) {
        return Ok(());
    }
    let errno = Errno::from_raw_os_error(reply.errno);
    // These errors are about an address (docs/protocol.md).
    let at = match errno {
        Errno::FAULT | Errno::BUSY => format!(" at {:#x}", reply.gpa),
        _ => String::new(),
    };
    let message = format!("passgate refused the record{at}: {errno}");
    Err(Error::Refused { message, errno: reply.errno })
}

/// Returns the answer in the reply to a begin or a convert.
fn answer(reply: &Record) -> Result<Answer> {
    if reply.kind() == Some(Kind::Wrong) && reply.errno == Errno::IO.raw_os_error() {
        return Ok(Answer::Quarantined { gpa: Gpa(reply.gpa) });
    }
    check(reply)?;
    if reply.kind() != Some(Kind::Verdict) {
        return Err(RecordError::Kind(reply.kind).into());
    }
    let invalidation = reply.invalidation;
    let failure = || {
        Ok::<_, Error>(Failure {
            invalidation,
            range: PageRange::new(reply.gpa, reply.length)?,
            cause: Cause::from_number(reply.cause),
            errno: reply.errno,
            device: reply.deadline_or_device.checked_sub(1),
        })
    };
    match VerdictKind::from_number(reply.outcome) {
        Some(VerdictKind::Done) => Ok(Answer::Granted { invalidation }),
        Some(VerdictKind::Refused) => Ok(Answer::Refused(failure()?)),
        Some(VerdictKind::Unknown) => Ok(Answer::Unknown(failure()?)),
        None => Err(RecordError::Field("outcome", reply.outcome.into()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_about_quarantine_is_an_answer_and_other_errnos_are_refusals() {
        let wrong =
            |errno: Errno| Record { errno: errno.raw_os_error(), gpa: 0x3000, ..Record::new(Kind::Wrong, 1) };
        assert_eq!(answer(&wrong(Errno::IO)).unwrap(), Answer::Quarantined { gpa: Gpa(0x3000) });
        for errno in [Errno::BUSY, Errno::FAULT, Errno::INVAL, Errno::PERM] {
            let error = answer(&wrong(errno)).unwrap_err();
            assert!(matches!(error, Error::Refused { errno: raw, .. } if raw == errno.raw_os_error()));
            let at = matches!(errno, Errno::BUSY | Errno::FAULT);
            assert_eq!(error.to_string().contains(" at 0x3000: "), at, "{error}");
        }
    }

    #[test]
    fn cause_of_a_newer_daemon_is_a_failure_without_one() {
        let verdict = |cause: u32| Record {
            outcome: VerdictKind::Refused as u32,
            gpa: 0x1000,
            length: 0x1000,
            cause,
            deadline_or_device: 2,
            ..Record::new(Kind::Verdict, 1)
        };
        for (number, cause) in [(2, Some(Cause::DmaInFlight)), (0, None), (77, None)] {
            let Answer::Refused(failure) = answer(&verdict(number)).unwrap() else { panic!("not refused") };
            assert_eq!((failure.cause, failure.device), (cause, Some(1)));
        }
    }
}
