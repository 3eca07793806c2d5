//! The contract of every device with a driver in passgate-backends: the trials of igb.rs, nvme.rs and virtio.rs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libtest_mimic::Failed;
use passgate_backends::{Assignment, Device, Domain, Error, Kind, Step, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE};
use passgate_exercise::edu::POISON;
use rustix::io::Errno;

use super::bench::{Bench, Engine, at, bytes, check, fresh, guest_memfd, memfd, range, same};

pub type Outcome = Result<(), Failed>;

/// Returns the device named by an environment variable.
pub fn named(variable: &str) -> Result<String, Failed> {
    Ok(std::env::var(variable).map_err(|_| format!("{variable} is not set"))?)
}

/// Makes a domain with the device named by an environment variable.
pub fn engine(bench: &Bench, variable: &str) -> Result<Engine, Failed> {
    let Assignment { domain, mut devices, .. } = bench.assign(&[&named(variable)?])?;
    Ok(Engine { device: devices.remove(0), domain })
}

/// Lengths around every boundary: words, Ethernet's minimum frame, receive buffers, chunks, pages.
const LENGTHS: [usize; 14] = [1, 2, 7, 8, 9, 59, 64, 1023, 1024, 1025, 1500, 4095, 4096, 5001];

/// Reads and writes, with memfd and guest_memfd, at aligned and unaligned addresses and across pages; no other byte
/// changes.
pub fn dma_moves_the_right_bytes(engine: &Engine) -> Outcome {
    for file in [memfd(4)?, guest_memfd(4)?] {
        engine.domain.map(range(0, 3), PAGE, &file, Offset(PAGE), true)?;
        for (n, len) in LENGTHS.into_iter().enumerate() {
            let from = [0, 1, PAGE - 3, 2048][n % 4];
            transfer(engine, &file, from, len)?;
        }
        same("unmapped", engine.unmap(0, 3), Unmap::Gone { bytes: 3 * PAGE })?;
    }
    Ok(())
}

fn transfer(engine: &Engine, file: &GuestFile, from: u64, len: usize) -> Outcome {
    let before = fresh(3 * PAGE as usize);
    file.write(PAGE, &before)?;
    let iova = Iova(at(0).0 + from);
    let here = from as usize..from as usize + len;
    same(
        &format!("a read of {len} bytes"),
        engine.device.dma_read(iova, len)?,
        before[here.clone()].to_vec(),
    )?;
    let sent = fresh(len);
    engine.device.dma_write(iova, &sent)?;
    let mut after = before;
    after[here].copy_from_slice(&sent);
    check(&format!("a write of {len} bytes changes exactly these"), bytes(file, PAGE, after.len())? == after)
}

/// Unmapped memory is neither read nor written; other mapped memory is still reached.
pub fn unmapped_memory_is_out_of_reach(engine: &Engine) -> Outcome {
    let (file, other) = (memfd(1)?, memfd(1)?);
    engine.map(8, 1, &other)?;
    for _ in 0..2 {
        engine.map(0, 1, &file)?;
        check("DMA works while the page is mapped", engine.reaches(0, &file)?)?;
        same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
        let content = fresh(64);
        file.write(0, &content)?;
        // QEMU's NICs and GPU do not report faults; its drive does.
        match engine.device.dma_read(at(0), 64) {
            Err(Error::Fault { .. }) => {}
            seen => same("a read returns poison", seen?, vec![POISON; 64])?,
        }
        match engine.device.dma_write(at(0), &fresh(64)) {
            Err(Error::Fault { .. }) => {}
            done => done?,
        }
        same("a write changes nothing", bytes(&file, 0, 64)?, content)?;
        check("another page is still reached", engine.reaches(8, &other)?)?;
    }
    Ok(())
}

