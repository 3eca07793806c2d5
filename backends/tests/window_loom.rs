//! The admission window under every interleaving and every reordering that the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p passgate-backends --test window_loom --target-dir target/loom`; without the
//! cfg this file is empty. The property: after a page was closed and no request in flight over it was found, the page
//! may be unmapped, for no request over it is in flight, and none enters later.
#![cfg(loom)]

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use passgate_backends::{Entered, Segment, Window};
use passgate_bindings::{Iova, PageRange};

const A: u64 = 0x1000;
const B: u64 = 0x3000;
const C: u64 = 0x5000;

fn page(start: u64) -> PageRange<Iova> {
    PageRange::new(start, 0x1000).expect("a page")
}

fn over(start: u64) -> Segment {
    Segment { iova: Iova(start), len: 0x1000 }
}

/// A window of one slot with open pages, and a flag per page that is set while DMA to it is in flight.
struct World {
    window: Arc<Window>,
    busy: [AtomicBool; 3],
}

impl World {
    fn new(open: &[u64]) -> Arc<Self> {
        let window = Window::new(1, 2);
        open.iter().for_each(|start| window.open(page(*start)));
        Arc::new(Self { window, busy: [(); 3].map(|()| AtomicBool::new(false)) })
    }

    fn busy(&self, start: u64) -> &AtomicBool {
        &self.busy[(start >> 13) as usize]
    }

    /// Runs one request over these pages. Returns true if it entered.
    fn request(&self, pages: &[u64]) -> bool {
        let segments: Vec<_> = pages.iter().map(|start| over(*start)).collect();
        if self.window.enter(0, &segments) != Entered::In {
            return false;
        }
        pages.iter().for_each(|start| self.busy(*start).store(true, Ordering::Relaxed));
        pages.iter().for_each(|start| self.busy(*start).store(false, Ordering::Relaxed));
        self.window.leave(0);
        true
    }

    /// Closes a page and unmaps it, if no request in flight over it is found: then no DMA to it may run.
    fn unmap(&self, start: u64, unmapped: &AtomicBool) {
        self.window.close(page(start));
        if !self.window.overlapping(page(start)) {
            assert!(!self.busy(start).load(Ordering::Relaxed), "DMA to a page that is unmapped");
            unmapped.store(true, Ordering::Relaxed);
        }
    }
}

/// A request that has entered is always found by the closing side. The request stays in flight to the end here, so that
/// only the window separates the two.
#[test]
fn request_enters_or_close_finds_none() {
    loom::model(|| {
        let world = World::new(&[A]);
        let other = Arc::clone(&world);
        let enters = thread::spawn(move || other.window.enter(0, &[over(A)]) == Entered::In);
        world.window.close(page(A));
        let clear = !world.window.overlapping(page(A));
        let entered = enters.join().expect("joined");
        assert!(!(entered && clear), "a request in flight over the page was not found");
        assert_eq!(world.window.overlapping(page(A)), entered);
    });
}

/// A slot is reused, with more and with fewer ranges, while it is scanned: no request in flight over the page is
/// missed, neither the first nor the second.
#[test]
fn reused_slot_hides_no_request() {
    for (first, second) in [(&[A][..], &[B, A][..]), (&[B, A], &[A]), (&[B, C], &[A]), (&[A], &[B])] {
        loom::model(move || {
            let world = World::new(&[A, B, C]);
            let unmapped = Arc::new(AtomicBool::new(false));
            let (other, gone) = (Arc::clone(&world), Arc::clone(&unmapped));
            let io = thread::spawn(move || {
                other.request(first);
                // The second one stays in flight.
                let segments: Vec<_> = second.iter().map(|start| over(*start)).collect();
                let entered = other.window.enter(0, &segments) == Entered::In;
                (entered && second.contains(&A), gone)
            });
            world.unmap(A, &unmapped);
            let (over_a, gone) = io.join().expect("joined");
            assert!(!(over_a && gone.load(Ordering::Relaxed)), "{second:?} after {first:?} was not found");
        });
    }
}

/// If the closing side reads bounds of a later request, the DMA of the earlier one has ended.
#[test]
fn bounds_of_a_later_request_prove_the_end_of_the_earlier() {
    loom::model(|| {
        let world = World::new(&[A, B]);
        let other = Arc::clone(&world);
        let io = thread::spawn(move || {
            other.request(&[A]);
            other.request(&[B]);
        });
        world.unmap(A, &AtomicBool::new(false));
        io.join().expect("joined");
        assert!(world.window.idle());
    });
}

/// While the window is paused and idle no DMA runs; after the pause requests enter again.
#[test]
fn paused_and_idle_window_has_no_dma() {
    loom::model(|| {
        let world = World::new(&[A]);
        let other = Arc::clone(&world);
        let io = thread::spawn(move || other.request(&[A]));
        world.window.pause();
        if world.window.idle() {
            assert!(!world.busy(A).load(Ordering::Relaxed), "DMA during a pause with an idle window");
        }
        world.window.lift();
        io.join().expect("joined");
        assert!(world.request(&[A]), "the pause has ended");
    });
}

/// Requests entered before a void do not count any more; requests that enter after its pause do, also if their thread
/// was preempted during pause and void.
#[test]
fn void_ends_exactly_the_requests_before_it() {
    loom::model(|| {
        let world = World::new(&[A]);
        let other = Arc::clone(&world);
        let io = thread::spawn(move || other.window.enter(0, &[over(A)]) == Entered::In);
        world.window.pause();
        let before = !world.window.idle();
        world.window.void();
        world.window.lift();
        world.window.close(page(A));
        let clear = !world.window.overlapping(page(A));
        let entered = io.join().expect("joined");
        assert!(before || !(entered && clear), "a request that entered after the void was not found");
        if before && entered {
            // The request may have entered before the void or after it, because the scan may have found a failed
            // attempt.
            world.window.pause();
            world.window.void();
            assert!(world.window.idle());
        }
    });
}

/// A thread that has entered a page also sees the effects of the map before the page was opened.
#[test]
fn enter_synchronizes_with_open() {
    loom::model(|| {
        let world = World::new(&[]);
        let mapped = Arc::new(AtomicBool::new(false));
        let (other, done) = (Arc::clone(&world), Arc::clone(&mapped));
        let io = thread::spawn(move || {
            if other.window.enter(0, &[over(A)]) == Entered::In {
                assert!(done.load(Ordering::Relaxed), "entered before it was mapped");
            }
        });
        mapped.store(true, Ordering::Relaxed);
        world.window.open(page(A));
        io.join().expect("joined");
    });
}
