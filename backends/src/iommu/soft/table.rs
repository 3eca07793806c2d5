//! The slot table of a soft domain: which slots are mapped, and which may be reused.
//!
//! A slot stays assigned to its IOVA after an unmap (`Stale`), so that the devices' old translation leads to an empty
//! slot and not to other pages. It is reused only if no free slot remains, round-robin, and only together with the
//! removal of its translation.

use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::uring::{Slot, Tag};
use passgate_bindings::{Iova, PageRange};

use super::view::View;
use crate::iommu::Ticket;

/// The state of a slot.
#[derive(Debug)]
pub(crate) enum SlotState {
    /// Empty, without a translation.
    Free,
    /// Empty, with a translation that begins at this IOVA.
    Stale(Iova),
    /// About to be filled.
    Claimed,
    /// Filled, with a translation or about to get one.
    Live {
        /// The first IOVA of its translation.
        start: Iova,
        /// The tag that the kernel releases once nothing uses this buffer any more.
        tag: Tag,
        /// The file with its pages.
        file: Arc<GuestFile>,
    },
}

/// The slots of a domain.
#[derive(Debug)]
pub(crate) struct Table {
    slots: Vec<SlotState>,
    free: Vec<Slot>,
    /// The number of filled slots.
    live: usize,
    /// The slot at which the next search for a stale slot begins.
    next_reused: usize,
    /// Ranges over which operations may be in flight whose ticket was not reported.
    pub(crate) unfinished: Vec<(PageRange<Iova>, Ticket)>,
    /// A buffer that unmaps reuse, with the slots to empty and their lengths in bytes.
    pub(crate) scratch: Vec<(Slot, u64)>,
}

impl Table {
    pub(crate) fn new(slots: u32) -> Self {
        let count = u16::try_from(slots).unwrap_or(u16::MAX);
        Self {
            slots: (0..count).map(|_| SlotState::Free).collect(),
            free: (0..count).rev().map(Slot).collect(),
            live: 0,
            next_reused: 0,
            unfinished: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Returns true while unreported operations over `iova` are in flight; `runs` returns true while those of a ticket
    /// are.
    pub(crate) fn is_unfinished(&mut self, iova: PageRange<Iova>, runs: impl Fn(Ticket) -> bool) -> bool {
        self.unfinished.retain(|(_, ticket)| runs(*ticket));
        self.unfinished.iter().any(|(at, _)| at.overlaps(iova))
    }

    /// Returns the number of filled slots.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// Returns the number of slots that are not filled.
    pub(crate) fn room(&self) -> usize {
        self.slots.len() - self.live
    }

    pub(crate) fn is_live(&self, slot: Slot) -> bool {
        matches!(self.slots[slot.0 as usize], SlotState::Live { .. })
    }

    pub(crate) fn is_stale(&self, slot: Slot) -> bool {
        matches!(self.slots[slot.0 as usize], SlotState::Stale(_))
    }

    /// Returns the tag and the file of a live slot.
    pub(crate) fn filling(&self, slot: Slot) -> Option<(Tag, &Arc<GuestFile>)> {
        match &self.slots[slot.0 as usize] {
            SlotState::Live { tag, file, .. } => Some((*tag, file)),
            _ => None,
        }
    }

    /// Returns all live slots.
    pub(crate) fn all_live(&self) -> Vec<Slot> {
        (0..self.slots.len() as u16).map(Slot).filter(|slot| self.is_live(*slot)).collect()
    }

    /// Reserves the slot of a stale translation, to fill it again.
    pub(crate) fn claim(&mut self, slot: Slot) {
        self.slots[slot.0 as usize] = SlotState::Claimed;
    }

    /// Reserves a slot for a new translation: a free one, or else a stale one, whose translation is removed from
    /// `view`. None if there is neither.
    pub(crate) fn take(&mut self, view: &mut View) -> Option<Slot> {
        if let Some(slot) = self.free.pop() {
            self.claim(slot);
            return Some(slot);
        }
        for _ in 0..self.slots.len() {
            let slot = Slot(self.next_reused as u16);
            self.next_reused = (self.next_reused + 1) % self.slots.len();
            if let SlotState::Stale(start) = self.slots[slot.0 as usize] {
                view.remove(start);
                self.claim(slot);
                return Some(slot);
            }
        }
        None
    }

    /// Records a slot as filled.
    pub(crate) fn fill(&mut self, slot: Slot, start: Iova, tag: Tag, file: &Arc<GuestFile>) {
        self.slots[slot.0 as usize] = SlotState::Live { start, tag, file: Arc::clone(file) };
        self.live += 1;
    }

    /// Records a live slot as emptied. Its translation stays in the view.
    pub(crate) fn mark_stale(&mut self, slot: Slot) {
        let state = &mut self.slots[slot.0 as usize];
        if let SlotState::Live { start, .. } = state {
            *state = SlotState::Stale(*start);
            self.live -= 1;
        }
    }

    /// Undoes a claim: the slot is stale again if it has a translation that begins at `known`, else free.
    pub(crate) fn unclaim(&mut self, slot: Slot, known: Option<Iova>) {
        match known {
            Some(start) => self.slots[slot.0 as usize] = SlotState::Stale(start),
            None => self.make_free(slot),
        }
    }

    /// Records a slot as empty and without a translation.
    pub(crate) fn make_free(&mut self, slot: Slot) {
        self.slots[slot.0 as usize] = SlotState::Free;
        self.free.push(slot);
    }
}
