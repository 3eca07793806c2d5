//! Conversions under DMA, as the owner of the memory and as the device sees the page.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use passgate_client::{AddMemory, Convert, Outcome, PageState};

use super::rig::{BLOCKED, DMA_BYTES, Engine, GPA, Rig, Vmm, bytes, guest, memfd, unique_bytes};
use crate::daemon::{TIMEOUT, wait_until};

/// The bug that passgate prevents: the owner punches a page without a begin, and the device stays on the old page.
pub fn punch_without_begin(rig: &Rig) {
    let daemon = rig.serve();
    for memory in [guest(2), memfd(2)] {
        let kind = memory.kind();
        let mut vmm = rig.join(&daemon, memory, PAGE);
        let old_bytes = vmm.fill(1);
        vmm.memory.punch(PAGE, PAGE).unwrap();
        assert_eq!(vmm.bytes(1), [0; DMA_BYTES], "{kind:?}: the owner sees a fresh page");
        assert_eq!(vmm.engine.read(1), old_bytes, "{kind:?}: the device sees the old page");
        vmm.engine.write(1);
        assert_eq!(vmm.bytes(1), [0; DMA_BYTES], "{kind:?}: the device's write is lost");
        let region = vmm.client.status().unwrap().regions[0].region;
        vmm.client.remove_memory(region).unwrap();
    }
}

pub fn punch_after_begin(rig: &Rig) {
    let daemon = rig.serve();
    let mut vmm = rig.join(&daemon, guest(4), PAGE);
    let old_bytes = vmm.fill(1);
    assert_eq!(vmm.engine.read(1), old_bytes, "the device has the page");

    let invalidation = vmm.begin(1, PageState::Private);
    assert_eq!(vmm.bytes(1), old_bytes, "a begin does not change the page");
    vmm.assert_unreachable(1);
    vmm.memory.punch(PAGE, PAGE).unwrap();
    vmm.end(invalidation);
    assert_eq!(vmm.bytes(1), [0; DMA_BYTES], "the owner sees a fresh page");
    assert_eq!(vmm.engine.read(1), BLOCKED, "the device sees neither page");
    vmm.engine.write(1);
    assert_eq!(vmm.bytes(1), [0; DMA_BYTES], "the device must not write to the new page");

    vmm.convert_to_shared(1);
    assert!(vmm.reaches(1), "shared again, DMA sees the new page");
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.done, status.totals.refused, status.totals.unknown), (2, 0, 0));
    assert_eq!((status.iommu.as_str(), status.quarantine.len()), (rig.iommu, 0));
}

/// The engine writes to both neighbours continuously, over a connection of its own, and every write must arrive.
pub fn neighbours_keep_dma(rig: &Rig) {
    let (daemon, mut vmm) = rig.vmm(4);
    let (stop, memory) = (AtomicBool::new(false), vmm.memory.clone());
    let mut engine = Engine::connect(&daemon, &rig.edu);
    std::thread::scope(|scope| {
        let (stop, memory) = (&stop, &memory);
        let writer = scope.spawn(move || {
            let mut writes = 0;
            while !stop.load(Ordering::Relaxed) {
                let page = 1 + writes % 2 * 2; // 1 and 3, around 2
                let sent = engine.write(page);
                assert_eq!(bytes(memory, page), sent, "a write to page {page} did not arrive");
                writes += 1;
            }
            writes
        });
        let started = std::time::Instant::now();
        let mut conversions = 0;
        while started.elapsed() < Duration::from_secs(2) && !writer.is_finished() {
            vmm.convert_to_hole(2);
            vmm.convert_to_shared(2);
            conversions += 2;
        }
        stop.store(true, Ordering::Relaxed);
        let writes = writer.join().unwrap();
        eprintln!("{conversions} conversions beside {writes} DMA writes");
        assert!(conversions >= 10 && writes >= 5);
    });
    assert!(vmm.reaches(2), "the page itself must be mapped again");
}

