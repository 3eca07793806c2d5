//! The processes that have a VFIO device or its group open, as `/proc/PID/fd` shows them.
//!
//! A cdev or a group is identified by its device number, whatever path it was opened by. A device descriptor that was
//! obtained from a group (`VFIO_GROUP_GET_DEVICE_FD`) is an anonymous inode without a number: newer kernels name its device in
//! `/proc/PID/fdinfo`, with older ones it is known only that the process has some VFIO device. Nothing in `/dev` is opened: link
//! targets are read, and only those that contain `vfio` are examined.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::PciDevice;
use serde::Serialize;

use super::visibility::{Blind, OpenFile, each_open_file, has_ended};

/// The maximum length of a recorded command line, in characters.
const MAX_COMMAND_CHARS: usize = 120;
/// The maximum number of processes that are recorded for one device.
const MAX_PROCESSES: usize = 64;

/// A process, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// The process ID.
    pub pid: u32,
    /// The command line, shortened; the name of the process (`comm`) in brackets if it has none.
    pub command: String,
}

/// The processes that have a device open, as far as this user may see.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owner {
    /// The processes that have the device open: its cdev, its group, or a descriptor obtained from the group.
    pub processes: Vec<Process>,
    /// The processes with a VFIO device descriptor whose device the kernel does not name: it may be this one.
    pub possible: Vec<Process>,
    /// The reason why some process or its files may not have been seen; none if all were.
    pub incomplete: Option<Blind>,
}

/// A snapshot of all processes that have a VFIO cdev, group or device open.
#[derive(Debug, Default)]
pub struct Holders {
    /// By the device number of a cdev or a group.
    by_number: BTreeMap<(u32, u32), Vec<Process>>,
    /// By the address of a device that was opened by its group.
    by_device: BTreeMap<PciAddress, Vec<Process>>,
    /// Processes with a device that the kernel does not name.
    unnamed: Vec<Process>,
    incomplete: Option<Blind>,
}

impl Holders {
    /// Scans every process in `proc`, which is `/proc` except in tests.
    pub fn scan(proc: &Path) -> Self {
        let mut found = Self::default();
        let incomplete = each_open_file(proc, |file| found.record(file));
        found.incomplete = incomplete.or(found.incomplete);
        found
    }

    fn record(&mut self, file: &OpenFile<'_>) {
        if !file.target.contains("vfio") {
            return;
        }
        let process = || Process { pid: file.pid, command: command_line(file.dir) };
        if file.target == "anon_inode:[vfio-device]" {
            let info = file.link.file_name().map(|fd| file.dir.join("fdinfo").join(fd));
            match info.and_then(|info| device_of_fdinfo(&info)) {
                Some(address) => add(self.by_device.entry(address).or_default(), process),
                None => add(&mut self.unnamed, process),
            }
        } else {
            match fs::metadata(&file.link) {
                Ok(meta) if meta.file_type().is_char_device() => {
                    let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
                    add(self.by_number.entry(number).or_default(), process);
                }
                Ok(_) => {}
                Err(error) if has_ended(&error) => {}
                Err(_) => self.incomplete = self.incomplete.or(Some(Blind::Denied)),
            }
        }
    }

    /// Returns the processes that have `device` of `sysfs` open.
    pub fn of(&self, sysfs: &Path, device: &PciDevice) -> Owner {
        let mut processes = Vec::new();
        let cdev = device.cdev().map(|cdev| cdev.number);
        let group = device.group().and_then(|group| group_number(sysfs, group.id));
        let numbers = [cdev, group].into_iter().flatten();
        let lists = numbers.filter_map(|number| self.by_number.get(&number));
        for process in lists.chain(self.by_device.get(&device.address())).flatten() {
            add_unique(&mut processes, process);
        }
        Owner { processes, possible: self.unnamed.clone(), incomplete: self.incomplete }
    }

    /// Returns the processes that have `device` or another device of its group open: VFIO gives a group to one process only.
    pub fn of_group(&self, sysfs: &Path, device: &PciDevice) -> Owner {
        let mut owner = self.of(sysfs, device);
        for other in device.group().into_iter().flat_map(|group| group.members) {
            let Some(other) = PciDevice::find(sysfs, other) else { continue };
            for process in &self.of(sysfs, &other).processes {
                add_unique(&mut owner.processes, process);
            }
        }
        owner
    }
}

/// Adds a process unless it is in the list, whichever of its files was found before.
fn add_unique(list: &mut Vec<Process>, process: &Process) {
    if list.len() < MAX_PROCESSES && !list.contains(process) {
        list.push(process.clone());
    }
}

fn add(list: &mut Vec<Process>, process: impl FnOnce() -> Process) {
    let process = process();
    add_unique(list, &process);
}

