//! The maps that the domain refuses, without any effect.

use passgate_bindings::uring;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, Uid, capabilities, set_capabilities, set_thread_uid};

use super::skip::skip;
use super::*;

/// Checks that a map of `iova` is refused with `errno` and changes nothing. Returns the text of the error.
fn refused(bench: &Bench, iova: PageRange<Iova>, piece: u64, offset: u64, errno: Errno) -> String {
    let before = bench.domain.mappings();
    let error = bench.domain.map(iova, piece, &bench.memory, Offset(offset), true).unwrap_err();
    assert_eq!(error.errno(), Some(errno), "{error}");
    assert_eq!(bench.domain.mappings(), before);
    error.to_string()
}

#[test]
fn invalid_map_is_refused_without_effect() {
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
fn full_slot_table_is_reported_and_slots_are_reused() {
    let budget = MEMLOCK_BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let bench = Bench::of(SoftDomain::with_slots(8).unwrap(), 64, Some(budget));
    bench.map(0, 5);
    let text = refused(&bench, iova(8, 4), PAGE, 0, Errno::NOSPC);
    assert!(text.contains("larger pieces"), "{text}");
    bench.map(8, 3);
    assert_eq!(bench.domain.capabilities().max_mappings, 8);
    // Every slot is reused for another IOVA: no earlier translation may reach its new pages.
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
fn partial_map_is_rolled_back_and_frees_its_slots() {
    let budget = MEMLOCK_BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let mut bench = Bench::of(SoftDomain::with_slots(8).unwrap(), 1, Some(budget));
    // The last two pages are beyond the end of the file, which only the kernel detects.
    let short = GuestFile::memfd("short", 6 * PAGE).unwrap();
    let fd = short.as_fd().try_clone_to_owned().unwrap();
    bench.memory = Arc::new(GuestFile::new(fd, short.kind(), 8 * PAGE, true));
    for round in 0..10 {
        let text = refused(&bench, iova(0, 8), PAGE, 0, Errno::FAULT);
        assert!(text.contains("inside it"), "{text}");
        (0..8).for_each(|page| is_fault(bench.dma_load(page), page));
        // From the second round on the device has translations of some of the pieces.
        bench.map(round % 4, 3);
        bench.dma_store(round % 4, round).unwrap();
        assert_eq!(bench.load(round % 4), round);
        assert_eq!(bench.unmap(0, 8), gone(3));
    }
}

/// Makes a domain of eight slots, and a file of eight pages that can be truncated.
fn shrinkable() -> (Bench, std::fs::File) {
    let budget = MEMLOCK_BUDGET.read().unwrap_or_else(PoisonError::into_inner);
    let mut bench = Bench::of(SoftDomain::with_slots(8).unwrap(), 1, Some(budget));
    let file = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 8 * PAGE).unwrap();
    let kind = GuestFile::memfd("kind", PAGE).unwrap().kind();
    bench.memory = Arc::new(GuestFile::new(file.try_clone().unwrap(), kind, 8 * PAGE, true));
    (bench, file.into())
}

#[test]
fn slots_of_a_failed_map_are_not_shared_with_a_later_map() {
    let (bench, file) = shrinkable();
    rustix::fs::ftruncate(&file, 6 * PAGE).unwrap();
    refused(&bench, iova(0, 8), PAGE, 0, Errno::FAULT);
    bench.map(0, 2);
    // The slots that the failed map had filled are reused elsewhere.
    bench.domain.map(iova(16, 6), PAGE, &bench.memory, Offset(0), true).unwrap();
    for page in [0, 1] {
        bench.dma_store(page, 7 + page).unwrap();
        assert_eq!(bench.load(page), 7 + page);
    }
}

#[test]
fn stale_translation_after_a_failed_map_reaches_no_other_page() {
    let (bench, file) = shrinkable();
    bench.map(0, 8);
    assert_eq!(bench.unmap(0, 8), gone(8));
    rustix::fs::ftruncate(&file, 6 * PAGE).unwrap();
    refused(&bench, iova(0, 8), PAGE, 0, Errno::FAULT);
    // The same pages elsewhere, the last one first: if the slots of the two pages that were not reached counted as
    // free, these pages would get them.
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
fn read_only_file_is_refused_with_the_remedy() {
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
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
}

#[test]
fn map_beyond_the_memlock_limit_names_the_remedy_and_leaves_nothing() {
    let _alone = MEMLOCK_BUDGET.write().unwrap_or_else(PoisonError::into_inner);
    let before = getrlimit(Resource::Memlock);
    let limit = before.current.unwrap_or(u64::MAX).min(4 << 20);
    setrlimit(Resource::Memlock, Rlimit { current: Some(limit), ..before }).unwrap();
    // Capabilities are per thread, so no other test loses them.
    let outcome = std::thread::spawn(move || under_a_limit(limit)).join();
    setrlimit(Resource::Memlock, before).unwrap();
    outcome.unwrap();
}

fn under_a_limit(limit: u64) {
    // The budget is per user: the thread changes to a user id that no other process has, if it may. This is per thread
    // too.
    let unused = Uid::from_raw((1 << 30) + std::process::id());
    if set_thread_uid(unused).is_err() {
        println!("cannot change the user id: other processes of this user may disturb the test");
    }
    let mut reduced = capabilities(None).unwrap();
    reduced.effective.remove(CapabilitySet::IPC_LOCK);
    reduced.permitted.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, reduced).unwrap();

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
    // The pages that were rolled back are not pinned any more: as many can be mapped again.
    bench.map(100, pages / 2);
    bench.dma_store(100, 1).unwrap();

    let mut page = 2 * pages - 1;
    while bench.domain.map(iova(page, 1), PAGE, &bench.memory, Offset(page * PAGE), true).is_ok() {
        page -= 1;
    }
    let text = SoftDomain::open().unwrap_err().to_string();
    assert!(text.contains("ulimit -l"), "{text}");
}
