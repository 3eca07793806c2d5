//! The requests in flight, each with the memory that it touches. Written by I/O threads, read by the gate's side.
//!
//! A slot is one word (era, occupied, number of ranges) and its ranges beside it. The words lie together, so that a
//! look at all of them touches few cache lines; the slots of one queue are neighbours, so that threads seldom share
//! one.

use super::sync::{AtomicU64, Ordering, fence};

/// In a slot's word: it holds a request.
const BUSY: u64 = 1 << 15;
/// In a slot's word: its ranges.
const COUNT: u64 = BUSY - 1;
/// In a slot's word: where the era begins.
const ERA: u32 = 16;

#[derive(Debug)]
pub(super) struct Slots {
    words: Box<[AtomicU64]>,
    /// First byte and byte after the last, `segments` times per slot.
    bounds: Box<[[AtomicU64; 2]]>,
    /// Ranges that a slot holds.
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

    /// Writes a request into a slot. The caller's fence comes after it.
    pub(super) fn publish(&self, slot: usize, era: u64, runs: impl Iterator<Item = (u64, u64)>) {
        let bounds = self.bounds(slot);
        // Who reads one of the bounds below knows that whatever was in this slot before has left it.
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
                // No room: the last range is made to span this one too. Never less than the truth.
                None => {
                    let [first, after] = &bounds[count - 1];
                    first.store(first.load(Ordering::Relaxed).min(start), Ordering::Relaxed);
                    after.store(after.load(Ordering::Relaxed).max(end), Ordering::Relaxed);
                }
            }
        }
        self.words[slot].store(era << ERA | BUSY | count as u64, Ordering::Release);
    }

    pub(super) fn clear(&self, slot: usize) {
        self.words[slot].store(0, Ordering::Release);
    }

    /// Whether a slot holds a request of this era or a later one. The caller's fence comes before it.
    pub(super) fn is_busy(&self, slot: usize, era: u64) -> bool {
        Self::counts(self.words[slot].load(Ordering::Acquire), era)
    }

    /// Whether it holds one that touches a byte from `start` to before `end`.
    pub(super) fn overlaps(&self, slot: usize, era: u64, start: u64, end: u64) -> bool {
        let word = self.words[slot].load(Ordering::Acquire);
        let ranges = self.bounds(slot).iter().take((word & COUNT) as usize);
        let overlaps = Self::counts(word, era)
            && ranges
                .map(|[first, after]| (first.load(Ordering::Relaxed), after.load(Ordering::Relaxed)))
                .any(|(first, after)| first < end && start < after);
        // With the fence in `publish`: what came before a bound that was read, came before this.
        fence(Ordering::Acquire);
        overlaps
    }

    fn counts(word: u64, era: u64) -> bool {
        word & BUSY != 0 && word >> ERA >= era
    }

    fn bounds(&self, slot: usize) -> &[[AtomicU64; 2]] {
        &self.bounds[slot * self.segments..][..self.segments]
    }
}
