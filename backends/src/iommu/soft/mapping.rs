//! Maps of a soft domain, in three steps: plan, fill, publish; or roll back.
//!
//! A piece whose translation the devices still have (same IOVA, same pages) is filled into its old slot, and the view
//! does not change: this is the common case, a page that is mapped again after a conversion. Any other piece gets a
//! slot without a translation, which is published only once all pieces are filled.

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

/// The arguments of [`crate::Domain::map`].
pub(super) struct MapRequest<'a> {
    pub iova: PageRange<Iova>,
    pub piece: u64,
    pub file: &'a Arc<GuestFile>,
    pub offset: Offset,
    pub writable: bool,
}

/// One mapping to be made.
struct Piece {
    translation: Translation,
    /// The offset of its pages in the file.
    offset: u64,
    /// True if the devices have this translation already, from an earlier mapping.
    known: bool,
}

impl MapRequest<'_> {
    /// Checks the arguments.
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

/// The name of the call in an error.
const CALL: &str = "soft mapping";

/// Returns the remedy for a map that failed with `errno`, to be appended to the error.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::NOMEM => "; the host is out of memory, or this user may pin no more of it (RLIMIT_MEMLOCK)",
        Errno::NOSPC => "; the ring has no free slot: map larger pieces, or fewer of them",
        Errno::EXIST => "; something is mapped there already: unmap it first",
        Errno::FAULT => {
            "; the pages cannot be pinned for writing: open the file O_RDWR, and map shared pages inside it only"
        }
        Errno::TOOBIG => "; a piece is longer than 1 GiB: map in smaller pieces",
        Errno::ACCESS => "; the file is read-only: map it read-only, or open it O_RDWR",
        _ => "",
    }
}

impl SoftDomain {
    /// Makes all mappings of `request`, or none.
    pub(super) fn make(&self, request: &MapRequest<'_>) -> Result<()> {
        let refused = |errno| self.cannot_map(request.iova, errno);
        request.check().map_err(refused)?;
        let _serialised = lock(&self.map_lock);
        let plan = self.plan(request).map_err(refused)?;
        for (filled, Piece { translation, offset, .. }) in plan.iter().enumerate() {
            match self.ring.fill(translation.slot, request.file, *offset, translation.iova.len()) {
                Ok(tag) => self.table().fill(translation.slot, translation.iova.start(), tag, request.file),
                Err(failed) => {
                    return Err(match self.roll_back(&plan, filled) {
                        Ok(()) => refused(failed.errno),
                        Err(rollback) => Error::HalfMapped {
                            iova: request.iova,
                            source: Failed::new(CALL, failed.errno),
                            rollback: rollback.errno,
                            remedy: remedy(failed.errno),
                        },
                    });
                }
            }
        }
        self.publish(&plan);
        Ok(())
    }

    /// Finds a slot for every piece. Afterwards all of these slots are claimed, and no device has an old translation of
    /// an IOVA that gets a new one.
    fn plan(&self, request: &MapRequest<'_>) -> Result<Vec<Piece>, Errno> {
        let base = request.file.address(request.offset.0).map_err(|failed| failed.errno)?;
        let count = usize::try_from(pieces::count(request.iova, request.piece)).unwrap_or(usize::MAX);
        let mut plan = Vec::with_capacity(count.min(uring::MAX_SLOTS as usize));
        let mut table = self.table();
        let view = read(&self.view);
        if view.overlapping(request.iova).any(|t| table.is_live(t.slot)) {
            return Err(Errno::EXIST);
        }
        if count > table.room() {
            return Err(Errno::NOSPC);
        }
        for iova in pieces::grid(request.iova, request.piece) {
            let into = iova.start().0 - request.iova.start().0;
            let slot = Slot(u16::MAX);
            let new = Translation { iova, address: base + into, writable: request.writable, slot };
            // Equal except for the slot: also `writable`, which only the translation enforces.
            let known = view.find(iova.start()).filter(|old| Translation { slot, ..**old } == new);
            let translation = *known.unwrap_or(&new);
            plan.push(Piece { translation, offset: request.offset.0 + into, known: known.is_some() });
        }
        drop(view);
        plan.iter().filter(|piece| piece.known).for_each(|piece| table.claim(piece.translation.slot));
        if plan.iter().any(|piece| !piece.known) {
            self.make_room(&mut table, request.iova, &mut plan);
        }
        Ok(plan)
    }

