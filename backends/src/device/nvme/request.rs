//! What a drive is asked for, and what becomes of that.

/// What a drive is asked to do. Blocks are counted from the namespace's first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Blocks to memory.
    Read {
        /// The first block.
        first: u64,
        /// How many.
        blocks: u32,
    },
    /// Memory to blocks.
    Write {
        /// The first block.
        first: u64,
        /// How many.
        blocks: u32,
        /// Whether it completes only once they are on the medium.
        fua: bool,
    },
    /// What was completed before is on the medium.
    Flush,
    /// Blocks read as zeroes from then on.
    WriteZeroes {
        /// The first block.
        first: u64,
        /// How many.
        blocks: u32,
        /// Whether the drive may give them up.
        unmap: bool,
        /// Whether it completes only once that is on the medium.
        fua: bool,
    },
    /// Nobody needs what is in these blocks.
    Discard {
        /// The first block.
        first: u64,
        /// How many.
        blocks: u32,
    },
}

/// What became of a request that was submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submitted {
    /// It is on its way; [`super::Queue::complete`] brings it back.
    Started,
    /// There is no room: complete something first.
    Full,
    /// A page of it is not open, or the drive is paused. Nothing was done: hold it and try again.
    Closed,
    /// The drive is gone, or was given up.
    Lost,
    /// No command can be made of it: its memory is not as long as its blocks, or in pieces that this controller does not
    /// take; or its blocks are not there.
    Wrong,
}

/// Why a request has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The drive says so: status code and type (base specification 2.0, 3.3.3.2.1).
    Status(u16),
    /// It could not reach the memory: a page was taken away by force.
    Memory,
    /// It was under way when the drive was stopped, and its pages are not open now. It may be tried again.
    Withheld,
    /// It did not come to an end, however often it was tried.
    TimedOut,
    /// A part of it was done; behind that its memory is in pieces that this controller does not take.
    Wrong,
    /// The drive is gone, or was given up.
    Lost,
}

/// A request that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// As it was submitted.
    pub tag: u32,
    /// How it went.
    pub result: Result<(), Fault>,
}
