//! The cost of the kinds of page tables of an iommufd domain, in the machines of tests/vm: `tests/vm/run --bench
//! tables`. Outside of them it has no device, and exits.
//!
//! Every figure is the median of single timings in microseconds, with the 99th percentile. The IOMMU is emulated: only
//! figures of one run are comparable.

#![allow(clippy::unwrap_used)] // a bench that cannot run panics

use std::sync::Arc;
use std::time::Instant;

use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_backends::{Domain, Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::{Iova, PageRange};
use passgate_exercise::Drivers;

const BASE: u64 = 0x1_0000_0000;
const MIB: u64 = 1 << 20;
const ROUNDS: usize = 200;
/// The number of rounds of slow operations.
const SLOW_ROUNDS: usize = 10;

fn range(offset: u64, len: u64) -> PageRange<Iova> {
    PageRange::new(BASE + offset, len).unwrap()
}

/// The timings of one operation, in microseconds.
#[derive(Default)]
struct Timings(Vec<f64>);

impl Timings {
    fn time<T>(&mut self, operation: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = operation();
        self.0.push(begin.elapsed().as_secs_f64() * 1e6);
        result
    }

    fn print(&mut self, name: &str) {
        self.0.sort_unstable_by(f64::total_cmp);
        let at = |percentile: usize| self.0[(self.0.len() - 1) * percentile / 100];
        println!("{name:<60}{:>11.1} us{:>11.1} us", at(50), at(99));
    }
}

struct Bench {
    domain: Arc<dyn Domain>,
    file: Arc<GuestFile>,
}

impl Bench {
    fn map(&self, iova: PageRange<Iova>, piece: u64) {
        let from = Offset(iova.start().0 - BASE);
        self.domain.map(iova, piece, &self.file, from, true).unwrap();
    }

    fn unmap(&self, iova: PageRange<Iova>) {
        assert!(matches!(self.domain.unmap(iova), Unmap::Gone { bytes } if bytes > 0));
    }

    /// Maps and unmaps `len` bytes in mappings of `piece`.
    fn whole(&self, name: &str, len: u64, piece: u64, rounds: usize) {
        let (mut map, mut unmap) = (Timings::default(), Timings::default());
        for _ in 0..rounds {
            map.time(|| self.map(range(0, len), piece));
            unmap.time(|| self.unmap(range(0, len)));
        }
        map.print(&format!("{name}: map {} MiB in pieces of {} KiB", len / MIB, piece / 1024));
        unmap.print(&format!("{name}: unmap it"));
    }

    /// Cuts a page out of 64 MiB and maps it again.
    fn cut(&self, name: &str) {
        let (mut cut, mut back) = (Timings::default(), Timings::default());
        self.map(range(0, 64 * MIB), 64 * MIB);
        for round in 0..ROUNDS as u64 {
            let hole = range((1 + round * 7919 % 16000) * PAGE, PAGE);
            cut.time(|| self.unmap(hole));
            back.time(|| self.map(hole, PAGE));
        }
        self.unmap(range(0, 64 * MIB));
        cut.print(&format!("{name}: cut 4 KiB out of 64 MiB"));
        back.print(&format!("{name}: map it again"));
    }

    /// Unmaps 2 MiB and maps all of it again except one page.
    fn split(&self, name: &str) {
        let mut split = Timings::default();
        let (whole, hole) = (range(0, 2 * MIB), range(100 * PAGE, PAGE));
        for _ in 0..ROUNDS {
            self.map(whole, 2 * MIB);
            split.time(|| {
                self.unmap(whole);
                whole.without(hole).into_iter().flatten().for_each(|part| self.map(part, 2 * MIB));
            });
            self.unmap(whole);
        }
        split.print(&format!("{name}: split 4 KiB out of 2 MiB"));
    }

    /// Replaces `pages` single pages out of 64 MiB.
    fn replace(&self, name: &str, pages: u64, piece: u64) {
        let mut replace = Timings::default();
        let gone: Vec<_> = (0..pages).map(|n| range((1 + n * (16384 / pages)) * PAGE, PAGE)).collect();
        for _ in 0..SLOW_ROUNDS {
            self.map(range(0, 64 * MIB), piece);
            let went = replace.time(|| self.domain.replace(&gone));
            assert_eq!(went, Unmap::Gone { bytes: pages * PAGE });
            self.unmap(range(0, 64 * MIB));
        }
        replace.print(&format!("{name}: replace {pages} pages of 64 MiB in pieces of {} KiB", piece / 1024));
    }
}

fn main() {
    let Some(edu) =
        std::env::var("PASSGATE_EDU").ok().and_then(|all| Some(all.split_whitespace().next()?.to_owned()))
    else {
        println!("PASSGATE_EDU is unset: this is not one of the machines of tests/vm");
        return;
    };
    let file = Arc::new(GuestFile::memfd("bench", 256 * MIB).unwrap());
    // Allocates every page, so that the timings include no page faults.
    (0..256 * MIB).step_by(PAGE as usize).for_each(|offset| file.store(offset, 1).unwrap());
    for (name, tables) in [("small", Tables::Small), ("large", Tables::Large), ("standby", Tables::Standby)] {
        let accept = Accept { unstoppable: true, ..Accept::default() };
        let Assignment { domain, devices, .. } =
            assign(Kind::Iommufd, std::slice::from_ref(&edu), accept, &Drivers::default(), tables).unwrap();
        let bench = Bench { domain, file: Arc::clone(&file) };
        let can = bench.domain.capabilities();
        bench.whole(name, 256 * MIB, 256 * MIB, SLOW_ROUNDS);
        bench.whole(name, 2 * MIB, 2 * MIB, ROUNDS);
        bench.whole(name, 2 * MIB, PAGE, SLOW_ROUNDS);
        if can.cut {
            bench.cut(name);
        }
        bench.split(name);
        if can.replace {
            for (pages, piece) in [(1, 2 * MIB), (1, 64 * MIB), (64, 2 * MIB), (64, 64 * MIB)] {
                bench.replace(name, pages, piece);
            }
        }
        drop(devices);
    }
}
