//! The descendants of a PCI device in sysfs: the devices of classes and buses that the kernel has registered below it.

use std::fs;
use std::path::{Path, PathBuf};

use super::{list_dir, read_optional, read_required, unreadable};

/// The maximum depth of directories that is searched. Those of USB are the deepest, with about thirty levels.
const MAX_DEPTH: usize = 64;

/// A device below the PCI device: a disk, a partition, a network interface, …
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// The directory in sysfs.
    pub(super) dir: PathBuf,
    /// The name of that directory.
    pub(super) name: String,
    /// The class or bus: the target of its link `subsystem`.
    pub(super) subsystem: String,
    /// The device file; none where it has none.
    pub(super) file: Option<DeviceFile>,
}

/// A device file, as sysfs describes it.
#[derive(Debug, Clone)]
pub(super) struct DeviceFile {
    /// The major and minor number.
    pub(super) number: (u32, u32),
    /// The path below `/dev`.
    pub(super) name: String,
}

/// All descendants of a device.
#[derive(Debug)]
pub(super) struct Descendants {
    entries: Vec<Entry>,
    /// The directories that contain network interfaces. One is empty if its interface is in another network namespace.
    pub(super) net_dirs: Vec<PathBuf>,
}

impl Descendants {
    /// Finds the descendants of the device at `dir`, a path without links. With native NVMe multipath the disks are in
    /// the directory of their NVMe subsystem; they count as descendants of every controller of that subsystem.
    pub(super) fn find(sysfs: &Path, dir: &Path) -> Result<Self, String> {
        let mut found = Self { entries: Vec::new(), net_dirs: Vec::new() };
        found.walk(dir, MAX_DEPTH)?;
        let subsystems = sysfs.join("class/nvme-subsystem");
        for name in list_dir(&subsystems)? {
            let path = subsystems.join(name);
            let path = fs::canonicalize(&path).map_err(|error| unreadable(&path, &error))?;
            // An entry that is removed meanwhile does not count.
            let is_this =
                |name: &String| fs::canonicalize(path.join(name)).is_ok_and(|to| to.starts_with(dir));
            if list_dir(&path)?.iter().any(is_this) {
                found.walk(&path, MAX_DEPTH)?;
            }
        }
        Ok(found)
    }

    /// Returns the entries of this class or bus.
    pub(super) fn of_subsystem<'a>(&'a self, subsystem: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.entries.iter().filter(move |entry| entry.subsystem == subsystem)
    }

    /// Returns the entries that have a device file.
    pub(super) fn with_device_file(&self) -> impl Iterator<Item = (&Entry, &DeviceFile)> {
        self.entries.iter().filter_map(|entry| Some((entry, entry.file.as_ref()?)))
    }

    fn walk(&mut self, dir: &Path, depth: usize) -> Result<(), String> {
        if depth == 0 {
            return Err(format!("whether it is used cannot be found out: {} goes too deep", dir.display()));
        }
        for name in list_dir(dir)? {
            let path = dir.join(&name);
            // Links are not followed: they lead to other devices, or up again.
            if !fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                continue;
            }
            if name == "net" {
                self.net_dirs.push(path.clone());
            }
            if let Ok(subsystem) = fs::read_link(path.join("subsystem")) {
                let subsystem = subsystem.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let file = device_file(&path, &name)?;
                self.entries.push(Entry { dir: path.clone(), name, subsystem, file });
            }
            self.walk(&path, depth - 1)?;
        }
        Ok(())
    }
}

/// Returns the device file of the entry at `dir`; none where it has none.
fn device_file(dir: &Path, name: &str) -> Result<Option<DeviceFile>, String> {
    let Some(number) = read_optional(&dir.join("dev"))? else { return Ok(None) };
    let parsed = number.trim().split_once(':').and_then(|(major, minor)| {
        let number = (major.parse().ok()?, minor.parse().ok()?);
        Some(number)
    });
    let Some(number) = parsed else {
        return Err(format!(
            "whether it is used cannot be found out: {} holds no number",
            dir.join("dev").display()
        ));
    };
    let event = read_required(&dir.join("uevent"))?;
    let named = event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or(name);
    Ok(Some(DeviceFile { number, name: named.to_owned() }))
}
