//! The simulator with the real driver, and its checks of what a driver must not do.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

use std::sync::Arc;

use passgate_backends::nvme::{Drive, DriveOptions, Op, Submitted};
use passgate_backends::{Domain, Segment, Step, Windowed};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::*;
use crate::iommu::Memory;

const BASE: u64 = 0x10_0000;

#[test]
fn driver_initializes_the_simulator_and_moves_blocks() {
    let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let sim = Simulated::new(&domain, Options::default()).unwrap();
    let shared = Arc::new(domain) as Arc<dyn Domain>;
    let drive = Drive::open(sim.registers(), &shared, DriveOptions::default()).unwrap();
    assert_eq!((drive.queues(), drive.geometry().block, drive.geometry().blocks), (1, 512, 1 << 17));
    let windowed = Windowed::new(shared, Arc::clone(drive.window()));
    let file = Arc::new(GuestFile::memfd("sim", 16 * PAGE).unwrap());
    windowed.map(PageRange::new(BASE, 16 * PAGE).unwrap(), 1 << 30, &file, Offset(0), true).unwrap();
    file.write(100, &[7; 512]).unwrap();
    let mut queue = drive.take_queue(0).unwrap();
    let segments = [Segment { iova: Iova(BASE + 100), len: 512 }];
    assert_eq!(
        queue.submit(1, &Op::Write { first: 9, blocks: 1, fua: false }, &segments),
        Submitted::Started
    );
    queue.ring();
    let mut done = Vec::new();
    while done.is_empty() {
        queue.complete(&mut done);
    }
    assert_eq!((done[0].tag, done[0].result), (1, Ok(())));
    assert_eq!(sim.medium().read(9, 1), vec![7; 512]);
    assert_eq!(sim.complaints(), Vec::<String>::new());
}

/// Returns a controller that is enabled, with admin queues of four entries at `BASE` and one page behind it.
fn enabled() -> (Simulated, Arc<GuestFile>) {
    let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let sim = Simulated::new(&domain, Options::default()).unwrap();
    let file = Arc::new(GuestFile::memfd("queues", 2 * PAGE).unwrap());
    domain.map(PageRange::new(BASE, 2 * PAGE).unwrap(), 1 << 30, &file, Offset(0), true).unwrap();
    let registers = sim.registers();
    for (at, value) in [(0x24, 3 | 3 << 16), (0x28, BASE as u32), (0x30, (BASE + PAGE) as u32)] {
        registers.set(at, value).unwrap();
    }
    registers.set(0x14, 6 << 16 | 4 << 20 | 1).unwrap();
    assert_eq!(registers.get(0x1c).unwrap(), 1);
    (sim, file)
}

#[test]
fn violations_of_the_specification_are_recorded() {
    let (sim, file) = enabled();
    let registers = sim.registers();
    assert_eq!(sim.complaints(), Vec::<String>::new());
    for (at, value) in [
        (0x1010, 1), // the tail of queue 2, which does not exist
        (0x1000, 4), // a tail beyond the queue
        (0x1004, 1), // a head beyond what was posted
        (0x1c, 0),   // CSTS is read-only
    ] {
        let before = sim.complaints().len();
        registers.set(at, value).unwrap();
        assert_eq!(sim.complaints().len(), before + 1, "{value} to {at:#x}");
    }
    // An unknown opcode completes with a status, in the first entry and with the first Phase Tag.
    file.store(0, 0x7f | 9 << 16).unwrap();
    registers.ring(0x1000, 1).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while file.load(PAGE + 8).unwrap() == 0 {
        assert!(Instant::now() < until);
        std::thread::yield_now();
    }
    assert_eq!(file.load(PAGE + 8).unwrap(), 1 | 9 << 32 | 1 << 48 | 1 << 49);
    registers.set(0x1004, 1).unwrap();
    assert_eq!(sim.complaints().len(), 4);
}

#[test]
fn unmapped_queue_is_fatal_until_a_reset() {
    let (sim, _file) = enabled();
    let registers = sim.registers();
    registers.device().fence(Step::Detach).unwrap();
    registers.set(0x1000, 1).unwrap();
    assert!(sim.core.await_that(Duration::from_secs(10), |state| state.fatal));
    assert_eq!((registers.get(0x1c).unwrap(), sim.dma_faults()), (3, 1));
    registers.set(0x14, 0).unwrap();
    assert_eq!(registers.get(0x1c).unwrap(), 0);
}

#[test]
fn removed_controller_reads_as_all_ones() {
    let (sim, _file) = enabled();
    let registers = sim.registers();
    sim.vanish();
    assert!([0, 4, 0x14, 0x1c].iter().all(|at| registers.get(*at).unwrap() == u32::MAX));
    registers.set(0x14, 0).unwrap();
    assert_eq!(registers.get(0x14).unwrap(), u32::MAX);
}
