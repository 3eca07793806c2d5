//! The window under every interleaving and every reordering that the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p passgate-backends --test window_loom --target-dir target/loom`; without the
//! cfg there is nothing here. What is promised: whoever closes a page and then sees nothing in flight over it may
//! take it away, for no request is in, and none comes in.
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

/// A window of one slot with pages open, and a flag per page: whether DMA into it is under way.
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

    /// One request over these pages; says whether it ran.
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

    /// Takes a page away, if nothing is in flight over it: then no DMA runs, now or later.
    fn take(&self, start: u64, taken: &AtomicBool) {
        self.window.close(page(start));
        if !self.window.overlapping(page(start)) {
            assert!(!self.busy(start).load(Ordering::Relaxed), "DMA runs into a page that is being taken");
            taken.store(true, Ordering::Relaxed);
        }
    }
}

/// Never both: in over the page, and the closing side saw nothing. The request stays in flight to the end here, so
/// that nothing but the window can keep the two apart.
#[test]
fn one_enters_or_the_other_sees_it() {
    loom::model(|| {
        let world = World::new(&[A]);
        let other = Arc::clone(&world);
        let enters = thread::spawn(move || other.window.enter(0, &[over(A)]) == Entered::In);
        world.window.close(page(A));
        let clear = !world.window.overlapping(page(A));
        let entered = enters.join().expect("joined");
        assert!(!(entered && clear), "in over a page of which nothing was seen");
        assert_eq!(world.window.overlapping(page(A)), entered);
    });
}

/// A slot is left and used again, with more ranges and fewer, while it is looked at: no request in flight over the
/// page is overlooked, whichever of them it is.
#[test]
fn a_slot_used_again_hides_nothing() {
    for (first, second) in [(&[A][..], &[B, A][..]), (&[B, A], &[A]), (&[B, C], &[A]), (&[A], &[B])] {
        loom::model(move || {
            let world = World::new(&[A, B, C]);
            let taken = Arc::new(AtomicBool::new(false));
            let (other, gone) = (Arc::clone(&world), Arc::clone(&taken));
            let io = thread::spawn(move || {
                other.request(first);
                // The last one stays in flight.
                let segments: Vec<_> = second.iter().map(|start| over(*start)).collect();
                let entered = other.window.enter(0, &segments) == Entered::In;
                (entered && second.contains(&A), gone)
            });
            world.take(A, &taken);
            let (over_a, gone) = io.join().expect("joined");
            assert!(!(over_a && gone.load(Ordering::Relaxed)), "{second:?} is in after {first:?}, unseen");
        });
    }
}

/// Whoever reads bounds that a later request wrote knows that the earlier one's DMA has ended.
#[test]
fn what_was_seen_to_have_left_has_ended() {
    loom::model(|| {
        let world = World::new(&[A, B]);
        let other = Arc::clone(&world);
        let io = thread::spawn(move || {
            other.request(&[A]);
            other.request(&[B]);
        });
        world.take(A, &AtomicBool::new(false));
        io.join().expect("joined");
        assert!(world.window.idle());
    });
}

/// While paused and idle nothing is in; after the pause something can be.
#[test]
fn a_pause_is_kept() {
    loom::model(|| {
        let world = World::new(&[A]);
        let other = Arc::clone(&world);
        let io = thread::spawn(move || other.request(&[A]));
        world.window.pause();
        if world.window.idle() {
            assert!(!world.busy(A).load(Ordering::Relaxed), "DMA runs in a pause that was seen idle");
        }
        world.window.lift();
        io.join().expect("joined");
        assert!(world.request(&[A]), "the pause has ended");
    });
}

/// What was entered before a void counts no more; what is entered after its pause counts, also where its thread slept
/// through pause and void.
#[test]
fn a_void_ends_what_was_before_it_and_nothing_else() {
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
        assert!(before || !(entered && clear), "in since the void, and unseen");
        if before && entered {
            // Whether before the void or after it (the look may have met an attempt) is all the same now:
            world.window.pause();
            world.window.void();
            assert!(world.window.idle());
        }
    });
}

/// Who saw a page open and mapped reads what the mapping wrote.
#[test]
fn what_is_entered_was_opened_before() {
    loom::model(|| {
        let world = World::new(&[]);
        let mapped = Arc::new(AtomicBool::new(false));
        let (other, done) = (Arc::clone(&world), Arc::clone(&mapped));
        let io = thread::spawn(move || {
            if other.window.enter(0, &[over(A)]) == Entered::In {
                assert!(done.load(Ordering::Relaxed), "in before it was mapped");
            }
        });
        mapped.store(true, Ordering::Relaxed);
        world.window.open(page(A));
        io.join().expect("joined");
    });
}
