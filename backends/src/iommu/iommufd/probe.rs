//! What the kernel does for an IOAS, found by doing it where no device is attached, which pins nothing.

use std::sync::Arc;

use passgate_bindings::iommufd::{IoasId, Iommufd};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use rustix::io::Errno;

/// Whether the kernel maps by file (Linux 6.14).
pub(super) fn maps_files(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let Ok(page) = PageRange::new(0, PAGE) else { return false };
    let Ok(file) = GuestFile::memfd("passgate-probe", PAGE) else { return false };
    iommufd.map_file(ioas, page, &file, Offset(0), false).is_ok() && iommufd.unmap(ioas, page) == Ok(PAGE)
}

/// Whether the VFIO-compatible unmap works on this IOAS and answers 0 where nothing is mapped. An iommufd whose
/// compatibility IOAS is somebody else's is left alone.
pub(super) fn tells(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let unset = iommufd.compat_ioas().is_err_and(|failed| failed.errno == Errno::NODEV);
    let Ok(page) = PageRange::new(0, PAGE) else { return false };
    unset && iommufd.set_compat_ioas(ioas).is_ok() && iommufd.cut(page) == Ok(0)
}

/// Whether that unmap also cuts mappings: by cutting the second of two pages off. The IOAS has small IOMMU pages
/// and [`tells`].
pub(super) fn cuts(iommufd: &Iommufd, ioas: IoasId) -> bool {
    let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE);
    let (Ok(both), Ok(second)) = (range(0, 2), range(1, 1)) else { return false };
    let Ok(file) = GuestFile::memfd("passgate-probe", both.len()).map(Arc::new) else { return false };
    if iommufd.map(ioas, both, &file, Offset(0), false).is_err() {
        return false;
    }
    let cut = iommufd.cut(second) == Ok(PAGE);
    // Whatever came of that, nothing is left of the probe.
    let rest = iommufd.cut(both);
    cut && rest == Ok(PAGE)
}
