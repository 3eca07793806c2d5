//! Devices: what does DMA, and how surely it can be stopped.

use std::fmt;
use std::os::fd::BorrowedFd;

use passgate_bindings::{Iova, PageRange};

use crate::{Error, Result};

pub mod driven;
mod driven_load;
pub mod edu;
pub mod igb;
pub mod load;
pub mod nvme;
pub(crate) mod own;
mod pause;
pub mod refusal;
pub mod sim;
pub mod soft;
pub mod vfio;
pub mod virtio;

/// A rung of the ladder that acts on a device, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FenceStep {
    /// End what is in flight and issue no more, where the device can be told so (io_uring cancel, a driver's
    /// own drain). Ended only when the tickets come back. Where the driver is ours, a transfer that is asked for
    /// after it waits, for 5 s at most, until the device is attached again; behind any stronger fence it fails.
    Drain,
    /// The migration state `VFIO_DEVICE_STATE_STOP`: DMA has stopped when the call returns.
    Stop,
    /// Bus mastering off in the command register, then wait until no transaction is pending (PCI Express
    /// Capability, Device Status): the device issues no new request, and none is on its way.
    Master,
    /// Move the device to the blocking domain (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    Detach,
    /// Reset the device (`VFIO_DEVICE_RESET`; a software device resets its sockets).
    Reset,
}

bitflags::bitflags! {
    /// The fences that a device has: its stop class.
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
    /// Whether the device has this fence.
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

/// What [`Device::touch`] writes where the device can write anything.
const STAMP: u8 = 0xa5;
const STAMP_LEN: usize = 512;

/// What of a device bears on which fences prove anything, found when it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Nature {
    /// It caches translations of its own (PCI ATS is on): an unmap that succeeded may have been followed by an
    /// invalidation of that cache which timed out, and nobody is told.
    pub ats: bool,
    /// It is a TDISP interface in CONFIG_LOCKED or RUN: bus mastering off or a reset ends the TDI (PCIe 6.1,
    /// 11.2.8: the interface goes to ERROR).
    pub tdi: bool,
}

/// A passthrough device, or the software one.
pub trait Device: Send + Sync + fmt::Debug {
    /// Its name: a PCI address (`0000:00:04.0`), or `soft:0`.
    fn name(&self) -> &str;

    /// How it can be stopped, found when it was opened.
    fn stop_class(&self) -> StopClass;

    /// What of it bears on which fences prove anything.
    fn nature(&self) -> Nature {
        Nature::default()
    }

    /// Does one fence and returns once it is done; `Ok` says that the step did what it promises, not more.
    fn fence(&self, step: FenceStep) -> Result<()>;

    /// Puts a fenced device back into its domain.
    fn attach(&self) -> Result<()>;

    /// An eventfd that is readable once the host wants the device back: somebody unbinds or removes it, and waits until
    /// nobody has it open. None where that is not told.
    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// IOVAs of its domain that are its driver's own: no memory of a client may be there.
    fn reserved(&self) -> Option<PageRange<Iova>> {
        None
    }

    /// What a guardian must hold to stop this device when the worker dies; empty where the kernel does it.
    fn guard(&self) -> Guard<'_>;

    /// DMA on demand, for tests and self-tests: the device reads `len` bytes of guest memory at `iova` and
    /// returns what it saw. A DMA that faults is an error where the device can tell; where it cannot (edu),
    /// the bytes are zero ([`edu::POISON`]).
    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        let _ = (iova, len);
        Err(self.no_dma())
    }

    /// DMA on demand: the device writes `bytes` to guest memory at `iova`.
    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let _ = (iova, bytes);
        Err(self.no_dma())
    }

    /// DMA on demand: the device writes something of its own choosing to guest memory at `iova`, at most a page and
    /// not beyond a page's end if `iova` is at its start; returns what it is to be.
    fn touch(&self, iova: Iova) -> Result<Vec<u8>> {
        let stamp = vec![STAMP; STAMP_LEN];
        self.dma_write(iova, &stamp)?;
        Ok(stamp)
    }

    /// Starts DMA over `pages`, each a page of guest memory, without a break: the device writes a page, reads it
    /// back, and goes on to the next, several at a time. What is mapped there may come and go: a transfer that
    /// faults is counted, and the load goes on. The fences act on it as on any DMA; [`Device::attach`] lets it go on,
    /// after a drain without a transfer lost.
    fn start(&self, pages: &[Iova]) -> Result<Box<dyn load::Load>> {
        let _ = pages;
        Err(Error::Unsupported { device: self.name().to_owned(), what: "DMA without a break" })
    }

    /// The error of a device that has no DMA on demand.
    fn no_dma(&self) -> Error {
        Error::Unsupported { device: self.name().to_owned(), what: "DMA on demand" }
    }
}

/// What the guardian process holds for one device, and does when the worker dies.
#[derive(Debug, Clone, Copy)]
pub enum Guard<'a> {
    /// The kernel stops the device by itself when its file closes (io_uring); there is nothing to hold.
    None,
    /// A cdev bound to iommufd: detach it (blocking domain), then reset where it can.
    Cdev(BorrowedFd<'a>),
    /// A device of a type1 container: unmap everything in the container, then reset where it can.
    Type1 {
        /// The container's fd.
        container: BorrowedFd<'a>,
        /// The device's fd.
        device: BorrowedFd<'a>,
    },
}
