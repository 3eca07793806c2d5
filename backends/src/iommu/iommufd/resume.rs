//! Taking over an IOAS that an earlier process made, with its mappings live.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::iommufd::{IoasId, Iommufd};
use rustix::io::Errno;

use super::{IoasSetup, IommufdDomain};
use crate::handover::{DomainIds, Handover};
use crate::{Error, Result};

const REMEDY: &str = "start without what the service manager has: stop the service for good, then start it";

impl IommufdDomain {
    /// Takes over the IOAS that an earlier process made in this iommufd. Nothing is mapped, unmapped, attached or
    /// probed: the object id, which the kernel does not list, and the results of the probes are in `ids`.
    pub fn resume(iommufd: OwnedFd, ids: DomainIds) -> Result<Arc<Self>> {
        let DomainIds::Iommufd { ioas, by_file, compat_unmap, cuts } = ids else {
            return Err(Error::Host { what: "the ledger is not of an iommufd".to_owned(), remedy: REMEDY });
        };
        let (iommufd, ioas) = (Iommufd::from_fd(iommufd), IoasId(ioas));
        // Succeeds only if the file is an iommufd and the IOAS exists in it.
        iommufd.iova_ranges(ioas).map_err(|failed| Error::Host {
            what: match failed.errno {
                Errno::NOTTY => "what was kept as the iommufd is none".to_owned(),
                Errno::NOENT => format!("the stored iommufd has no IOAS {}", ioas.0),
                _ => format!("IOAS {} of the stored iommufd: {failed}", ioas.0),
            },
            remedy: REMEDY,
        })?;
        if compat_unmap {
            iommufd
                .set_compat_ioas(ioas)
                .map_err(|failed| Error::Host { what: failed.to_string(), remedy: REMEDY })?;
        }
        // This only moves the accounting (RLIMIT_MEMLOCK) to this process. The pages stay pinned if it fails.
        if let Err(failed) = iommufd.change_process() {
            log::warn!(
                "{failed}: pinned memory stays accounted to the process that is gone (guest_memfd is mapped by \
                 address, which the kernel cannot move; or it is older than Linux 6.14)"
            );
        }
        let setup = IoasSetup::Single { ioas, compat_unmap, cuts };
        Ok(Arc::new(Self { setup, by_file, iommufd }))
    }

    /// Returns what [`IommufdDomain::resume`] needs; [`DomainIds::Nothing`] for a domain with two page tables, because no
    /// record states reliably which of them devices are attached to.
    pub(super) fn hand_over(&self) -> io::Result<(Handover, DomainIds)> {
        let IoasSetup::Single { ioas, compat_unmap, cuts } = &self.setup else {
            return Ok((Handover::default(), DomainIds::Nothing));
        };
        let (by_file, compat_unmap, cuts) = (self.by_file, *compat_unmap, *cuts);
        let ids = DomainIds::Iommufd { ioas: ioas.0, by_file, compat_unmap, cuts };
        let domain = Some(self.iommufd.as_fd().try_clone_to_owned()?);
        Ok((Handover { domain, ..Handover::default() }, ids))
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PAGE;
    use passgate_bindings::memory::GuestFile;

    use super::*;

    #[test]
    fn resume_with_another_file_or_other_ids_is_refused_in_one_line() {
        let file = || GuestFile::memfd("not-iommu", PAGE).unwrap().as_fd().try_clone_to_owned().unwrap();
        let ids = DomainIds::Iommufd { ioas: 1, by_file: true, compat_unmap: true, cuts: true };
        for (ids, says) in
            [(ids, "kept as the iommufd is none"), (DomainIds::Type1 { entries: 1 }, "not of an iommufd")]
        {
            let error = IommufdDomain::resume(file(), ids).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("stop the service for good"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
