//! The alarms of invalidations: one each, found by its invalidation and by its time.
//!
//! The alarms of the rungs count from the begin, not each from the one before it: an alarm that comes late, because much
//! else runs, makes none of the later ones late.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::gate::{InvalidationId, Step};

/// When to wake the gate, and for what.
#[derive(Debug, Default)]
pub(super) struct Timers {
    of: BTreeMap<InvalidationId, (Instant, Step)>,
    order: BTreeSet<(Instant, InvalidationId)>,
    /// When each invalidation began that is not answered.
    begun: BTreeMap<InvalidationId, Instant>,
}

impl Timers {
    /// An invalidation begins.
    pub(super) fn begin(&mut self, id: InvalidationId, now: Instant) {
        self.begun.entry(id).or_insert(now);
    }

    /// An invalidation is over.
    pub(super) fn over(&mut self, id: InvalidationId) {
        self.remove(id);
        self.begun.remove(&id);
    }

    /// Sets the alarm of a rung, in place of the one that the invalidation has; every rung has `part` of the deadline.
    /// An invalidation that has not begun does so `now`.
    pub(super) fn arm(&mut self, id: InvalidationId, rung: Step, part: Duration, now: Instant) {
        let begun = *self.begun.entry(id).or_insert(now);
        self.set(id, begun + part * (rung as u32 + 1), rung);
    }

    fn set(&mut self, id: InvalidationId, when: Instant, rung: Step) {
        self.remove(id);
        self.of.insert(id, (when, rung));
        self.order.insert((when, id));
    }

    /// Removes the alarm of an invalidation.
    pub(super) fn remove(&mut self, id: InvalidationId) {
        if let Some((when, _)) = self.of.remove(&id) {
            self.order.remove(&(when, id));
        }
    }

    /// Takes the earliest alarm, where it is due at `now`.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<(InvalidationId, Step)> {
        let id = self.order.first().filter(|(when, _)| *when <= now)?.1;
        let (when, rung) = self.of.remove(&id)?;
        self.order.remove(&(when, id));
        Some((id, rung))
    }

    /// The time of the earliest alarm.
    pub(super) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(when, _)| *when)
    }

    /// The number of alarms.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.of.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_rungs_alarms_count_from_the_begin() {
        let (start, mut timers) = (Instant::now(), Timers::default());
        let (id, part) = (InvalidationId(1), Duration::from_millis(10));
        timers.begin(id, start);
        // However late each is set.
        for (nth, rung) in (1..).zip(Step::LADDER) {
            timers.arm(id, rung, part, start + part * 100);
            assert_eq!(timers.next(), Some(start + part * nth));
        }
        timers.over(id);
        assert!(timers.begun.is_empty() && timers.next().is_none());
        timers.arm(id, Step::Unmap, part, start + part);
        assert_eq!(timers.next(), Some(start + part * 2));
    }

    #[test]
    fn alarms_come_in_the_order_of_their_times_and_each_invalidation_has_one() {
        let (start, mut timers) = (Instant::now(), Timers::default());
        let at = |ms| start + Duration::from_millis(ms);
        let id = InvalidationId;
        timers.set(id(1), at(30), Step::Unmap);
        timers.set(id(2), at(10), Step::Unmap);
        timers.set(id(3), at(20), Step::Unmap);
        timers.set(id(2), at(40), Step::Drain);
        timers.remove(id(1));
        timers.remove(id(9));
        assert_eq!((timers.next(), timers.len()), (Some(at(20)), 2));
        assert_eq!(timers.take_due(at(19)), None);
        assert_eq!(timers.take_due(at(20)), Some((id(3), Step::Unmap)));
        assert_eq!(timers.take_due(at(39)), None);
        assert_eq!(timers.take_due(at(50)), Some((id(2), Step::Drain)));
        assert_eq!((timers.next(), timers.len()), (None, 0));
    }
}
