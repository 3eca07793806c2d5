//! The devices of a domain with two page tables: who is attached, and so has to move when the tables swap.
//!
//! An IOAS that a device is attached to gives it an automatic HWPT, which goes, with all its entries, when the last
//! device leaves. So here each IOMMU has two HWPTs of ours instead, one for each IOAS, which the kernel keeps filled
//! whether or not a device is there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use passgate_bindings::Failed;
use passgate_bindings::iommufd::{DeviceId, HwptId, IoasId};
use rustix::io::Errno;

use super::kernel::{Kernel, Movable};

/// The devices, and the pairs of page tables that they can have. The lock is held for calls that attach and
/// detach, never while a table is filled: a fence does not wait for that.
#[derive(Debug)]
pub(super) struct Seats<D>(Mutex<Inner<D>>);

#[derive(Debug)]
struct Inner<D> {
    seats: Vec<Seat<D>>,
    pairs: Vec<[HwptId; 2]>,
}

#[derive(Debug)]
struct Seat<D> {
    cdev: Weak<D>,
    id: DeviceId,
    /// Which of the pairs its IOMMU takes, once known.
    pair: Option<[HwptId; 2]>,
    attached: bool,
}

impl<D: Movable> Seats<D> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Inner { seats: Vec::new(), pairs: Vec::new() }))
    }

    /// A device that was bound to the iommufd as `id`, and is not attached yet.
    pub(super) fn add(&self, cdev: &Arc<D>, id: DeviceId) {
        let mut inner = self.lock();
        inner.seats.retain(|seat| seat.cdev.strong_count() > 0);
        inner.seats.push(Seat { cdev: Arc::downgrade(cdev), id, pair: None, attached: false });
    }

    /// Attaches a device to the table of the IOAS that is `active` of the two; makes the tables if none that there
    /// is suits its IOMMU.
    pub(super) fn attach(
        &self,
        kernel: &impl Kernel,
        cdev: &Arc<D>,
        ioases: [IoasId; 2],
        active: usize,
    ) -> Result<(), Failed> {
        let mut inner = self.lock();
        let Some(at) = inner.place(cdev) else { return Err(Failed::new("attach", Errno::NODEV)) };
        let known = match inner.seats[at].pair {
            Some(pair) => vec![pair],
            None => inner.pairs.clone(),
        };
        for pair in known {
            match cdev.attach(pair[active]) {
                Ok(()) => {
                    inner.sit(at, pair);
                    return Ok(());
                }
                // The table is another IOMMU's.
                Err(failed) if failed.errno == Errno::INVAL && inner.seats[at].pair.is_none() => {}
                Err(failed) => return Err(failed),
            }
        }
        let id = inner.seats[at].id;
        drop(inner);
        let first = kernel.hwpt_alloc(id, ioases[0])?;
        let second = kernel.hwpt_alloc(id, ioases[1]).inspect_err(|_| destroy(kernel, first))?;
        let pair = [first, second];
        let mut inner = self.lock();
        inner.pairs.push(pair);
        let Some(at) = inner.place(cdev) else { return Err(Failed::new("attach", Errno::NODEV)) };
        cdev.attach(pair[active])?;
        inner.sit(at, pair);
        Ok(())
    }

    /// Detaches a device; it stays so when the tables swap.
    pub(super) fn detach(&self, cdev: &Arc<D>) -> Result<(), Failed> {
        let mut inner = self.lock();
        cdev.detach()?;
        if let Some(at) = inner.place(cdev) {
            inner.seats[at].attached = false;
        }
        Ok(())
    }

    /// False for a device that was detached, or that a failed switch has left so.
    pub(super) fn is_attached(&self, cdev: &Arc<D>) -> bool {
        let inner = self.lock();
        inner.place(cdev).is_some_and(|at| inner.seats[at].attached)
    }

    /// Moves every attached device to the table of the IOAS `to` of the two. If one does not move, all go back to
    /// where they were; one that does not even do that stays detached, its DMA blocked, until it is attached again.
    pub(super) fn switch(&self, to: usize) -> Result<(), Failed> {
        let mut inner = self.lock();
        for at in 0..inner.seats.len() {
            let Err(failed) = inner.seats[at].move_to(to) else { continue };
            for seat in &mut inner.seats[..=at] {
                seat.back_to(1 - to);
            }
            return Err(failed);
        }
        Ok(())
    }

    /// Destroys the tables. No device is attached any more.
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
    fn place(&self, cdev: &Arc<D>) -> Option<usize> {
        self.seats.iter().position(|seat| std::ptr::eq(seat.cdev.as_ptr(), Arc::as_ptr(cdev)))
    }

    fn sit(&mut self, at: usize, pair: [HwptId; 2]) {
        (self.seats[at].pair, self.seats[at].attached) = (Some(pair), true);
    }
}

impl<D: Movable> Seat<D> {
    /// The device and its tables, if it is attached.
    fn taken(&self) -> Option<(Arc<D>, [HwptId; 2])> {
        Some((self.cdev.upgrade()?, self.pair?)).filter(|_| self.attached)
    }

    fn move_to(&self, to: usize) -> Result<(), Failed> {
        self.taken().map_or(Ok(()), |(cdev, pair)| cdev.attach(pair[to]))
    }

    /// Detached first: after a failed move the hardware may be detached although the kernel says otherwise.
    fn back_to(&mut self, to: usize) {
        let Some((cdev, pair)) = self.taken() else { return };
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
