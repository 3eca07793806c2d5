//! The iommufd domain, for devices that are opened by their cdev. Linux 6.6 and later.
//!
//! Memfd and hugetlbfs files are mapped by file if the kernel supports it (`IOMMU_IOAS_MAP_FILE`); guest_memfd, which
//! it cannot map by file, by address. An unmap uses the VFIO-compatible call (`VFIO_IOMMU_UNMAP_DMA` on an iommufd) if
//! probed, because only that call distinguishes "nothing is mapped" from "this would cut a mapping", reports the bytes
//! removed before a failure, and cuts mappings if the IOMMU pages are small. [`Tables`] selects, when the domain is
//! made, by which method parts of mappings are removed.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use passgate_bindings::iommufd::{IoasId, Iommufd};
use passgate_bindings::memory::{FileKind, GuestFile};
use passgate_bindings::units::{LIMIT, Offset};
use passgate_bindings::vfio::Cdev;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::{Domain, DomainCaps, Unmap, pieces};
use crate::handover::{DomainIds, Handover};
use crate::{Error, Result};

mod areas;
mod attachments;
mod kernel;
mod probe;
mod resume;
mod standby;
mod tracked_ioas;

use standby::Standby;

/// The page tables of an iommufd domain, which determine how it removes parts of mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tables {
    /// IOMMU pages of 4 KiB (`IOMMU_OPTION_HUGE_PAGES` off): mappings are cut in place, without a gap in any DMA beside
    /// the cut. The cost is 8 bytes of page table for each 4 KiB mapped, the time to write them, and more IOTLB misses.
    /// On a kernel that does not cut, this is the same as [`Tables::Large`].
    #[default]
    Small,
    /// IOMMU pages as large as the memory allows; only whole mappings are unmapped.
    Large,
    /// As [`Tables::Large`], with everything mapped in two IOASes, each with page tables of its own that stay filled:
    /// [`Domain::replace`] removes ranges from one while the devices are attached to the other, and then moves the
    /// devices. Linux 6.7.
    Standby,
}

/// One or two IOASes and the iommufd that owns them.
///
/// Each device has a reference to this domain, so all devices detach and close before it is dropped; then the IOASes
/// are destroyed, and the iommufd closes last.
#[derive(Debug)]
pub struct IommufdDomain {
    setup: IoasSetup,
    by_file: bool,
    iommufd: Iommufd,
}

/// The IOASes of a domain.
#[derive(Debug)]
enum IoasSetup {
    Single {
        ioas: IoasId,
        /// True if the VFIO-compatible unmap works on it.
        compat_unmap: bool,
        /// True if that unmap also cuts mappings.
        cuts: bool,
    },
    Pair(Standby),
}

impl IommufdDomain {
    /// Opens `/dev/iommu` and makes a domain there.
    pub fn open(tables: Tables) -> Result<Arc<Self>> {
        let iommufd = Iommufd::open().map_err(|failed| Error::Host {
            what: failed.to_string(),
            remedy: match failed.errno {
                Errno::NOENT => {
                    "this kernel has no iommufd (CONFIG_IOMMUFD; modprobe iommufd): use --iommu type1"
                }
                Errno::ACCESS | Errno::PERM => {
                    "run as root, or give this user /dev/iommu, or pass it in as an open file"
                }
                _ => "see dmesg",
            },
        })?;
        Self::new(iommufd, tables)
    }

    /// Makes a domain in an iommufd that was opened by a process with the permission to.
    pub fn from_fd(fd: OwnedFd, tables: Tables) -> Result<Arc<Self>> {
        Self::new(Iommufd::from_fd(fd), tables)
    }

    fn new(iommufd: Iommufd, tables: Tables) -> Result<Arc<Self>> {
        let ioas = alloc(&iommufd)?;
        let by_file = probe::maps_files(&iommufd, ioas);
        let setup = match tables {
            Tables::Standby => IoasSetup::Pair(Standby::new([ioas, alloc(&iommufd)?])),
            Tables::Small | Tables::Large => {
                let compat_unmap = probe::compat_unmap(&iommufd, ioas);
                let cuts = compat_unmap && tables == Tables::Small && use_small_pages(&iommufd, ioas);
                IoasSetup::Single { ioas, compat_unmap, cuts }
            }
        };
        Ok(Arc::new(Self { setup, by_file, iommufd }))
    }

    /// Returns the iommufd that devices are bound to.
    pub fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }

    /// Returns the IOASes. The first is the one that devices are attached to now.
    pub fn ioases(&self) -> Vec<IoasId> {
        match &self.setup {
            IoasSetup::Single { ioas, .. } => vec![*ioas],
            IoasSetup::Pair(standby) => standby.ioases().to_vec(),
        }
    }

    /// Binds a device to the iommufd. Its DMA is blocked until it is attached.
    pub(crate) fn bind(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        let id = cdev.bind(&self.iommufd)?;
        if let IoasSetup::Pair(standby) = &self.setup {
            standby.add(cdev, id);
        }
        Ok(())
    }

    /// Attaches a device that was bound to this iommufd.
    pub(crate) fn attach(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        match &self.setup {
            IoasSetup::Single { ioas, .. } => cdev.attach(*ioas),
            IoasSetup::Pair(standby) => standby.attach(&self.iommufd, cdev),
        }
    }

    /// Detaches a device: its DMA is blocked until it is attached again.
    pub(crate) fn detach(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        match &self.setup {
            IoasSetup::Single { .. } => cdev.detach(),
            IoasSetup::Pair(standby) => standby.detach(cdev),
        }
    }

    /// Returns false if a failed replace has left the device detached.
    pub(crate) fn is_attached(&self, cdev: &Arc<Cdev>) -> bool {
        match &self.setup {
            // Without a second page table no device is ever moved.
            IoasSetup::Single { .. } => true,
            IoasSetup::Pair(standby) => standby.is_attached(cdev),
        }
    }
}

