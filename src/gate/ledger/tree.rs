//! A two-bit value for every page number, in a store: nodes of 512 entries above leaves of 512 pages.
//!
//! An entry is the fill of all pages below it, or the unit of the node or leaf that distinguishes them; a node or leaf that
//! becomes uniform is folded back into one entry at once. The root has as many levels as its highest page needs. Pages that
//! were never set are 0.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::Range;

mod set;
mod walk;

use super::blocks::{BLOCK_BYTES, LEAVES};
use super::fault::Full;
use super::fill::{FIRST_UNIT, Fill};
use super::leaf;
use super::spans::Spans;
use super::store::{Arena, Key, LEVELS, Store};
use set::{Position, Setting, move_page};
use walk::bits;
pub(super) use walk::{Values, Walk, span};

/// The end of page numbers; a [`passgate_bindings::PageRange`] has none beyond.
pub const PAGES: u64 = span(LEVELS);

/// The values of all pages under one key of a store. Only one may exist per key at a time.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    key: Key,
    /// The word of the store that has its root.
    root: usize,
    /// The numbers of pages that are 1, 2 and 3; those that are 0 are not counted.
    totals: [u64; 4],
}

impl Tree {
    /// Returns the tree under `key`; where the store has none yet, a new one.
    pub fn new(store: &Store, key: Key) -> Result<Self, Full> {
        let mut tree = Self { root: store.tree(key)?, store: store.clone(), key, totals: [0; 4] };
        tree.totals = tree.tally(0..span(store.root(tree.root).0));
        Ok(tree)
    }

    /// Returns an empty tree that has memory of `arena` for itself, and ends with the process.
    pub fn own(arena: Arena) -> Self {
        let store = Store::new(arena()).ok();
        let made = store.and_then(|store| Self::new(&store, Key { kind: 0, a: 0, b: 0 }).ok());
        // As any allocation that fails: there is no memory even for an empty tree.
        made.unwrap_or_else(|| handle_alloc_error(Layout::new::<[u64; 1 << 13]>()))
    }

    /// Removes it from the store and frees its memory.
    pub fn discard(self) {
        self.store.remove(self.key);
    }

    /// Returns the store that it lies in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the maximum of bytes that it takes in the store if only `pages` (not empty) are ever set.
    pub fn worst(pages: Range<u64>) -> u64 {
        let touched = |span: u64| (pages.end - 1) / span - pages.start / span + 1;
        let nodes: u64 = (1..=LEVELS).map(|height| touched(span(height))).sum();
        (nodes + touched(span(0) * u64::from(LEAVES))) * BLOCK_BYTES
    }

    /// Returns the value of `page`.
    pub fn get(&self, page: u64) -> u8 {
        match self.walk().find(page).values {
            Values::All(fill) => fill.value(page),
            Values::Each(leaf) => leaf.get(page % leaf::PAGES),
        }
    }

    /// Sets every page of `pages` to `value` (0 to 3). Each page has its old value or the new one at any time. On
    /// `Full` some are set and others are not.
    pub fn set(&mut self, pages: Range<u64>, value: u8) -> Result<(), Full> {
        self.set_or(pages, Fill::all(value), None)
    }

    /// Sets every page of `pages` to `value`, and where there is no room to distinguish them from their neighbours, these too
    /// to `coarse`: a fold needs no memory. Where the tree cannot grow, pages beyond its end stay 0. Returns true if there
    /// was room.
    pub fn force(&mut self, pages: Range<u64>, value: u8, coarse: u8) -> bool {
        self.force_fill(pages, Fill::all(value), coarse)
    }

    /// As [`Tree::force`], to a fill.
    pub(super) fn force_fill(&mut self, pages: Range<u64>, to: Fill, coarse: u8) -> bool {
        self.set_or(pages, to, Some(coarse)).is_ok()
    }

    fn set_or(&mut self, pages: Range<u64>, to: Fill, coarse: Option<u8>) -> Result<(), Full> {
        let mut pages = pages.start..pages.end.min(PAGES);
        if pages.is_empty() {
            return Ok(());
        }
        // One page of a leaf: by far the most common case, and nothing but its word changes.
        if pages.end - pages.start == 1 {
            let value = to.value(pages.start);
            match self.walk().find(pages.start).values {
                Values::Each(leaf) => {
                    let (old, even) = leaf.put(pages.start % leaf::PAGES, value);
                    move_page(&mut self.totals, old, value);
                    if !even {
                        return Ok(());
                    }
                }
                Values::All(old) if old.value(pages.start) == value => return Ok(()),
                Values::All(_) => {}
            }
        }
        let (mut height, mut entry) = self.store.root(self.root);
        while pages.end > span(height) {
            if to == Fill::all(0) {
                pages.end = span(height);
                break;
            }
            entry = self.raise(entry, height)?;
            height += 1;
            self.store.set_root(self.root, height, entry);
        }
        if pages.start >= pages.end {
            return Ok(());
        }
        let at = Position { entry, height, first: 0, parent: 0 };
        let mut setting = Setting { store: &self.store, totals: &mut self.totals, to, coarse, short: None };
        let new = setting.set(at, pages)?;
        let short = setting.short;
        if new != entry {
            self.store.set_root(self.root, height, new);
            if new < FIRST_UNIT {
                self.store.free(entry, height, 0);
            }
        }
        short.map_or(Ok(()), Err)
    }

