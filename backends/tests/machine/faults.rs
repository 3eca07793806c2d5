//! Kernel allocations that fail inside one call: for every N the Nth allocation that a map, unmap, cut, replace, attach
//! or detach makes in the kernel fails once (`/proc/thread-self/fail-nth`, Documentation/fault-injection).
//!
//! Whatever the call then returns must be correct: a range that is reported as gone is out of reach of a device, one
//! that is reported as not mapped is neither mapped nor pinned, and after a failure the same call without a fault
//! accounts for every byte.

use std::fs;
use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::{Device, Error, Kind, Step, Tables, Unmap};
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;

use super::bench::{Bench, Engine, at, bytes, check, fresh, guest_memfd, memfd, range, same};
use super::cut::pinned;
use super::traffic;

type Outcome = Result<(), Failed>;

/// The pages of every mapping here.
const PAGES: u64 = 4;

/// The number of allocations after which a call counts as endless; no call here makes half as many.
const MAX_ALLOCATIONS: u32 = 4096;

/// The reason for which no fault can be injected here, if there is one.
pub fn no_injection() -> Option<&'static str> {
    let can = fs::exists("/proc/thread-self/fail-nth").unwrap_or(false);
    (!can).then_some("this kernel injects no faults (CONFIG_FAULT_INJECTION)")
}

/// Lets allocations that may sleep fail too, and keeps the kernel from printing a stack for each.
fn set_up() -> Outcome {
    for (file, value) in [
        ("failslab/ignore-gfp-wait", "N"),
        ("failslab/verbose", "0"),
        ("fail_page_alloc/ignore-gfp-wait", "N"),
        ("fail_page_alloc/min-order", "0"),
        ("fail_page_alloc/verbose", "0"),
    ] {
        fs::write(format!("/sys/kernel/debug/{file}"), value).map_err(|error| format!("{file}: {error}"))?;
    }
    Ok(())
}

/// Runs `call` with its `nth` kernel allocation failing. The second value is true if the call made that many.
fn with_fault<T>(nth: u32, call: impl FnOnce() -> T) -> Result<(T, bool), Failed> {
    const FAIL_NTH: &str = "/proc/thread-self/fail-nth";
    // Opened before the fault is armed, because opening allocates too.
    let file = fs::File::options().read(true).write(true).open(FAIL_NTH)?;
    rustix::io::pwrite(&file, nth.to_string().as_bytes(), 0)?;
    let result = call();
    let mut remaining = [0; 16];
    let len = rustix::io::pread(&file, &mut remaining, 0)?;
    rustix::io::pwrite(&file, b"0", 0)?;
    let remaining: u32 = std::str::from_utf8(&remaining[..len])?.trim().parse()?;
    Ok((result, remaining == 0))
}

/// Calls `trial` with 1, 2, … until no fault was injected any more. `trial` returns whether one was injected, and
/// whether the call failed.
fn for_every_allocation(what: &str, mut trial: impl FnMut(u32) -> Result<(bool, bool), Failed>) -> Outcome {
    set_up()?;
    let (mut injected, mut failed) = (0, 0);
    for nth in 1..MAX_ALLOCATIONS {
        let (was, did) = trial(nth)
            .map_err(|error| format!("{what}, allocation {nth}: {}", error.message().unwrap_or("")))?;
        if !was {
            println!("{what}: {injected} allocations failed, {failed} calls with them");
            return Ok(());
        }
        injected += 1;
        failed += u32::from(did);
    }
    Err(format!("{what} allocates without end").into())
}

