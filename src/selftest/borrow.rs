//! A device that is taken from its driver for a while, and given back.

use std::fs;
use std::path::{Path, PathBuf};

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::PciDevice;

use crate::error::{Error, Result};

const VFIO: &str = "vfio-pci";

/// A device that is bound to vfio-pci until dropped, and then to what it was bound to before.
#[derive(Debug)]
pub(super) struct Borrowed {
    sysfs: PathBuf,
    address: PciAddress,
    /// Whose it was; none where it was vfio-pci's already.
    from: Option<Option<String>>,
}

impl Borrowed {
    pub(super) fn take(sysfs: &Path, address: PciAddress) -> Result<Self> {
        let driver = PciDevice::find(sysfs, address).and_then(|device| device.driver());
        let mut borrowed = Self { sysfs: sysfs.to_owned(), address, from: None };
        if driver.as_deref().is_some_and(|driver| driver.contains("vfio")) {
            return Ok(borrowed);
        }
        borrowed.from = Some(driver);
        borrowed.bind(VFIO)?;
        Ok(borrowed)
    }

    /// Binds the device to the driver that `choice` overrides to; an empty one lets the kernel choose.
    fn bind(&self, choice: &str) -> Result<()> {
        let device = self.sysfs.join("bus/pci/devices").join(self.address.to_string());
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, format!("{text}\n")).map_err(|source| Error::Sysfs { path, source })
        };
        write(device.join("driver_override"), choice)?;
        if device.join("driver").exists() {
            write(device.join("driver/unbind"), &self.address.to_string())?;
        }
        write(self.sysfs.join("bus/pci/drivers_probe"), &self.address.to_string())
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if self.from.is_some()
            && let Err(error) = self.bind("")
        {
            log::error!("{} was not given back to {:?}: {error}", self.address, self.from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_bound_to_vfio_and_given_back() {
        let sysfs = tempfile::tempdir().unwrap();
        let address: PciAddress = "0000:04:00.0".parse().unwrap();
        let device = sysfs.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(sysfs.path().join("bus/pci/drivers/nvme")).unwrap();
        fs::create_dir_all(&device).unwrap();
        std::os::unix::fs::symlink(sysfs.path().join("bus/pci/drivers/nvme"), device.join("driver")).unwrap();
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        let borrowed = Borrowed::take(sysfs.path(), address).unwrap();
        assert_eq!(read(device.join("driver_override")), "vfio-pci\n");
        assert_eq!(read(device.join("driver/unbind")), "0000:04:00.0\n");
        assert_eq!(read(sysfs.path().join("bus/pci/drivers_probe")), "0000:04:00.0\n");
        drop(borrowed);
        assert_eq!(read(device.join("driver_override")), "\n");
    }

    #[test]
    fn what_is_vfios_already_is_left_alone() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(sysfs.path().join("bus/pci/drivers/vfio-pci")).unwrap();
        fs::create_dir_all(&device).unwrap();
        std::os::unix::fs::symlink(sysfs.path().join("bus/pci/drivers/vfio-pci"), device.join("driver"))
            .unwrap();
        drop(Borrowed::take(sysfs.path(), "04:00.0".parse().unwrap()).unwrap());
        assert!(!device.join("driver_override").exists());
    }
}