/// Returns the device number of the file of a group.
fn group_number(sysfs: &Path, id: u32) -> Option<(u32, u32)> {
    let text = fs::read_to_string(sysfs.join(format!("class/vfio/{id}/dev"))).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Returns the device of a VFIO device file, if the kernel names it (`vfio-device-syspath` in its fdinfo).
fn device_of_fdinfo(fdinfo: &Path) -> Option<PciAddress> {
    let text = fs::read_to_string(fdinfo).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    path.trim().rsplit('/').next()?.parse().ok()
}

/// Returns the shortened command line of the process at `dir`, without control characters ([`Process::command`]).
pub(crate) fn command_line(dir: &Path) -> String {
    let bytes = fs::read(dir.join("cmdline")).unwrap_or_default();
    let mut words: Vec<_> = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    while words.last().is_some_and(|word| word.is_empty()) {
        words.pop();
    }
    let line = match words.is_empty() {
        true => format!("[{}]", fs::read_to_string(dir.join("comm")).unwrap_or_default().trim()),
        false => words.join(" "),
    };
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut shortened: String = line.chars().take(MAX_COMMAND_CHARS).map(clean).collect();
    if line.chars().nth(MAX_COMMAND_CHARS).is_some() {
        shortened.push('…');
    }
    shortened
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host::inventory::fake::FakeTree;

    fn pids(processes: &[Process]) -> Vec<u32> {
        processes.iter().map(|process| process.pid).collect()
    }

    /// `/dev/null` is 1:3 and `/dev/zero` 1:5 everywhere: they stand for a cdev and a group.
    #[test]
    fn holder_is_found_by_cdev_group_and_fdinfo() {
        let tree = FakeTree::new();
        tree.device("0000:04:00.0", 0x010802, Some("vfio-pci"), Some(7));
        tree.device("0000:04:00.1", 0x010802, Some("vfio-pci"), Some(7));
        tree.write("bus/pci/devices/0000:04:00.0/vfio-dev/vfio0/dev", "1:3\n");
        tree.write("class/vfio/7/dev", "1:5\n");
        for (pid, fd, target) in [
            (10, 3, "vfio/devices/vfio0"),
            (10, 4, "vfio/devices/vfio0"),
            (11, 5, "vfio/7"),
            (12, 6, "unrelated"),
        ] {
            let name = tree.path().join(target);
            fs::create_dir_all(name.parent().unwrap()).unwrap();
            let _ = symlink(if target == "vfio/7" { "/dev/zero" } else { "/dev/null" }, &name);
            tree.link(&format!("proc/{pid}/fd/{fd}"), name.to_str().unwrap());
        }
        for pid in [13, 14] {
            tree.link(&format!("proc/{pid}/fd/9"), "anon_inode:[vfio-device]");
        }
        tree.write(
            "proc/13/fdinfo/9",
            "pos:\t0\nvfio-device-syspath:\t/sys/devices/pci0000:00/0000:04:00.1\n",
        );
        tree.write("proc/14/fdinfo/9", "pos:\t0\n");
        tree.write("proc/10/cmdline", "passgate\0serve\0--device\x1b\0");
        tree.write("proc/11/comm", "vhost\n");
        tree.write("proc/11/cmdline", "");
        tree.write("proc/sys/kernel", "no process");

        let holders = Holders::scan(&tree.path().join("proc"));
        let find = |address: &str| PciDevice::find(tree.path(), address.parse().unwrap()).unwrap();
        let first = holders.of(tree.path(), &find("04:00.0"));
        assert_eq!(pids(&first.processes), [10, 11], "once each");
        assert_eq!(first.processes[0].command, "passgate serve --device?");
        assert_eq!(first.processes[1].command, "[vhost]");
        assert_eq!((pids(&first.possible), first.incomplete), (vec![14], None));
        let second = find("04:00.1");
        assert_eq!(pids(&holders.of(tree.path(), &second).processes), [11, 13]);
        assert_eq!(pids(&holders.of_group(tree.path(), &second).processes), [11, 13, 10]);
    }

    #[test]
    fn long_command_line_is_shortened() {
        let tree = FakeTree::new();
        tree.write("proc/1/cmdline", "ü".repeat(500));
        let shortened = command_line(&tree.path().join("proc/1"));
        assert_eq!(shortened.chars().count(), MAX_COMMAND_CHARS + 1);
        assert!(shortened.ends_with('…'));
    }

    #[test]
    fn holder_is_unknown_without_procfs() {
        let holders = Holders::scan(Path::new("/nowhere"));
        assert!(holders.by_number.is_empty());
        assert_eq!(holders.incomplete, Some(Blind::NoProcfs));
    }
}
