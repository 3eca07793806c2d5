//! Fills: one entry for all pages below it, which have the same value or lie on a *grid*.
//!
//! On a grid of 2^n pages the pages at multiples of 2^n are 2 and the others 1. So a terabyte of kernel mappings of equal
//! size, each beginning where the one before it ends, is one entry too: in the tree of a domain 2 is the first page of a mapping
//! and 1 a later one. In the tree of a file a grid is a coincidence, and as valid.

use std::ops::Range;

use super::leaf::{PAGES, PER_WORD, spread};

/// The lowest entry that is a unit; those below are fills (docs/ledger.md, Trees).
pub(super) const FIRST_UNIT: u32 = 64;
/// The first entry that is a grid: of two pages; the next of four, and so on.
const FIRST_GRID: u32 = 4;

/// The values of all pages below an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fill(u32);

impl Fill {
    /// Returns the fill of which all pages are `value`.
    pub(super) const fn all(value: u8) -> Self {
        Self(value as u32 & 3)
    }

    /// Returns a grid of 2^`bits` pages (`bits` at most 60).
    pub(super) const fn grid(bits: u32) -> Self {
        if bits == 0 { Self::all(2) } else { Self(FIRST_GRID + bits - 1) }
    }

    /// Returns the fill that `entry` is; none if it is a unit.
    pub(super) const fn of(entry: u32) -> Option<Self> {
        if entry < FIRST_UNIT { Some(Self(entry)) } else { None }
    }

    /// Returns the entry that this fill is.
    pub(super) const fn entry(self) -> u32 {
        self.0
    }

    /// Returns the binary logarithm of the number of pages from one page of value 2 to the next; none if all pages have one value.
    pub(super) const fn bits(self) -> Option<u32> {
        if self.0 >= FIRST_GRID { Some(self.0 - FIRST_GRID + 1) } else { None }
    }

    /// Returns the value of `page`.
    pub(super) fn value(self, page: u64) -> u8 {
        match self.bits() {
            None => self.0 as u8,
            Some(bits) => 1 + u8::from(page.trailing_zeros() >= bits),
        }
    }

    /// Returns the word of a leaf whose first page is `first`, a multiple of 32.
    pub(super) fn word(self, first: u64) -> u64 {
        match self.bits() {
            None => spread(self.0 as u8),
            // MAX / (2^k - 1) has every kth bit set, and the 2^bits pages from one line to the next take k = 2 * 2^bits bits: that
            // adds 1 to each page on a line.
            Some(bits @ 1..=4) => spread(1) + u64::MAX / ((1 << (2 << bits)) - 1),
            Some(_) => spread(1) + u64::from(self.value(first) - 1),
        }
    }

    /// Returns the part of this fill that an entry below it has, for the 2^`span` pages from page `first` on. One that has at most one
    /// line is [`Fill::grid`] of `span`: no two fills stand for the same pages.
    pub(super) fn below(self, first: u64, span: u32) -> Self {
        match self.bits() {
            Some(bits) if bits > span && self.value(first) == 2 => Self::grid(span),
            Some(bits) if bits > span => Self::all(1),
            _ => self,
        }
    }

    /// Returns the number of `pages` that are `value`.
    pub(super) fn count(self, pages: Range<u64>, value: u8) -> u64 {
        let len = pages.end - pages.start;
        match self.bits() {
            None => {
                if self.0 == u32::from(value) {
                    len
                } else {
                    0
                }
            }
            Some(bits) => {
                let lines = pages.end.div_ceil(1 << bits) - pages.start.div_ceil(1 << bits);
                // By value: a grid has only 1 and 2.
                [0, len - lines, lines, 0][usize::from(value & 3)]
            }
        }
    }

    /// Returns the first of `pages` that is not `value`.
    pub(super) fn next_not(self, pages: Range<u64>, value: u8) -> Option<u64> {
        let next = match (self.bits(), self.value(pages.start) == value) {
            (_, false) => pages.start,
            (None, true) => return None,
            // Behind a line, and on the next one.
            (Some(_), true) if value == 2 => pages.start + 1,
            (Some(bits), true) => ((pages.start >> bits) + 1) << bits,
        };
        (next < pages.end).then_some(next)
    }

    /// Returns the last of `pages` that is not `value`.
    pub(super) fn last_not(self, pages: Range<u64>, value: u8) -> Option<u64> {
        let last = pages.end - 1;
        let last = match (self.bits(), self.value(last) == value) {
            (_, false) => last,
            (None, true) => return None,
            (Some(_), true) if value == 2 => last.checked_sub(1)?,
            (Some(bits), true) => last >> bits << bits,
        };
        (last >= pages.start).then_some(last)
    }

