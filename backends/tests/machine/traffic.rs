//! What every device with a driver of ours promises, whatever its kind: the trials of igb.rs and virtio.rs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libtest_mimic::Failed;
use passgate_backends::device::edu::POISON;
use passgate_backends::{Assignment, Device, Domain, Error, FenceStep, Kind, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE};
use rustix::io::Errno;

use super::bench::{Bench, Engine, at, bytes, check, fresh, guest_memfd, memfd, range, same};

pub type Outcome = Result<(), Failed>;

/// The device that `variable` names.
pub fn named(variable: &str) -> Result<String, Failed> {
    Ok(std::env::var(variable).map_err(|_| format!("{variable} is not set"))?)
}

/// A domain with the device that `variable` names.
pub fn engine(bench: &Bench, variable: &str) -> Result<Engine, Failed> {
    let Assignment { domain, mut devices, .. } = bench.assign(&[&named(variable)?])?;
    Ok(Engine { device: devices.remove(0), domain })
}

/// Lengths around every border there is: words, Ethernet's least frame, receive buffers, chunks, pages.
const LENGTHS: [usize; 14] = [1, 2, 7, 8, 9, 59, 64, 1023, 1024, 1025, 1500, 4095, 4096, 5001];

/// Both ways, memfd and guest_memfd, from even and odd places, across pages; and not a byte beside.
pub fn dma_moves_the_right_bytes(engine: &Engine) -> Outcome {
    for file in [memfd(4)?, guest_memfd(4)?] {
        engine.domain.map(range(0, 3), PAGE, &file, Offset(PAGE), true)?;
        for (n, len) in LENGTHS.into_iter().enumerate() {
            let from = [0, 1, PAGE - 3, 2048][n % 4];
            moves(engine, &file, from, len)?;
        }
        same("unmapped", engine.unmap(0, 3), Unmap::Gone { bytes: 3 * PAGE })?;
    }
    Ok(())
}

fn moves(engine: &Engine, file: &GuestFile, from: u64, len: usize) -> Outcome {
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
    check(
        &format!("a write of {len} bytes changes those and no other"),
        bytes(file, PAGE, after.len())? == after,
    )
}

/// Memory that was unmapped is neither read nor written; what is mapped is reached as before.
pub fn unmapped_memory_is_out_of_reach(engine: &Engine) -> Outcome {
    let (file, other) = (memfd(1)?, memfd(1)?);
    engine.map(8, 1, &other)?;
    for _ in 0..2 {
        engine.map(0, 1, &file)?;
        check("DMA goes while the page is mapped", engine.reaches(0, &file)?)?;
        same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
        let kept = fresh(64);
        file.write(0, &kept)?;
        // QEMU's network cards and GPU cannot tell; its drive can.
        match engine.device.dma_read(at(0), 64) {
            Err(Error::Fault { .. }) => {}
            seen => same("a read brings poison", seen?, vec![POISON; 64])?,
        }
        match engine.device.dma_write(at(0), &fresh(64)) {
            Err(Error::Fault { .. }) => {}
            done => done?,
        }
        same("a write changes nothing", bytes(&file, 0, 64)?, kept)?;
        check("a neighbour is still reached", engine.reaches(8, &other)?)?;
    }
    Ok(())
}

/// Each fence under DMA: when it returns nothing moves any more, though everything is mapped, until the attach.
pub fn a_fence_under_dma_stops_it_until_the_attach(engine: &Engine) -> Outcome {
    let (file, other) = (memfd(1)?, memfd(1)?);
    engine.map(0, 1, &file)?;
    engine.map(1, 1, &other)?;
    let (moved, wrong, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                match engine.device.dma_write(at(0), &fresh(64)).map_err(|error| error.errno()) {
                    Ok(()) => drop(moved.fetch_add(1, Ordering::AcqRel)),
                    // Refused, or cut off by a fence that does not wait.
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
            comes_back(engine, &file, step)?;
            check("what was cut off is not taken for what comes after", engine.reaches(1, &other)?)
        });
        done.store(true, Ordering::Release);
        outcome
    })?;
    same("transfers that failed of anything but a fence", wrong.into_inner(), 0)
}

/// The fences that the device has, weakest first.
fn fences(engine: &Engine) -> Vec<FenceStep> {
    let class = engine.device.stop_class();
    let all = [FenceStep::Drain, FenceStep::Stop, FenceStep::Master, FenceStep::Detach, FenceStep::Reset];
    all.into_iter().filter(|step| class.has(*step)).collect()
}

/// A fenced device holds until it is attached.
fn comes_back(engine: &Engine, file: &GuestFile, step: FenceStep) -> Outcome {
    if step == FenceStep::Drain {
        return pauses(engine, file);
    }
    holds(engine, file)?;
    Ok(engine.device.attach()?)
}

