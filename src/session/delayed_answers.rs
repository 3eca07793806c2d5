//! Answers that are delayed until the pages that they are about are mapped again.
//!
//! A client that receives the end of a conversion lets its guest use devices at once, and DMA that comes before the map faults.
//! So the answer to an end (or a convert) waits for the maps that this end asked for. The wait is bounded, because a map may
//! hang: by [`MAX_DELAY`], and by the deadline. The deadline of a convert covers its whole answer, so it bounds this wait, too;
//! an end, which has no deadline, waits no longer than its begin might have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::gate::{Answer, Caller, Effect, Effects, InvalidationId, JobId, Performer, Verdict};

/// The maximum delay of an answer.
const MAX_DELAY: Duration = Duration::from_millis(500);

/// An answer that waits for maps.
#[derive(Debug)]
struct DelayedAnswer {
    caller: Caller,
    answer: Answer,
    /// The number of maps that it still waits for.
    maps: usize,
    /// The time at which it is sent even if maps are missing.
    deadline: Instant,
}

/// The limit on the delay of an invalidation's last answer.
#[derive(Debug, Clone, Copy)]
enum Limit {
    /// passgate converts: the answer has a deadline.
    Until(Instant),
    /// The client converts, and its end has no deadline of its own: it gets the duration of its begin's.
    For(Duration),
}

/// The answers that wait for maps.
#[derive(Debug, Default)]
pub(super) struct DelayedAnswers {
    answers: BTreeMap<InvalidationId, DelayedAnswer>,
    /// The invalidation whose answer waits for a map, by the map.
    by_map: BTreeMap<JobId, InvalidationId>,
    /// The delayed answers, earliest deadline first.
    by_deadline: BTreeSet<(Instant, InvalidationId)>,
    /// The limit for each invalidation that is begun and not over.
    limits: BTreeMap<InvalidationId, Limit>,
}

impl DelayedAnswers {
    /// Records that an invalidation was begun at `now`, with its deadline counted from then.
    pub(super) fn begun(
        &mut self,
        id: InvalidationId,
        performer: Performer,
        deadline: Duration,
        now: Instant,
    ) {
        let limit = match performer {
            // The last seventh of every deadline is reserved for the answer's way to the client.
            Performer::Passgate => Limit::Until(now + deadline / 7 * 6),
            Performer::Client => Limit::For(deadline),
        };
        self.limits.insert(id, limit);
    }

    /// Forgets an invalidation that is over.
    pub(super) fn end(&mut self, id: InvalidationId) {
        self.limits.remove(&id);
    }

    /// Takes the answer that ends `id` out of `effects` (from index `from` on), if these effects ask for maps; else it stays
    /// there.
    pub(super) fn delay(&mut self, id: InvalidationId, effects: &mut Effects, from: usize, now: Instant) {
        let deadline = match self.limits.get(&id) {
            Some(Limit::Until(until)) => (*until).min(now + MAX_DELAY),
            Some(Limit::For(limit)) => now + MAX_DELAY.min(*limit),
            None => now + MAX_DELAY,
        };
        let new = effects.get(from..).unwrap_or_default();
        let maps: Vec<JobId> = new.iter().filter_map(map_job).collect();
        if maps.is_empty() {
            return;
        }
        let Some(at) = new.iter().position(is_last_answer) else { return };
        if let Effect::Answer { caller, answer } = effects.remove(from + at) {
            self.by_map.extend(maps.iter().map(|map| (*map, id)));
            self.by_deadline.insert((deadline, id));
            self.answers.insert(id, DelayedAnswer { caller, answer, maps: maps.len(), deadline });
        }
    }

    /// Takes the return of a map, successful or not, and what the gate asked for then (`effects`, from index `from` on): a long
    /// range is mapped in parts, each asked for when the one before has returned. An answer that waits for no other map is sent.
    pub(super) fn mapped(&mut self, job: JobId, effects: &mut Effects, from: usize) {
        let Some(id) = self.by_map.remove(&job) else { return };
        let Some(delayed) = self.answers.get_mut(&id) else { return };
        let next = effects.get(from..).unwrap_or_default().iter().filter_map(map_job);
        let before = self.by_map.len();
        self.by_map.extend(next.map(|map| (map, id)));
        delayed.maps += self.by_map.len() - before;
        delayed.maps -= 1;
        if delayed.maps == 0 {
            self.send(id, effects);
        }
    }

    /// Sends the answers whose deadline has passed.
    pub(super) fn expire(&mut self, now: Instant, effects: &mut Effects) {
        while let Some((_, id)) = self.by_deadline.first().copied().filter(|(deadline, _)| *deadline <= now) {
            self.send(id, effects);
        }
    }

    /// Returns the earliest deadline of a delayed answer.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|(deadline, _)| *deadline)
    }

    fn send(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(DelayedAnswer { caller, answer, deadline, .. }) = self.answers.remove(&id) else { return };
        self.by_deadline.remove(&(deadline, id));
        effects.push(Effect::Answer { caller, answer });
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.answers.is_empty() && self.limits.is_empty()
    }
}

fn map_job(effect: &Effect) -> Option<JobId> {
    match effect {
        Effect::Map { job, .. } => Some(*job),
        _ => None,
    }
}

/// Returns true for the answer that ends a conversion for its client.
fn is_last_answer(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Answer { answer: Answer::Ended { .. } | Answer::Verdict { verdict: Verdict::Done, .. }, .. }
    )
}
