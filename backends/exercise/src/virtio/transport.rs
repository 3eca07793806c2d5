//! The registers of a virtio device on PCI (virtio 1.3, section 4.1): located by capabilities in configuration space,
//! accessed through VFIO regions.

use std::sync::Arc;
use std::time::Duration;

use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::device::{OwnMemory, await_that};
use passgate_backends::{Device, Error, Result};
use passgate_bindings::Failed;
use passgate_bindings::vfio::device::Region;
use rustix::io::Errno;

use super::queue::Queue;

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;
/// The offset of the Capabilities Pointer in configuration space, and the id of a vendor-specific capability.
const CAPABILITIES: u64 = 0x34;
const VENDOR: u8 = 0x09;
/// The maximum number of capabilities: they are 4-byte aligned in 192 bytes, so a longer list is a cycle.
const MAX_CAPABILITIES: usize = 48;

/// `cfg_type` of `struct virtio_pci_cap` (4.1.4): common configuration, notification structure.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;

/// `struct virtio_pci_common_cfg` (4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;
const COMMON_LEN: u64 = 56;

/// Device status (2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// Feature bits (6): VIRTIO_F_VERSION_1, and VIRTIO_F_ACCESS_PLATFORM (the device's DMA is translated by the IOMMU).
const VERSION_1: u64 = 1 << 32;
const ACCESS_PLATFORM: u64 = 1 << 33;

/// The time within which a device completes a reset.
const RESET_TIMEOUT: Duration = Duration::from_secs(2);

/// A part of a BAR.
#[derive(Debug, Clone, Copy)]
struct BarRange {
    region: Region,
    offset: u64,
    len: u64,
}

/// The registers of a virtio device.
#[derive(Debug)]
pub(super) struct Transport {
    common: BarRange,
    notify: BarRange,
    notify_multiplier: u32,
    device: Arc<VfioDevice>,
}

