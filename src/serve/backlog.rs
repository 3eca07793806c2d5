//! The latest events, for subscribers that come back, and the latest refused ranges, for `Status`.
//!
//! There is a ring of events for each kind, so that frequent events (a device is paused and resumed) never displace important
//! ones (a range is in quarantine). All kinds share one sequence of numbers: a subscriber receives the stored events in the
//! order in which they happened, and a `gap` event wherever some in between are lost.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::gate::{InvalidationId, Notice, Reason};
use crate::observe::events::{self, Names};
use crate::protocol::verbs::{Refused, Reply};
use passgate_bindings::{Failed, Gpa, PageRange};

/// The number of events of one kind that are stored.
const MAX_EVENTS_PER_KIND: usize = 8192;
/// The number of bytes that the stored events of one kind may take, 4 MiB.
const MAX_BYTES_PER_KIND: usize = 4 << 20;
/// The number of refused ranges that are stored.
const MAX_REFUSED_RANGES: usize = 64;

/// The kind of an event. An event displaces only events of its own kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The outcome of a range: `range.*`.
    Range,
    /// A failure or another exception, and the end of a client's memory.
    Notable,
    /// An event that comes with every conversion, or as often as a client wants.
    Routine,
}

impl Kind {
    const COUNT: usize = 3;

    /// Returns the kind of a notice.
    pub(super) fn of(notice: &Notice) -> Self {
        match notice {
            Notice::Refused { .. }
            | Notice::Quarantined { .. }
            | Notice::Freed { .. }
            | Notice::Released { .. } => Self::Range,
            Notice::DeviceFenced { errno, .. } | Notice::DeviceAttached { errno, .. } if *errno == 0 => {
                Self::Routine
            }
            Notice::TdiEnded { .. }
            | Notice::DeviceWanted { .. }
            | Notice::DeviceFenced { .. }
            | Notice::DeviceAttached { .. }
            | Notice::MapFailed { .. }
            | Notice::Inconsistent { .. }
            | Notice::SessionClosed { .. } => Self::Notable,
            Notice::RegionClosed { .. } => Self::Routine,
        }
    }
}

/// The last events of one kind: sequence number and frame, in ascending order.
#[derive(Debug, Default)]
struct Ring {
    frames: VecDeque<(u64, Arc<[u8]>)>,
    /// The total length of the frames.
    bytes: usize,
}

impl Ring {
    /// Adds one event, and drops the oldest ones beyond the limits.
    fn push(&mut self, sequence: u64, frame: Arc<[u8]>) {
        self.bytes += frame.len();
        self.frames.push_back((sequence, frame));
        while self.frames.len() > MAX_EVENTS_PER_KIND || self.bytes > MAX_BYTES_PER_KIND {
            let Some((_, oldest)) = self.frames.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    /// Returns the first stored event with this number or a higher one.
    fn from(&self, sequence: u64) -> Option<&(u64, Arc<[u8]>)> {
        self.frames.get(self.frames.partition_point(|(number, _)| *number < sequence))
    }
}

/// The events of a daemon, and the last refused ranges.
#[derive(Debug)]
pub(super) struct Backlog {
    instance: String,
    /// The number of events so far, which is the sequence number of the last one.
    last: u64,
    rings: [Ring; Kind::COUNT],
    refused: VecDeque<(Instant, InvalidationId, PageRange<Gpa>, Reason)>,
}

/// The beginning of a subscriber's stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// The sequence number of the first event that is sent.
    pub(super) next: u64,
    /// The events before it that are lost, where some are or may be.
    pub(super) gap: Option<Gap>,
}

/// Events that a subscriber cannot receive any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gap {
    /// The number of lost events of this daemon.
    pub(super) lost: u64,
    /// True if the subscriber's last event was another daemon's: how many of that one's it has missed is not known.
    pub(super) restarted: bool,
}

