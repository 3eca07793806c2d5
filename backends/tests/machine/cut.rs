//! Single pages cut out of large mappings, while devices do DMA to the adjacent pages all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libtest_mimic::Failed;
use passgate_backends::{Assignment, Device, Error, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use passgate_exercise::edu::POISON;

use super::bench::{Bench, at, bytes, check, fresh, guest_memfd, memfd, range, same};

type Outcome = Result<(), Failed>;

const HUGE: u64 = 2 << 20;
const HUGE_PAGES: u64 = HUGE / PAGE;

/// The page, in the middle of a mapping of 2 MiB, that is cut out.
const HOLE: u64 = 100;
/// The number of cuts.
const ROUNDS: u64 = 20;

pub fn cut_does_not_disturb_dma_to_adjacent_pages(bench: &Bench) -> Outcome {
    cut_during_dma(bench, &memfd(HUGE_PAGES)?)?;
    cut_during_dma(bench, &guest_memfd(HUGE_PAGES)?)
}

/// The drive runs a load over the pages before and after the cut; the edu engine writes and reads the pages beside
/// those.
fn cut_during_dma(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let Assignment { domain, devices, .. } = bench.assign(&[&bench.edu[0], &bench.nvme])?;
    let [engine, drive] = &devices[..] else { return Err("two devices".into()) };
    let (whole, hole) = (range(0, HUGE_PAGES), range(HOLE, 1));
    domain.map(whole, HUGE, file, Offset(0), true)?;
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = drive.start(&[at(HOLE - 1), at(HOLE + 1)])?;
    std::thread::scope(|scope| {
        let engine_load = scope.spawn(|| {
            let ended = dma_load(&**engine, &[HOLE - 2, HOLE + 2], &done, &rounds);
            done.store(true, Ordering::Release);
            ended
        });
        let await_progress = || {
            let (more, round) = (load.counts().done + 8, rounds.load(Ordering::Acquire));
            while load.counts().done < more && !done.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            round
        };
        let outcome = (0..ROUNDS).try_for_each(|_| -> Outcome {
            await_progress();
            same("a cut", domain.unmap(hole), Unmap::Gone { bytes: PAGE })?;
            same("the same again", domain.unmap(hole), Unmap::Gone { bytes: 0 })?;
            let content = fresh(PAGE as usize);
            file.write(HOLE * PAGE, &content)?;
            out_of_reach(&**drive, HOLE, file)?;
            await_progress();
            check("the page is unchanged", bytes(file, HOLE * PAGE, PAGE as usize)? == content)?;
            Ok(domain.map(hole, PAGE, file, Offset(HOLE * PAGE), true)?)
        });
        // Waits for at least one more transfer of the edu engine, which is slow.
        let round = await_progress();
        while outcome.is_ok() && rounds.load(Ordering::Acquire) < round + 1 && !done.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        done.store(true, Ordering::Release);
        engine_load.join().expect("no panic")?;
        outcome
    })?;
    let counts = load.stop()?;
    same("faults and wrong bytes beside the cut", (counts.faults, counts.wrong), (0, 0))?;
    check("the page is reached again", reaches(&**engine, HOLE, file)?)?;
    same("all of it", domain.unmap(whole), Unmap::Gone { bytes: HUGE })
}

/// DMA in both directions to these pages, with every byte checked, until `done` is set.
fn dma_load(device: &dyn Device, pages: &[u64], done: &AtomicBool, rounds: &AtomicU64) -> Outcome {
    for page in pages.iter().cycle() {
        if done.load(Ordering::Acquire) {
            return Ok(());
        }
        let sent = fresh(64);
        device.dma_write(at(*page), &sent)?;
        same("the content of the page", device.dma_read(at(*page), 64)?, sent)?;
        rounds.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

/// Cuts at either end, across two mappings, and beyond the mapped range. Removed pages are unpinned.
pub fn cut_removes_exactly_its_range(bench: &Bench) -> Outcome {
    cut_ranges(bench, &memfd(16)?)?;
    let file = guest_memfd(16)?;
    cut_ranges(bench, &file)?;
    same("references to the file", Arc::strong_count(&file), 1)
}

fn cut_ranges(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let (engine, before) = (bench.engine()?, pinned()?);
    engine.domain.map(range(0, 16), 8 * PAGE, file, Offset(0), true)?;
    let mut remaining = 16 * PAGE;
    for (page, pages, gone) in [(0, 1, 1), (6, 4, 4), (14, 9, 2), (0, 3, 2)] {
        same("a cut", engine.unmap(page, pages), Unmap::Gone { bytes: gone * PAGE })?;
        remaining -= gone * PAGE;
        same("pinned", pinned()? - before, remaining)?;
    }
    for page in [2, 6, 9, 14] {
        check("a removed page is out of reach", !reaches(&*engine.device, page, file)?)?;
    }
    for page in [3, 5, 10, 13] {
        check("the rest is reached", reaches(&*engine.device, page, file)?)?;
    }
    same("the rest", engine.unmap(0, 16), Unmap::Gone { bytes: remaining })?;
    same("pinned", pinned()?, before)
}

/// A split, for domains that do not cut: the whole mapping is unmapped and its rest mapped again; then the reverse.
pub fn page_is_split_out_of_a_huge_page_and_restored(bench: &Bench) -> Outcome {
    split_and_restore(bench, HUGE)
}

pub fn page_is_split_out_of_a_gigantic_page_and_restored(bench: &Bench) -> Outcome {
    split_and_restore(bench, 1 << 30)
}

fn split_and_restore(bench: &Bench, huge: u64) -> Outcome {
    let (engine, file) = (bench.whole()?, Arc::new(GuestFile::memfd_huge("huge", huge, huge)?));
    let (whole, hole) = (range(0, huge / PAGE), range(HOLE, 1));
    let rest = || whole.without(hole).into_iter().flatten();
    let map = |part: PageRange<Iova>| {
        let from = Offset(part.start().0 - whole.start().0);
        engine.domain.map(part, huge, &file, from, true)
    };
    map(whole)?;
    for _ in 0..2 {
        check("the page is reached", reaches(&*engine.device, HOLE, &file)?)?;
        same("the whole mapping", engine.domain.unmap(whole), Unmap::Gone { bytes: huge })?;
        rest().try_for_each(map)?;
        check("the page is out of reach", !reaches(&*engine.device, HOLE, &file)?)?;
        for page in [HOLE - 1, HOLE + 1, huge / PAGE - 1] {
            check("the other pages are reached", reaches(&*engine.device, page, &file)?)?;
        }
        for part in rest() {
            same("the rest", engine.domain.unmap(part), Unmap::Gone { bytes: part.len() })?;
        }
        map(whole)?;
    }
    let punched = file.punch(HOLE * PAGE, PAGE).expect_err("a part of a page of the file");
    check("the reason", punched.to_string().contains("zeroed and not freed"))?;
    same("the whole", engine.domain.unmap(whole), Unmap::Gone { bytes: huge })
}

/// Returns true if a write of the device to page `page` after BASE arrives in that page of the file.
pub fn reaches(device: &dyn Device, page: u64, file: &GuestFile) -> Result<bool, Failed> {
    let (content, sent) = (fresh(64), fresh(64));
    file.write(page * PAGE, &content)?;
    match device.dma_write(at(page), &sent) {
        Err(Error::Fault { .. }) => {}
        done => done?,
    }
    let seen = bytes(file, page * PAGE, 64)?;
    if seen != content && seen != sent {
        return Err("the page has other content than was written".into());
    }
    Ok(seen == sent)
}

/// Checks that DMA to a page is reported as a fault or reads poison, and does not change the page.
fn out_of_reach(device: &dyn Device, page: u64, file: &GuestFile) -> Outcome {
    let content = bytes(file, page * PAGE, 64)?;
    match device.dma_read(at(page), 64) {
        Err(Error::Fault { .. }) => {}
        seen => same("a read returns poison", seen?, vec![POISON; 64])?,
    }
    match device.dma_write(at(page), &fresh(64)) {
        Err(Error::Fault { .. }) => {}
        done => done?,
    }
    same("a write changes nothing", bytes(file, page * PAGE, 64)?, content)
}

/// Returns the number of bytes that the kernel has pinned for this process (VmPin), independently of the domain.
pub fn pinned() -> Result<u64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).ok_or("no VmPin")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}
