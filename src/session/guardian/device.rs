//! A device as the guardian has it, and the calls that stop its DMA.

use std::os::fd::OwnedFd;

use passgate_bindings::Failed;
use passgate_bindings::vfio::{Cdev, Container, DeviceFile};

/// A device by its descriptors. The order of the fields is the order in which they are closed: a type1 device before its
/// container.
#[derive(Debug)]
pub(super) enum GuardedDevice {
    Cdev { name: String, cdev: Cdev },
    Type1 { name: String, device: DeviceFile, container: Container },
}

impl GuardedDevice {
    /// Takes the descriptors of one message: `cdev NAME` with one, `type1 NAME` with container and device. None for any other
    /// message.
    pub(super) fn from_message(message: &str, fds: Vec<OwnedFd>) -> Option<Self> {
        let (kind, name) = message.split_once(' ')?;
        let (name, mut fds) = (name.to_owned(), fds.into_iter());
        match (kind, fds.next(), fds.next(), fds.next()) {
            ("cdev", Some(fd), None, None) => Some(Self::Cdev { name, cdev: Cdev::from_fd(fd) }),
            ("type1", Some(container), Some(device), None) => Some(Self::Type1 {
                name,
                device: DeviceFile::from_fd(device),
                container: Container::from_fd(container),
            }),
            _ => None,
        }
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Self::Cdev { name, .. } | Self::Type1 { name, .. } => name,
        }
    }

    /// Removes its translations, by a detach from the IOAS or by unmapping the whole container: from then on the IOMMU blocks
    /// every DMA of the device.
    pub(super) fn block(&self) -> Result<(), Failed> {
        match self {
            Self::Cdev { cdev, .. } => cdev.detach(),
            Self::Type1 { container, .. } => container.unmap_all().map(drop).map_err(Failed::without_partial),
        }
    }

    /// Resets the function (`VFIO_DEVICE_RESET`).
    pub(super) fn reset(&self) -> Result<(), Failed> {
        match self {
            Self::Cdev { cdev, .. } => cdev.device().reset(),
            Self::Type1 { device, .. } => device.reset(),
        }
    }
}
