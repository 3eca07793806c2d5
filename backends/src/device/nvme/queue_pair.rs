//! A submission queue and its completion queue (NVMe Base 2.0, 3.3.1), in the driver's own memory.

use passgate_bindings::{Failed, Iova, PAGE};

use super::command::{Command, Completion};
use crate::device::OwnMemory;

/// The size of a submission queue entry, in bytes (NVMe Base 2.0, 3.3.3.1).
const SQE_BYTES: u64 = 64;
/// The size of a completion queue entry, in bytes (NVMe Base 2.0, 3.3.3.2).
const CQE_BYTES: u64 = 16;

/// The Phase Tag, in the second quadword of a completion queue entry. The controller inverts it on each pass through
/// the queue.
const PHASE_TAG: u64 = 1 << 48;

/// A submission queue and its completion queue: their location, and the driver's position in both.
#[derive(Debug, Clone, Copy)]
pub struct QueuePair {
    /// The queue identifier of both queues; 0 for the admin queues.
    pub qid: u16,
    /// The number of entries of each queue.
    pub(super) entries: u16,
    /// The offset of the submission queue in the memory; the completion queue begins at the page boundary after it.
    offset: u64,
    tail: u16,
    head: u16,
    /// The Phase Tag of new entries in the current pass; true in the first, because the memory is zeroed before.
    phase: bool,
}

impl QueuePair {
    /// Returns the size of both queues in bytes, a multiple of [`PAGE`].
    pub const fn size(entries: u16) -> u64 {
        Self::sq_bytes(entries) + (CQE_BYTES * entries as u64).next_multiple_of(PAGE)
    }

    const fn sq_bytes(entries: u16) -> u64 {
        (SQE_BYTES * entries as u64).next_multiple_of(PAGE)
    }

    /// Returns an empty queue pair at `offset` and clears its memory, as the Phase Tag requires.
    pub fn zeroed(qid: u16, entries: u16, offset: u64, memory: &OwnMemory) -> Result<Self, Failed> {
        memory.file().write(offset, &vec![0; Self::size(entries) as usize])?;
        Ok(Self::new(qid, entries, offset))
    }

    /// Returns an empty queue pair at `offset`, whose memory the caller has cleared.
    pub(super) fn new(qid: u16, entries: u16, offset: u64) -> Self {
        Self { qid, entries, offset, tail: 0, head: 0, phase: true }
    }

    /// Returns the addresses of the submission queue and the completion queue.
    pub(super) fn addresses(&self, memory: &OwnMemory) -> (Iova, Iova) {
        (memory.iova(self.offset), memory.iova(self.offset + Self::sq_bytes(self.entries)))
    }

    /// Appends a command with the identifier `cid` and returns the new tail, which the caller writes to the doorbell.
    /// The controller reads no entry before that. There must be room in the queue.
    pub fn push(&mut self, memory: &OwnMemory, command: Command, cid: u16) -> Result<u16, Failed> {
        let mut words = command.0;
        words[0] |= u64::from(cid) << 16;
        for (nth, word) in (0..).zip(words) {
            memory.file().store(self.offset + u64::from(self.tail) * SQE_BYTES + nth * 8, word)?;
        }
        self.tail = (self.tail + 1) % self.entries;
        Ok(self.tail)
    }

    /// Returns the number of commands that may be outstanding: a queue with one entry less than it has is full (NVMe Base 2.0,
    /// 3.3.1).
    pub fn capacity(&self) -> u16 {
        self.entries - 1
    }

    /// Returns the value for the submission queue's tail doorbell.
    pub(super) fn tail(&self) -> u16 {
        self.tail
    }

    /// Removes the next completion, if the controller has posted one, and returns it with the value for the head
    /// doorbell.
    pub fn pop(&mut self, memory: &OwnMemory) -> Result<Option<(Completion, u16)>, Failed> {
        let entry = self.offset + Self::sq_bytes(self.entries) + u64::from(self.head) * CQE_BYTES;
        // This quadword has the Phase Tag, the CID and the status. It is loaded once, so that a controller that
        // changes the entry meanwhile cannot make them disagree. The load is an acquire: dword 0 is read after it.
        let word = memory.file().load(entry + 8)?;
        if (word & PHASE_TAG != 0) != self.phase {
            return Ok(None);
        }
        let result = memory.file().load(entry)? as u32;
        self.head = (self.head + 1) % self.entries;
        self.phase ^= self.head == 0;
        Ok(Some((Completion { result, ..Completion::parse(word) }, self.head)))
    }
}
