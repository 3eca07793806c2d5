//! The simulated controller's queues.

use std::collections::VecDeque;

/// A submission queue.
#[derive(Debug)]
pub(super) struct Submission {
    /// Where it is, by IOVA.
    pub(super) at: u64,
    pub(super) slots: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    /// Where its completions go.
    pub(super) to: u16,
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Completions {
    /// Where it is, by IOVA.
    pub(super) at: u64,
    pub(super) slots: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) phase: bool,
    /// The vector that is raised, where one is.
    pub(super) vector: Option<u16>,
    /// What waits for room.
    pub(super) backlog: VecDeque<Entry>,
}

/// A completion that was not posted yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) queue: u16,
    pub(super) id: u16,
    pub(super) status: u16,
    pub(super) result: u32,
}

impl Submission {
    pub(super) fn new(at: u64, slots: u32, to: u16) -> Self {
        Self { at, slots, head: 0, tail: 0, to }
    }
}

impl Completions {
    pub(super) fn new(at: u64, slots: u32, vector: Option<u16>) -> Self {
        Self { at, slots, head: 0, tail: 0, phase: true, vector, backlog: VecDeque::new() }
    }

    pub(super) fn has_room(&self) -> bool {
        (self.tail + 1) % self.slots != self.head
    }

    /// Entries that were posted and not taken.
    pub(super) fn posted(&self) -> u32 {
        (self.tail + self.slots - self.head) % self.slots
    }
}
