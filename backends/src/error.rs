//! Errors of devices and IOMMUs: the object, the cause, and the remedy.

use passgate_bindings::uring::RingError;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a device or an IOMMU. Its `Display` text is the message that the user reads.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A map failed; no part of it remains mapped.
    #[error("cannot map IOVA {iova}: {source}{remedy}")]
    Map {
        /// The requested range.
        iova: PageRange<Iova>,
        /// The failed call and its errno.
        source: Failed,
        /// The remedy, or empty.
        remedy: &'static str,
    },
    /// A map failed because pinning its pages would exceed RLIMIT_MEMLOCK; no part of it remains mapped.
    #[error(
        "cannot map IOVA {iova}: pinning {need} bytes more goes beyond RLIMIT_MEMLOCK, {limit} bytes for this user: \
         raise it (`ulimit -l`, `LimitMEMLOCK=` in a systemd unit) or give the process CAP_IPC_LOCK"
    )]
    Memlock {
        /// The requested range.
        iova: PageRange<Iova>,
        /// Its length in bytes.
        need: u64,
        /// The limit in bytes. All memory that the user has pinned counts against it.
        limit: u64,
    },
    /// A map was made in part and its roll-back failed: what of the range is mapped is unknown.
    #[error(
        "cannot map IOVA {iova}: {source}{remedy}; and its roll-back failed ({rollback}), so what of it is mapped is unknown"
    )]
    HalfMapped {
        /// The requested range.
        iova: PageRange<Iova>,
        /// The failed call of the map and its errno.
        source: Failed,
        /// The errno of the roll-back; `EIO` if it proved nothing.
        rollback: Errno,
        /// The remedy of the map, or empty.
        remedy: &'static str,
    },
    /// The device is not bound to a VFIO driver.
    #[error(
        "{device} is bound to {driver}, not to vfio-pci; bind it: \
         echo vfio-pci > /sys/bus/pci/devices/{device}/driver_override; \
         echo {device} > /sys/bus/pci/devices/{device}/driver/unbind; \
         echo {device} > /sys/bus/pci/drivers_probe"
    )]
    Unbound {
        /// The device's name (PCI address, or `soft:N`).
        device: String,
        /// The driver that it is bound to, or `no driver`.
        driver: String,
    },
    /// The device has no fence that reliably stops it, and [`crate::Accept::unstoppable`] is not set.
    #[error(
        "{device} cannot be stopped for certain: it has neither a reset, nor PCI Express's Transactions Pending, nor \
         a migration state, and {why}; or accept that (serve --allow-unstoppable)"
    )]
    Unstoppable {
        /// The device's name (PCI address, or `soft:N`).
        device: String,
        /// The reason for which it cannot be detached either, and the remedy.
        why: String,
    },
    /// The device does not respond: every register reads as all ones.
    #[error(
        "{device} does not answer: its registers read as all ones, as of a device that was removed or has no power \
         (D3cold); put it back, or take it off the bus and have it found again: \
         echo 1 > /sys/bus/pci/devices/{device}/remove; echo 1 > /sys/bus/pci/rescan"
    )]
    Gone {
        /// The device's name (PCI address, or `soft:N`).
        device: String,
    },
    /// The device does not support the operation.
    #[error("{device}: {what} is not supported by this device")]
    Unsupported {
        /// The device's name (PCI address, or `soft:N`).
        device: String,
        /// The operation that was requested.
        what: &'static str,
    },
    /// A DMA faulted: nothing is mapped at its address, or not for its direction. Nothing was transferred there.
    #[error("{device}: DMA fault at IOVA {iova}: nothing is mapped there for this access")]
    Fault {
        /// The device's name (PCI address, or `soft:N`).
        device: String,
        /// The first address of the DMA, or of the part of it that faulted.
        iova: Iova,
    },
    /// The io_uring of a soft domain cannot be set up.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A device call failed.
    #[error("{device}: {source}{remedy}")]
    Device {
        /// The device's name (PCI address, or `soft:N`).
        device: String,
        /// The failed call and its errno.
        source: Failed,
        /// The remedy, or empty.
        remedy: &'static str,
    },
    /// The host lacks what this backend needs.
    #[error("{what}: {remedy}")]
    Host {
        /// The missing or unsuitable object.
        what: String,
        /// The remedy.
        remedy: &'static str,
    },
}

impl Error {
    /// Returns the device and the failed call if retrying may succeed: another process has the device open (for example
    /// the guardian of a daemon, which is about to close it), or the device is in reset or not ready after one.
    pub fn taken(&self) -> Option<(&str, Failed)> {
        let Self::Device { device, source, .. } = self else { return None };
        let open_elsewhere = match source.errno {
            Errno::BUSY | Errno::AGAIN | Errno::TIMEDOUT => true,
            // The kernel's errno for binding a cdev that is open elsewhere, and for a group that is in another
            // container.
            Errno::INVAL => source.call.contains("BIND") || source.call.contains("SET_CONTAINER"),
            _ => false,
        };
        open_elsewhere.then_some((device, *source))
    }

    /// Returns the errno of the failed call, or the one that describes the error best; none for an error without one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Map { source, .. } | Self::HalfMapped { source, .. } | Self::Device { source, .. } => {
                Some(source.errno)
            }
            Self::Unsupported { .. } => Some(Errno::OPNOTSUPP),
            Self::Memlock { .. } => Some(Errno::NOMEM),
            Self::Fault { .. } => Some(Errno::FAULT),
            Self::Gone { .. } => Some(Errno::NODEV),
            Self::Unbound { .. } | Self::Unstoppable { .. } | Self::Host { .. } | Self::Ring(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_of_busy_devices_are_reported_as_taken() {
        let error = |call, errno| Error::Device {
            device: "0000:01:00.0".into(),
            source: Failed::new(call, errno),
            remedy: "",
        };
        for (call, errno, taken) in [
            ("open /dev/vfio/GROUP", Errno::BUSY, true),
            ("VFIO_DEVICE_BIND_IOMMUFD", Errno::INVAL, true),
            ("VFIO_DEVICE_BIND_IOMMUFD", Errno::BUSY, true),
            ("VFIO_GROUP_SET_CONTAINER", Errno::INVAL, true),
            ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", Errno::AGAIN, true),
            ("resetting an NVMe controller", Errno::TIMEDOUT, true),
            ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", Errno::INVAL, false),
            ("VFIO_DEVICE_BIND_IOMMUFD", Errno::PERM, false),
            ("open /dev/vfio/devices/vfioN", Errno::ACCESS, false),
        ] {
            let error = error(call, errno);
            assert_eq!(error.taken().map(|(device, _)| device), taken.then_some("0000:01:00.0"), "{error}");
        }
        let host = Error::Host { what: "no IOMMU".into(), remedy: "switch it on" };
        assert_eq!(host.taken(), None);
    }
}
