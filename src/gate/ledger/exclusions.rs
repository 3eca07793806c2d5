//! Exclusions from mapping in one file: ranges under an open invalidation, and ranges in quarantine.
//!
//! Exclusions never overlap. An excluded page is mapped at no alias, whatever its state.

use std::collections::{BTreeMap, BTreeSet};

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;

use crate::gate::ids::InvalidationId;
use crate::gate::verdict::Reason;

/// The reason for an exclusion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExcludedBy {
    /// An invalidation between begin and end.
    Open(InvalidationId),
    /// Quarantine, since this invalidation, for this reason.
    Quarantine(InvalidationId, Reason),
}

/// The exclusions of one file.
#[derive(Debug, Default)]
pub struct Exclusions {
    ranges: BTreeMap<Offset, (PageRange<Offset>, ExcludedBy)>,
    /// The starts of those in quarantine, by the invalidation that they date from.
    quarantined: BTreeSet<(InvalidationId, Offset)>,
}

impl Exclusions {
    /// True if nothing is excluded.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Returns the number of excluded ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// True if anything is in quarantine.
    pub fn quarantined(&self) -> bool {
        !self.quarantined.is_empty()
    }

    /// Returns every exclusion, in order.
    pub fn iter(&self) -> impl Iterator<Item = (PageRange<Offset>, ExcludedBy)> + '_ {
        self.ranges.values().copied()
    }

    /// True if no page of `range` is excluded.
    pub fn is_clear(&self, range: PageRange<Offset>) -> bool {
        self.ranges
            .range(..range.end())
            .next_back()
            .is_none_or(|(_, (excluded, _))| excluded.end() <= range.start())
    }

    /// Returns the exclusions that share a page with `range`, whole, in order.
    pub fn overlapping(
        &self,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = (PageRange<Offset>, ExcludedBy)> + '_ {
        let before = self.ranges.range(..range.start()).next_back().map(|(_, entry)| *entry);
        before
            .filter(|(excluded, _)| excluded.overlaps(range))
            .into_iter()
            .chain(self.ranges.range(range.start()..range.end()).map(|(_, entry)| *entry))
    }

    /// Returns the parts of `range` that are not excluded, in order.
    pub fn gaps(&self, range: PageRange<Offset>) -> impl Iterator<Item = PageRange<Offset>> + '_ {
        gaps(range, self.overlapping(range).map(|(excluded, _)| excluded))
    }

    /// Excludes the parts of `range` that are not excluded yet.
    pub fn exclude(&mut self, range: PageRange<Offset>, by: ExcludedBy) {
        if self.is_clear(range) {
            self.insert(range, by);
            return;
        }
        let free: Vec<_> = self.gaps(range).collect();
        for gap in free {
            self.insert(gap, by);
        }
    }

    fn insert(&mut self, range: PageRange<Offset>, by: ExcludedBy) {
        if let ExcludedBy::Quarantine(since, _) = by {
            self.quarantined.insert((since, range.start()));
        }
        self.ranges.insert(range.start(), (range, by));
    }

    /// Ends the exclusions of invalidation `id` in `range`.
    pub fn end(&mut self, range: PageRange<Offset>, id: InvalidationId) {
        if let Some((excluded, by)) = self.ranges.get(&range.start())
            && *excluded == range
            && *by == ExcludedBy::Open(id)
        {
            self.ranges.remove(&range.start());
            return;
        }
        let mine: Vec<_> = self
            .overlapping(range)
            .filter(|(_, by)| *by == ExcludedBy::Open(id))
            .map(|(excluded, _)| excluded.start())
            .collect();
        for start in mine {
            self.ranges.remove(&start);
        }
    }

    /// Returns the ranges in quarantine that date from invalidation `id`, in order.
    pub fn since(&self, id: InvalidationId) -> impl Iterator<Item = (PageRange<Offset>, Reason)> + '_ {
        let starts = self.quarantined.range((id, Offset(0))..=(id, Offset(u64::MAX)));
        starts.filter_map(|(_, start)| match self.ranges.get(start)? {
            (excluded, ExcludedBy::Quarantine(_, reason)) => Some((*excluded, *reason)),
            (_, ExcludedBy::Open(_)) => None,
        })
    }

    /// Ends the quarantine that starts at `start`. The caller has proof.
    pub fn lift(&mut self, start: Offset) {
        if let Some((_, ExcludedBy::Quarantine(since, _))) = self.ranges.get(&start) {
            self.quarantined.remove(&(*since, start));
            self.ranges.remove(&start);
        }
    }

    /// Ends every quarantine that dates from `id`, for an operator. Returns the ranges.
    pub fn lift_all(&mut self, id: InvalidationId) -> Vec<PageRange<Offset>> {
        let lifted: Vec<_> = self.since(id).map(|(excluded, _)| excluded).collect();
        for excluded in &lifted {
            self.lift(excluded.start());
        }
        lifted
    }
}

/// Returns the parts of `range` that none of `taken` (in order, not overlapping) covers.
pub fn gaps<A: passgate_bindings::units::Address>(
    range: PageRange<A>,
    taken: impl Iterator<Item = PageRange<A>>,
) -> impl Iterator<Item = PageRange<A>> {
    let mut from = range.start();
    let mut taken = taken.map(Some).chain(std::iter::once(None));
    std::iter::from_fn(move || {
        loop {
            match taken.next()? {
                Some(next) => {
                    let gap = PageRange::between(from, next.start().max(from).min(range.end()));
                    from = from.max(next.end());
                    if gap.is_some() {
                        return gap;
                    }
                }
                None => return PageRange::between(from.min(range.end()), range.end()),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use passgate_bindings::PAGE;

    fn range(page: u64, pages: u64) -> PageRange<Offset> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    #[test]
    fn gaps_are_the_uncovered_parts() {
        let taken = [range(2, 2), range(6, 4)];
        let left: Vec<_> = gaps(range(0, 8), taken.into_iter()).collect();
        assert_eq!(left, [range(0, 2), range(4, 2)]);
        assert_eq!(gaps(range(2, 1), taken.into_iter()).count(), 0);
        let left: Vec<_> = gaps(range(3, 9), taken.into_iter()).collect();
        assert_eq!(left, [range(4, 2), range(10, 2)]);
    }

    #[test]
    fn exclusion_fills_only_gaps_and_ends_only_its_own() {
        let (one, two) = (InvalidationId(1), InvalidationId(2));
        let mut exclusions = Exclusions::default();
        exclusions.exclude(range(4, 2), ExcludedBy::Open(one));
        exclusions.exclude(range(0, 8), ExcludedBy::Open(two));
        assert_eq!(exclusions.iter().count(), 3);
        exclusions.end(range(0, 8), one);
        assert_eq!(exclusions.gaps(range(0, 8)).collect::<Vec<_>>(), [range(4, 2)]);
        exclusions.end(range(0, 8), two);
        assert!(exclusions.is_empty());
    }
}
