//! The cost of the admission window for a request: `cargo bench -p passgate-backends --bench window`.
//!
//! Enter and leave together, in nanoseconds, by one thread while no page is closed, and the cost of a scan of all slots
//! on the gate's side.

use std::hint::black_box;
use std::time::Instant;

use passgate_backends::{Entered, Segment, Window};
use passgate_bindings::{Iova, PAGE, PageRange};

const ROUNDS: u32 = 2_000_000;
const RUNS: u32 = 5;

/// Returns the time of the fastest of [`RUNS`] runs, in nanoseconds per round.
fn least(mut round: impl FnMut()) -> f64 {
    let run = |_| {
        let start = Instant::now();
        (0..ROUNDS).for_each(|_| round());
        start.elapsed().as_nanos() as f64 / f64::from(ROUNDS)
    };
    (0..RUNS).map(run).reduce(f64::min).unwrap_or(f64::NAN)
}

fn main() {
    let window = Window::new(4096, 33);
    let Ok(guest) = PageRange::new(0, 1 << 30) else { return };
    window.open(guest);
    let page = PAGE as u32;
    let shapes: [(&str, Vec<Segment>); 4] = [
        ("4 KiB", vec![Segment { iova: Iova(0x10_0000), len: page }]),
        ("128 KiB in one piece", vec![Segment { iova: Iova(0x10_0000), len: 32 * page }]),
        (
            "128 KiB in 32 pieces that touch",
            (0..32).map(|n| Segment { iova: Iova(0x10_0000 + n * PAGE), len: page }).collect(),
        ),
        (
            "128 KiB in 32 pieces apart",
            (0..32).map(|n| Segment { iova: Iova(0x10_0000 + n * 16 * PAGE), len: page }).collect(),
        ),
    ];
    for (name, segments) in &shapes {
        assert_eq!(window.enter(7, segments), Entered::In);
        window.leave(7);
        let ns = least(|| {
            black_box(window.enter(7, black_box(segments)));
            window.leave(7);
        });
        println!("enter and leave, {name}: {ns:.0} ns");
    }
    let Ok(one) = PageRange::new(0x4000_0000, PAGE) else { return };
    let start = Instant::now();
    (0..1000).for_each(|_| _ = black_box(window.overlapping(black_box(one))));
    println!("a scan of 4096 slots, all free: {:.1} us", start.elapsed().as_nanos() as f64 / 1e6);
    (0..4096).for_each(|slot| _ = window.enter(slot, &shapes[3].1));
    let start = Instant::now();
    (0..1000).for_each(|_| _ = black_box(window.overlapping(black_box(one))));
    println!("a scan of 4096 slots of 32 ranges each: {:.1} us", start.elapsed().as_nanos() as f64 / 1e6);
}