/// A drained device changes nothing, and what is asked of it is done once it is attached.
fn pauses(engine: &Engine, file: &GuestFile) -> Outcome {
    let (kept, sent) = (fresh(128), fresh(64));
    file.write(0, &kept)?;
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| engine.device.dma_write(Iova(at(0).0 + 64), &sent));
        let seen = bytes(file, 0, 128);
        engine.device.attach()?;
        asked.join().expect("no panic")?;
        same("nothing was written", seen?, kept)
    })?;
    same("it is written at last", bytes(file, 64, 64)?, sent)
}

/// A fenced device changes nothing, and says why it does not do as it is told.
fn holds(engine: &Engine, file: &GuestFile) -> Outcome {
    let kept = fresh(64);
    file.write(0, &kept)?;
    for refused in [engine.device.dma_write(at(0), &fresh(64)), engine.device.dma_read(at(0), 64).map(drop)] {
        let error = refused.expect_err("fenced");
        same("the error", error.errno(), Some(Errno::SHUTDOWN))?;
        check("it says how to go on", error.to_string().contains("attach it again"))?;
    }
    same("nothing was written", bytes(file, 0, 64)?, kept)
}

/// Ten times each fence that the device has, and it is back every time.
pub fn every_fence_is_undone_by_an_attach(bench: &Bench, engine: &Engine) -> Outcome {
    let class = engine.device.stop_class();
    check("it drains", class.has(FenceStep::Drain))?;
    same("it detaches where the kernel can", class.has(FenceStep::Detach), bench.kind == Kind::Iommufd)?;
    let file = guest_memfd(1)?;
    engine.map(0, 1, &file)?;
    for _ in 0..10 {
        for step in fences(engine) {
            engine.device.fence(step)?;
            comes_back(engine, &file, step)?;
            check(&format!("DMA goes again after {step:?}"), engine.reaches(0, &file)?)?;
        }
    }
    same("the mapping was there all along", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })
}

/// Rounds of taking a page away under DMA.
const ROUNDS: u64 = 200;

/// The devices go at a page all the time, both ways, while the page is taken away and given back. While it is away
/// they neither change it nor learn a byte of it; and each one's neighbour, which stays, is served rightly.
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
                    let ended = pound(&**device, 1 + n as u64, &rounds[n], done);
                    done.store(true, Ordering::Release);
                    ended
                })
            })
            .collect();
        let outcome = (0..ROUNDS).try_for_each(|round| take_away(domain, &pages[0], round, rounds, done));
        done.store(true, Ordering::Release);
        loads.into_iter().try_for_each(|load| load.join().expect("no panic")).and(outcome)
    })
}

/// One round: the page goes, a secret comes into it, every device goes on for three rounds of its own, the secret is
/// still there.
fn take_away(
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
    check(&format!("round {round}: the page is as it was left"), bytes(page, 0, PAGE as usize)? == secret)?;
    page.write(0, &vec![1; PAGE as usize])?;
    Ok(domain.map(range(0, 1), PAGE, page, Offset(0), true)?)
}

/// A bit that only secrets have.
const SECRET: u8 = 0x80;

/// DMA both ways to the page that comes and goes, and to the device's own neighbour of it. A fault is no error on the
/// former.
fn pound(device: &dyn Device, neighbour: u64, rounds: &AtomicU64, done: &AtomicBool) -> Outcome {
    while !done.load(Ordering::Acquire) {
        drop(device.dma_write(at(0), &fresh(64)));
        if let Ok(seen) = device.dma_read(Iova(at(0).0 + 64), 64) {
            check("no secret was read", seen.iter().all(|byte| byte & SECRET == 0))?;
        }
        let sent = fresh(64);
        device.dma_write(at(neighbour), &sent)?;
        same("the neighbour holds", device.dma_read(at(neighbour), 64)?, sent)?;
        rounds.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

/// DMA without a break over three pages, of which one comes and goes and one is never there.
pub fn a_load_runs_beside_unmaps(engine: &Engine) -> Outcome {
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
        let kept = fresh(PAGE as usize);
        page.write(0, &kept)?;
        let before = load.counts().faults;
        while load.counts().faults < before + 4 {
            std::thread::yield_now();
        }
        check(
            &format!("round {round}: the page is as it was left"),
            bytes(&page, 0, PAGE as usize)? == kept,
        )?;
    }
    check("it has met the page that is never there", load.stop()?.faults >= 80)?;
    let load = engine.device.start(&[at(1)])?;
    while load.counts().done < 4 {
        std::thread::yield_now();
    }
    let alone = load.stop()?;
    same("faults and wrong bytes on a page that stays", (alone.faults, alone.wrong), (0, 0))
}

/// Closed with transfers behind it and while fenced, it can be opened again.
pub fn it_can_be_opened_again(bench: &Bench, variable: &str) -> Outcome {
    for round in 0..3 {
        let (engine, file) = (engine(bench, variable)?, memfd(1)?);
        engine.map(0, 1, &file)?;
        check("DMA goes", engine.reaches(0, &file)?)?;
        if round > 0 {
            let steps = fences(&engine);
            engine.device.fence(steps[(round - 1) * (steps.len() - 1)])?; // the weakest, then the strongest
        }
    }
    Ok(())
}