/// Each fence during DMA: after it no byte is transferred, although everything is mapped, until the attach.
pub fn fence_stops_dma_until_attach(engine: &Engine) -> Outcome {
    let (file, other) = (memfd(1)?, memfd(1)?);
    engine.map(0, 1, &file)?;
    engine.map(1, 1, &other)?;
    let (moved, wrong, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                match engine.device.dma_write(at(0), &fresh(64)).map_err(|error| error.errno()) {
                    Ok(()) => drop(moved.fetch_add(1, Ordering::AcqRel)),
                    // Refused after a fence, or aborted by a fence that does not wait.
                    Err(Some(Errno::SHUTDOWN | Errno::FAULT)) => std::thread::yield_now(),
                    Err(_) => drop(wrong.fetch_add(1, Ordering::AcqRel)),
                }
            }
        });
        let outcome = fences(engine).into_iter().cycle().take(9).try_for_each(|step| -> Outcome {
            let before = moved.load(Ordering::Acquire);
            while moved.load(Ordering::Acquire) < before + 3 && wrong.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            engine.device.fence(step)?;
            check_fenced(engine, &file, step)?;
            check("an aborted transfer does not affect the next", engine.reaches(1, &other)?)
        });
        done.store(true, Ordering::Release);
        outcome
    })?;
    same("transfers that failed for another reason than a fence", wrong.into_inner(), 0)
}

/// Returns the fences that the device supports, weakest first.
fn fences(engine: &Engine) -> Vec<Step> {
    let class = engine.device.stop_class();
    let all = [Step::Drain, Step::Stop, Step::Master, Step::Detach, Step::Reset];
    all.into_iter().filter(|step| class.has(*step)).collect()
}

/// Checks that a fenced device does no DMA until it is attached, and attaches it.
fn check_fenced(engine: &Engine, file: &GuestFile, step: Step) -> Outcome {
    if step == Step::Drain {
        return check_drained(engine, file);
    }
    check_stopped(engine, file)?;
    Ok(engine.device.attach()?)
}

/// Checks that a transfer to a drained device waits for the attach, and attaches it.
fn check_drained(engine: &Engine, file: &GuestFile) -> Outcome {
    let (content, sent) = (fresh(128), fresh(64));
    file.write(0, &content)?;
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| engine.device.dma_write(Iova(at(0).0 + 64), &sent));
        let seen = bytes(file, 0, 128);
        engine.device.attach()?;
        asked.join().expect("no panic")?;
        same("nothing was written before the attach", seen?, content)
    })?;
    same("written after the attach", bytes(file, 64, 64)?, sent)
}

/// Checks that a device behind a fence stronger than a drain refuses transfers, with the remedy in the error.
fn check_stopped(engine: &Engine, file: &GuestFile) -> Outcome {
    let content = fresh(64);
    file.write(0, &content)?;
    for refused in [engine.device.dma_write(at(0), &fresh(64)), engine.device.dma_read(at(0), 64).map(drop)] {
        let error = refused.expect_err("fenced");
        same("the error", error.errno(), Some(Errno::SHUTDOWN))?;
        check("the remedy", error.to_string().contains("attach it again"))?;
    }
    same("nothing was written", bytes(file, 0, 64)?, content)
}

/// Ten times each fence that the device supports, each with an attach.
pub fn every_fence_is_undone_by_an_attach(bench: &Bench, engine: &Engine) -> Outcome {
    let class = engine.device.stop_class();
    check("it has a drain", class.has(Step::Drain))?;
    same("it can be detached on iommufd", class.has(Step::Detach), bench.kind == Kind::Iommufd)?;
    let file = guest_memfd(1)?;
    engine.map(0, 1, &file)?;
    for _ in 0..10 {
        for step in fences(engine) {
            engine.device.fence(step)?;
            check_fenced(engine, &file, step)?;
            check(&format!("DMA works again after {step:?}"), engine.reaches(0, &file)?)?;
        }
    }
    same("the mapping was not changed", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })
}

/// The number of unmaps of a page during DMA.
const ROUNDS: u64 = 200;

/// The devices read and write a page all the time, while the page is unmapped and mapped again. While it is unmapped
/// they neither change nor read a byte of it; and DMA to another page of each device, which stays mapped, is correct.
pub fn no_dma_reaches_a_page_after_its_unmap(domain: &dyn Domain, devices: &[Arc<dyn Device>]) -> Outcome {
    let pages = (0..=devices.len()).map(|_| memfd(1)).collect::<Result<Vec<_>, _>>()?;
    for (n, page) in pages.iter().enumerate() {
        domain.map(range(n as u64, 1), PAGE, page, Offset(0), true)?;
    }
    let rounds: Vec<_> = devices.iter().map(|_| AtomicU64::new(0)).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (rounds, done) = (&rounds, &done);
        let loads: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(n, device)| {
                scope.spawn(move || {
                    let ended = dma_load(&**device, 1 + n as u64, &rounds[n], done);
                    done.store(true, Ordering::Release);
                    ended
                })
            })
            .collect();
        let outcome = (0..ROUNDS).try_for_each(|round| unmap_round(domain, &pages[0], round, rounds, done));
        done.store(true, Ordering::Release);
        loads.into_iter().try_for_each(|load| load.join().expect("no panic")).and(outcome)
    })
}

