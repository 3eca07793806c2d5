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
pub enum HeldBy {
    /// An invalidation between begin and end.
    Open(InvalidationId),
    /// Quarantine, since this invalidation, for this reason.
    Quarantine(InvalidationId, Reason),
}

/// The exclusions of one file.
#[derive(Debug, Default)]
pub struct Holds {
    holds: BTreeMap<Offset, (PageRange<Offset>, HeldBy)>,
    /// The starts of those in quarantine, by the invalidation that they date from.
    quarantined: BTreeSet<(InvalidationId, Offset)>,
}

impl Holds {
    /// True if nothing is excluded.
    pub fn is_empty(&self) -> bool {
        self.holds.is_empty()
    }

    /// Returns the number of excluded ranges.
    pub fn len(&self) -> usize {
        self.holds.len()
    }

    /// True if anything is in quarantine.
    pub fn quarantined(&self) -> bool {
        !self.quarantined.is_empty()
    }

    /// Returns every exclusion, in order.
    pub fn iter(&self) -> impl Iterator<Item = (PageRange<Offset>, HeldBy)> + '_ {
        self.holds.values().copied()
    }

    /// True if no page of `range` is excluded.
    pub fn is_clear(&self, range: PageRange<Offset>) -> bool {
        self.holds.range(..range.end()).next_back().is_none_or(|(_, (held, _))| held.end() <= range.start())
    }

    /// Returns the exclusions that share a page with `range`, whole, in order.
    pub fn overlapping(
        &self,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = (PageRange<Offset>, HeldBy)> + '_ {
        let before = self.holds.range(..range.start()).next_back().map(|(_, hold)| *hold);
        before
            .filter(|(held, _)| held.overlaps(range))
            .into_iter()
            .chain(self.holds.range(range.start()..range.end()).map(|(_, hold)| *hold))
    }

    /// Returns the parts of `range` that are not excluded, in order.
    pub fn gaps(&self, range: PageRange<Offset>) -> impl Iterator<Item = PageRange<Offset>> + '_ {
        gaps(range, self.overlapping(range).map(|(held, _)| held))
    }

    /// Excludes the parts of `range` that are not excluded yet.
    pub fn hold(&mut self, range: PageRange<Offset>, by: HeldBy) {
        if self.is_clear(range) {
            self.insert(range, by);
            return;
        }
        let free: Vec<_> = self.gaps(range).collect();
        for gap in free {
            self.insert(gap, by);
        }
    }

    fn insert(&mut self, range: PageRange<Offset>, by: HeldBy) {
        if let HeldBy::Quarantine(since, _) = by {
            self.quarantined.insert((since, range.start()));
        }
        self.holds.insert(range.start(), (range, by));
    }

    /// Ends the exclusions of invalidation `id` in `range`.
    pub fn release(&mut self, range: PageRange<Offset>, id: InvalidationId) {
        if let Some((held, by)) = self.holds.get(&range.start())
            && *held == range
            && *by == HeldBy::Open(id)
        {
            self.holds.remove(&range.start());
            return;
        }
        let mine: Vec<_> = self
            .overlapping(range)
            .filter(|(_, by)| *by == HeldBy::Open(id))
            .map(|(held, _)| held.start())
            .collect();
        for start in mine {
            self.holds.remove(&start);
        }
    }

    /// Returns the ranges in quarantine that date from invalidation `id`, in order.
    pub fn since(&self, id: InvalidationId) -> impl Iterator<Item = (PageRange<Offset>, Reason)> + '_ {
        let starts = self.quarantined.range((id, Offset(0))..=(id, Offset(u64::MAX)));
        starts.filter_map(|(_, start)| match self.holds.get(start)? {
            (held, HeldBy::Quarantine(_, reason)) => Some((*held, *reason)),
            (_, HeldBy::Open(_)) => None,
        })
    }

    /// Ends the quarantine that starts at `start`. The caller has proof.
    pub fn lift(&mut self, start: Offset) {
        if let Some((_, HeldBy::Quarantine(since, _))) = self.holds.get(&start) {
            self.quarantined.remove(&(*since, start));
            self.holds.remove(&start);
        }
    }

    /// Ends every quarantine that dates from `id`, for an operator. Returns the ranges.
    pub fn lift_all(&mut self, id: InvalidationId) -> Vec<PageRange<Offset>> {
        let lifted: Vec<_> = self.since(id).map(|(held, _)| held).collect();
        for held in &lifted {
            self.lift(held.start());
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
        let mut holds = Holds::default();
        holds.hold(range(4, 2), HeldBy::Open(one));
        holds.hold(range(0, 8), HeldBy::Open(two));
        assert_eq!(holds.iter().count(), 3);
        holds.release(range(0, 8), one);
        assert_eq!(holds.gaps(range(0, 8)).collect::<Vec<_>>(), [range(4, 2)]);
        holds.release(range(0, 8), two);
        assert!(holds.is_empty());
    }
}
