//! What the domain refuses, and that a refusal leaves nothing behind.

use passgate_bindings::uring;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, Uid, capabilities, set_capabilities, set_thread_uid};

use super::skip::skip;
use super::*;

/// The text of a refusal of `iova`, with the domain unchanged by it.
fn refused(bench: &Bench, iova: PageRange<Iova>, piece: u64, offset: u64, errno: Errno) -> String {
    let before = bench.domain.mappings();
    let error = bench.domain.map(iova, piece, &bench.memory, Offset(offset), true).unwrap_err();
    assert_eq!(error.errno(), Some(errno), "{error}");
    assert_eq!(bench.domain.mappings(), before);
    error.to_string()
}

#[test]
fn a_bad_map_is_refused_whole() {
    let bench = Bench::new(8);
    bench.map(2, 2);
    let text = refused(&bench, iova(0, 8), PAGE, 0, Errno::EXIST);
    assert!(text.contains("unmap it first"), "{text}");
    refused(&bench, iova(4, 8), PAGE, 4 * PAGE, Errno::INVAL);
    refused(&bench, iova(4, 1), 0, 0, Errno::INVAL);
    refused(&bench, iova(4, 1), 100, 0, Errno::INVAL);
    for page in [0, 1, 4, 5, 6, 7] {
        is_fault(bench.dma_load(page), page);
    }
    bench.dma_store(2, 1).unwrap();
    bench.dma_store(3, 1).unwrap();
}

#[test]
fn slots_run_out_with_a_clear_word_and_come_back() {
    let budget = BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let bench = Bench::of(SoftDomain::with_slots(8).unwrap(), 64, Some(budget));
    bench.map(0, 5);
    let text = refused(&bench, iova(8, 4), PAGE, 0, Errno::NOSPC);
    assert!(text.contains("larger pieces"), "{text}");
    bench.map(8, 3);
    assert_eq!(bench.domain.capabilities().max_mappings, 8);
    // Every slot in turn for another IOVA: nothing of what was there before may be hit.
    for round in 0..10 {
        assert!(matches!(bench.unmap(0, 64), Unmap::Gone { .. }));
        let page = 16 + 4 * round;
        bench.map(page, 4);
        for other in 0..64 {
            if (page..page + 4).contains(&other) {
                bench.dma_store(other, other).unwrap();
            } else {
                is_fault(bench.dma_store(other, 99), other);
            }
        }
    }
    assert_eq!(bench.load(0), 0);
}

#[test]
fn a_map_that_fails_half_way_leaves_nothing_and_costs_no_slot() {
    let budget = BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let mut bench = Bench::of(SoftDomain::with_slots(8).unwrap(), 1, Some(budget));
    // The last two pages are behind the end of the file: the kernel finds that out.
    let short = GuestFile::memfd("short", 6 * PAGE).unwrap();
    let fd = short.as_fd().try_clone_to_owned().unwrap();
    bench.memory = Arc::new(GuestFile::new(fd, short.kind(), 8 * PAGE, true));
    for round in 0..10 {
        let text = refused(&bench, iova(0, 8), PAGE, 0, Errno::FAULT);
        assert!(text.contains("inside it"), "{text}");
        (0..8).for_each(|page| is_fault(bench.dma_load(page), page));
        // From the second time on the device knows some of the pieces from before.
        bench.map(round % 4, 3);
        bench.dma_store(round % 4, round).unwrap();
        assert_eq!(bench.load(round % 4), round);
        assert_eq!(bench.unmap(0, 8), gone(3));
    }
}

/// A domain of eight slots, and a file of eight pages of which the last two can be taken away.
fn shrinkable() -> (Bench, std::fs::File) {
    let budget = BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let mut bench = Bench::of(SoftDomain::with_slots(8).unwrap(), 1, Some(budget));
    let file = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 8 * PAGE).unwrap();
    let kind = GuestFile::memfd("kind", PAGE).unwrap().kind();
    bench.memory = Arc::new(GuestFile::new(file.try_clone().unwrap(), kind, 8 * PAGE, true));
    (bench, file.into())
}

#[test]
fn a_map_that_failed_takes_nothing_away_from_a_later_one() {
    let (bench, file) = shrinkable();
    rustix::fs::ftruncate(&file, 6 * PAGE).unwrap();
    refused(&bench, iova(0, 8), PAGE, 0, Errno::FAULT);
    bench.map(0, 2);
    // The slots that the failed map had filled are used elsewhere.
    bench.domain.map(iova(16, 6), PAGE, &bench.memory, Offset(0), true).unwrap();
    for page in [0, 1] {
        bench.dma_store(page, 7 + page).unwrap();
        assert_eq!(bench.load(page), 7 + page);
    }
}

