//! Continuous DMA, as a load during conversions in tests and self-tests.

use std::fmt;

use crate::Result;

/// The transfers that a load has made since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// The number of transfers that succeeded, verified or not.
    pub done: u64,
    /// The number of transfers that the device reported as failed, because nothing was mapped at their address.
    pub faults: u64,
    /// The number of reads that the device reported as successful and that returned other bytes than were written.
    /// Reads of memory that is written by others meanwhile, or mapped again between write and read, count here too.
    pub wrong: u64,
}

/// A running load. Dropping it stops it.
pub trait Load: Send + fmt::Debug {
    /// Returns the transfers made so far.
    fn counts(&self) -> Counts;

    /// Stops issuing transfers, waits until the outstanding ones have ended, and returns all transfers made. An error
    /// means that the device did not end them within its time-out: DMA may still be in flight.
    fn stop(self: Box<Self>) -> Result<Counts>;
}