    /// Returns a root one level higher than `entry` at `height`.
    fn raise(&self, entry: u32, height: u32) -> Result<u32, Full> {
        if entry == 0 {
            return Ok(0);
        }
        let node = self.store.take_node(Fill::all(0), 0, bits(height))?;
        self.store.set_entry(node, 0, entry);
        Ok(node)
    }

    /// Returns the longest spans of equal value that make up `pages`, in order.
    pub fn spans(&self, pages: Range<u64>) -> Spans<'_> {
        Spans::new(self.walk(), pages, false)
    }

    /// As [`Tree::spans`], with pages that are 2 counted as 1.
    pub fn merged_spans(&self, pages: Range<u64>) -> Spans<'_> {
        Spans::new(self.walk(), pages, true)
    }

    /// Returns the first page of `pages` that is not `value`.
    pub fn next_not(&self, pages: Range<u64>, value: u8) -> Option<u64> {
        self.search(pages, |values, pages, first| match values {
            Values::All(fill) => fill.next_not(pages, value),
            Values::Each(leaf) => {
                leaf.next_not(pages.start - first..pages.end - first, value).map(|page| first + page)
            }
        })
    }

    /// Returns the first page of `pages` that is `value`.
    pub fn next(&self, pages: Range<u64>, value: u8) -> Option<u64> {
        self.search(pages, |values, pages, first| match values {
            Values::All(fill) if fill.value(pages.start) == value => Some(pages.start),
            // Of two values on a grid one is the other's opposite.
            Values::All(fill) if fill.bits().is_some() && (1..=2).contains(&value) => {
                fill.next_not(pages, 3 - value)
            }
            Values::All(_) => None,
            Values::Each(leaf) => {
                leaf.next_is(pages.start - first..pages.end - first, value).map(|page| first + page)
            }
        })
    }

    /// Returns the first page that `look` finds, which is given pages found together and the first page of their leaf.
    fn search(
        &self,
        pages: Range<u64>,
        look: impl Fn(Values<'_>, Range<u64>, u64) -> Option<u64>,
    ) -> Option<u64> {
        let (mut at, mut walk) = (pages.start, self.walk());
        while at < pages.end {
            let found = walk.find_on(at);
            let end = found.pages.end.min(pages.end);
            if let Some(page) = look(found.values, at..end, found.pages.start) {
                return Some(page);
            }
            at = end;
        }
        None
    }

    /// Returns the last page of `pages` that is not `value`.
    pub fn last_not(&self, pages: Range<u64>, value: u8) -> Option<u64> {
        let (mut end, mut walk) = (pages.end, self.walk());
        while pages.start < end {
            let found = walk.find_back(end - 1);
            let first = found.pages.start;
            let page = match found.values {
                Values::All(fill) => fill.last_not(first.max(pages.start)..end, value),
                Values::Each(leaf) => leaf.last_not(end - first, value).map(|page| first + page),
            };
            if let Some(page) = page {
                return (page >= pages.start).then_some(page);
            }
            end = first;
        }
        None
    }

    /// Returns the number of `pages` that are `value`.
    pub fn count(&self, pages: Range<u64>, value: u8) -> u64 {
        let (mut at, mut count, mut walk) = (pages.start, 0, self.walk());
        while at < pages.end {
            let found = walk.find_on(at);
            let (first, end) = (found.pages.start, found.pages.end.min(pages.end));
            count += match found.values {
                Values::All(fill) => fill.count(at..end, value),
                Values::Each(leaf) => leaf.count(at - first..end - first, value),
            };
            at = end;
        }
        count
    }

    /// Returns the number of pages of the whole tree that are `value` (1 to 3).
    pub fn total(&self, value: u8) -> u64 {
        self.totals[usize::from(value & 3)]
    }

    /// Returns the numbers of `pages` that are 0, 1, 2 and 3. Immediate where all other pages are 0, as for a whole file.
    pub fn counts(&self, pages: Range<u64>) -> [u64; 4] {
        let ends = span(self.store.root(self.root).0);
        if self.next_not(0..pages.start.min(ends), 0).is_none()
            && self.next_not(pages.end.min(ends)..ends, 0).is_none()
        {
            let [_, one, two, three] = self.totals;
            let rest =
                (pages.end - pages.start).saturating_sub(one.saturating_add(two).saturating_add(three));
            return [rest, one, two, three];
        }
        self.tally(pages)
    }

    /// As [`Tree::counts`], by a walk: faster for few pages.
    pub(super) fn tally(&self, pages: Range<u64>) -> [u64; 4] {
        let (mut at, mut counts, mut walk) = (pages.start, [0; 4], self.walk());
        while at < pages.end {
            let found = walk.find_on(at);
            let (first, end) = (found.pages.start, found.pages.end.min(pages.end));
            match found.values {
                Values::All(fill) => {
                    (0..).zip(&mut counts).for_each(|(value, count)| *count += fill.count(at..end, value));
                }
                Values::Each(leaf) => leaf.counts(at - first..end - first, &mut counts),
            }
            at = end;
        }
        counts
    }

    /// Returns a walk over its pages.
    pub(super) fn walk(&self) -> Walk<'_> {
        Walk::new(&self.store, self.root)
    }
}

#[cfg(test)]
mod tests;
