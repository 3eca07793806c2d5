//! Taking over a domain and its devices from a process that has ended, with mappings live and DMA running.
//!
//! The kernel preserves all of it while any process has the files open, but it lists neither the ids of its objects nor
//! the mappings. So the files ([`Handover`], made by [`leave`]) and the ids ([`DomainIds`]) are handed over, together with the
//! gate's ledger.
//!
//! A VFIO device without a driver continues undisturbed: it is neither bound, attached nor reset, and its
//! bus mastering stays as it is. A device with a driver has its queues in the memory of the process that has
//! ended: the device is stopped, the queues are unmapped, and its driver starts again.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::sync::Arc;

use passgate_bindings::vfio::PciAddress;

use crate::assign::{Accept, Assignment, has_driver, start_driver};
use crate::device::vfio::VfioDevice;
use crate::device::{Guard, own};
use crate::drivers::Drivers;
use crate::handover::{DomainIds, Handover};
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Device, Domain, Error, Result};

/// Duplicates the files that [`resume`] needs; domain and devices stay in use here. Empty for [`DomainIds::Nothing`].
pub fn leave(domain: &dyn Domain, devices: &[Arc<dyn Device>]) -> io::Result<(Handover, DomainIds)> {
    let (mut left, ids) = domain.leave()?;
    if ids == DomainIds::Nothing {
        return Ok((left, ids));
    }
    for device in devices {
        let fd = match device.guard() {
            Guard::None => continue,
            Guard::Cdev(fd) | Guard::Type1 { device: fd, .. } => fd,
        };
        left.devices.push((device.name().to_owned(), fd.as_fd().try_clone_to_owned()?));
    }
    Ok((left, ids))
}

/// Takes over what [`leave`] returned in an earlier process. On an error the devices stay as they are, except those
/// whose driver was to be started: they are stopped.
pub fn resume(left: Handover, ids: DomainIds, accept: Accept, drivers: &dyn Drivers) -> Result<Assignment> {
    let Handover { domain, groups, devices, stopped, ats_unused } = left;
    let missing = |what: &str| Error::Host {
        what: format!("{what} is missing from what an earlier process handed over"),
        remedy: "its devices have been stopped or are about to be; stop the service for good, then start it",
    };
    let fd = domain.ok_or_else(|| missing("the iommufd or container"))?;
    let together: Vec<PciAddress> = devices.iter().filter_map(|(name, _)| name.parse().ok()).collect();
    match ids {
        DomainIds::Nothing => Err(missing("the kind of its domain")),
        DomainIds::Iommufd { .. } => {
            let domain = IommufdDomain::resume(fd, ids)?;
            let opened = devices
                .into_iter()
                .map(|(name, fd)| {
                    let unused = ats_unused.contains(&name);
                    VfioDevice::resume_cdev(&name, fd, &domain, &together, unused).map(ManuallyDrop::new)
                })
                .collect::<Result<Vec<_>>>()?;
            start_drivers(domain, opened, &stopped, accept, drivers)
        }
        DomainIds::Type1 { .. } => {
            let domain = Type1Domain::resume(fd, groups, ids)?;
            let opened = devices
                .into_iter()
                .map(|(name, fd)| {
                    let unused = ats_unused.contains(&name);
                    VfioDevice::resume_group(&name, fd, &domain, unused).map(ManuallyDrop::new)
                })
                .collect::<Result<Vec<_>>>()?;
            start_drivers(domain, opened, &stopped, accept, drivers)
        }
    }
}

/// Starts the drivers of the devices that have one. All such devices are stopped and all old queues
/// unmapped before the first driver starts: the drivers of one process share an IOVA range, so a device that still runs
/// might write to another driver's queues. Dropping a [`VfioDevice`] would stop the device; [`ManuallyDrop`] prevents
/// that on an error.
///
/// A driver needs its device attached. A device that may be detached is attached here, before the gate has resolved its
/// uncertain mappings: the driver does DMA to its own memory only, and the gate assumes that the device may be
/// attached.
fn start_drivers(
    domain: Arc<dyn Domain>,
    opened: Vec<ManuallyDrop<VfioDevice>>,
    stopped: &[String],
    accept: Accept,
    drivers: &dyn Drivers,
) -> Result<Assignment> {
    for device in &opened {
        if has_driver(device, accept, drivers)? {
            device.quiesce(drivers)?;
        }
    }
    own::clear(&*domain)?;
    let mut drives = Vec::new();
    let devices = opened
        .into_iter()
        .map(|device| {
            if has_driver(&device, accept, drivers)? {
                if stopped.iter().any(|name| name == device.name()) {
                    device.attach()?
                } else {
                    device.enable_requests()?
                }
            }
            start_driver(ManuallyDrop::into_inner(device), Arc::clone(&domain), accept, drivers, &mut drives)
        })
        .collect::<Result<_>>()?;
    Ok(Assignment { domain, devices, drives })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoDrivers;

    #[test]
    fn resume_without_the_domain_file_names_what_is_missing() {
        for ids in [DomainIds::Nothing, DomainIds::Type1 { entries: 1 }] {
            let error =
                resume(Handover::default(), ids, Accept::default(), &NoDrivers).unwrap_err().to_string();
            assert!(
                error.contains("the iommufd or container is missing") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