impl Domain for IommufdDomain {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn capabilities(&self) -> DomainCaps {
        // iommufd limits pinned memory, not the number of mappings.
        DomainCaps {
            max_mappings: u64::MAX,
            max_mapping_len: LIMIT,
            tickets: false,
            cut: matches!(self.setup, IoasSetup::Single { cuts: true, .. }),
            replace: matches!(self.setup, IoasSetup::Pair(_)),
            // Only the VFIO-compatible call writes the byte count on an error.
            counts_partial: matches!(self.setup, IoasSetup::Single { compat_unmap: true, .. }),
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
        let by_file = self.by_file && file.kind() != FileKind::GuestMemfd;
        let one = |ioas, iova, offset| {
            if by_file {
                self.iommufd.map_file(ioas, iova, file, offset, writable)
            } else {
                self.iommufd.map(ioas, iova, file, offset, writable)
            }
        };
        match &self.setup {
            IoasSetup::Single { ioas, .. } => {
                pieces::map(iova, piece, offset, |iova, from| one(*ioas, iova, from), |made| self.unmap(made))
            }
            IoasSetup::Pair(standby) => standby.map(&self.iommufd, (iova, piece), offset, writable, one),
        }
    }

    /// If the VFIO-compatible call is not available, an unmap of a range without any mapping is [`Unmap::Failed`] with
    /// `ENOENT`: the kernel does not distinguish it from an unmap that would cut a mapping.
    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let unmapped = match &self.setup {
            IoasSetup::Single { compat_unmap: true, .. } => self.iommufd.cut(iova),
            IoasSetup::Single { ioas, .. } => self.iommufd.unmap(*ioas, iova),
            IoasSetup::Pair(standby) => return standby.unmap(&self.iommufd, iova),
        };
        match unmapped {
            Ok(bytes) => Unmap::Gone { bytes },
            Err(Failed { errno, partial, .. }) => Unmap::Failed { errno, bytes: partial },
        }
    }

    fn usable(&self) -> Vec<RangeInclusive<Iova>> {
        let ioas = match &self.setup {
            IoasSetup::Single { ioas, .. } => *ioas,
            IoasSetup::Pair(standby) => standby.ioases()[0],
        };
        self.iommufd.iova_ranges(ioas).map(|found| found.ranges).unwrap_or_default()
    }

    fn leave(&self) -> io::Result<(Handover, DomainIds)> {
        self.hand_over()
    }

    /// If a device cannot be moved or a copy cannot be made, this is [`Unmap::Failed`]: `gone` may still be mapped as
    /// before, or be unmapped for the devices with its pages still pinned. A later replace of the same ranges, or an
    /// unmap of the whole mappings that they were part of, removes the rest and reports all of the bytes.
    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        match &self.setup {
            IoasSetup::Single { .. } => Unmap::Failed { errno: Errno::NOSYS, bytes: 0 },
            IoasSetup::Pair(standby) => standby.replace(&self.iommufd, gone),
        }
    }
}

impl Drop for IommufdDomain {
    fn drop(&mut self) {
        match &self.setup {
            IoasSetup::Single { ioas, .. } => destroy(&self.iommufd, *ioas),
            IoasSetup::Pair(standby) => {
                standby.close(&self.iommufd);
                standby.ioases().iter().for_each(|ioas| destroy(&self.iommufd, *ioas));
            }
        }
    }
}

fn alloc(iommufd: &Iommufd) -> Result<IoasId> {
    iommufd.ioas_alloc().map_err(|failed| Error::Host {
        what: failed.to_string(),
        remedy: match failed.errno {
            Errno::NOTTY => "the file passed is not an iommufd: pass an open /dev/iommu",
            _ => "see dmesg",
        },
    })
}

fn destroy(iommufd: &Iommufd, ioas: IoasId) {
    if let Err(failed) = iommufd.ioas_destroy(ioas) {
        log::warn!("IOAS {}: {failed}; its mappings stay until the iommufd closes", ioas.0);
    }
}

/// Sets an empty IOAS to small IOMMU pages, if its mappings can be cut then. Returns true if they can.
fn use_small_pages(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let cuts = iommufd.set_huge_pages(ioas, false).is_ok() && probe::cuts(iommufd, ioas);
    if !cuts {
        log::info!("IOAS {}: this kernel does not cut mappings; its IOMMU pages are large", ioas.0);
        // This fails only if switching huge pages off has failed too, and then they are still on.
        let _ = iommufd.set_huge_pages(ioas, true);
    }
    cuts
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use passgate_bindings::PAGE;

    use super::*;

    #[test]
    fn host_without_iommufd_is_reported_in_one_line() {
        if std::path::Path::new("/dev/iommu").exists() {
            return; // machine.rs covers such a host
        }
        let error = IommufdDomain::open(Tables::default()).unwrap_err().to_string();
        assert!(error.starts_with("open /dev/iommu: No such file"), "{error}");
        assert!(error.contains("use --iommu type1") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn passed_file_that_is_no_iommufd_is_refused() {
        let memfd = GuestFile::memfd("not-iommu", PAGE).unwrap();
        let error = IommufdDomain::from_fd(memfd.as_fd().try_clone_to_owned().unwrap(), Tables::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("not an iommufd: pass an open /dev/iommu"), "{error}");
    }
}
