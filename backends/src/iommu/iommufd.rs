//! The iommufd domain: for devices by their cdev. Linux 6.6 and later.
//!
//! Memfd and hugetlbfs are mapped by file where the kernel can; guest_memfd, which it cannot, by address. An
//! unmap uses the VFIO-compatible call where probed, because that one alone tells "nothing was there" from "this
//! would cut a mapping", says what it had removed when it fails half-way, and, where the IOMMU pages are small,
//! cuts. How parts of mappings are taken out is chosen when the domain is made: [`Tables`].

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

use super::{Capabilities, Domain, Unmap, pieces};
use crate::resume::{Ids, Left};
use crate::{Error, Result};

mod areas;
mod kernel;
mod probe;
mod resume;
mod seats;
mod side;
mod standby;

use standby::Standby;

/// Which page tables an iommufd domain keeps, and so how it takes parts of mappings out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tables {
    /// IOMMU pages of 4 KiB (`IOMMU_OPTION_HUGE_PAGES` off): mappings are cut in place, which no device notices.
    /// They cost 8 bytes of page table for each 4 KiB mapped, the time to write them, and more misses in the IOTLB.
    /// Where the kernel turns out not to cut, this is [`Tables::Large`].
    #[default]
    Small,
    /// IOMMU pages as large as the memory allows; mappings go whole.
    Large,
    /// As [`Tables::Large`], and everything in two IOASes, each with page tables of its own that stay filled:
    /// [`Domain::replace`] takes ranges out of one while the devices are in the other, and moves them. Linux 6.7.
    Standby,
}

/// One or two IOASes and the iommufd that owns them.
///
/// Devices hold this domain, so they detach and close before it goes; then the IOASes are destroyed, and the
/// iommufd closes last.
#[derive(Debug)]
pub struct IommufdDomain {
    kept: Kept,
    by_file: bool,
    iommufd: Iommufd,
}

/// What a domain maps in.
#[derive(Debug)]
enum Kept {
    One {
        ioas: IoasId,
        /// Whether the VFIO-compatible unmap works on it,
        tells: bool,
        /// and cuts.
        cuts: bool,
    },
    Two(Standby),
}

