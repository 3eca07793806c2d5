//! Dense DMA that goes on by itself: what a conversion runs beside in a test or a self-test.

use std::fmt;

use crate::Result;

/// What a load has done since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Transfers that ended well, verified or not.
    pub done: u64,
    /// Transfers that the device said it could not make: nothing was mapped at their address.
    pub faults: u64,
    /// Transfers that the device said it made, where other bytes came back than were written. Memory that others
    /// write meanwhile, or that is mapped anew between the two, counts here too.
    pub wrong: u64,
}

/// A load under way. Dropping it stops it.
pub trait Load: Send + fmt::Debug {
    /// What it has done until now.
    fn counts(&self) -> Counts;

    /// Issues no more, waits until what is outstanding has ended, and says what was done in all. It fails where
    /// the device did not bring it all to an end within its deadline: DMA may still be under way then.
    fn stop(self: Box<Self>) -> Result<Counts>;
}
