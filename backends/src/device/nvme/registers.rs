//! A controller's registers and interrupts, wherever it is: behind VFIO, or the simulator.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use passgate_bindings::Failed;
use passgate_bindings::vfio::device::Region;
use passgate_bindings::vfio::mapped::Mapped;

use super::super::Device;
use super::super::vfio::VfioDevice;
use crate::{Error, Result};

/// `VFIO_PCI_MSIX_IRQ_INDEX`.
const MSIX: u32 = 2;

/// Registers (NVM Express base specification 2.0, 3.1.3).
pub(super) const CAP: u64 = 0x00;
pub(super) const CC: u64 = 0x14;
pub(super) const CSTS: u64 = 0x1c;
pub(super) const AQA: u64 = 0x24;
pub(super) const ASQ: u64 = 0x28;
pub(super) const ACQ: u64 = 0x30;
pub(super) const DOORBELLS: u64 = 0x1000;

pub(super) const CC_ENABLE: u32 = 1;
pub(super) const CC_SHUT_DOWN: u32 = 1 << 14;
/// Entries of 2^6 bytes in submission queues, of 2^4 in completion queues; pages of 4096 bytes.
pub(super) const CC_ENTRIES: u32 = 6 << 16 | 4 << 20;
pub(super) const CSTS_READY: u32 = 1;
pub(super) const CSTS_FATAL: u32 = 1 << 1;
pub(super) const CSTS_SHUTDOWN: u32 = 3 << 2;
pub(super) const CSTS_SHUTDOWN_DONE: u32 = 2 << 2;
/// What every register of a device reads as that is not there any more.
pub(super) const GONE: u32 = u32::MAX;

/// Access to a controller.
pub trait Registers: Send + Sync + fmt::Debug {
    /// The device that it is a part of.
    fn device(&self) -> &Arc<dyn Device>;

    /// False where its domain has left the device detached, because it did not move to another page table. While a fence
    /// has detached it, it may say either.
    fn is_attached(&self) -> bool;

    /// Reads the 32-bit register at `at`.
    fn get(&self, at: u64) -> Result<u32>;

    /// Writes the 32-bit register at `at`.
    fn set(&self, at: u64, value: u32) -> Result<()>;

    /// Writes a doorbell: what [`Registers::set`] does, without a system call where that can be.
    fn ring(&self, at: u64, value: u32) -> Result<()> {
        self.set(at, value)
    }

    /// Interrupt vectors that it has.
    fn vectors(&self) -> Result<u32>;

    /// Has each vector write its eventfd from now on; one without is silent.
    fn interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()>;

    /// Readable once somebody wants the device back, who waits until it is closed; none where nobody can say so.
    fn removal(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The error that a failed call is.
    fn failed(&self, source: Failed) -> Error {
        Error::Device { device: self.device().name().to_owned(), source, mend: "" }
    }
}

/// Registers behind VFIO. The doorbells are mapped into this process where the device lets them be; the mapping, like
/// the device's file, is gone when the process is.
#[derive(Debug)]
pub(super) struct Bar {
    doorbells: Option<Mapped>,
    region: Region,
    vfio: Arc<VfioDevice>,
    device: Arc<dyn Device>,
}

impl Bar {
    /// BAR 0 of `vfio`.
    pub(super) fn of(vfio: VfioDevice) -> Result<Self> {
        let vfio = Arc::new(vfio);
        let region = vfio.region(0)?;
        let doorbells = match vfio.file().map(region, DOORBELLS, passgate_bindings::PAGE as usize) {
            Ok(mapped) => Some(mapped),
            Err(error) => {
                log::debug!("{}: doorbells by system calls: {error}", vfio.name());
                None
            }
        };
        let device = Arc::clone(&vfio) as Arc<dyn Device>;
        Ok(Self { doorbells, region, vfio, device })
    }
}

impl Registers for Bar {
    fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn is_attached(&self) -> bool {
        self.vfio.is_attached()
    }

    fn get(&self, at: u64) -> Result<u32> {
        self.vfio.read_u32(self.region, at)
    }

    fn set(&self, at: u64, value: u32) -> Result<()> {
        self.vfio.write_u32(self.region, at, value)
    }

    fn ring(&self, at: u64, value: u32) -> Result<()> {
        let mapped = self.doorbells.as_ref().zip(at.checked_sub(DOORBELLS));
        match mapped {
            Some((doorbells, at)) if doorbells.store(at as usize, value) => Ok(()),
            _ => self.set(at, value),
        }
    }

    fn vectors(&self) -> Result<u32> {
        self.vfio.file().irq_info(MSIX).map(|info| info.count).map_err(|failed| self.vfio.failed(failed))
    }

    fn removal(&self) -> Option<BorrowedFd<'_>> {
        self.vfio.wanted()
    }

    fn interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        self.vfio.file().set_irqs(MSIX, 0, eventfds).map_err(|failed| self.vfio.failed(failed))
    }
}
