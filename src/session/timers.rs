//! The alarms of invalidations: one each, indexed by invalidation and by time; and the time after which mappings were quiet.
//!
//! The alarm of each rung counts from the begin, not from the alarm before it, so that one that is handled late, because the
//! loop was busy, does not delay the later ones. Only where the gate arms the first rung once more, because there was progress, the
//! deadline counts from then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::gate::{InvalidationId, Rung};

/// The alarms that are set.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// The alarm of each invalidation, with the rung that is over by then.
    alarms: BTreeMap<InvalidationId, (Instant, Rung)>,
    /// The same alarms, earliest first.
    by_time: BTreeSet<(Instant, InvalidationId)>,
    /// The time from which the deadline of each invalidation counts that is not answered yet, and true once the alarm of the
    /// first rung was set.
    begun: BTreeMap<InvalidationId, (Instant, bool)>,
    /// The time of the next [`crate::gate::Event::Quiet`]; none while no mapping is fragmented.
    quiet: Option<Instant>,
}

impl Timers {
    /// Records the time at which an invalidation began; a second call changes nothing.
    pub(super) fn begin(&mut self, id: InvalidationId, now: Instant) {
        self.begun.entry(id).or_insert((now, false));
    }

    /// Forgets an invalidation: it is answered, or over.
    pub(super) fn end(&mut self, id: InvalidationId) {
        self.remove(id);
        self.begun.remove(&id);
    }

    /// Sets the alarm of a rung, in place of the one that the invalidation has. Every rung has the same `part` of the deadline.
    /// An invalidation whose begin was not recorded, as one that the gate starts itself, begins `now`.
    pub(super) fn arm(&mut self, id: InvalidationId, rung: Rung, part: Duration, now: Instant) {
        let (begun, armed) = self.begun.entry(id).or_insert((now, false));
        if rung == Rung::Unmap && std::mem::replace(armed, true) {
            *begun = now;
        }
        let when = *begun + part * (u32::from(rung.number()) + 1);
        self.set(id, when, rung);
    }

    fn set(&mut self, id: InvalidationId, when: Instant, rung: Rung) {
        self.remove(id);
        self.alarms.insert(id, (when, rung));
        self.by_time.insert((when, id));
    }

    /// Removes the alarm of an invalidation.
    pub(super) fn remove(&mut self, id: InvalidationId) {
        if let Some((when, _)) = self.alarms.remove(&id) {
            self.by_time.remove(&(when, id));
        }
    }

    /// Removes and returns the earliest alarm, if it is due at `now`.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<(InvalidationId, Rung)> {
        let id = self.by_time.first().filter(|(when, _)| *when <= now)?.1;
        let (when, rung) = self.alarms.remove(&id)?;
        self.by_time.remove(&(when, id));
        Some((id, rung))
    }

    /// Returns the time of the earliest alarm, or of the next quiet time.
    pub(super) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(when, _)| *when).into_iter().chain(self.quiet).min()
    }

    /// Returns true while a quiet time is awaited.
    pub(super) fn awaits_quiet(&self) -> bool {
        self.quiet.is_some()
    }

    /// Sets the quiet time.
    pub(super) fn await_quiet(&mut self, when: Instant) {
        self.quiet = Some(when);
    }

    /// Returns true if the quiet time is due at `now`, and forgets it.
    pub(super) fn take_quiet(&mut self, now: Instant) -> bool {
        self.quiet.take_if(|when| *when <= now).is_some()
    }

    /// Returns the number of alarms.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.alarms.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::gate::Step;

    #[test]
    fn alarms_of_rungs_count_from_the_begin() {
        let (start, mut timers) = (Instant::now(), Timers::default());
        let (id, part) = (InvalidationId(1), Duration::from_millis(10));
        timers.begin(id, start);
        // However late each of them is set.
        for (nth, rung) in (1..).zip(Rung::LADDER) {
            timers.arm(id, rung, part, start + part * 100);
            assert_eq!(timers.next(), Some(start + part * nth));
        }
        // Renewed.
        timers.arm(id, Rung::Unmap, part, start + part * 100);
        assert_eq!(timers.next(), Some(start + part * 101));
        timers.arm(id, Rung::Fence(Step::Drain), part, start + part * 150);
        assert_eq!(timers.next(), Some(start + part * 102));
        timers.end(id);
        assert!(timers.begun.is_empty() && timers.next().is_none());
        timers.arm(id, Rung::Unmap, part, start + part);
        assert_eq!(timers.next(), Some(start + part * 2));
    }

    #[test]
    fn alarms_are_taken_in_order_of_time_and_each_invalidation_has_one() {
        let (start, mut timers) = (Instant::now(), Timers::default());
        let at = |ms| start + Duration::from_millis(ms);
        let id = InvalidationId;
        timers.set(id(1), at(30), Rung::Unmap);
        timers.set(id(2), at(10), Rung::Unmap);
        timers.set(id(3), at(20), Rung::Unmap);
        timers.set(id(2), at(40), Rung::Fence(Step::Drain));
        timers.remove(id(1));
        timers.remove(id(9));
        assert_eq!((timers.next(), timers.len()), (Some(at(20)), 2));
        assert_eq!(timers.take_due(at(19)), None);
        assert_eq!(timers.take_due(at(20)), Some((id(3), Rung::Unmap)));
        assert_eq!(timers.take_due(at(39)), None);
        assert_eq!(timers.take_due(at(50)), Some((id(2), Rung::Fence(Step::Drain))));
        assert_eq!((timers.next(), timers.len()), (None, 0));
    }
}
