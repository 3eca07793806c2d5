//! Drivers that make devices do DMA of given bytes, at given addresses, when asked.
//!
//! They exercise a domain: `passgate selftest`, DMA on demand of a daemon (`serve --allow-dma`) and the tests on real
//! IOMMUs find out with them what a device can reach. No guest is served by any of them. The daemon is complete without
//! this package (feature `selftest`).

#![forbid(unsafe_code)]

pub mod driven;
pub mod edu;
pub mod igb;
pub mod nvme;
pub mod virtio;

use std::sync::Arc;

use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::nvme::CLASS;
use passgate_backends::{Device, Domain, Error, Result};

use edu::Edu;
use virtio::{gpu, net};

/// All drivers of this package.
#[derive(Debug, Clone, Copy, Default)]
pub struct Drivers {
    /// True if the last blocks of a drive may be overwritten, for DMA of given bytes.
    pub scratch: bool,
}

/// A driver of this package.
#[derive(Debug, Clone, Copy)]
enum Driver {
    Nvme,
    Edu,
    Igb,
    Net,
    Gpu,
}

/// Returns the driver for the device, by class code or by vendor and device id; none if there is no such driver.
fn driver_of(device: &VfioDevice) -> Result<Option<Driver>> {
    if device.class()? == CLASS {
        return Ok(Some(Driver::Nvme));
    }
    Ok(match device.ids()? {
        edu::IDS => Some(Driver::Edu),
        igb::IDS => Some(Driver::Igb),
        net::IDS => Some(Driver::Net),
        gpu::IDS => Some(Driver::Gpu),
        _ => None,
    })
}

impl passgate_backends::Drivers for Drivers {
    fn supports(&self, device: &VfioDevice) -> Result<bool> {
        driver_of(device).map(|driver| driver.is_some())
    }

    fn start(&self, device: VfioDevice, domain: Arc<dyn Domain>) -> Result<Arc<dyn Device>> {
        Ok(match driver_of(&device)? {
            Some(Driver::Nvme) => Arc::new(nvme::open(device, &domain, self.scratch)?),
            Some(Driver::Edu) => Arc::new(Edu::new(device, domain)?),
            Some(Driver::Igb) => Arc::new(igb::open(device, &domain)?),
            Some(Driver::Net) => Arc::new(net::open(device, &domain)?),
            Some(Driver::Gpu) => Arc::new(gpu::open(device, &domain)?),
            None => {
                return Err(Error::Unsupported { device: device.name().to_owned(), what: "DMA on demand" });
            }
        })
    }

    fn await_idle(&self, device: &VfioDevice) -> Result<()> {
        // Of these devices only edu has no reset.
        if device.ids()? == edu::IDS { edu::await_idle(device) } else { Ok(()) }
    }
}
