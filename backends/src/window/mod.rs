//! What I/O threads may touch, published without locks.
//!
//! A driver that starts DMA into guest memory by itself must never start one into a page that the gate is taking
//! away, and the gate must never take a page while such a DMA runs. A [`Window`] is what the two sides agree by: the
//! pages that are open, and one slot per request in flight with the memory that it touches. [`Windowed`] is a domain
//! that keeps it true.
//!
//! The I/O side ([`Window::enter`], [`Window::leave`]) never takes a lock, never allocates and makes no system call.
//! The gate's side closes pages **before** it takes them away and opens them **after** they are mapped; it may wait.
//!
//! # The race, and why it is none
//!
//! An I/O thread wants in while the gate closes the same page. Each side writes its own word and then reads the
//! other's (Dekker's pattern, also that of hazard pointers):
//!
//! ```text
//! I/O thread, enter                       gate, close and then a look
//!   a. slot := the memory of the request    c. bit of the page := closed
//!      fence(SeqCst)                           fence(SeqCst)
//!   b. reads the bit of the page            d. reads the slots
//! ```
//!
//! Without the fences both may read the old value: a processor keeps its stores in a buffer of its own, and a later
//! load of another word overtakes them, on x86 too. No acquire or release forbids that, for it orders loads after
//! loads and stores after stores, never a load after an earlier store. Of two SeqCst fences one comes first in the
//! one order that all threads agree on, and whatever was stored before the first is read after the second. So either
//! the I/O thread reads at b that the page is closed, withdraws, and has done nothing; or the gate reads at d that
//! the memory is in use, and waits. It may be both; it is never neither.
//!
//! A slot is used again while the gate may still read it, so it can read the number of ranges of one request and the
//! bounds of the next. That is harmless. While a request is in flight its slot does not change: so whoever reads
//! another request's bounds knows that the one before has left, and that it is the next one that he may
//! misread; and of the next one, either its fence came before the gate's (then nothing older than it is read) or it
//! came later (then it finds the page closed). What is misread costs another look at most.
//!
//! Because of the same argument a slot that was seen clear of a closed page once **stays** clear of it: waiting
//! looks at every slot in turn and never twice at one that was clear.
//!
//! A pause is the same with one word for all pages. [`Window::void`] is for when something stronger than waiting has
//! proved that no DMA runs: what was entered before counts no more, for its era is over. Who took the number of an era
//! that ended before he was in (he slept through the whole pause) finds another number after his fence, and
//! publishes again.
//!
//! `backends/tests/window_loom.rs` tries all interleavings of this, with the reorderings that the memory model allows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_bindings::{Iova, PageRange};

mod pages;
mod slots;
mod sync;
mod windowed;

use pages::Pages;
use slots::Slots;
use sync::{AtomicBool, AtomicU64, Ordering, fence};
pub use windowed::Windowed;

/// No IOVA that a window opens reaches this (2^48, what an IOMMU of four levels translates).
pub const REACH: u64 = 1 << 48;

/// How often [`Window::await_clear`] looks before it sleeps between looks,
const SPINS: u32 = 200;
/// and how long then.
const NAP: Duration = Duration::from_micros(50);

/// Memory that one request touches. Nobody has checked it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte.
    pub iova: Iova,
    /// Its length in bytes.
    pub len: u32,
}

/// How an attempt to enter went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// The request counts as in flight until [`Window::leave`]; its memory stays mapped as long.
    In,
    /// The window is paused. Nothing was done; try again later.
    Paused,
    /// Some page is not open, or the segments are none that could be (empty, or beyond [`REACH`]). Nothing was done.
    Closed,
}

/// The pages that I/O threads may touch, and what they touch now.
///
/// A slot belongs to one thread at a time; everything else may be called from any thread.
#[derive(Debug)]
pub struct Window {
    pages: Pages,
    slots: Slots,
    paused: AtomicBool,
    /// Grows with every [`Window::void`]; what was entered in an earlier one does not count.
    era: AtomicU64,
}

impl Window {
    /// A window without open pages, for `slots` requests in flight, each published as at most `segments` ranges
    /// (at least one, at most 4096): where a request has more, one of them spans several.
    pub fn new(slots: usize, segments: usize) -> Arc<Self> {
        Arc::new(Self {
            pages: Pages::new(),
            slots: Slots::new(slots, segments),
            paused: AtomicBool::new(false),
            era: AtomicU64::new(0),
        })
    }

