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
    /// Whether another process has the device, which may be a daemon's guardian about to let go of it.
    pub fn is_taken(&self) -> bool {
        // Binding a cdev that is open elsewhere is EINVAL, not EBUSY.
        let Self::Device { source, .. } = self else { return false };
        source.errno == Errno::BUSY || (source.errno == Errno::INVAL && source.call.contains("BIND"))
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
            Self::Unbound { .. } | Self::Host { .. } | Self::Ring(_) => None,
        }
    }
}
