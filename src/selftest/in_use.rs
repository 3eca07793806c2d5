//! Whether somebody uses a device: a mounted disk, a network interface that is up, a GPU with a process on it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use passgate_bindings::vfio::PciAddress;

/// Who uses the device, in words; none where nobody does.
pub(super) fn in_use(sysfs: &Path, proc: &Path, address: PciAddress) -> Option<String> {
    let device = sysfs.join("bus/pci/devices").join(address.to_string());
    let device = fs::canonicalize(device).ok()?;
    disk(sysfs, proc, &device).or_else(|| network(sysfs, proc, &device)).or_else(|| graphics(proc, &device))
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// The entries of a class (`block`, `net`, `drm`) whose device is this one, or lies below it.
fn of_class(sysfs: &Path, class: &str, device: &Path) -> Vec<String> {
    let dir = sysfs.join("class").join(class);
    let below = |name: &String| fs::canonicalize(dir.join(name)).is_ok_and(|at| at.starts_with(device));
    names(&dir).into_iter().filter(below).collect()
}

/// A disk, or a part of one, that is mounted, swapped to, or part of another (RAID, device mapper).
fn disk(sysfs: &Path, proc: &Path, device: &Path) -> Option<String> {
    let mounts = fs::read_to_string(proc.join("mounts")).unwrap_or_default();
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    for name in of_class(sysfs, "block", device) {
        let node = format!("/dev/{name}");
        let mut lines = mounts.lines().map(|line| line.split(' '));
        if let Some(at) = lines.find_map(|mut words| (words.next()? == node).then(|| words.next())?) {
            return Some(format!("{node} is mounted at {at}: unmount it"));
        }
        if swaps.lines().any(|line| line.split_whitespace().next() == Some(&node)) {
            return Some(format!("{node} is swapped to: swapoff {node}"));
        }
        if let Some(holder) = names(&sysfs.join("class/block").join(&name).join("holders")).first() {
            return Some(format!("{node} is a part of {holder}: stop that first"));
        }
    }
    None
}

/// An interface that is up, has a route, an address of IPv6, or a master.
fn network(sysfs: &Path, proc: &Path, device: &Path) -> Option<String> {
    const UP: u32 = 1; // IFF_UP, include/uapi/linux/if.h
    let routes = fs::read_to_string(proc.join("net/route")).unwrap_or_default();
    let addresses = fs::read_to_string(proc.join("net/if_inet6")).unwrap_or_default();
    for name in of_class(sysfs, "net", device) {
        let at = sysfs.join("class/net").join(&name);
        let flags = fs::read_to_string(at.join("flags")).unwrap_or_default();
        let flags = flags.trim().strip_prefix("0x").and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let why = if routes.lines().any(|line| line.split_whitespace().next() == Some(&name)) {
            "has a route"
        } else if addresses.lines().any(|line| line.split_whitespace().next_back() == Some(&name)) {
            "has an address"
        } else if at.join("master").exists() {
            "is a part of another interface"
        } else if flags.is_none_or(|flags| flags & UP != 0) {
            "is up"
        } else {
            continue;
        };
        return Some(format!("network interface {name} {why}: ip link set {name} down"));
    }
    None
}

/// A GPU whose device files a process has open.
fn graphics(proc: &Path, device: &Path) -> Option<String> {
    let nodes: BTreeSet<String> =
        names(&device.join("drm")).into_iter().map(|name| format!("/dev/dri/{name}")).collect();
    let is_nvidia = fs::read_link(device.join("driver")).is_ok_and(|driver| driver.ends_with("nvidia"));
    for pid in names(proc).into_iter().filter(|name| name.bytes().all(|digit| digit.is_ascii_digit())) {
        for fd in names(&proc.join(&pid).join("fd")) {
            let Ok(target) = fs::read_link(proc.join(&pid).join("fd").join(fd)) else { continue };
            let target = target.to_string_lossy().into_owned();
            if nodes.contains(&target) || is_nvidia && target.starts_with("/dev/nvidia") {
                let who = fs::read_to_string(proc.join(&pid).join("comm")).unwrap_or_default();
                return Some(format!("process {pid} ({}) has {target} open: stop it", who.trim()));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const ADDRESS: &str = "0000:04:00.0";

    /// A host with one device, and a place for its `class` entry called `name`.
    fn host(class: &str, name: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let host = tempfile::tempdir().unwrap();
        let device = host.path().join("sys/devices/pci0000:00").join(ADDRESS);
        let entry = device.join(class).join(name);
        for dir in
            [&entry, &host.path().join("sys/bus/pci/devices"), &host.path().join("sys/class").join(class)]
        {
            fs::create_dir_all(dir).unwrap();
        }
        symlink(&device, host.path().join("sys/bus/pci/devices").join(ADDRESS)).unwrap();
        symlink(&entry, host.path().join("sys/class").join(class).join(name)).unwrap();
        fs::create_dir_all(host.path().join("proc/net")).unwrap();
        (host, entry)
    }

    fn says(host: &tempfile::TempDir) -> Option<String> {
        in_use(&host.path().join("sys"), &host.path().join("proc"), ADDRESS.parse().unwrap())
    }

    #[test]
    fn a_mounted_disk_is_in_use() {
        let (host, entry) = host("block", "nvme0n1p1");
        assert_eq!(says(&host), None);
        let proc = host.path().join("proc");
        fs::write(proc.join("mounts"), "/dev/nvme0n1p10 /other ext4 rw 0 0\n").unwrap();
        assert_eq!(says(&host), None, "another's name begins alike");
        fs::write(proc.join("mounts"), "/dev/nvme0n1p1 /data ext4 rw 0 0\n").unwrap();
        assert!(says(&host).unwrap().contains("/dev/nvme0n1p1 is mounted at /data"));
        fs::write(proc.join("mounts"), "").unwrap();
        fs::write(proc.join("swaps"), "Filename Type\n/dev/nvme0n1p1 partition 8 0 -2\n").unwrap();
        assert!(says(&host).unwrap().contains("is swapped to"));
        fs::write(proc.join("swaps"), "").unwrap();
        fs::create_dir_all(entry.join("holders/md0")).unwrap();
        assert!(says(&host).unwrap().contains("is a part of md0"));
    }

    #[test]
    fn a_network_interface_that_is_up_or_has_a_route_is_in_use() {
        let (host, entry) = host("net", "eth7");
        let proc = host.path().join("proc");
        fs::write(entry.join("flags"), "0x1002\n").unwrap();
        assert_eq!(says(&host), None);
        fs::write(entry.join("flags"), "0x1003\n").unwrap();
        assert!(says(&host).unwrap().contains("eth7 is up"));
        fs::write(entry.join("flags"), "0x1002\n").unwrap();
        fs::write(proc.join("net/route"), "Iface Destination\neth7 0000A8C0 0 0\n").unwrap();
        assert!(says(&host).unwrap().contains("has a route"));
        fs::write(proc.join("net/route"), "").unwrap();
        fs::write(proc.join("net/if_inet6"), "fe80 02 40 20 80 eth7\n").unwrap();
        assert!(says(&host).unwrap().contains("has an address"));
    }

    #[test]
    fn a_gpu_with_a_process_on_it_is_in_use() {
        let (host, _) = host("drm", "renderD128");
        let process = host.path().join("proc/42");
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::write(process.join("comm"), "glxgears\n").unwrap();
        symlink("/dev/dri/renderD129", process.join("fd/3")).unwrap();
        assert_eq!(says(&host), None);
        symlink("/dev/dri/renderD128", process.join("fd/4")).unwrap();
        assert!(says(&host).unwrap().contains("process 42 (glxgears) has /dev/dri/renderD128 open"));
    }
}
