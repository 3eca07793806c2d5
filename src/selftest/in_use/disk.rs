//! Disks: each is claimed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, major, minor};
use rustix::io::Errno;

use super::below::{Below, DeviceFile, Entry};
use super::{Host, names, node, text, text_of, unknown};

/// Opens every disk below the device exclusively. A claim of a disk fails where one of its partitions is claimed, and
/// keeps others from claiming any (`bd_may_claim`, block/bdev.c).
pub(super) fn claim(host: Host<'_>, below: &Below) -> Result<Vec<File>, String> {
    let mut claimed = Vec::new();
    let disks = below.of("block").filter(|entry| !entry.dir.join("partition").exists());
    for disk in disks {
        let parts: Vec<_> = below.of("block").filter(|entry| entry.dir.starts_with(&disk.dir)).collect();
        for part in &parts {
            if let Some(user) = user(host, part)? {
                return Err(user);
            }
        }
        // A path of a multipath disk has no device file; the disk is below the device as well.
        if text(&disk.dir.join("hidden"))?.is_some_and(|hidden| hidden.trim() == "1") {
            continue;
        }
        match exclusively(host, disk)? {
            Claim::Have(file) => claimed.push(file),
            Claim::NoMedium => {}
            Claim::Busy => {
                // Of its partitions one says more than the disk.
                let mut name = disk.name.as_str();
                for part in parts.iter().filter(|part| part.dir != disk.dir) {
                    if matches!(exclusively(host, part)?, Claim::Busy) {
                        name = &part.name;
                    }
                }
                return Err(format!(
                    "{} cannot be opened exclusively: it is mounted in another namespace, or a part of a btrfs, a ZFS \
                     pool or the like; stop what uses it",
                    node(host, name).display()
                ));
            }
        }
    }
    Ok(claimed)
}

enum Claim {
    Have(File),
    Busy,
    /// A drive for removable media without one.
    NoMedium,
}

fn exclusively(host: Host<'_>, entry: &Entry) -> Result<Claim, String> {
    let Some(DeviceFile { number, name }) = &entry.file else {
        return Err(format!("whether {} is used cannot be found out: it has no device number", entry.name));
    };
    let path = node(host, name);
    let flags = OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::BUSY) => return Ok(Claim::Busy),
            Some(Errno::NOMEDIUM) => return Ok(Claim::NoMedium),
            _ => return Err(unknown(&path, &error)),
        },
    };
    let meta = file.metadata().map_err(|error| unknown(&path, &error))?;
    if !meta.file_type().is_block_device() || (major(meta.rdev()), minor(meta.rdev())) != *number {
        return Err(format!(
            "whether {} is used cannot be found out: {} is another file",
            entry.name,
            path.display()
        ));
    }
    Ok(Claim::Have(file))
}

/// Who uses this disk or partition, where a list says so.
fn user(host: Host<'_>, part: &Entry) -> Result<Option<String>, String> {
    let Some(DeviceFile { number: (major, minor), name }) = &part.file else { return Ok(None) };
    let path = node(host, name);
    let path = path.display();
    let number = format!("{major}:{minor}");
    // Fields of a line: include Documentation/filesystems/proc.rst, 3.5.
    let mounts = text_of(&host.proc.join("self/mountinfo"))?;
    let mut lines = mounts.lines().map(|line| line.split(' ').skip(2));
    if let Some(at) = lines.find_map(|mut fields| (fields.next()? == number).then(|| fields.nth(1))?) {
        return Ok(Some(format!("{path} is mounted at {at}: unmount it")));
    }
    let swaps = text(&host.proc.join("swaps"))?.unwrap_or_default();
    let is_this = |swap: &str| fs::metadata(swap).is_ok_and(|meta| is_block(&meta, (*major, *minor)));
    if swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(is_this) {
        return Ok(Some(format!("{path} is swapped to: swapoff {path}")));
    }
    if let Some(holder) = names(&part.dir.join("holders"))?.first() {
        return Ok(Some(format!("{path} is a part of {}: stop that first", full_name(host, holder)?)));
    }
    for id in names(&host.sysfs.join("fs/btrfs"))? {
        if host.sysfs.join("fs/btrfs").join(&id).join("devices").join(&part.name).exists() {
            return Ok(Some(format!("{path} is a device of the mounted btrfs {id}: unmount it")));
        }
    }
    for name in names(&host.sysfs.join("block"))? {
        let backing = text(&host.sysfs.join("block").join(&name).join("loop/backing_file"))?;
        if backing.is_some_and(|file| is_this(file.trim_end_matches('\n'))) {
            return Ok(Some(format!("{path} is behind {name}: losetup -d {name}")));
        }
    }
    exported(host, is_this)
        .map(|name| name.map(|name| format!("{path} is exported by nvmet as {name}: disable it")))
}

