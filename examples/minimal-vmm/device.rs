//! The device: continuous DMA to random pages on a connection of its own, and a check of every operation.
//!
//! The daemon's device performs the DMA (`Dma`) through its IOMMU mappings alone. The VMM's state of a page (`pages.rs`) gives
//! the values that an operation may see. A fault is always allowed. An operation is stale if it reads an older stamp or
//! that of a private page, or if its write does not appear in the shared page.

use std::sync::atomic::{AtomicBool, Ordering};

use passgate_client::{Client, Error};
use rustix::io::Errno;

use crate::Result;
use crate::guest::{self, MARK_OFFSET, PAGES};
use crate::machine::Machine;
use crate::pages::Pages;

/// A device of the daemon.
pub(crate) struct Device {
    client: Client,
    name: String,
    /// True where the device reports a fault of its DMA. A PCI device cannot: there a faulting read returns zeroes, and a
    /// faulting write is discarded.
    reports_faults: bool,
}

/// The results of the DMA.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    /// The number of operations.
    pub(crate) ops: u64,
    /// The number of operations that faulted.
    pub(crate) faults: u64,
    /// The number of operations that accessed a page after its unmap.
    pub(crate) stale: u64,
}

impl Device {
    /// Returns the device `name`, driven over the connection `client`.
    pub(crate) fn new(client: Client, name: &str) -> Self {
        Self { client, name: name.to_owned(), reports_faults: name.starts_with("soft:") }
    }

    /// Reads the first 8 bytes of a page by DMA; none where that faults.
    pub(crate) fn read(&mut self, page: u64) -> Result<Option<u64>> {
        match self.client.dma_read(&self.name, guest::iova(page, 0).0, 8) {
            Ok(bytes) => {
                let bytes =
                    <[u8; 8]>::try_from(&bytes[..]).map_err(|_| "a DMA of another length came back")?;
                let read = u64::from_le_bytes(bytes);
                // A stamp is never 0, so without fault reports a 0 is a fault.
                Ok((self.reports_faults || read != 0).then_some(read))
            }
            Err(error) => faulted(error).map(|()| None),
        }
    }

    /// Writes a mark into a page by DMA. Returns false where the device reports a fault.
    fn write(&mut self, page: u64, mark: u64) -> Result<bool> {
        match self.client.dma_write(&self.name, guest::iova(page, MARK_OFFSET).0, &mark.to_le_bytes()) {
            Ok(()) => Ok(true),
            Err(error) => faulted(error).map(|()| false),
        }
    }

    /// Returns true where the device reads the stamp of `generation` in a page.
    pub(crate) fn reads_stamp(&mut self, page: u64, generation: u32) -> Result<bool> {
        Ok(self.read(page)? == Some(guest::stamp(page, generation)))
    }

    /// Performs DMA until `stop` is set.
    pub(crate) fn work(&mut self, machine: &Machine, pages: &Pages, stop: &AtomicBool) -> Result<Tally> {
        let mut tally = Tally::default();
        // xorshift64
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        while !stop.load(Ordering::Acquire) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = (random >> 8) % PAGES;
            let before = pages.generation(page);
            // None for a fault, else whether the access was allowed.
            let valid = if random & 1 == 0 {
                let read = self.read(page)?;
                read.map(|read| is_valid_read(page, read, before, pages.generation(page)))
            } else {
                // The guest reads the lower 16 bits; bit 0 is set, so that they are never 0.
                let mark = tally.ops << 1 | 1;
                let wrote = self.write(page, mark)?;
                let found = machine.load(page, MARK_OFFSET)? == mark;
                // Without fault reports, a write that is not found counts as a fault. A conversion in the meantime removes
                // the mark with the page's contents.
                let reached = wrote && (found || self.reports_faults);
                reached.then(|| found || before % 2 == 1 || pages.generation(page) != before)
            };
            tally.ops += 1;
            match valid {
                None => tally.faults += 1,
                Some(true) => {}
                Some(false) => tally.stale += 1,
            }
        }
        Ok(tally)
    }

    /// Checks every page while no conversion is in progress: the device can access each shared page and no other.
    pub(crate) fn check(&mut self, pages: &Pages) -> Result<()> {
        for page in 0..PAGES {
            let generation = pages.generation(page);
            if pages.is_shared(page) && !self.reads_stamp(page, generation)? {
                return Err(format!("page {page} is shared, but the device cannot access it").into());
            }
            if !pages.is_shared(page) && self.read(page)?.is_some() {
                return Err(
                    format!("page {page} is private or in quarantine, but the device can access it").into()
                );
            }
        }
        Ok(())
    }
}

/// Returns true where a device may have read `read`: the generation of the page was `before` then and is `after` now.
fn is_valid_read(page: u64, read: u64, before: u32, after: u32) -> bool {
    if before == after && before.is_multiple_of(2) {
        return read == guest::stamp(page, before);
    }
    // Generation 0: mapped again and not stamped yet. Else it must be a shared generation that is not older.
    let generation = (read >> 32) as u32;
    generation == 0 || (generation.is_multiple_of(2) && generation >= before.next_multiple_of(2))
}

/// Returns success where `error` reports a fault of the DMA, else the error.
fn faulted(error: Error) -> Result<()> {
    match error {
        Error::Refused { errno, .. } if errno == Errno::FAULT.raw_os_error() => Ok(()),
        other => Err(other.into()),
    }
}
