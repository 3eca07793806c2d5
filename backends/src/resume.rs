//! Taking over a domain and its devices from a process that has ended, with mappings live and DMA running.
//!
//! The kernel keeps all of it as long as somebody holds the files; it lists neither the ids of its objects nor the
//! mappings. So what is handed on are the files ([`Left`], by [`leave`]) and the ids ([`Ids`]), and the gate's ledger
//! beside them.
//!
//! A plain VFIO device goes on undisturbed: it is neither bound, attached nor reset, and bus mastering is left as it
//! is. A device with a driver of ours has its queues in the memory of the process that is gone: that one device is
//! stopped, the queues are taken out of the domain, and its driver begins anew.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::vfio::PciAddress;

use crate::assign::{Accept, Assignment, drive, driver_of};
use crate::device::vfio::VfioDevice;
use crate::device::{Guard, own};
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Device, Domain, Error, Result};

/// What a process must know of a domain that it did not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// An IOAS of an iommufd.
    Iommufd {
        /// Its id there.
        ioas: u32,
        /// Whether files are mapped by file, as probed when it was made.
        by_file: bool,
        /// Whether the VFIO-compatible unmap works on it, as probed then,
        tells: bool,
        /// and cuts.
        cuts: bool,
    },
    /// A VFIO container.
    Type1 {
        /// Mappings that it can hold.
        entries: u64,
    },
    /// Nothing of it outlives its process: an io_uring cannot be passed on, and of two page tables nobody else knows which
    /// one devices are in.
    Nothing,
}

impl Ids {
    /// As two numbers, for a record.
    pub fn words(self) -> [u64; 2] {
        match self {
            Self::Nothing => [0, 0],
            Self::Iommufd { ioas, by_file, tells, cuts } => {
                let bits =
                    [by_file, tells, cuts].into_iter().rev().fold(0, |bits, bit| bits << 1 | u64::from(bit));
                [1 | bits << 8, ioas.into()]
            }
            Self::Type1 { entries } => [2, entries],
        }
    }

    /// Back from two numbers; none where they are none of [`Ids::words`].
    pub fn from_words([kind, value]: [u64; 2]) -> Option<Self> {
        match (kind & 0xff, u32::try_from(value)) {
            (0, Ok(0)) if kind == 0 => Some(Self::Nothing),
            (1, Ok(ioas)) if kind >> 11 == 0 => {
                let bit = |bit: u32| kind >> bit & 1 == 1;
                Some(Self::Iommufd { ioas, by_file: bit(8), tells: bit(9), cuts: bit(10) })
            }
            (2, _) if kind == 2 => Some(Self::Type1 { entries: value }),
            _ => None,
        }
    }
}

/// What of a domain and its devices outlives a process that hands it on.
#[derive(Debug, Default)]
pub struct Left {
    /// The iommufd or the container; none for a domain of which nothing outlives its process.
    pub domain: Option<OwnedFd>,
    /// The groups in the container, by their numbers.
    pub groups: Vec<(u32, OwnedFd)>,
    /// The devices by their names, in their order.
    pub devices: Vec<(String, OwnedFd)>,
    /// Those of them that the process had stopped or was about to stop: they may be detached.
    pub stopped: Vec<String>,
    /// Those of them whose ATS the process knew to be off while they are attached.
    pub ats_unused: Vec<String>,
}

/// Copies of all that [`resume`] needs, while domain and devices go on; nothing where nothing outlives this process.
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

/// Takes over what [`leave`] gave. Where that fails the devices are left as they are, but for one whose driver was
/// about to begin anew.
pub fn resume(left: Left, ids: Ids, accept: Accept) -> Result<Assignment> {
    let Left { domain, groups, devices, stopped, ats_unused } = left;
    let missing = |what: &str| Error::Host {
        what: format!("of what an earlier process left, {what} is missing"),
        mend: "its devices are stopped by now or about to be; stop the service for good, then start it",
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
            go_on(domain, opened, &stopped, accept)
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
            go_on(domain, opened, &stopped, accept)
        }
    }
}

/// Gives drivers to the devices that have one. No driver begins while another's device may still write to queues at
/// the same addresses. A device that is dropped is stopped: here none is.
///
/// A driver needs its device attached. One that may be detached is attached here, before the gate has settled what is in
/// doubt: the driver does no DMA but to memory of its own, and the gate takes the device for one that may be attached.
fn go_on(
    domain: Arc<dyn Domain>,
    opened: Vec<ManuallyDrop<VfioDevice>>,
    stopped: &[String],
    accept: Accept,
) -> Result<Assignment> {
    for device in &opened {
        if driver_of(device)?.is_some() {
            device.quieten()?;
        }
    }
    own::clear(&*domain)?;
    let mut drives = Vec::new();
    let devices = opened
        .into_iter()
        .map(|device| {
            if driver_of(&device)?.is_some() {
                if stopped.iter().any(|name| name == device.name()) {
                    device.attach()?
                } else {
                    device.wake()?
                }
            }
            drive(ManuallyDrop::into_inner(device), Arc::clone(&domain), accept, &mut drives)
        })
        .collect::<Result<_>>()?;
    Ok(Assignment { domain, devices, drives })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_as_they_went_and_others_are_none() {
        let mut all = vec![Ids::Nothing, Ids::Type1 { entries: u64::MAX }, Ids::Type1 { entries: 0 }];
        for bits in 0..8 {
            let [by_file, tells, cuts] = [1, 2, 4].map(|bit| bits & bit != 0);
            all.push(Ids::Iommufd { ioas: u32::MAX, by_file, tells, cuts });
        }
        for ids in all {
            assert_eq!(Ids::from_words(ids.words()), Some(ids));
        }
        for words in [[0, 1], [1, 1 << 32], [1 << 11 | 1, 1], [2 | 1 << 8, 1], [3, 0], [u64::MAX; 2]] {
            assert_eq!(Ids::from_words(words), None, "{words:?}");
        }
    }

    #[test]
    fn what_is_missing_is_told() {
        for ids in [Ids::Nothing, Ids::Type1 { entries: 1 }] {
            let error = resume(Left::default(), ids, Accept::default()).unwrap_err().to_string();
            assert!(
                error.contains("the iommufd or container is missing") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
