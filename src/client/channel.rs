//! The notification channel: 64-byte records, one request and one reply each, many in flight.

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

use super::{ANSWER_TIMEOUT, GRACE};
use crate::error::{Error, Result};
use crate::gate::{Cause, Outcome, PageState};
use crate::protocol::batch;
use crate::protocol::record::{
    DEFAULT_DEADLINE_MS, Kind, MAX_DEADLINE_MS, RECORD_LEN, Record, RecordError, verdict,
};

/// Marks the cookies of this file's own requests, so that they never meet those of [`Channel::send`]'s callers.
const OWN: u64 = 1 << 63;

/// What the daemon says to a begin or a convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// No device sees the range any more: convert it now, then [`Channel::end`] (of a convert: it is converted).
    Granted {
        /// Names it, for the end.
        invalidation: u64,
    },
    /// Do not convert: passgate knows that a device may still see the range.
    Refused(Failure),
    /// Do not convert: whether a device still sees the range is not known.
    Unknown(Failure),
}

/// What failed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Names it, for `Explain`.
    pub invalidation: u64,
    /// Where.
    pub range: PageRange<Gpa>,
    /// Why (`Cause` as a number).
    pub cause: u32,
    /// The kernel's answer; 0 where there was none.
    pub errno: i32,
    /// The number of the device to blame, counted as `Status` lists them.
    pub device: Option<u32>,
}

impl Failure {
    /// Why, in a word.
    pub fn word(&self) -> &'static str {
        Cause::ALL.into_iter().find(|cause| *cause as u32 == self.cause).map_or("?", Cause::word)
    }
}

/// Names a request that was submitted, and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A notification channel. Closing it closes nothing else; what was begun on it and not ended stays open until the
/// connection that opened it goes.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    next: u64,
    /// Replies to other requests that came while one was waited for.
    early: VecDeque<Record>,
    /// How long the socket waits for a reply: as long as the longest deadline that was asked for, and a little more.
    patience: Option<Duration>,
}

