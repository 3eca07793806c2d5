//! A sysfs and a procfs in a directory, for tests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

/// A directory that is a sysfs. The procfs is `proc` in it; this process is in the initial PID namespace there.
pub(crate) struct FakeTree(TempDir);

impl FakeTree {
    pub(crate) fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(tree.path().join("proc/1")).unwrap();
        let own = std::process::id().to_string();
        tree.link("proc/self", &own);
        tree.link(&format!("proc/{own}/ns/pid"), "pid:[4026531836]");
        tree
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn link(&self, name: &str, target: &str) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.path().join(name)).unwrap();
    }

    pub(crate) fn replace_link(&self, name: &str, target: &str) {
        self.remove(name);
        self.link(name, target);
    }

    /// Adds a device 1b36:0010 of this class, without a configuration space.
    pub(crate) fn device(&self, address: &str, class: u32, driver: Option<&str>, group: Option<u32>) {
        let dir = format!("bus/pci/devices/{address}");
        self.write(&format!("{dir}/class"), format!("{class:#08x}\n"));
        self.write(&format!("{dir}/vendor"), "0x1b36\n");
        self.write(&format!("{dir}/device"), "0x0010\n");
        if let Some(driver) = driver {
            self.link(&format!("{dir}/driver"), &format!("../drivers/{driver}"));
        }
        if let Some(group) = group {
            let at = self.path().join(format!("kernel/iommu_groups/{group}"));
            fs::create_dir_all(at.join("devices").join(address)).unwrap();
            self.link(&format!("{dir}/iommu_group"), at.to_str().unwrap());
        }
    }

    /// Gives the device a configuration space: PCI Express, with ATS on or off and PRI off.
    pub(crate) fn endpoint(&self, address: &str, ats: bool) {
        let mut bytes = vec![0; 4096];
        let mut set = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        set(4, 1 << 20); // Status: Capabilities List
        set(0x34, 0x40); // Capabilities Pointer
        set(0x40, 0x0010); // PCI Express Capability
        set(0x100, 0x000f | 1 << 16 | 0x120 << 20); // ATS Extended Capability
        set(0x104, u32::from(ats) << 31); // ATS Control: Enable
        set(0x120, 0x0013 | 1 << 16); // Page Request Extended Capability
        self.write(&format!("bus/pci/devices/{address}/config"), bytes);
    }

    /// Gives the device the configuration space of conventional PCI, without capabilities.
    pub(crate) fn conventional(&self, address: &str) {
        self.write(&format!("bus/pci/devices/{address}/config"), [0; 256]);
    }
}
