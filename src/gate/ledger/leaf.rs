//! The two-bit values of 512 pages in sixteen words.
//!
//! The two bits of a page lie side by side in one word, so that a page changes in one store: after a crash the memory has
//! the old value or the new one, never a mixture.

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, Release};

use super::blocks::LEAF_WORDS;
use super::fill::Fill;

/// The number of pages of a leaf.
pub(super) const PAGES: u64 = 512;
/// The number of pages of a word.
pub(super) const PER_WORD: u64 = 32;
/// The lower bit of every page of a word.
const LOW: u64 = u64::MAX / 3;

/// The words of one leaf.
#[derive(Clone, Copy)]
pub(super) struct Leaf<'a>(pub(super) &'a [AtomicU64; LEAF_WORDS]);

/// Returns a word in which every page is `value`.
pub(super) const fn spread(value: u8) -> u64 {
    value as u64 * LOW
}

/// Returns the lower bit of each page whose two bits are not both 0.
fn any(word: u64) -> u64 {
    (word | word >> 1) & LOW
}

/// Returns the lower bit of each page of `word` that differs from the page before it; `before` is the one before the word.
pub(super) fn changes(word: u64, before: u8) -> u64 {
    any(word ^ (word << 2 | u64::from(before)))
}

/// Returns the word with pages that are 2 changed to 1.
pub(super) fn merged(word: u64) -> u64 {
    let (low, high) = (word & LOW, word >> 1 & LOW);
    low | high | (low & high) << 1
}

/// Writes a word that makes others reachable. Release order: a reader that sees it sees everything written before.
#[inline]
pub(super) fn publish(word: &AtomicU64, value: u64) {
    word.store(value, Release);
    #[cfg(test)]
    super::store::tests::cut::published();
}

/// Returns `pages` (within the word) as a mask of both their bits.
fn mask(pages: Range<u64>) -> u64 {
    u64::MAX >> (64 - 2 * (pages.end - pages.start)) << (2 * pages.start)
}

impl Leaf<'_> {
    /// Returns word `index`.
    pub(super) fn word(self, index: u64) -> u64 {
        self.0.get(index as usize).map_or(0, |word| word.load(Relaxed))
    }

    /// Returns the value of `page` (0 to 511).
    pub(super) fn get(self, page: u64) -> u8 {
        (self.word(page / PER_WORD) >> (2 * (page % PER_WORD)) & 3) as u8
    }

    /// Sets one page. Returns its value before, and true if its word is `value` in every page now.
    #[inline]
    pub(super) fn put(self, page: u64, value: u8) -> (u8, bool) {
        let shift = 2 * (page % PER_WORD);
        let Some(word) = self.0.get((page / PER_WORD) as usize) else { return (value, false) };
        let old = word.load(Relaxed);
        let new = old & !(3 << shift) | u64::from(value) << shift;
        if new != old {
            publish(word, new);
        }
        ((old >> shift & 3) as u8, new == spread(value))
    }

    /// Sets the pages of this leaf, whose first page is `base`. Returns true if a word that changed equals the fill now.
    pub(super) fn set(self, base: u64, pages: Range<u64>, fill: Fill) -> bool {
        let (first, last) = (pages.start / PER_WORD, (pages.end - 1) / PER_WORD);
        let mut even = false;
        for index in first..=last {
            let from = index * PER_WORD;
            let mask = mask(pages.start.saturating_sub(from)..(pages.end - from).min(PER_WORD));
            let filled = fill.word(base + from);
            let Some(word) = self.0.get(index as usize) else { continue };
            let old = word.load(Relaxed);
            let new = old & !mask | filled & mask;
            if new != old {
                publish(word, new);
                even |= new == filled;
            }
        }
        even
    }

    /// Returns the fill that equals it; none where no fill does.
    pub(super) fn fill(self) -> Option<Fill> {
        Fill::of_leaf(self.0.iter().map(|word| word.load(Relaxed)))
    }

    /// Returns the first of the pages that is `value`.
    pub(super) fn next_is(self, pages: Range<u64>, value: u8) -> Option<u64> {
        let mut from = pages.start % PER_WORD;
        for index in pages.start / PER_WORD..pages.end.div_ceil(PER_WORD) {
            let is = (!any(self.word(index) ^ spread(value)) & LOW) >> (2 * from) << (2 * from);
            if is != 0 {
                let page = index * PER_WORD + u64::from(is.trailing_zeros()) / 2;
                return (page < pages.end).then_some(page);
            }
            from = 0;
        }
        None
    }

    /// Returns the number of the pages that are `value`.
    pub(super) fn count(self, pages: Range<u64>, value: u8) -> u64 {
        let words = pages.start / PER_WORD..=(pages.end - 1) / PER_WORD;
        let count = words.map(|index| {
            let base = index * PER_WORD;
            let mask = mask(pages.start.saturating_sub(base)..(pages.end - base).min(PER_WORD));
            u64::from((!any(self.word(index) ^ spread(value)) & LOW & mask).count_ones())
        });
        count.sum()
    }

    /// Adds the numbers of pages that are 0, 1, 2 and 3 to `counts`.
    pub(super) fn counts(self, pages: Range<u64>, counts: &mut [u64; 4]) {
        let mut rest = pages.end - pages.start;
        for index in pages.start / PER_WORD..=(pages.end - 1) / PER_WORD {
            let base = index * PER_WORD;
            let mask = mask(pages.start.saturating_sub(base)..(pages.end - base).min(PER_WORD));
            let word = self.word(index) & mask;
            let (low, high) = (word & LOW, word >> 1 & LOW);
            for (value, pages) in (1..).zip([low & !high, high & !low, low & high]) {
                counts[value] += u64::from(pages.count_ones());
                rest -= u64::from(pages.count_ones());
            }
        }
        counts[0] += rest;
    }

    /// Returns the first of the pages that is not `value`.
    pub(super) fn next_not(self, pages: Range<u64>, value: u8) -> Option<u64> {
        let mut from = pages.start % PER_WORD;
        for index in pages.start / PER_WORD..pages.end.div_ceil(PER_WORD) {
            let other = any(self.word(index) ^ spread(value)) >> (2 * from) << (2 * from);
            if other != 0 {
                let page = index * PER_WORD + u64::from(other.trailing_zeros()) / 2;
                return (page < pages.end).then_some(page);
            }
            from = 0;
        }
        None
    }

    /// Returns the last page before `end` (1 to 512) that is not `value`.
    pub(super) fn last_not(self, end: u64, value: u8) -> Option<u64> {
        for index in (0..end.div_ceil(PER_WORD)).rev() {
            let within = mask(0..(end - index * PER_WORD).min(PER_WORD));
            let other = any(self.word(index) ^ spread(value)) & within;
            if other != 0 {
                return Some(index * PER_WORD + u64::from(other.ilog2()) / 2);
            }
        }
        None
    }
}
