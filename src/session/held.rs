//! Answers that are held until what they promise is mapped.
//!
//! Who hears that a conversion is over lets its guest use devices at once, and a device that comes a moment too early
//! meets a fault. So the answer to an end (or a convert) waits for the maps that it brings, but never for long: a
//! map that hangs is no reason to keep the client.

use std::time::{Duration, Instant};

use crate::gate::{Answer, Caller, Effect, Effects, JobId, Verdict};

/// How long an answer is held at most.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Held {
    caller: Caller,
    answer: Answer,
    maps: Vec<JobId>,
    until: Instant,
}

/// The answers that are held.
#[derive(Debug, Default)]
pub(super) struct HeldAnswers(Vec<Held>);

impl HeldAnswers {
    /// Takes the answer out of `effects` (from `from` on), if maps come along with it.
    pub(super) fn hold(&mut self, effects: &mut Effects, from: usize, now: Instant) {
        let new = effects.get(from..).unwrap_or_default();
        let maps: Vec<JobId> = new.iter().filter_map(map_of).collect();
        if maps.is_empty() {
            return;
        }
        let Some(at) = new.iter().position(ends) else { return };
        if let Effect::Answer { caller, answer } = effects.remove(from + at) {
            self.0.push(Held { caller, answer, maps, until: now + PATIENCE });
        }
    }

    /// A map is over: answers that waited for it alone go out.
    pub(super) fn mapped(&mut self, job: JobId, effects: &mut Effects) {
        for held in &mut self.0 {
            held.maps.retain(|map| *map != job);
        }
        self.release(|held| held.maps.is_empty(), effects);
    }

    /// Answers that were held for long enough go out.
    pub(super) fn expire(&mut self, now: Instant, effects: &mut Effects) {
        self.release(|held| held.until <= now, effects);
    }

    /// When the next one has been held for long enough.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.0.iter().map(|held| held.until).min()
    }

    fn release(&mut self, is_ripe: impl Fn(&Held) -> bool, effects: &mut Effects) {
        let ripe = self.0.extract_if(.., |held| is_ripe(held));
        effects.extend(ripe.map(|held| Effect::Answer { caller: held.caller, answer: held.answer }));
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
