//! DMA on demand and fences of the NVMe drive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libtest_mimic::Failed;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::{Accept, Assignment, Device, Domain, Error, Step, Unmap, assign};
use passgate_bindings::{Iova, PAGE, PageRange};
use passgate_exercise::Drivers;
use passgate_exercise::nvme::{self, Nvme};
use rustix::io::Errno;

use super::bench::{Bench, Engine, at, bytes, check, fresh, memfd, range, same};
use super::traffic::{self, Outcome};

const NVME: &str = "PASSGATE_NVME";

pub fn dma_moves_the_right_bytes(bench: &Bench) -> Outcome {
    traffic::dma_moves_the_right_bytes(&traffic::engine(bench, NVME)?)
}

pub fn unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    traffic::unmapped_memory_is_out_of_reach(&traffic::engine(bench, NVME)?)
}

pub fn every_fence_is_undone_by_an_attach(bench: &Bench) -> Outcome {
    traffic::every_fence_is_undone_by_an_attach(bench, &traffic::engine(bench, NVME)?)
}

pub fn can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::can_be_opened_again(bench, NVME)
}

/// The drive writes its Identify data to a page all the time, while the page is unmapped and mapped again: after the
/// unmap the page does not change. Reads of blocks are not tested here: QEMU translates their addresses when they
/// begin, a host thread copies the data later, and QEMU's IOMMU does not wait for it, as a real one must. For the same
/// reason nothing is tested after a fence that does not wait.
pub fn no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let (engine, page) = (traffic::engine(bench, NVME)?, memfd(1)?);
    let (touches, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let _ = engine.device.touch(at(0)); // QEMU's drive does not report a fault here
                touches.fetch_add(1, Ordering::AcqRel);
            }
        });
        let outcome = (0..200).try_for_each(|_| -> Outcome {
            engine.map(0, 1, &page)?;
            await_touches(&touches);
            same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
            let content = fresh(PAGE as usize);
            page.write(0, &content)?;
            await_touches(&touches);
            check("the page is unchanged", bytes(&page, 0, PAGE as usize)? == content)
        });
        done.store(true, Ordering::Release);
        load.join().expect("no panic");
        outcome
    })
}

/// Waits for three more writes.
fn await_touches(touches: &AtomicU64) {
    let until = touches.load(Ordering::Acquire) + 3;
    while touches.load(Ordering::Acquire) < until {
        std::thread::yield_now();
    }
}

/// Without permission to overwrite blocks, the drive refuses DMA on demand, but `touch` still does DMA.
pub fn without_scratch_blocks_refuses_dma_on_demand(bench: &Bench) -> Outcome {
    let Assignment { domain, mut devices, .. } = assign(
        bench.kind,
        std::slice::from_ref(&bench.nvme),
        Accept::default(),
        &Drivers::default(),
        bench.tables,
    )?;
    let engine = Engine { device: devices.remove(0), domain };
    let file = memfd(1)?;
    engine.map(0, 1, &file)?;
    for refused in [engine.device.dma_write(at(0), &[1; 512]), engine.device.dma_read(at(0), 512).map(drop)] {
        check("it is refused", matches!(refused, Err(Error::Unsupported { .. })))?;
    }
    let touched = engine.device.touch(at(0))?;
    same("the bytes that it wrote", bytes(&file, 0, touched.len())?, touched)?;
    same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
    let content = fresh(64);
    file.write(0, &content)?;
    let _ = engine.device.touch(at(0)); // QEMU's drive does not report a fault here
    same("nothing was written", bytes(&file, 0, 64)?, content)
}

/// The driver's memory is unmapped, so that no completion can arrive: a drain times out, and the next stronger fence
/// stops the device.
pub fn command_that_never_completes_fails_the_drain_but_not_the_reset(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, NVME)?;
    let file = memfd(1)?;
    engine.map(0, 1, &file)?;
    check("DMA works", engine.reaches(0, &file)?)?;
    let driver_memory: PageRange<Iova> = PageRange::new(DRIVER_MEMORY, DRIVER_MEMORY_LEN)?;
    let unmapped = engine.domain.unmap(driver_memory);
    check("driver memory was mapped", matches!(unmapped, Unmap::Gone { bytes } if bytes > 0))?;
    let drained = engine.device.fence(Step::Drain).expect_err("its completion cannot arrive");
    same("the error", drained.errno(), Some(Errno::TIMEDOUT))?;
    engine.device.fence(Step::Reset)?;
    let content = fresh(64);
    file.write(0, &content)?;
    check("DMA is refused", engine.device.dma_write(at(0), &fresh(64)).is_err())?;
    same("nothing was written", bytes(&file, 0, 64)?, content)
}

/// The range of driver memory (backends/src/device/own.rs).
const DRIVER_MEMORY: u64 = 0xfec0_0000;
const DRIVER_MEMORY_LEN: u64 = 0x20_0000;

/// Completions are signalled by interrupts, at least one for each DMA, which takes two commands.
pub fn completions_come_by_interrupt(bench: &Bench) -> Outcome {
    let domain = IommufdDomain::open(bench.tables)?;
    let together = [bench.nvme.parse().map_err(|_| Failed::from("no PCI address"))?];
    let vfio = VfioDevice::open_cdev(&bench.nvme, &domain, &together)?;
    let domain: Arc<dyn Domain> = domain;
    let drive: Nvme = nvme::open(vfio, &domain, true)?;
    let file = memfd(1)?;
    domain.map(range(0, 1), PAGE, &file, passgate_bindings::units::Offset(0), true)?;
    let before = drive.interrupts();
    for _ in 0..50 {
        drive.dma_write(at(0), &fresh(512))?;
    }
    let came = drive.interrupts() - before;
    check(&format!("{came} interrupts for 100 commands"), came >= 50)
}
