//! The cost of the soft domain compared with the bare kernel calls: `cargo bench -p passgate-backends --bench soft`.
//!
//! Every figure is the median of single timings, in nanoseconds, with the 99th percentile; the cost of reading the
//! clock is subtracted.

#![allow(clippy::unwrap_used)] // a bench that cannot run panics

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use passgate_backends::iommu::soft::SoftDomain;
use passgate_backends::{Domain, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::uring::{Completion, Ring, Slot};
use passgate_bindings::{Iova, PageRange, guest_memfd};

const ROUNDS: usize = 50_000;
const PAGES: u64 = 1024;

/// The timings of one operation, in nanoseconds.
struct Timings(Vec<u64>);

impl Timings {
    fn new() -> Self {
        Self(Vec::with_capacity(ROUNDS))
    }

    fn time<T>(&mut self, operation: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = operation();
        self.0.push(begin.elapsed().as_nanos() as u64);
        result
    }

    /// Returns the median, minus `clock`, the cost of reading the clock.
    fn median(&mut self, clock: u64) -> u64 {
        self.0.sort_unstable();
        self.0[self.0.len() / 2].saturating_sub(clock)
    }

    fn print(&mut self, name: &str, clock: u64) -> u64 {
        let median = self.median(clock);
        println!("{name:<44}{median:>8} ns{:>10} ns", self.0[self.0.len() * 99 / 100].saturating_sub(clock));
        median
    }
}

fn page(index: usize) -> PageRange<Iova> {
    PageRange::new((index as u64 % PAGES) * PAGE, PAGE).unwrap()
}

fn main() {
    let memory = match guest_memfd::shared(PAGES * PAGE) {
        Ok((_, file)) => Arc::new(file),
        Err(why) => {
            println!("guest_memfd: {why}; a memfd instead");
            Arc::new(GuestFile::memfd("bench", PAGES * PAGE).unwrap())
        }
    };
    memory.write(0, &vec![1; (PAGES * PAGE) as usize]).unwrap();
    let mut clock = Timings::new();
    (0..ROUNDS).for_each(|_| clock.time(|| ()));
    let clock = clock.median(0);
    println!("{:<44}{:>11}{:>13}", "4 KiB pages", "median", "p99");

    let clear = bare(&memory, clock);
    let unmap = domain(&memory, clock);
    println!("unmap / bare clear and reap: {:.2}", unmap as f64 / clear as f64);
    under_load(&memory);
}

/// Times the bare kernel calls.
fn bare(memory: &Arc<GuestFile>, clock: u64) -> u64 {
    let (ring, _submissions, mut completions) = Ring::open(64, 16_384).unwrap();
    let (mut fill, mut clear) = (Timings::new(), Timings::new());
    for round in 0..ROUNDS {
        let offset = (round as u64 % PAGES) * PAGE;
        let tag = fill.time(|| ring.fill(Slot(5), memory, offset, PAGE).unwrap());
        clear.time(|| {
            ring.clear(Slot(5), 1).unwrap();
            completions.reap(|completion| assert_eq!(completion, Completion::Released(tag)));
        });
    }
    fill.print("bare fill", clock);
    clear.print("bare clear and reap", clock)
}

/// Times the same operations through the domain, and those of a device.
fn domain(memory: &Arc<GuestFile>, clock: u64) -> u64 {
    let domain = SoftDomain::open().unwrap();
    let device = domain.device("soft:0").unwrap();
    let map = |iova: PageRange<Iova>| domain.map(iova, PAGE, memory, Offset(iova.start().0), true).unwrap();
    (0..PAGES as usize).for_each(|index| map(page(index)));
    let (mut fill, mut clear) = (Timings::new(), Timings::new());
    for round in 0..ROUNDS {
        let gone = clear.time(|| domain.unmap(page(round)));
        assert_eq!(gone, Unmap::Gone { bytes: PAGE });
        fill.time(|| map(page(round)));
    }
    fill.print("Domain::map, page known from before", clock);
    let unmap = clear.print("Domain::unmap", clock);

    let mut bytes = vec![0; PAGE as usize];
    for len in [8, PAGE as usize] {
        let (mut read, mut write) = (Timings::new(), Timings::new());
        for round in 0..ROUNDS {
            let iova = page(round).start();
            read.time(|| device.read_into(iova, &mut bytes[..len]).unwrap());
            write.time(|| device.write_from(iova, &bytes[..len]).unwrap());
        }
        read.print(&format!("device reads {len} bytes"), clock);
        write.print(&format!("device writes {len} bytes"), clock);
    }
    domain.unmap(PageRange::new(0, PAGES * PAGE).unwrap());
    let mut fault = Timings::new();
    for round in 0..ROUNDS {
        fault.time(|| device.read_into(page(round).start(), &mut bytes).unwrap_err());
    }
    fault.print("device faults", clock);
    unmap
}

/// Measures the throughput of a device that does DMA all the time and of a thread that unmaps and maps.
fn under_load(memory: &Arc<GuestFile>) {
    let domain = SoftDomain::open().unwrap();
    let device = domain.device("soft:0").unwrap();
    let map = |iova: PageRange<Iova>| domain.map(iova, PAGE, memory, Offset(iova.start().0), true).unwrap();
    (0..PAGES as usize).for_each(|index| map(page(index)));
    let stop = AtomicBool::new(false);
    let dma = AtomicU64::new(0);
    let mut cycles = 0;
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = [0; 64];
            for round in 0.. {
                let _ = device.read_into(page(round * 7).start(), &mut bytes);
                if stop.load(Ordering::Relaxed) {
                    dma.store(round as u64, Ordering::Relaxed);
                    return;
                }
            }
        });
        while begin.elapsed() < Duration::from_secs(1) {
            let iova = page(cycles * 3);
            assert_eq!(domain.unmap(iova), Unmap::Gone { bytes: PAGE });
            map(iova);
            cycles += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "together, per second: {:.0} DMA of 64 bytes, {:.0} unmap-and-map",
        dma.into_inner() as f64 / seconds,
        cycles as f64 / seconds
    );
}
