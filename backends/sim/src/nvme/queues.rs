//! The simulated controller's queues.

use std::collections::VecDeque;

/// A submission queue.
#[derive(Debug)]
pub(super) struct SubmissionQueue {
    /// Its IOVA.
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    /// The completion queue for its commands.
    pub(super) cqid: u16,
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    /// Its IOVA.
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) phase: bool,
    /// The interrupt vector, if interrupts are enabled for the queue.
    pub(super) vector: Option<u16>,
    /// Completions that wait for room.
    pub(super) backlog: VecDeque<CompletionEntry>,
}

/// A completion that was not posted yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct CompletionEntry {
    pub(super) queue: u16,
    pub(super) cid: u16,
    pub(super) status: u16,
    pub(super) result: u32,
}

impl SubmissionQueue {
    pub(super) fn new(base: u64, entries: u32, cqid: u16) -> Self {
        Self { base, entries, head: 0, tail: 0, cqid }
    }
}

impl CompletionQueue {
    pub(super) fn new(base: u64, entries: u32, vector: Option<u16>) -> Self {
        Self { base, entries, head: 0, tail: 0, phase: true, vector, backlog: VecDeque::new() }
    }

    pub(super) fn has_room(&self) -> bool {
        (self.tail + 1) % self.entries != self.head
    }

    /// Returns the number of entries that were posted and not taken by the driver.
    pub(super) fn posted(&self) -> u32 {
        (self.tail + self.entries - self.head) % self.entries
    }
}
