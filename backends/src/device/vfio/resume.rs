//! Taking over a VFIO device whose file an earlier process handed over: it is in its domain already, and its DMA
//! continues.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use passgate_bindings::vfio::pci::SYSFS;
use passgate_bindings::vfio::{Cdev, DeviceFile, PciAddress};

use super::{Candidate, Handle, VfioDevice, candidate};
use crate::device::{Step, Steps};
use crate::drivers::Drivers;
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Error, Result};

const REMEDY: &str = "start without what the service manager has: stop the service for good, then start it";

impl VfioDevice {
    /// Takes over a cdev that is bound to the domain's iommufd, and attached to the domain or fenced.
    pub(crate) fn resume_cdev(
        name: &str,
        fd: OwnedFd,
        domain: &Arc<IommufdDomain>,
        together: &[PciAddress],
        ats_unused: bool,
    ) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        is_cdev_of(&candidate, &fd)?;
        let stop = if candidate.first_outside(together).is_some() { Steps::empty() } else { Steps::DETACH };
        let handle = Handle::Cdev { cdev: Arc::new(Cdev::from_fd(fd)), domain: Arc::clone(domain) };
        Self::opened(candidate.pci, handle, stop, ats_unused).map_err(not_bound)
    }

    /// Takes over an open device of a group in the domain's container.
    pub(crate) fn resume_group(
        name: &str,
        fd: OwnedFd,
        domain: &Arc<Type1Domain>,
        ats_unused: bool,
    ) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        let group = domain.group_by_id(candidate.group.id).ok_or_else(|| Error::Host {
            what: format!("{name}: its IOMMU group {} was not handed over", candidate.group.id),
            remedy: REMEDY,
        })?;
        let handle =
            Handle::Group { file: DeviceFile::from_fd(fd), _group: group, domain: Arc::clone(domain) };
        let device = Self::opened(candidate.pci, handle, Steps::empty(), ats_unused).map_err(not_bound)?;
        // The device's file does not identify the device, so at least its ids are compared with those in sysfs.
        if device.pci.ids() == Some(device.ids()?) {
            return Ok(device);
        }
        Err(Error::Host { what: format!("{name}: the stored file is of another device"), remedy: REMEDY })
    }

    /// Stops a device whose driver, one of `drivers` or this crate's, is to start again: after this it makes no access
    /// to the queues of its previous driver.
    pub(crate) fn quiesce(&self, drivers: &dyn Drivers) -> Result<()> {
        self.set_master(false)?;
        if self.stop.has(Step::Reset) {
            self.handle.file().reset().map_err(|failed| self.failed(failed))?;
            // In case the reset has changed the Command register.
            self.set_master(false)?;
        } else {
            // Without a reset, its transfers must end here; they access no memory while bus mastering is off.
            drivers.await_idle(self)?;
        }
        Ok(())
    }

    /// Lets a device that was stopped by [`VfioDevice::quiesce`] issue requests again.
    pub(crate) fn enable_requests(&self) -> Result<()> {
        self.set_master(true)
    }
}

/// Adds the remedy to the error of a device that is not bound: an unbound cdev returns `EINVAL` for every call.
fn not_bound(error: Error) -> Error {
    match error {
        Error::Device { device, source, .. } => Error::Device {
            device,
            source,
            remedy: "; the stored file is not of a bound device: stop the service for good, then start it",
        },
        other => other,
    }
}

/// Checks that the file is the device's cdev, by the device number in sysfs.
pub(super) fn is_cdev_of(candidate: &Candidate, fd: &OwnedFd) -> Result<()> {
    let number =
        rustix::fs::fstat(fd).map(|stat| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)));
    if candidate.pci.cdev().map(|cdev| cdev.number) == number.ok() {
        return Ok(());
    }
    Err(Error::Host {
        what: format!("{}: the file passed is not its character device", candidate.pci.address()),
        remedy: "pass the open /dev/vfio/devices/vfioN that the device's vfio-dev directory names",
    })
}
