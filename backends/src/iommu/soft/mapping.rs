//! How a soft domain makes mappings: plan, fill, publish; or take all of it back.
//!
//! A piece that the devices still know from before (same IOVA, same pages) is filled into its old slot, and the
//! view is not touched: that is the common case, a page that comes back from a conversion. Any other piece gets a
//! slot that no device knows; it is published only once all are filled.

use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::uring::{self, Slot};
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::table::Table;
use super::view::Translation;
use super::{SoftDomain, lock, read, write};
use crate::iommu::pieces;
use crate::{Error, Result};

/// What a map is asked for.
pub(super) struct Want<'a> {
    pub iova: PageRange<Iova>,
    pub piece: u64,
    pub file: &'a Arc<GuestFile>,
    pub offset: Offset,
    pub writable: bool,
}

/// One mapping to be made.
struct Piece {
    translation: Translation,
    /// Where its pages begin in the file.
    offset: u64,
    /// Whether the devices know the translation already, from before.
    known: bool,
}

impl Want<'_> {
    /// Whether it can be tried at all.
    fn check(&self) -> Result<(), Errno> {
        let fits = self.offset.0.checked_add(self.iova.len()).is_some_and(|end| end <= self.file.size());
        if self.piece == 0 || !self.piece.is_multiple_of(PAGE) || !fits {
            return Err(Errno::INVAL);
        }
        if self.piece.min(self.iova.len()) > uring::MAX_SLOT_LEN {
            return Err(Errno::TOOBIG);
        }
        if self.writable && !self.file.writable() {
            return Err(Errno::ACCESS);
        }
        Ok(())
    }
}

impl SoftDomain {
    /// Makes all mappings of `want`, or none.
    pub(super) fn make(&self, want: &Want<'_>) -> Result<()> {
        let refused = |errno| self.cannot_map(want.iova, errno);
        want.check().map_err(refused)?;
        let _maps = lock(&self.maps);
        let plan = self.plan(want).map_err(refused)?;
        for (filled, Piece { translation, offset, .. }) in plan.iter().enumerate() {
            match self.ring.fill(translation.slot, want.file, *offset, translation.iova.len()) {
                Ok(tag) => self.table().fill(translation.slot, translation.iova.start(), tag, want.file),
                Err(failed) => {
                    return Err(match self.roll_back(&plan, filled) {
                        Ok(()) => refused(failed.errno),
                        Err(source) => Error::HalfMapped { iova: want.iova, source },
                    });
                }
            }
        }
        self.publish(&plan);
        Ok(())
    }

    /// Finds a slot for every piece. Afterwards all of them are claimed, and no device has an old translation of
    /// the IOVAs that get a new one.
    fn plan(&self, want: &Want<'_>) -> Result<Vec<Piece>, Errno> {
        let base = want.file.address(want.offset.0).map_err(|failed| failed.errno)?;
        let count = usize::try_from(pieces::count(want.iova, want.piece)).unwrap_or(usize::MAX);
        let mut plan = Vec::with_capacity(count.min(uring::MAX_SLOTS as usize));
        let mut table = self.table();
        let view = read(&self.view);
        if view.overlapping(want.iova).any(|t| table.is_live(t.slot)) {
            return Err(Errno::EXIST);
        }
        if count > table.room() {
            return Err(Errno::NOSPC);
        }
        for iova in pieces::grid(want.iova, want.piece) {
            let into = iova.start().0 - want.iova.start().0;
            let slot = Slot(u16::MAX);
            let new = Translation { iova, address: base + into, writable: want.writable, slot };
            let known = view.find(iova.start()).filter(|old| Translation { slot, ..**old } == new);
            let translation = *known.unwrap_or(&new);
            plan.push(Piece { translation, offset: want.offset.0 + into, known: known.is_some() });
        }
        drop(view);
        plan.iter().filter(|piece| piece.known).for_each(|piece| table.claim(piece.translation.slot));
        if plan.iter().any(|piece| !piece.known) {
            self.make_room(&mut table, want.iova, &mut plan);
        }
        Ok(plan)
    }

    /// Drops what the devices still believe of `iova`, and gives a slot to every piece that they do not know. The
    /// view is ours alone meanwhile: no operation with an old translation is on its way.
    fn make_room(&self, table: &mut Table, iova: PageRange<Iova>, plan: &mut [Piece]) {
        let mut view = write(&self.view);
        let stale = view.overlapping(iova).filter(|t| table.is_stale(t.slot));
        let stale: Vec<(Iova, Slot)> = stale.map(|t| (t.iova.start(), t.slot)).collect();
        for (start, slot) in stale {
            view.remove(start);
            table.release(slot);
        }
        for piece in plan.iter_mut().filter(|piece| !piece.known) {
            // There is one: the count was checked against the room.
            if let Some(slot) = table.take(&mut view) {
                piece.translation.slot = slot;
            }
        }
    }

