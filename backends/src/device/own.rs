//! Memory of a driver's own in its device's domain: rings, bounce pages, scratch pages.
//!
//! It is mapped where no guest has memory: beside the I/O APIC, below the window of message-signalled interrupts.
//! It never belongs to a client and is never converted, so the gate's ledger does not hold it.

use std::sync::{Arc, Mutex, PoisonError};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use rustix::io::Errno;

use crate::iommu::{Domain, Unmap};
use crate::{Error, Result};

/// Where it is: from the I/O APIC to the interrupt window at 0xfee0_0000.
const START: u64 = 0xfec0_0000;
const PAGES: usize = 512;

/// Where no memory of a client may be, in a domain of a device with memory of its driver's own.
pub(super) fn window() -> Option<PageRange<Iova>> {
    PageRange::new(START, PAGES as u64 * PAGE).ok()
}

/// The pages that are in use, in whatever domain of this process.
static TAKEN: Mutex<[bool; PAGES]> = Mutex::new([false; PAGES]);

/// Pages that a driver and its device share, mapped until dropped.
#[derive(Debug)]
pub(super) struct OwnMemory {
    file: Arc<GuestFile>,
    iova: PageRange<Iova>,
    domain: Arc<dyn Domain>,
    place: Place,
}

impl OwnMemory {
    /// `pages` zeroed pages, contiguous for the device.
    pub(super) fn map(domain: &Arc<dyn Domain>, pages: usize) -> Result<Self> {
        let full = Error::Host {
            what: format!("no room for {pages} pages of a driver's own: {PAGES} are there for all devices"),
            mend: "give this process fewer devices",
        };
        let Some(place) = Place::take(pages) else { return Err(full) };
        let len = pages as u64 * PAGE;
        let Ok(iova) = PageRange::new(START + place.first as u64 * PAGE, len) else { return Err(full) };
        let file = GuestFile::memfd("passgate-driver", len)
            .map_err(|source| Error::Map { iova, source, mend: "" })
            .map(Arc::new)?;
        domain.map(iova, len.next_power_of_two(), &file, Offset(0), true)?;
        Ok(Self { file, iova, domain: Arc::clone(domain), place })
    }

    /// Where the device finds the byte at `offset`.
    pub(super) fn iova(&self, offset: u64) -> Iova {
        Iova(self.iova.start().0 + offset)
    }

    /// The driver's side: copies, and single aligned words with acquire and release order.
    pub(super) fn file(&self) -> &GuestFile {
        &self.file
    }
}

/// Takes out of the domain what drivers of an earlier process had there: their devices are quiet.
pub(crate) fn clear(domain: &dyn Domain) -> Result<()> {
    let Ok(window) = PageRange::new(START, PAGES as u64 * PAGE) else { return Ok(()) };
    match domain.unmap(window) {
        // ENOENT: nothing was there, said by an iommufd that tells it no other way.
        Unmap::Gone { .. } | Unmap::Failed { errno: Errno::NOENT, .. } => Ok(()),
        Unmap::InFlight { .. } => Err(stays(Errno::INPROGRESS)),
        Unmap::Failed { errno, .. } => Err(stays(errno)),
    }
}

fn stays(errno: Errno) -> Error {
    Error::Host {
        what: format!("the memory of an earlier process's drivers stays mapped: {errno}"),
        mend: "stop the service for good, then start it",
    }
}

impl Drop for OwnMemory {
    /// Pages that would not go are never used again.
    fn drop(&mut self) {
        let gone = self.domain.unmap(self.iova);
        if !matches!(gone, Unmap::Gone { bytes } if bytes == self.iova.len()) {
            log::error!("a driver's own memory at IOVA {} stays mapped: {gone:?}", self.iova);
            self.place.keep = true;
        }
    }
}

/// Pages of the window that are taken.
#[derive(Debug)]
struct Place {
    first: usize,
    pages: usize,
    keep: bool,
}

impl Place {
    fn take(pages: usize) -> Option<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let first = taken.windows(pages.max(1)).position(|window| !window.contains(&true))?;
        taken[first..first + pages].fill(true);
        Some(Self { first, pages, keep: false })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.keep {
            TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[self.first..self.first + self.pages]
                .fill(false);
        }
    }
}
