//! Setting pages of a tree: a new node is filled before it is linked, and an old one unlinked before it is freed.

use std::ops::Range;

use super::walk::{bits, span};
use crate::gate::ledger::blocks::LEAF_WORDS;
use crate::gate::ledger::fault::Full;
use crate::gate::ledger::fill::{FIRST_UNIT, Fill};
use crate::gate::ledger::leaf::{self, Leaf};
use crate::gate::ledger::store::Store;

/// An entry and its position.
#[derive(Clone, Copy)]
pub(super) struct Position {
    pub(super) entry: u32,
    pub(super) height: u32,
    /// The first page below it.
    pub(super) first: u64,
    /// The unit of the node that it is in.
    pub(super) parent: u32,
}

/// The setting of pages to a fill.
pub(super) struct Setting<'a> {
    pub(super) store: &'a Store,
    /// The numbers of the tree's pages by value.
    pub(super) totals: &'a mut [u64; 4],
    pub(super) to: Fill,
    /// The value of the pages and their neighbours where there is no room to distinguish them.
    pub(super) coarse: Option<u8>,
    /// Set once there was no room.
    pub(super) short: Option<Full>,
}

/// Counts a page that was `old` and is `new`.
#[inline]
pub(super) fn move_page(totals: &mut [u64; 4], old: u8, new: u8) {
    let [old, new] = [old, new].map(|value| usize::from(value & 3));
    totals[old] = totals[old].wrapping_sub(1);
    totals[new] = totals[new].wrapping_add(1);
}

impl Setting<'_> {
    /// Sets `pages`, which lie below `at`. Returns the new entry.
    pub(super) fn set(&mut self, at: Position, pages: Range<u64>) -> Result<u32, Full> {
        let same = self.to.below(at.first, bits(at.height));
        if at.entry == same.entry() {
            return Ok(at.entry);
        }
        if pages.end - pages.start == span(at.height) {
            return Ok(self.fold(at, same));
        }
        let made = Fill::of(at.entry);
        let unit = match (made, at.height) {
            (None, _) => Ok(at.entry),
            (Some(fill), 0) => self.store.take_leaf(at.parent, fill, at.first),
            (Some(fill), height) => self.store.take_node(fill, at.first, bits(height - 1)),
        };
        let unit = match (unit, self.coarse) {
            (Ok(unit), _) => unit,
            (Err(full), Some(coarse)) => {
                self.short = Some(full);
                return Ok(self.fold(at, Fill::all(coarse)));
            }
            (Err(full), None) => return Err(full),
        };
        if at.height == 0 {
            return Ok(self.set_leaf(unit, at.first, pages).map_or(unit, Fill::entry));
        }
        let before = *self.totals;
        let folded = self.set_below(Position { entry: unit, ..at }, pages);
        if made.is_some() && folded.is_err() {
            // The new node was not linked yet: nothing has changed.
            self.store.free(unit, at.height, 0);
            *self.totals = before;
        }
        let fill = folded?.then(|| Fill::of_node(self.store.entries(unit), bits(at.height - 1))).flatten();
        if made.is_some() && fill.is_some() {
            self.store.free(unit, at.height, 0);
        }
        Ok(fill.map_or(unit, Fill::entry))
    }

    /// Sets `pages` below the node `at`. Returns true if an entry of it is a fill now.
    fn set_below(&mut self, at: Position, pages: Range<u64>) -> Result<bool, Full> {
        let (span, mut folded) = (span(at.height - 1), false);
        for index in (pages.start - at.first) / span..=(pages.end - 1 - at.first) / span {
            let old = self.store.entry(at.entry, index);
            let first = at.first + index * span;
            let within = pages.start.max(first)..pages.end.min(first + span);
            let below = Position { entry: old, height: at.height - 1, first, parent: at.entry };
            let new = self.set(below, within)?;
            if new != old {
                self.store.set_entry(at.entry, index, new);
            }
            if new < FIRST_UNIT {
                self.store.free(old, at.height - 1, at.entry);
                folded = true;
            }
        }
        Ok(folded)
    }

    /// Sets `pages` of a leaf whose first page is `first`. Returns the fill that equals the leaf now; none where no fill does.
    fn set_leaf(&mut self, unit: u32, first: u64, pages: Range<u64>) -> Option<Fill> {
        let leaf = Leaf(self.store.words_at(unit, LEAF_WORDS).try_into().ok()?);
        let within = pages.start - first..pages.end - first;
        let mut old = [0; 4];
        leaf.counts(within.clone(), &mut old);
        self.count(old, self.to, pages);
        leaf.set(first, within, self.to);
        leaf.fill()
    }

    /// Sets all pages below `at` to `fill`. Returns the new entry.
    fn fold(&mut self, at: Position, fill: Fill) -> u32 {
        let mut old = [0; 4];
        self.tally(at, &mut old);
        self.count(old, fill, at.first..at.first + span(at.height));
        fill.entry()
    }

    /// Counts `pages`, of which there were `old` of each value, and which are filled now.
    fn count(&mut self, old: [u64; 4], fill: Fill, pages: Range<u64>) {
        for (value, (total, old)) in (0..).zip(self.totals.iter_mut().zip(old)) {
            *total = total.wrapping_sub(old).wrapping_add(fill.count(pages.clone(), value));
        }
    }

    /// Adds up the pages by value below `at`.
    fn tally(&self, at: Position, counts: &mut [u64; 4]) {
        if let Some(fill) = Fill::of(at.entry) {
            for (value, count) in (0..).zip(counts) {
                *count += fill.count(at.first..at.first + span(at.height), value);
            }
        } else if at.height > 0 {
            let (height, span) = (at.height - 1, span(at.height - 1));
            for (first, entry) in (at.first..).step_by(span as usize).zip(self.store.entries(at.entry)) {
                self.tally(Position { entry, height, first, parent: at.entry }, counts);
            }
        } else if let Ok(words) = self.store.words_at(at.entry, LEAF_WORDS).try_into() {
            Leaf(words).counts(0..leaf::PAGES, counts);
        }
    }
}
