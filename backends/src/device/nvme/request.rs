//! Requests to a drive, and their results.

/// The operation of a request. Blocks are numbered from the first of the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Reads blocks to memory.
    Read {
        /// The first block.
        first: u64,
        /// The number of blocks.
        blocks: u32,
    },
    /// Writes memory to blocks.
    Write {
        /// The first block.
        first: u64,
        /// The number of blocks.
        blocks: u32,
        /// Force Unit Access: completes once the blocks are on the medium.
        fua: bool,
    },
    /// Puts all blocks whose writes have completed on the medium.
    Flush,
    /// Makes blocks read as zeroes.
    WriteZeroes {
        /// The first block.
        first: u64,
        /// The number of blocks.
        blocks: u32,
        /// Permits the drive to deallocate the blocks.
        unmap: bool,
        /// Force Unit Access: completes once the zeroes are on the medium.
        fua: bool,
    },
    /// Discards blocks whose content is no longer needed.
    Discard {
        /// The first block.
        first: u64,
        /// The number of blocks.
        blocks: u32,
    },
}

/// The result of submitting a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submitted {
    /// The request is in flight; [`super::Queue::complete`] returns it.
    Started,
    /// The queue is full: complete a request first.
    Full,
    /// The window does not admit the request: a page of its memory is not open, or the drive is paused. Nothing was
    /// done; submit it again later.
    Closed,
    /// The drive was removed or given up.
    Lost,
    /// The request is malformed: its memory has another length than its blocks, or segments that this controller
    /// cannot express; or its blocks are outside the namespace.
    Wrong,
}

/// The reason why a request has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The drive reports this Status Code Type and Status Code (NVMe Base 2.0, 3.3.3.2.1).
    Status(u16),
    /// The drive could not access the memory: a page was unmapped without the window (Data Transfer Error).
    Memory,
    /// The request was in flight when the drive was stopped, and its pages are not open now. It may be submitted
    /// again.
    Withheld,
    /// The request did not complete in any of its attempts.
    TimedOut,
    /// A part of the request was done; the rest of its memory has segments that this controller cannot express.
    Wrong,
    /// The drive was removed or given up.
    Lost,
}

/// A request that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// The tag with which it was submitted.
    pub tag: u32,
    /// Its result.
    pub result: Result<(), Fault>,
}
