//! A split virtqueue in the driver's own memory (virtio 1.3, section 2.7), whose buffers may be anywhere in the domain.
//!
//! The driver waits for what it has offered, so descriptors are handed out one after the other and all come free when
//! nothing is under way. The two words that both sides look at change in one access each: the available index as part
//! of the ring's first 8 bytes, which only the driver writes, and the used index, for which the used ring is placed so
//! that its elements, too, can be read in one access.

use passgate_bindings::{Failed, Iova};
use rustix::io::Errno;

use crate::device::own::OwnMemory;

/// Descriptor flags (2.7.5), and that the driver wants no interrupt (2.7.6).
const NEXT: u64 = 1 << 32;
const WRITE: u64 = 2 << 32;
const NO_INTERRUPT: u64 = 1;

/// A buffer: where, and how many bytes.
pub(super) type Buffer = (Iova, u32);

/// Where the three parts of a queue are in the driver's memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A queue, and where it is up to.
#[derive(Debug)]
pub(super) struct Queue {
    size: u16,
    place: Place,
    /// Where it is notified, in the notification window.
    bell: u64,
    /// Descriptors handed out.
    taken: u16,
    /// Chains that the device has.
    out: u16,
    available: u16,
    used: u16,
}

impl Queue {
    /// An empty queue of `size` descriptors, a power of two, at `base` of the driver's memory, a multiple of 16.
    pub(super) fn new(memory: &OwnMemory, base: u64, size: u16) -> Result<Self, Failed> {
        let place = place(base, size);
        let end = place.used + 6 + 8 * u64::from(size);
        memory.file().write(base, &vec![0; (end - base) as usize])?;
        memory.file().store(place.available, NO_INTERRUPT)?;
        Ok(Self { size, place, bell: 0, taken: 0, out: 0, available: 0, used: 0 })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn place(&self) -> Place {
        self.place
    }

    pub(super) fn bell(&self) -> u64 {
        self.bell
    }

    pub(super) fn hang_bell(&mut self, bell: u64) {
        self.bell = bell;
    }

    /// Makes a chain of buffers, first those that the device reads, then those that it writes, and offers it. The
    /// chain's number comes back from [`Queue::take`]. `ENOBUFS` where the queue is full.
    pub(super) fn put(
        &mut self,
        memory: &OwnMemory,
        reads: &[Buffer],
        writes: &[Buffer],
    ) -> Result<u16, Failed> {
        if self.out == 0 {
            self.taken = 0;
        }
        let (head, count) = (self.taken, reads.len() + writes.len());
        if usize::from(self.size - head) < count {
            return Err(Failed::new("a virtio queue", Errno::NOBUFS));
        }
        for (n, (at, len)) in reads.iter().chain(writes).enumerate() {
            let descriptor = self.place.descriptors + 16 * u64::from(self.taken);
            let way = if n < reads.len() { 0 } else { WRITE };
            let next = if n + 1 < count { NEXT | u64::from(self.taken + 1) << 48 } else { 0 };
            memory.file().store(descriptor, at.0)?;
            memory.file().store(descriptor + 8, u64::from(*len) | way | next)?;
            self.taken += 1;
        }
        self.offer(memory, head)?;
        Ok(head)
    }

    /// Offers a chain, new or one that has come back. The device may see it from here on.
    pub(super) fn offer(&mut self, memory: &OwnMemory, head: u16) -> Result<(), Failed> {
        let slot = self.place.available + 4 + 2 * u64::from(self.available % self.size);
        memory.file().write(slot, &head.to_le_bytes())?;
        self.available = self.available.wrapping_add(1);
        self.out += 1;
        let first = memory.file().load(self.place.available)?;
        memory.file().store(self.place.available, first & !0xffff_0000 | u64::from(self.available) << 16)
    }

    /// The next chain that the device is done with, and how many bytes it says that it wrote. Neither is to be
    /// believed unchecked.
    pub(super) fn take(&mut self, memory: &OwnMemory) -> Result<Option<(u32, u32)>, Failed> {
        let index = (memory.file().load(self.place.used - 4)? >> 48) as u16; // the upper 16 bits
        if index == self.used || self.out == 0 {
            return Ok(None);
        }
        let element = memory.file().load(self.place.used + 4 + 8 * u64::from(self.used % self.size))?;
        self.used = self.used.wrapping_add(1);
        self.out -= 1;
        Ok(Some((element as u32, (element >> 32) as u32))) // two words of 32 bits
    }
}

fn place(base: u64, size: u16) -> Place {
    let available = base + 16 * u64::from(size);
    let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(8) + 4;
    Place { descriptors: base, available, used }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::iommu::Domain;
    use crate::iommu::sim::{Memory, Sim};

    fn memory() -> OwnMemory {
        let domain: Arc<dyn Domain> = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
        OwnMemory::map(&domain, 1).unwrap()
    }

    /// What the specification says of alignment (2.7), and no part over another.
    #[test]
    fn the_parts_of_a_queue_are_where_they_may_be() {
        for size in [2, 4, 16, 64, 256] {
            let (at, long) = (place(4096, size), u64::from(size));
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
        let head = queue.put(&memory, &[(Iova(0x1000), 10)], &[(Iova(0x2000), 20), (Iova(0x3000), 30)]);
        assert_eq!(head, Ok(0));
        let word = |at| memory.file().load(at).unwrap();
        assert_eq!([word(0), word(16), word(32)], [0x1000, 0x2000, 0x3000]);
        assert_eq!(word(8), 10 | 1 << 32 | 1 << 48, "read by the device, then number 1");
        assert_eq!(word(24), 20 | 3 << 32 | 2 << 48, "written, then number 2");
        assert_eq!(word(40), 30 | 2 << 32, "written, the last");
        assert_eq!(word(64) & 0xffff_ffff, 1 | 1 << 16, "no interrupts, one chain");
        let full = queue.put(&memory, &[(Iova(0), 1)], &[(Iova(0), 1)]).unwrap_err();
        assert_eq!(full.errno, Errno::NOBUFS);
    }

    /// Three chains a round in a ring of eight, until all indexes have wrapped.
    #[test]
    fn what_comes_back_is_counted_once_and_frees_the_queue() {
        let memory = memory();
        let file = memory.file();
        let mut queue = Queue::new(&memory, 0, 8).unwrap();
        let Place { available, used, .. } = queue.place();
        for count in (0..70_000_u32).step_by(3) {
            for n in 0..3 {
                let head = queue.put(&memory, &[(Iova(0), 1)], &[(Iova(0), 1)]).unwrap();
                let (slot, mut entry) = (u64::from((count + n) % 8), [0; 2]);
                file.read(available + 4 + 2 * slot, &mut entry).unwrap();
                assert_eq!(
                    (u32::from(head), u16::from_le_bytes(entry)),
                    (2 * n, head),
                    "chain {}",
                    count + n
                );
                assert_eq!(queue.take(&memory), Ok(None));
            }
            for n in 0..3 {
                let element = u64::from(2 * n) | u64::from(count + n) << 32;
                file.store(used + 4 + 8 * u64::from((count + n) % 8), element).unwrap();
            }
            file.write(used + 2, &((count + 3) as u16).to_le_bytes()).unwrap(); // it wraps
            for n in 0..3 {
                assert_eq!(queue.take(&memory), Ok(Some((2 * n, count + n))));
            }
            assert_eq!(queue.take(&memory), Ok(None));
        }
        assert_eq!(file.load(used - 12).unwrap() >> 32, 0, "behind the available ring nothing is written");
    }
}
