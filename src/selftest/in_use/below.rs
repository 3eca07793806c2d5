//! Everything that the kernel made of a device: the entries of device classes below it in sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use super::{names, text, text_of, unknown};

/// Levels of directories that are walked at most: USB's are the deepest, with some thirty.
const MAX_DEPTH: usize = 64;

/// A device of a class: a disk, a partition, a network interface, a device file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Its directory in sysfs.
    pub(super) dir: PathBuf,
    /// Its name there.
    pub(super) name: String,
    /// Its class or bus.
    pub(super) subsystem: String,
    /// Its device file, where it has one.
    pub(super) file: Option<DeviceFile>,
}

/// A device file.
#[derive(Debug, Clone)]
pub(super) struct DeviceFile {
    /// Major and minor number.
    pub(super) number: (u32, u32),
    /// Its name below `/dev`.
    pub(super) name: String,
}

/// What is below a device.
#[derive(Debug)]
pub(super) struct Below {
    entries: Vec<Entry>,
    /// Directories in which network interfaces lie.
    pub(super) net_dirs: Vec<PathBuf>,
}

impl Below {
    /// Finds what is below the device at `dir`, a path without links. The disks of an NVMe subsystem lie elsewhere:
    /// they are below every controller that leads to them.
    pub(super) fn find(sysfs: &Path, dir: &Path) -> Result<Self, String> {
        let mut below = Self { entries: Vec::new(), net_dirs: Vec::new() };
        below.walk(dir, MAX_DEPTH)?;
        let subsystems = sysfs.join("class/nvme-subsystem");
        for name in names(&subsystems)? {
            let at = subsystems.join(name);
            let at = fs::canonicalize(&at).map_err(|error| unknown(&at, &error))?;
            // An entry that goes away meanwhile is none.
            let leads = |name: &String| fs::canonicalize(at.join(name)).is_ok_and(|to| to.starts_with(dir));
            if names(&at)?.iter().any(leads) {
                below.walk(&at, MAX_DEPTH)?;
            }
        }
        Ok(below)
    }

    /// The entries of this class or bus.
    pub(super) fn of<'a>(&'a self, subsystem: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.entries.iter().filter(move |entry| entry.subsystem == subsystem)
    }

    /// The entries that have a device file.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Entry, &DeviceFile)> {
        self.entries.iter().filter_map(|entry| Some((entry, entry.file.as_ref()?)))
    }

    fn walk(&mut self, dir: &Path, depth: usize) -> Result<(), String> {
        if depth == 0 {
            return Err(format!("whether it is used cannot be found out: {} goes too deep", dir.display()));
        }
        for name in names(dir)? {
            let path = dir.join(&name);
            // A link leads out of the device, or up again.
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

/// The device file of the entry at `dir`, where it has one.
fn device_file(dir: &Path, name: &str) -> Result<Option<DeviceFile>, String> {
    let Some(number) = text(&dir.join("dev"))? else { return Ok(None) };
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
    let event = text_of(&dir.join("uevent"))?;
    let named = event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or(name);
    Ok(Some(DeviceFile { number, name: named.to_owned() }))
}