/// Returns true if a DMA of the device to page `page` after BASE changes that page of `file`.
fn reaches(device: &dyn Device, page: u64, file: &GuestFile) -> Result<bool, Failed> {
    let content = fresh(PAGE as usize);
    file.write(page * PAGE, &content)?;
    match device.touch(at(page)) {
        // QEMU's devices do not report every fault, so the content of memory decides.
        Ok(_) | Err(Error::Fault { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(bytes(file, page * PAGE, PAGE as usize)? != content)
}

fn all_reach(engine: &Engine, pages: &[(u64, bool)], file: &GuestFile) -> Outcome {
    for (page, should) in pages {
        same(&format!("the device reaches page {page}"), reaches(&*engine.device, *page, file)?, *should)?;
    }
    Ok(())
}

/// Makes memory that is mapped by file if the kernel supports it, and memory that is mapped by address.
fn memories() -> Result<[Arc<GuestFile>; 2], Failed> {
    Ok([memfd(PAGES)?, guest_memfd(PAGES)?])
}

/// Returns the number of bytes that remain mapped after an unmap of `mapped` bytes that returned `first`.
fn remaining_after(first: Unmap, mapped: u64) -> u64 {
    match first {
        Unmap::Gone { bytes } | Unmap::InFlight { bytes, .. } | Unmap::Failed { bytes, .. } => mapped - bytes,
    }
}

pub fn map_leaves_nothing_or_reports_it(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, "PASSGATE_NVME")?;
    for file in memories()? {
        let before = pinned()?;
        let mut refused = 0;
        for_every_allocation("map", |nth| {
            // In pieces, so that a failure half-way has to roll pieces back.
            let map = || engine.domain.map(range(0, PAGES), PAGE, &file, Offset(0), true);
            let (result, injected) = with_fault(nth, map)?;
            let failed = result.is_err();
            match result {
                Ok(()) => {
                    all_reach(&engine, &[(0, true), (PAGES - 1, true)], &file)?;
                    same("mapped", engine.unmap(0, PAGES), Unmap::Gone { bytes: PAGES * PAGE })?;
                }
                // The range is unknown until an unmap succeeds.
                Err(Error::HalfMapped { .. }) => {
                    check("it is unmapped", matches!(engine.unmap(0, PAGES), Unmap::Gone { .. }))?;
                }
                Err(error @ (Error::Map { .. } | Error::Memlock { .. })) => {
                    refused += 1;
                    all_reach(&engine, &[(0, false), (PAGES - 1, false)], &file)?;
                    let remaining = engine.unmap(0, PAGES);
                    same(&format!("mapped after `{error}`"), remaining, Unmap::Gone { bytes: 0 })?;
                }
                Err(error) => return Err(error.into()),
            }
            all_reach(&engine, &[(0, false)], &file)?;
            same("pinned", pinned()?, before)?;
            Ok((injected, failed))
        })?;
        check("some map was refused", refused > 0)?;
    }
    Ok(())
}

pub fn unmap_accounts_for_every_byte(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, "PASSGATE_NVME")?;
    for file in memories()? {
        let before = pinned()?;
        for_every_allocation("unmap", |nth| {
            engine.domain.map(range(0, PAGES), PAGE, &file, Offset(0), true)?;
            let (result, injected) = with_fault(nth, || engine.unmap(0, PAGES))?;
            if let Unmap::Gone { bytes } = result {
                same("gone", bytes, PAGES * PAGE)?;
                all_reach(&engine, &[(0, false), (PAGES - 1, false)], &file)?;
            }
            let remaining = remaining_after(result, PAGES * PAGE);
            same("the next unmap", engine.unmap(0, PAGES), Unmap::Gone { bytes: remaining })?;
            all_reach(&engine, &[(0, false), (PAGES - 1, false)], &file)?;
            same("pinned", pinned()?, before)?;
            Ok((injected, matches!(result, Unmap::Failed { .. })))
        })?;
    }
    Ok(())
}

/// A page is removed from the middle of a mapping, by a cut or, if the domain has two page tables, by a replace.
pub fn page_leaves_a_mapping_or_nothing_is_reported_gone(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, "PASSGATE_NVME")?;
    let replaces = bench.tables == Tables::Standby;
    for file in memories()? {
        let before = pinned()?;
        for_every_allocation(if replaces { "replace" } else { "cut" }, |nth| {
            engine.domain.map(range(0, PAGES), PAGES * PAGE, &file, Offset(0), true)?;
            let hole = [range(1, 1)];
            let take = || if replaces { engine.domain.replace(&hole) } else { engine.domain.unmap(hole[0]) };
            let (result, injected) = with_fault(nth, take)?;
            let failed = matches!(result, Unmap::Failed { .. });
            if !failed {
                same("gone", result, Unmap::Gone { bytes: PAGE })?;
                all_reach(&engine, &[(1, false)], &file)?;
            }
            all_reach(&engine, &[(0, true), (2, true), (3, true)], &file)?;
            if failed {
                // The gate repeats the call until one without a fault accounts for every byte.
                let remaining = remaining_after(result, PAGE);
                same("the same call again", take(), Unmap::Gone { bytes: remaining })?;
                all_reach(&engine, &[(0, true), (1, false), (2, true), (3, true)], &file)?;
            }
            let rest = Unmap::Gone { bytes: (PAGES - 1) * PAGE };
            same("the rest", engine.unmap(0, PAGES), rest)?;
            all_reach(&engine, &[(0, false), (3, false)], &file)?;
            same("pinned", pinned()?, before)?;
            Ok((injected, failed))
        })?;
    }
    Ok(())
}

/// Uses the edu engine, whose driver does not restart the device: so it is the attach itself that fails.
pub fn failed_attach_is_undone_by_a_detach(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(PAGES)?);
    engine.map(0, PAGES, &file)?;
    for_every_allocation("attach", |nth| {
        engine.device.fence(Step::Detach)?;
        let (result, injected) = with_fault(nth, || engine.device.attach())?;
        if result.is_err() {
            engine.device.fence(Step::Detach)?;
            check("detached, it reaches nothing", !reaches(&*engine.device, 0, &file)?)?;
            engine.device.attach()?;
        }
        check("attached, it reaches its memory", reaches(&*engine.device, 0, &file)?)?;
        Ok((injected, result.is_err()))
    })
}

pub fn successful_detach_has_stopped_dma(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(PAGES)?);
    engine.map(0, PAGES, &file)?;
    for_every_allocation("detach", |nth| {
        let (result, injected) = with_fault(nth, || engine.device.fence(Step::Detach))?;
        if result.is_err() {
            engine.device.fence(Step::Detach)?;
        }
        check("detached, it reaches nothing", !reaches(&*engine.device, 0, &file)?)?;
        engine.device.attach()?;
        check("attached, it reaches its memory", reaches(&*engine.device, 0, &file)?)?;
        Ok((injected, result.is_err()))
    })
}

/// A trial, and its name.
type Named = (&'static str, fn(&Bench) -> Outcome);

/// The trials of one domain.
pub fn trials(kind: Kind) -> Vec<Named> {
    let mut trials: Vec<Named> = vec![
        ("fail_nth_map_leaves_nothing_or_reports_it", map_leaves_nothing_or_reports_it),
        ("fail_nth_unmap_accounts_for_every_byte", unmap_accounts_for_every_byte),
    ];
    if kind == Kind::Iommufd {
        let page = page_leaves_a_mapping_or_nothing_is_reported_gone;
        trials.push(("fail_nth_page_leaves_a_mapping_or_nothing_is_reported_gone", page));
        trials.push(("fail_nth_failed_attach_is_undone_by_a_detach", failed_attach_is_undone_by_a_detach));
        trials.push(("fail_nth_successful_detach_has_stopped_dma", successful_detach_has_stopped_dma));
    }
    trials
}
