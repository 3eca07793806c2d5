//! A two-bit value for every page number, in a store: nodes of 512 entries above leaves of 512 pages.
//!
//! An entry is the value of all pages below it, or the unit of the node or leaf that tells them apart; what becomes
//! equal is folded back into one entry at once. The root has as many levels as its highest page needs. Pages that were
//! never set are 0.

use std::ops::Range;

use super::blocks::{BLOCK_BYTES, LEAF_WORDS, LEAVES};
use super::leaf::{self, Leaf};
use super::spans::Spans;
use super::store::{Full, Key, LEVELS, Store, UNIFORM};

/// Bits of a page number that one level tells apart.
const BITS: u32 = 9;
/// Page numbers end here; a [`passgate_bindings::PageRange`] has none beyond.
pub const PAGES: u64 = 1 << (BITS * (LEVELS + 1));

/// Pages below one entry at `height`: 0 is a leaf's.
const fn span(height: u32) -> u64 {
    1 << (BITS * (height + 1))
}

/// The values of all pages under one key of a store. There is one of these per key at a time.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    key: Key,
    /// Where in the store its root is.
    root: usize,
}

/// The pages around one that were found together.
pub(super) struct Found<'a> {
    /// Which.
    pub(super) pages: Range<u64>,
    /// What they are.
    pub(super) values: Values<'a>,
}

/// What pages found together are.
pub(super) enum Values<'a> {
    /// All the same.
    All(u8),
    /// Told apart.
    Each(Leaf<'a>),
}

impl Tree {
    /// The tree under `key`; where the store has none yet, a new one.
    pub fn new(store: &Store, key: Key) -> Result<Self, Full> {
        Ok(Self { root: store.tree(key)?, store: store.clone(), key })
    }

    /// Forgets it: its memory is free, and the store has nothing under its key.
    pub fn discard(self) {
        self.store.remove(self.key);
    }

    /// The store that it lies in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Bytes of the store that it takes at most if only `pages` (not empty) are ever set.
    pub fn worst(pages: Range<u64>) -> u64 {
        let touched = |span: u64| (pages.end - 1) / span - pages.start / span + 1;
        let nodes: u64 = (1..=LEVELS).map(|height| touched(span(height))).sum();
        (nodes + touched(span(0) * u64::from(LEAVES))) * BLOCK_BYTES
    }

    /// The value of `page`.
    pub fn get(&self, page: u64) -> u8 {
        match self.find(page).values {
            Values::All(value) => value,
            Values::Each(leaf) => leaf.get(page % leaf::PAGES),
        }
    }

    /// Sets every page of `pages` to `value` (0 to 3). Each page has its old value or the new one at any time. On
    /// `Full` some are set and others are not.
    pub fn set(&mut self, pages: Range<u64>, value: u8) -> Result<(), Full> {
        self.set_or(pages, value, None)
    }

    /// Sets every page of `pages` to `value`, and where there is no room to tell them from their neighbours, these too
    /// to `coarse`: a fold needs no memory. Where the tree cannot grow, pages beyond its end stay 0.
    pub fn force(&mut self, pages: Range<u64>, value: u8, coarse: u8) {
        let _ = self.set_or(pages, value, Some(coarse));
    }

    fn set_or(&mut self, pages: Range<u64>, value: u8, coarse: Option<u8>) -> Result<(), Full> {
        let (value, mut pages) = (value & 3, pages.start..pages.end.min(PAGES));
        if pages.is_empty() {
            return Ok(());
        }
        // One page beside others that are told apart: by far the most common, and nothing but its word changes.
        if pages.end - pages.start == 1 {
            let page = pages.start % leaf::PAGES;
            match self.find(pages.start).values {
                Values::Each(leaf) if !leaf.set(page..page + 1, value) => return Ok(()),
                Values::All(old) if old == value => return Ok(()),
                _ => {}
            }
        }
        let (mut height, mut entry) = self.store.root(self.root);
        while pages.end > span(height) {
            if value == 0 {
                pages.end = span(height);
                break;
            }
            entry = self.raise(entry)?;
            height += 1;
            self.store.set_root(self.root, height, entry);
        }
        if pages.start >= pages.end {
            return Ok(());
        }
        let at = Place { entry, height, first: 0, parent: 0 };
        let new = self.set_in(at, pages, Setting { value, coarse })?;
        if new != entry {
            self.store.set_root(self.root, height, new);
            if new < UNIFORM {
                self.store.free(entry, height, 0);
            }
        }
        Ok(())
    }

    /// A root one level higher than `entry`.
    fn raise(&self, entry: u32) -> Result<u32, Full> {
        if entry == 0 {
            return Ok(0);
        }
        let node = self.store.take_node(0)?;
        self.store.set_entry(node, 0, entry);
        Ok(node)
    }

