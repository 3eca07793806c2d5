//! Single pages out of large mappings, while devices do DMA to their neighbours all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libtest_mimic::Failed;
use passgate_backends::device::edu::POISON;
use passgate_backends::{Assignment, Device, Error, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::bench::{Bench, at, bytes, check, fresh, guest_memfd, memfd, range, same};

type Outcome = Result<(), Failed>;

const HUGE: u64 = 2 << 20;
const HUGE_PAGES: u64 = HUGE / PAGE;

/// A page in the midst of a mapping of 2 MiB, and how often it is cut out.
const HOLE: u64 = 100;
const ROUNDS: u64 = 20;

pub fn a_cut_is_not_noticed_by_dma_to_both_neighbours(bench: &Bench) -> Outcome {
    not_noticed(bench, &memfd(HUGE_PAGES)?)?;
    not_noticed(bench, &guest_memfd(HUGE_PAGES)?)
}

/// The drive runs a load over the pages before and behind the hole; the engine writes to, and reads from, those
/// beside them.
fn not_noticed(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let Assignment { domain, devices, .. } = bench.assign(&[&bench.edu[0], &bench.nvme])?;
    let [engine, drive] = &devices[..] else { return Err("two devices".into()) };
    let (whole, hole) = (range(0, HUGE_PAGES), range(HOLE, 1));
    domain.map(whole, HUGE, file, Offset(0), true)?;
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = drive.start(&[at(HOLE - 1), at(HOLE + 1)])?;
    std::thread::scope(|scope| {
        let pounds = scope.spawn(|| {
            let ended = pound(&**engine, &[HOLE - 2, HOLE + 2], &done, &rounds);
            done.store(true, Ordering::Release);
            ended
        });
        let go_on = || {
            let (more, round) = (load.counts().done + 8, rounds.load(Ordering::Acquire));
            while load.counts().done < more && !done.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            round
        };
        let outcome = (0..ROUNDS).try_for_each(|_| -> Outcome {
            go_on();
            same("a cut", domain.unmap(hole), Unmap::Gone { bytes: PAGE })?;
            same("the same again", domain.unmap(hole), Unmap::Gone { bytes: 0 })?;
            let kept = fresh(PAGE as usize);
            file.write(HOLE * PAGE, &kept)?;
            out_of_reach(&**drive, HOLE, file)?;
            go_on();
            check("the hole is as it was left", bytes(file, HOLE * PAGE, PAGE as usize)? == kept)?;
            Ok(domain.map(hole, PAGE, file, Offset(HOLE * PAGE), true)?)
        });
        // At least once by the engine too, which is slow.
        let round = go_on();
        while outcome.is_ok() && rounds.load(Ordering::Acquire) < round + 1 && !done.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        done.store(true, Ordering::Release);
        pounds.join().expect("no panic")?;
        outcome
    })?;
    let counts = load.stop()?;
    same("faults and wrong bytes beside the hole", (counts.faults, counts.wrong), (0, 0))?;
    check("the hole is reached again", reaches(&**engine, HOLE, file)?)?;
    same("all of it", domain.unmap(whole), Unmap::Gone { bytes: HUGE })
}

/// DMA both ways to these pages, every byte of which has to arrive, until it is `done`.
fn pound(device: &dyn Device, pages: &[u64], done: &AtomicBool, rounds: &AtomicU64) -> Outcome {
    for page in pages.iter().cycle() {
        if done.load(Ordering::Acquire) {
            return Ok(());
        }
        let sent = fresh(64);
        device.dma_write(at(*page), &sent)?;
        same("the neighbour holds", device.dma_read(at(*page), 64)?, sent)?;
        rounds.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

/// A cut at either end, across two mappings, and of more than is there. What is gone is not pinned.
pub fn a_cut_takes_exactly_its_range(bench: &Bench) -> Outcome {
    takes_exactly(bench, &memfd(16)?)?;
    let file = guest_memfd(16)?;
    takes_exactly(bench, &file)?;
    same("nothing holds the file", Arc::strong_count(&file), 1)
}

fn takes_exactly(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let (engine, before) = (bench.engine()?, pinned()?);
    engine.domain.map(range(0, 16), 8 * PAGE, file, Offset(0), true)?;
    let mut left = 16 * PAGE;
    for (page, pages, gone) in [(0, 1, 1), (6, 4, 4), (14, 9, 2), (0, 3, 2)] {
        same("a cut", engine.unmap(page, pages), Unmap::Gone { bytes: gone * PAGE })?;
        left -= gone * PAGE;
        same("pinned", pinned()? - before, left)?;
    }
    for page in [2, 6, 9, 14] {
        check("the hole is out of reach", !reaches(&*engine.device, page, file)?)?;
    }
    for page in [3, 5, 10, 13] {
        check("what is left is reached", reaches(&*engine.device, page, file)?)?;
    }
    same("the rest", engine.unmap(0, 16), Unmap::Gone { bytes: left })?;
    same("nothing is pinned", pinned()?, before)
}

/// Where mappings go whole: the mapping goes, what is left of it is mapped; and the other way round.
pub fn a_page_out_of_a_huge_page_and_back(bench: &Bench) -> Outcome {
    split_and_restore(bench, HUGE)
}

pub fn a_page_out_of_a_gigantic_page_and_back(bench: &Bench) -> Outcome {
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
        same("it goes whole", engine.domain.unmap(whole), Unmap::Gone { bytes: huge })?;
        rest().try_for_each(map)?;
        check("the hole is out of reach", !reaches(&*engine.device, HOLE, &file)?)?;
        for page in [HOLE - 1, HOLE + 1, huge / PAGE - 1] {
            check("its neighbours are reached", reaches(&*engine.device, page, &file)?)?;
        }
        for part in rest() {
            same("what was left goes", engine.domain.unmap(part), Unmap::Gone { bytes: part.len() })?;
        }
        map(whole)?;
    }
    let punched = file.punch(HOLE * PAGE, PAGE).expect_err("a part of a page of the file");
    check("it says why", punched.to_string().contains("zeroed and not freed"))?;
    same("the whole", engine.domain.unmap(whole), Unmap::Gone { bytes: huge })
}

/// Whether a device reaches `page` of the file, mapped there: judged by what it writes.
pub fn reaches(device: &dyn Device, page: u64, file: &GuestFile) -> Result<bool, Failed> {
    let (kept, sent) = (fresh(64), fresh(64));
    file.write(page * PAGE, &kept)?;
    match device.dma_write(at(page), &sent) {
        Err(Error::Fault { .. }) => {}
        done => done?,
    }
    let seen = bytes(file, page * PAGE, 64)?;
    if seen != kept && seen != sent {
        return Err("the page holds what nobody wrote".into());
    }
    Ok(seen == sent)
}

/// A device that can tell says so; one that cannot sees poison. Nothing of the page changes.
fn out_of_reach(device: &dyn Device, page: u64, file: &GuestFile) -> Outcome {
    let kept = bytes(file, page * PAGE, 64)?;
    match device.dma_read(at(page), 64) {
        Err(Error::Fault { .. }) => {}
        seen => same("a read brings poison", seen?, vec![POISON; 64])?,
    }
    match device.dma_write(at(page), &fresh(64)) {
        Err(Error::Fault { .. }) => {}
        done => done?,
    }
    same("a write changes nothing", bytes(file, page * PAGE, 64)?, kept)
}

/// Bytes that the kernel says it has pinned for this process: a witness that is not the domain.
pub fn pinned() -> Result<u64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).ok_or("no VmPin")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}
