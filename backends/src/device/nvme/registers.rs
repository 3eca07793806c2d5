//! Access to a controller's registers and interrupts: by VFIO, or of the simulated controller.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use passgate_bindings::Failed;
use passgate_bindings::vfio::device::Region;
use passgate_bindings::vfio::mapped::Mapped;

use super::super::Device;
use super::super::vfio::VfioDevice;
use crate::{Error, Result};

/// `VFIO_PCI_MSIX_IRQ_INDEX` (include/uapi/linux/vfio.h).
const MSIX_IRQ_INDEX: u32 = 2;

// Register offsets in BAR 0 (NVMe Base 2.0, 3.1.3). The doorbells begin at 1000h; CAP.DSTRD gives their distance.
pub(super) const CAP: u64 = 0x00;
pub(super) const CC: u64 = 0x14;
pub(super) const CSTS: u64 = 0x1c;
pub(super) const AQA: u64 = 0x24;
pub(super) const ASQ: u64 = 0x28;
pub(super) const ACQ: u64 = 0x30;
pub(super) const DOORBELLS: u64 = 0x1000;

// CC (NVMe Base 2.0, 3.1.3.5) and CSTS (3.1.3.6).
pub(super) const CC_EN: u32 = 1;
pub(super) const CC_SHN_NORMAL: u32 = 1 << 14;
/// CC.IOSQES and CC.IOCQES: entries of 2^6 bytes in submission queues, of 2^4 in completion queues. CC.MPS is 0 (4
/// KiB pages) and CC.CSS is 0 (the NVM command set).
pub(super) const CC_ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;
pub(super) const CSTS_RDY: u32 = 1;
pub(super) const CSTS_CFS: u32 = 1 << 1;
pub(super) const CSTS_SHST: u32 = 3 << 2;
pub(super) const CSTS_SHST_COMPLETE: u32 = 2 << 2;
/// The value of every register of a device that no longer answers: reads from it complete with all bits set.
pub(super) const ALL_ONES: u32 = u32::MAX;

/// Access to the registers and the interrupt vectors of one controller.
pub trait Registers: Send + Sync + fmt::Debug {
    /// Returns the PCI device that the controller belongs to.
    fn device(&self) -> &Arc<dyn Device>;

    /// False if the domain has left the device detached, because it could not be moved to another page table. While
    /// the device is detached by a fence, either value may be returned.
    fn is_attached(&self) -> bool;

    /// Reads the 32-bit register at byte offset `at`.
    fn get(&self, at: u64) -> Result<u32>;

    /// Writes the 32-bit register at byte offset `at`.
    fn set(&self, at: u64, value: u32) -> Result<()>;

    /// Writes a doorbell: as [`Registers::set`], but without a system call where the doorbell is mapped.
    fn ring(&self, at: u64, value: u32) -> Result<()> {
        self.set(at, value)
    }

    /// Returns the number of MSI-X vectors.
    fn vectors(&self) -> Result<u32>;

    /// Connects vector n to `eventfds[n]`; a vector without an eventfd signals nothing.
    fn set_interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()>;

    /// Returns an eventfd that is readable once the kernel wants the device back (it is being unbound or removed, and
    /// waits until the device is closed). None if removal is not reported.
    fn removal(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the error for a failed call on this device.
    fn failed(&self, source: Failed) -> Error {
        Error::Device { device: self.device().name().to_owned(), source, remedy: "" }
    }
}

/// Registers of a VFIO device. The doorbells are mapped into this process if the device permits it, and are written
/// by pwrite otherwise. The mapping ends with the process, as the device file does.
#[derive(Debug)]
pub(super) struct VfioRegisters {
    doorbells: Option<Mapped>,
    region: Region,
    vfio: Arc<VfioDevice>,
    device: Arc<dyn Device>,
}

impl VfioRegisters {
    /// Opens BAR 0 of `vfio`.
    pub(super) fn new(vfio: VfioDevice) -> Result<Self> {
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

impl Registers for VfioRegisters {
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
        self.vfio
            .file()
            .irq_info(MSIX_IRQ_INDEX)
            .map(|info| info.count)
            .map_err(|failed| self.vfio.failed(failed))
    }

    fn removal(&self) -> Option<BorrowedFd<'_>> {
        self.vfio.wanted()
    }

    fn set_interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        self.vfio.file().set_irqs(MSIX_IRQ_INDEX, 0, eventfds).map_err(|failed| self.vfio.failed(failed))
    }
}
