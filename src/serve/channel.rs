//! The notification channel: one request per datagram, a record with any ranges of its batch behind it; answers are records
//! (docs/protocol.md).

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::connection::Channel;
use super::poller::Interest;
use super::vm::Vm;
use crate::gate::{
    Answer, Caller, ClientId, Door, Event, InvalidationId, Outcome, OutcomeKind, Performer, Verdict,
};
use crate::protocol::batch::MAX_DATAGRAM;
use crate::protocol::request::{self, Request, RequestError};
use crate::protocol::{Kind, Record};

impl Vm {
    /// Sends what is queued, then reads one request and serves it. Returns true if there may be more. While an answer is
    /// queued no request is read, so that a client that does not read its answers cannot fill memory.
    pub(super) fn channel_ready(&mut self, client: ClientId) -> bool {
        let Some(channel) = self.connections.get_mut(&client).and_then(|c| c.channel.as_mut()) else {
            return false;
        };
        if channel.is_behind() {
            let broken = channel.flush().is_err();
            if !broken && channel.is_behind() {
                return false;
            }
            self.watch_channel(client, Interest::Read);
            if broken {
                self.drop_channel(client);
                return false;
            }
        }
        let Some(channel) = self.connections.get_mut(&client).and_then(|c| c.channel.as_mut()) else {
            return false;
        };
        match recv(&channel.socket, &mut self.datagram[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
            Err(Errno::INTR) => true,
            Err(Errno::AGAIN) => false,
            Ok((_, 0)) | Err(_) => {
                self.drop_channel(client);
                false
            }
            Ok((got, length)) => {
                // With MSG_TRUNC the kernel returns the length of the datagram, also if the buffer is shorter (recv(2)).
                if length > MAX_DATAGRAM {
                    let error = RequestError::Length(length);
                    self.reject(client, 0, error.errno(), &error);
                    return true;
                }
                let datagram = &self.datagram[..got.min(length)];
                match request::split(datagram)
                    .map(|(record, ranges)| (record.cookie, Request::from_record(&record, ranges)))
                {
                    Ok((cookie, Ok(request))) => self.request(client, cookie, request),
                    Ok((cookie, Err(error))) => self.reject(client, cookie, error.errno(), &error),
                    Err(error) => self.reject(client, 0, error.errno(), &error),
                }
                !self
                    .connections
                    .get(&client)
                    .is_none_or(|c| c.channel.as_ref().is_none_or(Channel::is_behind))
            }
        }
    }

    fn request(&mut self, client: ClientId, cookie: u64, request: Request) {
        let caller = Caller { client, door: Door::Channel, cookie };
        match request {
            Request::Echo => self.send(client, Record::new(Kind::Echoed, cookie)),
            Request::End { invalidation, said } => {
                let invalidation = InvalidationId(invalidation);
                let outcome = self.session.outcome(invalidation, said);
                if matches!(outcome, Outcome::Unknown { .. }) && said.kind != OutcomeKind::Unknown {
                    log::warn!(
                        "client {}: the end of invalidation {} contradicts itself",
                        client.0,
                        invalidation.0
                    );
                }
                self.session.handle(Event::End { caller, invalidation, outcome });
            }
            Request::Begin { ranges, to, deadline_ms, convert } => {
                let may = || ranges.iter().try_for_each(|range| self.session.may_convert(range));
                if convert && let Err(error) = may() {
                    return self.reject(client, cookie, error.errno(), &error);
                }
                let performer = if convert { Performer::Passgate } else { Performer::Client };
                let deadline_ns = u64::from(deadline_ms) * 1_000_000;
                self.session.handle(Event::Begin { caller, ranges, to, performer, deadline_ns });
            }
        }
    }

    /// Sends the answer to a record.
    pub(super) fn answer_channel(&mut self, caller: Caller, answer: &Answer) {
        let record = match answer {
            Answer::Ended { invalidation } => {
                Record { invalidation: invalidation.0, ..Record::new(Kind::Ended, caller.cookie) }
            }
            Answer::Verdict { invalidation, verdict } => {
                verdict_record(*invalidation, *verdict, caller.cookie)
            }
            Answer::Refused(refusal) => {
                let errno = refusal.errno();
                let gpa = refusal.gpa().map_or(0, |gpa| gpa.0);
                log::debug!("client {}: {refusal}", caller.client.0);
                Record { errno, gpa, ..Record::new(Kind::Wrong, caller.cookie) }
            }
            // These verbs exist on the control socket only.
            Answer::RegionAdded { .. }
            | Answer::RegionRemoved { .. }
            | Answer::Released { .. }
            | Answer::Adopted { .. } => return,
        };
        self.send(caller.client, record);
    }

    fn reject(&mut self, client: ClientId, cookie: u64, errno: i32, error: &dyn std::error::Error) {
        log::debug!("client {}: {error}", client.0);
        self.session.meter().wrong();
        self.send(client, Record { errno, ..Record::new(Kind::Wrong, cookie) });
    }

    fn send(&mut self, client: ClientId, record: Record) {
        let Some(channel) = self.connections.get_mut(&client).and_then(|c| c.channel.as_mut()) else {
            return;
        };
        let before = channel.is_behind();
        channel.send(record);
        if channel.is_behind() && !before {
            self.watch_channel(client, Interest::Write);
        }
    }

    fn watch_channel(&mut self, client: ClientId, interest: Interest) {
        if let Some(channel) = self.connections.get(&client).and_then(|c| c.channel.as_ref())
            && let Err(error) =
                self.poller.change(&channel.socket, interest, Self::token(client, Door::Channel))
        {
            log::error!("epoll: {error}");
        }
    }

    /// Closes the channel because the client has closed its end. Its open invalidations stay open while its control socket is
    /// connected.
    fn drop_channel(&mut self, client: ClientId) {
        if let Some(connection) = self.connections.get_mut(&client) {
            connection.channel = None;
        }
    }
}

/// Returns the record of a verdict. `deadline_or_device` is the number of the device plus one; 0 means that none is named.
fn verdict_record(invalidation: InvalidationId, verdict: Verdict, cookie: u64) -> Record {
    let outcome = verdict.kind() as u32;
    let record = Record { invalidation: invalidation.0, outcome, ..Record::new(Kind::Verdict, cookie) };
    match verdict {
        Verdict::Done => record,
        Verdict::Refused { range, reason } | Verdict::Unknown { range, reason } => Record {
            gpa: range.start().0,
            length: range.len(),
            cause: reason.cause as u32,
            errno: reason.errno,
            deadline_or_device: reason.device.map_or(0, |device| u32::from(device.0) + 1),
            ..record
        },
    }
}
