//! A submission queue and its completion queue, in the driver's own memory.

use passgate_bindings::{Failed, Iova, PAGE};

use super::command::{Command, Completion};
use crate::device::own::OwnMemory;

/// Slots of each queue: a page of commands.
pub(super) const SLOTS: u16 = 64;

/// In a completion: whether it is of this round.
const PHASE: u64 = 1 << 48;

/// One pair, and where it is up to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// Its number: 0 for the admin queues.
    pub(super) id: u16,
    /// Where its two pages are: commands, then completions.
    offset: u64,
    tail: u16,
    head: u16,
    /// The phase bit of this round.
    phase: bool,
    last: u16,
}

impl Pair {
    /// Pages of a pair.
    pub(super) const PAGES: usize = 2;

    /// An empty pair at `offset`.
    pub(super) fn empty(id: u16, offset: u64, memory: &OwnMemory) -> Result<Self, Failed> {
        memory.file().write(offset, &[0; PAGE as usize * Self::PAGES])?;
        Ok(Self { id, offset, tail: 0, head: 0, phase: true, last: 0 })
    }

    /// Where the device finds the commands, and the completions.
    pub(super) fn places(&self, memory: &OwnMemory) -> (Iova, Iova) {
        (memory.iova(self.offset), memory.iova(self.offset + PAGE))
    }

    /// Appends a command. The device sees it once the tail, which is returned, is told; its identifier is
    /// [`Pair::last`].
    pub(super) fn put(&mut self, memory: &OwnMemory, command: Command) -> Result<u16, Failed> {
        self.last = self.last.wrapping_add(1);
        let mut words = command.0;
        words[0] |= u64::from(self.last) << 16;
        for (nth, word) in (0..).zip(words) {
            memory.file().store(self.offset + u64::from(self.tail) * 64 + nth * 8, word)?;
        }
        self.tail = (self.tail + 1) % SLOTS;
        Ok(self.tail)
    }

    /// The identifier of the last command.
    pub(super) fn last(&self) -> u16 {
        self.last
    }

    /// The next completion, if it has come, and the head to tell.
    pub(super) fn take(&mut self, memory: &OwnMemory) -> Result<Option<(Completion, u16)>, Failed> {
        let at = self.offset + PAGE + u64::from(self.head) * 16;
        // One word holds all that is looked at, so nothing is read twice.
        let word = memory.file().load(at + 8)?;
        if (word & PHASE != 0) != self.phase {
            return Ok(None);
        }
        self.head = (self.head + 1) % SLOTS;
        self.phase ^= self.head == 0;
        Ok(Some((Completion::of(word), self.head)))
    }
}
