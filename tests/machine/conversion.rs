//! Conversions under DMA: what the owner sees and what the device sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use passgate::client::{AddMemory, Convert, Outcome, PageState, State};
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;

use super::rig::{BLOCKED, Engine, GPA, LEN, Rig, Vmm, bytes, fresh, guest, memfd};
use crate::daemon::{LONG, until};

/// The canonical bug, which is why passgate exists: an owner that punches without a word.
pub fn unasked(rig: &Rig) {
    let daemon = rig.serve();
    for memory in [guest(2), memfd(2)] {
        let kind = memory.kind();
        let mut vmm = rig.join(&daemon, memory, PAGE);
        let secret = vmm.fill(1);
        vmm.memory.punch(PAGE, PAGE).unwrap();
        assert_eq!(vmm.bytes(1), [0; LEN], "{kind:?}: the owner sees a fresh page");
        assert_eq!(vmm.engine.read(1), secret, "{kind:?}: and the device the old one");
        vmm.engine.write(1);
        assert_eq!(vmm.bytes(1), [0; LEN], "{kind:?}: what it writes is lost");
        let region = vmm.client.status().unwrap().regions[0].region;
        vmm.client.remove_memory(region).unwrap();
    }
}

pub fn asked_first(rig: &Rig) {
    let daemon = rig.serve();
    let mut vmm = rig.join(&daemon, guest(4), PAGE);
    let secret = vmm.fill(1);
    assert_eq!(vmm.engine.read(1), secret, "the device has the page");

    let invalidation = vmm.begin(1, PageState::Private);
    assert_eq!(vmm.bytes(1), secret, "nothing has happened to the page yet");
    vmm.is_out_of_reach(1);
    vmm.memory.punch(PAGE, PAGE).unwrap();
    vmm.end(invalidation);
    assert_eq!(vmm.bytes(1), [0; LEN], "the owner sees a fresh page");
    assert_eq!(vmm.engine.read(1), BLOCKED, "the device sees neither page");
    vmm.engine.write(1);
    assert_eq!(vmm.bytes(1), [0; LEN], "nor does it write to the new one");

    vmm.give_back(1);
    assert!(vmm.reaches(1), "shared again, DMA sees the new page");
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.done, status.totals.refused, status.totals.unknown), (2, 0, 0));
    assert_eq!((status.iommu.as_str(), status.quarantine.len()), (rig.iommu, 0));
}

/// A connection of its own has the engine write to the neighbours all the time, and every write must arrive.
pub fn neighbours_keep_their_dma(rig: &Rig) {
    let (daemon, mut vmm) = rig.vmm(4);
    let (over, memory) = (AtomicBool::new(false), vmm.memory.clone());
    let mut engine = Engine::of(&daemon, &rig.edu);
    std::thread::scope(|scope| {
        let (over, memory) = (&over, &memory);
        let writer = scope.spawn(move || {
            let mut went = 0;
            while !over.load(Ordering::Relaxed) {
                let page = 1 + went % 2 * 2; // 1 and 3, around 2
                let sent = engine.write(page);
                assert_eq!(bytes(memory, page), sent, "a write to page {page} did not arrive");
                went += 1;
            }
            went
        });
        let begun = std::time::Instant::now();
        let mut conversions = 0;
        while begun.elapsed() < Duration::from_secs(2) && !writer.is_finished() {
            vmm.take_away(2);
            vmm.give_back(2);
            conversions += 2;
        }
        over.store(true, Ordering::Relaxed);
        let went = writer.join().unwrap();
        eprintln!("{conversions} conversions beside {went} DMA writes");
        assert!(conversions >= 10 && went >= 5);
    });
    assert!(vmm.reaches(2), "and the page itself is back");
}

