//! A host with one device, for tests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{Host, claim};
use crate::host::inventory::fake::FakeTree;

pub(super) const ADDRESS: &str = "0000:04:00.0";

/// A directory with sysfs in `sys`, procfs in `proc`, and device files in `dev`.
pub(super) struct FakeHost(FakeTree);

impl FakeHost {
    pub(super) fn new() -> Self {
        let fake = Self(FakeTree::new());
        for dir in [&fake.device(), &fake.sysfs().join("bus/pci/devices"), &fake.dev()] {
            fs::create_dir_all(dir).unwrap();
        }
        symlink(fake.device(), fake.sysfs().join("bus/pci/devices").join(ADDRESS)).unwrap();
        fake.mounts("");
        fake
    }

    pub(super) fn sysfs(&self) -> PathBuf {
        self.0.path().join("sys")
    }

    pub(super) fn proc(&self) -> PathBuf {
        self.0.path().join("proc")
    }

    pub(super) fn dev(&self) -> PathBuf {
        self.0.path().join("dev")
    }

    pub(super) fn device(&self) -> PathBuf {
        self.sysfs().join("devices/pci0000:00").join(ADDRESS)
    }

    /// Adds an entry of this class, at `path` below the device.
    pub(super) fn entry(&self, class: &str, path: &str, number: Option<&str>) -> PathBuf {
        self.make(class, &self.device().join(path), number)
    }

    /// As [`FakeHost::entry`], below no device.
    pub(super) fn elsewhere(&self, class: &str, path: &str, number: Option<&str>) -> PathBuf {
        self.make(class, &self.sysfs().join("devices/virtual").join(path), number)
    }

    fn make(&self, class: &str, dir: &Path, number: Option<&str>) -> PathBuf {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let of_class = self.sysfs().join("class").join(class);
        fs::create_dir_all(dir).unwrap();
        fs::create_dir_all(&of_class).unwrap();
        symlink(&of_class, dir.join("subsystem")).unwrap();
        symlink(dir, of_class.join(name)).unwrap();
        if let Some(number) = number {
            fs::write(dir.join("dev"), format!("{number}\n")).unwrap();
            fs::write(dir.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\n")).unwrap();
        }
        dir.to_owned()
    }

    /// Writes a file below the device.
    pub(super) fn write(&self, path: &str, text: &str) {
        fs::write(self.device().join(path), text).unwrap();
    }

    pub(super) fn link_node(&self, name: &str, to: &str) {
        symlink(to, self.dev().join(name)).unwrap();
    }

    fn own(&self) -> PathBuf {
        self.proc().join(std::process::id().to_string())
    }

    pub(super) fn mounts(&self, text: &str) {
        fs::write(self.own().join("mountinfo"), text).unwrap();
    }

    pub(super) fn remove_mounts(&self) {
        fs::remove_file(self.own().join("mountinfo")).unwrap();
    }

    pub(super) fn net(&self, list: &str, text: &str) {
        fs::create_dir_all(self.own().join("net")).unwrap();
        fs::write(self.own().join("net").join(list), text).unwrap();
    }

    pub(super) fn leave_initial_pid_namespace(&self) {
        let own = format!("proc/{}/ns/pid", std::process::id());
        self.0.replace_link(&own, "pid:[4026532201]");
    }

    /// Returns the error of a claim: who uses the device.
    pub(super) fn user(&self) -> Option<String> {
        let (sysfs, proc, dev) = (self.sysfs(), self.proc(), self.dev());
        claim(Host { sysfs: &sysfs, proc: &proc, dev: &dev }, ADDRESS.parse().unwrap()).err()
    }
}