    /// Lets the devices see the pieces.
    fn publish(&self, pieces: &[Piece]) {
        if pieces.iter().any(|piece| !piece.known) {
            let mut view = write(&self.view);
            pieces.iter().filter(|piece| !piece.known).for_each(|piece| view.insert(piece.translation));
        }
    }

    /// Takes the first `filled` pieces of a failed map back, and says whether nothing is left of it. What could
    /// not be taken back is published, so that an unmap finds it.
    fn roll_back(&self, plan: &[Piece], filled: usize) -> Result<(), Failed> {
        let mut table = self.table();
        let (filled, claimed) = plan.split_at(filled);
        let slot = |piece: &Piece| piece.translation.slot;
        let (emptied, failed) = self.empty(filled.iter().map(slot));
        let (emptied, left) = filled.split_at(emptied);
        let in_flight = self.settle(&mut table, emptied.iter().map(slot), false);
        if let (Some(ticket), Some(first), Some(last)) = (in_flight, emptied.first(), emptied.last()) {
            let (first, last) = (first.translation.iova, last.translation.iova);
            table.unfinished.extend(PageRange::between(first.start(), last.end()).map(|iova| (iova, ticket)));
        }
        emptied.iter().filter(|piece| !piece.known).for_each(|piece| table.release(slot(piece)));
        for piece in claimed {
            table.unclaim(slot(piece), piece.known.then_some(piece.translation.iova.start()));
        }
        self.publish(left);
        match failed {
            Some(errno) => Err(Failed::new("IORING_REGISTER_BUFFERS_UPDATE", errno)),
            // A device was quick enough to start a DMA.
            None if in_flight.is_some() => {
                Err(Failed::new("IORING_REGISTER_BUFFERS_UPDATE", Errno::INPROGRESS))
            }
            None => Ok(()),
        }
    }

    fn cannot_map(&self, iova: PageRange<Iova>, errno: Errno) -> Error {
        let mend = match (errno, self.memlock) {
            (Errno::NOMEM, Some(limit)) => return Error::Memlock { iova, need: iova.len(), limit },
            (Errno::NOMEM, None) => "; the host is out of memory",
            (Errno::NOSPC, _) => "; the ring has no slot left: map larger pieces, or fewer of them",
            (Errno::EXIST, _) => "; something is mapped there already: unmap it first",
            (Errno::FAULT, _) => {
                "; the pages cannot be pinned for writing: open the file O_RDWR, and map shared pages inside it only"
            }
            (Errno::TOOBIG, _) => "; a piece is longer than 1 GiB: map in smaller pieces",
            (Errno::ACCESS, _) => "; the file is read-only: map it read-only, or open it O_RDWR",
            _ => "",
        };
        Error::Map { iova, source: Failed::new("soft mapping", errno), mend }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::Unmap;

    #[test]
    fn a_map_that_fails_while_a_device_uses_what_it_has_made_is_half_made() {
        let domain = SoftDomain::with_slots(8).unwrap();
        let device = domain.device("soft:0").unwrap();
        let file = Arc::new(GuestFile::memfd("mapping", 2 * PAGE).unwrap());
        let iova = PageRange::<Iova>::new(16 * PAGE, 2 * PAGE).unwrap();
        let want = Want { iova, piece: PAGE, file: &file, offset: Offset(0), writable: true };
        // The device knows both pages from before.
        domain.make(&want).unwrap();
        let _ = crate::Domain::unmap(&*domain, iova);
        let fill_first = || {
            let plan = domain.plan(&want).unwrap();
            let Translation { slot, iova: first, .. } = plan[0].translation;
            let tag = domain.ring.fill(slot, &file, 0, first.len()).unwrap();
            domain.table().fill(slot, first.start(), tag, &file);
            plan
        };
        let plan = fill_first();
        let held = device.hold_write(iova.start(), 8).unwrap();
        let failed = domain.roll_back(&plan, 1).unwrap_err();
        assert_eq!(failed.errno, Errno::INPROGRESS);
        let unmap =
            |pages| crate::Domain::unmap(&*domain, PageRange::new(iova.start().0, pages * PAGE).unwrap());
        assert_eq!(unmap(2), Unmap::Failed { errno: Errno::INPROGRESS, bytes: 0 });
        // Of what else was there another operation is in flight, which is nobody's to wait for either.
        let second = PageRange::new(iova.start().0 + PAGE, PAGE).unwrap();
        domain.make(&Want { iova: second, offset: Offset(PAGE), ..want }).unwrap();
        let other = device.hold_write(second.start(), 8).unwrap();
        assert_eq!(unmap(2), Unmap::Failed { errno: Errno::INPROGRESS, bytes: 0 });
        held.finish(&[0; 8]).unwrap();
        assert_eq!(unmap(2), Unmap::Failed { errno: Errno::INPROGRESS, bytes: 0 });
        other.finish(&[0; 8]).unwrap();
        assert_eq!(unmap(2), Unmap::Gone { bytes: 0 });
        let plan = fill_first();
        domain.roll_back(&plan, 1).unwrap();
        assert_eq!(domain.mappings(), 0);
    }
}
