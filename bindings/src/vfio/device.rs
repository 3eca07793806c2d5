//! An open VFIO device, from a cdev or a group: regions, interrupts, reset, features.
//!
//! Registers are read and written by pread(2) and pwrite(2), so that closing this file is enough to close the device. A
//! BAR mapping ([`super::mapped`]) keeps the device open, too.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref};

use super::number;
use crate::Failed;

/// The properties of a device (`VFIO_DEVICE_GET_INFO`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// The number of region indexes; PCI has six BARs, the ROM, configuration space, VGA.
    pub regions: u32,
    /// The number of interrupt indexes; PCI has INTx, MSI, MSI-X, error, request.
    pub irqs: u32,
}

impl DeviceInfo {
    /// Returns true where the kernel can reset this device alone (`VFIO_DEVICE_FLAGS_RESET`).
    pub fn resets(self) -> bool {
        self.flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0
    }
}

/// A region of a device (`VFIO_DEVICE_GET_REGION_INFO`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Its length in bytes; 0 where the device does not have it.
    pub size: u64,
    /// The offset of its first byte in the device's file.
    offset: u64,
}

impl Region {
    /// Returns the offset in the device's file of the byte `at`, or none on overflow.
    pub(super) fn file_offset(self, at: u64) -> Option<u64> {
        self.offset.checked_add(at)
    }
}

/// An interrupt index of a device (`VFIO_DEVICE_GET_IRQ_INFO`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// The number of vectors.
    pub count: u32,
}

/// The interrupt index of the kernel's request to close a PCI device (`VFIO_PCI_REQ_IRQ_INDEX`): the device is being
/// unbound or removed, which blocks until every file of it is closed. Has one vector, signalled every 10 s until then.
pub const REQUEST_IRQ: u32 = uapi::VFIO_PCI_REQ_IRQ_INDEX;

/// A device feature (`VFIO_DEVICE_FEATURE`) whose argument has no pointer, so that passing arbitrary bytes is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature(u32);

impl Feature {
    /// The migration capabilities (`struct vfio_device_feature_migration`); get.
    pub const MIGRATION: Self = Self(uapi::VFIO_DEVICE_FEATURE_MIGRATION);
    /// The migration state (`struct vfio_device_feature_mig_state`); get and set.
    pub const MIG_DEVICE_STATE: Self = Self(uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE);
    /// Bus mastering on or off (`struct vfio_device_feature_bus_master`); set. `ENOTTY` with vfio-pci.
    pub const BUS_MASTER: Self = Self(uapi::VFIO_DEVICE_FEATURE_BUS_MASTER);
}

/// An open VFIO device.
#[derive(Debug)]
pub struct DeviceFile {
    fd: OwnedFd,
}

impl DeviceFile {
    /// Takes an open device. On a file of another kind every call fails with `ENOTTY`.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Returns the properties of the device (`VFIO_DEVICE_GET_INFO`).
    pub fn info(&self) -> Result<DeviceInfo, Failed> {
        let mut arg =
            uapi::vfio_device_info { argsz: argsz::<uapi::vfio_device_info>(), ..Default::default() };
        // SAFETY: the call's own structure, without pointers.
        if unsafe { ioctl_with_mut_ref(&self.fd, number::DEVICE_GET_INFO(), &mut arg) } < 0 {
            return Err(Failed::last("VFIO_DEVICE_GET_INFO"));
        }
        Ok(DeviceInfo { flags: arg.flags, regions: arg.num_regions, irqs: arg.num_irqs })
    }

    /// Returns the region `index` (`VFIO_PCI_*_REGION_INDEX`).
    pub fn region(&self, index: u32) -> Result<Region, Failed> {
        let mut arg =
            uapi::vfio_region_info { argsz: argsz::<uapi::vfio_region_info>(), index, ..Default::default() };
        // SAFETY: the call's own structure, without pointers; with this argsz the kernel writes no capabilities.
        if unsafe { ioctl_with_mut_ref(&self.fd, number::DEVICE_GET_REGION_INFO(), &mut arg) } < 0 {
            return Err(Failed::last("VFIO_DEVICE_GET_REGION_INFO"));
        }
        Ok(Region { flags: arg.flags, size: arg.size, offset: arg.offset })
    }