    /// Sets `pages`, which lie below `at`; what its entry is to be then.
    fn set_in(&self, at: Place, pages: Range<u64>, to: Setting) -> Result<u32, Full> {
        let same = u32::from(to.value);
        if at.entry == same || pages == at.pages() {
            return Ok(same);
        }
        let made = at.entry < UNIFORM;
        let unit = match (made, at.height) {
            (false, _) => Ok(at.entry),
            (true, 0) => self.store.take_leaf(at.parent, leaf::spread(at.entry as u8)),
            (true, _) => self.store.take_node(at.entry),
        };
        let unit = match (unit, to.coarse) {
            (Ok(unit), _) => unit,
            (Err(_), Some(coarse)) => return Ok(coarse.into()),
            (Err(full), None) => return Err(full),
        };
        if at.height == 0 {
            let Some(leaf) = self.leaf(unit) else { return Ok(unit) };
            leaf.set(pages.start - at.first..pages.end - at.first, to.value);
            return Ok(if leaf.is_all(to.value) { same } else { unit });
        }
        let folded = match self.set_below(Place { entry: unit, ..at }, pages, to) {
            Ok(folded) => folded,
            Err(full) => {
                if made {
                    self.store.free(unit, at.height, 0);
                }
                return Err(full);
            }
        };
        match folded {
            Some(value) if self.store.entries(unit).all(|entry| entry == value) => {
                // A node that nothing leads to yet is nobody else's to give back.
                if made {
                    self.store.free(unit, at.height, 0);
                }
                Ok(value)
            }
            _ => Ok(unit),
        }
    }

    /// Sets `pages` below the node `at`; the last value that an entry of it was folded into.
    fn set_below(&self, at: Place, pages: Range<u64>, to: Setting) -> Result<Option<u32>, Full> {
        let (span, mut folded) = (span(at.height - 1), None);
        for index in (pages.start - at.first) / span..=(pages.end - 1 - at.first) / span {
            let old = self.store.entry(at.entry, index);
            let first = at.first + index * span;
            let within = pages.start.max(first)..pages.end.min(first + span);
            let below = Place { entry: old, height: at.height - 1, first, parent: at.entry };
            let new = self.set_in(below, within, to)?;
            if new != old {
                self.store.set_entry(at.entry, index, new);
            }
            if new < UNIFORM {
                self.store.free(old, at.height - 1, at.entry);
                folded = Some(new);
            }
        }
        Ok(folded)
    }

    /// The longest spans of equal value that make up `pages`, in order.
    pub fn spans(&self, pages: Range<u64>) -> Spans<'_> {
        Spans::new(self, pages)
    }

    /// The first page of `pages` that is not `value`.
    pub fn next_not(&self, pages: Range<u64>, value: u8) -> Option<u64> {
        let mut at = pages.start;
        while at < pages.end {
            let found = self.find(at);
            let first = found.pages.start;
            match found.values {
                Values::All(other) if other != value => return Some(at),
                Values::All(_) => {}
                Values::Each(leaf) => {
                    let end = pages.end.min(found.pages.end);
                    if let Some(page) = leaf.next_not(at - first..end - first, value) {
                        return Some(first + page);
                    }
                }
            }
            at = found.pages.end;
        }
        None
    }

    /// The last page of `pages` that is not `value`.
    pub fn last_not(&self, pages: Range<u64>, value: u8) -> Option<u64> {
        let mut end = pages.end;
        while pages.start < end {
            let found = self.find(end - 1);
            let first = found.pages.start;
            let page = match found.values {
                Values::All(other) => (other != value).then_some(end - 1),
                Values::Each(leaf) => leaf.last_not(end - first, value).map(|page| first + page),
            };
            if let Some(page) = page {
                return (page >= pages.start).then_some(page);
            }
            end = first;
        }
        None
    }

    /// How many of `pages` are `value`.
    pub fn count(&self, pages: Range<u64>, value: u8) -> u64 {
        let (mut at, mut count) = (pages.start, 0);
        while at < pages.end {
            let found = self.find(at);
            let (first, end) = (found.pages.start, found.pages.end.min(pages.end));
            count += match found.values {
                Values::All(other) => {
                    if other == value {
                        end - at
                    } else {
                        0
                    }
                }
                Values::Each(leaf) => leaf.count(at - first..end - first, value),
            };
            at = end;
        }
        count
    }

    /// What is known of `page` and those around it.
    pub(super) fn find(&self, page: u64) -> Found<'_> {
        let (mut height, mut entry) = self.store.root(self.root);
        if page >= span(height) {
            return Found { pages: span(height)..u64::MAX, values: Values::All(0) };
        }
        while entry >= UNIFORM && height > 0 {
            height -= 1;
            entry = self.store.entry(entry, page >> (BITS * (height + 1)) & 511);
        }
        self.at(entry, page & !(span(height) - 1), height)
    }

    fn at(&self, entry: u32, first: u64, height: u32) -> Found<'_> {
        let pages = first..first + span(height);
        let values = match self.leaf(entry) {
            Some(leaf) if entry >= UNIFORM => Values::Each(leaf),
            // A unit that leads nowhere is none of ours: its pages are as if never set.
            _ => Values::All(if entry < UNIFORM { entry as u8 } else { 0 }),
        };
        Found { pages, values }
    }

    fn leaf(&self, unit: u32) -> Option<Leaf<'_>> {
        self.store.words_at(unit, LEAF_WORDS).try_into().ok().map(Leaf)
    }
}

/// An entry, and what it stands for.
#[derive(Clone, Copy)]
struct Place {
    entry: u32,
    height: u32,
    /// Its first page.
    first: u64,
    /// The node that it is in.
    parent: u32,
}

impl Place {
    fn pages(self) -> Range<u64> {
        self.first..self.first + span(self.height)
    }
}

/// What pages are set to, and what where that would need room that is not there.
#[derive(Clone, Copy)]
struct Setting {
    value: u8,
    coarse: Option<u8>,
}

#[cfg(test)]
mod tests;
