//! One of the two IOASes of a standby domain, with the book of what it maps.

use std::sync::{Mutex, MutexGuard, PoisonError};

use passgate_bindings::iommufd::{IoasId, Iommufd};
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::areas::{Area, Areas, remainders};

/// An IOAS and its book. The lock is never held for a kernel call.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) ioas: IoasId,
    areas: Mutex<Areas>,
}

impl Side {
    pub(super) fn new(ioas: IoasId) -> Self {
        Self { ioas, areas: Mutex::default() }
    }

    pub(super) fn areas(&self) -> MutexGuard<'_, Areas> {
        // No holder can panic between two writes that belong together.
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps here, as one mapping, what `from` maps at `iova`.
    pub(super) fn copy(
        &self,
        iommufd: &Iommufd,
        from: &Side,
        iova: PageRange<Iova>,
        writable: bool,
    ) -> Result<(), Failed> {
        iommufd.copy((from.ioas, iova), (self.ioas, iova.start()), writable)?;
        self.areas().insert(iova, writable);
        Ok(())
    }

    /// Whether an unmap of `iova` would cut a mapping.
    pub(super) fn would_cut(&self, iova: PageRange<Iova>) -> bool {
        self.areas().overlapping(iova).iter().any(|area| !iova.covers(area.iova))
    }

    /// Unmaps what lies in `iova`; nothing sticks out of it. `Ok` says that all of it is gone.
    pub(super) fn unmap(&self, iommufd: &Iommufd, iova: PageRange<Iova>) -> Result<(), Errno> {
        let areas = self.areas().overlapping(iova);
        if areas.is_empty() {
            return Ok(());
        }
        if areas.iter().any(|area| area.doubt) {
            return areas.iter().try_for_each(|area| self.unmap_one(iommufd, area));
        }
        let expected: u64 = areas.iter().map(|area| area.iova.len()).sum();
        match iommufd.unmap(self.ioas, iova) {
            Ok(bytes) if bytes == expected => {
                let mut book = self.areas();
                areas.iter().for_each(|area| book.remove(area));
                Ok(())
            }
            // The kernel and the book do not agree: nothing that the book says is certain here any more.
            Ok(_) => Err(self.doubt(iova, Errno::IO)),
            Err(failed) => Err(self.doubt(iova, failed.errno)),
        }
    }

    /// Unmaps one mapping, which may be gone already: asked for exactly its range the kernel finds all or nothing.
    fn unmap_one(&self, iommufd: &Iommufd, area: &Area) -> Result<(), Errno> {
        match iommufd.unmap(self.ioas, area.iova) {
            Ok(bytes) if bytes == area.iova.len() => {}
            Ok(_) => return Err(self.doubt(area.iova, Errno::IO)),
            Err(failed) if failed.errno == Errno::NOENT && area.doubt => {}
            Err(failed) => return Err(self.doubt(area.iova, failed.errno)),
        }
        self.areas().remove(area);
        Ok(())
    }

    /// Takes `gone` out: each mapping that holds something of it goes, and what is left of it is copied back from
    /// `from`, which has that mapped.
    pub(super) fn take_out(
        &self,
        iommufd: &Iommufd,
        gone: &[PageRange<Iova>],
        from: &Side,
    ) -> Result<(), Errno> {
        let mut gone = gone;
        while let Some(first) = gone.first() {
            for area in self.areas().overlapping(*first) {
                let over = gone.iter().copied().take_while(|range| range.start() < area.iova.end());
                let left = remainders(area.iova, over.filter(|range| range.overlaps(area.iova)));
                self.unmap_one(iommufd, &area)?;
                for rest in left {
                    self.copy(iommufd, from, rest, area.writable).map_err(|failed| failed.errno)?;
                }
            }
            gone = &gone[1..];
        }
        Ok(())
    }

    /// Makes this side map what `from` maps, no more and no less.
    pub(super) fn like(&self, iommufd: &Iommufd, from: &Side) -> Result<(), Errno> {
        let (here, there) = (self.areas().all(), from.areas().all());
        for area in &here {
            if !from.areas().has(area) || area.doubt {
                self.unmap_one(iommufd, area)?;
            }
        }
        for area in &there {
            if !self.areas().has(area) {
                self.copy(iommufd, from, area.iova, area.writable).map_err(|failed| failed.errno)?;
            }
        }
        Ok(())
    }

    fn doubt(&self, iova: PageRange<Iova>, errno: Errno) -> Errno {
        self.areas().doubt(iova);
        errno
    }
}
