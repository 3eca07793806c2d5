//! The requests in flight, each with the memory that it accesses. Written by I/O threads, read by the gate's side.
//!
//! A slot is one word (era, busy flag, number of ranges) and its ranges in another array. The words are contiguous, so
//! that a scan of all of them reads few cache lines; the slots of one queue are adjacent, so that threads seldom share
//! a cache line.

use super::sync::{AtomicU64, Ordering, fence};

/// The bit of a slot's word that is set while it has a request.
const BUSY: u64 = 1 << 15;
/// The bits of a slot's word with the number of ranges.
const COUNT_MASK: u64 = BUSY - 1;
/// The lowest bit of a slot's word with the era.
const ERA_SHIFT: u32 = 16;

#[derive(Debug)]
pub(super) struct Slots {
    words: Box<[AtomicU64]>,
    /// First byte and byte after the last of each range, `segments` ranges per slot.
    bounds: Box<[[AtomicU64; 2]]>,
    /// The maximum number of ranges in a slot.
    segments: usize,
}

impl Slots {
    pub(super) fn new(slots: usize, segments: usize) -> Self {
        let segments = segments.clamp(1, 4096);
        Self {
            words: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            bounds: (0..slots * segments).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect(),
            segments,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    /// Writes a request into a slot. The caller must issue a SeqCst fence after it.
    pub(super) fn publish(&self, slot: usize, era: u64, runs: impl Iterator<Item = (u64, u64)>) {
        let bounds = self.bounds(slot);
        // With the fence in `overlaps`: whoever reads one of the bounds stored below has also seen the slot cleared, so
        // the request that was in it before has left.
        self.clear(slot);
        fence(Ordering::Release);
        let mut count = 0;
        for (start, end) in runs {
            match bounds.get(count) {
                Some([first, after]) => {
                    first.store(start, Ordering::Relaxed);
                    after.store(end, Ordering::Relaxed);
                    count += 1;
                }
                // All ranges are used: the last one is extended to this one too. It may only become larger, never
                // smaller.
                None => {
                    let [first, after] = &bounds[count - 1];
                    first.store(first.load(Ordering::Relaxed).min(start), Ordering::Relaxed);
                    after.store(after.load(Ordering::Relaxed).max(end), Ordering::Relaxed);
                }
            }
        }
        self.words[slot].store(era << ERA_SHIFT | BUSY | count as u64, Ordering::Release);
    }

    pub(super) fn clear(&self, slot: usize) {
        self.words[slot].store(0, Ordering::Release);
    }

    /// Returns true if a slot has a request of this era or a later one. The caller must have issued a SeqCst fence.
    pub(super) fn is_busy(&self, slot: usize, era: u64) -> bool {
        Self::is_current(self.words[slot].load(Ordering::Acquire), era)
    }

    /// Returns true if a slot has such a request that accesses a byte from `start` to before `end`.
    pub(super) fn overlaps(&self, slot: usize, era: u64, start: u64, end: u64) -> bool {
        let word = self.words[slot].load(Ordering::Acquire);
        let ranges = self.bounds(slot).iter().take((word & COUNT_MASK) as usize);
        let overlaps = Self::is_current(word, era)
            && ranges
                .map(|[first, after]| (first.load(Ordering::Relaxed), after.load(Ordering::Relaxed)))
                .any(|(first, after)| first < end && start < after);
        // Pairs with the release fence in `publish`: whatever happened before a bound was stored that was read here,
        // happened before the return of this function.
        fence(Ordering::Acquire);
        overlaps
    }

    /// Returns true if a slot's word is of a request of `era` or a later one. A later one is possible because the
    /// caller has read the era earlier.
    fn is_current(word: u64, era: u64) -> bool {
        word & BUSY != 0 && word >> ERA_SHIFT >= era
    }

    fn bounds(&self, slot: usize) -> &[[AtomicU64; 2]] {
        &self.bounds[slot * self.segments..][..self.segments]
    }
}