impl IommufdDomain {
    /// Opens `/dev/iommu` and makes a domain there.
    pub fn open(tables: Tables) -> Result<Arc<Self>> {
        let iommufd = Iommufd::open().map_err(|failed| Error::Host {
            what: failed.to_string(),
            mend: match failed.errno {
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

    /// Makes a domain in an iommufd that somebody with the right to open one has passed.
    pub fn from_fd(fd: OwnedFd, tables: Tables) -> Result<Arc<Self>> {
        Self::new(Iommufd::from_fd(fd), tables)
    }

    fn new(iommufd: Iommufd, tables: Tables) -> Result<Arc<Self>> {
        let ioas = alloc(&iommufd)?;
        let by_file = probe::maps_files(&iommufd, ioas);
        let kept = match tables {
            Tables::Standby => Kept::Two(Standby::new([ioas, alloc(&iommufd)?])),
            Tables::Small | Tables::Large => {
                let tells = probe::tells(&iommufd, ioas);
                let cuts = tells && tables == Tables::Small && small(&iommufd, ioas);
                Kept::One { ioas, tells, cuts }
            }
        };
        Ok(Arc::new(Self { kept, by_file, iommufd }))
    }

    /// The iommufd, for devices to be bound to.
    pub fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }

    /// The IOASes, the one that devices are attached to now first.
    pub fn ioases(&self) -> Vec<IoasId> {
        match &self.kept {
            Kept::One { ioas, .. } => vec![*ioas],
            Kept::Two(standby) => standby.ioases().to_vec(),
        }
    }

    /// Binds a device to the iommufd. Its DMA is blocked until it is attached.
    pub(crate) fn bind(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        let id = cdev.bind(&self.iommufd)?;
        if let Kept::Two(standby) = &self.kept {
            standby.add(cdev, id);
        }
        Ok(())
    }

    /// Attaches a device that was bound here.
    pub(crate) fn attach(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        match &self.kept {
            Kept::One { ioas, .. } => cdev.attach(*ioas),
            Kept::Two(standby) => standby.attach(&self.iommufd, cdev),
        }
    }

    /// Detaches it: it is in no IOAS until it is attached again.
    pub(crate) fn detach(&self, cdev: &Arc<Cdev>) -> Result<(), Failed> {
        match &self.kept {
            Kept::One { .. } => cdev.detach(),
            Kept::Two(standby) => standby.detach(cdev),
        }
    }

    /// False where a replace that failed has left the device detached.
    pub(crate) fn is_attached(&self, cdev: &Arc<Cdev>) -> bool {
        match &self.kept {
            // Its devices never move.
            Kept::One { .. } => true,
            Kept::Two(standby) => standby.is_attached(cdev),
        }
    }
}

impl Domain for IommufdDomain {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn capabilities(&self) -> Capabilities {
        // iommufd counts memory, not mappings.
        Capabilities {
            max_mappings: u64::MAX,
            max_mapping_len: LIMIT,
            by_file: self.by_file,
            tickets: false,
            cut: matches!(self.kept, Kept::One { cuts: true, .. }),
            replace: matches!(self.kept, Kept::Two(_)),
            // Only the VFIO-compatible call writes the byte count on an error.
            counts_partial: matches!(self.kept, Kept::One { tells: true, .. }),
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
        match &self.kept {
            Kept::One { ioas, .. } => {
                pieces::map(iova, piece, offset, |iova, from| one(*ioas, iova, from), |made| self.unmap(made))
            }
            Kept::Two(standby) => standby.map(&self.iommufd, (iova, piece), offset, writable, one),
        }
    }

    /// On a kernel where the VFIO-compatible call was not found, a range without any mapping is
    /// [`Unmap::Failed`] with `ENOENT`: the kernel does not tell it from a cut.
    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let went = match &self.kept {
            Kept::One { tells: true, .. } => self.iommufd.cut(iova),
            Kept::One { ioas, .. } => self.iommufd.unmap(*ioas, iova),
            Kept::Two(standby) => return standby.unmap(&self.iommufd, iova),
        };
        match went {
            Ok(bytes) => Unmap::Gone { bytes },
            Err(Failed { errno, partial, .. }) => Unmap::Failed { errno, bytes: partial },
        }
    }

    fn usable(&self) -> Vec<RangeInclusive<Iova>> {
        let ioas = match &self.kept {
            Kept::One { ioas, .. } => *ioas,
            Kept::Two(standby) => standby.ioases()[0],
        };
        self.iommufd.iova_ranges(ioas).map(|found| found.ranges).unwrap_or_default()
    }

    fn leave(&self) -> io::Result<(Left, Ids)> {
        self.last()
    }

    /// A device that does not move, and a copy that is not made, is [`Unmap::Failed`]: `gone` may then be mapped
    /// as before, or only its pages pinned. A replace of the same ranges, or an unmap of the whole mappings that
    /// held them, takes away what is left, and answers for all of it.
    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        match &self.kept {
            Kept::One { .. } => Unmap::Failed { errno: Errno::NOSYS, bytes: 0 },
            Kept::Two(standby) => standby.replace(&self.iommufd, gone),
        }
    }
}

impl Drop for IommufdDomain {
    fn drop(&mut self) {
        match &self.kept {
            Kept::One { ioas, .. } => destroy(&self.iommufd, *ioas),
            Kept::Two(standby) => {
                standby.close(&self.iommufd);
                standby.ioases().iter().for_each(|ioas| destroy(&self.iommufd, *ioas));
            }
        }
    }
}

fn alloc(iommufd: &Iommufd) -> Result<IoasId> {
    iommufd.ioas_alloc().map_err(|failed| Error::Host {
        what: failed.to_string(),
        mend: match failed.errno {
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

/// Gives an empty IOAS small IOMMU pages, and keeps them if it can be cut then.
fn small(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let cuts = iommufd.set_huge_pages(ioas, false).is_ok() && probe::cuts(iommufd, ioas);
    if !cuts {
        log::info!("IOAS {}: this kernel does not cut mappings; its IOMMU pages are large", ioas.0);
        // Refused only where switching it off was: then they are large anyway.
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
    fn a_host_without_iommufd_is_told_so_in_one_line() {
        if std::path::Path::new("/dev/iommu").exists() {
            return; // machine.rs covers such a host
        }
        let error = IommufdDomain::open(Tables::default()).unwrap_err().to_string();
        assert!(error.starts_with("open /dev/iommu: No such file"), "{error}");
        assert!(error.contains("use --iommu type1") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_passed_file_that_is_no_iommufd_is_refused() {
        let memfd = GuestFile::memfd("not-iommu", PAGE).unwrap();
        let error = IommufdDomain::from_fd(memfd.as_fd().try_clone_to_owned().unwrap(), Tables::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("not an iommufd: pass an open /dev/iommu"), "{error}");
    }
}
