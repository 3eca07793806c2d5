//! What a guardian has of each device, and what it does to it.

use std::os::fd::OwnedFd;

use passgate_bindings::Failed;
use passgate_bindings::vfio::{Cdev, Container, DeviceFile};

/// One device, as the guardian holds it. The order of the fields is the order of closing.
#[derive(Debug)]
pub(super) enum Held {
    Cdev { name: String, cdev: Cdev },
    Type1 { name: String, device: DeviceFile, container: Container },
}

impl Held {
    pub(super) fn take(message: &str, fds: Vec<OwnedFd>) -> Option<Self> {
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

    /// Takes its translations away: every DMA faults from here on.
    pub(super) fn block(&self) -> Result<(), Failed> {
        match self {
            Self::Cdev { cdev, .. } => cdev.detach(),
            Self::Type1 { container, .. } => container.unmap_all().map(drop).map_err(Failed::without_partial),
        }
    }

    pub(super) fn reset(&self) -> Result<(), Failed> {
        match self {
            Self::Cdev { cdev, .. } => cdev.device().reset(),
            Self::Type1 { device, .. } => device.reset(),
        }
    }
}
