//! The admission window: which pages I/O threads may use for DMA, and which they are using, published without locks.
//!
//! A driver that starts DMA into guest memory on its own must never start one into a page that the gate is unmapping,
//! and the gate must never unmap a page while such a DMA is in flight. A [`Window`] is the shared state by which the
//! two sides ensure this: the pages that are open, and one slot per request in flight with the memory that it accesses.
//! [`Windowed`] is a domain that maintains it.
//!
//! The I/O side ([`Window::enter`], [`Window::leave`]) never takes a lock, never allocates and makes no system call.
//! The gate's side closes pages **before** it unmaps them and opens them **after** they are mapped; it may wait.
//!
//! # The race between enter and close
//!
//! An I/O thread enters while the gate closes the same page. Each side writes its own word and then reads the other's
//! (Dekker's algorithm, as in hazard pointers):
//!
//! ```text
//! I/O thread, enter                       gate, close and then a scan
//!   a. slot := the memory of the request    c. bit of the page := closed
//!      fence(SeqCst)                           fence(SeqCst)
//!   b. reads the bit of the page            d. reads the slots
//! ```
//!
//! Without the fences both may read the old value: a processor buffers its stores, and a later load of another word can
//! overtake them, on x86 too. Acquire and release do not prevent that, because they never order a load after an earlier
//! store. Of two SeqCst fences one comes first in the single total order, and whatever was stored before the first is
//! visible after the second. So either the I/O thread reads at b that the page is closed, clears its slot, and has done
//! nothing; or the gate reads at d that the memory is in use, and waits. Both may happen; at least one does.
//!
//! A slot may be reused while the gate reads it, so the gate can read the number of ranges of one request and the
//! bounds of the next. That is harmless. While a request is in flight its slot does not change: so if the gate reads
//! the bounds of a later request, the earlier request has left, and only the later one can be misread; and of that one,
//! either its fence came before the gate's (then no older value is read), or it came after (then the request finds the
//! page closed). A misread slot costs one more poll at most.
//!
//! By the same argument a slot that was once seen not to overlap a closed page **never** overlaps it later: so waiting
//! polls one slot after the other, and none again.
//!
//! A pause works in the same way, with one word for all pages. [`Window::void`] is used when something stronger than
//! waiting has proved that no DMA runs: requests entered before do not count any more, because their era is over. A
//! thread that has read the era before a pause and publishes only after it finds another era after its fence, and
//! publishes again.
//!
//! `backends/tests/window_loom.rs` checks all interleavings, with the reorderings that the memory model allows.

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

/// The end of the IOVAs that a window can open (2^48, the address space of an IOMMU page table of four levels).
pub const REACH: u64 = 1 << 48;

/// The number of polls for which a wait spins before it sleeps between polls.
const SPIN_POLLS: u32 = 200;
/// The time between polls after that.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// A range of memory that one request accesses, as given by the guest: not checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte.
    pub iova: Iova,
    /// Its length in bytes.
    pub len: u32,
}

/// The result of [`Window::enter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// The request is in flight until [`Window::leave`]; its memory stays mapped until then.
    In,
    /// The window is paused, and the request has not entered. To be tried again later.
    Paused,
    /// Some page is not open, or a segment is invalid (empty, or beyond [`REACH`]), and the request has not entered.
    Closed,
}

/// The pages that I/O threads may access, and the requests in flight.
///
/// A slot belongs to one thread at a time; all other methods may be called from any thread.
#[derive(Debug)]
pub struct Window {
    pages: Pages,
    slots: Slots,
    paused: AtomicBool,
    /// The number of calls of [`Window::void`]. Requests entered in an earlier era do not count.
    era: AtomicU64,
}

impl Window {
    /// Makes a window without open pages, for `slots` requests in flight, each published as at most `segments` ranges
    /// (from 1 to 4096). If a request has more, the last published range spans all of the rest.
    pub fn new(slots: usize, segments: usize) -> Arc<Self> {
        Arc::new(Self {
            pages: Pages::new(),
            slots: Slots::new(slots, segments),
            paused: AtomicBool::new(false),
            era: AtomicU64::new(0),
        })
    }