impl Channel {
    /// Takes a connected SOCK_SEQPACKET socket that `OpenChannel` gave.
    pub fn from_fd(socket: OwnedFd) -> Self {
        // A daemon that reads nothing must not keep who sends. It fails on what is no socket, as every call then does.
        let _ = set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT));
        Self { socket, next: OWN, early: VecDeque::new(), patience: None }
    }

    /// Asks before `range` is converted. `deadline_ms` is within how many milliseconds to answer.
    pub fn begin(
        &mut self,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.ask(Kind::Begin, range, to, deadline_ms)
    }

    /// Has passgate change `range` itself; only in memory added with `sole_mapper`.
    pub fn convert(
        &mut self,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.ask(Kind::Convert, range, to, deadline_ms)
    }

    /// As [`Channel::begin`], for up to [`batch::MAX_RANGES`] ranges (ascending, none overlapping another) at once: one answer, and
    /// one [`Channel::end`], for all of them. Where it is refused nothing of them may be converted; those that did not fail
    /// may be begun anew.
    pub fn begin_many(
        &mut self,
        ranges: &[PageRange<Gpa>],
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.ask_many(Kind::BeginMany, ranges, to, deadline_ms)
    }

    /// As [`Channel::convert`], for many ranges at once.
    pub fn convert_many(
        &mut self,
        ranges: &[PageRange<Gpa>],
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        self.ask_many(Kind::ConvertMany, ranges, to, deadline_ms)
    }

    /// Asks as [`Channel::begin`] does, and does not wait: many requests may be in flight. What this returns names the
    /// answer that [`Channel::completed`] brings. A request that finds the socket full waits until the daemon has read some
    /// ([`Error::NoAnswer`] where it reads none); who asks for more than a few hundred at a time collects answers in between.
    pub fn submit(
        &mut self,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Ticket> {
        let record = asking(Kind::Begin, self.cookie(), to, deadline_ms);
        self.wait_at_least(patience(within(deadline_ms)))?;
        self.send(&Record { gpa: U64::new(range.start().0), length: U64::new(range.len()), ..record })?;
        Ok(Ticket(record.cookie.get()))
    }

    /// The next answer to what was submitted, in the order in which they come. Where none comes although each is due, the
    /// channel is closed.
    pub fn completed(&mut self) -> Result<(Ticket, Result<Answer>)> {
        self.wait_at_least(patience(DEFAULT_DEADLINE_MS))?;
        let reply = match self.early.pop_front() {
            Some(reply) => reply,
            None => self.receive()?.ok_or_else(|| self.give_up())?,
        };
        Ok((Ticket(reply.cookie.get()), wrong(reply).and_then(|reply| answer(&reply))))
    }

    /// Says how a conversion that was granted went.
    pub fn end(&mut self, invalidation: u64, outcome: Outcome) -> Result<()> {
        let mut record = Record::new(Kind::End, self.cookie());
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
        self.round(&record, DEFAULT_DEADLINE_MS).map(drop)
    }

    /// There and back, for measuring.
    pub fn echo(&mut self) -> Result<()> {
        let record = Record::new(Kind::Echo, self.cookie());
        self.round(&record, DEFAULT_DEADLINE_MS).map(drop)
    }

    /// Sends one record, whatever it is. The top bit of its cookie belongs to the calls above.
    pub fn send(&self, record: &Record) -> Result<()> {
        self.send_bytes(record.as_bytes())
    }

    /// Sends one datagram, whatever it is. On a socket that was handed to us and does not block, neither does this.
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

    /// The next reply, in the order in which they came. Waits as long as the longest deadline that there is.
    pub fn recv(&mut self) -> Result<Record> {
        self.wait_at_least(patience(MAX_DEADLINE_MS))?;
        match self.early.pop_front() {
            Some(record) => Ok(record),
            None => self.receive()?.ok_or_else(|| self.give_up()),
        }
    }

    /// Has the socket wait for a reply for so long, or longer.
    fn wait_at_least(&mut self, patience: Duration) -> Result<()> {
        if self.patience.is_none_or(|now| now < patience) {
            set_socket_timeout(&self.socket, Timeout::Recv, Some(patience))?;
            self.patience = Some(patience);
        }
        Ok(())
    }

    /// Closes the channel, because an answer that was due has not come: a grant that came now would never be ended.
    fn give_up(&self) -> Error {
        let _ = shutdown(&self.socket, Shutdown::Both);
        no_answer(self.patience.unwrap_or_default())
    }

    fn cookie(&mut self) -> u64 {
        self.next = OWN | self.next.wrapping_add(1);
        self.next
    }

    fn ask(
        &mut self,
        kind: Kind,
        range: PageRange<Gpa>,
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        let record = asking(kind, self.cookie(), to, deadline_ms);
        let record = Record { gpa: U64::new(range.start().0), length: U64::new(range.len()), ..record };
        answer(&self.round(&record, within(deadline_ms))?)
    }

    fn ask_many(
        &mut self,
        kind: Kind,
        ranges: &[PageRange<Gpa>],
        to: PageState,
        deadline_ms: Option<u32>,
    ) -> Result<Answer> {
        let record = asking(kind, self.cookie(), to, deadline_ms);
        let reply =
            self.round_bytes(&batch::datagram(&record, ranges), record.cookie, within(deadline_ms))?;
        answer(&reply)
    }

    fn round(&mut self, request: &Record, within_ms: u32) -> Result<Record> {
        self.round_bytes(request.as_bytes(), request.cookie, within_ms)
    }

    fn round_bytes(&mut self, request: &[u8], cookie: U64, within_ms: u32) -> Result<Record> {
        self.wait_at_least(patience(within_ms))?;
        self.send_bytes(request)?;
        loop {
            match self.receive()? {
                Some(reply) if reply.cookie != cookie => self.early.push_back(reply),
                Some(reply) => return wrong(reply),
                None => return Err(self.give_up()),
            }
        }
    }

    /// One reply; none where the socket's patience has ended.
    fn receive(&self) -> Result<Option<Record>> {
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

/// A request about ranges, without them.
fn asking(kind: Kind, cookie: u64, to: PageState, deadline_ms: Option<u32>) -> Record {
    let deadline_or_device = U32::new(deadline_ms.unwrap_or(0));
    Record { to: U32::new(to as u32), deadline_or_device, ..Record::new(kind, cookie) }
}

fn no_answer(within: Duration) -> Error {
    Error::NoAnswer { daemon: "the notification channel".into(), within }
}

/// How long the answer to a request with this deadline may take to come.
fn patience(deadline_ms: u32) -> Duration {
    Duration::from_millis(deadline_ms.into()) + GRACE
}

/// Within how many milliseconds the daemon answers.
fn within(deadline_ms: Option<u32>) -> u32 {
    deadline_ms.filter(|asked| *asked != 0).unwrap_or(DEFAULT_DEADLINE_MS)
}

/// The reply, unless it says that the request was wrong.
fn wrong(reply: Record) -> Result<Record> {
    if reply.kind() != Some(Kind::Wrong) {
        return Ok(reply);
    }
    let errno = reply.errno.get();
    // Those mistakes are at an address.
    let at = match Errno::from_raw_os_error(errno) {
        Errno::FAULT | Errno::BUSY | Errno::IO => format!(" at {:#x}", reply.gpa.get()),
        _ => String::new(),
    };
    let message = format!("passgate refused the record{at}: {}", Errno::from_raw_os_error(errno));
    Err(Error::Refused { message, errno })
}

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
