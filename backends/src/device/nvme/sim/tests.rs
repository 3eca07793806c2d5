//! The simulator by the real driver: what it does when nothing is wrong.

#![allow(clippy::unwrap_used)] // what is not as it should be fails the test

use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::*;
use crate::iommu::Domain;
use crate::iommu::sim::Memory;
use crate::nvme::{Drive, DriveOptions, Op, Submitted};
use crate::window::{Segment, Windowed};

const BASE: u64 = 0x10_0000;

#[test]
fn a_driver_brings_it_up_and_moves_blocks() {
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
