//! The kernel calls of a standby domain, as traits, so that its tests can inject a failure at any call.

use passgate_bindings::iommufd::{DeviceId, HwptId, IoasId, Iommufd};
use passgate_bindings::vfio::Cdev;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

/// The calls on an iommufd.
pub(super) trait Kernel {
    /// [`Iommufd::unmap`].
    fn unmap(&self, ioas: IoasId, iova: PageRange<Iova>) -> Result<u64, Errno>;

    /// [`Iommufd::copy`], to the same IOVA.
    fn copy(&self, from: IoasId, to: IoasId, iova: PageRange<Iova>, writable: bool) -> Result<(), Failed>;

    /// [`Iommufd::hwpt_alloc`].
    fn hwpt_alloc(&self, device: DeviceId, ioas: IoasId) -> Result<HwptId, Failed>;

    /// [`Iommufd::hwpt_destroy`].
    fn hwpt_destroy(&self, hwpt: HwptId) -> Result<(), Failed>;
}

impl Kernel for Iommufd {
    fn unmap(&self, ioas: IoasId, iova: PageRange<Iova>) -> Result<u64, Errno> {
        Iommufd::unmap(self, ioas, iova).map_err(|failed| failed.errno)
    }

    fn copy(&self, from: IoasId, to: IoasId, iova: PageRange<Iova>, writable: bool) -> Result<(), Failed> {
        Iommufd::copy(self, (from, iova), (to, iova.start()), writable)
    }

    fn hwpt_alloc(&self, device: DeviceId, ioas: IoasId) -> Result<HwptId, Failed> {
        Iommufd::hwpt_alloc(self, device, ioas)
    }

    fn hwpt_destroy(&self, hwpt: HwptId) -> Result<(), Failed> {
        Iommufd::hwpt_destroy(self, hwpt)
    }
}

/// The calls on a device.
pub(super) trait Movable {
    /// [`Cdev::attach`].
    fn attach(&self, to: HwptId) -> Result<(), Failed>;

    /// [`Cdev::detach`].
    fn detach(&self) -> Result<(), Failed>;
}

impl Movable for Cdev {
    fn attach(&self, to: HwptId) -> Result<(), Failed> {
        Cdev::attach(self, to)
    }

    fn detach(&self) -> Result<(), Failed> {
        Cdev::detach(self)
    }
}
