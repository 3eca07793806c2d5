//! The NVMe drive does DMA on demand, and can be stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libtest_mimic::Failed;
use passgate_backends::device::nvme::{self, Nvme};
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::{Accept, Assignment, Device, Domain, Error, FenceStep, Unmap, assign};
use passgate_bindings::{Iova, PAGE, PageRange};
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

pub fn it_can_be_opened_again(bench: &Bench) -> Outcome {
    traffic::it_can_be_opened_again(bench, NVME)
}

/// The drive writes its identification to a page all the time, while the page is taken away and given back: from the
/// unmap on it does not change. (A write of blocks is done by a thread of the host's in memory that QEMU looked up when
/// it began, and QEMU's IOMMU does not wait for it, as a real one must: so no such claim is made of those here, nor behind a fence that does not wait.)
pub fn no_dma_reaches_a_page_after_its_unmap(bench: &Bench) -> Outcome {
    let (engine, page) = (traffic::engine(bench, NVME)?, memfd(1)?);
    let (touches, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let _ = engine.device.touch(at(0)); // whether it faulted QEMU's does not tell
                touches.fetch_add(1, Ordering::AcqRel);
            }
        });
        let outcome = (0..200).try_for_each(|_| -> Outcome {
            engine.map(0, 1, &page)?;
            some(&touches);
            same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
            let kept = fresh(PAGE as usize);
            page.write(0, &kept)?;
            some(&touches);
            check("the page is as it was left", bytes(&page, 0, PAGE as usize)? == kept)
        });
        done.store(true, Ordering::Release);
        load.join().expect("no panic");
        outcome
    })
}

/// Waits for three more.
fn some(touches: &AtomicU64) {
    let until = touches.load(Ordering::Acquire) + 3;
    while touches.load(Ordering::Acquire) < until {
        std::thread::yield_now();
    }
}

/// Not asked to overwrite its blocks, it moves no bytes of others' choosing, and still shows that it does DMA.
pub fn without_scratch_blocks_it_only_says_what_it_is(bench: &Bench) -> Outcome {
    let Assignment { domain, mut devices, .. } =
        assign(bench.kind, std::slice::from_ref(&bench.nvme), Accept::default(), bench.tables)?;
    let engine = Engine { device: devices.remove(0), domain };
    let file = memfd(1)?;
    engine.map(0, 1, &file)?;
    for refused in [engine.device.dma_write(at(0), &[1; 512]), engine.device.dma_read(at(0), 512).map(drop)] {
        check("it says so", matches!(refused, Err(Error::Unsupported { .. })))?;
    }
    let touched = engine.device.touch(at(0))?;
    same("what it wrote", bytes(&file, 0, touched.len())?, touched)?;
    same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
    let kept = fresh(64);
    file.write(0, &kept)?;
    let _ = engine.device.touch(at(0)); // QEMU's does not tell
    same("nothing was written", bytes(&file, 0, 64)?, kept)
}

/// The driver's own memory is taken from under it, so that no completion can arrive: a drain fails in its time, and
/// the fence above it does what the drain could not.
pub fn a_command_that_never_completes_fails_the_drain_and_not_the_next_fence(bench: &Bench) -> Outcome {
    let engine = traffic::engine(bench, NVME)?;
    let file = memfd(1)?;
    engine.map(0, 1, &file)?;
    check("DMA goes", engine.reaches(0, &file)?)?;
    let own: PageRange<Iova> = PageRange::new(OWN, OWN_LEN)?;
    check("it was there", matches!(engine.domain.unmap(own), Unmap::Gone { bytes } if bytes > 0))?;
    let drained = engine.device.fence(FenceStep::Drain).expect_err("its completion cannot arrive");
    same("the error", drained.errno(), Some(Errno::TIMEDOUT))?;
    engine.device.fence(FenceStep::Reset)?;
    let kept = fresh(64);
    file.write(0, &kept)?;
    check("nothing moves", engine.device.dma_write(at(0), &fresh(64)).is_err())?;
    same("nothing was written", bytes(&file, 0, 64)?, kept)
}

/// Where drivers have their own memory (backends/src/device/own.rs).
const OWN: u64 = 0xfec0_0000;
const OWN_LEN: u64 = 0x20_0000;

/// Completions come by interrupt, one or more for every two commands that a DMA takes.
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
