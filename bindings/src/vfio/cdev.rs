//! A VFIO device opened by its character device, `/dev/vfio/devices/vfioN`, and bound to an iommufd (Linux 6.6).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::VfioError;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::device::DeviceFile;
use super::number;
use super::pci::PciDevice;
use crate::Failed;
use crate::iommufd::{DeviceId, Iommufd, PageTable};

/// A VFIO character device. Until it is bound, every other call fails with `EINVAL`.
#[derive(Debug)]
pub struct Cdev {
    device: DeviceFile,
}

impl Cdev {
    /// Opens the character device of `device`. `ENODEV` where it has none: it is not bound to VFIO, or the kernel has no
    /// VFIO character devices.
    pub fn open(device: &PciDevice) -> Result<Self, Failed> {
        let errno = match vfio_ioctls::VfioDevice::open_cdev(device.dir()) {
            Ok(file) => return Ok(Self::from_fd(file.into())),
            Err(VfioError::OpenDeviceCdev(error)) => Errno::from_io_error(&error).unwrap_or(Errno::IO),
            Err(_) => Errno::NODEV,
        };
        Err(Failed::new("open /dev/vfio/devices/vfioN", errno))
    }

    /// Takes a character device that another process opened and passed.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { device: DeviceFile::from_fd(fd) }
    }

    /// Returns the device's file.
    pub fn device(&self) -> &DeviceFile {
        &self.device
    }

    /// Binds the device to `iommufd` until its file is closed, and returns its id there (`VFIO_DEVICE_BIND_IOMMUFD`). Its
    /// DMA is blocked until it is attached. `EINVAL` where the device is bound already, by this file or by another in any
    /// process; `EBUSY` where its group is open or a host driver uses it. A KVM VM that needs the device
    /// (`KVM_DEV_VFIO_FILE_ADD`) must be given its file before.
    pub fn bind(&self, iommufd: &Iommufd) -> Result<DeviceId, Failed> {
        let mut arg = uapi::vfio_device_bind_iommufd {
            argsz: argsz::<uapi::vfio_device_bind_iommufd>(),
            iommufd: iommufd.as_fd().as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the call's own structure; without the token flag the kernel does not use its one pointer.
        if unsafe { ioctl_with_mut_ref(&self.as_fd(), number::DEVICE_BIND_IOMMUFD(), &mut arg) } < 0 {
            return Err(Failed::last("VFIO_DEVICE_BIND_IOMMUFD"));
        }
        Ok(DeviceId(arg.out_devid))
    }

    /// Attaches the device to a page table or an IOAS, replacing an earlier one (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`). A replace
    /// is not hitless. One that fails may leave the device detached in hardware, although a later attach returns 0: only a
    /// detach followed by an attach restores it.
    pub fn attach(&self, to: impl Into<PageTable>) -> Result<(), Failed> {
        let mut arg = uapi::vfio_device_attach_iommufd_pt {
            argsz: argsz::<uapi::vfio_device_attach_iommufd_pt>(),
            pt_id: to.into().id(),
            ..Default::default()
        };
        // SAFETY: the call's own structure, without pointers.
        match unsafe { ioctl_with_mut_ref(&self.as_fd(), number::DEVICE_ATTACH_IOMMUFD_PT(), &mut arg) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_DEVICE_ATTACH_IOMMUFD_PT")),
        }
    }

    /// Detaches the device to the blocking domain, where all its DMA faults (`VFIO_DEVICE_DETACH_IOMMUFD_PT`). The kernel
    /// always returns 0, but blocks DMA only when the last attached device of the group is detached.
    pub fn detach(&self) -> Result<(), Failed> {
        let mut arg = uapi::vfio_device_detach_iommufd_pt {
            argsz: argsz::<uapi::vfio_device_detach_iommufd_pt>(),
            ..Default::default()
        };
        // SAFETY: the call's own structure, without pointers.
        match unsafe { ioctl_with_mut_ref(&self.as_fd(), number::DEVICE_DETACH_IOMMUFD_PT(), &mut arg) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_DEVICE_DETACH_IOMMUFD_PT")),
        }
    }
}

impl AsFd for Cdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn argsz<T>() -> u32 {
    size_of::<T>() as u32 // less than 100 bytes
}
