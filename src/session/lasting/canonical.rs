//! What is written down for the next process, as text.

use std::sync::atomic::Ordering::Relaxed;

use super::{COUNTERS, INVALIDATION, Lasting};
use crate::gate::InvalidationId;

impl Lasting {
    /// Returns what is written down, as text, whatever the order in which it was.
    pub(in crate::session) fn canonical(&self) -> String {
        let regions: Vec<_> = self.known.values().map(|(_, written)| written).collect();
        let holds: Vec<_> = self.held.iter().map(|(key, (_, range, by))| (key, range, by)).collect();
        let asides: Vec<_> = self.beside.keys().collect();
        let mut open: Vec<_> = self.open.keys().collect();
        open.sort_unstable();
        let counters = self.meta.line(COUNTERS).into_iter().flatten().enumerate();
        let counters: Vec<_> = counters
            .filter(|(word, _)| *word != INVALIDATION)
            .map(|(_, counter)| counter.load(Relaxed))
            .collect();
        let last = InvalidationId(self.last);
        format!("{regions:?} {holds:?} {asides:?} {open:?} {counters:?} {last:?} {}", self.stale.len())
    }
}
