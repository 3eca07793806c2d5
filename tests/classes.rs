//! Bug classes of others (docs/bug-classes.md) that no other test is named for: against a real daemon, with the
//! software device.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod daemon;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use daemon::Daemon;
use passgate::client::{AddMemory, Answer, Channel, Client, Outcome, PageState};
use passgate::error::Error;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};

const GPA: u64 = 0x10_0000;
const PAGES: u64 = 8;
const DEVICE: &str = "soft:0";

struct Vmm {
    memory: Arc<GuestFile>,
    client: Client,
    channel: Channel,
    region: u32,
}

fn vmm() -> (Daemon, Vmm) {
    let program = Path::new(env!("CARGO_BIN_EXE_passgate"));
    let daemon = Daemon::start(program, &["--iommu", "soft", "--device", DEVICE, "--allow-dma"]);
    let memory = Arc::new(GuestFile::memfd("classes", PAGES * PAGE).unwrap());
    let mut client = daemon.client();
    let region = client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&*memory]).unwrap().region;
    let channel = client.open_channel().unwrap();
    (daemon, Vmm { memory, client, channel, region })
}

fn page(number: u64) -> PageRange<Gpa> {
    PageRange::new(GPA + number * PAGE, PAGE).unwrap()
}

impl Vmm {
    fn begin(&mut self, number: u64, to: PageState) -> u64 {
        match self.channel.begin(page(number), to, Some(20_000)).unwrap() {
            Answer::Granted { invalidation } => invalidation,
            other => panic!("page {number} was not given: {other:?}"),
        }
    }

    fn convert(&mut self, number: u64, to: PageState) {
        let invalidation = self.begin(number, to);
        self.channel.end(invalidation, Outcome::Committed).unwrap();
    }

    fn device_reads(&mut self, number: u64) -> u64 {
        let bytes = self.client.dma_read(DEVICE, GPA + number * PAGE, 8).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

/// QEMU 852f0048f3: a page that was discarded and comes back is a new one, and a device that still has the old one
/// reads and writes memory that nobody else sees.
#[test]
fn class_3_a_discarded_page_that_comes_back_is_the_one_that_the_device_sees() {
    let (_daemon, mut vmm) = vmm();
    for round in 1..=50 {
        for number in 0..PAGES {
            let [old, new, written] = [1, 2, 3].map(|nth| round << 16 | number << 8 | nth);
            vmm.memory.store(number * PAGE, old).unwrap();
            assert_eq!(vmm.device_reads(number), old);
            vmm.convert(number, PageState::Private);
            vmm.memory.punch(number * PAGE, PAGE).unwrap();
            vmm.convert(number, PageState::Shared);
            vmm.memory.store(number * PAGE, new).unwrap();
            assert_eq!(vmm.device_reads(number), new, "the device has the page that was discarded");
            vmm.client.dma_write(DEVICE, GPA + number * PAGE, &u64::to_le_bytes(written)).unwrap();
            assert_eq!(vmm.memory.load(number * PAGE).unwrap(), written, "it wrote to the one discarded");
        }
    }
}

/// CVE-2026-86567: a name that is kept after what it named is gone must name nothing, whatever came after it.
#[test]
fn class_10_a_name_of_what_is_over_never_names_anything_again() {
    let (_daemon, mut vmm) = vmm();
    let (mut over, mut regions) = (BTreeSet::new(), BTreeSet::from([vmm.region]));
    for round in 0..20 {
        let invalidation = vmm.begin(round % PAGES, PageState::Shared);
        assert!(!over.contains(&invalidation), "invalidation {invalidation} is named twice");
        for old in &over {
            let ended = vmm.channel.end(*old, Outcome::Committed);
            assert!(matches!(ended, Err(Error::Refused { .. })), "{old} was ended twice: {ended:?}");
        }
        vmm.channel.end(invalidation, Outcome::NotCommitted).unwrap();
        over.insert(invalidation);

        vmm.client.remove_memory(vmm.region).unwrap();
        let add = AddMemory::shared(GPA, PAGES * PAGE);
        vmm.region = vmm.client.add_memory(&add, &[&*vmm.memory]).unwrap().region;
        for old in &regions {
            let removed = vmm.client.remove_memory(*old);
            assert!(matches!(removed, Err(Error::Refused { .. })), "{old} was removed twice: {removed:?}");
        }
        assert!(regions.insert(vmm.region), "region {} is named twice", vmm.region);
    }
    assert_eq!(vmm.client.status().unwrap().regions.len(), 1);
}

/// CVE-2023-41051: what is read from guest memory twice may differ the second time. No decision of passgate's reads
/// guest memory at all (the vhost-user door, which must, is not built yet): whatever a guest scribbles into it
/// meanwhile, every answer is the same.
#[test]
fn class_12_a_guest_that_scribbles_all_the_time_changes_no_answer() {
    let (_daemon, mut vmm) = vmm();
    let stop = Arc::new(AtomicBool::new(false));
    let scribbler = {
        let (memory, stop) = (Arc::clone(&vmm.memory), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut word: u64 = 1;
            while !stop.load(Ordering::Relaxed) {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                memory.store((word >> 20) % (PAGES * PAGE / 8) * 8, word).unwrap();
            }
        })
    };
    for round in 0..500 {
        vmm.convert(round % PAGES, PageState::Private);
        vmm.convert(round % PAGES, PageState::Shared);
    }
    stop.store(true, Ordering::Relaxed);
    scribbler.join().unwrap();
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.done, status.totals.refused, status.totals.unknown), (1000, 0, 0));
    assert_eq!((status.regions[0].shared, status.quarantine.len()), (PAGES * PAGE, 0));
}