impl Transport {
    /// Locates the registers of `device`.
    pub(super) fn find(device: &Arc<VfioDevice>) -> Result<Self> {
        let config = device.region(CONFIG)?;
        let (mut common, mut notify) = (None, None);
        let mut byte = [0];
        let read = |at, bytes: &mut [u8]| device.read(config, at, bytes);
        read(CAPABILITIES, &mut byte)?;
        for _ in 0..MAX_CAPABILITIES {
            let at = u64::from(byte[0] & !3);
            if at == 0 {
                break;
            }
            let mut head = [0; 16];
            read(at, &mut head)?;
            byte[0] = head[1];
            if head[0] != VENDOR {
                continue;
            }
            let number = |from: usize| {
                u32::from_le_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]])
            };
            match head[3] {
                COMMON if common.is_none() => common = Some((head[4], number(8), number(12))),
                NOTIFY if notify.is_none() => {
                    let mut multiplier = [0; 4];
                    read(at + 16, &mut multiplier)?;
                    notify = Some(((head[4], number(8), number(12)), u32::from_le_bytes(multiplier)));
                }
                _ => {}
            }
        }
        let (Some(common), Some((notify, notify_multiplier))) = (common, notify) else {
            return Err(Error::Unsupported { device: device.name().to_owned(), what: "virtio 1 over PCI" });
        };
        let (common, notify) = (bar_range(device, common)?, bar_range(device, notify)?);
        if common.len < COMMON_LEN {
            return Err(Error::Unsupported { device: device.name().to_owned(), what: "virtio 1 over PCI" });
        }
        Ok(Self { common, notify, notify_multiplier, device: Arc::clone(device) })
    }

    /// Resets the device: when this returns it has no queue and does no DMA (2.4).
    pub(super) fn reset(&self) -> Result<()> {
        self.set_status(0)?;
        let reset = await_that(RESET_TIMEOUT, || Ok(self.status()? == 0))?;
        if reset { Ok(()) } else { Err(self.failed("resetting a virtio device", Errno::TIMEDOUT)) }
    }

    /// Negotiates features with a device that has been reset (3.1.1): only the two that are required.
    pub(super) fn negotiate(&self) -> Result<()> {
        self.set_status(ACKNOWLEDGE)?;
        self.set_status(ACKNOWLEDGE | DRIVER)?;
        let features = accept(self.device.name(), self.offered()?)?;
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(DRIVER_FEATURE_SELECT, &u32::to_le_bytes(select))?;
            self.set(DRIVER_FEATURE, &half.to_le_bytes())?;
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        if self.status()? & FEATURES_OK == 0 {
            return Err(self.failed("negotiating features with a virtio device", Errno::PROTO));
        }
        Ok(())
    }

    /// Configures `queue`, which is empty, as the device's queue `index` and enables it (4.1.5.1.3).
    pub(super) fn set_up(&self, index: u16, queue: &mut Queue, memory: &OwnMemory) -> Result<()> {
        self.set(QUEUE_SELECT, &index.to_le_bytes())?;
        if self.word(QUEUE_SIZE)? < queue.size() {
            return Err(self.failed("setting up a virtio queue", Errno::NOBUFS));
        }
        self.set(QUEUE_SIZE, &queue.size().to_le_bytes())?;
        let layout = queue.layout();
        for (register, at) in
            [(QUEUE_DESC, layout.descriptors), (QUEUE_DRIVER, layout.available), (QUEUE_DEVICE, layout.used)]
        {
            let iova = memory.iova(at).0;
            self.set(register, &(iova as u32).to_le_bytes())?; // the low half
            self.set(register + 4, &((iova >> 32) as u32).to_le_bytes())?;
        }
        let offset = u64::from(self.word(QUEUE_NOTIFY_OFF)?) * u64::from(self.notify_multiplier);
        queue.set_notify_offset(offset);
        self.set(QUEUE_ENABLE, &1_u16.to_le_bytes())
    }

    /// Sets DRIVER_OK: the device serves its queues from here on.
    pub(super) fn set_driver_ok(&self) -> Result<()> {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    }

    /// Notifies the device of available buffers in `queue`, which is its queue `index`.
    pub(super) fn notify(&self, index: u16, queue: &Queue) -> Result<()> {
        self.write(self.notify, queue.notify_offset(), &index.to_le_bytes())
    }

    /// Returns true if the device has set DEVICE_NEEDS_RESET (2.1).
    pub(super) fn needs_reset(&self) -> Result<bool> {
        Ok(self.status()? & NEEDS_RESET != 0)
    }

    pub(super) fn failed(&self, call: &'static str, errno: Errno) -> Error {
        self.device.failed(Failed::new(call, errno))
    }

    fn offered(&self) -> Result<u64> {
        let mut features = 0;
        for select in [0_u32, 1] {
            self.set(DEVICE_FEATURE_SELECT, &select.to_le_bytes())?;
            let mut half = [0; 4];
            self.get(DEVICE_FEATURE, &mut half)?;
            features |= u64::from(u32::from_le_bytes(half)) << (32 * select);
        }
        Ok(features)
    }

    fn status(&self) -> Result<u8> {
        let mut byte = [0];
        self.get(STATUS, &mut byte)?;
        Ok(byte[0])
    }

    fn set_status(&self, status: u8) -> Result<()> {
        self.set(STATUS, &[status])
    }

    fn word(&self, at: u64) -> Result<u16> {
        let mut bytes = [0; 2];
        self.get(at, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn get(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.device.read(self.common.region, self.common.offset + at, bytes)
    }

    fn set(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.write(self.common, at, bytes)
    }

    fn write(&self, range: BarRange, at: u64, bytes: &[u8]) -> Result<()> {
        if at + bytes.len() as u64 > range.len {
            return Err(self.failed("a virtio register", Errno::RANGE));
        }
        let written = self.device.file().write(range.region, range.offset + at, bytes);
        written.map_err(|failed| self.device.failed(failed.without_partial()))
    }
}

/// Returns the part of a BAR that a capability describes (BAR, offset, length).
fn bar_range(device: &VfioDevice, (bar, offset, len): (u8, u32, u32)) -> Result<BarRange> {
    let (offset, len) = (u64::from(offset), u64::from(len));
    let region = device.region(u32::from(bar))?;
    if bar > 5 || offset + len > region.size {
        return Err(Error::Unsupported { device: device.name().to_owned(), what: "virtio 1 over PCI" });
    }
    Ok(BarRange { region, offset, len })
}

/// Returns the features to accept of those `offered`. A device whose DMA is not translated by the IOMMU is refused: it
/// would still reach memory that was unmapped.
fn accept(device: &str, offered: u64) -> Result<u64> {
    match (offered & VERSION_1 != 0, offered & ACCESS_PLATFORM != 0) {
        (false, _) => Err(Error::Unsupported { device: device.to_owned(), what: "virtio 1" }),
        (true, false) => Err(Error::Host {
            what: format!("{device}: its DMA goes past the IOMMU (no VIRTIO_F_ACCESS_PLATFORM)"),
            remedy: "have the host offer it with iommu_platform=on",
        }),
        (true, true) => Ok(VERSION_1 | ACCESS_PLATFORM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_bypasses_the_iommu_is_refused() {
        assert_eq!(accept("d", u64::MAX).unwrap(), VERSION_1 | ACCESS_PLATFORM);
        let error = accept("d", VERSION_1 | 0xffff).unwrap_err().to_string();
        assert!(
            error.contains("d: its DMA goes past the IOMMU") && error.contains("iommu_platform=on"),
            "{error}"
        );
        let old = accept("d", ACCESS_PLATFORM).unwrap_err();
        assert_eq!(old.errno(), Some(Errno::OPNOTSUPP));
    }
}
