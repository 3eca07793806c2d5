//! The state of a session as text, by which an exhaustive search (tests/search) distinguishes states.

use std::collections::{BTreeMap, BTreeSet};

use super::{Call, Next, Session};

impl Session {
    /// Returns all state on which the session's later behaviour depends, as text: the gate's state
    /// ([`crate::gate::Gate::canonical`]), effects and calls that are not executed, timers, delayed answers, and the records
    /// for the next process. Times are absolute.
    pub fn canonical(&self) -> String {
        let Self {
            gate,
            effects,
            executed,
            files: _,
            delayed_answers,
            quiet_at,
            queued_steps,
            deferred_regions,
            timers,
            tickets,
            early_tickets,
            ..
        } = self;
        // Sorted: a hash map's order differs from process to process.
        let tickets: BTreeMap<_, _> = tickets.iter().collect();
        let early_tickets: BTreeSet<_> = early_tickets.iter().collect();
        let effects = effects.get(*executed..).unwrap_or_default();
        let persistent = self.persistent.as_ref().map(super::PersistentState::canonical).unwrap_or_default();
        let separate_unmaps: Vec<_> = queued_steps
            .iter()
            .filter_map(|next| match next {
                Next::Call(Call::Unmap { job, iova, already, .. }) => Some((job, iova, already)),
                _ => None,
            })
            .collect();
        format!(
            "{}{effects:?} {} {separate_unmaps:?} {deferred_regions:?} {delayed_answers:?} {quiet_at:?} {timers:?} \
             {tickets:?} {early_tickets:?}\n{persistent}",
            gate.canonical(),
            queued_steps.len(),
        )
    }
}
