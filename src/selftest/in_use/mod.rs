//! Whether somebody uses a device that is to be taken from its driver: a disk, a network interface, a display, or a
//! process with one of its device files.
//!
//! The kernel is asked, not a list: a disk is free when it can be opened exclusively, which mounts, swap, md, device
//! mapper, btrfs and ZFS all prevent, in any mount namespace. Lists only give the reason a name. What cannot be found
//! out counts as use: this check may refuse a free device, and must never pass one that is used.

mod below;
mod disk;
mod display;
mod network;
mod processes;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use passgate_bindings::vfio::PciAddress;

use below::Below;

/// Where a host's file systems are mounted: elsewhere only in tests.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// `/sys`.
    pub sysfs: &'a Path,
    /// `/proc`.
    pub proc: &'a Path,
    /// `/dev`.
    pub dev: &'a Path,
}

/// The disks of a device, opened exclusively. Nobody mounts, or makes anything of them, until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Claims {
    /// Held for what their being open prevents.
    _disks: Vec<File>,
}

/// Claims what is below the device. An error says, in words, who uses the device, or why that cannot be found out.
pub fn claim(host: Host<'_>, address: PciAddress) -> Result<Claims, String> {
    let dir = host.sysfs.join("bus/pci/devices").join(address.to_string());
    let dir = match fs::canonicalize(&dir) {
        // Whoever opens it says that it is not there.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Claims { _disks: Vec::new() }),
        found => found.map_err(|error| unknown(&dir, &error))?,
    };
    let below = Below::find(host.sysfs, &dir)?;
    virtual_functions(&dir)?;
    let disks = disk::claim(host, &below)?;
    network::check(host, &below)?;
    display::check(host, &dir, &below)?;
    for entry in below.of("dma") {
        if !number_is_zero(&entry.dir.join("in_use"))? {
            return Err(format!("its DMA channel {} is in use", entry.name));
        }
    }
    processes::check(host, &dir, &below)?;
    Ok(Claims { _disks: disks })
}

/// A physical function takes its virtual functions with it.
fn virtual_functions(dir: &Path) -> Result<(), String> {
    let path = dir.join("sriov_numvfs");
    if number_is_zero(&path)? {
        return Ok(());
    }
    Err(format!("it has virtual functions: echo 0 > {}", path.display()))
}

fn number_is_zero(path: &Path) -> Result<bool, String> {
    Ok(text(path)?.is_none_or(|number| number.trim() == "0"))
}

/// The text of a file; none where there is no such file.
fn text(path: &Path) -> Result<Option<String>, String> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unknown(path, &error)),
    }
}

/// The text of a file without which nothing can be said.
fn text_of(path: &Path) -> Result<String, String> {
    text(path)?
        .ok_or_else(|| format!("whether it is used cannot be found out: there is no {}", path.display()))
}

/// The entries of a directory; none where there is no such directory.
fn names(dir: &Path) -> Result<Vec<String>, String> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unknown(dir, &error)),
    };
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().to_string_lossy().into());
    entries.map(name).collect::<Result<_, _>>().map_err(|error| unknown(dir, &error))
}

fn unknown(path: &Path, error: &std::io::Error) -> String {
    format!("whether it is used cannot be found out: {}: {error}; run as root", path.display())
}

/// The path of a device file called `name` by the kernel.
fn node(host: Host<'_>, name: &str) -> PathBuf {
    host.dev.join(name)
}

#[cfg(test)]
pub(super) mod fake;

#[cfg(test)]
mod tests {
    use super::fake::{ADDRESS, Fake};
    use super::*;

    #[test]
    fn a_device_with_nothing_below_it_is_free() {
        let fake = Fake::new();
        assert_eq!(fake.says(), None);
        let nowhere = Path::new("/nowhere");
        let host = Host { sysfs: nowhere, proc: nowhere, dev: nowhere };
        assert!(claim(host, ADDRESS.parse().unwrap()).is_ok(), "the error is that of who opens it");
    }

    #[test]
    fn a_device_with_virtual_functions_is_in_use() {
        let fake = Fake::new();
        fake.write("sriov_numvfs", "0\n");
        assert_eq!(fake.says(), None);
        fake.write("sriov_numvfs", "2\n");
        assert!(fake.says().unwrap().contains("it has virtual functions: echo 0 > "));
    }

    #[test]
    fn a_dma_channel_with_a_client_is_in_use() {
        let fake = Fake::new();
        let channel = fake.entry("dma", "dma/dma0chan0", None);
        fake.write("dma/dma0chan0/in_use", "0\n");
        assert_eq!(fake.says(), None);
        fs::write(channel.join("in_use"), "1\n").unwrap();
        assert_eq!(fake.says().unwrap(), "its DMA channel dma0chan0 is in use");
    }
}