    /// Returns the fill that equals a node of entries for 2^`span` pages each; none where no fill does.
    pub(super) fn of_node(mut entries: impl Iterator<Item = u32> + Clone, span: u32) -> Option<Self> {
        let first = Self::of(entries.clone().next()?)?;
        let fill = if first.bits() == Some(span) {
            // The first entry begins with a line. The spacing is the distance to the next entry that does, or the whole node if none
            // does; the comparison below checks the rest.
            let has_no_line = |entry: &u32| *entry == Self::all(1).entry();
            let spacing = 1 + entries.clone().skip(1).take_while(has_no_line).count() as u64;
            Self::grid(span + spacing.is_power_of_two().then(|| spacing.trailing_zeros())?)
        } else {
            first
        };
        let mut numbered = (0_u64..).zip(entries.by_ref());
        let fits = numbered.all(|(nth, entry)| entry == fill.below(nth << span, span).entry());
        fits.then_some(fill)
    }

    /// Returns the fill that equals a leaf's words; none where no fill does.
    pub(super) fn of_leaf(mut words: impl Iterator<Item = u64> + Clone) -> Option<Self> {
        let first = words.clone().next()?;
        let fill = if first & 3 == 2 && first != spread(2) {
            // The first page is on a line. The next page that is not 1 should be the next one.
            let next_line = words.clone().enumerate().find_map(|(index, word)| {
                let other = word ^ spread(1);
                let other = (other | other >> 1) & spread(1) & if index == 0 { !3 } else { u64::MAX };
                (other != 0).then(|| index as u64 * PER_WORD + u64::from(other.trailing_zeros()) / 2)
            });
            let spacing = next_line.unwrap_or(PAGES);
            Self::grid(spacing.is_power_of_two().then(|| spacing.trailing_zeros())?)
        } else {
            Self::all((first & 3) as u8)
        };
        let mut numbered = (0_u64..).zip(words.by_ref());
        let fits = numbered.all(|(nth, word)| word == fill.word(nth * PER_WORD));
        fits.then_some(fill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fills() -> impl Iterator<Item = Fill> {
        (0..4).map(Fill::all).chain((0..30).map(Fill::grid))
    }

    #[test]
    fn fill_words_counts_and_searches_agree_with_each_page() {
        for fill in fills() {
            for first in [0, 32, 64, 512, 1 << 20, 3 << 9] {
                let word = fill.word(first);
                for page in 0..32 {
                    assert_eq!((word >> (2 * page) & 3) as u8, fill.value(first + page), "{fill:?} {first}");
                }
            }
            for pages in [0..1, 5..900, 511..513, 32..64, 1023..4097] {
                for value in 0..4 {
                    let is = |page: &u64| fill.value(*page) == value;
                    assert_eq!(fill.count(pages.clone(), value), pages.clone().filter(is).count() as u64);
                    assert_eq!(fill.next_not(pages.clone(), value), pages.clone().find(|page| !is(page)));
                    assert_eq!(
                        fill.last_not(pages.clone(), value),
                        pages.clone().rev().find(|page| !is(page))
                    );
                }
            }
        }
    }

    #[test]
    fn fill_split_into_words_or_entries_folds_back() {
        for fill in fills() {
            let words: Vec<_> = (0..16).map(|index| fill.word(index * 32)).collect();
            let leaf = Fill::of_leaf(words.iter().copied()).unwrap();
            assert_eq!(leaf, fill.below(0, 9));
            let entries: Vec<_> = (0..512).map(|index| fill.below(index << 9, 9).entry()).collect();
            assert_eq!(Fill::of_node(entries.iter().copied(), 9), Some(fill.below(0, 18)));
            let mut torn = entries.clone();
            torn[300] ^= 1;
            assert_eq!(Fill::of_node(torn.iter().copied(), 9), None);
            let mut torn = words.clone();
            torn[7] ^= 1 << 9;
            assert_eq!(Fill::of_leaf(torn.iter().copied()), None);
        }
        let begins = |at: &[usize]| {
            let entry = |index| if at.contains(&index) { Fill::grid(9) } else { Fill::all(1) };
            (0..512).map(|index| entry(index).entry()).collect::<Vec<_>>()
        };
        assert_eq!(Fill::of_node(begins(&[0]).into_iter(), 9), Some(Fill::grid(18)));
        assert_eq!(Fill::of_node(begins(&[0, 256]).into_iter(), 9), Some(Fill::grid(17)));
        assert_eq!(Fill::of_node(begins(&[0, 255]).into_iter(), 9), None);
        assert_eq!(Fill::of_node(begins(&[256]).into_iter(), 9), None);
    }
}
