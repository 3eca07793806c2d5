//! The device: DMA on random pages, all the time, on a connection of its own; and what each operation proves.
//!
//! It is the daemon's device that does the DMA (`Dma`), by its translations alone. Whoever asks for it knows what a
//! page must hold at least. An operation that faults proves nothing wrong; one that reads an older stamp, or the
//! guest's own, or writes where nobody looks, is stale.

use std::sync::atomic::{AtomicBool, Ordering};

use passgate::Error;
use passgate::client::Client;
use rustix::io::Errno;

use crate::Result;
use crate::guest::{self, MARK, PAGES};
use crate::machine::Machine;
use crate::pages::Pages;

/// A device of the daemon's.
pub(crate) struct Device {
    client: Client,
    name: String,
    /// Whether it is told that its DMA faulted. On a PCI bus nobody is: a read brings zeroes, a write goes nowhere.
    tells: bool,
}

/// What came of the DMA.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    /// Operations.
    pub(crate) ops: u64,
    /// Those that faulted.
    pub(crate) faults: u64,
    /// Those that touched a page that had been taken away.
    pub(crate) stale: u64,
}

impl Device {
    /// The device called `name`, over `client`.
    pub(crate) fn new(client: Client, name: &str) -> Self {
        Self { client, name: name.to_owned(), tells: name.starts_with("soft:") }
    }

    /// Reads the start of a page; none where that faults.
    pub(crate) fn read(&mut self, page: u64) -> Result<Option<u64>> {
        match self.client.dma_read(&self.name, guest::iova(page, 0).0, 8) {
            Ok(bytes) => {
                let bytes =
                    <[u8; 8]>::try_from(&bytes[..]).map_err(|_| "a DMA of another length came back")?;
                let read = u64::from_le_bytes(bytes);
                Ok((self.tells || read != 0).then_some(read))
            }
            Err(error) => faulted(error).map(|()| None),
        }
    }

    /// Leaves a mark in a page; whether it got there, as far as the device can tell.
    fn write(&mut self, page: u64, mark: u64) -> Result<bool> {
        match self.client.dma_write(&self.name, guest::iova(page, MARK).0, &mark.to_le_bytes()) {
            Ok(()) => Ok(true),
            Err(error) => faulted(error).map(|()| false),
        }
    }

    /// Whether the device reads the stamp of `generation` in a page.
    pub(crate) fn sees(&mut self, page: u64, generation: u32) -> Result<bool> {
        Ok(self.read(page)? == Some(guest::stamp(page, generation)))
    }

    /// Does DMA until told to stop.
    pub(crate) fn work(&mut self, machine: &Machine, pages: &Pages, stop: &AtomicBool) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut draw = 0x9e37_79b9_7f4a_7c15u64;
        while !stop.load(Ordering::Acquire) {
            draw ^= draw << 13;
            draw ^= draw >> 7;
            draw ^= draw << 17;
            let page = (draw >> 8) % PAGES;
            let before = pages.generation(page);
            let sound = if draw & 1 == 0 {
                let read = self.read(page)?;
                read.map(|read| is_sound(page, read, before, pages.generation(page)))
            } else {
                // Never zero in its lower half, so that the guest cannot miss it.
                let mark = tally.ops << 1 | 1;
                let wrote = self.write(page, mark)?;
                let there = machine.load(page, MARK)? == mark;
                // Where the page has been away meanwhile, the mark may have gone with it.
                let told = wrote && (there || self.tells);
                told.then(|| there || before % 2 == 1 || pages.generation(page) != before)
            };
            tally.ops += 1;
            match sound {
                None => tally.faults += 1,
                Some(true) => {}
                Some(false) => tally.stale += 1,
            }
        }
        Ok(tally)
    }

    /// Looks at every page once more, now that nothing changes: the device sees each shared one and no other.
    pub(crate) fn check(&mut self, pages: &Pages) -> Result<()> {
        for page in 0..PAGES {
            let generation = pages.generation(page);
            if pages.is_shared(page) && !self.sees(page, generation)? {
                return Err(format!("page {page} is shared again, and the device does not see it").into());
            }
            if !pages.is_shared(page) && self.read(page)?.is_some() {
                return Err(format!("page {page} is private or in quarantine, and the device sees it").into());
            }
        }
        Ok(())
    }
}

/// Whether a device may have read this, if the page was at `before` then and is at `after` now.
fn is_sound(page: u64, read: u64, before: u32, after: u32) -> bool {
    if before == after && before.is_multiple_of(2) {
        return read == guest::stamp(page, before);
    }
    // Mapped again and not yet stamped, or half stamped; but never the guest's own, and never an older one.
    let generation = (read >> 32) as u32;
    generation == 0 || (generation.is_multiple_of(2) && generation >= before.next_multiple_of(2))
}

/// The device's DMA faulted, and that is all.
fn faulted(error: Error) -> Result<()> {
    match error {
        Error::Refused { errno, .. } if errno == Errno::FAULT.raw_os_error() => Ok(()),
        other => Err(other.into()),
    }
}
