//! A VFIO device by its own character device, `/dev/vfio/devices/vfioN`, in an iommufd (Linux 6.6).

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

/// A VFIO character device. Until it is bound the kernel refuses every other call with `EINVAL`.
#[derive(Debug)]
pub struct Cdev {
    device: DeviceFile,
}

impl Cdev {
    /// Opens the character device of `device`. `ENODEV` where it has none: not bound to VFIO, or no such kernel.
    pub fn open(device: &PciDevice) -> Result<Self, Failed> {
        let errno = match vfio_ioctls::VfioDevice::open_cdev(device.dir()) {
            Ok(file) => return Ok(Self::from_fd(file.into())),
            Err(VfioError::OpenDeviceCdev(error)) => Errno::from_io_error(&error).unwrap_or(Errno::IO),
            Err(_) => Errno::NODEV,
        };
        Err(Failed::new("open /dev/vfio/devices/vfioN", errno))
    }

    /// Takes a character device that somebody with the right to open it has passed.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { device: DeviceFile::from_fd(fd) }
    }

    /// The device behind it.
    pub fn device(&self) -> &DeviceFile {
        &self.device
    }

    /// Binds the device to `iommufd`, until its file closes, and returns its id there
    /// (`VFIO_DEVICE_BIND_IOMMUFD`). Its DMA is blocked until it is attached. `EINVAL` where it is open already,
    /// through this file or another, in any process; `EBUSY` where its group is open, or a driver of the host uses
    /// it. A KVM that is to know the device must be told before.
    pub fn bind(&self, iommufd: &Iommufd) -> Result<DeviceId, Failed> {
        let mut arg = uapi::vfio_device_bind_iommufd {
            argsz: argsz::<uapi::vfio_device_bind_iommufd>(),
            iommufd: iommufd.as_fd().as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the call's own structure; without the token flag its one pointer is not looked at.
        if unsafe { ioctl_with_mut_ref(&self.as_fd(), number::DEVICE_BIND_IOMMUFD(), &mut arg) } < 0 {
            return Err(Failed::last("VFIO_DEVICE_BIND_IOMMUFD"));
        }
        Ok(DeviceId(arg.out_devid))
    }

    /// Attaches the device to a page table or an IOAS, or moves it there from another one
    /// (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`). A move is not hitless, and one that fails may leave the device detached
    /// in hardware although a later attach returns 0: only detach, then attach, brings it back.
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

    /// Moves the device to the blocking domain: all its DMA faults (`VFIO_DEVICE_DETACH_IOMMUFD_PT`). The kernel
    /// returns 0 always, and does it only once the last attached device of the group leaves.
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
    size_of::<T>() as u32 // a structure of some dozen bytes
}
