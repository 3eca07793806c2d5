//! Devices: DMA, and the fences that stop it.

use std::fmt;
use std::os::fd::BorrowedFd;

use passgate_bindings::{Iova, PageRange};

use crate::{Error, Result};

pub mod load;
pub mod nvme;
pub(crate) mod own;
pub mod pause;
mod poll;
pub mod refusal;
pub mod soft;
pub mod vfio;

pub use own::OwnMemory;
pub use poll::await_that;

/// A fence, as a step of the gate's ladder that acts on a device, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FenceStep {
    /// End the operations in flight and issue no more, where the device supports it (cancellation of io_uring
    /// operations, the drain of a driver). Operations have ended only once their tickets are returned. With a
    /// driver for DMA on demand, a transfer that is requested after a drain waits, for 5 s at most, until the device
    /// is attached again; after any stronger fence it fails.
    Drain,
    /// Set the migration state `VFIO_DEVICE_STATE_STOP`: DMA has stopped when the call returns.
    Stop,
    /// Clear Bus Master Enable in the Command register, then wait until Transactions Pending in Device Status is clear
    /// (PCIe 6.0, 7.5.1.1.3 and 7.5.3.5): the device issues no new request, and none is outstanding.
    Master,
    /// Move the device to the blocking domain (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    Detach,
    /// Reset the device (`VFIO_DEVICE_RESET`; a software device resets its sockets).
    Reset,
}

bitflags::bitflags! {
    /// The set of fences that a device supports.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct StopClass: u8 {
        /// [`FenceStep::Drain`].
        const DRAIN = 1;
        /// [`FenceStep::Stop`].
        const STOP = 2;
        /// [`FenceStep::Master`].
        const MASTER = 4;
        /// [`FenceStep::Detach`].
        const DETACH = 8;
        /// [`FenceStep::Reset`].
        const RESET = 16;
    }
}

impl StopClass {
    /// Returns true if the device supports this fence.
    pub fn has(self, step: FenceStep) -> bool {
        self.contains(match step {
            FenceStep::Drain => Self::DRAIN,
            FenceStep::Stop => Self::STOP,
            FenceStep::Master => Self::MASTER,
            FenceStep::Detach => Self::DETACH,
            FenceStep::Reset => Self::RESET,
        })
    }
}

/// The byte that [`Device::touch`] writes if the device can write any bytes.
const STAMP: u8 = 0xa5;
/// The number of bytes that it writes.
const STAMP_LEN: usize = 512;

/// The properties of a device that determine which fences are proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Nature {
    /// It caches translations (PCI ATS is on): the invalidation of that cache after an unmap may time out, which the
    /// kernel does not report.
    pub ats: bool,
    /// It is a TDISP interface in CONFIG_LOCKED or RUN: bus mastering off or a reset ends the TDI (PCIe 6.1,
    /// 11.2.8: the interface goes to ERROR).
    pub tdi: bool,
}

/// A passthrough device, or a software device.
pub trait Device: Send + Sync + fmt::Debug {
    /// Returns its name: a PCI address (`0000:00:04.0`), or `soft:0`.
    fn name(&self) -> &str;

    /// Returns the fences that it supports, found when it was opened.
    fn stop_class(&self) -> StopClass;

    /// Returns its present ATS and TDI state.
    fn nature(&self) -> Nature {
        Nature::default()
    }

    /// Executes one fence and returns once it is complete. `Ok` means exactly that the step has its documented effect.
    fn fence(&self, step: FenceStep) -> Result<()>;

    /// Attaches a fenced device to its domain again.
    fn attach(&self) -> Result<()>;

    /// Returns an eventfd that is readable once the host requests the device: it is being unbound or removed, which
    /// waits until no process has it open (VFIO's request interrupt). None if that is not signalled.
    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the IOVAs of its domain that its driver uses: no memory of a client may be mapped there.
    fn reserved(&self) -> Option<PageRange<Iova>> {
        None
    }

    /// Returns the descriptors with which a guardian stops this device when the worker dies.
    fn guard(&self) -> Guard<'_>;

    /// Does DMA on demand, for tests and self-tests: the device reads `len` bytes of guest memory at `iova`, which are
    /// returned. A DMA that faults is an error if the device can report it; if it cannot, the bytes are zero (such as
    /// those of QEMU's edu device).
    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        let _ = (iova, len);
        Err(self.no_dma())
    }

    /// Does DMA on demand: the device writes `bytes` to guest memory at `iova`.
    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let _ = (iova, bytes);
        Err(self.no_dma())
    }

    /// Does DMA on demand: the device writes bytes of its own choosing to guest memory at `iova`, at most a page (so
    /// not beyond the page if `iova` is its start). Returns the expected bytes.
    fn touch(&self, iova: Iova) -> Result<Vec<u8>> {
        let stamp = vec![STAMP; STAMP_LEN];
        self.dma_write(iova, &stamp)?;
        Ok(stamp)
    }

    /// Starts continuous DMA over `pages`, each a page of guest memory: the device writes a page, reads it back, and
    /// continues with the next, several at a time. The pages may be unmapped and mapped meanwhile: a transfer that
    /// faults is counted, and the load continues. Fences act on it as on any DMA; it continues after
    /// [`Device::attach`], and after a drain no transfer is lost.
    fn start(&self, pages: &[Iova]) -> Result<Box<dyn load::Load>> {
        let _ = pages;
        Err(Error::Unsupported { device: self.name().to_owned(), what: "DMA without a break" })
    }

    /// Returns the error of a device without DMA on demand.
    fn no_dma(&self) -> Error {
        Error::Unsupported { device: self.name().to_owned(), what: "DMA on demand" }
    }
}

/// The descriptors of one device that the guardian process needs, and its action when the worker dies.
#[derive(Debug, Clone, Copy)]
pub enum Guard<'a> {
    /// No descriptor: the kernel stops the device when its file closes (io_uring).
    None,
    /// A cdev bound to an iommufd: detach it (blocking domain), then reset it if it has a reset.
    Cdev(BorrowedFd<'a>),
    /// A device of a type1 container: unmap everything in the container, then reset the device if it has a reset.
    Type1 {
        /// The container's fd.
        container: BorrowedFd<'a>,
        /// The device's fd.
        device: BorrowedFd<'a>,
    },
}
