//! Checks that a device which is to be unbound from its driver is not in use: as a disk, a network interface, a display, or
//! by a process that has one of its device files open.
//!
//! For a disk the kernel decides, and not a list: the disk is free if it can be opened exclusively, which mounts, swap, md,
//! device mapper, btrfs and ZFS all prevent, in any mount namespace. Lists serve only to name the user. What cannot be
//! determined counts as in use: this check may refuse a free device, but must never pass one that is used.

mod descendants;
mod disk;
mod display;
mod network;
mod processes;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use passgate_bindings::vfio::PciAddress;

use descendants::Descendants;

/// The mount points of the file systems of a host. They differ from the comments below only in tests.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// The mount point of sysfs, `/sys`.
    pub sysfs: &'a Path,
    /// The mount point of procfs, `/proc`.
    pub proc: &'a Path,
    /// The directory of device files, `/dev`.
    pub dev: &'a Path,
}

/// The disks of a device, opened exclusively. Until this is dropped, nobody can mount them or add them to an md array, a
/// device mapper table or the like.
#[derive(Debug)]
#[must_use]
pub struct Claims {
    /// Never read: the disks are claimed while these files are open.
    _disks: Vec<File>,
}

/// Claims the disks of the device, after checking that nothing else of it is in use. The error is text for the user: who
/// uses the device and the remedy, or why that cannot be determined.
pub fn claim(host: Host<'_>, address: PciAddress) -> Result<Claims, String> {
    let dir = host.sysfs.join("bus/pci/devices").join(address.to_string());
    let dir = match fs::canonicalize(&dir) {
        // That there is no such device is reported when it is opened.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Claims { _disks: Vec::new() }),
        found => found.map_err(|error| unreadable(&dir, &error))?,
    };
    let descendants = Descendants::find(host.sysfs, &dir)?;
    check_virtual_functions(&dir)?;
    let disks = disk::claim(host, &descendants)?;
    network::check(host, &descendants)?;
    display::check(host, &dir, &descendants)?;
    for entry in descendants.of_subsystem("dma") {
        if !is_zero(&entry.dir.join("in_use"))? {
            return Err(format!("its DMA channel {} is in use", entry.name));
        }
    }
    processes::check(host, &dir, &descendants)?;
    Ok(Claims { _disks: disks })
}

/// Refuses a physical function that has virtual functions: unbinding its driver removes them.
fn check_virtual_functions(dir: &Path) -> Result<(), String> {
    let path = dir.join("sriov_numvfs");
    if is_zero(&path)? {
        return Ok(());
    }
    Err(format!("it has virtual functions: echo 0 > {}", path.display()))
}

/// Returns true if the file contains 0, or does not exist.
fn is_zero(path: &Path) -> Result<bool, String> {
    Ok(read_optional(path)?.is_none_or(|number| number.trim() == "0"))
}

/// Returns the text of a file; none if there is no such file.
fn read_optional(path: &Path) -> Result<Option<String>, String> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// Returns the text of a file. That it does not exist is an error too: without it, use cannot be ruled out.
fn read_required(path: &Path) -> Result<String, String> {
    read_optional(path)?
        .ok_or_else(|| format!("whether it is used cannot be found out: there is no {}", path.display()))
}

/// Returns the names in a directory; none if there is no such directory.
fn list_dir(dir: &Path) -> Result<Vec<String>, String> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(dir, &error)),
    };
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().to_string_lossy().into());
    entries.map(name).collect::<Result<_, _>>().map_err(|error| unreadable(dir, &error))
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    format!("whether it is used cannot be found out: {}: {error}; run as root", path.display())
}

/// Returns the path of the device file that the kernel calls `name`.
fn device_node(host: Host<'_>, name: &str) -> PathBuf {
    host.dev.join(name)
}

#[cfg(test)]
pub(super) mod fake;

#[cfg(test)]
mod tests {
    use super::fake::{ADDRESS, FakeHost};
    use super::*;

    #[test]
    fn device_without_descendants_is_free() {
        let fake = FakeHost::new();
        assert_eq!(fake.user(), None);
        let nowhere = Path::new("/nowhere");
        let host = Host { sysfs: nowhere, proc: nowhere, dev: nowhere };
        assert!(
            claim(host, ADDRESS.parse().unwrap()).is_ok(),
            "a device that does not exist is reported when it is opened"
        );
    }

    #[test]
    fn device_with_virtual_functions_is_in_use() {
        let fake = FakeHost::new();
        fake.write("sriov_numvfs", "0\n");
        assert_eq!(fake.user(), None);
        fake.write("sriov_numvfs", "2\n");
        assert!(fake.user().unwrap().contains("it has virtual functions: echo 0 > "));
    }

    #[test]
    fn dma_channel_with_client_is_in_use() {
        let fake = FakeHost::new();
        let channel = fake.entry("dma", "dma/dma0chan0", None);
        fake.write("dma/dma0chan0/in_use", "0\n");
        assert_eq!(fake.user(), None);
        fs::write(channel.join("in_use"), "1\n").unwrap();
        assert_eq!(fake.user().unwrap(), "its DMA channel dma0chan0 is in use");
    }
}
