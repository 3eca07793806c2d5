//! Known bug classes of other projects (docs/bug-classes.md) that no other test is named after: against a real daemon, with
//! the software device.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod daemon;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use daemon::Daemon;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{AddMemory, Answer, Channel, Client, Error, Outcome, PageState};

const GPA: u64 = 0x10_0000;
const PAGES: u64 = 8;
const DEVICE: &str = "soft:0";

/// A VMM: its memory, its two connections, and the id of its region.
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
            other => panic!("page {number} is not granted: {other:?}"),
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

/// QEMU 852f0048f3: a discarded page that is used again is a new page; a device that still has the old one pinned reads and
/// writes memory that nobody else sees.
#[test]
fn class_3_device_sees_page_restored_after_discard() {
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
            assert_eq!(vmm.device_reads(number), new, "the device still has the discarded page");
            vmm.client.dma_write(DEVICE, GPA + number * PAGE, &u64::to_le_bytes(written)).unwrap();
            assert_eq!(
                vmm.memory.load(number * PAGE).unwrap(),
                written,
                "the device wrote to the discarded page"
            );
        }
    }
}

/// CVE-2026-86567: an id of an object that no longer exists must identify nothing, whatever is created after it.
#[test]
fn class_10_ids_are_never_reused() {
    let (_daemon, mut vmm) = vmm();
    let (mut ended_ids, mut regions) = (BTreeSet::new(), BTreeSet::from([vmm.region]));
    for round in 0..20 {
        let invalidation = vmm.begin(round % PAGES, PageState::Shared);
        assert!(!ended_ids.contains(&invalidation), "the id of invalidation {invalidation} was used before");
        for old in &ended_ids {
            let end_result = vmm.channel.end(*old, Outcome::Committed);
            assert!(
                matches!(end_result, Err(Error::Refused { .. })),
                "{old} was ended twice: {end_result:?}"
            );
        }
        vmm.channel.end(invalidation, Outcome::NotCommitted).unwrap();
        ended_ids.insert(invalidation);

        vmm.client.remove_memory(vmm.region).unwrap();
        let add = AddMemory::shared(GPA, PAGES * PAGE);
        vmm.region = vmm.client.add_memory(&add, &[&*vmm.memory]).unwrap().region;
        for old in &regions {
            let remove_result = vmm.client.remove_memory(*old);
            assert!(
                matches!(remove_result, Err(Error::Refused { .. })),
                "{old} was removed twice: {remove_result:?}"
            );
        }
        assert!(regions.insert(vmm.region), "the id of region {} was used before", vmm.region);
    }
    assert_eq!(vmm.client.status().unwrap().regions.len(), 1);
}

/// CVE-2023-41051: guest memory that is read twice may differ the second time. No decision about conversions reads guest
/// memory: whatever a guest writes there meanwhile, every answer is the same. The vhost-user back-end, which must read it, has
/// its own test (`descriptors_are_read_once`).
#[test]
fn class_12_guest_memory_writes_change_no_answer() {
    let (_daemon, mut vmm) = vmm();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
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
    writer.join().unwrap();
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.done, status.totals.refused, status.totals.unknown), (1000, 0, 0));
    assert_eq!((status.regions[0].shared, status.quarantine.len()), (PAGES * PAGE, 0));
}
