//! A VFIO group, `/dev/vfio/N`: the devices that an IOMMU cannot isolate from each other, and the way to open a device
//! where the kernel has no VFIO character devices. A group can be open only once in the whole system.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};

use super::container::Container;
use super::device::DeviceFile;
use super::number;
use super::pci::PciAddress;
use crate::Failed;

/// An open VFIO group.
#[derive(Debug)]
pub struct Group {
    id: u32,
    fd: OwnedFd,
}

impl Group {
    /// Opens `/dev/vfio/<id>`. `EBUSY` where it is open already, in this or another process.
    pub fn open(id: u32) -> Result<Self, Failed> {
        rustix::fs::open(format!("/dev/vfio/{id}"), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map(|fd| Self::from_fd(id, fd))
            .map_err(|errno| Failed::new("open /dev/vfio/GROUP", errno))
    }

    /// Takes a group that another process opened and passed.
    pub fn from_fd(id: u32, fd: OwnedFd) -> Self {
        Self { id, fd }
    }

    /// Returns the number of the IOMMU group.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns true where every device of the group is bound to VFIO or to no driver that does DMA
    /// (`VFIO_GROUP_FLAGS_VIABLE` of `VFIO_GROUP_GET_STATUS`).
    pub fn viable(&self) -> Result<bool, Failed> {
        let mut arg =
            uapi::vfio_group_status { argsz: size_of::<uapi::vfio_group_status>() as u32, flags: 0 };
        // SAFETY: the call's own structure, without pointers.
        if unsafe { ioctl_with_mut_ref(&self.fd, number::GROUP_GET_STATUS(), &mut arg) } < 0 {
            return Err(Failed::last("VFIO_GROUP_GET_STATUS"));
        }
        Ok(arg.flags & uapi::VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    /// Puts the group into `container` (`VFIO_GROUP_SET_CONTAINER`).
    pub fn set_container(&self, container: &Container) -> Result<(), Failed> {
        let fd = container.as_fd().as_raw_fd();
        // SAFETY: the kernel reads one int, which outlives the call.
        match unsafe { ioctl_with_ref(&self.fd, number::GROUP_SET_CONTAINER(), &fd) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_GROUP_SET_CONTAINER")),
        }
    }

    /// Removes the group from its container (`VFIO_GROUP_UNSET_CONTAINER`). `EBUSY` while a device of it is open. With its
    /// last group a container loses all mappings.
    pub fn unset_container(&self) -> Result<(), Failed> {
        // SAFETY: the call takes no argument.
        match unsafe { ioctl(&self.fd, number::GROUP_UNSET_CONTAINER()) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_GROUP_UNSET_CONTAINER")),
        }
    }

    /// Opens a device of the group (`VFIO_GROUP_GET_DEVICE_FD`), which must be in a container with its IOMMU type
    /// set.
    pub fn device(&self, address: PciAddress) -> Result<DeviceFile, Failed> {
        const CALL: &str = "VFIO_GROUP_GET_DEVICE_FD";
        let name = CString::new(address.to_string()).map_err(|_| Failed::new(CALL, Errno::INVAL))?;
        // SAFETY: the kernel reads a NUL-terminated string, which outlives the call.
        match unsafe { ioctl_with_ptr(&self.fd, number::GROUP_GET_DEVICE_FD(), name.as_ptr()) } {
            // SAFETY: the kernel has just created this descriptor (close-on-exec) for this call; nothing else owns it.
            fd @ 0.. => Ok(DeviceFile::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => Err(Failed::last(CALL)),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
