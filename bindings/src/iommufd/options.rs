//! Options of an iommufd and its IOASes (`IOMMU_OPTION`, include/uapi/linux/iommufd.h).

use iommufd_bindings as uapi;

use super::{IoasId, Iommufd, size};
use crate::Failed;

/// The accounting of pinned pages against `RLIMIT_MEMLOCK` (`IOMMU_OPTION_RLIMIT_MODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RlimitMode {
    /// Per user, summed over all processes; the kernel's default.
    User,
    /// Per process, as in type1.
    Process,
}

impl Iommufd {
    /// Returns true where the IOAS may combine pages into larger IOMMU pages (`IOMMU_OPTION_HUGE_PAGES`), which is the
    /// default.
    pub fn huge_pages(&self, ioas: IoasId) -> Result<bool, Failed> {
        self.option(
            uapi::iommufd_option_IOMMU_OPTION_HUGE_PAGES,
            uapi::iommufd_option_ops_IOMMU_OPTION_OP_GET,
            ioas.0,
            0,
        )
        .map(|value| value != 0)
    }

    /// Sets the option of [`Iommufd::huge_pages`]. `EINVAL` once a device is attached and memory is mapped.
    pub fn set_huge_pages(&self, ioas: IoasId, on: bool) -> Result<(), Failed> {
        self.option(
            uapi::iommufd_option_IOMMU_OPTION_HUGE_PAGES,
            uapi::iommufd_option_ops_IOMMU_OPTION_OP_SET,
            ioas.0,
            u64::from(on),
        )
        .map(drop)
    }

    /// Sets the accounting of pinned pages (`IOMMU_OPTION_RLIMIT_MODE`). `EPERM` without CAP_SYS_RESOURCE, `EINVAL` once the
    /// iommufd contains an object.
    pub fn set_rlimit_mode(&self, mode: RlimitMode) -> Result<(), Failed> {
        self.option(
            uapi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE,
            uapi::iommufd_option_ops_IOMMU_OPTION_OP_SET,
            0,
            u64::from(mode == RlimitMode::Process),
        )
        .map(drop)
    }

    fn option(&self, option: u32, op: u32, object: u32, value: u64) -> Result<u64, Failed> {
        let mut arg = uapi::iommu_option {
            size: size::<uapi::iommu_option>(),
            option_id: option,
            op: op as u16, // enum iommufd_option_ops, 0 or 1
            object_id: object,
            val64: value,
            ..Default::default()
        };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_OPTION", uapi::IOMMUFD_CMD_OPTION, &mut arg) }?;
        Ok(arg.val64)
    }
}
