//! Disks: each disk of the device is claimed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, major, minor};
use rustix::io::Errno;

use super::descendants::{Descendants, DeviceFile, Entry};
use super::{Host, device_node, list_dir, read_optional, read_required, unreadable};

/// Opens every disk of the device exclusively. The claim of a disk fails if one of its partitions is claimed, and prevents
/// others from claiming any of them (`bd_may_claim`, block/bdev.c).
pub(super) fn claim(host: Host<'_>, descendants: &Descendants) -> Result<Vec<File>, String> {
    let mut claimed = Vec::new();
    let disks = descendants.of_subsystem("block").filter(|entry| !entry.dir.join("partition").exists());
    for disk in disks {
        let parts: Vec<_> =
            descendants.of_subsystem("block").filter(|entry| entry.dir.starts_with(&disk.dir)).collect();
        for part in &parts {
            if let Some(user) = find_user(host, part)? {
                return Err(user);
            }
        }
        // A path of an NVMe multipath disk is hidden and has no device file. The disk itself is among the descendants too.
        if read_optional(&disk.dir.join("hidden"))?.is_some_and(|hidden| hidden.trim() == "1") {
            continue;
        }
        match open_exclusively(host, disk)? {
            Claim::Opened(file) => claimed.push(file),
            Claim::NoMedium => {}
            Claim::Busy => {
                // A claimed partition is named instead of the disk.
                let mut name = disk.name.as_str();
                for part in parts.iter().filter(|part| part.dir != disk.dir) {
                    if matches!(open_exclusively(host, part)?, Claim::Busy) {
                        name = &part.name;
                    }
                }
                return Err(format!(
                    "{} cannot be opened exclusively: it is mounted in another namespace, or a part of a btrfs, a ZFS \
                     pool or the like; stop what uses it",
                    device_node(host, name).display()
                ));
            }
        }
    }
    Ok(claimed)
}

/// The result of opening a disk exclusively.
enum Claim {
    Opened(File),
    /// Another user has claimed it.
    Busy,
    /// A drive for removable media has no medium.
    NoMedium,
}

fn open_exclusively(host: Host<'_>, entry: &Entry) -> Result<Claim, String> {
    let Some(DeviceFile { number, name }) = &entry.file else {
        return Err(format!("whether {} is used cannot be found out: it has no device number", entry.name));
    };
    let path = device_node(host, name);
    // Without O_CREAT, O_EXCL claims a block device: open(2).
    let flags = OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::BUSY) => return Ok(Claim::Busy),
            Some(Errno::NOMEDIUM) => return Ok(Claim::NoMedium),
            _ => return Err(unreadable(&path, &error)),
        },
    };
    let meta = file.metadata().map_err(|error| unreadable(&path, &error))?;
    if !meta.file_type().is_block_device() || (major(meta.rdev()), minor(meta.rdev())) != *number {
        return Err(format!(
            "whether {} is used cannot be found out: {} is another file",
            entry.name,
            path.display()
        ));
    }
    Ok(Claim::Opened(file))
}

/// Returns who uses this disk or partition, with the remedy; none if no list of the kernel names a user.
fn find_user(host: Host<'_>, part: &Entry) -> Result<Option<String>, String> {
    let Some(DeviceFile { number: (major, minor), name }) = &part.file else { return Ok(None) };
    let path = device_node(host, name);
    let path = path.display();
    let number = format!("{major}:{minor}");
    // Fields 3 and 5 of a line are the device number and the mount point: Documentation/filesystems/proc.rst, 3.5.
    let mounts = read_required(&host.proc.join("self/mountinfo"))?;
    let mut lines = mounts.lines().map(|line| line.split(' ').skip(2));
    if let Some(at) = lines.find_map(|mut fields| (fields.next()? == number).then(|| fields.nth(1))?) {
        return Ok(Some(format!("{path} is mounted at {at}: unmount it")));
    }
    let swaps = read_optional(&host.proc.join("swaps"))?.unwrap_or_default();
    let is_this = |swap: &str| fs::metadata(swap).is_ok_and(|meta| is_block(&meta, (*major, *minor)));
    if swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(is_this) {
        return Ok(Some(format!("{path} is swapped to: swapoff {path}")));
    }
    if let Some(holder) = list_dir(&part.dir.join("holders"))?.first() {
        return Ok(Some(format!("{path} is a part of {}: stop that first", full_name(host, holder)?)));
    }
    for id in list_dir(&host.sysfs.join("fs/btrfs"))? {
        if host.sysfs.join("fs/btrfs").join(&id).join("devices").join(&part.name).exists() {
            return Ok(Some(format!("{path} is a device of the mounted btrfs {id}: unmount it")));
        }
    }
    for name in list_dir(&host.sysfs.join("block"))? {
        let backing = read_optional(&host.sysfs.join("block").join(&name).join("loop/backing_file"))?;
        if backing.is_some_and(|file| is_this(file.trim_end_matches('\n'))) {
            return Ok(Some(format!("{path} is behind {name}: losetup -d {name}")));
        }
    }
    nvmet_namespace(host, is_this)
        .map(|name| name.map(|name| format!("{path} is exported by nvmet as {name}: disable it")))
}

