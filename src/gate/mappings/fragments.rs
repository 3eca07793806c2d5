//! Large mappings that pages have left, and when they may become large again.
//!
//! A place on the grid of a region's mappings that pages have left is *fragmented*: it takes more kernel mappings than it needs.
//! After a quiet time it is due to be merged. A place that keeps being split is mapped page by page meanwhile, so that it
//! need not be split again.

use std::collections::BTreeMap;

use passgate_bindings::{Iova, PageRange};

use crate::gate::policy::{MAX_FRAGMENTED, MAX_MERGES_PER_TICK, QUIET_TICKS, SPLITS_UNTIL_PAGED};

/// The fragmented places of one domain, by their starts.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    places: BTreeMap<Iova, Fragmented>,
    now: u32,
}

#[derive(Debug)]
struct Fragmented {
    /// The tick of its last change.
    changed: u32,
    /// The number of splits since it was last merged.
    splits: u32,
}

impl Fragments {
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Pages of the place at `start` have come or gone.
    pub(super) fn record(&mut self, start: Iova, split: bool) {
        if self.places.len() >= MAX_FRAGMENTED && !self.places.contains_key(&start) {
            return;
        }
        let place = self.places.entry(start).or_insert(Fragmented { changed: 0, splits: 0 });
        place.changed = self.now;
        place.splits = place.splits.saturating_add(u32::from(split));
    }

    pub(super) fn splits_often(&self, start: Iova) -> bool {
        self.places.get(&start).is_some_and(|place| place.splits >= SPLITS_UNTIL_PAGED)
    }

    /// Returns the first place in `range` that keeps being split.
    pub(super) fn first_split_often(&self, range: PageRange<Iova>) -> Option<Iova> {
        let mut within = self.places.range(range.start()..range.end());
        within.find(|(_, place)| place.splits >= SPLITS_UNTIL_PAGED).map(|(start, _)| *start)
    }

    /// A tick has passed. Removes and returns the places that have been quiet, as many as may be merged at once.
    pub(super) fn take_quiet(&mut self) -> Vec<Iova> {
        self.now = self.now.wrapping_add(1);
        let now = self.now;
        let quiet = |place: &Fragmented| now.wrapping_sub(place.changed) >= QUIET_TICKS;
        let due = self.places.iter().filter(|(_, place)| quiet(place)).map(|(start, _)| *start);
        let due: Vec<_> = due.take(MAX_MERGES_PER_TICK).collect();
        due.iter().for_each(|start| _ = self.places.remove(start));
        due
    }
}
