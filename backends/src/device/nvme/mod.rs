//! The NVMe driver (NVM Express Base Specification 2.0, NVM Command Set Specification 1.0): a block device that is
//! served to guests ([`Drive`]).
//!
//! A drive has several queues, each with one owning thread, and does DMA straight into guest memory, admitted by a
//! [`crate::window::Window`]. Another use of a controller, DMA of given bytes for tests, is in the package
//! passgate-exercise; it is built from [`low_level`].

use std::sync::Arc;

use super::vfio::VfioDevice;
use crate::Result;
use crate::iommu::Domain;

mod cids;
mod command;
mod controller;
mod data;
mod drive;
mod geometry;
mod queue;
mod queue_pair;
mod registers;
mod request;
mod watchdog;

pub use drive::{Drive, DriveOptions};
pub use geometry::Geometry;
pub use queue::Queue;
pub use registers::Registers;
pub use request::{Completed, Fault, Op, Submitted};
pub use watchdog::Health;

/// Class code: mass storage, non-volatile memory, NVM Express I/O controller.
pub const CLASS: u32 = 0x01_08_02;

/// The parts of the driver from which a driver with another use of a controller is built: one controller with its admin
/// queues, a queue pair in driver memory, and the encoding of commands. Nothing here knows an admission window: the
/// caller alone decides to which memory the controller does DMA.
pub mod low_level {
    pub use super::cids::{CidMatch, SerialCids};
    pub use super::command::{Command, Completion, DataPointer, sgl_data};
    pub use super::controller::{ADMIN_TIMEOUT, Controller, Doorbell, UNKNOWN_CID};
    pub use super::queue_pair::QueuePair;
}

/// Returns the registers of `device`, which the driver owns from here on.
pub fn vfio_registers(device: VfioDevice) -> Result<Arc<dyn Registers>> {
    Ok(Arc::new(registers::VfioRegisters::new(device)?))
}

/// Opens `device`, which is attached to `domain`, as a block device.
pub fn serve(device: VfioDevice, domain: &Arc<dyn Domain>, options: DriveOptions) -> Result<Arc<Drive>> {
    Drive::open(vfio_registers(device)?, domain, options)
}
