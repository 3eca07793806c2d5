//! The records for the next process, as text.

use std::sync::atomic::Ordering::Relaxed;

use super::{COUNTERS, INVALIDATION, PersistentState};
use crate::gate::InvalidationId;

impl PersistentState {
    /// Returns the content of the records as text, independent of the slots that they are in.
    pub(in crate::session) fn canonical(&self) -> String {
        let regions: Vec<_> = self.region_records.values().map(|(_, written)| written).collect();
        let exclusions: Vec<_> =
            self.exclusion_records.iter().map(|(key, (_, range, by))| (key, range, by)).collect();
        let infos: Vec<_> = self.info_records.keys().collect();
        let mut open: Vec<_> = self.open.keys().collect();
        open.sort_unstable();
        let counters = self.meta.line(COUNTERS).into_iter().flatten().enumerate();
        // The invalidation's number is printed below with its type, by which the search replaces it by its rank.
        let counters: Vec<_> = counters
            .filter(|(word, _)| *word != INVALIDATION)
            .map(|(_, counter)| counter.load(Relaxed))
            .collect();
        let last = InvalidationId(self.last);
        format!("{regions:?} {exclusions:?} {infos:?} {open:?} {counters:?} {last:?} {}", self.stale.len())
    }
}
