//! The walk over the pages of a tree.

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::gate::ledger::blocks::{BLOCK_WORDS, LEAF_WORDS};
use crate::gate::ledger::fill::Fill;
use crate::gate::ledger::leaf::Leaf;
use crate::gate::ledger::store::Store;

/// Returns the number of pages below one entry at `height`, as a power of two; height 0 is a leaf's.
pub(in crate::gate::ledger) const fn bits(height: u32) -> u32 {
    9 * (height + 1)
}

/// Returns the number of pages below one entry at `height`.
pub(in crate::gate::ledger) const fn span(height: u32) -> u64 {
    1 << bits(height)
}

/// Neighbouring pages that were found together.
pub(in crate::gate::ledger) struct Found<'a> {
    /// The pages.
    pub(in crate::gate::ledger) pages: Range<u64>,
    /// Their values.
    pub(in crate::gate::ledger) values: Values<'a>,
}

/// The values of pages that were found together.
pub(in crate::gate::ledger) enum Values<'a> {
    /// A fill.
    All(Fill),
    /// A leaf with the value of each page.
    Each(Leaf<'a>),
}

/// A walk from page to page: a page in the same node as the last one is found without a descent from the root.
pub(in crate::gate::ledger) struct Walk<'a> {
    store: &'a Store,
    root: usize,
    /// The last node above leaves, with its first page.
    node: Option<(&'a [AtomicU64; BLOCK_WORDS], u64)>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(store: &'a Store, root: usize) -> Self {
        Self { store, root, node: None }
    }

    /// Returns `page` and the pages that are found with it. Pages below a unit outside the memory are 0.
    #[inline]
    pub(in crate::gate::ledger) fn find(&mut self, page: u64) -> Found<'a> {
        match self.node {
            Some((node, first)) if page & !(span(1) - 1) == first => self.below(node, page),
            _ => self.descend(page),
        }
    }

    /// As [`Walk::find`], with the pages behind that have the same entry.
    #[inline]
    pub(in crate::gate::ledger) fn find_on(&mut self, page: u64) -> Found<'a> {
        let mut found = self.find(page);
        if let Some((node, entry)) = self.same(&found) {
            let mut index = (found.pages.start >> bits(0) & 511) + 1;
            while index < 512 && Self::entry(node, index) == entry {
                index += 1;
            }
            found.pages.end = (page & !(span(1) - 1)) + index * span(0);
        }
        found
    }

    /// As [`Walk::find`], with the pages before that have the same entry.
    pub(in crate::gate::ledger) fn find_back(&mut self, page: u64) -> Found<'a> {
        let mut found = self.find(page);
        if let Some((node, entry)) = self.same(&found) {
            let mut index = found.pages.start >> bits(0) & 511;
            while index > 0 && Self::entry(node, index - 1) == entry {
                index -= 1;
            }
            found.pages.start = (page & !(span(1) - 1)) + index * span(0);
        }
        found
    }

    /// Returns the node and the entry of `found`, where entries beside it may be the same.
    fn same(&self, found: &Found<'a>) -> Option<(&'a [AtomicU64; BLOCK_WORDS], u32)> {
        match found.values {
            Values::All(fill) if found.pages.end - found.pages.start == span(0) => {
                self.node.map(|(node, _)| (node, fill.entry()))
            }
            _ => None,
        }
    }

    #[inline]
    fn entry(node: &[AtomicU64; BLOCK_WORDS], index: u64) -> u32 {
        (node[(index / 2) as usize].load(Relaxed) >> (index % 2 * 32)) as u32
    }

    fn descend(&mut self, page: u64) -> Found<'a> {
        let (mut height, mut entry) = self.store.root(self.root);
        if page >= span(height) {
            return Found { pages: span(height)..u64::MAX, values: Values::All(Fill::all(0)) };
        }
        let mut fill = Fill::of(entry);
        while fill.is_none() && height > 1 {
            height -= 1;
            entry = self.store.entry(entry, page >> bits(height) & 511);
            fill = Fill::of(entry);
        }
        let first = page & !(span(height) - 1);
        let node = self.store.words_at(entry, BLOCK_WORDS).try_into();
        match (fill, node) {
            (None, Ok(node)) => {
                self.node = Some((node, first));
                self.below(node, page)
            }
            (fill, _) => {
                let values = Values::All(fill.unwrap_or(Fill::all(0)));
                Found { pages: first..first + span(height), values }
            }
        }
    }

    #[inline]
    fn below(&self, node: &[AtomicU64; BLOCK_WORDS], page: u64) -> Found<'a> {
        let index = page >> bits(0) & 511;
        let entry = Self::entry(node, index);
        let first = page & !(span(0) - 1);
        let values = match (Fill::of(entry), self.store.words_at(entry, LEAF_WORDS).try_into()) {
            (Some(fill), _) => Values::All(fill),
            (None, Ok(words)) => Values::Each(Leaf(words)),
            (None, Err(_)) => Values::All(Fill::all(0)),
        };
        Found { pages: first..first + span(0), values }
    }
}
