//! What was told lately, so that who was away can hear it, and what was refused lately, for `Status`.
//!
//! Events are kept in a ring for each kind of them, so that what comes by the thousand (a device is paused and goes on) never
//! displaces what somebody must hear (a range is in quarantine). Their numbers are one sequence all the same: a listener
//! hears what is kept in the order in which it was told, with a gap wherever something in between is not.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::gate::{InvalidationId, Notice, Reason};
use crate::observe::events::{self, Names};
use crate::protocol::verbs::{Refused, Reply};
use passgate_bindings::{Failed, Gpa, PageRange};

/// Events of one kind that are kept.
const KEPT_EVENTS: usize = 8192;
/// Bytes of one kind of events that are kept at most.
const KEPT_BYTES: usize = 4 << 20;
/// Refused ranges that are remembered.
const REFUSED: usize = 64;

/// The kinds of events, by what they may not displace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// What became of a range: `range.*`.
    Range,
    /// What does not happen while all goes well, and the end of a client's memory.
    Notable,
    /// What comes with every conversion, or whenever a client wants it.
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
            | Notice::SessionClosed { .. } => Self::Notable,
            Notice::RegionClosed { .. } => Self::Routine,
        }
    }
}

/// The last events of one kind, as the frames that are sent, with their numbers.
#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<(u64, Arc<[u8]>)>,
    bytes: usize,
}

impl Ring {
    /// Takes one event; the oldest go where it is one too many.
    fn push(&mut self, sequence: u64, frame: Arc<[u8]>) {
        self.bytes += frame.len();
        self.kept.push_back((sequence, frame));
        while self.kept.len() > KEPT_EVENTS || self.bytes > KEPT_BYTES {
            let Some((_, oldest)) = self.kept.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    /// Returns the first event that is kept from this number on.
    fn from(&self, sequence: u64) -> Option<&(u64, Arc<[u8]>)> {
        self.kept.get(self.kept.partition_point(|(kept, _)| *kept < sequence))
    }
}

/// The events of a daemon, and the last refused ranges.
#[derive(Debug)]
pub(super) struct Backlog {
    instance: String,
    /// Events so far; the sequence number of the last one.
    last: u64,
    rings: [Ring; Kind::COUNT],
    refused: VecDeque<(Instant, InvalidationId, PageRange<Gpa>, Reason)>,
}

/// Where a listener's stream begins.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// The sequence number of the first event that it is sent.
    pub(super) next: u64,
    /// Events before it that it has missed, where it has missed some or may have.
    pub(super) gap: Option<Gap>,
}

/// What a listener has missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gap {
    /// Events of this daemon that are not kept any more.
    pub(super) lost: u64,
    /// Whether what it heard last was another daemon's, of whose other events nothing is known.
    pub(super) restarted: bool,
}

