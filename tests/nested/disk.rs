//! The drive from the other side: through the kernel's own driver, once nobody serves it to a guest.

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

/// A drive on the kernel's driver. When dropped it goes back to vfio-pci.
#[derive(Debug)]
pub struct Disk {
    drive: String,
    path: PathBuf,
}

impl Disk {
    /// Takes the drive to the kernel's driver.
    pub fn take(drive: &str) -> Self {
        bind(drive, "nvme");
        let name = wait("the kernel's disk", Duration::from_secs(30), || {
            let folder = format!("/sys/bus/pci/devices/{drive}/nvme");
            let controller = fs::read_dir(folder).ok()?.filter_map(Result::ok).next()?;
            let entries = fs::read_dir(controller.path()).ok()?.filter_map(Result::ok);
            let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            names.find(|name| name.starts_with("nvme") && fs::metadata(format!("/dev/{name}")).is_ok())
        });
        Self { drive: drive.to_owned(), path: PathBuf::from("/dev").join(name) }
    }

    /// The sum over the blocks that the guest says it has written, as the guest takes it.
    pub fn sum(&self, soaked: &Value) -> String {
        let disk = File::open(&self.path).unwrap();
        let (first, blocks) = (soaked["first"].as_u64().unwrap(), soaked["blocks"].as_u64().unwrap());
        let (mut block, mut total) = ([0; BLOCK], 0);
        for number in first..first + blocks {
            disk.read_exact_at(&mut block, number * BLOCK as u64).unwrap();
            total = sum(total, &block);
        }
        format!("{total:016x}")
    }

    /// Spoils a block, for a trial of the judge.
    pub fn spoil(&self, number: u64) {
        let disk = File::options().write(true).open(&self.path).unwrap();
        disk.write_all_at(&[0x5a; 512], number * BLOCK as u64).unwrap();
        disk.sync_all().unwrap();
    }

    /// Mounts the file system and reads these files, each by its name, its seed and its length.
    pub fn files(&self, listed: &[Value]) {
        let place = TempDir::new().unwrap();
        mount(&self.path, place.path(), "ext4", MountFlags::RDONLY, None).unwrap();
        for entry in listed {
            let (name, seed, len) =
                (entry[0].as_str().unwrap(), entry[1].as_u64().unwrap(), entry[2].as_u64().unwrap());
            let mut wanted = vec![0; len as usize];
            stream(&mut wanted, seed);
            let mut found = Vec::new();
            File::open(place.path().join(name)).unwrap().read_to_end(&mut found).unwrap();
            assert!(found == wanted, "{name} is not what the guest wrote");
        }
        unmount(place.path(), UnmountFlags::empty()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        bind(&self.drive, "vfio-pci");
    }
}

/// Gives a device to a driver.
fn bind(device: &str, driver: &str) {
    let folder = format!("/sys/bus/pci/devices/{device}");
    fs::write(format!("{folder}/driver_override"), driver).unwrap();
    if fs::metadata(format!("{folder}/driver")).is_ok() {
        fs::write(format!("{folder}/driver/unbind"), device).unwrap();
    }
    fs::write("/sys/bus/pci/drivers_probe", device).unwrap();
    let bound = fs::read_link(format!("{folder}/driver")).unwrap();
    assert_eq!(bound.file_name().unwrap(), driver, "{device} is not bound");
}
