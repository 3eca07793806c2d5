//! Hardware page tables (HWPT) and the ids of the objects that a device can be attached to.

use iommufd_bindings as uapi;

use super::{IoasId, Iommufd, size};
use crate::Failed;

/// The id of a device within the iommufd that it is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// The id of an HWPT: an IOMMU page table in which the kernel keeps all mappings of an IOAS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HwptId(pub u32);

/// The object that a device is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageTable {
    /// An IOAS: the kernel finds or allocates an HWPT for it, and destroys that when its last device is detached.
    Ioas(IoasId),
    /// An HWPT that was allocated explicitly; it stays when no device is attached.
    Hwpt(HwptId),
}

impl PageTable {
    /// Returns the object's id.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::Ioas(IoasId(id)) | Self::Hwpt(HwptId(id)) => id,
        }
    }
}

impl From<IoasId> for PageTable {
    fn from(ioas: IoasId) -> Self {
        Self::Ioas(ioas)
    }
}

impl From<HwptId> for PageTable {
    fn from(hwpt: HwptId) -> Self {
        Self::Hwpt(hwpt)
    }
}

impl Iommufd {
    /// Allocates an HWPT for `device`, which other devices of a compatible IOMMU can share (`IOMMU_HWPT_ALLOC`, Linux 6.7).
    /// The kernel fills it with all mappings of `ioas` and keeps it up to date, also while no device is attached. Takes
    /// time in proportion to the mapped bytes.
    pub fn hwpt_alloc(&self, device: DeviceId, ioas: IoasId) -> Result<HwptId, Failed> {
        let mut arg = uapi::iommu_hwpt_alloc {
            size: size::<uapi::iommu_hwpt_alloc>(),
            dev_id: device.0,
            pt_id: ioas.0,
            ..Default::default()
        };
        // SAFETY: the call's own structure; with a data length of 0 the kernel does not use its one pointer.
        unsafe { self.call("IOMMU_HWPT_ALLOC", uapi::IOMMUFD_CMD_HWPT_ALLOC, &mut arg) }?;
        Ok(HwptId(arg.out_hwpt_id))
    }

    /// Destroys an HWPT, to which no device is attached (`IOMMU_DESTROY`). The mappings of its IOAS are not affected.
    pub fn hwpt_destroy(&self, hwpt: HwptId) -> Result<(), Failed> {
        let mut arg = uapi::iommu_destroy { size: size::<uapi::iommu_destroy>(), id: hwpt.0 };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_DESTROY", uapi::IOMMUFD_CMD_DESTROY, &mut arg) }
    }
}