    /// Publishes a request in a slot, and returns whether it may be started. A request without segments accesses no
    /// memory but counts for [`Window::idle`]. A request that is still in the slot leaves first.
    pub fn enter(&self, slot: usize, segments: &[Segment]) -> Entered {
        if slot >= self.slots.len() || !segments.iter().all(|segment| segment.is_valid()) {
            return Entered::Closed;
        }
        loop {
            let era = self.era.load(Ordering::Relaxed);
            self.slots.publish(slot, era, runs(segments));
            fence(Ordering::SeqCst);
            // Acquire, with the release in `lift`: a thread that reads that a pause has ended also reads its new era
            // below.
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

    /// Removes the request in this slot. The device has completed it, or it was never started.
    pub fn leave(&self, slot: usize) {
        if slot < self.slots.len() {
            self.slots.clear(slot);
        }
    }

    /// Opens pages, which are mapped. Pages beyond [`REACH`] stay closed.
    pub fn open(&self, range: PageRange<Iova>) {
        self.pages.open(range.start().0, range.end().0.min(REACH));
    }

    /// Closes pages: no further request enters that accesses them; some may be in flight.
    pub fn close(&self, range: PageRange<Iova>) {
        self.pages.close(range.start().0, range.end().0.min(REACH));
    }

    /// Returns true while a request in flight accesses these pages. After [`Window::close`] a `false` is final.
    pub fn overlapping(&self, range: PageRange<Iova>) -> bool {
        let era = self.begin_scan();
        (0..self.slots.len()).any(|slot| self.slots.overlaps(slot, era, range.start().0, range.end().0))
    }

    /// Returns true while no request is in flight. After [`Window::pause`] a `true` is final until [`Window::lift`].
    pub fn idle(&self) -> bool {
        let era = self.begin_scan();
        !(0..self.slots.len()).any(|slot| self.slots.is_busy(slot, era))
    }

    /// Pauses the window: no further request enters; some may be in flight.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::Release);
    }

    /// Ends the pause.
    pub fn lift(&self) {
        self.paused.store(false, Ordering::Release);
    }

    /// Returns true while the window is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Ends the era: requests that are in flight now do not count any more. Only while paused, and only after it is
    /// proved that no DMA of them runs (bus mastering off, detached, reset). The caller must enter each such request
    /// again before it submits it to the device again.
    pub fn void(&self) {
        self.era.fetch_add(1, Ordering::Release);
    }

    /// Waits until no request in flight accesses these pages, which must be closed. Returns false after `timeout`.
    pub fn await_clear(&self, range: PageRange<Iova>, timeout: Duration) -> bool {
        self.await_slots(timeout, |slot, era| self.slots.overlaps(slot, era, range.start().0, range.end().0))
    }

    /// Waits until no request is in flight; the window must be paused. Returns false after `timeout`.
    pub fn await_idle(&self, timeout: Duration) -> bool {
        self.await_slots(timeout, |slot, era| self.slots.is_busy(slot, era))
    }

    /// Returns the current era, after the fence between the closing of pages and the scan of the slots that follows.
    fn begin_scan(&self) -> u64 {
        let era = self.era.load(Ordering::Acquire);
        fence(Ordering::SeqCst);
        era
    }

    fn await_slots(&self, timeout: Duration, busy: impl Fn(usize, u64) -> bool) -> bool {
        let until = Instant::now() + timeout;
        let mut polls = 0;
        for slot in 0..self.slots.len() {
            while busy(slot, self.begin_scan()) {
                polls += 1;
                if polls < SPIN_POLLS {
                    std::hint::spin_loop();
                } else if Instant::now() >= until {
                    return false;
                } else {
                    std::thread::sleep(POLL_INTERVAL);
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

    fn is_valid(self) -> bool {
        self.len > 0 && self.end() <= REACH
    }
}

/// Returns the segments as (first byte, byte after the last), adjacent ones joined. All must be valid.
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
