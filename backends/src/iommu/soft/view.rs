//! The devices' view of a soft domain: the slot behind each IOVA.
//!
//! It corresponds to an IOTLB, and it is deliberately stale: an unmap empties the slot and does not change the
//! translation, so that the next DMA is really issued and it is the kernel that returns `EFAULT`. Only a map changes
//! the view, and only if it maps other pages at the same IOVA or needs the slot elsewhere. A device has the read lock
//! from the look-up until the kernel has taken the operation, so while a map has the write lock no operation with an
//! old translation is yet to be submitted.

use std::collections::BTreeMap;

use passgate_bindings::uring::Slot;
use passgate_bindings::{Iova, PageRange};

/// One translation of the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Translation {
    /// The range of IOVAs.
    pub iova: PageRange<Iova>,
    /// The user-space address of its first byte.
    pub address: u64,
    /// True if the device may write. Registered buffers have no direction, so this is enforced here only.
    pub writable: bool,
    /// The slot with its pages.
    pub slot: Slot,
}

/// The translations, none overlapping another.
#[derive(Debug, Default)]
pub(crate) struct View {
    by_start: BTreeMap<Iova, Translation>,
}

impl View {
    /// Returns the translation that includes `iova`.
    pub(crate) fn find(&self, iova: Iova) -> Option<&Translation> {
        self.by_start.range(..=iova).next_back().map(|(_, t)| t).filter(|t| t.iova.contains(iova))
    }

    /// Returns every translation that shares a page with `iova`, ascending.
    pub(crate) fn overlapping(&self, iova: PageRange<Iova>) -> impl Iterator<Item = &Translation> {
        let first = self.find(iova.start()).map_or(iova.start(), |t| t.iova.start());
        self.by_start.range(first..iova.end()).map(|(_, t)| t)
    }

    pub(crate) fn insert(&mut self, translation: Translation) {
        self.by_start.insert(translation.iova.start(), translation);
    }

    pub(crate) fn remove(&mut self, start: Iova) {
        self.by_start.remove(&start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: u64, pages: u64) -> Translation {
        let iova = PageRange::new(start * 4096, pages * 4096).unwrap();
        Translation { iova, address: 0, writable: true, slot: Slot(start as u16) }
    }

    #[test]
    fn finds_by_any_byte_and_lists_in_order() {
        let mut view = View::default();
        for t in [at(4, 2), at(1, 1), at(8, 8)] {
            view.insert(t);
        }
        assert_eq!(view.find(Iova(4095)), None);
        assert_eq!(view.find(Iova(4 * 4096 + 5000)), Some(&at(4, 2)));
        assert_eq!(view.find(Iova(6 * 4096)), None);
        let over = |view: &View, start: u64, pages: u64| -> Vec<u16> {
            let range = PageRange::new(start * 4096, pages * 4096).unwrap();
            view.overlapping(range).map(|t| t.slot.0).collect()
        };
        assert_eq!(over(&view, 0, 100), [1, 4, 8]);
        assert_eq!(over(&view, 5, 4), [4, 8]);
        assert_eq!(over(&view, 2, 2), [] as [u16; 0]);
        assert_eq!(over(&view, 15, 1), [8]);
        view.remove(Iova(4 * 4096));
        assert_eq!(over(&view, 0, 100), [1, 8]);
    }
}
