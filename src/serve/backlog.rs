//! What was told lately, so that who was away can hear it, and what was refused lately, for `Status`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::gate::{InvalidationId, Notice, Reason};
use crate::observe::events::{self, Names};
use crate::protocol::verbs::{Refused, Reply};
use passgate_bindings::{Failed, Gpa, PageRange};

/// Events that are kept.
const EVENTS: usize = 8192;
/// Bytes of them that are kept at most.
const BYTES: usize = 4 << 20;
/// Refused ranges that are remembered.
const REFUSED: usize = 64;

/// The events of a daemon, and the last refused ranges.
#[derive(Debug)]
pub(super) struct Backlog {
    instance: String,
    /// Events so far; the sequence number of the last one.
    last: u64,
    /// The last of them, as the frames that are sent.
    kept: VecDeque<Arc<[u8]>>,
    bytes: usize,
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
        let (kept, refused) = (VecDeque::new(), VecDeque::new());
        Ok(Self { instance, last: 0, kept, bytes: 0, refused })
    }

    /// The daemon's name, new with every start.
    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    /// The sequence number of the last event.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// The sequence number of the first event that is kept; one more than the last where none is.
    pub(super) fn first(&self) -> u64 {
        self.last + 1 - self.kept.len() as u64
    }

    /// Takes one event; the oldest go where it is one too many.
    pub(super) fn push(&mut self, event: &str, details: &Value) -> Arc<[u8]> {
        self.last += 1;
        let frame: Arc<[u8]> = frame(self.last, event, details).into();
        self.bytes += frame.len();
        self.kept.push_back(Arc::clone(&frame));
        while self.kept.len() > EVENTS || self.bytes > BYTES {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.bytes -= oldest.len();
        }
        frame
    }

    /// The frame of an event, while it is kept.
    pub(super) fn get(&self, sequence: u64) -> Option<&Arc<[u8]>> {
        let at = sequence.checked_sub(self.first())?;
        self.kept.get(usize::try_from(at).ok()?)
    }

    /// Where the stream of a listener begins that has heard everything up to `after` of the daemon `instance`;
    /// without `after` with what comes.
    pub(super) fn start(&self, after: Option<u64>, instance: Option<&str>) -> Start {
        let Some(after) = after else { return Start { next: self.last + 1, gap: None } };
        let restarted = instance.is_some_and(|name| name != self.instance) || after > self.last;
        let heard = if restarted { 0 } else { after };
        let next = self.first().max(heard + 1);
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

    /// Remembers what was refused.
    pub(super) fn remember(&mut self, notice: &Notice) {
        if let Notice::Refused { invalidation, range, reason } = notice {
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
    let parameters = json!({ "sequence": sequence, "event": event, "details": details });
    super::connection::frame(&Reply { parameters, continues: true, error: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(count: usize, details: &Value) -> Backlog {
        let mut backlog = Backlog::new().unwrap();
        for _ in 0..count {
            backlog.push("event", details);
        }
        backlog
    }

    #[test]
    fn what_is_kept_is_bounded_in_events_and_in_bytes() {
        let many = told(EVENTS + 10, &json!({}));
        assert_eq!((many.first(), many.last()), (11, EVENTS as u64 + 10));
        assert!(many.get(10).is_none() && many.get(11).is_some());
        assert!(many.get(many.last()).is_some() && many.get(many.last() + 1).is_none());
        let long = told(10, &json!("x".repeat(BYTES / 4)));
        assert_eq!((long.kept.len(), long.last()), (3, 10));
        assert!(long.bytes <= BYTES);
    }

    #[test]
    fn a_stream_begins_behind_what_was_heard_and_says_what_is_missing() {
        let backlog = told(EVENTS + 10, &json!({}));
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
    fn no_two_daemons_have_one_name() {
        assert_ne!(Backlog::new().unwrap().instance, Backlog::new().unwrap().instance);
    }
}
