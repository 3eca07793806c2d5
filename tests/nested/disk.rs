//! The drive through the kernel's own driver, once no back-end serves it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use tempfile::TempDir;

use super::pattern::{BLOCK, stream, sum};
use super::wait;

/// A drive that is bound to the kernel's driver. Dropping it binds it to vfio-pci again.
#[derive(Debug)]
pub struct Disk {
    drive: String,
    path: PathBuf,
}

impl Disk {
    /// Binds the drive to the kernel's driver, and waits for its block device.
    pub fn bind(drive: &str) -> Self {
        bind_driver(drive, "nvme");
        let name = wait("the kernel's disk", Duration::from_secs(30), || {
            let directory = format!("/sys/bus/pci/devices/{drive}/nvme");
            let controller = fs::read_dir(directory).ok()?.filter_map(Result::ok).next()?;
            let entries = fs::read_dir(controller.path()).ok()?.filter_map(Result::ok);
            let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            names.find(|name| name.starts_with("nvme") && fs::metadata(format!("/dev/{name}")).is_ok())
        });
        Self { drive: drive.to_owned(), path: PathBuf::from("/dev").join(name) }
    }

    /// Returns the checksum over the blocks that the guest reports as written, computed as the guest does.
    pub fn checksum(&self, soaked: &Value) -> String {
        let disk = File::open(&self.path).unwrap();
        let (first, blocks) = (soaked["first"].as_u64().unwrap(), soaked["blocks"].as_u64().unwrap());
        let (mut block, mut total) = ([0; BLOCK], 0);
        for number in first..first + blocks {
            disk.read_exact_at(&mut block, number * BLOCK as u64).unwrap();
            total = sum(total, &block);
        }
        format!("{total:016x}")
    }

    /// Corrupts a block, to test the verification.
    pub fn corrupt_block(&self, number: u64) {
        let disk = File::options().write(true).open(&self.path).unwrap();
        disk.write_all_at(&[0x5a; 512], number * BLOCK as u64).unwrap();
        disk.sync_all().unwrap();
    }

    /// Mounts the file system and verifies these files, each given by its name, its seed and its length.
    pub fn verify_files(&self, listed: &[Value]) {
        let mount_dir = TempDir::new().unwrap();
        mount(&self.path, mount_dir.path(), "ext4", MountFlags::RDONLY, None).unwrap();
        for entry in listed {
            let (name, seed, len) =
                (entry[0].as_str().unwrap(), entry[1].as_u64().unwrap(), entry[2].as_u64().unwrap());
            let mut expected = vec![0; len as usize];
            stream(&mut expected, seed);
            let mut found = Vec::new();
            File::open(mount_dir.path().join(name)).unwrap().read_to_end(&mut found).unwrap();
            assert!(found == expected, "{name} is not what the guest wrote");
        }
        unmount(mount_dir.path(), UnmountFlags::empty()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        bind_driver(&self.drive, "vfio-pci");
    }
}

/// Binds a device to a driver.
fn bind_driver(device: &str, driver: &str) {
    let directory = format!("/sys/bus/pci/devices/{device}");
    fs::write(format!("{directory}/driver_override"), driver).unwrap();
    if fs::metadata(format!("{directory}/driver")).is_ok() {
        fs::write(format!("{directory}/driver/unbind"), device).unwrap();
    }
    fs::write("/sys/bus/pci/drivers_probe", device).unwrap();
    let bound = fs::read_link(format!("{directory}/driver")).unwrap();
    assert_eq!(bound.file_name().unwrap(), driver, "{device} is not bound");
}
