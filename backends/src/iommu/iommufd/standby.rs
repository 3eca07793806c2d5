//! Two IOASes that map the same: the devices are in one, the other is made ready while nobody looks.
//!
//! Every map and unmap goes to both. To *replace* is to take ranges out of the idle one (unmap each mapping that
//! holds something of them, copy back what is left of it), to move the devices there, and then to do the same to
//! the one that is idle now. Pages are pinned once, for both; they are let go of when both have let them go.
//!
//! A map holds no lock that an unmap needs. A replace is alone: it waits for the maps and unmaps under way, and
//! those that come wait for it, as does an attach. A detach waits for a switch at most.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use passgate_bindings::iommufd::{DeviceId, IoasId, Iommufd};
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::Cdev;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::areas::bytes_in;
use super::seats::Seats;
use super::side::Side;
use crate::iommu::{Unmap, pieces};
use crate::{Error, Result};

/// The two, and the devices.
#[derive(Debug)]
pub(super) struct Standby {
    sides: [Side; 2],
    /// Which of them the devices are in.
    active: RwLock<usize>,
    seats: Seats,
}

impl Standby {
    pub(super) fn new(ioases: [IoasId; 2]) -> Self {
        Self { sides: ioases.map(Side::new), active: RwLock::new(0), seats: Seats::default() }
    }

    /// Both, that of the devices first.
    pub(super) fn ioases(&self) -> [IoasId; 2] {
        let active = *self.active();
        [self.sides[active].ioas, self.sides[1 - active].ioas]
    }

    pub(super) fn add(&self, cdev: &Arc<Cdev>, id: DeviceId) {
        self.seats.add(cdev, id);
    }

    pub(super) fn attach(&self, iommufd: &Iommufd, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        let active = self.active();
        self.seats.attach(iommufd, cdev, [self.sides[0].ioas, self.sides[1].ioas], *active)
    }

    pub(super) fn detach(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        self.seats.detach(cdev)
    }

    /// Maps by `one` in the IOAS that it is given, and copies that into the other.
    pub(super) fn map(
        &self,
        iommufd: &Iommufd,
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
        pieces::map(iova, piece, offset, in_used, |made| back(iommufd, used, made))?;
        let in_idle = |piece, _| idle.copy(iommufd, used, piece, writable);
        pieces::map(iova, piece, offset, in_idle, |made| back(iommufd, idle, made)).map_err(|error| {
            match (error, used.unmap(iommufd, iova)) {
                (Error::Map { source, .. } | Error::HalfMapped { source, .. }, Err(errno)) => {
                    Error::HalfMapped { iova, source: Failed::new(source.call, errno) }
                }
                (error, _) => error,
            }
        })
    }

    /// Gone is what is gone from both. A failure says nothing of what it removed before: it may be left in one.
    pub(super) fn unmap(&self, iommufd: &Iommufd, iova: PageRange<Iova>) -> Unmap {
        let active = self.active();
        let sides = [&self.sides[*active], &self.sides[1 - *active]];
        if sides.iter().any(|side| side.would_cut(iova)) {
            return Unmap::Failed { errno: Errno::NOENT, bytes: 0 };
        }
        let bytes = self.bytes_in(iova);
        match sides.iter().try_for_each(|side| side.unmap(iommufd, iova)) {
            Ok(()) => Unmap::Gone { bytes },
            Err(errno) => Unmap::Failed { errno, bytes: 0 },
        }
    }

    pub(super) fn replace(&self, iommufd: &Iommufd, gone: &[PageRange<Iova>]) -> Unmap {
        if !gone.is_sorted_by(|one, next| one.end() <= next.start()) {
            return Unmap::Failed { errno: Errno::INVAL, bytes: 0 };
        }
        let mut active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        // What an earlier call that failed has left in one of them counts: it is gone only after this.
        let bytes = gone.iter().map(|range| self.bytes_in(*range)).sum();
        match self.swap(iommufd, gone, &mut active) {
            Ok(()) => Unmap::Gone { bytes },
            Err(errno) => Unmap::Failed { errno, bytes: 0 },
        }
    }

    /// Whichever step fails, the next replace begins by making the two alike again.
    fn swap(&self, iommufd: &Iommufd, gone: &[PageRange<Iova>], active: &mut usize) -> Result<(), Errno> {
        let (used, idle) = (&self.sides[*active], &self.sides[1 - *active]);
        idle.like(iommufd, used)?;
        idle.take_out(iommufd, gone, used)?;
        self.seats.switch(1 - *active).map_err(|failed| {
            log::warn!("a device did not move to the other page table: {failed}");
            failed.errno
        })?;
        *active = 1 - *active;
        used.take_out(iommufd, gone, idle)
    }

    /// Destroys everything. No device is attached any more.
    pub(super) fn close(&self, iommufd: &Iommufd) {
        self.seats.close(iommufd);
        self.sides.iter().for_each(|side| super::destroy(iommufd, side.ioas));
    }

    fn bytes_in(&self, iova: PageRange<Iova>) -> u64 {
        bytes_in([&self.sides[0].areas(), &self.sides[1].areas()], iova)
    }

    fn active(&self) -> RwLockReadGuard<'_, usize> {
        self.active.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes `made` back in one IOAS.
fn back(iommufd: &Iommufd, side: &Side, made: PageRange<Iova>) -> Unmap {
    match side.unmap(iommufd, made) {
        Ok(()) => Unmap::Gone { bytes: made.len() },
        Err(errno) => Unmap::Failed { errno, bytes: 0 },
    }
}
