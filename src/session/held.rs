//! Answers that are held until what they promise is mapped.
//!
//! Who hears that a conversion is over lets its guest use devices at once, and a device that comes a moment too early
//! meets a fault. So the answer to an end (or a convert) waits for the maps that it brings, but never for long: a
//! map that hangs is no reason to keep the client. The deadline of a convert is that of its whole answer, so it bounds this
//! wait, too; an end waits no longer than its begin would have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::gate::{Answer, Caller, Effect, Effects, InvalidationId, JobId, Performer, Verdict};

/// How long an answer is held at most.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Held {
    caller: Caller,
    answer: Answer,
    /// Maps that it waits for.
    maps: usize,
    until: Instant,
}

/// How long the last answer of an invalidation may be held.
#[derive(Debug, Clone, Copy)]
enum Limit {
    /// passgate converts: its answer has a deadline.
    Until(Instant),
    /// The client converts, and its end has no deadline of its own: as long as its begin had.
    For(Duration),
}

/// The answers that are held.
#[derive(Debug, Default)]
pub(super) struct HeldAnswers {
    held: BTreeMap<InvalidationId, Held>,
    /// Whose answer waits for a map.
    of: BTreeMap<JobId, InvalidationId>,
    order: BTreeSet<(Instant, InvalidationId)>,
    /// Of the invalidations that are begun and not over.
    limits: BTreeMap<InvalidationId, Limit>,
}

impl HeldAnswers {
    /// An invalidation was begun at `now`.
    pub(super) fn begun(
        &mut self,
        id: InvalidationId,
        performer: Performer,
        deadline: Duration,
        now: Instant,
    ) {
        let limit = match performer {
            // A seventh is left in which the answer travels, as of every deadline.
            Performer::Passgate => Limit::Until(now + deadline / 7 * 6),
            Performer::Client => Limit::For(deadline),
        };
        self.limits.insert(id, limit);
    }

    /// An invalidation is over.
    pub(super) fn over(&mut self, id: InvalidationId) {
        self.limits.remove(&id);
    }

    /// Takes the answer that ends `id` out of `effects` (from `from` on), if maps come along with it.
    pub(super) fn hold(&mut self, id: InvalidationId, effects: &mut Effects, from: usize, now: Instant) {
        let until = match self.limits.get(&id) {
            Some(Limit::Until(until)) => (*until).min(now + PATIENCE),
            Some(Limit::For(limit)) => now + PATIENCE.min(*limit),
            None => now + PATIENCE,
        };
        let new = effects.get(from..).unwrap_or_default();
        let maps: Vec<JobId> = new.iter().filter_map(map_of).collect();
        if maps.is_empty() {
            return;
        }
        let Some(at) = new.iter().position(ends) else { return };
        if let Effect::Answer { caller, answer } = effects.remove(from + at) {
            self.of.extend(maps.iter().map(|map| (*map, id)));
            self.order.insert((until, id));
            self.held.insert(id, Held { caller, answer, maps: maps.len(), until });
        }
    }

    /// A map is over: an answer that waited for it alone goes out.
    pub(super) fn mapped(&mut self, job: JobId, effects: &mut Effects) {
        let Some(id) = self.of.remove(&job) else { return };
        let Some(held) = self.held.get_mut(&id) else { return };
        held.maps -= 1;
        if held.maps == 0 {
            self.release(id, effects);
        }
    }

    /// Answers that were held for long enough go out.
    pub(super) fn expire(&mut self, now: Instant, effects: &mut Effects) {
        while let Some((_, id)) = self.order.first().copied().filter(|(until, _)| *until <= now) {
            self.release(id, effects);
        }
    }

    /// When the next one has been held for long enough.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.order.first().map(|(until, _)| *until)
    }

    fn release(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(Held { caller, answer, until, .. }) = self.held.remove(&id) else { return };
        self.order.remove(&(until, id));
        effects.push(Effect::Answer { caller, answer });
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty() && self.limits.is_empty()
    }
}

fn map_of(effect: &Effect) -> Option<JobId> {
    match effect {
        Effect::Map { job, .. } => Some(*job),
        _ => None,
    }
}

/// Whether it tells a client that its conversion is over.
fn ends(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Answer { answer: Answer::Ended { .. } | Answer::Verdict { verdict: Verdict::Done, .. }, .. }
    )
}