/// One round: the page is unmapped and filled with a secret, every device makes three rounds of DMA, and the secret
/// must be unchanged.
fn unmap_round(
    domain: &dyn Domain,
    page: &Arc<GuestFile>,
    round: u64,
    rounds: &[AtomicU64],
    done: &AtomicBool,
) -> Outcome {
    same("unmapped", domain.unmap(range(0, 1)), Unmap::Gone { bytes: PAGE })?;
    let secret: Vec<u8> = (0..PAGE).map(|n| SECRET | (n + round) as u8).collect();
    page.write(0, &secret)?;
    let until: Vec<_> = rounds.iter().map(|round| round.load(Ordering::Acquire) + 3).collect();
    for (round, until) in rounds.iter().zip(until) {
        while round.load(Ordering::Acquire) < until && !done.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }
    check(&format!("round {round}: the page is unchanged"), bytes(page, 0, PAGE as usize)? == secret)?;
    page.write(0, &vec![1; PAGE as usize])?;
    Ok(domain.map(range(0, 1), PAGE, page, Offset(0), true)?)
}

/// A bit that is set in the bytes of secrets only.
const SECRET: u8 = 0x80;

/// DMA in both directions, to the page that is unmapped and mapped, where a fault is no error, and to the device's
/// other page.
fn dma_load(device: &dyn Device, neighbour: u64, rounds: &AtomicU64, done: &AtomicBool) -> Outcome {
    while !done.load(Ordering::Acquire) {
        drop(device.dma_write(at(0), &fresh(64)));
        if let Ok(seen) = device.dma_read(Iova(at(0).0 + 64), 64) {
            check("no secret was read", seen.iter().all(|byte| byte & SECRET == 0))?;
        }
        let sent = fresh(64);
        device.dma_write(at(neighbour), &sent)?;
        same("the content of the other page", device.dma_read(at(neighbour), 64)?, sent)?;
        rounds.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

/// Continuous DMA over three pages, of which one is unmapped and mapped again and one is never mapped.
pub fn load_continues_during_unmaps(engine: &Engine) -> Outcome {
    let (page, stays) = (memfd(1)?, memfd(1)?);
    engine.map(1, 1, &stays)?;
    let load = engine.device.start(&[at(0), at(1), at(2)])?;
    for round in 0..20 {
        engine.map(0, 1, &page)?;
        let before = load.counts().done;
        while load.counts().done < before + 6 {
            std::thread::yield_now();
        }
        same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
        let content = fresh(PAGE as usize);
        page.write(0, &content)?;
        let before = load.counts().faults;
        while load.counts().faults < before + 4 {
            std::thread::yield_now();
        }
        check(&format!("round {round}: the page is unchanged"), bytes(&page, 0, PAGE as usize)? == content)?;
    }
    check("it has faulted on the page that is never mapped", load.stop()?.faults >= 80)?;
    let load = engine.device.start(&[at(1)])?;
    while load.counts().done < 4 {
        std::thread::yield_now();
    }
    let alone = load.stop()?;
    same("faults and wrong bytes on a page that stays mapped", (alone.faults, alone.wrong), (0, 0))
}

/// A device that was closed after transfers, and while it was fenced, can be opened again.
pub fn can_be_opened_again(bench: &Bench, variable: &str) -> Outcome {
    for round in 0..3 {
        let (engine, file) = (engine(bench, variable)?, memfd(1)?);
        engine.map(0, 1, &file)?;
        check("DMA works", engine.reaches(0, &file)?)?;
        if round > 0 {
            let steps = fences(&engine);
            engine.device.fence(steps[(round - 1) * (steps.len() - 1)])?; // the weakest, then the strongest
        }
    }
    Ok(())
}
