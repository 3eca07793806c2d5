//! The invalidations that wait for proof, indexed by the addresses at which they wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use passgate_bindings::{Iova, PageRange};

use crate::gate::ids::InvalidationId;

/// The invalidations that wait for proof. Those that wait at an address are found without a look at the others.
#[derive(Debug, Default)]
pub(in crate::gate) struct Waiting {
    all: BTreeSet<InvalidationId>,
    /// The targets of conversions, by their starts. No two overlap, because a page is excluded once.
    targets: BTreeMap<Iova, (PageRange<Iova>, InvalidationId)>,
    /// All that are no conversions: as many as regions and merges at most. Their targets may overlap any others.
    others: BTreeSet<InvalidationId>,
}

impl Waiting {
    pub(in crate::gate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn contains(&self, id: InvalidationId) -> bool {
        self.all.contains(&id)
    }

    /// Returns all of them, in order.
    pub(in crate::gate) fn iter(&self) -> impl Iterator<Item = InvalidationId> + '_ {
        self.all.iter().copied()
    }

    /// Returns those that are no conversions, in order.
    pub(super) fn others(&self) -> impl Iterator<Item = InvalidationId> + '_ {
        self.others.iter().copied()
    }

    /// Returns those that were begun after this one, in order.
    pub(in crate::gate) fn since(&self, last: InvalidationId) -> Vec<InvalidationId> {
        self.all.range((Bound::Excluded(last), Bound::Unbounded)).copied().collect()
    }

    /// Adds an invalidation that waits for proof over `targets`.
    pub(super) fn insert(&mut self, id: InvalidationId, is_conversion: bool, targets: &[PageRange<Iova>]) {
        self.all.insert(id);
        if !is_conversion || targets.iter().any(|target| self.at(*target).next().is_some()) {
            self.others.insert(id);
            return;
        }
        self.targets.extend(targets.iter().map(|target| (target.start(), (*target, id))));
    }

    /// Removes the invalidation that had these targets.
    pub(super) fn remove(&mut self, id: InvalidationId, targets: &[PageRange<Iova>]) {
        self.all.remove(&id);
        self.others.remove(&id);
        for target in targets {
            if self.targets.get(&target.start()).is_some_and(|(_, of)| *of == id) {
                self.targets.remove(&target.start());
            }
        }
    }

    /// Removes `iova` from the targets of conversions: other memory lies there now.
    pub(super) fn forget(&mut self, iova: PageRange<Iova>) {
        for (target, id) in self.at(iova).collect::<Vec<_>>() {
            self.targets.remove(&target.start());
            let rest = target.without(iova).into_iter().flatten();
            self.targets.extend(rest.map(|rest| (rest.start(), (rest, id))));
        }
    }

    /// Returns those that may wait for something over `iova`, in order.
    pub(in crate::gate) fn over(&self, iova: PageRange<Iova>) -> BTreeSet<InvalidationId> {
        let over: BTreeSet<_> = self.at(iova).map(|(_, id)| id).chain(self.others()).collect();
        #[cfg(test)]
        super::tests::ASKED.set(super::tests::ASKED.get() + over.len() as u64);
        over
    }

    /// Returns the targets of conversions that share a page with `iova`.
    fn at(&self, iova: PageRange<Iova>) -> impl Iterator<Item = (PageRange<Iova>, InvalidationId)> + '_ {
        let before = self.targets.range(..iova.start()).next_back().map(|(_, found)| *found);
        let within = self.targets.range(iova.start()..iova.end()).map(|(_, found)| *found);
        before.filter(|(target, _)| target.overlaps(iova)).into_iter().chain(within)
    }
}