impl Backlog {
    /// Returns an empty backlog with a random instance name of 64 bits.
    pub(super) fn new() -> Result<Self> {
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| Error::Call(Failed::new("getrandom", errno)))?;
        let instance = format!("{:016x}", u64::from_ne_bytes(name));
        Ok(Self { instance, last: 0, rings: Default::default(), refused: VecDeque::new() })
    }

    /// Returns the name of this daemon's run, in 16 hexadecimal digits.
    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    /// Returns the sequence number of the last event; 0 where there was none.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Adds one event, and drops the oldest ones of its kind beyond the limits. Returns the frame to send.
    pub(super) fn push(&mut self, kind: Kind, event: &str, details: &Value) -> Arc<[u8]> {
        self.last += 1;
        let frame: Arc<[u8]> = frame(self.last, event, details).into();
        self.rings[kind as usize].push(self.last, Arc::clone(&frame));
        frame
    }

    /// Returns the first stored event of any kind with this number or a higher one, and its number.
    pub(super) fn from(&self, sequence: u64) -> Option<(u64, &Arc<[u8]>)> {
        let first = self.rings.iter().filter_map(|ring| ring.from(sequence));
        first.min_by_key(|(number, _)| *number).map(|(number, frame)| (*number, frame))
    }

    /// Returns the beginning of the stream of a subscriber that has received everything up to `after` from the daemon
    /// `instance`. Without `after` it begins with the next event.
    pub(super) fn start(&self, after: Option<u64>, instance: Option<&str>) -> Start {
        let Some(after) = after else { return Start { next: self.last + 1, gap: None } };
        let restarted = instance.is_some_and(|name| name != self.instance) || after > self.last;
        let received = if restarted { 0 } else { after };
        let next = self.from(received + 1).map_or(self.last + 1, |(number, _)| number);
        let lost = next - received - 1;
        Start { next, gap: (restarted || lost > 0).then_some(Gap { lost, restarted }) }
    }

    /// Returns the first frame of a stream. The next frame has the sequence number after this one.
    pub(super) fn subscribed(&self, start: &Start) -> Vec<u8> {
        let lost = start.gap.map_or(0, |gap| gap.lost);
        frame(start.next - 1 - lost, "subscribed", &json!({ "instance": self.instance }))
    }

    /// Returns the frame that reports the events lost before `next`.
    pub(super) fn gap(&self, next: u64, gap: Gap) -> Vec<u8> {
        let details = json!({ "instance": self.instance, "lost": gap.lost, "restarted": gap.restarted });
        frame(next - 1, "gap", &details)
    }

    /// Stores a refused range; other notices are ignored. Of a range that is refused again for the same cause and device only
    /// the last time is stored, so that a client that retries displaces no other range.
    pub(super) fn remember(&mut self, notice: &Notice) {
        if let Notice::Refused { invalidation, range, reason } = notice {
            let same = |(_, _, other, why): &(Instant, InvalidationId, PageRange<Gpa>, Reason)| {
                other == range && (why.cause, why.device) == (reason.cause, reason.device)
            };
            self.refused.retain(|refused| !same(refused));
            if self.refused.len() == MAX_REFUSED_RANGES {
                self.refused.pop_front();
            }
            self.refused.push_back((Instant::now(), *invalidation, *range, *reason));
        }
    }

    /// Returns the stored refused ranges, the latest first.
    pub(super) fn refused(&self, names: &dyn Names) -> Vec<Refused> {
        let report =
            |(when, invalidation, range, reason): &(Instant, InvalidationId, PageRange<Gpa>, Reason)| {
                let failure = events::failure(*range, *reason, names);
                let seconds_ago = when.elapsed().as_secs();
                Refused {
                    invalidation: invalidation.0,
                    gpa: failure.gpa,
                    length: failure.length,
                    cause: failure.cause,
                    device: failure.device,
                    errno: failure.errno,
                    seconds_ago,
                }
            };
        self.refused.iter().rev().map(report).collect()
    }
}

