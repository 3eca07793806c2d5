//! An NVMe drive (NVM Express base specification 2.0): one controller's driver, in two uses.
//!
//! [`Nvme`] exercises a domain: DMA of given bytes into given memory, one command at a time. [`Drive`] is a block device
//! for daily use: several queues, each of one thread, with guest memory as it is, behind a [`crate::window::Window`].

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
mod keeper;
mod pair;
mod queue;
mod registers;
mod request;
pub mod sim;

pub use drive::{Drive, DriveOptions};
pub use exerciser::Exerciser;
pub use geometry::Geometry;
pub use keeper::Health;
pub use queue::Queue;
pub use registers::Registers;
pub use request::{Completed, Fault, Op, Submitted};

/// Class code: mass storage, non-volatile memory, NVM Express I/O controller.
pub const CLASS: u32 = 0x01_08_02;

/// Bytes of one transfer of the exerciser's.
const CHUNK: usize = PAGE as usize;

/// The drive, as a device that does DMA on demand.
pub type Nvme = Driven<Exerciser>;

/// Drives `device`, which is in `domain`, for DMA on demand; `scratch` allows the last blocks of namespace 1 to be
/// overwritten.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>, scratch: bool) -> Result<Nvme> {
    exercise(Arc::new(registers::Bar::of(device)?), domain, scratch)
}

/// As [`open`], whatever the registers are those of.
pub fn exercise(registers: Arc<dyn Registers>, domain: &Arc<dyn Domain>, scratch: bool) -> Result<Nvme> {
    exerciser::open(registers, domain, scratch)
}

/// Drives `device`, which is in `domain`, as a block device.
pub fn serve(device: VfioDevice, domain: &Arc<dyn Domain>, options: DriveOptions) -> Result<Arc<Drive>> {
    Drive::open(Arc::new(registers::Bar::of(device)?), domain, options)
}
