//! Interrupts that are set, changed and disabled while the device is reset.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use libtest_mimic::Failed;
use passgate_backends::device::Guard;
use passgate_backends::{Device, Step};
use passgate_bindings::vfio::DeviceFile;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::AsFd;

use super::bench::{Bench, check, same};

/// `VFIO_PCI_MSIX_IRQ_INDEX`.
const MSIX: u32 = 2;
const VECTORS: u32 = 4;
const RESETS: u32 = 10;

/// Duplicates the descriptor of the device.
fn duplicate(device: &dyn Device) -> Result<DeviceFile, Failed> {
    match device.guard() {
        Guard::Cdev(fd) | Guard::Type1 { device: fd, .. } => {
            Ok(DeviceFile::from_fd(fd.try_clone_to_owned()?))
        }
        Guard::None => Err("not a VFIO device".into()),
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn eventfds() -> Result<Vec<OwnedFd>, Failed> {
    (0..VECTORS).map(|_| Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)).collect()
}

/// CVE-2024-26810 to 26814: races in the kernel between setting interrupts and a reset. Whatever the calls return
/// meanwhile, afterwards the device accepts interrupts, and no descriptor is leaked.
pub fn class_13_interrupts_set_during_resets_leave_a_device_that_works(bench: &Bench) -> Result<(), Failed> {
    let set = bench.assign(&[&bench.nvme])?;
    let device = &set.devices[0];
    let file = duplicate(&**device)?;
    check("it has vectors", file.irq_info(MSIX)?.count >= VECTORS)?;
    let before = descriptors();
    let (stop, succeeded) = (AtomicBool::new(false), AtomicU64::new(0));
    let reset = thread::scope(|scope| {
        for nth in 0..2 {
            let (file, stop, succeeded) = (&file, &stop, &succeeded);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(fds) = eventfds() else { return };
                    let all: Vec<_> = fds.iter().map(|fd| Some(fd.as_fd())).collect();
                    let done = [
                        file.set_irqs(MSIX, 0, &all),
                        file.set_irqs(MSIX, nth, &[None]),
                        file.disable_irqs(MSIX),
                    ];
                    let count = done.iter().filter(|done| done.is_ok()).count() as u64;
                    succeeded.fetch_add(count, Ordering::Relaxed);
                }
            });
        }
        let reset = (0..RESETS).try_for_each(|_| {
            device.fence(Step::Reset)?;
            device.attach()
        });
        stop.store(true, Ordering::Relaxed);
        reset
    });
    reset?;
    check("interrupts were set meanwhile", succeeded.load(Ordering::Relaxed) > 0)?;
    let fds = eventfds()?;
    let all: Vec<_> = fds.iter().map(|fd| Some(fd.as_fd())).collect();
    file.set_irqs(MSIX, 0, &all)?;
    file.disable_irqs(MSIX)?;
    drop(fds);
    same("open descriptors", descriptors(), before)
}