fn frame(sequence: u64, event: &str, details: &Value) -> Vec<u8> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let parameters = json!({ "sequence": sequence, "time_ms": time_ms, "event": event, "details": details });
    super::connection::frame(&Reply { parameters, continues: true, error: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::{Cause, Rung};

    fn backlog_of(count: usize, details: &Value) -> Backlog {
        let mut backlog = Backlog::new().unwrap();
        push(&mut backlog, Kind::Routine, count, details);
        backlog
    }

    fn push(backlog: &mut Backlog, kind: Kind, count: usize, details: &Value) {
        for _ in 0..count {
            backlog.push(kind, "event", details);
        }
    }

    /// Returns the numbers of the events that a subscriber is sent which has received all up to `after`, and the number of
    /// events lost in each gap.
    fn stream(backlog: &Backlog, after: u64) -> (Vec<u64>, Vec<u64>) {
        let (mut next, mut numbers, mut gaps) = (after + 1, Vec::new(), Vec::new());
        while let Some((number, _)) = backlog.from(next) {
            if number > next {
                gaps.push(number - next);
            }
            numbers.push(number);
            next = number + 1;
        }
        (numbers, gaps)
    }

    #[test]
    fn backlog_is_bounded_in_events_and_in_bytes() {
        let many = backlog_of(MAX_EVENTS_PER_KIND + 10, &json!({}));
        let first = |backlog: &Backlog| backlog.from(0).map(|(number, _)| number);
        assert_eq!((first(&many), many.last()), (Some(11), MAX_EVENTS_PER_KIND as u64 + 10));
        assert_eq!(many.from(many.last()).unwrap().0, many.last());
        assert!(many.from(many.last() + 1).is_none());
        let long = backlog_of(10, &json!("x".repeat(MAX_BYTES_PER_KIND / 4)));
        assert_eq!((first(&long), long.last()), (Some(8), 10));
        assert!(long.rings.iter().all(|ring| ring.bytes <= MAX_BYTES_PER_KIND));
    }

    #[test]
    fn routine_events_displace_no_range_event_and_their_loss_is_a_gap() {
        let mut backlog = backlog_of(3, &json!({}));
        push(&mut backlog, Kind::Range, 2, &json!({})); // 4, 5
        push(&mut backlog, Kind::Routine, 40_000, &json!({}));
        push(&mut backlog, Kind::Notable, 1, &json!({})); // 40 006
        push(&mut backlog, Kind::Routine, MAX_EVENTS_PER_KIND - 1, &json!({}));
        push(&mut backlog, Kind::Range, 1, &json!({}));
        let last = backlog.last();
        let (numbers, gaps) = stream(&backlog, 0);
        assert_eq!(numbers[..4], [4, 5, 40_005, 40_006], "one routine event before it is stored as well");
        assert_eq!(gaps, [3, 40_005 - 6]);
        assert_eq!((numbers.len(), numbers.last()), (2 + 1 + 1 + MAX_EVENTS_PER_KIND, Some(&last)));
        assert_eq!(
            backlog.start(Some(0), None),
            Start { next: 4, gap: Some(Gap { lost: 3, restarted: false }) }
        );
        assert_eq!(backlog.start(Some(4), None), Start { next: 5, gap: None });
        assert_eq!(backlog.start(Some(last), None), Start { next: last + 1, gap: None });
    }

    #[test]
    fn stream_resumes_after_the_last_event_and_reports_lost_events() {
        let backlog = backlog_of(MAX_EVENTS_PER_KIND + 10, &json!({}));
        let (last, name) = (backlog.last(), backlog.instance.clone());
        let gap = |lost, restarted| Some(Gap { lost, restarted });
        assert_eq!(backlog.start(None, None), Start { next: last + 1, gap: None });
        assert_eq!(backlog.start(Some(last), Some(&name)), Start { next: last + 1, gap: None });
        assert_eq!(backlog.start(Some(10), Some(&name)), Start { next: 11, gap: None });
        assert_eq!(backlog.start(Some(9), None), Start { next: 11, gap: gap(1, false) });
        assert_eq!(backlog.start(Some(0), Some(&name)), Start { next: 11, gap: gap(10, false) });
        // Another daemon's numbers mean nothing here: everything is new.
        assert_eq!(backlog.start(Some(last), Some("other")), Start { next: 11, gap: gap(10, true) });
        assert_eq!(backlog.start(Some(last + 1), None), Start { next: 11, gap: gap(10, true) });
        assert_eq!(backlog_of(0, &json!({})).start(Some(0), None), Start { next: 1, gap: None });
    }

    #[test]
    fn range_refused_repeatedly_displaces_no_other() {
        let mut backlog = Backlog::new().unwrap();
        let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Rung::Unmap, errno: 5 };
        let mut refuse = |invalidation, page: u64, cause| {
            let range = PageRange::new(page * 4096, 4096).unwrap();
            let reason = Reason { cause, ..reason };
            let notice = Notice::Refused { invalidation: InvalidationId(invalidation), range, reason };
            backlog.remember(&notice);
        };
        refuse(1, 1, Cause::UnmapFailed);
        refuse(2, 1, Cause::DmaInFlight);
        (3..1000).for_each(|invalidation| refuse(invalidation, 2, Cause::UnmapFailed));
        let stored: Vec<u64> = backlog.refused.iter().map(|(_, invalidation, ..)| invalidation.0).collect();
        assert_eq!(stored, [1, 2, 999]);
    }

    #[test]
    fn instance_names_are_unique() {
        assert_ne!(Backlog::new().unwrap().instance, Backlog::new().unwrap().instance);
    }
}
