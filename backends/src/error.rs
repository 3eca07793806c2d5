//! What went wrong at a device or an IOMMU: on which object, and what to do about it.

use passgate_bindings::uring::RingError;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong at a device or an IOMMU. The text is the message that the user reads.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mapping was not made; nothing of it is left.
    #[error("cannot map IOVA {iova}: {source}{mend}")]
    Map {
        /// The range asked for.
        iova: PageRange<Iova>,
        /// The kernel's answer.
        source: Failed,
        /// What to do about it, or empty.
        mend: &'static str,
    },
    /// A mapping was not made, nothing of it is left: its pages may not be pinned.
    #[error(
        "cannot map IOVA {iova}: pinning {need} bytes more goes beyond RLIMIT_MEMLOCK, {limit} bytes for this user: \
         raise it (`ulimit -l`, `LimitMEMLOCK=` in a systemd unit) or give the process CAP_IPC_LOCK"
    )]
    Memlock {
        /// The range asked for.
        iova: PageRange<Iova>,
        /// Its length in bytes.
        need: u64,
        /// The limit in bytes, which everything that the user has pinned counts against.
        limit: u64,
    },
    /// A mapping was made in part and could not be taken back whole: the range is unknown.
    #[error("cannot take back the half-made mapping of IOVA {iova}: {source}; the range is unknown")]
    HalfMapped {
        /// The range asked for.
        iova: PageRange<Iova>,
        /// The kernel's answer to the roll-back.
        source: Failed,
    },
    /// The device is not bound to VFIO.
    #[error(
        "{device} is bound to {driver}, not to vfio-pci; bind it: \
         echo vfio-pci > /sys/bus/pci/devices/{device}/driver_override; \
         echo {device} > /sys/bus/pci/devices/{device}/driver/unbind; \
         echo {device} > /sys/bus/pci/drivers_probe"
    )]
    Unbound {
        /// The device's name.
        device: String,
        /// The driver that has it, or `no driver`.
        driver: String,
    },
    /// Nothing stops the device for certain, and nobody has accepted that.
    #[error(
        "{device} cannot be stopped for certain: it has neither a reset, nor PCI Express's Transactions Pending, nor \
         a migration state, and {why}; or accept that (serve --allow-unstoppable)"
    )]
    Unstoppable {
        /// The device's name.
        device: String,
        /// Why it cannot be detached either, and what to do about it.
        why: String,
    },
    /// The device does not answer: every register reads as all ones.
    #[error(
        "{device} does not answer: its registers read as all ones, as of a device that was removed or has no power \
         (D3cold); put it back, or take it off the bus and have it found again: \
         echo 1 > /sys/bus/pci/devices/{device}/remove; echo 1 > /sys/bus/pci/rescan"
    )]
    Gone {
        /// The device's name.
        device: String,
    },
    /// The device cannot do this.
    #[error("{device}: {what} is not supported by this device")]
    Unsupported {
        /// The device's name (BDF, or `soft:N`).
        device: String,
        /// What was asked.
        what: &'static str,
    },
    /// A DMA found nothing mapped, or not for its direction; it did nothing.
    #[error("{device}: DMA fault at IOVA {iova}: nothing is mapped there for this access")]
    Fault {
        /// The device's name.
        device: String,
        /// Where.
        iova: Iova,
    },
    /// There is no ring for a soft domain.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A device call failed.
    #[error("{device}: {source}{mend}")]
    Device {
        /// The device's name.
        device: String,
        /// The kernel's answer.
        source: Failed,
        /// What to do about it, or empty.
        mend: &'static str,
    },
    /// The host lacks what this backend needs.
    #[error("{what}: {mend}")]
    Host {
        /// What is missing.
        what: String,
        /// What to do about it.
        mend: &'static str,
    },
}

impl Error {
    /// The device and the call where it may be free in a moment: another process has it, perhaps a daemon's
    /// guardian about to let go of it, or it is being reset, or has not come to itself after that.
    pub fn taken(&self) -> Option<(&str, Failed)> {
        let Self::Device { device, source, .. } = self else { return None };
        let open_elsewhere = match source.errno {
            Errno::BUSY | Errno::AGAIN | Errno::TIMEDOUT => true,
            // Binding a cdev that is open elsewhere, putting a group into a second container.
            Errno::INVAL => source.call.contains("BIND") || source.call.contains("SET_CONTAINER"),
            _ => false,
        };
        open_elsewhere.then_some((device, *source))
    }

    /// The errno behind it, where there is one.
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
    fn what_may_be_free_in_a_moment_is_told_from_what_stays() {
        let error = |call, errno| Error::Device {
            device: "0000:01:00.0".into(),
            source: Failed::new(call, errno),
            mend: "",
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
        let host = Error::Host { what: "no IOMMU".into(), mend: "switch it on" };
        assert_eq!(host.taken(), None);
    }
}