/// The namespace of the kernel's NVMe target that exports a disk, which it does not open exclusively.
fn exported(host: Host<'_>, is_this: impl Fn(&str) -> bool) -> Result<Option<String>, String> {
    let subsystems = host.sysfs.join("kernel/config/nvmet/subsystems");
    for subsystem in names(&subsystems)? {
        let spaces = subsystems.join(&subsystem).join("namespaces");
        for name in names(&spaces)? {
            let is_off = text(&spaces.join(&name).join("enable"))?.is_some_and(|on| on.trim() == "0");
            let exports = text(&spaces.join(&name).join("device_path"))?;
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

/// The name of a holder, with that of its own where it is of the device mapper.
fn full_name(host: Host<'_>, holder: &str) -> Result<String, String> {
    let named = text(&Path::new(&host.sysfs.join("class/block").join(holder)).join("dm/name"))?;
    Ok(named.map_or(holder.to_owned(), |name| format!("{holder} ({})", name.trim())))
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;

    /// `/dev/null` stands for a node that is not the disk.
    #[test]
    fn a_disk_that_cannot_be_opened_is_not_free() {
        let fake = Fake::new();
        fake.entry("block", "nvme/nvme0/nvme0n1", Some("259:0"));
        assert!(fake.says().unwrap().contains("cannot be found out"), "there is no node");
        fake.link_node("nvme0n1", "/dev/null");
        assert!(fake.says().unwrap().contains("nvme0n1 is another file"));
    }

    #[test]
    fn whoever_uses_a_disk_is_named() {
        let fake = Fake::new();
        fake.entry("block", "nvme/nvme0/nvme0n1", Some("259:0"));
        let part = fake.entry("block", "nvme/nvme0/nvme0n1/nvme0n1p1", Some("259:1"));
        fake.write("nvme/nvme0/nvme0n1/nvme0n1p1/partition", "1\n");
        fake.mounts("36 35 259:1 / /data rw,noatime - ext4 /dev/root rw\n");
        let said = fake.says().unwrap();
        assert!(
            said.ends_with("dev/nvme0n1p1 is mounted at /data: unmount it"),
            "by number, not by name: {said}"
        );
        fake.mounts("36 35 259:10 / /data rw,noatime - ext4 /dev/nvme0n1p1 rw\n");
        assert!(fake.says().unwrap().contains("cannot be found out"), "another's number begins alike");
        std::fs::create_dir_all(part.join("holders/md0")).unwrap();
        assert!(fake.says().unwrap().ends_with("nvme0n1p1 is a part of md0: stop that first"));
        std::fs::remove_dir(part.join("holders/md0")).unwrap();
        std::fs::create_dir_all(fake.sysfs().join("fs/btrfs/0af1/devices/nvme0n1p1")).unwrap();
        assert!(
            fake.says().unwrap().ends_with("nvme0n1p1 is a device of the mounted btrfs 0af1: unmount it")
        );
    }

    /// With native multipath the disk is not below its controller, only a hidden path is.
    #[test]
    fn the_disk_behind_a_path_of_an_nvme_subsystem_is_below_its_controller() {
        let fake = Fake::new();
        let controller = fake.entry("nvme", "nvme/nvme0", Some("245:0"));
        fake.entry("block", "nvme/nvme0/nvme0c0n1", Some("259:1"));
        fake.write("nvme/nvme0/nvme0c0n1/hidden", "1\n");
        assert_eq!(fake.says(), None, "a path is no disk");
        let subsystem = fake.elsewhere("nvme-subsystem", "nvme-subsys0", None);
        fake.elsewhere("block", "nvme-subsys0/nvme0n1", Some("259:0"));
        fake.mounts("36 35 259:0 / /data rw - xfs /dev/nvme0n1 rw\n");
        assert_eq!(fake.says(), None, "another's");
        std::os::unix::fs::symlink(controller, subsystem.join("nvme0")).unwrap();
        assert!(fake.says().unwrap().ends_with("nvme0n1 is mounted at /data: unmount it"));
    }

    #[test]
    fn without_a_list_of_mounts_no_disk_is_free() {
        let fake = Fake::new();
        fake.entry("block", "ata1/sda", Some("8:0"));
        fake.remove_mounts();
        assert!(fake.says().unwrap().contains("there is no "));
    }
}
