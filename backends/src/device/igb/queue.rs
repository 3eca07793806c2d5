//! A ring of 16-byte descriptors in the driver's own memory, as receive and transmit queues have them.

use passgate_bindings::{Failed, Iova, PAGE};

use crate::device::own::OwnMemory;

/// Descriptors in a ring: a multiple of 8, and more than any frame takes.
const SLOTS: u32 = 64;

/// A ring and where it is up to. The driver waits for each frame, so a ring is empty whenever one begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    /// Where the queue's registers are.
    pub(super) registers: u64,
    /// Where the ring is in the driver's memory.
    pub(super) offset: u64,
    tail: u32,
}

impl Queue {
    /// Bytes of a ring.
    pub(super) const BYTES: u32 = SLOTS * 16;

    /// An empty ring.
    pub(super) fn new(registers: u64, offset: u64) -> Self {
        Self { registers, offset, tail: 0 }
    }

    /// Appends a descriptor for a buffer at `at`, and says which one it is. The device sees it when the tail is told.
    pub(super) fn put(&mut self, memory: &OwnMemory, at: Iova, second: u64) -> Result<u32, Failed> {
        let slot = self.tail;
        memory.file().store(self.place(slot), at.0)?;
        memory.file().store(self.place(slot) + 8, second)?;
        self.tail = (slot + 1) % SLOTS;
        Ok(slot)
    }

    /// The second word of descriptor `slot`: the device writes there what became of it.
    pub(super) fn word(&self, memory: &OwnMemory, slot: u32) -> Result<u64, Failed> {
        memory.file().load(self.place(slot) + 8)
    }

    /// The descriptor after the last.
    pub(super) fn tail(self) -> u32 {
        self.tail
    }

    fn place(&self, slot: u32) -> u64 {
        self.offset + u64::from(slot) * 16
    }
}

/// The parts of `len` bytes from `at` that lie in one page each: contiguous for the device is not contiguous in
/// the machine, and QEMU sends no frame with a piece that is not.
pub(super) fn pieces(at: Iova, len: u64) -> impl Iterator<Item = (Iova, u64)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let from = Iova(at.0 + done);
        let piece = (PAGE - from.0 % PAGE).min(len - done);
        done += piece;
        (piece > 0).then_some((from, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_with_their_page_and_cover_every_byte() {
        let found: Vec<_> = pieces(Iova(0x1ffe), 0x1004).collect();
        assert_eq!(found, [(Iova(0x1ffe), 2), (Iova(0x2000), 0x1000), (Iova(0x3000), 2)]);
        assert_eq!(pieces(Iova(0x1000), 1).collect::<Vec<_>>(), [(Iova(0x1000), 1)]);
        assert_eq!(pieces(Iova(0x1000), PAGE).count(), 1);
    }
}
