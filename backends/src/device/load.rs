//! Continuous DMA, as a load during conversions in tests and self-tests.

use std::fmt;

use crate::Result;

/// The transfers that a load has made since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// The number of writes that the device reported as successful, and of reads that returned what was written before.
    pub done: u64,
    /// The number of transfers that faulted or did not complete ([`crate::Error::Fault`]), and of reads that returned only
    /// zeroes, which is how a device that cannot report a fault shows one.
    pub faults: u64,
    /// The number of reads that the device reported as successful and that returned neither what was written nor zeroes.
    /// Reads of memory that is written by others meanwhile, or mapped again between write and read, count here too.
    pub wrong: u64,
}

/// A running load. Dropping it stops it.
pub trait Load: Send + fmt::Debug {
    /// Returns the transfers made so far.
    fn counts(&self) -> Counts;

    /// Stops issuing transfers, waits until the outstanding ones have ended, and returns all transfers made. An error
    /// means that one failed other than by a fault or a fence (by its time-out, for example): DMA may still be in flight.
    fn stop(self: Box<Self>) -> Result<Counts>;
}
