//! One of the two IOASes of a standby domain, with the book of what it maps.

use std::sync::{Mutex, MutexGuard, PoisonError};

use passgate_bindings::iommufd::IoasId;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::areas::{Area, Areas, remainders};
use super::kernel::Kernel;

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
        kernel: &impl Kernel,
        from: &Side,
        iova: PageRange<Iova>,
        writable: bool,
    ) -> Result<(), Failed> {
        kernel.copy(from.ioas, self.ioas, iova, writable)?;
        self.areas().insert(iova, writable);
        Ok(())
    }

    /// Whether an unmap of `iova` would cut a mapping.
    pub(super) fn would_cut(&self, iova: PageRange<Iova>) -> bool {
        self.areas().overlapping(iova).iter().any(|area| !iova.covers(area.iova))
    }

    /// Unmaps what lies in `iova`; nothing sticks out of it. `Ok` says that all of it is gone.
    pub(super) fn unmap(&self, kernel: &impl Kernel, iova: PageRange<Iova>) -> Result<(), Errno> {
        let areas = self.areas().overlapping(iova);
        if areas.is_empty() {
            return Ok(());
        }
        if areas.iter().any(|area| area.doubt) {
            return areas.iter().try_for_each(|area| self.unmap_one(kernel, area));
        }
        let expected: u64 = areas.iter().map(|area| area.iova.len()).sum();
        match kernel.unmap(self.ioas, iova) {
            Ok(bytes) if bytes == expected => {
                let mut book = self.areas();
                areas.iter().for_each(|area| book.remove(area));
                Ok(())
            }
            // The kernel and the book do not agree: nothing that the book says is certain here any more.
            Ok(_) => Err(self.doubt(iova, Errno::IO)),
            Err(errno) => Err(self.doubt(iova, errno)),
        }
    }

    /// Unmaps one mapping, which may be gone already: asked for exactly its range the kernel finds all or nothing.
    fn unmap_one(&self, kernel: &impl Kernel, area: &Area) -> Result<(), Errno> {
        match kernel.unmap(self.ioas, area.iova) {
            Ok(bytes) if bytes == area.iova.len() => {}
            Ok(_) => return Err(self.doubt(area.iova, Errno::IO)),
            Err(Errno::NOENT) if area.doubt => {}
            Err(errno) => return Err(self.doubt(area.iova, errno)),
        }
        self.areas().remove(area);
        Ok(())
    }

    /// Takes `gone` out: each mapping that holds something of it goes, and what is left of it is copied back from
    /// `from`, which has that mapped.
    pub(super) fn take_out(
        &self,
        kernel: &impl Kernel,
        gone: &[PageRange<Iova>],
        from: &Side,
    ) -> Result<(), Errno> {
        let mut gone = gone;
        while let Some(first) = gone.first() {
            let areas = self.areas().overlapping(*first);
            for area in areas {
                let over = gone.iter().copied().take_while(|range| range.start() < area.iova.end());
                let left = remainders(area.iova, over.filter(|range| range.overlaps(area.iova)));
                self.unmap_one(kernel, &area)?;
                for rest in left {
                    self.copy(kernel, from, rest, area.writable).map_err(|failed| failed.errno)?;
                }
            }
            gone = &gone[1..];
        }
        Ok(())
    }

    /// Makes this side map what `from` maps, no more and no less.
    pub(super) fn like(&self, kernel: &impl Kernel, from: &Side) -> Result<(), Errno> {
        let (here, there) = (self.areas().all(), from.areas().all());
        for area in &here {
            if !from.areas().has(area) || area.doubt {
                self.unmap_one(kernel, area)?;
            }
        }
        for area in &there {
            if !self.areas().has(area) {
                self.copy(kernel, from, area.iova, area.writable).map_err(|failed| failed.errno)?;
            }
        }
        Ok(())
    }

    fn doubt(&self, iova: PageRange<Iova>, errno: Errno) -> Errno {
        self.areas().doubt(iova);
        errno
    }
}
