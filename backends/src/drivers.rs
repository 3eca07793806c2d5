//! The drivers that a program gives its devices, besides this crate's own, which serves a drive as a block device.

use std::fmt;
use std::sync::Arc;

use crate::device::vfio::VfioDevice;
use crate::{Device, Domain, Result};

/// Drivers for VFIO devices.
///
/// A device without a driver does whatever its user in the guest has it do. A device with a driver is reset when the
/// driver starts, has its queues in [driver memory](crate::device::OwnMemory), and does DMA on demand
/// ([`Device::dma_read`], [`Device::start`]).
pub trait Drivers: fmt::Debug {
    /// Returns true if there is a driver for this device.
    fn supports(&self, device: &VfioDevice) -> Result<bool>;

    /// Starts the driver of a device that is attached to `domain`, whatever state its previous user left it in. Called
    /// only if the device is supported.
    fn start(&self, device: VfioDevice, domain: Arc<dyn Domain>) -> Result<Arc<dyn Device>>;

    /// Waits until a supported device that has no reset has no transfer in progress. Its bus mastering is off.
    fn await_idle(&self, device: &VfioDevice) -> Result<()>;
}

/// No drivers: every device is left to its user.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoDrivers;

impl Drivers for NoDrivers {
    fn supports(&self, _device: &VfioDevice) -> Result<bool> {
        Ok(false)
    }

    fn start(&self, device: VfioDevice, _domain: Arc<dyn Domain>) -> Result<Arc<dyn Device>> {
        Ok(Arc::new(device))
    }

    fn await_idle(&self, _device: &VfioDevice) -> Result<()> {
        Ok(())
    }
}
