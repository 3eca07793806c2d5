//! A split virtqueue in driver memory (virtio 1.3, section 2.7), whose buffers may be anywhere in the domain.
//!
//! The driver waits for the chains that it has made available, so descriptors are allocated in order and all are free
//! when no chain is in flight. Each of the two indexes that driver and device share is accessed by one 64-bit access:
//! the available index as part of the ring's first 8 bytes, which only the driver writes, and the used index together
//! with the bytes before it. The used ring is placed so that its elements, too, can be read by one access each.

use passgate_backends::device::OwnMemory;
use passgate_bindings::{Failed, Iova};
use rustix::io::Errno;

/// Descriptor flags `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_WRITE` (2.7.5), in the second word of a descriptor.
const NEXT: u64 = 1 << 32;
const WRITE: u64 = 2 << 32;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const NO_INTERRUPT: u64 = 1;

/// A buffer: its first byte and its length in bytes.
pub(super) type Buffer = (Iova, u32);

/// The offsets of the three parts of a queue in driver memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A queue.
#[derive(Debug)]
pub(super) struct Queue {
    size: u16,
    layout: Layout,
    /// The offset of its doorbell in the device's notification structure.
    notify_offset: u64,
    /// The number of allocated descriptors.
    allocated: u16,
    /// The number of chains that the device has.
    in_flight: u16,
    /// The available index.
    available: u16,
    /// The used index up to which chains were taken.
    used: u16,
}