    /// Removes the stale translations over `iova`, and claims a slot for every piece without a translation. The view is
    /// locked for writing, so no operation with an old translation is being submitted.
    fn make_room(&self, table: &mut Table, iova: PageRange<Iova>, plan: &mut [Piece]) {
        let mut view = write(&self.view);
        let stale = view.overlapping(iova).filter(|t| table.is_stale(t.slot));
        let stale: Vec<(Iova, Slot)> = stale.map(|t| (t.iova.start(), t.slot)).collect();
        for (start, slot) in stale {
            view.remove(start);
            table.make_free(slot);
        }
        for piece in plan.iter_mut().filter(|piece| !piece.known) {
            // There is always one: the count was checked against the number of slots that are not filled.
            if let Some(slot) = table.take(&mut view) {
                piece.translation.slot = slot;
            }
        }
    }

    /// Adds the translations of the pieces to the view.
    fn publish(&self, pieces: &[Piece]) {
        if pieces.iter().any(|piece| !piece.known) {
            let mut view = write(&self.view);
            pieces.iter().filter(|piece| !piece.known).for_each(|piece| view.insert(piece.translation));
        }
    }

    /// Rolls the first `filled` pieces of a failed map back. `Ok` if no part of it remains mapped or in flight. Pieces
    /// that could not be emptied are published, so that an unmap finds them.
    fn roll_back(&self, plan: &[Piece], filled: usize) -> Result<(), Failed> {
        let mut table = self.table();
        let (filled, claimed) = plan.split_at(filled);
        let slot = |piece: &Piece| piece.translation.slot;
        let (emptied, failed) = self.empty(filled.iter().map(slot));
        let (emptied, remaining) = filled.split_at(emptied);
        let in_flight = self.settle(&mut table, emptied.iter().map(slot), false);
        if let (Some(ticket), Some(first), Some(last)) = (in_flight, emptied.first(), emptied.last()) {
            let (first, last) = (first.translation.iova, last.translation.iova);
            table.unfinished.extend(PageRange::between(first.start(), last.end()).map(|iova| (iova, ticket)));
        }
        emptied.iter().filter(|piece| !piece.known).for_each(|piece| table.make_free(slot(piece)));
        for piece in claimed {
            table.unclaim(slot(piece), piece.known.then_some(piece.translation.iova.start()));
        }
        self.publish(remaining);
        match failed {
            Some(errno) => Err(Failed::new("IORING_REGISTER_BUFFERS_UPDATE", errno)),
            // A device has started a DMA through a translation that it had from before.
            None if in_flight.is_some() => {
                Err(Failed::new("IORING_REGISTER_BUFFERS_UPDATE", Errno::INPROGRESS))
            }
            None => Ok(()),
        }
    }

    fn cannot_map(&self, iova: PageRange<Iova>, errno: Errno) -> Error {
        match (errno, self.memlock) {
            (Errno::NOMEM, Some(limit)) => Error::Memlock { iova, need: iova.len(), limit },
            _ => Error::Map { iova, source: Failed::new(CALL, errno), remedy: remedy(errno) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::Unmap;

    #[test]
    fn failed_map_with_dma_in_flight_is_half_mapped() {
        let domain = SoftDomain::with_slots(8).unwrap();
        let device = domain.device("soft:0").unwrap();
        let file = Arc::new(GuestFile::memfd("mapping", 2 * PAGE).unwrap());
        let iova = PageRange::<Iova>::new(16 * PAGE, 2 * PAGE).unwrap();
        let request = MapRequest { iova, piece: PAGE, file: &file, offset: Offset(0), writable: true };
        // The device has translations of both pages from an earlier mapping.
        domain.make(&request).unwrap();
        let _ = crate::Domain::unmap(&*domain, iova);
        let fill_first = || {
            let plan = domain.plan(&request).unwrap();
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
        // An operation over the second page is in flight too. Its ticket is not reported either, because the unmap
        // fails.
        let second = PageRange::new(iova.start().0 + PAGE, PAGE).unwrap();
        domain.make(&MapRequest { iova: second, offset: Offset(PAGE), ..request }).unwrap();
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
