//! A domain whose pages are open in a window exactly while they are mapped.
//!
//! Pages open once they are mapped, and close before they are taken away: then it waits until nothing in flight
//! touches them. Where that takes too long nothing is taken away and the answer is `EBUSY`: the gate climbs on, to
//! fences that need not wait. Pages that were closed open again by being mapped, and by nothing else: whatever a
//! failed call left behind, no request finds it.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use rustix::io::Errno;

use super::Window;
use crate::resume::{Ids, Left};
use crate::{Capabilities, Domain, Result, Ticket, Unmap};

/// How long an unmap waits for what is in flight: longer than nearly every request takes, and a small part of the time in
/// which whoever asked for it must be answered, for there are stronger means.
const PATIENCE: Duration = Duration::from_millis(100);

/// A domain behind a window.
#[derive(Debug)]
pub struct Windowed {
    inner: Arc<dyn Domain>,
    window: Arc<Window>,
    patience: Duration,
}

impl Windowed {
    /// `inner`, whose pages are from now on open in `window` while they are mapped. What is mapped already is not
    /// known here ([`Domain::resumed`]).
    pub fn new(inner: Arc<dyn Domain>, window: Arc<Window>) -> Self {
        Self { inner, window, patience: PATIENCE }
    }

    /// How long an unmap waits for what is in flight over its pages; 100 ms unless said otherwise.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Closes the ranges and waits until nothing in flight touches them.
    fn shut(&self, ranges: &[PageRange<Iova>]) -> Result<(), Errno> {
        ranges.iter().for_each(|range| self.window.close(*range));
        let until = Instant::now() + self.patience;
        for range in ranges {
            if !self.window.await_clear(*range, until.saturating_duration_since(Instant::now())) {
                log::warn!(
                    "requests in flight over IOVA {range} did not end within {:?}: it stays mapped",
                    self.patience
                );
                return Err(Errno::BUSY);
            }
        }
        Ok(())
    }
}

// A method that is not passed on would be the trait's own answer instead of the domain's.
#[deny(clippy::missing_trait_methods)]
impl Domain for Windowed {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn usable(&self) -> Vec<RangeInclusive<Iova>> {
        self.inner.usable()
    }

    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()> {
        self.inner.map(iova, piece, file, offset, writable)?;
        self.window.open(iova);
        Ok(())
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        match self.shut(&[iova]) {
            Ok(()) => self.inner.unmap(iova),
            Err(errno) => Unmap::Failed { errno, bytes: 0 },
        }
    }

    fn leave(&self) -> io::Result<(Left, Ids)> {
        self.inner.leave()
    }

    fn resumed(&self, iova: PageRange<Iova>) {
        self.inner.resumed(iova);
        self.window.open(iova);
    }

    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        // Where it cannot, nothing may change.
        if !self.inner.capabilities().replace {
            return self.inner.replace(gone);
        }
        match self.shut(gone) {
            Ok(()) => self.inner.replace(gone),
            Err(errno) => Unmap::Failed { errno, bytes: 0 },
        }
    }

    fn may_wait(&self, iova: PageRange<Iova>) -> bool {
        self.window.overlapping(iova) || self.inner.may_wait(iova)
    }

    fn poll(&self, ended: &mut Vec<Ticket>) {
        self.inner.poll(ended);
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "windowed_tests.rs"]
mod tests;