    /// Reads `bytes.len()` bytes at offset `at` of `region`. The kernel makes accesses as wide as the alignment allows, up to
    /// 4 bytes, and 8 from Linux 6.14 on. The partial count of a failure is the number of bytes read before; `EINVAL` beyond
    /// the region.
    pub fn read(&self, region: Region, at: u64, bytes: &mut [u8]) -> Result<(), Failed<usize>> {
        const CALL: &str = "pread of a device region";
        let mut done = 0;
        while done < bytes.len() {
            let from =
                access_offset(region, at, done, bytes.len()).map_err(|errno| failed(CALL, errno, done))?;
            match rustix::io::pread(&self.fd, &mut bytes[done..], from) {
                Ok(0) => return Err(failed(CALL, Errno::IO, done)),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(CALL, errno, done)),
            }
        }
        Ok(())
    }

    /// Writes `bytes` at offset `at` of `region`. Accesses and errors as in [`DeviceFile::read`].
    pub fn write(&self, region: Region, at: u64, bytes: &[u8]) -> Result<(), Failed<usize>> {
        const CALL: &str = "pwrite of a device region";
        let mut done = 0;
        while done < bytes.len() {
            let to =
                access_offset(region, at, done, bytes.len()).map_err(|errno| failed(CALL, errno, done))?;
            match rustix::io::pwrite(&self.fd, &bytes[done..], to) {
                Ok(0) => return Err(failed(CALL, Errno::IO, done)),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(CALL, errno, done)),
            }
        }
        Ok(())
    }

    /// Returns the properties of the interrupt index `index` (`VFIO_PCI_*_IRQ_INDEX`).
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, Failed> {
        let mut arg =
            uapi::vfio_irq_info { argsz: argsz::<uapi::vfio_irq_info>(), index, ..Default::default() };
        // SAFETY: the call's own structure, without pointers.
        if unsafe { ioctl_with_mut_ref(&self.fd, number::DEVICE_GET_IRQ_INFO(), &mut arg) } < 0 {
            return Err(Failed::last("VFIO_DEVICE_GET_IRQ_INFO"));
        }
        Ok(IrqInfo { flags: arg.flags, count: arg.count })
    }

    /// Sets the eventfds of the vectors from `first` on, none to disable a vector (`VFIO_DEVICE_SET_IRQS` with DATA_EVENTFD
    /// and ACTION_TRIGGER). Does not change other vectors.
    pub fn set_irqs(
        &self,
        index: u32,
        first: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), Failed> {
        let data: Vec<i32> = eventfds.iter().map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd())).collect();
        self.irqs(uapi::VFIO_IRQ_SET_DATA_EVENTFD, index, first, &data)
    }

    /// Disables all vectors of `index` (`VFIO_DEVICE_SET_IRQS` with DATA_NONE and count 0).
    pub fn disable_irqs(&self, index: u32) -> Result<(), Failed> {
        self.irqs(uapi::VFIO_IRQ_SET_DATA_NONE, index, 0, &[])
    }

    /// Resets the device (`VFIO_DEVICE_RESET`) and returns when that is complete; a function-level reset (FLR) takes about
    /// 100 ms. `EINVAL` where the device has no reset of its own.
    pub fn reset(&self) -> Result<(), Failed> {
        // SAFETY: the call takes no argument.
        match unsafe { ioctl(&self.fd, number::DEVICE_RESET()) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_DEVICE_RESET")),
        }
    }

    /// Checks that the device supports `feature` for the requested operations; `ENOTTY` where it does not.
    pub fn feature_probe(&self, feature: Feature, get: bool, set: bool) -> Result<(), Failed> {
        let get = if get { uapi::VFIO_DEVICE_FEATURE_GET } else { 0 };
        let set = if set { uapi::VFIO_DEVICE_FEATURE_SET } else { 0 };
        self.feature(feature, uapi::VFIO_DEVICE_FEATURE_PROBE | get | set, &mut [])
    }

    /// Reads `feature` into `value`, which has the size of its structure.
    pub fn feature_get(&self, feature: Feature, value: &mut [u8]) -> Result<(), Failed> {
        self.feature(feature, uapi::VFIO_DEVICE_FEATURE_GET, value)
    }

    /// Sets `feature` from `value`, which has the size of its structure; the kernel's output replaces `value`.
    pub fn feature_set(&self, feature: Feature, value: &mut [u8]) -> Result<(), Failed> {
        self.feature(feature, uapi::VFIO_DEVICE_FEATURE_SET, value)
    }

    fn irqs(&self, data: u32, index: u32, start: u32, values: &[i32]) -> Result<(), Failed> {
        const CALL: &str = "VFIO_DEVICE_SET_IRQS";
        let overflow = |_| Failed::new(CALL, Errno::OVERFLOW);
        let bytes = size_of::<uapi::vfio_irq_set>() + size_of_val(values);
        // struct vfio_irq_set: argsz, flags, index, start, count, then the data.
        let mut words = vec![
            u32::try_from(bytes).map_err(overflow)?,
            data | uapi::VFIO_IRQ_SET_ACTION_TRIGGER,
            index,
            start,
            u32::try_from(values.len()).map_err(overflow)?,
        ];
        words.extend(values.iter().map(|value| value.cast_unsigned()));
        // SAFETY: the kernel reads argsz bytes, the size of `words`, which outlive the call.
        match unsafe { ioctl_with_mut_ptr(&self.fd, number::DEVICE_SET_IRQS(), words.as_mut_ptr()) } {
            0.. => Ok(()),
            _ => Err(Failed::last(CALL)),
        }
    }

    fn feature(&self, feature: Feature, operation: u32, value: &mut [u8]) -> Result<(), Failed> {
        const CALL: &str = "VFIO_DEVICE_FEATURE";
        let bytes = size_of::<uapi::vfio_device_feature>() + value.len();
        // struct vfio_device_feature: argsz, flags, then the value. u64 words give the alignment that every value needs.
        let mut words = vec![0_u64; bytes.div_ceil(8)];
        let argsz = u32::try_from(bytes).map_err(|_| Failed::new(CALL, Errno::OVERFLOW))?;
        words[0] = header(argsz, feature.0 | operation);
        for (word, chunk) in words[1..].iter_mut().zip(value.chunks(8)) {
            let mut padded = [0; 8];
            padded[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(padded);
        }
        // SAFETY: the kernel reads and writes at most argsz bytes, which `words` have; they outlive the call. The value of
        // a `Feature` has no pointer.
        if unsafe { ioctl_with_mut_ptr(&self.fd, number::DEVICE_FEATURE(), words.as_mut_ptr()) } < 0 {
            return Err(Failed::last(CALL));
        }
        for (word, chunk) in words[1..].iter().zip(value.chunks_mut(8)) {
            chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

impl AsFd for DeviceFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns two u32 fields in memory order, `first` before `second`.
fn header(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Returns the offset in the device's file of byte `done` of an access of `len` bytes at `at`; `EINVAL` unless the whole
/// access lies in the region.
fn access_offset(region: Region, at: u64, done: usize, len: usize) -> Result<u64, Errno> {
    match at.checked_add(len as u64) {
        Some(end) if end <= region.size => Ok(region.offset + at + done as u64),
        _ => Err(Errno::INVAL),
    }
}

fn failed(call: &'static str, errno: Errno, partial: usize) -> Failed<usize> {
    Failed { call, errno, partial }
}

fn argsz<T>() -> u32 {
    size_of::<T>() as u32 // less than 100 bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestFile;

    fn not_a_device() -> DeviceFile {
        let memfd = GuestFile::memfd("not-a-device", 4096).unwrap();
        DeviceFile::from_fd(memfd.as_fd().try_clone_to_owned().unwrap())
    }

    #[test]
    fn calls_on_another_file_fail_with_enotty() {
        let device = not_a_device();
        assert_eq!(device.info(), Err(Failed::new("VFIO_DEVICE_GET_INFO", Errno::NOTTY)));
        assert_eq!(device.reset(), Err(Failed::new("VFIO_DEVICE_RESET", Errno::NOTTY)));
        assert_eq!(device.disable_irqs(0), Err(Failed::new("VFIO_DEVICE_SET_IRQS", Errno::NOTTY)));
        let failed = device.feature_get(Feature::MIGRATION, &mut [0; 8]).unwrap_err();
        assert_eq!(failed, Failed::new("VFIO_DEVICE_FEATURE", Errno::NOTTY));
    }

    #[test]
    fn access_outside_its_region_is_refused() {
        let (device, region) = (not_a_device(), Region { flags: 0, size: 256, offset: 1024 });
        device.write(region, 252, &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 4];
        device.read(region, 252, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        for at in [253, 256, u64::MAX] {
            let failed = device.write(region, at, &bytes).unwrap_err();
            assert_eq!((failed.errno, failed.partial), (Errno::INVAL, 0));
            assert!(device.read(region, at, &mut bytes).is_err());
        }
    }

    #[test]
    fn short_read_reports_the_bytes_read() {
        let region = Region { flags: 0, size: 8, offset: 4092 };
        let failed = not_a_device().read(region, 0, &mut [0; 8]).unwrap_err();
        assert_eq!((failed.errno, failed.partial), (Errno::IO, 4));
    }
}
