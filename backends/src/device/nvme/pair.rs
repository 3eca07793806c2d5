//! A submission queue and its completion queue, in the driver's own memory.

use passgate_bindings::{Failed, Iova, PAGE};

use super::command::{Command, Completion};
use crate::device::own::OwnMemory;

/// Bytes of a command, and of a completion.
const COMMAND: u64 = 64;
const COMPLETION: u64 = 16;

/// In a completion: whether it is of this round.
const PHASE: u64 = 1 << 48;

/// One pair, and where it is up to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// Its number: 0 for the admin queues.
    pub(super) id: u16,
    /// Entries of each queue.
    pub(super) slots: u16,
    /// Where the commands are; behind them, from the next page on, the completions.
    offset: u64,
    tail: u16,
    head: u16,
    /// The phase bit of this round.
    phase: bool,
}

impl Pair {
    /// Bytes of a pair: whole pages.
    pub(super) const fn size(slots: u16) -> u64 {
        Self::commands(slots) + (COMPLETION * slots as u64).next_multiple_of(PAGE)
    }

    const fn commands(slots: u16) -> u64 {
        (COMMAND * slots as u64).next_multiple_of(PAGE)
    }

    /// An empty pair at `offset`.
    pub(super) fn empty(id: u16, slots: u16, offset: u64, memory: &OwnMemory) -> Result<Self, Failed> {
        memory.file().write(offset, &vec![0; Self::size(slots) as usize])?;
        Ok(Self::emptied(id, slots, offset))
    }

    /// The pair at `offset`, which somebody else has emptied.
    pub(super) fn emptied(id: u16, slots: u16, offset: u64) -> Self {
        Self { id, slots, offset, tail: 0, head: 0, phase: true }
    }

    /// Where the device finds the commands, and the completions.
    pub(super) fn places(&self, memory: &OwnMemory) -> (Iova, Iova) {
        (memory.iova(self.offset), memory.iova(self.offset + Self::commands(self.slots)))
    }

    /// Appends a command by the name of `id`; there must be room. The device sees it once it is told the tail, which is
    /// returned.
    pub(super) fn put(&mut self, memory: &OwnMemory, command: Command, id: u16) -> Result<u16, Failed> {
        let mut words = command.0;
        words[0] |= u64::from(id) << 16;
        for (nth, word) in (0..).zip(words) {
            memory.file().store(self.offset + u64::from(self.tail) * COMMAND + nth * 8, word)?;
        }
        self.tail = (self.tail + 1) % self.slots;
        Ok(self.tail)
    }

    /// The tail, as the device is to be told.
    pub(super) fn tail(&self) -> u16 {
        self.tail
    }

    /// The next completion, if it has come, and the head to tell.
    pub(super) fn take(&mut self, memory: &OwnMemory) -> Result<Option<(Completion, u16)>, Failed> {
        let at = self.offset + Self::commands(self.slots) + u64::from(self.head) * COMPLETION;
        // One word holds all that decides, so nothing is read twice.
        let word = memory.file().load(at + 8)?;
        if (word & PHASE != 0) != self.phase {
            return Ok(None);
        }
        let result = memory.file().load(at)? as u32;
        self.head = (self.head + 1) % self.slots;
        self.phase ^= self.head == 0;
        Ok(Some((Completion { result, ..Completion::of(word) }, self.head)))
    }
}