#[test]
fn what_a_device_knows_from_before_a_map_that_failed_leads_nowhere_else() {
    let (bench, file) = shrinkable();
    bench.map(0, 8);
    assert_eq!(bench.unmap(0, 8), gone(8));
    rustix::fs::ftruncate(&file, 6 * PAGE).unwrap();
    refused(&bench, iova(0, 8), PAGE, 0, Errno::FAULT);
    // The same pages elsewhere, the last one first: in the slots of the two that were not reached, if these were free.
    rustix::fs::ftruncate(&file, 8 * PAGE).unwrap();
    for page in [7, 6] {
        bench.domain.map(iova(16 + page, 1), PAGE, &bench.memory, Offset(page * PAGE), true).unwrap();
    }
    for page in 0..8 {
        is_fault(bench.dma_store(page, 99), page);
    }
    (0..8).for_each(|page| assert_eq!(bench.load(page), 0));
}

#[test]
fn a_file_that_cannot_be_written_is_refused_with_the_mend() {
    let Bench { domain, _budget, .. } = Bench::new(1);
    let memory = GuestFile::memfd("read-only", PAGE).unwrap();
    let fd = memory.as_fd().try_clone_to_owned().unwrap();
    let memory = Arc::new(GuestFile::new(fd, memory.kind(), PAGE, false));
    for writable in [true, false] {
        let error = domain.map(iova(0, 1), PAGE, &memory, Offset(0), writable).unwrap_err();
        assert!(error.to_string().contains("O_RDWR"), "{error}");
    }
    assert_eq!(domain.mappings(), 0);
}

#[test]
fn all_slots_are_mapped_and_unmapped_at_once() {
    let pages = u64::from(uring::MAX_SLOTS);
    let bench = Bench::new(pages);
    if bench.domain.capabilities().max_mappings < pages {
        return skip(format_args!("RLIMIT_MEMLOCK is too small for {pages} pages"));
    }
    bench.map(0, pages);
    assert_eq!(bench.domain.mappings() as u64, pages);
    bench.dma_store(pages - 1, 1).unwrap();
    let held = bench.device.hold_write(at(12_345), 8).unwrap();
    let ticket = ticket(bench.unmap(0, pages), pages);
    is_fault(bench.dma_store(pages - 1, 1), pages - 1);
    held.finish(&[1; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
}

#[test]
fn the_locked_memory_limit_is_told_with_its_mend_and_nothing_is_left_of_the_map() {
    let _alone = BUDGET.write().unwrap_or_else(PoisonError::into_inner);
    let before = getrlimit(Resource::Memlock);
    let limit = before.current.unwrap_or(u64::MAX).min(4 << 20);
    setrlimit(Resource::Memlock, Rlimit { current: Some(limit), ..before }).unwrap();
    // Capabilities are of a thread, so nobody else loses them.
    let outcome = std::thread::spawn(move || under_a_limit(limit)).join();
    setrlimit(Resource::Memlock, before).unwrap();
    outcome.unwrap();
}

fn under_a_limit(limit: u64) {
    // The budget is the user's: where we may, we are one that nobody else is. This, too, is of a thread.
    let nobody = Uid::from_raw((1 << 30) + std::process::id());
    if set_thread_uid(nobody).is_err() {
        println!("no user of its own: another process of this user may get in the way");
    }
    let mut mine = capabilities(None).unwrap();
    mine.effective.remove(CapabilitySet::IPC_LOCK);
    mine.permitted.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, mine).unwrap();

    let pages = limit / PAGE;
    let bench = Bench::of(SoftDomain::open().unwrap(), 2 * pages, None);
    assert_eq!(bench.domain.capabilities().max_mappings, pages);
    bench.map(0, 100);
    let text = refused(&bench, iova(100, pages), PAGE, 100 * PAGE, Errno::NOMEM);
    for word in ["RLIMIT_MEMLOCK", "ulimit -l", "LimitMEMLOCK=", &limit.to_string()] {
        assert!(text.contains(word), "{text}");
    }
    bench.dma_store(99, 1).unwrap();
    is_fault(bench.dma_load(100), 100);
    // What was rolled back is not pinned either: as much can be mapped again.
    bench.map(100, pages / 2);
    bench.dma_store(100, 1).unwrap();

    let mut page = 2 * pages - 1;
    while bench.domain.map(iova(page, 1), PAGE, &bench.memory, Offset(page * PAGE), true).is_ok() {
        page -= 1;
    }
    let text = SoftDomain::open().unwrap_err().to_string();
    assert!(text.contains("ulimit -l"), "{text}");
}
