//! The type1 domain: a VFIO container with the type1v2 IOMMU driver, for devices that are opened by their group.
//! Available on every kernel with VFIO, and the only backend on kernels without iommufd, such as Debian's.
//!
//! Everything is mapped by address, the number of mappings is limited (`dma_entry_limit`, 65 535 by default), and there
//! is no blocking domain to move a device to. The kernel checks both ends of an unmap's range before it changes
//! anything, so an unmap that fails has changed nothing.

mod resume;

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{LIMIT, Offset};
use passgate_bindings::vfio::pci::IommuGroup;
use passgate_bindings::vfio::{Container, Group, PciAddress};
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::{Domain, DomainCaps, Unmap, pieces};
use crate::handover::{DomainIds, Handover};
use crate::{Error, Result};

/// The module parameter with the maximum number of mappings in a container.
const ENTRY_LIMIT_PATH: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// The maximum number of mappings if the kernel does not state it (`U16_MAX` in drivers/vfio/vfio_iommu_type1.c).
const DEFAULT_MAX_MAPPINGS: u64 = 65_535;

/// A container and the groups in it.
///
/// Groups stay in the container as long as the domain exists: when the last group leaves a container, the kernel
/// removes every mapping. The order of the fields closes the groups before the container; each device has a reference
/// to the domain, so all devices close before both.
#[derive(Debug)]
pub struct Type1Domain {
    groups: Mutex<Vec<Arc<Group>>>,
    /// The maximum number of mappings.
    entries: u64,
    container: Container,
}

impl Type1Domain {
    /// Opens a new container with the group of its first device: a container without a group maps nothing.
    pub fn open(address: PciAddress, group: &IommuGroup) -> Result<Arc<Self>> {
        let container = Container::open().map_err(|failed| Error::Host {
            what: failed.to_string(),
            remedy: match failed.errno {
                Errno::NOENT => "this kernel has no VFIO, or its modules are not loaded: modprobe vfio-pci",
                Errno::NODEV => "the type1 IOMMU driver is not loaded: modprobe vfio_iommu_type1",
                Errno::ACCESS | Errno::PERM => {
                    "run as root, or give this user /dev/vfio/vfio, or pass it in as an open file"
                }
                _ => "see dmesg",
            },
        })?;
        Self::new(container, open_group(address, group)?, address)
    }

    /// Makes a domain of a container and its first group that were opened by a process with the permission to. The
    /// group must not be in a container yet.
    pub fn from_fds(container: OwnedFd, group: (u32, OwnedFd), address: PciAddress) -> Result<Arc<Self>> {
        Self::new(Container::from_fd(container), Group::from_fd(group.0, group.1), address)
    }

    fn new(container: Container, group: Group, address: PciAddress) -> Result<Arc<Self>> {
        add_group(&group, &container, address)?;
        container.set_type1().map_err(|source| Error::Device {
            device: address.to_string(),
            source,
            remedy: match source.errno {
                Errno::PERM => {
                    "; this machine has no interrupt remapping: switch it on, or accept the risk with \
                     vfio_iommu_type1.allow_unsafe_interrupts=1"
                }
                _ => "",
            },
        })?;
        let entries = match container.info() {
            Ok(info) => info.mappings_left.map(u64::from),
            Err(_) => None,
        };
        let parameter = || fs::read_to_string(ENTRY_LIMIT_PATH).ok()?.trim().parse().ok();
        let entries = entries.or_else(parameter).unwrap_or(DEFAULT_MAX_MAPPINGS);
        Ok(Arc::new(Self { groups: Mutex::new(vec![Arc::new(group)]), entries, container }))
    }

    /// Returns the container, of which a guardian has a duplicate.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// Returns the group with this number, if it is in the container.
    pub(crate) fn group_by_id(&self, id: u32) -> Option<Arc<Group>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.iter().find(|group| group.id() == id).map(Arc::clone)
    }

    /// Returns the group of the device at `address`, after adding it to the container if it is not in it yet.
    pub fn group(&self, address: PciAddress, group: &IommuGroup) -> Result<Arc<Group>> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = groups.iter().find(|known| known.id() == group.id) {
            return Ok(Arc::clone(found));
        }
        let opened = open_group(address, group)?;
        add_group(&opened, &self.container, address)?;
        let opened = Arc::new(opened);
        groups.push(Arc::clone(&opened));
        Ok(opened)
    }
}