/// Returns the namespace of the kernel's NVMe target (nvmet) that exports a disk. nvmet does not open the disk exclusively.
fn nvmet_namespace(host: Host<'_>, is_this: impl Fn(&str) -> bool) -> Result<Option<String>, String> {
    let subsystems = host.sysfs.join("kernel/config/nvmet/subsystems");
    for subsystem in list_dir(&subsystems)? {
        let spaces = subsystems.join(&subsystem).join("namespaces");
        for name in list_dir(&spaces)? {
            let is_off =
                read_optional(&spaces.join(&name).join("enable"))?.is_some_and(|on| on.trim() == "0");
            let exports = read_optional(&spaces.join(&name).join("device_path"))?;
            if !is_off && exports.is_some_and(|file| is_this(file.trim())) {
                return Ok(Some(format!("{subsystem}/{name}")));
            }
        }
    }
    Ok(None)
}

fn is_block(meta: &fs::Metadata, number: (u32, u32)) -> bool {
    meta.file_type().is_block_device() && (major(meta.rdev()), minor(meta.rdev())) == number
}

/// Returns the name of a holder, with its device mapper name where it has one.
fn full_name(host: Host<'_>, holder: &str) -> Result<String, String> {
    let named = read_optional(&Path::new(&host.sysfs.join("class/block").join(holder)).join("dm/name"))?;
    Ok(named.map_or(holder.to_owned(), |name| format!("{holder} ({})", name.trim())))
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeHost;

    /// `/dev/null` stands for a node that is not the disk.
    #[test]
    fn disk_that_cannot_be_opened_is_in_use() {
        let fake = FakeHost::new();
        fake.entry("block", "nvme/nvme0/nvme0n1", Some("259:0"));
        assert!(fake.user().unwrap().contains("cannot be found out"), "there is no node");
        fake.link_node("nvme0n1", "/dev/null");
        assert!(fake.user().unwrap().contains("nvme0n1 is another file"));
    }

    #[test]
    fn user_of_disk_is_named() {
        let fake = FakeHost::new();
        fake.entry("block", "nvme/nvme0/nvme0n1", Some("259:0"));
        let part = fake.entry("block", "nvme/nvme0/nvme0n1/nvme0n1p1", Some("259:1"));
        fake.write("nvme/nvme0/nvme0n1/nvme0n1p1/partition", "1\n");
        fake.mounts("36 35 259:1 / /data rw,noatime - ext4 /dev/root rw\n");
        let user = fake.user().unwrap();
        assert!(
            user.ends_with("dev/nvme0n1p1 is mounted at /data: unmount it"),
            "by number, not by name: {user}"
        );
        fake.mounts("36 35 259:10 / /data rw,noatime - ext4 /dev/nvme0n1p1 rw\n");
        assert!(
            fake.user().unwrap().contains("cannot be found out"),
            "the number of another disk that starts with the same digits"
        );
        std::fs::create_dir_all(part.join("holders/md0")).unwrap();
        assert!(fake.user().unwrap().ends_with("nvme0n1p1 is a part of md0: stop that first"));
        std::fs::remove_dir(part.join("holders/md0")).unwrap();
        std::fs::create_dir_all(fake.sysfs().join("fs/btrfs/0af1/devices/nvme0n1p1")).unwrap();
        assert!(
            fake.user().unwrap().ends_with("nvme0n1p1 is a device of the mounted btrfs 0af1: unmount it")
        );
    }

    /// With native multipath only a hidden path is below the controller, and the disk is in the NVMe subsystem.
    #[test]
    fn nvme_multipath_disk_is_descendant_of_its_controller() {
        let fake = FakeHost::new();
        let controller = fake.entry("nvme", "nvme/nvme0", Some("245:0"));
        fake.entry("block", "nvme/nvme0/nvme0c0n1", Some("259:1"));
        fake.write("nvme/nvme0/nvme0c0n1/hidden", "1\n");
        assert_eq!(fake.user(), None, "a hidden path is not a disk");
        let subsystem = fake.elsewhere("nvme-subsystem", "nvme-subsys0", None);
        fake.elsewhere("block", "nvme-subsys0/nvme0n1", Some("259:0"));
        fake.mounts("36 35 259:0 / /data rw - xfs /dev/nvme0n1 rw\n");
        assert_eq!(fake.user(), None, "the disk of another controller");
        std::os::unix::fs::symlink(controller, subsystem.join("nvme0")).unwrap();
        assert!(fake.user().unwrap().ends_with("nvme0n1 is mounted at /data: unmount it"));
    }

    #[test]
    fn missing_mountinfo_makes_disk_in_use() {
        let fake = FakeHost::new();
        fake.entry("block", "ata1/sda", Some("8:0"));
        fake.remove_mounts();
        assert!(fake.user().unwrap().contains("there is no "));
    }
}
