//! What one IOAS maps: the domain's own book, because the kernel can be asked for no list of it.

use std::collections::BTreeMap;

use passgate_bindings::{Iova, PageRange};

/// One mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) iova: PageRange<Iova>,
    pub(super) writable: bool,
    /// A call over it failed: it may be gone, though never in part.
    pub(super) doubt: bool,
}

/// The mappings of one IOAS, none overlapping another.
#[derive(Debug, Default)]
pub(super) struct Areas(BTreeMap<Iova, Area>);

impl Areas {
    pub(super) fn insert(&mut self, iova: PageRange<Iova>, writable: bool) {
        self.0.insert(iova.start(), Area { iova, writable, doubt: false });
    }

    pub(super) fn remove(&mut self, area: &Area) {
        self.0.remove(&area.iova.start());
    }

    /// Nothing of `iova` is in the book any more.
    pub(super) fn strike(&mut self, iova: PageRange<Iova>) {
        for area in self.overlapping(iova) {
            self.remove(&area);
            for rest in area.iova.without(iova).into_iter().flatten() {
                self.0.insert(rest.start(), Area { iova: rest, ..area });
            }
        }
    }

    /// All of `iova` is in doubt.
    pub(super) fn doubt(&mut self, iova: PageRange<Iova>) {
        for area in self.overlapping(iova) {
            self.0.insert(area.iova.start(), Area { doubt: true, ..area });
        }
    }

    /// The mappings that share a page with `iova`, in order.
    pub(super) fn overlapping(&self, iova: PageRange<Iova>) -> Vec<Area> {
        let before = self.0.range(..iova.start()).next_back().map(|(_, area)| area);
        let inside = self.0.range(iova.start()..iova.end()).map(|(_, area)| area);
        before.into_iter().filter(|area| area.iova.overlaps(iova)).chain(inside).copied().collect()
    }

    /// Whether exactly this is mapped, for certain.
    pub(super) fn has(&self, area: &Area) -> bool {
        self.0.get(&area.iova.start()).is_some_and(|here| here == area && !here.doubt)
    }

    pub(super) fn all(&self) -> Vec<Area> {
        self.0.values().copied().collect()
    }
}

/// What of `iova` is left around `gone`, which is sorted and apart.
pub(super) fn remainders(
    iova: PageRange<Iova>,
    gone: impl IntoIterator<Item = PageRange<Iova>>,
) -> Vec<PageRange<Iova>> {
    let mut left = Vec::new();
    let mut at = iova.start();
    for gap in gone {
        left.extend(PageRange::between(at, gap.start().min(iova.end())));
        at = at.max(gap.end());
    }
    left.extend(PageRange::between(at, iova.end()));
    left
}

/// The parts of `iova` that any of the books has, in order and apart.
pub(super) fn parts_in(books: &[&Areas], iova: PageRange<Iova>) -> Vec<PageRange<Iova>> {
    let over = books.iter().flat_map(|book| book.overlapping(iova));
    let mut parts: Vec<_> = over.filter_map(|area| area.iova.intersection(iova)).collect();
    parts.sort_unstable();
    let mut counted = iova.start();
    let mut apart = Vec::new();
    for part in parts {
        apart.extend(PageRange::between(part.start().max(counted), part.end()));
        counted = counted.max(part.end());
    }
    apart
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PAGE;

    use super::*;

    fn range(page: u64, pages: u64) -> PageRange<Iova> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn book(areas: &[(u64, u64)]) -> Areas {
        let mut book = Areas::default();
        areas.iter().for_each(|(page, pages)| book.insert(range(*page, *pages), true));
        book
    }

    #[test]
    fn what_both_books_have_counts_once() {
        let (one, other) = (book(&[(0, 4), (8, 2)]), book(&[(1, 1), (3, 3), (9, 4)]));
        let pages = |books: &[&Areas], page, pages| -> u64 {
            parts_in(books, range(page, pages)).into_iter().map(PageRange::pages).sum()
        };
        assert_eq!(pages(&[&one, &other], 0, 100), 11);
        assert_eq!(pages(&[&one, &other], 2, 8), 6);
        assert_eq!(pages(&[&one, &one], 1, 1), 1);
        assert_eq!(pages(&[&one, &other], 6, 2), 0);
        assert_eq!(parts_in(&[&one, &other], range(0, 9)), [range(0, 4), range(4, 2), range(8, 1)]);
    }

    #[test]
    fn what_is_struck_out_leaves_what_sticks_out() {
        let mut book = book(&[(0, 4), (6, 4)]);
        book.strike(range(1, 6));
        let left = |book: &Areas| book.all().iter().map(|area| area.iova).collect::<Vec<_>>();
        assert_eq!(left(&book), [range(0, 1), range(7, 3)]);
        book.strike(range(8, 1));
        assert_eq!(left(&book), [range(0, 1), range(7, 1), range(9, 1)]);
    }

    #[test]
    fn what_is_left_lies_around_every_gap() {
        let left =
            |gaps: &[(u64, u64)]| remainders(range(4, 8), gaps.iter().map(|(at, len)| range(*at, *len)));
        assert_eq!(left(&[]), [range(4, 8)]);
        assert_eq!(left(&[(0, 5), (6, 1), (8, 2)]), [range(5, 1), range(7, 1), range(10, 2)]);
        assert_eq!(left(&[(11, 3)]), [range(4, 7)]);
        assert_eq!(left(&[(2, 20)]), []);
    }

    #[test]
    fn what_is_in_doubt_is_not_had() {
        let mut book = book(&[(0, 4), (4, 4)]);
        let [first, second] = book.overlapping(range(3, 2))[..] else { panic!("two") };
        book.doubt(range(5, 1));
        assert_eq!((book.has(&first), book.has(&second), book.all().len()), (true, false, 2));
        book.remove(&first);
        assert_eq!(book.overlapping(range(0, 4)), []);
    }
}
