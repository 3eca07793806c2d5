//! Two IOASes that map the same: the devices are in one, the other is made ready while nobody looks.
//!
//! Every map and unmap goes to both. To *replace* is to take ranges out of the idle one (unmap each mapping that
//! holds something of them, copy back what is left of it), to move the devices there, and then to do the same to
//! the one that is idle now. Pages are pinned once, for both; they are let go of when both have let them go.
//!
//! A map holds no lock that an unmap needs. A replace is alone: it waits for the maps and unmaps under way, and
//! those that come wait for it, as does an attach. A detach waits for a switch at most.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use passgate_bindings::iommufd::{DeviceId, IoasId};
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::Cdev;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::areas::{Areas, parts_in};
use super::kernel::{Kernel, Movable};
use super::seats::Seats;
use super::side::Side;
use crate::iommu::{Unmap, pieces};
use crate::{Error, Result};

/// The two, and the devices.
#[derive(Debug)]
pub(super) struct Standby<D = Cdev> {
    sides: [Side; 2],
    /// Which of them the devices are in.
    active: RwLock<usize>,
    /// What calls that failed were to take away, whether or not they did: who asks for it again is told of all of
    /// its bytes then, because nobody was told of them before.
    owed: Mutex<Areas>,
    seats: Seats<D>,
}

impl<D: Movable> Standby<D> {
    pub(super) fn new(ioases: [IoasId; 2]) -> Self {
        Self {
            sides: ioases.map(Side::new),
            active: RwLock::new(0),
            owed: Mutex::default(),
            seats: Seats::new(),
        }
    }

    /// Both, that of the devices first.
    pub(super) fn ioases(&self) -> [IoasId; 2] {
        let active = *self.active();
        [self.sides[active].ioas, self.sides[1 - active].ioas]
    }

    pub(super) fn add(&self, cdev: &Arc<D>, id: DeviceId) {
        self.seats.add(cdev, id);
    }

    pub(super) fn attach(&self, kernel: &impl Kernel, cdev: &Arc<D>) -> Result<(), Failed> {
        let active = self.active();
        self.seats.attach(kernel, cdev, [self.sides[0].ioas, self.sides[1].ioas], *active)
    }

    pub(super) fn detach(&self, cdev: &Arc<D>) -> Result<(), Failed> {
        self.seats.detach(cdev)
    }

    pub(super) fn is_attached(&self, cdev: &Arc<D>) -> bool {
        self.seats.is_attached(cdev)
    }

    /// Maps by `one` in the IOAS that it is given, and copies that into the other.
    pub(super) fn map(
        &self,
        kernel: &impl Kernel,
        (iova, piece): (PageRange<Iova>, u64),
        offset: Offset,
        writable: bool,
        one: impl Fn(IoasId, PageRange<Iova>, Offset) -> Result<(), Failed>,
    ) -> Result<()> {
        let active = self.active();
        let (used, idle) = (&self.sides[*active], &self.sides[1 - *active]);
        let in_used = |piece, from| {
            one(used.ioas, piece, from)?;
            used.areas().insert(piece, writable);
            Ok(())
        };
        pieces::map(iova, piece, offset, in_used, |made| back(kernel, used, made))?;
        // It is nobody's debt any more: it is mapped anew.
        self.owed().strike(iova);
        let in_idle = |piece, _| idle.copy(kernel, used, piece, writable);
        pieces::map(iova, piece, offset, in_idle, |made| back(kernel, idle, made)).map_err(|error| {
            match (error, used.unmap(kernel, iova)) {
                (Error::Map { source, .. } | Error::HalfMapped { source, .. }, Err(errno)) => {
                    Error::HalfMapped { iova, source: Failed::new(source.call, errno) }
                }
                (error, _) => error,
            }
        })
    }

    /// Gone is what is gone from both. A failure says nothing of what it removed before: it may be left in one.
    pub(super) fn unmap(&self, kernel: &impl Kernel, iova: PageRange<Iova>) -> Unmap {
        let active = self.active();
        let sides = [&self.sides[*active], &self.sides[1 - *active]];
        if sides.iter().any(|side| side.would_cut(iova)) {
            return Unmap::Failed { errno: Errno::NOENT, bytes: 0 };
        }
        self.told(&[iova], || sides.iter().try_for_each(|side| side.unmap(kernel, iova)))
    }

    pub(super) fn replace(&self, kernel: &impl Kernel, gone: &[PageRange<Iova>]) -> Unmap {
        if !gone.is_sorted_by(|one, next| one.end() <= next.start()) {
            return Unmap::Failed { errno: Errno::INVAL, bytes: 0 };
        }
        let mut active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        self.told(gone, || self.swap(kernel, gone, &mut active))
    }

    /// Takes `ranges` away by `take`, and says how many bytes were there, in either table or owed.
    fn told(&self, ranges: &[PageRange<Iova>], take: impl FnOnce() -> Result<(), Errno>) -> Unmap {
        let parts: Vec<_> = ranges.iter().flat_map(|range| self.parts_in(*range)).collect();
        let went = take();
        let mut owed = self.owed();
        ranges.iter().for_each(|range| owed.strike(*range));
        match went {
            Ok(()) => Unmap::Gone { bytes: parts.into_iter().map(PageRange::len).sum() },
            Err(errno) => {
                parts.into_iter().for_each(|part| owed.insert(part, false));
                Unmap::Failed { errno, bytes: 0 }
            }
        }
    }

    /// Whichever step fails, the next replace begins by making the two alike again.
    fn swap(&self, kernel: &impl Kernel, gone: &[PageRange<Iova>], active: &mut usize) -> Result<(), Errno> {
        let (used, idle) = (&self.sides[*active], &self.sides[1 - *active]);
        idle.like(kernel, used)?;
        idle.take_out(kernel, gone, used)?;
        self.seats.switch(1 - *active).map_err(|failed| {
            log::warn!("a device did not move to the other page table: {failed}");
            failed.errno
        })?;
        *active = 1 - *active;
        used.take_out(kernel, gone, idle)
    }

    /// Destroys the devices' tables; the IOASes can go after that. No device is attached any more.
    pub(super) fn close(&self, kernel: &impl Kernel) {
        self.seats.close(kernel);
    }

    fn parts_in(&self, iova: PageRange<Iova>) -> Vec<PageRange<Iova>> {
        parts_in(&[&self.sides[0].areas(), &self.sides[1].areas(), &self.owed()], iova)
    }

    fn owed(&self) -> MutexGuard<'_, Areas> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn active(&self) -> RwLockReadGuard<'_, usize> {
        self.active.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes `made` back in one IOAS.
fn back(kernel: &impl Kernel, side: &Side, made: PageRange<Iova>) -> Unmap {
    match side.unmap(kernel, made) {
        Ok(()) => Unmap::Gone { bytes: made.len() },
        Err(errno) => Unmap::Failed { errno, bytes: 0 },
    }
}

#[cfg(test)]
mod tests;
