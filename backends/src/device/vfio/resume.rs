//! A VFIO device whose file an earlier process left: it is in its domain already, and does what it was doing.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use passgate_bindings::vfio::pci::SYSFS;
use passgate_bindings::vfio::{Cdev, DeviceFile, PciAddress};

use super::{Candidate, Seat, VfioDevice, candidate};
use crate::device::{FenceStep, StopClass, edu};
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Error, Result};

const MEND: &str = "start without what the service manager keeps: stop the service for good, then start it";

impl VfioDevice {
    /// Takes over a cdev that is bound to the domain's iommufd and attached there, or was and is fenced.
    pub(crate) fn resume_cdev(
        name: &str,
        fd: OwnedFd,
        domain: &Arc<IommufdDomain>,
        together: &[PciAddress],
        ats_unused: bool,
    ) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        is_cdev_of(&candidate, &fd)?;
        let stop = if candidate.stays(together).is_some() { StopClass::empty() } else { StopClass::DETACH };
        let seat = Seat::Cdev { cdev: Arc::new(Cdev::from_fd(fd)), domain: Arc::clone(domain) };
        Self::opened(candidate.pci, seat, stop, ats_unused).map_err(not_bound)
    }

    /// Takes over an open device of a group in the domain's container.
    pub(crate) fn resume_group(
        name: &str,
        fd: OwnedFd,
        domain: &Arc<Type1Domain>,
        ats_unused: bool,
    ) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        let group = domain.group_left(candidate.group.id).ok_or_else(|| Error::Host {
            what: format!("{name}: its IOMMU group {} was not kept", candidate.group.id),
            mend: MEND,
        })?;
        let seat = Seat::Group { file: DeviceFile::from_fd(fd), _group: group, domain: Arc::clone(domain) };
        let device = Self::opened(candidate.pci, seat, StopClass::empty(), ats_unused).map_err(not_bound)?;
        // The file of a device has no name: what it says of itself must be what sysfs says.
        if device.pci.ids() == Some(device.ids()?) {
            return Ok(device);
        }
        Err(Error::Host { what: format!("{name}: the file that was kept is of another device"), mend: MEND })
    }

    /// Stops a device whose driver is to begin anew, and leaves all others alone: no request after this meets the
    /// queues of the driver before.
    pub(crate) fn quieten(&self) -> Result<()> {
        self.set_master(false)?;
        if self.stop.has(FenceStep::Reset) {
            self.seat.file().reset().map_err(|failed| self.failed(failed))?;
            self.set_master(false)?;
        } else if self.ids()? == edu::IDS {
            // It has no reset: what it was at ends, and reaches nothing.
            edu::rest(self)?;
        }
        Ok(())
    }

    /// Lets a device that was stopped so issue requests again.
    pub(crate) fn wake(&self) -> Result<()> {
        self.set_master(true)
    }
}

/// An unbound cdev answers every call with `EINVAL`.
fn not_bound(error: Error) -> Error {
    match error {
        Error::Device { device, source, .. } => Error::Device {
            device,
            source,
            mend: "; the file that was kept is not of a device in use: stop the service for good, then start it",
        },
        other => other,
    }
}

/// Whether the file is the character device that sysfs names.
pub(super) fn is_cdev_of(candidate: &Candidate, fd: &OwnedFd) -> Result<()> {
    let number =
        rustix::fs::fstat(fd).map(|stat| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)));
    if candidate.pci.cdev().map(|cdev| cdev.number) == number.ok() {
        return Ok(());
    }
    Err(Error::Host {
        what: format!("{}: the file passed is not its character device", candidate.pci.address()),
        mend: "pass the open /dev/vfio/devices/vfioN that the device's vfio-dev directory names",
    })
}