pub fn remainder_is_remapped(rig: &Rig) {
    const PAGES: u64 = 16;
    // On type1 the piece is split, and the engine cannot be paused for that.
    let options: &[&str] = if rig.iommu == "type1" { &["--hitless", "off"] } else { &[] };
    let daemon = rig.serve_with(options);
    let mut vmm = rig.join(&daemon, memfd(PAGES), PAGES * PAGE);
    assert_eq!(vmm.client.status().unwrap().mappings, 1);
    let invalidation = vmm.begin(5, PageState::Private);
    // The remap of the remainders delays no verdict, and does not wait for the end of the conversion.
    assert!(wait_until(TIMEOUT, || vmm.client.status().unwrap().mappings == 2), "both remainders");
    for page in [0, 4, 6, 15] {
        assert!(vmm.reaches(page), "DMA to page {page}");
    }
    vmm.assert_unreachable(5);
    vmm.end(invalidation);
    vmm.convert_to_shared(5);
    assert!(wait_until(TIMEOUT, || vmm.client.status().unwrap().mappings == 3));
    assert!(vmm.reaches(5));
}

/// Returns why there are no huge pages here, if there are none.
pub fn no_huge_pages() -> Option<&'static str> {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let _ = std::fs::write(format!("{DIR}/nr_hugepages"), "1");
    let free = std::fs::read_to_string(format!("{DIR}/free_hugepages"));
    let has_free_page = free.is_ok_and(|free| free.trim() != "0");
    (!has_free_page).then_some("this machine gives no page of 2 MiB")
}

/// One page is unmapped from the mapping of a huge page and mapped again; after a time without changes the mappings are merged
/// into one.
pub fn page_of_huge_page(rig: &Rig) {
    const HUGE: u64 = 2 << 20;
    let daemon = rig.serve_with(&["--hitless", "off"]);
    let memory = Arc::new(GuestFile::memfd_huge("huge", HUGE, HUGE).unwrap());
    let mut client = daemon.client();
    let region = AddMemory { sole_mapper: true, ..AddMemory::shared(GPA, HUGE) };
    assert_eq!(client.add_memory(&region, &[&*memory]).unwrap().mapped, HUGE);
    let channel = client.open_channel().unwrap();
    let mut vmm = Vmm { client, channel, memory, engine: Engine::connect(&daemon, &rig.edu) };
    assert_eq!(vmm.client.status().unwrap().mappings, 1);

    let invalidation = vmm.begin(5, PageState::Private);
    assert!(wait_until(TIMEOUT, || vmm.client.status().unwrap().mappings == 2), "both remainders");
    for page in [0, 4, 6, 511] {
        assert!(vmm.reaches(page), "DMA to page {page}");
    }
    vmm.assert_unreachable(5);
    vmm.end(invalidation);
    vmm.convert_to_shared(5);
    assert!(vmm.reaches(5));
    assert!(wait_until(TIMEOUT, || vmm.client.status().unwrap().mappings == 1), "one mapping again");
    assert!(vmm.reaches(5) && vmm.reaches(6));

    // The file can punch no less than a huge page, so passgate refuses to convert less.
    let part = Convert { gpa: GPA + 5 * PAGE, length: PAGE, to: PageState::Private, deadline_ms: 0 };
    let refused = vmm.client.convert(&part).unwrap_err().to_string();
    assert!(refused.contains("has pages of 2097152 bytes and gives up nothing smaller"), "{refused}");
    assert!(vmm.reaches(5), "the refusal must change nothing");
    let whole = Convert { gpa: GPA, length: HUGE, ..part };
    assert_eq!(vmm.client.convert(&whole).unwrap().verdict, "done");
    assert_eq!(vmm.engine.read(5), BLOCKED);
}

pub fn not_committed(rig: &Rig) {
    let (_daemon, mut vmm) = rig.vmm(2);
    let written = vmm.fill(1);
    let invalidation = vmm.begin(1, PageState::Private);
    vmm.channel.end(invalidation, Outcome::NotCommitted).unwrap();
    assert_eq!(vmm.engine.read(1), written, "the page must be mapped again unchanged");
}

pub fn unknown_outcome(rig: &Rig) {
    let (_daemon, mut vmm) = rig.vmm(2);
    let invalidation = vmm.begin(1, PageState::Private);
    vmm.channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    vmm.assert_unreachable(1);
    let status = vmm.client.status().unwrap();
    let quarantine: Vec<_> = status.quarantine.iter().map(|range| (range.offset, range.length)).collect();
    assert_eq!(quarantine, [(PAGE, PAGE)]);
    let again = vmm.channel.begin(super::rig::range(1), PageState::Shared, None);
    assert!(!matches!(again, Ok(passgate_client::Answer::Granted { .. })), "{again:?}");
    vmm.memory.write(0, &unique_bytes()).unwrap();
    assert!(vmm.reaches(0), "its neighbour must not be affected");
}