impl Domain for Type1Domain {
    fn name(&self) -> &'static str {
        "type1"
    }

    fn capabilities(&self) -> DomainCaps {
        DomainCaps {
            max_mappings: self.entries,
            max_mapping_len: LIMIT,
            tickets: false,
            cut: false,
            replace: false,
            counts_partial: true,
        }
    }

    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()> {
        let one = |iova, offset| self.container.map(iova, file, offset, writable);
        pieces::map(iova, piece, offset, one, |made| self.unmap(made))
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        match self.container.unmap(iova) {
            Ok(bytes) => Unmap::Gone { bytes },
            Err(Failed { errno, partial, .. }) => Unmap::Failed { errno, bytes: partial },
        }
    }

    fn usable(&self) -> Vec<RangeInclusive<Iova>> {
        self.container.info().map(|info| info.iova_ranges).unwrap_or_default()
    }

    fn leave(&self) -> io::Result<(Handover, DomainIds)> {
        self.hand_over()
    }
}

fn open_group(address: PciAddress, group: &IommuGroup) -> Result<Group> {
    let opened = Group::open(group.id).map_err(|source| Error::Device {
        device: address.to_string(),
        source,
        remedy: match source.errno {
            Errno::BUSY => "; another process has this IOMMU group: stop it first",
            Errno::NOENT => "; VFIO does not show the group: is vfio-pci loaded?",
            Errno::ACCESS | Errno::PERM => {
                "; run as root, or give this user /dev/vfio/GROUP (the device's iommu_group link names it), or \
                 pass it in as an open file"
            }
            _ => "",
        },
    })?;
    match opened.viable() {
        Ok(true) => Ok(opened),
        Ok(false) => Err(not_viable(address, group)),
        Err(source) => Err(Error::Device { device: address.to_string(), source, remedy: "" }),
    }
}

/// Returns the error for a group with a device that is bound to a host driver, although sysfs did not show that when it
/// was checked.
fn not_viable(address: PciAddress, group: &IommuGroup) -> Error {
    let members: Vec<_> = group.members.iter().map(PciAddress::to_string).collect();
    Error::Host {
        what: format!(
            "{address}: IOMMU group {} ({}) is not viable: a driver of the host uses it",
            group.id,
            members.join(", ")
        ),
        remedy: "bind every device of the group to vfio-pci (docs/guide/serve.md), or to no driver",
    }
}

/// Adds a group to a container.
fn add_group(group: &Group, container: &Container, address: PciAddress) -> Result<()> {
    group.set_container(container).map_err(|source| Error::Device {
        device: address.to_string(),
        source,
        remedy: match source.errno {
            Errno::INVAL => "; its IOMMU group is in a container already",
            Errno::BUSY => "; a driver of the host uses its IOMMU group",
            _ => "",
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_of_a_group_that_is_not_viable_names_its_devices() {
        let members = ["04:00.0", "04:00.1"].map(|name| name.parse().unwrap()).to_vec();
        let group = IommuGroup { id: 9, noiommu: false, members };
        let error = not_viable("04:00.0".parse().unwrap(), &group).to_string();
        assert!(
            error.contains("0000:04:00.0: IOMMU group 9 (0000:04:00.0, 0000:04:00.1) is not viable"),
            "{error}"
        );
        assert!(
            error.contains(": bind every device of the group to vfio-pci") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn host_without_vfio_is_reported_in_one_line() {
        if std::path::Path::new("/dev/vfio").exists() {
            return; // machine.rs covers such a host
        }
        let group = IommuGroup { id: 1, noiommu: false, members: Vec::new() };
        let error = Type1Domain::open("04:00.0".parse().unwrap(), &group).unwrap_err().to_string();
        assert!(error.starts_with("open /dev/vfio/vfio: No such file"), "{error}");
        assert!(error.contains("modprobe vfio-pci") && !error.contains('\n'), "{error}");
    }
}
