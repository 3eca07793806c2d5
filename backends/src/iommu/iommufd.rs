//! The iommufd domain: one IOAS, for devices by their cdev. Linux 6.6 and later.
//!
//! Memfd and hugetlbfs are mapped by file where the kernel can; guest_memfd, which it cannot, by address. An
//! unmap uses the VFIO-compatible call where probed, because that one alone tells "nothing was there" from "this
//! would cut a mapping", and says what it had removed when it fails half-way. The seam for cutting mappings in
//! place is the same call: it needs small IOMMU pages, which this domain does not ask for.

mod resume;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use passgate_bindings::iommufd::{IoasId, Iommufd};
use passgate_bindings::memory::{FileKind, GuestFile};
use passgate_bindings::units::{LIMIT, Offset};
use passgate_bindings::{Failed, Iova, PAGE, PageRange};
use rustix::io::Errno;

use super::{Capabilities, Domain, Unmap, pieces};
use crate::resume::{Ids, Left};
use crate::{Error, Result};

/// An IOAS and the iommufd that owns it.
///
/// Devices hold this domain, so they detach and close before it goes; then the IOAS is destroyed, and the
/// iommufd closes last.
#[derive(Debug)]
pub struct IommufdDomain {
    ioas: IoasId,
    by_file: bool,
    tells: bool,
    iommufd: Iommufd,
}

impl IommufdDomain {
    /// Opens `/dev/iommu` and makes a domain there.
    pub fn open() -> Result<Arc<Self>> {
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
        Self::new(iommufd)
    }

    /// Makes a domain in an iommufd that somebody with the right to open one has passed.
    pub fn from_fd(fd: OwnedFd) -> Result<Arc<Self>> {
        Self::new(Iommufd::from_fd(fd))
    }

    fn new(iommufd: Iommufd) -> Result<Arc<Self>> {
        let ioas = iommufd.ioas_alloc().map_err(|failed| Error::Host {
            what: failed.to_string(),
            mend: match failed.errno {
                Errno::NOTTY => "the file passed is not an iommufd: pass an open /dev/iommu",
                _ => "see dmesg",
            },
        })?;
        let (by_file, tells) = (maps_files(&iommufd, ioas), tells(&iommufd, ioas));
        Ok(Arc::new(Self { ioas, by_file, tells, iommufd }))
    }

    /// The iommufd, for devices to be bound to.
    pub fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }

    /// The IOAS, for devices to be attached to.
    pub fn ioas(&self) -> IoasId {
        self.ioas
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
            cut: false,
            replace: false,
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
        let one = |iova, offset| {
            if by_file {
                self.iommufd.map_file(self.ioas, iova, file, offset, writable)
            } else {
                self.iommufd.map(self.ioas, iova, file, offset, writable)
            }
        };
        pieces::map(iova, piece, offset, one, |made| self.unmap(made))
    }

    /// On a kernel where the VFIO-compatible call was not found, a range without any mapping is
    /// [`Unmap::Failed`] with `ENOENT`: the kernel does not tell it from a cut.
    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let went = if self.tells { self.iommufd.cut(iova) } else { self.iommufd.unmap(self.ioas, iova) };
        match went {
            Ok(bytes) => Unmap::Gone { bytes },
            Err(Failed { errno, partial, .. }) => Unmap::Failed { errno, bytes: partial },
        }
    }

    fn leave(&self) -> io::Result<(Left, Ids)> {
        self.last()
    }
}

impl Drop for IommufdDomain {
    fn drop(&mut self) {
        if let Err(failed) = self.iommufd.ioas_destroy(self.ioas) {
            log::warn!("IOAS {}: {failed}; its mappings stay until the iommufd closes", self.ioas.0);
        }
    }
}

/// Whether the kernel maps by file (Linux 6.14): by mapping a page of a memfd where no device is attached, which
/// pins nothing.
fn maps_files(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let Ok(page) = PageRange::new(0, PAGE) else { return false };
    let Ok(file) = GuestFile::memfd("passgate-probe", PAGE) else { return false };
    iommufd.map_file(ioas, page, &file, Offset(0), false).is_ok() && iommufd.unmap(ioas, page) == Ok(PAGE)
}

/// Whether the VFIO-compatible unmap works on this IOAS and answers 0 where nothing is mapped. An iommufd whose
/// compatibility IOAS is somebody else's is left alone.
fn tells(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let unset = iommufd.compat_ioas().is_err_and(|failed| failed.errno == Errno::NODEV);
    let Ok(page) = PageRange::new(0, PAGE) else { return false };
    unset && iommufd.set_compat_ioas(ioas).is_ok() && iommufd.cut(page) == Ok(0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_host_without_iommufd_is_told_so_in_one_line() {
        if std::path::Path::new("/dev/iommu").exists() {
            return; // machine.rs covers such a host
        }
        let error = IommufdDomain::open().unwrap_err().to_string();
        assert!(error.starts_with("open /dev/iommu: No such file"), "{error}");
        assert!(error.contains("use --iommu type1") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_passed_file_that_is_no_iommufd_is_refused() {
        let memfd = GuestFile::memfd("not-iommu", PAGE).unwrap();
        let error =
            IommufdDomain::from_fd(memfd.as_fd().try_clone_to_owned().unwrap()).unwrap_err().to_string();
        assert!(error.contains("not an iommufd: pass an open /dev/iommu"), "{error}");
    }
}