pub fn the_rest_of_a_piece_is_mapped_again(rig: &Rig) {
    const PAGES: u64 = 16;
    // type1 splits the piece, and nothing pauses the engine for it.
    let window: &[&str] = if rig.iommu == "type1" { &["--hitless", "off"] } else { &[] };
    let daemon = rig.serve_with(window);
    let mut vmm = rig.join(&daemon, memfd(PAGES), PAGES * PAGE);
    assert_eq!(vmm.client.status().unwrap().mappings, 1);
    let invalidation = vmm.begin(5, PageState::Private);
    // The answer does not wait for it, and it does not wait for the end.
    assert!(until(LONG, || vmm.client.status().unwrap().mappings == 2), "both remainders");
    for page in [0, 4, 6, 15] {
        assert!(vmm.reaches(page), "DMA to page {page}");
    }
    vmm.is_out_of_reach(5);
    vmm.end(invalidation);
    vmm.give_back(5);
    assert!(until(LONG, || vmm.client.status().unwrap().mappings == 3));
    assert!(vmm.reaches(5));
}

/// Why there is no memory of huge pages here, where there is none.
pub fn no_huge_pages() -> Option<&'static str> {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let _ = std::fs::write(format!("{DIR}/nr_hugepages"), "1");
    let free = std::fs::read_to_string(format!("{DIR}/free_hugepages"));
    let has = free.is_ok_and(|free| free.trim() != "0");
    (!has).then_some("this machine gives no page of 2 MiB")
}

/// One page leaves a mapping of a huge page, and comes back; after a quiet while it is one mapping again.
pub fn a_page_of_a_huge_page(rig: &Rig) {
    const HUGE: u64 = 2 << 20;
    let daemon = rig.serve_with(&["--hitless", "off"]);
    let memory = Arc::new(GuestFile::memfd_huge("huge", HUGE, HUGE).unwrap());
    let mut client = daemon.client();
    let region = AddMemory { sole_mapper: true, ..AddMemory::shared(GPA, HUGE) };
    assert_eq!(client.add_memory(&region, &[&*memory]).unwrap().mapped, HUGE);
    let channel = client.open_channel().unwrap();
    let mut vmm = Vmm { client, channel, memory, engine: Engine::of(&daemon, &rig.edu) };
    assert_eq!(vmm.client.status().unwrap().mappings, 1);

    let invalidation = vmm.begin(5, PageState::Private);
    assert!(until(LONG, || vmm.client.status().unwrap().mappings == 2), "both remainders");
    for page in [0, 4, 6, 511] {
        assert!(vmm.reaches(page), "DMA to page {page}");
    }
    vmm.is_out_of_reach(5);
    vmm.end(invalidation);
    vmm.give_back(5);
    assert!(vmm.reaches(5));
    assert!(until(LONG, || vmm.client.status().unwrap().mappings == 1), "one mapping again");
    assert!(vmm.reaches(5) && vmm.reaches(6));

    // The file itself gives up nothing smaller, and is not asked to.
    let part = Convert { gpa: GPA + 5 * PAGE, length: PAGE, to: State::Private, deadline_ms: 0 };
    let refused = vmm.client.convert(&part).unwrap_err().to_string();
    assert!(refused.contains("has pages of 2097152 bytes and gives up nothing smaller"), "{refused}");
    assert!(vmm.reaches(5), "nothing has changed");
    let whole = Convert { gpa: GPA, length: HUGE, ..part };
    assert_eq!(vmm.client.convert(&whole).unwrap().verdict, "done");
    assert_eq!(vmm.engine.read(5), BLOCKED);
}

pub fn not_committed(rig: &Rig) {
    let (_daemon, mut vmm) = rig.vmm(2);
    let kept = vmm.fill(1);
    let invalidation = vmm.begin(1, PageState::Private);
    vmm.channel.end(invalidation, Outcome::NotCommitted).unwrap();
    assert_eq!(vmm.engine.read(1), kept, "all is as it was");
}

pub fn unknown(rig: &Rig) {
    let (_daemon, mut vmm) = rig.vmm(2);
    let invalidation = vmm.begin(1, PageState::Private);
    vmm.channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    vmm.is_out_of_reach(1);
    let status = vmm.client.status().unwrap();
    let quarantine: Vec<_> = status.quarantine.iter().map(|range| (range.offset, range.length)).collect();
    assert_eq!(quarantine, [(PAGE, PAGE)]);
    let again = vmm.channel.begin(super::rig::range(1), PageState::Shared, None);
    assert!(!matches!(again, Ok(passgate::client::Answer::Granted { .. })), "{again:?}");
    vmm.memory.write(0, &fresh()).unwrap();
    assert!(vmm.reaches(0), "its neighbour is free");
}
