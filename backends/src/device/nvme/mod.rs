//! The NVMe driver (NVM Express Base Specification 2.0, NVM Command Set Specification 1.0): one controller, two uses.
//!
//! [`Nvme`] exercises a domain for tests and self-tests: DMA of given bytes into given memory, one command at a time.
//! [`Drive`] is the block device that is served to guests: several queues, each with one owning thread, and DMA
//! straight into guest memory, admitted by a [`crate::window::Window`].

use std::sync::Arc;

use passgate_bindings::PAGE;

use super::driven::Driven;
use super::vfio::VfioDevice;
use crate::Result;
use crate::iommu::Domain;

mod cids;
mod command;
mod controller;
mod data;
mod drive;
mod exerciser;
mod geometry;
mod queue;
mod queue_pair;
mod registers;
mod request;
pub mod sim;
mod watchdog;

pub use drive::{Drive, DriveOptions};
pub use exerciser::Exerciser;
pub use geometry::Geometry;
pub use queue::Queue;
pub use registers::Registers;
pub use request::{Completed, Fault, Op, Submitted};
pub use watchdog::Health;

/// Class code: mass storage, non-volatile memory, NVM Express I/O controller.
pub const CLASS: u32 = 0x01_08_02;

/// The longest transfer of the exerciser, in bytes.
const CHUNK: usize = PAGE as usize;

/// An NVMe drive as a device that does DMA on demand.
pub type Nvme = Driven<Exerciser>;

/// Opens `device`, which is attached to `domain`, for DMA on demand. `scratch` permits the last blocks of namespace 1
/// to be overwritten.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>, scratch: bool) -> Result<Nvme> {
    exercise(Arc::new(registers::VfioRegisters::new(device)?), domain, scratch)
}

/// As [`open`], with any implementation of the registers.
pub fn exercise(registers: Arc<dyn Registers>, domain: &Arc<dyn Domain>, scratch: bool) -> Result<Nvme> {
    exerciser::open(registers, domain, scratch)
}

/// Opens `device`, which is attached to `domain`, as a block device.
pub fn serve(device: VfioDevice, domain: &Arc<dyn Domain>, options: DriveOptions) -> Result<Arc<Drive>> {
    Drive::open(Arc::new(registers::VfioRegisters::new(device)?), domain, options)
}
