//! One of the two IOASes of a standby domain, with the record of its mappings.

use std::sync::{Mutex, MutexGuard, PoisonError};

use passgate_bindings::iommufd::IoasId;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::areas::{Area, Areas, remainders};
use super::kernel::Kernel;

/// An IOAS and the record of its mappings. The lock is never held during a kernel call.
#[derive(Debug)]
pub(super) struct TrackedIoas {
    pub(super) ioas: IoasId,
    areas: Mutex<Areas>,
}

impl TrackedIoas {
    pub(super) fn new(ioas: IoasId) -> Self {
        Self { ioas, areas: Mutex::default() }
    }

    pub(super) fn areas(&self) -> MutexGuard<'_, Areas> {
        // Poisoning is ignored: no code that has the lock can panic between two writes that belong together.
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps in this IOAS, as one mapping, the pages that `from` maps at `iova`.
    pub(super) fn copy(
        &self,
        kernel: &impl Kernel,
        from: &TrackedIoas,
        iova: PageRange<Iova>,
        writable: bool,
    ) -> Result<(), Failed> {
        kernel.copy(from.ioas, self.ioas, iova, writable)?;
        self.areas().insert(iova, writable);
        Ok(())
    }

    /// Returns true if an unmap of `iova` would cut a mapping.
    pub(super) fn would_cut(&self, iova: PageRange<Iova>) -> bool {
        self.areas().overlapping(iova).iter().any(|area| !iova.covers(area.iova))
    }

    /// Unmaps the mappings in `iova`, none of which may extend beyond it. `Ok` means that all of them are gone.
    pub(super) fn unmap(&self, kernel: &impl Kernel, iova: PageRange<Iova>) -> Result<(), Errno> {
        let areas = self.areas().overlapping(iova);
        if areas.is_empty() {
            return Ok(());
        }
        // Uncertain mappings are unmapped one by one: only for a single mapping is ENOENT a proof that it was gone
        // before.
        if areas.iter().any(|area| area.uncertain) {
            return areas.iter().try_for_each(|area| self.unmap_one(kernel, area));
        }
        let expected: u64 = areas.iter().map(|area| area.iova.len()).sum();
        match kernel.unmap(self.ioas, iova) {
            Ok(bytes) if bytes == expected => {
                let mut record = self.areas();
                areas.iter().for_each(|area| record.remove(area));
                Ok(())
            }
            // The kernel and the record disagree, so the record of this range is uncertain from now on.
            Ok(_) => Err(self.uncertain(iova, Errno::IO)),
            Err(errno) => Err(self.uncertain(iova, errno)),
        }
    }

    /// Unmaps one mapping, which may be gone already if it is uncertain: for exactly its range the kernel removes all
    /// or nothing.
    fn unmap_one(&self, kernel: &impl Kernel, area: &Area) -> Result<(), Errno> {
        match kernel.unmap(self.ioas, area.iova) {
            Ok(bytes) if bytes == area.iova.len() => {}
            Ok(_) => return Err(self.uncertain(area.iova, Errno::IO)),
            Err(Errno::NOENT) if area.uncertain => {}
            Err(errno) => return Err(self.uncertain(area.iova, errno)),
        }
        self.areas().remove(area);
        Ok(())
    }

    /// Removes the ranges `gone`: each mapping that overlaps one of them is unmapped, and the rest of it is copied back
    /// from `from`, where it is mapped.
    pub(super) fn take_out(
        &self,
        kernel: &impl Kernel,
        gone: &[PageRange<Iova>],
        from: &TrackedIoas,
    ) -> Result<(), Errno> {
        let mut gone = gone;
        while let Some(first) = gone.first() {
            let areas = self.areas().overlapping(*first);
            for area in areas {
                let over = gone.iter().copied().take_while(|range| range.start() < area.iova.end());
                let remainders = remainders(area.iova, over.filter(|range| range.overlaps(area.iova)));
                self.unmap_one(kernel, &area)?;
                for rest in remainders {
                    self.copy(kernel, from, rest, area.writable).map_err(|failed| failed.errno)?;
                }
            }
            gone = &gone[1..];
        }
        Ok(())
    }

    /// Makes the mappings of this IOAS equal to those of `from`.
    pub(super) fn mirror(&self, kernel: &impl Kernel, from: &TrackedIoas) -> Result<(), Errno> {
        let (here, there) = (self.areas().all(), from.areas().all());
        for area in &here {
            if !from.areas().has_certain(area) || area.uncertain {
                self.unmap_one(kernel, area)?;
            }
        }
        for area in &there {
            if !self.areas().has_certain(area) {
                self.copy(kernel, from, area.iova, area.writable).map_err(|failed| failed.errno)?;
            }
        }
        Ok(())
    }

    /// Marks the mappings over `iova` as uncertain after a call failed with `errno`, and returns `errno`.
    fn uncertain(&self, iova: PageRange<Iova>, errno: Errno) -> Errno {
        self.areas().mark_uncertain(iova);
        errno
    }
}
