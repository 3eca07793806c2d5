//! Setting pages of a tree: what is new is filled before anything leads to it, what is no longer wanted is unlinked
//! before it is given back.

use std::ops::Range;

use super::walk::span;
use crate::gate::ledger::blocks::LEAF_WORDS;
use crate::gate::ledger::leaf::{self, Leaf};
use crate::gate::ledger::store::{Full, Store, UNIFORM};

/// An entry, and what it stands for.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) entry: u32,
    pub(super) height: u32,
    /// Its first page.
    pub(super) first: u64,
    /// The node that it is in.
    pub(super) parent: u32,
}

/// What pages are set to.
pub(super) struct Setting<'a> {
    pub(super) store: &'a Store,
    /// The tree's pages by value.
    pub(super) totals: &'a mut [u64; 4],
    pub(super) value: u8,
    /// What they and their neighbours become where there is no room to tell them apart.
    pub(super) coarse: Option<u8>,
}

/// `count` pages were `old` and are `new`.
pub(super) fn move_pages(totals: &mut [u64; 4], old: u8, new: u8, count: u64) {
    let [old, new] = [old, new].map(|value| usize::from(value & 3));
    totals[old] = totals[old].wrapping_sub(count);
    totals[new] = totals[new].wrapping_add(count);
}

impl Setting<'_> {
    /// Sets `pages`, which lie below `at`; what its entry is to be then.
    pub(super) fn set(&mut self, at: Place, pages: Range<u64>) -> Result<u32, Full> {
        let same = u32::from(self.value);
        if at.entry == same {
            return Ok(same);
        }
        if pages.end - pages.start == span(at.height) {
            return Ok(self.fold(at, self.value));
        }
        let made = at.entry < UNIFORM;
        let unit = match (made, at.height) {
            (false, _) => Ok(at.entry),
            (true, 0) => self.store.take_leaf(at.parent, leaf::spread(at.entry as u8)),
            (true, _) => self.store.take_node(at.entry),
        };
        let unit = match (unit, self.coarse) {
            (Ok(unit), _) => unit,
            (Err(_), Some(coarse)) => return Ok(self.fold(at, coarse)),
            (Err(full), None) => return Err(full),
        };
        if at.height == 0 {
            let even = self.set_leaf(unit, pages.start - at.first..pages.end - at.first);
            return Ok(if even { same } else { unit });
        }
        let before = *self.totals;
        let folded = self.set_below(Place { entry: unit, ..at }, pages);
        if made && folded.is_err() {
            // Nothing led to the new node yet: nothing of it has happened.
            self.store.free(unit, at.height, 0);
            *self.totals = before;
        }
        match folded? {
            Some(value) if self.store.entries(unit).all(|entry| entry == value) => {
                if made {
                    self.store.free(unit, at.height, 0);
                }
                Ok(value)
            }
            _ => Ok(unit),
        }
    }

    /// Sets `pages` below the node `at`; the last value that an entry of it was folded into.
    fn set_below(&mut self, at: Place, pages: Range<u64>) -> Result<Option<u32>, Full> {
        let (span, mut folded) = (span(at.height - 1), None);
        for index in (pages.start - at.first) / span..=(pages.end - 1 - at.first) / span {
            let old = self.store.entry(at.entry, index);
            let first = at.first + index * span;
            let within = pages.start.max(first)..pages.end.min(first + span);
            let below = Place { entry: old, height: at.height - 1, first, parent: at.entry };
            let new = self.set(below, within)?;
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

    /// Sets `pages` (0 to 511) of a leaf; whether all of it is the same now.
    fn set_leaf(&mut self, unit: u32, pages: Range<u64>) -> bool {
        let Ok(words) = self.store.words_at(unit, LEAF_WORDS).try_into() else { return false };
        let mut old = [0; 4];
        Leaf(words).counts(pages.clone(), &mut old);
        self.move_all(old, self.value);
        Leaf(words).set(pages, self.value);
        Leaf(words).is_all(self.value)
    }

    /// All pages below `at` become `value`; its entry then.
    fn fold(&mut self, at: Place, value: u8) -> u32 {
        let mut old = [0; 4];
        self.tally(at.entry, at.height, &mut old);
        self.move_all(old, value);
        value.into()
    }

    fn move_all(&mut self, old: [u64; 4], new: u8) {
        for (was, count) in (0..).zip(old) {
            move_pages(self.totals, was, new, count);
        }
    }

    /// Adds up the pages by value below `entry`.
    fn tally(&self, entry: u32, height: u32, counts: &mut [u64; 4]) {
        if entry < UNIFORM {
            counts[entry as usize] += span(height);
        } else if height > 0 {
            self.store.entries(entry).for_each(|entry| self.tally(entry, height - 1, counts));
        } else if let Ok(words) = self.store.words_at(entry, LEAF_WORDS).try_into() {
            Leaf(words).counts(0..leaf::PAGES, counts);
        }
    }
}
