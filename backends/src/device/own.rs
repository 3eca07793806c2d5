//! Driver memory in the device's domain: rings, bounce pages, scratch pages.
//!
//! It is mapped at IOVAs where no guest has memory: at the I/O APIC, below the range of message-signalled interrupts.
//! It never belongs to a client and is never converted, so it is not in the gate's ledger.

use std::sync::{Arc, Mutex, PoisonError};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use rustix::io::Errno;

use crate::iommu::{Domain, Unmap};
use crate::{Error, Result};

/// The first IOVA of driver memory: the I/O APIC's address. The range ends at the MSI range, 0xfee0_0000.
const START: u64 = 0xfec0_0000;
/// The number of pages for the drivers of all devices together.
const PAGES: usize = 512;

/// The pages that are in use, in any domain of this process.
static ALLOCATED: Mutex<[bool; PAGES]> = Mutex::new([false; PAGES]);

/// Pages that a driver and its device share, mapped until dropped.
#[derive(Debug)]
pub struct OwnMemory {
    file: Arc<GuestFile>,
    iova: PageRange<Iova>,
    domain: Arc<dyn Domain>,
    allocation: Allocation,
}

impl OwnMemory {
    /// Returns the range of IOVAs for driver memory, in which no memory of a client may be mapped: what
    /// [`Device::reserved`](crate::Device::reserved) of a driver returns.
    pub fn reserved() -> Option<PageRange<Iova>> {
        PageRange::new(START, PAGES as u64 * PAGE).ok()
    }

    /// Allocates and maps `pages` zeroed pages at contiguous IOVAs. Fails if the range for driver memory is full, or
    /// as [`Domain::map`] does.
    pub fn map(domain: &Arc<dyn Domain>, pages: usize) -> Result<Self> {
        let full = Error::Host {
            what: format!(
                "no room for {pages} pages of driver memory: {PAGES} are available for all devices"
            ),
            remedy: "give this process fewer devices",
        };
        let Some(allocation) = Allocation::new(pages) else { return Err(full) };
        let len = pages as u64 * PAGE;
        let Ok(iova) = PageRange::new(START + allocation.first as u64 * PAGE, len) else { return Err(full) };
        let file = GuestFile::memfd("passgate-driver", len)
            .map_err(|source| Error::Map { iova, source, remedy: "" })
            .map(Arc::new)?;
        domain.map(iova, len.next_power_of_two(), &file, Offset(0), true)?;
        Ok(Self { file, iova, domain: Arc::clone(domain), allocation })
    }

    /// Returns the IOVA of the byte at `offset`.
    pub fn iova(&self, offset: u64) -> Iova {
        Iova(self.iova.start().0 + offset)
    }

    /// Returns the memory for accesses by the driver: copies, and aligned 64-bit words with acquire and release
    /// ordering.
    pub fn file(&self) -> &GuestFile {
        &self.file
    }
}

/// Unmaps the driver memory of an earlier process. Its devices must be quiesced.
pub(crate) fn clear(domain: &dyn Domain) -> Result<()> {
    let Some(range) = OwnMemory::reserved() else { return Ok(()) };
    match domain.unmap(range) {
        // ENOENT: nothing was mapped, on an iommufd without the VFIO-compatible unmap.
        Unmap::Gone { .. } | Unmap::Failed { errno: Errno::NOENT, .. } => Ok(()),
        Unmap::InFlight { .. } => Err(still_mapped(Errno::INPROGRESS)),
        Unmap::Failed { errno, .. } => Err(still_mapped(errno)),
    }
}

fn still_mapped(errno: Errno) -> Error {
    Error::Host {
        what: format!("the memory of an earlier process's drivers stays mapped: {errno}"),
        remedy: "stop the service for good, then start it",
    }
}

impl Drop for OwnMemory {
    /// Unmaps the pages. If that fails, their IOVAs are never allocated again.
    fn drop(&mut self) {
        let gone = self.domain.unmap(self.iova);
        if !matches!(gone, Unmap::Gone { bytes } if bytes == self.iova.len()) {
            log::error!("driver memory at IOVA {} stays mapped: {gone:?}", self.iova);
            self.allocation.leaked = true;
        }
    }
}

/// Allocated pages of the range of driver memory, freed when dropped.
#[derive(Debug)]
struct Allocation {
    first: usize,
    pages: usize,
    /// Set if the pages must not be freed because they are still mapped.
    leaked: bool,
}

impl Allocation {
    fn new(pages: usize) -> Option<Self> {
        let mut allocated = ALLOCATED.lock().unwrap_or_else(PoisonError::into_inner);
        let first = allocated.windows(pages.max(1)).position(|run| !run.contains(&true))?;
        allocated[first..first + pages].fill(true);
        Some(Self { first, pages, leaked: false })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if !self.leaked {
            ALLOCATED.lock().unwrap_or_else(PoisonError::into_inner)[self.first..self.first + self.pages]
                .fill(false);
        }
    }
}
