//! Taking over a domain and its devices from a process that has ended, with mappings live and DMA running.
//!
//! The kernel preserves all of it while any process has the files open, but it lists neither the ids of its objects nor
//! the mappings. So the files ([`Left`], made by [`leave`]) and the ids ([`Ids`]) are handed over, together with the
//! gate's ledger.
//!
//! A VFIO device without a driver continues undisturbed: it is neither bound, attached nor reset, and its
//! bus mastering stays as it is. A device with a driver has its queues in the memory of the process that has
//! ended: the device is stopped, the queues are unmapped, and its driver starts again.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::vfio::PciAddress;

use crate::assign::{Accept, Assignment, has_driver, start_driver};
use crate::device::vfio::VfioDevice;
use crate::device::{Guard, own};
use crate::drivers::Drivers;
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Device, Domain, Error, Result};

/// The ids and probed properties of a domain that a process needs in order to take it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// An IOAS of an iommufd.
    Iommufd {
        /// Its object id in the iommufd.
        ioas: u32,
        /// True if the kernel maps by file and offset (`IOMMU_IOAS_MAP_FILE`), as probed when the IOAS was made.
        by_file: bool,
        /// True if the VFIO-compatible unmap works on it, as probed when the IOAS was made.
        compat_unmap: bool,
        /// True if that unmap also cuts mappings, as probed when the IOAS was made.
        cuts: bool,
    },
    /// A VFIO container.
    Type1 {
        /// The maximum number of mappings in it.
        entries: u64,
    },
    /// A domain that ends with its process: an io_uring cannot be handed over, and of the two page tables of a standby
    /// domain ([`crate::Tables::Standby`]) no other process knows which one the devices are attached to.
    Nothing,
}

impl Ids {
    /// Encodes the ids as two numbers, for a record in the ledger. The low byte of the first is the kind; bits 8 to 10
    /// are the flags of [`Ids::Iommufd`].
    pub fn words(self) -> [u64; 2] {
        match self {
            Self::Nothing => [0, 0],
            Self::Iommufd { ioas, by_file, compat_unmap, cuts } => {
                let bits = [by_file, compat_unmap, cuts]
                    .into_iter()
                    .rev()
                    .fold(0, |bits, bit| bits << 1 | u64::from(bit));
                [1 | bits << 8, ioas.into()]
            }
            Self::Type1 { entries } => [2, entries],
        }
    }

    /// Decodes [`Ids::words`]; none for any other numbers.
    pub fn from_words([kind, value]: [u64; 2]) -> Option<Self> {
        match (kind & 0xff, u32::try_from(value)) {
            (0, Ok(0)) if kind == 0 => Some(Self::Nothing),
            (1, Ok(ioas)) if kind >> 11 == 0 => {
                let bit = |bit: u32| kind >> bit & 1 == 1;
                Some(Self::Iommufd { ioas, by_file: bit(8), compat_unmap: bit(9), cuts: bit(10) })
            }
            (2, _) if kind == 2 => Some(Self::Type1 { entries: value }),
            _ => None,
        }
    }
}

/// The files of a domain and its devices that one process hands over to the next, and the state of the devices.
#[derive(Debug, Default)]
pub struct Left {
    /// The iommufd or the container; none for [`Ids::Nothing`].
    pub domain: Option<OwnedFd>,
    /// The groups in the container, each with its number.
    pub groups: Vec<(u32, OwnedFd)>,
    /// The devices, each with its name, in the order of their assignment.
    pub devices: Vec<(String, OwnedFd)>,
    /// The names of the devices that the process had stopped or was about to stop: they may be detached.
    pub stopped: Vec<String>,
    /// The names of the devices whose ATS was read as off after their last attach.
    pub ats_unused: Vec<String>,
}

/// Duplicates the files that [`resume`] needs; domain and devices stay in use here. Empty for [`Ids::Nothing`].
pub fn leave(domain: &dyn Domain, devices: &[Arc<dyn Device>]) -> io::Result<(Left, Ids)> {
    let (mut left, ids) = domain.leave()?;
    if ids == Ids::Nothing {
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
pub fn resume(left: Left, ids: Ids, accept: Accept, drivers: &dyn Drivers) -> Result<Assignment> {
    let Left { domain, groups, devices, stopped, ats_unused } = left;
    let missing = |what: &str| Error::Host {
        what: format!("{what} is missing from what an earlier process handed over"),
        mend: "its devices have been stopped or are about to be; stop the service for good, then start it",
    };
    let fd = domain.ok_or_else(|| missing("the iommufd or container"))?;
    let together: Vec<PciAddress> = devices.iter().filter_map(|(name, _)| name.parse().ok()).collect();
    match ids {
        Ids::Nothing => Err(missing("the kind of its domain")),
        Ids::Iommufd { .. } => {
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
        Ids::Type1 { .. } => {
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
    fn ids_survive_encoding_and_other_words_are_rejected() {
        let mut all = vec![Ids::Nothing, Ids::Type1 { entries: u64::MAX }, Ids::Type1 { entries: 0 }];
        for bits in 0..8 {
            let [by_file, compat_unmap, cuts] = [1, 2, 4].map(|bit| bits & bit != 0);
            all.push(Ids::Iommufd { ioas: u32::MAX, by_file, compat_unmap, cuts });
        }
        for ids in all {
            assert_eq!(Ids::from_words(ids.words()), Some(ids));
        }
        for words in [[0, 1], [1, 1 << 32], [1 << 11 | 1, 1], [2 | 1 << 8, 1], [3, 0], [u64::MAX; 2]] {
            assert_eq!(Ids::from_words(words), None, "{words:?}");
        }
    }

    #[test]
    fn resume_without_the_domain_file_names_what_is_missing() {
        for ids in [Ids::Nothing, Ids::Type1 { entries: 1 }] {
            let error = resume(Left::default(), ids, Accept::default(), &NoDrivers).unwrap_err().to_string();
            assert!(
                error.contains("the iommufd or container is missing") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
