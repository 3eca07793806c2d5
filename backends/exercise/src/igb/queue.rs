//! A descriptor ring of a receive or transmit queue in driver memory. A descriptor is 16 bytes long.

use passgate_backends::device::OwnMemory;
use passgate_bindings::{Failed, Iova, PAGE};

/// The number of descriptors in a ring: a multiple of 8, and more than any frame needs.
const RING_SIZE: u32 = 64;

/// A ring and its tail. The driver waits for each frame, so the ring is empty before the next one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    /// The offset of the queue's registers in BAR 0.
    pub(super) registers: u64,
    /// The offset of the ring in driver memory.
    pub(super) offset: u64,
    tail: u32,
}

impl Queue {
    /// The length of a ring in bytes.
    pub(super) const BYTES: u32 = RING_SIZE * 16;

    /// Makes an empty ring.
    pub(super) fn new(registers: u64, offset: u64) -> Self {
        Self { registers, offset, tail: 0 }
    }

    /// Appends a descriptor with the buffer address `at` and this second word. Returns its index. The device may use it
    /// once the tail register is written.
    pub(super) fn append(&mut self, memory: &OwnMemory, at: Iova, second: u64) -> Result<u32, Failed> {
        let index = self.tail;
        memory.file().store(self.descriptor(index), at.0)?;
        memory.file().store(self.descriptor(index) + 8, second)?;
        self.tail = (index + 1) % RING_SIZE;
        Ok(index)
    }

    /// Returns the second word of a descriptor, to which the device writes the status.
    pub(super) fn word(&self, memory: &OwnMemory, index: u32) -> Result<u64, Failed> {
        memory.file().load(self.descriptor(index) + 8)
    }

    /// Returns the index after the last descriptor.
    pub(super) fn tail(self) -> u32 {
        self.tail
    }

    /// Returns the offset of a descriptor in driver memory.
    fn descriptor(&self, index: u32) -> u64 {
        self.offset + u64::from(index) * 16
    }
}

/// Returns the parts of `len` bytes from `at` on that lie in one page each: pages at contiguous IOVAs are not
/// contiguous in physical memory, and QEMU does not send a frame with a buffer that is not.
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