impl Queue {
    /// Makes an empty queue of `size` descriptors, a power of two, at `base` in driver memory, a multiple of 16.
    pub(super) fn new(memory: &OwnMemory, base: u64, size: u16) -> Result<Self, Failed> {
        let layout = layout(base, size);
        let end = layout.used + 6 + 8 * u64::from(size);
        memory.file().write(base, &vec![0; (end - base) as usize])?;
        memory.file().store(layout.available, NO_INTERRUPT)?;
        Ok(Self { size, layout, notify_offset: 0, allocated: 0, in_flight: 0, available: 0, used: 0 })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    pub(super) fn notify_offset(&self) -> u64 {
        self.notify_offset
    }

    pub(super) fn set_notify_offset(&mut self, offset: u64) {
        self.notify_offset = offset;
    }

    /// Makes a chain of buffers, first those that the device reads, then those that it writes, and makes it available.
    /// Returns the index of its first descriptor, which [`Queue::pop_used`] returns later. `ENOBUFS` if the queue is
    /// full.
    pub(super) fn submit(
        &mut self,
        memory: &OwnMemory,
        reads: &[Buffer],
        writes: &[Buffer],
    ) -> Result<u16, Failed> {
        if self.in_flight == 0 {
            self.allocated = 0;
        }
        let (head, count) = (self.allocated, reads.len() + writes.len());
        if usize::from(self.size - head) < count {
            return Err(Failed::new("a virtio queue", Errno::NOBUFS));
        }
        for (n, (at, len)) in reads.iter().chain(writes).enumerate() {
            let descriptor = self.layout.descriptors + 16 * u64::from(self.allocated);
            let direction = if n < reads.len() { 0 } else { WRITE };
            let next = if n + 1 < count { NEXT | u64::from(self.allocated + 1) << 48 } else { 0 };
            memory.file().store(descriptor, at.0)?;
            memory.file().store(descriptor + 8, u64::from(*len) | direction | next)?;
            self.allocated += 1;
        }
        self.make_available(memory, head)?;
        Ok(head)
    }

    /// Makes a chain available, either a new one or one that was used. The device may use it from here on.
    pub(super) fn make_available(&mut self, memory: &OwnMemory, head: u16) -> Result<(), Failed> {
        let entry = self.layout.available + 4 + 2 * u64::from(self.available % self.size);
        memory.file().write(entry, &head.to_le_bytes())?;
        self.available = self.available.wrapping_add(1);
        self.in_flight += 1;
        // The index is stored after the entry, by a store with release ordering (2.7.13).
        let first = memory.file().load(self.layout.available)?;
        memory.file().store(self.layout.available, first & !0xffff_0000 | u64::from(self.available) << 16)
    }

    /// Returns the next used chain, by its first descriptor, and the number of bytes that the device has written to it.
    /// Both come from the device and must be checked.
    pub(super) fn pop_used(&mut self, memory: &OwnMemory) -> Result<Option<(u32, u32)>, Failed> {
        let index = (memory.file().load(self.layout.used - 4)? >> 48) as u16; // the upper 16 bits
        if index == self.used || self.in_flight == 0 {
            return Ok(None);
        }
        let element = memory.file().load(self.layout.used + 4 + 8 * u64::from(self.used % self.size))?;
        self.used = self.used.wrapping_add(1);
        self.in_flight -= 1;
        Ok(Some((element as u32, (element >> 32) as u32))) // two words of 32 bits
    }
}

/// Returns the offsets of the parts of a queue at `base`, aligned as 2.7 requires. The used ring is at 4 modulo 8, so
/// that its elements, which follow 4 bytes later, are aligned for 64-bit accesses.
fn layout(base: u64, size: u16) -> Layout {
    let available = base + 16 * u64::from(size);
    let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(8) + 4;
    Layout { descriptors: base, available, used }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use passgate_backends::Domain;
    use passgate_sim::iommu::{Memory, Sim};

    use super::*;

    fn memory() -> OwnMemory {
        let domain: Arc<dyn Domain> = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
        OwnMemory::map(&domain, 1).unwrap()
    }

    /// The alignment that 2.7 requires, without overlap.
    #[test]
    fn layout_is_aligned_and_without_overlap() {
        for size in [2, 4, 16, 64, 256] {
            let (at, long) = (layout(4096, size), u64::from(size));
            assert_eq!(at.descriptors % 16, 0);
            assert_eq!(at.available % 8, 0);
            assert_eq!(at.used % 8, 4);
            assert!(at.descriptors + 16 * long <= at.available && at.available + 6 + 2 * long <= at.used - 4);
        }
    }

    #[test]
    fn chains_are_laid_out_as_a_device_reads_them() {
        let memory = memory();
        let mut queue = Queue::new(&memory, 0, 4).unwrap();
        let head = queue.submit(&memory, &[(Iova(0x1000), 10)], &[(Iova(0x2000), 20), (Iova(0x3000), 30)]);
        assert_eq!(head, Ok(0));
        let word = |at| memory.file().load(at).unwrap();
        assert_eq!([word(0), word(16), word(32)], [0x1000, 0x2000, 0x3000]);
        assert_eq!(word(8), 10 | 1 << 32 | 1 << 48, "read by the device, then number 1");
        assert_eq!(word(24), 20 | 3 << 32 | 2 << 48, "written, then number 2");
        assert_eq!(word(40), 30 | 2 << 32, "written, the last");
        assert_eq!(word(64) & 0xffff_ffff, 1 | 1 << 16, "no interrupts, one chain");
        let full = queue.submit(&memory, &[(Iova(0), 1)], &[(Iova(0), 1)]).unwrap_err();
        assert_eq!(full.errno, Errno::NOBUFS);
    }

    /// Three chains a round in a ring of eight, until all indexes have wrapped.
    #[test]
    fn used_chain_is_returned_once_and_frees_the_queue() {
        let memory = memory();
        let file = memory.file();
        let mut queue = Queue::new(&memory, 0, 8).unwrap();
        let Layout { available, used, .. } = queue.layout();
        for count in (0..70_000_u32).step_by(3) {
            for n in 0..3 {
                let head = queue.submit(&memory, &[(Iova(0), 1)], &[(Iova(0), 1)]).unwrap();
                let (slot, mut entry) = (u64::from((count + n) % 8), [0; 2]);
                file.read(available + 4 + 2 * slot, &mut entry).unwrap();
                assert_eq!(
                    (u32::from(head), u16::from_le_bytes(entry)),
                    (2 * n, head),
                    "chain {}",
                    count + n
                );
                assert_eq!(queue.pop_used(&memory), Ok(None));
            }
            for n in 0..3 {
                let element = u64::from(2 * n) | u64::from(count + n) << 32;
                file.store(used + 4 + 8 * u64::from((count + n) % 8), element).unwrap();
            }
            file.write(used + 2, &((count + 3) as u16).to_le_bytes()).unwrap(); // it wraps
            for n in 0..3 {
                assert_eq!(queue.pop_used(&memory), Ok(Some((2 * n, count + n))));
            }
            assert_eq!(queue.pop_used(&memory), Ok(None));
        }
        assert_eq!(file.load(used - 12).unwrap() >> 32, 0, "nothing is written behind the available ring");
    }
}
