//! The record of the mappings in one IOAS. The domain keeps it because the kernel does not list them.

use std::collections::BTreeMap;

use passgate_bindings::{Iova, PageRange};

/// One mapping (an `iopt_area` of the kernel).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) iova: PageRange<Iova>,
    pub(super) writable: bool,
    /// Set once a call over it has failed: it is either mapped as a whole or not at all.
    pub(super) uncertain: bool,
}

/// The mappings of one IOAS, none overlapping another.
#[derive(Debug, Default)]
pub(super) struct Areas(BTreeMap<Iova, Area>);

impl Areas {
    pub(super) fn insert(&mut self, iova: PageRange<Iova>, writable: bool) {
        self.0.insert(iova.start(), Area { iova, writable, uncertain: false });
    }

    pub(super) fn remove(&mut self, area: &Area) {
        self.0.remove(&area.iova.start());
    }

    /// Removes `iova` from the record. The parts of mappings outside it stay.
    pub(super) fn remove_range(&mut self, iova: PageRange<Iova>) {
        for area in self.overlapping(iova) {
            self.remove(&area);
            for rest in area.iova.without(iova).into_iter().flatten() {
                self.0.insert(rest.start(), Area { iova: rest, ..area });
            }
        }
    }

    /// Marks every mapping that shares a page with `iova` as uncertain.
    pub(super) fn mark_uncertain(&mut self, iova: PageRange<Iova>) {
        for area in self.overlapping(iova) {
            self.0.insert(area.iova.start(), Area { uncertain: true, ..area });
        }
    }

    /// Returns the mappings that share a page with `iova`, ascending.
    pub(super) fn overlapping(&self, iova: PageRange<Iova>) -> Vec<Area> {
        let before = self.0.range(..iova.start()).next_back().map(|(_, area)| area);
        let inside = self.0.range(iova.start()..iova.end()).map(|(_, area)| area);
        before.into_iter().filter(|area| area.iova.overlaps(iova)).chain(inside).copied().collect()
    }

    /// Returns true if exactly this mapping is recorded and certain.
    pub(super) fn has_certain(&self, area: &Area) -> bool {
        self.0.get(&area.iova.start()).is_some_and(|here| here == area && !here.uncertain)
    }

    pub(super) fn all(&self) -> Vec<Area> {
        self.0.values().copied().collect()
    }
}

/// Returns the parts of `iova` outside the ranges `gone`, which are ascending and do not overlap.
pub(super) fn remainders(
    iova: PageRange<Iova>,
    gone: impl IntoIterator<Item = PageRange<Iova>>,
) -> Vec<PageRange<Iova>> {
    let mut rest = Vec::new();
    let mut at = iova.start();
    for gap in gone {
        rest.extend(PageRange::between(at, gap.start().min(iova.end())));
        at = at.max(gap.end());
    }
    rest.extend(PageRange::between(at, iova.end()));
    rest
}

/// Returns the parts of `iova` that are in any of the records, ascending and without overlap.
pub(super) fn parts_in(records: &[&Areas], iova: PageRange<Iova>) -> Vec<PageRange<Iova>> {
    let over = records.iter().flat_map(|record| record.overlapping(iova));
    let mut parts: Vec<_> = over.filter_map(|area| area.iova.intersection(iova)).collect();
    parts.sort_unstable();
    let mut counted = iova.start();
    let mut disjoint = Vec::new();
    for part in parts {
        disjoint.extend(PageRange::between(part.start().max(counted), part.end()));
        counted = counted.max(part.end());
    }
    disjoint
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PAGE;

    use super::*;

    fn range(page: u64, pages: u64) -> PageRange<Iova> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn record(areas: &[(u64, u64)]) -> Areas {
        let mut record = Areas::default();
        areas.iter().for_each(|(page, pages)| record.insert(range(*page, *pages), true));
        record
    }

    #[test]
    fn pages_in_several_records_count_once() {
        let (one, other) = (record(&[(0, 4), (8, 2)]), record(&[(1, 1), (3, 3), (9, 4)]));
        let pages = |records: &[&Areas], page, pages| -> u64 {
            parts_in(records, range(page, pages)).into_iter().map(PageRange::pages).sum()
        };
        assert_eq!(pages(&[&one, &other], 0, 100), 11);
        assert_eq!(pages(&[&one, &other], 2, 8), 6);
        assert_eq!(pages(&[&one, &one], 1, 1), 1);
        assert_eq!(pages(&[&one, &other], 6, 2), 0);
        assert_eq!(parts_in(&[&one, &other], range(0, 9)), [range(0, 4), range(4, 2), range(8, 1)]);
    }

    #[test]
    fn remove_range_preserves_the_parts_outside() {
        let mut record = record(&[(0, 4), (6, 4)]);
        record.remove_range(range(1, 6));
        let rest = |record: &Areas| record.all().iter().map(|area| area.iova).collect::<Vec<_>>();
        assert_eq!(rest(&record), [range(0, 1), range(7, 3)]);
        record.remove_range(range(8, 1));
        assert_eq!(rest(&record), [range(0, 1), range(7, 1), range(9, 1)]);
    }

    #[test]
    fn remainders_lie_around_every_gap() {
        let rest =
            |gaps: &[(u64, u64)]| remainders(range(4, 8), gaps.iter().map(|(at, len)| range(*at, *len)));
        assert_eq!(rest(&[]), [range(4, 8)]);
        assert_eq!(rest(&[(0, 5), (6, 1), (8, 2)]), [range(5, 1), range(7, 1), range(10, 2)]);
        assert_eq!(rest(&[(11, 3)]), [range(4, 7)]);
        assert_eq!(rest(&[(2, 20)]), []);
    }

    #[test]
    fn uncertain_mapping_is_not_certain() {
        let mut record = record(&[(0, 4), (4, 4)]);
        let [first, second] = record.overlapping(range(3, 2))[..] else { panic!("two") };
        record.mark_uncertain(range(5, 1));
        assert_eq!(
            (record.has_certain(&first), record.has_certain(&second), record.all().len()),
            (true, false, 2)
        );
        record.remove(&first);
        assert_eq!(record.overlapping(range(0, 4)), []);
    }
}
