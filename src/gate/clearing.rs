//! The invalidations that wait for proof, and where they wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use passgate_bindings::{Iova, PageRange};

use super::event::InvalidationId;

/// The invalidations that wait for proof. Who waits for something at an address is found without a look at the others.
#[derive(Debug, Default)]
pub(super) struct Clearing {
    all: BTreeSet<InvalidationId>,
    /// The targets of conversions, by their starts. No two overlap, because a page is held once.
    targets: BTreeMap<Iova, (PageRange<Iova>, InvalidationId)>,
    /// All that are no conversions: as many as regions and merges at most. Their targets may overlap any others.
    others: BTreeSet<InvalidationId>,
}

impl Clearing {
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn contains(&self, id: InvalidationId) -> bool {
        self.all.contains(&id)
    }

    /// All of them, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = InvalidationId> + '_ {
        self.all.iter().copied()
    }

    /// The first of which this is true.
    pub(super) fn find(&self, wanted: impl FnMut(&InvalidationId) -> bool) -> Option<InvalidationId> {
        self.iter().find(wanted)
    }

    /// Those that are no conversions, in order.
    pub(super) fn others(&self) -> impl Iterator<Item = InvalidationId> + '_ {
        self.others.iter().copied()
    }

    /// Those that were begun after this one, in order.
    pub(super) fn since(&self, last: InvalidationId) -> Vec<InvalidationId> {
        self.all.range((Bound::Excluded(last), Bound::Unbounded)).copied().collect()
    }

    /// An invalidation waits for proof over `targets`.
    pub(super) fn insert(&mut self, id: InvalidationId, is_conversion: bool, targets: &[PageRange<Iova>]) {
        self.all.insert(id);
        if !is_conversion || targets.iter().any(|target| self.at(*target).next().is_some()) {
            self.others.insert(id);
            return;
        }
        self.targets.extend(targets.iter().map(|target| (target.start(), (*target, id))));
    }

    /// The invalidation that had these targets waits no more.
    pub(super) fn remove(&mut self, id: InvalidationId, targets: &[PageRange<Iova>]) {
        self.all.remove(&id);
        self.others.remove(&id);
        for target in targets {
            if self.targets.get(&target.start()).is_some_and(|(_, of)| *of == id) {
                self.targets.remove(&target.start());
            }
        }
    }

    /// Nobody waits for what was at `iova` any more.
    pub(super) fn forget(&mut self, iova: PageRange<Iova>) {
        let over: Vec<_> = self.at(iova).map(|(target, _)| target.start()).collect();
        over.into_iter().for_each(|start| _ = self.targets.remove(&start));
    }

    /// Those that may wait for something over `iova`, in order.
    pub(super) fn over(&self, iova: PageRange<Iova>) -> BTreeSet<InvalidationId> {
        let over: BTreeSet<_> = self.at(iova).map(|(_, id)| id).chain(self.others()).collect();
        #[cfg(test)]
        super::invalidation::tests::ASKED.set(super::invalidation::tests::ASKED.get() + over.len() as u64);
        over
    }

    /// The targets of conversions that share a page with `iova`.
    fn at(&self, iova: PageRange<Iova>) -> impl Iterator<Item = (PageRange<Iova>, InvalidationId)> + '_ {
        let before = self.targets.range(..iova.start()).next_back().map(|(_, found)| *found);
        let within = self.targets.range(iova.start()..iova.end()).map(|(_, found)| *found);
        before.filter(|(target, _)| target.overlaps(iova)).into_iter().chain(within)
    }
}
