//! The domain's own book of its slots: which are mapped, and which may be used again.
//!
//! A slot stays with its IOVA after an unmap (`Stale`), so that the device's old translation leads to an empty
//! slot and not to somebody else's pages. It is taken from there only when no free one is left, in turn, and only
//! together with the translation.

use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::uring::{Slot, Tag};
use passgate_bindings::{Iova, PageRange};

use super::view::View;
use crate::iommu::Ticket;

/// What a slot is for.
#[derive(Debug)]
pub(crate) enum Slotted {
    /// Empty, and no device knows it.
    Free,
    /// Empty, and the devices still know it as this IOVA.
    Stale(Iova),
    /// About to be filled.
    Claimed,
    /// Filled, and known to the devices or about to be.
    Live {
        /// Where the devices see it.
        start: Iova,
        /// Comes when the kernel has let go of this filling.
        tag: Tag,
        /// What it is filled with.
        file: Arc<GuestFile>,
    },
}

/// The book.
#[derive(Debug)]
pub(crate) struct Table {
    slots: Vec<Slotted>,
    free: Vec<Slot>,
    live: usize,
    turn: usize,
    /// Addresses over which operations that nobody has a ticket of may still run.
    pub(crate) unfinished: Vec<(PageRange<Iova>, Ticket)>,
    /// Room that unmaps use again and again.
    pub(crate) scratch: Vec<(Slot, u64)>,
}

impl Table {
    pub(crate) fn new(slots: u32) -> Self {
        let count = u16::try_from(slots).unwrap_or(u16::MAX);
        Self {
            slots: (0..count).map(|_| Slotted::Free).collect(),
            free: (0..count).rev().map(Slot).collect(),
            live: 0,
            turn: 0,
            unfinished: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// True while such operations over `iova` run; `runs` is true while those of a ticket do.
    pub(crate) fn is_unfinished(&mut self, iova: PageRange<Iova>, runs: impl Fn(Ticket) -> bool) -> bool {
        self.unfinished.retain(|(_, ticket)| runs(*ticket));
        self.unfinished.iter().any(|(at, _)| at.overlaps(iova))
    }

    /// Slots that are filled.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// Slots that are not.
    pub(crate) fn room(&self) -> usize {
        self.slots.len() - self.live
    }

    pub(crate) fn is_live(&self, slot: Slot) -> bool {
        matches!(self.slots[slot.0 as usize], Slotted::Live { .. })
    }

    pub(crate) fn is_stale(&self, slot: Slot) -> bool {
        matches!(self.slots[slot.0 as usize], Slotted::Stale(_))
    }

    /// The tag and the file of a live slot.
    pub(crate) fn filling(&self, slot: Slot) -> Option<(Tag, &Arc<GuestFile>)> {
        match &self.slots[slot.0 as usize] {
            Slotted::Live { tag, file, .. } => Some((*tag, file)),
            _ => None,
        }
    }

    /// All live slots.
    pub(crate) fn all_live(&self) -> Vec<Slot> {
        (0..self.slots.len() as u16).map(Slot).filter(|slot| self.is_live(*slot)).collect()
    }

    /// Reserves the slot that stands behind a stale translation, to fill it again.
    pub(crate) fn claim(&mut self, slot: Slot) {
        self.slots[slot.0 as usize] = Slotted::Claimed;
    }

    /// Reserves a slot for a translation that nobody knows yet; the translation that has to go for it goes.
    pub(crate) fn take(&mut self, view: &mut View) -> Option<Slot> {
        if let Some(slot) = self.free.pop() {
            self.claim(slot);
            return Some(slot);
        }
        for _ in 0..self.slots.len() {
            let slot = Slot(self.turn as u16);
            self.turn = (self.turn + 1) % self.slots.len();
            if let Slotted::Stale(start) = self.slots[slot.0 as usize] {
                view.remove(start);
                self.claim(slot);
                return Some(slot);
            }
        }
        None
    }

    /// The slot is filled.
    pub(crate) fn fill(&mut self, slot: Slot, start: Iova, tag: Tag, file: &Arc<GuestFile>) {
        self.slots[slot.0 as usize] = Slotted::Live { start, tag, file: Arc::clone(file) };
        self.live += 1;
    }

    /// The slot is empty, and the devices still know it as what it was.
    pub(crate) fn empty(&mut self, slot: Slot) {
        let state = &mut self.slots[slot.0 as usize];
        if let Slotted::Live { start, .. } = state {
            *state = Slotted::Stale(*start);
            self.live -= 1;
        }
    }

    /// The slot is not filled after all: back to what the devices know it as, if they do.
    pub(crate) fn unclaim(&mut self, slot: Slot, known: Option<Iova>) {
        match known {
            Some(start) => self.slots[slot.0 as usize] = Slotted::Stale(start),
            None => self.release(slot),
        }
    }

    /// The devices know the slot no more.
    pub(crate) fn release(&mut self, slot: Slot) {
        self.slots[slot.0 as usize] = Slotted::Free;
        self.free.push(slot);
    }
}
