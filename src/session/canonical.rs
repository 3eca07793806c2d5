//! The state of a session as text, by which an exhaustive search (tests/search) distinguishes states.

use super::{Call, Next, Session};

impl Session {
    /// Returns all state on which the session's later behaviour depends, as text: the gate's state
    /// ([`crate::gate::Gate::canonical`]), effects and calls that are not executed, timers, delayed answers, and the records
    /// for the next process. Times are absolute.
    pub fn canonical(&self) -> String {
        let Self {
            gate,
            effects,
            queued_steps,
            hardware: _,
            tickets,
            files: _,
            deferred_regions,
            delayed_answers,
            timers,
            statistics: _,
            storage,
            clock: _,
        } = self;
        let (effects, persistent) = (effects.pending(), storage.canonical());
        let separate_unmaps: Vec<_> = queued_steps
            .iter()
            .filter_map(|next| match next {
                Next::Call(Call::Unmap { job, iova, already, .. }) => Some((job, iova, already)),
                _ => None,
            })
            .collect();
        format!(
            "{}{effects:?} {} {separate_unmaps:?} {deferred_regions:?} {delayed_answers:?} {timers:?} {tickets:?}\n\
             {persistent}",
            gate.canonical(),
            queued_steps.len(),
        )
    }
}
