//! VFIO (include/uapi/linux/vfio.h): the calls that the published crates lack or implement with loss of information.
//!
//! A device is opened by its own character device, which is bound to an iommufd ([`cdev`]), or by its group, which is put
//! into a type1 container ([`group`], [`container`]). Either yields the same kind of device file ([`device`]). Each file
//! can be opened here, or taken as a descriptor that another process opened and passed.
//!
//! The crate `vfio-ioctls` opens the cdev and the container; docs/decisions/0003-vfio-ioctls.md gives the reason why it
//! does no more.

pub mod cdev;
pub mod config;
pub mod container;
pub mod device;
pub mod group;
pub mod mapped;
pub mod migration;
pub mod pci;

pub use cdev::Cdev;
pub use container::Container;
pub use device::DeviceFile;
pub use group::Group;
pub use migration::MigrationState;
pub use pci::PciAddress;

/// The ioctl numbers: `_IO(VFIO_TYPE, VFIO_BASE + n)`. The structures carry their size.
#[allow(missing_docs)] // each has the header's name without VFIO_
pub(crate) mod number {
    use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
    use vmm_sys_util::ioctl_io_nr;

    ioctl_io_nr!(SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
    ioctl_io_nr!(GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
    ioctl_io_nr!(GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
    ioctl_io_nr!(GROUP_UNSET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 5);
    ioctl_io_nr!(GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
    ioctl_io_nr!(DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
    ioctl_io_nr!(DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
    ioctl_io_nr!(DEVICE_GET_IRQ_INFO, VFIO_TYPE as u32, VFIO_BASE + 9);
    ioctl_io_nr!(DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
    ioctl_io_nr!(DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
    ioctl_io_nr!(IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
    ioctl_io_nr!(IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
    ioctl_io_nr!(IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);
    ioctl_io_nr!(DEVICE_FEATURE, VFIO_TYPE as u32, VFIO_BASE + 17);
    ioctl_io_nr!(DEVICE_BIND_IOMMUFD, VFIO_TYPE as u32, VFIO_BASE + 18);
    ioctl_io_nr!(DEVICE_ATTACH_IOMMUFD_PT, VFIO_TYPE as u32, VFIO_BASE + 19);
    ioctl_io_nr!(DEVICE_DETACH_IOMMUFD_PT, VFIO_TYPE as u32, VFIO_BASE + 20);

    #[cfg(test)]
    mod tests {
        #[test]
        fn ioctl_numbers_match_the_header() {
            assert_eq!(super::SET_IOMMU(), 0x3b66);
            assert_eq!(super::IOMMU_UNMAP_DMA(), 0x3b72);
            assert_eq!(super::DEVICE_RESET(), 0x3b6f);
            assert_eq!(super::DEVICE_DETACH_IOMMUFD_PT(), 0x3b78);
        }
    }
}