    /// Publishes a request in a slot, and says whether it may be started. One without segments touches no memory but
    /// counts for [`Window::idle`]. A slot that is still occupied is left first.
    pub fn enter(&self, slot: usize, segments: &[Segment]) -> Entered {
        if slot >= self.slots.len() || !segments.iter().all(|segment| segment.is_sound()) {
            return Entered::Closed;
        }
        loop {
            let era = self.era.load(Ordering::Relaxed);
            self.slots.publish(slot, era, runs(segments));
            fence(Ordering::SeqCst);
            // Acquire: whoever sees that a pause has ended sees the era that it left.
            if self.paused.load(Ordering::Acquire) {
                self.slots.clear(slot);
                return Entered::Paused;
            }
            if self.era.load(Ordering::Relaxed) != era {
                continue;
            }
            if runs(segments).all(|(start, end)| self.pages.all_open(start, end)) {
                return Entered::In;
            }
            self.slots.clear(slot);
            return Entered::Closed;
        }
    }

    /// The request in this slot is over: the device has said so, or it was never started.
    pub fn leave(&self, slot: usize) {
        if slot < self.slots.len() {
            self.slots.clear(slot);
        }
    }

    /// These pages are mapped: requests may touch them. What lies beyond [`REACH`] stays closed.
    pub fn open(&self, range: PageRange<Iova>) {
        self.pages.open(range.start().0, range.end().0.min(REACH));
    }

    /// From now on no request enters that touches these pages; some may be in flight.
    pub fn close(&self, range: PageRange<Iova>) {
        self.pages.close(range.start().0, range.end().0.min(REACH));
    }

    /// Whether something is in flight over these pages. After [`Window::close`] a `false` is final.
    pub fn overlapping(&self, range: PageRange<Iova>) -> bool {
        let era = self.look();
        (0..self.slots.len()).any(|slot| self.slots.overlaps(slot, era, range.start().0, range.end().0))
    }

    /// Whether nothing is in flight. After [`Window::pause`] a `true` is final until [`Window::lift`].
    pub fn idle(&self) -> bool {
        let era = self.look();
        !(0..self.slots.len()).any(|slot| self.slots.is_busy(slot, era))
    }

    /// From now on nothing enters at all; some may be in flight.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::Release);
    }

    /// Ends the pause.
    pub fn lift(&self) {
        self.paused.store(false, Ordering::Release);
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// What is in flight counts no more. Only while paused, and only after it is proved that no DMA of it runs (bus
    /// mastering off, detached, reset). Whoever calls this sees to it that each such request is entered again before
    /// the device is told of it again.
    pub fn void(&self) {
        self.era.fetch_add(1, Ordering::Release);
    }

    /// Waits until nothing is in flight over these closed pages, and says whether that came in time.
    pub fn await_clear(&self, range: PageRange<Iova>, timeout: Duration) -> bool {
        self.await_slots(timeout, |slot, era| self.slots.overlaps(slot, era, range.start().0, range.end().0))
    }

    /// Waits, paused, until nothing is in flight at all, and says whether that came in time.
    pub fn await_idle(&self, timeout: Duration) -> bool {
        self.await_slots(timeout, |slot, era| self.slots.is_busy(slot, era))
    }

    /// The era that counts, and the fence between what was closed and the look at the slots that comes now.
    fn look(&self) -> u64 {
        let era = self.era.load(Ordering::Acquire);
        fence(Ordering::SeqCst);
        era
    }

    fn await_slots(&self, timeout: Duration, busy: impl Fn(usize, u64) -> bool) -> bool {
        let until = Instant::now() + timeout;
        let mut looks = 0;
        for slot in 0..self.slots.len() {
            while busy(slot, self.look()) {
                looks += 1;
                if looks < SPINS {
                    std::hint::spin_loop();
                } else if Instant::now() >= until {
                    return false;
                } else {
                    std::thread::sleep(NAP);
                }
            }
        }
        true
    }
}

impl Segment {
    fn end(self) -> u64 {
        self.iova.0.saturating_add(u64::from(self.len))
    }

    fn is_sound(self) -> bool {
        self.len > 0 && self.end() <= REACH
    }
}

/// The segments as (first byte, byte after the last), neighbours that touch as one. All are sound.
fn runs(segments: &[Segment]) -> impl Iterator<Item = (u64, u64)> {
    let mut rest = segments.iter().peekable();
    std::iter::from_fn(move || {
        let first = rest.next()?;
        let mut end = first.end();
        while let Some(next) = rest.next_if(|next| next.iova.0 == end) {
            end = next.end();
        }
        Some((first.iova.0, end))
    })
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
