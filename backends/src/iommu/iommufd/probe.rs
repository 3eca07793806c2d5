//! Probes of the kernel's capabilities on an IOAS. Each one makes the call while no device is attached, so that nothing
//! is pinned.

use std::sync::Arc;

use passgate_bindings::iommufd::{IoasId, Iommufd};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use rustix::io::Errno;

/// Returns true if the kernel maps by file (`IOMMU_IOAS_MAP_FILE`, Linux 6.14).
pub(super) fn maps_files(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let Ok(page) = PageRange::new(0, PAGE) else { return false };
    let Ok(file) = GuestFile::memfd("passgate-probe", PAGE) else { return false };
    iommufd.map_file(ioas, page, &file, Offset(0), false).is_ok() && iommufd.unmap(ioas, page) == Ok(PAGE)
}

/// Returns true if the VFIO-compatible unmap works on this IOAS and returns 0 bytes where nothing is mapped. An iommufd
/// that has a compatibility IOAS already is not changed.
pub(super) fn compat_unmap(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let unset = iommufd.compat_ioas().is_err_and(|failed| failed.errno == Errno::NODEV);
    let Ok(page) = PageRange::new(0, PAGE) else { return false };
    unset && iommufd.set_compat_ioas(ioas).is_ok() && iommufd.cut(page) == Ok(0)
}

/// Returns true if that unmap also cuts mappings; tried by cutting off the second of two pages. The IOAS must have
/// small IOMMU pages and [`compat_unmap`].
pub(super) fn cuts(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE);
    let (Ok(both), Ok(second)) = (range(0, 2), range(1, 1)) else { return false };
    let Ok(file) = GuestFile::memfd("passgate-probe", both.len()).map(Arc::new) else { return false };
    if iommufd.map(ioas, both, &file, Offset(0), false).is_err() {
        return false;
    }
    let cut = iommufd.cut(second) == Ok(PAGE);
    // Removes what the probe has mapped, whether or not the cut worked.
    let rest = iommufd.cut(both);
    cut && rest == Ok(PAGE)
}
