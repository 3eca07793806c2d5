//! Devices: DMA, and the fences that stop it.

use std::fmt;
use std::os::fd::BorrowedFd;

use passgate_bindings::{Iova, PageRange};

use crate::{Error, Result};

mod fence;
pub mod load;
pub mod nvme;
pub(crate) mod own;
pub mod pause;
mod poll;
pub mod refusal;
pub mod soft;
pub mod vfio;

pub use fence::{DeviceTraits, Step, Steps};
pub use own::OwnMemory;
pub use poll::await_that;

/// The byte that [`Device::touch`] writes if the device can write any bytes.
const STAMP: u8 = 0xa5;
/// The number of bytes that it writes.
const STAMP_LEN: usize = 512;

/// A passthrough device, or a software device.
pub trait Device: Send + Sync + fmt::Debug {
    /// Returns its name: a PCI address (`0000:00:04.0`), or `soft:0`.
    fn name(&self) -> &str;

    /// Returns the fences that it supports, found when it was opened.
    fn stop_class(&self) -> Steps;

    /// Returns its traits, with its present ATS and TDI state.
    fn traits(&self) -> DeviceTraits {
        DeviceTraits::default()
    }

    /// Executes one fence and returns once it is complete. `Ok` means exactly that the step has its documented effect.
    fn fence(&self, step: Step) -> Result<()>;

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
