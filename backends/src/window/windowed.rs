//! A domain whose pages are open in an admission window only while they are mapped.
//!
//! Pages are opened after they were mapped, and closed before they are unmapped; an unmap then waits until no request
//! in flight accesses them. If that takes too long, nothing is unmapped and the result is `EBUSY`: the gate proceeds to
//! fences that need not wait. Closed pages are opened again only by a map: whatever state a failed call has left, no
//! request can access these pages.

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
use crate::handover::{DomainIds, Handover};
use crate::{Domain, DomainCaps, Result, Ticket, Unmap};

/// The time for which an unmap waits for requests in flight: longer than nearly every request takes, and a small part
/// of an invalidation's deadline, because stronger fences are left after that.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_millis(100);

/// A domain with an admission window.
#[derive(Debug)]
pub struct Windowed {
    inner: Arc<dyn Domain>,
    window: Arc<Window>,
    timeout: Duration,
}

impl Windowed {
    /// Makes a domain that opens the pages of `inner` in `window` while they are mapped. Pages that are mapped already
    /// are not opened, unless they are announced ([`Domain::resumed`]).
    pub fn new(inner: Arc<dyn Domain>, window: Arc<Window>) -> Self {
        Self { inner, window, timeout: IN_FLIGHT_TIMEOUT }
    }

    /// Sets the time for which an unmap waits for requests in flight over its pages (100 ms by default).
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Closes the ranges and waits until no request in flight accesses them; `EBUSY` after the timeout.
    fn close_and_wait(&self, ranges: &[PageRange<Iova>]) -> Result<(), Errno> {
        ranges.iter().for_each(|range| self.window.close(*range));
        // One deadline for all ranges together.
        let until = Instant::now() + self.timeout;
        for range in ranges {
            if !self.window.await_clear(*range, until.saturating_duration_since(Instant::now())) {
                log::warn!(
                    "requests in flight over IOVA {range} did not end within {:?}: it stays mapped",
                    self.timeout
                );
                return Err(Errno::BUSY);
            }
        }
        Ok(())
    }
}

// A method that is not forwarded would return the trait's default instead of the inner domain's result.
#[deny(clippy::missing_trait_methods)]
impl Domain for Windowed {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> DomainCaps {
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
        match self.close_and_wait(&[iova]) {
            Ok(()) => self.inner.unmap(iova),
            Err(errno) => Unmap::Failed { errno, bytes: 0 },
        }
    }

    fn leave(&self) -> io::Result<(Handover, DomainIds)> {
        self.inner.leave()
    }

    fn resumed(&self, iova: PageRange<Iova>) {
        self.inner.resumed(iova);
        self.window.open(iova);
    }

    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        // If replace is not supported, nothing may change, so no page is closed.
        if !self.inner.capabilities().replace {
            return self.inner.replace(gone);
        }
        match self.close_and_wait(gone) {
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
