//! Page tables by name: what a device is attached to.

use iommufd_bindings as uapi;

use super::{IoasId, Iommufd, size};
use crate::Failed;

/// Names a device that is bound to an iommufd, within that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// Names an HWPT, the page table of one IOMMU that the kernel keeps filled with what an IOAS maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HwptId(pub u32);

/// What a device can be attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageTable {
    /// An IOAS: the kernel finds or makes an HWPT of it, and takes that away with the last device that leaves.
    Ioas(IoasId),
    /// An HWPT that was allocated explicitly, and stays without a device.
    Hwpt(HwptId),
}

impl PageTable {
    /// The number of the object.
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
    /// A page table for `device`, and for others that its IOMMU can give it to, filled with what `ioas` maps now
    /// and from now on, whether or not a device is attached (`IOMMU_HWPT_ALLOC`, Linux 6.7). The time that it
    /// takes grows with the bytes mapped.
    pub fn hwpt_alloc(&self, device: DeviceId, ioas: IoasId) -> Result<HwptId, Failed> {
        let mut arg = uapi::iommu_hwpt_alloc {
            size: size::<uapi::iommu_hwpt_alloc>(),
            dev_id: device.0,
            pt_id: ioas.0,
            ..Default::default()
        };
        // SAFETY: the call's own structure; with a data length of 0 its one pointer is not looked at.
        unsafe { self.call("IOMMU_HWPT_ALLOC", uapi::IOMMUFD_CMD_HWPT_ALLOC, &mut arg) }?;
        Ok(HwptId(arg.out_hwpt_id))
    }

    /// Destroys a page table that no device is attached to (`IOMMU_DESTROY`). What its IOAS maps stays mapped
    /// there.
    pub fn hwpt_destroy(&self, hwpt: HwptId) -> Result<(), Failed> {
        let mut arg = uapi::iommu_destroy { size: size::<uapi::iommu_destroy>(), id: hwpt.0 };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_DESTROY", uapi::IOMMUFD_CMD_DESTROY, &mut arg) }
    }
}
