//! The state of a session as text, by which an exhaustive search tells states apart.

use std::collections::{BTreeMap, BTreeSet};

use super::{Call, Next, Session};

impl Session {
    /// Returns everything that decides how the session goes on, as text: its gate's state ([`crate::gate::Gate::canonical`]),
    /// its timers, the answers that it holds, and what it has written down for the next process. Times are absolute.
    pub fn canonical(&self) -> String {
        let Self {
            gate, effects, done, files: _, held, quiet, border, waiting, timers, tickets, early, ..
        } = self;
        let tickets: BTreeMap<_, _> = tickets.iter().collect();
        let early: BTreeSet<_> = early.iter().collect();
        let effects = effects.get(*done..).unwrap_or_default();
        let lasting = self.lasting.as_ref().map(super::Lasting::canonical).unwrap_or_default();
        let apart: Vec<_> = border
            .iter()
            .filter_map(|next| match next {
                Next::Call(Call::Unmap { job, iova, already, .. }) => Some((job, iova, already)),
                _ => None,
            })
            .collect();
        format!(
            "{}{effects:?} {} {apart:?} {waiting:?} {held:?} {quiet:?} {timers:?} {tickets:?} {early:?}\n{lasting}",
            gate.canonical(),
            border.len(),
        )
    }
}
