//! Kernel allocations that fail inside one call: for every N the Nth allocation that a map, unmap, cut, replace,
//! attach or detach makes in the kernel fails once (`/proc/thread-self/fail-nth`, Documentation/fault-injection).
//!
//! Whatever the call then answers must be true: what is reported as gone is out of reach of a device, what is
//! reported as not mapped is not mapped and not pinned, and what is reported as failed is accounted for, to the
//! byte, by the same call without a fault.

use std::fs;
use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::{Device, Error, FenceStep, Kind, Tables, Unmap};
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;

use super::bench::{Bench, Engine, at, bytes, check, fresh, guest_memfd, memfd, range, same};
use super::cut::pinned;
use super::traffic;

type Outcome = Result<(), Failed>;

/// The pages of every mapping here.
const PAGES: u64 = 4;

/// The number of allocations after which a call is taken for one that never ends; no call here makes half as many.
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

/// Runs `call` with its `nth` kernel allocation failing; true where it made so many.
fn with_fault<T>(nth: u32, call: impl FnOnce() -> T) -> Result<(T, bool), Failed> {
    const FAIL_NTH: &str = "/proc/thread-self/fail-nth";
    // Opened first: opening it allocates too.
    let file = fs::File::options().read(true).write(true).open(FAIL_NTH)?;
    rustix::io::pwrite(&file, nth.to_string().as_bytes(), 0)?;
    let result = call();
    let mut left = [0; 16];
    let len = rustix::io::pread(&file, &mut left, 0)?;
    rustix::io::pwrite(&file, b"0", 0)?;
    let left: u32 = std::str::from_utf8(&left[..len])?.trim().parse()?;
    Ok((result, left == 0))
}

/// Calls `trial` with 1, 2, … until no fault was injected any more. It returns whether one was, and whether the call
/// said that it failed.
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

/// True where the device's DMA arrives in page `page` after the base, which is that page of `file`.
fn reaches(device: &dyn Device, page: u64, file: &GuestFile) -> Result<bool, Failed> {
    let kept = fresh(PAGE as usize);
    file.write(page * PAGE, &kept)?;
    match device.touch(at(page)) {
        // QEMU's devices do not report every fault: memory is the witness.
        Ok(_) | Err(Error::Fault { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(bytes(file, page * PAGE, PAGE as usize)? != kept)
}

fn all_reach(engine: &Engine, pages: &[(u64, bool)], file: &GuestFile) -> Outcome {
    for (page, should) in pages {
        same(&format!("the device reaches page {page}"), reaches(&*engine.device, *page, file)?, *should)?;
    }
    Ok(())
}

/// Memory that is mapped by file where the kernel can, and memory that is mapped by address.
fn memories() -> Result<[Arc<GuestFile>; 2], Failed> {
    Ok([memfd(PAGES)?, guest_memfd(PAGES)?])
}

/// The bytes that an unmap without a fault finds after one that answered `first`, of `mapped` in all.
fn left_after(first: Unmap, mapped: u64) -> u64 {
    match first {
        Unmap::Gone { bytes } | Unmap::InFlight { bytes, .. } | Unmap::Failed { bytes, .. } => mapped - bytes,
    }
}

pub fn map_leaves_nothing_or_says_so(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, "PASSGATE_NVME")?;
    for file in memories()? {
        let before = pinned()?;
        let mut refused = 0;
        for_every_allocation("map", |nth| {
            // In pieces, so that a failure half-way has something to take back.
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
                    check("it is taken back", matches!(engine.unmap(0, PAGES), Unmap::Gone { .. }))?;
                }
                Err(error @ (Error::Map { .. } | Error::Memlock { .. })) => {
                    refused += 1;
                    all_reach(&engine, &[(0, false), (PAGES - 1, false)], &file)?;
                    let left = engine.unmap(0, PAGES);
                    same(&format!("left by `{error}`"), left, Unmap::Gone { bytes: 0 })?;
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
            let left = left_after(result, PAGES * PAGE);
            same("the next unmap finds the rest", engine.unmap(0, PAGES), Unmap::Gone { bytes: left })?;
            all_reach(&engine, &[(0, false), (PAGES - 1, false)], &file)?;
            same("pinned", pinned()?, before)?;
            Ok((injected, matches!(result, Unmap::Failed { .. })))
        })?;
    }
    Ok(())
}

/// A page out of the middle of a mapping, by a cut or by a replace, as the domain can.
pub fn a_page_leaves_a_mapping_or_nothing_is_said_to_be_gone(bench: &Bench) -> Outcome {
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
                // The ledger goes on asking until an unmap without a fault accounts for it.
                let left = left_after(result, PAGE);
                same("the same again finds the rest", take(), Unmap::Gone { bytes: left })?;
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

/// The engine that this takes has no driver that brings a controller up: what fails is the attach itself.
pub fn a_failed_attach_is_undone_by_a_detach(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(PAGES)?);
    engine.map(0, PAGES, &file)?;
    for_every_allocation("attach", |nth| {
        engine.device.fence(FenceStep::Detach)?;
        let (result, injected) = with_fault(nth, || engine.device.attach())?;
        if result.is_err() {
            engine.device.fence(FenceStep::Detach)?;
            check("detached, it reaches nothing", !reaches(&*engine.device, 0, &file)?)?;
            engine.device.attach()?;
        }
        check("attached, it reaches its memory", reaches(&*engine.device, 0, &file)?)?;
        Ok((injected, result.is_err()))
    })
}

pub fn a_detach_that_succeeds_has_stopped_dma(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(PAGES)?);
    engine.map(0, PAGES, &file)?;
    for_every_allocation("detach", |nth| {
        let (result, injected) = with_fault(nth, || engine.device.fence(FenceStep::Detach))?;
        if result.is_err() {
            engine.device.fence(FenceStep::Detach)?;
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
        ("fail_nth_map_leaves_nothing_or_says_so", map_leaves_nothing_or_says_so),
        ("fail_nth_unmap_accounts_for_every_byte", unmap_accounts_for_every_byte),
    ];
    if kind == Kind::Iommufd {
        let page = a_page_leaves_a_mapping_or_nothing_is_said_to_be_gone;
        trials.push(("fail_nth_a_page_leaves_a_mapping_or_nothing_is_said_to_be_gone", page));
        trials
            .push(("fail_nth_a_failed_attach_is_undone_by_a_detach", a_failed_attach_is_undone_by_a_detach));
        trials.push((
            "fail_nth_a_detach_that_succeeds_has_stopped_dma",
            a_detach_that_succeeds_has_stopped_dma,
        ));
    }
    trials
}
