//! The devices of a domain with two page tables: which are attached, and so have to move when the tables are switched.
//!
//! A device that is attached to an IOAS gets an automatic HWPT, which the kernel destroys, with all its entries, when
//! the last device detaches. So for each IOMMU two HWPTs are allocated instead, one for each IOAS, which the kernel
//! keeps filled whether or not a device is attached.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use passgate_bindings::Failed;
use passgate_bindings::iommufd::{DeviceId, HwptId, IoasId};
use rustix::io::Errno;

use super::kernel::{Kernel, Movable};

/// The devices, and the pairs of HWPTs that they can be attached to. The lock is held during calls that attach and
/// detach, but never while a page table is filled: a fence (a detach) must not wait for that.
#[derive(Debug)]
pub(super) struct Attachments<D>(Mutex<Inner<D>>);

#[derive(Debug)]
struct Inner<D> {
    devices: Vec<Attachment<D>>,
    /// The HWPT for each of the two IOASes; one pair for each IOMMU.
    pairs: Vec<[HwptId; 2]>,
}

/// One device.
#[derive(Debug)]
struct Attachment<D> {
    cdev: Weak<D>,
    id: DeviceId,
    /// The pair of HWPTs that its IOMMU accepts, once known.
    pair: Option<[HwptId; 2]>,
    attached: bool,
}

impl<D: Movable> Attachments<D> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Inner { devices: Vec::new(), pairs: Vec::new() }))
    }

    /// Adds a device that was bound to the iommufd as `id` and is not attached yet.
    pub(super) fn add(&self, cdev: &Arc<D>, id: DeviceId) {
        let mut inner = self.lock();
        inner.devices.retain(|device| device.cdev.strong_count() > 0);
        inner.devices.push(Attachment { cdev: Arc::downgrade(cdev), id, pair: None, attached: false });
    }

    /// Attaches a device to the HWPT of the IOAS with the index `active`. Allocates a pair of HWPTs if its IOMMU
    /// accepts none of the existing ones.
    pub(super) fn attach(
        &self,
        kernel: &impl Kernel,
        cdev: &Arc<D>,
        ioases: [IoasId; 2],
        active: usize,
    ) -> Result<(), Failed> {
        let mut inner = self.lock();
        let Some(at) = inner.index_of(cdev) else { return Err(Failed::new("attach", Errno::NODEV)) };
        let known = match inner.devices[at].pair {
            Some(pair) => vec![pair],
            None => inner.pairs.clone(),
        };
        for pair in known {
            match cdev.attach(pair[active]) {
                Ok(()) => {
                    inner.set_attached(at, pair);
                    return Ok(());
                }
                // EINVAL: the HWPT belongs to another IOMMU.
                Err(failed) if failed.errno == Errno::INVAL && inner.devices[at].pair.is_none() => {}
                Err(failed) => return Err(failed),
            }
        }
        let id = inner.devices[at].id;
        // The allocation fills the new page tables, so it is made without the lock.
        drop(inner);
        let first = kernel.hwpt_alloc(id, ioases[0])?;
        let second = kernel.hwpt_alloc(id, ioases[1]).inspect_err(|_| destroy(kernel, first))?;
        let pair = [first, second];
        let mut inner = self.lock();
        inner.pairs.push(pair);
        let Some(at) = inner.index_of(cdev) else { return Err(Failed::new("attach", Errno::NODEV)) };
        cdev.attach(pair[active])?;
        inner.set_attached(at, pair);
        Ok(())
    }

    /// Detaches a device. It stays detached when the tables are switched.
    pub(super) fn detach(&self, cdev: &Arc<D>) -> Result<(), Failed> {
        let mut inner = self.lock();
        cdev.detach()?;
        if let Some(at) = inner.index_of(cdev) {
            inner.devices[at].attached = false;
        }
        Ok(())
    }

    /// Returns false for a device that was detached, or that a failed switch has left detached.
    pub(super) fn is_attached(&self, cdev: &Arc<D>) -> bool {
        let inner = self.lock();
        inner.index_of(cdev).is_some_and(|at| inner.devices[at].attached)
    }

    /// Moves every attached device to the HWPT of the IOAS with the index `to`. If one cannot be moved, all are moved
    /// back; one that cannot be moved back stays detached, its DMA blocked, until it is attached again.
    pub(super) fn switch(&self, to: usize) -> Result<(), Failed> {
        let mut inner = self.lock();
        for at in 0..inner.devices.len() {
            let Err(failed) = inner.devices[at].move_to(to) else { continue };
            // Including the device that failed: the hardware state after a failed move is unknown.
            for device in &mut inner.devices[..=at] {
                device.restore(1 - to);
            }
            return Err(failed);
        }
        Ok(())
    }

    /// Destroys the HWPTs. No device may be attached any more.
    pub(super) fn close(&self, kernel: &impl Kernel) {
        for hwpt in self.lock().pairs.drain(..).flatten() {
            destroy(kernel, hwpt);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D> Inner<D> {
    fn index_of(&self, cdev: &Arc<D>) -> Option<usize> {
        self.devices.iter().position(|device| std::ptr::eq(device.cdev.as_ptr(), Arc::as_ptr(cdev)))
    }

    fn set_attached(&mut self, at: usize, pair: [HwptId; 2]) {
        (self.devices[at].pair, self.devices[at].attached) = (Some(pair), true);
    }
}

impl<D: Movable> Attachment<D> {
    /// Returns the device and its HWPTs, if it is attached.
    fn if_attached(&self) -> Option<(Arc<D>, [HwptId; 2])> {
        Some((self.cdev.upgrade()?, self.pair?)).filter(|_| self.attached)
    }

    fn move_to(&self, to: usize) -> Result<(), Failed> {
        self.if_attached().map_or(Ok(()), |(cdev, pair)| cdev.attach(pair[to]))
    }

    /// Attaches the device to the HWPT with the index `to` again. It is detached first: after a failed move the
    /// hardware may be detached although the kernel reports it as attached.
    fn restore(&mut self, to: usize) {
        let Some((cdev, pair)) = self.if_attached() else { return };
        if let Err(failed) = cdev.detach().and_then(|()| cdev.attach(pair[to])) {
            log::error!(
                "device {} of the iommufd stays detached until it is attached again: {failed}",
                self.id.0
            );
            self.attached = false;
        }
    }
}

fn destroy(kernel: &impl Kernel, hwpt: HwptId) {
    if let Err(failed) = kernel.hwpt_destroy(hwpt) {
        log::warn!("HWPT {}: {failed}; it stays until the iommufd closes", hwpt.0);
    }
}
