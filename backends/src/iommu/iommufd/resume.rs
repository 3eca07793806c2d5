//! An IOAS that an earlier process made, with its mappings live: taken over, not made anew.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::iommufd::{IoasId, Iommufd};
use rustix::io::Errno;

use super::{IommufdDomain, Kept};
use crate::resume::{Ids, Left};
use crate::{Error, Result};

const MEND: &str = "start without what the service manager keeps: stop the service for good, then start it";

impl IommufdDomain {
    /// Takes over the domain that an earlier process had in this iommufd, by its id there, which the kernel cannot
    /// list. Nothing is mapped, unmapped, attached or probed: what was probed then is in `ids`.
    pub fn resume(iommufd: OwnedFd, ids: Ids) -> Result<Arc<Self>> {
        let Ids::Iommufd { ioas, by_file, tells, cuts } = ids else {
            return Err(Error::Host { what: "the ledger is not of an iommufd".to_owned(), mend: MEND });
        };
        let (iommufd, ioas) = (Iommufd::from_fd(iommufd), IoasId(ioas));
        // An answer says that it is an iommufd, and that this is an IOAS of it.
        iommufd.iova_ranges(ioas).map_err(|failed| Error::Host {
            what: match failed.errno {
                Errno::NOTTY => "what was kept as the iommufd is none".to_owned(),
                Errno::NOENT => format!("the iommufd that was kept has no IOAS {}", ioas.0),
                _ => format!("IOAS {} of the iommufd that was kept: {failed}", ioas.0),
            },
            mend: MEND,
        })?;
        if tells {
            iommufd
                .set_compat_ioas(ioas)
                .map_err(|failed| Error::Host { what: failed.to_string(), mend: MEND })?;
        }
        // The pages stay pinned either way; only whose limit they count against is at stake.
        if let Err(failed) = iommufd.change_process() {
            log::warn!(
                "{failed}: pinned memory stays accounted to the process that is gone (guest_memfd is mapped by \
                 address, which the kernel cannot move; or it is older than Linux 6.14)"
            );
        }
        Ok(Arc::new(Self { kept: Kept::One { ioas, tells, cuts }, by_file, iommufd }))
    }

    /// What [`IommufdDomain::resume`] needs; nothing where there are two page tables, for which of them devices are in
    /// changes all the time.
    pub(super) fn last(&self) -> io::Result<(Left, Ids)> {
        let Kept::One { ioas, tells, cuts } = &self.kept else { return Ok((Left::default(), Ids::Nothing)) };
        let ids = Ids::Iommufd { ioas: ioas.0, by_file: self.by_file, tells: *tells, cuts: *cuts };
        let domain = Some(self.iommufd.as_fd().try_clone_to_owned()?);
        Ok((Left { domain, ..Left::default() }, ids))
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PAGE;
    use passgate_bindings::memory::GuestFile;

    use super::*;

    #[test]
    fn what_is_no_iommufd_or_of_another_domain_is_refused_in_one_line() {
        let file = || GuestFile::memfd("not-iommu", PAGE).unwrap().as_fd().try_clone_to_owned().unwrap();
        let ids = Ids::Iommufd { ioas: 1, by_file: true, tells: true, cuts: true };
        for (ids, says) in
            [(ids, "kept as the iommufd is none"), (Ids::Type1 { entries: 1 }, "not of an iommufd")]
        {
            let error = IommufdDomain::resume(file(), ids).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("stop the service for good"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
