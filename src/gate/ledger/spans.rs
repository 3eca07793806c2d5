//! The spans of equal value in a tree, in order, found a word at a time.

use std::ops::Range;

use super::leaf::{self, Leaf, PER_WORD};
use super::tree::{Values, Walk};

/// The longest spans of equal value that make up a range of pages; see [`super::Tree::spans`].
pub struct Spans<'a> {
    walk: Walk<'a>,
    /// True if pages that are 2 count as 1.
    merged: bool,
    /// The start of the current span. `value` is its value.
    start: u64,
    value: u8,
    /// The first page not read yet. `end` is the end of the range.
    next: u64,
    end: u64,
    /// The leaf that is being read, with its first page.
    leaf: Option<(Leaf<'a>, u64)>,
    /// The word last read. `first` is its first page, `changes` has a bit where a span begins that was not returned yet.
    word: u64,
    first: u64,
    changes: u64,
}

impl<'a> Spans<'a> {
    pub(super) fn new(walk: Walk<'a>, pages: Range<u64>, merged: bool) -> Self {
        let (start, end) = (pages.start, pages.end);
        let mut spans = Self {
            walk,
            merged,
            start,
            value: 0,
            next: start,
            end,
            leaf: None,
            word: 0,
            first: 0,
            changes: 0,
        };
        if start < end {
            let found = spans.walk.find(start);
            let value = match found.values {
                Values::All(fill) => fill.value(start),
                Values::Each(leaf) => {
                    spans.leaf = Some((leaf, found.pages.start));
                    leaf.get(start % leaf::PAGES)
                }
            };
            spans.value = if merged && value == 2 { 1 } else { value };
        }
        spans
    }

    /// Reads one word of a leaf, or as many pages as are known to be equal. `next` is before `end`.
    #[inline]
    fn load_word(&mut self) {
        let page = self.next;
        let word = match self.leaf {
            Some((leaf, first)) if page < first + leaf::PAGES => leaf.word((page - first) / PER_WORD),
            _ => {
                let found = self.walk.find_on(page);
                match found.values {
                    Values::Each(leaf) => {
                        self.leaf = Some((leaf, found.pages.start));
                        leaf.word((page - found.pages.start) / PER_WORD)
                    }
                    Values::All(fill) if fill.bits().is_none() || self.merged => {
                        let value = fill.value(page);
                        self.leaf = None;
                        self.next = found.pages.end;
                        self.first = page;
                        self.word = if self.merged && value == 2 { 1 } else { value.into() };
                        self.changes = u64::from(self.word != u64::from(self.value));
                        return;
                    }
                    Values::All(fill) => fill.word(page - page % PER_WORD),
                }
            }
        };
        self.word = if self.merged { leaf::merged(word) } else { word };
        self.first = page - page % PER_WORD;
        self.next = self.first + PER_WORD;
        self.changes = leaf::changes(self.word, self.value);
        if page != self.first {
            // Pages before the range do not count.
            self.changes &= u64::MAX << (2 * (page - self.first)) << 1;
        }
        if self.next > self.end {
            self.changes &= (1 << (2 * (self.end - self.first))) - 1;
        }
    }

    /// Returns the span before the next change in the word last read.
    #[inline]
    fn change(&mut self) -> (Range<u64>, u8) {
        let bit = self.changes.trailing_zeros();
        self.changes &= self.changes - 1;
        let at = self.first + u64::from(bit) / 2;
        let span = (self.start..at, self.value);
        (self.start, self.value) = (at, (self.word >> bit & 3) as u8);
        span
    }

    #[inline]
    fn rest(&mut self) -> Option<(Range<u64>, u8)> {
        let last = (self.start..self.end, self.value);
        self.start = self.end;
        (!last.0.is_empty()).then_some(last)
    }
}

impl Iterator for Spans<'_> {
    type Item = (Range<u64>, u8);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.changes != 0 {
                return Some(self.change());
            }
            if self.next >= self.end {
                return self.rest();
            }
            self.load_word();
        }
    }

    /// As `next` again and again, with the state in registers: `for_each` and `sum` run on it.
    #[inline]
    fn fold<B, F: FnMut(B, Self::Item) -> B>(mut self, init: B, mut tell: F) -> B {
        let mut told = init;
        loop {
            // In registers while a word lasts.
            let (word, first, mut changes) = (self.word, self.first, self.changes);
            let (mut start, mut value) = (self.start, self.value);
            while changes != 0 {
                let bit = changes.trailing_zeros();
                let at = first + u64::from(bit) / 2;
                told = tell(told, (start..at, value));
                (start, value) = (at, (word >> bit & 3) as u8);
                changes &= changes - 1;
            }
            (self.start, self.value, self.changes) = (start, value, 0);
            if self.next >= self.end {
                return match self.rest() {
                    Some(rest) => tell(told, rest),
                    None => told,
                };
            }
            self.load_word();
        }
    }
}
