//! Two IOASes with the same mappings: the devices are attached to the active one, while the idle one can be changed.
//!
//! Every map and unmap is made in both. A *replace* removes ranges from the idle IOAS (it unmaps each mapping that
//! overlaps one of them, and copies the rest of it back), moves the devices there, and then removes the ranges from the
//! IOAS that is idle now. Pages are pinned once for both, and unpinned when neither maps them.
//!
//! Locking: maps and unmaps run in parallel. A replace is exclusive: it waits for the maps and unmaps in progress, and
//! later ones wait for it, as does an attach. A detach waits at most for a switch of the devices.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use passgate_bindings::iommufd::{DeviceId, IoasId};
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::Cdev;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::areas::{Areas, parts_in};
use super::attachments::Attachments;
use super::kernel::{Kernel, Movable};
use super::tracked_ioas::TrackedIoas;
use crate::iommu::{Unmap, pieces};
use crate::{Error, Result};

/// The two IOASes, and the devices.
#[derive(Debug)]
pub(super) struct Standby<D = Cdev> {
    tracked: [TrackedIoas; 2],
    /// The index of the IOAS that the devices are attached to.
    active: RwLock<usize>,
    /// The ranges that failed calls were to remove, whether or not they did. Their bytes have been reported by no call,
    /// so the next call over them that succeeds counts all of them.
    unreported: Mutex<Areas>,
    devices: Attachments<D>,
}

impl<D: Movable> Standby<D> {
    pub(super) fn new(ioases: [IoasId; 2]) -> Self {
        Self {
            tracked: ioases.map(TrackedIoas::new),
            active: RwLock::new(0),
            unreported: Mutex::default(),
            devices: Attachments::new(),
        }
    }

    /// Returns the ids of both, the active one first.
    pub(super) fn ioases(&self) -> [IoasId; 2] {
        let active = *self.active();
        [self.tracked[active].ioas, self.tracked[1 - active].ioas]
    }

    pub(super) fn add(&self, cdev: &Arc<D>, id: DeviceId) {
        self.devices.add(cdev, id);
    }

    pub(super) fn attach(&self, kernel: &impl Kernel, cdev: &Arc<D>) -> Result<(), Failed> {
        let active = self.active();
        self.devices.attach(kernel, cdev, [self.tracked[0].ioas, self.tracked[1].ioas], *active)
    }

    pub(super) fn detach(&self, cdev: &Arc<D>) -> Result<(), Failed> {
        self.devices.detach(cdev)
    }

    pub(super) fn is_attached(&self, cdev: &Arc<D>) -> bool {
        self.devices.is_attached(cdev)
    }

    /// Maps in the active IOAS by calls of `one`, and copies the mappings into the idle one.
    pub(super) fn map(
        &self,
        kernel: &impl Kernel,
        (iova, piece): (PageRange<Iova>, u64),
        offset: Offset,
        writable: bool,
        one: impl Fn(IoasId, PageRange<Iova>, Offset) -> Result<(), Failed>,
    ) -> Result<()> {
        let active = self.active();
        let (used, idle) = (&self.tracked[*active], &self.tracked[1 - *active]);
        let in_used = |piece, from| {
            one(used.ioas, piece, from)?;
            used.areas().insert(piece, writable);
            Ok(())
        };
        pieces::map(iova, piece, offset, in_used, |made| undo(kernel, used, made))?;
        // The range is mapped again, so that its next unmap counts these bytes by the records.
        self.unreported().remove_range(iova);
        let in_idle = |piece, _| idle.copy(kernel, used, piece, writable);
        pieces::map(iova, piece, offset, in_idle, |made| undo(kernel, idle, made)).map_err(|error| {
            match (error, used.unmap(kernel, iova)) {
                (
                    Error::Map { source, remedy, .. } | Error::HalfMapped { source, remedy, .. },
                    Err(rollback),
                ) => Error::HalfMapped { iova, source, rollback, remedy },
                (error, _) => error,
            }
        })
    }

    /// Unmaps in both IOASes. After a failure the byte count is 0, because the range may still be mapped in one of
    /// them.
    pub(super) fn unmap(&self, kernel: &impl Kernel, iova: PageRange<Iova>) -> Unmap {
        let active = self.active();
        let tracked = [&self.tracked[*active], &self.tracked[1 - *active]];
        if tracked.iter().any(|ioas| ioas.would_cut(iova)) {
            return Unmap::Failed { errno: Errno::NOENT, bytes: 0 };
        }
        self.count_removed(&[iova], || tracked.iter().try_for_each(|ioas| ioas.unmap(kernel, iova)))
    }

    pub(super) fn replace(&self, kernel: &impl Kernel, gone: &[PageRange<Iova>]) -> Unmap {
        if !gone.is_sorted_by(|one, next| one.end() <= next.start()) {
            return Unmap::Failed { errno: Errno::INVAL, bytes: 0 };
        }
        let mut active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        self.count_removed(gone, || self.swap(kernel, gone, &mut active))
    }

    /// Removes `ranges` by `remove`, and returns the number of bytes that were mapped there in either IOAS or
    /// unreported.
    fn count_removed(&self, ranges: &[PageRange<Iova>], remove: impl FnOnce() -> Result<(), Errno>) -> Unmap {
        // Before the removal: afterwards the records no longer have the ranges.
        let parts: Vec<_> = ranges.iter().flat_map(|range| self.parts_in(*range)).collect();
        let removed = remove();
        let mut unreported = self.unreported();
        ranges.iter().for_each(|range| unreported.remove_range(*range));
        match removed {
            Ok(()) => Unmap::Gone { bytes: parts.into_iter().map(PageRange::len).sum() },
            Err(errno) => {
                parts.into_iter().for_each(|part| unreported.insert(part, false));
                Unmap::Failed { errno, bytes: 0 }
            }
        }
    }

    /// Removes the ranges from the idle IOAS, moves the devices there, and removes the ranges from the other. After a
    /// failure of any step the next replace begins by making both IOASes the same again.
    fn swap(&self, kernel: &impl Kernel, gone: &[PageRange<Iova>], active: &mut usize) -> Result<(), Errno> {
        let (used, idle) = (&self.tracked[*active], &self.tracked[1 - *active]);
        idle.mirror(kernel, used)?;
        idle.take_out(kernel, gone, used)?;
        self.devices.switch(1 - *active).map_err(|failed| {
            log::warn!("a device did not move to the other page table: {failed}");
            failed.errno
        })?;
        // Before the second removal, which may fail: the devices have moved by now.
        *active = 1 - *active;
        used.take_out(kernel, gone, idle)
    }

    /// Destroys the HWPTs of the devices, after which the IOASes can be destroyed. No device may be attached any more.
    pub(super) fn close(&self, kernel: &impl Kernel) {
        self.devices.close(kernel);
    }

    fn parts_in(&self, iova: PageRange<Iova>) -> Vec<PageRange<Iova>> {
        parts_in(&[&self.tracked[0].areas(), &self.tracked[1].areas(), &self.unreported()], iova)
    }

    fn unreported(&self) -> MutexGuard<'_, Areas> {
        self.unreported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn active(&self) -> RwLockReadGuard<'_, usize> {
        self.active.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes `made`, the part of a failed map that was made, from one IOAS.
fn undo(kernel: &impl Kernel, ioas: &TrackedIoas, made: PageRange<Iova>) -> Unmap {
    match ioas.unmap(kernel, made) {
        Ok(()) => Unmap::Gone { bytes: made.len() },
        Err(errno) => Unmap::Failed { errno, bytes: 0 },
    }
}

#[cfg(test)]
mod tests;