impl Backlog {
    /// Nothing yet, by a name that no other daemon has had.
    pub(super) fn new() -> Result<Self> {
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| Error::Call(Failed::new("getrandom", errno)))?;
        let instance = format!("{:016x}", u64::from_ne_bytes(name));
        Ok(Self { instance, last: 0, rings: Default::default(), refused: VecDeque::new() })
    }

    /// The daemon's name, new with every start.
    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    /// The sequence number of the last event.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Takes one event; the oldest of its kind go where it is one too many.
    pub(super) fn push(&mut self, kind: Kind, event: &str, details: &Value) -> Arc<[u8]> {
        self.last += 1;
        let frame: Arc<[u8]> = frame(self.last, event, details).into();
        self.rings[kind as usize].push(self.last, Arc::clone(&frame));
        frame
    }

    /// Returns the first event that is kept from this number on, and its number.
    pub(super) fn from(&self, sequence: u64) -> Option<(u64, &Arc<[u8]>)> {
        let first = self.rings.iter().filter_map(|ring| ring.from(sequence));
        first.min_by_key(|(kept, _)| *kept).map(|(kept, frame)| (*kept, frame))
    }

    /// Where the stream of a listener begins that has heard everything up to `after` of the daemon `instance`;
    /// without `after` with what comes.
    pub(super) fn start(&self, after: Option<u64>, instance: Option<&str>) -> Start {
        let Some(after) = after else { return Start { next: self.last + 1, gap: None } };
        let restarted = instance.is_some_and(|name| name != self.instance) || after > self.last;
        let heard = if restarted { 0 } else { after };
        let next = self.from(heard + 1).map_or(self.last + 1, |(kept, _)| kept);
        let lost = next - heard - 1;
        Start { next, gap: (restarted || lost > 0).then_some(Gap { lost, restarted }) }
    }

    /// The first frame of a stream: what is sent next has the sequence number after this one.
    pub(super) fn subscribed(&self, start: &Start) -> Vec<u8> {
        let lost = start.gap.map_or(0, |gap| gap.lost);
        frame(start.next - 1 - lost, "subscribed", &json!({ "instance": self.instance }))
    }

    /// The frame that says what is missing before `next`.
    pub(super) fn gap(&self, next: u64, gap: Gap) -> Vec<u8> {
        let details = json!({ "instance": self.instance, "lost": gap.lost, "restarted": gap.restarted });
        frame(next - 1, "gap", &details)
    }

    /// Remembers what was refused; of a range that is refused again for the same cause, the last time only, so that one who
    /// tries again and again displaces no other range.
    pub(super) fn remember(&mut self, notice: &Notice) {
        if let Notice::Refused { invalidation, range, reason } = notice {
            let same = |(_, _, other, why): &(Instant, InvalidationId, PageRange<Gpa>, Reason)| {
                other == range && (why.cause, why.device) == (reason.cause, reason.device)
            };
            self.refused.retain(|refused| !same(refused));
            if self.refused.len() == REFUSED {
                self.refused.pop_front();
            }
            self.refused.push_back((Instant::now(), *invalidation, *range, *reason));
        }
    }

    /// What was refused lately, the last first.
    pub(super) fn refused(&self, names: &dyn Names) -> Vec<Refused> {
        let said =
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
        self.refused.iter().rev().map(said).collect()
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
    use crate::gate::{Cause, Step};

    fn told(count: usize, details: &Value) -> Backlog {
        let mut backlog = Backlog::new().unwrap();
        push(&mut backlog, Kind::Routine, count, details);
        backlog
    }

    fn push(backlog: &mut Backlog, kind: Kind, count: usize, details: &Value) {
        for _ in 0..count {
            backlog.push(kind, "event", details);
        }
    }

    /// The numbers of what a listener that has heard up to `heard` is sent, and of how many events each gap tells.
    fn heard(backlog: &Backlog, heard: u64) -> (Vec<u64>, Vec<u64>) {
        let (mut next, mut numbers, mut gaps) = (heard + 1, Vec::new(), Vec::new());
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
    fn what_is_kept_is_bounded_in_events_and_in_bytes() {
        let many = told(KEPT_EVENTS + 10, &json!({}));
        let first = |backlog: &Backlog| backlog.from(0).map(|(number, _)| number);
        assert_eq!((first(&many), many.last()), (Some(11), KEPT_EVENTS as u64 + 10));
        assert_eq!(many.from(many.last()).unwrap().0, many.last());
        assert!(many.from(many.last() + 1).is_none());
        let long = told(10, &json!("x".repeat(KEPT_BYTES / 4)));
        assert_eq!((first(&long), long.last()), (Some(8), 10));
        assert!(long.rings.iter().all(|ring| ring.bytes <= KEPT_BYTES));
    }

    #[test]
    fn routine_events_displace_no_range_event_and_the_stream_says_where_they_are_missing() {
        let mut backlog = told(3, &json!({}));
        push(&mut backlog, Kind::Range, 2, &json!({})); // 4, 5
        push(&mut backlog, Kind::Routine, 40_000, &json!({}));
        push(&mut backlog, Kind::Notable, 1, &json!({})); // 40 006
        push(&mut backlog, Kind::Routine, KEPT_EVENTS - 1, &json!({}));
        push(&mut backlog, Kind::Range, 1, &json!({}));
        let last = backlog.last();
        let (numbers, gaps) = heard(&backlog, 0);
        assert_eq!(numbers[..4], [4, 5, 40_005, 40_006], "one routine event before it is kept as well");
        assert_eq!(gaps, [3, 40_005 - 6]);
        assert_eq!((numbers.len(), numbers.last()), (2 + 1 + 1 + KEPT_EVENTS, Some(&last)));
        assert_eq!(
            backlog.start(Some(0), None),
            Start { next: 4, gap: Some(Gap { lost: 3, restarted: false }) }
        );
        assert_eq!(backlog.start(Some(4), None), Start { next: 5, gap: None });
        assert_eq!(backlog.start(Some(last), None), Start { next: last + 1, gap: None });
    }

    #[test]
    fn a_stream_begins_behind_what_was_heard_and_says_what_is_missing() {
        let backlog = told(KEPT_EVENTS + 10, &json!({}));
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
        assert_eq!(told(0, &json!({})).start(Some(0), None), Start { next: 1, gap: None });
    }

    #[test]
    fn range_that_is_refused_again_and_again_displaces_no_other() {
        let mut backlog = Backlog::new().unwrap();
        let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 5 };
        let mut refuse = |invalidation, page: u64, cause| {
            let range = PageRange::new(page * 4096, 4096).unwrap();
            let reason = Reason { cause, ..reason };
            let notice = Notice::Refused { invalidation: InvalidationId(invalidation), range, reason };
            backlog.remember(&notice);
        };
        refuse(1, 1, Cause::UnmapFailed);
        refuse(2, 1, Cause::DmaInFlight);
        (3..1000).for_each(|invalidation| refuse(invalidation, 2, Cause::UnmapFailed));
        let kept: Vec<u64> = backlog.refused.iter().map(|(_, invalidation, ..)| invalidation.0).collect();
        assert_eq!(kept, [1, 2, 999]);
    }

    #[test]
    fn no_two_daemons_have_one_name() {
        assert_ne!(Backlog::new().unwrap().instance, Backlog::new().unwrap().instance);
    }
}
